"""The family of normal conditionals: one masked network (MADE) for the factors of a block's sites, level by level.

The network of a block sees the block's context and, level by level, the sites drawn so far; masks from the
inverse graph leave to each site exactly its parents (Germain et al. 2015, Webb et al. 2018). Everything is in
standardised units, inputs and outputs.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_graphflows.capture import CAPTURING
from pyro_graphflows.distributions.fusion import fuse_matrix
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.conditionals.banded import BandedNormalFactor, regress_chain
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
from pyro_graphflows.guides.conditionals.coupled import (
    WAKE,
    BesidePriors,
    CoupledFactor,
    CoupledNormal,
    CouplingTerms,
    exchangeable_start,
    factor_pairs_start,
    pairs_start,
)
from pyro_graphflows.guides.conditionals.elements import (
    SAME,
    ElementMap,
    ElementTable,
    columns_of_map,
    element_maps,
    keep_rows_,
)
from pyro_graphflows.guides.conditionals.factors import (
    LEAST_SHARE,
    DiscreteFactor,
    ElementNormalFactor,
    Factor,
    NormalFactor,
    SharedCovarianceFactor,
    factor_locations,
    fused_scalar_normals,
    inverse_of_lower,
    scalar_normals,
)
from pyro_graphflows.guides.conditionals.low_rank import LowRankNormalFactor
from pyro_graphflows.guides.sites import JointFactor, LatentSite, SitePrior, concatenate
from pyro_graphflows.nn.activations import make_activation
from pyro_graphflows.nn.mlp import LevelEvaluation, MaskedMLP
from pyro_graphflows.regression import Moments, in_float64, regression_with_scales, varies

__all__ = ["NETWORK_OPTIONS", "MaskedConditionals", "Normal"]

NETWORK_OPTIONS = ("hidden_dims", "units_per_set", "hidden_layers", "activation", "skip")

# numbers of an exact conditional that move in full units in a step of training, or more of them less
FREE_IF_EXACT = 16
MOST_UNITS = 8.0  # that the logarithm of a wide factor's scale moves in a step of training
MOST_WITH_SCALES = 100  # inputs of a number whose scale may follow some of them

FactorMaker = Callable[[LatentSite], Factor]


@dataclass(frozen=True)
class Normal(Family):
    r"""Normal conditionals whose parameters come from masked networks (MADE).

    In unconstrained space, ``q(z_v | parents) = Normal(loc_v(parents), scale_v(parents))``, with a full covariance
    within vector sites; values are pushed to the supports of the sites. Discrete sites have Bernoulli and categorical
    factors.

    References:
        [1] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.
        [2] Germain et al. (2015), MADE: Masked Autoencoder for Distribution Estimation.

    Args:
        hidden_dims: Widths of the hidden layers; None for ``units_per_set`` units for each distinct set of parents.
        units_per_set: See ``hidden_dims``; a quarter of them for each element of a long vector that is held by element
            (:mod:`~pyro_graphflows.guides.vectors`).
        hidden_layers: The number of hidden layers where ``hidden_dims`` is None.
        activation: ``"elu"``, ``"relu"``, ``"tanh"`` ...
        skip: Whether a linear map from the parents runs beside the hidden layers. The regression start needs it.
        factor: The factor class of the continuous sites, for other conditionals than normal ones.
        fusion: Whether a site's conditional is the model's own distribution of the site, given its parents in the
            model, times a normal factor (of a discrete site, its logits plus some), in a coordinate in which the prior
            is normal (:mod:`~pyro_graphflows.guides.fusion`). ``"auto"`` does so for each site where it can and has an
            effect; True for all, and refuses models in which some site cannot.

    Raises:
        GraphflowsError: If a width or a number is not positive, the activation is unknown, or ``factor`` is no
            subclass of :class:`~pyro_graphflows.guides.Factor`.

    Example:
        >>> Normal(hidden_dims=[32, 32])
        Normal(hidden_dims=(32, 32), units_per_set=16, hidden_layers=1, activation='elu', skip=True)
    """

    hidden_dims: Sequence[int] | None = None
    units_per_set: int = 16
    hidden_layers: int = 1
    activation: str = "elu"
    skip: bool = True
    factor: type[Factor] = field(default=NormalFactor, repr=False)
    fusion: bool | str = field(default="auto", repr=False)

    def __post_init__(self) -> None:
        freeze_widths(self)
        require_fusion(self)
        require_positive(self, "units_per_set", "hidden_layers")
        make_activation(self.activation)
        if not (isinstance(self.factor, type) and issubclass(self.factor, Factor)):
            raise GraphflowsError(f"Expected factor= a subclass of Factor; got {self.factor!r}.")

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in NETWORK_OPTIONS}
        options = [f"{name}={value!r}" for name, value in shown.items()]
        if self.fusion != "auto":
            options.append(f"fusion={self.fusion!r}")
        if self.factor is not NormalFactor:
            options.append(f"factor={self.factor.__name__}")
        return f"Normal({', '.join(options)})"

    @property
    def can_regress(self) -> bool:
        """Whether there are linear maps to set."""
        return self.skip

    @property
    def can_split(self) -> bool:
        """Whether continuous sites are normal."""
        return self.factor is NormalFactor

    @property
    def can_couple(self) -> bool:
        """Whether continuous sites are normal."""
        return self.factor is NormalFactor

    @property
    def has_vectors(self) -> bool:
        """Whether continuous sites are normal."""
        return self.factor is NormalFactor

    def serving(self, role: SiteRole) -> Family:
        """Return this family; with a quarter of the hidden units where each of many elements has units of its own."""
        if role.long != "element" or self.hidden_dims is not None:
            return self
        return replace(self, units_per_set=-(-self.units_per_set // 4))

    def conditionals(self, spec: BlockSpec) -> Conditionals:
        """See :meth:`Family.conditionals`."""
        options: dict[str, Any] = {name: getattr(self, name) for name in NETWORK_OPTIONS}
        return MaskedConditionals(spec, self.factor.for_site, options)


class MaskedConditionals(Conditionals):
    """The conditionals of the sites of one block, by one masked network.

    Args:
        spec: What they are made from.
        make_factor: Returns the factor of a continuous site for which the user gave none.
        network_options: Options of :class:`~pyro_graphflows.nn.mlp.MaskedMLP`.
    """

    shift: Tensor
    scale: Tensor
    input_shift: Tensor
    input_scale: Tensor
    fusing: Tensor
    summing: Tensor
    fused_shift: Tensor
    fused_scale: Tensor
    reference: Tensor

    def __init__(self, spec: BlockSpec, make_factor: FactorMaker, network_options: Mapping[str, Any]) -> None:
        super().__init__(spec)
        block = spec.block
        self.factors = {site: self._factor_of(site, spec, make_factor) for site in block.sites}
        levels = [0] * self.num_features
        names = [node.name for node in block.context for _ in self.columns[node.name]]
        for depth, level in enumerate(block.levels):
            for site in level:
                levels += [depth + 1] * self.factors[site].size
                names += [site] * self.factors[site].size
        allowed: list[list[int]] = []
        output_names: list[str] = []
        self.outputs: dict[str, slice] = {}  # rows of the network, in sampling order
        self._parts: dict[str, slice] = {}  # entries of the units
        for site in block.sites:
            own, start, size = self.factors[site], len(allowed), self.factors[site].size
            seen_by_all = self.inputs_of(site)
            if site in self.element_columns and own.output_elements is not None:
                allowed += [self.element_columns[site][i] for i in own.output_elements]
            elif seen_by_all or own.shares_constants or not (spec.ranks or spec.chains):
                allowed += [seen_by_all] * own.num_reading
            output_names += [site] * (len(allowed) - start)
            self.outputs[site] = slice(start, len(allowed))
            first = self.columns[site].start - self.num_features
            self._parts[site] = slice(first, first + size)
        # An element may see less than its site does; its outputs are wanted with those of the site.
        depths = {site: depth for depth, level in enumerate(block.levels) for site in level}
        self.num_inputs = self.num_columns
        if any(
            site in spec.ranks or site in spec.chains for site in block.levels[-1]
        ):  # long, and no site looks at the last level
            of_last = sum(self.factors[site].size for site in block.levels[-1])
            self.num_inputs = max(self.num_columns - of_last, 1)
        self.network = MaskedMLP(
            allowed,
            self.num_inputs,
            num_params=1,
            input_levels=levels[: self.num_inputs],
            output_levels=[depths[site] for site in output_names],
            input_names=names[: self.num_inputs],
            output_names=output_names,
            natural_units=True,
            **network_options,
        )
        num_rows = {site: self._num_varying(own) for site, own in self.factors.items()}
        self.constants = nn.ModuleDict(  # by the position of the site
            {
                str(i): ElementTable((), own.num_outputs - (rows.stop - rows.start), num_fixed=own.num_fixed)
                for i, (own, rows) in enumerate(
                    zip(self.factors.values(), self.outputs.values(), strict=True)
                )
                if rows.stop - rows.start < own.num_outputs
            }
        )
        self._constants_of = {site: str(i) for i, site in enumerate(block.sites) if str(i) in self.constants}
        self._table_columns: dict[str, slice] = {}
        start = 0
        for site in block.per_element if spec.plates else ():  # in no plate the network has all parameters
            self._table_columns[site] = slice(start, start + num_rows[site])
            start += num_rows[site]
        self.table = ElementTable(spec.plates, start, extends=True) if self._table_columns else None
        seen = {site: self.inputs_of(site) for site in block.sites}
        self._starts_exact = False
        self.maps = nn.ModuleDict()
        self._map_of: dict[str, tuple[str, list[int]]] = {}
        if block.per_element or block.non_exchangeable:
            self.maps, self._map_of = element_maps(block, seen, num_rows, spec.plates, self.columns)
        self.couplings = nn.ModuleDict()  # by the position of the site
        self._coupling_of: dict[str, str] = {}
        for position, site in enumerate(block.sites):
            coupled = self.factors[site]
            if isinstance(coupled, CoupledFactor):
                across = [plate for plate in spec.plates if plate.name in block.coupled[site].plates]
                others = [plate for plate in spec.plates if plate.name not in block.coupled[site].plates]
                self.couplings[str(position)] = CouplingTerms(coupled, across, others)
                self._coupling_of[site] = str(position)
        total = self.num_columns - self.num_features
        for name in ("shift", "input_shift"):
            self.register_buffer(name, torch.zeros(total))
        for name in ("scale", "input_scale"):
            self.register_buffer(name, torch.ones(total))
        fusible = [site for site in block.sites if site in block.fused and self.factors[site].can_fuse]
        self._fused_at: dict[str, int] = {site: i for i, site in enumerate(fusible)}
        fusing = [site not in block.only_summed for site in fusible]
        if fusible:
            self.register_buffer("fusing", torch.tensor(fusing))
            self.register_buffer("fused_shift", torch.zeros(total))
            self.register_buffer("fused_scale", torch.ones(total))
            self.register_buffer("reference", torch.zeros(total))
        self._is_fusing = fusing  # the same as the buffer, which may be on a device
        self._referring: set[str] = set()  # the sites with a reference
        self._basis_of: dict[str, str] = {}
        for position, site in enumerate(block.sites):
            if self.factors[site].size > 1 and self.factors[site].takes_matrix:
                self._basis_of[site] = f"basis_{position}"
                self.register_buffer(self._basis_of[site], torch.eye(self.factors[site].size))
        if block.summed:
            self.register_buffer("summing", torch.zeros(len(fusible), dtype=torch.bool))
        self._is_summing = [False] * len(fusible)
        self._kept_units: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        self._kept_bases: dict[tuple[str, int], tuple[Tensor, Tensor, tuple[int, int], Tensor]] = {}
        self._scalar_levels = {
            i
            for i, level in enumerate(block.levels)
            if all(
                type(self.factors[site]) is NormalFactor
                and self.factors[site].size == 1
                and site not in self._constants_of
                for site in level
            )
        }

    def _factor_of(self, name: str, spec: BlockSpec, default: FactorMaker) -> Factor:
        site = spec.sites[name]
        if name in spec.block.coupled:
            return CoupledFactor(site.size, spec.block.coupled[name].rank)
        if name in spec.factors:
            return spec.factors[name].for_site(site)
        if spec.ranks.get(name) == site.size:
            return SharedCovarianceFactor(site.size)
        if name in spec.ranks:
            return LowRankNormalFactor(site.size, spec.ranks[name])
        if name in spec.chains:
            width, differences = spec.chains[name]
            return BandedNormalFactor(
                site.size, width, differences, reads=any(map(len, self.element_columns[name]))
            )
        if site.encoding is not None:
            return DiscreteFactor.for_site(site)
        if name in spec.element_parents:
            return ElementNormalFactor(self.inner[name])
        return default(site)

    @staticmethod
    def _num_varying(factor: Factor) -> int:
        """Return in how many outputs elements of a plate with parameters of their own differ, the first ones."""
        return factor.num_reading if factor.shares_constants else factor.num_outputs

    # ---------------------------------------------------------------- units

    def _units(self, kind: str, part: slice) -> tuple[Tensor, Tensor]:
        """Return shift and scale of some entries: the same tensors from call to call, for what follows from them.

        Args:
            kind: ``""`` for those of outputs, ``"input_"`` or ``"fused_"``.
            part: The entries.
        """
        key = kind, part.start, part.stop
        shift, scale = self._buffers[f"{kind}shift"], self._buffers[f"{kind}scale"]
        assert shift is not None
        assert scale is not None
        kept = self._kept_units.get(key)
        if kept is None or kept[0]._base is not shift or kept[1]._base is not scale:
            kept = self._kept_units[key] = shift[part], scale[part]
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept_units": {}, "_kept_bases": {}}

    def output_units(self, site: str) -> tuple[Tensor, Tensor]:
        """See :meth:`Conditionals.output_units`."""
        return self.shift[self._parts[site]], self.scale[self._parts[site]]

    def input_units(self, site: str) -> tuple[Tensor, Tensor]:
        """See :meth:`Conditionals.input_units`."""
        return self.input_shift[self._parts[site]], self.input_scale[self._parts[site]]

    @torch.no_grad()
    def set_units_(
        self, site: str, outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """See :meth:`Conditionals.set_units_`."""
        part = self._parts[site]
        factor = self.factors[site]
        if isinstance(factor, BandedNormalFactor) and factor.shares_units:
            outputs = outputs[0].mean().expand(factor.size), outputs[1].mean().expand(factor.size)
        self.shift[part], self.scale[part] = outputs
        self.input_shift[part], self.input_scale[part] = outputs if inputs is None else inputs

    @torch.no_grad()
    def whiten_(self, moments: Tensor) -> None:
        """See :meth:`Conditionals.whiten_`."""
        self.network.whiten_(moments[: self.num_inputs, : self.num_inputs])

    # ---------------------------------------------------------------- fusion

    def fuses(self, site: str) -> bool:
        """See :meth:`Conditionals.fuses`."""
        return site in self._fused_at and self._is_fusing[self._fused_at[site]]

    @torch.no_grad()
    def set_fusing_(self, site: str, fuse: bool) -> None:
        """See :meth:`Conditionals.set_fusing_`."""
        if site in self._fused_at:
            self.fusing[self._fused_at[site]] = self._is_fusing[self._fused_at[site]] = fuse

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for site, (key, _) in list(self._map_of.items()):
            if f"{prefix}maps.{key}.rows.table" not in state_dict:
                self.leave_out_maps_(site)
        if self._fused_at and not self.fusing.is_meta:
            self._is_fusing = self.fusing.tolist()
            self._referring = {site for site in self._fused_at if self.reference[self._parts[site]].any()}
            if self.block.summed:
                self._is_summing = self.summing.tolist()

    def sums(self, site: str) -> bool:
        """See :meth:`Conditionals.sums`."""
        return self.fuses(site) and self._is_summing[self._fused_at[site]]

    @torch.no_grad()
    def set_summed_(self, site: str, width: Tensor | None) -> None:
        """See :meth:`Conditionals.set_summed_`."""
        at = self._fused_at[site]
        self.summing[at] = self._is_summing[at] = width is not None
        if width is not None:
            self._set_reference_(site, False)
            none = self.shift.new_zeros(self.factors[site].num_outputs, self.num_columns)
            self._set_rows_(site, none, none[:, 0], self.factors[site].natural_units(width.to(none)))
            self.set_fusing_(site, True)

    def fused_units(self, site: str) -> tuple[Tensor, Tensor]:
        """See :meth:`Conditionals.fused_units`."""
        return self.fused_shift[self._parts[site]], self.fused_scale[self._parts[site]]

    @torch.no_grad()
    def set_fused_units_(self, site: str, units: tuple[Tensor, Tensor]) -> None:
        """See :meth:`Conditionals.set_fused_units_`."""
        if site in self._fused_at:
            self.fused_shift[self._parts[site]], self.fused_scale[self._parts[site]] = units

    @torch.no_grad()
    def set_fused_(self, site: str, linear: LinearConditional) -> bool:
        """See :meth:`Conditionals.set_fused_`."""
        factor = self.factors[site]
        if linear.by_element:
            return self._set_maps_(site, factor, linear, fused=True)
        weights, loc, tril = self._take_basis_(site, linear, fused=True)
        refers = self._can_refer(site, linear) and bool(tril > 1.0)
        self._set_reference_(site, refers)
        variance = tril.square().sum()
        if refers:
            weights, loc = weights / (1.0 + variance), loc / (1.0 + variance)
        weights, biases = factor.fused_start(weights, loc, tril)
        self._add_log_scales_(factor, weights, linear)
        units = factor.natural_units_beside_prior(tril)
        if refers:  # what changes the scale of the conditional as much as without a prior, or nearly
            units[list(factor.log_scale_outputs)] *= (1.0 + variance).clamp(max=MOST_UNITS)
        self._set_rows_(site, weights, biases, units)
        self.set_fusing_(site, True)
        return True

    def _can_refer(self, site: str, linear: LinearConditional) -> bool:
        """Whether a site's location may be that of its factor times a reference prior.

        It may not where the width of the factor depends on its parents: its own location is then linear, that of the
        product is not.
        """
        factor = self.factors[site]
        single = factor.size == 1 and not isinstance(factor, DiscreteFactor | CoupledFactor)
        return single and not linear.log_scale

    def _set_reference_(self, site: str, refers: bool) -> None:
        """Let the location of a site be that of its factor times a standard normal, or that of the factor."""
        if site in self._fused_at:
            self.reference[self._parts[site]] = float(refers)
            self._referring = self._referring | {site} if refers else self._referring - {site}

    # ---------------------------------------------------------------- becoming linear

    @torch.no_grad()
    def set_linear_(self, site: str, linear: LinearConditional) -> bool:
        """See :meth:`Conditionals.set_linear_`."""
        factor = self.factors[site]
        if linear.by_element:
            return self._set_maps_(site, factor, linear)
        self.set_fusing_(site, False)
        self._set_reference_(site, False)
        weights, loc, tril = self._take_basis_(site, linear)
        units = factor.natural_units(tril)
        if linear.exact or self._starts_exact:
            units = units * min(1.0, FREE_IF_EXACT / int((units > 0).sum())) ** 0.5
        weights, biases = factor.linear_start(weights, loc, tril)
        self._add_log_scales_(factor, weights, linear)
        self._set_rows_(site, weights, biases, units)
        return True

    def _add_log_scales_(self, factor: Factor, weights: Tensor, linear: LinearConditional) -> None:
        """Add to the weights of all outputs what makes the logarithms of scales follow the parents."""
        for parent, matrix in linear.log_scale.items():
            columns = list(self.columns[parent])
            for output, row in zip(factor.log_scale_outputs, matrix.to(weights), strict=True):
                weights[output, columns] += row

    def _take_basis_(
        self, site: str, linear: LinearConditional, *, fused: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let a vector be learned in the basis of a conditional; return that in it, with weights for all inputs.

        With a conditional for each element of plates, the basis is that of their mean.
        """
        like, size = self.shift, self.factors[site].size
        joint = like.new_zeros(*linear.loc.shape[:-1], size, self.num_columns)
        for parent, matrix in linear.weights.items():
            joint[..., list(self.columns[parent])] = matrix.to(joint)
        parts = joint, linear.loc.to(joint), linear.scale_tril.to(joint)
        if site not in self._basis_of:
            return parts
        tril = in_float64(linear.scale_tril)
        root = tril.reshape(-1, size, size).mean(0)
        if fused:
            root = _beside_a_prior(root)
        self.get_buffer(self._basis_of[site]).copy_(root)
        together = torch.cat([in_float64(joint), in_float64(linear.loc).unsqueeze(-1), tril], -1)
        found = torch.linalg.solve_triangular(root.expand_as(tril), together, upper=False).to(joint)
        return found[..., : self.num_columns], found[..., self.num_columns], found[..., -size:]

    def _set_rows_(self, site: str, weights: Tensor, biases: Tensor, units: Tensor | None = None) -> None:
        """Make the outputs of one site linear: ``biases + weights @ inputs``, with columns for all inputs."""
        number = self.outputs[site].stop - self.outputs[site].start
        if site in self._constants_of:
            self._constants(site).set_(slice(None), biases[number:])
            if units is not None:
                self._constants(site).unit.copy_(units[number:])
        units = None if units is None else units[:number] * self._share_of_network(site)
        weights = weights[:number, : self.num_inputs]
        self.network.set_linear_(self.outputs[site], weights, biases[:number], units)
        if self.table is not None and site in self._table_columns:
            self.table.set_(self._table_columns[site], 0.0)
        if site in self._map_of:
            element_map: Any = self.maps[self._map_of[site][0]]
            element_map.rows.set_(slice(None), 0.0)
        self._share_unit_(site)

    def _share_of_network(self, site: str) -> float:
        """Return the units of the network in those of elements with parameters of their own, which it moves at once.

        All of them together then cost what one does.
        """
        if self.table is None or site not in self._table_columns:
            return 1.0
        return math.prod(self.table.sizes.values()) ** -0.5

    def _constants(self, site: str) -> ElementTable:
        """Return the outputs of a site that depend on nothing."""
        module = self.constants[self._constants_of[site]]
        assert isinstance(module, ElementTable)
        return module

    def _share_unit_(self, site: str) -> None:
        """Hand the units of a site's outputs on to its per-element parameters and maps."""
        if self.network.units is None:
            return
        unit = self.network.units.unit[self.outputs[site]] / self._share_of_network(site)
        if site in self._constants_of and not self.factors[site].shares_constants:
            unit = torch.cat([unit, self._constants(site).unit])
        if self.table is not None and site in self._table_columns:
            self.table.unit[self._table_columns[site]] = unit
        if site in self._map_of:
            element_map: Any = self.maps[self._map_of[site][0]]
            element_map.set_unit_(unit)

    def _set_maps_(
        self, site: str, factor: Factor, linear: LinearConditional, *, fused: bool = False
    ) -> bool:
        per_element = site in self._table_columns
        of_classes = isinstance(factor, DiscreteFactor)
        cannot = of_classes or (fused and not factor.can_fuse)
        if cannot or not (per_element or site in self._map_of):
            return False
        inputs: list[int] = []
        element_map: ElementMap | None = None
        if site in self._map_of:
            key, inputs = self._map_of[site]
            element_map = self.maps[key]  # type: ignore[assignment]
        own: Any = self.table.table if self.table is not None and per_element else element_map
        like: Tensor = own.rows.table if isinstance(own, ElementMap) else own
        joint, locs, trils = (part.to(like) for part in self._take_basis_(site, linear, fused=fused))
        starts = [
            (factor.fused_start if fused else factor.linear_start)(w[:, inputs], loc, tril)
            for w, loc, tril in zip(joint, locs, trils, strict=True)
        ]
        slopes, offsets = (torch.stack(parts) for parts in zip(*starts, strict=True))
        shared = torch.zeros(factor.num_outputs, self.num_columns).to(like)
        shared[:, inputs] = slopes.mean(0)
        tril = trils.mean(0)
        units = factor.natural_units_beside_prior(tril) if fused else factor.natural_units(tril)
        self.set_fusing_(site, fused)
        self._set_reference_(site, False)
        self._set_rows_(site, shared, offsets.mean(0), units)
        varying = self._num_varying(factor)
        off_slopes = (slopes - slopes.mean(0))[:, :varying]
        off = (offsets - offsets.mean(0))[:, :varying]
        if self.table is not None and per_element:
            part = self.table.table[..., self._table_columns[site]]
            part.copy_(off.reshape(part.shape))
        if element_map is not None:
            element_map.set_(off_slopes, None if per_element else off)
        return True

    @torch.no_grad()
    def set_elements_(self, site: str, locs: Tensor, scale_tril: Tensor) -> bool:
        """See :meth:`Conditionals.set_elements_`."""
        if self.table is None or site not in self._table_columns:
            if site not in self.block.per_element:
                return False
            self.set_linear_(
                site, LinearConditional({}, locs.reshape(-1, self.factors[site].size)[0], scale_tril)
            )
            return True
        factor, like = self.factors[site], self.table.table
        flat = locs.reshape(-1, factor.size)
        self.set_linear_(site, LinearConditional({}, flat.mean(0), scale_tril))
        each = LinearConditional({}, flat, scale_tril.expand(len(flat), -1, -1))
        biases = torch.stack(
            [factor.linear_start(*one)[1] for one in zip(*self._take_basis_(site, each), strict=True)]
        )
        off = (biases - biases.mean(0)).to(like)[:, : self._num_varying(factor)]
        like[..., self._table_columns[site]] = off.reshape(*locs.shape[:-1], -1)
        return True

    @torch.no_grad()
    def regress_(self, site: str, rows: Tensor, moments: Moments) -> None:
        """See :meth:`Conditionals.regress_`; factors that fit themselves to samples do so."""
        inputs, own = self.inputs_of(site), list(self.columns[site])
        factor = self.factors[site]
        if isinstance(factor, BandedNormalFactor):
            fit = regress_chain(rows, inputs, own, self.element_columns[site], factor)
            self.set_linear_(site, self.linear_of(site, fit))
            return
        by_moments = type(factor).start_from_samples is Factor.start_from_samples  # as most do
        fitted = None if by_moments else factor.start_from_samples(rows[:, inputs], rows[:, own])
        if fitted is None:
            super().regress_(site, rows, moments)
            if factor.size == 1 and factor.log_scale_outputs and site not in self.element_columns:
                self._follow_scales_(site, rows)
            return
        weights = rows.new_zeros(factor.num_outputs, self.num_columns)
        weights[:, inputs] = fitted[0]
        self._set_rows_(site, weights, fitted[1])

    def _follow_scales_(self, site: str, rows: Tensor) -> None:
        """Let the scale of a number follow sites that set scales in the model, where held-out rows are likelier so."""
        parents = [name for name in self.block.parents[site] if name in self.block.scales]
        parents = [name for name in parents if len(self.columns.get(name, ())) == 1]
        inputs = self.inputs_of(site)
        if not parents or len(inputs) > MOST_WITH_SCALES:
            return
        of_scales = [inputs.index(self.columns[name].start) for name in parents]
        found = regression_with_scales(rows[:, inputs], rows[:, self.columns[site].start], of_scales)
        if found is None:
            return
        fit, slopes = found
        linear, log_scale, tril = self.linear_of(site, fit), {}, fit.scale_tril
        for name, slope in zip(parents, slopes, strict=True):
            unit = slope.new_ones(())
            if name in self.block.parents:  # a site of the block
                shift, scale = (part.to(slope) for part in self.output_units(name))
                input_shift, input_scale = (part.to(slope) for part in self.input_units(name))
                unit = (input_scale / scale).squeeze()
                tril = tril * (slope * (input_shift - shift) / scale).exp()
            log_scale[name] = (slope * unit).reshape(1, 1)
        self.set_linear_(site, replace(linear, log_scale=log_scale, scale_tril=tril))

    @torch.no_grad()
    def add_to_outputs_(self, site: str, amounts: Tensor) -> None:
        """Add constants to the outputs of a site that the network gives.

        Args:
            site: The site.
            amounts: One for each output.
        """
        for output, amount in enumerate(amounts.tolist()):
            self.network.add_(self.outputs[site].start + output, amount)

    def serve_one_(self, one: bool, *, exact: bool = False) -> None:
        """See :meth:`Conditionals.serve_one_`."""
        self._starts_exact = exact
        for factor in self.factors.values():
            factor.serves_one = one

    @torch.no_grad()
    def limit_units_(self, site: str, first: int, most: float) -> None:
        """Let a step of training move the outputs of a site from one on by no more than a unit.

        Args:
            site: The site.
            first: The first of these outputs.
            most: The unit.
        """
        if self.network.units is None:
            return
        rows = self.outputs[site]
        of_network = self.network.units.unit[rows]
        of_network[first:].clamp_(max=most * self._share_of_network(site))
        if site in self._constants_of:
            self._constants(site).unit[max(0, first - len(of_network)) :].clamp_(max=most)
        self._share_unit_(site)

    @torch.no_grad()
    def narrow_elements_(self, factor: float, *, fitted: bool = True) -> None:
        """See :meth:`Conditionals.narrow_elements_`."""
        for site in self.block.per_element:
            if self.fuses(site) and (fitted or self.block.plates):
                continue
            rows, own = self.outputs[site], self.factors[site]
            for output in own.log_scale_outputs:
                if self.table is not None and output < self._num_varying(own):
                    self.table.table[..., self._table_columns[site].start + output] += math.log(factor)
                elif rows.start + output < rows.stop:
                    self.network.add_(rows.start + output, math.log(factor))
                else:
                    self._constants(site).table[..., output + rows.start - rows.stop] += math.log(factor)

    def keep_rows_(self, plates: Mapping[str, PlateState], context: Tensor) -> None:
        """See :meth:`Conditionals.keep_rows_`."""
        keep_rows_(self.maps, self._map_of, plates, context)

    def leave_out_maps_(self, site: str) -> None:
        """See :meth:`Conditionals.leave_out_maps_`."""
        if site in self._map_of:
            del self.maps[self._map_of.pop(site)[0]]

    @torch.no_grad()
    def start_couplings_(
        self,
        plates: Mapping[str, PlateState],
        context: Tensor | None = None,
        values: Mapping[str, Tensor] | None = None,
        shares: Mapping[str, float] = MappingProxyType({}),
        priors: Mapping[str, tuple[SitePrior, Tensor]] = MappingProxyType({}),
    ) -> None:
        """See :meth:`Conditionals.start_couplings_`.

        Low-rank parts start from samples, or at small random columns; parameters for each pair from samples, if there
        are regressions of the elements, or at zero.
        """
        if self.network.skip is None:
            return
        known = (context, values) if context is not None and values is not None else None
        shared = {} if known is None else self._coupled(*known)
        of_priors = {site: prior for site, (prior, _) in priors.items()}
        of_pairs = any(self._has_pairs(site) for site in self._coupling_of)
        of_elements = self._coupled(*known, plates, of_priors) if known is not None and of_pairs else {}
        for site, key in self._coupling_of.items():
            terms, factor = self.couplings[key], self.factors[site]
            assert isinstance(terms, CouplingTerms)
            assert isinstance(factor, CoupledFactor)
            if self._has_pairs(site):
                if values is not None and site in of_elements:
                    if context is not None and self.fuses(site) and site in priors:
                        inputs = self._inputs_of_all(site, context, values, of_elements[site])
                        self._start_factor_pairs_(site, terms, of_elements[site], *priors[site], *inputs)
                    else:
                        self._start_pairs_(site, terms, of_elements[site], values[site])
                continue
            size = factor.size
            narrow, wide, inner = torch.zeros(size, size), torch.zeros(size, size), None
            if self.fuses(site):
                share = shares.get(site, 0.0)
                (narrow if share < 0 else wide)[0, 0] = abs(share) ** 0.5
            elif values is not None and site in shared:
                dims = [plates[name].dim - 1 for name in terms.names]
                residual = (values[site] - shared[site].mean) / self.output_units(site)[1]
                alone, inner, narrow, wide = exchangeable_start(residual, dims)
                widths = [each.diagonal() for each in (alone, inner)]
                rows, columns = torch.tril_indices(size, size, -1)
                before, after = ((alone / widths[0][:, None]), (inner / widths[1][:, None]))
                more = [(widths[1] / widths[0]).log(), (after - before)[rows, columns]]
                self.add_to_outputs_(site, torch.cat([torch.zeros(size).to(inner), *more]))
            if inner is None and size == 1 and self.network.units is not None:
                inner = self.network.units.bias[self.outputs[site].start + 1].exp().reshape(1, 1)
            self._start_columns_(site, narrow, wide, terms.number, inner)

    def _has_pairs(self, site: str) -> bool:
        """Whether a site that is drawn jointly has a parameter for each pair of elements."""
        factor = self.factors[site]
        return isinstance(factor, CoupledFactor) and factor.rank == 0

    def _start_columns_(
        self, site: str, narrow: Tensor, wide: Tensor, number: int, inner: Tensor | None
    ) -> None:
        """Let the columns of U and V be near zero but for some; what all elements share may be narrow.

        In a direction in which U has a column of length u the mean of elements has the variance 1 / (1 + N u²), and
        columns of V add N of their squares to it.

        Args:
            site: The site.
            narrow: Columns of U, orthogonal, ``(size, size)``; as many count as there are.
            wide: Columns of V.
            number: The number of elements.
            inner: The root of the covariance of an element but for these columns, if it is known.
        """
        factor, rows = self.factors[site], self.outputs[site]
        assert isinstance(factor, CoupledFactor)
        assert self.network.skip is not None
        like = self.network.skip.weight
        size, count = factor.size, min(factor.size, factor.rank)
        narrow, wide = narrow[:, :count].to(like), wide[:, :count].to(like)
        lengths = narrow.norm(dim=0)
        least = (1.0 + number * lengths.max() ** 2) ** -0.5  # of the mean's scale
        columns = WAKE * torch.randn(size, 2, factor.rank, dtype=like.dtype, device=like.device)
        units = torch.ones_like(columns)
        columns[:, 1] *= least
        units[:, 1] *= least
        columns[..., :count] += torch.stack([narrow, wide], 1)
        units[:, 0, :count] = torch.maximum(units[:, 0, :count], narrow.abs())
        at = slice(rows.start + factor.num_inner, rows.stop)
        weights = columns.new_zeros(columns.numel(), self.num_inputs)
        self.network.set_linear_(at, weights, columns.flatten(), units.flatten())
        own = self.network.units
        if own is not None and inner is not None:  # locations move all elements at once
            inverse = torch.linalg.inv(inner.to(like))
            precision = inverse.mT @ (torch.eye(size).to(like) + number * narrow @ narrow.mT) @ inverse
            locs = slice(rows.start, rows.start + size)
            own.unit[locs] = torch.minimum(own.unit[locs], precision.diagonal().rsqrt())

    def _coupled(
        self,
        context: Tensor,
        values: Mapping[str, Tensor],
        plates: Mapping[str, PlateState] | None = None,
        priors: Mapping[str, SitePrior] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Return the conditionals of the sites that are drawn jointly; with plates, those of their elements.

        Of fused ones it is the factor, without the prior.
        """
        evaluation = self._begin(context, plates, beside_priors=False)
        found: dict[str, Any] = {}
        for level in self.block.levels:
            conditionals = evaluation.next(priors)
            evaluation.accept({site: values[site] for site in level})
            found.update({site: conditionals[site] for site in level if site in self._coupling_of})
        return found

    def _start_pairs_(self, site: str, terms: CouplingTerms, alone: CoupledNormal, values: Tensor) -> None:
        """Let pairs of elements start as noise of independent ones says; not where elements have no regressions."""
        own = self._own_of_pairs(site, values)
        if own is None:
            return
        size = self.factors[site].size
        mixing, log_scales = pairs_start(alone.flat_noise(values))
        terms.set_mixing_(mixing)
        # the elements' own triangular scales, times new widths on the right
        each = in_float64(alone.scale_tril.expand(*values.shape, size)).unbind(-1)
        tril = torch.stack([alone.in_groups(part).mean(1) for part in each], -1).unflatten(-2, (-1, size))
        widths = log_scales.unflatten(-1, (-1, size))
        layout = alone.dims, own.shape[:-1]
        own[..., size : 2 * size] += terms.of_groups(widths.to(own), *layout)
        if size > 1:
            unit = tril / tril.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            rows, columns = torch.tril_indices(size, size, -1)
            ratio = (widths[..., columns] - widths[..., rows]).exp() - 1.0
            more = terms.of_groups((ratio * unit[..., rows, columns]).to(own), *layout)
            own[..., 2 * size :] += more
        root = (tril @ (log_scales.exp().unsqueeze(-1) * mixing).unflatten(-2, (-1, size))).flatten(-3, -2)
        root = root / self.output_units(site)[1].repeat(root.shape[-1] // size).unsqueeze(-1)
        self._narrow_units_(site, terms, root, torch.cholesky_inverse(root), root @ root.mT)

    def _own_of_pairs(self, site: str, values: Tensor) -> Tensor | None:
        """Return the rows of the elements' own parameters; None where elements have no regressions."""
        columns = self._table_columns.get(site)
        factor = self.factors[site]
        assert isinstance(factor, CoupledFactor)
        if self._num_varying(factor) < factor.num_inner:
            return None
        if self.table is not None and columns is not None:
            own = every = self.table.table[..., columns]
        elif site in self._map_of and self.maps[self._map_of[site][0]].offset:
            of_map: Any = self.maps[self._map_of[site][0]]
            every = of_map.rows.table.unflatten(-1, (of_map.num_outputs, -1))
            own = every[..., -1]
        else:
            return None
        return own if bool(every.any()) and values[0].numel() == own[..., 0].numel() * factor.size else None

    def _start_factor_pairs_(
        self,
        site: str,
        terms: CouplingTerms,
        alone: CoupledNormal,
        prior: SitePrior,
        value: Tensor,
        inputs: Tensor,
        known: list[int],
    ) -> None:
        """Let elements have the joint factor that, beside their priors, fits draws; not without regressions of them.

        Args:
            site: The site.
            terms: Its joint normal.
            alone: The factors of the elements alone.
            prior: The priors in draws.
            value: The site in their coordinate.
            inputs: The inputs of the elements' maps that are the same for all elements, ``(groups, draws, inputs)``.
            known: Which ones they are.
        """
        own = self._own_of_pairs(site, value)
        if own is None:
            return
        draws = BesidePriors.of(alone, value, prior, inputs)
        joint = factor_pairs_start(draws)
        if joint is None:
            return
        layout, scale = (alone.dims, own.shape[:-1]), self.fused_units(site)[1]
        diagonal = joint.root.diagonal(dim1=-2, dim2=-1)
        terms.set_mixing_(joint.root / diagonal.unsqueeze(-1))
        log_scales = diagonal.log() - _mean_stretch(alone, value)
        own[..., 0] += terms.of_groups(joint.shift.to(own) / scale, *layout)
        own[..., 1] += terms.of_groups(log_scales.to(own), *layout)
        if known:
            of_map: Any = self.maps[self._map_of[site][0]]
            of_loc = of_map.rows.table.unflatten(-1, (of_map.num_outputs, -1))[..., 0, :]
            of_loc[..., known] += terms.of_groups(joint.slopes.to(own) / scale, *layout)
        of_prior = (draws.widths.median(-2).values / scale).pow(-2)
        self._narrow_beside_prior_(site, terms, joint.root / scale, of_prior)

    @torch.no_grad()
    def set_joint_factor_(self, site: str, plates: Mapping[str, PlateState], factor: JointFactor) -> None:
        """See :meth:`Conditionals.set_joint_factor_`."""
        shift, scale = (part.to(factor.loc) for part in self.fused_units(site))
        terms: Any = self.couplings[self._coupling_of[site]] if site in self._coupling_of else None
        dims = [] if terms is None else [plates[name].dim for name in terms.names]
        each = factor.in_groups(dims)
        roots = torch.stack([torch.linalg.cholesky(own.covariance) for own in each]) / scale
        widths = roots.diagonal(dim1=-2, dim2=-1)
        scales = widths if terms is None else terms.of_groups(widths, dims, factor.shape)
        locs = (factor.loc - shift) / scale
        slopes = {name: (matrix / scale).unsqueeze(-2) for name, matrix in factor.slopes.items()}
        if not self.set_fused_(site, LinearConditional(slopes, locs.unsqueeze(-1), scales.reshape(-1, 1, 1))):
            raise GraphflowsError(f"{site!r} has no parameters for each of its elements.")
        if terms is not None:
            terms.set_mixing_(roots / widths.unsqueeze(-1))
            of_prior = torch.stack([own.prior_precision for own in each]) * scale.square()
            self._narrow_beside_prior_(site, terms, roots, of_prior)

    def _narrow_beside_prior_(self, site: str, terms: CouplingTerms, root: Tensor, of_prior: Tensor) -> None:
        """Let numbers beside priors move little in a step of training, see :meth:`_narrow_units_`.

        Args:
            site: The site.
            terms: Its joint normal.
            root: The root of the factor's covariance, in standardised units, ``(groups, n, n)``.
            of_prior: The precisions of their priors, ``(groups, n)``.
        """
        precision = torch.cholesky_inverse(root)
        covariance = torch.linalg.inv(precision + of_prior.diag_embed())
        self._narrow_units_(site, terms, root, precision @ covariance @ precision, covariance)

    def _narrow_units_(
        self, site: str, terms: CouplingTerms, root: Tensor, precision: Tensor, covariance: Tensor
    ) -> None:
        """Let numbers that are narrow given each other move by no more than that in a step of training.

        Args:
            site: The site.
            terms: Its joint normal, with a parameter for each pair.
            root: The root of the covariance that it has without a prior, in standardised units, ``(groups, n, n)``.
            precision: By how much moves of locations count, half of their squares in nats.
            covariance: That of the numbers.
        """
        own, table = self.network.units, terms.table
        if own is None or table is None:
            return
        row, size = self.outputs[site].start, self.factors[site].size

        def of_elements(numbers: Tensor) -> Tensor:
            return numbers.unflatten(-1, (-1, size))

        alone, variances = precision.diagonal(dim1=-2, dim2=-1), root.square().sum(-1)
        spread = of_elements(covariance.diagonal(dim1=-2, dim2=-1)).mean((0, 1)).sqrt()
        step = torch.maximum(of_elements(alone).mean((0, 1)).rsqrt(), LEAST_SHARE * spread).to(own.unit)
        locs, others = slice(row, row + size), slice(row + size, row + self._num_varying(self.factors[site]))
        own.unit[locs] = torch.minimum(own.unit[locs], step * self._share_of_network(site))
        own.unit[others] *= (alone * variances).mean().rsqrt().clamp(LEAST_SHARE, 1.0).to(own.unit)
        self._share_unit_(site)
        together = precision.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).sum((0, 1, 3)).diagonal()
        own.unit[locs] = torch.minimum(own.unit[locs], together.rsqrt().to(own.unit))  # all may move at once
        rows = torch.tril_indices(terms.length, terms.length, -1)[0]
        steps = (alone * root.diagonal(dim1=-2, dim2=-1).square()).mean(0).rsqrt().clamp(LEAST_SHARE, 1.0)
        table.unit.copy_(terms.length**-0.75 * steps[rows])

    def _inputs_of_all(
        self, site: str, context: Tensor, values: Mapping[str, Tensor], alone: CoupledNormal
    ) -> tuple[Tensor, list[int]]:
        """Return those inputs of a site's maps that vary and are the same for all numbers that are drawn jointly.

        Args:
            site: The site.
            context: Features of the context in draws.
            values: Vectors of the sites in draws.
            alone: The factors of the numbers alone.

        Returns:
            The inputs, ``(groups, draws, inputs)``, and which ones they are.
        """
        batch = values[site].shape[:-1]
        if site not in self._map_of:
            return alone.in_groups(values[site])[..., :0], []
        parts = [context]
        for each in self.block.sites:
            shift, scale = self.input_units(each)
            parts.append((values[each] - shift) / scale)
        joint = columns_of_map(concatenate(parts), self._map_of[site][1])
        columns = [alone.in_groups(part) for part in joint.expand(*batch, -1).split(1, -1)]
        known = [
            i
            for i, column in enumerate(columns)
            if bool((column - column[..., :1]).abs().amax() < SAME) and bool(varies(column[..., 0].mT).any())
        ]
        inputs = [columns[i][..., :1] for i in known]
        return torch.cat(inputs, -1) if inputs else columns[0][..., :0], known

    # ---------------------------------------------------------------- evaluation

    def _in_basis(self, site: str, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return units of which the scale is a matrix where a vector has a basis of its own."""
        if site not in self._basis_of:
            return shift, scale
        basis = self.get_buffer(self._basis_of[site])
        if CAPTURING.get() or scale.is_inference() or basis.is_inference():
            return shift, scale.unsqueeze(-1) * basis
        key, versions = (site, id(scale)), (scale._version, basis._version)
        kept = self._kept_bases.get(key)
        if kept is None or kept[0] is not scale or kept[1] is not basis or kept[2] != versions:
            kept = self._kept_bases[key] = scale, basis, versions, scale.unsqueeze(-1) * basis
        return shift, kept[3]

    def begin(self, context: Tensor, plates: Mapping[str, PlateState] | None = None) -> "MaskedPass":
        """See :meth:`Conditionals.begin`."""
        return self._begin(context, plates)

    def _begin(
        self, context: Tensor, plates: Mapping[str, PlateState] | None, *, beside_priors: bool = True
    ) -> "MaskedPass":
        """Begin a pass; of what is fused and drawn jointly, beside its prior or the factor alone."""
        rows = self.table(plates) if self.table is not None and plates is not None else None
        plates = plates if self._map_of or self._coupling_of else None
        return MaskedPass(self, context, rows, plates, beside_priors=beside_priors)


def _mean_stretch(joint: CoupledNormal, values: Tensor) -> Tensor:
    """Return the mean logarithm of what each number is stretched by in draws, ``(groups, n)``."""
    return in_float64(joint.in_groups(joint._log_stretch(values.shape).unsqueeze(-1))).mean(1)


def _beside_a_prior(scale_tril: Tensor) -> Tensor:
    """Return the root of the covariance of a factor, given by that of its own, times a prior of scale one."""
    root = inverse_of_lower(scale_tril)  # of the factor's precision
    none = torch.zeros_like(root[0])
    return fuse_matrix(none, torch.eye(len(none)).to(root), none, root)[1]


def _in_type(prior: SitePrior, dtype: torch.dtype) -> SitePrior:
    """Return a prior in the type of the parameters: constants of a model are in the default type."""
    if prior.loc.dtype == dtype:
        return prior
    fixed = None if prior.fixed is None else prior.fixed.map(lambda each: each.to(dtype))
    return replace(prior.map(lambda each: each.to(dtype)), fixed=fixed)


def _log_prob_of_draw(fn: Any, drawn_from: Any, flat: Tensor, value: Tensor) -> Tensor:
    """Return a log-density with its first derivatives, by way of the noise behind the draw where that is possible.

    Args:
        fn: The distribution.
        drawn_from: The same, as it was drawn from.
        flat: The vectors drawn.
        value: The same numbers, with gradients or without.
    """
    if hasattr(fn, "log_prob_near") and hasattr(drawn_from, "noise_behind"):
        noise = drawn_from.noise_behind(flat)
        if noise is not None:
            near: Tensor = fn.log_prob_near(noise.detach(), value)
            return near
    log_prob: Tensor = fn.log_prob(value)
    return log_prob


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """Let a module be a function of its inputs alone."""
    kept = [(each._parameters, dict(each._parameters)) for each in module.modules()]
    try:
        for parameters, before in kept:
            for name, value in before.items():
                parameters[name] = None if value is None else value.detach()  # type: ignore[assignment]
        yield
    finally:
        for parameters, before in kept:
            parameters.update(before)


class MaskedPass(Pass):
    """One pass of :class:`MaskedConditionals`."""

    def __init__(
        self,
        conditionals: MaskedConditionals,
        context: Tensor,
        rows: Tensor | None,
        plates: Mapping[str, PlateState] | None,
        network: LevelEvaluation | None = None,
        *,
        beside_priors: bool = True,
    ) -> None:
        self._module = conditionals
        self._context = context
        self.fixed: dict[str, dist.TorchDistribution] = {}
        self._beside_priors = beside_priors  # or the factors of what is drawn jointly alone
        self._rows = rows
        self._plates = plates  # where elements have maps of their own, or are drawn jointly
        self._known: list[Tensor] = []
        self._network: LevelEvaluation = conditionals.network.start() if network is None else network
        self._level = 0
        self._new: Tensor = context
        # Of each level the priors, those of other levels among them, and the values; where gradients are followed.
        self._drawn: list[tuple[Mapping[str, SitePrior], Mapping[str, Tensor]]] = []
        self._priors: Mapping[str, SitePrior] = {}
        self._at_draws: dict[str, dist.TorchDistribution] = {}
        self._by_draws: dict[str, dist.TorchDistribution] = {}

    def next(self, priors: Mapping[str, SitePrior] | None = None) -> dict[str, dist.TorchDistribution]:
        """See :meth:`Pass.next`."""
        module = self._module
        self._priors = priors or {}
        level = module.block.levels[self._level]
        outputs = self._network.flat_step(self._new if self._new.shape[-1] else None)
        if self._plates is not None:
            self._known.append(self._new)
        chosen = [site for site in level if site in priors and module.fuses(site)] if priors else []
        fused = {site: _in_type(priors[site], outputs.dtype) for site in chosen} if priors else {}
        if module.block.summed:
            fused = {s: prior if module.sums(s) else prior.with_evidence(None) for s, prior in fused.items()}
        if self._level in module._scalar_levels and len(fused) in (0, len(level)) and self._plates is None:
            return self._scalars(level, outputs, fused)
        start = module.outputs[level[0]].start
        result: dict[str, dist.TorchDistribution] = {}
        for site in level:
            rows, part = module.outputs[site], module._parts[site]
            own = outputs[..., rows.start - start : rows.stop - start]
            factor = module.factors[site]
            constants = module._constants(site)({}) if site in module._constants_of else None
            shares = factor.shares_constants or self._is_plain(site, fused)
            if constants is not None and not shares:
                own = torch.cat([own, constants.expand(*own.shape[:-1], -1)], -1)
            if self._rows is not None and site in module._table_columns:
                own = own + self._rows[..., module._table_columns[site]]
            if self._plates is not None and site in module._map_of:
                own = own + self._own_map(site, self._plates)
            if site in fused:
                units = module._in_basis(site, *module._units("fused_", part))
                if site in module._referring:
                    locs = factor_locations(own[..., :1], own[..., 1:2], module.reference[part])
                    own = torch.cat([locs, own[..., 1:]], -1)
                result[site] = self._fused(site, own, units, fused[site])
                fixed = fused[site].fixed
                if fixed is not None:
                    self.fixed[site] = self._fused(site, own, units, fixed)
                continue
            units = module._in_basis(site, *module._units("", part))
            if self._plates is not None and site in module._coupling_of:
                terms: Any = module.couplings[module._coupling_of[site]]
                result[site] = terms.distribution(own, units, self._plates)
            elif constants is not None and shares:
                result[site] = factor.distribution_with(own, constants, *units)
            else:
                result[site] = factor.distribution(own, *units)
        return result

    def score(self, site: str, drawn_from: Any, flat: Tensor) -> Tensor | None:
        """See :meth:`Pass.score`. All conditionals are computed at once when one is first asked for."""
        if site not in self._at_draws:
            self._find_at_draws()
        found: Any = self._at_draws.get(site)
        return None if found is None else _log_prob_of_draw(found, drawn_from, flat, flat.detach())

    def by_draws(self, site: str, drawn_from: Any, flat: Tensor) -> Tensor | None:
        """See :meth:`Pass.by_draws`."""
        if not self._by_draws:
            with _without_gradients(self._module):
                rows = None if self._rows is None else self._rows.detach()
                again = MaskedPass(self._module, self._context, rows, self._plates)
                for given, values in self._drawn:
                    chosen = {name: given[name] for name in values if name in given}
                    priors = {name: replace(prior, fixed=None) for name, prior in chosen.items()}
                    self._by_draws.update(again.next(priors))
                    again.accept(values)
        found: Any = self._by_draws.get(site)
        return None if found is None else _log_prob_of_draw(found, drawn_from, flat, flat)

    def _find_at_draws(self) -> None:
        """Find the conditionals at the values of this pass, with gradients for parameters alone."""
        module, context = self._module, self._context.detach()
        fixed = [{name: value.detach() for name, value in values.items()} for _, values in self._drawn]
        inputs = [
            self._inputs_of(i, values) for i, values in enumerate(fixed[: len(module.block.levels) - 1])
        ]
        network = self._network.again([context if context.shape[-1] else None, *inputs])
        again = MaskedPass(module, context, self._rows, self._plates, network)
        for (given, _), values in zip(self._drawn, fixed, strict=True):
            chosen = {name: given[name] for name in values if name in given}
            priors = {name: replace(prior.map(torch.detach), fixed=None) for name, prior in chosen.items()}
            self._at_draws.update(again.next(priors))
            again.accept(values)

    def _fused(
        self, site: str, outputs: Tensor, units: tuple[Tensor, Tensor], prior: SitePrior
    ) -> dist.TorchDistribution:
        """Return the conditional of a site that is fused, drawn jointly where its plates are known."""
        module = self._module
        if self._plates is not None and site in module._coupling_of:
            terms: Any = module.couplings[module._coupling_of[site]]
            beside = prior if self._beside_priors else None
            joint: dist.TorchDistribution = terms.distribution(outputs, units, self._plates, beside)
            return joint
        return module.factors[site].fused(outputs, *units, prior)

    def _is_plain(self, site: str, fused: Collection[str]) -> bool:
        """Whether the network and the constants alone make a site's conditional."""
        module = self._module
        has_rows = self._rows is not None and site in module._table_columns
        has_more = self._plates is not None and (site in module._map_of or site in module._coupling_of)
        return not (has_rows or has_more or site in fused)

    def _scalars(
        self, level: Sequence[str], outputs: Tensor, fused: Mapping[str, SitePrior]
    ) -> dict[str, dist.TorchDistribution]:
        """Return the conditionals of a level of scalar normals, by one computation for all."""
        module, part = self._module, self._part_of(level)
        if self._rows is not None:
            outputs = outputs + self._rows_of(level, self._rows)
        if not fused:
            normals = scalar_normals(outputs, *module._units("", part))
            return dict(zip(level, normals, strict=True))
        priors = [fused[site] for site in level]
        shift, scale = module._units("fused_", part)
        reference = None if module._referring.isdisjoint(level) else module.reference[part]
        if any(prior.fixed is not None for prior in priors):
            fixed = [prior.fixed or prior for prior in priors]
            normals = fused_scalar_normals(outputs, shift, scale, fixed, reference)
            self.fixed.update(zip(level, normals, strict=True))
        normals = fused_scalar_normals(outputs, shift, scale, priors, reference)
        return dict(zip(level, normals, strict=True))

    def _rows_of(self, level: Sequence[str], table: Tensor) -> Tensor:
        """Return what elements add to the outputs of a level of scalar normals; zero for sites without."""
        columns = [self._module._table_columns.get(site) for site in level]
        first, last = columns[0], columns[-1]
        if first is not None and last is not None and last.stop - first.start == 2 * len(level):
            return table[..., first.start : last.stop]
        rows = [table.new_zeros(2) if c is None else table[..., c] for c in columns]
        shape = np.broadcast_shapes(*(row.shape[:-1] for row in rows))
        return torch.cat([row.expand(*shape, 2) for row in rows], -1)

    def _part_of(self, level: Sequence[str]) -> slice:
        parts = self._module._parts
        return slice(parts[level[0]].start, parts[level[-1]].stop)

    def _own_map(self, site: str, plates: Mapping[str, PlateState]) -> Tensor:
        key, columns = self._module._map_of[site]
        shape = np.broadcast_shapes(*(part.shape[:-1] for part in self._known))
        known = torch.cat([part.expand(*shape, part.shape[-1]) for part in self._known], -1)
        element_map: Any = self._module.maps[key]
        contribution: Tensor = element_map(plates, columns_of_map(known, columns))
        return contribution

    def accept(self, values: Mapping[str, Tensor]) -> None:
        """See :meth:`Pass.accept`."""
        if torch.is_grad_enabled():
            self._drawn.append((self._priors, values))
        self._level += 1
        if self._level == len(self._module.block.levels):
            return
        self._new = self._inputs_of(self._level - 1, values)

    def _inputs_of(self, number: int, values: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors of a level as inputs of later ones."""
        level = self._module.block.levels[number]
        raw = [values[site] for site in level]
        if any(value.shape != raw[0].shape for value in raw):
            shape = np.broadcast_shapes(*(value.shape[:-1] for value in raw))
            raw = [
                value if value.shape[:-1] == shape else value.expand(*shape, value.shape[-1]) for value in raw
            ]
        flat = torch.cat(raw, -1) if len(raw) > 1 else raw[0]
        shift, scale = self._module._units("input_", self._part_of(level))
        return (flat - shift) / scale
