"""Where the time of an offline update goes: matrix products, and all else.

    python benchmark/speed/parts.py
    python benchmark/speed/parts.py --scripts iql_sera --device cuda

"At their best" is what the products would take at the speed of one large product by the same
library. On a GPU updates are eager, products are timed there, and kernels are counted.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from peak import SIZES, matrix_product
from subjects import Today, load_script, write_data
from torch.autograd import DeviceType
from turns import in_turns, rate
from worker import flops_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SCRIPTS = ("cql_sera", "calql_sera", "sac_sera", "iql_sera", "td3bc_sera", "awac_sera")
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
HEADS = ("script", "ms per update", "in matrix products", "these at their best", "all else")
HEADS += ("kernels",)


@dataclass
class Args:
    """Show where the time of an update goes."""

    scripts: tuple[str, ...] = SCRIPTS
    """which scripts"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks are"""
    threads: int = 1
    """CPU threads"""
    seconds: float = 1.0
    """length of a turn"""
    rounds: int = 5
    """turns of updates and of the large product"""
    updates: int = 100
    """how many are profiled"""


def profile(call: Callable[[], object], updates: int, device: str) -> tuple[float, int]:
    """Milliseconds in matrix products, and kernels on a GPU, of one call."""
    with torch.profiler.profile() as profiler:
        for _ in range(updates):
            call()
    microseconds = 0.0
    for event in profiler.key_averages():
        if event.key in PRODUCTS:
            on_gpu = device == "cuda"
            microseconds += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return microseconds / 1000 / updates, round(len(kernels) / updates)


def figures(name: str, folder: Path, args: Args) -> list[str]:
    """The cells of a script's row."""
    subject = Today(load_script(name), folder, args.device)
    case = subject.case("offline", "eager")
    product, _ = matrix_product(args.device, SIZES[args.device])
    turns = {"update": case.turn, "product": partial(rate, product, wait=subject.wait)}
    rates = in_turns(turns, args.rounds, args.seconds)
    updates_per_second = statistics.median(rates["update", False])
    flops_per_second = 2 * SIZES[args.device] ** 3 * statistics.median(rates["product", False])
    at_their_best = 1000 * flops_of(case.call) / flops_per_second
    in_products, kernels = profile(case.call, args.updates, args.device)
    total = 1000 / updates_per_second
    times = (total, in_products, at_their_best, total - in_products)
    return [name, *(f"{time:.2f}" for time in times), str(kernels or "")]


def main(args: Args) -> int:
    unknown = [name for name in args.scripts if not (ROOT / f"{name}.py").is_file()]
    if unknown:
        print(f"error: there is no script {unknown[0]}.py", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder, "data.hdf5"), (11, 3))
        for name in args.scripts:
            print(f"| {' | '.join(figures(name, Path(folder), args))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
