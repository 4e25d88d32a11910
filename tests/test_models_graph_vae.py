"""The Graph VAE against closed forms: with linear maps and normal likelihood everything about it is a Gaussian."""

import copy
import io
import itertools
import math
import warnings

import networkx as nx
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_graphflows import (
    IWAE_ELBO,
    GraphflowsError,
    GraphVAE,
    ModelGraph,
    NotADAGError,
    Progress,
    Schedule,
    TrainingData,
    auto_faithful_guide,
    faithful_inverse,
    fit,
)
from pyro_graphflows.infer import importance_log_weights

NOISE = 0.7
SMALL = {"encoder_dims": (12, 12, 8), "decoder_dims": (8, 12), "hidden_dim": 6, "embedding_dim": 7}


def normal_likelihood(outputs):
    return dist.Normal(outputs, NOISE).to_event(1)


def linear_vae(structure="full", num_nodes=3, num_observed=4, **options):
    """A Graph VAE whose maps are all linear with constant variances, weights drawn at random."""
    vae = GraphVAE(
        (num_observed,),
        num_nodes,
        1,
        structure,
        likelihood=normal_likelihood,
        encoder=nn.Identity(),
        embedding_dim=num_observed,
        hidden_dim=None,
        decoder=nn.Linear(num_nodes if options.get("decoder_input") != "first" else 1, num_observed),
        **options,
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            if vae.gates is None or parameter is not vae.gates.logits:
                parameter.normal_(0.0, 0.6)
        for network in (*vae.prior.values(), *vae.posterior.values()):
            network.heads.weight[1:] = 0  # the log-variance does not depend on the parents
        vae.bottom_up.weight[:, :, 1:] = 0
    return vae


def gate_matrix(vae, gates=None):
    """Rows are children; entry c_ij multiplies parent j. Without gates those of the structure."""
    number = len(vae.names)
    if gates is None:
        return (vae.gate_probabilities > 0.5).to(torch.get_default_dtype())
    matrix = torch.zeros(number, number)
    for (i, j), gate in zip(vae.gates.index, gates, strict=True):
        matrix = matrix + gate * (torch.eye(number)[i][:, None] * torch.eye(number)[j][None])
    return matrix


def prior_maps(vae, gates):
    """z_i = a_i + sum_j W_ij z_j + s_i e_i under the model; the root is standard normal."""
    number = len(vae.names)
    weight, offset, variance = torch.zeros(number, number), torch.zeros(number), torch.ones(number)
    for i in range(number):
        if str(i) in vae.prior:
            heads = vae.prior[str(i)].heads
            for k, j in enumerate(vae._parents[i]):
                weight[i, j] = heads.weight[0, k].detach()
            offset[i], variance[i] = heads.bias[0].detach(), heads.bias[1].detach().exp()
    return weight * gates, offset, variance


def guide_maps(vae, gates, x):
    """z_i = a_i(x) + sum_j W_ij z_j + s_i e_i under the guide, by the fusion formula as the paper writes it."""
    number = len(vae.names)
    weight, offset, variance = torch.zeros(number, number), torch.zeros(len(x), number), torch.ones(number)
    for i in range(number):
        mean1 = x @ vae.bottom_up.weight[i, :, 0].detach() + vae.bottom_up.bias[i, 0, 0].detach()
        var1 = vae.bottom_up.bias[i, 0, 1].detach().exp()
        if str(i) not in vae.posterior:
            offset[:, i], variance[i] = mean1, var1
            continue
        heads = vae.posterior[str(i)].heads
        var2 = heads.bias[1].detach().exp()
        variance[i] = var1 * var2 / (var1 + var2)
        offset[:, i] = (mean1 * var2 + heads.bias[0].detach() * var1) / (var1 + var2)
        for k, j in enumerate(vae._parents[i]):
            weight[i, j] = heads.weight[0, k].detach() * var1 / (var1 + var2)
    return weight * gates, offset, variance


def gaussian(weight, offset, variance):
    """Mean and covariance of z = offset + weight z + noise."""
    inverse = torch.linalg.inv(torch.eye(len(weight)) - weight)
    return offset @ inverse.T, inverse @ torch.diag(variance) @ inverse.T


def exact_evidence(vae, gates, x):
    mean, covariance = gaussian(*prior_maps(vae, gates))
    decoder = vae.decoder.weight.detach()
    covariance = decoder @ covariance @ decoder.T + NOISE**2 * torch.eye(len(decoder))
    loc = decoder @ mean + vae.decoder.bias.detach()
    return dist.MultivariateNormal(loc, covariance, validate_args=False).log_prob(x)


def exact_elbo(vae, gates, x):
    """log p(x) - KL(q(z|x) || p(z|x)) for each datum, with gates that may be fractions."""
    mean, covariance = gaussian(*prior_maps(vae, gates))
    decoder, bias = vae.decoder.weight.detach(), vae.decoder.bias.detach()
    precision = torch.linalg.inv(covariance) + decoder.T @ decoder / NOISE**2
    posterior = torch.linalg.inv(precision)
    shift = torch.linalg.inv(covariance) @ mean + (x - bias) @ decoder / NOISE**2
    q_mean, q_covariance = gaussian(*guide_maps(vae, gates, x))
    difference = shift @ posterior.T - q_mean
    trace = (precision @ q_covariance).diagonal().sum()
    quadratic = (difference @ precision * difference).sum(-1)
    divergence = 0.5 * (trace + quadratic - len(mean) + posterior.logdet() - q_covariance.logdet())
    return exact_evidence(vae, gates, x) - divergence


def set_exact_posterior(vae, x_dim):
    """Put p(z_i | z_>i, x), which is linear in both, into the two predictions of each node."""
    gates = gate_matrix(vae)
    mean, covariance = gaussian(*prior_maps(vae, gates))
    decoder, bias = vae.decoder.weight.detach(), vae.decoder.bias.detach()
    number = len(vae.names)
    joint_mean = torch.cat([mean, decoder @ mean + bias])
    cross = covariance @ decoder.T
    joint = torch.cat(
        [
            torch.cat([covariance, cross], 1),
            torch.cat([cross.T, decoder @ cross + NOISE**2 * torch.eye(x_dim)], 1),
        ]
    )
    with torch.no_grad():
        for i in range(number):
            given = [*vae._parents[i], *range(number, number + x_dim)]
            coefficients = joint[i, given] @ torch.linalg.inv(joint[given][:, given])
            variance = joint[i, i] - coefficients @ joint[given, i]
            constant = joint_mean[i] - coefficients @ joint_mean[given]
            split = len(vae._parents[i])
            factor = 2.0 if split else 1.0  # equal precisions, each half of the whole
            vae.bottom_up.weight[i, :, 0] = factor * coefficients[split:]
            vae.bottom_up.bias[i, 0] = torch.stack([factor * constant, (factor * variance).log()])
            if split:
                heads = vae.posterior[str(i)].heads
                heads.weight[0] = factor * coefficients[:split]
                heads.bias[:] = torch.stack([torch.zeros(()), (factor * variance).log()])


# ------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("num_particles", [1, 7])
def test_evidence_is_exact_with_the_exact_posterior_as_guide(num_particles):
    vae = linear_vae()
    set_exact_posterior(vae, 4)
    x = torch.randn(5, 4)
    evidence = vae.log_evidence(x, num_particles, batch_size=2)
    torch.testing.assert_close(evidence.log_evidence, exact_evidence(vae, gate_matrix(vae), x))


@pytest.mark.parametrize("elbo", [Trace_ELBO(), IWAE_ELBO(3), RenyiELBO(alpha=0, num_particles=3)])
def test_losses_are_exact_with_the_exact_posterior_as_guide(elbo):
    vae = linear_vae()
    set_exact_posterior(vae, 4)
    x = torch.randn(5, 4)
    expected = -exact_evidence(vae, gate_matrix(vae), x).sum().item()
    assert elbo.loss(vae.model, vae.guide, x) == pytest.approx(expected, rel=1e-10)


def test_evidence_estimate_with_another_guide():
    vae = linear_vae("learned")
    with torch.no_grad():
        vae.gates.logits[:] = torch.tensor([1.0, -1.0, 1.0])
    x = torch.randn(6, 4)
    exact = exact_evidence(vae, gate_matrix(vae), x)
    with torch.no_grad():  # wide enough for weights of finite variance
        vae.bottom_up.weight[:, :, 0] = 0
        vae.bottom_up.bias[:, :, 1] = math.log(4.0)
        for network in vae.posterior.values():
            network.heads.bias[1] = math.log(4.0)
    evidence = vae.log_evidence(x, 20_000)
    # six independent estimates: a ratio above 5 has probability below 1e-5 for normal errors
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all()
    assert (evidence.standard_error < 0.1).all()
    assert (evidence.khat < 0.7).all()


@pytest.mark.parametrize("structure", ["learned", "full", "chain", "independent"])
def test_elbo_terms_against_the_closed_form(structure):
    vae = linear_vae(structure).eval()
    if structure == "learned":
        with torch.no_grad():
            vae.gates.logits[:] = torch.tensor([1.0, -1.0, 1.0])
    x = torch.randn(3, 4)
    expected = exact_elbo(vae, gate_matrix(vae), x)
    # sampled log-ratios: their mean is the ELBO
    log_weights = importance_log_weights(vae.model, vae.guide, x, num_particles=40_000)
    error = log_weights.std(0) / math.sqrt(len(log_weights))
    assert ((log_weights.mean(0) - expected).abs() < 4.5 * error).all()
    # analytic divergences node by node
    elbo = TraceMeanField_ELBO(num_particles=200, vectorize_particles=True)
    losses = torch.tensor([elbo.loss(vae.model, vae.guide, x) for _ in range(60)])
    assert abs(losses.mean() + expected.sum()) < 4.5 * losses.std() / math.sqrt(len(losses))


def test_divergences_are_from_the_learned_prior_node_by_node():
    vae = GraphVAE((6,), 4, 3, "learned", **SMALL)
    x = torch.randint(2, (10, 6)).to(torch.get_default_dtype())
    vae.gates.logits.data.normal_()
    for _ in range(3):  # running statistics that are not those at the start
        vae.guide(x)
        vae.model(x)
    vae.eval()
    pyro.set_rng_seed(3)
    loss = TraceMeanField_ELBO().loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(3)
    guide_trace = poutine.trace(vae.guide).get_trace(x)
    z = {name: site["value"] for name, site in guide_trace.nodes.items() if site["type"] == "sample"}
    embedding = vae.bottom_up(vae.encoder(x))
    expected, from_standard = 0.0, 0.0
    for i in reversed(range(4)):
        is_open = [float(vae.gates.logits[vae.gates.index[i, j]] > 0) for j in vae._parents[i]]
        mean1, var1 = embedding[i, :, :3], embedding[i, :, 3:].exp()
        if is_open:
            pa = torch.cat([c * z[vae.names[j]] for c, j in zip(is_open, vae._parents[i], strict=True)], -1)
            p_mean, p_log_var = vae.prior[str(i)](pa).chunk(2, -1)
            mean2, log_var2 = vae.posterior[str(i)](pa).chunk(2, -1)
            var = var1 * log_var2.exp() / (var1 + log_var2.exp())
            mean = (mean1 * log_var2.exp() + mean2 * var1) / (var1 + log_var2.exp())
        else:
            p_mean, p_log_var, var, mean = torch.zeros(10, 3), torch.zeros(10, 3), var1, mean1
        p_var = p_log_var.exp()
        expected += 0.5 * (p_var.log() - var.log() + (var + (mean - p_mean) ** 2) / p_var - 1).sum()
        from_standard += 0.5 * (-var.log() + var + mean**2 - 1).sum()
    logits = vae.decoder(torch.cat([z[name] for name in vae.names], -1))
    log_likelihood = (x * logits - nn.functional.softplus(logits)).sum()
    assert loss == pytest.approx((expected - log_likelihood).item(), rel=1e-10)
    assert abs((expected - from_standard).item()) > 1.0  # the wrong divergence would be seen


def test_mean_field_and_sampled_losses_agree():
    """Same expectation; the analytic one has less noise at a guide that is far from the posterior."""
    vae = GraphVAE((6,), 3, 2, "full", **SMALL).eval()
    x = torch.randint(2, (4, 6)).to(torch.get_default_dtype())
    options = {"num_particles": 50, "vectorize_particles": True}
    draws = [
        torch.tensor([elbo.loss(vae.model, vae.guide, x) for _ in range(60)])
        for elbo in (TraceMeanField_ELBO(**options), Trace_ELBO(**options))
    ]
    error = math.sqrt(sum(d.var().item() for d in draws) / 60)
    assert abs(draws[0].mean() - draws[1].mean()) < 4.5 * error
    assert draws[0].std() < draws[1].std()


# -------------------------------------------------------------------------------------------------------- gates


def relaxed_objective(vae, x, logit, temperature, num_points=4000):
    """E over the relaxed gate of the closed-form ELBO, by the midpoint rule over the gate's uniform noise."""
    u = (torch.arange(num_points) + 0.5) / num_points
    gates = ((logit + u.log() - (-u).log1p()) / temperature).sigmoid()
    return torch.vmap(lambda gate: exact_elbo(vae, gate_matrix(vae, [gate]), x).sum())(gates).mean()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_gate_gradient_is_that_of_the_relaxed_objective(temperature):
    vae = linear_vae("learned", num_nodes=2, num_observed=2)
    vae.temperature.fill_(temperature)
    vae.gates.logits.data.fill_(0.4)
    x = torch.randn(3, 2)
    logit = torch.tensor(0.4, requires_grad=True)
    (expected,) = torch.autograd.grad(relaxed_objective(vae, x, logit, temperature), logit)
    elbo = TraceMeanField_ELBO(num_particles=500, vectorize_particles=True)
    gradients = []
    for _ in range(100):
        loss = elbo.differentiable_loss(vae.model, vae.guide, x)
        gradients.append(-torch.autograd.grad(loss, vae.gates.logits)[0].item())
    error = np.std(gradients, ddof=1) / math.sqrt(len(gradients))
    assert abs(np.mean(gradients) - expected.item()) < 4.5 * error
    assert abs(expected.item()) > 10 * error  # a gradient of zero would be seen


def test_relaxed_objective_becomes_that_of_enumerated_gates():
    """Value and gradient of the sum over open and closed are the limit of the relaxed ones, not equal to them."""
    vae = linear_vae("learned", num_nodes=2, num_observed=2)
    x = torch.randn(3, 2)
    logit = torch.tensor(0.4, requires_grad=True)
    elbos = [exact_elbo(vae, gate_matrix(vae, [torch.tensor(c)]), x).sum() for c in (0.0, 1.0)]
    enumerated = (1 - logit.sigmoid()) * elbos[0] + logit.sigmoid() * elbos[1]
    (target,) = torch.autograd.grad(enumerated, logit)
    value_errors, gradient_errors = [], []
    for temperature in (1.0, 0.1, 0.02):
        relaxed = relaxed_objective(vae, x, logit, temperature)
        (gradient,) = torch.autograd.grad(relaxed, logit)
        value_errors.append(abs((relaxed - enumerated).item()))
        gradient_errors.append(abs((gradient - target).item()))
    assert value_errors[0] > value_errors[1] > value_errors[2]
    assert gradient_errors[0] > gradient_errors[1] > gradient_errors[2]
    assert value_errors[2] < 0.02 * value_errors[0] + 1e-3
    assert gradient_errors[2] < 0.05 * abs(target.item())


def test_gates_are_one_masked_site_that_adds_nothing():
    vae = GraphVAE((6,), 4, 2, **SMALL)
    x = torch.randint(2, (10, 6)).to(torch.get_default_dtype())
    guide_trace = poutine.trace(vae.guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(vae.model, guide_trace)).get_trace(x)
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
        site = trace.nodes["gates"]
        assert site["cond_indep_stack"] == ()
        assert site["mask"] is False
        assert site["log_prob_sum"] == 0
        assert site["fn"].event_shape == (6,)
    assert model_trace.nodes["gates"]["value"] is guide_trace.nodes["gates"]["value"]
    hidden = poutine.mask(vae.guide, mask=False)  # the sites of nodes are not masked by the gates'
    assert poutine.trace(hidden).get_trace(x).nodes["z1"]["mask"] is False
    assert guide_trace.nodes["z1"]["mask"] is None


def test_gates_are_not_kept_between_calls():
    """The model uses the gates of the trace it is run against, not those of the guide's last call."""
    vae = GraphVAE((6,), 3, 2, "learned", **SMALL)
    x = torch.randint(2, (10, 6)).to(torch.get_default_dtype())
    first = poutine.trace(vae.guide).get_trace(x)
    vae.guide(x)
    again = poutine.trace(poutine.replay(vae.model, first)).get_trace(x)
    torch.testing.assert_close(again.nodes["gates"]["value"], first.nodes["gates"]["value"])
    closed = poutine.condition(vae.model, data={"gates": torch.zeros(3)})
    model_trace = poutine.trace(poutine.replay(closed, first)).get_trace(x)
    expected = vae.prior["0"](torch.zeros(10, 4))[:, :2]
    torch.testing.assert_close(model_trace.nodes["z1"]["fn"].base_dist.loc, expected)


def test_hard_gates_in_evaluation_mode():
    vae = GraphVAE((6,), 3, 2, **SMALL).eval()
    x = torch.randint(2, (10, 6)).to(torch.get_default_dtype())
    vae.gates.logits.data[:] = torch.tensor([-0.1, 0.1, -0.1])  # z1 <- z2, z1 <- z3, z2 <- z3
    trace = poutine.trace(vae.model).get_trace(x)
    assert "gates" not in trace
    assert "gates" not in poutine.trace(vae.guide).get_trace(x)
    gated = torch.cat([torch.zeros(10, 2), trace.nodes["z3"]["value"]], -1)
    expected = vae.prior["0"](gated)[:, :2]
    torch.testing.assert_close(trace.nodes["z1"]["fn"].base_dist.loc, expected)


def test_particles_have_gates_of_their_own():
    vae = GraphVAE((6,), 3, 2, **SMALL)
    x = torch.randint(2, (10, 6)).to(torch.get_default_dtype())
    with pyro.plate("particles", 5, dim=-2):
        trace = poutine.trace(vae.guide).get_trace(x)
        value = poutine.trace(poutine.replay(vae.model, trace)).get_trace(x).nodes["z1"]["fn"]
    assert trace.nodes["gates"]["value"].shape == (5, 1, 3)
    assert len(trace.nodes["gates"]["value"].flatten().unique()) == 15
    assert value.batch_shape == (5, 10)


def test_average_over_gates_is_a_bound():
    """ELBO(c) of hard gates is the closed form, and its average does not exceed the evidence of the mixture."""
    vae = linear_vae("learned", num_nodes=3).eval()  # hard gates
    vae.gates.logits.data.normal_()
    x = torch.randn(4, 4)
    p = vae.gates.logits.detach().sigmoid()
    elbo = TraceMeanField_ELBO(num_particles=100, vectorize_particles=True)
    logs, elbos, weights = [], [], []
    for values in itertools.product([0.0, 1.0], repeat=3):
        c = torch.tensor(values)
        exact = exact_elbo(vae, gate_matrix(vae, list(c)), x)
        vae.gates.logits.data = 2 * c - 1
        losses = torch.tensor([elbo.loss(vae.model, vae.guide, x) for _ in range(20)])
        assert abs(losses.mean() + exact.sum()) < 4.5 * losses.std() / math.sqrt(len(losses))
        weights.append(torch.where(c == 1, p, 1 - p).prod())
        logs.append(exact_evidence(vae, gate_matrix(vae, list(c)), x))
        elbos.append(exact)
    weights = torch.stack(weights)
    mixture = (torch.stack(logs) + weights.log()[:, None]).logsumexp(0)
    assert (weights @ torch.stack(elbos) <= mixture).all()
    assert torch.stack(elbos).sum(1).std() > 1.0  # gates matter here


def test_recalibration_uses_hard_gates():
    vae = GraphVAE((6,), 3, 2, **SMALL)
    x = torch.randint(2, (40, 6)).to(torch.get_default_dtype())
    vae.gates.logits.data[:] = torch.tensor([0.1, -0.1, -0.1])  # z1 <- z2 only
    for _ in range(5):
        vae.guide(x)
        vae.model(x)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    pyro.set_rng_seed(3)
    assert vae.recalibrate(x, batch_size=20) is vae
    assert vae.training
    assert all(m.training and m.momentum == 0.1 for m in vae.modules() if isinstance(m, nn.BatchNorm1d))
    assert all(torch.equal(p, before[name]) for name, p in vae.named_parameters())
    first = vae.encoder[1](x)
    parts = first.split(20)
    torch.testing.assert_close(vae.encoder[2].running_mean, sum(part.mean(0) for part in parts) / 2)
    torch.testing.assert_close(vae.encoder[2].running_var, sum(part.var(0) for part in parts) / 2)
    # z2 has no open gate: its prior's hidden layer sees zeros, whose batch variance is none
    norm, linear = vae.prior["1"].hidden[1], vae.prior["1"].hidden[0]
    torch.testing.assert_close(norm.running_mean, linear.bias)
    torch.testing.assert_close(norm.running_var, torch.zeros(6))
    # the column of z3 is closed in z1's: only z2's values are seen
    assert (vae.prior["0"].hidden[1].running_var > 0).all()
    with pytest.raises(GraphflowsError, match="at least two data"):
        vae.recalibrate(x[:1])


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO(), Trace_ELBO(), IWAE_ELBO(2)])
def test_edge_cost_is_in_the_training_loss_only(elbo):
    x = torch.randint(2, (10, 6)).to(torch.get_default_dtype())
    losses, gradients, evaluated = [], [], []
    for cost in (0.0, 0.3):
        pyro.set_rng_seed(1)
        vae = GraphVAE((6,), 3, 2, edge_cost=cost, **SMALL)
        vae.gates.logits.data[:] = torch.tensor([1.0, 0.0, -2.0])
        loss = elbo.differentiable_loss(vae.model, vae.guide, x)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, vae.gates.logits)[0])
        pyro.set_rng_seed(2)
        evaluated.append(elbo.loss(vae.eval().model, vae.guide, x))
    p = torch.tensor([1.0, 0.0, -2.0]).sigmoid()
    assert losses[1] - losses[0] == pytest.approx(0.3 * 10 * p.sum().item(), rel=1e-9)
    torch.testing.assert_close(gradients[1] - gradients[0], 0.3 * 10 * p * (1 - p))
    # the running statistics are those of one training step, the same for both
    assert evaluated[0] == evaluated[1]


