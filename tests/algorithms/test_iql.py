"""IQL against hand numbers and a slow recomputation; its learning rates, presets and scaled rewards."""

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
from recompute import make_batch, q_value

import iql_sera

make_networks = partial(recompute.make_networks, iql_sera)
updated = partial(recompute.updated, iql_sera, phase="online")

TRAINED = ("actor", "critics", "value")


# ------------------------------ networks
def make_constant(network, *outputs):
    """Let a network give these outputs, or critics one each, for every input."""
    with torch.no_grad():
        *others, last = network.parameters()
        for parameter in others:
            parameter.zero_()
        last.copy_(torch.tensor(outputs).reshape(last.shape))


def test_policy_distribution():
    """The mean is tanh of the network, log_std one parameter for all states, cut at -5 and 2, at first 0."""
    networks, _, args = make_networks()
    observations = torch.randn(3, 4)
    policy = networks["actor"](observations)
    torch.testing.assert_close(policy.mean, networks["actor"].layers(observations).tanh())
    assert (policy.mean[0] != policy.mean[1]).all() and torch.equal(policy.stddev[0], policy.stddev[1])
    make_constant(networks["actor"].layers, 0.5, -30.0)
    for log_std, expected in (([-4.5, 1.5], [-4.5, 1.5]), ([-5.5, 2.5], [-5, 2]), ([-100, 100], [-5, 2])):
        networks["actor"].log_std.data.copy_(torch.tensor(log_std))
        policy = networks["actor"](observations)
        torch.testing.assert_close(policy.mean, torch.tensor([[math.tanh(0.5), -1]] * 3))
        torch.testing.assert_close(policy.stddev.log(), torch.tensor([expected] * 3).float())
    assert (iql_sera.make_networks(4, 2, args)[0]["actor"](observations).stddev == 1).all()


def test_initial_networks():
    """Targets start as copies of the critics; V has the critics' depth, the policy its own."""
    networks, _ = iql_sera.make_networks(11, 3, iql_sera.Args(device="cpu", actor_layers=1, critic_layers=3))
    critics, target_critics = networks["critics"], networks["target_critics"]
    for critic, target in zip(critics.parameters(), target_critics.parameters()):
        assert torch.equal(critic, target) and critic is not target
        assert not torch.equal(critic[0], critic[1])
    shapes = [tuple(weight.shape) for weight in networks["value"].parameters() if weight.dim() == 2]
    assert shapes == [(256, 11), (256, 256), (256, 256), (1, 256)] and len(critics.weights) == 4
    assert len(list(networks["actor"].layers.parameters())) == 4


def test_act():
    """To evaluate, the mean, without a random number; to explore, a sample of the normal, cut to [-1, 1]."""
    networks, _, _ = make_networks()
    with torch.no_grad():
        networks["actor"].log_std.copy_(torch.tensor([-0.5, 1.0]))
        observations = torch.randn(64, 4)
        mean = networks["actor"].layers(observations).tanh()
        torch.manual_seed(3)
        random_state = torch.get_rng_state()
        assert torch.equal(iql_sera.act(networks, observations, deterministic=True), mean)
        assert torch.equal(torch.get_rng_state(), random_state)
        actions = iql_sera.act(networks, observations, deterministic=False)
        torch.manual_seed(3)
        samples = mean + torch.tensor([-0.5, 1.0]).exp() * torch.randn(64, 2)
    assert (samples.abs() > 1).any(0).all() and (samples.abs() < 1).any(0).all()
    torch.testing.assert_close(actions, samples.clamp(-1, 1))
    assert actions.abs().max() == 1


def test_state_value_and_bonus():
    """--sera-bonus v conditions on V(s), --sera-bonus q on the lower critic at the batch's actions."""
    networks, _, args = make_networks(sera_k=2)
    batch = make_batch(batch_size=12)
    batch["observations"] *= 0.1  # close states: how far two values are apart then matters
    states, critics = batch["observations"], networks["critics"]
    means = critics(states, batch["actions"]).mean(1)  # without them now one is the lower, now the other
    critics.biases[-1].data -= means[:, None, None]
    values = torch.stack([networks["value"](state)[0] for state in states]).detach()
    torch.testing.assert_close(iql_sera.state_value(networks, states), values)
    pairs = list(zip(states, batch["actions"]))
    both = [[q_value(critics, j, *pair).item() for j in (0, 1)] for pair in pairs]
    assert len({a < b for a, b in both}) == 2
    expected = {"v": values, "q": torch.tensor(both).amin(1)}
    expected = {name: iql_sera.q_conditioned_entropy(states, x, 2).tanh() for name, x in expected.items()}
    assert (expected["v"] - expected["q"]).abs().max() > 0.01
    for name, bonus in expected.items():
        args.sera_bonus = name
        torch.testing.assert_close(iql_sera.sera_bonus(networks, batch, torch.arange(4), args)[0], bonus)


