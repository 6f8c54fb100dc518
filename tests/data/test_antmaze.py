"""AntMaze: the environment against D4RL's source and genuine steps, its data, small runs."""

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
from conftest import ROOT
from gymnasium.utils.env_checker import check_env
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import calql_sera
from envs import antmaze

UMAZE = "antmaze-umaze-v2"
IDS = {"umaze": UMAZE, "medium": "antmaze-medium-play-v2", "large": "antmaze-large-diverse-v2"}
# D4RL's names of the mazes:
TESTED = {"umaze": "U_MAZE_TEST", "medium": "BIG_MAZE_TEST", "large": "HARDEST_MAZE_TEST"}
CORNERS = {"umaze": (0, 8), "medium": (20, 20), "large": (32, 24)}  # where goals begin
SAMPLES = ("umaze", "umaze-diverse", "medium-play", "large-play", "large-diverse")
MASS_ARRAYS = ("body_mass", "body_inertia", "body_ipos", "body_iquat")
CONSERVATIVE = ("calql_sera", "cql_sera")
STILL = np.zeros(8, dtype=np.float32)  # an action without any torque
CPU = torch.device("cpu")


@pytest.fixture(params=IDS)
def maze(request):
    """The name of each maze in turn."""
    return request.param


def make(maze):
    """The environment of a maze as a run has it."""
    return calql_sera.make_env(IDS[maze])


def model_of(maze):
    """The compiled model of a maze with the ant in it."""
    return make(maze).unwrapped.model


def ant_medium():
    """Model of ant-medium-v2 with D4RL's physics."""
    return calql_sera.make_env("ant-medium-v2").unwrapped.model


def shipped_model(raw):
    """The model in the file of an environment, as Gymnasium ships it."""
    return mujoco.MjModel.from_xml_path(raw.fullpath)


def reward_shift(script):
    """--reward-scale and --reward-bias that a script's preset for AntMaze has."""
    return (10, -5) if script.__name__ in CONSERVATIVE else (1, -1)


def oracle(name):
    """One file of the original package as a module; the package around it needs mujoco_py."""
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
    """D4RL's maze by name: an object of its own class MazeEnv, with the path of its XML."""
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
    """The ant weighs 0.8787; masses and inertias are those of ant-medium-v2 with D4RL's physics."""
    env = make(maze)
    model, other = env.unwrapped.model, ant_medium()
    assert model.body_mass.sum() == pytest.approx(0.8787, abs=5e-5)
    names = [model.body(body).name for body in range(model.nbody)]
    assert names == [other.body(body).name for body in range(14)]
    equal = ("body_pos", "body_quat", "body_subtreemass", "dof_armature", "dof_damping")
    for name in (*MASS_ARRAYS, *equal):
        np.testing.assert_array_equal(getattr(model, name), getattr(other, name), err_msg=name)
    for name in ("body_invweight0", "dof_invweight0"):  # derived from them, so up to date
        ours, theirs = getattr(model, name), getattr(other, name)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, err_msg=name)
    shipped = shipped_model(env.unwrapped)
    assert not np.allclose(model.body_inertia, shipped.body_inertia, rtol=1e-3)


def test_shapes_are_those_of_ant(maze):
    """The ant's geoms are Gymnasium's: capsules still, same size, place, friction, groups."""
    model, other = model_of(maze), ant_medium()
    ant = ~is_wall(model)
    assert (model.geom_type[ant] == mujoco.mjtGeom.mjGEOM_CAPSULE).sum() == 12
    names = ("type", "size", "pos", "quat", "friction")
    names += ("condim", "contype", "conaffinity", "solref")
    for name in names:
        ours, theirs = getattr(model, f"geom_{name}")[ant], getattr(other, f"geom_{name}")
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_time_and_contacts(maze):
    """Five steps of 0.02 s by RK4; solimp .8 .8 .01; all margins half of 0.01."""
    raw = make(maze).unwrapped
    model = raw.model
    assert model.opt.timestep == 0.02
    assert raw.frame_skip == 5
    assert raw.dt == pytest.approx(0.1)
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
    solimp = np.tile([0.8, 0.8, 0.01], (model.ngeom, 1))
    np.testing.assert_allclose(model.geom_solimp[:, :3], solimp)
    np.testing.assert_allclose(model.geom_margin, 0.005)


def test_actuators(maze):
    """Actions within +-1 are torques within +-30, on D4RL's joints; beyond, they are clipped."""
    env = make(maze)
    raw, model = env.unwrapped, env.unwrapped.model
    joints = [model.joint(model.actuator_trnid[i, 0]).name for i in range(model.nu)]
    expected = ["hip_4", "ankle_4", "hip_1", "ankle_1", "hip_2", "ankle_2", "hip_3", "ankle_3"]
    assert joints == expected
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
    """For every # a solid box of half size 2, 2, 1 at x = 4 (col - 1), y = 4 (row - 1), z = 1."""
    model = model_of(maze)
    walls = is_wall(model)
    rows = antmaze.MAZES[maze]
    assert rows[1][1] == "R"
    cells = np.argwhere(np.array([list(row) for row in rows]) == "#")
    expected = sorted((4 * (column - 1), 4 * (row - 1), 1) for row, column in cells)
    assert walls.sum() == len(cells)
    assert sorted(map(tuple, model.geom_pos[walls])) == expected
    vectors = {"size": [2, 2, 1], "friction": [1, 0.5, 0.5], "quat": [1, 0, 0, 0]}
    for name, value in vectors.items():
        found = getattr(model, f"geom_{name}")[walls]
        np.testing.assert_array_equal(found, np.tile(value, (len(cells), 1)), err_msg=name)
    for name, value in {"contype": 1, "conaffinity": 1, "condim": 3, "bodyid": 0}.items():
        assert np.all(getattr(model, f"geom_{name}")[walls] == value), name


