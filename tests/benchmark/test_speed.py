"""speed/speed.py: small runs, and that what it compares with is what it says."""

import importlib
import json
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "benchmark" / "speed"))
import speed


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """speed.py gives hopper other dimensions and environments, and sets threads: put all back."""
    threads = torch.get_num_threads()
    for name in SCRIPTS:
        script = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, script)
        monkeypatch.setitem(script.TASKS, "hopper", script.TASKS["hopper"])
        monkeypatch.setattr(script, "make_env", script.make_env)
    yield
    torch.set_num_threads(threads)


def test_speed(script, tmp_path, capsys):
    """Every phase of a script gets a line in the table and in the file, with a positive speed."""
    name, output = script.__name__, tmp_path / "speed.jsonl"
    speed.main(
        speed.Args((name,), (5, 2), 0.01, 1, compile=False, knn=False, threads=1, output=output)
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    kinds = {(line["phase"], line["coefficient"]) for line in lines if "phase" in line}
    assert kinds == {("offline update", "-"), ("online update", 0), ("online update", 1)}
    assert all(
        line["script"] == name and line["updates_per_second"] > 0
        for line in lines
        if "phase" in line
    )
    assert lines[0]["gflop"] > 0 and 0 < lines[0]["peak_fraction"] < 1.5
    assert capsys.readouterr().out.count(f"| {name} |") >= 3


def test_online_steps(script, tmp_path):
    """The script's own online phase, timed with an environment that costs nothing."""
    args = speed.Args((script.__name__,), threads=1)
    speed.write_data(tmp_path / "data.hdf5", args.shape)
    assert (
        speed.online_steps(
            speed.load(script.__name__, args.shape), args, str(tmp_path), 1, True, 20
        )
        > 0
    )


def test_plain_bonus(script):
    """What the bonus is compared with computes the same thing, but for how it treats equal rows."""
    torch.manual_seed(0)
    ours = speed.bonus_alone(script, "scripts", 64, 3, "cpu")()["entropy"]
    torch.manual_seed(0)
    torch.testing.assert_close(speed.bonus_alone(script, "plain", 64, 3, "cpu")()["entropy"], ours)


@pytest.mark.parametrize("technique", speed.techniques(), ids=lambda technique: technique["what"])
def test_techniques(technique, tmp_path):
    """Each technique can be undone in the scripts it names, and they still run."""
    args = speed.Args(shape=(5, 2), threads=1)
    speed.write_data(tmp_path / "data.hdf5", args.shape)
    for name in technique["scripts"]:
        script = speed.load(name, args.shape, speed.undone(technique, name))
        speed.offline_update(script, args, str(tmp_path), script.update)()
        speed.online_update(script, args, str(tmp_path), 1)()
