"""Rules of the project itself: shared sections, line budgets, pins, what an import may do."""

import ast
import importlib.util
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import shared_sections
from conftest import ROOT, SCRIPTS
from recompute import make_batch

BUDGETS = {"cql_sera": 750, "calql_sera": 750}


def test_shared_sections_are_identical(capsys):
    """tests/shared_sections.py finds no drift."""
    assert shared_sections.main(ROOT, write=False) == 0, capsys.readouterr().out


def test_drift_is_found_and_mended(tmp_path, capsys):
    """A changed shared line is shown and exits 1, --write mends it, and the algorithm's part stays."""
    model = (ROOT / "calql_sera.py").read_text()
    (tmp_path / "calql_sera.py").write_text(model)
    own = (ROOT / "sac_sera.py").read_text().replace("log_std.clamp(-5, 2)", "log_std.clamp(-4, 2)")
    (tmp_path / "sac_sera.py").write_text(own.replace("amax(1).clamp_min(1e-6)", "amax(1).clamp_min(1e-5)"))
    assert shared_sections.main(tmp_path, write=False) == 1
    assert "-    radii" in capsys.readouterr().out
    shared_sections.main(tmp_path, write=True)
    assert shared_sections.main(tmp_path, write=False) == 0
    assert (tmp_path / "sac_sera.py").read_text() == own
    (tmp_path / "sac_sera.py").write_text(own.replace(" SERA bonus (shared)", " SERA bonus"))
    assert shared_sections.main(tmp_path, write=False) == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_line_budget(name):
    """No script grows past its budget, and its own part stays below 250 lines."""
    text = (ROOT / f"{name}.py").read_text()
    assert len(text.splitlines()) <= BUDGETS.get(name, 680)
    own = [body for title, body in shared_sections.split(text) if not title.endswith("(shared)")]
    assert sum(len(body.splitlines()) for body in own) <= 250


@pytest.mark.parametrize("name", SCRIPTS)
def test_import_has_no_effect(name, tmp_path):
    """Importing a script reads no arguments, writes nothing, and pulls in no gym, d4rl, mujoco_py, wandb."""
    code = f"import sys, {name}; print(sorted({{'gym', 'd4rl', 'mujoco_py', 'wandb'}} & set(sys.modules)))"
    command = [sys.executable, "-c", code, "--no-such-flag"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_host_sync_in_an_update(name):
    """Neither the update nor the bonus fetches a number from the device."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    hot = ("update", "sera_bonus", "q_conditioned_entropy", "act", "sample", "forward", "squash")
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name in hot:
            calls = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
            assert not calls & {"item", "tolist", "cpu", "numpy", "nonzero"}, function.name


def test_ruff():
    """Ruff finds nothing to mend, in style and in format."""
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_readme_commands():
    """The README's two set-up commands start from nothing and install from the pinned files."""
    commands = re.findall(r"(?m)^python3 -m venv .*$", (ROOT / "README.md").read_text())
    assert len(commands) == 2
    assert "pip install -r requirements.txt" in commands[0] and "calql_sera.py" in commands[0]
    assert "tests/requirements.txt" in commands[1] and commands[1].endswith("-m pytest")


@pytest.mark.parametrize("name", SCRIPTS)
def test_page_explains_every_logged_number(name):
    """docs/<script>.md has a row for each number that an update logs, docs/sera.md for each of the bonus."""
    script = importlib.import_module(name)
    args = script.Args(device="cpu", hidden_dim=8, sera_k=2)
    networks, optimizer = script.make_networks(4, 2, args)
    state = SimpleNamespace(networks=networks, optimizer=optimizer, phase="online", step=2)
    logs = script.update(state, make_batch(), args)
    bonus_logs = script.sera_bonus(networks, make_batch(), slice(None), args)[1]
    page, sera = ((ROOT / "docs" / file).read_text() for file in (f"{name}.md", "sera.md"))
    assert set(re.findall(r"(?m)^\| `(losses/\w+)` \|", page)) == logs.keys()
    assert all(f"`{metric}`" in sera for metric in bonus_logs)


def test_links():
    """Every relative link of every page leads to a file of the project."""
    pages = [path for path in ROOT.rglob("*.md") if not path.relative_to(ROOT).parts[0].startswith(".")]
    assert len(pages) > 8
    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)
