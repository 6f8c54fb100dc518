"""The lists of known bugs that tests/tools/mutate.py plants, and where it plants them.

A planted bug makes this file fail, as its place is gone then: no list may name it.
"""

import ast
import re
import subprocess
import sys
import textwrap
from collections import Counter

import mutate
import pytest
import shared_sections
from conftest import ROOT, SCRIPTS

LISTS = mutate.load_mutations()
ENTRIES = [(name, entry) for name, entries in LISTS.items() for entry in entries]


def text_of(script):
    return (ROOT / f"{script}.py").read_text()


def section_at(text, position):
    """The title of the section in which a position of a script's text lies."""
    end = 0
    for title, body in shared_sections.split(text):
        end += len(body)
        if position < end:
            return title
    raise ValueError(position)


# ------------------------------ the lists
def test_lists_and_keys():
    """A list per script and a shared one; no two bugs of a list have the same description."""
    assert LISTS.keys() == {*SCRIPTS, "shared"}
    needed = {"script", "what", "in", "find", "replace", "tests"}
    for name, entries in LISTS.items():
        assert len({entry["what"] for entry in entries}) == len(entries), name
        for entry in entries:
            assert needed <= entry.keys() <= needed | {"select"}, entry
            assert entry["script"] in SCRIPTS, entry
            assert name in ("shared", entry["script"]), entry


def test_every_bug_has_its_place():
    """What is replaced is there exactly once; then the code is another, and still parses."""
    faults = []
    for name, entry in ENTRIES:
        text = text_of(entry["script"])
        try:
            first, last = mutate.span(text, entry["in"])
            start, end = mutate.find(text, entry)
            sound = text[first:last]
            mutated = text[first:start] + entry["replace"] + text[end:last]
            codes = [ast.dump(ast.parse(textwrap.dedent(code))) for code in (sound, mutated)]
        except (ValueError, SyntaxError) as error:
            faults.append(f"{name}: {entry['what']}: {error}")
            continue
        help_text = entry["find"].startswith("#")
        if codes[0] == codes[1] and not (help_text and mutated != sound):
            faults.append(f"{name}: {entry['what']}: changes nothing")
    assert not faults, "\n".join(faults)


def test_shared_bugs_are_listed_once():
    """What is planted in a shared section stands in shared.toml, all else in the script's own."""
    for name, entry in ENTRIES:
        text = text_of(entry["script"])
        start, _ = mutate.find(text, entry)
        shared = section_at(text, start).endswith("(shared)")
        assert shared == (name == "shared"), entry
    same = Counter()
    for entry in LISTS["shared"]:
        same[entry["in"], entry["find"], entry["replace"], entry["tests"]] += 1
    assert [place for place, count in same.items() if count > 1] == []


def test_named_tests_exist():
    """The file, and every test that the selection names; some of them use the mutated script."""
    for _, entry in ENTRIES:
        path = ROOT / "tests" / entry["tests"]
        assert path.is_file(), entry
        assert path.name != "test_mutation_lists.py", entry
        text = path.read_text()
        for name in re.findall(r"test_\w+", entry.get("select", "")):
            assert re.search(rf"(?m)^def {name}", text), entry
        takes_all = re.search(r"(?m)^ *def \w+\([^)]*\bscript\b", text)
        assert takes_all or entry["script"] in text, entry


# ------------------------------ the tool
CODE = '''"""A header, in words."""

LIMITS = {"one": 1, "two": 2}  # a table


class Box:
    @property
    def size(self):
        return (
            self.width  # across
            * self.height
        )


def update(batch):
    """Not a word of batch["size"] here."""
    return 1 - batch["size"], 2 * batch_size(batch)
'''


