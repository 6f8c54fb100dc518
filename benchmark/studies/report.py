"""Tables and learning curves of studies, from their raw evaluations alone.

    python benchmark/studies/report.py docs/results          # every study in there
    python benchmark/studies/report.py docs/results/STUDY    # a single one
    python benchmark/studies/report.py runs/A runs/B         # curves of these runs, into curves.png

A study is a folder with

    grid.toml       title, scripts, envs, seeds, [variants] name = "options", and perhaps baseline
    runs/           <script>__<env>__<variant>__<seed>.csv, the evals.csv of each run
    coverage.csv    if any: script,env,variant,seed,step,entropy,kl_to_uniform
    watched.csv     if any: run,metric,value, what run.py read off the logs
    bias.csv        if any: script,env,variant,seed,q,discounted_return,bias

and gets table.md and curves.png, with a coverage.csv also coverage.md and coverage.png. The same
files give the same bytes. A study without files in runs/ is named, and its table.md and curves.png
stay as they are. The statistics are those of Agarwal et al. 2021 (arXiv 2108.13264) and their
library rliable.
"""

import itertools
import math
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import binomtest, bootstrap, trim_mean
from scipy.stats import t as student

KEYS = ["script", "env", "variant", "seed"]
CELL = KEYS[:3]  # the runs of a cell differ in the seed alone
TASK = KEYS[:2]
EVALUATIONS = ["phase", "step", "episode", "return", "length", "normalized_score"]
COVERAGE_VALUES = ["entropy", "kl_to_uniform"]
COVERAGE = [*KEYS, "step", *COVERAGE_VALUES]
BIAS_VALUES = ["q", "discounted_return", "bias"]
BIAS = [*KEYS, *BIAS_VALUES]
WATCHED = ["run", "metric", "value"]
NUMBERS = ["final", "last five", "offline", "offline five", "dip", "area"]
LISTED = ["final", "last five", "offline five"]  # of every seed
FEWEST_RUNS = 5  # to resample: the bootstrap interval of three is hardly more than their range

# Of the variants: Okabe and Ito's colours, which the colour-blind tell apart too. With more
# variants than colours another line style begins.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A00")
LINE_STYLES = ("-", "--", "-.")

SCORES_NOTE = """
Normalized scores, mean ± standard deviation over n seeds; the score of a seed is its mean over the
episodes of an evaluation. **final**: the last online evaluation, never the best. **last five**: the
mean of the last five online ones, of a noisy policy the better number. **offline**, **offline
five**: the same of the offline phase. **dip**: offline minus the lowest online evaluation after
step 0 (the more and the noisier evaluations, the larger). **area**: mean height of the online
curve, by trapezoids. A study without an online phase has final, last five and area of the offline
one.
"""
COMPARISON_NOTE = """
By the **last five**. **IQM**: their mean without the lowest and the highest quarter of the runs
(rounded down: with fewer than 4 runs it is the mean), from 5 seeds on with a 95 % percentile
bootstrap interval in brackets, seeds resampled within each task. **all**: a script's tasks
together, a dash where one has no run.
"""
BASELINE_NOTE = """
**P(X > Y)**: chance that a run of the variant ends above one of the baseline, `{}`: all pairs of
seeds, ties half, averaged over tasks; intervals as above. **Paired difference**: the mean of each
seed's score minus the baseline's with the same seed, for **all** of its mean over tasks, and in
brackets Student's 95 % interval for the seeds, which is wide for two or three of them.
"""
SUCCESS_NOTE = """## Success

Episodes of the last five evaluations that reached the goal, of how many, and in brackets Wilson's
95 % interval in percent. It covers chance in the episodes of one run, not how runs differ. All runs
are evaluated from the same starts.
"""
BIAS_NOTE = """## Value bias

At the end of the runs, over the states of evaluation episodes, in rewards of the environment: mean
min(Q1, Q2), mean discounted return, and their difference. Q of a run with a bonus contains the
bonus.
"""
WATCHED_NOTE = """## Numbers to watch

Read off the logs: means over the last fifth of the last phase, of every seed. **bonus_data** and
**bonus_online** are tanh(H) of the dataset's and of online transitions (0 where there are none);
**q_weight** is TD3+BC's weight of Q against cloning, 2.5 / mean |Q|.
"""
FIGURE_NOTE = """
Mean over seeds (thick), from 5 seeds on its 95 % bootstrap interval (band), and every seed (thin;
dotted if unfinished, and then in no mean)."""


