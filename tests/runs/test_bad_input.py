"""Bad input is refused in one sentence with the value and the fix; how a command line is read."""

import hashlib
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from corrupt import columns
from corrupt import write as write_hdf5

import calql_sera

OPTIONS = ["--device", "cpu", "--offline-steps", "1", "--online-steps", "0", "--eval-episodes", "1"]


def with_value(name, value, index=5):
    """The correct dataset with one value replaced."""
    arrays = columns()
    arrays[name] = arrays[name].copy()
    arrays[name][index] = value
    return arrays


def without(*names):
    """The correct dataset less some keys."""
    return {name: array for name, array in columns().items() if name not in names}


def contents(folder):
    """Every path below a folder, with the bytes of files, less the lock that a run may leave."""
    paths = [path for path in folder.rglob("*") if path.name != "in_use_by_a_run.lock"]
    return {path: path.is_file() and path.read_bytes() for path in paths}


@pytest.fixture
def good(tmp_path):
    """A file that --dataset-path takes."""
    return write_hdf5(tmp_path / "good.hdf5", columns())


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Stands in for training, in an empty folder: the arguments of runs that got so far."""
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calql_sera, "train", lambda run, args: calls.append(args))
    return calls


@pytest.fixture
def end_with_code_2(trained, tmp_path, capsys):
    """Run main, which has to end so: gives its stderr. No file or folder may appear or change."""

    def run(*argv):
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as caught:
            calql_sera.main([*OPTIONS, *map(str, argv)])
        assert caught.value.code == 2
        assert trained == []
        assert contents(tmp_path) == before
        return capsys.readouterr().err.strip()

    return run


@pytest.fixture
def refuse(end_with_code_2):
    """Run main, which has to refuse: gives its one line on stderr."""

    def run(*argv):
        stderr = end_with_code_2(*argv)
        assert stderr.startswith("error: ") and "\n" not in stderr, stderr
        return stderr

    return run


def assert_names(message, *parts):
    """All of these are in the message, in whatever order."""
    assert [part for part in parts if str(part) not in message] == [], message


# ------------------------------ the control
def test_good_input_is_not_refused(trained, good, tmp_path):
    """The correct file and options lead to training, and leave the file as it was."""
    before = good.read_bytes()
    calql_sera.main([*OPTIONS, "--dataset-path", str(good), "--run-dir", str(tmp_path / "run")])
    assert len(trained) == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data_file"] == str(good)
    assert good.read_bytes() == before


# ------------------------------ dataset names
@pytest.mark.parametrize(
    "env",
    [
        "hopper-medum-v2",
        "Walker2d-medium-v2",
        "hopper-medium-v3",
        "hopper-full-replay-v0",
        "hopper",
    ],
)
def test_unknown_env(env, refuse, good):
    """An unknown id is named, with a known one, even if a file is given."""
    message = refuse("--env", env, "--dataset-path", good)
    assert_names(message, f"--env {env} is no dataset that is supported")
    assert re.search(r": did you mean (hopper|walker2d)-\w+(-\w+)?-v2\?$|Hopper-v5\?$", message)


@pytest.mark.parametrize("family", ["kitchen", "maze2d", "minigrid", "flow", "carla", "bullet"])
def test_unsupported_env(family, refuse):
    """D4RL's other families are not supported, and are named."""
    message = refuse("--env", f"{family}-mixed-v0")
    assert_names(message, f"--env {family}-mixed-v0: {family} of D4RL is not supported")


