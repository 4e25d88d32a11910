"""BayesFlow's estimator for multilevel models, on the two-level normal, where BayesFlow is installed.

Its defaults: an encoder of the data for each network, coupling flows, standardised latent variables. It draws its own
simulations, of which each data set of a batch has its own size, and is trained by its own ``fit``. The estimator was
called ``GraphicalApproximator`` before version 2.1; those of versions 2.0.9 to 2.0.12 cannot be made ("property
'standardize_layers' has no setter"). It needs Python 3.12.

References:
    [1] Radev et al. (2023), BayesFlow: Amortized Bayesian Workflows With Neural Networks, JOSS 8(89).
"""

import importlib.util
import os
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGES = ("bayesflow", "keras")


def installed() -> bool:
    """Return whether the packages are there."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def _packages() -> tuple[Any, Any]:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    enabled = torch.is_grad_enabled()
    import bayesflow
    import keras

    torch.set_grad_enabled(enabled)  # importing it turns gradients off for everybody
    return bayesflow, keras


class Peer:
    """An estimator of the two-level normal.

    Args:
        groups: The least and the most groups of a simulation.
        data: The least and the most data of a group.
        seed: The seed of weights and simulations.
    """

    def __init__(self, groups: tuple[int, int], data: tuple[int, int], seed: int) -> None:
        bayesflow, keras = _packages()
        from bayesflow.experimental.multilevel_estimator import MultilevelEstimator
        from bayesflow.experimental.multilevel_simulator import MultilevelSimulator

        keras.utils.set_random_seed(seed)
        draw = np.random.default_rng(seed)

        def sizes() -> dict[str, int]:
            return {
                name: int(draw.integers(low, high + 1))
                for name, (low, high) in {"groups": groups, "data": data}.items()
            }

        simulator = MultilevelSimulator(meta_fn=sizes, is_batched=True)
        simulator.add_node("top", lambda batch_size: {"mu": draw.normal(size=(batch_size, 1))})
        simulator.add_node("effects", lambda mu: {"theta": draw.normal(mu)}, reps="groups")
        simulator.add_node("observed", lambda theta: {"x": draw.normal(theta)}, reps="data")
        simulator.add_edge("top", "effects")
        simulator.add_edge("effects", "observed")
        graph = simulator.graph.expand().invert()
        flows = [bayesflow.networks.CouplingFlow() for _ in graph.networks()]
        self.estimator = MultilevelEstimator(graph, inference_networks=flows)
        self.simulator = simulator

    def train(self, seconds: float, rates: tuple[float, float], batch_size: int) -> dict[str, Any]:
        """Train for some processor time, at a rate that falls exponentially from the first to the last.

        Returns:
            Numbers of steps and of weights, and the time.
        """
        bayesflow, keras = _packages()
        steps, begin = 0, time.process_time()

        class Clock(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
                share = (time.process_time() - begin) / seconds
                self.model.optimizer.learning_rate = rates[0] * (rates[1] / rates[0]) ** min(share, 1.0)

            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                nonlocal steps
                steps += 1
                self.model.stop_training = time.process_time() - begin >= seconds

        self.estimator.compile(optimizer=keras.optimizers.Adam(rates[0]))
        self.estimator.fit(
            simulator=self.simulator,
            batch_size=batch_size,
            num_batches=10**6,
            epochs=1,
            verbose=0,
            callbacks=[Clock()],
        )
        weights = sum(int(np.prod(each.shape)) for each in self.estimator.trainable_weights)
        figures = {"steps": steps, "seconds": time.process_time() - begin, "weights": weights, "set_up": 0.0}
        return {**figures, "bayesflow": bayesflow.__version__}

    def log_prob(self, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        """Return log-densities of draws, ``(number,)``.

        Args:
            x: The data, ``(n, groups)``.
            values: Values of mu and theta, ``(number, *plates)`` each.
        """
        number = len(values["mu"])
        found = {
            "top": {"mu": values["mu"].reshape(number, 1)},
            "effects": {"theta": values["theta"].reshape(-1, 1)},
            "observed": {"x": x.T.reshape(1, -1).expand(number, -1).reshape(-1, 1)},
        }
        return torch.as_tensor(self.estimator.log_prob(_long(x, number, found)))

    def draw_mu(self, x: Tensor, number: int) -> Tensor:
        """Return draws of mu for the data ``(n, groups)``."""
        samples = _long(x, 1, {"top": {}, "effects": {}, "observed": {"x": x.T.reshape(-1, 1)}})
        drawn = self.estimator.sample(num_samples=number, conditions=samples)
        return torch.as_tensor(drawn["top"].values["mu"]).reshape(number)


def _long(x: Tensor, number: int, values: dict[str, dict[str, Tensor]]) -> Any:
    """Return values in BayesFlow's long format: a row for each of ``number`` copies of the data, group and datum."""
    from bayesflow.experimental.multilevel_simulator.samples import NodeSamples

    n, groups = x.shape
    top, effect = np.arange(number), np.arange(number * groups)
    of_effect, of_datum = np.repeat(top, groups), np.repeat(effect, n)
    indices = {
        "top": {"dataset": top, "top": top},
        "effects": {"dataset": of_effect, "top": of_effect, "effects": effect},
        "observed": {
            "dataset": of_effect[of_datum],
            "top": of_effect[of_datum],
            "effects": of_datum,
            "observed": np.arange(number * groups * n),
        },
    }
    return {
        node: NodeSamples(indices[node], {name: each.numpy() for name, each in values[node].items()})
        for node in indices
    }
