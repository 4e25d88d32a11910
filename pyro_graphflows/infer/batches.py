"""The data of a training run, and their batches in an order that can be stored and continued."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from pyro_graphflows.errors import GraphflowsError

__all__ = ["Batch", "Batches", "TrainingData"]

_KINDS = "a tensor, an array, a tuple or dict of them, a Dataset, a DataLoader or None"
_BATCH_SIZE = 100


@dataclass(frozen=True, eq=False, repr=False)
class TrainingData:
    """The data that :func:`~pyro_graphflows.infer.fit` trains on, and how they are divided into batches.

    ``fit`` takes the data themselves where nothing else needs to be said.

    Args:
        data: A tensor; a tuple or list of tensors (positional arguments of the model and the guide) or a dict of
            tensors (keyword arguments), all with the data along the first dimension; a map-style
            :class:`~torch.utils.data.Dataset`; or batches of such tensors that can be walked through repeatedly, as
            a :class:`~torch.utils.data.DataLoader` or a list of tuples. NumPy arrays are taken as tensors, floating
            ones in torch's default dtype. ``None`` under inference compilation, which draws its own data, or for a
            model that holds its data.
        batch_size: The number of data per step; a ``DataLoader`` has its own. By default 100, or all where the model
            has global latent sites and takes a batch as all data there are: each batch would count their prior.
        validation: Data like ``data``, never trained on. Without data, the number of calls in an evaluation under
            inference compilation.
        full_size: What a batch's loss is divided by, if not its number of data: the size of the plate for a model that
            scales a subsampled plate to all its data.
        kwargs: Keyword arguments of the model and the guide in every call, the same for all batches.

    Raises:
        GraphflowsError: If the data are of another kind, their lengths differ or are zero, validation data are other
            arguments, a number is not positive, or an argument would have no effect. The message says what to give
            instead.

    Example:
        >>> held_out = (torch.zeros(20), torch.zeros(20, 2))
        >>> TrainingData((torch.zeros(230), torch.zeros(230, 2)), batch_size=50, validation=held_out)
        TrainingData(2 tensors with 230 data, batch_size=50, validation=2 tensors with 20 data)
    """

    data: Any = None
    batch_size: int | None = field(default=None, kw_only=True)
    validation: Any = field(default=None, kw_only=True)
    full_size: int | None = field(default=None, kw_only=True)
    kwargs: Mapping[str, Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("batch_size", "full_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise GraphflowsError(f"Expected a positive {name}; got {value!r}.")
        if isinstance(self.validation, int) and (self.data is not None or self.validation < 1):
            raise GraphflowsError(
                f"Expected validation data of the kind of data; got {self.validation!r}. A positive number of calls is "
                "meant for training without data, by inference compilation."
            )
        object.__setattr__(self, "data", _as_data(self.data, "data"))
        if not isinstance(self.validation, int):
            object.__setattr__(self, "validation", _as_data(self.validation, "validation"))
            there, held_out = _arguments_of(self.data), _arguments_of(self.validation)
            if type(there) is type(held_out) and there != held_out:
                raise GraphflowsError(
                    f"Expected validation data of the arguments that the data have, {there}; got {held_out}. What is "
                    "left out would be drawn from the model. Give data of another kind as batches, in a DataLoader."
                )
        if self.batch_size is not None and not any(map(_is_batched_here, (self.data, self.validation))):
            raise GraphflowsError(
                f"Expected no batch_size with {_described(self.data)}, whose batches are its own; got "
                f"{self.batch_size}. Under inference compilation give the number of joint samples as "
                "loss=InferenceCompilation(model, guide, batch_size=...)."
            )
        object.__setattr__(self, "kwargs", dict(self.kwargs or {}))

    @classmethod
    def of(cls, data: Any) -> "TrainingData":
        """Return ``data`` as an object of this class, unless it is one."""
        return data if isinstance(data, cls) else cls(data)

    def __repr__(self) -> str:
        parts = [_described(self.data)]
        if any(map(_is_batched_here, (self.data, self.validation))):
            parts.append(f"batch_size={self.batch_size or _BATCH_SIZE}")
        if self.validation is not None:
            parts.append(f"validation={_described(self.validation)}")
        if self.full_size is not None:
            parts.append(f"full_size={self.full_size}")
        if self.kwargs:
            parts.append(f"kwargs of {', '.join(self.kwargs)}")
        return f"TrainingData({', '.join(parts)})"

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with all data at once; none where these are not at hand."""
        data, kwargs = self.data, dict(self.kwargs or {})
        if data is not None and not _is_tensors(data):
            return (), {}
        if isinstance(data, dict):
            return (), {**data, **kwargs}
        return () if data is None else (data,) if isinstance(data, Tensor) else tuple(data), kwargs

    @property
    def divides_by_default(self) -> bool:
        """Whether the data are divided into batches here, and of a size that nobody has asked for."""
        return self.batch_size is None and _is_batched_here(self.data)

    def batches(self, seed: int | None) -> "Batches":
        """Return the batches to train on, in a new random order for each epoch."""
        return Batches(self.data, self.batch_size or _BATCH_SIZE, shuffle=True, seed=seed)

    def held_out(self) -> "Batches | None":
        """Return the batches of the validation data, always in the same order."""
        if self.validation is None:
            return None
        return Batches(self.validation, self.batch_size or _BATCH_SIZE)


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
    """The batches of one pass through the data, again and again.

    Args:
        data: As in :class:`TrainingData`; a number is that many calls without data, ``None`` is one.
        batch_size: The number of data per batch; the last batch of a pass has what is left.
        shuffle: Whether each pass takes the data in a new random order. Batches that are given have their own order.
        seed: The seed of that order.

    Raises:
        GraphflowsError: As in :class:`TrainingData`.
    """

    def __init__(self, data: Any, batch_size: int, *, shuffle: bool = False, seed: int | None = 0) -> None:
        self._keys: list[str] | None = None
        self._tensors: list[Tensor] | None = None
        self._dataset: Dataset[Any] | None = None
        self._loader: Iterable[Any] | None = None
        self._calls = data if isinstance(data, int) else 1
        self._shuffle = shuffle
        self._generator = torch.Generator()
        self._generator.manual_seed(torch.initial_seed() if seed is None else seed)
        self.batch_size = batch_size
        self.num_data: int | None = None
        if data is None or isinstance(data, int):
            return
        data = _as_data(data, "data")
        if _is_tensors(data):
            if isinstance(data, dict):
                self._keys, data = list(data), list(data.values())
            self._tensors = [data] if isinstance(data, Tensor) else list(data)
            self.num_data = len(self._tensors[0])
        elif isinstance(data, Dataset):
            self._dataset = data
            self.num_data = _length(data)
        else:
            self._loader = data
            dataset = getattr(data, "dataset", None)
            self.num_data = len(dataset) if isinstance(dataset, Sized) else None

    def __len__(self) -> int:
        """Return the number of batches of a pass; 0 where it is not known."""
        if self._loader is not None:
            return len(self._loader) if isinstance(self._loader, Sized) else 0
        return self._calls if self.num_data is None else -(-self.num_data // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._tensors is not None and self.batch_size >= len(self._tensors[0]):
            yield self._batch(self._tensors)  # one batch: its order does not matter
        elif self._tensors is not None:
            for index in self._order():
                yield self._batch([tensor[index.to(tensor.device)] for tensor in self._tensors])
        elif self._dataset is not None:
            for index in self._order():
                yield self._collated(default_collate(_items(self._dataset, index.tolist())))
        elif self._loader is not None:
            for item in self._loader:
                yield self._collated(item)
        else:
            for _ in range(self._calls):
                yield Batch((), {}, 1)

    @property
    def is_shuffled(self) -> bool:
        """Whether each pass takes the data in a new random order, so that the first batches are as good as any."""
        return self._shuffle and self._loader is None

    def first(self) -> Batch:
        """Return the first batch without moving on in the order of this object or of its loader."""
        state, loader_state = self._generator.get_state(), self._loader_state()
        batch = next(iter(self), None)
        if batch is None:
            raise GraphflowsError("Expected at least one batch of data; the iterable has none.")
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

    def _order(self) -> Iterator[Tensor]:
        assert self.num_data is not None
        order = torch.randperm(self.num_data, generator=self._generator) if self._shuffle else None
        yield from (torch.arange(self.num_data) if order is None else order).split(self.batch_size)

    def _loader_state(self) -> Tensor | None:
        if isinstance(self._loader, DataLoader) and self._loader.generator is not None:
            return self._loader.generator.get_state()
        return None

    def _collated(self, item: Any) -> Batch:
        if isinstance(item, Mapping):
            return self._batch(list(item.values()), list(item))
        return self._batch(list(item) if isinstance(item, Sequence) else [item])

    def _batch(self, values: list[Any], keys: list[str] | None = None) -> Batch:
        keys = self._keys if keys is None else keys
        values = [_as_tensor(value) if isinstance(value, np.ndarray) else value for value in values]
        tensors = [value for value in values if isinstance(value, Tensor) and value.dim()]
        if not tensors:
            raise GraphflowsError(
                "Expected each batch to hold a tensor whose first dimension counts the data; got "
                f"{', '.join(type(value).__name__ for value in values) or 'nothing'}. Give tensors or arrays: "
                "torch.as_tensor(...)."
            )
        size = len(tensors[0])
        if keys is not None:
            return Batch((), dict(zip(keys, values, strict=True)), size)
        return Batch(tuple(values), {}, size)


# --------------------------------------------------------------------------------------------------- kinds of data
def _as_data(data: Any, what: str) -> Any:
    """Return data as None, a tensor, a tuple or dict of tensors, a Dataset, or an iterable of batches."""
    if data is None:
        return None
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Tensor | np.ndarray):
        return _checked(_as_tensor(data), what)
    if isinstance(data, Mapping):
        return _checked({str(name): _required(value, what, name) for name, value in data.items()}, what)
    if isinstance(data, tuple) or (isinstance(data, list) and any(map(_is_array, data))):
        return _checked(tuple(_required(value, what, place) for place, value in enumerate(data)), what)
    if isinstance(data, list) and data and all(isinstance(batch, tuple | list | Mapping) for batch in data):
        return data
    if isinstance(data, IterableDataset):
        raise GraphflowsError(
            f"Expected {what} to be {_KINDS}; got an IterableDataset, which has no batches. Give a DataLoader of it."
        )
    if isinstance(data, Dataset):
        _length(data)
        return data
    named = isinstance(data, str | bytes) or hasattr(
        data, "columns"
    )  # walking through a data frame gives its names
    if isinstance(data, Iterable) and not isinstance(data, Iterator | list) and not named:
        return data
    hint = "Give its columns as tensors or arrays." if named else "Give tensors or arrays."
    if isinstance(data, Iterator):
        hint = "An iterator runs dry after one epoch: give the iterable itself."
    raise GraphflowsError(f"Expected {what} to be {_KINDS}; got {type(data).__name__}. {hint}")


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _required(value: Any, what: str, place: Any) -> Tensor:
    if not _is_array(value):
        raise GraphflowsError(
            f"Expected {what} to be tensors or arrays with the data along their first dimension; got "
            f"{type(value).__name__} at {place!r}. Arguments that are the same for every batch belong in "
            "TrainingData(..., kwargs={name: value})."
        )
    return _as_tensor(value)


