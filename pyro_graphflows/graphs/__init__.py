"""Bayesian networks as graphs: structure, inversion, separation and exact linear-Gaussian answers."""

from pyro_graphflows.graphs.inverse_graph import InverseGraph
from pyro_graphflows.graphs.model_graph import ModelGraph

__all__ = ["InverseGraph", "ModelGraph"]
