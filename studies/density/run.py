r"""Density estimation with flows over graphs: the data sets of the graphical-residual-flow paper.

The graph is known, all nodes are observed, and the joint density is learned from samples by maximum likelihood.
For the synthetic sets the true density is known, so what is reported is the *gap*: the test negative log-likelihood
minus that of the truth on the same points, in nats.

- ``circuit``: the arithmetic circuit [2], 8 variables with products, tanh and Laplace noise. Its joint entropy
  is 1.080 nats.
- ``tree``: a Gaussian binary tree with 31 nodes. The linear Gaussian network has the right form here.
- ``protein``: flow cytometry of 11 proteins [3] with the consensus graph of 20 arcs, from the file given by
  ``--data`` (``train`` and ``test`` arrays, columns as in ``PROTEINS``).
- ``triangle, linear`` and thirteen more: structural causal models (``causal.py`` has the equations).

Rows: ``linear`` (the linear Gaussian network, the faithful flow before its first step), ``faithful``,
``spline`` (normal noise through splines along the graph),
``graphical`` (the published flow), and where zuko is installed ``zuko graph`` (its masked spline flow with the same
adjacency, one transform, since more would break the graph) and ``zuko maf`` (five affine transforms, no graph).
Each trained row gets the same number of epochs, or with ``--seconds`` the same processor time.

    python -m studies.density.run                        # circuit, a minute or two
    python -m studies.density.run --problem tree
    python -m studies.density.run --problem protein --data protein_grf.npz --seconds 60
    python -m studies.density.run --study --data protein_grf.npz    # density.md, restartable; `make density`

Each row is one line of the file ``--results``, written when it is done. Rows that cannot be done here (zuko is not
installed, the protein data are not there) are left out in words; what is known of them stays.

References:
    [1] Mouton and Kroon (2022), Graphical Residual Flows, ICLR workshop.
    [2] Weilbach, Beronov, Wood and Harvey (2020), Structured Conditional Continuous Normalizing Flows.
    [3] Sachs, Perez, Pe'er, Lauffenburger and Nolan (2005), Causal Protein-Signaling Networks.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import matplotlib
import networkx as nx
import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_graphflows import (
    arithmetic_circuit,
    binary_tree,
    faithful_residual,
    graphical_residual,
    graphical_spline,
)
from pyro_graphflows.graphs import protein_network
from studies.density import causal
from studies.density.report import render
from studies.flags import add_places
from studies.results import Results

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROTEINS = ("raf", "mek", "plcg", "pip2", "pip3", "erk", "akt", "pka", "pkc", "p38", "jnk")
HELD_OUT = 0.1  # the share of the training data that chooses the epoch
BUDGET = 40.0  # seconds of processor time for each row of the study
STUDY = {
    "circuit": ("linear", "faithful", "spline", "graphical", "zuko graph", "zuko maf"),
    "tree": ("linear", "faithful", "graphical", "zuko graph"),
    "protein": ("linear", "faithful", "spline", "graphical", "zuko graph", "zuko maf"),
}
CAUSAL = ("linear", "faithful", "spline", "zuko graph", "zuko nsf")
CAUSAL_BUDGET = 4.0  # seconds for each row
CAUSAL_POINTS = 2500


@dataclass
class Problem:
    """Samples with columns in the order of ``graph``, and the log-density that made the test points, if known."""

    name: str
    graph: nx.DiGraph
    train: Tensor
    test: Tensor
    true_log_density: Tensor | None

    @property
    def true_test_nll(self) -> float | None:
        """The test negative log-likelihood of the truth."""
        return None if self.true_log_density is None else -self.true_log_density.mean().item()


@dataclass
class Result:
    """What one row reached."""

    row: str
    test_nll: float
    standard_error: float  # over test points
    gap: float | None
    gap_error: float | None  # over test points, of the difference
    parameters: int
    seconds: float  # of processor time
    epochs: int
    curve: list[tuple[float, float]] = field(default_factory=list)  # (seconds, held-out NLL)


def circuit_samples(n: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Draw from the arithmetic circuit; return the columns and the log-density of each sample."""
    generator = torch.Generator().manual_seed(seed)

    def laplace(loc: float) -> tuple[Tensor, Tensor]:
        u = torch.rand(n, generator=generator) - 0.5
        value = loc - u.sign() * torch.log1p(-2 * u.abs())
        return value, dist.Laplace(loc, 1.0).log_prob(value)

    def normal(loc: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        value = loc + scale * torch.randn(n, generator=generator)
        return value, dist.Normal(loc, scale).log_prob(value)

    terms = {"z0": laplace(5.0), "z1": laplace(-2.0)}
    z0, z1 = terms["z0"][0], terms["z1"][0]
    terms["z2"] = normal(torch.tanh(z0 + z1 - 2.8), 0.1)
    terms["z3"] = normal(z0 * z1, 0.1)
    terms["z4"] = normal(torch.full((n,), 7.0), 2.0)
    terms["z5"] = normal(torch.tanh(terms["z3"][0] + terms["z4"][0]), 0.1)
    terms["x0"] = normal(terms["z3"][0], 0.1)
    terms["x1"] = normal(terms["z5"][0], 0.1)
    return {name: value for name, (value, _) in terms.items()}, sum(log for _, log in terms.values())


def circuit(num_train: int, num_test: int, seed: int) -> Problem:
    """The arithmetic circuit."""
    graph = arithmetic_circuit().to_networkx()
    train, _ = circuit_samples(num_train, 2 * seed)
    test, log_density = circuit_samples(num_test, 2 * seed + 1)
    columns = [torch.stack([samples[name] for name in graph], -1) for samples in (train, test)]
    return Problem("circuit", graph, *columns, log_density)


def tree(num_train: int, num_test: int, seed: int) -> Problem:
    """A Gaussian binary tree of depth 5."""
    network = binary_tree(5, seed=0)
    graph = network.graph().to_networkx()
    train, test = (
        torch.as_tensor(network.sample(n, s, names=list(graph)), dtype=torch.get_default_dtype())
        for n, s in ((num_train, 2 * seed), (num_test, 2 * seed + 1))
    )
    mean, covariance = network.mean_and_covariance()
    order = [network.names.index(name) for name in graph]
    normal = dist.MultivariateNormal(
        torch.tensor(mean[order], dtype=torch.float64), torch.tensor(covariance[np.ix_(order, order)])
    )
    return Problem("tree", graph, train, test, normal.log_prob(test.double()))


def structural(name: str, num_train: int, num_test: int, seed: int) -> Problem:
    """A structural causal model."""
    graph, train, _ = causal.simulate(name, num_train, 2 * seed)
    _, test, log_density = causal.simulate(name, num_test, 2 * seed + 1)
    return Problem(name, graph, train, test, log_density)


def protein(path: Path) -> Problem:
    """The protein data, from a file."""
    if not path.is_file():
        raise SystemExit(f"Expected the protein data at {path}; give the path of the npz file with --data.")
    with np.load(path) as arrays:
        train, test = (
            torch.as_tensor(arrays[key], dtype=torch.get_default_dtype()) for key in ("train", "test")
        )
    graph = protein_network().to_networkx()
    columns = [PROTEINS.index(name) for name in graph]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return Problem("protein", graph, train[order][:, columns], test[:, columns], None)


class FlowDensity(nn.Module):
    """One of our flows under a standard normal."""

    def __init__(self, flow: nn.Module, dim: int) -> None:
        super().__init__()
        self.flow = flow
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return the log-density."""
        base = dist.Normal(torch.zeros(self.dim), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [self.flow.with_cache(0)]).log_prob(x)


class ZukoDensity(nn.Module):
    """A flow of zuko, on standardised data."""

    def __init__(self, flow: nn.Module, train: Tensor) -> None:
        super().__init__()
        self.flow = flow
        self.loc, self.scale = train.mean(0), train.std(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the log-density."""
        return self.flow().log_prob((x - self.loc) / self.scale) - self.scale.log().sum()


def make_linear(problem: Problem) -> nn.Module:
    """The linear Gaussian network."""
    flow = faithful_residual(problem.graph, num_blocks=1)
    flow.initialize_(problem.train)
    return FlowDensity(flow, problem.train.shape[-1])


def make_faithful(problem: Problem) -> nn.Module:
    """Two blocks with 16 units for each variable, and a masked network through which the parents act."""
    dim = problem.train.shape[-1]
    flow = faithful_residual(
        problem.graph,
        hidden_dims=[16 * dim],
        num_blocks=2,
        conditional_scale=True,
        conditioner_units=32,
        conditioner_layers=2,
    )
    flow.initialize_(problem.train)
    return FlowDensity(flow, dim)


def make_spline(problem: Problem) -> nn.Module:
    """Eight bins, locations, scales and knots from a masked network, started by regression."""
    flow = graphical_spline(problem.graph, units_per_set=32)
    flow.initialize_(problem.train)
    return FlowDensity(flow, problem.train.shape[-1])


def make_graphical(problem: Problem) -> nn.Module:
    """Eight blocks with one hidden layer, 16 units for each variable."""
    flow = graphical_residual(problem.graph, num_blocks=8, units_per_variable=16, lipschitz=0.99)
    flow.standardize_(problem.train.mean(0), problem.train.std(0))
    return FlowDensity(flow, problem.train.shape[-1])


def make_zuko_graph(problem: Problem) -> nn.Module:
    """A masked spline flow with the graph's adjacency."""
    import zuko

    adjacency = torch.as_tensor(nx.to_numpy_array(problem.graph).T + np.eye(len(problem.graph)) > 0)
    univariate = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(8,), (8,), (7,)]}
    dim = len(adjacency)
    transform = zuko.flows.MaskedAutoregressiveTransform(
        dim, adjacency=adjacency, hidden_features=[16 * dim, 16 * dim], **univariate
    )
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(dim), torch.ones(dim), buffer=True
    )
    return ZukoDensity(zuko.lazy.Flow(transform, base), problem.train)


