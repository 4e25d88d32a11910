"""Calls of a guide as one captured function, for training by Pyro's ELBOs.

In a step of ``SVI`` most of a guide's time goes to Python and to the nodes that autograd makes of its operations. From
the call on that has come :attr:`CapturedCalls.after` times, with arguments of the same shapes, all that the guide
computes before its sample statements runs as one function (:mod:`~pyro_graphflows.captured_gradients`): from
parameters, data and noise to the draw of each site and its log-density, with the gradients of both. The noise is drawn
as the programs draw it, so that a run has the same random numbers either way.

*Who is served.* A draw of a captured call counts as a function of the parameters alone: derivatives of its log-density
by the draw itself are not there. So calls are captured only where Pyro's own :class:`~pyro.infer.Trace_ELBO` or
:class:`~pyro.infer.RenyiELBO` runs the guide itself, which ask for nothing else; within handlers that leave draws as
they are; and where the arguments are known to say all of a call (:class:`~pyro_graphflows.guides.call.CallReader`). All
other calls are run by the programs.

*What is checked.* Python values are fixed when a call is captured. Captured calls 1, 2, 4, 8, ... are compared with the
programs at the same noise, values, log-densities and gradients; where they differ, no call is captured any more. Where
something is not finite, the programs run at the same noise, with all their errors.
"""

import logging
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.kl import kl_divergence, register_kl

from pyro_graphflows.capture import (
    CAPTURING,
    Draws,
    Noise,
    NotCapturedError,
    is_compared,
    unchecked,
    uncovered,
)
from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.call import Call
from pyro_graphflows.inspect import kept_random_state

__all__ = ["CapturedCalls", "CapturedDistribution"]

logger = logging.getLogger(__name__)

AFTER = 50  # calls of a kind, in which the programs take as long as capturing does
MOST_CAPTURED = 4  # kinds of calls
MOST_COUNTED = 32
MOST_REBUILT = 3  # captured calls for which the programs had to be run as well, beside one in ten

_HARMLESS = {TraceMessenger, BlockMessenger, ScaleMessenger}
_SERVED = {Trace_ELBO, RenyiELBO}
_BY_ELBO = get_importance_trace.__code__

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Run = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class _Site:
    """A latent site as it was in the call that was captured.

    Attributes:
        name: Its name.
        plates: The plates around it, in the order in which they are entered.
        fn: Its distribution then.
        follows: Whether gradients of ELBOs go along the path of its draw.
    """

    name: str
    plates: tuple[str, ...]
    fn: Any
    follows: bool


@dataclass
class _Kind:
    """Calls that differ in the values of tensors only.

    Attributes:
        parameters: The parameters of the guide that are learned.
        buffers: Its buffers, which keep their values.
        calls: How many there were.
        function: What runs them; None for the programs.
        call: The call that was captured.
        sites: Its latent sites.
        taken: The random numbers that it takes, in order.
        captured: How many calls were captured.
        rebuilt: For how many of them the programs were run as well, comparisons aside.
        is_settled: Whether nothing else is to be tried.
    """

    parameters: list[Tensor]
    buffers: list[Tensor]
    calls: int = 0
    function: Any = None
    call: Call | None = None
    sites: tuple[_Site, ...] = ()
    taken: list[tuple[Noise, torch.Size]] = field(default_factory=list)
    captured: int = 0
    rebuilt: int = 0
    is_settled: bool = False

    def draw(self) -> dict[Noise, Tensor]:
        """Return fresh noise: the numbers that the programs would draw now."""
        parts: dict[Noise, list[Tensor]] = {}
        for noise, shape in self.taken:
            parts.setdefault(noise, []).append(noise.draw(shape).view(-1))
        return {noise: each[0] if len(each) == 1 else torch.cat(each) for noise, each in parts.items()}


