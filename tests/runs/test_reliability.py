"""What can go wrong in a run, and what is left of it then.

Kills and exact resume are in test_resume.py; Weights & Biases, videos and the tables of TensorBoard
in test_tracking.py.
"""

import dataclasses
import importlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import kill_points
import pytest
import torch
from conftest import ROOT
from filelock import FileLock, Timeout
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# A script as a program that does something at a call of one of its functions.
AT_CALL = """
import importlib
import os
import resource
import signal
import sys
import time

root, name, place, count, action, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, root)
script = importlib.import_module(name)
original = getattr(script, place)
left = int(count)


def counted(*inputs, **others):
    global left
    left -= 1
    if left == 0:
        exec(action)
    return original(*inputs, **others)


setattr(script, place, counted)
script.main()
"""


def at_call(run_dir: Path, place: str, count: int, action: str, *more: str) -> list[str]:
    """The command of a run of SAC, 60 steps offline and 150 online, that does that then."""
    command = [sys.executable, "-c", AT_CALL, str(ROOT), "sac_sera", place, str(count), action]
    return [*command, *kill_points.OPTIONS.split(), "--run-dir", str(run_dir), *more]


def run_and_do(run_dir: Path, count: int, action: str, *prefix: str) -> subprocess.CompletedProcess:
    """A run as a program that does something to itself at an update."""
    command = [*prefix, *at_call(run_dir, "update", count, action)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def last_line(text: str) -> str:
    """What stands last on the screen; the progress bar goes back to the start of its line."""
    return text.replace("\r", "\n").strip().splitlines()[-1].strip()


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def position(run_dir: Path) -> tuple[str, int]:
    """Phase and step of the checkpoint."""
    saved = checkpoint(run_dir)
    return saved["phase"], saved["step"]


def call(name: str, *options) -> None:
    """The script's main with these options, given as text or as anything that can be text."""
    importlib.import_module(name).main([str(option) for option in options])


def ended(name: str, capsys, *options) -> str:
    """All that stands on stderr of a run that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(name, *options)
    assert caught.value.code == 2
    return capsys.readouterr().err


def refusal(name: str, capsys, *options) -> str:
    """The one line on stderr of a run that is refused before it trains."""
    stderr = ended(name, capsys, *options).strip()
    assert stderr.startswith("error: ")
    assert "\n" not in stderr
    return stderr


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All rows of TensorBoard, by tag, as it shows them."""
    log = EventAccumulator(str(run_dir)).Reload()
    found = {}
    for tag in log.Tags()["scalars"]:
        found[tag] = [(event.step, event.value) for event in log.Scalars(tag)]
    return found


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
def acknowledgement(number: str, phase: str = "online") -> str:
    """What a run says when a signal has come."""
    when = {"offline": "after this update", "online": "at the end of the episode"}
    return f"{number}: a checkpoint follows {when[phase]}"


@pytest.mark.parametrize(
    ("number", "count"),
    [("SIGTERM", 30), ("SIGINT", 60 + 70), ("SIGHUP", 60 + 50), ("SIGUSR1", 60 + 30)],
)
def test_signals(number, count, alone, tmp_path):
    """Asked to end, a run writes a checkpoint, says how to go on, and loses nothing."""
    run_dir = tmp_path / "run"
    done = run_and_do(run_dir, count, f"os.kill(os.getpid(), signal.{number})")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    phase = "offline" if count < 60 else "online"
    assert acknowledgement(number, phase) in done.stdout.splitlines()
    assert last_line(done.stderr) == f"{number}: go on with --run-dir {run_dir} --resume"
    if count < 60:
        assert position(run_dir) == ("offline", count)
    else:
        phase, step = position(run_dir)
        assert phase == "online"
        assert count - 60 <= step < 150
    kill_points.resume("sac_sera", run_dir)
    assert kill_points.compare(alone, run_dir) == []


def test_signals_are_acknowledged_at_once(tmp_path):
    """Ctrl-C in an evaluation: its name and what follows, before anything else is done."""
    action = "os.kill(os.getpid(), signal.SIGINT); print('then this', flush=True)"
    command = at_call(tmp_path / "run", "evaluate", 1, action)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[lines.index(acknowledgement("SIGINT", "offline")) + 1] == "then this"
    assert last_line(done.stderr).startswith("SIGINT: go on with --run-dir")


def test_nohup(tmp_path):
    """A signal that the program was started to ignore stays ignored."""
    done = run_and_do(tmp_path / "run", 30, "os.kill(os.getpid(), signal.SIGHUP)", "nohup")
    assert done.returncode == 0
    assert "final score" in done.stdout


def test_signals_belong_to_the_program(tmp_path):
    """Called from other code, main leaves that code's handlers alone."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    steps = ["--offline-steps", "1", "--online-steps", "0"]
    kill_points.run("sac_sera", tmp_path / "run", *steps)
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
    assert after == before


# ------------------------------ closed terminals
@pytest.mark.parametrize("kind", ["pty", "pipe"])
@pytest.mark.parametrize(
    ("place", "count"),
    [("parse_args", 1), ("train", 1), ("update", 20), ("update", 60 + 40), ("say", 2)],
)
def test_closed_output(kind, place, count, alone, tmp_path):
    """Nobody reads what a run prints any more: it goes on to the same end, wherever that happens.

    Before the first print, between it and the bar, in the middle of either phase, before the last
    words.
    """
    reader, side_of_the_run = pty.openpty() if kind == "pty" else os.pipe()
    news, say_so = os.pipe()
    wait, go_on = os.pipe()
    action = f"os.write({say_so}, b'now'); os.read({wait}, 1)"
    outputs = {"stdin": subprocess.DEVNULL, "stdout": side_of_the_run, "stderr": side_of_the_run}
    command = at_call(tmp_path / "run", place, count, action)
    with subprocess.Popen(command, **outputs, pass_fds=(say_so, wait)) as run:
        for descriptor in (side_of_the_run, say_so, wait):
            os.close(descriptor)
        reached = os.read(news, 3)  # nothing, if the run has ended before
        os.close(reader)
        os.write(go_on, b"x")
        run.wait(timeout=120)
    os.close(news)
    os.close(go_on)
    assert reached == b"now"
    assert run.returncode == 0
    assert position(tmp_path / "run") == ("online", 150)
    assert kill_points.compare(alone, tmp_path / "run") == []


@pytest.mark.parametrize("streams", ["2> stderr.txt | head -n 1", "2>&1 | head -n 1"])
def test_head(streams, alone, tmp_path):
    """`| head -n 1` shows the first line and closes the pipe: the run goes on, and all is well."""
    options = [*kill_points.OPTIONS.split(), "--run-dir", str(tmp_path / "run")]
    program = " ".join([sys.executable, str(ROOT / "sac_sera.py"), *options, streams])
    script = f"{program}; echo ${{PIPESTATUS[0]}}"
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    first, code = done.stdout.splitlines()
    assert first.startswith("hopper-medium-mini: 49,984 transitions; ")
    assert code == "0"
    assert kill_points.compare(alone, tmp_path / "run") == []


def test_hangup(alone, tmp_path):
    """The terminal of the run itself is closed: SIGHUP, so it saves and ends, and can go on."""
    action = "os.kill(os.getppid(), signal.SIGUSR1)\nwhile os.isatty(1): time.sleep(0.01)"
    command = at_call(tmp_path / "run", "update", 30, action)
    closing = """
import os
import pty
import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
child, terminal = pty.fork()
if child == 0:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    os.execv(sys.argv[1], sys.argv[1:])
signal.sigwait([signal.SIGUSR1])
os.close(terminal)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-c", closing, *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr
    assert position(tmp_path / "run") == ("offline", 30)
    kill_points.resume("sac_sera", tmp_path / "run")
    assert kill_points.compare(alone, tmp_path / "run") == []


# ------------------------------ numbers
@pytest.mark.parametrize("what", ["a loss", "a parameter"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_not_finite(script, what, value, tmp_path, monkeypatch, capsys):
    """A run that diverges stops with step, quantity and folder, and keeps the last good checkpoint.

    What goes wrong at update 43 is seen at step 50, where numbers are logged again.
    """
    original = script.update
    updates = []

    def update(agent, optimizer, batch, args, kind):
        logs = original(agent, optimizer, batch, args, kind)
        updates.append(kind)
        if what == "a loss" and len(updates) >= 43 and kind.log:
            return logs | {"losses/made_up": torch.tensor(float(value))}
        if what == "a parameter" and len(updates) == 43:
            with torch.no_grad():
                next(agent.actor.parameters()).view(-1)[0] = float(value)
        return logs

    monkeypatch.setattr(script, "update", update)
    options = [*kill_points.OPTIONS.split(), "--run-dir", tmp_path / "run"]
    message = last_line(ended(script.__name__, capsys, *options))
    assert message.startswith("error: ")
    assert "losses/" in message or "actor." in message
    assert "offline step 50" in message
    assert str(tmp_path / "run") in message
    assert position(tmp_path / "run") == ("offline", 25)
    for name, saved in checkpoint(tmp_path / "run")["agent"].items():
        assert saved.isfinite().all(), name


# ------------------------------ two runs in one folder, full disks
def test_lock(alone, tmp_path, capsys):
    """While a run is in a folder, no other goes into it; the system frees it when the run dies."""
    run_dir = tmp_path / "run"
    shutil.copytree(alone, run_dir)
    with FileLock(run_dir / "in_use_by_a_run.lock"):
        message = refusal("sac_sera", capsys, "--run-dir", run_dir, "--resume")
    assert str(run_dir) in message
    assert "in_use_by_a_run" in message
    new = tmp_path / "new"
    new.mkdir()
    with FileLock(new / "in_use_by_a_run.lock"):
        refusal("sac_sera", capsys, *kill_points.OPTIONS.split(), "--run-dir", new)
    assert {path.name for path in new.iterdir()} <= {"in_use_by_a_run.lock"}
    assert kill_points.compare(alone, run_dir) == []


def test_lock_comes_before_the_checkpoint(script, tmp_path, monkeypatch):
    """--resume reads the checkpoint under the lock: no other run can be about to replace it."""
    run_dir = tmp_path / "run"
    steps = ["--offline-steps", "2", "--online-steps", "0"]
    kill_points.run(script.__name__, run_dir, *steps)
    original = script.read_checkpoint
    read = []

    def read_checkpoint(path):
        with pytest.raises(Timeout):
            FileLock(run_dir / "in_use_by_a_run.lock").acquire(timeout=0)
        read.append(path)
        return original(path)

    monkeypatch.setattr(script, "read_checkpoint", read_checkpoint)
    call(script.__name__, "--run-dir", run_dir, "--resume", "--online-steps", "3")
    assert read == [run_dir / "checkpoint.pt"]
    assert position(run_dir) == ("online", 3)


def test_resume_during_the_last_save(alone, tmp_path, capsys):
    """A resume while the first run writes its last checkpoint is refused; nothing goes back to 60.

    With no online steps, that checkpoint is the one of offline step 60.
    """
    run_dir = tmp_path / "run"
    news, say_so = os.pipe()
    wait, go_on = os.pipe()
    action = f"left = 10**9; os.write({say_so}, b'now'); os.read({wait}, 1)"
    # Saved before the first step, at 25, 50 and 60.
    command = at_call(run_dir, "save_checkpoint", 4, action, "--online-steps", "0")
    with subprocess.Popen(command, stderr=subprocess.PIPE, pass_fds=(say_so, wait)) as first:
        os.close(say_so)
        os.close(wait)
        reached = os.read(news, 3)
        found = position(run_dir)
        message = refusal("sac_sera", capsys, "--run-dir", run_dir, "--resume")
        os.write(go_on, b"x")
        first.communicate(timeout=120)
    os.close(news)
    os.close(go_on)
    assert reached == b"now"
    assert found == ("offline", 50)
    assert "in_use_by_a_run" in message
    assert first.returncode == 0
    assert position(run_dir) == ("offline", 60)
    call("sac_sera", "--run-dir", run_dir, "--resume", "--online-steps", "150")
    assert kill_points.compare(alone, run_dir) == []


@pytest.mark.parametrize("count", [45, 60 + 60])
def test_disk_full(count, alone, tmp_path):
    """No room for a checkpoint: one line, and the one before it goes on to the same end."""
    room = 40_000  # bytes for a file: enough for all but a checkpoint
    assert (alone / "checkpoint.pt").stat().st_size > 2 * room
    for path in alone.iterdir():
        assert path.name == "checkpoint.pt" or path.stat().st_size < room / 2
    action = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))"
    done = run_and_do(tmp_path / "run", count, action)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    written = tmp_path / "run" / "checkpoint.tmp"
    way_on = f"make room, then go on with --run-dir {tmp_path / 'run'} --resume"
    expected = f"error: {written} cannot be written (File too large): {way_on}"
    assert last_line(done.stderr) == expected
    phase, step = position(tmp_path / "run")
    updates = step if phase == "offline" else 60 + step
    assert count - 60 < updates <= count
    kill_points.resume("sac_sera", tmp_path / "run")
    assert kill_points.compare(alone, tmp_path / "run") == []


def test_disk_full_for_logs(alone, tmp_path):
    """No room for TensorBoard's rows: the run ends with the reason, and goes on to the same end.

    TensorBoard's thread may print what happened to it before the run's own last line.
    """
    (events,) = alone.glob("events.out.tfevents.*")
    room = 10_000
    assert events.stat().st_size > room
    action = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))"
    done = run_and_do(
        tmp_path / "run", 60 + 1, f"script.save_checkpoint = lambda run, args: None; {action}"
    )
    assert done.returncode == 2
    assert "File too large" in last_line(done.stderr)
    assert last_line(done.stderr).startswith("error: ")
    assert position(tmp_path / "run") == ("offline", 60)
    kill_points.resume("sac_sera", tmp_path / "run")
    assert kill_points.compare(alone, tmp_path / "run") == []


