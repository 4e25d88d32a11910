"""What large problems cost: many rows, many groups, many sites.

Each case runs in a process of its own, within a limit of time and memory. Printed are the CPU seconds to set a guide
up, those of one gradient step (the median of five), and the peak of memory. `python -m benchmarks.sizes` writes the
table of docs/how_to/sizes.md between its two marks; cases in benchmarks/sizes.jsonl are not run again.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO

from pyro_graphflows import auto_faithful_guide

CASES = [
    ("rows", 10_000),
    ("rows", 1_000_000),
    ("batches", 1_000_000),
    ("groups", 1_000),
    ("groups", 100_000),
    ("sites", 100),
    ("sites", 1_000),
    ("sites", 10_000),
]
WORDS = {
    "rows": "rows with a latent each, all in one step",
    "batches": "rows with a latent each, batches of 1,000",
    "groups": "groups with an effect each, mean and scale above them, five rows a group",
    "sites": "sites of a chain (a state-space model), 10 series",
}
RESULTS = Path(__file__).with_suffix(".jsonl")  # cases that are in it are not run again
MARKS = ("<!-- table -->", "<!-- end of table -->")


def rows(x, size=None):
    given = (
        {} if size is None else {"subsample": torch.arange(len(x))}
    )  # drawing indices of a million rows is slow
    with pyro.plate("rows", size or len(x), **given):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def groups(group, y, num):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", num):
        effect = pyro.sample("effect", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(effect[..., group], 0.5), obs=y)


def sites(y):
    with pyro.plate("series", len(y)):
        state = torch.zeros(len(y))
        for t in range(y.shape[1]):
            state = pyro.sample(f"z{t}", dist.Normal(0.9 * state, 1.0))
            pyro.sample(f"y{t}", dist.Normal(state, 0.5), obs=y[:, t])


def problem(kind, num):
    """Return a model, the arguments of set-up and those of a step."""
    if kind == "rows":
        x = torch.randn(num)
        return rows, (x,), (x,)
    if kind == "batches":
        x = torch.randn(num)
        return rows, (x[:1000], num), (x[1000:2000], num)
    if kind == "groups":
        group = torch.arange(num).repeat(5)
        arguments = (group, torch.randn(len(group)), num)
        return groups, arguments, arguments
    y = torch.randn(10, num)
    return sites, (y,), (y,)


def measure(kind, num):
    """Return seconds and memory of one case."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    model, first, later = problem(kind, num)
    begin = time.process_time()
    guide = auto_faithful_guide(model, *first)
    set_up = time.process_time() - begin
    loss, optimiser = Trace_ELBO(), torch.optim.Adam(guide.parameters(), 1e-3)
    steps = []
    for _ in range(5):
        begin = time.process_time()
        optimiser.zero_grad()
        loss.differentiable_loss(model, guide, *later).backward()
        optimiser.step()
        steps.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux: KiB
    return {"set_up": set_up, "step": statistics.median(steps), "gib": peak}


def run(kind, num, args):
    """Run a case in a process of its own; return its figures, or why there are none."""
    command = [sys.executable, "-m", "benchmarks.sizes", "--case", kind, str(num)]

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (int(args.gib * 2**30),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (args.seconds, args.seconds + 5))

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limit, env=environment, check=False
    )
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"failed": f"not done after {args.seconds} CPU seconds"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return {"failed": f"more than {args.gib:g} GiB" if "emory" in reason else reason[:80]}
    return json.loads(done.stdout.splitlines()[-1])


def table(results, args):
    """Return the rows of the page."""
    lines = [
        f"*Measured on {max(found['date'] for _, found in results)}, 2 CPU cores that were shared with other work, "
        "one thread, float32, torch "
        f"{torch.__version__.split('+')[0]}; at most {args.seconds} CPU seconds and {args.gib:g} GiB a case "
        "(`python -m benchmarks.sizes`).*",
        "",
        "| | number | set-up (CPU s) | a step (CPU s) | memory (GiB) |",
        "|---|---|---|---|---|",
    ]
    for (kind, num), found in results:
        figures = (
            [found["failed"], "", ""]
            if "failed" in found
            else [
                f"{found['set_up']:.1f}",
                f"{found['step']:.3g}",
                f"{found['gib']:.1f}",
            ]
        )
        lines.append(f"| {WORDS[kind]} | {num:,} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main(args):
    if args.case:
        print(json.dumps(measure(args.case[0], int(args.case[1]))))
        return
    done = {}
    if RESULTS.exists():
        done = {
            (line["kind"], line["num"]): line for line in map(json.loads, RESULTS.read_text().splitlines())
        }
    for kind, num in CASES:
        if (kind, num) not in done and not args.page:
            found = {"kind": kind, "num": num, "date": str(date.today()), **run(kind, num, args)}
            print(found, flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(found) + "\n")
            done[kind, num] = found
    results = [(case, done[case]) for case in CASES if case in done]
    page = Path(args.out) / "sizes.md"
    before, rest = page.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{table(results, args)}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs=2, help="run one case, and print its figures")
    parser.add_argument("--page", action="store_true", help="run nothing: the page from what there is")
    parser.add_argument("--seconds", type=int, default=900, help="of CPU")
    parser.add_argument("--gib", type=float, default=8.0, help="of address space")
    parser.add_argument("--out", default="docs/how_to")
    main(parser.parse_args())
