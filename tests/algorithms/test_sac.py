"""SAC against hand numbers and a slow recomputation; its online phase, its start from scratch."""

import copy
import inspect
import math
import operator
from functools import partial
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import recompute
import torch
from recompute import linear_layers, make_batch, policy_sample, q_value

import calql_sera
import sac_sera

make_args = partial(recompute.make_args, sac_sera)
make_agent = partial(recompute.make_agent, sac_sera)
updated = partial(recompute.updated, sac_sera)


def trained_parameters(agent):
    """What each loss trains, by the name of its network."""
    return {
        "actor": list(agent.actor.parameters()),
        "critics": list(agent.critics.parameters()),
        "temperature": [agent.log_alpha],
    }


# ------------------------------ agent
@pytest.mark.parametrize("name", ["sample_tanh_gaussian", "Agent.act", "Agent.value"])
def test_same_as_in_calql(name):
    """What acts and values states is Cal-QL's, to the letter: its tests hold here too."""
    own, calql = (operator.attrgetter(name)(module) for module in (sac_sera, calql_sera))
    assert inspect.getsource(own) == inspect.getsource(calql)


def test_policy_standard_deviation():
    """log_std is cut at -5 and 2, and the mean is not; both come from the state."""
    actor = make_agent()[0].actor
    mean, log_std = actor(torch.randn(3, 4))
    assert (mean[0] != mean[1]).all()
    assert (log_std[0] != log_std[1]).all()
    with torch.no_grad():
        actor.layers[-1].weight.zero_()
        for bias, expected in (([9.0, -9, 0.5, -4.5], [0.5, -4.5]), ([0, 0, -100, 100], [-5, 2])):
            actor.layers[-1].bias.copy_(torch.tensor(bias))
            mean, log_std = actor(torch.randn(3, 4))
            assert mean.tolist() == [bias[:2]] * 3
            assert log_std.tolist() == [expected] * 3


def test_initial_networks():
    """Targets start as copies of the critics, alpha at 1, last layers as nn.Linear makes them."""
    torch.manual_seed(3)
    agent = sac_sera.Agent(11, 3, make_args(hidden_dim=256))
    for critic, target in zip(agent.critics.parameters(), agent.target_critics.parameters()):
        assert torch.equal(critic, target)
        assert critic is not target
        assert not torch.equal(critic[0], critic[1])
    for layer in (linear_layers(agent.critics)[-1], agent.actor.layers[-1]):
        assert layer.weight.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.1)
    assert agent.log_alpha.item() == 0


# ------------------------------ the update
def slow_losses(agent, batch, args, seed):
    """Gradients by network, and what is logged, of eqs. (1) to (4), in float64.

    One row and one critic at a time; random numbers as `update` draws them after the same seed.
    """
    agent = copy.deepcopy(agent).double()
    batch = {name: column.double() for name, column in batch.items()}
    critics, targets, log_alpha = agent.critics, agent.target_critics, agent.log_alpha
    torch.manual_seed(seed)
    next_noise = torch.randn(batch["actions"].shape).double()
    noise = torch.randn(batch["actions"].shape).double()
    td_losses, actor_losses, alpha_losses, entropies = [], [], [], []
    for i, y in enumerate(batch["rewards"]):
        state, next_state = batch["observations"][i], batch["next_observations"][i]
        if not batch["terminals"][i]:
            with torch.no_grad():
                action, log_density = policy_sample(agent.actor, next_state, next_noise[i])
                lower = min(q_value(targets, j, next_state, action) for j in (0, 1))
                y = y + args.gamma * (lower - log_alpha.exp() * log_density)
        td_losses += [(q_value(critics, j, state, batch["actions"][i]) - y) ** 2 for j in (0, 1)]
        action, log_density = policy_sample(agent.actor, state, noise[i])
        lower = torch.minimum(*(q_value(critics, j, state, action) for j in (0, 1)))
        actor_losses.append(log_alpha.detach().exp() * log_density - lower)
        alpha_losses.append(-log_alpha * (log_density.detach() - len(action)))
        entropies.append(-log_density.item())
    terms = {"actor": actor_losses, "critics": td_losses, "temperature": alpha_losses}
    losses, gradients = {}, {}
    for name, parameters in trained_parameters(agent).items():
        losses[name] = sum(terms[name]) / len(noise)
        gradients[name] = torch.autograd.grad(losses[name], parameters)
    logs = {"td": losses["critics"].item(), "actor": losses["actor"].item()}
    return gradients, logs | {"entropy": np.mean(entropies)}


