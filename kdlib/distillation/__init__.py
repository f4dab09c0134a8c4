"""Distillation: the student, its objectives and its training."""
