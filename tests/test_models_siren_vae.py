"""SIReN-VAE against exact answers: with a linear-Gaussian network put in, every importance weight is the evidence."""

import copy
import math
import pickle

import networkx as nx
import pyro
import pyro.distributions as dist
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
    Schedule,
    TrainingData,
    UnsupportedModelError,
    faithful_inverse,
    fully_connected_inverse,
    is_imap,
    load_network,
    log_evidence,
    mean_field_inverse,
)
from pyro_graphflows.models import VAE, SIReNVAE, variant_graph

GRAPHS = {
    "chain": ModelGraph([("a", "b"), ("b", "x")], ["x"]),
    "collider": ModelGraph([("a", "x"), ("b", "x"), ("a", "y")], ["x", "y"]),
    "observed parents of observed": ModelGraph([("a", "x"), ("x", "y"), ("a", "y"), ("b", "y")], ["x", "y"]),
    "observed parent of latent": ModelGraph([("x", "b"), ("a", "x"), ("a", "b"), ("b", "y")], ["x", "y"]),
    "inputs": ModelGraph([("w", "a"), ("a", "x"), ("w", "x"), ("a", "y")], ["x", "y"], inputs=["w"]),
    "barren latent": ModelGraph([("a", "x"), ("a", "b")], ["x"]),
}
CHAIN = GRAPHS["chain"]


def _exact(graph, seed=1):
    """A model with a random linear-Gaussian network in it, data, inputs, and the exact evidence."""
    network = LinearGaussianNetwork.random(graph, seed)
    known = [*graph.observed, *graph.inputs]
    data = torch.tensor(network.sample(40, 2, known))
    vae = SIReNVAE(graph)
    x, inputs = data[:, : len(graph.observed)], data[:, len(graph.observed) :] if graph.inputs else None
    vae.standardize_(x, inputs)
    vae.put_linear_gaussian_(network)
    order = [known.index(name) for name in network.observed]
    exact = torch.tensor(network.log_evidence(data[:, order].numpy()))
    if graph.inputs:
        alone = network.with_observed(graph.inputs)
        exact -= torch.tensor(alone.log_evidence(data[:, len(graph.observed) :].numpy()))
    return network, vae, x, inputs, exact