def test_annealing():
    vae = GraphVAE((6,), 3, 2, **SMALL)
    assert vae.temperature == 1
    assert vae.anneal(10) == pytest.approx(0.99**10)
    assert vae.temperature.item() == pytest.approx(0.99**10)
    assert vae.anneal(1000) == 0.1
    assert vae.anneal(3, rate=0.5, floor=0.2) == 0.2
    assert GraphVAE((6,), 3, 2, "full", **SMALL).anneal(1) == 0.99


# ---------------------------------------------------------------------------------------------------- structures


def parents_by_gradient(vae, child):
    """The nodes that the prior of a node depends on, by its Jacobian."""
    names = [name for name in vae.names if name != child]
    values = {name: torch.randn(3, vae.node_dim, requires_grad=True) for name in vae.names}
    trace = poutine.trace(poutine.condition(vae.model, data=values)).get_trace(None, 3)
    loc = trace.nodes[child]["fn"].base_dist.loc
    if not loc.requires_grad:
        return set()
    gradients = torch.autograd.grad(loc.sum(), [values[name] for name in names], allow_unused=True)
    return {
        name
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is not None and gradient.any()
    }


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        ("full", {"z1": {"z2", "z3", "z4"}, "z2": {"z3", "z4"}, "z3": {"z4"}, "z4": set()}),
        ("chain", {"z1": {"z2"}, "z2": {"z3"}, "z3": {"z4"}, "z4": set()}),
        ("independent", {"z1": set(), "z2": set(), "z3": set(), "z4": set()}),
        (
            nx.DiGraph([("a", "b"), ("c", "b"), ("b", "d")]),
            {"a": set(), "c": set(), "b": {"a", "c"}, "d": {"b"}},
        ),
        (
            nx.DiGraph([(4, 1), (3, 1), (2, 1)]),
            {"z4": set(), "z3": set(), "z2": set(), "z1": {"z2", "z3", "z4"}},
        ),
    ],
)
def test_structures(structure, expected):
    vae = GraphVAE((6,), 4, 2, structure, decoder_input="first", **SMALL).eval()
    assert {child: parents_by_gradient(vae, child) for child in vae.names} == expected
    graph = vae.learned_graph()
    assert {name: set(graph.parents(name)) for name in graph.latent} == expected
    assert graph.parents("x") == (vae.names[0],)
    assert graph.observed == ("x",)
    assert graph.event_sizes == {**dict.fromkeys(expected, 2), "x": 6}
    again = GraphVAE((6,), None, 2, graph, **SMALL)
    assert set(again.learned_graph().edges) - {(n, "x") for n in again.names} == set(graph.edges) - {
        (vae.names[0], "x")
    }


