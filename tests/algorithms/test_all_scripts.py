"""What holds for all scripts: an update, acting, whole runs on replayed states, texts, presets, bug lists."""

import copy
import csv
import re
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import plant_bugs
import pytest
import torch
from conftest import ROOT
from recompute import make_batch, make_networks

# Options that lead an update along other lines, beside the defaults.
VARIANTS = {
    "awac_sera": [{"weights": "exp"}],
    "calql_sera": [{"max_backup": True}, {"cql_lagrange": True}],
    "cql_sera": [{"max_backup": True}, {"cql_lagrange": True}],
    "td3bc_sera": [{"bc_online": "anneal"}, {"bc_online": "drop"}],
}


# ------------------------------ one update
def updated(script, networks, optimizer, batch, args, step=2):
    """The logs of one online update after a seed, as numbers, and the gradients it took, by parameter name.

    The step is such that everything is due. No parameter may take more than one gradient.
    """
    names, gradients = {parameter: name for name, parameter in networks.named_parameters()}, {}

    def note(optimizer, *_):
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                assert names[parameter] not in gradients
                gradients[names[parameter]] = parameter.grad.clone()

    hook = optimizer.register_step_pre_hook(note)
    torch.manual_seed(7)
    state = SimpleNamespace(networks=networks, optimizer=optimizer, phase="online", step=step)
    logs = {name: float(value) for name, value in script.update(state, batch, args).items()}
    hook.remove()
    return logs, gradients


def make_rows():
    """Eight transitions as load_d4rl names them: row 1 ends in a terminal, row 4 in a time-out."""
    rng, rows = np.random.default_rng(5), np.arange(8)
    names = ("observations", "next_observations")
    states = {name: rng.normal(3, 2, size=(8, 4)).astype(np.float32) for name in names}
    actions = rng.uniform(-1, 1, size=(8, 2)).astype(np.float32)
    ends = {"terminals": rows == 1, "dones": np.isin(rows, [1, 4, 7])}
    return states | ends | {"actions": actions, "rewards": rng.normal(size=8).astype(np.float32)}


def test_terminals_mask_the_next_state(script):
    """A terminal's next state, which is the next episode's first, enters no gradient; any other does.

    CQL's conservative term, which asks for actions at every next state, is given no weight here.
    """
    changes = {"cql_weight": 0.0} if hasattr(script.Args, "cql_weight") else {}
    results = []
    for rows in ([], [1, 4], [2]):
        networks, optimizer, args = make_networks(script, **changes)
        batch = make_batch()
        batch["next_observations"][rows] += 3.0
        results.append(updated(script, networks, optimizer, batch, args))
    (plain, gradients), (terminals, same), (other, different) = results
    assert terminals["losses/td"] == pytest.approx(plain["losses/td"], rel=1e-6)
    assert same.keys() == gradients.keys() and any(name.startswith("critics") for name in same)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        if name.startswith("critics"):
            assert not torch.allclose(different[name], gradient, rtol=1e-3), name
    assert abs(other["losses/td"] - plain["losses/td"]) > 1e-3 * plain["losses/td"]


def test_time_outs_bootstrap(script):
    """A row that ends its trajectory without a terminal goes through the buffer as any other: s' counts."""
    losses = []
    for row in ([], [1], [4]):
        networks, optimizer, args = make_networks(script, online_steps=0)
        data = make_rows()
        data["next_observations"][row] += 3
        batch = {name: column.clone() for name, column in script.ReplayBuffer(data, args).columns.items()}
        losses.append(updated(script, networks, optimizer, batch, args)[0]["losses/td"])
    plain, terminal, timeout = losses
    assert terminal == pytest.approx(plain, rel=1e-6)
    assert abs(timeout - plain) > 1e-3 * plain


