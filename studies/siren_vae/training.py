"""One run of the SIReN-VAE study: what is trained, how, and what is measured against the true network.

Used by ``run.py``, which chooses rates and goes through all runs, and by the report.
"""

import datetime
import json
import os
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pyro_graphflows import (
    VAE,
    GraphflowsError,
    LinearGaussianNetwork,
    ModelGraph,
    Progress,
    Schedule,
    SIReNVAE,
    TrainingData,
    load_network,
)
from pyro_graphflows.whole_files import write_whole

FEW = 10  # below so many points for each node data are few: an epoch is one to three steps
DEFAULT_PATIENCE = {True: 60, False: 10}
#: Pairs of rate and patience that are chosen from; patience 0 for the default. On few data, where an epoch is a step or
#: three, with rate 0.1 and patience 10 a first overshoot can be the end of the training (five rates in 61 epochs), so
#: this pair is left out. The page shows the runs that were made with it.
SETTINGS = {
    True: ((1e-2, 0), (1e-3, 0), (1e-1, 0), (1e-2, 10), (1e-3, 10)),  # few data
    False: ((1e-2, 0), (1e-3, 0), (1e-1, 0)),  # many data
}
#: Row -> variant of the graph and flow; None for the plain VAE.
ROWS = {
    "vae": None,
    "ind": ("ind", "graphical"),
    "FC": ("FC", "graphical"),
    "true": ("true", "graphical"),
    "faithful": ("true", "faithful"),
}
REMEDIES = ("warm-up", "iwae", "decay", "early", "average", "small")
#: More blocks of the GRF than 4, and the settings at which they are tried: blocks, or the way that training takes?
DEEPER = {"8-blocks": 8, "16-blocks": 16}
DEEPER_SETTINGS = ((2, (1e-2, 10)), (100, (1e-2, 0)), (100, (1e-3, 0)))
MAX_EPOCHS = {True: 1500, False: 300}
NUM_TEST, NUM_TEST_PAPER, NUM_VALIDATION = 1000, 100, 200
WARM_UP, AVERAGED = 100, 200  # epochs of two of the remedies
WARM_UP_SETTING = (1e-2, 0)  # of the true network with the GRF, many data
CURVE = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 400, 600, 800, 1100, 1500)  # epochs


@dataclass(frozen=True)
class Run:
    """One model trained on one data set."""

    network: str
    row: str
    multiple: int
    seed: int
    lr: float
    remedy: str = ""
    patience: int = 0  # 0 for the default
    perturbation: str = ""  # as "add-25"

    @property
    def cell(self):
        """The name of the cell of the table: everything but seed and rate."""
        extra = [self.remedy, f"patience{self.patience}" if self.patience else "", self.perturbation]
        return "-".join([self.network, self.row, f"{self.multiple}x", *filter(None, extra)])

    @property
    def name(self):
        """The key of the run's line, and the name of its state."""
        return f"{self.cell}-lr{self.lr:g}-s{self.seed}"


def settings_of(multiple, patience=None):
    """List the pairs of rate and patience that are tried on seed 0 of a cell, all or those of one patience."""
    return [setting for setting in SETTINGS[multiple < FEW] if patience in (None, setting[1])]


def robustness_setting(multiple):
    """Return the rate and patience of all models with wrong structures."""
    return 1e-2, 10 if multiple < FEW else 0


def pick_setting(scores):
    """Return the setting with the lowest score; None without scores."""
    known = {setting: score for setting, score in scores.items() if score is not None}
    return min(known, key=known.get, default=None)


def network_of(name, folder=None):
    """Return a network of the package, or the one in ``folder/NAME.json`` (the format of the packaged ones)."""
    if folder is None:
        return load_network(name)
    nodes = json.loads((Path(folder) / f"{name}.json").read_text())["nodes"]
    return LinearGaussianNetwork(
        {n["name"]: n["parents"] for n in nodes},
        {n["name"]: n["coefficients"] for n in nodes},
        {n["name"]: n["intercept"] for n in nodes},
        {n["name"]: n["sd"] for n in nodes},
    )


def draw(network, num, *seed):
    """Draw observed data; training, validation and test data have streams of their own."""
    return torch.tensor(network.sample(num, np.random.default_rng(seed), network.observed)).float()


def in_order_of(vae, x, network):
    """Return data, drawn in the network's order of nodes, in that of the model's graph, which other arcs may change."""
    return x[:, [network.observed.index(node) for node in vae.graph.observed]]


