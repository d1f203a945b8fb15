"""Distillation from a teacher's logits, scored once and stored beside the records."""