@dataclass
class Args:
    """Rewrite tables and learning curves of studies from their raw evaluations, or draw runs."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """a study, a folder of studies, or the folders of runs"""
    output: Path = Path("curves.png")
    """where the curves of runs go"""


class BadInput(Exception):
    """What cannot be reported, in a sentence that names the file."""


# ------------------------------ statistics
def iqm(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean (Agarwal et al. 2021): 25 % trimmed mean over the runs of all tasks."""
    return trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)


def improvement(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Probability of improvement (Agarwal et al. 2021): P(X > Y) + P(X = Y) / 2, mean over tasks.

    That is Mann and Whitney's U over the number of pairs. X is the first half of the samples, one
    for each task, Y the second.
    """
    count = len(samples) // 2
    chances = []
    for x, y in zip(samples[:count], samples[count:]):
        sign = np.sign(x[..., :, None] - y[..., None, :])
        chances.append((1 + sign).mean(axis=(-2, -1)) / 2)
    return np.mean(chances, axis=0)


def interval(samples: Sequence[np.ndarray], statistic: Callable, axis: int = -1) -> tuple:
    """95 % percentile bootstrap interval (Efron 1979), from a fixed seed; NaN for few runs.

    Stratified: scipy resamples each sample on its own. A sample is one task's runs of one variant,
    so every resample has as many of them as there are.
    """
    if min(sample.shape[axis] for sample in samples) < FEWEST_RUNS:
        return math.nan, math.nan
    found = bootstrap(
        samples,
        statistic,
        axis=axis,
        n_resamples=9999,
        method="percentile",
        vectorized=True,
        batch=1000,
        rng=np.random.default_rng(0),
    )
    return found.confidence_interval


def paired_interval(differences: pd.Series) -> tuple[float, float]:
    """Student's 95 % interval of the mean of paired differences; NaN for a single pair."""
    half = student.ppf(0.975, len(differences) - 1) * differences.sem()
    return differences.mean() - half, differences.mean() + half


def last_phase(evals: pd.DataFrame) -> str:
    """The phase that a study is about: online, unless it has none."""
    return "online" if (evals["phase"] == "online").any() else "offline"


def measures(run: pd.DataFrame, phase: str) -> pd.Series:
    """One run's numbers from its evaluations in order; NaN, and -1 as `last`, where it has none.

    phase: the one that the study is about.
    """
    offline = run.loc[run["phase"] == "offline", "score"].to_numpy()
    scores = run.loc[run["phase"] == phase, "score"].to_numpy()
    steps = run.loc[run["phase"] == phase, "step"].to_numpy()
    numbers = dict.fromkeys(NUMBERS, math.nan)
    numbers["last"] = -1
    if len(offline):
        numbers["offline"] = offline[-1]
        numbers["offline five"] = offline[-5:].mean()
    if len(scores):
        numbers["final"] = scores[-1]
        numbers["last five"] = scores[-5:].mean()
        numbers["last"] = steps[-1]
    if phase == "online" and (steps > 0).any():  # at step 0 it is still the offline policy
        numbers["dip"] = numbers["offline"] - scores[steps > 0].min()
    if len(scores) > 1:
        numbers["area"] = np.trapezoid(scores, steps) / (steps[-1] - steps[0])
    return pd.Series(numbers)


# ------------------------------ input
def studies(folder: Path) -> list[Path]:
    """The folder itself if it is a study, else the studies in it."""
    if (folder / "grid.toml").is_file():
        return [folder]
    found = [path.parent for path in sorted(folder.glob("*/grid.toml"))]
    if not found:
        raise BadInput(f"{folder}: no study here (grid.toml), and no run (evals.csv)")
    return found


def read_grid(path: Path) -> dict:
    """grid.toml, with what every study needs."""
    try:
        grid = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
    kinds = {"title": str, "variants": dict, "scripts": list, "envs": list, "seeds": list}
    for key, kind in kinds.items():
        value = grid.get(key)
        twice = isinstance(value, list) and len(set(value)) < len(value)
        if not value or not isinstance(value, kind) or twice:
            reason = f"is missing, empty, not a {kind.__name__}, or has something twice"
            raise BadInput(f"{path}: {key} {reason}")
    grid.setdefault("baseline", None)
    if grid["baseline"] not in (None, *grid["variants"]):
        raise BadInput(f"{path}: the baseline {grid['baseline']!r} is none of the variants")
    for name, given in grid["variants"].items():
        if isinstance(given, dict):  # with another bonus, or other critics behind it
            more = [f"({key}: {given[key]})" for key in ("bonus", "critics") if key in given]
            if not more:
                raise BadInput(f"{path}: the variant {name} has neither a bonus nor critics")
            grid["variants"][name] = " ".join([given.get("options", ""), *more]).strip()
    return grid


def run_keys(grid: dict) -> list[tuple]:
    """Script, env, variant and seed of every run that the grid asks for."""
    parts = grid["scripts"], grid["envs"], grid["variants"], grid["seeds"]
    return list(itertools.product(*parts))


def read_csv(path: Path, columns: list[str], texts: list[str]) -> pd.DataFrame:
    """A CSV with exactly these columns, and finite numbers in all but those of text."""
    try:
        frame = pd.read_csv(path, dtype=dict.fromkeys(texts, str))
    except ValueError as error:
        raise BadInput(f"{path}: {' '.join(str(error).split())}") from None
    if list(frame.columns) != columns:
        found = ",".join(frame.columns)
        raise BadInput(f"{path}: the columns are {found}, not {','.join(columns)}")
    numbers = frame.drop(columns=texts).apply(pd.to_numeric, errors="coerce")
    if frame.empty or not np.isfinite(numbers).all(axis=None):
        raise BadInput(f"{path}: no rows, or a number that is missing or not finite")
    return frame


def read_evaluations(path: Path) -> pd.DataFrame:
    """The evals.csv of a run."""
    frame = read_csv(path, EVALUATIONS, ["phase"])
    episodes = frame.groupby(["phase", "step"])["episode"].agg(["size", "nunique"])
    known = frame["phase"].isin(["offline", "online"]).all()
    if not known or np.ptp(episodes.to_numpy()):
        reason = "an unknown phase, or evaluations of unequal numbers of episodes"
        raise BadInput(f"{path}: {reason}")
    return frame


def evaluation_files(study: Path) -> list[Path]:
    """The raw evaluations of a study, one file a run."""
    return sorted((study / "runs").glob("*.csv"))


def read_runs(paths: list[Path], keys: list[tuple]) -> pd.DataFrame:
    """Every evaluation of every run: KEYS, phase, step, mean score, number of episodes."""
    names = {"__".join(map(str, key)): key for key in keys}
    frames = []
    for path in paths:
        if path.stem not in names:
            raise BadInput(f"{path}: grid.toml has no such script, env, variant or seed")
        key = dict(zip(KEYS, names[path.stem]))
        frames.append(read_evaluations(path).assign(**key))
    episodes = pd.concat(frames).groupby([*KEYS, "phase", "step"])
    scores = episodes["normalized_score"].agg(score="mean", episodes="size")
    return scores.reset_index()


def with_states(runs: pd.DataFrame, keys: list[tuple], phase: str = "online") -> pd.DataFrame:
    """A row for each run asked for; numbers only if it got as far as the others of its task."""
    runs = runs.reindex(pd.MultiIndex.from_tuples(keys, names=KEYS))
    last = runs["last"]
    goal = last.groupby(TASK).transform("max")
    states = []
    for reached, asked in zip(last, goal):
        if math.isnan(reached):
            states.append("missing")
        elif reached < 0:
            states.append(f"no {phase} evaluation")
        elif reached < asked:
            states.append(f"{reached:,.0f} of {asked:,.0f} {phase} steps")
        else:
            states.append("finished")
    runs["state"] = states
    unfinished = runs["state"] != "finished"
    runs.loc[unfinished, runs.columns != "state"] = math.nan
    return runs


# ------------------------------ markdown
def number(value: float, digits: int = 1) -> str:
    """Fixed format, no negative zero; in powers of ten from a million on; a dash for NaN."""
    if math.isnan(value):
        return "-"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:z.{digits}f}"


