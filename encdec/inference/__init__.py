"""Inference: cached generation as pure functions, text in and out, and its timing."""
