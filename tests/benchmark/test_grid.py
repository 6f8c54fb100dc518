"""studies/run.py: a small grid goes through Ray; studies/analyse.py: its measures."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.tensorboard import SummaryWriter

pytest.importorskip("ray", reason="ray is not installed: pip install -r benchmark/requirements.txt")
sys.path.insert(0, str(ROOT / "benchmark" / "studies"))
import analyse
import run

GRID = """
title = "A small grid"
baseline = "plain"
scripts = ["td3bc_sera"]
envs = ["hopper-medium-mini"]
seeds = [1, 2]
options = "{}--offline-steps 6 --online-steps 12 --eval-every 6 --eval-episodes 1 --batch-size 8"

[script_options]
td3bc_sera = "--sera-k 2 --device cpu"

[critics]
few = "--offline-steps 2"

[variants]
plain = "--sera-coef 0"
sera = "--sera-scale dim"
"""
BROKEN = """
broken = { options = "--sera-critic random --sera-bonus nonsense", critics = "few" }
"""


def grid_file(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "grid.toml").write_text(text.replace("{}", ""))
    return folder / "grid.toml"


def start(grid: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    script = ROOT / "benchmark" / "studies" / "run.py"
    command = [sys.executable, str(script), str(grid), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def mps_log(tmp_path, monkeypatch):
    """A program in the place of NVIDIA's, and the file in which it notes its calls."""
    log = tmp_path / "mps_log"
    program = tmp_path / "bin" / run.MPS
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        'words="$*"\n'
        '[ "$words" ] || read words\n'
        '[ -d "$CUDA_MPS_LOG_DIRECTORY" ] || words="no folder"\n'
        f'echo "$words $CUDA_MPS_PIPE_DIRECTORY $CUDA_VISIBLE_DEVICES" >> {log}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    return log


def started_and_quit_once(log: Path) -> bool:
    """Whether the calls are a start and a quit, both of one MPS, whose folder is gone."""
    (first, folder), (last, same, _) = (line.split() for line in log.read_text().splitlines())
    return (first, last) == ("-d", "quit") and folder == same and not Path(folder).exists()


def test_grid(tmp_path, mps_log, monkeypatch, capsys):
    """Two variants, and one that fails: what is run, gathered, shared, skipped.

    One seed, as each of the six processes takes its seconds.
    """
    text = GRID.replace("[1, 2]", "[1]")
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')  # Ray takes it for granted
    grid = grid_file(tmp_path / "study", text + BROKEN)
    done = start(grid, tmp_path / "out", "--retries", "1", "--gpus", "0.5")
    assert done.returncode == 1, done.stderr
    assert started_and_quit_once(mps_log)
    count, failure = done.stdout.strip().splitlines()[-2:]  # Ray has its say before
    assert count == "5 runs, 1 failed"
    assert all(words in failure for words in ("broken", "exit code 2", "nonsense"))
    (log,) = [
        path / "log.txt"
        for path in (tmp_path / "out").iterdir()
        if not (path / "finished").exists()
    ]
    assert log.read_text().count("invalid choice 'nonsense'") == 2  # it was tried again
    names = {f"td3bc_sera__hopper-medium-mini__{variant}__1" for variant in ("plain", "sera")}
    assert {path.stem for path in (tmp_path / "study" / "runs").iterdir()} == names
    commands = json.loads((tmp_path / "study" / "commands.json").read_text())
    assert commands.keys() == names
    made_with = json.loads((tmp_path / "study" / "made_with.json").read_text())
    assert made_with.keys() == names
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    offline = sum("offline" in name for name in folders)
    assert offline == 2 and len(folders) == 5  # of the study, and of few

    # A run that shares its offline phase is the one that a single process gives.
    words = commands["td3bc_sera__hopper-medium-mini__sera__1"].split()
    assert words[0] == "td3bc_sera.py"
    importlib.import_module("td3bc_sera").main([*words[1:], "--run-dir", str(tmp_path / "whole")])
    watched = (tmp_path / "study" / "watched.csv").read_text().splitlines()
    assert watched[0] == "run,metric,value" and len(watched) == 1 + 2 + 5
    assert watched[1].startswith("td3bc_sera__hopper-medium-mini__plain__1,losses/q_data,")
    gathered = tmp_path / "study" / "runs" / "td3bc_sera__hopper-medium-mini__sera__1.csv"
    assert gathered.read_bytes() == (tmp_path / "whole" / "evals.csv").read_bytes()

    # Without the broken variant all is there, even where the folders of the runs are gone; a lost
    # CSV is not.
    grid.write_text(text.replace("{}", ""))
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    again = [str(grid), "--out", str(tmp_path / "out")]
    assert run.main(again) == 0
    assert capsys.readouterr().out == "0 runs, 0 failed\n"
    gathered.unlink()
    assert run.main([*again, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "--online-steps 0" in lines[0] and "--seed 1" in lines[0]
    assert lines[1].startswith("mkdir -p") and lines[1].endswith("--resume")
    assert "td3bc_sera.py --threads 1 --" in lines[1]
    assert "--sera-scale dim" in lines[1]

    # Other options under the same names are no reason to skip.
    grid.write_text(text.replace("{}", "--gamma 0.9 "))
    assert run.main(again) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "other options" in error


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("scripts", "script", "scripts"),
        ("td3bc_sera", "td9_sera", "td9_sera.py"),
        ("[1, 2]", "[]", "seeds"),
        ("--online-steps 12", "", "--online-steps"),
        (
            '"--sera-scale dim"',
            '{ options = "--sera-k 3", critics = "few" }',
            "--sera-critic random",
        ),
        ('"--sera-scale dim"', '{ option = "--sera-k 3" }', "sera has option: give options"),
        ("[1, 2]", "[1, 1]", "plain__1 are the same run"),
        ('"--sera-scale dim"', '"--sera-coef 0"', "__plain__1 and .*__sera__1 are the same run"),
    ],
)
def test_bad_grid(old, new, part, tmp_path):
    """What a grid lacks is named."""
    with pytest.raises(ValueError, match=part):
        run.plan(grid_file(tmp_path / "study", GRID.replace(old, new)), tmp_path)


