"""AntMaze: the environment against D4RL's source and genuine steps, its data, small runs of each script."""

import copy
import csv
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS
from gymnasium.utils.env_checker import check_env
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import calql_sera
from envs import antmaze

UMAZE = "antmaze-umaze-v2"
IDS = {"umaze": UMAZE, "medium": "antmaze-medium-play-v2", "large": "antmaze-large-diverse-v2"}
TESTED = {"umaze": "U_MAZE_TEST", "medium": "BIG_MAZE_TEST", "large": "HARDEST_MAZE_TEST"}  # D4RL's names
CORNERS = {"umaze": (0, 8), "medium": (20, 20), "large": (32, 24)}  # where the goal's region starts
SAMPLES = ("umaze", "umaze-diverse", "medium-play", "large-play", "large-diverse")
MASS_ARRAYS = ("body_mass", "body_inertia", "body_ipos", "body_iquat")
SHIFTS = {name: (10, -5) if name in ("calql_sera", "cql_sera") else (1, -1) for name in SCRIPTS}


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """Each script's table of data sets as it was before: an AntMaze id adds to it."""
    for module in map(importlib.import_module, SCRIPTS):
        monkeypatch.setattr(module, "DATASETS", dict(module.DATASETS))


@pytest.fixture(params=IDS)
def maze(request):
    """The name of each maze in turn."""
    return request.param


def made(maze):
    """Wrapped environment, bare environment, model."""
    env = calql_sera.make_env(IDS[maze])
    return env, env.unwrapped, env.unwrapped.model


