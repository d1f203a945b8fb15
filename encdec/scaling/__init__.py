"""Scaling curves: plan a ladder of runs, run it, fit laws to it, plot it."""
