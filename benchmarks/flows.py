"""Flows over graphs beside other ways to do the same work: times, memory and errors, with ratios from one run.

    python benchmarks/flows.py [--only jacobian|peers|inversion] [--out docs/results/flows] [--quick]

Three parts:

- *jacobian*: a graphical residual flow's log-density and its gradient, beside a straightforward implementation of the
  same blocks that forms the full Jacobian of each datum and takes its determinant (Mouton and Kroon 2022, Eq. 6).
  Both give the same numbers, which is checked.
- *peers*: log-density and gradient of flows with at most 4 parents a variable, from 10 to 10,000 variables: time and
  peak memory (each in a process of its own) of our flows, zuko's masked autoregressive flow with the same
  adjacency, Pyro's inverse autoregressive and block autoregressive flows, and a dense residual flow (which have no
  structure: every variable sees all before it, or all).
- *inversion*: time and backward error of sampling from a density-direction flow for Lipschitz bounds from 0.9 to
  0.999, beside fixed-point iteration and plain Newton on the diagonal, and beside zuko's inverse.

Prints tables, and writes flows.json and flows.png.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import networkx as nx
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pyro_graphflows.graphs import load_network
from pyro_graphflows.transforms import faithful_residual, graphical_residual

BATCH = 64
BLOCKS = 4
SETTINGS = {"clock": "wall"}
MIB = 2**20 if sys.platform == "darwin" else 2**10


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(function, repeats=5, at_least=0.3):
    """The shortest time of a call, over some rounds of calls; the first call warms up."""
    now = CLOCKS[SETTINGS["clock"]]
    function()
    start = now()
    function()
    calls = max(1, int(at_least / repeats / max(now() - start, 1e-6)))
    best = np.inf
    for _ in range(repeats):
        start = now()
        for _ in range(calls):
            function()
        best = min(best, (now() - start) / calls)
    return best


def few_parents(dim, most=4):
    """A random DAG in which every variable has at most 4 parents among the 100 before it."""
    rng = np.random.default_rng(0)
    dag = nx.DiGraph()
    dag.add_nodes_from(range(dim))
    for v in range(1, dim):
        dag.add_edges_from((int(p), v) for p in set(rng.integers(max(0, v - 100), v, most)))
    return dag


def whole_network(name):
    return nx.DiGraph(load_network(name).graph().to_networkx())


# --- the full Jacobian -----------------------------------------------------------------------------------


class FullJacobian(nn.Module):
    """The blocks of one of our networks, with log-determinants from the Jacobian of each datum."""

    def __init__(self, network, batched):
        super().__init__()
        self.network, self.batched = network, batched

    def inverse_terms(self, y):
        """Return the noise and the log-determinants."""
        total = 0
        for block in self.network.blocks:
            first, second = block.entries()
            pre = F.linear(y, first, block.layers[0].bias)
            value, slope = block.activation.forward_and_derivative(pre)
            y = y + F.linear(value, second, block.layers[1].bias)
            eye = torch.eye(y.shape[-1], dtype=y.dtype)
            if self.batched:
                total = total + torch.linalg.slogdet(eye + (second * slope[:, None, :]) @ first)[1]
            else:
                total = total + torch.stack(
                    [torch.linalg.slogdet(eye + (second * row) @ first)[1] for row in slope]
                )
        return y, -total


def jacobian(args):
    rows = []
    print("full Jacobian: log-density and gradient, batch 100, float64, 4 blocks, one hidden layer")
    for name, units in (("magic-niab", 100), ("arth150", 214)):
        graph = whole_network(name)
        torch.manual_seed(0)
        options = {"hidden_dims": [units], "num_blocks": BLOCKS}
        ours = graphical_residual(graph, **options).network.double()
        dense = graphical_residual(graph, engine="dense", **options).network.double()
        dense.load_state_dict(ours.state_dict())
        z = torch.randn(100, len(graph), dtype=torch.float64)
        row = {"variables": len(graph), "units": units}

        def step(network, z=z):
            network.zero_grad()
            eps, log_diag = network.inverse_terms(z)
            loss = 0.5 * eps.pow(2).sum() + (log_diag.sum())
            loss.backward()
            return loss.item()

        values, times = {}, {}
        for key, network in (
            ("ours", ours),
            ("loop", FullJacobian(dense, False)),
            ("batched", FullJacobian(dense, True)),
        ):
            values[key] = step(network)
            times[key] = seconds(lambda network=network: step(network), repeats=3 if args.quick else 7)
        assert np.allclose(list(values.values()), values["ours"], rtol=1e-10)
        row.update({f"{key} [ms]": 1e3 * value for key, value in times.items()})
        row["ratio"] = times["loop"] / times["ours"]
        row["ratio to batched"] = times["batched"] / times["ours"]
        rows.append(row)
        show(row)
    return rows


# --- peers -----------------------------------------------------------------------------------------------


class DenseResidual(nn.Module):
    """Residual blocks with full weights: spectral norms by power iteration, log-determinants by a power series."""

    def __init__(self, dim, terms=8):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.terms = terms
        self.blocks = nn.ModuleList(
            nn.ModuleList([norm(nn.Linear(dim, 4 * dim)), norm(nn.Linear(4 * dim, dim))])
            for _ in range(BLOCKS)
        )

    def inverse_terms(self, y):
        """Return the noise and the log-determinants."""
        total = 0
        for first, second in self.blocks:
            pre = first(y)
            value = F.elu(0.9 * pre)
            slope = 0.9 * pre.clamp(max=0).exp()
            v = w = torch.randn_like(y)
            for k in range(1, self.terms + 1):
                w = F.linear(F.linear(w, 0.9 * first.weight) * slope, second.weight)
                total = total + (-1) ** (k + 1) / k * (w * v).sum(-1)
            y = y + 0.9 * second(value)
        return y, -total


class Zuko(nn.Module):
    """The masked autoregressive flow of zuko with the same adjacency."""

    def __init__(self, dim, graph):
        super().__init__()
        import zuko

        adjacency = torch.eye(dim, dtype=torch.bool)
        for parent, child in graph.edges:
            adjacency[child, parent] = True
        self.flow = zuko.flows.MAF(dim, transforms=BLOCKS, adjacency=adjacency, hidden_features=[4 * dim])

    def inverse_terms(self, y):
        """Return the noise and the log-determinants."""
        eps, ladj = self.flow().transform.call_and_ladj(y)
        return eps, -ladj


class OfPyro(nn.Module):
    """Pyro's inverse autoregressive flow, or its block autoregressive flow."""

    def __init__(self, dim, kind):
        super().__init__()
        from pyro.distributions.transforms import affine_autoregressive, block_autoregressive

        if kind == "iaf":
            parts = [affine_autoregressive(dim, [4 * dim]) for _ in range(BLOCKS)]
        else:
            parts = [block_autoregressive(dim, hidden_factors=[4], residual="gated") for _ in range(BLOCKS)]
        self.parts = nn.ModuleList(parts)

    def inverse_terms(self, y):
        """Return the noise and the log-determinants."""
        total = 0
        for part in self.parts:
            part.clear_cache()  # or the graph of the last call is found there
            x, y = y, part(y)
            total = total + part.log_abs_det_jacobian(x, y)
        return y, -total


