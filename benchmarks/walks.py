"""Random walks as one site: parameters, memory, time of set-up and of calls, and the gap to the exact posterior.

    python -m benchmarks.walks [--steps 500]

One walk in several codings, each seen with noise: a normal with its Cholesky factor, sums of independent normals, and
independent normals whose differences are observed to be small; seen as one vector, in a plate of the model's, and in a
plate of many walks. The exact posterior is that of the linear-Gaussian model, in float64. One thread, processor time.
"""

import argparse
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from benchmarks.vectors import call_seconds, memory, num_parameters
from pyro_graphflows import auto_faithful_guide

STEP, NOISE = 0.3, 0.5
MANY = 20


def by_factor(x: Tensor) -> None:
    """A multivariate normal, given by its Cholesky factor."""
    size = x.shape[-1]
    root = STEP * torch.ones(size, size).tril()
    w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(size), scale_tril=root))
    pyro.sample("x", dist.Normal(w, NOISE).to_event(1), obs=x)


def by_sums(x: Tensor) -> None:
    """Independent steps, added up."""
    w = pyro.sample("w", dist.Normal(0.0, torch.ones(x.shape[-1])).to_event(1))
    pyro.sample("x", dist.Normal(STEP * w.cumsum(-1), NOISE).to_event(1), obs=x)


def by_differences(x: Tensor) -> None:
    """Independent positions whose differences are observed to be about zero."""
    w = pyro.sample("w", dist.Normal(0.0, 30.0 * torch.ones(x.shape[-1])).to_event(1))
    steps = w[..., 1:] - w[..., :-1]
    pyro.sample("steps", dist.Normal(steps, STEP).to_event(1), obs=torch.zeros(x.shape[-1] - 1))
    pyro.sample("x", dist.Normal(w, NOISE).to_event(1), obs=x)


def in_plate(x: Tensor) -> None:
    """Steps that are added up; the data are in a plate, and the walk outside."""
    w = pyro.sample("w", dist.Normal(0.0, torch.ones(len(x))).to_event(1))
    with pyro.plate("times", len(x)):
        pyro.sample("x", dist.Normal(STEP * w.cumsum(-1), NOISE), obs=x)


def many(x: Tensor) -> None:
    """Many walks."""
    with pyro.plate("walks", len(x)):
        w = pyro.sample("w", dist.Normal(0.0, torch.ones(x.shape[-1])).to_event(1))
        pyro.sample("x", dist.Normal(STEP * w.cumsum(-1), NOISE).to_event(1), obs=x)


def posterior(x: Tensor, model: Callable) -> tuple[Tensor, Tensor]:
    """The mean and the precision of the exact posterior, in float64."""
    size = x.shape[-1]
    eye = torch.eye(size, dtype=torch.float64)
    differences = eye - torch.diag(torch.ones(size - 1, dtype=torch.float64), -1)
    seen = eye
    if model is by_factor:
        prior = differences.T @ differences / STEP**2
    elif model is by_differences:
        prior = eye / 30.0**2 + differences[1:].T @ differences[1:] / STEP**2
    else:
        prior, seen = eye, STEP * torch.ones(size, size, dtype=torch.float64).tril()
    precision = prior + seen.T @ seen / NOISE**2
    return torch.linalg.solve(precision, seen.T @ x.double().unsqueeze(-1) / NOISE**2).squeeze(-1), precision


def gap(guide: Callable, x: Tensor, exact: tuple[Tensor, Tensor]) -> float:
    """KL(guide | posterior) for each walk, in nats."""
    mean, precision = exact
    log_det = torch.linalg.slogdet(precision)[1]
    total = 0.0
    for _ in range(20):
        with torch.no_grad():
            site = poutine.trace(guide).get_trace(x).nodes["w"]
            off = site["value"].double() - mean
            log_p = 0.5 * (log_det - off.shape[-1] * torch.tensor(2 * torch.pi).log())
            log_p = log_p - 0.5 * (off * (off @ precision)).sum(-1)
            total += float((site["fn"].log_prob(site["value"]) - log_p).mean())
    return total / 20


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    size = parser.parse_args().steps
    torch.set_num_threads(1)
    for model in (by_factor, by_sums, by_differences, in_plate, many):
        torch.manual_seed(0)
        pyro.clear_param_store()
        shape = (MANY, size) if model is many else (size,)
        x = STEP * torch.randn(shape).cumsum(-1) + NOISE * torch.randn(shape)
        exact = posterior(x, model)
        began = time.process_time()
        guide = auto_faithful_guide(model, x)
        print(f"{model.__name__}: set-up {time.process_time() - began:.1f} s", end=", ")
        print(f"{num_parameters(guide):,} parameters, {memory():.2f} GiB", end=", ")
        print(f"a call {1000 * call_seconds(guide, x):.1f} ms", end="; ")
        print(f"gap {gap(guide, x, exact):.4f} at the start", end=", ")
        for rate in (1e-3, 1e-2):
            svi = SVI(model, guide, Adam({"lr": rate}), Trace_ELBO())
            for _ in range(100):
                svi.step(x)
            print(f"{gap(guide, x, exact):.4f} after 100 steps at {rate}", end=", ")
        print(guide.describe().split("w: ")[-1][:90].replace("\n", " "))


if __name__ == "__main__":
    main()
