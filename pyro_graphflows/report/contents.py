"""What a report says: model, what each latent looks at, training, posterior, trust, calibration, predictions."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError, reason_of
from pyro_graphflows.guides import AutoFaithfulGuide
from pyro_graphflows.infer import (
    History,
    Schedule,
    TrainingData,
    calibration_report,
    fit,
    sample_posterior,
)
from pyro_graphflows.infer.checkpoints import seeded
from pyro_graphflows.plotting import (
    plot_forest,
    plot_intervals,
    plot_inverse,
    plot_khat,
    plot_learning_curves,
    plot_model_graph,
    plot_predictive,
)
from pyro_graphflows.plotting.posteriors import MOST_PANELS
from pyro_graphflows.report.advice import (
    NEARLY_EVEN,
    TRUSTED,
    Findings,
    judge_draws,
    judge_model,
    next_steps,
    unlikely,
)
from pyro_graphflows.report.page import Page, Section

__all__ = ["ReportOptions", "make_report"]

MANY_DATA = 1000  # beyond which steps take batches, where the posterior factorises over the data
MOST_ROWS = 40
MOST_PICTURES = 4  # observed sites with a picture of their own
MOST_SIMULATED, FEWEST_SIMULATIONS = 50_000, 50  # latent numbers in simulated data sets; data sets
MOST_OF_A_SITE = 20  # numbers of a site with a row for each in a forest
EXTREME = 0.01


@dataclass(frozen=True)
class ReportOptions:
    """How a report is made.

    Args:
        seconds: How long to train at most; 0 for not at all.
        family: The family of the guide's conditionals.
        num_draws: The number of draws of the posterior.
        num_simulations: The number of simulated data sets for calibration; 0 for none, and fewer than asked for, but
            not below 50, where each has many latent numbers.
        seed: The seed of all random numbers.
        progress: Whether to show bars.

    Raises:
        GraphflowsError: If a number is out of range.
    """

    seconds: float = 60.0
    family: Any = "auto"
    num_draws: int = 1000
    num_simulations: int = 500
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.seconds < 0 or self.num_simulations < 0 or self.num_draws < 10:
            raise GraphflowsError(
                "Expected seconds and num_simulations of 0 or more and at least 10 draws; got "
                f"{self.seconds}, {self.num_simulations} and {self.num_draws}."
            )


def make_report(
    model: Callable[..., Any],
    data: dict[str, Any],
    options: ReportOptions | None = None,
    *,
    title: str = "",
) -> Page:
    """Set a guide up for a model and its data, train it, and write a page about it.

    Args:
        model: A Pyro model.
        data: Its arguments by name.
        options: How long to train, and the like.
        title: What the page is called; the model's name by default.

    Returns:
        The page; ``page.save(path)`` writes it.

    Raises:
        GraphflowsError: If the model has no observed or no latent sites with these data, or cannot be compiled.
    """
    options = options or ReportOptions()
    with seeded(options.seed):
        pyro.clear_param_store()
        guide = AutoFaithfulGuide(model, family=options.family).setup(**data)
        found = Findings(guide.model_graph, guide, options.seconds, str(options.family))
        if not found.graph.observed:
            raise GraphflowsError(
                "Expected the model to have observed sites with these data; it has none. Give the data that its obs= "
                f"takes: the arrays given are {', '.join(data) or 'none'}."
            )
        sections = [
            _model_section(found),
            _guide_section(found),
            _training_section(model, data, options, found),
            _posterior_section(model, data, options, found),
            _trust_section(options, found),
            _calibration_section(model, data, options, found),
            _prediction_section(options, found),
        ]
        sections.insert(0, _advice_section(found))
    shapes = ", ".join(f"{name} {_shape(value)}" for name, value in data.items())
    name = title or getattr(model, "__name__", type(model).__name__)
    return Page(f"Report on {name}", f"Data: {shapes}.", sections)


def _plate_sizes(guide: AutoFaithfulGuide) -> dict[str, int]:
    trace: Any = guide.prototype_trace
    return {
        frame.name: frame.full_size or frame.size
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    }


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)


# ------------------------------------------------------------------------------------------------- model and guide
def _model_section(found: Findings) -> Section:
    graph = found.graph
    section = Section("The model")
    section.picture(plot_model_graph(graph), "the model's sites and what they depend on")
    by_plate: dict[str, list[str]] = {}
    for node in graph.nodes:
        for plate in graph.plates[node]:
            by_plate.setdefault(plate, []).append(str(node))
    frames = _plate_sizes(found.guide)
    for plate, nodes in by_plate.items():
        section.text(f"Plate {plate} ({frames[plate]} elements): {', '.join(nodes)}.")
    rows = {
        str(node): (
            graph.role(node),
            ", ".join(graph.plates[node]) or "–",
            graph.event_sizes[node],
            ", ".join(map(str, graph.parents(node))) or "–",
        )
        for node in graph.nodes
    }
    return section.table(("site", "role", "plates", "numbers", "depends on"), rows)


def _guide_section(found: Findings) -> Section:
    section = Section("What each latent looks at")
    section.text(
        "The guide samples the latent sites one after the other. Each looks at what its posterior depends on, given "
        "what was sampled before, and at nothing else."
    )
    section.verbatim(repr(found.guide.describe()))
    return section.picture(plot_inverse(found.guide.inverse), "the guide's factorisation")


# ------------------------------------------------------------------------------------------------------- training
def _training_section(
    model: Callable[..., Any], data: dict[str, Any], options: ReportOptions, found: Findings
) -> Section:
    section = Section("Training")
    if options.seconds == 0:
        return section.text("The guide was not trained (0 seconds were asked for).", "care")
    history = fit(
        model,
        found.guide,
        _training_data(data, found),
        loss="auto",
        schedule=Schedule(num_seconds=options.seconds),
        progress=options.progress,
        seed=options.seed,
    )
    found.history = history
    for note in history.notes:
        section.text(f"{note[0].upper()}{note[1:].rstrip('.')}.", "note")
    for name, each in {"simulations": history.simulated, "data": history}.items():
        if each is not None:
            _curve(section, name, each)
    if history.simulated is not None:
        steps, seconds = history.simulated.num_steps, _seconds(history.simulated)
        section.text(
            f"On simulations of the model: {steps} steps in {seconds:.0f} s ({history.simulated.stop_reason})."
        )
    section.text(
        f"On the data: {history.num_steps} steps in {_seconds(history):.0f} s ({history.stop_reason})."
    )
    if history.gap is not None:
        section.text(f"Distance to the posterior: {history.gap!r}.")
    return section


def _curve(section: Section, name: str, history: History) -> None:
    """Draw the losses of the epochs that led to the parameters that remain."""
    kept = range(len(history)) if history.kept is None else history.kept
    if len(kept) > 1:
        axes = plot_learning_curves({f"on {name}": [history.loss[epoch] for epoch in kept]})
        axes.set_ylabel("loss (nats per datum)")
        axes.figure.set_size_inches(5.2, 2.7)
        section.picture(axes, f"the loss on {name}")
    undone = len(history) - len(kept)
    if undone:
        section.text(
            f"Of {len(history)} epochs on {name} {undone} were undone and are not drawn: trials at other rates, and "
            "what made the loss worse.",
            "note",
        )


def _seconds(history: History) -> float:
    return history.seconds[-1] if history.seconds else 0.0


def _training_data(data: dict[str, Any], found: Findings) -> TrainingData:
    """Return all data at once, or batches where these are many and the posterior factorises over them."""
    graph = found.graph
    sizes = _plate_sizes(found.guide)
    common = set.intersection(*(set(graph.plates[node]) for node in (*graph.latent, *graph.observed)))
    size = max((sizes[plate] for plate in common), default=0)
    fixed = {name: value for name, value in data.items() if not (isinstance(value, Tensor) and value.dim())}
    rows = {name: value for name, value in data.items() if name not in fixed}
    if size > MANY_DATA and all(len(value) == size for value in rows.values()):
        return TrainingData(rows, batch_size=MANY_DATA // 4, kwargs=fixed)
    observed = sum(int(np.prod([sizes[plate] for plate in graph.plates[node]])) for node in graph.observed)
    return TrainingData(kwargs=data, full_size=max(1, observed))


# ------------------------------------------------------------------------------------------------ posterior and trust
def _posterior_section(
    model: Callable[..., Any], data: dict[str, Any], options: ReportOptions, found: Findings
) -> Section:
    section = Section("The posterior")
    found.posterior = posterior = sample_posterior(
        model, found.guide, num_draws=options.num_draws, seed=options.seed, progress=options.progress, **data
    )
    table = posterior.summary()
    columns = list(table[0])
    shown = _shown_rows(list(table.rows))
    section.table(("site", *columns), {name: tuple(table.rows[name].values()) for name in shown})
    if len(table) > len(shown):
        section.text(
            f"{len(shown)} of {len(table)} numbers are shown, the first of each site; posterior.summary() has all.",
            "note",
        )
    section.text(
        "mean to 95%: of the guide's draws; mcse: Monte Carlo error of the mean; ess, k-hat: of importance weights.",
        "note",
    )
    draws = {name: posterior.draws[name] for name in posterior.fitted.latents}
    real = {name: value for name, value in draws.items() if value.is_floating_point()}
    few = {name: value for name, value in real.items() if value[0].numel() <= MOST_OF_A_SITE}
    if sum(value[0].numel() for value in few.values()) > MOST_ROWS:
        few = {}
    many = {name: value for name, value in real.items() if name not in few}
    if few:
        section.picture(plot_forest(few), "medians, 50% and 90% intervals")
    if many:
        section.picture(
            plot_intervals(many).flat[0], "medians, 50% and 90% intervals of each site's elements, by median"
        )
        note = "A panel for each site: medians, 50% and 90% intervals of its elements, in the order of their medians."
        if len(many) > MOST_PANELS:
            note += f" The first {MOST_PANELS} of {len(many)} sites are drawn."
        section.text(note, "note")
    return section


def _shown_rows(rows: list[str]) -> list[str]:
    """Return the rows to show: all, or the first of each site, of as many sites as there is room for."""
    if len(rows) <= MOST_ROWS:
        return rows
    by_site: dict[str, list[str]] = {}
    for row in rows:
        by_site.setdefault(row.partition("[")[0], []).append(row)
    each = max(1, MOST_ROWS // len(by_site))
    return [row for own in list(by_site.values())[:MOST_ROWS] for row in own[:each]]


def _trust_section(options: ReportOptions, found: Findings) -> Section:
    section = Section("How far to trust the draws")
    posterior, doubtful = found.drawn, found.doubtful
    section.text(judge_draws(found)[1], judge_draws(found)[0])
    khat, ess, num = posterior.khat.flatten(), posterior.ess.flatten(), posterior.num_draws
    if posterior.data_plate is None:
        section.text(
            f"k-hat of the importance weights is {khat.item():.2f}; {num} draws count for {ess.item():.0f}."
        )
    else:
        section.text(
            f"k-hat is above {TRUSTED} for {int(doubtful.sum())} of {len(khat)} elements of {posterior.data_plate!r}; "
            f"at the worst it is {khat.max().item():.2f}. {num} draws count for {ess.min().item():.0f} or more, in the "
            f"median for {ess.median().item():.0f}."
        )
        section.picture(plot_khat(khat), "k-hat of each datum")
    section.text(
        f"k-hat says how heavy the tail of the importance weights is. Up to {TRUSTED} weights repair what is wrong "
        "with the draws; above, they cannot. It cannot see a mode that no draw is near.",
        "note",
    )
    return _add_surprise(section, options, found)


def _add_surprise(section: Section, options: ReportOptions, found: Findings) -> Section:
    """Say whether the data are like those that the model generates."""
    posterior = found.drawn
    if options.num_simulations == 0:
        return section
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GraphflowsWarning)  # said on the page
            tail = posterior.surprise
    except UnsupportedModelError as error:
        found.surprise = reason_of(error)
        return section.text(f"Whether the data are surprising was left out: {found.surprise}", "note")
    if tail is None:
        found.surprise = "the guide reads no data"
        return section.text(
            "The guide has parameters for these data and reads none: whether they are surprising does not matter to "
            "it.",
            "note",
        )
    found.surprise = tail
    count, chance = unlikely(found)
    if posterior.data_plate is None:
        said = f"In {100 * float(tail):.2g} of 100 simulations what the guide reads of the data is as far out as here"
    else:
        said = (
            f"{count} of {tail.numel()} data are farther out than 999 of 1,000 that the model generates (by chance, up "
            f"to {chance})"
        )
    kind = "bad" if count > chance else "good"
    tail_text = "; of such data the guide has learned nothing from simulations." if kind == "bad" else "."
    return section.text(said + tail_text, kind)


def _calibration_section(
    model: Callable[..., Any], data: dict[str, Any], options: ReportOptions, found: Findings
) -> Section:
    section = Section("Calibration on simulated data")
    if options.num_simulations == 0:
        return section.text("No simulations were asked for.", "note")
    local = found.guide.plan.inputs.per_element
    if local:
        found.calibration = (
            f"left out, since the guide has parameters for these data alone ({', '.join(map(str, local))}), which say "
            "nothing of simulated ones"
        )
        return section.text(f"Calibration was {found.calibration}.", "note")
    try:
        report = calibration_report(model, found.guide, num_simulations=_simulations(options, found), **data)
    except GraphflowsError as error:
        found.calibration = reason_of(error)
        return section.text(f"Calibration was left out: {reason_of(error)}", "note")
    found.calibration = report
    section.text(report.summary().note, "good" if report.summary().note.startswith("Nothing") else "bad")
    section.verbatim(repr(report))
    section.picture(report.plot(), "ranks, coverage, z-scores and contraction")
    return section.text(
        "Data were simulated from the model and the guide was asked for the values behind them. Ranks of the true "
        "values among the draws should be even (grey: the range of chance), intervals should hold the truth as often "
        "as they say. p: of the worst number of a site, times their count; 50%, 90%: shares in such intervals; "
        "contraction: how much narrower than the prior the posterior is.",
        "note",
    )


def _simulations(options: ReportOptions, found: Findings) -> int:
    """Return how many data sets to simulate: so many that they do not take longer than training."""
    numbers = sum(value[0].numel() for value in found.drawn.draws.values())
    return min(options.num_simulations, max(FEWEST_SIMULATIONS, MOST_SIMULATED // numbers))


# --------------------------------------------------------------------------------------------------- predictions
def _prediction_section(options: ReportOptions, found: Findings) -> Section:
    section = Section("Predictive check")
    posterior = found.drawn
    source = posterior
    uneven = bool((posterior.ess < NEARLY_EVEN * posterior.num_draws).any())
    if uneven and not bool(found.doubtful.any()) and posterior.num_draws >= 200:
        source = posterior.reweighted(
            max(100, posterior.num_draws // 4), seed=options.seed, progress=options.progress
        )
        section.text("Predictions are made with draws that are corrected by their weights.", "note")
    predicted = source.predict(seed=options.seed + 1, progress=options.progress)
    observed = {
        name: value for name, value in posterior.observed.items() if predicted[name].shape[1:] == value.shape
    }
    bound = EXTREME / max(1, len(observed))  # of many sites some are extreme by chance
    shares, extreme = {}, []
    for name, value in observed.items():
        rows = {label: _beside(statistic, value, predicted[name]) for label, statistic in _STATISTICS.items()}
        shares[name] = tuple(row[-1] for row in rows.values())
        extreme += [
            f"the {label} of {name}" for label, row in rows.items() if min(row[-1], 1 - row[-1]) < bound
        ]
        if len(observed) <= MOST_PICTURES:
            axes = plot_predictive(value, predicted[name])
            axes.set_title(name, loc="left", fontsize=10)
            section.picture(axes, f"{name}: data and predictions")
            section.table(("statistic", "data", "predicted", "sd", "share of predictions below"), rows)
    if len(observed) > MOST_PICTURES:
        section.picture(_many_predictions(observed, predicted), "data and predictions of each site")
        section.text("The share of predictions below the data, for four statistics of each site:", "note")
        section.table(("site", *_STATISTICS), shares)
    found.extreme = tuple(extreme)
    if extreme:
        section.text(
            f"The model does not reproduce {', '.join(extreme)}: less than {100 * bound:.2g} in 100 predictions are as "
            "extreme as the data.",
            "bad",
        )
    else:
        section.text("Nothing in these statistics of the data is strange to the model.", "good")
    return section


def _beside(
    statistic: Callable[[Tensor], Tensor], observed: Tensor, draws: Tensor
) -> tuple[float, float, float, float]:
    """Return a statistic of the data, its mean and deviation in predictions, and the share of these below."""
    value, spread = statistic(observed.double()[None]), statistic(draws.double())
    share = ((spread < value).double() + 0.5 * (spread == value).double()).mean().item()
    return value.item(), spread.mean().item(), spread.std().item(), share


def _many_predictions(observed: Mapping[str, Tensor], predicted: Mapping[str, Tensor]) -> Any:
    """Draw a panel for each observed site."""
    from matplotlib.figure import Figure

    names = list(observed)[:MOST_PANELS]
    rows = -(-len(names) // 4)
    figure = Figure(figsize=(8.4, 0.3 + 1.4 * rows), layout="constrained")
    panels = figure.subplots(rows, 4, squeeze=False).reshape(-1)
    for ax in panels[len(names) :]:
        ax.set_visible(False)
    for name, ax in zip(names, panels, strict=False):
        plot_predictive(observed[name], predicted[name], ax)
        ax.set_title(name, fontsize=8, loc="left")
        ax.set_xlabel("")
        ax.tick_params(labelsize=6)
        if name != names[0]:
            ax.get_legend().remove()
        else:
            figure.legend(
                handles=ax.get_legend().legend_handles, loc="outside upper right", ncols=2, frameon=False
            )
            ax.get_legend().remove()
    return figure


_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda values: values.flatten(1).mean(1),
    "standard deviation": lambda values: values.flatten(1).std(1),
    "least": lambda values: values.flatten(1).min(1).values,
    "greatest": lambda values: values.flatten(1).max(1).values,
}


# -------------------------------------------------------------------------------------------------------- advice
def _advice_section(found: Findings) -> Section:
    section = Section("What to do next")
    for kind, sentence in (judge_draws(found), judge_model(found)):
        section.text(sentence, kind)
    return section.items(next_steps(found))
