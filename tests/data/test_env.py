"""D4RL's physics, the environments around it, and the evaluation."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
import pytest

import calql_sera

HOPPER = "hopper-medium-v2"
WALKER2D = "walker2d-medium-v2"
HALFCHEETAH = "halfcheetah-medium-v2"
ANT = "ant-medium-v2"
ENVS = (HOPPER, WALKER2D, HALFCHEETAH, ANT)
MODEL_ARRAYS = (
    "body_mass",
    "body_inertia",
    "body_ipos",
    "body_iquat",
    "geom_margin",
    "body_subtreemass",
)


def shipped(env_id):
    """Gymnasium's own environment."""
    # Else C code writes a file into the working directory.
    mujoco.set_mju_user_warning(lambda message: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gymnasium.make(env_id).unwrapped


def step_from_start(env, action):
    """Observation and reward after one step from a fixed start."""
    env.reset(seed=3)
    observation, reward, *_ = env.step(action)
    return observation, reward


# ------------------------------ masses and margins
def test_hopper_torso():
    """A capsule of r 0.05, h 0.2 counts as a cylinder of length 0.45; worked out by hand."""
    model = calql_sera.make_env(HOPPER).unwrapped.model
    torso = model.body("torso").id
    axial, *transverse = np.sort(model.body_inertia[torso])
    assert model.body_mass[torso] == pytest.approx(3.5342917, abs=1e-7)
    assert transverse == pytest.approx([0.0618501, 0.0618501], abs=1e-7)
    assert axial == pytest.approx(0.0044179, abs=1e-7)


@pytest.mark.parametrize(
    ("env", "physics", "total"),
    [
        (HOPPER, "d4rl", 15.265),
        (WALKER2D, "d4rl", 22.698),
        (HALFCHEETAH, "d4rl", 14.000),
        (ANT, "d4rl", 0.8787),
        (HOPPER, "gymnasium", 15.820),
        (WALKER2D, "gymnasium", 23.677),
        (HALFCHEETAH, "gymnasium", 14.000),
        (ANT, "gymnasium", 0.9109),
    ],
)
def test_total_mass(env, physics, total):
    """The whole robot weighs what it did in D4RL's MuJoCo, or what it weighs as shipped."""
    model = calql_sera.make_env(env, physics).unwrapped.model
    assert model.body_mass.sum() == pytest.approx(total, abs=5e-5 if total < 1 else 5e-4)


@pytest.mark.parametrize(
    ("env", "density", "bodies"), [(HOPPER, 1000, 4), (WALKER2D, 1000, 7), (ANT, 5, 12)]
)
def test_bodies_of_one_capsule(env, density, bodies):
    """m = rho pi r^2 L, I = m (3 r^2 + L^2) / 12 and m r^2 / 2, L = 2 h + r, for each of them."""
    model = calql_sera.make_env(env).unwrapped.model
    compared = 0
    for body in range(1, model.nbody):
        geoms = np.flatnonzero(model.geom_bodyid == body)
        if len(geoms) > 1 or model.geom_type[geoms[0]] != mujoco.mjtGeom.mjGEOM_CAPSULE:
            continue
        r, h, _ = model.geom_size[geoms[0]]
        length = 2 * h + r
        mass = density * np.pi * r**2 * length
        transverse = mass * (3 * r**2 + length**2) / 12
        axial = mass * r**2 / 2
        inertia = sorted([transverse, transverse, axial])
        assert model.body_mass[body] == pytest.approx(mass, rel=1e-9)
        np.testing.assert_allclose(np.sort(model.body_inertia[body]), inertia, rtol=1e-9)
        np.testing.assert_allclose(model.body_ipos[body], model.geom_pos[geoms[0]], atol=1e-12)
        compared += 1
    assert compared == bodies


@pytest.mark.parametrize("env", ENVS)
def test_margins_and_constants(env):
    """Margins are half of those shipped, shapes as shipped, derived constants up to date."""
    env = calql_sera.make_env(env)
    model = env.unwrapped.model
    original = shipped(env.spec.id).model
    np.testing.assert_array_equal(model.geom_margin, original.geom_margin / 2)
    shipped_margins = {"Hopper-v4": 0.001, "Ant-v4": 0.01}
    assert original.geom_margin.max() == shipped_margins.get(env.spec.id, 0)
    for name in ("geom_size", "geom_type", "geom_pos", "geom_friction", "body_pos"):
        np.testing.assert_array_equal(getattr(model, name), getattr(original, name))
    assert model.body_subtreemass[0] == pytest.approx(model.body_mass.sum())
    assert not np.array_equal(model.body_invweight0, original.body_invweight0)


@pytest.mark.parametrize("env", ENVS)
def test_gymnasium_physics(env):
    """physics="gymnasium" leaves the model as shipped, and the default does not."""
    made = calql_sera.make_env(env, "gymnasium")
    model = made.unwrapped.model
    original = shipped(made.spec.id).model
    for name in MODEL_ARRAYS:
        np.testing.assert_array_equal(getattr(model, name), getattr(original, name))
    patched = calql_sera.make_env(env).unwrapped.model
    assert not np.array_equal(patched.body_inertia, original.body_inertia)


def test_unknown_names():
    """ValueError, naming it, for an unknown dataset."""
    with pytest.raises(ValueError, match="hopper-medum-v2"):
        calql_sera.make_env("hopper-medum-v2")


# ------------------------------ around the physics
@pytest.mark.parametrize("env", ENVS)
def test_actions_are_clipped(env):
    """Actions beyond +-1 give the same next state and reward as +-1, control cost included."""
    env = calql_sera.make_env(env)
    signs = (-1.0) ** np.arange(env.action_space.shape[0])
    edge, beyond, within = (
        step_from_start(env, (scale * signs).astype(np.float32)) for scale in (1, 7, 0.9)
    )
    np.testing.assert_array_equal(beyond[0], edge[0])
    assert beyond[1] == edge[1]
    assert not np.array_equal(within[0], edge[0])
    assert within[1] != edge[1]


@pytest.mark.parametrize("env", ENVS)
def test_shapes_and_horizon(env):
    """Widths are the dataset's, episodes last 1000 steps, seeds fix the start."""
    task = calql_sera.find_task(env)
    made = calql_sera.make_env(env)
    observation, _ = made.reset(seed=5)
    assert made.observation_space.shape == observation.shape == (task.observation_dim,)
    assert made.action_space.shape == (task.action_dim,)
    assert made.spec.id == task.env_id
    assert made.spec.max_episode_steps == 1000
    np.testing.assert_array_equal(made.reset(seed=5)[0], observation)
    assert not np.array_equal(made.reset(seed=6)[0], observation)


def test_halfcheetah_is_cut_after_1000_steps():
    """The only end of a HalfCheetah episode is the time limit, which is not a terminal."""
    env = calql_sera.make_env(HALFCHEETAH)
    env.reset(seed=0)
    ends = [env.step(np.zeros(6, dtype=np.float32))[2:4] for _ in range(1000)]
    assert ends == [(False, False)] * 999 + [(False, True)]


@pytest.mark.parametrize("physics", ["d4rl", "gymnasium"])
def test_ant_observation(physics):
    """ant has 111 dimensions; the last 84, the contact forces, are 0, and constant by its space."""
    env = calql_sera.make_env(ANT, physics)
    rng = np.random.default_rng(0)
    observations = [env.reset(seed=0)[0]]
    contacts = 0
    for _ in range(200):
        observation, *_ = env.step(rng.uniform(-1, 1, 8).astype(np.float32))
        observations.append(observation)
        contacts += env.unwrapped.data.ncon
    observations = np.array(observations)
    space = env.observation_space
    assert observations.shape == (201, 111)
    assert contacts > 0
    assert np.all(observations[:, 27:] == 0)
    assert np.all(observations[:, :27].std(0) > 0)
    assert np.all(space.low[27:] == 0)
    assert np.all(space.high[27:] == 0)
    assert np.all(space.low[:27] < space.high[:27])
    assert all(space.contains(observation) for observation in observations)


def test_making_an_environment_is_quiet(tmp_path):
    """No warning on stderr and no MUJOCO_LOG.TXT in the working directory; the control has both."""
    commands = {
        "quiet": "import calql_sera; calql_sera.make_env('halfcheetah-medium-v2').reset(seed=0)",
        "loud": "import gymnasium; gymnasium.make('HalfCheetah-v4')",
    }
    path = {"PYTHONPATH": str(Path(calql_sera.__file__).parent)}
    results = {}
    for name, command in commands.items():
        (tmp_path / name).mkdir()
        result = subprocess.run(
            [sys.executable, "-B", "-c", command],
            cwd=tmp_path / name,
            env=os.environ | path,
            capture_output=True,
            text=True,
            check=True,
        )
        files = [file.name for file in (tmp_path / name).iterdir()]
        results[name] = (result.stdout, result.stderr, files)
    assert results["quiet"] == ("", "", [])
    _, warning, files = results["loud"]
    assert "WARN" in warning
    assert files == ["MUJOCO_LOG.TXT"]


# ------------------------------ replay of genuine transitions
def read_transitions(path, clipped, every=1):
    """States (positions, velocities) before each step, and what the file says of the step."""
    names = (
        "infos/qpos",
        "infos/qvel",
        "actions",
        "next_observations",
        "rewards",
        "terminals",
    )
    with h5py.File(path) as file:
        columns = [file[name][::every] for name in names]
    if clipped:  # the file stores velocities clipped to +-10, so such states are not known
        known = np.all(np.abs(columns[1]) < 9.999, axis=1)
        columns = [column[known] for column in columns]
    return columns


def replay(env, columns):
    """One step from each stored state: observation errors, reward errors, terminals made."""
    env.reset(seed=0)
    raw = env.unwrapped
    errors = []
    reward_errors = []
    made = []
    for qpos, qvel, action, next_observation, stored_reward, _ in zip(*columns):
        mujoco.mj_resetData(raw.model, raw.data)  # forgets the solver's warm start
        raw.set_state(qpos.astype(np.float64), qvel.astype(np.float64))
        observation, reward, terminated, *_ = env.step(action)
        errors.append(np.abs(observation - next_observation).max())
        reward_errors.append(abs(reward - stored_reward))
        made.append(terminated)
    return np.array(errors), np.array(reward_errors), np.array(made)


def check_errors(name, errors, reward_errors, terminals):
    """All of them within what a file of float32 numbers can tell; they are printed."""
    median, largest, of_rewards = np.median(errors), max(errors), max(reward_errors)
    print(f"{name}: {len(errors)} rows, median {median:.2g}, max {largest:.2g}", end=", ")
    print(f"reward {of_rewards:.2g}, {terminals.sum()} terminals")
    assert median < 1e-6
    assert largest < 1e-4
    assert of_rewards < 1e-5


@pytest.mark.parametrize(
    ("robot", "clipped", "rows"),
    [("hopper", True, 761), ("walker2d", True, 1419), ("halfcheetah", False, 2000)],
)
def test_replay(robot, clipped, rows, real_data):
    """Every genuine transition is reproduced to the file's precision."""
    path = real_data / "real-samples" / f"{robot}_medium-v2.hdf5"
    columns = read_transitions(path, clipped)
    terminals = columns[-1]
    errors, reward_errors, made = replay(calql_sera.make_env(f"{robot}-medium-v2"), columns)
    assert len(errors) == rows
    check_errors(robot, errors, reward_errors, terminals)
    np.testing.assert_array_equal(made, terminals)
    assert terminals.any() or robot != "hopper"  # the one sample with terminals


@pytest.mark.parametrize(("file", "rows"), [("ant_medium_replay-v1", 70), ("ant_random-v1", 366)])
def test_replay_of_ant(file, rows, real_data):
    """Genuine rows, states by their own 27 dimensions; the rest of a stored state is zeros.

    A reward needs the step before it: it counts from where the torso was drawn, which lags behind.
    """
    names = ("observations", "actions", "next_observations", "rewards", "terminals", "timeouts")
    with h5py.File(real_data / "real-samples" / f"{file}.hdf5") as h5:
        columns = [h5[name][:] for name in names]
    states, actions, next_states = columns[:3]
    rewards, terminals, timeouts = [column.reshape(-1) for column in columns[3:]]
    assert len(states) == rows
    assert not states[:, 27:].any()
    env = calql_sera.make_env("ant-medium-v2")
    env.reset(seed=0)

    def step_from(row):
        state = states[row].astype(np.float64)
        mujoco.mj_resetData(env.unwrapped.model, env.unwrapped.data)
        env.unwrapped.set_state(np.concatenate([[0, 0], state[:13]]), state[13:27])
        return env.step(actions[row])

    errors, reward_errors = [], []
    for row in range(rows):
        observation, _, terminated, *_ = step_from(row)
        errors.append(np.abs(observation - next_states[row]).max())
        assert terminated == terminals[row]
        if row and not terminals[row - 1] and not timeouts[row - 1]:
            step_from(row - 1)
            reward_errors.append(abs(env.step(actions[row])[1] - rewards[row]))
    check_errors(file, errors, reward_errors, terminals)
    assert terminals.any()


@pytest.mark.parametrize(
    ("robot", "clipped"), [("hopper", True), ("walker2d", True), ("halfcheetah", False)]
)
def test_replay_fails_with_the_shipped_physics(robot, clipped, real_data):
    """The control: the same test tells Gymnasium's physics from D4RL's."""
    path = real_data / "real-samples" / f"{robot}_medium-v2.hdf5"
    env = calql_sera.make_env(f"{robot}-medium-v2", "gymnasium")
    errors, *_ = replay(env, read_transitions(path, clipped, every=10))
    print(f"{robot} as shipped: median {np.median(errors):.2g}, max {errors.max():.2g}")
    assert np.median(errors) > 1e-3
    assert errors.max() > 1e-2


# ------------------------------ evaluation
class Countdown:
    """Ends after some steps. Observes (seed, time), pays action + 100 time.

    Its return and length are in the last step's info, where RecordEpisodeStatistics puts them.
    """

    def __init__(self, length, truncates=False):
        self.length = length
        self.truncates = truncates

    def reset(self, seed=None):
        self.seed = seed
        self.time = 0
        self.paid = 0.0
        return np.array([seed, 0.0]), {}

    def step(self, action):
        self.time += 1
        assert self.time <= self.length, "stepped after its end"
        end = self.time == self.length
        reward = action[0] + 100 * self.time
        self.paid += reward
        info = {"episode": {"r": self.paid, "l": self.time}} if end else {}
        terminated = end and not self.truncates
        truncated = end and self.truncates
        return np.array([self.seed, float(self.time)]), reward, terminated, truncated, info


def test_evaluate():
    """Returns and lengths of unequal episodes; one policy call per step, each row its own."""
    seen = []

    def policy(observations):
        seen.append(observations.copy())
        return observations[:, :1]  # each environment's seed as its action

    envs = [Countdown(2), Countdown(4, truncates=True), Countdown(1)]
    returns, lengths, _ = calql_sera.evaluate(policy, envs, [7, 3, 5])
    assert returns.tolist() == [2 * 7 + 300, 4 * 3 + 1000, 5 + 100]
    assert lengths.tolist() == [2, 4, 1]
    assert len(seen) == 4
    for time, observations in enumerate(seen):
        assert observations.shape == (3, 2)
        assert observations[:, 0].tolist() == [7, 3, 5]  # the seeds, in order
        assert observations[1, 1] == time
    assert [observations[0, 1] for observations in seen[:2]] == [0, 1]


class WholeStart(Countdown):
    """It starts at whole numbers and goes on with others."""

    def reset(self, seed=None):
        super().reset(seed)
        return np.array([0, 0]), {}

    def step(self, action):
        _, *rest = super().step(action)
        return np.array([0.5, -0.25]), *rest


def test_start_of_whole_numbers(script):
    """An environment whose first state is made of integers: the later ones are not cut to such."""
    seen = []

    def policy(observations):
        seen.append(observations.tolist())
        return np.zeros((1, 1))

    script.evaluate(policy, [WholeStart(3)], [1])
    assert seen == [[[0, 0]], [[0.5, -0.25]], [[0.5, -0.25]]]


def test_evaluate_twice():
    """Nothing is carried over from one evaluation to the next, and seeds decide the result."""
    envs = [Countdown(3), Countdown(2)]

    def returns(seeds):
        result, _, _ = calql_sera.evaluate(lambda observations: observations[:, :1], envs, seeds)
        return result.tolist()

    assert returns([1, 2]) == [603, 304]
    assert returns([1, 2]) == [603, 304]
    assert returns([2, 1]) == [606, 302]


def test_evaluate_real_environments():
    """Episodes side by side give exactly the returns of the same episodes one by one."""

    def policy(observations):
        return np.tanh(observations[:, :3] + observations[:, 5:8])

    seeds = [1, 2, 3]
    envs = [calql_sera.make_env(HOPPER) for _ in seeds]
    returns, lengths, _ = calql_sera.evaluate(policy, envs, seeds)
    for number, seed in enumerate(seeds):
        alone = calql_sera.evaluate(policy, [calql_sera.make_env(HOPPER)], [seed])
        assert returns[number] == alone[0]
        assert lengths[number] == alone[1]
    assert len(set(returns)) == 3
