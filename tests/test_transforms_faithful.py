"""The network of faithful flows: structure, both directions, inversion, levels, starts, gradients."""

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_graphflows.errors import ConvergenceError, GraphflowsError
from pyro_graphflows.nn import mlp
from pyro_graphflows.transforms import FlowStructure, Solver, conditional_faithful_residual, faithful
from pyro_graphflows.transforms.edge_linear import Inputs, expand_batch
from pyro_graphflows.transforms.faithful import FaithfulResidualNN
from pyro_graphflows.transforms.network import regress_on_parents, structure_mask

FORMS = ("density", "sampling")

# Positions deliberately not in topological order; two context columns.
STRUCTURE = FlowStructure(
    parents=((2,), (0, 2), (), (), (0, 1, 3)),
    context_parents=((0,), (), (0, 1), (), (1,)),
    context_dim=2,
    names=("a", "b", "c", "d", "e"),
)
FULL = FlowStructure(tuple(tuple(range(v)) for v in range(4)))
EMPTY = FlowStructure(((), (), ()))
ONE = FlowStructure(((),))
CONDITIONED = {"conditioner_units": 4, "conditioner_layers": 2}


def excited(structure, size=1.0, **options):
    """A flow with large random weights."""
    network = FaithfulResidualNN(structure, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(size * torch.randn_like(parameter))
        network.stack.log_scale.mul_(0.3)
        if network.conditioner is not None:
            network.conditioner.scale_output_(0.1)
    return network


def context_of(structure, *batch):
    return [torch.randn(*batch, structure.context_dim)] if structure.context_dim else []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("blocks", [1, 4, 10])
@pytest.mark.parametrize("structure", [STRUCTURE, FULL, EMPTY, ONE])
@pytest.mark.parametrize("conditioner", [{}, CONDITIONED])
def test_each_factor_depends_on_its_parents_alone(form, blocks, structure, conditioner):
    """log q(z_v | earlier z, x) has a derivative by z_v, its parents and nothing else: exactly zero elsewhere."""
    network = excited(structure, closed_form=form, num_blocks=blocks, lipschitz=0.9, **conditioner)
    z = torch.randn(structure.event_dim)
    x = torch.randn(structure.context_dim)

    def terms(x, z):
        eps, log_diag = network.inverse_terms(z, *([x] if structure.context_dim else []))
        return dist.Normal(0.0, 1.0).log_prob(eps) - log_diag

    by_x, by_z = torch.autograd.functional.jacobian(terms, (x, z))
    promised = structure_mask(structure)
    promised[:, structure.context_dim :] |= torch.eye(structure.event_dim, dtype=torch.bool)
    assert torch.equal(torch.cat([by_x, by_z], -1) != 0, promised)


@pytest.mark.parametrize("form", FORMS)
def test_sampling_depends_on_ancestors_alone(form):
    network = excited(STRUCTURE, closed_form=form, num_blocks=2)
    x, eps = torch.randn(2), torch.randn(5)
    jacobian = torch.autograd.functional.jacobian(lambda e: network.sample(e, x)[0], eps)
    for v in range(5):
        expected = {v, *STRUCTURE.ancestors(v)}
        assert set((jacobian[v] != 0).nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_dims": [10, 15]},
        {"conditional_scale": True},
        {"activation": "lipswish"},
        {"units_per_variable": 0},
        CONDITIONED,
        {**CONDITIONED, "units_per_variable": 0},
    ],
)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_both_directions_agree_with_each_other_and_with_autograd(form, options, batch):
    network = excited(STRUCTURE, 0.7, closed_form=form, **options)
    x, eps = context_of(STRUCTURE, *batch), torch.randn(*batch, 5)
    z, log_diag = network.sample(eps, *x)
    again, log_diag_again = network.inverse_terms(z, *x)
    assert z.shape == log_diag.shape == (*batch, 5)
    torch.testing.assert_close(again, eps, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(log_diag_again, log_diag, atol=1e-8, rtol=1e-8)
    one = (0,) * len(batch)
    jacobian = torch.autograd.functional.jacobian(
        lambda e: network.sample(e, *(c[one] for c in x))[0], eps[one]
    )
    torch.testing.assert_close(jacobian.diagonal().log(), log_diag[one], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_diag[one].sum(), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"hidden_dims": [15, 10]}, CONDITIONED])
