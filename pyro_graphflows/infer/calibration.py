r"""Simulation-based calibration: is a guide's spread that of the posterior, on average over the model's own data?

Draw :math:`(z^*, x^*)` from the joint density, then :math:`L` draws from :math:`q(z \mid x^*)`. If :math:`q` is the
posterior, :math:`z^*` is one more draw like them, so its rank among them is uniform on :math:`0, \dots, L`. Ranks
heaped in the middle tell of a guide that is too wide, at the ends of one too narrow, at one end of a shift.

:func:`calibration_report` looks at the same simulations in four ways: ranks and coverage of each number, ranks of the
distance to a random point for all numbers together, and how far means are off and how much was learned.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.coverage import Coverage, coverage
from pyro_graphflows.infer.particles import (
    OUTER_PARTICLES,
    Program,
    density_sites,
    evaluation_mode,
    particle_plate,
    require_independent_particles,
)
from pyro_graphflows.infer.simulations import JointLayout, joint_layout, run_guide, sample_joint
from pyro_graphflows.infer.tables import Table

__all__ = ["CalibrationReport", "calibration_report", "sbc_ranks", "sbc_uniformity", "tarp_ranks"]

_NUMBERS_AT_ONCE = 2**21  # draws of latent numbers held by one chunk of simulations
_PRIOR_DRAWS = 200  # that distances start from, and their units
_LEAST_P = 1e-3  # of the smallest p-value times their number


class _Chunk(NamedTuple):
    """Simulations and draws of the guide for each: by site (S, *shape) and (L, S, *shape)."""

    truth: dict[str, Tensor]
    draws: dict[str, Tensor]


def sbc_ranks(
    model: Program,
    guide: Program,
    *args: Any,
    num_simulations: int = 1000,
    num_draws: int = 99,
    chunk_size: int = 1000,
    observed: Iterable[str] | None = None,
    max_plate_nesting: int | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Rank simulated latent values among the guide's draws given the simulated data.

    The guide is called as in inference compilation: with the arguments of the model and ``observations={site:
    value}``. Ties, as discrete latents have, are broken at random. Model and guide run in evaluation mode, without
    gradients, inside plates of simulations and of draws.

    References:
        [1] Talts, Betancourt, Simpson, Vehtari and Gelman (2018), Validating Bayesian inference algorithms with
        simulation-based calibration, Algorithm 1.

    Args:
        model: A Pyro model.
        guide: A guide that takes ``observations=``.
        *args: Positional arguments of both.
        num_simulations: The number of simulated data sets.
        num_draws: The number of draws from the guide for each of them.
        chunk_size: How many simulations to run at once.
        observed: The observed sites, if the call does not tell (see :class:`InferenceCompilation`).
        max_plate_nesting: How many dimensions the plates take, where it is known better than by running both once.
        **kwargs: Keyword arguments of both.

    Returns:
        For each site of the guide the ranks of each of its elements, from 0 to ``num_draws``, in a tensor of integers
        of shape ``(num_simulations, *plates, *event)``.

    Raises:
        GraphflowsError: If a number is not positive, or ``observed`` names a site that the model lacks.
        UnsupportedModelError: If samples of the model are not samples of its joint density, the guide has other sites
            than the model's latent ones, or all its draws are the same.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x=None, observations=None):  # the exact posterior
        ...     pyro.sample("z", dist.Normal(observations["x"] / 2, 0.5**0.5))
        >>> ranks = sbc_ranks(model, guide, num_simulations=1000)["z"]
        >>> bool(sbc_uniformity(ranks, num_draws=99) > 1e-4)
        True
    """
    parts: dict[str, list[Tensor]] = {}
    with evaluation_mode(model, guide), torch.no_grad(), poutine.block():
        _require_positive(num_simulations, num_draws, chunk_size)
        layout = joint_layout(model, guide, args, kwargs, observed, max_plate_nesting)
        for chunk in _simulated(
            (model, guide), (args, kwargs), layout, (num_simulations, num_draws, chunk_size)
        ):
            for name, ranks in _ranks_of(chunk).items():
                parts.setdefault(name, []).append(ranks)
    return {name: torch.cat(part) for name, part in parts.items()}


