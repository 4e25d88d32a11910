"""Joint samples of all sites of a model, observed ones included, as if nothing had been observed.

One run inside an outermost plate gives all samples at once, provided that the model treats a new batch
dimension on the left as such. Many models do not (``z.sum()``, ``z[0]``), and some of these would give wrong
samples without an error. Hence a check: two runs without the plate are replayed side by side inside it, and
must have the same log-densities. Models that fail it are run once for each sample.
"""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.inspect.graph import trace_model
from pyro_graphflows.inspect.trace import TracedModel, is_transparent, kept_buffers, quiet_run

__all__ = ["sample_prior"]

_PLATE = "_pyro_graphflows_samples"


def sample_prior(
    model: Callable,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    *,
    num_samples: int,
    vectorize: bool = True,
    traced: TracedModel | None = None,
) -> dict[str, torch.Tensor]:
    """Draw joint samples of all latent and observed sites of the unconditioned model.

    Args:
        model: A Pyro model.
        model_args: Its arguments. Sizes that depend on data are those of the data given; values of observed
            sites are not used.
        model_kwargs: Its keyword arguments.
        num_samples: How many samples.
        vectorize: Whether to draw them all in one run where the model allows it.
        traced: The model as traced with these arguments, if that is at hand.

    Returns:
        For each latent, marginalised and observed site, samples of shape (num_samples, *batch shape, *event
        shape). The present random state is used and advanced.

    Raises:
        UnsupportedModelError: If such samples are not the model (factors, masks, scales, improper priors,
            distributions that use observed data directly), or if the sites differ from run to run.
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
    traced = trace_model(model, args, kwargs, strict=False) if traced is None else traced
    if traced.not_generative:
        reasons = "; ".join(f"site '{name}': {why}" for name, why in traced.not_generative.items())
        raise UnsupportedModelError(f"Samples of the unconditioned model are not the model: {reasons}.")
    sites = {
        name: site
        for name, site in traced.trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not is_transparent(site)
    }
    unconditioned = pyro.poutine.uncondition(model)
    nesting = _nesting(sites)
    with kept_buffers(model):
        if vectorize and num_samples > 1 and _allows_batches(unconditioned, args, kwargs, nesting, sites):
            return _draw_at_once(unconditioned, args, kwargs, nesting, sites, num_samples)
        return _draw_one_by_one(unconditioned, args, kwargs, sites, num_samples)


def _nesting(sites: dict[str, Any]) -> int:
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


def _draw_at_once(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    nesting: int,
    sites: dict[str, Any],
    num_samples: int,
) -> dict[str, torch.Tensor]:
    trace = _run(_batched(model, nesting, num_samples), args, kwargs)
    samples = {}
    for name, site in sites.items():
        fn = site["fn"]
        value = trace.nodes[name]["value"]
        samples[name] = value.reshape(
            num_samples, *fn.batch_shape, *value.shape[value.dim() - len(fn.event_shape) :]
        )
    return samples


def _draw_one_by_one(
    model: Callable, args: tuple, kwargs: dict[str, Any], sites: dict[str, Any], num_samples: int
) -> dict[str, torch.Tensor]:
    draws: dict[str, list[torch.Tensor]] = {name: [] for name in sites}
    for _ in range(num_samples):
        trace = _run(model, args, kwargs)
        for name in sites:
            if name not in trace:
                raise UnsupportedModelError(
                    f"Expected the same sites in every run; '{name}' is missing in one. Sites that are sampled "
                    "only sometimes have no joint samples: sample them always and choose with torch.where."
                )
            draws[name].append(trace.nodes[name]["value"])
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
    with quiet_run(model):
        first = _run(model, args, kwargs)
        subsamples = Trace()
        for name, node in first.nodes.items():
            if node["type"] == "sample" and site_is_subsample(node):
                subsamples.add_node(name, **node)
        try:
            runs = [first, _run(pyro.poutine.replay(model, trace=subsamples), args, kwargs)]
            if any(name not in run for name in sites for run in runs):
                return False
            replayed = _SideBySide(runs, nesting)(_batched(model, nesting, len(runs)))
            both = _run(replayed, args, kwargs)
            for name in sites:
                node = both.nodes[name]
                batch_dim = len(node["fn"].batch_shape)
                together = node["fn"].log_prob(node["value"])
                if together.dim() != batch_dim or batch_dim > nesting + 1:
                    return False
                apart = [run.nodes[name]["fn"].log_prob(run.nodes[name]["value"]) for run in runs]
                expected = _stacked(apart, nesting, 0)
                if not torch.allclose(together.expand(expected.shape), expected, 1e-4, 1e-6, equal_nan=True):
                    return False
        except Exception:  # whatever the model raises about shapes: it does not take batches
            return False
    return True
