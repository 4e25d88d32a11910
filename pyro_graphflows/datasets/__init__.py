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

from pyro_graphflows.datasets.checksums import CHECKSUMS
from pyro_graphflows.datasets.files import INNER_FOLDERS, VARIABLE
from pyro_graphflows.datasets.images import (
    DATA_SETS,
    MNIST_TEST_COUNTS,
    BinarizedBatches,
    Images,
    binarize,
    binarized_mnist,
    cifar10,
    dequantize,
    digits,
    load_images,
    mnist,
    omniglot,
)

__all__ = [
    "CHECKSUMS",
    "DATA_SETS",
    "INNER_FOLDERS",
    "MNIST_TEST_COUNTS",
    "VARIABLE",
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
