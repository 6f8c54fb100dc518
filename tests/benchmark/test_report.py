"""studies/report.py: every statistic against hand-worked numbers, on a made-up study."""

import importlib
import re
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import mannwhitneyu, ttest_1samp

pd = pytest.importorskip("pandas", reason="pandas is in benchmark/requirements.txt only")
pytest.importorskip("matplotlib", reason="matplotlib is in benchmark/requirements.txt only")
sys.path.insert(0, str(ROOT / "benchmark" / "studies"))
report = importlib.import_module("report")

GRID = """\
title = "Made up"
baseline = "plain"
scripts = ["a_sera"]
envs = ["e1", "e2"]
seeds = [1, 2]
[variants]
plain = "--sera-coef 0"
sera = ""
"""
# Offline at step 20; online at steps 0, 10 and 30. One run has its best, 75, in the middle.
SCORES = {
    ("e1", "plain", 1): (40, 38, 30, 50),
    ("e1", "plain", 2): (44, 40, 40, 60),
    ("e1", "sera", 1): (40, 42, 75, 70),
    ("e1", "sera", 2): (44, 44, 20, 80),
    ("e2", "plain", 1): (10, 10, 10, 10),
    ("e2", "plain", 2): (20, 20, 20, 20),
    ("e2", "sera", 1): (10, 10, 10, 20),
    ("e2", "sera", 2): (20, 20, 20, 5),
}
HEADER = "phase,step,episode,return,length,normalized_score\n"
STEPS = (("offline", 10), ("offline", 20), ("online", 0), ("online", 10), ("online", 30))


def write_study(folder):
    """The study; every evaluation has two episodes, one point above and one below its score."""
    (folder / "runs").mkdir(parents=True)
    (folder / "grid.toml").write_text(GRID)
    for (env, variant, seed), scores in SCORES.items():
        rows = [
            f"{phase},{step},{episode},1.0,9,{score + 2 * episode - 1}\n"
            for (phase, step), score in zip(STEPS, (5, *scores))
            for episode in (0, 1)
        ]
        (folder / "runs" / f"a_sera__{env}__{variant}__{seed}.csv").write_text(
            HEADER + "".join(rows)
        )
    return folder


