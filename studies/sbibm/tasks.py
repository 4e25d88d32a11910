r"""The tasks of sbibm as Pyro models, each with the structure that it has: plates, sites of their own, a density.

Observations and reference draws come from the files of the package ``sbibm`` (its code is not imported, whose other
requirements are obsolete). Parameters are the columns of the reference draws, in their order; :attr:`Task.columns` puts
the sites of a model in that order.

A model's distribution that Pyro lacks is here: the crescent of *two moons* and the sufficient statistics of the
*Bernoulli GLM*. Both have the density of what is drawn, the latter up to a constant in the parameters.

References:
    [1] Lueckmann, Boelts, Greenberg, Goncalves and Macke (2021), Benchmarking Simulation-Based Inference,
        AISTATS, appendix T.
"""

import bz2
import csv
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

NUM_OBSERVATIONS = 10


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Its name in the benchmark.
        model: A Pyro model; its one argument is the observation.
        columns: From draws by site, ``(n, ...)`` each, to the columns of the reference draws, ``(n, dim)``.
        shape: The shape in which the model takes an observation.
        guide_options: Options of the guide that its structure asks for.
        data_options: Further ones of guides that read the data themselves and not scores.
        rate: The learning rate of guides that learn from simulations alone.
        batch_size: The number of simulations in each of their steps.
        num_bins: The number of bins of their splines.
        base: The name of its folder in the package, if that is another.
        suffix: Of the name of its files of observations.
        data: From simulations by site to columns like those of an observation.
        constant: Observed sites that no parameter enters: they are the same in all weights, and are left out of these.
    """

    name: str
    model: Callable[..., Any]
    columns: Callable[[Mapping[str, Tensor]], Tensor]
    shape: tuple[int, ...]
    guide_options: Mapping[str, Any]
    data_options: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 2e-3
    batch_size: int = 500
    num_bins: int = 12
    base: str | None = None
    suffix: str = ""
    data: Callable[[Mapping[str, Tensor]], Tensor] = lambda values: values["x"].flatten(1)
    constant: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        """The folder of the task's files in the package."""
        return _package() / "tasks" / (self.base or self.name) / "files"

    def observation(self, number: int) -> Tensor:
        """Return an observation, in the shape that the model takes."""
        path = self.folder / f"num_observation_{number}" / f"observation{self.suffix}.csv"
        return _read(path).reshape(self.shape)

    def reference(self, number: int) -> Tensor:
        """Return the 10,000 draws of the reference posterior of an observation."""
        return _read(self.folder / f"num_observation_{number}" / "reference_posterior_samples.csv.bz2")

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return the least and the largest value of each column, ``(dim,)`` each, which the prior can draw."""
        nodes: Any = poutine.trace(self.model).get_trace(self.observation(1)).nodes
        low, high = {}, {}
        for name, site in nodes.items():
            if site["type"] == "sample" and not site["is_observed"]:
                prior, each = site["fn"], torch.full((1, *site["value"].shape), torch.inf)
                found = isinstance(prior, Box)
                low[name] = prior.low.expand_as(each) if found else -each
                high[name] = prior.high.expand_as(each) if found else each
        return self.columns(low)[0], self.columns(high)[0]


def _package() -> Path:
    found = importlib.util.find_spec("sbibm")
    if found is None or found.origin is None:
        raise SystemExit(
            "Expected the package sbibm, which has the reference draws: pip install --no-deps sbibm"
        )
    return Path(found.origin).parent


def _read(path: Path) -> Tensor:
    """Read a table with a head line, packed or not."""
    packed = path.suffix == ".bz2"
    with bz2.open(path, "rt") if packed else open(path) as file:
        rows = list(csv.reader(file))[1:]
    return torch.tensor([[float(entry) for entry in row] for row in rows])


# ------------------------------------------------------------------------------------------------------ the models
class Box(dist.Uniform):
    """A uniform prior whose guide has no bounds, as neural posterior estimation has none; what lies outside is dropped.

    Where the posterior is narrow, a location in the units of the data is near linear in them; in the logit of its place
    between the bounds it is not.
    """

    support = constraints.real


JITTER = 1e-6  # of the variances of slcp
VARIANCE = 0.1  # of the noise of the two linear tasks, and of the prior of the first


def gaussian_linear(x: Tensor) -> None:
    """Ten means, each with one datum."""
    with pyro.plate("dimensions", x.shape[-1]):
        theta = pyro.sample("theta", dist.Normal(0.0, VARIANCE**0.5))
        pyro.sample("x", dist.Normal(theta, VARIANCE**0.5), obs=x)


def gaussian_linear_uniform(x: Tensor) -> None:
    """The same with a uniform prior."""
    with pyro.plate("dimensions", x.shape[-1]):
        theta = pyro.sample("theta", Box(-1.0, 1.0))
        pyro.sample("x", dist.Normal(theta, VARIANCE**0.5), obs=x)


def gaussian_mixture(x: Tensor) -> None:
    """Two means; noise of scale 1 or 0.1, the same of both."""
    theta = torch.stack([pyro.sample(f"theta_{i}", Box(-10.0, 10.0)) for i in range(2)], -1)
    scales = torch.tensor([1.0, 0.1]).unsqueeze(-1)
    each = dist.Normal(theta.unsqueeze(-2), scales).to_event(1)
    pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.full((2,), 0.5)), each), obs=x)


class Crescent(dist.TorchDistribution):
    """A half circle of radius about 0.1, moved by a location.

    Args:
        loc: The location, ``(*batch, 2)``.
    """

    arg_constraints: ClassVar = {"loc": constraints.real_vector}
    support = constraints.real_vector
    radius, width, offset = 0.1, 0.01, 0.25

    def __init__(self, loc: Tensor, validate_args: bool | None = None) -> None:
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Crescent":
        """See :meth:`torch.distributions.Distribution.expand`."""
        return Crescent(self.loc.expand(*batch_shape, 2), validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw an angle and a radius."""
        shape = self._extended_shape(torch.Size(sample_shape))[:-1]
        angle = (torch.rand(shape) - 0.5) * math.pi
        r = self.radius + self.width * torch.randn(shape)
        return self.loc + torch.stack([r * angle.cos() + self.offset, r * angle.sin()], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """The density of radius and angle over the radius; of negative radii too, which hardly occur."""
        u, v = (value - self.loc).unbind(-1)
        u = u - self.offset
        r = (u.square() + v.square()).clamp(min=1e-12).sqrt()
        own = torch.where(u > 0, r, -r)  # a negative radius lies on the other side
        return dist.Normal(self.radius, self.width).log_prob(own) - (math.pi * r).log()


def two_moons(x: Tensor) -> None:
    """Two parameters of which the absolute value of the sum is seen, and the difference."""
    a, b = (pyro.sample(f"theta_{i}", Box(-1.0, 1.0)) for i in range(2))
    loc = torch.stack([-(a + b).abs(), b - a], -1) / 2**0.5
    pyro.sample("x", Crescent(loc), obs=x)


def slcp(x: Tensor) -> None:
    """Four points of a normal in the plane: two locations, two square roots of scales, a correlation."""
    m0, m1, s0, s1, r = (pyro.sample(f"theta_{i}", Box(-3.0, 3.0)) for i in range(5))
    first, second, rho = s0.square(), s1.square(), r.tanh()
    # a root of the covariance [[f^2 + e, r f s], [r f s, s^2 + e]], which rounding may leave without one
    root = (first.square() + JITTER).sqrt()
    rest = second.square() * (first.square() * (1 - rho.square()) + JITTER) / root.square() + JITTER
    rows = (
        torch.stack([root, torch.zeros_like(root)], -1),
        torch.stack([rho * first * second / root, rest.sqrt()], -1),
    )
    with pyro.plate("points", x.shape[-2]):
        each = dist.MultivariateNormal(torch.stack([m0, m1], -1), scale_tril=torch.stack(rows, -2))
        pyro.sample("x", each, obs=x)


@cache
def _distractors() -> tuple[dist.TorchDistribution, Tensor]:
    """Return the distribution of the distractors, and which of the points and these each column of the data is."""
    folder = _package() / "tasks" / "slcp" / "files"
    given = torch.load(folder / "gmm.torch", weights_only=False)
    order = torch.load(folder / "permutation_idx.torch")
    each = given.component_distribution.base_dist
    signs = each.scale_tril.diagonal(
        dim1=-2, dim2=-1
    ).sign()  # some are negative, which the density does not take
    tril = (each.scale_tril * signs.unsqueeze(-2)).float()
    parts = dist.MultivariateStudentT(each.df.float(), each.loc.float(), tril)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(each.loc))), parts), order


