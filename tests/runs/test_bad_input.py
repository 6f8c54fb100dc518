"""Bad input is refused in one sentence that names the value and the fix; and how the command line is read."""

import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mutate import columns
from mutate import write as write_hdf5

import calql_sera

OPTIONS = ["--device", "cpu", "--offline-steps", "1", "--online-steps", "0", "--eval-episodes", "1"]


def with_value(name, value, index=5):
    """The correct data set with one value replaced."""
    arrays = columns()
    arrays[name] = arrays[name].copy()
    arrays[name][index] = value
    return arrays


def without(*names):
    """The correct data set less some keys."""
    return {name: array for name, array in columns().items() if name not in names}


def contents(folder):
    """Every path below a folder, with the bytes of files."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def good(tmp_path):
    """A file that --dataset-path takes."""
    return write_hdf5(tmp_path / "good.hdf5", columns())


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Stands in for training, in an empty working directory: the list of arguments that got so far."""
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calql_sera, "train", lambda args, state: calls.append(args))
    return calls


@pytest.fixture
def refuse(trained, tmp_path, capsys):
    """Run main, which has to refuse: gives its one line on stderr. No file or folder may appear or change."""

    def run(*argv):
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as caught:
            calql_sera.main([*OPTIONS, *map(str, argv)])
        stderr = capsys.readouterr().err.strip()
        assert caught.value.code == 2
        assert stderr.startswith("error: ") and "\n" not in stderr, stderr
        assert trained == []
        assert contents(tmp_path) == before
        return stderr

    return run


def assert_names(message, *parts):
    """All of these are in the message, in whatever order."""
    assert [part for part in parts if str(part) not in message] == [], message


# ------------------------------ the control
def test_good_input_is_not_refused(trained, good, tmp_path):
    """The correct file and options lead to training, with a run directory, and leave the file as it was."""
    before = good.read_bytes()
    calql_sera.main([*OPTIONS, "--dataset-path", str(good), "--run-dir", str(tmp_path / "run")])
    assert len(trained) == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data_file"] == str(good)
    assert good.read_bytes() == before


# ------------------------------ data set names
@pytest.mark.parametrize("env", ["hopper-medum-v2", "Walker2d-medium-v2", "hopper-full-replay-v0", "hopper"])
def test_unknown_env(env, refuse, good):
    """An unknown id is named, with a known one, even if a file is given."""
    assert_names(refuse("--env", env, "--dataset-path", good), f"--env {env} ", "walker2d-medium-replay-v2")


@pytest.mark.parametrize("env", ["pen-human-v1", "kitchen-mixed-v0", "maze2d-umaze-v1", "antmaze-umaze-v1"])
def test_unsupported_env(env, refuse):
    """D4RL's other families are not supported, and are named."""
    families = ("Gym-MuJoCo or AntMaze", "Adroit, kitchen and maze2d are not supported")
    assert_names(refuse("--env", env), f"--env {env} ", *families, "walker2d-medium")


