import sys

import pytest
import torch

from pyro_graphflows.errors import GraphflowsError, MissingExtraError
from pyro_graphflows.infer.classifier_test import c2st

pytest.importorskip("sklearn")


def test_alike_apart_and_between():
    """The best accuracy for N(0, 1) and N(2, 1) is Phi(1) = .841, for equal ones .5; errors of 400 guesses."""
    first = torch.randn(200, 1)
    error = 0.5 / 400**0.5
    assert abs(c2st(first, torch.randn(200, 1)) - 0.5) < 5 * error
    assert abs(c2st(first, torch.randn(200, 1) + 2) - 0.841) < 5 * error
    assert c2st(first, torch.randn(200, 1) + 20) == 1.0


def test_dependence_is_seen():
    """Equal marginals; the second set's numbers are the same ones."""
    one = torch.randn(150, 1)
    assert c2st(torch.randn(150, 2), torch.cat([one, one], 1)) > 0.8


def test_sites_and_seeds():
    first = {"a": torch.randn(30), "b": torch.randn(30, 2)}
    second = {"b": torch.randn(40, 2), "a": torch.randn(40) + 1}
    assert c2st(first, second) == c2st(first, second)
    with pytest.raises(GraphflowsError, match=r"\['b'\] are in one of the sets alone"):
        c2st({"a": first["a"]}, second)
    with pytest.raises(GraphflowsError, match="one of each"):
        c2st(first, torch.randn(30, 3))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(20, 2), torch.zeros(20, 3), "got 2 and 3"),
        (torch.zeros(5, 2), torch.zeros(20, 2), "two draws of each set"),
        (torch.zeros(20), torch.full((20,), torch.nan), "second set"),
    ],
)
def test_what_does_not_fit(first, second, message):
    with pytest.raises(GraphflowsError, match=message):
        c2st(first, second)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(MissingExtraError, match="c2st"):
        c2st(torch.zeros(20), torch.zeros(20))
