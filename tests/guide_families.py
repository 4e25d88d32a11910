"""The families of guides, small, for tests that all of them must pass."""

import pytest

from pyro_graphflows.guides import Flow

everywhere = pytest.mark.parametrize(
    "options",
    [
        {"family": "normal"},
        {"family": Flow(units_per_variable=3, conditioner_units=3)},
        {"family": Flow(form="graphical", units_per_variable=3)},
    ],
    ids=["normal", "flow", "graphical"],
)
