"""Command-line flags that the studies share."""

import argparse
from pathlib import Path

__all__ = ["add_places", "positive"]


def positive(text: str) -> int:
    """Read a positive whole number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number; got {number}")
    return number


def add_places(parse: argparse.ArgumentParser, study: str, *, report: bool = False) -> None:
    """Add the flags that say where results, pages and checkpoints are.

    Args:
        parse: The parser.
        study: The name of the study's folder.
        report: Whether these are the flags of a report, which reads and draws what is committed if nothing is said.
            What runs writes below ``out/`` instead, so that a trial does not mix with it.
    """
    results = f"studies/{study}/results.jsonl" if report else f"out/{study}/results.jsonl"
    out = "docs/results" if report else "out"
    parse.add_argument(
        "--results",
        type=Path,
        default=Path(results),
        help=f"the file with a line for each run (default: {results})",
    )
    parse.add_argument(
        "--out", type=Path, default=Path(out), help=f"folder of the page and its pictures (default: {out})"
    )
    if not report:
        work = f"out/{study}/work"
        parse.add_argument(
            "--work",
            type=Path,
            default=Path(work),
            help=f"folder of checkpoints and weights (default: {work})",
        )
