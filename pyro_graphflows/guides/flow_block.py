"""A block of a guide as one flow: every site keeps its own term.

The flow's Jacobian is triangular in the order of the inverse, so the density of a block is a product of one term for
each site. Each site is emitted on its own, as a distribution over its flat unconstrained vector that

- draws when it is asked to, so at the batch shape that Pyro gives it (all plates, vectorised particles);
- knows the density of what it has just drawn, and inverts its part of the flow for any other value;
- depends on the values of its parents that the trace really has, since the guide hands those in after each level.

In a faithful flow a site's term depends on exactly its parents. In a graphical one it is the density given all
ancestors, which enter through their noise: where a value is replaced, its noise is found by inversion and all later
sites are computed again.

The elements of a vector site form a full autoregressive chain inside the site, one *stage* after the other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.free import FreeTable, IndexMap
from pyro_graphflows.guides.plan import Block
from pyro_graphflows.transforms.faithful_evaluation import FaithfulEvaluation
from pyro_graphflows.transforms.faithful_nn import FaithfulResidualNN
from pyro_graphflows.transforms.graphical_affine import AffineGraphicalEvaluation, AffineGraphicalNN
from pyro_graphflows.transforms.structure import FlowStructure

Evaluation = FaithfulEvaluation | AffineGraphicalEvaluation

__all__ = ["FlowBlock", "FlowConditional", "FlowEvaluation", "FlowLevel", "FlowOptions"]

ElementParents = Mapping[str, Sequence[Sequence[tuple[str, int]]]]

DEFAULT_BLOCKS = 3
MOST_SLOPES = 64  # inputs up to which the elements of a site with free parameters have slopes of their own
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


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


class FlowBlock(nn.Module):
    """The conditionals of the sites of one block, by one flow over all their elements.

    Args:
        block: The block of the plan.
        context_sizes: For each context node, the number of its features.
        sizes: For each site, the length of its flat unconstrained vector.
        options: The shape of the flow.
        plates: The plates of the block, for the sites with free parameters.
        element_parents: For sites whose elements have parents of their own, the parents of each element, as (node,
            index in the node), -1 for the whole node.
    """

    def __init__(
        self,
        block: Block,
        context_sizes: Mapping[str, int],
        sizes: Mapping[str, int],
        options: FlowOptions,
        plates: Sequence[PlateState] = (),
        element_parents: ElementParents = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.block = block
        self.columns: dict[str, range] = {}  # of context and sites together
        self.element_columns: dict[str, list[list[int]]] = {}
        names: list[str] = []
        for name, size in [
            *((node.name, context_sizes[node.name]) for node in block.context),
            *((site, sizes[site]) for site in block.sites),
        ]:
            self.columns[name] = range(len(names), len(names) + size)
            names += [name if size == 1 else f"{name}[{i}]" for i in range(size)]
        self.num_features = sum(context_sizes[node.name] for node in block.context)
        self.parts = {
            site: slice(columns.start - self.num_features, columns.stop - self.num_features)
            for site, columns in self.columns.items()
            if site in sizes
        }
        # A free site, or one with maps of its own, has two inputs more for each element, for that element alone.
        self._own_sites = [*block.free, *(site for site in block.unlike if site not in block.free)]
        own = [v for site in self._own_sites for v in range(self.parts[site].start, self.parts[site].stop)]
        self._free_columns = {v: self.num_features + 2 * i for i, v in enumerate(own)}
        num_free = sum(2 * sizes[site] for site in block.free)
        self.free = FreeTable(plates, num_free) if block.free else None
        self.maps = nn.ModuleDict()  # by the position of the site
        self._map_of: dict[str, tuple[str, list[int]]] = {}  # its key, and the inputs of the map
        by_name = {plate.name: plate for plate in plates}
        for site in self._own_sites:
            seen = [j for p in block.parents[site] for j in self.columns.get(p, ()) if j < self.num_features]
            around = (
                block.plates
                if site in block.free and len(seen) <= MOST_SLOPES
                else block.unlike.get(site, ())
            )
            if around and (seen or site not in block.free):
                key = str(block.sites.index(site))
                chosen = [by_name[name] for name in around]
                self.maps[key] = IndexMap(chosen, len(seen), 2 * sizes[site], offset=site not in block.free)
                self._map_of[site] = key, seen
        self.network = self._make_network(names, options, element_parents)
        self.reset_free_()

    network: FaithfulResidualNN | AffineGraphicalNN

    @property
    def affine(self) -> FaithfulResidualNN:
        """The part of the network that has shifts, scales and the standardisation."""
        return self.network.affine if isinstance(self.network, AffineGraphicalNN) else self.network

    def _make_network(
        self, names: list[str], options: FlowOptions, element_parents: ElementParents
    ) -> FaithfulResidualNN | AffineGraphicalNN:
        block, parts = self.block, self.parts
        parents: list[list[int]] = []
        context_parents: list[list[int]] = []
        for site in block.sites:
            outside = [j for p in block.parents[site] if p in self.columns for j in self.columns[p]]
            for i, own in enumerate(self.columns[site]):
                seen = [*outside, *range(self.columns[site].start, own)]
                if site in element_parents:
                    chosen: set[int] = set()
                    for name, index in element_parents[site][i]:
                        columns = self.columns.get(name, range(0))
                        chosen.update(columns if index < 0 else columns[index : index + 1])
                    seen = [j for j in seen if j in chosen]
                parents.append([j - self.num_features for j in seen if j >= self.num_features])
                column = self._free_columns.get(own - self.num_features)
                extra = [] if column is None else [column, column + 1]
                context_parents.append([*(j for j in seen if j < self.num_features), *extra])
        stages: list[tuple[int, ...]] = []
        self.level_stages: list[list[list[int]]] = []  # positions within the level
        for level in block.levels:
            start = parts[level[0]].start
            widest = max(parts[site].stop - parts[site].start for site in level)
            found = [
                [parts[s].start + k for s in level if parts[s].start + k < parts[s].stop]
                for k in range(widest)
            ]
            stages += map(tuple, found)
            self.level_stages.append([[v - start for v in stage] for stage in found])
        free_names = [f"free {names[self.num_features + v]}[{i}]" for v in self._free_columns for i in (0, 1)]
        structure = FlowStructure(
            parents=tuple(map(tuple, parents)),
            context_parents=tuple(map(tuple, context_parents)),
            context_dim=self.num_features + len(free_names),
            names=tuple(names[self.num_features :]),
            context_names=(*names[: self.num_features], *free_names),
            stages=tuple(stages),
        )
        hidden_dims = options.hidden_dims
        if hidden_dims is None:
            hidden_dims = [options.units_per_variable * len(parents)] * options.hidden_layers
        shape = {**options.options, "hidden_dims": hidden_dims, "closed_form": options.closed_form}
        if options.graphical:
            return AffineGraphicalNN(structure, num_blocks=options.num_blocks, **shape)
        return FaithfulResidualNN(structure, num_blocks=options.num_blocks or DEFAULT_BLOCKS, **shape)

    # ---------------------------------------------------------------- starting values

    @torch.no_grad()
    def set_standardization_(self, site: str, shift: Tensor, scale: Tensor) -> None:
        """Set the shift and scale of a site's unconstrained vector."""
        self.affine.loc[self.parts[site]] = shift.to(self.affine.loc)
        self.affine.scale[self.parts[site]] = scale.to(self.affine.scale)

    def standardization(self, site: str) -> tuple[Tensor, Tensor]:
        """Return the shift and scale of a site's unconstrained vector."""
        return self.affine.loc[self.parts[site]], self.affine.scale[self.parts[site]]

    @torch.no_grad()
    def set_linear_(self, site: str, weights: Mapping[str, Tensor], loc: Tensor, scale_tril: Tensor) -> None:
        """Make one site's conditional linear-Gaussian, in standardised units of parents and site.

        Args:
            site: The site.
            weights: For each parent, a matrix of shape ``(site's size, parent's size)``; zero where missing.
            loc: The location where all parents are zero, shape ``(size,)``.
            scale_tril: The lower triangular square root of the covariance, shape ``(size, size)``.
        """
        network, part = self.affine, self.parts[site]
        centre, width = network.loc.double(), network.scale.double()
        joint = centre.new_zeros(len(centre), network.context_dim + len(centre))
        for parent, matrix in weights.items():
            columns = list(self.columns[parent])
            scaled = width[part].unsqueeze(-1) * matrix.to(joint)
            if parent in self.parts:
                columns = [network.context_dim + j - self.num_features for j in columns]
                scaled = scaled / width[self.parts[parent]]
            joint[part, columns] = scaled
        # u = m + L eps  <=>  u = A m + (1 - A) u + D eps with D the diagonal of L and A = D L^-1
        tril = width[part].unsqueeze(-1) * scale_tril.to(joint)
        diagonal = tril.diagonal()
        chain = torch.linalg.solve_triangular(tril, diagonal.diag(), upper=False, left=False)
        shift, scale = torch.zeros_like(centre), torch.ones_like(centre)
        shift[part] = chain @ (
            centre[part] + width[part] * loc.to(joint) - joint[part, network.context_dim :] @ centre
        )
        joint[part] = chain @ joint[part]
        own = slice(network.context_dim + part.start, network.context_dim + part.stop)
        joint[part, own] = torch.eye(len(diagonal)).to(joint) - chain
        scale[part] = diagonal
        self.network.init_linear_(joint, shift, scale, variables=range(part.start, part.stop))
        self.reset_free_(site)

    @torch.no_grad()
    def reset_free_(self, site: str | None = None) -> None:
        """Let the free parameters of one site, or of all, be a shift and a log-scale of its last affine map."""
        network, stack = self.affine, self.affine.stack
        place = {int(v): inner for inner, v in enumerate(network._order)}
        edge = {pair: e for e, pair in enumerate(network.edges.edges)}
        first = stack.hidden_units[0]
        by_edge = network.edges.weight.view(-1, stack.num_blocks, stack.num_inputs)
        sign, last = (-1, 0) if network.closed_form == "density" else (1, stack.num_blocks - 1)
        for v, column in self._free_columns.items():
            if site is not None and not self.parts[site].start <= v < self.parts[site].stop:
                continue
            for i in range(stack.num_inputs - first):
                rows = by_edge[edge[place[v], column + i]]
                rows.zero_()
                rows[last, first + i] = sign
                if self.free is not None and column - self.num_features + i < self.free.table.shape[-1]:
                    self.free.table[..., column - self.num_features + i] = 0.0

    @torch.no_grad()
    def narrow_free_(self, factor: float) -> None:
        """Multiply the scales of the sites with free parameters by a factor."""
        if self.free is not None and self.affine.stack.conditional_scale:
            self.free.table[..., 1::2] += math.log(factor)

    # ---------------------------------------------------------------- evaluation

    def start(self, context: Tensor, plates: Mapping[str, PlateState] | None = None) -> "FlowEvaluation":
        """Begin an evaluation.

        Args:
            context: The features of the context nodes, in the block's order, shape ``(*batch, n)``.
            plates: The plates of the call; without them free parameters are zero.
        """
        parts = [context]
        if self._own_sites:
            number = 2 * len(self._free_columns)
            parts.append(context.new_zeros(number) if plates is None else self._own_inputs(context, plates))
        return FlowEvaluation(self, self.network.start(*parts), [part.shape[:-1] for part in parts])

    def _own_inputs(self, context: Tensor, plates: Mapping[str, PlateState]) -> Tensor:
        """Return the inputs that elements have of their own."""
        free = None if self.free is None else self.free(plates)
        if free is not None and not self._map_of:
            return free
        parts = []
        start = 0
        for site in self._own_sites:
            part: Tensor | None = None
            if site in self.block.free:
                assert free is not None
                stop = start + 2 * (self.parts[site].stop - self.parts[site].start)
                part, start = free[..., start:stop], stop
            if site in self._map_of:
                key, columns = self._map_of[site]
                contribution = self.maps[key](plates, context[..., columns])
                part = contribution if part is None else part + contribution
            assert part is not None
            parts.append(part)
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)

    @torch.no_grad()
    def set_index_linear_(self, site: str, weights: Tensor, locs: Tensor, scale_trils: Tensor) -> bool:
        """Make the conditional of a scalar site with maps of its own linear-Gaussian for each index.

        Parents within the block keep a slope that the indices share.

        Args:
            site: The site.
            weights: Shape ``(indices, size, inputs)``, with a column for each input of the site's parents.
            locs: Shape ``(indices, size)``.
            scale_trils: Shape ``(indices, size, size)``.

        Returns:
            Whether the site has such maps and is scalar.
        """
        if site not in self._map_of or weights.shape[1] != 1:
            return False
        key, columns = self._map_of[site]
        index_map = self.maps[key]
        assert isinstance(index_map, IndexMap)
        if not index_map.offset or self.affine.closed_form == "density":
            return False
        parents = [parent for parent in self.block.parents[site] if parent in self.columns]
        inputs = [j for parent in parents for j in self.columns[parent]]
        within = {
            parent: weights.mean(0)[:, [inputs.index(j) for j in self.columns[parent]]]
            for parent in parents
            if parent in self.parts
        }
        log_scales = scale_trils[:, 0, 0].log()
        centre = log_scales.mean()
        self.set_linear_(site, within, locs.new_zeros(1), centre.exp().reshape(1, 1))
        most = self.affine.stack.scale_range  # a conditional log-scale is bounded by a tanh
        ratio = ((log_scales - centre) / most).clamp(-0.999, 0.999)
        like = index_map.rows.table
        slopes = torch.zeros(len(weights), 2, len(columns)).to(like)
        slopes[:, 0] = weights[:, 0, [inputs.index(j) for j in columns]].to(like)
        index_map.set_(slopes, torch.stack([locs[:, 0], most * ratio.atanh()], -1).to(like))
        return True


