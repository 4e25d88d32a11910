r"""Training to the end: epochs, a schedule, checkpoints, and an orderly stop whatever happens.

:func:`fit` minimises an ELBO or an :class:`InferenceCompilation` with one torch optimiser over *all*
parameters of the model and the guide, wherever they are kept (see
:class:`~pyro_graphflows.infer.parameters.ParameterSet`): Pyro's ``SVI`` would silently not train the weights
of a plain module, and an ELBO used as a module not those of ``pyro.param``. Everything is counted in nats per
datum, so that learning rates, clipping and figures mean the same for every batch size.

Beside it: :mod:`~pyro_graphflows.infer.schedule` (how long), :mod:`~pyro_graphflows.infer.history` (what is reported),
:mod:`~pyro_graphflows.infer.trainer` (one gradient step, one validation).
"""

import os
import warnings
from contextlib import nullcontext
from typing import Any

import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.automatic import Automatic, limits_of
from pyro_graphflows.infer.batches import TrainingData
from pyro_graphflows.infer.checkpoints import Checkpoint, seeded
from pyro_graphflows.infer.compiled import Mode
from pyro_graphflows.infer.epochs import Run
from pyro_graphflows.infer.fixed_simulations import Simulations
from pyro_graphflows.infer.history import History, Progress
from pyro_graphflows.infer.inference_compilation import InferenceCompilation
from pyro_graphflows.infer.objectives import Objective
from pyro_graphflows.infer.particles import Program
from pyro_graphflows.infer.schedule import Plateau, Schedule
from pyro_graphflows.infer.trainer import Trainer
from pyro_graphflows.inspect import require_pair, with_hints

__all__ = ["fit"]

_STEPS_OF_DRAWS = 100  # of an epoch, where steps draw what they learn from
_STEPS_JUDGED = 100  # whose mean loss says whether it has fallen
_RATE = 1e-3


