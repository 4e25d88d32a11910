import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import SparseMask, UnitsPerSet, allowed_mask, label_masks
from tests.strategies import parent_sets


def product(masks):
    """The Boolean product, from the inputs to the outputs."""
    total = masks[0]
    for mask in masks[1:]:
        total = (mask.double() @ total.double()) > 0
    return total


def promised(allowed, num_inputs):
    mask = torch.zeros(len(allowed), num_inputs, dtype=torch.bool)
    for k, members in enumerate(allowed):
        mask[k, list(members)] = True
    return mask


@st.composite
def families(draw, max_inputs=7, max_outputs=8):
    num_inputs = draw(st.integers(0, max_inputs))
    element = st.integers(0, num_inputs - 1) if num_inputs else st.nothing()
    members = st.sets(element) if num_inputs else st.just(set())
    return draw(st.lists(members, min_size=1, max_size=max_outputs)), num_inputs


def test_chain_and_complete_graph_as_text():
    chain = label_masks([[], [0], [1]], 3, UnitsPerSet(1))
    assert ["".join(" x"[int(e)] for e in row) for row in chain.masks[0]] == ["x  ", " x "]
    assert ["".join(" x"[int(e)] for e in row) for row in chain.masks[1]] == ["  ", "x ", " x"]
    full = label_masks([[], [0], [0, 1], [0, 1, 2]], 4, UnitsPerSet(1, layers=2))
    assert ["".join(" x"[int(e)] for e in row) for row in full.masks[0]] == ["x   ", "xx  ", "xxx "]
    assert ["".join(" x"[int(e)] for e in row) for row in full.masks[1]] == ["x  ", "xx ", "xxx"]
    assert ["".join(" x"[int(e)] for e in row) for row in full.masks[2]] == ["   ", "x  ", "xx ", "xxx"]


@settings(deadline=None, max_examples=80)
@given(families(), st.integers(0, 3), st.integers(1, 3))
def test_product_of_the_masks_is_the_promise(family, hidden_layers, units_per_set):
    allowed, num_inputs = family
    result = label_masks(allowed, num_inputs, UnitsPerSet(units_per_set, layers=hidden_layers))
    assert torch.equal(product(result.masks), promised(allowed, num_inputs))
    for labels, below, mask in zip(
        result.labels, [[{j} for j in range(num_inputs)], *result.labels], result.masks, strict=False
    ):
        subset = [[lower <= upper for lower in below] for upper in labels]
        assert mask.tolist() == (subset if num_inputs else mask.tolist())
    distinct = {frozenset(members) for members in allowed if members}
    assert result.hidden_dims == (units_per_set * len(distinct),) * hidden_layers


