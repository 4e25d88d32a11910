"""Sums over discrete sites that data of another plate look up.

Pyro's enumeration gives all elements of a plate the same value and adds up over these: right where all that depends on
an element is in its plate, wrong where data look elements up by an index (the class of an item, in a flat table of
labels). Each datum depends on one element, though. So the model is run once for each class, with all elements in this
class: the term of a datum is then the one that it has whenever its own element is in this class. The terms of an
element's data are added up, and the classes are summed out element by element.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.infer.particles import is_one
from pyro_graphflows.inspect import TracedModel, nested_by_index
from pyro_graphflows.inspect.runs import run_model
from pyro_graphflows.regression import in_float64

__all__ = ["ClassSums", "find_class_sums"]

MOST_CLASSES = 32  # each takes a run of the model in each evaluation
SAME = 1e-4  # relative, of log-densities


@dataclass(frozen=True)
class ClassSums:
    """How to sum over discrete sites of one plate.

    Attributes:
        classes: For each discrete site its values in the classes, or pairs of classes and so on: ``(classes, *event)``.
        shapes: The batch shapes of the sites.
        dim: The dimension of the plate.
        looked_up: For each site that has terms of the elements its own dimension and the elements that it looks up,
            -1 for none; None for those in the plate.
    """

    classes: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    dim: int
    looked_up: Mapping[str, tuple[int, Tensor] | None]

    @property
    def number(self) -> int:
        """The number of classes."""
        return len(next(iter(self.classes.values())))

    @property
    def size(self) -> int:
        """The number of elements."""
        return next(iter(self.shapes.values())).numel()

    def at(self, model: Callable[..., Any], number: int) -> Callable[..., Any]:
        """Return a model in which all elements are in one class."""
        return self._with(model, torch.full((self.size,), number))

    def _with(self, model: Callable[..., Any], chosen: Tensor) -> Callable[..., Any]:
        data = {name: self.values(name, chosen) for name in self.classes}
        conditioned: Callable[..., Any] = poutine.condition(model, data=data)
        return conditioned

    def values(self, name: str, chosen: Tensor) -> Tensor:
        """Return the values of a site where elements are in some classes, ``(*draws, size)``."""
        return self.classes[name][chosen.reshape(*chosen.shape[:-1], *self.shapes[name])]

    def terms(self, trace: Trace, *, draws: bool = False) -> tuple[Tensor, Tensor]:
        """Return the terms of the elements in a run of the model, and the sum of those of data that look up none.

        Args:
            trace: A trace of :meth:`at`.
            draws: Whether the outermost dimension is that of draws.

        Returns:
            Shapes ``(*draws, size)`` and ``draws``.
        """
        nodes: Any = trace.nodes
        terms, rest = [], [torch.zeros((), dtype=torch.float64)]
        for name, where in self.looked_up.items():
            node = nodes[name]
            if not is_one(node["scale"]):
                raise UnsupportedModelError(f"{name} has a scale beside a site that is summed over.")
            own = in_float64(node["fn"].log_prob(node["value"]))
            if name not in self.classes:  # masked or not, probabilities of classes add up to one
                own = scale_and_mask(own, mask=node["mask"])
            dim, elements = (self.dim, None) if where is None else where
            own = own.movedim(dim, -1)
            own = own.reshape(*own.shape[: int(draws)], -1, own.shape[-1]).sum(-2).cpu()
            if elements is not None:
                known = elements >= 0
                rest.append(own[..., ~known].sum(-1))
                none = own.new_zeros(*own.shape[:-1], self.size)
                own = none.index_add(-1, elements[known], own[..., known])
            terms.append(own)
        return sum(terms[1:], terms[0]), sum(rest[1:], rest[0])

    def draw(self, terms: Tensor) -> dict[str, Tensor]:
        """Return draws of the sites given the terms of all classes, ``(*draws, classes, size)``."""
        chosen = torch.distributions.Categorical(logits=terms.movedim(-2, -1)).sample()
        return {name: self.values(name, chosen) for name in self.classes}

    def require_right(self, rerun: Callable[[Callable[..., Any]], Trace], model: Callable[..., Any]) -> None:
        """Raise if elements in different classes have other terms than each has where all are in its class.

        Args:
            rerun: Runs a model at the same values of all other sites.
            model: The model.
        """
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(self.number, (self.size,), generator=generator)
        expected = torch.stack([self.terms(rerun(self.at(model, i)))[0] for i in range(self.number)])
        expected = expected.gather(0, chosen.unsqueeze(0))[0]
        found = self.terms(rerun(self._with(model, chosen)))[0]
        if not torch.allclose(found, expected, SAME, SAME):
            raise UnsupportedModelError(f"data depend on several elements of {', '.join(self.classes)}.")


@torch.no_grad()
def find_class_sums(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    traced: TracedModel,
    discrete: Sequence[str],
) -> ClassSums:
    """Return how to sum over discrete sites.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        traced: The model as traced with them.
        discrete: The discrete sites.

    Raises:
        UnsupportedModelError: If they are not in one plate, have many classes, other latent sites depend on them, or
            data depend on several of their elements.
    """
    graph, nodes = traced.graph, dict[str, Any](traced.trace.nodes)
    outside = next(child for name in discrete for child in graph.outside_of_plates(name))
    refusal = UnsupportedModelError(f"{outside} depends on several elements of {', '.join(discrete)}.")
    dims = {
        frame.name: frame.dim
        for node in nodes.values()
        if node["type"] == "sample"
        for frame in node["cond_indep_stack"]
        if frame.vectorized
    }
    around = {plate for name in discrete for plate in graph.plates[name]}
    shapes = {name: torch.Size(nodes[name]["fn"].batch_shape) for name in discrete}
    plate = around.pop()
    sizes = {shape.numel() for shape in shapes.values()}
    if around or any(not graph.plates[name] for name in discrete) or len(sizes) > 1 or plate not in dims:
        raise refusal
    below = dict.fromkeys(child for name in discrete for child in graph.children(name))
    latent = [name for name in below if name in graph.latent and name not in discrete]
    if latent:
        raise UnsupportedModelError(
            f"{latent[0]} depends on {', '.join(discrete)}, which it is not summed over with."
        )
    nested = nested_by_index(model, args, kwargs, traced=traced)
    looked_up: dict[str, tuple[int, Tensor] | None] = {}
    for name in (*discrete, *below):
        if plate in graph.plates[name]:
            looked_up[str(name)] = None
            continue
        inner = [p for p in graph.plates[name] if plate in nested.get(p, {}) and p in dims]
        if len(inner) != 1:
            raise refusal
        looked_up[str(name)] = dims[inner[0]], nested[inner[0]][plate]
    supports = {}
    for name in discrete:
        own = nodes[name]["fn"]
        each = own.enumerate_support(expand=False)
        supports[name] = each.reshape(len(each), *own.event_shape)
    if math.prod(map(len, supports.values())) > MOST_CLASSES:
        raise UnsupportedModelError(f"{', '.join(discrete)} has many classes.")
    joint = torch.cartesian_prod(*(torch.arange(len(each)) for each in supports.values()))
    places = joint.reshape(-1, len(supports)).unbind(-1)
    classes = {name: each[place] for (name, each), place in zip(supports.items(), places, strict=True)}
    sums = ClassSums(classes, shapes, dims[plate], looked_up)
    known = {name: nodes[name]["value"] for name in graph.latent if name not in discrete}

    def rerun(model: Callable[..., Any]) -> Trace:
        return run_model(poutine.condition(model, data=known), args, kwargs)

    sums.require_right(rerun, model)
    return sums
