"""Image data: scikit-learn's digits without a file, and MNIST, its fixed binarisation, Omniglot and CIFAR-10 from one.

Nothing is downloaded. Files are looked for in a folder that is given, or named by the environment variable
``PYRO_GRAPHFLOWS_DATA``, and in the folders inside it that the usual archives unpack to. Both compressed NumPy archives
and the files that the data sets were published as are read:

- MNIST: ``mnist.npz`` (arrays ``train_images``, ``train_labels``, ``test_images``, ``test_labels``), or the four IDX
  files ``train-images-idx3-ubyte`` and so on, packed by gzip or not;
- fixed binarised MNIST: ``binarized_mnist_larochelle.npz`` (``train_bits``, ``valid_bits``, ``test_bits``, rows packed
  by :func:`numpy.packbits`), or ``binarized_mnist_train.amat``, ``..._valid.amat``, ``..._test.amat``;
- Omniglot: ``omniglot28.npz`` (``images``, ``split``, ``alphabet``), or ``chardata.mat``;
- CIFAR-10: ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, or ``cifar10_subset.npz`` (arrays like
  those of MNIST) with the first images of both parts.

What was read is compared with the SHA-256 of the decoded pixels, so a check means the same for every file format.

References:
    [1] LeCun, Cortes and Burges, The MNIST database of handwritten digits.
    [2] Salakhutdinov and Murray (2008), On the quantitative analysis of deep belief networks, ICML; Larochelle and
    Murray (2011), The neural autoregressive distribution estimator, AISTATS (the fixed binarisation).
    [3] Lake, Salakhutdinov and Tenenbaum (2015), Human-level concept learning through probabilistic program induction;
    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR (the split).
    [4] Krizhevsky (2009), Learning multiple layers of features from tiny images.
"""

import gzip
import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError

__all__ = [
    "DATA_SETS",
    "BinarizedBatches",
    "Images",
    "binarize",
    "binarized_mnist",
    "cifar10",
    "dequantize",
    "digits",
    "load_images",
    "mnist",
    "omniglot",
]

VARIABLE = "PYRO_GRAPHFLOWS_DATA"
INNER_FOLDERS = ("", "images", "MNIST/raw", "mnist", "binarized_mnist", "omniglot", "cifar-10-batches-bin")

MNIST_TEST_COUNTS = (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)

# SHA-256 of pixels (row-major bytes, one a pixel; bits packed by numpy.packbits row by row)
CHECKSUMS = {
    "MNIST training images": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "MNIST test images": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "MNIST training labels": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "MNIST test labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
    "binarised MNIST training images": "727146c35424b019f3e350e1e69faa05644a0abaf787e3f4e1a9632220a13906",
    "binarised MNIST validation images": "a256ac44ae26be720fad8616a05ed6ecfd1619930d9a208379bb2a4405df5b6d",
    "binarised MNIST test images": "9fcd8da6f0fdf09b2ba30fe63a0bb784042a0de82563172530229b983e294ff2",
    "Omniglot images (omniglot28.npz)": "32b17fc95e1d2df254bab2e046f2d1f27d5d86c76ef550090a2add48aa21150d",
    "first 4,000 CIFAR-10 training images": "bac45b45504ed1289a3f437be4bfbefece248abbc094a428a0b4dfab00e776ae",
    "first 1,000 CIFAR-10 test images": "da362006b99671213d1a5d856cab2bedf64d40bad4501630ee60f4ceb2d3ec7f",
}


@dataclass(frozen=True)
class Images:
    """A data set of images in three parts.

    Attributes:
        name: Its name.
        train: Training images ``(n, *shape)`` in whole numbers from 0 to ``num_levels - 1``.
        validation: Images to choose by.
        test: Test images.
        num_levels: The number of values a pixel can have; 2 for binary images.
        train_labels: Labels of the training images; empty where there are none.
        test_labels: Labels of the test images; empty where there are none.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    num_levels: int
    train_labels: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of one image."""
        return self.train.shape[1:]


