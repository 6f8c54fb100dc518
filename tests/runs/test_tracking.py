"""What --track sends to Weights & Biases, the videos of --capture-video, TensorBoard's tables.

Weights & Biases is tried in its offline mode, which writes all that it would send into a file in
the run's folder. That shows which numbers, arguments and id leave the script. It cannot show what
the server makes of them: that --wandb-entity and login are right, how it draws the curves, and that
it joins a resumed run to the first by their common id.
"""

import csv
import dataclasses
import importlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import kill_points
import numpy as np
import pytest
from conftest import ROOT
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NAME = "sac_sera"
NO_RUN = {"checkpoint.pt", "config.json"}  # what a refused start must not leave behind


def environment(**changes: str) -> dict[str, str]:
    """This environment without what concerns screens and Weights & Biases, and changes."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM"):
        mine.pop(name, None)
    return mine | changes


def program(run_dir: Path, *more: str, **changes: str) -> subprocess.CompletedProcess:
    """The script as a program, with the small run's options and more, in that environment."""
    command = [sys.executable, str(ROOT / f"{NAME}.py"), *kill_points.OPTIONS.split()]
    command += ["--run-dir", str(run_dir), *more]
    return subprocess.run(
        command,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def refusal(done: subprocess.CompletedProcess) -> str:
    """The last line on stderr of a program that ended with code 2 and no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


def without(folder: Path, module: str) -> dict[str, str]:
    """The change of the environment that makes a module seem not to be installed."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules['{module}'] = None\n")
    return {"PYTHONPATH": str(folder)}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def rows(run_dir: Path) -> list[dict]:
    with open(run_dir / "evals.csv", newline="") as file:
        return list(csv.DictReader(file))


def scalars(run_dir: Path) -> dict[tuple[str, int], float]:
    """All that TensorBoard shows, by tag and step."""
    log = EventAccumulator(str(run_dir)).Reload()
    found = {}
    for tag in log.Tags()["scalars"]:
        for event in log.Scalars(tag):
            assert (tag, event.step) not in found
            found[tag, event.step] = event.value
    return found


# ------------------------------ TensorBoard
def table(run_dir: Path) -> dict[str, str]:
    """The newest table of arguments that TensorBoard's text plugin shows."""
    log = EventAccumulator(str(run_dir)).Reload()
    (tag,) = log.Tags()["tensors"]
    assert tag.split("/")[0] == "arguments"
    assert log.SummaryMetadata(tag).plugin_data.plugin_name == "text"
    (text,) = log.Tensors(tag)[-1].tensor_proto.string_val
    head, rule, *lines = text.decode().splitlines()
    assert (head, rule) == ("|argument|value|", "|-|-|")
    found = {}
    for line in lines:
        _, name, value, _ = line.split("|")
        found[name] = value
    return found


def test_table_of_arguments(script, tmp_path):
    """TensorBoard shows every argument with its value, as a table."""
    steps = ["--offline-steps", "1", "--online-steps", "0"]
    kill_points.run(script.__name__, tmp_path / "run", *steps)
    args = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    assert set(args) == {field.name for field in dataclasses.fields(script.Args)}
    assert table(tmp_path / "run") == {name: str(value) for name, value in args.items()}


def test_table_of_a_copied_checkpoint(tmp_path):
    """A run that starts from another's offline phase has a table too, with its own arguments."""
    steps = ["--offline-steps", "3", "--online-steps"]
    kill_points.run(NAME, tmp_path / "offline", *steps, "0")
    (tmp_path / "online").mkdir()
    shutil.copy(tmp_path / "offline" / "checkpoint.pt", tmp_path / "online")
    options = ["--run-dir", str(tmp_path / "online"), "--resume", "--online-steps", "2"]
    importlib.import_module(NAME).main([*options, "--sera-coef", "0.5"])
    found = table(tmp_path / "online")
    assert (found["online_steps"], found["sera_coef"]) == ("2", "0.5")


# ------------------------------ Weights & Biases
BLOCK = 32 * 1024
FULL, LAST = 1, 4  # kinds of pieces that end a record


