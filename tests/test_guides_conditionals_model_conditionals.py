"""The model's own distributions at given values, by one run that nobody sees; and which sites can be fused."""

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import nn

from pyro_graphflows import faithful_inverse, get_model_graph
from pyro_graphflows.distributions.coordinates import gaussian_coordinate
from pyro_graphflows.distributions.fusion import fuse
from pyro_graphflows.distributions.normal_tails import HALF_LOG_TWO_PI
from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.guides.conditionals.model_conditionals import ModelConditionals, same_distribution
from pyro_graphflows.guides.fusion import fusible_sites


class Schools:
    """A hierarchy with a learnable scale, which counts how often its likelihood is computed."""

    def __init__(self):
        self.likelihoods = 0

    def __call__(self, y):
        width = pyro.param("width", torch.tensor(5.0), constraint=dist.constraints.positive)
        tau = pyro.sample("tau", dist.HalfCauchy(width))
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            self.likelihoods += 1
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


Y = torch.tensor([28.0, 8.0, -3.0])


def test_distributions_gradients_and_no_likelihood():
    model = Schools()
    priors = ModelConditionals(model)
    mu, tau = torch.tensor(1.5).requires_grad_(), torch.tensor(0.7).requires_grad_()
    found = priors(["tau", "theta"], (Y,), latents={"mu": mu, "tau": tau})
    assert priors.runs == 1
    assert model.likelihoods == 0
    assert list(found) == ["tau", "theta"]
    assert found["theta"].batch_shape == (3,)
    value = torch.randn(3)
    got = torch.autograd.grad(found["theta"].log_prob(value).sum(), (mu, tau))
    wanted = torch.autograd.grad(dist.Normal(mu, tau).log_prob(value).sum(), (mu, tau))
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    free = pyro.get_param_store()._params["width"]
    (gradient,) = torch.autograd.grad(found["tau"].log_prob(torch.tensor(2.0)), free)
    assert gradient != 0


