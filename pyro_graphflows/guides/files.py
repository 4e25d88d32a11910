"""Files of guides: tensors, and all else as plain data in JSON, which are read without running code.

A file holds what follows from the model and from the data at set-up (the plan, how values are written, where data stand
among the arguments, the forms of the blocks) and the state of the blocks. It holds neither the model nor data: no
observed value, no index, no draw. A guide that is loaded reads its first call as any other, and makes sure that the
model has the sites that it was made for.

What a guide is made of are frozen dataclasses, graphs, constraints and containers of them. Each is written as the name
of its class and the plain form of its fields, once, and read by a table of names: reading makes objects of the classes
in the table and of no others, imports nothing, and calls nothing else than their constructors. Classes of the user's (a
family, a factor) are in the table only where whoever reads hands them in.
"""

import dataclasses
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import EllipsisType
from typing import Any

import networkx as nx
import pyro.distributions.constraints as pyro_constraints
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.guides.call import PlateState, SiteForm
from pyro_graphflows.guides.compile import FAMILIES, GuideOptions
from pyro_graphflows.guides.conditionals.contract import BlockSpec
from pyro_graphflows.guides.conditionals.factors import DiscreteFactor, ElementNormalFactor, NormalFactor
from pyro_graphflows.guides.conditionals.pooling import Attention, DeepSet, PoolMember
from pyro_graphflows.guides.conditionals.summed import ElementForm
from pyro_graphflows.guides.plan import (
    BlockPlan,
    Conditioning,
    Coupling,
    InputPlan,
    Plan,
    PriorPlan,
    Summary,
    SummedSite,
)
from pyro_graphflows.guides.sites import DiscreteEncoding, InputEncodings, LatentSite
from pyro_graphflows.inspect.arguments import Attribute, LoopRow, Outside, signature_of
from pyro_graphflows.tensor_files import read_tensors, write_tensors
from pyro_graphflows.transforms.solver import Solver

__all__ = [
    "FORMAT",
    "GRAPHS",
    "Reader",
    "Writer",
    "class_name",
    "read_guide",
    "write_guide",
]

CONSTRAINTS = {
    name: value
    for module in (pyro_constraints, constraints)
    for name, value in vars(module).items()
    if isinstance(value, constraints.Constraint)
}
CONSTRAINT_CLASSES = {
    kind.__name__: kind
    for module in (pyro_constraints, constraints)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, constraints.Constraint)
}


def class_name(kind: type) -> str:
    """Return the name by which a file knows a class: with its module, and for those of this package without."""
    if kind.__module__.startswith("pyro_graphflows."):
        return kind.__name__
    return f"{kind.__module__}.{kind.__qualname__}"


def _graph_fields(graph: ModelGraph) -> dict[str, Any]:
    names = ("nodes", "edges", "observed", "inputs", "marginalised", "event_sizes", "plates")
    return {name: getattr(graph, name) for name in names}


def _make_graph(
    nodes: Iterable[Any], edges: Iterable[tuple[Any, Any]], observed: Iterable[Any], **fields: Any
) -> ModelGraph:
    dag = nx.DiGraph()
    dag.add_nodes_from(nodes)  # in graph order, which this keeps
    dag.add_edges_from(edges)
    return ModelGraph(dag, observed, **fields)


def _inverse_fields(inverse: InverseGraph) -> dict[str, Any]:
    names = ("graph", "parents", "order", "sampling_order", "coupled", "how")
    return {name: getattr(inverse, name) for name in names}


GRAPHS: dict[str, tuple[type, Callable[[Any], dict[str, Any]], Callable[..., Any]]] = {
    "ModelGraph": (ModelGraph, _graph_fields, _make_graph),
    "InverseGraph": (InverseGraph, _inverse_fields, InverseGraph),
}


