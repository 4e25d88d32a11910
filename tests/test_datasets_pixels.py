import pytest
import torch

from pyro_graphflows.datasets import (
    BinarizedBatches,
    binarize,
    dequantize,
)


def test_binarize():
    gray = torch.tensor([0, 4, 16]).expand(20_000, 3)
    bits = binarize(gray, 17, torch.Generator().manual_seed(0))
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    means = bits.mean(0)
    assert means[0] == 0
    assert means[2] == 1
    assert abs(means[1] - 0.25) < 4.5 * (0.25 * 0.75 / 20_000) ** 0.5
    assert torch.equal(binarize(torch.tensor([0, 1]), 2), torch.tensor([0.0, 1.0]))


def test_dequantize():
    values = dequantize(torch.arange(4).repeat(1000), 4, torch.Generator().manual_seed(0))
    assert torch.equal((values * 4).floor().long(), torch.arange(4).repeat(1000))
    assert (values * 4 % 1).mean().item() == pytest.approx(0.5, abs=4.5 / (12 * 4000) ** 0.5)


def test_every_epoch_draws_its_own_batches():
    images = torch.full((10, 2, 2), 8)
    images[:, 0, 0] = torch.arange(10) % 2 * 16
    batches = BinarizedBatches(images, 17, 4)
    assert len(batches) == 3
    epochs = [torch.cat([batch[0] for batch in batches]) for _ in range(2)]
    assert [len(batch[0]) for batch in batches] == [4, 4, 2]
    for epoch in epochs:
        assert epoch[:, 0, 0].sum() == 5  # each image once
    assert not torch.equal(*epochs)
    torch.manual_seed(1)
    first = torch.cat([batch[0] for batch in batches])
    torch.manual_seed(1)
    assert torch.equal(torch.cat([batch[0] for batch in batches]), first)
