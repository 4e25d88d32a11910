"""Measurements of speed, memory and accuracy; run from the root of the repository, ``python -m benchmarks.flows``."""
