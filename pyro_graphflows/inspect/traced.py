"""What tracing a model yields."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pyro.poutine import Trace

from pyro_graphflows.graphs.model_graph import ModelGraph
from pyro_graphflows.inspect.arguments import ArgumentPath

__all__ = ["Leak", "TracedModel"]


@dataclass(frozen=True)
class Leak:
    """A value that left the tensors (``float(z)``, ``if z > 0``), so that it cannot be followed further.

    ``sites`` and ``arguments`` tell what it depends on, ``operation`` how it left, ``filename``, ``line`` and
    ``code`` where, and ``affects`` which sites come after it.
    """

    sites: tuple[str, ...]
    arguments: tuple[str, ...]
    operation: str
    filename: str
    line: int
    code: str
    affects: tuple[str, ...]

    def __str__(self) -> str:
        what = " and ".join(
            [f"site '{name}'" for name in self.sites] + [f"argument '{name}'" for name in self.arguments]
        )
        return (
            f"{self.filename}:{self.line}: `{self.code}` turns {what} into a Python value ({self.operation})"
        )


@dataclass(frozen=True)
class TracedModel:
    """A model's graph, with what the tracing found beside it.

    Attributes:
        graph: The model graph.
        trace: The prototype trace.
        argument_paths: Where to find the value of each input, and of each observed site whose value is an
            argument itself or a row or column of one, on a later call; see :func:`get_argument`.
        event_dims: For each input, how many of its rightmost dimensions belong to one datum.
        index_inputs: The inputs of an integer type: indices, never network inputs.
        without_data: The observed nodes whose value is no data: factors, and observed values that are
            computed from latent sites. They take part in the inversion but are no network inputs.
        not_generative: Why samples of the unconditioned model are not the model, by site (factors, masks,
            scales); empty where they are.
        leaks: Values that left the tensors.
        notes: What is worth telling the user.
        non_exchangeable: For sites whose plates' indices are not alike (constants that vary along the plate,
            not given as arguments): those plates. Known only after ``validate=True``.
        elements: For graphs of elements: the site and the flat event index of each node.
    """

    graph: ModelGraph
    trace: Trace = field(repr=False)
    argument_paths: Mapping[str, ArgumentPath]
    event_dims: Mapping[str, int]
    index_inputs: frozenset[str] = frozenset()
    without_data: frozenset[str] = frozenset()
    not_generative: Mapping[str, str] = field(default_factory=dict)
    leaks: tuple[Leak, ...] = ()
    notes: tuple[str, ...] = ()
    non_exchangeable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    elements: Mapping[str, tuple[str, int]] = field(default_factory=dict)
