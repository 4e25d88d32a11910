r"""Masked multi-layer networks, evaluated at once or level by level.

Output k of a :class:`MaskedMLP` depends on exactly the inputs in ``allowed[k]``. When the outputs give the
conditional distributions of variables that are themselves inputs of others (an autoregressive factor), the
variables are drawn level by level: those of level 0 need only what is known at the start, those of level 1
need those of level 0, and so on. Units are sorted by level, so a level is a block of rows of each weight
matrix, and all levels together cost as much as one full pass: the weights are masked once, and each row block
is used once.

The *level of an input* is the step at which its value becomes known: 0 at the start, ℓ + 1 once the outputs
of level ℓ are there. The level of an output is the largest level among the inputs that it may see.
"""

import copy
from collections.abc import Collection, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import LabelledMasks, SparseMask, allowed_mask, label_masks
from pyro_graphflows.nn.activations import make_activation
from pyro_graphflows.nn.levels import Block, LevelBlocks, Runs
from pyro_graphflows.nn.linear import MaskedLinear, fastest_engine

__all__ = ["LevelEvaluation", "MaskedMLP"]


class MaskedMLP(nn.Module):
    r"""A feed-forward network in which output k depends on exactly the inputs in ``allowed[k]``.

    The hidden part has units with label sets (:func:`~pyro_graphflows.masks.label_masks`). Beside it runs a
    masked linear map from the inputs to the outputs, which holds the output bias.

    References:
        [1] Germain et al. (2015), MADE: Masked Autoencoder for Distribution Estimation.
        [2] Webb et al. (2018), Faithful Inversion of Generative Models for Effective Amortized Inference.
        Their networks are ``hidden_dims=[200, 200], activation="relu", skip=False``.

    Shape:
        - Input: (\*, input_dim), output: (\*, D, num_params), with ``D = len(allowed)``.

    Args:
        allowed: For each output, the indices of the inputs that it may see.
        input_dim: The number of inputs.
        num_params: The number of parameters of each output (as location and scale).
        hidden_dims: The numbers of units of the hidden layers. An empty sequence leaves the linear part
            alone.
        units_per_set: The number of units for each distinct allowed set, when ``hidden_dims`` is not given.
        hidden_layers: The number of hidden layers, when ``hidden_dims`` is not given.
        activation: A name ("elu", "relu", "tanh", "lipswish", "lipmish") or a module that acts entry by
            entry.
        input_levels: The level at which each input becomes known; all at the start if not given.
        output_levels: The level at which each output is wanted; as soon as its inputs are known if not given.
        skip: Whether there is a linear map beside the hidden part.
        engine: The engine of the layers, "dense", "sparse" or "auto"; see :class:`MaskedLinear`.
        input_names: Names of the inputs, for messages.
        output_names: Names of the outputs, for messages.

    Attributes:
        allowed: The allowed sets.
        skip: The linear map beside the hidden part, or None: a :class:`MaskedLinear` with weights of shape
            (D * num_params, input_dim), row ``k * num_params + p`` for parameter p of output k.
        layers: The layers of the hidden part; the last one has the rows of ``skip``.
        output_levels: The level of each output.
        outputs_by_level: For each level, its outputs in ascending order.
        inputs_by_level: For each level, its inputs in ascending order.

    Raises:
        GraphflowsError: If indices or levels are out of range, an output is wanted before its inputs are known, or
            ``hidden_dims`` are too narrow.

    Example:
        >>> mlp = MaskedMLP([[0], [0, 1]], 2, input_levels=[0, 1])
        >>> mlp(torch.zeros(5, 2)).shape
        torch.Size([5, 2, 2])
        >>> evaluation = mlp.start()
        >>> evaluation.step(torch.zeros(5, 1)).shape, evaluation.step(torch.zeros(5, 1)).shape
        (torch.Size([5, 1, 2]), torch.Size([5, 1, 2]))
    """

    def __init__(
        self,
        allowed: Sequence[Collection[int]],
        input_dim: int,
        *,
        num_params: int = 2,
        hidden_dims: Sequence[int] | None = None,
        units_per_set: int = 8,
        hidden_layers: int = 1,
        activation: str | nn.Module = "elu",
        input_levels: Sequence[int] | None = None,
        output_levels: Sequence[int] | None = None,
        skip: bool = True,
        engine: str = "auto",
        input_names: Sequence[object] | None = None,
        output_names: Sequence[object] | None = None,
    ) -> None:
        super().__init__()
        if num_params < 1:
            raise GraphflowsError(f"Expected num_params >= 1; got {num_params}.")
        levels = [0] * input_dim if input_levels is None else [int(level) for level in input_levels]
        if len(levels) != input_dim or min(levels, default=0) < 0:
            raise GraphflowsError(f"Expected {input_dim} input_levels, none negative; got {levels}.")
        masks = label_masks(
            allowed,
            input_dim,
            hidden_layers=hidden_layers,
            units_per_set=units_per_set,
            hidden_dims=hidden_dims,
            input_levels=levels,
            input_names=input_names,
            output_names=output_names,
        )
        self.allowed = masks.allowed
        self.input_dim = input_dim
        self.num_params = num_params
        self.activation = make_activation(activation)
        self.output_levels = tuple(max((levels[j] for j in s), default=0) for s in self.allowed)
        if output_levels is not None:
            self.output_levels = _later(self.output_levels, output_levels)
        self.num_levels = max(self.output_levels, default=0) + 1
        self.outputs_by_level = _group(self.output_levels, self.num_levels)
        self.inputs_by_level = _group(levels, self.num_levels)

        def layer(mask: SparseMask, bias: bool = True) -> MaskedLinear:
            chosen = fastest_engine(mask, self.num_levels) if engine == "auto" else engine
            return MaskedLinear(mask, bias, chosen)

        direct = allowed_mask(self.allowed, input_dim).repeat_rows(num_params)
        self.skip = layer(direct) if skip else None
        *hidden, last = masks.patterns
        layers = [layer(mask) for mask in hidden]
        if hidden or not skip:
            layers.append(layer(last.repeat_rows(num_params), bias=not skip))
        self.layers = nn.ModuleList(layers)
        self._set_blocks(masks, levels, layers)

    def _set_blocks(
        self, masks: LabelledMasks, levels: Sequence[int], layers: Sequence[MaskedLinear]
    ) -> None:
        """Cut every layer into levels. Hidden units are sorted by level; inputs and outputs need not be."""
        inputs = [j for group in self.inputs_by_level for j in group]
        units = [[max(levels[j] for j in label) for label in labels] for labels in masks.labels]
        rows = [[len(group) for group in _group(unit, self.num_levels)] for unit in units]
        rows.append([len(group) * self.num_params for group in self.outputs_by_level])
        columns = [list(accumulate(len(group) for group in self.inputs_by_level))]
        columns.extend(list(accumulate(row)) for row in rows[:-1])
        outputs = [
            k * self.num_params + p
            for group in self.outputs_by_level
            for k in group
            for p in range(self.num_params)
        ]
        self._layer_blocks = nn.ModuleList(
            LevelBlocks(
                layer,
                _permutation(inputs) if i == 0 else None,
                _permutation(outputs) if i == len(layers) - 1 else None,
                rows[i],
                columns[i],
            )
            for i, layer in enumerate(layers)
        )
        self._skip_blocks = None
        if self.skip is not None:
            self._skip_blocks = LevelBlocks(
                self.skip, _permutation(inputs), _permutation(outputs), rows[-1], columns[0]
            )

    def zero_output_(self) -> None:
        """Set the last layer of the hidden part to zero, so that the linear part alone is left."""
        if len(self.layers):
            last = self.layers[-1]
            assert isinstance(last, MaskedLinear)
            last.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the parameters of all outputs, (*batch, D, num_params), for ``x`` of (*batch, input_dim)."""
        if x.shape[-1] != self.input_dim:
            raise GraphflowsError(f"Expected x.shape[-1] == {self.input_dim}; got {x.shape[-1]}.")
        terms = []
        if len(self.layers):
            h = x
            for layer in self.layers[:-1]:
                h = self.activation(layer(h))
            terms.append(self.layers[-1](h))
        if self.skip is not None:
            terms.append(self.skip(x))
        out: Tensor = sum(terms[1:], terms[0])
        return out.reshape(*x.shape[:-1], len(self.allowed), self.num_params)

    def start(self) -> "LevelEvaluation":
        """Mask the weights and begin an evaluation level by level."""
        return LevelEvaluation(self)


class LevelEvaluation:
    """One evaluation of a :class:`MaskedMLP`, level by level; made by :meth:`MaskedMLP.start`.

    Values of different levels may have different batch shapes, which broadcast: the observed inputs of level
    0 may lack the particle dimensions that drawn values have. Values of equal batch shape are kept together,
    and each such run is multiplied by its own columns, so nothing is expanded before it must be.
    """

    def __init__(self, mlp: MaskedMLP) -> None:
        self._mlp = mlp
        self._level = 0
        self._batch_shape = torch.Size()
        self._inputs = Runs()
        self._hidden = [Runs() for _ in list(mlp.layers)[1:]]
        # For each layer, its blocks by level.
        self._layers = [
            _cut(blocks, layer) for blocks, layer in zip(mlp._layer_blocks, mlp.layers, strict=True)
        ]
        self._skip = None if mlp._skip_blocks is None else _cut(mlp._skip_blocks, mlp.skip)

    @property
    def level(self) -> int:
        """The level of the next step."""
        return self._level

    def fork(self) -> "LevelEvaluation":
        """Return an evaluation at the same place that goes its own way from here."""
        other = copy.copy(self)
        other._inputs = self._inputs.copy()
        other._hidden = [runs.copy() for runs in self._hidden]
        return other

    def step(self, x_new: Tensor | None = None) -> Tensor:
        """Take the inputs that became known and return the parameters of the next level's outputs.

        Args:
            x_new: The inputs of this level, in the order of ``inputs_by_level``, of shape (*batch, number of
                inputs of this level). None if there are none.

        Returns:
            A tensor of shape (*batch, number of outputs of this level, num_params), in the order of
            ``outputs_by_level``; the batch shape is the broadcast of all batch shapes so far.

        Raises:
            GraphflowsError: If the number of inputs is wrong, or all levels are done.
        """
        mlp, level = self._mlp, self._level
        if level == mlp.num_levels:
            raise GraphflowsError(f"Expected at most {mlp.num_levels} steps, one a level; this is one more.")
        expected = len(mlp.inputs_by_level[level])
        got = 0 if x_new is None else x_new.shape[-1]
        if got != expected:
            raise GraphflowsError(f"Expected x_new.shape[-1] == {expected} at level {level}; got {got}.")
        self._level += 1
        if x_new is not None:
            self._inputs.append(x_new)
            if x_new.shape[:-1] != self._batch_shape:
                self._batch_shape = torch.broadcast_shapes(self._batch_shape, x_new.shape[:-1])

        terms = []
        below = self._inputs
        for blocks, runs in zip(self._layers[:-1], self._hidden, strict=True):
            if blocks[level].num_rows:
                runs.append(mlp.activation(blocks[level](below)))
            below = runs
        if self._layers:
            terms.append(self._layers[-1][level](below))
        if self._skip is not None:
            terms.append(self._skip[level](self._inputs))
        out = sum(terms[1:], terms[0])
        if out.shape[:-1] != self._batch_shape:
            out = out.expand(*self._batch_shape, out.shape[-1])
        return out.unflatten(-1, (len(mlp.outputs_by_level[level]), mlp.num_params))


def _cut(blocks: nn.Module, layer: nn.Module | None) -> list[Block]:
    assert isinstance(blocks, LevelBlocks)
    assert isinstance(layer, MaskedLinear)
    return blocks.cut(layer)


def _later(known: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    early = [k for k, (a, b) in enumerate(zip(known, wanted, strict=True)) if b < a]
    if early:
        raise GraphflowsError(
            "Expected output_levels that are not below the levels of the outputs' inputs; "
            f"they are below for the outputs {early}."
        )
    return tuple(int(level) for level in wanted)


def _group(levels: Sequence[int], num_levels: int) -> tuple[tuple[int, ...], ...]:
    groups: list[list[int]] = [[] for _ in range(num_levels)]
    for i, level in enumerate(levels):
        if level < num_levels:
            groups[level].append(i)
    return tuple(map(tuple, groups))


def _permutation(order: Sequence[int]) -> Sequence[int] | None:
    """The order, or None where it is the identity, which then costs nothing."""
    return None if list(order) == list(range(len(order))) else order