def test_learned_graph_and_freezing():
    vae = GraphVAE((6,), 3, 2, decoder_input="first", **SMALL)
    vae.gates.logits.data[:] = torch.tensor([2.0, 0.3, -2.0])  # z1 <- z2, z1 <- z3, z2 <- z3
    probabilities = vae.gate_probabilities
    assert probabilities[0, 1] == torch.tensor(2.0).sigmoid()
    assert (probabilities.tril() == 0).all()
    assert set(vae.learned_graph().edges) == {("z2", "z1"), ("z3", "z1"), ("z1", "x")}
    assert set(vae.learned_graph(0.7).edges) == {("z2", "z1"), ("z1", "x")}
    inverse = faithful_inverse(vae.learned_graph())
    assert set(inverse.parents) == {"z1", "z2", "z3"}
    assert vae.freeze_structure(0.7) is vae
    assert vae.gate_probabilities.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    x = torch.randint(2, (10, 6)).to(torch.get_default_dtype())
    assert "gates" not in poutine.trace(vae.guide).get_trace(x)
    assert parents_by_gradient(vae, "z1") == {"z2"}
    before = vae.gates.logits.detach().clone()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO())
    svi.step(x)
    assert (vae.gates.logits == before).all()
    with pytest.raises(GraphflowsError, match="frozen already"):
        GraphVAE((6,), 3, 2, "full", **SMALL).freeze_structure()


