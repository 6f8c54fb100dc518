"""Mutation testing: plants known bugs in the scripts, one at a time; the tests have to notice each.

    python tests/tools/mutate.py [SCRIPT ...] [--containing TEXT] [--sample N]

SCRIPT is a script's name or "shared"; by default all are meant. mutations/<script>.toml lists the
bugs of a script's own sections, mutations/shared.toml those of the sections that all scripts share:

    what      the bug, in words
    in        the function, class.method or constant that it is planted in; "__doc__" is the header
    find      an expression that occurs once in there, whatever its line breaks and its indentation
    replace   what takes its place
    tests     the test file that has to fail, as a path below tests/
    select    optional: which of its tests, as pytest's -k takes it
    script    optional, in shared.toml alone: where it is planted, if not in calql_sera

Exit code 1, with the survivors, if a bug goes unnoticed, or if its tests fail without it.
"""

import ast
import functools
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
LISTS = {path.stem: path for path in sorted((ROOT / "tests/tools/mutations").glob("*.toml"))}
OPTIONS = ["-x", "-q", "-n0", "-p", "no:cacheprovider"]


@dataclass
class Args:
    """Plant known bugs in the scripts, one at a time; the tests have to notice each."""

    scripts: Annotated[list[str], tyro.conf.Positional] = field(default_factory=lambda: list(LISTS))
    """Whose bugs: names of scripts, or "shared"."""
    containing: str = ""
    """Only bugs whose description contains this text."""
    sample: int | None = None
    """Only so many, evenly spread over all of them."""


def load_mutations() -> dict[str, list[dict[str, str]]]:
    """Every list, by its name; each mutation says in which script it is planted."""
    lists = {}
    for name, path in LISTS.items():
        default = "calql_sera" if name == "shared" else name
        entries = tomllib.loads(path.read_text())["mutation"]
        lists[name] = [{"script": default} | entry for entry in entries]
    return lists


def chosen_mutations(args: Args) -> list[dict[str, str]]:
    """What the arguments ask for. ValueError for an unknown name, or if that is nothing."""
    unknown = [name for name in args.scripts if name not in LISTS]
    if unknown:
        raise ValueError(f"there is no list {unknown[0]}: give some of {', '.join(LISTS)}")
    lists = load_mutations()
    chosen = []
    for name in args.scripts:
        chosen += [entry for entry in lists[name] if args.containing in entry["what"]]
    if args.sample is not None and args.sample < 1:
        raise ValueError(f"--sample is {args.sample}: give a whole number of at least 1")
    if not chosen:
        raise ValueError(f"no bug contains {args.containing!r}: give another --containing")
    count = min(args.sample or len(chosen), len(chosen))
    return [chosen[number * len(chosen) // count] for number in range(count)]


# ------------------------------ where a mutation is planted
def names_of(node: ast.AST) -> list[str]:
    """The names that a statement gives to something, if it is a definition or an assignment."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


parse = functools.cache(ast.parse)


def span(text: str, where: str) -> tuple[int, int]:
    """First and last position of a definition in a script's text. ValueError if it is not there."""
    node = parse(text)
    if where == "__doc__":
        found = node.body[:1]
        first, last = found[0].lineno, found[0].end_lineno
    else:
        for name in where.split("."):
            found = [part for part in node.body if name in names_of(part)]
            if len(found) != 1:
                raise ValueError(f"{name} of {where} is defined {len(found)} times, not once")
            node = found[0]
        decorators = getattr(node, "decorator_list", [])
        first = min(part.lineno for part in [node, *decorators])
        last = node.end_lineno
    lines = text.splitlines(keepends=True)
    return len("".join(lines[: first - 1])), len("".join(lines[:last]))


def pattern(find: str) -> re.Pattern:
    """Matches the text with any spaces, line breaks and comments between its words and signs."""
    parts = []
    for part in re.findall(r"\w+|[^\w\s]", find):
        parts.append(rf"\b{part}\b" if re.match(r"\w", part) else re.escape(part))
    return re.compile(r"(?:\s|#.*\n)*".join(parts))


def find(text: str, entry: dict[str, str]) -> tuple[int, int]:
    """Where in a script's text the bug goes. ValueError unless that is there exactly once."""
    start, end = span(text, entry["in"])
    matches = list(pattern(entry["find"]).finditer(text, start, end))
    if len(matches) != 1:
        times = f"{entry['find']!r} occurs {len(matches)} times in {entry['in']}"
        raise ValueError(f"{entry['what']}: {times} of {entry['script']}, not once")
    return matches[0].span()


def mutate(text: str, entry: dict[str, str]) -> str:
    """A script's text with the bug. ValueError unless what to replace is there exactly once."""
    start, end = find(text, entry)
    return text[:start] + entry["replace"] + text[end:]


# ------------------------------ running tests
def tests_pass(folder: Path, entry: dict[str, str]) -> bool:
    """Whether they pass in this copy of the project. RuntimeError if there are none, or none run.

    Tests that do not come to an end within ten minutes do not pass.
    """
    command = [sys.executable, "-B", "-m", "pytest", *OPTIONS, f"tests/{entry['tests']}"]
    if "select" in entry:
        command += ["-k", entry["select"]]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{entry['what']}: no tests ran:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def copy_project(folder: Path) -> None:
    """What the tests of the scripts need."""
    folder.mkdir()
    for path in [*ROOT.glob("*_sera.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    for name in ("data", "envs", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)


def survivors(mutations: list[dict[str, str]]) -> list[str]:
    """The bugs that go unnoticed, and those whose tests fail without any bug; printed at once."""
    found = []

    def tell(text: str) -> None:
        found.append(text)
        tqdm.write(text)

    sound_tests = {}  # whether tests pass without any bug
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "project")
        copy_project(folder)
        for entry in tqdm(mutations, unit=" bugs"):
            bug = f"{entry['script']}: {entry['what']}"
            tests = (entry["tests"], entry.get("select", ""))
            if tests not in sound_tests:
                sound_tests[tests] = tests_pass(folder, entry)
            if not sound_tests[tests]:
                tell(f"{bug}: {' -k '.join(filter(None, tests))} fails without any bug")
                continue
            path = folder / f"{entry['script']}.py"
            sound = path.read_text()
            path.write_text(mutate(sound, entry))
            if tests_pass(folder, entry):
                tell(f"{bug}: passes {entry['tests']}")
            path.write_text(sound)
    return found


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    try:
        mutations = chosen_mutations(args)
        unnoticed = survivors(mutations)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    noticed = len(mutations) - len(unnoticed)
    print(f"{noticed} of {len(mutations)} bugs were noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
