"""A block of a guide as one masked network: the factors of its sites, level by level.

The network of a block sees the block's context and, level by level, the sites drawn so far; masks from the
inverse graph leave to each site exactly its parents (Germain et al. 2015, Webb et al. 2018). Everything is in
standardised units, inputs and outputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.coupled import Chain, CoupledFactor
from pyro_graphflows.guides.factors import Factor, NormalFactor, scalar_normals
from pyro_graphflows.guides.free import FreeTable, IndexMap, index_maps
from pyro_graphflows.guides.plan import Block
from pyro_graphflows.nn.mlp import LevelEvaluation, MaskedMLP

__all__ = ["MADEBlock", "MADEEvaluation", "NetworkOptions"]


@dataclass(frozen=True)
class NetworkOptions:
    """The shape of the masked networks.

    Attributes:
        hidden_dims: The widths of the hidden layers; None for ``units_per_set`` units for each distinct set of
            parents.
        units_per_set: The number of units for each distinct set of parents.
        hidden_layers: The number of hidden layers if ``hidden_dims`` is None.
        activation: The activation function.
        skip: Whether a linear map runs beside the hidden layers.
    """

    hidden_dims: Sequence[int] | None = None
    units_per_set: int = 16
    hidden_layers: int = 1
    activation: str = "elu"
    skip: bool = True


class MADEBlock(nn.Module):
    """The conditionals of the sites of one block, by one masked network.

    Args:
        block: The block of the plan.
        context_sizes: For each context node, the number of its features.
        factors: For each site, its factor.
        options: The shape of the network.
        plates: The plates of the block, for the sites with free parameters.
        element_parents: For sites whose factor tells elements apart, the parents of each element, as (node,
            index in the node), -1 for the whole node.
    """

    def __init__(
        self,
        block: Block,
        context_sizes: Mapping[str, int],
        factors: Mapping[str, Factor],
        options: NetworkOptions,
        plates: Sequence[PlateState] = (),
        element_parents: Mapping[str, Sequence[Sequence[tuple[str, int]]]] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.block = block
        self.factors = dict(factors)
        columns: dict[str, range] = {}
        input_levels: list[int] = []
        names: list[str] = []
        depths = [(node.name, 0, context_sizes[node.name]) for node in block.context]
        depths += [
            (site, i + 1, factors[site].size) for i, level in enumerate(block.levels) for site in level
        ]
        for name, level, size in depths:
            columns[name] = range(len(names), len(names) + size)
            names += [name] * size
            input_levels += [level] * size
        self.columns = columns
        self.element_columns: dict[str, list[list[int]]] = {}  # for split sites, what each element may see
        allowed: list[list[int]] = []
        output_names: list[str] = []
        self.outputs: dict[str, slice] = {}  # rows of the network, in sampling order
        for site in block.sites:
            seen = [j for parent in block.parents[site] if parent in columns for j in columns[parent]]
            start = len(allowed)
            elements = factors[site].output_elements
            if elements is None:
                allowed += [seen] * factors[site].num_outputs
            else:
                per_element = [self._columns_of(parents, seen) for parents in element_parents[site]]
                self.element_columns[site] = per_element
                allowed += [per_element[i] for i in elements]
            output_names += [site] * factors[site].num_outputs
            self.outputs[site] = slice(start, len(allowed))
        self.network = MaskedMLP(
            allowed,
            len(names),
            num_params=1,
            hidden_dims=options.hidden_dims,
            units_per_set=options.units_per_set,
            hidden_layers=options.hidden_layers,
            activation=options.activation,
            input_levels=input_levels,
            skip=options.skip,
            input_names=names,
            output_names=output_names,
        )
        self.free = FreeTable(plates, sum(factors[s].num_outputs for s in block.free)) if block.free else None
        self._free_columns: dict[str, slice] = {}
        start = 0
        for site in block.free:
            self._free_columns[site] = slice(start, start + factors[site].num_outputs)
            start += factors[site].num_outputs
        inputs = {s: [j for p in block.parents[s] for j in columns.get(p, ())] for s in block.sites}
        num_outputs = {site: factor.num_outputs for site, factor in factors.items()}
        self.maps, self._map_of = index_maps(block, inputs, num_outputs, plates)
        self.chains = nn.ModuleDict()  # by the position of the site
        self._chain_of: dict[str, str] = {}
        for position, site in enumerate(block.sites):
            if site in block.chained:
                coupled = [plate for plate in plates if plate.name in block.chained[site].plates]
                others = [plate for plate in plates if plate.name not in block.chained[site].plates]
                factor = factors[site]
                assert isinstance(factor, CoupledFactor)
                self.chains[str(position)] = Chain(factor, coupled, others)
                self._chain_of[site] = str(position)
        self.register_buffer("shift", torch.zeros(sum(factors[s].size for s in block.sites)))
        self.register_buffer("scale", torch.ones(len(self.shift)))
        self._parts: dict[str, slice] = {}
        start = 0
        for site in block.sites:
            self._parts[site] = slice(start, start + factors[site].size)
            start += factors[site].size
        self._scalar_levels = {
            i
            for i, level in enumerate(block.levels)
            if all(type(factors[site]) is NormalFactor and factors[site].size == 1 for site in level)
        }

    shift: Tensor
    scale: Tensor

    def _columns_of(self, parents: Sequence[tuple[str, int]], seen: Sequence[int]) -> list[int]:
        found: list[int] = []
        for name, index in parents:
            columns = self.columns.get(name, range(0))
            found += columns if index < 0 else columns[index : index + 1]
        return sorted(set(found) & set(seen))

    @torch.no_grad()
    def set_standardization_(self, site: str, shift: Tensor, scale: Tensor) -> None:
        """Set the shift and scale of a site's unconstrained vector."""
        self.shift[self._parts[site]] = shift
        self.scale[self._parts[site]] = scale

    def standardization(self, site: str) -> tuple[Tensor, Tensor]:
        """Return the shift and scale of a site's unconstrained vector."""
        return self.shift[self._parts[site]], self.scale[self._parts[site]]

    @torch.no_grad()
    def set_linear_(self, site: str, weights: Mapping[str, Tensor], loc: Tensor, scale_tril: Tensor) -> None:
        """Make one site's factor linear-Gaussian, in standardised units of parents and site.

        Of a discrete site the logits become linear; there is no scale.

        Args:
            site: The site.
            weights: For each parent, a matrix of shape ``(site's size, parent's size)``; zero where missing.
            loc: The location where all parents are zero, shape ``(size,)``.
            scale_tril: The lower triangular square root of the covariance, shape ``(size, size)``.
        """
        like = self.shift
        joint = like.new_zeros(self.factors[site].size, self.network.input_dim)
        for parent, matrix in weights.items():
            joint[:, list(self.columns[parent])] = matrix.to(joint)
        self.set_rows_(site, *self.factors[site].linear_start(joint, loc.to(joint), scale_tril.to(joint)))

    @torch.no_grad()
    def set_rows_(self, site: str, weights: Tensor, biases: Tensor) -> None:
        """Make the outputs of one site linear: ``biases + weights @ inputs``, with columns for all inputs."""
        skip: Any = self.network.skip
        if skip is None:
            raise RuntimeError(
                "Expected a network with a linear map beside its hidden layers; this one has none."
            )
        skip.set_rows_(self.outputs[site], weights, biases)
        if len(self.network.layers):
            last: Any = self.network.layers[-1]
            last.set_rows_(self.outputs[site], 0.0)
        if self.free is not None and site in self._free_columns:
            self.free.table[..., self._free_columns[site]] = 0.0

    @torch.no_grad()
    def narrow_free_(self, factor: float) -> None:
        """Multiply the scales of the sites with free parameters by a factor."""
        for site, columns in self._free_columns.items():
            assert self.free is not None
            for output in self.factors[site].log_scale_outputs:
                self.free.table[..., columns.start + output] += math.log(factor)

    @torch.no_grad()
    def set_index_linear_(self, site: str, weights: Tensor, locs: Tensor, scale_trils: Tensor) -> bool:
        """Make the factor of a site with maps of its own linear-Gaussian for each index, in standardised units.

        Args:
            site: The site.
            weights: Shape ``(indices, size, inputs)``, with a column for each input of the site's parents.
            locs: Shape ``(indices, size)``.
            scale_trils: Shape ``(indices, size, size)``.

        Returns:
            Whether the site has such maps and its factor a linear start.
        """
        factor = self.factors[site]
        if site not in self._map_of or not isinstance(factor, NormalFactor):
            return False
        key, inputs = self._map_of[site]
        index_map = self.maps[key]
        assert isinstance(index_map, IndexMap)
        like = index_map.rows.table
        starts = [
            factor.linear_start(w.to(like), loc.to(like), tril.to(like))
            for w, loc, tril in zip(weights, locs, scale_trils, strict=True)
        ]
        slopes, offsets = (torch.stack(parts) for parts in zip(*starts, strict=True))
        shared = torch.zeros(factor.num_outputs, self.network.input_dim).to(like)
        if not index_map.offset:
            return False
        shared[:, inputs] = slopes.mean(0)
        self.set_rows_(site, shared, offsets.mean(0))
        index_map.set_(slopes - slopes.mean(0), offsets - offsets.mean(0))
        return True

    def start(self, context: Tensor, plates: Mapping[str, PlateState] | None = None) -> "MADEEvaluation":
        """Begin an evaluation.

        Args:
            context: The features of the context nodes, in the block's order, shape ``(*batch, n)``.
            plates: The plates of the call; without them free parameters are left out.
        """
        free = self.free(plates) if self.free is not None and plates is not None else None
        return MADEEvaluation(self, context, free, plates if self._map_of or self._chain_of else None)


