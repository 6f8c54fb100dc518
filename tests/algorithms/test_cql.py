"""CQL: Cal-QL without the calibration, bit for bit, so that Cal-QL's slow recomputation holds for it too."""

import inspect
import math
from dataclasses import asdict

import gymnasium
import numpy as np
import pytest
import torch
from recompute import CQL_VARIANTS, make_batch, make_networks, updated

import calql_sera
import cql_sera


# ------------------------------ Cal-QL without calibration
def cql_batch(seed=0):
    """A batch as CQL samples it: without returns-to-go."""
    batch = make_batch(seed)
    del batch["mc_returns"]
    return batch


@pytest.mark.parametrize("name", ["squash", "Actor", "make_networks", "act", "state_value"])
def test_same_as_in_calql(name):
    """Networks, acting and values are Cal-QL's, to the letter: its tests hold here too."""
    assert inspect.getsource(getattr(cql_sera, name)) == inspect.getsource(getattr(calql_sera, name))


def test_same_defaults_as_calql():
    """A comparison of both algorithms changes the calibration only: all arguments and presets are equal."""
    assert asdict(cql_sera.Args()) == asdict(calql_sera.Args())
    assert cql_sera.PRESETS == calql_sera.PRESETS


@pytest.mark.parametrize("variant", CQL_VARIANTS)
def test_calql_without_calibration(variant):
    """With R = -1e9 Cal-QL learns the same, bit for bit, in every network and log; with its own R not."""
    changes = {"actor_lr": 0.01, "critic_lr": 0.02, "tau": 0.1, "cql_actions": 3} | CQL_VARIANTS[variant]
    cql, unbounded, calql = (make_networks(script, **changes) for script in (cql_sera, *[calql_sera] * 2))
    for seed in range(5):
        batch = make_batch(seed)
        updated(calql_sera, *calql[:2], batch, calql[2], seed=seed)
        batch["mc_returns"] = torch.full((6,), -1e9)
        expected = updated(calql_sera, *unbounded[:2], batch, unbounded[2], seed=seed)
        logs = updated(cql_sera, *cql[:2], cql_batch(seed), cql[2], seed=seed)
        assert expected.pop("losses/calibrated_share") == 0
        assert logs == expected
        for name, parameter in cql[0].named_parameters():
            other = unbounded[0].get_parameter(name)
            assert torch.equal(parameter, other), name
            assert (parameter.grad is None) == (other.grad is None), name
            assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name
    for name in ("critics", "target_critics", "actor"):
        pairs = zip(cql[0][name].parameters(), calql[0][name].parameters())
        assert not any(torch.equal(one, other) for one, other in pairs), name


# ------------------------------ the conservative term
def test_conservative_term_by_hand():
    """One action dimension, every Q 0 and every density 1/2: log 60, less Q of the data's action."""
    q_values, log_densities = torch.zeros(2, 5, 31), torch.full((5, 30), -math.log(2))
    assert cql_sera.conservative_term(q_values, log_densities).tolist() == pytest.approx([4.094345] * 2)
    q_values[1, :, 0] = 3  # critic by critic
    expected = [4.094345, 1.094345]
    assert cql_sera.conservative_term(q_values, log_densities).tolist() == pytest.approx(expected, abs=1e-5)
    q_values[0, :, 0] = torch.arange(5.0)  # a mean over the batch
    expected = [2.094345, 1.094345]
    assert cql_sera.conservative_term(q_values, log_densities).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 300.0, 1e6])
def test_conservative_term_by_loops(scale):
    """A slow float64 logsumexp gives the same, and its slopes, however far apart the values are.

    In float32 exp(89) is infinite. Nothing is clipped either: the terms of rows reach far below -200.
    """
    rng, n, batch_size = np.random.default_rng(2), 4, 7
    q_values = (scale * rng.normal(size=(2, batch_size, 1 + 3 * n))).astype(np.float32)
    q_values[:, 0, 0] += 4 * scale
    log_densities = (math.sqrt(scale) * rng.normal(size=(batch_size, 3 * n))).astype(np.float32)
    expected, slopes = [], np.zeros(q_values.shape)
    for j in (0, 1):
        terms = []
        for i in range(batch_size):
            exponents = [float(q) - float(x) for q, x in zip(q_values[j, i, 1:], log_densities[i])]
            top = max(exponents)
            total = sum(math.exp(x - top) for x in exponents)
            terms.append(top + math.log(total) - q_values[j, i, 0])
            slopes[j, i] = [-1 / batch_size, *(math.exp(x - top) / total / batch_size for x in exponents)]
        assert (min(terms) < -200) == (scale > 1)
        expected.append(sum(terms) / batch_size)
    inputs = torch.from_numpy(q_values).requires_grad_()
    term = cql_sera.conservative_term(inputs, torch.from_numpy(log_densities))
    assert term.tolist() == pytest.approx(expected, rel=1e-5)
    term.sum().backward()
    np.testing.assert_allclose(inputs.grad, slopes, rtol=1e-3, atol=1e-6)