def test_the_tracer_reads_the_learned_structure():
    """A guide compiled from the frozen model has the faithful inverse of the learned graph."""
    vae = GraphVAE((4,), 3, 1, decoder_input="first", **SMALL)
    vae.gates.logits.data[:] = torch.tensor([2.0, -1.0, 1.0])
    vae.freeze_structure().eval()
    x = torch.randint(2, (10, 4)).to(torch.get_default_dtype())
    guide = auto_faithful_guide(vae.model, x, init="random")
    assert set(guide.model_graph.edges) == {("z3", "z2"), ("z2", "z1"), ("z1", "x")}
    expected = faithful_inverse(vae.learned_graph())
    assert {n: set(p) for n, p in guide.inverse.parents.items()} == {
        n: set(p) for n, p in expected.parents.items()
    }
    assert math.isfinite(Trace_ELBO().loss(vae.model, guide, x))


def test_decoder_input():
    x = torch.randint(2, (10, 6)).to(torch.get_default_dtype())
    for decoder_input, expected in (("first", {"z1"}), ("all", {"z1", "z2", "z3"})):
        vae = GraphVAE((6,), 3, 2, "full", decoder_input=decoder_input, **SMALL).eval()
        values = {name: torch.randn(10, 2, requires_grad=True) for name in vae.names}
        trace = poutine.trace(poutine.condition(vae.model, data=values)).get_trace(x)
        logits = trace.nodes["x"]["fn"].base_dist.logits
        gradients = torch.autograd.grad(logits.sum(), list(values.values()), allow_unused=True)
        seen = {
            name
            for name, gradient in zip(values, gradients, strict=True)
            if gradient is not None and gradient.any()
        }
        assert seen == expected


