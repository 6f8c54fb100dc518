"""A task of one's own: any environment that Gymnasium knows, with data or without."""

import csv
import importlib
import json
import re
import sys
import warnings

import gymnasium
import kill_points
import numpy as np
import pytest
from corrupt import write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import calql_sera
import sac_sera
from envs import antmaze

PENDULUM = "Pendulum-v1"
# A module of a user's, with environments of many kinds.
MODULE = '''
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

STATES = Box(-np.inf, np.inf, (2,))
LOW, HIGH = np.array([-0.3, 1.0, -7.0]), np.array([0.1, 1.5, 0.1])


class Slider(gymnasium.Env):
    """Pushes a point about; ends at its walls."""

    def __init__(self, states=STATES, actions=None, dtype="float32", render_mode=None):
        self.observation_space = states
        self.action_space = actions or Box(LOW.astype(dtype), HIGH.astype(dtype), dtype=dtype)
        self.received = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.total = 0.0
        return self.state.copy(), {}

    def step(self, action):
        self.received.append(action)
        self.state[0] += 0.1 * float(action[0])
        self.state[1] = self.np_random.uniform(-1, 1)
        reward = 1.0 - float(self.state[0])
        self.total += reward
        return self.state.copy(), reward, bool(abs(self.state[0]) > 2), False, {}


class InPlace(Slider):
    """Goes on writing in the array that it gave, and pays in arrays of one."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.state, {}

    def step(self, action):
        _, reward, *rest = super().step(action)
        return self.state, np.array([reward]), *rest


class Plain(Slider):
    def __init__(self):
        super().__init__()


class Broken(gymnasium.Env):
    def __init__(self):
        raise RuntimeError("no simulator here\\nsee the manual")


KINDS = {
    "Slider": {},
    "Double": {"dtype": "float64"},
    "DictStates": {"states": Dict({"a": STATES})},
    "DiscreteStates": {"states": Discrete(5)},
    "ImageStates": {"states": Box(0, 1, (8, 8))},
    "NumberStates": {"states": Box(0, 1, ())},
    "DiscreteActions": {"actions": Discrete(3)},
    "SeveralActions": {"actions": MultiDiscrete([3, 3])},
    "MatrixActions": {"actions": Box(-1, 1, (2, 2))},
    "UnboundedActions": {"actions": Box(-np.inf, np.inf, (2,))},
    "HalfBoundedActions": {"actions": Box(0, np.inf, (2,))},
}
for name, kwargs in KINDS.items():
    gymnasium.register(f"{name}-v0", Slider, max_episode_steps=20, kwargs=kwargs)
gymnasium.register("Endless-v0", Slider)
gymnasium.register("InPlace-v0", InPlace, max_episode_steps=20)
gymnasium.register("Plain-v0", Plain)
gymnasium.register("Broken-v0", Broken)
'''
OPTIONS = (
    "--device cpu --threads 1 --offline-steps 4 --online-steps 50 --eval-every 25 "
    "--eval-episodes 2 --batch-size 8 --sera-k 3 --hidden-dim 8 --log-every 5"
)


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    """The module "sliders" can be imported, and is forgotten afterwards, with its environments."""
    (tmp_path / "sliders.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(gymnasium.registry)
    yield
    for name in set(gymnasium.registry) - known:
        del gymnasium.registry[name]
    sys.modules.pop("sliders", None)
    for name in ("awac", "calql", "cql", "iql", "sac", "td3bc"):
        importlib.import_module(f"{name}_sera").own_task.cache_clear()


def dataset(observation_dim, action_dim, rows=100, length=20):
    """Arrays of noise in D4RL's format: trajectories of that many rows, which end in time-outs."""
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(rows, observation_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(rows, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % length == length - 1,
    }


@pytest.fixture
def slider_data(tmp_path):
    """A data file for Slider."""
    return str(write(tmp_path / "slider.hdf5", dataset(2, 3)))


@pytest.fixture
def refusal(capsys, monkeypatch):
    """Runs main, which has to refuse: gives its one line on stderr."""
    monkeypatch.setattr(calql_sera, "train", lambda *inputs: pytest.fail("training has begun"))

    def run(env, *options):
        with pytest.raises(SystemExit) as caught:
            calql_sera.main(["--env", env, "--threads", "1", *options])
        stderr = capsys.readouterr().err.strip()
        assert caught.value.code == 2
        assert stderr.startswith("error: ") and "\n" not in stderr
        return stderr

    return run


def rows(run_dir):
    with open(run_dir / "evals.csv", newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------ which environments
@pytest.mark.parametrize(
    ("env", "observation_dim", "action_dim", "horizon"),
    [
        (PENDULUM, 3, 1, 200),
        ("MountainCarContinuous-v0", 2, 1, 999),
        ("Hopper-v4", 11, 3, 1000),
        ("HalfCheetah-v5", 17, 6, 1000),
        ("Ant-v4", 27, 8, 1000),
        ("sliders:Slider-v0", 2, 3, 20),
        ("sliders:Endless-v0", 2, 3, None),
    ],
)
def test_tasks(script, env, observation_dim, action_dim, horizon):
    """Widths and horizon are the environment's; there is no score and no data file."""
    task = script.find_task(env)
    assert task.env_id == env
    assert (task.observation_dim, task.action_dim) == (observation_dim, action_dim)
    assert task.horizon == horizon
    assert task[3:5] == (None, None)
    assert (task.file, task.sha256) == (None, None)
    made = script.make_env(env)
    assert made.observation_space.shape == (observation_dim,)
    assert made.action_space.shape == (action_dim,)
    assert script.normalized_score(env, 7.0) is None
    assert script.normalized_score(env, np.array([1.0, 2.0])) is None


def test_environments_that_cannot_be_rendered():
    """Some environments take no argument at all, and nothing asks them to render."""
    env = calql_sera.make_env("sliders:Plain-v0")
    assert env.observation_space.shape == (2,)


def test_an_id_is_made_once(monkeypatch):
    """Looking a task up again makes no further environment."""
    made = []

    def make(*inputs, **options):
        made.append(inputs[0])
        return original(*inputs, **options)

    original = gymnasium.make
    monkeypatch.setattr(gymnasium, "make", make)
    for _ in range(3):
        calql_sera.find_task(PENDULUM)
    assert made == [PENDULUM]


def test_d4rl_ids_stay_what_they_are():
    """They have their scores and their horizons."""
    task = calql_sera.find_task("hopper-medium-v2")
    assert task[:6] == ("Hopper-v4", 11, 3, -20.272305, 3234.3, 1000)
    assert calql_sera.normalized_score("hopper-medium-v2", 3234.3) == pytest.approx(100)


@pytest.mark.parametrize("env", ["hopper-medium-v2", "hopper-medium-mini", "antmaze-umaze-v2"])
def test_d4rl_actions_stay_what_they_are(env, monkeypatch):
    """They reach the environment to the last bit, and its bounds are what they were."""
    made = calql_sera.make_env(env)
    received = []
    step = made.unwrapped.step

    def note(action):
        received.append(action)
        return step(action)

    monkeypatch.setattr(made.unwrapped, "step", note)
    made.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (20, *made.action_space.shape))
    for action in actions.astype(np.float32):
        made.step(action)
        assert received[-1].tobytes() == action.tobytes()


@pytest.mark.parametrize(
    ("env", "part", "space"),
    [
        ("DictStates", "states", "Dict("),
        ("DiscreteStates", "states", "Discrete(5)"),
        ("ImageStates", "states", "(8, 8)"),
        ("NumberStates", "states", "Box("),
        ("DiscreteActions", "actions", "Discrete(3)"),
        ("SeveralActions", "actions", "MultiDiscrete("),
        ("MatrixActions", "actions", "(2, 2)"),
    ],
)
def test_other_spaces(env, part, space, refusal):
    """States and actions have to be vectors of numbers: the space is shown, with what is needed."""
    message = refusal(f"sliders:{env}-v0")
    assert f"--env sliders:{env}-v0 has the {part} {space}" in message or space in message
    assert f"has the {part}" in message
    assert message.endswith("give one whose states and actions are vectors of numbers")


def test_discrete_actions_of_gymnasium(refusal):
    """The commonest of all."""
    assert "--env CartPole-v1 has the actions Discrete(2)" in refusal("CartPole-v1")


@pytest.mark.parametrize("env", ["UnboundedActions", "HalfBoundedActions"])
def test_actions_without_bounds(env, refusal):
    """There is nothing to rescale them to."""
    message = refusal(f"sliders:{env}-v0")
    assert f"--env sliders:{env}-v0 has actions without bounds (Box(" in message
    assert message.endswith("give some bounds")


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ("sliders:Broken-v0", "no simulator here"),
        ("no_such_module:Slider-v0", "no_such_module"),
        ("sliders:Slidr-v0", "Slidr"),
        ("sliders:Slider-v7", "Slider"),
        ("Pendulum-v0", "v1"),
    ],
)
def test_environments_that_cannot_be_made(env, reason, refusal):
    """The reason in one line, whatever the environment or the import raised."""
    message = refusal(env)
    assert f"--env {env} is no dataset that is supported, and Gymnasium cannot make it (" in message
    assert reason in message
    assert "see the manual" not in message


