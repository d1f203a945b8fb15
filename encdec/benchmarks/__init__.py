"""Measurements of every part; each compares within one run."""
