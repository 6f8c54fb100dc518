"""Reading D4RL files: what is kept of them, where they are found, and the tables of names and scores."""

import http.server
import os
import re
import threading

import h5py
import numpy as np
import pytest

import calql_sera

ENV, FILE = "hopper-medium-v2", "hopper_medium-v2.hdf5"
# Of the ten rows of the hand-made file: row 5 ends both ways, the episode of rows 8 and 9 is cut off.
TERMINAL, TIMEOUT = (1, 5, 7), (3, 5)
ROWS = [0, 1, 2, 4, 6, 7, 8]  # to be kept: neither time-outs nor the last row
PACKAGE_COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals")


def write_hdf5(path, columns):
    """Store arrays by name and return the path."""
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[name] = column
    return path


def hand_made():
    """Ten Hopper rows with every kind of end, in the types of the old medium-replay files."""
    rows = np.arange(10)
    return {
        "observations": rows[:, None] + np.arange(11) / 16,
        "actions": np.stack([rows / 16, -rows / 16, np.ones(10)], axis=1),
        "rewards": rows[:, None] / 2 + 0.1,  # (N, 1)
        "terminals": np.isin(rows, TERMINAL).astype(np.float64),
        "timeouts": np.isin(rows, TIMEOUT).astype(np.float64),
    }


def random_file():
    """500 Hopper rows of noise with many flags, also in neighbouring rows and in the last one."""
    rng = np.random.default_rng(7)
    columns = {"observations": rng.normal(size=(500, 11)), "actions": rng.uniform(-1, 1, size=(500, 3))}
    columns |= {"rewards": rng.normal(size=500), "terminals": rng.random(500) < 0.1}
    columns |= {"timeouts": rng.random(500) < 0.1}
    columns["timeouts"][-1] = True
    return columns


def gym_samples(real_data):
    """Data set id and path of every genuine Gym-MuJoCo sample."""
    samples = {}
    for path in sorted((real_data / "real-samples").glob("*.hdf5")):
        match = re.fullmatch(r"((?:hopper|walker2d|halfcheetah|ant)_[a-z_]+)(-v\d)?", path.stem)
        if match:
            samples[match[1].replace("_", "-") + (match[2] or "-v0")] = path
    assert samples
    return samples


def assert_equal_to_package(d4rl, env, path):
    """The loader's arrays are those of d4rl.qlearning_dataset, bit for bit."""
    with h5py.File(path) as file:
        raw = {name: file[name][:] for name in file if isinstance(file[name], h5py.Dataset)}
    expected = d4rl.qlearning_dataset(None, raw | {"rewards": raw["rewards"].reshape(-1)})
    loaded = calql_sera.load_d4rl(env, str(path))
    for name in PACKAGE_COLUMNS:
        assert loaded[name].dtype == expected[name].dtype, (env, name)
        assert loaded[name].shape == expected[name].shape, (env, name)
        assert loaded[name].tobytes() == expected[name].tobytes(), (env, name)


