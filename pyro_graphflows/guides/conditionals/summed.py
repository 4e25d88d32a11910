r"""What the elements of a plate say of a site outside of it: the prior times one factor for each element.

Where the elements of a plate are independent given a site and what is sampled before it
(:func:`~pyro_graphflows.guides.summed_sites.sites_to_sum`), the posterior of the site is its prior times one factor
for each element. In natural parameters factors are multiplied by a sum, so that one network of one element serves
plates of any size, and an empty plate leaves exactly the prior:

.. math::
    q(u) \propto p(u \mid \text{model parents}) \prod_i N(e_i;\, d_i u,\, s_i^2), \qquad
    \lambda = \sum_i d_i^2 / s_i^2, \quad \eta = \sum_i d_i e_i / s_i^2 .

The network of an element gives the pseudo-datum e, its loading d and the logarithm of its noise s, from what is known
of the element and of the sites sampled before. With e the datum less what the other sites contribute, d one or a
covariate and log s linear in the logarithm of the noise's scale, the conditional of a conjugate model is exact at every
value of the sites above. Groups inside of groups come in as averages, whose noise is the spread between groups
and that within over the number of their elements, :math:`s^2 = e^{2 \ell} + e^{2 \ell'}` with :math:`\ell'` falling
by :math:`\tfrac12 \log n`.

The network of the block, which sees the site's whole summary, corrects the product: it moves the location and
multiplies the precision, and so adds nothing where the product is flat.

**Start.** Joint samples say how an element's data depend on the site and on the others: a regression of the *data* on
the site, whose slopes are loadings and whose residuals are the noise. In linear-Gaussian models the product is then
exact, for any number of elements.

References:
    [1] He et al. (2019), Variational autoencoders with jointly optimized latent dependency structure, Eq. 18 (fusion).
    [2] Zaheer et al. (2017), Deep Sets, Theorem 2 (sums over elements).
    [3] McCullagh and Nelder (1989), Generalized Linear Models, Chapter 10 (joint models of mean and dispersion).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_graphflows.guides.conditionals.factors import LOG_SCALE_BOUND
from pyro_graphflows.guides.conditionals.pooling import DeepSetPool, Elements
from pyro_graphflows.guides.sites import Evidence
from pyro_graphflows.nn.mlp import MaskedMLP
from pyro_graphflows.regression import WINSOR, in_float64

__all__ = ["ElementFactors", "ElementForm"]

LOADING, DATUM, NOISE, WITHIN = range(4)  # the outputs of the network
MOST_ROWS = 200_000  # of elements, in a regression
MOST_PRODUCTS = 64  # of features of sites above and covariates of elements
ROUNDS = 8  # of the fit of mean and noise in turn
RIDGE = 1e-9
LEAST_NOISE = 1e-6  # beside the rest of it, of the part that groups inside do not explain
LEAST_ROWS = 50
SIGNIFICANT = 4.0  # standard errors: of slopes that are zero, one in 16,000 is kept
LARGEST = 60.0  # logarithm of a variance


@dataclass(frozen=True)
class ElementForm:
    """The inputs of the network of one element.

    Attributes:
        num_joint: The number of features of the element.
        responses: The columns of the features whose values depend on the site.
        covariates: The columns of the others that are nodes in the plate, or means of these.
        num_above: The number of features of the sites and inputs beside it.
        nested: Whether elements are groups themselves.
        learned: For each feature of the element whether it depends on parameters.
        units: Hidden units of the network.
        activation: Its activation.
    """

    num_joint: int
    responses: tuple[int, ...]
    covariates: tuple[int, ...]
    num_above: int
    nested: bool
    learned: tuple[bool, ...]
    units: int = 16
    activation: str = "elu"

    @classmethod
    def of_pool(cls, pool: DeepSetPool, responses: Collection[str], num_above: int) -> "ElementForm":
        """Return the form for the elements that a summary is made of.

        Args:
            pool: The summary.
            responses: The members that depend on the site.
            num_above: See :class:`ElementForm`.
        """
        of_responses: list[int] = []
        others: list[int] = []
        start = 0
        for member in pool.in_core_order():
            columns = range(start, start + member.size)
            (of_responses if member.name in responses else others).extend(columns)
            start += member.size
        learned = tuple(pool.learned_of_elements())
        nested = len(pool.orders[0]) == 2  # one level of groups: the number of their elements is known
        form = (len(learned), tuple(of_responses), tuple(others), num_above, nested, learned)
        return cls(*form, activation=pool.options.activation)

    @property
    def num_products(self) -> int:
        """The number of products of features above and covariates."""
        number = len(self.covariates) * self.num_above
        return number if number <= MOST_PRODUCTS else 0

    @property
    def num_inputs(self) -> int:
        """The number of inputs in all."""
        return self.num_joint + self.num_above + self.num_products + int(self.nested)


class ElementFactors(nn.Module):
    """The factors of the elements of a plate, of one number: see the module's essay.

    Args:
        form: The inputs of the network.
        shift: Shift of the standardised coordinate of the site, ``(1,)``.
        scale: Its scale.
    """

    shift: Tensor
    scale: Tensor
    number: Tensor

    def __init__(self, form: ElementForm, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.form = form
        outputs = 4 if form.nested else 3
        every = range(form.num_inputs)
        self.network = MaskedMLP(
            [every] * outputs,
            form.num_inputs,
            num_params=1,
            units_per_set=form.units,
            activation=form.activation,
            natural_units=True,
        )
        self.register_buffer("shift", shift.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("scale", scale.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("number", shift.new_zeros(1))  # the logarithm of the size of a group at set-up

    def to_plain(self) -> dict[str, Any]:
        """Return what the factors are made from."""
        return {"form": self.form}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "ElementFactors":
        """Return factors of the same form, for a state that is loaded."""
        return cls(plain["form"], torch.zeros(1), torch.ones(1))

    def inputs(self, elements: Elements, above: Tensor) -> Tensor:
        """Return the inputs of the network, ``(*batch of elements, num_inputs)``.

        Args:
            elements: The elements.
            above: Features of the sites and inputs beside the site, ``(*batch, num_above)``.
        """
        form, joint = self.form, elements.joint
        parts = [joint]
        if form.num_above:
            above = elements.of_groups(above)
            parts.append(above)
            if form.num_products:
                covariates = joint[..., list(form.covariates)]
                product = above.unsqueeze(-1) * covariates.unsqueeze(-2)
                parts.append(product.flatten(-2))
        if form.nested:
            assert elements.inside is not None
            parts.append(elements.inside.log_number - self.number)
        shape = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)

    def forward(self, elements: Elements, above: Tensor) -> Evidence:
        """Return what the elements say of the site, in its standardised coordinate.

        Args:
            elements: The elements.
            above: See :meth:`inputs`.
        """
        outputs = self.network(self.inputs(elements, above)).squeeze(-1)
        loading, datum, log_noise = outputs[..., LOADING], outputs[..., DATUM], self._log_noise(outputs)
        precise = loading * torch.exp(-log_noise)
        terms = torch.stack([precise * loading, precise * datum], -1)
        return Evidence(elements.total(terms), self.shift, self.scale)

    def _log_noise(self, outputs: Tensor) -> Tensor:
        """Return the logarithms of the variances of the noise."""
        own = 2.0 * outputs[..., NOISE].clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND)
        if not self.form.nested:
            return own
        return torch.logaddexp(own, 2.0 * outputs[..., WITHIN].clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND))

    # ---------------------------------------------------------------- starts

    @torch.no_grad()
    def set_linear_(self, weights: Tensor, intercept: float, log_scale: float, unit: float) -> None:
        """Let each element have the factor ``N(u; intercept + weights @ features, scale)``, in standardised units.

        Args:
            weights: Of the features of the element and of the sites above, ``(num_joint + num_above,)``.
            intercept: The location where they are zero.
            log_scale: The logarithm of the scale.
            unit: What one step of training moves a location by.
        """
        rows = self.shift.new_zeros(len(self.network.allowed), self.form.num_inputs)
        rows[DATUM, : len(weights)] = weights
        biases = rows.new_zeros(len(rows))
        biases[LOADING], biases[DATUM], biases[NOISE] = 1.0, intercept, log_scale
        if self.form.nested:
            biases[WITHIN] = -LOG_SCALE_BOUND
        self._set_rows_(rows, biases, unit)

    def _set_rows_(self, rows: Tensor, biases: Tensor, unit: float) -> None:
        units = biases.new_ones(len(biases))
        units[LOADING] = units[DATUM] = unit
        self.network.set_linear_(slice(0, len(biases)), rows, biases, units)

    @torch.no_grad()
    def fit_(self, elements: Elements, above: Tensor, values: Tensor) -> bool:
        """Start at regressions of the elements' data on the site and on all else that is known.

        Args:
            elements: The elements in joint samples, with the draws on the left.
            above: Features of the sites beside it, ``(draws, *batch, num_above)``.
            values: Values of the site in its coordinate, ``(draws, *batch, 1)``.

        Returns:
            Whether that was possible.
        """
        if self.form.nested:
            assert elements.inside is not None
            self.number.copy_(elements.inside.log_number.reshape(-1).mean())
        rows = _Rows.of(self, elements, above, (values - self.shift) / self.scale)
        if rows is None or not self.form.responses:
            return False
        fitted = rows.fit(self.form)
        if fitted is None:
            return False
        weights, biases = fitted
        like = self.shift
        self._set_rows_(weights.to(like), biases.to(like), 1.0)
        precision = self(elements, above).parameters[..., 0]
        spread = float((1.0 + precision.clamp(min=0.0)).rsqrt().log().mean().exp())
        self._set_rows_(weights.to(like), biases.to(like), spread)
        self.network.whiten_(rows.moments(self.form).to(like))
        return True


@dataclass(frozen=True)
class _Rows:
    """Elements in rows: inputs of the network, values of the site, and spreads inside of groups.

    Attributes:
        inputs: ``(n, num_inputs)``.
        value: ``(n,)``.
        within: Variances of means of groups by the spread inside of them, of each response, ``(n, responses)``.
    """

    inputs: Tensor
    value: Tensor
    within: Tensor | None

    @classmethod
    def of(cls, factors: ElementFactors, elements: Elements, above: Tensor, values: Tensor) -> "_Rows | None":
        form = factors.form
        parts = [factors.inputs(elements, above), elements.of_groups(values)]
        if form.nested:
            assert elements.inside is not None
            spreads = elements.inside.variances_of_means()
            further = spreads.new_full((*spreads.shape[:-1], form.num_joint - spreads.shape[-1]), torch.nan)
            parts.append(torch.cat([spreads, further], -1)[..., list(form.responses)])
        if elements.weight is not None:
            parts.append(elements.weight)
        shape = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
        flat = [part.expand(*shape, part.shape[-1]).reshape(-1, part.shape[-1]) for part in parts]
        chosen = torch.isfinite(torch.cat(flat[:2], -1)).all(-1) & (flat[1][:, 0].abs() < WINSOR)
        start = form.num_joint
        beside = [*form.covariates, *range(start, start + form.num_above)]
        chosen &= (flat[0][:, beside].abs() < WINSOR).all(-1)  # rows are never chosen by their data
        if elements.weight is not None:
            chosen &= flat[-1][:, 0] > 0
        found = chosen.nonzero()[:, 0]
        if len(found) < LEAST_ROWS:
            return None
        if len(found) > MOST_ROWS:
            found = found[torch.randperm(len(found), device="cpu")[:MOST_ROWS].to(found.device)]
        inputs, value = (in_float64(part[found]) for part in flat[:2])
        return cls(inputs, value[:, 0], in_float64(flat[2][found]) if form.nested else None)

    def moments(self, form: ElementForm) -> Tensor:
        """Return the second moments of the inputs; of features that are trained, without products with others."""
        moments = self.inputs.mT @ self.inputs / len(self.inputs)
        learned = torch.zeros(len(moments), dtype=torch.bool, device=moments.device)
        learned[: form.num_joint] = torch.tensor(form.learned, device=moments.device)
        spread = moments.diagonal()[learned]
        moments[learned] = 0.0
        moments[:, learned] = 0.0
        at = learned.nonzero()[:, 0]
        moments[at, at] = spread
        return moments

    def fit(self, form: ElementForm) -> tuple[Tensor, Tensor] | None:
        """Return weights ``(outputs, num_inputs)`` and biases of the network's linear map."""
        x, u = self.inputs, self.value.unsqueeze(-1)
        one = x.new_ones(len(x), 1)
        responses, covariates = list(form.responses), list(form.covariates)
        beside = [*covariates, *range(form.num_joint, form.num_joint + form.num_above + form.num_products)]
        above = list(range(form.num_joint, form.num_joint + form.num_above))
        known = torch.cat([one, x[:, beside]], -1)
        single = len(responses) == 1
        loads = [*covariates] if single else []  # with several responses, loadings do not vary
        regressors = torch.cat([known, u, u * x[:, loads]], -1)
        of_noise = torch.cat([one, x[:, [*above, *(covariates if single else ())]]], -1)
        y = x[:, responses]
        variance = x.new_ones(len(x))
        noise: Tensor | None = None
        of_within: Tensor | None = None
        kept = torch.ones(regressors.shape[-1], dtype=torch.bool, device=x.device)
        for number in range(ROUNDS):
            found = _weighted_regression(regressors[:, kept], y, 1.0 / variance)  # (responses, regressors)
            if found is None:
                return None
            slopes = y.new_zeros(len(responses), len(kept))
            slopes[:, kept] = found
            if single and number == ROUNDS // 2:  # slopes that chance explains would be wrong far out
                kept &= _significant(regressors, slopes[0], variance)
                kept[0] = kept[known.shape[-1]] = True
            residual = y - regressors @ slopes.T
            loading = slopes[:, known.shape[-1] :]
            if single:
                combine, size = (
                    x.new_ones(1),
                    float((loading[0, 0] + x[:, loads] @ loading[0, 1:]).square().mean().sqrt()),
                )
            else:
                spread = residual.T @ residual / len(residual)
                pull = torch.linalg.lstsq(spread, loading[:, :1]).solution[:, 0]
                combine, size = pull, float(pull @ loading[:, 0])
            if not size > 1e-6:
                return None  # the data say nothing of the site, to first order
            combine = combine / size
            off = residual @ combine
            within = None
            if self.within is not None and single:
                of_within, within = _within(
                    of_noise[:, : 1 + len(above)], self.within[:, 0] * combine[0] ** 2
                )
            noise, variance = _dispersion(of_noise, off, within)
            if noise is None or not bool(torch.isfinite(variance).all()):
                return None
            if not single:
                variance = x.new_ones(len(x))  # one regression does
                break
        assert noise is not None
        weights = x.new_zeros(4 if form.nested else 3, x.shape[-1])
        biases = x.new_zeros(len(weights))
        weights[DATUM, responses] = combine
        weights[DATUM, beside] = -(combine @ slopes[:, 1 : known.shape[-1]])
        biases[DATUM] = -(combine @ slopes[:, 0])
        biases[LOADING] = combine @ loading[:, 0]
        weights[LOADING, loads] = combine @ loading[:, 1:]
        weights[NOISE, [*above, *(covariates if single else ())]] = 0.5 * noise[1:]
        biases[NOISE] = 0.5 * noise[0]
        if form.nested:
            biases[WITHIN] = -LOG_SCALE_BOUND
            if of_within is not None:
                biases[WITHIN] = 0.5 * of_within[0]
                weights[WITHIN, above] = 0.5 * of_within[1:]
                weights[WITHIN, -1] = -0.5
        return weights, biases