# ------------------------------ data files
BROKEN = {
    "no rewards": (without("rewards"), ["rewards", "D4RL"]),
    "no flags": (without("terminals", "timeouts"), ["terminals", "D4RL"]),
    "empty": ({}, ["observations", "D4RL"]),
    "group for an array": (without("rewards") | {"rewards/x": np.zeros(30)}, ["rewards", "D4RL"]),
    "walker data": (columns(width=17), ["observations", "(30, 17)", "(30, 11)", "hopper-medium-v2"]),
    "wide actions": (columns() | {"actions": np.zeros((30, 6))}, ["actions", "(30, 6)", "(30, 3)"]),
    "short rewards": (columns() | {"rewards": np.zeros(29)}, ["rewards", "(29,)", "(30,)"]),
    "long timeouts": (columns() | {"timeouts": np.zeros(31)}, ["timeouts", "(31,)", "(30,)"]),
    "scalar rewards": (columns() | {"rewards": 1.0}, ["rewards", "()", "(30,)"]),
    "no rows": (columns(rows=0), ["observations", "(0, 11)"]),
    "one row": (columns(rows=1), ["observations", "(1, 11)"]),
    "text": (columns() | {"rewards": np.full(30, b"one")}, ["rewards", "(30,)", "numbers"]),
    "NaN observation": (with_value("observations", np.nan), ["observations", "NaN"]),
    "NaN reward": (with_value("rewards", np.nan), ["rewards", "NaN"]),
    "infinite action": (with_value("actions", np.inf), ["actions", "infinity"]),
    "NaN terminal": (columns() | {"terminals": np.full(30, np.nan)}, ["terminals", "NaN"]),
    "beyond float32": (columns() | {"rewards": np.full(30, 1e39)}, ["rewards", "infinity"]),
    "actions beyond 1": (with_value("actions", 1.5), ["actions", "1.5", "[-1, 1]"]),
    "actions beyond -1": (with_value("actions", -2.5), ["actions", "2.5", "[-1, 1]"]),
    "all time-outs": (columns() | {"timeouts": np.ones(30, dtype=bool)}, ["0 transitions"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(case, refuse, tmp_path):
    """A file that does not suit the environment: its path and what is wrong with it."""
    arrays, parts = BROKEN[case]
    path = write_hdf5(tmp_path / "broken.hdf5", arrays)
    message = refuse("--dataset-path", path)
    assert_names(message, path)
    assert_names(message.replace(str(path), ""), *parts)


def test_action_rounding_is_let_through(tmp_path):
    """Actions a rounding error beyond 1 are not refused."""
    path = write_hdf5(tmp_path / "x.hdf5", with_value("actions", np.float32(1) + np.float32(2**-23)))
    assert len(calql_sera.load_d4rl("hopper-medium-v2", str(path))["actions"]) == 28


@pytest.mark.parametrize("case", ["truncated", "cut to nothing", "text"])
def test_unreadable_file(case, refuse, good):
    """A cut file or something other than HDF5."""
    body = good.read_bytes()
    broken = {"truncated": body[: len(body) // 2], "cut to nothing": b"", "text": b"1,2,3\n" * 9}
    good.write_bytes(broken[case])
    assert_names(refuse("--dataset-path", good), good, "HDF5", "again")


def test_missing_file(refuse, tmp_path):
    """A --dataset-path that does not exist, or is a folder."""
    for path in (tmp_path / "nowhere.hdf5", tmp_path):
        assert_names(refuse("--dataset-path", path), path, "--dataset-path")


def test_download_fails(refuse, tmp_path, monkeypatch):
    """No file anywhere and no server: what was tried, where to put the file, which option names one."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(calql_sera, "SERVER", "http://127.0.0.1:1")
    message = refuse("--env", "walker2d-medium-v2")
    url = "http://127.0.0.1:1/gym_mujoco_v2/walker2d_medium-v2.hdf5"
    assert_names(message, "walker2d-medium-v2", url, tmp_path / "cache", "huggingface", "--dataset-path")


# ------------------------------ options
@pytest.mark.parametrize(
    ("option", "value", "fix"),
    [
        ("--offline-steps", "-1", "at least 0"),
        ("--online-steps", "-5", "at least 0"),
        ("--offline-steps", "1.5", "whole number"),
        ("--online-steps", "1.5", "whole number"),
        ("--offline-steps", "nan", "whole number"),
        ("--online-steps", "inf", "whole number"),
        ("--eval-every", "0", "at least 1"),
        ("--eval-every", "-inf", "whole number"),
        ("--eval-episodes", "0", "at least 1"),
        ("--checkpoint-every", "0.5", "whole number"),
        ("--batch-size", "0", "at least 1"),
        ("--sera-k", "0", "at least 1"),
        ("--seed", "-1", "at least 0"),
        ("--hidden-dim", "0", "at least 1"),
        ("--gamma", "2", "0 to 1"),
        ("--gamma", "nan", "0 to 1"),
        ("--tau", "-0.1", "0 to 1"),
        ("--mixing-ratio", "1.1", "0 to 1"),
    ],
)
def test_bad_number(option, value, fix, refuse, good):
    """A number out of range: the option, the value given and the range."""
    message = refuse("--dataset-path", good, option, value)
    assert_names(message, f"{option} is {value}", fix)


@pytest.mark.parametrize("k", [256, 300])
def test_k_has_to_be_below_the_batch_size(k, refuse, good):
    """k-th neighbours need more than k rows: both numbers and both options are named."""
    assert_names(refuse("--dataset-path", good, "--sera-k", k), f"--sera-k is {k}", "--batch-size 256")


def test_k_does_not_matter_without_neighbours():
    """No bonus, or a constant one, has no use for k; one below the batch size is fine."""
    for options in (["--sera-coef", "0"], ["--sera-bonus", "constant"], ["--batch-size", "301"]):
        assert calql_sera.parse_args(["--sera-k", "300", *options]).sera_k == 300


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(refuse, good):
    """cuda asked for and absent."""
    assert_names(refuse("--dataset-path", good, "--device", "cuda"), "--device", "cuda", "cpu")


def test_no_steps_at_all(refuse, good):
    """Both phases empty."""
    message = refuse("--dataset-path", good, "--offline-steps", 0, "--online-steps", 0)
    assert_names(message, "--offline-steps", "--online-steps", "0")


# ------------------------------ run directories
def test_unwritable_run_dir(refuse, good, tmp_path):
    """A folder that cannot be made, for any user: it would lie below a file."""
    (tmp_path / "file").touch()
    for run_dir in (tmp_path / "file" / "run", tmp_path / "file"):
        assert_names(refuse("--dataset-path", good, "--run-dir", run_dir), run_dir)


def test_run_dir_in_use(refuse, good, tmp_path):
    """A folder that already holds a run is left alone."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text("{}")
    assert_names(refuse("--dataset-path", good, "--run-dir", run_dir), run_dir, "--resume", "another")


def test_refused_run_does_not_block_the_next(refuse, trained, good, tmp_path):
    """After a refusal for bad data the same run directory is free for the corrected command."""
    run_dir = tmp_path / "run"
    bad = write_hdf5(tmp_path / "bad.hdf5", without("rewards"))
    refuse("--dataset-path", bad, "--run-dir", run_dir)
    calql_sera.main([*OPTIONS, "--dataset-path", str(good), "--run-dir", str(run_dir)])
    assert len(trained) == 1


def test_resume_without_a_checkpoint(refuse, good, tmp_path):
    """--resume needs a run directory, and a checkpoint in it."""
    (tmp_path / "run").mkdir()
    message = refuse("--dataset-path", good, "--resume", "--run-dir", tmp_path / "run")
    assert_names(message, "--resume", "--run-dir", "checkpoint", tmp_path / "run")
    assert_names(refuse("--dataset-path", good, "--resume"), "--resume", "--run-dir", "checkpoint")


def test_resume_of_another_script(refuse, tmp_path):
    """A checkpoint of another script, with arguments unknown to this one, is refused."""
    torch.save({"script": "other_sera", "args": {"other_weight": 1.0}}, data := io.BytesIO())
    seal = hashlib.sha256(data.getvalue()).digest()
    (tmp_path / "checkpoint.pt").write_bytes(data.getvalue() + seal)
    assert_names(refuse("--resume", "--run-dir", tmp_path), tmp_path, "--resume", "checkpoint of this script")


def test_resume_from_a_broken_checkpoint(refuse, tmp_path):
    """A checkpoint that cannot be read is refused."""
    for body in (b"", b"not a checkpoint"):
        (tmp_path / "checkpoint.pt").write_bytes(body)
        assert_names(refuse("--resume", "--run-dir", tmp_path), tmp_path, "--resume", "checkpoint")


@pytest.mark.parametrize("option", ["--sera-coef", "--actor-lr"])
def test_numbers_that_are_none(refuse, good, option):
    """Not a number, or infinity, is no weight and no rate."""
    for value in ("nan", "inf"):
        assert_names(refuse("--dataset-path", good, option, value), option, value, "finite")


# ------------------------------ how the command line is read
def test_steps_in_scientific_notation():
    """1e6 is the whole number 1000000, for every count."""
    names = ("offline_steps", "online_steps", "eval_every", "checkpoint_every")
    argv = [part for name in names for part in (f"--{name.replace('_', '-')}", "1e6")]
    args = calql_sera.parse_args(argv)
    for name in names:
        assert getattr(args, name) == 1_000_000 and type(getattr(args, name)) is int


def test_underscores():
    """--offline_steps is as good as --offline-steps."""
    args = calql_sera.parse_args(["--offline_steps", "7", "--sera_bonus", "state"])
    assert (args.offline_steps, args.sera_bonus) == (7, "state")


def test_presets():
    """The data set's name brings its own defaults."""
    args, preset = (
        calql_sera.parse_args(["--env", "hopper-medium-mini"]),
        calql_sera.PRESETS["hopper-medium-mini"],
    )
    assert set(preset) == {"offline_steps", "online_steps", "eval_every"}
    changed = {name for name, value in vars(args).items() if value != getattr(calql_sera.Args, name)}
    assert changed - {"env", "device"} == set(preset) and vars(args).items() >= preset.items()
    for env in ("walker2d-medium-v2", "walker2d-medium-replay-v0"):
        args = calql_sera.parse_args(["--env", env])
        assert (args.sera_k, args.offline_steps) == (20, 250_000)
    args = calql_sera.parse_args([])
    assert (args.env, args.sera_k, args.offline_steps) == ("hopper-medium-v2", 10, 250_000)
    assert calql_sera.parse_args(["--env", "hopper-medium-v2"]).online_steps == 250_000


@pytest.mark.parametrize("order", [1, -1])
def test_user_values_win_over_presets(order):
    """What is on the command line counts, before --env and after it."""
    pairs = [("--env", "hopper-medium-mini"), ("--offline-steps", "7")][::order]
    args = calql_sera.parse_args([part for pair in pairs for part in pair])
    assert args.offline_steps == 7
    assert args.online_steps == calql_sera.PRESETS["hopper-medium-mini"]["online_steps"] != 250_000
    pairs = [("--env", "walker2d-medium-v2"), ("--sera-k", "10")][::order]
    assert calql_sera.parse_args([part for pair in pairs for part in pair]).sera_k == 10


@pytest.mark.parametrize(("env", "k"), [("walker2d-medium-v2", 20), ("hopper-medium-v2", 10)])
def test_help_shows_the_preset(env, k, capsys):
    """--help after --env shows the defaults that would be used."""
    with pytest.raises(SystemExit) as caught:
        calql_sera.main(["--env", env, "--help"])
    text = " ".join(re.sub(r"\x1b\[[\d;]*m|[│|]", " ", capsys.readouterr().out).split())
    assert caught.value.code == 0
    assert re.search(r"--sera-k [^()]*\(default: (\d+)\)", text)[1] == str(k)
    assert f"(default: {env})" in text


@pytest.mark.parametrize("argv", [["--gama", "0.9"], ["--physics", "new"], ["--sera-k", "ten"], ["--env"]])
def test_unknown_options_and_values(argv, trained, capsys):
    """Misspelt options and values of the wrong kind are named and end with code 2 too."""
    with pytest.raises(SystemExit) as caught:
        calql_sera.main(argv)
    assert caught.value.code == 2
    assert argv[-1] in capsys.readouterr().err
    assert trained == []


def test_refusal_from_outside(tmp_path):
    """The script itself, as a program: exit code 2, one line, no traceback, nothing written."""
    script = Path(calql_sera.__file__)
    command = [sys.executable, "-B", str(script), "--env", "hopper-medum-v2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "hopper-medum-v2" in result.stderr and "walker2d-medium-replay-v2" in result.stderr
    assert list(tmp_path.iterdir()) == []
