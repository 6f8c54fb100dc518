"""Cal-QL against hand numbers and a slow recomputation: returns, losses, its online phase."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import recompute
import torch
from recompute import CQL_VARIANTS, make_batch, make_rows, policy_sample, q_value, summed_returns
from recorded_run import part, recorded_run, scripted_env, write_dataset

import calql_sera

make_agent = partial(recompute.make_agent, calql_sera)
updated = partial(recompute.updated, calql_sera)

# ------------------------------ returns-to-go
ONCE = [0, 0, 1]  # one trajectory of three rows
TWICE = [0, 1, 1, 0, 1]  # three trajectories, of 2, 1 and 2 rows

# Rewards, ends of trajectories, the reward of a failure, and the returns by hand at gamma 0.99.
RETURNS = {
    "dense": ([-1, -1, -1], ONCE, None, [-2.9701, -1.99, -1]),
    "positive": ([1, 1, 1], ONCE, None, [2.9701, 1.99, 1]),
    "no end": ([1, 1, 1], [0, 0, 0], None, [2.9701, 1.99, 1]),
    "no bleeding": ([1, 1, 2, 4, 4], TWICE, None, [1.99, 1, 2, 7.96, 4]),
    "failure": ([-1, -1, -1], ONCE, -1.0, [-100] * 3),
    "failure, scaled": ([-5] * 3, ONCE, -5.0, [-500] * 3),
    "failure, another value": ([-5] * 3, ONCE, -1.0, [-14.8505, -9.95, -5]),
    "failure, no end": ([-1, -1, -1], [0, 0, 0], -1.0, [-100] * 3),
    "success": ([-1, -1, 0], ONCE, -1.0, [-1.99, -1, 0]),
    "success, scaled": ([-5, -5, 5], ONCE, -5.0, [-5.0495, -0.05, 5]),
    "successes in a row": ([-5, 5, 5], [0, 1, 1], -5.0, [-0.05, 5, 5]),
    "success inside": ([-1, 0, -1, -1], [0, 0, 0, 1], -1.0, [-2.950399, -1.9701, -1.99, -1]),
    "some fail": (
        [-1, -1, -1, 0, -1, -1, -1, -1],
        [0, 1, 0, 1, 1, 0, 0, 1],
        -1.0,
        [-100, -100, -1, 0, -100, -100, -100, -100],
    ),
}


@pytest.mark.parametrize("case", RETURNS)
def test_returns_by_hand(case):
    """Return-to-go, the rule for sparse failures included, of arrays of any type and of lists."""
    rewards, ends, failure_reward, expected = RETURNS[case]
    from_lists = calql_sera.mc_returns(rewards, ends, 0.99, failure_reward)
    np.testing.assert_allclose(from_lists, expected, rtol=1e-6)
    for reward_type in (np.float32, np.float64, np.int64):
        for end_type in (bool, np.float32):
            arrays = np.array(rewards, dtype=reward_type), np.array(ends, dtype=end_type)
            returns = calql_sera.mc_returns(*arrays, 0.99, failure_reward)
            assert returns.dtype == np.float32
            np.testing.assert_array_equal(returns, from_lists)


def test_failures_without_discount():
    """At gamma 1 an endless failure has no return: the sum of its rows is taken."""
    assert calql_sera.mc_returns([-1, -1, -1], ONCE, 1.0, -1.0).tolist() == [-3, -2, -1]


def test_returns_of_random_trajectories():
    """A quadratic double loop gives the same."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=400)
    ends = rng.random(400) < 0.05
    assert ends.sum() > 5
    for gamma in (0.0, 0.9, 1.0):
        returns = calql_sera.mc_returns(rewards, ends, gamma)
        expected = summed_returns(rewards, ends, gamma)
        np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=1e-6)


def test_returns_of_a_long_float32_trajectory():
    """A thousand float32 rewards: the sum is as good as one in double precision."""
    rewards = np.random.default_rng(1).uniform(1, 5, size=1000).astype(np.float32)
    ends = np.arange(1000) == 999
    returns = calql_sera.mc_returns(rewards, ends, 0.99)
    np.testing.assert_allclose(returns, summed_returns(rewards, ends, 0.99), rtol=1e-6)


