"""The start of a guide: its blocks standardised and set by regression, at the prior or at random; and which is kept.

Joint samples of the model are turned into one covariance matrix per block; each site's conditional is set to the
least-squares regression of its unconstrained vector on its parents in the inverse, with the residual covariance
as scale. For a linear-Gaussian model with a faithful inverse the expected KL divergence from the posterior is
then about (number of weights) / (2 number of samples) nats, so that a sparse inverse also needs fewer samples.

Sites whose elements have maps of their own get one regression for each index of the plate.

With ``init="auto"``, the default, the start is kept that has the least loss for the data of set-up, by draws that no
start has seen. Candidates, in this order:

- *mode*: regression on draws near the posterior's mode for the data of set-up (:mod:`~pyro_graphflows.guides.mode`);
- *mode without priors*: the same with sites whose prior is not normal, and another one at each value of the sites
  above, as regressions alone and not as their prior times a factor: in the coordinate of a prior that moves, what data
  say precisely of a number moves as well. Tried where the first seems not near;
- *regression* on joint samples of the model, or, where these are not what the model's density says (factors, masks),
  on draws of the latents from their prior; not tried where the first seems near enough and no
  site reads data;
- *mode and regression*: the first for sites with per-element parameters, the second for those that read data;
- *prior*: the latents' prior, whatever the data, if no mode was found;
- *random*: random weights, if nothing else has a finite loss.

Starts near the mode are tried again with draws of short chains, and with factors of effects from second derivatives
(:mod:`~pyro_graphflows.guides.second_derivatives`), each kept if the loss is less; ``init="mode"`` has neither.

A guide that is amortised must not take the data of set-up, which may be a mere example, for all that it will see. In
plates the others are tried only if the regression seems a hundred nats off for each datum, or does much worse for
these data than draws of the prior would. Without plates all data are one datum, and a guide may be meant for it, or for
whatever the model simulates. Where the regression is not near, the start near the mode is kept if the loss for the data
falls by more than the mean loss for simulated data grows, if the model can simulate some; a thousand nats off is as bad
as more, since nothing can be followed from there.

The networks of blocks that are amortised go on from their regression, to where joint samples are likeliest
(:mod:`~pyro_graphflows.guides.curved_start`). Where all data are one datum they do so last: the choice is between
regression and mode, and the former is curved if it was taken, or if that is better for the data than the latter.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_graphflows.distributions.spline import SplineDistribution
from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides.block import GuideBlock, make_inputs
from pyro_graphflows.guides.call import Call, PlateState
from pyro_graphflows.guides.compile import Compiled, GuideOptions
from pyro_graphflows.guides.conditionals.contract import Conditionals, LinearConditional, Pass
from pyro_graphflows.guides.conditionals.masked import MaskedConditionals, MaskedPass
from pyro_graphflows.guides.conditionals.pooling import DeepSet
from pyro_graphflows.guides.conditionals.spline import SplineFactor
from pyro_graphflows.guides.curved_start import bend_
from pyro_graphflows.guides.fewer_elements import fewer_of
from pyro_graphflows.guides.fused_rows import FusedRows, standardised, with_priors
from pyro_graphflows.guides.joint_factors import JointRows, fit_jointly_
from pyro_graphflows.guides.many_factors import fit_factors
from pyro_graphflows.guides.mode import MOST_NUMBERS, nesting_of
from pyro_graphflows.guides.plan import MOST_INDICES, Plan
from pyro_graphflows.guides.samples import ModelDraws, Samples, columns_of
from pyro_graphflows.guides.sites import LatentSite, concatenate, is_normal_unconstrained
from pyro_graphflows.guides.spline_start import shape_spline_
from pyro_graphflows.infer.enumeration import enumerated, sum_of_the_rest
from pyro_graphflows.inspect.arguments import argument_leaves
from pyro_graphflows.inspect.runs import kept_buffers
from pyro_graphflows.nn.mlp import LevelEvaluation
from pyro_graphflows.regression import (
    HELD_OUT,
    WINSOR,
    Moments,
    Regression,
    finite_rows,
    in_float64,
    location_and_scale,
    varies,
)

__all__ = [
    "Candidate",
    "Judge",
    "Judgement",
    "Start",
    "Trial",
    "choose_start",
    "conditionals_loss",
    "regress_",
    "start_at_",
    "start_block_",
    "start_guide",
    "whiten_block_",
]

NUM_START_DRAWS = 20  # of the guide at set-up, which say how large its inputs are
TIE = 0.01  # nats by which the regression start may seem worse; without parents both starts are alike
ELEMENT_SCALE = 0.1  # sites with per-element parameters start at their prior, this much narrower
LEAST_ROWS = 20  # finite ones, without which there is no regression

MOST_SQUARES = 3_000_000_000  # of features, over all rows of a regression
ROWS_PER_FEATURE = 4  # at least, even so
MOST_SEEN = 1000  # rows that show how many features vary
LEAST_GAIN = 0.01  # nats of an element, by which maps of their own must beat one that reads the covariates
ROWS_PER_WEIGHT = 20  # with fewer joint samples of an index for each weight its map stays at the shared one
MANY_INDICES = 300  # from which the factors of all are fitted at once
MOST_NEAR_MODE = 20_000  # indices with a regression each on draws near the mode
MOST_OF_INDICES, LEAST_OF_INDEX = 200_000, 1000  # samples for maps that are made beside a network
MOST_PRODUCTS = 10_000_000_000  # for the moments by which inputs are whitened, which need no accuracy


NUM_DRAWS = 1000  # by which starts are judged
FEWEST_DRAWS = 20  # the same where the model cannot give many at once
FEWEST_SUMMED = 50  # the same where it sums over sites
BOTH = "mode and regression"
ALONE = "mode without priors"
STEADIER = 0.1  # nats that a start may lose whose networks serve all elements: training moves it less
CHAINS, NORMAL = "with short chains", "without chains"
SECOND, FIRST = "with second derivatives", "without second derivatives"
EXACT = 0.2  # nats, or NEAR_NUMBER for each number: with a gap that seems less no other factors are tried
MOST_AT_ONCE = 1_000_000  # elements of all sites, each as large as the largest, over all draws of a judgement
NOWHERE = 1000.0  # nats off for each datum: from there nothing can be followed
NEAR = 2.0  # nats: if the gap of a start near the mode seems less, nothing else is tried
NEAR_NUMBER = 0.02  # nats for each latent number, the same where there are many
MOST_SIMULATED = 2  # data sets for each that is used: some may not be finite
NEAR_EACH = 100.0  # nats for each of many data: the same of a regression that is amortised
MARGIN = 20.0  # nats by which the prior must be better than an amortised guide's start
Program = Callable[..., Any]
Simulated = Mapping[str, Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """A guide's blocks at a start.

    Attributes:
        name: ``"regression"``, ``"mode"``, ``"prior"`` or ``"random"``.
        blocks: The blocks.
        notes: Notes for the user.
        note: Why there are no joint samples, or few; None otherwise.
        moments: For each block the second moments of its inputs; None where nothing was standardised.
    """

    name: str
    blocks: nn.ModuleList
    notes: tuple[str, ...]
    note: str | None = None
    moments: tuple[Tensor | None, ...] = ()


@dataclass(frozen=True)
class Start:
    """How a block was started.

    Attributes:
        notes: Notes for the user.
        moments: The second moments of its inputs in joint samples; None where nothing was standardised.
    """

    notes: tuple[str, ...] = ()
    moments: Tensor | None = None


class Trial(ABC):
    """A guide while it is set up: it takes blocks at some start, and is run with them for the call of set-up.

    Attributes:
        call: Positional and keyword arguments of that call.
    """

    call: Arguments

    @abstractmethod
    def take(self, blocks: nn.ModuleList) -> None:
        """Let the guide have these blocks."""

    @abstractmethod
    def read(self) -> Call:
        """Read the call."""

    @abstractmethod
    def run(self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """Draw latents for a call, perhaps with other values of observed sites."""

    @abstractmethod
    def draws(self, number: int, dim: int) -> dict[str, Tensor]:
        """Return draws for the call as flat unconstrained vectors, along a plate at a dimension."""


def start_guide(
    compiled: Compiled, samples: Samples, options: GuideOptions, trial: Trial
) -> tuple[Candidate, str | None]:
    """Return the blocks at the start that the options ask for, and a sentence on the choice.

    Args:
        compiled: What the guide is made from.
        samples: Joint samples, or what there is instead.
        options: The options of the guide.
        trial: The guide.
    """
    depth = max((-state.dim for state in compiled.plates.values()), default=0)
    chosen, sentence = _start_guide(compiled, samples, options, trial, depth)
    trial.take(chosen.blocks)
    _whiten_blocks(chosen, trial, -1 - depth)
    return chosen, sentence


def _start_guide(
    compiled: Compiled, samples: Samples, options: GuideOptions, trial: Trial, depth: int
) -> tuple[Candidate, str | None]:
    plan = compiled.plan

    def build(samples: Samples, name: str, *, curved: bool = True) -> Candidate:
        samples.draws.recall(samples.drawn)
        if plan.priors.sites:
            samples = with_priors(samples, plan.priors)
        if compiled.scores is not None and samples.values is not None:
            number = len(next(iter(samples.values.values())))
            scores = compiled.scores.of_draws(compiled.draws, number, compiled.plates)
            samples = samples.with_values(scores)
        alone = _with_moving_priors(compiled) if name == ALONE else ()
        how: dict[str, Any] = {"regression": name != "random", "curved": curved, "alone": alone}
        blocks, starts = _start_blocks(compiled, samples, options, **how)
        notes = tuple(note for start in starts for note in start.notes)
        moments = tuple(start.moments for start in starts)
        return Candidate(name, nn.ModuleList(blocks), notes, samples.note, moments)

    def judge_start(candidate: Candidate, simulated: Simulated | None = None) -> Judgement | None:
        trial.take(candidate.blocks)
        return judge.judge(trial.run, simulated)

    if options.init == "mode":
        try:
            return build(samples.at_mode(plan), "mode"), None
        except UnsupportedModelError as error:
            kept = replace(
                samples, note=" ".join(filter(None, (f"no start at the mode: {error}", samples.note)))
            )
            return build(kept, "regression"), None
    nothing_to_regress_on = options.init == "regression" and samples.source == "none" and samples.num_rows > 0
    several = options.init == "auto" or nothing_to_regress_on
    if several and options.family.can_regress and compiled.scores is None:
        draws = compiled.draws
        elements = draws.most_elements * len(compiled.sites)
        # in plates, an amortised guide's start is only compared with the prior, with a wide margin
        is_judged = plan.inputs.per_element or samples.source == "none" or _has_one_datum(compiled, samples)
        wanted = NUM_DRAWS if is_judged else FEWEST_DRAWS
        number = min(wanted, max(FEWEST_DRAWS, MOST_AT_ONCE // elements))
        sums = nesting_of(compiled.traced) if plan.graph.marginalised else None
        dim = None
        if sums is not None:
            number = FEWEST_SUMMED
        elif draws.takes_plates and elements * number <= MOST_AT_ONCE:
            dim = -1 - depth
        else:
            number = FEWEST_DRAWS
        judge = Judge(draws.model, trial.call, options.setup_seed, dim, number, sums=sums)
        return choose_start(compiled, samples, build, judge_start, judge)
    if options.init == "prior":
        try:
            return build(samples if compiled.scores is not None else samples.at_prior(plan), "prior"), None
        except UnsupportedModelError as error:
            note = f"no start at the prior, and no standardisation of latents: {error}"
            return build(replace(samples, values=None, note=note), "random"), None
    at_random = options.init == "random" or not options.family.can_regress
    return build(samples, "random" if at_random else "regression"), None


def _with_moving_priors(compiled: Compiled) -> frozenset[str]:
    """Return the fused sites in a coordinate that is another one in each call."""
    nodes, priors = dict[str, Any](compiled.traced.trace.nodes), compiled.plan.priors
    return frozenset(
        site
        for site in priors.sites - priors.constant
        if compiled.sites[site].encoding is None
        and not is_normal_unconstrained(compiled.sites[site], nodes[site]["fn"])
    )


def _start_blocks(
    compiled: Compiled,
    samples: Samples,
    options: GuideOptions,
    *,
    regression: bool,
    curved: bool,
    alone: Collection[str] = (),
) -> tuple[list[GuideBlock], list[Start]]:
    """Return the blocks at their starts, and how these are."""
    further = {
        "element_parents": compiled.element_parents,
        "factors": options.factor_classes(),
        "ranks": compiled.vectors.ranks,
        "chains": {site: (chain.width, chain.differences) for site, chain in compiled.vectors.chains.items()},
    }
    blocks, starts = [], []
    for plan in compiled.plan.blocks:
        inputs, elements, of_block = make_inputs(
            plan, samples, options.deepset or DeepSet(), options.embedding
        )
        block = GuideBlock.make(plan, compiled.families[plan.sites[0]], inputs, of_block, further, elements)
        start = start_block_(block, of_block, regression=regression, curved=curved, alone=alone)
        if regression:
            start_fields_(block, compiled)
        given = start_at_(block, of_block, options.init_values, compiled.plan.changing)
        block.leave_out_unused_elements_()
        starts.append(replace(start, notes=(*start.notes, *given)))
        blocks.append(block)
    return blocks, starts


@torch.no_grad()
def _whiten_blocks(start: Candidate, trial: Trial, dim: int) -> None:
    """Find the coordinates in which the blocks are trained, from joint samples and the data of set-up."""
    blocks: list[Any] = list(start.blocks)
    chosen = [
        (block, moments) for block, moments in zip(blocks, start.moments, strict=True) if moments is not None
    ]
    call: Call | None = None
    draws: dict[str, Tensor] = {}
    if chosen:
        try:
            call = trial.read()
            draws = trial.draws(NUM_START_DRAWS, dim)
        except GraphflowsError:  # set up without data: the call that needs them says so
            call = None
    for block, moments in chosen:
        whiten_block_(block, moments, call, draws)


def start_block_(
    block: GuideBlock,
    samples: Samples,
    *,
    regression: bool,
    curved: bool = True,
    alone: Collection[str] = (),
) -> Start:
    """Give a block its starting values.

    Args:
        block: The block.
        samples: Its samples.
        regression: Whether to start by regression.
        curved: Whether networks may go on from there.
        alone: Fused sites that start as regressions alone.

    Returns:
        Notes for the user, and what whiteners are found from.
    """
    conditionals, plan = block.conditionals, block.plan
    notes: list[str] = []
    kept = False
    moments: Tensor | None = None
    serves_one = samples.source == "mode"
    conditionals.serve_one_(serves_one, exact=serves_one and samples.draws.is_near_mode)
    for site in plan.fitted if not serves_one else ():
        conditionals.leave_out_maps_(site)
    if samples.rows is not None:
        latents = {site: samples.rows[site] for site in plan.sites}
        for site, values in latents.items():
            # Vectors of discrete sites are zeros and ones, and stay so.
            if samples.standardize and samples.draws.sites[site].encoding is None:
                conditionals.set_units_(site, location_and_scale(values))
        fused = FusedRows.of_block(plan, samples).without(alone) if plan.fused else None
        if samples.standardize and fused is not None:
            fused.set_units_(conditionals)
        if plan.at_rows:
            aligned = samples.aligned(block.inputs.names)
            context = block.inputs.features(concatenate([aligned[n][:1] for n in block.inputs.names]))
            conditionals.keep_rows_(samples.plates, context[0])
        if regression:
            features = block.inputs.features(concatenate([samples.rows[n] for n in block.inputs.names]))
            fewer = _of_fewer(block, samples.rows)
            seen = [features, *latents.values(), *([] if fewer is None else [fewer])]
            finite = finite_rows(*(each for each in seen if each.shape[-1]))
            finite = _few_enough(finite, features)
            of_sites = latents
            if not bool(finite.all()):
                features = features[finite] if features.shape[-1] else features
                fused = None if fused is None else fused.at(finite)
                of_sites = {n: v[finite] for n, v in latents.items()}
            if samples.standardize:
                moments = _input_moments(block, features, of_sites)
                if fewer is not None:
                    moments = 0.5 * (moments + _input_moments(block, fewer[finite], of_sites))
            # A regression on learned features would be another one as soon as these are trained.
            if bool(block.inputs.learned.any()):
                features = torch.where(block.inputs.learned, torch.zeros(()).to(features), features)
            if fewer is not None and fused is not None:
                fewer = torch.where(block.inputs.learned, torch.zeros(()).to(features), fewer[finite])
                inputs = block.inputs
                fused = replace(fused, fewer=fewer, sizes=inputs.of_sizes, variances=inputs.of_variances)
            note = _regress_if_better_(conditionals, features, of_sites, fused)
            kept = note is None
            if curved and kept and moments is not None and samples.source == "joint" and _can_bend(block):
                is_bent = _bend_(block, features, of_sites, fused, moments)
                moments = None if is_bent else moments  # inputs stay whitened as they are
            if kept and not plan.plates:
                # draws of a normal have its shape, whatever the posterior's is
                tell = samples.source == "joint" or samples.draws.is_near_mode
                _shape_splines_(conditionals, features, of_sites, fused, serves_one, tell)
            alike = plan.per_element if serves_one else (*plan.per_element, *plan.fitted)
            own_maps = {s: p for s, p in plan.non_exchangeable.items() if s not in alike}
            if serves_one and plan.plates:  # draws differ from element to element
                discrete = [s for s in plan.per_element if samples.draws.sites[s].encoding is not None]
                own_maps |= {s: plan.plates for s in plan.per_element if s not in discrete}
                for site in discrete if kept else ():
                    _start_classes_(conditionals, site, samples)
            at_random: dict[str, Tensor] | None = None
            if not kept and own_maps and not (plan.coupled or (fused is not None and fused.priors)):
                # One regression for indices that differ much may be worse than none; each has its own.
                at_random = {key: value.clone() for key, value in conditionals.state_dict().items()}
                regress_(conditionals, features, of_sites)
            if (kept or at_random is not None) and (own_maps or plan.coupled):
                known = () if fused is None else fused.priors
                further = [name for site in known for name in columns_of(site) if name in samples.rows]
                aligned = samples.aligned([*block.inputs.names, *plan.sites, *further])
                context = block.inputs.features(concatenate([aligned[n] for n in block.inputs.names]))
                context = torch.where(block.inputs.learned, torch.zeros(()).to(context), context)
                of_all = {site: aligned[site] for site in (*plan.sites, *further)}
                most = MOST_NEAR_MODE if serves_one else MOST_INDICES
                left = _start_indices_(conditionals, own_maps, samples.plates, context, of_all, most)
                if at_random is not None:
                    at_random = {key: at_random[key] for key in conditionals.state_dict()}
                    kept = _is_better(conditionals, at_random, context, of_all, samples.plates)
                notes += left.values() if kept else []
                mapped = [s for s in plan.fitted if s in own_maps and s not in left] if kept else []
                notes += [_on_maps(site, own_maps[site], plan.at_rows[site]) for site in mapped]
                if plan.coupled:
                    shares = _start_jointly_(block, samples, context, of_all)
                    beside = FusedRows.of_sites(tuple(plan.coupled), of_all)
                    priors = {s: (prior, beside.in_coordinate(s)) for s, prior in beside.priors.items()}
                    conditionals.start_couplings_(samples.plates, context, of_all, shares, priors)
            for site in plan.sites if kept else ():
                if site in samples.factors:
                    block.set_joint_factor_(site, samples.plates, samples.factors[site])
            notes += [] if kept or note is None else [note]
    for site in plan.fitted if not kept else ():
        conditionals.leave_out_maps_(site)
    if plan.coupled and not kept:
        conditionals.start_couplings_(samples.plates)
    if regression and not serves_one:
        conditionals.narrow_elements_(ELEMENT_SCALE, fitted=kept)
    return Start(tuple(notes), moments)


def _start_jointly_(
    block: GuideBlock, samples: Samples, context: Tensor, values: Mapping[str, Tensor]
) -> dict[str, float]:
    """Start the factors of fused sites that are drawn jointly; return how their elements vary together.

    Args:
        block: The block.
        samples: Its samples.
        context: Features of the context, ``(draws, *batch, num_features)``.
        values: Vectors of the sites, and columns of their priors, in the same layout.
    """
    conditionals, plan = block.conditionals, block.plan
    found: dict[str, float] = {}
    columns = [context]
    for site in plan.sites:
        shift, scale = conditionals.output_units(site)
        columns.append((values[site] - shift) / scale)
    for site, coupling in plan.coupled.items():
        known = FusedRows.of_sites([site], values)
        shared = site not in plan.per_element  # elements with parameters have started each at its place
        if not (coupling.rank and shared and conditionals.fuses(site) and site in known.priors):
            continue
        joint = concatenate(columns)
        fewer = _of_fewer(block, samples.aligned(_names_of_fewer(block, samples.values or {})))
        if fewer is not None:
            fewer = torch.where(block.inputs.learned, torch.zeros(()).to(fewer), fewer)
            fewer = concatenate([fewer, *columns[1:]])[..., conditionals.inputs_of(site)]
        shift, scale = conditionals.fused_units(site)
        value = (known.in_coordinate(site) - shift) / scale
        of_site = (
            joint[..., conditionals.inputs_of(site)],
            value,
            standardised(known.priors[site], shift, scale),
        )
        dims = sorted(samples.plates[name].dim - 1 for name in plan.coupled[site].plates)
        rows = JointRows.of((*of_site, fewer), dims)
        of_sizes = block.inputs.of_sizes, block.inputs.of_variances
        share = None if rows is None else fit_jointly_(conditionals, site, rows, of_sizes)
        if share is not None:
            found[site] = share
    return found


def _names_of_fewer(block: GuideBlock, columns: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the context where summaries are of fewer elements."""
    pools = block.inputs.pools
    return tuple(
        fewer_of(name) if str(position) in pools and fewer_of(name) in columns else name
        for position, name in enumerate(block.inputs.names)
    )


