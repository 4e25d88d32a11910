r"""Models compared by how well each predicts data that it has not seen.

Differences of leave-one-out densities are taken datum by datum, so that what is hard for all models cancels.
*Stacking* asks for the mixture of predictions that does best on the data left out,

.. math:: \max_w \sum_n \log \sum_k w_k \, p_k(y_n \mid y_{-n}), \qquad w_k \ge 0, \; \sum_k w_k = 1,

which is another question than which model is best: two models that are good for different data share the weight.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.loo import LOO
from pyro_graphflows.infer.posterior import Posterior
from pyro_graphflows.infer.tables import Table

__all__ = ["compare", "stacking_weights"]


def compare(
    models: Mapping[str, Posterior | LOO],
    *,
    by: str | None = None,
    num_inner: int = 100,
    seed: int | None = None,
    progress: bool = True,
) -> Table:
    r"""Compare models of the same data by leave-one-out cross-validation, best first.

    References:
        [1] Vehtari, Gelman and Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation
        and WAIC, Statistics and Computing 27, Section 5.
        [2] Yao, Vehtari, Simpson and Gelman (2018), Using stacking to average Bayesian predictive distributions,
        Bayesian Analysis 13, Section 3.

    Args:
        models: Posteriors by name, or what their :meth:`~pyro_graphflows.infer.Posterior.loo` returned.
        by: The plate whose elements are left out, for posteriors.
        num_inner: The number of inner draws, for posteriors.
        seed: Seed of the random numbers, for posteriors.
        progress: Whether to show bars when it takes long.

    Returns:
        A table with a row for each model: ``elpd`` and its standard error ``se``; the difference from the best,
        ``diff``, with the standard error ``diff se`` of the differences of single data; the stacking ``weight``;
        ``bad``, the number of data with k-hat above 0.7; and the ``log evidence``, ``nan`` where it is not known.

    Raises:
        GraphflowsError: If there are fewer than two models, one is neither of these, or their data differ.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_graphflows.infer import sample_posterior
        >>> x = torch.tensor([0.5, 1.5, 2.0, 1.0])
        >>> def make(scale):
        ...     def model(x):
        ...         mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("x", dist.Normal(mu, scale), obs=x)
        ...     def guide(x):
        ...         variance = 1 / (1 / 4 + len(x) / scale**2)
        ...         pyro.sample("mu", dist.Normal(variance * x.sum() / scale**2, variance**0.5))
        ...     return sample_posterior(model, guide, x, seed=0)
        >>> table = compare({"narrow": make(0.1), "right": make(1.0)})
        >>> list(table.rows), table["right"]["weight"] > 0.99
        (['right', 'narrow'], True)
    """
    if not isinstance(models, Mapping):
        raise GraphflowsError(
            f"Expected models={{name: posterior}}, with names to tell them apart; got {type(models).__name__}."
        )
    if len(models) < 2:
        raise GraphflowsError(f"Expected at least two models to compare; got {list(models)}.")
    results: dict[str, LOO] = {}
    evidence: dict[str, float] = {}
    first: Posterior | None = None
    for name, model in models.items():
        if isinstance(model, Posterior):
            first = model if first is None else first
            _require_same_data(name, first, model)
            results[name] = model.loo(by, num_inner=num_inner, seed=seed, progress=progress)
            found = model.evidence
            evidence[name] = math.nan if found is None else found.log_evidence.sum().item()
        elif isinstance(model, LOO):
            results[name] = model
        else:
            raise GraphflowsError(
                f"Expected {name!r} to be a Posterior or a LOO; got {type(model).__name__}."
            )
    shapes = {name: (loo.plates, tuple(loo.pointwise.shape), loo.num_data) for name, loo in results.items()}
    if len(set(shapes.values())) > 1:
        raise GraphflowsError(
            f"Expected the same data left out of all models; got the plates, shapes and numbers {shapes}."
        )
    terms = torch.stack([loo.pointwise.flatten() for loo in results.values()], 1).double()
    terms = terms[~terms.isnan().any(1)]
    weights = dict(zip(results, stacking_weights(terms).tolist(), strict=True))
    best = max(results, key=lambda name: results[name].elpd)
    rows = {}
    for place, (name, loo) in enumerate(results.items()):
        gap = terms[:, place] - terms[:, list(results).index(best)]
        rows[name] = {
            "elpd": loo.elpd,
            "se": loo.se,
            "diff": gap.sum().item(),
            "diff se": math.sqrt(len(gap)) * gap.std().item() if len(gap) > 1 else math.nan,
            "weight": weights[name],
            "bad": int((loo.khat > 0.7).sum()),
            "log evidence": evidence.get(name, math.nan),
        }
    ordered = sorted(rows, key=lambda name: -rows[name]["elpd"])
    return Table("model", {name: rows[name] for name in ordered})


def stacking_weights(pointwise: Tensor, *, tolerance: float = 1e-9, max_steps: int = 100_000) -> Tensor:
    r"""Return the weights of the mixture with the best log-density.

    By the EM algorithm for mixture proportions, whose every step raises the concave objective; it stops when no
    weight could be raised by more than ``tolerance`` nats per datum (the duality gap).

    Args:
        pointwise: Log predictive densities (data, models).
        tolerance: When to stop.
        max_steps: The greatest number of steps.

    Returns:
        The weights (models), which add up to 1.

    Example:
        >>> stacking_weights(torch.tensor([[0.0, -9.0], [-9.0, 0.0]])).tolist()
        [0.5, 0.5]
    """
    density = torch.exp(pointwise - pointwise.amax(1, keepdim=True))
    weights = torch.full(
        (density.shape[1],), 1 / density.shape[1], dtype=density.dtype, device=density.device
    )
    for _ in range(max_steps):
        gain = (density / (density @ weights)[:, None]).mean(
            0
        )  # at the optimum <= 1, and 1 where a weight is positive
        if gain.max() <= 1 + tolerance:
            break
        weights = weights * gain
        weights = weights / weights.sum()
    return weights


def _require_same_data(name: str, first: Posterior, other: Posterior) -> None:
    same = set(first.observed) == set(other.observed) and all(
        torch.equal(value, other.observed[site]) for site, value in first.observed.items()
    )
    if not same:
        raise GraphflowsError(
            f"Expected all models to have the same observed values; those of {name!r} differ from the first's."
        )