@pytest.fixture
def study(tmp_path):
    """The study, to be changed by a test."""
    return write_study(tmp_path / "made_up")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The study as it is, with what the command wrote."""
    folder = write_study(tmp_path_factory.mktemp("results") / "made_up")
    assert report.main([str(folder)]) == 0
    return folder


def table(study, name="table.md"):
    """What the command writes."""
    assert report.main([str(study)]) == 0
    return (study / name).read_text()


def test_scores(reported):
    """Means and standard deviations over seeds; of two, that is |difference| / sqrt 2."""
    text = (reported / "table.md").read_text()
    header = "| script | env | variant | n | final | last five | offline | offline five | dip "
    header += "| area | final, every seed | last five, every seed | offline five, every seed |"
    for line in (header, "| plain | `--sera-coef 0` |", "All 8 runs are finished."):
        assert f"{line}\n" in text
    for row in (
        # areas: (10 * 34 + 20 * 40) / 30 = 38 and (10 * 40 + 20 * 50) / 30 = 46.67
        # three online evaluations are fewer than five: (38 + 30 + 50) / 3 and (40 + 40 + 60) / 3,
        # and so are two offline ones: (5 + 40) / 2 and (5 + 44) / 2
        "e1 | plain | 2 | 55.0 ± 7.1 | 43.0 ± 5.2 | 42.0 ± 2.8 | 23.5 ± 1.4 | 7.0 ± 4.2 "
        "| 42.3 ± 6.1 | 50.0 / 60.0 | 39.3 / 46.7 | 22.5 / 24.5",
        # dips: 40 - 70, as step 0 does not count, and 44 - 20
        # areas: (585 + 1450) / 30 = 67.83 and (320 + 1000) / 30 = 44
        "e1 | sera | 2 | 75.0 ± 7.1 | 55.2 ± 10.1 | 42.0 ± 2.8 | 23.5 ± 1.4 | -3.0 ± 38.2 "
        "| 55.9 ± 16.9 | 70.0 / 80.0 | 62.3 / 48.0 | 22.5 / 24.5",
        "e2 | plain | 2 | 15.0 ± 7.1 | 15.0 ± 7.1 | 15.0 ± 7.1 | 10.0 ± 3.5 | 0.0 ± 0.0 "
        "| 15.0 ± 7.1 | 10.0 / 20.0 | 10.0 / 20.0 | 7.5 / 12.5",
        # areas: (100 + 300) / 30 = 13.33 and (200 + 250) / 30 = 15
        "e2 | sera | 2 | 12.5 ± 10.6 | 14.2 ± 1.2 | 15.0 ± 7.1 | 10.0 ± 3.5 | 7.5 ± 10.6 "
        "| 14.2 ± 1.2 | 20.0 / 5.0 | 13.3 / 15.0 | 7.5 / 12.5",
    ):
        assert f"| a_sera | {row} |\n" in text


def test_comparison(reported):
    """By the last five: IQM, probability of improvement, paired differences with t intervals.

    Those are 39.3 and 46.7 plain, 62.3 and 48 with sera in e1; 10 and 20, 13.3 and 15 in e2. With
    two seeds t is 12.706, and a half width t |d1 - d2| / 2. Runs are too few to be resampled.
    """
    text = (reported / "table.md").read_text()
    for row in (
        "| a_sera | e1 | plain | 2 | 43.0 | - | - | - |",
        # differences 23 and 1.333: 12.167 -+ 12.706 * 10.833
        "| a_sera | e1 | sera | 2 | 55.2 | 100.0 | 12.2 [-125.5, 149.8] | 2 |",
        "| a_sera | e2 | plain | 2 | 15.0 | - | - | - |",
        # 13.3 and 15 against 10 and 20: two wins, two losses; differences 3.333 and -5
        "| a_sera | e2 | sera | 2 | 14.2 | 50.0 | -0.8 [-53.8, 52.1] | 2 |",
        # the middle two of 10, 20, 39.3, 46.7
        "| a_sera | **all** | plain | 4 | 29.7 | - | - | - |",
        # of each seed the mean over tasks: 13.167 and -1.833
        "| a_sera | **all** | sera | 4 | 31.5 | 75.0 | 5.7 [-89.6, 101.0] | 2 |",
    ):
        assert row + "\n" in text


def test_paired_interval():
    """Student's, as scipy's t test has it; none from a single pair; a point where all are alike."""
    differences = pd.Series([3.0, -1.0, 8.0, 2.0])
    expected = ttest_1samp(differences, 0).confidence_interval()
    np.testing.assert_allclose(report.paired_interval(differences), expected)
    assert np.isnan(report.paired_interval(pd.Series([3.0]))).all()
    assert report.paired_interval(pd.Series([3.0, 3.0])) == (3, 3)


def test_pairs_of_several_tasks():
    """A seed counts where every task has it, by its mean over tasks, whatever the other runs."""
    theirs = [pd.Series([10.0, 20, 30], [1, 2, 3]), pd.Series([0.0, 0], [1, 2])]
    ours = [pd.Series([11.0, 23, 90], [1, 2, 3]), pd.Series([5.0, 7], [1, 2])]
    _, difference, pairs = report.against(theirs, ours)
    # (1 + 5) / 2 and (3 + 7) / 2, and 12.706 half of their difference to either side
    assert (difference, pairs) == ("4.0 [-8.7, 16.7]", 2)


def test_common_options(study):
    """Those of the grid, of a script and of an env stand above the variants."""
    more = 'options = "--x 1"\n[variants]'
    text = GRID.replace("[variants]", more) + '[script_options]\na_sera = "--y 2"\n'
    (study / "grid.toml").write_text(text + '[env_options]\ne2 = "--z 3"\n')
    above = table(study).split("| variant |")[0]
    assert above.endswith("\nAll runs: `--x 1`\n\na_sera: `--y 2`\n\ne2: `--z 3`\n\n")


def test_without_baseline(study):
    """No baseline, no comparison: IQM alone."""
    (study / "grid.toml").write_text(GRID.replace('baseline = "plain"\n', ""))
    text = table(study)
    assert "| a_sera | **all** | sera | 4 | 31.5 |\n" in text
    assert "P(X > Y)" not in text and "paired" not in text.lower()


def test_iqm():
    """A quarter is cut on either side, rounded down, over the runs of all tasks."""
    assert report.iqm(np.arange(1.0, 5), np.arange(5.0, 9)) == 4.5  # of 1 to 8: 3 to 6
    assert report.iqm(np.array([0.0, 1, 2, 3, 1000])) == 2
    assert report.iqm(np.array([0.0, 1, 5])) == 2
    assert report.iqm(np.array([[0.0, 0, 2, 9], [4.0, 4, 4, 4]])).tolist() == [1, 4]


def test_improvement():
    """Mann and Whitney's U of each task over the number of its pairs, averaged over tasks."""
    x, y = (
        [np.array([3.0, 5, 5, 8]), np.array([1.0, 2])],
        [np.array([5.0, 4, 9]), np.array([2.0, 2, 0])],
    )
    expected = np.mean([mannwhitneyu(a, b).statistic / len(a) / len(b) for a, b in zip(x, y)])
    np.testing.assert_allclose(report.improvement(*x, *y), expected)
    np.testing.assert_allclose(expected, (5 / 12 + 3 / 6) / 2)