@pytest.fixture(scope="module")
def d4rl():
    """The original package, if it is installed: the oracle."""
    os.environ["D4RL_SUPPRESS_IMPORT_ERROR"] = "1"
    return pytest.importorskip("d4rl", reason="the d4rl package is not installed", exc_type=ImportError)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder in D4RL_DATASET_DIR."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch):
    """A web server in place of D4RL's, which gives its answer (status, headers, body) and notes paths."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = self.server.answer
            self.server.paths.append(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.paths = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(calql_sera, "SERVER", f"http://127.0.0.1:{server.server_port}/base")
        yield server
        server.shutdown()
        thread.join()


# ------------------------------ what is kept
def test_hand_made_file(tmp_path):
    """Rows kept, dones against terminals, next observations (a terminal's is the next episode's first)."""
    data = calql_sera.load_d4rl(ENV, str(write_hdf5(tmp_path / "x.hdf5", hand_made())))
    assert set(data) == {*PACKAGE_COLUMNS, "dones"}
    assert data["observations"][:, 0].tolist() == ROWS
    assert data["observations"][2].tolist() == [2 + i / 16 for i in range(11)]
    assert data["next_observations"][:, 0].tolist() == [1, 2, 3, 5, 7, 8, 9]
    assert data["next_observations"][-1].tolist() == [9 + i / 16 for i in range(11)]
    assert data["actions"].tolist() == [[i / 16, -i / 16, 1] for i in ROWS]
    assert data["rewards"].tolist() == [np.float32(i / 2 + 0.1) for i in ROWS]
    assert data["terminals"].tolist() == [False, True, False, False, False, True, False]
    assert data["dones"].tolist() == [False, True, True, True, False, True, True]


def test_types_and_shapes(tmp_path):
    """Everything comes as float32 or bool, rewards and flags one-dimensional, from float64 and (N, 1) too."""
    wide = {name: column.reshape(10, -1) for name, column in hand_made().items()}  # flags as (N, 1) as well
    for number, columns in enumerate((hand_made(), wide)):
        data = calql_sera.load_d4rl(ENV, str(write_hdf5(tmp_path / f"{number}.hdf5", columns)))
        shapes = {name: (str(column.dtype), column.shape) for name, column in data.items()}
        assert shapes == {
            "observations": ("float32", (7, 11)),
            "actions": ("float32", (7, 3)),
            "rewards": ("float32", (7,)),
            "next_observations": ("float32", (7, 11)),
            "terminals": ("bool", (7,)),
            "dones": ("bool", (7,)),
        }


def test_dones_of_a_random_file(tmp_path):
    """dones is the last kept row of every trajectory, found here by walking through the file."""
    columns = random_file()
    kept, dones = [], []
    for row in range(500):
        ends = columns["terminals"][row] or columns["timeouts"][row] or row == 499
        if not columns["timeouts"][row] and row < 499:
            kept.append(row)
            dones.append(bool(ends))
        elif dones:
            dones[-1] = True  # this row is dropped, so its trajectory ended with the row kept before it
    data = calql_sera.load_d4rl(ENV, str(write_hdf5(tmp_path / "x.hdf5", columns)))
    np.testing.assert_array_equal(data["observations"], columns["observations"][kept].astype(np.float32))
    assert data["dones"].tolist() == dones
    assert np.all(data["dones"][data["terminals"]])
    assert data["dones"].sum() > data["terminals"].sum()


def test_stored_next_observations_are_not_used(tmp_path):
    """A file's own next_observations make no difference, as in the package."""
    columns = hand_made() | {"next_observations": np.full((10, 11), 77.0)}
    data = calql_sera.load_d4rl(ENV, str(write_hdf5(tmp_path / "x.hdf5", columns)))
    assert data["next_observations"][:, 0].tolist() == [1, 2, 3, 5, 7, 8, 9]


def test_every_real_sample_loads(real_data):
    """Each genuine Gym-MuJoCo sample: sensible shapes, types, ends and consecutive states."""
    for env, path in gym_samples(real_data).items():
        data, task = calql_sera.load_d4rl(env, str(path)), calql_sera.find_task(env)
        with h5py.File(path) as file:
            rows, timeouts = len(file["rewards"]), int(file["timeouts"][:-1].sum())
        n = rows - 1 - timeouts
        assert data["observations"].shape == data["next_observations"].shape == (n, task.observation_dim), env
        assert data["actions"].shape == (n, task.action_dim), env
        assert all(data[name].shape == (n,) for name in ("rewards", "terminals", "dones")), env
        assert all(np.isfinite(column).all() for column in data.values()), env
        assert data["dones"].sum() == 2 and data["dones"][-1], env  # the samples hold two episodes
        inside = ~data["dones"][:-1]
        observations, next_observations = data["observations"], data["next_observations"]
        np.testing.assert_array_equal(next_observations[:-1][inside], observations[1:][inside])
        assert not np.array_equal(next_observations, observations), env


# ------------------------------ the original package as oracle
def test_equal_to_the_package_on_made_up_files(d4rl, tmp_path):
    """Bit for bit what d4rl.qlearning_dataset gives, for the hand-made file and a random one."""
    for number, columns in enumerate((hand_made(), random_file())):
        assert_equal_to_package(d4rl, ENV, write_hdf5(tmp_path / f"{number}.hdf5", columns))