def make_zuko_maf(problem: Problem) -> nn.Module:
    """A masked autoregressive flow of five transforms, without a graph."""
    import zuko

    dim = problem.train.shape[-1]
    flow = zuko.flows.MAF(dim, transforms=5, hidden_features=[16 * dim, 16 * dim], randperm=True)
    return ZukoDensity(flow, problem.train)


def make_zuko_nsf(problem: Problem) -> nn.Module:
    """A spline flow of three transforms, without a graph."""
    import zuko

    dim = problem.train.shape[-1]
    flow = zuko.flows.NSF(dim, transforms=3, hidden_features=[16 * dim, 16 * dim], randperm=True)
    return ZukoDensity(flow, problem.train)


ROWS: dict[str, Callable[[Problem], nn.Module]] = {
    "linear": make_linear,
    "faithful": make_faithful,
    "spline": make_spline,
    "graphical": make_graphical,
    "zuko graph": make_zuko_graph,
    "zuko maf": make_zuko_maf,
    "zuko nsf": make_zuko_nsf,
}


def train_row(row: str, problem: Problem, args: argparse.Namespace) -> Result:
    """Train one row with Adam and a cosine schedule; keep the best epoch by held-out data, or the start."""
    torch.manual_seed(args.seed)
    held = int(HELD_OUT * len(problem.train))
    data, valid = problem.train[held:], problem.train[:held]
    density = ROWS[row](Problem(problem.name, problem.graph, data, problem.test, problem.true_log_density))
    with torch.no_grad():
        best, best_state = -density(valid).mean().item(), copy.deepcopy(density.state_dict())
    start, curve, epoch = time.process_time(), [], 0
    optimizer = torch.optim.Adam(density.parameters(), args.lr)
    while row != "linear":
        elapsed = time.process_time() - start
        progress = elapsed / args.seconds if args.seconds else epoch / args.epochs
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * progress))
        for index in torch.randperm(len(data)).split(args.batch_size):
            optimizer.zero_grad()
            loss = -density(data[index]).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(density.parameters(), 50.0)
            optimizer.step()
        epoch += 1
        with torch.no_grad():
            nll = -density(valid).mean().item()
        curve.append((time.process_time() - start, nll))
        if nll < best:
            best, best_state = nll, copy.deepcopy(density.state_dict())
    density.load_state_dict(best_state)
    seconds = time.process_time() - start
    with torch.no_grad():
        log_density = torch.cat([density(part) for part in problem.test.split(1000)])
    difference = None if problem.true_log_density is None else problem.true_log_density - log_density
    root = math.sqrt(len(log_density))
    return Result(
        row,
        -log_density.mean().item(),
        log_density.std().item() / root,
        None if difference is None else difference.mean().item(),
        None if difference is None else difference.std().item() / root,
        sum(p.numel() for p in density.parameters()),
        seconds,
        epoch,
        curve,
    )


