"""Measurements, one script a claim, side by side with what else there is: `python -m benchmarks`, or `make bench`."""
