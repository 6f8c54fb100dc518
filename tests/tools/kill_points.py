"""Kills runs at random places with SIGKILL, resumes them, and compares with runs left alone.

    python tests/tools/kill_points.py [SCRIPT ...] [--points 10] [--seed 0] [--options=...]

A place is a call of a training step, of the policy, of an evaluation, or a stage of a checkpoint:
half written, written but not yet in force, just in force; in either phase. Evaluations, networks,
optimizer, online rows and generators have to be the same, bit for bit. Exit code 1 if any is not.
"""

import importlib
import itertools
import multiprocessing
import os
import random
import shlex
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = tuple(sorted(path.stem for path in ROOT.glob("*_sera.py")))
OPTIONS = (
    "--env hopper-medium-mini --device cpu --threads 1 --offline-steps 60 --online-steps 150 "
    "--eval-every 40 --eval-episodes 1 --checkpoint-every 25 --log-every 10 --batch-size 16 "
    "--sera-k 3 --hidden-dim 16"
)
# Places, and about how often a run comes by.
CALLS = {"train_step": 210, "act": 260, "evaluate": 7, "fsync": 9, "replace": 9, "replaced": 9}
# Runs that are to die are forked from a process that has imported this already: to import it takes
# longer than the run.
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["torch._dynamo", "torch.utils.tensorboard", "gymnasium", "h5py", "mujoco", "tyro"]
FORKS.set_forkserver_preload(IMPORTED)


@dataclass
class Args:
    """Kill runs at random places, resume them, and compare with runs left alone."""

    scripts: tyro.conf.Positional[tuple[str, ...]] = SCRIPTS  # which scripts to try
    points: int = 10  # places for each script
    seed: int = 0  # of the places
    options: str = ""  # more of all runs: --options="--device cuda"


def run(name: str, run_dir: Path, *options: str) -> None:
    torch.compiler.reset()  # as in a process of its own, nothing is compiled yet
    script = importlib.import_module(name)
    script.main([*OPTIONS.split(), "--run-dir", str(run_dir), *options])


def run_and_die(name: str, run_dir: Path, place: str, count: int, *options: str) -> bool:
    """Whether SIGKILL came, at that call of that function; not if the run ended before."""
    argv = [*OPTIONS.split(), "--run-dir", str(run_dir), *options]
    return dies_at_call(name, place, count, argv)


def dies_at_call(name: str, place: str, count: int, argv: list[str]) -> bool:
    """Whether a run with these arguments, a process of its own, dies by SIGKILL at that call.

    RuntimeError, with what it printed, if it ends in any other way than that or well.
    """
    with tempfile.NamedTemporaryFile("r") as output:
        inputs = (name, place, count, argv, output.name)
        process = FORKS.Process(target=kill_at_call, args=inputs)
        process.start()
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(output.read())
    return process.exitcode == -signal.SIGKILL


def kill_at_call(name: str, place: str, count: int, argv: list[str], output: str) -> None:
    """Run a script in this process, and kill it at that call; what it prints goes to a file."""
    with open(output, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    script = importlib.import_module(name)
    function = "replace" if place == "replaced" else place
    owner = os if function in ("fsync", "replace") else script
    original = getattr(owner, function)
    calls = itertools.count(1)

    def counted(*inputs, **others):
        if next(calls) == count:
            if place == "fsync":  # half of a checkpoint is on the disk
                os.ftruncate(inputs[0], 1000)
            if place == "replaced":  # the new checkpoint is in force
                original(*inputs)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*inputs, **others)

    setattr(owner, function, counted)
    script.main(argv)


def resume(name: str, run_dir: Path, *options: str) -> None:
    """Go on as the checkpoint says; a run that died before its first one starts, by its command."""
    torch.compiler.reset()
    words = [] if (run_dir / "checkpoint.pt").exists() else [*OPTIONS.split(), *options]
    script = importlib.import_module(name)
    script.main([*words, "--run-dir", str(run_dir), "--resume"])


def differences(left, right, where: str = "") -> list[str]:
    """Where two checkpoints, or parts of them, are not the same bit for bit."""
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return [f"{where}: {left.keys() ^ right.keys()}"]
        pairs = {key: (value, right[key]) for key, value in left.items()}
    elif isinstance(left, (list, tuple)) and len(left) == len(right):
        pairs = dict(enumerate(zip(left, right)))
    else:
        same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
        return [] if same else [where]
    found = []
    for key, (one, other) in pairs.items():
        found += differences(one, other, f"{where}/{key}")
    return found


def compare(alone: Path, resumed: Path) -> list[str]:
    """What differs between two finished runs."""
    found = []
    if (alone / "evals.csv").read_bytes() != (resumed / "evals.csv").read_bytes():
        found.append("evals.csv")
    left = torch.load(alone / "checkpoint.pt", weights_only=True)
    right = torch.load(resumed / "checkpoint.pt", weights_only=True)
    for checkpoint in (left, right):
        del checkpoint["args"]  # where the run is, and that it was resumed
    return found + differences(left, right)


def main(args: Args) -> int:
    random.seed(args.seed)
    options = shlex.split(args.options)
    runs = args.points * len(args.scripts)
    failures = []
    killed = 0
    progress = tqdm(total=runs, unit=" points", mininterval=5)
    for name in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            alone = Path(folder, "alone")
            run(name, alone, *options)
            for point in range(args.points):
                place = random.choice(list(CALLS))
                count = random.randint(1, CALLS[place])
                run_dir = Path(folder, str(point))
                if run_and_die(name, run_dir, place, count, *options):
                    killed += 1
                    resume(name, run_dir, *options)
                found = compare(alone, run_dir)
                if found:
                    failures.append(f"{name}, {place} {count}: {found[:5]}")
                progress.update()
    progress.close()
    print(f"{runs} runs, {killed} of them killed and resumed, {len(failures)} differ")
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(tyro.cli(Args, description=__doc__)))
