"""Joint samples of all sites of a model, observed ones included, as if nothing had been observed.

There are three ways, tried in this order (:func:`find_batching`).

- *In a plate*: one run inside an outermost plate gives all samples at once, provided that the model treats a new
  batch dimension on the left as such. Many models do not (``z.sum()``, ``z[0]``, ``X @ c``), and some of these would
  give wrong samples without an error.
- *Vectorised*: :func:`torch.vmap` runs the model as it is, once for all samples. It is stopped by values that leave
  the tensors (``float(z)``), and by writing random values into a tensor that is none.
- *One by one*: a run for each sample. It is slow, and so the reason and the place are kept for the user.

Hence a check of the first two: two single runs are replayed side by side, and must have the same log-densities.
Subsampled plates keep the rows that they had when the model was traced.
"""

import itertools
import os
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.inspect.model_graph import trace_model
from pyro_graphflows.inspect.runs import (
    is_transparent,
    kept_buffers,
    log_density_at,
    quiet_run,
    random_sites,
    support_of,
)
from pyro_graphflows.inspect.trace import TracedModel
from pyro_graphflows.inspect.tracer import in_library

__all__ = ["Batching", "find_batching", "nesting_of_sites", "sample_prior", "unconstrained_of"]

_PLATE = "_pyro_graphflows_samples"
SECONDS_WITHOUT_A_BAR = 3.0
UNCONSTRAINED = ": unconstrained"


@dataclass(frozen=True)
class Batching:
    """How many samples of a model can be drawn in one run.

    Attributes:
        traced: The model as traced.
        way: ``"plate"``, ``"vmap"`` or ``"single"``: in an outermost plate, by :func:`torch.vmap`, or not at all.
        reason: Why only single runs are possible: the site, the place in the user's code, and what to write instead.
        indices: The indices of plates, as many as in ``traced``; those of ``traced`` where nothing is said.
        unconstrained: Sites whose unconstrained values, by the support that each sample has, are beside the samples
            (:func:`unconstrained_of` their names): supports that depend on other sites differ from sample to sample.
        nesting: The dimensions on the left of the model's events; those of the sites of ``traced`` if None.
    """

    traced: TracedModel
    way: str
    reason: str = ""
    indices: Mapping[str, torch.Tensor] = field(default_factory=dict)
    unconstrained: Collection[str] = ()
    nesting: int | None = None


def sample_prior(
    model: Callable,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    *,
    num_samples: int,
    vectorize: bool = True,
    batching: Batching | None = None,
) -> dict[str, torch.Tensor]:
    """Draw joint samples of all latent and observed sites of the unconditioned model.

    Args:
        model: A Pyro model.
        model_args: Its arguments. Sizes that depend on data are those of the data given; values of observed
            sites are not used.
        model_kwargs: Its keyword arguments.
        num_samples: How many samples.
        vectorize: Whether to draw them all in one run where the model allows it.
        batching: What :func:`find_batching` says of the model with these arguments, if that is at hand.

    Returns:
        For each latent, marginalised and observed site, samples of shape (num_samples, batch shape, event
        shape). The present random state is used and advanced.

    Raises:
        UnsupportedModelError: If such samples are not the model (factors, masks, scales, improper priors,
            distributions that use observed data directly), if the sites differ from run to run, or if matrices of the
            model have no factors at some draws.
        GraphflowsError: If ``num_samples`` is not positive.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x=None):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> samples = sample_prior(model, (torch.zeros(3),), num_samples=10)
        >>> samples["z"].shape, samples["x"].shape
        (torch.Size([10]), torch.Size([10, 3]))
    """
    if num_samples < 1:
        raise GraphflowsError(f"Expected a positive number of samples; got {num_samples}.")
    args, kwargs = tuple(model_args), dict(model_kwargs or {})
    if batching is None:
        traced = trace_model(model, args, kwargs, strict=False)
        many = vectorize and num_samples > 1
        batching = find_batching(model, args, kwargs, traced=traced) if many else Batching(traced, "single")
    _require_generative(batching.traced)
    sites = random_sites(batching.traced.trace)
    unconditioned = _unconditioned(model, batching.traced, batching.indices)
    with kept_buffers(model):
        way = batching.way if vectorize and num_samples > 1 else "single"
        draw = {"plate": _draw_at_once, "vmap": _draw_by_vmap, "single": _draw_one_by_one}[way]
        nesting = nesting_of_sites(sites) if batching.nesting is None else batching.nesting
        wanted = _Wanted(sites, nesting, batching.unconstrained)
        try:
            return draw(unconditioned, args, kwargs, wanted, num_samples)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise UnsupportedModelError(
                f"Expected a model that can be run at draws of its prior; at one, algebra fails: {error} Use double "
                "precision, add to the diagonals of its covariances, or give its priors less room."
            ) from error


