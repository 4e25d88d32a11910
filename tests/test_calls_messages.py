"""What a guide, a graph and a flow say to calls that cannot be right: the site, what was expected, what to do."""

import warnings

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms as pyro_transforms
from pyro.infer import SVI, Trace_ELBO

from pyro_graphflows import (
    GraphflowsError,
    GraphflowsWarning,
    ModelGraph,
    conditional_faithful_residual,
    conditional_graphical_residual,
    conditional_graphical_spline,
    faithful_inverse,
    faithful_residual,
    graphical_residual,
    graphical_spline,
    load_guide,
    log_evidence,
)
from pyro_graphflows.guides import Flow, auto_faithful_guide

FAMILIES = pytest.mark.parametrize("family", ["normal", Flow(units_per_variable=3, conditioner_units=3)])


def model(x, y=None):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + x, 0.5), obs=y)


def positive(x, y=None):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.HalfNormal(1.0))
        pyro.sample("y", dist.LogNormal(z + x, 0.5), obs=y)


@pytest.fixture
def data():
    return torch.randn(12), torch.randn(12)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(5), r"a value of 'z' of shape \(12,\) in this call, or with more .*; got \(5,\)"),
        ([0.0] * 12, r"a tensor of values of 'z' of event shape \(\); got list"),
    ],
)
def test_latents_of_another_shape(data, value, message):
    guide = auto_faithful_guide(model, *data)
    with pytest.raises(GraphflowsError, match=message):
        guide.log_prob({"z": value}, *data)
    assert guide.log_prob({"z": torch.zeros(3, 12)}, *data).shape == (3, 12)


@FAMILIES
def test_a_column_of_data(data, family):
    x, y = data
    with pytest.raises(GraphflowsError, match=r"data of 'y' of shape \(12,\).*got \(12, 1\).*squeeze"):
        auto_faithful_guide(model, x, y[:, None], family=family)
    guide = auto_faithful_guide(model, x, y, family=family)
    with pytest.raises(GraphflowsError, match=r"data of 'y' of shape \(12,\).*got \(12, 1\)"):
        guide(x, y[:, None])
    for _ in range(2):  # also once calls like this one are known
        with pytest.raises(GraphflowsError, match=r"observations of 'y' of shape \(12,\).*got \(12, 1\)"):
            guide(x, y, observations={"y": y[:, None]})
        guide(x, y)
    with pytest.raises(GraphflowsError, match=r"'y' a batch in its plates; got the batch shape \(12, 12\)"):
        guide(x[:, None], y)


def test_batches_of_observations_stay_allowed(data):
    x, y = data
    guide = auto_faithful_guide(model, x, y)
    with pyro.plate("simulations", 5, dim=-2):
        assert guide(x, y, observations={"y": torch.randn(5, 12)})["z"].shape == (5, 12)


# ---------------------------------------------------------------- missing, infinite, impossible values


def both_remedies(message):
    return "obs_mask=" in message and "poutine.mask(mask=" in message and "nan_to_num" in message


@FAMILIES
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_missing_data(data, family, wrong):
    x, y = data
    bad = y.clone()
    bad[::3] = wrong
    with pytest.raises(GraphflowsError, match="finite data of 'y'; 4 of 12 entries") as error:
        auto_faithful_guide(model, x, bad, family=family)
    assert both_remedies(str(error.value))
    guide = auto_faithful_guide(model, x, y, family=family)
    with pytest.raises(
        GraphflowsError, match="finite values of the data the guide conditions on; y have"
    ) as error:
        guide(x, bad)
    assert both_remedies(str(error.value))


