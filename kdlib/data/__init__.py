"""Data: text, tasks and where they come from."""