def perturbed(graph, how, percent, seed):
    """Return a graph in which a share of the arcs was added, removed or reversed at random.

    Added arcs follow the graph's topological order, so that there is no cycle; arcs are reversed one after the other,
    each only if that makes no cycle. Roles stay as they are.
    """
    rng = np.random.default_rng([seed, percent, ("add", "remove", "reverse").index(how)])
    dag = graph.to_networkx()
    count = round(len(graph.edges) * percent / 100)
    if how == "remove":
        chosen = rng.permutation(len(graph.edges))[:count]
        dag.remove_edges_from([graph.edges[i] for i in chosen])
    elif how == "add":
        nodes = graph.nodes
        absent = [(a, b) for i, b in enumerate(nodes) for a in nodes[:i] if not dag.has_edge(a, b)]
        dag.add_edges_from([absent[i] for i in rng.permutation(len(absent))[:count]])
    else:
        import networkx as nx

        done = 0
        for i in rng.permutation(len(graph.edges)):
            if done == count:
                break
            a, b = graph.edges[i]
            dag.remove_edge(a, b)
            if nx.has_path(dag, a, b):
                dag.add_edge(a, b)
            else:
                dag.add_edge(b, a)
                done += 1
    return ModelGraph(dag, graph.observed)


def make_model(run, graph):
    torch.manual_seed(run.seed)
    if run.perturbation:
        how, percent = run.perturbation.split("-")
        graph = perturbed(graph, how, int(percent), run.seed)
    # As many hidden units in each decoder as the network has distinct sets of parents of its leaves.
    width = len({graph.parents(node) for node in graph.observed})
    if ROWS[run.row] is None:
        return VAE(graph, hidden_dim=max(width, len(graph.latent)))
    variant, flow = ROWS[run.row]
    size = {"num_blocks": 1, "units_per_variable": 2} if run.remedy == "small" else {}
    if run.remedy in DEEPER:
        size["num_blocks"] = DEEPER[run.remedy]
    size["decoder_units"] = 1 if variant == "true" else width
    return SIReNVAE.from_variant(graph, variant, flow=flow, **size)


def free_parameters(vae, x):
    """Return how many parameters have an influence: those that no mask closes."""
    vae = deepcopy(vae)
    with torch.no_grad(), torch.random.fork_rng():
        for parameter in vae.parameters():  # some start at zero, and hide those before them
            parameter.add_(0.05 * torch.randn_like(parameter))
    vae.elbo(x).sum().backward()
    return sum(int((p.grad != 0).sum()) for p in vae.parameters() if p.grad is not None)


class Average:
    """The mean of the parameters over the epochs from some epoch on."""

    def __init__(self, vae, first):
        self.vae, self.first, self.count = vae, first, 0
        self.mean = [torch.zeros_like(p) for p in vae.parameters()]

    @torch.no_grad()
    def __call__(self, history):
        """Take in the parameters after an epoch."""
        if len(history) > self.first:
            self.count += 1
            for mean, parameter in zip(self.mean, self.vae.parameters(), strict=True):
                mean += (parameter - mean) / self.count

    @torch.no_grad()
    def load(self):
        """Let the model have the mean."""
        for mean, parameter in zip(self.mean, self.vae.parameters(), strict=True):
            parameter.copy_(mean)


