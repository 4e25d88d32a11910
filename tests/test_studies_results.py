"""The results of a study: lines that are only appended, by several processes, and what a killed run leaves."""

import json
import multiprocessing
import warnings

import pytest

from studies.results import DamagedLineWarning, Results


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study" / "results.jsonl"


def test_records_come_back_as_they_were(path):
    records = {"b": {"kl": 0.1 + 0.2, "nested": {"ü": [1, None, "\n"]}}, "a": {"huge": 1e300, "nan": [True]}}
    results = Results(path)
    assert results.read() == {}
    assert "a" not in results
    for key, record in records.items():
        results.append(key, record)
    assert list(Results(path).read()) == ["a", "b"]  # sorted by key, whatever was done first
    assert Results(path).read() == records
    assert results.get("b") == records["b"]
    assert results.get("c") is None
    assert path.read_text().count("\n") == 2


def test_the_last_line_of_a_run_counts_and_the_first_stays(path):
    results = Results(path)
    results.append("a", {"test": None})
    first = path.read_bytes()
    assert results.read() == {"a": {"test": None}}
    results.append("a", {"test": 1.0})
    assert results.read() == {"a": {"test": 1.0}}
    assert path.read_bytes().startswith(first)


def test_what_another_object_appends_is_seen(path):
    one, other = Results(path), Results(path)
    one.append("a", {"x": 1})
    assert one.read() == {"a": {"x": 1}}
    other.append("b", {"x": 2})
    assert one.read() == {"a": {"x": 1}, "b": {"x": 2}}
    path.unlink()
    assert one.read() == {}


@pytest.mark.parametrize("length", [1, 20, -2])
def test_an_unfinished_last_line_is_left_out_in_words_and_replaced(path, length):
    results = Results(path)
    results.append("a", {"x": 1})
    whole = path.read_bytes()
    results.append("b", {"x": [2, {"y": 3}]})
    fragment = path.read_bytes()[len(whole) :][:length]
    path.write_bytes(whole + fragment)
    with pytest.warns(
        DamagedLineWarning, match=r"results\.jsonl, line 2: the last line is unfinished .* left out"
    ):
        assert results.read() == {"a": {"x": 1}}
    with pytest.warns(DamagedLineWarning, match="is replaced: a run was killed"):
        results.append("c", {"x": 4})
    assert path.read_bytes().startswith(whole + b'{"key":"c"')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Results(path).read() == {"a": {"x": 1}, "c": {"x": 4}}


def test_a_whole_last_line_without_newline_counts(path):
    results = Results(path)
    results.append("a", {"x": 1})
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert results.read() == {"a": {"x": 1}}
    results.append("b", {"x": 2})
    assert results.read() == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize("line", ['{"key": "b", "x"', "<<<<<<< HEAD", "[1]", '{"x": 1}', ""])
def test_any_other_line_that_cannot_be_read_is_an_error(path, line):
    results = Results(path)
    results.append("a", {"x": 1})
    path.write_text(f"{path.read_text()}{line}\n" + json.dumps({"key": "c"}) + "\n")
    with pytest.raises(ValueError, match=r'results\.jsonl, line 2: expected a JSON object with a "key"'):
        results.read()


def test_a_record_has_no_key_of_its_own(path):
    with pytest.raises(ValueError, match="that of run 'a' has 'b' there"):
        Results(path).append("a", {"key": "b"})
    assert not path.exists()


def append_many(job):
    path, worker = job
    results = Results(path)
    for i in range(40):
        results.append(f"{worker}-{i}", {"filler": "x" * 20_000, "worker": worker})
        assert f"{worker}-{i}" in results
    return worker


def test_processes_append_at_the_same_time(path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert sorted(pool.map(append_many, [(path, worker) for worker in range(3)])) == [0, 1, 2]
    found = Results(path).read()
    assert set(found) == {f"{worker}-{i}" for worker in range(3) for i in range(40)}
    assert all(record["filler"] == "x" * 20_000 for record in found.values())
