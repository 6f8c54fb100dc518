"""Roll out the policy of a checkpoint and write the transitions as an HDF5 file in D4RL's format.

    python data/collect.py runs/NAME/checkpoint.pt my-data.hdf5 --steps 1_000_000

As D4RL made its medium data: actions are sampled, not the mean; episodes follow one another;
`timeouts` marks the time limit, and the last episode is cut where the file is full. All scripts
take the file with --dataset-path.

    python data/collect.py ant_hierarch_pol_actor.npz my-maze.hdf5 --env antmaze-umaze-v2

does so with the goal-reaching ant that made D4RL's AntMaze data (weights published with D4RL). It
walks from cell to cell of the maze to the goal, with noise on its actions. Unlike D4RL's, an
episode ends at the goal.

    python data/collect.py pen-expert-v1.hdf5 my-pen.hdf5 --env pen-expert-v1

samples from the policy that D4RL keeps in its own files of Gym-MuJoCo's -medium-v2 and -expert-v2
and of Adroit's -expert-v1.
"""

import importlib
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import gymnasium
import h5py
import numpy as np
import torch
import tyro
from tqdm import tqdm
from tyro.conf import Positional, arg

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]  # where the scripts are, and convert.py
from convert import write  # noqa: E402

TYPES = {
    "observations": np.float32,
    "actions": np.float32,
    "rewards": np.float32,
    "terminals": bool,
    "timeouts": bool,
}


@dataclass
class Args:
    """Roll out a policy and write an HDF5 file in D4RL's format, for --dataset-path of any script.

    So a run's policy is sampled, and so D4RL's ant walks through a maze:

    python data/collect.py runs/NAME/checkpoint.pt my-data.hdf5 --steps 1_000_000

    python data/collect.py ant_hierarch_pol_actor.npz my-maze.hdf5 --env antmaze-umaze-v2
    """

    checkpoint: Positional[Annotated[str, arg(metavar="CHECKPOINT")]]
    """checkpoint.pt of a run, the .npz of D4RL's goal-reaching ant, or a .hdf5 of D4RL's"""
    output: Positional[Annotated[str, arg(metavar="OUTPUT")]]
    """HDF5 file to write; it must not exist yet"""
    env: Annotated[str | None, arg(metavar="ID")] = None
    """dataset id of the environment, with an .npz or .hdf5; a checkpoint knows its own"""
    mix: tuple[str, ...] = ()
    """further checkpoints, whose policies share the steps evenly with the first one"""
    steps: int = 50_000
    """how many transitions to write"""
    seed: int = 0
    """seed of the environment and of the sampled actions"""


# ------------------------------ the policy of a checkpoint
def read_checkpoint(path: str) -> dict:
    """A whole checkpoint of one of the scripts in this version. ValueError if it is none."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}: name the checkpoint.pt of a run")
    try:
        name = torch.load(path, map_location="cpu", weights_only=True)["script"]
        script = importlib.import_module(name)
        return script.read_checkpoint(Path(path))
    except Exception:  # whatever unpickling may raise
        raise ValueError(
            f"{path} is damaged, or no checkpoint of these scripts in this version: name another"
        ) from None


def load_policy(path: str) -> tuple[gymnasium.Env, Callable, dict]:
    """A run's environment, its sampled policy (d,) -> (a,), and attributes for the file."""
    checkpoint = read_checkpoint(path)
    script = importlib.import_module(checkpoint["script"])
    args = script.Args(**checkpoint["args"])
    task = script.find_task(args.env)
    agent = script.Agent(task.observation_dim, task.action_dim, args)
    # benchmark/other_bonuses.py keeps networks of its own in the agent.
    states = checkpoint["agent"].items()
    own = {name: value for name, value in states if not name.startswith("novelty.")}
    agent.load_state_dict(own)
    mean = checkpoint["normalizer"]["mean"].numpy()
    std = checkpoint["normalizer"]["std"].numpy()

    @torch.no_grad()
    def policy(observation: np.ndarray) -> np.ndarray:
        normalized = ((observation - mean) / std).astype(np.float32)
        return agent.act(torch.from_numpy(normalized)[None], deterministic=False)[0].numpy()

    attributes = {
        "env": args.env,
        "physics": args.physics,
        "script": checkpoint["script"],
        "training_seed": args.seed,
        "training_phase": checkpoint["phase"],
        "training_step": checkpoint["step"],
    }
    return script.make_env(args.env, args.physics), policy, attributes


# ------------------------------ D4RL's goal-reaching ant
def next_cell(cells: np.ndarray, start: tuple[int, int], end: tuple[int, int]) -> tuple[int, int]:
    """The cell after start on a shortest way to end, or end if there is none; "#" is a wall."""
    if start == end:
        return end
    known = [end]  # from which end can be reached
    for row, column in known:  # grows meanwhile: breadth first
        for cell in ((row, column - 1), (row, column + 1), (row + 1, column), (row - 1, column)):
            if cell == start:
                return row, column
            if cells[cell] != "#" and cell not in known:
                known.append(cell)
    return end