def test_rewards_enter_the_target_one_to_one(script):
    """With Q = 0 the TD loss is sum_j mean y^2 and tells every y: a bonus on a row adds itself to its y."""

    def td(bonus):
        networks, optimizer, args = make_networks(script)
        with torch.no_grad():
            networks["critics"].weights[-1].zero_()
            networks["critics"].biases[-1].zero_()
        batch = make_batch()
        batch["rewards"] += bonus
        return updated(script, networks, optimizer, batch, args)[0]["losses/td"]

    plain = td(torch.zeros(6))
    # 1 on top of one y makes 2/6 (2 y + 1) more of the loss.
    targets = np.array([(3 * (td(row) - plain) - 1) / 2 for row in torch.eye(6)])
    assert plain == pytest.approx(2 * np.mean(targets**2), rel=1e-4)
    rewards, terminals = make_batch()["rewards"].numpy(), make_batch()["terminals"].numpy()
    assert np.isclose(targets, rewards, rtol=1e-3, atol=1e-4).tolist() == terminals.tolist()
    bonus = np.linspace(-2, 3, 6, dtype=np.float32)
    assert td(torch.from_numpy(bonus)) == pytest.approx(2 * np.mean((targets + bonus) ** 2), rel=1e-4)


def test_rewards_enter_nothing_else(script):
    """At rates of 0, so that no network sees what another has just learned, only critics see the rewards."""
    rates = {name: 0.0 for name in ("learning_rate", "actor_lr", "critic_lr") if hasattr(script.Args, name)}
    results = []
    for bonus in (0, torch.linspace(-2, 3, 6)):
        networks, optimizer, args = make_networks(script, **rates)
        batch = make_batch()
        batch["rewards"] += bonus
        results.append(updated(script, networks, optimizer, batch, args)[1])
    plain, augmented = results
    changed = {name for name, gradient in plain.items() if not torch.equal(augmented[name], gradient)}
    assert changed == {name for name in plain if name.startswith("critics.")} < plain.keys()


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_actions_at_the_border(script, mean):
    """Data actions of +-1, stored as +-(1 - 1e-5), and a saturated policy: four updates stay finite."""
    networks, optimizer, args = make_networks(script, online_steps=8)
    with torch.no_grad():
        for network in (network for name, network in networks.items() if name.endswith("actor")):
            last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
            last.bias[:2] = torch.tensor([mean, -mean])
    rows = make_rows()
    rows["actions"] = np.sign(rows["actions"])
    buffer = script.ReplayBuffer(rows, args)
    buffer.append(rows)
    expected = torch.from_numpy(rows["actions"]).repeat(2, 1) * np.float32(1 - 1e-5)
    assert torch.equal(buffer.columns["actions"], expected)
    if mean:
        assert script.act(networks, buffer.columns["observations"], deterministic=True).abs().min() == 1
    for step in range(1, 5):
        logs, gradients = updated(script, networks, optimizer, buffer.sample(6, 6), args, step)
        assert np.isfinite(list(logs.values())).all(), logs
        assert gradients and all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(parameter.isfinite().all() for parameter in networks.parameters())


def test_what_an_update_touches(script):
    """Every trained parameter gets a gradient of its own and moves, the Lagrange multiplier if asked for.

    The batch, numpy's random numbers and requires_grad stay as they were; targets move without gradients.
    """
    for changes in ({}, *VARIANTS.get(script.__name__, [])):
        networks, optimizer, args = make_networks(script, **changes)
        before, batch = copy.deepcopy(networks), make_batch()
        columns, numpy_state = copy.deepcopy(batch), np.random.get_state()
        updated(script, networks, optimizer, batch, args, step=1)
        _, gradients = updated(script, networks, optimizer, batch, args, step=2)
        idle = set() if changes.get("cql_lagrange") else {"lagrange.log_multiplier"}
        names = {name for name, _ in networks.named_parameters()} - idle
        assert gradients.keys() == {name for name in names if not name.startswith("target_")}
        for name, parameter in networks.named_parameters():
            old = before.get_parameter(name)
            assert torch.equal(parameter, old) == (name in idle), name
            assert parameter.requires_grad == old.requires_grad, name
            assert parameter.grad is None or not name.startswith("target_"), name
        assert batch.keys() == columns.keys()
        assert all(torch.equal(batch[name], column) for name, column in columns.items())
        for now, then in zip(np.random.get_state(), numpy_state):
            assert np.array_equal(now, then)


