"""Types of command-line flags."""

import argparse


def positive(text):
    """Read a positive whole number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number; got {number}")
    return number
