"""Flows whose Jacobians follow a graph."""

from pyro_graphflows.transforms.actnorm import ActNorm, actnorm
from pyro_graphflows.transforms.faithful import FaithfulEvaluation, FaithfulResidualNN
from pyro_graphflows.transforms.graphical import GraphicalEvaluation, GraphicalResidualNN
from pyro_graphflows.transforms.priors import GraphicalFlowPrior
from pyro_graphflows.transforms.residual import (
    ConditionalFaithfulResidual,
    ConditionalGraphicalResidual,
    FaithfulResidual,
    GraphicalResidual,
    conditional_faithful_residual,
    conditional_graphical_residual,
    faithful_residual,
    graphical_residual,
)
from pyro_graphflows.transforms.solver import Solver
from pyro_graphflows.transforms.spline import (
    ConditionalGraphicalSpline,
    GraphicalSpline,
    GraphicalSplineNN,
    SplineEvaluation,
    conditional_graphical_spline,
    graphical_spline,
)
from pyro_graphflows.transforms.structure import FlowStructure, flow_structure

__all__ = [
    "ActNorm",
    "ConditionalFaithfulResidual",
    "ConditionalGraphicalResidual",
    "ConditionalGraphicalSpline",
    "FaithfulEvaluation",
    "FaithfulResidual",
    "FaithfulResidualNN",
    "FlowStructure",
    "GraphicalEvaluation",
    "GraphicalFlowPrior",
    "GraphicalResidual",
    "GraphicalResidualNN",
    "GraphicalSpline",
    "GraphicalSplineNN",
    "Solver",
    "SplineEvaluation",
    "actnorm",
    "conditional_faithful_residual",
    "conditional_graphical_residual",
    "conditional_graphical_spline",
    "faithful_residual",
    "flow_structure",
    "graphical_residual",
    "graphical_spline",
]
