r"""What is known of answers to items (Rasch): evidence and posterior, by weighted draws in few dimensions.

Given the spread s and the difficulties d, persons are independent, and the number r of right answers of a person says
all that the answers do of the ability:

.. math:: \log p(y \mid s, d) = \sum_r n_r \log \int N(a; 0, s^2) \frac{e^{a r}}{\prod_i (1 + e^{a - d_i})}\, da
          - \sum_i d_i c_i ,

with :math:`n_r` persons who have r right answers and :math:`c_i` right answers to item i. The integral is a sum over a
grid. What is left are five to thirteen numbers, in coordinates in which their priors are standard normal: draws of
Student's t around the mode are weighted, with the covariance of the weighted draws of an earlier round.
"""

import math
from dataclasses import dataclass

import torch
from pyro.distributions import MultivariateStudentT
from torch import Tensor
from torch.nn.functional import softplus

from pyro_graphflows.infer.psis import smoothed_log_weights

SPREAD, DIFFICULTY = 1.5, 1.5  # the scales of the two priors
GRID = torch.linspace(-6.5, 6.5, 161, dtype=torch.float64)  # abilities in units of their spread
ROUNDS = (1000, 2000, 8000)  # draws; the last ones count
DEGREES, STEPS = 6.0, 40


@dataclass(frozen=True)
class Posterior:
    """What is known of a data set.

    Attributes:
        log_evidence: The logarithm of the evidence.
        error: Its standard error.
        khat: Of the weights.
        mean: Posterior means of the spread, of abilities and of difficulties, in this order.
        sd: Posterior standard deviations.
    """

    log_evidence: float
    error: float
    khat: float
    mean: Tensor
    sd: Tensor


def log_likelihood(y: Tensor, spread: Tensor, difficulty: Tensor) -> Tensor:
    """Return the log-likelihood of answers, abilities integrated out, ``(n,)``.

    Args:
        y: The answers, ``(persons, items)``.
        spread: ``(n,)``.
        difficulty: ``(n, items)``.
    """
    of_scores = _of_scores(spread, difficulty).logsumexp(-1)
    scores = y.sum(-1).long()
    return of_scores[:, scores].sum(-1) - difficulty @ y.sum(-2).to(difficulty)


def _of_scores(spread: Tensor, difficulty: Tensor) -> Tensor:
    """Return logarithms of ability's prior mass times its likelihood, ``(n, scores, grid)``."""
    a = spread.unsqueeze(-1) * GRID
    base = torch.log_softmax(-0.5 * GRID.square(), 0)
    none = base - softplus(a.unsqueeze(-2) - difficulty.unsqueeze(-1)).sum(-2)
    scores = torch.arange(difficulty.shape[-1] + 1, dtype=a.dtype)
    return none.unsqueeze(-2) + scores.unsqueeze(-1) * a.unsqueeze(-2)


def _split(at: Tensor) -> tuple[Tensor, Tensor]:
    """Return spreads and difficulties at places where both priors are standard normal, ``(n, 1 + items)``."""
    half = 0.5 + 0.5 * torch.special.ndtr(at[:, 0])
    return SPREAD * torch.special.ndtri(half.clamp(max=1.0 - 1e-16)), DIFFICULTY * at[:, 1:]


def _log_joint(y: Tensor, at: Tensor) -> Tensor:
    """Return the logarithm of the joint density of places, ``(n, 1 + items)``, and answers."""
    prior = -0.5 * (at.square() + math.log(2 * math.pi)).sum(-1)
    return prior + log_likelihood(y, *_split(at))


def _mode(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mode and a root of the covariance there."""
    at = torch.zeros(1, 1 + y.shape[-1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([at], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -_log_joint(y, at).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = at.detach()
    hessian = torch.autograd.functional.hessian(lambda z: -_log_joint(y, z).sum(), found)
    values, vectors = torch.linalg.eigh(hessian.reshape(found.shape[-1], -1))
    return found[0], vectors * values.clamp(min=0.05).rsqrt()


def posterior(y: Tensor) -> Posterior:
    """Return what is known of a data set; draws are made anew from the random state.

    Args:
        y: The answers, ``(persons, items)``.
    """
    y = y.to(torch.float64)
    loc, root = _mode(y)
    for number in ROUNDS:
        scale_tril = torch.linalg.cholesky(root @ root.mT)
        proposal = MultivariateStudentT(torch.tensor(DEGREES).to(loc), loc, scale_tril)
        at = proposal.sample((number,))
        log_weights = _log_joint(y, at) - proposal.log_prob(at)
        smooth, khat = smoothed_log_weights(log_weights)
        weights = smooth.softmax(0)
        loc = weights @ at
        centred = at - loc
        root = torch.linalg.cholesky((centred * weights.unsqueeze(-1)).mT @ centred)
    relative = (log_weights - log_weights.max()).exp()
    spread, difficulty = _split(at)
    of_scores = _of_scores(spread, difficulty).softmax(-1)
    grid = spread.unsqueeze(-1) * GRID
    means = (of_scores * grid.unsqueeze(-2)).sum(-1)
    squares = (of_scores * grid.square().unsqueeze(-2)).sum(-1)
    scores = y.sum(-1).long()
    first = torch.cat([spread.unsqueeze(-1), means[:, scores], difficulty], -1)
    second = torch.cat([spread.square().unsqueeze(-1), squares[:, scores], difficulty.square()], -1)
    mean = weights @ first
    return Posterior(
        float(log_weights.logsumexp(0)) - math.log(len(at)),
        float(relative.std() / relative.mean() / len(at) ** 0.5),
        float(khat),
        mean,
        (weights @ second - mean.square()).sqrt(),
    )
