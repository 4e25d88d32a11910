"""Sections of the Graph VAE page from ensembles: why the learned structure is behind, what helps, long training."""

import torch

from studies.graph_vae.pictures import LABELS
from studies.graph_vae.remedies import lines_of, paired
from studies.graph_vae.train import TRAINED
from studies.tables import mean_sd, table


def remedies_section(records):
    """Return the table of ways to train the learned structure on digits; nothing where there is no full structure."""
    lines = lines_of(records)
    full = next((line for line in lines if line["way"] == "full"), None)
    if full is None:
        return ""
    rows = []
    for line in lines:
        best = line["best"]
        row = [line["way"], mean_sd(best["elbo"], 3), mean_sd(best["ll"], 3)]
        row += ["–", "–"] if line is full else [_paired(line, full, "elbo"), _paired(line, full, "ll")]
        rows.append([*row, *_gates(line)])
    reached = [line["way"] for line in lines if line is not full and _reaches(line, full)]
    beyond = [line["way"] for line in lines if line is not full and _reaches(line, full, beyond=True)]
    return "\n".join(
        [
            "## Why the learned structure is behind after a short training, and what helps",
            "",
            f"Digits, {len(full['settings']['seeds'])} seeds in one ensemble, {full['epochs']} epochs, by "
            "`studies/graph_vae/remedies.py`. Differences from the full structure are paired by seed, mean ± "
            "standard error. *Signal* is the mean of a gate's gradient over its standard deviation from batch to "
            "batch, at fixed parameters, the median over gates at the end (pure noise would have the figure in "
            "brackets); *relaxed − hard* is the training bound with the gates of training minus that with the "
            "gates of evaluation. *gates k*: their learning rate is k times the others'; *frozen k*: hard gates "
            "after k epochs; *gates of each datum*: relaxed gates are drawn for each datum instead of for a "
            "batch; *straight-through*: hard gates forward, relaxed gradient; *start p*: the gates' first "
            "probability; *annealed t*: the temperature's factor each epoch (the paper's is 0.99); *edge cost c*: "
            "nats a datum that an open gate costs in training.",
            "",
            table(
                [
                    "way",
                    "test bound",
                    "log-likelihood",
                    "bound − full",
                    "LL − full",
                    "gates open",
                    "decided",
                    "signal",
                    "relaxed − hard",
                ],
                rows,
            ),
            "",
            f"Not below the full structure's log-likelihood beyond two standard errors: {_words(reached)}. Above it "
            f"beyond two standard errors: {_words(beyond)}.",
            "",
            "What it comes to: under the published schedule gates have a gradient with a direction, but their steps "
            "are too small to decide in so few epochs, so that the model is trained with half-open gates and evaluated "
            "with open ones. Every way that makes gates decide early closes most of the distance; none goes beyond the "
            "full structure, since on these data all gates open, and the learned structure is then the full one, "
            "found some epochs later. For short trainings take gates that are drawn for each datum with a rate of 30, "
            "or start at 0.9 with a rate of 10; the paper's schedule stays the default of `train.py`, as it is made "
            "for thousands of epochs.",
            "",
        ]
    )


def trained_section(records):
    """Return the table of long runs of binarised MNIST by the ensemble trainer; nothing where there is none."""
    runs = [record for key, record in records.items() if key.startswith(TRAINED)]
    if not runs:
        return ""
    rows = []

    def largest(key):
        return max(value for run in runs for value in run[key])

    for run in sorted(runs, key=lambda run: list(LABELS).index(run["settings"]["structure"])):
        settings = run["settings"]
        frozen = settings["freeze_after"]
        remark = f"gates × {settings['gate_rate']:g}" if settings["gate_rate"] != 1 else ""
        remark += f", frozen after {frozen}" if frozen is not None else ""
        if run.get("gates"):
            gates = torch.tensor(run["gates"])
            remark += f", {int((gates > 0.5).sum())} of {gates.numel()} open in the end"
        rows.append(
            [
                LABELS[settings["structure"]],
                remark,
                len(settings["seeds"]),
                run["epoch"],
                mean_sd(run["elbo"]),
                mean_sd([sum(line) for line in run["kl"]]),
                f"{mean_sd(run['ll'])} ({run['ll_images']:,} images)",
                f"{run['seconds_of_an_epoch']:.0f}",
            ]
        )
    return "\n".join(
        [
            "### Longer, by the ensemble trainer",
            "",
            "`studies/graph_vae/train.py` on fixed binarised MNIST, same sizes and schedule as above; the parameters "
            "of the epoch with the best validated bound, batch statistics collected anew; all test images. The "
            f"standard error of a log-likelihood over images is {largest('ll_standard_error'):.2f}, most of which "
            "runs on the same images share. Of the 5,000 weights about "
            f"{largest('median_ess'):.0f} count, and k-hat is above 0.7 for up to "
            f"{100 * largest('share_khat_above_0.7'):.0f} % of the images: as in the paper, the figures are lower "
            "bounds in the mean. Seconds are of the clock, of one thread on two shared cores.",
            "",
            table(
                [
                    "model",
                    "",
                    "members",
                    "epochs",
                    "test bound",
                    "KL",
                    "log-likelihood, 5,000 samples",
                    "s an epoch",
                ],
                rows,
            ),
            "",
        ]
    )


def _paired(line, full, key):
    mean, error = paired(line, full, key=key)
    return f"{mean:+.3f} ± {error:.3f}"


def _reaches(line, full, *, beyond=False):
    mean, error = paired(line, full, key="ll")
    return mean > 2 * error if beyond else mean > -2 * error


def _gates(line):
    if "gates" not in line["last"]:
        return ["–"] * 4
    gates = torch.tensor(line["last"]["gates"])
    decided = ((gates < 0.1) | (gates > 0.9)).sum(1).double()
    last = line["checked"][-1]
    signal = last.get("gradient_mean_over_sd")
    known = signal is not None and signal["median"] is not None
    relaxed = torch.tensor(last["training_bound"]) - torch.tensor(last["training_bound_hard_gates"])
    return [
        mean_sd((gates > 0.5).sum(1).double().tolist(), 1),
        mean_sd(decided.tolist(), 1),
        f"{signal['median']:.2f} ({signal['of_pure_noise']:.2f})" if known else "none left",
        f"{relaxed.mean():+.3f}",
    ]


def _words(names):
    return "; ".join(names) if names else "none"
