"""Runs with random options, stopped at random places and resumed, end like runs left alone.

    python tests/tools/random_options.py [SCRIPT ...] [--runs 20] [--seed 0]

Options are drawn from those below, so that they meet in combinations that nobody thought of: no
dataset, no online phase, several updates a step, each bonus with each of its critics. A run is
stopped as a signal stops it, in one process; kill_points.py kills processes at any instruction.
Exit code 1 if a resumed run ends in another way than one left alone, bit for bit, or fails.
"""

import contextlib
import importlib
import io
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import kill_points
import tyro
from tqdm import tqdm

FIXED = "--device cpu --threads 1 --hidden-dim 8 --eval-episodes 1"
PHASES = (
    {"offline-steps": 20, "online-steps": 60},
    {"offline-steps": 40, "online-steps": 0},
    {"offline-steps": 0, "online-steps": 90},
    {"offline-steps": 0, "online-steps": 90, "mixing-ratio": 0},  # without a dataset
)
CHOICES = {
    "env": ("hopper-medium-mini", "pendulum-mini"),
    "mixing-ratio": (0.25, 1),
    "online-sampling": ("mix", "append"),
    "batch-size": (8, 16),
    "updates-per-step": (1, 3),
    "learning-starts": (0, 10),
    "eval-every": (10, 25, 1000),
    "checkpoint-every": (5, 20, 1000),
    "log-every": (1, 7),
    "reward-scale": (1, 2),
    "reward-bias": (0, -1),
    "actor-layers": (1, 2),
    "sera-coef": (0, 0.5),
    "sera-k": (1, 7),
    "sera-bonus": ("q", "v", "state", "constant"),
    "sera-critic": ("offline", "current", "random"),
    "sera-scale": ("none", "dim"),
    "sera-pool": (0, 12),
}
FLAGS = ("normalize-observations", "normalize-rewards")
OWN_CHOICES = {
    "cql_sera": {"cql-actions": (2,)},
    "calql_sera": {"cql-actions": (2,)},
    "iql_sera": {"actor-lr-schedule": ("auto", "constant", "cosine"), "actor-dropout": (0, 0.3)},
    "td3bc_sera": {
        "bc-online": ("keep", "anneal", "drop"),
        "bc-anneal-steps": (5, 30),
        "policy-delay": (1, 3),
    },
    "awac_sera": {"advantage-weights": ("softmax", "exp")},
}
OWN_FLAGS = dict.fromkeys(("cql_sera", "calql_sera"), ("cql-lagrange", "cql-max-target-backup"))
# Places to stop at, and about how often a run comes by.
PLACES = {"update": 90, "evaluate": 6, "save_checkpoint": 6}


@dataclass
class Args:
    """Stop and resume runs with random options, and compare with runs left alone."""

    scripts: tyro.conf.Positional[tuple[str, ...]] = kill_points.SCRIPTS  # which scripts to try
    runs: int = 20  # for each script
    seed: int = 0  # of options and places


class Case(NamedTuple):
    """A command line, and the call of a function at which it is stopped."""

    script: str
    options: list[str]
    place: str
    count: int

    def __str__(self) -> str:
        return f"{self.script}.py {' '.join(self.options)}, at {self.place} {self.count}"


def draw(script: str, rng: random.Random, number: int) -> Case:
    """A random case of a script; the phases take turns."""
    choices = CHOICES | OWN_CHOICES.get(script, {})
    values = {option: rng.choice(choice) for option, choice in choices.items()}
    values |= PHASES[number % len(PHASES)]
    options = FIXED.split()
    for option, value in values.items():
        options += [f"--{option}", str(value)]
    for flag in FLAGS + OWN_FLAGS.get(script, ()):
        options.append(rng.choice((f"--{flag}", f"--no-{flag}")))
    place = rng.choice(list(PLACES))
    return Case(script, options, place, rng.randint(1, PLACES[place]))


def call(script: ModuleType, *options: str) -> int:
    """The exit code of a run. RuntimeError with its last words, if it is not 0 or 1."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            script.main(list(options))
        except SystemExit as error:
            code = 1 if isinstance(error.code, str) else error.code
            if code != 1:
                raise RuntimeError(said.getvalue()[-300:]) from None
            return code
    return 0


def run_until_stopped(case: Case, run_dir: Path) -> bool:
    """Whether the run was stopped there, as by a signal; not if it had ended before."""
    script = importlib.import_module(case.script)
    runs = []
    train, function = script.train, getattr(script, case.place)
    left = case.count

    def noting_train(run, args):
        runs.append(run)
        train(run, args)

    def counted(*inputs, **others):
        nonlocal left
        left -= 1
        if left == 0 and runs:
            runs[0].received.append("SIGTERM")
        return function(*inputs, **others)

    with mock.patch.multiple(script, train=noting_train, **{case.place: counted}):
        code = call(script, *case.options, "--run-dir", str(run_dir))
    runs[0].lock.release()
    return code == 1


def compare_with_resumed(case: Case, folder: Path) -> tuple[bool, list[str]]:
    """Whether a run was stopped and resumed, and where it differs from one left alone."""
    script = importlib.import_module(case.script)
    alone, resumed = folder / "alone", folder / "resumed"
    call(script, *case.options, "--run-dir", str(alone))
    was_stopped = run_until_stopped(case, resumed)
    if was_stopped:
        call(script, "--run-dir", str(resumed), "--resume")
    found = kill_points.compare(alone, resumed)
    if case.options[case.options.index("--online-steps") + 1] == "0":
        # Nothing has seeded the environment of the online phase.
        found = [place for place in found if not place.startswith("/rng_env")]
    return was_stopped, found


def main(args: Args) -> int:
    rng = random.Random(args.seed)
    cases = [draw(script, rng, number) for script in args.scripts for number in range(args.runs)]
    failures = []
    resumed = 0
    for case in tqdm(cases, unit=" runs", mininterval=5):
        with tempfile.TemporaryDirectory() as folder:
            try:
                was_stopped, found = compare_with_resumed(case, Path(folder))
            except Exception as error:  # whatever a run may raise
                was_stopped, found = False, [f"{type(error).__name__}: {error}"]
        resumed += was_stopped
        if found:
            failures.append(f"{case}: {found[:5]}")
    print(f"{len(cases)} runs, {resumed} of them stopped and resumed, {len(failures)} differ")
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.path.insert(0, str(kill_points.ROOT))
    sys.exit(main(tyro.cli(Args, description=__doc__)))
