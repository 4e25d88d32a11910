"""Ready-made Pyro models."""
