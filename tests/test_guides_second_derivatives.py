"""Joint factors from second derivatives: exact where data are normal about a linear predictor, better elsewhere."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_graphflows import auto_faithful_guide
from pyro_graphflows.guides.mode import LogPosterior, find_mode
from pyro_graphflows.guides.second_derivatives import joint_factors
from pyro_graphflows.inspect import trace_model

ROWS, SIZE, NOISE = 40, 6, 0.8


def _data(rows=ROWS, size=SIZE):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, size, generator=generator)
    weights = torch.zeros(size)
    weights[:2] = torch.tensor([1.5, -1.0])
    return x, 0.7 + x @ weights + NOISE * torch.randn(rows, generator=generator)


def horseshoe(x, y, intercept=False):
    """A regression with a horseshoe prior; the scale of the noise is known."""
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("columns", x.shape[-1]):
        width = pyro.sample("width", dist.HalfCauchy(1.0))
        weights = pyro.sample("weights", dist.Normal(0.0, width * tau))
    alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0)) if intercept else 0.7
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(alpha + x @ weights, NOISE), obs=y)


def counts(x, y):
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("columns", x.shape[-1]):
        width = pyro.sample("width", dist.HalfCauchy(1.0))
        weights = pyro.sample("weights", dist.Normal(0.0, width * tau))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Poisson((x @ weights).exp()), obs=y)


def in_groups(x, y):
    """Coefficients of each of some groups, in a plate of their own inside of that of the groups."""
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    groups = pyro.plate("groups", len(x), dim=-2)
    with groups, pyro.plate("columns", x.shape[-1], dim=-1):
        width = pyro.sample("width", dist.HalfCauchy(1.0))
        weights = pyro.sample("weights", dist.Normal(0.0, width * tau))
    with groups, pyro.plate("rows", x.shape[-2], dim=-1):
        loc = (x @ weights.unsqueeze(-1)).squeeze(-1)
        pyro.sample("y", dist.Normal(loc, NOISE), obs=y)


def _found(model, args, later, followed=()):
    pyro.set_rng_seed(0)
    mode = find_mode(model, args, {}, trace_model(model, args, {}, strict=False))
    return joint_factors(mode, {"weights": later}, {"weights": followed})["weights"]


@pytest.mark.parametrize("intercept", [False, True], ids=["alone", "intercept integrated out"])
def test_the_factor_of_a_linear_regression_is_exact(intercept):
    x, y = _data()
    found = _found(horseshoe, (x, y, intercept), ("alpha",) if intercept else ())
    # an unknown intercept is noise that all rows share
    noise = NOISE**2 * torch.eye(ROWS) + 4.0 * intercept
    precision = x.T @ torch.linalg.solve(noise, x)
    loc = torch.linalg.solve(precision, x.T @ torch.linalg.solve(noise, y - 0.7 * (not intercept)))
    torch.testing.assert_close(found.covariance, torch.linalg.inv(precision), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.loc, loc, rtol=1e-4, atol=1e-4)


def test_the_factor_follows_an_intercept_that_is_known():
    x, y = _data()
    found = _found(horseshoe, (x, y, True), (), ("alpha",))
    precision = x.T @ x / NOISE**2
    loc, slope = (torch.linalg.solve(precision, x.T @ part) / NOISE**2 for part in (y, -torch.ones(ROWS)))
    torch.testing.assert_close(found.covariance, torch.linalg.inv(precision), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.loc, loc, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.slopes["alpha"].squeeze(-1), slope, rtol=1e-4, atol=1e-4)


def test_what_data_do_not_say_is_left_to_the_prior():
    x, y = _data()
    x[:, -1] = 0.0
    found = _found(horseshoe, (x, y), ())
    assert float(found.covariance[-1, -1]) > 1e6 / float(found.prior_precision[-1])
    assert float(found.loc[-1].abs() / found.covariance[-1, -1].sqrt()) < 0.01


def _log_prob_of_exact(trace, x, y):
    """Return the log-density of the weights of a trace given all else."""
    values = {name: trace.nodes[name]["value"].detach() for name in ("tau", "width", "weights")}
    of_prior = (values["tau"] * values["width"]).pow(-2).diag_embed()
    precision = x.mT @ x / NOISE**2 + of_prior
    loc = torch.linalg.solve(precision, (x.mT @ y.unsqueeze(-1)).squeeze(-1) / NOISE**2)
    exact = dist.MultivariateNormal(loc, precision_matrix=(precision + precision.mT) / 2)
    return exact.log_prob(values["weights"]).sum()


@pytest.mark.parametrize("intercept", [False, True], ids=["known intercept", "intercept drawn before"])
def test_conditionals_under_a_horseshoe_start_exact(intercept):
    x, y = _data()
    x = x + 3.0 * intercept  # covariates that are not centred: coefficients follow the intercept
    pyro.set_rng_seed(0)
    guide = auto_faithful_guide(horseshoe, x, y, intercept)
    assert "without second derivatives" in guide.describe(verbose=True)
    for _ in range(5):
        with torch.no_grad():
            trace = poutine.trace(guide).get_trace(x, y, intercept)
        trace.compute_log_prob()
        found = trace.nodes["weights"]["log_prob_sum"]
        alpha = trace.nodes["alpha"]["value"] if intercept else 0.7
        torch.testing.assert_close(found, _log_prob_of_exact(trace, x, y - alpha), rtol=1e-3, atol=1e-3)


def test_groups_of_coefficients_start_exact():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 15, 4, generator=generator)
    weights = torch.tensor([2.0, 0.0, 0.0, -1.0])
    y = x @ weights + NOISE * torch.randn(3, 15, generator=generator)
    pyro.set_rng_seed(0)
    guide = auto_faithful_guide(in_groups, x, y)
    assert "without second derivatives" in guide.describe(verbose=True)
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(x, y)
    trace.compute_log_prob()
    found = trace.nodes["weights"]["log_prob_sum"]
    torch.testing.assert_close(found, _log_prob_of_exact(trace, x, y), rtol=1e-3, atol=1e-3)


def test_counts_under_a_horseshoe_start_near_and_stay_there():
    x, _ = _data(size=12)
    torch.manual_seed(3)
    y = torch.poisson((0.8 * x[:, 0] - 0.5 * x[:, 1]).exp())
    pyro.set_rng_seed(0)
    guide = auto_faithful_guide(counts, x, y)
    elbo = Trace_ELBO()

    def losses(number):
        with torch.no_grad():
            return torch.tensor([elbo.loss(counts, guide, x, y) for _ in range(number)])

    start = losses(100)
    svi = pyro.infer.SVI(counts, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(100):
        svi.step(x, y)
    after = losses(100)
    error = float((start.var() / 100 + after.var() / 100).sqrt())
    assert float(start.mean()) < 75.0  # that of draws near the mode alone is in the hundreds
    assert float(after.mean()) < float(start.mean()) + 4 * error


def slopes(x, y, joint=False):
    """Two slopes in each of some groups, their priors independent or not."""
    width = pyro.sample("width", dist.HalfCauchy(1.0).expand([2]).to_event(1))
    with pyro.plate("groups", len(x), dim=-2):
        independent = dist.Normal(torch.zeros(2), width).to_event(1)
        tril = torch.diag_embed(width) + torch.tensor([[0.0, 0.0], [0.1, 0.0]])
        prior = dist.MultivariateNormal(torch.zeros(2), scale_tril=tril) if joint else independent
        weights = pyro.sample("weights", prior)
        with pyro.plate("rows", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal((x * weights).sum(-1), 0.5), obs=y)


def _slopes_data():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 8, 2, generator=generator)
    return x, x[..., 0] + 0.5 * torch.randn(5, 8, generator=generator)


def test_vectors_in_plates_are_not_tried_with_factors_of_numbers(monkeypatch):
    x, y = _slopes_data()
    for name in ("EXACT", "NEAR_NUMBER"):  # tried however near the start is
        monkeypatch.setattr(f"pyro_graphflows.guides.start.{name}", -1.0)
    pyro.set_rng_seed(0)
    assert "second derivatives" not in auto_faithful_guide(slopes, x, y).describe(verbose=True)


def test_no_second_derivatives_are_found_beside_priors_that_are_not_independent(monkeypatch):
    x, y = _slopes_data()
    mode = find_mode(slopes, (x, y, True), {}, trace_model(slopes, (x, y, True), {}, strict=False))
    monkeypatch.setattr("pyro_graphflows.guides.second_derivatives._Restricted", None)
    assert joint_factors(mode, {"weights": ()}, {}) == {}


def heavy(y):
    wide = pyro.sample("wide", dist.HalfCauchy(2.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(z - (z * wide).exp() + (z * wide).exp(), 1.0), obs=y)


def test_a_point_without_a_density_does_not_say_that_points_cannot_be_mapped():
    y = torch.zeros(3)
    posterior = LogPosterior(heavy, (y,), {}, trace_model(heavy, (y,), {}, strict=False))
    points = torch.tensor([[3.6, 3.0], [0.1, 0.2], [-0.3, 0.4]])
    assert not bool(posterior(points[0]).isfinite())  # infinity less infinity
    assert posterior.takes_many(points)
    assert not posterior.takes_many(points[:1].expand(3, -1))
