"""Amortised inference on the tasks of a published benchmark of simulation-based inference."""
