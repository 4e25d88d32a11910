"""Every estimator, vectorised or not, subsampled or not, with every inverse: the exact posterior gives the evidence.

What is left out is no bound: RenyiELBO over subsampled plates (``check_guide`` says so, which is tested here), the sum
over a batch of a model with a global site (its mean over batches is, see ``test_guides_plate_calls.py``). A mixture is
exact with its discrete site first, whatever order is asked of the rest.
"""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_guides import CENTRES, WEIGHTS, exact_mixture_guide, mixture_evidence
from linear_gaussian_guides import chain, collider, four_cycle, set_exact_
from plated_guides import exact_hierarchical, hierarchical, set_hierarchical_
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from pyro_graphflows.graphs.library import binary_tree
from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork
from pyro_graphflows.guides import Flow, auto_faithful_guide, check_guide
from pyro_graphflows.infer import IWAE_ELBO, log_evidence

pytestmark = pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites:UserWarning")

FLOW = Flow(units_per_variable=2, conditioner_units=2)
FULL_SIZE = 40


COVARIATE = "data['w']"  # as the guide names what the model takes as an argument


def regression():
    """A chain z -> u -> y with a covariate on both ends."""
    return LinearGaussianNetwork(
        {COVARIATE: [], "z": [COVARIATE], "u": ["z"], "y": ["u", COVARIATE]},
        {COVARIATE: [], "z": [2.0], "u": [1.0], "y": [1.0, -1.0]},
        dict.fromkeys([COVARIATE, "z", "u", "y"], 0.0),
        {COVARIATE: 1.0, "z": 1.0, "u": 0.5, "y": 0.7},
        observed=[COVARIATE, "y"],
    )


NETWORKS = {
    "chain": chain,
    "collider": collider,
    "tree": lambda: binary_tree(3, seed=1),
    "cycle": four_cycle,
    "regression": regression,
}


def model_of(network):
    """The network as a model of batches; the covariate is an argument and no site."""
    sites = network.pyro_model()._sites

    def model(data, size=None):
        values = {COVARIATE: data["w"], **data} if "w" in data else dict(data)
        with pyro.plate("data", size or len(data["n"]), subsample_size=len(data["n"])):
            for name, terms, intercept, scale, _ in sites:
                if name != COVARIATE:
                    loc = intercept + sum(c * values[parent] for parent, c in terms)
                    loc = torch.as_tensor(loc, dtype=torch.double)
                    values[name] = pyro.sample(name, dist.Normal(loc, float(scale)), obs=data.get(name))

    return model


def problem(name):
    network = NETWORKS[name]()
    values = torch.tensor(network.sample(5, 3))
    data = {name: values[:, network.names.index(name)] for name in network.observed}
    terms = torch.tensor(network.log_evidence(torch.stack([data[o] for o in network.observed], -1).numpy()))
    if COVARIATE in data:
        data["w"] = data.pop(COVARIATE)
        terms = terms - dist.Normal(0.0, 1.0).log_prob(data["w"])
    return network, model_of(network), {**data, "n": torch.zeros(5)}, float(terms.sum())