@pytest.mark.parametrize(
    ("env", "nearest"),
    [
        ("Pendulm-v1", PENDULUM),
        ("pendulum-v1", PENDULUM),
        ("MountainCarContinous-v0", "MountainCarContinuous-v0"),
        ("hopper-medum-v2", "hopper-medium-v2"),
        ("walker-2d-medium-expert-v2", "walker2d-medium-expert-v2"),
        ("Hoper-v5", "Hopper-v5"),
        ("ant-full-replay-v7", "ant-full-replay-v2"),
        ("antmaze-umaze-divers-v2", "antmaze-umaze-diverse-v2"),
    ],
)
def test_nearest_id(env, nearest):
    """An unknown id gets the nearest known one, of D4RL's and of Gymnasium's."""
    with pytest.raises(ValueError, match=rf": did you mean {re.escape(nearest)}\?$"):
        calql_sera.find_task(env)
    assert calql_sera.find_task(nearest)


def test_nearest_id_of_the_bundled_file():
    """The mini set is among the known ones."""
    with pytest.raises(ValueError, match=r"did you mean hopper-medium-mini\?"):
        calql_sera.find_task("hopper-medium-mni")


def test_nearest_id_of_a_mistyped_maze(monkeypatch):
    """AntMaze's ids are among the known ones before they have been asked for."""
    monkeypatch.delitem(sys.modules, "envs.antmaze")
    for env in antmaze.DATASETS:
        monkeypatch.delitem(gymnasium.registry, env)
    with pytest.raises(ValueError, match=r"did you mean antmaze-umaze-v2\?"):
        calql_sera.find_task("antmze-umaze-v2")


