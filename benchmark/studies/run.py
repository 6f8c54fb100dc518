"""Runs a grid of experiments, scripts x environments x variants x seeds, here or on a Ray cluster.

    python benchmark/studies/run.py docs/results/small/grid.toml [--out runs/grids] [--jobs 2]

A grid is a TOML file: scripts, envs, seeds, options for all of them, [variants] with the options
of each, and if need be [script_options], [env_options] and [critics] (below). Each run is the
script itself as a process. Where variants differ only in what the online phase alone asks for
(OFFLINE_RESUME_MAY_CHANGE in the scripts) they share one offline phase per script, environment and
seed: its checkpoint is copied and resumed, which gives the very run that one process would give. A
folder of --out is named by the options of its run, so that grids share what they have in common.
Finished runs are skipped, also if only their CSV is left; killed ones are resumed from their
checkpoint, failed ones tried again and reported at the end. evals.csv of each finished run is
gathered in runs/ beside the grid file, with the options that made it in commands.json, commit, data
and versions in made_with.json, and what it logged at the end in watched.csv. --dry-run prints all
commands, in an order in which they can be run, and --only iql_sera chooses runs by their names,
script__environment__variant__seed.

A run takes the code as it is when the run starts: let a grid that takes hours run in a clone of its
own. Two runners at once need an --out each.

Each run gets --threads CPU threads, one by default. On a cluster, --address names it (`ray start`
on every machine) and --out is a folder that all machines share.

One run leaves most of a GPU idle. Sixteen at once on one card:

    python benchmark/studies/run.py GRID.toml --jobs 16 --gpus 0.06

where --gpus is the share of a run, rounded down so that all of them fit. For such shares, on this
machine, the runner starts NVIDIA's MPS, which lets the runs compute side by side, and stops it at
the end, also after Ctrl-C. It uses an MPS that is there already, if CUDA_MPS_PIPE_DIRECTORY names
it, and leaves it alone. Without the program nvidia-cuda-mps-control, or with --no-mps, the runs
take turns on the card. Two things to know: under MPS a run that fails on the GPU may take its
neighbours with it (all are tried again), and where MPS starts but does not work, as in some
containers, CUDA finds no card: a log.txt then says cpu, and --no-mps helps. Should the runner be
killed with SIGKILL, MPS stays: `CUDA_MPS_PIPE_DIRECTORY=/tmp/mps-.../pipe nvidia-cuda-mps-control`
and then `quit` ends it.

A variant may be a table, {options = "...", bonus = "rnd"}: benchmark/other_bonuses.py then puts
that bonus into the script.

[critics] is for studies of the bonus's critics: name = options of an offline run, say few =
"--offline-steps 1000" or other = "--seed 101"; a variant given as {options = "...", critics =
"few"} gets the networks of that run behind its bonus. It has to say --sera-critic random, which
leaves them as they come. --dry-run only names such a run: a plain command does not put them there.
"""

import csv
import ctypes
import hashlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import ray
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Args:
    """Run a grid of experiments, on this machine or on a Ray cluster."""

    grid: tyro.conf.Positional[Path]
    """the grid file"""
    out: Path = Path("runs/grids")
    """folder of the run directories"""
    jobs: int = 2
    """runs at once on this machine"""
    threads: int = 1
    """CPU threads of a run"""
    gpus: float = 0.0
    """GPUs of a run, 0.25 for four on one"""
    mps: bool = True
    """NVIDIA's MPS for runs that share a GPU of this machine"""
    retries: int = 2
    """how often a run that failed is tried again"""
    address: str | None = None
    """a running Ray cluster; by default Ray is started here"""
    only: str = ""
    """only runs with this in script__environment__variant__seed: td3bc_sera, __plain__"""
    dry_run: bool = False
    """print the commands, run nothing"""


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
    bonus: str = ""  # one of other_bonuses.py

    def command(self, threads: int = 1) -> list[str]:
        """The words of the command; --resume starts a run where there is none yet.

        The threads are no part of the options, and so not of the name of the folder either.
        """
        program = [str(ROOT / f"{self.script}.py"), "--threads", str(threads)]
        if self.bonus:
            program = [str(ROOT / "benchmark" / "other_bonuses.py"), self.bonus, *program]
        options = shlex.split(self.options)
        return [sys.executable, *program, *options, "--run-dir", str(self.folder), "--resume"]

    def before(self) -> list["Run"]:
        """The runs that have to end before this one can start."""
        return [run for run in (self.start, self.critics) if run]


