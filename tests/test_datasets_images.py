"""Image data from every file format; the real files are read where they are at hand."""

import gzip
import hashlib
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from pyro_graphflows import GraphflowsError, MissingExtraError, datasets
from pyro_graphflows.datasets import (
    BinarizedBatches,
    binarize,
    binarized_mnist,
    cifar10,
    dequantize,
    digits,
    load_images,
    mnist,
    omniglot,
)
from pyro_graphflows.datasets.checksums import CHECKSUMS

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_files = pytest.mark.skipif(not (REAL / "images").is_dir(), reason="no image files at hand")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch):
    monkeypatch.delenv(datasets.VARIABLE, raising=False)


def pixels(*shape, top=256):
    return RNG.integers(top, size=shape).astype(np.uint8)


def mostly_black(number):
    """Images of the size of MNIST that are packed fast."""
    images = np.zeros((number, 28, 28), np.uint8)
    images[:, 3:5, 6:8] = pixels(number, 2, 2)
    return images


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def same(tensor, array):
    assert np.array_equal(tensor.numpy(), array)


def test_digits():
    from sklearn.datasets import load_digits

    data = digits()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1297, 200, 300]
    assert (data.num_levels, data.shape, data.train.dtype) == (17, (8, 8), torch.uint8)
    together = torch.cat([data.train, data.validation, data.test]).reshape(1797, 64).numpy()
    original = load_digits().data.astype(np.uint8)
    assert np.array_equal(np.sort(together.view("V64"), 0), np.sort(original.view("V64"), 0))
    rows = {row.tobytes(): label for row, label in zip(original, load_digits().target, strict=True)}
    for image, label in zip(data.test.reshape(-1, 64).numpy(), data.test_labels.tolist(), strict=True):
        assert rows[image.tobytes()] == label
    assert torch.equal(digits().train, data.train)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "sklearn.datasets", None
    )  # what Python does for a module that is not there
    with pytest.raises(MissingExtraError, match=r"pip install 'pyro-graphflows\[datasets\]'") as caught:
        load_images("digits")
    assert isinstance(caught.value, GraphflowsError)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
def test_mnist_from_idx(tmp_path, packed, separator):
    arrays = [mostly_black(50_100), pixels(50_100, top=10), mostly_black(30), pixels(30, top=10)]
    names = ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"]
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, array in zip(names, arrays, strict=True):
        stem = separator.join(name.rsplit("-", 1)) + "-ubyte"
        content = gzip.compress(idx(array), 1) if packed else idx(array)
        (folder / (stem + ".gz" * packed)).write_bytes(content)
    data = mnist(tmp_path, verify=False)
    same(data.train, arrays[0][:50_000])
    same(data.validation, arrays[0][50_000:])
    same(data.test, arrays[2])
    same(data.train_labels, arrays[1][:50_000])
    same(data.test_labels, arrays[3])
    with pytest.raises(
        GraphflowsError, match=r"Expected MNIST training images with the SHA-256 741c.*verify=False"
    ):
        mnist(tmp_path)


def test_damaged_idx(tmp_path):
    for name in ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"]:
        (tmp_path / f"{name}-ubyte").write_bytes(idx(pixels(5, 2))[:-3])
    with pytest.raises(GraphflowsError, match=r"Expected 10 bytes after the header .*; got 7"):
        mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"<html>")
    with pytest.raises(GraphflowsError, match="does not begin like one"):
        mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(GraphflowsError, match="t10k-images-idx3-ubyte are missing"):
        mnist(tmp_path)


