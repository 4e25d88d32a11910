import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.checkpoints import (
    Checkpoint,
    load_checkpoint,
    random_state,
    save_checkpoint,
    seeded,
    set_random_state,
)


def test_options_are_checked_when_made(tmp_path):
    assert Checkpoint("run.pt") == Checkpoint("run.pt", every=1, resume=True)
    for path in (3, "", tmp_path, None):
        with pytest.raises(GraphflowsError, match="Expected the path of a checkpoint file"):
            Checkpoint(path)
    for every in (0, 1.5):
        with pytest.raises(GraphflowsError, match="Expected a checkpoint every 1 or more epochs"):
            Checkpoint("run.pt", every=every)


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "run.pt"
    save_checkpoint({"a": torch.ones(2)}, path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("pyro_graphflows.infer.checkpoints.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"a": torch.zeros(2)}, path)
    assert load_checkpoint(path)["a"].tolist() == [1.0, 1.0]
    assert [file.name for file in path.parent.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("name", ["run", "run.pt", "run.safetensors", "run.zip"])
def test_a_name_says_nothing_of_what_is_in_the_file(name, tmp_path):
    save_checkpoint({"a": torch.ones(2)}, tmp_path / name)
    assert load_checkpoint(tmp_path / name)["a"].tolist() == [1.0, 1.0]


def test_random_states_round_trip(tmp_path):
    import random

    import numpy as np

    def draw():
        return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002 - the global generator

    save_checkpoint(random_state(), tmp_path / "state.pt")
    expected = draw()
    with seeded(3):
        inside = draw()
    draw()
    with seeded(3):
        assert draw() == inside
    set_random_state(load_checkpoint(tmp_path / "state.pt"))
    assert draw() == expected
