"""The guide: an AutoGuide whose conditionals follow a faithful inverse of the model's Bayesian network.

set-up:  compile_guide(model, *args)  →  plan  →  joint samples  →  blocks, each with its start
a call:  read it; for each block, level by level: conditionals, emitted at their sites
"""

import copy
import logging
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.guides.answers import expanded_in_plates, quantiles_of, sum_of_terms
from pyro_graphflows.guides.block import GuideBlock, ShownParameters
from pyro_graphflows.guides.call import Call, CallReader, PlateState, chosen_indices, site_mask
from pyro_graphflows.guides.captured_call import CapturedCalls
from pyro_graphflows.guides.compile import Compiled, GuideOptions, compile_guide, make_family
from pyro_graphflows.guides.conditionals.contract import Family, Pass
from pyro_graphflows.guides.conditionals.distributions import (
    CopiedValue,
    DrawnOrGiven,
    Scores,
    centre_of,
    site_distribution,
)
from pyro_graphflows.guides.conditionals.elements import (
    WithNewElements,
    beyond_fitted,
    grown_plates,
    require_model_conditionals,
)
from pyro_graphflows.guides.conditionals.factors import Factor
from pyro_graphflows.guides.conditionals.model_conditionals import ModelConditionals
from pyro_graphflows.guides.conditionals.pooling import DeepSet
from pyro_graphflows.guides.description import Description, describe
from pyro_graphflows.guides.files import write_guide
from pyro_graphflows.guides.fitted_data import CallData, FittedData
from pyro_graphflows.guides.orders import Inverse
from pyro_graphflows.guides.plan import Plan
from pyro_graphflows.guides.priors import PriorReader
from pyro_graphflows.guides.samples import Samples
from pyro_graphflows.guides.scores import ScoreReader
from pyro_graphflows.guides.sites import LatentSite, SitePrior, is_constant, require_inside
from pyro_graphflows.guides.start import Trial, start_guide
from pyro_graphflows.guides.transport import Transport
from pyro_graphflows.infer.posterior import Posterior, sample_posterior
from pyro_graphflows.inspect import kept_random_state, with_hints
from pyro_graphflows.inspect.arguments import argument_leaves, replaced_arguments

__all__ = ["AutoFaithfulGuide", "auto_faithful_guide"]

logger = logging.getLogger(__name__)