def test_targets_follow(script):
    """Targets go by tau towards what was just learned, also once other weights were loaded."""
    networks, optimizer, args = make_networks(script, tau=0.25)
    updated(script, networks, optimizer, make_batch(), args)  # what this one remembers is out of date below
    loaded = make_networks(script, seed=1)[0].state_dict()
    networks.load_state_dict(loaded)
    updated(script, networks, optimizer, make_batch(), args)
    learned, followed = networks.state_dict(), 0
    for name, value in learned.items():
        if name.startswith("target_"):
            source = name.removeprefix("target_")
            assert not torch.equal(learned[source], loaded[source]), name
            torch.testing.assert_close(value, 0.75 * loaded[name] + 0.25 * learned[source], msg=name)
            followed += 1
    assert followed >= len(list(networks["critics"].parameters()))


def test_one_optimizer(script):
    """It holds every trained parameter once, and no target's."""
    networks, optimizer, _ = make_networks(script)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [x for name, x in networks.named_parameters() if not name.startswith("target_")]
    assert sorted(map(id, held)) == sorted(map(id, trained))


def test_act(script):
    """Evaluating repeats itself and draws no random number; exploring does neither; both stay in [-1, 1]."""
    networks, _, _ = make_networks(script)
    with torch.no_grad():
        for parameter in networks["actor"].parameters():
            parameter *= 3
    observations = torch.randn(200, 4)
    random_state = torch.get_rng_state()
    actions, again = (script.act(networks, observations, deterministic=True) for _ in range(2))
    assert torch.equal(actions, again) and torch.equal(torch.get_rng_state(), random_state)
    explored = [script.act(networks, observations, deterministic=False) for _ in range(2)]
    assert not torch.equal(*explored) and not torch.equal(torch.get_rng_state(), random_state)
    for some in (actions, *explored):
        assert some.shape == (200, 2) and 0.9 < some.abs().max() <= 1 and (some.std(0) > 0.1).all()


# ------------------------------ whole runs
OPTIONS = (
    "--env hopper-medium-v2 --device cpu --no-normalize-rewards --offline-steps 6 --online-steps 32 "
    "--batch-size 16 --eval-every 16 --eval-episodes 1 --sera-k 5 --hidden-dim 8"
)
SCALE = 1000 / 39  # of the file below


def write_dataset(path):
    """60 Hopper rows in D4RL's format: 20 up to a terminal, 20 up to a time-out, 20 up to the end.

    The loader drops the last row of the second and of the third, so the returns are 20, 9.5 and -19.
    """
    rng, rows = np.random.default_rng(6), np.arange(60)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(np.arange(11), 1 + np.arange(11), size=(60, 11)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, size=(60, 3)).astype(np.float32)
        file["rewards"] = np.repeat([1, 0.5, -1], 20).astype(np.float32)
        file["terminals"], file["timeouts"] = rows == 19, rows == 39
    return str(path)


