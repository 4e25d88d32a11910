"""Ready-made Pyro models."""

from pyro_graphflows.models import textbook

__all__ = ["textbook"]