def unconstrained_of(name: str) -> str:
    """Return the name of a site's unconstrained values beside samples."""
    return name + UNCONSTRAINED


@dataclass(frozen=True)
class _Wanted:
    """The sites whose values are wanted, and those of them whose unconstrained values are."""

    sites: dict[str, Any]
    nesting: int
    unconstrained: Collection[str]

    def of(self, nodes: Any) -> dict[str, torch.Tensor]:
        """Return the values of a run."""
        found = {name: nodes[name]["value"] for name in self.sites}
        for name in self.unconstrained:
            found[unconstrained_of(name)] = biject_to(support_of(nodes[name]["fn"])).inv(found[name])
        return found


def find_batching(
    model: Callable,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    *,
    traced: TracedModel,
    nesting: int | None = None,
) -> Batching:
    """Find how joint samples of a model can be drawn.

    Args:
        model: A Pyro model.
        model_args: Its arguments.
        model_kwargs: Its keyword arguments.
        traced: The model as traced with these arguments.
        nesting: The dimensions on the left of the model's events, where it has sites that are not in ``traced``.

    Raises:
        UnsupportedModelError: If samples are not the model.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     c = pyro.sample("c", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(x @ c, 1.0), obs=y)
        >>> x = torch.ones(5, 3)
        >>> find_batching(model, (x,), traced=trace_model(model, (x,))).way
        'vmap'
    """
    args, kwargs = tuple(model_args), dict(model_kwargs or {})
    _require_generative(traced)
    sites = random_sites(traced.trace)
    unconditioned = _unconditioned(model, traced)
    with kept_buffers(model):
        most = nesting_of_sites(sites) if nesting is None else nesting
        if _allows_batches(unconditioned, args, kwargs, most, sites):
            return Batching(traced, "plate", nesting=nesting)
        reason = _why_no_vmap(unconditioned, args, kwargs, sites)
    way = "vmap" if reason is None else "single"
    return Batching(traced, way, reason or "", nesting=nesting)


def _require_generative(traced: TracedModel) -> None:
    if traced.not_generative:
        reasons = "; ".join(f"site '{name}': {why}" for name, why in traced.not_generative.items())
        raise UnsupportedModelError(f"Samples of the unconditioned model are not the model: {reasons}.")