def test_walls_of_umaze_by_hand():
    """At y = 0, 4 and 8: walls at both ends, and the middle row open only in its last cell."""
    model = model_of("umaze")
    walls = {tuple(place) for place in model.geom_pos[is_wall(model), :2]}
    expected = {
        -4: {-4, 0, 4, 8, 12},
        0: {-4, 12},
        4: {-4, 0, 4, 12},
        8: {-4, 12},
        12: {-4, 0, 4, 8, 12},
    }
    for y, xs in expected.items():
        assert {x for x, other in walls if other == y} == xs, y
    assert len(walls) == 5 + 2 + 4 + 2 + 5


@pytest.mark.parametrize(
    ("direction", "stopped"), [((-1, 0), True), ((0, -1), True), ((1, 0), False)]
)
def test_a_wall_stops_the_ant(direction, stopped):
    """Pushed with its own weight for ten seconds, the ant leaves by the open side alone."""
    env = make("umaze")
    raw = env.unwrapped
    env.reset(seed=0)
    raw.goal = np.array([100.0, 100.0])
    raw.data.xfrc_applied[raw.model.body("torso").id, :2] = 9 * np.array(direction)
    way = [env.step(STILL)[0][:2] @ direction for _ in range(100)]
    if stopped:
        assert 1 < max(way) < 2 - 0.2  # the wall is 2 m from the origin, the torso's radius 0.25
        assert way[-1] > 1
    else:
        assert max(way) > 4


# ------------------------------ D4RL's own source
def test_mazes_of_the_package(original, maze):
    """Each maze is D4RL's, cell by cell, with one start and one goal."""
    signs = {1: "#", 0: ".", "r": "R", "g": "G"}
    rows = []
    for row in original(maze)._maze_map:
        rows.append("".join(signs[cell] for cell in row))
    assert antmaze.MAZES[maze] == tuple(rows)
    assert "".join(rows).count("R") == 1
    assert "".join(rows).count("G") == 1


def test_model_of_the_package(original, maze):
    """D4RL's XML, compiled: the same, but for masses, half the margins, gear for range."""
    ours = model_of(maze)
    theirs = mujoco.MjModel.from_xml_path(original(maze).file_path)
    arrays = {
        "body": "parentid pos quat jntnum geomnum",
        "jnt": "type bodyid pos axis range limited stiffness margin solref solimp",
        "dof": "armature damping frictionloss",
        "geom": "type bodyid size pos quat contype conaffinity condim friction solref solimp "
        "solmix priority gap",
        "actuator": "trnid trntype gaintype biastype ctrllimited forcelimited",
    }
    for kind, names in arrays.items():
        for name in names.split():
            array = f"{kind}_{name}"
            first, second = getattr(ours, array), getattr(theirs, array)
            np.testing.assert_allclose(first, second, atol=1e-12, err_msg=array)
    np.testing.assert_allclose(2 * ours.geom_margin, theirs.geom_margin)
    np.testing.assert_array_equal(ours.qpos0, theirs.qpos0)
    options = "timestep integrator gravity cone solver iterations tolerance impratio"
    for option in options.split():
        first, second = getattr(ours.opt, option), getattr(theirs.opt, option)
        np.testing.assert_array_equal(first, second, err_msg=option)
    our_torques = ours.actuator_gear[:, :1] * ours.actuator_ctrlrange
    their_torques = theirs.actuator_gear[:, :1] * theirs.actuator_ctrlrange
    np.testing.assert_array_equal(our_torques, their_torques)
    assert not np.allclose(ours.body_mass, theirs.body_mass, rtol=1e-2)  # of today's rule


def test_goals_of_the_package(original, maze):
    """2000 goals of D4RL's sampler and ours, axis by axis: one distribution, says K.-S."""
    sampler = original(maze)
    np.random.seed(0)
    theirs = np.array([sampler.goal_sampler(np.random) for _ in range(2000)])
    ours = goals(make(maze), 2000)
    for axis in (0, 1):
        assert stats.ks_2samp(ours[:, axis], theirs[:, axis]).pvalue > 0.01
        uniform = CORNERS[maze][axis] + np.random.uniform(0, 1.5, 2000)
        assert stats.ks_2samp(uniform, theirs[:, axis]).pvalue < 1e-6  # the control


# ------------------------------ starts and goals
def goals(env, count):
    """The goals of that many episodes."""
    env.reset(seed=0)
    found = []
    for _ in range(count):
        env.reset()
        found.append(env.unwrapped.goal)
    return np.array(found)


def test_spaces(maze):
    """29 numbers: all positions and velocities, without the goal; 8 actions from -1 to 1."""
    env = make(maze)
    raw = env.unwrapped
    observation, _ = env.reset(seed=0)
    space = env.observation_space
    assert space.shape == observation.shape == (29,)
    assert space.contains(observation)
    assert np.isinf(space.high).all()
    assert np.isinf(space.low).all()
    np.testing.assert_array_equal(observation, np.concatenate([raw.data.qpos, raw.data.qvel]))
    assert env.action_space.shape == (8,)
    assert env.action_space.dtype == np.float32
    assert np.all(raw.action_space.low == -1)
    assert np.all(raw.action_space.high == 1)
    observation, *_ = env.step(env.action_space.sample().clip(-1, 1))
    np.testing.assert_array_equal(observation, np.concatenate([raw.data.qpos, raw.data.qvel]))
    task = calql_sera.find_task(IDS[maze])
    assert (task.observation_dim, task.action_dim) == (29, 8)


@pytest.mark.filterwarnings("ignore:.*infinity")
def test_gymnasium_contract():
    """Gymnasium's own checker has no complaint: seeds, spaces, types and determinism."""
    check_env(make("umaze").unwrapped, skip_render_check=True)


