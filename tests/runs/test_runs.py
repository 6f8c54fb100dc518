"""Small whole runs: what each script writes, and what evaluating and resuming leave alone."""

import csv
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def options(text: str) -> list[str]:
    return text.split()


SMALL = options(
    "--batch-size 32 --sera-k 5 --hidden-dim 16 --eval-episodes 2 --checkpoint-every 10"
)
MINI = ["--env", "hopper-medium-mini", *SMALL]


def rows(run_dir: Path) -> list[dict]:
    with open(run_dir / "evals.csv", newline="") as file:
        return list(csv.DictReader(file))


def moments(some_rows: list[dict]) -> list[tuple[str, int]]:
    return [(row["phase"], int(row["step"])) for row in some_rows]


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint(run_dir)["agent"]


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def write_dataset(path: Path, observation_dim: int, action_dim: int, count: int = 400) -> str:
    """A dataset of noise; its episodes of 40 rows end by turns in a terminal and in a timeout."""
    random = np.random.default_rng(0)
    ends = np.arange(1, count + 1) % 40 == 0
    terminals = ends & (np.arange(count) // 40 % 2 == 0)
    with h5py.File(path, "w") as file:
        file["observations"] = random.normal(size=(count, observation_dim)).astype(np.float32)
        file["actions"] = random.uniform(-1, 1, size=(count, action_dim)).astype(np.float32)
        file["rewards"] = random.normal(size=count).astype(np.float32)
        file["terminals"] = terminals
        file["timeouts"] = ends & ~terminals
    return str(path)


def test_what_a_run_writes(script, tmp_path, capsys):
    """Both phases on the bundled data: evals.csv, config, TensorBoard, checkpoint, summary."""
    run_dir = tmp_path / "run"
    steps = options("--offline-steps 20 --online-steps 40 --eval-every 15")
    script.main([*MINI, *steps, "--run-dir", str(run_dir)])
    header = (run_dir / "evals.csv").read_text().splitlines()[0]
    assert header == "phase,step,episode,return,length,normalized_score"
    when = [("offline", 15), ("offline", 20)]
    when += [("online", 0), ("online", 15), ("online", 30), ("online", 40)]
    assert moments(rows(run_dir)) == [moment for moment in when for _ in range(2)]
    assert [int(row["episode"]) for row in rows(run_dir)] == [0, 1] * len(when)
    for row in rows(run_dir):
        score = script.normalized_score("hopper-medium-mini", float(row["return"]))
        assert float(row["normalized_score"]) == score
        assert int(row["length"]) >= 1

    config = json.loads((run_dir / "config.json").read_text())
    assert config["script"] == script.__name__
    assert config["env_id"] == "Hopper-v4"
    assert config["args"]["online_steps"] == 40
    assert config["args"]["gamma"] == 0.99
    assert config["args"]["physics"] == "d4rl"
    assert Path(config["data_file"]).name == "hopper-medium-mini.hdf5"
    assert len(config["data_sha256"]) == 64
    assert {"python", "torch", "gymnasium", "mujoco", "numpy", "h5py"} == set(config["versions"])

    tags = EventAccumulator(str(run_dir)).Reload().Tags()["scalars"]
    assert {"eval/normalized_score", "eval/return", "eval/length", "losses/q_data"} <= set(tags)
    sera = {"bonus_mean", "bonus_sd", "above_0.95", "neighbours", "floored"}
    assert {f"sera/{name}" for name in sera} <= set(tags)

    saved = checkpoint(run_dir)
    assert (saved["phase"], saved["step"], saved["script"]) == ("online", 40, script.__name__)
    final = np.mean([float(row["normalized_score"]) for row in rows(run_dir)[-2:]])
    assert capsys.readouterr().out.splitlines()[-1] == f"final score {final:.1f}"


def test_phases_of_zero_steps(script, tmp_path):
    """A phase without steps writes no row; evaluations that coincide happen once."""
    steps = options("--offline-steps 6 --online-steps 0 --eval-every 3 --eval-episodes 1")
    script.main([*MINI, *steps, "--run-dir", str(tmp_path / "a")])
    assert moments(rows(tmp_path / "a")) == [("offline", 3), ("offline", 6)]
    steps = options("--offline-steps 0 --online-steps 6 --eval-every 9 --eval-episodes 1")
    script.main([*MINI, *steps, "--run-dir", str(tmp_path / "b")])
    assert moments(rows(tmp_path / "b")) == [("online", 0), ("online", 6)]


@pytest.mark.parametrize(
    "sera", ["--sera-bonus v", "--sera-bonus state --sera-scale dim", "--sera-bonus constant"]
)
@pytest.mark.parametrize("critic", ["current", "random"])
def test_sera_variants_run(script, tmp_path, sera, critic):
    """Every bonus and every critic behind it goes through an online phase and stays finite."""
    steps = options("--offline-steps 4 --online-steps 12 --eval-every 100 --sera-critic")
    script.main([*MINI, *steps, critic, *sera.split(), "--run-dir", str(tmp_path / "run")])
    for name, value in weights(tmp_path / "run").items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize(
    "env", ["walker2d-medium-v2", "halfcheetah-random-v0", "ant-medium-replay-v1"]
)
def test_other_robots(script, tmp_path, env):
    """The other robots run both phases on a file of their own shape; ant is padded with zeros."""
    task = script.find_task(env)
    path = write_dataset(tmp_path / "data.hdf5", task.observation_dim, task.action_dim)
    steps = options("--offline-steps 4 --online-steps 30 --eval-every 100 --eval-episodes 1")
    argv = ["--env", env, "--dataset-path", path, *SMALL, *steps, "--sera-scale", "dim"]
    script.main([*argv, "--run-dir", str(tmp_path / "run")])
    assert {row["phase"] for row in rows(tmp_path / "run")} == {"offline", "online"}


def test_dimensions_that_vary(tmp_path):
    """The bonus leaves out ant's 84 zeros, and nothing of a robot without such."""
    script = importlib.import_module("sac_sera")
    for env, varying in (("ant-medium-v2", 27), ("hopper-medium-v2", 11)):
        task = script.find_task(env)
        path = write_dataset(tmp_path / f"{env}.hdf5", task.observation_dim, task.action_dim)
        argv = ["--env", env, "--dataset-path", path, *SMALL, "--run-dir", str(tmp_path / env)]
        run = script.set_up(script.parse_args(argv))
        assert run.varying_dims.tolist() == list(range(varying))


def test_first_line(tmp_path, capsys):
    """Data, physics where there are two kinds, device, folder; untrained critics are named."""
    script = importlib.import_module("sac_sera")

    def said(folder, env, *more):
        run_dir = ["--run-dir", str(tmp_path / folder)]
        args = ["--env", env, *SMALL, "--device", "cpu", "--threads", "1", *more, *run_dir]
        script.set_up(script.parse_args(args))
        return capsys.readouterr().out.splitlines()

    (line,) = said("hopper", "hopper-medium-mini")
    version = importlib.import_module("mujoco").__version__
    start = f"hopper-medium-mini: 49,984 transitions; physics of d4rl, mujoco {version}; "
    assert line == f"{start}cpu, threads 1; {tmp_path}/hopper"
    (line,) = said("pendulum", "pendulum-mini")
    start = "pendulum-mini: 20,895 transitions; cpu, threads 1; "
    assert line == f"{start}{tmp_path}/pendulum"
    scratch = ["hopper-medium-mini", "--offline-steps", "0"]
    _, warning = said("untrained", *scratch)
    assert warning.startswith("--offline-steps 0: the critics behind the bonus are untrained")
    assert len(said("learning", *scratch, "--sera-critic", "current")) == 1
    assert len(said("plain", *scratch, "--sera-coef", "0")) == 1


def test_evaluation_leaves_training_alone(script, tmp_path):
    """Evaluating more often changes no weight, and at a given step starts are the same."""
    steps = options("--offline-steps 12 --online-steps 24 --eval-every")
    for name, every in (("often", "4"), ("seldom", "12")):
        script.main([*MINI, *steps, every, "--run-dir", str(tmp_path / name)])
    assert same(weights(tmp_path / "often"), weights(tmp_path / "seldom"))
    common = [row for row in rows(tmp_path / "often") if int(row["step"]) % 12 == 0]
    assert common == rows(tmp_path / "seldom")


def test_seeds_differ(script, tmp_path):
    """Another seed gives other weights; the same seed the same."""
    steps = options("--offline-steps 5 --online-steps 0 --eval-every 100 --seed")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        script.main([*MINI, *steps, seed, "--run-dir", str(tmp_path / name)])
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_resume(script, tmp_path):
    """A finished run goes on with more online steps: no row is lost or doubled, weights move on.

    All its online transitions are there, those of the episode that its end cut short too.
    """
    run_dir = tmp_path / "run"
    steps = options("--offline-steps 10 --online-steps 20 --eval-every 10")
    script.main([*MINI, *steps, "--run-dir", str(run_dir)])
    rows_before = rows(run_dir)
    before = checkpoint(run_dir)
    assert len(before["online_rows"]) == 20
    script.main(["--run-dir", str(run_dir), "--resume", "--online-steps", "30"])
    rows_after = rows(run_dir)
    after = checkpoint(run_dir)
    assert rows_after[: len(rows_before)] == rows_before
    assert moments(rows_after[len(rows_before) :]) == [("online", 30)] * 2
    assert not same(before["agent"], after["agent"])
    assert len(after["online_rows"]) == 30
    assert torch.equal(after["online_rows"][:20], before["online_rows"])
    script.main(["--run-dir", str(run_dir), "--resume"])  # nothing left to do
    assert rows(run_dir) == rows_after
    assert same(checkpoint(run_dir)["agent"], after["agent"])


def test_resume_of_an_offline_phase(script, tmp_path):
    """A run of the offline phase alone gets an online one: evaluations stay, no step is lost."""
    run_dir = tmp_path / "run"
    steps = options("--offline-steps 10 --online-steps 0 --eval-every 10")
    script.main([*MINI, *steps, "--run-dir", str(run_dir)])
    rows_before = rows(run_dir)
    assert checkpoint(run_dir)["phase"] == "offline"
    script.main(["--run-dir", str(run_dir), "--resume", "--online-steps", "12"])
    rows_after = rows(run_dir)
    assert rows_after[: len(rows_before)] == rows_before
    new = [("online", 0), ("online", 10), ("online", 12)]
    assert moments(rows_after[len(rows_before) :]) == [moment for moment in new for _ in range(2)]
    saved = checkpoint(run_dir)
    assert (saved["phase"], saved["step"], len(saved["online_rows"])) == ("online", 12, 12)
    assert saved["args"]["online_steps"] == 12


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_alone_in_a_folder(name, tmp_path):
    """A copy of one script in an empty folder runs as a program, with a bar and no stray files."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    data = write_dataset(tmp_path / "mine.hdf5", 17, 6)
    steps = options("--offline-steps 5 --online-steps 5 --eval-every 100")
    argv = ["--env", "halfcheetah-medium-v2", "--dataset-path", data, *SMALL, *steps]
    command = [sys.executable, f"{name}.py", *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "offline: 100%" in done.stderr
    assert "online: 100%" in done.stderr
    assert "Warning" not in done.stderr
    assert "final score" in done.stdout
    names = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert names == {f"{name}.py", "mine.hdf5", "runs"}
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith(f"halfcheetah-medium-v2__{name}__1__")


def test_collect(tmp_path):
    """data/collect.py makes a file from a checkpoint, in D4RL's types."""
    import sac_sera

    steps = options("--offline-steps 0 --mixing-ratio 0 --online-steps 60 --learning-starts 20")
    sac_sera.main([*MINI, *steps, "--run-dir", str(tmp_path / "run")])
    output = tmp_path / "x.hdf5"
    collect = ROOT / "data" / "collect.py"
    command = [sys.executable, collect, tmp_path / "run" / "checkpoint.pt", output]
    command += ["--steps", "1200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "mean_return" in done.stdout
    with h5py.File(output) as file:
        types = {name: (str(column.dtype), column.compression) for name, column in file.items()}
    floats = dict.fromkeys(("observations", "actions", "rewards"), ("float32", "gzip"))
    assert types == floats | dict.fromkeys(("terminals", "timeouts"), ("bool", "gzip"))
    data = sac_sera.load_d4rl("hopper-medium-v2", output)
    assert len(data["rewards"]) == 1199
    assert data["terminals"].sum() > 5


def test_bundled_data():
    """The bundled file: 50,000 rows, five keys, under 4 MB, mean score between 30 and 45."""
    import calql_sera

    path = ROOT / "data" / "hopper-medium-mini.hdf5"
    assert path.stat().st_size < 4e6
    with h5py.File(path) as file:
        assert set(file) == {"observations", "actions", "rewards", "terminals", "timeouts"}
        rewards = file["rewards"][()]
        ends = file["terminals"][()] | file["timeouts"][()]
        stated_score = file.attrs["mean_score"]
    assert rewards.shape == (50_000,)
    episodes = np.split(rewards, np.flatnonzero(ends) + 1)[:-1]
    returns = [episode.sum(dtype=np.float64) for episode in episodes]
    score = calql_sera.normalized_score("hopper-medium-mini", np.mean(returns))
    assert 30 < score < 45
    assert score == pytest.approx(stated_score, abs=0.01)
    found = calql_sera.fetch_dataset("hopper-medium-mini")
    assert found.samefile(path)
    assert len(calql_sera.load_d4rl("hopper-medium-mini", found)["rewards"]) > 49_000
