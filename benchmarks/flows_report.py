"""Tables, bounds and the picture of benchmarks/flows.py, from its results."""

import numpy as np

from benchmarks.flows_peers import METHODS, OURS

PEER = 1.5  # from 100 variables up nothing may be slower than a peer by more than this


def bounds(results):
    """Return what was asked and what was measured: (text, measured, limit, whether less is better)."""
    found = []
    for row in results.get("jacobian", {}).get("rows", []):
        limit = 10 if row["variables"] < 100 else 50
        for clock in ("wall", "cpu"):
            ratio = row["loop"][clock] / row["ours"][clock]
            text = f"full Jacobian / ours, {row['variables']} variables, {row['units']} units ({clock})"
            found.append((text, ratio, limit, False))
    rows = [row for row in results.get("peers", {}).get("rows", []) if "wall" in row]
    by = {(row["method"], row["variables"]): row for row in rows}
    for method in OURS:
        large, medium = by.get((method, 10_000)), by.get((method, 1000))
        if large:
            found.append((f"{method}, 10,000 variables: seconds (wall)", large["wall"], 0.6, True))
            found.append((f"{method}, 10,000 variables: peak MiB", large["peak"], 2048, True))
        if large and medium:
            for clock in ("wall", "cpu"):
                growth = np.log10(large[clock] / medium[clock])
                found.append((f"{method}: growth exponent from 1,000 to 10,000 ({clock})", growth, 1.2, True))
        for dim in sorted({row["variables"] for row in rows if row["variables"] >= 100}):
            others = {
                name: by[name, dim]["wall"] for name in METHODS if name not in OURS and (name, dim) in by
            }
            if others and (method, dim) in by:
                name = min(others, key=others.get)
                ratio = by[method, dim]["wall"] / others[name]
                found.append(
                    (f"{method} / fastest peer ({name}), {dim:,} variables (wall)", ratio, PEER, True)
                )
    rows = results.get("inversion", {}).get("rows", [])
    for (case, c), mine in _inversions(rows).items():
        ours = mine["ours"]
        found.append((f"inversion, {case}, c = {c}: backward error of ours", ours["error"], 1e-12, True))
        others = {name: row["wall"] for name, row in mine.items() if name != "ours" and row["error"] <= 1e-12}
        name = min(others, key=others.get)
        text = f"inversion, {case}, c = {c}: ours / fastest other that converged ({name}) (wall)"
        found.append((text, ours["wall"] / others[name], PEER, True))
    fresh = {row["method"]: row["wall"] for row in rows if row["c"] is None}
    for method in OURS:
        if method in fresh:
            text = f"inversion, fresh weights, 107 variables: {method} / zuko MAF (wall)"
            found.append((text, fresh[method] / fresh["zuko MAF"], PEER, True))
    return found


def _inversions(rows):
    cases = {}
    for row in rows:
        if row["c"] is not None:
            cases.setdefault((row["case"], row["c"]), {})[row["method"]] = row
    return cases


def verdicts(results):
    """Return a line for each bound: whether it holds."""
    lines = []
    for text, value, limit, less in bounds(results):
        holds = value <= limit if less else value >= limit
        sign = "<=" if less else ">="
        lines.append(f"{'holds' if holds else 'FAILS'}  {text}: {value:.3g} (asked: {sign} {limit:g})")
    return lines


def table(head, rows):
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _ms(spent):
    return f"{1e3 * spent['wall']:.3g} ({1e3 * spent['cpu']:.3g})"


def _settings(part):
    settings = part["settings"]
    return (
        f"{settings['date']}, {settings['threads']} threads on {settings['cores']} CPU cores "
        f"({settings['machine']}, load {settings['load']:.1f} at the start), torch {settings['torch']}"
    )


def _profile(rows):
    """Say where the time of a step goes, for rows with a profile."""
    if not rows:
        return []
    return [
        f"**Where the time goes at {rows[0]['variables']} variables.** Half or more of IAF's time is in dense matrix "
        "products of whole layers, which the threads share. FaithfulResidual does other work: in each block every "
        "variable has a monotone map of its own, with units, slopes and their gradients, so that products are the "
        "smaller part of its time, and its many small operations do not become faster with a second thread. "
        "In return each factor sees its parents alone, IAF's see all variables before; and from some hundred variables "
        "up the products of the dense networks decide.",
        table(
            ["flow", "operations a step", "share of time in matrix products of layers"],
            [[row["method"], row["operations"], f"{row['products']:.0%}"] for row in rows],
        ),
    ]


