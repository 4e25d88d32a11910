"""The parameters of a guide as Pyro sees them: shown at each call, under names that the guide takes for itself."""

import warnings
from collections.abc import Sequence
from typing import Any

import pyro
from pyro.nn.module import PyroModule, _is_module_local_param_enabled
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning

__all__ = ["ShownParameters"]

Place = tuple[str, dict[str, Any], str]

_OF_GUIDES = WeakTensorKeyDictionary()  # all their parameters; an attribute would be in files of the store


class ShownParameters:
    """Shows the parameters of one guide to Pyro, and takes their names in the parameter store.

    Walking through all modules for that at each call would take a sixth of it: where parameters are kept is remembered,
    until :meth:`forget`. Copies and pickles remember nothing.
    """

    def __init__(self) -> None:
        self._places: list[Place] | None = None
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_places": None, "_has_warned": self._has_warned}

    def forget(self) -> None:
        """Forget where parameters are kept: the guide has other blocks."""
        self._places = None

    @staticmethod
    def mark(blocks: nn.Module) -> None:
        """Mark parameters as those of a guide, by which they are told from values that were loaded."""
        for parameter in blocks.parameters():
            _OF_GUIDES[parameter] = True

    def show(self, guide: PyroModule) -> None:
        """Show the parameters by ``param`` statements, as a look-up of a module of a PyroModule does.

        Args:
            guide: The guide, whose modules are under ``blocks``.

        Raises:
            GraphflowsError: If the store has values of other shapes for them.
        """
        fullname = guide._pyro_get_fullname("blocks")
        if self._places is None:
            blocks: Any = guide._modules["blocks"]  # not guide.blocks, which would show all of them to Pyro
            self._places = [
                (f"{prefix}.{key}" if prefix else key, module._parameters, key)
                for prefix, module in blocks.named_modules()
                for key, parameter in module._parameters.items()
                if parameter is not None
            ]
        self._claim_names(fullname, self._places)
        if _is_module_local_param_enabled():
            _ = guide.blocks
            return
        for name, kept, key in self._places:
            parameter = kept[key]
            if parameter.requires_grad and pyro.param(f"{fullname}$$${name}", parameter) is not parameter:
                _ = guide.blocks  # a handler has put something in its place, which the module takes on
                return

    def _claim_names(self, fullname: str, places: Sequence[Place]) -> None:
        """Take this guide's names in the parameter store, from other guides or from a store that was loaded.

        The store would hand the optimiser of this call the parameters of the guide that came first, and none of this
        guide's would ever be trained. Names are those of classes, so two guides in one program suffice. What is in the
        store and belongs to no guide was loaded, or set: these are values for this guide.
        """
        store = pyro.get_param_store()
        if not len(store):
            return
        loaded = []
        for name, kept, key in places:
            full, parameter = f"{fullname}$$${name}", kept[key]
            stored = store._params.get(full)
            if stored is None or stored is parameter:
                continue
            if stored not in _OF_GUIDES:
                if stored.shape != parameter.shape:
                    raise GraphflowsError(
                        f"Expected values of shape {tuple(parameter.shape)} for the parameter {full!r} of this guide; "
                        f"Pyro's parameter store has some of shape {tuple(stored.shape)}, of another guide. Clear the "
                        "store, pyro.clear_param_store(), or set the guide up as that one was."
                    )
                parameter.data.copy_(stored.detach())
                loaded.append(name)
            del store[full]
        if loaded and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{len(loaded)} parameters of the guide took the values that Pyro's parameter store had for them. A "
                "store has parameters alone: the units of inputs and outputs are those of this guide's set-up, so the "
                "values mean the same only if the guide that was stored was set up by the same call. "
                "guide.save(path) and guide.state_dict() hold everything.",
                GraphflowsWarning,
                stacklevel=6,
            )
