"""One amortised guide for 8,526 data sets: trained on simulations, judged by its weights, refined where they say so.

    python -m studies.psychometric.run --data FOLDER                      # all that is missing
    python -m studies.psychometric.run --data FOLDER --train 60 --only train draws
    python -m studies.psychometric.report                                 # the page from the results

Each step is a line of ``results.jsonl``; training keeps a checkpoint, so that an interrupted study goes on where it
stopped. Times are processor seconds of this process with one thread.

1. *train*: forward divergence on simulations with the designs (numbers of trials) of the data sets, no answers.
2. *draws*: 4,000 draws for each data set straight from the guide, and k-hat of their weights, in blocks.
3. *refine*: chains for the data sets whose k-hat is above 0.7, in blocks.
4. *surprise*: how far each data set is from what the model generates.
5. *nuts*: Pyro's NUTS for a sample of 20 data sets, one chain each from its prior (500 steps of warm-up, 1,000 draws).
"""

import argparse
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import MCMC
from pyro.infer import NUTS as PyroNUTS
from torch import Tensor

from pyro_graphflows import Spline, auto_faithful_guide, load_guide, sample_posterior
from pyro_graphflows.infer import HMC, InferenceCompilation
from studies.flags import add_places
from studies.psychometric.curves import DATA_VARIABLE, FILE, Curves, data_folder, model, of_draws, read
from studies.results import Results

FAMILY = Spline(base="student", hidden_dims=(128, 128), fusion=True)
BATCH = 512
RATE, LAST = 2e-3, 0.01
NUM_DRAWS = 4000
BLOCK = 1000
TRUSTED = 0.7
REFINED_AT_ONCE = 1000
KERNEL = HMC(warmup=200)
CHAINS, SAMPLES = 4, 250
NUTS_SAMPLE, NUTS_WARMUP, NUTS_DRAWS = 20, 500, 1000
STEPS = ("train", "draws", "refine", "surprise", "nuts")


