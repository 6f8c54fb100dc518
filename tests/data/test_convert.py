"""data/convert.py: every format gives its own transitions back, and the rest is refused."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT

import calql_sera

ENV = "hopper-medium-v2"  # 11 observations, 3 actions
# Steps and end of each trajectory. The last one ends by a terminal, in the last row of the file.
SHAPES = [(4, "cut"), (1, "terminal"), (3, "terminal"), (1, "cut"), (5, "cut"), (2, "terminal")]


def load_program():
    """data/convert.py as a module: data/ is no package."""
    spec = importlib.util.spec_from_file_location("convert", ROOT / "data" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert"] = module  # where tyro looks for it
    spec.loader.exec_module(module)
    return module


convert = load_program()


# ------------------------------ trajectories and their transitions
def make_episodes(shapes=SHAPES, dtype=np.float32, low=-1, high=1):
    """Trajectories of noise: T + 1 observations (T + 1, 11), T of all the rest."""
    rng = np.random.default_rng(0)
    episodes = []
    for steps, end in shapes:
        terminals = np.zeros(steps, dtype=bool)
        terminals[-1] = end == "terminal"
        episode = {
            "observations": rng.normal(size=(steps + 1, 11)).astype(dtype),
            "actions": rng.uniform(low, high, size=(steps, 3)).astype(dtype),
            "rewards": rng.normal(size=steps).astype(dtype),
            "terminals": terminals,
        }
        episodes.append(episode)
    return episodes


def transitions_of(episodes, last_is_known=True):
    """What the loader has to give: one tuple for each step, by a plain loop.

    last_is_known: the source has the observation after the last step of a trajectory that is cut.
    """
    found = []
    for episode in episodes:
        steps = len(episode["actions"])
        kept = steps if last_is_known or episode["terminals"][-1] else steps - 1
        for step in range(kept):
            state, next_state = episode["observations"][step : step + 2]
            values = [episode[name][step] for name in ("actions", "rewards", "terminals")]
            found.append((state, *values, next_state, step == kept - 1))
    return found


def assert_gives(path, transitions):
    """The loader gives exactly these, in this order; next observations matter without terminal."""
    data = calql_sera.load_d4rl(ENV, path)
    names = ("observations", "actions", "rewards", "terminals", "next_observations", "episode_ends")
    expected = {name: np.array(column) for name, column in zip(names, zip(*transitions))}
    assert len(data["rewards"]) == len(transitions)
    data["next_observations"][data["terminals"]] = 0
    expected["next_observations"][expected["terminals"]] = 0
    expected["episode_ends"] |= expected["terminals"]
    for name in names:
        np.testing.assert_array_equal(data[name], expected[name].astype(data[name].dtype), name)


def flat(episodes, with_last=False):
    """All trajectories in one array per name; with_last: T + 1 rows each, the last made up."""
    columns = {}
    for name in ("observations", "actions", "rewards", "terminals"):
        rows = [each[name][: len(each["actions"]) + with_last] for each in episodes]
        if with_last and name != "observations":
            rows = [np.concatenate([each, each[-1:]]) for each in rows]
        columns[name] = np.concatenate(rows)
    if not with_last:
        following = [each["observations"][1:] for each in episodes]
        columns["next_observations"] = np.concatenate(following)
    lengths = [len(each["actions"]) + with_last for each in episodes]
    columns["ends"] = np.concatenate([last_of(length) for length in lengths])
    return columns


def last_of(steps):
    """False, ..., False, True."""
    return np.arange(steps) == steps - 1


# ------------------------------ sources, by hand
def write_tree(path, tree):
    """An HDF5 file of nested dicts."""
    with h5py.File(path, "w") as file:
        fill(file, tree)
    return path


def fill(group, tree):
    """Datasets and groups below an HDF5 group."""
    for name, node in tree.items():
        if isinstance(node, dict):
            fill(group.create_group(name), node)
        else:
            group[name] = node


def split(observations):
    """(T, 11) as Dict observations, the order of names being another than that of columns."""
    return {
        "speed": observations[:, :6],
        "goal": {"b": observations[:, 6], "a": observations[:, 7:9]},
        "joints": observations[:, 9:],
    }


# split() by the names of its keys
BY_NAME = [7, 8, 6, 9, 10, 0, 1, 2, 3, 4, 5]


def reordered(episodes, order):
    """The same trajectories, their observations in another order of columns."""
    return [each | {"observations": each["observations"][:, order]} for each in episodes]


def minari_tree(episodes, observations=lambda array: array):
    """main_data.hdf5: T + 1 observations in each episode."""
    tree = {}
    for number, each in enumerate(episodes):
        tree[f"episode_{number}"] = {
            "observations": observations(each["observations"]),
            "actions": each["actions"],
            "rewards": each["rewards"],
            "terminations": each["terminals"],
            "truncations": last_of(len(each["actions"])),  # terminated ones, too
        }
    return tree


def robomimic_tree(episodes, observations=lambda array: {"flat": array}, with_next=True):
    """A robomimic file, with eleven demonstrations or more in another order by name."""
    demos = {}
    for number, each in enumerate(episodes):
        demos[f"demo_{number}"] = {
            "obs": observations(each["observations"][:-1]),
            "actions": each["actions"],
            "rewards": each["rewards"],
            "dones": each["terminals"].astype(np.int64),
        }
        if with_next:
            demos[f"demo_{number}"]["next_obs"] = observations(each["observations"][1:])
    return {"data": demos, "mask": {"train": np.array([b"demo_0"])}}


def d3rlpy_tree(episodes):
    """What ReplayBuffer.dump of d3rlpy 2 writes."""
    tree = {"columns": np.array([b"observations"]), "version": "2.1", "num_episodes": len(episodes)}
    for number, each in enumerate(episodes):
        tree[f"observations_{number}"] = each["observations"][:-1]
        tree[f"actions_{number}"] = each["actions"]
        tree[f"rewards_{number}"] = each["rewards"][:, None]
        tree[f"terminated_{number}"] = bool(each["terminals"][-1])
    return tree


def first_d3rlpy_tree(episodes):
    """What MDPDataset.dump of d3rlpy 1 writes."""
    columns = flat(episodes)
    return {
        "observations": columns["observations"],
        "actions": columns["actions"],
        "rewards": columns["rewards"],
        "terminals": columns["terminals"].astype(np.float32),
        "episode_terminals": columns["ends"].astype(np.float32),
        "discrete_action": False,
        "version": "1.0",
    }


def ogbench_arrays(episodes, kind):
    """OGBench's three forms: its file's, the compact, the regular one; with rewards and masks."""
    columns = flat(episodes, with_last=kind != "regular")
    arrays = {name: columns[name] for name in ("observations", "actions", "rewards")}
    arrays["masks"] = 1 - columns["terminals"].astype(np.float32)
    ends = columns["ends"]
    if kind == "regular":
        arrays["next_observations"] = columns["next_observations"]
    if kind == "compact":
        arrays["valids"] = 1 - ends.astype(np.float32)
        ends = ends | np.append(ends[1:], False)
    return arrays | {"terminals": ends.astype(np.float32)}


# ------------------------------ running the program
@pytest.fixture
def run(tmp_path, capsys):
    """Convert a source: gives the new file, its attributes and what was printed."""

    def run(source, *options):
        output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}.hdf5"
        convert.main([str(source), str(output), *options])
        with h5py.File(output) as file:
            return output, dict(file.attrs), capsys.readouterr().out

    return run


@pytest.fixture
def refuse(tmp_path, capsys):
    """Convert a source, which has to be refused: gives the line on stderr. No file may appear."""

    def run(source, *options):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            convert.main([str(source), str(tmp_path / "out.hdf5"), *map(str, options)])
        stderr = capsys.readouterr().err.strip()
        assert caught.value.code == 2
        assert stderr.startswith("error: ") and "\n" not in stderr, stderr
        assert sorted(tmp_path.rglob("*")) == before
        return stderr

    return run


# ------------------------------ D4RL's rows
def test_closing_rows_by_hand(tmp_path):
    """A trajectory that is cut gets a closing row, a terminal none, but for the file's last row."""
    rows = convert.Rows(
        observations=np.array([[0], [1], [5], [6], [8]], dtype=np.float32),
        actions=np.array([[0.1], [0.2], [0.3], [0.4], [0.5]]),
        rewards=np.array([1, 2, 3, 4, 5], dtype=np.float32),
        next_observations=np.array([[1], [2], [6], [7], [9]], dtype=np.float32),
        terminals=np.array([False, False, False, True, True]),
        ends=np.array([False, True, False, True, True]),
        has_next=np.array([True, True, True, True, True]),
    )
    arrays, ends = convert.d4rl_arrays(rows)
    assert arrays["observations"].ravel().tolist() == [0, 1, 2, 5, 6, 8, 9]
    np.testing.assert_allclose(arrays["actions"].ravel(), [0.1, 0.2, 0, 0.3, 0.4, 0.5, 0])
    assert arrays["rewards"].tolist() == [1, 2, 0, 3, 4, 5, 0]
    assert np.flatnonzero(arrays["terminals"]).tolist() == [4, 5]
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [2, 6]
    assert ends.tolist() == rows.ends.tolist()
    types = {name: str(array.dtype) for name, array in arrays.items()}
    floats = dict.fromkeys(("observations", "actions", "rewards"), "float32")
    assert types == floats | {"terminals": "bool", "timeouts": "bool"}


