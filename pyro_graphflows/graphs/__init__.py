"""Bayesian networks as graphs: structure, inversion, separation and exact linear-Gaussian answers."""

from pyro_graphflows.graphs.convert import (
    from_bif,
    from_pgmpy,
    to_pgmpy,
)
from pyro_graphflows.graphs.inversion import (
    faithful_inverse,
    fully_connected_inverse,
    mean_field_inverse,
    stochastic_inverse,
)
from pyro_graphflows.graphs.library import (
    arithmetic_circuit,
    asia,
    binary_tree,
    burglar_alarm,
    eight_schools,
    factor_analysis,
    factorial_hidden_markov_chain,
    four_cycle,
    hidden_markov_chain,
    linear_regression,
    list_networks,
    load_network,
    protein_network,
    student_network,
)
from pyro_graphflows.graphs.linear_gaussian import (
    LinearGaussianNetwork,
)
from pyro_graphflows.graphs.order_search import (
    AutoOrder,
)
from pyro_graphflows.graphs.separation import (
    Independence,
    is_imap,
    is_minimal_imap,
    violated_independencies,
)
from pyro_graphflows.graphs.structures import (
    InverseGraph,
    ModelGraph,
)

__all__ = [
    "AutoOrder",
    "Independence",
    "InverseGraph",
    "LinearGaussianNetwork",
    "ModelGraph",
    "arithmetic_circuit",
    "asia",
    "binary_tree",
    "burglar_alarm",
    "eight_schools",
    "factor_analysis",
    "factorial_hidden_markov_chain",
    "faithful_inverse",
    "four_cycle",
    "from_bif",
    "from_pgmpy",
    "fully_connected_inverse",
    "hidden_markov_chain",
    "is_imap",
    "is_minimal_imap",
    "linear_regression",
    "list_networks",
    "load_network",
    "mean_field_inverse",
    "protein_network",
    "stochastic_inverse",
    "student_network",
    "to_pgmpy",
    "violated_independencies",
]