def test_returns_in_the_buffer():
    """Dataset and online rows have the returns of their own trajectories, of scaled rewards."""
    data = make_rows(20, timeouts=[5], terminals=[11])
    online = make_rows(6, timeouts=[2], first=100)
    changes = {"gamma": 0.9, "online_steps": 6, "reward_scale": 2.0, "reward_bias": -3.0}
    args = recompute.make_args(calql_sera, **changes)
    buffer = calql_sera.ReplayBuffer(data, args, torch.device("cpu"))
    buffer.append(online)
    returns = buffer.as_columns(buffer.table)["mc_returns"].numpy()
    expected = []
    for rows in (data, online):
        rewards = 2 * rows["rewards"].astype(np.float64) - 3
        expected.append(summed_returns(rewards, rows["episode_ends"], 0.9))
    np.testing.assert_allclose(returns, np.concatenate(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("env", "scale", "bias", "first"),
    [
        ("hopper-medium-v2", 1, -1, -2.71),
        ("antmaze-umaze-v2", 1, -1, -10),  # a failing step has reward 0 there, which is the bias
        ("antmaze-umaze-v2", 2, -1, -10),
        ("pen-binary-v0", 4, 3, -10),  # and -1 here: 4 * -1 + 3
        ("pen-human-v1", 4, 3, -2.71),
        ("Pen-binary-v0", 4, 3, -2.71),  # a task of one's own
    ],
)
def test_rule_for_failures_is_for_sparse_tasks(env, scale, bias, first):
    """Three steps of -1, as trained on, would have gone on so, in AntMaze and binary tasks."""
    changes = {"env": env, "gamma": 0.9, "reward_scale": scale, "reward_bias": bias}
    args = recompute.make_args(calql_sera, **changes)
    transitions = {"rewards": np.full(3, -1.0), "episode_ends": np.array(ONCE, dtype=bool)}
    returns = calql_sera.added_columns(transitions, args, float(scale))["mc_returns"]
    assert returns[0] == pytest.approx(first, rel=1e-6)


def test_rule_for_failures_under_normalized_rewards():
    """Stored rewards are then of another scale, and the rule is about them."""
    data = make_rows(4, timeouts=[1, 3])
    data["rewards"] = np.array([-1, -1, -1, 0], dtype=np.float32)  # returns -2 and -1: scale 1000
    changes = {"env": "pen-binary-v0", "gamma": 0.9, "online_steps": 0, "reward_bias": 5.0}
    args = recompute.make_args(calql_sera, normalize_rewards=True, **changes)
    buffer = calql_sera.ReplayBuffer(data, args, torch.device("cpu"))
    returns = buffer.as_columns(buffer.table)["mc_returns"].numpy()
    np.testing.assert_allclose(returns, [-9950, -9950, -995 + 0.9 * 5, 5], rtol=1e-6)


# ------------------------------ the squashed normal
def normal_log_density(x, std):
    return -0.5 * (x / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)


def squashed_cdf(action, mean, std):
    return 0.5 * math.erfc(-(math.atanh(action) - mean) / (std * math.sqrt(2)))


def test_tanh_gaussian_by_hand():
    """Mean 0.3, standard deviation 0.5, u = 0.8."""
    mean, log_std, noise = torch.tensor([[[0.3]], [[math.log(0.5)]], [[1.0]]], dtype=torch.float64)
    action, log_prob = calql_sera.sample_tanh_gaussian(mean, log_std, noise)
    assert action.shape == (1, 1)
    assert log_prob.shape == (1,)
    assert action.item() == pytest.approx(0.664037, abs=1e-6)
    assert log_prob.item() == pytest.approx(-0.144284, abs=1e-6)


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (-1.2, 0.2), (0.0, 1.5), (2.0, 1.0)])
def test_tanh_gaussian_is_a_density(mean, std):
    """exp(log pi) is the slope of the distribution function of tanh(u)."""
    for action in (-0.99, -0.8, -0.3, 0.0, 0.45, 0.9, 0.995):
        noise = torch.tensor([(math.atanh(action) - mean) / std], dtype=torch.float64)
        means = torch.full_like(noise, mean)
        log_stds = torch.full_like(noise, math.log(std))
        squashed, log_prob = calql_sera.sample_tanh_gaussian(means, log_stds, noise)
        above = squashed_cdf(action + 1e-5, mean, std)
        below = squashed_cdf(action - 1e-5, mean, std)
        assert squashed.item() == pytest.approx(action, abs=1e-12)
        slope = (above - below) / 2e-5
        assert log_prob.exp().item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_tanh_gaussian_sums_over_dimensions():
    """The log-density of two action dimensions is the sum of theirs; leading axes broadcast."""
    torch.manual_seed(0)
    mean = torch.randn(4, 1, 2)
    log_std = torch.randn(4, 1, 2)
    noise = torch.randn(4, 3, 2)
    actions, log_prob = calql_sera.sample_tanh_gaussian(mean, log_std, noise)
    parts = []
    for i in (0, 1):
        one = (x[..., i : i + 1] for x in (mean, log_std, noise))
        parts.append(calql_sera.sample_tanh_gaussian(*one))
    assert actions.shape == (4, 3, 2)
    assert log_prob.shape == (4, 3)
    torch.testing.assert_close(actions, torch.cat([parts[0][0], parts[1][0]], dim=-1))
    torch.testing.assert_close(log_prob, parts[0][1] + parts[1][1])


