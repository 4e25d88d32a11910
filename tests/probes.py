"""Small Pyro models, each with its true DAG: what a tracer must find, or refuse with a reason.

A probe is a function whose docstring says what is peculiar about it, registered with the parents of each of its nodes.
``refused`` is a pattern of the error for models that cannot be followed (their ``parents`` are still the truth).
"""

import ctypes
import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.utils._pytree import tree_map
from versions import TORCH

N = dist.Normal


@dataclass(frozen=True)
class Probe:
    name: str
    model: Callable
    parents: dict[str, set[str]]
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    observed: tuple[str, ...] = ("x",)
    marginalised: tuple[str, ...] = ()
    plates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    without_data: tuple[str, ...] = ()
    refused: str | None = None


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


PROBES: dict[str, Probe] = {}


def probe(
    parents: str, *args: Any, wrap: Callable | None = None, kwargs: Any = None, **truth: Any
) -> Callable:
    """Register a model. ``parents`` reads ``"z: ; x: z w"``."""

    def register(model: Callable) -> Callable:
        name = getattr(model, "__name__", type(model).__name__)
        table = {}
        for entry in parents.split(";"):
            node, _, others = entry.partition(":")
            table[node.strip()] = set(others.split())
        assert name not in PROBES, name
        wrapped = model if wrap is None else wrap(model)
        doubles = tree_map(lambda value: value.double() if _is_float(value) else value, (args, kwargs or {}))
        PROBES[name] = Probe(name, wrapped, table, *doubles, **truth)
        return model

    return register


def latent(name: str, loc: Any = 0.0) -> torch.Tensor:
    return pyro.sample(name, N(loc, 1.0))


def data(name: str, loc: Any, value: Any = None, scale: Any = 1.0) -> torch.Tensor:
    return pyro.sample(name, N(loc, scale), obs=torch.tensor(0.5) if value is None else value)


# Plain structures


@probe("z: ; x: z")
def one_latent():
    data("x", latent("z"))


@probe("a: ; b: a; c: a b; x: c")
def triangle():
    a = latent("a")
    b = latent("b", a)
    data("x", latent("c", a + b))


@probe("a: ; b: ; x: a b")
def collider():
    data("x", latent("a"), scale=latent("b").exp())


@probe("a: ; b: ; x: a")
def unused_latent():
    a, _ = latent("a"), latent("b")
    data("x", a)


@probe("a: ; b: a; x: b; y: x", observed=("x", "y"))
def observed_mid_chain():
    x = data("x", latent("b", latent("a")))
    data("y", x)


@probe("z: ; x: z; b: x; y: b", observed=("x", "y"))
def latent_below_observed():
    x = data("x", latent("z"))
    data("y", latent("b", x))


@probe("z: ; x: z", sizes={"z": 3, "x": 2})
def vector_sites():
    z = pyro.sample("z", N(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", N(z[:2], 1.0).to_event(1), obs=torch.zeros(2))


@probe("z: ; x: z", sizes={"z": 3, "x": 3})
def simplex():
    z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
    pyro.sample("x", dist.Multinomial(10, z), obs=torch.tensor([3.0, 3.0, 4.0]))


@probe("s: ; L: ; z: s L; x: z", sizes={"L": 4, "s": 2, "z": 2})
def covariance():
    s = pyro.sample("s", dist.HalfNormal(torch.ones(2)).to_event(1))
    corr = pyro.sample("L", dist.LKJCholesky(2, 1.0))
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=s.diag() @ corr))
    data("x", z[1])


@probe("n: ; p: ; x: n p")
def count_of_counts():
    n = pyro.sample("n", dist.Poisson(20.0))
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("x", dist.Poisson(n * p), obs=torch.tensor(3.0))


@probe("df: ; w: df; x: w", sizes={"w": 4})
def checked_by_its_distribution():
    """Wishart looks at its degrees of freedom when it is made."""
    df = pyro.sample("df", dist.Gamma(1.0, 1.0)) + 10.0
    with warnings.catch_warnings():  # torch takes good samples for singular ones
        warnings.simplefilter("ignore", UserWarning)
        w = pyro.sample("w", dist.Wishart(df, torch.eye(2)))
    data("x", w[0, 0])


@probe("m: ; z: m; x: z")
def rejection_sampling():
    m = latent("m")
    data("x", pyro.sample("z", dist.VonMises(m, 2.0)))


@probe("low: ; z: low; x: z")
def latent_support():
    low = latent("low")
    data("x", pyro.sample("z", dist.Uniform(low, low + 1.0)))


