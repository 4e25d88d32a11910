"""Long vectors: parameters, memory, time of set-up, calls and steps, and the gap to the exact posterior.

    python -m benchmarks.vectors [--elements 1000] [--weights 2000]

Prints, for ``z ~ N(0, I)`` observed with noise element by element in a plate of 500 data, what a guide costs and its
gap before and after 300 steps of Adam at 1e-3; and for a Bayesian network with one hidden layer, the time of a step as
a ratio to ``AutoLowRankMultivariateNormal`` in interleaved rounds, and the ELBO of both after equal numbers of steps.
One thread, processor time.
"""

import argparse
import resource
import time

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal
from pyro.optim import Adam
from torch import Tensor

from pyro_graphflows import auto_faithful_guide

ROWS = 500
DATA, INPUTS, NOISE = 100, 19, 0.1


def elementwise(x: Tensor) -> None:
    """A standard normal vector for each datum, seen with noise."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(x.shape[-1])).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def num_parameters(guide: torch.nn.Module) -> int:
    """The number of numbers that are trained."""
    return sum(parameter.numel() for parameter in guide.parameters())


def memory() -> float:
    """The most memory that the process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def call_seconds(guide: torch.nn.Module, x: Tensor) -> float:
    """The median processor time of seven calls."""
    times = []
    for _ in range(7):
        began = time.process_time()
        guide(x)
        times.append(time.process_time() - began)
    return sorted(times)[3]


def elements(size: int) -> None:
    """Print what a guide of long vectors costs, and how far it is from the exact posterior."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, size) * 2**0.5
    exact = dist.Normal(x / 2, 0.5**0.5).to_event(1)

    def gap() -> float:
        with torch.no_grad():
            traces = [poutine.trace(guide).get_trace(x).nodes["z"] for _ in range(5)]
        return (
            sum(float((z["fn"].log_prob(z["value"]) - exact.log_prob(z["value"])).mean()) for z in traces) / 5
        )

    began = time.process_time()
    guide = auto_faithful_guide(elementwise, x)
    print(f"{size} elements in a plate of {ROWS}: set-up {time.process_time() - began:.1f} s", end=", ")
    print(f"{num_parameters(guide):,} parameters, {memory():.2f} GiB", end=", ")
    print(
        f"a call {1000 * call_seconds(guide, x):.0f} ms; nats off a datum: {gap():.3f} at the start", end=", "
    )
    pyro.clear_param_store()
    svi = SVI(elementwise, guide, Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(300):
        svi.step(x)
    print(f"{gap():.3f} after 300 steps")


def network(num_weights: int) -> None:
    """Print how a step and the ELBO of a Bayesian network compare with a low-rank normal."""
    torch.manual_seed(0)
    hidden = num_weights // (INPUTS + 1)
    inputs = torch.randn(DATA, INPUTS)
    targets = torch.sin(inputs[:, 0])

    def model(inputs: Tensor, targets: Tensor) -> None:
        first = pyro.sample("first", dist.Normal(0.0, torch.ones(hidden * INPUTS)).to_event(1))
        second = pyro.sample("second", dist.Normal(0.0, torch.ones(hidden) / hidden**0.5).to_event(1))
        features = torch.tanh(inputs @ first.reshape(hidden, INPUTS).mT)
        with pyro.plate("data", len(inputs)):
            pyro.sample("y", dist.Normal((features * second).sum(-1), NOISE), obs=targets)

    began = time.process_time()
    guide = auto_faithful_guide(model, inputs, targets)
    print(f"network of {hidden * (INPUTS + 1)} weights: set-up {time.process_time() - began:.1f} s", end=", ")
    print(f"{num_parameters(guide):,} parameters")
    pyro.clear_param_store()
    guides = {"ours": guide, "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal(model, rank=10)}
    runs = {name: SVI(model, each, Adam({"lr": 5e-3}), Trace_ELBO()) for name, each in guides.items()}
    spent = dict.fromkeys(runs, 0.0)
    losses: dict[str, float] = {}
    for svi in runs.values():
        svi.step(inputs, targets)
    for _ in range(30):
        for name, svi in runs.items():
            began = time.process_time()
            losses[name] = sum(svi.step(inputs, targets) for _ in range(20)) / 20
            spent[name] += time.process_time() - began
    ratio = spent["ours"] / spent["AutoLowRankMultivariateNormal"]
    ended = ", ".join(f"{name} {-loss:.0f}" for name, loss in losses.items())
    print(f"  a step {ratio:.1f} times that of AutoLowRankMultivariateNormal; ELBO after 600 steps: {ended}")


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=1000)
    parser.add_argument("--weights", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    elements(options.elements)
    network(options.weights)


if __name__ == "__main__":
    main()
