"""A block of a guide as one flow: every site keeps its own term.

The flow's Jacobian is triangular in the order of the inverse, so the density of a block is a product of one term for
each site, and each site is emitted on its own (:mod:`~pyro_graphflows.guides.flow_level`).

In a faithful flow a site's term depends on exactly its parents. In a graphical one it is the density given all
ancestors, which enter through their noise: where a value is replaced, its noise is found by inversion and all later
sites are computed again.

The elements of a vector site form a full autoregressive chain inside the site, one *stage* after the other.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.flow_level import FlowEvaluation, FlowLevels
from pyro_graphflows.guides.flow_structure import ElementParents, FlowOptions, flow_structure
from pyro_graphflows.guides.free import FreeTable, IndexMap, index_maps
from pyro_graphflows.guides.plan import Block
from pyro_graphflows.transforms.faithful import FaithfulResidualNN
from pyro_graphflows.transforms.graphical import AffineGraphicalNN

__all__ = ["FlowBlock", "FlowOptions"]

DEFAULT_BLOCKS = 3


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
        seen = {
            site: [j for p in block.parents[site] for j in self.columns.get(p, ()) if j < self.num_features]
            for site in self._own_sites
        }
        self.maps, self._map_of = index_maps(block, seen, {s: 2 * n for s, n in sizes.items()}, plates)
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
        structure, self._stages = flow_structure(
            self.block, self.columns, self.num_features, names, self._free_columns, element_parents
        )
        hidden_dims = options.hidden_dims
        if hidden_dims is None:
            hidden_dims = [options.units_per_variable * len(structure.names)] * options.hidden_layers
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

    def start(self, context: Tensor, plates: Mapping[str, PlateState] | None = None) -> FlowEvaluation:
        """Begin an evaluation.

        Args:
            context: The features of the context nodes, in the block's order, shape ``(*batch, n)``.
            plates: The plates of the call; without them free parameters are zero.
        """
        parts = [context]
        if self._own_sites:
            number = 2 * len(self._free_columns)
            parts.append(context.new_zeros(number) if plates is None else self._own_inputs(context, plates))
        levels = FlowLevels(self.block.levels, self.parts, self._stages, self.affine.loc)
        return FlowEvaluation(levels, self.network.start(*parts), [part.shape[:-1] for part in parts])

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
