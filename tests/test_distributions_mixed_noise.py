"""A normal with noise mixed by the identity plus a low-rank matrix, against the multivariate normal that it is."""

import pyro.distributions as dist
import torch

from pyro_graphflows.distributions.mixed_noise import MixedNoiseNormal

SIZE, RANK = 7, 2


def example(*batch):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    return MixedNoiseNormal(draw(SIZE), draw(SIZE).exp(), draw(SIZE, RANK), draw(SIZE, RANK) / SIZE**0.5)


def test_density_is_that_of_the_multivariate_normal():
    own = example(3)
    value = torch.randn(5, 3, SIZE, dtype=torch.float64)
    joint = dist.MultivariateNormal(own.loc, own.covariance_matrix)
    torch.testing.assert_close(own.log_prob(value), joint.log_prob(value))
    torch.testing.assert_close(own.expand((5, 3)).log_prob(value), joint.log_prob(value))


def test_draws_mix_noise_and_their_density_is_that_of_the_noise():
    own = example()
    torch.manual_seed(0)
    value = own.rsample((6,))
    torch.manual_seed(0)
    noise = torch.randn(6, SIZE, dtype=torch.float64)
    mixing = own.scale.unsqueeze(-1) * (torch.eye(SIZE, dtype=torch.float64) + own.left @ own.right.mT)
    torch.testing.assert_close(value, own.loc + noise @ mixing.mT)
    of_noise = dist.Normal(torch.zeros(SIZE, dtype=torch.float64), 1.0).to_event(1).log_prob(noise)
    torch.testing.assert_close(own.log_prob(value), of_noise - torch.linalg.slogdet(mixing)[1])


def test_pull_inverts_push():
    own = example(3)
    noise = torch.randn(5, 3, SIZE, dtype=torch.float64)
    value, log_det = own.push(noise)
    torch.testing.assert_close(own.pull(value), noise)
    assert log_det.shape == (5, 3)
