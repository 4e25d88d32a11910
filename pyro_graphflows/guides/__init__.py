"""Guides compiled from the faithful inverse of a model."""

from pyro_graphflows.guides.checks import GuideCheck, check_guide
from pyro_graphflows.guides.conditionals.auto import Auto
from pyro_graphflows.guides.conditionals.contract import Family
from pyro_graphflows.guides.conditionals.factors import (
    DiscreteFactor,
    ElementNormalFactor,
    Factor,
    NormalFactor,
)
from pyro_graphflows.guides.conditionals.flow import Flow
from pyro_graphflows.guides.conditionals.masked import Normal
from pyro_graphflows.guides.conditionals.pooling import Attention, DeepSet
from pyro_graphflows.guides.conditionals.spline import Spline
from pyro_graphflows.guides.guide import AutoFaithfulGuide, auto_faithful_guide
from pyro_graphflows.guides.load import load_guide

__all__ = [
    "Attention",
    "Auto",
    "AutoFaithfulGuide",
    "DeepSet",
    "DiscreteFactor",
    "ElementNormalFactor",
    "Factor",
    "Family",
    "Flow",
    "GuideCheck",
    "Normal",
    "NormalFactor",
    "Spline",
    "auto_faithful_guide",
    "check_guide",
    "load_guide",
]
