"""Checks for those who extend the package: whether a family of conditionals keeps the contract of a guide.

A new family is one file, with a subclass of :class:`~pyro_graphflows.guides.Family` and one of
:class:`~pyro_graphflows.guides.conditionals.contract.Conditionals`. :func:`check_family` runs all that a guide asks
of them on a small block; call it in a test.
"""

import copy
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_graphflows.guides.conditionals.contract import BlockSpec, Conditionals, Family, LinearConditional
from pyro_graphflows.guides.plan import BlockPlan, Conditioning
from pyro_graphflows.guides.sites import LatentSite
from pyro_graphflows.guides.start import regress_

__all__ = ["check_family"]

SIZES = {"a": 1, "b": 2, "c": 1}
PARENTS = {"a": ("x",), "b": ("x", "a"), "c": ("a",)}
LEVELS = (("a",), ("b", "c"))
NUM_FEATURES = 2
NUM_ROWS = 4000


def check_family(family: Family, *, gaussian: bool = True) -> None:
    """Run a family through the contract of conditionals, in double precision.

    The block has a site ``a`` given two features, and then, in one level, a vector ``b`` given both and a site ``c``
    given ``a``. Checked are levels and shapes, batches of particles, values that others replace, linear conditionals
    in the units of inputs and of outputs, regressions, gradients, states, copies and types. The random state is used.

    Args:
        family: The family.
        gaussian: Whether its linear members are normal. If not, only their locations are compared.

    Raises:
        AssertionError: If the contract is broken. The message says where.

    Example:
        >>> from pyro_graphflows.guides import Normal
        >>> check_family(Normal())
    """
    conditionals = _conditionals(family)
    context = torch.randn(5, NUM_FEATURES, dtype=torch.double)
    _check_passes(conditionals, context)
    _check_replaced_values(conditionals, context)
    _check_linear(conditionals, context, gaussian)
    _check_regression(_conditionals(family), gaussian)
    _check_gradients(_conditionals(family), context)
    _check_copies(conditionals, _conditionals(family), context)
    assert hash(family) == hash(copy.copy(family)), (
        "Expected a family that can be hashed: a frozen dataclass."
    )
    assert type(family).__name__ in repr(family), f"Expected a repr with the family's name; got {family!r}."


def _conditionals(family: Family) -> Conditionals:
    sites = {
        name: LatentSite(name, torch.Size([size]), torch.Size([size]), constraints.real_vector)
        for name, size in SIZES.items()
    }
    block = BlockPlan((), LEVELS, (Conditioning("x", "same"),), PARENTS)
    return family.conditionals(BlockSpec(block, {"x": NUM_FEATURES}, sites)).double()


def _run(
    conditionals: Conditionals, context: Tensor, values: Mapping[str, Tensor]
) -> dict[str, dist.TorchDistribution]:
    """Return the conditionals of all sites at given values."""
    found = {}
    evaluation = conditionals.begin(context)
    for level in LEVELS:
        found.update(evaluation.next())
        evaluation.accept({site: values[site] for site in level})
    return found


