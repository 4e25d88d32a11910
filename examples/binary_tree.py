r"""What a guide must look at: three inverses of one Gaussian binary tree, trained the same way.

Each node of the tree is normal around a multiple of its parent, the leaves are observed. The posterior of the inner
nodes is approximated by one amortised guide, trained on joint samples of the model (inference compilation), with three
factorisations: ``stochastic`` only turns the edges around, ``auto`` is the faithful inverse with the fewest edges,
``full`` gives each latent all data and all latents before it. The tree is linear-Gaussian, so the least divergence from
the posterior that each factorisation allows, its *gap*, is known exactly.

    python examples/binary_tree.py                # about a minute
    python examples/binary_tree.py --depth 6

References:
    [1] Webb, Golinski, Zinkov, Siddharth, Rainforth, Teh and Wood (2018), Faithful Inversion of Generative Models
    for Effective Amortized Inference, NeurIPS. The study of its Figures 1 and 2 is in ``studies/comi``.
"""

import argparse

import pyro
import torch

from pyro_graphflows import InferenceCompilation, auto_faithful_guide, binary_tree

INVERSES = ("stochastic", "auto", "full")


def divergence(network, guide, num_samples=2000, seed=1):
    """Return the mean over data of KL(p(z|x) || q(z|x)) and its standard error, by joint samples."""
    samples = network.sample(num_samples, seed)
    columns = {name: torch.tensor(samples[:, i]) for i, name in enumerate(network.names)}
    x = torch.stack([columns[name] for name in network.observed], -1)
    z = torch.stack([columns[name] for name in network.latent], -1)
    mean, covariance = network.posterior(x.numpy())
    exact = torch.distributions.MultivariateNormal(torch.tensor(mean), torch.tensor(covariance)).log_prob(z)
    with torch.no_grad():
        latents = {name: columns[name].float() for name in network.latent}
        terms = exact - guide.log_prob(latents, x.float())
    return terms.mean().item(), terms.std().item() / num_samples**0.5


def main(args):
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    network = binary_tree(args.depth, seed=0)
    model = network.pyro_model()
    x = torch.zeros(args.batch_size, len(network.observed))  # says how many data a batch has, no more
    print(f"{network}; divergences in nats, means over data\n")
    print(f"{'inverse':>10} {'edges':>6} {'gap':>8} {'at the start':>13} {'trained':>19}")
    for inverse in INVERSES:
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        guide = auto_faithful_guide(model, x, inverse=inverse)
        start, _ = divergence(network, guide)
        optimizer = torch.optim.Adam(guide.parameters(), lr=args.lr)
        compilation = InferenceCompilation(
            model, guide, optimizer, batch_size=1
        )  # a batch of data is one sample
        for step in range(args.steps):
            optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
            compilation.step(x)
        end, error = divergence(network, guide)
        print(
            f"{inverse:>10} {guide.inverse.num_edges:>6} {network.factorization_gap(guide.inverse):>8.4f} "
            f"{start:>13.4f} {end:>10.4f} ± {error:.4f}",
            flush=True,
        )


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--depth", type=int, default=5, help="of the tree")
    parse.add_argument("--steps", type=int, default=500)
    parse.add_argument("--batch-size", type=int, default=100, help="data in each step")
    parse.add_argument("--lr", type=float, default=1e-3, help="first rate of Adam; falls to zero")
    parse.add_argument("--seed", type=int, default=0)
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
