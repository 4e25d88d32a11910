"""What is committed: every file of results is whole, and the pages say what the results say."""

import subprocess
from pathlib import Path

import pytest

from studies.comi import report as comi
from studies.density import report as density
from studies.graph_vae import report as graph_vae
from studies.multilevel import report as multilevel
from studies.psychometric import report as psychometric
from studies.real_models import report as real_models
from studies.results import Results
from studies.sbibm import report as sbibm
from studies.siren_vae import report as siren_vae

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "results"
FILES = [*sorted((ROOT / "studies").glob("*/results.jsonl")), *sorted(PAGES.glob("*/results.jsonl"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_results_are_whole(path):
    records = Results(path).read()
    assert records
    assert all(records.values())


REPORTS = {
    "comi": comi,
    "siren_vae": siren_vae,
    "density": density,
    "graph_vae": graph_vae,
    "multilevel": multilevel,
    "sbibm": sbibm,
}


@pytest.mark.parametrize("study", REPORTS)
def test_a_page_is_what_its_report_draws(study, tmp_path):
    """Make the page again after a change of report or results: ``python -m studies.NAME.report``."""
    (tmp_path / study).mkdir()
    for picture in (PAGES / study).glob("*.png"):  # pages show those that are there
        (tmp_path / study / picture.name).write_bytes(picture.read_bytes())
    REPORTS[study].render(ROOT / "studies" / study / "results.jsonl", tmp_path)
    drawn = sorted(tmp_path.glob("*.md"))
    assert drawn
    for page in drawn:
        assert page.read_text() == (PAGES / page.name).read_text(), page.name


def test_the_page_of_the_workflow_is_what_its_report_draws(tmp_path):
    """Two studies make it; again by ``python -m studies.psychometric.report``."""
    psychometric.render(
        *(ROOT / "studies" / name / "results.jsonl" for name in ("psychometric", "workflow")), tmp_path
    )
    assert (tmp_path / "workflow.md").read_text() == (PAGES / "workflow.md").read_text()


def test_the_pages_of_real_models_are_what_their_report_draws(tmp_path):
    real_models.main(["--out", str(tmp_path)])
    for name in ("real_models.md", "real_models_training.md", "real_models_starts.md"):
        assert (tmp_path / name).read_text() == (PAGES / name).read_text(), name


def test_few_json_files():
    """Runs are lines; one JSON file for each of them buried the rest of the repository once."""
    done = subprocess.run(
        ["git", "ls-files", "*.json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    assert len(done.stdout.split()) <= 60
