"""Every script in examples/ runs, is short and imports what is public; a script that is in no list fails the test."""

import ast
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import pyro_graphflows
from pyro_graphflows import datasets, distributions, graphs, infer, plotting

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PUBLIC = {
    module.__name__: module.__all__
    for module in (pyro_graphflows, datasets, distributions, graphs, infer, plotting)
}
# script -> flags that make it small (OUT is a folder), words of its output, pictures in OUT
SCRIPTS = {
    "quickstart.py": (
        "--network magic-niab --num-data 200 --num-test 50 --num-evidence 10 --epochs 1 --out OUT",
        ["faithful:", "KL trained"],
        {"inverse.png", "joints.png", "learning_curves.png", "marginals.png"},
    ),
    "binary_tree.py": (
        "--depth 3 --steps 5 --batch-size 20",
        ["stochastic      6", "auto      9", "full     15"],
        set(),
    ),
    "siren_vae.py": (
        "--network magic-niab --epochs 2 --num-test 20 --num-particles 5",
        ["magic-niab: ModelGraph(39 latent, 5 observed, 66 edges); 88 training", " VAE ", " SIReNVAE "],
        set(),
    ),
    "siren_vae_digits.py": (
        "--sizes 60 --epochs 2 --num-particles 2 --out OUT",
        ["ModelGraph(4 latent, 4 observed, 9 edges)"],
        {"moved.png"},
    ),
    "graph_vae.py": (
        "--epochs 1 --num-nodes 3 --node-dim 2 --num-particles 5 --pictures OUT",
        ["independent", "learned", "Learned edges: "],
        {"independent.png", "learned.png"},
    ),
    "gallery/semi_supervised_digits.py": (
        "--steps 3 --hidden-dim 8 --out OUT/styles.png",
        ["50 labelled images", "with the others: ", "data where a call has some"],
        {"styles.png"},
    ),
}
LONG = {"siren_vae_digits.py", "gallery/semi_supervised_digits.py"}  # whose parts other tests run
# run by a test of their own: test_examples_distributed.py
ELSEWHERE = {"distributed/ddp.py", "distributed/draws.py", "distributed/fabric.py"}
# script of the gallery -> flags that make it tiny (and --out), words of its output; all print figures and draw one
TINY = "--steps 3 --num-draws 20"
GALLERY = {
    "bif_network": (TINY, ["faithful_inverse", "exact log-evidence -376.53", "exact 0.621"]),
    "deep_markov": (f"{TINY} --series 4 --length 3", ["faithful"]),
    "eight_schools": (TINY, ["AutoMultivariateNormal"]),
    "epidemic": (
        "--steps 3 --num-draws 20 --num-ranks 20 --batch-size 20",
        ["nats per simulation", "90 % interval"],
    ),
    "gp_regression": (TINY, ["AutoMultivariateNormal", "log-evidence by simulation"]),
    "hidden_markov": (f"{TINY} --length 5", ["AutoMultivariateNormal"]),
    "hierarchical_logistic": (TINY, ["AutoMultivariateNormal"]),
    "item_response": (f"{TINY} --persons 10 --items 5", ["AutoMultivariateNormal"]),
    "mixture": (f"{TINY} --num-data 20", ["exact log-evidence"]),
    "poisson_factors": (f"{TINY} --users 10 --items 5", ["AutoMultivariateNormal"]),
    "probabilistic_pca": (
        f"{TINY} --num-data 30 --components 2",
        ["AutoMultivariateNormal", "exact log-evidence"],
    ),
    "radon": (TINY, ["AutoMultivariateNormal", "reference"]),
    "sachs_proteins": ("--epochs 1 --num-test 20 --num-draws 20", ["SIReNVAE"]),
    "state_space": (f"{TINY} --series 3 --length 3", ["AutoMultivariateNormal"]),
}
QUICK = {"eight_schools", "probabilistic_pca"}  # what the default run has of them
SHARED = {"gallery/compare_guides.py"}  # no script


def call(name, *flags):
    """Run a script as a user does, with the package that is beside it."""
    command = [sys.executable, str(EXAMPLES / name), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_every_script_is_in_the_list():
    assert {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")} == {
        *SCRIPTS,
        *ELSEWHERE,
        *SHARED,
        *(f"gallery/{name}.py" for name in GALLERY),
    }


@pytest.mark.parametrize(
    "name", sorted(path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py"))
)
def test_scripts_are_short_and_use_what_is_public(name):
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) <= (120 if name.startswith("gallery/") else 200)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
            assert not {"pyro_graphflows", "studies", "benchmarks"} & set(names)
        elif isinstance(node, ast.ImportFrom):
            top = node.module.split(".")[0]
            assert top not in ("studies", "benchmarks")
            if top == "pyro_graphflows":
                assert {alias.name for alias in node.names} <= set(PUBLIC[node.module]), node.module


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LONG else []) for name in sorted(SCRIPTS)],
)
def test_script_runs(name, tmp_path):
    flags, words, pictures = SCRIPTS[name]
    done = call(name, *flags.replace("OUT", str(tmp_path)).split())
    assert done.returncode == 0, done.stderr
    for part in words:
        assert part in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == pictures


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in sorted(GALLERY)],
)
def test_script_of_the_gallery_runs_and_draws(name, tmp_path, capsys, monkeypatch):
    """In this process, since fourteen imports of torch would take longer than the scripts."""
    flags, words = GALLERY[name]
    picture = tmp_path / "picture.png"
    monkeypatch.syspath_prepend(str(EXAMPLES / "gallery"))
    monkeypatch.setattr(sys, "argv", [name, *flags.split(), "--out", str(picture)])
    torch.set_default_dtype(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few steps and draws are warned of
        runpy.run_path(str(EXAMPLES / "gallery" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for word in [*words, "ELBO" if name != "epidemic" else "loss"]:
        assert word in printed
    assert picture.stat().st_size > 0


def test_the_page_of_the_gallery_has_every_script():
    page = (ROOT / "docs" / "make_gallery.py").read_text()
    scripts = {path.stem for path in (EXAMPLES / "gallery").glob("*.py")} - {"compare_guides"}
    assert {name for name in scripts if f'"{name}",' in page} == scripts


@pytest.mark.parametrize("sizes", [["100", "2000"], pytest.param(["10"], marks=pytest.mark.slow)])
def test_numbers_of_digits_there_are(tmp_path, sizes):
    done = call("siren_vae_digits.py", "--sizes", *sizes, "--out", str(tmp_path))
    assert done.returncode == 1
    assert "Expected sizes from 30, of which 20 are for validation, to 1297" in done.stderr
