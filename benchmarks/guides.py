"""Our guides beside Pyro's: ELBO and exact KL at equal processor time, and the time of a step.

    python -m benchmarks.guides --out docs/results          # about 7 minutes on one thread
    python -m benchmarks.guides --steps-only                # the times of a step alone, about a minute
    python -m benchmarks.guides --render --out docs/results # page and picture from the saved results

Each problem that is measured becomes a line of OUT/guides_time/results.jsonl, and its last line counts. Times of a step
alone, or of some guides only, are printed and not kept.

One data set per problem (64 data of a binary tree with 31 nodes, of ecoli70 in units of one standard deviation, and of
the arithmetic circuit; 300 houses of a radon-like hierarchical model). Every guide is trained on all of it for the same
processor time of one thread, set-up included, with Adam, a rate that falls to a hundredth over that time, and one
particle. Pyro's guides have parameters for each datum; ours, and a mean-field guide written by hand with a network of
the same data, are amortised, and are also evaluated on fresh data. KL(q || p(. | x)) is exact where the evidence is.

Times of a step are medians of processor time of one thread, the guides in turns.
"""

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoGaussian,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.nn import PyroModule
from torch import nn

from benchmarks.guide_problems import PROBLEMS, Problem, circuit_log_evidence, gaussian_network
from pyro_graphflows import (
    LinearGaussianNetwork,
    auto_faithful_guide,
    binary_tree,
    get_model_graph,
    load_network,
)
from studies.results import Results

NUM_DATA = 64
KEYS = ("tree", "ecoli70", "circuit", "radon")
OURS = ("default", "normal", "flow")
RATES = {"AutoNormal": 0.02, "AutoMultivariateNormal": 0.01, "AutoStructured": 0.01, "AutoGaussian": 0.01}
RATES |= {"AutoIAFNormal": 0.005, "mean field by hand": 0.005}
RATES |= dict.fromkeys(OURS, 0.005)


class MeanField(PyroModule):
    """An amortised guide as one would write it by hand: a network from a datum to location and scale of each latent.

    Args:
        latents: The latent sites, all real numbers in one data plate.
        num_features: The number of data columns.
        shift: The mean of the data.
        scale: Its standard deviation.
    """

    def __init__(self, latents: list[str], num_features: int, shift: Any, scale: Any) -> None:
        super().__init__()
        self.latents = latents
        self.shift, self.scale = shift, scale
        hidden = 64
        self.net = nn.Sequential(
            nn.Linear(num_features, hidden), nn.ELU(), nn.Linear(hidden, hidden), nn.ELU(),
            nn.Linear(hidden, 2 * len(latents)),
        )  # fmt: skip

    def forward(self, x: Any) -> dict[str, Any]:
        """Sample the latents."""
        out = self.net((x - self.shift) / self.scale)
        locs, scales = out[..., : len(self.latents)], out[..., len(self.latents) :].exp()
        with pyro.plate("data", len(x), dim=-1):
            return {
                name: pyro.sample(name, dist.Normal(locs[..., i], scales[..., i]))
                for i, name in enumerate(self.latents)
            }


def standardised(network: LinearGaussianNetwork) -> LinearGaussianNetwork:
    """Return the network in units of one standard deviation: the other guides have no scales of their own."""
    mean, covariance = network.mean_and_covariance()
    sd = dict(zip(network.names, covariance.diagonal() ** 0.5, strict=True))
    parents = network.parents
    coefficients = {
        v: [c * sd[p] / sd[v] for p, c in zip(parents[v], network.coefficients[v], strict=True)]
        for v in network.names
    }
    centre = dict(zip(network.names, mean / covariance.diagonal() ** 0.5, strict=True))
    intercepts = {
        v: network.intercepts[v] / sd[v]
        - centre[v]
        + sum(c * centre[p] for p, c in zip(parents[v], coefficients[v], strict=True))
        for v in network.names
    }
    scales = {v: network.scales[v] / sd[v] for v in network.names}
    return LinearGaussianNetwork(parents, coefficients, intercepts, scales, observed=network.observed)


def make_problem(key: str) -> Problem:
    """Return a problem with one data set as its test data."""
    if key == "radon":
        return PROBLEMS[key]()
    if key == "ecoli70":
        network = standardised(load_network("ecoli70"))
        return gaussian_network(network, "ecoli70", NUM_DATA, torch.get_default_dtype())
    if key == "tree":
        return gaussian_network(binary_tree(5, seed=0), "tree", NUM_DATA, torch.get_default_dtype())
    problem = PROBLEMS[key]()
    test = problem.test[0][:NUM_DATA]
    exact = float(circuit_log_evidence(test.double().numpy()).mean())
    return Problem(problem.name, problem.model, problem.draw, (test,), NUM_DATA, exact, problem.options)


