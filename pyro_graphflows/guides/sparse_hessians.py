"""Hessians by few products with vectors, where most second derivatives are zero at every point.

In a hierarchy the effects of different groups have no second derivative, and a few numbers that all groups share have
one with each. :class:`Sparsity` learns from a full Hessian which are zero. Then those few numbers take a product each,
and the others are put into groups such that one product with the sum of a group's unit vectors has all second
derivatives of its members, those with the shared numbers being known by symmetry [1]. A zero that is none elsewhere is
found out by one more product, with a vector of no zeros.

References:
    [1] Coleman and Moré (1984), Estimation of Sparse Hessian Matrices and Graph Coloring Problems, Math. Prog. 28.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["Products", "Sparsity"]

LEAST = 10  # numbers from which products are what takes long
NUM_SHARED = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 96, 128)  # numbers with a product of their own
ROUNDING = 1e-9

Products = Callable[[Tensor], Tensor]  # of a symmetric matrix with vectors in rows


class Sparsity:
    """Finds Hessians of one function at many points, and learns which second derivatives are zero.

    Example:
        >>> hessian = torch.eye(60).double()
        >>> hessian[0] = hessian[:, 0] = torch.arange(60.0)
        >>> sparsity, rows = Sparsity(), []
        >>> for _ in range(2):
        ...     found = sparsity.hessian(lambda vectors: rows.append(len(vectors)) or vectors @ hessian, 60)
        >>> torch.equal(found, hessian), rows
        (True, [60, 3])
    """

    def __init__(self) -> None:
        self._pattern: Tensor | None = None
        self._shared: Tensor | None = None
        self._groups: Tensor | None = None  # of the others

    def hessian(self, products: Products, size: int) -> Tensor:
        """Return a Hessian.

        Args:
            products: Multiplies it by vectors.
            size: The number of its rows.
        """
        if self._groups is not None:
            found = self._by_groups(products, self._groups)
            if found is not None:
                return found
        full = products(torch.eye(size, dtype=torch.float64))
        if size >= LEAST and bool(torch.isfinite(full).all()):
            self._learn(full)
        return full

    def _learn(self, hessian: Tensor) -> None:
        nonzero = (hessian != 0) | (hessian.T != 0) | torch.eye(len(hessian), dtype=torch.bool)
        if self._pattern is not None:
            nonzero |= self._pattern
            if torch.equal(
                nonzero, self._pattern
            ):  # that there are no groups, or those that there are, stays
                return
        self._pattern = nonzero
        pattern = self._pattern.numpy()
        order = np.argsort(-pattern.sum(0), kind="stable")
        choices = [k for k in NUM_SHARED if k < len(order) // 2]
        colours = {k: _coloured(pattern, order[k:]) for k in choices}
        best = min(choices, key=lambda k: k + colours[k].max())
        if best + colours[best].max() + 2 > len(order) // 2:
            self._groups = None
            return
        self._shared = torch.from_numpy(order[:best].copy())
        self._groups = torch.full((len(order),), -1)
        self._groups[torch.from_numpy(order[best:].copy())] = torch.from_numpy(colours[best])

    def _by_groups(self, products: Products, groups: Tensor) -> Tensor | None:
        """Return the Hessian by groups; None if that is not what it is."""
        assert self._shared is not None
        assert self._pattern is not None
        size, shared = len(groups), self._shared
        sums = (groups == torch.arange(int(groups.max()) + 1).unsqueeze(-1)).to(torch.float64)
        units = torch.eye(size, dtype=torch.float64)[shared]
        check = torch.arange(1, size + 1, dtype=torch.float64).cos()
        found = products(torch.cat([units, sums, check.unsqueeze(0)]))
        hessian = torch.where(self._pattern, found[len(shared) : -1][groups].T, 0.0)
        hessian[shared] = found[: len(shared)]
        hessian[:, shared] = found[: len(shared)].T
        bound = ROUNDING * (hessian.abs() @ check.abs())
        is_right = (hessian @ check - found[-1]).abs() <= bound  # not so where something is not finite
        return hessian if bool(is_right.all()) else None


def _coloured(pattern: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return colours of members, from zero: those of one colour have nonzero elements in rows of their own only."""
    block = pattern[np.ix_(members, members)].astype(np.float32)
    conflicts = block @ block > 0
    colours = np.full(len(members), -1)
    for i in range(len(members)):
        taken = set(colours[:i][conflicts[i, :i]].tolist())
        colours[i] = next(colour for colour in range(i + 1) if colour not in taken)
    return colours