def test_engines_and_pieces_give_the_same_numbers(form, options, monkeypatch):
    """Values and gradients: dense, sparse, cut into pieces or not, context in parts and at a smaller batch shape."""
    networks = {
        engine: excited(STRUCTURE, 0.5, closed_form=form, engine=engine, **options)
        for engine in ("dense", "sparse")
    }
    networks["sparse"].load_state_dict(networks["dense"].state_dict())
    x, eps = torch.randn(40, 2), torch.randn(3, 40, 5)
    results = []
    for piece in (2**20, 6000):
        monkeypatch.setattr(faithful, "PIECE", piece)
        monkeypatch.setattr(faithful, "RECOMPUTE", piece)
        for network in networks.values():
            network.zero_grad()
            z, log_diag = network.sample(eps, x[:, :1], x[:, 1:])
            back, log_back = network.inverse_terms(z.detach(), x)
            (z.sum() + log_diag.sum() + (back**2).sum() + log_back.sum()).backward()
            with torch.no_grad():
                plain, _ = network.sample(eps, x)
            results.append([z, log_diag, back, log_back, plain, *(p.grad for p in network.parameters())])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            torch.testing.assert_close(second, first, atol=1e-10, rtol=1e-9)


def adversarial(structure, c, dtype, form, blocks=4, **options):
    """Weights whose slope is 1 − c on an interval around zero, in all blocks, and 1 outside: as bad as can be."""
    network = FaithfulResidualNN(
        structure, num_blocks=blocks, closed_form=form, lipschitz=c, activation="tanh", **options
    ).to(dtype)
    with torch.no_grad():
        network.stack.inner.copy_(network.stack.inner.abs() + 0.1)
        network.stack.outer.copy_(-network.stack.outer.abs() * 30)
    return network


# A structured part, a full one and an isolated variable, side by side.
UNION = FlowStructure(
    parents=(*STRUCTURE.parents, *(tuple(range(5, 5 + v)) for v in range(3)), ()),
    context_parents=(*STRUCTURE.context_parents, (), (), (), ()),
    context_dim=2,
)
INVERSION = [(UNION, "sparse"), (ONE, "dense")]


def train(network, dtype):
    """A few large steps of maximum likelihood on bimodal data, with a gradient in every parameter."""
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    z = torch.randn(50, network.event_dim, dtype=dtype)
    z = torch.where(z > 0, z + 2, z - 2)
    x = [torch.randn(50, network.context_dim, dtype=dtype)] if network.context_dim else []
    for _ in range(10):
        optimizer.zero_grad()
        eps, log_diag = network.inverse_terms(z, *x)
        (0.5 * eps**2 + log_diag).sum(-1).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("c", [0.9, 0.97, 0.99, 0.999])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", ["cold", "trained", "random", "adversarial"])
def test_inversion_always_converges(dtype, c, form, weights):
    """Backward error of a few units of rounding up to |y| = 1e4, whatever the weights."""
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for structure, engine in INVERSION:
        options = {"closed_form": form, "lipschitz": c, "engine": engine}
        if weights in ("cold", "trained"):
            network = FaithfulResidualNN(structure, **options).to(dtype)
            if weights == "trained":
                train(network, dtype)
        elif weights == "random":
            network = excited(structure, 1.0, **options).to(dtype)
            network.stack.log_scale.data.zero_()
        else:
            network = adversarial(structure, c, dtype, form, engine=engine)
        size = 10.0 ** torch.arange(-2, 5).to(dtype).view(-1, 1, 1)
        target = (size * torch.randn(7, 20, structure.event_dim)).to(dtype)
        x = [torch.randn(20, structure.context_dim, dtype=dtype)] if structure.context_dim else []
        if form == "density":
            z, _ = network.sample(target, *x)
            residual = network.inverse_terms(z, *x)[0] - target
            scale = torch.maximum(z.abs(), target.abs()).clamp(min=1)
        else:
            eps, _ = network.inverse_terms(target, *x)
            # the map of one variable, given its parents' values: each level on its own
            evaluation, residual = network.start(*x), torch.empty_like(target)
            for level in network.levels:
                residual[..., list(level)] = (
                    evaluation.step(eps[..., list(level)])[0] - target[..., list(level)]
                )
                evaluation.accept(target[..., list(level)])
            scale = torch.maximum(eps.abs(), target.abs()).clamp(min=1)
        # Parents enter without a bound: what rounding does to their contribution is no error of the inversion.
        scale = torch.maximum(scale, contribution(network, target if form == "sampling" else z, x))
        assert ((residual.abs() / scale).max()) <= limit, (structure, engine)


