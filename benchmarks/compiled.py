"""Steps of training on eleven models: ours beside AutoNormal's, and compiled.

    nice python -m benchmarks.compiled --out docs/results          # about half an hour on one thread
    python -m benchmarks.compiled --render --out docs/results      # the page from the saved results

Each model is a line of OUT/steps/results.jsonl, written when it is done; models that are there are left out, so a run
that was cut off goes on. Times of a step are medians of processor time of one thread, taken in turns: ``SVI.step`` with
AutoNormal, on hierarchies AutoStructured, and with guides of normal, default and flow conditionals, whose calls are
captured by then (Pyro's ClippedAdam, one particle); ``SVI.step`` with the normal guide and ``CompiledELBO()``, which
needs no compiler; and the step of ``fit`` with compiled loss and gradients for the normal guide (torch's fused Adam).
The seconds of compilation are processor time of capturing and compiling, the C++ compiler's included, and wall-clock
time.
"""

import argparse
import copy
import datetime
import os
import resource
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoStructured

from benchmarks.guide_problems import STEPS, Problem
from pyro_graphflows import auto_faithful_guide
from pyro_graphflows.infer import CompiledELBO, CompiledLoss
from studies.results import Results

CAPTURE_AFTER = 2  # steps; 50 by default
FAMILIES = {"normal": "normal", "default": "auto", "flow": "flow"}
STRUCTURED = ("schools", "radon", "crossed")  # where AutoStructured is timed too


def guides_of(key: str, problem: Problem) -> dict[str, Any]:
    """Return the guides, ours set up by the data."""
    made: dict[str, Any] = {"AutoNormal": AutoNormal(problem.model)}
    if key in STRUCTURED:
        made["AutoStructured"] = AutoStructured(problem.model, conditionals="normal", dependencies="linear")
    for name, family in FAMILIES.items():
        pyro.set_rng_seed(0)
        made[name] = auto_faithful_guide(problem.model, *problem.test, family=family, **problem.options)
        made[name].capture_after = CAPTURE_AFTER
    return made


