"""Trained models on tasks with references: answers, scores with intervals, comparisons, a table."""

# The metrics under the name by which scripts know them.
from encdec.metrics import text as scores

__all__ = ["scores"]
