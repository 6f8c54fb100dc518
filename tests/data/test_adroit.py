"""Adroit: the environments against D4RL's code and genuine steps, and their data."""

import copy
import functools
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
import pytest
from conftest import ROOT
from gymnasium.utils import seeding
from gymnasium.utils.env_checker import check_env
from scipy import stats

import calql_sera

reason = "gymnasium-robotics, which has the models of the hand, is not installed"
gymnasium_robotics = pytest.importorskip("gymnasium_robotics", reason=reason)
gymnasium.register_envs(gymnasium_robotics)

from envs import adroit  # noqa: E402  (it needs the package)

ARM = {"pen": 0, "door": 4, "hammer": 2, "relocate": 6}  # joints before the hand's 24
OBJECTS = {"pen": 6, "door": 2, "hammer": 7, "relocate": 6}  # joints behind them
SAMPLES = {
    "pen": ("human-v0", "human-v1", "cloned-v0", "cloned-v1", "expert-v0", "expert-v1"),
    "door": ("human-v0", "human-v1", "cloned-v0", "cloned-v1", "expert-v0", "expert-v1"),
    "relocate": ("human-v0", "human-v1", "cloned-v0", "expert-v0", "expert-v1"),
}
OFF = mujoco.mjtDisableBit


@pytest.fixture(params=adroit.TASKS)
def task(request):
    """The name of each task in turn."""
    return request.param


PLACES = ("body_pos", "body_quat", "site_pos")  # arrays of a model in which objects are put


@functools.cache
def made(env_id):
    """The environment of an id, without wrappers, and its places."""
    env = gymnasium.make(env_id, disable_env_checker=True).unwrapped
    return env, {name: getattr(env.model, name).copy() for name in PLACES}


def make(env_id):
    """The environment of an id as if new; one for all tests, as models take time."""
    env, places = made(env_id)
    for name, array in places.items():
        getattr(env.model, name)[:] = array
    return env


def start(env_id, seed=0):
    """An environment after a reset."""
    env = make(env_id)
    env.reset(seed=seed)
    return env


def human(task):
    """The id of a task that the tests use."""
    return f"{task}-human-v1"


def still(env):
    """An action of the right size."""
    return np.zeros(env.model.nu, dtype=np.float32)


# ------------------------------ D4RL's own code
def package():
    """The folder of the d4rl package; without it the test is skipped."""
    spec = importlib.util.find_spec("d4rl")
    if spec is None:
        pytest.skip("the d4rl package is not installed")
    return Path(spec.submodule_search_locations[0])


def load(path, name):
    """One file as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OldModel:
    """A model as mujoco_py has it: ids by name."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        if name.endswith("_name2id"):
            kind = name.removesuffix("_name2id")
            return lambda element: getattr(self.model, kind)(element).id
        return getattr(self.model, name)


class OldData:
    """Its data as mujoco_py has them: positions of bodies by other names."""

    def __init__(self, data):
        self.data = data

    def __getattr__(self, name):
        return getattr(self.data, {"body_xpos": "xpos", "body_xquat": "xquat"}.get(name, name))


class OldEnv:
    """Stands for mjrl's MujocoEnv; steps are taken by another environment, and copied."""

    other = None

    def __init__(self, path, frame_skip):
        model = copy.copy(self.other.model)
        data = mujoco.MjData(model)
        self.frame_skip = frame_skip
        self.model = OldModel(model)
        self.data = OldData(data)
        self.sim = types.SimpleNamespace(
            model=self.model,
            data=self.data,
            forward=lambda: mujoco.mj_forward(model, data),
            reset=lambda: mujoco.mj_resetData(model, data),
        )
        self.init_qpos, self.init_qvel = data.qpos.copy(), data.qvel.copy()
        self.sim.forward()
        self.action_space = self.other.action_space
        self.np_random, _ = seeding.np_random(0)

    def set_state(self, qpos, qvel):
        self.data.qpos[:] = qpos
        self.data.qvel[:] = qvel
        self.sim.forward()

    def do_simulation(self, control, frame_skip):
        np.testing.assert_array_equal(self.other.data.ctrl, control)
        assert frame_skip == self.other.frame_skip == 5
        mujoco.mj_copyData(self.data.data, self.other.model, self.other.data)


@pytest.fixture
def original(monkeypatch):
    """D4RL's environment by task, around ours: its code, with the modules it imports replaced."""
    folder = package()
    gym = types.ModuleType("gym")
    gym.utils = types.SimpleNamespace(EzPickle=type("EzPickle", (), {}))
    gym.spaces = gymnasium.spaces
    mjrl, envs, mujoco_py = (types.ModuleType(name) for name in ("mjrl", "envs", "mujoco_py"))
    envs.mujoco_env = types.SimpleNamespace(MujocoEnv=OldEnv)
    mujoco_py.MjViewer = None
    d4rl, utils = types.ModuleType("d4rl"), types.ModuleType("utils")
    d4rl.offline_env = types.SimpleNamespace(OfflineEnv=type("OfflineEnv", (), {}))
    modules = {"gym": gym, "mjrl": mjrl, "mjrl.envs": envs, "mujoco_py": mujoco_py}
    modules |= {"d4rl": d4rl, "d4rl.utils": utils}
    modules["d4rl.utils.quatmath"] = load(folder / "utils" / "quatmath.py", "quatmath")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def build(task):
        monkeypatch.setattr(OldEnv, "other", make(human(task)))
        module = load(folder / "hand_manipulation_suite" / f"{task}_v0.py", f"{task}_v0")
        return getattr(module, f"{task.capitalize()}EnvV0")()

    return build


def test_steps_of_the_package(original, task):
    """Controls, observations, rewards, ends and successes of its code, on the way of ours."""
    env, old = make(human(task)), original(task)
    rng = np.random.default_rng(0)
    for seed in range(4):
        observation, _ = env.reset(seed=seed)
        old.np_random, _ = seeding.np_random(seed)
        np.testing.assert_allclose(observation, old.reset_model(), rtol=1e-9, atol=1e-12)
        for _ in range(20):
            action = rng.uniform(-2, 2, env.model.nu)
            observation, reward, terminated, truncated, info = env.step(action)
            old_observation, old_reward, done, old_info = old.step(action)
            np.testing.assert_allclose(observation, old_observation, rtol=1e-9, atol=1e-12)
            assert reward == pytest.approx(old_reward, abs=1e-12)
            assert (terminated, truncated) == (done, False)
            assert info["success"] == old_info["goal_achieved"]


