"""The base of the faithful guides: an AutoGuide whose factors follow an inverse of the model's graph."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.running import RunningGuide

__all__ = ["AutoFaithfulGuide"]


class AutoFaithfulGuide(RunningGuide):
    """A guide whose factors follow an inverse of the model's Bayesian network; subclasses choose the family.

    The guide is compiled on its first call or by :meth:`setup`: the model's trace becomes a graph, the graph is
    inverted, and the inverse becomes blocks of sites with a network each
    (:mod:`~pyro_graphflows.guides.plan`). Called with the model's arguments, it reads the observed values and
    samples every latent site on its own name, in the model's plates, level by level.

    Args:
        model: The model.
        inverse: See :func:`~pyro_graphflows.guides.inverses.resolve_inverse`.
        strict: Whether to refuse models whose dependencies cannot be traced in full
            (:func:`~pyro_graphflows.get_model_graph`).
        resolution: ``"site"``, or ``"element"`` to tell the elements of vector sites apart
            (:func:`~pyro_graphflows.get_model_graph`).
        pool: How data in inner plates reach the sites outside of them: ``"deepset"`` (or a
            :class:`~pyro_graphflows.guides.pooling.DeepSet` that sets its sizes) summarises them, so that these
            sites are amortised too, over data sets of any size; None gives these sites free parameters, which
            fit one data set.
        chain_rank: Of latents that stay dependent across a plate (:mod:`~pyro_graphflows.guides.coupled`): the rank of
            the dependence, 0 for a parameter for each pair of elements; None to choose by the size of the plate.
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`: a function of the model's arguments
            that returns plates that exist already, for subsampling.
        enumerate_sites: Discrete sites that the guide marks ``infer={"enumerate": "parallel"}``, so that
            ``TraceEnum_ELBO`` sums over their values instead of drawing them: their names, or True for all. Every
            latent site then has a network of its own, so that each only meets the values of its own parents.

    Raises:
        GraphflowsError: If ``pool`` or ``chain_rank`` is something else.
    """

    def _trace_given(
        self, latents: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> poutine.Trace:
        missing = [name for name in self.plan.graph.latent if name not in latents]
        if missing:
            raise GraphflowsError(f"Expected a value for every latent site; missing: {', '.join(missing)}.")
        given = {name: latents[name] for name in self.plan.graph.latent}
        with poutine.block():
            return poutine.trace(poutine.condition(self, data=given)).get_trace(*args, **kwargs)

    def log_prob(self, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the log-density of latent values given the data of a call, in nats.

        Args:
            latents: A value for every latent site. Extra batch dimensions on the left are kept.
            *args: Positional arguments of the model.
            **kwargs: Keyword arguments of the model, and ``observations``.

        Returns:
            ``log q(latents | data)``: summed over the sites, per element of the plates where all sites are in the same
            plates (a vector over the data for the common single data plate), and summed over plates otherwise.

        Raises:
            GraphflowsError: If a latent site has no value.
        """
        if self._plan is None:
            self.setup(*args, **{key: value for key, value in kwargs.items() if key != "observations"})
        nodes: Any = self._trace_given(latents, args, kwargs).nodes
        terms = [nodes[name]["fn"].log_prob(nodes[name]["value"]) for name in self.plan.graph.latent]
        plates = [self.plan.graph.plates[name] for name in self.plan.graph.latent]
        if any(each != plates[0] for each in plates):
            depth = max(len(each) for each in plates)
            dims = {frame.dim for frame in self._prototype_frames.values()}
            depth = max((-dim for dim in dims), default=depth)
            terms = [_sum_rightmost(term, depth) for term in terms]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the latents at base noise zero: each site at its factor's centre given the centres before it.

        The centre of a discrete site's factor is its mode.
        """
        self._emit = _centre
        try:
            with torch.no_grad(), poutine.block():
                return self(*args, **kwargs)
        finally:
            self._emit = pyro.sample

    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, num_draws: int = 1000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return quantiles of each latent element, estimated from draws of the guide (1,000 unless told).

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
        if self._plan is None:
            self.setup(*args, **{key: value for key, value in kwargs.items() if key != "observations"})
        depth = max((-state.dim for state in self._plate_states.values()), default=0)
        with torch.no_grad(), poutine.block():
            shapes = {name: value.shape for name, value in self(*args, **kwargs).items()}
            with pyro.plate("_pyro_graphflows_draws", num_draws, dim=-1 - depth):
                draws = self(*args, **kwargs)
        result = {}
        for name, value in draws.items():
            value = value.reshape(num_draws, *shapes[name])
            if (
                self._sites[name].encoding is not None
            ):  # the least value with that share of the draws up to it
                place = (probabilities * num_draws).ceil().long() - 1
                result[name] = value.sort(0).values[place.clamp(0, num_draws - 1).to(value.device)]
                continue
            levels = probabilities.to(value)
            result[name] = torch.quantile(value, levels, dim=0)
        return result

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
        unknown = [name for name in observations if name not in self.plan.graph.observed]
        if unknown:
            raise GraphflowsError(
                f"Expected observed sites ({', '.join(map(str, self.plan.graph.observed))}); "
                f"got {', '.join(unknown)}."
            )
        fixed = dict(observations)

        def guide(
            *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any
        ) -> dict[str, Tensor]:
            return self(*args, observations={**(observations or {}), **fixed}, **kwargs)

        return guide

    # ---------------------------------------------------------------- copies and files

    def bind(self, model: Callable[..., Any]) -> "AutoFaithfulGuide":
        """Give a loaded guide its model back (models are not saved with guides)."""
        self._model = (model,)
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
        state["_emit"] = pyro.sample
        state["_inverse_option"] = None if self._plan is None else self._plan.inverse
        state["prototype_trace"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AutoFaithfulGuide":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for part in (self._model, self.create_plates, self.master):
            memo[id(part)] = part
        state = self.__dict__.copy()
        shared = {
            key: state.pop(key) for key in ("_model", "create_plates", "master", "_emit", "prototype_trace")
        }
        state["plates"] = {}
        new.__dict__.update(shared)
        new.__dict__.update(copy.deepcopy(state, memo))
        return new


def _centre(name: str, fn: Any, **_: Any) -> Tensor:
    while hasattr(fn, "base_dist") and not hasattr(fn, "centre"):
        if isinstance(fn, dist.Independent):
            break
        fn = fn.base_dist
    return fn.centre() if hasattr(fn, "centre") else fn.mean


def _sum_rightmost(term: Tensor, depth: int) -> Tensor:
    depth = min(depth, term.dim())
    return term.flatten(term.dim() - depth).sum(-1) if depth else term
