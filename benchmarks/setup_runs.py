"""Set-up of slow models that cannot be batched: seconds, runs of the model, and what fewer draws cost.

    python -m benchmarks.setup_runs

A linear-Gaussian model whose runs each take some milliseconds of processor time, and which cannot be batched: a value
is read as a Python number. Printed are the processor seconds of set-up, how often the model ran, and the gap of the
start to the exact posterior in nats, beside that of a guide that had 10,000 draws of the same model without the wait.
"""

import time

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_graphflows import auto_faithful_guide

SIZE, NOISE = 10, 0.5
MIXING = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) / SIZE**0.5


class Slow:
    """The model.

    Args:
        seconds: How long a run takes.
        batched: Whether the model can be run for many draws at once.
    """

    def __init__(self, seconds: float, *, batched: bool = False) -> None:
        self.seconds, self.batched, self.runs = seconds, batched, 0

    def __call__(self, x: Tensor) -> None:
        """Run the model."""
        self.runs += 1
        begin = time.process_time()
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
        if not self.batched:
            float(z.sum(-1))  # one number in a run, and many in a batch of runs
        pyro.sample("x", dist.Normal(z @ MIXING.mT, NOISE).to_event(1), obs=x)
        while time.process_time() - begin < self.seconds:
            pass


def gap(guide: object, x: Tensor) -> float:
    """KL(guide | posterior), in nats, by draws."""
    precision = torch.eye(SIZE).double() + MIXING.double().mT @ MIXING.double() / NOISE**2
    covariance = torch.linalg.inv(precision)
    exact = dist.MultivariateNormal(
        covariance @ MIXING.double().mT @ x.double() / NOISE**2, (covariance + covariance.mT) / 2
    )
    total = 0.0
    with torch.no_grad():
        for _ in range(500):
            site = pyro.poutine.trace(guide).get_trace(x).nodes["z"]
            total += float(site["fn"].log_prob(site["value"]) - exact.log_prob(site["value"].double()))
    return total / 500


def main() -> None:
    """Run all."""
    torch.set_num_threads(1)
    for seconds in (0.0, 0.003, 0.012, 0.1):
        torch.manual_seed(0)
        x = torch.randn(SIZE)
        model = Slow(seconds)
        begin = time.process_time()
        guide = auto_faithful_guide(model, x, family="normal", strict=False)
        took, runs = time.process_time() - begin, model.runs
        model.seconds = 0.0
        said = f"set-up {took:.1f} s, {runs} runs of the model, gap {gap(guide, x):.4f}"
        print(f"{1e3 * seconds:3.0f} ms a run: {said}")
    guide = auto_faithful_guide(Slow(0.0, batched=True), x, family="normal")
    print(f"batched, 10,000 draws: gap {gap(guide, x):.4f}")


if __name__ == "__main__":
    main()
