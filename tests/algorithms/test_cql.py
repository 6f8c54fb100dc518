"""CQL: Cal-QL without the calibration, bit for bit, so Cal-QL's slow recomputation holds too."""

import inspect
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from recompute import CQL_VARIANTS, linear_layers, make_agent, make_batch, updated

import calql_sera
import cql_sera


# ------------------------------ Cal-QL without calibration
def cql_batch(seed=0):
    """A batch as CQL samples it: without returns-to-go."""
    batch = make_batch(seed)
    del batch["mc_returns"]
    return batch


@pytest.mark.parametrize(
    "name",
    ["sample_tanh_gaussian", "Actor", "Agent", "make_optimizer", "sample_cql_actions"],
)
def test_same_as_in_calql(name):
    """Networks, acting, values, rates, sampled actions are Cal-QL's, and so its tests hold here."""
    source = inspect.getsource(getattr(cql_sera, name))
    assert source == inspect.getsource(getattr(calql_sera, name))


def test_same_defaults_as_calql():
    """A comparison of both changes the calibration only: all arguments and presets are equal."""
    assert asdict(cql_sera.Args()) == asdict(calql_sera.Args())
    assert cql_sera.PRESETS == calql_sera.PRESETS


def test_no_returns_to_go():
    """The buffer stores nothing beside transitions, which need not wait for an episode's end."""
    assert not cql_sera.WAIT_FOR_EPISODE_END
    assert calql_sera.WAIT_FOR_EPISODE_END
    assert cql_sera.added_columns({}, cql_sera.Args(), 1.0) == {}


@pytest.mark.parametrize("variant", CQL_VARIANTS)
def test_calql_without_calibration(variant):
    """With R = -1e9 Cal-QL learns the same, bit for bit, in all networks; with its own R not."""
    changes = {"actor_lr": 0.01, "critic_lr": 0.02, "tau": 0.1, "cql_actions": 3}
    changes |= CQL_VARIANTS[variant]
    cql, optimizer, args = make_agent(cql_sera, **changes)
    unbounded, unbounded_optimizer, calql_args = make_agent(calql_sera, **changes)
    calql, calql_optimizer, _ = make_agent(calql_sera, **changes)
    for seed in range(5):
        batch = make_batch(seed)
        updated(calql_sera, calql, calql_optimizer, batch, calql_args, seed=seed)
        batch["mc_returns"] = torch.full((6,), -1e9)
        expected = updated(calql_sera, unbounded, unbounded_optimizer, batch, calql_args, seed=seed)
        logs = updated(cql_sera, cql, optimizer, cql_batch(seed), args, seed=seed)
        assert expected.pop("losses/calibrated_share") == 0
        assert logs == expected
        for name, parameter in cql.named_parameters():
            other = unbounded.get_parameter(name)
            assert torch.equal(parameter, other), name
            assert (parameter.grad is None) == (other.grad is None), name
            assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name
    for name in ("critics", "target_critics", "actor"):
        parameters = getattr(cql, name).parameters()
        others = getattr(calql, name).parameters()
        pairs = zip(parameters, others, strict=True)
        assert not any(torch.equal(one, other) for one, other in pairs), name


# ------------------------------ the conservative term
def test_conservative_term_by_hand():
    """One action dimension, every Q 0, every density 1/2: log 60, less Q of the data's action."""
    q_data = torch.zeros(2, 5)
    q_sampled = torch.zeros(2, 5, 30)
    log_densities = torch.full((5, 30), -math.log(2))

    def term():
        return cql_sera.conservative_term(q_data, q_sampled, log_densities).tolist()

    assert term() == pytest.approx([4.094345] * 2)
    q_data[1] = 3  # critic by critic
    assert term() == pytest.approx([4.094345, 1.094345], abs=1e-5)
    q_data[0] = torch.arange(5.0)  # a mean over the batch
    assert term() == pytest.approx([2.094345, 1.094345], abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 300.0, 1e6])