def test_equal_to_the_package_on_real_samples(d4rl, real_data):
    """Bit for bit what d4rl.qlearning_dataset gives, for every genuine Gym-MuJoCo sample."""
    for env, path in gym_samples(real_data).items():
        assert_equal_to_package(d4rl, env, path)


def test_table_of_data_sets(d4rl):
    """All Gym-MuJoCo ids of the package's v0 to v2, no others, and the same addresses."""
    pattern = re.compile(r"(hopper|halfcheetah|walker2d|ant)-.*-v[012]")
    expected = {env: url for env, url in d4rl.infos.DATASET_URLS.items() if pattern.fullmatch(env)}
    known = {env: f"{calql_sera.SERVER}/{file}" for env, file in calql_sera.DATASETS.items()}
    known = {env: url for env, url in known.items() if not env.startswith("antmaze")}  # in test_antmaze.py
    assert known.pop("hopper-medium-mini")  # comes with the repository
    assert len(expected) > 60 and known == expected


def test_table_of_scores(d4rl):
    """The package's reference scores, for every id that it has some for."""
    known = {env: calql_sera.find_task(env) for env in calql_sera.DATASETS if env != "hopper-medium-mini"}
    lowest, highest = d4rl.infos.REF_MIN_SCORE, d4rl.infos.REF_MAX_SCORE
    assert {env for env in known if env not in lowest} == {"ant-random-expert-v0"}
    for env in known.keys() & lowest:
        assert (known[env].random_return, known[env].expert_return) == (lowest[env], highest[env]), env


# ------------------------------ names and scores by hand
@pytest.mark.parametrize(
    ("env", "file"),
    [
        ("hopper-medium-v2", "gym_mujoco_v2/hopper_medium-v2.hdf5"),
        ("halfcheetah-medium-expert-v1", "gym_mujoco_v1/halfcheetah_medium_expert-v1.hdf5"),
        ("ant-full-replay-v2", "gym_mujoco_v2/ant_full_replay-v2.hdf5"),
        ("hopper-medium-replay-v0", "gym_mujoco/hopper_mixed.hdf5"),
        ("walker2d-medium-replay-v0", "gym_mujoco/walker_mixed.hdf5"),
        ("walker2d-medium-v0", "gym_mujoco/walker2d_medium.hdf5"),
        ("ant-random-expert-v0", "gym_mujoco/ant_random_expert.hdf5"),
    ],
)
def test_file_names(env, file):
    """A few files on the server, with the odd names of v0."""
    assert calql_sera.DATASETS[env] == file


def test_normalized_score():
    """0 for the random return, 100 for the expert's, for numbers and arrays."""
    assert calql_sera.normalized_score(ENV, -20.272305) == pytest.approx(0, abs=1e-12)
    assert calql_sera.normalized_score(ENV, 3234.3) == pytest.approx(100, abs=1e-9)
    scores = calql_sera.normalized_score(ENV, np.array([-20.272305, 1607.0138475, 3234.3]))
    np.testing.assert_allclose(scores, [0, 50, 100], atol=1e-9)
    assert calql_sera.normalized_score("hopper-medium-mini", 3234.3) == pytest.approx(100)
    assert calql_sera.normalized_score("walker2d-random-v0", 4592.3) == pytest.approx(100)


# ------------------------------ finding files
def test_dataset_path_wins(cache, tmp_path, server):
    """--dataset-path comes before the cache, before a bundled file and before the network."""
    (cache / FILE).touch()
    mine = tmp_path / "mine.hdf5"
    mine.touch()
    assert calql_sera.find_dataset(ENV, str(mine)) == mine
    assert calql_sera.find_dataset("hopper-medium-mini", str(mine)) == mine
    assert server.paths == []


