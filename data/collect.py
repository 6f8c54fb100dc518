"""Roll out the policy of a checkpoint and write the transitions as a D4RL-style HDF5 file.

    python data/collect.py runs/NAME/checkpoint.pt my-data.hdf5 --steps 1e6

As D4RL made its medium data: actions are sampled, not the mean; episodes follow one another; `timeouts` marks
the time limit, and the last episode is cut where the file is full. The file can be used with --dataset-path.
"""

import importlib
import sys
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
    """checkpoint.pt of a run of any *_sera.py"""
    output: tyro.conf.Positional[str]
    """HDF5 file to write"""
    steps: float = 50_000
    """transitions"""
    seed: int = 0
    """seed of the environment and of the sampled actions"""


def collect(checkpoint_path: str, steps: int, seed: int) -> tuple[dict[str, np.ndarray], dict]:
    """The five arrays of a D4RL file, (steps, ...) each, and attributes that say how they were made."""
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    script = importlib.import_module(checkpoint["script"])
    args = script.Args(**checkpoint["args"] | {"device": "cpu"})
    task = script.find_task(args.env)
    networks, _ = script.make_networks(task.observation_dim, task.action_dim, args)
    for name, saved in checkpoint["networks"].items():
        networks[name].load_state_dict(saved)
    mean, std = (checkpoint["normalizer"][name].numpy() for name in ("mean", "std"))
    env = script.make_env(args.env, args.physics)
    torch.manual_seed(seed)

    rows = {name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts")}
    returns, episode_return = [], 0.0
    observation, _ = env.reset(seed=seed)
    for _ in tqdm(range(steps), unit=" steps", mininterval=1):
        with torch.no_grad():
            inputs = torch.from_numpy(((observation - mean) / std).astype(np.float32))
            action = script.act(networks, inputs[None], deterministic=False)[0].numpy()
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
    attributes = {"env": args.env, "physics": args.physics, "script": checkpoint["script"], "seed": seed}
    attributes |= {"training_seed": args.seed, "training_step": checkpoint["step"], "episodes": len(returns)}
    if returns:
        score = float(np.mean(script.normalized_score(args.env, np.array(returns))))
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
        arrays, attributes = collect(args.checkpoint, int(args.steps), args.seed)
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
