"""How a guide is made: a model compiled, or a file read.

The options are explained at :func:`auto_faithful_guide`.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.conditionals.contract import Family
from pyro_graphflows.guides.conditionals.factors import Factor
from pyro_graphflows.guides.conditionals.pooling import DeepSet
from pyro_graphflows.guides.files import read_guide
from pyro_graphflows.guides.guide import AutoFaithfulGuide
from pyro_graphflows.guides.orders import Inverse

__all__ = ["auto_faithful_guide", "load_guide"]


def auto_faithful_guide(
    model: Callable[..., Any],
    *example_args: Any,
    family: str | Family | type[Factor] = "auto",
    inverse: Inverse = "auto",
    pool: str | DeepSet | None = None,
    init: str = "auto",
    factors: Mapping[str, type[Factor] | Family] = MappingProxyType({}),
    standardize: bool = True,
    num_start_samples: int = 10_000,
    strict: bool = True,
    resolution: str = "auto",
    rank: int | None = None,
    budget: int | None = None,
    coupled_rank: int | None = None,
    enumerate_sites: bool | Collection[str] = False,
    init_values: Mapping[str, Tensor] = MappingProxyType({}),
    setup_seed: int = 0,
    optional: Sequence[str] = (),
    features: str = "raw",
    embedding: Mapping[str, nn.Module | str] = MappingProxyType({}),
    create_plates: Callable[..., Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> AutoFaithfulGuide:
    """Compile a Pyro model into an amortised guide that follows the faithful inverse of its Bayesian network.

    Discrete latent sites have Bernoulli and categorical factors in all families, for inference compilation and
    score-function gradients; ``enumerate_sites=True`` marks them for ``TraceEnum_ELBO`` instead. Sites that the model
    marks for enumeration have no factor: the model sums over them.

    References:
        [1] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.

    Args:
        model: The model.
        *example_args: Arguments of a typical call. If given (or ``example_kwargs``), the guide is set up at once and
            its parameters exist, as optimisers of PyTorch need; if not, on its first call or by ``guide.setup``.
        family: The kind of conditionals, an object with options of its own: :class:`~pyro_graphflows.guides.Auto`
            (splines for scalar globals, for scalar sites that set the scale of others and for those with bounded or
            heavy-tailed priors, normal conditionals elsewhere, fused with the priors),
            :class:`~pyro_graphflows.guides.Normal`, :class:`~pyro_graphflows.guides.Spline` or
            :class:`~pyro_graphflows.guides.Flow` (flexible conditionals, at several times the cost of a step);
            ``"auto"``, ``"normal"``, ``"spline"`` and ``"flow"`` abbreviate their defaults; or a subclass of
            :class:`~pyro_graphflows.guides.Factor` for all continuous sites.
        inverse: What each site is conditioned on: ``"auto"`` (the faithful inverse with the fewest edges and, among
            these, smooth conditionals (:mod:`~pyro_graphflows.guides.orders`); discrete sites sampled before
            the continuous ones of their plates unless that doubles the edges), another order
            of :func:`~pyro_graphflows.faithful_inverse`, :class:`~pyro_graphflows.AutoOrder` (a search for fewer
            edges, for a given time) or an elimination sequence; ``"stochastic"``, ``"full"``,
            ``"mean_field"``; an :class:`~pyro_graphflows.InverseGraph`, or a function that makes one from the
            :class:`~pyro_graphflows.ModelGraph`.
        pool: How the data in inner plates reach the sites outside of them (a group's data its own variable, all data
            the global variables): None gives such sites per-element parameters for the data set at hand; ``"deepset"``
            (or a :class:`~pyro_graphflows.guides.DeepSet` that sets its sizes; ``"attention"`` or an
            :class:`~pyro_graphflows.guides.Attention` weighs elements by what they are) summarises the data by a
            permutation-invariant network, so that they are amortised over data sets of any
            size (:mod:`~pyro_graphflows.guides.conditionals.pooling`; not over subsampled plates).
        init: How training starts. ``"auto"``: at the best start for the data of set-up, by a Monte Carlo estimate of
            the loss, where the guide fits one data set (it has per-element parameters): among the regression, a normal
            approximation about the posterior's mode, and the prior (:mod:`~pyro_graphflows.guides.start`,
            :mod:`~pyro_graphflows.guides.mode`; ``guide.describe(verbose=True)`` says which). Amortised guides keep the
            regression, unless it does much worse for these data than the prior, or, without plates, the mode gains more
            for these data than it loses for simulated ones. ``"mode"``: at a normal approximation of the posterior for
            these data, whatever it is for others. ``"regression"``, for training on simulations: at the
            least-squares regression of each site on its parents over joint samples of the model (exact for
            linear-Gaussian models up to sampling error); where priors are improper there are none, and it is as
            ``"auto"``. ``"prior"``: at the prior of the latents, whatever the data. ``"random"``: with random weights.
        factors: For single sites, by name, a factor class or a family object.
        standardize: Whether inputs and outputs of the networks are standardised by constants found at set-up.
        num_start_samples: The number of joint samples of the model that are drawn at set-up.
        strict: Whether to refuse models whose dependencies cannot be traced in full; if not, what cannot be
            followed counts as a dependency on all earlier sites.
        resolution: ``"auto"``: vectors whose conditional would take more than 200,000 weights are held element by
            element where the model's elements fall into small groups, with a banded precision where they or their
            running sums are a chain, as in random walks, and where neither is so with one covariance for all data (up
            to 300 elements) or one of low rank beside a diagonal (:mod:`~pyro_graphflows.guides.vectors`;
            ``describe()`` says which); ``"site"``: always one of these two; ``"element"``: each element of every
            vector site has its own parents (not with a factor class; see
            :func:`~pyro_graphflows.get_model_graph` for when that is sound).
        rank: The rank of the covariance of long vectors beside its diagonal; None for one covariance in full up to 300
            elements, and at most 10 beyond.
        budget: The most weights that the conditional of one vector may take; full covariances are used up to it. None
            for 200,000 where the covariance is full, a million otherwise.
        coupled_rank: Of latents that stay dependent across a plate
            (:mod:`~pyro_graphflows.guides.conditionals.coupled`): the rank of the dependence, 0 for a parameter for
            each pair of elements; None to choose by the size of the plate.
        enumerate_sites: Discrete sites that the guide marks ``infer={"enumerate": "parallel"}``, so that
            ``TraceEnum_ELBO`` sums over their values instead of drawing them: their names, or True for all. Every
            latent site then has a network of its own, so that each only meets the values of its own parents.
        init_values: For single continuous sites, the value at which training starts, of a shape that broadcasts to that
            of the site: the site's conditional is centred there, a tenth as wide as its prior, whatever the data are.
            Elements of a plate may differ at sites with per-element parameters.
        setup_seed: The seed of everything that is random at set-up: joint samples, and with them the order, the start
            and the features, and the weights of the networks. Guides of the same model and call are equal whatever the
            caller's random state, which is not advanced; for other initial weights, take another seed.
        optional: Sites that have data in some calls and none in others, as labels have: latent where they have none,
            conditioned on where they have, by the same networks (Kingma et al. 2014, Semi-supervised Learning with
            Deep Generative Models). They are sampled first, in this order. Each call returns the sites that are latent
            in it. With several, a later one may lack data where an earlier one has some; the reverse is refused where
            the two are dependent.
        features: What sites read of their data beside the data themselves: ``"raw"``, nothing; ``"score"``, the
            gradient of the data's log-density at fixed reference values of all latents, as wide as the site is, where
            the model has one (:mod:`~pyro_graphflows.guides.scores`); ``"auto"``, the same where a regression on
            held-out joint samples gains by it.
        embedding: For wide data, by name, a network from ``(*batch, columns)`` to ``(*batch, features)`` that sites
            read in their place, beside linear estimates of the latents; ``"auto"`` for a default one, ``"linear"`` for
            the estimates alone, which overfit least where simulations are few
            (:mod:`~pyro_graphflows.guides.conditionals.embedding`).
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`: a function of the model's arguments
            that returns plates that exist already, for subsampling.
        example_kwargs: Keyword arguments of a typical call.

    Returns:
        An :class:`~pyro.infer.autoguide.AutoGuide`, for ``SVI``, ``Trace_ELBO``, ``TraceMeanField_ELBO``,
        ``RenyiELBO``, ``Predictive``, and inference compilation.

    Raises:
        GraphflowsError: If the family or the value of an option is unknown, or ``factors`` names a site that the
            model has not.
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
    guide = AutoFaithfulGuide(
        model,
        family=family,
        inverse=inverse,
        pool=pool,
        init=init,
        factors=factors,
        standardize=standardize,
        num_start_samples=num_start_samples,
        strict=strict,
        resolution=resolution,
        rank=rank,
        budget=budget,
        coupled_rank=coupled_rank,
        enumerate_sites=enumerate_sites,
        init_values=init_values,
        setup_seed=setup_seed,
        optional=optional,
        features=features,
        embedding=embedding,
        create_plates=create_plates,
    )
    if example_args or example_kwargs:
        guide.setup(*example_args, **(example_kwargs or {}))
    return guide


def load_guide(
    path: str | os.PathLike[str],
    model: Callable[..., Any],
    *,
    classes: Collection[type] = (),
    device: torch.device | str = "cpu",
    create_plates: Callable[..., Any] | None = None,
) -> AutoFaithfulGuide:
    """Return the guide of a file that :meth:`AutoFaithfulGuide.save` wrote: ready for new data, without other data.

    Loading runs no code: the file has tensors and plain data, and makes objects of the classes of this package alone.
    A family or factor of the user's is named in the file, and taken from ``classes``; it is imported by nobody.
    The model is run when the guide is called, not before.

    Args:
        path: The file.
        model: The model that the guide was made for. Parameters of its own, those of networks, are not in the file.
        classes: The classes of the user's families and factors in the guide, if there are any.
        device: Where the guide shall be, whichever device it was saved from.
        create_plates: As in :func:`auto_faithful_guide`.

    Returns:
        The guide.

    Raises:
        GraphflowsError: If the file is damaged, holds no guide, or is of another version; if it names a class that
            is not given.
        UnsupportedModelError: If the model has other parameters. Whether it has the same sites is found at the
            first call.

    Example:
        >>> import tempfile, pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     auto_faithful_guide(model, torch.zeros(10)).save(f"{folder}/guide.safetensors")
        ...     guide = load_guide(f"{folder}/guide.safetensors", model)
        >>> guide(torch.zeros(7))["z"].shape
        torch.Size([7])
    """
    contents, state = read_guide(path, model, classes)
    options = {each.name: getattr(contents["options"], each.name) for each in fields(contents["options"])}
    guide = AutoFaithfulGuide(model, create_plates=create_plates, **options)
    try:
        guide._restore(contents, state, device)
    except KeyError as error:
        raise GraphflowsError(
            f"Expected the entries that files of this version have; {path} has none named {error}. It is of another "
            "version. Load it with the version that wrote it, or set a guide up again and train it."
        ) from error
    return guide
