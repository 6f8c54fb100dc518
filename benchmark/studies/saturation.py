"""How far SERA's bonus tanh(H) saturates, under both scalings, on batches of a run's dataset.

    pip install -r benchmark/requirements.txt
    python benchmark/studies/saturation.py runs/NAME/checkpoint.pt ... --output docs/saturation.png

q is that of the critics frozen at the switch, or, in a run without online steps, of the last
critics. Prints a table, and draws a panel for each checkpoint.
"""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the scripts

SCALES = ("none", "dim")
HEADER = "| data | scaling | mean | sd | share above 0.95 | neighbours in q |"
RULE = "|---|---|---|---|---|---|"


@dataclass
class Args:
    """Measure and draw how far SERA's bonus saturates."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """checkpoint.pt in the folders of runs of any *_sera.py on a dataset"""
    output: Path = Path("saturation.png")
    """figure to write"""
    batches: int = 40
    """batches per checkpoint and scaling, each of the size that its run used"""


class Sampler:
    """The bonus on random batches of the dataset of a run, with the run's own critics."""

    def __init__(self, path: Path):
        config = json.loads(path.with_name("config.json").read_text())
        self.script = importlib.import_module(config["script"])
        checkpoint = self.script.read_checkpoint(path)
        changes = {"device": "cpu", "online_steps": 0, "sera_coef": 1.0, "sera_bonus": "q"}
        self.args = self.script.Args(**checkpoint["args"] | changes)
        task = self.script.find_task(self.args.env)
        self.agent = self.script.Agent(task.observation_dim, task.action_dim, self.args)
        frozen = "bonus_agent" if checkpoint["phase"] == "online" else "agent"
        self.agent.load_state_dict(checkpoint[frozen])
        data_path = self.script.fetch_dataset(self.args.env, self.args.dataset_path)
        data = self.script.load_d4rl(self.args.env, data_path)
        self.buffer = self.script.ReplayBuffer(data, self.args, torch.device("cpu"))
        space = self.script.make_env(self.args.env, self.args.physics).observation_space
        self.varying_dims = torch.from_numpy(np.flatnonzero(space.low < space.high))
        dimension = f"{self.args.env}, d = {task.observation_dim}, k = {self.args.sera_k}"
        self.label = f"{dimension}, critics of {checkpoint['script']}"

    def measure(self, scale: str, batches: int) -> tuple[np.ndarray, dict[str, float]]:
        """tanh(H) of all rows of all batches, and the means of the logged numbers."""
        self.args.sera_scale = scale
        torch.manual_seed(0)  # the same batches under every scaling
        bonuses = []
        all_logs = []
        for _ in range(batches):
            batch = self.buffer.sample(self.script.BatchRows(self.args.batch_size))
            batch.pop("bonus_q", None)  # nothing is stored here: ask the critics
            bonus, logs = self.script.intrinsic_reward(
                self.agent, batch, self.varying_dims, self.args, log=True
            )
            bonuses.append(bonus)
            all_logs.append(logs)
        means = {}
        for name in all_logs[0]:
            means[name] = float(np.mean([float(logs[name]) for logs in all_logs]))
        return torch.cat(bonuses).numpy(), means


def print_row(label: str, scale: str, bonus: np.ndarray, logs: dict[str, float]) -> None:
    """One row of the table."""
    cells = [
        label,
        f"`{scale}`",
        f"{bonus.mean():.3f}",
        f"{bonus.std():.3f}",
        f"{logs['sera/above_0.95']:.2f}",
        f"{logs['sera/neighbours']:.0f}",
    ]
    print(f"| {' | '.join(cells)} |")


def draw(axis: Axes, sampler: Sampler, batches: int) -> None:
    """Measure one checkpoint under both scalings: rows of the table, and a panel of the figure."""
    for scale in SCALES:
        bonus, logs = sampler.measure(scale, batches)
        print_row(sampler.label, scale, bonus, logs)
        bins = np.linspace(-1, 1, 101)
        axis.hist(bonus, bins, density=True, alpha=0.7, label=f"--sera-scale {scale}")
    axis.set(xlabel="tanh(H)", ylabel="density", yscale="log")
    axis.set_title(sampler.label.replace(", critics", "\ncritics"), fontsize=8)
    axis.legend(fontsize=7, loc="upper left")


def draw_all(args: Args) -> None:
    """The whole table, then the figure."""
    samplers = [Sampler(path) for path in args.checkpoints]
    figure = Figure(figsize=(4 * len(samplers), 3), layout="constrained")
    axes = figure.subplots(1, len(samplers), squeeze=False)[0]
    print(f"{HEADER}\n{RULE}")
    for axis, sampler in zip(axes, samplers):
        draw(axis, sampler, args.batches)
    figure.savefig(args.output, dpi=120)
    print(f"\nwrote {args.output}")


def main(arguments: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=arguments)
    try:
        if not args.checkpoints:
            raise ValueError("no checkpoint given: name checkpoint.pt of one run at least")
        draw_all(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