def test_variants_with_offline_phases_of_their_own(tmp_path):
    """A variant that changes the offline phase starts anew; equal runs share a folder."""
    text = GRID.replace('"--sera-coef 0"', '"--gamma 0.9"')
    runs = run.plan(grid_file(tmp_path / "a", text), tmp_path)
    plain = [item for item in runs if "__plain__" in item.name]
    assert all(item.start is None and "--gamma 0.9" in item.options for item in plain)
    others = run.plan(grid_file(tmp_path / "b", GRID), tmp_path)
    shared = {item.folder for item in runs} & {item.folder for item in others}
    assert len(shared) == 4  # two offline phases and the two runs of sera
    assert len({item.folder for item in others}) == len(others) == 6


def test_variants_of_the_online_phase_share_the_offline_one(tmp_path):
    """Also those of --online-sampling; and IQL's is that of a run with an online phase."""
    text = GRID.replace('"--sera-coef 0"', '"--online-sampling append --mixing-ratio=0.2"')
    text = text.replace("td3bc_sera", "iql_sera")
    runs = run.plan(grid_file(tmp_path / "a", text), tmp_path)
    offline = [item for item in runs if not item.csv]
    assert len(offline) == 2 and len(runs) == 6
    assert all(item.start in offline for item in runs if item.csv)
    iql = importlib.import_module("iql_sera")
    for item in offline:
        args = iql.parse_args(item.command()[2:])
        assert (args.online_steps, args.actor_lr_schedule) == (0, "constant")


@pytest.mark.parametrize(
    "old, new",
    [
        ("--offline-steps 6", "--offline-steps 0 --mixing-ratio 0"),
        ("--online-steps 12", "--online-steps 0"),
    ],
)
def test_runs_of_one_phase_share_nothing(old, new, tmp_path):
    """Where a phase is missing there is nothing to start from: each variant is one run."""
    runs = run.plan(grid_file(tmp_path / "study", GRID.replace(old, new)), tmp_path)
    assert [each.start for each in runs] == [None] * 4
    assert all(new in each.options for each in runs)
    assert len({each.folder for each in runs}) == 4


def test_another_bonus(tmp_path):
    """Such a variant starts through other_bonuses.py, from the same offline phase as the others."""
    text = GRID.replace('"--sera-scale dim"', '{ bonus = "rnd", options = "--sera-coef 0.5" }')
    runs = run.plan(grid_file(tmp_path / "a", text), tmp_path)
    rnd = next(each for each in runs if "__sera__" in each.name)
    plain = next(each for each in runs if "__plain__" in each.name)
    program, bonus, script, *_ = rnd.command()[1:]
    names = Path(program).name, bonus, Path(script).name
    assert names == ("other_bonuses.py", "rnd", "td3bc_sera.py")
    assert Path(plain.command()[1]).name == "td3bc_sera.py"
    assert rnd.start == plain.start and rnd.folder != plain.folder
    assert run.origin(rnd).endswith("--sera-coef 0.5 (bonus: rnd)")
    assert run.origin(rnd) != run.origin(replace(rnd, bonus="counts"))


