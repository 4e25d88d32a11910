r"""Check that each Pyro model is the posterior its reference draws and evidence belong to.

    python -m studies.real_models.check --data DATA                       # the table of all models, a few minutes
    python -m studies.real_models.check --data DATA --models eight_schools
    python -m studies.real_models.check --data DATA --out docs/results/real_models_checks.md

The checks, all with the log density of the Pyro model over all latents in unconstrained coordinates :math:`u`:

- *evidence*, where the file has one: importance sampling from a Student-t fitted to the reference draws. Effects that
  are independent given the other latents are drawn given those from a Student-t at the mode of their conditional
  density, a path that is normal given its scales from that normal, so that the weights keep a small variance in 237
  dimensions. The estimate must agree within four standard errors (its own and the file's), with a k-hat below 0.7.
- *stationarity*, everywhere: for the score :math:`s = \nabla \log p(u)` the draws must satisfy :math:`E[s_i] = 0` and
  :math:`E[(u_i - c_i) s_i] = -1` for every coordinate, and for every principal axis of the curvature at the mean of
  the draws (strong correlations would otherwise hide errors). Standard errors account for autocorrelation [1].
  Reported is the largest number of standard errors. It is the only check where there is no evidence; the limit is
  four standard errors there.

- *means*, for the Inference Gym, whose reference has moments and no draws: 64 chains of HMC on the Pyro model's
  density; means over chains against the published (or exact) ones, in standard errors of both, the limit being five:
  there are up to 501 scalars. It sees differences of about a tenth of a posterior standard deviation.

Where few joint draws are stored (50 for the bird counts, 100 for radon and the item response), the errors of the second
identity are not normal; it is no condition where the evidence agrees.

References:
    [1] Geyer (1992), Practical Markov chain Monte Carlo, Statistical Science 7 (the initial positive sequence).
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyro_graphflows.infer.psis import psis_khat
from studies.real_models.hmc import chains
from studies.real_models.log_joint import LogJoint
from studies.real_models.models import find
from studies.real_models.others import concentrations
from studies.real_models.posterior import Posterior, Reference, data_folder, read_reference

BOUND = 4.0  # standard errors
MEANS_BOUND = 5.0
CHAINS, ITERATIONS, WARM_UP = 64, 60, 60
PARTS = 10  # of the draws, whose standard deviations tell how well that of all is known
OPEN = 0.05  # standard error of a standard deviation, relative to it, above which it is listed
ENOUGH = 1000  # draws: of fewer no standard deviation is known that well
LARGEST = 20  # draws, or a hundredth of them, from which the index of a tail is estimated


@dataclass(frozen=True)
class Check:
    """The outcome for one model.

    Attributes:
        name: The model.
        coordinates: The number of scalars.
        draws: How many joint reference draws were used.
        score: The largest number of standard errors by which a mean score is off zero.
        moment: The same for the second identity.
        means: The largest number of standard errors by which a mean is off the reference's.
        evidence: The estimate of the log evidence, if there is one to compare with.
        error: Its standard error.
        k_hat: The Pareto shape of its weights.
        expected: The log evidence of the file.
        expected_error: Its standard error.
    """

    name: str
    coordinates: int
    draws: int
    score: float | None
    moment: float | None
    means: float | None
    evidence: float | None
    error: float | None
    k_hat: float | None
    expected: float | None
    expected_error: float | None

    @property
    def off(self) -> float | None:
        """By how many standard errors the estimate is off the file's evidence."""
        if self.evidence is None or self.expected is None:
            return None
        return (self.evidence - self.expected) / math.hypot(self.error or 0.0, self.expected_error or 0.0)

    @property
    def passed(self) -> bool:
        """Whether the model is right as far as these checks can see."""
        known = self.off is not None and self.k_hat is not None
        if (
            self.off is not None
            and self.k_hat is not None
            and not (abs(self.off) < BOUND and self.k_hat < 0.7)
        ):
            return False
        if self.means is not None:
            return self.means < MEANS_BOUND
        if self.score is None or self.moment is None:
            return known
        return self.score < BOUND and (known or self.moment < BOUND)


