"""Linear maps on the edges of a graph, in natural units."""

import pytest
import torch

from pyro_graphflows.transforms.edge_linear import EdgeUnits


@pytest.mark.parametrize("parents", [[[], [0], [0]], [[0, 1], [], [0, 1, 2], [1, 2]]])
def test_weights_of_edges(parents):
    units = EdgeUnits(parents, 3)
    root = torch.randn(3, 3)
    units.whiteners.fit_(root @ root.T + 0.01 * torch.eye(3))
    with torch.no_grad():
        units.unit.uniform_(0.5, 2.0)
        units.offset.normal_()
        units.bias.normal_()
    edges = sum(map(len, parents))
    weight, bias = torch.randn(edges, 3), torch.randn(len(parents), 3)
    found, biases = units(weight, bias)
    torch.testing.assert_close(biases, units.bias + units.unit * bias)
    start = 0
    for v, own in enumerate(parents):
        if not own:
            continue
        part = slice(start, start + len(own))
        start += len(own)
        number = units.whiteners.sets.index(tuple(own))
        matrix = units.whiteners.embedded(number, 3)[own][:, own] if len(own) > 1 else torch.eye(1)
        if len(own) == 1 and units.whiteners.groups:
            matrix = units.whiteners.embedded(number, 3)[own][:, own]
        wanted = matrix.T @ weight[part] * units.unit[v] / units.whiteners.rank[number].sqrt()
        torch.testing.assert_close(found[part], units.offset[part] + wanted)