@pytest.mark.parametrize("gamma", [0.99, 0.5])
def test_update_by_loops(gamma):
    """Losses and the gradient of every parameter, from its own loss alone, equal the slow ones.

    Also at a second update, so that nothing is left over from the first.
    """
    agent, optimizer, args = make_agent(gamma=gamma, actor_lr=0.01, critic_lr=0.01)
    for seed in (7, 8):
        gradients, expected = slow_losses(agent, make_batch(seed), args, seed=seed)
        logs = updated(agent, optimizer, make_batch(seed), args, seed=seed)
        for name, value in expected.items():
            assert logs[f"losses/{name}"] == pytest.approx(value, rel=1e-4), name
        for name, parameters in trained_parameters(agent).items():
            for parameter, slow in zip(parameters, gradients[name]):
                assert slow.any(), name
                tolerance = {"rtol": 1e-3, "atol": 1e-4 * slow.abs().max().item()}
                torch.testing.assert_close(parameter.grad.double(), slow, **tolerance)
        assert all(parameter.grad is None for parameter in agent.target_critics.parameters())
        assert all(parameter.requires_grad for parameter in agent.critics.parameters())


@pytest.mark.parametrize("log_std", [-5.0, -0.1])
def test_temperature(log_std):
    """alpha rises if the policy's entropy is below -|A|, and falls if it is above."""
    agent, optimizer, args = make_agent()
    with torch.no_grad():
        agent.actor.layers[-1].weight.zero_()
        agent.actor.layers[-1].bias.copy_(torch.tensor([0, 0, log_std, log_std]))
    before = agent.log_alpha.item()
    entropy = updated(agent, optimizer, make_batch(), args)["losses/entropy"]
    assert (entropy < -2) == (log_std == -5)
    assert (agent.log_alpha.item() > before) == (entropy < -2)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_target_by_hand(alpha):
    """y of Q = 0, targets 4 and 6, r = 1, gamma 0.5: 3 less alpha / 2 log pi(a'|s'), or 1."""
    agent, optimizer, args = make_agent(gamma=0.5)
    with torch.no_grad():
        for parameter in [*agent.critics.parameters(), *agent.target_critics.parameters()]:
            parameter.zero_()
        biases = linear_layers(agent.target_critics)[-1].bias
        biases.copy_(torch.tensor([6.0, 4.0]).reshape(2, 1, 1))
        agent.log_alpha.fill_(math.log(alpha) if alpha else -100)
        agent.actor.layers[-1].weight.zero_()
        agent.actor.layers[-1].bias.copy_(torch.tensor([0.0, 0, -5, -5]))
    batch = make_batch()
    batch["rewards"].fill_(1.0)
    torch.manual_seed(7)
    u = math.exp(-5) * torch.randn(6, 2).double()
    log_density = torch.distributions.Normal(0, math.exp(-5)).log_prob(u)
    log_density = (log_density - torch.log(1 - u.tanh() ** 2)).sum(1)
    targets = torch.where(batch["terminals"] > 0, 1, 3 - 0.5 * alpha * log_density)
    td = updated(agent, optimizer, batch, args)["losses/td"]
    assert td == pytest.approx(2 * (targets**2).mean().item(), rel=1e-5)
    assert alpha or td == pytest.approx(2 * (4 * 9 + 2 * 1) / 6, rel=1e-5)


def test_terminals_mask_the_next_state():
    """A terminal's next state, the next episode's first, enters no loss; any other does."""
    logs = []
    for rows in ([], [1, 4], [2]):
        agent, optimizer, args = make_agent()
        batch = make_batch()
        batch["next_observations"][rows] += 3.0
        logs.append(updated(agent, optimizer, batch, args))
    plain, terminals, other = logs
    assert terminals == pytest.approx(plain, rel=1e-6)
    assert abs(other["losses/td"] - plain["losses/td"]) > 1e-3 * plain["losses/td"]


def test_target_critics_follow():
    """Target critics move by tau towards the critics just updated; the batch stays as it was."""
    agent, optimizer, args = make_agent(tau=0.25, critic_lr=0.1)
    before = copy.deepcopy(agent)
    batch = make_batch()
    columns = copy.deepcopy(batch)
    updated(agent, optimizer, batch, args)
    assert batch.keys() == columns.keys()
    assert all(torch.equal(batch[name], columns[name]) for name in columns)
    olds, news = before.target_critics.parameters(), agent.target_critics.parameters()
    for old, new, critic in zip(olds, news, agent.critics.parameters()):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * critic)


def test_learning_rates():
    """Adam's first step is the rate: --actor-lr for policy and temperature, or --critic-lr."""
    agent, optimizer, args = make_agent(actor_lr=0.1, critic_lr=0.03)
    before = trained_parameters(copy.deepcopy(agent))
    updated(agent, optimizer, make_batch(), args)
    for name, parameters in trained_parameters(agent).items():
        rate = 0.03 if name == "critics" else 0.1
        for old, new in zip(before[name], parameters):
            assert (new - old).abs().max().item() == pytest.approx(rate, rel=1e-3), name