def test_watched(tmp_path):
    """Means of the last fifth of the online steps, of what is logged there; a rerun replaces it."""
    item = run.Run("b", "x_sera", "--online-steps 100", tmp_path, csv=tmp_path / "b.csv")
    with SummaryWriter(tmp_path) as writer:
        for step in range(0, 210, 10):
            writer.add_scalar("losses/q_data", step, step)
            writer.add_scalar("losses/td", step, step)
    assert run.watched(item) == {"losses/q_data": 195.0}  # of 190 and 200
    old = "run,metric,value\nb,losses/q_data,1\nc,losses/q_data,2\n"
    (tmp_path / "watched.csv").write_text(old)
    run.note_watched(item, tmp_path / "grid.toml")
    expected = "run,metric,value\nb,losses/q_data,195\nc,losses/q_data,2\n"
    assert (tmp_path / "watched.csv").read_text() == expected


def test_watched_offline(tmp_path):
    """Without an online phase it is the last fifth of the offline one."""
    options = "--offline-steps 50 --online-steps 0"
    item = run.Run("b", "x_sera", options, tmp_path, csv=tmp_path / "b.csv")
    with SummaryWriter(tmp_path) as writer:
        for step in range(5, 55, 5):
            writer.add_scalar("losses/q_data", step, step)
    assert run.watched(item) == {"losses/q_data": 47.5}  # of 45 and 50


def test_stopped_while_gathering(tmp_path, monkeypatch):
    """A run of which not all is noted yet is gathered once more, not refused."""
    grid = grid_file(tmp_path / "study", GRID)
    runs = run.plan(grid, tmp_path / "out")
    item = runs[1]
    item.folder.mkdir(parents=True)
    (item.folder / "evals.csv").write_text("the evaluations")
    monkeypatch.setattr(run, "watched", lambda item: {"losses/td": 1.0})
    monkeypatch.setattr(run, "made_with", lambda item: {"commits": "abc"})
    write_whole = run.write_whole
    for stop in range(4):
        left = iter([True] * stop + [False])

        def stopped(path, content, left=left):
            if not next(left):
                raise KeyboardInterrupt
            write_whole(path, content)

        monkeypatch.setattr(run, "write_whole", stopped)
        with pytest.raises(KeyboardInterrupt):
            run.gather(item, grid)
        assert item in run.missing_runs(runs, grid)
    monkeypatch.setattr(run, "write_whole", write_whole)
    run.gather(item, grid)
    assert item not in run.missing_runs(runs, grid)
    assert item.csv.read_text() == "the evaluations"


def test_only(tmp_path, capsys):
    """--only takes the runs with such a name and the offline phases that these start from."""
    grid = str(grid_file(tmp_path / "study", GRID))
    assert run.main([grid, "--dry-run", "--only", "__sera__2"]) == 0
    offline, online = capsys.readouterr().out.splitlines()
    assert "--seed 2" in offline and "--online-steps 0" in offline
    assert "--sera-scale dim" in online and online.startswith("mkdir")
    assert run.main([grid, "--dry-run", "--only", "iql_sera"]) == 2
    error = capsys.readouterr().err
    assert "--only iql_sera" in error and "td3bc_sera__hopper-medium-mini__sera__2" in error


def test_made_with(tmp_path, monkeypatch):
    """Every commit once, the offline phase's first; a run that goes on with another has both."""
    item = run.plan(grid_file(tmp_path / "study", GRID), tmp_path / "out")[1]
    assert item.start
    commits = iter(["one", "one", "two-dirty", "two-dirty", "unknown"])
    monkeypatch.setattr(run, "commit_of_code", lambda: next(commits))
    for part in (item.start, item, item, item, item):
        part.folder.mkdir(parents=True, exist_ok=True)
        run.note_commit(part)
    config = {"data_sha256": "12ab", "versions": {"torch": "2.13.0"}, "args": {}}
    (item.folder / "config.json").write_text(json.dumps(config))
    expected = {"commits": "one two-dirty unknown", "data_sha256": "12ab", "torch": "2.13.0"}
    assert run.made_with(item) == expected


