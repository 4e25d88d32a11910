"""The command line: ``python -m pyro_graphflows report module:model --data data.npz``."""

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.report.contents import ReportOptions, make_report

__all__ = ["load_data", "load_model", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Its words; those of the program by default.

    Returns:
        The exit status: 0, or 2 with a message on the standard error output where something was not as expected.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pyro_graphflows", description="Faithful guides for Pyro models."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser(
        "report",
        help="train a guide for a model and its data, and write a page on what came of it",
        description="Sets a guide up, trains it and writes one HTML page: the model's graph, training, the posterior, "
        "how far to trust it, calibration, predictions, what to do next.",
    )
    report.add_argument("model", help="module:function, or path/to/file.py:function")
    report.add_argument("--data", required=True, help="a .npz file; its arrays have the names of arguments")
    report.add_argument("--train", type=float, default=60.0, metavar="SECONDS", help="0 for no training (60)")
    report.add_argument("--out", default="report.html", help="the page to write (report.html)")
    report.add_argument("--family", default="auto", help="auto, normal, flow or spline (auto)")
    report.add_argument("--draws", type=int, default=1000, help="draws of the posterior (1000)")
    report.add_argument("--simulations", type=int, default=500, help="for calibration; 0 for none (500)")
    report.add_argument("--seed", type=int, default=0)
    words = parser.parse_args(arguments)
    try:
        options = ReportOptions(
            seconds=words.train,
            family=words.family,
            num_draws=words.draws,
            num_simulations=words.simulations,
            seed=words.seed,
        )
        model = load_model(words.model)
        page = make_report(model, load_data(words.data, model), options, title=words.model)
        path = page.save(words.out)
    except (GraphflowsError, OSError) as error:
        print(f"pyro_graphflows report: {error}", file=sys.stderr)
        return 2
    print(f"Written: {path}")
    return 0


def load_model(name: str) -> Callable[..., Any]:
    """Return the model that ``module:function`` or ``path/to/file.py:function`` names.

    Modules are looked for in the current folder first.

    Raises:
        GraphflowsError: If there is no such module, it has no such name, or that is not callable.
    """
    module_name, separator, attribute = name.rpartition(":")
    if not separator or not module_name or not attribute:
        raise GraphflowsError(f"Expected the model as module:function; got {name!r}.")
    if module_name.endswith(".py"):
        file = Path(module_name)
        if not file.is_file():
            raise GraphflowsError(f"Expected the file of the model; there is no {module_name!r}.")
        folder, module_name = str(file.parent.resolve()), file.stem
    else:
        folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = (
            ""
            if error.name in (None, module_name, module_name.split(".")[0])
            else f": it needs {error.name!r}"
        )
        raise GraphflowsError(
            f"Expected a module {module_name!r} in {folder} or installed; it cannot be imported{missing}."
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            known = (
                sorted(
                    key
                    for key, item in vars(value).items()
                    if inspect.isfunction(item) and not key.startswith("_")
                )
                if hasattr(value, "__dict__")
                else []
            )
            hint = f" Its functions are {', '.join(known)}." if known else ""
            raise GraphflowsError(f"Expected {part!r} in {module_name!r}; there is none.{hint}")
        value = getattr(value, part)
    if not callable(value):
        raise GraphflowsError(f"Expected {name!r} to be a function; got {type(value).__name__}.")
    return value


def load_data(path: str | os.PathLike[str], model: Callable[..., Any]) -> dict[str, Any]:
    """Return the arrays of a ``.npz`` file as the model's arguments by name.

    Floating numbers come in torch's default dtype; arrays without dimensions as Python numbers. No code in the file is
    run.

    Raises:
        GraphflowsError: If the file is none, holds objects, lacks an argument or has others than the model's.
    """
    if not Path(path).is_file():
        raise GraphflowsError(f"Expected a file of data; there is no {str(path)!r}.")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise GraphflowsError(
                f"Expected a .npz file of named arrays; {str(path)!r} is a single array. Write it with "
                "numpy.savez(path, name=array)."
            )
        with file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError) as error:
        if isinstance(error, GraphflowsError):
            raise
        raise GraphflowsError(
            f"Expected a .npz file of numeric arrays; {str(path)!r} is not: {error}"
        ) from error
    parameters = inspect.signature(model).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    named = [
        name
        for name, each in parameters.items()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]
    unknown = sorted(set(arrays) - set(named))
    if unknown and not takes_any:
        raise GraphflowsError(
            f"Expected arrays with the names of the model's arguments ({', '.join(named) or 'it has none'}); "
            f"{str(path)!r} also has {', '.join(unknown)}."
        )
    missing = [
        name for name in named if parameters[name].default is inspect.Parameter.empty and name not in arrays
    ]
    if missing:
        raise GraphflowsError(
            f"Expected an array for each argument of the model; {str(path)!r} lacks {', '.join(missing)} and has "
            f"{', '.join(sorted(arrays)) or 'nothing'}."
        )
    return {name: _as_argument(name, array) for name, array in arrays.items()}


def _as_argument(name: str, array: np.ndarray) -> Any:
    if array.dtype.kind not in "fiub":
        raise GraphflowsError(f"Expected numbers in the array {name!r}; got dtype {array.dtype}.")
    if array.ndim == 0:
        return array.item()
    tensor = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
    if tensor.is_floating_point():
        return tensor.to(torch.get_default_dtype())
    return tensor if tensor.dtype == torch.bool else tensor.long()
