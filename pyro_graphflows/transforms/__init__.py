"""Residual flows whose Jacobians follow a graph."""

from pyro_graphflows.transforms.faithful_residual import (
    ConditionalFaithfulResidual,
    FaithfulResidual,
    conditional_faithful_residual,
    faithful_residual,
)
from pyro_graphflows.transforms.solver import Solver
from pyro_graphflows.transforms.structure import FlowStructure, flow_structure

__all__ = [
    "ConditionalFaithfulResidual",
    "FaithfulResidual",
    "FlowStructure",
    "Solver",
    "conditional_faithful_residual",
    "faithful_residual",
    "flow_structure",
]
