"""The data and the model: psychometric curves, four numbers for each of 8,526 data sets.

The file (``psychometric.npz``, not part of the project; ``--data`` or the environment variable ``PSYCHOMETRIC_DATA``
names its folder) holds counts of right answers at nine stimuli, published with [1], and reference posteriors of 60 of
the data sets by quadrature.

References:
    [1] Amortized Bayesian Workflow (2026), TMLR; https://github.com/pipme/amortized-Bayesian-workflow.
    [2] Schütt, Harmeling, Macke and Wichmann (2016), Painfree and accurate Bayesian estimation of psychometric
        functions for (potentially) overdispersed data, Vision Research 122.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

DATA_VARIABLE = "PSYCHOMETRIC_DATA"
FILE = "psychometric.npz"
STIMULI = torch.tensor([-1.0, -0.25, -0.125, -0.0625, 0.0, 0.0625, 0.125, 0.25, 1.0])
NAMES = ("gamma", "lambd", "mu", "sigma")
EDGE = 1e-6  # probabilities keep this distance from 0 and 1, also where gamma + lambd > 1 (prior probability 6e-6)


def curve(gamma: Tensor, lambd: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """Return the probabilities of a right answer at each stimulus, (..., 9)."""
    rise = torch.special.ndtr((STIMULI - mu.unsqueeze(-1)) / sigma.unsqueeze(-1))
    p = gamma.unsqueeze(-1) + (1 - gamma - lambd).unsqueeze(-1) * rise
    return p.clamp(EDGE, 1 - EDGE)


def model(n_trials: Tensor, n_right: Tensor | None = None) -> None:
    """Lapses on both sides, bias and threshold of each data set."""
    with pyro.plate("data", len(n_trials)):
        gamma = pyro.sample("gamma", dist.Beta(1.0, 10.0))
        lambd = pyro.sample("lambd", dist.Beta(1.0, 10.0))
        m = pyro.sample("m", dist.Beta(2.0, 2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        p = curve(gamma, lambd, 2 * m - 1, sigma)
        pyro.sample("n_right", dist.Binomial(n_trials, p).to_event(1), obs=n_right)


def of_draws(draws: dict[str, Tensor]) -> Tensor:
    """Return the four numbers of the reference, (draws, data, 4)."""
    return torch.stack([draws["gamma"], draws["lambd"], 2 * draws["m"] - 1, draws["sigma"]], -1)


@dataclass(frozen=True)
class Curves:
    """The data sets.

    Attributes:
        n_trials: Trials at each stimulus, (8526, 9).
        n_right: Right answers, (8526, 9).
        reference: Which data sets have a reference, (60,).
        mean: Means of gamma, lambd, mu and sigma there, (60, 4).
        sd: Standard deviations, (60, 4).
    """

    n_trials: Tensor
    n_right: Tensor
    reference: Tensor
    mean: Tensor
    sd: Tensor

    def __len__(self) -> int:
        return len(self.n_trials)


def data_folder(given: Path | None) -> Path | None:
    """Return the folder of the data, by flag or environment; None where it is not."""
    folder = given or (Path(os.environ[DATA_VARIABLE]) if DATA_VARIABLE in os.environ else None)
    return folder if folder is not None and (folder / FILE).exists() else None


def read(folder: Path) -> Curves:
    with np.load(folder / FILE) as file:
        assert np.allclose(file["stimulus"], STIMULI.numpy())
        return Curves(
            torch.as_tensor(file["n_trials"], dtype=torch.float32),
            torch.as_tensor(file["n_right"], dtype=torch.float32),
            torch.as_tensor(file["ref_index"], dtype=torch.long),
            torch.as_tensor(file["ref_mean"]),
            torch.as_tensor(file["ref_sd"]),
        )
