"""Captured programs that autograd knows: the same values and gradients as the programs themselves."""

import pytest
import torch

from pyro_graphflows.capture import Draws, NotCapturedError
from pyro_graphflows.captured_gradients import Result, capture_with_gradients


def made():
    """Return parameters, data, and a program of them with noise, one of whose results has another gradient."""
    torch.manual_seed(0)
    w, b, unused = (torch.randn(*shape, requires_grad=True) for shape in [(3, 4), (3,), (3,)])
    x = torch.randn(5, 4)

    def program():
        mean = (x @ w.T + b).sin()
        value = mean + torch.randn(5, 3) * b.exp()
        log_prob = -((value - mean) / b.exp()).square().sum(-1) - b.sum()
        path = log_prob.detach() + 3 * (log_prob - log_prob.detach())
        total = torch.zeros(())
        total.add_(value.detach().sum())
        return [
            Result(value),
            Result(log_prob, followed=False),
            Result(path, equal=log_prob),
            Result(total, followed=False),
        ]

    return [w, b, unused], [x], program


def captured_and_again(parameters, data, program, **options):
    with Draws() as draws:
        program()
    captured = capture_with_gradients(program, parameters, data, draws.counts, **options)
    noise = draws.fresh()

    def again():
        with Draws(noise), torch.enable_grad():
            return [result.tensor for result in program()]

    return captured, captured(parameters, [*data, *noise.values()], again), again


def gradients(results, which, parameters, **options):
    loss = sum((i + 1) * (results[i] * results[i].detach().cos()).sum() for i in which)
    return torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True, **options)


@pytest.mark.parametrize("which", [[0], [2], [0, 2], [1], [0, 1, 2]])
def test_values_and_gradients_are_those_of_the_program(which):
    """Gradients by result 1 are not captured: the program is run once more for them."""
    parameters, data, program = made()
    captured, results, again = captured_and_again(parameters, data, program)
    expected = again()
    torch.testing.assert_close(results, tuple(expected))
    assert [r.requires_grad for r in results] == [True, True, True, False]
    found = gradients(results, which, parameters)
    assert found[2] is None
    torch.testing.assert_close(found[:2], gradients(expected, which, parameters)[:2])
    assert captured.num_operations < 60


def test_gradients_of_gradients():
    parameters, data, program = made()
    _, results, again = captured_and_again(parameters, data, program)

    def second(found):
        first = gradients(found, [0, 2], parameters, create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), parameters[:2])

    torch.testing.assert_close(second(results), second(again()))


def test_data_and_parameters_are_read_at_each_call():
    parameters, data, program = made()
    captured, _, again = captured_and_again(parameters, data, program)
    with torch.no_grad():
        parameters[0].mul_(2.0)
        data[0].add_(1.0)
    noise = [torch.randn(15)]
    results = captured(parameters, [*data, *noise], again)
    with Draws(dict(zip(_kinds(program), noise, strict=True))):
        expected = [result.tensor for result in program()]
    torch.testing.assert_close(results, tuple(expected))


def _kinds(program):
    with Draws() as draws:
        program()
    return list(draws.counts)


def test_a_parameter_that_changes_before_its_gradient_is_refused_by_torch():
    weight = torch.ones(2, 3, requires_grad=True)
    _, results, _ = captured_and_again([weight], [], lambda: [Result((weight.T @ weight).exp())])
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in"):
        results[0].sum().backward()


@pytest.mark.parametrize("is_view", [False, True])
def test_what_follows_from_fixed_tensors_is_computed_once(is_view):
    weight, whole = torch.ones(2, requires_grad=True), torch.tensor([1.0, 4.0, 9.0])
    scale = whole[:2] if is_view else torch.tensor([1.0, 4.0])

    def program():
        return [Result(weight * (scale.log() + 1.0).exp().sqrt())]

    free, _, _ = captured_and_again([weight], [], program)
    kept = whole if is_view else scale
    fixed, results, again = captured_and_again([weight], [], program, fixed=[kept])
    assert fixed.num_operations == free.num_operations - 4
    torch.testing.assert_close(results, tuple(again()))
    torch.testing.assert_close(gradients(results, [0], [weight]), gradients(again(), [0], [weight]))


def test_tensors_that_are_written_to_keep_their_values():
    """Equal operations count as one only where nobody writes to their results."""
    weight = torch.ones(2, requires_grad=True)

    def program():
        first, second = torch.zeros(2), torch.zeros(2)
        second[0] = 5.0
        copied = torch.empty(2).copy_(first)
        kept = first.clone() + torch.stack([first])[0] + torch.cat([first]) + copied
        first.add_(weight.detach())
        return [Result(weight * first + second + kept), Result(weight.sin() * second * (kept + 1))]

    _, results, again = captured_and_again([weight], [], program)
    torch.testing.assert_close(results, tuple(again()))
    torch.testing.assert_close(gradients(results, [0, 1], [weight]), gradients(again(), [0, 1], [weight]))


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (lambda w, other: [w * other], "no parameters of its own"),
        (lambda w, other: [w * other.detach()], "parameters that are not its own"),
        (lambda w, other: [w], "a result is a parameter"),
        (lambda w, other: [w.detach() * 2.0], "no result has a gradient"),
        (lambda w, other: [w * 2.0, w.detach()[:1]], "part of a tensor that is given"),
        (lambda w, other: [w * float(w.detach().sum())], "number is read out of a tensor"),
    ],
)
def test_what_cannot_be_captured(results, message):
    weight, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    def program():
        return [Result(tensor) for tensor in results(weight, other)]

    with pytest.raises(NotCapturedError, match=message):
        captured_and_again([weight], [], program)