class FlowEvaluation:
    """One evaluation of a block; alternates :meth:`factors` and :meth:`accept`, level by level."""

    def __init__(self, module: FlowBlock, evaluation: Evaluation, batches: Sequence[torch.Size]) -> None:
        self._module = module
        self._evaluation = evaluation
        self._batch = torch.broadcast_shapes(*batches)
        self._depth = 0
        self._level: FlowLevel

    def factors(self) -> dict[str, dist.TorchDistribution]:
        """Return the conditionals of the next level's sites, over their flat unconstrained vectors."""
        self._level = FlowLevel(self._module, self._depth, self._evaluation)
        return {site: FlowConditional(self._level, site, self._batch) for site in self._level.parts}

    def accept(self, values: Mapping[str, Tensor]) -> None:
        """Take the unconstrained vectors of the level's sites, each of shape ``(*batch, size)``."""
        self._depth += 1
        last = self._depth == len(self._module.block.levels)
        self._evaluation = self._level.accept(values, last)
        self._batch = torch.broadcast_shapes(self._batch, *(value.shape[:-1] for value in values.values()))


class FlowLevel:
    """The sites of one level given the values of all levels before it.

    Sites of one level are drawn together, the first time that one of them is asked for, and scored together where
    all their values are known; they are independent given the levels before.

    Args:
        module: The block.
        depth: The number of the level.
        evaluation: The flow's evaluation, at this level.
    """

    def __init__(self, module: FlowBlock, depth: int, evaluation: Evaluation) -> None:
        sites = module.block.levels[depth]
        start = module.parts[sites[0]].start
        self.parts = {
            site: slice(module.parts[site].start - start, module.parts[site].stop - start) for site in sites
        }
        self.size = module.parts[sites[-1]].stop - start
        self.stages = module.level_stages[depth]
        self.loc = module.affine.loc[start : start + self.size]
        self.evaluation = evaluation
        self.given: dict[str, Tensor] = {}
        self._waiting: tuple[Any, dict[str, tuple[Tensor, Tensor]]] = (None, {})
        self._scored: tuple[Any, dict[str, Tensor]] = (None, {})
        self._after: tuple[dict[str, Tensor], Evaluation] | None = None

    def draw(self, site: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Draw the vector of a site; return it and its log-density, of shapes ``(*shape, size)`` and ``shape``."""
        key = (shape, torch.is_grad_enabled())
        if self._waiting[0] != key or site not in self._waiting[1]:
            self._waiting = (key, self.push(shape=shape))
        return self._waiting[1].pop(site)

    def push(self, eps: Tensor | None = None, shape: Sequence[int] = ()) -> dict[str, tuple[Tensor, Tensor]]:
        """Map the noise of all sites of the level, or new noise, to their vectors and log-densities."""
        evaluation = self.evaluation
        z, terms = [], []
        for stage in self.stages:
            evaluation = evaluation.fork()
            if eps is None:
                noise = evaluation.noise(shape)
            else:
                noise = eps if len(self.stages) == 1 else eps[..., stage]
            value, log_diagonal = evaluation.step(noise)
            evaluation.accept(value)
            z.append(value)
            terms.append(_log_normal(noise) - log_diagonal)
        value, term = self._in_order(z), self._in_order(terms)
        drawn = {site: value[..., part] for site, part in self.parts.items()}
        self._after = (drawn, evaluation)
        return {site: (drawn[site], term[..., part].sum(-1)) for site, part in self.parts.items()}

    def _in_order(self, stages: list[Tensor]) -> Tensor:
        if len(stages) == 1:
            return stages[0]
        columns: list[Tensor | None] = [None] * self.size
        for stage, values in zip(self.stages, stages, strict=True):
            for column, value in zip(stage, values.unbind(-1), strict=True):
                columns[column] = value
        return torch.stack([column for column in columns if column is not None], -1)

    def accept(self, values: Mapping[str, Tensor], last: bool) -> Evaluation:
        """Take the values of the level's sites; return the evaluation at the next level."""
        self.given = {site: values[site] for site in self.parts}
        if self._after is not None and all(self._after[0][site] is self.given[site] for site in self.parts):
            return self._after[1]
        if last:
            return self.evaluation
        joined = self._join(self.given)
        evaluation = self.evaluation
        for stage in self.stages:
            evaluation = evaluation.fork()
            evaluation.accept(joined if len(self.stages) == 1 else joined[..., stage])
        return evaluation

    def _join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Put values beside each other; sites without one get any value, since no other site of the level sees it."""
        if len(self.parts) == 1:
            return next(iter(values.values()))
        batch = torch.broadcast_shapes(*(value.shape[:-1] for value in values.values()))
        parts = [values.get(site, self.loc[part]) for site, part in self.parts.items()]
        return torch.cat([part.expand(*batch, -1) for part in parts], -1)

    def score(self, site: str, value: Tensor) -> Tensor:
        """Return the log-density of a vector of a site."""
        if self.given.get(site) is not value:
            return self._score({site: value})[site]
        key = torch.is_grad_enabled()
        if self._scored[0] is not key or site not in self._scored[1]:
            drawn = {} if self._after is None else self._after[0]
            together = {
                name: other
                for name, other in self.given.items()
                if other is not drawn.get(name) and other.shape[:-1] == value.shape[:-1]
            }
            self._scored = (key, self._score({**together, site: value}))
        return self._scored[1].pop(site)

    def _score(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        joined = self._join(values)
        evaluation = self.evaluation
        terms = []
        for i, stage in enumerate(self.stages):
            part = joined if len(self.stages) == 1 else joined[..., stage]
            noise, log_diagonal = evaluation.terms(part)
            terms.append(_log_normal(noise) - log_diagonal)
            if i + 1 < len(self.stages):
                evaluation = evaluation.fork()
                evaluation.accept(part)
        term = self._in_order(terms)
        return {site: term[..., self.parts[site]].sum(-1) for site in values}


class FlowConditional(dist.TorchDistribution):
    """The conditional of one site of a flow, over its flat unconstrained vector.

    Shape:
        - values: ``batch_shape + (size,)``.

    Args:
        level: The level of the site.
        site: The site.
        batch_shape: The batch shape.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, level: FlowLevel, site: str, batch_shape: torch.Size) -> None:
        self.level = level
        self.site = site
        self._drawn: list[tuple[Tensor, Tensor, bool]] = []  # shared with expanded copies
        part = level.parts[site]
        super().__init__(batch_shape, torch.Size([part.stop - part.start]), validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """All real vectors."""
        return constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FlowConditional":
        """Return the same conditional at a larger batch shape."""
        new = FlowConditional(self.level, self.site, torch.Size(batch_shape))
        new._drawn = self._drawn
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + event_shape``."""
        value, log_prob = self.level.draw(self.site, torch.Size(sample_shape) + self.batch_shape)
        self._drawn[:] = [(value, log_prob, torch.is_grad_enabled())]
        return value

    @property
    def mean(self) -> Tensor:
        """The image of noise zero (the mean where the flow is linear)."""
        noise = torch.zeros(*self.batch_shape, self.level.size, dtype=self.level.loc.dtype)
        return self.level.push(noise.to(self.level.loc.device))[self.site][0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values, shape ``batch_shape``."""
        if self._drawn:
            drawn, log_prob, with_gradients = self._drawn[0]
            if drawn is value and (with_gradients or not torch.is_grad_enabled()):
                return log_prob
        log_prob = self.level.score(self.site, value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))


def _log_normal(noise: Tensor) -> Tensor:
    return -0.5 * noise.square() - HALF_LOG_TWO_PI
