"""Trained models on tasks with references: answers, scores with intervals, comparisons, a table."""
