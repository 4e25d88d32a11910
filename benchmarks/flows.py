"""Flows over graphs beside other ways to do the same work: times, memory and errors, with ratios from one run.

    python -m benchmarks.flows --out docs/results [--only jacobian|peers|inversion] [--quick] [--again]

Three parts:

- *jacobian*: a graphical residual flow's log-density and its gradient, beside a straightforward implementation of the
  same blocks that forms the full Jacobian of each datum and takes its determinant (Mouton and Kroon 2022, Eq. 6).
  Both give the same numbers, which is checked.
- *peers*: log-density and gradient of flows with at most 4 parents a variable, from 10 to 10,000 variables: time and
  peak memory (each in a process of its own) of our flows, zuko's masked autoregressive flow with the same
  adjacency, Pyro's inverse autoregressive and block autoregressive flows, and a dense residual flow (which have no
  structure: every variable sees all before it, or all).
- *inversion*: time and backward error of sampling, with log-determinants, from a density-direction flow for Lipschitz
  bounds from 0.9 to 0.999, beside fixed-point iteration and plain Newton on the diagonal, and beside zuko's inverse.

Each time is the shortest of some rounds; wall and processor time are both taken, and what is compared goes in turns.
Prints tables and which bounds hold; writes flows.md, and flows/results.jsonl (a line for each part) and flows/flows.png
beside it. A part that is there is not measured again without ``--again``.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import networkx as nx
import numpy as np
import torch

from benchmarks import flows_report
from benchmarks.flows_peers import (
    BLOCKS,
    METHODS,
    OURS,
    FullJacobian,
    Zuko,
    banach,
    invert,
    plain_newton,
    random_flow,
    slow_flow,
    whole_network,
)
from pyro_graphflows import faithful_residual, graphical_residual
from studies.results import Results

BATCH = 64
MIB = 2**20 if sys.platform == "darwin" else 2**10


def timed(functions, rounds, at_least=0.1):
    """Time functions in turns; return for each the shortest wall time of a call, and the shortest processor time.

    Processor time counts all threads. A round of a function takes at least so many seconds, or one call.
    """
    calls = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        calls.append(max(1, int(at_least / max(time.perf_counter() - start, 1e-6))))
    best = np.full((len(functions), 2), np.inf)
    for _ in range(rounds):
        for i, (function, count) in enumerate(zip(functions, calls, strict=True)):
            start = time.perf_counter(), time.process_time()
            for _ in range(count):
                function()
            spent = time.perf_counter() - start[0], time.process_time() - start[1]
            best[i] = np.minimum(best[i], np.array(spent) / count)
    return [{"wall": wall, "cpu": cpu} for wall, cpu in best]


def density_step(network, data):
    """One evaluation of the log-density and its gradient."""

    def step():
        network.zero_grad()
        eps, log_diag = network.inverse_terms(data)
        loss = 0.5 * eps.pow(2).sum() + log_diag.sum()
        loss.backward()
        return loss.item()

    return step


def jacobian(args):
    """Ours against the full Jacobian."""
    rows = []
    for name, units in (("magic-niab", 100), ("arth150", 214)):
        graph = whole_network(name)
        torch.manual_seed(0)
        options = {"hidden_dims": [units], "num_blocks": BLOCKS}
        ours = graphical_residual(graph, **options).network.double()
        dense = graphical_residual(graph, engine="dense", **options).network.double()
        dense.load_state_dict(ours.state_dict())
        data = torch.randn(100, len(graph), dtype=torch.float64)
        networks = {"ours": ours, "loop": FullJacobian(dense, False), "batched": FullJacobian(dense, True)}
        steps = {key: density_step(network, data) for key, network in networks.items()}
        losses = [step() for step in steps.values()]
        assert np.allclose(losses, losses[0], rtol=1e-10), losses
        times = timed(list(steps.values()), 3 if args.quick else 9, 0.2)
        row = {"network": name, "variables": len(graph), "units": units}
        row.update(dict(zip(steps, times, strict=True)))
        rows.append(row)
        show(row)
    return rows


def peak():
    """The largest memory that this process has had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent's memory at the time of the fork too
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if lines:
            return int(lines[0].split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def profiled(step, repeats=20):
    """Return the operations of a step, and the share of its time in matrix products of whole layers."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(repeats):
            step()
    events = [event for event in profile.key_averages() if event.key.startswith("aten::")]
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return {
        "operations": round(sum(event.count for event in events) / repeats),
        "products": (times.get("aten::mm", 0) + times.get("aten::addmm", 0)) / sum(times.values()),
    }


def one_case(method, dim, rounds):
    """Time one method at one size, in this process; take a profile at 100 variables."""
    torch.manual_seed(0)
    before = peak()
    start = time.perf_counter()
    network = METHODS[method](dim)
    built = time.perf_counter() - start
    step = density_step(network, torch.randn(BATCH, dim))
    (spent,) = timed([step], rounds)
    row = {**spent, "build": built, "peak": peak(), "before": before}
    return {**row, **profiled(step)} if dim == 100 else row


def peers(args):
    """Ours against other flows, by size."""
    rows = []
    for dim in (10, 100, 1000) if args.quick else (10, 100, 1000, 3000, 10_000):
        for method in METHODS:
            row = {"method": method, "variables": dim}
            # Dense weights, gradients, masks and intermediate copies of them.
            if method not in OURS and dim > args.largest_dense:
                row["left out"] = f"dense weights of {BLOCKS * 8 * dim**2 * 4 / 2**30:.1f} GiB"
            else:
                rounds = 3 if args.quick or (method not in OURS and dim >= 1000) else 7
                call = [sys.executable, "-m", "benchmarks.flows", "--case", json.dumps([method, dim, rounds])]
                call += ["--threads", str(args.threads)]
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
    return rows


@torch.no_grad()
def inversion(args):
    """Ours against fixed-point iteration, plain Newton and zuko's inverse."""
    rows = []
    graph = whole_network("magic-niab")
    rounds = 2 if args.quick else 5
    for case, c in [(case, c) for case in ("random", "slow") for c in (0.9, 0.97, 0.99, 0.999)]:
        torch.manual_seed(0)
        network = (random_flow if case == "random" else slow_flow)(graph, c)
        z = 3 * torch.randn(100, len(graph), dtype=torch.float64)
        z = z.abs() if case == "slow" else z
        ways = {
            "ours": lambda network=network, z=z: (*network.sample(z), None),
            "plain Newton": lambda network=network, z=z: invert(network, z, plain_newton),
            "Banach": lambda network=network, z=z: invert(network, z, banach),
        }
        times = timed(list(ways.values()), rounds, 0.05)
        for (name, way), spent in zip(ways.items(), times, strict=True):
            y, _, steps = way()
            again = network.inverse_terms(y)[0]
            # Relative to the largest value that the datum takes on the way through the blocks.
            scale = torch.maximum(y.abs(), z.abs()).amax(-1, keepdim=True).clamp(min=1)
            error = ((again - z).abs() / scale).amax().nan_to_num(nan=torch.inf).item()
            rows.append({"case": case, "c": c, "method": name, "steps": steps, "error": error, **spent})
            show(rows[-1])
    torch.manual_seed(0)
    graph = whole_network("arth150")
    other = Zuko(len(graph), nx.convert_node_labels_to_integers(graph)).double()
    faithful = faithful_residual(graph, num_blocks=BLOCKS).network.double()
    graphical = graphical_residual(graph, num_blocks=BLOCKS).network.double()
    z = 3 * torch.randn(100, len(graph), dtype=torch.float64)
    networks = {"FaithfulResidual": faithful, "GraphicalResidual": graphical, "zuko MAF": other}
    times = timed([lambda network=network: network.sample(z) for network in networks.values()], rounds, 0.05)
    for (name, network), spent in zip(networks.items(), times, strict=True):
        error = (network.inverse_terms(network.sample(z)[0])[0] - z).abs().max().item()
        row = {"case": "fresh, 107 variables", "c": None, "method": name, "steps": None, "error": error}
        rows.append({**row, **spent})
        show(rows[-1])
    return rows


def show(row):
    """Print a row."""
    parts = []
    for key, value in row.items():
        if isinstance(value, dict):
            parts.append(f"{key} {1e3 * value['wall']:.4g} ms (cpu {1e3 * value['cpu']:.4g})")
        elif key in ("wall", "cpu"):
            parts.append(f"{key} {1e3 * value:.4g} ms")
        elif value is not None:
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    print("  " + "   ".join(parts), flush=True)


def machine(args):
    """What the times depend on."""
    return {
        "threads": args.threads,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": date.today().isoformat(),
    }


def main(args):
    """Run the parts that were asked for, and report."""
    torch.set_num_threads(args.threads)
    if args.case:
        method, dim, rounds = json.loads(args.case)
        print(json.dumps(one_case(method, dim, rounds)))
        return
    folder = Path(args.out) / "flows"
    folder.mkdir(parents=True, exist_ok=True)
    saved = Results(folder / "results.jsonl")
    start = time.perf_counter()
    for part in (jacobian, peers, inversion):
        key = part.__name__
        if args.only not in (None, key) or args.render:
            continue
        if key in saved and not args.again:
            print(f"{key}: is there (--again measures it again)")
            continue
        print(part.__doc__)
        saved.append(key, {"settings": machine(args), "rows": part(args)})
    results = saved.read()
    print(f"took {time.perf_counter() - start:.0f} s\n")
    flows_report.draw(results, folder / "flows.png")
    (Path(args.out) / "flows.md").write_text(flows_report.page(results))
    print("\n".join(flows_report.verdicts(results)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["jacobian", "peers", "inversion"])
    parser.add_argument("--out", default="out", help="flows.md and the folder flows go there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--again", action="store_true", help="measure parts that are there again")
    parser.add_argument("--render", action="store_true", help="draw page and picture from the saved results")
    parser.add_argument(
        "--largest-dense", type=int, default=1000, help="the most variables with dense weights"
    )
    parser.add_argument("--patience", type=float, default=120.0, help="seconds before a peer is given up")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    main(parser.parse_args())
