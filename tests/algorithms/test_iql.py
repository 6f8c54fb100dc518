"""IQL against hand numbers and a slow recomputation; its rates, presets and scaled rewards."""

import copy
import csv
import math
from functools import partial
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import recompute
import torch
from recompute import linear_layers, make_batch, q_value

import iql_sera

CPU = torch.device("cpu")
TRAINED = ("actor", "critics", "value_network")

make_agent = partial(recompute.make_agent, iql_sera)
updated = partial(recompute.updated, iql_sera)


# ------------------------------ agent
def make_constant(network, *outputs):
    """Let a network give these outputs, or critics one each, for every input."""
    with torch.no_grad():
        *others, last = network.parameters()
        for parameter in others:
            parameter.zero_()
        last.copy_(torch.tensor(outputs).reshape(last.shape))


def test_policy_distribution():
    """The mean is tanh of the network; log_std one parameter for all states, cut at -5 and 2.

    At first it is 0.
    """
    agent, _, args = make_agent()
    observations = torch.randn(3, 4)
    policy = agent.actor(observations)
    torch.testing.assert_close(policy.mean, agent.actor.layers(observations).tanh())
    assert (policy.mean[0] != policy.mean[1]).all()
    assert torch.equal(policy.stddev[0], policy.stddev[1])
    make_constant(agent.actor.layers, 0.5, -30.0)
    cases = (([-4.5, 1.5], [-4.5, 1.5]), ([-5.5, 2.5], [-5, 2]), ([-100, 100], [-5, 2]))
    for log_std, expected in cases:
        agent.actor.log_std.data.copy_(torch.tensor(log_std))
        policy = agent.actor(observations)
        torch.testing.assert_close(policy.mean, torch.tensor([[math.tanh(0.5), -1]] * 3))
        torch.testing.assert_close(policy.stddev.log(), torch.tensor([expected] * 3).float())
    assert (iql_sera.Agent(4, 2, args).actor(observations).stddev == 1).all()


def test_initial_networks():
    """Targets start as copies of the critics; V has the critics' depth, the policy its own."""
    args = iql_sera.Args(device="cpu", actor_layers=1, critic_layers=3)
    agent = iql_sera.Agent(11, 3, args)
    for critic, target in zip(agent.critics.parameters(), agent.target_critics.parameters()):
        assert torch.equal(critic, target)
        assert critic is not target
        assert not torch.equal(critic[0], critic[1])
    weights = [weight for weight in agent.value_network.parameters() if weight.dim() == 2]
    shapes = [tuple(weight.shape) for weight in weights]
    assert shapes == [(256, 11), (256, 256), (256, 256), (1, 256)]
    assert len(linear_layers(agent.critics)) == 4
    assert len(list(agent.actor.layers.parameters())) == 4


def test_act():
    """To evaluate, the mean, without a random number; to explore, a sample, cut to [-1, 1]."""
    agent, _, _ = make_agent()
    with torch.no_grad():
        agent.actor.log_std.copy_(torch.tensor([-0.5, 1.0]))
        observations = torch.randn(64, 4)
        mean = agent.actor.layers(observations).tanh()
        torch.manual_seed(3)
        random_state = torch.get_rng_state()
        assert torch.equal(agent.act(observations, deterministic=True), mean)
        assert torch.equal(torch.get_rng_state(), random_state)
        actions = agent.act(observations, deterministic=False)
        torch.manual_seed(3)
        samples = mean + torch.tensor([-0.5, 1.0]).exp() * torch.randn(64, 2)
    assert (samples.abs() > 1).any(0).all()
    assert (samples.abs() < 1).any(0).all()
    torch.testing.assert_close(actions, samples.clamp(-1, 1))
    assert actions.abs().max() == 1


def q_values_of(critics, states, actions):
    """Both critics' values (2, B), one by one."""
    values = []
    for j in (0, 1):
        values.append([q_value(critics, j, *pair).item() for pair in zip(states, actions)])
    return torch.tensor(values)