def test_the_same_twice():
    priors = ModelConditionals(Schools())
    latents = {"mu": torch.tensor(1.0), "tau": torch.tensor(2.0)}
    assert priors.is_repeatable(["mu", "theta"], (Y,), latents=latents) == {"mu": True, "theta": True}
    assert priors.runs == 2
    dropout = nn.Dropout(0.5)

    def random(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(dropout(mu.expand(50)).sum(), 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    assert ModelConditionals(random).is_repeatable(
        ["mu", "w"], (Y[0],), latents={"mu": torch.tensor(1.0)}
    ) == {
        "mu": True,
        "w": False,
    }
    with torch.no_grad():
        state = torch.get_rng_state()
        priors(["theta"], (Y,), latents={})
        assert torch.equal(state, torch.get_rng_state())  # placeholders are not drawn


def test_same_distribution():
    transformed = [
        dist.TransformedDistribution(
            dist.Normal(0.0, torch.ones(2)), dist.transforms.AffineTransform(m, 1.0)
        ).mask(True)
        for m in (torch.zeros(2), torch.zeros(2), torch.tensor([0.0, 1.0]))
    ]
    assert same_distribution(transformed[0], transformed[1])
    assert not same_distribution(transformed[0], transformed[2])
    assert not same_distribution(dist.Normal(0.0, 1.0), dist.Laplace(0.0, 1.0))
    assert not same_distribution(dist.Normal(0.0, 1.0), dist.Normal(0.0, 1.0).expand([2]))


def test_outer_handlers_see_nothing():
    priors = ModelConditionals(Schools())
    latents = {"mu": torch.tensor(1.0), "tau": torch.tensor(2.0)}
    with (
        poutine.trace() as trace,
        poutine.trace(param_only=True) as params,
        poutine.condition(data={"theta": torch.zeros(3), "mu": torch.tensor(100.0)}),
        poutine.scale(scale=3.0),
    ):
        found = priors(["theta"], (Y,), latents=latents)
    names = [name for t in (trace, params) for name in t.trace.nodes if not name.startswith("_")]
    assert names == []
    assert (found["theta"].loc == 1.0).all()
    assert not _PYRO_STACK
    assert not any(_DIM_ALLOCATOR._stack)


def test_value_of_the_wanted_site_does_not_matter():
    """A site may be among the latents and wanted at once (scoring a value); later sites see its value."""

    def chain():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("c", dist.Normal(b, 1.0))
        raise AssertionError("the run goes on")

    found = ModelConditionals(chain)(["a", "c"], latents={"a": torch.tensor(4.0), "b": torch.tensor(7.0)})
    assert found["a"].loc == 0.0
    assert found["c"].loc == 7.0


def test_placeholders_have_the_type_of_their_site():
    """The run passes sites of every kind that have no value yet, on which nothing wanted depends."""
    seen = []

    def model():
        half = torch.tensor(0.5, dtype=torch.float32)
        seen.append(pyro.sample("a", dist.Normal(half, half).expand([2]).to_event(1)))
        seen.append(pyro.sample("b", dist.HalfCauchy(half)))
        seen.append(pyro.sample("c", dist.Dirichlet(half.expand(3))))
        seen.append(pyro.sample("d", dist.Poisson(half)))
        seen.append(pyro.sample("e", dist.Bernoulli(half)))
        seen.append(pyro.sample("f", dist.LKJCholesky(2, half)))
        pyro.sample("g", dist.Normal(half, half))

    ModelConditionals(model)(["g"], latents={})
    assert {value.dtype for value in seen} == {torch.float32}
    assert [tuple(value.shape) for value in seen] == [(2,), (), (3,), (), (), (2, 2)]


def test_a_model_that_catches_exceptions_is_ended_too():
    def model():
        try:
            pyro.sample("a", dist.Normal(0.0, 1.0))
        except Exception:
            pytest.fail("the end of the run was caught")

    assert ModelConditionals(model)(["a"], latents={})["a"].scale == 1.0


def test_observations_before_latents():
    def model(x=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(a, 1.0), obs=x)
        b = pyro.sample("b", dist.Normal(x, 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(0.0))

    priors = ModelConditionals(model)
    assert priors(["b"], (torch.tensor(3.0),), latents={"a": torch.tensor(0.0)})["b"].loc == 3.0
    assert priors(["b"], kwargs={"x": torch.tensor(2.0)}, latents={})["b"].loc == 2.0
    observed = {"x": torch.tensor(5.0)}
    assert priors(["b"], latents={}, observed=observed)["b"].loc == 5.0
    assert priors(["b"], (torch.tensor(3.0),), latents={}, observed=observed)["b"].loc == 5.0


def test_subsampling():
    x = torch.arange(10.0)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(mu + x[index], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    priors = ModelConditionals(model)
    index = torch.tensor([7, 2, 5])
    found = priors(["z"], (x,), latents={"mu": torch.tensor(100.0)}, indices={"data": index})
    assert found["z"].loc.tolist() == [107.0, 102.0, 105.0]
    with pytest.raises(UnsupportedModelError, match="indices of the subsampled plate 'data'"):
        priors(["z"], (x,), latents={"mu": torch.tensor(100.0)})
    assert priors(["mu"], (x,), latents={})["mu"].loc == 0.0  # the run ends before the plate


def test_particles_on_the_left():
    """Inside vectorised particles, as in a step of Pyro's ELBOs."""
    shapes = []
    priors = ModelConditionals(Schools())

    def guide(y):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        theta = priors(["theta"], (y,), latents={"mu": mu, "tau": tau})["theta"]
        shapes.append((mu.shape, theta.batch_shape))
        with pyro.plate("schools", len(y)):
            pyro.sample("theta", dist.Normal(theta.loc, theta.scale))

    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    SVI(Schools(), guide, pyro.optim.Adam({"lr": 0.1}), elbo).step(Y)
    assert shapes[-1] == ((5, 1), (5, 3))
    assert priors.runs == len(shapes)


def test_enumeration_marks_are_cleared():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 2 * k, 1.0), obs=x)

    priors = ModelConditionals(model)

    def guide(x):
        prior = priors(["z"], (x,), latents={})["z"]
        assert prior.batch_shape == (2,)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.9 * prior.scale))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    assert torch.isfinite(torch.tensor(elbo.loss(model, guide, torch.tensor([0.0, 2.0]))))


