"""Checks that the sections all scripts share are byte-identical; --write copies calql_sera.py's.

    python tests/tools/shared_sections.py [--write]

A shared section runs from a ruler comment that ends in "(shared)" to the next ruler, or to the end
of the file. Exit code 1, with the differences, where a script has drifted.
"""

import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "calql_sera.py"
RULER = re.compile(r"^ *# -{30} (.+)$")


def split(text: str) -> list[tuple[str, str]]:
    """The file as pairs (title of a ruler, text from it to the next); the first has title ""."""
    sections = [("", "")]
    for line in text.splitlines(keepends=True):
        ruler = RULER.match(line)
        if ruler:
            sections.append((ruler[1], line))
        else:
            title, body = sections[-1]
            sections[-1] = (title, body + line)
    return sections


def shared(sections: list[tuple[str, str]]) -> dict[str, str]:
    return {title: body for title, body in sections if title.endswith("(shared)")}


def main(root: Path, write: bool) -> int:
    model = shared(split((root / MODEL).read_text()))
    failed = False
    for path in sorted(root.glob("*_sera.py")):
        sections = split(path.read_text())
        own = shared(sections)
        if list(own) != list(model):
            print(f"{path.name}: shared sections {list(own)}, expected {list(model)}")
            failed = True
            continue
        for title, body in own.items():
            difference = difflib.unified_diff(
                body.splitlines(keepends=True),
                model[title].splitlines(keepends=True),
                f"{path.name}: {title}",
                f"{MODEL}: {title}",
            )
            sys.stdout.writelines(difference)
        if write:
            path.write_text("".join(model.get(title, body) for title, body in sections))
        elif own != model:
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(ROOT, "--write" in sys.argv[1:]))
