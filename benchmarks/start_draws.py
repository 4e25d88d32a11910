"""What fewer joint samples at set-up cost: the exact divergence of untrained guides.

    python -m benchmarks.start_draws        # about a minute on one thread

Where a model cannot be run for many samples at once, set-up draws 1,000 joint samples or fewer instead of 10,000
(:mod:`pyro_graphflows.guides.samples`). Printed for linear-Gaussian networks, whose evidence is exact:
KL(q || p(. | x)) in nats per datum of guides right after set-up, means over set-up seeds with standard errors.
"""

import statistics
import warnings

import pyro
import torch
from pyro.infer import Trace_ELBO

from benchmarks.guide_problems import PROBLEMS
from pyro_graphflows import auto_faithful_guide

DRAWS = (10_000, 1000, 500, 250, 100)
SEEDS = 5
PARTICLES = 20


def divergence(key: str, draws: int, seed: int) -> float:
    """Return the exact divergence of a guide that is not trained, in nats per datum."""
    problem = PROBLEMS[key]()
    assert problem.exact is not None
    pyro.clear_param_store()
    guide = auto_faithful_guide(problem.model, *problem.test, num_start_samples=draws, setup_seed=seed)
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        losses = [Trace_ELBO().loss(problem.model, guide, *problem.test) for _ in range(PARTICLES)]
    return statistics.fmean(losses) / problem.num_data + problem.exact


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    print("| joint samples |", " | ".join(f"{draws:,}" for draws in DRAWS), "|")
    print("|---" * (1 + len(DRAWS)) + "|")
    for key in ("tree", "chain", "ecoli70"):
        cells = []
        for draws in DRAWS:
            found = [divergence(key, draws, seed) for seed in range(SEEDS)]
            cells.append(f"{statistics.fmean(found):.3f} ± {statistics.stdev(found) / SEEDS**0.5:.3f}")
        print(f"| {PROBLEMS[key]().name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