def test_missing_data_of_sites_that_nothing_reads(data):
    def line(x, y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("d", len(x)):
            pyro.sample("y", dist.Normal(a * x, 0.5), obs=y)

    x, y = data
    with pytest.raises(GraphflowsError, match="finite data of 'y'; 1 of 12 entries"):
        auto_faithful_guide(line, x, torch.cat([y[1:], torch.tensor([float("nan")])]))


def test_missing_covariates_that_the_model_fills(data):
    def filled(w, y):
        with pyro.plate("d", len(w)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + w.nan_to_num(), 0.5), obs=y)

    w, y = data
    w = w.clone()
    w[::2] = float("nan")
    guide = auto_faithful_guide(filled, w, y)
    expected = (y - w.nan_to_num()) * 0.8
    assert (
        (guide.median(w, y)["z"] - expected).abs() < 0.1
    ).all()  # both what is there and what is not are read


@FAMILIES
def test_finite_data_are_never_blamed(data, family):
    guide = auto_faithful_guide(model, *data, family=family)
    two = auto_faithful_guide(_two_plates, *data, family=family)
    with torch.no_grad():
        for parameter in two.blocks[0].parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(GraphflowsError) as error:
        two(*data)
    assert "data the guide conditions on" not in str(error.value)
    assert "latent sites m" in str(error.value)
    assert "smaller learning rate" in str(error.value)
    assert guide(*data)["z"].isfinite().all()


def _two_plates(x, y=None):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(z + x, 0.5), obs=y)


def test_summaries_that_have_diverged_are_not_blamed_on_data(data):
    guide = auto_faithful_guide(_two_plates, *data, pool="deepset", num_start_samples=200)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if "pools" in name:
                parameter.fill_(float("inf"))
    with pytest.raises(GraphflowsError, match="their data are finite, so the guide's parameters"):
        guide(*data)


@FAMILIES
def test_values_outside_of_a_support(data, family):
    x, y = data[0], data[1].exp()
    with pytest.raises(GraphflowsError, match=r"data of 'y' in the support.*; 3 of 12 values are outside"):
        auto_faithful_guide(positive, x, torch.cat([-y[:3], y[3:]]), family=family)
    guide = auto_faithful_guide(positive, x, y, family=family)
    with pytest.raises(GraphflowsError, match="values of y in the support"):
        guide(x, -y)
    with pytest.raises(GraphflowsError, match=r"'z' in its support.*; 12 of 12 are outside"):
        guide.log_prob({"z": -torch.ones(12)}, x, y)
    with pytest.raises(GraphflowsError, match="'z' in its support"):
        guide.log_prob({"z": torch.full((12,), float("nan"))}, x, y)
    assert guide.log_prob({"z": torch.ones(12)}, x, y).isfinite().all()


SUPPORTS = {  # data with one value outside of the support, and inside or beside it by rounding
    "beta": (lambda z: dist.Beta(1.0, 1.0), [0.5, 1.5], [0.5, 1.0]),
    "exponential": (lambda z: dist.Exponential(z.exp()), [0.5, -1.0], [0.5, 0.0]),
    "gamma": (lambda z: dist.Gamma(z.exp(), 1.0), [0.5, -1.0], [0.5, 2.0]),
    "inverse gamma": (lambda z: dist.InverseGamma(1.0, z.exp()), [0.5, -1.0], [0.5, 2.0]),
    "mixture": (
        lambda z: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Beta(torch.ones(2), 1.0)),
        [0.5, 1.5],
        [0.5, 0.7],
    ),
    "logit normal": (
        lambda z: dist.TransformedDistribution(dist.Normal(z, 1.0), dist.transforms.SigmoidTransform()),
        [0.5, 1.5],
        [0.5, 0.7],
    ),
    "dirichlet": (
        lambda z: dist.Dirichlet(torch.ones(3)),
        [[0.2, 0.3, 0.5], [0.5, 0.6, -0.1]],
        [[0.2, 0.3, 0.5], [0.2, 0.3, 0.50001]],
    ),
    "vector": (
        lambda z: dist.Beta(torch.ones(2), 1.0).to_event(1),
        [[0.5, 0.5], [0.5, 1.5]],
        [[0.5, 0.5], [0.5, 0.9]],
    ),
    "bernoulli": (lambda z: dist.Bernoulli(logits=z), [1.0, 2.0], [1.0, 0.3]),  # soft labels are possible
    "poisson": (lambda z: dist.Poisson(z.exp()), [1.0, -0.5], [1.0, 0.0]),
    "binomial": (lambda z: dist.Binomial(5, logits=z), [1.0, 7.0], [1.0, 5.0]),
    "geometric": (lambda z: dist.Geometric(logits=z), [1.0, -1.0], [1.0, 0.0]),
    "one-hot": (
        lambda z: dist.OneHotCategorical(logits=torch.zeros(3)),
        [[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]],
        [[0.0, 1.0, 0.0], [0.2, 0.8, 0.0]],
    ),
    "categorical": (lambda z: dist.Categorical(torch.ones(3)), [0, 3], [0, 2]),
}