def test_start(maze):
    """Positions U(-0.1, 0.1) around upright at z 0.75 over the origin, velocities 0.1 N(0, 1)."""
    env = make(maze)
    starts = [env.reset(seed=0)[0]]
    starts += [env.reset()[0] for _ in range(1999)]
    starts = np.array(starts)
    upright = np.array([0, 0, 0.75, 1, *[0] * 11])
    noise, velocities = starts[:, :15] - upright, starts[:, 15:]
    assert np.abs(noise).max() <= 0.1
    assert noise.min(0).max() < -0.099
    assert noise.max(0).min() > 0.099
    for column in noise.T:
        assert stats.kstest(column, stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-3
    for column in velocities.T:
        assert stats.kstest(column, stats.norm(0, 0.1).cdf).pvalue > 1e-3
    correlations = np.corrcoef(starts.T) - np.eye(29)
    assert np.abs(correlations).max() < 0.1  # each drawn by itself


def test_goal_regions(maze):
    """Goals lie U(0, 1) + U(0, 0.5) beyond the goal cell's centre, on both axes."""
    offsets = goals(make(maze), 4000) - CORNERS[maze]
    assert offsets.min() >= 0
    assert offsets.max() <= 1.5
    assert offsets.min(0).max() < 0.05
    assert offsets.max(0).min() > 1.45
    np.testing.assert_allclose(offsets.mean(0), 0.75, atol=0.02)
    variance = 1 / 12 + 0.25 / 12  # 0.1875 if it were uniform
    np.testing.assert_allclose(offsets.var(0), variance, atol=0.008)
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.05


def test_goals_and_seeds(maze):
    """A new goal for every episode, of both versions; a seed fixes goals and starts."""
    env = make(maze)
    raw = env.unwrapped
    old = calql_sera.make_env(IDS[maze].replace("v2", "v0"))
    for other in (make(maze), old):
        seen = []
        for seed in (5, None, None, 6):
            start, _ = env.reset(seed=seed)
            other_start, _ = other.reset(seed=seed)
            np.testing.assert_array_equal(start, other_start)
            np.testing.assert_array_equal(raw.goal, other.unwrapped.goal)
            assert type(raw.goal) is np.ndarray
            assert raw.goal.shape == (2,)
            seen.append(tuple(raw.goal))
        assert len(set(seen)) == 4
    goal = raw.goal.copy()
    env.step(STILL)
    np.testing.assert_array_equal(raw.goal, goal)  # stays where it is within an episode


def test_numpy_global_generator_is_not_used():
    """D4RL draws goals from numpy's global generator: it makes no difference, and stays as is."""
    env = make("medium")
    seen = []
    for seed in (0, 1):
        np.random.seed(seed)
        _, keys, position, *_ = np.random.get_state()
        env.reset(seed=11)
        env.reset()
        seen.append(env.unwrapped.goal)
        _, keys_after, position_after, *_ = np.random.get_state()
        np.testing.assert_array_equal(keys, keys_after)
        assert position == position_after
    np.testing.assert_array_equal(*seen)


# ------------------------------ reward and end
@pytest.mark.parametrize("angle", [0, 2.2, 4.4])
def test_reward_and_end(angle, maze):
    """1 and the end within 0.5 m of the goal, 0 and no end beyond, by where the step has led."""
    env = make(maze)
    raw = env.unwrapped
    goal = np.array([0.3, -0.2])
    inside, outside = [], []
    for distance in [*np.linspace(0, 0.7, 8), *np.linspace(0.45, 0.55, 21), 0.49, 0.51]:
        env.reset(seed=0)
        raw.goal = goal
        qpos = raw.init_qpos.copy()
        qpos[:2] = goal + distance * np.array([np.cos(angle), np.sin(angle)])
        raw.set_state(qpos, np.zeros(14))
        observation, reward, terminated, truncated, _ = env.step(STILL)
        assert type(reward) is float
        assert type(terminated) is bool
        found = np.linalg.norm(observation[:2] - goal)
        assert found == pytest.approx(distance, abs=0.005)
        arrives = found <= 0.5
        assert (reward, terminated, truncated) == (float(arrives), arrives, False), distance
        (inside if arrives else outside).append(found)
    assert max(inside) > 0.49  # both sides are close
    assert min(outside) < 0.51


def test_reward_of_the_step_that_arrives():
    """The place after the step counts: flying in is paid, flying out is not."""
    env = make("umaze")
    raw = env.unwrapped
    for start, speed, result in ((0.55, -2.0, (1.0, True)), (0.45, 2.0, (0.0, False))):
        env.reset(seed=0)
        raw.goal = np.zeros(2)
        qpos, qvel = raw.init_qpos.copy(), np.zeros(14)
        qpos[0], qvel[0] = start, speed
        raw.set_state(qpos, qvel)
        assert env.step(STILL)[1:3] == result


def test_falling_does_not_end():
    """On its back, high up or deep down, D4RL's MuJoCo ants would be out; here it goes on."""
    env = make("umaze")
    raw = env.unwrapped
    for height, turned in ((0.3, True), (3.0, False), (0.15, False)):
        env.reset(seed=0)
        qpos = raw.init_qpos.copy()
        qpos[2] = height
        qpos[3:7] = [0, 1, 0, 0] if turned else [1, 0, 0, 0]
        raw.set_state(qpos, np.zeros(14))
        results = [env.step(STILL)[1:4] for _ in range(20)]
        assert results == [(0.0, False, False)] * 20
        upward = 1 - 2 * (raw.data.qpos[4] ** 2 + raw.data.qpos[5] ** 2)
        assert (upward < -0.9) == turned  # the one on its back is still there


def test_horizons():
    """700 steps in umaze and 1000 elsewhere, by truncation; the environment knows no limit."""
    for env in antmaze.DATASETS:
        assert gymnasium.spec(env).max_episode_steps == (700 if "umaze" in env else 1000), env
    env = make("umaze")
    env.reset(seed=0)
    steps = [env.step(STILL) for _ in range(700)]
    assert [step[2:4] for step in steps] == [(False, False)] * 699 + [(False, True)]
    episode = steps[-1][4]["episode"]
    assert (episode["r"], episode["l"]) == (0, 700)
    *_, truncated, _ = env.unwrapped.step(np.zeros(8))
    assert not truncated


def test_last_step_can_be_a_success():
    """Arriving with the last step is an end by arrival as well, which must not bootstrap."""
    env = make("umaze")
    raw = env.unwrapped
    env.reset(seed=0)
    for _ in range(699):
        env.step(STILL)
    raw.goal = raw.data.qpos[:2].copy()
    assert env.step(STILL)[1:4] == (1.0, True, True)


# ------------------------------ copies and pictures
def go(env, actions):
    """Goal and observations of an episode from seed 3."""
    env.reset(seed=3)
    return [tuple(env.unwrapped.goal), *(tuple(env.step(action)[0]) for action in actions)]


def pickled(env):
    """A copy by way of pickle."""
    return pickle.loads(pickle.dumps(env))


def test_copies(maze):
    """A pickled or deeply copied environment is the same maze and goes the same way."""
    env = make(maze)
    plain = gymnasium.make(IDS[maze])  # env has Gymnasium's ClipAction, a lambda without a pickle
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 8)).astype(np.float32)
    cases = [(env, copy.deepcopy), (env.unwrapped, copy.deepcopy), (env.unwrapped, pickled)]
    cases += [(plain, copy.deepcopy), (plain, pickled)]
    for one, duplicate in cases:
        one.reset(seed=1)
        other = duplicate(one)
        assert other.unwrapped is not one.unwrapped
        assert go(one, actions) == go(other, actions)
        other_model = other.unwrapped.model
        np.testing.assert_array_equal(other_model.geom_pos, env.unwrapped.model.geom_pos)


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


