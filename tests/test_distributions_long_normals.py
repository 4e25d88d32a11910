"""A normal given by its sparse autoregression, against the multivariate normal that it is."""

import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows.distributions.long_normals import (
    AutoregressiveNormal,
    BandedNormal,
    MixedNoiseNormal,
    solve_band,
    solve_band_transposed,
    sum_over_pairs,
)

PAIRS = torch.tensor([[1, 2, 2, 4], [0, 0, 1, 3]])  # 0 -> 1 -> 2 and 3 -> 4
DEPTH = 2


def example(*batch):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    return AutoregressiveNormal(draw(5), draw(5).exp(), draw(4), PAIRS, DEPTH)


def joint(own):
    """The multivariate normal with the same autoregression, by a dense solve."""
    unit = torch.eye(5, dtype=torch.float64).repeat(*own.batch_shape, 1, 1)
    unit[..., PAIRS[0], PAIRS[1]] = -own.weights
    mean = torch.linalg.solve(unit, own.loc.unsqueeze(-1)).squeeze(-1)
    return dist.MultivariateNormal(mean, scale_tril=torch.linalg.solve(unit, own.scale.diag_embed()))


def test_density_and_mean_are_those_of_the_joint_normal():
    own = example(3)
    value = torch.randn(7, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(own.mean, joint(own).mean)
    torch.testing.assert_close(own.log_prob(value), joint(own).log_prob(value))
    torch.testing.assert_close(own.expand((4, 3)).log_prob(value[:4]), joint(own).log_prob(value[:4]))


def test_draws_solve_the_autoregression():
    own = example()
    torch.manual_seed(0)
    value = own.rsample((6,))
    torch.manual_seed(0)
    noise = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(value, own.loc + sum_over_pairs(own.weights, PAIRS, value) + own.scale * noise)


def test_draws_have_gradients():
    loc = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    own = example()
    drawn = AutoregressiveNormal(loc, own.scale, own.weights, PAIRS, DEPTH).rsample()
    (slope,) = torch.autograd.grad(drawn[2], loc)
    w10, w20, w21 = own.weights[:3]
    torch.testing.assert_close(
        slope, torch.stack([w20 + w21 * w10, w21, *torch.tensor([1.0, 0, 0], dtype=torch.float64)])
    )


SIZE, RANK = 7, 2


def mixed_example(*batch):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    return MixedNoiseNormal(draw(SIZE), draw(SIZE).exp(), draw(SIZE, RANK), draw(SIZE, RANK) / SIZE**0.5)


def test_density_is_that_of_the_multivariate_normal():
    own = mixed_example(3)
    value = torch.randn(5, 3, SIZE, dtype=torch.float64)
    joint = dist.MultivariateNormal(own.loc, own.covariance_matrix)
    torch.testing.assert_close(own.log_prob(value), joint.log_prob(value))
    torch.testing.assert_close(own.expand((5, 3)).log_prob(value), joint.log_prob(value))


def test_draws_mix_noise_and_their_density_is_that_of_the_noise():
    own = mixed_example()
    torch.manual_seed(0)
    value = own.rsample((6,))
    torch.manual_seed(0)
    noise = torch.randn(6, SIZE, dtype=torch.float64)
    mixing = own.scale.unsqueeze(-1) * (torch.eye(SIZE, dtype=torch.float64) + own.left @ own.right.mT)
    torch.testing.assert_close(value, own.loc + noise @ mixing.mT)
    of_noise = dist.Normal(torch.zeros(SIZE, dtype=torch.float64), 1.0).to_event(1).log_prob(noise)
    torch.testing.assert_close(own.log_prob(value), of_noise - torch.linalg.slogdet(mixing)[1])


def test_one_mixing_for_a_whole_batch():
    own = mixed_example()
    loc = torch.randn(4, SIZE, dtype=torch.float64)
    shared = MixedNoiseNormal(loc, own.scale, own.left, own.right)
    repeated = MixedNoiseNormal(
        loc, *(part.expand(4, *part.shape) for part in (own.scale, own.left, own.right))
    )
    value, noise = torch.randn(2, 3, 4, SIZE, dtype=torch.float64)
    for one, other in zip(shared.push(noise), repeated.push(noise), strict=True):
        torch.testing.assert_close(one, other)
    for function in (lambda q: q.log_prob(value), lambda q: q.pull(value), lambda q: q.covariance_matrix):
        torch.testing.assert_close(function(shared), function(repeated))
    assert shared.expand((3, 4)).rsample().shape == (3, 4, SIZE)


def test_draws_are_scored_by_their_noise_with_the_same_derivatives():
    own = mixed_example(3)
    parts = [part.requires_grad_() for part in (own.loc, own.scale, own.left, own.right)]
    value = own.rsample()
    known, found = own.log_prob(value), own.log_prob(value.clone())
    torch.testing.assert_close(known, found)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(each.sum() + 0.0 * own.loc.sum(), parts, retain_graph=True)
            for each in (known, found)
        ),
        rtol=1e-6,
        atol=1e-9,
    )
    fixed = own.sample()
    (slope,) = torch.autograd.grad(own.log_prob(fixed).sum(), own.loc)  # of a value that does not move
    wanted = torch.linalg.solve(own.covariance_matrix, (fixed - own.loc).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(slope, wanted)


def test_pull_inverts_push():
    own = mixed_example(3)
    noise = torch.randn(5, 3, SIZE, dtype=torch.float64)
    value, log_det = own.push(noise)
    torch.testing.assert_close(own.pull(value), noise)
    assert log_det.shape == (5, 3)


def banded_example(size, width, *batch):
    """Coefficients, and the unit lower triangular matrix of the band."""
    generator = torch.Generator().manual_seed(size + 100 * width)
    coefficients = 0.5 * torch.randn(*batch, size, width, generator=generator, dtype=torch.float64)
    unit = torch.eye(size, dtype=torch.float64).repeat(*batch, 1, 1)
    for j in range(1, min(width, size - 1) + 1):
        unit[..., range(j, size), range(size - j)] = -coefficients[..., j:, j - 1]
    return coefficients, unit


@pytest.mark.parametrize("width", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 5, 17])
def test_bands_are_solved(size, width):
    coefficients, unit = banded_example(size, width, 2)
    given = torch.randn(4, 2, size, dtype=torch.float64)
    solved = torch.linalg.solve(unit, given.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(solve_band(coefficients, given), solved)
    solved = torch.linalg.solve(unit.mT, given.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(solve_band_transposed(coefficients, given), solved)


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("width", [0, 1, 2])
def test_banded_normals_are_multivariate_normals(width, differences):
    size = 6
    coefficients, unit = banded_example(size, width, 3)
    loc, scale = torch.randn(2, 3, size, dtype=torch.float64)
    own = BandedNormal(loc, scale.exp(), coefficients, differences=differences)
    root = torch.linalg.inv(unit) * scale.exp().unsqueeze(-2)
    mean = loc
    if differences:
        mean = torch.diff(mean, prepend=torch.zeros_like(mean[:, :1]))
        root = torch.diff(root, dim=-2, prepend=torch.zeros_like(root[:, :1]))
    joint = dist.MultivariateNormal(mean, scale_tril=root.tril())
    value = joint.sample((5,))
    torch.testing.assert_close(own.mean, mean)
    torch.testing.assert_close(own.log_prob(value), joint.log_prob(value))
    torch.testing.assert_close(own.expand((5, 3)).log_prob(value), joint.log_prob(value))
    noise = torch.randn(5, 3, size, dtype=torch.float64)
    pushed, log_det = own.push(noise)
    torch.testing.assert_close(pushed, mean + (root @ noise.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(own.pull(pushed), noise)
    torch.testing.assert_close(log_det, root.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(5, 3))


def test_draws_of_banded_normals_have_gradients():
    coefficients = banded_example(5, 2)[0]
    noise = torch.randn(5, dtype=torch.float64)

    def drawn(coefficients, loc):
        return BandedNormal(loc, torch.ones_like(loc), coefficients).push(noise)[0]

    inputs = coefficients.requires_grad_(), torch.zeros(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(drawn, inputs)
