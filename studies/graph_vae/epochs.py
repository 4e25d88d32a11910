"""The data of an epoch on the device, as bytes, with all the noise of its steps: a step draws nothing.

Each member of an ensemble has a random source of its own, from its seed alone, and takes from it the order of the
images, their binarisation and its noise: what a member becomes does not depend on its companions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_graphflows import GraphflowsError


class EpochData:
    """What the steps of one epoch see, drawn before it. The last, smaller batch is left out.

    Args:
        images: Training images ``(n, size of a datum)`` as bytes, on the device.
        num_levels: The number of values of a pixel; more than 2 are binarised anew for each epoch.
        seeds: One for each member.
        batch_size: The number of images of a step.
        noise_shape: Number and dimensions of the nodes.
        num_gates: The number of gates.
        gates_of: Whether gates are drawn anew for each ``"batch"``, as in the class, or for each ``"datum"``.
        dtype: The type of the noise.

    Attributes:
        num_steps: Steps of an epoch.
        place: The next step ``(1,)``, on the device.

    Raises:
        GraphflowsError: If there are fewer images than a batch has.
    """

    def __init__(
        self,
        images: Tensor,
        num_levels: int,
        seeds: Sequence[int],
        batch_size: int,
        noise_shape: tuple[int, int],
        num_gates: int,
        dtype: torch.dtype,
        gates_of: str = "batch",
    ) -> None:
        if gates_of not in ("batch", "datum"):
            raise GraphflowsError(f"Expected gates_of 'batch' or 'datum'; got {gates_of!r}.")
        self.num_steps = len(images) // batch_size
        if not self.num_steps:
            raise GraphflowsError(
                f"Expected at least one batch of {batch_size} images; there are {len(images)} images."
            )
        if batch_size < 2:
            raise GraphflowsError(
                f"Expected batches of at least two, which batch norm needs; got {batch_size}."
            )
        device, size, steps = images.device, len(seeds), self.num_steps
        self.images, self.num_levels, self.batch_size = images, num_levels, batch_size
        self.generators = [torch.Generator(device) for _ in seeds]
        for generator, seed in zip(self.generators, seeds, strict=True):
            generator.manual_seed(1_000_003 * (seed + 1))  # not the stream that the parameters came from
        self.num_nodes, self.node_dim = noise_shape
        self.batches = torch.zeros(steps, size, batch_size, images.shape[1], dtype=torch.uint8, device=device)
        self.noise = torch.zeros(
            steps, self.num_nodes, size, batch_size, self.node_dim, dtype=dtype, device=device
        )
        rows = (batch_size,) if gates_of == "datum" else ()
        self.gate_noise = torch.zeros(steps, size, *rows, num_gates, dtype=dtype, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)

    def draw(self) -> None:
        """Draw a new epoch for each member."""
        steps, _, rows, width = self.batches.shape
        kind = {"dtype": self.noise.dtype, "device": self.noise.device}
        for member, generator in enumerate(self.generators):
            order = torch.randperm(len(self.images), generator=generator, device=self.images.device)
            pixels = self.images[order[: steps * rows]]
            if self.num_levels > 2:
                grey = pixels.to(torch.float32) / (self.num_levels - 1)
                pixels = torch.bernoulli(grey, generator=generator).to(torch.uint8)
            self.batches[:, member] = pixels.view(steps, rows, width)
            shape = (steps, self.num_nodes, rows, self.node_dim)
            self.noise[:, :, member] = torch.randn(shape, generator=generator, **kind)
            uniform = torch.rand(self.gate_noise[:, member].shape, generator=generator, **kind)
            tiny = torch.finfo(uniform.dtype).eps
            self.gate_noise[:, member] = uniform.clamp(tiny, 1 - tiny).logit()
        self.place.zero_()

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return data ``(E, B, size)``, noise of nodes ``(N, E, B, d)`` and gates ``(E, G)`` of the next step.

        The place is counted on the device: the same call reads the next step each time it is replayed.
        """
        batch, noise, gates = (
            part.index_select(0, self.place)[0] for part in (self.batches, self.noise, self.gate_noise)
        )
        return batch.to(noise.dtype), noise, gates

    def advance(self) -> None:
        """Go to the next step, and after the last one back to the first."""
        self.place.add_(1).remainder_(self.num_steps)