def load_script(name: str) -> ModuleType:
    """A script as a module. A Ray worker comes here past the top of this file: hence the path."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


# ------------------------------ from the grid to its runs
def read_grid(path: Path) -> dict:
    """grid.toml, with what every grid needs. ValueError for a bad one."""
    try:
        grid = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for key in ("scripts", "envs", "seeds", "options", "variants"):
        if not grid.get(key):
            raise ValueError(f"{path} has no {key}")
    for script in grid["scripts"]:
        if not (ROOT / f"{script}.py").is_file():
            raise ValueError(f"{path}: there is no script {script}.py")
    if value_of("--online-steps", grid["options"]) is None:
        raise ValueError(f"{path}: options name no --online-steps")
    for name, given in grid["variants"].items():
        if isinstance(given, dict):
            check_table(path, grid, name)
        else:
            grid["variants"][name] = {"options": given}
    return grid


def check_table(path: Path, grid: dict, name: str) -> None:
    """ValueError unless a variant with another bonus or other critics says what it needs."""
    given = grid["variants"][name]
    own = given.setdefault("options", "")
    unknown = given.keys() - {"options", "bonus", "critics"}
    if unknown:
        raise ValueError(f"{path}: {name} has {min(unknown)}: give options, bonus or critics")
    if "critics" not in given:
        return
    if given["critics"] not in grid.get("critics", {}):
        raise ValueError(f"{path}: the critics of {name} are not in [critics]")
    if "--sera-critic random" not in own or not only_the_bonus(own):
        raise ValueError(f"{path}: {name} needs --sera-critic random, and only --sera-*")


# A shared offline phase has --online-steps 0, but other runs go on from it: what a script does only
# in a run that ends there has to be switched off.
WITH_ONLINE_PHASE = {"iql_sera": "--actor-lr-schedule constant"}


def names_of(options: str) -> set[str]:
    """The arguments that options set."""
    flags = [word for word in shlex.split(options) if word.startswith("--")]
    return {flag.removeprefix("--").partition("=")[0].replace("-", "_") for flag in flags}


def value_of(flag: str, options: str) -> str | None:
    """What options give for a flag, the last time they do."""
    values = [value for word, value in pairwise(shlex.split(options)) if word == flag]
    return values[-1] if values else None


def only_online(script: str, options: str) -> bool:
    """Whether options leave a script's offline phase alone."""
    return names_of(options) <= load_script(script).OFFLINE_RESUME_MAY_CHANGE


def only_the_bonus(options: str) -> bool:
    """Whether options change nothing but the bonus."""
    return all(name.startswith("sera_") for name in names_of(options))


def common_options(grid: dict, script: str, env: str, seed: int) -> str:
    """What the variants of a script, an environment and a seed have in common."""
    parts = [
        f"--env {env}",
        grid["options"],
        grid.get("script_options", {}).get(script),
        grid.get("env_options", {}).get(env),
        f"--seed {seed}",
    ]
    return " ".join(part for part in parts if part)


def offline_run(script: str, options: str, out: Path) -> Run:
    """An offline phase; grids that ask for the same one share its folder."""
    words = shlex.split(options)
    place = words.index("--online-steps")
    words = [*words[:place], *words[place + 2 :], "--online-steps", "0"]
    more = shlex.split(WITH_ONLINE_PHASE.get(script, ""))
    if more and more[0] not in words:
        words = [*more, *words]
    run = Run("", script, shlex.join(words), out)
    return replace(run, name=origin(run), folder=out / f"{script}__offline__{digest(run)}")


def variant_run(grid_file: Path, grid: dict, key: tuple[str, str, str, int], out: Path) -> Run:
    """The run of a script, an environment, a variant and a seed, with what it starts from."""
    script, env, variant, seed = key
    name = "__".join(map(str, key))
    csv = grid_file.resolve().parent / "runs" / f"{name}.csv"
    given = grid["variants"][variant]
    common = common_options(grid, script, env, seed)
    own = given["options"]
    run = Run(name, script, f"{common} {own}", out, csv=csv)
    steps = value_of("--online-steps", common)
    both_phases = "0" not in (value_of("--offline-steps", common), steps)
    if both_phases and only_online(script, own):
        start = offline_run(script, common, out)
        run = replace(run, options=f"--online-steps {steps} {own}", start=start)
    run = replace(run, bonus=given.get("bonus", ""))
    if "critics" in given:
        other = grid["critics"][given["critics"]]
        run = replace(run, critics=offline_run(script, f"{common} {other}", out))
    return replace(run, folder=out / f"{script}__{env}__{seed}__{digest(run)}")


