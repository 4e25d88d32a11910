"""Exact guides of discrete models: tables by summing over all assignments, and a mixture of normals."""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_graphflows.guides import auto_faithful_guide

WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.double)
CENTRES = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.double)


def assignments(model):
    """Return all assignments of a model's sites as a dict of vectors, and the log-joint of each.

    The model takes the number of data (an ``int``) and has all its sites in one plate of that size.
    """
    trace = poutine.trace(poutine.uncondition(model)).get_trace(1)
    sites = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    }
    supports = [site["fn"].enumerate_support(expand=False)[:, 0] for site in sites.values()]
    indices = torch.tensor(list(itertools.product(*(range(len(s)) for s in supports))))
    values = {name: s[i] for name, s, i in zip(sites, supports, indices.T, strict=True)}
    conditioned = poutine.trace(poutine.condition(poutine.uncondition(model), values)).get_trace(len(indices))
    conditioned.compute_log_prob()
    return values, sum(conditioned.nodes[name]["log_prob"] for name in sites)


def keys(values, names):
    """Return a number for each distinct combination of some sites' values."""
    if not names:
        return torch.zeros(len(next(iter(values.values()))), dtype=torch.long)
    columns = torch.cat([values[n].reshape(len(values[n]), -1).double() for n in names], -1)
    return columns.unique(dim=0, return_inverse=True)[1]


def conditional(values, log_joint, site, parents):
    """Return log p(site | parents) at each assignment."""

    def total(names):
        index = keys(values, names)
        return torch.zeros(int(index.max()) + 1).index_add(0, index, log_joint.exp())[index].log()

    return total([site, *parents]) - total(parents)


def set_tables_(guide, model):
    """Set the factor of each site to the exact conditional given its parents in the inverse.

    The outputs of a network are linear in its last layer, which is solved for the outputs wanted: exact if there are
    at least as many hidden units as distinct values of the parents.
    """
    values, log_joint = assignments(model)
    for index, block in enumerate(guide.plan.blocks):
        for site in block.sites:
            _set_table_(guide, index, site, values, log_joint)
    return guide


def _set_table_(guide, index, site, values, log_joint):
    block = guide.blocks[index].conditionals
    block.set_fusing_(site, False)
    encoding = guide._sites[site].encoding
    parents = list(guide.plan.blocks[index].parents[site])
    first = keys(values, parents)
    rows = torch.tensor([int((first == i).nonzero()[0, 0]) for i in range(int(first.max()) + 1)])
    given = {name: value[rows] for name, value in values.items()}
    log_p = []  # of each class at each configuration of the parents
    exact = conditional(values, log_joint, site, parents)
    columns = torch.eye(encoding.num_classes) if encoding.num_classes > 1 else torch.tensor([[0.0], [1.0]])
    classes = encoding.decode(columns)
    for value in classes:
        same = (values[site] == value).reshape(len(first), -1).all(-1)
        log_p.append(torch.stack([exact[same & (first == i)][0] for i in range(len(rows))]))
    log_p = torch.stack(log_p, -1)
    targets = log_p[:, 1:] - log_p[:, :1] if encoding.num_classes == 1 else log_p
    inputs = torch.zeros(len(rows), block.network.input_dim)
    parts = []
    for name in guide.blocks[index].inputs.names:
        if name in guide._sites:
            parts.append(guide._sites[name].encoding.encode(given[name], torch.double))
        else:
            parts.append(guide.blocks[index].inputs.encodings.flat(name, given[name]))
    if parts:
        context = guide.blocks[index].inputs.features(torch.cat(parts, -1))
        inputs[:, : context.shape[-1]] = context
    for name in block.block.sites:
        if name in parents:
            inputs[:, list(block.columns[name])] = guide._sites[name].encoding.encode(
                given[name], torch.double
            )
    solve_(block.network, block.outputs[site], inputs, targets)


def solve_(network, rows, inputs, targets):
    """Set the last layer of a masked network so that some outputs have given values at given inputs."""
    parameters = [network.skip.weight, network.skip.bias, network.layers[-1].weight]
    network.set_linear_(
        rows, torch.zeros(rows.stop - rows.start, network.input_dim), torch.zeros(rows.stop - rows.start)
    )
    outputs = network(inputs)[..., rows, 0]
    assert outputs.abs().max() < 1e-12
    jacobian = torch.stack(
        [
            torch.cat([g[rows].flatten() for g in torch.autograd.grad(out, parameters, retain_graph=True)])
            for out in outputs.flatten()
        ]
    )
    solution = torch.linalg.lstsq(jacobian, targets.flatten().unsqueeze(-1), driver="gelsd").solution[:, 0]
    start = 0
    with torch.no_grad():
        for parameter in parameters:
            size = parameter[rows].numel()
            parameter[rows] = solution[start : start + size].reshape(parameter[rows].shape)
            start += size
    torch.testing.assert_close(network(inputs)[..., rows, 0].detach(), targets, atol=1e-8, rtol=0)


def mixture(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        z = pyro.sample("z", dist.Normal(CENTRES[k], 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def mixture_evidence(x):
    return (WEIGHTS.log() + dist.Normal(CENTRES, math.sqrt(1.25)).log_prob(x.unsqueeze(-1))).logsumexp(-1)


def exact_mixture_guide(x, model=mixture, **options):
    guide = auto_faithful_guide(model, x, init="random", **options)
    logits = WEIGHTS.log() - CENTRES**2 / 2.5
    guide.set_linear_("k", {"x": CENTRES.unsqueeze(-1) / 1.25}, logits)
    guide.set_linear_("z", {"k": 0.2 * CENTRES.unsqueeze(0), "x": 0.8}, 0.0, math.sqrt(0.2))
    return guide
