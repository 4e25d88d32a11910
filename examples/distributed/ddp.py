r"""One guide trained by several processes: each has a shard of the data, and gradients are averaged.

An ELBO called with a model and a guide, ``Trace_ELBO()(model, guide)``, is a torch module, so torch's own
DistributedDataParallel trains it. Every process sets the guide up with the same example data and the same
``setup_seed``, so that all start alike; each step every process takes its part of one global batch. Rank 0 writes a
checkpoint, from which all go on when a worker was lost (torchrun starts them again).

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/distributed/ddp.py --out out/ddp

Without torchrun the script runs alone, and ``--shards 2`` repeats what two processes do, shard by shard: the
same losses. On machines with GPUs use the backend "nccl" and one device for each process.
"""

import argparse
import json
import os
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.infer import Trace_ELBO
from torch.nn.parallel import DistributedDataParallel

from pyro_graphflows import IWAE_ELBO, auto_faithful_guide


def model(x):
    """Two latents of each datum, which the data make dependent."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a * b + a, 0.3), obs=x)


def batch(args, step):
    """Return the global batch of a step, the same in every process."""
    generator = torch.Generator().manual_seed(1000 * args.seed + step)
    a, b, noise = torch.randn(3, args.batch_size, generator=generator)
    return a * b + a + 0.3 * noise


def shard_loss(module, args, step, shard, shards):
    """Return the loss of one part of the global batch, in nats per datum."""
    x = batch(args, step).chunk(shards)[shard]
    pyro.set_rng_seed(args.seed + 7919 * step + shard)  # other random numbers in each process and step
    return module(x) / len(x)


def save(path, module, optimiser, step, losses):
    """Write a checkpoint, whole or not at all."""
    state = {
        "module": module.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "losses": losses,
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def main(args):
    """Train, and write the losses and the parameters."""
    distributed = "RANK" in os.environ
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if distributed:
        torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    guide = auto_faithful_guide(model, batch(args, 0))
    elbo = {"elbo": Trace_ELBO(), "iwae": IWAE_ELBO(num_particles=5)}[args.loss]
    module = elbo(model, guide)
    optimiser = torch.optim.Adam(module.parameters(), args.lr)
    first, losses, path = 0, [], out / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        first, losses = state["step"], state["losses"]
    parallel = DistributedDataParallel(module) if distributed else module

    shards = world if distributed else args.shards
    for step in range(first, args.steps):
        if [rank, step] == args.kill and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os._exit(1)  # to show that a lost worker does no harm
        optimiser.zero_grad()
        total = torch.zeros(())
        for shard in [rank] if distributed else range(shards):
            loss = shard_loss(parallel, args, step, shard, shards)
            (loss if distributed else loss / shards).backward()  # DistributedDataParallel takes the mean
            total += loss.detach() / shards
        if distributed:
            torch.distributed.all_reduce(total)
        optimiser.step()
        losses.append(total.item())
        if rank == 0 and (step + 1) % args.every == 0:
            save(path, module, optimiser, step + 1, losses)
    flat = torch.cat([parameter.detach().flatten() for parameter in guide.parameters()])
    report = {"losses": losses, "parameters": flat.double().tolist(), "started_at": first}
    (out / f"rank{rank}.json").write_text(json.dumps(report))
    if rank == 0:
        guide.save(out / "guide.safetensors")
        print(f"{shards} shards, {args.steps} steps: {losses[0]:.4f} -> {losses[-1]:.4f} nats per datum")
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loss", choices=["elbo", "iwae"], default="elbo")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1000, help="of all processes together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--shards", type=int, default=1, help="without torchrun: processes to imitate")
    parser.add_argument("--kill", type=int, nargs=2, help="rank and step of a worker that is lost once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/ddp")
    main(parser.parse_args())