@probe("w: ; a: ; b: ; x: w a b")
def mixture():
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    locs = torch.stack([latent("a"), latent("b")])
    pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(w), N(locs, 1.0)), obs=torch.tensor(0.1))


# Writing into memory


@probe("a: ; b: ; x: a b")
def write_by_index():
    buffer = torch.zeros(2)
    buffer[0] = latent("a")
    buffer[1] = latent("b")
    data("x", buffer.sum())


@probe("a: ; b: ; x: a")
def write_through_views():
    """A write into one view is seen through another; a second buffer stays apart."""
    one, two = torch.zeros(2, 2), torch.zeros(2, 2)
    view = one.view(-1)
    one[1].copy_(latent("a").expand(2))
    two[1].copy_(latent("b").expand(2))
    data("x", view[3])


@probe("a: ; b: ; x: a b")
def out_argument():
    result = torch.zeros(())
    torch.add(latent("a"), latent("b"), out=result)
    data("x", result)


@probe("a: ; x: a")
def in_place_arithmetic():
    total = torch.zeros(())
    total += latent("a")
    total.mul_(2.0)
    data("x", total)


@probe("a: ; x: a")
def scatter_in_place():
    buffer = torch.zeros(3)
    buffer.scatter_(0, torch.tensor([1]), latent("a").expand(1))
    data("x", buffer[1])


@probe("k: ; a: ; x: k a")
def write_at_a_latent_index():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    buffer = torch.zeros(3)
    buffer[k] = latent("a")
    data("x", buffer[0])


@probe("a: ; b: ; x: b")
def overwritten_buffer():
    buffer = torch.zeros(2)
    buffer.copy_(latent("a").expand(2))
    buffer.copy_(latent("b").expand(2))
    data("x", buffer[0])


@probe("a: ; m: ; x: a m")
def masked_fill():
    m = pyro.sample("m", dist.Bernoulli(0.5))
    data("x", torch.zeros(2).masked_fill(m.bool(), 3.0)[0] + latent("a"))


# Making new tensors


@probe("a: ; x: a")
def copied_by_tensor():
    with warnings.catch_warnings():  # torch recommends clone()
        warnings.simplefilter("ignore", UserWarning)
        data("x", torch.tensor(latent("a")))


@probe("a: ; b: ; x: a b")
def list_into_tensor():
    data("x", torch.tensor([latent("a"), latent("b")]).sum())


@probe("a: ; x: a")
def new_tensor():
    data("x", torch.zeros(2).new_tensor([latent("a"), 1.0])[0])


@probe("a: ; x: a")
def full_of_a_latent():
    data("x", torch.full((2,), latent("a"))[1])


@probe("k: ; x: k")
def data_of_a_view():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    holder = torch.zeros(())
    holder.data = torch.arange(3.0)[k]
    data("x", holder)


@probe("a: ; b: ; x: b")
def only_its_shape():
    """zeros_like, new_zeros, expand_as, shape: nothing but the shape is used."""
    a, b = latent("a"), latent("b")
    data("x", b.expand_as(a) + torch.zeros_like(a) + a.new_zeros(()) + torch.ones(a.shape).sum() + a.dim())


@probe("a: ; b: ; x: a; y: b", observed=("x", "y"))
def broadcast_tensors():
    a, b = torch.broadcast_tensors(latent("a"), latent("b"))
    data("x", a)
    data("y", b)


@probe("a: ; x: a")
def detached_and_copied():
    import copy

    data("x", copy.deepcopy(latent("a").detach().data).clone())


@probe("a: ; b: ; x: a b")
def einsum_and_stack():
    v = torch.stack([latent("a"), latent("b")])
    data("x", torch.einsum("i,i->", v, torch.ones(2)))


@probe("a: ; x: a")
def complex_numbers():
    a = latent("a")
    data("x", torch.view_as_real(torch.polar(a.abs(), a))[0])


@probe("a: ; x: a")
def fourier():
    data("x", torch.fft.rfft(latent("a") * torch.arange(4.0)).abs().sum())


@probe("a: ; x: a")
def linear_algebra():
    matrix = torch.eye(2) * latent("a").exp()
    data("x", torch.linalg.solve(matrix, torch.ones(2))[0] + torch.linalg.eigvalsh(matrix)[0])


