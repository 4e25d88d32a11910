"""One guide trained by Lightning Fabric: the same loop on one CPU, several processes, or GPUs.

Needs `pip install lightning-fabric`, which is no dependency of the library. Fabric wraps the ELBO module and the
optimiser, and moves each batch to its device; everything else is as in ddp.py.

    python examples/distributed/fabric.py --devices 2
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from lightning_fabric import Fabric
from pyro.infer import Trace_ELBO
from torch.utils.data import DataLoader, TensorDataset

from pyro_graphflows import auto_faithful_guide


def model(x):
    """A latent for each datum."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), device=x.device), 1.0))
        pyro.sample("x", dist.Normal(z + 0.1 * z**2, 0.5), obs=x)


def main(args):
    """Train, and print the loss of the last epoch."""
    fabric = Fabric(
        accelerator=args.accelerator, devices=args.devices, strategy="ddp" if args.devices > 1 else "auto"
    )
    fabric.launch()
    fabric.seed_everything(args.seed)
    x = torch.randn(args.num_data) + 0.1
    guide = auto_faithful_guide(model, x[:100])
    fabric.seed_everything(args.seed + fabric.global_rank)  # other random numbers in each process
    module = Trace_ELBO()(model, guide)
    module, optimiser = fabric.setup(module, torch.optim.Adam(module.parameters(), args.lr))
    loader = fabric.setup_dataloaders(
        DataLoader(TensorDataset(x), args.batch_size // args.devices, shuffle=True)
    )
    mean = torch.zeros(())
    for _ in range(args.epochs):
        losses = []
        for (part,) in loader:
            optimiser.zero_grad()
            loss = module(part) / len(part)
            fabric.backward(loss)
            optimiser.step()
            losses.append(loss.detach())
        mean = fabric.all_reduce(torch.stack(losses).mean())
    fabric.print(f"{fabric.world_size} processes, {args.epochs} epochs: {float(mean):.4f} nats per datum")
    fabric.save(args.checkpoint, {"module": module, "optimiser": optimiser})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--num-data", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=500, help="of all processes together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", default="out/fabric.ckpt")
    main(parser.parse_args())