def test_independent_has_as_many_parameters():
    def count(structure, **options):
        return sum(p.numel() for p in GraphVAE((28, 28), 5, 16, structure, **options).parameters())

    full = count("full")
    assert count("learned") == full + 10
    assert count("independent", match_parameters=False) < 0.97 * full
    assert abs(count("independent") - full) < 1e-3 * full
    assert count("chain") < full


def test_networks_of_the_paper():
    vae = GraphVAE((28, 28), 5, 16)
    widths = [layer.out_features for layer in vae.encoder if isinstance(layer, nn.Linear)]
    assert widths == [512, 512, 256, 128]
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in vae.encoder) == 2
    widths = [
        (layer.in_features, layer.out_features) for layer in vae.decoder if isinstance(layer, nn.Linear)
    ]
    assert widths == [(80, 256), (256, 512), (512, 512), (512, 784)]
    assert vae.prior["0"].hidden[0].in_features == 64
    assert vae.prior["3"].hidden[0].in_features == 16
    assert vae.posterior["0"].heads.out_features == 32


# ----------------------------------------------------------------------------------------------------------- use


@pytest.mark.parametrize("structure", ["learned", "chain", "independent"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_training_reaches_every_parameter(structure, likelihood):
    vae = GraphVAE((3, 2), 3, 2, structure, likelihood=likelihood, **SMALL)
    x = (torch.arange(6).reshape(3, 2) % 2).expand(40, 3, 2).double() * torch.rand(40, 1, 1).round()
    x = (x + 0.05 * torch.randn(x.shape)).clamp(0, 1) if likelihood == "normal" else x
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 3e-2}), TraceMeanField_ELBO())
    losses = [svi.step(x) for _ in range(40)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 40
    assert not [name for name, p in vae.named_parameters() if torch.equal(p, before[name])]


def test_use_after_training():
    vae = GraphVAE((3, 2), 3, 2, **SMALL)
    x = torch.randint(2, (20, 3, 2))  # any type of number
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO()).step(x)
    state = copy.deepcopy(vae.state_dict())
    for kind in (False, True):
        assert vae.sample(7, mean=kind).shape == (7, 3, 2)
    assert set(vae.sample(50).unique().tolist()) <= {0.0, 1.0}
    assert vae.reconstruct(x).shape == x.shape
    assert {name: value.shape for name, value in vae.encode(x).items()} == dict.fromkeys(vae.names, (20, 2))
    assert vae.log_evidence(x, 30).khat.shape == (20,)
    assert vae.training
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())
    one = vae.log_evidence(x[:1], 10)  # a single datum: no batch statistics in evaluation mode
    assert one.log_evidence.shape == (1,)


