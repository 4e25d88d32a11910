"""The start of networks beyond a regression: where joint samples of the model are likeliest.

A regression is linear in the data, and its scale is one number. Where a site is in logarithms and its data are not,
location and scale of its conditional are curves. So all weights of a block's network go on from the regression, in
which the hidden layers have no say, to where joint samples are likelier. Other joint samples decide: if these are not
likelier by more than chance, as in linear-Gaussian models, the regression stays as it is.

What falls is the mean of ``-log q``, with a ridge on moves of weights in natural units, so that they stay of the size
that optimisers expect. Of the samples, those whose inputs are farthest out are always among the ones fitted, the others
count for more: networks go on somehow beyond what they have seen, and a scale that does so exponentially may lose
thousands of nats there. Splines keep their shape: nearly all that bends is location and scale, and shapes that vary are
slow to find. Inputs are whitened before, and not again, since hidden units then mean something. Afterwards an output
moves in a step of training by no more than what shows in the likelihood of a row.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_graphflows.distributions.spline import SplineDistribution
from pyro_graphflows.guides.captured_density import recorded_gradients
from pyro_graphflows.guides.conditionals.masked import MaskedConditionals
from pyro_graphflows.guides.minimize import lbfgs_by
from pyro_graphflows.nn.mlp import LevelEvaluation
from pyro_graphflows.regression import HELD_OUT, TINY, in_float64

__all__ = ["Rows", "bend_"]

MOST_ROWS, MOST_TESTED = 3000, 1000  # by which weights are found, and judged
MOST_PRODUCTS = 5_000_000  # of rows and weights
LEAST_ROWS = 1000
SHARE_OF_FAR, LEAST_VARIANCE = 0.2, 1e-8  # of the fitted rows, and of the most that inputs vary
LEAST_GAIN = 0.002  # nats of a row, beside twice the standard error, by which other rows must be likelier
STEPS = (15, 105)  # after each other rows are looked at; the first show whether there is any gain
MOST_COUNTED = 3.0  # nats of a row's gain that count then
RIDGE = 1.0  # half of it times the square of a weight's move, in nats of all rows together

Rows = Callable[[Tensor, LevelEvaluation | None], Iterator[tuple[str, Any, Tensor]]]


@torch.no_grad()
def bend_(conditionals: MaskedConditionals, rows: Rows, inputs: Tensor, moments: Tensor) -> bool:
    """Let all weights of a block be those under which joint samples are likeliest; return whether that is better.

    Args:
        conditionals: The conditionals, at a regression.
        rows: Yields sites, conditionals and values at the chosen ones of the samples, by a new evaluation of the
            network or by a given one.
        inputs: All inputs of the network in the samples, ``(n, inputs)``.
        moments: Their second moments, by which they are whitened if the result is kept.
    """
    parameters = dict(conditionals.named_parameters())
    sizes = [value.numel() for value in parameters.values()]
    most = min(MOST_ROWS, MOST_PRODUCTS // max(sum(sizes), 1))
    if min(most, len(inputs)) < LEAST_ROWS:
        return False
    before = {name: value.clone() for name, value in conditionals.state_dict().items()}
    conditionals.whiten_(moments)
    held_out = torch.arange(len(inputs)) % HELD_OUT == 0
    fitted, counts = _some((~held_out).nonzero()[:, 0], inputs, moments, most)
    other = held_out.nonzero()[:MOST_TESTED, 0]
    losses = _Losses(conditionals, rows)
    start = torch.cat([value.flatten() for value in parameters.values()])

    def weights(point: Tensor) -> dict[str, Tensor]:
        parts = zip(parameters.items(), point.split(sizes), strict=True)
        return {f"conditionals.{name}": part.view_as(value) for (name, value), part in parts}

    def objective(point: Tensor) -> Tensor:
        loss = functional_call(losses, weights(point), (fitted,)) @ counts.to(point)
        return loss + RIDGE / (2 * len(fitted)) * (point - start).square().sum()

    def of_others(point: Tensor) -> Tensor:
        found: Tensor = functional_call(losses, weights(point), (other,))
        return found

    straight, point, most_gained, best = of_others(start), start, 0.0, start
    gradients = recorded_gradients(objective, start)  # takes as long as 30 evaluations, of 126 or so
    for number, steps in enumerate(STEPS):
        point = lbfgs_by(gradients, point, steps=steps).detach()
        gain = straight - of_others(point)
        if number == 0 and not _is_likely(gain.clamp(-MOST_COUNTED, MOST_COUNTED)):
            break
        if _is_likely(gain) and float(gain.mean()) > most_gained:
            most_gained, best = float(gain.mean()), point
    if best is start:
        conditionals.load_state_dict(before)
        return False
    for value, part in zip(parameters.values(), best.split(sizes), strict=True):
        value.copy_(part.view_as(value))
    _narrow_units_(conditionals, losses, fitted)
    return True


def _some(rows: Tensor, inputs: Tensor, moments: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return some rows, those whose inputs are farthest out among them, and what share of all each stands for.

    Far is what is so in units of how much inputs vary in that direction.
    """
    values, vectors = torch.linalg.eigh(in_float64(moments))
    kept = values > LEAST_VARIANCE * values[-1:].clamp(min=TINY)
    white = in_float64(inputs[rows]) @ vectors[:, kept] * values[kept].rsqrt()
    order = white.square().sum(-1).argsort(descending=True)
    far, near = order.tensor_split([int(SHARE_OF_FAR * most)])
    some = near.sort().values[: most - len(far)]
    counts = torch.ones(len(far) + len(some), dtype=white.dtype)
    counts[len(far) :] = len(near) / max(len(some), 1)
    return rows[torch.cat([far, some])], counts / len(rows)


