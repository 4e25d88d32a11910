"""Guides compiled from the faithful inverse of a model."""

from pyro_graphflows.guides.auto import auto_faithful_guide
from pyro_graphflows.guides.base import AutoFaithfulGuide
from pyro_graphflows.guides.checks import check_guide
from pyro_graphflows.guides.discrete_factors import DiscreteFactor
from pyro_graphflows.guides.factors import ElementNormalFactor, Factor, NormalFactor
from pyro_graphflows.guides.flow import AutoFaithfulFlow
from pyro_graphflows.guides.normal import AutoFaithfulNormal

__all__ = [
    "AutoFaithfulFlow",
    "AutoFaithfulGuide",
    "AutoFaithfulNormal",
    "DiscreteFactor",
    "ElementNormalFactor",
    "Factor",
    "NormalFactor",
    "auto_faithful_guide",
    "check_guide",
]