def spread(values: pd.Series, digits: int = 1) -> str:
    """Mean and standard deviation (n - 1)."""
    if not values.count():
        return "-"
    return f"{number(values.mean(), digits)} ± {number(values.std(), digits)}"


def estimate(statistic: Callable, samples: list[pd.Series], scale: float = 1) -> str:
    """A statistic with its interval; a dash unless every sample has a run."""
    if not all(map(len, samples)):
        return "-"
    arrays = [sample.to_numpy() for sample in samples]
    low, high = interval(arrays, statistic)
    return number(scale * statistic(*arrays)) + brackets(scale * low, scale * high)


def brackets(low: float, high: float, digits: int = 1) -> str:
    """An interval behind its number; nothing if there is none."""
    return "" if math.isnan(low) else f" [{number(low, digits)}, {number(high, digits)}]"


def markdown(header: list[str], rows: Iterable[Sequence]) -> str:
    """A table between blank lines."""
    text = "\n"
    for row in (header, ["---"] * len(header), *rows):
        text += f"| {' | '.join(map(str, row))} |\n"
    return text + "\n"


def score_table(runs: pd.DataFrame, names: list[str], listed: list[str], digits: int = 1) -> str:
    """n, mean and deviation of each number, the listed ones of every seed; the runs left out."""
    rows = []
    for key, some in runs.groupby(CELL, sort=False):
        row = [*key, (some["state"] == "finished").sum()]
        row += [spread(some[name], digits) for name in names]
        for name in listed:
            row.append(" / ".join(number(value, digits) for value in some[name]))
        rows.append(row)
    header = [*CELL, "n", *names]
    header += [f"{name}, every seed" for name in listed]
    return f"{markdown(header, rows)}{left_out(runs)}\n"


