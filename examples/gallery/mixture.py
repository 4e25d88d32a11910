"""A mixture whose classes the guide sums over.

A mixture of three normal distributions of a latent position that is measured with noise; data are simulated. The
posterior of a position has up to three modes: the guide is q(class | x) q(position | class, x), and TraceEnum_ELBO
sums over classes.

    python examples/gallery/mixture.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from compare_guides import add_flags, compare, figure, save
from pyro.infer import TraceEnum_ELBO

CENTRES, SPREAD, NOISE = torch.tensor([-3.0, 0.0, 3.0]), 0.5, 1.5


def model(x):
    """Data of known mixture components, measured with noise."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.4, 0.3])))
        z = pyro.sample("z", dist.Normal(CENTRES[k], SPREAD))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def main(args):
    """Train the guide; draw its posterior of one datum beside the exact one."""
    pyro.set_rng_seed(args.seed + 1)
    classes = torch.distributions.Categorical(torch.tensor([0.3, 0.4, 0.3])).sample((args.num_data,))
    x = CENTRES[classes] + (SPREAD**2 + NOISE**2) ** 0.5 * torch.randn(args.num_data)
    x[0] = 1.5  # between two components
    exact = torch.logsumexp(
        torch.tensor([0.3, 0.4, 0.3]).log()
        + torch.distributions.Normal(CENTRES, (SPREAD**2 + NOISE**2) ** 0.5).log_prob(x[:, None]),
        1,
    ).sum()
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    posteriors = compare(args, model, (x,), lr=1e-3, loss=loss, others=False, enumerate_sites=True)
    print(f"exact log-evidence: {float(exact):.2f}; Pyro's AutoNormal does not serve discrete sites")
    grid = torch.linspace(-5, 6, 400)
    weights = (
        torch.tensor([0.3, 0.4, 0.3])
        * torch.distributions.Normal(CENTRES, SPREAD).log_prob(grid[:, None]).exp()
    )
    density = weights.sum(1) * torch.distributions.Normal(grid, NOISE).log_prob(x[0]).exp()
    made, (ax,) = figure()
    ax.hist(posteriors["faithful"].draws["z"][:, 0], 60, density=True, alpha=0.5, label="guide")
    ax.plot(grid, density / torch.trapezoid(density, grid), color="k", linewidth=1, label="exact")
    ax.set(xlabel="position of the datum at 1.5", ylabel="density")
    ax.legend(frameon=False)
    save(made, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-data", type=int, default=300)
    main(add_flags(parser, 1000, "mixture").parse_args())
