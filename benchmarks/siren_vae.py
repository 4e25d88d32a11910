"""Training steps of SIReN-VAE beside unmasked VAEs of equal width or size and the same model with full Jacobians.

    python -m benchmarks.siren_vae [--networks arth150 ...] [--results studies/siren_vae/results.jsonl]

All models of a network are timed in one process, in turns, so that a busy machine slows all of them alike; the
figure is the median of processor times of one step (forward, backward, Adam; batch 100, float32, one thread). The
models have the default sizes and engines of their classes. With ``--results`` the times become the line ``speed`` of
that file, which ``studies/siren_vae/report.py`` shows.

Each model also stands beside a *VAE of its size*: one whose hidden layers are so wide that it has as many parameters.

*Full Jacobian* is the graphical model whose log-determinants come from the Jacobian of each datum, as in Mouton and
Kroon (2022), instead of one pass over the weights between units of the same owner; both give the same numbers, which is
checked.
"""

import argparse
import datetime
import os
import statistics
import time

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from pyro_graphflows import VAE, SIReNVAE, load_network
from studies.results import Results

OF_ITS_SIZE = ": a VAE of its size"


class FullJacobian(torch.nn.Module):
    """The blocks of a graphical network, with log-determinants from the Jacobian of each datum, one after the other."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def through(self, y, context):
        """Go through the blocks; return the values and the sum of the log-determinants, of shapes (N, D) and (N,)."""
        total = 0
        for block in self.network.blocks:
            first, second = block.entries()
            pre = F.linear(y, first, block.layers[0].bias)
            if context is not None:
                pre = pre + block.context_layer(context)
            value, slope = block.activation.forward_and_derivative(pre)
            y = y + F.linear(value, second, block.layers[1].bias)
            eye = torch.eye(y.shape[-1])
            total = total + torch.stack(
                [torch.linalg.slogdet(eye + (second * row) @ first)[1] for row in slope]
            )
        return y, total


class FullJacobianVAE(SIReNVAE):
    """A :class:`SIReNVAE` with the graphical flow and full Jacobians (network units unscaled)."""

    def encode(self, features, eps):
        """Map noise to latent values."""
        z, log_det = FullJacobian(self.encoder_network).through(eps[0], *self._context(features))
        return z[None], (-0.5 * eps.square().sum(-1) - log_det) - 0.9189385332046727 * eps.shape[-1]

    def log_prior(self, z, features):
        """Return the log-density of the prior."""
        eps, log_det = FullJacobian(self.prior_network).through(z[0], None)
        return (-0.5 * eps.square().sum(-1) + log_det)[None] - 0.9189385332046727 * z.shape[-1]


def one_step(vae, x):
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        loss = -vae.elbo(x).mean()
        loss.backward()
        optimizer.step()

    return step


def vae_of_size(graph, parameters):
    """Return a VAE with about so many parameters; they grow linearly in the width of the hidden layers."""
    one, two = (sum(p.numel() for p in VAE(graph, hidden_dim=width).parameters()) for width in (1, 2))
    return VAE(graph, hidden_dim=max(1, round((parameters - one) / (two - one)) + 1))


def make(graph, x):
    models = {
        "VAE": VAE(graph),
        "true, faithful": SIReNVAE(graph),
        "true, graphical": SIReNVAE(graph, flow="graphical"),
        "true, graphical, full Jacobian": FullJacobianVAE(graph, flow="graphical", engine="dense"),
        "FC, faithful": SIReNVAE.from_variant(graph, "FC"),
        "FC, graphical": SIReNVAE.from_variant(graph, "FC", flow="graphical"),
    }
    models["true, graphical, full Jacobian"].load_state_dict(models["true, graphical"].state_dict())
    bounds = []
    for vae in models.values():
        vae.standardize_(x)
        torch.manual_seed(1)
        bounds.append(vae.elbo(x).detach())
    torch.testing.assert_close(bounds[2], bounds[3], rtol=1e-3, atol=1e-2)
    for label, vae in list(models.items()):
        if label != "VAE" and "full" not in label:
            models[label + OF_ITS_SIZE] = vae_of_size(graph, sum(p.numel() for p in vae.parameters()))
            models[label + OF_ITS_SIZE].standardize_(x)
    return models


def profiled(step):
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(5):
            step()
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=34)


def main(args):
    torch.set_num_threads(1)
    found = {}
    text = ""
    for name in args.networks:
        network = load_network(name)
        x = torch.tensor(network.sample(100, 0, network.observed)).float()
        torch.manual_seed(0)
        models = make(network.graph(), x)
        steps = {label: one_step(vae, x) for label, vae in models.items()}
        times = {label: [] for label in steps}
        for turn in range(args.repeats + 2):
            for label, step in steps.items():
                if "full" in label and turn > args.repeats // 4 + 2:
                    continue
                start = time.process_time()
                step()
                if turn >= 2:
                    times[label].append(time.process_time() - start)
        found[name] = {}
        for label, vae in models.items():
            ms = 1e3 * statistics.median(times[label])
            size = sum(p.numel() for p in vae.parameters())
            print(f"{name:>10} {label:>42} {size:8,} parameters {ms:8.2f} ms", flush=True)
            if label.endswith(OF_ITS_SIZE):
                found[name][label.removesuffix(OF_ITS_SIZE)]["vae_of_its_size_ms"] = round(ms, 2)
            else:
                found[name][label] = {"ms": round(ms, 2), "parameters": size}
        if name == "arth150":
            lines = profiled(steps["true, faithful"]).splitlines()
            text = "\n".join(line[:110].rstrip() for line in lines if not line.startswith("---"))
    note = (
        f"`benchmarks/siren_vae.py`, {datetime.date.today().isoformat()}, {os.cpu_count()} CPU cores, shared, "
        "one thread: "
        f"median processor time of a training step over {args.repeats} turns, batch 100, float32, all models of a "
        "network in one process. The full Jacobian forms the matrix of each datum and takes its determinant, as the "
        "paper does."
    )
    if args.results:
        Results(args.results).append("speed", {"note": note, "models": found, "profile": text})


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--networks", nargs="+", default=["ecoli70", "arth150", "magic-irri"])
    parse.add_argument("--repeats", type=int, default=20)
    parse.add_argument("--results", help="the file of results that gets a line")
    main(parse.parse_args())
