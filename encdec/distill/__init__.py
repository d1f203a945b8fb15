"""Distillation from a teacher's logits, scored once and stored next to the records."""