def oracle(name):
    """One file of the original package as a module, without the package around it, which needs mujoco_py."""
    spec = importlib.util.find_spec("d4rl")
    if spec is None:
        pytest.skip("the d4rl package is not installed")
    path = Path(spec.submodule_search_locations[0], name)
    spec = importlib.util.spec_from_file_location(f"d4rl_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def original(tmp_path, monkeypatch):
    """D4RL's maze by name, as an object of its own class MazeEnv with the path of the XML it writes."""
    pytest.importorskip("gym", reason="d4rl's maze_env.py imports gym, which is not installed")
    module = oracle("locomotion/maze_env.py")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where it leaves the XML

    class Walker:
        FILE = str(Path(module.__file__).with_name("assets") / "ant.xml")

        def __init__(self, *args, file_path, **kwargs):
            self.file_path = file_path

    class Maze(module.MazeEnv):
        LOCOMOTION_ENV = Walker

    return lambda maze: Maze(getattr(module, TESTED[maze]), 4.0)


def is_wall(model):
    """Which geoms are walls: the only boxes."""
    return model.geom_type == mujoco.mjtGeom.mjGEOM_BOX


# ------------------------------ the ant
def test_masses(maze):
    """The ant weighs 0.8787, and every mass and inertia is that of ant-medium-v2 with D4RL's physics."""
    model, other = made(maze)[2], calql_sera.make_env("ant-medium-v2").unwrapped.model
    shipped = mujoco.MjModel.from_xml_path(calql_sera.make_env("ant-medium-v2").unwrapped.fullpath)
    assert model.body_mass.sum() == pytest.approx(0.8787, abs=5e-5)
    assert [model.body(i).name for i in range(model.nbody)] == [other.body(i).name for i in range(14)]
    for name in (*MASS_ARRAYS, "body_pos", "body_quat", "body_subtreemass", "dof_armature", "dof_damping"):
        np.testing.assert_array_equal(getattr(model, name), getattr(other, name), err_msg=name)
    for name in ("body_invweight0", "dof_invweight0"):  # derived from them, so up to date
        np.testing.assert_allclose(getattr(model, name), getattr(other, name), rtol=1e-9, err_msg=name)
    assert not np.allclose(model.body_inertia, shipped.body_inertia, rtol=1e-3)


def test_shapes_are_those_of_ant(maze):
    """The ant's geoms are Gymnasium's: capsules still, and the same size, place, friction and groups."""
    model, other = made(maze)[2], calql_sera.make_env("ant-medium-v2").unwrapped.model
    ours, theirs = ~is_wall(model), np.ones(other.ngeom, dtype=bool)
    assert (model.geom_type[ours] == mujoco.mjtGeom.mjGEOM_CAPSULE).sum() == 12
    for name in ("type", "size", "pos", "quat", "friction", "condim", "contype", "conaffinity", "solref"):
        array = f"geom_{name}"
        np.testing.assert_array_equal(getattr(model, array)[ours], getattr(other, array)[theirs], array)


def test_time_and_contacts(maze):
    """Five steps of 0.02 s by RK4; solimp .8 .8 .01; all margins half of 0.01."""
    _, env, model = made(maze)
    assert (model.opt.timestep, env.frame_skip) == (0.02, 5)
    assert env.dt == pytest.approx(0.1)
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
    np.testing.assert_allclose(model.geom_solimp[:, :3], np.tile([0.8, 0.8, 0.01], (model.ngeom, 1)))
    np.testing.assert_allclose(model.geom_margin, 0.005)


def test_actuators(maze):
    """Actions within +-1 are torques within +-30, on the joints in D4RL's order; beyond, they are clipped."""
    env, raw, model = made(maze)
    joints = [model.joint(model.actuator_trnid[i, 0]).name for i in range(model.nu)]
    assert joints == ["hip_4", "ankle_4", "hip_1", "ankle_1", "hip_2", "ankle_2", "hip_3", "ankle_3"]
    np.testing.assert_array_equal(model.actuator_gear[:, 0], 30)
    np.testing.assert_array_equal(model.actuator_ctrlrange, np.tile([-1, 1], (8, 1)))
    for index, joint in enumerate(joints):
        for size in (1, -0.5, 7):
            env.reset(seed=0)
            env.step(size * np.eye(8, dtype=np.float32)[index])
            torques = np.zeros(model.nv)
            torques[model.joint(joint).dofadr[0]] = 30 * min(size, 1)
            np.testing.assert_allclose(raw.data.qfrc_actuator, torques, err_msg=joint)


# ------------------------------ walls
def test_walls(maze):
    """A box of half size 2, 2, 1 at x = 4 (col - col0), y = 4 (row - row0), z = 1 for every #, solid."""
    model, rows = made(maze)[2], antmaze.MAZES[maze]
    walls, (row0, col0) = is_wall(model), (1, 1)
    cells = [(i, j) for i, row in enumerate(rows) for j, cell in enumerate(row) if cell == "#"]
    assert rows[row0][col0] == "R" and walls.sum() == "".join(rows).count("#") == len(cells)
    expected = sorted((4 * (j - col0), 4 * (i - row0), 1) for i, j in cells)
    assert sorted(map(tuple, model.geom_pos[walls])) == expected
    for name, value in (("size", [2, 2, 1]), ("friction", [1, 0.5, 0.5]), ("quat", [1, 0, 0, 0])):
        np.testing.assert_array_equal(getattr(model, f"geom_{name}")[walls], np.tile(value, (len(cells), 1)))
    for name, value in (("contype", 1), ("conaffinity", 1), ("condim", 3), ("bodyid", 0)):
        assert np.all(getattr(model, f"geom_{name}")[walls] == value), name


def test_walls_of_umaze_by_hand():
    """Seen along x at y = 0, 4 and 8: walls at both ends, and the middle row open only in its last cell."""
    model = made("umaze")[2]
    walls = {tuple(place) for place in model.geom_pos[is_wall(model), :2]}
    for y, xs in ((-4, (-4, 0, 4, 8, 12)), (0, (-4, 12)), (4, (-4, 0, 4, 12)), (8, (-4, 12))):
        assert {x for x, other in walls if other == y} == set(xs), y
    assert len(walls) == 5 + 2 + 4 + 2 + 5


@pytest.mark.parametrize(("direction", "stopped"), [((-1, 0), True), ((0, -1), True), ((1, 0), False)])
def test_a_wall_stops_the_ant(direction, stopped):
    """Pushed with its own weight for ten seconds, the ant stays in the start cell but for its open side."""
    env, raw, model = made("umaze")
    env.reset(seed=0)
    raw.goal = np.array([100.0, 100.0])
    raw.data.xfrc_applied[model.body("torso").id, :2] = 9 * np.array(direction)
    way = [env.step(np.zeros(8, dtype=np.float32))[0][:2] @ direction for _ in range(100)]
    if stopped:
        assert 1 < max(way) < 2 - 0.2  # the wall is 2 m from the origin, the torso's radius 0.25
        assert way[-1] > 1
    else:
        assert max(way) > 4


# ------------------------------ D4RL's own source
def test_mazes_of_the_package(original, maze):
    """Each maze is D4RL's, cell by cell, with one start and one goal."""
    signs = {1: "#", 0: ".", "r": "R", "g": "G"}
    rows = tuple("".join(signs[cell] for cell in row) for row in original(maze)._maze_map)
    assert antmaze.MAZES[maze] == rows
    assert "".join(rows).count("R") == "".join(rows).count("G") == 1


def test_model_of_the_package(original, maze):
    """The XML that D4RL's maze writes, compiled: the same but masses, half the margins, gear for range."""
    theirs, ours = mujoco.MjModel.from_xml_path(original(maze).file_path), made(maze)[2]
    arrays = {
        "body": ("parentid", "pos", "quat", "jntnum", "geomnum"),
        "jnt": ("type", "bodyid", "pos", "axis", "range", "limited", "stiffness")
        + ("margin", "solref", "solimp"),
        "dof": ("armature", "damping", "frictionloss"),
        "geom": ("type", "bodyid", "size", "pos", "quat", "contype", "conaffinity", "condim")
        + ("friction", "solref", "solimp", "solmix", "priority", "gap"),
        "actuator": ("trnid", "trntype", "gaintype", "biastype", "ctrllimited", "forcelimited"),
    }
    for kind, names in arrays.items():
        for name in names:
            first, second = (getattr(model, f"{kind}_{name}") for model in (ours, theirs))
            np.testing.assert_allclose(first, second, atol=1e-12, err_msg=f"{kind}_{name}")
    np.testing.assert_allclose(2 * ours.geom_margin, theirs.geom_margin)
    np.testing.assert_array_equal(ours.qpos0, theirs.qpos0)
    options = ("timestep", "integrator", "gravity", "cone", "solver", "iterations", "tolerance", "impratio")
    for option in options:
        np.testing.assert_array_equal(getattr(ours.opt, option), getattr(theirs.opt, option), option)
    torques = [model.actuator_gear[:, :1] * model.actuator_ctrlrange for model in (ours, theirs)]
    np.testing.assert_array_equal(*torques)
    assert not np.allclose(ours.body_mass, theirs.body_mass, rtol=1e-2)  # compiled by today's rule


def test_goals_of_the_package(original, maze):
    """2000 goals of D4RL's sampler and ours, axis by axis: Kolmogorov and Smirnov see one distribution."""
    sampler, env = original(maze), made(maze)[1]
    np.random.seed(0)
    theirs = np.array([sampler.goal_sampler(np.random) for _ in range(2000)])
    ours = goals(env, 2000)
    for axis in (0, 1):
        assert stats.ks_2samp(ours[:, axis], theirs[:, axis]).pvalue > 0.01
        uniform = CORNERS[maze][axis] + np.random.uniform(0, 1.5, 2000)
        assert stats.ks_2samp(uniform, theirs[:, axis]).pvalue < 1e-6  # the control


# ------------------------------ starts and goals
def goals(env, count):
    """The goals of that many episodes."""
    env.reset(seed=0)
    return np.array([(env.reset(), env.goal)[1] for _ in range(count)])


def test_spaces(maze):
    """29 numbers are seen, all positions and velocities without the goal; 8 actions go from -1 to 1."""
    env, raw, _ = made(maze)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.shape == observation.shape == (29,)
    assert env.observation_space.contains(observation) and np.isinf(env.observation_space.high).all()
    np.testing.assert_array_equal(observation, np.concatenate([raw.data.qpos, raw.data.qvel]))
    assert env.action_space.shape == (8,) and env.action_space.dtype == np.float32
    assert np.all(raw.action_space.low == -1) and np.all(raw.action_space.high == 1)
    observation, *_ = env.step(env.action_space.sample().clip(-1, 1))
    np.testing.assert_array_equal(observation, np.concatenate([raw.data.qpos, raw.data.qvel]))
    task = calql_sera.find_task(IDS[maze])
    assert (task.observation_dim, task.action_dim) == (29, 8)


@pytest.mark.filterwarnings("ignore:.*infinity")
def test_gymnasium_contract():
    """Gymnasium's own checker has no complaint: seeds, spaces, types and determinism."""
    check_env(made("umaze")[1], skip_render_check=True)


def test_start(maze):
    """Positions are uniform within 0.1 of upright at z 0.75 over the origin, velocities are 0.1 N(0, 1)."""
    env = made(maze)[0]
    starts = np.array([env.reset(seed=0)[0], *(env.reset()[0] for _ in range(1999))])
    upright = np.array([0, 0, 0.75, 1, *[0] * 11])
    noise, velocities = starts[:, :15] - upright, starts[:, 15:]
    assert np.abs(noise).max() <= 0.1
    assert noise.min(0).max() < -0.099 and noise.max(0).min() > 0.099
    for column in noise.T:
        assert stats.kstest(column, stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-3
    for column in velocities.T:
        assert stats.kstest(column, stats.norm(0, 0.1).cdf).pvalue > 1e-3
    correlations = np.corrcoef(starts.T) - np.eye(29)
    assert np.abs(correlations).max() < 0.1  # each drawn by itself


def test_goal_regions(maze):
    """Goals lie 0 to 1.5 m beyond the goal cell's centre, as a sum of U(0, 1) and U(0, 0.5), on both axes."""
    offsets = goals(made(maze)[1], 4000) - CORNERS[maze]
    assert offsets.min() >= 0 and offsets.max() <= 1.5
    assert offsets.min(0).max() < 0.05 and offsets.max(0).min() > 1.45
    np.testing.assert_allclose(offsets.mean(0), 0.75, atol=0.02)
    np.testing.assert_allclose(offsets.var(0), 1 / 12 + 0.25 / 12, atol=0.008)  # 0.1875 if it were uniform
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.05


def test_goals_and_seeds(maze):
    """A new goal for every episode, of both versions; the same seed gives the same goals and starts."""
    env, raw, _ = made(maze)
    old = calql_sera.make_env(IDS[maze].replace("v2", "v0"))
    for other in (calql_sera.make_env(IDS[maze]), old):
        seen = []
        for seed in (5, None, None, 6):
            starts = [x.reset(seed=seed)[0] for x in (env, other)]
            np.testing.assert_array_equal(*starts)
            np.testing.assert_array_equal(raw.goal, other.unwrapped.goal)
            assert type(raw.goal) is np.ndarray and raw.goal.shape == (2,)
            seen.append(tuple(raw.goal))
        assert len(set(seen)) == 4
    goal = raw.goal.copy()
    env.step(np.zeros(8, dtype=np.float32))
    np.testing.assert_array_equal(raw.goal, goal)  # stays where it is within an episode


def test_numpy_global_generator_is_not_used():
    """D4RL draws goals from numpy's global generator; here that makes no difference, and is left alone."""
    env, seen = made("medium")[0], []
    for seed in (0, 1):
        np.random.seed(seed)
        before = np.random.get_state()[1:3]
        env.reset(seed=11)
        env.reset()
        seen.append(env.unwrapped.goal)
        after = np.random.get_state()[1:3]
        assert np.array_equal(before[0], after[0]) and before[1] == after[1]
    np.testing.assert_array_equal(*seen)


# ------------------------------ reward and end
@pytest.mark.parametrize("angle", [0, 2.2, 4.4])
def test_reward_and_end(angle, maze):
    """1 and the end within 0.5 m of the goal, 0 and no end beyond, judged by where the step has led."""
    env, raw, _ = made(maze)
    env.reset(seed=0)
    raw.goal = np.array([0.3, -0.2])
    distances, results = [], []
    for distance in [*np.linspace(0, 0.7, 8), *np.linspace(0.45, 0.55, 21), 0.49, 0.51]:
        qpos = raw.init_qpos.copy()
        qpos[:2] = raw.goal + distance * np.array([np.cos(angle), np.sin(angle)])
        env.reset(seed=0)
        raw.goal = np.array([0.3, -0.2])
        raw.set_state(qpos, np.zeros(14))
        observation, reward, terminated, truncated, _ = env.step(np.zeros(8, dtype=np.float32))
        distances.append(np.linalg.norm(observation[:2] - raw.goal))
        results.append((reward, terminated, truncated))
        assert type(reward) is float and type(terminated) is bool
        assert distances[-1] == pytest.approx(distance, abs=0.005)
    for distance, result in zip(distances, results):
        assert result == ((1.0, True, False) if distance <= 0.5 else (0.0, False, False)), distance
    inside = [distance for distance in distances if distance <= 0.5]
    assert max(inside) > 0.49 and min(set(distances) - set(inside)) < 0.51  # both sides are close


def test_reward_of_the_step_that_arrives():
    """The place after the step counts: an ant that flies in is paid, one that flies out is not."""
    env, raw, _ = made("umaze")
    for direction, result in ((-1, (1.0, True)), (1, (0.0, False))):
        env.reset(seed=0)
        raw.goal = np.zeros(2)
        qpos, qvel = raw.init_qpos.copy(), np.zeros(14)
        qpos[0], qvel[0] = 0.55 if direction < 0 else 0.45, 2.0 * direction
        raw.set_state(qpos, qvel)
        assert env.step(np.zeros(8, dtype=np.float32))[1:3] == result


def test_falling_does_not_end():
    """On its back, high up or deep down, an ant of D4RL's MuJoCo tasks would be out; here it goes on."""
    env, raw, _ = made("umaze")
    for height, turned in ((0.3, True), (3.0, False), (0.15, False)):
        env.reset(seed=0)
        qpos = raw.init_qpos.copy()
        qpos[2], qpos[3:7] = height, [0, 1, 0, 0] if turned else [1, 0, 0, 0]
        raw.set_state(qpos, np.zeros(14))
        results = [env.step(np.zeros(8, dtype=np.float32))[1:4] for _ in range(20)]
        assert results == [(0.0, False, False)] * 20
        upward = 1 - 2 * (raw.data.qpos[4] ** 2 + raw.data.qpos[5] ** 2)
        assert (upward < -0.9) == turned  # the one on its back is still there


def test_horizons():
    """700 steps in umaze and 1000 elsewhere, by truncation; the environment itself knows no limit."""
    for env in antmaze.DATASETS:
        assert gymnasium.spec(env).max_episode_steps == (700 if "umaze" in env else 1000), env
    env, raw, _ = made("umaze")
    env.reset(seed=0)
    ends = [env.step(np.zeros(8, dtype=np.float32)) for _ in range(700)]
    assert [step[2:4] for step in ends] == [(False, False)] * 699 + [(False, True)]
    assert ends[-1][4]["episode"]["r"] == 0 and ends[-1][4]["episode"]["l"] == 700
    assert not raw.step(np.zeros(8))[3]


def test_last_step_can_be_a_success():
    """Arriving with the last step is an end by arrival as well, which must not bootstrap."""
    env, raw, _ = made("umaze")
    env.reset(seed=0)
    for _ in range(699):
        env.step(np.zeros(8, dtype=np.float32))
    raw.goal = raw.data.qpos[:2].copy()
    assert env.step(np.zeros(8, dtype=np.float32))[1:4] == (1.0, True, True)


# ------------------------------ copies and pictures
def test_copies(maze):
    """A pickled or deeply copied environment is the same maze, wrapped or bare, and goes the same way."""
    env, raw, model = made(maze)
    plain = gymnasium.make(IDS[maze])  # Gymnasium's ClipAction in env holds a lambda, which has no pickle
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 8)).astype(np.float32)
    for one, ways in ((env, "c"), (raw, "cp"), (plain, "cp")):
        one.reset(seed=1)
        for way in ways:
            other = copy.deepcopy(one) if way == "c" else pickle.loads(pickle.dumps(one))
            assert other.unwrapped is not one.unwrapped
            paths = []
            for x in (one, other):
                x.reset(seed=3)
                goal = tuple(x.unwrapped.goal)
                paths.append((goal, *(tuple(x.step(action)[0]) for action in actions)))
            assert paths[0] == paths[1]
            np.testing.assert_array_equal(other.unwrapped.model.geom_pos, model.geom_pos)


