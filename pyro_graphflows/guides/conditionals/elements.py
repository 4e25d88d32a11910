"""Parameters for each element of a plate, and maps: for data that no network reads, and non-exchangeable elements.

Elements of a plate beyond those whose parameters were fitted follow the model's own conditional. A site with
per-element parameters has none for a group that it has not seen. Given the outer sites, and without data of its own,
such a group's posterior is the model's conditional. So the distribution of the site is, element by element, the guide's
where there are parameters, and the model's beyond.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.structures import ModelGraph
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.plan import BlockPlan

__all__ = [
    "ElementMap",
    "ElementTable",
    "WithNewElements",
    "beyond_fitted",
    "columns_of_map",
    "element_maps",
    "grown_plates",
    "keep_rows_",
    "leave_out_maps_",
    "require_model_conditionals",
]

MOST_SLOPES = 64  # inputs up to which elements with parameters have slopes too

SHARED_FEATURES = 16
SAME = 1e-4  # of standardised covariates: what a change of type leaves of them


class ElementTable(nn.Module):
    """A row of parameters for each element of a stack of plates.

    The rows are added to the outputs of the block's network, so that a site's factor moves with the sampled sites
    above it, and differs between the elements of its plates by what their data say. A row is what it started from, in
    the units of the outputs, and a trained part that counts in natural units
    (:mod:`~pyro_graphflows.nn.masked`).

    Shape:
        - Output: ``(*batch, num_outputs)``, with the batch shape of the plates in the call.

    Args:
        plates: The plates.
        num_outputs: The length of a row.
        extends: Whether their sizes may change. Elements beyond those at set-up then have some row, which is not to be
            used (:class:`WithNewElements`).
        num_fixed: How many columns, the last ones, are not trained.

    Attributes:
        table: What the rows start from.
        trained: What is added to them, in natural units.
        unit: The natural units, ``(num_outputs,)``.
    """

    table: Tensor
    unit: Tensor

    def __init__(
        self, plates: Sequence[PlateState], num_outputs: int, *, extends: bool = False, num_fixed: int = 0
    ) -> None:
        super().__init__()
        self.num_fixed = num_fixed
        self.extends = extends
        depth = max((-plate.dim for plate in plates), default=0)
        shape = [1] * depth
        for plate in plates:
            shape[depth + plate.dim] = plate.full_size
        self.sizes = {plate.name: plate.full_size for plate in plates}
        self.trained = nn.Parameter(torch.zeros(*shape, num_outputs - num_fixed))
        self.register_buffer("table", torch.zeros(*shape, num_outputs))
        self.register_buffer("unit", torch.ones(num_outputs))

    @torch.no_grad()
    def set_(self, columns: slice, value: Tensor | float) -> None:
        """Let some columns start from given values."""
        self.table[..., columns] = value
        self.trained[..., columns] = 0.0

    def forward(self, plates: Mapping[str, PlateState]) -> Tensor:
        """Return the rows of a call's elements.

        Raises:
            GraphflowsError: If the full size of a plate is not that at set-up, and must be.
        """
        if not self.num_fixed:
            return self.chosen(torch.addcmul(self.table, self.unit, self.trained), plates)
        free = self.trained.shape[-1]
        rows = torch.addcmul(self.table[..., :free], self.unit[:free], self.trained)
        return self.chosen(torch.cat([rows, self.table[..., free:]], -1), plates)

    def chosen(self, rows: Tensor, plates: Mapping[str, PlateState]) -> Tensor:
        """Return those of a call's elements among rows for all elements.

        Raises:
            GraphflowsError: If the full size of a plate is not that at set-up, and must be.
        """
        for name, size in self.sizes.items():
            plate = plates[name]
            indices = plate.indices
            if plate.full_size != size and self.extends:
                indices = torch.arange(plate.size) if indices is None else indices
                indices = indices.clamp(max=size - 1)
            elif plate.full_size != size:
                raise GraphflowsError(
                    f"Expected plate {name!r} to have {size} elements, each with its own parameters, as when the guide "
                    f"was set up; got {plate.full_size}. Set up a guide for the new data."
                )
            if indices is not None:
                rows = rows.index_select(plate.dim - 1, indices.to(rows.device))
        return rows


class SharedFeatures(nn.Module):
    """Two hidden layers in one parameter: to optimisers that have an object for each, small ones cost as much as large.

    Shape:
        - Input: ``(*batch, num_inputs)``.
        - Output: ``(*batch, num_features)``.

    Args:
        num_inputs: The number of inputs.
        num_features: The number of features, and of units in the first layer.
    """

    def __init__(self, num_inputs: int, num_features: int) -> None:
        super().__init__()
        layers = nn.Linear(num_inputs, num_features), nn.Linear(num_features, num_features)
        parts = [parameter.detach() for layer in layers for parameter in layer.parameters()]
        self.shapes = [part.shape for part in parts]
        self.weights = nn.Parameter(torch.cat([part.flatten() for part in parts]))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the features."""
        parts = self.weights.split([shape.numel() for shape in self.shapes])
        first, first_bias, second, second_bias = map(Tensor.view, parts, self.shapes)
        if inputs.dim() == 1:  # a product of a matrix and a vector, in fewer operations
            return F.elu(torch.addmv(second_bias, second, F.elu(torch.addmv(first_bias, first, inputs))))
        return F.elu(F.linear(F.elu(F.linear(inputs, first, first_bias)), second, second_bias))