@pytest.mark.parametrize("kind", SUPPORTS)
def test_data_outside_of_supports_of_each_kind(kind):
    """Formulas of densities that hold outside of their supports are no reason to take such data."""
    make, wrong, right = SUPPORTS[kind]

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("d", len(y)):
            pyro.sample("y", make(z), obs=y)

    with pytest.raises(GraphflowsError, match="data of 'y' in the support"):
        auto_faithful_guide(model, torch.tensor(wrong), num_start_samples=50)
    auto_faithful_guide(model, torch.tensor(right), num_start_samples=50)


def test_supports_that_depend_on_latents_are_no_reason():
    """What is outside of the support at one draw of the latents may be inside at another."""

    def model(y):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        with pyro.plate("d", len(y)):
            pyro.sample("y", dist.Uniform(-a, a), obs=y)

    auto_faithful_guide(model, torch.tensor([0.1, 60.0]), num_start_samples=50)


def test_masked_data_may_be_anything(data):
    def masked(x, y, seen):
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("y", dist.LogNormal(z + x, 0.5), obs=y)

    x, y = data[0], data[1].exp()
    y[2] = -1.0
    seen = torch.ones(12, dtype=torch.bool)
    seen[2] = False
    assert auto_faithful_guide(masked, x, y, seen).plan.graph.latent == ("z",)


@FAMILIES
@pytest.mark.parametrize("scale", [-1.0, 0.0, float("nan")])
def test_scales_that_are_none(data, family, scale):
    guide = auto_faithful_guide(model, *data, family=family)
    with pytest.raises(GraphflowsError, match="positive scale of 'z'"):
        guide.set_linear_("z", {}, 0.0, scale)