def test_value_and_bonus():
    """--sera-bonus v conditions on V(s), q on the lower critic at the batch's actions."""
    agent, _, args = make_agent(sera_k=2)
    batch = make_batch(batch_size=12)
    batch["observations"] *= 0.1  # close states: how far two values are apart then matters
    states = batch["observations"]
    means = agent.critics(states, batch["actions"]).mean(1)  # without: one critic is always lower
    linear_layers(agent.critics)[-1].bias.data -= means[:, None, None]
    values = torch.stack([agent.value_network(state)[0] for state in states]).detach()
    torch.testing.assert_close(agent.value(states), values)
    q_values = q_values_of(agent.critics, states, batch["actions"])
    assert len((q_values[0] < q_values[1]).unique()) == 2
    bonuses = {}
    for name, condition in (("v", values), ("q", q_values.amin(0))):
        entropy, _, _ = iql_sera.q_conditioned_entropy(states, condition, 2)
        args.sera_bonus = name
        bonuses[name], _ = iql_sera.intrinsic_reward(agent, batch, torch.arange(4), args, False)
        torch.testing.assert_close(bonuses[name], entropy.tanh())
    assert (bonuses["v"] - bonuses["q"]).abs().max() > 0.01


# ------------------------------ the update
def test_expectile_loss_by_hand():
    """At 0.7 an error of 2 costs 2.8, one of -2 costs 1.2; of 0 and 1 the best V is then 0.7."""
    cases = (([2.0], 2.8), ([-2.0], 1.2), ([2.0, -2.0], 2.0), ([2.0, 0, 0, 0], 0.7))
    for errors, expected in cases:
        loss = iql_sera.expectile_loss(torch.tensor(errors), 0.7)
        assert loss.item() == pytest.approx(expected)
    for expectile in (0.3, 0.5, 0.7, 0.9):
        value = torch.tensor(expectile, requires_grad=True)
        iql_sera.expectile_loss(torch.tensor([0.0, 1.0]) - value, expectile).backward()
        assert value.grad.item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("advantages", "weight", "clipped_share"),
    [
        ([1.0] * 6, 20.0855, 0),
        ([2.0] * 6, 100, 1),
        ([0.0, 1, 1.5, 1.6, 2, 9], (1 + 20.0855 + 90.0171) / 6 + 50, 0.5),
    ],
)
def test_advantage_weights_by_hand(advantages, weight, clipped_share):
    """At beta 3 A = 1 weighs 20.0855, A = 1.5 weighs 90.0171, from log(100) / 3 on it is 100."""
    agent, optimizer, args = make_agent(critic_layers=0, actor_lr=0.0, critic_lr=0.0)
    make_constant(agent.value_network, 0.0)
    make_constant(agent.target_critics, 0.0, 0.5)
    # The lower one is the state's first number.
    linear_layers(agent.target_critics)[0].weight.data[:, 0] = 1.0
    batch = make_batch()
    batch["observations"][:, 0] = torch.tensor(advantages)
    logs = updated(agent, optimizer, batch, args)
    assert logs["losses/weight"] == pytest.approx(weight, rel=1e-5)
    assert logs["losses/clipped_share"] == pytest.approx(clipped_share)


def test_log_prob_is_a_density():
    """log pi is the log of the slopes of two normal distribution functions, summed."""
    agent, optimizer, args = make_agent()
    make_constant(agent.actor.layers, math.atanh(0.3), math.atanh(-0.5))
    agent.actor.log_std.data.copy_(torch.tensor([-1.0, 0.5]))
    batch = make_batch()
    actions = batch["actions"].double()
    mean = torch.tensor([0.3, -0.5]).double()
    std = torch.tensor([-1, 0.5]).double().exp()
    step = 1e-4
    ends = [torch.special.ndtr((actions + shift - mean) / std) for shift in (-step, step)]
    density = (ends[1] - ends[0]) / (2 * step)
    log_prob = updated(agent, optimizer, batch, args)["losses/log_prob"]
    assert log_prob == pytest.approx(density.log().sum(1).mean().item(), rel=1e-5)


