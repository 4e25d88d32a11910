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


def test_a_state_is_put_back_and_buffers_that_have_it_are_not_written_to():
    """A write counts as a change for whatever follows from a buffer, as captured calls do."""
    module = nn.BatchNorm1d(2)
    parameters = ParameterSet(guide=module)
    state = parameters.state()
    with torch.no_grad():
        module.weight.add_(1.0)
        module.running_mean.add_(1.0)
    before = {name: buffer._version for name, buffer in module.named_buffers()}
    parameters.load(state)
    for name, tensor in parameters.state().items():
        assert torch.equal(tensor, state[name])
    written = {name for name, buffer in module.named_buffers() if buffer._version > before[name]}
    assert written == {"running_mean"}
