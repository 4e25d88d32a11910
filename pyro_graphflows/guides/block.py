"""A block of a guide at work: what its sites look at, turned into features, their conditionals, and its parameters.

Data, sampled values of other blocks and summaries of other plates become one vector of standardised features
(:class:`BlockInputs`), from which the conditionals of the block's family go on
(:mod:`~pyro_graphflows.guides.conditionals`). The parameters of all blocks of a guide are shown to Pyro at each call,
under names that the guide takes for itself (:class:`ShownParameters`).
"""

import copy
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pyro
import torch
from pyro.nn.module import PyroModule, _is_module_local_param_enabled
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_graphflows.capture import CAPTURING, left_unchecked
from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning
from pyro_graphflows.guides.call import Call, PlateState
from pyro_graphflows.guides.conditionals.contract import (
    BlockSpec,
    Family,
    LinearConditional,
    Pass,
)
from pyro_graphflows.guides.conditionals.embedding import Embedding
from pyro_graphflows.guides.conditionals.pooling import (
    POOLS,
    AllElements,
    DeepSet,
    DeepSetPool,
    Elements,
    LookedUp,
    MeansOfLookedUp,
    PoolMember,
    pooling_orders,
)
from pyro_graphflows.guides.conditionals.pooling import Pool as PlainPool
from pyro_graphflows.guides.conditionals.summed import ElementFactors, ElementForm
from pyro_graphflows.guides.fewer_elements import fewer_of, some_elements
from pyro_graphflows.guides.plan import BlockPlan, Summary
from pyro_graphflows.guides.samples import Samples, columns_of, evidence_of, side_by_side, with_depth
from pyro_graphflows.guides.sites import (
    REMEDIES_OF_NAN,
    Evidence,
    FeatureMap,
    InputEncodings,
    JointFactor,
    SitePrior,
    concatenate,
)
from pyro_graphflows.regression import location_and_scale

__all__ = [
    "BlockInputs",
    "GuideBlock",
    "ShownParameters",
    "make_inputs",
]

MOST_EMBEDDED_ROWS = 20_000  # of joint samples from which an embedding is found

Pool = PlainPool | Embedding