def page(results):
    """Return the page."""
    parts = [
        "# Flows over graphs: speed, memory, inversion",
        "*Generated by `benchmarks/flows.py`; do not edit.* Times are the shortest of some rounds, in milliseconds: "
        "wall (processor, all threads). What is compared goes in turns.",
        "## Bounds",
        "\n".join(
            f"- {line[7:]}: **{'yes' if line.startswith('holds') else 'NO'}**" for line in verdicts(results)
        ),
    ]
    if "jacobian" in results:
        part = results["jacobian"]
        rows = [
            [
                f"{row['network']} ({row['variables']})",
                row["units"],
                *(_ms(row[key]) for key in ("ours", "loop", "batched")),
                f"{row['loop']['wall'] / row['ours']['wall']:.0f}×",
                f"{row['batched']['wall'] / row['ours']['wall']:.0f}×",
            ]
            for row in part["rows"]
        ]
        parts += [
            "## Log-density and gradient against the full Jacobian",
            "A graphical residual flow of 4 blocks with one hidden layer, batch 100, float64; the same blocks with the "
            "Jacobian of each datum formed and its determinant taken, datum by datum (as in the original work) "
            "or for the whole batch at once. All three give the same loss to 1e-10.",
            table(
                [
                    "network (variables)",
                    "units",
                    "ours",
                    "datum by datum",
                    "batched",
                    "ratio",
                    "ratio to batched",
                ],
                rows,
            ),
            f"*{_settings(part)}.*",
        ]
    if "peers" in results:
        part = results["peers"]
        rows = []
        for row in part["rows"]:
            if "wall" in row:
                rows.append(
                    [
                        *(f"{row['variables']:,}", row["method"], _ms(row)),
                        *(f"{row['peak']:.0f}", f"{row['before']:.0f}", f"{row['build']:.2f}"),
                    ]
                )
            else:
                rows.append([f"{row['variables']:,}", row["method"], row["left out"], "–", "–", "–"])
        parts += [
            "## Log-density and gradient against other flows",
            "At most 4 parents a variable, 4 blocks (or transforms) of 4 units a variable, batch 64, float32; each in "
            "a process of its own. zuko's flow has the same adjacency, Pyro's see all variables before, the dense "
            "residual flow all of them (its log-determinant is a power series of 8 terms).",
            "![Times and memory](flows/flows.png)",
            table(["variables", "flow", "ms", "peak MiB", "of which before", "seconds to build"], rows),
            *_profile([row for row in part["rows"] if "operations" in row]),
            f"*{_settings(part)}.*",
        ]
    if "inversion" in results:
        part = results["inversion"]
        rows = [
            [
                row["case"] + ("" if row["c"] is None else f", c = {row['c']}"),
                row["method"],
                "–" if row["steps"] is None else row["steps"],
                f"{row['error']:.1e}",
                _ms(row),
            ]
            for row in part["rows"]
        ]
        parts += [
            "## Sampling by inversion",
            "44 variables, batch 100, float64, with log-determinants; values and diagonals by the same code. "
            "*random*: 4 blocks of random weights that all contract, at the bound c; *slow*: one block that contracts "
            "every variable at the bound, where fixed-point iteration is slowest; *fresh*: flows as constructed, over "
            "107 variables in 12 levels; zuko's affine transforms have the same adjacency and need no iteration, but a "
            "pass for each level. The error is the backward error (for *fresh* the largest difference after the way "
            "forth). Steps are summed over blocks.",
            table(["weights", "method", "steps", "error", "ms"], rows),
            f"*{_settings(part)}.*",
        ]
    return "\n\n".join(parts) + "\n"


def draw(results, path):
    """Draw times, memory and inversion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    axes = figure.subplots(1, 3)
    rows = [row for row in results.get("peers", {}).get("rows", []) if "wall" in row]
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        style = {"marker": "o", "linewidth": 2} if method in OURS else {"marker": "s", "linestyle": "--"}
        for axis, key, unit in ((axes[0], "wall", 1e3), (axes[1], "peak", 1.0)):
            axis.loglog(
                [row["variables"] for row in mine], [unit * row[key] for row in mine], label=method, **style
            )
    axes[0].set(xlabel="variables", ylabel="ms (wall)", title="log-density and gradient, batch 64")
    axes[1].set(xlabel="variables", ylabel="MiB", title="peak memory of the process")
    if rows:
        axes[0].legend(fontsize=8, frameon=False)
    colours = {"ours": "C0", "plain Newton": "C1", "Banach": "C2"}
    for (case, c), mine in _inversions(results.get("inversion", {}).get("rows", [])).items():
        for name, row in mine.items():
            full = row["error"] <= 1e-12
            axes[2].loglog(
                1 - c,
                1e3 * row["wall"],
                marker="o" if case == "slow" else "^",
                color=colours[name],
                markerfacecolor=colours[name] if full else "none",
                markersize=8,
                linestyle="none",
                label=f"{name}, {case}" if c == 0.9 else None,
            )
    if results.get("inversion"):
        axes[2].legend(fontsize=8, frameon=False)
    axes[2].invert_xaxis()
    axes[2].set(xlabel="1 − c", ylabel="ms (wall)", title="inversion (hollow: error above 1e-12)")
    for axis in axes:
        axis.grid(color="0.92", which="major")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