def left_out(runs: pd.DataFrame) -> str:
    """The sentence that names the runs which are in none of the numbers."""
    unfinished = runs[runs["state"] != "finished"].reset_index()
    if unfinished.empty:
        return f"All {len(runs)} runs are finished."
    names = []
    for (*cell, state), some in unfinished.groupby([*CELL, "state"], sort=False):
        seeds = ",".join(map(str, some["seed"]))
        names.append(f"`{'__'.join(cell)}__{seeds}` ({state})")
    count = f"{len(unfinished)} of {len(runs)} runs are in none of the numbers"
    return f"{count}: {', '.join(names)}."


def comparison_rows(scores: pd.Series, grid: dict) -> Iterator[list]:
    """IQM in each env and over all of a script; with a baseline also how the variant compares."""
    cells = {}
    for key, some in scores.groupby(CELL, sort=False):
        cells[key] = some.droplevel(CELL).dropna()
    tasks = [(env, [env]) for env in grid["envs"]]
    if len(grid["envs"]) > 1:
        tasks.append(("**all**", grid["envs"]))
    for script, (label, envs), variant in itertools.product(
        grid["scripts"], tasks, grid["variants"]
    ):
        ours = [cells[script, env, variant] for env in envs]
        row = [script, label, variant, sum(map(len, ours)), estimate(iqm, ours)]
        if grid["baseline"] == variant:
            row += ["-", "-", "-"]
        elif grid["baseline"]:
            row += against([cells[script, env, grid["baseline"]] for env in envs], ours)
        yield row


def against(theirs: list[pd.Series], ours: list[pd.Series]) -> list:
    """P(X > Y), the paired difference and the number of pairs, of a variant against the baseline.

    Each list has the scores of a task's runs, by seed. A pair is a seed that all tasks have.
    """
    differences = [x - y for x, y in zip(ours, theirs)]
    pairs = pd.concat(differences, axis=1).dropna().mean(axis=1)
    chance = estimate(improvement, ours + theirs, 100)
    if pairs.empty:
        return [chance, "-", 0]
    return [chance, number(pairs.mean()) + brackets(*paired_interval(pairs)), len(pairs)]


def success_rows(evals: pd.DataFrame, cells: Iterable[tuple], seeds: list) -> Iterator[list]:
    """Of each cell, a column for each seed: successes, episodes and Wilson's interval."""
    evals = evals.set_index(KEYS)
    for cell in cells:
        row = list(cell)
        for seed in seeds:
            if (*cell, seed) not in evals.index:
                row.append("-")
                continue
            last_five = evals.loc[[(*cell, seed)]].sort_values("step").tail(5)
            successes = round((last_five["score"] * last_five["episodes"]).sum() / 100)
            episodes = int(last_five["episodes"].sum())
            found = binomtest(successes, episodes).proportion_ci(method="wilson")
            row.append(f"{successes}/{episodes}{brackets(100 * found.low, 100 * found.high, 0)}")
        yield row


