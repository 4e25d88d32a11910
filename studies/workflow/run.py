"""What a posterior from a guide is worth: refinement, new groups, cross-validation, speed, against exact answers.

    python -m studies.workflow.run                      # all that is missing
    python -m studies.workflow.run --only schools banana
    python -m studies.workflow.run --data FOLDER        # with the radon data of posteriordb (log_radon, county, floor)
    python -m studies.psychometric.report               # the page

Each part is a line of ``results.jsonl``. The references are integrals on grids, where the parts that are normal given
scales are done in closed form.
"""

import argparse
import math
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_graphflows import Posterior, auto_faithful_guide, sample_posterior
from pyro_graphflows.infer import NUTS, InferenceCompilation
from pyro_graphflows.infer.batched_hmc import Kernel, Space, State, Transition, run_chains
from pyro_graphflows.infer.chains import split_rhat
from pyro_graphflows.infer.model_runs import Fitted
from pyro_graphflows.infer.refinement import Target, Unconstrained, coordinates_of, starting_rows
from studies.flags import add_places
from studies.real_models.hierarchical import eight_schools, radon
from studies.real_models.models import find
from studies.real_models.posterior import DATA_VARIABLE, data_folder, read_reference
from studies.results import Results

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
CHAINS = 8
ERROR, AGREE = 0.05, 1.01
LENGTHS = (250, 500, 750, 1000, 1500)  # of a chain, at which means and R-hat are looked at
ATTEMPTS = (750, 1500)
PATIENCE = 10  # chains from the prior may take so many times the gradients of those from the guide
PARTICLES = 4
STEPS = 1500  # of training on one data set
NUM_WEIGHTED, NUM_REFINED = 40_000, 1000  # draws for radon: of the guide, of each of eight chains
CLOSE = 0.02  # nats by which the log predictive density of a datum may be off
Moments = dict[str, tuple[Tensor, Tensor]]


# --------------------------------------------------------------------------------------------------------- references
def schools_grid() -> tuple[Tensor, Tensor, Tensor]:
    """Return tau and mu on a grid and the logarithms of their posterior weights (not normalised)."""
    log_tau = torch.linspace(-9.0, 6.0, 500, dtype=torch.float64)
    mu = torch.linspace(-25.0, 25.0, 301, dtype=torch.float64)
    tau = log_tau.exp()
    scale = (tau.square()[:, None] + ERRORS.square()).sqrt()  # (T, 8)
    terms = dist.Normal(mu[None, :, None], scale[:, None, :]).log_prob(EFFECTS)  # (T, M, 8)
    prior = (
        dist.HalfCauchy(5.0).log_prob(tau)[:, None] + log_tau[:, None] + dist.Normal(0.0, 5.0).log_prob(mu)
    )
    return tau, mu, torch.cat([terms, prior[..., None]], -1)


def schools_moments() -> Moments:
    """Return exact means and standard deviations."""
    tau, mu, terms = schools_grid()
    weight = torch.softmax(terms.sum(-1).flatten(), 0).reshape(terms.shape[:2])
    precision = 1 / tau.square()[:, None] + 1 / ERRORS.square()  # (T, 8)
    mean = (mu[None, :, None] / tau.square()[:, None, None] + EFFECTS / ERRORS.square()) / precision[:, None]
    first = (weight[..., None] * mean).sum((0, 1))
    second = (weight[..., None] * (mean.square() + 1 / precision[:, None])).sum((0, 1))
    found = {"theta": (first, (second - first.square()).sqrt())}
    for name, value in (("mu", mu[None].expand_as(weight)), ("tau", tau[:, None].expand_as(weight))):
        m = (weight * value).sum()
        found[name] = (m, ((weight * value.square()).sum() - m.square()).sqrt())
    return found


def schools_loo() -> Tensor:
    """Return log p(y_n | y_-n) by the ratio of two evidences."""
    _, _, terms = schools_grid()
    whole = torch.logsumexp(terms.sum(-1).flatten(), 0)
    return torch.stack(
        [whole - torch.logsumexp((terms.sum(-1) - terms[..., n]).flatten(), 0) for n in range(8)]
    )