class Training:
    """Training by processor time, with a checkpoint from which it goes on."""

    def __init__(self, curves: Curves, seconds: float, folder: Path) -> None:
        self.curves, self.seconds, self.folder = curves, seconds, folder
        self.checkpoint = folder / "training.pt"
        self.spent, self.steps, self.losses = 0.0, 0, []
        pyro.set_rng_seed(0)
        start = time.process_time()
        self.guide = auto_faithful_guide(
            model, curves.n_trials[:BATCH], curves.n_right[:BATCH], family=FAMILY
        )
        self.setup = time.process_time() - start
        self.optimizer = torch.optim.Adam(self.guide.parameters(), lr=RATE)
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.guide.load_state_dict(state["guide"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.spent, self.steps, self.losses = state["spent"], state["steps"], state["losses"]
        self.compilation = InferenceCompilation(model, self.guide, self.optimizer, batch_size=1)

    def run(self) -> dict[str, Any]:
        """Train for the processor time that is left."""
        last = time.process_time()
        recent: list[float] = []
        pyro.set_rng_seed(1 + self.steps)
        while self.spent < self.seconds:
            share = self.spent / self.seconds
            for group in self.optimizer.param_groups:
                group["lr"] = RATE * LAST ** max(0.0, 1.5 * share - 0.5)
            rows = torch.randint(len(self.curves), (BATCH,))
            recent.append(
                self.compilation.step(self.curves.n_trials[rows], self.curves.n_right[rows]) / BATCH
            )
            self.steps += 1
            now = time.process_time()
            self.spent, last = self.spent + now - last, now
            if self.steps % 200 == 0:
                self.losses.append(sum(recent) / len(recent))
                recent = []
                print(f"step {self.steps}, {self.spent:.0f} s, loss {self.losses[-1]:.4f}", flush=True)
                if self.steps % 1000 == 0:
                    self._save()
        self._save()
        self.guide.save(self.folder / "guide.safetensors")
        return {
            "seconds": self.spent,
            "setup_seconds": self.setup,
            "steps": self.steps,
            "losses": self.losses,
            "family": repr(FAMILY),
            "batch": BATCH,
        }

    def _save(self) -> None:
        state = {
            "guide": self.guide.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "spent": self.spent,
            "steps": self.steps,
            "losses": self.losses,
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)


def errors(curves: Curves, rows: Tensor, values: Tensor, log_weights: Tensor | None = None) -> dict[str, Any]:
    """Return errors of means and standard deviations in units of the reference, for data sets among ``rows`` with one.

    Args:
        curves: The data sets.
        rows: Which data sets the values are of.
        values: Draws (draws, data, 4).
        log_weights: Their log-weights (draws, data); none: all draws count the same.
    """
    known = [(int(i), place) for place, i in enumerate(curves.reference) if bool((rows == i).any())]
    weights = torch.softmax(values.new_zeros(values.shape[:2]) if log_weights is None else log_weights, 0)
    found = {}
    for index, place in known:
        at = int((rows == index).nonzero())
        own, weight = values[:, at].double(), weights[:, at, None].double()
        mean = (weight * own).sum(0)
        sd = (weight * (own - mean).square()).sum(0).sqrt()
        found[str(index)] = {
            "mean": ((mean - curves.mean[place]) / curves.sd[place]).tolist(),
            "sd": (sd / curves.sd[place]).tolist(),
        }
    return found


def draw(curves: Curves, guide: Any, block: int) -> dict[str, Any]:
    rows = torch.arange(block * BLOCK, min((block + 1) * BLOCK, len(curves)))
    start = time.process_time()
    posterior = sample_posterior(
        model,
        guide,
        curves.n_trials[rows],
        curves.n_right[rows],
        num_draws=NUM_DRAWS,
        seed=block,
        progress=False,
    )
    spent = time.process_time() - start
    values, log_weights = of_draws(dict(posterior.draws)), posterior.log_weights
    return {
        "seconds": spent,
        "khat": [round(k, 4) if math.isfinite(k) else str(k) for k in posterior.khat.tolist()],
        "errors": errors(curves, rows, values),
        "weighted_errors": errors(curves, rows, values, log_weights),
    }


def khats(results: Results, curves: Curves) -> Tensor:
    """Return k-hat of all data sets.

    Raises:
        KeyError: If a block is missing.
    """
    records = results.read()
    blocks = range(math.ceil(len(curves) / BLOCK))
    return torch.tensor([float(k) for block in blocks for k in records[f"draws {block}"]["khat"]])


def refine(curves: Curves, guide: Any, rows: Tensor, seed: int) -> dict[str, Any]:
    args = curves.n_trials[rows], curves.n_right[rows]
    start = time.process_time()
    few = sample_posterior(model, guide, *args, num_draws=CHAINS * SAMPLES, seed=seed, progress=False)
    refined = few.refined(
        KERNEL, khat_above=None, num_chains=CHAINS, num_samples=SAMPLES, seed=seed, progress=False
    )
    spent = time.process_time() - start
    chains = refined.chains
    assert chains is not None
    worst = torch.stack(list(chains.rhat.values())).amax(0)
    return {
        "seconds": spent,
        "rows": rows.tolist(),
        "rhat": [round(r, 4) for r in worst.tolist()],
        "ess": [round(e) for e in refined.ess.tolist()],
        "divergent": int(chains.divergent.sum()),
        "gradients": chains.gradients,
        "errors": errors(curves, rows, of_draws(dict(refined.draws))),
    }


def surprise(curves: Curves, guide: Any) -> dict[str, Any]:
    start = time.process_time()
    posterior = sample_posterior(
        model, guide, curves.n_trials, curves.n_right, num_draws=5, seed=0, progress=False
    )
    tail = posterior.surprise
    assert tail is not None
    return {"seconds": time.process_time() - start, "tail": [float(f"{t:.3g}") for t in tail.tolist()]}


def nuts(curves: Curves, index: int) -> dict[str, Any]:
    """Pyro's NUTS for one data set: one chain from the prior, which favours it in the comparison of times."""
    pyro.set_rng_seed(index)
    pyro.clear_param_store()
    args = curves.n_trials[index : index + 1], curves.n_right[index : index + 1]
    start = time.process_time()
    chain = MCMC(PyroNUTS(model), num_samples=NUTS_DRAWS, warmup_steps=NUTS_WARMUP, disable_progbar=True)
    chain.run(*args)
    spent = time.process_time() - start
    values = of_draws(chain.get_samples())
    least = min(
        float(site["n_eff"].min())
        for name, site in chain.diagnostics().items()
        if name in ("gamma", "lambd", "m", "sigma")
    )
    return {
        "seconds": spent,
        "index": index,
        "ess": least,
        "errors": errors(curves, torch.tensor([index]), values),
    }


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_places(parse, "psychometric")
    parse.add_argument("--data", type=Path, help=f"the folder of {FILE} (or the variable {DATA_VARIABLE})")
    parse.add_argument(
        "--train", type=float, default=300.0, help="processor seconds of training (default: 300)"
    )
    parse.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="the steps to take")
    parse.add_argument(
        "--refine",
        type=int,
        default=10**9,
        help=f"refine so many of the data sets that need it, in blocks of {REFINED_AT_ONCE} (default: all)",
    )
    parse.add_argument("--most", type=int, default=10**9, help="end after so many new records (default: all)")
    args = parse.parse_args()
    folder = data_folder(args.data)
    if folder is None:
        print(f"{FILE} is not there: give its folder by --data or {DATA_VARIABLE}. Nothing is done.")
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    curves, results = read(folder), Results(args.results)
    args.work.mkdir(parents=True, exist_ok=True)

    made: list[str] = []

    def once(key: str, compute: Any) -> None:
        if key not in results and len(made) < args.most:
            made.append(key)
            record = compute()
            results.append(key, record)
            print(key, f"{record['seconds']:.1f} s", flush=True)

    if "train" in args.only:
        once("train", lambda: Training(curves, args.train, args.work).run())
    guide = load_guide(args.work / "guide.safetensors", model)
    if "draws" in args.only:
        for block in range(math.ceil(len(curves) / BLOCK)):
            once(f"draws {block}", lambda block=block: draw(curves, guide, block))
    if "surprise" in args.only:
        once("surprise", lambda: surprise(curves, guide))
    if "refine" in args.only and len(made) < args.most:
        bad = (khats(results, curves) > TRUSTED).nonzero().squeeze(-1)
        blocks = bad.split(REFINED_AT_ONCE)[
            : math.ceil(args.refine / REFINED_AT_ONCE)
        ]  # a block is always whole
        for number, rows in enumerate(blocks):
            once(f"refine {number}", lambda rows=rows, number=number: refine(curves, guide, rows, number))
    if "nuts" in args.only:
        for index in curves.reference[:NUTS_SAMPLE].tolist():
            once(f"nuts {index}", lambda index=index: nuts(curves, index))


if __name__ == "__main__":
    main()
