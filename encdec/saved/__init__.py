"""Models on disk: configuration, parameters and their proof, what a model comes from."""