def test_interval():
    """Resamples keep the number of runs of each task; a known interval; NaN from four runs."""
    assert tuple(report.interval([np.zeros(5), np.full(5, 100.0)], report.iqm)) == (50, 50)
    values = np.random.default_rng(0).normal(size=400)
    half = 1.96 * values.std() / 20
    expected = values.mean() - half, values.mean() + half
    np.testing.assert_allclose(report.interval([values], np.mean), expected, atol=0.01)
    assert np.isnan(report.interval([np.zeros(4), np.zeros(6)], report.iqm)).all()


def test_estimate():
    """An interval in brackets where there is one."""
    many = pd.Series([1.0, 1, 1, 1, 1])
    assert report.estimate(report.iqm, [many]) == "1.0 [1.0, 1.0]"
    assert report.estimate(report.iqm, [many[:4]]) == "1.0"
    assert report.estimate(report.iqm, [many, many[:0]]) == "-"


def test_same_bytes(reported):
    """The same bytes a second time. One newline ends the table, no date is in the PNG."""
    paths = reported / "table.md", reported / "curves.png"
    text, image = (path.read_bytes() for path in paths)
    for path in paths:
        path.unlink()
    assert report.main([str(reported.parent)]) == 0
    assert [path.read_bytes() for path in paths] == [text, image]
    assert b"\r" not in text and text.endswith(b".\n") and not re.search(rb" \n|\n\n\n", text)
    assert b"tEXt" not in image and b"tIME" not in image


def test_missing_and_unfinished_runs(study):
    """Runs that are not there, or stopped early, are named, and in no number."""
    path = study / "runs" / "a_sera__e1__sera__2.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    for name in ("e2__plain__1", "e2__plain__2", "e2__sera__1"):
        (study / "runs" / f"a_sera__{name}.csv").unlink()
    path = study / "runs" / "a_sera__e2__sera__2.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    text = table(study)
    names = (
        "`a_sera__e1__sera__2` (10 of 30 online steps), `a_sera__e2__plain__1,2` (missing), "
        "`a_sera__e2__sera__1` (missing), `a_sera__e2__sera__2` (no online evaluation)"
    )
    for row in (
        f"5 of 8 runs are in none of the numbers: {names}.",
        "| a_sera | e1 | sera | 1 | 70.0 ± - | 62.3 ± - | 40.0 ± - | 22.5 ± - | -30.0 ± - "
        "| 67.8 ± - | 70.0 / - | 62.3 / - | 22.5 / - |",
        "| a_sera | e2 | sera | 0 | - | - | - | - | - | - | - / - | - / - | - / - |",
        "| a_sera | e1 | sera | 1 | 62.3 | 100.0 | 23.0 | 1 |",
        "| a_sera | **all** | sera | 1 | - | - | - | 0 |",
    ):
        assert row + "\n" in text


def test_no_offline_phase(study):
    """From scratch: no offline score, no dip, the rest as ever."""
    for path in (study / "runs").iterdir():
        path.write_text(re.sub(r"(?m)^offline.*\n", "", path.read_text()))
    row = "| a_sera | e1 | plain | 2 | 55.0 ± 7.1 | 43.0 ± 5.2 | - | - | - | 42.3 ± 6.1 "
    assert f"{row}| 50.0 / 60.0 | 39.3 / 46.7 | - / - |\n" in table(study)


def test_no_online_phase(study):
    """Offline only: scores are those of the offline phase, and there is no dip."""
    for path in (study / "runs").iterdir():
        path.write_text(re.sub(r"(?m)^online.*\n", "", path.read_text()))
    # 5 at step 10, then 40 and 44
    row = "| a_sera | e1 | plain | 2 | 42.0 ± 2.8 | 23.5 ± 1.4 | 42.0 ± 2.8 | 23.5 ± 1.4 "
    assert f"{row}| - | 23.5 ± 1.4 | 40.0 / 44.0 | 22.5 / 24.5 | 22.5 / 24.5 |\n" in table(study)