class Replay(gymnasium.Env):
    """Every episode goes through the same states; a terminal after 7 steps, a time-out after 9, in turn.

    Rewards are 10, 11, 12, ... over all episodes.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,))
    action_space = gymnasium.spaces.Box(-1, 1, (3,))

    def __init__(self, states):
        self.states, self.seeds, self.actions, self.episodes = states, [], [], []

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self.episodes.append([])
        return self.states[0], {}

    def step(self, action):
        self.actions.append(action)
        self.episodes[-1].append(9.0 + len(self.actions))
        time, odd = len(self.episodes[-1]), len(self.episodes) % 2 == 1
        return self.states[time], self.episodes[-1][-1], odd and time == 7, not odd and time == 9, {}


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """Runs the script on the data set above, in an environment that replays the data set's states.

    Gives the data, the state and the checkpoint at the end, the environments, the inputs of act for single
    states, what went into every update, and whose networks gave every bonus, which is taken times a factor.
    """
    path = write_dataset(tmp_path / "made-up.hdf5")
    data = script.load_d4rl("hopper-medium-v2", path)
    act, update, sera_bonus, original_train = script.act, script.update, script.sera_bonus, script.train

    def run(*options, factor=1):
        seen = SimpleNamespace(data=data, envs=[], acted=[], updates=[], bonus_networks=[], bonuses=[])

        def replay(*_, **__):
            seen.envs.append(Replay(data["observations"].astype(np.float64)))
            return gymnasium.wrappers.RecordEpisodeStatistics(seen.envs[-1])

        def recorded_act(networks, observations, deterministic):
            if len(observations) == 1:  # not a batch of an update
                seen.acted.append((observations.clone(), deterministic, torch.is_grad_enabled()))
            return act(networks, observations, deterministic)

        def recorded_update(state, batch, args):
            rewards, logs = batch["rewards"].clone(), update(state, batch, args)
            seen.updates.append((state.phase, rewards, copy.deepcopy(state.networks.state_dict())))
            return logs

        def recorded_bonus(networks, batch, live, args):
            bonus, logs = sera_bonus(networks, batch, live, args)
            seen.bonus_networks.append(copy.deepcopy(networks.state_dict()))
            seen.bonuses.append((batch["rewards"].clone(), bonus))
            return factor * bonus, logs

        def recorded_train(args, state):
            seen.state = state
            original_train(args, state)

        recorded = {"make_env": replay, "act": recorded_act, "update": recorded_update}
        for name, function in (recorded | {"sera_bonus": recorded_bonus, "train": recorded_train}).items():
            monkeypatch.setattr(script, name, function)
        seen.folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        script.main([*OPTIONS.split(), "--dataset-path", path, "--run-dir", str(seen.folder), *options])
        seen.last = torch.load(seen.folder / "checkpoint.pt", weights_only=True)
        with open(seen.folder / "evals.csv", newline="") as file:
            seen.evals = list(csv.DictReader(file))
        return seen

    return run


def assert_equal(left, right):
    """Two state dictionaries, or dictionaries of them, hold the same numbers, bit for bit."""
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_one_normalisation(train):
    """For the same state, act sees the very numbers of the data set's rows, exploring as evaluating.

    Neither has autograd on. Online rows hold the same numbers again, and their next states those to come.
    """
    run = train()
    mean, std = run.data["observations"].mean(0), run.data["observations"].std(0) + 1e-3
    stored = run.state.buffer.columns["observations"][: len(run.data["rewards"])]
    np.testing.assert_allclose(stored, (run.data["observations"] - mean) / std, rtol=1e-4, atol=1e-5)
    times = np.concatenate([np.arange(length) for length in (7, 9, 7, 9)])
    explored, evaluated = ([x for x, kind, _ in run.acted if kind == wanted] for wanted in (False, True))
    assert len(explored) == len(evaluated) == 32  # four episodes each
    for inputs in (explored, evaluated, run.last["online_rows"]["observations"]):
        assert torch.equal(torch.cat(list(inputs)).reshape(32, 11), stored[times])
    assert torch.equal(run.last["online_rows"]["next_observations"], stored[times + 1])
    assert not any(autograd for _, _, autograd in run.acted)
    for env in run.envs:
        assert np.abs(env.actions).max() <= 1


def test_rewards_are_scaled_alike(train):
    """--normalize-rewards: all rewards times 1000 / 39, offline and online; returns and scores stay raw."""
    run = train("--normalize-rewards")
    assert run.last["normalizer"]["reward_scale"].item() == pytest.approx(SCALE, rel=1e-6)
    rewards = run.state.buffer.columns["rewards"][: run.state.buffer.size]
    raw = [*run.data["rewards"], *np.arange(10, 42)]
    np.testing.assert_allclose(rewards, SCALE * np.array(raw), rtol=1e-6)
    assert torch.equal(run.last["online_rows"]["rewards"], rewards[-32:])
    returns = [sum(episode) for episode in run.envs[1].episodes]
    assert returns == [91, 189, 203, 333]  # 10 to 16, 17 to 25, 26 to 32, 33 to 41
    for row, expected in zip(run.evals, returns, strict=True):
        assert float(row["return"]) == expected
        score = 100 * (expected + 20.272305) / (3234.3 + 20.272305)
        assert float(row["normalized_score"]) == pytest.approx(score, rel=1e-9)


@pytest.mark.parametrize("script", ["calql_sera"], indirect=True)
def test_returns_to_go_are_of_scaled_rewards(train):
    """Cal-QL's R, of the data and of online episodes, sums the rewards that the critics are trained on."""
    run = train("--normalize-rewards")
    episodes = [[1] * 20, [0.5] * 19, [-1] * 19, *run.envs[0].episodes[:4]]
    expected = [
        SCALE * sum(0.99**i * reward for i, reward in enumerate(episode[start:]))
        for episode in episodes
        for start in range(len(episode))
    ]
    buffer = run.state.buffer
    np.testing.assert_allclose(buffer.columns["mc_returns"][: buffer.size], expected, rtol=1e-5)