def test_sample_and_reconstruct_have_the_moments_of_the_linear_model():
    vae = linear_vae("full")
    mean, covariance = gaussian(*prior_maps(vae, gate_matrix(vae)))
    decoder, bias = vae.decoder.weight.detach(), vae.decoder.bias.detach()
    samples = vae.sample(40_000)
    sd = (decoder @ covariance @ decoder.T).diagonal().add(NOISE**2).sqrt()
    assert ((samples.mean(0) - decoder @ mean - bias).abs() < 4.5 * sd / 200).all()
    assert ((samples.std(0) / sd - 1).abs() < 4.5 / math.sqrt(2 * 40_000)).all()
    x = torch.randn(1, 4)
    q_mean, q_covariance = gaussian(*guide_maps(vae, gate_matrix(vae), x))
    many = vae.reconstruct(x.expand(40_000, 4))
    sd = (decoder @ q_covariance @ decoder.T).diagonal().sqrt()
    assert ((many.mean(0) - decoder @ q_mean[0] - bias).abs() < 4.5 * sd / 200).all()
    encoded = torch.cat([vae.encode(x)[name] for name in vae.names], -1)
    torch.testing.assert_close(encoded, q_mean)


def test_bits_per_dimension():
    vae = GraphVAE((3, 2), 2, 1, likelihood="normal", **SMALL)
    torch.testing.assert_close(vae.bits_per_dimension(torch.zeros(4)), torch.full((4,), 8.0))
    torch.testing.assert_close(vae.bits_per_dimension(torch.tensor(6 * math.log(2.0)), 2), torch.tensor(0.0))


