"""Damaged data files, damaged checkpoints, random command lines: refused in one line, or harmless.

All seeds are fixed. corrupt.py holds the ways to damage a file; how bad input is worded:
test_bad_input.py. Links, virtual arrays and arrays never written, which are no damage:
test_loader.py.
"""

import copy
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields

import corrupt
import h5py
import kill_points
import numpy as np
import pytest
import torch

import calql_sera

# Short runs with little in them, so that a checkpoint is small; no number is the default.
RUN = (
    "--env hopper-medium-v2 --device cpu --offline-steps 5 --online-steps 40 --eval-every 40 "
    "--eval-episodes 1 --checkpoint-every 25 --batch-size 8 --sera-k 3 --hidden-dim 8 "
    "--gamma 0.98 --seed 3"
)


def one_line(text):
    """Neither empty nor spread over lines."""
    return len(text.splitlines()) == 1 and text.strip() != ""


def assert_only(allowed, outcomes):
    """Every outcome is one of these; else show the cases that are not."""
    assert outcomes
    wrong = [f"{case}: {outcome}" for case, outcome in outcomes.items() if outcome not in allowed]
    assert not wrong, f"{len(wrong)} of {len(outcomes)} cases\n" + "\n".join(wrong)


# ------------------------------ data files
@pytest.fixture
def load(tmp_path):
    """Writes bytes, or what a function leaves at a path, into a new folder; how loading it ends."""
    folders = iter(range(1000))

    def run(damage, script=calql_sera):
        path = tmp_path / f"{next(folders)}" / "x.hdf5"
        path.parent.mkdir()
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            damage(path)
        return corrupt.try_to_load(script.load_d4rl, path)

    return run


def write_whole(arrays, storage=corrupt.FLAT):
    """A function that stores these arrays."""
    return lambda path: corrupt.write(path, arrays, storage)


@pytest.mark.parametrize("storage", [corrupt.FLAT, corrupt.CHUNKED], ids=["flat", "chunked"])
def test_control(storage, load):
    """What the damage starts from is correct, also as columns (N, 1) and in other types."""
    arrays = corrupt.columns()
    other = {name: array.astype(np.float64) for name, array in arrays.items()}
    other["terminals"] = arrays["terminals"].astype(np.int16)
    other["timeouts"] = arrays["timeouts"].astype(np.uint64)
    columns = {name: array.reshape(corrupt.ROWS, -1) for name, array in other.items()}
    outcomes = {
        "as it is": load(write_whole(arrays, storage)),
        "other types": load(write_whole(other, storage)),
        "(N, 1)": load(write_whole(columns, storage)),
    }
    assert_only(["loaded"], outcomes)


# Kinds of damage that leave nothing of an array's name: timeouts are counted then. A group, a type
# or a link to nothing in their place is damage.
ABSENT = ("missing", "renamed", "renamed with a space", "in capitals", "in a group")
ABSENT += ("attribute in its place",)


@pytest.mark.parametrize("kind", [*corrupt.REPLACED, *corrupt.MOVED])
def test_damaged_array(kind, load):
    """One array after the other with this kind of damage; timeouts may be absent."""
    _, names = corrupt.REPLACED.get(kind, (None, corrupt.NAMES))
    outcomes = {}
    for seed, name in enumerate(names):
        damage = functools.partial(corrupt.damage_array, kind=kind, name=name, seed=seed)
        outcomes[name] = load(damage)
    if kind in ABSENT:
        assert_only(["loaded"], {"timeouts": outcomes.pop("timeouts")})
    assert_only(["refused"], outcomes)


def test_damaged_array_in_every_script(script, load):
    """The six loaders agree on a few kinds."""
    outcomes = {}
    for kind in ("missing", "external link to nothing", "transposed", "null dataspace", "infinity"):
        damage = functools.partial(corrupt.damage_array, kind=kind, name="observations", seed=0)
        outcomes[kind] = load(damage, script)
    assert_only(["refused"], outcomes)


def test_swapped_arrays(load):
    """Two arrays in each other's place; only terminals and timeouts look the same."""
    outcomes = {}
    for left, right in corrupt.SWAPS:
        arrays = corrupt.columns()
        arrays[left], arrays[right] = arrays[right], arrays[left]
        outcomes[f"{left} and {right}"] = load(write_whole(arrays))
    assert_only(["refused"], outcomes)


