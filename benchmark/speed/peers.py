"""d3rlpy's updates per second, for speed.py to compare with: runs in an environment of its own.

    python3 -m venv peers && peers/bin/pip install -r benchmark/speed/requirements-peers.txt

Networks and batch are those of the scripts' defaults: two hidden layers of 256, AWAC three, batch
256; CQL has 10 actions a source and no Lagrange multiplier. turns.py has the protocol: a request
names an algorithm and seconds.
"""

from dataclasses import dataclass
from typing import Literal

import d3rlpy
import numpy as np
import tyro
from d3rlpy.algos import AWACConfig, CalQLConfig, CQLConfig, IQLConfig, SACConfig, TD3PlusBCConfig
from d3rlpy.models.encoders import VectorEncoderFactory
from turns import rate, serve

ROWS, BATCH_SIZE = 100_000, 256
TWO_LAYERS, THREE_LAYERS = VectorEncoderFactory([256, 256]), VectorEncoderFactory([256, 256, 256])
WIDE = {"actor_encoder_factory": TWO_LAYERS, "critic_encoder_factory": TWO_LAYERS}
DEEP = {"actor_encoder_factory": THREE_LAYERS, "critic_encoder_factory": THREE_LAYERS}
CONFIGS = {
    "cql": CQLConfig(batch_size=BATCH_SIZE, alpha_learning_rate=0, **WIDE),
    "calql": CalQLConfig(batch_size=BATCH_SIZE, alpha_learning_rate=0, **WIDE),
    "sac": SACConfig(batch_size=BATCH_SIZE, **WIDE),
    "iql": IQLConfig(batch_size=BATCH_SIZE, value_encoder_factory=TWO_LAYERS, **WIDE),
    "td3bc": TD3PlusBCConfig(batch_size=BATCH_SIZE, **WIDE),
    "awac": AWACConfig(batch_size=BATCH_SIZE, **DEEP),
}


@dataclass
class Args:
    """Answer requests with d3rlpy's updates per second."""

    shape: tuple[int, int]
    """dimensions of states and actions"""
    device: Literal["cpu", "cuda"]
    """where the networks are"""


def made_up_data(shape: tuple[int, int]) -> d3rlpy.dataset.MDPDataset:
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(ROWS, shape[0])).astype(np.float32)
    actions = rng.uniform(-1, 1, (ROWS, shape[1])).astype(np.float32)
    terminals = (np.arange(ROWS) % 500 == 499).astype(np.float32)
    return d3rlpy.dataset.MDPDataset(observations, actions, rng.normal(size=ROWS), terminals)


def main(args: Args) -> None:
    data = made_up_data(args.shape)
    algorithms = {}

    def update(algorithm: str) -> None:
        """It ends with its losses on the CPU, so that there is nothing to wait for."""
        algorithms[algorithm].update(data.sample_transition_batch(BATCH_SIZE))

    def answer(algorithm: str, seconds: float) -> dict:
        if algorithm not in algorithms:
            device = "cuda:0" if args.device == "cuda" else False
            algorithms[algorithm] = CONFIGS[algorithm].create(device=device)
            algorithms[algorithm].build_with_dataset(data)
            for _ in range(5):
                update(algorithm)
        return {"rate": rate(lambda: update(algorithm), seconds, lambda: None)}

    serve(answer)


if __name__ == "__main__":
    main(tyro.cli(Args))