def processor_seconds() -> float:
    """Return the processor time of this process and of those that it has waited for."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


def measure(key: str, rounds: int, compiled: bool = True) -> dict[str, Any]:
    """Return the record of a model."""
    problem = STEPS[key]()
    steps: dict[str, Any] = {}
    record: dict[str, Any] = {"name": problem.name, "date": str(datetime.date.today())}
    guides = guides_of(key, problem)
    for name, guide in guides.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(problem.model, guide, pyro.optim.ClippedAdam({"lr": 1e-4}), Trace_ELBO())
        for _ in range(CAPTURE_AFTER + 9):  # the call is captured, and compared with the programs
            svi.step(*problem.test)
        steps[name] = (lambda svi=svi: svi.step(*problem.test), pyro.get_param_store().get_state())
    pyro.clear_param_store()
    loss, twin = (
        CompiledELBO(),
        copy.deepcopy(guides["normal"]),
    )  # a guide captures its calls anew after others' steps
    svi = SVI(problem.model, twin, pyro.optim.ClippedAdam({"lr": 1e-4}), loss)
    begin = processor_seconds()
    svi.step(*problem.test)
    record["capture_cpu"] = processor_seconds() - begin
    for _ in range(8):  # the comparisons with the programs come first
        svi.step(*problem.test)
    if loss.report.startswith("compiled"):
        steps["captured"] = (lambda: svi.step(*problem.test), pyro.get_param_store().get_state())
    if compiled:
        pyro.clear_param_store()
        compiled_loss = CompiledLoss(problem.model, twin)
        optimizer = torch.optim.Adam(compiled_loss.parameters(*problem.test), lr=1e-4, fused=True)
        begin, wall = processor_seconds(), time.perf_counter()
        compiled_loss.loss_and_grads(*problem.test)
        record["compile_cpu"], record["compile_wall"] = (
            processor_seconds() - begin,
            time.perf_counter() - wall,
        )
        record["report"] = compiled_loss.report

        def step() -> None:
            optimizer.zero_grad()
            compiled_loss.loss_and_grads(*problem.test)
            optimizer.step()

        for _ in range(8):  # the comparisons with the programs come first
            step()
        steps["compiled"] = (step, pyro.get_param_store().get_state())
        record["report"] = compiled_loss.report
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (step_once, state) in steps.items():
            pyro.get_param_store().set_state(state)
            for _ in range(3):
                begin = time.thread_time()
                step_once()
                taken[name].append(time.thread_time() - begin)
    record["ms"] = {name: 1e3 * statistics.median(times) for name, times in taken.items()}
    return record


def page(records: dict[str, dict[str, Any]]) -> str:
    """Return the page."""
    dates = sorted({record["date"] for record in records.values()})
    missing = [key for key in STEPS if key not in records]
    lines = [
        "# Steps of training on eleven models",
        "",
        f"Made by `python -m benchmarks.compiled --out docs/results` on {' and '.join(dates)}, on 2 CPU cores shared "
        "with other work; the script says what is timed. Milliseconds of processor time of one `SVI.step`, medians of "
        "steps taken in turns, one thread, float32. In brackets the ratio to AutoNormal's. In steps of *normal*, "
        "*default* and *flow* the guide's call is captured, as guides do by themselves after 50 steps. *Captured* is "
        "`SVI.step` with the normal guide and `CompiledELBO()`, then the processor seconds of its first; *compiled* "
        "the step of `fit(..., compile=True)` for the normal guide; in brackets how many times faster than `SVI.step` "
        "with the same guide, with the processor and wall-clock seconds of compilation.",
        "",
        *([f"Not measured: {', '.join(missing)}.", ""] if missing else []),
        "| model | AutoNormal | AutoStructured | normal | default | flow | captured | first | compiled | compilation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in [key for key in STEPS if key in records]:
        record = records[key]
        ms = record["ms"]
        base = ms["AutoNormal"]
        names = ("AutoStructured", *FAMILIES)
        guides = [f"{ms[name]:.1f} ({ms[name] / base:.2f})" if name in ms else "–" for name in names]
        captured = "– | –"
        if "captured" in ms:
            captured = f"{ms['captured']:.2f} ({ms['captured'] / base:.2f}) | {record['capture_cpu']:.1f} s"
        done = record["report"].startswith("compiled")
        fast = f"{ms['compiled']:.2f} ({ms['normal'] / ms['compiled']:.1f}×)" if done else "–"
        cost = f"{record['compile_cpu']:.0f} s, {record['compile_wall']:.0f} s" if done else record["report"]
        lines.append(
            f"| {record['name']} | {base:.1f} | {' | '.join(guides)} | {captured} | {fast} | {cost} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="out", help="steps.md and the folder steps go there")
    parser.add_argument("--models", nargs="*", default=list(STEPS))
    parser.add_argument("--rounds", type=int, default=10, help="rounds of three timed steps")
    parser.add_argument(
        "--steps-only", action="store_true", help="print the times without compiling; keep nothing"
    )
    parser.add_argument("--again", action="store_true", help="measure models that are there already, too")
    parser.add_argument("--render", action="store_true", help="the page from the saved results")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    saved = Results(Path(args.out) / "steps" / "results.jsonl")
    for key in [] if args.render else args.models:
        if args.steps_only:
            ms = measure(key, args.rounds, compiled=False)["ms"]
            ratios = {name: f"{value:.2f} ({value / ms['AutoNormal']:.2f})" for name, value in ms.items()}
            print(key, ratios, flush=True)
        elif args.again or key not in saved:
            record = measure(key, args.rounds)
            print(key, record, flush=True)
            saved.append(key, record)
    if not args.steps_only:
        (Path(args.out) / "steps.md").write_text(page(saved.read()))


if __name__ == "__main__":
    main()
