"""Distillation from a teacher's logits, computed once and stored next to the records."""
