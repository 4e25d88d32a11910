"""The network of graphical flows: what it sees, its two limits, inversion, levels and gradients."""

import networkx as nx
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows.errors import ConvergenceError, GraphflowsError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph
from pyro_graphflows.transforms import (
    FlowStructure,
    GraphicalResidualNN,
    Solver,
    conditional_graphical_residual,
    graphical_residual,
)

FORMS = ("density", "sampling")
STRUCTURE = FlowStructure(
    parents=((2,), (0, 2), (), (), (0, 1, 3)),
    context_parents=((0,), (), (0, 1), (), (1,)),
    context_dim=2,
    names=("a", "b", "c", "d", "e"),
)
CHAIN = FlowStructure(((), (0,), (1,), (2,)))
UNION = FlowStructure(
    parents=(*STRUCTURE.parents, *(tuple(range(5, 5 + v)) for v in range(3)), ()),
    context_parents=(*STRUCTURE.context_parents, (), (), (), ()),
    context_dim=2,
)
ONE = FlowStructure(((),))


def excited(structure, size=3.0, **options):
    network = GraphicalResidualNN(structure, **{"allow_short": True, **options})
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "raw_beta" not in name:
                parameter.copy_(size * torch.randn_like(parameter))
    return network


def reach(structure, hops):
    """Variables and context columns within so many hops, by breadth-first search."""
    dag = nx.DiGraph()
    dag.add_nodes_from(range(structure.event_dim))
    for v in range(structure.event_dim):
        dag.add_edges_from((p, v) for p in structure.parents[v])
        dag.add_edges_from((structure.event_dim + c, v) for c in structure.context_parents[v])
    backward = dag.reverse()
    return {
        v: set(nx.single_source_shortest_path_length(backward, v, cutoff=hops))
        for v in range(structure.event_dim)
    }


