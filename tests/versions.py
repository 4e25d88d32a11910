"""Versions of packages that tests depend on, as pairs of numbers."""

import scipy
import torch


def _pair(version):
    return tuple(map(int, version.split(".")[:2]))


SCIPY = _pair(scipy.__version__)
TORCH = _pair(torch.__version__)