@probe("a: ; x: a")
def sparse_product():
    values = latent("a") * torch.ones(3)
    matrix = torch.sparse_coo_tensor(torch.arange(3).expand(2, 3), values, (3, 3), check_invariants=False)
    data("x", torch.sparse.mm(matrix, torch.ones(3, 1)).sum())


@probe("a: ; x: a")
def sorted_and_searched():
    a = latent("a") * torch.arange(3.0)
    values, indices = a.sort()
    data("x", values[0] + indices[0] + torch.searchsorted(values.contiguous(), torch.tensor(0.5)))


@probe("k: ; x: k")
def gathered():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    data("x", torch.arange(3.0).gather(0, k.reshape(1))[0])


@probe("k: ; x: k")
def indexed_by_a_scalar():
    """A 0-dim index is read as a number inside the call."""
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    data("x", torch.arange(3.0)[k])


@probe("k: ; x: k")
def view_at_a_latent_index_then_viewed():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    data("x", torch.arange(6.0).reshape(3, 2)[k][1:].squeeze())


@probe("a: ; b: ; x: a b")
def where():
    a, b = latent("a"), latent("b")
    data("x", torch.where(a > 0, b, -b))


@probe("k: ; a: ; x: k a")
def repeated_and_spaced():
    """A latent count inside a call that makes a tensor from it."""
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    data("x", torch.linspace(0.0, latent("a"), 3)[0] + torch.ones(2).clamp(max=k)[0])


@probe("z: ; x: z")
def selected_by_value():
    """The size of the selection depends on z, but only its sum is used."""
    z = latent("z") * torch.arange(3.0)
    data("x", z[z > 0].sum())


@probe("a: ; b: ; x: a b")
def functional_module():
    parameters = {"weight": latent("a").reshape(1, 1), "bias": latent("b").reshape(1)}
    data("x", torch.func.functional_call(_LINEAR, parameters, (torch.ones(1),))[0])


@probe("a: ; x: a")
def loaded_into_a_module():
    """The value is written into the memory of a parameter."""
    layer = nn.Linear(1, 1, dtype=torch.float64)
    layer.load_state_dict({"weight": latent("a").reshape(1, 1), "bias": torch.zeros(1)})
    data("x", layer(torch.ones(1))[0])


@probe("a: ; b: ; x: a b")
def vector_to_parameters():
    layer = nn.Linear(1, 1, dtype=torch.float64)
    nn.utils.vector_to_parameters(torch.stack([latent("a"), latent("b")]), layer.parameters())
    data("x", layer(torch.ones(1))[0])


# Transformations of functions


@probe("a: ; b: ; x: a b")
def vmapped():
    a, b = latent("a"), latent("b")
    data("x", torch.vmap(lambda row: row * a + b)(torch.ones(3)).sum())


@probe("a: ; x: a")
def vmapped_argument():
    data("x", torch.vmap(torch.sin)(latent("a") * torch.ones(3))[0])


@probe("a: ; b: ; x: a b")
def func_grad():
    a, b = latent("a"), latent("b")
    data("x", torch.func.grad(lambda t: (b * t**2).sum())(a))


@probe("a: ; x: a")
def func_jacobian():
    data("x", torch.func.jacrev(torch.sin)(latent("a") * torch.ones(2))[0, 0])


@probe("a: ; x: a")
def autograd_gradient():
    with torch.enable_grad():
        a = latent("a").detach().requires_grad_()
        (slope,) = torch.autograd.grad(torch.sin(a), a)
    data("x", slope.detach())


@torch.jit.script
def _scripted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(a)
    for i in range(2):
        out += a * b + i
    return out


@torch.jit.script
def _scripted_branch(a: torch.Tensor) -> torch.Tensor:
    if bool(a > 0):
        return a
    return -a


@probe("a: ; b: ; x: a b")
def scripted():
    data("x", _scripted(latent("a"), latent("b")))


@probe("a: ; x: a", refused=r"_scripted_branch.*site 'a'.*\(item\).*'x'")
def scripted_branch():
    data("x", _scripted_branch(latent("a")))


@probe("a: ; b: ; x: a b")
def compiled():
    torch._dynamo.reset()
    double = torch.compile(lambda a, b: torch.sin(a) * 2 + b, backend="eager")
    data("x", double(latent("a"), latent("b")))


# PyTorch 2.5 has no rule for operators with branches where something looks on.
of_branches = probe if TORCH >= (2, 6) else lambda edges: lambda model: model