# ------------------------------ data files
BROKEN = {
    "no rewards": (without("rewards"), ["rewards", "D4RL"]),
    "no flags": (without("terminals", "timeouts"), ["terminals", "D4RL"]),
    "empty": ({}, ["observations", "D4RL"]),
    "group for an array": (without("rewards") | {"rewards/x": np.zeros(30)}, ["rewards", "D4RL"]),
    "walker data": (
        columns(width=17),
        ["observations", "(30, 17)", "(30, 11)", "hopper-medium-v2"],
    ),
    "wide actions": (
        columns() | {"actions": np.zeros((30, 6))},
        ["actions", "(30, 6)", "(30, 3)"],
    ),
    "short rewards": (columns() | {"rewards": np.zeros(29)}, ["rewards", "(29,)", "(30,)"]),
    "long timeouts": (columns() | {"timeouts": np.zeros(31)}, ["timeouts", "(31,)", "(30,)"]),
    "scalar rewards": (columns() | {"rewards": 1.0}, ["rewards", "()", "(30,)"]),
    "no rows": (columns(rows=0), ["0 rows", "at least 2"]),
    "one row": (columns(rows=1), ["1 rows", "at least 2"]),
    "text": (columns() | {"rewards": np.full(30, b"one")}, ["rewards", "(30,)", "numbers"]),
    "NaN observation": (with_value("observations", np.nan), ["observations", "NaN"]),
    "NaN reward": (with_value("rewards", np.nan), ["rewards", "NaN"]),
    "infinite action": (with_value("actions", np.inf), ["actions", "infinity"]),
    "flags of 2": (columns() | {"terminals": np.full(30, 2)}, ["terminals", "0 and 1"]),
    "NaN terminal": (columns() | {"terminals": np.full(30, np.nan)}, ["terminals", "0 and 1"]),
    "beyond float32": (columns() | {"rewards": np.full(30, 1e39)}, ["rewards", "infinity"]),
    "actions beyond 1": (with_value("actions", 1.5), ["actions up to 1.5", "--clip-actions"]),
    "actions beyond -1": (with_value("actions", -2.5), ["actions up to 2.5", "--clip-actions"]),
    "all timeouts": (columns() | {"timeouts": np.ones(30, dtype=bool)}, ["0 transitions"]),
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
    just_beyond = np.float32(1) + np.float32(2**-23)
    path = write_hdf5(tmp_path / "x.hdf5", with_value("actions", just_beyond))
    assert len(calql_sera.load_d4rl("hopper-medium-v2", path)["actions"]) == 28


@pytest.mark.parametrize("case", ["truncated", "cut to nothing", "text"])
def test_unreadable_file(case, refuse, good):
    """A cut file or something other than HDF5."""
    body = good.read_bytes()
    broken = {"truncated": body[: len(body) // 2], "cut to nothing": b"", "text": b"1,2,3\n" * 9}
    good.write_bytes(broken[case])
    assert_names(refuse("--dataset-path", good), good, "HDF5", "again")


def test_missing_file(refuse, tmp_path):
    """A --dataset-path that does not exist, or is a folder, as other libraries have it."""
    path = tmp_path / "nowhere.hdf5"
    assert_names(refuse("--dataset-path", path), path, "--dataset-path")
    assert_names(refuse("--dataset-path", tmp_path), f"{tmp_path} is a folder", "data/convert.py")


def test_download_fails(trained, tmp_path, monkeypatch, capsys):
    """No file and no server: all that was tried, where to put the file, how to name one."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(cache))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(calql_sera, "SERVER", "127.0.0.1:1")
    with pytest.raises(SystemExit) as caught:
        calql_sera.main([*OPTIONS, "--env", "walker2d-medium-v2"])
    assert caught.value.code == 2
    assert trained == []
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    name = "walker2d_medium-v2.hdf5"
    urls = [f"{scheme}://127.0.0.1:1/gym_mujoco_v2/{name}: " for scheme in ("https", "http")]
    mirror = f"http://127.0.0.1:1/{calql_sera.MIRROR}/{name}: "
    assert_names(message, mirror, *urls, cache, "--dataset-path")
    assert {path.name for path in cache.iterdir()} <= {f"{name}.lock"}


# ------------------------------ options
@pytest.mark.parametrize(
    ("option", "value", "fix"),
    [
        ("--offline-steps", "-1", "at least 0"),
        ("--online-steps", "-5", "at least 0"),
        ("--learning-starts", "-1", "at least 0"),
        ("--eval-every", "0", "at least 1"),
        ("--eval-episodes", "0", "at least 1"),
        ("--checkpoint-every", "-3", "at least 1"),
        ("--log-every", "0", "at least 1"),
        ("--updates-per-step", "0", "at least 1"),
        ("--batch-size", "0", "at least 1"),
        ("--threads", "0", "at least 1"),
        ("--sera-k", "0", "at least 1"),
        ("--sera-pool", "-1", "at least 0"),
        ("--seed", "-1", "at least 0"),
        ("--seed", "9223372036854775808", "at most 9223372036854775807"),
        ("--hidden-dim", "0", "at least 1"),
        ("--gamma", "2.0", "0 to 1"),
        ("--gamma", "nan", "0 to 1"),
        ("--tau", "-0.1", "0 to 1"),
        ("--mixing-ratio", "1.1", "0 to 1"),
        ("--sera-coef", "nan", "finite"),
        ("--sera-coef", "inf", "finite"),
        ("--actor-lr", "nan", "finite"),
        ("--critic-lr", "inf", "finite"),
        ("--actor-lr", "-1.0", "at least 0"),
    ],
)
def test_bad_number(option, value, fix, refuse, good):
    """A number out of range: the option, the value given and the range."""
    message = refuse("--dataset-path", good, option, value)
    assert_names(message, f"{option} is {value}", fix)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--offline-steps", "1.5"),
        ("--online-steps", "inf"),
        ("--offline-steps", "nan"),
        ("--online-steps", "1e6"),
        ("--eval-every", "-inf"),
        ("--checkpoint-every", "0.5"),
        ("--batch-size", "8.0"),
        ("--gamma", "high"),
    ],
)
def test_not_even_a_number(option, value, end_with_code_2, good):
    """A count is a whole number, without point or exponent: tyro names the option and the value."""
    stderr = end_with_code_2("--dataset-path", good, option, value)
    assert_names(stderr, f"Error parsing {option}", f"'{value}'")


@pytest.mark.parametrize("k", [256, 300])
def test_k_has_to_be_below_the_batch_size(k, refuse, good):
    """k-th neighbours need more than k rows: both numbers and both options are named."""
    message = refuse("--dataset-path", good, "--sera-k", k)
    assert_names(message, f"--sera-k is {k}", "--batch-size 256")


def test_k_may_be_the_size_of_the_pool_at_most(refuse, good):
    """Neighbours in a pool, in place of the batch, cannot be more than it has."""
    message = refuse("--dataset-path", good, "--sera-k", 300, "--sera-pool", 299)
    assert_names(message, "--sera-k is 300", "at most", "--sera-pool 299")


@pytest.mark.parametrize(
    "options", ["--sera-coef 0", "--sera-bonus constant", "--batch-size 301", "--sera-pool 300"]
)
def test_possible_k(options):
    """No bonus, or a constant one, has no use for k; else the batch or the pool is large enough."""
    assert calql_sera.parse_args(["--sera-k", "300", *options.split()]).sera_k == 300


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(refuse, good):
    """cuda asked for and absent."""
    message = refuse("--dataset-path", good, "--device", "cuda")
    assert_names(message, "--device", "cuda", "cpu")


def test_no_steps_at_all(refuse, good):
    """Both phases empty."""
    message = refuse("--dataset-path", good, "--offline-steps", 0, "--online-steps", 0)
    assert_names(message, "--offline-steps", "--online-steps", "0")


def test_nothing_to_learn_in(refuse):
    """A run from scratch whose steps would all be random ones: both numbers and both options."""
    scratch = ["--offline-steps", 0, "--mixing-ratio", 0, "--online-steps", 90]
    message = refuse(*scratch, "--learning-starts", 90)
    assert_names(message, "--learning-starts is 90", "--online-steps 90")
    more = ["--learning-starts", "89", "--batch-size", "20"]
    assert calql_sera.parse_args([*map(str, scratch), *more])


def test_batch_that_is_never_full(refuse):
    """A run from scratch with fewer steps than a batch has rows: both numbers and both options."""
    scratch = ["--offline-steps", 0, "--mixing-ratio", 0, "--online-steps", 90]
    scratch += ["--learning-starts", 0]
    message = refuse(*scratch, "--batch-size", 90)
    assert_names(message, "--batch-size is 90", "--online-steps 90")
    assert calql_sera.parse_args([*map(str, scratch), "--batch-size", "89"])


@pytest.mark.parametrize(
    ("name", "option", "value", "words"),
    [
        ("iql_sera", "--expectile", "7", "0 to 1"),
        ("td3bc_sera", "--policy-noise", "-0.2", "at least 0"),
        ("td3bc_sera", "--noise-clip", "-0.5", "at least 0"),
        ("td3bc_sera", "--exploration-noise", "-0.1", "at least 0"),
        ("awac_sera", "--weight-decay", "-0.1", "at least 0"),
        ("awac_sera", "--awac-lambda", "0", "above 0"),
    ],
)
def test_numbers_of_one_script(name, option, value, words):
    """What would end in NaN, or learn the wrong way round."""
    script = importlib.import_module(name)
    with pytest.raises(ValueError, match=f"{option} is {float(value)}: give .* {words}"):
        script.parse_args(["--device", "cpu", option, value])


def test_runs_is_a_file(refuse, good, tmp_path):
    """No folder can be made for the run: which one, and the option that names another."""
    (tmp_path / "runs").write_text("")
    message = refuse("--dataset-path", good)
    assert_names(message, "runs/hopper-medium-v2__calql_sera", "cannot be made", "--run-dir")


def test_ctrl_c_before_training(trained, good, monkeypatch):
    """One line, no traceback."""

    def load_data(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(calql_sera, "load_data", load_data)
    with pytest.raises(SystemExit) as caught:
        calql_sera.main([*OPTIONS, "--dataset-path", str(good)])
    assert caught.value.code == "stopped before training began"
    assert trained == []


def test_track_without_wandb(refuse, good, monkeypatch):
    """Weights & Biases asked for and not installed: how to install it."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert_names(refuse("--dataset-path", good, "--track"), "--track", "pip install wandb")


def test_video_without_what_it_needs(refuse, good, tmp_path, monkeypatch):
    """Films asked for where none can be made: what to install, and what to set."""

    def no_moviepy(*inputs):
        raise gymnasium.error.DependencyNotInstalled("MoviePy is not installed")

    monkeypatch.setattr(gymnasium.wrappers, "RecordVideo", no_moviepy)
    monkeypatch.setattr(gymnasium.Env, "render", lambda env: None)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    message = refuse("--dataset-path", good, "--run-dir", run_dir, "--capture-video")
    assert_names(message, "--capture-video", "moviepy", "MUJOCO_GL")


# ------------------------------ run folders
def test_unwritable_run_dir(refuse, good, tmp_path):
    """A folder that cannot be made, for any user: it would lie below a file."""
    (tmp_path / "file").touch()
    for run_dir in (tmp_path / "file" / "run", tmp_path / "file"):
        message = refuse("--dataset-path", good, "--run-dir", run_dir)
        assert_names(message, f"--run-dir {run_dir}", "another folder")


def test_run_dir_in_use(refuse, good, tmp_path):
    """A folder that already holds a run is left alone."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text("{}")
    message = refuse("--dataset-path", good, "--run-dir", run_dir)
    assert_names(message, run_dir, "--resume", "another")


def test_refused_run_does_not_block_the_next(refuse, trained, good, tmp_path):
    """After a refusal for bad data the same run folder is free for the corrected command."""
    run_dir = tmp_path / "run"
    bad = write_hdf5(tmp_path / "bad.hdf5", without("rewards"))
    refuse("--dataset-path", bad, "--run-dir", run_dir)
    calql_sera.main([*OPTIONS, "--dataset-path", str(good), "--run-dir", str(run_dir)])
    assert len(trained) == 1


def test_resume_where_nothing_is(trained, good, tmp_path, capsys):
    """--resume in a folder without a run starts one there, and says so."""
    run_dir = tmp_path / "run"
    options = ["--dataset-path", str(good), "--resume", "--run-dir", str(run_dir)]
    calql_sera.main([*OPTIONS, *options])
    assert len(trained) == 1
    assert f"no run in {run_dir} yet" in capsys.readouterr().out
    assert (run_dir / "checkpoint.pt").exists()


def test_resume_without_a_checkpoint(refuse, good, tmp_path):
    """--resume needs a run folder, and a checkpoint where a run has been."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text("{}")
    message = refuse("--dataset-path", good, "--resume", "--run-dir", run_dir)
    assert_names(message, "--resume", "--run-dir", run_dir / "checkpoint.pt")
    assert_names(refuse("--dataset-path", good, "--resume"), "--resume", "--run-dir", "folder")


def sealed(checkpoint):
    """The bytes of a checkpoint file, sealed as save_checkpoint seals it."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue() + hashlib.sha256(file.getvalue()).digest()


def test_resume_of_another_script(refuse, tmp_path):
    """A checkpoint of another script, with arguments unknown to this one, is refused."""
    body = sealed({"script": "other_sera", "args": {"other_weight": 1.0}})
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(body)
    message = refuse("--resume", "--run-dir", tmp_path)
    assert_names(message, path, "--resume", "other_sera")


def test_resume_of_another_version(refuse, tmp_path):
    """One of this script, with other arguments than it has now, is not called another's."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(sealed({"script": "calql_sera", "args": {"learning_rate": 1.0}}))
    message = refuse("--resume", "--run-dir", tmp_path)
    assert_names(message, path, "--resume", "version")
    assert "it is calql_sera" not in message


NO_CHECKPOINT = b"not a checkpoint"


@pytest.mark.parametrize(
    "body",
    [b"", NO_CHECKPOINT, NO_CHECKPOINT + hashlib.sha256(NO_CHECKPOINT).digest()],
    ids=["empty", "not sealed", "sealed"],
)
def test_resume_from_a_broken_checkpoint(body, refuse, tmp_path):
    """A checkpoint that cannot be read is refused: where it lies, and what to do."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(body)
    assert_names(refuse("--resume", "--run-dir", tmp_path), path, "--resume", "start anew")


# ------------------------------ how the command line is read
def test_underscores():
    """Numbers may have them, and --offline_steps is as good as --offline-steps."""
    args = calql_sera.parse_args(["--offline_steps", "7", "--sera_bonus", "state"])
    assert (args.offline_steps, args.sera_bonus) == (7, "state")
    args = calql_sera.parse_args(["--online-steps", "1_000_000", "--actor-lr", "3e-4"])
    assert (args.online_steps, args.actor_lr) == (1_000_000, 3e-4)
    assert type(args.online_steps) is int


def test_presets():
    """The dataset's name brings its own defaults."""
    args = calql_sera.parse_args(["--env", "hopper-medium-mini"])
    preset = calql_sera.PRESETS["hopper-medium-mini"]
    assert set(preset) == {"offline_steps", "online_steps", "eval_every"}
    default = vars(calql_sera.Args())
    changed = {name for name, value in vars(args).items() if value != default[name]}
    assert changed - {"env"} == set(preset) and vars(args).items() >= preset.items()
    for env in ("walker2d-medium-v2", "walker2d-medium-replay-v0"):
        args = calql_sera.parse_args(["--env", env])
        assert (args.sera_k, args.offline_steps) == (20, 250_000)
    args = calql_sera.parse_args([])
    assert (args.env, args.sera_k, args.offline_steps) == ("hopper-medium-v2", 10, 250_000)
    assert calql_sera.parse_args(["--env", "hopper-medium-v2"]).online_steps == 250_000


@pytest.mark.parametrize("order", [1, -1])
def test_user_values_win_over_presets(order):
    """What is on the command line counts, before --env and after it."""
    options = [["--env", "hopper-medium-mini"], ["--offline-steps", "7"]][::order]
    args = calql_sera.parse_args(options[0] + options[1])
    assert args.offline_steps == 7
    assert args.online_steps == calql_sera.PRESETS["hopper-medium-mini"]["online_steps"] != 250_000
    options = [["--env", "walker2d-medium-v2"], ["--sera-k", "10"]][::order]
    assert calql_sera.parse_args(options[0] + options[1]).sera_k == 10


@pytest.mark.parametrize(("env", "k"), [("walker2d-medium-v2", 20), ("hopper-medium-v2", 10)])
def test_help_shows_the_preset(env, k, capsys):
    """--help after --env shows the defaults that would be used."""
    with pytest.raises(SystemExit) as caught:
        calql_sera.main(["--env", env, "--help"])
    text = " ".join(re.sub(r"\x1b\[[\d;]*m|[│|]", " ", capsys.readouterr().out).split())
    assert caught.value.code == 0
    assert re.search(r"--sera-k [^()]*\(default: (\d+)\)", text)[1] == str(k)
    assert f"(default: {env})" in text


@pytest.mark.parametrize(
    "argv", [["--gama", "0.9"], ["--physics", "new"], ["--sera-k", "ten"], ["--env"]]
)
def test_unknown_options_and_values(argv, end_with_code_2):
    """Misspelt options and values of the wrong kind are named and end with code 2 too."""
    assert argv[-1] in end_with_code_2(*argv)


def test_refusal_from_outside(tmp_path):
    """The script itself, as a program: exit code 2, one line, no traceback, nothing written."""
    script = Path(calql_sera.__file__)
    command = [sys.executable, "-B", str(script), "--env", "hopper-medum-v2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "hopper-medum-v2" in result.stderr and "did you mean hopper-medium-v2?" in result.stderr
    assert list(tmp_path.iterdir()) == []
