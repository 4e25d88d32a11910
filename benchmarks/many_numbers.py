"""Posteriors of thousands of numbers: set-up, the start, and where ten seconds of training lead.

    python -m benchmarks.many_numbers [--models growth answers] [--elements 1500] [--seconds 10] [--seed 0]

Four models of one data set each: intercepts and slopes of groups with flat priors above them (``growth``), abilities
of students and difficulties of 30 items behind yes-or-no answers (``answers``), effects of groups behind counts
(``counts``), and crossed effects of so many rows and of 300 columns at most, five data for each row (``crossed``).
Losses in nats, the mean and standard error of 100 draws, by ``Trace_ELBO``; training by Adam at .01, which falls to a
hundredth of it in the second half. Beside the default guide Pyro's ``AutoNormal`` from 0 in unconstrained space, with
the same seconds of processor time, set-up not counted. One thread, float64.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyro_graphflows import auto_faithful_guide

RATE, LAST = 0.01, 0.01
DRAWS = 100
Program = Callable[..., None]
Problem = tuple[Program, tuple[Tensor, ...]]


def growth(elements: int) -> Problem:
    """Intercepts and slopes of groups, six data each."""
    group = torch.arange(elements).repeat_interleave(6)
    x = torch.randn(len(group))
    level, slope = 1.0 + 2.0 * torch.randn(elements), -1.0 + 0.5 * torch.randn(elements)
    y = level[group] + slope[group] * x + 0.4 * torch.randn(len(group))

    def model() -> None:
        flat = dist.ImproperUniform(constraints.real, (), ())
        mean_a, mean_b = pyro.sample("mean_a", flat), pyro.sample("mean_b", flat)
        spread_a = pyro.sample("spread_a", dist.HalfCauchy(2.0))
        spread_b = pyro.sample("spread_b", dist.HalfCauchy(2.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("groups", elements):
            a = pyro.sample("a", dist.Normal(mean_a, spread_a))
            b = pyro.sample("b", dist.Normal(mean_b, spread_b))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a[..., group] + b[..., group] * x, noise), obs=y)

    return model, ()


def answers(elements: int) -> Problem:
    """Abilities and difficulties behind yes-or-no answers."""
    ability, difficulty = torch.randn(elements), torch.randn(30)
    y = torch.bernoulli((ability[:, None] - difficulty).sigmoid())

    def model() -> None:
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        students = pyro.plate("students", elements, dim=-2)
        items = pyro.plate("items", 30, dim=-1)
        with students:
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with items:
            difficulty = pyro.sample("difficulty", dist.Normal(0.0, spread))
        with students, items:
            pyro.sample("y", dist.Bernoulli(logits=ability - difficulty), obs=y)

    return model, ()


def counts(elements: int) -> Problem:
    """Effects of groups behind counts, five each."""
    group = torch.arange(elements).repeat_interleave(5)
    y = torch.poisson((0.3 + 0.8 * torch.randn(elements))[group].exp())

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with pyro.plate("groups", elements):
            effect = pyro.sample("effect", dist.Normal(mean, spread))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(effect[..., group].exp()), obs=y)

    return model, ()


def crossed(elements: int) -> Problem:
    """Effects of rows and of columns, which the data look up."""
    columns = min(elements, 300)
    row, column = torch.randint(elements, (5 * elements,)), torch.randint(columns, (5 * elements,))
    of_rows, of_columns = torch.randn(elements), 0.7 * torch.randn(columns)
    y = 1.0 + of_rows[row] + of_columns[column] + 0.5 * torch.randn(len(row))

    def model(row: Tensor, column: Tensor, y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        spread_rows = pyro.sample("spread_rows", dist.HalfNormal(2.0))
        spread_columns = pyro.sample("spread_columns", dist.HalfNormal(2.0))
        noise = pyro.sample("noise", dist.HalfNormal(2.0))
        with pyro.plate("rows", elements):
            of_row = pyro.sample("of_row", dist.Normal(0.0, spread_rows))
        with pyro.plate("columns", columns):
            of_column = pyro.sample("of_column", dist.Normal(0.0, spread_columns))
        with pyro.plate("data", len(y)):
            loc = mean + of_row[..., row] + of_column[..., column]
            pyro.sample("y", dist.Normal(loc, noise), obs=y)

    return model, (row, column, y)


MODELS = {"growth": growth, "answers": answers, "counts": counts, "crossed": crossed}


def loss(model: Program, guide: nn.Module, args: tuple[Tensor, ...]) -> str:
    """Return the mean loss of some draws and its standard error."""
    loss_of = Trace_ELBO().differentiable_loss
    with torch.no_grad():
        each = torch.stack([torch.as_tensor(loss_of(model, guide, *args)) for _ in range(DRAWS)])
    return f"{each.mean():.1f} ± {each.std() / DRAWS**0.5:.1f}"


def at_zero(site: dict[str, Any]) -> Tensor:
    """Return where a site is at 0 in unconstrained space, also under a flat prior."""
    return biject_to(site["fn"].support)(torch.zeros(site["fn"].batch_shape + site["fn"].event_shape))


def auto_normal(model: Program, *args: Tensor) -> AutoNormal:
    """Return Pyro's independent normals, from 0."""
    return AutoNormal(model, init_loc_fn=at_zero)


def run(problem: Problem, make: Callable[..., nn.Module], seconds: float) -> str:
    """Set a guide up and train it; return seconds of set-up, the loss before and after, and the number of steps."""
    model, args = problem
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    began = time.process_time()
    guide = make(model, *args)
    guide(*args)
    setup, before = time.process_time() - began, loss(model, guide, args)
    optimizer = torch.optim.Adam(guide.parameters(), lr=RATE)
    loss_of, steps, began = Trace_ELBO().differentiable_loss, 0, time.process_time()
    while (spent := time.process_time() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = RATE * LAST ** max(0.0, 2 * spent / seconds - 1)
        optimizer.zero_grad()
        loss_of(model, guide, *args).backward()
        optimizer.step()
        steps += 1
    return f"| {setup:.1f} | {before} | {loss(model, guide, args)} | {steps} |"


def compare(
    parser: argparse.ArgumentParser, problem_of: Callable[..., Problem], guides: dict[str, Callable[..., Any]]
) -> None:
    """Print a line for each model and guide.

    Args:
        parser: Of the command's arguments: ``--models``, and what else problems are made from.
        problem_of: Returns a problem by the name of its model and these arguments.
        guides: What makes guides, by their names.
    """
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    print("| model | guide | set-up (s) | start | trained | steps |\n|---|---|---|---|---|---|")
    for name in args.models:
        torch.manual_seed(args.seed)
        problem = problem_of(name, args)
        for guide, make in guides.items():
            print(f"| {name} | {guide} {run(problem, make, args.seconds)}", flush=True)


def main() -> None:
    """Print a line for each model and guide."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--elements", type=int, default=1500)
    guides = {"default": auto_faithful_guide, "AutoNormal": auto_normal}
    compare(parser, lambda name, args: MODELS[name](args.elements), guides)


if __name__ == "__main__":
    main()