def test_resume_with_other_networks(alone, tmp_path, monkeypatch, capsys):
    """A script whose networks were edited since: one line, and the checkpoint stays."""
    import sac_sera

    def with_layer_norm(input_dim, hidden_dim, layers, output_dim, linear=torch.nn.Linear):
        network = original(input_dim, hidden_dim, layers, output_dim, linear)
        return torch.nn.Sequential(network[0], torch.nn.LayerNorm(hidden_dim), *network[1:])

    original = sac_sera.mlp
    monkeypatch.setattr(sac_sera, "mlp", with_layer_norm)
    run_dir = shutil.copytree(alone, tmp_path / "run")
    before = (run_dir / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as caught:
        kill_points.resume("sac_sera", run_dir)
    assert caught.value.code == 2
    expected = f"error: --resume: the networks in {run_dir} are not those of this script: undo what"
    assert last_line(capsys.readouterr().err).startswith(expected)
    assert (run_dir / "checkpoint.pt").read_bytes() == before


# ------------------------------ one command for the first start and for going on
@pytest.mark.parametrize("place", ["missing", "empty"])
def test_resume_starts_a_run(place, alone, tmp_path, capsys):
    """--resume into a folder without a run starts one there, says so, and does it only once."""
    run_dir = tmp_path / "runs" / "new"
    if place == "empty":
        run_dir.mkdir(parents=True)
    kill_points.run("sac_sera", run_dir, "--resume")
    assert capsys.readouterr().out.startswith(f"--resume: no run in {run_dir} yet")
    assert kill_points.compare(alone, run_dir) == []
    kill_points.run("sac_sera", run_dir, "--resume")
    printed = capsys.readouterr().out
    assert "no run" not in printed
    assert "final score" in printed
    assert kill_points.compare(alone, run_dir) == []


def test_one_command_goes_on(alone, tmp_path):
    """After a kill, the very command that started the run goes on with it."""
    command = at_call(
        tmp_path / "run", "update", 60 + 80, "os.kill(os.getpid(), signal.SIGKILL)", "--resume"
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    phase, step = position(tmp_path / "run")
    assert phase == "online"
    assert 0 < step < 80
    kill_points.run("sac_sera", tmp_path / "run", "--resume")
    assert kill_points.compare(alone, tmp_path / "run") == []


def test_requeued_by_a_cluster(alone, tmp_path, capsys):
    """One command starts a run, goes on after SIGUSR1 as often as that comes, and then rests."""
    for count in (40, 60):
        command = at_call(
            tmp_path / "run", "update", count, "os.kill(os.getpid(), signal.SIGUSR1)", "--resume"
        )
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
    assert position(tmp_path / "run")[0] == "online"
    for _ in range(2):
        kill_points.run("sac_sera", tmp_path / "run", "--resume")
        assert "final score" in capsys.readouterr().out
        assert kill_points.compare(alone, tmp_path / "run") == []


def test_resume_without_a_folder(script, tmp_path, monkeypatch, capsys):
    """--resume alone is refused, with the argument that it needs; no run is made up."""
    monkeypatch.chdir(tmp_path)
    message = refusal(script.__name__, capsys, *kill_points.OPTIONS.split(), "--resume")
    assert "--run-dir" in message
    assert list(tmp_path.iterdir()) == []


def test_lost_checkpoint(alone, tmp_path, capsys):
    """A folder with a config.json but no checkpoint.pt is no place to start: it is refused."""
    run_dir = tmp_path / "run"
    shutil.copytree(alone, run_dir)
    (run_dir / "checkpoint.pt").unlink()
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    for options in ([], kill_points.OPTIONS.split()):
        message = refusal("sac_sera", capsys, *options, "--run-dir", run_dir, "--resume")
        assert str(run_dir / "checkpoint.pt") in message
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


# ------------------------------ changed arguments
@pytest.mark.parametrize(
    "option",
    [
        "--gamma 0.9",
        "--seed 2",
        "--batch-size 8",
        "--sera-coef 0",
        "--sera-k 4",
        "--env hopper-medium-v2",
        "--eval-every 30",
        "--online-steps 149",
        "--updates-per-step 2",
        "--normalize-rewards",
        "--hidden-dim 8 --tau 0.1",
    ],
)
def test_changes_that_alter_results(option, alone, tmp_path, capsys):
    """A resumed run refuses them and names each with the value that it has; nothing is touched."""
    shutil.copytree(alone, tmp_path / "run")
    options = ["--run-dir", tmp_path / "run", "--resume", *option.split()]
    message = refusal("sac_sera", capsys, *options)
    saved = checkpoint(alone)["args"]
    for flag in option.split()[::2]:
        name = flag.removeprefix("--").replace("-", "_")
        assert f"{flag} {saved[name]}" in message
    assert kill_points.compare(alone, tmp_path / "run") == []


def test_changes_that_do_not(alone, tmp_path):
    """More online steps, another rhythm of checkpoints, and the very same values are fine."""
    shutil.copytree(alone, tmp_path / "run")
    options = [*kill_points.OPTIONS.split(), "--run-dir", tmp_path / "run", "--resume"]
    call("sac_sera", *options, "--online-steps", "170", "--checkpoint-every", "7")
    saved = checkpoint(tmp_path / "run")
    assert saved["step"] == 170
    assert saved["args"]["checkpoint_every"] == 7


# What may change at any time: where and how a run computes, and what it tells.
ALWAYS = {"run_dir", "resume", "dataset_path", "device", "threads", "cudagraphs"}
ALWAYS |= {"compile", "checkpoint_every", "log_every", "track", "wandb_project", "wandb_entity"}
ALWAYS |= {"capture_video"}
# What the offline phase does not see.
ONLINE_ONLY = {"sera_coef", "sera_k", "sera_pool", "sera_bonus", "sera_critic", "sera_scale"}
ONLINE_ONLY |= {"updates_per_step", "online_sampling", "mixing_ratio"}
ONLINE_ONLY |= {"bc_online", "bc_anneal_steps"}  # of one script


def changed(value):
    """Another value of the same kind: more, if it is a number."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return "other"


@pytest.mark.parametrize("phase", ["offline", "online"])
def test_which_arguments_may_change(script, phase):
    """What alters no result may change, one by one; what alters no offline result, until then."""
    args = script.Args()
    saved = {"phase": phase, "args": dataclasses.asdict(args)}
    script.check_resumed_args(args, saved)
    refused = set()
    for name, value in saved["args"].items():
        try:
            script.check_resumed_args(dataclasses.replace(args, **{name: changed(value)}), saved)
        except ValueError as error:
            refused.add(name)
            assert f"--{name.replace('_', '-')} {value}:" in str(error)
    allowed = ALWAYS | {"online_steps"}
    if phase == "offline":
        allowed |= ONLINE_ONLY | {"offline_steps"}
    assert refused == set(saved["args"]) - allowed
    for name in ("online_steps", "offline_steps"):
        fewer = dataclasses.replace(args, **{name: getattr(args, name) - 1})
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
            script.check_resumed_args(fewer, saved)


def test_allowed_names_are_whole_names(script):
    """Arguments whose names merely begin like allowed ones are refused, and all of them named."""
    saved = {f"{name}_x": 1 for name in ALWAYS | ONLINE_ONLY | {"online_steps"}}
    now = SimpleNamespace(**dict.fromkeys(saved, 2))
    with pytest.raises(ValueError) as caught:
        script.check_resumed_args(now, {"phase": "offline", "args": saved})
    for name in saved:
        assert f"--{name.replace('_', '-')} 1" in str(caught.value)


@pytest.mark.parametrize("critic", ["offline", "current", "random"])
def test_shared_offline_phase(script, critic, tmp_path):
    """A copy of an offline phase takes any --sera-*, and ends as if it had had it all along.

    IQL's policy rate is what it is before an online phase.
    """
    name = script.__name__
    sera = ["--sera-critic", critic, "--sera-coef", "0.5", "--sera-k", "2"]
    steps = ["--offline-steps", "30", "--online-steps", "40"]
    if name == "iql_sera":
        steps += ["--actor-lr-schedule", "constant"]
    kill_points.run(name, tmp_path / "whole", *steps, *sera)
    another = ["--sera-critic", "current", "--online-steps", "0"]
    kill_points.run(name, tmp_path / "offline", *steps, *another)
    (tmp_path / "online").mkdir()
    shutil.copy(tmp_path / "offline" / "checkpoint.pt", tmp_path / "online")
    call(name, "--run-dir", tmp_path / "online", "--resume", "--online-steps", "40", *sera)
    assert kill_points.compare(tmp_path / "whole", tmp_path / "online") == []


def test_longer_offline_phase(script, tmp_path):
    """A run of the offline phase alone goes on with more steps, as if it had had them all along.

    IQL's policy rate is constant here: on a cosine it depends on the number of steps.
    """
    name = script.__name__
    options = ["--eval-every", "20", "--checkpoint-every", "20"]
    if name == "iql_sera":
        options += ["--actor-lr-schedule", "constant"]
    steps = ["--offline-steps", "40", "--online-steps", "20"]
    kill_points.run(name, tmp_path / "whole", *options, *steps)
    steps = ["--offline-steps", "20", "--online-steps", "0"]
    kill_points.run(name, tmp_path / "run", *options, *steps)
    call(name, "--run-dir", tmp_path / "run", "--resume", "--offline-steps", "40")
    assert position(tmp_path / "run") == ("offline", 40)
    call(name, "--run-dir", tmp_path / "run", "--resume", "--online-steps", "20")
    assert kill_points.compare(tmp_path / "whole", tmp_path / "run") == []


def test_offline_phase_that_is_over(alone, offline, tmp_path, capsys):
    """It gets no longer once the online phase has begun, and never shorter."""
    for start, steps in ((alone, "61"), (alone, "59"), (offline, "59")):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(start, tmp_path / "run")
        options = ["--run-dir", tmp_path / "run", "--resume", "--offline-steps", steps]
        assert "--offline-steps 60" in refusal("sac_sera", capsys, *options)


def test_other_data(offline, tmp_path, capsys):
    """A run goes on with its own data only, wherever the file lies now."""
    shutil.copytree(offline, tmp_path / "run")
    data = shutil.copy(ROOT / "data" / "hopper-medium-mini.hdf5", tmp_path / "moved.hdf5")
    options = ["--run-dir", tmp_path / "run", "--resume", "--dataset-path", data]
    call("sac_sera", *options, "--online-steps", "3")
    assert position(tmp_path / "run") == ("online", 3)
    with h5py.File(data, "r+") as file:
        file["rewards"][7] += 1
    assert "--dataset-path" in refusal("sac_sera", capsys, *options)


# ------------------------------ devices
def test_device_auto(script, tmp_path, monkeypatch):
    """auto stays auto in what is saved, the run has a device, and --resume may name another."""
    original = script.train
    devices = []

    def train(run, args):
        devices.append(run.device.type)
        original(run, args)

    monkeypatch.setattr(script, "train", train)
    steps = ["--offline-steps", "3", "--online-steps", "0", "--device", "auto"]
    kill_points.run(script.__name__, tmp_path / "run", *steps)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["args"]["device"] == "auto"
    assert checkpoint(tmp_path / "run")["args"]["device"] == "auto"
    options = ["--run-dir", tmp_path / "run", "--resume", "--online-steps", "3"]
    call(script.__name__, *options, "--device", "cpu")
    assert devices == ["cuda" if torch.cuda.is_available() else "cpu", "cpu"]
    assert position(tmp_path / "run") == ("online", 3)
    assert checkpoint(tmp_path / "run")["args"]["device"] == "cpu"


def test_cpu_runs_leave_gpus_alone(script, tmp_path, monkeypatch):
    """With --device cpu no GPU is started, not even for its random numbers, though there is one."""
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: started.append("a GPU"))
    initialized = torch.cuda.is_initialized()
    steps = ["--offline-steps", "3", "--online-steps", "20", "--checkpoint-every", "2"]
    kill_points.run(script.__name__, tmp_path / "run", *steps)
    call(script.__name__, "--run-dir", tmp_path / "run", "--resume", "--online-steps", "30")
    assert started == []
    assert torch.cuda.is_initialized() == initialized
    assert checkpoint(tmp_path / "run")["rng_cuda"] is None


# ------------------------------ logs
@pytest.mark.parametrize(
    ("place", "count"), [("update", 22), ("update", 60 + 138), ("replaced", 3), ("replaced", 6)]
)
def test_tensorboard_rows(place, count, alone, tmp_path):
    """No row comes twice and none is missing, wherever a run was killed, however soon it goes on.

    Events are read in the order of the names of their files. That of the killed run is given the
    name of one begun a little later than now, by another process on another machine, as if that
    one's clock were ahead: the worst case of a run that goes on within the same second.
    """
    run_dir = tmp_path / "run"
    assert kill_points.run_and_die("sac_sera", run_dir, place, count)
    (events,) = run_dir.glob("events.out.tfevents.*")
    second = int(time.time()) + 2
    events.rename(run_dir / f"events.out.tfevents.{second}.zzz.example.org.99999999.0")
    kill_points.resume("sac_sera", run_dir)
    expected = scalars(alone)
    found = scalars(run_dir)
    assert found.keys() == expected.keys()
    assert len(expected["losses/td"]) > 2
    for tag, rows in expected.items():
        assert found[tag] == rows, tag


def test_tensorboard_steps(alone, tmp_path):
    """Online steps are counted on from the offline ones, and online step 0 has a step of its own.

    Without an offline phase they are what they are.
    """
    found = scalars(alone)
    online = [0, 40, 80, 120, 150]
    expected = [40, 60] + [60 + 1 + step for step in online]
    assert [step for step, _ in found["eval/return"]] == expected
    offline = list(range(10, 61, 10))
    expected = offline + [60 + 1 + step for step in range(10, 151, 10)]
    assert [step for step, _ in found["losses/td"]] == expected
    kill_points.run("sac_sera", tmp_path / "run", "--offline-steps", "0")
    found = scalars(tmp_path / "run")
    assert [step for step, _ in found["eval/return"]] == online
    assert [step for step, _ in found["losses/td"]] == list(range(10, 151, 10))


def test_tensorboard_rows_are_flushed(script, tmp_path, monkeypatch):
    """What was logged before a checkpoint is on the disk before it: a crash can lose none of it."""
    happened = []
    original_flush = script.SummaryWriter.flush
    original_save = script.save_checkpoint

    def flush(writer):
        happened.append("flush")
        original_flush(writer)

    def save_checkpoint(run, args):
        happened.append("save")
        original_save(run, args)

    monkeypatch.setattr(script.SummaryWriter, "flush", flush)
    monkeypatch.setattr(script, "save_checkpoint", save_checkpoint)
    steps = ["--offline-steps", "4", "--online-steps", "0", "--checkpoint-every", "2"]
    kill_points.run(script.__name__, tmp_path / "run", *steps)
    assert happened == ["save"] + ["flush", "save"] * 2  # the first has nothing behind it


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["0000000999.here.1.0"], [0]),  # an earlier second
        (["0000001000.here.1.0"], [0.75]),  # this very second
        (["0000001002.node7.example.org.31999.4"], [2.75]),  # of a machine whose clock is ahead
        (["0000001001.b.2.0", "0000000998.a.1.0", "0000001000.c.3.0"], [1.75]),
        (["0000004600.here.1.0"], [5]),  # ahead by an hour: no use to wait for that
    ],
)
def test_wait_for_next_second(script, names, expected, tmp_path, monkeypatch):
    """A new file of events comes after all others by name; 5 s are the most that this may take."""
    for name in names:
        (tmp_path / f"events.out.tfevents.{name}").touch()
    slept = []
    monkeypatch.setattr(script.time, "time", lambda: 1000.25)
    monkeypatch.setattr(script.time, "sleep", slept.append)
    script.wait_for_next_second(tmp_path)
    assert slept == expected


def test_unfinished_file_is_no_checkpoint(alone, tmp_path):
    """What a crash left of a checkpoint in the making is never read."""
    shutil.copytree(alone, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.tmp").write_bytes(b"half")
    kill_points.resume("sac_sera", tmp_path / "run")
    assert kill_points.compare(alone, tmp_path / "run") == []