def test_bundled_file(cache, tmp_path, monkeypatch, server):
    """The mini set comes from data/ beside the script, else from the cache; no server is asked for it."""
    monkeypatch.setattr(calql_sera, "__file__", str(tmp_path / "calql_sera.py"))
    bundled, cached = (
        tmp_path.resolve() / "data" / "hopper-medium-mini.hdf5",
        cache / "hopper-medium-mini.hdf5",
    )
    with pytest.raises(FileNotFoundError, match=re.escape(str(cached)) + ".*--dataset-path"):
        calql_sera.find_dataset("hopper-medium-mini")
    for path in (cached, bundled):
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert calql_sera.find_dataset("hopper-medium-mini") == path
    assert server.paths == []


def test_cache_folder(cache, server):
    """A file in D4RL_DATASET_DIR is found under D4RL's own name, without the network."""
    for env, name in ((ENV, FILE), ("walker2d-medium-replay-v0", "walker_mixed.hdf5")):
        (cache / name).touch()
        assert calql_sera.find_dataset(env) == cache / name
    assert server.paths == []


def test_default_cache_folder(tmp_path, monkeypatch, server):
    """Without D4RL_DATASET_DIR, old downloads are found in ~/.d4rl/datasets."""
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".d4rl" / "datasets"
    folder.mkdir(parents=True)
    (folder / FILE).touch()
    assert calql_sera.find_dataset(ENV) == folder / FILE
    assert server.paths == []


def test_missing_dataset_path(cache, tmp_path):
    """A --dataset-path that is not there, or a folder, is named in the error, whatever the cache holds."""
    (cache / FILE).touch()
    for path in (tmp_path / "nowhere.hdf5", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path)) + ".*--dataset-path"):
            calql_sera.find_dataset(ENV, str(path))


def test_download(cache, tmp_path, server):
    """A download loads and ends under its final name in the cache, made if need be, once and for all."""
    cache.rmdir()
    body = write_hdf5(tmp_path / "x.hdf5", hand_made()).read_bytes()
    server.answer = 200, {"Content-Length": len(body)}, body
    assert len(calql_sera.load_d4rl(ENV)["rewards"]) == len(ROWS)
    assert server.paths == [f"/base/gym_mujoco_v2/{FILE}"]
    assert [path.name for path in cache.iterdir()] == [FILE]
    assert (cache / FILE).read_bytes() == body
    assert calql_sera.find_dataset(ENV) == cache / FILE
    assert len(server.paths) == 1


@pytest.mark.parametrize("failure", ["403", "404", "cut", "cut chunk", "empty", "page"])
def test_failed_download(failure, cache, tmp_path, server):
    """A refusal, a body cut short or a page instead: FileNotFoundError with all one needs, no data file."""
    body = write_hdf5(tmp_path / "x.hdf5", hand_made()).read_bytes()
    half = body[: len(body) // 2]
    server.answer = {
        "403": (403, {}, b"Forbidden"),
        "404": (404, {}, b"Not found"),
        "cut": (200, {"Content-Length": len(body)}, half),
        "cut chunk": (200, {"Transfer-Encoding": "chunked"}, b"%x\r\n%s" % (len(body), half)),
        "empty": (200, {"Content-Length": 0}, b""),
        "page": (200, {"Content-Type": "text/html"}, b"<html>Back soon</html>"),
    }[failure]
    with pytest.raises(FileNotFoundError) as caught:
        calql_sera.find_dataset(ENV)
    message = str(caught.value)
    url = f"{calql_sera.SERVER}/gym_mujoco_v2/{FILE}"
    for part in (ENV, url, FILE, str(cache), "huggingface.co", "--dataset-path"):
        assert part in message
    assert "\n" not in message
    assert failure in message or not failure.isdigit()  # the status
    assert not (cache / FILE).exists()


def test_download_without_a_server(cache, monkeypatch):
    """No connection at all gives the same error."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(calql_sera, "SERVER", "http://127.0.0.1:1")
    with pytest.raises(FileNotFoundError, match=re.escape(str(cache))):
        calql_sera.find_dataset(ENV)
    assert list(cache.iterdir()) == []


def test_download_into_an_impossible_folder(tmp_path, monkeypatch, server):
    """A cache folder that cannot be made is named, with the way out."""
    folder = tmp_path / "file" / "cache"
    folder.parent.touch()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder))
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder)) + ".*--dataset-path"):
        calql_sera.find_dataset(ENV)
