"""The tracer beside Pyro's ``get_model_relations``: what each finds on the probe models, and how long it takes.

    python -m benchmarks.tracing [--steps 500] [--repeats 5]

The probes, with their true graphs, are those of the test suite (tests/probes.py). For Pyro, inputs are left out of
the truth: it does not look at arguments.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.inspect import get_model_relations

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.inspect import get_model_graph

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from probes import PROBES


def chain(x):
    """A state-space model: two sites for each time step."""
    z = torch.zeros(())
    for t in range(len(x)):
        z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
        pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[t])


def ours(probe):
    try:
        graph = get_model_graph(probe.model, probe.args, probe.kwargs)
    except UnsupportedModelError:
        return None
    return {node: set(graph.parents(node)) for node in graph.nodes}


def pyros(probe):
    try:
        relations = get_model_relations(probe.model, probe.args, probe.kwargs)
    except Exception as error:
        return type(error).__name__
    return {node: set(parents) for node, parents in relations["sample_sample"].items()}


def verdict(found, truth):
    if found is None:
        return "refused"
    if isinstance(found, str):
        return f"fails ({found})"
    missing = sorted(f"{p}->{c}" for c, parents in truth.items() for p in parents - found.get(c, set()))
    extra = sorted(f"{p}->{c}" for c in truth for p in found.get(c, set()) - truth[c])
    parts = [f"misses {' '.join(missing)}"] if missing else []
    parts += [f"adds {' '.join(extra)}"] if extra else []
    return ", ".join(parts) or "right"


def seconds(calls, repeats):
    """The shortest processor time of each call, taken in turns after one turn to warm up."""
    times = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, mine in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            if turn:
                mine.append(time.process_time() - start)
    return [min(mine) for mine in times]


def fresh(function, probe):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return function(probe)


def main(args):
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    counts = {"ours": Counter(), "pyro": Counter()}
    ratios = []
    print(f"{'probe':36} {'ours':9} {'get_model_relations':40} {'ours ms':>8} {'pyro ms':>8}")
    for probe in PROBES.values():
        sites = {
            c: parents - set(probe.inputs) for c, parents in probe.parents.items() if c not in probe.inputs
        }
        mine = verdict(fresh(ours, probe), probe.parents)
        theirs = verdict(fresh(pyros, probe), sites)
        counts["ours"][mine.split()[0]] += 1
        counts["pyro"][theirs.split()[0]] += 1
        times = seconds([partial(fresh, ours, probe), partial(fresh, pyros, probe)], args.repeats)
        ratios.append(times[0] / times[1])
        print(f"{probe.name:36} {mine:9} {theirs[:40]:40} {1e3 * times[0]:8.2f} {1e3 * times[1]:8.2f}")
    print()
    for name, count in counts.items():
        print(f"{name}: " + ", ".join(f"{n} {what}" for what, n in count.most_common()))
    print(
        f"time of ours / Pyro's over the probes: median {statistics.median(ratios):.2f}, at most {max(ratios):.2f}"
    )
    print(f"\nstate-space model of {args.steps} steps ({2 * args.steps} sites)")
    x = torch.zeros(args.steps)
    mine, theirs = seconds(
        [partial(get_model_graph, chain, (x,)), partial(get_model_relations, chain, (x,))], 3
    )
    print(f"ours {mine:.3f} s, get_model_relations {theirs:.3f} s, ratio {mine / theirs:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    main(parser.parse_args())
