"""SAC against hand numbers and a slow recomputation; its online phase and its start from scratch."""

import copy
import inspect
import math
from functools import partial
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import recompute
import torch
from recompute import make_batch, policy_sample, q_value

import calql_sera
import sac_sera

make_args = partial(recompute.make_args, sac_sera)
make_networks = partial(recompute.make_networks, sac_sera)
updated = partial(recompute.updated, sac_sera)


# ------------------------------ networks
@pytest.mark.parametrize("name", ["squash", "act", "state_value"])
def test_same_as_in_calql(name):
    """What acts and values states is Cal-QL's, to the letter: its tests hold here too."""
    assert inspect.getsource(getattr(sac_sera, name)) == inspect.getsource(getattr(calql_sera, name))


def test_policy_standard_deviation():
    """log_std is cut at -5 and 2, and the mean is not; both come from the state."""
    actor = make_networks()[0]["actor"]
    mean, log_std = actor(torch.randn(3, 4))
    assert (mean[0] != mean[1]).all() and (log_std[0] != log_std[1]).all()
    with torch.no_grad():
        actor.layers[-1].weight.zero_()
        for bias, expected in (([9.0, -9, 0.5, -4.5], [0.5, -4.5]), ([0, 0, -100, 100], [-5, 2])):
            actor.layers[-1].bias.copy_(torch.tensor(bias))
            mean, log_std = actor(torch.randn(3, 4))
            assert mean.tolist() == [bias[:2]] * 3 and log_std.tolist() == [expected] * 3


def test_initial_networks():
    """Targets start as copies of the critics, alpha at 1, last layers as nn.Linear makes them."""
    torch.manual_seed(3)
    networks, _ = sac_sera.make_networks(11, 3, make_args(hidden_dim=256))
    critics, target_critics = networks["critics"], networks["target_critics"]
    for critic, target in zip(critics.parameters(), target_critics.parameters()):
        assert torch.equal(critic, target) and critic is not target
        assert not torch.equal(critic[0], critic[1])
    for weight in (critics.weights[-1], networks["actor"].layers[-1].weight):
        assert weight.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.1)
    assert networks["temperature"]["log_alpha"].item() == 0


# ------------------------------ the update
def slow_losses(networks, batch, args, seed):
    """Gradients by network, and what is logged, of eqs. (1) to (4) in float64, one row and critic at a time.

    The random numbers are drawn as `update` draws them after the same seed.
    """
    networks = copy.deepcopy(networks).double()
    batch = {name: column.double() for name, column in batch.items()}
    actor, critics, targets = networks["actor"], networks["critics"], networks["target_critics"]
    log_alpha = networks["temperature"]["log_alpha"]
    torch.manual_seed(seed)
    next_noise, noise = (torch.randn(batch["actions"].shape).double() for _ in range(2))
    td, actor_loss, alpha_loss, entropies = [], [], [], []
    for i, y in enumerate(batch["rewards"]):
        state, next_state, data_action = (
            batch[x][i] for x in ("observations", "next_observations", "actions")
        )
        if not batch["terminals"][i]:
            with torch.no_grad():
                action, log_density = policy_sample(actor, next_state, next_noise[i])
                lower = min(q_value(targets, j, next_state, action) for j in (0, 1))
                y = y + args.gamma * (lower - log_alpha.exp() * log_density)
        td += [(q_value(critics, j, state, data_action) - y) ** 2 for j in (0, 1)]
        action, log_density = policy_sample(actor, state, noise[i])
        lower = torch.minimum(*(q_value(critics, j, state, action) for j in (0, 1)))
        actor_loss.append(log_alpha.detach().exp() * log_density - lower)
        alpha_loss.append(-log_alpha * (log_density.detach() - len(action)))
        entropies.append(-log_density.item())
    losses = {"actor": actor_loss, "critics": td, "temperature": alpha_loss}
    losses = {name: sum(terms) / len(noise) for name, terms in losses.items()}
    gradients = {x: torch.autograd.grad(loss, list(networks[x].parameters())) for x, loss in losses.items()}
    logs = {"td": losses["critics"].item(), "actor": losses["actor"].item(), "entropy": np.mean(entropies)}
    return gradients, logs