def test_last_five():
    """Five and no more, of each phase alone."""
    scores = [90.0, *range(10, 60, 10), *range(7)]
    phases = ["offline"] * 6 + ["online"] * 7
    run = pd.DataFrame({"phase": phases, "step": range(13), "score": scores})
    numbers = report.measures(run, "online")
    assert numbers["last five"] == 4  # of 2 to 6
    assert numbers["offline five"] == 30  # of 10 to 50


def test_numbers_to_watch(study):
    """watched.csv becomes a section: every seed, a dash for what a cell never logged."""
    rows = ["a_sera__e1__plain__1,losses/q_data,12.3456", "a_sera__e1__plain__2,losses/q_data,9"]
    rows += ["a_sera__e2__sera__2,sera/bonus_mean,0.5"]
    rows += ["a_sera__e2__plain__1,losses/q_data,-45612345678.9"]
    (study / "watched.csv").write_text("\n".join(["run,metric,value", *rows]) + "\n")
    section = table(study).split("## Numbers to watch")[1]
    for row in (
        "| script | env | variant | losses/q_data | sera/bonus_mean |",
        "| a_sera | e1 | plain | 12.346 / 9.000 | - |",
        "| a_sera | e1 | sera | - | - |",
        "| a_sera | e2 | plain | -4.56e+10 / - | - |",
        "| a_sera | e2 | sera | - | - / 0.500 |",
    ):
        assert row + "\n" in section


def test_success(study):
    """On AntMaze, a column for each seed: successes of the last five evaluations, of finished runs.

    Wilson's interval of 8 in 10, by its formula: (0.8 + z^2 / 20 -+ z sqrt(0.016 + z^2 / 400)) /
    (1 + z^2 / 10) with z = 1.96, which is 0.490 and 0.943.
    """
    text = table(study)
    assert "## Success" not in text
    maze = GRID.replace('"e2"', '"antmaze-umaze-v2"').replace("[1, 2]", "[1, 2, 3]")
    (study / "grid.toml").write_text(maze)
    for path in (study / "runs").glob("*__e2__*"):
        path.unlink()
    for seed, steps in ((1, range(0, 70, 10)), (2, range(0, 60, 10))):
        rows = ["offline,20,0,0.0,9,0.0\n", "offline,20,1,0.0,9,0.0\n"]
        for step in steps:
            missed = step in (20, 30)  # one of the two episodes
            rows += [f"online,{step},0,1.0,9,100.0\n"]
            rows += [f"online,{step},1,0.0,9,{0.0 if missed else 100.0}\n"]
        path = study / "runs" / f"a_sera__antmaze-umaze-v2__sera__{seed}.csv"
        path.write_text(HEADER + "".join(rows))
    section = table(study).split("## Success")[1].split("##")[0]
    assert "| script | env | variant | seed 1 | seed 2 | seed 3 |\n" in section
    assert "| a_sera | antmaze-umaze-v2 | sera | 8/10 [49, 94] | - | - |\n" in section
    assert "| a_sera | antmaze-umaze-v2 | plain | - | - | - |\n" in section
    assert "e1" not in section


@pytest.mark.parametrize("seeds", [2, 5])
def test_draw(seeds):
    """The thick line is the mean of the finished seeds; others are dotted. A band from 5 seeds."""
    lines = []
    for seed in range(seeds):
        lines += [(seed, 0, "finished", 2.0 + 4 * (seed % 2)), (seed, 1, "finished", 7.0)]
    frame = pd.DataFrame([*lines, (9, 0, "missing", 90.0)], columns=["seed", "x", "state", "score"])
    axis = report.Figure().subplots()
    report.draw(axis, report.line_looks(["plain"])["plain"], frame, "score")
    *each, mean = axis.lines
    assert [line.get_linestyle() for line in each] == ["-"] * seeds + [":"]
    assert list(each[1].get_ydata()) == [6, 7] and list(each[-1].get_ydata()) == [90]
    assert list(mean.get_ydata()) == [{2: 4, 5: 3.6}[seeds], 7]
    assert mean.get_linewidth() > each[0].get_linewidth()
    if seeds < 5:
        assert not axis.collections
        return
    corners = {tuple(corner) for corner in axis.collections[0].get_paths()[0].vertices}
    # three of five lie at 2, two at 6: all at 2 has a chance of 8 %, all but one at 6 of 9 %
    assert {(0, 2), (0, 5.2), (1, 7)} <= corners


