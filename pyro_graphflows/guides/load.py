"""Guides from files."""

import os
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.files import read_guide
from pyro_graphflows.guides.guide import AutoFaithfulGuide

__all__ = ["load_guide"]


def load_guide(
    path: str | os.PathLike[str],
    model: Callable[..., Any],
    *,
    classes: Collection[type] = (),
    device: torch.device | str = "cpu",
    create_plates: Callable[..., Any] | None = None,
) -> AutoFaithfulGuide:
    """Return the guide of a file that :meth:`AutoFaithfulGuide.save` wrote: ready for new data, without other data.

    Loading runs no code: the file has tensors and plain data, and makes objects of the classes of this package alone.
    A family or factor of the user's is named in the file, and taken from ``classes``; it is imported by nobody.
    The model is run when the guide is called, not before.

    Args:
        path: The file.
        model: The model that the guide was made for. Parameters of its own, those of networks, are not in the file.
        classes: The classes of the user's families and factors in the guide, if there are any.
        device: Where the guide shall be, whichever device it was saved from.
        create_plates: As in :func:`~pyro_graphflows.guides.auto_faithful_guide`.

    Returns:
        The guide.

    Raises:
        GraphflowsError: If the file is damaged, holds no guide, or is of another version; if it names a class that
            is not given, or the model stands first.
        UnsupportedModelError: If the model has other parameters. Whether it has the same sites is found at the
            first call.

    Example:
        >>> import tempfile, pyro, torch, pyro.distributions as dist
        >>> from pyro_graphflows.guides import auto_faithful_guide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     auto_faithful_guide(model, torch.zeros(10)).save(f"{folder}/guide.safetensors")
        ...     guide = load_guide(f"{folder}/guide.safetensors", model)
        >>> guide(torch.zeros(7))["z"].shape
        torch.Size([7])
    """
    if callable(path):
        raise GraphflowsError("Expected a file and then its model; got a model first. Exchange the two.")
    contents, state = read_guide(path, model, classes)
    options = {each.name: getattr(contents["options"], each.name) for each in fields(contents["options"])}
    guide = AutoFaithfulGuide(model, create_plates=create_plates, **options)
    try:
        guide._restore(contents, state, device)
    except KeyError as error:
        raise GraphflowsError(
            f"Expected the entries that files of this version have; {path} has none named {error}. It is of another "
            "version. Load it with the version that wrote it, or set a guide up again and train it."
        ) from error
    return guide
