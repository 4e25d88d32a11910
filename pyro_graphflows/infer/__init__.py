"""Training and evaluation of guides."""