def test_equal_returns_leave_rewards_alone(script):
    """The scale is 1000 / range of returns; 1 if they are equal, whatever ends the trajectories."""
    args = script.Args(device="cpu", normalize_rewards=True, online_steps=0)
    data = make_rows() | {"rewards": np.array([1, 2, 0, 3, 0, 1, 1, 1], dtype=np.float32)}
    buffer = script.ReplayBuffer(data, args)
    assert buffer.reward_scale == 1
    np.testing.assert_array_equal(buffer.columns["rewards"], data["rewards"])
    data["rewards"][7] = -1  # returns 3, 3, 1
    assert script.ReplayBuffer(data, args).reward_scale == 500


def test_coefficient_zero(train):
    """--sera-coef 0 is a run with the bonus times 0, bit for bit; the bonus then changes it online."""
    plain, times_zero, bonus = train("--sera-coef", "0"), train(factor=0), train()
    assert (plain.bonuses, len(times_zero.bonuses), len(bonus.bonuses)) == ([], 32, 32)
    for name in ("networks", "online_rows"):
        assert_equal(times_zero.last[name], plain.last[name])
    assert torch.equal(times_zero.last["rng"]["cpu"], plain.last["rng"]["cpu"])
    assert_equal(times_zero.last["optimizer"]["state"], plain.last["optimizer"]["state"])
    assert times_zero.evals == plain.evals
    for (_, _, networks), (phase, _, others) in zip(plain.updates, bonus.updates, strict=True):
        assert torch.equal(networks["critics.weights.0"], others["critics.weights.0"]) == (phase == "offline")


def test_bonus_is_in_the_batch_alone(train):
    """Online updates get r + bonus, offline ones r; what is stored or scored has no bonus in it."""
    run = train("--sera-coef", "3")
    offline, online = run.updates[:6], run.updates[6:]
    assert [phase for phase, *_ in run.updates] == ["offline"] * 6 + ["online"] * 32
    for _, rewards, _ in offline:
        assert set(rewards.tolist()) <= {1, 0.5, -1}
    for (_, rewards, _), (raw, bonus) in zip(online, run.bonuses, strict=True):
        assert bonus.abs().max() > 1 and not bonus.requires_grad and torch.equal(rewards, raw + bonus)
        assert set(raw.tolist()) <= {1, 0.5, -1, *range(10, 42)}
    assert run.last["online_rows"]["rewards"].tolist() == list(range(10, 42))
    assert [float(row["return"]) for row in run.evals] == [91, 189, 203, 333]


def test_frozen_bonus_networks(train):
    """--sera-critic offline: all bonuses are those of the networks at the switch, while learning goes on."""
    run = train("--sera-critic", "offline")
    switch = run.updates[5][2]
    for networks in (*run.bonus_networks, run.state.bonus_networks.state_dict()):
        assert_equal(networks, switch)
    assert len(run.bonus_networks) == 32
    for name, value in run.updates[-1][2].items():
        assert name == "lagrange.log_multiplier" or not torch.equal(value, switch[name]), name


def test_evaluation_starts(train):
    """Start states differ between evaluations, and are the same whatever the seed of the run."""
    options = ["--offline-steps", "16", "--eval-episodes", "2"]  # evaluates at step 16 of both phases
    runs = [train(*options, "--seed", seed) for seed in ("1", "2")]
    first, second = ([env.seeds for env in run.envs[1:]] for run in runs)
    assert first == second and [len(seeds) for seeds in first] == [4, 4]
    assert len({seed for seeds in first for seed in seeds}) == 8 and None not in first[0]


