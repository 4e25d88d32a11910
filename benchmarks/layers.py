"""Masked layers: the dense and the sparse engine, and the choice between them.

    python -m benchmarks.layers [--threads 2] [--dtype float64]

Each layer has 4 units a variable with 4 inputs each, batch 64, features first; forward and backward. The last column is
the engine that ``engine="auto"`` takes.
"""

import argparse
import time

import numpy as np
import torch

from pyro_graphflows.masks import SparseMask
from pyro_graphflows.nn import MaskedLinear


def seconds(function, repeats):
    """The shortest time of a call, over some rounds of calls."""
    function()
    start = time.perf_counter()
    function()
    calls = max(1, int(0.1 / (time.perf_counter() - start)))
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def random_mask(variables):
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(4 * variables), 4)
    places = np.unique(np.stack([rows, rng.integers(0, variables, rows.size)]), axis=1)
    return SparseMask.from_pairs(places[0], places[1], (4 * variables, variables))


def main(args):
    torch.set_num_threads(args.threads)
    torch.set_default_dtype(getattr(torch, args.dtype))
    print("variables   entries  density   dense [ms]  sparse [ms]  automatic")
    for variables in args.sizes:
        mask = random_mask(variables)
        total = mask.shape[0] * mask.shape[1]
        times = {}
        for engine in ("dense", "sparse"):
            if engine == "dense" and total > args.largest_dense:
                continue
            layer = MaskedLinear(mask, engine=engine)
            x = torch.randn(64, variables, requires_grad=True)
            grad = torch.randn(64, 4 * variables)
            if engine == "sparse":
                # As within a network, where both come from and go to layers of the same engine.
                x = torch.randn(variables, 64).T.requires_grad_()
                grad = grad.T.contiguous().T

            def step(layer=layer, x=x, grad=grad):
                layer.weight.grad = x.grad = None
                layer(x).backward(grad)

            times[engine] = 1e3 * seconds(step, args.repeats)
        dense = f"{times['dense']:12.3f}" if "dense" in times else f"{'-':>12s}"
        print(
            f"{variables:9d} {mask.nnz:9d} {mask.nnz / total:8.4f} {dense} {times['sparse']:12.3f}"
            f"  {MaskedLinear(mask).engine}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 50, 100, 200, 500, 1000, 10_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest-dense", type=int, default=10_000_000, help="entries of a dense layer")
    main(parser.parse_args())
