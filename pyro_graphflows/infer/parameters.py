"""The parameters of a model and a guide, however they are written, and their state as one dictionary.

Pyro keeps parameters in three places: :func:`pyro.param` statements live in the global parameter store,
:class:`~pyro.nn.PyroModule` s register theirs there too (unless ``module_local_params`` is set), and a plain
:class:`torch.nn.Module` that is called without ``pyro.module`` is known to nobody but itself. A
:class:`ParameterSet` finds all of them: the parameters of the modules that the programs are (or whose bound
methods they are), and whatever a run announces by a ``param`` statement and uses. Each tensor is counted once, by
identity.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.particles import Program, modules_of

__all__ = ["ParameterSet"]


class ParameterSet:
    """Unconstrained parameters and buffers by name; grows when a run announces new ones.

    Args:
        **programs: The model, the guide and the like, by the name that prefixes what belongs to them.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> sorted(ParameterSet(guide=layer).parameters)
        ['guide.bias', 'guide.weight']
    """

    def __init__(self, **programs: Program) -> None:
        self.parameters: dict[str, Tensor] = {}
        self._store_names: dict[int, str] = {}
        self._modules: dict[str, torch.nn.Module] = {}
        for prefix, program in programs.items():
            for module in modules_of(program):
                if all(module is not other for other in self._modules.values()):
                    self._modules[prefix] = module
        self.refresh()

    @property
    def call_counts(self) -> dict[str, dict[str, int]]:
        """What the programs count of their calls, where that decides how they compute (``call_counts`` of a guide)."""
        return {name: module.call_counts for name, module in self._counting().items()}

    @call_counts.setter
    def call_counts(self, counts: dict[str, dict[str, int]]) -> None:
        for name, module in self._counting().items():
            if name in counts:
                module.call_counts = counts[name]

    def _counting(self) -> dict[str, Any]:
        return {
            f"{prefix}.{name}": module
            for prefix, whole in self._modules.items()
            for name, module in whole.named_modules()
            if hasattr(type(module), "call_counts")
        }

    def refresh(self) -> None:
        """Read the modules' parameters again: a first run may have replaced them by those of the store."""
        self.parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in self._modules.items()
            for name, parameter in module.named_parameters()
        }
        self._known = {id(parameter) for parameter in self.parameters.values()}

    def adopt(self, trace: poutine.Trace) -> list[str]:
        """Add the parameters that a trace of ``param`` statements announces and that have a gradient.

        A parameter without one is not used: Pyro announces, for example, what a store still holds of an earlier module
        of the same name.

        Args:
            trace: A trace made by ``poutine.trace(param_only=True)``, after going backward.

        Returns:
            The names of the new ones.
        """
        new = []
        for name, parameter in _announced(trace):
            self._store_names.setdefault(id(parameter), name)
            if id(parameter) not in self._known and parameter.grad is not None:
                self._known.add(id(parameter))
                self.parameters[f"param.{name}"] = parameter
                new.append(f"param.{name}")
        return new

    def forget_gradients(self, trace: poutine.Trace | None = None) -> None:
        """Forget the gradients of all parameters, and of those that a trace announces."""
        for parameter in self.parameters.values():
            parameter.grad = None
        for _, parameter in () if trace is None else _announced(trace):
            parameter.grad = None

    def store_name(self, name: str) -> str:
        """Return the name that Pyro knows a parameter by, which options per parameter refer to."""
        return self._store_names.get(id(self.parameters[name]), name.split(".", 1)[1]).replace("$$$", ".")

    def in_store(self) -> dict[str, Tensor]:
        """Return the trainable parameters that ``param`` statements announced, by the names that they had there."""
        names, trainable = self._store_names, self.trainable.values()
        return {names[id(parameter)]: parameter for parameter in trainable if id(parameter) in names}

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The parameters that require gradients."""
        return {name: tensor for name, tensor in self.parameters.items() if tensor.requires_grad}

    @property
    def modes(self) -> tuple[bool, ...]:
        """For each module, whether it is in training mode."""
        return tuple(module.training for module in self._modules.values())

    # -------------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, Tensor]:
        """Return copies of all parameters and buffers by name."""
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Write a state into the live tensors, which keep their identity; buffers that have it are left alone.

        Raises:
            GraphflowsError: If names or shapes differ.
        """
        tensors = self._tensors()
        differing = sorted(set(tensors) ^ set(state)) or [
            name for name, tensor in tensors.items() if tensor.shape != state[name].shape
        ]
        if differing:
            raise GraphflowsError(
                f"The stored parameters are not those of this model and guide; {differing[:5]} differ in name or shape."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                # what follows from a buffer, as captured calls do, is found again after each write to it
                if name in self.parameters or not torch.equal(tensor, state[name].to(tensor)):
                    tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        buffers = {
            f"{prefix}.{name}": buffer
            for prefix, module in self._modules.items()
            for name, buffer in module.named_buffers()
        }
        return {**self.parameters, **buffers}


def _announced(trace: poutine.Trace) -> Iterator[tuple[str, Tensor]]:
    """Yield the unconstrained parameters of a trace that are leaves of the graph."""
    for name, site in trace.nodes.items():
        if site["type"] == "param":
            value: Any = site["value"]
            # module-local parameters of Pyro are plain nn.Parameters: they are their own unconstrained value
            parameter = value.unconstrained() if hasattr(value, "unconstrained") else value
            if parameter is not None and parameter.is_leaf:
                yield name, parameter
