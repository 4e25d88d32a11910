"""One call, one page: set a guide up for a model and its data, train it, and say in plain words what came of it.

``python -m pyro_graphflows report module:model --data data.npz --out report.html``, or :func:`make_report` in Python.
"""

from pyro_graphflows.report.contents import ReportOptions, make_report
from pyro_graphflows.report.page import Page, Section

__all__ = ["Page", "ReportOptions", "Section", "make_report"]
