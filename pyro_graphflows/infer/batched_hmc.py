r"""Hamiltonian Monte Carlo for many independent targets at once, each with a step size of its own.

The amortised posteriors of ten thousand small data sets are ten thousand targets of a few dimensions. One gradient of
all of them costs little more than one of a single target, so that chains of all targets move together: points are
tensors (chains, targets, dimensions), and each target has a step size, scales of its dimensions and an acceptance rate,
which its chains share.

Two kernels. :class:`HMC` makes trajectories of random length, in which targets that arrive earlier wait. :class:`NUTS`
doubles its trajectories until they turn back, chain by chain; the leaves of all trees are visited in the same order, so
that the bookkeeping is that of one tree. For a single target with several chains it costs no more than one chain.

References:
    [1] Neal (2011), MCMC using Hamiltonian dynamics, Handbook of Markov Chain Monte Carlo, Section 5.
    [2] Hoffman and Gelman (2014), The No-U-Turn sampler, JMLR 15: step sizes by dual averaging, Section 3.2.
    [3] Betancourt (2017), A conceptual introduction to Hamiltonian Monte Carlo, appendix A: multinomial sampling from
    trajectories, and the criterion of turning back by sums of momenta.
    [4] Phan, Pradhan and Jankowiak (2019), Composable effects for flexible and accelerated probabilistic programming in
    NumPyro, Section 3: trees without recursion, by the binary digits of the number of a leaf.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError

__all__ = ["HMC", "NUTS", "ChainDraws", "Kernel", "run_chains"]

Potential = Callable[[Tensor], Tensor]

DIVERGENT = 1000.0  # nats by which the energy rises along a trajectory that has left the target
HALF_PI = 0.5 * math.pi


class State(NamedTuple):
    """Where chains are: points (C, G, D), energies (C, G) and their gradients (C, G, D)."""

    position: Tensor
    energy: Tensor
    gradient: Tensor


class Transition(NamedTuple):
    """What came of one step of all chains.

    Attributes:
        state: Where they are now.
        acceptance: The probability of acceptance, averaged over a trajectory, (C, G).
        divergent: Which trajectories left the target, (C, G).
    """

    state: State
    acceptance: Tensor
    divergent: Tensor


class Space:
    """A potential with the scales in which its targets are looked at, and a count of its gradients.

    Args:
        potential: From points (C, G, D) to energies (C, G), minus log-densities up to a constant.
        like: Points.

    Attributes:
        inverse_mass: Squares of the scales of the dimensions, (1, G, D).
        gradients: How many gradients were computed, that of each chain of each target counted.
    """

    def __init__(self, potential: Potential, like: Tensor) -> None:
        self.potential = potential
        self.inverse_mass = torch.ones_like(like[:1])
        self.gradients = 0

    def state(self, position: Tensor, counted: Tensor | None = None) -> State:
        """Return energies and gradients at some points; where they are no numbers, infinite energies."""
        position = position.detach().requires_grad_()
        with torch.enable_grad():
            energy = self.potential(position)
            (gradient,) = torch.autograd.grad(energy.sum(), position)
        energy = energy.detach()
        bad = ~energy.isfinite() | ~gradient.isfinite().all(-1)
        self.gradients += energy.numel() if counted is None else int(counted.sum())
        return State(
            position.detach(),
            torch.where(bad, math.inf, energy),
            torch.where(bad.unsqueeze(-1), torch.zeros_like(gradient), gradient),
        )

    def momentum(self, like: Tensor) -> Tensor:
        """Draw momenta."""
        return torch.randn_like(like) * self.inverse_mass.rsqrt()

    def kinetic(self, momentum: Tensor) -> Tensor:
        """Return kinetic energies."""
        return 0.5 * (momentum.square() * self.inverse_mass).sum(-1)

    def leapfrog(
        self, state: State, momentum: Tensor, step: Tensor, moving: Tensor | None = None
    ) -> tuple[State, Tensor]:
        """Make one step of size ``step`` (broadcast to (C, G)) along the flow; chains not ``moving`` stay."""
        step = step.unsqueeze(-1)
        half = momentum - 0.5 * step * state.gradient
        moved = self.state(state.position + step * self.inverse_mass * half, moving)
        after = half - 0.5 * step * moved.gradient
        return (
            (moved, after)
            if moving is None
            else (_where(moving, moved, state), _pick(moving, after, momentum))
        )


class Kernel(Protocol):
    """One step of all chains, and how they are warmed up: :class:`HMC` or :class:`NUTS`."""

    @property
    def warmup(self) -> int:
        """The number of steps in which step sizes and scales are found; they are thrown away."""
        ...

    @property
    def acceptance(self) -> float:
        """The acceptance that the step sizes aim at."""
        ...

    def __call__(self, space: Space, state: State, step: Tensor) -> Transition:
        """Move all chains; ``step`` has the step sizes of the targets, (1, G)."""
        ...


@dataclass(frozen=True)
class HMC:
    """Trajectories of random length.

    Lengths are uniform between a half and one and a half times ``length``, in units of the targets' scales: fixed ones
    could return to where they started.

    Args:
        length: The mean length; by default a quarter of the period of a normal.
        max_steps: The most leapfrog steps of a trajectory.
        warmup: The number of steps in which step sizes and scales are found; they are thrown away.
        acceptance: The acceptance that the step sizes aim at.

    Raises:
        GraphflowsError: If a number is not positive, or the acceptance is not between 0 and 1.
    """

    length: float = HALF_PI
    max_steps: int = 64
    warmup: int = 200
    acceptance: float = 0.8

    def __post_init__(self) -> None:
        _require_options(self, "length", "max_steps", "warmup")

    def __call__(self, space: Space, state: State, step: Tensor) -> Transition:
        """See :class:`Kernel`."""
        momentum = space.momentum(state.position)
        before = state.energy + space.kinetic(momentum)
        length = self.length * (0.5 + torch.rand((), dtype=step.dtype, device=step.device))
        counts = (length / step).ceil().clamp(1, self.max_steps)
        now, p = state, momentum
        for number in range(int(counts.max())):
            moving = (counts > number).expand(before.shape)
            now, p = space.leapfrog(now, p, step, None if bool(moving.all()) else moving)
        rise = (now.energy + space.kinetic(p) - before).nan_to_num(nan=math.inf)
        acceptance = torch.exp(-rise.clamp(min=0.0))
        accepted = torch.rand_like(acceptance) < acceptance
        return Transition(_where(accepted, now, state), acceptance, rise > DIVERGENT)


def _require_options(kernel: Kernel, *names: str) -> None:
    for name in names:
        if not getattr(kernel, name) > 0:
            raise GraphflowsError(f"Expected a positive {name}; got {getattr(kernel, name)!r}.")
    if not 0 < kernel.acceptance < 1:
        raise GraphflowsError(f"Expected an acceptance between 0 and 1; got {kernel.acceptance!r}.")


class _Tree(NamedTuple):
    """A part of a trajectory: the state chosen from it, the weight of all its states, and the sum of their momenta."""

    chosen: State
    log_weight: Tensor
    momentum_sum: Tensor


@dataclass(frozen=True)
class NUTS:
    """Trajectories that double until they turn back.

    Args:
        max_depth: The most doublings.
        warmup: The number of steps in which step sizes and scales are found; they are thrown away.
        acceptance: The acceptance that the step sizes aim at.

    Raises:
        GraphflowsError: If a number is not positive, or the acceptance is not between 0 and 1.
    """

    max_depth: int = 10
    warmup: int = 300
    acceptance: float = 0.8

    def __post_init__(self) -> None:
        _require_options(self, "max_depth", "warmup")

    def __call__(self, space: Space, state: State, step: Tensor) -> Transition:
        """See :class:`Kernel`."""
        momentum = space.momentum(state.position)
        start_energy = state.energy + space.kinetic(momentum)
        ends = [(state, momentum), (state, momentum)]  # leftmost and rightmost
        tree = _Tree(state, torch.zeros_like(start_energy), momentum)
        going = torch.ones_like(start_energy, dtype=torch.bool)
        divergent = torch.zeros_like(going)
        acceptance, num = torch.zeros_like(start_energy), torch.zeros_like(start_energy)
        for depth in range(self.max_depth):
            right = torch.rand_like(start_energy) < 0.5
            edge, p = _where(right, ends[1][0], ends[0][0]), _pick(right, ends[1][1], ends[0][1])
            signed = torch.where(right, step, -step)
            grown = _Subtree(space, start_energy, 2**depth).grow(edge, p, signed, going)
            acceptance, num = acceptance + grown.acceptance, num + grown.num
            divergent = divergent | grown.divergent
            whole = going & ~grown.turned & ~grown.divergent
            # between the halves, the new one is favoured
            odds = grown.tree.log_weight - tree.log_weight
            taken = whole & (torch.rand_like(odds).log() < odds)
            chosen = _where(taken, grown.tree.chosen, tree.chosen)
            for side, outwards in enumerate((~right, right)):
                outer = whole & outwards
                ends[side] = (
                    _where(outer, grown.edge, ends[side][0]),
                    _pick(outer, grown.momentum, ends[side][1]),
                )
            log_weight = torch.where(
                whole, torch.logaddexp(tree.log_weight, grown.tree.log_weight), tree.log_weight
            )
            total = _pick(whole, tree.momentum_sum + grown.tree.momentum_sum, tree.momentum_sum)
            tree = _Tree(chosen, log_weight, total)
            going = whole & ~_turns_back(space, ends[0][1], ends[1][1], total)
            if not bool(going.any()):
                break
        return Transition(tree.chosen, acceptance / num.clamp(min=1), divergent)


class _Subtree:
    """Grows the new half of a trajectory leaf by leaf, until it turns back within.

    Momenta and their sums at the left ends of the subtrees that are not complete yet are kept by the number of ones
    in the binary digits of a leaf's number; an odd leaf completes subtrees, which are then looked at [4].
    """

    def __init__(self, space: Space, start_energy: Tensor, num_leaves: int) -> None:
        self.space, self.start_energy, self.num_leaves = space, start_energy, num_leaves
        self.tree: _Tree
        self.edge: State
        self.momentum: Tensor
        self.turned = torch.zeros_like(start_energy, dtype=torch.bool)
        self.divergent = torch.zeros_like(self.turned)
        self.acceptance, self.num = torch.zeros_like(start_energy), torch.zeros_like(start_energy)

    def grow(self, edge: State, momentum: Tensor, step: Tensor, going: Tensor) -> "_Subtree":
        """Grow from an edge; only chains that are ``going`` move."""
        space = self.space
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        tree = _Tree(edge, torch.full_like(self.start_energy, -math.inf), torch.zeros_like(momentum))
        moving = going
        for leaf in range(self.num_leaves):
            edge, momentum = space.leapfrog(edge, momentum, step, moving)
            rise = (edge.energy + space.kinetic(momentum) - self.start_energy).nan_to_num(nan=math.inf)
            self.acceptance = self.acceptance + torch.where(moving, torch.exp(-rise.clamp(min=0.0)), 0.0)
            self.num = self.num + moving.to(self.num)
            self.divergent = self.divergent | (moving & (rise > DIVERGENT))
            log_weight = torch.where(moving, torch.logaddexp(tree.log_weight, -rise), tree.log_weight)
            taken = moving & (torch.rand_like(rise).log() < -rise - log_weight)
            total = _pick(moving, tree.momentum_sum + momentum, tree.momentum_sum)
            tree = _Tree(_where(taken, edge, tree.chosen), log_weight, total)
            place = (leaf >> 1).bit_count()
            if leaf % 2 == 0:
                kept[place] = (momentum, total)
            else:
                completed = (~leaf & (leaf + 1)).bit_length() - 1  # ones at the end of its binary digits
                for other in range(place, place - completed, -1):
                    first, before = kept[other]
                    turns = _turns_back(space, first, momentum, total - before + first)
                    self.turned = self.turned | (moving & turns)
            moving = moving & ~self.turned & ~self.divergent
            if not bool(moving.any()):
                break
        self.tree, self.edge, self.momentum = tree, edge, momentum
        return self


def _turns_back(space: Space, left: Tensor, right: Tensor, total: Tensor) -> Tensor:
    """Return whether a trajectory with these momenta at its ends and this sum of them turns back."""
    middle = total - 0.5 * (left + right)
    velocity = middle * space.inverse_mass
    return ((left * velocity).sum(-1) <= 0) | ((right * velocity).sum(-1) <= 0)


def _where(chosen: Tensor, one: State, other: State) -> State:
    return State(
        _pick(chosen, one.position, other.position),
        torch.where(chosen, one.energy, other.energy),
        _pick(chosen, one.gradient, other.gradient),
    )


def _pick(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen.unsqueeze(-1), one, other)


# -------------------------------------------------------------------------------------------------------- adaptation
class StepSizes:
    """Step sizes by dual averaging [2], for each target by the acceptance of all its chains.

    Args:
        start: The first step sizes, (1, G).
        target: The acceptance aimed at.
    """

    shrinkage, offset, decay = 0.05, 10.0, 0.75

    def __init__(self, start: Tensor, target: float) -> None:
        self.target = target
        self.centre = (10 * start).log()
        self.error = torch.zeros_like(start)
        self.average = torch.zeros_like(start)
        self.current = start
        self.count = 0

    def update(self, acceptance: Tensor) -> None:
        """Take the acceptance of a step, (C, G), or of its worst chain, (1, G)."""
        self.count += 1
        share = 1 / (self.count + self.offset)
        mean = acceptance.mean(0, keepdim=True).to(self.error)
        self.error = (1 - share) * self.error + share * (self.target - mean)
        log_step = self.centre - math.sqrt(self.count) / self.shrinkage * self.error
        weight = self.count**-self.decay
        self.average = weight * log_step + (1 - weight) * self.average
        self.current = log_step.exp()

    @property
    def final(self) -> Tensor:
        """The step sizes after adaptation."""
        return self.average.exp()


def first_steps(space: Space, state: State) -> Tensor:
    """Return step sizes at which one leapfrog step is accepted about half of the time, (1, G)."""
    step = torch.full_like(state.energy[:1], 0.5)
    direction = torch.zeros_like(step)
    for _ in range(30):
        momentum = space.momentum(state.position)
        moved, p = space.leapfrog(state, momentum, step.to(state.position))
        rise = moved.energy + space.kinetic(p) - state.energy - space.kinetic(momentum)
        accepted = torch.exp(-rise.nan_to_num(nan=math.inf).clamp(min=0.0)).mean(0, keepdim=True) > 0.5
        wanted = torch.where(accepted, 1.0, -1.0).to(step)
        direction = torch.where(direction == 0, wanted, direction)
        open_ = direction == wanted
        if not bool(open_.any()):
            break
        step = torch.where(open_, step * 2.0**direction, step)
    return step


def windows(num_warmup: int) -> list[int]:
    """Return the numbers of warm-up steps after which scales are estimated from those since: windows that double."""
    first, last = int(0.15 * num_warmup), num_warmup - int(0.1 * num_warmup)
    ends, size, at = [], max(10, num_warmup // 20), first
    while at + size <= last:
        at, size = at + size, 2 * size
        if at + size > last:
            at = last
        ends.append(at)
    return ends


@dataclass(frozen=True)
class ChainDraws:
    """What chains have visited.

    Attributes:
        points: The points after warm-up, (samples, chains, targets, dimensions).
        acceptance: The mean acceptance of each target.
        step_size: The step size of each target.
        divergent: The number of trajectories of each target that left it, after warm-up.
        gradients: The number of gradients, those of warm-up included; each chain of each target counts.
        gradients_after: That number after each sample, (samples,).
        interrupted: Whether it was ended before all samples were there.
    """

    points: Tensor
    acceptance: Tensor
    step_size: Tensor
    divergent: Tensor
    gradients: int
    gradients_after: Tensor
    interrupted: bool = field(default=False)


def run_chains(
    kernel: Kernel,
    potential: Potential,
    start: Tensor,
    num_samples: int,
    tick: Callable[[], object] = lambda: None,
) -> ChainDraws:
    """Run chains from given points.

    An interruption (Ctrl-C) after warm-up ends the chains; what they have visited is returned.

    Args:
        kernel: One step of all chains.
        potential: From points (C, G, D) to energies (C, G): minus log-densities, up to a constant.
        start: Where the chains start, (C, G, D).
        num_samples: The number of steps that are kept, of each chain.
        tick: Called after each step.

    Raises:
        GraphflowsError: If a target has no density at any starting point of its chains.
    """
    space = Space(potential, start)
    state = space.state(start)
    nowhere = int((state.energy == math.inf).all(0).sum())
    if nowhere:
        raise GraphflowsError(
            f"Expected starting points where the targets have a density; {nowhere} of {start.shape[1]} have none at "
            "any of their chains. Train the guide, or give it the support of the model's latent sites."
        )
    state = _everywhere_finite(space, state)
    state, sizes = _warm_up(kernel, space, state, tick)
    points, spent, acceptance = [], [], torch.zeros_like(state.energy)
    divergent = torch.zeros_like(state.energy)
    interrupted = False
    try:
        for _ in range(num_samples):
            moved = kernel(space, state, sizes)
            state = moved.state
            points.append(state.position)
            spent.append(space.gradients)
            acceptance, divergent = acceptance + moved.acceptance, divergent + moved.divergent
            tick()
    except KeyboardInterrupt:
        if not points:
            raise
        interrupted = True
    return ChainDraws(
        torch.stack(points),
        acceptance.mean(0) / len(points),
        sizes[0],
        divergent.sum(0).long(),
        space.gradients,
        torch.tensor(spent),
        interrupted,
    )


def _everywhere_finite(space: Space, state: State) -> State:
    """Let chains that start where there is no density start where another one of their target does."""
    bad = state.energy == math.inf
    if not bool(bad.any()):
        return state
    best = state.energy.argmin(0)  # (G,)
    other = state.position[best, torch.arange(state.position.shape[1], device=best.device)]
    return space.state(_pick(bad, other.expand_as(state.position), state.position))


def _warm_up(kernel: Kernel, space: Space, state: State, tick: Callable[[], object]) -> tuple[State, Tensor]:
    """Return where the chains are after warm-up, and the step sizes of the targets."""
    sizes = StepSizes(first_steps(space, state), kernel.acceptance)
    ends, visited = windows(kernel.warmup), []
    first = int(0.15 * kernel.warmup)
    for number in range(1, kernel.warmup + 1):
        moved = kernel(space, state, sizes.current.to(state.position))
        state = moved.state
        # at first by the worst chain: one that starts far out must get in, while the others could do with longer steps
        sizes.update(moved.acceptance.amin(0, keepdim=True) if number <= first else moved.acceptance)
        if first < number <= (ends[-1] if ends else 0):
            visited.append(state.position)
        if number in ends:
            space.inverse_mass = _variances(torch.stack(visited))
            visited = []
            sizes = StepSizes(first_steps(space, state), kernel.acceptance)
        tick()
    return state, sizes.final.to(state.position)


def _variances(visited: Tensor) -> Tensor:
    """Return variances of visited points (W, C, G, D) by target and dimension, (1, G, D), drawn towards 1."""
    flat = visited.flatten(0, 1)
    num = len(flat)
    return ((num * flat.var(0) + 5 * 1.0) / (num + 5)).unsqueeze(0)
