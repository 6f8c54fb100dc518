"""D4RL's Adroit for Gymnasium: a hand turns a pen, opens a door, hammers a nail or moves a ball.

    import gymnasium, envs.adroit
    env = gymnasium.make("pen-human-v1")  # or another id: those of a task differ in their data only

D4RL: Fu et al. 2020, arXiv 2004.07219; its code is d4rl/hand_manipulation_suite. The tasks are
from Rajeswaran et al. 2018, arXiv 1709.10087. The models are those that gymnasium-robotics
installs; of its environments, which pay and end otherwise, nothing is used. Contacts are those of
MuJoCo 2, as in the data.

Observations are the angles of the hand's joints, then what the task is about. Actions in [-1, 1]
are the positions that the joints are pulled to, from one end of their range to the other. A step
is 0.01 s. The dense reward grows towards the goal, with bonuses near it; it goes on there. A pen
that has been dropped ends the episode, nothing else does; after 100 steps (pen) or 200 it is cut.
In the info of a step, success tells whether it ends at the goal: D4RL's goal_achieved.

The ids -binary-v0 are those of AWAC (arXiv 2006.09359) and Cal-QL (arXiv 2303.05479): -1 for each
step but the one that reaches the goal, which is paid 0 and ends the episode. A dropped pen stays.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.utils import EzPickle

PACKAGE = importlib.util.find_spec("gymnasium_robotics")  # never imported: we only need its files
if PACKAGE is None:
    fix = "pip install gymnasium-robotics==1.4.2"
    raise gymnasium.error.DependencyNotInstalled(f"Adroit's models are not installed: {fix}")
MODELS = Path(PACKAGE.origin).parent / "envs" / "assets" / "adroit_hand"


class Sizes(NamedTuple):
    """Of a task."""

    observation_dim: int
    action_dim: int
    random_return: float  # which D4RL scores as 0
    expert_return: float  # which D4RL scores as 100
    horizon: int  # steps of an episode


TASKS = {
    "pen": Sizes(45, 24, 96.262799, 3076.8331017826877, 100),
    "door": Sizes(39, 28, -56.512833, 2880.5693087298737, 200),
    "hammer": Sizes(46, 26, -274.856578, 12794.134825156867, 200),
    "relocate": Sizes(39, 30, -6.425911, 4233.877797728884, 200),
}


class AdroitEnv(MujocoEnv, EzPickle):
    """What the tasks share. Each adds its own place, observe and judge.

    place draws where things are in an episode. judge gives the dense reward, whether the goal is
    reached, and whether it is out of reach for good. Places in an observation are 2 ms older than
    its joints, as in D4RL. binary: see above.
    """

    task: str
    view: tuple[float, float]  # the camera's distance, in metres, and azimuth
    metadata = MujocoEnv.metadata | {"render_modes": ["human", "rgb_array"], "render_fps": 100}

    def __init__(self, binary: bool = False, **kwargs):
        EzPickle.__init__(self, binary, **kwargs)
        self.binary = binary
        path = str(MODELS / f"adroit_{self.task}.xml")
        shape = (TASKS[self.task].observation_dim,)
        space = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float64)
        camera = dict(zip(("distance", "azimuth"), self.view))
        super().__init__(path, 5, space, default_camera_config=camera, **kwargs)
        low, high = self.model.actuator_ctrlrange.T
        self.middle = (low + high) / 2
        self.reach = (high - low) / 2
        types = self.model.geom_type
        self.is_box = types == mujoco.mjtGeom.mjGEOM_BOX
        round_types = (mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_CAPSULE)
        self.is_round = np.isin(types, round_types)

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model, data = super()._initialize_simulation()
        # In MuJoCo 2 the larger of two margins counted, where they add up since 3.5.0; two convex
        # shapes met in one point, as libccd found it; and contacts were solved for all at once.
        model.geom_margin[:] *= 0.5
        off = mujoco.mjtDisableBit
        model.opt.disableflags |= off.mjDSBL_NATIVECCD | off.mjDSBL_MULTICCD | off.mjDSBL_ISLAND
        return model, data

    def _set_action_space(self) -> gymnasium.spaces.Space:
        self.action_space = gymnasium.spaces.Box(-1, 1, (self.model.nu,), np.float32)
        return self.action_space

    def _step_mujoco_simulation(self, ctrl: np.ndarray, n_frames: int) -> None:
        """As MuJoCo before 3.2.7: nothing round is deeper in a box than its radius."""
        model, data = self.model, self.data
        data.ctrl[:] = ctrl
        for _ in range(n_frames):
            mujoco.mj_step1(model, data)
            first, second = data.contact.geom.T  # in the order of types: a box comes last
            radius = model.geom_size[first, 0]
            deep = self.is_round[first] & self.is_box[second] & (data.contact.dist < -radius)
            if deep.any():
                data.contact.dist[deep] = -radius[deep]
                mujoco.mj_makeConstraint(model, data)
                mujoco.mj_projectConstraint(model, data)
                mujoco.mj_referenceConstraint(model, data)
            mujoco.mj_step2(model, data)

    def reset_model(self) -> np.ndarray:
        self.place()
        self.set_state(self.init_qpos, self.init_qvel)
        return self.observe()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.do_simulation(self.middle + np.clip(action, -1, 1) * self.reach, self.frame_skip)
        reward, success, failure = self.judge()
        ends = failure
        if self.binary:
            reward = float(success) - 1
            ends = success
        if self.render_mode == "human":
            self.render()
        return self.observe(), reward, ends, False, {"success": success}

    def point(self, site: str) -> np.ndarray:
        """Where a marked point of the model is (3,), in metres."""
        return self.data.site(site).xpos

    def item(self) -> np.ndarray:
        """Where the middle of pen, hammer or ball is (3,), in metres."""
        return self.data.body("Object").xpos


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b))


class PenEnv(AdroitEnv):
    """Turn a pen in the hand until it is parallel to another, which is drawn beside the hand."""

    task = "pen"
    view = (1.0, -45)

    def axis(self, pen: str) -> np.ndarray:
        """Unit vector (3,) along the pen ("object") or the one to be parallel to ("target")."""
        top, bottom = self.point(f"{pen}_top"), self.point(f"{pen}_bottom")
        return (top - bottom) / distance(top, bottom)

    def place(self) -> None:
        roll, pitch = self.np_random.uniform(-1, 1, 2)
        mujoco.mju_euler2Quat(self.model.body("target").quat, [roll, pitch, 0], "xyz")

    def observe(self) -> np.ndarray:
        joints, pen, speed = self.data.qpos[:-6], self.item(), self.data.qvel[-6:]
        axis, goal_axis = self.axis("object"), self.axis("target")
        away = pen - self.point("eps_ball")
        parts = [joints, pen, speed, axis, goal_axis, away, axis - goal_axis]
        return np.concatenate(parts)

    def judge(self) -> tuple[float, bool, bool]:
        away = distance(self.item(), self.point("eps_ball"))
        alignment = float(self.axis("object") @ self.axis("target"))
        success = away < 0.075 and alignment > 0.95
        dropped = bool(self.item()[2] < 0.075)
        reward = alignment - away
        if away < 0.075 and alignment > 0.9:
            reward += 10
        if success:
            reward += 50
        if dropped:
            reward -= 5
        return reward, success, dropped


class DoorEnv(AdroitEnv):
    """Turn the latch of a door and open it."""

    task = "door"
    view = (1.5, 90)

    def place(self) -> None:
        low, high = (-0.3, 0.25, 0.252), (-0.2, 0.35, 0.35)
        self.model.body("frame").pos[:] = self.np_random.uniform(low, high)

    def observe(self) -> np.ndarray:
        palm, handle = self.point("S_grasp"), self.point("S_handle")
        *_, hinge, latch = self.data.qpos
        is_open = 1.0 if hinge > 1 else -1.0
        joints = self.data.qpos[1:-2]  # without the arm's first: forwards and back
        parts = [joints, [latch, hinge], palm, handle, palm - handle, [is_open]]
        return np.concatenate(parts)

    def judge(self) -> tuple[float, bool, bool]:
        hinge = float(self.data.qpos[-2])  # radians
        reward = -0.1 * distance(self.point("S_grasp"), self.point("S_handle"))
        reward -= 0.1 * (hinge - 1.57) ** 2
        reward -= 1e-5 * float(self.data.qvel @ self.data.qvel)
        if hinge > 0.2:
            reward += 2
        if hinge > 1:
            reward += 8
        if hinge > 1.35:
            reward += 10
        return reward, hinge >= 1.35, False


class HammerEnv(AdroitEnv):
    """Take a hammer and drive a nail into a board."""

    task = "hammer"
    view = (2.0, 45)

    def place(self) -> None:
        self.model.body("nail_board").pos[2] = self.np_random.uniform(0.1, 0.25)

    def observe(self) -> np.ndarray:
        joints, speed = self.data.qpos[:-6], np.clip(self.data.qvel[-6:], -1, 1)
        turned = self.data.body("Object").xmat.reshape(3, 3)
        roll = np.arctan2(-turned[1, 2], turned[2, 2])
        pitch = np.arctan2(turned[0, 2], np.hypot(turned[1, 2], turned[2, 2]))
        yaw = np.arctan2(-turned[0, 1], turned[0, 0])
        palm, nail = self.point("S_grasp"), self.point("S_target")
        blow = np.clip(self.data.sensor("S_nail").data, -1, 1)
        parts = [joints, speed, palm, self.item(), [roll, pitch, yaw], nail, blow]
        return np.concatenate(parts)

    def judge(self) -> tuple[float, bool, bool]:
        head, nail = self.point("tool"), self.point("S_target")
        sticks_out = distance(nail, self.point("nail_goal"))
        reward = -0.1 * distance(self.point("S_grasp"), self.item())
        reward -= distance(head, nail)
        reward -= 10 * sticks_out
        reward -= 0.01 * float(np.linalg.norm(self.data.qvel))
        if self.item()[2] > 0.04 and head[2] > 0.04:  # off the table
            reward += 2
        if sticks_out < 0.02:
            reward += 25
        if sticks_out < 0.01:
            reward += 75
        return reward, sticks_out < 0.01, False


class RelocateEnv(AdroitEnv):
    """Take a ball from the table to a place in the air."""

    task = "relocate"
    view = (1.5, 90)

    def place(self) -> None:
        uniform = self.np_random.uniform
        self.model.body("Object").pos[:2] = uniform((-0.15, -0.15), (0.15, 0.3))
        self.model.site("target").pos[:] = uniform((-0.2, -0.2, 0.15), (0.2, 0.2, 0.35))

    def observe(self) -> np.ndarray:
        palm, ball, goal = self.point("S_grasp"), self.item(), self.point("target")
        return np.concatenate([self.data.qpos[:-6], palm - ball, palm - goal, ball - goal])

    def judge(self) -> tuple[float, bool, bool]:
        palm, ball, goal = self.point("S_grasp"), self.item(), self.point("target")
        away = distance(ball, goal)
        reward = -0.1 * distance(palm, ball)
        if ball[2] > 0.04:  # off the table
            reward += 1 - 0.5 * distance(palm, goal) - 0.5 * away
        if away < 0.1:
            reward += 10
        if away < 0.05:
            reward += 20
        return reward, away < 0.1, False


ENVIRONMENTS = {"pen": PenEnv, "door": DoorEnv, "hammer": HammerEnv, "relocate": RelocateEnv}
BINARY = ("pen-binary-v0", "door-binary-v0", "relocate-binary-v0")  # for which D4RL has no data
CHECKSUMS = {  # SHA-256 of D4RL's files, the first 16 digits; of relocate most are not known
    "pen-human-v0": "64103c05d3b33b4c",
    "pen-cloned-v0": "f881ab4b03c0b8e0",
    "pen-expert-v0": "0ad80bc6d5e655d0",
    "pen-human-v1": "209e345b2150b633",
    "pen-cloned-v1": "6d1a982cee195050",
    "pen-expert-v1": "3791b8ca6a802061",
    "door-human-v0": "9df6345e28fcec8f",
    "door-cloned-v0": "829cd0cd312ac3b0",
    "door-expert-v0": "a6e6c29985cac509",
    "door-human-v1": "f9691288c3ddf2b4",
    "door-cloned-v1": "1f6a60ecc4d2a2e5",
    "door-expert-v1": "66df4cd4e0a1e0b7",
    "hammer-human-v0": "96bbad3484598280",
    "hammer-cloned-v0": "a645a67b7bc2a793",
    "hammer-expert-v0": "1e51edf95b007a12",
    "hammer-human-v1": "3e42f3f49b5c92a9",
    "hammer-cloned-v1": "e48d75b159bdd72f",
    "hammer-expert-v1": "1c069a0f6e485249",
    "relocate-cloned-v1": "8baf2b7f0a7e44e6",
}


def files_of(task: str) -> dict[str, str]:
    """D4RL's ids of a task, each with its file on D4RL's server."""
    files = {
        f"{task}-human-v0": f"hand_dapg/{task}-v0_demos_clipped.hdf5",
        f"{task}-cloned-v0": f"hand_dapg/{task}-demos-v0-bc-combined.hdf5",
        f"{task}-expert-v0": f"hand_dapg/{task}-v0_expert_clipped.hdf5",
    }
    for kind in ("human", "cloned", "expert"):
        files[f"{task}-{kind}-v1"] = f"hand_dapg_v1/{task}-{kind}-v1.hdf5"
    return files


def register_environments() -> dict[str, dict]:
    """Register all ids; gives what the scripts' class Task has of each one.

    No horizon, as human demonstrations are longer than an episode, and no scores for the binary
    tasks.
    """
    datasets = {}
    for name, task in TASKS.items():
        sizes = {"observation_dim": task.observation_dim, "action_dim": task.action_dim}
        scores = {"random_return": task.random_return, "expert_return": task.expert_return}
        for env_id, file in files_of(name).items():
            more = {"file": file, "sha256": CHECKSUMS.get(env_id)}
            datasets[env_id] = sizes | scores | more
        if f"{name}-binary-v0" in BINARY:
            datasets[f"{name}-binary-v0"] = sizes
    for env_id in datasets:
        name = env_id.partition("-")[0]
        gymnasium.register(
            env_id,
            ENVIRONMENTS[name],
            max_episode_steps=TASKS[name].horizon,
            kwargs={"binary": env_id in BINARY},
        )
    return datasets


DATASETS = register_environments()  # by id