def autocorrelation_time(x: Tensor) -> Tensor:
    """Return the integrated autocorrelation time of each column, at least 1, by the initial positive sequence."""
    n = len(x)
    x = x - x.mean(0)
    spectrum = torch.fft.rfft(x, n=2 * n, dim=0)
    correlation = torch.fft.irfft(spectrum.abs() ** 2, n=2 * n, dim=0)[:n]
    correlation = correlation / correlation[0]
    pairs = correlation[: n // 2 * 2].reshape(n // 2, 2, -1).sum(1)
    positive = (pairs > 0).to(x.dtype).cumprod(0)
    return (2 * (pairs * positive).sum(0) - 1).clamp(min=1.0)


def standard_errors_off(x: Tensor, expected: float) -> Tensor:
    """Return by how many standard errors each column's mean is off its expected value."""
    error = x.std(0) * (autocorrelation_time(x) / len(x)).sqrt()
    return (x.mean(0) - expected).abs() / error


def stationarity(log_joint: LogJoint, u: Tensor) -> tuple[float, float]:
    """Return the largest numbers of standard errors by which the two identities are missed."""
    score = log_joint.score(u)
    centred = u - u.mean(0)
    scale = u.std(0)
    hessian = torch.autograd.functional.hessian(lambda point: log_joint(point.unsqueeze(0)).sum(), u.mean(0))
    _, axes = torch.linalg.eigh(hessian * scale * scale.unsqueeze(-1))
    sets = [(centred, score), (centred / scale @ axes, score * scale @ axes)]
    first = max(standard_errors_off(s, 0.0).max().item() for _, s in sets)
    second = max(standard_errors_off(z * s, -1.0).max().item() for z, s in sets)
    return first, second


def conditional_modes(
    log_joint: LogJoint, u: Tensor, local: Tensor, steps: int = 50
) -> tuple[Tensor, Tensor]:
    """Return modes and standard deviations of the local coordinates given the others, by Newton's method.

    The local coordinates are independent given the others, with log-concave densities: the Hessian is diagonal.

    Args:
        log_joint: The log density.
        u: Points; their local coordinates are where the search starts.
        local: Which coordinates are local, booleans.
        steps: The number of steps.
    """
    z = u[:, local].clone()
    curvature = torch.ones_like(z)
    for _ in range(steps + 1):
        z = z.detach().requires_grad_()
        point = u.clone()
        point[:, local] = z
        (slope,) = torch.autograd.grad(log_joint(point).sum(), z, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), z)
        curvature = -bend.detach()
        move = slope.detach() / curvature
        reach = 2 / curvature.sqrt()  # two local standard deviations
        z = (z + move.clamp(-reach, reach)).detach()
    return z, curvature.rsqrt()