def banana(x: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 5.0))
    # last: guides sample it first, and given a the law of b has one mode
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(b - 0.5 * a.square(), 0.5), obs=x)


def banana_moments(x: Tensor) -> Moments:
    a = torch.linspace(-12.0, 12.0, 2401, dtype=torch.float64)[:, None]
    b = torch.linspace(-20.0, 60.0, 4001, dtype=torch.float64)[None]
    log_weight = dist.Normal(0.0, 2.0).log_prob(a) + dist.Normal(0.0, 5.0).log_prob(b)
    for value in x:
        log_weight = log_weight + dist.Normal(b - 0.5 * a.square(), 0.5).log_prob(value)
    weight = torch.softmax(log_weight.flatten(), 0).reshape(log_weight.shape)
    found = {}
    for name, grid in (("a", a), ("b", b)):
        mean = (weight * grid).sum()
        found[name] = (mean, (weight * (grid - mean).square()).sum().sqrt())
    return found


# --------------------------------------------------------------------------------------------------------- refinement
def worst(draws: dict[str, Tensor], moments: Moments, chains: int) -> tuple[float, float]:
    """Return the largest error of a mean in standard deviations, and the largest R-hat."""
    error = max(float(((draws[n].mean(0) - m) / s).abs().max()) for n, (m, s) in moments.items())
    rhat = max(float(split_rhat(draws[n].reshape(chains, -1, *draws[n].shape[1:])).max()) for n in moments)
    return error, rhat


def refinement(
    model: Any, args: tuple[Tensor, ...], moments: Moments, steps: int, **options: Any
) -> dict[str, Any]:
    """Compare chains from a spoilt guide in its base space with chains from the prior in unconstrained space.

    The same kernel in both; what is reported is the first of some lengths at which means are within 0.05 standard
    deviations and R-hat is below 1.01.

    Args:
        model: The model.
        args: Its arguments.
        moments: Its posterior means and standard deviations.
        steps: How long the guide is trained before it is spoilt.
        options: Of the guide.
    """
    record: dict[str, Any] = {"steps": steps}
    pyro.set_rng_seed(0)
    guide = auto_faithful_guide(model, *args, **options)
    start = time.process_time()
    if steps:
        fit_to(model, guide, args, steps)
    record["train_seconds"] = time.process_time() - start
    narrow(guide, args)
    posterior = sample_posterior(model, guide, *args, num_draws=1000, seed=0, progress=False)
    record["khat"], record["ess"] = float(posterior.khat), float(posterior.ess)
    record["guide_error"] = worst(dict(posterior.draws), moments, 1)[0]
    coordinates = coordinates_of(posterior.fitted, posterior.draws)
    rows = starting_rows(posterior.log_weights, CHAINS)
    first = {name: posterior.draws[name][rows] for name in posterior.fitted.latents}
    pyro.set_rng_seed(1)
    record["refined"] = run(posterior.fitted, coordinates, first, moments)
    pyro.set_rng_seed(2)
    most = PATIENCE * record["refined"]["gradients"]
    record["prior"] = run(posterior.fitted, *from_the_prior(posterior.fitted), moments, most)
    trained = record["refined"]["gradients"] + PARTICLES * steps
    record["ratio"] = record["prior"]["gradients"] / record["refined"]["gradients"]
    record["ratio_with_training"] = record["prior"]["gradients"] / trained
    return record


class Patience(Kernel):
    """A kernel that interrupts its chains after so many gradients."""

    def __init__(self, kernel: NUTS, most: float) -> None:
        self.kernel, self.most = kernel, most
        self.spent = 0

    @property
    def warmup(self) -> int:
        """See :class:`Kernel`."""
        return self.kernel.warmup

    @property
    def acceptance(self) -> float:
        """See :class:`Kernel`."""
        return self.kernel.acceptance

    def __call__(self, space: Space, state: State, step: Tensor) -> Transition:
        """See :class:`Kernel`."""
        self.spent = space.gradients
        if self.spent > self.most:
            raise KeyboardInterrupt
        return self.kernel(space, state, step)