def digits() -> Images:
    """Return the 1,797 digits of scikit-learn, 8 by 8 pixels of 17 levels, in a fixed random order.

    They are split into 1,297, 200 and 300.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    pixels = torch.as_tensor(images[order].astype(np.uint8).reshape(-1, 8, 8))
    classes = torch.as_tensor(labels[order].astype(np.int64))
    return Images(
        "digits", pixels[:1297], pixels[1297:1497], pixels[1497:], 17, classes[:1297], classes[1497:]
    )


def mnist(folder: str | os.PathLike[str] | None = None, *, verify: bool = True) -> Images:
    """Return MNIST with grey levels; the last 10,000 training images are for validation.

    Args:
        folder: Where the files are.
        verify: Whether to compare checksums.

    Raises:
        GraphflowsError: If files are missing, damaged, or not what they should be.
    """
    found = _find("MNIST", folder, ["mnist.npz"], [_idx_names(name) for name in _IDX])
    if isinstance(found, Path):
        with _archive(found) as arrays:
            parts = [
                _array(arrays, key, found)
                for key in ("train_images", "train_labels", "test_images", "test_labels")
            ]
    else:
        parts = [_read_idx(path) for path in found]
    kinds = ("training images", "training labels", "test images", "test labels")
    for array, kind in zip(parts, kinds, strict=True):
        _verify(array, f"MNIST {kind}", verify)
    images, labels, test, test_labels = map(torch.as_tensor, parts)
    return Images(
        "mnist", images[:50_000], images[50_000:], test, 256, labels[:50_000].long(), test_labels.long()
    )


def binarized_mnist(folder: str | os.PathLike[str] | None = None, *, verify: bool = True) -> Images:
    """Return MNIST in its fixed binarisation, in the parts of 50,000, 10,000 and 10,000 it was published with.

    There are no labels, but the test images are those of MNIST sorted by class, so theirs are known.

    Args:
        folder: Where the files are.
        verify: Whether to compare checksums.

    Raises:
        GraphflowsError: If files are missing, damaged, or not what they should be.
    """
    kinds = ("train", "valid", "test")
    found = _find(
        "fixed binarised MNIST",
        folder,
        ["binarized_mnist_larochelle.npz"],
        [[f"binarized_mnist_{kind}.amat"] for kind in kinds],
    )
    if isinstance(found, Path):
        with _archive(found) as arrays:
            packed = [_array(arrays, f"{kind}_bits", found) for kind in kinds]
    else:
        packed = [_read_amat(path) for path in found]
    parts = []
    for array, kind in zip(packed, ("training", "validation", "test"), strict=True):
        _verify(array, f"binarised MNIST {kind} images", verify)
        parts.append(torch.as_tensor(np.unpackbits(array, axis=1).reshape(-1, 28, 28)))
    none = torch.zeros(0, dtype=torch.long)
    counts = torch.tensor(MNIST_TEST_COUNTS)
    labels = torch.arange(10).repeat_interleave(counts) if len(parts[2]) == counts.sum() else none
    return Images("binarized_mnist", parts[0], parts[1], parts[2], 2, none, labels)


def omniglot(folder: str | os.PathLike[str] | None = None, *, verify: bool = True) -> Images:
    """Return Omniglot in 28 by 28 pixels; 1,345 training images, taken at random once, are for validation.

    ``omniglot28.npz`` has a split of the sizes of Burda et al. (24,345 and 8,070) of its own, and ``chardata.mat``
    theirs, so likelihoods of the two are not comparable to the decimal.

    Args:
        folder: Where the files are.
        verify: Whether to compare checksums (there is none for ``chardata.mat``).

    Raises:
        GraphflowsError: If files are missing, damaged, or not what they should be.
    """
    found = _find("Omniglot", folder, ["chardata.mat", "omniglot28.npz"], [])
    assert isinstance(found, Path)
    if found.suffix == ".mat":
        from scipy.io import loadmat

        content = loadmat(found)
        keys = ("data", "testdata", "target", "testtarget")
        missing = [key for key in keys if key not in content]
        if missing:
            raise GraphflowsError(f"Expected the arrays {keys} in {found}; it lacks {missing}.")
        images, test = (  # one image a column, itself column by column
            np.rint(255 * content[key].T.reshape(-1, 28, 28).transpose(0, 2, 1)).astype(np.uint8)
            for key in keys[:2]
        )
        labels, test_labels = (content[key].argmax(0).astype(np.int64) for key in keys[2:])
    else:
        with _archive(found) as arrays:
            pixels, split, alphabet = (_array(arrays, key, found) for key in ("images", "split", "alphabet"))
        _verify(pixels, "Omniglot images (omniglot28.npz)", verify)
        images, test = pixels[split == 0], pixels[split == 1]
        labels, test_labels = (alphabet[split == part].astype(np.int64) for part in (0, 1))
    order = np.random.default_rng(0).permutation(len(images))
    kept, held_out = np.sort(order[1345:]), np.sort(order[:1345])
    return Images(
        "omniglot",
        torch.as_tensor(images[kept]),
        torch.as_tensor(images[held_out]),
        torch.as_tensor(test),
        256,
        torch.as_tensor(labels[kept]),
        torch.as_tensor(test_labels),
    )


def cifar10(folder: str | os.PathLike[str] | None = None, *, verify: bool = True) -> Images:
    """Return CIFAR-10, ``(height, width, colour)``; the last tenth of the training images is for validation.

    Args:
        folder: Where the files are.
        verify: Whether to compare the checksums of the first images.

    Raises:
        GraphflowsError: If files are missing, damaged, or not what they should be.
    """
    names = [[f"data_batch_{i}.bin"] for i in range(1, 6)] + [["test_batch.bin"]]
    found = _find("CIFAR-10", folder, ["cifar10_subset.npz"], names, files_first=True)
    if isinstance(found, Path):
        with _archive(found) as arrays:
            images, labels, test, test_labels = (
                _array(arrays, key, found)
                for key in ("train_images", "train_labels", "test_images", "test_labels")
            )
    else:
        batches = [_read_cifar(path) for path in found]
        images, labels = (np.concatenate([batch[k] for batch in batches[:-1]]) for k in (0, 1))
        test, test_labels = batches[-1]
    _verify(images[:4000], "first 4,000 CIFAR-10 training images", verify)
    _verify(test[:1000], "first 1,000 CIFAR-10 test images", verify)
    split = len(images) - len(images) // 10
    return Images(
        "cifar10",
        torch.as_tensor(images[:split]),
        torch.as_tensor(images[split:]),
        torch.as_tensor(test),
        256,
        torch.as_tensor(labels[:split]).long(),
        torch.as_tensor(test_labels).long(),
    )


DATA_SETS: dict[str, Callable[..., Images]] = {
    "digits": lambda folder=None: digits(),
    "mnist": mnist,
    "binarized_mnist": binarized_mnist,
    "omniglot": omniglot,
    "cifar10": cifar10,
}


def load_images(name: str, folder: str | os.PathLike[str] | None = None) -> Images:
    """Return a data set by its name.

    Args:
        name: ``"digits"``, ``"mnist"``, ``"binarized_mnist"``, ``"omniglot"`` or ``"cifar10"``.
        folder: Where the files are; by default what ``PYRO_GRAPHFLOWS_DATA`` names. The digits need none.

    Raises:
        GraphflowsError: If the name is unknown, or files are missing, damaged, or not what they should be.

    Example:
        >>> data = load_images("digits")
        >>> data.train.shape, data.num_levels, data.shape
        (torch.Size([1297, 8, 8]), 17, torch.Size([8, 8]))
    """
    if name not in DATA_SETS:
        raise GraphflowsError(f"Expected a data set among {', '.join(DATA_SETS)}; got {name!r}.")
    return DATA_SETS[name](folder)


# ---------------------------------------------------------------------------------------------- pixels as numbers
def binarize(images: Tensor, num_levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw each pixel as a Bernoulli variable whose probability is its grey value; binary images stay as they are.

    Args:
        images: Whole numbers from 0 to ``num_levels - 1``.
        num_levels: The number of levels.
        generator: A source of random numbers; by default the global one.
    """
    if num_levels == 2:
        return images.to(torch.get_default_dtype())
    gray = images.to(torch.get_default_dtype()) / (num_levels - 1)
    return torch.bernoulli(gray, generator=generator)


