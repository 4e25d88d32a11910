"""Shapes as PyTorch has them."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from versions import TORCH

from pyro_graphflows.shapes import broadcast_shapes


@settings(deadline=None)  # PyTorch's own imports much the first time
@given(st.lists(st.lists(st.integers(0, 3), max_size=4).map(tuple), max_size=3))
def test_broadcasting_is_that_of_pytorch(shapes):
    try:
        expected = torch.broadcast_shapes(*shapes)
    except (RuntimeError, ValueError):
        with pytest.raises(RuntimeError, match="do not broadcast"):
            broadcast_shapes(*shapes)
    else:
        assert broadcast_shapes(*shapes) == expected


SCRIPT = """
import sys, torch, pyro, pyro.distributions as dist
from pyro_graphflows.guides import auto_faithful_guide
def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
auto_faithful_guide(model, torch.zeros(5))(torch.zeros(5))
assert not {"torch._dynamo", "sympy"} & set(sys.modules)
"""


@pytest.mark.skipif(TORCH < (2, 6), reason="PyTorch 2.5 imports its compiler by itself")
def test_a_guide_is_made_without_the_compiler_of_pytorch():
    """Its import takes longer than all of set-up."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
