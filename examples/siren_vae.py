r"""A variational autoencoder that knows the network behind its data, and one that does not.

Few data are drawn from a published Gaussian network whose leaves are observed. ``SIReNVAE`` builds prior, decoder and
encoder after the network, ``VAE`` has the same number of latent variables and no structure. The measure is the negative
log-likelihood of new data minus that of the true network on the same points, in nats: zero is the best that any model
can reach.

    python examples/siren_vae.py                                    # ecoli70, a minute or two
    python examples/siren_vae.py --network magic-niab --multiple 10

References:
    [1] Mouton and Kroon (2022), SIReN-VAE: Leveraging Flows and Amortized Inference for Bayesian Networks. The study of
    its Table 1 and Figure 2 is in ``studies/siren_vae``.
"""

import argparse

import torch

from pyro_graphflows import VAE, Schedule, SIReNVAE, TrainingData, load_network


def draw(network, num, seed):
    """Return observed data with a column for each leaf."""
    return torch.tensor(network.sample(num, seed, network.observed)).float()


def main(args):
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    network = load_network(args.network)
    graph = network.graph()
    train = draw(network, args.multiple * len(network.names), seed=args.seed)
    validation, test = draw(network, 200, seed=1001), draw(network, args.num_test, seed=1002)
    exact = torch.tensor(network.log_evidence(test.double().numpy()))
    print(f"{args.network}: {graph}; {len(train)} training and {len(test)} test points\n")
    print(f"{'model':>9} {'parameters':>11} {'epochs':>7} {'NLL':>9} {'excess over the true network':>30}")
    for name, make in (("VAE", VAE), ("SIReNVAE", SIReNVAE)):
        torch.manual_seed(args.seed)
        vae = make(graph)
        history = vae.fit(
            TrainingData(train, validation=validation),
            optimizer=args.lr,
            schedule=Schedule(args.epochs, max_grad_norm=50.0),
            seed=args.seed,
            progress=False,
        )
        with torch.no_grad():
            evidence = vae.log_evidence(test, num_particles=args.num_particles).log_evidence
        excess = exact - evidence
        error = excess.std().item() / len(excess) ** 0.5
        size = sum(p.numel() for p in vae.parameters())
        print(
            f"{name:>9} {size:>11,} {len(history):>7} {-evidence.mean().item():>9.3f} "
            f"{excess.mean().item():>22.3f} ± {error:.3f}",
            flush=True,
        )


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--network", default="ecoli70", help="a name from pyro_graphflows.list_networks()")
    parse.add_argument("--multiple", type=int, default=2, help="training points for each node of the network")
    parse.add_argument("--num-test", type=int, default=500)
    parse.add_argument("--epochs", type=int, default=600, help="at most so many")
    parse.add_argument("--lr", type=float, default=1e-2, help="first rate of Adam")
    parse.add_argument("--num-particles", type=int, default=200, help="importance samples of each test point")
    parse.add_argument("--seed", type=int, default=0)
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