def test_copies_and_files():
    vae = GraphVAE((6,), 3, 2, **SMALL)
    x = torch.randint(2, (10, 6)).to(torch.get_default_dtype())
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO()).step(x)
    vae.freeze_structure(0.4)
    file = io.BytesIO()
    torch.save(vae, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    fresh = GraphVAE((6,), 3, 2, **SMALL)
    fresh.load_state_dict(vae.state_dict())
    pyro.set_rng_seed(5)
    expected = vae.log_evidence(x, 3).log_evidence
    for other in (whole, fresh, copy.deepcopy(vae)):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        assert torch.equal(other.log_evidence(x, 3).log_evidence, expected)
        assert torch.equal(other.gate_probabilities, vae.gate_probabilities)


def test_states_of_other_structures():
    """As many parents everywhere, but not the same ones: all shapes agree, and every result would be wrong."""
    given = GraphVAE((6,), None, 2, nx.DiGraph([("a", "b"), ("a", "c"), ("c", "d")]), **SMALL)
    other = GraphVAE((6,), None, 2, nx.DiGraph([("a", "b"), ("b", "c"), ("a", "d")]), **SMALL)
    file = io.BytesIO()
    torch.save(given.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in other.state_dict().items()}
    with pytest.raises(
        RuntimeError, match="the same possible arcs in the same order; it has c -> d for a -> d"
    ):
        other.load_state_dict(state)
    GraphVAE((6,), None, 2, nx.DiGraph([("a", "b"), ("a", "c"), ("c", "d")]), **SMALL).load_state_dict(state)


def test_fit_resumes_with_the_temperature(tmp_path):
    x = torch.randint(2, (30, 6)).to(torch.get_default_dtype())

    def run(epochs, checkpoint=None):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        vae = GraphVAE((6,), 3, 2, **SMALL)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            history = fit(
                vae.model,
                vae.guide,
                TrainingData(x, batch_size=10),
                loss=TraceMeanField_ELBO(),
                schedule=Schedule(epochs, patience=None),
                checkpoint=checkpoint,
                progress=Progress(bar=False, on_epoch=lambda done: vae.anneal(len(done)) and None),
            )
        return vae, history

    whole, history = run(4)
    run(2, tmp_path / "run.pt")
    resumed, again = run(4, tmp_path / "run.pt")
    assert history.loss == again.loss
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    assert 0.96 < whole.temperature < 1


def test_two_modules_of_one_name_are_told_apart():
    """Pyro's store keeps what it saw first under a name: training a second module would train the first."""
    x = torch.randint(2, (10, 6)).to(torch.get_default_dtype())
    first, second = GraphVAE((6,), 3, 2, **SMALL), GraphVAE((6,), 3, 2, **SMALL)
    for vae in (first, second, first):
        before = {
            name: p.detach().clone()
            for name, p in (*first.named_parameters("1"), *second.named_parameters("2"))
        }
        SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO()).step(x)
        moved = {
            name[0]
            for name, p in (*first.named_parameters("1"), *second.named_parameters("2"))
            if not torch.equal(p, before[name])
        }
        assert moved == {"1" if vae is first else "2"}
    number = len(pyro.get_param_store())
    GraphVAE((6,), 3, 2, **SMALL).log_evidence(x, 3)  # evaluation leaves nothing in the store
    assert len(pyro.get_param_store()) == number == 2 * len(list(first.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "tree"}, "Expected structure among learned, full, chain, independent"),
        ({"structure": 3}, "got a int"),
        ({"structure": nx.DiGraph([("a", "b")]), "num_nodes": 3}, "it has 2"),
        ({"structure": nx.DiGraph([("a", "x")])}, "other than 'gates', 'x', 'data'"),
        ({"structure": nx.DiGraph([("a", "data")])}, "other than 'gates', 'x', 'data'"),
        ({"structure": nx.DiGraph([("z1", 1)])}, "distinct node names"),
        ({"likelihood": "poisson"}, "Expected likelihood"),
        ({"decoder_input": "last"}, "Expected decoder_input"),
        ({"edge_cost": -1.0}, "edge_cost >= 0"),
        ({"node_dim": 0}, "positive whole numbers for sizes; got node_dim=0"),
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"num_nodes": 2.0}, "num_nodes=2.0"),
        ({"hidden_dim": 0}, "hidden_dim=0"),
        ({"encoder_dims": (3, 0)}, "encoder_dims="),
        ({"encoder": torch.flatten}, "encoder to be a torch.nn.Module"),
        ({"decoder": torch.sigmoid}, "decoder to be a torch.nn.Module"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(GraphflowsError, match=message):
        GraphVAE((6,), **options)


def test_wrong_calls():
    with pytest.raises(NotADAGError, match="cycle"):
        GraphVAE((6,), structure=nx.DiGraph([("a", "b"), ("b", "a")]))
    vae = GraphVAE((6,), 2, 2, **SMALL)
    with pytest.raises(GraphflowsError, match=r"shape \(num_data, 6\); got \(10, 5\)"):
        vae.model(torch.zeros(10, 5))
    with pytest.raises(GraphflowsError, match=r"shape \(num_data, 6\); got \(6,\)"):
        vae.guide(torch.zeros(6))
    with pytest.raises(GraphflowsError, match="got a ndarray"):
        vae.reconstruct(np.zeros((10, 6)))
    with pytest.raises(GraphflowsError, match=r"zeros and ones .* from 0.3 to 0.3\. Binarise"):
        vae.guide(torch.full((10, 6), 0.3))
    with pytest.raises(GraphflowsError, match=r"data in \[0, 1\] .* from 0 to 255\. Scale"):
        GraphVAE((6,), 2, 2, likelihood="normal", **SMALL).model(torch.tensor([[0.0] * 6, [255.0] * 6]))
    with pytest.raises(GraphflowsError, match="data in"):
        GraphVAE((6,), 2, 2, likelihood="normal", **SMALL).model(torch.full((2, 6), torch.nan))
    with pytest.raises(GraphflowsError, match="at least two data"):
        vae.guide(torch.zeros(1, 6))
    with pytest.raises(GraphflowsError, match="Expected data x for the guide"):
        vae.guide()
    with pytest.raises(GraphflowsError, match="embedding_dim"):
        GraphVAE((6,), 2, 2, encoder=nn.Flatten(), embedding_dim=5).guide(torch.zeros(3, 6))
    for likelihood, number in (("bernoulli", 6), ("normal", 12)):
        wrong = GraphVAE((6,), 2, 2, decoder=nn.Linear(4, 10), likelihood=likelihood)
        with pytest.raises(GraphflowsError, match=rf"decoder to return {number} numbers .* got 10"):
            wrong.sample(3)
    with pytest.raises(GraphflowsError, match="likelihood to return a distribution"):
        GraphVAE((6,), 2, 2, likelihood=torch.exp).sample(3)
    for empty in (lambda: vae.model(torch.zeros(0, 6)), lambda: vae.log_evidence(torch.zeros(0, 6))):
        with pytest.raises(GraphflowsError, match=r"at least one datum; got the shape \(0, 6\)"):
            empty()
    with pytest.raises(GraphflowsError, match="got a ndarray"):
        vae.log_evidence(np.zeros((10, 6)))
    with pytest.raises(GraphflowsError, match="batch_size=0"):
        vae.log_evidence(torch.zeros(3, 6), batch_size=0)
    for number in (0, -1, 2.5):
        with pytest.raises(GraphflowsError, match=f"num_samples={number}"):
            vae.sample(number)


def test_modules_for_images():
    """Convolutions with batch norm as encoder and decoder; the decoder may return images."""
    encoder = nn.Sequential(nn.Conv2d(1, 2, 2, 2), nn.BatchNorm2d(2), nn.ELU(), nn.Flatten(), nn.Linear(8, 5))
    decoder = nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 1, 2, 2))
    vae = GraphVAE((1, 4, 4), 3, 2, encoder=encoder, decoder=decoder, embedding_dim=5, hidden_dim=6)
    x = torch.randint(2, (10, 1, 4, 4)).double()
    for elbo in (TraceMeanField_ELBO(), Trace_ELBO(num_particles=2, vectorize_particles=True)):
        assert math.isfinite(SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(x))
    assert vae.sample(3).shape == (3, 1, 4, 4)
    assert vae.log_evidence(x, 3).log_evidence.shape == (10,)
    vae.recalibrate(x)  # the statistics of every batch norm
    first, norm = encoder[0](x), encoder[1]
    torch.testing.assert_close(norm.running_mean, first.mean((0, 2, 3)).detach())
    torch.testing.assert_close(norm.running_var, first.transpose(0, 1).flatten(1).var(1).detach())


