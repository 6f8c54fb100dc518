"""What the evaluations of a grid do not tell: where its runs have been, how wrong their values are.

    python benchmark/studies/analyse.py docs/results/other_bonuses/grid.toml [--out runs/grids]

reads the last checkpoint of each run in --out (see run.py) and writes, beside the grid file,

coverage.csv  entropy of the states visited online so far, and how far their visitation is from
              uniform. entropy: Kozachenko and Leonenko's k-nearest-neighbour estimate (k = 3) in
              nats, of all dimensions, each divided by its standard deviation in the dataset.
              kl_to_uniform: on the first two principal components of the dataset, cut into 30 x 30
              cells between their 0.5 and 99.5 percentiles (what lies outside counts for the nearest
              cell), the KL divergence in nats of the visited cells from the uniform distribution:
              log 900 for a single cell, 0 for all alike.
bias.csv      value bias at the end: mean over states of --episodes evaluation episodes of
              min(Q1, Q2) at the policy's action minus the discounted return from there, both in the
              environment's rewards (plus what --reward-bias adds, over the scale). The last 300
              steps of an episode that ran into the time limit are left out: their return is cut
              (0.99^300 = 0.05); a run that has no others has no row. Values of a run with a bonus
              contain it: about lambda / (1 - gamma).
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import gymnasium
import numpy as np
import torch
import tyro
from run import Run, load_script, plan
from scipy.spatial import cKDTree
from scipy.special import digamma, gammaln

KEYS = ["script", "env", "variant", "seed"]
COVERAGE = [*KEYS, "step", "entropy", "kl_to_uniform"]
BIAS = [*KEYS, "q", "discounted_return", "bias"]
CUT_STEPS = 300  # at the time limit, whose discounted returns are cut


@dataclass
class Args:
    """Measure coverage and value bias of the finished runs of a grid."""

    grid: tyro.conf.Positional[Path]
    """the grid file"""
    out: Path = Path("runs/grids")
    """where run.py put the runs"""
    episodes: int = 5
    """evaluation episodes for the value bias"""
    points: int = 6
    """moments of the online phase for the coverage"""


# ------------------------------ coverage
def knn_entropy(points: np.ndarray, k: int = 3) -> float:
    """Kozachenko and Leonenko's estimate in nats, (N, d); duplicates are set apart by 1e-10."""
    count, dimension = points.shape
    distances = cKDTree(points).query(points, k + 1)[0][:, k].clip(1e-10)
    ball = dimension / 2 * np.log(np.pi) - gammaln(dimension / 2 + 1)
    return float(digamma(count) - digamma(k) + ball + dimension * np.log(distances).mean())


class Cells:
    """The 30 x 30 cells on the two principal components of a dataset."""

    def __init__(self, observations: np.ndarray, cells: int = 30):
        self.cells = cells
        self.mean = observations.mean(0)
        _, vectors = np.linalg.eigh(np.cov(observations.T))
        self.axes = vectors[:, -2:]
        places = (observations - self.mean) @ self.axes
        self.low, self.high = np.percentile(places, [0.5, 99.5], axis=0)

    def kl_to_uniform(self, observations: np.ndarray) -> float:
        """KL divergence of the visited cells from the uniform distribution, in nats."""
        places = ((observations - self.mean) @ self.axes - self.low) / (self.high - self.low)
        places = np.clip((places * self.cells).astype(int), 0, self.cells - 1)
        counts = np.bincount(places @ [1, self.cells], minlength=self.cells**2)
        shares = counts[counts > 0] / counts.sum()
        return float((shares * np.log(shares)).sum() + np.log(self.cells**2))


class Dataset:
    """The transitions of a dataset, and what the states that a run visited are compared with."""

    def __init__(self, script: ModuleType, args):
        path = script.fetch_dataset(args.env, args.dataset_path)
        self.transitions = script.load_d4rl(args.env, path)
        self.cells = Cells(self.transitions["observations"])
        self.std = self.transitions["observations"].std(0)


def visited_states(checkpoint: dict, buffer) -> np.ndarray:
    """The states of all online steps, in the environment's own units."""
    mean = checkpoint["normalizer"]["mean"].numpy()
    std = checkpoint["normalizer"]["std"].numpy()
    # Only the states: with another bonus (other_bonuses.py) a row has no q at its end.
    states = checkpoint["online_rows"][:, buffer.columns["observations"]]
    return states.numpy() * std + mean


def coverage_rows(key: list[str], visited: np.ndarray, points: int, dataset: Dataset) -> list:
    """Rows of coverage.csv for one run; none without an online phase."""
    rows = []
    if len(visited) == 0:
        return rows
    for step in np.linspace(0, len(visited), points + 1).astype(int)[1:]:
        entropy = knn_entropy(visited[:step] / dataset.std)
        divergence = dataset.cells.kl_to_uniform(visited[:step])
        rows.append([*key, step, f"{entropy:.4f}", f"{divergence:.4f}"])
    return rows


