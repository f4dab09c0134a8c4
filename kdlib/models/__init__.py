"""Models: families, loading, encoding, files."""
