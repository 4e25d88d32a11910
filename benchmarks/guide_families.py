"""ELBOs of both families of guides: the arithmetic circuit, and ecoli70 with its exact answers.

Run from the repository root, for instance::

    python benchmarks/guide_families.py circuit --family flow --steps 3000
    python benchmarks/guide_families.py ecoli70 --family normal --init random

The circuit is evaluated by its ELBO on data drawn from the model, in nats for one datum; E[-log p(x)] is about 3.31.
ecoli70 (raw scale, leaves observed, fresh batches of 100, one particle) is evaluated by the mean of KL(q || p) over
data.
"""

import argparse
import json
import time

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_graphflows.graphs import load_network
from pyro_graphflows.guides import auto_faithful_guide
from pyro_graphflows.models.textbook import arithmetic_circuit


def circuit_data(n: int) -> torch.Tensor:
    """Draw data from the circuit."""
    nodes = poutine.trace(arithmetic_circuit).get_trace(None, n).nodes
    return torch.stack([nodes["x0"]["value"], nodes["x1"]["value"]], -1)


def main() -> None:
    """Train one guide and print its history as JSON lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problem", choices=["circuit", "ecoli70"])
    parser.add_argument("--family", default="flow", choices=["flow", "normal"])
    parser.add_argument("--init", default="regression", choices=["regression", "random"])
    parser.add_argument("--inverse", default="auto")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--final", type=float, default=0.01, help="last rate as a share of the first")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop training after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", default="{}", help="further options of the guide, as JSON")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64 if arguments.problem == "ecoli70" else torch.float32)
    pyro.set_rng_seed(arguments.seed)
    if arguments.problem == "circuit":
        model, exact = arithmetic_circuit, None
        draw, test = circuit_data, circuit_data(20_000)
    else:
        network = load_network("ecoli70")
        model = network.pyro_model()
        columns = [network.names.index(name) for name in network.observed]

        def draw(n: int) -> torch.Tensor:
            return torch.as_tensor(network.sample(n, int(torch.randint(2**31, ())))[:, columns])

        test = draw(2000)
        exact = float(network.log_evidence(test.numpy()).mean())
    guide = auto_faithful_guide(
        model, draw(arguments.batch), family=arguments.family, init=arguments.init, inverse=arguments.inverse,
        **json.loads(arguments.options),
    )  # fmt: skip

    @torch.no_grad()
    def evaluate() -> float:
        losses = [Trace_ELBO().loss(model, guide, test) / len(test) for _ in range(10)]
        return sum(losses) / 10 + (exact or 0.0)

    rate = arguments.final ** (1 / arguments.steps)
    optim = pyro.optim.ClippedAdam({"lr": arguments.lr, "lrd": rate, "clip_norm": 10.0})
    svi = SVI(model, guide, optim, Trace_ELBO())
    spent = 0.0
    for step in range(arguments.steps + 1):
        stop = step == arguments.steps or spent > arguments.seconds
        if stop or step % max(1, arguments.steps // 10) == 0:
            row = {"step": step, "seconds": round(spent, 1), "loss": round(evaluate(), 4)}
            print(json.dumps({**vars(arguments), **row} if stop else row), flush=True)
        if stop:
            break
        start = time.perf_counter()
        svi.step(draw(arguments.batch))
        spent += time.perf_counter() - start


if __name__ == "__main__":
    main()
