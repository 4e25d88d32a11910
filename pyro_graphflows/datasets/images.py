"""The data sets: which files each is made of, and how it is split into training, validation and test images.

From whole numbers of grey levels to what models take: zeros and ones, or values in [0, 1].
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_graphflows.datasets.checksums import compare
from pyro_graphflows.datasets.files import (
    MNIST_FILES,
    check_images,
    find_files,
    idx_names,
    open_archive,
    read_amat,
    read_array,
    read_cifar,
    read_idx,
    read_mat,
)
from pyro_graphflows.errors import GraphflowsError, MissingExtraError

__all__ = [
    "DATA_SETS",
    "MNIST_TEST_COUNTS",
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

MNIST_TEST_COUNTS = (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)


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

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            f"Expected scikit-learn, which holds the digits; it cannot be imported ({error}). "
            "Install it with the extra 'datasets': pip install 'pyro-graphflows[datasets]'."
        ) from error

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
    found = find_files("MNIST", folder, ["mnist.npz"], [idx_names(name) for name in MNIST_FILES])
    if isinstance(found, Path):
        with open_archive(found) as arrays:
            parts = [
                read_array(arrays, key, found)
                for key in ("train_images", "train_labels", "test_images", "test_labels")
            ]
    else:
        parts = [read_idx(path) for path in found]
    kinds = ("training images", "training labels", "test images", "test labels")
    for array, kind in zip(parts, kinds, strict=True):
        if verify:
            compare(array, f"MNIST {kind}")
    for i in (0, 2):
        check_images(f"MNIST {kinds[i]}", parts[i], (28, 28), parts[i + 1])
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
    found = find_files(
        "fixed binarised MNIST",
        folder,
        ["binarized_mnist_larochelle.npz"],
        [[f"binarized_mnist_{kind}.amat"] for kind in kinds],
    )
    if isinstance(found, Path):
        with open_archive(found) as arrays:
            packed = [read_array(arrays, f"{kind}_bits", found) for kind in kinds]
    else:
        packed = [read_amat(path) for path in found]
    parts = []
    for array, kind in zip(packed, ("training", "validation", "test"), strict=True):
        if verify:
            compare(array, f"binarised MNIST {kind} images")
        check_images(f"binarised MNIST {kind} images, packed,", array, (98,))
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
    found = find_files("Omniglot", folder, ["chardata.mat", "omniglot28.npz"], [])
    assert isinstance(found, Path)
    if found.suffix == ".mat":
        *columns, target, test_target = read_mat(found, ("data", "testdata", "target", "testtarget"))
        for array in columns:
            if array.shape[:1] != (784,) or array.ndim != 2 or not ((array >= 0) & (array <= 1)).all():
                raise GraphflowsError(
                    f"Expected images of 784 numbers from 0 to 1 as the columns of matrices in {found}; got the shape "
                    f"{array.shape}, with numbers from {array.min():g} to {array.max():g}."
                )
        images, test = (  # one image a column, itself column by column
            np.rint(255 * array.T.reshape(-1, 28, 28).transpose(0, 2, 1)).astype(np.uint8)
            for array in columns
        )
        labels, test_labels = (one_hot.argmax(0).astype(np.int64) for one_hot in (target, test_target))
    else:
        with open_archive(found) as arrays:
            pixels, split, alphabet = (
                read_array(arrays, key, found) for key in ("images", "split", "alphabet")
            )
        if verify:
            compare(pixels, "Omniglot images (omniglot28.npz)")
        check_images("Omniglot images", pixels, (28, 28), alphabet, 50)
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
    found = find_files("CIFAR-10", folder, ["cifar10_subset.npz"], names, files_first=True)
    if isinstance(found, Path):
        with open_archive(found) as arrays:
            images, labels, test, test_labels = (
                read_array(arrays, key, found)
                for key in ("train_images", "train_labels", "test_images", "test_labels")
            )
    else:
        batches = [read_cifar(path) for path in found]
        images, labels = (np.concatenate([batch[k] for batch in batches[:-1]]) for k in (0, 1))
        test, test_labels = batches[-1]
    if verify:
        compare(images[:4000], "first 4,000 CIFAR-10 training images")
        compare(test[:1000], "first 1,000 CIFAR-10 test images")
        if not isinstance(found, Path) and (len(images), len(test)) != (50_000, 10_000):
            raise GraphflowsError(
                f"Expected 50,000 images for training and 10,000 for testing in {found[0].parent}; got {len(images):,} "
                f"and {len(test):,}. A file is cut off: get it anew, or pass verify=False to take it as it is."
            )
    check_images("CIFAR-10 training images", images, (32, 32, 3), labels)
    check_images("CIFAR-10 test images", test, (32, 32, 3), test_labels)
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
    """Batches of images for :func:`~pyro_graphflows.fit`, binarised or dequantised afresh each time (global generator).

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
