r"""A prior times a factor, both normal in one coordinate.

With the prior :math:`N(a, b^2)` of a site given its model parents and a factor :math:`\psi = N(m, s^2)`, the
conditional is

.. math:: q(u) \propto N(u; a, b^2) \, N(u; m, s^2),

a normal of precision :math:`b^{-2} + s^{-2}`. The textbook form gives a scale of zero where the prior is narrow (a
hierarchy whose scale goes to zero); these forms work on logarithms. A factor that says nothing (:math:`s = \infty`, or
a precision of zero) leaves exactly the prior.

References:
    [1] He, Gong, Marino, Mori and Lehrmann (2019), Variational autoencoders with jointly optimized latent dependency
    structure, Eq. 18: the precision-weighted fusion of a top-down and a bottom-up normal.
"""

import math

import torch
from torch import Tensor

from pyro_graphflows.regression import in_float64

__all__ = [
    "fuse",
    "fuse_logits",
    "fuse_matrix",
    "fuse_natural",
    "fuse_natural_matrix",
    "natural_parameters",
    "summed_over_groups",
]


def fuse(
    loc: Tensor, log_scale: Tensor, factor_loc: Tensor, factor_log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return location and log-scale of the normal proportional to a prior times a factor, elementwise.

    .. math::
        \log\sigma = -\tfrac12 \operatorname{logaddexp}(-2 \log b, -2 \log s), \qquad
        \mu = a + \operatorname{sigmoid}(2 (\log b - \log s)) (m - a)

    Args:
        loc: The prior's location ``a``.
        log_scale: The logarithm of its scale, ``log b``.
        factor_loc: The factor's location ``m``.
        factor_log_scale: The logarithm of its scale, ``log s``; infinity for a factor that says nothing.

    Example:
        >>> zero = torch.tensor(0.0)
        >>> [x.item() for x in fuse(zero, zero, torch.tensor(2.0), zero)]  # equal precisions: half-way
        [1.0, -0.3465735912322998]
        >>> [x.item() for x in fuse(zero, torch.tensor(-45.0), torch.tensor(2.0), zero)][1]
        -45.0
    """
    ratio = log_scale - factor_log_scale  # half the logarithm of the factor's precision over the prior's
    share = torch.sigmoid(2.0 * ratio)
    of_one_type = loc.dtype == factor_loc.dtype == share.dtype  # lerp does not promote
    fused_loc = torch.lerp(loc, factor_loc, share) if of_one_type else loc + share * (factor_loc - loc)
    return fused_loc, log_scale - torch.nn.functional.softplus(ratio, beta=2.0)


def fuse_natural(
    loc: Tensor, log_scale: Tensor, precision: Tensor, weighted: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return location and log-scale of the normal proportional to a prior times a factor in natural parameters.

    The factor is :math:`\exp(-\lambda u^2 / 2 + \eta u)`. With :math:`\lambda = \eta = 0` the result is the prior,
    exactly; factors are multiplied by adding their parameters.

    .. math:: \mu = a + \frac{b^2 (\eta - \lambda a)}{1 + \lambda b^2}, \qquad
        \log\sigma = \log b - \tfrac12 \log(1 + \lambda b^2)

    Args:
        loc: The prior's location ``a``.
        log_scale: The logarithm of its scale, ``log b``.
        precision: The factor's precision ``lambda``, zero or more.
        weighted: The factor's precision times its location, ``eta``.

    Example:
        >>> a, log_b = torch.tensor(3.0), torch.tensor(0.5)
        >>> [x.item() for x in fuse_natural(a, log_b, torch.tensor(0.0), torch.tensor(0.0))]
        [3.0, 0.5]
    """
    # b^2 = variance / inverse; of priors so wide that their variance might overflow, the precision is taken instead.
    wide = log_scale > 0.2 * math.log(torch.finfo(log_scale.dtype).max)
    zero = torch.zeros_like(log_scale)
    variance = torch.exp(2.0 * torch.where(wide, zero, log_scale))
    inverse = torch.exp(-2.0 * torch.where(wide, log_scale, zero))
    total = inverse + precision * variance
    shift = variance * (weighted - precision * loc) / total
    usual = log_scale - 0.5 * torch.log1p(precision * variance)
    of_wide = torch.where(precision == 0, log_scale, -0.5 * torch.log(torch.where(wide, total, zero + 1.0)))
    return loc + shift, torch.where(wide, of_wide, usual)


def natural_parameters(loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the precision of a normal factor, and the precision times its location.

    Args:
        loc: Its location.
        log_scale: The logarithm of its scale.
    """
    precision = torch.exp(-2.0 * log_scale)
    return precision, precision * loc


def summed_over_groups(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Return the sums of natural parameters over the elements of each group; zero for a group without elements.

    Args:
        values: Parameters of the elements, shape ``(*batch, n)``.
        groups: The group of each element, shape ``(n,)``; negative for elements that belong to none.
        num_groups: The number of groups.

    Shape:
        - Output: ``(*batch, num_groups)``.

    Example:
        >>> summed_over_groups(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0]), 3).tolist()
        [5.0, 0.0, 2.0]
    """
    sums = values.new_zeros((*values.shape[:-1], num_groups + 1))
    return sums.index_add(-1, torch.where(groups < 0, num_groups, groups), values)[..., :num_groups]


def fuse_natural_matrix(
    loc: Tensor, scale_tril: Tensor, precision: Tensor, weighted: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return mean and Cholesky factor of a multivariate normal prior times a factor in natural parameters.

    With :math:`L L^\top` the prior's covariance, the covariance is :math:`L (I + L^\top \Lambda L)^{-1} L^\top`:
    nothing is inverted that may be singular, and :math:`\Lambda = 0` leaves the prior as it is.

    Args:
        loc: The prior's mean, shape ``(*batch, d)``.
        scale_tril: The Cholesky factor ``L`` of its covariance, shape ``(*batch, d, d)``.
        precision: The factor's precision: its diagonal, shape ``(*batch, d)``, or a positive semidefinite matrix,
            shape ``(*batch, d, d)``. A tensor of two or more dimensions whose last two are ``(d, d)`` and that has one
            dimension more than ``weighted`` is a matrix.
        weighted: The precision times the factor's location, shape ``(*batch, d)``.

    Returns:
        The mean, and a lower triangular matrix with a positive diagonal.

    Example:
        >>> root = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        >>> mean, tril = fuse_natural_matrix(torch.ones(2), root, torch.zeros(2), torch.zeros(2))
        >>> torch.equal(mean, torch.ones(2)), torch.equal(tril, root)
        (True, True)
    """
    if precision.dim() == weighted.dim() + 1:
        scaled, pull = precision @ scale_tril, weighted - (precision @ loc.unsqueeze(-1)).squeeze(-1)
    else:
        scaled, pull = precision.unsqueeze(-1) * scale_tril, weighted - precision * loc
    inner = scale_tril.mT @ scaled
    tril = _divided(scale_tril, torch.linalg.cholesky(_reversed_sum(0.5 * (inner + inner.mT))))
    return loc + (tril @ (tril.mT @ pull.unsqueeze(-1))).squeeze(-1), tril


def fuse_matrix(
    loc: Tensor, scale_tril: Tensor, factor_loc: Tensor, factor_root: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return mean and Cholesky factor of a multivariate normal prior times a factor given by its location.

    The factor's precision is :math:`U^\top U`. With :math:`L L^\top` the prior's covariance, the covariance is
    :math:`L (I + (U L)^\top U L)^{-1} L^\top`.

    Args:
        loc: The prior's mean, shape ``(*batch, d)``.
        scale_tril: The Cholesky factor ``L`` of its covariance, shape ``(*batch, d, d)``.
        factor_loc: The factor's location, shape ``(*batch, d)``.
        factor_root: The root ``U`` of its precision, shape ``(*batch, k, d)``.

    Returns:
        The mean, and a lower triangular matrix with a positive diagonal.
    """
    # A factor that is narrower than the prior in some directions, by more than a number in single precision has digits,
    # would hide what the prior says of the others.
    scaled = in_float64(factor_root) @ in_float64(scale_tril)
    apart = in_float64(factor_root @ (factor_loc - loc).unsqueeze(-1))
    try:
        root = torch.linalg.cholesky(_reversed_sum(scaled.mT @ scaled))
        moves = torch.linalg.solve_triangular(root, (scaled.mT @ apart).flip(-2), upper=False)
    except RuntimeError:  # narrower by more than one in double precision has
        eye = torch.eye(scaled.shape[-1]).to(scaled).expand(*scaled.shape[:-2], -1, -1)
        orthogonal, upper = torch.linalg.qr(torch.cat([eye, scaled], -2).flip(-1))
        signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-1)
        root = (signs * upper).mT
        moves = signs * (orthogonal[..., eye.shape[-1] :, :].mT @ apart)
    tril = _divided(scale_tril, root.to(scale_tril))
    return loc + (tril @ moves.flip(-2).to(tril)).squeeze(-1), tril


def _reversed_sum(inner: Tensor) -> Tensor:
    """Return the identity plus a matrix, with rows and columns in reversed order."""
    return (torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device) + inner).flip(-1, -2)


def _divided(scale_tril: Tensor, root: Tensor) -> Tensor:
    r"""Return :math:`L R^{-\top}`, lower triangular, from the Cholesky factor of :math:`R R^\top` in reversed order."""
    return torch.linalg.solve_triangular(root.flip(-1, -2).mT, scale_tril, upper=False, left=False)


def fuse_logits(prior_logits: Tensor, logits: Tensor) -> Tensor:
    """Return normalised logits of a prior over classes times a factor.

    Classes that the prior excludes stay excluded, without a NaN in the derivatives.

    Args:
        prior_logits: The prior's logits, normalised or not; minus infinity (or the least finite number, as Pyro's
            distributions write it) for what has no probability. Shape ``(*batch, k)``.
        logits: The factor's logits; zero leaves the prior.

    Example:
        >>> fuse_logits(torch.tensor([0.0, -torch.inf, 0.0]), torch.zeros(3)).exp().tolist()
        [0.5, 0.0, 0.5]
    """
    possible = prior_logits > torch.finfo(prior_logits.dtype).min / 2
    together = torch.where(possible, prior_logits, 0.0) + torch.where(possible, logits, 0.0)
    together = together.masked_fill(~possible, -torch.inf)
    return together - torch.logsumexp(together, -1, keepdim=True)
