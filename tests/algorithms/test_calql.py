"""Cal-QL against hand numbers, a slow recomputation and itself: returns, losses, online phase, SERA."""

import copy
import csv
import itertools
import math
from functools import partial
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import recompute
import torch
from recompute import CQL_VARIANTS, make_batch, policy_sample, q_value
from torch import nn

import calql_sera

updated = partial(recompute.updated, calql_sera)

# ------------------------------ returns-to-go
ONCE = [0, 0, 1]  # one trajectory of three rows
FAILED = {"sparse": True, "failure_reward": -1.0}
RETURNS = {
    "dense": ([-1, -1, -1], [0, 0, 0], ONCE, {}, [-2.9701, -1.99, -1]),
    "failure": ([-1, -1, -1], [0, 0, 0], ONCE, FAILED, [-100] * 3),
    "failure, not sparse": ([-1] * 3, [0] * 3, ONCE, FAILED | {"sparse": False}, [-2.9701, -1.99, -1]),
    "failure, scaled": ([-5] * 3, [0] * 3, ONCE, {"sparse": True, "failure_reward": -5.0}, [-500] * 3),
    "failure, another value": ([-5] * 3, [0] * 3, ONCE, FAILED, [-14.8505, -9.95, -5]),
    "failure, no end": ([-1, -1, -1], [0, 0, 0], [0, 0, 0], FAILED, [-100] * 3),
    "success, scaled": ([-5, -5, 5], ONCE, ONCE, {}, [-5.0495, -0.05, 5]),
    "success": ([-1, -1, 0], ONCE, ONCE, FAILED, [-1.99, -1, 0]),
    "truncated": ([1, 1, 1], [0, 0, 0], ONCE, {}, [2.9701, 1.99, 1]),
    "terminal": ([1, 1, 1], ONCE, ONCE, {}, [2.9701, 1.99, 1]),
    "cluster": ([-5, 5, 5], [0, 1, 1], [0, 1, 1], {}, [-0.05, 5, 5]),
    "success inside": ([-1, 0, -1, -1], [0] * 4, [0, 0, 0, 1], FAILED, [-2.950399, -1.9701, -1.99, -1]),
    "terminal alone": ([1, 1, 1], [0, 1, 0], ONCE, {}, [1.99, 1, 1]),
    "no bleeding": ([1, 1, 2, 4, 4], [0, 1, 0, 0, 0], [0, 1, 1, 0, 1], {}, [1.99, 1, 2, 7.96, 4]),
    "some fail": (
        [-1, -1, -1, 0, -1, -1, -1, -1],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 1, 0, 1, 1, 0, 0, 1],
        FAILED,
        [-100, -100, -1, 0, -100, -100, -100, -100],
    ),
}


def summed_returns(rewards, dones, gamma):
    """Return-to-go (N,): for every row the discounted sum over its trajectory's rows from there on."""
    returns = np.zeros(len(rewards))
    for row in range(len(rewards)):
        last = next((i for i in range(row, len(rewards)) if dones[i]), len(rewards) - 1)
        returns[row] = sum(gamma ** (i - row) * float(rewards[i]) for i in range(row, last + 1))
    return returns


@pytest.mark.parametrize("case", RETURNS)
def test_returns_by_hand(case):
    """Return-to-go by hand at gamma 0.99, the rule for sparse failures included, of arrays and of lists."""
    *columns, options, expected = RETURNS[case]
    for kinds in ((np.float32, bool, bool), (np.float64, bool, bool), (np.int64, np.float32, np.float32)):
        arrays = [np.array(column, dtype=kind) for column, kind in zip(columns, kinds)]
        returns = calql_sera.mc_returns(*arrays, 0.99, **options)
        assert returns.dtype == np.float32
        np.testing.assert_allclose(returns, expected, rtol=1e-6)
    np.testing.assert_array_equal(calql_sera.mc_returns(*columns, 0.99, **options), returns)


def test_returns_of_random_trajectories():
    """A quadratic double loop gives the same, whatever ends the trajectories."""
    rng = np.random.default_rng(0)
    rewards, dones = rng.normal(size=400), rng.random(400) < 0.05
    terminals = dones & (rng.random(400) < 0.5)
    assert terminals.any() and (dones & ~terminals).any()
    for gamma in (0.0, 0.9, 1.0):
        returns = calql_sera.mc_returns(rewards, terminals, dones, gamma)
        np.testing.assert_allclose(returns, summed_returns(rewards, dones, gamma), rtol=1e-5, atol=1e-6)


def test_returns_of_a_long_float32_trajectory():
    """A thousand float32 rewards: the sum is as good as one in double precision."""
    rewards = np.random.default_rng(1).uniform(1, 5, size=1000).astype(np.float32)
    dones = np.arange(1000) == 999
    returns = calql_sera.mc_returns(rewards, np.zeros(1000, dtype=bool), dones, 0.99)
    np.testing.assert_allclose(returns, summed_returns(rewards, dones, 0.99), rtol=1e-6)


# ------------------------------ the squashed normal
def normal_log_density(x, std):
    return -0.5 * (x / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)


def squashed_cdf(action, mean, std):
    return 0.5 * math.erfc(-(math.atanh(action) - mean) / (std * math.sqrt(2)))


def test_squash_by_hand():
    """Mean 0.3, standard deviation 0.5, u = 0.8."""
    mean, log_std, noise = torch.tensor([[[0.3]], [[math.log(0.5)]], [[1.0]]], dtype=torch.float64)
    action, log_prob = calql_sera.squash(mean, log_std, noise)
    assert action.shape == (1, 1) and log_prob.shape == (1,)
    assert action.item() == pytest.approx(0.664037, abs=1e-6)
    assert log_prob.item() == pytest.approx(-0.144284, abs=1e-6)


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (-1.2, 0.2), (0.0, 1.5), (2.0, 1.0)])
def test_squash_is_a_density(mean, std):
    """exp(log pi) is the slope of the distribution function of tanh(u)."""
    for action in (-0.99, -0.8, -0.3, 0.0, 0.45, 0.9, 0.995):
        noise = torch.tensor([(math.atanh(action) - mean) / std], dtype=torch.float64)
        means, log_stds = torch.full_like(noise, mean), torch.full_like(noise, math.log(std))
        squashed, log_prob = calql_sera.squash(means, log_stds, noise)
        slope = (squashed_cdf(action + 1e-5, mean, std) - squashed_cdf(action - 1e-5, mean, std)) / 2e-5
        assert squashed.item() == pytest.approx(action, abs=1e-12)
        assert log_prob.exp().item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_squash_sums_over_dimensions():
    """The log-density of two action dimensions is the sum of theirs, with leading axes broadcast."""
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(4, 1, 2), torch.randn(4, 1, 2), torch.randn(4, 3, 2)
    actions, log_prob = calql_sera.squash(mean, log_std, noise)
    parts = [calql_sera.squash(*(x[..., i : i + 1] for x in (mean, log_std, noise))) for i in (0, 1)]
    assert actions.shape == (4, 3, 2) and log_prob.shape == (4, 3)
    torch.testing.assert_close(actions, torch.cat([parts[0][0], parts[1][0]], dim=-1))
    torch.testing.assert_close(log_prob, parts[0][1] + parts[1][1])


