"""Announcing a module's parameters to Pyro's store part by part, under a name that no other module has there.

:func:`pyro.module` announces a whole module, and the store keeps what it first saw under a name: a second module of
that name would silently train the first. Here each program announces the parts that it uses, and a module whose name
is taken gets another one.
"""

from itertools import count

import pyro
from torch import Tensor, nn

__all__ = ["announce", "free_name"]


def announce(module: nn.Module, prefix: str, name: str) -> None:
    """Make parameters known to Pyro, which trains what it sees.

    Args:
        module: A part of a module.
        prefix: The path of that part.
        name: The name of the whole module in the store.
    """
    for key, parameter in module.named_parameters(prefix):
        if parameter.requires_grad:
            pyro.param(f"{name}$$${key}", parameter)


def free_name(name: str, key: str, parameter: Tensor) -> str:
    """Return a name under which Pyro's store holds no other module: the given one, or with a number after it.

    Args:
        name: The name wanted.
        key: The path of a parameter that the module always has.
        parameter: That parameter, by which the module is known; the store holds it afterwards.
    """
    store, free = pyro.get_param_store(), name
    for number in count(1):
        if store.setdefault(f"{free}$$${key}", parameter) is parameter:
            break
        free = f"{name}_{number}"
    return free
