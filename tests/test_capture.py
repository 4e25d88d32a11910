"""Programs of torch as graphs of tensor operations with their noise as an input."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows.capture import CAPTURING, Draws, NotCapturedError, scripted
from pyro_graphflows.recording import capture


def captured(function, *inputs):
    with Draws() as draws:
        function(*inputs)
    return capture(function, inputs, draws.counts)


def same_at_noise(function, inputs):
    """Whether the captured function and the program agree at the same noise and new inputs."""
    graph = captured(function, *(torch.ones_like(x) for x in inputs))
    noise = graph.draw()
    with Draws(dict(zip(graph.noise, noise, strict=True))):
        expected = function(*inputs)
    found = graph.graph(*graph.arguments(inputs, noise))
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(expected, found, strict=True))


# ------------------------------------------------------------------------------------------------------- draws
N = 40_000
LAWS = {
    "randn": (lambda: torch.randn(N), dist.Normal(0.0, 1.0)),
    "randn_like": (lambda: torch.randn_like(torch.zeros(N)), dist.Normal(0.0, 1.0)),
    "rand": (lambda: torch.rand(N), dist.Uniform(0.0, 1.0)),
    "normal_": (lambda: torch.empty(N).normal_(2.0, 3.0), dist.Normal(2.0, 3.0)),
    "normal": (lambda: torch.normal(torch.full((N,), 2.0), torch.tensor(0.5)), dist.Normal(2.0, 0.5)),
    "normal of a number": (lambda: torch.normal(1.0, torch.full((N,), 0.5)), dist.Normal(1.0, 0.5)),
    "normal of numbers": (lambda: torch.normal(1.0, 2.0, (N,)), dist.Normal(1.0, 2.0)),
    "uniform_": (lambda: torch.empty(N).uniform_(-1.0, 3.0), dist.Uniform(-1.0, 3.0)),
    "exponential_": (lambda: torch.empty(N).exponential_(2.0), dist.Exponential(2.0)),
    "cauchy_": (lambda: torch.empty(N).cauchy_(1.0, 2.0), dist.Cauchy(1.0, 2.0)),
    "Laplace": (lambda: dist.Laplace(0.0, 2.0).rsample((N,)), dist.Laplace(0.0, 2.0)),
    "HalfCauchy": (lambda: dist.HalfCauchy(2.0).rsample((N,)), dist.HalfCauchy(2.0)),
}


@pytest.mark.parametrize("name", LAWS)
def test_draws_follow_the_law_that_was_asked_for(name):
    make, law = LAWS[name]
    with Draws() as draws:
        values = make()
    assert sum(draws.counts.values()) >= N  # of the noise of Draws, not of the generator
    u, _ = law.cdf(values).sort()
    # Kolmogorov's distance exceeds 2.2 / sqrt(N) with probability 1e-4
    assert (u - (torch.arange(N) + 0.5) / N).abs().max() < 2.2 / math.sqrt(N)


def test_discrete_draws_follow_the_law_that_was_asked_for():
    p = torch.tensor([0.1, 0.6, 0.3])
    with Draws():
        binary = torch.bernoulli(torch.full((N,), 0.3))
        in_place = torch.empty(N).bernoulli_(0.3)
        classes = dist.Categorical(p).sample((N,))
        distinct = torch.stack([torch.multinomial(p, 2) for _ in range(200)])
        order = torch.randperm(50)
    error = 4 * math.sqrt(0.25 / N)
    assert abs(binary.mean() - 0.3) < error
    assert abs(in_place.mean() - 0.3) < error
    assert set(binary.tolist()) == {0.0, 1.0}
    assert ((classes[:, None] == torch.arange(3)).double().mean(0) - p).abs().max() < error
    assert (distinct[:, 0] != distinct[:, 1]).all()
    assert order.sort().values.tolist() == list(range(50))
    # the first of two without replacement is one draw
    assert abs((distinct[:, 0] == 1).double().mean() - 0.6) < 4 * math.sqrt(0.24 / 200)


def test_given_noise_is_what_a_program_draws():
    with Draws() as draws:
        torch.randn(3), torch.rand(2), torch.randn(1)
    given = draws.fresh()
    with Draws(given):
        first, u, last = torch.randn(3), torch.rand(2), torch.randn(1)
    normal, uniform = given.values()
    assert torch.equal(torch.cat([first, last]), normal)
    assert torch.equal(u, uniform)
    with Draws(given), pytest.raises(NotCapturedError, match="more random numbers than in the call"):
        torch.randn(5)


# ---------------------------------------------------------------------------------------------------- capturing
def test_the_captured_function_is_the_program_at_other_inputs():
    def program(x, y):
        x = x.detach().requires_grad_()
        value = ((x * torch.randn(3)).exp() * y + torch.rand(3)).sum()
        return [value.detach(), *torch.autograd.grad(value, [x])]

    assert same_at_noise(program, [torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.1, 0.2, 0.3])])


def test_constants_are_read_again_at_each_call():
    scale = torch.tensor([1.0, 2.0])
    graph = captured(lambda x: [(x * scale.exp()).sum()], torch.ones(2))
    scale.copy_(torch.tensor([0.0, 0.0]))
    (total,) = graph.graph(*graph.arguments([torch.tensor([3.0, 4.0])], ()))
    assert total.item() == 7.0


def test_inputs_count_by_identity_wherever_they_are_reached():
    parameter = torch.nn.Parameter(torch.tensor(2.0))
    graph = captured(lambda p: [parameter * 3.0], parameter)
    assert graph.graph(*graph.arguments([torch.tensor(5.0)], ()))[0].item() == 15.0


def test_numbers_that_are_only_added_up_stay_tensors():
    graph = captured(lambda x: [x.sum() + x.mean().item()], torch.ones(3))
    assert graph.graph(*graph.arguments([torch.arange(3.0)], ()))[0].item() == 4.0


def test_what_python_decides_by_values_is_refused_with_the_place():
    def branches(x):
        return [x.sum() if x.max() > 2 else x.mean()]

    with pytest.raises(NotCapturedError, match=r"a number is read.*test_capture\.py:\d+: `return \[x\.sum"):
        captured(branches, torch.ones(3))


def test_shapes_that_depend_on_values_are_refused_and_constant_ones_are_not():
    with pytest.raises(NotCapturedError, match=r"the shape of index depends on values.*test_capture\.py"):
        captured(lambda x: [x[x > 0].sum()], torch.ones(3))
    mask = torch.tensor([True, False, True])
    graph = captured(lambda x: [x[mask].sum()], torch.ones(3))
    assert graph.graph(*graph.arguments([torch.arange(3.0)], ()))[0].item() == 2.0


def test_draws_that_are_no_function_of_noise_are_refused():
    with pytest.raises(NotCapturedError, match="draws by torch's _standard_gamma"):
        captured(lambda x: [dist.Gamma(x, 1.0).rsample()], torch.ones(3))
    with pytest.raises(NotCapturedError, match="with a generator of its own"):
        captured(lambda x: [x + torch.empty(3).normal_(generator=torch.Generator())], torch.ones(3))


def test_checks_are_off_while_capturing_and_pyro_may_warn():
    seen = []

    def program(x):
        seen.append(CAPTURING.get())
        x = x.detach().requires_grad_()
        loss = pyro.util.warn_if_nan(x.sum(), "loss")
        return [loss.detach(), *torch.autograd.grad(loss, [x])]

    captured(program, torch.ones(2))
    assert seen == [False, True]
    assert not CAPTURING.get()


def test_scripted_graphs_compute_the_same_and_are_in_no_registry_that_keeps_them():
    """What torch.jit.trace returns is in one for the life of the process."""
    x, constant = torch.randn(3), torch.tensor([1.0, 2.0, 3.0])

    def program(x):
        return [x.sin() * constant, x.sum()]

    graph = captured(program, x)
    function: Any = scripted(graph.graph, graph.arguments([x], []))
    for value in (x, torch.randn(3)):
        found = function(*graph.arguments([value], []))
        for one, other in zip(found, program(value), strict=True):
            torch.testing.assert_close(one, other)
    assert torch.jit._state._python_cu.find_function(function.qualified_name) is None
    traced = torch.jit.trace(lambda x: x.sin(), (x,), check_trace=False)
    assert torch.jit._state._python_cu.find_function(traced.qualified_name) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_in_scripted_graphs_have_the_type_of_what_they_are_combined_with(dtype):
    def program(x):
        number = 1.0 / 3.0
        whole = torch.arange(4) * 3 - 1
        y = (2.5 * x + number).clamp(min=-0.1, max=1.7) / 7 - 1e-3
        chosen = torch.where((x > number) & (y <= 1.5), 1.0 - y, y).clamp(min=torch.tensor(0.1, dtype=dtype))
        return [chosen, chosen.sum() * number, x.ge(0.2), whole * 2.5, whole >= 2, (x.long() + 1).to(dtype)]

    x = torch.linspace(-2.0, 2.0, 4, dtype=dtype)
    graph = capture(program, [x], {})
    function: Any = scripted(graph.graph, graph.arguments([x], []))
    other = torch.tensor([0.3, float("nan"), 5.0, 1 / 3], dtype=dtype)
    for one, expected in zip(function(*graph.arguments([other], [])), program(other), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0, equal_nan=True)  # and types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_beside_half_precision_stay_as_they_are(dtype):
    """Torch computes with the number in single precision there, and rounds once."""

    def program(x):
        return [x * (1.0 / 3.0), x + 1e-4, (x / 7.0).clamp(max=0.1)]

    x = torch.linspace(-2.0, 2.0, 9).to(dtype)
    graph = capture(program, [x], {})
    function: Any = scripted(graph.graph, graph.arguments([x], []))
    for one, expected in zip(function(*graph.arguments([x], [])), program(x), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0)


def test_programs_may_write_to_tensors_from_outside():
    """Statistics of batches are kept as the program keeps them, once in each call."""
    count = torch.zeros(2)

    def program(x):
        count.add_(x)
        return [x * count]

    x = torch.tensor([1.0, 2.0])
    graph = capture(program, [x], {})
    before = count.clone()
    (found,) = graph.graph(*graph.arguments([x], []))
    assert torch.equal(count, before + x)
    assert torch.equal(found, x * count)


def test_sparse_matrices_are_constants():
    sparse = torch.tensor([[0.0, 2.0], [1.0, 0.0]]).to_sparse()

    def program(x):
        y = x.detach().requires_grad_()
        total = torch.sparse.mm(sparse, y.unsqueeze(-1)).exp().sum()
        return [total.detach(), *torch.autograd.grad(total, [y])]

    assert same_at_noise(program, [torch.tensor([0.3, -0.2])])


def test_literals_that_are_written_to_are_made_anew_in_each_call():
    def program(x):
        one, three = torch.tensor(1.0), torch.tensor([1.0, 2.0, 3.0])
        one.add_(x.sum())
        three.mul_(x)
        return [one, three]

    x = torch.tensor([1.0, 2.0, 4.0])
    graph = capture(program, [x], {})
    for _ in range(2):
        for one, expected in zip(graph.graph(*graph.arguments([x], [])), program(x), strict=True):
            assert torch.equal(one, expected)


@pytest.mark.parametrize("literal", [True, False])
def test_numbers_may_be_read_out_of_literals_and_not_of_what_follows_from_tensors_from_outside(literal):
    outside = torch.tensor(2.0)

    def program(x):
        number = torch.tensor(2.0) if literal else outside
        return [x if number * 2.0 > 3.0 else -x]

    x = torch.ones(2)
    if literal:
        graph = capture(program, [x], {})
        assert torch.equal(graph.graph(*graph.arguments([x], []))[0], x)
    else:
        with pytest.raises(NotCapturedError, match="a number is read"):
            capture(program, [x], {})


def test_scripted_graphs_convert_no_numbers():
    """To convert a number of double precision takes as long as an operation on a few elements."""

    def program(x):
        y = (2.5 * x + 1.0).clamp(min=-0.1, max=1.7) / 7 - 1e-3
        return [torch.where((x > 0.3) & (y <= 1.5), 1.0 - y, y)]

    x = torch.randn(4, dtype=torch.float32)
    graph = capture(program, [x], {})
    function: Any = scripted(graph.graph, graph.arguments([x], []))

    def conversions(run):
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.jit.optimized_execution(False), torch.profiler.profile(activities=[cpu]) as profile:
            run(x)
        return sum(event.name == "aten::_to_copy" for event in profile.events())

    assert conversions(program) > 5
    assert conversions(function) == 0