# ------------------------------ figures
def line_looks(variants: Iterable[str]) -> dict[str, dict]:
    """Colour and style of each variant's line."""
    pairs = itertools.cycle(itertools.product(LINE_STYLES, COLOURS))
    looks = {}
    for name, (style, colour) in zip(variants, pairs):
        looks[name] = {"linestyle": style, "color": colour}
    return looks


def panels(count: int, columns: int, looks: dict[str, dict]) -> tuple[Figure, list[Axes]]:
    """An empty figure with a legend of the variants below."""
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(1 + 4.2 * columns, 0.8 + 3 * rows), layout="constrained")
    handles = [Line2D([], [], linewidth=2, label=name, **look) for name, look in looks.items()]
    legend_columns = min(len(handles), 2 + 2 * columns)
    figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without the version of the library in it: the same bytes from the same data."""
    figure.savefig(path, dpi=110, metadata={"Software": None})


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
        if not np.isnan(low).any():
            axis.fill_between(whole.index, low, high, color=look["color"], alpha=0.15, linewidth=0)


def with_places(evals: pd.DataFrame, phase: str) -> pd.DataFrame:
    """The column x, where an evaluation is drawn: online from 0 to 1, offline from -0.5 to 0.

    phase: the last one of the study; if that is offline, it goes from 0 to 1.
    """
    steps = evals["step"]
    longest = evals.groupby([*TASK, "phase"])["step"].transform("max").clip(lower=1)
    if phase == "offline":
        return evals.assign(x=steps / longest)
    own = evals.groupby([*KEYS, "phase"])["step"].transform("max")
    before = (steps - own) / longest / 2
    places = (steps / longest).where(evals["phase"] == "online", before)
    return evals.assign(x=places)


def set_ticks(axis: Axes, panel: pd.DataFrame, phase: str) -> None:
    """Steps below a panel: the whole offline phase, the switch, the middle and the end.

    phase: the last one of the study; if that is offline, its beginning, middle and end.
    """
    last = panel.groupby("phase")["step"].max()
    offline, online = last.reindex(["offline", "online"], fill_value=0)
    if phase == "offline":
        axis.set_xticks([0, 0.5, 1], ["0", f"{offline / 2:,.0f}", f"{offline:,.0f}"])
        axis.set_xlabel("offline steps")
        return
    ticks = {0: "0"}
    for place, step in ((-0.5, -offline), (0.5, online / 2), (1, online)):
        if step:
            ticks[place] = f"{step:,.0f}"
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_xlabel("offline steps | online steps")
    axis.axvline(0, color="0.3", linewidth=1)


def learning_curves(path: Path, grid: dict, evals: pd.DataFrame, phase: str) -> None:
    """A panel for each script and env with runs; the offline phase is on the left, in its scale.

    phase: the last one of the study.
    """
    there = set(evals[TASK].itertuples(index=False, name=None))
    tasks = [task for task in itertools.product(grid["scripts"], grid["envs"]) if task in there]
    columns = len({env for _, env in tasks})
    if columns == 1:
        columns = 2 if len(tasks) == 4 else min(3, len(tasks))
    looks = line_looks(grid["variants"])
    figure, axes = panels(len(tasks), columns, looks)
    evals = with_places(evals, phase)
    for (script, env), axis in zip(tasks, axes):
        panel = evals[(evals["script"] == script) & (evals["env"] == env)]
        for variant, look in looks.items():
            for _, lines in panel[panel["variant"] == variant].groupby("phase"):
                draw(axis, look, lines, "score")
        set_ticks(axis, panel, phase)
        axis.set_title(f"{script}, {env}")
        axis.set_ylabel("normalized score")
    save(figure, path)


# ------------------------------ runs without a grid
def curve_of(folder: Path) -> tuple[pd.DataFrame, str]:
    """Every evaluation of a run, phase, step and value, and what the value is: score or return."""
    path = folder / "evals.csv"
    try:
        frame = pd.read_csv(path)
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
    if list(frame.columns) != EVALUATIONS or frame.empty:
        raise BadInput(f"{path}: no evaluations of a run, with the columns {','.join(EVALUATIONS)}")
    name = "normalized_score"
    if frame[name].isna().all():  # a task of one's own
        name = "return"
    means = frame.groupby(["phase", "step"], sort=False)[name].mean().rename("value")
    return means.reset_index(), name.replace("_", " ")


def draw_runs(folders: Sequence[Path], path: Path) -> None:
    """One panel for each kind of value: offline steps left of 0, online steps right of it."""
    curves = {}
    for folder in folders:
        curve, name = curve_of(folder)
        offline = curve["phase"] == "offline"
        last = curve.loc[offline, "step"].max() if offline.any() else 0
        curve.loc[offline, "step"] -= last
        curves.setdefault(name, []).append((folder.resolve().name, curve))
    figure = Figure(figsize=(7, 4 * len(curves)), layout="constrained")
    axes = figure.subplots(len(curves), squeeze=False).flat
    for axis, (name, named_curves) in zip(axes, curves.items()):
        for label, curve in named_curves:
            axis.plot(curve["step"], curve["value"], marker=".", label=label)
        axis.axvline(0, color="0.3", linewidth=1)
        axis.set(xlabel="offline steps | online steps", ylabel=name)
        axis.legend()
    save(figure, path)


# ------------------------------ the report
def write_text(path: Path, text: str) -> None:
    """Write with the same line ends on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")


