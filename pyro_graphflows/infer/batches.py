"""Batches of data, in an order that can be stored and continued."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_graphflows.errors import GraphflowsError

__all__ = ["Batch", "Batches"]


class Batch(NamedTuple):
    """Arguments of one step.

    Attributes:
        args: Positional arguments of the model and the guide.
        kwargs: Their keyword arguments.
        size: The number of data in the batch.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int


class Batches:
    """The batches of one epoch, again and again.

    Args:
        data: A tensor, a sequence of tensors (positional arguments), a mapping of tensors (keyword
            arguments), all with the data along their first dimension; an iterable of such batches that can be
            walked repeatedly, e.g. a :class:`~torch.utils.data.DataLoader`; or ``None`` (or a number) for
            that many calls without data.
        batch_size: The number of data per batch; the last batch of an epoch has what is left.
        shuffle: Whether each epoch takes tensors in a new random order. Iterables have an order of their own.
        seed: The seed of that order.
        steps: How many calls an epoch without data has.

    Raises:
        GraphflowsError: If the tensors differ in their number of data, or there are none.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int = 100,
        *,
        shuffle: bool = False,
        seed: int | None = 0,
        steps: int = 100,
    ) -> None:
        self._keys: list[str] | None = None
        self._tensors: list[Tensor] | None = None
        self._loader: Iterable[Any] | None = None
        self._steps = data if isinstance(data, int) else steps
        self._shuffle = shuffle
        self._generator = torch.Generator()
        self._generator.manual_seed(torch.initial_seed() if seed is None else seed)
        self.batch_size = batch_size
        self.num_data: int | None = None
        if data is None or isinstance(data, int):
            return
        if isinstance(data, Tensor):
            data = (data,)
        if isinstance(data, Mapping):
            self._keys, data = list(data), list(data.values())
        if isinstance(data, Sequence) and data and all(isinstance(value, Tensor) for value in data):
            self._tensors = list(data)
            sizes = {len(tensor) if tensor.dim() else 0 for tensor in data}
            if len(sizes) != 1 or 0 in sizes:
                raise GraphflowsError(
                    f"Expected tensors with the same positive number of data along their first dimension; got the "
                    f"shapes {[tuple(tensor.shape) for tensor in data]}."
                )
            self.num_data = sizes.pop()
        elif isinstance(data, Iterable) and not isinstance(data, Iterator):
            self._loader = data
            dataset = getattr(data, "dataset", None)
            self.num_data = len(dataset) if isinstance(dataset, Sized) else None
        else:
            raise GraphflowsError(
                f"Expected data to be tensors, a DataLoader or None; got {type(data).__name__}. An iterator runs dry "
                "after one epoch: give the iterable itself."
            )

    def __len__(self) -> int:
        """Return the number of batches per epoch; 0 where it is not known."""
        if self._tensors is not None:
            assert self.num_data is not None
            return -(-self.num_data // self.batch_size)
        if self._loader is not None:
            return len(self._loader) if isinstance(self._loader, Sized) else 0
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        if self._tensors is not None:
            assert self.num_data is not None
            if self.batch_size >= self.num_data:  # one batch: its order does not matter
                yield self._batch(self._tensors)
                return
            order = (
                torch.randperm(self.num_data, generator=self._generator)
                if self._shuffle
                else torch.arange(self.num_data)
            )
            for index in order.split(self.batch_size):
                yield self._batch([tensor[index.to(tensor.device)] for tensor in self._tensors])
        elif self._loader is not None:
            for item in self._loader:
                keys: list[str] | None = None
                values = item
                if isinstance(item, Mapping):
                    keys, values = list(item), list(item.values())
                yield self._batch(list(values) if isinstance(values, Sequence) else [values], keys)
        else:
            for _ in range(self._steps):
                yield Batch((), {}, 1)

    def first(self) -> Batch:
        """Return the first batch without moving on in the order of this object or of its loader."""
        state, loader_state = self._generator.get_state(), self._loader_state()
        batch = next(iter(self))
        self._generator.set_state(state)
        if loader_state is not None:
            self._loader.generator.set_state(loader_state)  # type: ignore[union-attr]
        return batch

    def state(self) -> dict[str, Tensor]:
        """Return the state of the random order."""
        state = {"order": self._generator.get_state()}
        loader_state = self._loader_state()
        return state if loader_state is None else {**state, "loader": loader_state}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state."""
        self._generator.set_state(state["order"])
        if "loader" in state and isinstance(self._loader, DataLoader) and self._loader.generator is not None:
            self._loader.generator.set_state(state["loader"])

    def _loader_state(self) -> Tensor | None:
        if isinstance(self._loader, DataLoader) and self._loader.generator is not None:
            return self._loader.generator.get_state()
        return None

    def _batch(self, values: list[Any], keys: list[str] | None = None) -> Batch:
        keys = self._keys if keys is None else keys
        tensors = [value for value in values if isinstance(value, Tensor) and value.dim()]
        if not tensors:
            raise GraphflowsError(
                "Expected each batch to hold a tensor whose first dimension counts the data."
            )
        size = len(tensors[0])
        if keys is not None:
            return Batch((), dict(zip(keys, values, strict=True)), size)
        return Batch(tuple(values), {}, size)