def test_resume_restores_everything(script, train):
    """Networks, frozen ones, optimiser, rows, scale, counters, evaluations, random numbers: all come back."""
    run = train("--normalize-rewards")
    torch.manual_seed(99)
    run.state.lock.lock.release()
    state = script.set_up(script.parse_args(["--run-dir", str(run.folder), "--resume"]))
    assert torch.equal(torch.get_rng_state(), run.last["rng"]["cpu"])
    for name in ("networks", "bonus_networks"):
        assert_equal(getattr(state, name).state_dict(), getattr(run.state, name).state_dict())
    assert_equal(state.optimizer.state_dict()["state"], run.state.optimizer.state_dict()["state"])
    assert_equal(state.buffer.columns, run.state.buffer.columns)
    for name in ("size", "offline_size", "reward_scale"):
        assert getattr(state.buffer, name) == getattr(run.state.buffer, name)
    assert (state.phase, state.step, state.evals) == ("online", 32, run.state.evals)
    assert state.train_scores == run.state.train_scores and len(state.train_scores) == len(
        run.last["train_scores"]
    )


# ------------------------------ text and tables
SERA_EQUATIONS = """
(S1) rho_i = k-th smallest over j != i of max( |s_i - s_j|, |q_i - q_j| )
(S2) n_i   = #{ j != i : |q_i - q_j| < rho_i }
(S3) H_i   = psi(n_i + 1) / d + log(2 rho_i)
"""


def test_header(script):
    """The docstring holds SERA's three equations and names the one that the bonus enters: the target."""
    assert SERA_EQUATIONS in script.__doc__
    number = re.search(r"puts r \+ lambda tanh\(H\) in place of r in (\(\d\)), ", script.__doc__)[1]
    (equation,) = [line for line in script.__doc__.splitlines() if line.startswith(f"{number} ")]
    assert re.match(r"\(\d\) target +y = r \+ gamma m ", equation)


def test_help(script, capsys):
    """--help lists every argument, with a text of some words."""
    with pytest.raises(SystemExit) as caught:
        script.main(["--help"])
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    text = "\n".join(line.strip("│| ") for line in lines)
    assert caught.value.code == 0
    for name in script.Args.__dataclass_fields__:
        flag = f"--{name.replace('_', '-')}"
        assert re.search(rf"(?m)^{flag}( \S+|, --no-\S+)\s+\w\S*\s+\w", text), flag


def test_presets(script):
    """Each is of use to some data set and changes known arguments; every data set parses, with its own."""
    defaults = script.Args()
    for start, preset in script.PRESETS.items():
        assert any(env.startswith(start) for env in {*script.DATASETS, "antmaze-umaze-v2"}), start
        for name, value in preset.items():
            assert type(value) is type(getattr(defaults, name)) and value != getattr(defaults, name), start
    assert len({env for env in script.DATASETS if not env.startswith("antmaze")}) == 70
    for env in [*script.DATASETS]:
        expected = {"env": env, "device": "cpu"}
        for start in sorted(script.PRESETS, key=len):
            expected |= script.PRESETS[start] if env.startswith(start) else {}
        assert script.parse_args(["--env", env, "--device", "cpu"]) == script.Args(**expected), env


def test_planted_bugs():
    """Every listed bug finds its place once and leaves a script that compiles, or it would prove nothing.

    So this test fails in every copy with a bug: bugs for this file name the test that has to notice them.
    """
    lists = plant_bugs.load_bugs()
    assert "sac_sera" in lists
    for script, bugs in lists.items():
        text = (ROOT / f"{script}.py").read_text()
        assert len({bug["what"] for bug in bugs}) == len(bugs), script
        for bug in bugs:
            assert bug.keys() == {"what", "find", "replace", "tests"}, bug
            assert text.count(bug["find"]) == 1 and bug["find"] != bug["replace"], bug
            compile(text.replace(bug["find"], bug["replace"]), script, "exec")
            file, _, test = bug["tests"].partition("::")
            assert (ROOT / "tests" / file).is_file(), bug
            assert test not in ("", "test_planted_bugs") or file != "test_all_scripts.py", bug