RENDER = """
import sys
try:
    import mujoco
    mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16).render()
except BaseException as error:
    sys.exit(f"no backend: {error}")
import numpy as np
import gymnasium, envs.antmaze
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
    """rgb_array shows the whole maze, the ant at one end and the goal, which is new each time, at another."""
    errors = []
    for backend in ("egl", "osmesa"):
        command = [sys.executable, "-c", RENDER, str(tmp_path / "pictures.npy"), *IDS.values()]
        environment = os.environ | {"MUJOCO_GL": backend, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if "no backend" not in done.stderr:
            break
        errors.append(f"{backend}: {done.stderr.splitlines()[-1]}")
    else:
        pytest.skip("MuJoCo finds no way to draw here: " + "; ".join(errors))
    assert done.returncode == 0, done.stderr
    pictures = np.load(tmp_path / "pictures.npy")
    assert pictures.shape == (9, 480, 480, 3) and pictures.dtype == np.uint8
    for maze, three in zip(IDS, pictures.astype(int).reshape(3, 3, 480, 480, 3)):
        red, green, blue = np.moveaxis(three, 3, 0)
        assert three[0].std() > 20
        assert ((red > green + 20) & (green > blue + 20))[0].mean() > 0.1, maze  # walls are brown
        goals = [np.argwhere(one).mean(0) for one in (green > red + 30) & (green > blue + 30)]
        assert np.linalg.norm(goals[0] - goals[1]) > 2, maze  # the goal is a green disc
        np.testing.assert_array_equal(three[1], three[2])
        changed = np.argwhere(np.abs(three[0] - three[1]).max(2) > 30)  # the ant and the goal
        assert changed.min() >= 10 and changed.max() < 470, maze
        assert np.ptp(changed, axis=0).max() > 100, maze  # they are far apart


def test_goal_is_drawn_where_it_is(maze):
    """The disc that marks the goal lies there after a reset and during the episode."""
    env, raw, _ = made(maze)
    for seed in (0, 1):
        env.reset(seed=seed)
        np.testing.assert_allclose(raw.data.site("goal").xpos, [*raw.goal, 0])
        env.step(np.zeros(8, dtype=np.float32))
        np.testing.assert_allclose(raw.data.site("goal").xpos, [*raw.goal, 0])


# ------------------------------ replay of genuine steps
def step_from(env, state, action):
    """Positions and velocities one step after a state (29,), and whether the ant then touches a wall."""
    raw = env.unwrapped
    mujoco.mj_resetData(raw.model, raw.data)  # forgets the solver's warm start
    raw.set_state(state[:15], state[15:])
    observation, *_ = env.step(action)
    return observation, bool(is_wall(raw.model)[raw.data.contact.geom].any())


def read_steps(path, every=1):
    """States before each step, actions, states after it: in these files infos are taken after the step.

    That holds at the end of an episode too, so every row counts, although v0 marks time-outs a row off.
    """
    with h5py.File(path) as file:
        names = ("observations", "actions", "infos/qpos", "infos/qvel")
        states, actions, qpos, qvel = (file[name][::every] for name in names)
    return states, actions, np.concatenate([qpos, qvel], axis=1)


def replay(env, steps):
    """Largest error of each step, and whether it ends at a wall."""
    env.reset(seed=0)
    env.unwrapped.goal = np.full(2, np.inf)
    results = []
    for state, action, truth in zip(*steps):
        observation, touches = step_from(env, state.astype(np.float64), action)
        results.append((np.abs(observation - truth).max(), touches))
    return tuple(map(np.array, zip(*results)))


def smallest_error(env, state, action, truth, tries=200):
    """The best of some states that the file's float32 may stand for: some contacts hang by its last digit."""
    rng, half = np.random.default_rng(0), np.spacing(np.abs(state)) / 2
    states = [state + rng.uniform(-1, 1, 29) * half for _ in range(tries)]
    return min(np.abs(step_from(env, state, action)[0] - truth).max() for state in states)


