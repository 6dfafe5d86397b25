"""Metrics as `evaluate` modules: import them from here, or load them offline with `evaluate.load("PATH.py")`."""
