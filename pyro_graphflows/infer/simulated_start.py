"""Whether, and from what, a guide can learn on simulations before it sees the data.

A guide that reads its data can be trained on joint samples of the model: they are exact draws from the posteriors of
data of all kinds, gradients have little noise, and no mode is missed. What is found there is where training on the
data begins.
Sites that read no data learn nothing but their prior there, and are left alone.
"""

import inspect
import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, reason_of
from pyro_graphflows.infer.batches import Batch
from pyro_graphflows.infer.inference_compilation import InferenceCompilation
from pyro_graphflows.infer.particles import Program, density_sites, errors_of_batches, evaluation_mode
from pyro_graphflows.infer.simulations import JointLayout, joint_layout, run_guide

__all__ = ["simulation_loss"]

_ELEMENTS = 2000  # data in the joint samples of one step, about
_MOST, _FEWEST = 100, 8  # joint samples in one step


def simulation_loss(
    model: Program, guide: Program, batch: Batch, kwargs: dict[str, Any]
) -> InferenceCompilation | str:
    """Return the loss on joint samples of the model for the sites that read data, or why there is none.

    Args:
        model: The model.
        guide: The guide.
        batch: Arguments of one step.
        kwargs: Keyword arguments of all.
    """
    if not _takes_observations(guide):
        return "the guide takes no observations="
    call = {**kwargs, **batch.kwargs}
    try:
        with evaluation_mode(model, guide), torch.no_grad(), poutine.block():
            guide(*batch.args, **call)  # sets up guides that make themselves at the first call
            layout = joint_layout(model, guide, batch.args, call)
            if not layout.observed:
                return "the model has no observed sites"
            size = min(_MOST, max(_FEWEST, _ELEMENTS // _num_data(layout)))
            loss = InferenceCompilation(model, guide, batch_size=size)
            with errors_of_batches(size):
                loss.sites = _sites_that_read(loss, layout.observed, batch.args, call)
    except GraphflowsError as error:
        return reason_of(error)
    return loss if loss.sites else "no site of the guide reads data"


def _num_data(layout: JointLayout) -> int:
    """Return how many data one joint sample has: those of its largest observed site, however the data are given."""
    plates = [
        shape[: len(shape) - layout.event_dims[name]]
        for name, shape in layout.shapes.items()
        if name in layout.observed
    ]
    return max(1, *(math.prod(shape) for shape in plates))


def _takes_observations(guide: Program) -> bool:
    target = guide.forward if isinstance(guide, torch.nn.Module) else guide
    parameters = inspect.signature(target).parameters.values()
    return any(each.name == "observations" or each.kind is each.VAR_KEYWORD for each in parameters)


def _sites_that_read(
    loss: InferenceCompilation, observed: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, ...]:
    """Return the sites whose density, given the values of the others, is computed from the data.

    Data that are real numbers are followed by autograd, which also sees what is multiplied by a weight that still is
    zero; for others it is seen whether the densities are other ones with other data.
    """
    (first,), (second,) = (loss.sample_joint(*args, **kwargs) for _ in range(2))
    values: dict[str, Tensor] = {name: torch.as_tensor(first.nodes[name]["value"]) for name in observed}
    followed = {
        name: value.detach().clone().requires_grad_()
        for name, value in values.items()
        if value.is_floating_point()
    }
    joints = [first.copy(), first.copy()]
    for name in observed:
        joints[0].nodes[name] = {**first.nodes[name], "value": followed.get(name, values[name])}
        joints[1].nodes[name] = {**first.nodes[name], "value": second.nodes[name]["value"]}
    with torch.enable_grad():
        traces = [run_guide(loss.in_plate(loss.guide), joint, observed, args, kwargs) for joint in joints]
        for trace in traces:
            trace.compute_log_prob()
        found = []
        for name, site in density_sites(traces[0]):
            density: Any = site["log_prob"]
            is_read = not torch.equal(density, traces[1].nodes[name]["log_prob"])
            if not is_read and density.requires_grad and followed:
                inputs = list(followed.values())
                slopes = torch.autograd.grad(density.sum(), inputs, allow_unused=True, retain_graph=True)
                is_read = any(each is not None for each in slopes)
            if is_read:
                found.append(name)
    return tuple(found)
