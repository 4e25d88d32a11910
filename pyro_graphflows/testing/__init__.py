"""Exact answers and contract checks for people who extend the package."""
