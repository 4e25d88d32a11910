"""Networks to try things on: published Gaussian networks, random trees and textbook graphs.

:func:`load_network` and :func:`binary_tree` return a
:class:`~pyro_graphflows.graphs.linear_gaussian.LinearGaussianNetwork`, with numbers and exact answers; the
others return a :class:`~pyro_graphflows.graphs.structures.ModelGraph`. Pyro models of the textbook graphs
are in :mod:`pyro_graphflows.models.textbook`, under the same names with ``_model``.
"""

import json
from functools import cache
from importlib.resources import files

import numpy as np

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork
from pyro_graphflows.graphs.structures import ModelGraph, Node

__all__ = [
    "arithmetic_circuit",
    "asia",
    "binary_tree",
    "burglar_alarm",
    "eight_schools",
    "factor_analysis",
    "factorial_hidden_markov_chain",
    "four_cycle",
    "hidden_markov_chain",
    "linear_regression",
    "list_networks",
    "load_network",
    "protein_network",
    "student_network",
]

NETWORKS = ("ecoli70", "arth150", "magic-irri", "magic-niab")


def list_networks() -> tuple[str, ...]:
    """Return the names that :func:`load_network` knows.

    Example:
        >>> list_networks()
        ('ecoli70', 'arth150', 'magic-irri', 'magic-niab')
    """
    return NETWORKS


@cache
def load_network(name: str) -> LinearGaussianNetwork:
    """Return one of the Gaussian networks of the bnlearn Bayesian Network Repository, leaves observed.

    ``ecoli70`` (46 nodes, 70 arcs) and ``arth150`` (107, 150) are gene networks, ``magic-irri`` (64, 102) and
    ``magic-niab`` (44, 66) genetic ones with traits as leaves, on very different scales.

    References:
        [1] M. Scutari (2010), Learning Bayesian Networks with the bnlearn R Package, Journal of Statistical
        Software 35(3); https://www.bnlearn.com/bnrepository/. The networks' own sources are named beside the
        packaged files, in ``graphs/data/README.md``.

    Args:
        name: One of :func:`list_networks`.

    Returns:
        The network; the same object on each call, as it is immutable.

    Raises:
        GraphflowsError: If there is no network of that name.

    Example:
        >>> load_network("ecoli70")
        LinearGaussianNetwork(22 latent, 24 observed, 70 edges)
    """
    if name not in NETWORKS:
        raise GraphflowsError(f"Expected the name of a network, one of {', '.join(NETWORKS)}; got {name!r}.")
    text = files("pyro_graphflows.graphs").joinpath("data", f"{name}.json").read_text(encoding="utf-8")
    nodes = json.loads(text)["nodes"]
    return LinearGaussianNetwork(
        {node["name"]: node["parents"] for node in nodes},
        {node["name"]: node["coefficients"] for node in nodes},
        {node["name"]: node["intercept"] for node in nodes},
        {node["name"]: node["sd"] for node in nodes},
    )


