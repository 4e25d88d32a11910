"""A diagonal affine layer that starts from the moments of data."""

from typing import Any

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.transforms.network import moments

__all__ = ["ActNorm", "actnorm"]


class ActNorm(TransformModule):
    r"""The elementwise map :math:`z = b + e^{s} \odot \varepsilon` with learnable b and s.

    With ``data_dependent``, the first batch z whose density is asked for in training mode sets b and s to its mean and
    log standard deviation, so that the noise starts standardised; :meth:`initialize_` does so explicitly.

    References:
        [1] Kingma and Dhariwal (2018), Glow, Section 3.1. There per channel, here per variable.

    Shape:
        - Input and output: :math:`(*batch, D)`.

    Args:
        input_dim: D.
        data_dependent: Whether to start from the first batch.

    Raises:
        GraphflowsError: If ``input_dim`` is not positive.

    Example:
        >>> import torch
        >>> layer = actnorm(2)
        >>> layer.initialize_(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
        >>> layer.loc.tolist()
        [1.0, 20.0]
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    autoregressive = True
    initialized: Tensor

    def __init__(self, input_dim: int, *, data_dependent: bool = False) -> None:
        super().__init__(cache_size=0)
        if input_dim < 1:
            raise GraphflowsError(f"Expected input_dim >= 1; got {input_dim}.")
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))
        self.register_buffer("initialized", torch.tensor(not data_dependent))

    @torch.no_grad()
    def initialize_(self, z: Tensor) -> None:
        r"""Set the location and scale to the moments of samples.

        Args:
            z: Shape (\*batch, D), at least two samples. A constant column gets scale 1.

        Raises:
            GraphflowsError: If there are fewer than two samples, or a value is not finite.
        """
        rows = z.reshape(-1, len(self.loc))
        if len(rows) < 2 or not bool(rows.isfinite().all()):
            raise GraphflowsError(f"Expected at least two samples, all finite; got {len(rows)}.")
        loc, scale = moments(rows)
        self.loc.copy_(loc)
        self.log_scale.copy_(scale.log())
        self.initialized.fill_(True)

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + self.log_scale.exp() * x

    def _inverse(self, y: Tensor) -> Tensor:
        if self.training and not bool(self.initialized):
            self.initialize_(y)
        return (y - self.loc) * (-self.log_scale).exp()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log of the absolute determinant of the Jacobian, of the batch shape."""
        return self.log_diagonal(x, y).sum(-1)

    def log_diagonal(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return the log-derivative of each variable by its own noise, of shape (\*batch, D)."""
        return self.log_scale.expand(torch.broadcast_shapes(x.shape, y.shape))

    def with_cache(self, cache_size: int = 1) -> "ActNorm":
        """Return the layer itself: it has nothing worth caching."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inv": None}


def actnorm(input_dim: int, *, data_dependent: bool = False) -> ActNorm:
    """Return an :class:`ActNorm`.

    Args:
        input_dim: The number of variables.
        data_dependent: Whether to start from the first batch whose density is asked for.

    Returns:
        The transform.
    """
    return ActNorm(input_dim, data_dependent=data_dependent)