# ------------------------------ the update
def test_expectile_loss_by_hand():
    """At tau 0.7 an error of 2 costs 2.8, one of -2 costs 1.2; the best V between 0 and 1 is then 0.7."""
    for errors, expected in (([2.0], 2.8), ([-2.0], 1.2), ([2.0, -2.0], 2.0), ([2.0, 0, 0, 0], 0.7)):
        assert iql_sera.expectile_loss(torch.tensor(errors), 0.7).item() == pytest.approx(expected)
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
    """At beta 3 A = 1 weighs 20.0855, A = 1.5 weighs 90.0171, and from log(100) / 3 on it is 100."""
    networks, optimizer, args = make_networks(critic_layers=0, learning_rate=0.0)
    make_constant(networks["value"], 0.0)
    make_constant(networks["target_critics"], 0.0, 0.5)
    networks["target_critics"].weights[0].data[:, 0] = 1.0  # the lower one is the state's first number
    batch = make_batch()
    batch["observations"][:, 0] = torch.tensor(advantages)
    logs = updated(networks, optimizer, batch, args)
    assert logs["losses/weight"] == pytest.approx(weight, rel=1e-5)
    assert logs["losses/clipped_share"] == pytest.approx(clipped_share)


def test_log_prob_is_a_density():
    """log pi is the log of the slopes of two normal distribution functions, summed."""
    networks, optimizer, args = make_networks()
    make_constant(networks["actor"].layers, math.atanh(0.3), math.atanh(-0.5))
    networks["actor"].log_std.data.copy_(torch.tensor([-1.0, 0.5]))
    batch, step = make_batch(), 1e-4
    actions = batch["actions"].double()
    mean, std = torch.tensor([0.3, -0.5]).double(), torch.tensor([-1, 0.5]).double().exp()
    ends = [torch.special.ndtr((actions + shift - mean) / std) for shift in (-step, step)]
    density = (ends[1] - ends[0]) / (2 * step)
    log_prob = updated(networks, optimizer, batch, args)["losses/log_prob"]
    assert log_prob == pytest.approx((density[:, 0] * density[:, 1]).log().mean().item(), rel=1e-5)


def test_order_and_target_by_hand():
    """V = 0 steps to 0.5 towards Q' = min(6, 1) first; then A = 0.5, and y is 1 + 0.5 m 0.5.

    Critics at 0 and 1 are y away from it, and their losses add up.
    """
    networks, optimizer, args = make_networks(critic_layers=0, learning_rate=0.5, gamma=0.5)
    for name, outputs in (("value", [0.0]), ("target_critics", [6.0, 1.0]), ("critics", [0.0, 1.0])):
        make_constant(networks[name], *outputs)
    batch = make_batch()
    batch["rewards"].fill_(1.0)
    for name in ("observations", "next_observations"):
        batch[name].zero_()  # so that V's bias alone gets a gradient
    logs = updated(networks, optimizer, batch, args)
    assert logs["losses/value"] == pytest.approx(0.7)
    assert logs["losses/v"] == pytest.approx(0.5, rel=1e-5)
    assert logs["losses/weight"] == pytest.approx(math.exp(3 * 0.5), rel=1e-5)
    assert logs["losses/td"] == pytest.approx((4 * (1.25**2 + 0.25**2) + 2 * 1) / 6, rel=1e-5)


def slow_update(networks, optimizers, batch, args):
    """One update by eqs. (1) to (4) in their order, in float64, one row and critic at a time.

    Changes the networks in place, each by its own optimiser and its own loss; returns what is logged.
    """
    rows = [{x: column[i].double() for x, column in batch.items()} for i in range(len(batch["rewards"]))]
    value, actor, critics = (networks[name] for name in ("value", "actor", "critics"))

    def take_step(name, terms):
        loss = sum(terms) / len(rows)
        optimizers[name].zero_grad()
        loss.backward(inputs=list(networks[name].parameters()))
        optimizers[name].step()
        return loss.item()

    value_loss, actor_loss, td = [], [], []
    for row in rows:
        pair = row["observations"], row["actions"]
        row["lower"] = min(q_value(networks["target_critics"], j, *pair).detach() for j in (0, 1))
        error = row["lower"] - value(row["observations"])[0]
        value_loss.append((args.expectile if error > 0 else 1 - args.expectile) * error**2)
    logs = {"value": take_step("value", value_loss)}
    for row in rows:
        state, action = row["observations"], row["actions"]
        advantage = row["lower"] - value(state)[0].detach()
        weight = min((args.beta * advantage).exp(), 100)
        errors = (action - actor.layers(state).tanh()) / actor.log_std.exp()
        log_densities = -(errors**2) / 2 - actor.log_std - math.log(2 * math.pi) / 2
        actor_loss.append(-weight * (log_densities[0] + log_densities[1]))
        y = row["rewards"]
        if not row["terminals"]:
            y = y + args.gamma * value(row["next_observations"])[0].detach()
        td += [(q_value(critics, j, state, action) - y) ** 2 for j in (0, 1)]
    logs |= {"actor": take_step("actor", actor_loss), "td": take_step("critics", td)}
    for target, critic in zip(networks["target_critics"].parameters(), critics.parameters()):
        target.data += args.tau * (critic.data - target.data)
    return logs