def test_damaged_as_a_whole(load, tmp_path):
    """No rows, one, timeouts only, arrays in a group; a dangling link, other kinds of files."""
    arrays = corrupt.columns()
    outside = corrupt.write(tmp_path / "outside.hdf5", arrays)
    body = outside.read_bytes()
    all_timeouts = np.ones(corrupt.ROWS, bool)
    but_the_last = np.arange(corrupt.ROWS) < corrupt.ROWS - 1
    cases = {
        "no arrays": write_whole({}),
        "no rows": write_whole({name: array[:0] for name, array in arrays.items()}),
        "one row": write_whole(corrupt.columns(rows=1)),
        "timeouts only": write_whole(arrays | {"timeouts": all_timeouts}),
        "timeouts up to the last row": write_whole(arrays | {"timeouts": but_the_last}),
        "all in a group": write_whole({f"data/{name}": array for name, array in arrays.items()}),
        "all empty": write_whole(dict.fromkeys(arrays, h5py.Empty("f4"))),
        "no file": lambda path: None,
        "a link to nothing": lambda path: path.symlink_to(tmp_path / "nowhere"),
        "text": b"observations,actions\n" * 200,
        "zeros": bytes(len(body)),
        "backwards": body[::-1],
        "less its first byte": body[1:],
        "signature alone": body[:8],
        "signature of something else": b"PK\x03\x04" + body[4:],
        "pickle": pickle.dumps(arrays),
    }
    assert_only(["refused"], {case: load(damage) for case, damage in cases.items()})


@pytest.mark.parametrize("storage", [corrupt.FLAT, corrupt.CHUNKED], ids=["flat", "chunked"])
def test_truncated_file(storage, load, tmp_path):
    """Cut anywhere."""
    body = corrupt.write(tmp_path / "x.hdf5", corrupt.columns(), storage).read_bytes()
    cuts = corrupt.truncations(body, 16, 0)
    assert_only(["refused"], {case: load(cut) for case, cut in cuts.items()})


