"""Studies of papers: each folder has ``run.py``, ``report.py`` and one ``results.jsonl``, a line for each run.

They are run from the root of the repository, ``python -m studies.comi.run --help``; the targets of the Makefile give
the flags. Pages and pictures are in ``docs/results``.
"""