@pytest.mark.parametrize("sample", SAMPLES)
def test_replay(sample, real_data):
    """Every genuine step is reproduced to the file's precision; of those that end at a wall, nearly all."""
    env = calql_sera.make_env(f"antmaze-{sample}-v0")
    steps = read_steps(real_data / "real-samples" / f"antmaze-{sample}-v0.hdf5")
    errors, touches = replay(env, steps)
    again = np.flatnonzero(~touches & (errors > 1e-4)).tolist()
    assert len(again) <= 1
    best = {row: smallest_error(env, *(column[row] for column in steps)) for row in again}
    print(f"{sample}: {len(errors)} rows, median {np.median(errors):.2g}, free of walls max", end=" ")
    print(f"{errors[~touches].max():.2g}, {best}; {touches.sum()} at walls: median", end=" ")
    print(f"{np.median(errors[touches]):.2g}, max {errors[touches].max():.2g}", end=", ")
    print(f"{(errors[touches] > 1e-4).sum()} above 1e-4")
    assert len(errors) == (1402 if sample == "umaze" else 1998)
    assert np.median(errors) < 2e-6
    assert all(error < 1e-5 for error in best.values())
    assert np.delete(errors, again)[~np.delete(touches, again)].max() < 1e-4
    # At walls today's MuJoCo seems to find other contacts now and then: rounding alone does not explain it.
    assert touches.sum() > 30 and np.median(errors[touches]) < 5e-6
    assert np.mean(errors[touches] < 1e-4) > 0.9 and errors[touches].max() < 0.3