@pytest.mark.parametrize("name", ["flow_field", "carla_gym", "bullets", "kitchen_tools"])
def test_modules_named_like_families(name, tmp_path):
    """A module of one's own is no family of D4RL's because of how its name begins."""
    source = MODULE.replace("{name}-v0", f"{name}/{{name}}-v0").split('gymnasium.register("End')[0]
    (tmp_path / f"{name}.py").write_text(source)
    task = calql_sera.find_task(f"{name}:{name}/Slider-v0")
    assert (task.observation_dim, task.action_dim) == (2, 3)


def test_module_named_like_a_maze(tmp_path):
    """Nor is it AntMaze's: its rewards need not be those of successes."""
    source = MODULE.replace("{name}-v0", "Maze{name}-v0").split('gymnasium.register("End')[0]
    (tmp_path / "antmaze_tools.py").write_text(source)
    arrays = dataset(2, 3) | {"rewards": -np.ones(100)}
    path = write(tmp_path / "x.hdf5", arrays)
    options = ["--env", "antmaze_tools:MazeSlider-v0", "--dataset-path", str(path)]
    data, _, _ = calql_sera.load_data(calql_sera.parse_args(options))
    assert len(data["rewards"]) == 95


# ------------------------------ actions and physics
def step_once(env, action):
    """Makes one step; gives the action that the innermost environment got."""
    env.reset(seed=0)
    env.step(np.asarray(action, np.float32))
    return env.unwrapped.received[-1]


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("kind", ["Slider", "Double"])
def test_actions_are_rescaled(script, kind):
    """-1 is the lower bound, 1 the upper one, all between in proportion, each by its own bounds."""
    env = script.make_env(f"sliders:{kind}-v0")
    low, high = np.array([-0.3, 1.0, -7.0]), np.array([0.1, 1.5, 0.1])
    for action in ([-1, -1, -1], [0, 0, 0], [1, 1, 1], [-1, 0.5, 1], [0.25, -0.5, 0.125]):
        received = step_once(env, action)
        expected = low + (np.array(action) + 1) / 2 * (high - low)
        np.testing.assert_allclose(received, expected, atol=2e-6)
        assert received.shape == (3,)


