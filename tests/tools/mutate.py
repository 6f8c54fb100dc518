"""Plants known bugs in the scripts, one at a time, and checks that the tests notice them.

    python tests/plant_bugs.py [SCRIPT ...]

tests/bugs/<script>.toml lists them: what the bug is, a text that occurs once in the script, what takes its
place, and the test file, or test, that has to fail. Exit code 1, with the survivors, if any goes unnoticed.
"""

import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


def load_bugs() -> dict[str, list[dict[str, str]]]:
    """Bugs by script: what, find, replace, tests."""
    files = sorted((ROOT / "tests" / "bugs").glob("*.toml"))
    return {file.stem: tomllib.loads(file.read_text())["bug"] for file in files}


def tests_pass(folder: Path, tests: str) -> bool:
    """Whether a test file passes in this copy of the project; RuntimeError if its tests cannot be run."""
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        f"tests/{tests}",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{tests} did not run:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    bugs = [(script, bug) for script, some in load_bugs().items() for bug in some]
    bugs = [(script, bug) for script, bug in bugs if not names or script in names]
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "project")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "docs"))
        for tests in sorted({bug["tests"] for _, bug in bugs}):
            if not tests_pass(folder, tests):
                print(f"{tests} fails without any bug", file=sys.stderr)
                return 1
        for script, bug in tqdm(bugs, unit=" bugs"):
            path = folder / f"{script}.py"
            sound = path.read_text()
            path.write_text(sound.replace(bug["find"], bug["replace"]))
            if tests_pass(folder, bug["tests"]):
                survivors.append(f"{script}: {bug['what']}: not noticed by {bug['tests']}")
            path.write_text(sound)
    print("\n".join(survivors) or f"all {len(bugs)} bugs were noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
