"""studies/run.py: a small grid goes through Ray; studies/analyse.py: its measures."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("ray", reason="ray is not installed: pip install -r benchmark/requirements.txt")
sys.path.insert(0, str(ROOT / "benchmark" / "studies"))
import analyse
import run

GRID = """
title = "A small grid"
baseline = "plain"
scripts = ["td3bc_sera"]
envs = ["hopper-medium-mini"]
seeds = [1, 2]
options = "{}--offline-steps 6 --online-steps 12 --eval-every 6 --eval-episodes 1 --batch-size 8"

[script_options]
td3bc_sera = "--sera-k 2"

[critics]
few = "--offline-steps 2"

[variants]
plain = "--sera-coef 0"
sera = "--sera-scale dim"
"""
BROKEN = """
broken = { options = "--sera-critic random --sera-bonus nonsense", critics = "few" }
"""


def grid_file(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "grid.toml").write_text(text.replace("{}", ""))
    return folder / "grid.toml"


def start(grid: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    script = ROOT / "benchmark" / "studies" / "run.py"
    command = [sys.executable, str(script), str(grid), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_grid(tmp_path):
    """2 variants x 2 seeds, and one that fails: what is run, gathered, shared, skipped."""
    grid = grid_file(tmp_path / "study", GRID + BROKEN)
    done = start(grid, tmp_path / "out", "--retries", "1")
    assert done.returncode == 1, done.stderr
    summary = (
        done.stdout[done.stdout.index("10 runs") :].strip().splitlines()
    )  # Ray has its say before
    assert summary[0] == "10 runs, 2 failed" and len(summary) == 3
    assert all(
        "broken" in line and "exit code 2" in line and "nonsense" in line for line in summary[1:]
    )
    names = {f"td3bc_sera__hopper-medium-mini__{v}__{s}" for v in ("plain", "sera") for s in (1, 2)}
    assert {path.stem for path in (tmp_path / "study" / "runs").iterdir()} == names
    commands = json.loads((tmp_path / "study" / "commands.json").read_text())
    assert commands.keys() == names
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    offline = sum("offline" in name for name in folders)
    assert offline == 4 and len(folders) == 10  # of two seeds, and their few

    # A run that shares its offline phase is the one that a single process gives.
    words = commands["td3bc_sera__hopper-medium-mini__sera__2"].split()
    assert words[0] == "td3bc_sera.py"
    importlib.import_module("td3bc_sera").main([*words[1:], "--run-dir", str(tmp_path / "whole")])
    gathered = tmp_path / "study" / "runs" / "td3bc_sera__hopper-medium-mini__sera__2.csv"
    assert gathered.read_bytes() == (tmp_path / "whole" / "evals.csv").read_bytes()

    # Without the broken variant all is there, even where the folders of the runs are gone; a lost
    # CSV is not.
    grid.write_text(GRID.replace("{}", ""))
    shutil.rmtree(tmp_path / "out")
    assert start(grid, tmp_path / "out").stdout == "0 runs, 0 failed\n"
    gathered.unlink()
    lines = start(grid, tmp_path / "out", "--dry-run").stdout.splitlines()
    assert len(lines) == 2 and "--online-steps 0" in lines[0] and "--seed 2" in lines[0]
    assert lines[1].startswith("mkdir -p") and lines[1].endswith("--resume")
    assert "--sera-scale dim" in lines[1]

    # Other options under the same names are no reason to skip.
    grid.write_text(GRID.replace("{}", "--gamma 0.9 "))
    done = start(grid, tmp_path / "out")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and "other options" in done.stderr
    )


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("scripts", "script", "scripts"),
        ("td3bc_sera", "td9_sera", "td9_sera.py"),
        ("[1, 2]", "[]", "seeds"),
        ("--online-steps 12", "", "--online-steps"),
        (
            '"--sera-scale dim"',
            '{ options = "--sera-k 3", critics = "few" }',
            "--sera-critic random",
        ),
    ],
)
def test_bad_grid(old, new, part, tmp_path):
    """What a grid lacks is named."""
    with pytest.raises(ValueError, match=part):
        run.plan(grid_file(tmp_path / "study", GRID.replace(old, new)), tmp_path)


def test_variants_with_offline_phases_of_their_own(tmp_path):
    """A variant that changes more than --sera-* starts anew; equal runs share a folder."""
    text = GRID.replace('"--sera-coef 0"', '"--gamma 0.9"')
    runs = run.plan(grid_file(tmp_path / "a", text), tmp_path)
    plain = [item for item in runs if "__plain__" in item.name]
    assert all(item.start is None and "--gamma 0.9" in item.options for item in plain)
    others = run.plan(grid_file(tmp_path / "b", GRID), tmp_path)
    shared = {item.folder for item in runs} & {item.folder for item in others}
    assert len(shared) == 4  # two offline phases and the two runs of sera
    assert len({item.folder for item in others}) == len(others) == 6


def test_other_critics(tmp_path):
    """A variant with critics starts from its offline phase, with others behind the bonus."""
    text = GRID + '\nfew = { options = "--sera-critic random", critics = "few" }\n'
    runs = run.plan(grid_file(tmp_path / "study", text), tmp_path)
    (item,) = [item for item in runs if item.name.endswith("__few__1")]
    script = importlib.import_module(item.script)
    for offline in item.before():
        script.main(offline.command()[2:])
    run.prepare(item)
    own, start, other = (
        script.read_checkpoint(folder / "checkpoint.pt")
        for folder in (item.folder, item.start.folder, item.critics.folder)
    )
    assert own["phase"] == "offline" and own["step"] == 6
    for name, value in own["agent"].items():
        assert value.equal(start["agent"][name])
        assert own["bonus_agent"][name].equal(other["agent"][name])
    assert not own["agent"]["critics.layers.0.weight"].equal(
        own["bonus_agent"]["critics.layers.0.weight"]
    )
    script.main(item.command()[2:])  # goes on with them


# ------------------------------ measures
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_entropy(dimension):
    """Of a normal distribution: d/2 log(2 pi e); of duplicates: low, not minus infinity."""
    points = np.random.default_rng(0).normal(size=(4000, dimension))
    assert analyse.knn_entropy(points) == pytest.approx(
        dimension / 2 * np.log(2 * np.pi * np.e), abs=0.08
    )
    assert np.isfinite(analyse.knn_entropy(np.ones((10, dimension))))


def test_cells():
    """Uniform points on the plane of the data are nearly uniform, one point is log 900 away."""
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.normal(size=(4, 4)))[0][:2] * [[5], [2]]
    cells = analyse.Cells(rng.uniform(-1, 1, size=(100_000, 2)) @ plane + 7)
    points = rng.uniform(-0.98, 0.98, size=(100_000, 2)) @ plane + 7
    assert 0 < cells.kl_to_uniform(points) < 0.05
    assert cells.kl_to_uniform(points[:1]) == pytest.approx(np.log(900))


def test_discounted_returns():
    """1 + 0.5 * (2 + 0.5 * 4) = 3, from the front."""
    assert analyse.discounted_returns([1, 2, 4], 0.5) == [3, 4, 4]


def test_bad_input(tmp_path, capsys):
    """One sentence and exit code 2: no grid file, no finished run, no such option."""
    assert run.main([str(tmp_path / "grid.toml"), "--dry-run"]) == 2
    assert "grid.toml" in capsys.readouterr().err
    grid = grid_file(tmp_path / "study", GRID)
    assert analyse.main([str(grid), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no finished run of {grid}") and error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        run.main([str(grid), "--no-such-option"])


def test_analyse(tmp_path):
    """Its two tables from the checkpoints of a grid's runs."""
    grid = grid_file(tmp_path / "study", GRID)
    (item,) = [run for run in run.plan(grid, tmp_path) if run.name.endswith("__sera__1")]
    script = importlib.import_module("td3bc_sera")
    script.main(
        [
            *GRID.split('"{}')[1].split('"')[0].split(),
            "--sera-k",
            "2",
            "--run-dir",
            str(item.folder),
        ]
        + ["--env", "hopper-medium-mini"]
    )
    (item.folder / "finished").touch()
    options = ["--out", str(tmp_path), "--episodes", "1", "--points", "2"]
    assert analyse.main([str(grid), *options]) == 0
    coverage, bias = (
        (tmp_path / "study" / f"{name}.csv").read_text().splitlines()
        for name in ("coverage", "bias")
    )
    assert coverage[0].endswith("step,entropy,kl_to_uniform") and len(coverage) == 3
    assert coverage[2].split(",")[:5] == ["td3bc_sera", "hopper-medium-mini", "sera", "1", "12"]
    q, returns, difference = map(float, bias[1].split(",")[4:])
    assert difference == pytest.approx(q - returns, abs=0.02) and len(bias) == 2