def new_masses(raw):
    """Masses and inertias by today's rule."""
    shipped = mujoco.MjModel.from_xml_path(raw.fullpath)
    for name in MASS_ARRAYS:
        getattr(raw.model, name)[:] = getattr(shipped, name)
    mujoco.mj_setConst(raw.model, mujoco.MjData(raw.model))


def full_margins(raw):
    """Margins that add up to twice D4RL's."""
    raw.model.geom_margin[:] *= 2


def shipped_contacts(raw):
    """The contact stiffness of Gymnasium's ant."""
    raw.model.geom_solimp[:, :3] = 0.9, 0.95, 0.001


@pytest.mark.parametrize("change", [new_masses, full_margins, shipped_contacts])
@pytest.mark.parametrize("sample", ["umaze", "medium-play", "large-play"])
def test_replay_fails_with_another_ant(sample, change, real_data):
    """The control: any one part of Gymnasium's own ant is told from D4RL's."""
    env = calql_sera.make_env(f"antmaze-{sample}-v0")
    change(env.unwrapped)
    errors, _ = replay(env, read_steps(real_data / "real-samples" / f"antmaze-{sample}-v0.hdf5", every=20))
    print(f"{sample}, {change.__name__}: median {np.median(errors):.2g}, max {errors.max():.2g}")
    assert np.median(errors) > 3e-4
    assert np.mean(errors < 2e-6) < 0.4


@pytest.mark.parametrize("sample", ["umaze", "medium-play", "large-play"])
def test_replay_fails_without_walls(sample, real_data):
    """The control for walls: without them, the rows that touch some come out wrong."""
    steps = read_steps(real_data / "real-samples" / f"antmaze-{sample}-v0.hdf5", every=3)
    env = calql_sera.make_env(f"antmaze-{sample}-v0")
    rows = np.flatnonzero(replay(env, steps)[1])
    env.unwrapped.model.geom_conaffinity[is_wall(env.unwrapped.model)] = 0
    env.unwrapped.model.geom_contype[is_wall(env.unwrapped.model)] = 0
    errors, _ = replay(env, [column[rows] for column in steps])
    assert len(rows) > 8 and np.median(errors) > 0.1


# ------------------------------ data
def write_data(path, rewards, terminals, timeouts):
    """A file in D4RL's format with states and actions of noise."""
    rng, count = np.random.default_rng(0), len(rewards)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(3, 2, (count, 29)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (count, 8)).astype(np.float32)
        file["rewards"] = np.asarray(rewards, dtype=np.float32)
        file["terminals"], file["timeouts"] = np.asarray(terminals, bool), np.asarray(timeouts, bool)
    return str(path)


# Two rows at the goal, then a tail that fails, a failure after a time-out, a success, a cut.
REWARDS = [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0]
TERMINALS = [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0]
TIMEOUTS = [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
KEPT = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]  # neither the time-out nor the last row
ENDS = [2, 3, 5, 8, 9]  # of the rows kept
RETURNS = [-5.0495, -0.05, 5, 5, -500, -500, -5.0495, -0.05, 5, -500]  # each failed row as if for ever


@pytest.fixture
def cluster(tmp_path):
    """The path of that file."""
    return write_data(tmp_path / "cluster.hdf5", REWARDS, TERMINALS, TIMEOUTS)


def filled(script, path, *options):
    """A buffer with a file, as a run with AntMaze's preset has it, and its arguments."""
    args = script.parse_args(["--env", UMAZE, "--device", "cpu", "--online-steps", "50", *options])
    return script.ReplayBuffer(script.load_d4rl(UMAZE, path), args), args


def test_rows_at_the_goal_are_kept(cluster):
    """Rewards survive loading, terminals as they are; trajectories end at terminals and at time-outs."""
    data = calql_sera.load_d4rl(UMAZE, cluster)
    assert data["rewards"].tolist() == [REWARDS[row] for row in KEPT]
    assert (data["rewards"] > 0).sum() == 3
    assert data["terminals"].tolist() == [bool(TERMINALS[row]) for row in KEPT]
    assert np.flatnonzero(data["dones"]).tolist() == ENDS
    with h5py.File(cluster) as file:
        np.testing.assert_array_equal(data["observations"], file["observations"][:][KEPT])
        np.testing.assert_array_equal(data["next_observations"], file["observations"][:][np.add(KEPT, 1)])


@pytest.mark.parametrize(
    ("rewards", "terminals", "expected"),
    [
        ((-5, 5, 5), (0, 1, 1), (-0.05, 5, 5)),
        ((-5, -5, 5), (0, 0, 1), (-5.0495, -0.05, 5)),
        ((-5, -5, -5), (0, 0, 0), (-500, -500, -500)),
        ((-5, 5, -5), (0, 0, 0), (-5 + 0.99 * (5 - 0.99 * 5), 5 - 0.99 * 5, -5)),  # not the failure rule
        ((-5, 5, 5, -5), (0, 1, 1, 0), (-0.05, 5, 5, -500)),
    ],
)
def test_returns_by_hand(rewards, terminals, expected):
    """Cluster, success, failure, a success in the middle, a tail: returns-to-go worked out by hand."""
    dones = np.array(terminals, bool)
    dones[-1] = True
    returns = calql_sera.mc_returns(np.array(rewards), np.array(terminals), dones, 0.99, True, -5.0)
    np.testing.assert_allclose(returns, expected, rtol=1e-6)


def test_returns_in_the_buffer(cluster):
    """Cal-QL's buffer has those of the whole file, split at terminals and time-outs, from shifted rewards."""
    buffer, _ = filled(calql_sera, cluster)
    np.testing.assert_allclose(buffer.columns["mc_returns"][: buffer.size], RETURNS, rtol=1e-6)
    buffer, _ = filled(calql_sera, cluster, "--reward-scale", "1", "--reward-bias", "-1")
    returns = buffer.columns["mc_returns"][: buffer.size].tolist()
    assert returns == pytest.approx([-1.99, -1, 0, 0, -100, -100, -1.99, -1, 0, -100], rel=1e-6)