def origin(run: Run) -> str:
    """The options behind a run, its offline phase's first: what is the same is the same run."""
    words = [f"{run.script}.py"]
    if run.start:
        words.append(run.start.options.removesuffix(" --online-steps 0"))
    words.append(run.options)
    if run.bonus:
        words.append(f"(bonus: {run.bonus})")
    if run.critics:
        words.append(f"(bonus: {run.critics.options})")
    return " ".join(" ".join(words).split())


def digest(run: Run) -> str:
    """Eight letters that stand for the options behind a run."""
    return hashlib.sha256(origin(run).encode()).hexdigest()[:8]


def plan(grid_file: Path, out: Path) -> list[Run]:
    """All runs of a grid, offline phases before those that start from them. ValueError if bad."""
    grid = read_grid(grid_file)
    runs = {}  # by folder
    for script in grid["scripts"]:
        for env in grid["envs"]:
            for seed in grid["seeds"]:
                for variant in grid["variants"]:
                    run = variant_run(grid_file, grid, (script, env, variant, seed), out)
                    for other in run.before():
                        runs.setdefault(other.folder, other)
                    if run.folder in runs:
                        same = f"{runs[run.folder].name} and {run.name} are the same run"
                        raise ValueError(f"{grid_file}: {same}: leave one out")
                    runs[run.folder] = run
    return list(runs.values())


def check_datasets(runs: list[Run]) -> None:
    """ValueError where a run's --dataset-path is no file: hours later would be too late."""
    for run in runs:
        option = value_of("--dataset-path", run.options)
        if option is None:
            continue
        path = ROOT / Path(option).expanduser()
        if not path.is_file():
            fix = "put it there, or leave --dataset-path out of the grid to fetch D4RL's own file"
            raise ValueError(f"{path}, the data of {run.name}, is not there: {fix}")


# ------------------------------ one run
def prepare(run: Run) -> None:
    """Give a run the checkpoint that it starts from; never over one of its own."""
    checkpoint = run.folder / "checkpoint.pt"
    run.folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists() or not run.start:
        return
    part = checkpoint.with_suffix(".part")
    if run.critics:
        part.write_bytes(with_other_critics(run))
    else:
        shutil.copy(run.start.folder / "checkpoint.pt", part)
    os.replace(part, checkpoint)


def with_other_critics(run: Run) -> bytes:
    """The checkpoint that a run starts from, with the networks of another run behind its bonus."""
    script = load_script(run.script)
    saved = script.read_checkpoint(run.start.folder / "checkpoint.pt")
    other = script.read_checkpoint(run.critics.folder / "checkpoint.pt")
    saved["bonus_agent"] = other["agent"]
    data = io.BytesIO()
    torch.save(saved, data)
    body = data.getvalue()
    return body + hashlib.sha256(body).digest()  # the seal that a checkpoint ends in


def die_with_parent() -> None:
    """For Linux: a run ends with its worker, or it would go on beside its own successor."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def execute(run: Run, threads: int, *before: str) -> str:
    """Run one process to its end and return its name. before: what it waits for. RuntimeError."""
    if (run.folder / "finished").exists():
        return run.name
    prepare(run)
    note_commit(run)
    log = run.folder / "log.txt"
    with open(log, "ab") as file:
        done = subprocess.run(
            run.command(threads),
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=file,
            stderr=file,
            preexec_fn=die_with_parent,
        )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}, {log}: {last_words(log)}")
    (run.folder / "finished").touch()
    return run.name


def note_commit(run: Run) -> None:
    """Put the commit that a run starts or goes on with into its folder, below earlier ones."""
    commit = commit_of_code()
    commits = commits_of(run)
    if commit not in commits:
        (run.folder / "commits.txt").write_text("\n".join([*commits, commit]) + "\n")


def commit_of_code() -> str:
    """The commit of the repository, with -dirty if Python files differ from it; or unknown.

    Results may differ: a grid gathers its own into files that git knows.
    """
    git = ["git", "-C", str(ROOT)]
    describe = [*git, "describe", "--always", "--abbrev=12"]
    described = subprocess.run(describe, capture_output=True, text=True, check=False)
    commit = described.stdout.strip()
    if not commit:
        return "unknown"  # not in a repository
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], check=False)
    return f"{commit}-dirty" if changed.returncode else commit


def commits_of(run: Run) -> list[str]:
    """The commits that a run was made with, in order; more than one if it went on with another."""
    path = run.folder / "commits.txt"
    return path.read_text().split() if path.exists() else []


def last_words(log: Path) -> str:
    """The end of a log in one line, without the frames and bars that are drawn in it."""
    end = log.read_text(errors="replace")[-1500:]
    plain = re.sub(r"[\u2500-\u259f]+", " ", end)
    return " ".join(plain.split())[-300:]


# ------------------------------ beside the grid file
def read_notes(path: Path) -> dict:
    """A JSON file beside the grid, by name of run; empty where there is none."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): take it from git again") from None