@of_branches("z: ; a: ; b: ; x: z a b")
def conditional_operator():
    """Both branches count, whichever is taken, with what they close over."""
    z, a, b = latent("z"), latent("a"), latent("b")
    data("x", torch.cond(z > 0, lambda t: t * a, lambda t: t + b, (torch.ones(()),)))


@of_branches("k: ; a: ; x: k a")
def while_loop():
    k, a = pyro.sample("k", dist.Poisson(2.0)), latent("a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, x = torch._higher_order_ops.while_loop(
            lambda i, t: i < k, lambda i, t: (i + 1, t * a), (torch.tensor(0), torch.ones(()))
        )
    data("x", x)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a.mul(a)

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        return 2 * a * grad


@probe("a: ; x: a")
def custom_autograd():
    data("x", _Square.apply(latent("a")))


@probe("a: ; x: a")
def checkpointed():
    from torch.utils.checkpoint import checkpoint

    data("x", checkpoint(torch.sin, latent("a"), use_reentrant=False))


# Masks, scales, factors, deterministic sites


@probe("z: ; m: ; x: z m")
def latent_mask():
    z = latent("z")
    m = pyro.sample("m", dist.Bernoulli(0.5))
    with poutine.mask(mask=m.bool()):
        data("x", z)


@probe("z: ; m: ; x: z m")
def latent_mask_on_distribution():
    z = latent("z")
    m = pyro.sample("m", dist.Bernoulli(0.5))
    pyro.sample("x", N(z, 1.0).mask(m.bool()), obs=torch.tensor(0.1))


@probe("z: ; s: ; x: z s")
def latent_scale():
    z = latent("z")
    s = pyro.sample("s", dist.Gamma(1.0, 1.0))
    with poutine.scale(scale=s):
        data("x", z)


@probe("z: ; s: ; y: s; x: z y", without_data=("x",))
def latent_observation():
    """obs=f(latent): the site is a factor of the latent variables, and holds no data."""
    z, s = latent("z"), latent("s")
    data("x", z, value=latent("y", s) * 2.0)


@probe("a: ; b: ; x: a b", without_data=("x",))
def residual_observation():
    pyro.sample("x", N(0.0, 1.0), obs=torch.tensor(1.0) - latent("a") * latent("b"))


@probe("a: ; x: a")
def through_deterministic():
    twice = pyro.deterministic("twice", latent("a") * 2)
    data("x", twice)


@probe("a: ; b: ; x: a b")
def through_delta():
    total = pyro.sample("total", dist.Delta(latent("a") + latent("b")))
    data("x", total)


@probe("v: ; x: v")
def through_vector_delta():
    v = pyro.sample("v", N(torch.zeros(2), 1.0).to_event(1))
    data("x", pyro.sample("same", dist.Delta(v, event_dim=1))[0])


@probe("a: ; b: ; f: a b; x: a", observed=("f", "x"), without_data=("f",))
def factor():
    a, b = latent("a"), latent("b")
    pyro.factor("f", -((a - b) ** 2))
    data("x", a)


@probe("a: ; d: a; x: a", observed=("d", "x"), without_data=("d",))
def delta_with_density():
    a = latent("a")
    data("x", pyro.sample("d", dist.Delta(a * 2, log_density=-(a**2))))


@probe("z: ; x_observed: z; x_unobserved: z; y: x_observed x_unobserved", observed=("x_observed", "y"))
def partly_observed():
    z = latent("z")
    with pyro.plate("data", 3):
        mask = torch.tensor([True, False, True])
        x = pyro.sample("x", N(z, 1.0), obs=torch.zeros(3), obs_mask=mask)
        data("y", x, value=torch.zeros(3))


@probe(
    "z: ; mask: ; x_observed: z mask; x_unobserved: z mask",
    torch.zeros(3),
    torch.tensor([True, False, True]),
    observed=("x_observed",),
    inputs=("mask",),
    plates={"mask": ("data",), "x_observed": ("data",), "x_unobserved": ("data",)},
)
def partly_observed_by_argument(x, mask):
    z = latent("z")
    with pyro.plate("data", 3):
        pyro.sample("x", N(z, 1.0), obs=x, obs_mask=mask)


@probe("z: ; x: z")
def masked_out_observation():
    z = latent("z")
    with poutine.mask(mask=False):
        data("ignored", z)
    data("x", z)


@probe("z: ; x: z")
def missing_data():
    """The log-density leaves out what is missing, here all."""
    z = latent("z")
    pyro.sample("x", dist.NanMaskedNormal(z, 1.0), obs=torch.tensor(math.nan))


# Plates


