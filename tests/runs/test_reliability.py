"""What can go wrong in a run, and what is left of it then. Kills and exact resume are in test_resume.py."""

import importlib
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import kill_points
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

AT_CALL = """
import importlib, os, resource, signal, sys
root, name, count, action, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, root)
script, left = importlib.import_module(name), int(count)
original = script.update

def counted(*inputs):
    global left
    left -= 1
    if left == 0:
        exec(action)
    return original(*inputs)

script.update = counted
script.main()
"""


def run_and_do(
    name: str, run_dir: Path, count: int, action: str, *prefix: str
) -> subprocess.CompletedProcess:
    """A run as a program that does something to itself at an update: 60 offline ones, then 150 online."""
    inputs = [str(ROOT), name, str(count), action, *kill_points.OPTIONS.split(), "--run-dir", str(run_dir)]
    command = [*prefix, sys.executable, "-c", AT_CALL, *inputs]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def last_line(text: str) -> str:
    """What stands last on the screen; the progress bar goes back to the start of its line."""
    return text.replace("\r", "\n").strip().splitlines()[-1].strip()


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def ended(name: str, capsys, *options: str) -> str:
    """All that stands on stderr of a run that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(name).main(list(map(str, options)))
    assert caught.value.code == 2
    return capsys.readouterr().err


def refusal(name: str, capsys, *options: str) -> str:
    """The one line on stderr of a run that is refused before it trains."""
    stderr = ended(name, capsys, *options).strip()
    assert stderr.startswith("error: ") and "\n" not in stderr, stderr
    return stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run that was left alone."""
    folder = tmp_path_factory.mktemp("sac_sera") / "alone"
    kill_points.run("sac_sera", folder)
    return folder


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The folder of its offline phase alone."""
    folder = tmp_path_factory.mktemp("sac_sera") / "offline"
    kill_points.run("sac_sera", folder, "--online-steps", "0")
    return folder


# ------------------------------ signals
@pytest.mark.parametrize(("number", "count"), [("SIGTERM", 30), ("SIGINT", 130), ("SIGHUP", 110)])
def test_signals(number, count, alone, tmp_path):
    """Asked to end, a run writes a checkpoint, says how to go on, and loses nothing: offline and online."""
    done = run_and_do("sac_sera", tmp_path / "run", count, f"os.kill(os.getpid(), signal.{number})")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last_line(done.stderr) == f"{number}: go on with --run-dir {tmp_path / 'run'} --resume"
    saved = checkpoint(tmp_path / "run")
    assert (saved["phase"], saved["step"]) == ("offline", 30) if count == 30 else saved["phase"] == "online"
    assert saved["step"] >= count - 60 and not (saved["phase"] == "online" and saved["step"] == 150)
    kill_points.resume("sac_sera", tmp_path / "run")
    assert kill_points.compare(alone, tmp_path / "run") == []


def test_nohup(tmp_path):
    """A signal that the program was started to ignore stays ignored."""
    done = run_and_do("sac_sera", tmp_path / "run", 30, "os.kill(os.getpid(), signal.SIGHUP)", "nohup")
    assert done.returncode == 0 and "final score" in done.stdout


def test_signals_belong_to_the_program(tmp_path):
    """Called from other code, main leaves that code's handlers alone."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    kill_points.run("sac_sera", tmp_path / "run", "--offline-steps", "1", "--online-steps", "0")
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
    assert after == before


# ------------------------------ numbers
@pytest.mark.parametrize("what", ["a loss", "a parameter"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_not_finite(script, what, value, tmp_path, monkeypatch, capsys):
    """A run that diverges stops with step, quantity and checkpoint, and keeps the last good one."""
    original, calls = script.update, []

    def update(state, batch, args):
        logs = original(state, batch, args)
        calls.append(1)
        if len(calls) >= 40 and what == "a loss":
            return logs | {"losses/made_up": torch.tensor(float(value))}
        if len(calls) == 40:
            with torch.no_grad():
                next(state.networks["actor"].parameters()).view(-1)[0] = float(value)
        return logs

    monkeypatch.setattr(script, "update", update)
    options = [*kill_points.OPTIONS.split(), "--run-dir", tmp_path / "run"]
    message = last_line(ended(script.__name__, capsys, *options))
    assert message.startswith("error: ") and ("losses/" in message or "actor." in message)
    assert "offline step 50" in message and str(tmp_path / "run") in message
    saved = checkpoint(tmp_path / "run")
    assert saved["step"] == 25 and all(
        value.isfinite().all() for part in saved["networks"].values() for value in part.values()
    )


# ------------------------------ two runs in one folder, full disks
def test_lock(alone, tmp_path, capsys):
    """While a run is in a folder, no other goes into it; the system frees it when the run dies."""
    shutil.copytree(alone, tmp_path / "run")
    with FileLock(tmp_path / "run" / "in_use_by_a_run.lock"):
        message = refusal("sac_sera", capsys, "--run-dir", tmp_path / "run", "--resume")
        assert str(tmp_path / "run") in message and "in_use_by_a_run" in message
    (tmp_path / "new").mkdir()
    with FileLock(tmp_path / "new" / "in_use_by_a_run.lock"):
        refusal("sac_sera", capsys, *kill_points.OPTIONS.split(), "--run-dir", tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} <= {"in_use_by_a_run.lock"}
    assert kill_points.compare(alone, tmp_path / "run") == []


@pytest.mark.parametrize("count", [45, 120])
def test_disk_full(count, alone, tmp_path):
    """No room for a checkpoint: one line, and the one before it stands and goes on to the same end."""
    action = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))"
    done = run_and_do("sac_sera", tmp_path / "run", count, action)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last_line(done.stderr).startswith("error: ") and "File too large" in last_line(done.stderr)
    saved = checkpoint(tmp_path / "run")
    assert (saved["step"] if saved["phase"] == "offline" else 60 + saved["step"]) <= count
    kill_points.resume("sac_sera", tmp_path / "run")
    assert kill_points.compare(alone, tmp_path / "run") == []


