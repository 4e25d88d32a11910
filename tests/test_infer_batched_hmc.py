import math

import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer import HMC, NUTS
from pyro_graphflows.infer.batched_hmc import Space, run_chains, windows
from pyro_graphflows.infer.chains import bulk_ess, split_rhat

KERNELS = {"hmc": HMC(warmup=80), "nuts": NUTS(warmup=60)}
SIX = 6.0


def normals(scales):
    """Independent normals, one target a row."""
    return lambda x: 0.5 * (x / scales).square().sum(-1)


def check_moments(draws, mean, sd):
    """Means and variances (chains, samples, ...) within six standard errors by their own effective sizes."""
    flat = draws.flatten(0, 1)
    assert ((flat.mean(0) - mean).abs() < SIX * sd / bulk_ess(draws).sqrt()).all()
    squares = (draws - mean).square()
    error = squares.flatten(0, 1).std(0) / bulk_ess(squares).sqrt()
    assert ((squares.flatten(0, 1).mean(0) - sd**2).abs() < SIX * error).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_target_has_its_own_scales_and_step_size(kernel):
    scales = torch.tensor([[1.0, 2.0, 0.5], [10.0, 10.0, 10.0], [0.1, 0.01, 0.1]])
    start = scales * torch.randn(8, 3, 3)
    visited = run_chains(KERNELS[kernel], normals(scales), start, 80)
    assert visited.points.shape == (80, 8, 3, 3)
    draws = visited.points.transpose(0, 1)
    check_moments(draws, torch.zeros(3, 3), scales)
    assert (split_rhat(draws) < 1.1).all()
    assert ((visited.acceptance > 0.6) & (visited.acceptance < 0.99)).all()
    assert not visited.divergent.any()
    assert visited.gradients >= 140 * 8 * 3
    assert visited.gradients_after[-1] == visited.gradients
    assert (visited.gradients_after.diff() > 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_targets_that_are_not_normal(kernel):
    """A bent one: a ~ N(0, 1), b ~ N(a^2, 1), so that E b = 1 and Var b = 3."""

    def potential(x):
        a, b = x.unbind(-1)
        return 0.5 * a.square() + 0.5 * (b - a.square()).square()

    visited = run_chains(KERNELS[kernel], potential, torch.randn(20, 1, 2), 100)
    check_moments(
        visited.points.transpose(0, 1)[:, :, 0], torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0**0.5])
    )


def test_no_u_turn_leaves_a_skewed_target_as_it_is():
    """Exact draws stay exact draws after one transition: the log of an exponential variable, many chains."""
    num = 20_000
    exact = torch.empty(num, 1, 1).exponential_().log()

    def potential(x):
        return (x.exp() - x).squeeze(-1)

    for kernel in (NUTS(), HMC()):
        space = Space(potential, exact)
        moved = kernel(space, space.state(exact), torch.full((1, 1), 0.7)).state.position.exp().flatten()
        for power in (1, 2):  # E y^k = k!, Var y = 1, Var y^2 = 20
            error = (1.0, 20.0**0.5)[power - 1] / math.sqrt(num)
            assert abs(moved.pow(power).mean() - math.factorial(power)) < SIX * error
        assert (moved != exact.exp().flatten()).float().mean() > 0.8


def test_the_leapfrog_is_reversible_and_keeps_volume():
    space = Space(normals(torch.tensor([[1.0, 3.0]])), torch.zeros(1, 1, 2))
    step = torch.full((1, 1), 0.3)

    def flow(both):
        state = space.state(both[:2].reshape(1, 1, 2))
        moved, p = space.leapfrog(state, both[2:].reshape(1, 1, 2), step)
        return torch.cat([moved.position.flatten(), p.flatten()])

    start = torch.randn(4)
    there = flow(start)
    back = flow(torch.cat([there[:2], -there[2:]]))
    assert torch.allclose(torch.cat([back[:2], -back[2:]]), start)
    columns = [(flow(start + 1e-6 * one) - flow(start - 1e-6 * one)) / 2e-6 for one in torch.eye(4)]
    assert torch.linalg.det(torch.stack(columns, 1)).item() == pytest.approx(1.0, abs=1e-6)


def test_a_chain_that_starts_far_out_gets_in():
    """The step size of a target is that of all its chains: the one far out must not be left behind."""
    start = torch.randn(6, 1, 2)
    start[0] = 60.0
    visited = run_chains(NUTS(warmup=100), lambda x: x.square().sum(-1).square() / 100, start, 50)
    assert visited.points[:, 0].abs().max() < 20


def test_points_without_a_density():
    """Bounds by a density of zero: chains stay inside, and start where another one of their target does."""

    def potential(x):
        return torch.where(x[..., 0] > 0, x[..., 0], math.nan)

    start = torch.tensor([-1.0, 0.5, 1.0, 2.0]).reshape(4, 1, 1)
    visited = run_chains(HMC(warmup=50), potential, start, 200)
    assert (visited.points > 0).all()
    assert 0.5 < visited.points.mean() < 1.6
    with pytest.raises(GraphflowsError, match="1 of 2 have none"):
        run_chains(HMC(warmup=50), potential, torch.tensor([[[-1.0], [1.0]]]), 20)


def test_an_interruption_keeps_what_is_done():
    ticks = []

    def tick():
        ticks.append(None)
        if len(ticks) == 20 + 7:
            raise KeyboardInterrupt

    visited = run_chains(HMC(warmup=20), normals(torch.ones(1, 1)), torch.randn(2, 1, 1), 100, tick)
    assert visited.interrupted
    assert len(visited.points) == 7
    ticks.clear()

    def early():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_chains(HMC(warmup=20), normals(torch.ones(1, 1)), torch.randn(2, 1, 1), 100, early)


@pytest.mark.parametrize("num", [1, 5, 20, 100, 300, 1000])
def test_windows_end_before_warm_up_does(num):
    ends = windows(num)
    assert ends == sorted(set(ends))
    assert all(0.15 * num - 1 < end <= num for end in ends)
    assert bool(ends) == (num >= 20)


@pytest.mark.parametrize("kernel", [HMC, NUTS])
@pytest.mark.parametrize("option", [{"warmup": 0}, {"acceptance": 1.0}, {"acceptance": 0.0}])
def test_options(kernel, option):
    with pytest.raises(GraphflowsError, match=next(iter(option))):
        kernel(**option)
