"""Reading D4RL files: what is kept of them, names, addresses, scores, return ranges.

Finding and fetching them: test_download.py. Files that contradict themselves: test_trajectories.py.
"""

import os
import re
import sys

import corrupt
import h5py
import numpy as np
import pytest
import torch

import calql_sera

ENV = "hopper-medium-v2"
FILE = "hopper_medium-v2.hdf5"
# Of the ten rows of the hand-made file: row 5 ends both ways, and the episode of rows 8 and 9 is
# cut off. Neither timeouts nor the last row are to be kept.
TERMINALS = (1, 5, 7)
TIMEOUTS = (3, 5)
KEPT = [0, 1, 2, 4, 6, 7, 8]
PACKAGE_COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals")
ROBOTS = ("hopper", "halfcheetah", "walker2d", "ant")
KINDS = ("random", "medium", "expert", "medium-expert", "medium-replay", "full-replay")
V0_KINDS = ("random", "medium", "expert", "medium-expert", "medium-replay")


def hand_made():
    """Ten Hopper rows with every kind of end, in the types of the old medium-replay files."""
    rows = np.arange(10)
    return {
        "observations": rows[:, None] + np.arange(11) / 16,
        "actions": np.stack([rows / 16, -rows / 16, np.ones(10)], axis=1),
        "rewards": rows[:, None] / 2 + 0.1,  # (N, 1)
        "terminals": np.isin(rows, TERMINALS).astype(np.float64),
        "timeouts": np.isin(rows, TIMEOUTS).astype(np.float64),
    }


def random_file():
    """500 Hopper rows of noise with many flags, also in neighbouring rows and in the last one."""
    rng = np.random.default_rng(7)
    arrays = {
        "observations": rng.normal(size=(500, 11)),
        "actions": rng.uniform(-1, 1, size=(500, 3)),
        "rewards": rng.normal(size=500),
        "terminals": rng.random(500) < 0.1,
        "timeouts": rng.random(500) < 0.1,
    }
    arrays["timeouts"][-1] = True
    return arrays


def gym_samples(real_data):
    """Dataset id and path of every genuine Gym-MuJoCo sample."""
    samples = {}
    for path in sorted((real_data / "real-samples").glob("*.hdf5")):
        match = re.fullmatch(r"((?:hopper|walker2d|halfcheetah|ant)_[a-z_]+)(-v\d)?", path.stem)
        if match:
            dataset_id = match[1].replace("_", "-") + (match[2] or "-v0")
            samples[dataset_id] = path
    assert samples
    return samples


def assert_equal_to_package(d4rl, env, path):
    """The loader's arrays are those of d4rl.qlearning_dataset, bit for bit."""
    with h5py.File(path) as file:
        raw = {name: file[name][:] for name in file if isinstance(file[name], h5py.Dataset)}
    raw["rewards"] = raw["rewards"].reshape(-1)
    expected = d4rl.qlearning_dataset(None, raw)
    loaded = calql_sera.load_d4rl(env, path)
    for name in PACKAGE_COLUMNS:
        assert loaded[name].dtype == expected[name].dtype, (env, name)
        assert loaded[name].shape == expected[name].shape, (env, name)
        assert loaded[name].tobytes() == expected[name].tobytes(), (env, name)


def url(dataset_id):
    """The last address that a dataset would be downloaded from: D4RL's own."""
    return f"http://{calql_sera.SERVER}/{calql_sera.find_task(dataset_id).file}"


@pytest.fixture(scope="module")
def d4rl():
    """The original package, if it is installed: the oracle."""
    os.environ["D4RL_SUPPRESS_IMPORT_ERROR"] = "1"
    reason = "the d4rl package is not installed"
    return pytest.importorskip("d4rl", reason=reason, exc_type=ImportError)


# ------------------------------ what is kept
def test_hand_made_file(tmp_path):
    """Rows kept, episode_ends against terminals, next observations.

    A terminal row's next observation is the next episode's first.
    """
    data = calql_sera.load_d4rl(ENV, corrupt.write(tmp_path / "x.hdf5", hand_made()))
    assert set(data) == {*PACKAGE_COLUMNS, "episode_ends"}
    assert data["observations"][:, 0].tolist() == KEPT
    assert data["observations"][2].tolist() == [2 + column / 16 for column in range(11)]
    assert data["next_observations"][:, 0].tolist() == [1, 2, 3, 5, 7, 8, 9]
    assert data["next_observations"][-1].tolist() == [9 + column / 16 for column in range(11)]
    assert data["actions"].tolist() == [[row / 16, -row / 16, 1] for row in KEPT]
    assert data["rewards"].tolist() == [np.float32(row / 2 + 0.1) for row in KEPT]
    assert data["terminals"].tolist() == [False, True, False, False, False, True, False]
    assert data["episode_ends"].tolist() == [False, True, True, True, False, True, True]


