"""D4RL's AntMaze for Gymnasium: an ant walks through a maze and is paid once, when it arrives.

    import gymnasium, envs.antmaze
    env = gymnasium.make("antmaze-umaze-v2")  # or another id: here v0 differs in its data only

D4RL: Fu et al. 2020, arXiv 2004.07219; its code is d4rl/locomotion. The ant is the ant.xml that
Gymnasium installs, with D4RL's time step, torques and contact stiffness: that makes it D4RL's.
Walls are added when an environment is made. Masses, inertias and margins are those of MuJoCo
before 2.1.2, as in the data.

The origin is the centre of the start cell, a cell is 4 m wide, x grows with the column and y with
the row. Observations (29,) are positions qpos (15,) and velocities qvel (14,), without the goal,
which is drawn anew for each episode. Actions (8,) in [-1, 1] are torques of up to 30. The reward
is 1 within 0.5 m of the goal, and ends the episode; falling over does not. After 700 steps (umaze)
or 1000 an episode is cut.
"""

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.utils import EzPickle

CELL = 4.0  # metres
MAZES = {  # R is the start, G the cell of the goal, # a wall
    "umaze": (
        "#####",
        "#R..#",
        "###.#",
        "#G..#",
        "#####",
    ),
    "medium": (
        "########",
        "#R.##..#",
        "#..#...#",
        "##...###",
        "#..#...#",
        "#.#..#.#",
        "#...#.G#",
        "########",
    ),
    "large": (
        "############",
        "#R...#.....#",
        "#.##.#.#.#.#",
        "#......#...#",
        "#.####.###.#",
        "#..#.#.....#",
        "##.#.#.#.###",
        "#..#...#.G.#",
        "############",
    ),
}
KINDS = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
FILES = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}  # in names of data files


def compile_ant(path: str, walls: list[tuple[float, float]]) -> mujoco.MjModel:
    """D4RL's ant among boxes at walls (x, y), from Gymnasium's ant.xml, with old MuJoCo's masses.

    There a capsule of radius r and half length h weighed as a cylinder of length 2h + r, and of
    the margins of two touching geoms the larger counted, where since 3.5.0 they add up.
    """
    spec = mujoco.MjSpec.from_file(path)
    spec.option.timestep = 0.02
    for actuator in spec.actuators:
        actuator.gear[0] = 30
    for x, y in walls:
        box = spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, rgba=(0.7, 0.5, 0.3, 1))
        box.pos = (x, y, 1)
        box.size = (CELL / 2, CELL / 2, 1)
        box.contype = 1
        box.conaffinity = 1
    for geom in spec.geoms:
        geom.solimp[:3] = 0.8, 0.8, 0.01
    goal = spec.worldbody.add_site(name="goal", size=(0.5, 0.05, 0), rgba=(0.2, 0.8, 0.2, 0.6))
    goal.type = mujoco.mjtGeom.mjGEOM_CYLINDER  # to be seen: sites touch nothing
    goal.pos = (1, 1, 0)  # anywhere but at the origin, where MuJoCo would fix it for good
    model = spec.compile()

    for geom in spec.geoms:
        if geom.type != mujoco.mjtGeom.mjGEOM_CAPSULE:
            continue
        geom.type = mujoco.mjtGeom.mjGEOM_CYLINDER
        start, end = geom.fromto[:3], geom.fromto[3:]  # all capsules of ant.xml have them
        shift = (end - start) / np.linalg.norm(end - start) * geom.size[0] / 2
        geom.fromto = np.concatenate([start - shift, end + shift])
    old_model = spec.compile()
    for name in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, name)[:] = getattr(old_model, name)
    if mujoco.mj_version() >= 350:
        model.geom_margin[:] *= 0.5
    mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


