"""The eleven models whose steps are timed, and the scripts that time them and count what few joint samples cost."""

import math

import pytest
import torch
from pyro import poutine

from benchmarks import compiled, start_draws
from benchmarks.guide_problems import STEPS
from pyro_graphflows.infer import compiled as compiled_module


def test_every_model_runs_with_its_data():
    assert len(STEPS) == 11
    torch.set_default_dtype(torch.float32)  # that of the benchmarks
    for key, make in STEPS.items():
        problem = make()
        trace = poutine.trace(problem.model).get_trace(*problem.test)
        assert math.isfinite(trace.log_prob_sum()), key


def test_a_model_is_measured_and_shown(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(compiled_module, "BACKEND", "eager")
    record = compiled.measure("readme", rounds=1)
    assert record["report"].startswith("compiled")
    assert all(record["ms"][name] > 0 for name in ("AutoNormal", "normal", "flow", "captured", "compiled"))
    page = compiled.page({"readme": record})
    assert page.splitlines()[-1].startswith("| README | ")
    refused = {**record, "report": "not compiled: no C++ compiler was found"}
    assert "| – | not compiled: no C++ compiler was found |" in compiled.page({"readme": refused})


def test_the_divergence_of_a_start_is_that_of_a_guide_near_the_posterior(monkeypatch):
    monkeypatch.setattr(start_draws, "PARTICLES", 2)
    assert start_draws.divergence("chain", 1000, 0) == pytest.approx(0.0, abs=2.0)
