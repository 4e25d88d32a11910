"""Guides on real models: the posteriors of posteriordb, written in Pyro as a user would write them."""
