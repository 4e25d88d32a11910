"""What tests of networks share."""

import torch


def randomise(module, seed=0):
    """Give all parameters standard normal values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module
