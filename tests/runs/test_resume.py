"""Runs killed with SIGKILL and resumed end like runs left alone, bit for bit.

kill_points.py tries more places, random_options.py more options.
"""

import importlib
import random

import kill_points
import pytest
import random_options
import torch


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folders of runs that were left alone, by script; each is made once."""
    folders = {}

    def run(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "alone"
            kill_points.run(name, folders[name])
        return folders[name]

    return run


def kill_and_resume(name, place, count, folder):
    assert kill_points.run_and_die(name, folder, place, count)
    kill_points.resume(name, folder)


def test_killed_online(script, alone, tmp_path):
    """In the middle of an episode, after some checkpoints of the online phase."""
    kill_and_resume(script.__name__, "train_step", 60 + 100, tmp_path / "run")
    assert kill_points.compare(alone(script.__name__), tmp_path / "run") == []


@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("start_logs", 1),  # with its first checkpoint and nothing else
        ("train_step", 1),
        ("train_step", 40),
        ("evaluate", 3),  # at the start of the online phase
        ("fsync", 1),  # half way through writing the first checkpoint
        ("fsync", 3),
        ("replace", 1),
        ("replace", 4),  # a checkpoint is written, but does not count yet
        ("replaced", 4),  # it counts, and nothing else has been done
    ],
)
def test_killed_anywhere(place, count, alone, tmp_path):
    """Before any update, offline, between the phases, and around each stage of a checkpoint."""
    kill_and_resume("sac_sera", place, count, tmp_path / "run")
    assert kill_points.compare(alone("sac_sera"), tmp_path / "run") == []


def test_killed_from_scratch(tmp_path):
    """Without a dataset, whose transitions lay out the buffer."""
    options = ["--offline-steps", "0", "--mixing-ratio", "0", "--learning-starts", "20"]
    kill_points.run("sac_sera", tmp_path / "alone", *options)
    assert kill_points.run_and_die("sac_sera", tmp_path / "run", "train_step", 60, *options)
    kill_points.resume("sac_sera", tmp_path / "run")
    assert kill_points.compare(tmp_path / "alone", tmp_path / "run") == []


@pytest.mark.parametrize("number", [0, 3])
def test_random_options(number, script, tmp_path):
    """Options that nobody chose to be together; of both phases, and without a dataset."""
    case = random_options.draw(script.__name__, random.Random(number), number)
    _, found = random_options.compare_with_resumed(case, tmp_path)
    assert found == [], str(case)


def test_comparison(alone, tmp_path):
    """The comparison is not blind: another seed differs in every part."""
    kill_points.run("sac_sera", tmp_path / "run", "--seed", "2")
    found = kill_points.compare(alone("sac_sera"), tmp_path / "run")
    parts = ("evals.csv", "/agent/actor", "/bonus_agent/critics", "/optimizer", "/online_rows")
    for part in (*parts, "/rng_cpu", "/rng_env"):
        assert any(place.startswith(part) for place in found), part


def test_threads_of_a_resumed_run(tmp_path, monkeypatch):
    """The checkpoint's number of threads holds before the frozen critics are asked again."""
    script = importlib.import_module("sac_sera")
    steps = ["--offline-steps", "2", "--online-steps", "2"]
    kill_points.run("sac_sera", tmp_path / "run", "--threads", "2", *steps)
    seen = []

    def store_bonus_q(*inputs):
        seen.append(torch.get_num_threads())
        return original(*inputs)

    original = script.store_bonus_q
    monkeypatch.setattr(script, "store_bonus_q", store_bonus_q)
    torch.set_num_threads(1)
    try:
        script.main(["--run-dir", str(tmp_path / "run"), "--resume"])
    finally:
        torch.set_num_threads(1)
    assert seen == [2]