METHODS = {
    "FaithfulResidual": lambda dim: faithful_residual(few_parents(dim), [4 * dim], BLOCKS).network,
    "GraphicalResidual": lambda dim: graphical_residual(few_parents(dim), [4 * dim], BLOCKS).network,
    "zuko MAF": lambda dim: Zuko(dim, few_parents(dim)),
    "Pyro IAF": lambda dim: OfPyro(dim, "iaf"),
    "Pyro BNAF": lambda dim: OfPyro(dim, "bnaf"),
    "dense residual": DenseResidual,
}
STRUCTURED = ("FaithfulResidual", "GraphicalResidual")


def peak():
    """The largest memory that this process has had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent's memory at the time of the fork too
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if lines:
            return int(lines[0].split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def one_case(method, dim, repeats):
    """Time one method at one size, in this process."""
    torch.manual_seed(0)
    before = peak()
    start = time.perf_counter()
    network = METHODS[method](dim)
    built = time.perf_counter() - start
    z = torch.randn(BATCH, dim)

    def step():
        network.zero_grad()
        eps, log_diag = network.inverse_terms(z)
        (0.5 * eps.pow(2).sum() + log_diag.sum()).backward()

    result = {"seconds": seconds(step, repeats), "build": built}
    return {**result, "peak [MiB]": peak(), "of which before [MiB]": before}


def peers(args):
    sizes = (10, 100, 1000) if args.quick else (10, 100, 1000, 3000, 10_000)
    rows = []
    print(f"\npeers: log-density and gradient, batch {BATCH}, float32, {BLOCKS} blocks of 4 units a variable")
    for dim in sizes:
        for method in METHODS:
            row = {"method": method, "variables": dim}
            # Dense weights, gradients, masks and intermediate copies of them.
            if method not in STRUCTURED and dim > args.largest_dense:
                row["left out"] = f"dense weights of {BLOCKS * 8 * dim**2 * 4 / 2**30:.1f} GiB"
            else:
                call = [sys.executable, __file__, "--case", json.dumps([method, dim, 3 if args.quick else 7])]
                call += ["--threads", str(args.threads), "--clock", args.clock]
                try:
                    done = subprocess.run(
                        call, capture_output=True, text=True, timeout=args.patience, check=True
                    )
                    row.update(json.loads(done.stdout.splitlines()[-1]))
                except subprocess.TimeoutExpired:
                    row["left out"] = f"not done after {args.patience:g} s"
                except subprocess.CalledProcessError as error:
                    row["left out"] = error.stderr.strip().splitlines()[-1][:80]
            rows.append(row)
            show(row)
    for method in STRUCTURED:
        found = {row["variables"]: row["seconds"] for row in rows if row["method"] == method}
        if 1000 in found and 10_000 in found:
            growth = np.log10(found[10_000] / found[1000])
            rows.append({"method": method, "growth exponent from 1,000 to 10,000": growth})
            show(rows[-1])
    return rows


# --- inversion -------------------------------------------------------------------------------------------


def banach(block, z, most=100_000):
    y, steps = z, 0
    for _ in range(most):
        steps += 1
        following = z - block(y)
        if torch.equal(following, y) or (following - y).abs().max() <= 1e-14 * (1 + y.abs().max()):
            break
        y = following
    return y, steps


def plain_newton(block, z, most=100):
    y, steps = z, 0
    for _ in range(most):
        steps += 1
        change, diagonal = block.forward_and_diag(y)
        step = (y + change - z) / (1 + diagonal)
        y = y - step
        if step.abs().max() <= 1e-14 * (1 + y.abs().max()):
            break
    return y, steps


def slow_flow(graph, c):
    """One block that contracts every variable at the bound: f(y) = (1 − c²) y above zero, where Banach is slowest."""
    network = graphical_residual(
        graph, num_blocks=1, lipschitz=c, activation="elu", engine="dense"
    ).network.double()
    (block,) = network.blocks
    first, second = block.layers
    units = first.out_features // len(graph)
    for layer in (first, second):
        layer.weight.zero_()
    for v in range(len(graph)):
        first.weight[v * units, v] = 10.0
        second.weight[v, v * units] = -10.0
    return network


def random_flow(graph, c):
    """Random weights that all contract, at their bound."""
    network = graphical_residual(graph, num_blocks=BLOCKS, lipschitz=c, activation="tanh").network.double()
    for block in network.blocks:
        first, second = block.layers
        first.weight.abs_().mul_(10)
        second.weight.abs_().mul_(-10)
    return network


@torch.no_grad()
def inversion(args):
    rows = []
    graph = whole_network("magic-niab")
    print(f"\ninversion: {len(graph)} variables, batch 100, float64; weights at their bound c")
    for case, c in [(case, c) for case in ("random", "slow") for c in (0.9, 0.97, 0.99, 0.999)]:
        torch.manual_seed(0)
        network = (random_flow if case == "random" else slow_flow)(graph, c)
        z = 3 * torch.randn(100, len(graph), dtype=torch.float64)
        if case == "slow":
            z = z.abs()
        evaluations = [block.start() for block in network.blocks]

        def by(method, evaluations=evaluations, z=z):
            y, total = z, 0
            for block in reversed(evaluations):
                y, steps = method(block, y)
                total += steps
            return y, total

        ways = {
            "ours": lambda network=network, z=z: (network.sample(z)[0], None),
            "Banach": lambda by=by: by(banach),
            "plain Newton": lambda by=by: by(plain_newton),
        }
        for name, way in ways.items():
            y, steps = way()
            again = network.inverse_terms(y)[0]
            # Relative to the largest value that the datum takes on the way through the blocks.
            scale = torch.maximum(y.abs(), z.abs()).amax(-1, keepdim=True).clamp(min=1)
            error = ((again - z).abs() / scale).amax().nan_to_num(nan=torch.inf).item()
            row = {"case": case, "c": c, "method": name, "steps": steps, "error": error}
            row["ms"] = 1e3 * seconds(way, repeats=1 if args.quick or name == "Banach" else 3)
            rows.append(row)
            show(row)
    torch.manual_seed(0)
    other = Zuko(len(graph), nx.convert_node_labels_to_integers(graph)).double()
    faithful = faithful_residual(graph, num_blocks=BLOCKS).network.double()
    z = 3 * torch.randn(100, len(graph), dtype=torch.float64)
    for name, inverse, forward in (
        (
            "zuko MAF",
            lambda: other.flow().transform.inv(z),
            lambda y: other.flow().transform(y),
        ),
        ("FaithfulResidual", lambda: faithful.sample(z)[0], lambda y: faithful.inverse_terms(y)[0]),
    ):
        error = (forward(inverse()) - z).abs().max().item()
        row = {
            "case": "fresh",
            "c": None,
            "method": name,
            "steps": None,
            "error": error,
            "ms": 1e3 * seconds(inverse, 3),
        }
        rows.append(row)
        show(row)
    return rows


# --- output ----------------------------------------------------------------------------------------------


def show(row):
    parts = []
    for key, value in row.items():
        if value is not None:
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    print("  " + "   ".join(parts), flush=True)


def draw(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    timed = [row for row in results.get("peers", []) if "seconds" in row]
    for method in METHODS:
        mine = [row for row in timed if row["method"] == method]
        style = "-o" if method in STRUCTURED else "--s"
        for axis, key in ((axes[0], "seconds"), (axes[1], "peak [MiB]")):
            axis.loglog([row["variables"] for row in mine], [row[key] for row in mine], style, label=method)
    axes[0].set(xlabel="variables", ylabel="seconds", title="log-density and gradient")
    axes[1].set(xlabel="variables", ylabel="MiB", title="peak memory of the process")
    if timed:
        axes[0].legend(fontsize=8)
    rows = [row for row in results.get("inversion", []) if row["case"] == "slow"]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        axes[2].loglog([1 - row["c"] for row in mine], [row["ms"] for row in mine], "-o", label=method)
        for row in mine:
            axes[2].annotate(f"{row['error']:.0e}", (1 - row["c"], row["ms"]), fontsize=7)
    axes[2].invert_xaxis()
    axes[2].set(xlabel="1 − c", ylabel="ms", title="inversion, slow case (numbers: error)")
    if rows:
        axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(args):
    torch.set_num_threads(args.threads)
    SETTINGS["clock"] = args.clock
    if args.case:
        method, dim, repeats = json.loads(args.case)
        print(json.dumps(one_case(method, dim, repeats)))
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    saved = out / "flows.json"
    results = json.loads(saved.read_text()) if saved.exists() else {}
    for part in (jacobian, peers, inversion):
        if args.only in (None, part.__name__):
            results[part.__name__] = part(args)
            results["settings"] = {
                "threads": args.threads,
                "torch": torch.__version__,
                "cores": os.cpu_count(),
            }
            saved.write_text(json.dumps(results, indent=1))
    draw(results, out / "flows.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["jacobian", "peers", "inversion"])
    parser.add_argument("--out", default="out/flows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help='"cpu" counts processor time, for machines that do other things (with one thread)',
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument(
        "--largest-dense", type=int, default=1000, help="the most variables with dense weights"
    )
    parser.add_argument("--patience", type=float, default=300.0, help="seconds before a peer is given up")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    main(parser.parse_args())
