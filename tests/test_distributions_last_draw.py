"""What a draw came from is used where it gives the derivatives that are wanted, and nowhere else."""

import torch

from pyro_graphflows.distributions.last_draw import LastDraw


def test_only_the_last_value_is_known():
    last, noise = LastDraw(), torch.zeros(2)
    assert last.behind(noise, ()) is None
    values = torch.ones(2), torch.ones(2)
    for value in values:
        last.keep(value, noise)
    assert last.behind(values[0], ()) is None
    assert last.behind(values[1], ())[0] is noise


def test_derivatives_at_a_value_drawn_without_gradients_are_others():
    last, value, noise = LastDraw(), torch.ones(2), torch.zeros(2)
    parameter = torch.ones(2).requires_grad_()
    with torch.no_grad():
        last.keep(value, noise)
        assert last.behind(value, (parameter,)) is not None
    assert last.behind(value, (parameter,)) is None
    assert last.behind(value, (None, noise)) is not None
    last.keep(value, noise)
    assert last.behind(value, (parameter,)) is not None