WRONG = {
    "another length": (lambda x, y: (x, y[:5]), r"data of 'y' of shape \(12,\).*got \(5,\)"),
    "a list": (lambda x, y: (x, y.tolist()), r"data of 'y' in a tensor; got a list\. Pass torch\.as_tensor"),
    "an array": (lambda x, y: (x, y.numpy()), r"data of 'y' in a tensor; got a ndarray"),
    "words": (lambda x, y: (x, "a"), r"data of 'y' in a tensor; got a str"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_data_that_no_model_takes(data, kind):
    """Said with the name of the site, or of the argument, at set-up and in later calls."""
    make, match = WRONG[kind]
    with pytest.raises(GraphflowsError, match=match):
        auto_faithful_guide(model, *make(*data), num_start_samples=50)
    guide = auto_faithful_guide(model, *data, num_start_samples=50)
    with pytest.raises(GraphflowsError, match=match):
        guide(*make(*data))


@pytest.mark.parametrize("validation", [False, True])
def test_missing_covariates_that_the_model_does_not_fill(data, validation):
    x, y = data
    x = x.clone()
    x[2] = float("nan")
    with (
        pyro.validation_enabled(validation),
        pytest.raises(GraphflowsError, match=r"x have NaN .*(of 'y' is no number|the model fails).*obs_mask"),
    ):
        auto_faithful_guide(model, x, y, num_start_samples=50)


# ---------------------------------------------------------------- order of calls


@FAMILIES
def test_a_state_before_set_up(data, family):
    state = auto_faithful_guide(model, *data, family=family).state_dict()
    guide = auto_faithful_guide(model, family=family)
    with pytest.raises(GraphflowsError, match=r"set up.*guide\.setup\(\*args\).*load_state_dict"):
        guide.load_state_dict(state)
    guide.setup(*data)
    assert guide.load_state_dict(state).missing_keys == []


# ---------------------------------------------------------------- evidence


def test_the_evidence_in_words(data):
    evidence = log_evidence(model, auto_faithful_guide(model, *data), *data, num_particles=100)
    text = repr(evidence)
    for word in ("Evidence(", "nats for 12 data", "ESS", "khat"):
        assert word in text


def test_khat_of_few_distinct_weights():
    def mixture(y):
        with pyro.plate("d", 3):
            c = pyro.sample("c", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Normal(2 * c, 0.7), obs=y)

    y = torch.tensor([0.1, -0.2, 2.1])
    exact = torch.logsumexp(
        torch.stack(
            [torch.tensor(p).log() + dist.Normal(2.0 * c, 0.7).log_prob(y) for c, p in ((0, 0.6), (1, 0.4))]
        ),
        0,
    ).sum()
    evidence = log_evidence(mixture, auto_faithful_guide(mixture, y), y, num_particles=1000)
    assert abs(evidence.log_evidence.sum() - exact) < 5 * evidence.standard_error.square().sum().sqrt() + 1e-3
    assert "weights without a tail" in repr(evidence)
    assert (evidence.khat < 0.7).all()  # all moments are finite, and both values have been seen often


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize("role", ["observed", "inputs", "marginalised", "event_sizes", "plates"])
def test_misspelt_names(role):
    wrong = {"event_sizes": {"X2": 2}, "plates": {"X2": ["d"]}}.get(role, ["x1", "X2"])
    roles = {"observed": ["x1"], role: wrong} if role != "observed" else {"observed": wrong}
    if role in ("inputs", "marginalised"):
        roles = {"observed": ["x1"], role: ["X2"]}
    with pytest.raises(GraphflowsError, match=r"unknown X2\. The nodes are x1, x2, z\..*nodes=\["):
        ModelGraph([("z", "x1"), ("z", "x2")], **roles)


def test_nodes_without_an_edge():
    graph = ModelGraph([("z", "x")], observed=["x", "y"], nodes=["y"])
    assert graph.nodes == ("z", "x", "y")
    assert dict(faithful_inverse(graph).parents) == {"z": ("x",)}


# ---------------------------------------------------------------- flows


GRAPH = nx.DiGraph([(0, 1), (1, 2)])
FLOWS = {
    "affine, of Pyro": lambda: pyro_transforms.affine_autoregressive(3),
    "faithful": lambda: faithful_residual(GRAPH),
    "faithful, density": lambda: faithful_residual(GRAPH, closed_form="density"),
    "graphical": lambda: graphical_residual(GRAPH),
    "spline": lambda: graphical_spline(GRAPH),
    "conditional faithful": lambda: conditional_faithful_residual(GRAPH, 2).condition(torch.zeros(0, 2)),
    "conditional graphical": lambda: conditional_graphical_residual(GRAPH, 2).condition(torch.zeros(0, 2)),
    "conditional spline": lambda: conditional_graphical_spline(GRAPH, 2).condition(torch.zeros(0, 2)),
}


@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 2)])
@pytest.mark.parametrize("name", FLOWS)
def test_a_batch_of_no_rows(name, batch):
    if "conditional" in name and batch != (0,):
        pytest.skip("the context has one batch dimension")
    flow = FLOWS[name]()
    x = torch.zeros(*batch, 3, requires_grad=True)
    y = flow(x)
    assert y.shape == (*batch, 3)
    log_det = flow.log_abs_det_jacobian(x, y)
    assert log_det.shape == batch
    assert flow.inv(torch.zeros(*batch, 3)).shape == (*batch, 3)
    (y.sum() + log_det.sum()).backward()