@pytest.mark.parametrize("name", GRAPHS)
def test_every_weight_is_the_evidence(name):
    _, vae, x, inputs, exact = _exact(GRAPHS[name])
    weights = vae.log_weights(x, inputs, num_particles=3)
    torch.testing.assert_close(weights, exact.expand(3, -1), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(vae.elbo(x, inputs, num_particles=2), exact, rtol=1e-8, atol=1e-8)
    evidence = vae.log_evidence(x, inputs, num_particles=7, chunk_size=3)
    torch.testing.assert_close(evidence.log_evidence, exact, rtol=1e-8, atol=1e-8)
    assert float(evidence.ess.min()) == pytest.approx(7)
    args = (x,) if inputs is None else (x, inputs)
    by_traces = log_evidence(vae.model, vae.guide, *args, num_particles=4)
    torch.testing.assert_close(by_traces.log_evidence, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["magic-niab", "ecoli70"])
def test_published_networks_are_exact(name):
    network = load_network(name)
    graph = network.graph()
    vae = SIReNVAE(graph)
    x = torch.tensor(network.sample(30, 3, graph.observed))
    vae.standardize_(x)
    vae.put_linear_gaussian_(network)
    exact = torch.tensor(network.log_evidence(x.numpy()))
    torch.testing.assert_close(vae.elbo(x), exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", GRAPHS)
def test_samples_have_the_moments_of_the_network(name):
    graph = GRAPHS[name]
    network, vae, _, _, _ = _exact(graph)
    n = 4000
    inputs = None
    if graph.inputs:
        inputs = torch.tensor(network.sample(n, 5, graph.inputs))
    x = vae.sample(n, inputs)
    mean, covariance = network.mean_and_covariance()
    rows = [network.names.index(node) for node in graph.observed]
    mean, covariance = torch.tensor(mean[rows]), torch.tensor(covariance[rows][:, rows])
    sd = covariance.diagonal().sqrt()
    assert bool(((x.mean(0) - mean).abs() < 5 * sd / math.sqrt(n)).all())
    # The standard error of an entry of a sample covariance is sqrt((s_ii s_jj + s_ij^2) / n).
    error = ((sd.outer(sd).square() + covariance.square()) / n).sqrt()
    assert bool(((x.T.cov() - covariance).abs() < 5 * error).all())


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
    _, vae, x, _, exact = _exact(GRAPHS["collider"])
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


def test_reconstruction_is_the_mean_of_the_decoder():
    network, vae, x, _, _ = _exact(CHAIN)
    slope, intercept = network.coefficients["x"][0], network.intercepts["x"]
    found = vae.reconstruct(x.expand(-1, 1).repeat(200, 1))
    mean, covariance = network.posterior(x.numpy())
    row = network.latent.index("b")
    expected = intercept + slope * torch.tensor(mean[:, row])
    error = abs(slope) * math.sqrt(covariance[row, row] / 200)
    assert bool(((found.view(200, 40).mean(0) - expected).abs() < 5 * error).all())


def test_variants():
    graph = load_network("magic-niab").graph()
    k, d = len(graph.latent), len(graph.observed)
    assert variant_graph(graph, "true") is graph
    ind, full = variant_graph(graph, "ind"), variant_graph(graph, "FC")
    assert len(ind.edges) == k * d
    assert len(full.edges) == k * d + k * (k - 1) // 2
    assert full.latent == graph.latent
    for variant in ("true", "ind", "FC"):
        vae = SIReNVAE.from_variant(graph, variant)
        assert vae.inverse.graph == variant_graph(graph, variant)
        assert is_imap(vae.inverse)
        prior = vae.prior_network.structure
        assert sum(map(len, prior.parents)) == {
            "true": len([e for e in graph.edges if e[1] in graph.latent]),
            "ind": 0,
        }.get(variant, k * (k - 1) // 2)


def test_variants_need_latents_without_observed_parents():
    graph = GRAPHS["observed parent of latent"]
    assert variant_graph(graph, "true") is graph
    for variant in ("ind", "FC"):
        with pytest.raises(
            UnsupportedModelError, match=rf"observed parents for variant '{variant}', .* b have some"
        ):
            SIReNVAE.from_variant(graph, variant)


def test_without_data_the_plate_is_that_of_the_inputs():
    vae = SIReNVAE(GRAPHS["inputs"])
    inputs = torch.randn(5, 1)
    assert vae.model(None, inputs).shape == (5, 1)
    drawn = Predictive(vae.model, num_samples=3)(None, inputs)
    assert drawn["x"].shape == (3, 5)
    assert SIReNVAE(CHAIN).model().shape == (1, 2)


def test_decoder_sees_parents_only():
    vae = SIReNVAE(GRAPHS["observed parents of observed"])
    for parameter in vae.decoder.parameters():  # log-scales start without parents
        nn.init.normal_(parameter)
    z, features = torch.randn(2), torch.randn(2)
    by_z, by_features = torch.autograd.functional.jacobian(vae.decode, (z, features))
    for node, allowed in {"x": (["a"], []), "y": (["a", "b"], ["x"])}.items():
        rows = vae.observation.own(node)
        for latent, part in vae.latents.items():
            assert bool((by_z[rows][:, part] != 0).all()) == (latent in allowed[0])
            assert latent in allowed[0] or not by_z[rows][:, part].any()
        for known, part in vae.observation.features.items():
            assert bool((by_features[rows][:, part] != 0).all()) == (known in allowed[1])


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
    again.fit(10 * x, standardize=True, schedule=0, progress=False)
    torch.testing.assert_close(again.observation.loc, 10 * x.mean(0))
    fresh = VAE(CHAIN)
    fresh.fit(x, schedule=0, progress=False)
    torch.testing.assert_close(fresh.observation.scale, x.std(0))


def test_objective_is_that_of_one_model():
    first, second, x = SIReNVAE(CHAIN), SIReNVAE(CHAIN), torch.randn(10, 1)
    with pytest.raises(GraphflowsError, match="objective was made for; got those of another one"):
        first.fit(x, loss=second.objective(), schedule=1, progress=False)


def test_likelihoods_are_those_of_the_distributions():
    graph = ModelGraph([("a", n) for n in "uvwx"], list("uvwx"), event_sizes={"a": 2, "u": 2, "v": 3, "w": 2})
    likelihood = {"u": "bernoulli", "v": "normal", "w": ("categorical", 4), "x": "normal"}
    vae = SIReNVAE(graph, likelihood=likelihood)
    x = torch.cat(
        [torch.randint(2, (9, 2)), 5 * torch.randn(9, 3), torch.randint(4, (9, 2)), torch.randn(9, 1)], 1
    )
    vae.standardize_(x)
    parameters = torch.randn(9, vae.observation.num_parameters)
    total = 0
    for node, part in vae.observation.columns.items():
        law = vae.observation.distribution(parameters, node)
        value = x[:, part] if part.stop - part.start > 1 else x[:, part.start]
        assert law.batch_shape == (9,)
        total = total + law.log_prob(value)
        if likelihood[node] != ("categorical", 4):
            torch.testing.assert_close(vae.observation.mean(parameters)[:, part], law.mean.view(9, -1))
    torch.testing.assert_close(vae.observation.log_prob(parameters, x), total)
    features = vae.observation.to_features(x)
    assert features.shape == (9, 2 + 3 + 8 + 1)
    torch.testing.assert_close(features[:, 5:9].argmax(1).double(), x[:, 5])
    assert vae.elbo(x, num_particles=3).shape == (9,)
    drawn = vae.sample(50)
    assert set(drawn[:, 5:7].unique().tolist()) <= {0, 1, 2, 3}
    assert set(drawn[:, :2].unique().tolist()) <= {0, 1}
    assert math.isfinite(Trace_ELBO().loss(vae.model, vae.guide, x))


def test_vector_leaf_with_modules():
    graph = ModelGraph(
        [("a", "b"), ("b", "image"), ("a", "label")], ["image", "label"], event_sizes={"image": 12}
    )
    shapes = []

    class Decoder(nn.Linear):
        def forward(self, x):
            shapes.append(x.shape)
            return super().forward(x)

    vae = SIReNVAE(
        graph,
        likelihood={"image": "bernoulli", "label": ("categorical", 3)},
        decoder={"image": Decoder(1, 12)},
        encoder={"image": nn.Sequential(nn.Linear(12, 5), nn.Tanh())},
    )
    x = torch.cat([torch.randint(2, (20, 12)), torch.randint(3, (20, 1))], 1).double()
    assert vae.elbo(x).shape == (20,)
    assert shapes == [(20, 1)]  # b alone
    assert vae.encoder_network.context_dim == 5 + 3
    vae.elbo(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in vae.decoder.modules_by_node.parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in vae.feature_modules.parameters())
    assert vae.model(num_samples=4).shape == (4, 2)
    with pytest.raises(
        GraphflowsError, match=r"decoder of image to return 12 parameters in each of 20 rows; .* 11"
    ):
        SIReNVAE(graph, likelihood={"image": "bernoulli", "label": ("categorical", 3)},
                 decoder={"image": nn.Linear(1, 11)}).elbo(x)  # fmt: skip
    # as many parameters in all, but not those of each node
    swapped = {"image": nn.Linear(1, 11), "label": nn.Linear(1, 4)}
    with pytest.raises(GraphflowsError, match="decoder of image to return 12 parameters"):
        SIReNVAE(graph, likelihood={"image": "bernoulli", "label": ("categorical", 3)}, decoder=swapped).elbo(
            x
        )


def test_convolutions_and_batch_norm_in_modules():
    """Modules see rows with any number of particles: else convolutions fail, and batch norm takes data for channels."""
    graph = ModelGraph([("a", "b"), ("a", "image"), ("b", "image")], ["image"], event_sizes={"image": 16})
    decoder = nn.Sequential(
        nn.Linear(2, 8),
        nn.BatchNorm1d(8),
        nn.ELU(),
        nn.Unflatten(1, (2, 2, 2)),
        nn.ConvTranspose2d(2, 1, 2, 2),
        nn.Flatten(),
    )
    encoder = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 2, 2), nn.BatchNorm2d(2), nn.ELU(), nn.Flatten()
    )
    vae = SIReNVAE(graph, likelihood="bernoulli", decoder=decoder, encoder=encoder)
    assert int(encoder[2].num_batches_tracked) == 0
    x = torch.randint(2, (8, 16)).double()  # as many data as units
    assert all(math.isfinite(loss) for loss in vae.fit(x, schedule=3, progress=False).loss)
    vae.eval()
    features, eps = vae.observation.to_features(x), torch.randn(3, 8, 2)
    z, _ = vae.encode(features, eps)
    one_by_one = torch.stack([vae.decode(part, features) for part in z])
    torch.testing.assert_close(vae.decode(z, features), one_by_one)
    ours = vae.log_evidence(x, num_particles=2000).log_evidence
    by_traces = log_evidence(vae.model, vae.guide, x, num_particles=2000)
    assert ((ours - by_traces.log_evidence).abs() < 6 * by_traces.standard_error).all()
    assert vae.sample(5).shape == (5, 16)


def test_learns_a_small_network():
    network = load_network("magic-niab")
    graph = network.graph()
    x = torch.tensor(network.sample(500, 1, graph.observed))
    test = torch.tensor(network.sample(500, 2, graph.observed))
    vae = SIReNVAE(graph, num_blocks=1)
    vae.fit(x, optimizer=1e-2, schedule=25, progress=False)
    excess = (
        torch.tensor(network.log_evidence(test.numpy()))
        - vae.log_evidence(test, num_particles=100).log_evidence
    )
    # Untrained it is several nats; the standard error of the mean is below 0.02.
    assert float(excess.mean()) < 0.3
    assert vae.sample(3).shape == (3, 5)


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


@pytest.mark.parametrize("rate", [1e-1, 1e-2, 1e-3])
def test_finite_at_every_rate_of_the_study(rate):
    network = load_network("magic-niab")
    x = torch.tensor(network.sample(100, 1, network.observed)).float()
    vae = SIReNVAE(network.graph()).float()
    history = vae.fit(x, optimizer=rate, schedule=Schedule(40, max_grad_norm=50.0), progress=False)
    assert history.stop_reason == "all 40 epochs done"
    assert bool(vae.log_evidence(x, num_particles=10).log_evidence.isfinite().all())


@pytest.mark.parametrize("maker", [SIReNVAE, VAE, lambda g: SIReNVAE(g, flow="graphical")])
def test_copies_and_saved_states(maker, tmp_path):
    vae = maker(GRAPHS["collider"])
    x = torch.randn(7, 2)
    vae.standardize_(x)
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    again = maker(GRAPHS["collider"])
    again.load_state_dict(torch.load(tmp_path / "vae.pt"))
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


def test_plain_vae_is_exact_for_a_factor_model():
    """One latent, one observed node, no hidden output: x = z + noise has a normal posterior."""
    graph = ModelGraph([("z1", "x")], ["x"])
    vae = VAE(graph, hidden_dim=2)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        # ELU units far above zero are the identity.
        vae.decoder[0].weight[0], vae.decoder[0].bias[0] = 1.0, 50.0
        vae.decoder[2].weight[0, 0], vae.decoder[2].bias[0] = 1.0, -50.0
        vae.encoder[0].weight[0], vae.encoder[0].bias[0] = 1.0, 50.0
        vae.encoder[2].weight[0, 0], vae.encoder[2].bias[0] = 0.5, -25.0
        bound = vae.observation.log_scale_bound
        vae.encoder[2].bias[1] = bound * math.atanh(-0.5 * math.log(2) / bound)
    x = torch.tensor([[-2.0], [0.0], [1.0]])
    exact = dist.Normal(0, 2**0.5).log_prob(x[:, 0])
    torch.testing.assert_close(vae.elbo(x), exact)
    torch.testing.assert_close(log_evidence(vae.model, vae.guide, x, num_particles=3).log_evidence, exact)


def test_messages():
    with pytest.raises(
        GraphflowsError, match="Expected flow to be one of 'faithful', 'graphical'; got 'other'"
    ):
        SIReNVAE(CHAIN, flow="other")
    with pytest.raises(GraphflowsError, match="Expected variant to be 'true', 'ind' or 'FC'; got 'both'"):
        variant_graph(CHAIN, "both")
    with pytest.raises(GraphflowsError, match="an inverse of the given graph"):
        SIReNVAE(CHAIN, inverse=faithful_inverse(GRAPHS["collider"]))
    for given in (nn.Linear(2, 2), {"x": torch.tanh}):
        with pytest.raises(
            GraphflowsError, match=r"modules for the decoder by node, {node: torch.nn.Module}, of x, y"
        ):
            SIReNVAE(GRAPHS["collider"], decoder=given)
        with pytest.raises(
            GraphflowsError, match=r"modules for the encoder by node, {node: torch.nn.Module}, of x, y"
        ):
            SIReNVAE(GRAPHS["collider"], encoder=given)
    with pytest.raises(GraphflowsError, match="Expected decoder modules for x; got them for a"):
        SIReNVAE(CHAIN, decoder={"a": nn.Linear(2, 2)})
    with pytest.raises(GraphflowsError, match="Expected encoder modules for x; got them for a"):
        SIReNVAE(CHAIN, encoder={"a": nn.Linear(2, 2)})
    with pytest.raises(
        GraphflowsError, match=r"encoder of x to return the shape \(rows, features\) .* got \(2,\)"
    ):
        SIReNVAE(CHAIN, encoder=nn.Flatten(0))
    with pytest.raises(GraphflowsError, match="Expected latent and observed nodes"):
        SIReNVAE(ModelGraph([("a", "b")], []))
    with pytest.raises(UnsupportedModelError, match="Expected no marginalised nodes; got b"):
        SIReNVAE(ModelGraph([("a", "b"), ("b", "x")], ["x"], marginalised=["b"]))
    with pytest.raises(UnsupportedModelError, match="all nodes in the same plates"):
        SIReNVAE(ModelGraph([("a", "x")], ["x"], plates={"x": ["data"]}))
    with pytest.raises(GraphflowsError, match="no observed node with the name of the latent site, 'z'"):
        SIReNVAE(ModelGraph([("a", "z")], ["z"]))
    with pytest.raises(GraphflowsError, match="likelihood of x to be 'normal'"):
        SIReNVAE(CHAIN, likelihood="poisson")
    for classes in (1, 2.5, "3"):
        with pytest.raises(GraphflowsError, match="likelihood of x to be 'normal', 'bernoulli' or"):
            SIReNVAE(CHAIN, likelihood=("categorical", classes))
    for flow, option in (
        ("faithful", "allow_short"),
        ("graphical", "conditional_scale"),
        ("faithful", "num_block"),
    ):
        with pytest.raises(
            GraphflowsError, match=rf"options of the {flow} flow \(activation, .*\); got {option}\."
        ):
            SIReNVAE.from_variant(CHAIN, "true", flow=flow, **{option: True})
    with pytest.raises(GraphflowsError, match="no site with the name of the plate of the data, 'data'"):
        SIReNVAE(ModelGraph([("a", "data")], ["data"]))
    with pytest.raises(GraphflowsError, match="no site with the name of the plate of the data, 'data'"):
        VAE(CHAIN, latent_name="data")
    with pytest.raises(GraphflowsError, match="missing or unknown: x"):
        SIReNVAE(CHAIN, likelihood={})
    vae = SIReNVAE(CHAIN)
    with pytest.raises(GraphflowsError, match=r"x.shape\[-1\] == 1, the columns of x; got shape \(5, 2\)"):
        vae.elbo(torch.zeros(5, 2))
    with pytest.raises(GraphflowsError, match="Expected no inputs"):
        vae.elbo(torch.zeros(5, 1), torch.zeros(5, 1))
    with pytest.raises(GraphflowsError, match="Expected inputs, the columns of w"):
        SIReNVAE(GRAPHS["inputs"]).elbo(torch.zeros(5, 2))
    with pytest.raises(GraphflowsError, match="at least two rows"):
        vae.standardize_(torch.zeros(1, 1))
    with pytest.raises(GraphflowsError, match="the guide is the posterior given data"):
        vae.guide()
    with pytest.raises(UnsupportedModelError, match="the latent nodes b depend on observed ones"):
        SIReNVAE(GRAPHS["observed parent of latent"]).model()
    with pytest.raises(GraphflowsError, match='bound "elbo" or "iwae"'):
        vae.objective(bound="other")
    with pytest.raises(GraphflowsError, match="num_particles >= 1 and kl_weight >= 0"):
        vae.objective(kl_weight=-1.0)
    with pytest.raises(GraphflowsError, match="positive num_particles and chunk_size"):
        vae.log_evidence(torch.zeros(5, 1), num_particles=0)
    with pytest.raises(UnsupportedModelError, match="Expected a faithful flow over scalar normal nodes"):
        SIReNVAE(CHAIN, flow="graphical", num_blocks=2).put_linear_gaussian_(
            LinearGaussianNetwork.random(CHAIN, 0)
        )
    with pytest.raises(GraphflowsError, match="over the nodes of the graph"):
        vae.put_linear_gaussian_(LinearGaussianNetwork.random(GRAPHS["collider"], 0))
    more = ModelGraph(nx.DiGraph([("a", "b"), ("b", "x"), ("a", "x")]), ["x"])
    with pytest.raises(GraphflowsError, match="parents of x that are its parents in the graph; got a"):
        vae.put_linear_gaussian_(LinearGaussianNetwork.random(more, 0))


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


def test_training_data_of_other_kinds():
    vae = SIReNVAE(ModelGraph([("a", "x")], observed=["x"]))
    x = torch.randn(20, 1)
    history = vae.fit(TrainingData(x, batch_size=5, validation=x), schedule=1, progress=False)
    assert history.num_steps == 4
    for data in (TrainingData((x, x, x)), TrainingData([(x,)]), TrainingData({"x": x})):
        with pytest.raises(GraphflowsError, match=r"TrainingData of x or of \(x, inputs\) and nothing else"):
            vae.fit(data, schedule=1, progress=False)
