import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.nn.mlp import MaskedMLP
from tests.networks import randomise


def autoregressive(num_observed, parents, **kwargs):
    """Inputs: observed values, then variables; ``parents[v]`` are variables before v, and all observed."""
    levels = []
    for members in parents:
        levels.append(max((levels[u] + 1 for u in members), default=0))
    allowed = [{*range(num_observed), *(num_observed + u for u in members)} for members in parents]
    input_levels = [0] * num_observed + [level + 1 for level in levels]
    return MaskedMLP(allowed, num_observed + len(parents), input_levels=input_levels, **kwargs)


SETTINGS = {
    "default": {},
    "deep": {"hidden_layers": 3, "units_per_set": 2},
    "linear": {"hidden_dims": []},
    "linear without skip": {"hidden_dims": [], "skip": False},
    "made": {"hidden_dims": [40, 40], "activation": "relu", "skip": False},
    "one parameter": {"num_params": 1, "activation": "tanh"},
    "sparse": {"engine": "sparse", "hidden_layers": 2},
    "sparse linear": {"engine": "sparse", "hidden_dims": [], "skip": False},
}
PARENTS = [[], [0], [0, 1], [], [2, 3], [1], []]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_levels_equal_one_pass(name, batch):
    mlp = randomise(autoregressive(2, PARENTS, **SETTINGS[name]))
    x = torch.randn(*batch, mlp.input_dim)
    full = mlp(x)
    assert full.shape == (*batch, len(PARENTS), mlp.num_params)
    evaluation = mlp.start()
    for level, (inputs, outputs) in enumerate(zip(mlp.inputs_by_level, mlp.outputs_by_level, strict=True)):
        assert evaluation.level == level
        out = evaluation.step(x[..., list(inputs)])
        torch.testing.assert_close(out, full[..., list(outputs), :])
    assert mlp.output_levels == (0, 1, 2, 0, 3, 2, 0)
    assert mlp.outputs_by_level == ((0, 3, 6), (1,), (2, 5), (4,))
    assert mlp.inputs_by_level == ((0, 1), (2, 5, 8), (3,), (4, 7))


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_may_be_wanted_later_and_evaluations_fork(name):
    wanted = [0, 1, 3, 0, 3, 3, 2]
    made = autoregressive(2, PARENTS, **SETTINGS[name])
    levels = [0, 0, 1, 2, 3, 1, 4, 3, 1]
    mlp = randomise(MaskedMLP(made.allowed, 9, input_levels=levels, output_levels=wanted, **SETTINGS[name]))
    x = torch.randn(3, 9)
    full = mlp(x)
    evaluation = mlp.start()
    for inputs, outputs in zip(mlp.inputs_by_level, mlp.outputs_by_level, strict=True):
        other = evaluation.fork()
        other.step(torch.randn(3, len(inputs)))
        torch.testing.assert_close(evaluation.step(x[:, list(inputs)]), full[:, list(outputs)])
    assert mlp.output_levels == tuple(wanted)
    with pytest.raises(GraphflowsError, match=r"below for the outputs \[1\]"):
        MaskedMLP([[], [0]], 1, input_levels=[1], output_levels=[0, 0])


