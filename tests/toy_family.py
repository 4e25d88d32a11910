"""A family in one file, as an extender would write it: logistic conditionals, linear in their parents.

Nothing of the package knows it; it fits in by the contract alone.
"""

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints

from pyro_graphflows.guides import Family, Normal
from pyro_graphflows.guides.conditionals.contract import Conditionals, Pass

# a logistic distribution with the variance of a standard normal one
UNIT = math.sqrt(3) / math.pi


class Logistic(dist.TorchDistribution):
    """Independent logistic entries."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc, scale):
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        shape = torch.Size(batch_shape) + self.event_shape
        return Logistic(self.loc.expand(shape), self.scale.expand(shape))

    @property
    def mean(self):
        return self.loc

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        u = torch.rand(
            torch.Size(sample_shape) + self.loc.shape, dtype=self.loc.dtype, device=self.loc.device
        )
        return self.loc + self.scale * torch.logit(u, eps=1e-12)

    def log_prob(self, value):
        y = (value - self.loc) / self.scale
        return (-y - 2 * nn.functional.softplus(-y) - self.scale.log()).sum(-1)


@dataclass(frozen=True)
class LogisticFamily(Family):
    """Logistic conditionals; discrete and coupled sites, and those with a factor class, are left to ``Normal``."""

    width: float = 1.0

    def serving(self, role):
        beyond = role.site.encoding is not None or role.coupled or role.own_maps or role.factor is not None
        return Normal() if beyond else self

    def conditionals(self, spec):
        return LogisticConditionals(spec, self.width)


class LogisticConditionals(Conditionals):
    def __init__(self, spec, width):
        super().__init__(spec)
        self.width = width
        total = self.num_columns - self.num_features
        self.weight = nn.Parameter(torch.zeros(total, self.num_columns))
        self.bias = nn.Parameter(torch.zeros(total))
        self.log_scale = nn.Parameter(torch.zeros(total))
        mask = torch.zeros(total, self.num_columns)
        for site in self.block.sites:
            mask[self.part(site).start : self.part(site).stop, self.inputs_of(site)] = 1.0
        self.register_buffer("mask", mask)
        self.register_buffer("units", torch.tensor([[0.0, 1.0, 0.0, 1.0]]).repeat(total, 1))
        nn.init.normal_(self.weight, std=0.1)

    def part(self, site):
        columns = self.columns[site]
        return slice(columns.start - self.num_features, columns.stop - self.num_features)

    def output_units(self, site):
        return self.units[self.part(site), 0], self.units[self.part(site), 1]

    def input_units(self, site):
        return self.units[self.part(site), 2], self.units[self.part(site), 3]

    def set_units_(self, site, outputs, inputs=None):
        self.units[self.part(site)] = torch.stack([*outputs, *(inputs or outputs)], -1).to(self.units)

    @torch.no_grad()
    def set_linear_(self, site, linear):
        if linear.by_element:
            return False
        self.weight[self.part(site)] = 0.0
        for parent, matrix in linear.weights.items():
            columns = self.columns[parent]
            self.weight[self.part(site), columns.start : columns.stop] = matrix.to(self.weight)
        self.bias[self.part(site)] = linear.loc.to(self.bias)
        spread = (linear.scale_tril @ linear.scale_tril.T).diagonal().sqrt()
        self.log_scale[self.part(site)] = spread.log().to(self.bias)
        return True

    def begin(self, context, plates=None):
        return LogisticPass(self, context)


class LogisticPass(Pass):
    def __init__(self, module, context):
        self.module, self.depth = module, 0
        self.known = {}
        start = 0
        for node in module.block.context:
            size = len(module.columns[node.name])
            self.known[node.name] = context[..., start : start + size]
            start += size

    def next(self, priors=None):
        module, found = self.module, {}
        for site in module.block.levels[self.depth]:
            part = module.part(site)
            shift, scale = module.output_units(site)
            loc = module.bias[part]
            weight = (module.weight * module.mask)[part]
            for parent in module.block.parents[site]:
                columns = module.columns[parent]
                loc = loc + self.known[parent] @ weight[:, columns.start : columns.stop].T
            width = UNIT * module.width * scale * module.log_scale[part].exp()
            found[site] = Logistic(shift + scale * loc, width)
        return found

    def accept(self, values):
        for site, value in values.items():
            shift, scale = self.module.input_units(site)
            self.known[site] = (value - shift) / scale
        self.depth += 1