def note(path: Path, run: Run, value: object) -> None:
    """Write a run's value into such a file."""
    notes = read_notes(path)
    notes[run.name] = value
    text = json.dumps(dict(sorted(notes.items())), indent=1)
    write_whole(path, f"{text}\n".encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, wherever the runner is stopped."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


# Of what TensorBoard has, where a script logs it.
WATCHED = (
    "sera/bonus_mean",
    "sera/bonus_data",
    "sera/bonus_online",
    "losses/q_data",
    "losses/q_weight",
    "losses/calibrated_share",
)
WATCHED_COLUMNS = ["run", "metric", "value"]


def watched(run: Run) -> dict[str, float]:
    """Means of numbers that a run logged in the last fifth of its last phase."""
    events = EventAccumulator(str(run.folder), {"scalars": 0})  # 0: all of them
    events.Reload()
    steps = int(value_of("--online-steps", run.options))
    if steps == 0:
        steps = int(value_of("--offline-steps", run.options))
    means = {}
    for metric in sorted({*WATCHED} & {*events.Tags()["scalars"]}):
        logged = events.Scalars(metric)
        first = logged[-1].step - steps / 5
        values = [point.value for point in logged if point.step > first]
        means[metric] = sum(values) / len(values)
    return means


def note_watched(run: Run, grid_file: Path) -> None:
    """Put what was logged at the end of a run into watched.csv, in place of what stood there."""
    path = grid_file.parent / "watched.csv"
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = [row for row in csv.reader(file) if row[0] != run.name][1:]
    rows += [[run.name, metric, f"{value:.6g}"] for metric, value in watched(run).items()]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([WATCHED_COLUMNS, *sorted(rows)])
    write_whole(path, text.getvalue().encode())


def made_with(run: Run) -> dict[str, str]:
    """Commits, of the offline phase first, the dataset's SHA-256, and versions."""
    config = json.loads((run.folder / "config.json").read_text())
    commits = []
    for part in (*run.before(), run):
        commits += commits_of(part)
    each_once = " ".join(dict.fromkeys(commits))
    notes = {"commits": each_once, "data_sha256": str(config["data_sha256"])}
    return notes | config["versions"]


def gather(run: Run, grid_file: Path) -> None:
    """Copy the evaluations of a finished run beside the grid, and note what made them.

    The copy comes last: a run counts as gathered once it is there.
    """
    note_watched(run, grid_file)
    note(grid_file.parent / "commands.json", run, origin(run))
    note(grid_file.parent / "made_with.json", run, made_with(run))
    run.csv.parent.mkdir(exist_ok=True)
    write_whole(run.csv, (run.folder / "evals.csv").read_bytes())


def missing_runs(runs: list[Run], grid_file: Path) -> list[Run]:
    """The runs without a CSV, and those they start from. ValueError if a CSV has other options."""
    known = read_notes(grid_file.parent / "commands.json")
    missing = []
    for run in runs:
        if run.csv and not run.csv.exists():
            missing.append(run)
        elif run.csv and known.get(run.name) != origin(run):
            made_by = f"was made by other options: {known.get(run.name)}"
            raise ValueError(f"{run.csv} {made_by}; move it away first")
    return with_starts(runs, missing)


def with_name(runs: list[Run], text: str) -> list[Run]:
    """The runs whose names contain the text, and those they start from. ValueError if none does."""
    chosen = [run for run in runs if run.csv and text in run.name]
    if not chosen:
        raise ValueError(f"--only {text}: no run has that in its name; one is {runs[-1].name}")
    return with_starts(runs, chosen)


def with_starts(runs: list[Run], chosen: list[Run]) -> list[Run]:
    """The chosen ones of the runs and those they start from, in the order of the plan."""
    wanted = set()
    for run in chosen:
        wanted |= {run, *run.before()}
    return [run for run in runs if run in wanted]


# ------------------------------ several runs on one GPU
MPS = "nvidia-cuda-mps-control"
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def needs_mps(args: Args) -> bool:
    """Whether to start MPS: runs of this machine share a GPU, and nobody has started one."""
    if not args.mps or args.address or not 0 < args.gpus < 1:
        return False
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        return False
    if not shutil.which(MPS):
        print(f"{MPS} is not on PATH: runs share the card by time slicing")
        return False
    return True


def leave(number: int, frame: object) -> None:
    """For a signal: end the runner, but through its finally."""
    sys.exit(128 + number)


@contextmanager
def shared_gpu(args: Args) -> Iterator[None]:
    """MPS from here to the end, whatever the end is, for the processes that are started inside."""
    if not needs_mps(args):
        yield
        return
    handlers = {number: signal.getsignal(number) for number in INTERRUPTIONS}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, leave)
    with tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True) as folder:
        places = {}
        for name in ("pipe", "log"):
            places[f"CUDA_MPS_{name.upper()}_DIRECTORY"] = f"{folder}/{name}"
            os.mkdir(f"{folder}/{name}")
        os.environ.update(places)
        environment = dict(os.environ)
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # MPS would renumber the cards of the runs
        try:
            started = subprocess.run([MPS, "-d"], env=environment, start_new_session=True)
            if started.returncode:
                print(f"{MPS} did not start: runs share the card by time slicing")
            yield
        finally:
            for number in handlers:
                signal.signal(number, signal.SIG_IGN)  # nobody is hurried out of this
            subprocess.run([MPS], input="quit\n", text=True, timeout=60)
            for name in places:
                del os.environ[name]
            for number, handler in handlers.items():
                signal.signal(number, handler)


