"""Damaged data files, damaged checkpoints and random command lines: refused in one line, or harmless.

All seeds are fixed. mutate.py holds the ways to damage a file. How bad input is worded: test_bad_input.py.
"""

import copy
import functools
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
import tracemalloc
from dataclasses import fields
from pathlib import Path

import h5py
import kill_points
import mutate
import numpy as np
import pytest
import torch

import calql_sera

# Short runs with little in them, so that a checkpoint is small; no number is the default.
RUN = (
    "--env hopper-medium-v2 --device cpu --offline-steps 5 --online-steps 40 --eval-every 40 "
    "--eval-episodes 1 --checkpoint-every 25 --batch-size 8 --sera-k 3 --hidden-dim 8 --gamma 0.98 --seed 3"
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
    """Writes bytes, or what a function leaves at a path, into a new folder: what load_d4rl makes of it."""
    folders = iter(range(1000))

    def run(damage, script=calql_sera):
        path = tmp_path / f"{next(folders)}" / "x.hdf5"
        path.parent.mkdir()
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            damage(path)
        return mutate.try_to_load(script.load_d4rl, path)

    return run


def write_whole(arrays, storage=mutate.FLAT):
    """A function that stores these arrays."""
    return lambda path: mutate.write(path, arrays, storage)


@pytest.mark.parametrize("storage", [mutate.FLAT, mutate.CHUNKED], ids=["flat", "chunked"])
def test_control(storage, load):
    """What the damage starts from is correct, also with rewards and flags (N, 1) and in other types."""
    arrays = mutate.columns()
    other = {name: array.astype(np.float64) for name, array in arrays.items()}
    other |= {"terminals": arrays["terminals"].astype(np.int16), "timeouts": arrays["timeouts"].astype("u8")}
    columns = {name: array.reshape(mutate.ROWS, -1) for name, array in other.items()}
    cases = {"as it is": arrays, "other types": other, "(N, 1)": columns}
    assert_only(["loaded"], {case: load(write_whole(x, storage)) for case, x in cases.items()})


@pytest.mark.parametrize("kind", [*mutate.REPLACED, *mutate.MOVED])
def test_damaged_array(kind, load):
    """One array after the other with this kind of damage."""
    outcomes = {}
    for seed, name in enumerate(mutate.REPLACED.get(kind, (None, mutate.NAMES))[1]):
        damage = functools.partial(mutate.damage_array, kind=kind, name=name, seed=seed)
        outcomes[name] = load(damage)
    assert_only(["refused"], outcomes)


def test_damaged_array_in_every_script(script, load):
    """The six loaders agree on a few kinds."""
    outcomes = {}
    for kind in ("missing", "external link", "transposed", "null dataspace", "infinity"):
        damage = functools.partial(mutate.damage_array, kind=kind, name="observations", seed=0)
        outcomes[kind] = load(damage, script)
    assert_only(["refused"], outcomes)


def test_swapped_arrays(load):
    """Two arrays in each other's place; only terminals and timeouts look the same."""
    outcomes = {}
    for left, right in mutate.SWAPS:
        arrays = mutate.columns()
        arrays[left], arrays[right] = arrays[right], arrays[left]
        outcomes[f"{left} and {right}"] = load(write_whole(arrays))
    assert_only(["refused"], outcomes)


def test_damaged_as_a_whole(load, tmp_path):
    """No rows, a single one, time-outs only, arrays in a group; a folder, a dangling link, other files."""
    arrays = mutate.columns()
    outside = mutate.write(tmp_path / "outside.hdf5", arrays)
    body = outside.read_bytes()
    cases = {
        "no arrays": write_whole({}),
        "no rows": write_whole({name: array[:0] for name, array in arrays.items()}),
        "one row": write_whole(mutate.columns(rows=1)),
        "time-outs only": write_whole(arrays | {"timeouts": np.ones(mutate.ROWS, bool)}),
        "time-outs up to the last row": write_whole(arrays | {"timeouts": np.arange(mutate.ROWS) < 29}),
        "all in a group": write_whole({f"data/{name}": array for name, array in arrays.items()}),
        "all empty": write_whole(dict.fromkeys(arrays, h5py.Empty("f4"))),
        "a folder": Path.mkdir,
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


@pytest.mark.parametrize("storage", [mutate.FLAT, mutate.CHUNKED], ids=["flat", "chunked"])
def test_truncated_file(storage, load, tmp_path):
    """Cut anywhere."""
    body = mutate.write(tmp_path / "x.hdf5", mutate.columns(), storage).read_bytes()
    assert_only(["refused"], {case: load(cut) for case, cut in mutate.truncations(body, 16, 0).items()})


def test_false_length_takes_no_memory(tmp_path):
    """A few bytes may claim any number of rows: shapes are compared before such an array is read."""
    path = mutate.write(tmp_path / "x.hdf5", mutate.columns())
    with h5py.File(path, "r+") as file:
        del file["rewards"]
        file.create_dataset("rewards", (4_000_000,), "f4", chunks=(1000,), compression="gzip")
    tracemalloc.start()
    try:
        assert mutate.try_to_load(calql_sera.load_d4rl, path) == "refused"
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_flipped_bytes(tmp_path):
    """Bytes, runs and blocks overwritten: refused, or loaded as arrays that are sound. In another process."""
    cases = 90
    command = [sys.executable, "-B", mutate.__file__, "calql_sera", str(tmp_path), str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    outcomes = dict.fromkeys(range(cases), "no report") | {row["case"]: row["outcome"] for row in rows}
    assert_only(["refused", "loaded"], outcomes)
    assert done.returncode == 0, done.stderr
    assert set(outcomes.values()) == {"refused", "loaded"}  # else the damage is too weak or too strong


# ------------------------------ checkpoints
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A script's finished run: its folder. Each is made once."""
    folders = {}

    def run(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            data = mutate.write(folder / "data.hdf5", mutate.columns())
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

    refused: code 2, one line on stderr, files as before. same: let through, and then the whole state is bit
    for bit that of the undamaged checkpoint. Anything else says what went wrong.
    """
    folder = tmp_path / "run"

    def run(name, body):
        script, original = importlib.import_module(name), finished(name)
        monkeypatch.setattr(script, "train", lambda args, state: state.lock.lock.release())
        monkeypatch.setattr(script, "make_env", environments(name))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        (folder / "checkpoint.pt").write_bytes(body)
        before = mutate.contents(folder)
        capsys.readouterr()
        try:
            script.main(["--run-dir", str(folder), "--resume"])
        except SystemExit as error:
            stderr = capsys.readouterr().err
            if error.code != 2 or not stderr.startswith("error: ") or not one_line(stderr):
                return f"exit code {error.code}: {stderr}"
            return "refused" if mutate.contents(folder) == before else "refused, but files have changed"
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        return "same" if state_of(folder) == state_of(original) else "let through, with another state"

    return run


class State:
    """A checkpoint as it counts: all but where the run is and that it was resumed."""

    def __init__(self, checkpoint):
        self.parts = checkpoint | {"args": checkpoint["args"] | {"run_dir": None, "resume": None}}

    def __eq__(self, other):
        try:
            return kill_points.differences(self.parts, other.parts) == []
        except (TypeError, AttributeError):  # not even of one type
            return False


def state_of(folder):
    """The state in a run's folder."""
    return State(torch.load(folder / "checkpoint.pt", weights_only=True))


def as_bytes(checkpoint, **options):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(checkpoint, file, **options)
    return file.getvalue()


def edited(checkpoint, where, edit):
    """A copy in which the element at a path of keys is edit(element), or is left out if edit is None."""
    checkpoint = copy.deepcopy(checkpoint)
    *path, last = where
    parent = functools.reduce(lambda part, key: part[key], path, checkpoint)
    if edit is None:
        del parent[last]
    else:
        parent[last] = edit(parent[last])
    return checkpoint


def moved(old, new):
    """An edit that renames a key of a dictionary."""
    return lambda part: {new if key == old else key: value for key, value in part.items()}


def put(value):
    """An edit that puts this in place of what there is."""
    return lambda _: value


def first_element(value):
    """An edit that replaces the first element of a tensor."""

    def edit(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return edit


# What may happen to any tensor with more than one element.
TENSOR_EDITS = {
    "dropped": None,
    "flat and longer": lambda x: torch.cat([x.reshape(-1), x.reshape(-1)]),
    "less a row": lambda x: x[:-1].clone(),
    "last axis of one": lambda x: x[..., None].clone(),
    "axis in front": lambda x: x[None].clone(),
    "one number": lambda x: x.reshape(-1)[0].clone(),
    "no rows": lambda x: x[:0].clone(),
    "int64": lambda x: x.long(),
    "float16": lambda x: x.half(),
    "complex64": lambda x: x.to(torch.complex64),
    "NaN": first_element(math.nan),
    "infinity": first_element(math.inf),
    "None": put(None),
    "text": put("text"),
    "empty list": put([]),
}


def tensor_cases(*where, but=()):
    """A case for each of TENSOR_EDITS."""
    return {f"{where} {label}": (where, edit) for label, edit in TENSOR_EDITS.items() if label not in but}


def values(*where, put_in):
    """A case for each value."""
    return {f"{where} is {value!r:.30}": (where, put(value)) for value in put_in}


def network_cases(part):
    """Damage to the networks or to those of the bonus."""
    cases = tensor_cases(part, "critics", "weights.0")
    cases |= {f"{part} without {name}": ((part, name), None) for name in ("actor", "critics", "temperature")}
    cases[f"{part} renamed network"] = ((part,), moved("actor", "policy"))
    cases[f"{part} renamed tensor"] = ((part, "critics"), moved("weights.0", "weights.9"))
    cases[f"{part} one tensor more"] = ((part, "actor"), lambda x: x | {"more": torch.zeros(2)})
    cases[f"{part} swapped"] = ((part,), lambda x: x | {"actor": x["critics"], "critics": x["actor"]})
    cases |= values(part, put_in=[None, {}, [], "text", 7])
    return cases | values(part, "actor", put_in=[None, {}, []])


MISTYPED = {
    "env": [5, "nope", "two\nlines", None],
    "physics": ["new", None],
    "seed": ["three", None, 3.5, -3, 10**400],
    "offline_steps": ["five", math.nan, math.inf, None, 5.5],
    "online_steps": [[40], -math.inf],
    "batch_size": [8.5, -8, "8", {}],
    "gamma": ["0.98", None, math.nan, 7.0, 1j],
    "sera_coef": [math.inf, "1"],
    "sera_bonus": ["w", 1, None],
    "normalize_rewards": ["yes", None],
    "hidden_dim": [[8], 0],
    "dataset_path": [7, "nowhere.hdf5", "two\nlines", []],
}
GROUPS = {
    "keys": {f"without {key}": ((key,), None) for key in ("script", "args", "phase", "step", "evals")}
    | {f"without {key}": ((key,), None) for key in ("data_sha256", "networks", "bonus_networks")}
    | {f"without {key}": ((key,), None) for key in ("optimizer", "online_rows", "rng")}
    | {
        "renamed key": ((), moved("phase", "Phase")),
        "all renamed": ((), lambda c: {f"{k}_": c[k] for k in c}),
    },
    "networks": network_cases("networks"),
    "bonus_networks": network_cases("bonus_networks"),
    "optimizer": tensor_cases("optimizer", "state", 0, "exp_avg")
    | values("optimizer", "state", 1, "exp_avg_sq", put_in=[None, torch.zeros(1), torch.zeros(8, 11)])
    | values("optimizer", put_in=[None, {}, [], "text"])
    | values("optimizer", "state", put_in=[None, [], {0: None}, {}])
    | values("optimizer", "state", 0, put_in=[None, {}, {"step": 1}])
    | values("optimizer", "state", 0, "step", put_in=[None, "5", math.nan, -5.0])
    | values("optimizer", "param_groups", put_in=[None, [], {}])
    | values("optimizer", "param_groups", 0, "lr", put_in=[None, "1e-4", math.nan, -1.0])
    | values("optimizer", "param_groups", 0, "betas", put_in=[None, 0.9, (0.9,), (2.0, 2.0)])
    | values("optimizer", "param_groups", 0, "params", put_in=[None, [], [0, 0]])
    | {
        "no state": (("optimizer", "state"), None),
        "no groups": (("optimizer", "param_groups"), None),
        "no lr": (("optimizer", "param_groups", 0, "lr"), None),
        "state of one tensor lost": (("optimizer", "state", 0), None),
        "renamed moment": (("optimizer", "state", 0), moved("exp_avg", "momentum")),
        "one group less": (("optimizer", "param_groups"), lambda groups: groups[:-1]),
        "one group more": (("optimizer", "param_groups"), lambda groups: [*groups, groups[0]]),
    },
    "phase and step": values("phase", put_in=[None, 1, "Online", "", b"online", ["online"], "two\nlines"])
    | values("step", put_in=[None, "40", [40], math.nan, 40.5, -1, 10**30, torch.tensor([40, 40])]),
    "evals": values("evals", put_in=[None, 7, "text", {}, [None], [("offline", 5)], [[1, 2, 3, 4, 5, "x"]]]),
    "data and script": values("data_sha256", put_in=[None, 5, "0" * 64, "two\nlines", []])
    | values("script", put_in=[None, 3, "cql_sera", "two\nlines", ["sac_sera"], torch.zeros(2)]),
    "args": values("args", put_in=[None, {}, [], "text", 7])
    | {f"args without {x}": (("args", x), None) for x in ("seed", "batch_size", "gamma", "eval_every")}
    | {"renamed argument": (("args",), moved("gamma", "discount"))}
    | {"one argument more": (("args",), lambda args: args | {"more": 1})}
    | {"argument without a name": (("args",), lambda args: args | {7: 1})},
    "mistyped args": {
        case: edit
        for name, wrong in MISTYPED.items()
        for case, edit in values("args", name, put_in=wrong).items()
    },
    "online_rows": tensor_cases("online_rows", "rewards")
    | tensor_cases("online_rows", "observations")
    | {f"no {x}": (("online_rows", x), None) for x in ("actions", "next_observations", "terminals")}
    | {f"{x} as flags": (("online_rows", x), torch.Tensor.bool) for x in ("terminals", "actions")}
    | values("online_rows", put_in=[None, {}, [], "text"])
    | {
        "one column for all": (("online_rows", "observations"), lambda x: x[:, :1].clone()),
        "one row for all": (("online_rows", "observations"), lambda x: x[:1].clone()),
        "wider": (("online_rows", "actions"), lambda x: torch.cat([x, x], 1)),
        "renamed column": (("online_rows",), moved("actions", "action")),
        "more rows than steps": (("online_rows",), lambda x: {k: torch.cat([v, v, v]) for k, v in x.items()}),
    },
    "rng": values("rng", put_in=[None, {}, [], "text"])
    | values("rng", "cpu", put_in=[None, [], "text", torch.zeros(9), torch.zeros(9, dtype=torch.uint8)])
    | values("rng", "cuda", put_in=[None, 7])
    | values("rng", "env", put_in=[None, {}, "text", {"bit_generator": "MT19937"}])
    | {
        "no cpu": (("rng", "cpu"), None),
        "no env": (("rng", "env"), None),
        "all zeros": (("rng", "cpu"), torch.zeros_like),
        "one byte less": (("rng", "cpu"), lambda x: x[:-1].clone()),
        "renamed": (("rng",), moved("env", "environment")),
        "other generator": (("rng", "env"), lambda x: x | {"bit_generator": "MT19937"}),
        "no numbers": (("rng", "env", "state"), put({})),
        "negative": (("rng", "env", "state", "state"), put(-1)),
    },
}


@pytest.mark.parametrize("group", GROUPS)
def test_edited_checkpoint(group, finished, resume):
    """What has the form of a checkpoint but is none."""
    checkpoint = torch.load(finished("sac_sera") / "checkpoint.pt", weights_only=True)
    outcomes = {}
    for case, (where, edit) in GROUPS[group].items():
        body = as_bytes(edited({"all": checkpoint}, ("all", *where), edit)["all"])
        outcomes[case] = resume("sac_sera", body)
    assert_only(["refused"], outcomes)


def test_edited_checkpoint_of_calql(finished, resume):
    """Cal-QL's own column and network."""
    checkpoint = torch.load(finished("calql_sera") / "checkpoint.pt", weights_only=True)
    labels = ("dropped", "less a row", "axis in front", "int64", "NaN")
    cases = tensor_cases("online_rows", "mc_returns", but=TENSOR_EDITS.keys() - {*labels})
    cases["no multiplier"] = (("networks", "lagrange"), None)
    cases |= values("args", "cql_weight", put_in=["5", math.nan]) | values("script", put_in=["cql_sera"])
    outcomes = {
        case: resume("calql_sera", as_bytes(edited(checkpoint, where, edit)))
        for case, (where, edit) in cases.items()
    }
    assert_only(["refused"], outcomes)


def test_harmless_edits(finished, resume):
    """The control, and edits that lose nothing: refused or not, the state has to be the very same."""
    body = (finished("sac_sera") / "checkpoint.pt").read_bytes()
    assert resume("sac_sera", body) == "same"
    checkpoint = torch.load(finished("sac_sera") / "checkpoint.pt", weights_only=True)
    cases = {
        "saved by another hand": ((), lambda x: x),
        "no normalizer": (("normalizer",), None),  # it is computed from the data
        "mistyped normalizer": (("normalizer",), put(None)),
        "rows in float64": (("online_rows", "observations"), torch.Tensor.double),
        "moments in float64": (("optimizer", "state", 0, "exp_avg"), torch.Tensor.double),
        "a default argument lost": (("args", "sera_scale"), None),
        "another run_dir": (("args", "run_dir"), put(7)),
        "one key more": ((), lambda x: x | {"more": 1}),
    }
    outcomes = {
        case: resume("sac_sera", as_bytes(edited({"all": checkpoint}, ("all", *where), edit)["all"]))
        for case, (where, edit) in cases.items()
    }
    outcomes["old format"] = resume("sac_sera", as_bytes(checkpoint, _use_new_zipfile_serialization=False))
    assert_only(["refused", "same"], outcomes)


class Trap:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_are_no_checkpoint(finished, resume, tmp_path):
    """Empty, cut or foreign files, and pickles of objects, which are not executed."""
    body = (finished("sac_sera") / "checkpoint.pt").read_bytes()
    checkpoint = torch.load(io.BytesIO(body), weights_only=True)
    trap = Trap(tmp_path / "executed")
    cases = mutate.truncations(body, 10, 1) | {
        "text": b"no checkpoint",
        "less its first byte": body[1:],
        "zeros": bytes(len(body)),
        "pickled object": pickle.dumps(trap),
        "saved object": as_bytes(trap),
        "object among the rest": as_bytes(checkpoint | {"evals": trap}),
        "object in the old format": as_bytes(trap, _use_new_zipfile_serialization=False),
        "object as argument": as_bytes(edited(checkpoint, ("args", "gamma"), put(trap))),
        "data file": mutate.write(tmp_path / "x.hdf5", mutate.columns()).read_bytes(),
        "tensor": as_bytes(torch.zeros(3)),
        "list": as_bytes([checkpoint]),
        "None": as_bytes(None),
    }
    assert_only(["refused"], {case: resume("sac_sera", damaged) for case, damaged in cases.items()})
    assert not trap.path.exists()
    pickle.loads(cases["pickled object"])
    assert trap.path.exists()  # so the trap does work


@pytest.mark.parametrize("name", ["sac_sera", "calql_sera"])
def test_flipped_bytes_of_a_checkpoint(name, finished, resume):
    """Bytes, runs and blocks overwritten: refused, unless nothing that counts was hit."""
    body = (finished(name) / "checkpoint.pt").read_bytes()
    seeds = range(100, 124) if name == "sac_sera" else range(200, 218)
    outcomes = {seed: resume(name, mutate.damage_bytes(body, seed)) for seed in seeds}
    assert_only(["refused", "same"], outcomes)


# ------------------------------ the command line
def test_damage_from_outside(finished, tmp_path):
    """The script as a program: five data files and five checkpoints, each in code 2 and one line."""
    original = finished("calql_sera")
    checkpoint = torch.load(original / "checkpoint.pt", weights_only=True)
    body = (original / "checkpoint.pt").read_bytes()
    checkpoints = {
        "cut": body[: len(body) // 2],
        "no phase": as_bytes(edited(checkpoint, ("phase",), None)),
        "other type": as_bytes(edited(checkpoint, ("args", "gamma"), put("high"))),
        "no network": as_bytes(edited(checkpoint, ("networks", "actor"), None)),
        "object": as_bytes(checkpoint | {"evals": Trap(tmp_path / "executed")}),
    }
    arrays = [
        ("one text", "rewards"),
        ("null dataspace", "observations"),
        ("external link", "actions"),
        ("complex", "terminals"),
        ("broken gzip", "timeouts"),
    ]
    commands = {}
    for seed, (kind, name) in enumerate(arrays):
        folder = tmp_path / f"data {seed}"
        folder.mkdir()
        mutate.damage_array(folder / "x.hdf5", kind, name, seed)
        options = "--offline-steps 1 --online-steps 0 --eval-episodes 1 --device cpu"
        commands[kind] = [*options.split(), "--dataset-path", str(folder / "x.hdf5")]
    for case, damaged in checkpoints.items():  # other numbers of steps would be refused for themselves
        shutil.copytree(original, tmp_path / case)
        (tmp_path / case / "checkpoint.pt").write_bytes(damaged)
        commands[case] = ["--run-dir", str(tmp_path / case), "--resume", "--device", "cpu"]
    outcomes, before = {}, mutate.contents(tmp_path)
    for case, argv in commands.items():
        command = [sys.executable, "-B", calql_sera.__file__, *argv]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        good = done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
        fine = good and one_line(done.stderr)
        outcomes[case] = "refused" if fine else f"{done.returncode}: {done.stderr[-200:]}"
    assert len(outcomes) == 10
    assert_only(["refused"], outcomes)
    assert mutate.contents(tmp_path) == before


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
    """One to four options: mostly known ones with any value, some misspelt, joined, doubled or cut short."""
    argv = []
    for name in rng.choice(names, rng.choice([1, 1, 1, 2, 4])):
        value, form = VALUES[rng.integers(len(VALUES))], rng.integers(15)
        option = f"--{name}" if rng.random() < 0.3 else f"--{name.replace('_', '-')}"
        if form == 0:
            place = rng.integers(2, len(option))
            option = option[:place] + option[place + 1 :]
        elif form == 1:
            option = option.upper()
        elif form == 2:
            argv += [option, value]  # once more, with the same value
        argv += {3: [f"{option}={value}"], 4: [option], 5: [value]}.get(form, [option, value])
    return argv + ["--help"] * (rng.random() < 0.02)


@pytest.mark.parametrize("name", ["calql_sera", "td3bc_sera"])
def test_random_command_lines(name, capsys, monkeypatch):
    """Arguments, all of a sound type, or a ValueError in one line, or argparse's own exit."""
    # With each of its messages tyro parses the script's text twice: once is enough.
    monkeypatch.setattr(inspect, "getsourcelines", functools.cache(inspect.getsourcelines))
    script, rng, outcomes, counts = importlib.import_module(name), np.random.default_rng(0), {}, {}
    names = [field.name for field in fields(script.Args)]
    for case in range(120):
        argv = ["--resume", "--run-dir", "two\nlines"] if case == 0 else random_argv(rng, names)
        try:
            args = script.parse_args(argv)
            numbers = [x for x in vars(args).values() if isinstance(x, (int, float))]
            outcome = "accepted" if all(math.isfinite(x) for x in numbers) else f"accepted: {args}"
        except ValueError as error:
            outcome = "refused" if one_line(str(error)) else f"several lines: {error}"
        except SystemExit as error:
            outcome = "help" if error.code == 0 and "--help" in argv else f"exit {error.code}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        outcomes[f"{case} {argv!s:.300}"] = outcome
        counts[outcome] = counts.get(outcome, 0) + 1
        capsys.readouterr()
    assert_only(["accepted", "refused", "help", "exit 2"], outcomes)
    assert min(counts.get(outcome, 0) for outcome in ("accepted", "refused", "exit 2")) > 5, counts
