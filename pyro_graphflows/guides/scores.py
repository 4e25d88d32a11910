r"""Score features: what a site's data say of it, as the gradient of their log-density at fixed reference values.

Beside raw data, a site v can read

.. math:: s_v(x) = \nabla_{u_v} \sum_{y \in \text{observed children of } v} \log p(x_y \mid \text{their parents})
          \Bigr|_{u = \bar u},

with all latents, in unconstrained coordinates u, at the means :math:`\bar u` of the model's joint samples. It has the
size of v however wide the data are, and in exponential families with natural parameters linear in v it is sufficient;
the sum over a plate that v is not in comes by itself, for any number of elements. It is a function of v's observed
children and of what else their densities read, which are all among v's parents in a faithful inverse: nothing new is
read (:func:`sites_with_scores` makes sure). References are the same in each call: a second one nearer to the data would
make the score of v a function of whatever moved it, of data of other sites.

Where the data are wide, what a network must learn is which few directions of them count. A score says so: where
regressions on held-out joint samples find no more in the data than in their score, the site reads the score alone.

Scores are inputs, held fixed where gradients are taken: those with respect to parameters of the model are of the
objective with the features as they are in this step.

References:
    [1] Alsing and Wandelt (2018), Generalized massive optimal data compression, MNRAS Letters 476.
    [2] Brehmer, Louppe, Pavez and Cranmer (2020), Mining gold from implicit models to improve likelihood-free
        inference, PNAS 117.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.structures import InverseGraph
from pyro_graphflows.guides.call import Call, PlateState
from pyro_graphflows.guides.conditionals.pooling import without_leading_ones
from pyro_graphflows.guides.samples import ModelDraws
from pyro_graphflows.guides.sites import LatentSite, is_constant
from pyro_graphflows.inspect import TracedModel
from pyro_graphflows.inspect.runs import undressed
from pyro_graphflows.regression import HELD_OUT, WINSOR, in_float64, location_and_scale, ridge_slopes

__all__ = ["ScoreReader", "Scored", "Verdict", "judge_scores", "score_name", "sites_with_scores"]

GAIN = 0.02  # nats; less cannot be told from noise in the samples
TIE = 0.02  # nats that data may say beyond their score and be left out
NUM_ROWS = 4000  # of joint samples that judge
FEWEST_ROWS = 200
RANDOM_UNITS = 200  # of the nonlinear regressions
RIDGES = (1e-5, 1e-3, 1e-1)  # times the number of rows; the best on held-out rows counts
CHUNK = 500  # joint samples in one run of the model


def score_name(site: str) -> str:
    """Return the name of a site's score among the inputs of a block."""
    return f"score({site})"


@dataclass(frozen=True)
class Scored:
    """Which sites can read scores.

    Attributes:
        children: For each of them, its observed children.
        reasons: Why others cannot, where they have observed children.
    """

    children: Mapping[str, tuple[str, ...]]
    reasons: Mapping[str, str]


def sites_with_scores(
    traced: TracedModel,
    inverse: InverseGraph,
    sites: Mapping[str, LatentSite],
    plates: Mapping[str, PlateState],
    readable: Mapping[str, int],
) -> Scored:
    """Return the sites whose observed children say something by their gradient, all of which the site may read.

    Args:
        traced: The traced model.
        inverse: The guide's factorisation, over sites.
        sites: The latent sites.
        plates: The plates at set-up.
        readable: The observed nodes and inputs that can be network inputs.
    """
    nodes: Any = traced.trace.nodes
    graph = traced.graph
    common = _common_reason(traced, sites, plates)
    children: dict[str, tuple[str, ...]] = {}
    reasons: dict[str, str] = {}
    for site, latent in sites.items():
        found = tuple(name for name in graph.observed if site in graph.parents(name))
        if not found:
            continue
        reason = common
        seen = set(inverse.parents[site])
        if reason is None and latent.encoding is not None:
            reason = "it is discrete"
        for name in found:
            read = {
                name,
                *(
                    parent
                    for parent in graph.parents(name)
                    if graph.role(parent) not in ("latent", "marginalised")
                ),
            }
            if reason is None and name in traced.without_data:
                reason = f"{name} holds no data"
            if reason is None and hasattr(undressed(nodes[name]["fn"]), "stand_in"):
                reason = f"{name} has no density"
            if reason is None and not read <= seen:
                reason = f"it does not read {', '.join(sorted(map(str, read - seen)))}"
            if reason is None and name not in readable:
                reason = f"{name} is no network input"
        if reason is None:
            children[site] = found
        else:
            reasons[site] = reason
    return Scored(children, reasons)