@probe("m: ; z: m; x: z", plates={"m": (), "z": ("data",), "x": ("data",)})
def plated():
    m = latent("m")
    with pyro.plate("data", 4):
        data("x", latent("z", m), value=torch.zeros(4))


@probe("m: ; a: m; x: a", plates={"a": ("outer",), "x": ("outer", "inner")})
def nested_plates():
    m = latent("m")
    with pyro.plate("outer", 3, dim=-2):
        a = latent("a", m)
        with pyro.plate("inner", 4, dim=-1):
            data("x", a, value=torch.zeros(3, 4))


@probe("a: ; b: ; x: a b", plates={"a": ("rows",), "b": ("columns",), "x": ("rows", "columns")})
def crossed_plates():
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
    with rows:
        a = latent("a")
    with columns:
        b = latent("b")
    with rows, columns:
        data("x", a + b, value=torch.zeros(3, 4))


@probe("z0: ; z1: ; z2: ; x0: z0; x1: z1; x2: z2", observed=("x0", "x1", "x2"), plates={"x0": ()})
def sequential_plate():
    for i in pyro.plate("steps", 3):
        data(f"x{i}", latent(f"z{i}"))


@probe("m: ; z: m; x: z", torch.zeros(10), plates={"z": ("data",), "x": ("data",)})
def subsampled_plate(x):
    m = latent("m")
    with pyro.plate("data", 10, subsample_size=4) as index:
        pyro.sample("x", N(latent("z", m), 1.0), obs=x[index])


@probe(
    "m: ; w: ; x: m w",
    torch.zeros(10),
    torch.ones(10),
    inputs=("w",),
    plates={"x": ("data",), "w": ("data",)},
)
def subsampled_covariate(x, w):
    m = latent("m")
    with pyro.plate("data", 10, subsample_size=4):
        pyro.sample("x", N(m * pyro.subsample(w, event_dim=0), 1.0), obs=pyro.subsample(x, event_dim=0))


@probe("z: ; x: z", plates={"z": ("data",), "x": ()})
def collider_outside_plate():
    with pyro.plate("data", 3):
        z = latent("z")
    data("x", z.sum())


@probe(
    "group: ; theta: ; x: theta group", torch.tensor([0, 1, 1, 2]), inputs=("group",), plates={"x": ("data",)}
)
def group_effects(group):
    with pyro.plate("groups", 3):
        theta = latent("theta")
    with pyro.plate("data", 4):
        data("x", theta[group], value=torch.zeros(4))


@probe("z: ; m: ; x: z m", plates={"x": ("data",)})
def mask_in_plate():
    z = latent("z")
    with pyro.plate("data", 3), poutine.mask(mask=torch.tensor([True, True, False])):
        m = pyro.sample("m", dist.Bernoulli(0.5))
        pyro.sample("x", N(z * m, 1.0), obs=torch.zeros(3))


# Time


@probe("z0: ; z1: z0; z2: z1; x0: z0; x1: z1; x2: z2", observed=("x0", "x1", "x2"))
def markov_chain():
    z = torch.zeros(())
    for t in pyro.markov(range(3)):
        z = latent(f"z{t}", z)
        data(f"x{t}", z)


@probe("x0: z; x1: z x0; x2: z x1; z: ", torch.zeros(3), observed=("x0", "x1", "x2"))
def autoregressive_on_the_argument(x):
    """The argument is used directly where the sampled value would be meant."""
    z = latent("z")
    for t in range(3):
        data(f"x{t}", z + (x[t - 1] if t else 0.0), value=x[t])


@probe("z: ; x0: z; x1: z x0; x2: z x0 x1", torch.zeros(3), observed=("x0", "x1", "x2"))
def regressive_on_the_past(x):
    """A slice of the argument that covers several observed values."""
    z = latent("z")
    for t in range(3):
        data(f"x{t}", z + x[:t].sum(), value=x[t])


@probe("x_: ; z: x_; x: z", torch.zeros(3), inputs=("x_",), sizes={"x_": 3, "x": 3})
def prior_from_the_data(x):
    """The data set the prior: an input, for it is used before it is observed."""
    z = latent("z", x.mean())
    pyro.sample("x", N(z, 1.0).expand([3]).to_event(1), obs=x)


@probe("z: ; x: z", sizes={"z": 2, "x": 4})
def recurrent_network():
    z = pyro.sample("z", N(torch.zeros(2), 1.0).to_event(1))
    out, _ = _GRU(z.expand(1, 4, 2))
    pyro.sample("x", N(out[0, :, 0], 1.0).to_event(1), obs=torch.zeros(4))