def contribution(network, z, x):
    """The size of the terms that parents add, for each variable."""
    known = expand_batch(z[..., network._order].movedim(-1, 0).abs(), z.shape[:-1])
    context = None if not x else x[0].movedim(-1, 0).abs()
    edges = network.edges
    with torch.no_grad():
        saved = edges.weight.clone()
        edges.weight.abs_()
        total = torch.zeros_like(known)
        groups, restore = edges.all_rows()
        inputs = Inputs(z.shape[:-1], context, known)
        prepared = zip(groups, edges.prepare(groups), strict=True)
        supplied = torch.cat([edges(group, *weights, inputs) for group, weights in prepared])
        supplied = supplied if restore is None else supplied[restore]
        edges.weight.copy_(saved)
        weights, stack = network.stack.weights(), network.stack
        for t, (start, shift, _) in enumerate(stack._split(supplied, weights)):
            total = total + shift.abs()
            total = total + (weights.outer[t].abs().unsqueeze(-1) * start.abs()).sum(1)
    return total.view(-1, *z.shape[:-1]).movedim(0, -1)[..., network._place]


@pytest.mark.parametrize("form", FORMS)
def test_forward_error_where_the_problem_is_well_conditioned(form):
    """Condition number below 100, |y| ≤ 10: the round trip is exact to 1e-10."""
    network = excited(STRUCTURE, 0.3, closed_form=form, lipschitz=0.9)
    eps = 3 * torch.randn(500, 5)
    x = torch.randn(500, 2)
    z, log_diag = network.sample(eps, x)
    again, _ = network.inverse_terms(z, x)
    good = (log_diag.abs().amax(-1) < 4.6) & (z.abs().amax(-1) <= 10)
    assert good.float().mean() > 0.5
    assert (again - eps)[good].abs().max() <= 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_gradients_through_the_inverse_are_those_of_a_long_unrolled_solve(form):
    """Implicit gradients of values and log-derivatives against autograd through 2,000 fixed-point iterations."""
    network = excited(STRUCTURE, 0.5, closed_form=form, lipschitz=0.6, num_blocks=1, activation="tanh")
    network.stack.outer.data.abs_()
    network.stack.inner.data.abs_().neg_()  # all slopes below one, so that the fixed point exists
    x, target = torch.randn(4, 2), torch.randn(4, 5)

    def implicit():
        out, log_diag = network.sample(target, x) if form == "density" else network.inverse_terms(target, x)
        return (out * torch.arange(1.0, 6.0)).sum() + (log_diag**2).sum()

    def unrolled():
        value = torch.zeros_like(target)
        for _ in range(2000):
            if form == "density":
                image, log_diag = network.inverse_terms(value, x)
            else:
                # parents at their given values: go through the levels
                evaluation, parts, logs = network.start(x), [None] * 5, [None] * 5
                for level in network.levels:
                    out, log = evaluation.step(value[:, list(level)])
                    evaluation.accept(target[:, list(level)])
                    for i, v in enumerate(level):
                        parts[v], logs[v] = out[:, i], log[:, i]
                image, log_diag = torch.stack(parts, -1), torch.stack(logs, -1)
            value = value - 0.5 * (image - target)
            if (image - target).abs().max() < 1e-13:
                break
        return (value * torch.arange(1.0, 6.0)).sum() + (log_diag**2).sum()

    parameters = list(network.parameters())
    first = torch.autograd.grad(implicit(), parameters)
    second = torch.autograd.grad(unrolled(), parameters)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_in_all_inputs(form):
    network = excited(STRUCTURE, 0.5, closed_form=form, num_blocks=2, activation="tanh", units_per_variable=3)
    x, v = torch.randn(2, 2, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, x: network.sample(v, x), (v, x))
    assert torch.autograd.gradcheck(lambda v, x: network.inverse_terms(v, x), (v, x))