Emit = Callable[..., Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class AutoFaithfulGuide(AutoGuide):
    """A guide whose conditionals follow an inverse of the model's Bayesian network.

    The guide is compiled on its first call or by :meth:`setup`: the model's trace becomes a graph, the graph is
    inverted, and the inverse becomes blocks of sites with conditionals each
    (:mod:`~pyro_graphflows.guides.plan`). Called with the model's arguments, it reads the observed values and
    samples every latent site on its own name, in the model's plates, level by level.

    Args:
        model: The model.
        family: See :func:`auto_faithful_guide`, also for all other options.
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`: a function of the model's arguments
            that returns plates that exist already, for subsampling.

    Raises:
        GraphflowsError: If an option has an unknown value.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = AutoFaithfulGuide(model, family="flow").setup(torch.zeros(10))
        >>> guide.median(torch.zeros(7))["z"].shape
        torch.Size([7])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        family: str | Family | type[Factor] = "auto",
        inverse: Inverse = "auto",
        pool: str | DeepSet | None = None,
        init: str = "auto",
        factors: Mapping[str, type[Factor] | Family] = MappingProxyType({}),
        standardize: bool = True,
        num_start_samples: int = 10_000,
        strict: bool = True,
        resolution: str = "auto",
        rank: int | None = None,
        budget: int | None = None,
        coupled_rank: int | None = None,
        enumerate_sites: bool | Collection[str] = False,
        init_values: Mapping[str, Tensor] = MappingProxyType({}),
        setup_seed: int = 0,
        optional: Sequence[str] = (),
        features: str = "raw",
        embedding: Mapping[str, nn.Module | str] = MappingProxyType({}),
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        self._options = GuideOptions(
            family=make_family(family),
            inverse=inverse,
            pool=pool,
            init=init,
            factors=factors,
            standardize=standardize,
            num_start_samples=num_start_samples,
            strict=strict,
            resolution=resolution,
            rank=rank,
            budget=budget,
            coupled_rank=coupled_rank,
            enumerate_sites=enumerate_sites,
            init_values=init_values,
            setup_seed=setup_seed,
            optional=optional,
            features=features,
            embedding=embedding,
        )
        self._plan: Plan | None = None
        self._notes: tuple[str, ...] = ()
        self._start_notes: tuple[str, ...] = ()
        self._served: set[frozenset[str]] = {frozenset()}
        self._fitted: FittedData | None = None
        self._is_fitting = False
        self._warned: set[str] = set()
        self._shown = ShownParameters()
        self._captured: CapturedCalls | None = None  # made by the first call
        self._setup_call: Arguments | None = None
        self._sites: dict[str, LatentSite]
        self._reader: CallReader
        self._priors: PriorReader | None = None
        self._plate_states: dict[str, PlateState]
        self.blocks: nn.ModuleList
        self.scores: ScoreReader | None = None

    # ---------------------------------------------------------------- set-up

    def setup(self, *args: Any, **kwargs: Any) -> "AutoFaithfulGuide":
        """Compile the guide with the arguments of a typical call, and create its parameters.

        Args:
            *args: Positional arguments of the model.
            **kwargs: Keyword arguments of the model.

        Returns:
            The guide itself.

        Raises:
            UnsupportedModelError: If the model's structure cannot be traced, or the guide cannot represent it.

        Warns:
            GraphflowsWarning: If latents stay dependent across a plate in the posterior and are independent in the
                guide. The message names them, and what to do.
        """
        options, begin = self._options, time.perf_counter()
        with poutine.block(), kept_random_state():
            compiled = compile_guide(self.model, args, kwargs, options)
            inverse = compiled.plan.inverse
            logger.info(
                "Traced the model: %d latent sites; inverse with %d edges in %d levels (%.2f s).",
                len(compiled.sites),
                inverse.num_edges,
                len(inverse.levels),
                time.perf_counter() - begin,
            )
            samples = Samples.for_plan(
                compiled.draws,
                compiled.plan,
                compiled.plates,
                standardize=options.standardize,
                num_rows=options.num_rows,
            )
            self.scores = compiled.scores
            self._plan, self._sites, self._reader = compiled.plan, compiled.sites, compiled.reader
            self._plate_states = compiled.plates
            self._priors = None
            self._setup_call = args, kwargs
            self.prototype_trace = compiled.traced.trace
            self._prototype_frames = {
                frame.name: frame
                for name in compiled.sites
                for frame in compiled.traced.trace.nodes[name]["cond_indep_stack"]
                if frame.vectorized
            }
            self._fitted = None
            chosen, choice = start_guide(compiled, samples, options, _Trial(self, args, kwargs))
            self._take_blocks(chosen.blocks)
            unfollowed = _without_gradients(compiled)
            notes = (compiled.draws.note, chosen.note, *unfollowed)
            self._notes = tuple(dict.fromkeys(n for n in notes if n is not None))
            self._start_notes = (*(() if choice is None else (choice,)), *chosen.notes)
        self.remember_data(*args, **kwargs)
        logger.info("Guide set up: %d blocks (%.2f s).", len(self.blocks), time.perf_counter() - begin)
        if compiled.plan.inputs.missing:
            warnings.warn("\n".join(compiled.plan.inputs.missing), GraphflowsWarning, stacklevel=2)
        if unfollowed:
            warnings.warn("\n".join(unfollowed), GraphflowsWarning, stacklevel=2)
        if self.master is not None:
            self.master()._check_prototype(prune_subsample_sites(self.prototype_trace))
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.setup(*args, **kwargs)

    # ---------------------------------------------------------------- what it is

    @property
    def model(self) -> Callable[..., Any]:
        """The model of the guide."""
        if self._model is None:
            raise GraphflowsError("Expected a guide with its model; a loaded guide needs guide.bind(model).")
        return self._model[0]

    @property
    def family(self) -> Family:
        """The family of its conditionals."""
        return self._options.family

    @property
    def plan(self) -> Plan:
        """The compiled plan."""
        if self._plan is None:
            raise GraphflowsError(
                "Expected a guide that is set up; call guide.setup(*args) with the model's arguments."
            )
        return self._plan

    @property
    def inverse(self) -> InverseGraph:
        """The factorisation of the guide: over sites, or over elements with ``resolution="element"``."""
        plan = self.plan
        is_of_elements = self._options.resolution == "element" and plan.judged is not None
        return plan.judged if is_of_elements and plan.judged is not None else plan.inverse

    @property
    def model_graph(self) -> ModelGraph:
        """The graph that was read from the model: of sites, or of elements with ``resolution="element"``."""
        return self.inverse.graph

    def describe(self, *, verbose: bool = False) -> Description:
        """Return the plan in words: what each latent site is conditioned on, and what is not faithful.

        Args:
            verbose: Whether to add how the networks start, with figures of joint samples. All else follows from the
                model and the call.
        """
        plan = self.plan
        blocks = self._all_blocks()
        summed = [site for block in blocks for site in block.site_elements()]
        alone = [s for block in blocks for s in block.plan.by_shape if not block.conditionals.fuses(s)]
        return describe(plan, (*self._notes, *(self._start_notes if verbose else ())), summed, alone)

    # ---------------------------------------------------------------- a call

    def forward(
        self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Sample every site that is latent in this call given its observed values.

        Args:
            *args: Positional arguments of the model.
            observations: Values of observed sites that replace those of the model (the convention of
                :class:`~pyro.infer.CSIS`).
            **kwargs: Keyword arguments of the model.

        Returns:
            A dict from site to sampled value; optional sites are in it where they have no data.

        Raises:
            UnsupportedModelError: If an observed site has no value in this call; if the guide is not faithful where
                these optional sites have data.
            GraphflowsError: If an observed value is not finite, or ``observations`` has a site that the model has not.
                The message names the site.

        Warns:
            GraphflowsWarning: Once for each site whose per-element parameters were fitted to other data, or which has
                elements beyond those fitted.
        """
        self._ensure_set_up(args, kwargs)
        self._shown.show(self)
        if observations is None and self.master is None and self.create_plates is None:
            blocks: Any = self._modules["blocks"]
            kind = self._captured_calls.kind_of(blocks, args, kwargs)
            if kind is not None:
                return self._run_captured(kind, args, kwargs)
        return self._run(args, kwargs, observations, pyro.sample)

    def _run_captured(self, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Emit every latent site of a call that is captured, or is to be now."""
        captured, arguments = self._captured_calls, (*args, *kwargs.values())

        def run() -> dict[str, Tensor]:
            return self._run(args, kwargs, None, pyro.sample)

        if kind.function is None:
            call = None if self.plan.copies else self._reader.known_call(args, kwargs)
            if not captured.capture(kind, run, call, arguments):
                return run()
        self.plates = kind.call.make_plates({})
        values = captured.run(kind, run, self.plates, arguments)
        if not (self._is_fitting or self._fitted is None or self._fitted.is_known(args, kwargs)):
            call = self._reader.read(self.model, args, kwargs)
            self._warn_of_other_data(call, args, kwargs, None)
        return {name: values[name] for name in self._sites}

    @property
    def capture_after(self) -> int | None:
        """After how many steps of an ELBO calls are captured (:mod:`~pyro_graphflows.guides.captured_call`).

        None for never. Set it to 0 to capture the next one.
        """
        return self._captured_calls.after

    @capture_after.setter
    def capture_after(self, calls: int | None) -> None:
        self._captured_calls.after = calls

    @property
    def call_counts(self) -> dict[str, int]:
        """How many calls of each kind there were, by which calls are captured; resumed runs go on with them."""
        return self._captured_calls.counts

    @call_counts.setter
    def call_counts(self, counts: dict[str, int]) -> None:
        self._captured_calls.counts = counts

    @property
    def capture_report(self) -> str:
        """Whether calls in steps of an ELBO are captured, and why not."""
        return self._captured_calls.report

    @property
    def _captured_calls(self) -> CapturedCalls:
        if self._captured is None:
            self._captured = CapturedCalls()
        return self._captured

    def _forget_captured_calls(self) -> None:
        if self._captured is not None:
            self._captured.forget()

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observations: Mapping[str, Tensor] | None,
        emit: Emit,
        unconstrained: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Read a call, and emit every latent site; ``unconstrained`` is filled with the flat vectors of its values."""
        plan = self.plan
        call = self._read_with_scores(args, kwargs, observations)
        values: dict[str, Tensor] = {}
        unconstrained = {} if unconstrained is None else unconstrained
        of_call = None
        if plan.priors.sites:
            if self._priors is None:
                self._priors = PriorReader(plan.priors, self._sites, self._setup_call)
            of_call = self._priors.begin(self.model, (args, kwargs), call, observations)
        # Where all sites belong to data, batches are the noise, and a step would cost a third more.
        is_global = not all(plan.graph.plates[name] for name in self._sites)
        follows = is_global and emit is pyro.sample and torch.is_grad_enabled()
        blocks: Any = self._modules["blocks"]  # not self.blocks: forward has shown the parameters to Pyro
        for block, block_plan in zip(blocks, plan.blocks, strict=True):
            conditionals = block.begin(call, unconstrained)
            new = beyond_fitted(block.spec.plates, call.plates) if block_plan.per_element else None
            for level in block_plan.levels:
                changing = [name for name in level if name in plan.changing] if plan.changing else []
                if changing:
                    call = self._reader.at_values(call, self.model, (args, kwargs), values, changing)
                beyond = [] if new is None else [name for name in level if name in block_plan.per_element]
                fuses = block.conditionals.fuses
                priors = {} if of_call is None else of_call.before(values, self._fuses)
                if block_plan.summed:
                    priors = block.beside_elements(priors, level, call, unconstrained)
                model = self._model_conditionals(beyond, block, call, (args, kwargs), values, observations)
                with ExitStack() as stack:
                    for name in block_plan.plates:
                        stack.enter_context(self.plates[name])
                    for name, conditional in conditionals.next(priors).items():
                        prior = priors[name] if name in priors and fuses(name) else None
                        scores = _scores(conditionals, name) if follows else None
                        fn, read_back = self._at_site(name, conditional, call, block, prior, scores)
                        if name in conditionals.fixed and prior is not None:
                            fixed = conditionals.fixed[name], call, block, prior.fixed
                            fn = DrawnOrGiven(fn, self._at_site(name, *fixed)[0])
                        if name in model and new is not None:
                            fn = WithNewElements(fn, model[name], new)
                        given = call.given.get(name)
                        values[name] = self._emit_site(name, fn, call, emit) if given is None else given
                        unconstrained[name] = read_back(values[name])
                    conditionals.accept({name: unconstrained[name] for name in level})
        self._warn_of_other_data(call, args, kwargs, observations)
        if plan.copies and emit is pyro.sample and self.master is None:
            self._emit_copies(call, args, kwargs, values)
        return {name: values[name] for name in self._sites if name not in call.given}

    def _emit_copies(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[str, Tensor]
    ) -> None:
        """Emit the model's Delta sites at their values in the model: TraceMeanField_ELBO looks for all of its sites."""
        copies = self._reader.copies_given(self.model, args, kwargs, values, call.indices, self.plan.copies)
        for name, site in copies.items():
            frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
            mask: Any = site_mask(site)
            with ExitStack() as stack:
                for frame in sorted(frames, key=lambda frame: frame.dim):
                    stack.enter_context(self.plates[frame.name])
                if mask is not None:
                    stack.enter_context(poutine.mask(mask=mask))
                fn = CopiedValue(site["value"], event_dim=len(site["fn"].event_shape))
                infer: Any = {"is_copied": True}
                pyro.sample(name, fn, infer=infer)

    def _at_site(
        self,
        name: str,
        conditional: dist.TorchDistribution,
        call: Call,
        block: GuideBlock,
        prior: SitePrior | None,
        scores: Scores | None = None,
    ) -> tuple[dist.TorchDistribution, Callable[[Tensor], Tensor]]:
        """Return the distribution to emit at a site, and the map from its value to the flat vector."""
        site = self._sites[name]
        return site_distribution(
            site,
            conditional,
            call.supports[name],
            analytic_kl=self.plan.analytic_kl[name] and prior is None,
            dtype=block.dtype,
            of_values=self._reader.like[name].dtype if site.encoding is None else None,
            coordinate=None if prior is None else prior.transform,
            scores=scores,
        )

    def _fuses(self, name: str) -> bool:
        return any(
            name in block.plan.fused and block.conditionals.fuses(name) for block in self._all_blocks()
        )

    def _all_blocks(self) -> list[GuideBlock]:
        """Return the blocks, without showing their parameters to Pyro."""
        blocks: Any = self._modules["blocks"]
        return list(blocks)

    def _emit_site(self, name: str, fn: dist.TorchDistribution, call: Call, emit: Emit) -> Tensor:
        """Emit a distribution at its site, with the model's mask and scale; return the value."""
        if name in call.masks:
            fn = fn.mask(call.masks[name])
        infer = {"infer": {"enumerate": "parallel"}} if name in self.plan.enumerated else {}
        if name not in call.scales:
            return emit(name, fn, **infer)
        with poutine.scale(scale=call.scales[name]):
            return emit(name, fn, **infer)

    def _read_with_scores(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], observations: Mapping[str, Tensor] | None
    ) -> Call:
        """Read the call, and compute the score features that sites read."""
        call = self._read(args, kwargs, observations)
        return call if self.scores is None else self.scores.added_to(call, self.model, args, kwargs)

    def _read(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], observations: Mapping[str, Tensor] | None
    ) -> Call:
        """Read the call, and create its plates."""
        if self.master is not None:
            existing = self.master().plates
        elif self.create_plates is not None:
            plates = self.create_plates(*args, **kwargs)
            plates = [plates] if isinstance(plates, pyro.plate) else plates
            existing = {plate.name: plate for plate in plates}
        else:
            existing = {}
        indices = {
            name: plate._indices
            for name, plate in existing.items()
            if chosen_indices(plate._indices, plate.size) is not None
        }
        call = self._reader.read(self.model, args, kwargs, observations, indices)
        self.plates = call.make_plates(existing)
        replayed = {
            name: torch.as_tensor(self.plates[name]._indices)
            for name, state in call.plates.items()
            if name not in existing
            and state.indices is not None
            and self.plates[name]._indices is not state.indices
        }
        if replayed:  # a handler around the guide has other rows than the model drew: those are the call's
            call = self._reader.read(self.model, args, kwargs, observations, {**indices, **replayed})
        if call.given:
            call.require_given_in_support()
            observed = frozenset(call.given)
            if observed not in self._served:
                self.plan.require_served(observed)
                self._served.add(observed)
        return call

    def _model_conditionals(
        self,
        sites: Sequence[str],
        block: GuideBlock,
        call: Call,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        values: Mapping[str, Tensor],
        observations: Mapping[str, Tensor] | None,
    ) -> dict[str, dist.TorchDistribution]:
        """Return the model's conditionals of sites with elements beyond those fitted, at the values sampled so far.

        Raises:
            UnsupportedModelError: If they depend on what is sampled later, or is summed over by the model.
            GraphflowsError: If copies of a site are drawn jointly.
        """
        if not sites:
            return {}
        grown = grown_plates(block.spec.plates, call.plates)
        require_model_conditionals(sites, block.plan, self.plan.graph, values, grown)
        unwarned = [site for site in sites if f"new elements of {site}" not in self._warned]
        if unwarned:
            self._warned.update(f"new elements of {site}" for site in unwarned)
            warnings.warn(
                f"Elements beyond those fitted, in plate {grown}: there {', '.join(unwarned)} follow the "
                "model's conditional given the sites sampled before, and no data.",
                GraphflowsWarning,
                stacklevel=7,
            )
        conditionals = ModelConditionals(self.model)
        return conditionals(sites, *arguments, latents=values, observed=observations, indices=call.indices)

    def _take_blocks(self, blocks: nn.ModuleList) -> None:
        self.blocks = blocks
        self._shown.take(blocks)
        self._forget_captured_calls()

    def _mark_parameters(self) -> None:
        blocks: Any = self._modules["blocks"]  # not self.blocks, which would show all of them to Pyro
        self._shown.mark(blocks)

    # ---------------------------------------------------------------- the data that were fitted

    def remember_data(self, *args: Any, **kwargs: Any) -> None:
        """Take the data of a call as those that per-element parameters are fitted to, as set-up and training do.

        Args:
            *args: Positional arguments of the model; without any arguments the data count as unknown, and no call is
                warned of.
            **kwargs: Keyword arguments of the model.
        """
        self._fitted = None
        self._warned = {name for name in self._warned if name not in self._sites}
        if self.plan.inputs.per_element and (args or kwargs):
            partial = [name for name, plate in self._plate_states.items() if plate.indices is not None]
            self._fitted = FittedData(argument_leaves(self.model, args, kwargs), partial)

    def sites_of_other_data(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Return the sites whose per-element parameters were fitted to other data than those of a call.

        They read no data: a call has their posterior given the data of set-up, or of the latest training by
        :func:`~pyro_graphflows.infer.fit`. Batches of a subsampled plate are not other data, nor is a call without the
        data that they would read. Whoever asks will tell the user: later calls do not warn of these sites.

        Args:
            *args: Positional arguments of the model.
            **kwargs: Keyword arguments of the model, and ``observations``.
        """
        observations = kwargs.pop("observations", None)
        self._ensure_set_up(args, kwargs)
        if self._fitted is None:
            return ()
        leaves = argument_leaves(self.model, args, kwargs)
        if not observations and self._fitted.is_known(args, kwargs, leaves):
            return ()
        with torch.random.fork_rng(devices=[]), torch.no_grad(), poutine.block():
            call = self._reader.read(self.model, args, kwargs, observations)
        found = self._fitted.sites_of_other_data(
            CallData(call, (args, kwargs), leaves, observations or {}),
            self.plan,
            self._reader.paths,
            self._per_element(),
        )
        self._warned.update(found)
        return found

    @contextmanager
    def fitting_to(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Mark a training run, in which per-element parameters are fitted to data; see :meth:`remember_data`.

        Args:
            *args: Positional arguments of the model with all data, or none where these are not at hand.
            **kwargs: Keyword arguments of the model.
        """
        self._is_fitting = True
        try:
            yield
        finally:
            self._is_fitting = False
            if self._plan is not None:
                self.remember_data(*args, **kwargs)

    def _per_element(self) -> list[str]:
        return [site for site in self._sites if site in self.plan.inputs.per_element]

    def _warn_of_other_data(
        self,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observations: Mapping[str, Tensor] | None,
    ) -> None:
        """Warn once of each site that fits other data than those of a call."""
        fitted = None if self._is_fitting else self._fitted
        if fitted is None or (not observations and fitted.is_known(args, kwargs)):
            return
        sites = self._per_element()
        if self._warned.issuperset(sites) or not any(
            name in call.values for name in self.plan.graph.observed
        ):
            return
        now = CallData(call, (args, kwargs), argument_leaves(self.model, args, kwargs), observations or {})
        found = fitted.sites_of_new_data(now, self.plan, self._reader.paths, sites)
        found = tuple(site for site in found if site not in self._warned)
        if not found:
            return
        self._warned.update(found)
        warnings.warn(
            f"The per-element parameters of {', '.join(found)}, which read no data, fit those of set-up, or of the "
            "latest fit(model, guide, data), and the data of this call are others. Train with these data, set up a "
            "guide with them, or use pool='deepset' for a guide that reads them.",
            GraphflowsWarning,
            stacklevel=7,
        )

    # ---------------------------------------------------------------- what users ask of it

    def log_prob(self, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the log-density of latent values given the data of a call, in nats.

        Args:
            latents: A value for every latent site. Extra batch dimensions on the left are kept.
            *args: Positional arguments of the model.
            **kwargs: Keyword arguments of the model, and ``observations``.

        Returns:
            ``log q(latents | data)``: summed over the sites that are latent in the call, per element of the plates
            where all sites are in the same plates (a vector over the data for the common single data plate), and
            summed over plates otherwise.

        Raises:
            GraphflowsError: If a latent site has no value, or one outside of its support or of another shape.
        """
        if not isinstance(latents, Mapping):
            raise GraphflowsError(
                f"Expected latents={{site: value}} and then the model's arguments; got {type(latents).__name__}."
            )
        self._ensure_set_up(args, kwargs)
        given = {name: latents[name] for name in self.plan.graph.latent if name in latents}
        missing = set(self.plan.graph.latent) - set(given) - set(self._options.optional)
        if not missing:
            for name, value in given.items():
                event = self._sites[name].event_shape
                if not torch.is_tensor(value) or value.shape[max(value.dim() - len(event), 0) :] != event:
                    got = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
                    raise GraphflowsError(
                        f"Expected a tensor of values of {name!r} of event shape {tuple(event)}; got {got}."
                    )
                if is_constant(self._sites[name].support):
                    require_inside(name, value, self._sites[name].support)
            with poutine.block():
                trace = poutine.trace(poutine.condition(self, data=given)).get_trace(*args, **kwargs)
            nodes: Any = trace.nodes
            names = [name for name in self.plan.graph.latent if name in nodes]
            missing = set(names) - set(given)
            for name in self.plan.changing:
                require_inside(name, given[name], nodes[name]["fn"].support)
        if missing:
            more = [str(name) for name in latents if name not in self.plan.graph.latent]
            others = f"; no latent sites: {', '.join(more)}" if more else ""
            raise GraphflowsError(
                f"Expected a value for every latent site; missing: {', '.join(sorted(missing))}{others}."
            )
        terms = []
        for name in names:
            fn, value = nodes[name]["fn"], nodes[name]["value"]
            try:
                terms.append(fn.log_prob(value))
            except (RuntimeError, ValueError) as error:
                raise GraphflowsError(
                    f"Expected a value of {name!r} of shape {tuple(fn.shape())} in this call, or with more dimensions "
                    f"on the left; got {tuple(value.shape)}."
                ) from error
        plates = [self.plan.graph.plates[name] for name in names]
        depth = max((-frame.dim for frame in self._prototype_frames.values()), default=max(map(len, plates)))
        return sum_of_terms(terms, depth if any(each != plates[0] for each in plates) else 0)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the latents at base noise zero: each site at its factor's centre given the centres before it.

        Args:
            *args: Positional arguments of the model.
            **kwargs: Keyword arguments of the model, and ``observations``.
        """
        observations = kwargs.pop("observations", None)
        self._ensure_set_up(args, kwargs)
        with torch.no_grad(), poutine.block():
            values = self._run(args, kwargs, observations, lambda _, fn, **__: centre_of(fn))
        return {name: self._in_plates(name, value) for name, value in values.items()}

    def _in_plates(self, name: str, value: Tensor) -> Tensor:
        """Return a value with all elements of the plates around its site, also of one that looks at nothing."""
        plates = [self.plates[plate] for plate in self.block_of(name).plan.plates]
        return expanded_in_plates(value, self._sites[name].event_shape, plates)

    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, num_draws: int = 1000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return quantiles of each latent element, estimated from draws of the guide.

        Args:
            quantiles: Probabilities.
            *args: Positional arguments of the model.
            num_draws: The number of draws. The error of a quantile falls with its square root.
            **kwargs: Keyword arguments of the model.

        Returns:
            A dict from site to tensor of shape ``(len(quantiles), *shape of the site's value)``.

        Raises:
            GraphflowsError: If a probability is not in [0, 1], or ``num_draws`` is not positive.
        """
        probabilities = torch.as_tensor(quantiles, dtype=torch.double)
        if num_draws < 1 or not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
            raise GraphflowsError(
                f"Expected probabilities in [0, 1] and num_draws >= 1; got {probabilities.tolist()} and {num_draws}."
            )
        self._ensure_set_up(args, kwargs)
        depth = max((-state.dim for state in self._plate_states.values()), default=0)
        with torch.no_grad(), poutine.block():
            shapes = {name: value.shape for name, value in self(*args, **kwargs).items()}
            with pyro.plate("_pyro_graphflows_draws", num_draws, dim=-1 - depth):
                draws = self(*args, **kwargs)
        return {
            name: quantiles_of(
                value.reshape(num_draws, *shapes[name]),
                probabilities,
                discrete=self._sites[name].encoding is not None,
            )
            for name, value in draws.items()
        }

    def posterior(
        self, *args: Any, num_draws: int = 1000, seed: int | None = None, progress: bool = True, **kwargs: Any
    ) -> Posterior:
        """Return draws of the posterior with their weights: :func:`~pyro_graphflows.sample_posterior` of this guide.

        Args:
            *args: Positional arguments of the model.
            num_draws: The number of draws.
            seed: Seed of the random numbers; the global generators are put back afterwards.
            progress: Whether to show a bar when it takes long.
            **kwargs: Keyword arguments of the model.

        Raises:
            GraphflowsError: See :func:`~pyro_graphflows.sample_posterior`.
            UnsupportedModelError: Likewise.
        """
        return sample_posterior(
            self.model, self, *args, num_draws=num_draws, seed=seed, progress=progress, **kwargs
        )

    def transport(self, *args: Any, **kwargs: Any) -> Transport:
        """Return the map from base noise to latents for the data of a call, and its log-determinant.

        It is a change of variables for Hamiltonian Monte Carlo, ours (:meth:`~pyro_graphflows.infer.Posterior.refined`)
        or Pyro's (:meth:`Transport.neutra`).

        Args:
            *args: Positional arguments of the model.
            **kwargs: Keyword arguments of the model, and ``observations``.

        Raises:
            UnsupportedModelError: If the guide samples a discrete site, or has a distribution that is no map of noise
                that is known. The message names the site.
        """
        observations = kwargs.pop("observations", None)
        self._ensure_set_up(args, kwargs)
        depth = max((-state.dim for state in self._plate_states.values()), default=0)
        return Transport(lambda emit: self._run(args, kwargs, observations, emit), depth)

    def data_features(
        self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> list[Tensor]:
        """Return what the networks of the guide read of the data, for each block that reads observed values.

        Args:
            *args: Positional arguments of the model.
            observations: Values of observed sites that replace those of the model; batches on the left are kept.
            **kwargs: Keyword arguments of the model.

        Returns:
            For each such block the features of data, ``(*batch in the plates, number of features)``; NaN for values
            outside of supports. An empty list if every latent has parameters instead of reading data.
        """
        self._ensure_set_up(args, kwargs)
        with torch.no_grad(), poutine.block():
            call = self._read(args, kwargs, observations)
            blocks: Any = self.blocks
            found = [block.inputs.of_data(call, self.plan.graph.observed) for block in blocks]
        return [features for features in found if features is not None]

    def given(self, **observations: Tensor) -> Callable[..., dict[str, Tensor]]:
        """Return a callable guide with some observed values fixed.

        Args:
            **observations: Values by observed site; they replace those of each later call. Dots in names: pass a
                dict with ``**``.

        Returns:
            A function of the model's arguments that runs this guide.

        Raises:
            GraphflowsError: If a name is not an observed site.

        Example:
            >>> import pyro, torch, pyro.distributions as dist
            >>> from pyro_graphflows.guides import auto_faithful_guide
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> posterior = auto_faithful_guide(model, torch.zeros(3)).given(x=torch.ones(3))
            >>> posterior(torch.zeros(3))["z"].shape
            torch.Size([3])
        """
        known = [*self.plan.graph.observed, *self._options.optional]
        unknown = [name for name in observations if name not in known]
        if unknown:
            raise GraphflowsError(
                f"Expected observed sites ({', '.join(map(str, known))}); got {', '.join(unknown)}."
            )
        fixed = dict(observations)

        def guide(
            *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any
        ) -> dict[str, Tensor]:
            return self(*args, observations={**(observations or {}), **fixed}, **kwargs)

        return guide

    def set_linear_(
        self,
        site: str,
        weights: Mapping[str, Any],
        intercept: Tensor | float,
        scale: Tensor | float = 1.0,
    ) -> None:
        r"""Make one site's conditional linear-Gaussian, in the units of the data and of unconstrained latents.

        ``u_site | parents ~ Normal(intercept + sum_p weights[p] @ u_p, scale)``; the hidden layers' outputs for the
        site are set to zero. With the exact posterior conditionals the guide is the exact posterior. Of a discrete
        site these are the logits, without a scale. The vector of a binary value is the value itself, that of one among
        ``K`` classes its ``K`` indicators, as a site and as a parent.

        Args:
            site: A latent site.
            weights: For each parent a matrix of shape ``(site's size, parent's size)`` (a number for scalars);
                parents that are missing get zero. A pooled parent counts by its mean over the plates; one whose
                elements come in one by one has a column for each. Of a parent that comes in both by itself and in a
                summary, the second is set by the name of the summary and a dict
                (``{"x": 0.8, "pooled(x; data)": {"x": 0.1}}``).
            intercept: The location where all parents are zero, shape ``(size,)``.
            scale: The scale, or a lower triangular square root of the covariance, shape ``(size, size)``.

        Raises:
            GraphflowsError: If the site or a parent is unknown, weights have another shape or the scale is not
                positive.
        """
        self._block_to_set(site, weights).set_linear_(site, weights, intercept, scale)

    def set_fused_(
        self,
        site: str,
        weights: Mapping[str, Any],
        intercept: Tensor | float,
        scale: Tensor | float = 1.0,
    ) -> None:
        r"""Make the factor beside a site's prior linear-Gaussian.

        ``q(u) ~ prior(u) * Normal(u; intercept + sum_p weights[p] @ u_p, scale)``, where ``u`` is the coordinate in
        which the prior is normal: of priors that are normal in unconstrained space that vector, of others the normal
        score of the prior.

        Args:
            site: A latent site that is fused with its prior; ``describe()`` says which are.
            weights: See :meth:`set_linear_`. Of a site with one factor for each element of a plate they are those
                of each of these factors.
            intercept: The location where all parents are zero, shape ``(size,)``.
            scale: The scale, or a lower triangular square root of the covariance, shape ``(size, size)``.

        Raises:
            GraphflowsError: If the site is not fused with its prior or is discrete, or as for :meth:`set_linear_`.
        """
        block = self._block_to_set(site, weights)
        if site not in block.plan.fused or self._sites[site].encoding is not None:
            raise GraphflowsError(
                f"Expected a continuous site that is fused with its prior (describe() says which are); got {site!r}. "
                "Use set_linear_."
            )
        block.set_linear_(site, weights, intercept, scale, fused=True)

    def _block_to_set(self, site: str, weights: Mapping[str, Any]) -> GuideBlock:
        """Return the block of a site whose conditional is to be set; refuse weights of what is no parent."""
        plan = self.plan
        block = self.block_of(site)
        known = {*plan.inverse.parents[site], *block.inputs.names}
        unknown = [parent for parent in weights if parent not in known]
        if unknown:
            raise GraphflowsError(
                f"Expected weights of the parents of {site!r} in the inverse "
                f"({', '.join(map(str, plan.inverse.parents[site])) or 'there are none'}); got "
                f"{', '.join(unknown)}."
            )
        return block

    def block_of(self, site: str) -> GuideBlock:
        """Return the block of a latent site.

        Raises:
            GraphflowsError: If there is no such site.
        """
        for block, plan in zip(self.blocks, self.plan.blocks, strict=True):
            if site in plan.parents:
                assert isinstance(block, GuideBlock)
                return block
        raise GraphflowsError(
            f"Expected a latent site, one of {', '.join(map(str, self.plan.graph.latent))}; got {site!r}."
        )

    def _ensure_set_up(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Set the guide up by the arguments of a call if it has not been."""
        if self._plan is None:
            self.setup(*args, **{key: value for key, value in kwargs.items() if key != "observations"})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AutoFaithfulGuide":
        """Move the guide, and what it remembers of the model, to a device or a type."""
        super()._apply(fn, recurse)
        if self._plan is not None:
            self._reader.moved(fn)
            self._sites = {name: site.moved(fn) for name, site in self._sites.items()}
            self._plate_states = {name: plate.moved(fn) for name, plate in self._plate_states.items()}
            self._fitted = None if self._fitted is None else self._fitted.moved(fn)
            self._priors = None
            self._setup_call = self._moved_call(fn)
            blocks: Any = self._modules["blocks"]
            self._shown.take(blocks)  # other objects, on another device or of another type
            self._forget_captured_calls()
        return self

    def _moved_call(self, fn: Callable[[Tensor], Tensor]) -> Arguments | None:
        """Return the arguments of set-up on a device or in a type."""
        if self._setup_call is None or self._model is None:
            return None
        leaves = argument_leaves(self.model, *self._setup_call).values()
        return replaced_arguments(*self._setup_call, {id(leaf): fn(leaf) for leaf in leaves})

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load parameters and buffers; see :meth:`torch.nn.Module.load_state_dict`.

        Raises:
            GraphflowsError: If the guide is not set up: it has no parameters yet; if the state is that of a guide of
                another plan.
        """
        if self._plan is None:
            raise GraphflowsError(
                "Expected a guide that is set up, since it has no parameters before; call guide.setup(*args) with the "
                "arguments of a typical call, then guide.load_state_dict(state)."
            )
        found = super().load_state_dict(state_dict, strict, assign)
        self._mark_parameters()
        return found

    def get_extra_state(self) -> Tensor:
        """Return by what a state is told from those of guides whose networks read other things."""
        digest = b"" if self._plan is None else self._plan.digest()
        return torch.tensor(list(digest), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the state of a guide of another plan; see :meth:`get_extra_state`."""
        if state.tolist() != self.get_extra_state().tolist():
            raise GraphflowsError(
                "Expected the state of a guide of the same plan, in which each site looks at the same; got another: "
                "its model, its data or its options at set-up were others. Compare guide.describe() of both. "
                "guide.save(path) keeps the plan too."
            )

    # ---------------------------------------------------------------- copies and files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the guide to a file of tensors and plain data.

        :func:`~pyro_graphflows.guides.load_guide` reads it without running code.

        The file is whole, or as it was before if anything fails. It holds the parameters and what the guide knows of
        the model and of its calls; neither the model nor data.

        Args:
            path: The file, in the safetensors format; its folder is made if need be.

        Raises:
            GraphflowsError: If the guide is not set up, or an option is no plain data, as a module for
                ``activation=``. The message names it.
        """
        plan, frames = self.plan, self._prototype_frames.values()
        blocks: Any = self.blocks
        contents = {
            "options": replace(self._options, inverse=plan.inverse, init_values={}),
            "plan": plan,
            "sites": self._sites,
            "reader": self._reader.to_plain(),
            "plates": {name: replace(state, indices=None) for name, state in self._plate_states.items()},
            "frames": tuple((each.name, each.dim, each.size, each.full_size) for each in frames),
            "notes": (self._notes, self._start_notes),
            "fitted": None if self._fitted is None else (self._fitted.digests(), self._fitted.partial),
            "blocks": tuple(block.to_plain() for block in blocks),
            "scores": None if self.scores is None else self.scores.to_plain(),
        }
        write_guide(path, self.model, contents, self.state_dict())

    def _restore(
        self, contents: Mapping[str, Any], state: Mapping[str, Tensor], device: torch.device | str
    ) -> None:
        """Become the guide that was saved."""
        with torch.random.fork_rng(devices=[]):  # its random start is replaced
            blocks = [GuideBlock.from_plain(plain) for plain in contents["blocks"]]
        self._plan, self._sites = contents["plan"], contents["sites"]
        self.scores = None if contents["scores"] is None else ScoreReader.from_plain(contents["scores"])
        self._reader = CallReader.from_plain(contents["reader"], device)
        self._plate_states = contents["plates"]
        self._priors = None
        self._reader.remember(self._plate_states, {name: site.support for name, site in self._sites.items()})
        self._notes, self._start_notes = contents["notes"]
        self._fitted = None if contents["fitted"] is None else FittedData(*contents["fitted"])
        self._prototype_frames = {
            name: CondIndepStackFrame(name, dim, size, 0, full_size)
            for name, dim, size, full_size in contents["frames"]
        }
        self.blocks = nn.ModuleList(blocks)
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise GraphflowsError(
                f"Expected the tensors that this version's guides have; got others: {error}. The file is of another "
                "version."
            ) from error
        self.blocks.to(device)
        if self.scores is not None:
            self.scores.to(device)

    def bind(self, model: Callable[..., Any]) -> "AutoFaithfulGuide":
        """Give a guide that was pickled its model back (models are not saved with guides)."""
        self._model = (model,)
        self._forget_captured_calls()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Unlike Pyro's own guides, leave the live object as it is. The parameter store hangs a weak reference on
        # each parameter that it has seen, which cannot be pickled; it is set anew on the next use.
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        state = self.__dict__.copy()
        state["_model"] = None
        state["master"] = None
        state["plates"] = {}
        state["create_plates"] = None
        if self._plan is not None:  # a function that makes inverses cannot be pickled
            state["_options"] = replace(self._options, inverse=self._plan.inverse, init_values={})
        state["_priors"] = None
        state["prototype_trace"] = None
        state["_fitted"] = state["_setup_call"] = None  # no data in a pickle
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._plan is not None:
            self._mark_parameters()

    def __deepcopy__(self, memo: dict[int, Any]) -> "AutoFaithfulGuide":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for part in (self._model, self.create_plates, self.master):
            memo[id(part)] = part
        state = self.__dict__.copy()
        of_others = ("_model", "create_plates", "master", "prototype_trace", "_setup_call")
        shared = {key: state.pop(key) for key in of_others}
        state["plates"] = {}
        state["_priors"] = None
        new.__dict__.update(shared)
        new.__dict__.update(copy.deepcopy(state, memo))
        if new._plan is not None:
            new._mark_parameters()
        return new


def _without_gradients(compiled: Compiled) -> tuple[str, ...]:
    """Return sentences on continuous latents whose values the model takes out of the tensors (``strict=False``)."""
    found = []
    for leak in compiled.traced.leaks:
        sites = [name for name in leak.sites if name in compiled.sites and not compiled.sites[name].encoding]
        if sites and leak.affects:
            found.append(
                f"no gradient passes from {', '.join(leak.affects)} to {', '.join(sites)}: {leak}. A loss is right, "
                "but training by it leaves out what these say. Keep values as tensors, or train by "
                "pyro_graphflows.infer.InferenceCompilation, which takes no gradient of the model."
            )
    return tuple(found)


def _scores(conditionals: Pass, name: str) -> Scores:
    return Scores(partial(conditionals.score, name), partial(conditionals.by_draws, name))


@with_hints(
    "Keyword arguments of the model belong in example_kwargs={name: value}, options of a family in family=, "
    "as Normal(hidden_dims=[64])."
)
def auto_faithful_guide(
    model: Callable[..., Any],
    *example_args: Any,
    family: str | Family | type[Factor] = "auto",
    inverse: Inverse = "auto",
    pool: str | DeepSet | None = None,
    init: str = "auto",
    factors: Mapping[str, type[Factor] | Family] = MappingProxyType({}),
    standardize: bool = True,
    num_start_samples: int = 10_000,
    strict: bool = True,
    resolution: str = "auto",
    rank: int | None = None,
    budget: int | None = None,
    coupled_rank: int | None = None,
    enumerate_sites: bool | Collection[str] = False,
    init_values: Mapping[str, Tensor] = MappingProxyType({}),
    setup_seed: int = 0,
    optional: Sequence[str] = (),
    features: str = "raw",
    embedding: Mapping[str, nn.Module | str] = MappingProxyType({}),
    create_plates: Callable[..., Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> AutoFaithfulGuide:
    """Compile a Pyro model into an amortised guide that follows the faithful inverse of its Bayesian network.

    Discrete latent sites have Bernoulli and categorical factors in all families, for inference compilation and
    score-function gradients; ``enumerate_sites=True`` marks them for ``TraceEnum_ELBO`` instead. Sites that the model
    marks for enumeration have no factor: the model sums over them.

    References:
        [1] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.

    Args:
        model: The model.
        *example_args: Arguments of a typical call. If given (or ``example_kwargs``), the guide is set up at once and
            its parameters exist, as optimisers of PyTorch need; if not, on its first call or by ``guide.setup``.
        family: The kind of conditionals, an object with options of its own: :class:`~pyro_graphflows.guides.Auto`
            (splines for scalar globals, for scalar sites that set the scale of others, for those with bounded or
            heavy-tailed priors and, where one data set is fitted, for elements whose data are not normal, normal
            conditionals elsewhere, fused with the priors),
            :class:`~pyro_graphflows.guides.Normal`, :class:`~pyro_graphflows.guides.Spline` or
            :class:`~pyro_graphflows.guides.Flow` (flexible conditionals, at several times the cost of a step);
            ``"auto"``, ``"normal"``, ``"spline"`` and ``"flow"`` abbreviate their defaults; or a subclass of
            :class:`~pyro_graphflows.guides.Factor` for all continuous sites.
        inverse: What each site is conditioned on: ``"auto"`` (the faithful inverse with the fewest edges and, among
            these, smooth conditionals (:mod:`~pyro_graphflows.guides.orders`); discrete sites sampled before
            the continuous ones of their plates unless that doubles the edges), another order
            of :func:`~pyro_graphflows.faithful_inverse`, :class:`~pyro_graphflows.AutoOrder` (a search for fewer
            edges, for a given time) or an elimination sequence; ``"stochastic"``, ``"full"``,
            ``"mean_field"``; an :class:`~pyro_graphflows.InverseGraph`, or a function that makes one from the
            :class:`~pyro_graphflows.ModelGraph`.
        pool: How the data in inner plates reach the sites outside of them (a group's data its own variable, all data
            the global variables): None gives such sites per-element parameters for the data set at hand; ``"deepset"``
            (or a :class:`~pyro_graphflows.guides.DeepSet` that sets its sizes; ``"attention"`` or an
            :class:`~pyro_graphflows.guides.Attention` weighs elements by what they are) summarises the data by a
            permutation-invariant network, so that they are amortised over data sets of any
            size (:mod:`~pyro_graphflows.guides.conditionals.pooling`; not over subsampled plates).
        init: How training starts. ``"auto"``: at the best start for the data of set-up, by a Monte Carlo estimate of
            the loss, where the guide fits one data set (it has per-element parameters): among the regression, a normal
            approximation about the posterior's mode, short chains from there, and the prior
            (:mod:`~pyro_graphflows.guides.start`, :mod:`~pyro_graphflows.guides.mode`,
            :mod:`~pyro_graphflows.guides.short_chains`; ``guide.describe(verbose=True)`` says which). Amortised
            guides keep the regression, unless it does much worse for these data than the prior, or, without plates,
            the mode gains more for these data than it loses for simulated ones, or the model, which takes no tensors,
            has data of its own. ``"mode"``: at a normal approximation
            of the posterior for these data, whatever it is for others. ``"regression"``, for training on simulations:
            at the least-squares regression of each site on its parents over joint samples of the model (exact for
            linear-Gaussian models up to sampling error), or where these are likeliest under curved networks
            (:mod:`~pyro_graphflows.guides.curved_start`); where priors are improper there are none, and it is as
            ``"auto"``. ``"prior"``: at the prior of the latents, whatever the data. ``"random"``: with random weights.
        factors: For single sites, by name, a factor class or a family object.
        standardize: Whether inputs and outputs of the networks are standardised by constants found at set-up.
        num_start_samples: The number of joint samples of the model that are drawn at set-up.
        strict: Whether to refuse models whose dependencies cannot be traced in full; if not, what cannot be
            followed counts as a dependency on all earlier sites.
        resolution: ``"auto"``: vectors whose conditional would take more than 200,000 weights are held element by
            element where the model's elements fall into small groups, with a banded precision where they or their
            running sums are a chain, as in random walks, and where neither is so with one covariance for all data (up
            to 300 elements) or one of low rank beside a diagonal (:mod:`~pyro_graphflows.guides.vectors`;
            ``describe()`` says which); ``"site"``: always one of these two; ``"element"``: each element of every
            vector site has its own parents (not with a factor class; see
            :func:`~pyro_graphflows.get_model_graph` for when that is sound).
        rank: The rank of the covariance of long vectors beside its diagonal; None for one covariance in full up to 300
            elements, and at most 10 beyond.
        budget: The most weights that the conditional of one vector may take; full covariances are used up to it. None
            for 200,000 where the covariance is full, a million otherwise.
        coupled_rank: Of latents that stay dependent across a plate
            (:mod:`~pyro_graphflows.guides.conditionals.coupled`): the rank of the dependence, 0 for a parameter for
            each pair of elements; None to choose by the size of the plate.
        enumerate_sites: Discrete sites that the guide marks ``infer={"enumerate": "parallel"}``, so that
            ``TraceEnum_ELBO`` sums over their values instead of drawing them: their names, or True for all. Every
            latent site then has a network of its own, so that each only meets the values of its own parents.
        init_values: For single continuous sites, the value at which training starts, of a shape that broadcasts to that
            of the site: the site's conditional is centred there, a tenth as wide as its prior, whatever the data are.
            Elements of a plate may differ at sites with per-element parameters.
        setup_seed: The seed of everything that is random at set-up: joint samples, and with them the order, the start
            and the features, and the weights of the networks. Guides of the same model and call are equal whatever the
            caller's random state, which is not advanced; for other initial weights, take another seed.
        optional: Sites that have data in some calls and none in others, as labels have: latent where they have none,
            conditioned on where they have, by the same networks (Kingma et al. 2014, Semi-supervised Learning with
            Deep Generative Models). They are sampled first, in this order. Each call returns the sites that are latent
            in it. With several, a later one may lack data where an earlier one has some; the reverse is refused where
            the two are dependent.
        features: What sites read of their data beside the data themselves: ``"raw"``, nothing; ``"score"``, the
            gradient of the data's log-density at fixed reference values of all latents, as wide as the site is, where
            the model has one (:mod:`~pyro_graphflows.guides.scores`); ``"auto"``, the same where a regression on
            held-out joint samples gains by it.
        embedding: For wide data, by name, a network from ``(*batch, columns)`` to ``(*batch, features)`` that sites
            read in their place, beside linear estimates of the latents; ``"auto"`` for a default one, ``"linear"`` for
            the estimates alone, which overfit least where simulations are few
            (:mod:`~pyro_graphflows.guides.conditionals.embedding`).
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`: a function of the model's arguments
            that returns plates that exist already, for subsampling.
        example_kwargs: Keyword arguments of a typical call.

    Returns:
        An :class:`~pyro.infer.autoguide.AutoGuide`, for ``SVI``, ``Trace_ELBO``, ``TraceMeanField_ELBO``,
        ``RenyiELBO``, ``Predictive``, and inference compilation.

    Raises:
        GraphflowsError: If the family or the value of an option is unknown, or ``factors`` names a site that the
            model has not.
        UnsupportedModelError: If the model cannot be compiled (on set-up).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = auto_faithful_guide(model, torch.zeros(10))
        >>> guide.inverse.parents["z"]
        ('x',)
        >>> guide(torch.zeros(7))["z"].shape
        torch.Size([7])
    """
    guide = AutoFaithfulGuide(
        model,
        family=family,
        inverse=inverse,
        pool=pool,
        init=init,
        factors=factors,
        standardize=standardize,
        num_start_samples=num_start_samples,
        strict=strict,
        resolution=resolution,
        rank=rank,
        budget=budget,
        coupled_rank=coupled_rank,
        enumerate_sites=enumerate_sites,
        init_values=init_values,
        setup_seed=setup_seed,
        optional=optional,
        features=features,
        embedding=embedding,
        create_plates=create_plates,
    )
    if example_args or example_kwargs:
        guide.setup(*example_args, **(example_kwargs or {}))
    return guide


class _Trial(Trial):
    """A guide at set-up, tried with blocks at some start for the call that it is set up by."""

    def __init__(self, guide: AutoFaithfulGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.guide, self.call = guide, (args, kwargs)

    def take(self, blocks: nn.ModuleList) -> None:
        """Let the guide have these blocks; runs at set-up may show their parameters to Pyro."""
        self.guide._take_blocks(blocks)

    def read(self) -> Call:
        """Read the call."""
        return self.guide._read_with_scores(*self.call, None)

    def run(
        self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Draw latents for a call, perhaps with other values of observed sites."""
        return self.guide._run(args, kwargs, observations, pyro.sample)

    def draws(self, number: int, dim: int) -> dict[str, Tensor]:
        """Return draws for the call as flat unconstrained vectors, along a plate of their own."""
        flat: dict[str, Tensor] = {}
        with pyro.plate("_pyro_graphflows_draws", number, dim=dim):
            self.guide._run(*self.call, None, pyro.sample, flat)
        return flat