@pytest.mark.parametrize("u", [12.0, -12.0, 40.0, -40.0])
def test_squash_far_out(u):
    """float32 keeps log(1 - tanh(u)^2) = 2 log 2 - 2 |u| exactly, and its gradient, where tanh(u) is 1."""
    mean = torch.full((1, 2), u - 0.25, requires_grad=True)
    log_std = torch.full((1, 2), math.log(0.25), requires_grad=True)
    _, log_prob = calql_sera.squash(mean, log_std, torch.ones(1, 2))
    correction = normal_log_density(0.25, 0.25) - log_prob.item() / 2
    assert correction == pytest.approx(2 * math.log(2) - 2 * abs(u), rel=1e-5)
    if abs(u) == 12:
        assert correction == pytest.approx(-22.6137, abs=1e-3)
    log_prob.sum().backward()
    torch.testing.assert_close(mean.grad, torch.full((1, 2), math.copysign(2, u)))  # 2 tanh(u)
    torch.testing.assert_close(log_std.grad, torch.full((1, 2), math.copysign(0.5, u) - 1))


# ------------------------------ networks
def make_args(**changes):
    """Arguments for tiny networks on the CPU."""
    return calql_sera.Args(**({"device": "cpu", "hidden_dim": 8, "cql_actions": 3} | changes))


def randomise(networks):
    """Give every parameter a new random value, so that none is zero and the targets are not the critics."""
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.uniform_(-0.8, 0.8)


def make_networks(observation_dim=4, action_dim=2, **changes):
    """Networks with random parameters, their optimiser and the arguments."""
    args = make_args(**changes)
    torch.manual_seed(0)
    networks, optimizer = calql_sera.make_networks(observation_dim, action_dim, args)
    randomise(networks)
    return networks, optimizer, args


def test_twin_critics_are_two_plain_networks():
    """Both critics, in one batched product, are what nn.Linear makes of the same weights."""
    torch.manual_seed(1)
    critics = calql_sera.TwinCritics(4, 2, 8, 3)
    plain = []
    for j in (0, 1):
        layers = []
        for weight, bias in zip(critics.weights, critics.biases):
            linear = nn.Linear(*weight.shape[1:])
            linear.weight.data, linear.bias.data = weight.data[j].T.clone(), bias.data[j, 0].clone()
            layers += [linear, nn.ReLU()]
        assert len(layers) == 8
        plain.append(nn.Sequential(*layers[:-1]))
    for shape in ((5,), (5, 7)):
        observations, actions = torch.randn(*shape, 4), torch.randn(*shape, 2)
        inputs = torch.cat([observations, actions], dim=-1)
        expected = torch.stack([network(inputs)[..., 0] for network in plain])
        assert expected.shape == (2, *shape)
        torch.testing.assert_close(critics(observations, actions), expected)


def test_twin_critics_start_alike_but_not_equal():
    """Equal shapes by construction, the initial range of nn.Linear, and no number in common."""
    torch.manual_seed(2)
    critics = calql_sera.TwinCritics(11, 3, 256, 2)
    for weight, bias in zip(critics.weights, critics.biases):
        assert weight.shape[0] == bias.shape[0] == 2
        bound = weight.shape[1] ** -0.5
        assert not torch.isin(weight[0], weight[1]).all() and not torch.equal(bias[0], bias[1])
        assert weight.abs().max() <= bound and bias.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_initial_networks():
    """Last layers of variance 1e-2 / width without bias, targets equal to critics, alpha 1, w' = e."""
    torch.manual_seed(3)
    networks, _ = calql_sera.make_networks(11, 3, make_args(hidden_dim=256, critic_layers=4))
    critics, target_critics, last = (
        networks["critics"],
        networks["target_critics"],
        networks["actor"].layers[-1],
    )
    assert len(critics.weights) == 5
    for weight in (last.weight, critics.weights[-1][0], critics.weights[-1][1]):
        assert weight.std().item() == pytest.approx(0.1 / 16, rel=0.15)
        assert weight.abs().max() <= math.sqrt(3) * 0.1 / 16
    assert not torch.equal(critics.weights[-1][0], critics.weights[-1][1])
    assert not last.bias.any() and not critics.biases[-1].any()
    for critic, target in zip(critics.parameters(), target_critics.parameters()):
        assert torch.equal(critic, target) and critic is not target
    assert networks["temperature"]["log_alpha"].item() == 0
    assert networks["lagrange"]["log_multiplier"].item() == 1


def test_policy_standard_deviation():
    """log_std is scale x + offset, from 1 and -1, within -20 and 2; the mean is left alone."""
    actor = calql_sera.make_networks(4, 2, make_args())[0]["actor"]
    with torch.no_grad():
        actor.layers[-1].weight.zero_()
        for x, expected in ((0.5, -0.5), (0, -1), (-7, -8), (-30, -20), (9, 2)):
            actor.layers[-1].bias.copy_(torch.tensor([5, -6, x, x]))
            mean, log_std = actor(torch.randn(3, 4))
            assert mean.tolist() == [[5, -6]] * 3 and log_std.tolist() == [[expected] * 2] * 3
        actor.log_std_scale.fill_(2)
        actor.log_std_offset.fill_(0.5)
        actor.layers[-1].bias.copy_(torch.tensor([5, -6, 0.25, -1]))
        assert actor(torch.randn(3, 4))[1].tolist() == [[1, -1.5]] * 3