@pytest.mark.parametrize("u", [12.0, -12.0, 40.0, -40.0])
def test_tanh_gaussian_far_out(u):
    """float32 keeps log(1 - tanh(u)^2) = 2 log 2 - 2 |u|, and its gradient, where tanh(u) is 1."""
    mean = torch.full((1, 2), u - 0.25, requires_grad=True)
    log_std = torch.full((1, 2), math.log(0.25), requires_grad=True)
    _, log_prob = calql_sera.sample_tanh_gaussian(mean, log_std, torch.ones(1, 2))
    correction = normal_log_density(0.25, 0.25) - log_prob.item() / 2
    assert correction == pytest.approx(2 * math.log(2) - 2 * abs(u), rel=1e-5)
    if abs(u) == 12:
        assert correction == pytest.approx(-22.6137, abs=1e-3)
    log_prob.sum().backward()
    torch.testing.assert_close(mean.grad, torch.full((1, 2), math.copysign(2, u)))  # 2 tanh(u)
    torch.testing.assert_close(log_std.grad, torch.full((1, 2), math.copysign(0.5, u) - 1))


# ------------------------------ the agent
def test_initial_agent():
    """Last layers of variance 1e-2 / width without bias, targets as critics, alpha 1, w' = e."""
    torch.manual_seed(3)
    args = recompute.make_args(calql_sera, hidden_dim=256, critic_layers=4)
    agent = calql_sera.Agent(11, 3, args)
    layers = recompute.linear_layers(agent.critics)
    last = agent.actor.layers[-1]
    last_critic = layers[-1]
    assert len(layers) == 5
    for weight in (last.weight, last_critic.weight[0], last_critic.weight[1]):
        assert weight.std().item() == pytest.approx(0.1 / 16, rel=0.15)
        assert weight.abs().max() <= math.sqrt(3) * 0.1 / 16
    assert not torch.equal(last_critic.weight[0], last_critic.weight[1])
    assert not last.bias.any()
    assert not last_critic.bias.any()
    pairs = zip(agent.critics.parameters(), agent.target_critics.parameters(), strict=True)
    for critic, target in pairs:
        assert torch.equal(critic, target)
        assert critic is not target
    assert agent.log_alpha.item() == 0
    assert agent.log_multiplier.item() == 1


def test_policy_standard_deviation():
    """log_std is scale x + offset, from 1 and -1, within -20 and 2; the mean is left alone."""
    actor = calql_sera.Agent(4, 2, recompute.make_args(calql_sera)).actor
    last = actor.layers[-1]
    observations = torch.randn(3, 4)
    with torch.no_grad():
        last.weight.zero_()
        for x, expected in ((0.5, -0.5), (0, -1), (-7, -8), (-30, -20), (9, 2)):
            last.bias.copy_(torch.tensor([5, -6, x, x]))
            mean, log_std = actor(observations)
            assert mean.tolist() == [[5, -6]] * 3
            assert log_std.tolist() == [[expected] * 2] * 3
        actor.log_std_scale.fill_(2)
        actor.log_std_offset.fill_(0.5)
        last.bias.copy_(torch.tensor([5, -6, 0.25, -1]))
        _, log_std = actor(observations)
        assert log_std.tolist() == [[1, -1.5]] * 3


def test_act_and_value():
    """To evaluate, the mean is squashed, to explore, a sample; V: lower Q at the mean action."""
    agent, _, _ = make_agent(seed=5)
    observations = torch.randn(6, 4)
    mean, log_std = agent.actor(observations)
    assert torch.equal(agent.act(observations, deterministic=True), mean.tanh())
    torch.manual_seed(5)
    sample = agent.act(observations, deterministic=False)
    torch.manual_seed(5)
    torch.testing.assert_close(sample, torch.tanh(mean + log_std.exp() * torch.randn(6, 2)))
    expected = agent.critics(observations, mean.tanh())
    assert (expected[0] < expected[1]).any()
    assert (expected[1] < expected[0]).any()
    torch.testing.assert_close(agent.value(observations), torch.minimum(*expected))