def test_flipped_bytes(tmp_path):
    """Bytes overwritten, in another process: refused, or loaded as arrays that are sound."""
    cases = 90
    command = [sys.executable, "-B", corrupt.__file__, "calql_sera", str(tmp_path), str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    outcomes = dict.fromkeys(range(cases), "no report")
    outcomes |= {row["case"]: row["outcome"] for row in rows}
    assert_only(["refused", "loaded"], outcomes)
    assert done.returncode == 0, done.stderr
    assert set(outcomes.values()) == {"refused", "loaded"}  # else the damage is too weak or strong


# ------------------------------ checkpoints
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A script's finished run: its folder. Each is made once."""
    folders = {}

    def run(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            data = corrupt.write(folder / "data.hdf5", corrupt.columns())
            argv = [*RUN.split(), "--dataset-path", str(data), "--run-dir", str(folder / "run")]
            importlib.import_module(name).main(argv)
            folders[name] = folder / "run"
        return folders[name]

    return run


@functools.cache
def environments(name):
    """A script's make_env that makes each environment once: nothing here takes a step in one."""
    return functools.cache(importlib.import_module(name).make_env)


@pytest.fixture
def resume(finished, tmp_path, capsys, monkeypatch):
    """Resumes a run with another checkpoint in it, up to training.

    refused: code 2, one line on stderr, files as before. same: let through, and then the whole
    state is bit for bit that of the undamaged checkpoint. Anything else says what went wrong.
    """
    folder = tmp_path / "run"

    def run(name, body):
        script = importlib.import_module(name)
        original = finished(name)
        monkeypatch.setattr(script, "train", lambda run, args: run.lock.release())
        monkeypatch.setattr(script, "make_env", environments(name))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        (folder / "checkpoint.pt").write_bytes(body)
        before = corrupt.contents(folder)
        capsys.readouterr()
        try:
            script.main(["--run-dir", str(folder), "--resume"])
        except SystemExit as error:
            stderr = capsys.readouterr().err
            if error.code != 2 or not stderr.startswith("error: ") or not one_line(stderr):
                return f"exit code {error.code}: {stderr}"
            unchanged = corrupt.contents(folder) == before
            return "refused" if unchanged else "refused, but files have changed"
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        same = kill_points.differences(state_of(folder), state_of(original)) == []
        return "same" if same else "let through, with another state"

    return run


def state_of(folder):
    """The checkpoint in a run's folder, less where the run is and that it was resumed."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["args"] |= {"run_dir": None, "resume": None}
    return state


def as_bytes(checkpoint, **options):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(checkpoint, file, **options)
    return file.getvalue()


def sealed(body):
    """The body with the seal of save_checkpoint behind it."""
    return body + hashlib.sha256(body).digest()


@pytest.fixture
def checkpoint_of(finished):
    """The checkpoint of a script's finished run."""
    return lambda name: torch.load(finished(name) / "checkpoint.pt", weights_only=True)


def edited(checkpoint, where, edit):
    """A copy in which the element at a path of keys is edit(element), or left out if it is None."""
    checkpoint = copy.deepcopy(checkpoint)
    *path, last = where
    parent = functools.reduce(lambda part, key: part[key], path, checkpoint)
    if edit is None:
        del parent[last]
    else:
        parent[last] = edit(parent[last])
    return checkpoint


def one_more(tensor):
    """The tensor with 1 added to its first element."""
    tensor = tensor.clone()
    tensor.view(-1)[0] += 1
    return tensor


# What may happen to any tensor with more than one element.
TENSOR_EDITS = {
    "dropped": None,
    "one element changed": one_more,
    "flat and longer": lambda x: torch.cat([x.reshape(-1), x.reshape(-1)]),
    "less a row": lambda x: x[:-1].clone(),
    "last axis of one": lambda x: x[..., None].clone(),
    "axis in front": lambda x: x[None].clone(),
    "one number": lambda x: x.reshape(-1)[0].clone(),
    "no rows": lambda x: x[:0].clone(),
    "another type": lambda x: x.to(torch.complex64),
    "None": lambda x: None,
    "text": lambda x: "text",
    "empty list": lambda x: [],
}
TENSORS = {
    "agent": ("agent", "critics.layers.0.weight"),
    "bonus_agent": ("bonus_agent", "critics.layers.0.weight"),
    "optimizer": ("optimizer", "state", 0, "exp_avg"),
    "online_rows": ("online_rows",),
    "rng_cpu": ("rng_cpu",),
}


@pytest.mark.parametrize("part", TENSORS)
def test_edited_tensor(part, checkpoint_of, finished, resume):
    """A checkpoint with one tensor changed, saved anew, with the old seal or without one."""
    checkpoint = checkpoint_of("sac_sera")
    old_seal = (finished("sac_sera") / "checkpoint.pt").read_bytes()[-32:]
    outcomes = {}
    for label, edit in TENSOR_EDITS.items():
        body = as_bytes(edited(checkpoint, TENSORS[part], edit))
        outcomes[f"{label}, not sealed"] = resume("sac_sera", body)
        outcomes[f"{label}, old seal"] = resume("sac_sera", body + old_seal)
    assert_only(["refused"], outcomes)


def test_edited_keys(checkpoint_of, finished, resume):
    """A checkpoint with one of its parts left out, renamed, or of another kind."""
    checkpoint = checkpoint_of("calql_sera")
    old_seal = (finished("calql_sera") / "checkpoint.pt").read_bytes()[-32:]
    outcomes = {}
    for key, value in checkpoint.items():
        rest = {other: part for other, part in checkpoint.items() if other != key}
        assert value != "text"
        for label, changed in {
            "left out": rest,
            "renamed": rest | {f"{key}_": value},
            "text": rest | {key: "text"},
        }.items():
            outcomes[f"{key}: {label}"] = resume("calql_sera", as_bytes(changed) + old_seal)
    assert_only(["refused"], outcomes)


def test_sealed_anew(checkpoint_of, finished, resume):
    """The control, and edits that lose nothing, sealed anew: refused, or the very same state."""
    body = (finished("sac_sera") / "checkpoint.pt").read_bytes()
    assert resume("sac_sera", body) == "same"
    checkpoint = checkpoint_of("sac_sera")
    assert resume("sac_sera", sealed(as_bytes(checkpoint))) == "same"
    double = torch.Tensor.double
    cases = {
        "no normalizer": edited(checkpoint, ("normalizer",), None),  # computed from the data
        "rows in float64": edited(checkpoint, ("online_rows",), double),
        "moments in float64": edited(checkpoint, ("optimizer", "state", 0, "exp_avg"), double),
        "a default argument lost": edited(checkpoint, ("args", "sera_scale"), None),
        "one argument more": edited(checkpoint, ("args",), lambda args: args | {"more": 1}),
        "one key more": checkpoint | {"more": 1},
    }
    outcomes = {case: resume("sac_sera", sealed(as_bytes(cases[case]))) for case in cases}
    old_format = as_bytes(checkpoint, _use_new_zipfile_serialization=False)
    outcomes["old format"] = resume("sac_sera", sealed(old_format))
    assert_only(["refused", "same"], outcomes)


class Trap:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Using a non-tuple sequence")
def test_files_that_are_no_checkpoint(checkpoint_of, finished, resume, tmp_path):
    """Empty, cut or foreign files, and pickles of objects, which are not executed; sealed too."""
    body = (finished("sac_sera") / "checkpoint.pt").read_bytes()
    checkpoint = checkpoint_of("sac_sera")
    trap = Trap(tmp_path / "executed")
    cases = corrupt.truncations(body, 10, 1)
    cases |= {"text": b"no checkpoint", "less its first byte": body[1:], "zeros": bytes(len(body))}
    contents = {
        "nothing": b"",
        "text": b"no checkpoint",
        "pickled object": pickle.dumps(trap),
        "saved object": as_bytes(trap),
        "object among the rest": as_bytes(checkpoint | {"evals": trap}),
        "object in the old format": as_bytes(trap, _use_new_zipfile_serialization=False),
        "object as argument": as_bytes(edited(checkpoint, ("args", "gamma"), lambda gamma: trap)),
        "data file": corrupt.write(tmp_path / "x.hdf5", corrupt.columns()).read_bytes(),
        "tensor": as_bytes(torch.zeros(3)),
        "list": as_bytes([checkpoint]),
        "None": as_bytes(None),
        "no script": as_bytes(edited(checkpoint, ("script",), None)),
        "another script": as_bytes(checkpoint | {"script": "cql_sera"}),
        "script of two lines": as_bytes(checkpoint | {"script": "two\nlines"}),
        "no arguments": as_bytes(edited(checkpoint, ("args",), None)),
        "arguments of no kind": as_bytes(checkpoint | {"args": None}),
        "an argument less": as_bytes(edited(checkpoint, ("args", "gamma"), None)),
        "an argument without a name": as_bytes(checkpoint | {"args": {7: 1}}),
    }
    cases |= {f"sealed, {case}": sealed(content) for case, content in contents.items()}
    assert_only(["refused"], {case: resume("sac_sera", damaged) for case, damaged in cases.items()})
    assert not trap.path.exists()
    pickle.loads(contents["pickled object"])
    assert trap.path.exists()  # so the trap does work


@pytest.mark.parametrize("name", ["sac_sera", "calql_sera"])
def test_flipped_bytes_of_a_checkpoint(name, finished, resume):
    """Bytes, runs and blocks overwritten: refused."""
    body = (finished(name) / "checkpoint.pt").read_bytes()
    seeds = range(100, 124) if name == "sac_sera" else range(200, 218)
    outcomes = {seed: resume(name, corrupt.damage_bytes(body, seed)) for seed in seeds}
    assert_only(["refused"], outcomes)


# ------------------------------ the command line
def test_damage_from_outside(checkpoint_of, finished, tmp_path):
    """The script as a program: damaged data and checkpoints end in code 2 and one line.

    One of each: all other damage is done to the functions, above. HDF5 would print lines of its
    own for the data.
    """
    original = finished("calql_sera")
    checkpoint = checkpoint_of("calql_sera")
    path = tmp_path / "x.hdf5"
    corrupt.damage_array(path, "broken gzip", "timeouts", 1)
    options = "--offline-steps 1 --online-steps 0 --eval-episodes 1 --device cpu"
    run_dir = tmp_path / "run"
    shutil.copytree(original, run_dir)
    trap = Trap(tmp_path / "executed")
    (run_dir / "checkpoint.pt").write_bytes(sealed(as_bytes(checkpoint | {"evals": trap})))
    commands = {
        "data": [*options.split(), "--dataset-path", str(path)],
        "checkpoint": ["--run-dir", str(run_dir), "--resume", "--device", "cpu"],
    }
    before = corrupt.contents(tmp_path)
    outcomes = {}
    for case, argv in commands.items():
        command = [sys.executable, "-B", calql_sera.__file__, *argv]
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
        done = subprocess.run(command, **options)
        as_expected = done.returncode == 2 and done.stdout == ""
        as_expected &= done.stderr.startswith("error: ") and one_line(done.stderr)
        outcomes[case] = "refused" if as_expected else f"{done.returncode}: {done.stderr[-200:]}"
    assert_only(["refused"], outcomes)
    assert corrupt.contents(tmp_path) == before


VALUES = (
    "",
    "nan",
    "-inf",
    "1e400",
    "-1e400",
    "1e-400",
    "1_000",
    "ü",
    "½",
    "٣",
    "9" * 400,
    "9" * 5000,
    "-" + "9" * 400,
    "1" + "0" * 308 + ".5",
    "0",
    "-0",
    "-1",
    "1",
    "7",
    "1.5",
    "1e6",
    "0x10",
    " 7 ",
    "True",
    "None",
    "null",
    "two words",
    "two\nlines",
    "-",
    "--",
    "=",
    "[1]",
    "q",
    "cpu",
    "hopper-medium-mini",
    "walker2d-medium-v2",
    "%s{0}[red]",
)


def random_argv(rng, names):
    """One to four options: mostly known, with any value; some misspelt, joined, doubled or cut."""
    argv = []
    for name in rng.choice(names, rng.choice([1, 1, 1, 2, 4])):
        value = VALUES[rng.integers(len(VALUES))]
        form = rng.integers(15)
        option = f"--{name}" if rng.random() < 0.3 else f"--{name.replace('_', '-')}"
        if form == 0:  # a letter is missing
            place = rng.integers(2, len(option))
            option = option[:place] + option[place + 1 :]
        elif form == 1:
            option = option.upper()
        elif form == 2:  # twice, with the same value
            argv += [option, value]
        parts = {3: [f"{option}={value}"], 4: [option], 5: [value]}
        argv += parts.get(form, [option, value])
    if rng.random() < 0.02:
        argv.append("--help")
    return argv


class Accepted(Exception):
    """Arguments have come as far as set_up."""


def outcome_of(script, argv, capsys):
    """What becomes of a command line: accepted, refused, tyro's own message, help, or a fault."""
    capsys.readouterr()
    try:
        script.main(argv)
    except Accepted as accepted:
        values = vars(accepted.args[0]).values()
        fine = all(math.isfinite(value) for value in values if isinstance(value, float))
        return "accepted" if fine else f"accepted: {accepted.args[0]}"
    except SystemExit as error:
        stderr = capsys.readouterr().err
        if error.code == 0 and "--help" in argv:
            return "help"
        if error.code != 2 or not stderr.strip():
            return f"exit {error.code}: {stderr}"
        if not stderr.startswith("error: "):
            return "tyro's own message"
        return "refused" if one_line(stderr) else f"several lines: {stderr}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not even set up"


@pytest.mark.parametrize("name", ["calql_sera", "td3bc_sera"])
def test_random_command_lines(name, capsys, monkeypatch, tmp_path):
    """Arguments, all of a sound type, or one line with the fix, or tyro's message and code 2."""

    def set_up(args, *others):
        raise Accepted(args)

    # With each of its messages tyro parses the script's text twice: once is enough.
    monkeypatch.setattr(inspect, "getsourcelines", functools.cache(inspect.getsourcelines))
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "set_up", set_up)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    names = [field.name for field in fields(script.Args)]
    (tmp_path / "two\nlines").mkdir()
    (tmp_path / "two\nlines" / "config.json").touch()
    command_lines = [["--resume", "--run-dir", "two\nlines"]]
    command_lines += [random_argv(rng, names) for _ in range(119)]
    outcomes = {}
    for case, argv in enumerate(command_lines):
        outcomes[f"{case} {argv!s:.300}"] = outcome_of(script, argv, capsys)
    assert_only(["accepted", "refused", "tyro's own message", "help"], outcomes)
    counts = Counter(outcomes.values())
    assert min(counts[outcome] for outcome in ("accepted", "refused", "tyro's own message")) > 5
