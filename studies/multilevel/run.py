r"""Two-level models, amortised over data sets of 5 to 50 groups and 1 to 20 data a group (models in models.py).

A guide with pooled inputs learns on joint samples whose numbers of groups and data are drawn anew for each step, by
forward KL, or by the ELBO. What is reported, over held-out data sets for small, middle and large numbers of groups:

- ``two levels``: the gap KL(p(mu, theta | x) || q(mu, theta | x)) in nats a data set, by draws of the exact posterior;
- ``random effects``: the gap KL(q || p), log evidence (by quadrature) less the ELBO, by draws of the guide;
- whether the ranks of the sites outside of the groups among draws of the guide are uniform.

Standard errors are over data sets. Rows: ``start`` (no training), ``deepset``, ``attention``; ``summary``: no factors
of elements, all is read from the summary; ``elbo``: the deep set, trained by the ELBO on simulated data sets; ``one
size``: the deep set, simulations of 20 groups of 8 alone; ``flat``: a flat network with as many weights.

    python -m studies.multilevel.run --rows deepset --seconds 60
    python -m studies.multilevel.run --study            # all rows, restartable; `make multilevel`

A line of ``--results`` is one trained guide.
"""

import argparse
import math
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_graphflows.guides import DeepSet, Normal, auto_faithful_guide
from pyro_graphflows.guides.guide import AutoFaithfulGuide
from pyro_graphflows.infer import InferenceCompilation
from studies.flags import add_places
from studies.multilevel.flat import FlatGuide
from studies.multilevel.models import exact_posterior, log_evidence, random_effects, two_levels
from studies.results import Results

MODELS: dict[str, Callable[[Tensor], None]] = {"two levels": two_levels, "random effects": random_effects}
GLOBALS = {"two levels": ("mu",), "random effects": ("mu", "tau", "sigma")}
ROWS = {
    "two levels": ("start", "deepset", "attention", "summary", "elbo", "one size", "flat"),
    "random effects": ("start", "deepset", "attention", "summary", "elbo"),
}
GROUPS, DATA = (5, 50), (1, 20)
AT_SET_UP = (8, 20)  # data, groups
BATCH = 64
RATE, LAST_RATE = 3e-3, 1e-5
NUM_DATA_SETS = 50  # held out, for each range of groups
NUM_DRAWS = 200  # for each
NUM_PARTICLES = 16  # of the ELBO
RANGES = {"5-15": (5, 15), "16-30": (16, 30), "31-50": (31, 50)}
SECONDS = 12.0  # of processor time


def gap(guide: Any, x: Tensor) -> tuple[float, float]:
    """Return the divergence for a data set of two levels, and the rank of its mu (an exact draw) among the guide's."""
    of_mu, of_theta = exact_posterior(x)
    mu = of_mu.sample((NUM_DRAWS,))
    theta = of_theta(mu).sample()
    exact = of_mu.log_prob(mu) + of_theta(mu).log_prob(theta).sum(-1)
    values = {"mu": mu.reshape(-1, 1, 1), "theta": theta.unsqueeze(-2)}
    with pyro.plate("draws", NUM_DRAWS, dim=-3):
        trace = poutine.trace(poutine.condition(guide, values)).get_trace(x)
        own = guide(x)["mu"].reshape(-1)
    trace.compute_log_prob()
    nodes: Any = trace.nodes
    q = sum(nodes[name]["log_prob"].reshape(NUM_DRAWS, -1).sum(-1) for name in values)
    return float((exact - q).mean()), float((own < mu[0]).double().mean())


def gap_of_effects(
    guide: AutoFaithfulGuide, x: Tensor, truth: dict[str, Tensor]
) -> tuple[float, list[float]]:
    """Return log evidence less the ELBO for a data set of random effects, and the ranks of the true values."""
    with pyro.plate("draws", NUM_DRAWS, dim=-3):
        drawn = poutine.trace(guide).get_trace(x)
        replayed = poutine.trace(poutine.replay(random_effects, trace=drawn)).get_trace(x)
    terms = []
    for trace, sign in ((replayed, 1.0), (drawn, -1.0)):
        trace.compute_log_prob()
        nodes: Any = trace.nodes
        sites = [site for site in nodes.values() if site["type"] == "sample" and "log_prob" in site]
        terms += [
            sign * float(site["log_prob"].sum()) / NUM_DRAWS for site in sites if site["log_prob"].dim() > 2
        ]
    nodes = drawn.nodes
    ranks = [float((nodes[name]["value"].reshape(-1) < truth[name]).double().mean()) for name in truth]
    return log_evidence(x) - sum(terms), ranks


def sizes(generator: torch.Generator, groups: tuple[int, int] = GROUPS) -> tuple[int, int]:
    """Draw numbers of data and of groups."""
    n = int(torch.randint(DATA[0], DATA[1] + 1, (), generator=generator))
    return n, int(torch.randint(groups[0], groups[1] + 1, (), generator=generator))


def simulate(model: Callable[[Tensor], None], shape: tuple[int, int]) -> dict[str, Tensor]:
    """Return a joint draw."""
    nodes: Any = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(shape)).nodes
    return {name: site["value"] for name, site in nodes.items() if site["type"] == "sample"}


