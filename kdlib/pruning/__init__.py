"""Pruning: fewer embedding rows, the same token sequences and the same hidden states."""
