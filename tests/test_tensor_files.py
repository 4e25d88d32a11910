"""Files of named tensors: what was written comes back, and what is damaged is refused."""

import json
import struct

import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.tensor_files import read_tensors, write_tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float64])
def test_tensors_of_all_types(dtype, tmp_path):
    given = {"a": torch.tensor([[1, 0], [0, 1]]).to(dtype), "empty": torch.zeros(0, 3, dtype=dtype)}
    given["number"], given["turned"] = given["a"][0, 0], torch.arange(6).reshape(2, 3).to(dtype).T
    write_tensors(tmp_path / "file", given, {"über": "text"})
    found, texts = read_tensors(tmp_path / "file")
    assert texts == {"über": "text"}
    assert list(found) == list(given)
    for name, value in given.items():
        torch.testing.assert_close(found[name], value)


def test_tensors_that_the_format_has_not(tmp_path):
    with pytest.raises(GraphflowsError, match=r"types that safetensors has; got torch\.complex128"):
        write_tensors(tmp_path / "file", {"a": torch.zeros(2, dtype=torch.complex128)})


def test_a_file_of_the_format_that_others_wrote_has_no_checksum(tmp_path):
    header = json.dumps({"b": {"dtype": "I32", "shape": [1], "data_offsets": [8, 12]},
                         "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()  # fmt: skip
    numbers = struct.pack("<ffi", 1.0, 2.0, 3)
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + numbers)
    with pytest.raises(GraphflowsError, match="its checksum does not fit its content"):
        read_tensors(tmp_path / "file")


def test_tensors_that_share_memory_or_carry_gradients_are_written_as_they_look(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    given = {
        "whole": whole,
        "again": whole,
        "column": whole[:, 1],
        "wide": whole[:1].expand(5, 4),
        "twice": 2 * whole,
    }
    write_tensors(tmp_path / "file", given)
    found, texts = read_tensors(tmp_path / "file")
    assert texts == {}
    for name, value in given.items():
        assert torch.equal(found[name], value)
        assert not found[name].requires_grad
    found["whole"].zero_()
    assert torch.equal(found["again"], whole)


def test_special_numbers_keep_their_bits(tmp_path):
    numbers = torch.tensor([float("nan"), float("inf"), -0.0, 5e-324, 0.1])
    write_tensors(tmp_path / "file", {"numbers": numbers})
    found = read_tensors(tmp_path / "file")[0]["numbers"]
    assert torch.equal(found.view(torch.int64), numbers.view(torch.int64))


def test_a_file_without_tensors_and_one_that_is_written_again(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write_tensors(path, {}, {"about": "nothing"})
    assert read_tensors(path) == ({}, {"about": "nothing"})
    write_tensors(path, {"a": torch.ones(2)})
    tensors, texts = read_tensors(str(path))
    assert tensors["a"].tolist() == [1.0, 1.0]
    assert texts == {}
    assert list(path.parent.iterdir()) == [path]


def test_every_byte_of_a_small_file_counts(tmp_path):
    path = tmp_path / "file"
    given, about = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3])}, {"about": "two tensors"}
    write_tensors(path, given, about)
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(GraphflowsError, match=f"at {path};.* It is damaged or another"):
            read_tensors(path)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(GraphflowsError, match="It is damaged or another"):
            read_tensors(path)


def test_where_there_is_no_file(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(
            GraphflowsError, match=f"Expected a file that can be read at {path}; there is none"
        ):
            read_tensors(path)