class ElementMap(nn.Module):
    r"""A map from a site's inputs to its factor's parameters for each element of plates, beside the network.

    A shared network cannot give the elements of a plate slopes of their own, as groups of unequal sizes need: a large
    group hears less of what is sampled above it than a small one, and the more so the smaller the sampled scale of the
    effects is.
    Hence every element has an affine map of its own, of the inputs and of nonlinear features of them that all
    elements share. All maps are zero in the beginning.

    Shape:
        - Input: ``(*batch, num_inputs)``.
        - Output: ``(*batch, num_outputs)``.

    Maps may be made for the rows of covariates that set-up saw. In a call with other rows, or with elements beyond
    those at set-up, the network, which reads these covariates, is then without them.

    Args:
        plates: The plates.
        num_inputs: The number of inputs.
        num_outputs: The number of outputs.
        offset: Whether the maps have an offset, or slopes alone, beside per-element parameters. With an offset the
            full sizes of the plates must not change.
        features: The number of shared features.
        known: The inputs whose rows maps are made for; None where maps hold whatever the inputs are.

    Attributes:
        at_rows: The values of these inputs at set-up, NaN as long as they are not known.
    """

    at_rows: Tensor

    def __init__(
        self,
        plates: Sequence[PlateState],
        num_inputs: int,
        num_outputs: int,
        *,
        offset: bool,
        features: int = SHARED_FEATURES,
        known: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.known = known
        self.num_inputs, self.num_outputs, self.offset = num_inputs, num_outputs, offset
        self.num_features = features if num_inputs else 0
        self.shared = SharedFeatures(num_inputs, features) if self.num_features else None
        columns = num_outputs * (num_inputs + self.num_features + offset)
        self.rows = ElementTable(plates, columns, extends=not offset or known is not None)
        if known is not None:
            unknown = torch.full((*self.rows.table.shape[:-1], len(known)), math.nan)
            self.register_buffer("at_rows", unknown)
        self.set_unit_(torch.ones(num_outputs))

    def forward(self, plates: Mapping[str, PlateState], inputs: Tensor) -> Tensor:
        """Return the contribution to the outputs of a call's elements."""
        rows = self.rows(plates).unflatten(-1, (self.num_outputs, -1))
        holds = None if self.known is None else self._holds(plates, inputs[..., list(self.known)])
        if self.shared is not None:
            inputs = torch.cat([inputs, self.shared(inputs) / self.num_features**0.5], -1)
        outputs = (rows[..., : inputs.shape[-1]] @ inputs.unsqueeze(-1)).squeeze(-1)
        if self.offset:
            outputs = outputs + rows[..., -1]
        return outputs if holds is None else torch.where(holds.unsqueeze(-1), outputs, 0.0)

    def _holds(self, plates: Mapping[str, PlateState], known: Tensor) -> Tensor:
        """Return for which elements of a call the covariates are those at set-up."""
        at_rows = self.rows.chosen(self.at_rows, plates)
        other = (known - at_rows).abs() > SAME * (1.0 + at_rows.abs())  # false where set-up did not say
        holds = ~other.any(-1)
        for name, size in self.rows.sizes.items():
            plate = plates[name]
            if plate.full_size > size:
                indices = torch.arange(plate.size) if plate.indices is None else plate.indices
                old = (indices < size).reshape(-1, *(1,) * (-plate.dim - 1))
                holds = holds & old.to(holds.device)
        return holds

    @torch.no_grad()
    def keep_rows_(self, plates: Mapping[str, PlateState], rows: Tensor) -> None:
        """Note for which rows of covariates the maps are made.

        Args:
            plates: The plates at set-up, in full.
            rows: The inputs that are ``known``, ``(*batch, n)``.
        """
        for name in self.rows.sizes:
            plate = plates[name]
            if plate.indices is not None:  # in another order than the elements are numbered
                rows = rows.index_select(plate.dim - 1, plate.indices.argsort().to(rows.device))
        while rows.dim() > self.at_rows.dim():
            rows = rows.select(0, 0)
        self.at_rows.copy_(rows.expand_as(self.at_rows))

    @torch.no_grad()
    def set_(self, slopes: Tensor, offsets: Tensor | None = None) -> None:
        """Make the maps affine: ``(elements, num_outputs, num_inputs)`` and ``(elements, num_outputs)``."""
        parts = [slopes, slopes.new_zeros(*slopes.shape[:2], self.num_features)]
        if offsets is not None:
            parts.append(offsets.unsqueeze(-1))
        self.rows.set_(slice(None), torch.cat(parts, -1).reshape(self.rows.table.shape))

    @torch.no_grad()
    def set_unit_(self, unit: Tensor) -> None:
        """Set the natural units of the outputs, ``(num_outputs,)``: a step of all slopes together is half of one."""
        of_slopes = unit.new_full((self.num_inputs + self.num_features,), 0.5 / max(self.num_inputs, 1))
        each = torch.cat([of_slopes, unit.new_ones(int(self.offset))])
        self.rows.unit.copy_((unit.unsqueeze(-1) * each).flatten())

    @torch.no_grad()
    def leave_out_(self) -> None:
        """Let the maps be zero, and stay so in training: its steps count for nothing."""
        self.rows.set_(slice(None), 0.0)
        self.rows.unit.zero_()


def element_maps(
    block: BlockPlan,
    seen: Mapping[str, list[int]],
    num_outputs: Mapping[str, int],
    plates: Sequence[PlateState],
    columns: Mapping[str, Sequence[int]] | None = None,
) -> tuple[nn.ModuleDict, dict[str, tuple[str, list[int]]]]:
    """Return the maps of a block's sites: for non-exchangeable plates, and beside per-element parameters.

    Args:
        block: The block of the plan.
        seen: For each site the inputs of its map, in the order in which maps are made.
        num_outputs: For each site the number of parameters that its map adds to.
        plates: The plates of the block.
        columns: The columns of the nodes, where maps are made for rows of some.

    Returns:
        The maps by the position of their site in the block, and for each site with a map its key and inputs.
    """
    maps, found = nn.ModuleDict(), {}
    for site, inputs in seen.items():
        per_element = site in block.per_element
        around = (
            block.plates
            if per_element and len(inputs) <= MOST_SLOPES
            else block.non_exchangeable.get(site, ())
        )
        if around and (inputs or not per_element):
            key = str(block.sites.index(site))
            chosen = [plate for name in around for plate in plates if plate.name == name]
            known: list[int] | None = None
            if site in block.at_rows and columns is not None and not per_element:
                own = {j for name in block.at_rows[site] for j in columns.get(name, ())}
                known = [i for i, j in enumerate(inputs) if j in own]
            maps[key] = ElementMap(
                chosen, len(inputs), num_outputs[site], offset=not per_element, known=known
            )
            found[site] = key, inputs
    return maps, found


def columns_of_map(values: Tensor, columns: Sequence[int]) -> Tensor:
    """Return some columns of the last dimension; neighbours as a view, as a list would be a new tensor in each call.

    Args:
        values: Shape ``(*batch, n)``.
        columns: Which ones.
    """
    first = columns[0] if columns else 0
    if list(columns) == list(range(first, first + len(columns))):
        return values[..., first : first + len(columns)]
    return values[..., columns]


def leave_out_maps_(maps: nn.ModuleDict, found: Mapping[str, tuple[str, list[int]]], site: str) -> None:
    """Let the maps of a site be zero for good; nothing where it has none.

    Args:
        maps: The maps of a block.
        found: For each site its key among them, and the columns of its inputs.
        site: The site.
    """
    if site in found:
        element_map: Any = maps[found[site][0]]
        element_map.leave_out_()


def keep_rows_(
    maps: nn.ModuleDict,
    found: Mapping[str, tuple[str, list[int]]],
    plates: Mapping[str, PlateState],
    context: Tensor,
) -> None:
    """Note for which rows of covariates maps are made, where they hold for these alone.

    Args:
        maps: The maps of a block.
        found: For each site its key among them, and the columns of its inputs.
        plates: The plates at set-up.
        context: Features of the context, ``(*batch, num_features)``.
    """
    for key, columns in found.values():
        element_map: Any = maps[key]
        if element_map.known:
            element_map.keep_rows_(plates, context[..., [columns[i] for i in element_map.known]])


def beyond_fitted(fitted: Iterable[PlateState], plates: Mapping[str, PlateState]) -> Tensor | None:
    """Return which elements of plates in a call are beyond those at set-up; None if none is.

    Args:
        fitted: The plates at set-up.
        plates: The plates of the call.

    Shape:
        - Output: broadcasts with the batch shape of a site in these plates.

    Example:
        >>> at_set_up, now = PlateState("g", -1, 2, 2, None), PlateState("g", -1, 3, 3, None)
        >>> beyond_fitted([at_set_up], {"g": now})
        tensor([False, False,  True])
    """
    found: Tensor | None = None
    for plate in fitted:
        now = plates[plate.name]
        if now.full_size <= plate.full_size:
            continue
        indices = torch.arange(now.size) if now.indices is None else now.indices
        new = (indices >= plate.full_size).reshape(-1, *(1,) * (-now.dim - 1))
        found = new if found is None else found | new.to(found.device)
    return found


def grown_plates(fitted: Iterable[PlateState], plates: Mapping[str, PlateState]) -> str:
    """Return in words which plates of a call have more elements than at set-up, with both numbers.

    Args:
        fitted: The plates at set-up.
        plates: The plates of the call.
    """
    return ", ".join(
        f"{plate.name!r} ({plate.full_size} elements when the guide was set up, now {plates[plate.name].full_size})"
        for plate in fitted
        if plates[plate.name].full_size > plate.full_size
    )


def require_model_conditionals(
    sites: Sequence[str], block: BlockPlan, graph: ModelGraph, sampled: Collection[str], grown: str
) -> None:
    """Refuse new elements of sites for which the model has no conditional when they are sampled.

    Args:
        sites: Sites with parameters for each element.
        block: Their block.
        graph: The model.
        sampled: The latent sites that are sampled before them.
        grown: The plates with new elements, in words.

    Raises:
        UnsupportedModelError: If a conditional depends on what is sampled later, or is summed over by the model.
        GraphflowsError: If copies of a site are drawn jointly.
    """
    for site in sites:
        if site in block.coupled:
            raise GraphflowsError(
                f"Expected no new elements of plate {grown}: copies of {site!r} are drawn jointly "
                f"across {', '.join(block.coupled[site].plates)}, by parameters for the elements there were. "
                "Set up a guide for the new data, or use pool='deepset'."
            )
        late = [p for p in graph.parents(site) if p in graph.latent and p not in sampled]
        late += [p for p in graph.parents(site) if p in graph.marginalised]
        if late:
            raise UnsupportedModelError(
                f"Expected no new elements of plate {grown}: {site!r} has parameters for each element, "
                "and beyond them would follow the model's conditional, but its parents "
                f"{', '.join(map(repr, late))} are not sampled before it. Use inverse='reverse', "
                "which follows the model's order, or set up a guide for the new data."
            )


class WithNewElements(dist.TorchDistribution):
    """A distribution that is one for some elements of the batch and another for the rest.

    Args:
        fitted: The guide's distribution of a site, for the elements with parameters.
        model: The model's own, for those beyond.
        new: Which elements are beyond; broadcasts with the batch shape.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, fitted: Any, model: Any, new: Tensor) -> None:
        shape = torch.Size(np.broadcast_shapes(fitted.batch_shape, model.batch_shape, new.shape))
        self.fitted, self.model, self.new = fitted.expand(shape), model.expand(shape), new
        self.has_rsample = fitted.has_rsample and model.has_rsample
        self.has_enumerate_support = fitted.has_enumerate_support
        super().__init__(shape, fitted.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the site."""
        support: constraints.Constraint = self.fitted.support
        return support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "WithNewElements":
        """Return the same at a larger batch shape."""
        shape = torch.Size(batch_shape)
        return WithNewElements(self.fitted.expand(shape), self.model.expand(shape), self.new)

    def _chosen(self, of_model: Tensor, of_fitted: Tensor, event_dim: int) -> Tensor:
        new = self.new.to(of_fitted.device).reshape(self.new.shape + (1,) * event_dim)
        return torch.where(new, of_model.to(of_fitted.dtype), of_fitted)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + event_shape``."""
        drawn = self.model.rsample(sample_shape), self.fitted.rsample(sample_shape)
        return self._chosen(*drawn, len(self.event_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw values of shape ``sample_shape + batch_shape + event_shape`` without gradients."""
        with torch.no_grad():
            drawn = self.model.sample(sample_shape), self.fitted.sample(sample_shape)
            return self._chosen(*drawn, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values, shape ``batch_shape``."""
        return self._chosen(self.model.log_prob(value), self.fitted.log_prob(value), 0)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all values of a discrete site."""
        values: Tensor = self.fitted.enumerate_support(expand=expand)
        return values

    def centre(self) -> Tensor:
        """Return the centre of the guide's distribution, and the median of the model's (the mean where not known)."""
        of_fitted = self.fitted.centre() if hasattr(self.fitted, "centre") else self.fitted.mean
        shape = self.batch_shape + self.event_shape
        return self._chosen(_median(self.model).expand(shape), of_fitted.expand(shape), len(self.event_shape))


def _median(fn: Any) -> Tensor:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    if fn.support.is_discrete:
        mode: Tensor = fn.mode
        return mode.nan_to_num()
    try:
        median: Tensor = fn.icdf(torch.full((), 0.5, dtype=torch.get_default_dtype()))
    except NotImplementedError:
        median = fn.mean
    return median