@pytest.mark.parametrize("gamma", [0.99, 0.5])
def test_update_by_loops(gamma):
    """Losses and the gradient of every parameter, from its own loss alone, equal the slow recomputation.

    Also at a second update, so that nothing is left over from the first.
    """
    networks, optimizer, args = make_networks(gamma=gamma, learning_rate=0.01)
    for seed in (7, 8):
        gradients, expected = slow_losses(networks, make_batch(seed), args, seed=seed)
        logs = updated(networks, optimizer, make_batch(seed), args, seed=seed)
        for name, value in expected.items():
            assert logs[f"losses/{name}"] == pytest.approx(value, rel=1e-4), name
        for name, slow_gradients in gradients.items():
            for parameter, slow in zip(networks[name].parameters(), slow_gradients):
                assert slow.any(), name
                scale = slow.abs().max().item()
                torch.testing.assert_close(parameter.grad.double(), slow, rtol=1e-3, atol=1e-4 * scale)
        assert all(parameter.grad is None for parameter in networks["target_critics"].parameters())
        assert all(parameter.requires_grad for parameter in networks["critics"].parameters())


@pytest.mark.parametrize("log_std", [-5.0, -0.1])
def test_temperature(log_std):
    """alpha rises if the policy's entropy is below -|A|, and falls if it is above."""
    networks, optimizer, args = make_networks()
    with torch.no_grad():
        networks["actor"].layers[-1].weight.zero_()
        networks["actor"].layers[-1].bias.copy_(torch.tensor([0, 0, log_std, log_std]))
    before = networks["temperature"]["log_alpha"].item()
    entropy = updated(networks, optimizer, make_batch(), args)["losses/entropy"]
    assert (entropy < -2) == (log_std == -5)
    assert (networks["temperature"]["log_alpha"].item() > before) == (entropy < -2)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_target_by_hand(alpha):
    """Q = 0, targets 4 and 6, r = 1, gamma 0.5: y is 3 less alpha / 2 log pi(a'|s'), or 1 at a terminal."""
    networks, optimizer, args = make_networks(gamma=0.5)
    with torch.no_grad():
        for name in ("critics", "target_critics"):
            for parameter in networks[name].parameters():
                parameter.zero_()
        networks["target_critics"].biases[-1].copy_(torch.tensor([6.0, 4.0]).reshape(2, 1, 1))
        networks["temperature"]["log_alpha"].fill_(math.log(alpha) if alpha else -100)
        networks["actor"].layers[-1].weight.zero_()
        networks["actor"].layers[-1].bias.copy_(torch.tensor([0.0, 0, -5, -5]))
    batch = make_batch()
    batch["rewards"].fill_(1.0)
    torch.manual_seed(7)
    u = math.exp(-5) * torch.randn(6, 2).double()
    log_density = torch.distributions.Normal(0, math.exp(-5)).log_prob(u) - torch.log(1 - u.tanh() ** 2)
    targets = torch.where(batch["terminals"] > 0, 1, 3 - 0.5 * alpha * log_density.sum(1))
    td = updated(networks, optimizer, batch, args)["losses/td"]
    assert td == pytest.approx(2 * (targets**2).mean().item(), rel=1e-5)
    assert alpha or td == pytest.approx(2 * (4 * 9 + 2 * 1) / 6, rel=1e-5)


def test_terminals_mask_the_next_state():
    """A terminal's next state, which is the next episode's first, enters no loss; any other does."""
    logs = []
    for rows in ([], [1, 4], [2]):
        networks, optimizer, args = make_networks()
        batch = make_batch()
        batch["next_observations"][rows] += 3.0
        logs.append(updated(networks, optimizer, batch, args))
    plain, terminals, other = logs
    assert terminals == pytest.approx(plain, rel=1e-6)
    assert abs(other["losses/td"] - plain["losses/td"]) > 1e-3 * plain["losses/td"]


def test_target_critics_follow():
    """Target critics move by tau towards the critics just updated; every network takes the learning rate."""
    networks, optimizer, args = make_networks(tau=0.25, learning_rate=0.1)
    before, batch = copy.deepcopy(networks), make_batch()
    columns = {name: column.clone() for name, column in batch.items()}
    updated(networks, optimizer, batch, args)
    assert batch.keys() == columns.keys()
    assert all(torch.equal(batch[name], columns[name]) for name in columns)
    olds, news = before["target_critics"].parameters(), networks["target_critics"].parameters()
    for old, new, critic in zip(olds, news, networks["critics"].parameters()):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * critic)
    for name in ("actor", "critics", "temperature"):
        for old, new in zip(before[name].parameters(), networks[name].parameters()):
            assert (new - old).abs().max().item() == pytest.approx(0.1, rel=1e-3), name