def binary_tree(
    depth: int, seed: int | np.random.Generator, *, intercepts: bool = False
) -> LinearGaussianNetwork:
    """Return a Gaussian binary tree with random weights, its leaves observed.

    Node ``x0`` is the root, and the parent of ``x{i}`` is ``x{(i - 1) // 2}``. Scales are 1 and weights are
    uniform on [1/2, 2].

    References:
        [1] Webb, Golinski, Zinkov, Siddharth, Rainforth, Teh and Wood (2018), Faithful Inversion of
        Generative Models for Effective Amortized Inference.

        [2] Mouton and Kroon (2022), Graphical Residual Flows, for the variant with ``intercepts``.

    Args:
        depth: The number of levels; the tree has ``2**depth - 1`` nodes, ``2**(depth - 1)`` of them leaves.
        seed: A seed or a NumPy generator.
        intercepts: Whether all nodes but the root get an intercept, uniform on [1/2, 2] as well; else all are
            zero. The weights are the same either way.

    Returns:
        The network.

    Raises:
        GraphflowsError: If ``depth`` is not positive.

    Example:
        >>> tree = binary_tree(3, seed=0)
        >>> tree.latent, tree.observed
        (('x0', 'x1', 'x2'), ('x3', 'x4', 'x5', 'x6'))
    """
    _positive(depth=depth)
    rng = np.random.default_rng(seed)
    size = 2**depth - 1
    weights = rng.uniform(0.5, 2.0, size - 1).tolist()
    shifts = rng.uniform(0.5, 2.0, size - 1).tolist() if intercepts else []
    names = [f"x{i}" for i in range(size)]
    return LinearGaussianNetwork(
        {name: [names[(i - 1) // 2]] if i else [] for i, name in enumerate(names)},
        {name: [weight] for name, weight in zip(names[1:], weights, strict=True)},
        dict(zip(names[1:], shifts, strict=False)),
        dict.fromkeys(names, 1.0),
    )


def hidden_markov_chain(length: int) -> ModelGraph:
    """Return the chain ``z0 → z1 → ...`` with one observation ``x{t}`` of each ``z{t}``.

    Raises:
        GraphflowsError: If ``length`` is not positive.

    Example:
        >>> hidden_markov_chain(2).edges
        (('z0', 'x0'), ('z0', 'z1'), ('z1', 'x1'))
    """
    _positive(length=length)
    times = range(length)
    steps = [[(f"z{t}", f"x{t}"), (f"z{t}", f"z{t + 1}")] for t in times]
    return ModelGraph([edge for step in steps for edge in step][:-1], [f"x{t}" for t in times])


def factorial_hidden_markov_chain(length: int, num_chains: int = 2) -> ModelGraph:
    """Return several hidden chains ``z{c}_{t}`` with one common observation ``x{t}`` at each time.

    The chains are independent a priori and all dependent given the observations.

    References:
        [1] Ghahramani and Jordan (1997), Factorial Hidden Markov Models, Machine Learning 29.

    Raises:
        GraphflowsError: If ``length`` or ``num_chains`` is not positive.

    Example:
        >>> factorial_hidden_markov_chain(3).parents("x2")
        ('z0_2', 'z1_2')
    """
    _positive(length=length, num_chains=num_chains)
    edges = []
    for t in range(length):
        edges += [(f"z{c}_{t - 1}", f"z{c}_{t}") for c in range(num_chains) if t]
        edges += [(f"z{c}_{t}", f"x{t}") for c in range(num_chains)]
    return ModelGraph(edges, [f"x{t}" for t in range(length)])


def factor_analysis(num_latent: int, num_observed: int) -> ModelGraph:
    """Return ``num_latent`` independent factors ``z{i}``, each a parent of all ``num_observed`` ``x{j}``.

    Given one observation all factors are dependent, so that the only faithful inverse is a complete one.

    Raises:
        GraphflowsError: If ``num_latent`` or ``num_observed`` is not positive.
    """
    _positive(num_latent=num_latent, num_observed=num_observed)
    edges = [(f"z{i}", f"x{j}") for i in range(num_latent) for j in range(num_observed)]
    return ModelGraph(edges, [f"x{j}" for j in range(num_observed)])


def four_cycle() -> ModelGraph:
    """Return four independent causes in a ring, each neighbouring pair with a common observed effect.

    The smallest graph in which a faithful inverse needs an edge (*fill-in*) between latent nodes that are
    neither parent and child nor co-parents: given the effects the causes form a cycle without a chord.

    Example:
        >>> four_cycle().parents("x41")
        ('z1', 'z4')
    """
    pairs = [(1, 2), (2, 3), (3, 4), (4, 1)]
    edges = [(f"z{i}", f"x{a}{b}") for a, b in pairs for i in (a, b)]
    return ModelGraph(edges, [f"x{a}{b}" for a, b in pairs])


def arithmetic_circuit() -> ModelGraph:
    """Return the arithmetic circuit: six latent nodes ``z0`` to ``z5``, observed ``x0`` and ``x1``.

    References:
        [1] Weilbach, Beronov, Wood and Harvey (2020), Structured Conditional Continuous Normalizing Flows for
        Efficient Amortized Inference in Graphical Models.
    """
    edges = [("z0", "z2"), ("z1", "z2"), ("z0", "z3"), ("z1", "z3"), ("z3", "z5"), ("z4", "z5")]
    return ModelGraph([*edges, ("z3", "x0"), ("z5", "x1")], ["x0", "x1"])


def student_network() -> ModelGraph:
    """Return the extended student network, job (J) and happiness (H) observed.

    Difficulty, intelligence, grade, SAT, letter, job, happiness: the worked example of variable elimination.

    References:
        [1] Koller and Friedman (2009), Probabilistic Graphical Models, Section 9.3, without the node
        *coherence*; as in Webb et al. (2018).
    """
    edges = [("D", "G"), ("I", "G"), ("I", "S"), ("G", "H"), ("G", "L"), ("S", "J"), ("L", "J"), ("J", "H")]
    return ModelGraph(edges, ["J", "H"])


def asia() -> ModelGraph:
    """Return the chest clinic, X-ray and dyspnoea observed.

    References:
        [1] Lauritzen and Spiegelhalter (1988), Local Computations with Probabilities on Graphical Structures
        and Their Application to Expert Systems, Journal of the Royal Statistical Society B 50.
    """
    edges = [
        ("asia", "tub"),
        ("smoke", "lung"),
        ("smoke", "bronc"),
        ("tub", "either"),
        ("lung", "either"),
        ("either", "xray"),
        ("either", "dysp"),
        ("bronc", "dysp"),
    ]
    return ModelGraph(edges, ["xray", "dysp"])


def burglar_alarm() -> ModelGraph:
    """Return the burglar alarm with two neighbours calling: the standard case of *explaining away*.

    References:
        [1] Pearl (1988), Probabilistic Reasoning in Intelligent Systems; with the numbers of
        Russell and Norvig (2010), Artificial Intelligence: A Modern Approach, Figure 14.2.
    """
    edges = [("burglary", "alarm"), ("earthquake", "alarm"), ("alarm", "john_calls"), ("alarm", "mary_calls")]
    return ModelGraph(edges, ["john_calls", "mary_calls"])


def linear_regression() -> ModelGraph:
    """Return Bayesian linear regression: slope, intercept, noise scale, and the covariate ``x`` as an input.

    Example:
        >>> linear_regression().inputs
        ('x',)
    """
    parents = ["slope", "intercept", "sigma", "x"]
    plates: dict[Node, list[str]] = {"x": ["data"], "y": ["data"]}
    return ModelGraph([(parent, "y") for parent in parents], ["y"], inputs=["x"], plates=plates)


def eight_schools(*, centred: bool = True) -> ModelGraph:
    """Return the hierarchical model of eight coaching experiments, known standard errors as an input.

    References:
        [1] Rubin (1981), Estimation in Parallel Randomized Experiments, Journal of Educational Statistics 6;
        Gelman et al. (2013), Bayesian Data Analysis, Section 5.5.

    Args:
        centred: Whether the sites are the effects ``theta`` themselves, or standard normal ``eta`` with
            ``theta = mu + tau * eta``.
    """
    effect = "theta" if centred else "eta"
    above = effect if centred else "y"
    edges = [("mu", above), ("tau", above), (effect, "y"), ("sigma", "y")]
    plates: dict[Node, list[str]] = {name: ["schools"] for name in (effect, "y", "sigma")}
    return ModelGraph(edges, ["y"], inputs=["sigma"], plates=plates)


def protein_network() -> ModelGraph:
    """Return the consensus network of eleven proteins and phospholipids in T cells, all observed.

    References:
        [1] Sachs, Perez, Pe'er, Lauffenburger and Nolan (2005), Causal Protein-Signaling Networks Derived
        from Multiparameter Single-Cell Data, Science 308; with the 20 arcs used by Wehenkel and Louppe
        (2021), Graphical Normalizing Flows.

    Example:
        >>> len(protein_network()), len(protein_network().edges)
        (11, 20)
    """
    children = {
        "plcg": ["pip2", "pip3", "pkc"],
        "pip3": ["pip2", "akt"],
        "pip2": ["pkc"],
        "pkc": ["raf", "mek", "pka", "p38", "jnk"],
        "pka": ["raf", "mek", "erk", "akt", "p38", "jnk"],
        "raf": ["mek"],
        "mek": ["erk"],
        "erk": ["akt"],
    }
    edges = [(parent, child) for parent, below in children.items() for child in below]
    return ModelGraph(edges, ["raf", "mek", "plcg", "pip2", "pip3", "erk", "akt", "pka", "pkc", "p38", "jnk"])


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise GraphflowsError(f"Expected {name} >= 1; got {size}.")
