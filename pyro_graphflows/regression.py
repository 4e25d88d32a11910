r"""Regressions on samples: least squares, location and scale that heavy tails do not set, logistic regression.

Starts of guides and flows, and the search for smooth orders, fit conditionals to samples of a model. All of them
take their fits from here, in float64 and for columns of about unit scale.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "HEAVY_TAIL",
    "HELD_OUT",
    "MOST_QUANTILE_ROWS",
    "RESIDUAL_FLOOR",
    "RIDGE",
    "TINY",
    "WINSOR",
    "Moments",
    "Regression",
    "finite_rows",
    "in_float64",
    "location_and_scale",
    "logistic_regression",
    "only_finite_rows",
    "regression_with_scales",
    "ridge_slopes",
    "square_root",
    "varies",
    "white_residuals",
]

CONSTANT = 1e-20  # variance up to which a column of about unit scale is one number
RIDGE = 1e-10  # relative to unit variances; makes rank-deficient sets of inputs solvable
MOST_WHOLE = 500  # columns up to which all covariances are found at once
RIDGES = (1e-2, 1e-3, 1e-4, 1e-6, 1e-8, RIDGE)
HELD_OUT = 5  # one in this many rows judges what was fitted to the others
RIDGE_TIE = 1e-4  # nats for an element; of ridges that predict as well the largest is taken
RESIDUAL_FLOOR = 1e-4  # in units of the column; deterministic relations have residual zero
WINSOR = 10.0  # standard deviations; keeps one draw of a heavy tail from deciding
TINY = 1e-12

HEAVY_TAIL = 12.0  # a standardised normal sample of 10,000 stays within 5; a heavy-tailed one does not
MOST_QUANTILE_ROWS = 100_000

ROUNDS = 3  # of locations and scales in turn
NEWTON_STEPS = 8
LEAST_GAIN_OF_SCALES = 0.01  # nats for a held-out row
LEAST_TESTED = 5  # held-out rows for each weight

MOST_LOGISTIC_ROWS = 10_000
PRIOR_SCALE = 1.0  # of a slope of a logistic regression, for inputs of unit scale
PSEUDO_COUNT = 0.5  # imagined samples of each class, at the mean of the inputs


def in_float64(values: Tensor) -> Tensor:
    """Return a tensor in float64: on its device, or on the CPU where the device has no such type (MPS)."""
    try:
        return values.double()
    except TypeError:
        return values.cpu().to(torch.float64)


def finite_rows(*parts: Tensor) -> Tensor:
    """Return in which rows all entries of all parts are finite: by sums, and entry by entry if one of these is not.

    Shape:
        - Input: ``(n, size)`` each; output: ``(n,)``.

    Example:
        >>> finite_rows(torch.tensor([[1.0, 2.0], [torch.inf, 0.0], [3e38, 3e38]])).tolist()
        [True, False, True]
    """
    found = []
    for part in parts:
        finite = torch.isfinite(part.sum(-1))
        found.append(finite if bool(finite.all()) else torch.isfinite(part).all(-1))
    return torch.stack(found).all(0) if len(found) > 1 else found[0]


def varies(rows: Tensor) -> Tensor:
    """Return which columns, of about unit scale, differ from row to row.

    Shape:
        - Input: ``(n, columns)``; output: ``(columns,)``.

    Example:
        >>> varies(torch.tensor([[1.0, 2.0], [1.0, 3.0]])).tolist()
        [False, True]
    """
    return in_float64(rows - rows[:1]).square().mean(0) > CONSTANT


def only_finite_rows(rows: Tensor) -> Tensor:
    """Return the rows whose entries are all finite; the tensor itself where all are."""
    finite = finite_rows(rows)
    return rows if bool(finite.all()) else rows[finite]


# ---------------------------------------------------------------- location and scale


def location_and_scale(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column; scale one for columns that do not vary.

    The standard deviation of a heavy-tailed column is that of its few largest values, beside which all others are
    alike; such columns get median and half the range of the middle 68 %, which are the same for a normal one.

    Shape:
        - Input: ``(n, size)``. Rows with a non-finite entry are left out.
        - Output: two of ``(size,)``.
    """
    sample = only_finite_rows(sample)
    if sample.numel() == 0:
        return sample.new_zeros(sample.shape[1:]), sample.new_ones(sample.shape[1:])
    shift, scale = sample.mean(0), sample.std(0, correction=min(1, len(sample) - 1))
    if not bool(scale.isfinite().all()) and sample.dtype != torch.float64:  # squares that overflow
        wide, most = location_and_scale(in_float64(sample)), torch.finfo(sample.dtype).max
        return wide[0].clamp(-most, most).to(sample), wide[1].clamp(max=most).to(sample)
    if len(sample) == 1:
        return shift, torch.ones_like(shift)
    constant = scale <= 1e-9 * shift.abs().clamp(min=TINY)
    scale = torch.where(constant, torch.ones_like(scale), scale)
    heavy = ((sample - shift).abs() > HEAVY_TAIL * scale).any(0)
    if bool(heavy.any()):
        middle = sample.new_tensor([0.1587, 0.5, 0.8413])
        lower, centre, upper = torch.quantile(sample[:MOST_QUANTILE_ROWS], middle, dim=0)
        heavy &= upper > lower
        shift = torch.where(heavy, centre, shift)
        scale = torch.where(heavy, (upper - lower) / 2, scale)
    return shift, scale


