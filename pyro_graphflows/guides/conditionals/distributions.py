"""The distributions that a guide emits at latent sites.

A conditional is a distribution over a flat, unconstrained vector; a site wants a value of its own shape in its own
support. :class:`FactorDistribution` and, for discrete sites, :class:`DiscreteDistribution` join the two
(:func:`site_distribution` chooses). They derive directly from :class:`~pyro.distributions.TorchDistribution`, so
that no analytic KL is registered for them: where a guide may not use one
(:func:`~pyro_graphflows.guides.plan.mean_field_condition`), every estimator falls back to sampling. Discrete ones
have no reparametrised draws: gradients of ELBOs are of the score-function kind, unless the site is enumerated.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ComposeTransform, ExpTransform, IndependentTransform, Transform

from pyro_graphflows.capture import CAPTURING
from pyro_graphflows.distributions.normal_tails import HALF_LOG_TWO_PI
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.sites import DiscreteEncoding, LatentSite, is_identity

__all__ = [
    "CopiedValue",
    "DiscreteDistribution",
    "DiscreteVector",
    "DrawnOrGiven",
    "FactorDistribution",
    "PathNormal",
    "SampledNormal",
    "ScalarNormal",
    "Scores",
    "along_path",
    "centre_of",
    "site_distribution",
]


Score = Callable[[Any, Tensor], Tensor | None]


class Scores(NamedTuple):
    """What gradients along the path of a draw are made from: functions of the distribution drawn from and flat vectors.

    Attributes:
        score: The log-density as a function of the guide's parameters alone.
        by_draws: The log-density as a function of what was drawn, and not of parameters.
    """

    score: Score
    by_draws: Score


class Path:
    """Remembers the last draw with gradients of a distribution and its expanded copies, and asks for its score.

    Args:
        scores: For gradients of ELBOs along the path (:func:`along_path`); None for plain ones.
    """

    def __init__(self, scores: Scores | None = None) -> None:
        self.scores = scores
        self._last: tuple[Tensor, Tensor] | None = None

    def keep(self, value: Tensor, flat: Tensor) -> Tensor:
        """Take note of a draw and of its flat vector; return the draw."""
        self._last = (value, flat) if self.scores is not None and torch.is_grad_enabled() else None
        return value

    def parts(
        self,
        log_prob: Tensor,
        value: Tensor,
        base: Any,
        stretch: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> ScoreParts:
        """Return the parts of gradients of ELBOs: along the path of the last draw, plain for other values.

        Args:
            log_prob: The log-density of the value, with all gradients.
            value: The value.
            base: The distribution over flat vectors.
            stretch: From flat vectors and values to the log-determinant of the map between them; None for zero.
        """
        no_score_function: Any = 0
        follows = log_prob.requires_grad and torch.is_grad_enabled()
        if self.scores is None or self._last is None or self._last[0] is not value or not follows:
            return ScoreParts(log_prob, no_score_function, log_prob)
        flat = self._last[1]
        alone = self.scores.by_draws(base, flat) if CAPTURING.get() else None
        if alone is None:
            found = along_path(log_prob, self.scores.score(base, flat))
        else:
            found = alone if stretch is None else alone - stretch(flat, value)
        return ScoreParts(log_prob, no_score_function, found)


def _log_prob(normal: dist.Normal, value: Tensor) -> Tensor:
    """Return the log-density without the variance, which may be too small for a number."""
    return -0.5 * ((value - normal.loc) / normal.scale).square() - HALF_LOG_TWO_PI - normal.scale.log()


class ScalarNormal(dist.TorchDistribution):
    """A normal over vectors of one element, held as a normal over numbers.

    Args:
        normal: The normal over numbers.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, normal: dist.Normal) -> None:
        self.normal = normal
        super().__init__(normal.batch_shape, torch.Size([1]), validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """All real vectors."""
        return constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ScalarNormal":
        """Return the same normal at a larger batch shape."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return ScalarNormal(self.normal.expand(batch_shape))

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.normal.loc.unsqueeze(-1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + (1,)``."""
        return self.normal.rsample(sample_shape).unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of vectors, shape ``batch_shape``."""
        return _log_prob(self.normal, value.squeeze(-1))


class SampledNormal(dist.TorchDistribution):
    """A normal over numbers for which no analytic KL is registered.

    Args:
        normal: The normal.
        path: What is remembered of draws.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, normal: dist.Normal, path: Path | None = None) -> None:
        self.normal, self._path = normal, Path() if path is None else path
        super().__init__(normal.batch_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SampledNormal":
        """Return the same normal at a larger batch shape."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return SampledNormal(self.normal.expand(batch_shape), self._path)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape``."""
        value = self.normal.rsample(sample_shape)
        return self._path.keep(value, value.unsqueeze(-1))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values, shape ``batch_shape``."""
        return _log_prob(self.normal, value)

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Return the parts of gradients of ELBOs (:func:`along_path`)."""
        return self._path.parts(self.log_prob(x), x, self.normal)

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.normal.loc


class PathNormal(dist.Normal):
    """A normal over numbers, with the gradients of ELBOs along the path of its draws.

    Args:
        normal: The normal.
        path: What is remembered of draws.
    """

    def __init__(self, normal: dist.Normal, path: Path) -> None:
        super().__init__(normal.loc, normal.scale, validate_args=False)
        self._path = path

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PathNormal":
        """Return the same normal at a larger batch shape."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        plain = dist.Normal(self.loc, self.scale, validate_args=False)
        return PathNormal(plain.expand(batch_shape), self._path)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape``."""
        value: Tensor = super().rsample(sample_shape)
        return self._path.keep(value, value.unsqueeze(-1))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values, shape ``batch_shape``."""
        return _log_prob(self, value)

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Return the parts of gradients of ELBOs (:func:`along_path`)."""
        return self._path.parts(self.log_prob(x), x, self)


class FactorDistribution(dist.TorchDistribution):
    """A factor over a flat unconstrained vector, pushed to the shape and support of a site.

    The unconstrained vector of the value drawn or read last is kept, so that scoring that value needs no inversion,
    and so that the guide can read it (:meth:`unconstrained`). Any other value is inverted.

    Shape:
        - ``base``: batch shape of the site, event shape ``(n,)``.
        - values: ``batch_shape + event_shape`` of the site.

    Args:
        base: The distribution over the flat unconstrained vector.
        transform: The bijection from the unconstrained shape to the support of the site.
        unconstrained_shape: The event shape before the vector is flattened.
        event_shape: The event shape of the site.
        support: The support of the site.
        path: What is remembered of draws.
        dtypes: The types of flat vectors and of values, where these are two.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        base: dist.TorchDistribution,
        transform: Transform,
        unconstrained_shape: torch.Size,
        event_shape: torch.Size,
        support: constraints.Constraint,
        path: Path | None = None,
        dtypes: tuple[torch.dtype, torch.dtype] | None = None,
    ) -> None:
        self._path = Path() if path is None else path
        self.base, self._dtypes = base, dtypes
        self.has_rsample = base.has_rsample
        self.transform = transform
        self.unconstrained_shape = unconstrained_shape
        self._support = support
        # Shared with expanded copies: Pyro expands a factor before it draws, and the guide asks the original.
        # The last of the three is whether gradients were followed then.
        self._drawn: list[tuple[Tensor, Tensor, bool]] = []
        super().__init__(base.batch_shape, event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the site, over its event dimensions."""
        missing = len(self.event_shape) - self._support.event_dim
        return constraints.independent(self._support, missing) if missing > 0 else self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FactorDistribution":
        """Return the same factor at a larger batch shape."""
        batch_shape = torch.Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        new = FactorDistribution(
            self.base.expand(batch_shape),
            self.transform,
            self.unconstrained_shape,
            self.event_shape,
            self._support,
            self._path,
            self._dtypes,
        )
        new._drawn = self._drawn
        return new

    def _shaped(self, flat: Tensor) -> Tensor:
        """Return flat vectors in the event shape before they are flattened, and of the type of the site."""
        flat = flat if self._dtypes is None else flat.to(self._dtypes[1])
        if self.unconstrained_shape == self.base.event_shape:
            return flat
        return flat.reshape(flat.shape[:-1] + self.unconstrained_shape)

    def _constrain(self, flat: Tensor) -> Tensor:
        raw = self._shaped(flat)
        if _is_exponential(self.transform):  # a value of zero or infinity would be outside of the support
            limits = torch.finfo(raw.dtype)
            raw = raw.clamp(math.log(limits.tiny), math.log(limits.max) - 1.0)
        return self.transform(raw)

    def constrained(self, flat: Tensor) -> Tensor:
        """Return the value of a flat unconstrained vector, which counts as drawn."""
        value = self._constrain(flat)
        self._drawn[:] = [(value, flat, torch.is_grad_enabled())]
        return value

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + event_shape``."""
        flat = self.base.rsample(sample_shape)
        return self._path.keep(self.constrained(flat), flat)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw values of shape ``sample_shape + batch_shape + event_shape`` without gradients."""
        with torch.no_grad():
            return self.constrained(self.base.sample(sample_shape))

    def centre(self) -> Tensor:
        """Return the image of the base's median (its mean where that is the same)."""
        return self.constrained(self.base.mean)

    def unconstrained(self, value: Tensor) -> Tensor:
        """Return the flat unconstrained vector of a value, shape ``(*batch, n)``."""
        if self._drawn and self._drawn[0][0] is value:
            _, flat, followed = self._drawn[0]
            if flat.requires_grad or not torch.is_grad_enabled():
                return flat
            if not value.requires_grad and (followed or not self._constrain(flat).requires_grad):
                return flat  # else the support moves with what gradients are wanted of
        raw = self.transform.inv(value)
        dims = len(self.unconstrained_shape)
        flat = raw.reshape(*raw.shape[: raw.dim() - dims], -1)
        flat = flat if self._dtypes is None else flat.to(self._dtypes[0])
        self._drawn[:] = [(value, flat, torch.is_grad_enabled())]
        return flat

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values, shape ``batch_shape``."""
        flat = self.unconstrained(value)
        return self.base.log_prob(flat) - self._log_stretch(flat, value)

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Return the parts of gradients of ELBOs (:func:`along_path`)."""
        if not self.has_rsample:
            plain: ScoreParts = super().score_parts(x)
            return plain
        return self._path.parts(self.log_prob(x), x, self.base, self._log_stretch)

    def log_stretch(self, flat: Tensor) -> Tensor:
        """Return the log-determinant of the map from flat vectors to values, one for each vector."""
        return self._log_stretch(flat, self._constrain(flat))

    def _log_stretch(self, flat: Tensor, value: Tensor) -> Tensor:
        raw = self._shaped(flat)
        ladj = self.transform.log_abs_det_jacobian(raw, value)
        batch_dims = raw.dim() - len(self.unconstrained_shape)
        return ladj.flatten(batch_dims).sum(-1) if ladj.dim() > batch_dims else ladj


def along_path(log_prob: Tensor, score: Tensor | None) -> Tensor:
    r"""Return a log-density whose gradient is the one along the path of the draw alone.

    Of the bound on the evidence, :math:`E_q[\log p(x, z) - \log q(z)]` with :math:`z = T_\phi(\varepsilon)`, the
    gradient of the second term has a part that comes from :math:`\phi` in the density at a fixed value, the score. It
    is zero in the mean and not in a single draw. Without it the noise of the gradient goes to zero as the guide comes
    to the posterior, and training ends at the optimum instead of wandering around it. Objectives that use densities in
    other ways (weights of importance, given values) do not ask for this part.

    References:
        [1] Roeder, Wu and Duvenaud (2017), Sticking the landing: simple, lower-variance gradient estimators for
            variational inference, Section 3.

    Args:
        log_prob: The log-density of a draw, with all gradients.
        score: Numbers whose gradient is the score; None for the plain gradient.
    """
    return log_prob if score is None else log_prob - (score - score.detach())


def _is_exponential(transform: Transform) -> bool:
    """Whether a map begins with the exponential function."""
    while isinstance(transform, IndependentTransform | ComposeTransform):
        if isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        elif transform.parts:
            transform = transform.parts[0]
        else:
            return False
    return isinstance(transform, ExpTransform)


class DrawnOrGiven(dist.TorchDistribution):
    """A distribution that moves with the model's parameters for values that it draws, and not for values given to it.

    A conditional that is fused with the prior has the model's parameters in it. Of the bound on the evidence, where
    values are drawn from it, the total derivative is wanted. Where they are given, as in inference compilation, a
    better density of the values is no reason to change the model.

    Args:
        live: The distribution.
        fixed: The same without gradients for the model's parameters.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, live: Any, fixed: Any) -> None:
        self.live, self.fixed = live, fixed
        self.has_rsample = live.has_rsample
        self.has_enumerate_support = live.has_enumerate_support
        self._drawn: list[Tensor] = []  # shared with expanded copies
        super().__init__(live.batch_shape, live.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the site."""
        support: constraints.Constraint = self.live.support
        return support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DrawnOrGiven":
        """Return the same at a larger batch shape."""
        shape = torch.Size(batch_shape)
        new = DrawnOrGiven(self.live.expand(shape), self.fixed.expand(shape))
        new._drawn = self._drawn
        return new

    def _keep(self, value: Tensor) -> Tensor:
        self._drawn[:] = [value]
        return value

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw reparametrised values of shape ``sample_shape + batch_shape + event_shape``."""
        return self._keep(self.live.rsample(sample_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw values of shape ``sample_shape + batch_shape + event_shape`` without gradients."""
        return self._keep(self.live.sample(sample_shape))

    def centre(self) -> Tensor:
        """Return the centre of the distribution."""
        return self._keep(self.live.centre() if hasattr(self.live, "centre") else self.live.mean)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values, shape ``batch_shape``."""
        drawn = bool(self._drawn) and self._drawn[0] is value
        log_prob: Tensor = (self.live if drawn or value.requires_grad else self.fixed).log_prob(value)
        return log_prob

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all values of a discrete site."""
        values: Tensor = self.live.enumerate_support(expand=expand)
        return values


class CopiedValue(dist.Delta):
    """The value of a Delta site of the model, repeated by the guide: without a density of its own.

    A Delta of the model has the log-density zero at its value, and minus infinity at one that differs by rounding.
    """

    def log_prob(self, x: Tensor) -> Tensor:
        """Return zero, shape ``batch_shape``."""
        return x.new_zeros(np.broadcast_shapes(x.shape[: x.dim() - self.event_dim], self.batch_shape))


class DiscreteVector(dist.TorchDistribution):
    r"""Binary or class variables, each with logits that are linear in the earlier ones.

    Variable ``i`` has the logits ``logits[i] + sum_j<i couplings[i, j] @ y[j]``, where ``y[j]`` is 0 or 1 for binary
    variables and a vector of indicators for classes. Values are the ``y`` beside each other.

    Shape:
        - ``logits``: ``(*batch, n, C)`` with ``C = 1`` for binary variables, otherwise the number of classes.
        - ``couplings``: ``(*batch, n (n - 1) / 2, C, C)``, pairs ``(i, j)`` in the order of
          :func:`torch.tril_indices`; None where ``n = 1``.
        - values: ``(*batch, n * C)``.

    Args:
        logits: The logits.
        couplings: How earlier variables act on later ones.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(self, logits: Tensor, couplings: Tensor | None = None) -> None:
        self.logits, self.couplings = logits, couplings
        n, self.num_classes = logits.shape[-2:]
        self.has_enumerate_support = n == 1
        super().__init__(logits.shape[:-2], torch.Size([n * self.num_classes]), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Zeros and ones."""
        return constraints.independent(constraints.boolean, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiscreteVector":
        """Return the same distribution at a larger batch shape."""
        batch = torch.Size(batch_shape)
        logits = self.logits.expand(batch + self.logits.shape[-2:])
        couplings = self.couplings
        return DiscreteVector(
            logits, None if couplings is None else couplings.expand(batch + couplings.shape[-3:])
        )

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw values of shape ``sample_shape + batch_shape + event_shape``."""
        with torch.no_grad():
            return self._choose(self._draw_one, torch.Size(sample_shape))

    @property
    def mode(self) -> Tensor:
        """Each variable at its most probable value given those chosen before it (for one variable: the mode)."""
        return self._choose(self._best_one, torch.Size())

    def _choose(self, choose: Any, sample_shape: torch.Size) -> Tensor:
        logits = self.logits.expand(sample_shape + self.logits.shape)
        chosen: list[Tensor] = []
        start = 0
        for i in range(logits.shape[-2]):
            own = logits[..., i, :]
            if i and self.couplings is not None:
                earlier = torch.stack(chosen, -2)  # (*batch, i, C)
                coupling = self.couplings[..., start : start + i, :, :]
                own = own + (coupling @ earlier.unsqueeze(-1)).squeeze(-1).sum(-2)
                start += i
            chosen.append(choose(own))
        return torch.cat(chosen, -1)

    def _draw_one(self, logits: Tensor) -> Tensor:
        if self.num_classes == 1:
            return torch.bernoulli(logits.sigmoid())
        index = torch.distributions.Categorical(logits=logits, validate_args=False).sample()
        return F.one_hot(index, self.num_classes).to(logits.dtype)

    def _best_one(self, logits: Tensor) -> Tensor:
        if self.num_classes == 1:
            return (logits > 0).to(logits.dtype)
        return F.one_hot(logits.argmax(-1), self.num_classes).to(logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the logarithm of the probability of values, in nats."""
        n, c = self.logits.shape[-2:]
        y = value.reshape(*value.shape[:-1], n, c).to(self.logits.dtype)
        logits = self.logits
        if self.couplings is not None:
            rows, columns = torch.tril_indices(n, n, -1, device=logits.device)
            effects = (self.couplings @ y[..., columns, :].unsqueeze(-1)).squeeze(-1)  # (*batch, pairs, C)
            of_pair = F.one_hot(rows, n).to(logits.dtype)  # (pairs, n)
            logits = logits + of_pair.T @ effects
        if c == 1:
            return (y * logits - F.softplus(logits)).sum((-2, -1))
        return (y * logits.log_softmax(-1)).sum((-2, -1))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all values of a single variable, of shape ``(number of values, *batch, C)``."""
        if not self.has_enumerate_support:
            raise NotImplementedError("only a single binary or class variable can be enumerated")
        logits = self.logits
        if self.num_classes == 1:
            values = logits.new_tensor([[0.0], [1.0]])
        else:
            values = torch.eye(self.num_classes, dtype=logits.dtype, device=logits.device)
        values = values.reshape(len(values), *(1,) * len(self.batch_shape), -1)
        return values.expand(-1, *self.batch_shape, -1) if expand else values


class DiscreteDistribution(dist.TorchDistribution):
    """A factor over flat vectors as a distribution over the values of a discrete site.

    Like :class:`FactorDistribution`, of which it is the discrete counterpart.

    Args:
        base: The distribution over the flat vectors.
        encoding: How values and flat vectors belong together.
        support: The support of the site.
        dtype: The type of the flat vectors.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        base: dist.TorchDistribution,
        encoding: DiscreteEncoding,
        support: constraints.Constraint,
        dtype: torch.dtype,
    ) -> None:
        self.base, self.encoding = base, encoding
        self.has_enumerate_support = base.has_enumerate_support
        self._support, self._dtype = support, dtype
        super().__init__(base.batch_shape, encoding.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the site, over its event dimensions."""
        missing = len(self.event_shape) - self._support.event_dim
        return constraints.independent(self._support, missing) if missing > 0 else self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiscreteDistribution":
        """Return the same factor at a larger batch shape."""
        batch_shape = torch.Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        return DiscreteDistribution(self.base.expand(batch_shape), self.encoding, self._support, self._dtype)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw values of shape ``sample_shape + batch_shape + event_shape``."""
        with torch.no_grad():
            return self.encoding.decode(self.base.sample(sample_shape))

    def centre(self) -> Tensor:
        """Return the most probable value."""
        return self.encoding.decode(self.base.mode)

    def unconstrained(self, value: Tensor) -> Tensor:
        """Return the flat vector of a value, shape ``(*batch, n)``."""
        return self.encoding.encode(value, self._dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the logarithm of the probability of values, shape ``batch_shape``."""
        return self.base.log_prob(self.unconstrained(value))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all values of the site, of shape ``(number of values, *batch, *event)``."""
        return self.encoding.decode(self.base.enumerate_support(expand=expand))


def site_distribution(
    site: LatentSite,
    factor: dist.TorchDistribution,
    support: constraints.Constraint,
    *,
    analytic_kl: bool,
    dtype: torch.dtype | None = None,
    coordinate: Transform | None = None,
    scores: Scores | None = None,
    of_values: torch.dtype | None = None,
) -> tuple[dist.TorchDistribution, Callable[[Tensor], Tensor]]:
    """Return the distribution to emit at a site and the map from its value to the unconstrained vector.

    Args:
        site: The site as it was at set-up.
        factor: The distribution over its flat unconstrained vector.
        support: The support in this call.
        analytic_kl: Whether the distribution may be one for which a KL divergence is registered.
        dtype: The type of the flat vectors; the default type if not given.
        coordinate: The map to the site's values from the coordinate of the factor, where this is not the unconstrained
            vector.
        scores: See :class:`Path`.
        of_values: The type of the values of a continuous site; that of the flat vectors if not given.

    Raises:
        GraphflowsError: If a discrete site has other values than at set-up, or a factor another event shape.
    """
    if site.encoding is not None:
        if not site.encoding.fits(support):
            raise GraphflowsError(
                f"Expected the values of {site.name!r} to be as when the guide was set up ({site.encoding}); this "
                f"call has {support}. Set up a guide for the new values."
            )
        discrete = DiscreteDistribution(factor, site.encoding, support, dtype or torch.get_default_dtype())
        return discrete, discrete.unconstrained
    if tuple(factor.event_shape) != (site.size,):
        raise GraphflowsError(
            f"Expected a factor of {site.name!r} whose distribution has event shape ({site.size},), that of the flat "
            f"vector of the site; got {tuple(factor.event_shape)} ({type(factor).__name__}). Use .to_event(1)."
        )
    as_at_set_up, path = support is site.support, Path(scores)
    dtype = dtype or torch.get_default_dtype()
    dtypes = None if of_values in (None, dtype) else (dtype, of_values)
    if coordinate is not None:
        back = site.bijection if as_at_set_up else biject_to(support)
        shapes = site.unconstrained_shape, site.event_shape, support
        emitted = FactorDistribution(factor, coordinate, *shapes, path, dtypes)
        return emitted, partial(_unconstrained, back, site, None if dtypes is None else dtype)
    transform = site.bijection if as_at_set_up else biject_to(support)
    is_real = site.is_real if as_at_set_up else is_identity(transform)
    as_it_is = is_real and dtypes is None
    if as_it_is and isinstance(factor, ScalarNormal) and not site.event_shape:
        plain = factor.normal if scores is None else PathNormal(factor.normal, path)
        return plain if analytic_kl else SampledNormal(factor.normal, path), _add_event_dim
    if as_it_is and analytic_kl and site.event_shape == factor.event_shape:
        return factor, _itself
    shapes = site.unconstrained_shape, site.event_shape, support
    emitted = FactorDistribution(factor, transform, *shapes, path, dtypes)
    return emitted, emitted.unconstrained


def _unconstrained(
    transform: Transform, site: LatentSite, dtype: torch.dtype | None, value: Tensor
) -> Tensor:
    """Return the flat unconstrained vectors of values, ``(*batch, size)``, of a type (that of the values if None)."""
    raw = transform.inv(value)
    raw = raw if dtype is None else raw.to(dtype)
    dims = len(site.unconstrained_shape)
    return raw.reshape(*raw.shape[: raw.dim() - dims], -1)


def _itself(value: Tensor) -> Tensor:
    return value


def _add_event_dim(value: Tensor) -> Tensor:
    return value.unsqueeze(-1)


def centre_of(fn: Any) -> Tensor:
    """Return the centre of a distribution that is emitted at a site: its value at base noise zero."""
    while hasattr(fn, "base_dist") and not hasattr(fn, "centre"):
        if isinstance(fn, dist.Independent):
            break
        fn = fn.base_dist
    centre: Tensor = fn.centre() if hasattr(fn, "centre") else fn.mean
    return centre