@pytest.mark.parametrize("seed", range(30))
def test_any_flags(seed, tmp_path):
    """Whatever the flags and jumps: steps with a next state or a terminal survive, no others."""
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(2, 40))
    observations = rng.normal(size=(steps, 11)).astype(np.float32)
    following = np.roll(observations, -1, axis=0)
    jumps = rng.random(steps) < rng.choice([0, 0.3, 1])
    following[jumps] = rng.normal(size=(jumps.sum(), 11))
    has_next = rng.random(steps) < rng.choice([0.5, 1])
    has_next[0] = True
    terminals = rng.random(steps) < rng.choice([0, 0.3])
    ends = (rng.random(steps) < 0.2) | ~has_next
    ends[-1] = True
    rows = convert.Rows(
        observations=observations,
        actions=rng.uniform(-1, 1, size=(steps, 3)),
        rewards=rng.normal(size=steps).astype(np.float32),
        next_observations=following,
        terminals=terminals,
        ends=ends,
        has_next=has_next,
    )
    arrays, _ = convert.d4rl_arrays(rows)
    convert.write(str(tmp_path / "x.hdf5"), arrays, {})
    expected = []
    for step in np.flatnonzero(has_next | terminals):
        breaks = ends[step] or jumps[step] or not (has_next | terminals)[step + 1]
        values = (observations[step], rows.actions[step], rows.rewards[step], terminals[step])
        expected.append((*values, following[step], breaks))
    assert_gives(tmp_path / "x.hdf5", expected)


# ------------------------------ formats
def test_minari_file(run, tmp_path):
    """main_data.hdf5 without the package: every step survives, in the order of the numbers."""
    episodes = make_episodes([*SHAPES, *SHAPES])  # episode_10 comes before episode_2 by name
    source = write_tree(tmp_path / "main_data.hdf5", minari_tree(episodes))
    output, attributes, printed = run(source)
    assert_gives(output, transitions_of(episodes))
    assert "format: minari (recognised)" in printed
    assert attributes["episodes"] == len(episodes)
    assert attributes["steps_without_next_observation"] == 0
    with h5py.File(output) as file:
        assert len(file["rewards"]) == 32 + 6 + 1  # steps, cut trajectories, the file's end