def conditional_normal(log_joint: LogJoint, u: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the Cholesky factor of the precision of local coordinates that are normal given the others.

    One Newton step is exact: the log density is quadratic in them.
    """
    z = u[:, local].clone().requires_grad_()
    point = u.clone()
    point[:, local] = z
    (slope,) = torch.autograd.grad(log_joint(point).sum(), z, create_graph=True)
    rows = [torch.autograd.grad(slope[:, j].sum(), z, retain_graph=True)[0] for j in range(z.shape[1])]
    factor = torch.linalg.cholesky(-torch.stack(rows, 1))
    move = torch.cholesky_solve(slope.detach().unsqueeze(-1), factor).squeeze(-1)
    return z.detach() + move, factor


def log_weights(
    posterior: Posterior, log_joint: LogJoint, u: Tensor, rows: Tensor, num: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return points drawn around the posterior and their log importance weights.

    Args:
        posterior: The posterior.
        log_joint: Its log density.
        u: Draws of it, joint.
        rows: The same for the non-local coordinates, of which there can be more rows.
        num: The number of points.
        chunk: How many to evaluate at once.
    """
    local = torch.zeros(log_joint.size, dtype=torch.bool)
    for name in log_joint.sites:
        if is_local(posterior, name):
            local[log_joint.columns[name]] = True
    size = rows.shape[1]
    # the t has the draws' covariance; it is wider where they are of chains that mix slowly over small scales
    df = 2.5 if posterior.coupled else 5.0
    shrink = 2.5 if posterior.coupled else math.sqrt((df - 2) / df)
    scale = shrink * torch.linalg.cholesky(torch.cov(rows.T).reshape(size, size))
    log_det = scale.diagonal().log().sum()
    points, weights = [], []
    for start in range(0, num, chunk):
        count = min(chunk, num - start)
        noise = torch.randn(count, size) * (df / torch.distributions.Chi2(df).sample((count, 1))).sqrt()
        point = u.mean(0).expand(count, -1).clone()
        point[:, ~local] = rows.mean(0) + noise @ scale.T
        log_q = (
            student_log_constant(df, size)
            - log_det
            - (df + size) / 2 * torch.log1p(noise.square().sum(-1) / df)
        )
        if posterior.coupled:
            mean, factor = conditional_normal(log_joint, point, local)
            normal = torch.distributions.MultivariateNormal(
                mean, covariance_matrix=torch.cholesky_inverse(factor)
            )
            point[:, local] = normal.sample()
            log_q = log_q + normal.log_prob(point[:, local])
        elif posterior.local:
            conditional = torch.distributions.StudentT(LOCAL_DF, *conditional_modes(log_joint, point, local))
            point[:, local] = conditional.sample()
            log_q = log_q + conditional.log_prob(point[:, local]).sum(-1)
        with torch.no_grad():
            weights.append(log_joint(point) - log_q)
        points.append(point)
    return torch.cat(points), torch.cat(weights)


def log_evidence(weights: Tensor) -> tuple[float, float, float]:
    """Return the log evidence from log importance weights, its standard error and k-hat."""
    log_mean = torch.logsumexp(weights, 0) - math.log(len(weights))
    error = (weights - log_mean).exp().std() / math.sqrt(len(weights))
    return log_mean.item(), error.item(), psis_khat(weights).item()


def is_local(posterior: Posterior, site: str) -> bool:
    """Say whether a site is drawn given the others: those named, and the steps of a coupled path."""
    return site in posterior.local or bool(posterior.coupled and site.startswith(f"{posterior.coupled}_"))


LOCAL_DF = 30.0  # nearly normal, with tails that the conditional densities of counts do not outgrow


def student_log_constant(df: float, dim: int) -> float:
    """Return the log normalising constant of the standard multivariate Student-t."""
    return math.lgamma((df + dim) / 2) - math.lgamma(df / 2) - dim / 2 * math.log(df * math.pi)


def non_local_rows(posterior: Posterior, folder: Path, log_joint: LogJoint, u: Tensor) -> Tensor:
    """Return draws of the coordinates that are not local, all that the file has."""
    if not posterior.local:
        return u
    reference = read_reference(folder, posterior.name, joint=False)
    parts = []
    for name, (transform, _, _) in log_joint.sites.items():
        if name not in posterior.local:
            value = reference.draws[name]
            parts.append(transform.inv(value).reshape(len(value), -1))
    return torch.cat(parts, -1)


def check(posterior: Posterior, reference: Reference, folder: Path, num: int = 20_000) -> Check:
    """Run the checks on one model.

    Args:
        posterior: The posterior.
        reference: Its file's contents.
        folder: The folder of the files.
        num: The number of importance samples; a fifth of it where there are local effects.
    """
    if posterior.gym:
        return check_gym(posterior, reference, folder, num)
    args = posterior.arguments(reference.data)
    sites = posterior.sites(reference.draws)
    log_joint = LogJoint(posterior.model, args, posterior.plates, {name: v[0] for name, v in sites.items()})
    u = log_joint.unconstrain(sites)
    score, moment = stationarity(log_joint, u)
    evidence = error = k_hat = None
    if reference.log_evidence is not None:
        torch.manual_seed(0)
        rows = non_local_rows(posterior, folder, log_joint, u)
        num = num // 5 if posterior.local else num
        evidence, error, k_hat = log_evidence(log_weights(posterior, log_joint, u, rows, num, chunk=200)[1])
    return Check(
        posterior.name,
        log_joint.size,
        len(u),
        score,
        moment,
        None,
        evidence,
        error,
        k_hat,
        reference.log_evidence,
        reference.log_evidence_error,
    )


def check_gym(
    posterior: Posterior,
    reference: Reference,
    folder: Path,
    num: int,
    num_chains: int = CHAINS,
    iterations: int = ITERATIONS,
) -> Check:
    """Run the checks on a model whose reference has moments and no draws.

    Where a path is normal given the other sites, means come from importance weights: chains mix slowly over its scales.
    """
    torch.manual_seed(0)
    sites = posterior.sites(reference.mean)
    log_joint = LogJoint(posterior.model, posterior.arguments(reference.data), posterior.plates, sites)
    centre = log_joint.unconstrain({name: value.unsqueeze(0) for name, value in sites.items()})[0]
    draws = chains(log_joint, centre, num_chains, iterations, WARM_UP)
    u, by_chain = draws.flatten(0, 1), torch.full((num_chains,), 1 / num_chains)
    evidence = error_of_it = k_hat = None
    if reference.log_evidence is not None:
        rest = torch.ones(log_joint.size, dtype=torch.bool)
        for name in log_joint.sites:
            if is_local(posterior, name):
                rest[log_joint.columns[name]] = False
        points, weights = log_weights(posterior, log_joint, u, u[:, rest], num, chunk=200)
        evidence, error_of_it, k_hat = log_evidence(weights)
    values, _ = log_joint.constrain(points if posterior.coupled else u)
    parameters = posterior.parameters(values)
    off = []
    for name, mean in reference.mean.items():
        x = parameters[name]
        if posterior.coupled:
            w, x = torch.softmax(weights, 0), x.reshape(len(x), -1)
        else:
            w, x = by_chain, x.reshape(iterations, num_chains, -1).mean(0)
        estimate = w @ x
        spread = (w.square() @ (x - estimate).square()) * (len(w) / (len(w) - 1))
        error = (spread + reference.mean_error[name].reshape(-1) ** 2).sqrt()
        off.append((estimate - mean.reshape(-1)).abs() / error)
    return Check(
        posterior.name,
        log_joint.size,
        len(draws) * num_chains,
        None,
        None,
        torch.cat(off).max().item(),
        evidence,
        error_of_it,
        k_hat,
        reference.log_evidence,
        reference.log_evidence_error,
    )


def step_error(reference: Reference, step: float) -> float:
    """Return the largest difference in the concentrations of the compartment model from a step of 0.025, relatively."""
    draws = reference.draws
    times = reference.data["times"].tolist()
    dose, volume = float(reference.data["D"]), float(reference.data["V"])
    coarse, fine = (
        concentrations(draws["k_a"], draws["K_m"], draws["V_m"], dose, volume, times, h)
        for h in (step, 0.025)
    )
    return (coarse / fine - 1).abs().max().item()


def table(checks: list[Check]) -> str:
    """Return the outcomes as a Markdown table."""
    lines = [
        "| model | scalars | draws | score (s.e.) | moment (s.e.) | means (s.e.) | log evidence, file "
        "| by the Pyro model | off (s.e.) | k-hat | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in checks:
        if c.off is None:
            evidence = "- | - | - | -"
        else:
            evidence = f"{c.expected:.4f} | {c.evidence:.4f} ± {c.error:.4f} | {c.off:+.1f} | {c.k_hat:.2f}"
        off = " | ".join("-" if x is None else f"{x:.2f}" for x in (c.score, c.moment, c.means))
        verdict = "right" if c.passed else "**wrong**"
        lines.append(f"| {c.name} | {c.coordinates} | {c.draws} | {off} | {evidence} | {verdict} |")
    return "\n".join(lines) + "\n"


PAGE = """# The models of the study on real data, checked

Made by `python -m studies.real_models.check`. *Score* and *moment*: the largest number of standard errors by which the
reference draws miss E[s] = 0 and E[(u - c) s] = -1, where s is the score of the Pyro model in unconstrained space, over
all coordinates and all principal axes of the curvature. *Means*: the same for posterior means by HMC on the Pyro model
against the reference's, where that has no draws (*draws* are those of HMC then). *By the Pyro model*: the log evidence
by importance sampling with the Pyro model's log joint density; *off*: its difference from the file's, in standard
errors.

"""


SPREADS = """
## Standard deviations that are not well known

Of parameters with 1,000 reference draws those whose standard deviations differ so much between ten parts of the draws,
in order, that the standard error of that of all is above five percent of it; and Hill's estimate of the power by which
the probability of values beyond t falls. Up to two there is no variance at all: the half-Cauchy priors of `K_m` and
`V_m`, and a likelihood that knows only their ratio where both are large, give densities that fall as the third power.
What a guide's standard deviation is of the reference's says little there; shares of draws below the reference's
quantiles do.

"""


def spreads(references: dict[str, Reference]) -> str:
    """Return a table of the parameters whose standard deviations the reference's draws leave open."""
    lines = [
        "| model | parameter | draws | sd | sds of ten parts, over it | tail index |",
        "|---|---|---|---|---|---|",
    ]
    for name, reference in references.items():
        for parameter, draws in reference.draws.items():
            x = draws.reshape(len(draws), -1)
            if len(x) < ENOUGH:
                continue
            ratios = torch.stack([part.std(0) for part in x.chunk(PARTS)]) / x.std(0)
            for i in (ratios.std(0) / PARTS**0.5 > OPEN).nonzero().flatten().tolist():
                label = parameter if x.shape[1] == 1 else f"{parameter}[{i}]"
                lowest, highest = float(ratios[:, i].min()), float(ratios[:, i].max())
                lines.append(
                    f"| {name} | {label} | {len(x)} | {float(x[:, i].std()):.4g} | {lowest:.2f}–{highest:.2f} "
                    f"| {tail_index(x[:, i]):.1f} |"
                )
    return "\n".join(lines) + "\n"


def tail_index(x: Tensor) -> float:
    """Return Hill's estimate of the power by which probabilities of large absolute values fall; infinity is none."""
    largest = x.abs().sort(descending=True).values[: max(LARGEST, len(x) // 100)]
    return 1 / float((largest[:-1] / largest[-1]).log().mean())


def main() -> None:
    """Check models and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of the posteriors' files")
    parser.add_argument("--models", nargs="*", default=[], help="parts of names, or kinds; all by default")
    parser.add_argument("--out", type=Path, help="write the table there as well")
    flags = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    folder = data_folder(flags.data)
    checks, references = [], {}
    for posterior in find(flags.models):
        reference = read_reference(folder, posterior.name)
        references[posterior.name] = read_reference(folder, posterior.name, joint=False)
        outcome = check(posterior, reference, folder)
        print(table([outcome]).splitlines()[-1], flush=True)
        checks.append(outcome)
    if flags.out:
        flags.out.write_text(PAGE + table(checks) + SPREADS + spreads(references))
    wrong = [c.name for c in checks if not c.passed]
    if wrong:
        raise SystemExit(f"Expected every model to pass; these did not: {', '.join(wrong)}.")


if __name__ == "__main__":
    main()
