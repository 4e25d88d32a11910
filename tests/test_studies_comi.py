"""The binary-tree study: exact answers against brute force, and a whole study of tiny size."""

import dataclasses

import numpy as np
import pytest
import torch

from pyro_graphflows import Normal, auto_faithful_guide, binary_tree, stochastic_inverse
from studies.comi import run as study
from studies.comi.measures import Exact, JointDensity, Judge, compare_densities
from studies.comi.report import render
from studies.results import DamagedLineWarning, Results


@pytest.fixture(autouse=True)
def _single_precision(_clean_slate):
    """Scripts run in torch's own default precision."""
    torch.set_default_dtype(torch.float32)


def best_guide(network, inverse):
    """Compile the best guide with a factorisation: the exact conditional of each latent given its parents."""
    x = torch.zeros(10, len(network.observed), dtype=torch.float32)
    family = Normal(hidden_dims=[])
    guide = auto_faithful_guide(network.pyro_model(), x, family=family, inverse=inverse, init="random")
    for name, parents in guide.inverse.parents.items():
        weights, intercept, scale = network.conditional(name, parents)
        guide.set_linear_(name, dict(zip(parents, weights.tolist(), strict=True)), intercept, scale)
    return guide


def settings(folder, *flags):
    """Return the arguments of a study small enough for a test."""
    tiny = "--study --depths 3 --seeds 1 --workers 1 --batches 2 --max-epochs 6 --every 2 --sample-every 3 --patience 1"
    tiny += " --num-held-out 50 --num-test 60 --sample-sizes 300 1000 --wide-depths --checkpoint-seconds 0"
    places = [
        "--results",
        str(folder / "results.jsonl"),
        "--out",
        str(folder),
        "--work",
        str(folder / "work"),
    ]
    return study.parser().parse_args([*tiny.split(), *places, *flags])


@pytest.mark.parametrize("inverse", ["stochastic", "auto", "forward", "full"])
def test_divergence_of_the_best_guide_is_the_gap(inverse):
    network = binary_tree(4, seed=3)
    guide = best_guide(network, inverse)
    judge = Judge(Exact(network), 4000, seed=0)
    density = JointDensity(guide, network)
    kl, error = judge.divergence(density)
    gap = network.factorization_gap(guide.inverse)
    # A seed that fails by chance: one in 15,000 at four standard errors. 1e-5: float32.
    assert abs(kl - gap) < 4 * error + 1e-5
    compare_densities(guide, density, judge)
    # The plain estimate, objective minus constant, is the same number with more noise.
    joint = judge.samples
    with torch.no_grad():
        log_q = density(judge.joint).double().numpy()
    exact = judge.exact
    terms = exact.log_posterior(joint[:, exact.latent], joint[:, exact.observed]) - log_q
    assert abs(terms.mean() - gap) < 4 * terms.std() / len(terms) ** 0.5 + 1e-5
    assert exact.entropy == pytest.approx(
        -(terms + log_q).mean(), abs=4 * (terms + log_q).std() / len(terms) ** 0.5
    )


@pytest.mark.parametrize("inverse", ["stochastic", "auto"])
def test_log_posterior_of_samples_of_the_best_guide(inverse):
    network = binary_tree(4, seed=3)
    guide = best_guide(network, inverse)
    exact = Exact(network)
    judge = Judge(exact, 10, seed=5)
    draws = 5000
    got = np.array(judge.log_posterior(guide, draws))
    expected = exact.best_log_posterior(guide.inverse, judge.data)
    # Under the posterior -2 log p is chi-squared up to a constant, K = 7 degrees of freedom: its standard deviation is
    # sqrt(2 K) / 2 = 1.9; a guide that is too wide has a larger one, at most three times here.
    assert np.abs(got - expected).max() < 4 * 3 * 1.9 / draws**0.5
    if inverse == "auto":
        assert expected == pytest.approx(np.full(5, -exact.entropy))
    else:
        assert (np.abs(expected + exact.entropy) > 0.05).all()


def test_two_densities_that_differ_are_noticed():
    network = binary_tree(3, seed=0)
    guide, other = best_guide(network, "auto"), best_guide(network, "mean_field")
    judge = Judge(Exact(network), 50, seed=0)
    with pytest.raises(RuntimeError, match="Expected the same density from one pass"):
        compare_densities(other, JointDensity(guide, network), judge)