def test_types_and_shapes(tmp_path):
    """All comes as float32 or bool, rewards and flags (N,), from float64 and (N, 1) too."""
    # Flags as (N, 1) as well:
    wide = {name: array.reshape(10, -1) for name, array in hand_made().items()}
    for number, arrays in enumerate((hand_made(), wide)):
        data = calql_sera.load_d4rl(ENV, corrupt.write(tmp_path / f"{number}.hdf5", arrays))
        found = {name: (str(array.dtype), array.shape) for name, array in data.items()}
        assert found == {
            "observations": ("float32", (7, 11)),
            "actions": ("float32", (7, 3)),
            "rewards": ("float32", (7,)),
            "next_observations": ("float32", (7, 11)),
            "terminals": ("bool", (7,)),
            "episode_ends": ("bool", (7,)),
        }


def test_episode_ends_of_a_random_file(tmp_path):
    """An episode ends with its last kept row, found here by walking through the file."""
    arrays = random_file()
    kept = []
    ends = []
    for row in range(500):
        if arrays["timeouts"][row] or row == 499:
            if ends:
                ends[-1] = True  # this row is left out: its episode ended with the row before
        else:
            kept.append(row)
            ends.append(bool(arrays["terminals"][row]))
    data = calql_sera.load_d4rl(ENV, corrupt.write(tmp_path / "x.hdf5", arrays))
    observations = arrays["observations"][kept].astype(np.float32)
    np.testing.assert_array_equal(data["observations"], observations)
    assert data["episode_ends"].tolist() == ends
    assert np.all(data["episode_ends"][data["terminals"]])
    assert data["episode_ends"].sum() > data["terminals"].sum()


def test_stored_next_observations_are_not_used(tmp_path):
    """A file's own next_observations make no difference, as in the package."""
    arrays = hand_made() | {"next_observations": np.full((10, 11), 77.0)}
    data = calql_sera.load_d4rl(ENV, corrupt.write(tmp_path / "x.hdf5", arrays))
    assert data["next_observations"][:, 0].tolist() == [1, 2, 3, 5, 7, 8, 9]


def test_every_real_sample_loads(real_data):
    """Each genuine Gym-MuJoCo sample: sensible shapes, types, ends and consecutive states."""
    for env, path in gym_samples(real_data).items():
        data = calql_sera.load_d4rl(env, path)
        task = calql_sera.find_task(env)
        with h5py.File(path) as file:
            rows = len(file["rewards"])
            timeouts = int(file["timeouts"][:-1].sum())
        n = rows - 1 - timeouts
        observations, next_observations = data["observations"], data["next_observations"]
        assert observations.shape == next_observations.shape == (n, task.observation_dim), env
        assert data["actions"].shape == (n, task.action_dim), env
        for name in ("rewards", "terminals", "episode_ends"):
            assert data[name].shape == (n,), (env, name)
        assert all(np.isfinite(array).all() for array in data.values()), env
        assert data["episode_ends"].sum() == 2, env  # the samples hold two episodes
        assert data["episode_ends"][-1], env
        inside = ~data["episode_ends"][:-1]
        np.testing.assert_array_equal(next_observations[:-1][inside], observations[1:][inside])
        assert not np.array_equal(next_observations, observations), env


# ------------------------------ what HDF5 itself finds
@pytest.mark.parametrize("kind", corrupt.FOLLOWED)
def test_arrays_that_lie_elsewhere(kind, tmp_path):
    """Behind a link, in another file, put together from others: the same data."""
    expected = calql_sera.load_d4rl(ENV, corrupt.write(tmp_path / "y.hdf5", corrupt.columns()))
    for seed, name in enumerate(corrupt.NAMES):
        path = tmp_path / "x.hdf5"
        corrupt.damage_array(path, kind, name, seed)
        data = calql_sera.load_d4rl(ENV, path)
        for column, array in expected.items():
            np.testing.assert_array_equal(data[column], array, err_msg=f"{name}: {column}")
        path.unlink()


def test_an_array_that_was_never_written(tmp_path):
    """It is zeros, HDF5's fill value: no actions but zeros, and no flag is set."""
    for seed, name in enumerate(corrupt.NAMES):
        path = tmp_path / "x.hdf5"
        corrupt.damage_array(path, "never written", name, seed)
        data = calql_sera.load_d4rl(ENV, path)
        if name == "timeouts":
            assert np.flatnonzero(data["episode_ends"]).tolist() == [9, 28]  # 19 is gone
        else:
            assert not data[name].any(), name
        path.unlink()


