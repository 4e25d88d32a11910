"""What the value that a distribution drew last came from, so that its density needs no inversion."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LastDraw"]


class LastDraw:
    """The last draw of a distribution; expanded copies share it, as Pyro expands before it draws.

    Example:
        >>> last, value, noise = LastDraw(), torch.ones(2), torch.zeros(2)
        >>> last.keep(value, noise)
        >>> last.behind(value, [])[0] is noise, last.behind(value.clone(), []) is None
        (True, True)
    """

    def __init__(self) -> None:
        self._draws: list[tuple[Tensor, tuple[Tensor, ...], bool]] = []

    def keep(self, value: Tensor, *behind: Tensor) -> None:
        """Note a value that was drawn, and what it came from."""
        self._draws[:] = [(value, behind, torch.is_grad_enabled())]

    def behind(self, value: Tensor, parameters: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
        """Return what a value came from; None for others, or where its derivatives are not those of a draw.

        These are at a fixed value then, one that was drawn without gradients.

        Args:
            value: The value.
            parameters: The parameters of the distribution.
        """
        if not self._draws or self._draws[0][0] is not value:
            return None
        _, behind, followed = self._draws[0]
        learned = any(part is not None and part.requires_grad for part in (value, *parameters))
        return None if learned and torch.is_grad_enabled() and not followed else behind
