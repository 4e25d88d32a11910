"""The models of the study on real data against reference draws and evidences, and its runner.

The files of the posteriors are not part of the project: tests that need them skip without. Their folder is named by
REAL_MODELS_DATA.
"""

import math
import os
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the studies are no part of the package

from studies.real_models import check as checks  # noqa: E402
from studies.real_models.log_joint import LogJoint  # noqa: E402
from studies.real_models.models import POSTERIORS, find  # noqa: E402
from studies.real_models.ordered import PositiveOrderedNormal  # noqa: E402
from studies.real_models.posterior import DATA_VARIABLE, data_folder, read_reference  # noqa: E402

DATA = Path(os.environ.get(DATA_VARIABLE, ROOT.parent / "shared" / "data" / "posteriors" / "posteriordb"))
QUICK = {
    "eight_schools-eight_schools_noncentered",
    "gp_pois_regr-gp_regr",
    "garch-garch11",
    "earnings-earn_height",
    "mesquite-logmesquite",
    "arK-arK",
    "sblri-blr",
}
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the posteriors' files are not here")


@needs_data
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in POSTERIORS]
)
def test_the_model_is_the_posterior_of_its_reference(name):
    """A failure means that the Pyro model has another density than the one the draws and the evidence are of."""
    folder = data_folder(DATA)
    num = 4_000 if name in QUICK else 20_000
    outcome = checks.check(POSTERIORS[name], read_reference(folder, name), folder, num=num)
    assert outcome.passed, outcome


@needs_data
@pytest.mark.parametrize("name", ["eight_schools-eight_schools_noncentered", "mesquite-logmesquite"])
def test_a_wrong_model_is_noticed(name):
    """The negative control: the data moved by half their spread."""
    folder = data_folder(DATA)
    reference = read_reference(folder, name)
    field = {"eight": "y", "mesqu": "weight"}[name[:5]]
    reference.data[field] = reference.data[field] + reference.data[field].std() / 2
    assert not checks.check(POSTERIORS[name], reference, folder, num=4_000).passed


@needs_data
def test_many_points_at_once_have_the_densities_they_have_alone():
    folder = data_folder(DATA)
    for name, posterior in POSTERIORS.items():
        reference = read_reference(folder, name)
        sites = posterior.sites(reference.draws)
        args = posterior.arguments(reference.data)
        log_joint = LogJoint(posterior.model, args, posterior.plates, {k: v[0] for k, v in sites.items()})
        u = log_joint.unconstrain(sites)[:3]
        alone = torch.cat([log_joint.values_at(row.unsqueeze(0)) for row in u])
        torch.testing.assert_close(log_joint.values_at(u), alone, rtol=1e-10, atol=1e-8)
        back = posterior.parameters({k: v[:3] for k, v in sites.items()})
        for key, value in reference.draws.items():
            torch.testing.assert_close(back[key], value[:3])


@needs_data
def test_the_solver_of_the_compartment_model_is_fine_enough():
    reference = read_reference(data_folder(DATA), "one_comp_mm_elim_abs-one_comp_mm_elim_abs")
    assert checks.step_error(reference, 0.1) < 2e-3  # beside a noise of about 6 % in each measurement


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(SystemExit, match="give --data or set REAL_MODELS_DATA"):
        data_folder(None)
    with pytest.raises(SystemExit, match="there is none"):
        data_folder(tmp_path / "nothing")


def test_posteriors_are_found_by_name_and_kind():
    assert [p.name for p in find(["radon"])] == ["radon_mn-radon_variable_intercept_centered"]
    assert len(find([])) == len(POSTERIORS) == 33
    assert {p.kind for p in find(["time series"])} == {"time series"}
    with pytest.raises(SystemExit, match="nothing matches 'nowhere'"):
        find(["nowhere"])


def test_the_log_joint_of_a_normal_is_its_density():
    """exp(u) is log-normal: the density of u is normal, the Jacobian included."""

    def model():
        x = pyro.sample("x", dist.LogNormal(1.0, 2.0))
        with pyro.plate("n", 2):
            pyro.sample("y", dist.Normal(x.log(), 1.0), obs=torch.tensor([0.0, 3.0]))

    log_joint = LogJoint(model, (), 1, {"x": torch.tensor(1.0)})
    u = torch.linspace(-2, 3, 5).unsqueeze(-1)
    normal = torch.distributions.Normal
    expected = normal(1.0, 2.0).log_prob(u[:, 0]) + normal(u, 1.0).log_prob(torch.tensor([0.0, 3.0])).sum(-1)
    torch.testing.assert_close(log_joint(u), expected)


@pytest.mark.parametrize("loc", [[0.0, 3.0], [3.0, 10.0], [-1.0, -2.0]])
def test_the_ordered_normal_is_normalised_and_drawn_right(loc):
    """The normalising constant is the probability of the restriction; means of draws by their standard errors."""
    normal = PositiveOrderedNormal(torch.tensor(loc), torch.tensor([1.0, 2.0]))
    free = torch.distributions.Normal(torch.tensor(loc), torch.tensor([1.0, 2.0]))
    x = free.sample((400_000,))
    inside = (x[:, 0] > 0) & (x[:, 1] > x[:, 0])
    rate = inside.double().mean().item()
    error = math.sqrt(rate * (1 - rate) / len(x))
    point = torch.tensor([0.5, 1.5])
    constant = (free.log_prob(point).sum() - normal.log_prob(point)).exp().item()
    assert abs(constant - rate) < 5 * error
    draws = normal.expand([3]).sample((20_000,))
    assert draws.shape == (20_000, 3, 2)
    assert bool((draws[..., 0] > 0).all())
    assert bool((draws[..., 1] > draws[..., 0]).all())
    draws, kept = draws.reshape(-1, 2), x[inside]
    error = (draws.var(0) / len(draws) + kept.var(0) / len(kept)).sqrt()
    assert bool(((draws.mean(0) - kept.mean(0)).abs() < 5 * error).all())