# ------------------------------ the update
def test_sampled_actions_are_valued_at_the_state():
    """Q_j(s, a) = s_0 and pi of deviation 1/2 everywhere: s_0 cancels, C_j is logsumexp(-log mu) by hand.

    Next actions valued at s', where Q_j is higher by 50, would make it 50. The target alone sees s'.
    """
    networks, optimizer, args = make_networks(cql_sera, cql_actions=3, critic_layers=1, gamma=0.5)
    with torch.no_grad():
        for name in ("critics", "target_critics"):
            for parameter in networks[name].parameters():
                parameter.zero_()
            (into, out), (shift, back) = networks[name].weights, networks[name].biases
            into[:, 0, 0] = out[:, 0, 0] = 1
            shift[:, 0, 0], back[:, 0, 0] = 100, -100  # far from the kink of the ReLU
        networks["actor"].layers[-1].weight.zero_()
        networks["actor"].layers[-1].bias.zero_()
        networks["actor"].log_std_offset.fill_(math.log(0.5))
    batch = cql_batch()
    batch["next_observations"][:, 0] = batch["observations"][:, 0] + 50
    logs = updated(cql_sera, networks, optimizer, batch, args)

    torch.manual_seed(7)
    torch.randn(6, 2)  # the policy loss draws first
    noise, terms = torch.randn(2, 6, 3, 2).double(), []
    for i in range(6):
        inverse_densities = [4.0] * 3  # the square [-1, 1]^2 has area 4
        for z in noise[:, i].reshape(6, 2):
            u = 0.5 * z
            density = (-0.5 * z**2).exp() / (0.5 * math.sqrt(2 * math.pi)) / (1 - u.tanh() ** 2)
            inverse_densities.append(1 / density.prod().item())
        terms.append(math.log(sum(inverse_densities)))
    assert logs["losses/conservative"] == pytest.approx(sum(terms) / 6, abs=1e-4)
    y = batch["rewards"] + 0.5 * (1 - batch["terminals"]) * batch["next_observations"][:, 0]
    td = 2 * (batch["observations"][:, 0] - y).square().mean().item()
    assert logs["losses/td"] == pytest.approx(td, rel=1e-4)


def test_lagrange_loss_reaches_the_multiplier_alone():
    """w' has the slope -1/2 sum_j w' w (C_j - g); critics learn as with the fixed weight w' w."""
    lagrange, optimizer, args = make_networks(
        cql_sera, cql_actions=3, cql_lagrange=True, cql_weight=2.0, cql_gap=0.4
    )
    multiplier = lagrange["lagrange"]["log_multiplier"]
    fixed, fixed_optimizer, fixed_args = make_networks(
        cql_sera, cql_actions=3, cql_weight=2 * multiplier.exp().item()
    )
    expected = -0.5 * 2 * multiplier.exp().item()
    conservative = updated(cql_sera, lagrange, optimizer, cql_batch(), args)["losses/conservative"]
    updated(cql_sera, fixed, fixed_optimizer, cql_batch(), fixed_args)
    assert multiplier.grad.item() == pytest.approx(expected * 2 * (conservative - 0.4), rel=1e-5)
    assert fixed["lagrange"]["log_multiplier"].grad is None
    for name in ("actor", "critics", "temperature"):
        for parameter, other in zip(lagrange[name].parameters(), fixed[name].parameters()):
            assert parameter.grad.any()
            torch.testing.assert_close(parameter.grad, other.grad)


# ------------------------------ online rows
@pytest.mark.parametrize(
    ("script", "expected"),
    [(cql_sera, list(range(4, 16))), (calql_sera, [7] * 7 + [14] * 2)],
    ids=["cql", "calql"],
)
def test_online_rows_count_at_once(script, expected, tmp_path, monkeypatch):
    """Of episodes of 7 steps every row may be sampled at once, where Cal-QL waits for the end of one."""
    make_env, sample, sizes = script.make_env, script.ReplayBuffer.sample, []

    def short_env(*args, **options):
        limited = gymnasium.wrappers.TimeLimit(make_env(*args, **options).env, 7)
        return gymnasium.wrappers.RecordEpisodeStatistics(limited)

    def recorded_sample(buffer, *numbers):
        sizes.append(buffer.size - buffer.offline_size)
        batch = sample(buffer, *numbers)
        assert ("mc_returns" in batch) == (script is calql_sera)
        return batch

    monkeypatch.setattr(script, "make_env", short_env)
    monkeypatch.setattr(script.ReplayBuffer, "sample", recorded_sample)
    options = (
        "--device cpu --offline-steps 0 --online-steps 15 --mixing-ratio 0 --batch-size 4 "
        "--eval-episodes 1 --sera-k 2 --hidden-dim 8 --cql-actions 2 --run-dir"
    )
    script.main([*options.split(), str(tmp_path / "run")])
    assert sizes == expected
    assert cql_sera.episode_columns is None and calql_sera.episode_columns is not None
