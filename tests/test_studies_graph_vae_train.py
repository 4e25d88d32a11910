"""The ensemble trainer of the Graph VAE study: the class is its reference, single runs are what its members are."""

import json
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger

from pyro_graphflows import GraphflowsError, GraphVAE
from pyro_graphflows.datasets import Images
from studies.graph_vae import checkpoint, evaluation, remedies, report_ensemble, train
from studies.graph_vae.ensemble import Ensemble, log_likelihood
from studies.graph_vae.epochs import EpochData
from studies.graph_vae.json_lines import Record
from studies.graph_vae.trainer import Settings, Trainer
from studies.results import Results

ROOT = Path(__file__).parent.parent
STRUCTURES = ("learned", "full", "chain", "independent")
SIZES = {"encoder_dims": [12, 11, 7], "decoder_dims": [6, 9, 8], "embedding_dim": 5, "hidden_dim": 6}


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


@pytest.mark.parametrize("estimator", ["relaxed", "straight-through"])
def test_gates_of_each_datum(estimator):
    """The same gates for all data are those of the batch; with others for each the class agrees."""
    vae = make_vae("learned", 3)
    ensemble = Ensemble([vae], estimator=estimator)
    x, noise, gate_noise = make_noise(1)
    expected = ensemble.losses(x, noise, gate_noise)
    gradients = torch.autograd.grad(expected.sum(), list(ensemble.parameters.values()))
    same = ensemble.losses(x, noise, gate_noise[:, None].expand(-1, x.shape[1], -1))
    torch.testing.assert_close(same, expected)
    for a, b in zip(
        gradients, torch.autograd.grad(same.sum(), list(ensemble.parameters.values())), strict=True
    ):
        torch.testing.assert_close(a, b)
    if estimator == "relaxed":
        each = torch.randn(1, x.shape[1], 6)
        pyro.enable_validation(False)  # the site of the gates has no plate; it adds nothing to the bound
        loss = reference_loss(vae, x[0].reshape(-1, 3, 4), noise[:, 0], each[0])
        torch.testing.assert_close(ensemble.losses(x, noise, each)[0], loss)
        assert abs(loss - expected[0]) > 1e-3


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
    if structure == "learned":
        members[1].freeze_structure()
        for vae in members:
            vae.anneal(20)
    ensemble = Ensemble(members)
    for number, vae in enumerate(members):
        copy = make_vae(structure, 7)
        copy.load_state_dict(ensemble.state_of(number))
        for key, value in vae.state_dict().items():
            torch.testing.assert_close(copy.state_dict()[key], value, rtol=0, atol=1e-15)
    probabilities = torch.stack([vae.gate_probabilities for vae in members])
    if structure == "learned":
        own = torch.zeros(3, 4, 4)
        own[(slice(None), *torch.triu_indices(4, 4, 1))] = ensemble.gate_probabilities()
        torch.testing.assert_close(own, probabilities)


def test_models_that_are_no_ensemble_are_refused():
    with pytest.raises(GraphflowsError, match="at least one model"):
        Ensemble([])
    with pytest.raises(GraphflowsError, match="number 1 differs"):
        Ensemble([make_vae("full", 0), make_vae("chain", 0)])
    with pytest.raises(GraphflowsError, match="number 1 differs"):
        Ensemble([make_vae("learned", 0), make_vae("learned", 0, edge_cost=0.1)])
    with pytest.raises(GraphflowsError, match="likelihood='bernoulli'"):
        Ensemble([make_vae("full", 0, likelihood="normal")])
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Tanh(), torch.nn.Linear(12, 5))
    other = GraphVAE((3, 4), 4, 2, "full", encoder=encoder, embedding_dim=5)
    with pytest.raises(GraphflowsError, match=r"encoder\.1 is a Tanh"):
        Ensemble([other])
    with pytest.raises(GraphflowsError, match="hidden_dim=None"):
        Ensemble([GraphVAE((3, 4), 4, 2, "full", hidden_dim=None)])


# ------------------------------------------------------------------------------------------------------- training


def tiny(structure, seeds=(0, 1, 2), **kwargs):
    options = {"num_nodes": 3, "node_dim": 2, "networks": SIZES, "batch_size": 8, "gate_rate": 10.0, **kwargs}
    return Settings("tiny", structure, tuple(seeds), **options)


