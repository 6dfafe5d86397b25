"""Metrics as modules of `evaluate`, which import from here or load by path, offline: `evaluate.load("PATH.py")`."""
