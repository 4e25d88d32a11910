r"""Whether data are unlike anything that the model generates.

An amortised guide has learned from what the model generates; of other data its networks know nothing, and weights may
not show it. So the features that the guide reads of the data are compared with those of joint draws of the model. Their
distance from the mean, in units of their covariance, has no known law, since features are not normal; it is ranked
among the distances of other draws, which say how often the model generates data at least as far out.

*Directions in which draws do not vary* are where impossible data are: totals that must add up, values outside of a
support. They count in units of the smallest spread that rounding allows, not at all as if they were not there.

Where each datum has a posterior of its own, each is compared with draws of all data, which share one law over
covariates; else the data set is one datum. The features of many elements come in by the mean and the largest of the
elements' own distances.
"""

import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsWarning
from pyro_graphflows.infer.model_runs import NUMBERS_AT_ONCE, Fitted, chunks
from pyro_graphflows.inspect.model_graph import trace_model
from pyro_graphflows.inspect.prior import find_batching, sample_prior

__all__ = ["num_sets", "surprise_of", "warn_of_surprise"]

NUM_DRAWS = (
    10_000  # joint draws of a datum by which distances are ranked, and as many to find means and covariances
)
SURPRISING = 1e-3  # a tail probability below it
BY_CHANCE = 0.01  # how likely a count of such data must be to pass without a warning
MOST_FEATURES = 200  # of one datum up to which the elements' features are taken as they are
SMALLEST = 1e-10  # of the largest variance: about the square of what rounding leaves of features


