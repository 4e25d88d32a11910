"""Random walks as one site: parameters, memory, time of set-up and of calls, and the gap to the exact posterior.

    python -m benchmarks.walks [--steps 500]

One walk in several codings, each seen with noise: a normal with its Cholesky factor, sums of independent normals, and
independent normals whose differences are observed to be small; seen as one vector, in a plate of the model's, and in a
plate of many walks. The exact posterior is that of the linear-Gaussian model, in float64. The gap is that of a walk, in
nats, at the start and after 1, 10, 50 and 200 steps of Adam by one draw each; beside it that of Pyro's ``AutoNormal``
that starts at the best it can be. One thread, processor time.
"""

import argparse
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor

from benchmarks.vectors import call_seconds, memory, num_parameters
from pyro_graphflows import auto_faithful_guide

STEP, NOISE = 0.3, 0.5
MANY = 20
MARKS = (0, 1, 10, 50, 200)


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


def gap_of_mean_field(guide: AutoNormal, x: Tensor, exact: tuple[Tensor, Tensor]) -> float:
    """The same of ``AutoNormal``, by its formula."""
    mean, precision = exact
    off, scale = guide.locs.w.detach().double() - mean, guide.scales.w.detach().double()
    squares = (off * (off @ precision)).sum(-1) + (precision.diagonal() * scale.square()).sum(-1)
    log_det = torch.linalg.slogdet(precision)[1] + 2 * scale.log().sum(-1)
    return float(0.5 * (squares - off.shape[-1] - log_det).mean())


def mean_field(model: Callable, x: Tensor, exact: tuple[Tensor, Tensor]) -> AutoNormal:
    """AutoNormal at its optimum."""
    guide = AutoNormal(model)
    guide(x)
    mean, precision = exact
    with torch.no_grad():
        guide.locs.w.copy_(mean)
    guide.scales.w = precision.diagonal().rsqrt().expand_as(mean).to(guide.locs.w)
    return guide


def training(model: Callable, guide: Callable, x: Tensor, exact: tuple[Tensor, Tensor], rate: float) -> str:
    """The gaps on the way through a short training."""
    pyro.clear_param_store()
    svi = SVI(model, guide, Adam({"lr": rate}), Trace_ELBO())
    find_gap = gap_of_mean_field if isinstance(guide, AutoNormal) else gap
    gaps = []
    for step in range(MARKS[-1] + 1):
        if step in MARKS:
            gaps.append(f"{find_gap(guide, x, exact):.2f}")
        svi.step(x)
    return " / ".join(gaps)


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
        print(guide.describe().split("\n  w")[-1][:120].strip().replace("\n", " "))
        start = {name: value.clone() for name, value in guide.state_dict().items()}
        for rate in (1e-3, 1e-2):
            guide.load_state_dict(start)
            print(f"  at rate {rate}: gap {training(model, guide, x, exact, rate)}", end="; AutoNormal ")
            print(training(model, mean_field(model, x, exact), x, exact, rate), flush=True)


if __name__ == "__main__":
    main()