def run(
    fitted: Fitted, coordinates: Any, first: dict[str, Tensor], moments: Moments, most: float = math.inf
) -> dict[str, Any]:
    """Run chains and return the first of some lengths that is enough, or the longest, or how far most gradients go."""
    start = time.process_time()
    target = Target(fitted, coordinates, first, None, torch.tensor(True))
    for longest in ATTEMPTS:
        kernel = Patience(NUTS(), most)
        try:
            visited = run_chains(kernel, target, target.start, longest)
        except KeyboardInterrupt:
            if kernel.spent <= most:
                raise
            # the chains were still warming up
            seconds = time.process_time() - start
            return {"samples": 0, "gradients": kernel.spent, "seconds": seconds, "enough": False}
        if visited.interrupted and kernel.spent <= most:
            raise KeyboardInterrupt
        with torch.no_grad():
            chains = [target.values(chain) for chain in visited.points.transpose(0, 1)]
        there = len(visited.points)
        lengths = [num for num in LENGTHS if num <= min(there, longest)]
        for num in [*lengths, *[there] * visited.interrupted]:
            error, rhat = worst(
                {name: torch.cat([each[name][:num] for each in chains]) for name in moments}, moments, CHAINS
            )
            enough = error <= ERROR and rhat < AGREE
            if enough or num == ATTEMPTS[-1] or (visited.interrupted and num == there):
                record = {
                    "samples": num,
                    "gradients": int(visited.gradients_after[num - 1]),
                    "seconds": time.process_time() - start,
                    "error": error,
                    "rhat": rhat,
                    "divergent": int(visited.divergent.sum()),
                    "enough": enough,
                }
                print(record, flush=True)
                return record
    raise AssertionError("the longest is the last")


def from_the_prior(fitted: Fitted) -> tuple[Unconstrained, dict[str, Tensor]]:
    """Return unconstrained coordinates in units of the prior, and draws of it where chains start."""
    with torch.no_grad(), pyro.poutine.block():
        runs = [
            pyro.poutine.trace(pyro.poutine.uncondition(fitted.model)).get_trace(*fitted.args)
            for _ in range(100)
        ]
        prior = {name: torch.stack([run.nodes[name]["value"] for run in runs]) for name in fitted.latents}
        return Unconstrained(fitted, prior), {name: value[:CHAINS] for name, value in prior.items()}


def narrow(guide: Any, args: tuple[Tensor, ...]) -> None:
    """Spoil a guide that is not trained: the first site that it samples is far too narrow."""
    site = guide.plan.blocks[0].sites[0]
    centre = guide.median(*args)[site]
    guide.set_linear_(site, {}, centre.log() if site == "tau" else centre, 0.3)


def part_schools() -> dict[str, Any]:
    return refinement(eight_schools, (ERRORS, EFFECTS), schools_moments(), 0, family="auto")


def part_banana() -> dict[str, Any]:
    x = torch.tensor([1.0, 1.5], dtype=torch.float64)
    return refinement(banana, (x,), banana_moments(x), STEPS)


