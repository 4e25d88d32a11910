r"""Multilevel models, amortised over data sets of 5 to 50 groups (models in models.py).

A guide with pooled inputs learns on joint samples whose numbers of groups and data are drawn anew for each step, by
forward KL, or by the ELBO. What is reported, over held-out data sets for small, middle and large numbers of groups:

- ``two levels``, ``three levels``: the gap KL(p || q) in nats a data set, by draws of the exact posterior;
- ``random effects``: the gap KL(q || p), log evidence (by quadrature) less the ELBO, by draws of the guide;
- ``item response``: the same with the evidence by ``answers.py``, and how far means of all sites are from those of the
  posterior (which are compared with NUTS on a few data sets with ``--nuts``);
- whether the ranks of the sites outside of the groups among draws of the guide are uniform; where evidences are known,
  also among the same draws with importance weights.

Standard errors are over data sets. Rows: ``start`` (no training), ``deepset``, ``attention``; ``summary``: no factors
of elements, all is read from the summary; ``elbo``: the deep set, trained by the ELBO on simulated data sets; ``both``:
by forward KL for half of the time, then by the ELBO; ``back``: the other way round; ``one size``: the deep set,
simulations of one size alone; ``flat``: a flat network with as many weights; ``bayesflow``: the estimator of that
package for multilevel models, left out where it is not installed (peer.py).

    python -m studies.multilevel.run --rows deepset --seconds 60
    python -m studies.multilevel.run --study            # all rows, restartable; `make multilevel`

A line of ``--results`` is one trained guide.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import date
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Trace_ELBO
from torch import Tensor

from pyro_graphflows.guides import DeepSet, Normal, auto_faithful_guide
from pyro_graphflows.guides.guide import AutoFaithfulGuide
from pyro_graphflows.infer import InferenceCompilation
from pyro_graphflows.infer.psis import smoothed_log_weights
from studies.flags import add_places
from studies.multilevel import answers
from studies.multilevel.flat import FlatGuide
from studies.multilevel.models import (
    draws_of_three_levels,
    draws_of_two_levels,
    item_response,
    log_evidence,
    random_effects,
    three_levels,
    two_levels,
)
from studies.multilevel.peer import Peer, installed
from studies.results import Results

MODELS: dict[str, Callable[[Tensor], None]] = {
    "two levels": two_levels,
    "random effects": random_effects,
    "three levels": three_levels,
    "item response": item_response,
}
GLOBALS = {
    "two levels": ("mu",),
    "random effects": ("mu", "tau", "sigma"),
    "three levels": ("mu",),
    "item response": ("spread",),
}
ROWS = {
    "two levels": ("start", "deepset", "attention", "summary", "elbo", "one size", "flat", "bayesflow"),
    "random effects": ("start", "deepset", "attention", "summary", "elbo", "both", "back"),
    "three levels": ("start", "deepset", "summary", "elbo"),
    "item response": ("start", "deepset", "elbo", "back"),
}
EXACT = {"two levels": draws_of_two_levels, "three levels": draws_of_three_levels}
GROUPS, DATA = (5, 50), (1, 20)
INSIDE = {  # the least and the most of each plate beside that of the groups
    "two levels": (DATA,),
    "random effects": (DATA,),
    "three levels": ((1, 10), (2, 6)),
    "item response": ((4, 12),),
}
AT_SET_UP = {  # data, groups
    "two levels": (8, 20),
    "random effects": (8, 20),
    "three levels": (4, 4, 20),
    "item response": (20, 8),
}
NUM_START_SAMPLES = {"random effects": 10_000}  # 2,000 else
BATCH = 64
RATES, LAST_RATE = {"random effects": 1e-3, "item response": 2e-3}, 1e-5  # 3e-3 else
BACK = 0.3  # of the rate, after the ELBO
NUM_DATA_SETS = 50  # held out, for each range of groups
NUM_DRAWS = 200  # for each
NUM_PARTICLES = 16  # of the ELBO
RANGES = {"5-15": (5, 15), "16-30": (16, 30), "31-50": (31, 50)}
SECONDS = {  # of processor time
    "two levels": 12.0,
    "random effects": 30.0,
    "three levels": 12.0,
    "item response": 30.0,
}
NUM_OF_MEANS = 2000  # draws by which means are found
# what is known of the held-out answers, once for all rows; means of all sites for one range of persons
REFERENCE_KEY, OF_MEANS = "reference/item response", "16-30"
NUTS_KEY, SITES = "nuts/item response", ("spread", "ability", "difficulty")
NUM_NUTS, NUTS_DRAWS, NUTS_WARM_UP = 8, 400, 200


def gap(guide: Any, x: Tensor, name: str = "two levels") -> tuple[float, float]:
    """Return the divergence for a data set of known posterior, and the rank of an exact draw of mu among the guide's.

    Args:
        guide: The guide.
        x: The data.
        name: The model.
    """
    values, exact = EXACT[name](x, NUM_DRAWS)
    if isinstance(guide, Peer):
        own, q = guide.draw_mu(x, NUM_DRAWS), guide.log_prob(x, values)
        return float((exact - q).mean()), float((own < values["mu"].reshape(-1)[0]).double().mean())
    with pyro.plate("draws", NUM_DRAWS, dim=-1 - x.dim()):
        trace = poutine.trace(poutine.condition(guide, values)).get_trace(x)
        own = guide(x)["mu"].reshape(-1)
    trace.compute_log_prob()
    nodes: Any = trace.nodes
    q = sum(nodes[name]["log_prob"].reshape(NUM_DRAWS, -1).sum(-1) for name in values)
    return float((exact - q).mean()), float((own < values["mu"].reshape(-1)[0]).double().mean())


def weighed(
    guide: AutoFaithfulGuide, model: Any, x: Tensor, number: int, names: Iterable[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log-weights of draws for a data set, ``(number,)``, and values of some sites in them, ``(number, n)``.

    Args:
        guide: The guide.
        model: The model.
        x: The data; plates are in two dimensions.
        number: The number of draws.
        names: The sites.
    """
    with pyro.plate("draws", number, dim=-3):
        drawn = poutine.trace(guide).get_trace(x)
        replayed = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x)
    log_weights = torch.zeros(number)
    for trace, sign in ((replayed, 1.0), (drawn, -1.0)):
        trace.compute_log_prob()
        for site in trace.nodes.values():
            if site["type"] == "sample" and site["log_prob"].dim() > 2:
                log_weights = log_weights + sign * site["log_prob"].reshape(number, -1).sum(-1)
    return log_weights, {name: drawn.nodes[name]["value"].reshape(number, -1) for name in names}


