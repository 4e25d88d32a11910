"""GraphicalFlowPrior at a sample site: shapes, plates, structure, both directions differentiable."""

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import ModelGraph
from pyro_graphflows.transforms import GraphicalFlowPrior

COLLIDER = nx.DiGraph([("a", "c"), ("b", "c")])
FLOWS = ("faithful", "graphical")


def excite(prior, size=0.5):
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            if "raw_beta" not in name:
                parameter.add_(size * torch.randn_like(parameter))
    return prior


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("closed_form", ["density", "sampling"])
def test_normalises(flow, closed_form):
    """The density integrates to one on a grid."""
    prior = excite(
        GraphicalFlowPrior(nx.DiGraph([("a", "b")]), flow=flow, closed_form=closed_form, num_blocks=2), 0.2
    )
    q = prior()
    with torch.no_grad():
        sample = q.sample((2000,))
        loc, scale = sample.mean(0), sample.std(0)
        grid = torch.linspace(-8, 8, 401)
        points = torch.cartesian_prod(grid, grid) * scale + loc
        mass = q.log_prob(points).exp().sum() * (16 / 400) ** 2 * scale.prod()
    assert abs(mass.item() - 1) < 1e-3


def test_the_faithful_prior_has_the_graphs_independences():
    """In a collider the two causes are independent: the log-density has no cross-derivative, exactly."""
    prior = excite(GraphicalFlowPrior(COLLIDER, num_blocks=6))

    def marginal(ab):
        # log p(a) + log p(b), the terms of the roots
        z = torch.cat([ab[:1], torch.zeros(1), ab[1:]])
        eps, log_diag = prior.flow.inverse_terms(z)
        return (dist.Normal(0.0, 1.0).log_prob(eps) - log_diag)[[0, 2]].sum()

    assert prior.structure.names == ("a", "c", "b")
    hessian = torch.autograd.functional.hessian(marginal, torch.randn(2))
    assert hessian[0, 1] == 0
    assert hessian[0, 0] != 0


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, RenyiELBO])
@pytest.mark.parametrize("vectorized", [False, True])
def test_trains_inside_a_plate(flow, loss, vectorized):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.prior = GraphicalFlowPrior(COLLIDER, flow=flow, num_blocks=2)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior())
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    model = Model()
    x = torch.randn(20, 3)
    guide = AutoNormal(model)
    guide(x)
    elbo = loss(num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1)
    before = {name: p.detach().clone() for name, p in model.prior.named_parameters()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    losses = [svi.step(x) for _ in range(5)]
    assert all(torch.isfinite(torch.tensor(losses)))
    changed = [name for name, p in model.prior.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) == len(before)


@pytest.mark.parametrize("flow", FLOWS)
def test_samples_are_differentiable_in_the_parameters(flow):
    prior = excite(GraphicalFlowPrior(COLLIDER, flow=flow, num_blocks=2), 0.1)
    prior().rsample((10,)).pow(2).sum().backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_plates_and_expansion_give_independent_copies():
    prior = excite(GraphicalFlowPrior(COLLIDER))

    def model():
        pyro.module("prior", prior)
        with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
            return pyro.sample("z", prior())

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    assert z.shape == (4, 3, 3)
    assert len(set(z[..., 0].flatten().tolist())) == 12
    assert trace.nodes["z"]["log_prob"].shape == (4, 3)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], prior().log_prob(z.detach()))


def test_of_a_model_graph_the_latent_nodes_are_taken():
    graph = ModelGraph(
        [("w", "z"), ("z", "y"), ("u", "z"), ("z", "x")],
        observed=["x", "y"],
        inputs=["w"],
        event_sizes={"z": 2},
    )
    prior = excite(GraphicalFlowPrior(graph))
    assert prior.structure.names == ("u", "z[0]", "z[1]")
    assert prior.structure.context_names == ("w",)
    context = torch.randn(7, 1)
    q = prior(context)
    assert (q.batch_shape, q.event_shape) == ((7,), (3,))
    z = q.rsample()
    parts = prior.split(z)
    assert {node: part.shape for node, part in parts.items()} == {"u": (7, 1), "z": (7, 2)}
    assert not torch.allclose(q.log_prob(z), prior(context + 1).log_prob(z))
    with pytest.raises(GraphflowsError, match="context with 1 columns"):
        prior()
    with pytest.raises(GraphflowsError, match="Expected no context"):
        GraphicalFlowPrior(COLLIDER)(context)
    with pytest.raises(GraphflowsError, match="'faithful', 'graphical'"):
        GraphicalFlowPrior(graph, flow="planar")


@pytest.mark.parametrize("flow", FLOWS)
def test_state_round_trip(flow):
    prior = excite(GraphicalFlowPrior(COLLIDER, flow=flow))
    other = GraphicalFlowPrior(COLLIDER, flow=flow)
    other.load_state_dict(prior.state_dict())
    z = torch.randn(5, 3)
    torch.testing.assert_close(other().log_prob(z), prior().log_prob(z))