def test_damaged_archives(tmp_path):
    """Each kind of damage is reported as such, with the file: a cut-off end, a changed byte, a packed file cut off."""
    path = tmp_path / "mnist.npz"
    arrays = {"train_images": pixels(30, 28, 28), "train_labels": pixels(30, top=10)}
    arrays |= {"test_images": pixels(20, 28, 28), "test_labels": pixels(20, top=10)}
    np.savez(path, **arrays)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GraphflowsError, match=r"mnist\.npz to be a NumPy archive; it cannot be read"):
        mnist(tmp_path)
    place = whole.index(arrays["test_images"].tobytes()[:40])
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(GraphflowsError, match=r"'test_images' in .*mnist\.npz; it cannot be read .* damaged"):
        mnist(tmp_path)
    path.unlink()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(gzip.compress(bytes(range(100)))[:-20])
    with pytest.raises(GraphflowsError, match=r"train-images-idx3-ubyte\.gz; it cannot be unpacked"):
        mnist(tmp_path)


def test_mnist_from_archive(tmp_path):
    arrays = {
        "train_images": mostly_black(50_010),
        "train_labels": pixels(50_010, top=10),
        "test_images": pixels(20, 28, 28),
        "test_labels": pixels(20, top=10),
    }
    np.savez(tmp_path / "mnist.npz", **arrays)
    data = mnist(tmp_path, verify=False)
    same(data.validation, arrays["train_images"][50_000:])
    np.savez(tmp_path / "mnist.npz", x_train=pixels(2))
    with pytest.raises(GraphflowsError, match=r"Expected the array 'train_images' .* it has \['x_train'\]"):
        mnist(tmp_path)
    (tmp_path / "mnist.npz").write_bytes(b"no archive")
    with pytest.raises(GraphflowsError, match="cannot be read"):
        mnist(tmp_path)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (
            {"train_images": pixels(30, 784)},
            r"training images .* shape \(n, 28, 28\); got uint8 and \(30, 784\)",
        ),
        ({"test_images": np.zeros((20, 28, 28))}, "test images as numbers of type uint8 .* got float64"),
        ({"train_labels": pixels(29, top=10)}, r"a label, a whole number, for each of 30 .* shape \(29,\)"),
        ({"test_labels": np.zeros(20)}, "a label, a whole number, .* type float64"),
        ({"test_labels": np.arange(20)}, "labels from 0 to 9 of MNIST test images; got 0 to 19"),
    ],
)
def test_arrays_of_another_kind(tmp_path, changed, match):
    """What the checksum of the bytes does not show, and what is there without one."""
    arrays = {"train_images": pixels(30, 28, 28), "train_labels": pixels(30, top=10)}
    arrays |= {"test_images": pixels(20, 28, 28), "test_labels": pixels(20, top=10)}
    np.savez(tmp_path / "mnist.npz", **(arrays | changed))
    with pytest.raises(GraphflowsError, match=match):
        mnist(tmp_path, verify=False)


def test_binarized_mnist(tmp_path):
    parts = [pixels(7, 784, top=2), pixels(3, 784, top=2), pixels(4, 784, top=2)]
    for name, part in zip(("train", "valid", "test"), parts, strict=True):
        rows = "\n".join(" ".join(map(str, row)) for row in part)
        (tmp_path / f"binarized_mnist_{name}.amat").write_text(rows + " \n")
    from_text = binarized_mnist(tmp_path, verify=False)
    packed = {
        f"{k}_bits": np.packbits(p, axis=1) for k, p in zip(("train", "valid", "test"), parts, strict=True)
    }
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "images" / "binarized_mnist_larochelle.npz", **packed)
    from_archive = binarized_mnist(tmp_path, verify=False)
    for data in (from_text, from_archive):
        same(data.train, parts[0].reshape(-1, 28, 28))
        same(data.validation, parts[1].reshape(-1, 28, 28))
        same(data.test, parts[2].reshape(-1, 28, 28))
        assert data.num_levels == 2
    with pytest.raises(GraphflowsError, match="SHA-256"):
        binarized_mnist(tmp_path)
    (tmp_path / "images" / "binarized_mnist_larochelle.npz").unlink()
    (tmp_path / "binarized_mnist_train.amat").write_text("0 1 2\n")
    with pytest.raises(GraphflowsError, match="rows of 784 zeros and ones"):
        binarized_mnist(tmp_path)


