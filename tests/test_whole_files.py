"""A file is what it was before or all that is new, whatever goes wrong on the way."""

import os
import stat

import pytest

from pyro_graphflows.whole_files import write_whole


def test_folders_are_made_and_a_file_is_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "notes"
    write_whole(path, lambda file: file.write(b"first"))
    assert path.read_bytes() == b"first"
    write_whole(str(path), lambda file: file.write(b"2nd"))
    assert path.read_bytes() == b"2nd"
    assert list(path.parent.iterdir()) == [path]


def test_nobody_sees_half_of_it(tmp_path):
    path = tmp_path / "notes"
    path.write_bytes(b"before")

    def write(file):
        file.write(b"half of ")
        file.flush()
        assert path.read_bytes() == b"before"
        file.write(b"it")

    write_whole(path, write)
    assert path.read_bytes() == b"half of it"


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_nothing_behind(tmp_path, existed, error):
    path = tmp_path / "notes"
    if existed:
        path.write_bytes(b"before")

    def write(file):
        file.write(b"half of it")
        raise error

    with pytest.raises(type(error)):
        write_whole(path, write)
    assert list(tmp_path.iterdir()) == [path] * existed
    assert not existed or path.read_bytes() == b"before"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_nothing_behind(tmp_path, step, monkeypatch):
    def refuse(*_):
        raise OSError("no space left on the device")

    path = tmp_path / "notes"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_who_may_read_is_as_with_open(tmp_path):
    """The mask of the process decides, and not the way in which the file is written; a private file stays private."""
    path = tmp_path / "notes"
    (tmp_path / "plain").write_bytes(b"")
    write_whole(path, lambda file: file.write(b"new"))
    assert mode_of(path) == mode_of(tmp_path / "plain")
    path.chmod(0o600)
    write_whole(path, lambda file: file.write(b"newer"))
    assert mode_of(path) == 0o600
    assert path.read_bytes() == b"newer"
