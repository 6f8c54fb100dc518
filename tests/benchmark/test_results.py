"""docs/results: its tables are those that the commands print, in a clean clone too."""

import importlib
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark" / "studies"))
table = importlib.import_module("table")

RESULTS = ROOT / "docs" / "results"


def test_tables_of_results():
    """The tables in docs/results/README.md are those of studies/table.py, row by row."""
    page = (RESULTS / "README.md").read_text()
    folders = {path.parent for path in RESULTS.glob("*/*_seed*.csv")}
    assert {folder.name for folder in folders} >= {"check", "mini", "mini_long"}
    for folder in folders:
        assert table.table(folder) in page, folder


def test_table_of_no_runs(tmp_path, capsys):
    """A folder without evaluations, and a file that is none: one sentence and exit code 2."""
    assert table.main([str(tmp_path)]) == 2
    assert "no file here" in capsys.readouterr().err
    (tmp_path / "a_seed1.csv").write_text("phase,step\nonline,0\n")
    assert table.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'a_seed1.csv'} is no evals.csv")
    assert error.count("\n") == 1


def test_seeds_are_in_order(tmp_path):
    """Seed 10 comes after seed 2."""
    header = "phase,step,episode,return,length,normalized_score\n"
    for seed in (10, 2, 1):
        row = f"offline,5,0,9,9,{seed}\nonline,0,0,9,9,{seed}\n"
        (tmp_path / f"a_seed{seed}.csv").write_text(header + row)
    scores = " | ".join(["1.0 / 2.0 / 10.0"] * 3)
    assert table.table(tmp_path).splitlines()[-1] == f"| a | 3 | 5 + 0 | {scores} |"


def git(*words: str) -> str:
    """What a git command prints."""
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_report_in_a_clean_clone(tmp_path):
    """What is committed is enough: a clone rebuilds its studies, and no file of it changes."""
    for module in ("pandas", "matplotlib", "scipy"):
        pytest.importorskip(module, reason=f"{module} is in benchmark/requirements.txt only")
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout: there is nothing to clone")
    clone = tmp_path / "clone"
    git("clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone))
    done = subprocess.run(
        [sys.executable, "benchmark/studies/report.py", "docs/results"],
        cwd=clone,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rebuilt = [line for line in done.stdout.splitlines() if line.endswith("table.md")]
    assert "docs/results/small/table.md" in rebuilt
    assert git("-C", str(clone), "status", "--short") == ""