# ------------------------------ value bias
class Player:
    """The policy and the critics of a checkpoint, in the environment's own units."""

    def __init__(self, script: ModuleType, args, checkpoint: dict, reward_scale: float):
        task = script.find_task(args.env)
        self.agent = script.Agent(task.observation_dim, task.action_dim, args)
        # other_bonuses.py keeps networks of its own in the agent.
        states = checkpoint["agent"].items()
        own = {name: value for name, value in states if not name.startswith("novelty.")}
        self.agent.load_state_dict(own)
        self.normalizer = checkpoint["normalizer"]
        self.scale = reward_scale
        self.bias = args.reward_bias / self.scale
        self.gamma = args.gamma

    @torch.no_grad()
    def step(self, observation: np.ndarray) -> tuple[np.ndarray, float]:
        """The action for one observation, and min(Q1, Q2) at it."""
        centred = torch.from_numpy(observation) - self.normalizer["mean"]
        states = (centred / self.normalizer["std"]).float()[None]
        actions = self.agent.act(states, deterministic=True)
        q_value = self.agent.critics(states, actions).amin().item()
        return actions[0].numpy(), q_value / self.scale

    def episode(self, env: gymnasium.Env, seed: int) -> tuple[list[float], list[float]]:
        """Q and discounted return of the states of an episode, less those whose return is cut."""
        observation, _ = env.reset(seed=seed)
        q_values = []
        rewards = []
        done = False
        while not done:
            action, q_value = self.step(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            q_values.append(q_value)
            rewards.append(reward + self.bias)
            done = terminated or truncated
        returns = discounted_returns(rewards, self.gamma)
        kept = len(rewards) if terminated else len(rewards) - CUT_STEPS
        return q_values[: max(kept, 0)], returns[: max(kept, 0)]


def discounted_returns(rewards: list[float], gamma: float) -> list[float]:
    """The discounted return from each step to the end."""
    returns = []
    following = 0.0
    for reward in reversed(rewards):
        following = reward + gamma * following
        returns.append(following)
    return returns[::-1]


def value_bias(player: Player, env: gymnasium.Env, episodes: int) -> tuple[float, float] | None:
    """Mean Q of the states of evaluation episodes, and the mean of their discounted returns.

    None if no state is left, as in a task of at most 300 steps whose episodes run to its limit.
    """
    q_values = []
    returns = []
    for episode in range(episodes):
        own_q_values, own_returns = player.episode(env, seed=10_000 + episode)
        q_values += own_q_values
        returns += own_returns
    if not q_values:
        return None
    return float(np.mean(q_values)), float(np.mean(returns))


# ------------------------------ all runs
def analyse(run: Run, args: Args, datasets: dict[str, Dataset]) -> tuple[list, list]:
    """Rows of coverage.csv and of bias.csv for one run. datasets: those that were needed so far."""
    script = load_script(run.script)
    key = run.name.split("__")
    checkpoint = script.read_checkpoint(run.folder / "checkpoint.pt")
    run_args = script.Args(**checkpoint["args"] | {"device": "cpu"})
    if run_args.env not in datasets:
        datasets[run_args.env] = Dataset(script, run_args)
    dataset = datasets[run_args.env]
    # As the run had it: it knows how the online rows are laid out, and how rewards are scaled.
    buffer = script.ReplayBuffer(dataset.transitions, run_args, torch.device("cpu"))
    visited = visited_states(checkpoint, buffer)
    coverage = coverage_rows(key, visited, args.points, dataset)
    player = Player(script, run_args, checkpoint, buffer.reward_scale)
    env = script.make_env(run_args.env, run_args.physics)
    means = value_bias(player, env, args.episodes)
    if means is None:
        print(f"{run.name}: no value bias, all episodes end by the time limit of a short task")
        return coverage, []
    q_value, discounted = means
    numbers = [f"{number:.2f}" for number in (q_value, discounted, q_value - discounted)]
    return coverage, [[*key, *numbers]]


def write_csv(path: Path, rows: list[list]) -> None:
    """A CSV with the same line ends on every system."""
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def analyse_all(args: Args) -> None:
    """Both files, from all finished runs. ValueError if there is none."""
    coverage = []
    bias = []
    datasets = {}
    runs = [run for run in plan(args.grid, args.out.resolve()) if run.csv]
    finished = [run for run in runs if (run.folder / "finished").exists()]
    if not finished:
        raise ValueError(f"no finished run of {args.grid} in {args.out}: start it with run.py")
    for run in finished:
        print(run.name, flush=True)
        rows, others = analyse(run, args, datasets)
        coverage += rows
        bias += others
    for name, header, rows in (("coverage", COVERAGE, coverage), ("bias", BIAS, bias)):
        if rows:
            write_csv(args.grid.parent / f"{name}.csv", [header, *rows])


def main(arguments: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=arguments)
    try:
        analyse_all(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
