"""Natural units: coordinates that change what a step of training does, and nothing else."""

import copy
import pickle

import pytest
import torch

from pyro_graphflows.nn import masked
from pyro_graphflows.nn.masked import LowRankWhitener, Whiteners, whitener
from pyro_graphflows.nn.mlp import MaskedMLP

ALLOWED = {
    "one set": [[0, 1, 2], [0, 1, 2]],
    "nothing and one": [[], [0], []],
    "several sets": [[], [0], [0, 1], [0, 1, 2, 3], [1, 3], [0, 1]],
    "unused inputs": [[1, 2], [1, 2], []],
}
LEVELS = [0, 0, 1, 2]


def network(name, **options):
    allowed = ALLOWED[name]
    size = 1 + max((j for own in allowed for j in own), default=0) + (name == "unused inputs")
    return MaskedMLP(
        allowed,
        size,
        num_params=2,
        input_levels=LEVELS[:size],
        natural_units=True,
        units_per_set=5,
        **options,
    )


def moments(size):
    root = torch.randn(size, size)
    return root @ root.T + 0.01 * torch.eye(size)


def whiten_and_spoil_(mlp):
    mlp.whiten_(moments(mlp.input_dim))
    with torch.no_grad():
        mlp.units.unit.uniform_(0.1, 2.0)
        for parameter in mlp.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mlp


@pytest.mark.parametrize("way", ["by row", "shared", "gathered", "sparse", "plain", "low rank"])
@pytest.mark.parametrize("name", ALLOWED)
def test_masks_and_levels_hold_whichever_way_rows_are_whitened(name, way, monkeypatch):
    if way in ("shared", "gathered"):
        monkeypatch.setattr(masked, "MOST_BY_ROW", 0)
    if way == "plain":
        monkeypatch.setattr(masked, "MOST_NUMBERS", 0)
    if way == "low rank":
        monkeypatch.setattr(masked, "WIDE", 1)
        monkeypatch.setattr(masked, "SHARE_WIDEST", 1)
    mlp = whiten_and_spoil_(network(name, engine="sparse" if way == "sparse" else "dense", hidden_layers=2))
    x = torch.randn(mlp.input_dim)
    jacobian = torch.autograd.functional.jacobian(mlp, x)  # (D, num_params, inputs)
    for row, own in zip(jacobian, ALLOWED[name], strict=True):
        others = [j for j in range(mlp.input_dim) if j not in own]
        assert (row[:, others] == 0).all()
        assert (row[:, list(own)] != 0).all()
    evaluation, full = mlp.start(), mlp(x.expand(4, -1))
    for inputs, outputs in zip(mlp.inputs_by_level, mlp.outputs_by_level, strict=False):
        found = evaluation.step(x[list(inputs)].expand(4, -1) if inputs else None)
        torch.testing.assert_close(found.expand(4, -1, -1), full[:, list(outputs)])


def test_the_ways_give_the_same_numbers(monkeypatch):
    mlp = whiten_and_spoil_(network("several sets", engine="dense"))
    x = torch.randn(3, 4)
    wanted = mlp(x)
    monkeypatch.setattr(masked, "MOST_BY_ROW", 0)
    for engine in ("dense", "sparse"):
        other = network("several sets", engine=engine)
        state = mlp.state_dict()
        if engine == "sparse":  # buffers are in the layout of the engine
            row, column = other.skip.pattern.row, other.skip.pattern.column
            state["units.offset"] = state["units.offset"][row, column]
        other.load_state_dict(state)
        assert other.units.of_linear.way == "gathered"
        torch.testing.assert_close(other(x), wanted)


