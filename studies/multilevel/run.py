r"""A two-level normal model, amortised over data sets of 5 to 50 groups and 1 to 20 data a group.

    mu ~ N(0, 1);  theta_j ~ N(mu, 1) for groups j;  x_nj ~ N(theta_j, 1) for data n

The posterior is known for each data set: normal, of mu, and of each effect given mu. A guide with pooled inputs learns
by forward KL on joint samples whose numbers of groups and data are drawn anew for each step. What is reported is the
gap, the mean over held-out data sets of KL(p(mu, theta | x) || q(mu, theta | x)) in nats a data set, estimated by draws
of the exact posterior (its standard error is over data sets), for small, middle and large numbers of groups; and
whether the ranks of mu among draws of the guide are uniform.

Rows: ``deepset``, ``attention`` (pooling), and ``one size``: the deep set trained at one size alone, 20 groups of 8.

    python -m studies.multilevel.run --rows deepset --seconds 60
    python -m studies.multilevel.run --study            # all rows, restartable; `make multilevel`

A line of ``--results`` is one trained guide.
"""

import argparse
import math
import time
from datetime import date
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_graphflows.guides import AutoFaithfulGuide, Normal, auto_faithful_guide
from pyro_graphflows.infer import InferenceCompilation
from studies.flags import add_places
from studies.results import Results

ROWS = ("deepset", "attention", "one size")
GROUPS, DATA = (5, 50), (1, 20)
AT_SET_UP = (8, 20)  # data, groups
BATCH = 64
RATE, LAST_RATE = 3e-3, 1e-4
NUM_DATA_SETS = 50  # held out, for each range of groups
NUM_DRAWS = 200  # of the exact posterior for each
RANGES = {"5-15": (5, 15), "16-30": (16, 30), "31-50": (31, 50)}
SECONDS = 300.0  # of processor time


def model(x: Tensor) -> None:
    """The two levels; data ``(n, groups)``."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("data", x.shape[-2], dim=-2):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def exact_posterior(x: Tensor) -> tuple[dist.Normal, Any]:
    """Return the posterior of mu, and a function from mu to that of the effects."""
    n, groups = x.shape
    mean = x.mean(0)
    variance = 1.0 + 1.0 / n  # of the mean of a group given mu
    precision = 1.0 + groups / variance
    of_mu = dist.Normal(mean.sum() / variance / precision, precision**-0.5)

    def of_theta(mu: Tensor) -> dist.Normal:
        return dist.Normal((mu.unsqueeze(-1) + n * mean) / (1.0 + n), (1.0 + n) ** -0.5)

    return of_mu, of_theta


def gap(guide: AutoFaithfulGuide, x: Tensor) -> tuple[float, float]:
    """Return the divergence for one data set, and the rank of its mu (the first exact draw) among the guide's draws."""
    of_mu, of_theta = exact_posterior(x)
    mu = of_mu.sample((NUM_DRAWS,))
    theta = of_theta(mu).sample()
    exact = of_mu.log_prob(mu) + of_theta(mu).log_prob(theta).sum(-1)
    values = {"mu": mu.reshape(-1, 1, 1), "theta": theta.unsqueeze(-2)}
    with pyro.plate("draws", NUM_DRAWS, dim=-3):
        trace = pyro.poutine.trace(pyro.poutine.condition(guide, values)).get_trace(x)
        own = guide(x)["mu"].reshape(-1)
    trace.compute_log_prob()
    nodes: Any = trace.nodes
    q = sum(nodes[name]["log_prob"].reshape(NUM_DRAWS, -1).sum(-1) for name in values)
    return float((exact - q).mean()), float((own < mu[0]).double().mean())


def sizes(generator: torch.Generator, groups: tuple[int, int] = GROUPS) -> tuple[int, int]:
    """Draw numbers of data and of groups."""
    n = int(torch.randint(DATA[0], DATA[1] + 1, (), generator=generator))
    return n, int(torch.randint(groups[0], groups[1] + 1, (), generator=generator))


def train(row: str, seconds: float, seed: int) -> tuple[AutoFaithfulGuide, dict[str, Any]]:
    """Train a guide for some processor time, at a rate that falls exponentially."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pool = "attention" if row == "attention" else "deepset"
    family = Normal(units_per_set=32, hidden_layers=2)
    guide = auto_faithful_guide(
        model, torch.zeros(AT_SET_UP), family=family, pool=pool, num_start_samples=2000, setup_seed=seed
    )
    optimizer = torch.optim.Adam(guide.parameters(), lr=RATE)
    compilation = InferenceCompilation(model, guide, optimizer, batch_size=BATCH)
    begin, steps = time.process_time(), 0
    while (spent := time.process_time() - begin) < seconds:
        optimizer.param_groups[0]["lr"] = RATE * (LAST_RATE / RATE) ** (spent / seconds)
        compilation.step(torch.zeros(AT_SET_UP if row == "one size" else sizes(generator)))
        steps += 1
    return guide, {"steps": steps, "seconds": spent}


@torch.no_grad()
def judge(guide: AutoFaithfulGuide) -> dict[str, Any]:
    """Return gaps with standard errors by numbers of groups, and how far ranks of mu are from uniform."""
    found: dict[str, Any] = {}
    ranks = []
    generator = torch.Generator().manual_seed(12345)
    torch.manual_seed(12345)
    for name, groups in RANGES.items():
        gaps = []
        for _ in range(NUM_DATA_SETS):
            shape = sizes(generator, groups)
            theta = torch.randn(()) + torch.randn(shape[1])
            each, rank = gap(guide, theta + torch.randn(shape))
            gaps.append(each)
            ranks.append(rank)
        values = torch.tensor(gaps)
        found[name] = {"gap": float(values.mean()), "error": float(values.std() / NUM_DATA_SETS**0.5)}
    ordered = torch.tensor(ranks).sort().values
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    distance = torch.maximum((steps - ordered).abs(), (ordered - steps + 1 / len(ordered)).abs()).max()
    found["ranks"] = {
        "number": len(ranks),
        "distance": float(distance),
        "band": 1.358 / math.sqrt(len(ranks)),
    }
    return found


def main() -> None:
    """Run rows from the command line."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--study", action="store_true", help="all rows of the page")
    parse.add_argument("--rows", nargs="*", default=["deepset"], choices=ROWS)
    parse.add_argument("--seconds", type=float, default=SECONDS, help="processor time of each training")
    parse.add_argument("--seed", type=int, default=0)
    add_places(parse, "multilevel")
    args = parse.parse_args()
    torch.set_num_threads(1)
    results = Results(args.results)
    for row in ROWS if args.study else args.rows:
        key = f"{row}/{args.seconds:g}/{args.seed}"
        if key in results:
            continue
        guide, figures = train(row, args.seconds, args.seed)
        record = {**figures, **judge(guide), "date": str(date.today())}
        results.append(key, record)
        print(key, record, flush=True)


if __name__ == "__main__":
    main()