def smoothed(log_weights: Tensor) -> Tensor:
    """Return importance weights that add up to one, by Pareto smoothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return smoothed_log_weights(log_weights)[0].softmax(0)


def gap_of(
    guide: AutoFaithfulGuide, model: Any, x: Tensor, truth: dict[str, Tensor], log_evidence: float
) -> tuple[float, list[float], list[float]]:
    """Return log evidence less the ELBO for a data set, and ranks of the true values: among draws, and weighted ones.

    Args:
        guide: The guide.
        model: The model.
        x: The data.
        truth: The values of single sites from which the data were drawn.
        log_evidence: The logarithm of the evidence.
    """
    log_weights, values = weighed(guide, model, x, NUM_DRAWS, truth)
    weights = smoothed(log_weights.double())
    below = {name: (values[name][:, 0] < truth[name]).double() for name in truth}
    plain = [float(each.mean()) for each in below.values()]
    return (
        log_evidence - float(log_weights.double().mean()),
        plain,
        [float(weights @ each) for each in below.values()],
    )


def reference_of_answers() -> dict[str, Any]:
    """Return what is known of the held-out answers: evidences, and posterior means of one range of persons."""
    found: dict[str, Any] = {}
    torch.manual_seed(999)
    for of_range in RANGES:
        known = [answers.posterior(drawn["y"]) for drawn in held_out("item response", of_range)]
        found[of_range] = {
            "log_evidence": [round(each.log_evidence, 4) for each in known],
            "error": max(each.error for each in known),
            "khat": max(each.khat for each in known),
        }
        if of_range == OF_MEANS:
            for name in ("mean", "sd"):
                found[name] = [[round(v, 4) for v in getattr(each, name).tolist()] for each in known]
    return found


def nuts_of_answers(reference: dict[str, Any]) -> dict[str, Any]:
    """Return how far means by NUTS are from the reference, of the first data sets of one range."""
    off, begin = [], time.process_time()
    for i, drawn in enumerate(held_out("item response", OF_MEANS)[:NUM_NUTS]):
        pyro.clear_param_store()
        torch.manual_seed(i)
        kernel = NUTS(item_response, jit_compile=True, ignore_jit_warnings=True, max_tree_depth=6)
        chain = MCMC(kernel, NUTS_DRAWS, NUTS_WARM_UP, disable_progbar=True)
        chain.run(drawn["y"])
        flat = {name: value.reshape(NUTS_DRAWS, -1) for name, value in chain.get_samples().items()}
        joint = torch.cat([flat[name] for name in SITES], -1)
        off.append((joint.mean(0) - torch.tensor(reference["mean"][i])) / torch.tensor(reference["sd"][i]))
    each = torch.cat(off)
    return {
        "data_sets": len(off),
        "error": float(each.square().mean().sqrt()),
        "largest": float(each.abs().max()),
        "seconds": (time.process_time() - begin) / len(off),
    }


def errors_of_means(guide: AutoFaithfulGuide, reference: dict[str, Any]) -> tuple[float, float]:
    """Return the root of the mean square of errors of means in standard deviations: of draws, and of weighted ones."""
    off: tuple[list[Tensor], list[Tensor]] = ([], [])
    known = zip(held_out("item response", OF_MEANS), reference["mean"], reference["sd"], strict=False)
    for drawn, mean, sd in known:
        log_weights, values = weighed(guide, item_response, drawn["y"], NUM_OF_MEANS, SITES)
        joint = torch.cat([values[name] for name in SITES], -1)
        for into, found in zip(off, (joint.mean(0), smoothed(log_weights) @ joint), strict=True):
            into.append((found - torch.tensor(mean)) / torch.tensor(sd))
    plain, weighted = (float(torch.cat(each).square().mean().sqrt()) for each in off)
    return plain, weighted


def sizes(
    generator: torch.Generator, groups: tuple[int, int] = GROUPS, name: str = "two levels"
) -> tuple[int, ...]:
    """Draw numbers of data and of groups; of persons, which count as groups, and of items."""
    each = [
        int(torch.randint(low, high + 1, (), generator=generator)) for low, high in (*INSIDE[name], groups)
    ]
    return tuple(reversed(each)) if name == "item response" else tuple(each)


def simulate(model: Callable[[Tensor], None], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return a joint draw."""
    nodes: Any = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(shape)).nodes
    return {name: site["value"] for name, site in nodes.items() if site["type"] == "sample"}