def near_the_goal(env, rng):
    """A random state of which many are close to success, and some beyond."""
    env.reset(seed=int(rng.integers(1000)))
    qpos = env.init_qpos + rng.uniform(-0.1, 0.1, env.model.nq)
    qvel = rng.normal(size=env.model.nv)
    if env.task == "pen":
        turned = env.model.body("target").quat
        mujoco.mju_euler2Quat(turned, [0, 1.57 + rng.uniform(-0.6, 0.6), 0], "xyz")
        qpos[-6:-3] = rng.uniform((-0.06, -0.06, -0.06), (0.2, 0.06, 0.06))
    elif env.task == "door":
        qpos[-2] = rng.uniform(0, 1.57)
    elif env.task == "hammer":
        qpos[-7] = rng.uniform(0.06, 0.09)
        qpos[-6:] = rng.uniform(-2, 2, 6)
    else:
        env.model.body("Object").pos[2] = rng.uniform(0.03, 0.3)
        ball = env.model.body("Object").pos + qpos[-6:-3]
        env.model.site("target").pos[:] = ball + rng.uniform(-0.08, 0.08, 3)
    env.set_state(qpos, qvel)


def test_bonuses_of_the_package(original, task):
    """Its observations and rewards for 200 states near the goal, each kind of bonus among them."""
    env, old = make(human(task)), original(task)
    rng = np.random.default_rng(1)
    bonuses = {"pen": (10, 60, -5), "door": (2, 10, 20), "hammer": (2, 25, 100)}
    seen = set()
    for _ in range(200):
        near_the_goal(env, rng)
        reward, success, failure = env.judge()
        env.data.ctrl[:] = env.middle
        old_observation, old_reward, done, old_info = old.step(still(env))
        np.testing.assert_allclose(env.observe(), old_observation, rtol=1e-9, atol=1e-12)
        assert reward == pytest.approx(old_reward, abs=1e-12)
        assert (success, failure) == (old_info["goal_achieved"], done)
        seen.add(round(reward))
    for bonus in bonuses.get(task, (10, 30)):
        assert any(abs(reward - bonus) < 3 for reward in seen), (bonus, seen)


def test_model_of_the_package(task, tmp_path):
    """Its MJCF, compiled: ours but for half the margins, and the ways of contacts."""
    folder = package() / "hand_manipulation_suite"
    (tmp_path / "assets").mkdir()
    (tmp_path / "Adroit").symlink_to(folder / "Adroit")
    for path in (folder / "assets").glob("*.xml"):
        text = path.read_text().replace('apirate="200"', "")  # which MuJoCo no longer knows
        (tmp_path / "assets" / path.name).write_text(text)
    theirs = mujoco.MjModel.from_xml_path(str(tmp_path / "assets" / f"DAPG_{task}.xml"))
    ours = gymnasium.make(human(task)).unwrapped.model  # as it is before a reset
    arrays = {
        "body": "parentid pos quat mass inertia ipos iquat mocapid invweight0",
        "jnt": "type bodyid pos axis range limited stiffness margin solref solimp",
        "dof": "armature damping frictionloss invweight0",
        "geom": "type bodyid size pos quat contype conaffinity condim friction solref solimp gap",
        "pair": "geom1 geom2 dim friction solref solimp margin gap",
        "tendon": "range limited margin stiffness damping frictionloss",
        "actuator": "trnid gainprm biasprm gaintype biastype ctrllimited ctrlrange forcelimited",
        "sensor": "type objid adr",
        "site": "bodyid pos quat",
    }
    for kind, names in arrays.items():
        for name in names.split():
            first, second = (getattr(model, f"{kind}_{name}") for model in (ours, theirs))
            np.testing.assert_array_equal(first, second, err_msg=f"{kind}_{name}")
    np.testing.assert_array_equal(2 * ours.geom_margin, theirs.geom_margin)
    np.testing.assert_array_equal(ours.qpos0, theirs.qpos0)
    options = "timestep integrator gravity cone solver iterations tolerance noslip_iterations"
    for option in (*options.split(), "impratio", "noslip_tolerance", "enableflags"):
        first, second = getattr(ours.opt, option), getattr(theirs.opt, option)
        np.testing.assert_array_equal(first, second, err_msg=option)
    off = OFF.mjDSBL_NATIVECCD | OFF.mjDSBL_MULTICCD | OFF.mjDSBL_ISLAND
    assert ours.opt.disableflags == theirs.opt.disableflags | off


def test_names_of_the_package():
    """All of its ids of v0 and v1 and no others, their files and their reference scores."""
    infos = load(package() / "infos.py", "d4rl_infos")
    expected = {}
    for env_id, address in infos.DATASET_URLS.items():
        if env_id.split("-")[0] in adroit.TASKS:
            expected[env_id] = address
    assert len(expected) == 24
    assert adroit.DATASETS.keys() == expected.keys() | set(adroit.BINARY)
    for env_id, address in expected.items():
        known = calql_sera.find_task(env_id)
        assert f"http://{calql_sera.SERVER}/{known.file}" == address
        assert known.random_return == infos.REF_MIN_SCORE[env_id]
        assert known.expert_return == infos.REF_MAX_SCORE[env_id]


# ------------------------------ names, spaces, time
def test_ids_by_hand():
    """Three kinds of two versions for four tasks, three binary ones; some files; horizons."""
    assert len(adroit.DATASETS) == 24 + 3
    files = {env_id: task.get("file") for env_id, task in adroit.DATASETS.items()}
    assert files["pen-cloned-v1"] == "hand_dapg_v1/pen-cloned-v1.hdf5"
    assert files["door-human-v0"] == "hand_dapg/door-v0_demos_clipped.hdf5"
    assert files["relocate-cloned-v0"] == "hand_dapg/relocate-demos-v0-bc-combined.hdf5"
    assert files["hammer-expert-v0"] == "hand_dapg/hammer-v0_expert_clipped.hdf5"
    assert adroit.BINARY == ("pen-binary-v0", "door-binary-v0", "relocate-binary-v0")
    for env_id in adroit.BINARY:
        assert files[env_id] is None
        assert calql_sera.find_task(env_id).random_return is None
    for env_id in adroit.DATASETS:
        spec = gymnasium.spec(env_id)
        assert spec.max_episode_steps == (100 if env_id.startswith("pen") else 200)
        assert spec.kwargs == {"binary": "-binary-" in env_id}
        assert spec.entry_point.task == env_id.split("-")[0]