@probe("z: ; h: z; x: h")
def attention():
    z = pyro.sample("z", N(torch.zeros(3, 4), 1.0).to_event(2))
    h = pyro.sample("h", N(_ATTENTION(z, z, z)[0], 1.0).to_event(2))
    pyro.sample("x", N(_LAYER(h), 1.0).to_event(2), obs=torch.zeros(3, 4))


def _float(module: nn.Module) -> nn.Module:
    return module.double().eval()


with torch.random.fork_rng():
    torch.manual_seed(0)
    _GRU = _float(nn.GRU(2, 3, batch_first=True))
    _ATTENTION = _float(nn.MultiheadAttention(4, 2, batch_first=True))
    _LAYER = _float(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    _CONVOLUTION = _float(nn.Sequential(nn.ConvTranspose2d(2, 3, 4), nn.BatchNorm2d(3), nn.ReLU()))
    _EMBEDDING = _float(nn.Embedding(3, 2))
    _FLOW = dist.transforms.ConditionalAffineCoupling(1, pyro.nn.ConditionalDenseNN(1, 1, [4], [1, 1]))
    _LINEAR = _float(nn.Linear(1, 1))
    _PLANAR = dist.transforms.Planar(2).double()
    _SPLINE = dist.transforms.ConditionalSpline(
        pyro.nn.DenseNN(1, [4], [2 * 4, 2 * 4, 2 * 3]), 2, count_bins=4, order="quadratic"
    )
_FLOW.double()
_SPLINE.double()


@probe("z: ; x: z", sizes={"x": 48})
def convolutional_decoder():
    z = pyro.sample("z", N(torch.zeros(2), 1.0).to_event(1))
    image = _CONVOLUTION(z[None, :, None, None])[0]
    pyro.sample("x", N(image, 1.0).to_event(3), obs=torch.zeros(3, 4, 4))


@probe("k: ; x: k", sizes={"x": 2})
def embedded_category():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    pyro.sample("x", N(_EMBEDDING(k), 1.0).to_event(1), obs=torch.zeros(2))


# Pyro's own machinery


@probe("k: ; z: k; x: z", marginalised=("k",), wrap=lambda model: config_enumerate(model, "parallel"))
def enumerated():
    k = pyro.sample("k", dist.Categorical(torch.ones(2)))
    data("x", latent("z", torch.tensor([-1.0, 1.0])[k]))


@probe("w: ; z: w; x: z", wrap=lambda model: poutine.condition(model, data={"x": torch.tensor(1.0)}))
def conditioned():
    latent("x", latent("z", latent("w")))


@probe("z: ; x: ", observed=("x",), wrap=lambda model: poutine.do(model, data={"z": torch.tensor(1.0)}))
def intervened():
    data("x", latent("z"))


@probe(
    "m: ; z_decentered: m; x: m z_decentered",
    wrap=lambda model: poutine.reparam(model, config={"z": LocScaleReparam(0.5)}),
)
def reparametrised():
    data("x", latent("z", latent("m")))


@probe(
    "m: ; z_base: ; x: m z_base",
    wrap=lambda model: poutine.reparam(model, config={"z": TransformReparam()}),
)
def reparametrised_transform():
    m = latent("m")
    affine = dist.transforms.AffineTransform(m, 2.0)
    data("x", pyro.sample("z", dist.TransformedDistribution(N(0.0, 1.0), [affine])))


class _BayesianNetwork(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](1, 1).double()
        self.layer.weight = PyroSample(lambda self: N(torch.zeros(1, 1), 1.0).to_event(2))
        self.layer.bias = PyroSample(lambda self: N(self.weight[0], 1.0).to_event(1))
        self.noise = PyroSample(lambda self: dist.HalfNormal(torch.ones(())))

    def forward(self, w, x=None):
        loc = self.layer(w).squeeze(-1)
        with pyro.plate("data", len(w)):
            return pyro.sample("x", N(loc, self.noise), obs=x)


def _network_model(w, x=None):
    return _BayesianNetwork()(w, x)


probe(
    "layer.weight: ; layer.bias: layer.weight; noise: ; w: ; x: layer.weight layer.bias noise w",
    torch.ones(5, 1),
    torch.zeros(5),
    inputs=("w",),
    plates={"w": ("data",), "x": ("data",)},
)(_network_model)


@probe("z: ; x: z")
def learnt_parameters():
    """A parameter initialised from a sample is on its own afterwards."""
    z = latent("z")
    scale = pyro.param("learnt_parameters.scale", z.abs() + 1.0, constraint=dist.constraints.positive)
    other = pyro.param("learnt_parameters.loc", lambda: torch.tensor(0.0))
    data("x", z, scale=scale + other**2)


@probe("c: ; x: c", sizes={"x": 2})
def conditional_flow_likelihood():
    c = pyro.sample("c", N(torch.zeros(1), 1.0).to_event(1))
    base = N(torch.zeros(2), 1.0).to_event(1)
    flow = dist.ConditionalTransformedDistribution(base, [_FLOW]).condition(c)
    pyro.sample("x", flow, obs=torch.full((2,), 0.3))


@probe("c: ; z: c; x: z", sizes={"z": 2})
def conditional_flow_prior():
    c = pyro.sample("c", N(torch.zeros(1), 1.0).to_event(1))
    base = N(torch.zeros(2), 1.0).to_event(1)
    z = pyro.sample("z", dist.ConditionalTransformedDistribution(base, [_SPLINE]).condition(c))
    data("x", z[0])


@probe("c: ; z: c; x: z", sizes={"z": 2})
def flow_without_inverse():
    """The inverse is only known for the value just drawn."""
    c = latent("c")
    base = N(c * torch.ones(2), 1.0).to_event(1)
    z = pyro.sample("z", dist.TransformedDistribution(base, [_PLANAR]))
    data("x", z[0])


@probe("p: ; x: p", torch.zeros(4, dtype=torch.long), sizes={"x": 4})
def hidden_markov_distribution(x):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(2)))
    transition = torch.stack([p, p.flip(0)]).log()
    hmm = dist.DiscreteHMM(p.log(), transition, dist.Categorical(torch.eye(2) + 0.1), duration=4)
    pyro.sample("x", hmm, obs=x)


