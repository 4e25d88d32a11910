"""The house stays as small as it was made: few files for set-up and a call."""

import pyro
import torch

from benchmarks.rooms import readme_model, walk
from pyro_graphflows import auto_faithful_guide


def counts(work):
    files, crossings, _ = walk(work)
    return len(files), sum(crossings.values())


def test_set_up_and_a_call_pass_through_few_files():
    pyro.set_rng_seed(0)
    w, y = torch.randn(200), torch.randn(200)
    guides = []
    files, crossings = counts(lambda: guides.append(auto_faithful_guide(readme_model, w, y, family="normal")))
    # Six files and 840 crossings are for curved starts, whose loss is recorded and then evaluated 126 times.
    assert files <= 34
    assert crossings <= 2150
    guides[0](w, y)
    files, crossings = counts(lambda: guides[0](w, y))
    assert files <= 12
    assert crossings <= 70
