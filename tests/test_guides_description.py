"""What guide.describe() says of a plan."""

from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.guides.description import Description, describe
from pyro_graphflows.guides.plan import InputPlan, Plan, make_blocks, mean_field_condition


def inverse_of(edges, parents, observed="", inputs="", plates="", **options):
    """Return an inverse of a graph of single letters; ``plates`` are the letters in one plate, ``data``."""
    graph = ModelGraph(
        edges.split(), list(observed), inputs=list(inputs), plates=dict.fromkeys(plates, ("data",))
    )
    return InverseGraph(graph, {v: list(p) for v, p in parents.items()}, **options)


def plan_of(inverse, inputs=None, **options):
    graph, inputs = inverse.graph, inputs or InputPlan()
    readable = (*graph.observed, *graph.inputs)
    blocks = make_blocks(inverse, inputs, readable, dict.fromkeys(graph.latent, "normal"))
    return Plan(graph, inverse, inputs, blocks, mean_field_condition(graph, inverse), **options)


def test_a_plan_in_words():
    inverse = inverse_of("mz zx", {"m": "x", "z": "mx"}, "x", plates="zx", order="reverse")
    inputs = InputPlan(per_element=frozenset("m"), remarks={"m": ("a remark",)})
    plan = plan_of(inverse, inputs, labels={"z": "a label"}, notes=("of the trace",), hints=("ask for more",))
    assert describe(plan, ["of the start"]).splitlines() == [
        "Inverse: order 'reverse', 3 edges, 2 sampling levels, 2 blocks.",
        "Block 0 (no plate, 1 level):",
        "  level 0: m | x (not read)  [per-element parameters, analytic KL]",
        "    a remark",
        "Block 1 (plate data, 1 level):",
        "  level 0: z | m (broadcast), x  [amortised, analytic KL, a label]",
        "Note: of the trace",
        "Note: of the start",
        "Note: ask for more",
    ]


def test_a_description_prints_itself():
    description = describe(plan_of(inverse_of("ax", {"a": "x"}, "x")))
    assert isinstance(description, Description)
    assert repr(description) == str(description)
    assert repr(description).startswith("Inverse: order 'custom', 1 edge, 1 sampling level, 1 block.")


def test_the_words_for_a_way_in_and_for_nothing():
    inverse = inverse_of("ab bx", {"a": "b", "b": ""}, "x")
    plan = plan_of(inverse, ways={("b", "a"): "pooled by g"})
    assert "level 0: b | nothing  [amortised, sampled KL]" in describe(plan)
    assert "level 1: a | b (pooled by g)  [amortised, analytic KL]" in describe(plan)


def test_what_is_not_faithful_is_said():
    """Mean field on a collider: each cause is told apart from the other, given what both explain."""
    inverse = inverse_of("ax bx", {"a": "x", "b": "x"}, "x")
    assert "not faithful: the inverse asserts 1 independencies" in describe(plan_of(inverse))
    assert "of b given x" in describe(plan_of(inverse)) or "of a given x" in describe(plan_of(inverse))
    whole = inverse_of("ax bx", {"a": "x", "b": "ax"}, "x")
    assert "not faithful" not in describe(plan_of(whole))
    assert "not faithful" not in describe(plan_of(inverse, judged=whole))
    assert "not faithful" in describe(plan_of(whole, judged=inverse))


def test_marginalised_sites_are_named():
    graph = ModelGraph(["ak", "kx"], ["x"], marginalised=["k"])
    plan = plan_of(InverseGraph(graph, {"a": ["x"]}))
    assert "Marginalised (no factor): k." in describe(plan)
