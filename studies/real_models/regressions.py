"""Plain regressions, in the units of their data."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from studies.real_models.posterior import Posterior, Values


def flat_regression(x: Tensor, y: Tensor) -> None:
    """Linear regression with flat priors on the coefficients and on the noise scale."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (x.shape[-1],)))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal((x * beta).sum(-1), sigma), obs=y)


def half_cauchy_regression(x: Tensor, y: Tensor) -> None:
    """Linear regression with flat coefficients and a half-Cauchy noise scale."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (x.shape[-1],)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal((x * beta).sum(-1), sigma), obs=y)


def normal_regression(x: Tensor, y: Tensor) -> None:
    """Linear regression without intercept, all priors proper."""
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[-1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal((x * beta).sum(-1), sigma), obs=y)


def diamonds(x: Tensor, y: Tensor) -> None:
    """Linear regression on centred predictors, with an intercept."""
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    with pyro.plate("observations", len(y)):
        pyro.sample("Y", dist.Normal(intercept + (x * b).sum(-1), sigma), obs=y)


def dogs(y: Tensor) -> None:
    """Logistic regression of a shock on the numbers of avoidances and shocks so far; ``y`` is (dogs, trials)."""
    shocks = y.cumsum(-1) - y
    avoidances = (1 - y).cumsum(-1) - (1 - y)
    beta = pyro.sample("beta", dist.Normal(0.0, 100.0).expand([3]).to_event(1))
    logits = beta[..., 0] + beta[..., 1] * avoidances + beta[..., 2] * shocks
    with pyro.plate("dogs", y.shape[-2], dim=-2), pyro.plate("trials", y.shape[-1], dim=-1):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def columns(*predictors: Tensor) -> Tensor:
    """Return the design matrix with a column of ones first."""
    return torch.stack([torch.ones_like(predictors[0]), *predictors], -1)


def earn_height(data: Values) -> tuple[Tensor, Tensor]:
    """Earnings on height."""
    return columns(data["height"]), data["earn"]


def logearn_height_male(data: Values) -> tuple[Tensor, Tensor]:
    """Log earnings on height and sex."""
    return columns(data["height"], data["male"]), data["earn"].log()


def logearn_interaction(data: Values) -> tuple[Tensor, Tensor]:
    """Log earnings on height, sex and their product."""
    height, male = data["height"], data["male"]
    return columns(height, male, height * male), data["earn"].log()


def logearn_logheight_male(data: Values) -> tuple[Tensor, Tensor]:
    """Log earnings on log height and sex."""
    return columns(data["height"].log(), data["male"]), data["earn"].log()


def kidscore_momhs(data: Values) -> tuple[Tensor, Tensor]:
    """Test score on the mother's schooling."""
    return columns(data["mom_hs"]), data["kid_score"]


def kidscore_momhsiq(data: Values) -> tuple[Tensor, Tensor]:
    """Test score on the mother's schooling and IQ."""
    return columns(data["mom_hs"], data["mom_iq"]), data["kid_score"]


def kidscore_interaction_c(data: Values) -> tuple[Tensor, Tensor]:
    """Test score on the centred schooling and IQ and their product."""
    school = data["mom_hs"] - data["mom_hs"].mean()
    iq = data["mom_iq"] - data["mom_iq"].mean()
    return columns(school, iq, school * iq), data["kid_score"]


def kidscore_mom_work(data: Values) -> tuple[Tensor, Tensor]:
    """Test score on the mother's work, a factor of four levels."""
    levels = [(data["mom_work"] == level).to(data["mom_iq"].dtype) for level in (2, 3, 4)]
    return columns(*levels), data["kid_score"]


def logmesquite(data: Values) -> tuple[Tensor, Tensor]:
    """Log weight of mesquite bushes on the logarithms of their sizes."""
    names = ("diam1", "diam2", "canopy_height", "total_height", "density")
    return columns(*(data[name].log() for name in names), data["group"]), data["weight"].log()


def logmesquite_logvash(data: Values) -> tuple[Tensor, Tensor]:
    """Log weight on log volume, area, shape and height."""
    first, second = data["diam1"].log(), data["diam2"].log()
    area = first + second
    volume = area + data["canopy_height"].log()
    x = columns(volume, area, first - second, data["total_height"].log(), data["group"])
    return x, data["weight"].log()


def logmesquite_logvolume(data: Values) -> tuple[Tensor, Tensor]:
    """Log weight on log volume."""
    volume = (data["diam1"] * data["diam2"] * data["canopy_height"]).log()
    return columns(volume), data["weight"].log()


def nes(data: Values) -> tuple[Tensor, Tensor]:
    """Party identification on ideology, race, age group, education, gender and income."""
    ages = [(data["age_discrete"] == level).to(data["race_adj"].dtype) for level in (2, 3, 4)]
    x = columns(data["real_ideo"], data["race_adj"], *ages, data["educ1"], data["gender"], data["income"])
    return x, data["partyid7"]


def sblri(data: Values) -> tuple[Tensor, Tensor]:
    """The design as it is."""
    return data["X"], data["y"]


def centred_diamonds(data: Values) -> tuple[Tensor, Tensor]:
    """The design without its column of ones, centred."""
    x = data["X"][:, 1:]
    return x - x.mean(0), data["Y"]


def outcomes(data: Values) -> tuple[Tensor]:
    """The outcomes alone."""
    return (data["y"],)


FLAT = {
    "earnings-earn_height": earn_height,
    "earnings-logearn_height_male": logearn_height_male,
    "earnings-logearn_interaction": logearn_interaction,
    "earnings-logearn_logheight_male": logearn_logheight_male,
    "kidiq_with_mom_work-kidscore_interaction_c": kidscore_interaction_c,
    "kidiq_with_mom_work-kidscore_mom_work": kidscore_mom_work,
    "mesquite-logmesquite": logmesquite,
    "mesquite-logmesquite_logvash": logmesquite_logvash,
    "mesquite-logmesquite_logvolume": logmesquite_logvolume,
    "nes1972-nes": nes,
    "nes1980-nes": nes,
    "nes1988-nes": nes,
    "nes1996-nes": nes,
}
HALF_CAUCHY = {"kidiq-kidscore_momhs": kidscore_momhs, "kidiq-kidscore_momhsiq": kidscore_momhsiq}

REGRESSIONS = [
    *(Posterior(name, "regression", flat_regression, make, 1, False) for name, make in FLAT.items()),
    *(
        Posterior(name, "regression", half_cauchy_regression, make, 1, False)
        for name, make in HALF_CAUCHY.items()
    ),
    Posterior("sblri-blr", "regression", normal_regression, sblri, 1, True),
    Posterior("diamonds-diamonds", "regression", diamonds, centred_diamonds, 1, True),
    Posterior("dogs-dogs", "regression", dogs, outcomes, 2, True),
]
