"""The sites of a flow's block, level by level: each has a distribution of its own.

A site is emitted as a distribution over its flat unconstrained vector that

- draws when it is asked to, so at the batch shape that Pyro gives it (all plates, vectorised particles);
- knows the density of what it has just drawn, and inverts its part of the flow for any other value;
- depends on the values of its parents that the trace really has, since the guide hands those in after each level.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_graphflows.transforms.faithful import FaithfulEvaluation
from pyro_graphflows.transforms.graphical import AffineGraphicalEvaluation

__all__ = ["Evaluation", "FlowConditional", "FlowEvaluation", "FlowLevel", "FlowLevels"]

Evaluation = FaithfulEvaluation | AffineGraphicalEvaluation

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class FlowLevels:
    """Where the sites of a flow are.

    Attributes:
        levels: The sites, level by level.
        parts: For each site, its variables.
        stages: For each level, its stages: variables, counted from the first of the level, that are drawn at once.
        loc: The shifts of the variables, for sites of which no value is known.
    """

    levels: Sequence[Sequence[str]]
    parts: Mapping[str, slice]
    stages: Sequence[Sequence[Sequence[int]]]
    loc: Tensor


class FlowEvaluation:
    """One evaluation of a block; alternates :meth:`factors` and :meth:`accept`, level by level."""

    def __init__(self, levels: FlowLevels, evaluation: Evaluation, batches: Sequence[torch.Size]) -> None:
        self._levels = levels
        self._evaluation = evaluation
        self._batch = torch.broadcast_shapes(*batches)
        self._depth = 0
        self._level: FlowLevel

    def factors(self) -> dict[str, dist.TorchDistribution]:
        """Return the conditionals of the next level's sites, over their flat unconstrained vectors."""
        self._level = FlowLevel(self._levels, self._depth, self._evaluation)
        return {site: FlowConditional(self._level, site, self._batch) for site in self._level.parts}

    def accept(self, values: Mapping[str, Tensor]) -> None:
        """Take the unconstrained vectors of the level's sites, each of shape ``(*batch, size)``."""
        self._depth += 1
        last = self._depth == len(self._levels.levels)
        self._evaluation = self._level.accept(values, last)
        self._batch = torch.broadcast_shapes(self._batch, *(value.shape[:-1] for value in values.values()))