def test_inside_the_models_plates_it_is_refused():
    priors = ModelConditionals(Schools())
    with (
        pyro.plate("schools", 3),
        pytest.raises(UnsupportedModelError, match="before the guide enters its plates"),
    ):
        priors(["theta"], (Y,), latents={"mu": Y[0], "tau": Y[0]})

    def fixed():
        with pyro.plate("rows", 3, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pyro.plate("other", 3), pytest.raises(UnsupportedModelError, match="collide"):
        ModelConditionals(fixed)(["z"], latents={})
    assert not any(_DIM_ALLOCATOR._stack)
    assert not _PYRO_STACK


def test_refusals():
    priors = ModelConditionals(Schools())
    with pytest.raises(UnsupportedModelError, match="latent sites nothing"):
        priors(["nothing"], (Y,), latents={})
    with pytest.raises(UnsupportedModelError, match="no data for 'y'"):
        priors(["y"], (Y,), latents={})
    assert priors([], (Y,), latents={}) == {}
    assert priors.runs == 2
    with pytest.raises(ZeroDivisionError):
        ModelConditionals(lambda: 1 / 0)(["z"], latents={})
    assert not _PYRO_STACK


def test_sequential_plates():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("rows", 4):
            mu = pyro.sample(f"z_{i}", dist.Normal(mu, 1.0))
        raise AssertionError("the run goes on")

    found = ModelConditionals(model)(
        ["z_1", "z_3"], latents={"z_0": torch.tensor(2.0), "z_2": torch.tensor(5.0)}
    )
    assert found["z_1"].loc == 2.0
    assert found["z_3"].loc == 5.0
    assert not _PYRO_STACK
    with pyro.plate("rows", 4):  # not left open
        pass


@pytest.mark.parametrize("registered", [False, True])
def test_batch_norm_is_kept_and_gradients_flow(registered):
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()

    def model(x):
        net = pyro.module("net", network) if registered else network
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            b = pyro.sample("b", dist.Normal(net(a), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=x)

    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    objects = [id(buffer) for buffer in network.buffers()]
    a = torch.randn(5, 2).requires_grad_()
    found = ModelConditionals(model)(["b"], (torch.zeros(5),), latents={"a": a})
    assert objects == [id(buffer) for buffer in network.buffers()]
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())
    out = network(a)  # the model's own run, which updates them
    assert not torch.equal(before["1.running_mean"], network[1].running_mean)
    (out.sum() + found["b"].base_dist.loc.square().sum()).backward()
    assert torch.isfinite(a.grad).all()
    assert network[0].weight.grad.abs().sum() > 0


def test_gradient_of_a_learnable_prior_scale():
    """The ELBO of a guide that is the prior: its derivative in the model's parameter, as of the exact evidence."""
    x = torch.tensor(1.7)

    def model(x):
        width = pyro.param("width", torch.tensor(2.0))
        z = pyro.sample("z", dist.Normal(0.0, width))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    priors = ModelConditionals(model)

    def guide(x):
        prior = priors(["z"], (x,), latents={})["z"]
        precision = prior.scale**-2 + 1.0  # the exact posterior, from the prior's scale
        pyro.sample("z", dist.Normal(x / precision, precision**-0.5))

    loss = Trace_ELBO().differentiable_loss(model, guide, x)
    width = pyro.param("width")
    evidence = dist.Normal(0.0, (1 + width**2).sqrt()).log_prob(x)
    assert torch.allclose(-loss, evidence)
    got, wanted = (torch.autograd.grad(f, width, retain_graph=True)[0] for f in (-loss, evidence))
    assert torch.allclose(got, wanted)


def test_fused_with_the_priors_of_the_model_a_conjugate_hierarchy_is_exact():
    """All parts together: log p(theta, y | mu, tau) - log q(theta) = log p(y | mu, tau), whatever tau."""
    priors = ModelConditionals(Schools())
    mu = torch.randn(200, 1)
    tau = torch.exp(torch.linspace(-20.0, 10.0, 200)).unsqueeze(-1)
    prior = gaussian_coordinate(priors(["theta"], (Y,), latents={"mu": mu, "tau": tau})["theta"])
    assert not prior.standard
    loc, log_scale = fuse(prior.loc, prior.scale.log(), Y, torch.full((3,), 10.0).log())
    noise = torch.randn(200, 3)
    u = loc + log_scale.exp() * noise
    theta = prior.transform(u)
    log_q = -0.5 * noise.square() - log_scale - HALF_LOG_TWO_PI
    log_p = dist.Normal(mu, tau).log_prob(theta) + dist.Normal(theta, 10.0).log_prob(Y)
    exact = dist.Normal(mu, (tau.square() + 100.0).sqrt()).log_prob(Y)
    assert torch.allclose(log_p - log_q, exact, atol=1e-5)
    assert torch.allclose((log_p - log_q)[60:], exact[60:], atol=1e-10)


def hierarchy(**kwargs):
    return ModelGraph(
        [("tau", "theta"), ("mu", "theta"), ("theta", "x")],
        observed=["x"],
        plates={"theta": ["schools"], "x": ["schools"]},
        **kwargs,
    )


def test_fusible_in_a_hierarchy():
    graph = hierarchy()
    plan = fusible_sites(graph, faithful_inverse(graph, "reverse"))
    assert all(site.fusible for site in plan.sites.values())
    assert [set(run) for run in plan.runs] == [{"tau", "mu"}, {"theta"}]
    assert plan.stages == (0, 2)
    assert plan.depth == 1
    bottom_up = InverseGraph(graph, {"theta": ["x"], "tau": ["theta", "x"], "mu": ["tau", "theta", "x"]})
    forward = fusible_sites(graph, bottom_up)
    assert not forward.sites["theta"].fusible
    assert forward.sites["mu"].fusible  # no latent parents
    assert forward.depth == 0


def test_fusible_agrees_with_a_rule_written_otherwise():
    """All small DAGs in two orders: fused iff the latent parents come first; runs are as few as greedy search finds."""
    graphs = [
        nx.DiGraph([(f"z{i}", f"z{j}") for (i, j), keep in zip(pairs, bits, strict=True) if keep])
        for pairs in [[(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]]
        for bits in [[(n >> k) & 1 for k in range(6)] for n in range(1, 64)]
    ]
    for dag in graphs:
        dag.add_nodes_from([f"z{i}" for i in range(4)])
        dag.add_edges_from((f"z{i}", "x") for i in range(4))
        graph = ModelGraph(dag, observed=["x"])
        for order in ("reverse", ["z2", "z0", "z3", "z1"]):
            inverse = faithful_inverse(graph, order)
            plan = fusible_sites(graph, inverse)
            place = {site: i for i, site in enumerate(inverse.sampling_order)}
            for site in graph.latent:
                parents = list(dag.predecessors(site))
                assert plan.sites[site].fusible == all(place[p] < place[site] for p in parents)
                if plan.sites[site].fusible:
                    depth = plan.sites[site].depth
                    assert site in plan.runs[depth]
                    assert all(place[p] < plan.stages[depth] for p in parents) or not parents
                    assert plan.stages[depth] <= place[site]
                    assert (depth == 0) == (not parents)


def test_depth_of_a_chain_and_of_stages():
    graph = ModelGraph([("a", "b"), ("b", "c"), ("a", "d"), ("c", "x"), ("d", "x")], observed=["x"])
    inverse = faithful_inverse(graph, "reverse")
    plan = fusible_sites(graph, inverse, stages=[["a"], ["b"], ["c"], ["d"]])
    assert plan.runs == (("a",), ("b", "d"), ("c",))  # the run for b serves d as well
    together = fusible_sites(graph, inverse, stages=[["a"], ["b", "c"], ["d"]])
    assert together.sites["c"].reason == "its model parent 'b' is sampled after it"
    with pytest.raises(GraphflowsError, match="each once"):
        fusible_sites(graph, inverse, stages=[["a"], ["b"]])


def test_obstacles():
    summed = hierarchy(marginalised=["tau"])
    plan = fusible_sites(summed, faithful_inverse(summed, "reverse"))
    assert plan.sites["theta"].reason == "its model parent 'tau' is summed over or enumerated"
    graph = hierarchy()
    inverse = faithful_inverse(graph, "reverse")
    plan = fusible_sites(
        graph, inverse, enumerated=["mu"], excluded={"tau": "its prior has no Gaussian coordinate"}
    )
    assert plan.sites["theta"].reason == "its model parent 'mu' is summed over or enumerated"
    assert plan.sites["mu"].reason == "it is enumerated"
    assert plan.sites["tau"].reason == "its prior has no Gaussian coordinate"
    assert plan.sites["tau"].depth is None
    names = ["tau", "mu", "theta"]
    unread = InverseGraph(graph, {name: ["x"] for name in names}, order="mean_field", sampling_order=names)
    reason = fusible_sites(graph, unread).sites["theta"].reason
    assert reason == "its model parents 'tau', 'mu' are not among its parents in the inverse 'mean_field'"
    pooled = ModelGraph([("z", "w"), ("w", "x")], observed=["x"], plates={"z": ["data"]})
    inner_first = InverseGraph(pooled, {"z": ["x"], "w": ["z", "x"]})
    reason = fusible_sites(pooled, inner_first).sites["w"].reason
    assert reason == "its model parent 'z' is in a plate that it is not in"


def test_distributions_known_at_a_depth_do_not_depend_on_later_sites():
    """What fusible_sites promises, against the model: priors of each run are the same whatever later sites are."""

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Gamma(2.0, a.exp()))
        c = pyro.sample("c", dist.Normal(a, b))
        d = pyro.sample("d", dist.Normal(c * a, 1.0))
        pyro.sample("x", dist.Normal(c + d, 1.0), obs=x)

    x = torch.tensor(1.0)
    graph = get_model_graph(model, (x,))
    priors = ModelConditionals(model)
    for order in ("reverse", "forward", ["c", "d", "a", "b"]):
        inverse = faithful_inverse(graph, order)
        plan = fusible_sites(graph, inverse)
        full = {
            s: v["value"] for s, v in poutine.trace(model).get_trace(x).nodes.items() if s in graph.latent
        }
        for run, stage in zip(plan.runs, plan.stages, strict=True):
            given = {site: full[site] for site in inverse.sampling_order[:stage]}
            known, everything = priors(run, (x,), latents=given), priors(run, (x,), latents=full)
            assert all(same_distribution(known[site], everything[site]) for site in run)
