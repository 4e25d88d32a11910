"""States that know which nodes their parameters belong to.

Parameters are rows and columns of matrices. The same graph with its nodes in another order, or another graph with as
many arcs, has parameters of the same names and shapes that mean something else: a state would load, and every result be
wrong. So the metadata of a state, beside the version that torch keeps there, say what is where.
"""

import itertools
from typing import Any

from torch import nn

__all__ = ["WithLayout"]


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
        layout = local_metadata.get("layout", {})  # states without one are taken as they are
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
