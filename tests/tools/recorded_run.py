"""Small whole runs on made-up data, with a note of everything that went through them."""

import copy
import csv
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium
import h5py
import numpy as np
import pytest
import torch

ENV = "hopper-medium-v2"
OPTIONS = (
    f"--env {ENV} --device cpu --offline-steps 12 --online-steps 60 --batch-size 32 "
    "--eval-every 30 --eval-episodes 1 --checkpoint-every 33 --sera-k 5 --sera-scale dim "
    "--no-normalize-rewards --hidden-dim 16"
)


class Step(NamedTuple):
    """One step of an environment."""

    observation: np.ndarray
    action: np.ndarray
    reward: float
    next_observation: np.ndarray
    terminated: bool
    done: bool  # terminated, or cut by a time limit


class Sample(NamedTuple):
    """One batch, and the state of affairs when it was drawn."""

    steps: int  # that the training environment has made
    finished: int  # how many of them are of finished episodes
    online_size: int  # of the buffer
    rows: Any  # BatchRows
    batch: dict[str, Any]


class Bonus(NamedTuple):
    """What one bonus was asked for with."""

    critics: dict[str, Any]  # state_dict of the critics that give q, unless it is stored
    rewards: Any
    varying_dims: Any
    log: bool
    pool: dict[str, Any] | None


class Update(NamedTuple):
    """What one update got."""

    kind: Any
    rewards: Any


class Recorder(gymnasium.Wrapper):
    """Notes the seed of every reset, and every step, by episode."""

    def __init__(self, env):
        super().__init__(env)
        self.seeds = []
        self.episodes = []

    def reset(self, **options):
        self.seeds.append(options.get("seed"))
        self.episodes.append([])
        self.observation, info = self.env.reset(**options)
        return self.observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        done = terminated or truncated
        noted = Step(self.observation, action, reward, observation, terminated, done)
        self.episodes[-1].append(noted)
        self.observation = observation
        return observation, reward, terminated, truncated, info

    def all_steps(self):
        return [step for episode in self.episodes for step in episode]

    def finished_episodes(self):
        return [episode for episode in self.episodes if episode and episode[-1].done]


class Scripted(gymnasium.Env):
    """Episodes of 7 steps to a terminal and of 9 to a timeout, in turn; rewards 10, 11, 12, ..."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,))
    action_space = gymnasium.spaces.Box(-1, 1, (3,))
    steps = 0
    episode = -1

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.time = 0
        return np.full(11, 100.0 * self.episode), {}

    def step(self, action):
        self.steps += 1
        self.time += 1
        observation = np.full(11, 100.0 * self.episode + self.time)
        terminated = self.episode % 2 == 0 and self.time == 7
        truncated = self.episode % 2 == 1 and self.time == 9
        return observation, 9.0 + self.steps, terminated, truncated, {}


def scripted_env(*args, **kwargs):
    """In place of make_env."""
    return gymnasium.wrappers.RecordEpisodeStatistics(Scripted())


def write_dataset(path):
    """300 rows in D4RL's format: a random walk from Hopper's upright state.

    Eleven terminals and a timeout; rewards from 2 to 5, all below those of Scripted.
    """
    rng = np.random.default_rng(4)
    rows = np.arange(300)
    observations = 0.02 * rng.normal(size=(300, 11)).cumsum(0) + 0.1 * rng.normal(size=(300, 11))
    observations[:, 0] += 1.25
    with h5py.File(path, "w") as file:
        file["observations"] = observations.astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, size=(300, 3)).astype(np.float32)
        file["rewards"] = rng.uniform(2, 5, size=300).astype(np.float32)
        file["terminals"] = (rows % 25 == 24) & (rows != 149)
        file["timeouts"] = rows == 149
    return path


def recorded_run(script, dataset, folder, *options, **replaced):
    """Run a script on a dataset, with other functions in place of those of its own that are named.

    Gives the run as it ended and its agent as it began; all checkpoints but the one before any
    training; the environments, the one to train in first; every batch, bonus and update; the rows
    of evals.csv and the dataset.
    """
    seen = SimpleNamespace(folder=folder, checkpoints=[], envs=[], samples=[], bonuses=[])
    seen.updates = []
    names = ("make_env", "train", "save_checkpoint", "intrinsic_reward", "update")
    plain = {name: replaced.get(name, getattr(script, name)) for name in names}
    sample = script.ReplayBuffer.sample

    def make_env(*args, **kwargs):
        seen.envs.append(Recorder(plain["make_env"](*args, **kwargs)))
        return seen.envs[-1]

    def train(run, args):
        seen.run = run
        seen.initial = copy.deepcopy(run.agent.state_dict())
        plain["train"](run, args)

    def save_checkpoint(run, args):
        plain["save_checkpoint"](run, args)
        if run.step:
            seen.checkpoints.append(script.read_checkpoint(run.run_dir / "checkpoint.pt"))

    def recorded_sample(buffer, rows):
        batch = sample(buffer, rows)
        steps = len(seen.envs[0].all_steps())
        finished = sum(len(episode) for episode in seen.envs[0].finished_episodes())
        noted = copy.deepcopy(batch)
        seen.samples.append(Sample(steps, finished, buffer.online_size, rows, noted))
        return batch

    def intrinsic_reward(agent, batch, varying_dims, args, log, pool):
        critics = copy.deepcopy(agent.critics.state_dict())
        noted = Bonus(critics, batch["rewards"].clone(), varying_dims, log, copy.deepcopy(pool))
        seen.bonuses.append(noted)
        return plain["intrinsic_reward"](agent, batch, varying_dims, args, log, pool)

    def update(agent, optimizer, batch, args, kind):
        seen.updates.append(Update(kind, batch["rewards"].clone()))
        return plain["update"](agent, optimizer, batch, args, kind)

    recorders = (make_env, train, save_checkpoint, intrinsic_reward, update)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in replaced.items():
            patch.setattr(script, name, function)
        for function in recorders:
            patch.setattr(script, function.__name__, function)
        patch.setattr(script.ReplayBuffer, "sample", recorded_sample)
        small = ["--cql-actions", "2"] if hasattr(script.Args, "cql_actions") else []
        paths = ["--dataset-path", str(dataset), "--run-dir", str(folder)]
        script.main([*OPTIONS.split(), *small, *paths, *options])
    seen.run.lock.release()
    seen.last = seen.checkpoints[-1]
    seen.rows = seen.run.buffer.as_columns(seen.last["online_rows"])
    seen.data = script.load_d4rl(ENV, dataset)
    with open(folder / "evals.csv", newline="") as file:
        seen.evals = list(csv.DictReader(file))
    return seen


# ------------------------------ to compare with
def part(agent_state, name):
    """One network's entries of an agent's state_dict, named as in its own state_dict."""
    start = f"{name}."
    return {
        key.removeprefix(start): value
        for key, value in agent_state.items()
        if key.startswith(start)
    }


def assert_same(left, right):
    """Two nested structures hold the same numbers, bit for bit."""
    if isinstance(left, dict):
        assert isinstance(right, dict)
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert type(left) is type(right)
        assert len(left) == len(right)
        for one, other in zip(left, right):
            assert_same(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def differ(left, right):
    """Whether two state_dicts of one network are not the same."""
    assert left.keys() == right.keys()
    return any(not torch.equal(left[name], right[name]) for name in left)
