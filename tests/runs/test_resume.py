"""Runs killed with SIGKILL and resumed end like runs left alone, bit for bit. kill_points.py tries more."""

import kill_points
import pytest


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
    kill_and_resume(script.__name__, "update", 60 + 100, tmp_path / "run")
    assert kill_points.compare(alone(script.__name__), tmp_path / "run") == []


@pytest.mark.parametrize(
    ("place", "count"),
    [("update", 1), ("update", 40), ("evaluate", 3), ("fsync", 1), ("fsync", 3), ("replace", 4)],
)
def test_killed_anywhere(place, count, alone, tmp_path):
    """Before any update, offline, at the switch, half way through writing a checkpoint, before it counts."""
    kill_and_resume("sac_sera", place, count, tmp_path / "run")
    assert kill_points.compare(alone("sac_sera"), tmp_path / "run") == []


def test_comparison(alone, tmp_path):
    """The comparison is not blind: another seed differs in every part."""
    kill_points.run("sac_sera", tmp_path / "run", "--seed", "2")
    found = " ".join(kill_points.compare(alone("sac_sera"), tmp_path / "run"))
    for part in (
        "evals.csv",
        "/networks/actor",
        "/bonus_networks/critics",
        "/optimizer",
        "/online_rows",
        "/rng/cpu",
        "/rng/env",
    ):
        assert part in found
