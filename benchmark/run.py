"""Runs a grid of experiments, scripts x environments x variants x seeds, on this machine or a Ray cluster.

    python benchmark/run.py docs/results/conditioning/grid.toml [--out runs/grids] [--jobs 2]

A grid is a TOML file: scripts, envs, seeds, options for all of them, [variants] with the options of each, and
if need be [script_options], [env_options] and [critics] (below). Each run is the script itself as a process.
Where variants differ in --sera-* alone they share one offline phase per script, environment and seed: its
checkpoint is copied and resumed, which gives the very run that one process would give. A folder of --out is
named by the options of its run, so that grids share what they have in common. Finished runs are skipped, also
if only their CSV is left; killed ones are resumed from their checkpoint, failed ones tried again and reported
at the end. evals.csv of each finished run is gathered in runs/ beside the grid file, with the options that
made it in commands.json. --dry-run prints all commands, in an order in which they can be run.

On a cluster, --address names it (`ray start` on every machine), --out is a folder that all machines share,
--gpus may be a fraction. Threads of a run are pinned to --threads.

[critics] is for studies of the bonus's critics: name = options of an offline run, say few = "--offline-steps
1000" or other = "--seed 101"; a variant given as {options = "...", critics = "few"} gets that run's networks
behind the bonus. It has to say --sera-critic random, which leaves them as they come. --dry-run only names
such a run: a plain command does not put them there.
"""

import argparse
import ctypes
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """One process: the script's options, its folder, and the offline phases that it starts from."""

    name: str
    script: str
    options: str
    folder: Path
    start: "Run | None" = None  # whose checkpoint is copied and resumed
    critics: "Run | None" = None  # whose networks stand behind the bonus
    csv: Path | None = None  # where its evals.csv is gathered

    def command(self, resume: bool) -> list[str]:
        options = [*shlex.split(self.options), "--run-dir", str(self.folder), *["--resume"] * resume]
        return [sys.executable, str(ROOT / f"{self.script}.py"), *options]


def offline_run(script: str, options: str, out: Path) -> Run:
    """An offline phase; grids that ask for the same one share its folder."""
    words = shlex.split(options)
    at = words.index("--online-steps")
    run = Run("", script, shlex.join([*words[:at], *words[at + 2 :], "--online-steps", "0"]), out)
    return replace(run, name=origin(run), folder=out / f"{script}__offline__{digest(run)}")


def origin(run: Run) -> str:
    """The options behind a run, its offline phase's first: what is the same is the same run."""
    parts = [run.start.options.removesuffix(" --online-steps 0")] if run.start else []
    parts += [run.options] + ([f"(bonus: {run.critics.options})"] if run.critics else [])
    return " ".join(f"{run.script}.py {' '.join(parts)}".split())


def digest(run: Run) -> str:
    return hashlib.sha256(origin(run).encode()).hexdigest()[:8]


def plan(grid_file: Path, out: Path) -> list[Run]:
    """All runs of a grid, offline phases before those that start from them. ValueError for a bad grid."""
    grid, study = tomllib.loads(grid_file.read_text()), grid_file.resolve().parent
    for key in ("scripts", "envs", "seeds", "options", "variants"):
        if not grid.get(key):
            raise ValueError(f"{grid_file} has no {key}")
    if "--online-steps" not in shlex.split(grid["options"]):
        raise ValueError(f"{grid_file}: options name no --online-steps")
    runs = []
    for script in grid["scripts"]:
        if not (ROOT / f"{script}.py").is_file():
            raise ValueError(f"{grid_file}: there is no script {script}.py")
        for env in grid["envs"]:
            common = [f"--env {env}", grid["options"], grid.get("script_options", {}).get(script, "")]
            common = " ".join(filter(None, [*common, grid.get("env_options", {}).get(env, "")]))
            for seed in grid["seeds"]:
                for variant, given in grid["variants"].items():
                    given = given if isinstance(given, dict) else {"options": given}
                    own, options = given["options"], f"{common} --seed {seed}"
                    name = f"{script}__{env}__{variant}__{seed}"
                    run = Run(name, script, f"{options} {own}", out, csv=study / "runs" / f"{name}.csv")
                    flags = [word for word in shlex.split(own) if word.startswith("--")]
                    if all(flag.startswith("--sera") for flag in flags):
                        words = shlex.split(options)
                        steps = words[words.index("--online-steps") + 1]
                        run = replace(run, options=f"--online-steps {steps} {own}")
                        run = replace(run, start=offline_run(script, options, out))
                    if "critics" in given:
                        if not run.start or "--sera-critic random" not in own:
                            raise ValueError(
                                f"{grid_file}: {variant} needs --sera-critic random, and only --sera-*"
                            )
                        other = grid["critics"][given["critics"]]
                        run = replace(run, critics=offline_run(script, f"{options} {other}", out))
                    run = replace(run, folder=out / f"{script}__{env}__{seed}__{digest(run)}")
                    runs += [before for before in (run.start, run.critics) if before and before not in runs]
                    runs.append(run)
    return runs