def _of_fewer(block: GuideBlock, rows: Mapping[str, Tensor]) -> Tensor | None:
    """Return the features of the context where summaries are of fewer elements; None if there are none."""
    names = _names_of_fewer(block, rows)
    if names == tuple(block.inputs.names):
        return None
    features: Tensor = block.inputs.features(concatenate([rows[name] for name in names]))
    return features


@torch.no_grad()
def start_fields_(block: GuideBlock, compiled: Compiled) -> None:
    """Let long vectors whose log-density is quadratic start at their conditional, as the derivatives give it.

    Args:
        block: The block.
        compiled: What the guide is made from.
    """
    for site in block.plan.sites:
        chain = compiled.vectors.known.get(site)
        if chain is None or chain.field is None or not compiled.sites[site].is_real:
            continue
        seen = set(map(str, compiled.plan.inverse.parents[site]))
        elsewhere = {
            child
            for child in compiled.plan.graph.observed
            if site in compiled.plan.graph.parents(child) and child not in chain.reads
        }
        alone = site in compiled.plan.inputs.per_element  # and so for these data
        if not seen - elsewhere <= set(chain.field.weights) or (elsewhere and not alone):
            continue
        weights, intercept, tril = chain.field.moments
        if chain.differences:
            weights = {name: _steps(matrix) for name, matrix in weights.items()}
            intercept, tril = _steps(intercept), _steps(tril)
        before = {key: value.clone() for key, value in block.conditionals.state_dict().items()}
        try:
            block.set_linear_(site, weights, intercept, tril, exact=not (chain.learned or elsewhere))
        except GraphflowsError:  # its data are not features as they are, but their logarithms
            block.conditionals.load_state_dict(before)


