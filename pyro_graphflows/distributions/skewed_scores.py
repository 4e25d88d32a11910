r"""Normal scores of the logarithm of a gamma variable and of the logit of a beta variable.

Neither distribution function is in torch with derivatives in its parameters. On the real line both densities are
analytic and log-concave,

.. math::
    h(x) = a x - e^x - \log\Gamma(a), \qquad
    h(x) = \alpha x - (\alpha + \beta) \log(1 + e^x) - \log B(\alpha, \beta),

so that the probability beyond ``x``, on the side away from the mode, is the density at ``x`` times an integral that the
double-exponential rule [1] finds to rounding error with a fixed number of nodes:

.. math:: \log P = h(x) + \log \int_0^\infty e^{-(h(x) - h(x \pm v))} dv.

The differences in the exponent are formed without cancellation, in double precision whatever the type of the arguments,
and autograd passes through the sum, so that all derivatives in the parameters are exact. The score is
:math:`u = \Phi^{-1}(P)` and its slope :math:`e^{h(x)} / \varphi(u)`, whence the second derivative
:math:`u'' = u' (h' + u u')` and the inverse by Halley's method.

Student's t with :math:`\nu` degrees of freedom is :math:`\sqrt\nu \sinh(x / 2)` for the logit ``x`` of a symmetric beta
variable with parameters :math:`\nu / 2`.

References:
    [1] Takahasi and Mori (1974), Double exponential formulas for numerical integration, Publications of the Research
    Institute for Mathematical Sciences 9, Section 3 (the map for integrands with an exponential tail).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_graphflows.capture import CAPTURING, is_kept
from pyro_graphflows.distributions.normal_tails import ndtri_exp, normal_log_density
from pyro_graphflows.errors import ConvergenceError

__all__ = ["LogGamma", "LogitBeta", "SkewedKernel", "score", "unscore"]

STEP = 0.1
REACH = 3.8  # of the rule, in its own variable: from e^-40 of the width to 40 times the width
MOST_STEPS = 100
PIECE = 2000  # values whose nodes are in memory at once: more leave the processor's cache
CAPTURED_STEPS = 5  # gammas and betas with parameters of .05 to 1,000 need 2-5 for scores up to 8
CLOSE = 1e-6  # in scores; one more step of third order leaves rounding errors
TABLE_REACH, TABLE_SIZE = 9.0, 2048
MOST_TABLES, ASKED_OFTEN = 64, 3
LINEAR = 50.0  # from where on log(1 + e^x) is x
LARGEST = 600.0  # whose exponential does not overflow


def _rule() -> tuple[Tensor, Tensor]:
    t = torch.arange(-REACH, REACH + STEP, STEP, dtype=torch.float64)
    node = torch.exp(t - torch.exp(-t))
    return node, STEP * node * (1.0 + torch.exp(-t))


class SkewedKernel(ABC):
    """A log-concave density on the real line.

    Args:
        parameters: Its parameters, in double precision, of one shape.
    """

    def __init__(self, *parameters: Tensor) -> None:
        self.parameters = parameters

    @abstractmethod
    def log_density(self, x: Tensor) -> Tensor:
        """Return the log-density ``h``."""

    @abstractmethod
    def slope(self, x: Tensor) -> Tensor:
        """Return the derivative of the log-density."""

    @abstractmethod
    def curvature(self, x: Tensor) -> Tensor:
        """Return minus the second derivative of the log-density."""

    @abstractmethod
    def drop(self, x: Tensor, v: Tensor, right: Tensor) -> Tensor:
        """Return by how much the log-density falls from ``x`` to ``x + v`` (where ``right``) or ``x - v``."""

    def fall(self, x: Tensor, width: Tensor, node: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fall of the log-density along a path away from ``x``, and the derivative of ``v`` by the node.

        Args:
            x: Where the path starts, shape ``(*batch, 1)``.
            width: The length ``v`` over which the log-density falls by one, shape ``(*batch, 1)``.
            node: Nodes in units of that length, shape ``(nodes,)``.
            right: Where the path goes to the right, shape ``(*batch, 1)``.
        """
        return self.drop(x, width * node, right), width

    @abstractmethod
    def mode(self) -> Tensor:
        """Return where the density is largest."""

    @abstractmethod
    def guess(self, u: Tensor) -> Tensor:
        """Return a first guess of the value with score ``u``."""


