"""What a site gets from plates that it is not in: summaries of nodes there, and terms that join its own copies."""

from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["Chaining", "Summary"]


@dataclass(frozen=True)
class Summary:
    """Nodes that come in together over plates.

    Attributes:
        members: The nodes, in graph order.
        over: The plates.
        one_by_one: Whether every element is an input by itself; else they are pooled.
        index: The input that tells which element of the one member each element looks up, in plate ``inner``.
        inner: See ``index``.
        segments: Triples (inner, outer, index): pooling over the inner plate gives one summary for each element of the
            outer one, of those that look it up by the index.
    """

    members: tuple[str, ...]
    over: tuple[str, ...]
    one_by_one: bool = False
    index: str | None = None
    inner: str | None = None
    segments: tuple[tuple[str, str, str], ...] = ()

    def inside(self, plates: Collection[str]) -> frozenset[str]:
        """Return the plates around a node, with those whose elements are looked up from inside them."""
        found = frozenset(plates)
        for _ in self.segments:
            found |= {outer for inner, outer, _ in self.segments if inner in found}
        return found

    @property
    def name(self) -> str:
        """The name of the summary among the inputs of a block.

        Example:
            >>> Summary(("w", "y"), ("data",)).name
            'pooled(w, y; data)'
        """
        if self.index is not None:
            return f"{self.members[0]}[{self.index}]"
        by = {inner: f" by {index}" for inner, _, index in self.segments}
        over = ", ".join(plate + by.get(plate, "") for plate in self.over)
        return f"{'all' if self.one_by_one else 'pooled'}({', '.join(self.members)}; {over})"


@dataclass(frozen=True)
class Chaining:
    """The chain-rule terms of a site.

    Attributes:
        plates: The plates across which its copies are dependent.
        rank: The number of columns of the two low-rank parts; 0 for a parameter for each pair.
    """

    plates: tuple[str, ...]
    rank: int