def test_saturated_policy():
    """Actions that float32 rounds to +-1, from mean +-30, give finite losses, gradients and parameters."""
    networks, optimizer, args = make_networks()
    with torch.no_grad():
        networks["actor"].layers[-1].bias.copy_(torch.tensor([30.0, -30.0, 0.0, 0.0]))
    batch = make_batch()
    batch["actions"] = batch["actions"].sign()
    assert sac_sera.act(networks, batch["observations"], deterministic=False).abs().min() == 1
    logs = updated(networks, optimizer, batch, args)
    assert all(map(math.isfinite, logs.values())), logs
    assert all(parameter.isfinite().all() for parameter in networks.parameters())
    for name in ("actor", "critics", "temperature"):
        assert all(parameter.grad.isfinite().all() for parameter in networks[name].parameters())


# ------------------------------ whole runs
OPTIONS = (
    "--env hopper-medium-v2 --device cpu --offline-steps 0 --online-steps 60 --batch-size 32 --eval-every 30 "
    "--eval-episodes 1 --sera-k 5 --sera-scale dim --hidden-dim 16"
)
SCRATCH = ("--mixing-ratio", "0")
TRAINED = ("actor", "critics", "target_critics")


class Scripted(gymnasium.Env):
    """Episodes of 7 steps up to a terminal and of 9 up to a time-out, in turn; rewards 10, 11, 12, ..."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,))
    action_space = gymnasium.spaces.Box(-1, 1, (3,))

    def __init__(self):
        self.episode, self.actions, self.states, self.next_states = -1, [], [], []

    def reset(self, seed=None, options=None):
        self.episode, self.time = self.episode + 1, 0
        self.state = np.full(11, 100.0 * self.episode)
        return self.state, {}

    def step(self, action):
        self.time += 1
        self.actions.append(action)
        self.states.append(self.state)
        self.state = np.full(11, 100.0 * self.episode + self.time)
        self.next_states.append(self.state)
        ends = self.episode % 2 == 0 and self.time == 7, self.episode % 2 == 1 and self.time == 9
        return self.state, 9.0 + len(self.actions), *ends, {}


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs the script in the scripted environment, without network and with no data set in the cache.

    Gives the last checkpoint, the environment, the initial networks and, of every update, the numbers of
    rows asked for, the online rows there were, and the rewards of the batch.
    """
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(sac_sera, "SERVER", "http://127.0.0.1:1")
    make_networks, sample = sac_sera.make_networks, sac_sera.ReplayBuffer.sample

    def run(*options):
        number = len(list(tmp_path.iterdir()))
        seen, folder = SimpleNamespace(envs=[], samples=[], rewards=[]), tmp_path / f"run{number}"

        def scripted_env(*args, **kwargs):
            seen.envs.append(Scripted())
            return gymnasium.wrappers.RecordEpisodeStatistics(seen.envs[-1])

        def recorded_networks(*args):
            networks, optimizer = make_networks(*args)
            seen.initial = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
            return networks, optimizer

        def recorded_sample(buffer, *numbers):
            batch = sample(buffer, *numbers)
            seen.samples.append((numbers, buffer.size - buffer.offline_size))
            seen.rewards.append(batch["rewards"].tolist())
            return batch

        with monkeypatch.context() as patch:
            patch.setattr(sac_sera, "make_env", scripted_env)
            patch.setattr(sac_sera, "make_networks", recorded_networks)
            patch.setattr(sac_sera.ReplayBuffer, "sample", recorded_sample)
            sac_sera.main([*OPTIONS.split(), "--run-dir", str(folder), *options])
        seen.last = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert not (tmp_path / "nowhere").exists()
        return seen

    return run


@pytest.fixture
def dataset(tmp_path):
    """A file of 50 Hopper rows in D4RL's format, with rewards of 1, and the states' mean and deviation."""
    rng = np.random.default_rng(0)
    observations = rng.normal(3, 2, size=(50, 11)).astype(np.float32)
    with h5py.File(tmp_path / "made-up.hdf5", "w") as file:
        file["observations"] = observations
        file["actions"] = rng.uniform(-1, 1, size=(50, 3)).astype(np.float32)
        file["rewards"] = np.ones(50, dtype=np.float32)
        file["terminals"] = np.arange(50) == 20
        file["timeouts"] = np.arange(50) == 49
    kept = observations[:-1]
    return str(tmp_path / "made-up.hdf5"), kept.mean(0), kept.std(0) + 1e-3