@pytest.mark.parametrize(
    ("where", "find", "replace", "expected"),
    [
        ("__doc__", "in words", "in deeds", '"""A header, in deeds."""'),
        ("LIMITS", '"two": 2', '"two": 3', '"two": 3}'),
        ("LIMITS", "# a table", "", '"two": 2}  \n'),
        ("Box.size", "self.width * self.height", "0", "            0\n"),
        ("Box.size", "@property", "@cached", "    @cached\n"),
        ("Box", "self . width", "7", "            7  # across"),
        ("update", '(1-batch["size"]', None, None),
        ("update", '1-batch["size"]', "1", "return 1, 2 *"),
        ("update", 'batch["size"]', None, None),
        ("update", "size", None, None),
        ("update", "batch_size", "length", "2 * length(batch)"),
        ("update", "batch(", None, None),
        ("Box.width", "self", None, None),
        ("nothing", "self", None, None),
        ("Box", "batch", None, None),
    ],
)
def test_mutate(where, find, replace, expected):
    """One place within what is named, of whole words, whatever the layout; else an error."""
    entry = {"what": "x", "script": "x", "in": where, "find": find, "replace": replace}
    if expected is None:
        with pytest.raises(ValueError, match=r"not once"):
            mutate.mutate(CODE, entry)
    else:
        mutated = mutate.mutate(CODE, entry)
        assert expected in mutated and expected not in CODE


def test_choice():
    """Lists by name, bugs by a text, and a sample that is spread over all that are left."""
    args = mutate.Args()
    assert len(mutate.chosen_mutations(args)) == len(ENTRIES)
    assert mutate.chosen_mutations(mutate.Args(["sac_sera"])) == LISTS["sac_sera"]
    some = mutate.chosen_mutations(mutate.Args(["cql_sera", "shared"], containing="R"))
    assert some == [e for e in LISTS["cql_sera"] + LISTS["shared"] if "R" in e["what"]]
    sample = mutate.chosen_mutations(mutate.Args(sample=25))
    assert len(sample) == 25
    assert {entry["script"] for entry in sample} == set(SCRIPTS)
    assert mutate.chosen_mutations(mutate.Args(["cql_sera"], sample=999)) == LISTS["cql_sera"]


def test_survivors(monkeypatch):
    """Tests have to pass first, once; then each bug is alone in its script, and a miss is told."""
    seen = []

    def copy_project(folder):
        folder.mkdir()
        (folder / "sac_sera.py").write_text(CODE)

    def tests_pass(folder, entry):
        text = (folder / "sac_sera.py").read_text()
        seen.append((text == CODE, "three" in text, "words" in text))
        return entry["tests"] != "broken.py" and (text == CODE or "three" in text)

    monkeypatch.setattr(mutate, "copy_project", copy_project)
    monkeypatch.setattr(mutate, "tests_pass", tests_pass)
    entry = {"script": "sac_sera", "tests": "sound.py", "what": "three"}
    first = entry | {"in": "LIMITS", "find": "two", "replace": "three"}
    second = entry | {"what": "deeds", "in": "__doc__", "find": "words", "replace": "deeds"}
    found = mutate.survivors([first, second])
    assert found == ["sac_sera: three: passes sound.py"]
    assert seen == [(True, False, True), (False, True, True), (False, False, False)]
    found = mutate.survivors([first | {"tests": "broken.py", "select": "test_it"}])
    assert found == ["sac_sera: three: broken.py -k test_it fails without any bug"]


@pytest.mark.parametrize(
    ("argv", "code", "parts"),
    [
        (["--help"], 0, ["--containing", "--sample", "SCRIPT"]),
        (["sac"], 2, ["sac", "sac_sera", "shared"]),
        (["--containing", "no such bug"], 2, ["no such bug", "--containing"]),
        (["--sample", "0"], 2, ["--sample is 0", "at least 1"]),
    ],
)
def test_command_line(argv, code, parts):
    """Help, or one sentence on stderr and code 2."""
    command = [sys.executable, "-B", mutate.__file__, *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    text = done.stderr if code else done.stdout
    assert [part for part in parts if part not in text] == []
    if code:
        assert text.startswith("error: ") and len(text.splitlines()) == 1