def test_saturated_policy():
    """Actions that float32 rounds to +-1, from mean +-30, give finite losses and gradients."""
    agent, optimizer, args = make_agent()
    with torch.no_grad():
        agent.actor.layers[-1].bias.copy_(torch.tensor([30.0, -30.0, 0.0, 0.0]))
    batch = make_batch()
    batch["actions"] = batch["actions"].sign()
    assert agent.act(batch["observations"], deterministic=False).abs().min() == 1
    logs = updated(agent, optimizer, batch, args)
    assert all(map(math.isfinite, logs.values())), logs
    assert all(parameter.isfinite().all() for parameter in agent.parameters())
    for parameters in trained_parameters(agent).values():
        assert all(parameter.grad.isfinite().all() for parameter in parameters)


# ------------------------------ whole runs
OPTIONS = (
    "--env hopper-medium-v2 --device cpu --offline-steps 0 --online-steps 60 --batch-size 32 "
    "--eval-every 30 --eval-episodes 1 --sera-k 5 --sera-scale dim --hidden-dim 16"
)
SCRATCH = ("--mixing-ratio", "0")


class Scripted(gymnasium.Env):
    """Episodes of 7 steps up to a terminal, of 9 up to a timeout, in turn; rewards 10, 11, ..."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,))
    action_space = gymnasium.spaces.Box(-1, 1, (3,))

    def __init__(self):
        self.episode = -1
        self.actions, self.states, self.next_states = [], [], []

    def reset(self, seed=None, options=None):
        self.episode += 1
        self.time = 0
        self.state = np.full(11, 100.0 * self.episode)
        return self.state, {}

    def step(self, action):
        self.time += 1
        self.actions.append(action)
        self.states.append(self.state)
        self.state = np.full(11, 100.0 * self.episode + self.time)
        self.next_states.append(self.state)
        terminated = self.episode % 2 == 0 and self.time == 7
        truncated = self.episode % 2 == 1 and self.time == 9
        return self.state, 9.0 + len(self.actions), terminated, truncated, {}


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs the script in the scripted environment, without network and with no file in the cache.

    Gives the run and its last checkpoint, online rows by name, environments, the initial agent,
    and, of every update, the numbers of rows asked for, the online rows there were, the rewards.
    """
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(sac_sera, "SERVER", "127.0.0.1:1")
    original_train, sample = sac_sera.train, sac_sera.ReplayBuffer.sample

    def run(*options):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        seen = SimpleNamespace(envs=[], samples=[], rewards=[])

        def scripted_env(*args, **kwargs):
            seen.envs.append(Scripted())
            return gymnasium.wrappers.RecordEpisodeStatistics(seen.envs[-1])

        def recorded_train(run, args):
            seen.run = run
            seen.initial = copy.deepcopy(run.agent.state_dict())
            original_train(run, args)

        def recorded_sample(buffer, rows):
            batch = sample(buffer, rows)
            seen.samples.append(((rows.dataset, rows.online), buffer.online_size))
            assert rows.both == 0
            seen.rewards.append(batch["rewards"].tolist())
            return batch

        with monkeypatch.context() as patch:
            patch.setattr(sac_sera, "make_env", scripted_env)
            patch.setattr(sac_sera, "train", recorded_train)
            patch.setattr(sac_sera.ReplayBuffer, "sample", recorded_sample)
            sac_sera.main([*OPTIONS.split(), "--run-dir", str(folder), *options])
        seen.last = sac_sera.read_checkpoint(folder / "checkpoint.pt")
        seen.rows = seen.run.buffer.as_columns(seen.last["online_rows"])
        assert not (tmp_path / "nowhere").exists()
        return seen

    return run


@pytest.fixture
def constant_actions(monkeypatch):
    """Lets every policy of the script act with 0.125, so that its actions can be told."""
    original = sac_sera.act
    monkeypatch.setattr(
        sac_sera, "act", lambda *args, **kwargs: 0 * original(*args, **kwargs) + 0.125
    )


@pytest.fixture
def dataset(tmp_path):
    """A file of 50 Hopper rows with rewards of 1, and the states' mean and deviation."""
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


@pytest.mark.parametrize(("learning_starts", "first"), [("0", 33), ("40", 41)])
def test_from_scratch(learning_starts, first, train):
    """No data file is needed; updates begin with a batch of rows, after --learning-starts steps.

    The update of a step comes before its transition, which the next step's may sample.
    """
    run = train(*SCRATCH, "--learning-starts", learning_starts)
    assert run.samples == [((0, 32), step - 1) for step in range(first, 61)]
    newest = [9 + rows for _, rows in run.samples]
    assert all(max(rewards) <= reward for rewards, reward in zip(run.rewards, newest))
    assert any(max(rewards) == reward for rewards, reward in zip(run.rewards, newest))
    for name, initial in run.initial.items():
        assert not torch.equal(run.last["agent"][name], initial), name


