"""SIReN-VAE against exact answers: with a linear-Gaussian network put in, every importance weight is the evidence."""

import math

import networkx as nx
import pytest
import torch
from torch import nn

from pyro_graphflows import (
    GraphflowsError,
    LinearGaussianNetwork,
    ModelGraph,
    Schedule,
    UnsupportedModelError,
    faithful_inverse,
    is_imap,
    load_network,
    log_evidence,
)
from pyro_graphflows.models import VAE, SIReNVAE, variant_graph
from tests.linear_gaussian_vaes import CHAIN, GRAPHS, exact_vae


@pytest.mark.parametrize("name", GRAPHS)
def test_every_weight_is_the_evidence(name):
    _, vae, x, inputs, exact = exact_vae(GRAPHS[name])
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
def test_published_networks_areexact_vae(name):
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
    network, vae, _, _, _ = exact_vae(graph)
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


def test_reconstruction_is_the_mean_of_the_decoder():
    network, vae, x, _, _ = exact_vae(CHAIN)
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


@pytest.mark.parametrize("rate", [1e-1, 1e-2, 1e-3])
def test_finite_at_every_rate_of_the_study(rate):
    network = load_network("magic-niab")
    x = torch.tensor(network.sample(100, 1, network.observed)).float()
    vae = SIReNVAE(network.graph()).float()
    history = vae.fit(x, optimizer=rate, schedule=Schedule(40, max_grad_norm=50.0), progress=False)
    assert history.stop_reason == "all 40 epochs done"
    assert bool(vae.log_evidence(x, num_particles=10).log_evidence.isfinite().all())


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