# ------------------------------ the actions of the conservative term
def policies(batch_size, action_dim, seed=0):
    """Mean and log_std (B, a) at s and at s', moderate enough for atanh in float64."""
    generator = torch.Generator().manual_seed(seed)

    def policy():
        mean, log_std = torch.randn(
            2, batch_size, action_dim, generator=generator, dtype=torch.float64
        )
        return 0.5 * mean, 0.3 * log_std - 1

    return policy(), policy()


@pytest.mark.parametrize(("n", "action_dim"), [(1, 1), (4, 1), (1, 3), (5, 3)])
def test_densities_of_cql_actions(n, action_dim):
    """log mu is that of the source: -|A| log 2, or the textbook's of the squashed normal there.

    log N(atanh(a); mean, std) - log(1 - a^2), summed over the dimensions.
    """
    policy, next_policy = policies(7, action_dim)
    torch.manual_seed(1)
    actions, log_densities = calql_sera.sample_cql_actions(policy, next_policy, n)
    assert actions.shape == (7, 3 * n, action_dim)
    assert log_densities.shape == (7, 3 * n)
    for i in range(7):
        for a in range(3 * n):
            expected = -action_dim * math.log(2)
            if a >= n:
                mean, log_std = policy if a < 2 * n else next_policy
                normal = torch.distributions.Normal(mean[i], log_std[i].exp())
                action = actions[i, a]
                density = normal.log_prob(action.atanh()) - torch.log(1 - action**2)
                expected = density.sum().item()
            assert log_densities[i, a].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_order_of_cql_actions():
    """n uniform ones, n of pi(s), n of pi(s'), each of its own row and with noise of its own."""
    n = 500
    narrow = torch.full((2, 1), -3.0)
    policy = torch.tensor([[0.5], [1.0]]), narrow
    next_policy = torch.tensor([[-0.5], [-1.0]]), narrow
    torch.manual_seed(2)
    actions, _ = calql_sera.sample_cql_actions(policy, next_policy, n)
    uniform, of_state, of_next = actions.squeeze(-1).split(n, dim=1)
    for part_of_actions, means in ((of_state, policy[0]), (of_next, next_policy[0])):
        u = part_of_actions.atanh()
        deviation = math.exp(-3)
        torch.testing.assert_close(u.mean(1), means[:, 0], rtol=0, atol=5 * deviation / n**0.5)
        torch.testing.assert_close(u.std(1), torch.full((2,), deviation), rtol=0.2, atol=0)
    noise = torch.cat([of_state.atanh() - policy[0], of_next.atanh() - next_policy[0]])
    correlations = torch.corrcoef(torch.cat([noise, uniform])) - torch.eye(6)
    assert correlations.abs().max() < 5 / n**0.5


def test_uniform_cql_actions():
    """They fill [-1, 1] evenly, whatever the policy is: every tenth of it has its share."""
    n = 10_000
    policy, next_policy = policies(2, 1)
    torch.manual_seed(3)
    actions, _ = calql_sera.sample_cql_actions(policy, next_policy, n)
    uniform = actions[:, :n].reshape(-1)
    assert uniform.min() >= -1
    assert uniform.max() <= 1
    counts = torch.histc(uniform.float(), bins=10, min=-1, max=1)
    assert counts.sum() == 2 * n
    assert (counts - 2 * n / 10).abs().max() < 5 * (2 * n * 0.1 * 0.9) ** 0.5


# ------------------------------ the conservative term
@pytest.mark.parametrize(("bound", "expected"), [(-1e9, 4.094345), (0, 4.094345), (1, 4.857727)])
def test_conservative_term_by_hand(bound, expected):
    """One action dimension, every Q 0, every density 1/2: log 60, and with R = 1 log(20 + 40 e)."""
    q_data = torch.zeros(2, 5)
    q_sampled = torch.zeros(2, 5, 30)
    log_densities = torch.full((5, 30), -math.log(2))
    bounds = torch.full((5,), float(bound))
    term = calql_sera.conservative_term(q_data, q_sampled, log_densities, bounds)
    assert term.tolist() == pytest.approx([expected] * 2, abs=1e-5)
    q_data[1] = 3  # the data's actions count against it, critic by critic
    term = calql_sera.conservative_term(q_data, q_sampled, log_densities, bounds)
    assert term.tolist() == pytest.approx([expected, expected - 3], abs=1e-5)


