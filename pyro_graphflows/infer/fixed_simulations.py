r"""Learning from a fixed set of simulations, where simulating is dear or was done before.

:class:`~pyro_graphflows.infer.InferenceCompilation` draws new joint samples :math:`(z, x)` for each step; here
there are ``n`` of them, and the guide minimises their mean of :math:`-\log q(z \mid x)` as neural posterior
estimation does. The density of neither prior nor simulator is needed. What is learned by heart from few simulations
does not hold for others, so a part of them is kept apart: it says when to stop, and which state to keep. States are
running averages of the parameters over about five epochs (:mod:`~pyro_graphflows.infer.averaging`), which overfit less.

References:
    [1] Papamakarios and Murray (2016), Fast epsilon-free inference of simulation models with Bayesian conditional
    density estimation, NeurIPS.
    [2] Lueckmann et al. (2021), Benchmarking simulation-based inference, AISTATS.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, GraphflowsWarning, UnsupportedModelError
from pyro_graphflows.infer.batches import TrainingData
from pyro_graphflows.infer.inference_compilation import InferenceCompilation
from pyro_graphflows.infer.particles import (
    Program,
    density_sites,
    keep_dims,
    particle_plate,
    plates_of,
)
from pyro_graphflows.infer.schedule import Schedule
from pyro_graphflows.infer.simulations import JointLayout, joint_layout, run_guide

__all__ = ["SimulationLoss", "Simulations"]

RUN_SIZE = 1000  # simulations in one run of a model
FEWEST = 10  # simulations that can be divided into some to learn from and some to judge by
_MOST_IN_BATCH, _FEWEST_IN_BATCH = 100, 20
_STEPS_PER_EPOCH = 16  # at least: when to stop is decided by epochs, and few steps make no progress in one


@dataclass(frozen=True, eq=False)
class Simulations:
    r"""A fixed set of joint samples of a model, and how a guide learns from them; for ``fit(..., simulations=)``.

    ``fit(model, guide, simulations=10_000)`` is short for ``simulations=Simulations(10_000)``, and so are the other
    kinds of values.

    Args:
        values: A number: so many joint samples of the model are drawn, once. Or a dict from site to a tensor (or NumPy
            array) of values, one simulation in each row: of all latent sites that the guide samples and of all observed
            ones. Or a ``DataLoader``, or another iterable that can be walked through again and again, of such dicts,
            whose batches and order are its own.
        held_out: The share of the simulations that is never trained on and decides when to stop and which state to
            keep; or simulations of the kind of ``values`` for that. Of a loader no share can be taken: give another
            loader or a dict, or the training loss decides.
        batch_size: The number of simulations per step; a loader has its own. By default 100, of fewer than 1,600 to
            train on a sixteenth of them, and at least 20.
        not_finite: What to do with simulations that have NaN or infinite values: ``"raise"``, or ``"drop"`` those,
            with a warning that counts them. Where a simulator fails depends on the latents: without its failures one
            learns the posterior given that the simulation succeeds.
        observed: The sites whose values the guide is given, where the model's call does not say
            (:mod:`~pyro_graphflows.infer.simulations`).
        vectorize: Whether the model is run for many simulations at once, in a plate on the left of all others; if not,
            one by one.

    Raises:
        GraphflowsError: If an option is out of range, or has no effect.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_graphflows.infer import fit
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0))
        >>> def guide(observations=None):
        ...     slope = pyro.param("slope", torch.tensor(0.0))
        ...     pyro.sample("z", dist.Normal(slope * observations["x"], 0.5**0.5))
        >>> history = fit(model, guide, simulations=2000, optimizer=0.05, progress=False)
        >>> abs(pyro.param("slope").item() - 0.5) < 0.1
        True
    """

    values: Any
    held_out: Any = field(default=0.1, kw_only=True)
    batch_size: int | None = field(default=None, kw_only=True)
    not_finite: str = field(default="raise", kw_only=True)
    observed: Iterable[str] | None = field(default=None, kw_only=True)
    vectorize: bool = field(default=True, kw_only=True)

    SCHEDULE: ClassVar[Schedule] = Schedule(patience=10, lr_factor=0.3, min_lr=5e-5, averaged_epochs=5.0)
    _KINDS: ClassVar[str] = (
        "a number of simulations, a dict from site to tensor, or a DataLoader of such dicts"
    )

    def __post_init__(self) -> None:
        values = self.values
        if isinstance(values, bool) or not isinstance(values, int | Mapping | Iterable):
            raise GraphflowsError(f"Expected simulations to be {self._KINDS}; got {type(values).__name__}.")
        if isinstance(values, int) and values < FEWEST:
            raise GraphflowsError(
                f"Expected at least {FEWEST} simulations, some to learn from and some to judge by; got {values}."
            )
        if isinstance(values, Tensor | np.ndarray | str | Iterator | tuple):
            raise GraphflowsError(
                f"Expected simulations to be {self._KINDS}; got {type(values).__name__}. Name the sites: "
                "simulations={'theta': theta, 'x': x}."
            )
        if self.batch_size is not None and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise GraphflowsError(f"Expected a positive batch_size; got {self.batch_size!r}.")
        if self.batch_size is not None and self.has_own_batches:
            raise GraphflowsError(
                f"Expected no batch_size with {type(values).__name__}, whose batches are its own; got "
                f"{self.batch_size}."
            )
        if self.not_finite not in ("raise", "drop"):
            raise GraphflowsError(f"Expected not_finite='raise' or 'drop'; got {self.not_finite!r}.")
        if isinstance(self.held_out, int | float) and not 0.0 < self.held_out < 1.0:
            raise GraphflowsError(
                f"Expected held_out to be a share between 0 and 1, or simulations; got {self.held_out!r}."
            )
        if self.observed is not None:
            object.__setattr__(self, "observed", tuple(self.observed))

    @classmethod
    def of(cls, simulations: Any) -> "Simulations":
        """Return ``simulations`` as an object of this class, unless it is one."""
        return simulations if isinstance(simulations, cls) else cls(simulations)

    @property
    def has_own_batches(self) -> bool:
        """Whether the simulations come in batches of their own."""
        return not isinstance(self.values, int | Mapping)

    def prepare(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any = None
    ) -> tuple["SimulationLoss", TrainingData]:
        """Return the loss on the simulations, and them as data: some to train on and some held out.

        A number of simulations is drawn here, and the share that is held out as well, with the global generators.

        Args:
            model: The model.
            guide: The guide.
            args: Positional arguments of both, which tell shapes.
            kwargs: Their keyword arguments.
            loss: The loss that was asked for beside, which must be none.

        Raises:
            GraphflowsError: If values are missing, of a wrong shape, too few, or not finite; if there is another loss.
            UnsupportedModelError: If samples of the unconditioned model are not samples of its joint density, or the
                guide has sites that the model lacks.

        Warns:
            GraphflowsWarning: If simulations are dropped.
        """
        if loss is not None and not (isinstance(loss, str) and loss == "auto"):
            raise GraphflowsError(
                f"Expected no loss with simulations, from which the guide learns by its log-density; got {loss!r}."
            )
        loss = SimulationLoss(model, guide, args, kwargs, observed=self.observed)
        values = loss.draw(self.values, self.vectorize) if isinstance(self.values, int) else self.values
        held_out = self.held_out
        if self.has_own_batches:
            apart = None if isinstance(held_out, float) else self._checked(loss, held_out, "held_out")
            return loss, TrainingData(self._checked(loss, values, "simulations"), validation=apart)
        train = self._checked(loss, values, "simulations")
        if isinstance(held_out, float):
            train, apart = _divided(train, held_out)
        else:
            apart = self._checked(loss, held_out, "held_out")
        number = len(next(iter(train.values())))
        if self.batch_size is not None and number < self.batch_size:
            raise GraphflowsError(
                f"Expected at least as many simulations to train on as a batch has, {self.batch_size}; got {number} "
                "beside those that are held out. Give more simulations, or a smaller batch_size."
            )
        own = min(_MOST_IN_BATCH, max(_FEWEST_IN_BATCH, number // _STEPS_PER_EPOCH), number)
        return loss, TrainingData(train, batch_size=self.batch_size or own, validation=apart)

    def _checked(self, loss: "SimulationLoss", values: Any, what: str) -> Any:
        if not isinstance(values, Mapping):
            return _CheckedBatches(self, loss, values, what)
        return self._finite(loss.checked(values, what), what)

    def _finite(self, values: dict[str, Tensor], what: str) -> dict[str, Tensor]:
        """Drop, or refuse, simulations that are not finite."""
        number = len(next(iter(values.values())))
        good = torch.ones(number, dtype=torch.bool)
        guilty = []
        for name, value in values.items():
            finite = torch.isfinite(value).reshape(number, -1).all(1).cpu()
            guilty += [] if bool(finite.all()) else [f"{name} ({int((~finite).sum())})"]
            good &= finite
        if not guilty:
            return values
        lost = number - int(good.sum())
        if self.not_finite == "raise":
            raise GraphflowsError(
                f"Expected finite {what}; {lost} of {number} have NaN or infinite values, at {', '.join(guilty)}. "
                "Simulations(..., not_finite='drop') learns from the others, which is the posterior given that a "
                "simulation succeeds."
            )
        warnings.warn(
            f"{lost} of {number} {what} have NaN or infinite values, at {', '.join(guilty)}, and are dropped: what is "
            "learned is the posterior given that a simulation succeeds.",
            GraphflowsWarning,
            stacklevel=2,
        )
        return {name: value[good.to(value.device)] for name, value in values.items()}


def _divided(values: dict[str, Tensor], share: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return simulations in two parts at random, the second with a share of them."""
    number = len(next(iter(values.values())))
    if number < FEWEST:
        raise GraphflowsError(
            f"Expected at least {FEWEST} simulations that are finite, some to learn from and some to judge by; got "
            f"{number}."
        )
    apart = min(number - 1, max(1, round(share * number)))
    order = torch.randperm(number)
    first, second = order[apart:], order[:apart]
    return (
        {name: value[first.to(value.device)] for name, value in values.items()},
        {name: value[second.to(value.device)] for name, value in values.items()},
    )


