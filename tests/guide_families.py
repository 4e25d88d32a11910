"""The families of guides, small, for tests that all of them must pass."""

import pytest

everywhere = pytest.mark.parametrize(
    "options",
    [
        {"family": "normal"},
        {"family": "flow", "units_per_variable": 3, "conditioner_units": 3},
        {"family": "flow", "flow": "graphical", "units_per_variable": 3},
    ],
    ids=["normal", "flow", "graphical"],
)