def _as_tensor(value: Any) -> Tensor:
    """Return an array as a tensor, floating numbers in torch's default dtype."""
    if isinstance(value, Tensor):
        return value
    if value.dtype.kind not in "fiub":
        raise GraphflowsError(f"Expected an array of numbers; got one of dtype {value.dtype}.")
    array = np.ascontiguousarray(value)
    if not array.flags.writeable or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    tensor = torch.from_numpy(array).reshape(value.shape)
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _checked(data: Any, what: str) -> Any:
    """Return tensors that agree in their number of data."""
    tensors = [data] if isinstance(data, Tensor) else list(data.values() if isinstance(data, dict) else data)
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise GraphflowsError(
            f"Expected {what} to be tensors with the same positive number of data along their first dimension; got the "
            f"shapes {[tuple(tensor.shape) for tensor in tensors]}. Arguments that are the same for every batch belong "
            "in TrainingData(..., kwargs={name: value})."
        )
    return data


def _is_tensors(data: Any) -> bool:
    return isinstance(data, Tensor | tuple | dict)


def _arguments_of(data: Any) -> int | list[str] | None:
    """Return how many positional arguments data are, or the names of keyword arguments; None where it is not known."""
    if isinstance(data, dict):
        return sorted(data)
    return 1 if isinstance(data, Tensor) else len(data) if isinstance(data, tuple) else None


def _is_batched_here(data: Any) -> bool:
    return _is_tensors(data) or isinstance(data, Dataset)


def _length(data: Dataset[Any]) -> int:
    length = len(data) if isinstance(data, Sized) else 0
    if length < 1:
        raise GraphflowsError(
            f"Expected a Dataset with a positive length; {type(data).__name__} has none. Give a DataLoader of it."
        )
    return length


def _items(dataset: Any, index: list[int]) -> list[Any]:
    if callable(getattr(dataset, "__getitems__", None)):  # Subset and others fetch several at once
        return list(dataset.__getitems__(index))
    return [dataset[place] for place in index]


def _described(data: Any) -> str:
    if data is None:
        return "no data"
    if isinstance(data, int):
        return f"{data} calls"
    if _is_tensors(data):
        values = (
            [data] if isinstance(data, Tensor) else list(data.values() if isinstance(data, dict) else data)
        )
        names = f" ({', '.join(data)})" if isinstance(data, dict) else ""
        plural = "tensor" if len(values) == 1 else "tensors"
        return f"{len(values)} {plural}{names} with {len(values[0])} data"
    if isinstance(data, Dataset):
        return f"a {type(data).__name__} of {_length(data)} data"
    return f"a {type(data).__name__}"
