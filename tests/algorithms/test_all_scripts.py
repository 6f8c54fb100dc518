"""What holds for all scripts: an update, acting, whole runs on replayed states, texts, presets."""

import copy
import csv
import re
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from recompute import linear_layers, make_agent, make_batch, make_kind

from envs import antmaze

CPU = torch.device("cpu")

# Options that lead an update along other lines, beside the defaults.
VARIANTS = {
    "awac_sera": [{"advantage_weights": "exp"}],
    "calql_sera": [{"cql_max_target_backup": True}, {"cql_lagrange": True}],
    "cql_sera": [{"cql_max_target_backup": True}, {"cql_lagrange": True}],
    "td3bc_sera": [{"bc_online": "anneal"}, {"bc_online": "drop"}],
}


# ------------------------------ one update
def updated(script, agent, optimizer, batch, args, policy_due=True):
    """The logs of one online update after a seed, as numbers, and gradients by parameter name.

    No parameter may take more than one gradient.
    """
    names = {parameter: name for name, parameter in agent.named_parameters()}
    gradients = {}

    def note(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    assert names[parameter] not in gradients
                    gradients[names[parameter]] = parameter.grad.clone()

    hook = optimizer.register_step_pre_hook(note)
    torch.manual_seed(7)
    kind = make_kind(script, online=True, policy_due=policy_due)
    logs = script.update(agent, optimizer, batch, args, kind)
    hook.remove()
    return {name: float(value) for name, value in logs.items()}, gradients


def make_rows():
    """Eight transitions as load_d4rl names them: row 1 ends in a terminal, row 4 in a timeout."""
    rng = np.random.default_rng(5)
    rows = np.arange(8)
    return {
        "observations": rng.normal(3, 2, size=(8, 4)).astype(np.float32),
        "next_observations": rng.normal(3, 2, size=(8, 4)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(8, 2)).astype(np.float32),
        "terminals": rows == 1,
        "episode_ends": np.isin(rows, [1, 4, 7]),
        "rewards": rng.normal(size=8).astype(np.float32),
    }


def test_terminals_mask_the_next_state(script):
    """A terminal's next state, the next episode's first, enters no gradient; any other does.

    CQL's conservative term, which asks for actions at every next state, has no weight here.
    """
    changes = {"cql_weight": 0.0} if hasattr(script.Args, "cql_weight") else {}
    results = []
    for rows in ([], [1, 4], [2]):
        agent, optimizer, args = make_agent(script, **changes)
        batch = make_batch()
        batch["next_observations"][rows] += 3.0
        results.append(updated(script, agent, optimizer, batch, args))
    (plain, gradients), (terminals, same), (other, different) = results
    assert terminals["losses/td"] == pytest.approx(plain["losses/td"], rel=1e-6)
    assert same.keys() == gradients.keys()
    assert any(name.startswith("critics") for name in same)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        if name.startswith("critics"):
            assert not torch.allclose(different[name], gradient, rtol=1e-3), name
    assert abs(other["losses/td"] - plain["losses/td"]) > 1e-3 * plain["losses/td"]


def test_timeouts_bootstrap(script):
    """The next state of a row that ends its trajectory without a terminal counts."""
    losses = []
    for row in ([], [1], [4]):
        agent, optimizer, args = make_agent(script, online_steps=0)
        data = make_rows()
        data["next_observations"][row] += 10
        buffer = script.ReplayBuffer(data, args, CPU)
        logs, _ = updated(script, agent, optimizer, buffer.as_columns(buffer.table), args)
        losses.append(logs["losses/td"])
    plain, terminal, timeout = losses
    assert terminal == pytest.approx(plain, rel=1e-6)
    assert abs(timeout - plain) > 1e-3 * plain


def test_rewards_enter_the_target_one_to_one(script):
    """With Q = 0 the TD loss is sum_j mean y^2, and tells every y: a bonus is added to it."""

    def td(bonus):
        agent, optimizer, args = make_agent(script)
        last = linear_layers(agent.critics)[-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.zero_()
        batch = make_batch()
        batch["rewards"] += bonus
        logs, _ = updated(script, agent, optimizer, batch, args)
        return logs["losses/td"]

    plain = td(torch.zeros(6))
    # 1 on top of one y makes 2/6 (2 y + 1) more of the loss.
    targets = np.array([(3 * (td(row) - plain) - 1) / 2 for row in torch.eye(6)])
    assert plain == pytest.approx(2 * np.mean(targets**2), rel=1e-4)
    batch = make_batch()
    alone = np.isclose(targets, batch["rewards"], rtol=1e-3, atol=1e-4)
    assert alone.tolist() == batch["terminals"].tolist()
    bonus = np.linspace(-2, 3, 6, dtype=np.float32)
    expected = 2 * np.mean((targets + bonus) ** 2)
    assert td(torch.from_numpy(bonus)) == pytest.approx(expected, rel=1e-4)


def test_rewards_enter_nothing_else(script):
    """At rates of 0, so that no network sees what others learn, only critics see rewards."""
    results = []
    for bonus in (0, torch.linspace(-2, 3, 6)):
        agent, optimizer, args = make_agent(script, actor_lr=0.0, critic_lr=0.0)
        batch = make_batch()
        batch["rewards"] += bonus
        _, gradients = updated(script, agent, optimizer, batch, args)
        results.append(gradients)
    plain, augmented = results
    changed = {name for name in plain if not torch.equal(augmented[name], plain[name])}
    assert changed == {name for name in plain if name.startswith("critics.")} < plain.keys()


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_actions_at_the_border(script, mean):
    """Data actions of +-1, stored as +-(1 - 1e-5), and a saturated policy: updates stay finite."""
    agent, optimizer, args = make_agent(script, online_steps=8)
    for name, network in agent.named_children():
        if name.endswith("actor"):
            linear = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
            linear[-1].bias.data[:2] = torch.tensor([mean, -mean])
    rows = make_rows()
    rows["actions"] = np.sign(rows["actions"])
    buffer = script.ReplayBuffer(rows, args, CPU)
    buffer.append(rows)
    stored = buffer.as_columns(buffer.table)
    expected = torch.from_numpy(rows["actions"]).repeat(2, 1) * np.float32(1 - 1e-5)
    assert torch.equal(stored["actions"], expected)
    if mean:
        assert agent.act(stored["observations"], deterministic=True).abs().min() == 1
    for policy_due in (False, True, False, True):
        batch = buffer.sample(script.BatchRows(6, 6))
        logs, gradients = updated(script, agent, optimizer, batch, args, policy_due)
        assert np.isfinite(list(logs.values())).all(), logs
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(parameter.isfinite().all() for parameter in agent.parameters())


def test_what_an_update_touches(script):
    """Every trained parameter gets a gradient and moves, the Lagrange multiplier if asked for.

    The batch, numpy's random numbers and requires_grad stay as they were; targets move without
    gradients.
    """
    for changes in ({}, *VARIANTS.get(script.__name__, [])):
        agent, optimizer, args = make_agent(script, **changes)
        before = copy.deepcopy(agent)
        batch = make_batch()
        columns = copy.deepcopy(batch)
        numpy_state = np.random.get_state()
        updated(script, agent, optimizer, batch, args, policy_due=False)
        _, gradients = updated(script, agent, optimizer, batch, args)
        idle = set() if changes.get("cql_lagrange") else {"log_multiplier"}
        names = {name for name, _ in agent.named_parameters()} - idle
        assert gradients.keys() == {name for name in names if not name.startswith("target_")}
        for name, parameter in agent.named_parameters():
            old = before.get_parameter(name)
            assert torch.equal(parameter, old) == (name in idle), name
            assert parameter.requires_grad == old.requires_grad, name
            assert parameter.grad is None or not name.startswith("target_"), name
        assert batch.keys() == columns.keys()
        assert all(torch.equal(batch[name], column) for name, column in columns.items())
        for now, then in zip(np.random.get_state(), numpy_state):
            assert np.array_equal(now, then)


def test_logging_changes_nothing(script):
    """With and without numbers to log, an update leaves the same bits and the same random state.

    Without, it returns none; with, at least the critics' loss.
    """
    for changes in ({}, *VARIANTS.get(script.__name__, [])):
        results = []
        for log in (True, False):
            agent, optimizer, args = make_agent(script, **changes)
            torch.manual_seed(7)
            for seed, policy_due in enumerate((True, False, True)):
                kind = make_kind(script, online=True, policy_due=policy_due, log=log)
                logs = script.update(agent, optimizer, make_batch(seed), args, kind)
                assert ("losses/td" in logs) == log
                assert logs == {} or log
            state = optimizer.state_dict()["state"]
            results.append((agent.state_dict(), state, torch.get_rng_state()))
        assert_equal(*results)


def test_targets_follow(script):
    """Targets go by tau towards what was just learned, also once other weights were loaded."""
    agent, optimizer, args = make_agent(script, tau=0.25)
    updated(script, agent, optimizer, make_batch(), args)  # of no use once others are loaded
    loaded = make_agent(script, seed=1)[0].state_dict()
    agent.load_state_dict(loaded)
    updated(script, agent, optimizer, make_batch(), args)
    learned = agent.state_dict()
    targets = [name for name in learned if name.startswith("target_")]
    assert len(targets) >= len(list(agent.critics.parameters()))
    for name in targets:
        source = name.removeprefix("target_")
        assert not torch.equal(learned[source], loaded[source]), name
        expected = 0.75 * loaded[name] + 0.25 * learned[source]
        torch.testing.assert_close(learned[name], expected, msg=name)


def test_one_optimizer(script):
    """It holds every trained parameter once, and no target's."""
    agent, optimizer, _ = make_agent(script)
    held = []
    for group in optimizer.param_groups:
        held += map(id, group["params"])
    named = agent.named_parameters()
    trained = [id(parameter) for name, parameter in named if not name.startswith("target_")]
    assert sorted(held) == sorted(trained)


def test_act(script):
    """Evaluating repeats itself and draws no random number; exploring does neither.

    Both stay in [-1, 1].
    """
    agent, _, _ = make_agent(script)
    observations = 10 * torch.randn(200, 4)
    random_state = torch.get_rng_state()
    actions, again = (agent.act(observations, deterministic=True) for _ in range(2))
    assert torch.equal(actions, again)
    assert torch.equal(torch.get_rng_state(), random_state)
    explored = [agent.act(observations, deterministic=False) for _ in range(2)]
    assert not torch.equal(*explored)
    assert not torch.equal(torch.get_rng_state(), random_state)
    for some in (actions, *explored):
        assert some.shape == (200, 2)
        assert 0.9 < some.abs().max() <= 1
        assert (some.std(0) > 0.1).all()


# ------------------------------ whole runs
OPTIONS = (
    "--env hopper-medium-v2 --device cpu --no-normalize-rewards --offline-steps 6 "
    "--online-steps 32 --batch-size 16 --eval-every 16 --eval-episodes 1 --sera-k 5 --hidden-dim 8"
)
SCALE = 1000 / 39  # of the file below


def write_dataset(path):
    """60 Hopper rows in D4RL's format: 20 up to a terminal, 20 up to a timeout, 20 up to the end.

    The loader drops the last row of the second and of the third: the returns are 20, 9.5 and -19.
    """
    rng = np.random.default_rng(6)
    observations = rng.normal(np.arange(11), 1 + np.arange(11), size=(60, 11))
    with h5py.File(path, "w") as file:
        file["observations"] = observations.astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, size=(60, 3)).astype(np.float32)
        file["rewards"] = np.repeat([1, 0.5, -1], 20).astype(np.float32)
        file["terminals"] = np.arange(60) == 19
        file["timeouts"] = np.arange(60) == 39
    return str(path)


class Replay(gymnasium.Env):
    """Every episode goes through the same states; a terminal after 7 steps, a timeout after 9.

    They take turns. Rewards are 10, 11, 12, ... over all episodes.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,))
    action_space = gymnasium.spaces.Box(-1, 1, (3,))

    def __init__(self, states):
        self.states = states
        self.seeds, self.actions, self.episodes = [], [], []

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self.episodes.append([])
        return self.states[0], {}

    def step(self, action):
        self.actions.append(action)
        reward = 9.0 + len(self.actions)
        self.episodes[-1].append(reward)
        time = len(self.episodes[-1])
        odd = len(self.episodes) % 2 == 1
        return self.states[time], reward, odd and time == 7, not odd and time == 9, {}


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """Runs the script on the dataset above, in an environment that replays the dataset's states.

    Gives the data, the run and the checkpoint at the end, the buffer's columns and the online ones
    of the checkpoint, the environments, what the policy saw of single states, whether it was
    online, the rewards and the agent of every update, and of every bonus, which is taken times a
    factor, the batch it was asked for, itself and the agent behind it.
    """
    path = write_dataset(tmp_path / "made-up.hdf5")
    data = script.load_d4rl("hopper-medium-v2", path)
    original_act, original_update = script.Agent.act, script.update
    original_bonus, original_train = script.intrinsic_reward, script.train

    def run(*options, factor=1):
        seen = SimpleNamespace(data=data, envs=[], acted=[], updates=[], bonuses=[])

        def make_env(*args, **kwargs):
            seen.envs.append(Replay(data["observations"].astype(np.float64)))
            return gymnasium.wrappers.RecordEpisodeStatistics(seen.envs[-1])

        def act(agent, observations, deterministic):
            if len(observations) == 1:  # not a batch of an update
                seen.acted.append((observations.clone(), deterministic, torch.is_grad_enabled()))
            return original_act(agent, observations, deterministic)

        def update(agent, optimizer, batch, args, kind):
            rewards = batch["rewards"].clone()
            logs = original_update(agent, optimizer, batch, args, kind)
            seen.updates.append((kind.online, rewards, copy.deepcopy(agent.state_dict())))
            return logs

        def intrinsic_reward(agent, batch, varying_dims, args, *options):
            bonus, logs = original_bonus(agent, batch, varying_dims, args, *options)
            agent_state = copy.deepcopy(agent.state_dict())
            seen.bonuses.append((copy.deepcopy(batch), bonus, agent_state))
            return factor * bonus, logs

        def train(run, args):
            seen.run = run
            original_train(run, args)

        monkeypatch.setattr(script.Agent, "act", act)
        monkeypatch.setattr(script, "make_env", make_env)
        monkeypatch.setattr(script, "update", update)
        monkeypatch.setattr(script, "intrinsic_reward", intrinsic_reward)
        monkeypatch.setattr(script, "train", train)
        seen.folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        arguments = ["--dataset-path", path, "--run-dir", str(seen.folder)]
        script.main([*OPTIONS.split(), *arguments, *options])
        seen.last = script.read_checkpoint(seen.folder / "checkpoint.pt")
        buffer = seen.run.buffer
        seen.columns = buffer.as_columns(buffer.table[: buffer.size])
        seen.online = buffer.as_columns(seen.last["online_rows"])
        with open(seen.folder / "evals.csv", newline="") as file:
            seen.evals = list(csv.DictReader(file))
        return seen

    return run


def assert_equal(left, right):
    """Two state dictionaries, or collections of them, hold the same numbers, bit for bit."""
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_one_normalization(train):
    """For the same state, the policy sees the very numbers of the dataset's rows, without autograd.

    It does so exploring as evaluating. Online rows hold the same numbers again, and their next
    states those to come.
    """
    run = train()
    mean = run.data["observations"].mean(0)
    std = run.data["observations"].std(0) + 1e-3
    stored = run.columns["observations"][: len(run.data["rewards"])]
    normalized = (run.data["observations"] - mean) / std
    np.testing.assert_allclose(stored, normalized, rtol=1e-4, atol=1e-5)
    times = np.concatenate([np.arange(length) for length in (7, 9, 7, 9)])
    explored = [states for states, deterministic, _ in run.acted if not deterministic]
    evaluated = [states for states, deterministic, _ in run.acted if deterministic]
    for states in (explored, evaluated):  # four episodes each
        assert torch.equal(torch.cat(states), stored[times])
    assert torch.equal(run.online["observations"], stored[times])
    assert torch.equal(run.online["next_observations"], stored[times + 1])
    assert not any(autograd for _, _, autograd in run.acted)
    for env in run.envs:
        assert np.abs(env.actions).max() <= 1


def test_rewards_are_scaled_alike(train):
    """All rewards times 1000 / 39 and --reward-scale, plus --reward-bias; returns stay raw.

    It is the same offline and online, and scores stay raw, too.
    """
    run = train("--normalize-rewards", "--reward-scale", "2", "--reward-bias", "-0.5")
    assert run.run.buffer.reward_scale == pytest.approx(2 * SCALE, rel=1e-6)
    raw = np.array([*run.data["rewards"], *np.arange(10, 42)])
    np.testing.assert_allclose(run.columns["rewards"], 2 * SCALE * raw - 0.5, rtol=1e-6)
    assert torch.equal(run.online["rewards"], run.columns["rewards"][-32:])
    returns = [sum(episode) for episode in run.envs[1].episodes]
    assert returns == [91, 189, 203, 333]  # 10 to 16, 17 to 25, 26 to 32, 33 to 41
    for row, expected in zip(run.evals, returns, strict=True):
        assert float(row["return"]) == expected
        score = 100 * (expected + 20.272305) / (3234.3 + 20.272305)
        assert float(row["normalized_score"]) == pytest.approx(score, rel=1e-9)


@pytest.mark.parametrize("script", ["calql_sera"], indirect=True)
def test_returns_to_go_are_of_scaled_rewards(train):
    """Cal-QL's R, of data and online episodes, sums the rewards that the critics are trained on."""
    run = train("--normalize-rewards")
    expected = []
    for episode in ([1] * 20, [0.5] * 19, [-1] * 19, *run.envs[0].episodes[:4]):
        for start in range(len(episode)):
            later = enumerate(episode[start:])
            expected.append(SCALE * sum(0.99**i * reward for i, reward in later))
    np.testing.assert_allclose(run.columns["mc_returns"], expected, rtol=1e-5)


def test_equal_returns_leave_rewards_alone(script):
    """The scale is 1000 / range of returns, or 1 if they are equal, whatever ends trajectories."""
    args = script.Args(normalize_rewards=True, online_steps=0)
    data = make_rows() | {"rewards": np.array([1, 2, 0, 3, 0, 1, 1, 1], dtype=np.float32)}
    buffer = script.ReplayBuffer(data, args, CPU)
    assert buffer.reward_scale == 1
    np.testing.assert_array_equal(buffer.as_columns(buffer.table)["rewards"], data["rewards"])
    data["rewards"][7] = -1  # returns 3, 3, 1
    assert script.ReplayBuffer(data, args, CPU).reward_scale == 500


def test_coefficient_zero(train):
    """--sera-coef 0 is a run with the bonus times 0, bit for bit; the bonus changes it online."""
    plain = train("--sera-coef", "0")
    times_zero = train(factor=0)
    bonus = train()
    assert [len(run.bonuses) for run in (plain, times_zero, bonus)] == [0, 32, 32]
    for name in ("agent", "rng_cpu"):
        assert_equal(times_zero.last[name], plain.last[name])
    assert times_zero.online.keys() - plain.online.keys() == {"bonus_q"}
    assert_equal({name: times_zero.online[name] for name in plain.online}, plain.online)
    assert_equal(times_zero.last["optimizer"]["state"], plain.last["optimizer"]["state"])
    assert times_zero.evals == plain.evals
    first = "critics.layers.0.weight"
    for (_, _, agent), (online, _, other) in zip(plain.updates, bonus.updates, strict=True):
        assert torch.equal(agent[first], other[first]) == (not online)


def test_bonus_is_in_the_batch_alone(train):
    """Online updates get r + bonus, offline ones r; what is stored or scored has no bonus in it."""
    run = train("--sera-coef", "3")
    assert [online for online, _, _ in run.updates] == [False] * 6 + [True] * 32
    for _, rewards, _ in run.updates[:6]:
        assert set(rewards.tolist()) <= {1, 0.5, -1}
    for (_, rewards, _), (batch, bonus, _) in zip(run.updates[6:], run.bonuses, strict=True):
        assert bonus.abs().max() > 1
        assert not bonus.requires_grad
        assert torch.equal(rewards, batch["rewards"] + bonus)
        assert set(batch["rewards"].tolist()) <= {1, 0.5, -1, *range(10, 42)}
    assert run.online["rewards"].tolist() == list(range(10, 42))
    assert [float(row["return"]) for row in run.evals] == [91, 189, 203, 333]


def test_frozen_bonus_agent(train):
    """--sera-critic offline: every bonus is of the agent at the start of the online phase.

    So are the values that are stored with the transitions.
    """
    run = train("--sera-critic", "offline")
    _, _, at_the_start = run.updates[5]
    _, _, at_the_end = run.updates[-1]
    assert len(run.bonuses) == 32
    bonus_agent = run.run.bonus_agent
    assert_equal(bonus_agent.state_dict(), at_the_start)
    for batch, _, agent in run.bonuses:
        assert_equal(agent, at_the_start)
        with torch.no_grad():
            q_values = bonus_agent.critics(batch["observations"], batch["actions"]).amin(0)
        torch.testing.assert_close(batch["bonus_q"], q_values)
    assert_equal(run.last["bonus_agent"], at_the_start)
    for name, value in at_the_end.items():
        idle = name in ("log_multiplier", "online_updates")  # not in use by default
        assert idle or not torch.equal(value, at_the_start[name]), name


def test_evaluation_starts(train):
    """Start states differ between evaluations, and are the same whatever the seed of the run."""
    options = ["--offline-steps", "16", "--eval-episodes", "2"]  # at 16 of both phases, too
    first = [env.seeds for env in train(*options, "--seed", "1").envs[1:]]
    second = [env.seeds for env in train(*options, "--seed", "2").envs[1:]]
    assert first == second
    assert [len(seeds) for seeds in first] == [4, 4]
    assert len({*first[0], *first[1]}) == 8
    assert None not in first[0]


def test_resume_restores_everything(script, train):
    """Agents, optimizer, rates, rows, scale, counters, evaluations, random numbers come back."""
    run = train("--normalize-rewards").run
    torch.manual_seed(99)
    run.lock.release()
    argv = ["--run-dir", str(run.run_dir), "--resume"]
    checkpoint, lock = script.find_checkpoint(argv)
    resumed = script.set_up(script.parse_args(argv, checkpoint), checkpoint, lock)
    assert torch.equal(torch.get_rng_state(), checkpoint["rng_cpu"])
    for name in ("agent", "bonus_agent", "optimizer"):
        assert_equal(getattr(resumed, name).state_dict(), getattr(run, name).state_dict())
    assert (resumed.scheduler is None) == (run.scheduler is None)
    if run.scheduler:
        assert resumed.scheduler.state_dict() == run.scheduler.state_dict()
    assert torch.equal(resumed.buffer.table, run.buffer.table)
    for name in ("size", "offline_size", "online_count", "reward_scale", "columns"):
        assert getattr(resumed.buffer, name) == getattr(run.buffer, name)
    assert np.array_equal(resumed.buffer.mean, run.buffer.mean)
    assert np.array_equal(resumed.buffer.std, run.buffer.std)
    assert (resumed.phase, resumed.step) == ("online", 32)
    for name in ("evals", "train_scores"):
        assert getattr(resumed, name) == getattr(run, name)
        assert len(getattr(run, name)) == 4
    generator, resumed_generator = (some.env.unwrapped.np_random for some in (run, resumed))
    assert resumed_generator.bit_generator.state == generator.bit_generator.state


# ------------------------------ text and tables
SERA_EQUATIONS = """
(S1) rho_i = k-th smallest over j != i of max( |s_i - s_j|, |q_i - q_j| )
(S2) n_i   = #{ j != i : |q_i - q_j| < rho_i }
(S3) H_i   = psi(n_i + 1) / d + log(2 rho_i)
"""


def test_header(script):
    """The docstring holds SERA's three equations and names the one the bonus enters: the target."""
    text = script.__doc__
    assert SERA_EQUATIONS in text
    number = re.search(r"puts r \+ lambda tanh\(H\) in place of r in (\(\d\)), ", text)[1]
    (equation,) = [line for line in text.splitlines() if line.startswith(f"{number} ")]
    assert re.match(r"\(\d\) target +y = r \+ gamma m ", equation)


def test_help(script, capsys):
    """--help lists every argument, with a text of some words."""
    with pytest.raises(SystemExit) as caught:
        script.main(["--help"])
    assert caught.value.code == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    text = "\n".join(line.strip("│| ") for line in lines)
    for name in script.Args.__dataclass_fields__:
        flag = f"--{name.replace('_', '-')}"
        assert re.search(rf"(?m)^{flag}( \S+|, --no-\S+)\s+\w\S*\s+\w", text), flag


def test_presets(script):
    """Each is of use to some dataset and changes known arguments; every dataset has its own."""
    defaults = script.Args()
    ids = {*script.BUNDLED, *antmaze.DATASETS}
    for robot in script.TASKS:
        ids |= {f"{robot}-{kind}-v2" for kind in script.KINDS}
    assert len(ids - antmaze.DATASETS.keys()) == 24 + len(script.BUNDLED)
    for task in ("pen", "door", "hammer", "relocate"):  # Adroit's module is an optional one
        ids |= {f"{task}-human-v1", f"{task}-binary-v0"}
    for start, preset in script.PRESETS.items():
        assert any(env.startswith(start) for env in ids), start
        for name, value in preset.items():
            assert type(value) is type(getattr(defaults, name)), (start, name)
            assert value != getattr(defaults, name), (start, name)
    for env in ids:
        expected = {"env": env, "device": "cpu"}
        for start in sorted(script.PRESETS, key=len):
            expected |= script.PRESETS[start] if env.startswith(start) else {}
        args = script.parse_args(["--env", env, "--device", "cpu"])
        assert args == script.Args(**expected), env


def test_presets_are_not_for_other_ids(script):
    """A module of one's own may be named like a family of datasets."""
    for env in ("antmaze_tools:Maze-v0", "walker2d_v9:Walker-v0", "hopper2:Hopper-v0"):
        assert script.parse_args(["--env", env]) == script.Args(env=env)


def test_presets_of_longer_starts_win(script, monkeypatch):
    """Where two presets of a dataset name the same argument, whatever their order in the table."""
    for starts in (("hopper", "hopper-medium-m"), ("hopper-medium-m", "hopper")):
        presets = {start: {"sera_k": len(start)} for start in starts}
        monkeypatch.setattr(script, "PRESETS", presets)
        assert script.parse_args(["--env", "hopper-medium-mini"]).sera_k == len("hopper-medium-m")
        assert script.parse_args(["--env", "hopper-expert-v2"]).sera_k == len("hopper")