def test_actions_beyond_the_bounds_are_clipped():
    """Beyond +-1 is as +-1."""
    env = calql_sera.make_env("sliders:Slider-v0")
    for action in ([-1, 1, 1], [1, -1, 1]):
        expected = step_once(env, action)
        np.testing.assert_array_equal(step_once(env, 3 * np.array(action)), expected)


@pytest.mark.parametrize("kind", ["Slider", "Double"])
def test_rescaled_actions_are_within_the_bounds(kind):
    """An environment that checks its actions finds none outside: -0.3 + (0.1 + 0.3) exceeds 0.1."""
    env = calql_sera.make_env(f"sliders:{kind}-v0")
    space = env.unwrapped.action_space
    for action in ([-1, -1, -1], [1, 1, 1]):
        received = step_once(env, action)
        assert received.dtype == space.dtype
        assert space.contains(received), received


def test_rescaling_warns_of_nothing():
    """A space in double precision, which is NumPy's default, is nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calql_sera.make_env("sliders:Double-v0")


def test_pendulum_gets_its_full_torque():
    """A known environment: action 1 is a torque of 2."""
    env = calql_sera.make_env(PENDULUM)
    for action, torque in ((1, 2), (-1, -2), (0.5, 1)):
        env.reset(seed=0)
        env.step(np.array([action], np.float32))
        assert env.unwrapped.last_u == pytest.approx(torque, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*is out of date")
@pytest.mark.parametrize("physics", ["d4rl", "gymnasium"])
@pytest.mark.parametrize("env", ["Hopper-v4", "Walker2d-v4", "Ant-v4"])
def test_physics_is_left_alone(env, physics):
    """One's own Hopper is Gymnasium's as it is shipped, not D4RL's."""
    made = calql_sera.make_env(env, physics)
    shipped = gymnasium.make(env, disable_env_checker=True)
    for name in ("body_mass", "body_inertia", "geom_margin"):
        expected = getattr(shipped.unwrapped.model, name)
        np.testing.assert_array_equal(getattr(made.unwrapped.model, name), expected)
    assert made.observation_space == shipped.observation_space  # ant has no zeros behind it
    robot = env.split("-")[0].lower()
    d4rl_s = calql_sera.make_env(f"{robot}-medium-v2").unwrapped.model  # the control
    assert not np.array_equal(d4rl_s.body_mass, shipped.unwrapped.model.body_mass)


def test_no_presets_of_d4rl():
    """Defaults are those of all tasks."""
    args = calql_sera.parse_args(["--env", "Walker2d-v4"])
    assert args == calql_sera.Args(env="Walker2d-v4")


# ------------------------------ data
def load(env, path):
    options = ["--env", env, "--dataset-path", str(path)]
    data, _, _ = calql_sera.load_data(calql_sera.parse_args(options))
    return data


def test_data_of_ones_own(tmp_path, slider_data):
    """It is read as any other, with the environment's widths."""
    data = load("sliders:Slider-v0", slider_data)
    assert data["observations"].shape == (95, 2)
    assert data["actions"].shape == (95, 3)
    assert data["episode_ends"].sum() == 5