def held_out(name: str, of_range: str) -> list[dict[str, Tensor]]:
    """Return the data sets of a range of groups by which guides are judged."""
    generator = torch.Generator().manual_seed(12345 + list(RANGES).index(of_range))
    with torch.random.fork_rng():
        torch.manual_seed(12345 + list(RANGES).index(of_range))
        return [
            simulate(MODELS[name], sizes(generator, RANGES[of_range], name)) for _ in range(NUM_DATA_SETS)
        ]


def make_guide(name: str, row: str, seed: int) -> AutoFaithfulGuide:
    """Return a guide at its start."""
    pool = DeepSet(sums=False) if row == "summary" else "attention" if row == "attention" else "deepset"
    options: dict[str, Any] = (
        {"family": Normal(units_per_set=32, hidden_layers=2)} if name == "two levels" else {}
    )
    number = NUM_START_SAMPLES.get(name, 2000)
    data = torch.zeros(AT_SET_UP[name])
    if name == "item response":  # all answers wrong is no example
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            data = simulate(MODELS[name], AT_SET_UP[name])["y"]
    return auto_faithful_guide(
        MODELS[name], data, pool=pool, num_start_samples=number, setup_seed=seed, **options
    )


def train(name: str, row: str, seconds: float, seed: int) -> tuple[Any, dict[str, Any]]:
    """Train a guide for some processor time, at a rate that falls exponentially."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = MODELS[name]
    if row == "bayesflow":
        peer = Peer(GROUPS, DATA, seed)
        return peer, peer.train(seconds, (RATES.get(name, 3e-3), LAST_RATE), BATCH)
    begin = time.process_time()
    guide: Any = make_guide(name, row, seed)
    set_up = time.process_time() - begin
    weights = sum(parameter.numel() for parameter in guide.parameters())
    if row == "flat":
        guide = FlatGuide(DATA[1], GROUPS[1], weights)
        weights = sum(parameter.numel() for parameter in guide.parameters())
    steps, total = 0, 0.0
    ways = {"both": ("deepset", "elbo"), "back": ("elbo", "deepset"), "start": ()}.get(row, (row,))
    for position, each in enumerate(ways):
        step = stepper(each, model, guide)
        own = seconds / len(ways)
        begin, first = time.process_time(), RATES.get(name, 3e-3)
        if row == "back" and position:
            first *= BACK
        while (spent := time.process_time() - begin) < own:
            rate = first * (LAST_RATE / first) ** (spent / own)
            step(AT_SET_UP[name] if row == "one size" else sizes(generator, name=name), rate)
            steps += 1
        total += spent
    return guide, {"steps": steps, "seconds": total, "set_up": set_up, "weights": weights}


def stepper(
    row: str, model: Callable[[Tensor], None], guide: Any
) -> Callable[[tuple[int, ...], float], None]:
    """Return what makes a step of training on simulations of a size, at a rate."""
    optimizer = torch.optim.Adam(guide.parameters())
    compilation = (
        None if row in ("flat", "elbo") else InferenceCompilation(model, guide, optimizer, batch_size=BATCH)
    )
    nesting = 3 if model is three_levels else 2
    elbo = Trace_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=nesting)

    def step(shape: tuple[int, ...], rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        if compilation is not None:
            compilation.step(torch.zeros(shape))
            return
        optimizer.zero_grad()
        if row == "elbo":
            drawn = simulate(model, shape)
            loss = elbo.differentiable_loss(model, guide, drawn["y" if "y" in drawn else "x"])
        else:
            mu = torch.randn(BATCH)
            theta = mu.unsqueeze(-1) + torch.randn(BATCH, shape[1])
            x = theta.unsqueeze(-2) + torch.randn(BATCH, *shape)
            loss = -guide.log_prob(x, mu, theta).mean()
        loss.backward()
        optimizer.step()

    return step


@torch.no_grad()
def judge(name: str, guide: Any, reference: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return gaps with standard errors by numbers of groups, and how far ranks are from uniform.

    Args:
        name: The model.
        guide: The guide.
        reference: What is known of the held-out answers, for item response.
    """
    found: dict[str, Any] = {}
    ranks: dict[str, list[float]] = {site: [] for site in GLOBALS[name]}
    weighted: dict[str, list[float]] = {site: [] for site in ranks}
    torch.manual_seed(54321)  # not that of any data set
    for of_range in RANGES:
        gaps = []
        for i, drawn in enumerate(held_out(name, of_range)):
            truth = {site: drawn[site] for site in ranks}
            of_weighted: list[float] = []
            if name in EXACT:
                each, rank = gap(guide, drawn["x"], name)
                of_sites = [rank]
            elif reference is not None:
                evidence = reference[of_range]["log_evidence"][i]
                each, of_sites, of_weighted = gap_of(guide, item_response, drawn["y"], truth, evidence)
            else:
                evidence = log_evidence(drawn["x"])
                each, of_sites, of_weighted = gap_of(guide, random_effects, drawn["x"], truth, evidence)
            gaps.append(each)
            for into, of in ((ranks, of_sites), (weighted, of_weighted)):
                for site, rank in zip(ranks, of, strict=False):
                    into[site].append(rank)
        values = torch.tensor(gaps)
        found[of_range] = {"gap": float(values.mean()), "error": float(values.std() / len(gaps) ** 0.5)}
    found["ranks"] = {site: distance(each) for site, each in ranks.items()}
    if name not in EXACT:
        found["weighted_ranks"] = {site: distance(each) for site, each in weighted.items()}
    found["band"] = 1.358 / math.sqrt(NUM_DATA_SETS * len(RANGES))
    if reference is not None:
        found["errors_of_means"] = errors_of_means(guide, reference)
    return found