def test_returns_without_discount(cluster):
    """A failure for ever would have no finite return if gamma were 1: then its return is the ordinary sum."""
    buffer, _ = filled(calql_sera, cluster, "--gamma", "1")
    returns = buffer.columns["mc_returns"][: buffer.size].tolist()
    assert returns == [-5, 0, 5, 5, -10, -5, -5, 0, 5, -5]


def test_failure_rule_is_for_antmaze_alone(tmp_path):
    """The same rewards as hopper's are an ordinary sum."""
    args = calql_sera.parse_args(["--env", "hopper-medium-v2", "--device", "cpu"])
    ends = np.array([False, False, True])
    rows = {"rewards": np.zeros(3), "terminals": np.zeros(3, bool), "dones": ends}
    assert calql_sera.episode_columns(rows, args)["mc_returns"].tolist() == [0, 0, 0]
    rows["rewards"] = np.full(3, -5.0)
    args.reward_bias = -5.0
    returns = calql_sera.episode_columns(rows, args)["mc_returns"]
    np.testing.assert_allclose(returns, [-14.8505, -9.95, -5], rtol=1e-6)


def test_online_episodes(cluster):
    """A cut online episode without success has R -5 / (1 - gamma) in every row, one with success its sum."""
    buffer, _ = filled(calql_sera, cluster)
    for rewards, terminal in (([0.0] * 4, False), ([0.0] * 3 + [1.0], True)):
        count = len(rewards)
        rows = {name: np.zeros((count, 29)) for name in ("observations", "next_observations")}
        rows |= {"actions": np.zeros((count, 8)), "rewards": np.array(rewards)}
        rows["terminals"], rows["dones"] = np.arange(count) == (3 if terminal else -1), np.arange(count) == 3
        buffer.append(rows)
    online = buffer.columns["mc_returns"][buffer.offline_size : buffer.size].tolist()
    success = [5.0]
    for _ in range(3):
        success.insert(0, -5 + 0.99 * success[0])
    assert online == pytest.approx([-500] * 4 + success, rel=1e-6)


def test_rewards_and_states_in_the_buffer(script, cluster):
    """10 r - 5 for CQL and Cal-QL, r - 1 for the others; states and terminals stay as they are."""
    buffer, _ = filled(script, cluster)
    scale, bias = SHIFTS[script.__name__]
    columns = {name: column[: buffer.size].numpy() for name, column in buffer.columns.items()}
    assert columns["rewards"].tolist() == [scale * REWARDS[row] + bias for row in KEPT]
    assert columns["terminals"].tolist() == [TERMINALS[row] for row in KEPT]
    assert (buffer.mean, buffer.std) == (0, 1)
    data = script.load_d4rl(UMAZE, cluster)
    for name in ("observations", "next_observations"):
        np.testing.assert_array_equal(columns[name], data[name])
    assert data["rewards"].tolist() == [REWARDS[row] for row in KEPT]  # what was loaded is not changed
    assert ("mc_returns" in columns) == (script is calql_sera)
    normalised, _ = filled(script, cluster, "--normalize-observations")  # the control
    assert normalised.columns["observations"][: buffer.size].mean(0).abs().max() < 1e-5


# ------------------------------ files that never reach the goal
@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Run a script's main, which has to refuse before any training: gives its one line on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(script, *argv):
        monkeypatch.setattr(script, "train", lambda *_: pytest.fail("training has begun"))
        small = ["--device", "cpu", "--eval-episodes", "1", "--online-steps", "1"]
        with pytest.raises(SystemExit) as caught:
            script.main([*map(str, argv), *small])
        stderr = capsys.readouterr().err.strip()
        assert caught.value.code == 2
        assert stderr.startswith("error: ") and "\n" not in stderr, stderr
        assert not (tmp_path / "runs").exists()
        return stderr

    return run


@pytest.mark.parametrize("last", [0, 1])
def test_a_file_without_success(script, refusal, tmp_path, last):
    """No reward at all, or one in the last row only, which is not kept: refused, with the file's name."""
    rewards = np.zeros(12)
    rewards[-1] = last
    path = write_data(tmp_path / "failures.hdf5", rewards, np.zeros(12), TIMEOUTS)
    message = refusal(script, "--env", UMAZE, "--dataset-path", path)
    assert path in message and "never reaches the goal" in message and "reward > 0" in message


@pytest.mark.parametrize("sample", SAMPLES)
def test_genuine_samples_without_success(sample, refusal, real_data):
    """The genuine samples load, but hold no success, and are refused."""
    path = real_data / "real-samples" / f"antmaze-{sample}-v0.hdf5"
    data = calql_sera.load_d4rl(f"antmaze-{sample}-v0", str(path))
    assert len(data["rewards"]) == (1400 if sample == "umaze" else 1996)
    assert data["dones"].sum() == 2 and not data["rewards"].any()
    message = refusal(calql_sera, "--env", f"antmaze-{sample}-v0", "--dataset-path", path)
    assert str(path) in message and "never reaches the goal" in message


def test_without_a_file(tmp_path, monkeypatch):
    """From scratch no file is read, so none is refused."""
    begun = []
    monkeypatch.setattr(calql_sera, "train", lambda args, state: begun.append(state.buffer.size))
    steps = ["--offline-steps", "0", "--mixing-ratio", "0", "--online-steps", "1", "--eval-episodes", "1"]
    calql_sera.main(["--env", UMAZE, "--device", "cpu", *steps, "--run-dir", str(tmp_path / "run")])
    assert begun == [0]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["env_id"] == UMAZE and "data_file" not in config


# ------------------------------ names and scores
def test_table_of_data_sets():
    """All AntMaze ids of the package's v0 and v2, no others, and the same addresses."""
    infos = oracle("infos.py")
    pattern = re.compile(r"antmaze-.*-v[02]")
    expected = {env: url for env, url in infos.DATASET_URLS.items() if pattern.fullmatch(env)}
    assert len(expected) == 12
    assert {env: f"{calql_sera.SERVER}/{file}" for env, file in antmaze.DATASETS.items()} == expected
    calql_sera.find_task(UMAZE)
    assert calql_sera.DATASETS.items() >= antmaze.DATASETS.items()