def report(problem: Problem, results: list[Result], path: Path) -> None:
    """Print a table and draw the learning curves."""
    truth = "" if problem.true_test_nll is None else f"; the true density has {problem.true_test_nll:.3f}"
    print(f"\n{problem.name}: test negative log-likelihood in nats, {len(problem.test)} points{truth}\n")
    print(f"{'row':<12}{'test NLL':>10}{'s.e.':>8}{'gap':>17}{'parameters':>12}{'epochs':>8}{'cpu s':>8}")
    for r in results:
        gap = "" if r.gap is None else f"{r.gap:.3f} ± {r.gap_error:.3f}"
        print(
            f"{r.row:<12}{r.test_nll:>10.3f}{r.standard_error:>8.3f}{gap:>17}"
            f"{r.parameters:>12}{r.epochs:>8}{r.seconds:>8.1f}"
        )
    figure, axes = plt.subplots(figsize=(6, 4))
    for r in results:
        if r.curve:
            axes.plot(*zip(*r.curve, strict=True), label=r.row)
        else:
            axes.axhline(r.test_nll, color="0.6", label=f"{r.row} (test)")
    if problem.true_test_nll is not None:
        axes.axhline(problem.true_test_nll, color="k", linestyle=":", label="truth (test)")
    axes.set_xlabel("seconds (processor)")
    axes.set_ylabel("held-out negative log-likelihood (nats)")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"\nCurves: {path}")