@pytest.mark.parametrize("changes", [{"beta": 30.0}, {"expectile": 0.9, "beta": 8.0, "gamma": 0.5}])
def test_update_by_loops(changes):
    """Losses, parameters and Adam's moments of every network equal those of a slow copy, at three updates.

    In the copy each network has an Adam of its own, which sees the gradient of its own loss alone.
    """
    networks, optimizer, args = make_networks(learning_rate=0.05, tau=0.25, **changes)
    slow = copy.deepcopy(networks).double()
    optimizers = {name: torch.optim.Adam(slow[name].parameters(), 0.05) for name in TRAINED}
    clipped = []
    for seed in (7, 8, 9):
        expected = slow_update(slow, optimizers, make_batch(seed), args)
        logs = updated(networks, optimizer, make_batch(seed), args)
        clipped.append(logs["losses/clipped_share"])
        for name, value in expected.items():
            assert logs[f"losses/{name}"] == pytest.approx(value, rel=1e-4), name
        for name, network in networks.items():
            for parameter, slow_parameter in zip(network.parameters(), slow[name].parameters()):
                torch.testing.assert_close(parameter.double(), slow_parameter, rtol=0, atol=1e-4)
        for name in TRAINED:
            for parameter, slow_parameter in zip(networks[name].parameters(), slow[name].parameters()):
                state, slow_state = optimizer.state[parameter], optimizers[name].state[slow_parameter]
                assert state["step"] == slow_state["step"]
                for moment in ("exp_avg", "exp_avg_sq"):
                    scale = slow_state[moment].abs().max().item()
                    assert scale > 0, name
                    torch.testing.assert_close(
                        state[moment].double(), slow_state[moment], rtol=1e-3, atol=1e-4 * scale
                    )
    assert 0 < np.mean(clipped) < 1


# ------------------------------ learning rates
LAST = (1 + math.cos(0.99 * math.pi)) / 2


@pytest.mark.parametrize(
    ("phase", "step", "share"),
    [("offline", 1, 1), ("offline", 51, 0.5), ("offline", 100, LAST), ("online", 1, 1), ("online", 101, 1)],
)
def test_learning_rates(phase, step, share):
    """Over 100 offline steps the policy's rate falls on a cosine, all else is constant.

    Adam's first step moves a parameter by the rate.
    """
    networks, optimizer, args = make_networks(offline_steps=100, learning_rate=0.1)
    networks, batch = networks.double(), {name: column.double() for name, column in make_batch().items()}
    before = copy.deepcopy(networks)
    updated(networks, optimizer, batch, args, step=step, phase=phase)
    for name, rate in (("actor", 0.1 * share), ("critics", 0.1), ("value", 0.1)):
        pairs = zip(networks[name].parameters(), before[name].parameters())
        moved = [(new - old).abs().max().item() for new, old in pairs]
        assert moved == pytest.approx([rate] * len(moved), rel=1e-4), name


# ------------------------------ presets
def test_presets():
    """Rewards are scaled for every robot but ant, k is 20 for walker2d, and the user has the last word."""
    expected = {"hopper-medium-v2": (True, 10), "halfcheetah-random-v0": (True, 10)}
    expected |= {"walker2d-medium-expert-v2": (True, 20), "ant-medium-v2": (False, 10)}
    expected |= {"hopper-medium-mini": (True, 10)}
    for env, settings in expected.items():
        args = iql_sera.parse_args(["--env", env])
        assert (args.normalize_rewards, args.sera_k) == settings, env
        assert (args.expectile, args.beta, args.learning_rate) == (0.7, 3, 3e-4), env
        assert (args.offline_steps < 250_000) == (env == "hopper-medium-mini")
    assert not iql_sera.parse_args(["--env", "hopper-medium-v2", "--no-normalize-rewards"]).normalize_rewards
    assert iql_sera.parse_args(["--env", "ant-medium-v2", "--normalize-rewards"]).normalize_rewards


