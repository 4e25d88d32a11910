r"""A faithful guide for a gene network, against the exact answer.

The network ecoli70 of the bnlearn repository (46 genes, linear-Gaussian) becomes a Pyro model whose 24 leaves are
observed. Three amortised guides for its 22 latent genes are compiled and trained in the same way:

- ``faithful``: on the faithful inverse (Webb et al. 2018), which asserts only independencies that the posterior has;
- ``heuristic``: on the stochastic inverse (Stuhlmueller et al. 2013), which only turns edges around;
- ``mean_field``: each latent gene given all observed ones, none given another.

Since everything is linear-Gaussian, all that a guide should give is known exactly: the evidence, the posterior, and
the divergence below which no guide with a given factorisation can fall (its *gap*).

    python examples/quickstart.py --out out/quickstart
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO

from pyro_graphflows import Schedule, TrainingData, auto_faithful_guide, fit, load_network, log_evidence
from pyro_graphflows.plotting import plot_joints, plot_learning_curves, plot_marginals, plot_model_and_inverse

GUIDES = {"faithful": "auto", "heuristic": "stochastic", "mean_field": "mean_field"}


def observations(network, num_data, seed):
    """Return data for the observed genes as a float tensor of shape (num_data, D)."""
    columns = [network.names.index(name) for name in network.observed]
    return torch.tensor(network.sample(num_data, seed)[:, columns], dtype=torch.float32)


def divergence(network, guide, x, draws=100, seed=0):
    """Return the mean over x of KL(p(z|x) || q(z|x)) and its standard error, by draws from the exact posterior."""
    mean, covariance = map(torch.tensor, network.posterior(x.double().numpy()))
    posterior = torch.distributions.MultivariateNormal(mean, covariance)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        z = posterior.sample((draws,))
        latents = {name: z[..., i].float() for i, name in enumerate(network.latent)}
        terms = (posterior.log_prob(z) - guide.log_prob(latents, x)).mean(0)
    return terms.mean().item(), terms.std().item() / len(terms) ** 0.5


def negative_elbo(model, guide, x, particles=10):
    """Return the ELBO per datum."""
    with torch.no_grad():
        loss = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
        return -loss.loss(model, guide, x) / len(x)


def main(args):
    start = time.perf_counter()
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    network = load_network(args.network)
    model = network.pyro_model()
    train = observations(network, args.num_data, seed=args.seed + 1)
    test = observations(network, args.num_test, seed=args.seed + 2)
    print(
        f"{args.network}: {len(network.latent)} latent and {len(network.observed)} observed variables; "
        f"{len(train)} data to train on, {len(test)} fresh ones to test on\n"
    )

    rows, histories, guides = [], {}, {}
    for label, inverse in GUIDES.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        guide = auto_faithful_guide(model, train[:100], inverse=inverse)
        at_start, _ = divergence(network, guide, test)
        print(f"{label}: {guide.inverse.num_edges} edges, {len(guide.inverse.levels)} sampling levels")
        histories[label] = fit(
            model,
            guide,
            TrainingData(train, validation=observations(network, 500, seed=args.seed + 3)),
            optimizer=args.lr,
            # the rate falls once two epochs bring less than a hundredth of a nat
            schedule=Schedule(args.epochs, patience=2, min_improvement=0.01, lr_factor=0.2),
            seed=args.seed,
        )
        at_end, error = divergence(network, guide, test)
        few = test[: args.num_evidence]
        evidence = log_evidence(model, guide, few, num_particles=500, chunk_size=100)
        rows.append(
            (
                label,
                network.factorization_gap(guide.inverse),
                at_start,
                f"{at_end:.4f} ± {error:.4f}",
                negative_elbo(model, guide, test),
                evidence.log_evidence.mean().item() - network.log_evidence(few.double().numpy()).mean(),
                evidence.ess.mean().item(),
            )
        )
        guides[label] = guide

    exact = network.log_evidence(test.double().numpy())
    print(f"\nExact log evidence of the test data: {exact.mean():.4f} nats per datum.")
    print(
        "All in nats per datum. gap: the least KL(p(z|x) || q(z|x)) of any guide with this factorisation (exact)."
    )
    print(
        "KL is that of the posterior from the guide, as the gap; training lowers the other, exact − ELBO, "
        "so that a guide whose gap is large may move away."
    )
    print(
        f"IWAE-500 − exact: on {args.num_evidence} test data, and the effective sample size of its 500 particles.\n"
    )
    header = ("guide", "gap", "KL at start", "KL trained", "ELBO", "ELBO − exact", "IWAE-500 − exact", "ESS")
    lines = [
        (
            label,
            f"{gap:.4f}",
            f"{first:.4f}",
            last,
            f"{elbo:.3f}",
            f"{elbo - exact.mean():.4f}",
            f"{iwae:.4f}",
            f"{ess:.0f}",
        )
        for label, gap, first, last, elbo, iwae, ess in rows
    ]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    for line in [header, *lines]:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))

    faithful = guides["faithful"]
    plot_model_and_inverse(faithful.model_graph, faithful.inverse, out / "inverse.png")
    plot_learning_curves(
        {label: history.validation_loss for label, history in histories.items()},
        quantity="negative ELBO (nats per datum)",
        reference=-network.log_evidence(
            observations(network, 500, seed=args.seed + 3).double().numpy()
        ).mean(),
        path=out / "learning_curves.png",
    )
    one = test[:1]
    samples = {}
    for label, guide in guides.items():
        with torch.no_grad(), pyro.plate("draws", 4000, dim=-2):
            samples[label] = {name: value[:, 0] for name, value in guide(one).items()}
    mean, covariance = network.posterior(one.double().numpy())
    sds = np.sqrt(np.diag(covariance))
    exact_marginals = {name: (float(mean[0, i]), float(sds[i])) for i, name in enumerate(network.latent)}
    plot_marginals(samples, exact_marginals, path=out / "marginals.png")
    plot_joints(samples, (network.latent, mean[0], covariance), path=out / "joints.png")
    print(f"\nPictures in {out}: inverse.png, learning_curves.png, marginals.png, joints.png")
    print(f"Total time {time.perf_counter() - start:.0f} s.")


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--network", default="ecoli70", help="a name from pyro_graphflows.list_networks()")
    parse.add_argument("--num-data", type=int, default=5000, help="training data")
    parse.add_argument("--num-test", type=int, default=1000, help="fresh test data")
    parse.add_argument(
        "--num-evidence", type=int, default=200, help="test data for the importance-sampled evidence"
    )
    parse.add_argument("--epochs", type=int, default=10)
    parse.add_argument("--lr", type=float, default=1e-3)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--out", default="out/quickstart", help="folder for the pictures")
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
