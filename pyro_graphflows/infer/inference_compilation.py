r"""Inference compilation: train an amortised guide on joint samples of the model, no data needed.

The loss is the forward divergence averaged over the model's own data,

.. math:: E_{p(x)} \operatorname{KL}\bigl(p(z \mid x) \,\|\, q(z \mid x)\bigr)
          = E_{p(z, x)}[-\log q(z \mid x)] - H[z \mid x],

whose second term does not depend on the guide. It needs no reparametrised gradient, so discrete and
continuous latents are treated alike, and it is mass-covering. :class:`pyro.infer.CSIS` minimises the same
loss trace by trace in a Python loop; here a whole batch of joint samples is one run of the model and one of
the guide inside a plate.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pyro.infer
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.particles import Program, Site, density_sites, keep_dims, particle_plate
from pyro_graphflows.infer.simulations import JointLayout, joint_layout, run_guide, sample_joint
from pyro_graphflows.inspect import require_pair

__all__ = ["InferenceCompilation"]


class InferenceCompilation:
    r"""Fit a guide to the model's posterior by the forward divergence on fresh joint samples.

    The conventions are those of :class:`pyro.infer.CSIS`: the model is run with its observed sites
    *unconditioned*, so that the values given for them in the call only tell shapes; the guide is called with
    the same arguments and ``observations={site: value}`` holding the sampled values of the observed sites,
    and must read its observations there. Both run inside one plate of ``batch_size`` joint samples, to the
    left of all plates of the model: an observation has shape ``(batch_size, *plates, *event)``, and
    broadcasting from the right does the rest.

    The loss is in nats *per joint sample*. If the model has a data plate of ``N`` elements, one joint sample
    holds ``N`` data, and the loss is the sum over them. A subsampled plate counts each of its elements ``N /
    B`` times, as everywhere in Pyro. Latent sites that the guide leaves out are averaged over, with a warning (the
    guide is then fitted to the marginal posterior of the others). Masked elements do not count: the guide must repeat
    the model's mask.

    Gradients reach the guide's parameters only: the model's own parameters are not trained by this loss.

    References:
        [1] Le, Baydin and Wood (2017), Inference compilation and universal probabilistic programming,
        AISTATS, Eq. (5).
        [2] Webb et al. (2018), Faithful inversion of generative models for effective amortized inference,
        NeurIPS, Section 4 (the same loss for compiled inference with faithful inverses).

    Args:
        model: A Pyro model. What is run is ``poutine.uncondition(model)``.
        guide: A guide that takes ``observations=``.
        optim: A :class:`pyro.optim.PyroOptim` (as for ``SVI``) or a :class:`torch.optim.Optimizer` over the
            guide's parameters. Only :meth:`step` needs it.
        batch_size: The number of joint samples per step.
        observed: The sites whose values the guide is given. By default those with an observed value in the
            first call; if there are none, those of ``guide.model_graph``, or else all that the guide does not
            sample.
        max_plate_nesting: How many dimensions the plates take, where it is known better than by running both
            once.
        vectorize: If false, draw and score the joint samples one by one: for models whose control flow
            depends on sampled values.

    Attributes:
        sites: The latent sites whose log-densities count; ``None`` for all. The others get no gradient of their own.

    Raises:
        GraphflowsError: If ``batch_size`` is not positive, or :meth:`step` is called without an optimiser.
        UnsupportedModelError: If samples of the unconditioned model are not samples of its joint density
            (``pyro.factor``, ``poutine.scale``), or if the guide has sites that the model lacks.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.optim import Adam
        >>> def model(x=None):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x=None, observations=None):
        ...     x = x if observations is None else observations["x"]
        ...     slope = pyro.param("slope", torch.tensor(0.0))
        ...     pyro.sample("z", dist.Normal(slope * x, 0.5**0.5))
        >>> compilation = InferenceCompilation(model, guide, Adam({"lr": 0.1}), batch_size=500)
        >>> losses = [compilation.step() for _ in range(100)]
        >>> abs(pyro.param("slope").item() - 0.5) < 0.1
        True
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: PyroOptim | torch.optim.Optimizer | None = None,
        *,
        batch_size: int = 100,
        observed: Iterable[str] | None = None,
        max_plate_nesting: int | None = None,
        vectorize: bool = True,
    ) -> None:
        require_pair(model, guide)
        if batch_size < 1:
            raise GraphflowsError(f"Expected a positive batch_size; got {batch_size}.")
        self.model = model
        self.guide = guide
        self.optim = optim
        self.batch_size = batch_size
        self.observed = None if observed is None else tuple(observed)
        self.max_plate_nesting = max_plate_nesting
        self.vectorize = vectorize
        self.sites: tuple[str, ...] | None = None
        self._layout: JointLayout | None = None
        self._validation: tuple[poutine.Trace, ...] | None = None

    # ----------------------------------------------------------------------------------------------- training
    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one gradient step on fresh joint samples.

        Args:
            *args: Positional arguments of the model and the guide.
            **kwargs: Keyword arguments of both.

        Returns:
            The loss before the step, in nats per joint sample.

        Raises:
            GraphflowsError: If there is no optimiser.
        """
        if self.optim is None:
            raise GraphflowsError(
                "Expected an optimiser; give InferenceCompilation(..., optim=...) to take steps."
            )
        if isinstance(self.optim, PyroOptim):
            with poutine.trace(param_only=True) as capture:
                loss = self.loss_and_grads(*args, **kwargs)
            values = [site["value"] for site in capture.trace.nodes.values()]
            # module-local parameters of Pyro are plain nn.Parameters: they are their own unconstrained value
            params: set[Any] = {
                getattr(value, "unconstrained", lambda value=value: value)() for value in values
            }
            params = {param for param in params if param.grad is not None}
            self.optim(list(params))
            pyro.infer.util.zero_grads(params)
        else:
            self.optim.zero_grad()
            loss = self.loss_and_grads(*args, **kwargs)
            self.optim.step()
        return loss

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
        """Add the gradient of the loss on fresh joint samples to the guide's parameters.

        Args:
            *args: Positional arguments of the model and the guide.
            **kwargs: Keyword arguments of both.

        Returns:
            The loss in nats per joint sample.
        """
        loss = self.differentiable_loss(*args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    # --------------------------------------------------------------------------------------------- evaluation
    def loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss on fresh joint samples, in nats per joint sample, without gradients.

        Args:
            *args: Positional arguments of the model and the guide.
            **kwargs: Keyword arguments of both.
        """
        with torch.no_grad():
            return self.differentiable_loss(*args, **kwargs).item()

    def differentiable_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss on fresh joint samples as a tensor that can be differentiated.

        Args:
            *args: Positional arguments of the model and the guide.
            **kwargs: Keyword arguments of both.
        """
        return self.log_probs(*args, **kwargs).mean().neg()

    def log_probs(self, *args: Any, **kwargs: Any) -> Tensor:
        r"""Return :math:`\log q(z \mid x)` of each of ``batch_size`` fresh joint samples.

        Args:
            *args: Positional arguments of the model and the guide.
            **kwargs: Keyword arguments of both.

        Returns:
            A tensor of shape ``(batch_size,)``.
        """
        return self._score(self.sample_joint(*args, **kwargs), args, kwargs)

    def set_validation_batch(self, *args: Any, **kwargs: Any) -> None:
        """Draw a batch of joint samples and keep it for :meth:`validation_loss`.

        Args:
            *args: Positional arguments of the model and the guide.
            **kwargs: Keyword arguments of both.
        """
        self._validation = self.sample_joint(*args, **kwargs)

    def validation_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss on the kept batch of joint samples, which the first call draws if need be.

        Args:
            *args: Positional arguments of the model and the guide.
            **kwargs: Keyword arguments of both.

        Returns:
            The loss in nats per joint sample.
        """
        if self._validation is None:
            self.set_validation_batch(*args, **kwargs)
        assert self._validation is not None
        with torch.no_grad():
            return self._score(self._validation, args, kwargs).mean().neg().item()

    # ----------------------------------------------------------------------------------------------- the runs
    def sample_joint(self, *args: Any, **kwargs: Any) -> tuple[poutine.Trace, ...]:
        """Draw ``batch_size`` joint samples: one trace in a plate, or one trace each if not vectorised.

        Args:
            *args: Positional arguments of the model.
            **kwargs: Keyword arguments of the model.

        Returns:
            The traces.
        """
        if self._layout is None:
            self._layout = joint_layout(
                self.model, self.guide, args, kwargs, self.observed, self.max_plate_nesting
            )
        model, runs = (self.in_plate(self.model), 1) if self.vectorize else (self.model, self.batch_size)
        with torch.no_grad(), poutine.block():
            return tuple(sample_joint(model, args, kwargs) for _ in range(runs))

    def _score(
        self, joint: tuple[poutine.Trace, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        assert self._layout is not None
        guide, size = self.guide, 1
        dims: tuple[int, ...] = ()
        if self.vectorize:
            guide, dims, size = self.in_plate(guide), (self._dim,), self.batch_size
        scores = []
        for trace in joint:
            guide_trace = run_guide(guide, trace, self._layout.observed, args, kwargs)
            guide_trace.compute_log_prob()
            terms = [keep_dims(site["log_prob"], dims) for _, site in self._scored(guide_trace)]
            scores.append(sum(terms, torch.zeros(())).expand(size))
        return torch.cat(scores)

    def _scored(self, trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
        return (pair for pair in density_sites(trace) if self.sites is None or pair[0] in self.sites)

    def in_plate(self, program: Program) -> Program:
        """Return a program inside the plate of joint samples."""
        return particle_plate(program, self.batch_size, self._dim)

    @property
    def _dim(self) -> int:
        assert self._layout is not None
        return -1 - self._layout.max_plate_nesting
