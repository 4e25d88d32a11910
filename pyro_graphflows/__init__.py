"""Faithful inverses and graphical flows for Pyro."""

__version__ = "0.1.0"
