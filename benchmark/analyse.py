"""What the evaluations of a grid do not tell: where its runs have been, and how far off their values are.

    python benchmark/analyse.py docs/results/conditioning/grid.toml [--out runs/grids]

reads the last checkpoint of each run in --out (see run.py) and writes, beside the grid file,

coverage.csv  entropy of the states visited online so far, and how far their visitation is from uniform.
              entropy: Kozachenko and Leonenko's k-nearest-neighbour estimate (k = 3) in nats, of all
              dimensions, each divided by its standard deviation in the data set. kl_to_uniform: on the first
              two principal components of the data set, cut into 30 x 30 cells between their 0.5 and 99.5
              percentiles (what lies outside counts for the nearest cell), the KL divergence in nats of the
              visited cells from the uniform distribution: log 900 for a single cell, 0 for all alike.
bias.csv      value bias at the end: mean over states of --episodes evaluation episodes of min(Q1, Q2) at the
              policy's action minus the discounted return from there, both in the environment's rewards (plus
              what --reward-bias adds, over the scale). The last 300 steps of an episode that ran into the
              time limit are left out: their return is cut (0.99^300 = 0.05). Values of a run with a bonus
              contain it, about lambda / (1 - gamma).
"""

import argparse
import csv
import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from run import ROOT, Run, plan
from scipy.spatial import cKDTree
from scipy.special import digamma, gammaln

sys.path.insert(0, str(ROOT))


def knn_entropy(points: np.ndarray, k: int = 3) -> float:
    """Kozachenko and Leonenko's estimate in nats, (N, d); duplicates are set apart by 1e-10."""
    count, dimension = points.shape
    distances = cKDTree(points).query(points, k + 1)[0][:, k].clip(1e-10)
    ball = dimension / 2 * np.log(np.pi) - gammaln(dimension / 2 + 1)
    return float(digamma(count) - digamma(k) + ball + dimension * np.log(distances).mean())


class Cells:
    """The 30 x 30 cells on the two principal components of a data set."""

    def __init__(self, observations: np.ndarray, cells: int = 30):
        self.mean, self.cells = observations.mean(0), cells
        _, vectors = np.linalg.eigh(np.cov(observations.T))
        self.axes = vectors[:, -2:]
        self.low, self.high = np.percentile((observations - self.mean) @ self.axes, [0.5, 99.5], axis=0)

    def kl_to_uniform(self, observations: np.ndarray) -> float:
        place = ((observations - self.mean) @ self.axes - self.low) / (self.high - self.low)
        place = np.clip((place * self.cells).astype(int), 0, self.cells - 1)
        counts = np.bincount(place @ [1, self.cells], minlength=self.cells**2)
        shares = counts[counts > 0] / counts.sum()
        return float((shares * np.log(shares)).sum() + np.log(self.cells**2))


def value_bias(script: ModuleType, args, checkpoint: dict, episodes: int) -> tuple[float, float]:
    """Mean Q of the states of evaluation episodes, and the mean of their discounted returns."""
    task, normalizer = script.find_task(args.env), checkpoint["normalizer"]
    networks, _ = script.make_networks(task.observation_dim, task.action_dim, args)
    for name, saved in checkpoint["networks"].items():
        networks[name].load_state_dict(saved)
    env, scale = script.make_env(args.env, args.physics), float(normalizer["reward_scale"])
    q_values, returns = [], []
    for episode in range(episodes):
        observation, _ = env.reset(seed=10_000 + episode)
        rewards, done = [], False
        while not done:
            states = ((torch.from_numpy(observation) - normalizer["mean"]) / normalizer["std"]).float()[None]
            with torch.no_grad():
                action = script.act(networks, states, deterministic=True)
                q_values.append(networks["critics"](states, action).amin().item() / scale)
            observation, reward, terminated, truncated, _ = env.step(action[0].numpy())
            rewards.append(reward + args.reward_bias / scale)
            done = terminated or truncated
        following = 0.0
        backwards = [following := reward + args.gamma * following for reward in reversed(rewards)]
        kept = len(rewards) if terminated else len(rewards) - 300
        q_values = q_values[: len(returns) + kept]
        returns += backwards[::-1][:kept]
    return float(np.mean(q_values)), float(np.mean(returns))


def analyse(run: Run, episodes: int, points: int, data: dict) -> tuple[list, list]:
    """Rows of coverage.csv and of bias.csv for one run. data: what was made from each data set so far."""
    script, (name, env, variant, seed) = importlib.import_module(run.script), run.name.split("__")
    checkpoint = torch.load(run.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    args = script.Args(**checkpoint["args"] | {"device": "cpu"})
    if env not in data:
        observations = script.load_d4rl(env, args.dataset_path)["observations"]
        data[env] = Cells(observations), observations.std(0)
    cells, std = data[env]
    mean, scale = (checkpoint["normalizer"][part].numpy() for part in ("mean", "std"))
    visited = checkpoint["online_rows"]["observations"].numpy() * scale + mean
    coverage = []
    for step in np.linspace(0, len(visited), points + 1).astype(int)[1:]:
        entropy, kl = knn_entropy(visited[:step] / std), cells.kl_to_uniform(visited[:step])
        coverage.append([name, env, variant, seed, step, f"{entropy:.4f}", f"{kl:.4f}"])
    q, returns = value_bias(script, args, checkpoint, episodes)
    return coverage, [[name, env, variant, seed, f"{q:.2f}", f"{returns:.2f}", f"{q - returns:.2f}"]]


def main(args: argparse.Namespace) -> None:
    coverage, bias, data = [], [], {}
    for run in plan(args.grid, args.out.resolve()):
        if run.csv and (run.folder / "finished").exists():
            print(run.name, flush=True)
            rows, others = analyse(run, args.episodes, args.points, data)
            coverage, bias = coverage + rows, bias + others
    if not bias:
        raise SystemExit(f"error: no finished run of {args.grid} in {args.out}: start it with run.py")
    keys = ["script", "env", "variant", "seed"]
    tables = {"coverage": ["step", "entropy", "kl_to_uniform"], "bias": ["q", "discounted_return", "bias"]}
    for (name, columns), rows in zip(tables.items(), (coverage, bias)):
        with open(args.grid.parent / f"{name}.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([keys + columns, *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="the grid file")
    parser.add_argument("--out", type=Path, default=Path("runs/grids"), help="where run.py put the runs")
    parser.add_argument("--episodes", type=int, default=5, help="evaluation episodes for the value bias")
    parser.add_argument("--points", type=int, default=6, help="moments of the online phase for the coverage")
    main(parser.parse_args())