# Levels


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize("conditioner", [{}, CONDITIONED])
def test_values_may_be_replaced_between_levels(form, engine, conditioner):
    """Replaced values are what the later levels see, and ``terms`` scores them."""
    network = excited(STRUCTURE, 0.5, closed_form=form, engine=engine, **conditioner)
    x = torch.randn(7, 2)
    taken = torch.randn(7, 5)
    eps = torch.empty(7, 5)
    log_diag = torch.empty(7, 5)
    evaluation = network.start(x)
    for level in network.levels:
        columns = list(level)
        drawn, _ = evaluation.step(torch.randn(7, len(columns)))
        assert not torch.equal(drawn, taken[:, columns])
        eps[:, columns], log_diag[:, columns] = evaluation.terms(taken[:, columns])
        back, log_back = evaluation.step(eps[:, columns])
        torch.testing.assert_close(back, taken[:, columns], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(log_back, log_diag[:, columns], atol=1e-9, rtol=1e-9)
        evaluation.accept(taken[:, columns])
    expected, expected_log = network.inverse_terms(taken, x)
    torch.testing.assert_close(eps, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(log_diag, expected_log, atol=1e-9, rtol=1e-9)
    with pytest.raises(GraphflowsError, match="all have been accepted"):
        evaluation.step(eps)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize("conditioner", [{}, CONDITIONED])
def test_levels_may_have_growing_batch_shapes(engine, conditioner):
    network = excited(STRUCTURE, 0.5, closed_form="sampling", engine=engine, **conditioner)
    x = torch.randn(4, 2)
    evaluation = network.start(x)
    shapes = [(4,), (1,), (3, 4), (6, 1, 1)]
    taken = [torch.randn(*shape, len(level)) for shape, level in zip(shapes, network.levels, strict=False)]
    for z in taken[:-1]:
        evaluation.accept(z)
    z, log_diag = evaluation.step(torch.randn(2, 3, 4, len(network.levels[len(taken) - 1])))
    assert z.shape == log_diag.shape == (2, 3, 4, len(network.levels[len(taken) - 1]))


def test_wrong_sizes_are_named():
    network = FaithfulResidualNN(STRUCTURE)
    with pytest.raises(GraphflowsError, match=r"last dimension of 5 \(a, b, c, d, e\)"):
        network.sample(torch.randn(3, 4), torch.randn(3, 2))
    with pytest.raises(GraphflowsError, match=r"context.shape\[-1\] == 2"):
        network.inverse_terms(torch.randn(3, 5), torch.randn(3, 3))
    with pytest.raises(GraphflowsError, match=r"for level 0 \(c, d\)"):
        network.start(torch.randn(3, 2)).step(torch.randn(3, 1))


# Starts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("conditional_scale", [False, True])
@pytest.mark.parametrize("conditioner", [{}, CONDITIONED])
def test_init_linear_makes_the_flow_linear_gaussian(form, conditional_scale, conditioner):
    network = excited(STRUCTURE, closed_form=form, conditional_scale=conditional_scale, **conditioner)
    network.standardize_(
        100 * torch.randn(5), 1e3 * torch.rand(5) + 0.1, torch.randn(2), torch.tensor([1e-3, 1e3])
    )
    weights, shift, scale = torch.randn(5, 7), torch.randn(5), torch.rand(5) + 0.1
    network.init_linear_(weights, shift, scale)
    x, eps = torch.randn(9, 2), torch.randn(9, 5)
    z, log_diag = network.sample(eps, x)
    weights = weights * structure_mask(STRUCTURE)
    expected = torch.cat([x, z], -1) @ weights.T + shift + scale * eps
    torch.testing.assert_close(z, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(log_diag, scale.log().expand(9, 5))
    z.square().sum().backward()  # hidden units can learn from here
    assert network.stack.outer.grad.abs().sum() > 0
    if network.conditioner is not None:
        assert network.conditioner.mlp.layers[-1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_init_linear_of_some_variables_leaves_the_others(engine, monkeypatch):
    network = excited(STRUCTURE, 0.5, closed_form="sampling", **CONDITIONED)
    if engine == "sparse":
        monkeypatch.setattr(mlp, "fastest_engine", lambda *_: "sparse")  # as it is for large networks
        sparse = excited(STRUCTURE, 0.5, closed_form="sampling", **CONDITIONED)
        sparse.load_state_dict(network.state_dict())
        network = sparse
    assert {layer.engine for layer in network.conditioner.mlp.layers} == {engine}
    x, z = torch.randn(7, 2), torch.randn(7, 5)
    before, _ = network.inverse_terms(z, x)
    network.init_linear_(torch.zeros(5, 7), torch.zeros(5), torch.ones(5), variables=[1, 4])
    after, log_diag = network.inverse_terms(z, x)
    torch.testing.assert_close(after[:, [1, 4]], z[:, [1, 4]])
    torch.testing.assert_close(log_diag[:, [1, 4]], torch.zeros(7, 2))
    torch.testing.assert_close(after[:, [0, 2, 3]], before[:, [0, 2, 3]])


def test_a_conditioner_learns_a_ratio():
    """b given a and x is normal around x / a: out of reach for linear maps, within it for the conditioner."""
    structure = FlowStructure(((), (0,)), ((), (0,)), 1)
    a, x = 1 + torch.rand(2000), torch.randn(2000, 1)
    b = x[:, 0] / a + 0.02 * torch.randn(2000)
    z = torch.stack([a, b], -1)
    losses = {}
    for units in (0, 32):
        torch.manual_seed(0)
        network = FaithfulResidualNN(structure, num_blocks=1, units_per_variable=0, conditioner_units=units)
        network.initialize_(z, x)
        optim = torch.optim.Adam(network.parameters(), lr=0.01)
        for step in range(400):
            rows = slice(200 * (step % 10), 200 * (step % 10) + 200)
            eps, log_diag = network.inverse_terms(z[rows], x[rows])
            loss = (0.5 * eps.square() + log_diag)[:, 1].mean()
            optim.zero_grad()
            loss.backward()
            optim.step()
        losses[units] = float(loss.detach())
    assert losses[32] < losses[0] - 1.0


@pytest.mark.parametrize("form", FORMS)
def test_initialize_finds_a_linear_model_exactly(form):
    """Without noise in the regression (n large) the fitted flow is the linear-Gaussian network itself."""
    truth = FaithfulResidualNN(STRUCTURE, closed_form=form)
    weights, shift, scale = torch.randn(5, 7), 1e3 * torch.randn(5), 10.0 ** torch.linspace(-1.0, 1.0, 5)
    truth.init_linear_(weights, shift, scale)
    x = torch.randn(5000, 2) * torch.tensor([3.0, 0.1])
    with torch.no_grad():
        z, _ = truth.sample(torch.randn(5000, 5), x)
    flow = conditional_faithful_residual(STRUCTURE, closed_form=form)
    flow.initialize_(z, x)
    fresh = torch.randn(5000, 2) * torch.tensor([3.0, 0.1])
    with torch.no_grad():
        z, log_true = truth.sample(torch.randn(5000, 5), fresh)
        eps, log_diag = flow.inverse_terms(z, fresh)
        eps_true, _ = truth.inverse_terms(z, fresh)
    kl = (0.5 * (eps**2 - eps_true**2) + log_diag - log_true).sum(-1).mean()
    # expected KL = (weights + shifts + scales) / (2 n) = (12 + 10) / 10000 = 0.0022; four times that is generous
    assert kl < 0.009


def test_regression_on_a_constant_and_on_copies_stays_finite():
    z = torch.randn(100, 1).expand(100, 3).clone()
    z[:, 0] = 5.0
    structure = FlowStructure(((), (0,), (0, 1)))
    weights, shift, scale = regress_on_parents(structure, z)
    assert all(bool(t.isfinite().all()) for t in (weights, shift, scale))
    assert (scale > 0).all()


def test_starts_refuse_what_is_not_finite():
    network = FaithfulResidualNN(STRUCTURE)
    ones = torch.ones(5)
    with pytest.raises(GraphflowsError, match="scale is not so for b, c"):
        network.standardize_(ones, torch.tensor([1.0, 0.0, torch.nan, 1.0, 1.0]))
    with pytest.raises(GraphflowsError, match=r"weights of shape \(5, 7\)"):
        network.init_linear_(torch.zeros(5, 5), ones, ones)
    with pytest.raises(GraphflowsError, match="positive scales"):
        network.init_linear_(torch.zeros(5, 7), ones, -ones)
    with pytest.raises(GraphflowsError, match="all finite"):
        network.initialize_(torch.full((10, 5), torch.nan), torch.zeros(10, 2))


# Construction


def test_going_through_the_levels_evaluates_each_variable_once(monkeypatch):
    """Sampling costs one pass in all: each level evaluates its own variables alone."""
    for engine in ("dense", "sparse"):
        network = excited(STRUCTURE, closed_form="sampling", engine=engine)
        evaluated = []
        forward = network.stack.forward

        def counted(y, inputs, weights, forward=forward, evaluated=evaluated):
            assert inputs.shape[0] == y.shape[0]
            evaluated.append(y.shape[0])
            return forward(y, inputs, weights)

        monkeypatch.setattr(network.stack, "forward", counted)
        network.sample(torch.randn(3, 5), torch.randn(3, 2))
        assert sum(evaluated) == 5
        assert len(evaluated) >= len(network.levels) > 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"closed_form": "both"}, "closed_form"),
        ({"lipschitz": 1.0}, "lipschitz"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"hidden_dims": [3]}, "at least 5.*without: d, e"),
        ({"hidden_dims": []}, "at least 5"),
        ({"activation": "relux"}, "activation"),
        ({"activation": torch.nn.SELU()}, "known slopes"),
        ({"engine": "fast"}, "engine"),
    ],
)
def test_construction_checks_its_arguments(options, match):
    with pytest.raises(GraphflowsError, match=match):
        FaithfulResidualNN(STRUCTURE, **options)


def test_failure_of_the_inversion_is_named():
    network = adversarial(STRUCTURE, 0.999, torch.float64, "density", solver=Solver(max_iterations=1))
    with pytest.raises(ConvergenceError, match=r"FaithfulResidual .*max_iterations"):
        network.sample(5 * torch.randn(50, 5), torch.randn(50, 2))


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_random_graphs(seed):
    """Round trip and density on random graphs, engines and forms."""
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 8, (1,), generator=generator))
    order = torch.randperm(size, generator=generator).tolist()
    coin = torch.rand(size, size, generator=generator) < 0.4
    parents = [()] * size
    for i, v in enumerate(order):
        parents[v] = tuple(p for p in order[:i] if coin[v, p])
    torch.manual_seed(seed)
    network = excited(
        FlowStructure(tuple(parents)),
        0.5,
        closed_form=FORMS[seed % 2],
        engine=("dense", "sparse")[seed // 2 % 2],
        num_blocks=2,
    )
    eps = torch.randn(6, size)
    z, log_diag = network.sample(eps)
    again, log_again = network.inverse_terms(z)
    torch.testing.assert_close(again, eps, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(log_again, log_diag, atol=1e-6, rtol=1e-6)