def test_a_blind_conditional_is_counted():
    network = binary_tree(3, seed=0)
    guide = study.make_guide(network, "minimal", 0, "random", (12, 12))
    density = JointDensity(guide, network)
    joint = Judge(Exact(network), 50, seed=0).joint
    alive = density.num_constant(joint)
    with torch.no_grad():
        for layer in guide.blocks[0].conditionals.network.layers[:-1]:
            layer.bias.fill_(-1e3)
    assert alive < density.num_constant(joint) == 3


def test_study(tmp_path, capsys):
    args = settings(tmp_path)
    study.main(args)
    structures = ("full-random", "heuristic-random", "minimal-random", "minimal-regression")
    runs = ["d3-all-samples-200x200-s0", *(f"d3-{name}-200x200-s0" for name in structures)]
    found = Results(args.results).read()
    assert list(found) == runs
    assert {path.name for path in (tmp_path / "comi").iterdir()} == {
        "curves.png",
        "log_posterior.png",
        "samples.png",
    }
    assert list((tmp_path / "work").iterdir()) == []  # checkpoints are gone
    tree = binary_tree(3, seed=0)
    result = found[runs[2]]
    assert result["gap"] == pytest.approx(tree.factorization_gap(stochastic_inverse(tree.graph())))
    assert [row["epoch"] for row in result["curve"]] == [0, 2, 4, 6]
    assert [row["epoch"] for row in result["samples"]] == [0, 3, 6]
    assert result["kl"] > result["gap"] - 4 * result["standard_error"]
    page = (tmp_path / "comi.md").read_text()
    assert "{" not in page
    for words in ("| 3 | heuristic | 6 |", "| 3 | minimal | 9 |", "| 3 | fully connected | 15 |", "nats"):
        assert words in page

    capsys.readouterr()
    before = args.results.read_bytes()
    study.main(args)  # nothing left to do
    assert "0 of 5 runs to do" in capsys.readouterr().out
    assert args.results.read_bytes() == before
    args.results.write_bytes(before[:-50])  # killed in the last line
    with pytest.warns(DamagedLineWarning):
        study.main(args)
    assert "1 of 5 runs to do" in capsys.readouterr().out
    assert set(Results(args.results).read()) == set(runs)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    args = settings(tmp_path)
    args.max_epochs = 6
    run = study.Run(3, "minimal", "random", 1)
    whole = study.train(run, args)

    write = study.write_whole
    written = []

    def interrupted(path, content):
        write(path, content)
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(study, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.do_run((run, args))
    assert not args.results.exists()
    assert [file.name for file in args.work.iterdir()] == [f"{run.name}.pt"]
    monkeypatch.setattr(study, "write_whole", write)
    study.do_run((run, args))
    assert len(written) == 3
    resumed = Results(args.results).get(run.name)
    for key in ("kl", "curve", "samples", "epochs"):
        assert resumed[key] == whole[key]
    assert list(args.work.iterdir()) == []


def test_order_of_the_runs(tmp_path):
    args = settings(tmp_path)
    args.depths, args.seeds, args.wide_depths, args.wide_seeds = [5, 4, 8], 2, [8], 1
    runs = study.all_runs(args)
    assert [(run.depth, run.seed) for run in runs[:10]] == [(5, 0)] * 5 + [(5, 1)] * 5
    assert len(runs) == 5 * 6 + 3  # the wide networks have one seed
    assert len({run.name for run in runs}) == len(runs)
    rates = {study.first_rate(run, args) for run in runs if run.depth < 8 and run.init == "random"}
    assert rates == {args.lr}
    assert study.first_rate(study.Run(8, "full", "random", 0), args) == args.lr_deep
    assert study.first_rate(study.Run(8, "minimal", "regression", 0), args) == args.lr_regression
    wide = study.Run(7, "full", "random", 0, tuple(args.wide_dims))
    assert study.first_rate(wide, args) == args.lr_wide
    assert {dataclasses.astuple(run)[4] for run in runs if run.depth != 8} == {(200, 200)}


def test_small_comparison(capsys):
    flags = "--depths 3 --max-epochs 2 --batches 2 --num-held-out 50 --num-test 50"
    study.main(study.parser().parse_args(flags.split()))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-3:]] == [["heuristic", "6"], ["minimal", "9"], ["full", "15"]]


def test_report_of_nothing(tmp_path):
    page = render(tmp_path / "results.jsonl", tmp_path).read_text()
    assert "No runs yet" in page
