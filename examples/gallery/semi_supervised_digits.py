"""Semi-supervised learning: digits of which few are labelled, with one guide for both kinds of batches.

The model M2 of Kingma et al. (2014), Semi-supervised Learning with Deep Generative Models, Section 2.2: a class y and
a style z make an image x. The class has data in labelled batches and is summed over in the others. The guide is
q(y | x) q(z | x, y), and q(z | x, y) is the same network in both. The data are scikit-learn's digits (Alpaydin and
Kaynak 1998), 8 x 8 pixels. Printed are the errors of q(y | x) on test images, with the unlabelled images and without.

    python examples/gallery/semi_supervised_digits.py --num-labels 50
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from compare_guides import add_flags, figure, save
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from sklearn.datasets import load_digits
from torch import nn

from pyro_graphflows import Normal, auto_faithful_guide

CLASSES, PIXELS = 10, 64


class Digits(nn.Module):
    """A class, a style, and an image whose pixels are on or off."""

    def __init__(self, style_dim, hidden_dim):
        super().__init__()
        self.style_dim = style_dim
        layers = nn.Linear(CLASSES + style_dim, hidden_dim), nn.Softplus(), nn.Linear(hidden_dim, PIXELS)
        self.decoder = nn.Sequential(*layers)

    def forward(self, x, y=None):
        """The model: images, and their classes (indicators) where they are known."""
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.style_dim), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(CLASSES)), obs=y)
            y = y.expand(*torch.broadcast_shapes(y.shape[:-1], z.shape[:-1]), CLASSES)
            z = z.expand(*y.shape[:-1], self.style_dim)
            logits = self.decoder(torch.cat([y, z], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def load_images(num_labels, generator):
    """Return images and classes: some labelled ones (as many of each class), the others, and those for the test."""
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=generator)
    x = (torch.as_tensor(digits.data) > 7).to(torch.get_default_dtype())[order]
    y = torch.as_tensor(digits.target)[order]
    train, test = slice(0, 1400), slice(1400, None)
    rank = torch.stack([(y[train] == k).cumsum(0) for k in range(CLASSES)], -1)[torch.arange(1400), y[train]]
    labelled = rank <= num_labels // CLASSES
    return (x[train][labelled], y[train][labelled]), x[train], (x[test], y[test])


def classify(guide, x):
    """Return q(y | x), a distribution."""
    with poutine.block():
        return poutine.trace(guide).get_trace(x).nodes["y"]["fn"]


def train(args, labelled, unlabelled):
    """Train a model and a guide; without unlabelled images on the labelled ones alone."""
    pyro.set_rng_seed(args.seed)
    x, y = labelled[0], nn.functional.one_hot(labelled[1], CLASSES).to(labelled[0])
    model = Digits(args.style_dim, args.hidden_dim)
    guide = auto_faithful_guide(
        model, x, optional=["y"], enumerate_sites=["y"], family=Normal(hidden_dims=[args.hidden_dim]),
        init="random", standardize=False,
    )  # fmt: skip
    with_labels, without = Trace_ELBO(), TraceEnum_ELBO(max_plate_nesting=1)
    optimiser = torch.optim.Adam([*model.parameters(), *guide.parameters()], args.learning_rate)
    for _ in range(args.steps):
        total = with_labels.differentiable_loss(model, guide, x, y) / len(x)
        if unlabelled is not None:
            batch = unlabelled[torch.randint(len(unlabelled), (args.batch_size,))]
            total = total + without.differentiable_loss(model, guide, batch) / len(batch)
        # Data for y train q(z | x, y) and not q(y | x): Equation (9).
        total = total - args.alpha * classify(guide, x).log_prob(y).mean()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    return model, guide


@torch.no_grad()
def draw(model, args, styles=4):
    """Save images of each class that the model makes, one style a row."""
    z = torch.randn(styles, 1, args.style_dim).expand(-1, CLASSES, -1)
    pixels = model.decoder(torch.cat([torch.eye(CLASSES).expand(styles, -1, -1), z], -1)).sigmoid()
    made, axes = figure(size=(6.0, 2.6))
    framed = nn.functional.pad(pixels.reshape(styles, CLASSES, 8, 8), (1, 1, 1, 1)).transpose(1, 2)
    axes[0].imshow(framed.reshape(10 * styles, -1), cmap="gray_r")
    axes[0].set(xticks=[], yticks=[], xlabel="classes 0 to 9", ylabel="styles")
    save(made, args)


def main(args):
    """Print the share of test images that are misclassified, and draw images of the second model."""
    labelled, unlabelled, (x, y) = load_images(args.num_labels, torch.Generator().manual_seed(args.seed))
    print(f"{len(labelled[0])} labelled images, {len(unlabelled)} images in all, {len(x)} for the test")
    for name, images in (("labelled images alone", None), ("with the others", unlabelled)):
        model, guide = train(args, labelled, images)
        wrong = (classify(guide, x).log_prob(torch.eye(CLASSES).unsqueeze(1)).argmax(0) != y).double()
        print(f"{name}: {100 * wrong.mean():.1f} % of the test images misclassified")
    print(guide.describe())
    draw(model, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_flags(parser, 2000, "semi_supervised_digits")
    for flag, default in {"num-labels": 50, "style-dim": 8, "hidden-dim": 128, "batch-size": 100}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--alpha", type=float, default=5.0, help="weight of the labels in q(y | x)")
    main(parser.parse_args())
