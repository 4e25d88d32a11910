r"""The classifier two-sample test as the benchmark has it: 0.5 where draws cannot be told from those of the reference.

The classifier is that of the publication: two hidden layers of ten units a dimension, ReLU, Adam with its usual rate on
batches of 200, a penalty on squared weights, and an end when the training loss has not fallen by 1e-4 for ten epochs
(what scikit-learn's ``MLPClassifier`` does by default); inputs are standardised by the first sample, and what is
returned is the accuracy on five folds that were held out. Here the five networks are trained at once, as one batched
product a layer, whose factors are rounded to bfloat16 where the processor has it, which takes a fifteenth of the time.

References:
    [1] Lopez-Paz and Oquab (2017), Revisiting Classifier Two-Sample Tests, ICLR.
    [2] Lueckmann et al. (2021), Benchmarking Simulation-Based Inference, AISTATS, appendix M.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FOLDS = 5
BATCH = 200
RATE, BETAS, EPSILON = 1e-3, (0.9, 0.999), 1e-8
PENALTY = 1e-4
TOLERANCE, PATIENCE = 1e-4, 10
UNITS = 10  # in each hidden layer for each dimension


class _Networks:
    """One network for each fold, with their parameters side by side in one matrix.

    Args:
        number: How many.
        dim: The number of inputs.
        generator: Of the random weights.
    """

    def __init__(self, number: int, dim: int, generator: torch.Generator) -> None:
        widths = [dim, UNITS * dim, UNITS * dim, 1]
        parts, self.places, start = [], [], 0
        for before, after in itertools.pairwise(widths):
            bound = (6.0 / (before + after)) ** 0.5
            size = (before + 1) * after
            parts.append((2 * torch.rand(number, size, generator=generator, dtype=torch.float32) - 1) * bound)
            self.places.append((slice(start, start + before * after), (before, after), start + size))
            start += size
        self.parameters = torch.cat(parts, -1)
        self.gradient = torch.zeros_like(self.parameters)
        self.first, self.second = torch.zeros_like(self.parameters), torch.zeros_like(self.parameters)
        self.steps = 0

    def layers(self, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the weights and biases of all layers as views of a matrix like that of the parameters."""
        found = []
        for weights, shape, end in self.places:
            found.append(
                (values[:, weights].view(-1, *shape), values[:, weights.stop : end].view(-1, 1, shape[1]))
            )
        return found

    def logits(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits of the second class, ``(networks, rows)``, and the inputs of all layers."""
        inputs = [x]
        *hidden, (weight, bias) = self.layers(self.parameters)
        for of_hidden, offset in hidden:
            inputs.append(torch.baddbmm(offset, inputs[-1], of_hidden).clamp_(min=0.0))
        return torch.baddbmm(bias, inputs[-1], weight).squeeze(-1), inputs

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """Take a step of Adam on a batch; return the loss of each network before it."""
        rows = x.shape[1]
        logits, inputs = self.logits(x)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
        back = ((logits.sigmoid() - labels) / rows).unsqueeze(-1)
        layers, gradients = self.layers(self.parameters), self.layers(self.gradient)
        for (weight, _), (of_weight, of_bias), below in zip(
            reversed(layers), reversed(gradients), reversed(inputs), strict=True
        ):
            torch.baddbmm(weight, below.mT, back, beta=PENALTY / rows, out=of_weight)
            of_bias.copy_(back.sum(1, keepdim=True))
            if below is not x:  # the derivative of a ReLU by what it returned
                back = torch.ops.aten.threshold_backward(back @ weight.mT, below, 0)
            loss = loss + 0.5 * PENALTY / rows * weight.square().sum((1, 2))
        self.steps += 1
        self.first.lerp_(self.gradient, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(self.gradient, self.gradient, value=1 - BETAS[1])
        rate = RATE * (1 - BETAS[1] ** self.steps) ** 0.5 / (1 - BETAS[0] ** self.steps)
        self.parameters.addcdiv_(self.first, self.second.sqrt().add_(EPSILON), value=-rate)
        return loss

    def keep(self, chosen: Tensor) -> None:
        """Go on with some of the networks."""
        for name in ("parameters", "gradient", "first", "second"):
            setattr(self, name, getattr(self, name)[chosen].contiguous())


@contextmanager
def _rounded_products() -> Iterator[None]:
    """Let products of matrices round their factors to bfloat16; sums and parameters keep single precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
@_rounded_products()
def c2st(reference: Tensor, draws: Tensor, seed: int = 1, most_epochs: int = 10_000) -> float:
    """Return how well draws are told from those of a reference: the accuracy of a classifier on held-out folds.

    Args:
        reference: Draws of the reference, ``(n, dim)``, by which both are standardised.
        draws: Others, ``(m, dim)``.
        seed: The seed of folds, weights and batches.
        most_epochs: An end of the training.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, scale = reference.mean(0), reference.std(0)
    x = ((torch.cat([reference, draws]) - mean) / scale).float()
    labels = (torch.arange(len(x)) >= len(reference)).float()
    order = torch.randperm(len(x), generator=generator)
    folds = order[: len(x) // FOLDS * FOLDS].view(FOLDS, -1)
    train = torch.stack([folds[torch.arange(FOLDS) != each].reshape(-1) for each in range(FOLDS)])
    networks = _Networks(FOLDS, x.shape[-1], generator)
    active = torch.arange(FOLDS)
    best, bad = torch.full((FOLDS,), torch.inf, dtype=x.dtype), torch.zeros(FOLDS, dtype=torch.long)
    done = torch.zeros_like(networks.parameters)
    for _ in range(most_epochs):
        mixed = torch.stack([rows[torch.randperm(len(rows), generator=generator)] for rows in train[active]])
        total = torch.zeros(len(active), dtype=x.dtype)
        for batch in mixed.split(BATCH, 1):
            total += networks.step(x[batch], labels[batch]) * batch.shape[1]
        loss = total / mixed.shape[1]
        bad = torch.where(loss > best - TOLERANCE, bad + 1, 0)
        best = torch.minimum(best, loss)
        done[active] = networks.parameters
        go_on = bad <= PATIENCE
        if not bool(go_on.all()):
            active, best, bad = active[go_on], best[go_on], bad[go_on]
            networks.keep(go_on)
        if not len(active):
            break
    networks.parameters = done
    logits, _ = networks.logits(x[folds])
    return float(((logits > 0).float() == labels[folds]).float().mean())
