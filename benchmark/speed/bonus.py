"""How fast the bonus is by itself, and how much memory it takes, in batches of up to 16,384 rows.

    python benchmark/speed/bonus.py
    python benchmark/speed/bonus.py --rows 256 1024 --dimensions 11

q_conditioned_entropy with k = 10 on noise, against a plain version that broadcasts and sorts; peak
memory is what the process (on a GPU: the memory there) grew by. Each figure has a process of its
own. Prints a Markdown table; with --output also writes a JSON line for each figure.
"""

import importlib
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
import tyro
from torch import Tensor
from turns import rate

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
K = 10


@dataclass
class Args:
    """Measure the bonus by itself."""

    rows: tuple[int, ...] = (256, 1024, 4096, 16384)
    """batch sizes"""
    dimensions: tuple[int, ...] = (11, 29, 376)
    """of states"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where it is computed"""
    threads: int = 1
    """CPU threads"""
    seconds: float = 1.0
    """length of a turn; at least one call is made"""
    rounds: int = 3
    """turns that each gets"""
    most_mebibytes: int = 8192
    """the plain version is left out where it needs more"""
    output: Path | None = None
    """file for the JSON lines, which are appended"""


def plain_entropy(observations: Tensor, q_values: Tensor) -> Tensor:
    """Eqs. (S1) to (S3), written down as they stand."""
    q_distances = (q_values[:, None] - q_values).abs()
    distances = (observations[:, None] - observations).square().sum(-1).sqrt()
    joint = torch.maximum(distances, q_distances).fill_diagonal_(torch.inf)
    radii = joint.sort(dim=1).values[:, K - 1]
    counts = (q_distances < radii[:, None]).sum(1) - 1  # a row counts itself
    return torch.digamma(counts + 1.0) / observations.shape[1] + torch.log(2 * radii)


def entropy(
    script: ModuleType, version: str, rows: int, dimension: int, device: str
) -> Callable[[], Tensor]:
    """The script's estimate or the plain one, on the same noise."""
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(rows, dimension, generator=generator).to(device)
    q_values = torch.randn(rows, generator=generator).to(device)
    if version == "plain":
        return lambda: plain_entropy(observations, q_values)
    return lambda: script.q_conditioned_entropy(observations, q_values, K)[0]


def plain_mebibytes(rows: int, dimension: int) -> float:
    """About what the plain version needs: differences, their squares, and one more."""
    return 3 * 4 * rows**2 * dimension / 2**20


def resident(name: str) -> float:
    """This process's memory in MiB: VmRSS is now, VmHWM the peak (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {name}")


def measure(version: str, rows: int, dimension: int, args: Args) -> tuple[float, float]:
    """Milliseconds and peak MiB of one estimate."""
    torch.set_num_threads(args.threads)
    script = importlib.import_module("calql_sera")  # the estimator is the same in all
    entropy(script, version, 64, dimension, args.device)()
    call = entropy(script, version, rows, dimension, args.device)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        call()
        memory = torch.cuda.max_memory_allocated() / 2**20 - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        call()
        memory = resident("VmHWM") - before
    rates = [rate(call, args.seconds, wait) for _ in range(args.rounds)]
    return 1000 / statistics.median(rates), memory


def measure_alone(version: str, rows: int, dimension: int, args: Args) -> tuple[float, float]:
    """The same in a new process, whose memory nothing else has used."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(measure, version, rows, dimension, args).result()


def main(args: Args) -> None:
    print("| rows | d | ms | peak MiB | plain: ms | plain: peak MiB |")
    print("|---|---|---|---|---|---|", flush=True)
    for dimension, rows in itertools.product(args.dimensions, args.rows):
        cells = [str(rows), str(dimension)]
        for version in ("script", "plain"):
            needed = plain_mebibytes(rows, dimension)
            if version == "plain" and needed > args.most_mebibytes:
                cells += ["-", f"about {needed:,.0f}"]
                continue
            milliseconds, memory = measure_alone(version, rows, dimension, args)
            cells += [f"{milliseconds:.2f}", f"{memory:,.0f}"]
            found = {"bonus": version, "rows": rows, "dimension": dimension}
            found |= {"milliseconds": milliseconds, "mebibytes": memory}
            if args.output:
                with open(args.output, "a") as file:
                    print(json.dumps(found | {"device": args.device}), file=file)
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
