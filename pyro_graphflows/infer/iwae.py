r"""The importance-weighted bound, datum by datum, with global latents, subsampling and low-variance gradients.

For local latents :math:`z_n` inside the data plate and global ones :math:`u` outside, the bound is

.. math:: E_{u \sim q} \Bigl[ \log \frac{p(u)}{q(u \mid x)} + \sum_n \tfrac{N}{B}\,
          E_{z_{n1}, \dots, z_{nK}} \log \tfrac1K \sum_k w_{nk}(u) \Bigr], \qquad
          w_{nk}(u) = \frac{p(x_n, z_{nk} \mid u)}{q(z_{nk} \mid u, x)},

with :math:`K` local particles for each datum given *the same* draw of :math:`u`. Three things are easily wrong here and
are what this class is for. The scale :math:`N / B` of a subsampled plate stands outside the logarithm (inside, the loss
is biased). Averaging over particles that differ in :math:`u` is no bound: with :math:`q(u) = p(u)` it can exceed
:math:`\log p(x)` by any amount. And a site outside the data plate must not enter the weights of one datum.

*Gradients.* The plain gradient of the bound has a signal-to-noise ratio that falls with :math:`K`. The doubly
reparametrised gradient (DReG) does not: in it the guide's parameters act through the draws only, weighted by
:math:`\tilde w_k^2` (normalised weights), while the model's parameters keep :math:`\tilde w_k`. "Through the draws
only" needs :math:`\log q` at live values with parameters held fixed. Detaching the location and scale of each factor is
*not* that: a factor's location depends on the parents' values as well as on the parameters, and dropping the first is
biased. Here the guide is run a second time at copies of the draws that are leaves of the graph, and differentiated with
respect to these leaves alone; each leaf's gradient, weighted, is then sent back along the path by which its value was
drawn.
"""

import math
import warnings
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger, unwrap
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer.checkpoints import random_state, set_random_state
from pyro_graphflows.infer.particles import (
    OUTER_PARTICLES,
    LocalPlate,
    Program,
    Prototype,
    Site,
    density_sites,
    difference_to_alone,
    errors_of_batches,
    evaluation_mode,
    find_data_plate,
    inside,
    keep_dims,
    log_density,
    particle_plate,
    plates_of,
    prototype,
    require_independent_particles,
    run_pair,
)

__all__ = ["IWAE_ELBO"]

_GRADIENTS = ("plain", "dreg", "stl")


# ------------------------------------------------------------------------------------- what belongs to which datum
# Draws of the globals take the leftmost dimension, local particles the next one, and every tensor keeps all dimensions
# in their places, so that sums broadcast.
class _PlateLayout(NamedTuple):
    """Which dimensions mean what.

    Attributes:
        plate: The data plate; ``None`` where the whole data set has one weight.
        dims: The dimensions of the data: of the data plate and of plates around it at all its sites.
        inner: The dimension of local particles.
        outer: The dimension of draws of the globals.
    """

    plate: str | None
    dims: tuple[int, ...]
    inner: int
    outer: int

    @property
    def local_dims(self) -> tuple[int, ...]:
        """The dimensions that local terms keep."""
        return (self.outer, self.inner, *self.dims)

    def is_local(self, site: Site) -> bool:
        """Return whether a site belongs to single data."""
        return self.plate is None or inside(site, self.plate)


