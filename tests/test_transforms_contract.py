"""One line per transform, one test per promise: what Pyro's own suite asks of a transform, and what ours adds."""

import copy
import inspect
import io
import pickle

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import nn

import pyro_graphflows
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.transforms import (
    FlowStructure,
    actnorm,
    conditional_faithful_residual,
    conditional_graphical_residual,
    conditional_graphical_spline,
    faithful_residual,
    graphical_residual,
    graphical_spline,
)


def chain(dim):
    graph = nx.DiGraph()
    graph.add_nodes_from(range(dim))
    graph.add_edges_from((i, i + 1) for i in range(dim - 1))
    return graph


def reverse_chain(dim):
    """The first position is the last in the order of the graph."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(dim))
    graph.add_edges_from((i + 1, i) for i in range(dim - 1))
    return graph


def full(dim):
    return FlowStructure(tuple(tuple(range(v)) for v in range(dim)))


def empty(dim):
    return FlowStructure(tuple(() for _ in range(dim)))


def stacked(dim):
    return nn.Sequential(actnorm(dim), faithful_residual(chain(dim), num_blocks=1))


TRANSFORMS = {
    "faithful density": lambda dim: faithful_residual(chain(dim)),
    "faithful sampling": lambda dim: faithful_residual(reverse_chain(dim), closed_form="sampling"),
    "faithful full": lambda dim: faithful_residual(full(dim), num_blocks=2),
    "faithful no edges": lambda dim: faithful_residual(empty(dim), closed_form="sampling"),
    "faithful deep": lambda dim: faithful_residual(chain(dim), hidden_dims=[3 * dim, 2 * dim], num_blocks=2),
    "faithful sparse": lambda dim: faithful_residual(reverse_chain(dim), engine="sparse"),
    "faithful lipswish": lambda dim: faithful_residual(chain(dim), activation="lipswish"),
    "faithful conditional scale": lambda dim: faithful_residual(full(dim), conditional_scale=True),
    "faithful conditioned": lambda dim: faithful_residual(full(dim), conditioner_units=4),
    "faithful affine": lambda dim: faithful_residual(full(dim), units_per_variable=0, num_blocks=1),
    "graphical density": lambda dim: graphical_residual(chain(dim)),
    "graphical sampling": lambda dim: graphical_residual(reverse_chain(dim), closed_form="sampling"),
    "graphical full": lambda dim: graphical_residual(full(dim), num_blocks=2, activation="lipswish"),
    "graphical no edges": lambda dim: graphical_residual(empty(dim)),
    "graphical deep": lambda dim: graphical_residual(chain(dim), hidden_dims=[4 * dim, 4 * dim]),
    "graphical sparse": lambda dim: graphical_residual(reverse_chain(dim), engine="sparse"),
    "spline chain": lambda dim: graphical_spline(chain(dim)),
    "spline other order": lambda dim: graphical_spline(reverse_chain(dim), num_bins=4, bound=2.0),
    "spline full": lambda dim: graphical_spline(full(dim), hidden_dims=[6 * dim, 6 * dim]),
    "spline no edges": lambda dim: graphical_spline(empty(dim)),
    "actnorm": actnorm,
}
CONDITIONAL = {
    "faithful density": lambda dim: conditional_faithful_residual(chain(dim), 3),
    "faithful sampling": lambda dim: conditional_faithful_residual(
        reverse_chain(dim), 3, closed_form="sampling"
    ),
    "faithful conditioned": lambda dim: conditional_faithful_residual(
        chain(dim), 3, closed_form="sampling", conditioner_units=3, conditioner_layers=2
    ),
    "faithful named": lambda dim: conditional_faithful_residual(
        nx.compose(chain(dim), nx.DiGraph([("x", 0), ("y", 1), ("w", 1)])), ["x", "y", "w"]
    ),
    "spline": lambda dim: conditional_graphical_spline(reverse_chain(dim), 3),
    "spline named": lambda dim: conditional_graphical_spline(
        nx.compose(chain(dim), nx.DiGraph([("x", 0), ("y", 1), ("w", 1)])), ["x", "y", "w"]
    ),
    "graphical density": lambda dim: conditional_graphical_residual(chain(dim), 3),
    "graphical sampling": lambda dim: conditional_graphical_residual(
        reverse_chain(dim), 3, closed_form="sampling"
    ),
}


class Case:
    """A transform, and the module that owns its parameters."""

    def __init__(self, transform, owner):
        self.transform, self.owner = transform, owner


def make(name, dim):
    torch.manual_seed(0)
    if name.startswith("| "):
        owner = CONDITIONAL[name[2:]](dim)
        transform = owner.condition(torch.rand(1, 3))
    else:
        owner = transform = TRANSFORMS[name](dim)
    with torch.no_grad():  # away from the identity
        for key, parameter in owner.named_parameters():
            if "raw_beta" not in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return Case(transform, owner)


ALL = [*TRANSFORMS, *(f"| {name}" for name in CONDITIONAL)]
everywhere = pytest.mark.parametrize("name", ALL)
conditional = pytest.mark.parametrize("name", [name for name in ALL if name.startswith("|")])
flows = pytest.mark.parametrize("name", [name for name in ALL if name != "actnorm"])


def normal(*shape):
    return dist.Normal(torch.zeros(shape), 1.0).to_event(1)


# What Pyro's TransformTests check


@everywhere
@pytest.mark.parametrize("dim", [2, 5])
def test_inverse_bypassing_the_cache(name, dim):
    transform = make(name, dim).transform
    x = torch.randn(10, dim)
    y = transform._call(x)
    again = transform._inverse(y)
    assert (again - x).abs().max() < 1e-6
    first, second = transform.log_abs_det_jacobian(x, y), transform.log_abs_det_jacobian(again, y)
    assert (first - second).abs().max() < 1e-6
    assert torch.equal(transform._inverse(y), again)


@everywhere
@pytest.mark.parametrize("dim", [2, 5])
def test_log_det_by_finite_differences_and_triangularity(name, dim):
    transform = make(name, dim).transform
    epsilon, x = 1e-5, torch.randn(1, dim)
    y = transform(x)
    columns = []
    for j in range(dim):
        step = torch.zeros(1, dim)
        step[0, j] = epsilon / 2
        columns.append((transform(x + step) - transform(x - step))[0].detach() / epsilon)
    jacobian = torch.stack(columns, -1)  # (output, input)
    exact = torch.autograd.functional.jacobian(lambda x: transform(x[None])[0], x[0])
    assert (jacobian - exact).abs().max() < 1e-6
    log_det = transform.log_abs_det_jacobian(x, y)
    assert log_det.shape == (1,)
    assert (log_det - torch.linalg.slogdet(jacobian)[1]).abs().max() < 1e-5
    assert (log_det - torch.linalg.slogdet(exact)[1]).abs().max() < 1e-10
    order = (
        [v for level in transform.structure.levels for v in level] if name != "actnorm" else list(range(dim))
    )
    assert torch.equal(exact[order][:, order].triu(1), torch.zeros(dim, dim))
    assert (exact.diagonal() > 0).all()
    by_variable = transform.log_diagonal(x, y)
    assert (by_variable[0] - exact.diagonal().log()).abs().max() < 1e-10


@everywhere
@pytest.mark.parametrize("batch", [(), (3,), (3, 4), (3, 4, 5)])
def test_shapes(name, batch):
    case = make(name, 5)
    transform = case.transform
    q = dist.TransformedDistribution(normal(*batch, 5), [transform])
    expected = torch.broadcast_shapes(batch, (1,)) if name.startswith("|") else torch.Size(batch)
    assert q.batch_shape == expected
    assert q.event_shape == (5,)
    sample = q.sample()
    assert sample.shape == (*expected, 5)
    assert q.log_prob(sample).shape == expected
    assert transform.forward_shape((*batch, 5)) == transform.inverse_shape((*batch, 5)) == (*expected, 5)
    x = torch.randn(*expected, 5)
    assert transform(x).shape == transform.inv(x).shape == x.shape
    assert transform.log_abs_det_jacobian(x, transform(x)).shape == expected


@everywhere
@pytest.mark.parametrize("inverse", [False, True])
def test_three_optimiser_steps_either_side(name, inverse):
    """Maximum likelihood runs with the transform and with its inverse, and every parameter gets a gradient."""
    case = make(name, 5)
    transform = case.transform.inv if inverse else case.transform
    q = dist.TransformedDistribution(normal(5), [transform])
    optimizer = torch.optim.Adam(case.owner.parameters())
    x = torch.rand(1, 5)
    for _ in range(3):
        optimizer.zero_grad()
        loss = -q.log_prob(x.detach()).mean()
        loss.backward()
        optimizer.step()
    for key, parameter in case.owner.named_parameters():
        if parameter.numel():
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key


# What we add


def test_public_names_and_signatures():
    """Classes and helpers are at the top level; helpers take the graph first."""
    for name in ("FaithfulResidual", "GraphicalResidual"):
        plain, conditional = getattr(pyro_graphflows, name), getattr(pyro_graphflows, f"Conditional{name}")
        assert issubclass(plain, TransformModule)
        assert issubclass(conditional, ConditionalTransformModule)
    assert issubclass(pyro_graphflows.ActNorm, TransformModule)
    for name in ("faithful_residual", "graphical_residual"):
        plain = inspect.signature(getattr(pyro_graphflows, name)).parameters
        assert list(plain)[:4] == ["graph", "hidden_dims", "num_blocks", "closed_form"]
        assert [plain[key].default for key in list(plain)[1:4]] == [None, 4, "density"]
        conditional = inspect.signature(getattr(pyro_graphflows, f"conditional_{name}")).parameters
        assert list(conditional)[:5] == ["graph", "context", "hidden_dims", "num_blocks", "closed_form"]
    assert isinstance(pyro_graphflows.actnorm(3), pyro_graphflows.ActNorm)


@everywhere
def test_declares_a_bijection_of_real_vectors(name):
    transform = make(name, 5).transform
    assert transform.bijective
    assert transform.event_dim == transform.domain.event_dim == transform.codomain.event_dim == 1
    assert isinstance(transform, nn.Module)
    assert transform.inv.inv is transform


@everywhere
def test_the_inverse_is_a_transform_too(name):
    transform = make(name, 5).transform
    x = torch.randn(7, 5)
    forth = dist.TransformedDistribution(normal(5), [transform])
    back = dist.TransformedDistribution(normal(5), [transform.inv])
    eps = transform.inv(x)
    log_det = transform.inv.log_abs_det_jacobian(x, eps)
    torch.testing.assert_close(forth.log_prob(x), normal(5).log_prob(eps) + log_det)
    y = transform(x)
    torch.testing.assert_close(back.log_prob(x), normal(5).log_prob(y) + transform.log_abs_det_jacobian(x, y))


@everywhere
def test_pickle_deepcopy_and_state_dict_after_use(name):
    case = make(name, 5)
    x = torch.randn(4, 5)
    y = case.transform(x)
    (case.transform.log_abs_det_jacobian(x, y).sum() + y.sum()).backward()
    for other in (
        copy.deepcopy(case.transform),
        pickle.loads(pickle.dumps(case.transform)),
        _saved(case.transform),
    ):
        torch.testing.assert_close(other(x), y)
        torch.testing.assert_close(other.inv(y), x, atol=1e-8, rtol=1e-8)
    fresh = make(name, 5)
    with torch.no_grad():
        for parameter in fresh.owner.parameters():
            parameter.normal_()
    fresh.owner.load_state_dict(case.owner.state_dict())
    transform = (
        fresh.owner if fresh.owner is fresh.transform else fresh.owner.condition(case.transform._context)
    )
    torch.testing.assert_close(transform(x), y)


def _saved(transform):
    file = io.BytesIO()
    torch.save(transform, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@everywhere
def test_without_a_cache(name):
    transform = make(name, 5).transform
    bare = transform.with_cache(0)
    x = torch.randn(4, 5)
    y = bare(x)
    assert bare.inv(y) is not x
    torch.testing.assert_close(bare.inv(y), x, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(y, transform(x))
    torch.testing.assert_close(bare.log_abs_det_jacobian(x, y), transform.log_abs_det_jacobian(x, y))
    assert {id(p) for p in bare.parameters()} == {id(p) for p in transform.parameters()}
    assert transform.with_cache(1) is transform
    if name != "actnorm":
        assert bare.with_cache(1)._cache_size == 1
        with pytest.raises(GraphflowsError, match="cache_size 0 or 1"):
            transform.with_cache(2)


@flows
def test_a_sample_is_scored_without_inversion(name):
    transform = make(name, 5).transform
    x = torch.randn(4, 5)
    y = transform(x)
    assert transform.inv(y) is x
    transform.clear_cache()
    assert transform.inv(y) is not x


@flows
def test_no_stale_values_after_an_optimiser_step(name):
    case = make(name, 5)
    q = dist.TransformedDistribution(normal(5), [case.transform])
    optimizer = torch.optim.SGD(case.owner.parameters(), 0.1)
    x = torch.randn(4, 5)
    y = case.transform(x)
    before = q.log_prob(y)
    before.sum().backward()
    optimizer.step()
    assert case.transform.inv(y) is not x
    with torch.no_grad():
        expected = copy.deepcopy(case.transform).with_cache(0)
        torch.testing.assert_close(
            q.log_prob(y), dist.TransformedDistribution(normal(5), [expected]).log_prob(y)
        )
        assert not torch.allclose(q.log_prob(y), before)
        torch.testing.assert_close(case.transform(x), expected(x))


@flows
def test_a_sample_without_gradient_is_scored_with_one(name):
    """sample() runs without gradients; log_prob of it must not use those values when gradients are wanted."""
    case = make(name, 5)
    q = dist.TransformedDistribution(normal(5), [case.transform])
    y = q.sample((3,))
    q.log_prob(y).sum().backward()
    cached = {key: p.grad.clone() for key, p in case.owner.named_parameters()}
    case.owner.zero_grad()
    q = dist.TransformedDistribution(normal(5), [case.transform.with_cache(0)])
    q.log_prob(y).sum().backward()
    for key, parameter in case.owner.named_parameters():
        torch.testing.assert_close(cached[key], parameter.grad, atol=1e-7, rtol=1e-7)


@flows
def test_the_same_data_can_be_scored_twice(name):
    """Two losses on one tensor, each with its own backward pass: no graph that was freed."""
    case = make(name, 5)
    q = dist.TransformedDistribution(normal(5), [case.transform])
    y = torch.randn(3, 5)
    q.log_prob(y).sum().backward()
    q.log_prob(y).sum().backward()
    case.transform(y).sum().backward()
    case.transform(y).sum().backward()


@everywhere
def test_expand(name):
    transform = make(name, 5).transform
    q = dist.TransformedDistribution(normal(5), [transform]).expand([2, 3])
    assert q.batch_shape == (2, 3)
    y = q.rsample((4,))
    assert y.shape == (4, 2, 3, 5)
    assert len(set(y[..., 0].flatten().tolist())) == 24
    assert q.log_prob(y).shape == (4, 2, 3)
    assert q.mask(torch.rand(2, 3) > 0.5).log_prob(y).shape == (4, 2, 3)


@flows
def test_rsample_has_the_gradients_of_the_score(name):
    """d/dθ E[f(z)] by reparametrisation agrees with finite differences at fixed noise."""
    case = make(name, 5)
    x = torch.randn(8, 5)
    parameter = max(case.owner.parameters(), key=torch.numel)
    y = case.transform(x)
    (gradient,) = torch.autograd.grad((y**2).sum(), parameter)
    direction = torch.randn_like(parameter)
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            parameter.add_(step * direction)
            values.append((case.transform._call(x) ** 2).sum())
            parameter.add_(-step * direction)
    difference = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), difference, atol=1e-4, rtol=1e-5)


@everywhere
def test_a_pyro_model_registers_the_parameters(name):
    case = make(name, 5)

    def model():
        pyro.module("flow", case.owner)
        with pyro.plate("data", 4):
            return pyro.sample("z", dist.TransformedDistribution(normal(5), [case.transform]))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (4,)
    assert any(key.startswith("flow$$$") for key in pyro.get_param_store())


@flows
def test_single_precision(name):
    case = make(name, 5)
    case.owner.float()
    context = getattr(case.transform, "_context", None)
    transform = case.transform if context is None else case.owner.condition(context.float())
    x = torch.randn(6, 5, dtype=torch.float32)
    y = transform(x)
    assert y.dtype == transform.log_abs_det_jacobian(x, y).dtype == torch.float32
    assert (transform.with_cache(0).inv(y) - x).abs().max() < 1e-3
    assert transform.with_cache(0).inv(y).dtype == torch.float32


@conditional
def test_conditioning(name):
    """Rows of a batch of contexts are the rows conditioned one by one; the inverse can be conditioned too."""
    owner = make(name, 4).owner
    context, x = torch.randn(6, 3), torch.randn(6, 4)
    together = owner.condition(context)
    y, log_det = together(x), together.log_abs_det_jacobian(x, together(x))
    for i in range(6):
        alone = owner.condition(context[i])
        torch.testing.assert_close(alone(x[i]), y[i], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(alone.log_abs_det_jacobian(x[i], y[i]), log_det[i], atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(owner.inv.condition(context)(y), x, atol=1e-8, rtol=1e-8)
    assert not torch.allclose(owner.condition(context.flip(0))(x), y)
    q = dist.ConditionalTransformedDistribution(normal(4), [owner]).condition(context)
    assert q.batch_shape == (6,)
    wide = dist.TransformedDistribution(normal(5, 1, 4), [together])
    assert wide.batch_shape == (5, 6)
    with pytest.raises(GraphflowsError, match=r"context.shape\[-1\] == 3"):
        owner.condition(torch.zeros(2))
    context.requires_grad_()
    owner.condition(context)(x).sum().backward()
    assert context.grad.abs().sum() > 0


@everywhere
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda(name):
    case = make(name, 5)
    x = torch.randn(6, 5)
    y = case.transform(x).detach()
    case.owner.cuda()
    context = getattr(case.transform, "_context", None)
    transform = case.transform if context is None else case.owner.condition(context.cuda())
    there = transform(x.cuda())
    torch.testing.assert_close(there.cpu(), y, atol=1e-8, rtol=1e-8)
    loss = dist.TransformedDistribution(
        dist.Normal(torch.zeros(5, device="cuda"), 1.0).to_event(1), [transform]
    ).log_prob(there.detach())
    loss.sum().backward()