def test_table_of_scores():
    """The package's reference scores are 0 and 1, so a score is 100 times the return."""
    infos = oracle("infos.py")
    for env in antmaze.DATASETS:
        task = calql_sera.find_task(env)
        assert (task.random_return, task.expert_return) == (0, 1)
        assert (infos.REF_MIN_SCORE[env], infos.REF_MAX_SCORE[env]) == (0, 1), env


def test_ids_by_hand():
    """The twelve ids, a few files, scores of returns, and each id's maze."""
    kinds = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
    assert set(antmaze.DATASETS) == {f"antmaze-{kind}-v{v}" for kind in kinds for v in (0, 2)}
    name = "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse"
    assert antmaze.DATASETS[UMAZE] == f"ant_maze_v2/{name}_fixed.hdf5"
    assert antmaze.DATASETS["antmaze-umaze-v0"] == f"ant_maze_new/{name}.hdf5"
    name = "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse"
    assert antmaze.DATASETS["antmaze-large-play-v2"] == f"ant_maze_v2/{name}_fixed.hdf5"
    scores = calql_sera.normalized_score(UMAZE, np.array([0, 0.25, 1]))
    assert scores.tolist() == [0, 25, 100]
    for env in antmaze.DATASETS:
        cells = calql_sera.make_env(env).unwrapped.cells
        assert tuple("".join(row) for row in cells) == antmaze.MAZES[env.split("-")[1]]


@pytest.mark.parametrize(
    "env", ["antmaze-umaze-v1", "antmaze-umaze-v3", "antmaze-medium-v2", "antmaze", "pen-human-v1"]
)
def test_other_ids(env, script, refusal):
    """Ids that D4RL has not, or that are not supported, are named."""
    message = refusal(script, "--env", env)
    assert f"--env {env} " in message and "AntMaze" in message
    with pytest.raises(ValueError, match=env):
        script.make_env(env)


