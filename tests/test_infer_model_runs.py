import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_graphflows.errors import UnsupportedModelError
from pyro_graphflows.infer.model_runs import (
    Fitted,
    SiteShape,
    chunk_size,
    chunks,
    in_batch,
    joined,
    out_of_batch,
    single,
    site_shapes,
    stacked,
)


def model(rows):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 3, dim=-1):
        a = pyro.sample("a", dist.Normal(mu.unsqueeze(-1), torch.ones(2)).to_event(1))
        with pyro.plate("rows", rows, dim=-2):
            b = pyro.sample("b", dist.Normal(a[..., 0], 1.0))
    pyro.deterministic("sum", a.sum(-1).sum(-1))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(0.0))
    return {"b": b, "mu": mu}


def draws_of(num):
    return {"mu": torch.randn(num), "a": torch.randn(num, 3, 2), "b": torch.randn(num, 4, 3)}


@pytest.fixture
def fitted():
    sites = site_shapes(poutine.trace(model).get_trace(4))
    return Fitted(model, model, (4,), {}, sites, ("mu", "a", "b"), 2, True)


def test_what_is_known_of_sites(fitted):
    assert fitted.sites["mu"] == SiteShape("latent", (), 0, ())
    assert fitted.sites["a"] == SiteShape("latent", (3, 2), 1, (("columns", -1, 3),))
    assert fitted.sites["b"].plates == (("columns", -1, 3), ("rows", -2, 4))
    assert fitted.sites["y"].kind == "observed"
    assert fitted.sites["sum"].kind == "deterministic"
    assert fitted.summed_out == []


def test_into_a_batch_and_out_again(fitted):
    draws = draws_of(5)
    for name, value in draws.items():
        site = fitted.sites[name]
        inside = in_batch(value, site, 2)
        assert inside.shape[: 3 - site.num_batch] == (5, *[1] * (2 - site.num_batch))
        assert torch.equal(out_of_batch(inside, 5, site, 2), value)
    same = out_of_batch(torch.zeros(3, 2), 5, fitted.sites["a"], 2)  # nothing varies: one value for all
    assert same.shape == (5, 3, 2)
    with pytest.raises(UnsupportedModelError, match=r"Expected the shape \(5, 1, 3, 2\).*got \(5, 4, 3, 2\)"):
        out_of_batch(torch.zeros(5, 4, 3, 2), 5, fitted.sites["a"], 2)


def test_a_batch_is_its_draws(fitted):
    draws, runs = draws_of(6), fitted.runs()
    batch, alone = runs.batch(draws, 6), runs.alone({name: value[5] for name, value in draws.items()})
    assert torch.equal(runs.values(batch, {"b": fitted.sites["b"]})["b"], draws["b"])
    assert torch.equal(alone.trace.nodes["b"]["value"], draws["b"][5])
    assert not runs.differs_alone(batch, alone, fitted.sites)
    returned = stacked(batch.returned, alone.returned, 6)
    assert torch.equal(returned["b"], draws["b"])
    assert torch.equal(returned["mu"], draws["mu"])
    total = out_of_batch(batch.trace.nodes["sum"]["value"], 6, fitted.sites["sum"], 2)
    assert torch.allclose(total, draws["a"].sum((1, 2)))


def test_a_batch_that_mixes_its_draws(fitted):
    def mixing(rows):
        model(rows)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return z.sum()

    sites = site_shapes(poutine.trace(mixing).get_trace(4))
    other = Fitted(mixing, mixing, (4,), {}, sites, ("mu", "a", "b", "z"), 2, True)
    draws = {**draws_of(3), "z": torch.randn(3)}
    runs = other.runs()
    batch, alone = runs.batch(draws, 3), runs.alone({name: value[0] for name, value in draws.items()})
    assert runs.differs_alone(batch, alone, sites)
    assert not runs.differs_alone(batch, alone._replace(returned=None), sites)


def test_what_models_return():
    alone = {"a": torch.zeros(2), "n": 3, "pair": [torch.zeros(()), "text"]}
    batch = {"a": torch.ones(5, 1, 2), "n": 3, "pair": (torch.arange(5.0), "text")}
    found = stacked(batch, alone, 5)
    assert found["a"].shape == (5, 2)
    assert (found["n"], found["pair"][1]) == (3, "text")
    twice = joined([found, found])
    assert twice["a"].shape == (10, 2)
    assert twice["pair"][0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0] * 2
    one = single(alone)
    assert one["a"].shape == (1, 2)
    assert one["pair"][0].shape == (1,)
    assert stacked(None, None, 5) is None
    with pytest.raises(UnsupportedModelError, match="to return what one draw returns"):
        stacked(3.0, torch.zeros(()), 5)


def test_chunks_cover_everything_and_stay_small(fitted, monkeypatch):
    assert list(chunks(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    trace = poutine.trace(model).get_trace(4)
    whole = chunk_size(trace)
    assert chunk_size(trace, factor=10) == pytest.approx(whole / 10, abs=1)
    monkeypatch.setattr("pyro_graphflows.infer.model_runs.NUMBERS_AT_ONCE", 1)
    assert chunk_size(trace) == 1
