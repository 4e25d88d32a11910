import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import UnitsPerSet, label_masks
from pyro_graphflows.nn.residual import MaskedResidualNet
from tests.networks import randomise
from tests.strategies import parent_sets


def jacobian(net, z, *context):
    """Over one point, (D, D), without any use of the structure."""
    return torch.autograd.functional.jacobian(lambda point: net(point, *context), z)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_diagonal_equals_autograd_on_any_graph(engine, data):
    parents, num_inputs = data.draw(parent_sets())
    size = len(parents)
    allowed = [{v, *members} for v, members in enumerate(parents)]
    net = randomise(
        MaskedResidualNet(
            allowed,
            num_inputs,
            hidden_layers=data.draw(st.integers(1, 3)),
            units_per_set=data.draw(st.integers(1, 3)),
            activation=data.draw(st.sampled_from(["tanh", "elu", "lipswish", "lipmish"])),
            bound=data.draw(st.sampled_from([None, 0.9])),
            engine=engine,
        )
    )
    z = torch.randn(3, size)
    context = (torch.randn(3, num_inputs - size),) if num_inputs > size else ()
    g, diagonal = net.forward_and_diag(z, *context)
    torch.testing.assert_close(g, net(z, *context))
    for i in range(3):
        full = jacobian(net, z[i], *(c[i] for c in context))
        torch.testing.assert_close(diagonal[i], full.diagonal(), rtol=1e-12, atol=1e-12)
        off = torch.ones(size, size, dtype=torch.bool)
        for v, members in enumerate(allowed):
            off[v, [u for u in members if u < size]] = False
        assert (full[off] == 0).all()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_owner_theorem_with_any_label_sets(data):
    """Owners of arbitrary sets, singletons and sets of parents included, give the diagonal of linear nets.

    The units made for a parent set may be owned by another variable; taking the variable that a set was made
    for as its owner would be wrong.
    """
    parents, num_inputs = data.draw(parent_sets(max_nodes=5))
    size = len(parents)
    allowed = [{v, *members} for v, members in enumerate(parents)]
    extra = [{j} for j in range(num_inputs)] + [set(members) for members in parents if members]
    masks = label_masks([*allowed, *extra], num_inputs, UnitsPerSet(2, layers=2))
    weights = [torch.randn(mask.shape) * mask for mask in masks.masks]
    weights[-1] = weights[-1][:size]
    # The owners by their definition, for the labels that the masks carry.
    owners = []
    for labels in masks.labels:
        row = []
        for label in labels:
            found = [v for v in range(size) if v in label and label <= allowed[v]]
            row.append(found[0] if found else -1)
            assert len(found) <= 1
        owners.append(row)
    tangent = torch.zeros(len(owners[0]))
    for unit, v in enumerate(owners[0]):
        tangent[unit] = weights[0][unit, v] if v >= 0 else 0
    for i, upper in enumerate([owners[1], list(range(size))]):
        same = torch.tensor([[a == b and a >= 0 for b in owners[i]] for a in upper])
        tangent = (weights[i + 1] * same) @ tangent
    full = weights[2] @ weights[1] @ weights[0]
    torch.testing.assert_close(tangent, full.diagonal()[:size], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_gradients_of_value_and_diagonal(engine):
    net = randomise(MaskedResidualNet([{0}, {0, 1, 3}, {1, 2}], 4, hidden_layers=2, bound=0.9, engine=engine))
    z = torch.randn(2, 3, requires_grad=True)
    context = torch.randn(2, 1, requires_grad=True)
    assert torch.autograd.gradcheck(net.forward_and_diag, (z, context))
    assert torch.autograd.gradgradcheck(net, (z, context))


@pytest.mark.parametrize("bound", [None, 0.9])
def test_gradients_of_the_weights(bound):
    net = randomise(MaskedResidualNet([{0}, {0, 1}], 2, units_per_set=2, activation="tanh", bound=bound))
    z = torch.randn(3, 2)
    parameters = dict(net.named_parameters())
    masks = {f"layers.{i}.weight": layer.mask for i, layer in enumerate(net.layers)}

    def loss(*values):
        # Set in place, as an optimiser does: the bound must notice.
        with torch.no_grad():
            for parameter, value in zip(parameters.values(), values, strict=True):
                parameter.copy_(value)
        g, diagonal = net.forward_and_diag(z)
        return (g.sin().sum() + (1 + diagonal).log().sum()) if bound else (g.sin().sum() + diagonal.sum())

    start = [parameter.detach().clone() for parameter in parameters.values()]
    grads = torch.autograd.grad(loss(*start), list(parameters.values()))
    for i, (name, grad) in enumerate(zip(parameters, grads, strict=True)):
        direction = torch.randn_like(grad) * masks.get(name, torch.ones_like(grad))
        moved = [
            [w + (step * direction if j == i else 0) for j, w in enumerate(start)] for step in (1e-6, -1e-6)
        ]
        with torch.no_grad():
            numeric = (loss(*moved[0]) - loss(*moved[1])) / 2e-6
        torch.testing.assert_close((grad * direction).sum(), numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize("shapes", [((), ()), ((3,), (3,)), ((4, 3), (3,)), ((3,), (4, 1)), ((2, 3), ())])
def test_batch_shapes_broadcast(engine, shapes):
    net = randomise(MaskedResidualNet([{0, 2}, {0, 1, 3}], 4, engine=engine))
    z, context = (torch.randn(*shape, 2) for shape in shapes)
    batch = torch.broadcast_shapes(*shapes)
    g, diagonal = net.forward_and_diag(z, context)
    assert g.shape == (*batch, 2)
    expanded = net.forward_and_diag(z.expand(*batch, 2), context.expand(*batch, 2))
    torch.testing.assert_close(g, expanded[0])
    torch.testing.assert_close(diagonal.expand(*batch, 2), expanded[1])


def test_one_start_for_many_points():
    net = randomise(MaskedResidualNet([{0, 2}, {0, 1}], 3, bound=0.5))
    context = torch.randn(3, 1)
    evaluation = net.start(context)
    for _ in range(2):
        z = torch.randn(3, 2)
        assert torch.equal(evaluation(z), net(z, context))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_bounds_hold(layers):
    net = randomise(
        MaskedResidualNet(
            [{0, 3}, {0, 1}, {0, 1, 2, 4}], 5, hidden_layers=layers, activation="tanh", bound=0.97
        )
    )
    with torch.no_grad():
        net.context_layer.weight.mul_(100)
    for entries in net.entries():
        assert torch.linalg.matrix_norm(entries, 2) <= 0.97
    assert net.lipschitz == pytest.approx(0.97 ** (layers + 1))
    z, context = torch.randn(50, 3), torch.randn(50, 2)
    diagonal = net.forward_and_diag(z, context)[1]
    assert (diagonal.abs() <= net.diagonal_bound()).all()
    assert (net.diagonal_bound() > 0).all()
    for i in range(5):
        norm = torch.linalg.matrix_norm(jacobian(net, z[i], context[i]), 2)
        assert norm <= net.lipschitz
    # The context is free: pre-activations move with it as its raw weights say.
    moved = net.context_layer(context[0] + 1) - net.context_layer(context[0])
    torch.testing.assert_close(moved, net.context_layer.masked_weight().sum(-1))
    assert MaskedResidualNet([{0}], 1).lipschitz is None


def test_variables_that_do_not_see_themselves():
    net = randomise(MaskedResidualNet([set(), {0}, {1, 2}], 3, hidden_layers=2))
    g, diagonal = net.forward_and_diag(torch.randn(4, 3))
    assert (diagonal[:, :2] == 0).all()
    assert (diagonal[:, 2] != 0).all()
    torch.testing.assert_close(g[:, 0], net.layers[-1].bias[0].expand(4))


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_variables_that_see_the_context_alone(engine):
    net = randomise(MaskedResidualNet([{2}, {3}], 4, engine=engine))
    z, context = torch.randn(5, 2), torch.randn(5, 2)
    g, diagonal = net.forward_and_diag(z, context)
    assert (diagonal == 0).all()
    torch.testing.assert_close(net(z + 1, context), g)
    assert (net(z, context + 1) != g).all()


def test_identity_at_zero_output():
    net = randomise(MaskedResidualNet([{0}, {0, 1}], 2, bound=0.9))
    net.zero_output_()
    g, diagonal = net.forward_and_diag(torch.randn(4, 2))
    assert (g == 0).all()
    assert (diagonal == 0).all()
    (g.sum() + diagonal.sum()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    assert net.layers[-1].weight.grad.abs().sum() > 0


def test_copies_and_state():
    for bound in (None, 0.9):
        net = randomise(MaskedResidualNet([{0, 2}, {0, 1}], 3, bound=bound))
        z, context = torch.randn(4, 2), torch.randn(4, 1)
        expected = net.forward_and_diag(z, context)
        loaded = MaskedResidualNet([{0, 2}, {0, 1}], 3, bound=bound)
        loaded.load_state_dict(net.state_dict())
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), loaded):
            for a, b in zip(other.forward_and_diag(z, context), expected, strict=True):
                assert torch.equal(a, b)
        assert net.to(torch.float32)(z.float(), context.float()).dtype == torch.float32


def test_wrong_use():
    with pytest.raises(GraphflowsError, match="depend on each other"):
        MaskedResidualNet([{0, 1}, {0, 1}], 2)
    with pytest.raises(GraphflowsError, match="at least 2 inputs"):
        MaskedResidualNet([{0}, {1}], 1)
    with pytest.raises(GraphflowsError, match="at least one hidden layer"):
        MaskedResidualNet([{0}], 1, hidden_layers=0)
    with pytest.raises(GraphflowsError, match="derivative is known; got SiLU"):
        MaskedResidualNet([{0}], 1, activation=torch.nn.SiLU())
    with pytest.raises(GraphflowsError, match="lost: b on b"):
        MaskedResidualNet([{0}, {1}], 2, hidden_dims=[1], names="ab")
    net = MaskedResidualNet([{0, 1}], 2)
    with pytest.raises(GraphflowsError, match=r"z.shape\[-1\] == 1; got 2"):
        net(torch.zeros(2), torch.zeros(1))
    with pytest.raises(GraphflowsError, match=r"context.shape\[-1\] == 1; got 0"):
        net(torch.zeros(1))
