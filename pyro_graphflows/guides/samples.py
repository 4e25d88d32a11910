"""Joint samples of the model when a guide is set up, drawn once whoever asks, and put side by side.

They are flat vectors, unconstrained where a site is latent, classes as indicators, ``(draws, *batch, size)``, as the
guide's networks see them. The search for a smooth order (:mod:`~pyro_graphflows.guides.orders`) and the start of
the networks (:mod:`~pyro_graphflows.guides.start`) use the same ones. Where the model cannot be sampled, the data of
the call are all that is known.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.guides.all_rows import Place, find_place
from pyro_graphflows.guides.call import PlateState, argument_in_trace, input_rows, plates_of
from pyro_graphflows.guides.discrete_mode import DiscreteMode
from pyro_graphflows.guides.mode import Mode
from pyro_graphflows.guides.plan import BlockPlan, Plan
from pyro_graphflows.guides.second_derivatives import joint_factors
from pyro_graphflows.guides.sites import InputEncodings, JointFactor, LatentSite, flatten_event, is_constant
from pyro_graphflows.inspect import (
    IMPROPER,
    Batching,
    TracedModel,
    find_batching,
    get_argument,
    same_tensor,
    sample_prior,
    undressed,
)
from pyro_graphflows.inspect.arguments import argument_leaves, replaced_arguments
from pyro_graphflows.inspect.prior import nesting_of_sites, unconstrained_of
from pyro_graphflows.inspect.runs import quiet_run, random_sites, run_model

__all__ = ["MOST_ROWS", "ModelDraws", "Samples", "columns_of", "evidence_of", "side_by_side", "with_depth"]

MOST_ROWS = 200_000  # in the block with the most elements, for a joint sample
MOST_POOLED_ROWS = 500_000  # the same where plates are pooled: a whole data set is one sample
MOST_NUMBERS = 20_000_000  # in all joint samples together, as the data of one can be many
MOST_PROBABILITIES = 100_000_000  # of the classes of one site, in all of them
FEWEST_DRAWS = 200  # even so
MOST_BATCHES = 32  # of the rows of subsampled plates
BATCH = ": batch of rows"  # the column of samples that says by which of them each was drawn
NO_SAMPLES = "no regression start and no standardisation of latents: "
AT_PRIOR = "no regression start: the latents start at their prior. "
DRAWS_NEAR_MODE = 5000  # at least: half the number of weights over that of draws is lost, at each element
FEWEST_OF_A_BATCH = 10  # joint samples; with fewer there is one batch
# Where each joint sample takes a run of the model: as many of these as there is time for.
SINGLE_RUNS = (1000, 500, 250, 100)
SECONDS_OF_RUNS = 5.0


def _num_probabilities(site: Any) -> int:
    """Return how many numbers it takes to draw the values of a node of a trace, where these have classes."""
    fn = undressed(site["fn"]) if site["type"] == "sample" else None
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        return int(fn.component_distribution.batch_shape.numel() * fn.event_shape.numel())
    if isinstance(fn, torch.distributions.Categorical | torch.distributions.OneHotCategorical):
        return int(fn.param_shape.numel())
    return 0


class ModelDraws:
    """The data of one call, and joint samples of the model of that call, kept for whoever asks next.

    Args:
        model: The model.
        args: The positional arguments of the call.
        kwargs: Its keyword arguments.
        traced: The model as traced with them.
        sites: The latent sites.
        encodings: How conditioning values are written.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        traced: TracedModel,
        sites: Mapping[str, LatentSite],
        encodings: InputEncodings,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.traced, self.sites, self.encodings = traced, sites, encodings
        # supports that may differ from sample to sample
        self._moving = [n for n, site in sites.items() if not site.encoding and not is_constant(site.support)]
        self._row_batches: list[dict[str, Tensor]] = []  # by whose rows of plates joint samples were drawn
        self._kept: dict[str, Tensor] = {}
        self._num_kept = 0
        self._last: Mapping[str, Tensor] = {}
        self._batchings: dict[bool, Batching] = {}  # of joint samples, and of the latents alone
        self._mode: Place | UnsupportedModelError | None = None
        self._most_single_runs: int | None = None
        self._factors: dict[str, JointFactor] | None = None
        self._plates = plates_of(traced.trace)
        nodes: Any = traced.trace.nodes
        size = sum(site["value"].numel() for site in nodes.values() if torch.is_tensor(site.get("value")))
        classes = max((_num_probabilities(site) for site in nodes.values()), default=0)
        self._most_draws = max(
            FEWEST_DRAWS, min(MOST_NUMBERS // max(1, size), MOST_PROBABILITIES // max(1, classes))
        )

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device that parameters should have: the first of the widest type."""
        found: list[Any] = [site.get("value") for site in self.traced.trace.nodes.values()]
        floats = [value for value in found if _is_float(value)]
        return max(floats, key=lambda value: value.dtype.itemsize, default=torch.zeros(()))

    @property
    def most_elements(self) -> int:
        """The most elements that a site has in its plates."""
        nodes: Any = self.traced.trace.nodes
        sizes = [
            len(plate.indices) if plate.indices is not None else plate.size for plate in self._plates.values()
        ]
        shapes = [
            torch.Size(nodes[name]["fn"].batch_shape).numel()
            for name in self.encodings.event_dims
            if name in nodes
        ]
        return max([1, *sizes, *shapes])

    @property
    def has_data(self) -> bool:
        """Whether all observed sites of the model have values in this call."""
        nodes: Any = self.traced.trace.nodes
        return all(nodes[name]["is_observed"] for name in self.traced.graph.observed if name in nodes)

    @property
    def takes_plates(self) -> bool:
        """Whether the model, as far as it was drawn from, gives many draws in an outermost plate."""
        joint = self._batchings.get(False)
        return joint is not None and joint.way == "plate"

    @property
    def one_by_one(self) -> bool:
        """Whether each joint sample takes a run of the model."""
        joint = self._batchings.get(False)
        return joint is not None and joint.way == "single"

    def argument(self, name: str) -> Tensor:
        """Return the value of an input, row for row of the plates of the call."""
        path = self.traced.argument_paths[name]
        value = argument_in_trace(self.model, path, self.args, self.kwargs, self.traced.trace)
        return input_rows(self.traced, name, value, self._plates)

    def data(self, name: str) -> Tensor:
        """Return the conditioning value of an observed site or an input in this call."""
        if name in self.traced.event_dims:
            return self.encodings.input_value(name, self.argument(name))
        nodes: Any = self.traced.trace.nodes
        return self._conditioning(name, nodes[name]["value"])

    def _conditioning(self, name: str, value: Tensor) -> Tensor:
        """Return a value of a node as the guide conditions on it: of partly observed sites with the mask."""
        if name not in self.encodings.partly:
            return value
        nodes: Any = self.traced.trace.nodes
        return self.encodings.masked_value(name, value, nodes[name]["mask"])

    def _draw(self, num_samples: int, batching: Batching) -> dict[str, Tensor]:
        """Return joint samples; of plates whose rows the model takes from full data, of many batches of rows."""
        batches = self._batches()
        each = -(-num_samples // len(batches)) if batches else num_samples
        if each < FEWEST_OF_A_BATCH or not batches:
            return sample_prior(
                *(self.model, self.args, self.kwargs),
                num_samples=num_samples,
                batching=batching,
            )
        parts: dict[str, list[Tensor]] = {}
        for indices in batches:
            args, kwargs = self._with_rows(indices)
            drawn = sample_prior(
                *(self.model, args, kwargs),
                num_samples=each,
                batching=replace(batching, indices=indices),
            )
            plates = {
                name: replace(plate, indices=indices.get(name, plate.indices))
                for name, plate in self._plates.items()
            }
            for name in self.traced.graph.inputs:
                value = get_argument(self.model, self.traced.argument_paths[name], args, kwargs)
                value = self.encodings.input_value(name, input_rows(self.traced, name, value, plates))
                drawn[name] = value.expand(each, *value.shape)
            drawn[BATCH] = torch.full((each,), len(self._row_batches))
            self._row_batches.append(indices)
            for name, value in drawn.items():
                parts.setdefault(name, []).append(value)
        mixed = torch.randperm(each * len(batches))[:num_samples]
        return {name: torch.cat(values)[mixed.to(values[0].device)] for name, values in parts.items()}

    def _batches(self) -> list[dict[str, Tensor]]:
        """Return indices of many batches of the subsampled plates, that at set-up among them; none where no rows vary.

        One batch may hold few values of a covariate, or one; the full data are there to see more.
        """
        nodes: Any = self.traced.trace.nodes
        partial = {name: plate for name, plate in self._plates.items() if plate.subsampled}
        taken = {plate for rows in self.traced.taken.values() for plate in rows.values()}
        rows = {
            name: plate.indices
            for name, plate in partial.items()
            if name in taken and plate.indices is not None
        }
        can_vary = all(
            nodes[name]["fn"].subsample_size or self._indices_argument(name) is not None for name in partial
        )
        if not rows or not can_vary or self.traced.loops or self.traced.index_inputs or self.encodings.partly:
            return []
        number = min(MOST_BATCHES, max(-(-partial[name].full_size // partial[name].size) for name in rows))
        batches = [rows]
        for _ in range(number - 1):
            batches.append(
                {
                    name: torch.randperm(partial[name].full_size)[: partial[name].size].to(indices)
                    for name, indices in rows.items()
                }
            )
        return batches

    def _indices_argument(self, plate: str) -> Tensor | None:
        """Return the argument that holds the indices of a plate."""
        nodes: Any = self.traced.trace.nodes
        leaves = argument_leaves(self.model, self.args, self.kwargs).values()
        return next((leaf for leaf in leaves if same_tensor(leaf, nodes[plate]["value"])), None)

    def _with_rows(self, indices: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the call with other indices where the caller gave some."""
        given = {name: self._indices_argument(name) for name in indices}
        replaced = {id(leaf): indices[name] for name, leaf in given.items() if leaf is not None}
        return replaced_arguments(self.args, self.kwargs, replaced)

    @property
    def last(self) -> Mapping[str, Tensor]:
        """The samples drawn last, as the model has them."""
        return self._last

    def recall(self, samples: Mapping[str, Tensor]) -> None:
        """Let samples that were drawn before be the last."""
        self._last = samples

    def by_rows(
        self, number: int
    ) -> Iterator[tuple[Tensor | slice, tuple[tuple[Any, ...], dict[str, Any]], dict[str, Tensor]]]:
        """Yield which of the samples drawn last are by the same rows, the arguments for these, and the rows.

        Args:
            number: How many of the samples are looked at.
        """
        if BATCH not in self._last:
            yield slice(0, number), (self.args, self.kwargs), {}
            return
        of_batch = self._last[BATCH][:number]
        for batch in of_batch.unique().tolist():
            indices = self._row_batches[batch]
            yield (of_batch == batch).nonzero()[:, 0], self._with_rows(indices), indices

    def latent_values(self, number: int) -> dict[str, Tensor]:
        """Return the values of the latent sites, as the model has them, in the first of the samples drawn last."""
        return {name: self._last[name][:number] for name in self.sites}

    def observed_values(self, number: int, names: Collection[str]) -> dict[str, Tensor]:
        """Return the values of observed sites in the first of the samples drawn last, where they were drawn.

        Args:
            number: How many.
            names: The nodes that are asked about.
        """
        observed = self.traced.graph.observed
        return {name: self._last[name][:number] for name in names if name in observed and name in self._last}

    @property
    def note(self) -> str | None:
        """A sentence for the user if each joint sample took a run of its own."""
        single = [each for each in self._batchings.values() if each.way == "single"]
        if not single:
            return None
        most = self._most_single_runs or SINGLE_RUNS[0]
        return (
            f"set-up is slow and has no more than {most} joint samples, since each takes a run of the model: "
            f"{single[0].reason}."
        )

    def raw(self, num_samples: int) -> dict[str, Tensor]:
        """Return joint samples as the model drew them, the first of those that :meth:`draw` keeps.

        Args:
            num_samples: How many.
        """
        self.draw(num_samples)
        return {name: value[:num_samples] for name, value in self._kept.items()}

    def _single_runs(self, model: Callable[..., Any]) -> int:
        """Return how many joint samples are drawn one by one: fewer where a run is slow, and never more than wanted."""
        seconds = []
        for _ in range(3):
            begin = time.thread_time()
            with quiet_run(model), torch.no_grad():
                run_model(model, self.args, self.kwargs)
            seconds.append(time.thread_time() - begin)
        return next((n for n in SINGLE_RUNS if n * min(seconds) <= SECONDS_OF_RUNS), SINGLE_RUNS[-1])

    def draw(self, num_samples: int, *, keep: bool = True, latents_only: bool = False) -> dict[str, Tensor]:
        """Return joint samples of all latent sites and of the nodes that can be network inputs.

        They are drawn if fewer are kept from before; the random state is then used and advanced.

        Args:
            num_samples: How many; fewer are drawn where so many would fill the memory, as data are drawn with them.
            keep: Whether they are kept for whoever asks next; those of latents alone never are.
            latents_only: Whether to draw latent sites from their priors and leave observed ones at the data of this
                call; that takes no more than proper priors. Factors, masks and scales of the data do not count then.

        Raises:
            UnsupportedModelError: If samples of the model would not be what the model's density says.
        """
        samples = self._kept
        model, traced = _latents_of(self.model, self.traced) if latents_only else (self.model, self.traced)
        if latents_only not in self._batchings:
            # that of the whole model: data that are hidden from us are not from it
            nesting = nesting_of_sites(random_sites(self.traced.trace))
            found = find_batching(model, self.args, self.kwargs, traced=traced, nesting=nesting)
            moving = [
                n for n, site in self.sites.items() if not site.encoding and not is_constant(site.support)
            ]
            self._batchings[latents_only] = replace(found, unconstrained=moving)
        batching = self._batchings[latents_only]
        num_samples = min(num_samples, self._most_draws)
        if batching.way == "single" and num_samples > SINGLE_RUNS[-1]:
            if self._most_single_runs is None:
                self._most_single_runs = self._single_runs(model)
            num_samples = min(num_samples, self._most_single_runs)
        if latents_only:
            samples = sample_prior(
                *(model, self.args, self.kwargs),
                num_samples=num_samples,
                batching=batching,
            )
        elif num_samples > self._num_kept:
            samples = self._draw(num_samples, batching)
            if keep:
                self._kept, self._num_kept = samples, num_samples
        self._last = samples
        return self._flat({name: value[:num_samples] for name, value in samples.items()}, num_samples)

    def near_mode(self, num_samples: int, by_chains: bool = False) -> dict[str, Tensor]:
        """Return draws of all latent sites near the posterior's mode for the data of this call, beside these data.

        The mode is searched for once (:mod:`~pyro_graphflows.guides.mode`).

        Args:
            num_samples: How many; fewer are drawn where so many would fill the memory.
            by_chains: Whether to return what short chains from there have visited (:attr:`has_chains`).

        Raises:
            UnsupportedModelError: If no mode was found.
        """
        if self._mode is None:
            try:
                self._mode = find_place(self.model, self.args, self.kwargs, self.traced)
            except UnsupportedModelError as error:
                self._mode = error
            except (RuntimeError, ValueError, ArithmeticError) as error:  # of the model, at values far out
                self._mode = UnsupportedModelError(f"the search for a mode failed: {error}")
        if isinstance(self._mode, UnsupportedModelError):
            raise self._mode
        values = self._mode.draw(min(num_samples, self._most_draws), by_chains)
        self._last = values
        return self._flat(values, len(next(iter(values.values()))))

    @property
    def _found(self) -> Any:
        """What the search for a mode has found; None if nothing, or before it."""
        return self._mode.mode if isinstance(self._mode, Place) else None

    @property
    def note_of_mode(self) -> str | None:
        """A sentence on the rows that the search for a mode took, where there is one to say."""
        return self._mode.note if isinstance(self._mode, Place) else None

    @property
    def has_chains(self) -> bool:
        """Whether the search for a mode has run short chains."""
        return isinstance(self._found, Mode | DiscreteMode) and self._found.visited is not None

    def joint_factors(
        self, later: Mapping[str, Collection[str]], followed: Mapping[str, Collection[str]]
    ) -> dict[str, JointFactor]:
        """Return the joint factors of sites that second derivatives near the mode give; none before a search for it.

        Args:
            later: The sites, none with a latent child; for each, those that are drawn after it, likewise.
            followed: For each the real sites that its location may follow, likewise.
        """
        found, place = self._found, self._mode
        if not isinstance(found, Mode) or not isinstance(place, Place) or place.rows:
            return {}
        if self._factors is None:
            try:
                self._factors = joint_factors(found, later, followed)
            except (RuntimeError, ValueError, ArithmeticError):  # of the model, at values far out
                self._factors = {}
        return self._factors

    @property
    def is_near_mode(self) -> bool:
        """Whether the posterior is about the normal that the search for a mode has found."""
        return isinstance(self._found, Mode) and self._found.is_near

    @property
    def mode_has_more_rows(self) -> bool:
        """Whether draws near the mode are by more rows of plates than those of the call."""
        return isinstance(self._found, Mode) and self._found.posterior.has_more_rows

    def _flat(self, samples: Mapping[str, Tensor], num_samples: int) -> dict[str, Tensor]:
        """Return samples as flat vectors, with the data of the call where nodes have no samples."""
        flat = {}
        for name, site in self.sites.items():
            if site.encoding is not None:
                flat[name] = site.encoding.encode(samples[name], torch.get_default_dtype())
                continue
            raw = samples.get(unconstrained_of(name)) if name in self._moving else None
            if raw is None:
                raw = biject_to(site.support).inv(samples[name])
            flat[name] = flatten_event(raw, len(site.unconstrained_shape))
        for name, event_dim in self.encodings.event_dims.items():
            if name in samples:
                flat[name] = self.encodings.flat(name, self._conditioning(name, samples[name]))
            else:
                value = self.data(name)
                flat[name] = flatten_event(value, event_dim).expand(
                    num_samples, *value.shape[: value.dim() - event_dim], -1
                )
        return flat


@dataclass(frozen=True)
class Samples:
    """What blocks are made from: samples in numbers that suit a plan, or the data of one call alone.

    They are joint samples of the model; where there are none, or for other starts, the latents' prior beside the data
    of the call, or draws near the posterior's mode beside them.

    Attributes:
        draws: The model, its call, and its draws.
        plates: The plates of the call.
        standardize: Whether network inputs and outputs are standardised.
        num_rows: The number of rows that each block should have.
        values: Joint samples by site, conditioning node and summary; None where there are none.
        rows: Of the nodes of one block, one row for each draw and each element of the plates.
        note: Why there are none, or few.
        source: ``"joint"``, ``"prior"``, ``"mode"`` or ``"none"``.
        drawn: The same as the model has them.
        factors: The joint factors of sites, where they are known from elsewhere.
    """

    draws: ModelDraws
    plates: Mapping[str, PlateState]
    standardize: bool
    num_rows: int
    values: Mapping[str, Tensor] | None = None
    rows: Mapping[str, Tensor] | None = None
    note: str | None = None
    source: str = "none"
    drawn: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, JointFactor] = field(default_factory=dict)

    @classmethod
    def for_plan(
        cls,
        draws: ModelDraws,
        plan: Plan,
        plates: Mapping[str, PlateState],
        *,
        standardize: bool,
        num_rows: int,
    ) -> "Samples":
        """Draw joint samples for a plan, or say why there are none.

        Args:
            draws: The model and its call.
            plan: The plan.
            plates: The plates of the call.
            standardize: Whether network inputs and outputs are standardised.
            num_rows: The number of rows that each block should have; none are drawn for 0.
        """
        values, note, source = None, None, "none"
        if num_rows:
            try:
                values, source = (
                    draws.draw(_number_of_draws(plan.blocks, plates, num_rows, draws.most_elements)),
                    "joint",
                )
                note = draws.note
            except UnsupportedModelError as error:
                reason = str(error)
                try:
                    values = draws.draw(
                        _number_of_draws(plan.blocks, plates, num_rows, draws.most_elements),
                        latents_only=True,
                    )
                    source = "prior"
                    note = f"{AT_PRIOR}{reason}"
                except UnsupportedModelError as improper:
                    note = f"{NO_SAMPLES}{improper}"
        return cls(draws, plates, standardize, num_rows, values, note=note, source=source, drawn=draws.last)

    def at_prior(self, plan: Plan) -> "Samples":
        """Return draws of the latents from their prior instead, beside the data of the call.

        Raises:
            UnsupportedModelError: If a prior is improper.
        """
        number = _number_of_draws(plan.blocks, self.plates, self.num_rows, self.draws.most_elements)
        values = self.draws.draw(number, latents_only=True)
        return replace(self, values=values, note=None, source="prior", drawn=self.draws.last)

    def at_mode(
        self,
        plan: Plan,
        by_chains: bool = False,
        factors: Mapping[str, JointFactor] = MappingProxyType({}),
    ) -> "Samples":
        """Return draws near the mode of the posterior for the data of the call instead, beside these data.

        Args:
            plan: The plan.
            by_chains: Whether they are those that short chains have visited (:attr:`ModelDraws.has_chains`).
            factors: Joint factors that sites are to have, whatever the draws say.

        Raises:
            UnsupportedModelError: If no mode was found.
        """
        # elements with maps of their own have a regression each
        number = max(
            _number_of_draws(plan.blocks, self.plates, self.num_rows, self.draws.most_elements),
            DRAWS_NEAR_MODE,
        )
        values = self.draws.near_mode(number, by_chains)
        is_amortised = not plan.inputs.per_element
        note = self.note if self.source == "none" or (self.source == "prior" and is_amortised) else None
        if note is not None:
            of_model = "no regression start on samples of the model: "
            note = note.replace(NO_SAMPLES, of_model).replace(AT_PRIOR, of_model)
        note = " ".join(filter(None, (note, self.draws.note_of_mode))) or None
        return replace(self, values=values, note=note, source="mode", drawn=self.draws.last, factors=factors)

    def with_values(self, more: Mapping[str, Tensor]) -> "Samples":
        """Return the same with the values of summaries."""
        return self if self.values is None else replace(self, values={**self.values, **more})

    def for_block(self, names: Sequence[str]) -> "Samples":
        """Return the same with rows of some nodes, a random part where there are many more than are wanted."""
        if self.values is None:
            return self
        rows = side_by_side(self.values, names)
        found = len(next(iter(rows.values())))
        if found > 2 * self.num_rows:
            chosen = torch.randperm(found)[: self.num_rows]
            rows = {name: value[chosen] for name, value in rows.items()}
        return replace(self, rows=rows)

    def aligned(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return joint samples of some nodes, plates apart, with as many batch dimensions each."""
        return _at_one_depth(self.values or {}, names)


def columns_of(site: str) -> tuple[str, str]:
    """Return the names of a fused site's columns beside samples: its prior, its value in the coordinate of that."""
    return f"{site}: prior", f"{site}: coordinate"


def evidence_of(site: str) -> str:
    """Return the name of the column of what elements of a plate say of a site, beside samples."""
    return f"{site}: elements"


def _latents_of(model: Callable[..., Any], traced: TracedModel) -> tuple[Callable[..., Any], TracedModel]:
    """Return a model in which only latent sites are seen, with proper priors, and what is traced of it."""
    trace = traced.trace.copy()
    hidden = [
        name for name, site in traced.trace.nodes.items() if site["type"] == "sample" and site["is_observed"]
    ]
    for name in hidden:
        trace.remove_node(name)
    improper = {
        name: reason
        for name, reason in traced.not_generative.items()
        if name in traced.graph.latent and reason == IMPROPER
    }
    return poutine.block(model, hide=hidden), replace(traced, trace=trace, not_generative=improper)


def _number_of_draws(
    blocks: Sequence[BlockPlan], plates: Mapping[str, PlateState], wanted_rows: int, elements: int
) -> int:
    """Return enough joint samples that each block has its rows, and not so many that the largest block fills memory.

    Args:
        blocks: The blocks.
        plates: The plates.
        wanted_rows: How many rows each block should have.
        elements: The most elements that a site has: as many are pooled for each joint sample.
    """
    copies = []
    for block in blocks:
        copies.append(1)
        for name in block.plates:
            copies[-1] *= plates[name].size
    wanted = -(-wanted_rows // min(copies))
    if any(block.non_exchangeable for block in blocks):  # a regression for each index
        wanted = max(wanted, wanted_rows // 10)
    if any(node.summary for block in blocks for node in block.context):
        return max(2, min(wanted, -(-MOST_POOLED_ROWS // elements)))
    affordable = -(-MOST_ROWS // max(copies))
    return max(2, min(wanted, affordable))


def side_by_side(samples: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return one row for each draw and each element of the plates of some nodes, ``(rows, size)`` each."""
    aligned = _at_one_depth(samples, names)
    shape = np.broadcast_shapes(*(value.shape[:-1] for value in aligned.values()))
    return {
        name: value.expand(*shape, value.shape[-1]).reshape(-1, value.shape[-1])
        for name, value in aligned.items()
    }


def _at_one_depth(samples: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return samples of some nodes with as many batch dimensions each, so that they broadcast."""
    chosen = {name: samples[name] for name in names}
    depth = max((value.dim() for value in chosen.values()), default=2) - 2
    return {name: with_depth(value, depth) for name, value in chosen.items()}


def with_depth(value: Tensor, depth: int) -> Tensor:
    """Put dimensions of size one behind the first, of the draws, so that there are ``depth`` others before the last."""
    missing = depth + 2 - value.dim()
    return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])


def _is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point() and value.numel() > 0
