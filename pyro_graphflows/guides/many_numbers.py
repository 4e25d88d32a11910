r"""Normal approximations of posteriors of thousands of numbers: few are shared by all, the others are in small blocks.

In hierarchies, the numbers of different elements of a plate are independent given those outside of it. So the Hessian
of the log-density is an arrow: dense rows of the shared numbers, and for each element a block of the others. Of crossed
effects, those of the grouping with fewer levels are shared, up to a thousand of them. With as
many products as there are shared numbers, and a few more, it is known, its inverse has a square root of the same shape,
and nothing is as large as the square of the number of numbers.

The numbers of the largest sites are those of elements. What of the Hessian there is between different elements, those
of vectors among them, is no part of the arrow, and makes its blocks less exact. The mean is found by the ELBO of
independent normals over fixed draws of noise, for the mode of many effects and their scale together is far from where
the posterior is (:mod:`~pyro_graphflows.guides.mode`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_graphflows.guides.minimize import (
    LEAST_CURVATURE,
    LEAST_PRECISION,
    Products,
    alone,
    first_normal,
    independent_losses,
    lbfgs,
    products_at,
)

__all__ = ["ArrowRoot", "arrow_normals"]

MOST_SHARED = 1000  # numbers, each of which takes a product with the Hessian
FEW_SHARED = 100  # for which there is always time
SECONDS_OF_SHARED = 1.0  # of processor time for more of them
NUM_SIGNS = 4  # products with random signs, of which each row of a block is a mean
NUM_PAIRS = 8  # of opposite draws of noise
SECONDS = 4.0  # of processor time for each search
SHARES_OF_WIDTH = (1.0, 0.3, 0.1)  # as in the search for few numbers


@dataclass(frozen=True)
class ArrowRoot:
    """A square root of a covariance that has the shape of an arrow.

    Attributes:
        shared: Places of the numbers that are shared, ``(g,)``.
        groups: For each size of plates, places of the numbers of elements, ``(elements, k)``.
        root: A square root of the covariance of the shared ones, ``(g, g)``.
        slopes: For each group, how means of its numbers follow the shared ones, ``(elements, k, g)``.
        roots: For each group, square roots of its elements' covariances given the shared ones, ``(elements, k, k)``.
    """

    shared: Tensor
    groups: tuple[Tensor, ...]
    root: Tensor
    slopes: tuple[Tensor, ...]
    roots: tuple[Tensor, ...]

    @property
    def log_volume(self) -> float:
        """The logarithm of the determinant."""
        return sum(float(torch.linalg.slogdet(each)[1].sum()) for each in (self.root, *self.roots))

    def spread(self, noise: Tensor) -> Tensor:
        """Return standard normal noise with this covariance, ``(draws, numbers)`` each."""
        found = torch.empty_like(noise)
        shared = noise[:, self.shared] @ self.root.T
        found[:, self.shared] = shared
        for places, slopes, roots in zip(self.groups, self.slopes, self.roots, strict=True):
            own = torch.einsum("mij,nmj->nmi", roots, noise[:, places])
            found[:, places] = own + torch.einsum("mig,ng->nmi", slopes, shared)
        return found


def arrow_normals(
    log_density: Callable[[Tensor], Tensor],
    start: Tensor,
    sites: Sequence[range],
    least: Tensor,
    generator: torch.Generator,
    *,
    has_mode: bool = True,
) -> list[tuple[Tensor, ArrowRoot]]:
    """Return normal approximations of a density, each as its mean and a square root of its covariance.

    Args:
        log_density: From points ``(draws, numbers)``, or one of them, to log-densities.
        start: Where the search begins, ``(numbers,)``.
        sites: Places of each site's numbers; those of as many elements are of the same ones.
        least: The least curvature of each number that may be believed.
        generator: Of noise.
        has_mode: Whether to search for the mode at first; effects and their scale have none in unconstrained space.
    """

    def negative(point: Tensor) -> Tensor:
        return -log_density(point)

    size = len(start)
    point = lbfgs(negative, start, SECONDS) if has_mode else start
    first = _arrow(negative, point, sites, least, generator)
    if first is None:
        return []
    root, curvature = first
    noise = torch.randn(NUM_PAIRS, size, generator=generator, dtype=torch.float64)
    losses = independent_losses(log_density, torch.cat([noise, -noise]))
    both = first_normal(losses, point, -curvature.log() / 2, SHARES_OF_WIDTH)
    found = [(point, root)]
    if both is not None:
        loc = lbfgs(alone(losses), both, SECONDS)[:size].detach()
        second = _arrow(negative, loc, sites, least, generator)
        if second is not None:
            found.append((loc, second[0]))
    return found


def _arrow(
    negative: Callable[[Tensor], Tensor],
    point: Tensor,
    sites: Sequence[range],
    least: Tensor,
    generator: torch.Generator,
) -> tuple[ArrowRoot, Tensor] | None:
    """Return the square root of the inverse Hessian at a point, and curvatures; None where it is not finite."""
    products = products_at(negative, point)
    if products is None:
        return None
    shared, groups = _divided(sites, _most_shared(products, len(point)))
    ones = torch.zeros(len(shared), len(point), dtype=torch.float64)
    rows = products(ones.scatter(-1, shared.unsqueeze(-1), 1.0))
    precision = rows[:, shared]
    curvature = least.clone()
    curvature[shared] = precision.diagonal().abs().maximum(least[shared])
    slopes, roots = [], []
    for places in groups:
        blocks = _blocks(products, places, len(point), generator)
        values, vectors = torch.linalg.eigh(blocks)
        floor = least[places].min(-1, keepdim=True).values
        values = values.abs().maximum(LEAST_PRECISION * floor)
        root = vectors * values.rsqrt().unsqueeze(-2) @ vectors.mT
        beside = rows[:, places].permute(1, 2, 0)  # (elements, k, shared)
        slope = -root @ root @ beside
        precision = precision + torch.einsum("mkg,mkh->gh", beside, slope)
        curvature[places] = (vectors.square() * values.unsqueeze(-2)).sum(-1)
        slopes.append(slope)
        roots.append(root)
    width = curvature[shared].rsqrt()
    if not bool(torch.isfinite(precision).all()) or not all(
        bool(torch.isfinite(each).all()) for each in roots
    ):
        return None
    values, vectors = torch.linalg.eigh((precision + precision.T) / 2 * width * width.unsqueeze(-1))
    least_value = LEAST_CURVATURE * float(values.abs().max()) if len(values) else 0.0
    root = width.unsqueeze(-1) * (vectors * values.abs().clamp(min=least_value).rsqrt() @ vectors.T)
    return ArrowRoot(shared, tuple(groups), root, tuple(slopes), tuple(roots)), curvature


def _most_shared(products: Products, size: int) -> int:
    """Return how many numbers may be shared, by how long a product takes."""
    ones = torch.ones(1, size, dtype=torch.float64)
    products(ones)  # the first may be slow for other reasons
    began = time.process_time()
    products(ones)
    seconds = max(time.process_time() - began, 1e-6)
    return max(FEW_SHARED, min(MOST_SHARED, int(SECONDS_OF_SHARED / seconds)))


def _divided(sites: Sequence[range], most: int) -> tuple[Tensor, list[Tensor]]:
    """Return the places of shared numbers, no more than so many, and of those of elements, by their number."""
    shared: list[int] = []
    own: dict[int, list[range]] = {}
    for places in sorted(sites, key=len):
        if not own and len(shared) + len(places) <= most:
            shared += places
        else:
            own.setdefault(len(places), []).append(places)
    groups = [torch.tensor([list(each) for each in same]).T for same in own.values()]
    return torch.tensor(shared, dtype=torch.long), groups


def _blocks(products: Products, places: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return the blocks of elements on the Hessian's diagonal, ``(elements, k, k)``: exact where there is no more."""
    elements, k = places.shape
    found = []
    for column in range(k):
        signs = torch.randint(2, (NUM_SIGNS, elements), generator=generator).double() * 2 - 1
        vectors = torch.zeros(NUM_SIGNS, size, dtype=torch.float64)
        vectors[:, places[:, column]] = signs
        found.append((products(vectors)[:, places] * signs.unsqueeze(-1)).mean(0))
    blocks = torch.stack(found, -1)
    return (blocks + blocks.mT) / 2