def test_dict_observations(run, tmp_path):
    """Nested keys side by side, by name or as --keys says; a float64 source is rounded once."""
    episodes = make_episodes(dtype=np.float64)
    source = write_tree(tmp_path / "main_data.hdf5", minari_tree(episodes, split))
    output, attributes, _ = run(source)
    assert attributes["observation_keys"] == "goal/a,goal/b,joints,speed"
    assert_gives(output, transitions_of(reordered(episodes, BY_NAME)))
    order = "speed,goal/b,goal/a,joints"
    output, attributes, _ = run(source, "--keys", order)
    assert attributes["observation_keys"] == order
    assert_gives(output, transitions_of(episodes))


def test_minari_action_space(run, refuse, tmp_path):
    """Its bounds become -1 and 1 by themselves, unless the user says others or there are none."""
    low, high = [-2, 0, -1], [2, 1, 3]
    episodes = make_episodes(low=low, high=high)
    source = write_tree(tmp_path / "main_data.hdf5", minari_tree(episodes))
    assert "action 0" in refuse(source)
    space = {"type": "Box", "dtype": "float32", "shape": [3], "low": low, "high": high}

    def describe(space):
        metadata = {"action_space": json.dumps(space), "dataset_id": "my/data-v0"}
        source.with_name("metadata.json").write_text(json.dumps(metadata))

    def scaled(low, high):
        low, high = np.array(low), np.array(high)
        middle, half = (high + low) / 2, (high - low) / 2
        return [each | {"actions": (each["actions"] - middle) / half} for each in episodes]

    describe(space)
    output, attributes, _ = run(source)
    actions = calql_sera.load_d4rl(ENV, output)["actions"]
    expected = np.concatenate([each["actions"] for each in scaled(low, high)])
    np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-6)
    assert np.ptp(actions, axis=0).min() > 1.5
    assert attributes["action_low"].tolist() == low
    assert attributes["action_high"].tolist() == high
    assert attributes["dataset_id"] == "my/data-v0"
    output, attributes, _ = run(source, "--action-low=-4", "--action-high=4,2,6")
    actions = calql_sera.load_d4rl(ENV, output)["actions"]
    expected = np.concatenate([each["actions"] for each in scaled([-4, -4, -4], [4, 2, 6])])
    np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-6)
    assert attributes["action_high"].tolist() == [4, 2, 6]
    describe(space | {"low": [-np.inf] * 3, "high": [np.inf] * 3})
    assert "action 0" in refuse(source)
    describe({"type": "Discrete", "n": 4})
    assert "Discrete" in refuse(source)
    describe(space | {"low": "x"})
    assert "metadata.json is damaged" in refuse(source)
    for damage in (b'{"dataset_id": ', b"\xff", b"[]"):
        source.with_name("metadata.json").write_bytes(damage)
        assert "metadata.json is damaged" in refuse(source)


@pytest.fixture
def make_minari(tmp_path, monkeypatch):
    """Write a data set with the package itself: gives its id. Skips where that is missing."""
    minari = pytest.importorskip("minari", reason="minari is not installed (checked with 0.5.4)")
    from gymnasium import spaces

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def make(name, episodes, observation_space, action_space, data_format, observations):
        buffers = []
        for each in episodes:
            steps = len(each["actions"])
            buffer = minari.data_collector.EpisodeBuffer(
                observations=observations(each["observations"]),
                actions=each["actions"],
                rewards=list(each["rewards"]),
                terminations=list(each["terminals"]),
                truncations=list(last_of(steps) & ~each["terminals"]),
            )
            buffers.append(buffer)
        minari.create_dataset_from_buffers(
            dataset_id=name,
            buffer=buffers,
            observation_space=observation_space,
            action_space=action_space,
            data_format=data_format,
        )
        return name

    make.spaces = spaces
    make.version = minari.__version__
    return make


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_minari_package(data_format, make_minari, run, refuse, tmp_path):
    """An id and a folder give what the file itself gives, for Dict and Tuple observations, too."""
    spaces = make_minari.spaces
    episodes = make_episodes([*SHAPES, *SHAPES])
    for each in episodes:
        each["actions"] *= 2

    def box(*shape):
        return spaces.Box(-np.inf, np.inf, shape, np.float32)

    action_space = spaces.Box(-2, 2, (3,), np.float32)
    goal = spaces.Tuple((box(3), box(2)))
    space = spaces.Dict({"speed": box(6), "goal": goal})

    def parted(array):
        return {"speed": array[:, :6], "goal": (array[:, 6:9], array[:, 9:])}

    plain = ("plain-v0", episodes, box(11), action_space, data_format, lambda array: array)
    nested = ("my/nested-v0", episodes, space, action_space, data_format, parted)
    halved = [each | {"actions": each["actions"] / 2} for each in episodes]
    by_name = [6, 7, 8, 9, 10, 0, 1, 2, 3, 4, 5]
    for arguments, order in ((plain, list(range(11))), (nested, by_name)):
        name = make_minari(*arguments)
        folder = tmp_path / "minari" / name
        for source in (name, folder, folder / "data"):
            output, attributes, printed = run(source)
            assert_gives(output, transitions_of(reordered(halved, order)))
            assert "format: minari (recognised)" in printed
            assert attributes["dataset_id"] == name
            assert attributes["episodes"] == len(episodes)
            assert attributes["action_low"].tolist() == [-2, -2, -2]
            assert attributes["minari"] == make_minari.version
        if data_format == "hdf5":
            output, _, _ = run(folder / "data" / "main_data.hdf5")
            assert_gives(output, transitions_of(reordered(halved, order)))
    assert attributes["observation_keys"] == "goal/_index_0,goal/_index_1,speed"
    assert "minari cannot load no/such-v0" in refuse("no/such-v0")
    for each in episodes:
        each["actions"] = np.zeros(len(each["actions"]), dtype=np.int64)
    discrete = spaces.Discrete(2)
    name = make_minari("d-v0", episodes, box(11), discrete, data_format, lambda array: array)
    assert "Discrete(2)" in refuse(name)