def slcp_distractors(x: Tensor) -> None:
    """The same, whose data are 8 of 100 columns; no parameter enters the others, which have a site of their own."""
    noise, order = _distractors()
    points, others = x[order.argsort()].split([8, 92])
    slcp(points.reshape(4, 2))
    pyro.sample("distractors", noise, obs=others)


def _with_distractors(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([values["x"].flatten(1), values["distractors"]], -1)[:, _distractors()[1]]


def _glm() -> tuple[Tensor, Tensor]:
    """Return the design of the GLM, and the precision of its prior."""
    folder = _package() / "tasks" / "bernoulli_glm" / "files"
    size = 9
    difference = torch.eye(size) - torch.diag(torch.ones(size - 1), -1)
    smooth = difference @ difference + torch.diag((torch.arange(size) / size) ** 0.5)
    precision = torch.zeros(size + 1, size + 1)
    precision[0, 0] = 0.5
    precision[1:, 1:] = smooth.T @ smooth
    return torch.load(folder / "design_matrix.pt"), precision


class GLMStatistics(dist.TorchDistribution):
    """The sufficient statistics of a logistic regression; the density is without its factor that no parameter enters.

    Args:
        weights: ``(*batch, 10)``.
        design: ``(100, 10)``.
    """

    arg_constraints: ClassVar = {"weights": constraints.real_vector}
    support = constraints.real_vector

    def __init__(self, weights: Tensor, design: Tensor, validate_args: bool | None = None) -> None:
        self.weights, self.design = weights, design
        super().__init__(weights.shape[:-1], weights.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "GLMStatistics":
        """See :meth:`torch.distributions.Distribution.expand`."""
        return GLMStatistics(self.weights.expand(*batch_shape, -1), self.design, validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw bits, and return their sums with the columns of the design."""
        weights = self.weights.expand(self._extended_shape(torch.Size(sample_shape)))
        bits = torch.bernoulli((weights @ self.design.T).sigmoid())
        return bits @ self.design

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-likelihood of any bits with these sums."""
        logits = self.weights @ self.design.T
        return (self.weights * value).sum(-1) - torch.nn.functional.softplus(logits).sum(-1)


def bernoulli_glm(x: Tensor) -> None:
    """Ten weights of a logistic regression, of which the sufficient statistics are seen."""
    design, precision = _glm()
    theta = pyro.sample("theta", dist.MultivariateNormal(torch.zeros(10), precision_matrix=precision))
    pyro.sample("x", GLMStatistics(theta, design), obs=x)


def bernoulli_glm_raw(x: Tensor) -> None:
    """The same, of which the hundred bits are seen."""
    design, precision = _glm()
    theta = pyro.sample("theta", dist.MultivariateNormal(torch.zeros(10), precision_matrix=precision))
    pyro.sample("x", dist.Bernoulli(logits=theta @ design.T).to_event(1), obs=x)


def _stacked(number: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def columns(draws: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([draws[f"theta_{i}"].reshape(-1) for i in range(number)], -1)

    return columns


def _vector(draws: Mapping[str, Tensor]) -> Tensor:
    theta = draws["theta"]
    return theta.reshape(len(theta), -1)


TASKS = {
    task.name: task
    for task in (
        Task("gaussian_linear", gaussian_linear, _vector, (10,), {}),
        Task("gaussian_linear_uniform", gaussian_linear_uniform, _vector, (10,), {}),
        Task("gaussian_mixture", gaussian_mixture, _stacked(2), (2,), {}),
        Task("two_moons", two_moons, _stacked(2), (2,), {}),
        Task("slcp", slcp, _stacked(5), (4, 2), {"pool": "deepset"}),
        Task(
            *("slcp_distractors", slcp_distractors, _stacked(5), (100,), {"pool": "deepset"}),
            base="slcp",
            suffix="_distractors",
            data=_with_distractors,
            constant=("distractors",),
        ),
        Task("bernoulli_glm", bernoulli_glm, _vector, (10,), {}, rate=1e-2, batch_size=200, num_bins=4),
        Task(
            *("bernoulli_glm_raw", bernoulli_glm_raw, _vector, (100,), {}),
            base="bernoulli_glm",
            suffix="_raw",
            data_options={"embedding": {"x": "linear"}},
            rate=2e-2,
        ),
    )
}
