"""Training: configuration, state, optimizer, sharding, the step, the loop, checkpoints."""
