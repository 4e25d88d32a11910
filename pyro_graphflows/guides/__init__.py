"""Guides compiled from the faithful inverse of a model."""
