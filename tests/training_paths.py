"""The expected loss of a guide on its way through a short training."""

import math

import torch
from pyro.infer import Trace_ELBO

STEPS = (0, 1, 10, 50, 200)
MOST_RISE = 3.0  # nats above the start, at any time
MOST_LOSS = 0.1  # nats above the start after 200 steps, where the start was exact
ELBO = {"vectorize_particles": True, "max_plate_nesting": 2}


def expected_loss(model, guide, args, num_particles=100, repeats=8):
    """Return the mean of the loss over many draws, and its standard error."""
    loss = Trace_ELBO(num_particles=num_particles, **ELBO)
    with torch.no_grad():
        found = torch.tensor([loss.loss(model, guide, *args) for _ in range(repeats)], dtype=torch.double)
    return float(found.mean()), float(found.std()) / math.sqrt(repeats)


def train(model, guide, args, lr, num_particles=10):
    """Train with Adam; return step -> (expected loss, standard error)."""
    steps = training(model, guide, args, lr, Trace_ELBO(num_particles=num_particles, **ELBO))
    return {step: expected_loss(model, guide, args) for step in steps}


def training(model, guide, args, lr, loss):
    """Train with Adam, and stop at each of STEPS."""
    optim = torch.optim.Adam(guide.parameters(), lr=lr)
    yield 0
    for step in range(1, STEPS[-1] + 1):
        optim.zero_grad()
        loss.differentiable_loss(model, guide, *args).backward()
        optim.step()
        if step in STEPS:
            yield step


def check_losses(steps, loss, most):
    """Check that losses, less those of exact posteriors, stay below 3 nats in training, and end below ``most``."""
    for step in steps:
        if step:
            assert loss() < (most if step == STEPS[-1] else MOST_RISE), step


def check_path(path, exact=None, most_rise=MOST_RISE):
    """Check that training has not made a start worse; ``exact`` is minus the log evidence, if it is known.

    Means are compared with four standard errors: of a comparison that should hold, one in 30,000 fails by chance.
    """
    start, start_error = path[0]
    for step, (loss, error) in path.items():
        assert loss <= start + most_rise + 4 * math.hypot(error, start_error), (step, path)
    last, error = path[STEPS[-1]]
    was_exact = exact is not None and start - exact < MOST_LOSS
    assert last <= start + MOST_LOSS * was_exact + 4 * math.hypot(error, start_error), (exact, path)
    if exact is not None:
        assert last >= exact - 4 * error, (exact, path)