def prepare(run: Run) -> None:
    """Give a run its first checkpoint, where it starts from another's; never over one of its own."""
    checkpoint = run.folder / "checkpoint.pt"
    run.folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists() or not run.start:
        return
    part = checkpoint.with_suffix(".part")
    shutil.copy(run.start.folder / "checkpoint.pt", part)
    if run.critics:
        saved = torch.load(part, map_location="cpu", weights_only=True)
        other = torch.load(run.critics.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        torch.save(saved | {"bonus_networks": other["networks"]}, data := io.BytesIO())
        part.write_bytes(data.getvalue() + hashlib.sha256(data.getvalue()).digest())  # the seal
    os.replace(part, checkpoint)


def die_with_parent() -> None:
    """For Linux: a run ends with the worker that started it, or it would go on beside its own successor."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def execute(run: Run, threads: int, *before: str) -> str:
    """Run one process to its end and return its name. before: results it has to wait for. RuntimeError."""
    if (run.folder / "finished").exists():
        return run.name
    prepare(run)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(run.folder / "log.txt", "ab") as log:
        command = run.command(resume=(run.folder / "checkpoint.pt").exists())
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, preexec_fn=die_with_parent
        )
    if done.returncode:
        end = (run.folder / "log.txt").read_text(errors="replace")[-1500:]
        words = " ".join(re.sub(r"[\u2500-\u259f]+", " ", end).split())  # less boxes and bars
        raise RuntimeError(f"exit code {done.returncode}, {run.folder / 'log.txt'}: {words[-300:]}")
    (run.folder / "finished").touch()
    return run.name


def gather(run: Run, grid_file: Path) -> None:
    """Copy the evaluations of a finished run beside the grid, and note what made them."""
    run.csv.parent.mkdir(exist_ok=True)
    shutil.copy(run.folder / "evals.csv", run.csv)
    commands = read_commands(grid_file) | {run.name: origin(run)}
    text = json.dumps(dict(sorted(commands.items())), indent=1)
    (grid_file.parent / "commands.json").write_text(text + "\n")


def read_commands(grid_file: Path) -> dict[str, str]:
    path = grid_file.parent / "commands.json"
    return json.loads(path.read_text()) if path.exists() else {}


def main(args: argparse.Namespace) -> int:
    runs = plan(args.grid, args.out.resolve())
    known = read_commands(args.grid)
    for run in runs:
        if run.csv and run.csv.exists() and known.get(run.name) != origin(run):
            raise ValueError(
                f"{run.csv} was made by other options: {known.get(run.name)}; move it away first"
            )
    wanted = [run for run in runs if run.csv and not run.csv.exists()]
    needed = {before for run in wanted for before in (run.start, run.critics) if before} | set(wanted)
    runs = [run for run in runs if run in needed]
    if args.dry_run:
        for run in runs:
            start = run.start and f"{run.start.folder}/checkpoint.pt"
            copy = f"mkdir -p {run.folder} && cp {start} {run.folder} && " if start else ""
            command = f"OMP_NUM_THREADS={args.threads} {shlex.join(run.command(resume=bool(run.start)))}"
            by_hand = f"# run.py alone puts in the critics of {run.critics.folder}: " if run.critics else ""
            print(f"{by_hand}{copy}{command}")
        return 0
    ray.init(args.address, num_cpus=None if args.address else args.jobs * args.threads, log_to_driver=False)
    task = ray.remote(execute).options(
        num_cpus=args.threads, num_gpus=args.gpus, max_retries=args.retries, retry_exceptions=True
    )
    pending, references, failures = {}, {}, {}
    for run in runs:  # Ray starts a task when those it waits for have ended
        before = [references[other] for other in (run.start, run.critics) if other]
        references[run] = task.remote(run, args.threads, *before)
        pending[references[run]] = run
    progress = tqdm(total=len(runs), unit=" runs", mininterval=1)
    while pending:
        ended, _ = ray.wait(list(pending), timeout=5)
        for reference in ended:
            run = pending.pop(reference)
            try:
                ray.get(reference)
                if run.csv:
                    gather(run, args.grid)
            except Exception as error:  # the others go on
                failures[run.name] = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            progress.update()
        progress.set_postfix(failed=len(failures), refresh=True)
    progress.close()
    ray.shutdown()
    print(f"{len(runs)} runs, {len(failures)} failed", *(f"{k}: {v}" for k, v in failures.items()), sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="the grid file")
    parser.add_argument("--out", type=Path, default=Path("runs/grids"), help="folder of the run directories")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once on this machine")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a run, 0.25 for four on one")
    parser.add_argument("--retries", type=int, default=2, help="how often a run that failed is tried again")
    parser.add_argument("--address", help="a running Ray cluster; by default Ray is started here")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    try:
        sys.exit(main(parser.parse_args()))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
