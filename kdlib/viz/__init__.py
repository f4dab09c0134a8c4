"""Figures, pages and widgets."""
