"""How fast the scripts are: updates and steps per second, beside other code and the peak.

    python benchmark/speed/speed.py                               # all scripts, as they are today
    python benchmark/speed/speed.py --against 07bf3d9             # and as they were in a commit
    python benchmark/speed/speed.py --peers peers/bin/python      # and d3rlpy, see peers.py
    python benchmark/speed/speed.py --jax-corl JAX-CORL --jax-python jax/bin/python  # jax_peers.py
    python benchmark/speed/speed.py --neighbour                   # also while one core is busy
    python benchmark/speed/speed.py --shape 376 17 --scripts iql_sera    # with other dimensions

All of it takes turns of a second, and the median over the rounds counts, see turns.py. Steps are
those of the scripts' own online phase, with environment, policy and buffer, without evaluations and
checkpoints. Prints a Markdown table; with --output also writes a JSON line for each of its rows.
"""

import contextlib
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from peak import LIBRARIES
from subjects import KINDS, MODES
from turns import Worker, in_turns

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
SCRIPTS = ("cql_sera", "calql_sera", "sac_sera", "iql_sera", "td3bc_sera", "awac_sera")
TODAY, PEAK, D3RLPY, JAX_CORL = "today", "peak", "d3rlpy", "JAX-CORL"
ALGORITHMS = {  # that each peer has
    D3RLPY: ("cql", "calql", "sac", "iql", "td3bc", "awac"),
    JAX_CORL: ("cql", "iql", "td3bc", "awac"),
}
DEFAULT_MODE = {"cpu": "eager", "cuda": "compiled"}  # of the scripts
HEADS = ("script", "what", "code", "mode", "threads", "neighbour", "per second")
HEADS += ("lowest to highest", "of the peak", "today's over it")


@dataclass
class Args:
    """Measure how fast the scripts are."""

    scripts: tuple[str, ...] = SCRIPTS
    """which scripts"""
    kinds: tuple[str, ...] = tuple(KINDS)
    """what to measure: offline, online-0 and online-1 (updates), step-0 and step-1 (steps, with the
    environment); the number is lambda"""
    against: str | None = None
    """also measure this commit, or the scripts in this folder"""
    peers: str | None = None
    """also measure d3rlpy, with this Python"""
    jax_corl: Path | None = None
    """also measure this checkout of JAX-CORL"""
    jax_python: str = sys.executable
    """the Python for that"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks are"""
    modes: tuple[Literal["eager", "recorded", "compiled"], ...] | None = None
    """how the steps are run: by default eager on a CPU, all three on a GPU"""
    threads: tuple[int, ...] | None = None
    """CPU threads: by default 1 and all on a CPU, 1 with a GPU"""
    neighbour: bool = False
    """measure all of it again while another process keeps one core busy"""
    shape: tuple[int, int] = (11, 3)
    """dimensions of states and actions; only hopper's have an environment that does anything"""
    seconds: float = 1.0
    """length of a turn"""
    rounds: int = 5
    """turns that everything gets"""
    output: Path | None = None
    """file for the JSON lines, which are appended"""


class Row(NamedTuple):
    """What has turns of its own."""

    what: str  # one of KINDS, or PEAK
    code: str
    mode: str  # or the library, of the peak
    threads: int


