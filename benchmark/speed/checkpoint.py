"""What a checkpoint costs: seconds to write one with its online rows, and their share of a run.

    python benchmark/speed/checkpoint.py [--env ant-medium-v2] [SCRIPT ...]

The buffer is filled with 250,000 online rows, the most that a run by the defaults has; the interval
is the default --checkpoint-every. Updates are those of the online phase, bonus included.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SCRIPTS = tuple(sorted(path.stem for path in ROOT.glob("*_sera.py")))


@dataclass
class Args:
    """Measure what a checkpoint costs."""

    scripts: tyro.conf.Positional[tuple[str, ...]] = SCRIPTS
    """which scripts"""
    env: str = "ant-medium-v2"
    """dataset id, whose dimensions count"""
    rows: int = 250_000
    """online rows in the buffer"""
    updates: int = 100
    """updates that are timed"""
    repeats: int = 5
    """checkpoints that are written"""
    folder: Path | None = None
    """where they are written; by default a temporary one"""


def online_rows(task: Any, rows: int) -> dict[str, np.ndarray]:
    """Made-up transitions, as load_d4rl gives them."""
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(rows, task.observation_dim)),
        "actions": rng.uniform(-1, 1, size=(rows, task.action_dim)),
        "rewards": rng.normal(size=rows),
        "next_observations": rng.normal(size=(rows, task.observation_dim)),
        "terminals": np.zeros(rows, dtype=bool),
        "episode_ends": np.arange(rows) % 1000 == 999,
    }


def make_run(script: ModuleType, script_args: Any, folder: Path, rows: int) -> Any:
    """A run at the end of its online phase, with a row of evals.csv for every 250 steps."""
    task = script.find_task(script_args.env)
    device = torch.device("cpu")
    agent = script.Agent(task.observation_dim, task.action_dim, script_args)
    optimizer, scheduler = script.make_optimizer(agent, script_args)
    buffer = script.ReplayBuffer(None, script_args, device)
    buffer.append(online_rows(task, rows))
    env = script.make_env(script_args.env)
    env.reset(seed=0)
    run = script.Run(
        agent=agent,
        bonus_agent=agent,
        optimizer=optimizer,
        scheduler=scheduler,
        buffer=buffer,
        env=env,
        phase="online",
        step=rows,
        evals=[("online", 0, 0, 0.0, 0, 0.0)] * (rows // 250),
        train_scores=[0.0] * (rows // 1000),
        device=device,
        run_dir=folder,
        data_sha256="0" * 64,
        varying_dims=torch.arange(task.observation_dim),
    )
    script.store_bonus_q(run, script_args, 0, buffer.size)
    return run


def seconds_per_update(script: ModuleType, run: Any, script_args: Any, updates: int) -> float:
    rows = script.BatchRows(online=script_args.batch_size)
    start = time.perf_counter()
    for number in range(1, updates + 1):
        policy_due = script.policy_is_due(number, script_args)
        kind = script.StepKind(True, rows, policy_due, False)
        script.train_step(run, script_args, kind)
    return (time.perf_counter() - start) / updates


def seconds_per_checkpoint(script: ModuleType, run: Any, script_args: Any, repeats: int) -> float:
    """The median."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        script.save_checkpoint(run, script_args)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(name: str, args: Args, folder: Path) -> dict[str, float]:
    """Seconds of a checkpoint, its size in MB, updates per second, share of run time."""
    script = __import__(name)
    options = {"offline_steps": 0, "online_steps": args.rows}
    script_args = script.Args(env=args.env, device="cpu", **options)
    run = make_run(script, script_args, folder, args.rows)
    seconds_per_update(script, run, script_args, 1 + args.updates // 10)  # warms up
    update = seconds_per_update(script, run, script_args, args.updates)
    checkpoint = seconds_per_checkpoint(script, run, script_args, args.repeats)
    size = (folder / "checkpoint.pt").stat().st_size
    interval = checkpoint + script_args.checkpoint_every * update
    return {
        "seconds": checkpoint,
        "MB": size / 1e6,
        "updates/s": 1 / update,
        "share of run time, %": 100 * checkpoint / interval,
    }


def main(args: Args) -> int:
    unknown = [name for name in args.scripts if name not in SCRIPTS]
    if unknown:
        print(f"error: there is no script {unknown[0]}.py", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    for name in args.scripts:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            figures = measure(name, args, Path(folder))
        text = "  ".join(f"{key} {value:.3g}" for key, value in figures.items())
        print(f"{name:12}", text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