def test_closed_terminal(tmp_path):
    """The terminal is gone, and with it all that a run prints: it goes on to its end."""
    terminal, side_of_the_run = pty.openpty()
    options = [*kill_points.OPTIONS.split(), "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, str(ROOT / "sac_sera.py"), *options]
    with subprocess.Popen(command, stdout=side_of_the_run, stderr=side_of_the_run) as run:
        os.close(side_of_the_run)
        assert b"hopper-medium-mini" in os.read(terminal, 1000)  # it has begun
        os.close(terminal)
        run.wait(timeout=120)
    assert (checkpoint(tmp_path / "run")["phase"], checkpoint(tmp_path / "run")["step"]) == ("online", 150)


# ------------------------------ changed arguments
@pytest.mark.parametrize(
    "option",
    ["--gamma 0.9", "--seed 2", "--batch-size 8", "--sera-coef 0", "--sera-k 4", "--env hopper-medium-v2"]
    + ["--eval-every 30", "--online-steps 149", "--normalize-rewards", "--hidden-dim 8 --tau 0.1"],
)
def test_changes_that_alter_results(option, alone, tmp_path, capsys):
    """A resumed run refuses them and names each with the value that it has; nothing is touched."""
    shutil.copytree(alone, tmp_path / "run")
    message = refusal("sac_sera", capsys, "--run-dir", tmp_path / "run", "--resume", *option.split())
    for flag in option.split()[::2]:
        value = getattr(
            importlib.import_module("sac_sera").Args(**checkpoint(alone)["args"]), flag[2:].replace("-", "_")
        )
        assert f"{flag} {value}" in message
    assert kill_points.compare(alone, tmp_path / "run") == []


def test_changes_that_do_not(alone, tmp_path):
    """More online steps, another rhythm of checkpoints, and the very same values are fine."""
    shutil.copytree(alone, tmp_path / "run")
    options = [*kill_points.OPTIONS.split(), "--run-dir", str(tmp_path / "run"), "--resume"]
    importlib.import_module("sac_sera").main([*options, "--online-steps", "170", "--checkpoint-every", "7"])
    assert checkpoint(tmp_path / "run")["step"] == 170
    assert checkpoint(tmp_path / "run")["args"]["checkpoint_every"] == 7


@pytest.mark.parametrize("critic", ["offline", "current", "random"])
def test_shared_offline_phase(script, critic, tmp_path):
    """A copy of a finished offline phase takes any --sera-*, and ends like a run that had it all along."""
    name, sera = script.__name__, ["--sera-critic", critic, "--sera-coef", "0.5", "--sera-k", "2"]
    steps = ["--offline-steps", "30", "--online-steps", "40"]
    kill_points.run(name, tmp_path / "whole", *steps, *sera)
    kill_points.run(name, tmp_path / "offline", *steps, "--online-steps", "0")
    (tmp_path / "online").mkdir()
    shutil.copy(tmp_path / "offline" / "checkpoint.pt", tmp_path / "online")
    script.main(["--run-dir", str(tmp_path / "online"), "--resume", "--online-steps", "40", *sera])
    assert kill_points.compare(tmp_path / "whole", tmp_path / "online") == []


def test_other_data(offline, tmp_path, capsys):
    """A run goes on with its own data only, wherever the file lies now."""
    shutil.copytree(offline, tmp_path / "run")
    data = shutil.copy(ROOT / "data" / "hopper-medium-mini.hdf5", tmp_path / "moved.hdf5")
    options = ["--run-dir", tmp_path / "run", "--resume", "--dataset-path", data]
    importlib.import_module("sac_sera").main([*map(str, options), "--online-steps", "3"])
    with h5py.File(data, "r+") as file:
        file["rewards"][7] += 1
    assert "--dataset-path" in refusal("sac_sera", capsys, *options)


# ------------------------------ logs
def test_tensorboard_rows(alone, tmp_path):
    """Rows after the checkpoint that a run went back to are dropped: none is there twice, none is missing."""
    assert kill_points.run_and_die("sac_sera", tmp_path / "run", "update", 60 + 138)
    kill_points.resume("sac_sera", tmp_path / "run")
    logs = [EventAccumulator(str(folder)).Reload() for folder in (alone, tmp_path / "run")]
    for tag in ("eval/return", "losses/td", "sera/bonus_mean"):
        rows = [[(event.step, event.value) for event in log.Scalars(tag)] for log in logs]
        assert rows[0] == rows[1] and len(rows[0]) > 2, tag


def test_unfinished_file_is_no_checkpoint(alone, tmp_path):
    """What a crash left of a checkpoint in the making is never read."""
    shutil.copytree(alone, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.tmp").write_bytes(b"half")
    kill_points.resume("sac_sera", tmp_path / "run")
    assert kill_points.compare(alone, tmp_path / "run") == []