def records(path: Path) -> list:
    """The records of a .wandb file: a log as LevelDB's, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    found = []
    pieces = b""
    place = 7
    while place < len(content):
        left_in_block = BLOCK - place % BLOCK
        if left_in_block < 7:  # no room for the head of a piece: zeros
            place += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            found.append(Record.FromString(pieces))
            pieces = b""
    return found


def items(entries) -> dict:
    """Names and values of the entries of a record."""
    found = {}
    for entry in entries:
        name = "/".join(entry.nested_key) or entry.key
        found[name] = json.loads(entry.value_json)
    return found


def history(path: Path) -> list[tuple[str, int, float]]:
    """What a .wandb file has of the curves: tags, steps of TensorBoard, values."""
    found = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row = items(record.history.item)
            step = row.pop("global_step")
            for name, value in row.items():
                if not name.startswith("_"):
                    found.append((name, step, value))
    return found


def the_run(path: Path):
    """What a .wandb file says about the run itself."""
    (run,) = [record.run for record in records(path) if record.WhichOneof("record_type") == "run"]
    return run


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, worker_id):
    """The folder of a run that SIGTERM stopped online, that was resumed, and its .wandb files.

    It takes half a minute: processes that test side by side share it.
    """
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent
    run_dir = folder / "tracked" / "run"
    whole = folder / "tracked" / "whole"
    with FileLock(folder / "tracked.lock"):
        if not whole.exists():
            stop_and_resume(run_dir)
            whole.touch()
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    return run_dir, files


def stop_and_resume(run_dir):
    """A run that is tracked, and stopped by SIGTERM after 60 online updates, then goes on."""
    stop = f"""
import os
import signal
import sys

sys.path.insert(0, {str(ROOT)!r})
import {NAME} as script

original = script.update
updates = []


def update(*inputs):
    updates.append(inputs[-1])
    if len(updates) == 60 + 60:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*inputs)


script.update = update
script.main()
"""
    options = [*kill_points.OPTIONS.split(), "--run-dir", str(run_dir), "--track"]
    mine = environment(WANDB_MODE="offline")
    command = [sys.executable, "-c", stop, *options]
    first = subprocess.run(command, env=mine, capture_output=True, text=True, timeout=300)
    assert first.returncode == 1, first.stderr
    assert "SIGTERM: go on with" in first.stderr
    (run_dir.parent / "first_id.txt").write_text((run_dir / "wandb_id.txt").read_text())
    second = program(run_dir, "--track", "--resume", WANDB_MODE="offline")
    assert second.returncode == 0, second.stderr


def test_every_number_arrives(tracked):
    """Weights & Biases gets each number that TensorBoard has, once, under the same step.

    So both the evaluation that ends the offline phase and that of online step 0 are there.
    """
    run_dir, files = tracked
    sent = history(files[0]) + history(files[1])
    expected = scalars(run_dir)
    found = {(tag, step): value for tag, step, value in sent}
    assert len(sent) == len(found)
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        assert found[place] == pytest.approx(value, rel=1e-6), place
    kinds = {tag.split("/")[0] for tag, _ in found}
    assert kinds == {"losses", "sera", "eval", "train"}
    moments = [(row["phase"], int(row["step"]), float(row["return"])) for row in rows(run_dir)]
    assert ("offline", 60) in [moment[:2] for moment in moments]
    assert ("online", 0) in [moment[:2] for moment in moments]
    for phase, step, value in moments:
        total = step if phase == "offline" else 60 + 1 + step
        assert found["eval/return", total] == pytest.approx(value, rel=1e-6)


def test_arguments_and_versions_arrive(tracked):
    """The run's configuration has every argument, and versions as in config.json."""
    run_dir, files = tracked
    config = json.loads((run_dir / "config.json").read_text())
    run = the_run(files[1])
    found = items(run.config.update)
    found.pop("_wandb", None)
    assert found == config["args"] | {"versions": config["versions"]}
    assert run.project == "sera"
    assert run.display_name == run_dir.name


def test_a_resumed_run_keeps_its_id(tracked):
    """The second part has the first's id, from wandb_id.txt, and only what the first has not."""
    run_dir, files = tracked
    begun = (run_dir.parent / "first_id.txt").read_text()
    assert len(begun) == 8
    assert (run_dir / "wandb_id.txt").read_text() == begun
    assert [the_run(path).run_id for path in files] == [begun, begun]
    assert [path.name for path in files] == [f"run-{begun}.wandb"] * 2
    last = max(step for _, step, _ in history(files[0]))
    first = min(step for _, step, _ in history(files[1]))
    assert last < first