# -------------------------------------------------------------------------------------------------- prediction and LOO
def grouped(num_groups: int, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", num_groups, dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("data", 5, dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def part_groups() -> dict[str, Any]:
    """Coverage of 90 % intervals for the values of groups never seen, over 200 simulated data sets."""
    num, new = 12, 5
    pyro.set_rng_seed(0)
    example = torch.randn(num, 5, dtype=torch.float64)
    guide = auto_faithful_guide(grouped, num, example, pool="deepset")
    compilation = InferenceCompilation(
        grouped, guide, torch.optim.Adam(guide.parameters(), lr=2e-3), batch_size=100
    )
    start = time.process_time()
    while time.process_time() - start < 60:
        compilation.step(num, example)
    covered, total, sets = 0, 0, []
    for seed in range(200):
        pyro.set_rng_seed(1000 + seed)
        mu, tau = 3 * torch.randn(()), 2 * torch.randn(()).abs()
        theta = mu + tau * torch.randn(num + new, 1)
        y = (theta + torch.randn(num + new, 5)).double()
        posterior = sample_posterior(grouped, guide, num, y[:num], num_draws=1000, seed=seed, progress=False)
        posterior = posterior.reweighted(1000, seed=seed, progress=False)
        predicted = posterior.predict(
            num + new, torch.zeros(num + new, 5).double(), seed=seed, progress=False
        )["y"]
        low, high = torch.quantile(predicted[:, num:, 0], torch.tensor([0.05, 0.95]).double(), dim=0)
        inside = (y[num:, 0] >= low) & (y[num:, 0] <= high)
        covered, total = covered + int(inside.sum()), total + new
        sets.append(int(inside.sum()) / new)
    values = torch.tensor(sets)
    return {
        "covered": covered,
        "total": total,
        "coverage": covered / total,
        "se": float(values.std() / 200**0.5),
    }


def part_schools_loo() -> dict[str, Any]:
    """LOO of eight schools by a trained guide against exact ratios of evidences."""
    pyro.set_rng_seed(0)
    guide = auto_faithful_guide(eight_schools, ERRORS, EFFECTS)
    start = time.process_time()
    fit_to(eight_schools, guide, (ERRORS, EFFECTS), STEPS)
    trained = time.process_time() - start
    posterior = sample_posterior(
        eight_schools, guide, ERRORS, EFFECTS, num_draws=4000, seed=0, progress=False
    )
    loo, exact = posterior.loo(seed=0, progress=False), schools_loo()
    return {
        "train_seconds": trained,
        "khat": float(posterior.khat),
        "elpd": loo.elpd,
        "exact": float(exact.sum()),
        "worst": float((loo.pointwise - exact).abs().max()),
        "loo_khat": float(loo.khat.max()),
    }


def fit_to(model: Any, guide: Any, args: tuple[Tensor, ...], steps: int) -> None:
    """Train on one data set by the ELBO, the rate falling to a hundredth."""
    loss = pyro.infer.Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True).differentiable_loss
    optimizer = torch.optim.Adam(guide.parameters(), lr=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.01 ** max(0.0, 2 * step / steps - 1)
        optimizer.zero_grad()
        loss(model, guide, *args).backward()
        optimizer.step()


def radon_loo(county: Tensor, floor: Tensor, y: Tensor, num: int) -> Tensor:
    """Return exact log p(y_n | y_-n): normal given the two scales, which are summed over a grid."""
    indicator = torch.nn.functional.one_hot(county, num).to(y)
    fixed = 100.0 * (1 + torch.outer(floor, floor))  # prior variances of mu_alpha and beta
    groups = indicator @ indicator.T
    alpha = torch.linspace(0.02, 0.8, 24, dtype=y.dtype)
    noise = torch.linspace(0.62, 0.84, 20, dtype=y.dtype)
    whole, without = [], []
    for a in alpha:
        for s in noise:
            cov = fixed + a.square() * groups + s.square() * torch.eye(len(y), dtype=y.dtype)
            factor = torch.linalg.cholesky(cov)
            inverse = torch.cholesky_inverse(factor)
            solved = inverse @ y
            log_p = -0.5 * y @ solved - factor.diagonal().log().sum() - 0.5 * len(y) * math.log(2 * math.pi)
            log_p = log_p + dist.HalfNormal(1.0).log_prob(a) + dist.HalfNormal(1.0).log_prob(s)
            variance = 1 / inverse.diagonal()
            own = dist.Normal(y - solved * variance, variance.sqrt()).log_prob(y)
            whole.append(log_p)
            without.append(log_p - own)
    return torch.logsumexp(torch.stack(whole), 0) - torch.logsumexp(torch.stack(without), 0)


def part_radon(folder: Path) -> dict[str, Any]:
    """LOO of the radon model by weighted draws, against exact values of all houses; and the time of 10,000 draws."""
    args, guide, record = radon_guide(folder)
    clock, start = time.perf_counter(), time.process_time()
    sample_posterior(radon, guide, *args, num_draws=10_000, seed=0, progress=False)
    record |= {"draws_seconds": time.process_time() - start, "draws_wall": time.perf_counter() - clock}
    many = sample_posterior(radon, guide, *args, num_draws=NUM_WEIGHTED, seed=0, progress=False)
    return record | {"khat": float(many.khat), "ess": float(many.ess)} | radon_figures(many, args)


def part_radon_refined(folder: Path) -> dict[str, Any]:
    """The same by chains that start from the guide's draws, whatever its k-hat."""
    args, guide, record = radon_guide(folder)
    start = time.process_time()
    few = sample_posterior(radon, guide, *args, num_draws=2000, seed=1, progress=False)
    refined = few.refined(khat_above=None, num_chains=8, num_samples=NUM_REFINED, seed=1, progress=False)
    assert refined.chains is not None
    record |= {"refine_seconds": time.process_time() - start, "rhat": refined.chains.worst_rhat}
    return record | radon_figures(refined, args)


def radon_guide(folder: Path) -> tuple[tuple[Any, ...], Any, dict[str, Any]]:
    """Return the data, a trained guide, and how large the data are and how long it took."""
    posterior_db = find(["radon"])[0]
    args = posterior_db.arguments(read_reference(folder, posterior_db.name).data)
    pyro.set_rng_seed(0)
    guide = auto_faithful_guide(radon, *args)
    start = time.process_time()
    fit_to(radon, guide, args, STEPS)
    return args, guide, {"houses": len(args[2]), "train_seconds": time.process_time() - start}


def radon_figures(posterior: Posterior, args: tuple[Any, ...]) -> dict[str, Any]:
    """Compare LOO with the exact value of each house."""
    loo, exact = posterior.loo(seed=0, progress=False), radon_loo(*args)
    off = (loo.pointwise - exact).abs()
    return {
        "elpd": loo.elpd,
        "exact": float(exact.sum()),
        "worst": float(off.max()),
        "beyond": int((off > CLOSE).sum()),
        "loo_khat": float(loo.khat.max()),
    }


def part_stream() -> dict[str, Any]:
    """Log-likelihoods of a million data at a thousand draws, in chunks, and the memory of the process."""
    num = 1_000_000

    def line(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("a", dist.Normal(0.0, 1e-3))
        pyro.sample("b", dist.Normal(1.0, 1e-3))

    x = torch.randn(num, dtype=torch.float32)
    y = x + torch.randn(num)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.process_time()
    posterior = sample_posterior(line, guide, x, y, num_draws=1000, seed=0, progress=False)
    total, draws = torch.zeros(()), 0
    for part in posterior.log_likelihood_chunks():
        total, draws = total + part["y"].double().sum(), draws + len(part["y"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "draws": draws,
        "mean": float(total) / draws / num,
        "peak_gib": peak,
        "before_gib": before,
        "seconds": time.process_time() - start,
    }


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "stream": part_stream,  # first: the peak of memory is that of the process
    "schools": part_schools,
    "banana": part_banana,
    "schools_loo": part_schools_loo,
    "radon": part_radon,
    "radon_refined": part_radon_refined,
    "groups": part_groups,
}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_places(parse, "workflow")
    parse.add_argument(
        "--data", type=Path, help=f"the folder of posteriors (or the variable {DATA_VARIABLE})"
    )
    parse.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to do")
    args = parse.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    results = Results(args.results)
    for name in args.only:
        if name in results:
            continue
        options = {}
        if name.startswith("radon"):
            try:
                options = {"folder": data_folder(args.data)}
            except (SystemExit, FileNotFoundError, ValueError) as error:
                print(f"{name} is left out: {error}")
                continue
        record = PARTS[name](**options)
        results.append(name, record)
        print(name, record, flush=True)


if __name__ == "__main__":
    main()