class _Distance:
    """Squared distances from a mean in units of a covariance; a sum over directions none of which is left out.

    Args:
        rows: Vectors (n, k) by which mean and covariance are found, in pieces.
    """

    def __init__(self, rows: Iterator[Tensor]) -> None:
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        centre: Tensor | None = None
        for row in rows:
            finite = row[row.isfinite().all(-1)].double()
            if centre is None and len(finite):
                centre = finite.mean(0)
            if centre is not None:
                moved = finite - centre
                count, total, squares = count + len(moved), total + moved.sum(0), squares + moved.T @ moved
        if centre is None:
            raise ValueError("no finite rows")
        mean = total / count
        values, self.directions = torch.linalg.eigh(squares / count - torch.outer(mean, mean))
        self.mean = centre + mean
        floor = max(float(values.max()) * SMALLEST, torch.finfo(values.dtype).tiny)
        self.scales = values.clamp(min=floor).sqrt()

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the distances of vectors (..., k); infinite where one is no number."""
        moved = ((rows.double() - self.mean) @ self.directions) / self.scales
        return moved.square().sum(-1).nan_to_num(nan=math.inf, posinf=math.inf)


class _Statistics:
    """From the features of a guide to one vector for each datum.

    Args:
        data_dim: The dimension of the plate of the data, negative; None if the data set is one datum.
        num_data: The number of its elements.
        features: Features of some joint draws, by which those of many elements are measured.
    """

    def __init__(self, data_dim: int | None, num_data: int, features: list[Tensor]) -> None:
        self.data_dim, self.num_data = data_dim, num_data
        arranged = [self._arranged(each) for each in features]
        small = sum(each.shape[2] * each.shape[3] for each in arranged) <= MOST_FEATURES
        self.inner = [
            None if small or each.shape[2] == 1 else _Distance(iter([each.flatten(0, 2)]))
            for each in arranged
        ]

    def _arranged(self, features: Tensor) -> Tensor:
        """Return features (draws, *batch, k) as (draws, data, elements of a datum, k)."""
        moved = features.unsqueeze(1) if self.data_dim is None else features.movedim(self.data_dim - 1, 1)
        return moved.reshape((*moved.shape[:2], -1, moved.shape[-1])).expand(-1, self.num_data, -1, -1)

    def __call__(self, features: list[Tensor]) -> Tensor:
        """Return (draws, data, k)."""
        parts = []
        for each, inner in zip(features, self.inner, strict=True):
            arranged = self._arranged(each)
            if inner is None:
                parts.append(arranged.flatten(2))
            else:
                distances = inner(arranged)  # (draws, data, elements)
                both = torch.stack([distances.mean(-1), distances.amax(-1)], -1)
                parts.append((both + 1e-30).log())
        draws = max(len(part) for part in parts)
        return torch.cat([part.double().expand(draws, -1, -1) for part in parts], -1)


def surprise_of(
    fitted: Fitted, data_plate: str | None, tick: Callable[[int], object] = lambda _: None
) -> Tensor | None:
    """Return for each datum, or for the data set, how often the model generates data at least as far out.

    Args:
        fitted: The model and the guide with their data. The guide's ``data_features(*args, observations=, **kwargs)``
            says what it reads of the data.
        data_plate: The plate over which the posterior factorises.
        tick: Told of each number of joint draws that are done, of :func:`num_sets` twice.

    Returns:
        Tail probabilities (data,) or (), none below one over the number of draws; None where the guide reads no data.

    Raises:
        UnsupportedModelError: If joint draws of the model are not the model: the message names the site whose prior is
            improper, or that is a factor or scaled.
    """
    reader = getattr(fitted.guide, "data_features", None)
    if not callable(reader):
        return None
    own = _with_draws(reader(*fitted.args, **fitted.kwargs), fitted.nesting, 1)
    if not own:
        return None
    dims = [
        (dim, size)
        for site in fitted.sites.values()
        for plate, dim, size in site.plates
        if plate == data_plate
    ]
    data_dim, num_data = dims[0] if dims else (None, 1)
    source = _JointFeatures(fitted, reader)
    num = num_sets(num_data)
    pieces = list(chunks(num, source.at_once))
    statistics = _Statistics(data_dim, num_data, source(pieces[0].stop))

    def drawn() -> Iterator[Tensor]:
        for piece in pieces:
            yield statistics(source(piece.stop - piece.start)).flatten(0, 1)
            tick(piece.stop - piece.start)

    distance = _Distance(drawn())
    others = torch.cat([distance(rows) for rows in drawn()]).sort().values
    here = distance(statistics(own).squeeze(0))  # (data,)
    beyond = len(others) - torch.searchsorted(others, here)
    tail = (1 + beyond).double() / (1 + len(others))
    return tail if data_plate is not None else tail.squeeze(0)


def num_sets(num_data: int) -> int:
    """Return how many joint draws of so many data give enough draws of a datum."""
    return max(1, math.ceil(NUM_DRAWS / num_data))


class _JointFeatures:
    """Features of joint draws of a model.

    Args:
        fitted: The model and the guide with their data.
        reader: What the guide reads of data.
    """

    def __init__(self, fitted: Fitted, reader: Callable[..., list[Tensor]]) -> None:
        self.fitted, self.reader = fitted, reader
        args, kwargs = fitted.args, fitted.kwargs
        traced = trace_model(fitted.model, args, kwargs, strict=False)
        self.batching = find_batching(fitted.model, args, kwargs, traced=traced)
        self.observed = [name for name, site in fitted.sites.items() if site.kind == "observed"]
        numbers = sum(math.prod(site.shape) for site in fitted.sites.values())
        self.at_once = max(1, NUMBERS_AT_ONCE // max(1, numbers))

    def __call__(self, num: int) -> list[Tensor]:
        """Return features of so many new joint draws, (num, *batch in the plates, k)."""
        fitted = self.fitted
        draws = sample_prior(
            fitted.model,
            fitted.args,
            fitted.kwargs,
            num_samples=num,
            batching=self.batching,
        )
        observations = {}
        for name in self.observed:
            value, site = draws[name], fitted.sites[name]
            between = [1] * (fitted.nesting - site.num_batch)
            observations[name] = value.reshape((num, *between, *value.shape[1:]))
        features = self.reader(*fitted.args, observations=observations, **fitted.kwargs)
        return _with_draws(features, fitted.nesting, num)


def _with_draws(features: list[Tensor], nesting: int, num: int) -> list[Tensor]:
    """Return features with a dimension of draws and one for each dimension of plates, (num, *nesting, k)."""
    result = []
    for each in features:
        padded = each.reshape((1,) * (nesting + 2 - each.dim()) + tuple(each.shape))
        result.append(padded.expand(num, *padded.shape[1:]))
    return result


def warn_of_surprise(tail: Tensor, data_plate: str | None) -> None:
    """Warn where more data than chance allows are unlike what the model generates."""
    num, count = tail.numel(), int((tail < SURPRISING).sum())
    if not count or _at_least(count, num * SURPRISING) > BY_CHANCE:
        return
    if data_plate is None:
        what = f"The data are unlike those that the model generates (tail probability {float(tail):.1g})"
    else:
        what = (
            f"{count} of {num} elements of {data_plate!r} are unlike those that the model generates (tail probability "
            f"below {SURPRISING:g}; chance has about {num * SURPRISING:.1g})"
        )
    warnings.warn(
        f"{what}: the guide has never seen their like, and its draws there may be wrong in ways that weights do not "
        "show. Look at posterior.surprise and at these data; mend the model, or use .refined(khat_above=None).",
        GraphflowsWarning,
        stacklevel=4,
    )


def _at_least(count: int, rate: float) -> float:
    """Return the probability that a Poisson variable is at least ``count``."""
    below = sum(math.exp(k * math.log(rate) - rate - math.lgamma(k + 1)) for k in range(count))
    return 1 - below