def test_minari_is_missing(refuse, tmp_path, monkeypatch):
    """An id or a folder without the package: what to install, or to name instead."""
    monkeypatch.setitem(sys.modules, "minari", None)
    (tmp_path / "my-v0" / "data").mkdir(parents=True)
    write_tree(tmp_path / "my-v0" / "data" / "main_data.hdf5", minari_tree(make_episodes()))
    for source in ("D4RL/pen/human-v2", tmp_path / "my-v0", tmp_path / "my-v0" / "data"):
        message = refuse(source)
        assert "pip install minari" in message and "main_data.hdf5" in message


@pytest.mark.parametrize("with_next", [True, False])
def test_robomimic(with_next, run, tmp_path):
    """Demonstrations by number, images left out and named; the last step needs its next_obs."""
    episodes = make_episodes([*SHAPES, *SHAPES])
    episodes[4]["terminals"][1] = True  # solved there already, and going on

    def observations(array):
        image = np.zeros((len(array), 4, 4, 3), np.uint8)
        return {"eef": array[:, :5], "camera": image, "depth": image[..., 0], "arm": array[:, 5:]}

    tree = robomimic_tree(episodes, observations, with_next)
    output, attributes, printed = run(write_tree(tmp_path / "lift.hdf5", tree))
    by_name = [5, 6, 7, 8, 9, 10, 0, 1, 2, 3, 4]
    assert_gives(output, transitions_of(reordered(episodes, by_name), last_is_known=with_next))
    assert "format: robomimic (recognised)" in printed
    assert attributes["observation_keys"] == "arm,eef"
    assert attributes["left_out_keys"] == "camera,depth"
    assert "left_out_keys: camera,depth" in printed
    assert attributes["episodes"] == len(episodes)
    assert attributes["steps_without_next_observation"] == (0 if with_next else 6)


def test_d3rlpy(run, tmp_path):
    """d3rlpy 2: the last step of a trajectory is a transition where a terminal ends it, only."""
    episodes = make_episodes([*SHAPES, *SHAPES])
    output, attributes, printed = run(write_tree(tmp_path / "d.h5", d3rlpy_tree(episodes)))
    assert_gives(output, transitions_of(episodes, last_is_known=False))
    assert "format: d3rlpy (recognised)" in printed
    assert attributes["episodes"] == len(episodes)
    assert attributes["steps_without_next_observation"] == 6


def test_d3rlpy_tuples(run, tmp_path):
    """d3rlpy 2 stores tuple observations by number."""
    episodes = make_episodes()
    tree = d3rlpy_tree(episodes)
    for number, each in enumerate(episodes):
        del tree[f"observations_{number}"]
        tree[f"observations_{number}_0"] = each["observations"][:-1, :4]
        tree[f"observations_{number}_1"] = each["observations"][:-1, 4:]
    output, attributes, _ = run(write_tree(tmp_path / "d.h5", tree))
    assert_gives(output, transitions_of(episodes, last_is_known=False))
    assert attributes["observation_keys"] == "_index_0,_index_1"


def test_first_d3rlpy(run, tmp_path):
    """d3rlpy 1: flat arrays, in which episode_terminals mark every end."""
    episodes = make_episodes()
    output, attributes, printed = run(write_tree(tmp_path / "d.h5", first_d3rlpy_tree(episodes)))
    assert_gives(output, transitions_of(episodes, last_is_known=False))
    assert "format: d3rlpy (recognised)" in printed
    assert attributes["episodes"] == len(episodes)


def test_d3rlpy_itself(run, tmp_path):
    """A file that d3rlpy wrote gives the transitions that its buffer hands out."""
    d3rlpy = pytest.importorskip("d3rlpy", reason="d3rlpy is not installed (checked with 2.8.1)")
    written = []
    for each in make_episodes():
        episode = d3rlpy.dataset.Episode(
            each["observations"][:-1],
            each["actions"],
            each["rewards"][:, None],
            bool(each["terminals"][-1]),
        )
        written.append(episode)
    buffer = d3rlpy.dataset.create_infinite_replay_buffer(written)
    with open(tmp_path / "d.h5", "w+b") as file:
        buffer.dump(file)
    output, _, _ = run(tmp_path / "d.h5")
    picker = d3rlpy.dataset.BasicTransitionPicker()
    expected = []
    for episode in buffer.episodes:
        for number in range(episode.transition_count):
            each = picker(episode, number)
            last = number == episode.transition_count - 1
            values = (each.observation, each.action, each.reward[0], bool(each.terminal))
            expected.append((*values, each.next_observation, last))
    assert_gives(output, expected)


@pytest.mark.parametrize("container", ["npz", "folder", "hdf5"])
def test_arrays(container, run, tmp_path):
    """Plain arrays in an .npz, a folder or an HDF5 file, under other names; others are not read."""
    episodes = make_episodes()
    columns = flat(episodes)
    arrays = {
        "obs": columns["observations"],
        "acts": columns["actions"],
        "reward": columns["rewards"][:, None],
        "next_obs": columns["next_observations"],
        "terminated": columns["terminals"].astype(np.uint8),
        "truncated": columns["ends"],
    }
    source = tmp_path / "arrays"
    if container == "npz":
        np.savez(tmp_path / "arrays", infos=np.array([{}]), **arrays)
        source = tmp_path / "arrays.npz"
    elif container == "folder":
        source.mkdir()
        for name, array in arrays.items():
            np.save(source / name, array)
    else:
        write_tree(source, arrays)
    output, attributes, printed = run(source)
    assert_gives(output, transitions_of(episodes))
    assert "format: arrays (recognised)" in printed
    assert attributes["arrays"] == "obs,acts,reward,next_obs,terminated,truncated"
    assert attributes["episodes"] == len(episodes)