def _unconditioned(
    model: Callable, traced: TracedModel, indices: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> Callable:
    """Return the model without its observations, with the rows that its plates had when it was traced."""
    subsamples = Trace()
    for name, node in traced.trace.nodes.items():
        if node["type"] == "sample" and site_is_subsample(node):
            subsamples.add_node(name, **{**node, "value": indices.get(name, node["value"])})
    return pyro.poutine.replay(pyro.poutine.uncondition(model), trace=subsamples)


def nesting_of_sites(sites: dict[str, Any]) -> int:
    """Return how many dimensions the model uses on the left of its events."""
    dims = [len(site["fn"].batch_shape) for site in sites.values()]
    dims += [-frame.dim for site in sites.values() for frame in site["cond_indep_stack"] if frame.vectorized]
    return max(dims, default=0)


def _run(model: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    # The random state is the caller's: quiet_run() would put it back.
    with torch.no_grad(), pyro.poutine.block(), pyro.validation_enabled(False):
        return pyro.poutine.trace(model).get_trace(*args, **kwargs)


def _batched(model: Callable, nesting: int, num_samples: int) -> Callable:
    def inside_plate(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(_PLATE, num_samples, dim=-1 - nesting):
            return model(*args, **kwargs)

    return inside_plate


class _StepByStep(Messenger):
    """Draws hidden Markov models step by step: Pyro draws, and joins, the paths from all states at all times."""

    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]) is dist.DiscreteHMM and msg["value"] is None and not msg["done"]:
            msg["value"], msg["done"] = _draw_chain(msg["fn"]), True


def _draw_chain(fn: Any) -> torch.Tensor:
    """Draw from a hidden Markov model of discrete states, as its ``sample`` does."""
    length, batch = fn.duration, fn.batch_shape
    number = fn.initial_logits.shape[-1]  # of states

    def state_of(logits: torch.Tensor) -> torch.Tensor:
        below = logits.exp().cumsum(-1)[..., :-1]
        return (below < torch.rand(batch).to(below).unsqueeze(-1)).sum(-1)

    state, states = state_of(fn.initial_logits.expand(*batch, number)), []
    steps = fn.transition_logits.expand(*fn.transition_logits.shape[:-3], length, number, number)
    for t in range(length):
        rows = steps[..., t, :, :].expand(*batch, number, number)
        chosen = state[..., None, None].expand(*batch, 1, number)
        state = state_of(rows.gather(-2, chosen).squeeze(-2))
        states.append(state)
    each = fn.observation_dist.expand((*batch, length, number)).sample()
    event = each.shape[len(batch) + 2 :]
    index = torch.stack(states, -1).reshape(*batch, length, 1, *(1,) * len(event))
    return each.gather(len(batch) + 1, index.expand(*batch, length, 1, *event)).squeeze(len(batch) + 1)


def _draw_at_once(
    model: Callable, args: tuple, kwargs: dict[str, Any], wanted: _Wanted, num_samples: int
) -> dict[str, torch.Tensor]:
    batched = _StepByStep()(_batched(model, wanted.nesting, num_samples))
    found = wanted.of(_run(batched, args, kwargs).nodes)
    samples = {}
    for name, value in found.items():
        batch_shape = wanted.sites[name.removesuffix(UNCONSTRAINED)]["fn"].batch_shape
        event = value.shape[1 + wanted.nesting :]
        samples[name] = value.reshape(num_samples, *batch_shape, *event)
    return samples


def _draw_one_by_one(
    model: Callable, args: tuple, kwargs: dict[str, Any], wanted: _Wanted, num_samples: int
) -> dict[str, torch.Tensor]:
    draws: dict[str, list[torch.Tensor]] = {}
    runs = range(num_samples)
    for _ in tqdm(runs, "joint samples of the model", leave=False, delay=SECONDS_WITHOUT_A_BAR, unit="run"):
        trace = _run(model, args, kwargs)
        for name in wanted.sites:
            if name not in trace:
                raise UnsupportedModelError(
                    f"Expected the same sites in every run; '{name}' is missing in one. Sites that are sampled "
                    "only sometimes have no joint samples: sample them always and choose with torch.where."
                )
        for name, value in wanted.of(trace.nodes).items():
            draws.setdefault(name, []).append(value)
    samples = {}
    for name, values in draws.items():
        if len({value.shape for value in values}) > 1:
            raise UnsupportedModelError(
                f"At site '{name}', expected the same shape in every run; it varies. Pad to one size and mask."
            )
        samples[name] = torch.stack(values)
    return samples


class _SideBySide(Messenger):
    """Gives each site the values of several runs, stacked at the dimension of the outermost plate."""

    def __init__(self, traces: list[Any], nesting: int) -> None:
        super().__init__()
        self.traces, self.nesting = traces, nesting

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.traces[0] or is_transparent(msg):
            return
        nodes = [trace.nodes[msg["name"]] for trace in self.traces]
        if site_is_subsample(msg):
            msg["value"] = nodes[0]["value"]
        else:
            event_dim = len(nodes[0]["fn"].event_shape)
            msg["value"] = _stacked([node["value"] for node in nodes], self.nesting, event_dim)
        msg["done"] = True


def _stacked(values: list[torch.Tensor], nesting: int, event_dim: int) -> torch.Tensor:
    batch_dim = values[0].dim() - event_dim
    shape = values[0].shape
    padded = (1,) * (nesting - batch_dim) + tuple(shape)
    return torch.stack([value.reshape(padded) for value in values])


def _allows_batches(
    model: Callable, args: tuple, kwargs: dict[str, Any], nesting: int, sites: dict[str, Any]
) -> bool:
    """Whether the model gives the same log-densities with and without an outermost plate."""
    sizes = {size for site in sites.values() for size in (*site["fn"].batch_shape, *site["fn"].event_shape)}
    # As many as the model has nowhere else, so that a dimension cannot fit by chance.
    number = next(number for number in itertools.count(2) if number not in sizes)
    with quiet_run(model):
        try:
            runs = [_run(model, args, kwargs) for _ in range(number)]
            if any(name not in run for name in sites for run in runs):
                return False
            replayed = _SideBySide(runs, nesting)(_batched(model, nesting, len(runs)))
            both = _run(replayed, args, kwargs)
            for name in sites:
                node = both.nodes[name]
                batch_dim = len(node["fn"].batch_shape)
                together = log_density_at(node["fn"], node["value"])
                if together.dim() != batch_dim or batch_dim > nesting + 1:
                    return False
                apart = [log_density_at(run.nodes[name]["fn"], run.nodes[name]["value"]) for run in runs]
                expected = _stacked(apart, nesting, 0)
                if not torch.allclose(together.expand(expected.shape), expected, 1e-4, 1e-6, equal_nan=True):
                    return False
        except Exception:  # whatever the model raises about shapes: it does not take batches
            return False
    return True


# ---------------------------------------------------------------- by torch.vmap


class _FreshNoise(TorchFunctionMode):
    """Noise that distributions write into a fresh tensor, where vmap needs a new one: ``empty(n).normal_()``."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "normal_":
            return _normal(*args, **kwargs)
        if name == "uniform_":
            return _uniform(*args, **kwargs)
        if name == "exponential_":
            return _exponential(*args, **kwargs)
        if name == "cauchy_":
            return _cauchy(*args, **kwargs)
        return func(*args, **kwargs)


def _normal(like: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return mean + std * torch.randn_like(like)


def _uniform(like: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * torch.rand_like(like)


def _exponential(like: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
    return -torch.log1p(-torch.rand_like(like)) / rate


def _cauchy(like: torch.Tensor, median: float = 0.0, sigma: float = 1.0) -> torch.Tensor:
    return median + sigma * (torch.pi * (torch.rand_like(like) - 0.5)).tan()


def _draw(fn: Any) -> torch.Tensor:
    """Draw from a distribution inside vmap; Dirichlet and beta values by gamma ones, which vmap knows."""
    if isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        return _draw(fn.base_dist)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        value = _draw(fn.base_dist)
        for transform in fn.transforms:
            value = transform(value)
        return value
    if isinstance(fn, torch.distributions.Beta):
        return _draw(fn._dirichlet)[..., 0]
    if isinstance(fn, torch.distributions.Dirichlet):
        gammas = torch._standard_gamma(fn.concentration).clamp(min=torch.finfo(fn.concentration.dtype).tiny)
        return gammas / gammas.sum(-1, keepdim=True)
    with _FreshNoise():
        return fn.rsample() if fn.has_rsample else fn.sample()


class _Drawn(Messenger):
    """Draws sites inside vmap, or gives them values; notes which site came last."""

    def __init__(self, values: Mapping[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        self.values = values
        self.last: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if self.values is not None and msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
        elif msg["value"] is None and not msg["done"]:
            msg["value"], msg["done"] = _draw(msg["fn"]), True

    def _pyro_post_sample(self, msg: Any) -> None:
        self.last = msg["name"]


def _vmapped(function: Callable, *operands: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        return torch.vmap(function, randomness="different")(*operands)


def _draw_by_vmap(
    model: Callable, args: tuple, kwargs: dict[str, Any], wanted: _Wanted, num_samples: int
) -> dict[str, torch.Tensor]:
    def run(_: torch.Tensor) -> dict[str, torch.Tensor]:
        return wanted.of(_run(_Drawn()(model), args, kwargs).nodes)

    return _vmapped(run, torch.zeros(num_samples))


def _why_no_vmap(model: Callable, args: tuple, kwargs: dict[str, Any], sites: dict[str, Any]) -> str | None:
    """Return why the model cannot be run by vmap; None if it can, with the same log-densities as single runs."""
    drawn, given = _Drawn(), _Drawn()

    def draw(_: torch.Tensor) -> dict[str, torch.Tensor]:
        trace = _run(drawn(model), args, kwargs)
        return {name: trace.nodes[name]["value"] for name in sites}

    def score(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given.values = values
        nodes = _run(given(model), args, kwargs).nodes
        return {name: log_density_at(nodes[name]["fn"], nodes[name]["value"]) for name in sites}

    with quiet_run(model):
        try:
            runs = [_run(model, args, kwargs), _run(model, args, kwargs)]
            if any(name not in run for name in sites for run in runs):
                return "its sites differ from run to run"
        except Exception as error:
            return f"it cannot be run without its observations ({_first_line(error)})"
        try:
            _vmapped(draw, torch.zeros(2))
            values = {name: torch.stack([run.nodes[name]["value"] for run in runs]) for name in sites}
            together = _vmapped(score, values)
        except Exception as error:
            return _why(error, drawn if given.last is None else given, sites)
        for name in sites:
            nodes = [run.nodes[name] for run in runs]
            apart = torch.stack([log_density_at(node["fn"], node["value"]) for node in nodes])
            if not torch.allclose(together[name].expand(apart.shape), apart, 1e-4, 1e-6, equal_nan=True):
                return f"site '{name}' has other log-densities in a batch of runs than in single ones"
    return None


def _why(error: Exception, run: _Drawn, sites: Mapping[str, Any]) -> str:
    """Say at which site, and where in the user's code, a batch of runs stopped, and what to write instead."""
    names = list(sites)
    at = 0 if run.last is None or run.last not in names else names.index(run.last) + 1
    site = names[min(at, len(names) - 1)]
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not in_library(os.path.abspath(f.filename))
    ]
    place = f" ({frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`)" if frames else ""
    text = str(error)
    if "inplace" in text or "in-place" in text:
        remedy = "make a tensor of the random values (torch.stack, torch.cat, torch.where) instead of writing into one"
    elif ".item()" in text or "data-dependent" in text or "scalar" in text:
        remedy = "keep random values as tensors: no float(), .item(), .tolist() or Python condition on them"
    else:
        remedy = "use torch functions of tensors throughout"
    return f"many runs at once stop at site '{site}'{place}: {_first_line(error)}. There, {remedy}"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
