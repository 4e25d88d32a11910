r"""Logistic regression, the start of discrete factors.

If the inputs are normal given the class, with one covariance matrix for all classes, or if they are discrete and
conditionally independent given it, then the log-odds are linear in the inputs and logistic regression finds them.
Fitted to samples of the model, it plays for discrete sites the part of the least-squares regression for continuous
ones. A weak normal prior on the slopes keeps them small where classes can be separated or inputs are collinear: large
slopes that cancel each other would make the first steps of training a mess.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["logistic_regression"]

MOST_ROWS = 10_000
PRIOR_SCALE = 1.0  # of a slope, for inputs of unit scale
PSEUDO_COUNT = 0.5  # imagined samples of each class, at the mean of the inputs


def logistic_regression(inputs: Tensor, targets: Tensor, *, max_steps: int = 100) -> tuple[Tensor, Tensor]:
    """Fit the logits of a binary variable or of indicators of classes by maximum penalised likelihood.

    Shape:
        - ``inputs``: ``(n, p)``.
        - ``targets``: ``(n, 1)`` of zeros and ones, or ``(n, C)`` of indicators.
        - Output: slopes ``(C, p)`` and intercepts ``(C,)``, for one column of targets ``(1, p)`` and ``(1,)``.

    Args:
        inputs: Inputs in rows.
        targets: The values.
        max_steps: The number of quasi-Newton steps.

    Returns:
        Slopes and intercepts, in the type of the inputs. Those of indicators are centred over the classes.
    """
    n, c = len(inputs), targets.shape[-1]
    x, y = inputs[:MOST_ROWS].double(), targets[:MOST_ROWS].double()
    share = (y.sum(0) + PSEUDO_COUNT) / (len(y) + max(c, 2) * PSEUDO_COUNT)
    start = share.logit() if c == 1 else share.log()
    if n == 0 or x.shape[-1] == 0:
        return inputs.new_zeros(c, inputs.shape[-1]), _centred(start).to(inputs)
    mean, scale = x.mean(0), x.std(0, correction=0)
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
        logits = F.linear(x, slopes, parameters[:, -1])
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
