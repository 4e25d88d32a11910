"""Conditional distributions of latent sites: coordinates of the prior, fusion with it, and families of densities."""