def test_learning_curves(study, monkeypatch):
    """Offline evaluations lie left of the switch, the last at 0; online ones from 0 on."""
    seen = {}

    def draw(axis, look, lines, value):
        first = lines[lines["seed"] == 1]
        seen[(axis.get_subplotspec().num1, look["color"], first["phase"].iloc[0])] = (
            list(first["x"]),
            axis,
        )

    monkeypatch.setattr(report, "draw", draw)
    table(study)
    assert len(seen) == 2 * 2 * 2
    assert all(
        x == ([-0.25, 0] if key[2] == "offline" else [0, 1 / 3, 1]) for key, (x, _) in seen.items()
    )
    axis = next(iter(seen.values()))[1]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "-20", "15", "30"]
    assert [text.get_text() for text in axis.figure.legends[0].get_texts()] == ["plain", "sera"]


def test_learning_curves_without_an_online_phase(study, monkeypatch):
    """Offline evaluations lie by their steps, those of an unfinished run too; no empty panels."""
    for path in (study / "runs").iterdir():
        unfinished = path.stem == "a_sera__e1__sera__2"
        dropped = r"(?m)^(online|offline,20).*\n" if unfinished else r"(?m)^online.*\n"
        path.write_text(re.sub(dropped, "", path.read_text()))
        if "__e2__" in path.stem:
            path.unlink()
    figures = []
    places = {}

    def draw(axis, look, lines, value):
        for seed, line in lines.groupby("seed"):
            places[(look["color"], seed)] = list(line["x"])

    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    monkeypatch.setattr(report, "draw", draw)
    assert "Left of the line" not in table(study)
    (figure,) = figures
    (axis,) = figure.axes
    assert figure.get_figwidth() < 6  # of one panel, not two
    assert sorted(places.values()) == [[0.5], [0.5, 1], [0.5, 1], [0.5, 1]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "10", "20"]
    assert axis.get_xlabel() == "offline steps"
    assert not axis.lines


def test_coverage(study):
    """Last values and a figure; only the tasks in the file are asked for."""
    rows = ["1,10,1.0,2.0", "1,20,1.5,1.0", "2,10,1.0,2.0", "2,20,2.5,0.5"]
    lines = [f"a_sera,e1,plain,{row}\n" for row in rows] + ["a_sera,e1,sera,1,10,1.0,1.0\n"]
    (study / "coverage.csv").write_text(",".join(report.COVERAGE) + "\n" + "".join(lines))
    assert "[coverage](coverage.md)" in table(study)
    text = table(study, "coverage.md")
    for row in (
        "| a_sera | e1 | plain | 2 | 2.00 ± 0.71 | 0.75 ± 0.35 | 1.50 / 2.50 | 1.00 / 0.50 |",
        "2 of 4 runs are in none of the numbers: `a_sera__e1__sera__1` (10 of 20 online steps), "
        "`a_sera__e1__sera__2` (missing).",
    ):
        assert row + "\n" in text
    assert (study / "coverage.png").stat().st_size > 5000


def test_value_bias(study):
    """bias.csv becomes a section of the table; a variant may be a table."""
    rows = ["plain,1,12.0,4.0,8.0", "plain,2,10.0,4.0,6.0", "sera,1,100.0,4.0,96.0"]
    lines = [f"a_sera,e1,{row}\n" for row in rows]
    (study / "bias.csv").write_text(",".join(report.BIAS) + "\n" + "".join(lines))
    (study / "grid.toml").write_text(
        GRID.replace('sera = ""', 'sera = { options = "--x", critics = "few" }')
    )
    text = table(study)
    section = text.split("## Value bias")[1]
    assert (
        "| a_sera | e1 | plain | 2 | 11.0 ± 1.4 | 4.0 ± 0.0 | 7.0 ± 1.4 | 8.0 / 6.0 |\n" in section
    )
    assert "`a_sera__e1__sera__2`" in section and "| sera | `--x (critics: few)` |" in text
    (study / "bias.csv").write_text(",".join(report.BIAS) + "\na_sera,e9,plain,1,1,1,0\n")
    assert report.main([str(study)]) == 2


