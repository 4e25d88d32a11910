"""The ensemble trainer of the Graph VAE study: the class is its reference, single runs are what its members are."""

import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger

from pyro_graphflows import GraphflowsError, GraphVAE

STUDY = Path(__file__).parent.parent / "studies" / "graph_vae"
STRUCTURES = ("learned", "full", "chain", "independent")
SIZES = {"encoder_dims": [12, 11, 7], "decoder_dims": [6, 9, 8], "embedding_dim": 5, "hidden_dim": 6}
MODULES = [path.stem for path in STUDY.glob("*.py")]

sys.path.insert(0, str(STUDY))
try:
    from ensemble import Ensemble, log_likelihood
finally:
    sys.path.remove(str(STUDY))


class GivenNoise(Messenger):
    """Draws the sites of the guide from given noise, with gradients."""

    def __init__(self, noise, gate_noise):
        super().__init__()
        self.noise, self.gate_noise = noise, gate_noise

    def _pyro_sample(self, msg):
        if msg["name"] == "gates":
            law = msg["fn"].base_dist
            msg["value"] = ((self.gate_noise + law.logits) / law.temperature).sigmoid()
        elif msg["name"] in self.noise:
            law = msg["fn"].base_dist
            msg["value"] = law.loc + law.scale * self.noise[msg["name"]]
        else:
            return
        msg["done"] = True


def make_vae(structure, seed, num_nodes=4, **kwargs):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae = GraphVAE((3, 4), num_nodes, 2, structure, **SIZES, **kwargs)
    if vae.gates is not None:
        with torch.no_grad():
            vae.gates.logits.normal_()
    for part in vae.modules():
        if isinstance(part, torch.nn.BatchNorm1d):  # no start at 0 and 1
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
            part.weight.data.uniform_(0.5, 2.0)
            part.bias.data.normal_()
    return vae


def make_noise(size, num_nodes=4, rows=9, num_gates=6):
    x = torch.bernoulli(torch.full((size, rows, 12), 0.4))
    return x, torch.randn(num_nodes, size, rows, 2), torch.randn(size, num_gates)


def reference_loss(vae, x, noise, gate_noise):
    """Return the class's own loss per datum with given noise."""
    given = {name: noise[i] for i, name in enumerate(vae.names)}

    def guide(x):
        with GivenNoise(given, gate_noise):
            return vae.guide(x)

    return TraceMeanField_ELBO().differentiable_loss(vae.model, guide, x) / len(x)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("options", [{}, {"decoder_input": "first", "edge_cost": 0.3}])
def test_bound_and_gradients_are_those_of_the_class(structure, options):
    members = [make_vae(structure, seed, **options) for seed in range(2)]
    for vae in members:
        vae.anneal(50)
    ensemble = Ensemble(members)
    ensemble.temperature.fill_(members[0].temperature)
    x, noise, gate_noise = make_noise(2)
    losses = ensemble.losses(x, noise, gate_noise)
    losses.sum().backward()
    # a state made of gradients goes through the same conversion as a state made of parameters
    gradients = {key: value.grad for key, value in ensemble.parameters.items()}
    statistics = {key: value.clone() for key, value in ensemble.statistics.items()}
    for number, vae in enumerate(members):
        pyro.clear_param_store()
        loss = reference_loss(vae, x[number].reshape(-1, 3, 4), noise[:, number], gate_noise[number])
        torch.testing.assert_close(losses[number], loss)
        loss.backward()
        own = ensemble.state_of(number, {**ensemble.tensors(), **gradients})
        largest = max(parameter.grad.abs().max() for parameter in vae.parameters())
        normed = {f"{layer.linear}.bias" for layer in ensemble._normed()}
        normed |= {f"prior.{i}.hidden.0.bias" for i in range(ensemble.num_children)}
        assert normed < set(dict(vae.named_parameters()))
        for key, parameter in vae.named_parameters():
            if key in normed:  # left out: without effect in the class, too
                assert parameter.grad.abs().max() < 1e-12 * largest
            else:
                torch.testing.assert_close(own[key], parameter.grad, rtol=1e-9, atol=1e-12)
                assert (parameter.grad != 0).any()
        after = ensemble.state_of(number, {**ensemble.tensors(), **statistics})
        for key, buffer in vae.named_buffers():
            if "running" in key:
                torch.testing.assert_close(after[key], buffer)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_evaluation_is_that_of_the_class(structure):
    members = [make_vae(structure, seed) for seed in range(2)]
    ensemble = Ensemble(members)
    if structure == "learned":
        ensemble.freeze()
        with torch.no_grad():
            ensemble.parameters["gates.logits"].neg_()  # the gates that count are the frozen ones
    x, noise, _ = make_noise(2)
    gates = ensemble.hard_gates()
    bottom_up = ensemble.bottom_up(x, False)
    logits, divergences, nodes = ensemble.terms(bottom_up, noise, gates, False)
    _, differences, _ = ensemble.terms(bottom_up, noise, gates, False, sampled=True)
    weights = log_likelihood(logits, x) - differences.sum(1)
    for number, vae in enumerate(members):
        vae.eval()
        pyro.clear_param_store()
        images = x[number].reshape(-1, 3, 4)
        loss = reference_loss(vae, images, noise[:, number], None)
        bound = (log_likelihood(logits, x) - divergences.sum(1))[number].mean()
        torch.testing.assert_close(bound, -loss)
        values = {name: nodes[number, :, 2 * i : 2 * i + 2] for i, name in enumerate(vae.names)}
        traces = [
            pyro.poutine.trace(pyro.poutine.condition(program, values)).get_trace(images)
            for program in (vae.model, vae.guide)
        ]
        for trace in traces:
            trace.compute_log_prob()
        sites = [(traces[0], name, 1) for name in ("x", *vae.names)] + [(traces[1], n, -1) for n in vae.names]
        expected = sum(sign * trace.nodes[name]["log_prob"] for trace, name, sign in sites)
        torch.testing.assert_close(weights[number], expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_states_come_back_as_they_went_in(structure):
    members = [make_vae(structure, seed) for seed in range(3)]
    ensemble = Ensemble(members)
    for number, vae in enumerate(members):
        copy = make_vae(structure, 7)
        copy.load_state_dict(ensemble.state_of(number))
        for key, value in vae.state_dict().items():
            torch.testing.assert_close(copy.state_dict()[key], value, rtol=0, atol=1e-15)


def test_models_that_are_no_ensemble_are_refused():
    with pytest.raises(GraphflowsError, match="at least one model"):
        Ensemble([])
    with pytest.raises(GraphflowsError, match="number 1 differs"):
        Ensemble([make_vae("full", 0), make_vae("chain", 0)])
    with pytest.raises(GraphflowsError, match="number 1 differs"):
        Ensemble([make_vae("learned", 0), make_vae("learned", 0, edge_cost=0.1)])
    with pytest.raises(GraphflowsError, match="likelihood='bernoulli'"):
        Ensemble([make_vae("full", 0, likelihood="normal")])
    with pytest.raises(GraphflowsError, match=r"encoder\.1 is a Tanh"):
        encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Tanh(), torch.nn.Linear(12, 5))
        Ensemble([GraphVAE((3, 4), 4, 2, "full", encoder=encoder, embedding_dim=5)])
    with pytest.raises(GraphflowsError, match="hidden_dim=None"):
        Ensemble([GraphVAE((3, 4), 4, 2, "full", hidden_dim=None)])
