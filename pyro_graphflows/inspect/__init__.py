"""From a Pyro model to its Bayesian network, and joint samples of its sites."""

from pyro_graphflows.inspect.arguments import ArgumentPath, get_argument, get_arguments, same_tensor
from pyro_graphflows.inspect.graph import get_model_graph, trace_model
from pyro_graphflows.inspect.prior import sample_prior
from pyro_graphflows.inspect.probes import nested_by_index, non_exchangeable_plates, with_nested_plates
from pyro_graphflows.inspect.trace import IMPROPER, Leak, TracedModel, is_transparent, undressed

__all__ = [
    "IMPROPER",
    "ArgumentPath",
    "Leak",
    "TracedModel",
    "get_argument",
    "get_arguments",
    "get_model_graph",
    "is_transparent",
    "nested_by_index",
    "non_exchangeable_plates",
    "same_tensor",
    "sample_prior",
    "trace_model",
    "undressed",
    "with_nested_plates",
]