def test_random_first_steps(train, constant_actions):
    """From scratch the first --learning-starts actions are uniform in [-1, 1], no later ones."""
    run = train(*SCRATCH, "--learning-starts", "40")
    actions = np.array(run.envs[0].actions)
    assert (actions[40:] == 0.125).all()
    assert len(np.unique(actions[:40])) == 120
    assert np.abs(actions[:40]).max() <= 1
    # Of 120 uniform numbers none is in some tenth of the range with a chance of 10 * 0.9**120.
    assert (np.histogram(actions[:40], bins=10, range=(-1, 1))[0] > 0).all()


def test_rows_from_scratch(train):
    """Without data states stay as they are; every step is a row, and a timeout is no terminal."""
    run = train(*SCRATCH, "--learning-starts", "32")
    env, rows = run.envs[0], run.rows
    assert run.last["normalizer"] == {"mean": torch.tensor(0.0), "std": torch.tensor(1.0)}
    assert run.run.buffer.reward_scale == 1
    names = {"observations", "actions", "rewards", "next_observations", "terminals"}
    assert rows.keys() == names | {"bonus_q", "online"}
    assert (rows["online"] == 1).all()
    next_states = np.array(env.next_states, dtype=np.float32)
    np.testing.assert_array_equal(rows["observations"], np.array(env.states, dtype=np.float32))
    np.testing.assert_array_equal(rows["next_observations"], next_states)
    actions = np.clip(env.actions, -1 + 1e-5, 1 - 1e-5, dtype=np.float32)
    np.testing.assert_array_equal(rows["actions"], actions)
    np.testing.assert_array_equal(rows["rewards"], np.arange(10, 70))  # the last episode's too
    assert np.flatnonzero(rows["terminals"]).tolist() == [6, 22, 38, 54]


def test_no_offline_steps_with_data(train, dataset, constant_actions):
    """--offline-steps 0 with half of each batch from the data: no random steps, scaled states."""
    path, mean, std = dataset
    run = train("--dataset-path", path)
    assert (np.array(run.envs[0].actions) == 0.125).all()
    online_rows = [0] * 16 + [16] * 44  # none before they can fill their half
    assert run.samples == [((32 - n, n), row) for row, n in enumerate(online_rows)]
    for n, rewards in zip(online_rows, run.rewards):
        assert rewards[: 32 - n] == [1] * (32 - n)
        assert all(reward >= 10 for reward in rewards[32 - n :])
    np.testing.assert_allclose(run.last["normalizer"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(run.last["normalizer"]["std"], std, rtol=1e-5)
    states = (np.array(run.envs[0].states) - mean) / std
    np.testing.assert_allclose(run.rows["observations"], states, rtol=1e-4, atol=1e-4)


def test_online_rows_count_at_once_after_an_offline_phase(train, dataset):
    """The offline phase samples the data alone; online every step adds a row."""
    run = train("--dataset-path", dataset[0], "--offline-steps", "5", "--online-steps", "20")
    online = [((32, 0), row) if row < 16 else ((16, 16), row) for row in range(20)]
    assert run.samples == [((32, 0), 0)] * 5 + online


def test_coefficient_zero(train, dataset, monkeypatch):
    """--sera-coef 0 asks for no bonus; a bonus times 0, too, leaves every bit of the plain run."""
    original = sac_sera.intrinsic_reward
    asked = []

    def intrinsic_reward(agent, batch, varying_dims, args, *options):
        bonus, logs = original(agent, batch, varying_dims, args, *options)
        asked.append(bonus)
        return bonus * (args.sera_coef == 2), logs

    monkeypatch.setattr(sac_sera, "intrinsic_reward", intrinsic_reward)
    runs = []
    for coefficient, expected in (("0", 0), ("1", 20), ("2", 20)):
        options = ["--offline-steps", "5", "--online-steps", "20", "--sera-coef", coefficient]
        runs.append(train("--dataset-path", dataset[0], *options))
        assert len(asked) == expected
        asked.clear()
    plain, times_zero, bonus = runs
    for name, value in plain.last["agent"].items():
        assert torch.equal(times_zero.last["agent"][name], value), name
        assert not torch.equal(bonus.last["agent"][name], value), name
    assert times_zero.rows.keys() - plain.rows.keys() == {"bonus_q"}
    for name, column in plain.rows.items():
        assert torch.equal(times_zero.rows[name], column), name
    assert torch.equal(bonus.rows["rewards"], plain.rows["rewards"])
    assert torch.equal(times_zero.last["rng_cpu"], plain.last["rng_cpu"])
