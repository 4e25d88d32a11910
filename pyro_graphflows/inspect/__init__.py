"""From a Pyro model to its Bayesian network, and joint samples of its sites."""

from pyro_graphflows.inspect.arguments import (
    ArgumentPath,
    get_argument,
    get_arguments,
    require_arguments,
    same_tensor,
    with_hints,
)
from pyro_graphflows.inspect.elements import nested_by_index, with_nested_plates
from pyro_graphflows.inspect.model_graph import get_model_graph, non_exchangeable_plates, trace_model
from pyro_graphflows.inspect.prior import Batching, find_batching, sample_prior
from pyro_graphflows.inspect.runs import (
    is_transparent,
    kept_random_state,
    require_pair,
    seed_random_state,
    undressed,
)
from pyro_graphflows.inspect.trace import (
    IMPROPER,
    Leak,
    TracedModel,
    arranged,
    common_scale,
    rows_of_run,
    take_rows,
)

__all__ = [
    "IMPROPER",
    "ArgumentPath",
    "Batching",
    "Leak",
    "TracedModel",
    "arranged",
    "common_scale",
    "find_batching",
    "get_argument",
    "get_arguments",
    "get_model_graph",
    "is_transparent",
    "kept_random_state",
    "nested_by_index",
    "non_exchangeable_plates",
    "require_arguments",
    "require_pair",
    "rows_of_run",
    "same_tensor",
    "sample_prior",
    "seed_random_state",
    "take_rows",
    "trace_model",
    "undressed",
    "with_hints",
    "with_nested_plates",
]