def test_data_of_other_widths(slider_data, refusal):
    """The environment is named, with what it needs."""
    message = refusal(PENDULUM, "--dataset-path", slider_data)
    assert "observations in" in message
    assert f"{PENDULUM} needs numbers, (100, 3)" in message


def test_horizon_of_ones_own(tmp_path, refusal):
    """Trajectories are compared with it, and time-outs counted against it."""
    arrays = dataset(3, 1, rows=900, length=900)
    path = write(tmp_path / "x.hdf5", arrays)
    message = refusal(PENDULUM, "--dataset-path", str(path))
    assert "a trajectory of 899 steps" in message
    assert "an episode has 200 at most" in message
    del arrays["timeouts"]
    data = load(PENDULUM, write(tmp_path / "y.hdf5", arrays))
    assert np.flatnonzero(data["episode_ends"]).tolist() == [198, 397, 596, 795, 894]


def test_no_horizon(tmp_path, refusal, capsys):
    """Without one, which is said, trajectories have any length, and time-outs have to be given."""
    arrays = dataset(2, 3, rows=3000, length=3000)
    env = "sliders:Endless-v0"
    calql_sera.own_task.cache_clear()
    calql_sera.own_task(env)
    fix = "register it with max_episode_steps, unless it ends every episode itself"
    assert capsys.readouterr().out == f"--env {env} has no time limit: {fix}\n"
    assert len(load(env, write(tmp_path / "x.hdf5", arrays))["rewards"]) == 2999
    del arrays["timeouts"]
    path = write(tmp_path / "y.hdf5", arrays)
    assert "no array 'timeouts'" in refusal(env, "--dataset-path", str(path))


def test_offline_steps_without_data(refusal):
    """There is no file to fetch: both ways out are named."""
    message = refusal(PENDULUM)
    expected = f"--env {PENDULUM} has no dataset of its own: give --dataset-path, or"
    assert expected in message
    assert "--offline-steps 0 --mixing-ratio 0" in message


# ------------------------------ whole runs
def test_states_of_an_environment_that_overwrites_them(script):
    """Each is kept as it was, and rewards are numbers; Gymnasium's vector ones copy, too."""
    env = script.make_env("sliders:InPlace-v0")
    states = [env.reset(seed=1)[0]]
    for _ in range(3):
        state, reward, *_ = env.step(np.ones(3, dtype=np.float32))
        states.append(state)
        assert type(reward) is float
    assert len({tuple(state) for state in states}) == 4
    _, lengths, _ = script.evaluate(lambda states: np.zeros((len(states), 3)), [env], [1])
    assert lengths.tolist() == [20]


def test_a_run(script, slider_data, tmp_path, capsys):
    """Both phases: empty cells for scores, returns in bar and summary, no score in TensorBoard."""
    run_dir = tmp_path / "run"
    options = [*OPTIONS.split(), "--dataset-path", slider_data, "--run-dir", str(run_dir)]
    script.main(["--env", "sliders:Slider-v0", *options])
    found = rows(run_dir)
    assert [row["phase"] for row in found] == ["offline"] * 2 + ["online"] * 6
    assert {row["normalized_score"] for row in found} == {""}
    assert list(found[0]) == ["phase", "step", "episode", "return", "length", "normalized_score"]
    assert all(0 < int(row["length"]) <= 20 for row in found)
    printed = capsys.readouterr()
    mean = np.mean([float(row["return"]) for row in found[-2:]])
    assert printed.out.splitlines()[-1] == f"final return {mean:.1f}"
    assert f"return {mean:.1f}]" in printed.err
    assert "score" not in printed.out + printed.err
    tags = set(EventAccumulator(str(run_dir)).Reload().Tags()["scalars"])
    assert {"eval/return", "eval/length", "train/return"} <= tags
    assert not any("score" in tag or "regret" in tag for tag in tags)
    config = json.loads((run_dir / "config.json").read_text())
    assert config["env_id"] == config["args"]["env"] == "sliders:Slider-v0"
    saved = script.read_checkpoint(run_dir / "checkpoint.pt")
    assert saved["train_scores"] == []


