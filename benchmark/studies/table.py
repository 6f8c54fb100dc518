"""A Markdown table of scores from the evals.csv files of several runs.

    python benchmark/studies/table.py docs/results/check

Files are named <run>_seed<n>.csv. A row for each run, with the last evaluation of the offline phase
and the first and last of the online phase: means over the episodes, a number for each seed, in the
order of seeds.
"""

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro

HEADER = "| run | seeds | steps | offline, last | online, first | online, last |"
RULE = "|---|---|---|---|---|---|"


@dataclass
class Args:
    """Print a Markdown table of scores from evals.csv files."""

    folder: tyro.conf.Positional[Path]
    """where the files are"""


def evaluations(path: Path) -> dict[str, dict[int, float]]:
    """The mean score of every evaluation of a run, in order, by phase and step."""
    episodes = {"offline": defaultdict(list), "online": defaultdict(list)}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            scores = episodes[row["phase"]][int(row["step"])]
            scores.append(float(row["normalized_score"]))
    means = {}
    for phase, steps in episodes.items():
        means[phase] = {step: sum(scores) / len(scores) for step, scores in steps.items()}
    return means


def cell(seeds: list[dict], phase: str, place: int) -> str:
    """The score of each seed at a place of a phase; a dash where the phase has no steps."""
    scores = []
    for seed in seeds:
        values = list(seed[phase].values())
        scores.append(f"{values[place]:.1f}" if values else "-")
    return " / ".join(scores)


def length(seed: dict, phase: str) -> str:
    """The steps of a phase, read off its last evaluation."""
    return f"{max(seed[phase], default=0):,}"


def name_and_seed(path: Path) -> tuple[str, int]:
    """What <run>_seed<n>.csv says; -1 where n is no number."""
    name, _, seed = path.stem.rpartition("_seed")
    return name, int(seed) if seed.isdecimal() else -1


def table(folder: Path) -> str:
    """The whole table. ValueError where no file is named as it has to be."""
    runs = defaultdict(list)
    for path in sorted(folder.glob("*_seed*.csv"), key=name_and_seed):
        name, _ = name_and_seed(path)
        try:
            runs[name].append(evaluations(path))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is no evals.csv with scores ({error})") from None
    if not runs:
        raise ValueError(f"{folder}: no file here is named <run>_seed<n>.csv")
    lines = [HEADER, RULE]
    for name, seeds in runs.items():
        steps = f"{length(seeds[0], 'offline')} + {length(seeds[0], 'online')}"
        picks = [cell(seeds, "offline", -1), cell(seeds, "online", 0), cell(seeds, "online", -1)]
        lines.append(f"| {name} | {len(seeds)} | {steps} | {' | '.join(picks)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    folder = tyro.cli(Args, args=arguments).folder
    try:
        print(table(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