@pytest.mark.parametrize("options", [{"hidden_layers": 2}, {"hidden_dims": []}, {"skip": False}], ids=str)
def test_whitened_inputs_give_the_same_numbers_as_whitened_weights(options, monkeypatch):
    allowed = [[0, 1, 2, 3, 5], [0, 1, 2, 3, 5], []]
    mlp = MaskedMLP(allowed, 7, natural_units=True, engine="dense", **options)
    assert mlp.units.whiteners.low_rank is None  # too few inputs
    monkeypatch.setattr(masked, "WIDE", 5)
    monkeypatch.setattr(masked, "SHARE_WIDEST", 2)
    mlp = whiten_and_spoil_(MaskedMLP(allowed, 7, natural_units=True, engine="dense", **options))
    x = torch.randn(3, 7)
    of_weights = mlp.multiplied(*mlp.weights(), x).unflatten(-1, (3, 2))
    wanted = [of_weights, *torch.autograd.grad(of_weights.square().sum(), list(mlp.parameters()))]
    assert mlp.units.prefers_whitened(x)
    assert not mlp.units.prefers_whitened(x.clone().requires_grad_())
    assert not mlp.units.prefers_whitened(x.expand(1000, 3, 7))
    found = [mlp(x), *torch.autograd.grad(mlp(x).square().sum(), list(mlp.parameters()))]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(mlp.start().step(x), wanted[0])
    torch.testing.assert_close(mlp.flat(x[:, :6]), wanted[0].flatten(-2))  # no output looks at the last input
    if mlp.skip is not None:
        weights, bias = torch.randn(6, 7), torch.randn(6)
        mlp.set_linear_(slice(0, 6), weights, bias, unit=0.1 + torch.rand(6))
        weights[:, [4, 6]] = weights[4:] = 0.0
        torch.testing.assert_close(mlp(x).flatten(1), x @ weights.T + bias)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_outputs_become_a_linear_map_whatever_the_units(engine):
    mlp = whiten_and_spoil_(network("several sets", engine=engine))
    weights, bias = torch.randn(12, 4), torch.randn(12)
    mlp.set_linear_(slice(0, 12), weights, bias, unit=0.1 + torch.rand(12))
    mask = torch.zeros(12, 4)
    for k, own in enumerate(ALLOWED["several sets"]):
        mask[2 * k : 2 * k + 2, own] = 1.0
    x = torch.randn(5, 4)
    torch.testing.assert_close(mlp(x).flatten(1), x @ (weights * mask).T + bias)
    mlp.whiten_(moments(4))
    torch.testing.assert_close(mlp(x).flatten(1), x @ (weights * mask).T + bias)


@pytest.mark.parametrize("options", [{"engine": "dense"}, {"engine": "sparse"}, {"skip": False}], ids=str)
def test_other_units_leave_the_function_and_scale_steps(options):
    mlp = whiten_and_spoil_(network("several sets", **options))
    x, rate = torch.randn(5, 4), 1e-3
    before, units = mlp(x).flatten(1), 0.1 + torch.rand(12)
    mlp.change_units_(units)
    torch.testing.assert_close(mlp(x).flatten(1), before)
    bias = mlp.layers[-1].bias if mlp.skip is None else mlp.skip.bias
    with torch.no_grad():
        bias.add_(rate)
    torch.testing.assert_close(mlp(x).flatten(1), before + rate * units)


def test_a_step_moves_an_output_by_its_unit_however_many_and_collinear_the_features():
    """With the sign of the gradient as step, as Adam's first is: at most the root of the rank times rate and unit."""
    n, d, rate = 2000, 60, 1e-2
    x = torch.randn(n, 5) @ torch.randn(5, d) + 0.001 * torch.randn(n, d)
    mlp = MaskedMLP([list(range(d))], d, num_params=1, hidden_dims=[], natural_units=True)
    mlp.whiten_(x.T @ x / n)
    rank = int(mlp.units.whiteners.rank)
    mlp.set_linear_(slice(0, 1), 100 * torch.randn(1, d), torch.zeros(1), unit=torch.tensor([0.01]))
    before = mlp(x)[:, 0, 0]
    before.sum().backward()
    with torch.no_grad():
        mlp.skip.weight -= rate * mlp.skip.weight.grad.sign()
    moved = (mlp(x)[:, 0, 0] - before).square().mean().sqrt()
    assert moved <= rate * 0.01 * (d / rank) ** 0.5 * rank**0.5 * 1.01
    assert moved > 0