@with_hints(
    "Rates are set by optimizer=1e-3, lengths by schedule=Schedule(num_steps=) or (num_epochs=), batches by "
    "data=TrainingData(..., batch_size=), which also has keyword arguments of the model, kwargs={name: value}."
)
def fit(
    model: Program,
    guide: Program,
    data: Any = None,
    *,
    simulations: Any = None,
    loss: Any = None,
    optimizer: Any = None,
    schedule: Schedule | int | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    progress: Progress | bool = True,
    seed: int | None = 0,
    compile: Mode = False,
) -> History:
    r"""Train a guide, and the model's own parameters, until the loss stops falling.

    Each epoch walks through the data once in random batches; under inference compilation, which simulates data anew in
    each step, as often as it takes for a hundred steps. The monitored loss is that of the validation
    data, evaluated after each epoch in evaluation mode with the same random numbers every time, or else the
    epoch's mean training loss. What it decides is said in :class:`Schedule`.

    *Left to itself* (``loss="auto"``, or neither ``loss`` nor ``schedule``): the guide first learns from simulations of
    the model, then from the data by ``Trace_ELBO``, at a rate that is found by trials and for as long as it helps, in
    cycles at whose ends the rate has fallen to nothing (:mod:`~pyro_graphflows.infer.cycles`). At the end the gap to
    the log-evidence is estimated by importance weights, and shown; it is ``history.gap``. Where a model cannot be
    simulated (an improper prior, a factor) or the guide reads no data, that step is left out, which
    ``history.notes`` says. ``schedule`` then has only limits: ``Schedule(num_seconds=60)``. With a loss and without a
    schedule the rate and the length are found in the same way.

    *Which parameters remain.* With validation data, those of the best epoch. Without, the last ones: epochs
    differ by less than the noise of their training loss. After Ctrl-C, those of the best epoch so far (the
    current ones if no epoch was completed). After a loss or gradient that is not finite, those of the best
    epoch so far (those at the start if none); the reason, a warning and the message name the first site at
    fault. Neither raises. With ``Schedule(averaged_epochs=)`` the parameters of an epoch are their running averages.

    *Checkpoints.* After each epoch the parameters, buffers, optimiser, schedule, random generators, data
    order, best parameters and history are written atomically. A run that finds its checkpoint continues after
    the last completed epoch; on a CPU the result is bit for bit that of a run that was never interrupted. The
    settings that decide the random numbers must be the same; ``num_epochs`` and ``patience`` may change, and
    so may ``num_steps`` (an epoch that it cut short is not completed later).

    *Parameters* are found wherever they live: modules that the model and the guide are, or whose bound
    methods they are, and all ``pyro.param`` and ``pyro.module`` statements. Those that first appear in
    mid-training join the optimiser (but such a run cannot be resumed). Modules train in the mode they are in.

    *Losses per datum.* The loss of a batch is divided by its number of data, also of the smaller last one of
    an epoch, and the epoch's loss is the mean over data. Under inference compilation without data a joint
    sample is a datum.

    Args:
        model: A Pyro model, or a bound method of a module.
        guide: A guide for it.
        data: A tensor or array, a tuple or dict of them (positional or keyword arguments of the model and the
            guide) with the data along the first dimension, a ``Dataset``, a ``DataLoader``, or a
            :class:`TrainingData`, which also has the batch size and validation data. ``None`` under inference
            compilation, which draws its own, or for a model that holds its data.
        simulations: Joint samples of the model to learn from, without any density of it: their number, a dict from site
            to values, a ``DataLoader`` of such dicts, or
            :class:`~pyro_graphflows.infer.Simulations`, which also says what is held out. ``data`` then are the
            arguments of one call, if the model needs some; they tell shapes. The loss is that of the class.
        loss: An ELBO object, an :class:`InferenceCompilation` object of this pair, or that class itself for one
            with its defaults. ``"auto"`` is said above, and the default without a schedule; with
            one it is ``Trace_ELBO()``.
        optimizer: A learning rate for Adam (in torch's fused form, where there is one), a function from a list of
            parameters to a torch optimiser
            (``torch.optim.AdamW``, ``functools.partial(torch.optim.Adam, lr=1e-2)``), a
            :class:`torch.optim.Optimizer`, or a :class:`pyro.optim.PyroOptim`, whose options per parameter
            are kept. One torch optimiser holds all parameters in every case. By default Adam, at 1e-3 if there is a
            schedule and else at a rate that is found.
        schedule: A number of epochs, or a :class:`Schedule`; found by default. With ``simulations`` training
            by default ends when the loss of those that are held out has stopped falling, and averages parameters
            over five epochs.
        checkpoint: A file, or a :class:`Checkpoint`.
        progress: Whether to show a bar, or a :class:`Progress`.
        seed: Seed of all random numbers meanwhile; the global generators are put back afterwards. ``None``
            uses them as they are.
        compile: Whether steps are computed by compiled code (:mod:`~pyro_graphflows.infer.compiled`), which takes
            tens of seconds at first and then is many times faster where models are small. ``"auto"`` compiles where
            the steps that are left are estimated to be worth it: by PyTorch's interpreter (TorchScript), which takes
            seconds and needs no C++ compiler, or as True does in long runs. What cannot be compiled is computed as
            without; ``history.compilation`` says what was done, and why. The random numbers are others than without.

    Returns:
        The history, with the reason of the end.

    Raises:
        GraphflowsError: If the guide is given as the model, if gradients are disabled, if the loss of the first batch
            is not finite before the first step, if there is nothing to train, if the data, the loss, the optimiser or
            another argument is not of these kinds, or the checkpoint belongs to another run.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(slope * x, 0.5**0.5))
        >>> x = 2**0.5 * torch.randn(500)
        >>> history = fit(model, guide, x, optimizer=0.05, schedule=20, progress=False)
        >>> history.stop_reason, abs(pyro.param("slope").item() - 0.5) < 0.1
        ('all 20 epochs done', True)
    """
    require_pair(model, guide)
    data, progress = TrainingData.of(data), Progress.of(progress)
    simulations = None if simulations is None else Simulations.of(simulations)
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    if not torch.is_grad_enabled():
        raise GraphflowsError(
            "Expected gradients to be enabled; got a call under torch.no_grad() or inference mode, where nothing would "
            "be trained. Call fit outside of it."
        )
    if compile not in (True, False, "auto"):
        raise GraphflowsError(f"Expected compile to be True, False or 'auto'; got {compile!r}.")
    args, kwargs = data.arguments()
    compiles = (
        simulations is not None or loss is InferenceCompilation or isinstance(loss, InferenceCompilation)
    )
    # for guides that remember what they were trained on; simulations are other data, of which they warn
    fitting_to = None if compiles else getattr(guide, "fitting_to", None)
    with (
        seeded(seed),
        warnings.catch_warnings(),
        nullcontext() if fitting_to is None else fitting_to(*args, **kwargs),
    ):
        # Pyro warns of what is handled here: a loss that is not finite
        warnings.filterwarnings("ignore", message=r"Encountered (NaN|\+?-?inf)")
        is_auto = isinstance(loss, str) and loss == "auto"
        if simulations is not None:
            loss, data = simulations.prepare(model, guide, args, kwargs, loss)
            schedule = simulations.SCHEDULE if schedule is None else schedule
        elif is_auto or schedule is None:
            first = is_auto or loss is None
            automatic = Automatic(model, guide, data, limits_of(schedule), optimizer, seed, compile)
            return automatic.fit(None if is_auto else loss, checkpoint, progress, on_simulations=first)
        schedule = Schedule.of(schedule)
        optimizer = _RATE if optimizer is None else optimizer
        trainer = Trainer(
            Objective(model, guide, loss), data, optimizer, schedule.max_grad_norm, seed, compile
        )
        # drawn anew, the loss of a few steps is noise to whatever watches it, however few the data beside it are
        draws = data.data is None or (trainer.objective.compiles and simulations is None)
        pace = Plateau(
            trainer.optimizer,
            schedule,
            _STEPS_OF_DRAWS if draws else 1,
            1 if trainer.held_out is not None else _STEPS_JUDGED,
        )
        run = Run(trainer, pace, schedule, checkpoint, {"seed": seed}, progress)
        run.resume()
        return run.train()