@pytest.mark.parametrize("hidden", [None, [20, 20]])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_closed_form_reaches_as_many_hops_as_there_are_blocks(blocks, hidden):
    """Exactly zero beyond T hops and non-zero within, in the closed direction."""
    for structure in (STRUCTURE, CHAIN):
        network = excited(structure, num_blocks=blocks, closed_form="sampling", hidden_dims=hidden)
        x, eps = torch.randn(structure.context_dim), torch.randn(structure.event_dim)

        def sample(eps, x, network=network, structure=structure):
            return network.sample(eps, *([x] if structure.context_dim else []))[0]

        by_eps, by_x = torch.autograd.functional.jacobian(sample, (eps, x))
        together = torch.cat([by_eps, by_x], -1) != 0
        for v, expected in reach(structure, blocks).items():
            assert set(together[v].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_density_of_a_variable_depends_on_ancestors_within_t_hops(blocks):
    """The documented limit: more than the parents from two blocks on, where FaithfulResidual sees parents alone."""
    network = excited(CHAIN, num_blocks=blocks, closed_form="density")
    z = torch.randn(4)

    def terms(z):
        eps, log_diag = network.inverse_terms(z)
        return dist.Normal(0.0, 1.0).log_prob(eps) - log_diag

    jacobian = torch.autograd.functional.jacobian(terms, z)
    for v, expected in reach(CHAIN, blocks).items():
        assert set((jacobian[v] != 0).nonzero().flatten().tolist()) == expected


def test_too_few_blocks_raise_with_the_number_needed():
    for blocks in (1, 2):
        with pytest.raises(GraphflowsError, match=f"num_blocks >= 3, .*got {blocks}"):
            GraphicalResidualNN(CHAIN, num_blocks=blocks, closed_form="sampling")
        GraphicalResidualNN(CHAIN, num_blocks=blocks, closed_form="sampling", allow_short=True)
        GraphicalResidualNN(CHAIN, num_blocks=blocks, closed_form="density")
    GraphicalResidualNN(CHAIN, num_blocks=3, closed_form="sampling")
    # an observed source counts: x -> a -> c with x not a parent of c
    model = ModelGraph([("a", "x"), ("c", "a")], observed=["x"])
    inverse = InverseGraph(model, {"a": ["x"], "c": ["a"]})
    with pytest.raises(GraphflowsError, match="num_blocks >= 2"):
        conditional_graphical_residual(inverse, num_blocks=1, closed_form="sampling")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options", [{}, {"hidden_dims": [25, 20]}, {"activation": "elu", "engine": "sparse"}]
)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_both_directions_agree_with_each_other_and_with_autograd(form, options, batch):
    network = excited(STRUCTURE, closed_form=form, lipschitz=0.9, **options)
    network.standardize_(torch.randn(5), torch.rand(5) + 0.5, torch.randn(2), torch.rand(2) + 0.5)
    x, eps = torch.randn(*batch, 2), torch.randn(*batch, 5)
    z, log_diag = network.sample(eps, x)
    again, log_again = network.inverse_terms(z, x)
    assert z.shape == log_diag.shape == (*batch, 5)
    torch.testing.assert_close(again, eps, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(log_again, log_diag, atol=1e-9, rtol=1e-9)
    one = (0,) * len(batch)
    jacobian = torch.autograd.functional.jacobian(lambda e: network.sample(e, x[one])[0], eps[one])
    torch.testing.assert_close(jacobian.diagonal().log(), log_diag[one], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_diag[one].sum(), atol=1e-9, rtol=1e-9)


def train(network):
    """A few large steps of maximum likelihood on bimodal data."""
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    z = torch.randn(50, network.event_dim)
    z = torch.where(z > 0, z + 2, z - 2)
    x = [torch.randn(50, network.context_dim)] if network.context_dim else []
    for _ in range(10):
        optimizer.zero_grad()
        eps, log_diag = network.inverse_terms(z, *x)
        (0.5 * eps**2 + log_diag).sum(-1).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("c", [0.9, 0.97, 0.99, 0.999])
@pytest.mark.parametrize("weights", ["cold", "trained", "random", "contractive"])
def test_inversion_always_converges(dtype, c, weights):
    """Backward error of a few units of rounding up to |y| = 1e4, whatever the weights."""
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for structure, form in ((UNION, "density"), (ONE, "sampling")):
        options = {"closed_form": form, "lipschitz": c, "allow_short": True}
        if weights in ("cold", "trained"):
            network = GraphicalResidualNN(structure, **options)
            if weights == "trained":
                train(network)
        elif weights == "random":
            network = excited(structure, 1.0, **options)
        else:  # the last layer undoes the first: slopes near 1 - c² on an interval, near 1 elsewhere
            network = GraphicalResidualNN(structure, activation="tanh", **options)
            with torch.no_grad():
                for block in network._nets():
                    first, last = block.layers
                    first.weight.mul_(20)
                    last.weight.copy_(-first.weight.T)
        network = network.to(dtype)
        size = 10.0 ** torch.arange(-2, 5).to(dtype).view(-1, 1, 1)
        target = (size * torch.randn(7, 20, structure.event_dim)).to(dtype)
        x = [torch.randn(20, structure.context_dim, dtype=dtype)] if structure.context_dim else []
        with torch.no_grad():
            if form == "density":
                solution, _ = network.sample(target, *x)
                image, _ = network.inverse_terms(solution, *x)
            else:
                solution, _ = network.inverse_terms(target, *x)
                image, _ = network.sample(solution, *x)
        scale = torch.maximum(solution.abs(), target.abs()).clamp(min=1)
        if structure is UNION:  # rounding in an ancestor moves its descendants by the Lipschitz constant
            scale = scale.amax(-1, keepdim=True)
        assert ((image - target).abs() / scale).max() <= limit


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_in_all_inputs(form):
    network = excited(STRUCTURE, closed_form=form, num_blocks=2, activation="tanh", units_per_variable=2)
    x, v = torch.randn(2, 2, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, x: network.sample(v, x), (v, x))
    assert torch.autograd.gradcheck(lambda v, x: network.inverse_terms(v, x), (v, x))


def test_gradients_through_the_inverse_are_those_of_a_long_unrolled_solve():
    network = excited(STRUCTURE, closed_form="density", lipschitz=0.7, num_blocks=2)
    x, target = torch.randn(4, 2), torch.randn(4, 5)
    weights = torch.arange(1.0, 6.0)
    z, log_diag = network.sample(target, x)
    first = torch.autograd.grad((z * weights).sum() + (log_diag**2).sum(), list(network.parameters()))
    y = target
    for block in reversed(network._nets()):
        goal = y
        for _ in range(200):
            y = goal - block(y, x)
    _, log_again = network.inverse_terms(y, x)
    second = torch.autograd.grad((y * weights).sum() + (log_again**2).sum(), list(network.parameters()))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_values_may_be_replaced_between_levels(form):
    """Accepted values and noise are those of one joint pass; replaced values are scored by the inverse."""
    network = excited(STRUCTURE, closed_form=form)
    x, taken = torch.randn(7, 2), torch.randn(7, 5)
    eps, log_diag = torch.empty(7, 5), torch.empty(7, 5)
    evaluation = network.start(x[:, :1], x[:, 1:])
    for i, level in enumerate(network.levels):
        columns = list(level)
        drawn, _ = evaluation.step(torch.randn(7, len(columns)))
        if i % 2:
            taken[:, columns] = drawn
        eps[:, columns], log_diag[:, columns] = evaluation.terms(taken[:, columns])
        back, _ = evaluation.step(eps[:, columns])
        torch.testing.assert_close(back, taken[:, columns], atol=1e-9, rtol=1e-9)
        evaluation.accept(drawn if i % 2 else taken[:, columns])
    expected, expected_log = network.inverse_terms(taken, x)
    torch.testing.assert_close(eps, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(log_diag, expected_log, atol=1e-9, rtol=1e-9)
    with pytest.raises(GraphflowsError, match="all have been accepted"):
        evaluation.accept(eps)
    with pytest.raises(GraphflowsError, match=r"for level 0 \(c, d\)"):
        network.start(x).step(torch.randn(7, 1))


def test_spectral_norms_stay_bounded_while_training():
    """At the start and after 100 steps with a large rate: the block's slopes are those of a contraction."""
    flow = graphical_residual(nx.DiGraph([("a", "b"), ("b", "c"), ("a", "c")]), lipschitz=0.9)
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    data = torch.randn(64, 3) * torch.tensor([0.1, 3.0, 0.5])
    for step in range(101):
        if step in (0, 100):
            for block in flow.network._nets():
                for entries in block.entries():
                    assert torch.linalg.matrix_norm(entries.detach(), 2) <= 0.9 * (1 + 1e-3)
        optimizer.zero_grad()
        (-dist.TransformedDistribution(base, [flow]).log_prob(data).mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("size", [5, 80])
def test_spectral_norms_stay_bounded_after_loading(size):
    """Weights of another flow, with norms far above the bound, with and without what is known of their norms."""
    structure = FlowStructure(tuple(tuple(range(max(0, v - 2), v)) for v in range(size)))
    flow, other = (GraphicalResidualNN(structure, num_blocks=2, lipschitz=0.97) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    state = other.state_dict()
    bare = {key: value for key, value in state.items() if ".bounds." not in key}
    for given in (state, bare):
        flow.load_state_dict(given, strict=False)
        for block in flow._nets():
            for layer, entries in zip(block.layers, block.entries(), strict=True):
                dense = layer.pattern.to_dense(entries) if layer.engine == "sparse" else entries
                norm = torch.linalg.matrix_norm(dense.detach(), 2)
                assert 0.97 * (1 - 1e-3) <= norm <= 0.97 * (1 + 1e-3)
        flow = GraphicalResidualNN(structure, num_blocks=2, lipschitz=0.97)


def test_construction_checks_its_arguments():
    for options, match in (
        ({"closed_form": "both"}, "closed_form"),
        ({"lipschitz": 1.0}, "lipschitz"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"hidden_dims": [2]}, "units|narrow|wide|lost"),
    ):
        with pytest.raises(GraphflowsError, match=match):
            GraphicalResidualNN(STRUCTURE, **options)


def test_failure_of_the_inversion_is_named():
    network = excited(STRUCTURE, lipschitz=0.999, solver=Solver(max_iterations=1))
    with pytest.raises(ConvergenceError, match="GraphicalResidual .*max_iterations"):  # noqa: RUF043
        network.sample(5 * torch.randn(50, 5), torch.randn(50, 2))