def estimators(vectorize, subsampled):
    options = {"num_particles": 2, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    for elbo in (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO):
        yield elbo(**options)
    if not subsampled:
        yield RenyiELBO(0.0, **options)
    yield IWAE_ELBO(3)


def check_all(model, guide, data, exact, analytic=True):
    """Compare every estimator with the evidence, on the full data and on a batch of more."""
    for size in (None, FULL_SIZE):
        right = -exact * (1 if size is None else size / 5)
        for vectorize in (False, True):
            for loss in estimators(vectorize, size is not None):
                assert loss.loss(model, guide, data, size) == pytest.approx(right, abs=1e-7), type(loss)
            if analytic:  # analytic KL terms have a variance
                many = TraceMeanField_ELBO(40 if vectorize else 1, 1, vectorize_particles=vectorize)
                found = torch.tensor([many.loss(model, guide, data, size) for _ in range(12)])
                # t with 11 degrees of freedom: beyond 8 once in 10^5
                error = float(found.std()) / math.sqrt(12)
                assert float(found.mean()) == pytest.approx(right, abs=8 * error + 1e-7)
    for loss in (*estimators(False, False), TraceMeanField_ELBO()):
        assert check_guide(model, guide, loss, data).safe
    assert not check_guide(model, guide, RenyiELBO, data, FULL_SIZE).safe


@pytest.mark.parametrize("order", ["forward", "reverse", "min_fill"])
@pytest.mark.parametrize("name", NETWORKS)
def test_normal_guides(name, order):
    network, model, data, exact = problem(name)
    guide = set_exact_(auto_faithful_guide(model, data, inverse=order, init="random"), network)
    check_all(model, guide, data, exact)
    found = log_evidence(model, guide, data, num_particles=2)
    assert found.log_evidence.sum().item() == pytest.approx(exact)


@pytest.mark.parametrize("flow", ["faithful", "graphical"])
@pytest.mark.parametrize("order", ["forward", "reverse", "min_fill"])
def test_flow_guides(order, flow):
    """The other networks are in test_guides_conditionals_flow.py."""
    network, model, data, exact = problem("regression")
    family = dataclasses.replace(FLOW, form=flow)
    options = {"family": family, "inverse": order, "init": "random"}
    check_all(model, set_exact_(auto_faithful_guide(model, data, **options), network), data, exact)


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_a_mixture(family):
    def model(data, size=None):
        with pyro.plate("data", size or len(data), subsample_size=len(data)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
            z = pyro.sample("z", dist.Normal(CENTRES[k], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=data)

    x = 2 * torch.randn(5)
    exact = mixture_evidence(x).sum().item()
    for order in ("auto", ["z", "k"]):
        guide = exact_mixture_guide(x, model, family=family, inverse=order)
        for size in (None, FULL_SIZE):
            right = -exact * (1 if size is None else size / 5)
            for vectorize in (False, True):
                for loss in estimators(vectorize, size is not None):
                    assert loss.loss(model, guide, x, size) == pytest.approx(right, abs=1e-7), type(loss)


@pytest.mark.parametrize("family", ["normal", "flow"])
@pytest.mark.parametrize("order", ["forward", "reverse", "min_fill"])
def test_a_hierarchical_model(order, family):
    x = torch.randn(5) + 1.0
    options = {"family": FLOW} if family == "flow" else {}
    guide = auto_faithful_guide(hierarchical, x, inverse=order, init="random", **options)
    if family == "flow":
        exact = set_hierarchical_flow_(guide, x)
    else:
        exact = set_hierarchical_(guide, x)
    for vectorize in (False, True):
        options = {"num_particles": 3, "vectorize_particles": vectorize, "max_plate_nesting": 1}
        for elbo in (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, RenyiELBO):
            assert elbo(**options).loss(hierarchical, guide, x) == pytest.approx(-exact)
    for outer in (1, 3):  # the particles of the local sites are given one and the same global value
        loss = IWAE_ELBO(4, num_outer_particles=outer)
        assert loss.loss(hierarchical, guide, x) == pytest.approx(-exact)
        assert check_guide(hierarchical, guide, loss, x).safe
    assert check_guide(hierarchical, guide, RenyiELBO, x).safe


def two_levels(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 2, dim=-2):
        a = pyro.sample("a", dist.Normal(m, 1.0))
        with pyro.plate("data", 3, dim=-1):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(a, 1.0)), 1.0), obs=x)


def one_group_at_a_time(x):
    with pyro.plate("groups", 2, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3, dim=-1):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(a, 1.0)), 1.0), obs=x)


@pytest.mark.parametrize("model", [two_levels, one_group_at_a_time])
def test_renyi_weighs_whatever_shares_a_latent_together(model):
    """The weight of a draw is its product over the plates that not all sites are in: a bound, with its gradient."""
    x = torch.randn(2, 3)
    guide = auto_faithful_guide(model, x)
    assert check_guide(model, guide, RenyiELBO, x).safe
    parameters = list(guide.parameters())
    seed = torch.get_rng_state()
    found = RenyiELBO(0.0, num_particles=4).loss_and_grads(model, guide, x)
    gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
    guide.zero_grad()
    torch.set_rng_state(seed)
    log_weights = []
    for _ in range(4):
        drawn = poutine.trace(guide).get_trace(x)
        replayed = poutine.trace(poutine.replay(model, drawn)).get_trace(x)
        total = 0.0
        for trace, sign in ((replayed, 1), (drawn, -1)):
            trace.compute_log_prob()
            for name in "mazx":
                if name in trace.nodes:
                    log_prob = trace.nodes[name]["log_prob"]
                    total = total + sign * (
                        log_prob.sum(-1) if model is one_group_at_a_time else log_prob.sum()
                    )
        log_weights.append(total)
    loss = -(torch.stack(log_weights).logsumexp(0) - math.log(4)).sum()
    loss.backward()
    assert found == pytest.approx(loss.item())
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient is None or torch.allclose(gradient, parameter.grad)


def set_hierarchical_flow_(guide, x):
    """As for normals; the per-element parameters of a flow shift its last affine map."""
    mean, scale, evidence = exact_hierarchical(x)
    guide.set_linear_("mu", {}, float(mean), float(scale))
    guide.set_linear_("z", {"mu": 0.2, "x": 0.8}, 0.0, math.sqrt(0.2))
    return evidence