def test_conservative_term_by_loops(scale):
    """A slow float64 logsumexp gives the same, and its slopes, however far apart the values are.

    In float32 exp(89) is infinite. Nothing is clipped either: terms of rows reach far below -200.
    """
    rng = np.random.default_rng(2)
    n, batch_size = 4, 7
    q_data = (scale * rng.normal(size=(2, batch_size))).astype(np.float32)
    q_data[:, 0] += 4 * scale
    q_sampled = (scale * rng.normal(size=(2, batch_size, 3 * n))).astype(np.float32)
    log_densities = math.sqrt(scale) * rng.normal(size=(batch_size, 3 * n))
    log_densities = log_densities.astype(np.float32)
    expected = []
    slopes = np.zeros(q_sampled.shape)
    for j in (0, 1):
        terms = []
        for i in range(batch_size):
            pairs = zip(q_sampled[j, i], log_densities[i])
            exponents = [float(q) - float(log_density) for q, log_density in pairs]
            top = max(exponents)
            total = sum(math.exp(x - top) for x in exponents)
            terms.append(top + math.log(total) - q_data[j, i])
            slopes[j, i] = [math.exp(x - top) / total / batch_size for x in exponents]
        assert (min(terms) < -200) == (scale > 1)
        expected.append(sum(terms) / batch_size)
    of_data = torch.from_numpy(q_data).requires_grad_()
    of_sampled = torch.from_numpy(q_sampled).requires_grad_()
    term = cql_sera.conservative_term(of_data, of_sampled, torch.from_numpy(log_densities))
    assert term.tolist() == pytest.approx(expected, rel=1e-5)
    term.sum().backward()
    np.testing.assert_allclose(of_sampled.grad, slopes, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(of_data.grad, np.full((2, batch_size), -1 / batch_size), rtol=1e-6)


# ------------------------------ the update
def test_sampled_actions_are_valued_at_the_state():
    """Q_j(s, a) = s_0, pi of deviation 1/2: s_0 cancels, C_j is logsumexp(-log mu) by hand.

    Next actions valued at s', where Q_j is higher by 50, would make it 50. Only the target sees s'.
    """
    changes = {"cql_actions": 3, "critic_layers": 1, "gamma": 0.5}
    agent, optimizer, args = make_agent(cql_sera, **changes)
    with torch.no_grad():
        for critics in (agent.critics, agent.target_critics):
            for parameter in critics.parameters():
                parameter.zero_()
            hidden, last = linear_layers(critics)
            hidden.weight[:, 0, 0] = 1
            last.weight[:, 0, 0] = 1
            hidden.bias[:, 0, 0] = 100  # far from the kink of the ReLU
            last.bias[:, 0, 0] = -100
        agent.actor.layers[-1].weight.zero_()
        agent.actor.layers[-1].bias.zero_()
        agent.actor.log_std_offset.fill_(math.log(0.5))
    batch = cql_batch()
    batch["next_observations"][:, 0] = batch["observations"][:, 0] + 50
    logs = updated(cql_sera, agent, optimizer, batch, args)

    torch.manual_seed(7)
    torch.randn(6, 2)  # the policy loss draws first
    noise = torch.randn(2, 6, 3, 2).double()
    terms = []
    for i in range(6):
        inverse_densities = [4.0] * 3  # the square [-1, 1]^2 has area 4
        for z in noise[:, i].reshape(6, 2):
            u = 0.5 * z
            normal = (-0.5 * z**2).exp() / (0.5 * math.sqrt(2 * math.pi))
            density = normal / (1 - u.tanh() ** 2)
            inverse_densities.append(1 / density.prod().item())
        terms.append(math.log(sum(inverse_densities)))
    assert logs["losses/conservative"] == pytest.approx(sum(terms) / 6, abs=1e-4)
    first = batch["observations"][:, 0]
    next_first = batch["next_observations"][:, 0]
    y = batch["rewards"] + 0.5 * (1 - batch["terminals"]) * next_first
    td = 2 * (first - y).square().mean().item()
    assert logs["losses/td"] == pytest.approx(td, rel=1e-4)


@pytest.mark.parametrize("script", [cql_sera, calql_sera])
def test_the_multiplier_has_a_bound(script):
    """w' beyond 1e6 counts as 1e6 and gets no gradient; critics learn as with that fixed weight."""
    tuned, optimizer, args = make_agent(script, cql_actions=3, cql_lagrange=True, cql_weight=2.0)
    fixed, fixed_optimizer, fixed_args = make_agent(script, cql_actions=3, cql_weight=2e6)
    with torch.no_grad():
        tuned.log_multiplier.fill_(20.0)
    updated(script, tuned, optimizer, make_batch(), args)
    updated(script, fixed, fixed_optimizer, make_batch(), fixed_args)
    assert tuned.log_multiplier.grad.item() == 0
    for name, parameter in tuned.critics.named_parameters():
        assert parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad, fixed.critics.get_parameter(name).grad)


def test_lagrange_loss_reaches_the_multiplier_alone():
    """w' has the slope -1/2 sum_j w' w (C_j - g); critics learn as with the fixed weight w' w."""
    changes = {"cql_lagrange": True, "cql_weight": 2.0, "cql_gap": 0.4}
    tuned, optimizer, args = make_agent(cql_sera, cql_actions=3, **changes)
    weight = 2.0 * tuned.log_multiplier.exp().item()
    fixed, fixed_optimizer, fixed_args = make_agent(cql_sera, cql_actions=3, cql_weight=weight)
    conservative = updated(cql_sera, tuned, optimizer, cql_batch(), args)["losses/conservative"]
    updated(cql_sera, fixed, fixed_optimizer, cql_batch(), fixed_args)
    expected = -0.5 * weight * 2 * (conservative - 0.4)
    assert tuned.log_multiplier.grad.item() == pytest.approx(expected, rel=1e-5)
    assert fixed.log_multiplier.grad is None
    compared = 0
    for name, parameter in tuned.named_parameters():
        if name == "log_multiplier" or name.startswith("target_"):
            continue
        assert parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad, fixed.get_parameter(name).grad, msg=name)
        compared += 1
    assert compared == len(optimizer.state) - 1