@pytest.mark.parametrize("shift", [-1e6, 0.0, 1e6])
def test_conservative_term_by_loops(shift):
    """Random numbers: R bounds the policy's actions alone, never the data's or the uniform ones."""
    rng = np.random.default_rng(2)
    n, batch_size = 4, 7
    q_data = rng.normal(size=(2, batch_size))
    q_sampled = rng.normal(size=(2, batch_size, 3 * n))
    log_densities = rng.normal(size=(batch_size, 3 * n))
    bounds = rng.normal(size=batch_size) + shift
    q_data[:, 0] += 500  # far below -200, where CORL's code cuts the difference
    expected = []
    for j in (0, 1):
        terms = []
        for i in range(batch_size):
            exponents = []
            for a in range(3 * n):
                value = q_sampled[j, i, a]
                if a >= n:
                    value = max(value, bounds[i])
                exponents.append(value - log_densities[i, a])
            top = max(exponents)
            total = sum(math.exp(x - top) for x in exponents)
            terms.append(top + math.log(total) - q_data[j, i])
        expected.append(sum(terms) / batch_size)
    inputs = [torch.from_numpy(x) for x in (q_data, q_sampled, log_densities, bounds)]
    np.testing.assert_allclose(calql_sera.conservative_term(*inputs), expected, rtol=1e-9)


# ------------------------------ the update
def trained_parameters(agent):
    """The parameters of each loss, by name."""
    return {
        "actor": list(agent.actor.parameters()),
        "critics": list(agent.critics.parameters()),
        "alpha": [agent.log_alpha],
        "multiplier": [agent.log_multiplier],
    }


def slow_losses(agent, batch, args, seed):
    """All losses of eqs. (1) to (6) in float64: one network call per state and action, by loops.

    Gives the gradients of each loss, None if it has none, and what is logged. The random numbers
    are drawn as `update` draws them after the same seed.
    """
    agent = copy.deepcopy(agent).double()
    batch = {name: column.double() for name, column in batch.items()}
    batch_size, action_dim = batch["actions"].shape
    n = args.cql_actions
    torch.manual_seed(seed)
    noise = torch.randn(batch_size, action_dim).double()
    cql_noise = torch.randn(2, batch_size, n, action_dim).double()
    uniform = torch.rand(batch_size, n, action_dim).double() * 2 - 1
    if not args.cql_max_target_backup:
        target_noise = torch.randn(batch_size, action_dim).double()

    td, actor_loss, alpha_loss = [], [], []
    conservatism = [[], []]
    lifted, entropies, q_datas, q_policies = [], [], [], []
    for i in range(batch_size):
        state = batch["observations"][i]
        next_state = batch["next_observations"][i]
        bound = batch["mc_returns"][i]
        with torch.no_grad():
            of_state = [policy_sample(agent.actor, state, z) for z in cql_noise[0, i]]
            of_next = [policy_sample(agent.actor, next_state, z) for z in cql_noise[1, i]]
            backups = of_next
            if not args.cql_max_target_backup:
                backups = [policy_sample(agent.actor, next_state, target_noise[i])]
            values = []
            for action, _ in backups:
                both = [q_value(agent.target_critics, j, next_state, action) for j in (0, 1)]
                values.append(min(both))
            y = batch["rewards"][i]
            if not batch["terminals"][i]:
                y = y + args.gamma * max(values)
        for j in (0, 1):
            q_data = q_value(agent.critics, j, state, batch["actions"][i])
            q_datas.append(q_data.item())
            td.append((q_data - y) ** 2)
            exponents = []
            for action in uniform[i]:
                q = q_value(agent.critics, j, state, action)
                exponents.append(q + action_dim * math.log(2))
            for number, (action, log_density) in enumerate(of_state + of_next):
                q = q_value(agent.critics, j, state, action)
                if number < n:
                    q_policies.append(q.item())
                lifted.append(bool(q < bound))
                calibrated = bound if lifted[-1] else q
                exponents.append(calibrated - log_density)
            conservatism[j].append(torch.stack(exponents).exp().sum().log() - q_data)
        action, log_density = policy_sample(agent.actor, state, noise[i])
        both = [q_value(agent.critics, j, state, action) for j in (0, 1)]
        entropies.append(-log_density.item())
        actor_loss.append(agent.log_alpha.detach().exp() * log_density - torch.minimum(*both))
        alpha_loss.append(-agent.log_alpha * (log_density.detach() - action_dim))

    td_loss = sum(td) / batch_size
    terms = [sum(of_critic) / batch_size for of_critic in conservatism]
    if args.cql_lagrange:
        multiplier = agent.log_multiplier.exp()
        weight = args.cql_weight * multiplier.item()
        gaps = sum(term.item() - args.cql_gap for term in terms)
        multiplier_loss = -0.5 * multiplier * args.cql_weight * gaps
    else:
        weight = args.cql_weight
        multiplier_loss = None
    losses = {
        "actor": sum(actor_loss) / batch_size,
        "critics": td_loss + weight * sum(terms),  # less a constant with a gap
        "alpha": sum(alpha_loss) / batch_size,
        "multiplier": multiplier_loss,
    }
    gradients = {}
    for name, parameters in trained_parameters(agent).items():
        gradients[name] = None
        if losses[name] is not None:
            gradients[name] = torch.autograd.grad(losses[name], parameters)
    logs = {
        "losses/td": td_loss.item(),
        "losses/conservative": (sum(terms) / 2).item(),
        "losses/calibrated_share": np.mean(lifted),
        "losses/actor": losses["actor"].item(),
        "losses/entropy": np.mean(entropies),
        "losses/alpha": agent.log_alpha.exp().item(),
        "losses/q_data": np.mean(q_datas),
        "losses/q_policy": np.mean(q_policies),
    }
    return gradients, logs


