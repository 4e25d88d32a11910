"""Calls of the public interface as users write them; a type checker must accept them all (make types)."""

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_graphflows as gf
from pyro_graphflows.guides import DeepSet, GuideCheck
from pyro_graphflows.infer import Prediction
from pyro_graphflows.plotting import plot_inverse, plot_learning_curves, plot_model_and_inverse


def model(x: Tensor, y: Tensor | None = None) -> None:
    """A slope for each datum."""
    with pyro.plate("data", len(x)):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def of_guides(x: Tensor, y: Tensor, path: Path) -> gf.AutoFaithfulGuide:
    """Make, ask, save and load."""
    guide = gf.auto_faithful_guide(model, x, y)
    guide = gf.auto_faithful_guide(model, x, y, family=gf.Spline(num_bins=4), inverse=gf.AutoOrder(seconds=1))
    guide = gf.auto_faithful_guide(model, x, y, family="flow", pool=DeepSet(), factors={"slope": gf.Normal()})
    print(guide.describe(verbose=True), guide.inverse.num_edges)
    draws: dict[str, Tensor] = guide(x, y)
    density: Tensor = guide.log_prob(draws, x, y)
    check: GuideCheck = gf.check_guide(model, guide, gf.IWAE_ELBO(num_particles=5), x, y)
    print(density.shape, check)
    guide.save(path)
    return gf.load_guide(path, model)


def of_inference(guide: gf.AutoFaithfulGuide, x: Tensor, y: Tensor) -> gf.Posterior:
    """Train, evaluate, draw, predict."""
    history: gf.History = gf.fit(
        model,
        guide,
        gf.TrainingData((x, y), batch_size=10, validation=(x, y)),
        optimizer=1e-3,
        schedule=gf.Schedule(num_steps=100, patience=3),
        checkpoint=gf.Checkpoint("run.pt", every=2),
        progress=gf.Progress(bar=False),
    )
    evidence: gf.Evidence = gf.log_evidence(model, guide, x, y, num_particles=100)
    posterior: gf.Posterior = gf.sample_posterior(model, guide, x, y, num_draws=100)
    prediction: Prediction = posterior.reweighted(50).predict(x)
    print(history.loss[-1], evidence.log_evidence.mean(), prediction["y"].shape, posterior.summary())
    plot_learning_curves({"guide": history})
    return posterior


def of_graphs() -> float:
    """Invert graphs, and ask for exact answers."""
    network: gf.LinearGaussianNetwork = gf.load_network("ecoli70")
    graph: gf.ModelGraph = network.graph()
    inverse: gf.InverseGraph = gf.faithful_inverse(graph)
    plot_inverse(inverse)
    plot_model_and_inverse(graph, inverse, "inverse.png")
    assert gf.is_imap(inverse, graph)
    return network.factorization_gap(inverse)


def of_flows() -> dist.TransformedDistribution:
    """A transform as Pyro has them."""
    base = dist.Independent(dist.Normal(torch.zeros(8), torch.ones(8)), 1)
    return dist.TransformedDistribution(base, [gf.faithful_residual(gf.four_cycle())])
