"""Corpora found on the user's own machine."""
