"""Kills runs at random places with SIGKILL, resumes them, and compares with runs that were left alone.

    python tests/kill_points.py [--points 10] [--seed 0] [SCRIPT ...]

A place is a call of the update, of the policy, of an evaluation, or the middle of writing a checkpoint, in
either phase. Evaluations, networks, optimiser, online rows and generators have to be the same, bit for bit.
Exit code 1 if any is not.
"""

import argparse
import importlib
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*_sera.py"))
OPTIONS = (
    "--env hopper-medium-mini --device cpu --offline-steps 60 --online-steps 150 "
    "--eval-every 40 --eval-episodes 1 --checkpoint-every 25 --batch-size 16 --sera-k 3 --hidden-dim 16"
)
CALLS = {"update": 180, "act": 260, "evaluate": 6, "fsync": 6, "replace": 6}  # about how often a run does it
RUN_AND_DIE = """
import importlib, os, signal, sys
import torch
root, name, place, count, *options = sys.argv[1:]
sys.path.insert(0, root)
script, left = importlib.import_module(name), int(count)
owner = {"fsync": os, "replace": os}.get(place, script)
original = getattr(owner, place)

def counted(*inputs, **others):
    global left
    left -= 1
    if left == 0:
        if place == "fsync":
            os.ftruncate(inputs[0], 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*inputs, **others)

setattr(owner, place, counted)
script.main(options)
"""


def run(name: str, run_dir: Path, *options: str) -> None:
    importlib.import_module(name).main([*OPTIONS.split(), "--run-dir", str(run_dir), *options])


def run_and_die(name: str, run_dir: Path, place: str, count: int) -> bool:
    """Whether SIGKILL came, at that call of that function; not if the run ended before."""
    inputs = [str(ROOT), name, place, str(count), *OPTIONS.split(), "--run-dir", str(run_dir)]
    done = subprocess.run([sys.executable, "-c", RUN_AND_DIE, *inputs], capture_output=True, text=True)
    if done.returncode not in (0, -9):
        raise RuntimeError(done.stderr)
    return done.returncode == -9


def resume(name: str, run_dir: Path) -> None:
    """Go on; a run that died before its first checkpoint has not begun, and its own command starts it."""
    if (run_dir / "checkpoint.pt").exists():
        importlib.import_module(name).main(["--run-dir", str(run_dir), "--resume"])
    else:
        run(name, run_dir)


def differences(left, right, where: str = "") -> list[str]:
    """Where two checkpoints, or parts of them, are not the same bit for bit."""
    if isinstance(left, dict):
        found = [] if left.keys() == right.keys() else [f"{where}: {left.keys() ^ right.keys()}"]
        return found + [
            d
            for key in left.keys() & right.keys()
            for d in differences(left[key], right[key], f"{where}/{key}")
        ]
    if isinstance(left, (list, tuple)) and len(left) == len(right):
        return [d for i, pair in enumerate(zip(left, right)) for d in differences(*pair, f"{where}/{i}")]
    same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    return [] if same else [where]


def compare(alone: Path, resumed: Path) -> list[str]:
    """What differs between two finished runs."""
    same = (alone / "evals.csv").read_bytes() == (resumed / "evals.csv").read_bytes()
    left, right = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (alone, resumed))
    for checkpoint in (left, right):
        del checkpoint["args"]  # where the run is, and that it was resumed
    return ([] if same else ["evals.csv"]) + differences(left, right)


def main(names: list[str], points: int, seed: int) -> int:
    random.seed(seed)
    failures, killed = [], 0
    progress = tqdm(total=points * len(names), unit=" points", mininterval=5)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            run(name, Path(folder, "alone"))
            for point in range(points):
                place = random.choice(list(CALLS))
                count = random.randint(1, CALLS[place])
                run_dir = Path(folder, str(point))
                if run_and_die(name, run_dir, place, count):
                    killed += 1
                    resume(name, run_dir)
                found = compare(Path(folder, "alone"), run_dir)
                failures += [f"{name}, {place} {count}: {found[:5]}"] if found else []
                progress.update()
    progress.close()
    print(
        f"{points * len(names)} runs, {killed} of them killed and resumed, {len(failures)} differ",
        *failures,
        sep="\n",
    )
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", default=SCRIPTS)
    parser.add_argument("--points", type=int, default=10, help="for each script")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    sys.exit(main(given.scripts, given.points, given.seed))
