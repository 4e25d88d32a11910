"""The one function most users need."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.base import AutoFaithfulGuide
from pyro_graphflows.guides.compiled import CompiledGuide
from pyro_graphflows.guides.factors import Factor
from pyro_graphflows.guides.flow import AutoFaithfulFlow
from pyro_graphflows.guides.inverses import Inverse
from pyro_graphflows.guides.normal import AutoFaithfulNormal
from pyro_graphflows.guides.pooling import DeepSet

__all__ = ["auto_faithful_guide"]


def auto_faithful_guide(
    model: Callable[..., Any],
    *example_args: Any,
    family: str | type[Factor] = "normal",
    inverse: Inverse = "auto",
    hidden_dims: Sequence[int] | None = None,
    init: str = "regression",
    standardize: bool = True,
    strict: bool = True,
    resolution: str = "site",
    pool: str | DeepSet | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> AutoFaithfulGuide:
    """Compile a Pyro model into an amortised guide that follows the faithful inverse of its Bayesian network.

    Discrete latent sites have Bernoulli and categorical factors in both families, for inference compilation and
    score-function gradients; ``enumerate_sites=True`` marks them for ``TraceEnum_ELBO`` instead. Sites that the model
    marks for enumeration have no factor: the model sums over them.

    References:
        [1] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.

    Args:
        model: The model.
        *example_args: Arguments of a typical call. If given (or ``example_kwargs``), the guide is set up at once and
            its parameters exist, as optimisers of PyTorch need; if not, on its first call or by ``guide.setup``.
        family: ``"normal"`` (:class:`AutoFaithfulNormal`), ``"flow"`` (:class:`AutoFaithfulFlow`: flexible
            conditionals, at several times the cost of a step), or a subclass of
            :class:`~pyro_graphflows.guides.factors.Factor` for all continuous sites. ``factors={site: subclass}``
            chooses for single sites, with every family.
        inverse: What each site is conditioned on: ``"auto"`` (the faithful inverse with the fewest edges and, among
            these, smooth conditionals (:mod:`~pyro_graphflows.guides.smooth_order`); discrete sites sampled before
            the continuous ones of their plates unless that doubles the edges), another order
            of :func:`~pyro_graphflows.faithful_inverse` or an elimination sequence; ``"stochastic"``, ``"full"``,
            ``"mean_field"``; an :class:`~pyro_graphflows.InverseGraph`, or a function that makes one from the
            :class:`~pyro_graphflows.ModelGraph`.
        hidden_dims: Widths of the hidden layers; by default some units for each distinct set of parents.
        init: ``"regression"``: start from the least-squares regression of each site on its parents over joint samples
            of the model (exact for linear-Gaussian models up to sampling error), or ``"random"``.
        standardize: Whether inputs and outputs of the networks are standardised by constants found at set-up.
        strict: Whether to refuse models whose dependencies cannot be traced in full; if not, what cannot be
            followed counts as a dependency on all earlier sites.
        resolution: ``"site"``, or ``"element"`` to give each element of a vector site its own parents (not with
            a factor class; see :func:`~pyro_graphflows.get_model_graph` for when that is sound).
        pool: How the data in inner plates reach the sites outside of them (a group's data its own variable, all data
            the global variables): None gives such sites free parameters for the data set at hand; ``"deepset"``
            summarises the data by a permutation-invariant network, so that they are amortised over data sets of any
            size (:mod:`~pyro_graphflows.guides.pooling`; not over subsampled plates).
        example_kwargs: Keyword arguments of a typical call.
        **options: Further options of the family's class, :class:`AutoFaithfulNormal` or :class:`AutoFaithfulFlow`.

    Returns:
        An :class:`~pyro.infer.autoguide.AutoGuide`, for ``SVI``, ``Trace_ELBO``, ``TraceMeanField_ELBO``,
        ``RenyiELBO``, ``Predictive``, and inference compilation.

    Raises:
        GraphflowsError: If the family or an option is unknown.
        UnsupportedModelError: If the model cannot be compiled (on set-up).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = auto_faithful_guide(model, torch.zeros(10))
        >>> guide.inverse.parents["z"]
        ('x',)
        >>> guide(torch.zeros(7))["z"].shape
        torch.Size([7])
    """
    kind: type[AutoFaithfulNormal] = AutoFaithfulNormal
    if isinstance(family, type) and issubclass(family, Factor):
        options["factor"] = family
    elif family == "flow":
        kind = AutoFaithfulFlow
    elif family != "normal":
        raise GraphflowsError(f"Expected family='normal', 'flow' or a subclass of Factor; got {family!r}.")
    if resolution == "element" and family not in ("normal", "flow"):
        raise GraphflowsError(
            f"Expected family='normal' or 'flow' with resolution='element'; got {family!r}."
        )
    known = {
        name: None
        for base in (kind, AutoFaithfulNormal, CompiledGuide)
        for name, parameter in inspect.signature(base.__init__).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    unknown = [name for name in options if name not in known]
    if unknown:
        raise GraphflowsError(
            f"Expected options of {kind.__name__} ({', '.join(known)}); got {', '.join(unknown)}. Keyword arguments of "
            "the model belong in example_kwargs={...}."
        )
    guide = kind(
        model,
        inverse=inverse,
        hidden_dims=hidden_dims,
        init=init,
        standardize=standardize,
        strict=strict,
        resolution=resolution,
        pool=pool,
        **options,
    )
    if example_args or example_kwargs:
        guide.setup(*example_args, **(example_kwargs or {}))
    return guide