def _steps(columns: Tensor) -> Tensor:
    return torch.diff(columns, dim=0, prepend=torch.zeros_like(columns[:1]))


def _few_enough(chosen: Tensor, features: Tensor) -> Tensor:
    """Return the mask of the first chosen rows, as many as a regression on wide inputs can take in a second."""
    most = _most_rows(features.shape[-1])
    if most < len(chosen):
        most = _most_rows(int(varies(features[chosen.nonzero()[:MOST_SEEN, 0]]).sum()))
    return chosen & (chosen.cumsum(0) <= most)


def _most_rows(num_features: int) -> int:
    return max(MOST_SQUARES // max(num_features, 1) ** 2, ROWS_PER_FEATURE * num_features)


def whiten_block_(block: GuideBlock, moments: Tensor, call: Call | None, draws: Mapping[str, Tensor]) -> None:
    """Let trained weights act on whitened inputs.

    Inputs are whitened by the sum of their second moments in joint samples of the model and in the guide's own draws
    given the data of set-up, since these may be far out in directions in which joint samples hardly vary.

    Args:
        block: The block.
        moments: The second moments of its inputs in joint samples.
        call: The call of set-up; None if it cannot be read.
        draws: The guide's draws for it: flat vectors by site, of any batch shape.
    """
    if call is not None:
        features = block.inputs(call, draws)
        moments = moments + _input_moments(block, features, {s: draws[s] for s in block.plan.sites})
    if bool(torch.isfinite(moments).all()):
        block.conditionals.whiten_(moments)


def start_at_(
    block: GuideBlock, samples: Samples, init_values: Mapping[str, Tensor], changing: Collection[str]
) -> list[str]:
    """Let some sites of a block start at given values, a tenth as wide as their prior; they read nothing there.

    Args:
        block: The block.
        samples: Its samples.
        init_values: Values of latent sites, as the model samples them; they may broadcast over plates.
        changing: The sites whose supports depend on other latent sites.

    Returns:
        Notes for the user.

    Raises:
        GraphflowsError: If a value does not fit, or elements differ where a site has no parameters for each.
    """
    notes = []
    for site in block.plan.sites:
        if site not in init_values:
            continue
        if site in changing:
            raise GraphflowsError(
                f"Expected init_values of sites with a support of their own; that of {site!r} depends on other latents."
            )
        shift, scale = block.conditionals.output_units(site)
        around = [samples.plates[name] for name in block.plan.plates]
        flat = _unconstrained(samples.draws.sites[site], init_values[site].to(shift), around)
        locs = (flat - shift) / scale
        tril = ELEMENT_SCALE * torch.eye(len(shift)).to(shift)
        first = locs.reshape(-1, len(shift))[0]
        if bool((locs == first).all()):
            block.conditionals.set_linear_(site, LinearConditional({}, first, tril))
        elif not block.conditionals.set_elements_(site, locs, tril):
            reason = (
                "this family starts all elements alike"
                if site in block.plan.per_element
                else "it is amortised, with one network for all elements"
            )
            raise GraphflowsError(
                f"Expected one value of {site!r} in init_values for all elements of {', '.join(block.plan.plates)}: "
                f"{reason}."
            )
        notes.append(f"{site} starts at the value given (init_values=), a tenth as wide as its prior.")
    return notes


def _unconstrained(site: LatentSite, value: Tensor, plates: Sequence[PlateState]) -> Tensor:
    """Return a value of a site, in full plates, as flat unconstrained vectors, ``(*plates, size)``."""
    shape = [1] * max((-plate.dim for plate in plates), default=0)
    for plate in plates:
        shape[plate.dim] = plate.full_size
    whole = (*shape, *site.event_shape)
    try:
        value = value.expand(whole)
    except RuntimeError as error:
        raise GraphflowsError(
            f"Expected a value of {site.name!r} in init_values of a shape that broadcasts to {whole}; got "
            f"{tuple(value.shape)}."
        ) from error
    raw = biject_to(site.support).inv(value)
    if not bool(raw.isfinite().all()):
        raise GraphflowsError(
            f"Expected a value of {site.name!r} in init_values inside its support, {site.support}."
        )
    return raw.reshape(*shape, -1)


def _regress_if_better_(
    conditionals: Conditionals, context: Tensor, values: dict[str, Tensor], fused: FusedRows | None
) -> str | None:
    """Set the conditionals by regression, or go back, and say so, if samples like the random start better.

    They are held out from the regression if it has few rows for a weight.
    """
    number = len(next(iter(values.values())))
    sites = ", ".join(conditionals.block.sites)
    if number < LEAST_ROWS:
        return (
            f"the random start was kept for {sites}: of the joint samples only {number} are "
            f"finite there, and a regression needs {LEAST_ROWS} (num_start_samples=)."
        )
    held_out = slice(0, None, HELD_OUT)
    test = {site: value[held_out] for site, value in values.items()}
    most_inputs = max(len(conditionals.inputs_of(site)) for site in conditionals.block.sites)
    many = number >= ROWS_PER_FEATURE * (most_inputs + 1)
    random_state = {key: value.clone() for key, value in conditionals.state_dict().items()}
    tested = None if fused is None else fused.at(held_out)
    random_loss = conditionals_loss(conditionals, context[held_out], test, tested)
    sizes = {site: len(conditionals.columns[site]) for site in conditionals.block.sites}
    weights = sum(n * (len(conditionals.inputs_of(site)) + (n + 3) / 2) for site, n in sizes.items())
    chance = (
        weights / number
    )  # what a regression loses, and a start whose units rest on all rows does not [Akaike]
    if many:  # those that judge are among them, which makes them likelier by what chance gives
        silent = regress_(conditionals, context, values, fused)
    else:
        rest = torch.arange(number) % HELD_OUT != 0
        fitted = {site: value[rest] for site, value in values.items()}
        used = None if fused is None else fused.at(rest)
        regress_(conditionals, context[rest] if context.shape[-1] else context, fitted, used)
    loss = conditionals_loss(conditionals, context[held_out], test, tested) + (chance if many else 0.0)
    if not (loss <= random_loss + TIE + chance or (random_loss != random_loss and loss == loss)):
        conditionals.load_state_dict(random_state)
        return (
            f"the random start was kept for {sites}: its loss on prior samples is "
            f"{random_loss:.3g} nats, that of the regression start {loss:.3g}."
        )
    if not many:
        silent = regress_(conditionals, context, values, fused)
    if fused is not None:
        fused.narrow_(conditionals, silent)
    return None


def _joint_inputs(block: GuideBlock, features: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Return all inputs of a block, ``(*batch, columns)``; see :func:`_input_moments`."""
    columns = [features] if features.shape[-1] else []
    for site in block.plan.sites:
        shift, scale = block.conditionals.input_units(site)
        columns.append((values[site] - shift) / scale)
    return concatenate(columns)


def _input_moments(block: GuideBlock, features: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Return the second moments of all inputs of a block.

    Features that are trained themselves are kept apart from each other and from the others: a whitener would make much
    of what little they move in directions in which they did not vary.

    Args:
        block: The block; units are used and not changed.
        features: Features of the context nodes, ``(*batch, num_features)``.
        values: Unconstrained vectors of the sites, each of shape ``(*batch, size)``.
    """
    joint = _joint_inputs(block, features, values)
    rows = joint.reshape(-1, joint.shape[-1])
    step = -(-len(rows) * rows.shape[-1] ** 2 // MOST_PRODUCTS)
    rows = in_float64(rows[::step] if step > 1 else rows)
    varying = varies(rows)
    if bool(varying.all()) or not len(rows):
        moments = rows.mT @ rows / len(rows)
    else:  # as the data of one call do not
        own, mean = rows[:, varying], rows.mean(0)
        moments = torch.outer(mean, mean)
        where = varying.nonzero()[:, 0]
        moments[where.unsqueeze(-1), where] = own.mT @ own / len(rows)
    apart = block.inputs.learned.nonzero()[:, 0]
    spread = moments.diagonal()[apart].clamp(min=1.0)  # they will vary as soon as they are trained
    moments[apart] = 0.0
    moments[:, apart] = 0.0
    moments[apart, apart] = spread
    return moments


def regress_(
    conditionals: Conditionals,
    context: Tensor,
    values: Mapping[str, Tensor],
    fused: FusedRows | None = None,
) -> list[str]:
    """Set each conditional of a block to the regression on its parents, of a fused site the factor beside its prior.

    Args:
        conditionals: The conditionals; their units are used and not changed.
        context: Features of the context nodes in rows, shape ``(n, num_features)``.
        values: Unconstrained vectors of the sites in rows, each of shape ``(n, size)``.
        fused: The priors of fused sites in the same rows.

    Returns:
        The fused sites of which the rows say no more than their priors do.
    """
    columns = [context]
    for site in conditionals.block.sites:
        shift, scale = conditionals.output_units(site)
        columns.append((values[site] - shift) / scale)
    rows = in_float64(torch.cat(columns, -1))
    finite = finite_rows(rows)
    if not bool(finite.all()):
        rows, fused = rows[finite], None if fused is None else fused.at(finite)
    rows = rows.clamp(-WINSOR, WINSOR)
    moments = Moments(rows)
    silent = []
    for site in conditionals.block.sites:
        known = fused is not None and site in fused.priors
        if fused is not None and known and (conditionals.fuses(site) or site in conditionals.block.summed):
            if not fused.fit_(conditionals, site, rows, moments):
                silent.append(site)
        else:
            conditionals.regress_(site, rows, moments)
    return silent


def _is_better(
    conditionals: Conditionals,
    other: Mapping[str, Tensor],
    context: Tensor,
    values: Mapping[str, Tensor],
    plates: Mapping[str, PlateState],
) -> bool:
    """Whether conditionals with maps of elements lose less than in another state; leave them in the better one."""
    own = {key: value.clone() for key, value in conditionals.state_dict().items()}
    loss = conditionals_loss(conditionals, context, values, plates=plates)
    conditionals.load_state_dict(other)
    if not loss <= conditionals_loss(conditionals, context, values, plates=plates):
        return False
    conditionals.load_state_dict(own)
    return True


@torch.no_grad()
def conditionals_loss(
    conditionals: Conditionals,
    context: Tensor,
    values: Mapping[str, Tensor],
    fused: FusedRows | None = None,
    plates: Mapping[str, PlateState] | None = None,
) -> float:
    """Return the mean of ``-log q`` of the sites' unconstrained vectors given context, in nats.

    Of fused sites, it is the density in the coordinates of their priors. With plates, parameters and maps of their
    elements count.
    """
    return -sum(
        float(each.mean()) for each in _log_probs(conditionals, context, values, fused, plates).values()
    )


@torch.no_grad()
def _log_probs(
    conditionals: Conditionals,
    context: Tensor,
    values: Mapping[str, Tensor],
    fused: FusedRows | None,
    plates: Mapping[str, PlateState] | None,
) -> dict[str, Tensor]:
    """Return ``log q`` of each site's unconstrained vectors, see :func:`conditionals_loss`."""
    found = {}
    for site, conditional, value in _at_rows(conditionals, context, values, fused, plates):
        found[site] = conditional.log_prob(value)
        beside_prior = fused is not None and site in fused.values and not conditionals.fuses(site)
        if fused is not None and beside_prior and site in conditionals.block.by_shape:
            found[site] = found[site] + fused.log_slope(site)
    return found


def _at_rows(
    conditionals: Conditionals,
    context: Tensor,
    values: Mapping[str, Tensor],
    fused: FusedRows | None,
    plates: Mapping[str, PlateState] | None,
    evaluation: Pass | None = None,
) -> Iterator[tuple[str, Any, Tensor]]:
    """Yield each site, its conditional at the parents' values in rows, and its values in that one's coordinate."""
    evaluation = conditionals.begin(context, plates) if evaluation is None else evaluation
    for level in conditionals.block.levels:
        of_level = evaluation.next({} if fused is None else fused.priors)
        evaluation.accept({site: values[site] for site in level})
        for site, conditional in of_level.items():
            in_coordinate = fused is not None and site in fused.values and conditionals.fuses(site)
            yield (
                site,
                conditional,
                fused.values[site] if fused is not None and in_coordinate else values[site],
            )


def _can_bend(block: Any) -> bool:
    """Whether networks alone say what conditionals are, and read what is the same before and after training.

    Those that read summaries follow numbers of elements that joint samples do not have.
    """
    own, inputs = block.conditionals, block.inputs
    if not isinstance(own, MaskedConditionals) or own.network.units is None or own.network.skip is None:
        return False
    by_element = own.block.per_element or own.table is not None or len(own.maps) or len(own.couplings)
    reads = any(own.inputs_of(site) for site in own.block.sites)
    is_learned = bool(inputs.learned.any()) or bool(len(inputs.pools)) or bool(own.block.summed)
    return bool(len(own.network.layers) and reads) and not (by_element or is_learned)


def _bend_(
    block: GuideBlock,
    context: Tensor,
    values: Mapping[str, Tensor],
    fused: FusedRows | None,
    moments: Tensor,
) -> bool:
    """Let networks be such that joint samples are likeliest, if that is better than a regression; return whether."""
    conditionals: Any = block.conditionals

    def rows(chosen: Tensor, network: LevelEvaluation | None) -> Iterator[tuple[str, Any, Tensor]]:
        of_context = context[chosen] if context.shape[-1] else context
        of_sites = {site: value[chosen] for site, value in values.items()}
        beside = None if fused is None else fused.at(chosen)
        evaluation = MaskedPass(conditionals, of_context, None, None, network)
        return _at_rows(conditionals, of_context, of_sites, beside, None, evaluation)

    return bend_(conditionals, rows, _joint_inputs(block, context, values), moments)


@torch.no_grad()
def _shape_splines_(
    conditionals: Conditionals,
    context: Tensor,
    values: Mapping[str, Tensor],
    fused: FusedRows | None,
    shape: bool,
    keep_normal: bool,
) -> None:
    """Give splines of numbers the shapes that rows have about the regressions, and keep normal ones so.

    Args:
        conditionals: The conditionals.
        context: Features of the context nodes in rows.
        values: Unconstrained vectors of the sites in rows.
        fused: The priors of fused sites in the same rows.
        shape: Whether splines get shapes.
        keep_normal: Whether training is to leave the knots of what is normal.
    """
    if not isinstance(conditionals, MaskedConditionals):
        return
    factors = conditionals.factors
    numbers = {site for site, own in factors.items() if isinstance(own, SplineFactor) and own.size == 1}
    found = _at_rows(conditionals, context, values, fused, None) if numbers else ()
    for site, conditional, value in list(found):
        if site in numbers and isinstance(conditional, SplineDistribution) and conditional.base == "normal":
            shape_spline_(conditionals, site, conditional, value, shape=shape, keep_normal=keep_normal)


# ---------------------------------------------------------------- one regression for each index


def _start_indices_(
    conditionals: Conditionals,
    own_maps: Mapping[str, Sequence[str]],
    plates: Mapping[str, PlateState],
    context: Tensor,
    values: Mapping[str, Tensor],
    most_indices: int,
) -> dict[str, str]:
    """Start the maps that elements of a plate have of their own; say where that was not possible, or no use."""
    notes = {}

    every = context, values

    def log_prob(site: str) -> Tensor:
        with_prior = [s for s in conditionals.block.sites if columns_of(s)[0] in values]
        priors = FusedRows.of_sites(with_prior, values)
        return _log_probs(conditionals, context, values, priors, plates)[site]

    for site, own in own_maps.items():
        around, by_rows = [plates[name] for name in own], site in conditionals.block.at_rows
        context, values = every
        if by_rows:
            most = max(LEAST_OF_INDEX, MOST_OF_INDICES // math.prod(plate.size for plate in around))
            context, values = context[:most], {name: value[:most] for name, value in values.items()}
        shared = {key: value.clone() for key, value in conditionals.state_dict().items()} if by_rows else {}
        before = log_prob(site) if by_rows else None
        if not _regress_indices_(conditionals, site, around, context, values, most_indices):
            notes[site] = (
                f"the maps of the indices of {', '.join(own)} for {site} start at one that is shared: "
                "no regression of each was possible."
            )
            if by_rows:
                conditionals.leave_out_maps_(site)  # the one reads the covariates
        elif before is not None:
            gain = float((log_prob(site) - before).clamp(-WINSOR, WINSOR).nanmean())
            weights = len(conditionals.inputs_of(site)) + len(conditionals.columns[site])
            chance = len(conditionals.columns[site]) * weights / len(context)  # Akaike
            if not gain > LEAST_GAIN + chance:
                conditionals.load_state_dict(shared)
                conditionals.leave_out_maps_(site)
                notes[site] = (
                    f"{site} has no maps for the indices of {', '.join(own)}: one that reads "
                    f"{', '.join(conditionals.block.at_rows[site])} is as good."
                )
    return notes


def _on_maps(site: str, own: Sequence[str], rows: Sequence[str]) -> str:
    return (
        f"{site} has a map of its own for each index of {', '.join(own)}, for the rows of {', '.join(rows)} that "
        "set-up had; with others one for all serves alone."
    )


@torch.no_grad()
def _start_classes_(conditionals: Conditionals, site: str, samples: Samples) -> None:
    """Let elements of a discrete site have their classes as often as in draws."""
    encoding = samples.draws.sites[site].encoding
    assert encoding is not None
    if any(samples.plates[name].subsampled for name in conditionals.block.plates):
        return
    drawn = samples.aligned([site])[site]
    number, classes = len(drawn), encoding.num_classes
    often = (drawn.sum(0) + 0.5) / (number + 0.5 * max(classes, 2))
    logits = often.logit() if classes == 1 else often.log()
    conditionals.set_elements_(site, logits, torch.eye(logits.shape[-1]).to(logits))


@torch.no_grad()
def _regress_indices_(
    conditionals: Conditionals,
    site: str,
    around: Sequence[PlateState],
    context: Tensor,
    values: Mapping[str, Tensor],
    most: int,
) -> bool:
    """Set the maps of one site to the regressions within the indices; return whether that was possible."""
    if any(plate.subsampled for plate in around):
        return False  # of other indices there are no samples
    own, inputs = list(conditionals.columns[site]), conditionals.inputs_of(site)
    fused = [name for name in columns_of(site) if name in values and conditionals.fuses(site)]
    moving = _moving(inputs, context)
    kept = sorted({*moving, *own})
    joint = _by_index(conditionals, around, context, values, fused, kept)
    if site in conditionals.element_columns or len(joint) > most:
        return False
    is_finite = torch.isfinite(joint).all(-1)
    fewest = int(is_finite.sum(-1).min())
    few = fewest < ROWS_PER_WEIGHT * (len(moving) + 1)
    if few and (site not in conditionals.block.per_element or fused or fewest < 2):
        return False
    sizes = [len(kept), *(values[name].shape[-1] for name in fused)]
    of_own, of_inputs = ([kept.index(j) for j in part] for part in (own, moving))
    is_number = len(own) == 1 and not conditionals.block.at_rows.get(site)
    at_once = bool(fused) and len(joint) > MANY_INDICES and is_number
    each = [] if at_once else [rows[good] for rows, good in zip(joint, is_finite, strict=True)]
    if at_once:
        found = _fit_factors(
            conditionals, site, dict(zip(fused, sizes[1:], strict=True)), joint, of_own, of_inputs
        )
    elif fused:
        parts = [rows.split(sizes, -1) for rows in each]
        shift, scale = (part.to(joint) for part in conditionals.output_units(site))
        found = []
        for rows, *columns in parts:
            of_site = dict(zip(fused, columns, strict=True)) | {site: rows[:, of_own] * scale + shift}
            of_index = FusedRows.of_sites([site], of_site)
            found.append(of_index.fit(conditionals, site, rows.clamp(-WINSOR, WINSOR)[:, of_inputs]).linear)
    elif few:
        found = _with_shared_slopes(each, of_inputs, of_own)
    else:
        found = [Moments(rows.clamp(-WINSOR, WINSOR)).regress(of_inputs, of_own) for rows in each]
    places = [inputs.index(j) for j in moving]
    found = [_on_all_inputs(fit, places, len(inputs)) for fit in found]
    known = sorted(
        j for name in conditionals.block.at_rows.get(site, ()) for j in conditionals.columns.get(name, ())
    )
    if known:
        first = {name: value[:1] for name, value in values.items()}
        at_rows = _by_index(conditionals, around, context[:1], first, (), known)[:, 0]
        found = _reading_covariates(found, at_rows, [inputs.index(j) for j in known])
    fits = [conditionals.linear_of(site, one) for one in found]
    linear = LinearConditional(
        {parent: torch.stack([fit.weights[parent] for fit in fits]) for parent in fits[0].weights},
        torch.stack([fit.loc for fit in fits]),
        torch.stack([fit.scale_tril for fit in fits]),
    )
    return conditionals.set_fused_(site, linear) if fused else conditionals.set_linear_(site, linear)


def _moving(inputs: Sequence[int], context: Tensor) -> list[int]:
    """Return the inputs that are not the same in all draws, as the data of one call are."""
    if not context.shape[-1]:
        return list(inputs)
    moves = (context != context[:1]).flatten(0, -2).any(0)
    return [j for j in inputs if j >= len(moves) or bool(moves[j])]


def _on_all_inputs(fit: Regression, at: list[int], number: int) -> Regression:
    """Return a regression on some inputs as one on all of them."""
    weights = fit.weights.new_zeros(len(fit.loc), number)
    weights[:, at] = fit.weights
    return replace(fit, weights=weights)


def _fit_factors(
    conditionals: Conditionals,
    site: str,
    further: Mapping[str, int],
    joint: Tensor,
    own: list[int],
    inputs: list[int],
) -> list[Regression]:
    """Return the factors of all indices of a number beside its prior, from rows with further columns of some widths.

    Args:
        conditionals: The conditionals; their units are used.
        site: The site.
        further: The names of the further columns, the last ones, and how many they are.
        joint: The rows of the indices, ``(indices, rows, columns)``.
        own: The column of the number.
        inputs: The columns of its inputs.
    """
    of_all = joint.flatten(0, 1)
    parts = of_all[:, -sum(further.values()) :].split(list(further.values()), -1)
    columns = dict(zip(further, parts, strict=True))
    shift, scale = (part.to(joint) for part in conditionals.output_units(site))
    rows = FusedRows.of_sites([site], columns | {site: of_all[:, own] * scale + shift})
    values, prior = rows.in_units(conditionals, site, joint)
    flat = (each.reshape(joint.shape[:2]) for each in (values, prior.loc, prior.log_scale))
    return fit_factors(joint[..., inputs].clamp(-WINSOR, WINSOR), *flat)


def _with_shared_slopes(each: Sequence[Tensor], inputs: list[int], own: list[int]) -> list[Regression]:
    """Return regressions that differ in their locations alone, from few rows of each index."""
    means = [rows.mean(0) for rows in each]
    within = torch.cat([rows - mean for rows, mean in zip(each, means, strict=True)])
    fit = Moments(within.clamp(-WINSOR, WINSOR)).regress(inputs, own)
    return [replace(fit, loc=mean[own] - fit.weights @ mean[inputs]) for mean in means]


def _reading_covariates(found: Sequence[Regression], x: Tensor, known: Sequence[int]) -> list[Regression]:
    """Return the same regressions with slopes on covariates that are the same in all samples of an index.

    What an index cannot tell, the indices together can: the slopes are those of a regression of the locations.

    Args:
        found: The regressions of the indices.
        x: The covariates, ``(indices, covariates)``.
        known: Their positions among the inputs.
    """
    located = [fit.loc + fit.weights[:, list(known)] @ row for fit, row in zip(found, x, strict=True)]
    columns = torch.cat([x, torch.stack(located)], -1)
    own = list(range(len(known), columns.shape[-1]))
    shared = Moments(columns).regress(list(range(len(known))), own).weights
    result = []
    for fit, row, loc in zip(found, x, located, strict=True):
        weights = fit.weights.clone()
        weights[:, list(known)] = shared
        result.append(replace(fit, weights=weights, loc=loc - shared @ row))
    return result


def _by_index(
    conditionals: Conditionals,
    own: Sequence[PlateState],
    context: Tensor,
    values: Mapping[str, Tensor],
    further: Sequence[str],
    kept: Sequence[int],
) -> Tensor:
    """Return some columns of joint samples, in order, ``(indices, rows, columns)`` in standardised units, and more."""
    parts = [context[..., sorted(j for j in kept if j < context.shape[-1])]]
    for site in conditionals.block.sites:
        shift, scale = conditionals.output_units(site)
        columns = conditionals.columns[site]
        chosen = sorted(j - columns.start for j in kept if j in columns)
        parts.append(((values[site] - shift) / scale)[..., chosen])
    parts += [values[name] for name in further]
    depth = max(part.dim() for part in parts)
    parts = [p.reshape(p.shape[:1] + (1,) * (depth - p.dim()) + p.shape[1:]) for p in parts if p.shape[-1]]
    joint = in_float64(concatenate(parts))
    # the table of an element map is laid out by dimension, left to right, and by the numbers of the elements
    dims = sorted(plate.dim - 1 for plate in own)
    for plate in own:
        if plate.indices is not None and not plate.subsampled:
            joint = joint.index_select(plate.dim - 1, plate.indices.argsort().to(joint.device))
    joint = joint.movedim(dims, list(range(len(dims))))
    indices = joint.shape[: len(dims)].numel()
    return joint.reshape(indices, -1, joint.shape[-1])


@dataclass(frozen=True)
class Judgement:
    """What draws of a guide say of it.

    Attributes:
        loss: The mean of ``log q - log p``, in nats.
        gap: Half its variance: about the divergence from the posterior where that is small.
    """

    loss: float
    gap: float


HOPELESS = Judgement(math.inf, math.inf)


class Judge:
    """The losses of starts for the data of one call: the mean of ``log q - log p`` over draws of the guide.

    Args:
        model: The model.
        call: Its arguments.
        seed: The seed of the draws, the same for all starts.
        dim: The dimension of a plate in which the model gives many draws at once; None if it cannot.
        number: The number of draws.
        sums: In a model that sums over sites, how many dimensions it has on the left of events; else None.
    """

    def __init__(
        self,
        model: Program,
        call: Arguments,
        seed: int,
        dim: int | None,
        number: int,
        *,
        sums: int | None = None,
    ) -> None:
        self.model, self.call, self.seed, self.dim, self.number = model, call, seed, dim, number
        self.sums = sums

    @torch.no_grad()
    def judge(self, guide: Program, simulated: Simulated | None = None) -> Judgement | None:
        """Return the loss of a guide, infinite where it cannot be computed; None if there are no data.

        Args:
            guide: The guide.
            simulated: Values of the observed sites for each draw, ``(draws, *shape)``; None for those of the call.
        """
        args, kwargs = self.call

        def one(data: Simulated) -> Tensor:
            with_data = {**kwargs, "observations": data} if data else kwargs
            drawn = poutine.trace(guide).get_trace(*args, **with_data)
            model = poutine.replay(poutine.condition(self.model, data=dict(data)), trace=drawn)
            return self._each(drawn) - self._each_of_model(model)

        return self._mean(one, simulated or {})

    @torch.no_grad()
    def loss_of_prior(self) -> float:
        """Return the loss of draws from the prior; infinite where there is none."""
        args, kwargs = self.call

        def one(_: Simulated) -> Tensor:
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
            return -self._each(trace, names=trace.observation_nodes)

        found = self._mean(one)
        return math.inf if found is None else found.loss

    @torch.no_grad()
    def loss_at(self, latents: Simulated, data: Simulated) -> float:
        """Return the loss of draws that are these latents for these data, as if they were drawn from the prior."""

        def one(values: Simulated) -> Tensor:
            return -self._each_of_model(poutine.condition(self.model, data=dict(values)), without=latents)

        found = self._mean(one, {**latents, **data})
        return math.inf if found is None else found.loss

    def _each_of_model(self, model: Program, without: Collection[str] = ()) -> Tensor:
        """Return the log-density of the model for each of the draws, ``(draws,)``, perhaps without some sites."""
        args, kwargs = self.call
        if self.sums is not None:
            trace = poutine.trace(enumerated(model, self.sums)).get_trace(*args, **kwargs)
            return sum_of_the_rest(trace, without).reshape(1)
        trace = poutine.trace(model).get_trace(*args, **kwargs)
        for name in without:
            trace.remove_node(name)
        return self._each(trace)

    def _each(self, trace: Any, names: Sequence[str] | None = None) -> Tensor:
        """Return the log-density of some sites of a trace for each of the draws, ``(draws,)``; by default of all."""
        trace.compute_log_prob()
        names = [*trace.observation_nodes, *trace.stochastic_nodes] if names is None else names
        total = torch.zeros(self.number if self.dim is not None else 1, dtype=torch.float64)
        for name in names:
            own = trace.nodes[name]["log_prob"].cpu().to(torch.float64)
            if self.dim is not None and own.dim() >= -self.dim and own.shape[self.dim] == self.number:
                total = total + own.movedim(self.dim, 0).reshape(self.number, -1).sum(-1)
            else:
                total = total + own.sum() / len(total)
        return total

    def _mean(
        self, one: Callable[[Simulated], Tensor], data: Simulated = MappingProxyType({})
    ) -> Judgement | None:
        losses: list[Tensor] = []
        with kept_buffers(self.model), warnings.catch_warnings(), pyro.validation_enabled(False):
            warnings.simplefilter("ignore")  # of losses that are not finite
            pyro.set_rng_seed(self.seed)
            try:
                if self.dim is not None:
                    with pyro.plate("_pyro_graphflows_draws", self.number, dim=self.dim):
                        losses.append(one(data))
                else:
                    for k in range(self.number):
                        losses.append(one({name: value[k] for name, value in data.items()}))
            except UnsupportedModelError:
                return None
            except (ValueError, ArithmeticError, RuntimeError, NotImplementedError):
                return HOPELESS  # draws so far out that the model cannot be evaluated there
        each = torch.cat(losses)
        mean = float(each.mean())
        return Judgement(mean, float(each.var()) / 2) if math.isfinite(mean) else HOPELESS


def choose_start(
    compiled: Compiled,
    samples: Samples,
    build: Callable[..., Candidate],
    judge_start: Callable[..., Judgement | None],
    judge: Judge,
) -> tuple[Candidate, str | None]:
    """Return the best start, and a sentence on the choice; None where there was none to make.

    Args:
        compiled: What the guide is made from.
        samples: Joint samples, or what there is instead.
        build: Makes the guide's blocks start from samples; the second argument is the name of the start, the keyword
            ``curved`` says whether networks may go on from regressions.
        judge_start: Judges a start, for the data of set-up or for simulated data.
        judge: The judge of losses.
    """
    plan, source = compiled.plan, samples.source
    usual = {"joint": "regression", "none": "random"}.get(source, source)

    def build_usual(*, curved: bool = True) -> Candidate:
        built = build(samples, "regression" if source == "none" else usual, curved=curved)
        return replace(built, name=usual)

    def best_way(name: str, built: Candidate, found: Judgement) -> tuple[Candidate, Judgement]:
        """Return a start near the mode, or the same by other draws, or with other factors, if that is better."""
        options: dict[str, Any] = {}

        def chains() -> dict[str, Any]:
            return {"by_chains": True} if samples.draws.has_chains else {}

        def derivatives() -> dict[str, Any]:
            later, followed = (
                _drawn_last(compiled) if found.gap > max(EXACT, NEAR_NUMBER * numbers) else ({}, {})
            )
            factors = samples.draws.joint_factors(later, followed) if later else {}
            return {"factors": factors} if factors else {}

        for way, without, further in ((CHAINS, NORMAL, chains), (SECOND, FIRST, derivatives)):
            more = further()
            if not more:
                continue
            other, of_other = built, HOPELESS
            try:
                other = build(samples.at_mode(plan, **options, **more), name)
                of_other = judge_start(other) or HOPELESS
            except (ValueError, ArithmeticError, RuntimeError) as error:  # of algebra, as above
                reasons.append(f"no start {way}: {error}")
            label, loser = way, of_other
            if of_other.loss < found.loss:
                built, found, label, loser = other, of_other, without, found
                options |= more
            if name == "mode":
                losses[label] = loser.loss
        return built, found

    continuous = all(site.encoding is None for site in compiled.sites.values())
    is_for_these_data = samples.draws.has_data and (bool(plan.inputs.per_element) or source == "none")
    has_one_datum = _has_one_datum(compiled, samples)
    is_amortised = source == "joint" and not is_for_these_data
    own = samples.draws  # of a model that holds its data no call has others
    takes_data = bool(argument_leaves(own.model, own.args, own.kwargs))
    is_left = bool(plan.graph.marginalised) and not (is_for_these_data or has_one_datum)
    if not (continuous or is_for_these_data or has_one_datum) or samples.num_rows == 0 or is_left:
        return build_usual(), None
    names = (
        ("mode", ALONE, usual, BOTH, "prior", "random")
        if is_for_these_data
        else (usual, "mode", "prior", "random")
    )
    nodes: Any = compiled.traced.trace.nodes
    numbers = sum(nodes[name]["value"].numel() for name in compiled.sites)
    near = max(NEAR, NEAR_NUMBER * numbers)
    losses: dict[str, float] = {}
    candidates: dict[str, Candidate] = {}
    best: Candidate | None = None
    least, is_far = math.inf, False
    reasons = []
    for name in names:
        if name in losses or (name == "random" != usual and least < math.inf):
            continue
        if name == "prior" != usual and least < math.inf and (samples.draws.one_by_one or "mode" in losses):
            continue  # it would take as many runs of the model again, or hardly be better
        if name == "mode" and is_amortised and numbers > MOST_NUMBERS:
            reasons.append(
                f"no start at the mode: of {numbers} numbers it is for guides that fit one data set."
            )
            continue
        try:
            if name == usual:
                built = build_usual(curved=not has_one_datum)
            elif name == ALONE:
                if not is_far or not _with_moving_priors(compiled):
                    continue
                built = build(samples.at_mode(plan), name)
            elif name == BOTH:
                better = min(("mode", ALONE), key=lambda each: losses.get(each, math.inf))
                both = _with_amortised_blocks(candidates.get(better), candidates[usual], plan)
                if both is None or usual != "regression":
                    continue
                built = both
            else:
                ways = {"mode": samples.at_mode, "prior": samples.at_prior}
                built = build(ways[name](plan) if name in ways else samples, name)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            if name == usual:
                raise
            reasons.append(f"no start at the {name}: {error}")  # of algebra on draws that suit no regression
            continue
        found = judge_start(built)
        if found is None and name == "mode" and samples.draws.mode_has_more_rows:
            return built, "the start is 'mode', by more rows than those of set-up."
        if found is None:  # no data, or a sum over sites beside the scale of a plate
            return (built if name == usual and not has_one_datum else build_usual()), None
        losses[name] = found.loss
        if name in ("mode", ALONE) and found.loss < least:
            built, found = best_way(name, built, found)
            losses[name] = found.loss
        candidates[name] = built
        if best is None or found.loss < least + (STEADIER if name == BOTH else 0.0):
            if (has_one_datum or is_amortised) and best is not None and takes_data:
                samples.draws.recall(samples.drawn)
                simulated = _simulated(samples.draws, judge.number)
                gain = least - found.loss
                nowhere = NOWHERE * (1 if has_one_datum else samples.draws.most_elements)
                starts = best, built
                is_worth_it, said = _is_worth_it(starts, gain, judge_start, judge, simulated, nowhere)
                reasons.append(said)
                if not is_worth_it:
                    continue
            best, least = built, found.loss
        all_fitted = all(block.per_element for block in plan.blocks)
        is_far = name == "mode" and found.gap > near
        if name in ("mode", ALONE) and is_for_these_data and all_fitted and found.gap <= near:
            break
        if name != usual or is_for_these_data:
            continue
        if has_one_datum:
            is_near = found.gap <= NEAR
        else:  # draws of a wide prior may be worse than any start
            most = NEAR if source == "prior" else NEAR_EACH  # the prior follows no data
            is_near = found.gap <= most * samples.draws.most_elements
            is_near = is_near and found.loss <= judge.loss_of_prior() + MARGIN
        if is_near:
            break
    assert best is not None
    if has_one_datum and any(map(_can_bend, candidates[usual].blocks)):
        curved = build_usual()
        of_curved = judge_start(curved) or HOPELESS
        is_better = of_curved.loss < least
        if not is_better and best.name == usual and of_curved is not HOPELESS:
            samples.draws.recall(samples.drawn)
            simulated, starts = _simulated(samples.draws, judge.number), (best, curved)
            is_better, _ = _is_worth_it(
                starts, least - of_curved.loss, judge_start, judge, simulated, NOWHERE
            )
        if is_better:
            best, losses[usual] = curved, of_curved.loss
    return best, " ".join([_sentence(best, losses), *reasons])


_ByName = dict[str, tuple[str, ...]]


def _drawn_last(compiled: Compiled) -> tuple[_ByName, _ByName]:
    """Return, for fused sites of numbers with parameters for each or each pair, what is drawn later, and followed.

    They are those that no latent site follows in the model: given all that is drawn before, what data say of them and
    of what is drawn later is a function of their values alone. What is drawn later is in no plate, an intercept, say:
    the factor of effects of rows without those of columns would follow the scales of both. So is what they follow.
    """
    plan, sites = compiled.plan, compiled.sites
    levels = [level for block in plan.blocks for level in block.levels]
    above = {parent for site in plan.graph.latent for parent in plan.graph.parents(site)}
    found: _ByName = {}
    followed: _ByName = {}
    for block in plan.blocks:
        for site in block.fused:
            pairs = not block.coupled[site].rank if site in block.coupled else site in block.per_element
            at = next(i for i, level in enumerate(levels) if site in level)
            rest = tuple(other for level in levels[at:] for other in level if other != site)
            alone = not any(plan.graph.plates.get(other) for other in rest)
            in_order = all(compiled.plates[name].indices is None for name in block.plates)
            single = compiled.sites[site].size == 1
            if single and pairs and block.plates and alone and in_order and above.isdisjoint((site, *rest)):
                found[site] = rest
                first = [other for level in levels[:at] for other in level]
                free = [other for other in first if other not in above and not plan.graph.plates.get(other)]
                seen = {node.name for node in block.context}.intersection(block.parents[site])
                followed[site] = tuple(other for other in free if other in seen and sites[other].is_real)
    return found, followed


def _has_one_datum(compiled: Compiled, samples: Samples) -> bool:
    """Whether sites read data, and these are one datum: none of it is in a plate, or may be missing."""
    graph, draws = compiled.plan.graph, samples.draws
    in_plates = any(graph.plates.get(name) for name in graph.observed)
    whole = draws.has_data and not draws.encodings.partly and not compiled.reader.optional
    return samples.source == "joint" and whole and not in_plates


def _simulated(draws: ModelDraws, number: int) -> tuple[Simulated, Simulated]:
    """Return latents and data of joint samples, ``(number, *shape)`` each; none if fewer are finite."""
    names = draws.traced.graph.observed
    most = MOST_SIMULATED * number
    parts = draws.latent_values(most), draws.observed_values(most, names)
    if len(parts[1]) < len(names):
        return {}, {}
    finite = finite_rows(
        *(in_float64(value).reshape(len(value), -1) for part in parts for value in part.values())
    )
    if int(finite.sum()) < number:
        return {}, {}
    latents, data = ({name: value[finite][:number] for name, value in part.items()} for part in parts)
    return latents, data


def _is_worth_it(
    starts: tuple[Candidate, Candidate],
    gain: float,
    judge_start: Callable[..., Judgement | None],
    judge: Judge,
    simulated: tuple[Simulated, Simulated],
    nowhere: float,
) -> tuple[bool, str]:
    """Say whether the second start gains more for the data of set-up than it costs for simulated data, and the losses.

    Losses for simulated data are compared with that of the very latents from which the data were simulated: the best
    guide is no further from it than by what the data say of the latents.

    Args:
        starts: Two starts.
        gain: What the second gains.
        judge_start: Judges starts.
        judge: The judge of losses.
        simulated: Latents and data; none if there are no finite ones.
        nowhere: How many nats off is as bad as more.
    """
    if not simulated[1]:
        return True, "There are too few joint samples with finite data to compare starts by."
    truth = judge.loss_at(*simulated)
    found = [judge_start(each, simulated[1]) or HOPELESS for each in starts]
    off = [each.loss - truth for each in found]
    before, after = (min(each, nowhere) if math.isfinite(each) else nowhere for each in off)
    is_worth_it = after - before < min(gain, nowhere)
    said = ", ".join(f"{start.name} {each.loss:.5g}" for start, each in zip(starts, found, strict=True))
    other = starts[0 if is_worth_it else 1].name
    return is_worth_it, f"For data that the model simulates: {said}; init={other!r} takes the other one."


def _with_amortised_blocks(mode: Candidate | None, regression: Candidate, plan: Plan) -> Candidate | None:
    """Return the start near the mode with the regressions of the blocks that read data; None if that is neither.

    Near the mode, the data of each element are one point, and draws say little of how a factor should follow them.
    """
    fitted = [bool(block.per_element) for block in plan.blocks]
    if mode is None or all(fitted) or not any(fitted):
        return None
    pairs = zip(fitted, mode.blocks, regression.blocks, strict=True)
    chosen = nn.ModuleList(near if own else far for own, near, far in pairs)
    moments = tuple(
        near if own else far for own, near, far in zip(fitted, mode.moments, regression.moments, strict=True)
    )
    notes = tuple(dict.fromkeys((*mode.notes, *regression.notes)))
    return Candidate(BOTH, chosen, notes, mode.note, moments)


def _sentence(chosen: Candidate, losses: dict[str, float]) -> str:
    others = ", ".join(f"{name} {loss:.5g}" for name, loss in losses.items() if name != chosen.name)
    than = f" ({others})" if others else ""
    return f"the start is {chosen.name!r}, with a loss of {losses[chosen.name]:.5g} nats for the data of set-up{than}."