@settings(deadline=None, max_examples=80)
@given(families(), st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_explicit_widths_keep_the_promise_or_raise(family, hidden_dims):
    allowed, num_inputs = family
    distinct = {frozenset(members) for members in allowed if members}
    try:
        result = label_masks(allowed, num_inputs, hidden_dims)
    except GraphflowsError:
        assert min(hidden_dims) < len(distinct)
        return
    assert torch.equal(product(result.masks), promised(allowed, num_inputs))
    if distinct:
        assert result.hidden_dims == tuple(hidden_dims)
    for labels in result.labels:
        counts = [labels.count(members) for members in distinct]
        assert not counts or max(counts) - min(counts) <= 1


def test_too_narrow_names_what_would_be_lost():
    allowed = [[0], [0, 1], [2]]
    with pytest.raises(GraphflowsError, match=r"2 on 2. 3 units in every hidden layer are always enough"):
        label_masks(allowed, 3, [3, 2])
    with pytest.raises(GraphflowsError, match=r"lost: v on b; w on c"):
        label_masks(allowed, 3, [1], names=("abc", "uvw"))
    many = [[j] for j in range(12)]
    with pytest.raises(GraphflowsError, match=r"10 on 10; \.\.\."):
        label_masks(many, 12, [1])


def test_a_union_of_smaller_sets_is_served_last():
    allowed = [[0, 1], [0], [1]]
    result = label_masks(allowed, 2, [2])
    assert result.labels[0] == (frozenset({0}), frozenset({1}))
    assert torch.equal(product(result.masks), promised(allowed, 2))


def test_the_original_width_of_a_large_flow_raises():
    """Sets {v} and parents of v never coincide nor cover each other, so D units are needed."""
    rng = np.random.default_rng(0)
    allowed = [{v, *rng.choice(v, min(v, 3), replace=False).tolist()} if v else {0} for v in range(107)]
    with pytest.raises(GraphflowsError, match="107 distinct label sets"):
        label_masks(allowed, 107, [100])
    assert torch.equal(product(label_masks(allowed, 107, [107]).masks), promised(allowed, 107))


def test_levels_sort_the_sets():
    allowed = [[2, 3], [0], [3], [1]]
    levels = [1, 0, 2, 0]
    result = label_masks(allowed, 4, UnitsPerSet(2), input_levels=levels)
    of_units = [max(levels[j] for j in label) for label in result.labels[0]]
    assert of_units == sorted(of_units)
    assert result.labels[0][0] == frozenset({3})
    assert torch.equal(product(result.masks), promised(allowed, 4))


def test_wrong_arguments():
    with pytest.raises(GraphflowsError, match=r"indices of inputs below 2; got \[2, 5\]"):
        label_masks([[0, 5], [2]], 2)
    with pytest.raises(GraphflowsError, match=r"below 2; got \[-1\]"):
        allowed_mask([[-1]], 2)
    with pytest.raises(GraphflowsError, match="units_per_set >= 1"):
        label_masks([[0]], 1, UnitsPerSet(0))
    with pytest.raises(GraphflowsError, match=r"positive hidden_dims; got \[4, 0\]"):
        label_masks([[0]], 1, [4, 0])


def owner_by_definition(label, allowed):
    found = [v for v, members in enumerate(allowed) if v in label and label <= set(members)]
    assert len(found) <= 1
    return found[0] if found else -1


@settings(deadline=None, max_examples=80)
@given(parent_sets())
def test_owners(drawn):
    parents, num_inputs = drawn
    allowed = [{v, *members} for v, members in enumerate(parents)]
    result = label_masks(allowed, num_inputs, UnitsPerSet(2))
    assert result.owners[0].tolist() == [owner_by_definition(s, allowed) for s in result.labels[0]]
    assert result.owners[0].tolist() == [v for v in range(len(parents)) for _ in range(2)]
    # Sets of parents alone have no owner: a conditional factor has no path from a variable to itself.
    factors = label_masks(parents, num_inputs, UnitsPerSet(layers=2))
    assert all((owners == -1).all() for owners in factors.owners)


def test_two_owners_raise():
    with pytest.raises(GraphflowsError, match="outputs 0, 1 depend on each other"):
        _ = label_masks([[0, 1], [0, 1]], 2).owners


def test_sparse_mask():
    dense = torch.tensor([[True, False, True], [False, False, True]])
    mask = SparseMask.from_dense(dense)
    assert mask.nnz == 3
    assert torch.equal(mask.to_dense(), dense)
    assert torch.equal(mask.repeat_rows(2).to_dense(), dense.repeat_interleave(2, 0))
    assert mask.repeat_rows(1) is mask


def test_ten_thousand_variables_stay_sparse():
    rng = np.random.default_rng(0)
    size = 10_000
    allowed = [
        {v, 0, *rng.integers(max(0, v - 50), v, 3).tolist()} if v else {0} for v in range(size)
    ]  # one parent of all
    result = label_masks(allowed, size, UnitsPerSet(4, layers=2))
    assert result.hidden_dims == (4 * size, 4 * size)
    assert result.patterns[0].nnz < 5 * 4 * size
    assert max(pattern.nnz for pattern in result.patterns) < 40 * size
    assert result.owners[0].tolist() == list(itertools.chain.from_iterable([v] * 4 for v in range(size)))