def _common_reason(
    traced: TracedModel, sites: Mapping[str, LatentSite], plates: Mapping[str, PlateState]
) -> str | None:
    """Return why no site of a model can read scores; None if some can."""
    partial = [name for name, plate in plates.items() if plate.subsampled]
    if partial:
        return f"plate {partial[0]} is subsampled"
    if traced.loops:
        return "a plate is a Python loop"
    if traced.graph.marginalised:
        return f"the model sums over {traced.graph.marginalised[0]}"
    discrete = [name for name, site in sites.items() if site.encoding is not None]
    if discrete:
        return f"{discrete[0]} is discrete and has no reference value"
    moving = [name for name, site in sites.items() if not is_constant(site.support)]
    return f"the support of {moving[0]} changes" if moving else None


class ScoreReader(nn.Module):
    """Computes the scores of a call by a run of the model at the reference values, with gradients.

    Args:
        children: For each site with a score, its observed children.
        sites: The latent sites, all of which have reference values.
        around: The plates around each latent site.
        event_dims: The numbers of event dimensions of the observed sites.
    """

    def __init__(
        self,
        children: Mapping[str, tuple[str, ...]],
        sites: Mapping[str, LatentSite],
        around: Mapping[str, tuple[str, ...]],
        event_dims: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.observed_children, self.around, self.event_dims = dict(children), dict(around), dict(event_dims)
        self.sites = dict(sites)
        self.names = tuple(sites)
        for index, site in enumerate(sites.values()):
            self.register_buffer(f"reference_{index}", torch.zeros(site.size))

    def to_plain(self) -> dict[str, Any]:
        """Return what the reader is made from."""
        return {
            "children": self.observed_children,
            "sites": self.sites,
            "around": self.around,
            "event_dims": self.event_dims,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "ScoreReader":
        """Return a reader of the same form, for a state that is loaded."""
        return cls(**plain)

    def set_references_(self, draws: ModelDraws, number: int) -> None:
        """Take the means of joint samples as reference values.

        Args:
            draws: The model's draws.
            number: How many.
        """
        flat = draws.draw(number)
        for index, name in enumerate(self.names):
            rows = flat[name].reshape(-1, flat[name].shape[-1])
            rows = rows[torch.isfinite(rows).all(-1)]
            self._buffers[f"reference_{index}"] = location_and_scale(rows)[0].to(draws.like)

    @property
    def observed(self) -> tuple[str, ...]:
        """The observed sites that are read."""
        return tuple(dict.fromkeys(name for found in self.observed_children.values() for name in found))

    def forward(
        self,
        model: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        values: Mapping[str, Tensor],
        plates: Mapping[str, PlateState],
    ) -> dict[str, Tensor]:
        """Return the scores by name, ``(*batch, size)`` each, in the dimensions of the site's plates.

        Args:
            model: The model.
            arguments: Its positional and keyword arguments.
            values: The values of the observed sites; dimensions on the left of all plates are a batch.
            plates: The plates of the call.

        Raises:
            GraphflowsError: If a plate is subsampled.
        """
        partial = [name for name, plate in plates.items() if plate.subsampled]
        if partial:
            raise GraphflowsError(
                f"Expected plate {partial[0]!r} in full, since scores of its data are features (features='score'); it "
                "is subsampled. Use the full data in each call, or features='raw'."
            )
        depth = max((-plate.dim for plate in plates.values()), default=0)
        batches = [values[n].shape[: values[n].dim() - self.event_dims[n]] for n in self.observed]
        batch = np.broadcast_shapes(*(shape[: max(0, len(shape) - depth)] for shape in batches))
        leaves: dict[str, Tensor] = {}
        args, kwargs = arguments
        with (
            torch.enable_grad(),
            poutine.block(),
            pyro.validation_enabled(False),
        ):
            given: dict[str, Tensor] = {}
            for index, name in enumerate(self.names):
                site = self.sites[name]
                shape = [1] * depth
                for plate in self.around[name]:
                    shape[plates[plate].dim] = plates[plate].size
                reference = getattr(self, f"reference_{index}")
                leaf = reference.expand((*batch, *shape, site.size)).clone().requires_grad_()
                leaves[name] = leaf
                raw = leaf.reshape((*batch, *shape, *site.unconstrained_shape))
                given[name] = biject_to(site.support)(raw if batch else without_ones(raw, site))
            given.update({name: values[name] for name in self.observed})
            trace = poutine.trace(poutine.condition(model, given)).get_trace(*args, **kwargs)
            trace.compute_log_prob(lambda name, site: name in given and name in self.event_dims)
            nodes: Any = trace.nodes
            total = sum((nodes[name]["log_prob_sum"] for name in self.observed), torch.zeros(()))
            wanted = [leaves[name] for name in self.observed_children]
            gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        scores = {}
        for (name, _), leaf, gradient in zip(self.observed_children.items(), wanted, gradients, strict=True):
            value = torch.zeros_like(leaf) if gradient is None else gradient
            scores[score_name(name)] = without_leading_ones(value.detach())
        return scores

    def added_to(
        self, call: Call, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call:
        """Return a call with its scores.

        Args:
            call: The call, as it was read.
            model: The model.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            UnsupportedModelError: If the call has no data of a site whose scores are read.
        """
        missing = [name for name in self.observed if name not in call.values]
        if missing:
            raise UnsupportedModelError(
                f"Expected data of {', '.join(missing)}, whose scores sites read (features=); this call has none."
            )
        return replace(call, scores=self(model, (args, kwargs), call.values, call.plates))

    def of_draws(self, draws: ModelDraws, number: int, plates: Mapping[str, PlateState]) -> dict[str, Tensor]:
        """Return the scores of joint samples of the data, ``(draws, *batch, size)`` each.

        Args:
            draws: The model's draws.
            number: How many.
            plates: The plates.
        """
        depth = max((-plate.dim for plate in plates.values()), default=0)
        raw = draws.raw(number)
        values = {}
        for name in self.observed:
            value, event_dim = raw[name], self.event_dims[name]
            missing = depth - (value.dim() - 1 - event_dim)
            values[name] = value.reshape((len(value), *(1,) * missing, *value.shape[1:]))
        count = len(next(iter(values.values())))
        parts: dict[str, list[Tensor]] = {score_name(name): [] for name in self.observed_children}
        for start in range(0, count, CHUNK):
            chunk = {name: value[start : start + CHUNK] for name, value in values.items()}
            size = min(CHUNK, count - start)
            for name, score in self(draws.model, (draws.args, draws.kwargs), chunk, plates).items():
                of_site = parts[name]
                whole = score if score.dim() == 2 + depth else score.reshape(size, *(1,) * depth, -1)
                of_site.append(whole)
        return {name: torch.cat(found) for name, found in parts.items()}


def without_ones(raw: Tensor, site: LatentSite) -> Tensor:
    """Drop leading dimensions of size one of a value, of those that are no event dimensions."""
    own = len(site.unconstrained_shape)
    first = next((i for i, size in enumerate(raw.shape[: raw.dim() - own]) if size != 1), raw.dim() - own)
    return raw.reshape(raw.shape[first:])


@dataclass(frozen=True)
class Verdict:
    """What regressions on held-out joint samples say of a score.

    Attributes:
        gain: By how many nats the regression gains with the score beside the data.
        alone: By how many nats it gains with the score in place of the data; minus infinity where they stay.
    """

    gain: float
    alone: float

    @property
    def helps(self) -> bool:
        """Whether the score is worth reading."""
        return max(self.gain, self.alone) > GAIN

    @property
    def suffices(self) -> bool:
        """Whether the data say no more than their score, as far as regressions can tell."""
        return self.alone > max(self.gain, 0.0) - TIE

    def __str__(self) -> str:
        way = "alone" if self.suffices else "beside the data"
        return f"regressions on held-out joint samples gain {max(self.gain, self.alone):.2g} nats by it {way}"


def judge_scores(
    reader: ScoreReader,
    draws: ModelDraws,
    inverse: InverseGraph,
    plates: Mapping[str, PlateState],
    readable: Mapping[str, int],
) -> dict[str, Verdict]:
    """Return for each site with a score whether it helps a regression on held-out joint samples.

    Nonlinear ridge regressions (random features) of the site on its parents are compared: with the data as they are,
    with the score beside them, and with the score in their place. The last is only tried where the data are wider than
    the score and come in elementwise. Parents in other plates count by their means and mean squares.

    Args:
        reader: The scores.
        draws: The model's draws.
        inverse: The guide's factorisation.
        plates: The plates.
        readable: The observed nodes and inputs that can be network inputs.
    """
    flat = draws.draw(NUM_ROWS)
    scores = reader.of_draws(draws, NUM_ROWS, plates)
    count = len(next(iter(scores.values())))
    flat = {name: value[:count] for name, value in flat.items()}
    depth = max((-plate.dim for plate in plates.values()), default=0)
    found = {}
    for site, children in reader.observed_children.items():
        target = _padded(flat[site], depth)
        score = [_padded(scores[score_name(site)], depth)]

        def columns(names: list[Any], batch: torch.Size = target.shape[:-1]) -> list[Tensor]:
            return [part for name in names for part in _reduced(_padded(flat[name], depth), batch)]

        parents = [p for p in inverse.parents[site] if p in flat or p in readable]
        before = _loss(columns(parents), target)
        gain = before - _loss([*columns(parents), *score], target)
        alone = -torch.inf
        width = sum(flat[name].shape[-1] for name in children)
        if width > target.shape[-1] and all(inverse.how[name, site] != "pooled" for name in children):
            others = [p for p in parents if p not in children]
            alone = before - _loss([*columns(others), *score], target)
        found[site] = Verdict(gain, alone)
    return found


def _padded(value: Tensor, depth: int) -> Tensor:
    missing = depth + 2 - value.dim()
    return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])


def _reduced(value: Tensor, batch: torch.Size) -> list[Tensor]:
    """Return a value in the plates of a batch: averaged over others, with its square."""
    over = [dim for dim in range(1, value.dim() - 1) if value.shape[dim] != 1 and batch[dim] == 1]
    if not over:
        return [value]
    return [value.mean(over, keepdim=True), value.square().mean(over, keepdim=True)]


def _loss(columns: list[Tensor], target: Tensor) -> float:
    """Return the negative log-density of a ridge regression on held-out rows, up to a constant, in nats."""
    batch = target.shape[:-1]
    rows = torch.cat([c.expand(*batch, c.shape[-1]).reshape(-1, c.shape[-1]) for c in columns], -1)
    rows, own = in_float64(rows), in_float64(target.reshape(-1, target.shape[-1]))
    finite = torch.isfinite(torch.cat([rows, own], -1)).all(-1)
    rows, own = rows[finite][:NUM_ROWS], own[finite][:NUM_ROWS]
    if len(rows) < FEWEST_ROWS:
        return 0.0
    standard = []
    for part in (rows, own):
        shift, scale = location_and_scale(part)
        standard.append(((part - shift) / scale).clamp(-WINSOR, WINSOR))
    x, y = standard
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(x.shape[-1], RANDOM_UNITS, generator=generator, dtype=x.dtype) / x.shape[-1] ** 0.5
    offsets = torch.randn(RANDOM_UNITS, generator=generator, dtype=x.dtype)
    features = torch.cat([x, torch.tanh(x @ weights + offsets), torch.ones_like(x[:, :1])], -1)
    test = torch.arange(len(x)) % HELD_OUT == 0
    best = torch.inf
    for slopes in ridge_slopes(features[~test], y[~test], *RIDGES):
        error = (y[test] - features[test] @ slopes).square().mean(0).clamp(min=1e-12)
        best = min(best, 0.5 * float(error.log().sum()))
    return best