# ------------------------------ workers
def check(args: Args) -> None:
    """Fill in what depends on the machine. ValueError for what cannot be measured."""
    for name in args.scripts:
        if name not in SCRIPTS:
            raise ValueError(f"there is no script {name}.py")
    for kind in args.kinds:
        if kind not in KINDS:
            raise ValueError(f"--kinds {kind}: give some of {' '.join(KINDS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if args.modes is None:
        args.modes = ("eager",) if args.device == "cpu" else tuple(MODES)
    if args.device == "cpu" and "recorded" in args.modes:
        raise ValueError("--modes recorded: needs --device cuda")
    if args.threads is None:
        most = cores() if args.device == "cpu" else 1
        args.threads = tuple(sorted({1, most}))
    if args.jax_corl and not (args.jax_corl / "algos").is_dir():
        raise ValueError(f"--jax-corl {args.jax_corl}: there is no folder algos in it")


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def scripts_of(against: str, folder: Path) -> Path:
    """The folder of another commit's scripts, which are unpacked. ValueError if there is none."""
    if Path(against).is_dir():
        return Path(against).resolve()
    command = ["git", "-C", str(ROOT), "archive", against]
    archive = subprocess.run(command, capture_output=True, check=False)
    if archive.returncode:
        raise ValueError(f"--against {against}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as file:
        file.extractall(folder / "against", filter="data")
    return folder / "against"


def environment_of(root: Path) -> dict[str, str]:
    """What the scripts there set before they import torch, which their worker imports earlier."""
    text = (root / "td3bc_sera.py").read_text()
    found = re.findall(r'^os\.environ\.setdefault\("(\w+)", "(\w+)"\)', text, re.MULTILINE)
    return {name: os.environ.get(name, value) for name, value in found}


def start_workers(args: Args, folder: Path) -> dict[tuple[str, int], Worker]:
    """A process for each code and number of threads; none of them works before it is asked."""
    shape = ["--shape", *map(str, args.shape)]
    device = ["--device", args.device]
    roots = {TODAY: ROOT}
    if args.against:
        roots[args.against] = scripts_of(args.against, folder)
    workers = {}
    for threads in args.threads:
        for code, root in roots.items():
            command = [sys.executable, str(FOLDER / "worker.py"), str(root), *shape, *device]
            workers[code, threads] = Worker(command, threads, environment_of(root))
        if args.peers:
            command = [args.peers, str(FOLDER / "peers.py"), *shape, *device]
            workers[D3RLPY, threads] = Worker(command, threads)
        if args.jax_corl:
            program = str(FOLDER / "jax_peers.py")
            command = [args.jax_python, program, str(args.jax_corl), *shape]
            command += ["--threads", str(threads)]
            workers[JAX_CORL, threads] = Worker(command, threads, jax_environment(args, folder))
        command = [sys.executable, str(FOLDER / "peak.py"), *device]
        workers[PEAK, threads] = Worker(command, threads, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"})
    return workers


def jax_environment(args: Args, folder: Path) -> dict[str, str]:
    """What is compiled for one number of threads serves the next, and a GPU is shared."""
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_PLATFORMS": args.device,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


# ------------------------------ measuring
def turns_of(script: str, workers: dict, args: Args) -> dict[Row, Callable[[float], float]]:
    """What there is to measure of a script, all of it set up: seconds -> how often per second."""
    algorithm = script.removesuffix("_sera")
    turns = {}
    for (code, threads), worker in workers.items():
        if code == PEAK:
            for library in LIBRARIES[args.device]:
                row = Row(PEAK, "torch", library, threads)
                turns[row] = ask_for_rate(worker, library=library)
        elif code in ALGORITHMS:
            if algorithm in ALGORITHMS[code] and "offline" in args.kinds:
                row = Row("offline", code, "-", threads)
                turns[row] = ask_for_rate(worker, algorithm=algorithm)
        else:
            turns |= turns_of_script(script, code, threads, worker, args)
    for turn in turns.values():
        turn(0)  # what is not set up yet is set up now
    return turns


def turns_of_script(script: str, code: str, threads: int, worker: Worker, args: Args) -> dict:
    turns = {}
    known = worker.ask(script=script, want="modes")["modes"]
    for kind in args.kinds:
        for mode in args.modes:
            if mode not in known:
                continue
            case = {"script": script, "kind": kind, "mode": mode}
            really = worker.ask(want="set up", **case)["mode"]
            shown = mode if really == mode else f"{mode}, fell back to {really}"
            turns[Row(kind, code, shown, threads)] = ask_for_rate(worker, want="rate", **case)
    return turns


def ask_for_rate(worker: Worker, **request) -> Callable[[float], float]:
    return lambda seconds: worker.ask(seconds=seconds, **request)["rate"]


def flops_of(script: str, rows: list[Row], workers: dict) -> dict[tuple[str, str], float]:
    """Floating-point operations of each kind of update, by kind and code."""
    flops = {}
    for row in rows:
        is_update = row.what in KINDS and not row.what.startswith("step")
        if is_update and row.code not in ALGORITHMS and (row.what, row.code) not in flops:
            worker = workers[row.code, row.threads]
            answer = worker.ask(script=script, want="flops", kind=row.what, mode="eager")
            flops[row.what, row.code] = answer["flops"]
    return flops


def peak_of(rates: dict[tuple[Row, bool], list[float]], threads: int) -> float:
    """The better library's median, without a neighbour: it is the machine's, not the moment's."""
    medians = []
    for (row, neighbour), some in rates.items():
        if row.what == PEAK and row.threads == threads and not neighbour:
            medians.append(statistics.median(some))
    return max(medians)


def today_over(row: Row, neighbour: bool, rates: dict, args: Args) -> float | None:
    """How many times as fast as a row today's scripts are in their default mode; None for peaks.

    The median of the rounds' ratios: what slows a whole round alters none of them.
    """
    mode = DEFAULT_MODE[args.device]
    if mode not in args.modes:
        mode = args.modes[0]
    for (other, other_neighbour), todays in rates.items():
        same = (other.what, other.threads, other_neighbour) == (row.what, row.threads, neighbour)
        if same and other.code == TODAY and other.mode.startswith(mode):
            pairs = zip(todays, rates[row, neighbour])
            return statistics.median(today / its for today, its in pairs)
    return None


def figures(script: str, workers: dict, args: Args) -> list[dict]:
    """All that was measured of a script, a dictionary for each row of the table."""
    turns = turns_of(script, workers, args)
    flops = flops_of(script, list(turns), workers)
    neighbours = (False, True) if args.neighbour else (False,)
    minutes = len(turns) * len(neighbours) * args.rounds * args.seconds / 60
    print(f"{script}: all is set up, {minutes:.1f} minutes to go", file=sys.stderr, flush=True)
    rates = in_turns(turns, args.rounds, args.seconds, neighbours)
    found = []
    for row, neighbour in sorted(rates, key=place_in_table):
        some = rates[row, neighbour]
        median = statistics.median(some)
        flop = flops.get((row.what, row.code))
        peak = peak_of(rates, row.threads)
        measured = {"script": script, **row._asdict(), "neighbour": neighbour, "rates": some}
        measured["per_second"] = median
        measured["flop"] = flop
        measured["peak"] = peak
        measured["share_of_peak"] = median * flop / peak if flop else None
        measured["today_over_it"] = today_over(row, neighbour, rates, args)
        found.append(measured)
    return found


def place_in_table(key: tuple[Row, bool]) -> tuple:
    """What is to be compared stands together."""
    row, neighbour = key
    return [*KINDS, PEAK].index(row.what), neighbour, row.threads


# ------------------------------ output
def processor(device: str) -> str:
    """The GPU's name, or what the kernel says of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def commit() -> str:
    """Today's commit, and whether files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown commit"


def table_row(found: dict) -> str:
    scale = 1e9 if found["what"] == PEAK else 1
    numbers = [number / scale for number in found["rates"]]
    share, ratio = found["share_of_peak"], found["today_over_it"]
    cells = [
        found["script"],
        KINDS.get(found["what"], "the peak, GFLOP/s"),
        found["code"],
        found["mode"],
        str(found["threads"]),
        "busy" if found["neighbour"] else "quiet",
        f"{statistics.median(numbers):.1f}",
        f"{min(numbers):.1f} to {max(numbers):.1f}",
        f"{100 * share:.0f} %" if share else "",
        f"{ratio:.2f}" if ratio else "",
    ]
    return f"| {' | '.join(cells)} |"


def write(found: dict, args: Args, machine: dict) -> None:
    if args.output:
        with open(args.output, "a") as file:
            print(json.dumps(found | machine), file=file)


def header(machine: dict, args: Args) -> str:
    lines = [f"{machine['processor']}; torch {machine['torch']}; today is {machine['commit']};"]
    if machine["load"] is not None:
        lines += [f"before the first turn {machine['load']:.1f} processes wanted a core;"]
    lines += [f"{args.shape[0]} + {args.shape[1]} dimensions, batch 256;"]
    lines += [f"median of {args.rounds} turns of {args.seconds:g} s", ""]
    lines += [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    return "\n".join(lines)


def measure(args: Args, folder: Path, stack: contextlib.ExitStack) -> None:
    workers = start_workers(args, folder)
    for worker in workers.values():
        stack.callback(worker.close)
    machine = {
        "device": args.device,
        "processor": processor(args.device),
        "torch": torch.__version__,
        "commit": commit(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "shape": args.shape,
        "seconds": args.seconds,
    }
    print(header(machine, args), flush=True)
    for script in args.scripts:
        for found in figures(script, workers, args):
            print(table_row(found), flush=True)
            write(found, args, machine)


def main(args: Args) -> int:
    try:
        check(args)
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            measure(args, Path(folder), stack)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
