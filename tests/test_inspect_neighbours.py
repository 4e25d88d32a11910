"""Which elements of a vector meet: chains in several codings, exact derivatives, and vectors that are none."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to

from pyro_graphflows.inspect import trace_model
from pyro_graphflows.inspect.neighbours import find_chain
from pyro_graphflows.inspect.trace import Rerun

SIZE = 12
X = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
EYE = torch.eye(SIZE, dtype=torch.float64)
SUMS = torch.ones_like(EYE).tril()


def chain_of(model, *args, name="w"):
    traced = trace_model(model, args)
    transform = biject_to(traced.trace.nodes[name]["fn"].support)
    return find_chain(Rerun(model, args, {}, traced), name, transform.inv, transform)


def walk(x):
    root = 0.5 * torch.ones(SIZE, SIZE).tril()
    w = pyro.sample("w", dist.MultivariateNormal(torch.ones(SIZE), scale_tril=root))
    pyro.sample("x", dist.Normal(2 * w, 0.5).to_event(1), obs=x)


def steps(x):
    w = pyro.sample("w", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
    pyro.sample("x", dist.Normal(w.cumsum(-1), 0.5).to_event(1), obs=x)


def second_order(x):
    w = pyro.sample("w", dist.Normal(0.0, 3 * torch.ones(SIZE)).to_event(1))
    bend = w[..., 2:] - 2 * w[..., 1:-1] + w[..., :-2]
    pyro.factor("smooth", -(bend**2).sum(-1))
    pyro.sample("x", dist.Normal(w[..., ::2], 0.5).to_event(1), obs=x[::2])


def counts(x):
    w = pyro.sample("w", dist.LogNormal(0.0, torch.ones(SIZE)).to_event(1))
    pyro.sample("x", dist.Poisson(w).to_event(1), obs=x.abs().round())


def joined(x):
    w = pyro.sample("w", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
    pyro.sample("x", dist.Normal((w * X).sum(-1), 0.5), obs=x[0])


def total(x):
    w = pyro.sample("w", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
    pyro.sample("x", dist.Normal(w.sum(-1), 0.5), obs=x[0])


def test_a_walk_with_its_exact_posterior():
    chain = chain_of(walk, X)
    assert (chain.width, chain.differences) == (1, False)
    assert (chain.reads["x"] == EYE.bool().numpy()).all()
    steps_back = torch.linalg.inv(SUMS)
    precision = steps_back.T @ steps_back / 0.25 + 16 * EYE
    torch.testing.assert_close(chain.field.precision, precision, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(chain.field.weights["x"], 8 * EYE, atol=1e-4, rtol=1e-4)
    offset = steps_back.T @ steps_back.sum(1) / 0.25
    torch.testing.assert_close(chain.field.offset, offset, atol=1e-3, rtol=0)
    slopes, intercept, root = chain.field.moments
    torch.testing.assert_close(root @ root.T, torch.linalg.inv(precision), atol=1e-4, rtol=1e-3)
    mean = slopes["x"] @ X.double() + intercept
    torch.testing.assert_close(mean, torch.linalg.solve(precision, 8 * X + offset), atol=1e-3, rtol=0)


def test_steps_are_a_chain_of_their_sums():
    chain = chain_of(steps, X)
    assert (chain.width, chain.differences) == (1, True)
    assert (chain.reads["x"] == EYE.bool().numpy()).all()
    steps_back = torch.linalg.inv(SUMS)
    precision = steps_back.T @ steps_back + 4 * EYE
    torch.testing.assert_close(chain.field.precision, precision, atol=1e-3, rtol=1e-4)


def test_factors_and_data_of_some_elements():
    chain = chain_of(second_order, X)
    assert (chain.width, chain.differences) == (2, False)
    assert "smooth" not in chain.reads
    assert (chain.reads["x"] == EYE[::2].bool().numpy()).all()
    assert chain.field is not None


def test_counts_of_positive_elements_are_read_and_not_normal():
    chain = chain_of(counts, X)
    assert (chain.width, chain.differences, chain.field) == (0, False, None)
    assert (chain.reads["x"] == EYE.bool().numpy()).all()


def test_elements_that_all_meet_are_no_chain():
    assert chain_of(joined, X) is None


def test_of_running_sums_a_total_meets_the_last_alone():
    chain = chain_of(total, X)
    assert (chain.width, chain.differences) == (1, True)
    assert chain.reads["x"].nonzero()[1].tolist() == [SIZE - 1]


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_data_in_plates_inside_are_part_of_the_offset(shift):
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
        with pyro.plate("times", SIZE):
            pyro.sample("x", dist.Normal(w, 0.5), obs=x)

    chain = chain_of(model, X + shift)
    assert not chain.reads
    torch.testing.assert_close(chain.field.offset, 4 * (X + shift).double(), atol=1e-3, rtol=1e-4)


def test_rows_of_a_plate_that_differ_have_no_common_field():
    scale = torch.tensor([0.5, 1.0, 2.0])

    def model(x):
        with pyro.plate("rows", 3):
            w = pyro.sample("w", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
            pyro.sample("x", dist.Normal(w, scale.unsqueeze(-1)).to_event(1), obs=x)

    chain = chain_of(model, X.expand(3, SIZE))
    assert chain.width == 0
    assert chain.field is None


def test_a_model_with_parameters_is_learned():
    def learned(x):
        w = pyro.sample("w", dist.Normal(0.0, torch.ones(SIZE)).to_event(1))
        pyro.sample("x", dist.Normal(w, pyro.param("noise", torch.tensor(0.5))).to_event(1), obs=x)

    chain = chain_of(learned, X)
    assert chain.field is not None
    assert chain.learned
    assert not chain_of(walk, X).learned
