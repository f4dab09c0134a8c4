"""Evaluation: how a score is made, and how scores are compared."""
