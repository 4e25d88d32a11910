"""Finding the files of a data set, and reading the formats they come in."""

import gzip
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyro_graphflows.errors import GraphflowsError

__all__ = [
    "INNER_FOLDERS",
    "MNIST_FILES",
    "VARIABLE",
    "check_images",
    "find_files",
    "idx_names",
    "open_archive",
    "read_amat",
    "read_array",
    "read_cifar",
    "read_idx",
    "read_mat",
]

VARIABLE = "PYRO_GRAPHFLOWS_DATA"
INNER_FOLDERS = ("", "images", "MNIST/raw", "mnist", "binarized_mnist", "omniglot", "cifar-10-batches-bin")

MNIST_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def idx_names(name: str) -> list[str]:
    """Return the names that an IDX file is found under."""
    dotted = ".".join(name.rsplit("-", 1))
    return [f"{stem}-ubyte{end}" for end in ("", ".gz") for stem in (name, dotted)]


def find_files(
    what: str,
    folder: str | os.PathLike[str] | None,
    archives: Sequence[str],
    files: Sequence[Sequence[str]],
    *,
    files_first: bool = False,
) -> Path | list[Path]:
    """Return the archive, or the list of files that together are a data set.

    Args:
        what: The name of the data set, for messages.
        folder: Where to look; by default what the environment variable names.
        archives: Names of archives, any of which has the whole data set.
        files: Alternative names of each of the files that together are the data set.
        files_first: Whether to take the files where both are there.

    Raises:
        GraphflowsError: If there is no such folder, or not all that is needed in it.
    """
    given = folder if folder is not None else os.environ.get(VARIABLE)
    if given is None:
        raise GraphflowsError(
            f"Expected a folder with {what}; none was given. Pass it (--data in the examples) or set the environment "
            f"variable {VARIABLE}. {_wanted(archives, files)}"
        )
    root = Path(given).expanduser()
    if not root.is_dir():
        raise GraphflowsError(f"Expected a folder with {what}; {str(root)!r} is not a folder.")
    folders = [root / inner for inner in INNER_FOLDERS]
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


def open_archive(path: Path) -> np.lib.npyio.NpzFile:
    """Open a NumPy archive, or say that it is none."""
    if not zipfile.is_zipfile(path):  # np.load would not close what it cannot read
        raise GraphflowsError(
            f"Expected {path} to be a NumPy archive; it cannot be read, or its end is missing. Get it anew."
        )
    return np.load(path, allow_pickle=False)


def read_array(arrays: np.lib.npyio.NpzFile, key: str, path: Path) -> np.ndarray:
    """Return an array of an archive, or say that it is missing or damaged."""
    if key not in arrays:
        raise GraphflowsError(f"Expected the array {key!r} in {path}; it has {sorted(arrays.files)}.")
    try:
        return arrays[key]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise GraphflowsError(
            f"Expected the array {key!r} in {path}; it cannot be read ({error}). The file is damaged: get it anew."
        ) from error


def read_mat(path: Path, keys: Sequence[str]) -> list[np.ndarray]:
    """Return arrays of a MATLAB file, or say what is wrong with it."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path)
    except (OSError, EOFError, ValueError, TypeError, NotImplementedError, MatReadError, zlib.error) as error:
        raise GraphflowsError(
            f"Expected a MATLAB file (version 4 to 7.2) in {path}; it cannot be read ({error}). Get it anew."
        ) from error
    missing = [key for key in keys if key not in content]
    if missing:
        raise GraphflowsError(f"Expected the arrays {tuple(keys)} in {path}; it lacks {missing}.")
    return [np.asarray(content[key]) for key in keys]


def check_images(
    what: str,
    images: np.ndarray,
    shape: tuple[int, ...],
    labels: np.ndarray | None = None,
    num_classes: int = 10,
) -> None:
    """Refuse images or labels of another kind than they should be, which a checksum of bytes does not see.

    Args:
        what: What they are, for messages.
        images: The images, whole numbers of 8 bits.
        shape: The shape of one image.
        labels: Their labels, from 0.
        num_classes: The number of classes.

    Raises:
        GraphflowsError: If the type or the shape is another, or there are not as many labels as images, or a label is
            none.
    """
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise GraphflowsError(
            f"Expected {what} as numbers of type uint8 and of shape (n, {', '.join(map(str, shape))}); got "
            f"{images.dtype} and {images.shape}."
        )
    if labels is not None and (labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer)):
        raise GraphflowsError(
            f"Expected a label, a whole number, for each of {len(images)} {what}; got the type {labels.dtype} and the "
            f"shape {labels.shape}."
        )
    if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise GraphflowsError(
            f"Expected labels from 0 to {num_classes - 1} of {what}; got {labels.min()} to {labels.max()}. The file is "
            "another one, or damaged."
        )


def read_idx(path: Path) -> np.ndarray:
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


def read_amat(path: Path) -> np.ndarray:
    """Read rows of 784 zeros and ones in text; return them packed."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    known = (content == ord("0")) | (content == ord("1"))
    others = content[~known]
    if not np.isin(others, np.frombuffer(b" \n\r\t", np.uint8)).all() or known.sum() % 784:
        raise GraphflowsError(f"Expected rows of 784 zeros and ones in {path}; it holds something else.")
    return np.packbits((content[known] - ord("0")).reshape(-1, 784), axis=1)


def read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read records of a label and 3,072 bytes, colour by colour."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(content) or len(content) % 3073:
        raise GraphflowsError(f"Expected records of 3,073 bytes in {path}; got {len(content)} bytes.")
    records = content.reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].copy()
