"""ActNorm: where it starts from, and what it refuses."""

import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.transforms import actnorm


def test_actnorm_starts_from_the_first_batch_only_in_training():
    z = torch.randn(1000, 3) * torch.tensor([1.0, 100.0, 0.01]) + torch.tensor([0.0, 5.0, -3.0])
    layer = actnorm(3, data_dependent=True).eval()
    assert torch.equal(layer.inv(z), z)
    layer.train()
    eps = layer.inv(z)
    torch.testing.assert_close(eps.mean(0), torch.zeros(3), atol=1e-9, rtol=0)
    torch.testing.assert_close(eps.std(0), torch.ones(3))
    before = layer.loc.clone()
    layer.inv(z + 1)
    assert torch.equal(layer.loc, before)
    assert torch.equal(actnorm(3).inv(z), z)


def test_actnorm_refuses():
    with pytest.raises(GraphflowsError, match="input_dim >= 1"):
        actnorm(0)
    with pytest.raises(GraphflowsError, match="at least two samples"):
        actnorm(2).initialize_(torch.zeros(1, 2))
    with pytest.raises(GraphflowsError, match="all finite"):
        actnorm(2).initialize_(torch.full((3, 2), torch.inf))
