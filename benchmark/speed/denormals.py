"""What denormal numbers cost on a CPU: updates per second of trained networks, kept and flushed.

    python benchmark/speed/denormals.py RUN_DIR ...

Where units of a network have gone idle, Adam's moments of their weights fade below 1e-38, and
AWAC's weight decay takes the weights themselves there. A processor multiplies such numbers many
times more slowly than others, so the scripts have them flushed to zero. Fresh networks have none,
and no other benchmark sees this: hence the checkpoints, from which each turn starts. One thread; to
be called where the data files of the runs are found. Prints a Markdown table.
"""

import contextlib
import copy
import functools
import importlib
import io
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import tyro
from turns import in_turns, rate

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    """Measure what denormal numbers cost."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, each with its checkpoint.pt; they stay as they are"""
    seconds: float = 2.0
    """length of a turn"""
    rounds: int = 5
    """turns that each gets"""


def resume(script: ModuleType, folder: Path) -> tuple[Any, Any, dict]:
    """The run in a folder, its arguments and its checkpoint."""
    argv = ["--run-dir", str(folder), "--resume", "--threads", "1", "--device", "cpu"]
    checkpoint, lock = script.find_checkpoint(argv)
    args = script.parse_args(argv, checkpoint)
    with contextlib.redirect_stdout(io.StringIO()):
        return script.set_up(args, checkpoint, lock), args, checkpoint


def turn(
    script: ModuleType, run: Any, args: Any, checkpoint: dict, flush: bool, seconds: float
) -> float:
    """Updates per second from the checkpoint on, in the phase that it is in."""
    torch.set_flush_denormal(flush)
    run.agent.load_state_dict(checkpoint["agent"])
    # A copy: an optimizer goes on writing in the tensors that it is given.
    run.optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
    online = run.phase == "online"
    rows = script.online_batch(run.buffer, args) if online else None
    rows = rows or script.BatchRows(dataset=args.batch_size)
    step = 0

    def one_update() -> None:
        nonlocal step
        step += 1
        kind = script.StepKind(online, rows, script.policy_is_due(step, args), log=False)
        script.train_step(run, args, kind)

    return rate(one_update, seconds, wait=lambda: None)


def turns_of(script: ModuleType, folder: Path) -> tuple[dict[str, Callable], dict]:
    """A turn each of updates with denormal numbers kept and flushed, and the checkpoint."""
    run, args, checkpoint = resume(script, folder)
    one_turn = functools.partial(turn, script, run, args, checkpoint)
    return {
        "kept": lambda seconds: one_turn(False, seconds),
        "flushed": lambda seconds: one_turn(True, seconds),
    }, checkpoint


def count_denormals(checkpoint: dict) -> tuple[int, int]:
    """How many of the agent's numbers are denormal, and how many of the optimizer's."""
    torch.set_flush_denormal(False)  # else they would compare as zeros
    tiny = torch.finfo(torch.float32).tiny

    def count(tensors) -> int:
        return sum(int(((x != 0) & (x.abs() < tiny)).sum()) for x in tensors)

    states = checkpoint["optimizer"]["state"].values()
    moments = sum(count(state.values()) for state in states)
    return count(checkpoint["agent"].values()), moments


def row_of(folder: Path, args: Args) -> str:
    """A row of the table."""
    name = json.loads((folder / "config.json").read_text())["script"]
    script = importlib.import_module(name)
    with tempfile.TemporaryDirectory() as temporary:
        copied = shutil.copytree(folder, Path(temporary, "run"))
        turns, checkpoint = turns_of(script, copied)
        weights, moments = count_denormals(checkpoint)
        rates = in_turns(turns, args.rounds, args.seconds)
    kept, flushed = rates["kept", False], rates["flushed", False]
    ratio = statistics.median(fast / slow for fast, slow in zip(flushed, kept))
    where = f"{name}, {checkpoint['args']['env']}, {checkpoint['phase']} {checkpoint['step']:,}"
    medians = f"{statistics.median(kept):.0f} | {statistics.median(flushed):.0f}"
    return f"| {where} | {weights:,} | {moments:,} | {medians} | {ratio:.2f} |"


def main(args: Args) -> int:
    missing = [folder for folder in args.runs if not (folder / "checkpoint.pt").is_file()]
    if missing:
        print(f"error: there is no {missing[0] / 'checkpoint.pt'}", file=sys.stderr)
        return 2
    print("| run | denormal weights | moments | updates/s, kept | flushed | ratio |")
    print("|---|---|---|---|---|---|")
    for folder in args.runs:
        try:
            print(row_of(folder, args), flush=True)
        except (ValueError, OSError) as error:
            print(f"error: {folder}: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