@pytest.mark.parametrize(
    ("task", "observation", "action"),
    [("pen", 45, 24), ("door", 39, 28), ("hammer", 46, 26), ("relocate", 39, 30)],
)
def test_spaces(task, observation, action):
    """Widths of observations and actions, of the table too; actions from -1 to 1."""
    env = make(human(task))
    first, info = env.reset(seed=0)
    assert info == {}
    assert env.observation_space.shape == first.shape == (observation,)
    assert first.dtype == np.float64
    space = env.action_space
    assert (space.shape, space.dtype) == ((action,), np.float32)
    assert (space.low.min(), space.high.max()) == (-1, 1)
    known = adroit.TASKS[task]
    assert (known.observation_dim, known.action_dim) == (observation, action)
    assert env.model.nq == ARM[task] + 24 + OBJECTS[task]


def test_time(task):
    """Five steps of 0.002 s."""
    env = start(human(task))
    assert env.dt == pytest.approx(0.01)
    env.step(still(env))
    assert env.data.time == pytest.approx(0.01)


def test_horizons():
    """Cut after 100 steps (pen, held here by hand) and 200 (door), and not by the environment."""
    for task, horizon in (("pen", 100), ("door", 200)):
        env = gymnasium.make(human(task))
        raw = env.unwrapped
        env.reset(seed=0)
        ends = []
        for _ in range(horizon):
            raw.set_state(raw.init_qpos, raw.init_qvel)
            ends.append(env.step(still(raw))[2:4])
        assert ends == [(False, False)] * (horizon - 1) + [(False, True)]
        assert raw.step(still(raw))[3] is False


def test_actions(task):
    """-1, 0 and 1 are the ends and the middle of a joint's range; beyond, actions are clipped."""
    env = start(human(task))
    low, high = env.model.actuator_ctrlrange.T
    cases = {-1: low, 0: (low + high) / 2, 1: high, 7: high, -7: low, 0.5: low / 4 + 3 * high / 4}
    for action, control in cases.items():
        env.reset(seed=0)
        env.step(np.full(env.model.nu, action, dtype=np.float32))
        np.testing.assert_allclose(env.data.ctrl, control, atol=1e-12)
    names = [env.model.actuator(i).name for i in range(env.model.nu)]
    joints = [env.model.joint(env.model.actuator_trnid[i, 0]).name for i in range(env.model.nu)]
    assert names == [f"A_{joint}" for joint in joints]
    assert joints == [env.model.joint(i).name for i in range(env.model.nu)]


def test_scores():
    """0 and 100 by hand, from D4RL's constants."""
    for task, low, high in (
        ("pen", 96.262799, 3076.8331017826877),
        ("door", -56.512833, 2880.5693087298737),
        ("hammer", -274.856578, 12794.134825156867),
        ("relocate", -6.425911, 4233.877797728884),
    ):
        assert (adroit.TASKS[task].random_return, adroit.TASKS[task].expert_return) == (low, high)


# ------------------------------ observations
def split(observation, *widths):
    """The parts of an observation."""
    parts = np.split(observation, np.cumsum(widths))
    assert len(parts[-1]) == 0
    return parts[:-1]


def test_layout():
    """What each number is, in a state in which all differ."""
    for task in adroit.TASKS:
        env = start(human(task))
        rng = np.random.default_rng(0)
        qpos = env.init_qpos + rng.uniform(-0.3, 0.3, env.model.nq)
        qvel = rng.uniform(-2, 2, env.model.nv)
        env.set_state(qpos, qvel)
        observation = env.observe()
        palm = env.data.site("S_grasp").xpos
        if task == "pen":
            parts = split(observation, 24, 3, 6, 3, 3, 3, 3)
            pen, goal = env.data.body("Object").xpos, (0, -0.2, 0.25)
            along = env.data.body("Object").xmat.reshape(3, 3)[:, 2]
            wanted = env.data.body("target").xmat.reshape(3, 3)[:, 2]
            expected = [qpos[:24], pen, qvel[24:], along, wanted, pen - goal, along - wanted]
        elif task == "door":
            parts = split(observation, 27, 1, 1, 3, 3, 3, 1)
            handle = env.data.site("S_handle").xpos
            expected = [qpos[1:28], qpos[29:], qpos[28:29], palm, handle, palm - handle, [-1]]
            assert [env.model.joint(i).name for i in (28, 29)] == ["door_hinge", "latch"]
        elif task == "hammer":
            parts = split(observation, 26, 1, 6, 3, 3, 3, 3, 1)
            hammer = env.data.body("Object").xpos
            nail = env.data.site("S_target").xpos
            quat = np.empty(4)  # of the angles observed: turn x, then the new y, then the new z
            mujoco.mju_euler2Quat(quat, parts[5], "xyz")
            assert abs(quat @ env.data.body("Object").xquat) == pytest.approx(1)
            speed = np.clip(qvel[27:], -1, 1)
            assert (np.abs(speed) == 1).any()
            expected = [qpos[:26], qpos[26:27], speed, palm, hammer, parts[5], nail, [0]]
            assert env.model.joint(26).name == "nail_dir"
        else:
            parts = split(observation, 30, 3, 3, 3)
            ball, goal = env.data.body("Object").xpos, env.data.site("target").xpos
            expected = [qpos[:30], palm - ball, palm - goal, ball - goal]
        for part, value in zip(parts, expected):
            np.testing.assert_allclose(part, value, atol=1e-9)


