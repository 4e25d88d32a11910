"""Training an ensemble by the paper's schedule: epochs without a stop, validation, states that go on bit by bit."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_graphflows import GraphVAE
from pyro_graphflows.datasets import Images, binarize
from studies.graph_vae import capture, evaluation
from studies.graph_vae.ensemble import Ensemble
from studies.graph_vae.epochs import EpochData

STRUCTURES = ("learned", "full", "chain", "independent")
SMALL_NETWORKS = {
    "encoder_dims": [128, 128, 64],
    "decoder_dims": [64, 128, 128],
    "embedding_dim": 64,
    "hidden_dim": 64,
}


@dataclass(frozen=True)
class Settings:
    """What an ensemble is and how it is trained; a checkpoint goes on only with the same."""

    data_set: str
    structure: str
    seeds: tuple[int, ...]
    num_nodes: int = 5
    node_dim: int = 16
    decoder_input: str = "all"
    networks: Mapping[str, Any] = field(default_factory=dict)
    edge_cost: float = 0.0
    batch_size: int = 64
    rate: float = 1e-3
    decay: float = 0.25  # what the rate is multiplied by
    decay_every: int = 200  # epochs
    anneal: float = 0.99  # what the temperature is multiplied by after each epoch
    floor: float = 0.1  # the lowest temperature
    gate_rate: float = 1.0  # the rate of the gates as a multiple of the others'
    freeze_after: int | None = None  # epochs after which gates are hard in training too
    gate_start: float = 0.5  # the probability that a gate is open at the start
    estimator: str = "relaxed"  # of the gates' gradient: relaxed or straight-through
    gates_of: str = "batch"  # what has gates of its own in training: each batch, or each datum
    validate_every: int = 1  # epochs
    precision: str = "float32"  # of matrix products: float32, tf32 or bfloat16

    @property
    def name(self) -> str:
        """The name of the run's files."""
        gates = f"-gates{self.gate_rate:g}" if self.gate_rate != 1 else ""
        gates += f"-frozen{self.freeze_after}" if self.freeze_after is not None else ""
        gates += f"-start{self.gate_start:g}" if self.gate_start != 0.5 else ""
        gates += f"-{self.estimator}" if self.estimator != "relaxed" else ""
        gates += "-datum" if self.gates_of != "batch" else ""
        cost = f"-cost{self.edge_cost:g}" if self.edge_cost else ""
        precision = f"-{self.precision}" if self.precision != "float32" else ""
        first = "-first" if self.decoder_input == "first" else ""
        size = f"{self.num_nodes}x{self.node_dim}"
        seeds = "_".join(map(str, self.seeds))
        return f"{self.data_set}-{self.structure}-{size}{first}{gates}{cost}{precision}-s{seeds}"

    def words(self) -> dict[str, Any]:
        """Return the settings as numbers, words and lists, as they are written down."""
        return {**asdict(self), "seeds": list(self.seeds), "networks": dict(self.networks)}


