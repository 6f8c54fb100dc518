"""d3rlpy's updates per second, for speed.py to compare with: runs in an environment of its own.

    python3 -m venv peers && peers/bin/pip install -r benchmark/speed/requirements-peers.txt

Reads lines "ALGORITHM SECONDS" from standard input and answers each with a number. Networks and
batch are those of the scripts' defaults: two hidden layers of 256, AWAC three, batch 256; CQL has
10 actions a source and no Lagrange multiplier.
"""

import sys
import time
from dataclasses import dataclass
from typing import Literal

import d3rlpy
import numpy as np
import torch
import tyro
from d3rlpy.algos import AWACConfig, CalQLConfig, CQLConfig, IQLConfig, SACConfig, TD3PlusBCConfig
from d3rlpy.models.encoders import VectorEncoderFactory

WIDE = {"actor_encoder_factory": VectorEncoderFactory([256, 256])}
WIDE["critic_encoder_factory"] = WIDE["actor_encoder_factory"]
DEEP = {name: VectorEncoderFactory([256, 256, 256]) for name in WIDE}
CONFIGS = {
    "cql": CQLConfig(batch_size=256, alpha_learning_rate=0, **WIDE),
    "calql": CalQLConfig(batch_size=256, alpha_learning_rate=0, **WIDE),
    "sac": SACConfig(batch_size=256, **WIDE),
    "iql": IQLConfig(
        batch_size=256, value_encoder_factory=VectorEncoderFactory([256, 256]), **WIDE
    ),
    "td3bc": TD3PlusBCConfig(batch_size=256, **WIDE),
    "awac": AWACConfig(batch_size=256, **DEEP),
}


@dataclass
class Args:
    """Answer lines "ALGORITHM SECONDS" with d3rlpy's updates per second."""

    observation_dim: tyro.conf.Positional[int]
    """dimensions of a state"""
    action_dim: tyro.conf.Positional[int]
    """dimensions of an action"""
    threads: tyro.conf.Positional[int]
    """CPU threads"""
    device: tyro.conf.Positional[Literal["cpu", "cuda"]]
    """where the networks are"""


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    rng, rows = np.random.default_rng(0), 100_000
    observations = rng.normal(size=(rows, args.observation_dim)).astype(np.float32)
    actions = rng.uniform(-1, 1, (rows, args.action_dim)).astype(np.float32)
    terminals = (np.arange(rows) % 500 == 499).astype(np.float32)
    data = d3rlpy.dataset.MDPDataset(observations, actions, rng.normal(size=rows), terminals)
    algorithms = {}
    for line in sys.stdin:
        name, seconds = line.split()
        if name not in algorithms:
            device = "cuda:0" if args.device == "cuda" else False
            algorithms[name] = CONFIGS[name].create(device=device)
            algorithms[name].build_with_dataset(data)
            for _ in range(5):
                algorithms[name].update(data.sample_transition_batch(256))
        start, updates = time.perf_counter(), 0
        while time.perf_counter() - start < float(seconds):
            # An update ends with its losses on the CPU, so there is nothing to wait for.
            algorithms[name].update(data.sample_transition_batch(256))
            updates += 1
        print("updates per second:", updates / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
