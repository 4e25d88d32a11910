"""What is known of a model when a guide is set up, and what the guide's inputs are made of.

From joint samples of the model, or from the data of the call where the model cannot be sampled, come the
standardisations of all that is a network input, and the regression start. Summaries of other plates are made here, and
their values join the samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.features import FeatureMap, concatenate
from pyro_graphflows.guides.joint_samples import (
    MOST_ROWS,
    JointSamples,
    at_one_depth,
    side_by_side,
    with_depth,
)
from pyro_graphflows.guides.plan import Block
from pyro_graphflows.guides.pool_members import PoolMember
from pyro_graphflows.guides.pooling import DeepSet, DeepSetPool, pooling_orders
from pyro_graphflows.guides.summaries import Summary
from pyro_graphflows.guides.taken import AllElements, LookUp

__all__ = ["Pool", "SetUp", "number_of_draws"]

MOST_POOLED_ROWS = 500_000  # the same where plates are pooled: a whole data set is one sample

Pool = DeepSetPool | AllElements | LookUp


def number_of_draws(blocks: Sequence[Block], plates: Mapping[str, PlateState], wanted_rows: int) -> int:
    """Return enough joint samples that each block has its rows, and not so many that the largest block fills memory.

    Args:
        blocks: The blocks of the plan.
        plates: The plates at set-up.
        wanted_rows: The number of rows that each block should have.
    """
    copies = []
    for block in blocks:
        copies.append(1)
        for name in block.plates:
            copies[-1] *= plates[name].size
    wanted = -(-wanted_rows // min(copies))
    if any(block.unlike for block in blocks):  # a regression for each index
        wanted = max(wanted, wanted_rows // 10)
    if any(node.summary for block in blocks for node in block.context):
        elements = 1
        for plate in plates.values():
            elements *= plate.size
        return max(2, min(wanted, -(-MOST_POOLED_ROWS // elements)))
    affordable = -(-MOST_ROWS // max(copies))
    return max(2, min(wanted, affordable))


class SetUp:
    """The data of one call, joint samples, and the maps from values to network inputs that are found from them.

    Args:
        joint: The model's joint samples with the arguments of the call.
        plates: The plates of the call.
        standardize: Whether inputs are standardised.

    Attributes:
        sites: The latent sites.
        samples: The joint samples, by site, conditioning node and summary; None where there are none.
        like: A tensor of the type and on the device that parameters should have.
    """

    def __init__(self, joint: JointSamples, plates: Mapping[str, PlateState], *, standardize: bool) -> None:
        self.joint, self.plates, self.standardize = joint, plates, standardize
        self.traced, self.reader, self.sites, self.inputs = (
            joint.traced,
            joint.reader,
            joint.sites,
            joint.inputs,
        )
        self.samples: dict[str, Tensor] | None = None
        found: list[Any] = [site.get("value") for site in self.traced.trace.nodes.values()]
        floats = [value for value in found if _is_float(value)]
        # the first of the widest
        self.like = max(floats, key=lambda value: value.dtype.itemsize, default=torch.zeros(()))

    def draw(self, num_samples: int) -> None:
        """Take joint samples of the model.

        Raises:
            UnsupportedModelError: If samples of the model would not be what the model's density says.
        """
        self.samples = self.joint.draw(num_samples)

    # ---------------------------------------------------------------- maps to network inputs

    def feature_map(self, name: str, rows: Mapping[str, Tensor] | None) -> FeatureMap:
        """Return the map of a node, from rows of joint samples or from this call's data."""
        nodes: Any = self.traced.trace.nodes
        support = None
        if name in self.sites:
            discrete = self.sites[name].encoding is not None
            if rows is None or discrete:
                standardize = self.standardize and not discrete
                return FeatureMap(None, torch.zeros(0, self.sites[name].size), standardize)
        elif name not in self.inputs and name not in self.reader.partly:
            support = nodes[name]["fn"].support
        if rows is None:  # the data of this call are all that is known
            value = self.inputs[name] if name in self.inputs else nodes[name]["value"]
            flat = self.reader.flat(name, self.joint.conditioning(name, value), self.joint.event_dims[name])
            return FeatureMap(support, flat.reshape(-1, flat.shape[-1]), self.standardize)
        return FeatureMap(support, rows[name], self.standardize)

    def summary_map(self, pool: Pool, name: str, rows: Mapping[str, Tensor] | None) -> FeatureMap:
        """Return the map of a summary."""
        if rows is not None:
            return FeatureMap(None, rows[name], self.standardize)
        return FeatureMap(None, torch.zeros(0, pool.num_features), self.standardize)

    def _member_map(self, name: str) -> FeatureMap:
        """Return the map of a node that is pooled; of a partly observed one, without the column of the mask."""
        if name not in self.reader.partly:
            rows = None if self.samples is None else {name: self.samples[name].flatten(0, -2)}
            return self.feature_map(name, rows)
        nodes: Any = self.traced.trace.nodes
        samples = self.samples
        value = self.joint.conditioning(name, nodes[name]["value"]) if samples is None else samples[name]
        flat = value.flatten(0, -2)
        return FeatureMap(None, flat[flat[:, -1] > 0, :-1], self.standardize)

    # ---------------------------------------------------------------- summaries of other plates

    def make_pool(self, summary: Summary, deepset: DeepSet) -> Pool:
        """Return the summary of some nodes, standardised; add its values to the joint samples."""
        around = {name: summary.inside(plates) for name, plates in self.traced.graph.plates.items()}
        maps = [self._member_map(name) for name in summary.members]
        members = [
            PoolMember(name, len(m.shift), around[name], name in self.reader.partly, name not in self.inputs)
            for name, m in zip(summary.members, maps, strict=True)
        ]
        pool: Pool
        if summary.index is not None and summary.inner is not None:
            outer, inner = self.plates[summary.over[0]], self.plates[summary.inner]
            pool = LookUp(members[0], maps[0], summary.index, outer, inner)
        elif summary.one_by_one:
            pool = AllElements(members, maps, [self.plates[name] for name in summary.over])
        else:
            orders = pooling_orders(summary.over, list(around.values()))
            pool = DeepSetPool(members, maps, orders, deepset, summary.segments)
        pool = pool.to(self.like.device, self.like.dtype)
        samples = self.samples
        if samples is not None:
            plates = [*summary.over, *(outer for _, outer, _ in summary.segments)]
            depth = max(-self.plates[plate].dim for plate in plates)
            depth = max(depth, *(samples[name].dim() - 2 for name in summary.members))
            if summary.inner is not None:
                depth = max(depth, -self.plates[summary.inner].dim)
            values = {name: with_depth(samples[name], depth) for name in summary.members}
            values.update({name: self.joint.argument(name) for name in pool.indices})
            samples[summary.name] = pool.of_samples(values, self.plates, fit=self.standardize)
        return pool

    # ---------------------------------------------------------------- samples of several nodes side by side

    def rows(self, names: Sequence[str], number: int) -> dict[str, Tensor] | None:
        """Return one row for each draw and each element of the plates; a random part where there are many more."""
        if self.samples is None:
            return None
        rows = side_by_side(self.samples, names)
        found = len(next(iter(rows.values())))
        if found <= 2 * number:
            return rows
        chosen = torch.randperm(found)[:number]
        return {name: value[chosen] for name, value in rows.items()}

    def aligned(
        self, context: Sequence[str], sites: Sequence[str], feature: FeatureMap
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the features of a block's context and its sites' values in joint samples, plates apart."""
        values = at_one_depth(self.samples or {}, [*context, *sites])
        features = feature(concatenate([values[name] for name in context]))
        return features, {site: values[site] for site in sites}


def _is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point() and value.numel() > 0