class Trainer:
    """An ensemble in training on a device.

    Args:
        settings: What to train.
        images: The data set.
        device: Where to.
        way: How a step is run (``capture.WAYS``), or ``"auto"``.

    Attributes:
        ensemble: The models.
        epoch: The number of epochs done.
        seconds: The time that they took.
        captured: The step, with the way it runs and the reasons why not a faster one.
        best_at: For each member the number of epochs with the best validation bound so far.
        best_bound: That bound.
    """

    def __init__(self, settings: Settings, images: Images, device: torch.device, way: str = "auto") -> None:
        self.settings, self.device = settings, device
        torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
        train = images.train.flatten(1)
        self.data_facts = {
            "images for training": len(train),
            "images for validation": len(images.validation),
            "shape": list(images.shape),
            "levels": images.num_levels,
        }
        self.ensemble = Ensemble(
            [self.make_vae(seed, images.shape).to(device) for seed in settings.seeds],
            torch.bfloat16 if settings.precision == "bfloat16" else None,
            settings.estimator,
        )
        ensemble = self.ensemble
        dtype = ensemble.parameters["bottom_up.bias"].dtype
        self.data = EpochData(
            train.to(device),
            images.num_levels,
            settings.seeds,
            settings.batch_size,
            (ensemble.num_nodes, ensemble.node_dim),
            ensemble.num_gates,
            dtype,
            settings.gates_of,
        )
        drawn = torch.Generator().manual_seed(2019)
        self.validation, self.test = (
            binarize(part, images.num_levels, drawn).flatten(1).to(torch.uint8).to(device)
            for part in (images.validation, images.test)
        )
        self.rows = 500 if device.type == "cpu" else 5000
        gates = [ensemble.parameters["gates.logits"]] if ensemble.num_gates else []
        others = [value for key, value in ensemble.parameters.items() if key != "gates.logits"]
        self.rates = [torch.tensor(settings.rate, device=device, dtype=torch.float32) for _ in range(2)]
        groups = [{"params": others, "lr": self.rates[0]}, {"params": gates, "lr": self.rates[1]}]
        self.optimizer = torch.optim.Adam(
            groups if gates else groups[:1], fused=True, capturable=device.type == "cuda"
        )
        self.loss_sum = torch.zeros(ensemble.size, dtype=torch.float64, device=device)
        self.epoch, self.seconds = 0, 0.0
        self.best_bound = torch.full((ensemble.size,), -torch.inf, dtype=torch.float64, device=device)
        self.best_at = torch.zeros(ensemble.size, dtype=torch.long, device=device)
        self._start_optimizer()
        self.best = {key: value.detach().clone() for key, value in ensemble.tensors().items()}
        sources = [generator.get_state() for generator in self.data.generators]
        self._set_schedule()
        self.data.draw()
        self.captured = capture.captured(
            self._make_step,
            ensemble.losses,
            way,
            device,
            self.tensors(),
            self.loss_sum,
            1e-3 if settings.precision == "float32" else 2e-2,
        )
        for generator, state in zip(self.data.generators, sources, strict=True):
            generator.set_state(state)

    def make_vae(self, seed: int, shape: torch.Size) -> GraphVAE:
        """Return an untrained model."""
        settings = self.settings
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        vae = GraphVAE(
            tuple(shape),
            settings.num_nodes,
            settings.node_dim,
            settings.structure,
            decoder_input=settings.decoder_input,
            edge_cost=settings.edge_cost,
            **settings.networks,
        )
        if vae.gates is not None:
            with torch.no_grad():
                vae.gates.logits.fill_(math.log(settings.gate_start / (1 - settings.gate_start)))
        return vae

    def vae_of(self, number: int) -> GraphVAE:
        """Return a member as a model of its own, as it is now."""
        vae = self.make_vae(self.settings.seeds[number], self.ensemble.template.input_shape).to(self.device)
        vae.load_state_dict(self.ensemble.state_of(number))
        return vae

    # -------------------------------------------------------------------------------------------------- one step
    def _make_step(self, losses: capture.LossFunction) -> capture.Step:
        def step() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            each = losses(*self.data.next())
            each.sum().backward()
            self.optimizer.step()
            with torch.no_grad():
                self.loss_sum.add_(each.detach())
                self.data.advance()

        return step

    def _start_optimizer(self) -> None:
        """Let the optimiser make its state, which is to begin from zero, by a step that is taken back."""
        before = {key: value.detach().clone() for key, value in self.ensemble.tensors().items()}
        self._make_step(self.ensemble.losses)()
        with torch.no_grad():
            for key, value in self.ensemble.tensors().items():
                value.copy_(before[key])
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
            self.loss_sum.zero_()
            self.data.place.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a step changes, and the best parameters so far."""
        found = {f"ensemble {key}": value for key, value in self.ensemble.tensors().items()}
        for key, parameter in self.ensemble.parameters.items():
            for what, value in self.optimizer.state[parameter].items():
                found[f"adam {key} {what}"] = value
        found |= {"losses": self.loss_sum, "place": self.data.place}
        found |= {"best bound": self.best_bound, "best at": self.best_at}
        return found | {f"best {key}": value for key, value in self.best.items()}

    # -------------------------------------------------------------------------------------------------- epochs
    def _set_schedule(self) -> None:
        settings, done = self.settings, self.epoch
        rate = settings.rate * settings.decay ** (done // settings.decay_every)
        self.rates[0].fill_(rate)
        self.rates[1].fill_(rate * settings.gate_rate)
        self.ensemble.temperature.fill_(max(settings.floor, settings.anneal**done))
        if settings.freeze_after is not None and done == settings.freeze_after:
            self.ensemble.freeze()

    def run_epoch(self) -> dict[str, Any]:
        """Train for one epoch; the host waits for the device once, at its end.

        Returns:
            What is written down of the epoch.
        """
        begin = time.monotonic()
        self._set_schedule()
        self.data.draw()
        self.loss_sum.zero_()
        for _ in range(self.data.num_steps):
            self.captured.run()
        self.epoch += 1
        row: dict[str, Any] = {"kind": "epoch", "epoch": self.epoch}
        if self.epoch % self.settings.validate_every == 0:
            row["validation"] = self._validate().tolist()
        row["loss"] = (self.loss_sum / self.data.num_steps).tolist()
        if self.ensemble.num_gates:
            row["gates"] = [
                [round(p, 4) for p in line] for line in self.ensemble.gate_probabilities().tolist()
            ]
        row["seconds"] = time.monotonic() - begin
        self.seconds += row["seconds"]
        return row

    @torch.no_grad()
    def _validate(self) -> Tensor:
        """Return the validation bounds; keep what is better than before."""
        bounds, _ = evaluation.bound(self.ensemble, self.validation, rows=self.rows)
        better = bounds > self.best_bound
        self.best_bound.copy_(torch.where(better, bounds, self.best_bound))
        self.best_at.copy_(torch.where(better, self.epoch, self.best_at))
        for key, value in self.ensemble.tensors().items():
            if key != "temperature":
                choice = better.view(-1, *[1] * (value.dim() - 1))
                self.best[key].copy_(torch.where(choice, value, self.best[key]))
        return bounds

    @torch.no_grad()
    def take_best(self) -> list[int]:
        """Go back to the best parameters of each member; return after how many epochs they were had."""
        found = self.best_at.tolist()
        if not all(found):
            return [self.epoch] * self.ensemble.size  # nothing was validated yet
        for key, value in self.ensemble.tensors().items():
            if key != "temperature":
                value.copy_(self.best[key])
        return found

    # ------------------------------------------------------------------------------------------------ measurements
    @contextmanager
    def exact_products(self) -> Iterator[None]:
        """Do matrix products in full precision inside, whatever they are done in while training."""
        before = torch.get_float32_matmul_precision(), self.ensemble.multiply_in
        torch.set_float32_matmul_precision("highest")
        self.ensemble.multiply_in = None
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            self.ensemble.multiply_in = before[1]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def measure(self, seconds: float = 1.0) -> dict[str, float]:
        """Measure how long things take; afterwards everything is as it was.

        Args:
            seconds: How long to make steps.

        Returns:
            The seconds of a ``step``, of an ``epoch`` with its validation, and of a ``validation``.
        """
        before = {key: value.clone() for key, value in self.tensors().items()}
        sources = [generator.get_state() for generator in self.data.generators]
        begin = time.monotonic()
        self.data.draw()
        self.synchronize()
        drawing = time.monotonic() - begin
        with torch.enable_grad():
            for _ in range(3):
                self.captured.run()
            self.synchronize()
            begin, steps = time.monotonic(), 0
            while time.monotonic() - begin < seconds or steps < 5:
                for _ in range(5):
                    self.captured.run()
                steps += 5
                self.synchronize()
            step = (time.monotonic() - begin) / steps
        evaluation.bound(self.ensemble, self.validation[: self.rows], rows=self.rows)
        self.synchronize()
        begin = time.monotonic()
        self._validate()
        self.synchronize()
        validation = time.monotonic() - begin
        for key, value in self.tensors().items():
            value.copy_(before[key])
        for generator, state in zip(self.data.generators, sources, strict=True):
            generator.set_state(state)
        epoch = drawing + step * self.data.num_steps + validation / self.settings.validate_every
        return {"step": step, "epoch": epoch, "validation": validation}

    # -------------------------------------------------------------------------------------------------- checkpoints
    def state(self) -> dict[str, Any]:
        """Return all that training goes on from."""
        return {
            "settings": self.settings.words(),
            "data": self.data_facts,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "tensors": {key: value.detach() for key, value in self.tensors().items()},
            "sources": [generator.get_state() for generator in self.data.generators],
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same settings and data."""
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        for key, value in self.tensors().items():
            value.copy_(state["tensors"][key])
        for generator, source in zip(self.data.generators, state["sources"], strict=True):
            generator.set_state(source.cpu())
