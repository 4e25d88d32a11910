"""The structure of a block's flow: which variable looks at which, and in which order they are drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyro_graphflows.guides.plan import Block
from pyro_graphflows.transforms.structure import FlowStructure

__all__ = ["ElementParents", "FlowOptions", "flow_structure"]

ElementParents = Mapping[str, Sequence[Sequence[tuple[str, int]]]]


@dataclass(frozen=True)
class FlowOptions:
    """The shape of the flows.

    Attributes:
        num_blocks: The number of residual blocks of each variable; None for 3, or in a graphical flow as many as it
            needs.
        units_per_variable: The hidden units of one block of one variable.
        hidden_layers: The number of hidden layers of a block.
        hidden_dims: The widths of the hidden layers over all variables, instead of the two before.
        closed_form: ``"sampling"`` or ``"density"``, the direction without numerical inversion.
        options: Further arguments of :class:`~pyro_graphflows.transforms.faithful_nn.FaithfulResidualNN`, or of
            :class:`~pyro_graphflows.transforms.graphical_affine.AffineGraphicalNN`.
        graphical: Whether the flow is the latter.
    """

    num_blocks: int | None = None
    units_per_variable: int = 16
    hidden_layers: int = 1
    hidden_dims: Sequence[int] | None = None
    closed_form: str = "sampling"
    options: Mapping[str, Any] = field(default_factory=dict)
    graphical: bool = False


def flow_structure(
    block: Block,
    columns: Mapping[str, range],
    num_features: int,
    names: Sequence[str],
    own_columns: Mapping[int, int],
    element_parents: ElementParents,
) -> tuple[FlowStructure, list[list[list[int]]]]:
    """Return the structure of a block's flow, and the stages of each level.

    The elements of a vector site form a chain inside the site; those at one position in the sites of one level make a
    stage, and are drawn at once.

    Args:
        block: The block of the plan.
        columns: Where each context node and each site is, in context and sites together.
        num_features: The number of features of the context.
        names: The names of all columns.
        own_columns: For variables with inputs of their own, the first of their two inputs.
        element_parents: See :class:`~pyro_graphflows.guides.flow_block.FlowBlock`.

    Returns:
        The structure, and for each level its stages as positions within the level.
    """
    parts = {
        site: slice(columns[site].start - num_features, columns[site].stop - num_features)
        for site in block.sites
    }
    parents: list[list[int]] = []
    context_parents: list[list[int]] = []
    for site in block.sites:
        outside = [j for p in block.parents[site] if p in columns for j in columns[p]]
        for i, own in enumerate(columns[site]):
            seen = [*outside, *range(columns[site].start, own)]
            if site in element_parents:
                chosen: set[int] = set()
                for name, index in element_parents[site][i]:
                    entries = columns.get(name, range(0))
                    chosen.update(entries if index < 0 else entries[index : index + 1])
                seen = [j for j in seen if j in chosen]
            parents.append([j - num_features for j in seen if j >= num_features])
            column = own_columns.get(own - num_features)
            extra = [] if column is None else [column, column + 1]
            context_parents.append([*(j for j in seen if j < num_features), *extra])
    stages: list[tuple[int, ...]] = []
    level_stages: list[list[list[int]]] = []  # positions within the level
    for level in block.levels:
        start = parts[level[0]].start
        widest = max(parts[site].stop - parts[site].start for site in level)
        found = [
            [parts[s].start + k for s in level if parts[s].start + k < parts[s].stop] for k in range(widest)
        ]
        stages += map(tuple, found)
        level_stages.append([[v - start for v in stage] for stage in found])
    free_names = [f"free {names[num_features + v]}[{i}]" for v in own_columns for i in (0, 1)]
    structure = FlowStructure(
        parents=tuple(map(tuple, parents)),
        context_parents=tuple(map(tuple, context_parents)),
        context_dim=num_features + len(free_names),
        names=tuple(names[num_features:]),
        context_names=(*names[:num_features], *free_names),
        stages=tuple(stages),
    )
    return structure, level_stages
