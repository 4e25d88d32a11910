r"""Graph VAE: latent dependency structures, learned and given, on images.

Four models with the same nodes and networks and different edges between the latent nodes are trained by the same
schedule and compared by their test bound, divergence and importance-weighted log-likelihood:

- ``learned``: the Graph VAE, every edge behind a gate;
- ``full``: all edges (FC-VAE);
- ``chain``: each node given the one before (Ladder VAE);
- ``independent``: no edges (VAE), with a wider encoder so that the number of parameters is that of ``full``.

Data sets: ``digits`` comes with scikit-learn; ``mnist``, ``binarized_mnist``, ``omniglot`` and ``cifar10`` are read
from the folder ``--data`` (see ``pyro_graphflows.datasets`` for the file formats).

    python -m studies.graph_vae.run                          # digits, learned against independent, minutes
    python -m studies.graph_vae.run --data-set binarized_mnist --data DIR --structures learned --epochs 50
    python -m studies.graph_vae.run --study --data DIR       # all runs of the page; `make graphvae-table`

Every run is one line of the file ``--results``, written when its figures are there; checkpoints, notes of the epochs so
far and trained weights are in the folder ``--work``. A run that was interrupted goes on after its last epoch, and one
that is asked for more epochs continues and gets a new line. ``report.py`` draws the pages from the runs that are there.

References:
    [1] He, Gong, Marino, Mori and Lehrmann (2019), Variational Autoencoders with Jointly Optimized Latent Dependency
    Structure, ICLR.
"""

import argparse
import os
import sys

import pyro
import torch

from pyro_graphflows import GraphflowsError
from pyro_graphflows.datasets import load_images
from studies.flags import add_places, positive
from studies.graph_vae.training import DEFAULTS, STRUCTURES, Data, run_of, train


def draw_pictures(run, vae, data, args):
    """Draw samples, reconstructions and, where there are labels, the embedding of test images."""
    from studies.graph_vae.pictures import plot_embedding, plot_images

    folder = args.out / "graph_vae"
    folder.mkdir(parents=True, exist_ok=True)
    plot_images(vae, data, folder / f"{run.name}-images.png")
    if len(data.test_labels):
        number = min(2000, len(data.test))
        index = torch.arange(number) * len(data.test) // number
        plot_embedding(vae, data.test[index], data.test_labels[index], folder / f"{run.name}-embedding.png")


def summary(run, record, epochs):
    final = record["finals"][str(epochs)]
    ll = final["likelihood"]
    return (
        f"{run.structure:>12} {record['parameters']:>10,} {final['elbo']:>9.2f} {sum(final['kl'].values()):>8.2f} "
        f"{ll['ll']:>9.2f} ± {ll['standard_error']:.2f} {final['best_epoch']:>6}"
    )


def compare(args):
    """Train the models asked for and print a table."""
    args.epochs = args.epochs or DEFAULTS[args.data_set][0]
    data = Data(args.data_set, args.data, torch.device(args.device), args.limit)
    print(
        f"{args.data_set}: {len(data.train_images)} training images {tuple(data.shape)}, {args.epochs} epochs."
    )
    lines = []
    for seed in args.seeds:
        for structure in args.structures:
            run = run_of(structure, seed, args)
            vae, record = train(run, args, data)
            lines.append(summary(run, record, args.epochs))
            if vae is None:
                continue
            if args.pictures and seed == args.seeds[0]:
                draw_pictures(run, vae, data, args)
            if structure == "learned":
                edges = [f"{a} -> {b}" for a, b in vae.learned_graph().edges if b != "x"]
                print(f"learned edges: {', '.join(edges) or 'none'}")
    print(f"{'structure':>12} {'parameters':>10} {'ELBO':>9} {'KL':>8} {'LL':>9} {'best epoch':>13}")
    print("\n".join(lines))


def study_jobs(args):
    """Return the flags of every job of the page: on digits, and on the image files that are in the folder."""
    seeds = ["--seeds", "0", "1", "2", "3", "4"]
    digits = ["--data-set", "digits", "--decay-every", "100", "--test-every", "10", "--bound-samples", "10"]
    digits += ["--ll-every", "1000", "--ll-images", "50", "--ll-particles", "100", "--final-images", "300"]
    digits += ["--final-bound-samples", "200"]
    jobs = [
        [*digits, "--pictures", "--structures", *STRUCTURES, *seeds],
        [*digits, "--gate-rate", "10", "--freeze-after", "60", "--structures", "learned", *seeds],
    ]
    for nodes, dim in ((2, 10), (4, 5), (10, 2)):
        sizes = ["--num-nodes", str(nodes), "--node-dim", str(dim)]
        jobs.append([*digits, *sizes, "--structures", "learned", "--seeds", "0", "1", "2"])
    if not (args.data or os.environ.get("PYRO_GRAPHFLOWS_DATA")):
        print("No folder with image files (--data): digits and synthetic data only.")
        return jobs
    for data_set, structure, epochs in (
        ("binarized_mnist", "learned", "50"),
        ("binarized_mnist", "independent", "50"),
        ("binarized_mnist", "full", "25"),
        ("binarized_mnist", "chain", "25"),
        ("omniglot", "learned", "5"),
        ("cifar10", "learned", "20"),
    ):
        try:
            load_images(data_set, args.data)
        except GraphflowsError as error:
            print(f"Left out: {data_set}, {structure}. {error}")
            continue
        job = ["--data-set", data_set, "--structures", structure, "--epochs", epochs, "--pictures"]
        if data_set == "binarized_mnist":
            job += ["--final-images", "10000"]  # 25 minutes of processor for each model
        jobs.append([*job, *(["--data", args.data] if args.data else [])])
    return jobs


