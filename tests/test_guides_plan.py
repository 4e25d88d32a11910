"""Plans: how sites are grouped into blocks, what blocks read, and where a KL may be analytic."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, model_graphs, plated_model_graphs

from pyro_graphflows.graphs import ModelGraph
from pyro_graphflows.graphs.structures import InverseGraph
from pyro_graphflows.guides.plan import (
    BlockPlan,
    Conditioning,
    Coupling,
    InputPlan,
    Plan,
    Summary,
    make_blocks,
    mean_field_condition,
    ways_in,
)


def inverse_of(edges, parents, observed="", inputs="", plates="", **options):
    """Return an inverse of a graph of single letters; ``plates`` are the letters in one plate, ``data``."""
    graph = ModelGraph(
        edges.split(), list(observed), inputs=list(inputs), plates=dict.fromkeys(plates, ("data",))
    )
    return InverseGraph(graph, {v: list(p) for v, p in parents.items()}, **options)


def blocks_of(inverse, inputs=None, readable=None, kinds=None):
    graph = inverse.graph
    readable = (*graph.observed, *graph.inputs) if readable is None else readable
    kinds = dict.fromkeys(graph.latent, "normal") if kinds is None else kinds
    return make_blocks(inverse, inputs or InputPlan(), readable, kinds)


def levels_of(blocks):
    return [block.levels for block in blocks]


# ---------------------------------------------------------------- blocks


def test_sites_of_the_same_plates_are_one_block_with_levels():
    inverse = inverse_of("ab bc cx", {"c": "x", "b": "cx", "a": "b"}, "x")
    (block,) = blocks_of(inverse)
    assert block.levels == (("c",), ("b",), ("a",))
    assert block.sites == ("c", "b", "a")
    assert block.plates == ()
    assert block.context == (Conditioning("x", "same"),)
    assert block.parents == {"c": ("x",), "b": ("c", "x"), "a": ("b",)}
    wide = inverse_of("ax bx cx", {"a": "x", "b": "x", "c": "ab"}, "x")
    assert levels_of(blocks_of(wide)) == [(("a", "b"), ("c",))]


def test_a_block_takes_in_what_comes_later_in_the_order():
    """w is sampled after z, which is in a plate, but needs only m: it joins the block of m."""
    inverse = inverse_of(
        "mz mw zx", {"m": "", "z": "mx", "w": "m"}, "x", plates="zx", sampling_order=["m", "z", "w"]
    )
    first, second = blocks_of(inverse)
    assert first.levels == (("m",), ("w",))
    assert second.levels == (("z",),)
    assert second.plates == ("data",)
    assert second.context == (Conditioning("m", "broadcast"), Conditioning("x", "same"))


def test_a_site_that_pools_latents_waits_for_them():
    summary = Summary(("z",), ("data",))
    inverse = inverse_of("mz mw zx", {"m": "", "z": "mx", "w": "z"}, "x", plates="zx")
    blocks = blocks_of(inverse, InputPlan({"w": (summary,)}))
    assert levels_of(blocks) == [(("m",),), (("z",),), (("w",),)]
    assert blocks[2].context == (Conditioning(summary.name, "pooled", summary),)
    assert blocks[2].parents == {"w": (summary.name,)}


def test_pooled_data_do_not_keep_a_site_back():
    summary = Summary(("x",), ("data",))
    inverse = inverse_of("ab bx", {"a": "bx", "b": "x"}, "x", plates="x")
    (block,) = blocks_of(inverse, InputPlan({"a": (summary,), "b": (summary,)}))
    assert block.levels == (("b",), ("a",))
    assert block.context == (Conditioning(summary.name, "pooled", summary),)  # once for both
    assert block.parents == {"a": ("b", summary.name), "b": (summary.name,)}


def test_pooled_parents_without_a_summary_are_not_read():
    inverse = inverse_of("ax", {"a": "x"}, "x", plates="x")
    (block,) = blocks_of(inverse, InputPlan(per_element=frozenset("a")))
    assert block.context == ()
    assert block.parents == {"a": ()}
    assert block.per_element == ("a",)


def test_kinds_are_kept_apart():
    inverse = inverse_of("ab bc cx", {"a": "", "b": "a", "c": "bx"}, "x")
    kinds = {"a": "normal", "b": "flow", "c": "normal"}
    assert levels_of(blocks_of(inverse, kinds=kinds)) == [(("a",),), (("b",),), (("c",),)]
    free = inverse_of("ax bx cx", {"a": "x", "b": "x", "c": "x"}, "x")
    assert levels_of(blocks_of(free, kinds=kinds)) == [(("a", "c"),), (("b",),)]


def test_the_context_has_what_can_be_read_in_the_order_of_the_graph():
    inverse = inverse_of("wa ax ay", {"a": "wxy"}, "xy", "w")
    (block,) = blocks_of(inverse)
    assert [node.name for node in block.context] == [n for n in inverse.graph.nodes if n in "wxy"]
    (block,) = blocks_of(inverse, readable="y")
    assert block.context == (Conditioning("y", "same"),)
    (block,) = blocks_of(inverse, readable="")
    assert block.context == ()


def test_what_concerns_other_sites_stays_out_of_a_block():
    inverse = inverse_of("mz zx", {"m": "x", "z": "mx"}, "x", plates="zx")
    coupling = Coupling(("data",), 2)
    inputs = InputPlan(per_element=frozenset("m"), non_exchangeable={"z": ("data",)}, coupled={"z": coupling})
    first, second = blocks_of(inverse, inputs)
    assert (first.per_element, first.non_exchangeable, first.coupled) == (("m",), {}, {})
    assert second.per_element == ()
    assert second.non_exchangeable == {"z": ("data",)}
    assert second.coupled == {"z": coupling}


@examples(150)
@given(plated_model_graphs(), st.integers(0, 10**6))
def test_blocks_of_any_inverse(graph, seed):
    """All that a block owes, for random parents and kinds; and no block could have taken in one site more."""
    generator = random.Random(seed)
    order = list(graph.latent)
    generator.shuffle(order)
    parents = {}
    for i, site in enumerate(order):
        allowed = [*order[:i], *graph.observed]
        parents[site] = [p for p in allowed if generator.random() < 0.5]
    kinds = {site: generator.choice("ab") for site in order}
    inverse = InverseGraph(graph, parents, sampling_order=order)
    blocks = blocks_of(inverse, kinds=kinds)
    assert sorted(site for block in blocks for site in block.sites) == sorted(order)
    latent, done = set(order), set()
    for block in blocks:
        assert {(graph.plates[s], kinds[s]) for s in block.sites} == {(block.plates, kinds[block.sites[0]])}
        depth = {site: k for k, level in enumerate(block.levels) for site in level}
        for site, k in depth.items():
            above = [p for p in inverse.parents[site] if p in latent]
            assert all(p in done or p in depth for p in above)
            assert k == 1 + max((depth[p] for p in above if p in depth), default=-1)
        names = [node.name for node in block.context]
        rank = {node: i for i, node in enumerate(graph.nodes)}
        assert names == sorted(names, key=rank.__getitem__)
        seen = {p for s in depth for p in inverse.parents[s] if inverse.how[p, s] != "pooled"}
        assert set(names) == seen - set(depth)
        assert {node.how for node in block.context} <= {"same", "broadcast"}
        for site in order:  # greedy: no site of the kind that could have come along was left behind
            if site not in done and site not in depth and graph.plates[site] == block.plates:
                above = {p for p in inverse.parents[site] if p in latent}
                assert kinds[site] != kinds[block.sites[0]] or not above <= done | set(depth)
        done |= set(depth)


# ---------------------------------------------------------------- analytic KL


@examples(150)
@given(model_graphs(max_nodes=6), st.integers(0, 10**6))
def test_the_mean_field_condition_by_brute_force(graph, seed):
    """No model parent of a site is marginalised, or at the end of a path from the site in the guide."""
    generator = random.Random(seed)
    order = list(graph.latent)
    generator.shuffle(order)
    children = {site: [] for site in order}
    parents = {}
    for i, site in enumerate(order):
        parents[site] = [p for p in order[:i] if generator.random() < 0.5]
        for parent in parents[site]:
            children[parent].append(site)

    def below(site):
        return {site}.union(*(below(child) for child in children[site]))

    expected = {
        site: not any(p in graph.marginalised or p in below(site) for p in graph.parents(site))
        for site in graph.latent
    }
    assert mean_field_condition(graph, InverseGraph(graph, parents)) == expected


# ---------------------------------------------------------------- ways in


def test_ways_in():
    graph = ModelGraph(
        ["gy", "ty", "mt", "ty", "yx"],
        ["x", "y"],
        inputs=["g"],
        plates={"t": ["groups"], **dict.fromkeys("gyx", ("data",))},
    )
    inverse = InverseGraph(graph, {"m": ["t"], "t": ["g", "y", "x"]})
    by_group = Summary(("y", "x"), ("data",), segments=(("data", "groups", "g"),))
    few = Summary(("t",), ("groups",), one_by_one=True)
    inputs = InputPlan({"t": (by_group,), "m": (few,)})
    assert ways_in(inverse, inputs, ["x"]) == {
        ("g", "t"): "index",
        ("y", "t"): "pooled by g",
        ("x", "t"): "no data to read",
        ("t", "m"): "one by one",
    }
    pooled = InputPlan({"m": (Summary(("t",), ("groups",)),)})
    assert ways_in(inverse, pooled, []) == {("t", "m"): "pooled"}


def test_ways_in_of_a_parent_that_is_looked_up():
    graph = ModelGraph(
        ["gz", "tz", "zx"],
        ["x"],
        inputs=["g"],
        plates={"t": ["groups"], **dict.fromkeys("gzx", ("data",))},
    )
    inverse = InverseGraph(graph, {"t": [], "z": ["g", "t", "x"]})
    summary = Summary(("t",), ("groups",), index="g", inner="data")
    assert ways_in(inverse, InputPlan({"z": (summary,)}), []) == {
        ("g", "z"): "index",
        ("t", "z"): "looked up by g",
    }
    assert ways_in(inverse, InputPlan(), []) == {}


def test_ways_in_of_means_of_what_is_looked_up():
    plates = {"a": ["rows"], "b": ["columns"], **dict.fromkeys("ijx", ("data",))}
    graph = ModelGraph(["ax", "bx", "ix", "jx"], ["x"], inputs=["i", "j"], plates=plates)
    inverse = InverseGraph(graph, {"b": ["x"], "a": ["b", "x", "i", "j"]})
    segments = (("data", "rows", "i"),)
    summary = Summary(("b",), ("columns",), index="j", inner="data", segments=segments)
    assert summary.name == "mean(b[j]; data by i)"
    found = ways_in(inverse, InputPlan({"a": (summary,)}), [])
    assert found["b", "a"] == "means of those looked up by j"
    assert (found["i", "a"], found["j", "a"]) == ("index", "index")


# ---------------------------------------------------------------- nothing changes


def test_a_plan_stays_as_it_is():
    inverse = inverse_of("ax", {"a": "x"}, "x")
    kl = mean_field_condition(inverse.graph, inverse)
    plan, again = (Plan(inverse.graph, inverse, InputPlan(), blocks_of(inverse), kl) for _ in range(2))
    block = plan.blocks[0]
    for thing, name in (
        (plan, "notes"),
        (block, "levels"),
        (block.context[0], "how"),
        (plan.inputs, "missing"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, ())
    assert plan == again
    assert plan != dataclasses.replace(plan, notes=("another",))
    assert isinstance(block, BlockPlan)
    assert isinstance(block.levels, tuple)
