"""Which sites may have one factor for each element of a plate."""

from pyro_graphflows.graphs import InverseGraph, ModelGraph
from pyro_graphflows.guides.plan import InputPlan, Summary
from pyro_graphflows.guides.summed_sites import sites_to_sum

PLATES = {"theta": ["groups"], "x": ["groups", "data"]}


def found(edges, parents, summaries, observed=("x",), plates=PLATES, **options):
    graph = ModelGraph(edges, observed=observed, plates=plates, **options)
    inverse = InverseGraph(graph, parents)
    plan = InputPlan(summaries={site: tuple(each) for site, each in summaries.items()})
    return sites_to_sum(inverse, plan, list(parents), [*observed, *graph.inputs])


def test_a_location_and_effects_are_summed():
    edges = [("mu", "theta"), ("theta", "x")]
    parents = {"mu": ["x"], "theta": ["mu", "x"]}
    summaries = {"mu": [Summary(("x",), ("groups", "data"))], "theta": [Summary(("x",), ("data",))]}
    sites = found(edges, parents, summaries)
    assert list(sites) == ["mu", "theta"]
    assert sites["theta"].above == ("mu",)
    assert sites["theta"].responses == ("x",)


def test_elements_that_share_something_unknown_are_not():
    edges = [("mu", "theta"), ("tau", "theta"), ("theta", "x")]
    whole = [Summary(("x",), ("groups", "data"))]
    parents = {"tau": ["x"], "mu": ["tau", "x"], "theta": ["mu", "tau", "x"]}
    summaries = {"tau": whole, "mu": whole, "theta": [Summary(("x",), ("data",))]}
    assert list(found(edges, parents, summaries)) == ["mu", "theta"]  # tau: groups share mu
    parents = {"mu": ["x"], "tau": ["mu", "x"], "theta": ["mu", "tau", "x"]}
    assert list(found(edges, parents, summaries)) == ["tau", "theta"]


def test_data_of_the_site_beside_the_plate_are_not_in_a_sum():
    edges = [("theta", "x"), ("theta", "w")]
    plates = {"theta": ["groups"], "w": ["groups"], "x": ["groups", "data"]}
    parents = {"theta": ["w", "x"]}
    assert not found(edges, parents, {"theta": [Summary(("x",), ("data",))]}, ("x", "w"), plates)


def test_crossed_plates_have_no_one_order():
    edges = [("mu", "x"), ("a", "x"), ("b", "x")]
    plates = {"a": ["rows"], "b": ["columns"], "x": ["rows", "columns"]}
    parents = {"mu": ["x"], "a": ["mu", "x"], "b": ["a", "mu", "x"]}
    summaries = {
        "mu": [Summary(("x",), ("rows", "columns"))],
        "a": [Summary(("x",), ("columns",))],
        "b": [Summary(("a", "x"), ("rows",))],
    }
    sites = found(edges, parents, summaries, plates=plates)
    # given its row's effect, data of a row share no column; those of a column do not share a row
    assert list(sites) == ["a", "b"]
    assert sites["b"].responses == ("x",)


def test_covariates_of_elements_may_be_dependent_if_they_say_nothing_of_the_site():
    plates = {"a": ["rows"], "b": ["columns"], "x": ["rows", "columns"]}
    summaries = {"b": [Summary(("a", "x"), ("rows",))]}
    edges = [("s", "a"), ("a", "x"), ("b", "x")]
    found_sites = found(edges, {"s": ["x"], "a": ["s", "x"], "b": ["a", "x"]}, summaries, plates=plates)
    assert list(found_sites) == ["b"]  # effects of rows share their scale, which the data do not see
    # where the scale is that of the columns too, the rows say something of it, and so of b
    edges = [*edges, ("s", "b")]
    assert not found(edges, {"s": ["x"], "a": ["s", "x"], "b": ["a", "x"]}, summaries, plates=plates)
    assert list(
        found(edges, {"s": ["x"], "a": ["s", "x"], "b": ["s", "a", "x"]}, summaries, plates=plates)
    ) == ["b"]
    # data that share an unknown noise are not independent given the rows
    edges = [("a", "x"), ("b", "x"), ("n", "x")]
    parents = {"a": ["x"], "b": ["a", "x"], "n": ["a", "b", "x"]}
    assert not found(edges, parents, summaries, plates=plates)