def load(args: argparse.Namespace) -> Problem:
    """Return the problem that was asked for."""
    if args.problem == "protein":
        return protein(args.data)
    if args.problem in causal.names():
        return structural(args.problem, min(args.num_train, CAUSAL_POINTS), args.num_test, args.seed)
    return (circuit if args.problem == "circuit" else tree)(args.num_train, args.num_test, args.seed)


def do_row(row: str, problem: Problem, results: Results, key: str, args: argparse.Namespace) -> Result | None:
    """Train a row and append its line; say so and return nothing where its package is not installed."""
    try:
        result = train_row(row, problem, args)
    except ModuleNotFoundError as error:
        print(f"{problem.name}, {row}: skipped, {error.name} is not installed", flush=True)
        return None
    record = {
        "problem": problem.name,
        "seed": args.seed,
        "num_train": len(problem.train),
        "num_test": len(problem.test),
        "true_test_nll": problem.true_test_nll,
        "budget": args.seconds,
        "lr": args.lr,
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        **vars(result),
    }
    results.append(key, record)
    return result


def compare(args: argparse.Namespace) -> list[Result]:
    """Train the rows that were asked for and report."""
    problem, file = load(args), Results(args.results)
    found = [
        do_row(row, problem, file, f"comparison-{name_of(args.problem, row, args.seed)}", args)
        for row in args.rows
    ]
    results = [result for result in found if result is not None]
    if not results:
        raise SystemExit("Every row was skipped: there is nothing to report, and nothing was written.")
    report(problem, results, args.out / "density" / f"comparison-{args.problem}.png")
    return results


def name_of(problem: str, row: str, seed: int) -> str:
    """Return the key of a run of the study."""
    return f"{problem.replace(', ', '-').replace(' ', '-')}-{row.replace(' ', '-')}-s{seed}"


def study(args: argparse.Namespace) -> None:
    """Run what is not there yet of the study, seed by seed, and draw its page."""
    results = Results(args.results)
    given = args.seconds
    problems = dict.fromkeys(causal.names(), CAUSAL) if args.causal else STUDY
    problems = {args.only: problems[args.only]} if args.only else problems
    for seed in range(args.seeds):
        for problem_name, rows in problems.items():
            args.problem, args.seed = problem_name, seed
            args.seconds = given or (BUDGET if problem_name in STUDY else CAUSAL_BUDGET)
            there = results.read()
            missing = [row for row in rows if name_of(problem_name, row, seed) not in there]
            if not missing:
                continue
            if problem_name == "protein" and not args.data.is_file():
                print(f"protein, seed {seed}: skipped, there are no data at {args.data} (--data)", flush=True)
                continue
            problem = load(args)
            for row in missing:
                key = name_of(problem_name, row, seed)
                result = do_row(row, problem, results, key, args)
                if result is not None:
                    print(key, f"{result.test_nll:.3f}", flush=True)
    print(f"Page: {render(args.results, args.out)}")


def main(args: argparse.Namespace) -> list[Result]:
    """Do the study, or the rows that were asked for."""
    torch.set_default_dtype(torch.float64 if args.double else torch.float32)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.study:
        study(args)
        return []
    return compare(args)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--problem", choices=["circuit", "tree", "protein", *causal.names()], default="circuit"
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["linear", "faithful", "graphical"])
    parser.add_argument("--data", type=Path, default=Path("protein_grf.npz"), help="the protein data")
    parser.add_argument("--num-train", type=int, default=10_000)
    parser.add_argument("--num-test", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument(
        "--seconds", type=float, default=None, help="train each row for so much processor time, not epochs"
    )
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--study", action="store_true", help="all problems, rows and seeds; draws density.md")
    parser.add_argument("--causal", action="store_true", help="of the study, the structural causal models")
    parser.add_argument("--only", default=None, help="one problem of the study")
    parser.add_argument("--seeds", type=int, default=3, help="of the study")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--double", action="store_true", help="double precision")
    add_places(parser, "density")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
