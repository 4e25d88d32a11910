"""Distributions and coordinates: normal scores of priors, fusion by precision, splines of noise, simulators."""

from pyro_graphflows.distributions.coordinates import GaussianCoordinate, gaussian_coordinate
from pyro_graphflows.distributions.simulated import Simulated
from pyro_graphflows.distributions.spline import SplineDistribution

__all__ = ["GaussianCoordinate", "Simulated", "SplineDistribution", "gaussian_coordinate"]
