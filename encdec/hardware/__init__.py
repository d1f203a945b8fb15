"""Compiles for accelerators that this machine does not have, and predicts time and memory."""