class Writer:
    """Turns objects into plain data.

    Attributes:
        objects: The objects written so far, as class name and fields; others refer to them by their number.
        tensors: The tensors, by the names that the plain data have for them.

    Example:
        >>> writer = Writer()
        >>> writer.write({"sizes": (1, 2), "support": constraints.positive})
        {'map': [['sizes', [1, 2]], ['support', {'constraint': 'positive'}]]}
    """

    def __init__(self) -> None:
        self.objects: list[list[Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self._numbers: dict[int, int] = {}
        self._kept: list[object] = []  # so that no other object gets the identity of one written before
        self._path: list[str] = []

    def write(self, value: Any) -> Any:
        """Return the plain form of a value.

        Raises:
            GraphflowsError: If there is none. The message says where the value is.
        """
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        if isinstance(value, EllipsisType):
            return {"ellipsis": None}
        if isinstance(value, torch.Size):
            return {"size": list(value)}
        if isinstance(value, slice):
            return {"slice": [self.write(part) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, Tensor):
            name = f"values.{len(self.tensors)}"
            self.tensors[name] = value
            return {"tensor": name}
        if isinstance(value, type):
            return {"class": class_name(value)}
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return [self._at(i, part) for i, part in enumerate(value)]
        if isinstance(value, list):
            return {"list": [self._at(i, part) for i, part in enumerate(value)]}
        if isinstance(value, set | frozenset):
            return {"set": [self.write(part) for part in sorted(value, key=str)]}
        if isinstance(value, Mapping):
            return {"map": [[self.write(key), self._at(key, part)] for key, part in value.items()]}
        if isinstance(value, constraints.Constraint):
            return self._constraint(value)
        return self._object(value)

    def _at(self, where: object, value: Any) -> Any:
        self._path.append(str(where))
        plain = self.write(value)
        self._path.pop()
        return plain

    def _constraint(self, value: constraints.Constraint) -> Any:
        for name, constant in CONSTRAINTS.items():
            if value is constant:
                return {"constraint": name}
        name = type(value).__name__
        if CONSTRAINT_CLASSES.get(name) is not type(value):
            raise self._refused(value)
        return {"constraint": [name, self.write(vars(value))]}

    def _object(self, value: Any) -> dict[str, int]:
        if id(value) in self._numbers:
            return {"object": self._numbers[id(value)]}
        name = class_name(type(value))
        if name in GRAPHS:
            fields = GRAPHS[name][1](value)
        elif dataclasses.is_dataclass(value):
            fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.init}
        else:
            raise self._refused(value)
        plain = {field: self._at(field, part) for field, part in fields.items()}
        self._kept.append(value)
        self._numbers[id(value)] = len(self.objects)
        self.objects.append([name, plain])
        return {"object": self._numbers[id(value)]}

    def _refused(self, value: Any) -> GraphflowsError:
        return GraphflowsError(
            f"Expected what can be written as plain data; {'.'.join(self._path) or 'the value'} is {value!r}, of the "
            f"class {class_name(type(value))}. Give options as names and numbers (activation='elu'), and families "
            "as frozen dataclasses; or pickle the guide (torch.save(guide, path)), which runs code when it is loaded."
        )


class Reader:
    """Turns plain data of a :class:`Writer` into objects again.

    Args:
        objects: The objects that the plain data refer to.
        tensors: The tensors.
        classes: The classes of which objects may be made, or which may be named.

    Raises:
        GraphflowsError: If an object is of another class, or has other fields than its class. The message names it.

    Example:
        >>> Reader([], {}, ()).read({"map": [["sizes", [1, 2]], ["support", {"constraint": "positive"}]]})
        {'sizes': (1, 2), 'support': GreaterThan(lower_bound=0.0)}
    """

    def __init__(
        self, objects: Sequence[Any], tensors: Mapping[str, Tensor], classes: Iterable[type]
    ) -> None:
        self.tensors = tensors
        self.classes = {class_name(kind): kind for kind in classes}
        self.objects: list[Any] = []
        for name, fields in objects:
            self.objects.append(self._object(name, {key: self.read(part) for key, part in fields.items()}))

    def read(self, plain: Any) -> Any:
        """Return the value of a plain form."""
        if isinstance(plain, list):
            return tuple(self.read(part) for part in plain)
        if not isinstance(plain, dict):
            return plain
        ((kind, content),) = plain.items()
        if kind not in self._READ:
            raise GraphflowsError(f"Expected plain data of the kinds {', '.join(self._READ)}; got {kind!r}.")
        return self._READ[kind](self, content)

    def _object(self, name: str, fields: dict[str, Any]) -> Any:
        make = GRAPHS[name][2] if name in GRAPHS else self._class(name)
        try:
            return make(**fields)
        except TypeError as error:
            raise GraphflowsError(
                f"Expected the fields of {name} as this version has them; got {', '.join(fields)} ({error}). The file "
                "is of another version."
            ) from error

    def _class(self, name: str) -> type:
        if name not in self.classes:
            raise GraphflowsError(
                f"Expected the class {name}, which the file names, among those that are given; a file never "
                f"imports anything. Give it: classes=[{name.rpartition('.')[2]}]."
            )
        return self.classes[name]

    def _constraint(self, content: Any) -> constraints.Constraint:
        if isinstance(content, str):
            found: constraints.Constraint = CONSTRAINTS[content]
            return found
        name, fields = content
        new: constraints.Constraint = object.__new__(CONSTRAINT_CLASSES[name])
        vars(new).update(self.read(fields))
        return new

    _READ: Mapping[str, Callable[["Reader", Any], Any]] = {
        "float": lambda self, text: float(text),
        "ellipsis": lambda self, _: ...,
        "size": lambda self, sizes: torch.Size(sizes),
        "slice": lambda self, parts: slice(*parts),
        "dtype": lambda self, name: _dtype(name),
        "tensor": lambda self, name: self.tensors[name],
        "class": lambda self, name: self._class(name),
        "list": lambda self, parts: [self.read(part) for part in parts],
        "set": lambda self, parts: frozenset(self.read(part) for part in parts),
        "map": lambda self, pairs: {self.read(key): self.read(part) for key, part in pairs},
        "constraint": lambda self, content: self._constraint(content),
        "object": lambda self, number: self.objects[number],
    }


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise GraphflowsError(f"Expected the name of a type of tensors; got {name!r}.")
    return found


FORMAT = 7  # another number wherever a file of before cannot be read any more
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
    *(ElementForm, Plan, PlateState, PoolMember, PriorPlan, SiteForm, Solver, Summary, SummedSite),
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