def test_a_flow_trained_on_epochs_with_an_empty_last_batch():
    flow = faithful_residual(GRAPH)
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    target = dist.TransformedDistribution(base, [flow], validate_args=False)
    optimiser = torch.optim.Adam(flow.parameters())
    for rows in (5, 0):
        z = torch.randn(rows, 3)
        loss = -(target.log_prob(z).sum() if rows else flow.inv(z).sum())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(parameter.isfinite().all() for parameter in flow.parameters())


def test_an_empty_plate_is_refused(data):
    """Pyro has none."""
    guide = auto_faithful_guide(model, *data)
    empty = data[0][:0], data[1][:0]
    with pytest.raises(GraphflowsError, match=r"at least one element in each plate.*Leave out empty batches"):
        SVI(model, guide, pyro.optim.Adam({}), Trace_ELBO()).step(*empty)
    with pytest.raises(GraphflowsError, match="at least one element in each plate"):
        auto_faithful_guide(model, *empty)


def test_classes_that_there_are_not():
    def labels(y):
        with pyro.plate("d", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Categorical(logits=torch.stack([z, -z], -1)), obs=y)

    guide = auto_faithful_guide(labels, torch.tensor([0, 1, 1]))
    for wrong in (2, -1):
        with pytest.raises(GraphflowsError, match="Expected values of y in the support"):
            guide(torch.tensor([0, 1, wrong]))


# ---------------------------------------------------------------- what newcomers write


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"y": torch.zeros(12)}, r"argument 'y'\. Keyword arguments of the model belong in example_kwargs="),
        ({"famly": "flow"}, "argument 'famly'; did you mean 'family'"),
        ({"enumerate_sites": "z"}, "enumerate_sites to be True, False or a list of names; got 'z'"),
    ],
)
def test_options_that_are_none(data, option, expected):
    with pytest.raises((GraphflowsError, TypeError), match=expected):
        auto_faithful_guide(model, *data, **option)


def test_latents_that_are_misspelt(data):
    guide = auto_faithful_guide(model, *data)
    with pytest.raises(GraphflowsError, match="missing: z; no latent sites: zz"):
        guide.log_prob({"zz": torch.zeros(12)}, *data)
    with pytest.raises(GraphflowsError, match=r"latents=\{site: value\} .* got Tensor"):
        guide.log_prob(*data)


def test_a_column_of_covariates_beside_rows_of_data(data):
    with pytest.raises(GraphflowsError, match=r"Its data have the shape \(12,\): .* x.squeeze"):
        auto_faithful_guide(model, data[0][:, None], data[1])


def test_a_file_and_its_model_exchanged():
    with pytest.raises(GraphflowsError, match="a file and then its model"):
        load_guide(model, "guide.safetensors")


def test_sites_of_data_that_are_new():
    def loop(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i, value in enumerate(x):
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=value)

    x = torch.randn(4)
    guide = auto_faithful_guide(loop, x[:2])
    with pytest.warns(GraphflowsWarning, match=r"data of x2, x3, which the guide does not read"):
        guide(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide(x)  # said once
        guide(x[:2])


def test_gradients_that_do_not_pass_are_said():
    """With strict=False training went on with part of the gradient, without a word."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(torch.tensor(float(z.detach())), 1.0), obs=x)

    with pytest.warns(GraphflowsWarning, match="no gradient passes from x to z: .*float"):
        guide = auto_faithful_guide(model, torch.ones(3), strict=False, num_start_samples=200)
    assert "no gradient passes from x to z" in guide.describe()


def test_a_loop_over_part_of_a_plate_has_other_sites_without_a_warning():
    """Each call draws other rows: that the guide does not read these by name is as it should be."""
    x = torch.arange(20.0)

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        for i in pyro.plate("rows", 20, subsample_size=3):
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    guide = auto_faithful_guide(model, x, num_start_samples=500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            Trace_ELBO().loss(model, guide, x)