def test_whiteners_leave_out_what_does_not_vary():
    x = torch.randn(500, 3) @ torch.randn(3, 6)
    matrix, rank = whitener(x.T @ x / len(x))
    assert rank == 3
    t = x @ matrix.T
    torch.testing.assert_close(t.T @ t / len(x), torch.diag(torch.tensor([1.0] * 3 + [0.0] * 3)))
    assert whitener(torch.zeros(2, 2))[1] == 0


def test_a_whitener_of_low_rank_makes_the_widest_directions_one_and_no_direction_wider():
    """A few wide directions beside noise, as of pixels that follow a few latents."""
    size, number = 160, 3
    axes = torch.linalg.qr(torch.randn(size, size)).Q
    values = torch.cat([torch.tensor([900.0, 100.0, 30.0]), 0.5 + torch.rand(size - number)])
    found = LowRankWhitener(range(size))
    x = torch.randn(4, size)
    torch.testing.assert_close(found(x), x)
    total = found.fit_(axes @ values.diag() @ axes.T)
    matrix = found(torch.eye(size))
    torch.testing.assert_close(matrix, matrix.T)
    assert int((found.stretch != 0.0).sum()) == number
    whitened = torch.linalg.eigvalsh(matrix @ axes @ values.diag() @ axes.T @ matrix)
    torch.testing.assert_close(whitened[-number - 1 :], torch.ones(number + 1))
    assert whitened.min() >= 0.99 * 0.5 / 1.5
    torch.testing.assert_close(whitened.sum(), torch.tensor(total))
    torch.testing.assert_close(found.undo(found(x)), x)
    found.fit_(torch.diag(torch.tensor([4.0] * 2 + [0.0] * (size - 2))))  # fewer samples than inputs
    torch.testing.assert_close(found(torch.eye(size)[0])[0], torch.tensor(0.5))
    others = found(torch.eye(size)[5])[5]
    assert others < 100  # what did not vary is no reason for any weight
    with pytest.raises(IndexError):
        found(x[:, :10])
    assert found.fit_(torch.zeros(size, size)) == 0.0  # of a single data set
    assert not found(x).any()
    assert not found.undo(x).any()


def test_many_inputs_of_which_none_varies_leave_a_network_finite():
    size = 160
    mlp = MaskedMLP([list(range(size))], size, num_params=2, natural_units=True)
    assert mlp.units.whiteners.low_rank is not None
    mlp.whiten_(torch.zeros(size, size))
    assert all(parameter.isfinite().all() for parameter in mlp.parameters())
    x = torch.randn(3, size)
    torch.testing.assert_close(mlp(x), mlp(torch.zeros_like(x)))


def test_whiteners_of_many_sets_are_kept_by_size(monkeypatch):
    monkeypatch.setattr(masked, "SMALL", 0)
    sets = [(0,), (0, 1), (1, 2), tuple(range(12)), tuple(range(11))]
    found = Whiteners(sets)
    assert found.groups == [[0], [1, 2], [3, 4]]
    c = moments(12)
    found.fit_(c)
    for i, own in enumerate(sets):
        matrix = found.embedded(i, 12)
        product = matrix @ c @ matrix.T
        torch.testing.assert_close(product.diagonal().sum(), found.rank[i].to(product), rtol=1e-6, atol=1e-6)
        outside = [j for j in range(12) if j not in own]
        assert (matrix[:, outside] == 0).all()
    monkeypatch.setattr(masked, "MOST_NUMBERS", 100)
    assert Whiteners(sets).groups == []


def test_constants_follow_what_they_come_from():
    mlp = whiten_and_spoil_(network("several sets"))
    x = torch.randn(3, 4)
    before = mlp(x)
    for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        torch.testing.assert_close(other(x), before)
    with torch.no_grad():
        mlp.units.unit.mul_(2.0)
    assert not torch.allclose(mlp(x), before)
    single = mlp.float()
    assert single(x.float()).dtype == torch.float32
    torch.testing.assert_close(single.double()(x), mlp(x))