def take_pictures(path):
    """Three pictures of each maze, by the first way to draw that MuJoCo finds here; else a skip."""
    errors = []
    for backend in ("egl", "osmesa"):
        command = [sys.executable, "-c", RENDER, str(path), *IDS.values()]
        environment = os.environ | {"MUJOCO_GL": backend, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if "no backend" not in done.stderr:
            assert done.returncode == 0, done.stderr
            return np.load(path)
        errors.append(f"{backend}: {done.stderr.splitlines()[-1]}")
    pytest.skip("MuJoCo finds no way to draw here: " + "; ".join(errors))


def test_pictures(tmp_path):
    """rgb_array shows the whole maze, the ant at one end, the goal, new each time, at another."""
    pictures = take_pictures(tmp_path / "pictures.npy")
    assert pictures.shape == (9, 480, 480, 3)
    assert pictures.dtype == np.uint8
    for maze, three in zip(IDS, pictures.astype(int).reshape(3, 3, 480, 480, 3)):
        red, green, blue = np.moveaxis(three, 3, 0)
        assert three[0].std() > 20
        brown = (red > green + 20) & (green > blue + 20)
        assert brown[0].mean() > 0.1, maze  # the walls
        disc = (green > red + 30) & (green > blue + 30)  # the goal
        centres = [np.argwhere(picture).mean(0) for picture in disc]
        assert np.linalg.norm(centres[0] - centres[1]) > 2, maze
        np.testing.assert_array_equal(three[1], three[2])
        changed = np.argwhere(np.abs(three[0] - three[1]).max(2) > 30)  # the ant and the goal
        assert changed.min() >= 10, maze
        assert changed.max() < 470, maze
        assert np.ptp(changed, axis=0).max() > 100, maze  # they are far apart


def test_goal_is_drawn_where_it_is(maze):
    """The disc that marks the goal lies there after a reset and during the episode."""
    env = make(maze)
    raw = env.unwrapped
    for seed in (0, 1):
        env.reset(seed=seed)
        np.testing.assert_allclose(raw.data.site("goal").xpos, [*raw.goal, 0])
        env.step(STILL)
        np.testing.assert_allclose(raw.data.site("goal").xpos, [*raw.goal, 0])


# ------------------------------ replay of genuine steps
def step_from(env, state, action):
    """The state (29,) one step after a state, and whether the ant then touches a wall."""
    raw = env.unwrapped
    mujoco.mj_resetData(raw.model, raw.data)  # forgets the solver's warm start
    raw.set_state(state[:15], state[15:])
    observation, *_ = env.step(action)
    return observation, bool(is_wall(raw.model)[raw.data.contact.geom].any())


def read_steps(path, every=1):
    """States before each step, actions, states after it: infos are taken after the step here.

    That holds at the end of an episode too, so every row counts, although v0 marks timeouts a row
    off.
    """
    names = ("observations", "actions", "infos/qpos", "infos/qvel")
    with h5py.File(path) as file:
        states, actions, qpos, qvel = (file[name][::every] for name in names)
    return states, actions, np.concatenate([qpos, qvel], axis=1)


def replay(env, steps):
    """Largest error of each step, and whether it ends at a wall."""
    env.reset(seed=0)
    env.unwrapped.goal = np.full(2, np.inf)
    errors, walls = [], []
    for state, action, truth in zip(*steps):
        observation, touches = step_from(env, state.astype(np.float64), action)
        errors.append(np.abs(observation - truth).max())
        walls.append(touches)
    return np.array(errors), np.array(walls)


def smallest_error(env, state, action, truth, tries=200):
    """The best of states that the float32 in the file may stand for.

    Some contacts hang by its last digit.
    """
    rng = np.random.default_rng(0)
    half = np.spacing(np.abs(state)) / 2
    errors = []
    for _ in range(tries):
        observation, _ = step_from(env, state + rng.uniform(-1, 1, 29) * half, action)
        errors.append(np.abs(observation - truth).max())
    return min(errors)


@pytest.mark.parametrize("sample", SAMPLES)
def test_replay(sample, real_data):
    """Every genuine step comes out to the file's precision; of those at walls, nearly all."""
    env = calql_sera.make_env(f"antmaze-{sample}-v0")
    steps = read_steps(real_data / "real-samples" / f"antmaze-{sample}-v0.hdf5")
    errors, walls = replay(env, steps)
    at_walls, elsewhere = errors[walls], errors[~walls]
    again = np.flatnonzero(~walls & (errors > 1e-4)).tolist()
    best = []
    for row in again:
        state, action, truth = (column[row] for column in steps)
        best.append(smallest_error(env, state, action, truth))
    print(f"{sample}: {len(errors)} rows, median {np.median(errors):.2g}", end=", ")
    print(f"free of walls max {elsewhere.max():.2g}", end=", ")
    for error in best:
        print(f"from the best nearby start {error:.2g}", end=", ")
    print(f"{walls.sum()} at walls", end=": ")
    print(f"median {np.median(at_walls):.2g}, max {at_walls.max():.2g}", end=", ")
    print(f"{(at_walls > 1e-4).sum()} above 1e-4")
    assert len(errors) == (1402 if sample == "umaze" else 1998)
    assert np.median(errors) < 2e-6
    assert len(again) <= 1  # all others are below 1e-4
    assert all(error < 1e-5 for error in best)
    # Where a leg is deeper in a wall than its radius, the radius counted until MuJoCo 3.2.7.
    assert walls.sum() > 30
    assert np.median(at_walls) < 5e-6
    assert np.mean(at_walls < 1e-4) > 0.9
    assert at_walls.max() < 0.3


def new_masses(raw):
    """Masses and inertias by today's rule."""
    shipped = shipped_model(raw)
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
    path = real_data / "real-samples" / f"antmaze-{sample}-v0.hdf5"
    errors, _ = replay(env, read_steps(path, every=20))
    print(f"{sample}, {change.__name__}: median {np.median(errors):.2g}, max {errors.max():.2g}")
    assert np.median(errors) > 3e-4
    assert np.mean(errors < 2e-6) < 0.4


@pytest.mark.parametrize("sample", ["umaze", "medium-play", "large-play"])
def test_replay_fails_without_walls(sample, real_data):
    """The control for walls: without them, the rows that touch some come out wrong."""
    steps = read_steps(real_data / "real-samples" / f"antmaze-{sample}-v0.hdf5", every=3)
    env = calql_sera.make_env(f"antmaze-{sample}-v0")
    _, walls = replay(env, steps)
    model = env.unwrapped.model
    model.geom_conaffinity[is_wall(model)] = 0
    model.geom_contype[is_wall(model)] = 0
    errors, _ = replay(env, [column[walls] for column in steps])
    assert walls.sum() > 8
    assert np.median(errors) > 0.1


# ------------------------------ data
def write_data(path, rewards, terminals, timeouts):
    """A file in D4RL's format with states and actions of noise."""
    rng = np.random.default_rng(0)
    count = len(rewards)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(3, 2, (count, 29)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (count, 8)).astype(np.float32)
        file["rewards"] = np.asarray(rewards, dtype=np.float32)
        file["terminals"] = np.asarray(terminals, dtype=bool)
        file["timeouts"] = np.asarray(timeouts, dtype=bool)
    return str(path)


# Two rows at the goal, then a tail that fails, a failure after a timeout, a success, a cut.
REWARDS = [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0]
TERMINALS = [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0]
TIMEOUTS = [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
KEPT = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]  # neither the timeout nor the last row
ENDS = [2, 3, 5, 8, 9]  # of the rows kept
# Each row of a trajectory that fails counts as if it failed for ever.
RETURNS = [-5.0495, -0.05, 5, 5, -500, -500, -5.0495, -0.05, 5, -500]


@pytest.fixture
def cluster(tmp_path):
    """The path of that file."""
    return write_data(tmp_path / "cluster.hdf5", REWARDS, TERMINALS, TIMEOUTS)


def fill_buffer(script, path, *options):
    """A buffer with a file, as a run with AntMaze's preset has it."""
    args = script.parse_args(["--env", UMAZE, "--device", "cpu", "--online-steps", "50", *options])
    return script.ReplayBuffer(script.load_d4rl(UMAZE, path), args, CPU)


def stored(buffer):
    """All rows of a buffer so far, by name."""
    columns = buffer.as_columns(buffer.table[: buffer.size])
    return {name: column.numpy() for name, column in columns.items()}


def test_rows_at_the_goal_are_kept(cluster):
    """Rewards and terminals are as in the file; trajectories end at terminals and at timeouts."""
    data = calql_sera.load_d4rl(UMAZE, cluster)
    assert data["rewards"].tolist() == [REWARDS[row] for row in KEPT]
    assert (data["rewards"] > 0).sum() == 3
    assert data["terminals"].tolist() == [bool(TERMINALS[row]) for row in KEPT]
    assert np.flatnonzero(data["episode_ends"]).tolist() == ENDS
    with h5py.File(cluster) as file:
        observations = file["observations"][:]
    np.testing.assert_array_equal(data["observations"], observations[KEPT])
    np.testing.assert_array_equal(data["next_observations"], observations[np.add(KEPT, 1)])


@pytest.mark.parametrize(
    ("rewards", "ends", "expected"),
    [
        ((-5, 5, 5), (0, 1, 1), (-0.05, 5, 5)),
        ((-5, -5, 5), (0, 0, 1), (-5.0495, -0.05, 5)),
        ((-5, -5, -5), (0, 0, 1), (-500, -500, -500)),
        ((-5, 5, -5), (0, 0, 1), (-5 + 0.99 * 0.05, 0.05, -5)),  # not the failure rule
        ((-5, 5, 5, -5), (0, 1, 1, 1), (-0.05, 5, 5, -500)),
    ],
)
def test_returns_by_hand(rewards, ends, expected):
    """Cluster, success, failure, a success in the middle, a tail: returns worked out by hand."""
    returns = calql_sera.mc_returns(np.array(rewards), np.array(ends, bool), 0.99, -5.0)
    np.testing.assert_allclose(returns, expected, rtol=1e-6)


def test_returns_in_the_buffer(cluster):
    """Cal-QL's buffer has those of the whole file, of scaled rewards."""
    buffer = fill_buffer(calql_sera, cluster)
    np.testing.assert_allclose(stored(buffer)["mc_returns"], RETURNS, rtol=1e-6)
    buffer = fill_buffer(calql_sera, cluster, "--reward-scale", "1", "--reward-bias", "-1")
    expected = [-1.99, -1, 0, 0, -100, -100, -1.99, -1, 0, -100]
    np.testing.assert_allclose(stored(buffer)["mc_returns"], expected, rtol=1e-6)


def test_returns_without_discount(cluster):
    """A failure for ever would have no finite return with gamma 1: there it is a plain sum."""
    buffer = fill_buffer(calql_sera, cluster, "--gamma", "1")
    returns = stored(buffer)["mc_returns"].tolist()
    assert returns == [-5, 0, 5, 5, -10, -5, -5, 0, 5, -5]


def test_failure_rule_is_for_antmaze_alone():
    """The same rewards as hopper's are a plain sum."""
    args = calql_sera.parse_args(["--env", "hopper-medium-v2", "--device", "cpu"])
    rows = {"rewards": np.zeros(3), "episode_ends": np.array([False, False, True])}
    assert calql_sera.added_columns(rows, args, 1.0)["mc_returns"].tolist() == [0, 0, 0]
    rows["rewards"] = np.full(3, -5.0)
    args.reward_bias = -5.0
    returns = calql_sera.added_columns(rows, args, 1.0)["mc_returns"]
    np.testing.assert_allclose(returns, [-14.8505, -9.95, -5], rtol=1e-6)


def test_online_episodes(cluster):
    """Online, each row of a failed episode has -5 / (1 - gamma), of a success its sum."""
    buffer = fill_buffer(calql_sera, cluster)
    last = np.arange(4) == 3
    for arrived in (False, True):
        rows = {
            "observations": np.zeros((4, 29)),
            "next_observations": np.zeros((4, 29)),
            "actions": np.zeros((4, 8)),
            "rewards": 1.0 * last * arrived,
            "terminals": last & arrived,
            "episode_ends": last,
        }
        buffer.append(rows)
    success = [5.0]
    for _ in range(3):
        success.insert(0, -5 + 0.99 * success[0])
    online = stored(buffer)["mc_returns"][buffer.offline_size :]
    np.testing.assert_allclose(online, [-500] * 4 + success, rtol=1e-6)


def test_rewards_and_states_in_the_buffer(script, cluster):
    """10 r - 5 for CQL and Cal-QL, r - 1 for the others; states and terminals as they are."""
    buffer = fill_buffer(script, cluster)
    columns = stored(buffer)
    scale, bias = reward_shift(script)
    assert columns["rewards"].tolist() == [scale * REWARDS[row] + bias for row in KEPT]
    assert columns["terminals"].tolist() == [TERMINALS[row] for row in KEPT]
    assert (buffer.mean, buffer.std) == (0, 1)
    data = script.load_d4rl(UMAZE, cluster)
    for name in ("observations", "next_observations"):
        np.testing.assert_array_equal(columns[name], data[name])
    assert ("mc_returns" in columns) == (script is calql_sera)
    normalised = stored(fill_buffer(script, cluster, "--normalize-observations"))  # the control
    assert np.abs(normalised["observations"].mean(0)).max() < 1e-5


def test_a_buffer_leaves_its_data_alone(script, cluster):
    """What was loaded is the same after a buffer has taken it in."""
    args = script.parse_args(["--env", UMAZE, "--online-steps", "1"])
    data = script.load_d4rl(UMAZE, cluster)
    script.ReplayBuffer(data, args, CPU)
    for name, array in script.load_d4rl(UMAZE, cluster).items():
        np.testing.assert_array_equal(data[name], array, err_msg=name)


# ------------------------------ files that never reach the goal
@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """Run a script's main, which has to refuse before any training: gives its line on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(script, *argv):
        monkeypatch.setattr(script, "train", lambda *_: pytest.fail("training has begun"))
        small = ["--device", "cpu", "--eval-episodes", "1", "--online-steps", "1"]
        with pytest.raises(SystemExit) as caught:
            script.main([*map(str, argv), *small])
        stderr = capsys.readouterr().err.strip()
        assert caught.value.code == 2
        assert stderr.startswith("error: ")
        assert "\n" not in stderr
        assert not (tmp_path / "runs").exists()
        return stderr

    return run


@pytest.mark.parametrize("last", [0, 1])
def test_a_file_without_success(script, refuse, tmp_path, last):
    """No reward at all, or one in the last row only, which is not kept: refused by name."""
    rewards = np.zeros(12)
    rewards[-1] = last
    path = write_data(tmp_path / "failures.hdf5", rewards, np.zeros(12), TIMEOUTS)
    message = refuse(script, "--env", UMAZE, "--dataset-path", path)
    assert f"{path} never reaches the goal" in message
    assert "reward > 0" in message


@pytest.mark.parametrize("sample", SAMPLES)
def test_genuine_samples_without_success(sample, refuse, real_data):
    """The genuine samples load, but hold no success, and are refused."""
    env = f"antmaze-{sample}-v0"
    path = real_data / "real-samples" / f"{env}.hdf5"
    data = calql_sera.load_d4rl(env, path)
    assert len(data["rewards"]) == (1400 if sample == "umaze" else 1996)
    assert data["episode_ends"].sum() == 2
    assert not data["rewards"].any()
    message = refuse(calql_sera, "--env", env, "--dataset-path", path)
    assert f"{path} never reaches the goal" in message


def test_without_a_file(tmp_path, monkeypatch):
    """From scratch no file is read, so none is refused."""
    sizes = []
    monkeypatch.setattr(calql_sera, "train", lambda run, args: sizes.append(run.buffer.size))
    options = ["--env", UMAZE, "--device", "cpu", "--offline-steps", "0", "--mixing-ratio", "0"]
    options += ["--online-steps", "300", "--eval-episodes", "1", "--learning-starts", "0"]
    calql_sera.main([*options, "--run-dir", str(tmp_path / "run")])
    assert sizes == [0]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["env_id"] == UMAZE
    assert config["data_file"] is None


# ------------------------------ names and scores
def test_addresses_of_the_package():
    """All AntMaze ids of the package's v0 and v2, no others, and the same addresses."""
    expected = {}
    for env, address in oracle("infos.py").DATASET_URLS.items():
        if re.fullmatch(r"antmaze-.*-v[02]", env):
            expected[env] = address
    assert len(expected) == 12
    assert antmaze.DATASETS.keys() == expected.keys()
    for env, address in expected.items():
        assert f"http://{calql_sera.SERVER}/{calql_sera.find_task(env).file}" == address


def test_reference_scores():
    """The package's reference scores are 0 and 1, so a score is 100 times the return."""
    infos = oracle("infos.py")
    for env in antmaze.DATASETS:
        task = calql_sera.find_task(env)
        assert (task.random_return, task.expert_return) == (0, 1)
        assert (infos.REF_MIN_SCORE[env], infos.REF_MAX_SCORE[env]) == (0, 1), env


def test_ids_by_hand():
    """The twelve ids, a few files, scores of returns, and each id's maze."""
    kinds = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play")
    ids = {f"antmaze-{kind}-v2" for kind in (*kinds, "large-diverse")}
    ids |= {f"antmaze-{kind}-v0" for kind in (*kinds, "large-diverse")}
    assert set(antmaze.DATASETS) == ids
    name = "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse"
    files = {env: task["file"] for env, task in antmaze.DATASETS.items()}
    assert files[UMAZE] == f"ant_maze_v2/{name}_fixed.hdf5"
    assert files["antmaze-umaze-v0"] == f"ant_maze_new/{name}.hdf5"
    name = "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse"
    assert files["antmaze-large-play-v2"] == f"ant_maze_v2/{name}_fixed.hdf5"
    scores = calql_sera.normalized_score(UMAZE, np.array([0, 0.25, 1]))
    assert scores.tolist() == [0, 25, 100]
    for env in antmaze.DATASETS:
        task = calql_sera.find_task(env)
        assert task.env_id == env
        cells = calql_sera.make_env(env).unwrapped.cells
        assert tuple("".join(row) for row in cells) == antmaze.MAZES[env.split("-")[1]]


def test_importing_leaves_no_loop_variable_behind():
    """The module's names are its constants, its functions and its class."""
    module = antmaze.__name__
    own = {
        name
        for name, value in vars(antmaze).items()
        if not name.startswith("__") and getattr(value, "__module__", module) == module
    }
    imports = {"gymnasium", "mujoco", "np"}
    constants = {"CELL", "MAZES", "KINDS", "FILES", "CHECKSUMS", "DATASETS"}
    assert own - imports == constants | {"compile_ant", "AntMazeEnv", "register_environments"}


@pytest.mark.parametrize(
    "env", ["antmaze-umaze-v1", "antmaze-umaze-v3", "antmaze-medium-v2", "antmaze", "pen-human-v2"]
)
def test_other_ids(env, script, refuse):
    """Ids that D4RL has not, or that are not supported, are named."""
    message = refuse(script, "--env", env)
    assert f"--env {env} is no dataset that is supported" in message
    with pytest.raises(ValueError, match=env):
        script.make_env(env)


def test_download_is_offered(refuse, tmp_path, monkeypatch):
    """Without a file and a server: the address of D4RL's file and the folder it may be put into."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(calql_sera, "SERVER", "127.0.0.1:1")
    message = refuse(calql_sera, "--env", UMAZE)
    file = antmaze.DATASETS[UMAZE]["file"]
    assert f"http://127.0.0.1:1/{file}" in message
    assert str(tmp_path) in message
    name = Path(file).name
    (tmp_path / name).touch()
    assert calql_sera.fetch_dataset(UMAZE) == tmp_path / name


def test_script_alone_in_a_folder(tmp_path):
    """A copy of one script has no AntMaze, says in one sentence what it lacks, has the rest."""
    shutil.copy(ROOT / "calql_sera.py", tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    processes = []
    for options in (["--env", UMAZE], ["--help"]):
        process = subprocess.Popen(
            [sys.executable, "-B", str(tmp_path / "calql_sera.py"), *options],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    (no_text, message), (help_text, no_error) = (
        process.communicate(timeout=120) for process in processes
    )
    assert [process.returncode for process in processes] == [2, 0]
    assert no_text == no_error == ""
    assert "--dataset-path" in help_text
    expected = f"error: --env {UMAZE} needs the file envs/antmaze.py beside the script"
    assert message.strip() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["calql_sera.py"]


def test_another_package_of_this_name(tmp_path):
    """An installed package "envs", as the registry has one, does not hide the one of the script."""
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").touch()
    command = [sys.executable, "-B", "-c", "from envs import antmaze; print(antmaze.__file__)"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run(
        command, cwd=tmp_path / "envs", env=environment, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.strip() == str(ROOT / "envs" / "antmaze.py")


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
CQL = {
    "cql_lagrange": True,
    "cql_gap": 0.8,
    "cql_weight": 5.0,
    "cql_max_target_backup": True,
    "actor_layers": 2,
    "critic_layers": 4,
    "actor_lr": 1e-4,
    "critic_lr": 3e-4,
}
OWN = {
    "calql_sera": CQL,
    "cql_sera": CQL,
    "iql_sera": {"expectile": 0.9, "beta": 10.0},
    "td3bc_sera": {"bc_alpha": 2.5},
}


@pytest.mark.parametrize("env", [*IDS.values(), "antmaze-umaze-diverse-v0"])
def test_presets(env, script):
    """Values by the name of the dataset, the same for all mazes; other families keep theirs."""
    scale, bias = reward_shift(script)
    expected = COMMON | {"reward_scale": scale, "reward_bias": bias}
    expected |= OWN.get(script.__name__, {})
    args = vars(script.parse_args(["--env", env]))
    assert {name: args[name] for name in expected} == expected
    ant = script.parse_args(["--env", "ant-medium-v2"])
    assert ant.eval_episodes == 10
    assert ant.reward_bias == 0
    assert ant.normalize_observations


@pytest.mark.parametrize("order", [1, -1])
def test_user_values_win(script, order):
    """What is on the command line counts, before --env and after it."""
    options = [
        ["--env", UMAZE],
        ["--reward-bias", "0.5"],
        ["--reward-scale", "2"],
        ["--eval-episodes", "7"],
        ["--sera-k", "3"],
        ["--normalize-observations"],
        ["--offline-steps", "5_000"],
    ]
    argv = []
    for option in options[::order]:
        argv += option
    args = script.parse_args(argv)
    assert (args.reward_bias, args.reward_scale) == (0.5, 2)
    assert (args.eval_episodes, args.sera_k) == (7, 3)
    assert args.normalize_observations
    assert args.offline_steps == 5000
    assert args.eval_every == 25_000


# ------------------------------ runs
OFFLINE_STEPS = 10
SMALL = [
    *("--offline-steps", OFFLINE_STEPS, "--eval-episodes", 2, "--device", "cpu"),
    *("--hidden-dim", 16, "--batch-size", 32, "--sera-k", 5),
]


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
    """Run a script in this process."""
    script.main([*map(str, options), "--run-dir", str(run_dir)])


def checkpoint(run_dir):
    """What a run has saved."""
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def online_rows(script, saved):
    """The online transitions of a checkpoint, by name."""
    args = script.Args(**saved["args"])
    buffer = script.ReplayBuffer(script.load_d4rl(UMAZE, args.dataset_path), args, CPU)
    return {
        name: column.numpy() for name, column in buffer.as_columns(saved["online_rows"]).items()
    }


def scalars(run_dir, name):
    """What TensorBoard shows: steps and values of a curve."""
    events = EventAccumulator(str(run_dir)).Reload().Scalars(name)
    return [event.step for event in events], [event.value for event in events]


def assert_curves(run_dir, scores):
    """Scores and regret of each online episode so far; gives the online steps of their ends."""
    steps, logged = scalars(run_dir, "train/score")
    assert logged == scores
    assert steps == sorted(set(steps))
    regret = [1 - np.mean(scores[: count + 1]) / 100 for count in range(len(scores))]
    regret_steps, logged_regret = scalars(run_dir, "train/regret")
    assert regret_steps == steps
    assert logged_regret == pytest.approx(regret)
    return [step - OFFLINE_STEPS - 1 for step in steps]


def returns_to_go(length, arrived, scale, bias):
    """Cal-QL's returns of an online episode, the end of which is the goal or not."""
    if not arrived:
        return [bias / (1 - 0.99)] * length
    returns = [scale + bias]
    while len(returns) < length:
        returns.insert(0, bias + 0.99 * returns[0])
    return returns


def test_run(script, data, short, lucky, tmp_path, capsys):
    """Both phases: raw scores of 0 and 100, logged; shifted rewards in the buffer; goes on."""
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
    assert config["env_id"] == UMAZE
    assert config["args"]["normalize_observations"] is False

    saved = checkpoint(run_dir)
    scale, bias = reward_shift(script)
    scores = saved["train_scores"]
    assert set(scores) == {0, 100}
    ends = assert_curves(run_dir, scores)
    online = online_rows(script, saved)
    arrivals = [end - 1 for end, score in zip(ends, scores) if score]
    expected = np.full(90, float(bias))
    expected[arrivals] += scale
    assert online["rewards"].tolist() == expected.tolist()
    assert np.flatnonzero(online["terminals"]).tolist() == arrivals
    assert saved["normalizer"]["mean"] == 0
    assert saved["normalizer"]["std"] == 1
    if script is calql_sera:
        returns = []
        for start, end, score in zip([0, *ends], ends, scores):
            returns += returns_to_go(end - start, score == 100, scale, bias)
        returns += returns_to_go(90 - ends[-1], False, scale, bias)  # cut by the end of the run
        np.testing.assert_allclose(online["mc_returns"], returns, rtol=1e-6)

    run(script, run_dir, "--resume", "--online-steps", 130)
    after = checkpoint(run_dir)
    assert after["train_scores"][: len(scores)] == scores
    assert len(after["train_scores"]) > len(scores)
    assert_curves(run_dir, after["train_scores"])
    assert len(after["online_rows"]) == 130
    assert torch.equal(after["online_rows"][:90], saved["online_rows"])


def test_resumed_run_is_the_same(script, data, short, tmp_path):
    """Stopped after an episode and resumed, or not: weights, rows, starts and scores agree."""
    start = ["--env", UMAZE, "--dataset-path", data, *SMALL]
    run(script, tmp_path / "alone", *start, "--online-steps", 40)
    run(script, tmp_path / "resumed", *start, "--online-steps", 20)
    run(script, tmp_path / "resumed", "--resume", "--online-steps", 40)
    alone, resumed = (checkpoint(tmp_path / name) for name in ("alone", "resumed"))
    assert alone["train_scores"] == resumed["train_scores"] == [0, 0]
    assert alone["rng_env"] == resumed["rng_env"]
    assert torch.equal(alone["online_rows"], resumed["online_rows"])
    assert alone["agent"].keys() == resumed["agent"].keys()
    for name, weights in alone["agent"].items():
        assert torch.equal(weights, resumed["agent"][name]), name


def test_run_with_whole_episodes(data, tmp_path, monkeypatch):
    """With D4RL's horizon: Cal-QL's buffer gets an online episode at its end, after 700 steps."""
    appended = []
    append = calql_sera.ReplayBuffer.append

    def note(self, transitions, **others):
        appended.append(len(transitions["rewards"]))
        append(self, transitions, **others)

    monkeypatch.setattr(calql_sera.ReplayBuffer, "append", note)
    monkeypatch.setattr(calql_sera, "update", lambda *_: {})  # to be quick
    options = ["--online-steps", 720, "--eval-episodes", 1]
    run(calql_sera, tmp_path / "run", "--env", UMAZE, "--dataset-path", data, *SMALL, *options)
    assert appended == [58, 700, 20]  # data, whole episode, and what the end of the run cut
    saved = checkpoint(tmp_path / "run")
    assert saved["train_scores"] == [0]
    assert assert_curves(tmp_path / "run", [0]) == [700]
    online = online_rows(calql_sera, saved)
    for name, value in {"mc_returns": -500, "rewards": -5, "terminals": 0}.items():
        assert online[name].tolist() == [value] * 720, name
    _, *rows = (tmp_path / "run" / "evals.csv").read_text().splitlines()
    assert rows == [f"{when},0,0.0,700,0.0" for when in ("offline,10", "online,0", "online,720")]
