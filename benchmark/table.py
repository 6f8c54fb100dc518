"""A Markdown table of scores from the evals.csv files of several runs.

    python benchmark/table.py docs/results/check

Files are named <run>_seed<n>.csv. A row for each run, with the last evaluation of the offline phase and the
first and last of the online phase: means over the episodes, a number for each seed, in the order of seeds.
"""

import csv
import itertools
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro


@dataclass
class Args:
    """Print a Markdown table of scores from evals.csv files."""

    folder: tyro.conf.Positional[Path]
    """where the files are"""


def evaluations(path: Path) -> list[tuple[str, int, float]]:
    """Phase, step and mean score of every evaluation, in order."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    groups = itertools.groupby(rows, key=lambda row: (row["phase"], int(row["step"])))
    return [(*key, float(np.mean([float(row["normalized_score"]) for row in some]))) for key, some in groups]


def table(folder: Path) -> str:
    """The whole table; a dash where a phase has no steps."""
    runs = defaultdict(list)
    for path in sorted(folder.glob("*_seed*.csv")):
        runs[re.sub(r"_seed\d+$", "", path.stem)].append(evaluations(path))
    lines = ["| run | seeds | steps | offline, last | online, first | online, last |", "|---" * 6 + "|"]
    for name, seeds in runs.items():
        phases = [[[e for e in some if e[0] == phase] for some in seeds] for phase in ("offline", "online")]
        steps = " + ".join(f"{some[0][-1][1]:,}" if some[0] else "0" for some in phases)
        picks = [[s[i][2] if s else None for s in some] for some, i in zip((*phases, phases[1]), (-1, 0, -1))]
        scores = [" / ".join("-" if x is None else f"{x:.1f}" for x in pick) for pick in picks]
        lines.append(f"| {name} | {len(seeds)} | {steps} | {' | '.join(scores)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(tyro.cli(Args).folder))
