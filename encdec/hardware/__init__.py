"""Accelerators that are not there: compile for them, and predict time and memory."""
