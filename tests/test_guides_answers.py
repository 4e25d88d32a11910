"""The arithmetic of what users ask of a guide, against sums, quantiles and broadcasting written out."""

import pyro
import pytest
import torch

from pyro_graphflows.guides.answers import expanded_in_plates, quantiles_of, sum_of_terms


def test_terms_in_other_plates_are_summed_over_what_they_do_not_share():
    outer, inner = torch.randn(4, 1, 1), torch.randn(4, 3, 2)
    expected = [float(outer[i].sum() + inner[i].sum()) for i in range(4)]
    assert sum_of_terms([outer, inner], 2).tolist() == pytest.approx(expected)
    assert torch.equal(sum_of_terms([inner, inner], 0), 2 * inner)
    assert float(sum_of_terms([torch.tensor(1.0), torch.ones(3)], 1)) == 4.0


def test_values_have_all_elements_of_their_plates():
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1)
    assert expanded_in_plates(torch.tensor(1.0), (), []).shape == ()
    assert expanded_in_plates(torch.tensor(1.0), (), [rows, columns]).shape == (3, 2)
    assert expanded_in_plates(torch.ones(5), (5,), [columns]).shape == (2, 5)
    assert expanded_in_plates(torch.ones(7, 1, 2), (), [rows, columns]).shape == (7, 3, 2)


def test_quantiles_of_numbers_are_between_draws_and_those_of_classes_are_draws():
    draws = torch.stack([torch.arange(10), torch.arange(10).flip(0)], 1)
    p = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.double)
    assert quantiles_of(draws.double(), p, discrete=False)[:, 0].tolist() == [0.0, 2.25, 4.5, 9.0]
    assert quantiles_of(draws, p, discrete=True).tolist() == [[0, 0], [2, 2], [4, 4], [9, 9]]