class _CheckedBatches:
    """Batches of simulations, each looked at before it is used."""

    def __init__(self, simulations: Simulations, loss: "SimulationLoss", batches: Any, what: str) -> None:
        self.simulations, self.loss, self.batches, self.what = simulations, loss, batches, what

    def __len__(self) -> int:
        return len(self.batches) if isinstance(self.batches, Sized) else 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            if not isinstance(batch, Mapping):
                raise GraphflowsError(
                    f"Expected batches of {self.what} to be dicts from site to tensor; got {type(batch).__name__}."
                )
            values = self.simulations._finite(self.loss.checked(batch, self.what), self.what)
            if len(next(iter(values.values()))):
                yield values


class SimulationLoss(InferenceCompilation):
    r"""The mean of :math:`-\log q(z \mid x)` over joint samples that are given, in nats per joint sample.

    Called with a batch of them as keyword arguments, ``{site: tensor}``; the arguments of model and guide are those it
    was made with.

    Args:
        model: The model.
        guide: The guide, which takes ``observations=``.
        args: Positional arguments of both, which tell shapes.
        kwargs: Their keyword arguments.
        observed: The observed sites, where the call does not say.

    Raises:
        UnsupportedModelError: As :class:`~pyro_graphflows.infer.InferenceCompilation`.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        observed: Iterable[str] | None = None,
    ) -> None:
        super().__init__(model, guide, observed=observed)
        self.arguments = args, kwargs
        self.layout: JointLayout = joint_layout(model, guide, args, kwargs, self.observed)

    @property
    def names(self) -> tuple[str, ...]:
        """The sites whose values a simulation has: latent sites of the guide, and observed ones."""
        return (*self.layout.sampled, *self.layout.observed)

    def draw(self, number: int, vectorize: bool) -> dict[str, Tensor]:
        """Return joint samples of the model, one in each row.

        Args:
            number: How many.
            vectorize: Whether to run the model for many at once.
        """
        args, kwargs = self.arguments
        layout, names = self.layout, self.names
        source = InferenceCompilation(
            *(self.model, self.guide),
            batch_size=min(number, RUN_SIZE if vectorize else 1),
            observed=layout.observed,
            max_plate_nesting=layout.max_plate_nesting,
            vectorize=vectorize,
        )
        source._layout = layout
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for start in range(0, number, source.batch_size):
            size = min(source.batch_size, number - start)
            for trace in source.sample_joint(*args, **kwargs):
                _require_full_plates(trace)
                for name in names:
                    value: Any = trace.nodes[name]["value"]
                    if vectorize:
                        value = value.expand(source.batch_size, *self._padded(name))
                    parts[name].append(value.reshape(-1, *layout.shapes[name])[:size])
        return {name: torch.cat(values) for name, values in parts.items()}

    def checked(self, values: Mapping[str, Any], what: str) -> dict[str, Tensor]:
        """Return simulations as tensors, one in each row, all of one length; refuse what does not fit.

        Args:
            values: Values by site.
            what: What they are, for messages.
        """
        missing = [name for name in self.names if name not in values]
        strange = [name for name in values if name not in self.names]
        if missing or strange:
            raise GraphflowsError(
                f"Expected {what} with values of {', '.join(self.names)}, the latent sites of the guide and the "
                f"observed sites; {', '.join(missing) or 'none'} missing, {', '.join(strange) or 'none'} too many."
            )
        found = {}
        for name in self.names:
            value = values[name]
            if isinstance(value, np.ndarray):
                value = torch.from_numpy(np.ascontiguousarray(value))
                value = value.to(torch.get_default_dtype()) if value.is_floating_point() else value
            shape = self.layout.shapes[name]
            if not isinstance(value, Tensor) or value.dim() == 0 or tuple(value.shape[1:]) != shape:
                came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise GraphflowsError(
                    f"Expected {what} of {name!r} to be a tensor of shape (number of simulations, "
                    f"{', '.join(map(str, shape))}), since one run of the model gives {shape}; got {came}."
                )
            found[name] = value
        lengths = {name: len(value) for name, value in found.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise GraphflowsError(
                f"Expected {what} with the same positive number of rows for each site; got {lengths}."
            )
        return found

    def log_probs(self, *args: Any, **kwargs: Any) -> Tensor:
        r"""Return :math:`\log q(z \mid x)` of each joint sample of a batch.

        Args:
            *args: None.
            **kwargs: Values by site, one joint sample in each row.
        """
        own_args, own_kwargs = self.arguments
        size = len(next(iter(kwargs.values())))
        trace = poutine.Trace()
        for name, value in kwargs.items():
            value = value.reshape(size, *self._padded(name))
            trace.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={}, fn=None)
        dim = -1 - self.layout.max_plate_nesting
        guide = particle_plate(self.guide, size, dim)
        guide_trace = run_guide(guide, trace, self.layout.observed, own_args, own_kwargs)
        _require_full_plates(guide_trace)
        guide_trace.compute_log_prob()
        terms = [keep_dims(site["log_prob"], (dim,)) for _, site in density_sites(guide_trace)]
        return sum(terms, torch.zeros(())).expand(size)

    def differentiable_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the sum of the losses of a batch of joint samples.

        Args:
            *args: None.
            **kwargs: Values by site, one joint sample in each row.
        """
        return self.log_probs(*args, **kwargs).sum().neg()

    def _padded(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value of a site with all dimensions of plates."""
        shape, event_dim = self.layout.shapes[name], self.layout.event_dims[name]
        missing = self.layout.max_plate_nesting - (len(shape) - event_dim)
        return (*(1,) * missing, *shape)


def _require_full_plates(trace: poutine.Trace) -> None:
    for name, site in density_sites(trace):
        for frame in plates_of(site):
            if frame.full_size is not None and frame.size != frame.full_size:
                raise UnsupportedModelError(
                    f"Expected no subsampled plates where simulations are fixed; {frame.name!r} around {name!r} has "
                    f"{frame.size} of {frame.full_size} elements, others in each run. Use InferenceCompilation, which "
                    "draws anew for each step, or a plate of just these elements."
                )