RUN = "runs/a_sera__e1__plain__1.csv"
BAD = {
    "no study": ("grid.toml", None, "no study here"),
    "not TOML": ("grid.toml", "title = ", "grid.toml: "),
    "no seeds": ("grid.toml", GRID.replace("seeds = [1, 2]\n", ""), "grid.toml: seeds is missing"),
    "a seed twice": ("grid.toml", GRID.replace("[1, 2]", "[1, 1]"), "grid.toml: seeds is missing"),
    "variant without critics": (
        "grid.toml",
        GRID.replace('sera = ""', 'sera = { options = "" }'),
        "the variant sera has neither a bonus nor critics",
    ),
    "unknown baseline": (
        "grid.toml",
        GRID.replace('baseline = "plain"', 'baseline = "x"'),
        "baseline 'x'",
    ),
    "other columns": (
        RUN,
        "phase,step,score\nonline,0,1\n",
        f"{RUN}: the columns are phase,step,score, not",
    ),
    "empty": (RUN, "", f"{RUN}: No columns"),
    "no rows": (RUN, HEADER, f"{RUN}: no rows"),
    "ragged": (RUN, HEADER + "online,0,0,1,9,1\nonline,0,0,1,9,1,7\n", RUN),
    "no number": (RUN, HEADER + "online,0,0,1,9,nan\n", f"{RUN}: no rows, or a number"),
    "unknown phase": (RUN, HEADER + "on,0,0,1,9,1\n", f"{RUN}: an unknown phase"),
    "cut off": (
        RUN,
        HEADER + "online,0,0,1,9,1\nonline,0,1,1,9,1\nonline,5,0,1,9,1\n",
        f"{RUN}: an unknown",
    ),
    "not of the grid": ("runs/a_sera__e1__plain__3.csv", HEADER, "__3.csv: grid.toml has no such"),
    "coverage columns": ("coverage.csv", HEADER, "coverage.csv: the columns are phase,"),
    "coverage of others": (
        "coverage.csv",
        ",".join(report.COVERAGE) + "\na_sera,e1,plain,3,10,1.0,1.0\n",
        "coverage.csv: a run that is not in grid.toml",
    ),
    "watched twice": (
        "watched.csv",
        "run,metric,value\n" + 2 * "a_sera__e1__plain__1,losses/td,1\n",
        "watched.csv: a metric of a run is there twice",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, study, capsys):
    """Exit code 2 and one line that names the file."""
    name, text, message = BAD[case]
    if text is None:
        (study / name).unlink()
    else:
        (study / name).write_text(text)
    assert report.main([str(study)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {study}") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(("text", "reason"), [("", "No columns"), ("a,b\n1,2\n", "phase,step")])
def test_curves_of_no_run(text, reason, tmp_path, capsys):
    """An evals.csv that is empty, or something else: named, with what it should have."""
    (tmp_path / "evals.csv").write_text(text)
    assert report.main([str(tmp_path), "--output", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'evals.csv'}: ") and reason in error


def test_runs_and_studies_together(study, tmp_path, capsys):
    """One kind at a time."""
    (tmp_path / "evals.csv").write_text(HEADER)
    assert report.main([str(tmp_path), str(study)]) == 2
    assert f"{study} is no run (evals.csv), but others are" in capsys.readouterr().err


def test_no_raw_evaluations(study, capsys):
    """Such a study is named and left alone, beside one that is rebuilt; alone it is an error."""
    bare = study.parent / "bare"
    bare.mkdir()
    (bare / "grid.toml").write_text(GRID)
    (bare / "table.md").write_text("as it was\n")
    assert report.main([str(study.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "bare: no raw evaluations, table.md left as it is",
        str(study / "table.md"),
    ]
    (bare / "runs").mkdir()  # an empty folder makes no difference
    assert report.main([str(bare)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {bare}: no study here has raw evaluations (runs/*.csv)\n"
    assert (bare / "table.md").read_text() == "as it was\n"
    assert sorted(path.name for path in bare.iterdir()) == ["grid.toml", "runs", "table.md"]


def test_no_folder(capsys):
    """It says what to name, and does not take the lack of folders for a list of runs."""
    assert report.main([]) == 2
    assert capsys.readouterr().err.startswith("error: no folder was named: give a study")


def test_coverage_without_raw_evaluations(study, capsys):
    """coverage.md comes from coverage.csv alone, so it is rebuilt all the same."""
    (study / "coverage.csv").write_text(
        ",".join(report.COVERAGE) + "\na_sera,e1,plain,1,10,1.0,2.0\n"
    )
    first = table(study, "coverage.md")
    for path in [*(study / "runs").iterdir(), study / "coverage.md", study / "table.md"]:
        path.unlink()
    assert report.main([str(study)]) == 2
    assert str(study / "coverage.md") in capsys.readouterr().out
    assert (study / "coverage.md").read_text() == first
    assert not (study / "table.md").exists()
