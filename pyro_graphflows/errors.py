"""Errors and warnings of the package.

Every error raised on purpose derives from :class:`GraphflowsError`, which is also a :class:`ValueError`, so
that callers may catch either. Messages say what was expected, what came, which site is meant and what to do.
"""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = [
    "ConvergenceError",
    "GraphflowsError",
    "GraphflowsWarning",
    "MissingExtraError",
    "NotADAGError",
    "UnfaithfulInverseError",
    "UnsupportedModelError",
    "reason_of",
    "with_hints",
]

P = ParamSpec("P")
R = TypeVar("R")


class GraphflowsError(ValueError):
    """Base class of the errors of this package."""


class NotADAGError(GraphflowsError):
    """A graph that must be directed and acyclic has a cycle; the message lists one."""


class UnsupportedModelError(GraphflowsError):
    """A Pyro model (or one call of it) uses something that cannot be handled correctly."""


class UnfaithfulInverseError(GraphflowsError):
    """An inverse asserts independencies that the model's posterior does not have."""


class ConvergenceError(GraphflowsError, RuntimeError):
    """An iterative computation did not reach its tolerance; the message names the knob."""


class MissingExtraError(GraphflowsError, ImportError):
    """A function needs a package that only an extra of this one installs; the message names the extra."""


class GraphflowsWarning(UserWarning):
    """Something is correct but probably not what the user wants."""


def reason_of(error: BaseException) -> str:
    """Return what an error says, without the shapes of all sites, which Pyro adds to errors inside of a trace."""
    return str(error).partition("Trace Shapes:")[0].strip()


def with_hints(elsewhere: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Say more than Python does of keyword arguments that a function has not: what is like them, and what is meant.

    Args:
        elsewhere: Where else what is asked for may be set.

    Returns:
        A decorator; what it returns raises ``TypeError`` for keyword arguments that the function has not.

    Example:
        >>> @with_hints("Colours are of plots.")
        ... def draw(size=1): ...
        >>> draw(siz=2)
        Traceback (most recent call last):
        ...
        TypeError: draw() got an unexpected keyword argument 'siz'; did you mean 'size'? Colours are of plots.
    """

    def decorator(function: Callable[P, R]) -> Callable[P, R]:
        known = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in known:
                    near = difflib.get_close_matches(name, known, 1)
                    meant = f"; did you mean {near[0]!r}?" if near else "."
                    raise TypeError(
                        f"{function.__name__}() got an unexpected keyword argument {name!r}{meant} {elsewhere}"
                    )
            return function(*args, **kwargs)

        return call

    return decorator