class LogGamma(SkewedKernel):
    """The logarithm of a gamma variable of rate one.

    Args:
        concentration: Its shape parameter.
    """

    def __init__(self, concentration: Tensor) -> None:
        super().__init__(concentration)
        self.a = concentration

    def log_density(self, x: Tensor) -> Tensor:
        """See :meth:`SkewedKernel.log_density`."""
        return self.a * x - x.exp() - torch.lgamma(self.a)

    def slope(self, x: Tensor) -> Tensor:
        """See :meth:`SkewedKernel.slope`."""
        return self.a - x.exp()

    def curvature(self, x: Tensor) -> Tensor:
        """See :meth:`SkewedKernel.curvature`."""
        return x.exp()

    def drop(self, x: Tensor, v: Tensor, right: Tensor) -> Tensor:
        """See :meth:`SkewedKernel.drop`."""
        signed = torch.where(right, v, -v)
        return x.exp() * torch.expm1(signed.clamp(max=LARGEST)) - self.a * signed

    def fall(self, x: Tensor, width: Tensor, node: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Equal steps of the gamma variable itself to the right, where its tail is the exponential one."""
        z = torch.where(right, x, torch.zeros_like(x)).exp()
        length = z * torch.expm1(width.clamp(max=LARGEST))
        s = length * node
        falls, steps = s - self.a * torch.log1p(s / z), length / (z + s)
        to_left = self.drop(x, width * node, torch.zeros_like(right))
        return torch.where(right, falls, to_left), torch.where(right, steps, width)

    def mode(self) -> Tensor:
        """See :meth:`SkewedKernel.mode`."""
        return self.a.log()

    def guess(self, u: Tensor) -> Tensor:
        """Wilson and Hilferty's cube root, or the power law of the left tail."""
        root = 1.0 - 1.0 / (9.0 * self.a) + u / (3.0 * self.a.sqrt())
        bulk = self.a.log() + 3.0 * root.clamp(min=0.05).log()
        tail = (torch.special.log_ndtr(u) + torch.lgamma(self.a + 1.0)) / self.a
        return torch.where(root > 0.3, bulk, torch.minimum(tail, bulk))


class LogitBeta(SkewedKernel):
    """The logit of a beta variable.

    Args:
        alpha: Its first parameter.
        beta: Its second parameter.
    """

    def __init__(self, alpha: Tensor, beta: Tensor) -> None:
        super().__init__(alpha, beta)
        self.alpha, self.beta = alpha, beta

    def _log_norm(self) -> Tensor:
        return torch.lgamma(self.alpha) + torch.lgamma(self.beta) - torch.lgamma(self.alpha + self.beta)

    def log_density(self, x: Tensor) -> Tensor:
        """See :meth:`SkewedKernel.log_density`."""
        return (
            -self.alpha * softplus(-x, threshold=LINEAR)
            - self.beta * softplus(x, threshold=LINEAR)
            - self._log_norm()
        )

    def slope(self, x: Tensor) -> Tensor:
        """See :meth:`SkewedKernel.slope`."""
        return self.alpha * torch.sigmoid(-x) - self.beta * torch.sigmoid(x)

    def curvature(self, x: Tensor) -> Tensor:
        """See :meth:`SkewedKernel.curvature`."""
        return (self.alpha + self.beta) * torch.sigmoid(x) * torch.sigmoid(-x)

    def drop(self, x: Tensor, v: Tensor, right: Tensor) -> Tensor:
        """See :meth:`SkewedKernel.drop`."""
        rate = torch.where(right, self.beta, self.alpha)
        behind = torch.sigmoid(torch.where(right, -x, x))
        return rate * v + (self.alpha + self.beta) * torch.log1p(behind * torch.expm1(-v))

    def fall(self, x: Tensor, width: Tensor, node: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Equal steps of the logarithm of the probability (of success or failure) that goes to zero."""
        x = torch.where(right, x, -x)
        rate, other = torch.where(right, self.beta, self.alpha), torch.where(right, self.alpha, self.beta)
        probability = torch.sigmoid(x)
        length = torch.log1p(probability * torch.expm1(width.clamp(max=LARGEST)))
        gone = -torch.expm1(-length * node)
        falls = rate * length * node - other * torch.log1p(torch.exp(-x) * gone)
        return falls, length / (probability * (1.0 - gone) + gone)

    def mode(self) -> Tensor:
        """See :meth:`SkewedKernel.mode`."""
        return self.alpha.log() - self.beta.log()

    def guess(self, u: Tensor) -> Tensor:
        """The normal with the same two moments, or the power law of a tail whose parameter is small."""
        mode, log_norm = self.mode(), self._log_norm()
        left = (torch.special.log_ndtr(u) + self.alpha.log() + log_norm) / self.alpha
        right = -(torch.special.log_ndtr(-u) + self.beta.log() + log_norm) / self.beta
        mean = torch.special.digamma(self.alpha) - torch.special.digamma(self.beta)
        variance = torch.special.polygamma(1, self.alpha) + torch.special.polygamma(1, self.beta)
        normal = mean + variance.sqrt() * u
        below = torch.where(self.alpha < 2.0, torch.minimum(left, mode), normal)
        above = torch.where(self.beta < 2.0, torch.maximum(right, mode), normal)
        return torch.where(u < 0, below, above)


def _log_tail(kernel: SkewedKernel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the probability on the side away from the mode, and whether that is the right."""
    with torch.no_grad():
        right = x >= kernel.mode()
        slope, curvature = kernel.slope(x).abs(), kernel.curvature(x)
        width = 2.0 / (slope + torch.sqrt(slope.square() + 2.0 * curvature)).clamp(min=1e-300)
        for _ in range(2):  # Newton's method for a fall by one
            fall = kernel.drop(x, width, right)
            there = torch.where(right, x + width, x - width)
            width = (width - (fall - 1.0) / kernel.slope(there).abs().clamp(min=1e-300)).maximum(0.1 * width)
    node, weight = (part.to(x.device) for part in _rule())
    wide = type(kernel)(*(parameter.unsqueeze(-1) for parameter in kernel.parameters))
    falls, steps = wide.fall(x.unsqueeze(-1), width.unsqueeze(-1), node, right.unsqueeze(-1))
    return kernel.log_density(x) + torch.log((weight * steps * torch.exp(-falls)).sum(-1)), right


def _score(kernel: SkewedKernel, x: Tensor) -> Tensor:
    log_tail, right = _log_tail(kernel, x)
    u = ndtri_exp(log_tail)
    return torch.where(right, -u, u)


def score(kernel: SkewedKernel, x: Tensor) -> Tensor:
    """Return the standard normal value with as much probability to its left as there is to the left of ``x``.

    Args:
        kernel: The density, with parameters that broadcast to the shape of ``x``.
        x: Values, in double precision.

    Example:
        >>> half = torch.tensor([2.5], dtype=torch.float64)
        >>> score(LogitBeta(half, half), torch.zeros(1, dtype=torch.float64)).abs().item() < 1e-12
        True
    """
    has_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in (x, *kernel.parameters))
    if has_gradient or CAPTURING.get():
        return _score(kernel, x)
    kind = type(kernel)
    return _in_pieces(lambda x, *parameters: _score(kind(*parameters), x), x, kernel.parameters)


class _Unscore(torch.autograd.Function):
    @staticmethod
    def forward(kind: Any, u: Tensor, *parameters: Tensor) -> Tensor:
        kernel = kind(*parameters)
        table = _TABLES.known(kernel, u) if CAPTURING.get() else _TABLES.find(kernel, u)
        if table is None:
            x = _solve(kernel, u)
        else:
            beyond = ~(u.abs() <= TABLE_REACH)
            x = table(u.masked_fill(beyond, 0.0))
            if CAPTURING.get():  # nothing can be asked of values
                x = x.masked_fill(beyond, math.nan)
            elif bool(beyond.any()):  # a few of many draws of heavy tails: the others do not wait for them
                x[beyond] = _solve(kernel, u[beyond])
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kind, *tensors = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], kind: Any, *tensors: Tensor) -> tuple[Tensor, int]:
        dims = list(zip(tensors, in_dims[1:], strict=True))
        rank = max(tensor.dim() - (dim is not None) for tensor, dim in dims)
        u, *parameters = [
            tensor
            if dim is None
            else tensor.movedim(dim, 0)[(slice(None), *[None] * (rank + 1 - tensor.dim()))]
            for tensor, dim in dims
        ]
        return _Unscore.apply(kind, u.expand(info.batch_size, *u.shape[u.dim() - rank :]), *parameters), 0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, u, *parameters = ctx.saved_tensors
        by_u = gradients[0] * torch.exp(normal_log_density(u) - ctx.kind(*parameters).log_density(x))
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        by_parameters: list[Tensor | None] = [None] * len(parameters)
        if wanted:
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                # Views: x depends on the parameters too, and this derivative is the one at fixed x.
                views = [p.view_as(p) if again else p.detach().requires_grad_() for p in parameters]
                found = _score(ctx.kind(*views), x)
            direct = torch.autograd.grad(found, [views[i] for i in wanted], -by_u, create_graph=again)
            for i, gradient in zip(wanted, direct, strict=True):
                by_parameters[i] = gradient
        return None, by_u, *by_parameters


