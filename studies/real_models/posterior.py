"""What the study knows of a posterior: the model in Pyro, and the file with its data and reference draws.

The files hold, for each posterior of posteriordb [1], the data, thinned reference draws, means and standard deviations
of every parameter, and the log evidence where the prior is proper and it could be computed; for six targets of the
Inference Gym [2] the data, means and standard deviations. They are not part of the project; ``--data`` or the
environment variable ``REAL_MODELS_DATA`` names the folder with their two folders ``posteriordb`` and ``inference_gym``.

References:
    [1] Magnusson, Torgander, Bürkner, Zhang, Carpenter and Vehtari (2025), posteriordb: Testing, benchmarking and
        developing Bayesian inference algorithms, AISTATS.
    [2] Sountsov, Radul et al. (2020), Inference Gym, https://github.com/tensorflow/probability.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DATA_VARIABLE = "REAL_MODELS_DATA"
Values = dict[str, Tensor]


def unchanged(values: Values) -> Values:
    """Return the values: the sites are the parameters of the reference."""
    return values


@dataclass(frozen=True)
class Posterior:
    """A model and how it reads its data.

    Attributes:
        name: The name in the source.
        kind: ``regression``, ``hierarchical``, ``mixture``, ``time series``, ``gaussian process`` or
            ``differential equation``.
        model: The Pyro model, a function of its data.
        arguments: Make the model's arguments from the data arrays.
        plates: How many dimensions the plates of the model take.
        proper: Whether the prior is proper. Otherwise there is no evidence.
        local: Latent sites whose elements are independent given the data and all other sites.
        coupled: The start of the names of sites that are jointly normal given all others, a path.
        sites: Turn reference parameters, with draws along the first dimension, into site values.
        parameters: The inverse of ``sites``.
        gym: Whether the source is the Inference Gym: there are no reference draws then.
    """

    name: str
    kind: str
    model: Callable[..., Any]
    arguments: Callable[[Values], tuple[Any, ...]]
    plates: int
    proper: bool
    local: tuple[str, ...] = ()
    coupled: str | None = None
    sites: Callable[[Values], Values] = unchanged
    parameters: Callable[[Values], Values] = unchanged
    gym: bool = False


@dataclass(frozen=True)
class Reference:
    """The contents of a posterior's file.

    Attributes:
        data: The data arrays, as floating-point tensors of the default dtype.
        draws: Joint posterior draws of each parameter, along the first dimension; none from the Inference Gym.
        mean: Posterior means of each parameter, from all draws of the source.
        sd: Posterior standard deviations, likewise.
        log_evidence: The log evidence in nats, or None where the prior is improper or it is not known.
        log_evidence_error: Its standard error.
        mean_error: Standard errors of the means, where the source has them.
    """

    data: Values
    draws: Values
    mean: Values
    sd: Values
    log_evidence: float | None
    log_evidence_error: float | None
    mean_error: Values = field(default_factory=dict)


def data_folder(argument: str | Path | None) -> Path:
    """Return the folder of the files, from the argument or the environment variable.

    Raises:
        SystemExit: If neither is given, or the folder does not exist.
    """
    named = argument or os.environ.get(DATA_VARIABLE)
    if not named:
        raise SystemExit(
            f"Expected the folder of the posteriors' npz files: give --data or set {DATA_VARIABLE}."
        )
    folder = Path(named)
    if not (folder / "posteriordb").is_dir():
        raise SystemExit(f"Expected a folder with a folder posteriordb of npz files in it; {named} has none.")
    return folder


def tensor(value: Any) -> Tensor:
    """Return an array, or nested lists with None for what is missing, in the default dtype."""
    return torch.as_tensor(np.asarray(value, dtype=np.float64)).to(torch.get_default_dtype())


def read_gym(folder: Path, name: str) -> Reference:
    """Read a target of the Inference Gym. Exact means replace the published ones where the file has them."""
    record = json.loads((folder / "inference_gym" / f"{name}.json").read_text())
    exact = record.get("exact", {})
    truth = {key: exact.get(key, value) for key, value in record["ground_truth"].items()}
    mean, sd = ({key: tensor(value[part]) for key, value in truth.items()} for part in ("mean", "sd"))
    error = {
        key: tensor(value.get("mean_standard_error", 0.0)).expand_as(mean[key])
        for key, value in truth.items()
    }
    data = {key: tensor(value) for key, value in record["data"].items()}
    evidence = exact.get("log_evidence")
    return Reference(data, {}, mean, sd, evidence, None if evidence is None else 0.0, error)


def read_reference(folder: Path, name: str, joint: bool = True) -> Reference:
    """Read a posterior's file.

    Some parameters are stored with fewer rows; row j of those belongs with row j * n / rows of the others.

    Args:
        folder: The folder of the files.
        name: The posterior.
        joint: Keep only the rows that all parameters have. Otherwise each parameter has all of its own.
    """
    if (folder / "inference_gym" / f"{name}.json").is_file():
        return read_gym(folder, name)
    with np.load(folder / "posteriordb" / f"{name}.npz") as arrays:
        meta = json.loads(str(arrays["meta"]))
        parts: dict[str, Values] = {"data": {}, "draws": {}, "mean": {}, "sd": {}}
        for key in arrays.files:
            part, _, entry = key.partition(".")
            if part in parts:
                parts[part][entry] = tensor(arrays[key])
    draws = parts["draws"]
    if joint:
        fewest = min(len(value) for value in draws.values())
        draws = {key: value[:: len(value) // fewest] for key, value in draws.items()}
    evidence = meta["evidence"] or {}
    return Reference(
        parts["data"],
        draws,
        parts["mean"],
        parts["sd"],
        evidence.get("log_evidence"),
        evidence.get("std_error"),
    )
