"""Models with a known posterior and guides for them, for the tests of posteriors and what is made of them."""

import pyro
import pyro.distributions as dist
import torch


class Groups:
    """mu ~ N(0, 2); in a plate of groups theta_j ~ N(mu, 1.5), y_j ~ N(theta_j, s_j). All by hand.

    A shared and a local latent; the guide is exact, or wrong by a factor in its scales.
    """

    tau = 1.5
    prior = 2.0

    def __init__(self, num_groups=6):
        self.s = 0.5 + torch.rand(num_groups)
        self.y = 1.0 + 2.0 * torch.randn(num_groups)

    @property
    def args(self):
        return self.y, self.s

    def model(self, y, s):
        mu = pyro.sample("mu", dist.Normal(0.0, self.prior))
        with pyro.plate("groups", len(s)):
            theta = pyro.sample("theta", dist.Normal(mu, self.tau))
            pyro.deterministic("twice", 2 * theta)
            return pyro.sample("y", dist.Normal(theta, s), obs=y)

    def mu_given(self, y, s):
        variance = self.tau**2 + s**2
        precision = 1 / self.prior**2 + (1 / variance).sum()
        return (y / variance).sum() / precision, precision**-0.5

    def theta_given(self, mu, y, s):
        precision = 1 / self.tau**2 + 1 / s**2
        return (mu / self.tau**2 + y / s**2) / precision, precision**-0.5

    def guide(self, wide=1.0, shift=0.0):
        def guide(y, s):
            loc, scale = self.mu_given(y, s)
            mu = pyro.sample("mu", dist.Normal(loc + shift, wide * scale))
            with pyro.plate("groups", len(s)):
                loc, scale = self.theta_given(mu, y, s)
                pyro.sample("theta", dist.Normal(loc + shift, wide * scale))

        return guide

    def local_first(self, y, s):
        """theta before mu: independent with the right means and variances, then mu given theta."""
        cov = self.joint_cov(s)
        mean = self.theta_given(self.mu_given(y, s)[0], y, s)[0]
        with pyro.plate("groups", len(s)):
            theta = pyro.sample("theta", dist.Normal(mean, cov.diagonal().sqrt()))
        precision = 1 / self.prior**2 + len(s) / self.tau**2
        total = theta.sum(-1, keepdim=theta.dim() > 1)
        pyro.sample("mu", dist.Normal(total / self.tau**2 / precision, precision**-0.5))

    def joint_cov(self, s):
        """Return the covariance of theta given y."""
        prior = self.tau**2 * torch.eye(len(s)) + self.prior**2
        return torch.linalg.inv(torch.linalg.inv(prior) + torch.diag(1 / s**2))

    def log_evidence(self, y, s):
        cov = torch.diag(self.tau**2 + s**2) + self.prior**2
        return dist.MultivariateNormal(torch.zeros(len(s)), cov).log_prob(y)

    def loo(self):
        """Return log p(y_n | y_-n)."""
        keep = [torch.arange(len(self.y)) != n for n in range(len(self.y))]
        whole = self.log_evidence(self.y, self.s)
        return torch.stack([whole - self.log_evidence(self.y[k], self.s[k]) for k in keep])


class Regression:
    """a, b ~ N(0, 2); y_n ~ N(a + b x_n, 0.7): exact by linear algebra."""

    noise = 0.7

    def __init__(self, num_data=20):
        self.x = torch.randn(num_data)
        self.y = 0.5 + 1.5 * self.x + self.noise * torch.randn(num_data)

    def model(self, x, y=None):
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            mean = pyro.deterministic("mean", a + b * x, event_dim=0)
            return pyro.sample("y", dist.Normal(mean, self.noise), obs=y)

    def posterior(self, x=None, y=None):
        x, y = (self.x, self.y) if x is None else (x, y)
        design = torch.stack([torch.ones_like(x), x], 1)
        cov = torch.linalg.inv(torch.eye(2) / 4 + design.T @ design / self.noise**2)
        return cov @ design.T @ y / self.noise**2, cov

    def guide(self, x, y=None):
        mean, cov = self.posterior()
        a = pyro.sample("a", dist.Normal(mean[0], cov[0, 0] ** 0.5))
        slope = cov[0, 1] / cov[0, 0]
        pyro.sample("b", dist.Normal(mean[1] + slope * (a - mean[0]), (cov[1, 1] - slope * cov[0, 1]) ** 0.5))

    def wide_guide(self, x, y=None):
        """Independent and too wide."""
        mean, cov = self.posterior()
        pyro.sample("a", dist.Normal(mean[0], 1.5 * cov[0, 0] ** 0.5))
        pyro.sample("b", dist.Normal(mean[1], 1.5 * cov[1, 1] ** 0.5))

    def log_evidence(self, x, y):
        design = torch.stack([torch.ones_like(x), x], 1)
        cov = 4 * design @ design.T + self.noise**2 * torch.eye(len(x))
        return dist.MultivariateNormal(torch.zeros(len(x)), cov).log_prob(y)

    def loo(self):
        whole = self.log_evidence(self.x, self.y)
        keep = [torch.arange(len(self.y)) != n for n in range(len(self.y))]
        return torch.stack([whole - self.log_evidence(self.x[k], self.y[k]) for k in keep])