def make_guide(model: Callable[[Tensor], None], row: str, seed: int) -> AutoFaithfulGuide:
    """Return a guide at its start."""
    pool = DeepSet(sums=False) if row == "summary" else "attention" if row == "attention" else "deepset"
    options: dict[str, Any] = (
        {"family": Normal(units_per_set=32, hidden_layers=2)} if model is two_levels else {}
    )
    return auto_faithful_guide(
        model, torch.zeros(AT_SET_UP), pool=pool, num_start_samples=2000, setup_seed=seed, **options
    )


def train(name: str, row: str, seconds: float, seed: int) -> tuple[Any, dict[str, Any]]:
    """Train a guide for some processor time, at a rate that falls exponentially."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = MODELS[name]
    begin = time.process_time()
    guide: Any = make_guide(model, row, seed)
    set_up = time.process_time() - begin
    weights = sum(parameter.numel() for parameter in guide.parameters())
    if row == "flat":
        guide = FlatGuide(DATA[1], GROUPS[1], weights)
        weights = sum(parameter.numel() for parameter in guide.parameters())
    step = stepper(row, model, guide)
    begin, steps, spent = time.process_time(), 0, 0.0
    while row != "start" and (spent := time.process_time() - begin) < seconds:
        rate = RATE * (LAST_RATE / RATE) ** (spent / seconds)
        step(AT_SET_UP if row == "one size" else sizes(generator), rate)
        steps += 1
    return guide, {"steps": steps, "seconds": spent, "set_up": set_up, "weights": weights}


def stepper(
    row: str, model: Callable[[Tensor], None], guide: Any
) -> Callable[[tuple[int, int], float], None]:
    """Return what makes a step of training on simulations of a size, at a rate."""
    optimizer = torch.optim.Adam(guide.parameters(), lr=RATE)
    compilation = (
        None if row in ("flat", "elbo") else InferenceCompilation(model, guide, optimizer, batch_size=BATCH)
    )
    elbo = Trace_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=2)

    def step(shape: tuple[int, int], rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        if compilation is not None:
            compilation.step(torch.zeros(shape))
            return
        optimizer.zero_grad()
        if row == "elbo":
            loss = elbo.differentiable_loss(model, guide, simulate(model, shape)["x"])
        else:
            mu = torch.randn(BATCH)
            theta = mu.unsqueeze(-1) + torch.randn(BATCH, shape[1])
            x = theta.unsqueeze(-2) + torch.randn(BATCH, *shape)
            loss = -guide.log_prob(x, mu, theta).mean()
        loss.backward()
        optimizer.step()

    return step


@torch.no_grad()
def judge(name: str, guide: Any) -> dict[str, Any]:
    """Return gaps with standard errors by numbers of groups, and how far ranks are from uniform."""
    found: dict[str, Any] = {}
    ranks: dict[str, list[float]] = {site: [] for site in GLOBALS[name]}
    generator = torch.Generator().manual_seed(12345)
    torch.manual_seed(12345)
    for of_range, groups in RANGES.items():
        gaps = []
        for _ in range(NUM_DATA_SETS):
            drawn = simulate(MODELS[name], sizes(generator, groups))
            if name == "two levels":
                each, rank = gap(guide, drawn["x"])
                of_sites = [rank]
            else:
                each, of_sites = gap_of_effects(guide, drawn["x"], {site: drawn[site] for site in ranks})
            gaps.append(each)
            for site, rank in zip(ranks, of_sites, strict=True):
                ranks[site].append(rank)
        values = torch.tensor(gaps)
        found[of_range] = {"gap": float(values.mean()), "error": float(values.std() / NUM_DATA_SETS**0.5)}
    found["ranks"] = {site: distance(each) for site, each in ranks.items()}
    found["band"] = 1.358 / math.sqrt(NUM_DATA_SETS * len(RANGES))
    return found


def distance(ranks: list[float]) -> float:
    """Return the greatest distance of the distribution of ranks from the uniform one."""
    ordered = torch.tensor(ranks).double().sort().values
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    return float(torch.maximum((steps - ordered).abs(), (ordered - steps + 1 / len(ordered)).abs()).max())


def main() -> None:
    """Run rows from the command line."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--study", action="store_true", help="all rows of the page")
    parse.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parse.add_argument("--rows", nargs="*", default=["deepset"], choices=ROWS["two levels"])
    parse.add_argument("--seconds", type=float, default=SECONDS, help="processor time of each training")
    parse.add_argument("--seed", type=int, default=0)
    add_places(parse, "multilevel")
    args = parse.parse_args()
    torch.set_num_threads(1)
    results = Results(args.results)
    for name in args.models:
        for row in ROWS[name] if args.study else args.rows:
            key = f"{name}/{row}/{args.seconds:g}/{args.seed}"
            if key in results or row not in ROWS[name]:
                continue
            guide, figures = train(name, row, args.seconds, args.seed)
            record = {**figures, **judge(name, guide), "date": str(date.today())}
            results.append(key, record)
            print(key, record, flush=True)


if __name__ == "__main__":
    main()
