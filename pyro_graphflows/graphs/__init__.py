"""Bayesian networks as graphs: structure, inversion, separation and exact linear-Gaussian answers."""
