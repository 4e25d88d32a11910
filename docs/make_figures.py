"""Draw the figures of the concept pages and the README: `python docs/make_figures.py`."""

from pathlib import Path

from pyro_graphflows import ModelGraph, faithful_inverse, load_network, student_network
from pyro_graphflows.graphs import eight_schools
from pyro_graphflows.plotting import plot_adjacency, plot_model_and_inverse

FOLDER = Path(__file__).parent / "figures"


def main() -> None:
    """Write all figures."""
    FOLDER.mkdir(exist_ok=True)
    pairs = {
        "collider": ModelGraph([("a", "x"), ("b", "x")], ["x"]),
        "student": student_network(),
        "eight_schools": eight_schools(),
    }
    for name, graph in pairs.items():
        plot_model_and_inverse(graph, faithful_inverse(graph), FOLDER / f"{name}.png")
    axes = plot_adjacency(faithful_inverse(load_network("ecoli70").graph()))
    axes.figure.savefig(FOLDER / "adjacency.png", dpi=110)


if __name__ == "__main__":
    main()
