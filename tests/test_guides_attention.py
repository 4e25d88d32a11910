import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.guides import Attention, auto_faithful_guide, load_guide
from pyro_graphflows.guides.conditionals.pooling import QueryAttention
from pyro_graphflows.infer import InferenceCompilation


def two_levels(x, mask=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("data", x.shape[-2], dim=-2), pyro.poutine.mask(mask=True if mask is None else mask):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def moved(guide):
    """Let learned features count, which start at zero."""
    for parameter in guide.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    return guide


class TestQueryAttention:
    @pytest.mark.parametrize(("shape", "dim"), [((5,), -1), ((5, 3), -2), ((2, 5, 3), -2), ((4, 5), -1)])
    def test_order_does_not_matter_and_masked_elements_are_not_seen(self, shape, dim):
        pool = QueryAttention(8, 2)
        each = torch.randn(*shape, 8)
        size = shape[dim]
        pooled = pool(each, None, dim)
        expected = list(shape)
        expected[dim] = 1
        assert pooled.shape == (*expected, 8)
        order = torch.randperm(size)
        assert torch.allclose(pool(each.index_select(dim - 1, order), None, dim), pooled)
        weight = torch.ones(*shape, 1)
        weight.select(dim - 1, 2).zero_()
        kept = torch.arange(size) != 2
        few = pool(each.index_select(dim - 1, kept.nonzero()[:, 0]), None, dim)
        other = each.clone()
        other.select(dim - 1, 2).fill_(1e3)
        assert torch.allclose(pool(each, weight, dim), few)
        assert torch.equal(pool(each, weight, dim), pool(other, weight, dim))

    def test_empty_groups_are_zero_with_finite_gradients(self):
        pool = QueryAttention(4, 1)
        each = torch.randn(3, 2, 4, requires_grad=True)
        weight = torch.ones(3, 2, 1)
        weight[:, 1] = 0.0
        pooled = pool(each, weight, -2)
        assert (pooled[:, 1] == 0).all()
        pooled.sum().backward()
        assert all(p.grad.isfinite().all() for p in pool.parameters())
        assert each.grad.isfinite().all()


class TestGuide:
    def test_numbers_of_elements_and_order(self):
        guide = moved(
            auto_faithful_guide(two_levels, torch.randn(4, 6), pool="attention", num_start_samples=200)
        )
        x = torch.randn(3, 5)
        median = guide.median(x)
        assert median["theta"].shape == (5,)
        groups = torch.randperm(5)
        other = guide.median(x[torch.randperm(3)][:, groups])
        assert torch.allclose(other["mu"], median["mu"])
        assert torch.allclose(other["theta"], median["theta"][groups])

    def test_masked_data_do_not_count(self):
        mask = torch.ones(4, 6, dtype=torch.bool)
        mask[2, 3] = mask[0, 5] = False
        x = torch.randn(4, 6)
        guide = auto_faithful_guide(two_levels, x, mask, pool="attention", num_start_samples=200)
        moved(guide)
        other = torch.where(mask, x, torch.tensor(50.0))
        for name, value in guide.median(x, mask).items():
            assert torch.equal(guide.median(other, mask)[name], value)

    def test_training_saving_and_starting(self, tmp_path):
        x = torch.zeros(4, 6)
        guide = auto_faithful_guide(
            two_levels, x, pool=Attention(embedding_dim=8, num_heads=2), num_start_samples=500
        )
        compilation = InferenceCompilation(
            two_levels, guide, torch.optim.Adam(guide.parameters(), lr=1e-3), batch_size=200
        )
        before = sum(compilation.loss(x) for _ in range(5))
        for _ in range(20):
            compilation.step(x)
        assert sum(compilation.loss(x) for _ in range(5)) < before + 1.0  # the start survives training
        guide.save(tmp_path / "guide.safetensors")
        loaded = load_guide(tmp_path / "guide.safetensors", two_levels)
        assert torch.equal(loaded.median(x)["theta"], guide.median(x)["theta"])

    def test_bad_input(self):
        with pytest.raises(GraphflowsError, match="that num_heads divides; got 10 and 4"):
            Attention(embedding_dim=10)
        with pytest.raises(GraphflowsError, match="'deepset', 'attention'"):
            auto_faithful_guide(two_levels, torch.zeros(4, 6), pool="mean")

    def test_groups_by_an_index_are_refused(self):
        def effects(group, x):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("groups", 3):
                theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(theta[group], 1.0), obs=x)

        group = torch.arange(12) % 3
        with pytest.raises(
            UnsupportedModelError, match="Expected pool='deepset' where elements are pooled group by"
        ):
            auto_faithful_guide(effects, group, torch.zeros(12), pool="attention", num_start_samples=100)