def test_commit_of_code(tmp_path, monkeypatch):
    """Changed results leave it as it is, changed code does not."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run.commit_of_code() == "unknown"
    code, results = tmp_path / "sac_sera.py", tmp_path / "docs" / "commands.json"
    results.parent.mkdir()
    for path in (code, results):
        path.write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    results.write_text("2")
    commit = run.commit_of_code()
    assert re.fullmatch("[0-9a-f]{12}", commit)
    code.write_text("2")
    assert run.commit_of_code() == f"{commit}-dirty"


def test_missing_dataset(tmp_path, capsys, monkeypatch):
    """It is named before anything is started, by its place below the repository."""
    text = GRID.replace('options = "{}', 'options = "--dataset-path runs/none.hdf5 ')
    grid = grid_file(tmp_path / "study", text)
    monkeypatch.setattr(run, "run_all", lambda runs, args: 0)
    command = [str(grid), "--out", str(tmp_path / "out")]
    assert run.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {ROOT / 'runs' / 'none.hdf5'}, the data of td3bc_sera.py ")
    data = ROOT / "data" / "hopper-medium-mini.hdf5"
    grid.write_text(grid.read_text().replace("runs/none.hdf5", str(data.relative_to(ROOT))))
    assert run.main(command) == 0


def test_damaged_commands(tmp_path, capsys):
    """The file is named."""
    grid = grid_file(tmp_path / "study", GRID)
    (tmp_path / "study" / "commands.json").write_text('{"a": ')
    assert run.main([str(grid), "--dry-run"]) == 2
    assert f"{tmp_path / 'study' / 'commands.json'} is damaged" in capsys.readouterr().err


def test_critics_of_the_same_offline_phase(tmp_path):
    """A run that starts from a phase and has its critics too: the phase is run once."""
    text = GRID.replace('few = "--offline-steps 2"', 'own = ""')
    text += 'own = { options = "--sera-critic random", critics = "own" }\n'
    runs = run.plan(grid_file(tmp_path / "study", text), tmp_path)
    assert len({each.folder for each in runs}) == len(runs) == 2 * (1 + 3)


def test_other_critics(tmp_path):
    """A variant with critics starts from its offline phase, with others behind the bonus."""
    text = GRID + '\nfew = { options = "--sera-critic random", critics = "few" }\n'
    runs = run.plan(grid_file(tmp_path / "study", text), tmp_path)
    (item,) = [item for item in runs if item.name.endswith("__few__1")]
    script = importlib.import_module(item.script)
    for offline in item.before():
        script.main(offline.command()[2:])
    run.prepare(item)
    own, start, other = (
        script.read_checkpoint(folder / "checkpoint.pt")
        for folder in (item.folder, item.start.folder, item.critics.folder)
    )
    assert own["phase"] == "offline" and own["step"] == 6
    for name, value in own["agent"].items():
        assert value.equal(start["agent"][name])
        assert own["bonus_agent"][name].equal(other["agent"][name])
    assert not own["agent"]["critics.layers.0.weight"].equal(
        own["bonus_agent"]["critics.layers.0.weight"]
    )
    script.main(item.command()[2:])  # goes on with them


def test_threads_are_no_part_of_a_run(tmp_path):
    """--threads reaches the script, and neither the folder nor the noted options know of it."""
    for item in run.plan(grid_file(tmp_path / "study", GRID), tmp_path):
        words = item.command(threads=3)
        script = importlib.import_module(item.script)
        assert script.parse_args(words[2:]).threads == 3
        assert words[-2] == str(item.folder)
        assert "--threads" not in run.origin(item)
    gathered = ROOT / "docs" / "results" / "small" / "grid.toml"
    items = run.plan(gathered, tmp_path)
    assert run.missing_runs(items, gathered) == []  # its options are those that were noted


# ------------------------------ several runs on one GPU
@pytest.mark.parametrize("end", ["all went well", "failure", *run.INTERRUPTIONS])
def test_mps_ends_with_the_runner(end, mps_log):
    """Started once and quit once, however the runs end; nothing of it stays."""
    before = dict(os.environ)
    handlers = [signal.getsignal(number) for number in run.INTERRUPTIONS]
    try:
        with run.shared_gpu(run.Args(Path("grid.toml"), gpus=0.5)):
            assert Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]).is_dir()
            if end == "failure":
                raise RuntimeError(end)
            if end in run.INTERRUPTIONS:
                os.kill(os.getpid(), end)
    except RuntimeError:
        assert end == "failure"
    except SystemExit as error:
        assert error.code == 128 + end
    else:
        assert end == "all went well"
    assert started_and_quit_once(mps_log)
    assert dict(os.environ) == before
    assert [signal.getsignal(number) for number in run.INTERRUPTIONS] == handlers


@pytest.mark.parametrize(
    "options",
    [{"gpus": 0}, {"gpus": 1}, {"mps": False}, {"address": "10.0.0.1:6379"}],
    ids=["no GPU", "a whole GPU", "--no-mps", "cluster"],
)
def test_mps_is_not_started(options, mps_log):
    """Where no runs share a card, on a cluster, and where it is not wanted."""
    args = run.Args(Path("grid.toml"), **({"gpus": 0.5} | options))
    with run.shared_gpu(args):
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    assert not mps_log.exists()


def test_mps_of_somebody_else(mps_log, monkeypatch):
    """It is used, and left alone."""
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/theirs")
    with run.shared_gpu(run.Args(Path("grid.toml"), gpus=0.5)):
        assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/theirs"
    assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/theirs"
    assert not mps_log.exists()


def test_no_mps_program(monkeypatch, capsys, tmp_path):
    """One sentence says so, and the runs go on without it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    with run.shared_gpu(run.Args(Path("grid.toml"), gpus=0.5)):
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    output = capsys.readouterr().out
    assert "time slicing" in output and output.count("\n") == 1


