"""Whose parameters a name means, in Pyro's parameter store and in saved states.

Both know a parameter by its name alone.

*The store.* :func:`pyro.module` announces a whole module, and the store keeps what it first saw under a name: a second
module of that name would silently train the first. Here each program announces the parts that it uses
(:func:`announce`), and a module whose name is in use gets another one (:func:`free_name`).

*States.* Parameters are rows and columns of matrices. The same graph with its nodes in another order, or another graph
with as many arcs, has parameters of the same names and shapes that mean something else: a state would load, and every
result be wrong. So the metadata of a state, beside the version that torch keeps there, say what is where
(:class:`WithLayout`).
"""

import itertools
from typing import Any

import pyro
from torch import Tensor, nn

__all__ = ["WithLayout", "announce", "free_name"]


def announce(module: nn.Module, prefix: str, name: str) -> None:
    """Make parameters known to Pyro, which trains what it sees.

    Args:
        module: A part of a module.
        prefix: The path of that part.
        name: The name of the whole module in the store.
    """
    for key, parameter in module.named_parameters(prefix):
        if parameter.requires_grad:
            pyro.param(f"{name}$$${key}", parameter)


def free_name(name: str, key: str, parameter: Tensor) -> str:
    """Return a name under which Pyro's store holds no other module: the given one, or with a number after it.

    Args:
        name: The name wanted.
        key: The path of a parameter that the module always has.
        parameter: That parameter, by which the module is known; the store holds it afterwards.
    """
    store, free = pyro.get_param_store(), name
    for number in itertools.count(1):
        if store.setdefault(f"{free}$$${key}", parameter) is parameter:
            break
        free = f"{name}_{number}"
    return free


class WithLayout(nn.Module):
    """A module whose state loads only into a module of the same layout. Base class; first among several."""

    def _layout(self) -> dict[str, list[str]]:
        """Return what the rows and columns of parameters belong to, in words, by what it is."""
        raise NotImplementedError

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state, as of any module; its metadata have the layout."""
        state = super().state_dict(*args, **kwargs)
        state._metadata[kwargs.get("prefix", "")[:-1]]["layout"] = self._layout()
        return state

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        layout = local_metadata.get("layout", {})  # states without one are accepted as they are
        for what, own in self._layout().items():
            given = layout.get(what, own)
            if given != own:
                pairs = itertools.zip_longest(own, given, fillvalue="none")
                mine, other = next(pair for pair in pairs if pair[0] != pair[1])
                args[-1].append(
                    f"Expected a state of a model with the same {what} in the same order; it has {other} for {mine}. "
                    "Make the graph from nodes and edges in the order it was made from."
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
