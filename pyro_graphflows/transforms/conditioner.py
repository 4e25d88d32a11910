r"""A masked network in front of a faithful flow: what the parents say, in any nonlinear way.

The maps of a variable take numbers from its parents: the pre-activations of hidden units, shifts and log-scales.
A linear map gives them (:mod:`~pyro_graphflows.transforms.edge_linear`), so that a location which is a nonlinear
function of the parents can only come out of the bounded residual maps. A conditioner adds an arbitrary function
of the parents. Its hidden units have label sets and no owner, and see final values alone, as those of a MADE
network, so that variable v still depends on exactly its parents and both directions of its map stay one-dimensional.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_graphflows.nn.masked import MaskedLinear
from pyro_graphflows.nn.mlp import LevelEvaluation, MaskedMLP

__all__ = ["Conditioner", "Supply"]


class Conditioner(nn.Module):
    r"""Numbers for each variable as functions of its parents, evaluated at once or level by level.

    Args:
        parents: For each variable, the inputs it depends on; inputs are numbered with the context first and then the
            variables.
        num_context: The number of context columns, C.
        level_sizes: The number of variables of each level; variables are numbered by level.
        num_outputs: K.
        units_per_set: The hidden units of one layer for each distinct set of parents.
        hidden_layers: The number of hidden layers.
        activation: An activation or its name.
        engine: The engine of the layers; see :class:`~pyro_graphflows.nn.masked.MaskedLinear`.

    Shape:
        - Values are features-first: context :math:`(C, *batch)`, variables :math:`(n, *batch)`; batch shapes broadcast.
        - Output: :math:`(n, K, *batch)`.
    """

    def __init__(
        self,
        parents: Sequence[Sequence[int]],
        num_context: int,
        level_sizes: Sequence[int],
        num_outputs: int,
        *,
        units_per_set: int,
        hidden_layers: int,
        activation: str | nn.Module = "elu",
        engine: str = "auto",
    ) -> None:
        super().__init__()
        levels = [level for level, size in enumerate(level_sizes) for _ in range(size)]
        self.num_levels = len(level_sizes)
        self.mlp = MaskedMLP(
            parents,
            num_context + len(parents),
            num_params=num_outputs,
            units_per_set=units_per_set,
            hidden_layers=hidden_layers,
            activation=activation,
            input_levels=[0] * num_context + [level + 1 for level in levels],
            output_levels=levels,
            skip=False,
            engine=engine,
        )
        # The linear map of the flow has a bias.
        self._last.bias = None

    @property
    def _last(self) -> MaskedLinear:
        last = self.mlp.layers[-1]
        assert isinstance(last, MaskedLinear)
        return last

    @torch.no_grad()
    def scale_output_(self, factor: float, variables: Sequence[int] | None = None) -> None:
        """Multiply the last layer's weights of some variables, or of all, by a number."""
        last, count = self._last, self.mlp.num_params
        chosen = torch.ones(last.out_features, dtype=torch.bool, device=last.weight.device)
        if variables is not None:
            chosen.fill_(False)
            chosen.view(-1, count)[list(variables)] = True
        rows = chosen if last.engine == "dense" else chosen[last.pattern.row]
        last.weight[rows] *= factor

    def forward(self, context: Tensor | None, values: Tensor) -> Tensor:
        """Return the numbers of all variables, (D, K, N), for context and values of equal batch size N."""
        inputs = values if context is None else torch.cat([context, values])
        return self.mlp(inputs.t()).permute(1, 2, 0)

    def start(self, context: Tensor | None) -> "Supply":
        """Begin an evaluation level by level."""
        return Supply(self.mlp.start(), context)


class Supply:
    """The numbers of one level, and the way to those of the next; never changed once made.

    Args:
        evaluation: The network's evaluation at this level.
        new: The values that became known, features-first; None if there are none.
    """

    def __init__(self, evaluation: LevelEvaluation, new: Tensor | None) -> None:
        self._evaluation = evaluation.fork()
        out = self._evaluation.step(None if new is None else new.movedim(0, -1))
        self.values = out.movedim((-2, -1), (0, 1))  # (n, K, *batch)

    def accept(self, values: Tensor) -> "Supply":
        """Return the numbers of the next level, given this level's values, features-first."""
        return Supply(self._evaluation, values)
