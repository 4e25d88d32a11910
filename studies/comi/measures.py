"""What the binary-tree study measures, and the exact answers it is measured against (see run.py)."""

import math

import numpy as np
import torch
from scipy.linalg import solve_triangular

DTYPE = torch.float32


class Exact:
    """What is known exactly of a linear-Gaussian network."""

    def __init__(self, network):
        self.network = network
        self.columns = {name: i for i, name in enumerate(network.names)}
        self.observed = [self.columns[name] for name in network.observed]
        self.latent = [self.columns[name] for name in network.latent]
        _, covariance = network.posterior(np.zeros((1, len(self.observed))))
        self.root = np.linalg.cholesky(covariance)
        self.log_norm = np.log(np.diag(self.root)).sum() + 0.5 * len(self.latent) * math.log(2 * math.pi)
        # E[-log p(z|x)], the constant of the forward divergence
        self.entropy = network.entropy(network.names) - network.entropy()

    def log_posterior(self, z, x):
        """Return log p(z|x) of rows of latents, in the order of ``network.latent``, and of data."""
        mean, _ = self.network.posterior(x)
        white = solve_triangular(self.root, (z - mean).T, lower=True)
        return -0.5 * np.square(white).sum(0) - self.log_norm

    def conditionals(self, z, x, order):
        """Return location and scale of p(z_v | x, z before v), for rows of latents in some order of their columns."""
        places = [self.latent.index(column) for column in order]
        mean, covariance = self.network.posterior(x)
        root = np.linalg.cholesky(covariance[np.ix_(places, places)])
        noise = solve_triangular(root, (z - mean[:, places]).T, lower=True).T
        return z - noise * np.diag(root), np.diag(root)

    def best_log_posterior(self, inverse, x):
        """Return E_q[log p(z|x)] for each row of data, q being the best guide with the inverse's factorisation.

        The best one in forward divergence: the exact conditional of every latent given its parents.
        """
        places = {name: i for i, name in enumerate(self.network.latent)}
        data = {name: i for i, name in enumerate(self.network.observed)}
        among, from_data = np.zeros((len(places), len(places))), np.zeros((len(places), len(data)))
        shift, scale = np.zeros(len(places)), np.zeros(len(places))
        for name, i in places.items():
            weights, shift[i], scale[i] = self.network.conditional(name, inverse.parents[name])
            for parent, weight in zip(inverse.parents[name], weights, strict=True):
                if parent in places:
                    among[i, places[parent]] = weight
                else:
                    from_data[i, data[parent]] = weight
        solved = np.linalg.inv(np.eye(len(places)) - among)
        away = (x @ from_data.T + shift) @ solved.T - self.network.posterior(x)[0]
        white = solve_triangular(self.root, np.c_[away.T, solved * scale], lower=True)
        return (
            -0.5 * np.square(white[:, : len(x)]).sum(0)
            - 0.5 * np.square(white[:, len(x) :]).sum()
            - self.log_norm
        )