def test_download_is_offered(refusal, tmp_path, monkeypatch):
    """Without a file and a server: the address of D4RL's v2 file and the folder it may be put into."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(calql_sera, "SERVER", "http://127.0.0.1:1")
    message = refusal(calql_sera, "--env", UMAZE)
    assert f"http://127.0.0.1:1/{antmaze.DATASETS[UMAZE]}" in message and str(tmp_path) in message
    name = Path(antmaze.DATASETS[UMAZE]).name
    (tmp_path / name).touch()
    assert calql_sera.find_dataset(UMAZE) == tmp_path / name


def test_script_alone_in_a_folder(tmp_path):
    """A copy of one script has no AntMaze, says in one sentence what it lacks, and has the rest."""
    shutil.copy(ROOT / "calql_sera.py", tmp_path)
    runs, pipe = [], subprocess.PIPE
    for options in (["--env", UMAZE], ["--help"]):
        command = [sys.executable, "-B", str(tmp_path / "calql_sera.py"), *options]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        runs.append(
            subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)
        )
    (no_text, refusal), (help_text, no_error) = (process.communicate(timeout=120) for process in runs)
    assert [process.returncode for process in runs] == [2, 0]
    assert no_text == no_error == "" and "--dataset-path" in help_text
    assert len(refusal.strip().splitlines()) == 1 and refusal.startswith("error: ")
    assert UMAZE in refusal and "envs/antmaze.py" in refusal
    assert [path.name for path in tmp_path.iterdir()] == ["calql_sera.py"]


def test_another_package_of_this_name(tmp_path):
    """An installed package "envs", as the registry has one, does not hide the one beside the script."""
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").touch()
    command = [sys.executable, "-B", "-c", "from envs import antmaze; print(antmaze.__file__)"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run(command, cwd=tmp_path / "envs", env=environment, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (str(ROOT / "envs" / "antmaze.py"), "")


# ------------------------------ presets
COMMON = {
    "offline_steps": 1_000_000,
    "online_steps": 250_000,
    "eval_every": 25_000,
    "eval_episodes": 100,
    "sera_k": 25,
    "sera_coef": 1.0,
    "batch_size": 256,
    "gamma": 0.99,
    "mixing_ratio": 0.5,
    "normalize_observations": False,
    "normalize_rewards": False,
}
CONSERVATIVE = {"cql_lagrange": True, "cql_gap": 0.8, "cql_weight": 5.0, "max_backup": True}
CONSERVATIVE |= {"actor_layers": 2, "critic_layers": 4, "actor_lr": 1e-4, "critic_lr": 3e-4}
OWN = {"calql_sera": CONSERVATIVE, "cql_sera": CONSERVATIVE}
OWN |= {"iql_sera": {"expectile": 0.9, "beta": 10.0}, "td3bc_sera": {"bc_alpha": 2.5}}


@pytest.mark.parametrize("env", [*IDS.values(), "antmaze-umaze-diverse-v0"])
def test_presets(env, script):
    """Values by the name of the data set, the same for all mazes; other families keep theirs."""
    scale, bias = SHIFTS[script.__name__]
    expected = COMMON | OWN.get(script.__name__, {}) | {"reward_scale": scale, "reward_bias": bias}
    args = vars(script.parse_args(["--env", env]))
    assert {name: args[name] for name in expected} == expected
    assert type(args["eval_episodes"]) is int
    ant = script.parse_args(["--env", "ant-medium-v2"])
    assert (ant.eval_episodes, ant.reward_bias, ant.normalize_observations) == (10, 0, True)


@pytest.mark.parametrize("order", [1, -1])
def test_user_values_win(script, order):
    """What is on the command line counts, before --env and after it."""
    options = [["--env", UMAZE], ["--reward-bias", "0.5"], ["--eval-episodes", "7"], ["--sera-k", "3"]]
    options += [["--normalize-observations"], ["--offline-steps", "5e3"], ["--reward-scale", "2"]]
    args = script.parse_args([part for option in options[::order] for part in option])
    assert (args.reward_bias, args.eval_episodes, args.sera_k) == (0.5, 7, 3)
    assert (args.normalize_observations, args.offline_steps, args.reward_scale) == (True, 5000, 2)
    assert args.eval_every == 25_000


# ------------------------------ runs
SMALL = ["--hidden-dim", 16, "--batch-size", 32, "--sera-k", 5, "--offline-steps", 10, "--device", "cpu"]
SMALL += ["--eval-episodes", 2]


@pytest.fixture
def data(tmp_path):
    """Two successes of 20 rows, one with a cluster at the goal, and a failure between them."""
    rewards = np.zeros(60)
    rewards[[19, 57, 58]] = 1
    return write_data(tmp_path / "data.hdf5", rewards, rewards, np.arange(60) == 39)


@pytest.fixture
def short(monkeypatch):
    """Episodes of 20 steps in place of 700."""
    monkeypatch.setattr(gymnasium.registry[UMAZE], "max_episode_steps", 20)


@pytest.fixture
def lucky(monkeypatch):
    """Every other episode starts with a push towards a goal that is reached after a few steps."""
    reset_model = antmaze.AntMazeEnv.reset_model

    def reset(self):
        reset_model(self)
        self.episodes = getattr(self, "episodes", 0) + 1
        if self.episodes % 2 == 0:
            self.goal = self.data.qpos[:2] + [0.8, 0]
            self.set_state(self.data.qpos, np.eye(14)[0] * 2)
        return self.observation()

    monkeypatch.setattr(antmaze.AntMazeEnv, "reset_model", reset)


def run(script, run_dir, *options):
    script.main([*map(str, options), "--run-dir", str(run_dir)])


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def scalars(run_dir, name):
    """What TensorBoard shows: (step, value) of a curve."""
    return [(x.step, x.value) for x in EventAccumulator(str(run_dir)).Reload().Scalars(name)]


def assert_curves(run_dir, scores):
    """Scores and regret at the end of each online episode, over all of them so far."""
    steps, logged = zip(*scalars(run_dir, "train/score"))
    assert list(logged) == scores and list(steps) == sorted(set(steps))
    regret = [1 - np.mean(scores[: i + 1]) / 100 for i in range(len(scores))]
    assert [value for _, value in scalars(run_dir, "train/regret")] == pytest.approx(regret)
    return steps


def test_run(script, data, short, lucky, tmp_path, capsys):
    """Both phases: raw scores of 0 and 100, logged; shifted rewards in the buffer; a resumed run goes on."""
    run_dir = tmp_path / "run"
    run(script, run_dir, "--env", UMAZE, "--dataset-path", data, *SMALL, "--online-steps", 90)
    with open(run_dir / "evals.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    seen = [(row["phase"], int(row["step"])) for row in rows]
    assert seen == [("offline", 10)] * 2 + [("online", 0)] * 2 + [("online", 90)] * 2
    assert {float(row["normalized_score"]) for row in rows} == {0, 100}
    for row in rows:
        assert float(row["normalized_score"]) == 100 * float(row["return"])
        assert (int(row["length"]) == 20) == (float(row["return"]) == 0)
    assert capsys.readouterr().out.splitlines()[-1].startswith("final score ")
    config = json.loads((run_dir / "config.json").read_text())
    assert config["env_id"] == UMAZE and config["args"]["normalize_observations"] is False

    saved = checkpoint(run_dir)
    scores, (scale, bias) = saved["train_scores"], SHIFTS[script.__name__]
    assert set(scores) == {0, 100}
    ends = [step - 10 for step in assert_curves(run_dir, scores)]  # online steps
    online = saved["online_rows"]
    count = ends[-1] if script is calql_sera else 90  # which waits for the end of an episode
    rewards, expected = online["rewards"].tolist(), np.full(count, float(bias))
    arrivals = [end - 1 for end, score in zip(ends, scores) if score]
    expected[arrivals] += scale
    assert rewards == expected.tolist()
    assert np.flatnonzero(online["terminals"]).tolist() == arrivals
    assert saved["normalizer"]["mean"] == 0 and saved["normalizer"]["std"] == 1
    if script is calql_sera:
        returns, start = online["mc_returns"].numpy(), 0
        for end, score in zip(ends, scores):
            by_hand = [scale + bias] if score else [-500]
            while len(by_hand) < end - start:
                by_hand.insert(0, bias + 0.99 * by_hand[0] if score else -500)
            np.testing.assert_allclose(returns[start:end], by_hand, rtol=1e-6)
            start = end

    run(script, run_dir, "--resume", "--online-steps", 130)
    after = checkpoint(run_dir)
    assert after["train_scores"][: len(scores)] == scores and len(after["train_scores"]) > len(scores)
    assert_curves(run_dir, after["train_scores"])
    assert len(after["online_rows"]["rewards"]) > count


def test_resumed_run_is_the_same(script, data, short, tmp_path):
    """Stopped after an episode and resumed, or never stopped: weights, rows, starts and scores agree."""
    for name, steps in (("alone", [40]), ("resumed", [20, 40])):
        for number, online in enumerate(steps):
            options = ["--resume"] if number else ["--env", UMAZE, "--dataset-path", data, *SMALL]
            run(script, tmp_path / name, *options, "--online-steps", online)
    alone, resumed = (checkpoint(tmp_path / name) for name in ("alone", "resumed"))
    assert alone["train_scores"] == resumed["train_scores"] == [0, 0]
    assert alone["rng"]["env"] == resumed["rng"]["env"]
    for part in ("online_rows", *alone["networks"]):
        first, second = (x[part] if part in x else x["networks"][part] for x in (alone, resumed))
        for key, value in first.items():
            assert torch.equal(value, second[key]), (part, key)


def test_run_with_whole_episodes(data, tmp_path, monkeypatch):
    """With D4RL's horizon: one online episode of 700 steps ends, and only its rows are in Cal-QL's buffer."""
    monkeypatch.setattr(calql_sera, "update", lambda *_: {})  # to be quick
    steps = ["--online-steps", 720, "--eval-episodes", 1]
    run(calql_sera, tmp_path / "run", "--env", UMAZE, "--dataset-path", data, *SMALL, *steps)
    saved = checkpoint(tmp_path / "run")
    assert saved["train_scores"] == [0]
    assert assert_curves(tmp_path / "run", [0]) == (710,)
    expected = {"mc_returns": -500, "rewards": -5, "terminals": 0}
    assert {name: saved["online_rows"][name].unique().tolist() for name in expected} == {
        name: [value] for name, value in expected.items()
    }
    assert len(saved["online_rows"]["rewards"]) == 700
    text = (tmp_path / "run" / "evals.csv").read_text().splitlines()
    assert text[1:] == [f"{when},0,0.0,700,0.0" for when in ("offline,10", "online,0", "online,720")]
