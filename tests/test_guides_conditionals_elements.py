"""Parameters and maps for the elements of plates: which row is whose, in full and in part."""

import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.call import PlateState
from pyro_graphflows.guides.conditionals.elements import (
    ElementMap,
    ElementTable,
    SharedFeatures,
    element_maps,
)
from pyro_graphflows.guides.plan import BlockPlan


def plate(name, dim, size, indices=None):
    indices = None if indices is None else torch.tensor(indices)
    return PlateState(name, dim, size if indices is None else len(indices), size, indices)


ROWS, COLUMNS = plate("rows", -2, 3), plate("columns", -1, 4)


def numbered(table):
    """Fill a table with numbers that tell its rows apart."""
    with torch.no_grad():
        table.table.copy_(torch.arange(float(table.table.numel())).reshape(table.table.shape))
    return table


# ---------------------------------------------------------------- tables


def test_a_row_for_each_element():
    table = ElementTable([ROWS, COLUMNS], 2)
    assert table.table.shape == (3, 4, 2)
    assert not table.table.any()  # nothing at the start
    rows = numbered(table)({"rows": ROWS, "columns": COLUMNS})
    assert torch.equal(rows, table.table)


def test_plates_are_at_their_own_dimensions():
    far = plate("far", -3, 5)
    assert ElementTable([far, COLUMNS], 2).table.shape == (5, 1, 4, 2)
    assert ElementTable([far], 2).table.shape == (5, 1, 1, 2)
    assert ElementTable([COLUMNS, far], 2).table.shape == (5, 1, 4, 2)  # whichever comes first
    assert ElementTable([], 2).table.shape == (2,)
    joint = numbered(ElementTable([far, COLUMNS], 2))({"far": far, "columns": COLUMNS})
    assert torch.broadcast_shapes(joint.shape[:-1], (3, 1)) == (5, 3, 4)


@pytest.mark.parametrize(("some_rows", "some_columns"), [([2, 0], None), (None, [3]), ([1, 1, 2], [2, 0])])
def test_rows_under_subsampling(some_rows, some_columns):
    """The indices of a call say whose rows are wanted, in whatever order, and the other plates stay."""
    table = numbered(ElementTable([ROWS, COLUMNS], 2))
    plates = {"rows": plate("rows", -2, 3, some_rows), "columns": plate("columns", -1, 4, some_columns)}
    rows = table(plates)
    chosen = some_rows or range(3), some_columns or range(4)
    for i, row in enumerate(chosen[0]):
        for j, column in enumerate(chosen[1]):
            assert torch.equal(rows[i, j], table.table[row, column])
    assert rows.shape == (len(chosen[0]), len(chosen[1]), 2)


def test_gradients_reach_the_chosen_rows_alone():
    table = ElementTable([COLUMNS], 2)
    table({"columns": plate("columns", -1, 4, [3, 1, 3])}).sum().backward()
    (trained,) = table.parameters()
    assert trained.grad[:, 0].tolist() == [0.0, 1.0, 0.0, 2.0]


def test_the_trained_part_counts_in_natural_units():
    table = ElementTable([COLUMNS], 2)
    start, step, unit = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        table.table.copy_(start)
        table.trained.copy_(step)
        table.unit.copy_(unit)
    torch.testing.assert_close(table({"columns": COLUMNS}), start + unit * step)
    table.set_(slice(1, 2), 7.0)  # a new start: nothing is trained there
    torch.testing.assert_close(table({"columns": COLUMNS})[:, 1], torch.full((4,), 7.0))
    torch.testing.assert_close(table({"columns": COLUMNS})[:, 0], (start + unit * step)[:, 0])


def test_another_number_of_elements_is_refused_by_plate():
    table = ElementTable([ROWS, COLUMNS], 2)
    with pytest.raises(
        GraphflowsError, match=r"plate 'columns' to have 4 elements, .*; got 9. Set up a guide"
    ):
        table({"rows": ROWS, "columns": plate("columns", -1, 9)})
    with pytest.raises(GraphflowsError, match="plate 'rows' to have 3 elements"):
        table({"rows": plate("rows", -2, 2), "columns": COLUMNS})


# ---------------------------------------------------------------- maps


@pytest.mark.parametrize(("num_inputs", "offset"), [(3, False), (3, True), (0, True)])
def test_maps_are_nothing_at_the_start(num_inputs, offset):
    element_map = ElementMap([COLUMNS], num_inputs, 2, offset=offset)
    found = element_map({"columns": COLUMNS}, torch.randn(7, 4, num_inputs))
    assert found.shape == (7, 4, 2) if num_inputs else (4, 2)
    assert not found.any()