def coverage(study: Path, grid: dict, keys: list[tuple]) -> None:
    """coverage.md and coverage.png: entropy of visited states, divergence from uniform."""
    path = study / "coverage.csv"
    frame = read_csv(path, COVERAGE, CELL).sort_values("step")
    there = set(frame[KEYS].itertuples(index=False, name=None))
    if not there <= set(keys) or frame.duplicated([*KEYS, "step"]).any():
        raise BadInput(f"{path}: a run that is not in grid.toml, or a step that is there twice")
    tasks_there = {key[:2] for key in there}
    keys = [key for key in keys if key[:2] in tasks_there]
    last = frame.groupby(KEYS).last().rename(columns={"step": "last"})
    runs = with_states(last, keys)
    text = f"# {grid['title']}: coverage\n\n"
    text += "At the last step, mean ± standard deviation over n seeds.\n"
    text += score_table(runs, COVERAGE_VALUES, COVERAGE_VALUES, 2)
    text += f"\n![Coverage](coverage.png)\n{FIGURE_NOTE}\n"
    write_text(study / "coverage.md", text)
    lines = frame.join(runs["state"], on=KEYS).rename(columns={"step": "x"})
    coverage_curves(study / "coverage.png", grid, lines)


def coverage_curves(path: Path, grid: dict, lines: pd.DataFrame) -> None:
    """Two panels for each script and env that coverage.csv has."""
    there = set(lines[TASK].itertuples(index=False, name=None))
    tasks = [task for task in itertools.product(grid["scripts"], grid["envs"]) if task in there]
    looks = line_looks(grid["variants"])
    figure, axes = panels(2 * len(tasks), 2, looks)
    for (task, value), axis in zip(itertools.product(tasks, COVERAGE_VALUES), axes):
        for variant, look in looks.items():
            own = (lines[CELL] == [*task, variant]).all(axis=1)
            draw(axis, look, lines[own], value)
        axis.set(title=", ".join(task), xlabel="online steps", ylabel=value.replace("_", " "))
    save(figure, path)


def value_bias(path: Path, keys: list[tuple]) -> str:
    """The section on how far the values of evaluation states are from their discounted returns."""
    frame = read_csv(path, BIAS, CELL).set_index(KEYS)
    if not set(frame.index) <= set(keys) or frame.index.has_duplicates:
        raise BadInput(f"{path}: a run that is not in grid.toml, or is there twice")
    runs = with_states(frame.assign(last=0), keys)
    return f"{BIAS_NOTE}{score_table(runs, BIAS_VALUES, ['bias'])}\n"


def watched(path: Path, keys: list[tuple]) -> str:
    """The section on what the runs logged: a row for each cell, a column for each metric."""
    frame = read_csv(path, WATCHED, WATCHED[:2]).set_index(WATCHED[:2])["value"]
    if frame.index.has_duplicates:
        raise BadInput(f"{path}: a metric of a run is there twice")
    metrics = frame.index.unique("metric")
    runs_of = {}
    for key in keys:
        runs_of.setdefault(key[:3], []).append("__".join(map(str, key)))
    rows = []
    for cell, names in runs_of.items():
        row = list(cell)
        for metric in metrics:
            values = [frame.get((name, metric), math.nan) for name in names]
            logged = not all(map(math.isnan, values))
            row.append(" / ".join(number(value, 3) for value in values) if logged else "-")
        rows.append(row)
    return f"{WATCHED_NOTE}{markdown([*CELL, *metrics], rows)}"


