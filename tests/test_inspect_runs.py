"""Runs of a model leave everything outside as it was, and take what they are given."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions.transforms as t
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints

from pyro_graphflows.inspect import get_model_graph, trace_model
from pyro_graphflows.inspect.runs import (
    GivenRows,
    GivenValues,
    Replaced,
    is_transparent,
    run_model,
    support_of,
)


def regression(w, x=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z * w, 1.0), obs=x)


def test_random_state_and_parameters_are_left_alone():
    def model():
        scale = pyro.param("scale", torch.ones(()))
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, scale)), 1.0))

    state = torch.get_rng_state()
    get_model_graph(model)
    assert torch.equal(state, torch.get_rng_state())
    assert list(pyro.get_param_store()) == ["scale"]
    assert pyro.param("scale").requires_grad


def test_running_statistics_are_restored():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            with pyro.plate("data", 5):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.norm(z), 1.0).to_event(1), obs=x)

    model = Model().double()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert get_model_graph(model, (torch.zeros(5, 2),)).edges == (("z", "x"),)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_handlers_outside_see_nothing():
    with poutine.trace() as outside, poutine.mask(mask=torch.tensor(False)):
        traced = trace_model(regression, (torch.ones(4),), {"x": torch.zeros(4)})
    assert len(outside.trace.nodes) == 0
    assert dict(traced.not_generative) == {}


def test_validation_setting_is_restored():
    def model():
        raise RuntimeError("the model's own error")

    with pytest.raises(RuntimeError, match="the model's own error"):
        get_model_graph(model)
    with pytest.raises(ValueError, match="invalid values"):
        dist.Normal(0.0, torch.tensor(-1.0))


def test_a_run_takes_values_rows_and_tensors():
    scale = torch.ones(())

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        with pyro.plate("data", 6, subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(z, scale), obs=x[rows])

    rows = torch.tensor([4, 1])
    handlers = (
        GivenRows({"data": rows}),
        GivenValues({"z": torch.tensor(3.0)}),
        Replaced({id(scale): torch.tensor(0.5)}),
    )
    trace = run_model(model, (torch.arange(6.0),), {}, *handlers)
    assert trace.nodes["z"]["value"] == 3.0
    assert trace.nodes["x"]["value"].tolist() == [4.0, 1.0]
    assert torch.equal(trace.nodes["x"]["fn"].scale, torch.full((2,), 0.5))


def test_a_delta_on_its_own_value_passes_it_on():
    value = torch.zeros(3)
    for seen, passes in ((value, True), (value.view(3, 1)[:, 0], True), (torch.zeros(3), False)):
        trace = run_model(lambda seen=seen: pyro.sample("d", dist.Delta(value).to_event(1), obs=seen), (), {})
        assert is_transparent(trace.nodes["d"]) is passes


TWO = torch.tensor([1.0, -3.0])
TRANSFORMED = {
    "shifted": (dist.Exponential(1.0), [t.AffineTransform(2.0, 3.0)], (2.0, None)),
    "mirrored": (dist.HalfNormal(1.0), [t.AffineTransform(0.0, -1.0)], (None, 0.0)),
    "stretched": (dist.Beta(2.0, 2.0), [t.AffineTransform(5.0, -3.0)], (2.0, 5.0)),
    "of the logarithm": (dist.Uniform(-1.0, 2.0), [t.ExpTransform()], (math.exp(-1.0), math.exp(2.0))),
    "in two steps": (dist.Exponential(1.0), [t.ExpTransform(), t.AffineTransform(0.0, 2.0)], (2.0, None)),
    "of logits": (dist.Beta(2.0, 2.0), [t.SigmoidTransform().inv], (None, None)),
    "of normals": (dist.Normal(0.0, 1.0), [t.ExpTransform()], (0.0, None)),
    "of elements": (dist.Gamma(2.0, 1.0).expand([2]).to_event(1), [t.AffineTransform(TWO, 1.0)], (TWO, None)),
    "in no order": (dist.Exponential(1.0), [t.AffineTransform(0.0, TWO)], (None, None)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_supports_of_transformed_distributions_are_images(name):
    base, transforms, ends = TRANSFORMED[name]
    fn = dist.TransformedDistribution(base, transforms)
    support = support_of(fn)
    inner = support.base_constraint if isinstance(support, constraints.independent) else support
    for end, attribute in zip(ends, ("lower_bound", "upper_bound"), strict=True):
        found = getattr(inner, attribute, None)
        assert (
            (found is None) if end is None else torch.allclose(torch.as_tensor(found), torch.as_tensor(end))
        )
    assert support.event_dim == fn.event_dim
    assert bool(support.check(fn.sample((100,))).all())
    masked = fn.expand([2, *fn.batch_shape]).mask(False)
    assert bool(support_of(masked).check(masked.sample()).all())