def assert_gradients(agent, gradients):
    """Every parameter has the slow gradient, of its own loss alone, and targets have none."""
    for name, parameters in trained_parameters(agent).items():
        if gradients[name] is None:
            assert all(parameter.grad is None for parameter in parameters), name
            continue
        for parameter, slow in zip(parameters, gradients[name], strict=True):
            assert slow.any(), name
            tolerance = 1e-4 * slow.abs().max().item()
            gradient = parameter.grad.double()
            torch.testing.assert_close(gradient, slow, rtol=1e-3, atol=tolerance, msg=name)
    assert all(parameter.grad is None for parameter in agent.target_critics.parameters())


@pytest.mark.parametrize("variant", CQL_VARIANTS)
def test_update_by_loops(variant):
    """What is logged and the gradient of every parameter equal the slow recomputation."""
    agent, optimizer, args = make_agent(**({"cql_actions": 3} | CQL_VARIANTS[variant]))
    batch = make_batch()
    gradients, expected = slow_losses(agent, batch, args, seed=7)
    assert 0.1 < expected["losses/calibrated_share"] < 0.9
    # alpha is logged after its step, of Adam's size, that lifts log alpha or lowers it
    (alpha_gradient,) = gradients["alpha"]
    expected["losses/alpha"] *= math.exp(-args.actor_lr * alpha_gradient.sign().item())
    logs = updated(agent, optimizer, batch, args)
    assert logs == pytest.approx(expected, rel=1e-4)
    assert_gradients(agent, gradients)


def test_update_again():
    """Nothing is left over from one update to the next: the second's gradients are its own."""
    agent, optimizer, args = make_agent(cql_actions=3, actor_lr=0.01, critic_lr=0.01)
    updated(agent, optimizer, make_batch(0), args, seed=7)
    gradients, _ = slow_losses(agent, make_batch(1), args, seed=8)
    updated(agent, optimizer, make_batch(1), args, seed=8)
    assert_gradients(agent, gradients)


@pytest.mark.parametrize("gap", [-50.0, 50.0])
def test_lagrange_multiplier(gap):
    """Its gradient is -1/2 sum_j w' w (C_j - g): it rises while C_j is above g, else it falls."""
    agent, optimizer, args = make_agent(cql_lagrange=True, cql_gap=gap, cql_weight=2.0)
    before = agent.log_multiplier.item()
    conservative = updated(agent, optimizer, make_batch(), args)["losses/conservative"]
    expected = -0.5 * math.exp(before) * 2.0 * 2 * (conservative - gap)
    assert agent.log_multiplier.grad.item() == pytest.approx(expected, rel=1e-5)
    assert (agent.log_multiplier.item() > before) == (conservative > gap)


@pytest.mark.parametrize("log_std", [-4.0, -0.1])
def test_temperature(log_std):
    """alpha rises if the policy's entropy is below -|A|, and falls if it is above."""
    agent, optimizer, args = make_agent(cql_actions=3)
    with torch.no_grad():
        agent.actor.layers[-1].weight.zero_()
        agent.actor.layers[-1].bias.zero_()
        agent.actor.log_std_offset.fill_(log_std)
    before = agent.log_alpha.item()
    entropy = updated(agent, optimizer, make_batch(), args)["losses/entropy"]
    assert (entropy < -2) == (log_std == -4)
    assert (agent.log_alpha.item() > before) == (entropy < -2)