def test_order_and_target_by_hand():
    """V = 0 steps to 0.5 towards Q' = min(6, 1) first; then A = 0.5, and y is 1 + 0.5 m 0.5.

    Critics at 0 and 1 are y away from it, and their losses add up.
    """
    agent, optimizer, args = make_agent(critic_layers=0, critic_lr=0.5, gamma=0.5)
    make_constant(agent.value_network, 0.0)
    make_constant(agent.target_critics, 6.0, 1.0)
    make_constant(agent.critics, 0.0, 1.0)
    batch = make_batch()
    batch["rewards"].fill_(1.0)
    for name in ("observations", "next_observations"):
        batch[name].zero_()  # so that V's bias alone gets a gradient
    logs = updated(agent, optimizer, batch, args)
    assert logs["losses/value"] == pytest.approx(0.7)
    assert logs["losses/v"] == pytest.approx(0.5, rel=1e-5)
    assert logs["losses/weight"] == pytest.approx(math.exp(3 * 0.5), rel=1e-5)
    assert logs["losses/td"] == pytest.approx((4 * (1.25**2 + 0.25**2) + 2 * 1) / 6, rel=1e-5)


def slow_update(agent, optimizers, batch, args):
    """One update by eqs. (1) to (4) in their order, in float64, one row and critic at a time.

    Changes the networks in place, each by its own optimizer and loss; returns what is logged.
    """
    batch = {name: column.double() for name, column in batch.items()}
    count = len(batch["rewards"])
    value, actor, critics = agent.value_network, agent.actor, agent.critics

    def take_step(name, terms):
        loss = sum(terms) / count
        optimizers[name].zero_grad()
        loss.backward(inputs=list(getattr(agent, name).parameters()))
        optimizers[name].step()
        return loss.item()

    lower_values, value_terms = [], []
    for state, action in zip(batch["observations"], batch["actions"]):
        both = [q_value(agent.target_critics, j, state, action).detach() for j in (0, 1)]
        error = min(both) - value(state)[0]
        weight = args.expectile if error > 0 else 1 - args.expectile
        lower_values.append(min(both))
        value_terms.append(weight * error**2)
    logs = {"value": take_step("value_network", value_terms)}
    actor_terms, critic_terms = [], []
    for i, y in enumerate(batch["rewards"]):
        state, action = batch["observations"][i], batch["actions"][i]
        advantage = lower_values[i] - value(state)[0].detach()
        weight = min((args.beta * advantage).exp(), 100)
        errors = (action - actor.layers(state).tanh()) / actor.log_std.exp()
        log_densities = -(errors**2) / 2 - actor.log_std - math.log(2 * math.pi) / 2
        actor_terms.append(-weight * (log_densities[0] + log_densities[1]))
        if not batch["terminals"][i]:
            y = y + args.gamma * value(batch["next_observations"][i])[0].detach()
        critic_terms += [(q_value(critics, j, state, action) - y) ** 2 for j in (0, 1)]
    logs["actor"] = take_step("actor", actor_terms)
    logs["td"] = take_step("critics", critic_terms)
    for target, critic in zip(agent.target_critics.parameters(), critics.parameters()):
        target.data += args.tau * (critic.data - target.data)
    return logs


@pytest.mark.parametrize(
    "changes", [{"beta": 30.0}, {"expectile": 0.9, "beta": 15.0, "gamma": 0.5}]
)
def test_update_by_loops(changes):
    """Losses, parameters and Adam's moments equal those of a slow copy, at three updates.

    In the copy each network has an Adam of its own, which sees the gradient of its own loss alone.
    """
    agent, optimizer, args = make_agent(actor_lr=0.05, critic_lr=0.03, tau=0.25, **changes)
    slow_agent = copy.deepcopy(agent).double()
    slow_optimizers = {}
    for name in TRAINED:
        rate = 0.05 if name == "actor" else 0.03
        slow_optimizers[name] = torch.optim.Adam(getattr(slow_agent, name).parameters(), rate)
    clipped = []
    for seed in (7, 8, 9):
        expected = slow_update(slow_agent, slow_optimizers, make_batch(seed), args)
        logs = updated(agent, optimizer, make_batch(seed), args)
        clipped.append(logs["losses/clipped_share"])
        for name, value in expected.items():
            assert logs[f"losses/{name}"] == pytest.approx(value, rel=1e-4), name
        for parameter, slow in zip(agent.parameters(), slow_agent.parameters()):
            torch.testing.assert_close(parameter.double(), slow, rtol=0, atol=1e-4)
        for name in TRAINED:
            slow_parameters = getattr(slow_agent, name).parameters()
            for parameter, slow in zip(getattr(agent, name).parameters(), slow_parameters):
                state, slow_state = optimizer.state[parameter], slow_optimizers[name].state[slow]
                assert state["step"] == slow_state["step"]
                for moment in ("exp_avg", "exp_avg_sq"):
                    scale = slow_state[moment].abs().max().item()
                    assert scale > 0, name
                    pair = state[moment].double(), slow_state[moment]
                    torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4 * scale)
    assert 0 < np.mean(clipped) < 1


