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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.masks import LabelledMasks, SparseMask, UnitsPerSet, allowed_mask, label_masks
from pyro_graphflows.nn.activations import make_activation
from pyro_graphflows.nn.masked import MaskedLinear, NaturalUnits, fastest_engine
from pyro_graphflows.nn.sparse import SparsePattern

__all__ = ["LevelEvaluation", "MaskedMLP"]

Weights = tuple[Tensor, Tensor | None]  # the entries and the bias of a layer


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
        natural_units: Whether weights are trained in whitened inputs and units of the outputs
            (:mod:`~pyro_graphflows.nn.masked`).
        input_names: Names of the inputs, for messages.
        output_names: Names of the outputs, for messages.

    Attributes:
        allowed: The allowed sets.
        skip: The linear map beside the hidden part, or None: a :class:`MaskedLinear` with weights of shape
            (D * num_params, input_dim), row ``k * num_params + p`` for parameter p of output k.
        layers: The layers of the hidden part; the last one has the rows of ``skip``.
        units: The natural units, or None.
        is_in_order: Whether there is one level, with its inputs, the first ones, and outputs in their order.
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
        natural_units: bool = False,
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
            UnitsPerSet(units_per_set, hidden_layers) if hidden_dims is None else hidden_dims,
            input_levels=levels,
            names=(input_names, output_names),
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
        self.units = None
        if natural_units and (skip or hidden):
            sets = [s for s in dict.fromkeys(self.allowed) if s]
            number = {s: i for i, s in enumerate(sets)}
            of_outputs = [number.get(s, -1) for s in self.allowed for _ in range(num_params)]
            of_units = [number[s] for s in masks.labels[0]] if masks.labels else []
            self.units = NaturalUnits(self.skip, of_outputs, layers, of_units, list(map(sorted, sets)))
        self._set_cuts(masks, levels, layers)

    def _set_cuts(self, masks: LabelledMasks, levels: Sequence[int], layers: Sequence[MaskedLinear]) -> None:
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
        orders = _permutation(inputs), _permutation(outputs)
        stops = list(accumulate(rows[-1]))
        self.rows_by_level = [slice(stop - n, stop) for n, stop in zip(rows[-1], stops, strict=True)]
        dense = all(layer.engine == "dense" for layer in self.modules() if isinstance(layer, MaskedLinear))
        whole = dense or len(inputs) == self.input_dim
        self.can_be_at_once = dense and orders == (None, None)  # levels are runs of inputs and of outputs
        self.is_in_order = self.num_levels == 1 and orders == (None, None) and whole
        self._layer_cuts = nn.ModuleList(
            LevelCut(
                layer,
                _permutation(inputs) if i == 0 else None,
                _permutation(outputs) if i == len(layers) - 1 else None,
                rows[i],
                columns[i],
            )
            for i, layer in enumerate(layers)
        )
        self._skip_cut = None
        if self.skip is not None:
            self._skip_cut = LevelCut(
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
        return self.flat(x).unflatten(-1, (len(self.allowed), self.num_params))

    def flat(self, x: Tensor) -> Tensor:
        """Return what :meth:`forward` returns with the parameters of all outputs one after the other.

        Args:
            x: The inputs, or in dense layers the first ones, where no output sees the others.
        """
        if self.units is not None and self.units.prefers_whitened(x):
            return self._of_whitened(x)
        return self.multiplied(*self.weights(), x)

    def multiplied(self, skip: Weights | None, layers: list[Weights], x: Tensor) -> Tensor:
        """Return what :meth:`flat` returns, with weights that are known.

        Args:
            skip: Those of the linear map.
            layers: Those of the layers.
            x: The inputs, or in dense layers the first ones, where no output sees the others.
        """
        layers = list(layers)
        if x.shape[-1] < self.input_dim:
            if layers:
                layers[0] = layers[0][0][:, : x.shape[-1]], layers[0][1]
            if skip is not None:
                skip = skip[0][:, : x.shape[-1]], skip[1]
        out = None if self.skip is None or skip is None else _multiplied(self.skip, skip, x)
        if layers:
            *hidden, last = zip(self._masked_layers(), layers, strict=True)
            for each in hidden:
                x = self.activation(_multiplied(*each, x))
            out = _multiplied(*last, x, out)
        assert out is not None
        return out

    def _of_whitened(self, x: Tensor) -> Tensor:
        """Return the outputs one after the other, by way of whitened inputs."""
        assert self.units is not None
        layers = self._masked_layers()
        mapped, h = self.units.of_whitened(x, self.skip, layers[0] if len(layers) > 1 else None)
        if h is None:
            assert mapped is not None
            return mapped
        for layer in layers[1:-1]:
            h = layer(self.activation(h))
        last = layers[-1]
        bias = None if last.bias is None else last.bias * self.units.unit
        out = last.multiply(self.units.last(last), self.activation(h), bias)
        return out if mapped is None else out + mapped

    def weights(self) -> tuple[Weights | None, list[Weights]]:
        """Return the entries and biases of the linear map and of the layers, as an evaluation uses them."""
        layers = self._masked_layers()
        units = self.units
        if units is None:
            own = None if self.skip is None else (self.skip.entries(), self.skip.bias)
            return own, [(layer.entries(), layer.bias) for layer in layers]
        entries = [layer.entries() for layer in layers[1:-1]]
        if len(layers) > 1:
            entries = [units.hidden(layers[0]), *entries, units.last(layers[-1])]
        biases: list[Tensor | None] = [layer.bias for layer in layers]
        if self.skip is None and (last := biases[-1]) is not None:
            biases[-1] = last * units.unit
        skip = None if self.skip is None else units.linear(self.skip)
        return skip, list(zip(entries, biases, strict=True))

    @torch.no_grad()
    def whiten_(self, moments: Tensor) -> None:
        """Train weights in inputs that are whitened within each allowed set, where there are natural units.

        Args:
            moments: The second moments of the inputs, ``(input_dim, input_dim)``.
        """
        if self.units is not None:
            layers = self._masked_layers()
            self.units.whiten_(moments, layers[0] if len(layers) > 1 else None)

    @torch.no_grad()
    def set_linear_(self, rows: slice, weights: Tensor, bias: Tensor, unit: Tensor | None = None) -> None:
        """Let some outputs be a linear map of the inputs; hidden layers keep their units and get zero output.

        Args:
            rows: The rows of the linear map, as a slice with a start and a stop.
            weights: Shape ``(rows, input_dim)``; what is off the mask does not matter.
            bias: Shape ``(rows,)``.
            unit: The natural units of these outputs, positive, ``(rows,)``; those that they have by default.

        Raises:
            GraphflowsError: If there is no linear map beside the hidden layers.
        """
        if self.skip is None:
            raise GraphflowsError(
                "Expected a network with a linear map beside its hidden layers; this one has none (skip=False)."
            )
        if self.units is None:
            self.skip.set_rows_(rows, weights, bias)
        else:
            self.units.set_rows_(self.skip, rows, weights, bias)
            if unit is not None:
                self.units.unit[rows] = unit.to(self.units.unit)
        if len(self.layers):
            self._masked_layers()[-1].set_rows_(rows, 0.0)

    @torch.no_grad()
    def change_units_(self, unit: Tensor) -> None:
        """Train outputs in other natural units, where there are any; the network is the same function.

        Args:
            unit: The units of all outputs, positive, ``(D * num_params,)``.
        """
        if self.units is not None:
            self.units.change_(self.skip, self._masked_layers()[-1] if len(self.layers) else None, unit)

    @torch.no_grad()
    def add_(self, output: int, value: float) -> None:
        """Add a constant to one output.

        Args:
            output: Its number.
            value: The constant.
        """
        bias: Tensor | None
        unit = 1.0
        if self.skip is not None:
            bias = self.skip.bias if self.units is None else self.units.bias
        else:
            bias = self._masked_layers()[-1].bias
            unit = unit if self.units is None else float(self.units.unit[output])
        assert bias is not None
        bias[output] += value / unit

    def _masked_layers(self) -> list[MaskedLinear]:
        return [layer for layer in self.layers if isinstance(layer, MaskedLinear)]

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
        # For each layer, its rows by level; a single level in order does without.
        self._layers: list[list[LevelRows]] | None = None
        self._skip: list[LevelRows] | None = None
        self._weights: tuple[Weights | None, list[Weights]] | None = None
        self._outputs: Tensor | None = None  # of all levels, where all inputs were known at the start
        if not mlp.is_in_order:
            self._cut_weights()

    def _cut_weights(self) -> None:
        skip, layers = self._mlp.weights()
        if self._mlp.can_be_at_once:
            self._weights = skip, layers
        cuts = self._mlp._layer_cuts
        self._layers = [_cut(cut, weights) for cut, weights in zip(cuts, layers, strict=True)]
        self._skip = None if skip is None or self._mlp._skip_cut is None else _cut(self._mlp._skip_cut, skip)

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

    def again(self, runs: Sequence[Tensor | None]) -> "LevelEvaluation":
        """Return an evaluation from the start with the same weights, for inputs that are known.

        Args:
            runs: The inputs of each level, in the order of ``inputs_by_level``; None where there are none.
        """
        other = copy.copy(self)
        other._level, other._batch_shape = 0, torch.Size()
        other._inputs, other._hidden = Runs(), [Runs() for _ in self._hidden]
        known = [x for x in runs if x is not None]
        if self._weights is not None and known and all(x.shape[:-1] == known[0].shape[:-1] for x in known):
            other._outputs = self._mlp.multiplied(*self._weights, torch.cat(known, -1))
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
        outputs = self._mlp.outputs_by_level[min(self._level, self._mlp.num_levels - 1)]
        return self.flat_step(x_new).unflatten(-1, (len(outputs), self._mlp.num_params))

    def flat_step(self, x_new: Tensor | None = None) -> Tensor:
        """Return what :meth:`step` returns with the parameters of all outputs one after the other.

        Args:
            x_new: The inputs of this level.

        Raises:
            GraphflowsError: As for :meth:`step`.
        """
        mlp, level = self._mlp, self._level
        if level == mlp.num_levels:
            raise GraphflowsError(f"Expected at most {mlp.num_levels} steps, one a level; this is one more.")
        expected = len(mlp.inputs_by_level[level])
        got = 0 if x_new is None else x_new.shape[-1]
        if got != expected:
            raise GraphflowsError(f"Expected x_new.shape[-1] == {expected} at level {level}; got {got}.")
        self._level += 1
        if self._outputs is not None:
            return self._outputs[..., self._mlp.rows_by_level[level]]
        if self._layers is None and x_new is not None and mlp.is_in_order:
            return mlp.flat(x_new)
        if self._layers is None:
            self._cut_weights()
        assert self._layers is not None
        if x_new is not None:
            self._inputs.append(x_new)
            shape = x_new.shape[:-1]
            if shape != self._batch_shape:
                known = self._batch_shape
                self._batch_shape = torch.Size(np.broadcast_shapes(known, shape)) if len(known) else shape

        below = self._inputs
        for rows, runs in zip(self._layers[:-1], self._hidden, strict=True):
            if rows[level].num_rows:
                runs.append(mlp.activation(rows[level](below)))
            below = runs
        out = None if self._skip is None else self._skip[level](self._inputs)
        if self._layers:
            out = self._layers[-1][level](below, out)
        assert out is not None
        if out.shape[:-1] != self._batch_shape:
            out = out.expand(*self._batch_shape, out.shape[-1])
        return out


class Runs:
    """Values known so far, features last, in runs of equal batch shape.

    Batch shapes broadcast: what was observed may lack the particle dimensions of what was drawn. Each run is
    multiplied by its own columns, so that nothing is expanded before it must be.
    """

    def __init__(self) -> None:
        self._runs: list[Tensor] = []

    def copy(self) -> "Runs":
        """Return runs that go their own way from here."""
        other = Runs()
        other._runs = list(self._runs)
        return other

    def append(self, x: Tensor) -> None:
        """Add the values of one more level."""
        if x.shape[-1] == 0:
            return
        if self._runs and self._runs[-1].shape[:-1] == x.shape[:-1]:
            self._runs[-1] = torch.cat([self._runs[-1], x], -1)
        else:
            self._runs.append(x)

    def linear(self, weight: Tensor, total: Tensor | None) -> Tensor:
        """Apply the weight to the concatenation of all runs, and add a total so far, as a bias."""
        start = 0
        for run in self._runs:
            stop = start + run.shape[-1]
            part = weight if len(self._runs) == 1 else weight[:, start:stop]
            total = _added(run, part, total)
            start = stop
        return weight.new_zeros(weight.shape[0]) if total is None else total

    def sparse_linear(self, pattern: SparsePattern, values: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the sparse matrix to the concatenation of all runs, expanded, and add a bias."""
        if len(self._runs) > 1:
            shape = np.broadcast_shapes(*(run.shape[:-1] for run in self._runs))
            self._runs = [torch.cat([run.expand(*shape, -1) for run in self._runs], -1)]
        known = self._runs[0] if self._runs else values.new_zeros(0)
        return pattern.linear(values, known, bias)


class LevelRows:
    """The rows of one level, with the weights of one evaluation."""

    def __init__(self, weight: Tensor, bias: Tensor | None, pattern: SparsePattern | None = None) -> None:
        self._weight = weight
        self._bias = bias
        self._pattern = pattern
        self.num_rows = weight.shape[0] if pattern is None else pattern.shape[0]

    def __call__(self, runs: Runs, total: Tensor | None = None) -> Tensor:
        """Apply the rows to all that is known, and add the total of other rows, if there is one."""
        if self._pattern is not None:
            out = runs.sparse_linear(self._pattern, self._weight, self._bias)
            return out if total is None else out + total
        if total is not None and self._bias is not None:
            total = total + self._bias
        return runs.linear(self._weight, self._bias if total is None else total)


def _multiplied(layer: MaskedLinear, weights: Weights, x: Tensor, total: Tensor | None = None) -> Tensor:
    """Return the product of a layer's entries with inputs, with its bias, and the total of others, if there is one."""
    entries, bias = weights
    if layer.engine != "dense":
        out = layer.multiply(entries, x, bias)
        return out if total is None else out + total
    if total is not None and bias is not None:
        total = total + bias
    return _added(x, entries, bias if total is None else total)


def _added(x: Tensor, weight: Tensor, total: Tensor | None) -> Tensor:
    """Return ``total + x @ weight.T`` by as few operations as there can be."""
    if x.dim() == 1 and (total is None or total.dim() == 1):
        return torch.mv(weight, x) if total is None else torch.addmv(total, weight, x)
    if total is None or total.dim() == 1:
        return F.linear(x, weight, total)
    return F.linear(x, weight) + total


class LevelCut(nn.Module):
    """How the rows and columns of one layer are cut into levels.

    Args:
        layer: The layer.
        input_order: The layer's columns in order of levels; None if they are. Columns may be left out.
        output_order: The layer's rows in order of levels; None if they are.
        rows: The number of rows of each level.
        columns: The number of columns of all levels up to each.
    """

    input_order: Tensor | None
    output_order: Tensor | None
    value_order: Tensor

    def __init__(
        self,
        layer: MaskedLinear,
        input_order: Sequence[int] | None,
        output_order: Sequence[int] | None,
        rows: Sequence[int],
        columns: Sequence[int],
    ) -> None:
        super().__init__()
        self.rows, self.columns = list(rows), list(columns)
        self.is_sparse = layer.engine == "sparse"
        self.register_buffer("input_order", _index(input_order), persistent=False)
        self.register_buffer("output_order", _index(output_order), persistent=False)
        if self.is_sparse:
            mask = layer.sparse_mask()
            row, column = mask.indices.numpy()
            row = _places(output_order, mask.shape[0])[row]
            column = _places(input_order, mask.shape[1])[column]
            kept = np.flatnonzero(column >= 0)
            order = kept[np.lexsort((column[kept], row[kept]))]
            self.register_buffer("value_order", torch.from_numpy(order), persistent=False)
            stops = np.searchsorted(row[order], np.cumsum(self.rows))
            self.patterns = nn.ModuleList()
            starts = [0, *stops[:-1]]
            firsts = np.cumsum(self.rows) - self.rows
            for first, start, stop, size, width in zip(
                firsts, starts, stops, self.rows, self.columns, strict=True
            ):
                inside = order[start:stop]
                part = SparseMask.from_pairs(row[inside] - first, column[inside], (size, width))
                self.patterns.append(SparsePattern(part))

    def apply_to(self, weights: Tensor, bias: Tensor | None) -> list[LevelRows]:
        """Cut the layer's entries and biases into the rows of each level."""
        if bias is not None and self.output_order is not None:
            bias = bias[self.output_order]
        biases: Sequence[Tensor | None] = [None] * len(self.rows)
        if bias is not None:
            biases = bias.split(self.rows) if len(self.rows) > 1 else [bias]
        if self.is_sparse:
            patterns = [pattern for pattern in self.patterns if isinstance(pattern, SparsePattern)]
            values = weights[self.value_order].split([pattern.nnz for pattern in patterns])
            return [LevelRows(v, b, pattern) for v, b, pattern in zip(values, biases, patterns, strict=True)]
        if self.input_order is not None:
            weights = weights[:, self.input_order]
        if self.output_order is not None:
            weights = weights[self.output_order]
        blocks = weights.split(self.rows) if len(self.rows) > 1 else [weights]
        return [
            LevelRows(block if width == block.shape[1] else block[:, :width], b)
            for block, width, b in zip(blocks, self.columns, biases, strict=True)
        ]


def _cut(cut: nn.Module, weights: Weights) -> list[LevelRows]:
    assert isinstance(cut, LevelCut)
    return cut.apply_to(*weights)


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


def _index(order: Sequence[int] | None) -> Tensor | None:
    return None if order is None else torch.tensor(order, dtype=torch.long)


def _places(order: Sequence[int] | None, size: int) -> np.ndarray:
    """The new place of each index; −1 where it is left out."""
    if order is None:
        return np.arange(size)
    places = np.full(size, -1)
    places[list(order)] = np.arange(len(order))
    return places