def _solve(kernel: SkewedKernel, u: Tensor) -> Tensor:
    """Halley's method; the score is smooth and bends little, so that it converges from afar.

    While a call is captured nothing can be asked of values: the steps are as many as next to all values need, and
    where that is not enough the result is not a number.
    """
    if CAPTURING.get():
        x, done = kernel.guess(u), torch.zeros_like(u, dtype=torch.bool)
        for _ in range(CAPTURED_STEPS):
            moved, close = _step(kernel, x, u)
            x, done = torch.where(done, x, moved), done | close
        return x.masked_fill(~done, math.nan)
    kind = type(kernel)
    return _in_pieces(lambda u, *parameters: _solve_all(kind, u, parameters), u, kernel.parameters)


def _step(kernel: SkewedKernel, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next values, and which of them are close enough."""
    found = _score(kernel, x)
    slope = torch.exp(kernel.log_density(x) - normal_log_density(found))
    newton = (found - u) / slope
    bend = 0.5 * newton * (kernel.slope(x) + found * slope)
    limit = 3.0 + 0.5 * x.abs()
    step = (newton / (1.0 - bend).clamp(min=0.5, max=2.0)).maximum(-limit).minimum(limit)
    return x - step, ~((found - u).abs() > CLOSE * (1.0 + u.abs()))  # also where a parameter is not a number


def _in_pieces(function: Callable[..., Tensor], x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return what a function gives for each value, of as many at once as have their nodes in the cache.

    Args:
        function: Takes a vector of values and the parameters of each, or of all.
        x: The values.
        parameters: Their parameters, with which they broadcast.
    """
    shape = torch.broadcast_shapes(x.shape, *(part.shape for part in parameters))
    x = x.expand(shape).flatten()
    size = PIECE if x.device.type == "cpu" else max(len(x), 1)
    pieces = x.split(size)
    each = [
        len(pieces) * (part.reshape(()),) if part.numel() == 1 else part.expand(shape).flatten().split(size)
        for part in parameters
    ]
    return torch.cat([function(*piece) for piece in zip(pieces, *each, strict=True)]).view(shape)


def _solve_all(kind: Callable[..., SkewedKernel], u: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the solutions for all of a vector of scores; those that are found wait for no others."""
    x = kind(*parameters).guess(u)
    found, left = x.clone(), torch.arange(len(u), device=u.device)
    for _ in range(MOST_STEPS):
        x, close = _step(kind(*parameters), x, u)
        found[left] = x
        if bool(close.all()):
            return found
        far = ~close
        left, x, u = left[far], x[far], u[far]
        parameters = [part if part.numel() == 1 else part[far] for part in parameters]
    guilty = [float(part.flatten()[0]) for part in parameters]
    raise ConvergenceError(
        f"Expected normal scores of {kind.__name__} to be inverted in MOST_STEPS = {MOST_STEPS} steps; at the "
        f"parameters {guilty} and the score {float(u[0])} they were not. Use a prior that is less extreme."
    )


class _Table:
    """The values of one density on a grid of scores, with their slopes: a cubic between neighbours."""

    def __init__(self, kernel: SkewedKernel, device: torch.device) -> None:
        u = torch.linspace(-TABLE_REACH, TABLE_REACH, TABLE_SIZE + 1, dtype=torch.float64, device=device)
        self.x = _solve(kernel, u)
        self.slope = torch.exp(normal_log_density(u) - kernel.log_density(self.x))

    def __call__(self, u: Tensor) -> Tensor:
        cell = 2.0 * TABLE_REACH / TABLE_SIZE
        place = (u + TABLE_REACH) / cell
        at = place.floor().clamp(0, TABLE_SIZE - 1)
        t, i = place - at, at.long().flatten()  # a number would be read out of a single place
        (left, right), slopes = ([part[k].view(u.shape) for k in (i, i + 1)] for part in (self.x, self.slope))
        rise, start, end = right - left, cell * slopes[0], cell * slopes[1]
        return left + t * (start + t * (3.0 * rise - 2.0 * start - end + t * (start + end - 2.0 * rise)))


class _Tables:
    """Tables of densities with constant parameters, made when a density has been asked for a few times."""

    def __init__(self) -> None:
        self.asked: dict[Hashable, int] = {}
        self.tables: dict[Hashable, _Table] = {}

    def known(self, kernel: SkewedKernel, u: Tensor) -> _Table | None:
        """Return a table that there is, if parameters keep their values in what is captured."""
        if any(p.numel() != 1 or not is_kept(p) for p in kernel.parameters):
            return None
        return self.tables.get(self._key(kernel, u))

    def _key(self, kernel: SkewedKernel, u: Tensor) -> Hashable:
        return (type(kernel), u.device, *map(float, kernel.parameters))

    def find(self, kernel: SkewedKernel, u: Tensor) -> _Table | None:
        if any(p.numel() != 1 for p in kernel.parameters):
            return None
        key = self._key(kernel, u)
        if key not in self.tables:
            self.asked[key] = self.asked.pop(key, 0) + 1
            while len(self.asked) > MOST_TABLES:
                del self.asked[next(iter(self.asked))]
            if self.asked[key] < ASKED_OFTEN:
                return None
            while len(self.tables) >= MOST_TABLES:
                del self.tables[next(iter(self.tables))]
            self.tables[key] = _Table(kernel, u.device)
        return self.tables[key]


_TABLES = _Tables()


def unscore(kernel: SkewedKernel, u: Tensor) -> Tensor:
    """Return the value whose score is ``u``: the inverse of :func:`score`, differentiable in everything.

    Where the parameters are single numbers that come again and again (a prior with constants), a table answers.

    Args:
        kernel: The density, with parameters that broadcast to the shape of ``u``.
        u: Standard normal values, in double precision.

    Raises:
        ConvergenceError: If the iteration does not end; the message has the parameters.

    Example:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> round(unscore(LogGamma(one), 0.0 * one).exp().item(), 6)  # the median of the exponential
        0.693147
    """
    return _Unscore.apply(type(kernel), u, *kernel.parameters)
