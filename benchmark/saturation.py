"""How far SERA's bonus tanh(H) saturates, under both scalings, on batches of a checkpoint's data set.

    pip install -r benchmark/requirements.txt
    python benchmark/saturation.py runs/NAME/checkpoint.pt ... --output docs/saturation.png

q is that of the critics frozen at the switch, or, in a run without online steps, of the last critics. Prints
a table, and draws a panel for each checkpoint.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts


@dataclass
class Args:
    """Measure and draw how far SERA's bonus saturates."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """checkpoint.pt of runs of any *_sera.py on a data set"""
    output: Path = Path("docs/saturation.png")
    """figure to write"""
    batches: int = 40
    """batches per checkpoint and scaling, each of the size that its run used"""


def measure(path: Path, scale: str, batches: int) -> tuple[str, np.ndarray, dict[str, float]]:
    """What was measured on, tanh(H) of all rows of all batches, and the logged numbers' means."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    script = importlib.import_module(checkpoint["script"])
    changes = {"device": "cpu", "online_steps": 0, "sera_coef": 1, "sera_bonus": "q", "sera_scale": scale}
    args = script.Args(**checkpoint["args"] | changes)
    task = script.find_task(args.env)
    networks, _ = script.make_networks(task.observation_dim, task.action_dim, args)
    frozen = "bonus_networks" if checkpoint["phase"] == "online" else "networks"
    networks["critics"].load_state_dict(checkpoint[frozen]["critics"])
    buffer = script.ReplayBuffer(script.load_d4rl(args.env, args.dataset_path), args)
    space = script.make_env(args.env, args.physics).observation_space
    live = torch.from_numpy(np.flatnonzero(space.low < space.high))
    torch.manual_seed(0)
    results = [
        script.sera_bonus(networks, buffer.sample(args.batch_size, 0), live, args) for _ in range(batches)
    ]
    logs = {name: np.mean([float(logs[name]) for _, logs in results]) for name in results[0][1]}
    label = f"{args.env}, d = {task.observation_dim}, k = {args.sera_k}, critics of {checkpoint['script']}"
    return label, torch.cat([bonus for bonus, _ in results]).numpy(), logs


def main(args: Args) -> None:
    count = len(args.checkpoints)
    figure, axes = plt.subplots(1, count, figsize=(4 * count, 3), squeeze=False, layout="constrained")
    print("| data | scaling | mean | sd | share above 0.95 | neighbours in q |\n|---|---|---|---|---|---|")
    for axis, path in zip(axes[0], args.checkpoints):
        for scale in ("none", "dim"):
            label, bonus, logs = measure(path, scale, args.batches)
            print(f"| {label} | `{scale}` | {bonus.mean():.3f} | {bonus.std():.3f}", end=" | ")
            print(f"{logs['sera/above_0.95']:.2f} | {logs['sera/neighbours']:.0f} |")
            axis.hist(bonus, np.linspace(-1, 1, 101), density=True, alpha=0.7, label=f"--sera-scale {scale}")
        axis.set(xlabel="tanh(H)", ylabel="density", yscale="log")
        axis.set_title(label.replace(", critics", "\ncritics"), fontsize=8)
        axis.legend(fontsize=7, loc="upper left")
    figure.savefig(args.output, dpi=120)
    print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