def distance(ranks: list[float]) -> float:
    """Return the greatest distance of the distribution of ranks from the uniform one."""
    ordered = torch.tensor(ranks).double().sort().values
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    return float(torch.maximum((steps - ordered).abs(), (ordered - steps + 1 / len(ordered)).abs()).max())


def main() -> None:
    """Run rows from the command line."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--study", action="store_true", help="all rows of the page")
    parse.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    rows = list(dict.fromkeys(row for own in ROWS.values() for row in own))
    parse.add_argument("--rows", nargs="*", default=["deepset"], choices=rows)
    parse.add_argument("--seconds", type=float, help="processor time of each training")
    parse.add_argument("--nuts", action="store_true", help="the reference of item response")
    parse.add_argument("--seed", type=int, default=0)
    add_places(parse, "multilevel")
    args = parse.parse_args()
    torch.set_num_threads(1)
    results = Results(args.results)
    for name in args.models:
        reference = reference_in(results, args.nuts) if name == "item response" else None
        for row in ROWS[name] if args.study else args.rows:
            seconds = args.seconds or SECONDS[name]
            key = f"{name}/{row}/{seconds:g}/{args.seed}"
            if key in results or row not in ROWS[name]:
                continue
            if row == "bayesflow" and not installed():
                print(f"{key}: left out, bayesflow is not installed")
                continue
            guide, figures = train(name, row, seconds, args.seed)
            record = {**figures, **judge(name, guide, reference), "date": str(date.today())}
            results.append(key, record)
            print(key, record, flush=True)


def reference_in(results: Results, nuts: bool) -> dict[str, Any]:
    """Return what is known of the held-out answers, found now if it is not there; compare it with NUTS if asked."""
    if REFERENCE_KEY not in results:
        results.append(REFERENCE_KEY, reference_of_answers())
    reference = results.read()[REFERENCE_KEY]
    if nuts and NUTS_KEY not in results:
        results.append(NUTS_KEY, nuts_of_answers(reference))
    return reference


if __name__ == "__main__":
    main()
