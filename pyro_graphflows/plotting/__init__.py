"""Pictures of graphs, training and posteriors.

matplotlib is imported inside the functions, and figures are made without pyplot: no global state, no windows,
no open figures to close. Every function returns what it drew on; save with ``figure.savefig(path)``.

Roles by shape and colour: latent nodes are white circles, observed ones shaded, inputs squares, marginalised
ones dashed.
"""

from pyro_graphflows.plotting.calibration import (
    plot_calibration,
    plot_contraction,
    plot_coverage,
    plot_ranks,
)
from pyro_graphflows.plotting.curves import plot_joints, plot_learning_curves, plot_marginals
from pyro_graphflows.plotting.networks import (
    plot_adjacency,
    plot_inverse,
    plot_model_and_inverse,
    plot_model_graph,
)
from pyro_graphflows.plotting.posteriors import (
    plot_forest,
    plot_intervals,
    plot_khat,
    plot_pairs,
    plot_predictive,
)

__all__ = [
    "plot_adjacency",
    "plot_calibration",
    "plot_contraction",
    "plot_coverage",
    "plot_forest",
    "plot_intervals",
    "plot_inverse",
    "plot_joints",
    "plot_khat",
    "plot_learning_curves",
    "plot_marginals",
    "plot_model_and_inverse",
    "plot_model_graph",
    "plot_pairs",
    "plot_predictive",
    "plot_ranks",
]
