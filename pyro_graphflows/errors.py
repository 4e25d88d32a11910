"""Errors and warnings of the package.

Every error raised on purpose derives from :class:`GraphflowsError`, which is also a :class:`ValueError`, so
that callers may catch either. Messages say what was expected, what came, which site is meant and what to do.
"""

__all__ = [
    "ConvergenceError",
    "GraphflowsError",
    "GraphflowsWarning",
    "MissingExtraError",
    "NotADAGError",
    "UnfaithfulInverseError",
    "UnsupportedModelError",
    "reason_of",
]


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