class CapturedCalls:
    """The calls of one guide, counted by their kinds, and captured where they come often.

    Copies and pickles have captured nothing.

    Attributes:
        after: After how many calls of a kind these are captured; None for never.
        report: What is captured; else, why not.
    """

    def __init__(self, after: int | None = AFTER) -> None:
        self.after = after
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"after": self.after}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.after = state["after"]
        self.forget()

    def forget(self) -> None:
        """Take the guide as another one: its parameters are other objects, or elsewhere."""
        self.report = "not captured: no kind of call has come often enough"
        self._kinds: dict[Hashable, _Kind] = {}
        self._earlier: dict[str, int] = {}
        self._places: tuple[list[tuple[dict[str, Any], str]], ...] | None = None
        self._state: tuple[Any, ...] = ()
        self._modules: list[nn.Module] = []
        self._is_given_up = False

    @property
    def counts(self) -> dict[str, int]:
        """How many calls of each kind there were."""
        return self._earlier | {repr(key): kind.calls for key, kind in self._kinds.items()}

    @counts.setter
    def counts(self, counts: Mapping[str, int]) -> None:
        self._kinds, self._earlier = {}, dict(counts)

    def kind_of(self, blocks: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Kind | None:
        """Count a call; return its kind if it may be captured, or is.

        Args:
            blocks: What has the parameters.
            args: Positional arguments of the model.
            kwargs: Its keyword arguments.
        """
        if self.after is None or self._is_given_up or not torch.is_grad_enabled() or CAPTURING.get():
            return None
        if (
            not all(type(handler) in _HARMLESS for handler in _PYRO_STACK)
            or not _is_served()
            or _is_watched()
        ):
            return None
        key = _key((*args, *kwargs.values()))
        if key is None:
            return None
        parameters, buffers = self._tensors(blocks)
        state = (
            *[id(p) for p in parameters],
            *[p.dtype for p in parameters],
            *[id(b) for b in buffers],
            *[b._version for b in buffers],
        )
        if state != self._state:  # other tensors, or other values of those that count as fixed
            self._state, self._kinds = state, {}
        learned = [p.requires_grad for p in parameters]
        whole = (*kwargs, key, *learned, *[module.training for module in self._modules])
        kind = self._kinds.get(whole)
        if kind is None:
            if len(self._kinds) >= MOST_COUNTED:
                self._kinds = {each: kind for each, kind in self._kinds.items() if kind.function is not None}
            earlier = self._earlier.pop(repr(whole), 0) if self._earlier else 0
            kind = _Kind([p for p in parameters if p.requires_grad], buffers, earlier)
            self._kinds[whole] = kind
        kind.calls += 1
        return kind if kind.function is not None or self._is_due(kind) else None

    def _is_due(self, kind: _Kind) -> bool:
        """Whether a kind is to be captured now."""
        if kind.is_settled or self.after is None or kind.calls <= self.after:
            return False
        return sum(each.function is not None for each in self._kinds.values()) < MOST_CAPTURED

    def _tensors(self, blocks: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters and the buffers as they are now."""
        if self._places is None:
            modules = list(blocks.modules())
            self._places = tuple(
                [(each, key) for each in kept for key, value in each.items() if value is not None]
                for kept in ([m._parameters for m in modules], [m._buffers for m in modules])
            )
            self._modules = modules
        parameters, buffers = self._places
        return [kept[key] for kept, key in parameters], [kept[key] for kept, key in buffers]

    # ------------------------------------------------------------------------------------------------- capturing
    def capture(self, kind: _Kind, run: Run, call: Call | None, args: Sequence[Any]) -> bool:
        """Capture the calls of a kind; return whether that is possible.

        Args:
            kind: The kind.
            run: Runs the programs.
            call: The call; None where its arguments do not say all of it.
            args: All arguments.
        """
        kind.is_settled = True
        try:
            if call is None or call.given:
                raise NotCapturedError("the arguments of the call do not say all of it")
            with kept_random_state():
                self._capture(kind, _Programs(kind, run), _data(args))
        except NotCapturedError as error:
            reason = str(error).split("\nTrace Shapes")[0]  # which Pyro adds to errors in a run
            self._say(f"not captured: {reason}")
            return False
        kind.call = call
        self._say(f"captured: {kind.function.num_operations} operations")
        return True

    def _capture(self, kind: _Kind, programs: "_Programs", data: list[Tensor]) -> None:
        from pyro_graphflows.captured_gradients import capture_with_gradients  # few guides train that long

        with uncovered(), Draws() as draws:
            programs.results()
        kind.sites, kind.taken = programs.sites, draws.taken
        # distributions look at this when they are made, in gradients too
        with pyro.validation_enabled(False):
            kind.function = capture_with_gradients(
                programs.results, kind.parameters, data, draws.counts, fixed=kind.buffers
            )

    def give_up(self, kind: _Kind, reason: str) -> None:
        """Capture no calls of a kind any more."""
        kind.function, kind.is_settled = None, True
        self._say(f"not captured: {reason}")

    def _say(self, report: str) -> None:
        self.report = report
        logger.info("Calls of the guide are %s", report)

    # --------------------------------------------------------------------------------------------- a captured call
    def run(
        self, kind: _Kind, run: Run, plates: Mapping[str, pyro.plate], args: Sequence[Any]
    ) -> dict[str, Tensor]:
        """Emit every latent site of a call of a kind that is captured, and return the values.

        Args:
            kind: The kind.
            run: Runs the programs.
            plates: The plates of the call.
            args: All arguments.
        """
        noise, data = kind.draw(), _data(args)
        programs = _Programs(kind, run, data, noise)
        *results, total = kind.function(kind.parameters, [*data, *noise.values()], programs.again)
        kind.captured += 1
        if not total.isfinite().item():  # the programs say what is wrong, or have a wider reach
            with Draws(noise):
                return self._resume(run, plates, {})
        if is_compared(kind.captured):
            why = programs.difference(results)
            if why is not None:
                self._is_given_up = True
                self.give_up(kind, f"in call {kind.captured} {why}")
                with Draws(noise):
                    return self._resume(run, plates, {})
        elif kind.rebuilt > MOST_REBUILT + kind.captured // 10:
            self.give_up(kind, "what asks for the draws asks for more than their log-densities")
        values: dict[str, Tensor] = {}
        found = iter(results)
        entered: tuple[str, ...] = ()
        stack = ExitStack()
        with ExitStack() as outer:
            for site in kind.sites:
                value, log_prob = next(found), next(found)
                entropy = next(found) if site.follows else log_prob
                if site.plates != entered:
                    stack.close()
                    entered = site.plates
                    stack = outer.enter_context(ExitStack())
                    for name in entered:
                        stack.enter_context(plates[name])
                fn = CapturedDistribution(site, programs, value, log_prob, entropy)
                values[site.name] = pyro.sample(site.name, fn)
                if values[site.name] is not value:
                    break
            else:
                return values
        kind.rebuilt += 1
        return self._resume(run, plates, values)

    @staticmethod
    def _resume(run: Run, plates: Mapping[str, pyro.plate], values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the programs where some sites have been emitted, and the plates."""
        indices: dict[str, Any] = {name: plate._indices for name, plate in plates.items()}
        with _Emitted({**indices, **values}):
            return run()


class _Emitted(Messenger):
    """Gives sites that have been emitted their values, unseen by other handlers."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"], msg["stop"] = self.values[msg["name"]], True, True


class _Programs:
    """The programs of one call, which can be run once more at the same noise.

    Args:
        kind: The kind of the call.
        run: Runs them.
        data: The tensors among the arguments.
        noise: The random numbers; None for fresh ones.

    Attributes:
        sites: After a run, the latent sites.
    """

    def __init__(
        self,
        kind: _Kind,
        run: Run,
        data: Sequence[Tensor] = (),
        noise: Mapping[Noise, Tensor] | None = None,
    ) -> None:
        self.kind, self.run, self.noise = kind, run, noise
        self.sites: tuple[_Site, ...] = ()
        self._watched = [*kind.parameters, *data]
        self._versions = [tensor._version for tensor in self._watched]
        self._rebuilt: dict[str, Any] | None = None

    def results(self) -> list[Any]:
        """Run the programs; return what :func:`~pyro_graphflows.captured_gradients.capture_with_gradients` needs."""
        from pyro_graphflows.captured_gradients import Result

        results, sites, found = [], [], []
        with unchecked() as checked, poutine.block(), pyro.validation_enabled(False), torch.enable_grad():
            nodes: Any = poutine.trace(self.run).get_trace().nodes
            for name, site in nodes.items():
                if site["type"] != "sample" or site_is_subsample(site):
                    continue
                fn, value = site["fn"], site["value"]
                _require_plain(name, site)
                parts = fn.score_parts(value)
                follows = parts.entropy_term is not parts.log_prob
                results += [Result(value), Result(parts.log_prob, followed=not follows)]
                results += [Result(parts.entropy_term, equal=parts.log_prob)] if follows else []
                found.append(parts.log_prob)
                frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
                sites.append(_Site(name, tuple(frame.name for frame in frames), fn, follows))
            total = torch.cat([each.detach().reshape(-1) for each in (*found, *checked)]).sum()
        self.sites = tuple(sites)
        return [*results, Result(total, followed=False)]

    def again(self) -> list[Tensor]:
        """Return the results of a run at the same noise, with all gradients."""
        self.kind.rebuilt += 1
        return [result.tensor for result in self._once_more()]

    def rebuilt(self, name: str) -> Any:
        """Return the distribution of a site as the programs make it."""
        if self._rebuilt is None:
            self.kind.rebuilt += 1
            self._once_more()
            self._rebuilt = {site.name: site.fn for site in self.sites}
        return self._rebuilt[name]

    def _once_more(self) -> list[Any]:
        if [tensor._version for tensor in self._watched] != self._versions:
            raise GraphflowsError(
                "Expected the guide's parameters and data as they were in the call; they have changed since, and a "
                "distribution of that call is asked for more than its draw. Ask before the step of the optimiser, or "
                "let no calls be captured: guide.capture_after = None."
            )
        with Draws(self.noise):
            return self.results()

    def difference(self, found: Sequence[Tensor]) -> str | None:
        """Return how captured results differ from those of the programs; None if they agree."""
        try:
            with kept_random_state(), uncovered(), Draws(self.noise) as draws:
                expected = self.results()[:-1]
        except NotCapturedError as error:
            return str(error)
        if [tensor._version for tensor in self._watched] != self._versions:
            return "the programs write to a tensor in place"
        if draws.taken != self.kind.taken:
            return "the programs draw other random numbers than when they were captured"
        if [(site.name, site.plates) for site in self.sites] != [
            (site.name, site.plates) for site in self.kind.sites
        ] or [tuple(value.shape) for value in found] != [tuple(r.tensor.shape) for r in expected]:
            return "the programs have other sites, or draws of other shapes"
        learned = self.kind.parameters
        compared = [(value, result.tensor) for value, result in zip(found, expected, strict=True)]
        for value, tensor in compared:
            if not _is_close(value, tensor):
                return "the draws or their log-densities are not those of the programs"
        followed = [pair for pair, r in zip(compared, expected, strict=True) if r.is_learned]
        weights = [torch.arange(t.numel()).to(t).cos().reshape(t.shape) for _, t in followed]
        gradients = [
            torch.autograd.grad(
                [pair[i] for pair in followed], learned, weights, retain_graph=True, allow_unused=True
            )
            for i in (0, 1)
        ]
        for one, other in zip(*gradients, strict=True):
            if (one is None) != (other is None) or (one is not None and not _is_close(one, other)):
                return "the gradients are not those of the programs"
        return None


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by rounding, beside the largest of their elements."""
    rounding = torch.finfo(expected.dtype).eps ** 0.4
    size = expected.detach().abs().max().item() if expected.numel() else 0.0
    distance = (found - expected).detach().abs().max().item() if expected.numel() else 0.0
    return distance <= rounding * (1e-6 + size)


def _require_plain(name: str, site: Mapping[str, Any]) -> None:
    """Refuse a site that is more than a draw of its distribution.

    Raises:
        NotCapturedError: If it is.
    """
    fn = site["fn"]
    if not fn.has_rsample:
        raise NotCapturedError(f"{name!r} has no reparametrised draws")
    if site["mask"] is not None or torch.is_tensor(site["scale"]) or site["scale"] != 1.0:
        raise NotCapturedError(f"{name!r} has a mask or a scale")
    if site["is_observed"] or site["infer"].get("enumerate") or site["infer"].get("is_copied"):
        raise NotCapturedError(f"{name!r} is not drawn, or summed over")


def _key(arguments: Sequence[Any]) -> Hashable | None:
    """Return a key of the arguments but for the values of tensors; None if these could say more."""
    parts: list[Hashable] = []
    for value in arguments:
        if type(value) is Tensor and not value.requires_grad:
            parts.append((value.shape, value.stride(), value.dtype, value.device))
        elif value is None or isinstance(value, bool | int | float | str):
            parts.append((type(value), value))
        else:
            return None
    return tuple(parts)


def _data(arguments: Sequence[Any]) -> list[Tensor]:
    return [value for value in arguments if torch.is_tensor(value)]


def _is_served() -> bool:
    """Whether one of Pyro's ELBOs, and no program of a user's, gets the trace of this call."""
    frame = sys._getframe(3)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("pyro.", "torch.")):
        if frame.f_code is _BY_ELBO and frame.f_back is not None:
            return type(frame.f_back.f_locals.get("self")) in _SERVED
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_watched() -> bool:
    """Whether modes of torch are active that see, or change, single operations."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_any_autocast_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


# ------------------------------------------------------------------------------------------- what a trace has
class CapturedDistribution(dist.TorchDistribution):
    """A distribution whose draw, and the log-density of this draw, are there already.

    Whatever else is asked for is answered by the distribution that the programs make, run once more at the same noise.

    Args:
        site: The site.
        programs: The programs of the call.
        draw: The draw.
        log_prob: Its log-density.
        entropy: The same with the gradients of ELBOs.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self, site: _Site, programs: _Programs, draw: Tensor, log_prob: Tensor, entropy: Tensor
    ) -> None:
        self._site, self._programs = site, programs
        self._draw, self._log_prob, self._entropy = draw, log_prob, entropy
        self._is_drawn = False
        self._batch_shape, self._event_shape = site.fn.batch_shape, site.fn.event_shape
        self._validate_args = False

    def true(self) -> Any:
        """Return the distribution as the programs make it."""
        return self._programs.rebuilt(self._site.name)

    @property
    def support(self) -> Any:
        """The support of the site."""
        return self._site.fn.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Return the same distribution at a larger batch shape."""
        if torch.Size(batch_shape) == self._batch_shape:
            return self
        return self.true().expand(batch_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return the draw, the first time; other draws later."""
        if self._is_drawn or len(sample_shape):
            fresh: Tensor = self.true().rsample(sample_shape)
            return fresh
        self._is_drawn = True
        return self._draw

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values, shape ``batch_shape``."""
        if value is self._draw:
            return self._log_prob
        log_prob: Tensor = self.true().log_prob(value)
        return log_prob

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Return the parts of gradients of ELBOs."""
        if x is not self._draw:
            parts: ScoreParts = self.true().score_parts(x)
            return parts
        no_score_function: Any = 0
        return ScoreParts(self._log_prob, no_score_function, self._entropy)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_programs" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.true(), name)

    def __reduce__(self) -> Any:
        return _itself, (self.true(),)


def _itself(value: Any) -> Any:
    return value


def _of_true(name: str) -> Any:
    return property(lambda self: getattr(self.true(), name))


for _name in ("sample", "mean", "mode", "variance", "stddev", "entropy", "cdf", "icdf", "perplexity"):
    setattr(CapturedDistribution, _name, _of_true(_name))
for _name in ("enumerate_support", "has_enumerate_support", "to_event", "mask", "conjugate_update"):
    setattr(CapturedDistribution, _name, _of_true(_name))


@register_kl(CapturedDistribution, torch.distributions.Distribution)
@register_kl(CapturedDistribution, dist.MaskedDistribution)
def _kl_captured(p: Any, q: Any) -> Tensor:
    return kl_divergence(p.true(), q)