class JointDensity:
    """log q(z|x) of joint samples (in the order of ``network.names``) by one pass of the guide's network.

    ``guide.log_prob`` runs the guide level by level as Pyro sites. Where all values are known, as in inference
    compilation, one pass gives the same numbers much faster (both are compared before and after training).
    """

    def __init__(self, guide, network):
        (block,) = guide.blocks
        conditionals = block.conditionals
        self.network, self.features = conditionals.network, block.inputs.features
        sites = list(conditionals.outputs)
        columns = {name: i for i, name in enumerate(network.names)}
        self.context = [columns[name] for name in block.inputs.names]
        self.latent = [columns[name] for name in sites]
        self.loc = [conditionals.outputs[name].start for name in sites]
        self.log_scale = [i + 1 for i in self.loc]
        parts = zip(*map(conditionals.output_units, sites), strict=True)
        self.shift, self.scale = (torch.cat(part) for part in parts)
        self.constant = float(self.scale.log().sum()) + 0.5 * len(sites) * math.log(2 * math.pi)

    def __call__(self, joint):
        """Return the log-densities of joint samples in rows."""
        u = (joint[:, self.latent] - self.shift) / self.scale
        loc, log_scale = self.parameters(joint, u)
        return -self.constant - (log_scale + 0.5 * ((u - loc) * (-log_scale).exp()) ** 2).sum(-1)

    def parameters(self, joint, u):
        """Return location and log-scale of all standardised latents, in sampling order."""
        outputs = self.network(torch.cat([self.features(joint[:, self.context]), u], -1)).squeeze(-1)
        return outputs[:, self.loc], outputs[:, self.log_scale]

    def conditionals(self, joint):
        """Return location and scale of all latents given their parents, in sampling order."""
        loc, log_scale = self.parameters(joint, (joint[:, self.latent] - self.shift) / self.scale)
        return self.shift + self.scale * loc, self.scale * log_scale.exp()

    @torch.no_grad()
    def num_constant(self, joint):
        """Return how many conditionals do not look at their parents: all their hidden units are dead."""
        loc, _ = self.parameters(joint, (joint[:, self.latent] - self.shift) / self.scale)
        return int((loc.amax(0) - loc.amin(0) < 1e-6).sum())


class Judge:
    """Measures guides: E[KL(p(z|x) || q(z|x))] on fixed joint samples, log p(z|x) of their samples on fixed data.

    The divergence is the training objective minus its exact constant. With the latents in the guide's order it is the
    sum of the divergences of p(z_v | x, z before v) from q(z_v | parents of v), each known in closed form, and only
    their mean over joint samples (z, x) is estimated. That is far more precise than the mean of -log q(z|x).
    """

    def __init__(self, exact, num_samples, seed, num_data=5):
        self.exact = exact
        self.samples = exact.network.sample(num_samples, seed)
        self.joint = torch.tensor(self.samples, dtype=DTYPE)
        self.data = exact.network.sample(num_data, seed + 1)[:, exact.observed]
        self.conditionals = {}

    @torch.no_grad()
    def divergence(self, density):
        """Return the estimate and its standard error."""
        key = tuple(density.latent)
        if key not in self.conditionals:
            x, z = self.samples[:, self.exact.observed], self.samples[:, density.latent]
            self.conditionals[key] = self.exact.conditionals(z, x, density.latent)
        p_loc, p_scale = self.conditionals[key]
        parts = [density.conditionals(part) for part in self.joint.split(2000)]
        q_loc, q_scale = (torch.cat(part).double().numpy() for part in zip(*parts, strict=True))
        ratio = (p_scale / q_scale) ** 2
        terms = 0.5 * (ratio - 1 - np.log(ratio) + ((p_loc - q_loc) / q_scale) ** 2).sum(-1)
        return float(terms.mean()), float(terms.std(ddof=1) / math.sqrt(len(terms)))

    @torch.no_grad()
    def log_posterior(self, guide, draws=100):
        """Return the mean of log p(z|x) over draws from the guide, for each of the fixed data sets."""
        x = np.repeat(self.data, draws, 0)
        latents = guide(torch.tensor(x, dtype=DTYPE))
        z = torch.stack([latents[name] for name in self.exact.network.latent], -1).double().numpy()
        return self.exact.log_posterior(z, x).reshape(-1, draws).mean(1).tolist()


def compare_densities(guide, density, judge):
    """Return the largest difference of the one-pass density and ``guide.log_prob`` on some joint samples."""
    joint = judge.joint[:50]
    names = judge.exact.columns
    latents = {name: joint[:, names[name]] for name in judge.exact.network.latent}
    with torch.no_grad():
        other = guide.log_prob(latents, joint[:, judge.exact.observed])
        largest = float((density(joint) - other).abs().max())
        if largest > 1e-4 * float(other.abs().max()):
            raise RuntimeError(
                f"Expected the same density from one pass as from guide.log_prob; differs by {largest}."
            )
    return largest