def test_arrays_in_no_order(run, tmp_path):
    """Shuffled steps: each is a trajectory of its own, unless the next one happens to follow."""
    columns = flat(make_episodes())
    columns["done"] = columns.pop("terminals")
    del columns["ends"]
    order = np.random.default_rng(1).permutation(16)
    shuffled = {name: column[order] for name, column in columns.items()}
    np.savez(tmp_path / "x.npz", **shuffled)
    output, attributes, _ = run(tmp_path / "x.npz")
    following = np.append(order[1:], -1)
    breaks = following != order + 1
    names = ("observations", "actions", "rewards", "done", "next_observations")
    assert_gives(output, zip_rows([*(shuffled[name] for name in names), breaks]))
    assert 8 < attributes["episodes"] <= 16


def zip_rows(columns):
    """Columns as a list of rows."""
    return list(zip(*columns))


@pytest.mark.parametrize("with_next", [True, False])
def test_dones_and_timeouts(with_next, run, tmp_path):
    """dones beside timeouts are ends of either kind; without next ones a timeout has no next."""
    episodes = make_episodes()
    columns = flat(episodes)
    timeouts = columns["ends"] & ~columns["terminals"]
    arrays = {name: columns[name] for name in ("observations", "actions", "rewards")}
    arrays |= {"dones": columns["ends"], "timeouts": timeouts}
    if with_next:
        arrays["next_observations"] = columns["next_observations"]
    np.savez(tmp_path / "x.npz", **arrays)
    output, attributes, _ = run(tmp_path / "x.npz")
    assert_gives(output, transitions_of(episodes, last_is_known=with_next))
    assert attributes["steps_without_next_observation"] == (0 if with_next else 3)


@pytest.mark.parametrize("kind", ["file", "compact", "regular"])
def test_ogbench(kind, run, tmp_path):
    """terminals are where trajectories end by their length; masks of 0 are terminals, anywhere."""
    episodes = make_episodes([(4, "cut"), (3, "cut"), (1, "cut"), (5, "cut")])
    episodes[0]["terminals"][1] = True
    episodes[1]["terminals"][2] = True
    np.savez(tmp_path / "x.npz", **ogbench_arrays(episodes, kind))
    said = ["--format", "ogbench"] if kind == "file" else []
    output, attributes, printed = run(tmp_path / "x.npz", *said)
    assert_gives(output, transitions_of(episodes))
    assert ("format: ogbench (recognised)" in printed) == (kind != "file")
    assert attributes["episodes"] == 4
    assert attributes["steps_without_next_observation"] == 0


def test_arrays_with_masks(run, tmp_path):
    """Plain arrays that have masks beside terminals and timeouts are no file of OGBench's."""
    episodes = make_episodes([(4, "terminal"), (3, "cut"), (2, "cut")])
    columns = flat(episodes)
    arrays = {name: columns[name] for name in ("observations", "actions", "rewards", "terminals")}
    arrays |= {"timeouts": columns["ends"] & ~columns["terminals"], "masks": ~columns["terminals"]}
    np.savez(tmp_path / "x.npz", **arrays)
    output, _, printed = run(tmp_path / "x.npz")
    assert "format: arrays (recognised)" in printed
    assert_gives(output, transitions_of(episodes, last_is_known=False))


def test_order_of_a_tuple():
    """By its numbers, not by their first digits."""
    observations = tuple(np.full((3, 1), float(number)) for number in range(12))
    order, images = convert.choose_keys(observations, None, "x")
    assert order == [f"_index_{number}" for number in range(12)] and images == []


@pytest.mark.parametrize("equal", [True, False])
def test_jpeg_files(equal, tmp_path):
    """Minari stores images as JPEG files, a row of bytes each: they are images all the same."""
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["state"] = np.zeros((3, 2))
        file["bytes"] = np.zeros((3, 5), dtype=np.uint8)  # states of bytes are states
        if equal:
            file["image"] = np.array([[0xFF, 0xD8, 0xFF, 0xE0, 1]] * 3, dtype=np.uint8)
        else:
            rows = file.create_dataset("image", (3,), dtype=h5py.vlen_dtype(np.uint8))
            for number in range(3):
                rows[number] = np.array([0xFF, 0xD8, 0xFF] + [0] * number, dtype=np.uint8)
        assert convert.choose_keys(file["/"], None, "x") == (["bytes", "state"], ["image"])


def test_actions_of_d4rl_files(run, refuse, tmp_path):
    """A D4RL file needs no conversion, and can be read as arrays to rescale its actions."""
    episodes = make_episodes(low=-3, high=3)
    columns = flat(episodes)
    columns["timeouts"] = columns.pop("ends") & ~columns["terminals"]
    source = write_tree(tmp_path / "x.hdf5", columns)
    assert "in D4RL's format already" in refuse(source)
    output, _, printed = run(source, "--format", "arrays", "--action-low=-3", "--action-high=3")
    actions = calql_sera.load_d4rl(ENV, output)["actions"]
    np.testing.assert_allclose(actions, columns["actions"] / 3, rtol=0, atol=1e-6)
    assert "recognised" not in printed
    again, _, _ = run(source, "--format", "arrays", "--action-low=-3", "--action-high=3.5,3,3")
    assert calql_sera.load_d4rl(ENV, again)["actions"][0, 0] != actions[0, 0]


def test_attributes(run, tmp_path):
    """The file says where it came from and how, and holds the five arrays alone."""
    np.savez(tmp_path / "x.npz", **ogbench_arrays(make_episodes(), "regular"))
    output, attributes, printed = run(tmp_path / "x.npz")
    assert attributes["source"] == str(tmp_path / "x.npz")
    assert attributes["format"] == "ogbench"
    assert attributes["transitions"] == 16
    assert attributes["action_low"].tolist() == [-1, -1, -1]
    assert attributes["converted_with"] == (
        f"data/convert.py, numpy {np.__version__}, h5py {h5py.__version__}"
    )
    for name in attributes:
        assert f"{name}: " in printed
    with h5py.File(output) as file:
        assert set(file) == set(convert.D4RL)