def _is_likely(gain: Tensor) -> bool:
    """Whether rows gain on average, by more than chance."""
    return float(gain.mean()) > LEAST_GAIN + 2.0 * float(gain.std()) / len(gain) ** 0.5


class _Losses(nn.Module):
    """What rows lose, as a module: its parameters can be given from outside."""

    def __init__(self, conditionals: MaskedConditionals, rows: Rows) -> None:
        super().__init__()
        self.conditionals, self.rows = conditionals, rows

    def forward(self, chosen: Tensor, network: LevelEvaluation | None = None) -> Tensor:
        """Return ``-log q`` of the chosen rows, up to a constant."""
        each = [_log_prob(conditional, value) for _, conditional, value in self.rows(chosen, network)]
        return -torch.stack(each).sum(0)


def _log_prob(conditional: Any, value: Tensor) -> Tensor:
    """Return a log-density, of splines that of the normal that they are without a shape."""
    if isinstance(conditional, SplineDistribution) and conditional.base == "normal":
        loc, scale = conditional.loc, conditional.scale
        return -(((value - loc) / scale).square() / 2 + scale.log() + math.log(2 * math.pi) / 2).sum(-1)
    log_prob: Tensor = conditional.log_prob(value)
    return log_prob


class _WithGradients(LevelEvaluation):
    """An evaluation whose outputs keep their gradients."""

    def __init__(self, conditionals: MaskedConditionals) -> None:
        super().__init__(conditionals.network)
        self.outputs: list[Tensor] = []

    def flat_step(self, x_new: Tensor | None = None) -> Tensor:
        """See :meth:`LevelEvaluation.flat_step`."""
        outputs = super().flat_step(x_new)
        outputs.retain_grad()
        self.outputs.append(outputs)
        return outputs


def _narrow_units_(conditionals: MaskedConditionals, losses: _Losses, chosen: Tensor) -> None:
    """Let one step of training move no output by more than what changes the likelihood of a row by about a nat."""
    network = conditionals.network
    assert network.units is not None
    with torch.enable_grad():
        evaluation = _WithGradients(conditionals)
        losses(chosen, evaluation).sum().backward()
    conditionals.zero_grad()
    units = network.units.unit.clone()
    for outputs, of_level in zip(evaluation.outputs, network.outputs_by_level, strict=True):
        if outputs.grad is not None and len(of_level):
            steps = outputs.grad.square().mean(0).clamp(min=TINY).rsqrt()
            units[list(of_level)] = torch.minimum(units[list(of_level)], steps.to(units))
    network.change_units_(units)