def tiny_images(number=50, levels=2):
    generator = torch.Generator().manual_seed(3)
    parts = [
        torch.randint(levels, (n, 3, 4), generator=generator, dtype=torch.uint8) for n in (number, 12, 10)
    ]
    none = torch.zeros(0, dtype=torch.long)
    return Images("tiny", *parts, levels, none, none)


def trained(settings, images, epochs=1, way="auto"):
    trainer = Trainer(settings, images, torch.device("cpu"), way)
    rows = [trainer.run_epoch() for _ in range(epochs)]
    return trainer, rows


@pytest.mark.parametrize("structure", STRUCTURES)
def test_ensemble_of_three_is_three_single_runs(structure):
    images = tiny_images(42)  # five steps
    together, rows = trained(tiny(structure), images)
    assert together.data.num_steps == 5
    states = [together.ensemble.state_of(number) for number in range(3)]
    for number in range(3):
        alone, own = trained(tiny(structure, [number]), images)
        torch.testing.assert_close(rows[0]["loss"][number], own[0]["loss"][0], rtol=1e-6, atol=0)
        start = Trainer(tiny(structure, [number]), images, torch.device("cpu")).ensemble.state_of(0)
        for key, value in alone.ensemble.state_of(0).items():
            torch.testing.assert_close(states[number][key], value, rtol=1e-6, atol=1e-9)
            if key == "bottom_up.weight":
                assert (value - start[key]).abs().max() > 1e-3  # it was trained
    for key in ("bottom_up.weight", "decoder.1.running_mean", *(["gates.logits"] * (structure == "learned"))):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not torch.allclose(states[a][key], states[b][key])


def test_five_steps_are_those_of_the_class_and_adam():
    """The whole step, optimiser and batch statistics included, against the class trained with the same noise."""
    settings = tiny("learned", [5], num_nodes=4, anneal=0.5)
    images = tiny_images(42)
    trainer = Trainer(settings, images, torch.device("cpu"))
    vae = trainer.make_vae(5, images.shape)
    groups = [{"params": [p for p in vae.parameters() if p is not vae.gates.logits]}]
    optimizer = torch.optim.Adam([*groups, {"params": [vae.gates.logits], "lr": 1e-2}], lr=1e-3)
    for _ in range(2):
        trainer.run_epoch()
    again = Trainer(settings, images, torch.device("cpu")).data
    for epoch in range(2):
        vae.anneal(epoch, rate=0.5)
        again.draw()
        for _ in range(5):
            x, noise, gate_noise = again.next()
            again.advance()
            optimizer.zero_grad()
            reference_loss(vae, x[0].reshape(-1, 3, 4), noise[:, 0], gate_noise[0]).backward()
            optimizer.step()
    own = trainer.ensemble.state_of(0)
    exact = [key for key in own if "num_batches" not in key and key != "gates.temperature"]
    for key in exact:
        torch.testing.assert_close(own[key], vae.state_dict()[key], rtol=1e-6, atol=1e-8)


def test_gates_of_each_datum_are_trained_and_refused_otherwise():
    trainer, _ = trained(tiny("learned", gates_of="datum", freeze_after=1), tiny_images(), 2)
    assert trainer.data.gate_noise.shape == (6, 3, 8, 3)
    assert (trainer.ensemble.parameters["gates.logits"] != 0).all()
    assert trainer.ensemble.is_frozen.all()
    with pytest.raises(GraphflowsError, match="gates_of 'batch' or 'datum'; got 'pixel'"):
        trained(tiny("learned", gates_of="pixel"), tiny_images())


def test_paper_schedule_fast_gates_and_freezing():
    settings = tiny("learned", decay_every=2, anneal=0.5, floor=0.2, freeze_after=3)
    trainer = Trainer(settings, tiny_images(levels=5), torch.device("cpu"))
    seen = []
    for _ in range(5):
        trainer.run_epoch()
        rates = [round(rate.item(), 9) for rate in trainer.rates]
        seen.append((*rates, trainer.ensemble.temperature.item(), trainer.ensemble.is_frozen.all().item()))
    assert seen == [
        (1e-3, 1e-2, 1.0, False),
        (1e-3, 1e-2, 0.5, False),
        (2.5e-4, 2.5e-3, 0.25, False),
        (2.5e-4, 2.5e-3, 0.2, True),
        (6.25e-5, 6.25e-4, 0.2, True),
    ]
    probabilities = trainer.ensemble.gate_probabilities()
    assert ((probabilities == 0) | (probabilities == 1)).all()
    vae = trainer.vae_of(1)
    assert vae.gates.is_frozen
    torch.testing.assert_close(vae.gates.probabilities(), probabilities[1])