def test_door_is_open():
    """The last number is 1 beyond one radian, else -1."""
    env = start("door-human-v1")
    for hinge, flag in ((0, -1), (0.99, -1), (1.01, 1), (1.5, 1)):
        env.data.qpos[-2] = hinge
        assert env.observe()[-1] == flag


def test_a_blow_is_felt():
    """The last number of hammer is what the nail's head feels, up to 1."""
    env = start("hammer-human-v1")
    assert env.observe()[-1] == 0
    for force, felt in ((0.25, 0.25), (40, 1)):
        env.data.sensor("S_nail").data[:] = force
        assert env.observe()[-1] == felt


# ------------------------------ starts
def starts(task, count=300):
    """What is drawn anew in that many episodes, (count, numbers)."""
    env = start(human(task))
    drawn = []
    for _ in range(count):
        env.reset()
        np.testing.assert_array_equal(env.data.qpos, env.model.qpos0)
        assert not env.data.qvel.any()
        if task == "pen":
            x, y, z = env.data.body("target").xmat.reshape(3, 3)[:, 2]
            drawn.append([np.arctan2(-y, z), np.arcsin(x)])
        elif task == "door":
            drawn.append(env.model.body("frame").pos.copy())
        elif task == "hammer":
            drawn.append(env.model.body("nail_board").pos.copy())
        else:
            ball, goal = env.model.body("Object").pos, env.model.site("target").pos
            drawn.append([*ball, *goal])
    return np.array(drawn)


@pytest.mark.parametrize(
    ("task", "low", "high"),
    [
        ("pen", [-1, -1], [1, 1]),
        ("door", [-0.3, 0.25, 0.252], [-0.2, 0.35, 0.35]),
        ("hammer", [0.05, 0, 0.1], [0.05, 0, 0.25]),
        ("relocate", [-0.15, -0.15, 0.035, -0.2, -0.2, 0.15], [0.15, 0.3, 0.035, 0.2, 0.2, 0.35]),
    ],
)
def test_starts(task, low, high):
    """Uniform within D4RL's bounds, each number by itself; joints as in the model."""
    drawn = starts(task)
    for column, first, last in zip(drawn.T, low, high):
        if first == last:
            np.testing.assert_array_equal(column, first)
            continue
        assert first <= column.min() < first + 0.03 * (last - first)
        assert last - 0.03 * (last - first) < column.max() <= last
        assert stats.kstest(column, stats.uniform(first, last - first).cdf).pvalue > 1e-3
    varying = drawn[:, np.ptp(drawn, axis=0) > 0]
    if varying.shape[1] > 1:
        correlations = np.corrcoef(varying.T) - np.eye(varying.shape[1])
        assert np.abs(correlations).max() < 0.2


def test_seeds(task):
    """A seed decides the start, whatever came before."""
    env = start(human(task))
    first, _ = env.reset(seed=5)
    for _ in range(3):
        env.step(env.action_space.sample())
    other, _ = env.reset(seed=6)
    again, _ = env.reset(seed=5)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


# ------------------------------ rewards and ends, by hand
@pytest.mark.parametrize(
    ("up", "angle", "reward", "success", "dropped"),
    [
        (0, 0.5, 0.877583, False, False),
        (0, 0.4, 0.921061 + 10, False, False),
        (0, 0.2, 0.980067 + 60, True, False),
        (0.07, 0.2, 0.980067 - 0.07 + 60, True, False),
        (0.08, 0.2, 0.980067 - 0.08, False, False),
        (-0.174, 0.2, 0.980067 - 0.174, False, False),
        (-0.176, 0.2, 0.980067 - 0.176 - 5, False, True),
        (0, 3.0, -0.989992, False, False),
    ],
)
def test_pen(up, angle, reward, success, dropped):
    """cos(angle) - distance; 10 above 0.9 and 50 above 0.95, within 7.5 cm; below 7.5 cm -5."""
    env = start("pen-human-v1")
    mujoco.mju_euler2Quat(env.model.body("target").quat, [0, 1.57 - angle, 0], "xyz")
    qpos = env.init_qpos.copy()
    qpos[24] = -up  # the pen lies along x: its own x is down
    env.set_state(qpos, env.init_qvel)
    assert env.item()[2] == pytest.approx(0.25 + up, abs=1e-6)
    judged = env.judge()
    assert judged == (pytest.approx(reward, abs=1e-3 * abs(up) + 1e-6), success, dropped)


@pytest.mark.parametrize(
    ("hinge", "bonus", "success"),
    [
        (0.0, 0, False),
        (0.19, 0, False),
        (0.21, 2, False),
        (0.99, 2, False),
        (1.01, 10, False),
        (1.34, 10, False),
        (1.36, 20, True),
        (1.57, 20, True),
    ],
)
def test_door(hinge, bonus, success):
    """-0.1 distance of 0.5 m, -0.1 (hinge - 1.57)^2, -1e-5 of the squared speeds; the bonus."""
    env = start("door-human-v1")
    qpos, qvel = env.init_qpos.copy(), env.init_qvel.copy()
    qpos[-2] = hinge
    qvel[[0, -1]] = 30, -40
    env.set_state(qpos, qvel)
    away = env.point("S_grasp") + (0.3, 0, 0.4) - env.point("S_handle")
    env.model.body("frame").pos[:] += away
    env.set_state(qpos, qvel)
    expected = -0.05 - 0.1 * (hinge - 1.57) ** 2 - 0.025 + bonus
    assert env.judge() == (pytest.approx(expected, abs=1e-9), success, False)


