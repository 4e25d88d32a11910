"""The report: what it says of models that are good, untrained, improper or wrong; bad input in words."""

import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.report import Page, ReportOptions, Section, make_report
from pyro_graphflows.report.command import load_data, load_model, main

MODELS = """
import pyro, pyro.distributions as dist

def regression(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

def unobserved(x):
    pyro.sample("slope", dist.Normal(0.0, 1.0))

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "report_models", raising=False)
    (tmp_path / "report_models.py").write_text(MODELS)
    x = np.linspace(-1, 1, 12)
    np.savez(tmp_path / "data.npz", x=x, y=0.5 * x)
    return tmp_path


class Reader(HTMLParser):
    """Sees that every tag is closed and nothing is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.headings = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


HEADINGS = [
    "What to do next",
    "The model",
    "What each latent looks at",
    "Training",
    "The posterior",
    "How far to trust the draws",
    "Calibration on simulated data",
    "Predictive check",
]


def test_the_command_writes_a_page(folder, capsys):
    words = ["report", "report_models:regression", "--data", "data.npz", "--train", "1", "--draws", "200"]
    assert main([*words, "--simulations", "100"]) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    reader = Reader(text)
    assert reader.open == []
    assert reader.headings == HEADINGS
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in reader.sources)
    assert "http" not in text
    assert "Written: report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("no_such_module:f", "data.npz", "Expected a module 'no_such_module'"),
        ("report_models:missing", "data.npz", "Its functions are regression, unobserved"),
        ("report_models:number", "data.npz", "to be a function; got int"),
        ("report_models", "data.npz", "module:function"),
        ("nothing.py:f", "data.npz", "there is no 'nothing.py'"),
        ("report_models:regression", "none.npz", "there is no 'none.npz'"),
        ("report_models:regression", "text.npz", "is not"),
        ("report_models:regression", "one.npy", "a single array"),
        ("report_models:regression", "y.npz", "lacks x and has y"),
        ("report_models:regression", "more.npz", "also has z"),
        ("report_models:regression", "words.npz", "numbers in the array 'x'"),
        ("report_models:unobserved", "x.npz", "observed sites with these data; it has none"),
    ],
)
def test_bad_input_is_said_in_words(folder, capsys, model, data, message):
    x = np.zeros(3)
    (folder / "text.npz").write_text("no archive")
    np.save(folder / "one.npy", x)
    np.savez(folder / "y.npz", y=x)
    np.savez(folder / "x.npz", x=x)
    np.savez(folder / "more.npz", x=x, z=x)
    np.savez(folder / "words.npz", x=np.array(["a"]))
    assert main(["report", model, "--data", data, "--train", "0"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_numbers_and_files(folder):
    np.savez(folder / "n.npz", x=np.arange(3), y=np.array(2))
    model = load_model(str(folder / "report_models.py") + ":regression")
    data = load_data(folder / "n.npz", model)
    assert data["x"].dtype == torch.long
    assert data["y"] == 2


def test_as_a_module(folder):
    """``python -m`` finds it, and says what it takes."""
    command = [sys.executable, "-W", "ignore", "-m", "pyro_graphflows", "report", "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert "--data" in done.stdout


def regression(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def page_of(model, data, **options):
    defaults = {"seconds": 1.0, "num_draws": 200, "num_simulations": 100, "progress": False}
    page = make_report(model, data, ReportOptions(**{**defaults, **options}))
    return {section.title: " ".join(section.parts) for section in page.sections}


def test_an_untrained_guide_and_strange_data():
    """Data ten times as wide as the model says: it is said, and no training as well."""
    x = torch.linspace(-1, 1, 20)
    sections = page_of(regression, {"x": x, "y": 30 * torch.randn(20)}, seconds=0.0)
    assert "not trained" in sections["What to do next"]
    assert "was not trained" in sections["Training"]
    assert "does not reproduce" in sections["Predictive check"]
    assert "Change the model" in sections["What to do next"]


def test_parameters_for_these_data_are_not_calibrated_on_others():
    x = torch.linspace(-1, 1, 20)
    sections = page_of(regression, {"x": x, "y": 0.5 * x}, seconds=0.0)
    assert "parameters for these data alone (slope)" in sections["Calibration on simulated data"]


def test_without_simulations():
    x = torch.linspace(-1, 1, 20)
    sections = page_of(regression, {"x": x, "y": 0.5 * x}, seconds=0.0, num_simulations=0)
    assert "No simulations were asked for" in sections["Calibration on simulated data"]


def test_many_sites_share_a_picture_and_a_table():
    """Six observed sites: a panel each, a table of shares, and a bound that allows for their number."""

    def wide(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for i in range(6):
                pyro.sample(f"y{i}", dist.Normal(z, 1.0), obs=y[:, i])

    z = torch.randn(30, 1)
    sections = page_of(wide, {"y": z + torch.randn(30, 6)}, seconds=0.0, num_simulations=0)
    check = sections["Predictive check"]
    assert check.count("<img") == 1
    assert check.count("<tr>") == 7
    assert "Nothing in these statistics" in check
    assert sections["The posterior"].count("<tr>") == 31


def test_text_cannot_become_html():
    page = Page("<b>", "&", [Section("a <i>").text("<script>").verbatim("<x>").items(["<y>"])])
    text = page.to_html()
    for word in ("<b>", "<i>", "<script>", "<x>", "<y>"):
        assert word not in text


def test_options_are_checked():
    with pytest.raises(GraphflowsError, match="at least 10 draws"):
        ReportOptions(num_draws=1)
