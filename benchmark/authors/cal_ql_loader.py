"""Our loader and returns-to-go beside those of Cal-QL's authors, on made-up files of AntMaze."""

import importlib
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import h5py
import numpy as np
import torch
from authors.importing import import_from

ENV = "antmaze-umaze-v2"
FILES = 15
# of the authors; here 10, -5 and 1 - 1e-5 are --env antmaze's and the buffer's own
THEIR_OPTIONS = {"reward_scale": 10.0, "reward_bias": -5.0, "clip_action": 0.99999, "gamma": 0.99}
COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "mc_returns")


def write_made_up_file(path: Path, seed: int) -> None:
    """Trajectories of AntMaze's shape: some arrive, some fail; the last one ends with a timeout."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(50, 400))
    success = rng.random(rows) < 0.02
    timeouts = rng.random(rows) < 0.05
    timeouts[-1] = True
    with h5py.File(path, "w") as file:
        file["observations"] = rng.standard_normal((rows, 29)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (rows, 8)).astype(np.float32).round(1)  # some are 1
        file["rewards"] = success.astype(np.float32)
        file["terminals"] = success & (rng.random(rows) < 0.7)
        file["timeouts"] = timeouts


def our_columns(path: Path, gamma: float) -> dict[str, np.ndarray]:
    """The rows of our buffer, with the returns-to-go."""
    script = importlib.import_module("calql_sera")
    args = script.parse_args(["--env", ENV, "--gamma", str(gamma)])
    buffer = script.ReplayBuffer(script.load_d4rl(ENV, path), args, torch.device("cpu"))
    columns = buffer.as_columns(buffer.table[: buffer.size])
    return {name: columns[name].numpy() for name in COLUMNS}


def their_columns(replay_buffer: ModuleType, path: Path) -> dict[str, np.ndarray]:
    """The same from the authors' function, which asks an environment for the file."""
    with h5py.File(path) as file:
        data = {name: array[:] for name, array in file.items()}
    env = SimpleNamespace(get_dataset=lambda: data, spec=SimpleNamespace(name=ENV))
    columns = replay_buffer.qlearning_dataset_and_calc_mc(env, **THEIR_OPTIONS)
    return {name: columns[name] for name in COLUMNS}


def largest_difference(folder: Path, gamma: float) -> float:
    """Of any number in any file; gamma is our side's."""
    (replay_buffer,) = import_from(folder, "JaxCQL.replay_buffer")
    differences = []
    with tempfile.TemporaryDirectory() as made_up:
        for seed in range(FILES):
            path = Path(made_up, f"{seed}.hdf5")
            write_made_up_file(path, seed)
            ours, theirs = our_columns(path, gamma), their_columns(replay_buffer, path)
            for name in COLUMNS:
                if ours[name].shape != theirs[name].shape:
                    shapes = f"{ours[name].shape} here and {theirs[name].shape} there"
                    raise ValueError(f"{name} of file {seed} are {shapes}")
                differences.append(np.abs(ours[name] - theirs[name]).max())
    return float(np.max(differences))
