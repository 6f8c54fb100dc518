"""What a checkpoint costs: seconds to write one with its online rows, and their share of a run.

    python benchmark/speed/checkpoint.py [--env ant-medium-v2] [SCRIPT ...]

The buffer is filled with 250,000 online rows, the most that a run by the defaults has; the interval
is the default --checkpoint-every. Updates are those of the offline phase, the faster ones.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

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
    folder: Path | None = None
    """where the checkpoints are written; by default a temporary one"""


def measure(name: str, env: str, folder: str, repeats: int = 5) -> dict[str, float]:
    """Seconds of a checkpoint (median), size in MB, updates per second, share of run time."""
    script = __import__(name)
    args = script.Args(env=env, device="cpu", offline_steps=0, online_steps=250_000)
    task, rng = script.find_task(env), np.random.default_rng(0)
    networks, optimizer = script.make_networks(task.observation_dim, task.action_dim, args)
    state = SimpleNamespace(phase="online", step=1, evals=[("online", 0, 0, 0.0, 0, 0.0)] * 1000)
    state.networks, state.bonus_networks, state.optimizer = networks, networks, optimizer
    state.env, state.data_sha256 = script.make_env(env), "0" * 64
    state.env.reset(seed=0)
    rows = {
        "observations": rng.normal(size=(250_000, task.observation_dim)),
        "actions": rng.uniform(-1, 1, size=(250_000, task.action_dim)).astype(np.float32),
        "rewards": rng.normal(size=250_000),
        "terminals": np.zeros(250_000, bool),
        "dones": np.arange(250_000) % 1000 == 999,
    }
    state.buffer = script.ReplayBuffer(None, args)
    state.buffer.append(rows | {"next_observations": rows["observations"]})

    def updates_per_second(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            state.step += 1
            script.update(state, state.buffer.sample(0, args.batch_size), args)
        return count / (time.perf_counter() - start)

    updates_per_second(20)
    rate, times, path = updates_per_second(100), [], Path(folder, f"{name}.pt")
    for _ in range(repeats):
        start = time.perf_counter()
        script.save_checkpoint(path, state, args)
        times.append(time.perf_counter() - start)
    seconds, size = float(np.median(times)), path.stat().st_size / 1e6
    share = 100 * seconds / (seconds + args.checkpoint_every / rate)
    return {"seconds": seconds, "MB": size, "updates/s": rate, "share of run time, %": share}


def main(args: Args) -> int:
    unknown = [name for name in args.scripts if name not in SCRIPTS]
    if unknown:
        print(f"error: there is no script {unknown[0]}.py", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    for name in args.scripts:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            figures = measure(name, args.env, folder)
        text = "  ".join(f"{key} {value:.3g}" for key, value in figures.items())
        print(f"{name:12}", text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