class MazeWalker:
    """A policy for an AntMazeEnv, (29,) -> (8,): sampled actions, and the noise that D4RL added.

    The network sees the ant without its place, and the direction in which to walk.
    """

    def __init__(self, path: str, env: gymnasium.Env):
        from envs.antmaze import CELL

        self.env = env
        self.cell_width = CELL
        self.start_cell = np.argwhere(env.cells == "R")[0]
        try:
            weights = dict(np.load(path))
            names = ("fc0", "fc1", "last_fc", "last_fc_log_std")
            layers = [(weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in names]
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not D4RL's goal-reaching ant ({error})") from None
        *self.hidden_layers, self.mean_layer, self.log_std_layer = layers

    def cell_at(self, position: np.ndarray) -> tuple[int, int]:
        """The cell (row, column) of a place (x, y)."""
        row, column = self.start_cell + np.round(position[::-1] / self.cell_width)
        return int(row), int(column)

    def target(self, position: np.ndarray) -> np.ndarray:
        """Where to walk from there: the goal if its cell is next, else a place in the next cell."""
        goal_cell = self.cell_at(self.env.goal)
        cell = next_cell(self.env.cells, self.cell_at(position), goal_cell)
        if cell == goal_cell:
            return self.env.goal
        return self.env.position(*cell) + self.env.np_random.uniform(0, 1, 2)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        rng = self.env.np_random
        position, body = observation[:2], observation[2:]
        way = self.target(position) - position
        direction = 10 * way / np.linalg.norm(way)
        x = np.concatenate([body, direction])
        for weight, bias in self.hidden_layers:
            x = np.maximum(weight @ x + bias, 0)
        weight, bias = self.mean_layer
        mean = weight @ x + bias
        weight, bias = self.log_std_layer
        std = np.exp(np.clip(weight @ x + bias, -20, 2))
        action = np.tanh(mean + std * rng.standard_normal(8))
        noisy = action + 0.2 * rng.standard_normal(8)
        return np.clip(noisy, -1, 1).astype(np.float32)


def load_walker(path: str, dataset_id: str | None) -> tuple[gymnasium.Env, Callable, dict]:
    """The maze of a dataset id, the ant's policy in it, and attributes for the file."""
    if not (dataset_id or "").startswith("antmaze"):
        example = "name a dataset of AntMaze, such as antmaze-umaze-v2"
        raise ValueError(f"--env is {dataset_id}: {example}")
    env = importlib.import_module("iql_sera").make_env(dataset_id)  # any script's would do
    return env, MazeWalker(path, env.unwrapped), {"env": dataset_id, "policy": Path(path).name}


# ------------------------------ the policy in a file of D4RL's
class PolicyInFile:
    """The policy that collected a file, (d,) -> (a,), sampled from PyTorch's generator."""

    def __init__(self, path: str):
        activations = {b"relu": torch.relu, b"tanh": torch.tanh}
        try:
            with h5py.File(path) as file:
                policy = file["metadata/policy"]
                names = ("fc0", "fc1", "last_fc", "last_fc_log_std")
                layers = []
                for name in names:
                    weight, bias = policy[f"{name}/weight"][:], policy[f"{name}/bias"][:]
                    layers.append(
                        (torch.from_numpy(weight).float(), torch.from_numpy(bias).float())
                    )
                self.activation = activations[policy["nonlinearity"][()]]
                self.squashed = policy["output_distribution"][()] == b"tanh_gaussian"
        except (OSError, KeyError) as error:
            fix = "give one of Gym-MuJoCo's -medium-v2 or -expert-v2, or of Adroit's -expert-v1"
            raise ValueError(f"{path} holds no policy ({error}): {fix}") from None
        *self.hidden_layers, self.mean_layer, self.log_std_layer = layers
        first_weight, _ = layers[0]
        self.observation_dim = first_weight.shape[1]

    @torch.no_grad()
    def __call__(self, observation: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(observation).float()
        for layer in self.hidden_layers:
            x = self.activation(torch.nn.functional.linear(x, *layer))
        mean = torch.nn.functional.linear(x, *self.mean_layer)
        log_std = torch.nn.functional.linear(x, *self.log_std_layer).clamp(-20, 2)
        action = mean + log_std.exp() * torch.randn_like(mean)
        if self.squashed:
            action = torch.tanh(action)
        return action.clamp(-1, 1).numpy()


def load_file_policy(path: str, dataset_id: str | None) -> tuple[gymnasium.Env, Callable, dict]:
    """The environment of a dataset id, a file's policy, and attributes for the new file."""
    if dataset_id is None:
        raise ValueError(f"{path} does not know its environment: name it with --env")
    env = importlib.import_module("iql_sera").make_env(dataset_id)  # any script's would do
    policy = PolicyInFile(path)
    has, needs = policy.observation_dim, env.observation_space.shape[0]
    if has != needs:
        found = f"{path} holds a policy for {has} numbers, but {dataset_id} has {needs}"
        raise ValueError(f"{found}: name its own environment with --env")
    return env, policy, {"env": dataset_id, "policy": Path(path).name}


# ------------------------------ rolling out
def roll_out(
    env: gymnasium.Env, policy: Callable, steps: int, seed: int
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The five arrays of a D4RL file, (steps, ...) each, and the returns of whole episodes."""
    rows = []
    returns = []
    observation, _ = env.reset(seed=seed)
    for _ in tqdm(range(steps), unit=" steps", mininterval=1):
        action = policy(observation)
        next_observation, reward, terminated, truncated, info = env.step(action)
        rows.append((observation, action, reward, terminated, truncated and not terminated))
        observation = next_observation
        if terminated or truncated:
            returns.append(info["episode"]["r"])
            observation, _ = env.reset()
    columns = zip(*rows)
    arrays = {name: np.array(next(columns), dtype=kind) for name, kind in TYPES.items()}
    return arrays, returns


def collect(args: Args) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of the file, and attributes that say how they were made."""
    if args.mix:
        return collect_mix(args)
    if args.checkpoint.endswith(".npz"):
        env, policy, attributes = load_walker(args.checkpoint, args.env)
    elif args.checkpoint.endswith(".hdf5"):
        env, policy, attributes = load_file_policy(args.checkpoint, args.env)
    elif args.env:
        raise ValueError("--env goes with an .npz or .hdf5: a checkpoint knows its own")
    else:
        env, policy, attributes = load_policy(args.checkpoint)
    torch.manual_seed(args.seed)
    arrays, returns = roll_out(env, policy, args.steps, args.seed)
    attributes |= {"seed": args.seed, "episodes": len(returns)}
    if returns:
        script = importlib.import_module("iql_sera")
        attributes["mean_return"] = np.mean(returns)
        attributes["sd_return"] = np.std(returns)
        score = script.normalized_score(attributes["env"], np.mean(returns))
        if score is not None:  # a task of one's own has none
            attributes["mean_score"] = score
    return arrays, attributes


def check_mix(checkpoints: tuple[str, ...]) -> None:
    """ValueError unless they are of one environment; other files are of the one in --env."""
    known = {}
    for checkpoint in checkpoints:
        if not checkpoint.endswith((".npz", ".hdf5")):
            args = read_checkpoint(checkpoint)["args"]
            known[checkpoint] = f"{args['env']} with the physics of {args['physics']}"
    if len(set(known.values())) > 1:
        found = ", ".join(f"{checkpoint} is of {env}" for checkpoint, env in known.items())
        raise ValueError(f"{found}: mix policies of one environment")


def collect_mix(args: Args) -> tuple[dict[str, np.ndarray], dict]:
    """The same from several policies, one after the other, each with the next seed."""
    parts = []
    attributes = {}
    checkpoints = (args.checkpoint, *args.mix)
    check_mix(checkpoints)
    for number, checkpoint in enumerate(checkpoints):
        first = number * args.steps // len(checkpoints)
        last = (number + 1) * args.steps // len(checkpoints)
        changes = {"checkpoint": checkpoint, "mix": (), "steps": last - first}
        arrays, own = collect(replace(args, seed=args.seed + number, **changes))
        another_follows = number + 1 < len(checkpoints)
        if another_follows and not arrays["terminals"][-1]:
            arrays["timeouts"][-1] = True  # the next policy starts anew
        parts.append(arrays)
        attributes |= {f"{name}_{number + 1}": value for name, value in own.items()}
    return {name: np.concatenate([part[name] for part in parts]) for name in TYPES}, attributes


def check_args(args: Args) -> None:
    """ValueError, before any work, for what cannot become a file."""
    least = 2 * (1 + len(args.mix))  # two of each policy
    if args.steps < least:
        raise ValueError(f"--steps is {args.steps}: give a whole number of at least {least}")
    output = Path(args.output)
    if output.exists():
        raise ValueError(f"{output} exists: name a new file")
    if not output.parent.is_dir():
        raise ValueError(f"there is no folder {output.parent}: name a file in one that exists")


def main(argv: list[str] | None = None) -> None:
    """Bad input ends in one sentence on stderr and exit code 2."""
    args = tyro.cli(Args, args=argv)
    try:
        check_args(args)
        arrays, attributes = collect(args)
        write(args.output, arrays, attributes, level=9)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for name, value in attributes.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