def environments(text: str) -> list[str]:
    """The environment of each process whose command has a text in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if text in (process / "cmdline").read_text():
                found.append((process / "environ").read_text())
        except OSError:
            continue  # it has ended
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at /proc: Linux only")
def test_interrupted_grid_with_mps(mps_log, tmp_path, monkeypatch):
    """SIGTERM in the middle of a run: it had MPS, and ends with it and the runner."""
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')  # Ray takes it for granted
    text = GRID.replace("[1, 2]", "[1]").replace("--offline-steps 6", "--offline-steps 9_000_000")
    grid = grid_file(tmp_path / "study", text)
    script = ROOT / "benchmark" / "studies" / "run.py"
    command = [sys.executable, str(script), str(grid), "--out", str(tmp_path / "out")]
    running = str(run.plan(grid, tmp_path / "out")[0].folder)
    runner = subprocess.Popen([*command, "--gpus", "0.5"])
    deadline = time.monotonic() + 120
    try:
        while not environments(running):
            assert runner.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        pipe = mps_log.read_text().split()[1]
        assert f"CUDA_MPS_PIPE_DIRECTORY={pipe}" in environments(running)[0]
        runner.terminate()
        assert runner.wait(timeout=60) > 0  # below 0: it was killed on its way out
    finally:
        runner.kill()
    assert started_and_quit_once(mps_log)
    deadline = time.monotonic() + 60
    while environments(running):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_no_such_gpu(tmp_path, monkeypatch, capsys):
    """An error where Ray would wait for ever."""
    monkeypatch.setattr(run.ray, "init", lambda *arguments, **options: None)
    monkeypatch.setattr(run.ray, "cluster_resources", lambda: {"CPU": 2.0})
    grid = grid_file(tmp_path / "study", GRID)
    assert run.main([str(grid), "--gpus", "0.5", "--no-mps"]) == 2
    assert capsys.readouterr().err.startswith("error: --gpus 0.5: ")


# ------------------------------ measures
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_entropy(dimension):
    """Of a normal distribution: d/2 log(2 pi e); of duplicates: low, not minus infinity."""
    points = np.random.default_rng(0).normal(size=(4000, dimension))
    assert analyse.knn_entropy(points) == pytest.approx(
        dimension / 2 * np.log(2 * np.pi * np.e), abs=0.08
    )
    assert np.isfinite(analyse.knn_entropy(np.ones((10, dimension))))


def test_cells():
    """Uniform points on the plane of the data are nearly uniform, one point is log 900 away."""
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.normal(size=(4, 4)))[0][:2] * [[5], [2]]
    cells = analyse.Cells(rng.uniform(-1, 1, size=(100_000, 2)) @ plane + 7)
    points = rng.uniform(-0.98, 0.98, size=(100_000, 2)) @ plane + 7
    assert 0 < cells.kl_to_uniform(points) < 0.05
    assert cells.kl_to_uniform(points[:1]) == pytest.approx(np.log(900))


def test_discounted_returns():
    """1 + 0.5 * (2 + 0.5 * 4) = 3, from the front."""
    assert analyse.discounted_returns([1, 2, 4], 0.5) == [3, 4, 4]


class StubAgent:
    """Acts as its state says, with Q of 10 and 4 times that state."""

    def load_state_dict(self, state):
        assert state == {"actor": 1}, "networks that are not the script's own"

    def act(self, states, deterministic):
        assert deterministic
        return states

    def critics(self, states, actions):
        return torch.stack([10 * states[:, 0], 4 * actions[:, 0]])


class StubEnv:
    """States 3, 5, 7 ... and rewards 1, 4, 7 ... for so many steps."""

    def __init__(self, length, terminates):
        self.length = length
        self.terminates = terminates

    def reset(self, seed):
        self.time = 0
        return np.array([3.0]), {}

    def step(self, action):
        assert action == self.time + 1  # the state (3 + 2 time - 1) / 2
        self.time += 1
        end = self.time == self.length
        state, reward = np.array([3.0 + 2 * self.time]), 3.0 * self.time - 2
        return state, reward, end and self.terminates, end and not self.terminates, {}


@pytest.fixture
def player():
    """Trained on 2 r - 1, gamma 0.5, states 3, 5 ... as 1, 2 ..."""
    script = SimpleNamespace(
        find_task=lambda env: SimpleNamespace(observation_dim=1, action_dim=1),
        Agent=lambda observation_dim, action_dim, args: StubAgent(),
    )
    args = SimpleNamespace(env="x", gamma=0.5, reward_bias=-1.0)
    normalizer = {"mean": torch.tensor([1.0]), "std": torch.tensor([2.0])}
    checkpoint = {"agent": {"actor": 1, "novelty.target": 2}, "normalizer": normalizer}
    return analyse.Player(script, args, checkpoint, reward_scale=2.0)


def test_value_bias_by_hand(player):
    """Q of 4 and 8 over the scale; returns of 1 - 1/2 and 4 - 1/2: 3.5 and 0.5 + 3.5 / 2."""
    assert analyse.value_bias(player, StubEnv(2, terminates=True), 2) == (3.0, (3.5 + 2.25) / 2)


def test_cut_returns(player):
    """Of an episode that ran into the time limit the last 300 steps do not count."""
    q_value, _ = analyse.value_bias(player, StubEnv(302, terminates=False), 1)
    assert q_value == (2 + 4) / 2
    assert analyse.value_bias(player, StubEnv(300, terminates=False), 1) is None


def test_visited_states():
    """Those of the online rows, before they were normalised."""
    normalizer = {"mean": torch.tensor([1.0, 0.0]), "std": torch.tensor([2.0, 1.0])}
    checkpoint = {"normalizer": normalizer, "online_rows": torch.tensor([[9.0, 1, 2], [9, 3, 4]])}
    # With another bonus a run's rows have no q at their end, as the plain script's table has.
    buffer = SimpleNamespace(columns={"observations": slice(1, 3), "bonus_q": 3})
    assert analyse.visited_states(checkpoint, buffer).tolist() == [[3, 2], [7, 4]]


def test_bad_input(tmp_path, capsys):
    """One sentence and exit code 2: no grid file, no finished run, no such option."""
    assert run.main([str(tmp_path / "grid.toml"), "--dry-run"]) == 2
    assert "grid.toml" in capsys.readouterr().err
    grid = grid_file(tmp_path / "study", GRID)
    assert analyse.main([str(grid), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no finished run of {grid}") and error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        run.main([str(grid), "--no-such-option"])


def test_analyse(tmp_path):
    """Its two tables from the checkpoints of a grid's runs."""
    grid = grid_file(tmp_path / "study", GRID)
    (item,) = [run for run in run.plan(grid, tmp_path) if run.name.endswith("__sera__1")]
    script = importlib.import_module("td3bc_sera")
    script.main(
        [
            *GRID.split('"{}')[1].split('"')[0].split(),
            "--sera-k",
            "2",
            "--run-dir",
            str(item.folder),
        ]
        + ["--env", "hopper-medium-mini"]
    )
    (item.folder / "finished").touch()
    options = ["--out", str(tmp_path), "--episodes", "1", "--points", "2"]
    assert analyse.main([str(grid), *options]) == 0
    coverage, bias = (
        (tmp_path / "study" / f"{name}.csv").read_text().splitlines()
        for name in ("coverage", "bias")
    )
    assert coverage[0].endswith("step,entropy,kl_to_uniform") and len(coverage) == 3
    assert coverage[2].split(",")[:5] == ["td3bc_sera", "hopper-medium-mini", "sera", "1", "12"]
    assert len(bias) == 2
