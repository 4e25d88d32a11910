"""Amortised inference in two-level models, over data sets of varying numbers of groups and of data."""
