"""Files of guides: tensors, and all else as plain data in JSON, which are read without running code.

A file holds what follows from the model and from the data at set-up (the plan, how values are written, where data stand
among the arguments, the forms of the blocks) and the state of the blocks. It holds neither the model nor data: no
observed value, no index, no draw. A guide that is loaded reads its first call as any other, and makes sure that the
model has the sites that it was made for.
"""

import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides.call import PlateState, SiteForm
from pyro_graphflows.guides.compile import GuideOptions
from pyro_graphflows.guides.conditionals.contract import BlockSpec
from pyro_graphflows.guides.conditionals.factors import DiscreteFactor, ElementNormalFactor, NormalFactor
from pyro_graphflows.guides.conditionals.pooling import Attention, DeepSet, PoolMember
from pyro_graphflows.guides.families import FAMILIES
from pyro_graphflows.guides.inputs import Coupling, InputPlan, Summary
from pyro_graphflows.guides.plain import GRAPHS, Reader, Writer
from pyro_graphflows.guides.plan import BlockPlan, Conditioning, Plan, PriorPlan
from pyro_graphflows.guides.sites import DiscreteEncoding, InputEncodings, LatentSite
from pyro_graphflows.inspect.arguments import Attribute, LoopRow, Outside, signature_of
from pyro_graphflows.tensor_files import read_tensors, write_tensors
from pyro_graphflows.transforms.solver import Solver

__all__ = ["FORMAT", "read_guide", "write_guide"]

FORMAT = 3  # another number wherever a file of before cannot be read any more
KIND = "pyro_graphflows guide"
CLASSES = (
    *(Attention, BlockPlan, BlockSpec, Conditioning, Coupling, DeepSet, DiscreteEncoding, DiscreteFactor),
    *(
        *FAMILIES.values(),
        ElementNormalFactor,
        GuideOptions,
        InputEncodings,
        InputPlan,
        LatentSite,
        NormalFactor,
    ),
    *(Plan, PlateState, PoolMember, PriorPlan, SiteForm, Solver, Summary),
    *(Attribute, LoopRow, Outside),
)


def write_guide(
    path: str | os.PathLike[str],
    model: Callable[..., Any],
    contents: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> None:
    """Write a guide to a file, which is whole or as it was before.

    Args:
        path: The file.
        model: The model, of which the names of its parameters are kept.
        contents: What the guide is made from.
        state: Its state.

    Raises:
        GraphflowsError: If something cannot be written as plain data. The message names it.
    """
    writer = Writer()
    plain = writer.write(contents)
    own = {name for name, _ in writer.objects if "." not in name}
    unknown = own - {kind.__name__ for kind in CLASSES} - set(GRAPHS)
    if unknown:  # a class of this package that was added, and not to CLASSES
        raise RuntimeError(
            f"Expected a line in CLASSES for {', '.join(sorted(unknown))}, or no file could be read."
        )
    text = json.dumps(
        {
            "kind": KIND,
            "format": FORMAT,
            "parameters": _parameters(model),
            "objects": writer.objects,
            "contents": plain,
        },
        ensure_ascii=False,
        allow_nan=False,
    )
    tensors = {f"state.{name}": value for name, value in state.items()}
    write_tensors(path, {**tensors, **writer.tensors}, {"guide": text})


def read_guide(
    path: str | os.PathLike[str], model: Callable[..., Any], classes: Iterable[type] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a guide is made from, and its state.

    Args:
        path: The file.
        model: The model, whose parameters must be those of the model that the guide was made for.
        classes: The user's classes that the file may name.

    Raises:
        GraphflowsError: If the file is damaged, no file of a guide, or of another version.
        UnsupportedModelError: If the model has other parameters.
    """
    tensors, texts = read_tensors(path)
    try:
        plain = json.loads(texts["guide"])
        kind, version = plain["kind"], plain["format"]
    except (KeyError, TypeError, ValueError):
        raise GraphflowsError(f"Expected a file of guide.save(path) at {path}; it holds no guide.") from None
    if kind != KIND or version != FORMAT:
        raise GraphflowsError(
            f"Expected a file of format {FORMAT}, which this version of pyro_graphflows reads; {path} is of format "
            f"{version}. Load it with the version that wrote it, or set a guide up again and train it."
        )
    _require_parameters(model, plain["parameters"])
    reader = Reader(plain["objects"], tensors, (*CLASSES, *classes))
    state = {
        name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")
    }
    return reader.read(plain["contents"]), state


def _parameters(model: Callable[..., Any]) -> list[str]:
    return list(signature_of(model).parameters)


def _require_parameters(model: Callable[..., Any], expected: list[str]) -> None:
    parameters = signature_of(model).parameters
    more = [
        name
        for name, parameter in parameters.items()
        if name not in expected
        and parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    if more or [name for name in parameters if name in expected] != expected:
        raise UnsupportedModelError(
            f"Expected the model that the guide was made for, with the parameters ({', '.join(expected)}); got one "
            f"with ({', '.join(parameters)}). Load the guide with its own model."
        )