class FlowLevel:
    """The sites of one level given the values of all levels before it.

    Sites of one level are drawn together, the first time that one of them is asked for, and scored together where
    all their values are known; they are independent given the levels before.

    Args:
        levels: Where the sites are.
        depth: The number of the level.
        evaluation: The flow's evaluation, at this level.
    """

    def __init__(self, levels: FlowLevels, depth: int, evaluation: Evaluation) -> None:
        sites, parts = levels.levels[depth], levels.parts
        start = parts[sites[0]].start
        self.parts = {site: slice(parts[site].start - start, parts[site].stop - start) for site in sites}
        self.size = parts[sites[-1]].stop - start
        self.stages = levels.stages[depth]
        self.loc = levels.loc[start : start + self.size]
        self.evaluation = evaluation
        self.given: dict[str, Tensor] = {}
        self._waiting: tuple[Any, dict[str, tuple[Tensor, Tensor]]] = (None, {})
        self._scored: tuple[Any, dict[str, Tensor]] = (None, {})
        self._after: tuple[dict[str, Tensor], Evaluation] | None = None

    def draw(self, site: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Draw the vector of a site; return it and its log-density, of shapes ``(*shape, size)`` and ``shape``."""
        key = (shape, torch.is_grad_enabled())
        if self._waiting[0] != key or site not in self._waiting[1]:
            self._waiting = (key, self.push(shape=shape))
        return self._waiting[1].pop(site)

    def push(self, eps: Tensor | None = None, shape: Sequence[int] = ()) -> dict[str, tuple[Tensor, Tensor]]:
        """Map the noise of all sites of the level, or new noise, to their vectors and log-densities."""
        evaluation = self.evaluation
        z, terms = [], []
        for stage in self.stages:
            evaluation = evaluation.fork()
            if eps is None:
                noise = evaluation.noise(shape)
            else:
                noise = eps if len(self.stages) == 1 else eps[..., stage]
            value, log_diagonal = evaluation.step(noise)
            evaluation.accept(value)
            z.append(value)
            terms.append(_log_normal(noise) - log_diagonal)
        value, term = self._in_order(z), self._in_order(terms)
        drawn = {site: value[..., part] for site, part in self.parts.items()}
        self._after = (drawn, evaluation)
        return {site: (drawn[site], term[..., part].sum(-1)) for site, part in self.parts.items()}

    def _in_order(self, stages: list[Tensor]) -> Tensor:
        if len(stages) == 1:
            return stages[0]
        columns: list[Tensor | None] = [None] * self.size
        for stage, values in zip(self.stages, stages, strict=True):
            for column, value in zip(stage, values.unbind(-1), strict=True):
                columns[column] = value
        return torch.stack([column for column in columns if column is not None], -1)

    def accept(self, values: Mapping[str, Tensor], last: bool) -> Evaluation:
        """Take the values of the level's sites; return the evaluation at the next level."""
        self.given = {site: values[site] for site in self.parts}
        if self._after is not None and all(self._after[0][site] is self.given[site] for site in self.parts):
            return self._after[1]
        if last:
            return self.evaluation
        joined = self._join(self.given)
        evaluation = self.evaluation
        for stage in self.stages:
            evaluation = evaluation.fork()
            evaluation.accept(joined if len(self.stages) == 1 else joined[..., stage])
        return evaluation

    def _join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Put values beside each other; sites without one get any value, since no other site of the level sees it."""
        if len(self.parts) == 1:
            return next(iter(values.values()))
        batch = torch.broadcast_shapes(*(value.shape[:-1] for value in values.values()))
        parts = [values.get(site, self.loc[part]) for site, part in self.parts.items()]
        return torch.cat([part.expand(*batch, -1) for part in parts], -1)

    def score(self, site: str, value: Tensor) -> Tensor:
        """Return the log-density of a vector of a site."""
        if self.given.get(site) is not value:
            return self._score({site: value})[site]
        key = torch.is_grad_enabled()
        if self._scored[0] is not key or site not in self._scored[1]:
            drawn = {} if self._after is None else self._after[0]
            together = {
                name: other
                for name, other in self.given.items()
                if other is not drawn.get(name) and other.shape[:-1] == value.shape[:-1]
            }
            self._scored = (key, self._score({**together, site: value}))
        return self._scored[1].pop(site)

    def _score(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        joined = self._join(values)
        evaluation = self.evaluation
        terms = []
        for i, stage in enumerate(self.stages):
            part = joined if len(self.stages) == 1 else joined[..., stage]
            noise, log_diagonal = evaluation.terms(part)
            terms.append(_log_normal(noise) - log_diagonal)
            if i + 1 < len(self.stages):
                evaluation = evaluation.fork()
                evaluation.accept(part)
        term = self._in_order(terms)
        return {site: term[..., self.parts[site]].sum(-1) for site in values}


class FlowConditional(dist.TorchDistribution):
    """The conditional of one site of a flow, over its flat unconstrained vector.

    Shape:
        - values: ``batch_shape + (size,)``.

    Args:
        level: The level of the site.
        site: The site.
        batch_shape: The batch shape.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, level: FlowLevel, site: str, batch_shape: torch.Size) -> None:
        self.level = level
        self.site = site
        self._drawn: list[tuple[Tensor, Tensor, bool]] = []  # shared with expanded copies
        part = level.parts[site]
        super().__init__(batch_shape, torch.Size([part.stop - part.start]), validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """All real vectors."""
        return constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FlowConditional":
        """Return the same conditional at a larger batch shape."""
        new = FlowConditional(self.level, self.site, torch.Size(batch_shape))
        new._drawn = self._drawn
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + event_shape``."""
        value, log_prob = self.level.draw(self.site, torch.Size(sample_shape) + self.batch_shape)
        self._drawn[:] = [(value, log_prob, torch.is_grad_enabled())]
        return value

    @property
    def mean(self) -> Tensor:
        """The image of noise zero (the mean where the flow is linear)."""
        noise = torch.zeros(*self.batch_shape, self.level.size, dtype=self.level.loc.dtype)
        return self.level.push(noise.to(self.level.loc.device))[self.site][0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values, shape ``batch_shape``."""
        if self._drawn:
            drawn, log_prob, with_gradients = self._drawn[0]
            if drawn is value and (with_gradients or not torch.is_grad_enabled()):
                return log_prob
        log_prob = self.level.score(self.site, value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))


def _log_normal(noise: Tensor) -> Tensor:
    return -0.5 * noise.square() - HALF_LOG_TWO_PI