def sbc_uniformity(ranks: Tensor, num_draws: int, *, num_bins: int | None = None) -> Tensor:
    """Return p-values of the hypothesis that ranks are uniform, by a chi-squared test.

    Args:
        ranks: Ranks from 0 to ``num_draws``, simulations along the first dimension.
        num_draws: The number of draws each was ranked among.
        num_bins: The number of bins of ranks; by default at most 20, with at least 5 expected ranks in each.

    Returns:
        A p-value for each element, of the shape of ``ranks`` without the first dimension. Of many, take the
        smallest times their number (Bonferroni).

    Raises:
        GraphflowsError: If there are fewer than two bins, or more than ranks.
    """
    num_simulations = ranks.shape[0]
    if num_bins is None:
        num_bins = min(20, num_draws + 1, num_simulations // 5)
    if not 2 <= num_bins <= num_draws + 1:
        raise GraphflowsError(
            f"Expected between 2 and num_draws + 1 = {num_draws + 1} bins; got {num_bins}. More simulations are needed "
            "if num_bins was not given."
        )
    flat = ranks.reshape(num_simulations, -1).long()
    # equal bins as far as num_draws + 1 can be divided: bin of rank r, and how many ranks each bin holds
    bins = torch.arange(num_draws + 1) * num_bins // (num_draws + 1)
    expected = torch.bincount(bins, minlength=num_bins).double() * num_simulations / (num_draws + 1)
    counts = torch.zeros(num_bins, flat.shape[1], dtype=torch.double)
    counts.scatter_add_(0, bins[flat.cpu()], torch.ones(flat.shape, dtype=torch.double))
    statistic = ((counts - expected[:, None]) ** 2 / expected[:, None]).sum(0)
    # the survival function of chi-squared is a regularised incomplete gamma function
    degrees = torch.tensor((num_bins - 1) / 2, dtype=torch.double)
    return torch.special.gammaincc(degrees, statistic / 2).reshape(ranks.shape[1:])


def tarp_ranks(truth: Tensor, draws: Tensor, prior: Tensor | None = None) -> Tensor:
    r"""Rank the true values by their distance to random points, among the draws (tests of accuracy with random points).

    Of each simulation the point is the truth of another one, so a draw of the prior. If the guide is the posterior, the
    truth is as likely nearer to it than a draw as not, and the ranks are uniform from 0 to the number of draws, which
    :func:`sbc_uniformity` tests. It looks at all numbers together: dependence between them counts, which ranks of
    single numbers do not see. Distances are in units of the standard deviations of the truths of the other
    simulations: with its own truth among them no truth would be like a draw.

    References:
        [1] Lemos, Coogan, Hezaveh and Perreault-Levasseur (2023), Sampling-based accuracy testing of posterior
        estimators for general inference, ICML.

    Args:
        truth: The true values, ``(simulations, numbers)``.
        draws: Draws of the guide for each, ``(draws, simulations, numbers)``.
        prior: Draws of the prior, ``(any number, numbers)``, that points and units are taken from in place of the
            truths, which may be too few for it.

    Returns:
        Ranks, ``(simulations,)``.

    Raises:
        GraphflowsError: If there are fewer than two simulations, or the shapes differ.
    """
    if (
        truth.dim() != 2
        or draws.dim() != 3
        or draws.shape[1:] != truth.shape
        or (prior is None and len(truth) < 2)
    ):
        raise GraphflowsError(
            "Expected truths (simulations, numbers) of two or more simulations and draws (draws, simulations, "
            f"numbers); got the shapes {tuple(truth.shape)} and {tuple(draws.shape)}."
        )
    if prior is None:
        points, scale = truth.roll(1, 0), _spread_of_others(truth)
    else:
        points, scale = prior[torch.arange(len(truth), device=prior.device) % len(prior)], prior.std(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    distance = ((truth - points) / scale).norm(dim=-1)
    return _ranks(distance, ((draws - points) / scale).norm(dim=-1))


def _spread_of_others(values: Tensor) -> Tensor:
    """Return for each row the standard deviations of the other rows; zero where these are fewer than two."""
    num = len(values)
    if num < 3:
        return torch.zeros_like(values)
    squares = (values - values.mean(0)).square()
    variance = (squares.sum(0) - squares * num / (num - 1)) / (num - 2)
    return variance.clamp(min=0.0).sqrt()


@dataclass(frozen=True, eq=False, repr=False)
class CalibrationReport:
    """How well a guide is calibrated on data that the model simulates; made by :func:`calibration_report`.

    Attributes:
        ranks: By site the ranks of the true values, ``(simulations, *shape)``.
        num_draws: The number of draws each is ranked among.
        joint_ranks: Ranks by :func:`tarp_ranks` of all real numbers together; ``None`` if there are none.
        z_scores: By site (mean of the draws minus truth) / standard deviation of the draws, ``(simulations, *shape)``.
        contraction: By site one minus the variance of the draws over that of the prior, ``(simulations, *shape)``: 0
            where the data said nothing, near 1 where they decided.
    """

    ranks: dict[str, Tensor]
    num_draws: int
    joint_ranks: Tensor | None
    z_scores: dict[str, Tensor]
    contraction: dict[str, Tensor]

    @property
    def num_simulations(self) -> int:
        """The number of simulated data sets."""
        return len(next(iter(self.ranks.values())))

    @property
    def p_values(self) -> dict[str, Tensor]:
        """By site the p-values of uniform ranks, of its shape; see :func:`sbc_uniformity`."""
        return {name: sbc_uniformity(ranks, self.num_draws) for name, ranks in self.ranks.items()}

    @property
    def joint_p_value(self) -> float | None:
        """The p-value of uniform ranks by distance."""
        if self.joint_ranks is None:
            return None
        return sbc_uniformity(self.joint_ranks, self.num_draws).item()

    def coverage(self, site: str, *, num_levels: int = 20) -> Coverage:
        """Return how often central intervals held the true value of a site; see :func:`coverage`.

        Raises:
            GraphflowsError: If there is no such site.
        """
        if site not in self.ranks:
            raise GraphflowsError(f"Expected a site among {sorted(self.ranks)}; got {site!r}.")
        return coverage(self.ranks[site], self.num_draws, num_levels=num_levels)

    def summary(self) -> Table:
        """Return a table with a row for each site: the worst of its elements, and the mean contraction."""
        p_values, rows = self.p_values, {}
        total = sum(value.numel() for value in p_values.values())
        for name, ranks in self.ranks.items():
            least = p_values[name].min().item()
            z, shrunk = self.z_scores[name], self.contraction[name]
            low, high = (_share_inside(ranks, self.num_draws, level) for level in (0.5, 0.9))
            rows[name] = {
                "p": min(1.0, least * p_values[name].numel()),
                "50%": low,
                "90%": high,
                "z mean": z.mean().item(),
                "z sd": z.reshape(len(z), -1).std(0).mean().item() if len(z) > 1 else float("nan"),
                "contraction": shrunk.mean().item(),
            }
        return Table("site", rows, self._verdict(total))

    def _verdict(self, total: int) -> str:
        p_values = self.p_values
        bad = [name for name, value in p_values.items() if value.min().item() * total < _LEAST_P]
        joint = self.joint_p_value
        if bad:
            advice = " ".join(f"{name}: {self._shape_of(name)}." for name in bad)
            return f"Not calibrated. {advice}"
        if joint is not None and joint < _LEAST_P:
            return (
                "Each number is calibrated by itself, and all together are not: the guide has their dependence wrong "
                f"(p = {joint:.1g})."
            )
        return f"Nothing against the guide in {self.num_simulations} simulations" + (
            "." if joint is None else f" (all together: p = {joint:.2g})."
        )

    def _shape_of(self, name: str) -> str:
        """Return what is wrong with the ranks of a site, by its worst element."""
        place = int(self.p_values[name].flatten().argmin())
        ranks = self.ranks[name].reshape(self.num_simulations, -1)[:, place].double() / self.num_draws
        error = 1 / (12 * len(ranks)) ** 0.5
        shift, spread = ranks.mean().item() - 0.5, ranks.std().item() * 12**0.5
        if abs(shift) > 5 * error and abs(shift) > abs(spread - 1) / 2:
            return "the guide's draws are too " + ("low" if shift > 0 else "high")
        return "the guide is too " + ("narrow" if spread > 1 else "wide")

    def __repr__(self) -> str:
        head = f"CalibrationReport({self.num_simulations} simulations, {self.num_draws} draws for each)"
        return f"{head}\n{self.summary()!r}"

    def plot(self, path: Any = None) -> Any:
        """Draw ranks and coverage of all sites, and z-scores against contraction.

        Args:
            path: Where to save the figure; not saved by default.

        Returns:
            The figure.
        """
        from pyro_graphflows.plotting import plot_calibration

        return plot_calibration(self, path)


def calibration_report(
    model: Program,
    guide: Program,
    *args: Any,
    num_simulations: int = 1000,
    num_draws: int = 99,
    **kwargs: Any,
) -> CalibrationReport:
    """Simulate data from the model, draw from the guide for each, and compare with the values behind the data.

    The guide is called as in :func:`sbc_ranks`. Random numbers are those of the global generators
    (``pyro.set_rng_seed``).

    References:
        [1] Talts, Betancourt, Simpson, Vehtari and Gelman (2018), Validating Bayesian inference algorithms with
        simulation-based calibration.
        [2] Schad, Betancourt and Vasishth (2021), Toward a principled Bayesian workflow in cognitive science,
        Psychological Methods: z-scores and contraction.
        [3] Lemos et al. (2023), see :func:`tarp_ranks`.

    Args:
        model: A Pyro model.
        guide: A guide that takes ``observations=``.
        *args: Positional arguments of both.
        num_simulations: The number of simulated data sets.
        num_draws: The number of draws from the guide for each of them.
        **kwargs: Keyword arguments of both.

    Raises:
        GraphflowsError: If a number is not positive.
        UnsupportedModelError: As :func:`sbc_ranks`; a prior that is improper is named.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> def model(x=None):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x=None, observations=None):  # too narrow
        ...     pyro.sample("z", dist.Normal(observations["x"] / 2, 0.4))
        >>> report = calibration_report(model, guide, num_simulations=1000)
        >>> print(report.summary().note)
        Not calibrated. z: the guide is too narrow.
    """
    ranks: dict[str, list[Tensor]] = {}
    means: dict[str, list[Tensor]] = {}
    variances: dict[str, list[Tensor]] = {}
    truths: dict[str, list[Tensor]] = {}
    joint: list[Tensor] = []
    with evaluation_mode(model, guide), torch.no_grad(), poutine.block():
        _require_positive(num_simulations, num_draws)
        layout = joint_layout(model, guide, args, kwargs)
        numbers = sum(torch.Size(layout.shapes[name]).numel() for name in layout.shapes)
        size = max(2, min(1000, _NUMBERS_AT_ONCE // (numbers * num_draws)))
        prior = _prior(model, layout, (args, kwargs), min(_PRIOR_DRAWS, max(10, _NUMBERS_AT_ONCE // numbers)))
        for chunk in _simulated((model, guide), (args, kwargs), layout, (num_simulations, num_draws, size)):
            for name, part in _ranks_of(chunk).items():
                truth, draws = chunk.truth[name].double(), chunk.draws[name].double()
                ranks.setdefault(name, []).append(part)
                truths.setdefault(name, []).append(truth)
                means.setdefault(name, []).append(draws.mean(0))
                variances.setdefault(name, []).append(draws.var(0) if num_draws > 1 else draws[0] * torch.nan)
            names = [name for name, value in chunk.truth.items() if _is_continuous(prior[name])]
            if names:
                done = sum(map(len, joint))
                columns = _columns(chunk.truth, names, 1), _columns(chunk.draws, names, 2)
                joint.append(tarp_ranks(*columns, _columns(prior, names, 1).roll(-done, 0)))
    truth_of = {name: torch.cat(part) for name, part in truths.items()}
    variance_of = {name: torch.cat(part) for name, part in variances.items()}
    z_scores = {
        name: (torch.cat(means[name]) - truth_of[name]) / variance_of[name].sqrt() for name in truth_of
    }
    contraction = {
        name: 1 - variance_of[name] / truth_of[name].var(0) if num_simulations > 1 else variance_of[name]
        for name in truth_of
    }
    return CalibrationReport(
        {name: torch.cat(part) for name, part in ranks.items()},
        num_draws,
        torch.cat(joint) if joint else None,
        z_scores,
        contraction,
    )


def _simulated(
    pair: tuple[Program, Program],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    layout: JointLayout,
    numbers: tuple[int, int, int],
) -> Iterator[_Chunk]:
    """Yield simulations of the model with draws of the guide given them, some after the other.

    Args:
        pair: The model and the guide.
        arguments: Their positional and keyword arguments.
        layout: What their runs have in common.
        numbers: Of simulations, of draws for each, and of simulations at once.
    """
    (model, guide), (args, kwargs), (num_simulations, num_draws, chunk_size) = pair, arguments, numbers
    inner, outer = -1 - layout.max_plate_nesting, -2 - layout.max_plate_nesting
    for start in range(0, num_simulations, chunk_size):
        size = min(chunk_size, num_simulations - start)
        joint = sample_joint(particle_plate(model, size, inner), args, kwargs)
        many = particle_plate(particle_plate(guide, size, inner), num_draws, outer, OUTER_PARTICLES)
        drawn = run_guide(many, joint, layout.observed, args, kwargs, replay=False)
        require_independent_particles(drawn, outer, num_draws)
        truth, draws = {}, {}
        for name, site in density_sites(drawn):
            if not site["is_observed"]:
                shape = layout.shapes[name]
                value: Any = joint.nodes[name]["value"]
                truth[name] = value.reshape(size, *shape)
                draws[name] = site["value"].reshape(num_draws, size, *shape)
        yield _Chunk(truth, draws)


def _ranks_of(chunk: _Chunk) -> dict[str, Tensor]:
    return {name: _ranks(chunk.truth[name], draws) for name, draws in chunk.draws.items()}


def _prior(
    model: Program, layout: JointLayout, arguments: tuple[tuple[Any, ...], dict[str, Any]], num: int
) -> dict[str, Tensor]:
    """Return draws of the latent sites of the model."""
    args, kwargs = arguments
    joint = sample_joint(particle_plate(model, num, -1 - layout.max_plate_nesting), args, kwargs)
    values: dict[str, Any] = {name: joint.nodes[name]["value"] for name in layout.sampled}
    return {name: value.reshape(num, *layout.shapes[name]) for name, value in values.items()}


def _columns(values: dict[str, Tensor], names: list[str], lead: int) -> Tensor:
    """Return the numbers of some sites side by side, after ``lead`` dimensions of draws."""
    return torch.cat([_rows(values[name], lead) for name in names], -1)


def _rows(value: Tensor, keep: int) -> Tensor:
    return value.double().reshape(*value.shape[:keep], -1)


def _is_continuous(value: Tensor) -> bool:
    """Return whether values are real numbers, no classes or counts."""
    return value.is_floating_point() and bool((value != value.round()).any())


def _share_inside(ranks: Tensor, num_draws: int, level: float) -> float:
    """Return the share of ranks in the middle part of that probability, as near as ranks come to it."""
    found = coverage(ranks, num_draws, num_levels=num_draws)
    near = int((found.nominal - level).abs().argmin())
    return found.observed[near].mean().item()


def _require_positive(*numbers: int) -> None:
    if min(numbers) < 1:
        raise GraphflowsError("Expected positive num_simulations, num_draws and chunk_size.")


def _ranks(truth: Tensor, draws: Tensor) -> Tensor:
    """Count the draws below the truth along the first dimension, ties decided by lot."""
    below = (draws < truth).sum(0)
    equal = (draws == truth).sum(0)
    return below + (torch.rand(equal.shape, device=equal.device) * (equal + 1)).long().clamp(max=equal)
