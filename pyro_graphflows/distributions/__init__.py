"""Distributions and coordinates for conditionals: normal scores of priors, fusion by precision, splines of noise."""

from pyro_graphflows.distributions.coordinates import GaussianCoordinate, gaussian_coordinate
from pyro_graphflows.distributions.spline import SplineDistribution

__all__ = ["GaussianCoordinate", "SplineDistribution", "gaussian_coordinate"]
