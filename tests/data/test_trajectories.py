"""Data files that contradict themselves or the task, lack time-outs, or come from elsewhere.

What a sound file gives: test_loader.py. Files of one's own environment: test_own_task.py.
"""

import hashlib
import importlib.util
import os
import re
from types import SimpleNamespace

import corrupt
import h5py
import numpy as np
import pytest

import calql_sera

ENV = "hopper-medium-v2"
HORIZON = 1000


def long_file(lengths, marks="timeouts", seed=0):
    """Hopper trajectories of these numbers of rows, with their own next_observations.

    Each ends as marks says, "terminals" or "timeouts"; with None, in nothing.
    """
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    states = rng.normal(size=(rows + len(lengths), 11)).astype(np.float32)
    ends = np.cumsum(lengths) - 1  # rows
    # A trajectory of n rows has n + 1 states, the last of which is no row.
    last_states = ends + 1 + np.arange(len(lengths))
    arrays = {
        "observations": np.delete(states, last_states, axis=0),
        "next_observations": np.delete(states, np.append(0, last_states[:-1] + 1), axis=0),
        "actions": rng.uniform(-1, 1, size=(rows, 3)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.zeros(rows, bool),
    }
    if marks:
        arrays[marks][ends] = True
    return arrays


def without(arrays, *names):
    return {name: array for name, array in arrays.items() if name not in names}


def reordered(arrays, rows):
    return {name: array[rows] for name, array in arrays.items()}


def load(path, *options, env=ENV):
    """What a run would load: through load_data, with all of its checks."""
    options = ["--env", env, "--dataset-path", str(path), *options]
    data, _, _ = calql_sera.load_data(calql_sera.parse_args(options))
    return data


@pytest.fixture
def written(tmp_path):
    """Stores arrays; gives the path."""
    return lambda arrays: corrupt.write(tmp_path / "x.hdf5", arrays)


def no_run(args, *others):
    """Stands in for set_up: loads the data, and goes no further."""
    calql_sera.load_data(args)
    pytest.fail("the data was taken")


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """Runs main on arrays or a file, which has to be refused: gives its one line on stderr."""

    def run(arrays, *options):
        path = arrays
        if isinstance(arrays, dict):
            path = corrupt.write(tmp_path / "x.hdf5", arrays)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(calql_sera, "set_up", no_run)
        before = corrupt.contents(tmp_path)
        with pytest.raises(SystemExit) as caught:
            calql_sera.main(["--env", ENV, "--dataset-path", str(path), *options])
        assert caught.value.code == 2
        assert corrupt.contents(tmp_path) == before
        stderr = capsys.readouterr().err.strip()
        assert stderr.startswith("error: ") and "\n" not in stderr
        # One fault, one message: what is wrong, and behind the last colon what to do.
        faults = ("no array", "contradict", "next_observations of row", "a trajectory of")
        faults += ("actions up to", "format:", "cannot be read", "flags other", "NaN")
        assert sum(fault in stderr for fault in faults) == 1, stderr
        return stderr

    return run


def test_control(written):
    """What the faults below are made from is taken, with and without its next_observations."""
    arrays = long_file([30, 40, 50])
    for kept in (arrays, without(arrays, "next_observations")):
        data = load(written(kept))
        assert len(data["rewards"]) == 120 - 3
        assert np.flatnonzero(data["episode_ends"]).tolist() == [28, 67, 116]


# ------------------------------ next_observations
def test_shuffled_rows(refuse):
    """Rows in random order: the first row that is not followed by its next state is named."""
    arrays = without(long_file([300], marks=None), "timeouts")
    rows = np.random.default_rng(1).permutation(300)
    follows = rows[1:] == rows[:-1] + 1
    first = np.flatnonzero(~follows)[0]
    shuffled = reordered(arrays, rows) | {"timeouts": np.zeros(300, bool)}
    message = refuse(shuffled)
    assert f"next_observations of row {first} is not the next row's observation" in message
    assert f"in {np.sum(~follows)} of 300 rows" in message
    assert "data/convert.py" in message and message.endswith("--format arrays keeps them apart")


@pytest.mark.parametrize("gone", [1, 57, 98])
def test_a_row_that_was_filtered_out(gone, refuse):
    """A single row is missing: the one before it is named."""
    arrays = long_file([100])
    rows = np.delete(np.arange(100), gone)
    message = refuse(reordered(arrays, rows))
    assert f"next_observations of row {gone - 1} is" in message
    assert "in 1 of 99 rows" in message


def test_joined_trajectories(refuse):
    """Time-outs that are lost show in next_observations, below the horizon too."""
    arrays = long_file([30, 40, 50], marks=None)
    message = refuse(arrays)
    assert "next_observations of row 29 is" in message
    assert "in 2 of 120 rows" in message


def test_filtered_without_time_outs(refuse):
    """Where time-outs are counted, for lack of an array, such rows are found all the same."""
    arrays = without(long_file([100]), "timeouts")
    message = refuse(reordered(arrays, np.delete(np.arange(100), 10)))
    assert "next_observations of row 9 is" in message


@pytest.mark.parametrize("marks", ["terminals", "timeouts"])
def test_ends_may_differ(marks, written):
    """The last row of a trajectory has a next state that is no row: that is as it should be."""
    arrays = long_file([30, 40, 50], marks)
    observations, given = arrays["observations"], arrays["next_observations"]
    assert not np.array_equal(given[29], observations[30])  # the control
    load(written(arrays))


def test_rounding_is_let_through(refuse, written):
    """Next states that were stored with fewer digits are the same; a hundredth is not."""
    arrays = long_file([50])
    rounded = arrays["next_observations"].astype(np.float16).astype(np.float32)
    differences = np.abs(rounded - arrays["next_observations"])
    assert 1e-4 < differences.max() < 1e-3
    load(written(arrays | {"next_observations": rounded}))
    moved = arrays["next_observations"].copy()
    moved[20, 10] += 0.01
    assert "next_observations of row 20 is" in refuse(arrays | {"next_observations": moved})


def test_flags_of_other_types(written):
    """Ends are seen in flags of any type and shape, too."""
    arrays = long_file([30, 40])
    for kind in ("f4", "u1", "i8"):
        flags = {name: arrays[name].astype(kind)[:, None] for name in ("terminals", "timeouts")}
        assert len(load(written(arrays | flags))["rewards"]) == 68


@pytest.mark.parametrize("shape", [(50, 5), (49, 11), (50,)])
def test_next_observations_of_another_shape(shape, written):
    """They are something else, and no reason for a refusal."""
    arrays = long_file([50]) | {"next_observations": np.zeros(shape)}
    assert len(load(written(arrays))["rewards"]) == 49


def test_next_observations_of_text(written, tmp_path, monkeypatch):
    """What is no number ends in a sentence or is let be, but in no traceback."""
    arrays = long_file([50]) | {"next_observations": np.full((50, 11), b"text")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calql_sera, "train", lambda *inputs: None)
    options = ["--dataset-path", str(written(arrays)), "--run-dir", str(tmp_path / "run")]
    try:
        calql_sera.main([*options, "--device", "cpu", "--threads", "1"])
    except SystemExit as error:
        assert error.code == 2


def test_d4rl_s_own_file_is_taken_as_it_is(written, monkeypatch):
    """A file with D4RL's checksum is not checked against itself, by whatever path it comes."""
    path = written(long_file([30, 40], marks=None))
    with pytest.raises(ValueError, match="next_observations of row 29"):
        load(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(calql_sera.CHECKSUMS, ENV, sha256[:16])
    assert len(load(path)["rewards"]) == 69


def samples(folder):
    """Dataset ids and paths of the genuine samples, of Adroit's only where its models are."""
    families = {"antmaze"}
    if importlib.util.find_spec("gymnasium_robotics"):
        families |= set(calql_sera.FAMILIES)
    found = {}
    for path in sorted(folder.glob("*.hdf5")):
        robot = re.fullmatch(r"((?:hopper|walker2d|halfcheetah|ant)_[a-z_]+)(-v\d)?", path.stem)
        if robot:
            found[robot[1].replace("_", "-") + (robot[2] or "-v0")] = path
        elif path.stem.partition("-")[0] in families:
            found[path.stem] = path
    return found


def test_genuine_samples_are_taken(real_data):
    """Each one loads as --dataset-path, with all checks: Gym-MuJoCo, AntMaze, Adroit.

    The samples of AntMaze hold no success: what comes after these checks refuses them.
    """
    found = samples(real_data / "real-samples")
    refused = {}
    for env, path in found.items():
        try:
            data = load(path, env=env)
        except ValueError as error:
            refused[env] = str(error)
        else:
            assert len(data["rewards"]) > 20, env
    mazes = [env for env in found if env.startswith("antmaze")]
    assert len(mazes) >= 5 and len(found) - len(mazes) >= 10
    wrong = [reason for reason in refused.values() if "never reaches the goal" not in reason]
    assert wrong == []
    assert sorted(refused) == sorted(mazes)
    for env in mazes:
        data = calql_sera.load_d4rl(env, found[env])
        calql_sera.check_trajectories(data, calql_sera.find_task(env), found[env])


def test_regenerated_files_are_taken(real_data):
    """Long files in D4RL's format, with all of their trajectories."""
    paths = sorted((real_data / "regenerated").glob("*-regen-[12]00k.hdf5"))
    assert paths
    for path in paths:
        env = path.stem.split("-regen")[0].replace("_", "-")
        assert len(load(path, env=env)["rewards"]) > 90_000


# ------------------------------ the horizon
def test_a_trajectory_of_the_horizon(written):
    """1000 steps are a whole episode, whichever way it ends."""
    for marks, kept in (("terminals", 2010 - 1), ("timeouts", 2010 - 3)):
        arrays = without(long_file([HORIZON, 10, HORIZON], marks), "next_observations")
        assert len(load(written(arrays))["rewards"]) == kept


def test_a_trajectory_beyond_the_horizon(refuse):
    """One step more: refused with the number of steps, where they begin, and the fix."""
    arrays = without(long_file([20, HORIZON + 1, 30], "terminals"), "next_observations")
    message = refuse(arrays)
    assert "a trajectory of 1001 steps, from transition 20, but an episode has 1000" in message
    assert "mark the last row of each trajectory in 'timeouts'" in message


def test_lost_time_outs(refuse):
    """Whole episodes whose time-outs were all lost are one trajectory of thousands of steps."""
    arrays = without(long_file([HORIZON] * 3, marks=None), "next_observations")
    assert "a trajectory of 2999 steps, from transition 0," in refuse(arrays)


def test_time_outs_that_were_never_written(tmp_path, refuse):
    """An array that was created and left at that is zeros, not missing: no trajectory ends."""
    arrays = without(long_file([HORIZON] * 2), "next_observations", "timeouts")
    path = corrupt.write(tmp_path / "x.hdf5", arrays)
    for chunks in (None, (100,)):
        with h5py.File(path, "a") as file:
            if "timeouts" in file:
                del file["timeouts"]
            file.create_dataset("timeouts", (2 * HORIZON,), bool, chunks=chunks)
        assert "a trajectory of 1999 steps" in refuse(path)
    with h5py.File(path, "a") as file:
        del file["timeouts"]  # the control: without the array they are counted
    assert np.flatnonzero(load(path)["episode_ends"]).tolist() == [998, 1997]


def test_terminals_that_were_never_written(tmp_path):
    """They are zeros, too: the trajectories end in their time-outs alone."""
    path = corrupt.write(tmp_path / "x.hdf5", without(long_file([30, 40]), "terminals"))
    with h5py.File(path, "a") as file:
        file.create_dataset("terminals", (70,), "f4")
    data = load(path)
    assert not data["terminals"].any()
    assert np.flatnonzero(data["episode_ends"]).tolist() == [28, 67]


def test_no_horizon_no_length():
    """Where a task has no horizon, as AntMaze's data, trajectories have any length."""
    task = calql_sera.find_task("antmaze-umaze-v2")
    assert task.horizon is None


# ------------------------------ time-outs that are counted
@pytest.mark.parametrize(
    ("terminals", "horizon", "expected"),
    [
        ([], 3, []),
        ([0, 0, 0, 0, 0, 0, 0], 3, [2, 5]),
        ([0, 0, 1, 0, 0, 0, 0], 3, [2, 5]),
        ([0, 1, 0, 0, 0, 0, 0], 3, [3, 6]),  # after a terminal d4rl counts from 1
        ([1, 1, 1, 0, 0, 0], 3, [4]),
        ([0, 0, 0], 3, [2]),
        ([0, 0], 3, []),
        ([0, 0, 0], 1, [0, 1, 2]),
    ],
)
def test_counted_time_outs(terminals, horizon, expected):
    """Every horizon-th step since the last time-out, one less since a terminal, by hand."""
    timeouts = calql_sera.counted_timeouts(np.array(terminals, bool), horizon)
    assert timeouts.dtype == bool and timeouts.shape == (len(terminals),)
    assert np.flatnonzero(timeouts).tolist() == expected


def test_file_without_time_outs(written):
    """Two and a half episodes: two ends are counted, and the rest is a trajectory of its own."""
    arrays = without(long_file([2500], marks=None), "timeouts", "next_observations")
    data = load(written(arrays))
    assert len(data["rewards"]) == 2500 - 3
    assert np.flatnonzero(data["episode_ends"]).tolist() == [998, 1997, 2496]
    kept = np.delete(np.arange(2500), [999, 1999, 2499])
    np.testing.assert_array_equal(data["observations"], arrays["observations"][kept])
    np.testing.assert_array_equal(data["next_observations"], arrays["observations"][kept + 1])


def test_file_without_time_outs_and_with_next_observations(written):
    """Where a time-out is counted, the next state may be another: that row is left out."""
    arrays = without(long_file([HORIZON, HORIZON, 500]), "timeouts")
    assert len(load(written(arrays))["rewards"]) == 2500 - 3


def test_file_without_time_outs_and_horizon(written):
    """Where no horizon is known, they cannot be counted, and the file is refused."""
    env = "antmaze-umaze-v2"
    rows = {
        "observations": np.zeros((20, 29)),
        "actions": np.zeros((20, 8)),
        "rewards": np.ones(20),
        "terminals": np.arange(20) == 9,
    }
    with pytest.raises(ValueError, match="no array 'timeouts': give a file that marks"):
        load(written(rows), env=env)
    assert len(load(written(rows | {"timeouts": np.zeros(20)}), env=env)["rewards"]) == 19


@pytest.fixture(scope="module")
def d4rl():
    """The original package, if it is installed: the oracle."""
    os.environ["D4RL_SUPPRESS_IMPORT_ERROR"] = "1"
    reason = "the d4rl package is not installed"
    return pytest.importorskip("d4rl", reason=reason, exc_type=ImportError)


def assert_counted_as_by_the_package(d4rl, path, arrays):
    """A file without time-outs gives the package's arrays, bit for bit."""
    env = SimpleNamespace(_max_episode_steps=HORIZON)
    expected = d4rl.qlearning_dataset(env, {name: np.array(arrays[name]) for name in arrays})
    loaded = calql_sera.load_d4rl(ENV, path)
    for name, array in expected.items():
        assert loaded[name].tobytes() == array.tobytes(), name


def test_counted_as_by_the_package(d4rl, written):
    """Without terminals."""
    arrays = without(long_file([2500], marks=None), "timeouts", "next_observations")
    assert_counted_as_by_the_package(d4rl, written(arrays), arrays)


def test_counted_as_by_the_package_after_terminals(d4rl, written):
    """With terminals in between, at random and just before, at and after the horizon."""
    lengths = [30, 999, 1000, 20, 1001, 400, 1500]
    arrays = without(long_file(lengths, "terminals"), "timeouts", "next_observations")
    arrays["terminals"][-1] = False
    assert_counted_as_by_the_package(d4rl, written(arrays), arrays)


# ------------------------------ actions beyond +-1
def beyond(value):
    """The sound file with one action that is too large or too small."""
    arrays = long_file([30])
    arrays["actions"][7, 1] = value
    return arrays


@pytest.mark.parametrize(
    ("value", "how_far"), [(1.05, "1.05"), (-2.5, "2.5"), (1.00001, "1.00001")]
)
def test_actions_beyond(value, how_far, refuse):
    """How far they go, and both ways out."""
    message = refuse(beyond(value))
    assert f"actions up to {how_far}, not within [-1, 1]: --clip-actions" in message
    assert "data/convert.py" in message


def test_clipped_actions(script, written):
    """--clip-actions takes them; the networks see them clipped, and all others as they are."""
    path = written(beyond(-2.5))
    options = ["--env", ENV, "--dataset-path", str(path), "--clip-actions", "--online-steps", "1"]
    args = script.parse_args(options)
    data, _, _ = script.load_data(args)
    buffer = script.ReplayBuffer(data, args, script.torch.device("cpu"))
    stored = buffer.as_columns(buffer.table[: buffer.size])["actions"].numpy()
    expected = beyond(-2.5)["actions"][:29].clip(-1 + 1e-5, 1 - 1e-5)
    np.testing.assert_array_equal(stored, expected)
    assert stored[7, 1] == np.float32(-1 + 1e-5)


def test_clip_actions_of_a_sound_file(written):
    """There it changes nothing."""
    path = written(long_file([30]))
    one, other = load(path), load(path, "--clip-actions")
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


def test_clip_actions_takes_no_nan(refuse):
    """It is no way around the other checks."""
    assert "actions in" in refuse(beyond(np.nan), "--clip-actions")


# ------------------------------ files of other libraries
def groups(name, count=2):
    """Arrays by name, once for every episode."""
    arrays = long_file([20])
    return {
        f"{name}_{number}/{key}": arrays[column]
        for number in range(count)
        for key, column in (("obs", "observations"), ("actions", "actions"))
    }


FOREIGN = {
    "robomimic": groups("data/demo"),
    "minari": groups("episode"),
    "d3rlpy": {"observations_0": np.zeros((20, 11)), "actions_0": np.zeros((20, 3))},
    "d3rlpy of old": long_file([20]) | {"episode_terminals": np.zeros(20)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_formats(kind, refuse, tmp_path):
    """The library is named, and what makes a file in D4RL's format of it."""
    message = refuse(FOREIGN[kind])
    path = tmp_path / "x.hdf5"
    expected = f"{path} is in {kind.split()[0]}'s format: python data/convert.py {path} OUT.hdf5"
    assert expected in message


@pytest.mark.parametrize("missing", ["observations", "actions", "rewards", "terminals"])
def test_missing_array(missing, refuse):
    """It is named, and where the format is described."""
    message = refuse(without(long_file([20]), missing))
    assert f"no array '{missing}'" in message
    assert "docs/own_task.md" in message


def test_several_faults_are_one_message(refuse):
    """A file with several faults is refused for one of them."""
    arrays = reordered(beyond(1.5), np.arange(30)[::-1])
    refuse(without(arrays, "rewards"))
    refuse(arrays)


# ------------------------------ files in use
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_file_that_this_process_holds_open(mode, written):
    """In a notebook, say: it loads, or the advice is to close it, not to fetch it again."""
    path = written(long_file([30]))
    with h5py.File(path, mode):
        try:
            data = load(path)
        except ValueError as error:
            assert "close it first: this process has it open" in str(error)
            assert "again" not in str(error)
        else:
            assert len(data["rewards"]) == 29
    assert len(load(path)["rewards"]) == 29


def test_a_file_that_is_held_open_for_reading_without_locks(written):
    """A handle like the script's own is no obstacle."""
    path = written(long_file([30]))
    with h5py.File(path, locking=False):
        assert len(load(path)["rewards"]) == 29


def test_a_file_that_another_process_has_locked(written):
    """HDF5's locks are not asked for: some file systems have none."""
    fcntl = pytest.importorskip("fcntl")
    path = written(long_file([30]))
    with open(path, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert len(load(path)["rewards"]) == 29


def test_a_broken_file_is_to_be_fetched_again(refuse, tmp_path):
    """The control: what is no HDF5 gets that advice, and one that is short, too."""
    path = corrupt.write(tmp_path / "x.hdf5", long_file([30]))
    body = path.read_bytes()
    for broken in (body[: len(body) // 2], b"<html>403</html>", b""):
        path.write_bytes(broken)
        message = refuse(path)
        assert f"{path} cannot be read as HDF5 (" in message
        assert "fetch it again" in message
