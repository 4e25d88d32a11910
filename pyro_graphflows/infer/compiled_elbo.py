"""An ELBO for Pyro's SVI whose gradients come from captured steps (:mod:`~pyro_graphflows.infer.compiled`)."""

from typing import Any

import pyro
from pyro.infer import ELBO, Trace_ELBO

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.compiled import SCRIPT, CompiledLoss, require_backend
from pyro_graphflows.infer.particles import Program

__all__ = ["CompiledELBO"]


class CompiledELBO(ELBO):
    """An ELBO, for :class:`pyro.infer.SVI`, whose loss and gradients are captured once per shape of the data.

    What is fixed when a step is captured, and how that is checked, is said in :mod:`~pyro_graphflows.infer.compiled`;
    what cannot be captured is computed as by the ELBO itself, and :attr:`report` says why. Losses without gradients
    (``SVI.evaluate_loss``) are the ELBO's own.

    Args:
        loss: The ELBO; ``Trace_ELBO()`` by default.
        backend: ``"torchscript"``, PyTorch's interpreter, by default: a step of a small model takes a fifth of the time
            after a second or two. ``"inductor"`` takes a tenth after tens of seconds, and needs a C++ compiler.

    Raises:
        GraphflowsError: If the loss is no ELBO, or the backend is unknown.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("loc", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 0.5))
        >>> loss = CompiledELBO()
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss)
        >>> for _ in range(200):
        ...     _ = svi.step(torch.ones(3))
        >>> abs(pyro.param("mean").item() - 0.75) < 0.2, loss.report.split(":")[0]
        (True, 'compiled')
    """

    def __init__(self, loss: ELBO | None = None, *, backend: str = SCRIPT) -> None:
        super().__init__()
        self.estimator: Any = Trace_ELBO() if loss is None else loss
        self.backend = backend
        if not isinstance(self.estimator, ELBO):
            raise GraphflowsError(f"Expected an ELBO object to compile; got {loss!r}.")
        self._compiled: CompiledLoss | None = None
        require_backend(backend)

    @property
    def report(self) -> str:
        """What is compiled; else, why not."""
        return "not compiled: no step was taken" if self._compiled is None else self._compiled.report

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss, as the ELBO does.

        Args:
            model: The model.
            guide: The guide.
            *args: Their positional arguments.
            **kwargs: Their keyword arguments.
        """
        value: float = self.estimator.loss(model, guide, *args, **kwargs)
        return value

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss, and add its gradients to the parameters.

        Args:
            model: The model.
            guide: The guide.
            *args: Their positional arguments.
            **kwargs: Their keyword arguments.
        """
        if self._compiled is None or not (
            self._compiled.is_of(model, guide) and self._compiled.is_in_store()
        ):
            self._compiled = CompiledLoss(model, guide, self.estimator, backend=self.backend)
        loss = self._compiled.loss_and_grads(*args, **kwargs)
        for name in self._compiled.store_names():  # SVI trains what is announced
            pyro.param(name)
        return loss

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """Return the loss as a tensor to go backward from, as the ELBO does.

        Args:
            model: The model.
            guide: The guide.
            *args: Their positional arguments.
            **kwargs: Their keyword arguments.
        """
        return self.estimator.differentiable_loss(model, guide, *args, **kwargs)

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return self.estimator._get_trace(model, guide, args, kwargs)