def study(args):
    """Do every run of the page that is not there yet, and draw the page after each."""
    from studies.graph_vae import faithful as faithful_study
    from studies.graph_vae import synthetic as synthetic_study
    from studies.graph_vae.report import render

    places = ["--results", str(args.results), "--out", str(args.out), "--work", str(args.work)]
    common = [*places, "--device", args.device, "--threads", str(args.threads)]
    common += ["--final-particles", str(args.final_particles), *([] if args.verbose else ["--no-verbose"])]
    small, synthetic, faithful = [], [], []  # flags of a study that only tries whether all goes through
    if args.epochs is not None:
        small += ["--epochs", str(args.epochs)]
        faithful += ["--guide-epochs", str(args.epochs), "--sample-epochs", str(args.epochs)]
    if args.limit is not None:
        small += ["--limit", str(args.limit)]
        synthetic += ["--particles", str(args.final_particles)]
        faithful += [*synthetic, "--model-samples", str(args.limit)]
    jobs = study_jobs(args)
    for module, flags in (
        (synthetic_study, ["--seeds", "0", "1", "2", "3", "4", *synthetic]),
        (faithful_study, faithful),
    ):
        module.main(module.parser().parse_args([*places, *small, *flags]))
    for job in jobs:
        given = parser().parse_args([*common, *job, *small])
        if args.limit is not None:
            given.final_images = given.ll_images = min(args.limit, given.final_images)
        compare(given)
        print(f"Page: {render(args.results, args.out)}", flush=True)


def main(args):
    torch.set_num_threads(args.threads)
    torch.set_default_dtype(torch.float32)
    torch.set_flush_denormal(True)
    pyro.enable_validation(False)  # costs time in every step
    try:
        (study if args.study else compare)(args)
    except GraphflowsError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def parser():
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--data-set", choices=list(DEFAULTS), default="digits")
    parse.add_argument("--data", help="folder of the image files (or PYRO_GRAPHFLOWS_DATA)")
    parse.add_argument("--structures", nargs="+", choices=STRUCTURES, default=["learned", "independent"])
    parse.add_argument("--seeds", nargs="+", type=int, default=[0])
    parse.add_argument(
        "--epochs", type=positive, help="by default as many as suit the data set; of all runs of a study"
    )
    parse.add_argument("--num-nodes", type=positive)
    parse.add_argument("--node-dim", type=positive)
    parse.add_argument("--decoder-input", choices=["all", "first"], default="all")
    parse.add_argument(
        "--gate-rate", type=float, default=1.0, help="learning rate of gates, times the others'"
    )
    parse.add_argument("--freeze-after", type=int, help="epochs after which gates are hard in training too")
    parse.add_argument("--batch-size", type=positive, default=64)
    parse.add_argument("--lr", type=float, default=1e-3)
    parse.add_argument("--decay", type=float, default=0.25, help="what the rate is multiplied by")
    parse.add_argument("--decay-every", type=positive, default=200, help="epochs")
    parse.add_argument("--test-every", type=positive, default=1, help="epochs between test bounds")
    parse.add_argument(
        "--bound-samples", type=positive, default=1, help="samples of the nodes for each test bound"
    )
    parse.add_argument("--final-bound-samples", type=positive, help="the same for the final figures")
    parse.add_argument(
        "--ll-every", type=positive, default=5, help="epochs between log-likelihoods of the curve"
    )
    parse.add_argument(
        "--ll-images", type=positive, default=200, help="test images of the curve's log-likelihood"
    )
    parse.add_argument("--ll-particles", type=positive, default=500)
    parse.add_argument("--final-images", type=positive, default=1000)
    parse.add_argument("--final-particles", type=positive, default=5000)
    parse.add_argument(
        "--recalibrate", type=positive, default=50_000, help="training images for the batch statistics"
    )
    parse.add_argument("--limit", type=positive, help="use only the first images of each part")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--threads", type=positive, default=1)
    add_places(parse, "graph_vae")
    parse.add_argument("--study", action="store_true", help="all runs of the page, restartable")
    parse.add_argument("--pictures", action=argparse.BooleanOptionalAction, default=False)
    parse.add_argument("--progress", action=argparse.BooleanOptionalAction, default=sys.stderr.isatty())
    parse.add_argument("--verbose", action=argparse.BooleanOptionalAction, default=True)
    return parse


if __name__ == "__main__":
    main(parser().parse_args())