def comparison(scores: pd.Series, grid: dict) -> str:
    """The section that compares the variants."""
    text = f"## Comparison\n{COMPARISON_NOTE}"
    header = [*CELL, "n", "IQM"]
    if grid["baseline"]:
        text += BASELINE_NOTE.format(grid["baseline"])
        header += ["P(X > Y), %", "paired difference", "pairs"]
    return text + markdown(header, comparison_rows(scores, grid))


def success(evals: pd.DataFrame, runs: pd.DataFrame, grid: dict) -> str:
    """The section on tasks whose score is success, 0 or 100: AntMaze's. Nothing without such."""
    finished = runs[runs["state"] == "finished"].index
    evals = evals[evals.set_index(KEYS).index.isin(finished)]
    mazes = [env for env in grid["envs"] if env.startswith("antmaze-")]
    if not mazes:
        return ""
    cells = itertools.product(grid["scripts"], mazes, grid["variants"])
    header = [*CELL, *[f"seed {seed}" for seed in grid["seeds"]]]
    rows = success_rows(evals, cells, grid["seeds"])
    return SUCCESS_NOTE + markdown(header, rows)


def common_options(grid: dict) -> str:
    """Options of all runs, of a script and of an env, a line each."""
    lines = [f"All runs: `{grid['options']}`"] if "options" in grid else []
    for table in ("script_options", "env_options"):
        lines += [f"{name}: `{options}`" for name, options in grid.get(table, {}).items()]
    return "".join(f"\n{line}\n" for line in lines)


def report(study: Path, grid: dict, paths: list[Path]) -> None:
    """Write table.md and curves.png of a study from its raw evaluations."""
    keys = run_keys(grid)
    evals = read_runs(paths, keys)
    phase = last_phase(evals)
    runs = with_states(evals.groupby(KEYS).apply(measures, phase), keys, phase)
    variants = []
    for name, options in grid["variants"].items():
        variants.append([name, f"`{options}`" if options else ""])
    text = f"# {grid['title']}\n\n"
    text += "Written by `python benchmark/studies/report.py` from the files in `runs/`.\n"
    text += common_options(grid)
    text += markdown(["variant", "options"], variants)
    text += f"## Scores\n{SCORES_NOTE}{score_table(runs, NUMBERS, LISTED)}\n"
    text += comparison(runs["last five"], grid)
    text += success(evals[evals["phase"] == phase], runs, grid)
    if (study / "watched.csv").exists():
        text += watched(study / "watched.csv", keys)
    if (study / "bias.csv").exists():
        text += value_bias(study / "bias.csv", keys)
    text += f"## Learning curves\n\n![Learning curves](curves.png)\n{FIGURE_NOTE}\n"
    if phase == "online":
        text += "Left of the line: the offline phase, its steps on a scale of their own.\n"
    if (study / "coverage.csv").exists():
        text += "\nHow widely the runs visited states: [coverage](coverage.md).\n"
    evals = evals.join(runs["state"], on=KEYS)
    learning_curves(study / "curves.png", grid, evals, phase)
    write_text(study / "table.md", text)


def rebuild(study: Path) -> bool:
    """Rewrite what the files of a study allow; True if its raw evaluations are there."""
    grid = read_grid(study / "grid.toml")
    paths = evaluation_files(study)
    if paths:
        report(study, grid, paths)
        print(study / "table.md")
    else:
        kept = ", table.md left as it is" if (study / "table.md").exists() else ""
        print(f"{study.resolve().name}: no raw evaluations{kept}")
    if (study / "coverage.csv").exists():  # needs no evaluations
        coverage(study, grid, run_keys(grid))
        print(study / "coverage.md")
    return bool(paths)


def main(arguments: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=arguments)
    try:
        if not args.folders:
            raise BadInput("no folder was named: give a study, docs/results, or folders of runs")
        of_runs = [(folder / "evals.csv").is_file() for folder in args.folders]
        if any(of_runs) and not all(of_runs):
            other = args.folders[of_runs.index(False)]
            raise BadInput(f"{other} is no run (evals.csv), but others are: name studies or runs")
        if all(of_runs):
            draw_runs(args.folders, args.output)
            print(args.output)
            return 0
        rebuilt = [rebuild(study) for folder in args.folders for study in studies(folder)]
        if not any(rebuilt):
            names = ", ".join(map(str, args.folders))
            raise BadInput(f"{names}: no study here has raw evaluations (runs/*.csv)")
    except (BadInput, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
