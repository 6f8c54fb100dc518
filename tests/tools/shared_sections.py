"""Checks that the sections all scripts share are byte-identical; --write copies them from calql_sera.py.

A shared section runs from a ruler comment that ends in "(shared)" to the next ruler or the end of the file.
Exit code 1, with the differences, where a script has drifted.
"""

import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "calql_sera.py"
RULER = re.compile(r"^ *# -{30} (.+)$")


def split(text: str) -> list[tuple[str, str]]:
    """The file as pairs (ruler title, text up to the next ruler); what precedes the first has title ""."""
    sections = [("", "")]
    for line in text.splitlines(keepends=True):
        ruler = RULER.match(line)
        title, body = (ruler[1], "") if ruler else sections.pop()
        sections.append((title, body + line))
    return sections


def shared(sections: list[tuple[str, str]]) -> dict[str, str]:
    return {title: body for title, body in sections if title.endswith("(shared)")}


def main(root: Path, write: bool) -> int:
    model = shared(split((root / MODEL).read_text()))
    drifted = 0
    for path in sorted(root.glob("*_sera.py")):
        sections = split(path.read_text())
        own = shared(sections)
        if list(own) != list(model):
            print(f"{path.name}: shared sections {list(own)}, expected {list(model)}")
            drifted = 1
            continue
        for title, body in own.items():
            if body != model[title]:
                drifted = 1
                before, after = body.splitlines(keepends=True), model[title].splitlines(keepends=True)
                names = f"{path.name}: {title}", f"{MODEL}: {title}"
                sys.stdout.writelines(difflib.unified_diff(before, after, *names))
        if write:
            path.write_text("".join(model.get(title, body) for title, body in sections))
    return 0 if write else drifted


if __name__ == "__main__":
    sys.exit(main(ROOT, "--write" in sys.argv[1:]))
