"""Tables and learning curves of the studies in docs/results, from their committed CSVs alone.

    python benchmark/report.py docs/results          # every study in there
    python benchmark/report.py docs/results/STUDY    # a single one

A study is a folder with

    grid.toml       title, scripts, envs, seeds, [variants] name = "options", and, if any, baseline = "name"
    runs/           <script>__<env>__<variant>__<seed>.csv, the evals.csv of each run
    coverage.csv    if any: script,env,variant,seed,step,entropy,kl_to_uniform
    bias.csv        if any: script,env,variant,seed,q,discounted_return,bias

and gets table.md and curves.png, with a coverage.csv also coverage.md and coverage.png; the same CSVs give
the same bytes. The statistics are those of Agarwal et al. 2021 (arXiv 2108.13264) and their library rliable.
"""

import argparse
import itertools
import math
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import bootstrap, trim_mean

KEYS = ["script", "env", "variant", "seed"]
EVALS = ["phase", "step", "episode", "return", "length", "normalized_score"]
COVERAGE = [*KEYS, "step", "entropy", "kl_to_uniform"]
BIAS = [*KEYS, "q", "discounted_return", "bias"]
# Of the variants: Okabe and Ito's colours, which the colour-blind tell apart too, then another line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A00")
LOOKS = [{"linestyle": style, "color": colour} for style in ("-", "--", "-.") for colour in COLOURS]
SCORES_NOTE = """
Normalized scores, mean ± standard deviation over n seeds; the score of a seed is its mean over the episodes
of an evaluation. **final**: the last online evaluation, never the best. **offline**: the last offline one.
**dip**: offline minus the lowest online evaluation (the more and the noisier evaluations, the larger).
**area**: mean height of the online curve, by trapezoids.
"""
COMPARISON_NOTE = """
**IQM**: mean of the final scores without the lowest and the highest quarter (rounded down: with fewer than 4
runs it is the mean). In brackets: 95 % percentile bootstrap intervals, seeds resampled within each task; with
few seeds they are too narrow. **all**: a script's tasks together, a dash where one has no run.
"""
BASELINE_NOTE = """
**P(X > Y)**: chance that a run of the variant ends above one of the baseline, `{}`: all pairs of seeds, ties
half, averaged over tasks. **Paired difference**: final score minus the baseline's with the same seed.
"""
FIGURE_NOTE = """
Mean over seeds (thick), its 95 % bootstrap interval (band) and every seed (thin; dotted if unfinished, and
then in no mean)."""


class BadInput(Exception):
    """What cannot be reported, in a line that names the file."""