def guides_of(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Return makers of the guides that take part."""
    model = problem.model

    def ours(family: str) -> Any:
        return auto_faithful_guide(model, *problem.test, family=family, **problem.options)

    def by_hand() -> Any:
        (x,) = problem.test
        latents = [str(v) for v in get_model_graph(model, problem.test).latent]
        return MeanField(latents, x.shape[1], x.mean(0), x.std(0))

    makers: dict[str, Callable[[], Any]] = {
        "default": lambda: ours("auto"),
        "normal": lambda: ours("normal"),
        "flow": lambda: ours("flow"),
        "AutoNormal": lambda: AutoNormal(model),
        "AutoMultivariateNormal": lambda: AutoMultivariateNormal(model),
        "AutoStructured": lambda: AutoStructured(model, conditionals="normal", dependencies="linear"),
        "AutoGaussian": lambda: AutoGaussian(model),
        "AutoIAFNormal": lambda: AutoIAFNormal(model),
    }
    if problem.draw is not None:
        makers["mean field by hand"] = by_hand
    return makers


def new_svi(problem: Problem, maker: Callable[[], Any], rate: float) -> tuple[Any, SVI, pyro.optim.PyroOptim]:
    """Return a guide, and what trains it."""
    guide = maker()
    optim = pyro.optim.ClippedAdam({"lr": rate, "betas": (0.9, 0.99), "clip_norm": 100.0})
    return guide, SVI(problem.model, guide, optim, Trace_ELBO()), optim


@torch.no_grad()
def loss_of(problem: Problem, guide: Any, args: tuple, draws: int) -> float:
    """Return the loss in nats per datum."""
    total = sum(Trace_ELBO().loss(problem.model, guide, *args) for _ in range(draws))
    return total / draws / (1 if problem.draw is None else len(args[0]))


def train(problem: Problem, name: str, maker: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Train a guide for some processor seconds; return its history."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    rate = 0.01 if problem.draw is None and name in OURS else RATES[name]
    begin = time.thread_time()
    guide, svi, optim = new_svi(problem, maker, rate)
    spent, history, step = time.thread_time() - begin, [], 0
    mark = 0.0
    while True:
        if spent >= mark:
            history.append([round(spent, 3), loss_of(problem, guide, problem.test, 2)])
            mark = spent + seconds / 20
        if spent >= seconds:
            break
        for each in optim.optim_objs.values():
            each.param_groups[0]["lr"] = rate * 0.01 ** min(1.0, spent / seconds)
        begin = time.thread_time()
        svi.step(*problem.test)
        spent += time.thread_time() - begin
        step += 1
    result = {"history": history, "steps": step, "loss": loss_of(problem, guide, problem.test, 30)}
    if name in (*OURS, "mean field by hand") and problem.draw is not None:
        pyro.set_rng_seed(1)
        fresh = problem.draw(2000)
        fresh = tuple(a.to(problem.test[0].dtype) for a in fresh)
        result["fresh"] = loss_of(problem, guide, fresh, 5)
    return result


def step_times(problem: Problem, makers: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median processor time of a step of each guide, in milliseconds, taken in turns."""
    pyro.clear_param_store()
    runs = {}
    for name, maker in makers.items():
        pyro.set_rng_seed(0)
        # Names of parameters would clash in the one store, so each guide has its store put back before its step.
        pyro.clear_param_store()
        _, svi, _ = new_svi(problem, maker, 1e-4)
        for _ in range(3):
            svi.step(*problem.test)
        runs[name] = (svi, pyro.get_param_store().get_state())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (svi, state) in runs.items():
            pyro.get_param_store().set_state(state)
            for _ in range(3):
                begin = time.thread_time()
                svi.step(*problem.test)
                times[name].append(time.thread_time() - begin)
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


# ------------------------------------------------------------------------------------------------------ the page


def page(problems: list[dict[str, Any]]) -> str:
    """Return the page."""
    seconds = sorted({problem["seconds"] for problem in problems})
    lines = [
        "# Guides at equal processor time",
        "",
        f"Made by `python -m benchmarks.guides --out docs/results` on {max(p['date'] for p in problems)} "
        f"({', '.join(sorted({p['machine'] for p in problems}))}, one thread). "
        f"{' or '.join(f'{s:.0f}' for s in seconds)} processor seconds of training for each guide; see the script for "
        "the setting. KL is the exact KL(q || p(. | x)) on the data trained on, *fresh* that on 2,000 new data, which "
        "only amortised guides have. Nats per datum (radon-like: the ELBO of the data set).",
    ]
    for problem in problems:
        lines += ["", f"## {problem['name']}", "", *rows_of(problem)]
    lines += ["", "![Losses over processor time](guides_time/guides.png)"]
    return "\n".join(lines) + "\n"


def rows_of(problem: dict[str, Any]) -> list[str]:
    """Return the lines of the table of a problem."""
    exact = problem["exact"]
    head = "KL | fresh" if exact is not None else "ELBO |"
    lines = [f"| guide | {head} | steps | ms per step |", "|---|---|---|---|---|"]
    for name, ms in problem["ms"].items():
        run = problem["runs"].get(name)
        if run is None:
            lines.append(f"| {name} | – | – | – | {ms:.1f} |")
            continue
        value = f"{run['loss'] + exact:.3f}" if exact is not None else f"{-run['loss']:.2f}"
        fresh = f"{run['fresh'] + problem['exact_fresh']:.3f}" if "fresh" in run else "–"
        lines.append(
            f"| {name} | {value} | {fresh if exact is not None else ''} | {run['steps']} | {ms:.1f} |"
        )
    return lines


def draw(problems: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses over processor time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(problems), figsize=(4.2 * len(problems), 3.6), squeeze=False)
    for axis, problem in zip(axes[0], problems, strict=True):
        exact = problem["exact"]
        best = min(run["loss"] for run in problem["runs"].values())
        for i, (name, run) in enumerate(problem["runs"].items()):
            offset = exact if exact is not None else -best
            seconds = [row[0] for row in run["history"]]
            values = [row[1] + offset for row in run["history"]]
            own = name in OURS
            axis.plot(seconds, values, label=name, color=f"C{i}", linewidth=2.2 if own else 1.2)
        # the losses are estimates: near zero noise takes them to either side, where the axis is linear
        linear = 0.1 if exact is not None else 1.0
        axis.set_yscale("symlog", linthresh=linear)
        axis.axhspan(-linear, linear, color="0.93", zorder=0)
        axis.axhline(0.0, color="0.5", linewidth=0.8)
        axis.set(xlabel="processor seconds", title=problem["name"])
        axis.set_ylabel("estimated KL (nats per datum)" if exact is not None else "loss − lowest (nats)")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(
        "Grey: the axis is linear there, and differences are mostly noise of the estimate", fontsize=9
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="out", help="guides_time.md and the folder guides_time go there")
    parser.add_argument("--seconds", type=float, default=10.0, help="processor seconds for each guide")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of three timed steps")
    parser.add_argument("--problems", nargs="*", default=list(KEYS))
    parser.add_argument("--guides", nargs="*", help="only these")
    parser.add_argument("--steps-only", action="store_true", help="only the times of a step")
    parser.add_argument("--render", action="store_true", help="page and picture from the saved results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    folder = Path(args.out) / "guides_time"
    saved = Results(folder / "results.jsonl")
    for key in [] if args.render else args.problems:
        record = measure(key, args)
        if args.steps_only or args.guides:
            print("\n".join(rows_of(record)))
        else:
            saved.append(key, record)
    if args.steps_only or args.guides:
        return
    records = saved.read()
    if not records:
        raise SystemExit(f"Expected saved results in {saved.path}; found none. No page was written.")
    problems = [records[key] for key in [*KEYS, *sorted(set(records) - set(KEYS))] if key in records]
    draw(problems, folder / "guides.png")
    text = page(problems)
    (Path(args.out) / "guides_time.md").write_text(text)
    print(text)


def measure(key: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the record of a problem: times of a step, and unless these alone were asked for, trained guides."""
    problem = make_problem(key)
    makers = {n: m for n, m in guides_of(problem).items() if not args.guides or n in args.guides}
    record: dict[str, Any] = {
        "date": str(date.today()), "machine": platform.machine(), "seconds": args.seconds,
        "name": problem.name, "exact": problem.exact, "runs": {}, "exact_fresh": None,
    }  # fmt: skip
    if problem.exact is not None:
        record["exact_fresh"] = exact_of_fresh(key, problem)
    record["ms"] = step_times(problem, makers, args.rounds)
    print(problem.name, {k: round(v, 1) for k, v in record["ms"].items()}, flush=True)
    for name, maker in [] if args.steps_only else makers.items():
        run = record["runs"][name] = train(problem, name, maker, args.seconds)
        print(problem.name, name, run["steps"], run["loss"] + (problem.exact or 0.0), flush=True)
    return record


def exact_of_fresh(key: str, problem: Problem) -> float:
    """Return the mean exact log-evidence of the fresh data of :func:`train`."""
    pyro.set_rng_seed(1)
    assert problem.draw is not None
    fresh = problem.draw(2000)[0].double().numpy()
    if key == "circuit":
        return float(circuit_log_evidence(fresh).mean())
    network = binary_tree(5, seed=0) if key == "tree" else standardised(load_network("ecoli70"))
    return float(network.log_evidence(fresh).mean())


if __name__ == "__main__":
    main()
