"""Masked networks: layers, multilayer perceptrons, activations and Lipschitz bounds."""