# ------------------------------ learning rates
def test_schedule_by_hand():
    """The policy's rate falls on half a cosine over 4 offline updates, and is back after them.

    The rate of critics and value network stays at --critic-lr.
    """
    rates = nine_rates(actor_lr_schedule="cosine")
    falling = [0.1, 0.0853553391, 0.05, 0.0146446609]  # 0.1 (1 + cos(n pi / 4)) / 2, n = 0 ... 3
    expected = [[rate, 0.02] for rate in falling + [0.1] * 5]
    np.testing.assert_allclose(rates, expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("schedule", "online_steps", "falls"),
    [("auto", 0, True), ("auto", 5, False), ("cosine", 5, True), ("constant", 0, False)],
)
def test_when_the_rate_falls(schedule, online_steps, falls):
    """By default in runs that are offline only, as the authors have it."""
    rates = nine_rates(actor_lr_schedule=schedule, online_steps=online_steps)
    assert (rates[3][0] < 0.02) == falls
    assert rates[0] == rates[4] == rates[8] == [0.1, 0.02]


def nine_rates(**changes):
    """Of policy and critics before each of nine updates, four of which are offline."""
    agent, _, args = make_agent(offline_steps=4, actor_lr=0.1, critic_lr=0.02, **changes)
    optimizer, scheduler = iql_sera.make_optimizer(agent, args)
    rates = []
    for _ in range(9):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()  # without gradients: the scheduler wants to come second
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("updates_before", "share"),
    [(0, 1), (50, 0.5), (99, (1 + math.cos(0.99 * math.pi)) / 2), (100, 1), (200, 1)],
)
def test_learning_rates(updates_before, share):
    """The rates reach the parameters: Adam's first step moves each by its own. Offline: 100."""
    agent, _, args = make_agent(
        offline_steps=100, actor_lr=0.1, critic_lr=0.03, actor_lr_schedule="cosine"
    )
    agent = agent.double()
    batch = {name: column.double() for name, column in make_batch().items()}
    optimizer, scheduler = iql_sera.make_optimizer(agent, args)
    for _ in range(updates_before):
        optimizer.step()  # without gradients it leaves Adam's first step to come
        scheduler.step()
    before = copy.deepcopy(agent)
    updated(agent, optimizer, batch, args)
    rates = {"actor": 0.1 * share, "critics": 0.03, "value_network": 0.03}
    for name, rate in rates.items():
        pairs = zip(getattr(agent, name).parameters(), getattr(before, name).parameters())
        moved = [(new - old).abs().max().item() for new, old in pairs]
        assert moved == pytest.approx([rate] * len(moved), rel=1e-4), name


# ------------------------------ presets
def test_presets():
    """Rewards are scaled but for ant, k is 20 for walker2d; the user has the last word."""
    expected = {
        "hopper-medium-v2": (True, 10),
        "halfcheetah-random-v0": (True, 10),
        "walker2d-medium-expert-v2": (True, 20),
        "ant-medium-v2": (False, 10),
        "hopper-medium-mini": (True, 10),
    }
    for env, settings in expected.items():
        args = iql_sera.parse_args(["--env", env])
        assert (args.normalize_rewards, args.sera_k) == settings, env
        assert (args.expectile, args.beta) == (0.7, 3), env
        assert (args.actor_lr, args.critic_lr) == (3e-4, 3e-4), env
        assert (args.offline_steps < 250_000) == (env == "hopper-medium-mini")
    antmaze = iql_sera.parse_args(["--env", "antmaze-umaze-v2"])  # the authors' values
    assert (antmaze.expectile, antmaze.beta, antmaze.reward_bias) == (0.9, 10, -1)
    assert not antmaze.normalize_rewards
    raw = iql_sera.parse_args(["--env", "hopper-medium-v2", "--no-normalize-rewards"])
    scaled = iql_sera.parse_args(["--env", "ant-medium-v2", "--normalize-rewards"])
    assert not raw.normalize_rewards
    assert scaled.normalize_rewards