class MADEEvaluation:
    """One evaluation of a block; alternates :meth:`factors` and :meth:`accept`, level by level."""

    def __init__(
        self,
        block: MADEBlock,
        context: Tensor,
        free: Tensor | None,
        plates: Mapping[str, PlateState] | None = None,
    ) -> None:
        self._module = block
        self._free = free
        self._plates = plates  # where elements have maps of their own, or are drawn jointly
        self._known: list[Tensor] = []
        self._network: LevelEvaluation = block.network.start()
        self._level = 0
        self._new: Tensor = context

    def factors(self) -> dict[str, dist.TorchDistribution]:
        """Return the factors of the next level's sites, over their flat unconstrained vectors."""
        module = self._module
        level = module.block.levels[self._level]
        outputs = self._network.step(self._new if self._new.shape[-1] else None).squeeze(-1)
        if self._plates is not None:
            self._known.append(self._new)
        if self._level in module._scalar_levels and self._free is None and self._plates is None:
            part = slice(module._parts[level[0]].start, module._parts[level[-1]].stop)
            normals = scalar_normals(outputs, module.shift[part], module.scale[part])
            return dict(zip(level, normals, strict=True))
        start = module.outputs[level[0]].start
        result: dict[str, dist.TorchDistribution] = {}
        for site in level:
            rows, part = module.outputs[site], module._parts[site]
            part_of_level = outputs[..., rows.start - start : rows.stop - start]
            if self._free is not None and site in module._free_columns:
                part_of_level = part_of_level + self._free[..., module._free_columns[site]]
            if self._plates is not None and site in module._map_of:
                part_of_level = part_of_level + self._own_map(site, self._plates)
            if self._plates is not None and site in module._chain_of:
                chain: Any = module.chains[module._chain_of[site]]
                result[site] = chain.distribution(
                    part_of_level, module.shift[part], module.scale[part], self._plates
                )
                continue
            result[site] = module.factors[site].distribution(
                part_of_level, module.shift[part], module.scale[part]
            )
        return result

    def _own_map(self, site: str, plates: Mapping[str, PlateState]) -> Tensor:
        key, columns = self._module._map_of[site]
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in self._known))
        known = torch.cat([part.expand(*shape, part.shape[-1]) for part in self._known], -1)
        index_map: Any = self._module.maps[key]
        contribution: Tensor = index_map(plates, known[..., columns])
        return contribution

    def accept(self, values: Mapping[str, Tensor]) -> None:
        """Take the unconstrained vectors of the level's sites, each of shape ``(*batch, size)``."""
        module = self._module
        level = module.block.levels[self._level]
        self._level += 1
        if self._level == len(module.block.levels):
            return
        raw = [values[site] for site in level]
        if any(value.shape != raw[0].shape for value in raw):
            shape = torch.broadcast_shapes(*(value.shape[:-1] for value in raw))
            raw = [
                value if value.shape[:-1] == shape else value.expand(*shape, value.shape[-1]) for value in raw
            ]
        flat = torch.cat(raw, -1) if len(raw) > 1 else raw[0]
        part = slice(module._parts[level[0]].start, module._parts[level[-1]].stop)
        self._new = (flat - module.shift[part]) / module.scale[part]
