"""The family of flows: conditionals by one flow over a block, in which every site keeps its own term.

The flow's Jacobian is triangular in the order of the inverse, so the density of a block is a product of one term for
each site, and each site is emitted on its own. It is emitted as a distribution over its flat unconstrained vector that

- draws when it is asked to, so at the batch shape that Pyro gives it (all plates, vectorised particles);
- knows the density of what it has just drawn, and inverts its part of the flow for any other value;
- depends on the values of its parents that the trace really has, since the guide hands those in after each level.

In a faithful flow a site's term depends on exactly its parents. In a graphical one it is the density given all
ancestors, which enter through their noise: where a value is replaced, its noise is found by inversion and all later
sites are computed again.

The elements of a vector site form a full autoregressive chain inside the site, one *stage* after the other.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.conditionals.contract import (
    BlockSpec,
    Conditionals,
    Family,
    LinearConditional,
    Pass,
    SiteRole,
    freeze_widths,
    require_fusion,
    require_positive,
)
from pyro_graphflows.guides.conditionals.elements import (
    ElementMap,
    ElementTable,
    columns_of_map,
    element_maps,
    keep_rows_,
    leave_out_maps_,
)
from pyro_graphflows.guides.conditionals.masked import Normal
from pyro_graphflows.guides.sites import SitePrior, concatenate
from pyro_graphflows.nn.activations import make_activation
from pyro_graphflows.regression import in_float64
from pyro_graphflows.transforms.faithful import FaithfulEvaluation, FaithfulResidualNN
from pyro_graphflows.transforms.graphical import AffineGraphicalEvaluation, AffineGraphicalNN
from pyro_graphflows.transforms.solver import Solver
from pyro_graphflows.transforms.structure import FlowStructure

__all__ = ["Flow", "FlowConditional", "FlowConditionals"]

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)

Network = FaithfulResidualNN | AffineGraphicalNN
Evaluation = FaithfulEvaluation | AffineGraphicalEvaluation


@dataclass(frozen=True)
class Flow(Family):
    r"""Flexible conditionals: every element has a monotone flow that its parents steer.

    In unconstrained space, :math:`z_v = F_v(\varepsilon_v; z_{Pa(v)}, x_{Pa(v)})` with a stack of one-dimensional
    residual blocks :math:`F_v`, so that each site has exactly the density :math:`q(z_v \mid` parents
    :math:`)` whatever the number of blocks. With hidden units at zero output, as after the regression start, every
    conditional is linear-Gaussian. Sampling, and scoring what was just sampled, need no numerical inversion; scoring
    other values inverts one-dimensional functions (or the other way round with ``closed_form="density"``, for
    inference compilation).

    References:
        [1] Mouton and Kroon (2022), Graphical Residual Flows.
        [2] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.

    Args:
        form: ``"faithful"`` (:class:`~pyro_graphflows.FaithfulResidual`), or ``"graphical"`` for the flow of [1]
            (:class:`~pyro_graphflows.GraphicalResidual`, and an affine map along the graph for the regression
            start): its sites depend on all their ancestors, and independences are not enforced.
        num_blocks: The number of residual blocks of each element. By default 3; in a graphical flow 4, or as many
            as there are edges on the longest shortest path from an ancestor to a site, which is the least.
        units_per_variable: The hidden units of one block of one element.
        hidden_layers: The number of hidden layers of a block.
        hidden_dims: Widths of the hidden layers over all elements, instead of the two arguments before.
        closed_form: ``"sampling"`` or ``"density"``: the direction without numerical inversion.
        activation: An activation with known slopes, or its name; by default ``"elu"`` (graphical: ``"lipmish"``).
        lipschitz: c in (0, 1): a residual map's slope stays above 1 − c.
        conditional_scale: Whether parents act on the log-scale of each block directly.
        conditioner_units: The hidden units, for each distinct set of parents, of the masked network through which
            parents act nonlinearly on shifts, scales and hidden units; 0 leaves the linear maps alone. By default 32,
            and 0 in a graphical flow (where it acts on the affine map).
        conditioner_layers: The number of its hidden layers.
        solver: How to invert numerically (:class:`~pyro_graphflows.transforms.solver.Solver`).
        masked: The family of the sites that a flow cannot serve: discrete ones, those whose copies are drawn jointly
            across a plate (:mod:`~pyro_graphflows.guides.conditionals.coupled`), those with a factor class of the
            user's, long vectors (:mod:`~pyro_graphflows.guides.vectors`).
        fusion: ``"auto"``: the sites that ``masked`` serves are fused with their priors as it says; False: none is.
            Sites with flows are not: a flow times a prior has no density in closed form, which a :class:`Spline` has.

    Raises:
        GraphflowsError: If ``form``, ``closed_form`` or the activation is unknown, a number is out of range,
            ``masked`` is no :class:`Normal`, or ``fusion`` is True.

    Example:
        >>> Flow(num_blocks=5).num_blocks
        5
    """

    form: str = "faithful"
    num_blocks: int | None = None
    units_per_variable: int = 16
    hidden_layers: int = 1
    hidden_dims: Sequence[int] | None = None
    closed_form: str = "sampling"
    activation: str | nn.Module | None = None
    lipschitz: float = 0.97
    conditional_scale: bool = True
    conditioner_units: int | None = None
    conditioner_layers: int = 2
    solver: Solver | None = None
    masked: Normal = field(default_factory=Normal)
    fusion: bool | str = "auto"

    def __post_init__(self) -> None:
        require_fusion(self)
        if self.fusion is True:
            raise GraphflowsError(
                "Expected fusion='auto' or False with Flow(...): a residual flow times a prior has no density in "
                "closed form. Use Spline(fusion=True), which is flexible too."
            )
        if self.form not in ("faithful", "graphical"):
            raise GraphflowsError(f"Expected form='faithful' or 'graphical'; got {self.form!r}.")
        if self.closed_form not in ("sampling", "density"):
            raise GraphflowsError(f"Expected closed_form 'sampling' or 'density'; got {self.closed_form!r}.")
        if self.num_blocks is not None:
            require_positive(self, "num_blocks")
        freeze_widths(self)
        if self.hidden_dims is not None and not self.hidden_dims:
            raise GraphflowsError("Expected hidden_dims with at least one width, or None; got none.")
        require_positive(self, "hidden_layers", "conditioner_layers")
        if not 0 < self.lipschitz < 1:
            raise GraphflowsError(f"Expected 0 < lipschitz < 1; got {self.lipschitz}.")
        units = self.conditioner_units
        if self.units_per_variable < 0 or (units is not None and units < 0):
            raise GraphflowsError(
                f"Expected units_per_variable and conditioner_units >= 0; got {self.units_per_variable} and {units}."
            )
        if self.activation is not None:
            make_activation(self.activation)
        if not isinstance(self.masked, Normal):
            raise GraphflowsError(f"Expected masked= a Normal(...); got {self.masked!r}.")

    @property
    def can_fuse(self) -> bool:
        """Flows times priors have no density in closed form."""
        return False

    @property
    def can_couple(self) -> bool:
        """Whether the family of coupled sites can draw copies jointly."""
        return self.masked.can_couple

    @property
    def can_regress(self) -> bool:
        """Whether there are linear maps to set, in the masked networks as well."""
        return self.masked.can_regress

    @property
    def has_vectors(self) -> bool:
        """Whether the family of long vectors can serve them."""
        return self.masked.has_vectors

    def full_size(self, role: SiteRole, num_inputs: int) -> int:
        """See :meth:`Family.full_size`: each element has blocks of hidden units that see all earlier ones."""
        blocks = self.num_blocks or 3
        return blocks * 5 * super().full_size(role, num_inputs) if role.site.size > 1 else 0

    def serving(self, role: SiteRole) -> Family:
        """Return this family, or ``masked`` for sites that a flow cannot serve."""
        given = role.coupled or role.factor is not None or role.long is not None
        beyond = given or role.site.encoding is not None
        masked = self.masked if self.fusion else replace(self.masked, fusion=False)
        return masked.serving(role) if beyond else self

    def block_key(self, role: SiteRole) -> Hashable:
        """Return the site itself where its elements have maps, which read all parents before the first level."""
        return role.site.name if role.own_maps else None

    def conditionals(self, spec: BlockSpec) -> Conditionals:
        """See :meth:`Family.conditionals`."""
        graphical = self.form == "graphical"
        options: dict[str, Any] = {
            "num_blocks": self.num_blocks if graphical else self.num_blocks or 3,
            "closed_form": self.closed_form,
            "activation": self.activation or ("lipmish" if graphical else "elu"),
            "lipschitz": self.lipschitz,
            "conditional_scale": self.conditional_scale,
            "conditioner_units": self.conditioner_units,
            "conditioner_layers": self.conditioner_layers,
            "solver": self.solver,
        }
        if self.conditioner_units is None:
            options["conditioner_units"] = 0 if graphical else 32
        return FlowConditionals(
            spec,
            graphical=graphical,
            hidden_dims=self.hidden_dims,
            units_per_variable=self.units_per_variable,
            hidden_layers=self.hidden_layers,
            network_options=options,
        )


class FlowConditionals(Conditionals):
    """The conditionals of the sites of one block, by one flow over all their elements.

    Args:
        spec: What they are made from.
        graphical: Whether the flow is the graphical one, whose sites depend on all ancestors.
        hidden_dims: The widths of the hidden layers over all elements; None for ``units_per_variable`` a layer.
        units_per_variable: The hidden units of one block of one element.
        hidden_layers: The number of hidden layers of a block.
        network_options: Further options of :class:`~pyro_graphflows.transforms.faithful.FaithfulResidualNN`, or of
            :class:`~pyro_graphflows.transforms.graphical.AffineGraphicalNN`.
    """

    def __init__(
        self,
        spec: BlockSpec,
        *,
        graphical: bool,
        hidden_dims: Sequence[int] | None,
        units_per_variable: int,
        hidden_layers: int,
        network_options: Mapping[str, Any],
    ) -> None:
        super().__init__(spec)
        block = spec.block
        self.parts = {
            site: slice(columns.start - self.num_features, columns.stop - self.num_features)
            for site, columns in self.columns.items()
            if site in block.parents
        }
        # A site with per-element parameters or maps has two inputs more for each element, for that element alone.
        self._own_sites = [
            *block.per_element,
            *(site for site in block.non_exchangeable if site not in block.per_element),
        ]
        own = [v for site in self._own_sites for v in range(self.parts[site].start, self.parts[site].stop)]
        self._table_columns = {v: self.num_features + 2 * i for i, v in enumerate(own)}
        sizes = {site: part.stop - part.start for site, part in self.parts.items()}
        num_rows = sum(2 * sizes[site] for site in block.per_element)
        self.table = ElementTable(spec.plates, num_rows, extends=True) if block.per_element else None
        seen = {site: [j for j in self.inputs_of(site) if j < self.num_features] for site in self._own_sites}
        num_rows_of = {site: 2 * size for site, size in sizes.items()}
        self.maps, self._map_of = element_maps(block, seen, num_rows_of, spec.plates, self.columns)
        structure, self._stages = self._structure()
        if hidden_dims is None and units_per_variable:
            hidden_dims = [units_per_variable * len(structure.names)] * hidden_layers
        kind = AffineGraphicalNN if graphical else FaithfulResidualNN
        self.network: Network = kind(
            structure,
            hidden_dims=hidden_dims,
            units_per_variable=units_per_variable,
            natural_units=True,
            **network_options,
        )
        self._reset_table_()

    @property
    def affine(self) -> FaithfulResidualNN:
        """The part of the network that has shifts, scales and the standardisation."""
        return self.network.affine if isinstance(self.network, AffineGraphicalNN) else self.network

    def _structure(self) -> tuple[FlowStructure, list[list[list[int]]]]:
        """Return which variable looks at which, and the stages of each level as positions within the level.

        The elements of a vector site form a chain inside the site; those at one position in the sites of one level make
        a stage, and are drawn at once.
        """
        names = [
            name if len(columns) == 1 else f"{name}[{i}]"
            for name, columns in self.columns.items()
            for i in range(len(columns))
        ]
        first = self.num_features
        parents: list[list[int]] = []
        context_parents: list[list[int]] = []
        for site in self.block.sites:
            columns = self.columns[site]
            for i, own in enumerate(columns):
                if site in self.element_columns:
                    seen = [
                        *self.element_columns[site][i],
                        *(columns[j] for j in sorted(self.inner[site][i])),
                    ]
                else:
                    seen = [*self.inputs_of(site), *range(columns.start, own)]
                parents.append([j - first for j in seen if j >= first])
                column = self._table_columns.get(own - first)
                extra = [] if column is None else [column, column + 1]
                context_parents.append([*(j for j in seen if j < first), *extra])
        stages: list[tuple[int, ...]] = []
        level_stages: list[list[list[int]]] = []
        for level in self.block.levels:
            parts = [self.parts[site] for site in level]
            widest = max(part.stop - part.start for part in parts)
            found = [[p.start + k for p in parts if p.start + k < p.stop] for k in range(widest)]
            stages += map(tuple, found)
            level_stages.append([[v - parts[0].start for v in stage] for stage in found])
        own_names = [f"element {names[first + v]}[{i}]" for v in self._table_columns for i in (0, 1)]
        structure = FlowStructure(
            parents=tuple(map(tuple, parents)),
            context_parents=tuple(map(tuple, context_parents)),
            context_dim=first + len(own_names),
            names=tuple(names[first:]),
            context_names=(*names[:first], *own_names),
            stages=tuple(stages),
        )
        return structure, level_stages

    # ---------------------------------------------------------------- units

    def output_units(self, site: str) -> tuple[Tensor, Tensor]:
        """See :meth:`Conditionals.output_units`."""
        return self.affine.loc[self.parts[site]], self.affine.scale[self.parts[site]]

    def input_units(self, site: str) -> tuple[Tensor, Tensor]:
        """See :meth:`Conditionals.input_units`."""
        return self.affine.input_loc[self.parts[site]], self.affine.input_scale[self.parts[site]]

    @torch.no_grad()
    def set_units_(
        self, site: str, outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """See :meth:`Conditionals.set_units_`."""
        part, affine = self.parts[site], self.affine
        affine.loc[part], affine.scale[part] = outputs
        affine.input_loc[part], affine.input_scale[part] = outputs if inputs is None else inputs

    @torch.no_grad()
    def whiten_(self, moments: Tensor) -> None:
        """See :meth:`Conditionals.whiten_`; the inputs of elements are kept as they are."""
        first, extra = self.num_features, self.affine.context_dim - self.num_features
        places = [*range(first), *range(first + extra, len(moments) + extra)]
        full = torch.eye(len(moments) + extra, dtype=moments.dtype, device=moments.device)
        index = torch.tensor(places, device=moments.device)
        full[index.unsqueeze(-1), index] = moments
        self.affine.whiten_(full)

    # ---------------------------------------------------------------- becoming linear

    @torch.no_grad()
    def set_linear_(self, site: str, linear: LinearConditional) -> bool:
        """See :meth:`Conditionals.set_linear_`."""
        if linear.by_element:
            return self._set_maps_(site, linear)
        network, part = self.affine, self.parts[site]
        centre, width = in_float64(network.loc), in_float64(network.scale)
        joint = centre.new_zeros(len(centre), network.context_dim + len(centre))
        shift = centre[part] + width[part] * linear.loc.to(joint)
        for parent, matrix in linear.weights.items():
            columns = list(self.columns[parent])
            scaled = width[part].unsqueeze(-1) * matrix.to(joint)
            if parent in self.parts:
                columns = [network.context_dim + j - self.num_features for j in columns]
                input_shift, input_scale = (unit.to(joint) for unit in self.input_units(parent))
                scaled = scaled / input_scale
                shift = shift - scaled @ input_shift
            joint[part, columns] = scaled
        # u = m + L eps  <=>  u = A m + (1 - A) u + D eps with D the diagonal of L and A = D L^-1
        tril = width[part].unsqueeze(-1) * linear.scale_tril.to(joint)
        diagonal = tril.diagonal()
        chain = torch.linalg.solve_triangular(tril, diagonal.diag(), upper=False, left=False)
        shifts, scales = torch.zeros_like(centre), torch.ones_like(centre)
        shifts[part], scales[part] = chain @ shift, diagonal
        joint[part] = chain @ joint[part]
        own = slice(network.context_dim + part.start, network.context_dim + part.stop)
        joint[part, own] = torch.eye(len(diagonal)).to(joint) - chain
        self.network.init_linear_(joint, shifts, scales, variables=range(part.start, part.stop))
        self._reset_table_(site)
        return True

    @torch.no_grad()
    def _reset_table_(self, site: str | None = None) -> None:
        """Let the per-element inputs of one site, or of all, be a shift and a log-scale of its last affine map."""
        network, stack = self.affine, self.affine.stack
        place = {int(v): inner for inner, v in enumerate(network._order)}
        edge = {pair: e for e, pair in enumerate(network.edges.edges)}
        first = stack.hidden_units[0]
        units = network.edges.units
        assert units is not None
        by_edge = units.offset.view(-1, stack.num_blocks, stack.num_inputs)
        trained = network.edges.weight.view_as(by_edge)
        by_variable = units.unit.view(-1, stack.num_blocks, stack.num_inputs)
        sign, last = (-1, 0) if network.closed_form == "density" else (1, stack.num_blocks - 1)
        for v, column in self._table_columns.items():
            if site is not None and not self.parts[site].start <= v < self.parts[site].stop:
                continue
            for i in range(stack.num_inputs - first):
                rows = by_edge[edge[place[v], column + i]]
                rows.zero_()
                trained[edge[place[v], column + i]] = 0.0
                rows[last, first + i] = sign
                if self.table is not None and column - self.num_features + i < self.table.table.shape[-1]:
                    at = column - self.num_features + i
                    self.table.set_(slice(at, at + 1), 0.0)
                    self.table.unit[at] = by_variable[place[v], last, first + i] * stack.num_blocks
        for own in [site] if site is not None else self._map_of:
            if own in self._map_of:
                element_map: Any = self.maps[self._map_of[own][0]]
                part = self.parts[own]
                rows = by_variable[[place[v] for v in range(part.start, part.stop)], last, first:]
                element_map.set_unit_(rows.flatten() * stack.num_blocks)

    def _set_maps_(self, site: str, linear: LinearConditional) -> bool:
        """Make the maps of a scalar site linear-Gaussian; parents within the block keep a slope that all share."""
        if site in self.block.per_element:
            return self._set_own_(site, linear)
        if site not in self._map_of or linear.loc.shape[1] != 1:
            return False
        key, columns = self._map_of[site]
        element_map = self.maps[key]
        assert isinstance(element_map, ElementMap)
        if not element_map.offset:
            return False
        # what all share is for elements beyond those at set-up, or with other covariates
        mean = {parent: matrix.mean(0) for parent, matrix in linear.weights.items()}
        log_scales = linear.scale_tril[:, 0, 0].log()
        centre = log_scales.mean()
        shared = LinearConditional(mean, linear.loc.mean(0), centre.exp().reshape(1, 1))
        self.set_linear_(site, shared)
        most = self.affine.stack.scale_range  # a conditional log-scale is bounded by a tanh
        ratio = ((log_scales - centre) / most).clamp(-0.999, 0.999)
        like = element_map.rows.table
        slopes = torch.zeros(len(linear.loc), 2, len(columns)).to(like)
        for parent, matrix in linear.weights.items():
            if parent not in self.parts:
                at = [columns.index(j) for j in self.columns[parent]]
                slopes[:, 0, at] = (matrix - mean[parent])[:, 0].to(like)
        off = linear.loc - linear.loc.mean(0)
        element_map.set_(slopes, torch.stack([off[:, 0], most * ratio.atanh()], -1).to(like))
        return True

    def _set_own_(self, site: str, linear: LinearConditional) -> bool:
        """Make the conditionals of elements linear-Gaussian with own locations; slopes and scales are shared."""
        if self.table is None:
            return False
        weights = {parent: matrix.mean(0) for parent, matrix in linear.weights.items()}
        self.set_linear_(site, LinearConditional(weights, linear.loc.mean(0), linear.scale_tril.mean(0)))
        self._put_locations_(site, linear.loc)
        return True

    def _put_locations_(self, site: str, locs: Tensor) -> None:
        like, part = self.table.table, self.parts[site]  # type: ignore[union-attr]
        off = (locs - locs.reshape(-1, locs.shape[-1]).mean(0)).reshape(*like.shape[:-1], -1)
        for i, v in enumerate(range(part.start, part.stop)):
            like[..., self._table_columns[v] - self.num_features] = off[..., i].to(like)

    @torch.no_grad()
    def set_elements_(self, site: str, locs: Tensor, scale_tril: Tensor) -> bool:
        """See :meth:`Conditionals.set_elements_`."""
        if self.table is None or site not in self.block.per_element:
            return False
        like = self.table.table
        mean = locs.reshape(-1, locs.shape[-1]).mean(0)
        self.set_linear_(site, LinearConditional({}, mean.to(like), scale_tril.to(like)))
        self._put_locations_(site, locs)
        return True

    @torch.no_grad()
    def narrow_elements_(self, factor: float, *, fitted: bool = True) -> None:
        """See :meth:`Conditionals.narrow_elements_`."""
        if self.table is not None and self.affine.stack.conditional_scale:
            self.table.table[..., 1::2] += math.log(factor)

    def keep_rows_(self, plates: Mapping[str, PlateState], context: Tensor) -> None:
        """See :meth:`Conditionals.keep_rows_`."""
        keep_rows_(self.maps, self._map_of, plates, context)

    def leave_out_maps_(self, site: str) -> None:
        """See :meth:`Conditionals.leave_out_maps_`."""
        leave_out_maps_(self.maps, self._map_of, site)

    # ---------------------------------------------------------------- evaluation

    def begin(self, context: Tensor, plates: Mapping[str, PlateState] | None = None) -> "FlowPass":
        """See :meth:`Conditionals.begin`."""
        parts = [context]
        if self._own_sites:
            number = 2 * len(self._table_columns)
            parts.append(context.new_zeros(number) if plates is None else self._own_inputs(context, plates))
        levels = FlowLevels(self.block.levels, self.parts, self._stages, self.affine.loc)
        return FlowPass(levels, self.network.start(*parts), [part.shape[:-1] for part in parts])

    def _own_inputs(self, context: Tensor, plates: Mapping[str, PlateState]) -> Tensor:
        """Return the inputs that elements have of their own."""
        rows = None if self.table is None else self.table(plates)
        if rows is not None and not self._map_of:
            return rows
        parts = []
        start = 0
        for site in self._own_sites:
            part: Tensor | None = None
            if site in self.block.per_element:
                assert rows is not None
                stop = start + 2 * (self.parts[site].stop - self.parts[site].start)
                part, start = rows[..., start:stop], stop
            if site in self._map_of:
                key, columns = self._map_of[site]
                contribution = self.maps[key](plates, columns_of_map(context, columns))
                part = contribution if part is None else part + contribution
            assert part is not None
            parts.append(part)
        return concatenate(parts)


@dataclass(frozen=True)
class FlowLevels:
    """Where the sites of a flow are.

    Attributes:
        levels: The sites, level by level.
        parts: For each site, its variables.
        stages: For each level, its stages: variables, counted from the first of the level, that are drawn at once.
        loc: The shifts of the variables, for sites of which no value is known.
    """

    levels: Sequence[Sequence[str]]
    parts: Mapping[str, slice]
    stages: Sequence[Sequence[Sequence[int]]]
    loc: Tensor


class FlowPass(Pass):
    """One pass of :class:`FlowConditionals`."""

    def __init__(self, levels: FlowLevels, evaluation: Evaluation, batches: Sequence[torch.Size]) -> None:
        self._levels = levels
        self._evaluation = evaluation
        self._batch = torch.Size(np.broadcast_shapes(*batches))
        self._depth = 0
        self._level: FlowLevel

    def next(self, priors: Mapping[str, SitePrior] | None = None) -> dict[str, dist.TorchDistribution]:
        """See :meth:`Pass.next`."""
        self._level = FlowLevel(self._levels, self._depth, self._evaluation)
        return {site: FlowConditional(self._level, site, self._batch) for site in self._level.parts}

    def accept(self, values: Mapping[str, Tensor]) -> None:
        """See :meth:`Pass.accept`."""
        self._depth += 1
        last = self._depth == len(self._levels.levels)
        self._evaluation = self._level.accept(values, last)
        shapes = (value.shape[:-1] for value in values.values())
        self._batch = torch.Size(np.broadcast_shapes(self._batch, *shapes))


class FlowLevel:
    """The sites of one level given the values of all levels before it.

    Sites of one level are drawn together, the first time that one of them is asked for, and scored together where
    all their values are known; they are independent given the levels before.

    Args:
        levels: Where the sites are.
        depth: The number of the level.
        evaluation: The flow's evaluation, at this level.
    """

    def __init__(self, levels: FlowLevels, depth: int, evaluation: Evaluation) -> None:
        sites, parts = levels.levels[depth], levels.parts
        start = parts[sites[0]].start
        self.parts = {site: slice(parts[site].start - start, parts[site].stop - start) for site in sites}
        self.size = parts[sites[-1]].stop - start
        self.stages = levels.stages[depth]
        self.loc = levels.loc[start : start + self.size]
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

    def push_site(self, site: str, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Map the noise of one site to its vector; return it and the log-determinant of the map."""
        part = self.parts[site]
        joined = noise.new_zeros(*noise.shape[:-1], self.size)
        joined[..., part] = noise
        value, log_prob = self.push(joined)[site]
        return value, _log_normal(noise).sum(-1) - log_prob

    def pull_site(self, site: str, value: Tensor) -> Tensor:
        """Return the noise of a vector of a site."""
        return self._terms_of({site: value})[0][..., self.parts[site]]

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
        batch = np.broadcast_shapes(*(value.shape[:-1] for value in values.values()))
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
        noise, log_diagonal = self._terms_of(values)
        term = _log_normal(noise) - log_diagonal
        return {site: term[..., self.parts[site]].sum(-1) for site in values}

    def _terms_of(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the noise of all variables of the level, and the logarithms of the diagonal."""
        joined = self._join(values)
        evaluation = self.evaluation
        noises, log_diagonals = [], []
        for i, stage in enumerate(self.stages):
            part = joined if len(self.stages) == 1 else joined[..., stage]
            noise, log_diagonal = evaluation.terms(part)
            noises.append(noise)
            log_diagonals.append(log_diagonal)
            if i + 1 < len(self.stages):
                evaluation = evaluation.fork()
                evaluation.accept(part)
        return self._in_order(noises), self._in_order(log_diagonals)


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
        return log_prob.expand(np.broadcast_shapes(log_prob.shape, self.batch_shape))


def _log_normal(noise: Tensor) -> Tensor:
    return -0.5 * noise.square() - HALF_LOG_TWO_PI
