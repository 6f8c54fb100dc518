"""Rules of the project itself: shared sections, pins, imports, and pages that tell the truth."""

import ast
import functools
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import shared_sections
import torch
from conftest import ROOT, SCRIPTS
from recompute import make_agent, make_batch, make_kind

PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# ------------------------------ scripts
def test_shared_sections_are_identical(capsys):
    """tests/tools/shared_sections.py finds no drift."""
    assert shared_sections.main(ROOT, write=False) == 0, capsys.readouterr().out


def test_drift_is_found_and_fixed(tmp_path, capsys):
    """A changed shared line is shown and exits 1; --write fixes it, and it alone."""
    model = (ROOT / "calql_sera.py").read_text()
    sac = (ROOT / "sac_sera.py").read_text()
    own_change = sac.replace("log_std.clamp(-5, 2)", "log_std.clamp(-4, 2)")
    drifted = own_change.replace("bonus = torch.tanh(entropy)", "bonus = entropy")
    assert sac != own_change != drifted
    path = tmp_path / "sac_sera.py"
    (tmp_path / "calql_sera.py").write_text(model)
    path.write_text(drifted)
    assert shared_sections.main(tmp_path, write=False) == 1
    assert "-    bonus = entropy" in capsys.readouterr().out
    shared_sections.main(tmp_path, write=True)
    assert shared_sections.main(tmp_path, write=False) == 0
    assert path.read_text() == own_change
    path.write_text(own_change.replace(" SERA bonus (shared)", " SERA bonus"))
    assert shared_sections.main(tmp_path, write=False) == 1
    assert shared_sections.main(tmp_path, write=True) == 1


def test_import_has_no_effect(tmp_path):
    """Importing a script reads no arguments, writes nothing, pulls in no gym, d4rl, wandb, ..."""
    unwanted = {"gym", "d4rl", "mujoco_py", "wandb", "moviepy"}
    code = f"import sys, {', '.join(SCRIPTS)}; print(sorted({unwanted} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-such-flag"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_host_sync_in_a_step(name):
    """Nothing in networks, bonus, losses, update and sampling fetches a number from the device."""
    text = (ROOT / f"{name}.py").read_text()
    sections = dict(shared_sections.split(text))
    hot = {}
    for title in ("networks: building blocks (shared)", "agent", "SERA bonus (shared)"):
        hot |= functions_in(sections[title])
    hot |= functions_in(sections["losses and update"])
    hot |= {each: functions_in(text)[each] for each in ("sample_and_update", "sample")}
    hot.pop("added_columns")  # on the host, when transitions come in
    hot.pop("mc_returns", None)
    assert {"update", "intrinsic_reward", "q_conditioned_entropy", "forward", "act"} <= hot.keys()
    for each, function in hot.items():
        attributes = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
        assert not attributes & {"item", "tolist", "cpu", "numpy", "nonzero"}, each


def functions_in(text: str) -> dict[str, ast.Module]:
    """Functions and methods by name; those that share one, together."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, ast.Module([], [])).body.append(node)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_inline_requirements(name):
    """The header that `uv run` reads (PEP 723) has the pins of requirements.txt."""
    text = (ROOT / f"{name}.py").read_text()
    block = re.search(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", text)
    lines = [line.removeprefix("#").removeprefix(" ") for line in block[1].splitlines()]
    header = tomllib.loads("\n".join(lines))
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in pins if line and not line.startswith("#")]
    assert sorted(header["dependencies"]) == sorted(pins)


def test_ruff():
    """Ruff finds nothing to fix, in style and in format."""
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------ pages
def test_readme_commands():
    """The README's two set-up commands start from nothing and install from the pinned files."""
    commands = re.findall(r"(?m)^python3 -m venv .*$", (ROOT / "README.md").read_text())
    assert len(commands) == 2
    assert "pip install -r requirements.txt" in commands[0] and "calql_sera.py" in commands[0]
    assert "tests/requirements.txt" in commands[1] and commands[1].endswith("-m pytest")


@pytest.mark.parametrize("name", SCRIPTS)
def test_pages_explain_every_logged_number(name):
    """The tables of docs/<script>.md and docs/sera.md have what a run logs, and nothing else."""
    script = importlib.import_module(name)
    agent, optimizer, args = make_agent(script, sera_k=2)
    _, bonus_logs = script.intrinsic_reward(agent, make_batch(), torch.arange(4), args, log=True)
    logs = script.update(agent, optimizer, make_batch(), args, make_kind(script, online=True))
    source = (ROOT / f"{name}.py").read_text()
    others = re.findall(r'add_scalar\("([\w/]+)"', source)
    assert explained_in(f"{name}.md", "losses|eval|train") == sorted([*logs, *others])
    assert explained_in("sera.md", "sera") == sorted(bonus_logs) != []


def explained_in(page: str, groups: str) -> list[str]:
    """The metrics of some groups that have a row in a page's tables."""
    rows = re.findall(rf"(?m)^\| (`(?:{groups})/.*?) \|", (ROOT / "docs" / page).read_text())
    return sorted(re.findall(r"`([\w/.]+)`", " ".join(rows)))


@EACH_PAGE
def test_commands_and_options(page):
    """A page runs files that exist, with options that they have, and names no other option.

    Those of a script's own page are that script's.
    """
    text = page.read_text()
    known = {"--help", "--no-deps", "--index-url", "--logdir", "--with"}  # of pip, uv and so on
    for path in ROOT.glob(f"{page.stem}.py" if page.stem in SCRIPTS else "*_sera.py"):
        known |= options_of(path)
    for command in re.findall(r"(?:python|uv run) ([\w/]+\.py[^`#|\n]*)", text):
        file, *words = command.split()
        files = [file, *(word for word in words if word.endswith(".py"))]
        own = set().union({"--help"}, *(options_of(ROOT / name) for name in files))
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert given <= own, command
        known |= own
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))
    assert named <= known, named - known


@functools.cache
def options_of(path: Path) -> set[str]:
    """The options of a script, as its class Args or the arguments of its main have them."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            names += [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            names += [argument.arg for argument in node.args.args]
    flags = [name.replace("_", "-") for name in names]
    return {f"--{flag}" for flag in flags} | {f"--no-{flag}" for flag in flags}


@pytest.mark.parametrize("name", SCRIPTS)
def test_names_in_how_to(name):
    """What docs/<script>.md says to change is in the code of the script, not in a comment only."""
    page = (ROOT / "docs" / f"{name}.md").read_text()
    section = page.split("## How to change the common things")[1]
    named = set(re.findall(r"`([A-Za-z_][\w.]*)`", section)) - {"calql_sera.py"}
    used = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        used |= {getattr(node, field, None) for field in ("name", "id", "attr", "arg")}
    assert len(named) > 10
    for each in named:
        assert set(each.split(".")) <= used, each


@EACH_PAGE
def test_links(page):
    """Every relative link leads to a file of the project, and to a heading that is there."""
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text().lower())
            anchors = [re.sub(r"[^\w\- ]", "", each).replace(" ", "-") for each in headings]
            assert anchor in anchors, link