def fit_run(run, vae, x, validation, args):
    """Train a model as the run says.

    Returns:
        The history, a few epochs with their training loss and rate, and on few data the loss of new data at some.
    """
    few = run.multiple < FEW
    objective = vae.objective(**({"bound": "iwae", "num_particles": 5} if run.remedy == "iwae" else {}))
    patience = run.patience or DEFAULT_PATIENCE[few]
    num_epochs = args.max_epochs or MAX_EPOCHS[few]
    train_data, early, average = x, None, None
    if run.remedy == "early":
        early, train_data = x[: len(x) // 5], x[len(x) // 5 :]
    if run.remedy == "average":
        patience, num_epochs = None, 2 * AVERAGED
        average = Average(vae, AVERAGED)
    decay = 0.3 if run.remedy == "decay" else 0.0
    curve, held_out = [], []

    def each_epoch(history):
        if average is not None:
            average(history)
        if len(history) in (1, 2, 5) or len(history) % 10 == 0:
            curve.append([len(history), round(history.loss[-1], 4), history.learning_rate[-1]])
        if few and len(history) in CURVE:
            held_out.append([len(history), round(validation_nll(vae, validation, 25), 4)])

    def fit(num_epochs, patience, on_epoch, validation=None):
        return vae.fit(
            TrainingData(train_data, batch_size=min(100, len(train_data)), validation=validation),
            standardize=False,
            loss=objective,
            optimizer=lambda p: torch.optim.AdamW(p, lr=run.lr, weight_decay=decay, fused=True),
            schedule=Schedule(num_epochs, patience=patience, max_grad_norm=50.0),
            progress=Progress(bar=args.progress, on_epoch=on_epoch),
            seed=run.seed,
        )

    if (
        run.remedy == "warm-up"
    ):  # before and apart: the loss rises while the weight does, and so the rate would fall
        epochs = min(WARM_UP, num_epochs)
        objective.kl_weight = 1 / epochs

        def raise_weight(history):
            objective.kl_weight = min(1.0, (len(history) + 1) / epochs)

        fit(epochs, None, raise_weight)
    history = fit(num_epochs, patience, each_epoch, early)
    if average is not None and average.count:
        average.load()
    return history, curve, held_out


def state_of(run, args):
    """Return the path of the state of a trained model."""
    return args.work / f"{run.name}.pt"


def train(run, results, args, to_test=False):
    """Train one model; append its record without test figures, and keep its state.

    A run that is there is not trained again, unless it is to be tested and its state is not there any more.
    """
    state, found = state_of(run, args), results.get(run.name)
    if found and (state.exists() or found["test"] or not to_test):
        require_same(run, found, results, args)
        return found
    network = network_of(run.network, args.data)
    num = run.multiple * len(network.names)
    x = draw(network, num, run.seed, 0)
    validation = draw(network, NUM_VALIDATION, 0, 1)
    vae = make_model(run, network.graph())
    x, validation = (in_order_of(vae, part, network) for part in (x, validation))
    vae.standardize_(x)
    free = free_parameters(vae, x)
    start = time.process_time()
    history, curve, held_out = fit_run(run, vae, x, validation, args)
    seconds = time.process_time() - start
    torch.manual_seed(1)
    nll = validation_nll(vae, validation, 100)
    tail = history.loss[-10:]
    result = {
        "run": asdict(run),
        "num_train": num,
        "validation_nll": nll if np.isfinite(nll) else None,
        "train_loss": float(np.mean(tail)) if tail else None,
        "epochs": len(history),
        "max_epochs": args.max_epochs,
        "steps": history.num_steps,
        "cpu_seconds": round(seconds, 1),
        "stop_reason": history.stop_reason,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "free_parameters": free,
        "curve": curve,
        "validation_curve": held_out,
        "test": None,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, shared; float32, one thread a run",
    }
    write_whole(state, lambda file: torch.save(vae.state_dict(), file))
    results.append(run.name, result)
    return result


def require_same(run, found, results, args):
    """Refuse to take the result of a trial run for that of a run of full length."""
    particles = found["test"]["num_particles"] if found["test"] else args.num_particles
    if found.get("max_epochs") != args.max_epochs or particles < args.num_particles:
        epochs = f"at most {found['max_epochs']}" if found.get("max_epochs") else "the usual number of"
        raise GraphflowsError(  # no SystemExit: a pool of workers would wait for ever
            f"{results.path}: {run.name} is the result of {epochs} epochs and {particles} importance samples, not of "
            "what is asked for now. Remove its line, or name another file with --results."
        )


def validation_nll(vae, x, num_particles):
    """Return the mean negative log-likelihood of data."""
    return -float(vae.log_evidence(x, num_particles=num_particles).log_evidence.mean())


def all_weights(vae, x, num_particles, at_once=40):
    """Return log-weights (num_particles, n), drawn in pieces that stay near the processor."""
    sizes = [min(at_once, num_particles - start) for start in range(0, num_particles, at_once)]
    return torch.cat([vae.log_weights(x, num_particles=size) for size in sizes]).double()


def test(run, results, args):
    """Measure a trained model on the test points and append its complete record."""
    result = train(run, results, args, to_test=True)
    if result["test"]:
        return result
    state = state_of(run, args)
    with torch.no_grad():
        result = {**result, "test": test_figures(run, state, args)}
    results.append(run.name, result)
    state.unlink()
    return result


def test_figures(run, state, args):
    """Return what is measured on the test points for a saved state."""
    network = network_of(run.network, args.data)
    vae = make_model(run, network.graph())
    vae.load_state_dict(torch.load(state, weights_only=True))
    x = draw(network, NUM_TEST, 0, 2)
    exact = -torch.tensor(network.log_evidence(x.double().numpy()))
    x = in_order_of(vae, x, network)
    torch.manual_seed(2)
    # The first 100 points always get all samples, the others on few data a fifth, as the excess is large there.
    rest = args.num_particles if run.multiple >= FEW else max(1, args.num_particles // 5)
    evidence, elbos = [], []
    for i, part in enumerate(x.split(NUM_TEST_PAPER)):
        log_weights = all_weights(vae, part, rest if i else args.num_particles)
        evidence.append(log_weights.logsumexp(0) - np.log(len(log_weights)))
        elbos.append(log_weights.mean(0))
    nll, neg_elbo = -torch.cat(evidence), -torch.cat(elbos)
    re = (vae.reconstruct(x) - x).norm(dim=-1)
    few = slice(NUM_TEST_PAPER)
    return {
        "num_particles": args.num_particles,
        "num_particles_rest": rest,
        "nll": float(nll.mean()),
        "excess": float((nll - exact).mean()),
        "excess_error": float((nll - exact).std() / NUM_TEST**0.5),
        "negative_elbo": float(neg_elbo.mean()),
        "re": float(re.mean()),
        "nll_100": float(nll[few].mean()),
        "excess_100": float((nll - exact)[few].mean()),
        "re_100": float(re[few].mean()),
        "true_nll": float(exact.mean()),
        "entropy": network.entropy(),
    }