@pytest.mark.parametrize(
    ("nail", "up", "bonus", "success"),
    [
        (0.0, 0, 0, False),
        (0.07, 0, 0, False),  # 21 mm stick out
        (0.072, 0, 25, False),
        (0.08, 0, 25, False),
        (0.082, 0, 100, True),
        (0.082, 0.3, 102, True),
        (0.0, 0.3, 2, False),
        (0.0, 0.006, 2, False),  # 4.1 cm high
        (0.0, 0.004, 0, False),
    ],
)
def test_hammer(nail, up, bonus, success):
    """-0.1 palm to hammer, - head to nail, -10 times what sticks out, -0.01 speed; the bonus."""
    env = start("hammer-human-v1")
    qpos, qvel = env.init_qpos.copy(), env.init_qvel.copy()
    qpos[26] = nail
    turned = env.data.body("Object").xmat.reshape(3, 3)
    hammer = np.array([-0.3, 0.1, 0.035 + up])
    qpos[27:30] = turned.T @ (hammer - env.model.body("Object").pos)
    qvel[[0, 27]] = 3, 4
    env.set_state(qpos, qvel)
    np.testing.assert_allclose(env.item(), hammer, atol=1e-9)
    head, palm = env.point("tool"), env.point("S_grasp")
    assert head[2] == pytest.approx(0.035 + up, abs=1e-4)
    env.model.body("nail_board").pos[:] += head + (0.6, 0, 0.8) - env.point("S_target")
    env.set_state(qpos, qvel)
    expected = -0.1 * np.linalg.norm(palm - hammer) - 1 - 10 * (0.091 - nail) - 0.05 + bonus
    assert env.judge() == (pytest.approx(expected, abs=1e-6), success, False)


@pytest.mark.parametrize(
    ("height", "away", "expected", "success"),
    [
        (0.035, 0.5, -0.05, False),
        (0.039, 0.5, -0.05, False),
        (0.041, 0.5, -0.05 + 1 - 0.5 - 0.25, False),
        (0.3, 0.11, -0.05 + 1 - 0.305 - 0.055, False),
        (0.3, 0.09, -0.05 + 1 - 0.295 - 0.045 + 10, True),
        (0.3, 0.06, -0.05 + 1 - 0.28 - 0.03 + 10, True),
        (0.3, 0.04, -0.05 + 1 - 0.27 - 0.02 + 30, True),
        (0.035, 0.04, -0.05 + 30, True),
    ],
)
def test_relocate(height, away, expected, success):
    """-0.1 palm to ball; in the air 1, -0.5 palm to goal, -0.5 ball to goal; the bonus."""
    env = start("relocate-human-v1")
    palm = env.point("S_grasp")
    sideways = np.sqrt(0.5**2 - (height - palm[2]) ** 2)
    ball = np.array([palm[0] + sideways, palm[1], height])  # 0.5 m from the palm
    goal = palm + (ball - palm) * (1 + away / 0.5)
    env.model.body("Object").pos[:] = ball
    env.model.site("target").pos[:] = goal
    env.set_state(env.init_qpos, env.init_qvel)
    assert env.judge() == (pytest.approx(expected, abs=1e-9), success, False)


def test_step_returns_what_is_judged(task):
    """Reward, end and success are those of the state that a step leads to, of plain types."""
    env = start(human(task))
    for _ in range(5):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert (reward, info["success"], terminated) == env.judge()
        np.testing.assert_array_equal(observation, env.observe())
        kinds = [type(value) for value in (reward, terminated, truncated, info["success"])]
        assert kinds == [float, bool, bool, bool]


def drop(env):
    """Put the pen below the hand, where it falls to the table."""
    qpos = env.init_qpos.copy()
    qpos[24:27] = 0.17, 0.3, 0  # its own axes: 17 cm down, 30 cm away from the arm
    env.set_state(qpos, env.init_qvel)


def test_only_a_dropped_pen_ends_the_episode():
    """It does, and costs 5; an opened door, a driven nail and a ball at its goal do not."""
    env = start("pen-human-v1")
    drop(env)
    rewards, ends = zip(*(env.step(still(env))[1:3] for _ in range(12)))
    first = ends.index(True)
    assert 0 < first < 12
    assert rewards[first] < rewards[first - 1] - 4.9
    for task in ("door", "hammer", "relocate"):
        env = start(human(task))
        for _ in range(3):
            reach(env)
            *_, terminated, truncated, info = env.step(still(env))
            assert (terminated, truncated, info["success"]) == (False, False, True)


def reach(env):
    """Put an environment at its goal."""
    qpos = env.init_qpos.copy()
    if env.task == "pen":
        mujoco.mju_euler2Quat(env.model.body("target").quat, [0, 1.57, 0], "xyz")
    elif env.task == "door":
        qpos[-2] = 1.5
    elif env.task == "hammer":
        qpos[26] = 0.085
    else:
        env.model.body("Object").pos[2] = 0.2
        env.model.site("target").pos[:] = env.model.body("Object").pos
    env.set_state(qpos, env.init_qvel)


@pytest.mark.parametrize("env_id", adroit.BINARY)
def test_binary(env_id):
    """-1 and no end away from the goal, 0 and the end at it; the same physics and observations."""
    env, dense = start(env_id, seed=3), start(human(env_id.split("-")[0]), seed=3)
    for _ in range(3):
        observation, reward, terminated, truncated, info = env.step(still(env))
        same, *_ = dense.step(still(env))
        np.testing.assert_array_equal(observation, same)
        assert (reward, terminated, truncated, info["success"]) == (-1.0, False, False, False)
    reach(env)
    _, reward, terminated, truncated, info = env.step(still(env))
    assert (reward, terminated, truncated, info["success"]) == (0.0, True, False, True)
    assert type(reward) is float


def test_a_dropped_pen_stays_in_binary():
    """In AWAC's and Cal-QL's pen task the episode goes on without it."""
    env = start("pen-binary-v0")
    drop(env)
    ends = [env.step(still(env))[1:3] for _ in range(12)]
    assert env.item()[2] < 0.075
    assert ends == [(-1.0, False)] * 12


def test_demonstrations_of_awac(real_data):
    """By its states each of AWAC's 25 human demonstrations succeeds, by its rewards 17 do."""
    demos = np.load(real_data / "adroit" / "pen2_sparse_awac_demos.npz")
    states = demos["next_observations"].astype(np.float64)
    axis, goal_axis, away = states[..., 33:36], states[..., 36:39], states[..., 39:42]
    aligned = (axis * goal_axis).sum(-1) > 0.95
    reached = aligned & (np.linalg.norm(away, axis=-1) < 0.075)
    paid = demos["rewards"][:, :199] == 0
    assert (reached.any(1).sum(), paid.any(1).sum()) == (25, 17)
    assert (reached != paid).sum() == 1721  # of 4975
    assert (reached != paid)[8].sum() == 0


