import copy
import gc
import io
import weakref
from itertools import islice

import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import UnitsPerSet, label_masks
from pyro_graphflows.nn import lipschitz
from pyro_graphflows.nn.lipschitz import SpectralBound, bounded_entries
from pyro_graphflows.nn.masked import MaskedLinear


def norm(layer, entries):
    dense = layer.pattern.to_dense(entries) if layer.engine == "sparse" else entries
    return torch.linalg.matrix_norm(dense.detach().double(), 2).item()


def make_layer(kind, size, engine):
    """Weight layers of flows: chains in many pieces have many nearly equal singular values."""
    generator = torch.Generator().manual_seed(1)
    allowed = []
    for v in range(size):
        if kind == "pieces":
            parents = {v - 1} if v % 5 else set()
        elif kind == "random":
            parents = set(torch.randint(0, v, (min(v, 3),), generator=generator).tolist()) if v else set()
        else:
            parents = set(range(v))
        allowed.append({v, *parents})
    return MaskedLinear(label_masks(allowed, size, UnitsPerSet(2)).patterns[0], engine=engine)


CASES = [
    ("pieces", 10, "dense"),
    ("random", 10, "sparse"),
    ("full", 10, "dense"),
    ("pieces", 40, "sparse"),
    ("random", 40, "dense"),
    ("pieces", 200, "sparse"),
    ("random", 200, "sparse"),
    ("random", 200, "dense"),
    ("full", 150, "dense"),
    ("pieces", 600, "sparse"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bound_holds_from_the_start_and_through_training(case, dtype):
    torch.set_default_dtype(dtype)
    layer = make_layer(*case)
    c = 0.97
    bound = SpectralBound(layer, c)
    assert bound.exact == (case[1] <= lipschitz.EXACT_SIZE)
    raw = norm(layer, layer.entries())
    assert raw > c  # else there is nothing to bound
    assert c - 1e-3 <= norm(layer, bound.entries(layer)) <= c
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x, target = torch.randn(64, layer.in_features), 3 * torch.randn(64, layer.out_features)
    for step in range(100):
        optimiser.zero_grad()
        (layer.multiply(bound.entries(layer), x) - target).pow(2).sum().backward()
        optimiser.step()
        if step % 10 == 9:
            assert norm(layer, bound.entries(layer)) <= c + (1e-3 if case[1] > 512 else 1e-6)
    assert abs(norm(layer, layer.entries()) - raw) > 1e-2


@pytest.mark.parametrize("size", [45, 300])
@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_a_part_that_grows_out_of_sight_is_found(engine, size):
    """The tracked vectors live in one piece of the graph; another piece overtakes it."""
    layer = make_layer("pieces", size, engine)
    bound = SpectralBound(layer, 0.9)
    rows = layer.sparse_mask().indices[0]
    with torch.no_grad():
        block = rows < 10  # the units of the first piece
        if engine == "sparse":
            layer.weight[block] *= 0.1
            layer.weight[~block] *= 0.5
        else:
            layer.weight[:10] *= 0.1
            layer.weight[10:] *= 0.5
    for _ in range(20):
        bound.entries(layer)
    worst = 0.0
    for _ in range(80):
        with torch.no_grad():
            if engine == "sparse":
                layer.weight[block] *= 1.1
            else:
                layer.weight[:10] *= 1.1
        worst = max(worst, norm(layer, bound.entries(layer)))
    assert norm(layer, layer.entries()) > 2
    assert worst <= 0.9 + 1e-3


@pytest.mark.parametrize("size", [10, 30, 200])
def test_after_loading(size):
    layer, other = (make_layer("random", size, "auto") for _ in range(2))
    bound = SpectralBound(layer, 0.9)
    with torch.no_grad():
        other.weight.normal_()
    saved = SpectralBound(other, 0.9)
    for state in (saved.state_dict(), {}):
        with torch.no_grad():
            layer.reset_parameters()
        bound.entries(layer)
        layer.load_state_dict(other.state_dict())
        bound.load_state_dict(state, strict=False)
        assert 0.9 - 1e-3 <= norm(layer, bound.entries(layer)) <= 0.9
    same = copy.deepcopy(bound)
    assert torch.equal(same.entries(layer), bound.entries(layer))


@pytest.mark.parametrize("size", [30, 200])
def test_training_resumes_with_the_same_numbers(size):
    def step(layer, bound, seed):
        x = torch.randn(8, size, generator=torch.Generator().manual_seed(seed))
        grad = torch.autograd.grad(layer.multiply(bound.entries(layer), x).pow(2).sum(), layer.weight)[0]
        with torch.no_grad():
            layer.weight.add_(grad, alpha=1e-3)

    layer = make_layer("random", size, "auto")
    bound = SpectralBound(layer, 0.9)
    for seed in range(5):
        step(layer, bound, seed)
    if_evaluated = bound.entries(layer).clone()
    file = io.BytesIO()
    torch.save([layer.state_dict(), bound.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    again = make_layer("random", size, "auto")
    bound_again = SpectralBound(again, 0.9)
    again.load_state_dict(states[0])
    bound_again.load_state_dict(states[1])
    assert torch.equal(bound_again.entries(again), if_evaluated)
    for seed in range(5, 10):
        step(layer, bound, seed)
        step(again, bound_again, seed)
        assert torch.equal(layer.weight, again.weight)


def test_writes_through_data_are_noticed():
    """Pyro's ClippedAdam writes to ``parameter.data``, which leaves no trace in torch's version counter."""
    for size in (10, 200):
        layer = make_layer("random", size, "auto")
        bound = SpectralBound(layer, 0.9)
        layer.weight.data.mul_(3.0)
        assert norm(layer, bound.entries(layer)) <= 0.9


def test_small_weights_are_left_alone():
    layer = make_layer("random", 10, "dense")
    with torch.no_grad():
        layer.weight.mul_(0.01)
    bound = SpectralBound(layer, 0.9)
    assert torch.equal(bound.entries(layer), layer.entries())
    with torch.no_grad():
        layer.weight.zero_()
    entries = bound.entries(layer)
    entries.sum().backward()
    assert (entries == 0).all()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("size", [8, 150])
def test_gradient_is_that_of_the_scaled_weights(size):
    layer = make_layer("random", size, "auto")
    bound = SpectralBound(layer, 0.9)
    probe = torch.randn_like(layer.weight)
    (gradient,) = torch.autograd.grad((bound.entries(layer) * probe).sum(), layer.weight)

    def value(step, direction):
        dense = layer.masked_weight().detach() + step * direction
        scaled = dense * min(1, 0.9 / (torch.linalg.matrix_norm(dense, 2).item() * (1 + lipschitz.MARGIN)))
        places = layer.sparse_mask().indices
        entries = scaled[places[0], places[1]] if layer.engine == "sparse" else scaled
        return (entries * probe).sum()

    direction = torch.randn(layer.out_features, layer.in_features) * layer.sparse_mask().to_dense()
    numeric = (value(1e-5, direction) - value(-1e-5, direction)) / 2e-5
    places = layer.sparse_mask().indices
    along = direction[places[0], places[1]] if layer.engine == "sparse" else direction
    # The singular vectors of the larger layer are Ritz vectors, with the square root of the value's error.
    torch.testing.assert_close((gradient * along).sum(), numeric, rtol=1e-6 if size == 8 else 2e-2, atol=1e-6)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize("transposed", [False, True])
def test_layers_scaled_together_are_those_scaled_one_by_one(transposed, engine):
    """Values and first and second derivatives against the norm by singular value decomposition."""
    layers = []
    for size in (0.01, 1.0, 3.0):  # the first is small enough to be left alone
        mask = make_layer("random", 10, "dense").mask
        layers.append(MaskedLinear(mask.T if transposed else mask, engine=engine))
        with torch.no_grad():
            layers[-1].weight.mul_(size)
    other = make_layer("random", 60, "sparse")  # has a way of its own
    bounds = [SpectralBound(layer, 0.9) for layer in (*layers, other)]
    probes = [torch.randn_like(layer.weight) for layer in layers]
    weights = [layer.weight for layer in layers]

    def plain():
        for layer in layers:
            norm = torch.linalg.matrix_norm(layer.masked_weight(), 2) * (1 + lipschitz.MARGIN)
            yield layer.entries() * (0.9 / norm.clamp(min=0.9))

    found = []
    for entries in (bounded_entries(bounds, [*layers, other])[:3], list(plain())):
        total = sum((probe * own).sum() for probe, own in zip(probes, entries, strict=True))
        found.append([*entries, *torch.autograd.grad(total, weights)])
    for together, one_by_one in zip(*found, strict=True):
        torch.testing.assert_close(together, one_by_one, rtol=1e-9, atol=1e-12)

    with (
        torch.no_grad()
    ):  # the vectors of those that stay are kept, and a weight that is not finite spoils no other
        layers[1].weight.mul_(2.0)
        layers[2].weight[:5] = torch.nan
    again = bounded_entries(bounds, [*layers, other])
    torch.testing.assert_close(again[:2], list(islice(plain(), 2)), rtol=1e-9, atol=1e-12)
    assert again[2].isnan().any()
    assert again[3].isfinite().all()


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_second_derivatives_of_layers_scaled_together(engine):
    """The singular vectors count as fixed, so the numbers are those of the norm u^T W v."""
    layers = [make_layer("random", 6, engine) for _ in range(2)]
    bounds = [SpectralBound(layer, 0.9) for layer in layers]
    weights = [layer.weight for layer in layers]
    probes = [torch.randn_like(weight) for weight in weights]
    total = sum(
        (probe * own).pow(2).sum() for probe, own in zip(probes, bounded_entries(bounds, layers), strict=True)
    )
    first = torch.autograd.grad(total, weights, create_graph=True)
    second = torch.autograd.grad(
        sum((g * probe).sum() for g, probe in zip(first, probes, strict=True)), weights
    )

    def by_hand(weight, layer, bound, probe):
        _, *vectors = bound._known
        left, right = vectors[:2] if bound.wide else vectors[1::-1]
        dense = layer.engine == "dense"
        matrix = weight * layer.mask if dense else layer.pattern.to_dense(weight)
        norm = (left @ matrix @ right.mT).squeeze() * (1 + lipschitz.MARGIN)
        return (probe * (matrix if dense else weight) * (0.9 / norm)).pow(2).sum()

    for i, parts in enumerate(zip(layers, bounds, probes, strict=True)):
        weight = weights[i].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(by_hand(weight, *parts), weight, create_graph=True)
        torch.testing.assert_close(gradient, first[i], rtol=1e-9, atol=1e-12)
        (curve,) = torch.autograd.grad((gradient * probes[i]).sum(), weight)
        torch.testing.assert_close(curve, second[i], rtol=1e-9, atol=1e-12)


def test_layers_scaled_together_first_in_inference_mode_and_freed_at_once():
    layers = [make_layer("random", 10, engine) for engine in ("dense", "sparse")]
    bounds = [SpectralBound(layer, 0.9) for layer in layers]
    weights = [layer.weight for layer in layers]
    with torch.inference_mode():
        bounded_entries(bounds, layers)
    total = sum(entries.pow(3).sum() for entries in bounded_entries(bounds, layers))
    gradients = torch.autograd.grad(total, weights, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), weights)
    assert all(bool(each.isfinite().all()) and bool(each.any()) for each in second)
    alive = [weakref.ref(bound) for bound in bounds]
    gc.collect()
    gc.disable()
    try:
        del bounds
        assert [each() for each in alive] == [None, None]
    finally:
        gc.enable()


def test_no_inputs_and_weights_that_are_not_finite():
    empty = MaskedLinear(torch.zeros(3, 2, dtype=torch.bool), engine="sparse")
    assert SpectralBound(empty, 0.9).entries(empty).shape == (0,)
    layer = make_layer("random", 200, "auto")
    bound = SpectralBound(layer, 0.9)
    with torch.no_grad():
        layer.weight[0] = torch.nan
    assert bound.entries(layer).isnan().any()
    with pytest.raises(GraphflowsError, match="positive bound on the spectral norm; got 0"):
        SpectralBound(layer, 0.0)
    assert "bound=0.9" in repr(bound)