def test_straight_through_gates_are_hard_with_the_gradient_of_relaxed_ones():
    images = tiny_images()
    rounded, relaxed = (
        Trainer(tiny("learned", estimator=e, gate_start=0.8), images, torch.device("cpu"))
        for e in ("straight-through", "relaxed")
    )
    torch.testing.assert_close(relaxed.ensemble.gate_probabilities(), torch.full((3, 3), 0.8))
    noise = 3 * torch.randn(3, 3)
    values, gradients = [], []
    for trainer in (rounded, relaxed):
        gates = trainer.ensemble.relaxed_gates(noise)
        values.append(gates.detach())
        gradients.append(torch.autograd.grad(gates.sum(), trainer.ensemble.parameters["gates.logits"])[0])
    assert torch.equal(values[0], (values[1] > 0.5).double())
    assert set(values[0].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(*gradients)
    with pytest.raises(GraphflowsError, match="estimator among relaxed, straight-through; got 'rebar'"):
        Trainer(tiny("learned", estimator="rebar"), images, torch.device("cpu"))


def test_evaluation_has_exact_products():
    trainer = Trainer(tiny("full", precision="bfloat16"), tiny_images(), torch.device("cpu"))
    exact = Trainer(tiny("full"), tiny_images(), torch.device("cpu"))
    bounds = [evaluation.bound(t.ensemble, t.test)[0] for t in (exact, trainer)]
    assert not torch.equal(*bounds)
    with trainer.exact_products():
        assert torch.equal(bounds[0], evaluation.bound(trainer.ensemble, trainer.test)[0])
    assert trainer.ensemble.multiply_in == torch.bfloat16


def test_each_epoch_sees_each_image_once_and_draws_grey_ones_anew():
    trainer = Trainer(tiny("chain", batch_size=10), tiny_images(levels=2), torch.device("cpu"))
    data, first = trainer.data, None
    for _ in range(2):
        data.draw()
        for member in range(3):
            rows = data.batches[:, member].flatten(0, 1)
            assert torch.equal(sorted_rows(rows), sorted_rows(data.images))
            assert not torch.equal(rows, data.images)
        assert first is None or not torch.equal(first, data.batches)
        first = data.batches.clone()
    grey = Trainer(tiny("chain", batch_size=10), tiny_images(200, levels=5), torch.device("cpu")).data
    total = 0.0
    for _ in range(20):
        grey.draw()
        assert set(grey.batches.unique().tolist()) == {0, 1}
        total += grey.batches.double().mean().item()
    mean = (grey.images / 4).double()
    error = ((mean * (1 - mean)).sum() / 3 / 20).sqrt() / mean.numel()  # three members, twenty epochs
    assert abs(total / 20 - mean.mean()) < 5 * error


def sorted_rows(rows):
    return torch.tensor(sorted(rows.tolist()))


@pytest.mark.parametrize("structure", ["learned", "independent"])
def test_interrupted_run_is_the_same_run_bit_by_bit(structure, tmp_path):
    settings, images = tiny(structure, freeze_after=3, decay_every=2), tiny_images(levels=5)
    whole, rows = trained(settings, images, 5)
    part, _ = trained(settings, images, 2)
    checkpoint.save(tmp_path / "c", part.state())
    rest = Trainer(settings, images, torch.device("cpu"))
    rest.load(checkpoint.load(tmp_path / "c", torch.device("cpu")))
    rest.measure(0.0)  # leaves no trace
    later = [rest.run_epoch() for _ in range(3)]
    for key, value in whole.tensors().items():
        assert torch.equal(value, rest.tensors()[key]), key
    for a, b in zip(rows[2:], later, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_best_parameters_of_each_member_are_kept():
    settings = tiny("full", rate=0.3)  # too fast: later epochs are worse
    trainer = Trainer(settings, tiny_images(), torch.device("cpu"))
    bounds, states = [], []
    for _ in range(6):
        bounds.append(trainer.run_epoch()["validation"])
        states.append([trainer.ensemble.state_of(number) for number in range(3)])
    expected = torch.tensor(bounds).argmax(0).tolist()
    assert len(set(expected)) > 1 or expected[0] < 5
    assert trainer.take_best() == [best + 1 for best in expected]
    for number, best in enumerate(expected):
        for key, value in trainer.ensemble.state_of(number).items():
            assert torch.equal(value, states[best][number][key])
    again, _ = evaluation.bound(trainer.ensemble, trainer.validation, rows=trainer.rows)
    torch.testing.assert_close(again, torch.tensor(bounds).amax(0))


def test_bfloat16_products_keep_the_loss_in_full_precision():
    images = tiny_images()
    exact, rows = trained(tiny("learned"), images, 3)
    rough, own = trained(tiny("learned", precision="bfloat16"), images, 3)
    for tensor in rough.tensors().values():
        assert tensor.dtype != torch.bfloat16
    losses = rough.ensemble.losses(*rough.data.next())
    assert losses.dtype == torch.float64
    assert rows[-1]["loss"] != own[-1]["loss"]
    torch.testing.assert_close(
        torch.tensor(own[-1]["loss"]), torch.tensor(rows[-1]["loss"]), rtol=0.03, atol=0
    )
    assert exact.ensemble.multiply_in is None


# ------------------------------------------------------------------------------------------------------- capture


def test_capture_falls_back_with_the_reason(monkeypatch):
    def no_compiler(function):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    images = tiny_images()
    plain, _ = trained(tiny("learned"), images)
    assert (plain.captured.way, plain.captured.reasons) == ("eager", [])
    fallen, _ = trained(tiny("learned"), images, way="compiled graph")
    assert fallen.captured.way == "eager"
    assert fallen.captured.reasons == [
        "compiled graph: RuntimeError: no compiler here",
        "graph: GraphflowsError: Expected a CUDA device for a graph; got cpu.",
        "compiled: RuntimeError: no compiler here",
    ]
    for key, value in plain.tensors().items():  # and training is what it would have been
        assert torch.equal(value, fallen.tensors()[key]), key


def test_capture_refuses_a_step_with_other_losses(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda *args: function(*args) + 0.5)
    trainer, _ = trained(tiny("full"), tiny_images(), way="compiled")
    assert trainer.captured.way == "eager"
    assert "Expected the losses of the step as written" in trainer.captured.reasons[0]
    monkeypatch.setattr(torch, "compile", lambda function: lambda *args: function(*args))
    trainer, _ = trained(tiny("full"), tiny_images(), way="compiled")
    assert (trainer.captured.way, trainer.captured.reasons) == ("compiled", [])


def test_unknown_way_is_refused():
    with pytest.raises(
        GraphflowsError, match=r"among auto, compiled graph, graph, compiled, eager; got 'fast'"
    ):
        trained(tiny("full"), tiny_images(), way="fast")


@pytest.mark.slow
def test_compiled_step_is_the_same_step():
    images = tiny_images()
    plain, rows = trained(tiny("learned"), images, 2)
    compiled, own = trained(tiny("learned"), images, 2, way="compiled")
    assert (compiled.captured.way, compiled.captured.reasons) == ("compiled", [])
    torch.testing.assert_close(torch.tensor(own[1]["loss"]), torch.tensor(rows[1]["loss"]))
    for number in range(3):
        for key, value in plain.ensemble.state_of(number).items():
            torch.testing.assert_close(compiled.ensemble.state_of(number)[key], value, rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("way", ["graph", "compiled graph"])
def test_captured_step_is_the_same_step_on_a_gpu(structure, way):
    images, device = tiny_images(), torch.device("cuda")
    plain, captured = (Trainer(tiny(structure), images, device, w) for w in ("eager", way))
    assert (captured.captured.way, captured.captured.reasons) == (way, [])
    for _ in range(3):
        a, b = plain.run_epoch(), captured.run_epoch()
        torch.testing.assert_close(torch.tensor(a["loss"]), torch.tensor(b["loss"]), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------- evaluation


def test_log_evidence_and_recalibration_are_those_of_the_class():
    trainer, _ = trained(tiny("learned", [0, 1], node_dim=1), tiny_images(), 30)
    ensemble, images = trainer.ensemble, trainer.test
    vaes = [trainer.vae_of(number) for number in range(2)]
    found = evaluation.log_evidence(ensemble, images, 3000, rows=700, images_at_once=4)
    for number, vae in enumerate(vaes):
        other = vae.log_evidence(images.double().reshape(-1, 3, 4), 3000)
        difference = found["log_evidence"][number] - other.log_evidence
        error = other.standard_error * 2**0.5  # of both estimates, from 3,000 samples each
        trusted = (other.khat < 0.7) & (found["khat"][number] < 0.7)  # else the errors mean nothing
        assert trusted.sum() >= 5
        assert (difference.abs() < 5 * error)[trusted].all()
    assert found["log_evidence"].shape == found["khat"].shape == (2, 10)
    training = trainer.data.images
    evaluation.recalibrate(ensemble, training, batch_size=25)
    for number, vae in enumerate(vaes):
        state = ensemble.state_of(number)
        data = training.double().reshape(-1, 3, 4)
        before = vae.state_dict()["encoder.2.running_mean"].clone()
        vae.recalibrate(data, batch_size=25)  # other noise; before the nodes there is none
        torch.testing.assert_close(
            state["encoder.2.running_mean"], vae.state_dict()["encoder.2.running_mean"]
        )
        torch.testing.assert_close(state["encoder.2.running_var"], vae.state_dict()["encoder.2.running_var"])
        assert not torch.allclose(before, state["encoder.2.running_mean"])
    assert ensemble.momentum == 0.1


def test_log_evidence_stops_at_its_deadline():
    trainer, _ = trained(tiny("chain", [0]), tiny_images())
    done = []
    found = evaluation.log_evidence(
        trainer.ensemble, trainer.test, 20, 100, 4, deadline=time.monotonic() - 1, on_part=done.append
    )
    assert done == [4]  # the first part, and no more
    assert found["log_evidence"].shape == (1, 4)


# ----------------------------------------------------------------------------------------------------- the script


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Return a function that runs the script on tiny data."""
    monkeypatch.setattr(train, "load_images", lambda name, folder: tiny_images(levels=5))
    monkeypatch.setattr(train, "SMALL_NETWORKS", SIZES)
    threads = torch.get_num_threads()

    def run(*flags, out="out"):
        few = "--data-set digits --device cpu --num-nodes 3 --node-dim 2 --batch-size 8 --measure-seconds 0"
        few += f" --ll-particles 20 --images-at-once 4 --recalibrate 50 --out {tmp_path / out}"
        return train.main(train.read([*few.split(), *flags]))

    yield run
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def lines_of(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_script_writes_lines_pictures_and_weights(script, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    flags = ("--seeds", "0", "1", "--epochs", "2", "--results", str(results))
    finals = script("--structures", "learned", "independent", *flags)
    said = capsys.readouterr().out
    assert "steps per second" in said
    assert "2,000 epochs would take" in said
    out = tmp_path / "out"
    lines = lines_of(out / "digits-learned-3x2-s0_1.jsonl")
    assert [line["kind"] for line in lines] == ["start", "epoch", "epoch", "final"]
    assert lines[-1] == finals["learned"]
    assert lines[-1]["ll_images"] == 10
    kept = Results(results).read()
    assert list(kept) == ["trained digits-independent-3x2-s0_1 2", "trained digits-learned-3x2-s0_1 2"]
    assert kept["trained digits-learned-3x2-s0_1 2"]["elbo"] == lines[-1]["elbo"]
    assert "| independent (VAE) |  | 2 | 2 |" in report_ensemble.trained_section(kept)
    for picture in ("learned-3x2-s0_1-images", "learned-3x2-s0_1-gates", "independent-3x2-s0_1-images"):
        content = (out / f"digits-{picture}.png").read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", content[16:24])
        size = content.index(b"IDAT")
        length = struct.unpack(">I", content[size - 4 : size])[0]
        assert len(zlib.decompress(content[size + 4 : size + 4 + length])) == height * (width + 1)
    saved = torch.load(out / "digits-learned-3x2-s0_1-weights1.pt", weights_only=True)
    vae = GraphVAE(saved["input_shape"], 3, 2, saved["structure"], **SIZES)
    vae.load_state_dict(saved["state"])
    torch.testing.assert_close(vae.gates.probabilities().tolist(), lines[-1]["gates"][1])
    before = (out / "digits-learned-3x2-s0_1.jsonl").read_text()
    assert script("--structures", "learned", "--seeds", "0", "1", "--epochs", "2")["learned"] == lines[-1]
    assert (out / "digits-learned-3x2-s0_1.jsonl").read_text() == before


def test_script_goes_on_where_it_was(script, tmp_path):
    script("--epochs", "2")
    script("--epochs", "4")
    script("--epochs", "4", out="whole")
    parts, whole = (lines_of(tmp_path / out / "digits-learned-3x2-s0.jsonl") for out in ("out", "whole"))
    assert [line["kind"] for line in parts] == [*("start", "epoch", "epoch", "final")] * 2
    figures = {"elbo", "ll", "kl", "gates", "validation", "loss"}
    for a, b in zip([line for line in parts if line["kind"] == "epoch"], whole[1:5], strict=True):
        assert {key: a[key] for key in figures & set(a)} == {key: b[key] for key in figures & set(b)}
    assert {key: parts[-1].get(key) for key in figures} == {key: whole[-1].get(key) for key in figures}


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one on which only drawing, steps and evaluation take time, always the same."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def takes(owner, name, seconds):
        function = getattr(owner, name)

        def slow(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    takes(EpochData, "draw", 0.5)
    takes(EpochData, "advance", 0.25)  # a step
    takes(evaluation, "bound", 1.0)
    takes(evaluation, "log_weights", 2.0)
    return now


def test_budget_chooses_the_epochs_and_is_kept(script, clock, tmp_path):
    final = script("--budget-seconds", "200")["learned"]
    assert 180 < clock[0] < 200
    assert final["stopped_by_the_budget"]
    assert final["ll_images"] == 10
    start = lines_of(tmp_path / "out" / "digits-learned-3x2-s0.jsonl")[0]
    assert start["steps_per_second"] == 4
    assert start["seconds_of_an_epoch"] == 0.5 + 6 * 0.25 + 1.0
    assert start["seconds_of_2000_epochs"] == 6000
    assert final["epoch"] == start["planned_epochs"]
    assert 30 < final["epoch"] < 60
    begin = clock[0]
    again = script("--budget-seconds", "100")["learned"]  # goes on
    assert clock[0] - begin < 100
    assert again["epoch"] > final["epoch"] + 10
    begin = clock[0]
    few = script("--budget-seconds", "300", "--epochs", str(again["epoch"] + 2))["learned"]
    assert clock[0] - begin < 60  # no more than was asked for
    assert (few["epoch"], few["stopped_by_the_budget"]) == (again["epoch"] + 2, False)


def test_budget_is_divided_among_structures(script, clock):
    finals = script("--structures", "full", "chain", "--budget-seconds", "200")
    assert clock[0] < 200
    assert 15 < finals["full"]["epoch"] <= finals["chain"]["epoch"] < 35  # what one leaves over, the next has


def test_slower_epochs_than_measured_are_stopped_in_time(script, clock, monkeypatch, tmp_path):
    run_epoch = Trainer.run_epoch

    def slower(trainer):
        clock[0] += 10.0
        return run_epoch(trainer)

    monkeypatch.setattr(Trainer, "run_epoch", slower)
    final = script("--budget-seconds", "200")["learned"]
    assert clock[0] < 200
    start = lines_of(tmp_path / "out" / "digits-learned-3x2-s0.jsonl")[0]
    assert 5 < final["epoch"] < start["planned_epochs"]
    assert final["stopped_by_the_budget"]


def test_budget_that_is_too_small_is_refused(script, clock, tmp_path):
    message = r"Expected a budget of at least \d+ seconds: .* for learned .* are left of its share"
    with pytest.raises(SystemExit, match=message) as error:
        script("--budget-seconds", "20")
    assert not (tmp_path / "out" / "digits-learned-3x2-s0-weights0.pt").exists()
    needed = re.search(r"at least (\d+) seconds", str(error.value))[1]
    clock[0] = 0.0
    assert script("--budget-seconds", needed)["learned"]["epoch"] == 1
    assert clock[0] < int(needed)
    clock[0] = 0.0
    both = ["--structures", "full", "chain", "--budget-seconds"]
    with pytest.raises(SystemExit, match=r"at least \d+ seconds: .* for full") as error:
        script(*both, needed, out="both")
    needed = re.search(r"at least (\d+) seconds", str(error.value))[1]
    clock[0] = 0.0
    finals = script(*both, needed, out="both")
    assert finals["full"]["epoch"] == 1 <= finals["chain"]["epoch"]
    assert clock[0] < int(needed)


def test_damaged_and_foreign_checkpoints_are_refused(script, tmp_path, monkeypatch):
    script("--epochs", "1")
    path = tmp_path / "out" / "work" / "digits-learned-3x2-s0.ckpt"
    content = path.read_bytes()
    for damaged in (content[:-7], content[:900], b"", content[:2000] + b"!" + content[2001:]):
        path.write_bytes(damaged)
        with pytest.raises(SystemExit, match=r"Expected a whole checkpoint .* it is damaged"):
            script("--epochs", "2")
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=r"same settings .* it has rate 0.001, not 0.002\. Move it away"):
        script("--epochs", "2", "--lr", "0.002")
    monkeypatch.setattr(train, "load_images", lambda name, folder: tiny_images(60, levels=5))
    with pytest.raises(SystemExit, match=r"same data set .* it has images for training 50, not 60"):
        script("--epochs", "2")
    monkeypatch.setattr(train, "load_images", lambda name, folder: tiny_images(7, levels=5))
    with pytest.raises(SystemExit, match="at least one batch of 8 images; there are 7"):
        script("--epochs", "2", out="other")


def test_record_survives_a_line_cut_off(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"kind": "epoch", "epoch": 1}\n{"kind": "epoch", "epoch": 2}\n{"kind": "epo')
    assert [line["epoch"] for line in Record(path, 1).lines] == [1]
    assert path.read_text() == '{"kind": "epoch", "epoch": 1}\n'


def test_script_needs_only_torch_pyro_numpy_and_the_package(tmp_path):
    """Modules that a bare machine lacks are hidden; the data file is one of packed bits."""
    code = f"""
import sys
for name in ("matplotlib", "sklearn", "pandas", "PIL", "zuko", "pgmpy"):
    sys.modules[name] = None
import numpy as np
from studies.graph_vae import train
import pyro_graphflows.datasets.images as images
images.compare = lambda *_: None  # the bits are random
bits = np.random.default_rng(0).integers(0, 256, (3, 130, 98), dtype=np.uint8)
np.savez_compressed({str(tmp_path / "binarized_mnist_larochelle.npz")!r}, train_bits=bits[0], valid_bits=bits[1],
                    test_bits=bits[2])
train.main(train.read(["--data", {str(tmp_path)!r}, "--epochs", "1", "--ll-images", "4", "--ll-particles", "10",
                       "--device", "cpu", "--measure-seconds", "0", "--out", {str(tmp_path / "out")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LL" in done.stdout
    assert (tmp_path / "out" / "binarized_mnist-learned-5x16-s0.jsonl").exists()


def test_remedies_are_compared_with_the_full_structure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(remedies, "load_images", lambda name: tiny_images(200, levels=5))
    monkeypatch.setattr(train, "SMALL_NETWORKS", SIZES)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: None)
    results = tmp_path / "results.jsonl"
    flags = ["--results", str(results), "--epochs", "2", "--ll-particles", "20", "--ways", "full"]
    remedies.main(remedies.parser().parse_args(flags))
    remedies.main(remedies.parser().parse_args([*flags, "gates 10, frozen 60", "published"]))
    lines = remedies.lines_of(Results(results).read())
    assert [line["way"] for line in lines] == ["full", "published", "gates 10, frozen 60"]
    d = torch.tensor(lines[1]["best"]["elbo"]) - torch.tensor(lines[0]["best"]["elbo"])
    mean, error = remedies.paired(lines[1], lines[0])
    assert mean == pytest.approx(d.mean().item())
    assert error == pytest.approx(d.std().item() / 5**0.5)
    assert f"{mean:+8.3f} ± {error:.3f}" in capsys.readouterr().out
    assert lines[1]["checked"][0]["gradient_mean_over_sd"]["median"] > 0
    page = report_ensemble.remedies_section(Results(results).read())
    assert f"{mean:+.3f} ± {error:.3f}" in page
    assert "gates 10, frozen 60" in page


def test_what_is_measured_on_the_way_leaves_no_trace():
    images, settings = tiny_images(levels=5), tiny("learned")
    plain, rows = trained(settings, images, 4)
    watched, _ = trained(settings, images, 2)
    found = remedies.evidence(watched)
    later = [watched.run_epoch() for _ in range(2)]
    for key, value in plain.tensors().items():
        assert torch.equal(value, watched.tensors()[key]), key
    assert later[-1]["loss"] == rows[-1]["loss"]
    assert found["epoch"] == 2
    with torch.no_grad():
        watched.ensemble.parameters["gates.logits"].fill_(1e6)  # no gradient is left
    assert remedies.evidence(watched)["gradient_mean_over_sd"]["median"] is None
    assert found["training_bound"] != found["training_bound_hard_gates"]
    assert found["validation"] != found["validation_recalibrated"]
