"""A network from a BIF file: sizes of inverses, and a posterior of discrete causes.

Lauritzen and Spiegelhalter (1988), Local computations with probabilities on graphical structures, JRSS B 50: the
chest clinic ("asia"). The BIF text is written to a file and read back; its graph gives inverses, its tables a Pyro
model whose causes the guide sums over, judged by enumeration of all states.

    python examples/gallery/bif_network.py
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from compare_guides import add_flags, compare, figure, save
from pyro.infer import TraceEnum_ELBO

from pyro_graphflows import faithful_inverse, from_bif, mean_field_inverse, stochastic_inverse
from pyro_graphflows.plotting import plot_inverse, plot_model_graph

# node: its parents, and the probability of "yes" by their values (yes first)
CLINIC = {
    "asia": ((), [0.01]), "smoke": ((), [0.5]), "tub": (("asia",), [0.05, 0.01]), "lung": (("smoke",), [0.1, 0.01]),
    "bronc": (("smoke",), [0.6, 0.3]), "xray": (("lung", "tub"), [0.98, 0.98, 0.98, 0.05]),
    "dysp": (("bronc", "lung", "tub"), [0.9, 0.9, 0.9, 0.8, 0.7, 0.7, 0.7, 0.1]),
}  # fmt: skip
SEEN = ("xray", "dysp")


def bif():
    """Return the network as BIF text."""
    lines = ["network clinic { }"]
    lines += [f"variable {name} {{ type discrete [ 2 ] {{ yes, no }}; }}" for name in CLINIC]
    for name, (parents, table) in CLINIC.items():
        if not parents:
            lines.append(f"probability ( {name} ) {{ table {table[0]}, {1 - table[0]}; }}")
            continue
        lines.append(f"probability ( {name} | {', '.join(parents)} ) {{")
        states = itertools.product(("yes", "no"), repeat=len(parents))
        lines += [f"  ({', '.join(state)}) {p}, {1 - p};" for state, p in zip(states, table, strict=True)]
        lines.append("}")
    return "\n".join(lines)


def model(xray, dysp):
    """The clinic: patients whose two findings are seen."""
    findings, values = {"xray": xray, "dysp": dysp}, {}
    with pyro.plate("patients", len(xray)):
        for name, (parents, table) in CLINIC.items():
            place = sum(
                ((1 - values[p]).long() * 2**i for i, p in enumerate(reversed(parents))), torch.tensor(0)
            )
            values[name] = pyro.sample(
                name, dist.Bernoulli(torch.tensor(table)[place]), obs=findings.get(name)
            )


def exact(xray, dysp):
    """Return P(lung cancer) for one patient, by all states of the causes."""
    causes, joint = [name for name in CLINIC if name not in SEEN], torch.zeros(2)
    for state in itertools.product((0, 1), repeat=len(causes)):
        values, p = dict(zip(causes, state, strict=True)) | {"xray": xray, "dysp": dysp}, 1.0
        for name, (parents, table) in CLINIC.items():
            yes = table[sum((1 - values[q]) * 2**i for i, q in enumerate(reversed(parents)))]
            p *= yes if values[name] else 1 - yes
        joint[values["lung"]] += p
    return float(joint[1] / joint.sum()), float(joint.sum().log())


def main(args):
    """Print sizes; compare the guide with the exact probabilities; draw both graphs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clinic.bif"
        path.write_text(bif())
        graph = from_bif(path, observed=SEEN)
    for find in (stochastic_inverse, mean_field_inverse, faithful_inverse):
        print(f"{find.__name__:<20} {find(graph).num_edges:>3} edges")
    xray, dysp = (
        torch.tensor(v, dtype=torch.get_default_dtype()) for v in ([1, 1, 0, 0] * 50, [1, 0, 1, 0] * 50)
    )
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    posteriors = compare(args, model, (xray, dysp), loss=loss, others=False, enumerate_sites=True)
    print(f"exact log-evidence {sum(exact(int(a), int(b))[1] for a, b in zip(xray, dysp, strict=True)):.2f}")
    for i, (a, b) in enumerate(zip(xray[:4].int().tolist(), dysp[:4].int().tolist(), strict=True)):
        found = posteriors["faithful"].draws["lung"].float().mean(0)[i]
        print(
            f"P(lung cancer | xray={a}, dyspnoea={b}): guide {float(found):.3f}, exact {exact(a, b)[0]:.3f}"
        )
    made, axes = figure(2, size=(4.6, 3.6))
    plot_model_graph(graph, axes[0])
    plot_inverse(faithful_inverse(graph), axes[1])
    save(made, args)


if __name__ == "__main__":
    main(
        add_flags(
            argparse.ArgumentParser(description=__doc__.split("\n")[0]), 1000, "bif_network"
        ).parse_args()
    )
