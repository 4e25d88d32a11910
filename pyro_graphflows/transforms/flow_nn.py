r"""What the networks of all flows share: their structure, standardisation and checks.

A network maps noise to variables (:meth:`FlowNN.sample`) and back (:meth:`FlowNN.inverse_terms`), and both return
with the values the log-derivative of each variable by its own noise, so that

.. math:: \log q(z_v \mid \text{earlier } z, x) = \log \mathcal{N}(\varepsilon_v)
    - \log \frac{\partial z_v}{\partial \varepsilon_v}.
"""

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.transforms.structure import FlowStructure

__all__ = ["FlowNN", "moments", "some_names"]


class FlowNN(nn.Module):
    """Base class: subclasses set ``closed_form`` and write :meth:`sample` and :meth:`inverse_terms`.

    Args:
        structure: Who depends on whom.
    """

    closed_form: str
    loc: Tensor
    scale: Tensor
    context_loc: Tensor
    context_scale: Tensor

    def __init__(self, structure: FlowStructure) -> None:
        super().__init__()
        self.structure = structure
        self.register_buffer("loc", torch.zeros(structure.event_dim))
        self.register_buffer("scale", torch.ones(structure.event_dim))
        self.register_buffer("context_loc", torch.zeros(structure.context_dim))
        self.register_buffer("context_scale", torch.ones(structure.context_dim))

    def sample(self, eps: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map noise to variables; return them and the log of each dz/deps, both of shape (\*batch, D)."""
        raise NotImplementedError

    def inverse_terms(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map variables to noise; return it and the log of each dz/deps, both of shape (\*batch, D)."""
        raise NotImplementedError

    @property
    def event_dim(self) -> int:
        """The number of variables, D."""
        return self.structure.event_dim

    @property
    def context_dim(self) -> int:
        """The number of context columns, C."""
        return self.structure.context_dim

    @torch.no_grad()
    def standardize_(
        self,
        loc: Tensor,
        scale: Tensor,
        context_loc: Tensor | None = None,
        context_scale: Tensor | None = None,
    ) -> None:
        """Let the flow work in standardised coordinates (z − loc) / scale and (x − context_loc) / context_scale.

        Args:
            loc: Shape (D,).
            scale: Shape (D,), positive.
            context_loc: Shape (C,); unchanged by default.
            context_scale: Shape (C,), positive; unchanged by default.

        Raises:
            GraphflowsError: If a value is not finite or a scale not positive.
        """
        given = {"loc": loc, "scale": scale, "context_loc": context_loc, "context_scale": context_scale}
        for name, value in given.items():
            if value is None:
                continue
            good = value.isfinite() & ((value > 0) if name.endswith("scale") else value.isfinite())
            if not bool(good.all()):
                names = self.structure.context_names if "context" in name else self.structure.names
                bad = ", ".join(names[i] for i in (~good).nonzero().flatten().tolist())
                raise GraphflowsError(
                    f"Expected finite locations and positive, finite scales; {name} is not so for {bad}."
                )
            getattr(self, name).copy_(value)

    def join_context(self, *context: Tensor) -> Tensor | None:
        """Broadcast and concatenate the parts of a context.

        Raises:
            GraphflowsError: If the number of columns is wrong.
        """
        got = sum(part.shape[-1] for part in context)
        if got != self.context_dim:
            raise GraphflowsError(
                f"Expected context.shape[-1] == {self.context_dim} "
                f"({some_names(self.structure.context_names) or 'no context'}); got {got}."
            )
        if len(context) <= 1:
            return context[0] if got else None
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in context))
        return torch.cat([part.expand(*batch, -1) for part in context], -1)

    def standard_context(self, *context: Tensor) -> Tensor | None:
        """Join the parts of a context and standardise it."""
        x = self.join_context(*context)
        return None if x is None else (x - self.context_loc) / self.context_scale

    def check_event(self, values: Tensor) -> None:
        """Check the last dimension of variables or noise.

        Raises:
            GraphflowsError: If it is not the number of variables.
        """
        if values.shape[-1:] != (self.event_dim,):
            raise GraphflowsError(
                f"Expected a last dimension of {self.event_dim} ({some_names(self.structure.names)}); "
                f"got shape {tuple(values.shape)}."
            )


def some_names(names: tuple[str, ...]) -> str:
    """Return up to twenty names in one line."""
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means and standard deviations of the columns of samples; a constant column gets 1."""
    wide = values.detach().double()
    scale = wide.std(0)
    return wide.mean(0).to(values), torch.where(scale > 0, scale, torch.ones_like(scale)).to(values)