def zero_critics(agent):
    """Make every value 0, of critics and of targets."""
    with torch.no_grad():
        for critics in (agent.critics, agent.target_critics):
            for parameter in critics.parameters():
                parameter.zero_()


def test_target_by_hand():
    """Q = 0 and targets 6 and 4 everywhere, r = 1, gamma 0.5: y is 3, or 1 at a terminal."""
    agent, optimizer, args = make_agent(cql_actions=3, gamma=0.5)
    zero_critics(agent)
    last = recompute.linear_layers(agent.target_critics)[-1]
    with torch.no_grad():
        last.bias.copy_(torch.tensor([6.0, 4.0]).reshape(2, 1, 1))
    batch = make_batch()
    batch["rewards"].fill_(1.0)
    td = updated(agent, optimizer, batch, args)["losses/td"]
    assert td == pytest.approx(2 * (4 * 9 + 2 * 1) / 6, rel=1e-5)


def test_max_target_backup_by_hand():
    """Q'_1 = a and Q'_2 = -a of the action's first number: the best lower one is -min |a|."""
    changes = {"cql_actions": 3, "cql_max_target_backup": True, "critic_layers": 1}
    agent, optimizer, args = make_agent(gamma=0.5, **changes)
    zero_critics(agent)
    into, out = recompute.linear_layers(agent.target_critics)
    with torch.no_grad():
        into.weight[:, 4, 0] = 1  # a and -a, by two units that cut at 0
        into.weight[:, 4, 1] = -1
        out.weight[:, :2, 0] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        agent.actor.layers[-1].weight.zero_()
        agent.actor.layers[-1].bias.zero_()
        agent.actor.log_std_offset.zero_()
    batch = make_batch()
    batch["rewards"].fill_(1.0)
    torch.manual_seed(7)
    torch.randn(6, 2)  # the policy loss draws first
    next_actions = torch.randn(2, 6, 3, 2)[1].tanh()
    y = 1 - 0.5 * (1 - batch["terminals"]) * next_actions[..., 0].abs().amin(1)
    td = updated(agent, optimizer, batch, args)["losses/td"]
    assert td == pytest.approx(2 * y.square().mean().item(), rel=1e-5)


def test_learning_rates():
    """Adam's first step is the rate: the policy's also for alpha, the critics' also for w'."""
    changes = {"actor_lr": 0.02, "critic_lr": 0.05, "cql_lagrange": True}
    agent, optimizer, args = make_agent(cql_actions=3, **changes)
    before = trained_parameters(copy.deepcopy(agent))
    updated(agent, optimizer, make_batch(), args)
    rates = {"actor": 0.02, "alpha": 0.02, "critics": 0.05, "multiplier": 0.05}
    for name, parameters in trained_parameters(agent).items():
        for old, new in zip(before[name], parameters, strict=True):
            assert (new - old).abs().max().item() == pytest.approx(rates[name], rel=1e-3), name


def test_saturated_policy():
    """Actions that float32 rounds to +-1, of mean +-30, leave losses and parameters finite."""
    agent, optimizer, args = make_agent(cql_actions=3)
    with torch.no_grad():
        agent.actor.layers[-1].bias.copy_(torch.tensor([30.0, -30.0, 0.0, 0.0]))
    assert agent.act(torch.randn(5, 4), deterministic=False).abs().min() == 1
    logs = updated(agent, optimizer, make_batch(), args)
    assert all(map(math.isfinite, logs.values())), logs
    assert all(parameter.isfinite().all() for parameter in agent.parameters())
    trained = trained_parameters(agent)
    for name in ("actor", "critics", "alpha"):
        assert all(parameter.grad.isfinite().all() for parameter in trained[name]), name


