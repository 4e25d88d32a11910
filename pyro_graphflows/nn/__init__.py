"""Networks whose outputs depend on promised inputs only."""

from pyro_graphflows.nn.activations import ELU, Activation, LipMish, LipSwish, ReLU, Tanh, make_activation
from pyro_graphflows.nn.autoregressive import (
    ConditionalGraphicalAutoRegressiveNN,
    GraphicalAutoRegressiveNN,
)
from pyro_graphflows.nn.lipschitz import SpectralBound
from pyro_graphflows.nn.masked import MaskedLinear
from pyro_graphflows.nn.mlp import LevelEvaluation, MaskedMLP
from pyro_graphflows.nn.residual import MaskedResidualNet, ResidualEvaluation

__all__ = [
    "ELU",
    "Activation",
    "ConditionalGraphicalAutoRegressiveNN",
    "GraphicalAutoRegressiveNN",
    "LevelEvaluation",
    "LipMish",
    "LipSwish",
    "MaskedLinear",
    "MaskedMLP",
    "MaskedResidualNet",
    "ReLU",
    "ResidualEvaluation",
    "SpectralBound",
    "Tanh",
    "make_activation",
]