def test_tracking_changes_nothing(tracked, tmp_path):
    """A tracked run ends like one that is not, bit for bit."""
    run_dir, _ = tracked
    kill_points.run(NAME, tmp_path / "run")
    assert kill_points.compare(tmp_path / "run", run_dir) == []


def test_not_logged_in(tmp_path):
    """Without a login and a terminal to ask on, --track says so in one sentence; nothing starts."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    home = tmp_path / "home"
    home.mkdir()
    done = program(tmp_path / "run", "--track", HOME=str(home), NETRC=str(home / "netrc"))
    message = refusal(done)
    assert "--track" in message
    assert "wandb login" in message
    assert names_in(tmp_path / "run").isdisjoint(NO_RUN)


# ------------------------------ videos
@pytest.fixture(scope="module")
def gl():
    """The value of MUJOCO_GL with which this machine renders without a display."""
    if importlib.util.find_spec("moviepy") is None:
        pytest.skip("moviepy is not installed: pip install moviepy")
    for name in ("egl", "osmesa"):
        command = [sys.executable, "-c", "import mujoco; mujoco.GLContext(64, 64).make_current()"]
        mine = environment(MUJOCO_GL=name)
        if subprocess.run(command, env=mine, capture_output=True).returncode == 0:
            return name
    pytest.skip("nothing here renders without a display: apt-get install libegl1 or libosmesa6")


def frames(path: Path) -> np.ndarray:
    """The pictures of a video, (N, height, width, 3)."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    pictures = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    return np.array(pictures)


def test_videos(gl, tmp_path):
    """Each evaluation's first episode is filmed whole, and filming changes no bit of the run."""
    steps = ["--offline-steps", "2", "--online-steps", "1", "--eval-episodes", "2"]
    kill_points.run(NAME, tmp_path / "plain", *steps)
    done = program(tmp_path / "filmed", *steps, "--capture-video", MUJOCO_GL=gl)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert kill_points.compare(tmp_path / "plain", tmp_path / "filmed") == []

    firsts = [row for row in rows(tmp_path / "filmed") if row["episode"] == "0"]
    moments = [(row["phase"], row["step"]) for row in firsts]
    assert moments == [("offline", "2"), ("online", "0"), ("online", "1")]
    videos = tmp_path / "filmed" / "videos"
    assert len(names_in(videos)) == len(firsts)
    for row in firsts:
        (path,) = videos.glob(f"{row['phase']}-step-{row['step']}-*.mp4")
        pictures = frames(path)
        assert len(pictures) == int(row["length"]) + 1  # the start, and one after each step
        assert pictures[0].std() > 10  # something is to be seen
        assert np.abs(pictures[0].astype(int) - pictures[-1]).max() > 50  # and it moves


def test_videos_of_a_resumed_run(gl, tmp_path):
    """A resumed run may begin to film, or end it; what was filmed stays."""
    steps = ["--offline-steps", "2", "--online-steps"]
    kill_points.run(NAME, tmp_path / "run", *steps, "0")
    resume = [*steps, "2", "--resume"]
    done = program(tmp_path / "run", *resume, "--capture-video", MUJOCO_GL=gl)
    assert done.returncode == 0, done.stderr
    filmed = names_in(tmp_path / "run" / "videos")
    assert {name.rsplit("-episode", 1)[0] for name in filmed} == {"online-step-0", "online-step-2"}
    options = ["--online-steps", "3", "--no-capture-video"]
    importlib.import_module(NAME).main(["--run-dir", str(tmp_path / "run"), "--resume", *options])
    assert rows(tmp_path / "run")[-1]["step"] == "3"
    assert names_in(tmp_path / "run" / "videos") == filmed


def test_no_display(tmp_path):
    """Where nothing can be rendered, --capture-video says in one sentence what to do about it."""
    done = program(tmp_path / "run", "--capture-video", MUJOCO_GL="glfw")
    message = refusal(done)
    assert "--capture-video" in message
    assert "MUJOCO_GL=egl" in message
    assert names_in(tmp_path / "run").isdisjoint(NO_RUN)


def test_moviepy_missing(gl, tmp_path):
    """Where MoviePy is missing, --capture-video says in one sentence what to install."""
    done = program(
        tmp_path / "run", "--capture-video", MUJOCO_GL=gl, **without(tmp_path, "moviepy")
    )
    message = refusal(done)
    assert "--capture-video" in message
    assert "pip install moviepy" in message
    assert names_in(tmp_path / "run").isdisjoint(NO_RUN)