# ------------------------------ the online phase
STEPS = ["--online-steps", "44"]  # episodes of 7 + 9 + 7 + 9 + 7 steps, and five of one more


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Runs the script on a small made-up dataset, in scripted episodes."""
    dataset = write_dataset(tmp_path_factory.mktemp("data") / "made-up.hdf5")

    def run(*options, folder=None, **replaced):
        folder = folder or tmp_path_factory.mktemp("run")
        return recorded_run(
            calql_sera, dataset, folder, *options, make_env=scripted_env, **replaced
        )

    return run


@pytest.fixture(scope="module")
def scripted(train):
    """A run of 44 steps, and the ends of episodes that the buffer was told with every append."""
    added_columns = calql_sera.added_columns
    ends = []

    def noting_added_columns(transitions, args, reward_scale):
        ends.append(transitions["episode_ends"].tolist())
        return added_columns(transitions, args, reward_scale)

    run = train(*STEPS, added_columns=noting_added_columns)
    run.ends = ends[1:]  # without the dataset's
    return run


def test_episodes_are_appended_whole(scripted):
    """One by one, in order, with an end at the last row; the last step ends an unfinished one."""
    episodes = scripted.envs[0].episodes
    lengths = [7, 9, 7, 9, 7, 5]
    assert [len(episode) for episode in episodes] == lengths
    assert scripted.ends == [[False] * (length - 1) + [True] for length in lengths]
    assert scripted.rows["rewards"].tolist() == list(range(10, 54))
    terminated = [step.terminated for step in scripted.envs[0].all_steps()]
    assert scripted.rows["terminals"].tolist() == terminated
    assert sum(terminated) == 3


def test_returns_of_online_rows(scripted):
    """Each row's return-to-go is of its own episode, the unfinished one included."""
    rewards = np.arange(10, 54)
    ends = np.concatenate(scripted.ends)
    returns = scripted.rows["mc_returns"]
    np.testing.assert_allclose(returns, summed_returns(rewards, ends, 0.99), rtol=1e-6)
    firsts = [
        sum(0.99**i * (10 + i) for i in range(7)),
        sum(0.99**i * (17 + i) for i in range(9)),
        sum(0.99**i * (49 + i) for i in range(5)),
    ]
    assert returns[[0, 7, 39]].tolist() == pytest.approx(firsts, rel=1e-6)
    assert returns[[6, 15, 43]].tolist() == [16, 25, 53]  # the rows that end them


def test_unfinished_episodes_are_never_sampled(scripted):
    """At every update the buffer holds the rows of finished episodes and no others."""
    assert len(scripted.samples) == 12 + 44
    online = scripted.samples[12:]
    for steps, sample in enumerate(online):  # updates precede the step
        assert sample.steps == steps
        assert sample.online_size == sample.finished
        assert "mc_returns" in sample.batch
    sizes = [online[steps].online_size for steps in (0, 6, 7, 15, 16, 39, 43)]
    assert sizes == [0, 0, 7, 7, 16, 39, 39]


@pytest.mark.parametrize(
    ("mixing_ratio", "expected"),
    [
        ("0.5", [(32, 0)] * 16 + [(16, 16)] * 28),
        ("0.75", [(32, 0)] * 16 + [(24, 8)] * 28),  # not at step 8, with 7 rows
        ("0", [(0, 32)] * 12),  # from step 33
    ],
)
def test_batches_wait_for_finished_episodes(mixing_ratio, expected, train):
    """Online rows enter a batch once those of finished episodes fill their share of it."""
    run = train(*STEPS, "--mixing-ratio", mixing_ratio)
    numbers = [(sample.rows.dataset, sample.rows.online) for sample in run.samples]
    assert numbers == [(32, 0)] * 12 + expected


def test_from_scratch(train):
    """Without data the first update waits for a batch of finished episodes."""
    options = ["--offline-steps", "0", "--mixing-ratio", "0", "--learning-starts", "0"]
    run = train(*STEPS, *options)
    assert [(sample.rows.dataset, sample.rows.online) for sample in run.samples] == [(0, 32)] * 12
    assert run.samples[0].online_size == 32
    assert len(run.rows["mc_returns"]) == 44
    for name in ("actor", "critics", "target_critics"):
        trained = part(run.last["agent"], name)
        for key, value in part(run.initial, name).items():
            assert not torch.equal(trained[key], value), (name, key)


def test_extended_run(train):
    """A run that goes on after its last step samples the rows of the episode that this cut off."""
    run = train(*STEPS)
    extended = train("--online-steps", "60", "--resume", folder=run.folder)
    assert extended.samples[0].online_size == 44
    sizes = [sample.online_size for sample in extended.samples]
    assert sizes == [44] * 7 + [51] * 9  # with the first episode of 7 anew
    assert len(extended.rows["rewards"]) == 60
    for name, column in run.rows.items():
        assert torch.equal(extended.rows[name][:44], column), name
    expected = [sum(0.99**i * (17 + i) for i in range(9)), 25]  # its second one, of 9
    assert extended.rows["mc_returns"][[51, 59]].tolist() == pytest.approx(expected, rel=1e-6)
