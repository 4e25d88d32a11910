"""Plates from call to call: user's indices, batches of any size, loops over time; crossed plates with cells."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian_guides import set_exact_
from plated_guides import set_joint_
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork
from pyro_graphflows.guides import auto_faithful_guide

FEW = {"init": "random", "num_start_samples": 500}


def local(x, indices=None, full_size=None):
    """One latent variable for each datum; the caller may choose the batch."""
    with pyro.plate("data", full_size or len(x), subsample=indices):
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def set_local_(guide):
    guide.set_linear_("z", {"x": 0.8}, 0.2 * 0.5, math.sqrt(0.2))


def terms(x):
    return dist.Normal(0.5, math.sqrt(1.25)).log_prob(x)


def test_batches_of_the_users_own_indices_and_a_smaller_last_one():
    x = torch.randn(10)
    guide = auto_faithful_guide(local, x, **FEW)
    set_local_(guide)
    for vectorize in (False, True):
        options = {"num_particles": 2, "vectorize_particles": vectorize, "max_plate_nesting": 1}
        for batch in torch.arange(10).split(4):  # the last has two
            loss = Trace_ELBO(**options).loss(local, guide, x[batch], batch, 10)
            assert loss == pytest.approx(-float(terms(x[batch]).sum()) * 10 / len(batch))
        for n in (1, 3, 25):  # other data altogether
            other = torch.randn(n)
            assert Trace_ELBO(**options).loss(local, guide, other) == pytest.approx(
                -float(terms(other).sum())
            )


def test_plates_that_the_user_creates_are_shared_with_the_model():
    x = torch.randn(12)

    def model(x):
        with pyro.plate("data", len(x), subsample_size=5) as indices:
            z = pyro.sample("z", dist.Normal(0.5, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[indices])

    guide = auto_faithful_guide(
        model, x, create_plates=lambda x: pyro.plate("data", len(x), subsample_size=5), **FEW
    )
    set_local_(guide)
    for data in (x, torch.randn(20)):
        trace = poutine.trace(guide).get_trace(data)
        replayed = poutine.trace(poutine.replay(model, trace)).get_trace(data)
        indices = trace.nodes["data"]["value"]
        assert len(indices) == 5
        elbo = (replayed.log_prob_sum() - trace.log_prob_sum()).item()
        assert elbo == pytest.approx(float(terms(data[indices]).sum()) * len(data) / 5)


def hierarchical(x, indices=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 6, subsample=indices) as chosen:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[chosen])


def test_the_mean_over_all_batches_is_the_full_bound():
    """With a global site the bound of a batch is not exact, but its mean over batches is, for each global value."""
    x = torch.randn(6)
    guide = auto_faithful_guide(hierarchical, x, torch.tensor([0, 1]), **FEW)
    precision = 0.25 + 6 / 1.25
    mean = x.sum() / 1.25 / precision
    guide.set_linear_("mu", {}, float(mean), precision**-0.5)
    guide.set_linear_("z", {"mu": 0.2, "x": 0.8}, 0.0, math.sqrt(0.2))
    evidence = dist.MultivariateNormal(torch.zeros(6), 4.0 + 1.25 * torch.eye(6)).log_prob(x).item()
    drawn, held = poutine.trace(guide).get_trace(x, torch.tensor([0, 1])), poutine.Trace()
    held.add_node("mu", **drawn.nodes["mu"])
    losses = []
    for batch in itertools.combinations(range(6), 2):
        trace = poutine.trace(poutine.replay(guide, trace=held)).get_trace(x, torch.tensor(batch))
        replayed = poutine.trace(poutine.replay(hierarchical, trace)).get_trace(x, torch.tensor(batch))
        losses.append(replayed.log_prob_sum() - trace.log_prob_sum())
    assert torch.stack(losses).mean().item() == pytest.approx(evidence)


def cells(x):
    """Effects of rows and columns, and a latent variable for each cell."""
    rows, columns = (pyro.plate(n, x.shape[d], dim=d) for n, d in (("rows", -2), ("columns", -1)))
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, 0.7))
    with rows, columns:
        z = pyro.sample("z", dist.Normal(a + b, 0.5))
        pyro.sample("x", dist.Normal(z, 0.6), obs=x)


@pytest.mark.parametrize("order", ["auto", ["z", "b", "a"]])
def test_latents_of_crossed_plates_are_broadcast_into_cells(order):
    x = torch.randn(3, 4)
    guide = auto_faithful_guide(cells, x, inverse=order, **FEW)
    gain = 0.25 / (0.25 + 0.36)
    assert {guide.inverse.how[p, "z"] for p in ("a", "b")} == {"broadcast"}
    guide.set_linear_("z", {"a": 1 - gain, "b": 1 - gain, "x": gain}, 0.0, math.sqrt(0.36 * gain))
    # the effects given the data: a joint normal; noise of a cell is 0.61
    eye = torch.eye(7)
    design = torch.stack([eye[i] + eye[3 + j] for i in range(3) for j in range(4)])
    prior = torch.diag(torch.cat([torch.ones(3), torch.full((4,), 0.49)]))
    evidence = dist.MultivariateNormal(torch.zeros(12), design @ prior @ design.T + 0.61 * torch.eye(12))
    covariance = torch.linalg.inv(torch.linalg.inv(prior) + design.T @ design / 0.61)
    mean = covariance @ design.T @ x.reshape(-1) / 0.61
    parts = {"a": slice(0, 3), "b": slice(3, 7)}
    first, second = guide.inverse.sampling_order[:2]
    joint, given = parts[first], parts[second]
    set_joint_(guide, first, mean[joint], covariance[joint, joint])
    slope = torch.linalg.solve(covariance[joint, joint], covariance[joint, given]).T
    assert torch.allclose(slope, slope[:1, :1])  # balanced: what counts is the mean of the others
    variance = 1 / torch.linalg.inv(covariance)[given, given].diagonal()
    weights = {first: slope[:1]}
    guide.set_linear_(second, weights, 0.0, float(variance[0].sqrt()))
    index = next(i for i, block in enumerate(guide.plan.blocks) if second in block.sites)
    network = guide.blocks[index].conditionals
    width = network.output_units(second)[1]
    with torch.no_grad():
        table = network.table.table
        table.zero_()
        offset = mean[given] - slope @ mean[joint]
        table[..., 0] = (offset / width).reshape(table.shape[:-1])
    for vectorize in (False, True):
        options = {"num_particles": 3, "vectorize_particles": vectorize, "max_plate_nesting": 2}
        loss = Trace_ELBO(**options).loss(cells, guide, x)
        assert loss == pytest.approx(-evidence.log_prob(x.reshape(-1)).item())


T = 4


def state_space_network(chains=("",)):
    parents = {}
    for c in chains:
        for t in range(T):
            parents[f"z_{c}{t}"] = [f"z_{c}{t - 1}"] if t else []
            parents[f"x_{c}{t}"] = [f"z_{c}{t}"]
    return LinearGaussianNetwork(
        parents,
        {n: [0.9] * len(p) for n, p in parents.items()},
        dict.fromkeys(parents, 0.1),
        dict.fromkeys(parents, 0.7),
    )


def loop(x):
    with pyro.plate("data", len(x)):
        z = 0.0
        for t in range(T):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z + 0.1, 0.7))
            pyro.sample(f"x_{t}", dist.Normal(0.9 * z + 0.1, 0.7), obs=x[:, t])


def markov(x):
    with pyro.plate("data", len(x)):
        z = 0.0
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z + 0.1, 0.7))
            pyro.sample(f"x_{t}", dist.Normal(0.9 * z + 0.1, 0.7), obs=x[:, t])


def sequential(x):
    """The data in a loop over a sequential plate: each has sites of its own."""
    for i in pyro.plate("data", len(x)):
        z = 0.0
        for t in range(T):
            z = pyro.sample(f"z_{i}_{t}", dist.Normal(0.9 * z + 0.1, 0.7))
            pyro.sample(f"x_{i}_{t}", dist.Normal(0.9 * z + 0.1, 0.7), obs=x[i, t])


@pytest.mark.parametrize("model", [loop, markov])
@pytest.mark.parametrize("order", ["auto", "forward"])
def test_loops_over_time_are_exact(model, order):
    network = state_space_network()
    x = torch.as_tensor(network.sample(5, 1)[:, [network.names.index(f"x_{t}") for t in range(T)]])
    guide = set_exact_(auto_faithful_guide(model, x, inverse=order, **FEW), network)
    assert max(len(parents) for parents in guide.inverse.parents.values()) < T + 2
    for data in (x, x[:2]):
        exact = network.log_evidence(data.numpy()).sum()
        for vectorize in (False, True):
            options = {"num_particles": 2, "vectorize_particles": vectorize, "max_plate_nesting": 1}
            assert Trace_ELBO(**options).loss(model, guide, data) == pytest.approx(-exact)


def test_sequential_plates_are_unrolled():
    network = state_space_network()
    x = torch.as_tensor(network.sample(2, 1)[:, [network.names.index(f"x_{t}") for t in range(T)]])
    guide = auto_faithful_guide(sequential, x, **FEW)
    assert len(guide.inverse.parents) == 2 * T
    doubled = state_space_network(["0_", "1_"])
    set_exact_(guide, doubled)
    exact = network.log_evidence(x.numpy()).sum()
    assert Trace_ELBO().loss(sequential, guide, x) == pytest.approx(-exact)


def test_batches_train():
    x = torch.randn(30)
    guide = auto_faithful_guide(local, x[:4], **FEW)
    svi = SVI(local, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for batch in torch.randperm(30).split(8):
        assert math.isfinite(svi.step(x[batch], batch, 30))
