"""What capturing a guide's call costs: the step in which it happens, beside those before and after.

    python -m benchmarks.capture_time [schools crossed ...]      # three minutes for all eleven models

Printed for each model are medians of processor times of ``SVI.step`` with the normal guide, one thread, float32, before
and after its call is captured, the time of the step that captures and compares it, and how many steps of before it is.
"""

import statistics
import sys
import time

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from benchmarks.guide_problems import STEPS
from pyro_graphflows import auto_faithful_guide

BEFORE, AFTER, FIRST = 12, 18, 4  # steps; those of before that are not counted


def main(names: list[str]) -> None:
    """Print the times of some models."""
    torch.set_num_threads(1)
    for name in names or STEPS:
        problem = STEPS[name]()
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = auto_faithful_guide(problem.model, *problem.test, family="normal", **problem.options)
        guide.capture_after = BEFORE
        svi = SVI(problem.model, guide, pyro.optim.ClippedAdam({"lr": 1e-4}), Trace_ELBO())
        seconds = []
        for _ in range(BEFORE + AFTER):
            begin = time.process_time()
            svi.step(*problem.test)
            seconds.append(time.process_time() - begin)
        before = statistics.median(seconds[FIRST:BEFORE])
        after = statistics.median(seconds[BEFORE + 1 :])
        print(
            f"{problem.name:>28}: {1e3 * before:6.1f} ms a step, {1e3 * after:6.1f} captured; capturing "
            f"{seconds[BEFORE]:5.2f} s, {seconds[BEFORE] / before:3.0f} steps; {guide.capture_report}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