# ------------------------------ statistics
def iqm(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean (Agarwal et al. 2021): the 25 % trimmed mean over the runs of all tasks."""
    return trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)


def improvement(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Probability of improvement (Agarwal et al. 2021): P(X > Y) + P(X = Y) / 2, averaged over tasks.

    That is Mann and Whitney's U over the number of pairs. X is the first half of the samples, one for each
    task, Y the second.
    """
    tasks = zip(samples[: len(samples) // 2], samples[len(samples) // 2 :])
    signs = (np.sign(x[..., :, None] - y[..., None, :]) for x, y in tasks)
    return np.mean([(1 + sign).mean(axis=(-2, -1)) / 2 for sign in signs], axis=0)


def interval(samples: Sequence[np.ndarray], statistic: Callable, axis: int = -1) -> tuple:
    """95 % percentile bootstrap interval (Efron 1979), from a fixed seed; NaN if a sample has one run only.

    Stratified: scipy resamples each sample on its own. A sample is one task's runs of one variant, so
    every resample has as many of them as there are.
    """
    if min(sample.shape[axis] for sample in samples) < 2:
        return math.nan, math.nan
    options = {"n_resamples": 9999, "method": "percentile", "vectorized": True, "batch": 1000}
    found = bootstrap(samples, statistic, axis=axis, rng=np.random.default_rng(0), **options)
    return found.confidence_interval


def measures(run: pd.DataFrame) -> pd.Series:
    """One run's numbers from its evaluations in order; NaN for want of evaluations, `last` is then -1."""
    phases = [run.loc[run["phase"] == phase, ["step", "score"]] for phase in ("offline", "online")]
    (_, offline), (steps, online) = (phase.to_numpy().T for phase in phases)
    numbers = dict.fromkeys(("final", "offline", "dip", "area"), math.nan) | {"last": -1}
    if len(offline):
        numbers["offline"] = offline[-1]
    if len(online):
        numbers |= {"final": online[-1], "dip": numbers["offline"] - online.min(), "last": steps[-1]}
    if len(online) > 1:
        numbers["area"] = np.trapezoid(online, steps) / (steps[-1] - steps[0])
    return pd.Series(numbers)


# ------------------------------ input
def studies(folder: Path) -> list[Path]:
    """The folder itself if it is a study, else the studies in it."""
    paths = [folder, *sorted(folder.glob("*"))]
    found = [path for path in paths if (path / "grid.toml").is_file() and (path / "runs").is_dir()]
    if not found:
        raise BadInput(f"{folder}: no study here (a folder with grid.toml and runs/)")
    return [folder] if folder in found else found


def read_grid(path: Path) -> dict:
    """grid.toml, with what every study needs."""
    try:
        grid = {"baseline": None} | tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
    for key, kind in {"title": str, "variants": dict, "scripts": list, "envs": list, "seeds": list}.items():
        value = grid.get(key)
        if not value or not isinstance(value, kind) or (kind is list and len(set(value)) < len(value)):
            raise BadInput(f"{path}: {key} is missing, empty, not a {kind.__name__}, or has something twice")
    if grid["baseline"] not in (None, *grid["variants"]):
        raise BadInput(f"{path}: the baseline {grid['baseline']!r} is none of the variants")
    for name, given in grid["variants"].items():  # a table has options, and the critics behind the bonus
        if isinstance(given, dict):
            grid["variants"][name] = f"{given['options']} (critics: {given['critics']})"
    return grid


def read_csv(path: Path, columns: list[str], texts: list[str]) -> pd.DataFrame:
    """A CSV with exactly these columns, and finite numbers in all but those of text."""
    try:
        frame = pd.read_csv(path, dtype=dict.fromkeys(texts, str))
    except ValueError as error:
        raise BadInput(f"{path}: {' '.join(str(error).split())}") from None
    if list(frame.columns) != columns:
        raise BadInput(f"{path}: the columns are {','.join(frame.columns)}, not {','.join(columns)}")
    numbers = frame.drop(columns=texts).apply(pd.to_numeric, errors="coerce")
    if frame.empty or not np.isfinite(numbers).all(axis=None):
        raise BadInput(f"{path}: no rows, or a number that is missing or not finite")
    return frame


def read_runs(folder: Path, keys: list[tuple]) -> pd.DataFrame:
    """The mean score of every evaluation of every run: KEYS, phase, step, score."""
    files, frames = {folder / f"{'__'.join(map(str, key))}.csv": key for key in keys}, []
    for path in sorted(folder.glob("*.csv")):
        if path not in files:
            raise BadInput(f"{path}: grid.toml has no such script, env, variant or seed")
        frame = read_csv(path, EVALS, ["phase"])
        episodes = frame.groupby(["phase", "step"])["episode"].agg(["size", "nunique"]).to_numpy()
        if not frame["phase"].isin(["offline", "online"]).all() or np.ptp(episodes):
            raise BadInput(f"{path}: an unknown phase, or evaluations of unequal numbers of episodes")
        frames.append(frame.assign(**dict(zip(KEYS, files[path]))))
    if not frames:
        raise BadInput(f"{folder}: no CSV of a run")
    scores = pd.concat(frames).groupby([*KEYS, "phase", "step"])["normalized_score"].mean()
    return scores.rename("score").reset_index()


def with_states(runs: pd.DataFrame, keys: list[tuple]) -> pd.DataFrame:
    """A row for each run asked for; numbers only if it got as far as the others of its script and env."""
    runs = runs.reindex(pd.MultiIndex.from_tuples(keys, names=KEYS))
    last, goal = runs["last"], runs.groupby(KEYS[:2])["last"].transform("max")
    far = [f"{a:,.0f} of {b:,.0f} online steps" for a, b in zip(last, goal)]
    states = [last.isna(), last < 0, last < goal], ["missing", "no online evaluation", far]
    runs["state"] = np.select(*states, "finished")
    runs.loc[runs["state"] != "finished", runs.columns != "state"] = math.nan
    return runs


# ------------------------------ markdown
def number(value: float, digits: int = 1) -> str:
    """Fixed format, no negative zero, a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:z.{digits}f}"


def spread(values: pd.Series, digits: int = 1) -> str:
    """Mean and standard deviation (n - 1)."""
    return f"{number(values.mean(), digits)} ± {number(values.std(), digits)}" if values.count() else "-"


def estimate(statistic: Callable, samples: list[pd.Series], scale: float = 1) -> str:
    """A statistic with its interval; a dash unless every sample has a run."""
    if not all(map(len, samples)):
        return "-"
    arrays = [sample.to_numpy() for sample in samples]
    value, low, high = (number(scale * x) for x in (statistic(*arrays), *interval(arrays, statistic)))
    return f"{value} [{low}, {high}]"


def markdown(header: list[str], rows: Iterable[Sequence]) -> str:
    """A table between blank lines."""
    lines = (f"| {' | '.join(map(str, row))} |\n" for row in (header, ["---"] * len(header), *rows))
    return f"\n{''.join(lines)}\n"


def score_table(runs: pd.DataFrame, names: list[str], listed: list[str], digits: int = 1) -> str:
    """n, each number's mean and deviation, the listed ones of every seed; then the runs left out."""
    rows = []
    for key, some in runs.groupby(KEYS[:3], sort=False):
        seeds = [" / ".join(number(value, digits) for value in some[name]) for name in listed]
        n = (some["state"] == "finished").sum()
        rows.append([*key, n, *(spread(some[name], digits) for name in names), *seeds])
    header = [*KEYS[:3], "n", *names, *(f"{name}, every seed" for name in listed)]
    left_out = runs[runs["state"] != "finished"].reset_index()
    names = [
        f"`{'__'.join(cell)}__{','.join(map(str, some['seed']))}` ({state})"
        for (*cell, state), some in left_out.groupby([*KEYS[:3], "state"], sort=False)
    ]
    line = f"{len(left_out)} of {len(runs)} runs are in none of the numbers: {', '.join(names)}."
    return markdown(header, rows) + (line if names else f"All {len(runs)} runs are finished.") + "\n"


def comparison_rows(finals: pd.Series, grid: dict) -> Iterator[list]:
    """IQM in each env and over all of a script; with a baseline also P(X > Y) and the paired differences."""
    cells = {key: x.droplevel(KEYS[:3]).dropna() for key, x in finals.groupby(KEYS[:3], sort=False)}
    envs, baseline = grid["envs"], grid["baseline"]
    tasks = [(env, [env]) for env in envs] + ([("**all**", envs)] if len(envs) > 1 else [])
    for script, (label, some), variant in itertools.product(grid["scripts"], tasks, grid["variants"]):
        ours = [cells[script, env, variant] for env in some]
        row = [script, label, variant, sum(map(len, ours)), estimate(iqm, ours)]
        if baseline == variant:
            row += ["-", "-", "-"]
        elif baseline:
            theirs = [cells[script, env, baseline] for env in some]
            pairs = [(x - y).dropna() for x, y in zip(ours, theirs)]
            difference = spread(pd.concat(pairs)) if all(map(len, pairs)) else "-"
            row += [estimate(improvement, ours + theirs, 100), difference, sum(map(len, pairs))]
        yield row


# ------------------------------ figures
def panels(count: int, columns: int, variants: Iterable[str]) -> tuple[Figure, list[Axes], dict[str, dict]]:
    """An empty figure with a legend of the variants below, and the looks of their lines."""
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(1 + 4.2 * columns, 0.8 + 3 * rows), layout="constrained")
    looks = dict(zip(variants, itertools.cycle(LOOKS)))
    handles = [Line2D([], [], linewidth=2, label=name, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 + 2 * columns))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count], looks


def draw(axis: Axes, look: dict, lines: pd.DataFrame, value: str) -> None:
    """One variant's lines in one phase: columns seed, x, state and the value."""
    wide = lines.pivot(index="x", columns="seed", values=value)
    finished = lines.loc[lines["state"] == "finished", "seed"].unique()
    for seed, line in wide.items():
        style = "-" if seed in finished else ":"
        axis.plot(line.dropna(), color=look["color"], linestyle=style, linewidth=0.7, alpha=0.5)
    whole = wide[finished].dropna()
    if whole.size:
        axis.plot(whole.mean(axis=1), linewidth=2, **look)
        low, high = interval([whole.to_numpy()], np.mean, axis=1)
        axis.fill_between(whole.index, low, high, color=look["color"], alpha=0.15, linewidth=0)


def learning_curves(path: Path, grid: dict, evals: pd.DataFrame) -> None:
    """A panel for each script and env; the offline phase takes the left third, in a scale of its own."""
    tasks = list(itertools.product(grid["scripts"], grid["envs"]))
    columns = len(grid["envs"]) if len(grid["envs"]) > 1 else min(3, len(tasks))
    figure, axes, looks = panels(len(tasks), columns, grid["variants"])
    steps = evals["step"]
    longest = evals.groupby(["script", "env", "phase"])["step"].transform("max").clip(lower=1)
    before = (steps - evals.groupby([*KEYS, "phase"])["step"].transform("max")) / longest / 2
    evals = evals.assign(x=(steps / longest).where(evals["phase"] == "online", before))
    for (script, env), axis in zip(tasks, axes):
        panel = evals[(evals["script"] == script) & (evals["env"] == env)]
        for variant, look in looks.items():
            for _, lines in panel[panel["variant"] == variant].groupby("phase"):
                draw(axis, look, lines, "score")
        offline, online = panel.groupby("phase")["step"].max().reindex(["offline", "online"], fill_value=0)
        ticks = {-0.5: -offline, 0.5: online / 2, 1: online}
        ticks = {0: "0"} | {x: f"{step:,.0f}" for x, step in ticks.items() if step}
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.axvline(0, color="0.3", linewidth=1)
        axis.set(title=f"{script}, {env}", xlabel="offline steps | online steps", ylabel="normalized score")
    figure.savefig(path, dpi=110, metadata={"Software": None})


# ------------------------------ the report
def coverage(folder: Path, grid: dict, keys: list[tuple]) -> None:
    """coverage.md and coverage.png: entropy of the visited states, and their divergence from uniform."""
    path, values = folder / "coverage.csv", COVERAGE[-2:]
    frame = read_csv(path, COVERAGE, KEYS[:3]).sort_values("step")
    there = set(frame[KEYS].itertuples(index=False, name=None))
    if not there <= set(keys) or frame.duplicated([*KEYS, "step"]).any():
        raise BadInput(f"{path}: a run that is not in grid.toml, or a step that is there twice")
    tasks = [task for task in dict.fromkeys(key[:2] for key in keys) if task in {key[:2] for key in there}]
    last = frame.groupby(KEYS).last().rename(columns={"step": "last"})
    runs = with_states(last, [key for key in keys if key[:2] in tasks])
    text = f"# {grid['title']}: coverage\n\nAt the last step, mean ± standard deviation over n seeds.\n"
    text += f"{score_table(runs, values, values, 2)}\n![Coverage](coverage.png)\n{FIGURE_NOTE}\n"
    (folder / "coverage.md").write_text(text, encoding="utf-8", newline="\n")
    figure, axes, looks = panels(2 * len(tasks), 2, grid["variants"])
    frame = frame.join(runs["state"], on=KEYS).rename(columns={"step": "x"})
    for (task, value), axis in zip(itertools.product(tasks, values), axes):
        for variant, look in looks.items():
            draw(axis, look, frame[(frame[KEYS[:3]] == [*task, variant]).all(axis=1)], value)
        axis.set(title=", ".join(task), xlabel="online steps", ylabel=value.replace("_", " "))
    figure.savefig(folder / "coverage.png", dpi=110, metadata={"Software": None})


def value_bias(folder: Path, grid: dict, keys: list[tuple]) -> str:
    """The section on how far the values of evaluation states are from their discounted returns."""
    frame = read_csv(folder / "bias.csv", BIAS, KEYS[:3]).set_index(KEYS).assign(last=0)
    if not set(frame.index) <= set(keys) or frame.index.has_duplicates:
        raise BadInput(f"{folder / 'bias.csv'}: a run that is not in grid.toml, or is there twice")
    text = (
        "## Value bias\n\nAt the end of the runs, over the states of evaluation episodes, in rewards of the"
    )
    text += " environment: mean\nmin(Q1, Q2), mean discounted return, and their difference. Q of a run with a"
    text += " bonus contains the bonus.\n"
    return text + score_table(with_states(frame, keys), BIAS[-3:], ["bias"]) + "\n"


def report(folder: Path) -> None:
    """Write table.md and curves.png of one study, and its coverage if it has that."""
    grid = read_grid(folder / "grid.toml")
    keys = list(itertools.product(grid["scripts"], grid["envs"], grid["variants"], grid["seeds"]))
    evals, names = read_runs(folder / "runs", keys), ["final", "offline", "dip", "area"]
    runs = with_states(evals.groupby(KEYS).apply(measures), keys)
    variants = ([name, f"`{options}`" if options else ""] for name, options in grid["variants"].items())
    text = f"# {grid['title']}\n\nWritten by `python benchmark/report.py` from the files in `runs/`.\n"
    text += f"{markdown(['variant', 'options'], variants)}## Scores\n{SCORES_NOTE}"
    text += f"{score_table(runs, names, ['final'])}\n## Comparison\n{COMPARISON_NOTE}"
    header = [*KEYS[:3], "n", "IQM of final"]
    if grid["baseline"]:
        text += BASELINE_NOTE.format(grid["baseline"])
        header += ["P(X > Y), %", "paired difference", "pairs"]
    text += markdown(header, comparison_rows(runs["final"], grid))
    text += value_bias(folder, grid, keys) if (folder / "bias.csv").exists() else ""
    text += f"## Learning curves\n\n![Learning curves](curves.png)\n{FIGURE_NOTE}\n"
    text += "Left of the line: the offline phase, its steps on a scale of their own.\n"
    if (folder / "coverage.csv").exists():
        coverage(folder, grid, keys)
        text += "\nHow widely the runs visited states: [coverage](coverage.md).\n"
    learning_curves(folder / "curves.png", grid, evals.join(runs["state"], on=KEYS))
    (folder / "table.md").write_text(text, encoding="utf-8", newline="\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rewrite tables and curves of studies from their CSVs.")
    parser.add_argument("folder", type=Path, help="a study, or a folder of studies")
    try:
        for study in studies(parser.parse_args(arguments).folder):
            report(study)
            print(study / "table.md")
    except BadInput as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