# ------------------------------ scaled rewards, whole runs
# A terminal after a return of 10, a timeout after 18, the end after 3; rows of 100 are left out.
REWARDS = [1.0, 2, 3, 4, 5, 6, 7, 100, 1, 0, 2, 100]
KEPT = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]


@pytest.fixture
def dataset(tmp_path):
    """A file with three trajectories of four Hopper rows: a terminal, a timeout, a cut."""
    rng = np.random.default_rng(0)
    rows = np.arange(12)
    with h5py.File(tmp_path / "made-up.hdf5", "w") as file:
        file["observations"] = rng.normal(size=(12, 11))
        file["actions"] = rng.uniform(-1, 1, size=(12, 3))
        file["rewards"] = REWARDS
        file["terminals"] = rows == 3
        file["timeouts"] = rows == 7
    return str(tmp_path / "made-up.hdf5")


def test_reward_scale_by_hand(dataset):
    """Returns 10, 18 and 3: all rewards, online too, times 1000 / 15; equal returns do nothing."""
    data = iql_sera.load_d4rl("hopper-medium-v2", dataset)
    online = {name: column[:1] for name, column in data.items()} | {"rewards": np.array([4.5])}
    for scaled, factor in ((True, 1000 / 15), (False, 1)):
        args = iql_sera.Args(normalize_rewards=scaled, online_steps=1)
        buffer = iql_sera.ReplayBuffer(data, args, CPU)
        buffer.append(online)
        expected = factor * np.array([REWARDS[row] for row in KEPT] + [4.5])
        rewards = buffer.as_columns(buffer.table)["rewards"]
        np.testing.assert_allclose(rewards, expected, rtol=1e-6)
        assert buffer.reward_scale == pytest.approx(factor)
    data["rewards"] = np.array([2, 3, 3, 4, 5, 5, 2, 4, 4, 4], dtype=np.float32)  # 12 each
    args = iql_sera.Args(normalize_rewards=True, online_steps=1)
    assert iql_sera.ReplayBuffer(data, args, CPU).reward_scale == 1


class FiveSteps(gymnasium.Env):
    """Episodes of five steps with a reward of 2.5 each."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,))
    action_space = gymnasium.spaces.Box(-1, 1, (3,))

    def reset(self, seed=None, options=None):
        self.time = 0
        return np.zeros(11), {}

    def step(self, action):
        self.time += 1
        return np.full(11, self.time / 5), 2.5, False, self.time == 5, {}


@pytest.fixture
def train(dataset, tmp_path, monkeypatch):
    """Runs the script on the made-up file; gives the run, and rates and rewards of every update.

    With stop_at the run is asked to stop in that update, and does as soon as it may.
    """
    original_train, original_update = iql_sera.train, iql_sera.update
    settings = "--device cpu --batch-size 32 --eval-episodes 2 --sera-k 5 --hidden-dim 8"
    settings = [*settings.split(), "--sera-coef", "0", "--dataset-path", dataset]

    def make_env(*args, **kwargs):
        return gymnasium.wrappers.RecordEpisodeStatistics(FiveSteps())

    def run(*options, stop_at=None):
        seen = SimpleNamespace(folder=tmp_path / "run", rates=[], rewards=[])

        def train(run, args):
            seen.run = run
            original_train(run, args)

        def update(agent, optimizer, batch, args, kind):
            logs = original_update(agent, optimizer, batch, args, kind)
            seen.rates.append([group["lr"] for group in optimizer.param_groups])
            seen.rewards += batch["rewards"].tolist()
            if len(seen.rates) == stop_at:
                seen.run.received.append("SIGTERM")
            return logs

        monkeypatch.setattr(iql_sera, "make_env", make_env)
        monkeypatch.setattr(iql_sera, "train", train)
        monkeypatch.setattr(iql_sera, "update", update)
        try:
            iql_sera.main([*settings, "--run-dir", str(seen.folder), *options])
        except SystemExit as stopped:
            assert stop_at, stopped
        seen.run.lock.release()
        return seen

    return run


def rates_of_a_run(offline_steps, online_steps):
    """With --actor-lr-schedule cosine: the policy's falls offline, and online it is whole again."""
    cosine = [(1 + math.cos(math.pi * n / offline_steps)) / 2 for n in range(offline_steps)]
    return [[1e-2 * share, 1e-3] for share in cosine + [1] * online_steps]