# ------------------------------ contacts
def test_margins_and_flags(task):
    """Half the margins, and contacts as MuJoCo 2 found them."""
    env = make(human(task))
    shipped = mujoco.MjModel.from_xml_path(env.fullpath)
    np.testing.assert_array_equal(env.model.geom_margin, shipped.geom_margin / 2)
    assert shipped.geom_margin.max() == 0.0005
    assert env.model.opt.disableflags == 917504  # bits 17 to 19
    assert OFF.mjDSBL_NATIVECCD | OFF.mjDSBL_MULTICCD | OFF.mjDSBL_ISLAND == 917504


def test_no_inertia_comes_from_a_capsule(task):
    """MuJoCo's change of their masses makes no difference: cylinders in their place weigh alike."""
    env = make(human(task))
    spec = mujoco.MjSpec.from_file(env.fullpath)
    capsules = [geom for geom in spec.geoms if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE]
    assert len(capsules) >= 16
    for geom in capsules:
        geom.type = mujoco.mjtGeom.mjGEOM_CYLINDER
        geom.size[1] += geom.size[0] / 2
    old = spec.compile()
    for name in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        np.testing.assert_array_equal(getattr(old, name), getattr(env.model, name), err_msg=name)


@pytest.mark.parametrize("height", [0.02, -0.005])
def test_depth_in_a_box(height):
    """The table feels a ball as deep as it is, but never deeper than its radius of 3.5 cm."""
    env = start("relocate-human-v1")
    env.model.body("Object").pos[:] = 0.2, 0.2, height
    env.set_state(env.init_qpos, env.init_qvel)
    shipped = -env.data.contact.dist.min()
    assert shipped == pytest.approx(0.035 - height)  # found by mj_forward
    env.do_simulation(env.middle, 1)
    assert -env.data.contact.dist.min() == pytest.approx(min(shipped, 0.035), abs=1e-9)
    speed = env.data.qvel[-4]
    by_hand = speed_of(env, height, min(shipped, 0.035))
    assert speed == pytest.approx(by_hand, rel=1e-6)


def speed_of(env, height, depth):
    """How fast the ball leaves the table if it is felt to be that deep."""
    raw = copy.deepcopy(env)
    raw.reset(seed=0)
    raw.model.body("Object").pos[:] = 0.2, 0.2, 0.035 - depth
    raw.set_state(raw.init_qpos, raw.init_qvel)
    mujoco.mj_step(raw.model, raw.data)
    return raw.data.qvel[-4]


# ------------------------------ copies and pictures
def test_copies(task):
    """A pickled or deeply copied environment goes the same way."""
    env_id = "pen-binary-v0" if task == "pen" else human(task)
    env = gymnasium.make(env_id)
    actions = np.random.default_rng(0).uniform(-1, 1, (3, env.action_space.shape[0]))
    for duplicate in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        other = duplicate(env)
        assert other.unwrapped is not env.unwrapped
        ways = []
        for one in (env, other):
            one.reset(seed=3)
            ways.append([one.step(action)[:2] for action in actions.astype(np.float32)])
        for (first, reward), (second, other_reward) in zip(*ways):
            np.testing.assert_array_equal(first, second)
            assert reward == other_reward


@pytest.mark.filterwarnings("ignore:.*infinity")
def test_gymnasium_contract(task):
    """Gymnasium's own checker has no complaint: seeds, spaces, types and determinism."""
    check_env(gymnasium.make(human(task)).unwrapped, skip_render_check=True)


RENDER = """
import sys
try:
    import mujoco
    mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16).render()
except BaseException as error:
    sys.exit(f"no backend: {error}")
import numpy as np
import gymnasium, envs.adroit
pictures = []
for id in sys.argv[2:]:
    env = gymnasium.make(id, render_mode="rgb_array")
    for seed in (0, 1, 1):
        env.reset(seed=seed)
        pictures.append(env.render())
    env.close()
np.save(sys.argv[1], pictures)
"""


