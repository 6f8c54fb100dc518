"""JAX-CORL's updates per second, for speed.py to compare with: runs in an environment of its own.

    git clone https://github.com/nissymori/JAX-CORL
    python3 -m venv jax && jax/bin/pip install -r benchmark/speed/requirements-jax.txt

Its files are imported as they are; the environments, D4RL and Weights & Biases, of which an update
needs nothing, are left out. One call of its jitted function makes 8 updates, as published. Networks
have the widths and depths of the scripts' defaults, but TD3+BC's and AWAC's critics and IQL's value
network have LayerNorm there. turns.py has the protocol: a request names an algorithm and seconds.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import tyro
from turns import rate, serve

ROWS = 100_000
ALGORITHMS = ("td3bc", "iql", "awac", "cql")
LEFT_OUT = ("d4rl", "gym", "wandb")


@dataclass
class Args:
    """Answer requests with JAX-CORL's updates per second."""

    folder: tyro.conf.Positional[Path]
    """a checkout of JAX-CORL"""
    shape: tuple[int, int]
    """dimensions of states and actions"""
    threads: int
    """CPU threads: XLA has no option for them, but takes no more than the cores that it may use"""


class LeftOut(ModuleType):
    """A module of which only annotations speak."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def load(folder: Path, algorithm: str) -> ModuleType:
    """One of its files as a module."""
    for name in LEFT_OUT:
        sys.modules[name] = LeftOut(name)
    path = folder / "algos" / f"{algorithm}.py"
    sys.argv = [str(path)]  # which it reads for its options
    specification = importlib.util.spec_from_file_location(f"jax_corl_{algorithm}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    return module


def set_options(config: object, algorithm: str, action_dim: int) -> None:
    """The networks of the scripts' defaults, and what its main program reads off the task."""
    if algorithm == "awac":
        config.actor_hidden_dims = (256, 256, 256)
        config.critic_hidden_dims = (256, 256, 256)
    if algorithm == "cql":
        config.action_dim = action_dim
        config.target_entropy = -float(action_dim)


def made_up_data(module: ModuleType, shape: tuple[int, int]):
    """A dataset of noise, on the device, as its Transition."""
    rng = np.random.default_rng(0)
    ends = (np.arange(ROWS) % 500 == 499).astype(np.float32)
    columns = {
        "observations": rng.normal(size=(ROWS, shape[0])).astype(np.float32),
        "actions": rng.uniform(-0.999, 0.999, (ROWS, shape[1])).astype(np.float32),
        "rewards": rng.normal(size=ROWS).astype(np.float32),
        "next_observations": rng.normal(size=(ROWS, shape[0])).astype(np.float32),
        "dones": ends,
        "dones_float": ends,
    }
    fields = module.Transition._fields
    return module.Transition(**{name: jax.numpy.asarray(columns[name]) for name in fields})


class Training:
    """One algorithm, compiled and warmed up."""

    def __init__(self, folder: Path, algorithm: str, shape: tuple[int, int]):
        module = load(folder, algorithm)
        self.config = module.config
        set_options(self.config, algorithm, shape[1])
        self.data = made_up_data(module, shape)
        make_state = getattr(module, f"create_{algorithm}_train_state")
        self.key, key = jax.random.split(jax.random.PRNGKey(0))
        row = jax.tree_util.tree_map(lambda column: column[0], self.data)
        self.state = make_state(key, row.observations, row.actions, self.config)
        updates = getattr(module, algorithm.upper())().update_n_times
        self.updates: Callable = jax.jit(updates, static_argnums=(3,))
        for _ in range(3):
            self.call()
        self.wait()

    def call(self) -> None:
        self.key, key = jax.random.split(self.key)
        self.state, _ = self.updates(self.state, self.data, key, self.config)

    def wait(self) -> None:
        jax.block_until_ready(self.state)


def use_cores(count: int) -> None:
    """Before JAX looks for its devices."""
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def main(args: Args) -> None:
    use_cores(args.threads)
    trainings = {}

    def answer(algorithm: str, seconds: float) -> dict:
        if algorithm not in trainings:
            trainings[algorithm] = Training(args.folder, algorithm, args.shape)
        training = trainings[algorithm]
        calls_per_second = rate(training.call, seconds, training.wait)
        return {"rate": calls_per_second * training.config.n_jitted_updates}

    serve(answer)


if __name__ == "__main__":
    main(tyro.cli(Args))