def test_from_scratch(train):
    """No data file is needed; an update a step follows as soon as a batch of online rows is there."""
    run = train(*SCRATCH)
    assert run.samples == [((0, 32), step) for step in range(32, 61)]  # online rows count at once
    for name in TRAINED:
        for key, initial in run.initial[name].items():
            assert not torch.equal(run.last["networks"][name][key], initial), (name, key)


def test_rows_from_scratch(train):
    """Without data states stay as they are; every step is a row at once, and a time-out is no terminal."""
    run = train(*SCRATCH)
    env, rows = run.envs[0], run.last["online_rows"]
    one = torch.tensor(1.0)
    assert run.last["normalizer"] == {"mean": torch.tensor(0.0), "std": one, "reward_scale": one}
    names = {"observations", "actions", "rewards", "next_observations", "terminals"}
    assert rows.keys() == names
    np.testing.assert_array_equal(rows["observations"], np.array(env.states, dtype=np.float32))
    np.testing.assert_array_equal(rows["next_observations"], np.array(env.next_states, dtype=np.float32))
    np.testing.assert_array_equal(
        rows["actions"], np.clip(env.actions, -1 + 1e-5, 1 - 1e-5, dtype=np.float32)
    )
    np.testing.assert_array_equal(rows["rewards"], np.arange(10, 70))  # the unfinished episode's included
    assert np.flatnonzero(rows["terminals"]).tolist() == [6, 22, 38, 54]
    assert max(map(max, run.rewards)) == 69


def test_no_offline_steps_with_data(train, dataset, monkeypatch):
    """--offline-steps 0 with half of each batch from the data: states scaled by the data."""
    original = sac_sera.act
    monkeypatch.setattr(sac_sera, "act", lambda *args: 0 * original(*args) + 0.125)
    path, mean, std = dataset
    run = train("--dataset-path", path)
    assert np.all(np.array(run.envs[0].actions) == 0.125)
    online_rows = [0] * 15 + [16] * 45  # none before they can fill their half
    assert run.samples == [((32 - n, n), step) for step, n in enumerate(online_rows, start=1)]
    for n, rewards in zip(online_rows, run.rewards):
        assert rewards[: 32 - n] == [1] * (32 - n) and all(reward >= 10 for reward in rewards[32 - n :])
    np.testing.assert_allclose(run.last["normalizer"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(run.last["normalizer"]["std"], std, rtol=1e-5)
    states = (np.array(run.envs[0].states) - mean) / std
    np.testing.assert_allclose(run.last["online_rows"]["observations"], states, rtol=1e-4, atol=1e-4)


def test_online_rows_count_at_once_after_an_offline_phase(train, dataset):
    """The offline phase samples the data alone; online every step adds a row."""
    run = train("--dataset-path", dataset[0], "--offline-steps", "5", "--online-steps", "20")
    online = [((32, 0), step) if step < 16 else ((16, 16), step) for step in range(1, 21)]
    assert run.samples == [((32, 0), 0)] * 5 + online


def test_coefficient_zero(train, dataset, monkeypatch):
    """--sera-coef 0 never asks for a bonus; with a bonus times 0, too, every bit is the plain algorithm's."""
    original, asked = sac_sera.sera_bonus, []

    def sera_bonus(networks, batch, live, args):
        bonus, logs = original(networks, batch, live, args)
        asked.append(bonus)
        return bonus * (args.sera_coef == 2), logs

    monkeypatch.setattr(sac_sera, "sera_bonus", sera_bonus)
    runs = []
    for coefficient, expected in (("0", 0), ("1", 20), ("2", 20)):
        options = ["--offline-steps", "5", "--online-steps", "20", "--sera-coef", coefficient]
        runs.append(train("--dataset-path", dataset[0], *options).last)
        assert len(asked) == expected
        asked.clear()
    plain, times_zero, bonus = runs
    for name, network in plain["networks"].items():
        assert all(torch.equal(times_zero["networks"][name][key], network[key]) for key in network), name
        assert any(not torch.equal(bonus["networks"][name][key], network[key]) for key in network), name
    for name, column in plain["online_rows"].items():
        assert torch.equal(times_zero["online_rows"][name], column), name
    assert torch.equal(bonus["online_rows"]["rewards"], plain["online_rows"]["rewards"])
    assert torch.equal(times_zero["rng"]["cpu"], plain["rng"]["cpu"])
