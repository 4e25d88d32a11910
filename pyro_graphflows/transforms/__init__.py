"""Residual flows whose Jacobians follow a graph."""
