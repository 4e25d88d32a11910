"""Pictures of graphs, training and posteriors.

matplotlib is imported inside the functions, and figures are made without pyplot: no global state, no windows,
no open figures to close. Every function returns what it drew on; save with ``figure.savefig(path)``.

Roles by shape and colour: latent nodes are white circles, observed ones shaded, inputs squares, marginalised
ones dashed.
"""

from pyro_graphflows.plotting.curves import plot_joints, plot_learning_curves, plot_marginals
from pyro_graphflows.plotting.networks import (
    plot_adjacency,
    plot_inverse,
    plot_model_and_inverse,
    plot_model_graph,
)

__all__ = [
    "plot_adjacency",
    "plot_inverse",
    "plot_joints",
    "plot_learning_curves",
    "plot_marginals",
    "plot_model_and_inverse",
    "plot_model_graph",
]