@pytest.mark.parametrize("offline_steps", [4, 0])
def test_learning_rates_of_a_run(offline_steps, train):
    """The schedule counts updates from the first offline one on, if there is any."""
    options = ["--offline-steps", str(offline_steps), "--online-steps", "12"]
    options += ["--actor-lr-schedule", "cosine"]
    rates = train(*options, "--actor-lr", "1e-2", "--critic-lr", "1e-3").rates
    np.testing.assert_allclose(rates, rates_of_a_run(offline_steps, 12), rtol=1e-9)


@pytest.mark.parametrize(("stop_at", "stopped_after"), [(2, 2), (8, 9)])
def test_learning_rates_survive_a_checkpoint(stop_at, stopped_after, train):
    """A run stopped offline, or online at the end of an episode, goes on at the rates due."""
    options = ["--offline-steps", "4", "--online-steps", "12"]
    options += ["--actor-lr", "1e-2", "--critic-lr", "1e-3", "--actor-lr-schedule", "cosine"]
    before = train(*options, stop_at=stop_at).rates
    assert len(before) == stopped_after
    after = train(*options, "--resume").rates
    np.testing.assert_allclose(before + after, rates_of_a_run(4, 12), rtol=1e-9)


@pytest.mark.parametrize(("options", "scale"), [([], 1000 / 15), (["--no-normalize-rewards"], 1)])
def test_rewards_of_a_run(options, scale, train):
    """Batches and stored online rows hold scaled rewards; scores are of raw ones."""
    seen = train("--offline-steps", "4", "--online-steps", "40", *options)
    buffer = seen.run.buffer
    assert buffer.reward_scale == pytest.approx(scale, rel=1e-12)
    checkpoint = iql_sera.read_checkpoint(seen.folder / "checkpoint.pt")
    online_rewards = buffer.as_columns(checkpoint["online_rows"])["rewards"]
    np.testing.assert_allclose(online_rewards, [2.5 * scale] * 40, rtol=1e-6)
    expected = sorted({REWARDS[row] for row in KEPT} | {2.5})
    found = sorted(set(seen.rewards))
    np.testing.assert_allclose(found, [scale * reward for reward in expected], rtol=1e-6)
    with open(seen.folder / "evals.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    score = 100 * (12.5 + 20.272305) / (3234.3 + 20.272305)
    assert [float(row["return"]) for row in rows] == [12.5] * 6  # two episodes at 4, 0 and 40
    assert [float(row["normalized_score"]) for row in rows] == pytest.approx([score] * 6)


# ------------------------------ dropout
def test_dropout_is_for_learning_alone():
    """Acting has none. In the loss a share of the hidden units is left out and the rest scaled."""
    agent, _, _ = make_agent(actor_dropout=0.25, hidden_dim=4000)
    observations = torch.zeros(1, 4)
    with torch.no_grad():
        for layer in (agent.actor.layers[0], agent.actor.layers[2]):
            layer.weight.zero_()
            layer.bias.fill_(1.0)  # every hidden unit is 1
        agent.actor.layers[4].weight.fill_(1e-4)
        agent.actor.layers[4].bias.zero_()
    exact = agent.act(observations, deterministic=True)
    assert torch.equal(exact, agent.actor(observations).mean)
    assert exact[0, 0].item() == pytest.approx(math.tanh(0.4), rel=1e-5)
    torch.manual_seed(0)
    means = torch.stack([agent.actor(observations, learning=True).mean for _ in range(20)])
    sums = torch.atanh(means) / 1e-4  # of 4000 units that are 0, or 4/3
    assert sums.mean().item() == pytest.approx(4000, abs=20)
    kept = sums / (4 / 3) / 4000
    assert (kept - 0.75).abs().max() < 0.03
    assert len(set(sums.flatten().tolist())) > 10


def test_no_dropout_draws_nothing():
    """By default the policy's loss leaves the random numbers as they were."""
    agent, _, _ = make_agent()
    state = torch.get_rng_state()
    agent.actor(torch.ones(3, 4), learning=True)
    assert torch.equal(torch.get_rng_state(), state)