class BlockInputs(nn.Module):
    """From a call and the values sampled so far to the features of a block's context.

    Args:
        maps: For each context node, the map from its values to features.
        pools: The summaries among them.
        encodings: How conditioning values are written.

    Attributes:
        names: The context nodes.
        sizes: The number of features of each.
        features: The map of all of them.
        learned: Which features depend on parameters.
        of_sizes: The numbers of the features that depend on numbers of elements alone.
        of_variances: The same of logarithms of variances.
    """

    learned: Tensor

    def __init__(
        self, maps: Mapping[str, FeatureMap], pools: Mapping[str, Pool], encodings: InputEncodings
    ) -> None:
        super().__init__()
        self.names = tuple(maps)
        self.sizes = {name: len(each.shift) for name, each in maps.items()}
        self.features = FeatureMap.join(list(maps.values()))
        self.pools = nn.ModuleDict({str(self.names.index(name)): pool for name, pool in pools.items()})
        self.encodings = encodings
        learned = torch.zeros(sum(self.sizes.values()), dtype=torch.bool)
        start = 0
        of_kind: dict[str, list[int]] = {"of_sizes": [], "of_variances": []}
        for name, size in self.sizes.items():
            of_pool = getattr(pools.get(name), "learned", None)
            if of_pool is not None:
                learned[start : start + size] = torch.tensor(of_pool)
            for kind, columns in of_kind.items():
                columns += [start + i for i, each in enumerate(getattr(pools.get(name), kind, ())) if each]
            start += size
        self.of_sizes, self.of_variances = (tuple(columns) for columns in of_kind.values())
        self.register_buffer("learned", learned, persistent=False)

    def to_plain(self) -> dict[str, Any]:
        """Return what the inputs are made from."""
        return {
            "kinds": tuple(kind for kind, _ in self.features.kinds),  # one for each name
            "sizes": self.sizes,
            "pools": {
                name: (type(pool).__name__, pool.to_plain())
                for name in self.names
                if (pool := self.pool(name)) is not None
            },
            "encodings": self.encodings,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "BlockInputs":
        """Return inputs of the same form, for a state that is loaded."""
        maps = {
            name: FeatureMap.of_kinds([(kind, slice(0, size))])
            for (name, size), kind in zip(plain["sizes"].items(), plain["kinds"], strict=True)
        }
        kinds = {**POOLS, Embedding.__name__: Embedding}
        pools: dict[str, Pool] = {
            name: kinds[kind].from_plain(form) for name, (kind, form) in plain["pools"].items()
        }
        return cls(maps, pools, plain["encodings"])

    def pool(self, name: str) -> Pool | None:
        """Return the summary of a name; None for nodes."""
        pools: Any = self.pools
        key = str(self.names.index(name))
        return pools[key] if key in pools else None  # noqa: SIM401

    def _members(self, name: str) -> list[str]:
        """Return the nodes that a summary is made of; none for nodes."""
        pool: Any = self.pool(name)
        return [] if pool is None else [member.name for member in pool.members]

    def forward(self, call: Call, unconstrained: Mapping[str, Tensor]) -> Tensor:
        """Return the features, ``(*batch, num_features)``.

        Args:
            call: The call.
            unconstrained: The flat vectors of the sites sampled so far.

        Raises:
            GraphflowsError: If a value is not finite, is of a wider type, on another device or of another size than
                at set-up. The message names the node.
        """
        parts = []
        for position, name in enumerate(self.names):
            if str(position) in self.pools:
                pool: Any = self.pools[str(position)]
                values = {m.name: self._flat(m.name, call, unconstrained) for m in pool.members}
                values.update({index: call.values[index] for index in pool.indices})
                parts.append(pool(values, call.plates, call.masks))
            else:
                parts.append(self._flat(name, call, unconstrained))
        flat = concatenate(parts) if parts else self.features.shift
        expected = self.features.shift.shape[0]
        if flat.shape[-1] != expected:
            sizes = ", ".join(f"{n}: {part.shape[-1]}" for n, part in zip(self.names, parts, strict=True))
            raise GraphflowsError(
                f"Expected {expected} conditioning features in all, as when the guide was set up; got {sizes}."
            )
        features: Tensor = self.features(flat)
        if not (features.is_meta or (CAPTURING.get() and left_unchecked(features)) or _all_finite(features)):
            raise self._not_finite(features, call, unconstrained)
        return features

    def of_data(self, call: Call, observed: Collection[str]) -> Tensor | None:
        """Return the features of data alone, ``(*batch, n)``; None if no observed site is among them.

        Values outside of supports give NaN.

        Args:
            call: The call.
            observed: The observed sites.
        """
        parts: dict[int, Tensor] = {}
        read: set[str] = set()
        for position, name in enumerate(self.names):
            pool: Any = self.pool(name)
            nodes = [name] if pool is None else [*self._members(name), *pool.indices]
            if not all(node in call.values for node in nodes):
                continue
            read.update(nodes)
            if pool is None:
                parts[position] = self._flat(name, call, {})
            else:
                values = {member: self._flat(member, call, {}) for member in self._members(name)}
                values.update({index: call.values[index] for index in pool.indices})
                parts[position] = pool(values, call.plates, call.masks)
        if not read.intersection(observed):
            return None
        shape = np.broadcast_shapes(*(part.shape[:-1] for part in parts.values()))
        flat, chosen = [], []
        for position, size in enumerate(self.sizes.values()):
            there = position in parts
            flat.append(
                parts[position].expand(*shape, size) if there else self.features.shift.new_zeros(*shape, size)
            )
            chosen += [there] * size
        features: Tensor = self.features(torch.cat(flat, -1))
        return features[..., torch.tensor(chosen, device=features.device)]

    def elements(self, name: str, call: Call, unconstrained: Mapping[str, Tensor]) -> Elements:
        """Return the elements that a summary is made of.

        Args:
            name: The summary.
            call: The call.
            unconstrained: The flat vectors of the sites sampled so far.
        """
        pool = self.pool(name)
        assert isinstance(pool, DeepSetPool)
        values = {m.name: self._flat(m.name, call, unconstrained) for m in pool.members}
        values.update({index: call.values[index] for index in pool.indices})
        return pool.elements(values, call.plates, call.masks)

    def _not_finite(
        self, features: Tensor, call: Call, unconstrained: Mapping[str, Tensor]
    ) -> GraphflowsError:
        """Say whether data, values of latent sites, or the guide's own parameters are to blame."""
        wrong = ~torch.isfinite(features)
        start, guilty = 0, []
        for name, size in self.sizes.items():
            if bool(wrong[..., start : start + size].any()):
                guilty.append(name)
            start += size
        members = [m for n in guilty for m in (self._members(n) or [n])]
        data = {name: call.values[name] for name in members if name in call.values}
        missing = [n for n, value in data.items() if value.is_floating_point() and not value.isfinite().all()]
        if missing:
            return GraphflowsError(
                f"Expected finite values of the data the guide conditions on; {', '.join(missing)} have NaN or "
                f"infinite entries. {REMEDIES_OF_NAN}"
            )
        latents = [
            name for name in members if name in unconstrained and not unconstrained[name].isfinite().all()
        ]
        if latents:
            return GraphflowsError(
                f"Expected finite values of the latent sites {', '.join(latents)}, which later sites read; some are "
                "NaN or infinite. If they were drawn, the guide's parameters have become too large or NaN in training: "
                "a smaller learning rate or clipped gradients help. If they were given, they are outside the support."
            )
        outside = [name for name in guilty if name in data] + self._outside(guilty, call)
        if outside:
            return GraphflowsError(
                f"Expected values of {', '.join(outside)} in the support of their distributions; some are outside."
            )
        return GraphflowsError(
            f"Expected finite summaries {', '.join(guilty)}; their data are finite, so the guide's parameters have "
            "become too large or NaN in training: a smaller learning rate or clipped gradients help."
        )

    def _outside(self, names: list[str], call: Call) -> list[str]:
        """Return the nodes of summaries with data outside of their supports."""
        found: dict[str, None] = {}
        for name in names:
            pool = self.pool(name)
            pairs = (
                zip(pool.members, pool.maps, strict=True)
                if isinstance(pool, DeepSetPool | AllElements)
                else ()
            )
            for member, feature_map in pairs:
                if member.name in call.values and not member.partly:
                    features = feature_map(self.encodings.flat(member.name, call.values[member.name]))
                    found.update({} if bool(features.isfinite().all()) else {member.name: None})
        return list(found)

    def _flat(self, name: str, call: Call, unconstrained: Mapping[str, Tensor]) -> Tensor:
        """Return the flat vector of a node, and refuse one on another device or of a wider type than the guide."""
        like = self.features.shift
        if name in unconstrained:
            flat = unconstrained[name]
        elif name in call.scores:
            flat = call.scores[name].to(like.dtype)
        else:
            flat = self.encodings.flat(name, call.values[name], like.dtype)
        if flat.device != like.device:
            raise GraphflowsError(
                f"Expected {name!r} on the device of the guide, {like.device}; got {flat.device}. Move one of them: "
                f"guide.to({str(flat.device)!r}), or the data."
            )
        if flat.dtype != like.dtype and torch.promote_types(flat.dtype, like.dtype) != like.dtype:
            raise GraphflowsError(
                f"Expected {name!r} of the type of the guide's parameters, {like.dtype}; got {flat.dtype}. Convert one "
                f"of them: guide.to({flat.dtype}), or the data."
            )
        return flat


class SiteElements(nn.Module):
    """What the elements of a plate say of a site, from a call and the values sampled so far.

    Args:
        above: What else the site looks at.
        factors: The factors of the elements.
    """

    def __init__(self, above: BlockInputs, factors: ElementFactors) -> None:
        super().__init__()
        self.above, self.factors = above, factors

    def to_plain(self) -> dict[str, Any]:
        """Return what it is made from."""
        return {"above": self.above.to_plain(), "factors": self.factors.to_plain()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "SiteElements":
        """Return one of the same form, for a state that is loaded."""
        return cls(BlockInputs.from_plain(plain["above"]), ElementFactors.from_plain(plain["factors"]))

    def forward(self, elements: Elements, call: Call, unconstrained: Mapping[str, Tensor]) -> Evidence:
        """Return the factors, multiplied.

        Args:
            elements: The elements of the plate.
            call: The call.
            unconstrained: The flat vectors of the sites sampled so far.
        """
        evidence: Evidence = self.factors(elements, self.above(call, unconstrained))
        return evidence


class GuideBlock(nn.Module):
    """A block of a guide: its inputs and its conditionals.

    Args:
        inputs: What its sites look at.
        family: The family that serves its sites.
        spec: What their conditionals are made from.
        elements: For sites with a factor for each element of a plate, what gives these.

    Attributes:
        plan: The block of the plan.
    """

    def __init__(
        self,
        inputs: BlockInputs,
        family: Family,
        spec: BlockSpec,
        elements: Mapping[str, SiteElements] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.elements = nn.ModuleDict(
            {str(spec.block.sites.index(site)): each for site, each in elements.items()}
        )
        self.family, self.spec = family, spec
        self.conditionals = family.conditionals(spec)
        self.plan: BlockPlan = self.conditionals.block

    @classmethod
    def make(
        cls,
        plan: BlockPlan,
        family: Family,
        inputs: BlockInputs,
        samples: Samples,
        options: Mapping[str, Any],
        elements: Mapping[str, SiteElements] = MappingProxyType({}),
    ) -> "GuideBlock":
        """Return a block with new conditionals, in the type and on the device of the data.

        Args:
            plan: The block of the plan.
            family: The family that serves its sites.
            inputs: What its sites look at.
            samples: What the block is made from.
            options: Further fields of the specification (element parents, factors).
            elements: See :class:`GuideBlock`.
        """
        spec = BlockSpec(
            plan,
            inputs.sizes,
            {site: samples.draws.sites[site] for site in plan.sites},
            [samples.plates[name] for name in plan.plates],
            **options,
        )
        like = samples.draws.like
        return cls(inputs, family, spec, elements).to(like.device, like.dtype)

    def to_plain(self) -> dict[str, Any]:
        """Return what the block is made from, without its state."""
        plates = tuple(replace(plate, indices=None) for plate in self.spec.plates)
        return {
            "inputs": self.inputs.to_plain(),
            "family": self.family,
            "spec": replace(self.spec, plates=plates),
            "elements": {site: each.to_plain() for site, each in self.site_elements().items()},
            "dtype": self.dtype,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "GuideBlock":
        """Return a block of the same form, for a state that is loaded."""
        elements = {site: SiteElements.from_plain(each) for site, each in plain["elements"].items()}
        block = cls(BlockInputs.from_plain(plain["inputs"]), plain["family"], plain["spec"], elements)
        return block.to(dtype=plain["dtype"])

    @property
    def dtype(self) -> torch.dtype:
        """The type of its features."""
        return self.inputs.features.shift.dtype

    def site_elements(self) -> dict[str, SiteElements]:
        """Return what gives the factors of elements, by site."""
        sites = self.plan.sites
        return {
            sites[int(key)]: each for key, each in self.elements.items() if isinstance(each, SiteElements)
        }

    def _new_elements(self, site: str) -> SiteElements:
        """Return what gives the factors of elements of a site, for a state that is loaded."""
        summed = self.plan.summed[site]
        sizes = {**self.inputs.sizes, **{name: each.size for name, each in self.spec.sites.items()}}
        maps = {name: FeatureMap.of_kinds([("identity", slice(0, sizes[name]))]) for name in summed.above}
        above = BlockInputs(maps, {}, self.inputs.encodings)
        pool = self.inputs.pool(summed.summary)
        assert isinstance(pool, DeepSetPool)
        form = ElementForm.of_pool(pool, summed.responses, sum(above.sizes.values()))
        like = self.inputs.features.shift
        return SiteElements(above, ElementFactors(form, torch.zeros(1), torch.ones(1))).to(
            like.device, like.dtype
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Have factors of elements where the state has some: samples decide at set-up which sites do."""
        for key, site in enumerate(self.plan.sites):
            if site in self.plan.summed:
                there = any(name.startswith(f"{prefix}elements.{key}.") for name in state_dict)
                if there and str(key) not in self.elements:
                    self.elements[str(key)] = self._new_elements(site)
                elif not there and str(key) in self.elements:
                    del self.elements[str(key)]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def leave_out_unused_elements_(self) -> None:
        """Drop the factors of elements of sites that do without, after the start."""
        unused = [site for site in self.site_elements() if not self.conditionals.sums(site)]
        for site in unused:
            del self.elements[str(self.plan.sites.index(site))]

    def beside_elements(
        self,
        priors: Mapping[str, SitePrior],
        level: Sequence[str],
        call: Call,
        unconstrained: Mapping[str, Tensor],
    ) -> Mapping[str, SitePrior]:
        """Return priors of the sites of a level beside the factors of elements, where these have some.

        Args:
            priors: The priors.
            level: The sites.
            call: The call.
            unconstrained: The flat vectors of the sites sampled so far.
        """
        if not self.elements:
            return priors
        found = dict(priors)
        for site, each in self.site_elements().items():
            if site in level and site in priors and self.conditionals.sums(site):
                elements = self.inputs.elements(self.plan.summed[site].summary, call, unconstrained)
                found[site] = priors[site].with_evidence(each(elements, call, unconstrained))
        return found

    def begin(self, call: Call, unconstrained: Mapping[str, Tensor]) -> Pass:
        """Begin a pass through the levels.

        Args:
            call: The call.
            unconstrained: The flat vectors of the sites sampled so far.
        """
        return self.conditionals.begin(self.inputs(call, unconstrained), call.plates)

    @torch.no_grad()
    def set_joint_factor_(self, site: str, plates: Mapping[str, PlateState], factor: JointFactor) -> None:
        """Let a fused site have a factor that follows other sites of the context, in unconstrained units.

        Args:
            site: The site, with parameters for each of its elements, or for each pair.
            plates: The plates at set-up.
            factor: The factor.
        """
        features, loc, slopes = self.inputs.features, factor.loc, {}
        for name, matrix in factor.slopes.items():
            columns = self.conditionals.columns[name]
            part = slice(columns.start, columns.stop)
            _require_coordinates(features, part, name)
            loc = loc + matrix @ features.shift[part].to(matrix)
            slopes[name] = matrix * features.scale[part].to(matrix)
        self.conditionals.set_joint_factor_(site, plates, replace(factor, loc=loc, slopes=slopes))

    @torch.no_grad()
    def set_linear_(
        self,
        site: str,
        weights: Mapping[str, Any],
        intercept: Tensor | float,
        scale: Tensor | float,
        *,
        fused: bool = False,
        exact: bool = False,
    ) -> None:
        """Make one site's conditional linear-Gaussian, in the units of the data and of unconstrained latents.

        With ``fused`` it is the factor beside the prior that becomes linear-Gaussian, in the coordinate of the prior.
        With ``exact`` training is to move it little
        (:class:`~pyro_graphflows.guides.conditionals.contract.LinearConditional`).

        The shifts and scales on the way, of data, of parents, of summaries of other plates and of the site itself, are
        worked into weights and location. Data on a half-line count by their logarithm, data in (0, 1) by their logit.
        See :meth:`~pyro_graphflows.guides.AutoFaithfulGuide.set_linear_`.
        """
        if fused and self.conditionals.sums(site):
            self._set_elements_(site, weights, intercept, scale)
            return
        conditionals, parents = self.conditionals, self.plan.parents[site]
        shift, width = conditionals.fused_units(site) if fused else conditionals.output_units(site)
        loc = torch.as_tensor(intercept, dtype=shift.dtype).expand(len(shift)) - shift
        standard: dict[str, Tensor] = {}
        pooled: set[str] = set()

        def matrix_of(value: Any, columns: int, parent: str) -> Tensor:
            matrix = torch.as_tensor(value, dtype=shift.dtype)
            if matrix.numel() != len(shift) * columns:
                raise GraphflowsError(
                    f"Expected weights of {parent!r} for {site!r} of shape ({len(shift)}, {columns}); got "
                    f"{tuple(matrix.shape)}."
                )
            return matrix.reshape(len(shift), columns)

        features = self.inputs.features
        for name in self.inputs.names:
            columns = conditionals.columns[name]
            pool = self.inputs.pool(name)
            if pool is not None and name in parents:
                standard[name] = loc.new_zeros(len(shift), len(columns))
                mine = weights.get(name, weights)
                for member in pool.members:
                    direct = mine is weights and (member.name in parents or member.name in pooled)
                    if member.name not in mine or direct:
                        continue
                    at, centre, spread = pool.columns_of(member.name)
                    there = [columns.start + column for column in at]
                    matrix = matrix_of(mine[member.name], len(at), member.name)
                    loc = loc + matrix @ (centre + spread * features.shift[there])
                    standard[name][:, at] = matrix * spread * features.scale[there] / width.unsqueeze(-1)
                    pooled.add(member.name)
                pooled.add(name)
            elif name in weights:
                part = slice(columns.start, columns.stop)
                _require_coordinates(features, part, name)
                matrix = matrix_of(weights[name], len(columns), name)
                loc = loc + matrix @ features.shift[part]
                standard[name] = matrix * features.scale[part] / width.unsqueeze(-1)
        for name in weights:
            if name not in standard and name not in pooled:
                parent_shift, parent_width = conditionals.input_units(name)
                matrix = matrix_of(weights[name], len(parent_shift), name)
                loc = loc + matrix @ parent_shift
                standard[name] = matrix * parent_width / width.unsqueeze(-1)
        tril = torch.as_tensor(scale, dtype=shift.dtype)
        tril = tril if tril.dim() == 2 else tril.expand(len(shift)).diag_embed()
        if tril.shape != (len(shift), len(shift)) or not bool((tril.diagonal() > 0).all()):
            raise GraphflowsError(
                f"Expected a positive scale of {site!r}, or a lower triangular matrix ({len(shift)}, {len(shift)}) "
                f"with a positive diagonal; got {torch.as_tensor(scale).tolist()}."
            )
        linear = LinearConditional(standard, loc / width, tril / width.unsqueeze(-1), exact=exact)
        if fused:
            conditionals.set_fused_(site, linear)
        else:
            conditionals.set_linear_(site, linear)

    def _set_elements_(
        self, site: str, weights: Mapping[str, Any], intercept: Tensor | float, scale: Tensor | float
    ) -> None:
        """Let each element of a plate have the same linear-Gaussian factor, and their product no corrections."""
        each = self.site_elements()[site]
        factors, above = each.factors, each.above
        pool = self.inputs.pool(self.plan.summed[site].summary)
        assert isinstance(pool, DeepSetPool)
        row = factors.shift.new_zeros(factors.form.num_joint + factors.form.num_above)
        loc = torch.as_tensor(intercept).to(row).reshape(-1) - factors.shift
        for name, value in weights.items():
            if name in pool.names():
                at, centre, spread = pool.columns_of(name, of_elements=True)
            elif name in above.names:
                start = sum(above.sizes[other] for other in above.names[: above.names.index(name)])
                part = slice(start, start + above.sizes[name])
                _require_coordinates(above.features, part, name)
                centre, spread = above.features.shift[part], above.features.scale[part]
                at = [factors.form.num_joint + column for column in range(part.start, part.stop)]
            else:
                raise GraphflowsError(
                    f"Expected weights of what the factors of elements of {site!r} read, "
                    f"{', '.join([*pool.names(), *above.names])}; got {name}."
                )
            matrix = torch.as_tensor(value).to(row).reshape(-1)
            if len(matrix) != len(at):
                raise GraphflowsError(
                    f"Expected weights of {name!r} for {site!r} of shape (1, {len(at)}); got {len(matrix)} numbers."
                )
            loc = loc + (matrix * centre).sum()
            row[at] = matrix * spread / factors.scale
        width = torch.as_tensor(scale).to(row).reshape(-1) / factors.scale
        if len(width) != 1 or not bool(width > 0):
            raise GraphflowsError(
                f"Expected a positive scale of {site!r}; got {torch.as_tensor(scale).tolist()}."
            )
        step = width / (1.0 + width.square()).sqrt()
        factors.set_linear_(row, float(loc / factors.scale), float(width.log()), float(step))
        self.conditionals.set_summed_(site, step.diag_embed())


def _require_coordinates(features: FeatureMap, part: slice, name: str) -> None:
    """Refuse data whose features are no linear function of a value, or of its vector on the real line."""
    for kind, columns in features.kinds:
        if kind in ("log1p", "asinh") and columns.start <= part.start < columns.stop:
            raise GraphflowsError(
                f"Expected a parent that comes in linearly; the features of {name!r} are those of a {kind} map, for "
                "counts and for heavy tails. Set the guide up with standardize=False and init='random'."
            )


# ---------------------------------------------------------------- inputs from samples


def make_inputs(
    plan: BlockPlan,
    samples: Samples,
    deepset: DeepSet,
    embedding: Mapping[str, nn.Module | str] = MappingProxyType({}),
) -> tuple[BlockInputs, dict[str, SiteElements], Samples]:
    """Return a block's inputs, standardised, its factors of elements, and its samples with the values of summaries.

    Args:
        plan: The block of the plan.
        samples: Joint samples.
        deepset: The shape of the learned parts of pooled summaries.
        embedding: Networks of the nodes that are embedded.
    """
    pools: dict[str, Pool] = {}
    for node in plan.context:
        if node.summary is not None:
            if node.summary.embedded:
                name = node.summary.members[0]
                pools[node.name], values = _make_embedding(name, plan, samples, embedding[name])
            else:
                pools[node.name], values, fewer = _make_pool(node.summary, samples, deepset)
                samples = samples.with_values({} if fewer is None else {fewer_of(node.name): fewer})
            samples = samples.with_values({} if values is None else {node.name: values})
    names = [node.name for node in plan.context]
    elements, samples = make_elements(plan, pools, samples)
    of_priors = [
        column
        for site in plan.fused
        for column in (*columns_of(site), evidence_of(site))
        if column in (samples.values or {})
    ]
    further = [fewer_of(name) for name in pools if fewer_of(name) in (samples.values or {})]
    samples = samples.for_block([*plan.sites, *names, *of_priors, *further])
    rows = samples.rows
    maps = {}
    scores = {node.name: node.score_of for node in plan.context if node.score_of is not None}
    for name in names:
        if name in scores:
            size = samples.draws.sites[scores[name]].size
            seen = torch.zeros(0, size).to(samples.draws.like) if rows is None else rows[name]
            maps[name] = FeatureMap(None, seen, samples.standardize)
        elif name in pools:
            seen = torch.zeros(0, pools[name].num_features) if rows is None else rows[name]
            maps[name] = FeatureMap(None, seen, samples.standardize)
            learned = [i for i, each in enumerate(getattr(pools[name], "learned", ())) if each]
            maps[name].scale[learned] = maps[name].scale[learned].clamp(min=1.0)  # as the pool gives them
        else:
            maps[name] = _feature_map(name, samples, rows)
    return BlockInputs(maps, pools, samples.draws.encodings), elements, samples


def make_elements(
    plan: BlockPlan, pools: Mapping[str, Pool], samples: Samples
) -> tuple[dict[str, SiteElements], Samples]:
    """Return what gives the factors of elements, started by regression, and the samples with what elements say there.

    Args:
        plan: The block of the plan.
        pools: The summaries of its inputs.
        samples: Joint samples.
    """
    found: dict[str, SiteElements] = {}
    values = samples.values
    if values is None or samples.source != "joint" or not samples.standardize:
        return found, samples
    draws = samples.draws
    for site, summed in plan.summed.items():
        pool = pools[summed.summary]
        if columns_of(site)[0] not in values or not isinstance(pool, DeepSetPool):
            continue
        depth = max(value.dim() - 2 for value in values.values())
        depth = max([depth, *(-plate.dim for plate in samples.plates.values())])
        own = {name: with_depth(values[name], depth) for name in (*pool.names(), *summed.above)}
        own.update({name: draws.argument(name) for name in pool.indices})
        elements = pool.elements(own, samples.plates)
        of_value = columns_of(site)[1]
        value = with_depth(values[of_value if of_value in values else site], depth)
        maps = {name: _feature_map(name, samples, {name: own[name].flatten(0, -2)}) for name in summed.above}
        above = BlockInputs(maps, {}, draws.encodings)
        features = above.features(concatenate([own[name] for name in summed.above], like=value))
        form = ElementForm.of_pool(pool, summed.responses, features.shape[-1])
        factors = ElementFactors(form, *location_and_scale(value.reshape(-1, 1)))
        factors = factors.to(draws.like.device, draws.like.dtype)
        if factors.fit_(elements, features, value):
            found[site] = SiteElements(above, factors)
            with torch.no_grad():
                evidence = factors(elements, features)
            units = torch.cat([evidence.shift, evidence.scale]).expand(*evidence.parameters.shape[:-1], 2)
            column = with_depth(torch.cat([evidence.parameters, units], -1), depth)
            samples = samples.with_values({evidence_of(site): column})
    return found, samples


def _feature_map(name: str, samples: Samples, rows: Mapping[str, Tensor] | None) -> FeatureMap:
    """Return the map of a node, from rows of joint samples or from this call's data."""
    draws = samples.draws
    nodes: Any = draws.traced.trace.nodes
    support = None
    if name in draws.sites:
        discrete = draws.sites[name].encoding is not None
        if rows is None or discrete:
            standardize = samples.standardize and not discrete
            return FeatureMap(None, torch.zeros(0, draws.sites[name].size), standardize)
    elif name not in draws.traced.event_dims and name not in draws.encodings.partly:
        support = nodes[name]["fn"].support
    if rows is None:  # the data of this call are all that is known
        flat = draws.encodings.flat(name, draws.data(name))
        return FeatureMap(support, flat.reshape(-1, flat.shape[-1]), samples.standardize)
    seen, whole = rows[name], (samples.values or {}).get(name)
    if whole is not None and whole.stride(0) == 0 and whole[0].numel() == whole.shape[-1]:
        seen = seen[:2]  # all rows are the data of the call
    return FeatureMap(support, seen, samples.standardize)


def _member_map(name: str, samples: Samples) -> FeatureMap:
    """Return the map of a node that is pooled; of a partly observed one, without the column of the mask."""
    values = samples.values
    if name not in samples.draws.encodings.partly:
        return _feature_map(name, samples, None if values is None else {name: values[name].flatten(0, -2)})
    value = samples.draws.data(name) if values is None else values[name]
    flat = value.flatten(0, -2)
    return FeatureMap(None, flat[flat[:, -1] > 0, :-1], samples.standardize)


def _linear_map(name: str, own: FeatureMap, samples: Samples) -> FeatureMap:
    """Return the map of a node, or an affine one if its values have heavy tails and so another."""
    if samples.values is None or not any(kind == "asinh" for kind, _ in own.kinds):
        return copy.deepcopy(own)
    rows = samples.values[name].flatten(0, -2)[:, : len(own.shift)]
    linear = FeatureMap(None, rows[:0], standardize=False)
    linear.shift, linear.scale = location_and_scale(rows)
    return linear


def _make_embedding(
    name: str, plan: BlockPlan, samples: Samples, network: nn.Module | str
) -> tuple[Embedding, Tensor | None]:
    """Return the embedding of a node for the sites of a block, and its values in joint samples."""
    draws = samples.draws
    feature_map = _member_map(name, samples)
    member = PoolMember(name, len(feature_map.shift), frozenset(draws.traced.graph.plates[name]))
    number = sum(draws.sites[site].size for site in plan.sites)
    pool = Embedding(member, feature_map, network, number).to(draws.like.device, draws.like.dtype)
    if samples.values is None:
        return pool, None
    rows = side_by_side(samples.values, [name, *plan.sites])
    few = slice(0, MOST_EMBEDDED_ROWS)
    pool.fit_(rows[name][few], torch.cat([rows[site][few] for site in plan.sites], -1))
    return pool, pool.of_samples({name: samples.values[name]}, samples.plates, fit=False)


def _make_pool(
    summary: Summary, samples: Samples, deepset: DeepSet
) -> tuple[Pool, Tensor | None, Tensor | None]:
    """Return the summary of some nodes, standardised, its values in joint samples, and those of fewer elements."""
    draws = samples.draws
    graph, inputs = draws.traced.graph, draws.traced.event_dims
    around = {name: summary.inside(plates) for name, plates in graph.plates.items()}
    maps = [_member_map(name, samples) for name in summary.members]
    members = [
        PoolMember(name, len(m.shift), around[name], name in draws.encodings.partly, name not in inputs)
        for name, m in zip(summary.members, maps, strict=True)
    ]
    pool: Pool
    if summary.index is not None and summary.inner is not None:
        pool = looked_up = LookedUp(members[0], maps[0], summary.index, summary.over[0], summary.inner)
        for _, groups, group in summary.segments:
            pool = MeansOfLookedUp(looked_up, group, groups, members[1:], maps[1:])
    elif summary.one_by_one:
        pool = AllElements(members, maps, [samples.plates[name] for name in summary.over])
    else:
        orders = pooling_orders(summary.over, list(around.values()))
        linear = {n: _linear_map(n, m, samples) for n, m in zip(summary.members, maps, strict=True)}
        linear = linear if deepset.sums and len(orders) == 1 else {}
        pool = DeepSetPool(members, maps, orders, deepset, summary.segments, linear)
    pool = pool.to(draws.like.device, draws.like.dtype)
    if samples.values is None:
        return pool, None, None
    plates = [*summary.over, *(outer for _, outer, _ in summary.segments)]
    depth = max(-samples.plates[plate].dim for plate in plates)
    depth = max(depth, *(samples.values[name].dim() - 2 for name in summary.members))
    if summary.inner is not None:
        depth = max(depth, -samples.plates[summary.inner].dim)
    values = {name: with_depth(samples.values[name], depth) for name in summary.members}
    values.update({name: draws.argument(name) for name in pool.indices})
    found = pool.of_samples(values, samples.plates, fit=samples.standardize)
    if not isinstance(pool, DeepSetPool) or not samples.standardize:
        return pool, found, None
    kept = some_elements(summary, graph, samples.plates, len(found), draws.like)
    kept = {name: with_depth(each, depth) for name, each in kept.items()}
    fewer = pool.of_samples(values, samples.plates, fit=False, kept=kept) if kept else None
    return pool, found, fewer


def _all_finite(values: Tensor) -> bool:
    """Whether all values are finite: by their sum, and one by one where that is not."""
    values = values.detach()
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


# ---------------------------------------------------------------- parameters in the store of Pyro

Place = tuple[str, dict[str, Any], str]

_OF_GUIDES = WeakTensorKeyDictionary()  # all their parameters; an attribute would be in files of the store


class ShownParameters:
    """Shows the parameters of one guide to Pyro, and takes their names in the parameter store.

    Walking through all modules for that at each call would take a sixth of it: where parameters are kept is remembered,
    until :meth:`take`. Copies and pickles remember nothing.
    """

    def __init__(self) -> None:
        self._places: list[Place] | None = None
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_places": None, "_has_warned": self._has_warned}

    def take(self, blocks: nn.Module) -> None:
        """Note that a guide has these blocks now: where parameters are kept is looked for anew, and they are marked."""
        self._places = None
        self.mark(blocks)

    @staticmethod
    def mark(blocks: nn.Module) -> None:
        """Mark parameters as those of a guide, by which they are told from values that were loaded."""
        for parameter in blocks.parameters():
            _OF_GUIDES[parameter] = True

    def show(self, guide: PyroModule) -> None:
        """Show the parameters by ``param`` statements, as a look-up of a module of a PyroModule does.

        Args:
            guide: The guide, whose modules are under ``blocks``.

        Raises:
            GraphflowsError: If the store has values of other shapes for them.
        """
        fullname = guide._pyro_get_fullname("blocks")
        if self._places is None:
            blocks: Any = guide._modules["blocks"]  # not guide.blocks, which would show all of them to Pyro
            self._places = [
                (f"{prefix}.{key}" if prefix else key, module._parameters, key)
                for prefix, module in blocks.named_modules()
                for key, parameter in module._parameters.items()
                if parameter is not None
            ]
        self._claim_names(fullname, self._places)
        if _is_module_local_param_enabled():
            _ = guide.blocks
            return
        for name, kept, key in self._places:
            parameter = kept[key]
            if parameter.requires_grad and pyro.param(f"{fullname}$$${name}", parameter) is not parameter:
                _ = guide.blocks  # a handler has put something in its place, which the module takes on
                return

    def _claim_names(self, fullname: str, places: Sequence[Place]) -> None:
        """Take this guide's names in the parameter store, from other guides or from a store that was loaded.

        The store would hand the optimiser of this call the parameters of the guide that came first, and none of this
        guide's would ever be trained. Names are those of classes, so two guides in one program suffice. What is in the
        store and belongs to no guide was loaded, or set: these are values for this guide.
        """
        store = pyro.get_param_store()
        if not len(store):
            return
        loaded = []
        for name, kept, key in places:
            full, parameter = f"{fullname}$$${name}", kept[key]
            stored = store._params.get(full)
            if stored is None or stored is parameter:
                continue
            if stored not in _OF_GUIDES:
                if stored.shape != parameter.shape:
                    raise GraphflowsError(
                        f"Expected values of shape {tuple(parameter.shape)} for the parameter {full!r} of this guide; "
                        f"Pyro's parameter store has some of shape {tuple(stored.shape)}, of another guide. Clear the "
                        "store, pyro.clear_param_store(), or set the guide up as that one was."
                    )
                parameter.data.copy_(stored.detach())
                loaded.append(name)
            del store[full]
        if loaded and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{len(loaded)} parameters of the guide took the values that Pyro's parameter store had for them. A "
                "store has parameters alone: the units of inputs and outputs are those of this guide's set-up, so the "
                "values mean the same only if the guide that was stored was set up by the same call. "
                "guide.save(path) and guide.state_dict() hold everything.",
                GraphflowsWarning,
                stacklevel=6,
            )
