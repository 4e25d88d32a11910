"""What all VAEs share: the bound as Pyro computes it, the parameter store, training, states and refusals."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO
from torch import nn

from pyro_graphflows import (
    GraphflowsError,
    GraphflowsWarning,
    LinearGaussianNetwork,
    ModelGraph,
    Progress,
    TrainingData,
    fully_connected_inverse,
    mean_field_inverse,
)
from pyro_graphflows.models import VAE, SIReNVAE
from tests.linear_gaussian_vaes import CHAIN, GRAPHS, exact_vae


@pytest.mark.parametrize("flow", ["faithful", "graphical"])
@pytest.mark.parametrize("name", GRAPHS)
def test_pyro_programs_have_the_terms_of_the_bound(name, flow):
    graph = GRAPHS[name]
    vae = SIReNVAE(
        graph, flow=flow, likelihood={n: "bernoulli" if n == "y" else "normal" for n in graph.observed}
    )
    x = torch.randn(6, vae.num_observed)
    if "y" in graph.observed:
        x[:, vae.observation.columns["y"]] = torch.randint(2, (6, 1)).to(x)
    args = (x, torch.randn(6, 1)) if graph.inputs else (x,)
    guide = poutine.trace(vae.guide).get_trace(*args)
    model = poutine.trace(poutine.replay(vae.model, guide)).get_trace(*args)
    z = guide.nodes["z"]["value"]
    data = vae.known(*args)
    features = vae.observation.to_features(data)
    eps, _ = vae.encoder_network.inverse_terms(z, *vae._context(features))
    torch.testing.assert_close(vae.encode(features, eps)[0], z)
    torch.testing.assert_close(guide.log_prob_sum(), vae.encode(features, eps)[1].sum())
    expected = vae.log_prior(z, features) + vae.observation.log_prob(vae.decode(z, features), data)
    torch.testing.assert_close(model.log_prob_sum(), expected.sum())
    assert {
        site for site, node in model.nodes.items() if node["type"] == "sample" and node["is_observed"]
    } == set(graph.observed)


def test_svi_and_renyi_train_all_parameters():
    vae = SIReNVAE(GRAPHS["observed parents of observed"])
    x = torch.randn(50, 2) * 3 + 1
    vae.standardize_(x)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    for loss in (Trace_ELBO(), RenyiELBO(num_particles=2, vectorize_particles=True)):
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss)
        for _ in range(3):
            assert math.isfinite(svi.step(x))
    same = [name for name, p in vae.named_parameters() if p.numel() and torch.equal(p, before[name])]
    assert not same


def test_two_models_do_not_share_parameters_in_the_store():
    first, second = SIReNVAE(CHAIN), SIReNVAE(CHAIN)
    x = torch.randn(5, 1)
    first.model(x)
    before = second.prior_network.edges.weight.detach().clone()
    second.model(x)
    assert torch.equal(second.prior_network.edges.weight, before)


@pytest.mark.parametrize("maker", [SIReNVAE, VAE])
def test_copies_are_trained_by_svi(maker):
    """A copy has the name of the first in Pyro's store, which would hand the optimiser the first one's parameters."""
    first, x = maker(CHAIN), torch.randn(20, 1)

    def train(vae):
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        before = [p.detach().clone() for p in vae.parameters()]
        for _ in range(2):
            svi.step(x)
        return all(
            p.numel() == 0 or not torch.equal(p, b) for p, b in zip(vae.parameters(), before, strict=True)
        )

    assert train(first)
    kept = [p.detach().clone() for p in first.parameters()]
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert train(copied)
    assert all(torch.equal(p, b) for p, b in zip(first.parameters(), kept, strict=True))
    assert train(first)


def test_bound_is_below_the_evidence_and_rises_with_particles():
    torch.manual_seed(0)
    _, vae, x, _, exact = exact_vae(GRAPHS["collider"])
    with torch.no_grad():
        for parameter in vae.encoder_network.parameters():  # the model stays right, the encoder does not
            parameter.add_(0.2 * torch.randn_like(parameter))
        draws = vae.log_weights(x, num_particles=4000)
    elbo = draws.mean(0)
    error = draws.std(0) / math.sqrt(4000)
    assert bool((elbo < exact + 4 * error).all())
    assert float((exact - elbo).mean()) > 0.05
    iwae = draws.view(400, 10, -1).logsumexp(1) - math.log(10)
    gain = iwae - draws.view(400, 10, -1).mean(1)
    assert bool((gain >= -1e-9).all())
    objective = vae.objective(bound="iwae", num_particles=10)
    losses = -torch.tensor([objective.loss(None, None, x) for _ in range(50)])
    both = math.hypot(float(losses.std()) / 50**0.5, float(iwae.sum(1).std()) / 20)
    assert abs(float(losses.mean() - iwae.sum(1).mean())) < 5 * both


def test_without_data_the_plate_is_that_of_the_inputs():
    vae = SIReNVAE(GRAPHS["inputs"])
    inputs = torch.randn(5, 1)
    assert vae.model(None, inputs).shape == (5, 1)
    drawn = Predictive(vae.model, num_samples=3)(None, inputs)
    assert drawn["x"].shape == (3, 5)
    assert SIReNVAE(CHAIN).model().shape == (1, 2)


def test_fit_keeps_units_that_parameters_were_made_for():
    network = LinearGaussianNetwork.random(CHAIN, 0)
    x = 5 + 3 * torch.tensor(network.sample(30, 1, ["x"]))
    exact = torch.tensor(network.log_evidence(x.numpy()))
    for standardize_first in (False, True):
        vae = SIReNVAE(CHAIN)
        if standardize_first:
            vae.standardize_(x)
        vae.put_linear_gaussian_(network)
        vae.fit(x, schedule=0, progress=False)
        torch.testing.assert_close(vae.elbo(x), exact, rtol=1e-8, atol=1e-8)
    again = SIReNVAE(CHAIN)
    again.load_state_dict(vae.state_dict())
    again.fit(10 * x, schedule=0, progress=False)  # other data
    torch.testing.assert_close(again.elbo(x), exact, rtol=1e-8, atol=1e-8)
    again.fit(10 * x, schedule=0, standardize=True, progress=False)
    torch.testing.assert_close(again.observation.loc, 10 * x.mean(0))
    fresh = VAE(CHAIN)
    fresh.fit(x, schedule=0, progress=False)
    torch.testing.assert_close(fresh.observation.scale, x.std(0))


def test_objective_is_that_of_one_model():
    first, second, x = SIReNVAE(CHAIN), SIReNVAE(CHAIN), torch.randn(10, 1)
    with pytest.raises(GraphflowsError, match="objective was made for; got those of another one"):
        first.fit(x, loss=second.objective(), schedule=1, progress=False)


def test_fit_looks_at_all_data_first():
    x = torch.randn(50, 1)
    x[30] = math.nan
    for vae in (SIReNVAE(CHAIN), VAE(CHAIN)):
        vae.standardize_(x[:30])
        with pytest.raises(
            GraphflowsError, match=r"Expected finite data; the columns of x are not\. Missing values"
        ):
            vae.fit(TrainingData(x, batch_size=10), schedule=1, progress=False)
        for use in (vae.elbo, vae.log_evidence, vae.reconstruct):
            with pytest.raises(GraphflowsError, match="Expected finite data"):
                use(x)


def test_training_stops_with_the_last_good_state():
    vae = SIReNVAE(CHAIN)
    x = torch.randn(50, 1)
    x_bad = x.clone()
    epochs = []

    def spoil(history):
        epochs.append(history.loss[-1])
        if len(epochs) == 3:
            with torch.no_grad():
                next(iter(vae.encoder_network.parameters())).fill_(math.nan)

    with pytest.warns(GraphflowsWarning, match="Training stopped"):
        history = vae.fit(x_bad, optimizer=1e-2, schedule=9, progress=Progress(bar=False, on_epoch=spoil))
    assert history.stop_reason.startswith("not finite in epoch 3")
    assert all(bool(p.isfinite().all()) for p in vae.parameters())


@pytest.mark.parametrize("maker", [SIReNVAE, VAE, lambda g: SIReNVAE(g, flow="graphical")])
def test_copies_and_saved_states(maker, tmp_path):
    vae = maker(GRAPHS["collider"])
    x = torch.randn(7, 2)
    vae.standardize_(x)
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    again = maker(GRAPHS["collider"])
    again.load_state_dict(torch.load(tmp_path / "vae.pt", weights_only=True))
    whole = tmp_path / "whole.pt"
    torch.save(vae, whole) if maker in (SIReNVAE, VAE) else torch.save(copy.deepcopy(vae), whole)
    found = []
    for model in (vae, again, copy.deepcopy(vae), torch.load(whole, weights_only=False)):
        torch.manual_seed(3)
        found.append(model.elbo(x))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    copied = copy.deepcopy(vae)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    torch.manual_seed(3)
    torch.testing.assert_close(vae.elbo(x), found[0])


@pytest.mark.parametrize("maker", [SIReNVAE, VAE])
def test_states_of_other_layouts(maker, tmp_path):
    """The same graph made in another order is equal, but its columns and latent nodes have other places."""
    graph = ModelGraph([("a", "b"), ("b", "x"), ("a", "y")], ["x", "y"])
    other = ModelGraph([("a", "y"), ("a", "b"), ("b", "x")], ["y", "x"])
    assert graph == other
    assert graph.observed != other.observed
    vae = maker(graph)
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    state = torch.load(tmp_path / "vae.pt", weights_only=True)
    maker(graph).load_state_dict(state)
    for outer in (lambda module: module, lambda module: nn.ModuleList([module])):
        with pytest.raises(RuntimeError, match="same nodes in the same order; it has x for y"):
            outer(maker(other)).load_state_dict(outer(vae).state_dict())
    maker(other).load_state_dict(dict(state))  # says nothing about nodes
    if maker is SIReNVAE:
        again = SIReNVAE(graph, inverse=fully_connected_inverse(graph))
        with pytest.raises(
            RuntimeError, match="the same arcs of the inverse in the same order; it has a -> b for x -> a"
        ):
            SIReNVAE(graph, inverse=mean_field_inverse(graph)).load_state_dict(
                again.state_dict(), strict=False
            )


def test_values_by_name():
    graph = ModelGraph(
        [("a", "y"), ("a", "x"), ("a", "image")], ["x", "y", "image"], event_sizes={"image": 4}
    )
    vae = VAE(graph, likelihood={"x": "normal", "y": "bernoulli", "image": "normal"})
    values = {"x": torch.randn(5), "image": torch.randn(5, 4), "y": torch.randint(2, (5, 1))}
    x = vae.join(values)
    assert graph.observed == ("y", "x", "image")
    assert x.dtype == torch.float64
    for node, part in vae.observation.columns.items():
        torch.testing.assert_close(x[:, part], values[node].reshape(5, -1).double())
    assert vae.elbo(x).shape == (5,)
    with pytest.raises(GraphflowsError, match="missing or unknown: w, y"):
        vae.join({"x": values["x"], "image": values["image"], "w": values["y"]})
    with pytest.raises(GraphflowsError, match=r"same n; got image: \(4, 5\)"):
        vae.join(values | {"image": torch.zeros(4, 5)})
    with pytest.raises(GraphflowsError, match=r"same n; got y: \(3,\)"):
        vae.join(values | {"y": torch.zeros(3)})


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(2), r"Expected x of shape \(n, columns\), n >= 1; got shape \(2,\)"),
        (torch.zeros(0, 2), r"n >= 1; got shape \(0, 2\)"),
        ([[0.0, 1.0]], "Expected a tensor .* got list"),
        (torch.zeros(3, 2, dtype=torch.float16), "model's dtype torch.float64; got torch.float16"),
        (torch.tensor([[0.0, 3.0]]), "Expected class numbers 0 to 2 in the columns of y"),
        (torch.tensor([[0.0, 0.5]]), "whose likelihood is categorical; got 0.5"),
        (torch.tensor([[-1.0, 0.0]]), r"Expected zeros and ones in the columns of x \(0 to 0\), .* got -1"),
        (torch.tensor([[0.5, 0.0]]), "whose likelihood is bernoulli; got 0.5"),
        (torch.tensor([[torch.nan, 0.0]]), "Expected finite data; the columns of x are not"),
    ],
)
def test_data_that_are_none_of_the_model(x, match):
    graph = ModelGraph([("a", "x"), ("a", "y")], ["x", "y"])
    vae = SIReNVAE(graph, likelihood={"x": "bernoulli", "y": ("categorical", 3)})
    if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
        x = x.double()
    for use in (vae.elbo, vae.log_evidence, vae.reconstruct, vae.fit, vae.model, vae.guide):
        with pytest.raises(GraphflowsError, match=match):
            use(x)


def test_numbers_out_of_range():
    graph = ModelGraph([("w", "x"), ("a", "x")], ["x"], inputs=["w"])
    vae = VAE(graph)
    with pytest.raises(GraphflowsError, match="Expected a ModelGraph; got list"):
        SIReNVAE([("a", "x")])
    with pytest.raises(GraphflowsError, match="Expected hidden_dim >= 1; got 0"):
        VAE(graph, hidden_dim=0)
    with pytest.raises(GraphflowsError, match="num_samples >= 1; got 0"):
        vae.sample(0, torch.zeros(0, 1))
    with pytest.raises(GraphflowsError, match=r"whole number num_samples >= 1; got 2\.5"):
        vae.sample(2.5, torch.zeros(2, 1))
    with pytest.raises(GraphflowsError, match="Expected num_particles >= 1; got 0"):
        vae.elbo(torch.zeros(3, 1), torch.zeros(3, 1), num_particles=0)
    with pytest.raises(
        GraphflowsError, match=r"same n, the columns of x and of w; got \(3, 1\) and \(4, 1\)"
    ):
        vae.elbo(torch.zeros(3, 1), torch.zeros(4, 1))
    # as many columns in all, but not those of each
    two = VAE(ModelGraph([("w", "x"), ("a", "x"), ("a", "y")], ["x", "y"], inputs=["w"]))
    with pytest.raises(
        GraphflowsError, match=r"\(n, 2\) and \(n, 1\), with the same n, .* got \(3, 1\) and \(3, 2\)"
    ):
        two.elbo(torch.zeros(3, 1), torch.zeros(3, 2))
    with pytest.raises(GraphflowsError, match=r"with the same n, .* got \(3, 2\) and ndarray"):
        two.elbo(torch.zeros(3, 2), torch.zeros(3, 1).numpy())
    with pytest.raises(GraphflowsError, match="Expected finite data; the columns of x are not"):
        vae.standardize_(torch.full((3, 1), torch.nan), torch.zeros(3, 1))