def test_pictures(tmp_path):
    """rgb_array shows the hand, which is skin-coloured, and what differs between two starts."""
    errors = []
    for backend in ("egl", "osmesa"):
        ids = [human(task) for task in adroit.TASKS]
        command = [sys.executable, "-c", RENDER, str(tmp_path / "pictures.npy"), *ids]
        environment = os.environ | {"MUJOCO_GL": backend, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if "no backend" not in done.stderr:
            break
        errors.append(f"{backend}: {done.stderr.splitlines()[-1]}")
    else:
        pytest.skip("MuJoCo finds no way to draw here: " + "; ".join(errors))
    assert done.returncode == 0, done.stderr
    pictures = np.load(tmp_path / "pictures.npy").astype(int)
    assert pictures.shape == (12, 480, 480, 3)
    for first, other, again in pictures.reshape(4, 3, 480, 480, 3):
        red, green, blue = np.moveaxis(first, 2, 0)
        skin = (red > green + 20) & (green > blue + 20) & (green > 60)
        assert 0.005 < skin.mean() < 0.2
        np.testing.assert_array_equal(other, again)
        changed = np.argwhere(np.abs(first - other).max(2) > 30)
        assert 100 < len(changed) < 0.3 * 480**2
        assert changed.min() >= 5


# ------------------------------ without gymnasium-robotics
def test_package_missing(monkeypatch):
    """One sentence that says what to install: the version the tests have."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(gymnasium.error.DependencyNotInstalled) as caught:
        load(ROOT / "envs" / "adroit.py", "adroit_alone")
    message = str(caught.value)
    assert "\n" not in message
    *_, install = message.partition("pip install ")
    assert install in (ROOT / "tests" / "requirements.txt").read_text().split()
    assert isinstance(caught.value, gymnasium.error.Error)  # which the scripts report and end


def test_the_package_is_not_imported():
    """Its files are used without its code, which brings much along and talks."""
    command = "import sys, envs.adroit; sys.exit('gymnasium_robotics' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-B", "-c", command], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ------------------------------ replay of genuine steps
def read(path):
    """The arrays of a data file that a replay needs, in float64."""
    names = ("observations", "actions", "rewards", "infos/qpos", "infos/qvel")
    with h5py.File(path) as file:
        data = {name.removeprefix("infos/"): file[name][:] for name in names}
        data["ends"] = file["terminals"][:].astype(bool) | file["timeouts"][:].astype(bool)
    return {name: array if name == "ends" else array.astype(float) for name, array in data.items()}


def put(env, qpos, qvel):
    """Into a state, without the solver's warm start."""
    mujoco.mj_resetData(env.model, env.data)
    env.set_state(qpos, qvel)


def put_objects(env, task, observation, qpos, qvel):
    """Put what was drawn at an episode's start where that start's observation has it."""
    model = env.model
    if task == "pen":
        x, y, z = observation[36:39]
        quat = model.body("target").quat
        mujoco.mju_euler2Quat(quat, [np.arctan2(-y, z), np.arcsin(x), 0], "xyz")
        return
    if task == "door":
        put(env, qpos, qvel)
        away = observation[32:35] - env.data.site("S_handle").xpos
        model.body("frame").pos[:] += away
        return
    put(env, qpos, qvel)
    palm = env.data.site("S_grasp").xpos.copy()
    model.body("Object").pos[:] = palm - observation[30:33] - qpos[-6:-3]
    model.site("target").pos[:] = palm - observation[33:36]


def replay(env, task, data, every=1):
    """One step from each stored state: errors of observations and of rewards, and the rows.

    Timeouts of v0's human and cloned data cut episodes that go on: joints that all rest tell a
    start. Rows at an end are left out, as the next state is not in the file.
    """
    env.reset(seed=0)
    rests = ~data["qvel"].any(1)
    errors, reward_errors, rows = [], [], []
    for row, observation in enumerate(data["observations"][:-1]):
        state = data["qpos"][row], data["qvel"][row]
        if rests[row] or task == "pen":  # pen's goal is in each observation
            put_objects(env, task, observation, *state)
        if data["ends"][row] or row % every:
            continue
        put(env, *state)
        next_observation, reward, *_ = env.step(data["actions"][row].astype(np.float32))
        errors.append(np.abs(next_observation - data["observations"][row + 1]).max())
        reward_errors.append(abs(reward - data["rewards"][row]))
        rows.append(row)
    return np.array(errors), np.array(reward_errors), np.array(rows)


def summary(errors):
    """Median, 99th percentile and maximum."""
    return " | ".join(f"{np.quantile(errors, share):.2g}" for share in (0.5, 0.99, 1))


def samples(*kinds):
    """Task and kind of the genuine files, of the given kinds or all."""
    return [
        (task, kind) for task in SAMPLES for kind in SAMPLES[task] if kind in kinds or not kinds
    ]


def sample(real_data, task, kind):
    """The arrays of one of them."""
    return read(real_data / "real-samples" / f"{task}-{kind}.hdf5")


@pytest.mark.parametrize(("task", "kind"), samples())
def test_replay(task, kind, real_data):
    """Every genuine step comes out to the file's precision; palms pressed on a table aside."""
    errors, reward_errors, rows = replay(make(human(task)), task, sample(real_data, task, kind))
    print(f"\n| {task}-{kind} | {len(errors)}", summary(errors), summary(reward_errors), sep=" | ")
    off = errors > 1e-5
    if (task, kind) == ("door", "cloned-v1"):
        assert off.sum() == 17
        assert all(palm_on_table(make(human(task)), real_data, row) for row in rows[off])
        assert errors.max() < 0.02
    else:
        assert not off.any()
    assert np.median(errors) < 1e-6
    assert np.quantile(errors, 0.9) < 5e-6
    assert np.median(reward_errors) < 1e-6
    assert reward_errors[~off].max() < 1e-5


def whole_episodes(env, task, data):
    """Returns of episodes from their first states and their actions alone, and the file's."""
    env.reset(seed=0)
    last_rows = np.flatnonzero(data["ends"])
    returns, stored = [], []
    for first, last in zip([0, *(last_rows[:-1] + 1)], last_rows):
        state = data["qpos"][first], data["qvel"][first]
        put_objects(env, task, data["observations"][first], *state)
        put(env, *state)
        actions = data["actions"][first : last + 1].astype(np.float32)
        returns.append(sum(env.step(action)[1] for action in actions))
        stored.append(data["rewards"][first : last + 1].sum())
    return np.array(returns), np.array(stored)


@pytest.mark.parametrize(("task", "kind"), samples("human-v1", "expert-v1"))
def test_whole_episodes(task, kind, real_data):
    """Up to 437 steps in a row come out too: the returns are the file's. Elsewhere they do not."""
    data = sample(real_data, task, kind)
    returns, stored = whole_episodes(make(human(task)), task, data)
    other, _ = whole_episodes(theirs(task), task, data)
    for name, values in {"stored": stored, "here": returns, "elsewhere": other}.items():
        print(f"\n{task}-{kind}, {name}: {values.round(2)}", end="")
    np.testing.assert_allclose(returns, stored, atol=0.05)
    assert np.abs(other - stored).max() > 2


def palm_on_table(env, real_data, row):
    """Whether a box of the hand touches the table in this row of door-cloned-v1."""
    data = sample(real_data, "door", "cloned-v1")
    first = row - row % 200
    put_objects(env, "door", *(data[name][first] for name in ("observations", "qpos", "qvel")))
    put(env, data["qpos"][row], data["qvel"][row])
    touched = []
    for _ in range(5):
        env.do_simulation(env.middle + data["actions"][row] * env.reach, 1)
        touched.append(env.is_box[env.data.contact.geom].all(1).any())
    return any(touched)


def full_margins(env):
    env.model.geom_margin[:] *= 2


def native_collisions(env):
    env.model.opt.disableflags &= ~int(OFF.mjDSBL_NATIVECCD)


def many_contacts(env):
    env.model.opt.disableflags &= ~int(OFF.mjDSBL_MULTICCD)


CONTROLS = [
    ("pen", "human-v1", full_margins, 1e-2),
    ("pen", "human-v1", native_collisions, 1e-4),
    ("pen", "human-v1", many_contacts, 1e-4),
    ("door", "human-v1", full_margins, 1e-4),
    ("relocate", "expert-v1", full_margins, 1e-4),
]


@pytest.mark.parametrize(("task", "kind", "change", "least"), CONTROLS)
def test_replay_fails_with_other_contacts(task, kind, change, least, real_data):
    """The control: each part of today's contacts is told from D4RL's, by the median."""
    env = gymnasium.make(human(task)).unwrapped
    change(env)
    errors, *_ = replay(env, task, sample(real_data, task, kind), every=7)
    print(f"\n{task}-{kind}, {change.__name__}: {summary(errors)}")
    assert np.median(errors) > least


def test_replay_fails_with_full_depth(real_data):
    """The control for fingers deep in a door: without the limit five of 39 rows come out wrong."""
    env = gymnasium.make("door-human-v1").unwrapped
    env.is_round[:] = False
    data = sample(real_data, "door", "expert-v1")
    errors, _, rows = replay(env, "door", {name: array[:40] for name, array in data.items()})
    assert rows[errors > 1e-5].tolist() == [16, 17, 18, 19, 20]
    assert errors.max() > 1e-3


# ------------------------------ gymnasium-robotics' own environments
@functools.cache
def theirs(task):
    """Its environment of a task, without wrappers."""
    return gymnasium.make(f"AdroitHand{task.capitalize()}-v1").unwrapped


@pytest.mark.parametrize(("task", "kind"), samples("human-v1"))
def test_replay_fails_in_their_environments(task, kind, real_data):
    """The control: steps and rewards of gymnasium-robotics are told from D4RL's."""
    data = sample(real_data, task, kind)
    errors, reward_errors, _ = replay(theirs(task), task, data, every=5)
    print(f"\n| {task}-{kind} | {len(errors)}", summary(errors), summary(reward_errors), sep=" | ")
    assert np.median(errors) > (0.05 if task == "pen" else 5e-4)
    assert np.median(reward_errors) > (1e-6 if task == "pen" else 1e-3)


@pytest.mark.parametrize("task", ["door", "hammer", "relocate"])
def test_sign_of_their_reward(task):
    """Its v1 pays 0.1 per metre between hand and object, where D4RL takes as much."""
    env, other = start(human(task)), theirs(task)
    item = "S_handle" if task == "door" else None
    for seed in range(3):
        env.reset(seed=seed)
        other.reset(seed=seed)
        ours, *_ = env.judge()
        mujoco.mj_copyData(other.data, env.model, env.data)
        other.do_simulation = lambda control, frame_skip: None
        _, reward, *_ = other.step(still(env))
        del other.do_simulation
        there = env.point(item) if item else env.item()
        away = np.linalg.norm(env.point("S_grasp") - there)
        assert reward - ours == pytest.approx(0.2 * away, abs=1e-9)
        assert away > 0.05


def test_their_pen():
    """It has 200 steps, and goes on when the pen has been dropped."""
    assert gymnasium.spec("AdroitHandPen-v1").max_episode_steps == 200
    env = theirs("pen")
    env.reset(seed=0)
    drop(env)
    results = [env.step(still(env)) for _ in range(12)]
    assert env.data.body("Object").xpos[2] < 0.075
    assert not any(result[2] for result in results)


# ------------------------------ D4RL's policies
def expert(path):
    """Mean actions (B, a) of the policy that collected a file, for observations (B, d)."""
    with h5py.File(path) as file:
        policy = file["metadata/policy"]
        layers = [(policy[name]["weight"][:], policy[name]["bias"][:]) for name in LAYERS]
        means = file["infos/action_mean"][:]
        states = file["observations"][:]

    def act(observations):
        hidden = observations
        for weight, bias in layers[:-1]:
            hidden = np.tanh(hidden @ weight.T + bias)
        weight, bias = layers[-1]
        return hidden @ weight.T + bias

    np.testing.assert_allclose(act(states), means, atol=1e-5)
    return act


LAYERS = ("fc0", "fc1", "last_fc")


@pytest.mark.parametrize(
    ("task", "episodes", "least"), [("pen", 8, 60), ("door", 2, 100), ("relocate", 2, 70)]
)
def test_experts(task, episodes, least, real_data):
    """The policy that made the expert data, without its noise, scores about 100 here too."""
    act = expert(real_data / "real-samples" / f"{task}-expert-v1.hdf5")
    env = gymnasium.make(human(task))
    returns, successes = [], []
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        rewards, reached, over = [], False, False
        while not over:
            action = np.clip(act(observation), -1, 1).astype(np.float32)
            observation, reward, terminated, truncated, info = env.step(action)
            rewards.append(reward)
            reached |= info["success"]
            over = terminated or truncated
        returns.append(sum(rewards))
        successes.append(reached)
    known = adroit.TASKS[task]
    score = 100 * (np.mean(returns) - known.random_return)
    score /= known.expert_return - known.random_return
    print(f"\n{task}: {episodes} episodes, score {score:.1f}, success {np.mean(successes):.2f}")
    assert least < score < 180
    assert np.mean(successes) >= (0.75 if task == "pen" else 1)


# ------------------------------ data
@pytest.mark.parametrize(("task", "kind"), samples())
def test_loader(task, kind, real_data):
    """Genuine files load as float32, without timeouts and the last row; episodes stay whole."""
    path = real_data / "real-samples" / f"{task}-{kind}.hdf5"
    data = calql_sera.load_d4rl(f"{task}-{kind}", path)
    with h5py.File(path) as file:
        count = len(file["rewards"])
        kept = np.flatnonzero(~file["timeouts"][: count - 1])
        rewards = file["rewards"][:][kept]
        assert (file["observations"].dtype == np.float64) == (kind == "cloned-v0")
    assert {data[name].dtype for name in ("observations", "actions", "rewards")} == {np.dtype("f4")}
    np.testing.assert_array_equal(data["rewards"], rewards.astype(np.float32))
    lengths = np.diff(np.flatnonzero(np.append(True, data["episode_ends"])))
    whole = {"pen": [199, 199], "door": [299, 299], "relocate": [351, 436]}  # human v1: beyond 200
    if kind == "human-v1":
        assert lengths.tolist() == whole[task]
    elif kind.endswith("v1"):
        horizon = adroit.TASKS[task].horizon
        assert lengths.tolist() == [horizon - 1] * 2