def test_act_and_state_value():
    """To evaluate, the mean is squashed, to explore, a sample; V is the lower Q at the mean action."""
    networks, _, _ = make_networks()
    observations = torch.randn(6, 4)
    mean, log_std = networks["actor"](observations)
    assert torch.equal(calql_sera.act(networks, observations, deterministic=True), mean.tanh())
    torch.manual_seed(5)
    sample = calql_sera.act(networks, observations, deterministic=False)
    torch.manual_seed(5)
    torch.testing.assert_close(sample, torch.tanh(mean + log_std.exp() * torch.randn(6, 2)))
    expected = networks["critics"](observations, mean.tanh())
    assert (expected[0] < expected[1]).any() and (expected[1] < expected[0]).any()
    value = calql_sera.state_value(networks, observations)
    torch.testing.assert_close(value, torch.minimum(*expected))


# ------------------------------ the conservative term
@pytest.mark.parametrize(
    ("bound", "expected", "share"), [(-1e9, 4.094345, 0), (0, 4.094345, 0), (1, 4.857727, 1)]
)
def test_conservative_term_by_hand(bound, expected, share):
    """One action dimension, every Q 0 and every density 1/2: log 60, and with R = 1 log(20 + 40 e)."""
    q_values, log_densities = torch.zeros(2, 5, 31), torch.full((5, 30), -math.log(2))
    term, calibrated = calql_sera.conservative_term(q_values, log_densities, torch.full((5,), float(bound)))
    assert term.tolist() == pytest.approx([expected] * 2, abs=1e-5)
    assert calibrated.item() == share
    q_values[1, :, 0] = 3  # the data's actions count against it, critic by critic
    term, _ = calql_sera.conservative_term(q_values, log_densities, torch.full((5,), float(bound)))
    assert term.tolist() == pytest.approx([expected, expected - 3], abs=1e-5)


@pytest.mark.parametrize("shift", [-1e6, 0.0, 1e6])
def test_conservative_term_by_loops(shift):
    """Random numbers: R bounds the policy's actions alone, never the data's or the uniform ones."""
    rng, n, batch_size = np.random.default_rng(2), 4, 7
    q_values, log_densities = (
        rng.normal(size=(2, batch_size, 1 + 3 * n)),
        rng.normal(size=(batch_size, 3 * n)),
    )
    q_values[:, 0, 0] += 500  # far below -200, where CORL's code cuts the difference
    bounds = rng.normal(size=batch_size) + shift
    expected, lifted = [], []
    for q in q_values:
        terms = []
        for i in range(batch_size):
            exponents = []
            for a in range(3 * n):
                value = q[i, 1 + a]
                if a >= n:
                    lifted.append(bounds[i] > value)
                    value = max(value, bounds[i])
                exponents.append(value - log_densities[i, a])
            top = max(exponents)
            terms.append(top + math.log(sum(math.exp(x - top) for x in exponents)) - q[i, 0])
        expected.append(sum(terms) / batch_size)
    term, share = calql_sera.conservative_term(*map(torch.from_numpy, (q_values, log_densities, bounds)))
    np.testing.assert_allclose(term, expected, rtol=1e-9)
    assert share.item() == pytest.approx(np.mean(lifted))
    assert shift or 0.2 < share < 0.8


# ------------------------------ the update
def slow_losses(networks, batch, args, seed):
    """All losses of eqs. (1) to (6) in float64: one network call per state and action, every mean a loop.

    The random numbers are drawn as `update` draws them after the same seed.
    """
    networks = copy.deepcopy(networks).double()
    batch = {name: column.double() for name, column in batch.items()}
    actor, critics, targets = networks["actor"], networks["critics"], networks["target_critics"]
    log_alpha, log_multiplier = networks["temperature"]["log_alpha"], networks["lagrange"]["log_multiplier"]
    (batch_size, action_dim), n = batch["actions"].shape, args.cql_actions
    torch.manual_seed(seed)
    noise = torch.randn(batch_size, action_dim).double()
    cql_noise = torch.randn(2, batch_size, n, action_dim).double()
    uniform = torch.rand(batch_size, n, action_dim).double() * 2 - 1
    target_noise = None if args.max_backup else torch.randn(batch_size, action_dim).double()

    td, conservatism, actor_loss, alpha_loss, lifted = [], [[], []], [], [], []
    for i in range(batch_size):
        state, next_state, data_action = (
            batch[x][i] for x in ("observations", "next_observations", "actions")
        )
        with torch.no_grad():
            of_state = [policy_sample(actor, state, z) for z in cql_noise[0, i]]
            of_next = [policy_sample(actor, next_state, z) for z in cql_noise[1, i]]
            backups = of_next if args.max_backup else [policy_sample(actor, next_state, target_noise[i])]
            values = [min(q_value(targets, j, next_state, action) for j in (0, 1)) for action, _ in backups]
            y = batch["rewards"][i]
            if not batch["terminals"][i]:
                y = y + args.gamma * max(values)
        for j in (0, 1):
            q_data = q_value(critics, j, state, data_action)
            td.append((q_data - y) ** 2)
            exponents = [q_value(critics, j, state, a) + action_dim * math.log(2) for a in uniform[i]]
            for action, log_density in of_state + of_next:
                q = q_value(critics, j, state, action)
                lifted.append(bool(q < batch["mc_returns"][i]))
                exponents.append((batch["mc_returns"][i] if lifted[-1] else q) - log_density)
            conservatism[j].append(torch.stack(exponents).exp().sum().log() - q_data)
        action, log_density = policy_sample(actor, state, noise[i])
        lower = torch.minimum(*(q_value(critics, j, state, action) for j in (0, 1)))
        actor_loss.append(log_alpha.detach().exp() * log_density - lower)
        alpha_loss.append(-log_alpha * (log_density.detach() - action_dim))

    td = sum(td) / batch_size
    conservatism = [sum(terms) / batch_size for terms in conservatism]
    lagrange_loss, critic_loss = None, td + args.cql_weight * sum(conservatism)
    if args.cql_lagrange:
        multiplier = log_multiplier.exp()
        weight = args.cql_weight * multiplier.item()
        critic_loss = td + weight * sum(term - args.cql_gap for term in conservatism)
        gaps = sum(term.item() - args.cql_gap for term in conservatism)
        lagrange_loss = -0.5 * multiplier * args.cql_weight * gaps
    losses = {"actor": sum(actor_loss) / batch_size, "critics": critic_loss}
    losses |= {"temperature": sum(alpha_loss) / batch_size, "lagrange": lagrange_loss}
    gradients = {name: None for name in networks}
    for name, loss in losses.items():
        if loss is not None:
            gradients[name] = torch.autograd.grad(loss, list(networks[name].parameters()))
    logs = {"td": td.item(), "conservative": (sum(conservatism) / 2).item(), "actor": losses["actor"].item()}
    return gradients, logs | {"calibrated_share": np.mean(lifted)}