def test_maps_that_are_made_affine():
    slopes, offsets = torch.randn(4, 2, 3), torch.randn(4, 2)
    element_map = ElementMap([COLUMNS], 3, 2, offset=True)
    element_map.set_(slopes, offsets)
    inputs = torch.randn(7, 4, 3)
    expected = torch.einsum("eoi,bei->beo", slopes, inputs) + offsets
    torch.testing.assert_close(element_map({"columns": COLUMNS}, inputs), expected)
    part = plate("columns", -1, 4, [2, 0])
    torch.testing.assert_close(element_map({"columns": part}, inputs[:, [2, 0]]), expected[:, [2, 0]])
    shared = element_map({"columns": COLUMNS}, inputs[:, :1])  # what is the same for all elements broadcasts
    torch.testing.assert_close(shared[:, 1], torch.einsum("oi,bi->bo", slopes[1], inputs[:, 0]) + offsets[1])
    steep = ElementMap([COLUMNS], 3, 2, offset=False)
    steep.set_(slopes)
    torch.testing.assert_close(steep({"columns": COLUMNS}, inputs), expected - offsets)


def test_maps_of_two_plates_count_elements_from_the_outer_one():
    slopes = torch.randn(12, 1, 1)
    element_map = ElementMap([ROWS, COLUMNS], 1, 1, offset=False)
    element_map.set_(slopes)
    found = element_map({"rows": ROWS, "columns": COLUMNS}, torch.ones(3, 4, 1))
    torch.testing.assert_close(found, slopes.reshape(3, 4, 1))


def test_maps_learn_what_is_not_affine():
    element_map = ElementMap([COLUMNS], 1, 1, offset=True)
    with torch.no_grad():
        element_map.rows.table.normal_()
    x = torch.linspace(-2, 2, 9).reshape(9, 1, 1)
    found = element_map({"columns": COLUMNS}, x)
    assert (found.diff(n=2, dim=0).abs() > 1e-6).any()
    assert found.shape == (9, 4, 1)


# ---------------------------------------------------------------- the maps of a block


def block_of(levels, plates=("rows", "columns"), per_element=(), **options):
    sites = [site for level in levels for site in level]
    parents = dict.fromkeys(sites, ())
    return BlockPlan(plates, levels, (), parents, per_element, **options)


def test_which_sites_have_maps():
    block = block_of((("a", "b"), ("c", "d")), per_element=("a", "b"), non_exchangeable={"c": ("columns",)})
    seen = {"a": [0, 1], "b": [], "c": [2], "d": [0]}
    maps, found = element_maps(block, seen, dict.fromkeys("abcd", 5), [ROWS, COLUMNS])
    # a has slopes beside its parameters, b nothing to have slopes of; c needs a map, d none
    assert found == {"a": ("0", [0, 1]), "c": ("2", [2])}
    assert set(maps) == {"0", "2"}
    assert not maps["0"].offset  # the parameters for each element are its offset
    assert maps["2"].offset
    assert maps["0"].rows.sizes == {"rows": 3, "columns": 4}
    assert maps["2"].rows.sizes == {"columns": 4}
    assert (maps["2"].num_inputs, maps["2"].num_outputs) == (1, 5)


def test_a_site_whose_elements_are_not_alike_has_an_offset_without_inputs():
    block = block_of((("c",),), non_exchangeable={"c": ("rows",)})
    maps, found = element_maps(block, {"c": []}, {"c": 2}, [ROWS, COLUMNS])
    assert found == {"c": ("0", [])}
    maps["0"].set_(torch.zeros(3, 2, 0), torch.arange(6.0).reshape(3, 2))
    found = maps["0"]({"rows": ROWS, "columns": COLUMNS}, torch.zeros(3, 4, 0))
    assert torch.equal(found.expand(3, 4, 2)[:, 0], torch.arange(6.0).reshape(3, 2))


def test_too_many_inputs_leave_elements_without_slopes():
    block = block_of((("a",),), per_element=("a",))
    assert element_maps(block, {"a": list(range(65))}, {"a": 2}, [ROWS, COLUMNS])[1] == {}
    assert element_maps(block, {"a": list(range(64))}, {"a": 2}, [ROWS, COLUMNS])[1] != {}


# ---------------------------------------------------------------- features that elements share


def test_shared_features_are_two_layers_of_one_parameter():
    torch.manual_seed(0)
    features = SharedFeatures(3, 5)
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ELU(), torch.nn.Linear(5, 5), torch.nn.ELU())
    x = torch.randn(4, 3)
    assert len(list(features.parameters())) == 1
    torch.testing.assert_close(features(x), layers(x))
    torch.testing.assert_close(torch.stack([features(row) for row in x]), layers(x))
    features(x[0]).sum().backward()
    layers(x[0]).sum().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in layers.parameters()])
    torch.testing.assert_close(features.weights.grad, expected)