@pytest.mark.parametrize("name", SETTINGS)
def test_both_ways_have_the_same_gradients(name):
    mlp = randomise(autoregressive(2, PARENTS, **SETTINGS[name]))
    x = torch.randn(5, mlp.input_dim, requires_grad=True)
    weights = torch.randn(len(PARENTS), mlp.num_params)
    full = torch.autograd.grad((mlp(x) * weights).sum(), [x, *mlp.parameters()], allow_unused=True)
    evaluation = mlp.start()
    total = sum(
        (evaluation.step(x[:, list(inputs)]) * weights[list(outputs)]).sum()
        for inputs, outputs in zip(mlp.inputs_by_level, mlp.outputs_by_level, strict=True)
    )
    sliced = torch.autograd.grad(total, [x, *mlp.parameters()], allow_unused=True)
    for a, b in zip(full, sliced, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", SETTINGS)
def test_jacobian_is_exactly_the_promise(name):
    mlp = randomise(autoregressive(2, PARENTS, **SETTINGS[name]))
    jacobians = [torch.autograd.functional.jacobian(mlp, torch.randn(mlp.input_dim)) for _ in range(5)]
    seen = (torch.stack(jacobians) != 0).any(0)  # (D, num_params, input_dim)
    for k, members in enumerate(mlp.allowed):
        for p in range(mlp.num_params):
            assert set(seen[k, p].nonzero().flatten().tolist()) == members


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_order_of_inputs_and_outputs(engine, data):
    num_inputs = data.draw(st.integers(1, 6))
    levels = data.draw(st.lists(st.integers(0, 3), min_size=num_inputs, max_size=num_inputs))
    allowed = data.draw(st.lists(st.sets(st.integers(0, num_inputs - 1)), min_size=1, max_size=6))
    mlp = randomise(
        MaskedMLP(
            allowed,
            num_inputs,
            input_levels=levels,
            hidden_layers=data.draw(st.integers(0, 2)),
            skip=data.draw(st.booleans()),
            engine=engine,
        )
    )
    x = torch.randn(4, num_inputs)
    full = mlp(x)
    evaluation = mlp.start()
    for inputs, outputs in zip(mlp.inputs_by_level, mlp.outputs_by_level, strict=True):
        torch.testing.assert_close(evaluation.step(x[:, list(inputs)]), full[:, list(outputs)])
    assert sorted(k for group in mlp.outputs_by_level for k in group) == list(range(len(allowed)))


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_engines_agree_after_loading(engine):
    other = "sparse" if engine == "dense" else "dense"
    mlp = randomise(autoregressive(2, PARENTS, hidden_layers=2, engine=engine))
    same = autoregressive(2, PARENTS, hidden_layers=2, engine=other)
    same.load_state_dict(mlp.state_dict())
    x = torch.randn(3, mlp.input_dim)
    torch.testing.assert_close(same(x), mlp(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_batch_shapes_broadcast_on_the_left(engine):
    mlp = randomise(autoregressive(2, PARENTS, hidden_layers=2, engine=engine))
    shapes = [(3,), (4, 3), (3,), (5, 1, 1)]
    evaluation = mlp.start()
    values = [
        torch.randn(*shape, len(inputs)) for shape, inputs in zip(shapes, mlp.inputs_by_level, strict=True)
    ]
    outs = [evaluation.step(value) for value in values]
    assert [out.shape[:-2] for out in outs] == [(3,), (4, 3), (4, 3), (5, 4, 3)]
    x = torch.zeros(5, 4, 3, mlp.input_dim)
    for value, inputs in zip(values, mlp.inputs_by_level, strict=True):
        x[..., list(inputs)] = value.expand(5, 4, 3, len(inputs))
    full = mlp(x)
    for out, outputs in zip(outs, mlp.outputs_by_level, strict=True):
        torch.testing.assert_close(out.expand(5, 4, 3, -1, -1), full[..., list(outputs), :])


def test_outputs_without_inputs_are_their_bias():
    for kwargs in ({}, {"skip": False}, {"hidden_dims": []}, {"engine": "sparse"}):
        mlp = randomise(MaskedMLP([[], [0], []], 1, input_levels=[1], **kwargs))
        bias = (mlp.layers[-1] if mlp.skip is None else mlp.skip).bias.reshape(3, 2)
        torch.testing.assert_close(mlp(torch.randn(4, 1))[:, [0, 2]], bias[[0, 2]].expand(4, 2, 2))
        evaluation = mlp.start()
        torch.testing.assert_close(evaluation.step(), bias[[0, 2]])
        assert evaluation.step(torch.randn(4, 1)).shape == (4, 1, 2)
        torch.testing.assert_close(mlp.start().step(torch.zeros(4, 0)), bias[[0, 2]].expand(4, 2, 2))
    no_inputs = MaskedMLP([[], []], 0)
    assert no_inputs(torch.zeros(3, 0)).shape == (3, 2, 2)


def test_zero_output_leaves_the_linear_part():
    mlp = randomise(autoregressive(2, PARENTS, hidden_layers=2))
    mlp.zero_output_()
    x = torch.randn(3, mlp.input_dim)
    torch.testing.assert_close(mlp(x), mlp.skip(x).reshape(3, len(PARENTS), 2))
    mlp(x).sum().backward()
    assert mlp.layers[-1].weight.grad.abs().sum() > 0
    made = randomise(autoregressive(2, PARENTS, skip=False))
    made.zero_output_()
    assert (made(x) == 0).all()


def test_rows_of_the_skip():
    mlp = MaskedMLP([[0], [1]], 2, num_params=3, hidden_dims=[])
    with torch.no_grad():
        mlp.skip.weight[4, 1] = 7.0  # output 1, parameter 1
    assert mlp(torch.tensor([0.0, 1.0]))[1, 1] == 7.0


def test_copies_state_and_dtype():
    mlp = autoregressive(2, PARENTS)
    x = torch.randn(3, mlp.input_dim)
    for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert torch.equal(other(x), mlp(x))
    other = randomise(autoregressive(2, PARENTS))
    other.load_state_dict(mlp.state_dict())
    assert torch.equal(other(x), mlp(x))
    assert set(mlp.state_dict()) == {
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.weight",
        "skip.weight",
        "skip.bias",
    }
    single = mlp.to(torch.float32)
    assert single.start().step(x[:, :2].float()).dtype == torch.float32


def test_a_fresh_network_does_not_hide_the_order_of_the_state():
    """Weights are stored in the order of the arguments, whatever the levels."""
    allowed = [[0], [1], [0, 1]]
    late = MaskedMLP(allowed, 2, input_levels=[1, 0], hidden_dims=[])
    early = MaskedMLP(allowed, 2, hidden_dims=[])
    early.load_state_dict(late.state_dict())
    x = torch.randn(4, 2)
    assert torch.equal(early(x), late(x))


def test_wrong_use():
    mlp = autoregressive(2, PARENTS)
    with pytest.raises(GraphflowsError, match=r"x.shape\[-1\] == 9; got 3"):
        mlp(torch.zeros(3))
    evaluation = mlp.start()
    with pytest.raises(GraphflowsError, match=r"x_new.shape\[-1\] == 2 at level 0; got 1"):
        evaluation.step(torch.zeros(1))
    with pytest.raises(GraphflowsError, match=r"== 2 at level 0; got 0"):
        evaluation.step()
    for inputs in mlp.inputs_by_level:
        evaluation.step(torch.zeros(len(inputs)))
    with pytest.raises(GraphflowsError, match="at most 4 steps"):
        evaluation.step(torch.zeros(1))
    with pytest.raises(GraphflowsError, match="num_params >= 1"):
        MaskedMLP([[0]], 1, num_params=0)
    with pytest.raises(GraphflowsError, match="Expected 2 input_levels"):
        MaskedMLP([[0]], 2, input_levels=[0])
    with pytest.raises(GraphflowsError, match="none negative"):
        MaskedMLP([[0]], 1, input_levels=[-1])
    with pytest.raises(GraphflowsError, match="activation among elu"):
        MaskedMLP([[0]], 1, activation="sine")