def test_omniglot(tmp_path):
    split = np.repeat([0, 1, 2], [1400, 20, 3]).astype(np.uint8)
    images, alphabet = pixels(1423, 28, 28), pixels(1423, top=50)
    np.savez(tmp_path / "omniglot28.npz", images=images, split=split, alphabet=alphabet)
    data = omniglot(tmp_path, verify=False)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [55, 1345, 20]
    together = torch.cat([data.train, data.validation]).reshape(1400, -1).numpy()
    assert np.array_equal(
        np.sort(together.view("V784"), 0), np.sort(images[:1400].reshape(1400, -1).view("V784"), 0)
    )
    same(data.test, images[1400:1420])
    same(data.test_labels, alphabet[1400:1420])
    with pytest.raises(GraphflowsError, match="SHA-256"):
        omniglot(tmp_path)
    # the matrix file has one image a column, column by column
    one_hot = np.eye(50)[:, alphabet.astype(int)]
    columns = images.transpose(0, 2, 1).reshape(1423, -1).T / 255
    matrices = {"data": columns[:, :1400], "testdata": columns[:, 1400:1420]}
    matrices |= {"target": one_hot[:, :1400], "testtarget": one_hot[:, 1400:1420]}
    savemat(tmp_path / "chardata.mat", matrices)
    from_matrix = omniglot(tmp_path)
    for field in ("train", "validation", "test", "train_labels", "test_labels"):
        assert torch.equal(getattr(from_matrix, field), getattr(data, field)), field
    savemat(tmp_path / "chardata.mat", {"data": columns})
    with pytest.raises(GraphflowsError, match=r"it lacks \['testdata', 'target', 'testtarget'\]"):
        omniglot(tmp_path)
    for data in (255 * columns, columns[:700]):
        savemat(tmp_path / "chardata.mat", matrices | {"data": data})
        with pytest.raises(GraphflowsError, match="images of 784 numbers from 0 to 1 as the columns"):
            omniglot(tmp_path)
    whole = (tmp_path / "chardata.mat").read_bytes()
    for damaged in (b"", b"<html>" * 100, whole[: len(whole) // 2]):
        (tmp_path / "chardata.mat").write_bytes(damaged)
        with pytest.raises(
            GraphflowsError, match=r"Expected a MATLAB file .*chardata\.mat; it cannot be read"
        ):
            omniglot(tmp_path)


def test_cifar10(tmp_path, monkeypatch):
    images, labels = pixels(60, 32, 32, 3), pixels(60, top=10)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for i, name in enumerate(names):
        part = slice(10 * i, 10 * i + 10)
        colours = images[part].transpose(0, 3, 1, 2).reshape(10, -1)
        (folder / name).write_bytes(np.concatenate([labels[part, None], colours], 1).tobytes())
    data = cifar10(tmp_path, verify=False)
    same(data.train, images[:45])
    same(data.validation, images[45:50])
    same(data.test, images[50:])
    same(data.train_labels, labels[:45])
    same(data.test_labels, labels[50:])
    with pytest.raises(GraphflowsError, match="SHA-256"):
        cifar10(tmp_path)
    checksums = {
        "first 4,000 CIFAR-10 training images": images[:50],
        "first 1,000 CIFAR-10 test images": images[50:],
    }
    for name, part in checksums.items():
        monkeypatch.setitem(CHECKSUMS, name, hashlib.sha256(part.tobytes()).hexdigest())
    with pytest.raises(
        GraphflowsError, match=r"50,000 images for training and 10,000 for testing .* got 50 and 10"
    ):
        cifar10(tmp_path)  # batches cut off between records
    (folder / "data_batch_2.bin").write_bytes(bytes(3073) + b"\xff" * 3073)
    with pytest.raises(GraphflowsError, match="labels from 0 to 9 of CIFAR-10 training images; got 0 to 255"):
        cifar10(tmp_path, verify=False)
    (folder / "test_batch.bin").write_bytes(b"123")
    with pytest.raises(GraphflowsError, match="records of 3,073 bytes"):
        cifar10(tmp_path)


def test_no_files(tmp_path, monkeypatch):
    with pytest.raises(
        GraphflowsError, match=r"none was given\. Pass it .* PYRO_GRAPHFLOWS_DATA.*mnist.npz; or train-"
    ):
        mnist()
    with pytest.raises(GraphflowsError, match="is not a folder"):
        omniglot(tmp_path / "nowhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(GraphflowsError, match=f"Expected MNIST in '{tmp_path}'"):
        mnist("~")
    monkeypatch.setenv(datasets.VARIABLE, str(tmp_path))
    with pytest.raises(
        GraphflowsError, match=r"Expected CIFAR-10 in .*Folders looked at: \., images.*Nothing is downl"
    ):
        load_images("cifar10")
    with pytest.raises(GraphflowsError, match="Expected a data set among digits, mnist"):
        load_images("imagenet")


@needs_files
@pytest.mark.parametrize(
    ("name", "sizes", "shape", "mean"),
    [
        ("mnist", (50_000, 10_000, 10_000), (28, 28), None),
        (
            "binarized_mnist",
            (50_000, 10_000, 10_000),
            (28, 28),
            0.13251,
        ),  # the published mean of the test pixels
        ("omniglot", (23_000, 1345, 8070), (28, 28), None),
        ("cifar10", (3600, 400, 1000), (32, 32, 3), None),
    ],
)
def test_real_files(name, sizes, shape, mean):
    data = load_images(name, REAL)
    assert tuple(map(len, (data.train, data.validation, data.test))) == sizes
    assert data.shape == shape
    assert data.train.dtype == torch.uint8
    assert data.train.max() == data.num_levels - 1
    if mean is not None:
        assert data.test.double().mean().item() == pytest.approx(mean, abs=1e-5)


@needs_files
def test_labels_of_binarized_mnist():
    """No pixel is set where the sorted grey image is black, none unset where it is white: the order is right."""
    bits, gray = load_images("binarized_mnist", REAL), load_images("mnist", REAL)
    order = gray.test_labels.sort(stable=True).indices
    assert torch.equal(bits.test_labels, gray.test_labels[order])
    assert not ((bits.test == 1) & (gray.test[order] == 0)).any()
    assert not ((bits.test == 0) & (gray.test[order] == 255)).any()


def test_binarize():
    gray = torch.tensor([0, 4, 16]).expand(20_000, 3)
    bits = binarize(gray, 17, torch.Generator().manual_seed(0))
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    means = bits.mean(0)
    assert means[0] == 0
    assert means[2] == 1
    assert abs(means[1] - 0.25) < 4.5 * (0.25 * 0.75 / 20_000) ** 0.5
    assert torch.equal(binarize(torch.tensor([0, 1]), 2), torch.tensor([0.0, 1.0]))


def test_dequantize():
    values = dequantize(torch.arange(4).repeat(1000), 4, torch.Generator().manual_seed(0))
    assert torch.equal((values * 4).floor().long(), torch.arange(4).repeat(1000))
    assert (values * 4 % 1).mean().item() == pytest.approx(0.5, abs=4.5 / (12 * 4000) ** 0.5)


def test_every_epoch_draws_its_own_batches():
    images = torch.full((10, 2, 2), 8)
    images[:, 0, 0] = torch.arange(10) % 2 * 16
    batches = BinarizedBatches(images, 17, 4)
    assert len(batches) == 3
    epochs = [torch.cat([batch[0] for batch in batches]) for _ in range(2)]
    assert [len(batch[0]) for batch in batches] == [4, 4, 2]
    for epoch in epochs:
        assert epoch[:, 0, 0].sum() == 5  # each image once
    assert not torch.equal(*epochs)
    torch.manual_seed(1)
    first = torch.cat([batch[0] for batch in batches])
    torch.manual_seed(1)
    assert torch.equal(torch.cat([batch[0] for batch in batches]), first)