@pytest.mark.parametrize("variant", CQL_VARIANTS)
def test_update_by_loops(variant):
    """Losses and the gradient of every parameter, from its own loss alone, equal the slow recomputation."""
    networks, optimizer, args = make_networks(**CQL_VARIANTS[variant])
    batch = make_batch()
    gradients, expected = slow_losses(networks, batch, args, seed=7)
    assert 0.1 < expected["calibrated_share"] < 0.9
    logs = updated(networks, optimizer, batch, args)
    for name, value in expected.items():
        assert logs[f"losses/{name}"] == pytest.approx(value, rel=1e-4), name
    for name, network in networks.items():
        for i, (key, parameter) in enumerate(network.named_parameters()):
            if gradients[name] is None:
                assert parameter.grad is None, (name, key)
                continue
            slow = gradients[name][i]
            assert slow.any(), (name, key)
            scale = slow.abs().max().item()
            torch.testing.assert_close(parameter.grad.double(), slow, rtol=1e-3, atol=1e-4 * scale, msg=key)


def test_update_again():
    """Nothing is left over from one update to the next: the second's gradients are its own."""
    networks, optimizer, args = make_networks(actor_lr=0.01, critic_lr=0.01)
    updated(networks, optimizer, make_batch(0), args, seed=7)
    gradients, _ = slow_losses(networks, make_batch(1), args, seed=8)
    updated(networks, optimizer, make_batch(1), args, seed=8)
    for name in ("actor", "critics", "temperature"):
        for parameter, slow in zip(networks[name].parameters(), gradients[name]):
            scale = slow.abs().max().item()
            torch.testing.assert_close(parameter.grad.double(), slow, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("gap", [-50.0, 50.0])
def test_lagrange_multiplier(gap):
    """Its gradient is -1/2 sum_j w' w (C_j - gap): it rises while the term is above the gap, else falls."""
    networks, optimizer, args = make_networks(cql_lagrange=True, cql_gap=gap, cql_weight=2.0)
    log_multiplier = networks["lagrange"]["log_multiplier"]
    before = log_multiplier.item()
    conservative = updated(networks, optimizer, make_batch(), args)["losses/conservative"]
    expected = -0.5 * math.exp(before) * 2.0 * 2 * (conservative - gap)
    assert log_multiplier.grad.item() == pytest.approx(expected, rel=1e-5)
    assert (log_multiplier.item() > before) == (conservative > gap)


@pytest.mark.parametrize("log_std", [-4.0, -0.1])
def test_temperature(log_std):
    """alpha rises if the policy's entropy is below -|A|, and falls if it is above."""
    networks, optimizer, args = make_networks()
    with torch.no_grad():
        networks["actor"].layers[-1].weight.zero_()
        networks["actor"].layers[-1].bias.zero_()
        networks["actor"].log_std_offset.fill_(log_std)
    before = networks["temperature"]["log_alpha"].item()
    entropy = updated(networks, optimizer, make_batch(), args)["losses/entropy"]
    assert (entropy < -2) == (log_std == -4)
    assert (networks["temperature"]["log_alpha"].item() > before) == (entropy < -2)


def test_target_by_hand():
    """Q = 0 and targets 4 and 6 everywhere, r = 1, gamma 0.5: y is 3, or 1 at a terminal."""
    networks, optimizer, args = make_networks(gamma=0.5)
    with torch.no_grad():
        for name in ("critics", "target_critics"):
            for parameter in networks[name].parameters():
                parameter.zero_()
        networks["target_critics"].biases[-1].copy_(torch.tensor([6.0, 4.0]).reshape(2, 1, 1))
    batch = make_batch()
    batch["rewards"].fill_(1.0)
    td = updated(copy.deepcopy(networks), optimizer, batch, args)["losses/td"]
    assert td == pytest.approx(2 * (4 * 9 + 2 * 1) / 6, rel=1e-5)


def test_max_backup_by_hand():
    """Q'_1 = a and Q'_2 = -a with a the action's first number: the best of the lower ones is -min |a|."""
    networks, optimizer, args = make_networks(gamma=0.5, max_backup=True, critic_layers=1)
    with torch.no_grad():
        for name in ("critics", "target_critics"):
            for parameter in networks[name].parameters():
                parameter.zero_()
        into, out = networks["target_critics"].weights
        into[:, 4, 0], into[:, 4, 1] = 1, -1  # a and -a, by two units that cut at 0
        out[:, :2, 0] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        networks["actor"].layers[-1].weight.zero_()
        networks["actor"].layers[-1].bias.zero_()
        networks["actor"].log_std_offset.zero_()
    batch = make_batch()
    batch["rewards"].fill_(1.0)
    torch.manual_seed(7)
    torch.randn(6, 2)  # the policy loss draws first
    next_actions = torch.randn(2, 6, 3, 2)[1].tanh()
    y = 1 - 0.5 * (1 - batch["terminals"]) * next_actions[..., 0].abs().amin(1)
    td = updated(networks, optimizer, batch, args)["losses/td"]
    assert td == pytest.approx(2 * y.square().mean().item(), rel=1e-5)


def test_terminals_mask_the_next_state():
    """A terminal's next state, which is the next episode's first, does not enter the TD loss; others do."""
    logs = []
    for rows in ([], [1, 4], [1], [2]):
        networks, optimizer, args = make_networks()
        batch = make_batch()
        batch["next_observations"][rows] += 3.0
        logs.append(updated(networks, optimizer, batch, args))
    plain, both, one, other = (log["losses/td"] for log in logs)
    assert plain == pytest.approx(both, rel=1e-6) and plain == pytest.approx(one, rel=1e-6)
    assert abs(other - plain) > 1e-3 * plain
    assert len({log["losses/actor"] for log in logs}) == 1


def test_target_critics_follow():
    """Target critics move by tau towards the critics just updated, and by nothing else."""
    networks, optimizer, args = make_networks(tau=0.25, critic_lr=0.1)
    before = copy.deepcopy(networks)
    updated(networks, optimizer, make_batch(), args)
    names = ("critics", "target_critics")
    for old_critic, old, critic, target in zip(
        *(network[name].parameters() for network in (before, networks) for name in names)
    ):
        assert (critic - old_critic).abs().max() > 0.05
        torch.testing.assert_close(target, 0.75 * old + 0.25 * critic)
        assert target.grad is None and critic.requires_grad


def test_learning_rates():
    """Adam's first step is the learning rate: the policy's also for alpha, the critics' also for w'."""
    networks, optimizer, args = make_networks(actor_lr=0.02, critic_lr=0.05, cql_lagrange=True)
    before = copy.deepcopy(networks)
    updated(networks, optimizer, make_batch(), args)
    rates = {"actor": 0.02, "temperature": 0.02, "critics": 0.05, "lagrange": 0.05}
    for name, rate in rates.items():
        for old, new in zip(before[name].parameters(), networks[name].parameters()):
            assert (new - old).abs().max().item() == pytest.approx(rate, rel=1e-3), name


def test_update_leaves_the_batch_alone():
    """No column of the batch is changed by an update, by none of its variants."""
    for changes in CQL_VARIANTS.values():
        networks, optimizer, args = make_networks(**changes)
        batch = make_batch()
        before = {name: column.clone() for name, column in batch.items()}
        updated(networks, optimizer, batch, args)
        assert batch.keys() == before.keys()
        assert all(torch.equal(batch[name], before[name]) for name in before)


def test_saturated_policy():
    """Actions that float32 rounds to +-1, from mean +-30, give finite losses, gradients and parameters."""
    networks, optimizer, args = make_networks()
    with torch.no_grad():
        networks["actor"].layers[-1].bias.copy_(torch.tensor([30.0, -30.0, 0.0, 0.0]))
    assert calql_sera.act(networks, torch.randn(5, 4), deterministic=False).abs().min() == 1
    logs = updated(networks, optimizer, make_batch(), args)
    assert all(map(math.isfinite, logs.values())), logs
    assert all(parameter.isfinite().all() for parameter in networks.parameters())
    for name in ("actor", "critics", "temperature"):
        assert all(parameter.grad.isfinite().all() for parameter in networks[name].parameters())


# ------------------------------ the buffer
def make_rows(rows=20, ends=(), terminals=(), first=0):
    """Transitions as load_d4rl names them; the rewards count up, so that rows can be told apart."""
    rng, index = np.random.default_rng(first), np.arange(rows)
    return {
        "observations": rng.normal(3, 2, size=(rows, 4)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(rows, 2)).astype(np.float32),
        "rewards": (first + index).astype(np.float32),
        "next_observations": rng.normal(3, 2, size=(rows, 4)).astype(np.float32),
        "terminals": np.isin(index, terminals),
        "dones": np.isin(index, [*ends, *terminals, rows - 1]),
    }


def test_buffer_rows():
    """States by the data's mean and deviation, rewards raw, time-outs no terminals, returns by trajectory."""
    data, online = make_rows(20, ends=[5], terminals=[11]), make_rows(6, ends=[2], first=100)
    buffer = calql_sera.ReplayBuffer(data, make_args(gamma=0.9, online_steps=10))
    buffer.append(online)
    assert (buffer.offline_size, buffer.size) == (20, 26)
    mean, std = data["observations"].mean(0), data["observations"].std(0) + 1e-3
    columns = {name: column[:26].numpy() for name, column in buffer.columns.items()}
    for rows, start in ((data, 0), (online, 20)):
        part = {name: column[start : start + len(rows["rewards"])] for name, column in columns.items()}
        for name in ("observations", "next_observations"):
            np.testing.assert_allclose(part[name], (rows[name] - mean) / std, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(part["rewards"], rows["rewards"])
        np.testing.assert_array_equal(part["terminals"], rows["terminals"])
        np.testing.assert_allclose(part["actions"], rows["actions"], atol=2e-5)
        returns = summed_returns(rows["rewards"], rows["dones"], 0.9)
        np.testing.assert_allclose(part["mc_returns"], returns, rtol=1e-5)


def test_buffer_samples():
    """Data-set rows first, then online ones, every row of both sooner or later, and copies of them."""
    buffer = calql_sera.ReplayBuffer(make_rows(20), make_args(online_steps=30))
    buffer.append(make_rows(5, first=100))
    before = {name: column.clone() for name, column in buffer.columns.items()}
    torch.manual_seed(0)
    batch = buffer.sample(200, 100)
    rewards = batch["rewards"].clone()
    assert sorted(set(rewards[:200].tolist())) == list(range(20))
    assert sorted(set(rewards[200:].tolist())) == list(range(100, 105))
    for name, column in batch.items():
        rows = torch.where(rewards < 100, rewards, rewards - 80).long()
        assert torch.equal(column, before[name][rows])
        column.fill_(-7.0)
    assert all(torch.equal(buffer.columns[name], before[name]) for name in before)
    assert buffer.sample(8, 0)["rewards"].max() < 20 and buffer.sample(0, 8)["rewards"].min() >= 100


def test_actions_at_the_border():
    """Actions of exactly +-1, offline or online, are stored as +-(1 - 1e-5): losses and gradients finite."""
    rows = make_rows(12)
    rows["actions"] = np.sign(rows["actions"])
    buffer = calql_sera.ReplayBuffer(rows, make_args(online_steps=12))
    buffer.append(rows)
    stored, limit = buffer.columns["actions"], np.float32(1 - 1e-5)
    assert stored.abs().min() == stored.abs().max() == limit
    assert torch.equal(stored[12:].sign(), torch.from_numpy(rows["actions"]))
    assert stored.atanh().isfinite().all()
    networks, optimizer, args = make_networks()
    logs = updated(networks, optimizer, buffer.sample(6, 6), args)
    assert all(map(math.isfinite, logs.values())), logs
    assert all(parameter.isfinite().all() for parameter in networks.parameters())
    for name in ("actor", "critics", "temperature"):
        assert all(parameter.grad.isfinite().all() for parameter in networks[name].parameters())


# ------------------------------ whole runs
TRAINED = ("actor", "critics", "target_critics")
ENV = "hopper-medium-v2"
OPTIONS = (
    f"--env {ENV} --device cpu --offline-steps 12 --online-steps 60 --batch-size 32 --eval-every 30 "
    "--eval-episodes 1 --checkpoint-every 30 --sera-k 5 --sera-scale dim --hidden-dim 16 --cql-actions 2"
)


class Recorder(gymnasium.Wrapper):
    """Notes every step as (observation, action, reward, next observation, terminated, done), by episode."""

    def __init__(self, env):
        super().__init__(env)
        self.episodes = []

    def reset(self, **options):
        self.observation, info = self.env.reset(**options)
        self.episodes.append([])
        return self.observation, info

    def step(self, action):
        result = observation, reward, terminated, truncated, _ = self.env.step(action)
        ended = terminated, terminated or truncated
        self.episodes[-1].append((self.observation, action, reward, observation, *ended))
        self.observation = observation
        return result


class Scripted(gymnasium.Env):
    """Episodes of 7 steps up to a terminal and of 9 up to a time-out, in turn; rewards 10, 11, 12, ..."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,))
    action_space = gymnasium.spaces.Box(-1, 1, (3,))
    steps, episode = 0, -1

    def reset(self, seed=None, options=None):
        self.episode, self.time = self.episode + 1, 0
        return np.full(11, 100.0 * self.episode), {}

    def step(self, action):
        self.steps, self.time = self.steps + 1, self.time + 1
        ends = self.episode % 2 == 0 and self.time == 7, self.episode % 2 == 1 and self.time == 9
        return np.full(11, 100.0 * self.episode + self.time), 9.0 + self.steps, *ends, {}


def scripted_env(*args, **kwargs):
    return gymnasium.wrappers.RecordEpisodeStatistics(Scripted())


def write_dataset(path):
    """300 rows in D4RL's format: a random walk from Hopper's upright state, eleven terminals, a time-out."""
    rng, rows = np.random.default_rng(4), np.arange(300)
    observations = 0.02 * rng.normal(size=(300, 11)).cumsum(0) + 0.1 * rng.normal(size=(300, 11))
    observations[:, 0] += 1.25
    with h5py.File(path, "w") as file:
        file["observations"] = observations.astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, size=(300, 3)).astype(np.float32)
        file["rewards"] = rng.uniform(2, 5, size=300).astype(np.float32)
        file["terminals"] = (rows % 25 == 24) & (rows != 149)
        file["timeouts"] = rows == 149
    return path


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Runs the script on a small made-up data set; every other name in the script may be replaced.

    Gives all checkpoints in order, the training environment and the one for evaluation, the initial
    networks, the rows of evals.csv, and what went into the bonus and into the updates.
    """
    dataset = write_dataset(tmp_path_factory.mktemp("data") / "made-up.hdf5")

    def run(*options, make_env=calql_sera.make_env, **replaced):
        seen = SimpleNamespace(checkpoints=[], envs=[], bonus_critics=[], rewards=[], samples=[])
        seen.folder = tmp_path_factory.mktemp("run")
        replaced = {"sera_bonus": calql_sera.sera_bonus} | replaced
        make_networks, update = calql_sera.make_networks, calql_sera.update
        save_checkpoint, sample = calql_sera.save_checkpoint, calql_sera.ReplayBuffer.sample

        def recorded_env(*args, **kwargs):
            seen.envs.append(Recorder(make_env(*args, **kwargs)))
            return seen.envs[-1]

        def recorded_networks(*args):
            networks, optimizer = make_networks(*args)
            seen.initial = copy.deepcopy(networks)
            return networks, optimizer

        def recorded_checkpoint(path, *args):
            save_checkpoint(path, *args)
            if args[0].step:  # not the one before any training
                seen.checkpoints.append(torch.load(path, weights_only=True))

        def recorded_bonus(networks, *args):
            seen.bonus_critics.append(copy.deepcopy(networks["critics"].state_dict()))
            return replaced["sera_bonus"](networks, *args)

        def recorded_sample(buffer, *numbers):
            batch = sample(buffer, *numbers)
            seen.samples.append((seen.envs[0].episodes, numbers, buffer.size - buffer.offline_size, batch))
            seen.samples[-1] = copy.deepcopy(seen.samples[-1])
            return batch

        def recorded_update(state, batch, args):
            seen.rewards.append(batch["rewards"].clone())
            return update(state, batch, args)

        with pytest.MonkeyPatch.context() as patch:
            for name, value in replaced.items():
                patch.setattr(calql_sera, name, value)
            patch.setattr(calql_sera, "make_env", recorded_env)
            patch.setattr(calql_sera, "make_networks", recorded_networks)
            patch.setattr(calql_sera, "save_checkpoint", recorded_checkpoint)
            patch.setattr(calql_sera, "sera_bonus", recorded_bonus)
            patch.setattr(calql_sera, "update", recorded_update)
            patch.setattr(calql_sera.ReplayBuffer, "sample", recorded_sample)
            paths = ["--dataset-path", str(dataset), "--run-dir", str(seen.folder)]
            calql_sera.main([*OPTIONS.split(), *paths, *options])
        seen.data = calql_sera.load_d4rl(ENV, str(dataset))
        seen.last = seen.checkpoints[-1]
        with open(seen.folder / "evals.csv") as file:
            seen.evals = list(csv.DictReader(file))
        return seen

    return run


@pytest.fixture(scope="module")
def plain(train):
    """A run of the plain algorithm."""
    return train("--sera-coef", "0")


@pytest.fixture(scope="module")
def sera(train):
    """The same run with the bonus."""
    return train("--sera-coef", "1")


@pytest.fixture(scope="module")
def scripted(train):
    """A run of 40 steps in the scripted environment: 7 + 9 + 7 + 9 + 7 rows of episodes, and one more."""
    return train("--online-steps", "40", make_env=scripted_env)


def assert_same(left, right):
    """Two nested structures hold the same numbers, bit for bit."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right):
            assert_same(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def differ(left, right):
    """Whether two state dictionaries of one network are not the same."""
    return any(not torch.equal(left[name], right[name]) for name in left)


# ------------------------------ the online phase
def test_online_rows(scripted):
    """Finished episodes are stored whole and in order: raw rewards, own returns, no time-out as terminal."""
    rows, (*finished, unfinished) = scripted.last["online_rows"], scripted.envs[0].episodes
    assert [len(episode) for episode in finished] == [7, 9, 7, 9, 7] and len(unfinished) == 1
    flat = [row for episode in finished for row in episode]
    observations, actions, rewards, next_observations, terminals, dones = map(np.array, zip(*flat))
    np.testing.assert_array_equal(rows["rewards"], np.arange(10, 49))
    np.testing.assert_array_equal(rows["terminals"], terminals)
    assert (terminals.sum(), dones.sum()) == (3, 5)
    np.testing.assert_allclose(rows["mc_returns"], summed_returns(rewards, dones, 0.99), rtol=1e-6)
    by_hand = sum(0.99**i * (10 + i) for i in range(7)), sum(0.99**i * (17 + i) for i in range(9))
    assert rows["mc_returns"][[0, 7]].tolist() == pytest.approx(by_hand, rel=1e-6)
    assert rows["mc_returns"][[6, 15]].tolist() == [16, 25]  # the rows that end them
    mean, std = scripted.data["observations"].mean(0), scripted.data["observations"].std(0) + 1e-3
    for name, states in (("observations", observations), ("next_observations", next_observations)):
        np.testing.assert_allclose(rows[name], (states - mean) / std, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(rows["actions"], actions.clip(-1 + 1e-5, 1 - 1e-5))


def test_unfinished_episodes_are_never_sampled(scripted):
    """At every update the buffer holds the rows of finished episodes and no others."""
    online = scripted.samples[12:]
    assert len(scripted.samples) == 12 + 40
    for step, (episodes, _, size, _) in enumerate(online, start=1):
        assert sum(map(len, episodes)) == step
        assert size == sum(len(episode) for episode in episodes if episode and episode[-1][-1])
    assert [online[step - 1][2] for step in (1, 6, 7, 15, 16, 40)] == [0, 0, 7, 7, 16, 39]


def test_batches(scripted):
    """Data-set rows only until the finished episodes fill their half, then half of the batch from them."""
    for number, (_, numbers, size, batch) in enumerate(scripted.samples):
        online_rows = 16 if number >= 12 and size >= 16 else 0
        assert numbers == (32 - online_rows, online_rows)
        online = batch["rewards"] >= 10  # the data set's are below 5
        assert online.tolist() == [False] * (32 - online_rows) + [True] * online_rows
    assert [numbers[1] for _, numbers, _, _ in scripted.samples[12 + 14 :]] == [0] + [16] * 25


def test_mixing_ratio(train):
    """Its share of the batch comes from the data set; with 0 no update happens before a full online batch."""
    run = train("--online-steps", "40", "--mixing-ratio", "0.75", make_env=scripted_env)
    assert [numbers for _, numbers, _, _ in run.samples] == [(32, 0)] * (12 + 15) + [(24, 8)] * 25
    run = train("--online-steps", "40", "--mixing-ratio", "0", make_env=scripted_env)
    assert [numbers for _, numbers, _, _ in run.samples] == [(32, 0)] * 12 + [(0, 32)] * 9


def test_from_scratch(train):
    """Without data the first updates wait for a batch of finished episodes."""
    options = ["--offline-steps", "0", "--mixing-ratio", "0", "--online-steps", "40"]
    run = train(*options, make_env=scripted_env)
    assert [numbers for _, numbers, _, _ in run.samples] == [(0, 32)] * 9
    assert run.samples[0][2] == 32
    assert len(run.last["online_rows"]["mc_returns"]) == 39
    assert all(differ(run.last["networks"][name], run.initial[name].state_dict()) for name in TRAINED)


# ------------------------------ the whole algorithm
LEARNED = ("networks", "optimizer", "online_rows", "rng", "evals")


def assert_same_run(left, right):
    """Both runs ended with the same networks, optimiser, rows, random state and evaluations, bit for bit."""
    for name in LEARNED:
        assert_same(left.last[name], right.last[name])


def test_one_update_per_step(plain):
    """A phase of n steps makes n updates and ends with a checkpoint and an evaluation; Adam just goes on.

    The checkpoint of step 30 waits for the end of the episode.
    """
    assert len(plain.rewards) == 12 + 60 and sum(map(len, plain.envs[0].episodes)) == 60
    saved = [(checkpoint["phase"], checkpoint["step"]) for checkpoint in plain.checkpoints]
    lengths = itertools.accumulate(len(episode) for episode in plain.envs[0].episodes)
    waited = next(end for end in lengths if end >= 30)
    assert 30 < waited < 60 and saved == [("offline", 12), ("online", waited), ("online", 60)]
    evaluated = [(row["phase"], int(row["step"]), int(row["episode"])) for row in plain.evals]
    assert evaluated == [("offline", 12, 0), ("online", 0, 0), ("online", 30, 0), ("online", 60, 0)]
    states = [checkpoint["optimizer"]["state"].values() for checkpoint in plain.checkpoints]
    assert [{int(state["step"]) for state in values} for values in states] == [{12}, {12 + waited}, {72}]
    switch, last = plain.checkpoints[0]["networks"], plain.last["networks"]
    for name in TRAINED:
        for key, value in plain.initial[name].state_dict().items():
            assert not torch.equal(switch[name][key], value), (name, key)
            assert not torch.equal(last[name][key], switch[name][key]), (name, key)


def test_exploring_and_evaluating(train):
    """The policy is sampled to explore, step by step, and its mean is taken for evaluation."""

    def act(networks, observations, deterministic):
        return torch.full((len(observations), 3), 0.125 if deterministic else -0.25)

    run = train(act=act)
    for env, expected in zip(run.envs, (-0.25, 0.125)):
        assert {number for episode in env.episodes for row in episode for number in row[1]} == {expected}


def test_coefficient_zero(train, plain):
    """--sera-coef 0 never asks for a bonus: an impossible one changes no bit."""

    def sera_bonus(*_):
        raise AssertionError("the plain algorithm has no bonus")

    assert_same_run(train("--sera-coef", "0", sera_bonus=sera_bonus), plain)
    assert plain.bonus_critics == []


def test_bonus_draws_no_random_numbers(train, plain):
    """A bonus that is worked out and then multiplied by 0 leaves every bit as without: no side effects."""
    original, calls = calql_sera.sera_bonus, []

    def sera_bonus(*args):
        bonus, logs = original(*args)
        calls.append(bonus)
        return 0 * bonus, logs

    run = train("--sera-coef", "1", sera_bonus=sera_bonus)
    assert_same_run(run, plain)
    assert len(calls) == 60 and all(bonus.any() for bonus in calls)


def test_equal_runs(train, sera):
    """Two runs with the same arguments end alike, bit for bit; another seed does not."""
    assert_same_run(train("--sera-coef", "1"), sera)
    other = train("--sera-coef", "1", "--seed", "2")
    assert all(differ(other.last["networks"][name], sera.last["networks"][name]) for name in TRAINED)


def test_evaluations_do_not_disturb_training(train, plain):
    """More episodes of evaluation, at other steps, change nothing that is learned."""
    run = train("--sera-coef", "0", "--eval-every", "7", "--eval-episodes", "2")
    assert len(run.evals) == 2 * (1 + 1 + 1 + 8 + 1)
    for name in ("networks", "optimizer", "online_rows", "rng"):
        assert_same(run.last[name], plain.last[name])


def test_bonus_acts_online_only(plain, sera):
    """With the bonus all is the same up to the switch, and different after it."""
    assert_same(sera.checkpoints[0]["networks"], plain.checkpoints[0]["networks"])
    assert [row["phase"] for row in sera.evals[:2]] == ["offline", "online"]
    assert sera.evals[:2] == plain.evals[:2]
    for name in TRAINED:
        assert differ(sera.last["networks"][name], plain.last["networks"][name]), name
    assert sera.evals[2:] != plain.evals[2:]


def test_bonus_in_the_batch(train):
    """Updates get r + bonus online, and r offline; the bonus is asked once per online update."""
    seen = []

    def sera_bonus(networks, batch, live, args):
        seen.append((batch["rewards"].clone(), live))
        return 100 + torch.arange(32.0), {}

    run = train(sera_bonus=sera_bonus)
    assert len(run.rewards) == len(run.samples) == 12 + 60 and len(seen) == 60
    for number, ((_, _, _, batch), given) in enumerate(zip(run.samples, run.rewards)):
        bonus = 0 if number < 12 else 100 + torch.arange(32.0)
        assert torch.equal(given, batch["rewards"] + bonus)
    for (rewards, live), (_, _, _, batch) in zip(seen, run.samples[12:]):
        assert torch.equal(rewards, batch["rewards"]) and live.tolist() == list(range(11))


def test_bonus_is_never_stored(sera):
    """Stored rewards are the environment's, returns-to-go their sums; scores have no bonus."""
    finished = [episode for episode in sera.envs[0].episodes if episode and episode[-1][-1]]
    assert finished
    *_, rewards, _, terminals, dones = map(np.array, zip(*(row for episode in finished for row in episode)))
    rows = sera.last["online_rows"]
    np.testing.assert_array_equal(rows["rewards"], rewards.astype(np.float32))
    np.testing.assert_array_equal(rows["terminals"], terminals)
    np.testing.assert_allclose(rows["mc_returns"], summed_returns(rewards, dones, 0.99), rtol=1e-5)
    assert len(sera.evals) == len(sera.envs[1].episodes) == 4
    for row, episode in zip(sera.evals, sera.envs[1].episodes):
        total = sum(reward for _, _, reward, *_ in episode)
        assert float(row["return"]) == pytest.approx(total, rel=1e-12)
        assert int(row["length"]) == len(episode)
        score = 100 * (total + 20.272305) / (3234.3 + 20.272305)
        assert float(row["normalized_score"]) == pytest.approx(score, rel=1e-12)
        assert float(row["normalized_score"]) == calql_sera.normalized_score(ENV, float(row["return"]))


# ------------------------------ whose values condition the bonus
def test_offline_critics(sera):
    """--sera-critic offline: a whole copy made at the switch, which then stays, gives every bonus."""
    switch, *online = sera.checkpoints
    for checkpoint in online:
        assert_same(checkpoint["bonus_networks"], switch["networks"])
    assert len(sera.bonus_critics) == 60
    for critics in sera.bonus_critics:
        assert_same(critics, switch["networks"]["critics"])


def test_current_critics(train, sera):
    """--sera-critic current: the learning networks themselves, as they were before each update."""
    run = train("--sera-critic", "current")
    for checkpoint in run.checkpoints:
        assert_same(checkpoint["bonus_networks"], checkpoint["networks"])
    assert_same(run.bonus_critics[0], run.checkpoints[0]["networks"]["critics"])
    middle = run.checkpoints[1]
    assert_same(run.bonus_critics[middle["step"]], middle["networks"]["critics"])
    assert all(differ(*pair) for pair in zip(run.bonus_critics, run.bonus_critics[1:]))
    assert differ(run.last["networks"]["critics"], sera.last["networks"]["critics"])


def test_random_critics(train, sera):
    """--sera-critic random: the networks as they were before any training."""
    run = train("--sera-critic", "random")
    initial = {name: network.state_dict() for name, network in run.initial.items()}
    assert_same(run.checkpoints[0]["networks"], sera.checkpoints[0]["networks"])
    for checkpoint in run.checkpoints:
        assert_same(checkpoint["bonus_networks"], initial)
    assert len(run.bonus_critics) == 60
    for critics in run.bonus_critics:
        assert_same(critics, initial["critics"])
    assert differ(run.last["networks"]["critics"], sera.last["networks"]["critics"])


def test_offline_critics_without_offline_steps(train):
    """Without an offline phase the frozen critics are untrained ones."""
    run = train("--offline-steps", "0", "--online-steps", "20")
    initial = {name: network.state_dict() for name, network in run.initial.items()}
    assert_same(run.last["bonus_networks"], initial)
    assert len(run.bonus_critics) == 20 and differ(run.last["networks"]["critics"], initial["critics"])
    for critics in run.bonus_critics:
        assert_same(critics, initial["critics"])