def dequantize(images: Tensor, num_levels: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Add uniform noise to whole numbers and scale them to [0, 1]: :math:`(k + u) / L`.

    A density of the result, in bits per dimension plus :math:`\log_2 L`, bounds that of the whole numbers.

    Args:
        images: Whole numbers from 0 to ``num_levels - 1``.
        num_levels: The number of levels :math:`L`.
        generator: A source of random numbers; by default the global one.
    """
    values = images.to(torch.get_default_dtype())
    noise = torch.rand(values.shape, generator=generator, device=values.device, dtype=values.dtype)
    return (values + noise) / num_levels


class BinarizedBatches:
    """Batches of images for :func:`~pyro_graphflows.fit`, binarised or dequantised anew each time (global generator).

    Args:
        images: Whole numbers ``(n, *shape)``.
        num_levels: The number of levels.
        batch_size: The size of a batch; the last one of an epoch is what is left.
        draw: :func:`binarize` or :func:`dequantize`.
    """

    def __init__(
        self,
        images: Tensor,
        num_levels: int,
        batch_size: int,
        draw: Callable[[Tensor, int], Tensor] = binarize,
    ) -> None:
        self.dataset: Sequence[Tensor] | Tensor = images
        self.images = images
        self.num_levels = num_levels
        self.batch_size = batch_size
        self.draw = draw

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = torch.randperm(len(self.images)).to(self.images.device)
        for index in order.split(self.batch_size):
            yield [self.draw(self.images[index], self.num_levels)]


# ----------------------------------------------------------------------------------------------------------- files
_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def _idx_names(name: str) -> list[str]:
    dotted = ".".join(name.rsplit("-", 1))
    return [f"{stem}-ubyte{end}" for end in ("", ".gz") for stem in (name, dotted)]


def _find(
    what: str,
    folder: str | os.PathLike[str] | None,
    archives: Sequence[str],
    files: Sequence[Sequence[str]],
    *,
    files_first: bool = False,
) -> Path | list[Path]:
    """Return the archive, or the list of files that together are a data set (each with alternative names)."""
    root = folder if folder is not None else os.environ.get(VARIABLE)
    if root is None:
        raise GraphflowsError(
            f"Expected a folder with {what}; none was given. Pass it (--data in the examples) or set the environment "
            f"variable {VARIABLE}. {_wanted(archives, files)}"
        )
    if not Path(root).is_dir():
        raise GraphflowsError(f"Expected a folder with {what}; {str(root)!r} is not a folder.")
    folders = [Path(root) / inner for inner in INNER_FOLDERS]
    archive = next((f / name for f in folders for name in archives if (f / name).is_file()), None)
    if archive is not None and not files_first:
        return archive
    for f in folders if files else ():
        found = [next((f / name for name in names if (f / name).is_file()), None) for names in files]
        if all(path is not None for path in found):
            return [path for path in found if path is not None]
        if any(path is not None for path in found) and archive is None:
            missing = [names[0] for names, path in zip(files, found, strict=True) if path is None]
            raise GraphflowsError(
                f"Expected all files of {what} in {str(f)!r}; {', '.join(missing)} are missing."
            )
    if archive is not None:
        return archive
    raise GraphflowsError(
        f"Expected {what} in {str(root)!r}; it is not there. {_wanted(archives, files)} Folders looked at: "
        f"{', '.join(inner or '.' for inner in INNER_FOLDERS)}. Nothing is downloaded."
    )


def _wanted(archives: Sequence[str], files: Sequence[Sequence[str]]) -> str:
    options = [*archives, *([", ".join(names[0] for names in files)] if files else [])]
    return f"Files: {'; or '.join(options)}."


def _archive(path: Path) -> np.lib.npyio.NpzFile:
    if not zipfile.is_zipfile(path):  # np.load would not close what it cannot read
        raise GraphflowsError(
            f"Expected {path} to be a NumPy archive; it cannot be read, or its end is missing. Get it anew."
        )
    return np.load(path, allow_pickle=False)


def _array(arrays: np.lib.npyio.NpzFile, key: str, path: Path) -> np.ndarray:
    if key not in arrays:
        raise GraphflowsError(f"Expected the array {key!r} in {path}; it has {sorted(arrays.files)}.")
    try:
        return arrays[key]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise GraphflowsError(
            f"Expected the array {key!r} in {path}; it cannot be read ({error}). The file is damaged: get it anew."
        ) from error


def _read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes: a magic number, the sizes of all dimensions, the bytes."""
    raw = path.read_bytes()
    try:
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise GraphflowsError(
            f"Expected a file packed by gzip in {path}; it cannot be unpacked ({error}). Get it anew."
        ) from error
    zero, kind, dim = struct.unpack(">HBB", content[:4]) if len(content) >= 4 else (1, 0, 0)
    if zero != 0 or kind != 8 or len(content) < 4 + 4 * dim:
        raise GraphflowsError(f"Expected an IDX file of bytes in {path}; it does not begin like one.")
    shape = struct.unpack(f">{dim}I", content[4 : 4 + 4 * dim])
    if len(content) - 4 - 4 * dim != int(np.prod(shape)):
        raise GraphflowsError(
            f"Expected {int(np.prod(shape))} bytes after the header of {path}; got {len(content) - 4 - 4 * dim}. The "
            "file is cut off or damaged: get it anew."
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dim).reshape(shape).copy()


def _read_amat(path: Path) -> np.ndarray:
    """Read rows of 784 zeros and ones in text; return them packed."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    known = (content == ord("0")) | (content == ord("1"))
    others = content[~known]
    if not np.isin(others, np.frombuffer(b" \n\r\t", np.uint8)).all() or known.sum() % 784:
        raise GraphflowsError(f"Expected rows of 784 zeros and ones in {path}; it holds something else.")
    return np.packbits((content[known] - ord("0")).reshape(-1, 784), axis=1)


def _read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read records of a label and 3,072 bytes, colour by colour."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(content) or len(content) % 3073:
        raise GraphflowsError(f"Expected records of 3,073 bytes in {path}; got {len(content)} bytes.")
    records = content.reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].copy()


def _verify(array: np.ndarray, what: str, verify: bool) -> None:
    if not verify:
        return
    got = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    if got != CHECKSUMS[what]:
        raise GraphflowsError(
            f"Expected {what} with the SHA-256 {CHECKSUMS[what]}; got {got}. The file is damaged or another one; get "
            "it anew, or pass verify=False to take it as it is."
        )