# ------------------------------ recognising
def test_recognise(tmp_path):
    """Every format by its names; a file that is damaged or of something else is none."""
    episodes = make_episodes()
    trees = {
        "minari": minari_tree(episodes),
        "robomimic": robomimic_tree(episodes),
        "d3rlpy": d3rlpy_tree(episodes),
        "arrays": flat(episodes),
        "d4rl": flat(episodes) | {"timeouts": np.zeros(16)},
    }
    for name, tree in trees.items():
        assert convert.recognise(write_tree(tmp_path / name, tree)) == name
    first = write_tree(tmp_path / "first", first_d3rlpy_tree(episodes))
    assert convert.recognise(first) == "d3rlpy"
    reward_free = ogbench_arrays(episodes, "file")
    del reward_free["rewards"], reward_free["masks"]
    npz = {"ogbench": reward_free, "arrays": flat(episodes) | {"timeouts": np.zeros(16)}}
    for name, arrays in npz.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        assert convert.recognise(tmp_path / f"{name}.npz") == name
    for name in ("empty", "folder", "data"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "folder" / "observations.npy", np.zeros(3))
    assert convert.recognise(tmp_path / "folder") is None
    np.save(tmp_path / "folder" / "actions.npy", np.zeros(3))
    assert convert.recognise(tmp_path / "folder") == "arrays"
    (tmp_path / "data" / "metadata.json").write_text("{}")
    assert convert.recognise(tmp_path / "data") == "minari"
    assert convert.recognise(tmp_path) == "minari"  # which holds data/
    whole = (tmp_path / "minari").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text").write_text("text")
    write_tree(tmp_path / "other", {"data": np.zeros(3), "x": {"demo_0": np.zeros(3)}})
    for name in ("empty", "cut", "text", "other", "nowhere"):
        assert convert.recognise(tmp_path / name) is None


def test_imports_are_light():
    """The program loads neither torch nor minari before it needs them."""
    code = "import sys, convert; print({'torch', 'minari', 'gymnasium'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT / "data")},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


# ------------------------------ what is refused
def replaced(name, value):
    """The arrays of a good .npz, one of them another or, as None, gone."""
    columns = flat(make_episodes())
    columns["timeouts"] = columns.pop("ends")
    columns[name] = value(columns[name])
    return {key: array for key, array in columns.items() if array is not None}


def with_value(value):
    """A function that puts one value into a copy of an array."""

    def change(array):
        changed = array.astype(np.float64)
        changed.flat[5] = value
        return changed

    return change


BROKEN_ARRAYS = {
    "no actions": ("actions", lambda array: None, ["in no format", "--format"]),
    "no rewards": ("rewards", lambda array: None, ["no array of rewards", "reward"]),
    "no terminals": ("terminals", lambda array: None, ["no array of terminals", "done"]),
    "discrete": ("actions", lambda array: np.zeros(16, int), ["actions", "int64", "continuous"]),
    "one too few": ("rewards", lambda array: array[1:], ["16 actions", "15 rewards"]),
    "more flags": ("timeouts", lambda array: array[1:], ["terminals", "16 and 15"]),
    "more states": ("observations", lambda array: np.vstack([array, array[:1]]), ["17 observ"]),
    "next ones": ("next_observations", lambda array: array[:, 1:], ["(11,) and (10,)"]),
    "images": ("observations", lambda array: np.zeros((16, 4, 4, 3)), ["(16, 4, 4, 3)", "images"]),
    "NaN": ("observations", with_value(np.nan), ["observations", "NaN"]),
    "too large": ("rewards", with_value(1e39), ["rewards", "infinity"]),
    "flag of 2": ("terminals", with_value(2), ["terminals", "0 and 1"]),
    "text": ("rewards", lambda array: array.astype("U"), ["rewards", "<U", "numbers"]),
    "flat rewards": ("rewards", lambda array: array.reshape(8, 2), ["rewards", "(8, 2)"]),
    "large action": ("actions", with_value(1.5), ["action 2", "to 1.5", "--action-low"]),
}


@pytest.mark.parametrize("name", BROKEN_ARRAYS)
def test_broken_arrays(name, refuse, tmp_path):
    """Each is named, with its value, and the good ones are not refused."""
    key, value, parts = BROKEN_ARRAYS[name]
    np.savez(tmp_path / "x.npz", **replaced(key, value))
    message = refuse(tmp_path / "x.npz")
    assert [part for part in [*parts, "x.npz"] if part not in message] == [], message


def test_episodes_that_cannot_be_told(refuse, tmp_path):
    """Neither next_observations nor timeouts: the states of two episodes would be joined."""
    arrays = replaced("timeouts", lambda array: None)
    del arrays["next_observations"]
    np.savez(tmp_path / "x.npz", reward=arrays.pop("rewards"), **arrays)
    message = refuse(tmp_path / "x.npz")
    assert "x.npz" in message and "add next_observations or timeouts" in message


def test_reward_free(refuse, tmp_path):
    """OGBench's goal-conditioned files have no rewards: what to save instead."""
    arrays = ogbench_arrays(make_episodes(), "file")
    del arrays["masks"]
    np.savez(tmp_path / "x.npz", **arrays)
    message = refuse(tmp_path / "x.npz", "--format", "ogbench")
    assert "x.npz has no masks" in message and "-singletask-" in message
    del arrays["rewards"]
    np.savez(tmp_path / "x.npz", **arrays)
    message = refuse(tmp_path / "x.npz")
    assert "x.npz is reward-free" in message and "-singletask-" in message


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_never_read(refuse, tmp_path):
    """Objects in an .npz or a folder are refused, and what is in them does not happen."""
    arrays = replaced("rewards", lambda array: np.array([Trap(tmp_path / "sprung")] * 16))
    np.savez(tmp_path / "x.npz", allow_pickle=True, **arrays)
    (tmp_path / "folder").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "folder" / name, array, allow_pickle=True)
    with open(tmp_path / "pickled", "wb") as file:
        np.save(file, arrays["rewards"], allow_pickle=True)
    for name in ("x.npz", "folder"):
        message = refuse(tmp_path / name)
        assert name in message and "pickles are never read" in message
    assert "in no format" in refuse(tmp_path / "pickled")
    assert "pickles are never read" in refuse(tmp_path / "pickled", "--format", "arrays")
    assert not (tmp_path / "sprung").exists()
    np.load(tmp_path / "folder" / "rewards.npy", allow_pickle=True)
    assert (tmp_path / "sprung").exists()  # the trap works