# ------------------------------ the original package as oracle
def test_equal_to_the_package_on_made_up_files(d4rl, tmp_path):
    """Bit for bit what d4rl.qlearning_dataset gives, for the hand-made file and a random one."""
    for number, arrays in enumerate((hand_made(), random_file())):
        path = corrupt.write(tmp_path / f"{number}.hdf5", arrays)
        assert_equal_to_package(d4rl, ENV, path)


def test_equal_to_the_package_on_real_samples(d4rl, real_data):
    """Bit for bit what d4rl.qlearning_dataset gives, for every genuine Gym-MuJoCo sample."""
    for env, path in gym_samples(real_data).items():
        assert_equal_to_package(d4rl, env, path)


def test_addresses_of_v1_and_v2(d4rl):
    """All Gym-MuJoCo ids of the package's v1 and v2, no others, and the same addresses."""
    assert tuple(calql_sera.TASKS) == ROBOTS
    assert calql_sera.KINDS == KINDS
    known = {}
    for robot in ROBOTS:
        for kind in KINDS:
            for version in (1, 2):
                dataset_id = f"{robot}-{kind}-v{version}"
                known[dataset_id] = url(dataset_id)
    pattern = re.compile(rf"({'|'.join(ROBOTS)})-.*-v[12]")
    expected = {}
    for dataset_id, address in d4rl.infos.DATASET_URLS.items():
        if pattern.fullmatch(dataset_id):
            expected[dataset_id] = address
    assert len(expected) == 48
    assert known == expected


def test_addresses_of_v0(d4rl):
    """The package's v0, but for random-expert."""
    known = {}
    for robot in ROBOTS:
        for kind in V0_KINDS:
            known[f"{robot}-{kind}-v0"] = url(f"{robot}-{kind}-v0")
    pattern = re.compile(rf"({'|'.join(ROBOTS)})-(.*)-v0")
    expected = {}
    other_kinds = set()
    for dataset_id, address in d4rl.infos.DATASET_URLS.items():
        match = pattern.fullmatch(dataset_id)
        if match and match[2] in V0_KINDS:
            expected[dataset_id] = address
        elif match:
            other_kinds.add(match[2])
    assert known == expected
    assert other_kinds == {"random-expert"}


def test_reference_scores(d4rl):
    """The package's reference scores, for every id that it has."""
    lowest, highest = d4rl.infos.REF_MIN_SCORE, d4rl.infos.REF_MAX_SCORE
    for robot in ROBOTS:
        for version, kinds in enumerate((V0_KINDS, KINDS, KINDS)):
            for kind in kinds:
                dataset_id = f"{robot}-{kind}-v{version}"
                task = calql_sera.find_task(dataset_id)
                assert task.random_return == lowest[dataset_id], dataset_id
                assert task.expert_return == highest[dataset_id], dataset_id


# ------------------------------ names and scores by hand
@pytest.mark.parametrize(
    ("env", "env_id", "file"),
    [
        ("hopper-medium-v2", "Hopper-v4", "gym_mujoco_v2/hopper_medium-v2.hdf5"),
        (
            "halfcheetah-medium-expert-v1",
            "HalfCheetah-v4",
            "gym_mujoco_v1/halfcheetah_medium_expert-v1.hdf5",
        ),
        ("ant-full-replay-v2", "Ant-v4", "gym_mujoco_v2/ant_full_replay-v2.hdf5"),
        ("walker2d-medium-v0", "Walker2d-v4", "gym_mujoco/walker2d_medium.hdf5"),
        ("hopper-medium-replay-v0", "Hopper-v4", "gym_mujoco/hopper_mixed.hdf5"),
        ("walker2d-medium-replay-v0", "Walker2d-v4", "gym_mujoco/walker_mixed.hdf5"),
        ("hopper-medium-mini", "Hopper-v4", "data/hopper-medium-mini.hdf5"),
    ],
)
def test_tasks_and_files(env, env_id, file):
    """A few environments, and files on the server or in the repository."""
    task = calql_sera.find_task(env)
    assert task.env_id == env_id
    assert task.file == file
    assert task.horizon == 1000


# Unknown ids, and what each is told to try.
UNKNOWN = {
    "hopper-medum-v2": "did you mean hopper-medium-v2?",
    "hopper-medium": "did you mean hopper-medium-v2?",
    "hopper-medium-v3": "did you mean hopper-medium-v2?",
    "hopper-full-replay-v0": "did you mean hopper-full-replay-v2?",
    "Hopper-medium-v2": "did you mean hopper-medium-v2?",
    "hopper-medium-v2 ": "did you mean hopper-medium-v2?",
    "hopper-medium-v2\n": "did you mean hopper-medium-v2?",
    "halfcheeta-medium-reply-v1": "did you mean halfcheetah-medium-replay-v2?",
    "antmaze-umaze-v1": "did you mean antmaze-umaze-v2?",
    "antmaze-large-pley-v2": "did you mean antmaze-large-play-v2?",
    "zzz": "give one such as hopper-medium-v2",
    "": "give one such as hopper-medium-v2",
}