# ---------------------------------------------------------------- least squares


@dataclass(frozen=True)
class Regression:
    """A linear-Gaussian conditional, ``own | inputs ~ Normal(loc + weights @ inputs, scale_tril @ scale_tril.T)``.

    Shape:
        - ``weights``: ``(size, inputs)``; ``loc``: ``(size,)``; ``scale_tril``: ``(size, size)``, lower triangular.
    """

    weights: Tensor
    loc: Tensor
    scale_tril: Tensor


class Moments:
    """Means and covariances of samples, and the regressions of some columns on others.

    Args:
        rows: Samples in rows, ``(n, columns)``, of about unit scale.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows = in_float64(rows)
        self.number = len(rows)
        self.mean = rows.mean(0)
        self._blocks: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}

    @cached_property
    def covariance(self) -> Tensor:
        """The covariance of all columns, found when it is first asked for."""
        return torch.atleast_2d(torch.cov(self.rows.T))

    def between(self, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Return the covariances of some columns with others; of many columns, no more than these if they are few."""
        size = len(self.mean)
        if size <= MOST_WHOLE or "covariance" in self.__dict__ or 4 * len(rows) * len(columns) > size**2:
            return _block(self.covariance, rows, columns)
        key = tuple(rows), tuple(columns)
        if key not in self._blocks:
            left, right = (self.rows[:, list(part)] - self.mean[list(part)] for part in (rows, columns))
            self._blocks[key] = left.mT @ right / max(self.number - 1, 1)
        return self._blocks[key]

    @cached_property
    def variances(self) -> Tensor:
        """The variances of all columns."""
        return torch.atleast_1d(self.rows.var(0))

    @cached_property
    def _by_column(self) -> Tensor:
        """The samples with each column in one piece of memory."""
        return self.rows.mT.contiguous()

    @cached_property
    def _held_out(self) -> Tensor:
        """Rows that judge what is fitted to the others, less the mean of all."""
        return self.rows[::HELD_OUT] - self.mean

    @cached_property
    def _held_out_products(self) -> Tensor:
        """The sums of their products."""
        return self._held_out.mT @ self._held_out

    def _split(self, rows: Sequence[int], columns: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the covariances in most rows, and the mean products of the others less the mean of these."""
        whole = self.between(rows, columns)
        if "covariance" in self.__dict__:
            products = _block(self._held_out_products, rows, columns)
        else:
            products = self._held_out[:, list(rows)].mT @ self._held_out[:, list(columns)]
        number = len(self._held_out)
        rest = self.number - number
        off = self._held_out.mean(0)
        shift = -number / rest * off  # from the mean of all rows to that of most
        left, right = (part[list(chosen)] for part, chosen in ((shift, rows), (shift, columns)))
        fitted = ((self.number - 1) * whole - products - rest * torch.outer(left, right)) / (rest - 1)
        crossed = torch.outer(off[list(rows)], right) + torch.outer(left, off[list(columns)])
        return fitted, products / number - crossed + torch.outer(left, right)

    def ridge(self, inputs: Sequence[int], own: Sequence[int]) -> float:
        """Return the largest ridge of those with which a regression predicts held-out rows as well as with any.

        Few samples, or inputs that nearly determine each other, make slopes large that cancel each other; a ridge that
        costs nothing where samples are keeps them from mattering where data are that the samples do not resemble.

        Args:
            inputs: The inputs.
            own: What is predicted.
        """
        inputs, own = self._varying(inputs), list(own)
        if not inputs or self.number < 2 * HELD_OUT:
            return RIDGE
        (among, of_inputs), (across, crossed) = (self._split(inputs, part) for part in (inputs, own))
        of_own = self._split(own, own)[1].diagonal()
        losses = []
        for ridge in RIDGES:
            weights = torch.cholesky_solve(across, _factor(among, ridge)).T
            squares = of_own + ((weights @ of_inputs - 2.0 * crossed.T) * weights).sum(-1)
            losses.append(float(squares.clamp(min=RESIDUAL_FLOOR**2).log().mean()) / 2)
        least = min(losses)
        return next(r for r, loss in zip(RIDGES, losses, strict=True) if loss <= least + RIDGE_TIE)

    def _varying(self, inputs: Sequence[int]) -> list[int]:
        """Return the inputs that are not constant, as the data of one call are: these have no slopes."""
        spread = self.variances if len(self.mean) > MOST_WHOLE else self.covariance.diagonal()
        return [i for i in inputs if not spread[i] <= CONSTANT]

    def weights(self, inputs: Sequence[int], own: Sequence[int], ridge: float = RIDGE) -> Tensor:
        """Return the slopes of the regression of some columns on others, ``(own, inputs)``."""
        if not len(inputs):
            return self.mean.new_zeros(len(own), 0)
        return torch.cholesky_solve(self.between(inputs, own), _factor(self.between(inputs, inputs), ridge)).T

    def regress(self, inputs: Sequence[int], own: Sequence[int], ridge: float = RIDGE) -> Regression:
        """Return the least-squares regression of some columns on others; residual scales have a floor.

        Args:
            inputs: The inputs.
            own: What is predicted.
            ridge: Added to the variances of the inputs; see :meth:`ridge`.
        """
        inputs, own = list(inputs), list(own)
        varying = self._varying(inputs)
        if len(varying) < len(inputs):
            fit = self.regress(varying, own, ridge)
            whole = fit.weights.new_zeros(len(own), len(inputs))
            whole[:, [inputs.index(i) for i in varying]] = fit.weights
            return Regression(whole, fit.loc, fit.scale_tril)
        number, residual = float(len(inputs)), self.between(own, own)
        weights = self.mean.new_zeros(len(own), 0)
        if inputs:
            among, crossed = self.between(inputs, inputs), self.between(inputs, own)
            factor = _factor(among, ridge)
            weights = torch.cholesky_solve(crossed, factor).T
            across = weights @ crossed
            residual = residual - across
            if ridge > RIDGE:  # then slopes are shrunk, and fewer have been fitted
                residual = residual - across.T + weights @ among @ weights.T
                number -= ridge * float(torch.cholesky_inverse(factor).diagonal().sum())
        residual = residual * self._correction(number)
        return Regression(weights, self.mean[own] - weights @ self.mean[inputs], square_root(residual))

    def regress_in_turn(
        self,
        inputs: Sequence[int],
        own: Sequence[int],
        outer: Sequence[Sequence[int]],
        inner: Sequence[Sequence[int]],
    ) -> Regression:
        """Return the regression of columns that each have inputs of their own, earlier columns among them.

        Args:
            inputs: The inputs of any of them.
            own: The columns.
            outer: For each column its own share of the inputs.
            inner: For each column the positions in ``own`` of the earlier columns that it looks at.
        """
        direct = self.mean.new_zeros(len(own), len(inputs))
        unit = torch.eye(len(own), dtype=direct.dtype, device=direct.device)  # I - A
        variances = self.mean.new_zeros(len(own))
        place = {column: k for k, column in enumerate(inputs)}
        given = [[*outer[i], *(own[j] for j in inner[i])] for i in range(len(own))]
        for i, (weights, variance) in enumerate(self.regress_each(given, own)):
            variances[i] = variance
            direct[i, [place[c] for c in outer[i]]] = weights[: len(outer[i])]
            unit[i, list(inner[i])] = -weights[len(outer[i]) :]
        if any(map(len, inner)):
            mixing = torch.linalg.inv(unit)
            weights = mixing @ direct
            residual = mixing @ variances.clamp(min=RESIDUAL_FLOOR**2).diag_embed() @ mixing.T
            root = square_root(residual)
        else:
            weights, root = direct, variances.clamp(min=RESIDUAL_FLOOR**2).sqrt().diag_embed()
        loc = self.mean[list(own)] - weights @ self.mean[list(inputs)]
        return Regression(weights, loc, root)

    def regress_each(self, looks: Sequence[Sequence[int]], own: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return slopes and residual variance of the regression of each of some columns on columns of its own.

        Args:
            looks: For each column the columns that it is regressed on.
            own: The columns.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for members in _by_length(looks):
            each = self._each([list(looks[i]) for i in members], [own[i] for i in members])
            correction = self._correction(len(looks[members[0]]))
            found.update({i: (a, b * correction) for i, a, b in zip(members, *each, strict=True)})
        return [found[i] for i in range(len(own))]

    def _each(self, looks: list[list[int]], own: list[int]) -> tuple[Tensor, Tensor]:
        """Return the slopes of regressions of one column each on as many inputs of its own, and residual variances."""
        size = len(looks[0])
        few = 4 * len(own) * (size + 1) ** 2 < len(self.mean) ** 2
        if few and "covariance" not in self.__dict__:  # most of the covariance is not needed
            by_column = self._by_column
            moments = [
                torch.atleast_2d(torch.cov(by_column[[*columns, column]]))
                for columns, column in zip(looks, own, strict=True)
            ]
            joint = torch.stack(moments)
            matrices, vectors = joint[:, :-1, :-1], joint[:, -1, :-1]
            variances = joint[:, -1, -1]
        else:
            columns = torch.tensor(looks, device=self.mean.device)
            targets = torch.tensor(own, device=self.mean.device)
            matrices = self.covariance[columns.unsqueeze(-1), columns.unsqueeze(-2)]
            vectors = self.covariance[columns, targets.unsqueeze(-1)]
            variances = self.covariance[targets, targets]
        _require_finite(matrices)
        _require_finite(variances)
        if not size:
            return vectors, variances
        eye = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
        ridge = matrices.new_full((len(own), 1, 1), RIDGE)
        while True:
            factor, failed = torch.linalg.cholesky_ex(matrices + ridge * eye)
            if not bool(failed.any()):
                break
            ridge = torch.where(failed.view(-1, 1, 1) > 0, ridge * 100, ridge)
        slopes = torch.cholesky_solve(vectors.unsqueeze(-1), factor).squeeze(-1)
        return slopes, variances - (slopes * vectors).sum(-1)

    def white_residuals(
        self, inputs: Sequence[int], own: Sequence[int], rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what the least-squares regression leaves of other rows, whitened.

        Args:
            inputs: The inputs.
            own: What is predicted.
            rows: Rows that the regression is not fitted to, ``(n, columns)``.

        Returns:
            A lower triangular root of the residuals' second moments, ``(own, own)``, and its inverse times the
            residuals, ``(own, n)``.
        """
        fit = self.regress(inputs, own)
        residual = rows[:, list(own)] - fit.loc - rows[:, list(inputs)] @ fit.weights.T
        root = square_root(residual.T @ residual / len(residual))
        return root, torch.linalg.solve_triangular(root, residual.T, upper=False)

    def _correction(self, num_inputs: float) -> float:
        """Return by what a residual variance must be multiplied, as weights have been fitted."""
        return (self.number - 1) / max(self.number - 1 - num_inputs, 1)


def regression_with_scales(
    inputs: Tensor, own: Tensor, of_scales: Sequence[int]
) -> tuple[Regression, Tensor] | None:
    r"""Return a regression of a number whose scale follows some inputs; None if held-out rows are no likelier so.

    With :math:`\log s = a + b^\top x` the likelihood is convex in a and b, and in the slopes of the location; both are
    found in turn (Harvey 1976, Estimating Regression Models with Multiplicative Heteroscedasticity, Econometrica 44).

    Args:
        inputs: Inputs in rows, ``(n, inputs)``.
        own: The number, ``(n,)``.
        of_scales: Which inputs the scale may follow.

    Returns:
        The regression, with the scale where these inputs are zero, and b.
    """
    one = torch.ones_like(own).unsqueeze(-1)
    x, z = torch.cat([inputs, one], -1), torch.cat([inputs[:, list(of_scales)], one], -1)
    test = torch.arange(len(own), device=own.device) % HELD_OUT == 0

    def fit(rows: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
        x_of, z_of, y = x[rows], z[rows], own[rows]
        scales = torch.zeros_like(z[0])
        weights = torch.zeros_like(x[0])
        for i in range(rounds + 1):
            weighted = x_of * (-2.0 * (z_of @ scales)).exp().unsqueeze(-1)
            matrix = weighted.mT @ x_of
            ridge = RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix)).to(matrix)
            weights = torch.linalg.solve(matrix + ridge, weighted.mT @ y)
            squares = (y - x_of @ weights).square().clamp(min=RESIDUAL_FLOOR**2)
            if i == 0:
                scales[-1] = 0.5 * squares.mean().log()
            for _ in range(NEWTON_STEPS if i < rounds else 0):
                ratio = squares * (-2.0 * (z_of @ scales)).exp()
                curvature = 2.0 * (z_of * ratio.unsqueeze(-1)).mT @ z_of + 1e-6 * len(y) * torch.eye(
                    len(scales)
                ).to(y)
                step = torch.linalg.solve(curvature, (z_of * (ratio - 1.0).unsqueeze(-1)).sum(0))
                scales = scales + step.clamp(-1.0, 1.0)
        return weights, scales

    def loss(weights: Tensor, scales: Tensor) -> float:
        log_scale = z[test] @ scales
        off = (own[test] - x[test] @ weights) * (-log_scale).exp()
        return float((log_scale + 0.5 * off.square()).mean())

    if int(test.sum()) < LEAST_TESTED * len(x[0]):
        return None
    gain = loss(*fit(~test, 0)) - loss(*fit(~test, ROUNDS))
    if not gain > LEAST_GAIN_OF_SCALES:
        return None
    weights, scales = fit(torch.ones_like(test), ROUNDS)
    tril = scales[-1].exp().clamp(min=RESIDUAL_FLOOR).reshape(1, 1)
    return Regression(weights[:-1].unsqueeze(0), weights[-1:], tril), scales[:-1]


