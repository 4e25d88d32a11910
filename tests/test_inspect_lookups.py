"""Plates whose elements look up those of others, found by changing some of these."""

import torch
from lookup_models import DISTRICT, GROUP, crossed, districts, latent_groups, slopes, two_groups

from pyro_graphflows.inspect import nested_by_index, trace_model


def found(model, *args):
    nested = nested_by_index(model, args, traced=trace_model(model, args))
    return {inner: tuple(outers) for inner, outers in nested.items()}


def test_an_index_nests_data_in_groups():
    assert found(slopes, GROUP, torch.randn(7), torch.randn(7)) == {"data": ("groups",)}


def test_two_groups_for_each_datum_are_no_nesting():
    assert found(two_groups, GROUP, GROUP.flip(0), torch.randn(7)) == {}
    assert found(two_groups, GROUP, GROUP, torch.randn(7)) == {"data": ("groups",)}


def test_a_latent_index_is_no_nesting():
    assert found(latent_groups, torch.randn(12)) == {}


def test_groups_of_groups():
    args = GROUP, DISTRICT, torch.randn(7)
    assert found(districts, *args) == {"schools": ("districts",), "pupils": ("schools",)}


def test_crossed_effects_look_up_one_element_of_each():
    i, j = torch.randint(0, 4, (15,)), torch.randint(0, 3, (15,))
    nested = nested_by_index(
        crossed, (i, j, torch.randn(15)), traced=trace_model(crossed, (i, j, torch.randn(15)))
    )
    assert list(nested) == ["data"]
    assert torch.equal(nested["data"]["rows"], i)
    assert torch.equal(nested["data"]["columns"], j)