# ------------------------------ scaled rewards, whole runs
# A terminal after a return of 10, a time-out after 18, the end after 3; the rows of 100 are left out.
REWARDS = [1.0, 2, 3, 4, 5, 6, 7, 100, 1, 0, 2, 100]
KEPT = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]


@pytest.fixture
def dataset(tmp_path):
    """A file with three trajectories of four Hopper rows: one ends, one is out of time, one is cut off."""
    rng, rows = np.random.default_rng(0), np.arange(12)
    with h5py.File(tmp_path / "made-up.hdf5", "w") as file:
        file["observations"], file["actions"] = rng.normal(size=(12, 11)), rng.uniform(-1, 1, size=(12, 3))
        file["rewards"], file["terminals"], file["timeouts"] = REWARDS, rows == 3, rows == 7
    return str(tmp_path / "made-up.hdf5")


def test_reward_scale_by_hand(dataset):
    """Returns 10, 18 and 3: all rewards, online ones too, go in times 1000 / 15; equal returns do nothing."""
    data = iql_sera.load_d4rl("hopper-medium-v2", dataset)
    online = {name: column[:1] for name, column in data.items()} | {"rewards": np.array([4.5])}
    for scaled, factor in ((True, 1000 / 15), (False, 1)):
        buffer = iql_sera.ReplayBuffer(data, iql_sera.Args(device="cpu", normalize_rewards=scaled))
        buffer.append(online)
        expected = factor * np.array([REWARDS[row] for row in KEPT] + [4.5])
        np.testing.assert_allclose(buffer.columns["rewards"][: buffer.size], expected, rtol=1e-6)
        assert buffer.reward_scale == pytest.approx(factor)
    data["rewards"] = np.array([2, 3, 3, 4, 5, 5, 2, 4, 4, 4], dtype=np.float32)  # 12 each
    buffer = iql_sera.ReplayBuffer(data, iql_sera.Args(device="cpu", normalize_rewards=True))
    assert buffer.reward_scale == 1


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
    """Runs the script on the made-up file; gives the run's folder, and rates and rewards of every update."""

    def run(*options):
        seen, original = SimpleNamespace(folder=tmp_path / "run", rates=[], rewards=[]), iql_sera.update

        def update(state, batch, args):
            logs = original(state, batch, args)
            seen.rates.append([group["lr"] for group in state.optimizer.param_groups])
            seen.rewards += batch["rewards"].tolist()
            return logs

        monkeypatch.setattr(
            iql_sera, "make_env", lambda *_, **__: gymnasium.wrappers.RecordEpisodeStatistics(FiveSteps())
        )
        monkeypatch.setattr(iql_sera, "update", update)
        settings = "--device cpu --batch-size 32 --eval-episodes 2 --sera-k 5 --hidden-dim 8 --sera-coef 0"
        iql_sera.main([*settings.split(), "--dataset-path", dataset, "--run-dir", str(seen.folder), *options])
        return seen

    return run


@pytest.mark.parametrize("offline_steps", [4, 0])
def test_learning_rates_of_a_run(offline_steps, train):
    """The policy's rate starts in full, falls offline, and is in full again at every online step."""
    rates = train("--offline-steps", str(offline_steps), "--online-steps", "12").rates
    cosine = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2][:offline_steps]
    expected = [[3e-4 * share, 3e-4, 3e-4] for share in cosine + [1] * 12]
    np.testing.assert_allclose(rates, expected, rtol=1e-9)


@pytest.mark.parametrize(("options", "scale"), [([], 1000 / 15), (["--no-normalize-rewards"], 1)])
def test_rewards_of_a_run(options, scale, train):
    """Batches and stored online rows hold scaled rewards, the checkpoint has the scale, scores are raw."""
    seen = train("--offline-steps", "4", "--online-steps", "40", *options)
    checkpoint = torch.load(seen.folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["normalizer"]["reward_scale"].item() == pytest.approx(scale, rel=1e-12)
    np.testing.assert_allclose(checkpoint["online_rows"]["rewards"], [2.5 * scale] * 40, rtol=1e-6)
    expected = sorted({REWARDS[row] for row in KEPT} | {2.5})
    np.testing.assert_allclose(sorted(set(seen.rewards)), [scale * reward for reward in expected], rtol=1e-6)
    with open(seen.folder / "evals.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    score = 100 * (12.5 + 20.272305) / (3234.3 + 20.272305)
    assert [float(row["return"]) for row in rows] == [12.5] * 6  # two episodes at 4, 0 and 40
    assert [float(row["normalized_score"]) for row in rows] == pytest.approx([score] * 6)
