"""The study: stages, runs, and the runner of the notebooks."""
