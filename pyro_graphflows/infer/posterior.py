r"""A posterior as an object: draws of a guide, how far to trust them, their repair, and what they are used for.

A guide says :math:`q(z \mid x)`; what is wanted is :math:`p(z \mid x)`. :func:`sample_posterior` draws from the first
and gives each draw its weight towards the second, :math:`w = p(x, z) / q(z \mid x)`. The weights say how far the two
agree (:attr:`Posterior.khat`, :attr:`Posterior.ess`) and correct the draws where they do
(:meth:`Posterior.reweighted`). Where they do not, Markov chains start from the draws (:meth:`Posterior.refined`).
Everything works with any Pyro guide: draws and densities are all that is asked of it.

*Per datum or joint.* Where every site of the model and the guide is inside the plate of the data, the posterior is a
product over data and each datum has weights of its own, which stay even however many data there are. Otherwise a draw
is a draw of everything, with one weight.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from pyro.poutine.util import site_is_factor
from torch import Tensor
from tqdm.auto import tqdm

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning
from pyro_graphflows.infer.batched_hmc import Kernel
from pyro_graphflows.infer.chains import Chains, bulk_ess, split_rhat
from pyro_graphflows.infer.checkpoints import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    seeded,
    set_random_state,
)
from pyro_graphflows.infer.evidence import Evidence, evidence_from_log_weights
from pyro_graphflows.infer.likelihood import log_likelihood_chunks
from pyro_graphflows.infer.loo import LOO, WeightedDraws, leave_one_out
from pyro_graphflows.infer.model_runs import (
    Fitted,
    SiteShape,
)
from pyro_graphflows.infer.particles import (
    Program,
    density_sites,
)
from pyro_graphflows.infer.predictive import Prediction, predict
from pyro_graphflows.infer.psis import effective_sample_size, psis_khat, smoothed_log_weights
from pyro_graphflows.infer.refinement import (
    Target,
    chosen_rows,
    coordinates_of,
    kernel_of,
    refine,
    starting_rows,
)
from pyro_graphflows.infer.surprise import num_sets, surprise_of, warn_of_surprise
from pyro_graphflows.infer.tables import Table
from pyro_graphflows.infer.weighted_runs import WeightedRuns, evaluated, require_spread, without_replacement
from pyro_graphflows.inspect import require_arguments, require_pair

__all__ = ["Posterior", "load_posterior", "sample_posterior"]

_POOL = 10  # draws in the pool for each one kept
_TRUSTED = 0.7
_FEW = 100  # effective draws
_AGREE = 1.01  # R-hat of chains that agree


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    r"""Draws of a posterior and what is needed to use them; made by :func:`sample_posterior`.

    Attributes:
        draws: The latent sites (and ``pyro.deterministic`` ones) by name, draws along the first dimension.
        log_weights: Logarithms of the weights :math:`p(x, z) / q(z \mid x)`: ``(draws,)``, or ``(draws, data)`` where
            the posterior factorises over the data plate. All zero after :meth:`reweighted`.
        khat: The Pareto shape of the weights, of each datum or of all: above 0.7 neither the draws nor their weights
            are dependable. Below, averages with the weights are; no number shows a mode that no draw is near.
        ess: The effective number of draws by their weights.
        data_plate: The plate over which the posterior factorises; ``None`` where it is joint.
        observed: The observed values by site.
        is_resampled: Whether the draws have been resampled by their weights, or refined, so that all weigh the same.
        fitted: The model and the guide with their arguments.
        chains: What is known of the Markov chains that the draws come from; ``None`` before :meth:`refined`.
    """

    draws: Mapping[str, Tensor]
    log_weights: Tensor
    khat: Tensor
    ess: Tensor
    data_plate: str | None
    observed: Mapping[str, Tensor]
    is_resampled: bool
    fitted: Fitted
    chains: Chains | None = None

    @property
    def num_draws(self) -> int:
        """The number of draws."""
        return len(self.log_weights)

    @property
    def evidence(self) -> Evidence | None:
        """The log-evidence by the weights, of each datum or of all; ``None`` once draws are resampled or refined."""
        changed = self.is_resampled or self.chains is not None
        return None if changed else evidence_from_log_weights(self.log_weights)

    @cached_property
    def surprise(self) -> Tensor | None:
        """How often the model generates data at least as far out: a tail probability for each datum, or for all.

        What the guide reads of the data is compared with that of at least 10,000 joint draws of the model, found when
        first asked for (:mod:`~pyro_graphflows.infer.surprise`). ``None`` for guides that read no data, as those with
        parameters for each latent.

        Raises:
            UnsupportedModelError: If joint draws of the model are not the model; the message names the site, as one
                with an improper prior.

        Warns:
            GraphflowsWarning: If more data than chance allows are below 0.001.
        """
        fitted, plate = self.fitted, self.data_plate
        num_data = 1 if plate is None else self.khat.numel()
        with evaluated(fitted), seeded(0), _bar(2 * num_sets(num_data), True, "simulating") as bar:
            tail = surprise_of(fitted, plate, bar.update)
        if tail is not None:
            warn_of_surprise(tail, plate)
        return tail

    def __len__(self) -> int:
        return self.num_draws

    def __repr__(self) -> str:
        plate = self.data_plate
        kind = "joint" if plate is None else f"one for each of {self.khat.numel()} elements of {plate!r}"
        origin = "draws resampled by their weights" if self.is_resampled else "draws of the guide"
        if self.chains is not None:
            count, of = int(self.chains.refined.sum()), self.chains.refined.numel()
            some = "" if count == of else f", refined for {count} of {of} elements"
            origin = f"draws of {self.chains.num_chains} chains" if not some else f"draws{some}"
        width = max(map(len, self.draws))
        lines = [f"Posterior({self.num_draws} {origin}; {kind})"]
        lines += [f"  {name:<{width}}  {tuple(value.shape[1:])}" for name, value in self.draws.items()]
        return "\n".join([*lines, *(f"  {line}" for line in self._advice())])

    def _advice(self) -> list[str]:
        return [*self._advice_on_chains(), *self._advice_on_weights()]

    def _advice_on_chains(self) -> list[str]:
        chains = self.chains
        if chains is None:
            return []
        divergent = int(chains.divergent.sum())
        lines = [
            f"R-hat {chains.worst_rhat:.3f} at the worst; effective draws {chains.least_ess:.0f} or more of "
            f"{self.num_draws}; {divergent} trajectories left the posterior."
        ]
        apart = chains.num_rhat_above(_AGREE)
        if apart:
            numbers = sum(int((~value.isnan()).sum()) for value in chains.rhat.values())
            lines.append(
                f"R-hat is above {_AGREE} for {apart} of {numbers} numbers: more num_samples, or a better guide."
            )
        if divergent:
            lines.append(
                "Where trajectories leave, parts may be missing: aim at a higher acceptance (NUTS(acceptance=))."
            )
        return lines

    def _advice_on_weights(self) -> list[str]:
        if self.chains is not None and bool(self.chains.refined.all()):
            return []
        ess, khat = self.ess.flatten(), self.khat.flatten()
        if self.chains is not None:
            ess, khat = ess[~self.chains.refined], khat[~self.chains.refined]
        if bool((ess == 0).all()):
            return [
                "No draw has a positive density under the model: these draws say nothing. Train the guide."
            ]
        worst, num = khat.max().item(), self.num_draws
        bad = int((khat > _TRUSTED).sum())
        each = "" if self.data_plate is None else f" at the worst; > {_TRUSTED} for {bad} of {len(khat)}"
        shape = f"k-hat {worst:.2f}{each}" if worst > -math.inf else "All weights are equal"
        lines = [f"{shape}; ESS {ess.min().item():.0f} of {num}{'' if len(khat) == 1 else ' or more'}."]
        if bad:
            what = (
                "The weights are too uneven to repair these draws"
                if self.data_plate is None
                else "There the draws"
            )
            tail = ": " if self.data_plate is None else " cannot be repaired by weights: "
            lines.append(f"{what}{tail}.refined() does by Markov chains; or train the guide longer.")
        elif not self.is_resampled and bool((ess < min(_FEW, num / 2)).any()):
            lines.append("Few of the draws count: ask for more, or train the guide longer.")
        elif not self.is_resampled and bool((ess < 0.9 * num).any()):
            lines.append("The weights can be relied on: .reweighted() corrects the draws by them.")
        return lines

    # ------------------------------------------------------------------------------------------------ correction
    def reweighted(
        self, num_draws: int | None = None, *, seed: int | None = None, progress: bool = True
    ) -> "Posterior":
        """Resample by Pareto-smoothed importance weights, from a pool ten times larger.

        The pool is drawn afresh from the guide; memory stays that of the draws kept. Resampling is without
        replacement, so that no draw comes twice; it approaches the posterior as the pool's effective number of draws
        exceeds the number kept, and a warning says where it does not.

        References:
            [1] Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25.
            [2] Gelman, Carlin, Stern, Dunson, Vehtari and Rubin (2013), Bayesian Data Analysis, Section 10.4
            (resampling without replacement).

        Args:
            num_draws: The number to keep; as many as there are by default.
            seed: Seed of the random numbers; the global generators are put back afterwards.
            progress: Whether to show a bar when it takes long.

        Returns:
            A posterior whose draws all weigh the same; its ``khat`` is the pool's.

        Raises:
            GraphflowsError: If these draws are resampled already, the number is not positive, or too few draws of the
                pool have a positive weight.
        """
        if self.chains is not None:
            raise GraphflowsError("Expected draws of a guide; these are refined. Reweight before you refine.")
        if self.is_resampled:
            raise GraphflowsError("Expected draws of a guide; these are resampled by their weights already.")
        num = self.num_draws if num_draws is None else num_draws
        _require_positive(num_draws=num)
        fitted = self.fitted
        with evaluated(fitted), seeded(seed):
            source = WeightedRuns.of(fitted.model, fitted.guide, fitted.args, fitted.kwargs)
            states, weights = [], []
            with _bar(2 * _POOL * num, progress, "weighing") as bar:
                for part, state, traces in source.runs(_POOL * num):
                    states.append((part, state))
                    weights.append(source.log_weights(traces))
                    bar.update(part.stop - part.start)
                smoothed, khat = smoothed_log_weights(torch.cat(weights))
                chosen = without_replacement(smoothed, num)
                now = random_state()
                draws = source.gather(states, chosen, bar)
                set_random_state(now)
            ess = effective_sample_size(smoothed)
            if bool((ess < num).any()):
                _warn(
                    f"The pool of {_POOL * num} draws is worth {ess.min().item():.0f} of the posterior, fewer than the "
                    f"{num} kept: these are not yet draws of the posterior. Keep fewer, or train the guide."
                )
            draws |= source.deterministic(draws)
        order = [name for name in self.draws if name in draws]
        return replace(
            self,
            draws=MappingProxyType({name: draws[name] for name in order}),
            log_weights=torch.zeros((num, *smoothed.shape[1:]), dtype=smoothed.dtype, device=smoothed.device),
            khat=khat,
            ess=ess.clamp(max=num),
            is_resampled=True,
        )

    def refined(
        self,
        method: str | Kernel = "nuts",
        *,
        khat_above: float | None = 0.7,
        num_chains: int = 4,
        num_samples: int | None = None,
        seed: int | None = None,
        progress: bool = True,
    ) -> "Posterior":
        """Replace draws that cannot be trusted by those of Markov chains that start from them.

        The chains move in the guide's base space where it has one (``guide.transport``), else among unconstrained
        values. All move at once: chains of a joint posterior by NUTS, those of posteriors per datum by Hamiltonian
        Monte Carlo with a step size for each datum. Interrupted (Ctrl-C) after warm-up, the draws so far are
        returned, with a warning.

        References:
            [1] Hoffman et al. (2019), NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport.

        Args:
            method: ``"nuts"`` (for posteriors per datum, ``"hmc"``), ``"hmc"``, or
                :class:`~pyro_graphflows.infer.NUTS` or :class:`~pyro_graphflows.infer.HMC` with options.
            khat_above: Refine where k-hat is above this number; everywhere for ``None``. A joint posterior below it
                is returned as it is.
            num_chains: The number of chains.
            num_samples: The number of draws of each chain; by default there are about as many draws as before. If only
                some data are refined, there are no more draws than before.
            seed: Seed of the random numbers; the global generators are put back afterwards.
            progress: Whether to show a bar when it takes long.

        Returns:
            A posterior whose ``chains`` has R-hat, effective numbers of draws, acceptance and costs.

        Raises:
            GraphflowsError: If a number is not positive, the method is unknown, or no draw has a positive density under
                the model.
            UnsupportedModelError: If the guide samples discrete sites.
        """
        _require_positive(num_chains=num_chains)
        if num_samples is None:
            num_samples = math.ceil(self.num_draws / num_chains)
        _require_positive(num_samples=num_samples)
        kernel = kernel_of(method, self.data_plate is None)
        chosen = (
            torch.ones_like(self.khat, dtype=torch.bool) if khat_above is None else self.khat > khat_above
        )
        if not bool(chosen.any()):
            return self
        kept = num_samples
        if not bool(chosen.all()):
            kept = min(num_samples, self.num_draws // num_chains)
            if not kept:
                raise GraphflowsError(
                    f"Expected at least as many draws as chains, {num_chains}, where only some data are refined; got "
                    f"{self.num_draws}."
                )
        fitted, latents = self.fitted, self._latent_draws()
        with evaluated(fitted), seeded(seed):
            rows = starting_rows(self.log_weights, num_chains)
            start = {
                name: chosen_rows(value, rows, None if rows.dim() == 1 else self._data_axis(name))
                for name, value in latents.items()
            }
            coordinates = coordinates_of(fitted, latents)
            target = Target(fitted, coordinates, start, self.data_plate, chosen)
            with tqdm(
                total=kernel.warmup + num_samples,
                disable=not progress,
                delay=2.0,
                unit="step",
                desc="refining",
            ) as bar:
                refined = refine(target, kernel, num_samples, kept, bar.update)
            draws = self._with_unrefined(refined.draws, chosen)
            source = WeightedRuns.of(fitted.model, fitted.guide, fitted.args, fitted.kwargs)
            draws |= source.deterministic(draws)
        if refined.chains.interrupted:
            _warn(
                f"Refinement was interrupted after {len(next(iter(draws.values())))} draws, which are kept: "
                f"{num_chains * kept} were asked for."
            )
        return self._refined(draws, refined.chains)

    def _data_axis(self, name: str) -> int:
        """Return the axis of the data among a site's draws, counted from the right."""
        site = self.fitted.sites[name]
        return next(dim for plate, dim, _ in site.plates if plate == self.data_plate) - site.event_dim

    def _with_unrefined(self, refined: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
        """Return refined draws of the chosen data and those that there are of the others."""
        if bool(chosen.all()):
            return refined
        result = {}
        for name, value in refined.items():
            axis = self._data_axis(name)
            joined = self.draws[name][: len(value)].clone()
            joined.movedim(axis, 1)[:, chosen] = value.movedim(axis, 1)[:, chosen]
            result[name] = joined
        return result

    def _refined(self, draws: dict[str, Tensor], chains: Chains) -> "Posterior":
        num, chosen = len(next(iter(draws.values()))), chains.refined
        weights = (
            self.log_weights[:num]
            if not bool(chosen.all())
            else self.log_weights.new_zeros(num, *chosen.shape)
        )
        log_weights = torch.where(chosen, 0.0, weights)
        least = torch.full_like(self.ess, torch.inf)
        for name, value in chains.ess.items():
            if self.data_plate is None:
                least = torch.minimum(least, value.min().to(least))
            else:
                by_datum = (
                    value.movedim(self._data_axis(name), 0).flatten(1)
                    if value.dim() > 1
                    else value.unsqueeze(1)
                )
                least = torch.minimum(least, by_datum.amin(1).to(least))
        return replace(
            self,
            draws=MappingProxyType({name: draws[name] for name in self.draws if name in draws}),
            log_weights=log_weights,
            khat=torch.where(chosen, -torch.inf, self.khat),
            ess=torch.where(chosen, least, effective_sample_size(log_weights)),
            is_resampled=self.is_resampled or bool(chosen.all()),
            chains=chains,
        )

    # ------------------------------------------------------------------------------------------------------ use
    def predict(
        self,
        *args: Any,
        num_draws: int | None = None,
        new_plates: tuple[str, ...] = (),
        seed: int | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Prediction:
        """Draw observed values by the model at these draws: for these data, or for others.

        Observed sites are drawn, whether or not their values are given. Elements of a plate beyond those fitted are
        drawn from the model given the draws of the others; the first ones are those that were fitted, unless
        ``new_plates`` says that a plate has others. Sites that the guide leaves out are drawn from the model.

        Args:
            *args: Positional arguments of the model; with none at all those of the fitted data.
            num_draws: How many of the draws to use; all by default.
            new_plates: Plates whose elements are all others than those fitted.
            seed: Seed of the random numbers; the global generators are put back afterwards.
            progress: Whether to show a bar when it takes long.
            **kwargs: Keyword arguments of the model.

        Returns:
            The observed and deterministic sites by name, and what the model returned.

        Raises:
            GraphflowsError: If there are not so many draws, a plate is unknown, or a site has fewer elements than
                were fitted, or another kind of shape.
        """
        num = self.num_draws if num_draws is None else num_draws
        _require_positive(num_draws=num)
        if num > self.num_draws:
            raise GraphflowsError(f"Expected at most the {self.num_draws} draws that there are; got {num}.")
        fitted = self.fitted
        if not args and not kwargs:
            args, kwargs = fitted.args, fitted.kwargs
        with evaluated(fitted), seeded(seed):
            return predict(
                fitted,
                (args, kwargs),
                {name: self.draws[name][:num] for name in fitted.latents},
                new_plates=new_plates,
                progress=progress,
            )

    def log_likelihood(self, *, progress: bool = True) -> dict[str, Tensor]:
        """Return the log-likelihood of each observed value at each draw.

        Its size is that of the data times the draws; :meth:`log_likelihood_chunks` needs no more memory than one run.

        Args:
            progress: Whether to show a bar when it takes long.

        Returns:
            By observed site a tensor (draws, *plates). Events are summed over; masked elements are zero.

        Raises:
            UnsupportedModelError: If the model sums out sites that several observed values share.
        """
        parts: dict[str, list[Tensor]] = {}
        with _bar(self.num_draws, progress, "log-likelihood") as bar:
            for part in self.log_likelihood_chunks():
                for name, value in part.items():
                    parts.setdefault(name, []).append(value)
                bar.update(len(next(iter(part.values()))))
        return {name: torch.cat(values) for name, values in parts.items()}

    def log_likelihood_chunks(self) -> Iterator[dict[str, Tensor]]:
        """Yield :meth:`log_likelihood` for some draws after the other."""
        with evaluated(self.fitted):
            for _, part in log_likelihood_chunks(self.fitted, self._latent_draws()):
                yield part

    def loo(
        self, by: str | None = None, *, num_inner: int = 100, seed: int | None = None, progress: bool = True
    ) -> LOO:
        """Estimate how well each datum is predicted from the others (leave-one-out cross-validation).

        See :mod:`~pyro_graphflows.infer.loo` for what is computed. Latents whose only datum is left out are
        integrated over.

        References:
            [1] Vehtari, Gelman and Gabry (2017), Practical Bayesian model evaluation using leave-one-out
            cross-validation and WAIC, Statistics and Computing 27. There latents of single data stay fixed.

        Args:
            by: The plate whose elements are left out, as groups are; by default single elements of all plates around
                the observed sites.
            num_inner: The number of inner draws of the latents that are integrated over.
            seed: Seed of the random numbers; the global generators are put back afterwards.
            progress: Whether to show a bar when it takes long.

        Returns:
            The sum of the log predictive densities, its standard error, the terms and their Pareto shapes. Those of
            resampled draws are at least that of their pool.

        Raises:
            GraphflowsError: If the observed sites are in no plate, or in different ones and ``by`` is not given; if all
                weights are zero.
            UnsupportedModelError: If the model sums out sites that several data share.
        """
        with evaluated(self.fitted), seeded(seed):
            loo = leave_one_out(
                self.fitted,
                WeightedDraws(
                    self._latent_draws(), None if self.is_resampled else self.log_weights, self.data_plate
                ),
                by=by,
                num_inner=num_inner,
                progress=progress,
            )
        if not self.is_resampled or self.khat.shape not in ((), loo.khat.shape):
            return loo
        # resampled draws are no better than the pool they come from
        return replace(loo, khat=torch.maximum(loo.khat, self.khat.to(loo.khat)))

    def summary(self, sites: tuple[str, ...] | None = None) -> Table:
        """Return a table with a row for each number: mean, sd, quantiles, and how far to trust them.

        The columns ``mean`` to ``95%`` are of the draws as they are; ``mcse`` is the Monte Carlo error of the mean;
        ``ess`` and ``k-hat`` are those of the weights, which say how far the draws are those of the posterior.

        Args:
            sites: The sites; all by default.

        Raises:
            GraphflowsError: If a site is unknown.
        """
        chosen = tuple(self.draws) if sites is None else sites
        unknown = sorted(set(chosen) - set(self.draws))
        if unknown:
            raise GraphflowsError(f"Expected sites among {sorted(self.draws)}; got {unknown}.")
        rows: dict[str, dict[str, Any]] = {}
        for name in chosen:
            value = self.draws[name].to(torch.get_default_dtype())
            flat = value.reshape(self.num_draws, -1)
            quantiles = _quantiles(flat, (0.05, 0.5, 0.95))
            mean = flat.mean(0)
            sd = flat.std(0) if self.num_draws > 1 else torch.full_like(mean, torch.nan)
            ess, khat = (self._of_elements(name, number).flatten() for number in (self.ess, self.khat))
            rhat, effective = self._of_chains(name, ess)
            for place in range(flat.shape[1]):
                index = torch.unravel_index(torch.tensor(place), value.shape[1:]) if value.dim() > 1 else ()
                label = f"{name}[{', '.join(str(int(i)) for i in index)}]" if value.dim() > 1 else name
                rows[label] = {
                    "mean": mean[place].item(),
                    "sd": sd[place].item(),
                    **{f"{100 * level:.0f}%": q[place].item() for level, q in quantiles.items()},
                    "mcse": sd[place].item()
                    / (self.num_draws if rhat is None else effective[place].item()) ** 0.5,
                    "ess": effective[place].item(),
                    "k-hat": khat[place].item(),
                    **({} if rhat is None else {"r-hat": rhat[place].item()}),
                }
        return Table("site", rows, " ".join(self._advice()))

    def to_arviz(
        self, *, log_likelihood: bool = True, posterior_predictive: bool = True, seed: int | None = None
    ) -> Any:
        """Return the draws for ArviZ, as one chain or as those of :meth:`refined`; needs the extra ``[arviz]``.

        The groups are ``posterior``, ``observed_data``, ``sample_stats`` (with ``log_weight``) and, if asked for,
        ``log_likelihood`` and ``posterior_predictive``. Dimensions have the names of the plates.

        Args:
            log_likelihood: Whether to compute pointwise log-likelihoods.
            posterior_predictive: Whether to draw predictions for the data.
            seed: Seed of these.

        Raises:
            GraphflowsError: If ArviZ is not installed.
        """
        try:
            import arviz_base
        except ImportError as error:
            raise GraphflowsError(
                "Expected arviz-base to be installed: pip install pyro-graphflows[arviz]."
            ) from error
        groups: dict[str, dict[str, Any]] = {
            "posterior": {name: self._by_chain(value) for name, value in self.draws.items()},
            "observed_data": {name: value.detach().cpu().numpy() for name, value in self.observed.items()},
            "sample_stats": {"log_weight": self._by_chain(self.log_weights)},
        }
        dims = {
            name: [plate for plate, _, _ in site.plates]
            for name, site in self.fitted.sites.items()
            if site.num_batch == len(site.plates) and site.kind != "deterministic"
        }
        dims["log_weight"] = [] if self.data_plate is None else [self.data_plate]
        if log_likelihood:
            groups["log_likelihood"] = {
                name: self._by_chain(value) for name, value in self.log_likelihood().items()
            }
        if posterior_predictive:
            predicted = self.predict(seed=seed)
            groups["posterior_predictive"] = {
                name: self._by_chain(value) for name, value in predicted.items() if name in self.observed
            }
        return arviz_base.from_dict(groups, dims={name: value for name, value in dims.items() if value})

    def _by_chain(self, value: Tensor) -> Any:
        """Return draws as ArviZ has them, (chains, draws, *shape)."""
        num_chains = 1 if self.chains is None else self.chains.num_chains
        return value.detach().cpu().reshape((num_chains, -1, *value.shape[1:])).numpy()

    def _of_chains(self, name: str, ess: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return R-hat of a site's elements, if there are chains, and their effective number of draws."""
        if self.chains is None:
            return None, ess
        if name not in self.chains.rhat:  # a deterministic site
            draws = self.draws[name].to(torch.get_default_dtype())
            by_chain = draws.reshape((self.chains.num_chains, -1, *draws.shape[1:]))
            return split_rhat(by_chain).flatten(), bulk_ess(by_chain).flatten()
        of_chains = self.chains.ess[name].flatten().to(ess)
        return self.chains.rhat[name].flatten(), torch.where(of_chains.isnan(), ess, of_chains)

    def _latent_draws(self) -> dict[str, Tensor]:
        return {name: self.draws[name] for name in self.fitted.latents}

    def _of_elements(self, name: str, number: Tensor) -> Tensor:
        """Return a number for each element of a site from one for each datum, or for all."""
        site = self.fitted.sites[name]
        shape = self.draws[name].shape[1:]
        if self.data_plate is None:
            return number.expand(shape)
        for plate, dim, _ in site.plates:
            if plate == self.data_plate:
                axis = dim - (0 if site.kind == "deterministic" else site.event_dim)
                if site.kind != "deterministic" and -axis <= len(shape):
                    return number.reshape(-1, *[1] * (-axis - 1)).expand(shape)
        return torch.full(shape, torch.nan)

    # ---------------------------------------------------------------------------------------------------- storage
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the draws, weights and observed values to a file, which :func:`load_posterior` reads.

        The file is whole or absent, and holds data only: reading it runs no code. The model and the guide are not in
        it; their arguments are, if they are tensors, numbers, strings or containers of these.

        Args:
            path: The file; its folder is made if need be.
        """
        fitted = self.fitted
        call = {"args": list(fitted.args), "kwargs": dict(fitted.kwargs)}
        save_checkpoint(
            {
                "format": _FORMAT,
                "draws": dict(self.draws),
                "log_weights": self.log_weights,
                "khat": self.khat,
                "ess": self.ess,
                "data_plate": self.data_plate,
                "observed": dict(self.observed),
                "is_resampled": self.is_resampled,
                "call": call if _is_storable(call) else None,
                "sites": {name: tuple(site) for name, site in fitted.sites.items()},
                "latents": list(fitted.latents),
                "nesting": fitted.nesting,
                "vectorize": fitted.vectorize,
                "chains": None if self.chains is None else _plain(self.chains),
            },
            path,
        )


_FORMAT = "pyro_graphflows posterior 1"


def sample_posterior(
    model: Program,
    guide: Program,
    *args: Any,
    num_draws: int = 1000,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Posterior:
    r"""Draw from a guide, and weigh each draw towards the posterior.

    The model and the guide are called with the same arguments, without gradients and in evaluation mode, many draws at
    once; one by one where the model is not written for that. Memory is bounded by running them in chunks. Sites that
    the model enumerates in parallel and the guide leaves out are summed out of the weights.

    Args:
        model: A Pyro model whose observed values are given by the arguments.
        guide: A guide for it, of any kind: one of Pyro's or a function.
        *args: Positional arguments of both.
        num_draws: The number of draws.
        seed: Seed of the random numbers; the global generators are put back afterwards. ``None`` uses them as they are.
        progress: Whether to show a bar when it takes long.
        **kwargs: Keyword arguments of both.

    Returns:
        The posterior: draws, weights, and what can be done with them.

    Raises:
        GraphflowsError: If ``num_draws`` is not positive, or a density is not a number; the message names the site.
        UnsupportedModelError: If the model has no observed site or the guide draws none of its latent sites, all draws
            are the same (a point estimate), a latent site is missing in the guide, a plate is subsampled, or a site is
            scaled.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> def guide(x):  # a little too wide
        ...     pyro.sample("mu", dist.Normal(x.sum() / (1 + len(x)), 0.6))
        >>> posterior = sample_posterior(model, guide, torch.tensor([0.5, 1.5, 2.0]), num_draws=2000, seed=0)
        >>> posterior.draws["mu"].shape, bool(posterior.khat < 0.7)
        (torch.Size([2000]), True)
        >>> corrected = posterior.reweighted(1000, seed=1)
        >>> bool(abs(corrected.draws["mu"].std() - 0.5) < 0.05)
        True
        >>> corrected.predict(num_draws=100, seed=2)["x"].shape
        torch.Size([100, 3])
    """
    _require_positive(num_draws=num_draws)
    require_pair(model, guide)
    require_arguments(model, args, kwargs, "the options are num_draws, seed and progress")
    with evaluated(model, guide), seeded(seed):
        source = WeightedRuns.of(model, guide, args, kwargs)
        values: dict[str, list[Tensor]] = {}
        weights = []
        with _bar(num_draws, progress, "drawing") as bar:
            for part, _, traces in source.runs(num_draws):
                weights.append(source.log_weights(traces))
                for name, value in source.values(traces, part.stop - part.start).items():
                    values.setdefault(name, []).append(value)
                bar.update(part.stop - part.start)
        draws = {name: torch.cat(value) for name, value in values.items()}
        require_spread(draws, source.fitted.latents, source.first.guide_trace)
    log_weights = torch.cat(weights)
    observed = {
        name: torch.as_tensor(site["value"])
        for name, site in density_sites(source.first.model_trace)
        if site["is_observed"] and not site_is_factor(site)
    }
    return Posterior(
        draws=MappingProxyType(draws),
        log_weights=log_weights,
        khat=psis_khat(log_weights),
        ess=effective_sample_size(log_weights),
        data_plate=None if source.sampler.plate is None else source.sampler.plate.name,
        observed=MappingProxyType(observed),
        is_resampled=False,
        fitted=source.fitted,
    )


def load_posterior(
    path: str | os.PathLike[str],
    model: Program | None = None,
    guide: Program | None = None,
    *args: Any,
    **kwargs: Any,
) -> Posterior:
    """Read a posterior that :meth:`Posterior.save` wrote. No code is run in doing so.

    Args:
        path: The file.
        model: The model, without which there are no predictions, likelihoods or cross-validation.
        guide: The guide, without which nothing can be drawn afresh.
        *args: Their positional arguments, where the file does not have them.
        **kwargs: Their keyword arguments.

    Returns:
        The posterior.

    Raises:
        GraphflowsError: If the file is none of these, or is asked for what it cannot do without the model.
    """
    state = load_checkpoint(path, "Posterior.save", "format", "call")
    if state["format"] != _FORMAT:
        raise GraphflowsError(f"Expected a file of Posterior.save; {str(path)!r} is another.")
    call = state["call"]
    if args or kwargs:
        call = {"args": args, "kwargs": kwargs}
    if call is None and model is not None:
        raise GraphflowsError(
            "Expected the arguments of the model, which the file could not hold: load_posterior(path, model, guide, "
            "*args, **kwargs)."
        )
    call = call or {"args": (), "kwargs": {}}
    sites = {
        name: SiteShape(
            kind,
            tuple(shape),
            event_dim,
            tuple((plate, dim, size) for plate, dim, size in plates),
            enumerated,
        )
        for name, (kind, shape, event_dim, plates, enumerated) in state["sites"].items()
    }
    fitted = Fitted(
        model or _absent("model"),
        guide or _absent("guide"),
        tuple(call["args"]),
        dict(call["kwargs"]),
        sites,
        tuple(state["latents"]),
        state["nesting"],
        state["vectorize"],
    )
    return Posterior(
        draws=MappingProxyType(state["draws"]),
        log_weights=state["log_weights"],
        khat=state["khat"],
        ess=state["ess"],
        data_plate=state["data_plate"],
        observed=MappingProxyType(state["observed"]),
        is_resampled=state["is_resampled"],
        fitted=fitted,
        chains=None if state.get("chains") is None else Chains(**state["chains"]),
    )


def _absent(what: str) -> Callable[..., Any]:
    def absent(*args: Any, **kwargs: Any) -> Any:
        raise GraphflowsError(
            f"Expected the {what}, which is not in the file: load_posterior(path, model, guide)."
        )

    return absent


def _bar(total: int, progress: bool, text: str) -> Any:
    return tqdm(total=total, disable=not progress, delay=2.0, unit="draw", desc=text)


def _require_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise GraphflowsError(f"Expected a positive {name}; got {value!r}.")


def _warn(message: str) -> None:
    warnings.warn(message, GraphflowsWarning, stacklevel=3)


def _quantiles(values: Tensor, levels: tuple[float, ...]) -> dict[float, Tensor]:
    """Return quantiles along the first dimension, interpolated; torch.quantile takes few numbers only."""
    ordered = values.sort(0).values
    result = {}
    for level in levels:
        place = level * (len(values) - 1)
        low = int(place)
        high = min(low + 1, len(values) - 1)
        result[level] = torch.lerp(ordered[low], ordered[high], place - low)
    return result


def _plain(chains: Chains) -> dict[str, Any]:
    """Return what is known of chains as a file holds it."""
    state = {each.name: getattr(chains, each.name) for each in fields(chains)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in state.items()}


def _is_storable(value: Any) -> bool:
    """Return whether a value is read back without running code."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_storable(entry) for key, entry in value.items())
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return all(map(_is_storable, value))
    return value is None or type(value) in (Tensor, bool, int, float, str)
