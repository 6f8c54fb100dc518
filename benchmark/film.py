"""Films the policy of a finished run, in the run's own environment and physics.

    pip install -r benchmark/requirements.txt
    MUJOCO_GL=egl python benchmark/film.py runs/NAME      # without a display; with one leave MUJOCO_GL out

Writes runs/NAME/videos/<data set>-episode-0.mp4 and on, and prints each episode's return and score.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts


@dataclass
class Args:
    """Film the policy of a finished run."""

    run_dir: tyro.conf.Positional[Path]
    """folder of the run, with its checkpoint.pt"""
    episodes: int = 1
    """how many"""
    seed: int = 0
    """seed of the first start state"""


def main(args: Args) -> None:
    checkpoint = torch.load(args.run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    script = importlib.import_module(checkpoint["script"])
    saved = script.Args(**checkpoint["args"] | {"device": "cpu"})
    task, normalizer = script.find_task(saved.env), checkpoint["normalizer"]
    networks, _ = script.make_networks(task.observation_dim, task.action_dim, saved)
    for name, parameters in checkpoint["networks"].items():
        networks[name].load_state_dict(parameters)

    @torch.no_grad()
    def policy(observations: np.ndarray) -> np.ndarray:
        states = (torch.from_numpy(observations) - normalizer["mean"]) / normalizer["std"]
        return script.act(networks, states.float(), deterministic=True).numpy()

    env = script.make_env(saved.env, saved.physics, render_mode="rgb_array")
    env = gymnasium.wrappers.RecordVideo(
        env, str(args.run_dir / "videos"), lambda _: True, name_prefix=saved.env
    )
    for episode in range(args.episodes):
        returns, _ = script.evaluate(policy, [env], [args.seed + episode])
        score = script.normalized_score(saved.env, returns[0])
        print(f"episode {episode}: return {returns[0]:.0f}, score {score:.1f}")
    env.close()


if __name__ == "__main__":
    main(tyro.cli(Args))
