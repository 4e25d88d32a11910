import pytest

from pyro_graphflows.infer.tables import Table


def test_rows_by_name_and_place_and_as_text():
    table = Table("site", {"mu": {"mean": 1.25, "n": 3}, "theta[0]": {"mean": -12345.6, "n": 4}}, "A note.")
    assert table["mu"]["mean"] == 1.25
    assert table[1]["n"] == 4
    assert len(table) == 2
    assert [row["n"] for row in table] == [3, 4]
    assert repr(table).splitlines() == [
        "site        mean  n",
        "mu          1.25  3",
        "theta[0]  -12346  4",
        "A note.",
    ]


def test_long_and_empty_tables():
    long = Table("site", {str(n): {"mean": float(n)} for n in range(100)})
    assert len(repr(long).splitlines()) == 42
    assert repr(long).endswith("... and 60 more")
    assert repr(Table("site", {})) == "site: no rows"
    assert "nan" in repr(Table("site", {"a": {"sd": float("nan")}}))


def test_pandas():
    pytest.importorskip("pandas")
    frame = Table("site", {"mu": {"mean": 1.25, "n": 3}, "tau": {"mean": 2.0, "n": 4}}).to_pandas()
    assert frame.index.tolist() == ["mu", "tau"]
    assert frame.index.name == "site"
    assert frame.loc["tau", "mean"] == 2.0