class AntMazeEnv(MujocoEnv, EzPickle):
    """One of MAZES. An episode ends at goal (2,): set it after a reset to send the ant elsewhere.

    cells (rows, columns) holds the maze's characters.
    """

    metadata = MujocoEnv.metadata | {"render_modes": ["human", "rgb_array"], "render_fps": 10}

    def __init__(self, maze: str, **kwargs):
        EzPickle.__init__(self, maze, **kwargs)
        self.cells = np.array([list(row) for row in MAZES[maze]])
        self.goal = self.goal_corner()  # until the first reset
        size = max(self.cells.shape)
        centre = self.position(*(np.array(self.cells.shape) - 1) / 2)
        camera = {"lookat": np.append(centre, 0), "distance": 5.5 * size, "elevation": -70}
        space = gymnasium.spaces.Box(-np.inf, np.inf, (29,), np.float64)
        super().__init__("ant.xml", 5, space, default_camera_config=camera, **kwargs)

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        walls = [tuple(self.position(*cell)) for cell in np.argwhere(self.cells == "#")]
        model = compile_ant(self.fullpath, walls)
        model.vis.global_.offwidth = self.width
        model.vis.global_.offheight = self.height
        return model, mujoco.MjData(model)

    def position(self, row: float, column: float) -> np.ndarray:
        """The centre (x, y) of a cell, in metres from the start cell's."""
        start_row, start_column = np.argwhere(self.cells == "R")[0]
        return CELL * np.array([column - start_column, row - start_row], dtype=np.float64)

    def goal_corner(self) -> np.ndarray:
        """The centre (x, y) of the goal's cell, where the square begins in which goals lie."""
        return self.position(*np.argwhere(self.cells == "G")[0])

    def observation(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def reset_model(self) -> np.ndarray:
        rng = self.np_random
        self.goal = self.goal_corner() + rng.uniform(0, 1, 2)
        self.goal += rng.uniform(0, 0.5, 2)  # a sum, as in D4RL
        self.model.site("goal").pos[:2] = self.goal
        qpos = self.init_qpos + rng.uniform(-0.1, 0.1, self.model.nq)
        qvel = 0.1 * rng.standard_normal(self.model.nv)
        self.set_state(qpos, qvel)
        return self.observation()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.do_simulation(action, self.frame_skip)
        arrived = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= 0.5)
        if self.render_mode == "human":
            self.render()
        return self.observation(), float(arrived), arrived, False, {}


CHECKSUMS = {  # SHA-256 of D4RL's files, the first 16 digits
    "antmaze-umaze-v2": "5ef15257771c50ef",
    "antmaze-umaze-diverse-v2": "c771dd63963cd7d9",
    "antmaze-medium-play-v2": "c9fec1c1daad97c7",
    "antmaze-medium-diverse-v2": "ad9dcbac05d1f874",
    "antmaze-large-play-v2": "6d353df245782992",
    "antmaze-large-diverse-v2": "84f775eb7956ea9c",
}


def register_environments() -> dict[str, dict]:
    """Register D4RL's ids; gives what the scripts' class Task has of each one."""
    datasets = {}
    for kind in KINDS:
        maze = kind.split("-")[0]
        many_starts = kind != "umaze"  # in the data; the environment has one
        many_goals = kind.endswith("-diverse")
        data = f"noisy_multistart_{many_starts}_multigoal_{many_goals}_sparse"
        name = f"Ant_maze_{FILES[maze]}_{data}"
        files = {"v0": f"ant_maze_new/{name}.hdf5", "v2": f"ant_maze_v2/{name}_fixed.hdf5"}
        for version, file in files.items():
            dataset_id = f"antmaze-{kind}-{version}"
            datasets[dataset_id] = {
                "observation_dim": 29,
                "action_dim": 8,
                "random_return": 0.0,  # so that the score is the share of successes
                "expert_return": 1.0,
                "file": file,
                "sha256": CHECKSUMS.get(dataset_id),
            }
            gymnasium.register(
                dataset_id,
                AntMazeEnv,
                max_episode_steps=700 if maze == "umaze" else 1000,
                kwargs={"maze": maze},
            )
    return datasets


DATASETS = register_environments()  # by D4RL's ids