def set_at(tree, path, value):
    """Replace or, with None, remove a node of nested dicts, by a path like data/demo_0/obs."""
    *parents, last = path.split("/")
    for name in parents:
        tree = tree[name]
    if value is None:
        del tree[last]
    else:
        tree[last] = value


DEMO = "data/demo_3"
BROKEN_TREES = {
    "no obs": (robomimic_tree, f"{DEMO}/obs", None, ["demo_3", "dataset_states_to_obs"]),
    "no dones": (robomimic_tree, f"{DEMO}/dones", None, ["dones of demo_3"]),
    "wide": (robomimic_tree, f"{DEMO}/actions", np.zeros((1, 2)), ["2 and 3 wide"]),
    "narrow": (robomimic_tree, f"{DEMO}/obs/flat", np.zeros((1, 9)), ["demo_3", "(9,) and (11,)"]),
    "no group": (robomimic_tree, DEMO, np.zeros(3), ["demo_3", "no group"]),
    "no demos": (robomimic_tree, "data", {"demo_x": {"obs": np.zeros(3)}}, ["no steps"]),
    "no rewards": (minari_tree, "episode_2/rewards", None, ["rewards of episode_2"]),
    "T states": (minari_tree, "episode_2/observations", np.zeros((3, 11)), ["2 of", "after its"]),
    "T - 1": (minari_tree, "episode_2/observations", np.zeros((2, 11)), ["3 actions", "1 observ"]),
    "Dict actions": (minari_tree, "episode_0/actions", {"a": np.zeros(4)}, ["actions of episode"]),
    "no episode": (d3rlpy_tree, "num_episodes", 7, ["actions of episode 6"]),
    "no flag": (d3rlpy_tree, "terminated_1", None, ["terminated of episode 1"]),
    "a NaN": (first_d3rlpy_tree, "rewards", np.full(16, np.nan), ["rewards", "NaN"]),
}


@pytest.mark.parametrize("name", BROKEN_TREES)
def test_broken_files(name, refuse, tmp_path):
    """What one episode lacks is named, with the episode and the file."""
    make, path, value, parts = BROKEN_TREES[name]
    tree = make(make_episodes())
    set_at(tree, path, value)
    message = refuse(write_tree(tmp_path / "x.hdf5", tree))
    assert [part for part in [*parts, "x.hdf5"] if part not in message] == [], message


def test_keys_that_are_none(refuse, tmp_path):
    """--keys with an unknown name, an image, a name twice, or where observations have no keys."""

    def with_image(array):
        return {"flat": array, "camera": np.zeros((len(array), 4, 4, 3))}

    def image_alone(array):
        return {"camera": np.zeros((len(array), 4, 4, 3))}

    source = write_tree(tmp_path / "x.hdf5", robomimic_tree(make_episodes(), with_image))
    message = refuse(source, "--keys", "flat,arm")
    assert "'arm'" in message and "camera, flat" in message
    message = refuse(source, "--keys", "camera")
    assert "'camera', (4, 4, 4, 3)" in message and "images" in message
    assert "twice" in refuse(source, "--keys", "flat,flat")
    tree = robomimic_tree(make_episodes(), image_alone)
    assert "images alone" in refuse(write_tree(tmp_path / "y.hdf5", tree))
    plain = write_tree(tmp_path / "z.hdf5", minari_tree(make_episodes()))
    assert "no keys" in refuse(plain, "--keys", "flat")
    first = write_tree(tmp_path / "w.hdf5", first_d3rlpy_tree(make_episodes()))
    assert "no keys" in refuse(first, "--keys", "flat")
    np.savez(tmp_path / "x.npz", **flat(make_episodes()))
    assert "no keys" in refuse(tmp_path / "x.npz", "--keys", "flat")


def test_bounds_that_are_none(refuse, tmp_path):
    """--action-low and --action-high: one alone, no numbers, too many, upside down, too narrow."""
    np.savez(tmp_path / "x.npz", **flat(make_episodes()))
    source = tmp_path / "x.npz"
    assert "belong together" in refuse(source, "--action-low", "-2")
    assert "belong together" in refuse(source, "--action-high", "2")
    for low in ("x", "", "nan", "-1,-1", "-inf", "-1;-1;-1"):
        message = refuse(source, f"--action-low={low}", "--action-high=1")
        assert f"--action-low is {low}" in message and "comma list of 3" in message
    assert "a low below a high" in refuse(source, "--action-low=0,0,0", "--action-high=1,0,1")
    message = refuse(source, "--action-low=-2,-2,-0.1", "--action-high=2")
    assert "action 2" in message and "-0.1 and 2" in message


def test_damaged_files(refuse, tmp_path):
    """Cut files, empty ones, files of something else, a format that they have not: one sentence."""
    tree = robomimic_tree(make_episodes())
    whole = write_tree(tmp_path / "x.hdf5", tree).read_bytes()
    np.savez(tmp_path / "x.npz", **flat(make_episodes()))
    npz = (tmp_path / "x.npz").read_bytes()
    contents = (b"", b"text", whole[:-100], whole[:600], npz[:-30], npz[30:])
    for number, content in enumerate(contents):
        path = tmp_path / f"damaged-{number}"
        path.write_bytes(content)
        assert path.name in refuse(path)
        for name in convert.READERS:
            assert path.name in refuse(path, "--format", name)
    for name in ("minari", "d3rlpy", "arrays", "ogbench"):
        assert "x.hdf5" in refuse(tmp_path / "x.hdf5", "--format", name)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name in ("observations", "actions", "rewards", "done"):
            file.writestr(f"{name}.npy", b"no array")
    assert "x.zip" in refuse(tmp_path / "x.zip")


