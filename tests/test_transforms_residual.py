"""The residual transforms' helpers: every kind of graph, with and without context, and what is refused."""

import networkx as nx
import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.transforms import (
    FaithfulResidual,
    FlowStructure,
    conditional_faithful_residual,
    conditional_graphical_residual,
    faithful_residual,
    flow_structure,
    graphical_residual,
)


def test_faithful_helpers_take_every_kind_of_graph():
    dag = nx.DiGraph([("a", "b"), ("b", "x")])
    model = ModelGraph(dag, observed=["x"])
    inverse = InverseGraph(model, {"a": ["b"], "b": ["x"]})
    assert faithful_residual(dag).structure.names == ("a", "b", "x")
    assert faithful_residual(model).structure.names == ("a", "b", "x")
    flow = conditional_faithful_residual(inverse, closed_form="sampling", num_blocks=2)
    assert flow.structure.names == ("a", "b")
    assert flow.structure.context_names == ("x",)
    assert flow.levels == ((1,), (0,))
    assert flow.condition(torch.randn(3, 1))(torch.randn(3, 2)).shape == (3, 2)
    assert isinstance(flow.condition(torch.randn(1)), FaithfulResidual)
    with pytest.raises(GraphflowsError, match="Use conditional_faithful_residual"):
        faithful_residual(inverse)
    with pytest.raises(GraphflowsError, match="Use the Conditional form"):
        FaithfulResidual(flow.network)


def test_graphical_helpers_take_every_kind_of_graph():
    dag = nx.DiGraph([("a", "b"), ("b", "x")])
    model = ModelGraph(dag, observed=["x"])
    inverse = InverseGraph(model, {"a": ["b"], "b": ["x"]})
    assert graphical_residual(dag).structure.names == ("a", "b", "x")
    assert graphical_residual(model).structure.names == ("a", "b", "x")
    assert graphical_residual(flow_structure(dag)).structure.names == ("a", "b", "x")
    flow = conditional_graphical_residual(inverse, None, [24], 2, "sampling")
    assert (flow.structure.names, flow.structure.context_names) == (("a", "b"), ("x",))
    assert flow.network.closed_form == "sampling"
    assert len(flow.network.blocks) == 2
    assert flow.condition(torch.randn(3, 1))(torch.randn(3, 2)).shape == (3, 2)
    shared = conditional_graphical_residual(dag, 2)
    assert shared.condition(torch.randn(2))(torch.randn(4, 3)).shape == (4, 3)


def test_context_must_be_asked_for():
    dag = nx.DiGraph([("x", "a"), ("a", "b")])
    assert graphical_residual(dag).structure.names == ("x", "a", "b")
    flow = conditional_graphical_residual(dag, ["x"])
    assert flow.structure.context_names == ("x",)
    assert flow.levels == ((0,), (1,))
    with pytest.raises(GraphflowsError, match="Use conditional_graphical_residual"):
        graphical_residual(FlowStructure(((),), ((0,),), 1))
