"""What the pixels of each data set must be, by their SHA-256, whatever file they came from."""

import hashlib

import numpy as np

from pyro_graphflows.errors import GraphflowsError

__all__ = ["CHECKSUMS", "compare"]

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


def compare(array: np.ndarray, what: str) -> None:
    """Compare the checksum of what was read with the known one.

    Args:
        array: The pixels or labels.
        what: Their name in ``CHECKSUMS``.

    Raises:
        GraphflowsError: If it is another one.
    """
    got = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    if got != CHECKSUMS[what]:
        raise GraphflowsError(
            f"Expected {what} with the SHA-256 {CHECKSUMS[what]}; got {got}. The file is damaged or another one; get "
            "it anew, or pass verify=False to take it as it is."
        )