# Arguments


@probe(
    "a: ; w: ; x: a w",
    torch.ones(4),
    torch.zeros(4),
    inputs=("w",),
    plates={"w": ("data",), "x": ("data",)},
)
def covariate(w, x):
    a = latent("a")
    with pyro.plate("data", 4):
        data("x", a * w, value=x)


@probe(
    "a: ; w: ; x: a w",
    torch.ones(4, 3),
    torch.zeros(4),
    inputs=("w",),
    plates={"w": ("data",)},
    sizes={"w": 3, "a": 3},
)
def covariate_vector(w, x):
    a = pyro.sample("a", N(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 4):
        data("x", w @ a, value=x)


@probe(
    "z: ; batch[0]: ; batch[1]['s']: ; x: z batch[0] batch[1]['s']",
    (torch.ones(()), {"s": torch.ones(3), "x": torch.zeros(3), "n": 3}),
    inputs=("batch[0]", "batch[1]['s']"),
    plates={"batch[1]['s']": ("data",), "batch[0]": ()},
)
def nested_arguments(batch):
    z = latent("z") * batch[0]
    with pyro.plate("data", batch[1]["n"]):
        data("x", z, scale=batch[1]["s"], value=batch[1]["x"])


@probe("z: ; z_: ; x: z z_", torch.ones(()), inputs=("z_",))
def name_taken_by_a_site(z):
    data("x", latent("z") * z)


@probe("z: ; x: z", torch.zeros(3), observed=("x",))
def observed_argument_scaled(x):
    """The observed value is computed from the argument: data, no edge."""
    z = latent("z")
    with pyro.plate("data", 3):
        pyro.sample("x", N(z, 1.0), obs=torch.log1p(x))


@probe("z: ; x0: z; x1: z; x2: z", torch.zeros(4, 3), observed=("x0", "x1", "x2"), plates={"x0": ("data",)})
def observed_columns(x):
    z = latent("z")
    with pyro.plate("data", 4):
        for j in range(3):
            data(f"x{j}", z, value=x[:, j])


@probe("z: ; x: z", 3, kwargs={"flag": True, "shape": torch.Size([2])}, sizes={"x": 2})
def python_arguments(n, *, flag, shape):
    z = latent("z")
    if flag and n > 2:
        pyro.sample("x", N(z, 1.0).expand(shape).to_event(1), obs=torch.zeros(2))


@probe("z: ; w: ; x: z w", torch.tensor(2.0), kwargs={"w": torch.ones(())}, inputs=("w",))
def collected_arguments(*args, **kwargs):
    data("x", latent("z") * kwargs["w"], value=args[0])


@probe("z: ; n: ; x: z n", torch.tensor(2.0), inputs=("n",))
def scalar_argument_as_a_number(n):
    """float() of a one-element argument: an input of what comes after."""
    z = latent("z")
    data("x", z * float(n))


@probe("z: ; x: z", torch.tensor([2, 3, 1]), sizes={"x": 3})
def sizes_from_an_argument(lengths):
    """A number read from a larger argument is a size, no input; it is noted."""
    z = latent("z")
    n = int(lengths.max())
    pyro.sample("x", N(z, 1.0).expand([n]).to_event(1), obs=torch.zeros(n))


# Values that leave the tensors


@probe("z: ; b: ; x: z", refused=r"z\.item\(\).*site 'z'.*'x'.*leave out \.item")
def by_item():
    z, _ = latent("z"), latent("b")
    data("x", z.item())


@probe("z: ; x: z", refused=r"float\(z\).*site 'z'.*'x'.*leave out float")
def by_float():
    z = latent("z")
    data("x", float(z))


@probe("z: ; x: z", refused=r"site 'z'.*\(float\).*'x'")
def by_math():
    z = latent("z")
    data("x", math.exp(z))


@probe("k: ; x: k", refused=r"site 'k'.*\(int\).*'x'.*leave out int")
def by_int():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    data("x", [0.0, 1.0, 2.0][int(k)])


@probe("k: ; x: k", refused=r"site 'k'.*\(index\).*'x'.*torch\.stack")
def by_list_index():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    data("x", [0.0, 1.0, 2.0][k])


@probe("k: ; x: k", refused=r"site 'k'.*\(index\).*'x'.*range")
def by_range():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    total = torch.zeros(())
    for _ in range(k):
        total = total + 1.0
    data("x", total)


@probe("z: ; x: z", refused=r"site 'z'.*\(bool\).*'x'.*torch\.where")
def by_condition():
    z = latent("z")
    loc = 1.0 if z > 0 else -1.0
    data("x", loc)


@probe("z: ; x: z", refused=r"site 'z'.*\(numpy\).*'x'.*NumPy")
def by_numpy():
    z = latent("z")
    data("x", torch.from_numpy(np.tanh(z.reshape(1).numpy()))[0])


@probe("z: ; x: z", refused=r"site 'z'.*\(array\).*'x'.*NumPy")
def by_array():
    z = latent("z")
    data("x", torch.as_tensor(np.asarray(z) * 2.0))


@probe("z: ; x: z", refused=r"site 'z'.*\(tolist\).*'x'.*\.tolist")
def by_list():
    z = latent("z") * torch.ones(2)
    data("x", sum(z.tolist()))


@probe("z: ; x: z", refused=r"site 'z'.*\(equal\).*'x'")
def by_comparison():
    z = latent("z")
    data("x", 1.0 if torch.equal(z, torch.zeros(())) else 0.0)


@probe("z: ; x: z", refused=r"site 'z'.*\((shape|len|size)\).*'x'")
def by_size():
    z = latent("z") * torch.arange(3.0)
    data("x", float((z > 0).nonzero().shape[0]))


@probe("z: ; x: z", refused=r"site 'z'.*\(data_ptr\).*'x'")
def by_pointer():
    z = latent("z")
    data("x", ctypes.c_double.from_address(z.data_ptr()).value)


@probe("z: ; x0: z; x1: z x0", torch.zeros(2), observed=("x0", "x1"), refused=r"site 'x0'.*\(float\).*'x1'")
def observed_value_as_a_number(x):
    z = latent("z")
    data("x0", z, value=x[0])
    data("x1", z + float(x[0]), value=x[1])


@probe("k: ; x0: k; x1: k", refused=r"site 'k'.*\(int\).*'x0', 'x1'", observed=("x0", "x1"))
def number_of_sites():
    k = pyro.sample("k", dist.Poisson(2.0))
    for i in range(int(k.clamp(2, 2))):
        data(f"x{i}", 0.0)


@probe("z: ; x: z")
def harmless_reading():
    """Reading a value after the last site, or printing it, hides nothing."""
    z = latent("z")
    data("x", z)
    return float(z), f"{z}", operator.index(torch.tensor(3))


@probe("z: ; x: ", refused=r"At site 'z', dimension -1.*in no plate.*to_event")
def undeclared_dimension():
    pyro.sample("z", N(torch.zeros(3), 1.0))
    data("x", 0.0)
