"""Evaluation: how a score is made, and compared."""