# ------------------------------ all runs
def print_commands(runs: list[Run], threads: int) -> None:
    """What would be run, a line for each run."""
    for run in runs:
        line = f"OMP_NUM_THREADS={threads} {shlex.join(run.command(threads))}"
        if run.start:
            checkpoint = run.start.folder / "checkpoint.pt"
            line = f"mkdir -p {run.folder} && cp {checkpoint} {run.folder} && {line}"
        if run.critics:
            line = f"# run.py alone puts in the critics of {run.critics.folder}: {line}"
        print(line)


def start_all(runs: list[Run], args: Args) -> dict:
    """Hand all runs to Ray, which starts each when those it waits for have ended: by reference."""
    task = ray.remote(execute).options(
        num_cpus=args.threads,
        num_gpus=args.gpus,
        max_retries=args.retries,
        retry_exceptions=True,
    )
    references = {}
    for run in runs:
        before = [references[other] for other in run.before()]
        references[run] = task.remote(run, args.threads, *before)
    return {reference: run for run, reference in references.items()}


def wait_for_all(pending: dict, grid_file: Path) -> dict[str, str]:
    """Gather what finishes; the runs that failed, with the reason."""
    failures = {}
    progress = tqdm(total=len(pending), unit=" runs", mininterval=1)
    while pending:
        ended, _ = ray.wait(list(pending), timeout=5)
        for reference in ended:
            run = pending.pop(reference)
            try:
                ray.get(reference)
                if run.csv:
                    gather(run, grid_file)
            except Exception as error:  # whatever a worker may raise; the other runs go on
                cause = getattr(error, "cause", None) or error
                failures[run.name] = str(cause).strip().splitlines()[-1]
            progress.update()
        progress.set_postfix(failed=len(failures), refresh=True)
    progress.close()
    return failures


def run_all(runs: list[Run], args: Args) -> int:
    """Run on Ray; 1 if a run failed."""
    if not runs:
        print("0 runs, 0 failed")
        return 0
    cpus = None if args.address else args.jobs * args.threads
    with shared_gpu(args):
        try:
            ray.init(args.address, num_cpus=cpus, log_to_driver=False)
            signal.signal(signal.SIGTERM, leave)  # Ray's own handler aborts after three seconds
            if not args.address and ray.cluster_resources().get("GPU", 0) < args.gpus:
                raise ValueError(f"--gpus {args.gpus}: Ray finds no such GPU on this machine")
            failures = wait_for_all(start_all(runs, args), args.grid)
        finally:
            ray.shutdown()  # ends the runs: MPS waits for them
    print(f"{len(runs)} runs, {len(failures)} failed")
    for name, reason in failures.items():
        print(f"{name}: {reason}")
    return 1 if failures else 0


def main(arguments: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=arguments)
    try:
        runs = plan(args.grid, args.out.resolve())
        runs = missing_runs(with_name(runs, args.only), args.grid)
        if not args.dry_run:
            check_datasets(runs)
            return run_all(runs, args)
        print_commands(runs, args.threads)
    except (ValueError, OSError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
