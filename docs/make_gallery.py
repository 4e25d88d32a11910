"""Run the scripts of the gallery in full, and write their page: `python docs/make_gallery.py [NAME ...]`.

What a script prints goes to docs/gallery/NAME.txt, its figure to docs/gallery/NAME.png; the page shows all there are.
Scripts whose output is there are not run again unless they are named; with `--page` none is.
"""

import ast
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS, OUT = ROOT / "examples" / "gallery", ROOT / "docs" / "gallery"
ORDER = [
    "eight_schools",
    "radon",
    "hierarchical_logistic",
    "item_response",
    "mixture",
    "hidden_markov",
    "state_space",
    "deep_markov",
    "gp_regression",
    "probabilistic_pca",
    "poisson_factors",
    "semi_supervised_digits",
    "sachs_proteins",
    "bif_network",
    "epidemic",
]
INTRODUCTION = """# Gallery

Fifteen models, one script each in `examples/gallery/`, to read and to copy. Each prints how close the guide comes,
in nats for the whole data set: ELBO; IWAE, the log-evidence by importance weights of the same draws (a lower bound
in the mean, with this many draws); and k-hat, above 0.7 where the weights, and so that IWAE, should not be trusted.
Pyro's `AutoNormal` and `AutoMultivariateNormal` are trained alike, with the same number of steps, where they
can serve the model; the faithful guide has `family="auto"` and `init="auto"` unless its script says otherwise.
Training is short: these are figures of examples, not of a study ([studies](studies.md)). Seconds are those of
one thread on a CPU, set-up and training. Written by `python docs/make_gallery.py` from the scripts' own output.
"""


def run(name: str) -> None:
    """Run a script, and keep what it prints and draws."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / f"{name}.py")]
    if "add_flags" in (SCRIPTS / f"{name}.py").read_text() or "--out" in (SCRIPTS / f"{name}.py").read_text():
        command += ["--out", str(OUT / f"{name}.png")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    if done.returncode:
        print(f"{name} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("Figure:", "INFO"))]
    (OUT / f"{name}.txt").write_text("\n".join([f"# {date.today()}", *lines]) + "\n")
    print(f"{name}\n{done.stdout}", flush=True)


def page() -> str:
    """Return the page: what each script is, and what those that were run printed and drew."""
    parts = [INTRODUCTION]
    for name in ORDER:
        text = OUT / f"{name}.txt"
        head, body = ast.get_docstring(ast.parse((SCRIPTS / f"{name}.py").read_text())).split("\n\n", 1)
        body = body.split("\n\n    python")[0]
        parts.append(
            f"## {name.replace('_', ' ').capitalize()}\n\n**{head.strip()}** {' '.join(body.split())}\n"
        )
        if (OUT / f"{name}.png").exists():
            parts.append(f"![{head.strip()}](gallery/{name}.png)\n")
        when = "; run at small size only, in the tests"
        if text.exists():
            day, *lines = text.read_text().splitlines()
            parts.append("```text\n" + "\n".join(lines) + "\n```\n")
            when = f", run on {day[2:]}"
        parts.append(f"`examples/gallery/{name}.py`{when}.\n")
    return "\n".join(parts)


def main(names: list[str]) -> None:
    """Run what is asked for, and write the page."""
    OUT.mkdir(exist_ok=True)
    missing = [name for name in ORDER if not (OUT / f"{name}.txt").exists()]
    for name in [] if "--page" in names else names or missing:
        run(name)
    (ROOT / "docs" / "gallery.md").write_text(page())


if __name__ == "__main__":
    main(sys.argv[1:])
