import pytest
import torch
from torch import nn

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.parameters import ParameterSet


def test_parameter_states_must_fit():
    parameters = ParameterSet(guide=nn.Linear(2, 1))
    with pytest.raises(GraphflowsError, match=r"\['guide.weight'\] differ in name or shape"):
        parameters.load({"guide.weight": torch.zeros(1, 3), "guide.bias": torch.zeros(1)})
    with pytest.raises(GraphflowsError, match=r"\['guide.bias'\] differ"):
        parameters.load({"guide.weight": torch.zeros(1, 2)})
