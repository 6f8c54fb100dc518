"""What each bonus costs: online updates per second with SERA's, its variants, RND and counts.

    python benchmark/speed/bonuses.py
    python benchmark/speed/bonuses.py --script iql_sera --device cuda

All of them take turns of a second in one process, on the same made-up data of hopper's shape, and
the median over the rounds counts. Prints a Markdown table.
"""

import importlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from subjects import HOPPER, Today, load_script, write_data
from turns import in_turns

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
other_bonuses = importlib.import_module("other_bonuses")
PLAIN = "none"
OPTIONS = {
    "SERA": "",
    "SERA, learning critics": "--sera-critic current",
    "V": "--sera-bonus v",
    "the state alone": "--sera-bonus state",
    "constant": "--sera-bonus constant",
}
OTHERS = {"RND": "rnd", "counts": "counts"}


@dataclass
class Args:
    """Measure what each bonus costs."""

    script: str = "td3bc_sera"
    """in which script"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks are; on a GPU steps are recorded and compiled, as by default"""
    threads: int = 1
    """CPU threads"""
    seconds: float = 1.0
    """length of a turn"""
    rounds: int = 5
    """turns that each gets"""


def turns_of(args: Args, folder: Path) -> dict[str, Callable[[float], float]]:
    """A turn of online updates with each bonus, by name."""
    mode = "eager" if args.device == "cpu" else "compiled"
    script = load_script(args.script)
    turns = {PLAIN: Today(script, folder, args.device).case("online-0", mode).turn}
    for name, options in OPTIONS.items():
        turns[name] = Today(script, folder, args.device, options).case("online-1", mode).turn
    for name, bonus in OTHERS.items():
        script = other_bonuses.load_script(ROOT / f"{args.script}.py")
        other_bonuses.use_bonus(script, bonus)
        turns[name] = Today(script, folder, args.device).case("online-1", mode).turn
    return turns


def main(args: Args) -> int:
    if not (ROOT / f"{args.script}.py").is_file():
        print(f"error: there is no script {args.script}.py", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder, "data.hdf5"), HOPPER)
        turns = turns_of(args, Path(folder))
        torch.set_num_threads(args.threads)  # after set_up, which chooses them by itself
        rates = in_turns(turns, args.rounds, args.seconds)
    print("| bonus | updates per second | the bonus takes |")
    print("|---|---|---|")
    plain = rates[PLAIN, False]
    for name in turns:
        own = rates[name, False]
        extra = statistics.median(1000 / mine - 1000 / its for mine, its in zip(own, plain))
        cost = "-" if name == PLAIN else f"{extra:.2f} ms"
        print(f"| {name} | {statistics.median(own):.0f} | {cost} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
