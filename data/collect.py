"""Roll out the policy of a checkpoint and write the transitions as a D4RL-style HDF5 file.

    python data/collect.py runs/NAME/checkpoint.pt my-data.hdf5 --steps 1e6

As D4RL made its medium data: actions are sampled, not the mean; episodes follow one another; `timeouts` marks
the time limit, and the last episode is cut where the file is full. The file can be used with --dataset-path.

    python data/collect.py ant_hierarch_pol_actor.npz my-maze.hdf5 --env antmaze-umaze-v2 --steps 1e5

does so with the goal-reaching ant that made D4RL's AntMaze data (weights published with D4RL). It walks from
cell to cell of the maze to the goal, with noise on its actions. Unlike D4RL's, an episode ends at the goal.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts


@dataclass
class Args:
    """Roll out the policy of a checkpoint and write a D4RL-style HDF5 file."""

    checkpoint: tyro.conf.Positional[str]
    """checkpoint.pt of a run of any *_sera.py, or .npz of D4RL's goal-reaching ant"""
    output: tyro.conf.Positional[str]
    """HDF5 file to write"""
    env: str | None = None
    """with an .npz: the data set id of AntMaze whose maze it walks"""
    steps: float = 50_000
    """transitions"""
    seed: int = 0
    """seed of the environment and of the sampled actions"""


def next_cell(cells: np.ndarray, start: tuple, end: tuple) -> tuple:
    """The cell after start on a shortest way to end, found backwards from end; cells: "#" is a wall."""
    known = [end] if start != end else []
    for row, column in known:  # grows meanwhile: breadth first
        for cell in ((row, column - 1), (row, column + 1), (row + 1, column), (row - 1, column)):
            if cell == start:
                return row, column
            if cells[cell] != "#" and cell not in known:
                known.append(cell)
    return end


def walker(path: str, env) -> Callable[[np.ndarray], np.ndarray]:
    """The goal-reaching ant as a policy for an AntMazeEnv: sampled actions (8,), noise added as D4RL did."""
    try:
        weights = dict(np.load(path))
        layers = [(weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in ("fc0", "fc1", "last_fc")]
        spread = weights["last_fc_log_std.weight"], weights["last_fc_log_std.bias"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is not D4RL's goal-reaching ant ({error})") from None

    width = importlib.import_module("envs.antmaze").CELL
    start = np.argwhere(env.cells == "R")[0]

    def cell(position: np.ndarray) -> tuple:
        return tuple(int(index) for index in start + np.round(position[::-1] / width))

    def policy(observation: np.ndarray) -> np.ndarray:
        rng, here, goal_cell = env.np_random, observation[:2], cell(env.goal)
        step = next_cell(env.cells, cell(here), goal_cell)
        target = env.goal if step == goal_cell else env.position(*step) + rng.uniform(0, 1, 2)
        direction = 10 * (target - here) / np.linalg.norm(target - here)
        x = np.concatenate([observation[2:], direction])
        for weight, bias in layers[:2]:
            x = np.maximum(weight @ x + bias, 0)
        mean, log_std = layers[2][0] @ x + layers[2][1], np.clip(spread[0] @ x + spread[1], -20, 2)
        action = np.tanh(mean + np.exp(log_std) * rng.standard_normal(8))
        return np.clip(action + 0.2 * rng.standard_normal(8), -1, 1).astype(np.float32)

    return policy


def trained(path: str) -> tuple:
    """A run's script, environment, policy and attributes, from its checkpoint."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    script = importlib.import_module(checkpoint["script"])
    args = script.Args(**checkpoint["args"] | {"device": "cpu"})
    task = script.find_task(args.env)
    networks, _ = script.make_networks(task.observation_dim, task.action_dim, args)
    for name, saved in checkpoint["networks"].items():
        networks[name].load_state_dict(saved)
    mean, std = (checkpoint["normalizer"][name].numpy() for name in ("mean", "std"))

    @torch.no_grad()
    def policy(observation: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(((observation - mean) / std).astype(np.float32))
        return script.act(networks, inputs[None], deterministic=False)[0].numpy()

    attributes = {"env": args.env, "physics": args.physics, "script": checkpoint["script"]}
    attributes |= {"training_seed": args.seed, "training_step": checkpoint["step"]}
    return script, script.make_env(args.env, args.physics), policy, attributes


def collect(path: str, steps: int, seed: int, maze: str | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """The five arrays of a D4RL file, (steps, ...) each, and attributes that say how they were made."""
    if path.endswith(".npz"):
        script = importlib.import_module("iql_sera")
        if not (maze or "").startswith("antmaze"):
            raise ValueError(f"--env is {maze}: name a data set of AntMaze, such as antmaze-umaze-v2")
        env = script.make_env(maze)
        policy, attributes = walker(path, env.unwrapped), {"env": maze, "policy": Path(path).name}
    elif maze:
        raise ValueError("--env goes with an .npz: a checkpoint knows its own")
    else:
        script, env, policy, attributes = trained(path)
    torch.manual_seed(seed)

    rows = {name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts")}
    returns, episode_return = [], 0.0
    observation, _ = env.reset(seed=seed)
    for _ in tqdm(range(steps), unit=" steps", mininterval=1):
        action = policy(observation)
        next_observation, reward, terminated, truncated, _ = env.step(action)
        row = (observation, action, reward, terminated, truncated and not terminated)
        for column, value in zip(rows.values(), row):
            column.append(value)
        observation, episode_return = next_observation, episode_return + reward
        if terminated or truncated:
            returns.append(episode_return)
            (observation, _), episode_return = env.reset(), 0.0
    arrays = {name: np.array(column, dtype=np.float32) for name, column in rows.items()}
    arrays |= {name: arrays[name].astype(bool) for name in ("terminals", "timeouts")}
    attributes |= {"seed": seed, "episodes": len(returns)}
    if returns:
        score = float(np.mean(script.normalized_score(attributes["env"], np.array(returns))))
        attributes |= {"mean_return": np.mean(returns), "sd_return": np.std(returns), "mean_score": score}
    return arrays, attributes


def main(argv: list[str] | None = None) -> None:
    """Bad input ends in one sentence on stderr and exit code 2."""
    args = tyro.cli(Args, args=argv)
    try:
        if args.steps < 2 or not float(args.steps).is_integer():
            raise ValueError(f"--steps is {args.steps}: give a whole number of at least 2")
        output = Path(args.output)
        if output.exists() or not output.parent.is_dir():
            raise ValueError(
                f"{output} exists, or its folder does not: name a new file in an existing folder"
            )
        arrays, attributes = collect(args.checkpoint, int(args.steps), args.seed, args.env)
        with h5py.File(output, "x") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array, compression="gzip", compression_opts=9, shuffle=True)
            file.attrs.update(attributes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print("\n".join(f"{name}: {value}" for name, value in attributes.items()))


if __name__ == "__main__":
    main()