def test_returns_are_the_environment_s(slider_data, tmp_path, monkeypatch):
    """What evals.csv has is the undiscounted sum of raw rewards, however those are scaled."""
    sums = []
    original = calql_sera.evaluate

    def evaluate(policy, envs, seeds):
        result = original(policy, envs, seeds)
        sums.extend(env.unwrapped.total for env in envs)
        return result

    monkeypatch.setattr(calql_sera, "evaluate", evaluate)
    options = [*OPTIONS.split(), "--online-steps", "0", "--eval-every", "99"]
    options += ["--reward-scale", "5", "--reward-bias", "2", "--normalize-rewards"]
    run_dir = tmp_path / "run"
    files = ["--dataset-path", slider_data, "--run-dir", str(run_dir)]
    calql_sera.main(["--env", "sliders:Slider-v0", *options, *files])
    returns = [float(row["return"]) for row in rows(run_dir)]
    np.testing.assert_allclose(returns, sums, rtol=1e-6)
    assert len(sums) == 2


def test_from_scratch(script, tmp_path, capsys):
    """Without any data: random steps first, then updates; the random ones are in [-1, 1]."""
    run_dir = tmp_path / "run"
    options = [*OPTIONS.split(), "--offline-steps", "0", "--mixing-ratio", "0"]
    options += ["--learning-starts", "20", "--run-dir", str(run_dir)]
    script.main(["--env", "sliders:Slider-v0", *options])
    saved = script.read_checkpoint(run_dir / "checkpoint.pt")
    assert (saved["phase"], saved["step"]) == ("online", 50)
    assert len(saved["online_rows"]) == 50
    assert saved["data_sha256"] is None
    actions = saved["online_rows"][:20, 2:5]
    assert actions.abs().max() <= 1
    assert actions.min() < -0.5 and actions.max() > 0.5
    assert "final return" in capsys.readouterr().out


def test_run_folder(slider_data, tmp_path, monkeypatch):
    """The default folder has a name that every system takes, also for module:Name-v0."""
    monkeypatch.chdir(tmp_path)
    options = [*OPTIONS.split(), "--online-steps", "0", "--dataset-path", slider_data]
    calql_sera.main(["--env", "sliders:Slider-v0", *options])
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"sliders-Slider-v0__calql_sera__1__\d+", run_dir.name)


def test_killed_and_resumed(tmp_path):
    """Pendulum, with data: killed online and resumed, a run ends as one that was left alone."""
    data = write(tmp_path / "x.hdf5", dataset(3, 1, rows=400, length=200))
    options = f"--env {PENDULUM} --dataset-path {data} --device cpu --threads 1 "
    options += "--offline-steps 30 --online-steps 260 --eval-every 300 --eval-episodes 1 "
    options += "--checkpoint-every 150 --batch-size 8 --sera-k 3 --hidden-dim 8"
    alone, run_dir = tmp_path / "alone", tmp_path / "run"
    sac_sera.main([*options.split(), "--run-dir", str(alone)])
    argv = [*options.split(), "--run-dir", str(run_dir)]
    assert kill_points.dies_at_call("sac_sera", "train_step", 30 + 230, argv)
    saved = sac_sera.read_checkpoint(run_dir / "checkpoint.pt")
    assert (saved["phase"], saved["step"]) == ("online", 200)
    sac_sera.main(["--run-dir", str(run_dir), "--resume"])
    assert kill_points.compare(alone, run_dir) == []


def test_known_ids_are_known():
    """What may be suggested: all v2 ids of D4RL's robots, and what Gymnasium has, mazes too."""
    known = calql_sera.known_ids()
    for robot in calql_sera.TASKS:
        for kind in calql_sera.KINDS:
            assert f"{robot}-{kind}-v2" in known
    assert {PENDULUM, *antmaze.DATASETS} <= set(known)