def _block(matrix: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """Return some rows and columns of a matrix, without a copy where they are in one piece."""
    for dim, chosen in enumerate((rows, columns)):
        first, last = (chosen[0], chosen[-1]) if len(chosen) else (0, -1)
        if list(chosen) == list(range(first, last + 1)):
            matrix = matrix.narrow(dim, first, len(chosen))
        else:
            matrix = matrix.index_select(dim, torch.tensor(list(chosen), device=matrix.device))
    return matrix


def _factor(among: Tensor, ridge: float) -> Tensor:
    """Return the Cholesky factor of covariances with a ridge, a larger one where it must be."""
    _require_finite(among)
    eye = torch.eye(len(among), dtype=among.dtype, device=among.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(among + ridge * eye)
        if not failed:
            return factor
        ridge = ridge * 100


def white_residuals(inputs: Tensor, own: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :meth:`Moments.white_residuals` returns of a regression on the other rows.

    Args:
        inputs: The inputs in rows, ``(n, inputs)``.
        own: What is predicted, ``(n, own)``.
        held_out: Which rows are left out of the fit, ``(n,)``.
    """
    joint, number = torch.cat([inputs, own], -1), inputs.shape[-1]
    columns = range(number), range(number, joint.shape[-1])
    return Moments(joint[~held_out]).white_residuals(*columns, joint[held_out])


def ridge_slopes(inputs: Tensor, targets: Tensor, *ridges: float) -> Iterator[Tensor]:
    """Yield the slopes of a regression without an intercept, ``(inputs, targets)``, for each of some ridges.

    Args:
        inputs: The inputs in rows, ``(n, inputs)``, of about unit scale.
        targets: What is predicted, ``(n, targets)``.
        *ridges: In units of the number of rows.
    """
    product, cross = inputs.mT @ inputs, inputs.mT @ targets
    eye = torch.eye(len(product), dtype=product.dtype, device=product.device)
    for ridge in ridges:
        yield torch.linalg.solve(product + ridge * len(inputs) * eye, cross)


def _by_length(lists: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the positions of lists of equal length together."""
    groups: dict[int, list[int]] = {}
    for position, each in enumerate(lists):
        groups.setdefault(len(each), []).append(position)
    return list(groups.values())


def square_root(residual: Tensor) -> Tensor:
    """Return a lower triangular square root of a covariance whose diagonal is at least the floor."""
    _require_finite(residual)
    eye = torch.eye(len(residual), dtype=residual.dtype, device=residual.device)
    jitter = 0.0
    while True:
        factor, failed = torch.linalg.cholesky_ex(residual + jitter * eye)
        if not failed and bool(torch.isfinite(factor).all()):
            break
        jitter = max(10 * jitter, RESIDUAL_FLOOR**2)
    return factor.tril(-1) + factor.diagonal().clamp(min=RESIDUAL_FLOOR).diag_embed()


def _require_finite(covariance: Tensor) -> None:
    if not bool(torch.isfinite(covariance).all()):  # no ridge would help
        raise RuntimeError("Expected finite covariances; there are too few finite joint samples.")


# ---------------------------------------------------------------- logistic regression


def logistic_regression(
    inputs: Tensor, targets: Tensor, *, offset: Tensor | None = None, max_steps: int = 100
) -> tuple[Tensor, Tensor]:
    """Fit the logits of a binary variable or of indicators of classes by maximum penalised likelihood.

    If the inputs are normal given the class, with one covariance matrix for all classes, or if they are discrete and
    conditionally independent given it, then the log-odds are linear in the inputs and logistic regression finds them.
    A weak normal prior on the slopes keeps them small where classes can be separated or inputs are collinear: large
    slopes that cancel each other would make the first steps of training a mess.

    Shape:
        - ``inputs``: ``(n, p)``.
        - ``targets``: ``(n, 1)`` of zeros and ones, or ``(n, C)`` of indicators.
        - Output: slopes ``(C, p)`` and intercepts ``(C,)``, for one column of targets ``(1, p)`` and ``(1,)``.

    Args:
        inputs: Inputs in rows.
        targets: The values.
        offset: Logits to which those that are fitted are added, of the shape of the targets.
        max_steps: The number of quasi-Newton steps.

    Returns:
        Slopes and intercepts, in the type of the inputs. Those of indicators are centred over the classes.
    """
    n, c = len(inputs), targets.shape[-1]
    x, y = in_float64(inputs[:MOST_LOGISTIC_ROWS]), in_float64(targets[:MOST_LOGISTIC_ROWS])
    share = (y.sum(0) + PSEUDO_COUNT) / (len(y) + max(c, 2) * PSEUDO_COUNT)
    start = share.logit() if c == 1 else share.log()
    known = torch.zeros_like(y) if offset is None else in_float64(offset[:MOST_LOGISTIC_ROWS])
    if offset is not None:
        start = torch.zeros_like(start)
    if n == 0 or (x.shape[-1] == 0 and offset is None):
        return inputs.new_zeros(c, inputs.shape[-1]), _centred(start).to(inputs)
    mean = x.mean(0)
    scale = (x - mean).square().mean(0).sqrt()  # also of no columns, of which std() warns
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    x = (x - mean) / scale
    parameters = torch.cat([x.new_zeros(c, x.shape[-1]), start.unsqueeze(-1)], -1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=max_steps,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        slopes = parameters[:, :-1]
        logits = F.linear(x, slopes, parameters[:, -1]) + known
        at_mean = parameters[:, -1]
        if c == 1:
            misfit = (F.softplus(logits) - y * logits).sum()
            imagined = F.softplus(at_mean).sum() + F.softplus(-at_mean).sum()
        else:
            misfit = -(y * logits.log_softmax(-1)).sum()
            imagined = -at_mean.log_softmax(-1).sum()
        penalty = PSEUDO_COUNT * imagined + slopes.square().sum() / (2 * PRIOR_SCALE**2)
        value = (misfit + penalty) / len(x)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    slopes = parameters.detach()[:, :-1] / scale
    intercepts = parameters.detach()[:, -1] - slopes @ mean
    return _centred(slopes).to(inputs), _centred(intercepts).to(inputs)


def _centred(values: Tensor) -> Tensor:
    """Subtract what is common to all classes, which no probability depends on."""
    return values if len(values) == 1 else values - values.mean(0)