def test_sources_and_outputs(refuse, tmp_path):
    """A source that is not there, an output that is, one in no folder."""
    np.savez(tmp_path / "x.npz", **flat(make_episodes()))
    assert "there is no" in refuse(tmp_path / "nowhere.npz")
    assert "there is no" in refuse(tmp_path / "nowhere.npz", "--format", "arrays")
    (tmp_path / "out.hdf5").write_text("mine")
    assert "out.hdf5 exists" in refuse(tmp_path / "x.npz")
    assert (tmp_path / "out.hdf5").read_text() == "mine"
    with pytest.raises(SystemExit) as caught:
        convert.main([str(tmp_path / "x.npz"), str(tmp_path / "nowhere" / "x.hdf5")])
    assert caught.value.code == 2


def test_nothing_is_half_written(refuse, tmp_path, monkeypatch):
    """A disk that fills up, or Ctrl-C, meanwhile: neither the file nor a part of it stays."""
    np.savez(tmp_path / "x.npz", **flat(make_episodes()))
    create = h5py.File.create_dataset

    def fail(self, name, *args, **options):
        assert (tmp_path / "out.hdf5.part").exists()
        if name == "terminals":
            raise error
        return create(self, name, *args, **options)

    monkeypatch.setattr(h5py.File, "create_dataset", fail)
    error = OSError("No space left on device")
    assert "No space left" in refuse(tmp_path / "x.npz")
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        convert.main([str(tmp_path / "x.npz"), str(tmp_path / "out.hdf5")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz"]


def test_no_transition(refuse, tmp_path):
    """Trajectories of one step, without terminal and next state, hold no transition."""
    tree = d3rlpy_tree(make_episodes([(1, "cut"), (1, "cut")]))
    message = refuse(write_tree(tmp_path / "x.hdf5", tree))
    assert "no step whose next observation is known" in message


def test_help(capsys):
    """--help names all arguments, and its commands are understood."""
    with pytest.raises(SystemExit) as caught:
        convert.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("SOURCE", "OUTPUT", "--format", "--keys A,B", "--action-low X", "--action-high X"):
        assert word in text
    commands = [line.split() for line in text.splitlines() if line.startswith("python ")]
    parsed = [convert.tyro.cli(convert.Args, args=command[2:]) for command in commands]
    assert [args.keys for args in parsed] == [None, "observation,desired_goal", None]
    assert [args.action_low for args in parsed] == [None, None, "-2"]


# ------------------------------ Adroit's binary tasks
def write_binary(path, with_next=True, nested=False):
    """Two trajectories of four steps, pickled: success at the third step, and none."""
    rng = np.random.default_rng(0)
    trajectories = []
    for rewards in ([-1, -1, 0, 0, 0], [-1, -1, -1, -1, -1]):  # one reward too many, as theirs have
        states = rng.normal(size=(5, 3)).astype(np.float32)
        observations = list(states[:4])
        if nested:
            observations = [{"state_observation": state} for state in observations]
        given = {"observations": observations, "actions": rng.uniform(-1, 1, (4, 2))}
        given |= {"rewards": np.array(rewards), "terminals": np.zeros(4)}
        if with_next:
            given["next_observations"] = list(states[1:])
        trajectories.append(given)
    np.save(path, np.array(trajectories, dtype=object), allow_pickle=True)
    return str(path), trajectories


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("with_next", [False, True])
def test_adroit_binary(with_next, nested, tmp_path):
    """A trajectory ends with its first success, as a terminal; one without success is cut off."""
    source, (first, second) = write_binary(tmp_path / "demos.npy", with_next, nested)
    output = str(tmp_path / "x.hdf5")
    convert.main([source, output, "--format", "adroit-binary", "--allow-pickle"])
    with h5py.File(output) as file:
        arrays = {name: file[name][:] for name in file}
    kept = ~arrays["timeouts"]
    steps = 4 if with_next else 3  # else the last step's next state is not known
    assert arrays["rewards"][kept].tolist() == [-1, -1, 0] + [-1] * steps
    assert arrays["terminals"][kept].tolist() == [False, False, True] + [False] * steps
    actions = np.concatenate([first["actions"][:3], second["actions"][:steps]])
    np.testing.assert_allclose(arrays["actions"][kept], actions, rtol=1e-6)


def test_pickles_are_read_only_if_allowed(tmp_path, capsys):
    """Without the flag nothing is unpickled, and the sentence says what it would mean."""

    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    np.save(tmp_path / "bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    command = [str(tmp_path / "bomb.npy"), str(tmp_path / "x.hdf5"), "--format", "adroit-binary"]
    with pytest.raises(SystemExit) as caught:
        convert.main(command)
    assert caught.value.code == 2
    assert "--allow-pickle if you trust where it is from" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "x.hdf5").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"observations": [[0.0]], "actions": [[0.0]]}], "has no observations, actions and"),
        (
            [{"observations": [[0.0]], "actions": [[0.0]], "rewards": [0.5]}],
            "rewards other than -1 and 0",
        ),
        (
            [{"observations": [[np.nan]], "actions": [[0.0]], "rewards": [-1]}],
            "observations of trajectory 0",
        ),
        (
            [{"observations": [{"x": 0.0}], "actions": [[0.0]], "rewards": [-1]}],
            "state_observation",
        ),
    ],
)
def test_no_binary_trajectories(content, message, tmp_path, capsys):
    """What is in the file is named."""
    np.save(tmp_path / "a.npy", np.array(content, dtype=object), allow_pickle=True)
    command = [str(tmp_path / "a.npy"), str(tmp_path / "x.hdf5"), "--format", "adroit-binary"]
    with pytest.raises(SystemExit):
        convert.main([*command, "--allow-pickle"])
    assert message in capsys.readouterr().err