def _weighted_regression(inputs: Tensor, values: Tensor, weight: Tensor) -> Tensor | None:
    """Return slopes, ``(values, inputs)``."""
    weighted = inputs * (weight / weight.mean()).unsqueeze(-1)
    matrix = weighted.mT @ inputs / len(inputs)
    matrix = matrix + RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix)).to(matrix)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    return torch.cholesky_solve(weighted.mT @ values / len(inputs), factor).mT


def _significant(inputs: Tensor, slopes: Tensor, variance: Tensor) -> Tensor:
    """Return which slopes of a regression are not zero by chance, the others kept."""
    matrix = (inputs / variance.unsqueeze(-1)).mT @ inputs
    matrix = matrix + RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix)).to(matrix)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return torch.ones_like(slopes, dtype=torch.bool)
    error = torch.cholesky_inverse(factor).diagonal().sqrt()
    return slopes.abs() > SIGNIFICANT * error


def _dispersion(
    inputs: Tensor, residual: Tensor, offset: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """Fit ``variance = offset + exp(inputs @ slopes)`` to residuals by Fisher scoring; the first input is one.

    Returns:
        The slopes, and the variances; None if there is no fit.
    """
    square = residual.square()
    known = torch.zeros_like(square) if offset is None else offset
    total = float(square.mean())
    rest = max(total - float(known.mean()), LEAST_NOISE * total)
    slopes = inputs.new_zeros(inputs.shape[-1])
    if not rest > 0:
        return None, known
    slopes[0] = math.log(rest)
    least = math.log(LEAST_NOISE * rest)
    kept = torch.ones(len(slopes), dtype=torch.bool, device=slopes.device)
    for number in range(ROUNDS):
        own = (inputs @ slopes).clamp(least, LARGEST).exp()
        share = own / (own + known)
        off = ((square - own - known) / own.clamp(min=1e-300)).clamp(max=50.0)
        step = _weighted_regression(inputs[:, kept], off.unsqueeze(-1), share.square())
        if step is None:
            return None, known
        slopes[kept] += step[0].clamp(-2.0, 2.0)
        slopes[0] = slopes[0].clamp(min=least)
        if number == ROUNDS // 2:
            kept &= _significant(inputs, slopes, 2.0 / share.square().clamp(min=1e-12))
            kept[0] = True
            slopes = torch.where(kept, slopes, torch.zeros_like(slopes))
    return slopes, known + (inputs @ slopes).clamp(least, LARGEST).exp()


def _within(inputs: Tensor, variances: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Fit the variances of means by the spread inside of groups; nothing where it cannot be seen."""
    seen = torch.isfinite(variances) & (variances > 0)
    if int(seen.sum()) < LEAST_ROWS:
        return None, None
    slopes, _ = _dispersion(inputs[seen], variances[seen].sqrt())
    if slopes is None:
        return None, None
    return slopes, (inputs @ slopes).clamp(max=LARGEST).exp()