def _draw(
    conditionals: Conditionals, context: Tensor, shape: torch.Size
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw all sites at a batch shape, and return their values and log-densities."""
    values, terms = {}, {}
    evaluation = conditionals.begin(context)
    for level in LEVELS:
        of_level = evaluation.next()
        assert tuple(of_level) == level, (
            f"Expected the sites of level {level}, in order; got {tuple(of_level)}."
        )
        for site, conditional in of_level.items():
            event = tuple(conditional.event_shape)
            assert event == (SIZES[site],), f"Expected event shape ({SIZES[site]},) at {site!r}; got {event}."
            wide = conditional.expand(shape)
            values[site] = wide.rsample() if wide.has_rsample else wide.sample()
            assert values[site].shape == (*shape, SIZES[site]), (
                f"{site!r}: draws have {tuple(values[site].shape)}."
            )
            terms[site] = wide.log_prob(values[site])
            assert terms[site].shape == shape, f"{site!r}: log-densities have {tuple(terms[site].shape)}."
        evaluation.accept({site: values[site] for site in level})
    return values, terms


def _check_passes(conditionals: Conditionals, context: Tensor) -> None:
    for shape in (torch.Size([5]), torch.Size([3, 5])):
        values, _ = _draw(conditionals, context, shape)
        assert len(values["a"].flatten().unique()) == shape.numel(), "Expected a draw for each particle."
        assert all(value.dtype == torch.double for value in values.values()), (
            "Expected draws of the module's type."
        )


def _check_replaced_values(conditionals: Conditionals, context: Tensor) -> None:
    values, terms = _draw(conditionals, context, torch.Size([3, 5]))
    given = {site: value.detach().clone() for site, value in values.items()}
    again = _run(conditionals, context, given)
    for site, term in terms.items():
        other = again[site].log_prob(given[site])
        assert torch.allclose(term, other, atol=1e-7), (
            f"Expected the log-density of the values that are handed in, at {site!r}: off by "
            f"{float((term - other).abs().max()):.3g}."
        )
    moved = {**given, "a": given["a"] + 1.0}
    after = _run(conditionals, context, moved)
    for site in ("b", "c"):
        changed = after[site].log_prob(given[site]) - again[site].log_prob(given[site])
        assert bool((changed != 0).any()), (
            f"Expected {site!r} to follow a value of its parent that was replaced."
        )


def _linear(site: str) -> LinearConditional:
    generator = torch.Generator().manual_seed(len(site) + ord(site))
    size = SIZES[site]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    weights = {
        parent: 0.5 * draw(size, NUM_FEATURES if parent == "x" else SIZES[parent]) for parent in PARENTS[site]
    }
    tril = 0.3 * draw(size, size).tril(-1) + torch.diag_embed(0.5 + draw(size).abs())
    return LinearConditional(weights, draw(size), tril)


def _check_linear(conditionals: Conditionals, context: Tensor, gaussian: bool) -> None:
    one = torch.ones((), dtype=torch.double)
    for same in (True, False):
        units = {}
        for i, site in enumerate(SIZES):
            outputs = (one * (1.0 + i)).expand(SIZES[site]), (one * (0.5 + i)).expand(SIZES[site])
            inputs = outputs if same else (outputs[0] - 0.7, outputs[1] * 1.7)
            conditionals.set_units_(site, outputs, None if same else inputs)
            units[site] = outputs, inputs
            for found, wanted in zip(conditionals.output_units(site), outputs, strict=True):
                assert torch.allclose(found, wanted), f"Expected units of outputs as set, at {site!r}."
            for found, wanted in zip(conditionals.input_units(site), inputs, strict=True):
                assert torch.allclose(found, wanted), f"Expected units of inputs as set, at {site!r}."
        linear = {site: _linear(site) for site in SIZES}
        for site, each in linear.items():
            assert conditionals.set_linear_(site, each), f"Expected {site!r} to become linear."
        root = torch.randn(2 * conditionals.num_columns, conditionals.num_columns, dtype=torch.double)
        conditionals.whiten_(
            root.mT @ root / len(root)
        )  # which changes how they are trained, and not what they are
        values, terms = _draw(conditionals, context, torch.Size([4, 5]))
        of_sites = _run(conditionals, context, values)
        for site, each in linear.items():
            loc = each.loc
            for parent, matrix in each.weights.items():
                shift, scale = units[parent][1] if parent in units else (0.0, 1.0)
                standard = context if parent == "x" else (values[parent] - shift) / scale
                loc = loc + standard @ matrix.T
            shift, scale = units[site][0]
            mean, tril = shift + scale * loc, scale.unsqueeze(-1) * each.scale_tril
            found = of_sites[site].mean.expand_as(mean)
            assert torch.allclose(found, mean, atol=1e-6), f"Expected the linear location at {site!r}."
            if gaussian:
                exact = dist.MultivariateNormal(mean, scale_tril=tril).log_prob(values[site])
                assert torch.allclose(terms[site], exact, atol=1e-6), (
                    f"Expected the linear normal at {site!r}."
                )


def _check_regression(conditionals: Conditionals, gaussian: bool) -> None:
    """Samples of a linear-Gaussian block: the conditionals become what they came from."""
    x = torch.randn(NUM_ROWS, NUM_FEATURES, dtype=torch.double)
    values: dict[str, Tensor] = {}
    linear = {site: _linear(site) for site in SIZES}
    means = {}
    for site, each in linear.items():
        means[site] = each.loc + sum(
            (x if parent == "x" else values[parent]) @ matrix.T for parent, matrix in each.weights.items()
        )
        values[site] = (
            means[site] + torch.randn(NUM_ROWS, SIZES[site], dtype=torch.double) @ each.scale_tril.T
        )
    for site, value in values.items():
        conditionals.set_units_(site, (value.mean(0), value.std(0)))
    regress_(conditionals, x, values)
    for site, conditional in _run(conditionals, x, values).items():
        spread = float(linear[site].scale_tril.norm())
        error = float((conditional.mean.detach() - means[site]).square().mean().sqrt())
        # a regression on at most four inputs and a constant is off by the root of 5 / NUM_ROWS of the residual's spread
        assert error < 5 * spread * (5 / NUM_ROWS) ** 0.5, (
            f"Expected the regression at {site!r}; off by {error:.3g}."
        )
        if gaussian:
            exact = dist.MultivariateNormal(means[site], scale_tril=linear[site].scale_tril).log_prob(
                values[site]
            )
            gap = float((exact - conditional.log_prob(values[site]).detach()).mean())
            assert abs(gap) < 0.02, f"Expected the residual covariance at {site!r}; {gap:.3g} nats off."


def _check_gradients(conditionals: Conditionals, context: Tensor) -> None:
    _, terms = _draw(conditionals, context, torch.Size([3, 5]))
    torch.stack([term.sum() for term in terms.values()]).sum().backward()
    for name, parameter in conditionals.named_parameters():
        wrong = parameter.numel() and (parameter.grad is None or not bool(parameter.grad.isfinite().all()))
        assert not wrong, f"Expected a finite gradient of {name}."


def _check_copies(conditionals: Conditionals, fresh: Conditionals, context: Tensor) -> None:
    values, terms = _draw(conditionals, context, torch.Size([5]))
    fresh.load_state_dict(conditionals.state_dict())
    for name, other in (("a loaded state", fresh), ("a deep copy", copy.deepcopy(conditionals))):
        again = _run(other, context, values)
        for site, term in terms.items():
            assert torch.allclose(term, again[site].log_prob(values[site].clone()), atol=1e-7), (
                f"Expected the same density of {name}, at {site!r}."
            )
    single, _ = _draw(copy.deepcopy(conditionals).float(), context.float(), torch.Size([5]))
    assert single["a"].dtype == torch.float32, "Expected conditionals that follow the type of the module."
