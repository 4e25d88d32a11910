"""The runs of the SIReN-VAE study by cells of the tables: settings that were tried, the chosen one, means."""

from collections import defaultdict

from studies import tables
from studies.results import Results
from studies.siren_vae.training import DEFAULT_PATIENCE, FEW, pick_setting, settings_of

NETWORKS = ("ecoli70", "arth150", "magic-irri", "magic-niab")
SHAPES = {"ecoli70": "24/22/70", "arth150": "67/40/150", "magic-irri": "5/59/102", "magic-niab": "5/39/66"}
LABELS = {
    "vae": "VAE",
    "ind": "SIReN-VAE ind, GRF",
    "FC": "SIReN-VAE FC, GRF",
    "true": "SIReN-VAE true, GRF",
    "faithful": "SIReN-VAE true, faithful flow",
}


class Cells:
    """All runs by cell, setting (rate and patience) and seed; the times of training steps in ``speed``.

    Args:
        path: The file of results.
    """

    def __init__(self, path):
        records = Results(path).read()
        self.speed = records.pop("speed", None)
        self.cells = defaultdict(lambda: defaultdict(dict))
        for result in records.values():
            run = result["run"]
            key = tuple(run[k] for k in ("network", "row", "multiple", "remedy", "perturbation"))
            self.cells[key][run["lr"], run["patience"]][run["seed"]] = result

    def tried(self, network, row, multiple, patience=None):
        """List the settings that were tried on seed 0."""
        found = self.cells.get((network, row, multiple, "", ""), {})
        return [s for s in settings_of(multiple, patience) if 0 in found.get(s, {})]

    def setting(self, network, row, multiple, by="validation_nll", patience=None):
        """Return the setting of a cell, chosen on seed 0; None if there are no runs."""
        tried = self.tried(network, row, multiple, patience)
        return pick_setting({s: self.first(network, row, multiple, s)[by] for s in tried})

    def first(self, network, row, multiple, setting):
        """Return the run of a cell with seed 0 at a setting."""
        return self.cells[network, row, multiple, "", ""][setting][0]

    def runs(self, network, row, multiple, setting, remedy="", perturbation=""):
        """Return the runs of a cell with a setting that have test figures, by seed."""
        found = self.cells.get((network, row, multiple, remedy, perturbation), {}).get(setting, {})
        return {seed: result for seed, result in found.items() if result["test"]}

    def cell(self, network, row, multiple, **how):
        """Return the runs of a cell at the chosen setting that have test figures, as a list."""
        return list(self.runs(network, row, multiple, self.setting(network, row, multiple, **how)).values())


def words_of(setting, multiple):
    """Return a setting as words."""
    return "–" if setting is None else f"{setting[0]:g}, {setting[1] or DEFAULT_PATIENCE[multiple < FEW]}"


def mean_sd(results, key, digits=2, count=False):
    """Return the mean ± standard deviation of a test figure, with the number of runs in brackets if asked for."""
    if not results:
        return "–"
    text = tables.mean_sd([result["test"][key] for result in results], digits)
    return f"{text} ({len(results)})" if count else text