def test_a_likelihood_with_parameters_is_trained():
    class WithNoise(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, outputs):
            return dist.Normal(outputs, self.log_scale.exp()).to_event(1)

    vae = GraphVAE((6,), 2, 2, likelihood=WithNoise(), **SMALL)
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(torch.randn(10, 6))
    assert vae.likelihood.log_scale != 0


def test_one_node_has_no_gates():
    vae = GraphVAE((6,), 1, 2, **SMALL)
    x = torch.randint(2, (10, 6)).to(torch.get_default_dtype())
    assert "gates" not in poutine.trace(vae.guide).get_trace(x)
    assert vae.gate_probabilities.tolist() == [[0.0]]
    assert isinstance(vae.learned_graph(), ModelGraph)


# -------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("structure", ["learned", "full", "independent"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_every_tensor_is_made_on_the_device_of_the_parameters(structure, likelihood):
    """On torch's ``meta`` device, which refuses to be mixed with others; it has no values, so gates are given here."""
    pyro.enable_validation(False)
    vae = GraphVAE((3, 2), 3, 2, structure, likelihood=likelihood, **SMALL).to("meta")
    x = torch.empty(10, 3, 2, dtype=torch.uint8, device="meta")

    def gates():
        with poutine.mask(mask=False):
            law = dist.RelaxedBernoulli(vae.temperature, logits=vae.gates.logits)
            return pyro.sample("gates", law.to_event(1))

    for which in ("relaxed", "hard"):
        if structure == "learned":
            vae._gate_values = gates if which == "relaxed" else lambda: [True, False, True]
        guide_trace = poutine.trace(vae.guide).get_trace(x)
        model_trace = poutine.trace(poutine.replay(vae.model, guide_trace)).get_trace(x)
        model_trace.compute_log_prob()
        for trace in (guide_trace, model_trace):
            sites = [
                site for site in trace.nodes.values() if site["type"] == "sample" and site["name"] != "data"
            ]
            assert all(site["value"].device.type == "meta" for site in sites)
        assert model_trace.nodes["x"]["log_prob"].device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu():
    vae = GraphVAE((6,), 3, 2, **SMALL).to("cuda")
    x = torch.randint(2, (20, 6), device="cuda")
    fit(
        vae.model,
        vae.guide,
        TrainingData(x, batch_size=10),
        loss=TraceMeanField_ELBO(),
        schedule=2,
        progress=False,
    )
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO()).step(x)
    assert vae.log_evidence(x, 20).log_evidence.device.type == "cuda"
    assert vae.sample(3).device.type == vae.reconstruct(x).device.type == "cuda"
    assert vae.anneal(5) == vae.temperature.item()
    assert len(vae.freeze_structure().learned_graph().latent) == 3
    assert vae.gate_probabilities.device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_far_out_is_a_number(dtype):
    """Networks have no bounds: far out a scale would round to zero or infinity, and the density be no number."""
    pyro.set_rng_seed(0)
    vae = GraphVAE((4,), 2, 1, "chain", encoder_dims=[4], decoder_dims=[4], embedding_dim=4, hidden_dim=4)
    vae = vae.to(dtype).eval()
    with torch.no_grad():
        head = vae.prior["0"]
        for parameter in head.parameters():
            parameter.fill_(1.0)  # mean and log-variance of z1 grow with z2
    for value in (1e4, -1e4):
        z2 = torch.full((3, 1), value, dtype=dtype, requires_grad=True)
        z1 = torch.zeros(3, 1, dtype=dtype, requires_grad=True)
        trace = poutine.trace(poutine.condition(vae.model, {"z2": z2, "z1": z1})).get_trace(
            torch.ones(3, 4, dtype=dtype)
        )
        law = trace.nodes["z1"]["fn"]
        assert (law.base_dist.scale > 0).all()
        assert law.base_dist.scale.isfinite().all()
        log_prob = law.log_prob(z1)
        assert log_prob.isfinite().all()
        for gradient in torch.autograd.grad(log_prob.sum(), [z1, z2], allow_unused=True):
            assert gradient.isfinite().all()