class _ParticleTerms(NamedTuple):
    """Log-densities summed per particle and datum, all dimensions in their places.

    Attributes:
        local_p: Of the model, inside the data plate, ``(S, K, *data)``.
        local_q: Of the guide, inside the data plate.
        global_p: Of the model, outside, ``(S, 1, ..., 1)``, scaled.
        global_q: Of the guide, outside, scaled.
        score: Of those local sites of the guide that are not reparametrised.
        scale: The scale of the local sites.
        inner: The dimension of local particles.
        num_outer: The number of draws of the globals.
    """

    local_p: Tensor
    local_q: Tensor
    global_p: Tensor
    global_q: Tensor
    score: Tensor
    scale: float | Tensor
    inner: int
    num_outer: int

    @property
    def log_weights(self) -> Tensor:
        """Logarithms of the importance weights of local particles."""
        return self.local_p - self.local_q

    def normalised_weights(self) -> Tensor:
        """Return weights that add up to 1 over the particles, held fixed."""
        log_weights = self.log_weights.detach()
        return torch.softmax(log_weights, self.inner) if log_weights.dim() else torch.ones(())

    def bound(self) -> Tensor:
        """Return the bound, averaged over draws of the globals."""
        local = torch.zeros(())
        if self.log_weights.dim():
            mean = torch.logsumexp(self.log_weights, self.inner) - math.log(
                self.log_weights.shape[self.inner]
            )
            local = mean.sum() * self.scale
        return (local + (self.global_p - self.global_q).sum()) / self.num_outer

    def weighted(self, local: Tensor, over_all: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of local terms and the sum of global ones, averaged over draws of the globals."""
        return ((weights * local).sum() * self.scale + over_all.sum()) / self.num_outer

    def score_surrogate(self) -> Tensor:
        """Return a term whose gradient is the score-function part, that of sites without reparametrisation.

        A particle's gain is the bound minus the bound with its weight replaced by the geometric mean of the others.
        """
        if not self.score.dim():
            return torch.zeros(())
        log_weights = self.log_weights.detach().movedim(self.inner, 0)  # (K, ...)
        num = log_weights.shape[0]
        total = torch.logsumexp(log_weights, 0, keepdim=True)
        gain = total
        if num > 1:
            own = torch.eye(num, dtype=torch.bool, device=total.device)
            own = own.reshape(num, num, *[1] * (log_weights.dim() - 1))  # row k: all weights, the k-th marked
            others = torch.where(own, 0.0, log_weights).sum(1, keepdim=True) / (num - 1)
            baseline = torch.logsumexp(torch.where(own, others, log_weights), 1)
            gain = total - baseline.nan_to_num(neginf=0.0)  # any function of the others will do
        return (gain.movedim(0, self.inner) * self.score).sum() * self.scale / self.num_outer


def _collect_terms(
    layout: _PlateLayout, num_outer: int, model_trace: poutine.Trace, guide_trace: poutine.Trace
) -> _ParticleTerms:
    """Sum the log-densities of the model and the guide, local ones per particle and datum.

    Args:
        layout: Which dimensions mean what.
        num_outer: The number of draws of the globals.
        model_trace: A run of the model in the plates of particles.
        guide_trace: A run of the guide in them.

    Returns:
        The sums.

    Raises:
        UnsupportedModelError: If local sites are scaled differently, or a site outside the data plate depends on
            local ones.
    """
    local = {"p": torch.zeros(()), "q": torch.zeros(())}
    over_all = {"p": torch.zeros(()), "q": torch.zeros(())}
    score = torch.zeros(())
    scale: float | Tensor | None = None
    for kind, trace in (("p", model_trace), ("q", guide_trace)):
        for name, site in density_sites(trace):
            log_prob = log_density(site)
            if layout.is_local(site):
                if scale is not None and not _same(scale, site["scale"]):
                    raise UnsupportedModelError(
                        f"Site {name!r} is scaled by {site['scale']}, others in the data plate by {scale}: a plate "
                        "subsampled within a datum, or poutine.scale, would put the scale inside the logarithm, where "
                        "it is no bound. Subsample the data plate only."
                    )
                scale = site["scale"]
                term = keep_dims(log_prob, layout.local_dims, keepdim=True)
                local[kind] = local[kind] + term
                if kind == "q" and not _is_reparametrised(site):
                    score = score + term
            else:
                if log_prob.dim() >= -layout.inner and log_prob.shape[layout.inner] != 1:
                    raise UnsupportedModelError(
                        f"Site {name!r} is outside the data plate {layout.plate!r} and depends on sites inside it. "
                        "Sample global sites first, or give data_plate=False."
                    )
                term = keep_dims(log_prob * site["scale"], (layout.outer,), keepdim=True)
                over_all[kind] = over_all[kind] + term
    return _ParticleTerms(
        local["p"],
        local["q"],
        over_all["p"],
        over_all["q"],
        score,
        1.0 if scale is None else scale,
        layout.inner,
        num_outer,
    )


def _is_reparametrised(site: Site) -> bool:
    """Return whether gradients pass through the draws of a site."""
    return bool(getattr(site["fn"], "has_rsample", False))


def _same(first: float | Tensor, second: float | Tensor) -> bool:
    return bool((torch.as_tensor(first) == torch.as_tensor(second)).all())


# ---------------------------------------------------------------------------------------------------- the loss
class IWAE_ELBO(ELBO):
    r"""The importance-weighted evidence lower bound of each datum, summed over the data.

    A loss like Pyro's: for :class:`pyro.infer.SVI`, as a module (``IWAE_ELBO(...)(model, guide)``) for torch
    optimisers, or for :func:`~pyro_graphflows.infer.fit`. With one particle it is the ELBO; it never decreases with
    their number, and is exact for every number when the guide is the posterior. Model and guide run once for all
    particles, inside plates to the left of theirs, so both must be vectorisable.

    Where all latent sites are inside the data plate, particles are local and the loss is that of [1], scaled for
    subsampling. Global latents are drawn ``num_outer_particles`` times, each draw with ``num_particles`` local ones:
    the guide must sample globals before locals.

    Latents that are not reparametrised (discrete ones) inside the data plate get a score-function gradient whose
    baseline for each particle is computed from the others [4]; this needs ``gradient="plain"``.

    References:
        [1] Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR, Eq. (8).
        [2] Tucker, Lawson, Gu and Maddison (2019), Doubly reparameterized gradient estimators for Monte Carlo
        objectives, ICLR, Eq. (8). Structured guides and global latents are not treated there; see the module's text.
        [3] Roeder, Wu and Duvenaud (2017), Sticking the landing, NeurIPS, Section 4.
        [4] Mnih and Rezende (2016), Variational inference for Monte Carlo objectives, ICML, Section 2.4.

    Args:
        num_particles: The number :math:`K` of local particles.
        data_plate: The plate whose elements are the data; by default the outermost vectorised plate that holds every
            observed site. ``False`` weighs the data set as a whole, which no subsampling allows.
        num_outer_particles: The number of draws of the global latents.
        gradient: ``"plain"``; ``"dreg"``, the doubly reparametrised gradient, unbiased and better for many particles;
            or ``"stl"``, which drops the score term and keeps the weights: unbiased for one particle only, where it is
            the same as ``"dreg"``.
        max_plate_nesting: How many dimensions the plates take, where it is known better than by running both once.

    Raises:
        GraphflowsError: If a number is not positive, ``gradient`` is unknown, or the data plate is ambiguous or
            unknown.
        UnsupportedModelError: If local sites are scaled differently (a subsampled plate within a datum, or
            ``poutine.scale`` on some), a site outside the data plate depends on one inside, particles share one
            draw, a latent site is missing in the guide, or the gradient asked for needs reparametrised sites.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> x = torch.zeros(1000)
        >>> exact = -dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()
        >>> one, many = (IWAE_ELBO(num).loss(model, guide, x) for num in (1, 3))
        >>> exact < many < one
        True
    """

    def __init__(
        self,
        num_particles: int = 10,
        *,
        data_plate: str | Literal[False] | None = None,
        num_outer_particles: int = 1,
        gradient: Literal["plain", "dreg", "stl"] = "plain",
        max_plate_nesting: int | None = None,
    ) -> None:
        if num_particles < 1 or num_outer_particles < 1:
            raise GraphflowsError(
                f"Expected positive numbers of particles; got {num_particles} and {num_outer_particles}."
            )
        if gradient not in _GRADIENTS:
            raise GraphflowsError(f"Expected gradient among {_GRADIENTS}; got {gradient!r}.")
        super().__init__(num_particles=num_particles)
        self.data_plate = data_plate
        self.num_outer_particles = num_outer_particles
        self.gradient = gradient
        self._given_nesting = max_plate_nesting
        self._layout: _PlateLayout | None = None
        self._layout_of: tuple[Program, Program] | None = None

    # ---------------------------------------------------------------------------------------------------- interface
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the negative bound, summed over the data.

        Args:
            model: A Pyro model.
            guide: A guide for it.
            *args: Positional arguments of both.
            **kwargs: Keyword arguments of both.
        """
        with torch.no_grad():
            layout = self._prepare(model, guide, args, kwargs)
            traces = self._run(layout, model, guide, args, kwargs)
            return self._checked(-_collect_terms(layout, self.num_outer_particles, *traces).bound()).item()

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return an estimate of the negative bound whose gradient is the chosen estimator's.

        Args:
            model: A Pyro model.
            guide: A guide for it.
            *args: Positional arguments of both.
            **kwargs: Keyword arguments of both.
        """
        layout = self._prepare(model, guide, args, kwargs)
        if self.gradient == "plain":
            traces = self._run(layout, model, guide, args, kwargs)
            terms = _collect_terms(layout, self.num_outer_particles, *traces)
            bound = terms.bound()
            surrogate = bound + terms.score_surrogate()
        else:
            bound, surrogate = self._doubly_reparametrised(layout, model, guide, args, kwargs)
        return self._checked(-(bound.detach() + surrogate - surrogate.detach()))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Add the gradient of the negative bound to the parameters; return an estimate of it.

        Args:
            model: A Pyro model.
            guide: A guide for it.
            *args: Positional arguments of both.
            **kwargs: Keyword arguments of both.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def reasons_against(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> list[str]:
        """Return why the loss cannot be used with a pair, for :func:`~pyro_graphflows.guides.check_guide`.

        Args:
            model_trace: A run of the model against the guide's values.
            guide_trace: A run of the guide.
        """
        frame = find_data_plate(model_trace, self.data_plate)
        reasons = []
        for name, site in density_sites(guide_trace):
            if site["is_observed"] or _is_reparametrised(site):
                continue
            if frame is not None and not inside(site, frame.name):
                reasons.append(
                    f"{name!r} is outside the data plate and has no path gradient, which IWAE_ELBO needs there. Use "
                    "Trace_ELBO or TraceGraph_ELBO."
                )
            elif self.gradient != "plain":
                reasons.append(f"{name!r} has no path gradient. Use IWAE_ELBO(..., gradient='plain').")
        return reasons

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        """Pyro's base class asks for one; :meth:`_run` makes all particles at once."""
        return run_pair(model, guide, args, kwargs)

    @staticmethod
    def _checked(loss: Tensor) -> Tensor:
        warn_if_nan(loss, "loss")
        return loss

    # ---------------------------------------------------------------------------------------------------------- runs
    def _prepare(self, model: Program, guide: Program, args: Any, kwargs: Any) -> _PlateLayout:
        """Find the plates, once for each pair, without moving the random generators."""
        if self._layout is None or self._layout_of != (model, guide):
            state = random_state()
            layout, first = self._find_layout(model, guide, args, kwargs)
            # evaluation mode: batch norm and dropout do mix the particles, and are meant to
            with torch.no_grad(), poutine.block(), evaluation_mode(model, guide):
                with errors_of_batches(self.num_particles):
                    batch = self._run(layout, model, guide, args, kwargs)
                self._check_guide(layout, batch[1])
                alone = (first.model_trace, first.guide_trace)
                dims = [layout.inner, layout.outer]
                difference = difference_to_alone((model, guide), (args, kwargs), batch, alone, dims)
            if difference:
                warnings.warn(difference, stacklevel=3)
            set_random_state(state)
            self._layout, self._layout_of = layout, (model, guide)
        return self._layout

    def _find_layout(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[_PlateLayout, Prototype]:
        first = prototype(model, guide, args, kwargs, self._given_nesting)
        frame = find_data_plate(first.model_trace, self.data_plate)
        dims: tuple[int, ...] = ()
        if frame is not None:
            stacks = [
                [(other.name, other.dim) for other in plates_of(site)]
                for trace in (first.model_trace, first.guide_trace)
                for _, site in density_sites(trace)
                if inside(site, frame.name)
            ]
            # the plates around the data plate at every local site: they hold data as well
            around = [stack[: stack.index((frame.name, frame.dim))] for stack in stacks]
            shared = [dim for name, dim in around[0] if all((name, dim) in stack for stack in around)]
            dims = tuple(sorted(dim for dim in (*shared, frame.dim) if dim is not None))
        nesting = first.max_plate_nesting
        layout = _PlateLayout(None if frame is None else frame.name, dims, -1 - nesting, -2 - nesting)
        return layout, first

    def _check_guide(self, layout: _PlateLayout, guide_trace: poutine.Trace) -> None:
        local = guide_trace.copy()
        rough: list[str] = []
        rough_globals: list[str] = []
        for name, site in density_sites(guide_trace):
            if not layout.is_local(site):
                local.remove_node(name)
            if not site["is_observed"] and not _is_reparametrised(site):
                (rough if layout.is_local(site) else rough_globals).append(name)
        require_independent_particles(local, layout.inner, self.num_particles)
        require_independent_particles(guide_trace, layout.outer, self.num_outer_particles)
        if rough_globals or (rough and self.gradient != "plain"):
            raise UnsupportedModelError(
                f"The guide's sites {sorted(rough + rough_globals)} are not reparametrised, so their values have no "
                "gradient. Inside the data plate such sites need gradient='plain'; outside, use Trace_ELBO."
            )

    def _run(
        self, layout: _PlateLayout, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[poutine.Trace, poutine.Trace]:
        return run_pair(self._in_plates(layout, model), self._in_plates(layout, guide), args, kwargs)

    def _in_plates(self, layout: _PlateLayout, program: Program) -> Program:
        program = LocalPlate(
            () if layout.plate is None else (layout.plate,), self.num_particles, layout.inner
        )(program)
        if self.num_outer_particles > 1:
            program = particle_plate(program, self.num_outer_particles, layout.outer, OUTER_PARTICLES)
        return program

    def _doubly_reparametrised(
        self, layout: _PlateLayout, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the bound and a surrogate of its gradient (see the module's text)."""
        if isinstance(unwrap(guide), Messenger):
            raise UnsupportedModelError(
                f"gradient={self.gradient!r} runs the guide twice, which Pyro's effect-based guides cannot. Use "
                "gradient='plain'."
            )
        model, guide = self._in_plates(layout, model), self._in_plates(layout, guide)
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        at_leaves = drawn.copy()
        leaves: dict[str, Tensor] = {}
        for name, original in density_sites(drawn):
            if original["infer"].get("is_copied"):  # a Delta of the model: its own parameters reach it there
                at_leaves.remove_node(name)
            elif not original["is_observed"]:
                leaves[name] = original["value"].detach().requires_grad_()
                copied = original.copy()
                copied["value"] = leaves[name]
                at_leaves.nodes[name] = copied
        guide_trace = poutine.trace(poutine.replay(guide, trace=at_leaves)).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=at_leaves)).get_trace(*args, **kwargs)
        terms = _collect_terms(layout, self.num_outer_particles, model_trace, guide_trace)
        weights = terms.normalised_weights()

        # the model's part, live in the model's parameters; the guide's, of which only gradients at the leaves are used
        model_part = terms.weighted(terms.local_p, terms.global_p, weights)
        local_guide_part = terms.weighted(terms.local_q, torch.zeros(()), weights)
        guide_part = terms.weighted(terms.local_q, terms.global_q, weights)
        inputs = list(leaves.values())
        by_model = _gradients(model_part, inputs)
        by_guide = _gradients(guide_part, inputs)
        by_local_guide = _gradients(local_guide_part, inputs)

        path = torch.zeros(())
        for index, name in enumerate(leaves):
            site: Site = drawn.nodes[name]
            if layout.is_local(site):
                gradient = by_model[index] - by_guide[index]
                if self.gradient == "dreg":
                    gradient = gradient * weights.reshape(weights.shape + (1,) * site["fn"].event_dim)
            else:  # to the guide's local factors a global value is one of their parameters: no score term from there
                gradient = by_model[index] - (by_guide[index] - by_local_guide[index])
            path = path + (gradient.detach() * site["value"]).sum()
        return terms.bound(), model_part + path


def _gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Return gradients, zero where there is no path, and keep the graph."""
    if not inputs or not output.requires_grad:
        return [torch.zeros_like(value) for value in inputs]
    return list(
        torch.autograd.grad(output, inputs, retain_graph=True, materialize_grads=True, allow_unused=True)
    )