@pytest.mark.parametrize("env", UNKNOWN)
def test_unknown_ids(env):
    """One sentence with the id, and the nearest id or an example, which is in fact known."""
    with pytest.raises(ValueError) as caught:
        calql_sera.find_task(env)
    message = str(caught.value)
    start = f"--env {env} is no dataset that is supported, and Gymnasium cannot make it ("
    assert message.startswith(start)
    assert message.endswith(f"): {UNKNOWN[env]}")
    example = re.search(r"(?:such as|you mean) ([^?\s]+)\??$", message)[1]
    assert calql_sera.find_task(example)


def test_antmaze_without_its_environment(monkeypatch):
    """The file that is missing is named, and Gym-MuJoCo goes on without it."""
    for name in ("envs", "envs.antmaze"):  # so that importing it fails
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError) as caught:
        calql_sera.find_task("antmaze-umaze-v2")
    assert str(caught.value).startswith(
        "--env antmaze-umaze-v2 needs the file envs/antmaze.py beside"
    )
    assert calql_sera.find_task(ENV)


def test_normalized_score():
    """0 for the random return, 100 for the expert's, of every robot, for numbers and arrays."""
    references = {
        "hopper": (-20.272305, 3234.3),
        "halfcheetah": (-280.178953, 12135.0),
        "walker2d": (1.629008, 4592.3),
        "ant": (-325.6, 3879.7),
    }
    for robot, (lowest, highest) in references.items():
        scores = calql_sera.normalized_score(f"{robot}-random-v1", np.array([lowest, highest]))
        np.testing.assert_allclose(scores, [0, 100], atol=1e-9)
    assert calql_sera.normalized_score(ENV, -20.272305) == pytest.approx(0, abs=1e-12)
    assert calql_sera.normalized_score(ENV, 3234.3) == pytest.approx(100, abs=1e-9)
    scores = calql_sera.normalized_score(ENV, np.array([-20.272305, 1607.0138475, 3234.3]))
    np.testing.assert_allclose(scores, [0, 50, 100], atol=1e-9)
    assert calql_sera.normalized_score("hopper-medium-mini", 3234.3) == pytest.approx(100)
    assert calql_sera.normalized_score("walker2d-random-v0", 4592.3) == pytest.approx(100)


# ------------------------------ returns of the trajectories
@pytest.mark.parametrize(
    ("rewards", "ends", "expected"),
    [
        ([1, 2, 3, -1, -1, 4], [0, 1, 1, 0, 0, 1], 1),  # returns 3, 3 and 2
        ([-5, 10, 0.5], [1, 1, 1], 15),
        ([2, 2, 1, 3], [0, 1, 0, 1], 1000),  # all alike
        ([1, 2, 3], [0, 0, 1], 1000),  # a single one
        ([0, 0, 0, 0], [0, 1, 0, 1], 1000),
        ([2**24, 1, 2**24], [0, 1, 1], 1),  # which a sum of float32 would lose
    ],
)
def test_return_range(rewards, ends, expected):
    """Best minus worst return by hand; what would divide by zero scales nothing."""
    data = {"rewards": np.array(rewards, np.float32), "episode_ends": np.array(ends, bool)}
    assert calql_sera.return_range(data) == expected


def test_normalize_rewards(script, tmp_path):
    """With --normalize-rewards rewards are multiplied by 1000 / range of the kept trajectories.

    Of the hand-made file these are rows 0, 1; 2; 4; 6, 7; 8, with returns 0.7, 1.1, 2.1, 6.7, 4.1.
    """
    data = script.load_d4rl(ENV, corrupt.write(tmp_path / "x.hdf5", hand_made()))
    assert script.return_range(data) == pytest.approx(6.7 - 0.7, rel=1e-6)
    rewards = np.array(KEPT) / 2 + 0.1
    cases = {
        (): 1.0,
        ("--reward-scale", "3"): 3.0,
        ("--normalize-rewards",): 1000 / 6,
        ("--normalize-rewards", "--reward-scale", "3"): 500.0,
    }
    for options, scale in cases.items():
        preset = ["--env", "ant-medium-v2", "--reward-bias", "2", "--online-steps", "1"]
        args = script.parse_args([*preset, *options])  # ant has no preset for rewards
        buffer = script.ReplayBuffer(data, args, torch.device("cpu"))
        stored = buffer.as_columns(buffer.table[: buffer.size])["rewards"]
        assert buffer.reward_scale == pytest.approx(scale, rel=1e-6)
        np.testing.assert_allclose(stored, scale * rewards + 2, rtol=1e-6)
    from_scratch = script.ReplayBuffer(None, args, torch.device("cpu"))
    assert from_scratch.reward_scale == 3  # no dataset, so no range
