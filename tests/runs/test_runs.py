"""Whole runs in a small setting: what each script writes, and what evaluating and resuming leave alone."""

import csv
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


SMALL = options("--batch-size 32 --sera-k 5 --hidden-dim 16 --eval-episodes 2 --checkpoint-every 10")
MINI = ["--env", "hopper-medium-mini", *SMALL]


def rows(run_dir: Path) -> list[dict]:
    with open(run_dir / "evals.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    networks = torch.load(run_dir / "checkpoint.pt", weights_only=True)["networks"]
    return {f"{name}.{key}": value for name, saved in networks.items() for key, value in saved.items()}


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def write_dataset(path: Path, observation_dim: int, action_dim: int, count: int = 400) -> str:
    """A data set of noise with episodes of 40 rows that end by turns in a terminal and in a time-out."""
    random = np.random.default_rng(0)
    ends = np.arange(1, count + 1) % 40 == 0
    terminals = ends & (np.arange(count) // 40 % 2 == 0)
    with h5py.File(path, "w") as file:
        file["observations"] = random.normal(size=(count, observation_dim)).astype(np.float32)
        file["actions"] = random.uniform(-1, 1, size=(count, action_dim)).astype(np.float32)
        file["rewards"] = random.normal(size=count).astype(np.float32)
        file["terminals"], file["timeouts"] = terminals, ends & ~terminals
    return str(path)


def test_what_a_run_writes(script, tmp_path, capsys):
    """Both phases on the bundled data: evals.csv, config, TensorBoard, checkpoint, summary."""
    steps = ["--offline-steps", "20", "--online-steps", "40", "--eval-every", "15"]
    script.main([*MINI, *steps, "--run-dir", str(tmp_path / "run")])
    run_dir = tmp_path / "run"
    header = (run_dir / "evals.csv").read_text().splitlines()[0]
    assert header == "phase,step,episode,return,length,normalized_score"
    seen = [(row["phase"], int(row["step"]), int(row["episode"])) for row in rows(run_dir)]
    when = [("offline", 15), ("offline", 20), ("online", 0), ("online", 15), ("online", 30), ("online", 40)]
    assert seen == [(*moment, episode) for moment in when for episode in (0, 1)]
    for row in rows(run_dir):
        score = script.normalized_score("hopper-medium-mini", float(row["return"]))
        assert float(row["normalized_score"]) == score and int(row["length"]) >= 1

    config = json.loads((run_dir / "config.json").read_text())
    assert config["args"]["online_steps"] == 40 and config["args"]["gamma"] == 0.99
    assert (
        config["env_id"] == "Hopper-v4"
        and config["args"]["physics"] == "d4rl"
        and len(config["data_sha256"]) == 64
    )
    assert {"torch", "gymnasium", "mujoco", "numpy"} <= set(config["versions"])
    events = EventAccumulator(str(run_dir)).Reload().Tags()["scalars"]
    assert {"eval/normalized_score", "eval/return", "losses/q_data"} <= set(events)
    sera = {"bonus_mean", "bonus_sd", "above_0.95", "neighbours", "floored"}
    assert {f"sera/{name}" for name in sera} <= set(events)
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert (checkpoint["phase"], checkpoint["step"], checkpoint["script"]) == ("online", 40, script.__name__)
    out = capsys.readouterr().out
    final = np.mean([float(row["normalized_score"]) for row in rows(run_dir)[-2:]])
    assert out.splitlines()[-1] == f"final score {final:.1f}"


def test_phases_of_zero_steps(script, tmp_path):
    """A phase without steps writes no row; evaluations that coincide happen once."""
    steps = options("--offline-steps 6 --online-steps 0 --eval-every 3 --eval-episodes 1")
    script.main([*MINI, *steps, "--run-dir", str(tmp_path / "a")])
    assert [(row["phase"], row["step"]) for row in rows(tmp_path / "a")] == [
        ("offline", "3"),
        ("offline", "6"),
    ]
    steps = options("--offline-steps 0 --online-steps 6 --eval-every 9 --eval-episodes 1")
    script.main([*MINI, *steps, "--run-dir", str(tmp_path / "b")])
    assert [(row["phase"], row["step"]) for row in rows(tmp_path / "b")] == [("online", "0"), ("online", "6")]


@pytest.mark.parametrize(
    "sera", ["--sera-bonus v", "--sera-bonus state --sera-scale dim", "--sera-bonus constant"]
)
@pytest.mark.parametrize("critic", ["current", "random"])
def test_sera_variants_run(script, tmp_path, sera, critic):
    """Every bonus and every critic behind it goes through an online phase and stays finite."""
    steps = options("--offline-steps 4 --online-steps 12 --eval-every 100 --sera-critic")
    script.main([*MINI, *steps, critic, *sera.split(), "--run-dir", str(tmp_path / "run")])
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize("env", ["walker2d-medium-v2", "halfcheetah-random-v0", "ant-medium-replay-v1"])
def test_other_robots(script, tmp_path, env):
    """The other robots run both phases on a file of their own shape, ant with 84 padded dimensions."""
    task = script.find_task(env)
    path = write_dataset(tmp_path / "data.hdf5", task.observation_dim, task.action_dim)
    steps = options("--offline-steps 4 --online-steps 30 --eval-every 100 --eval-episodes 1 --sera-scale dim")
    script.main(["--env", env, "--dataset-path", path, *SMALL, *steps, "--run-dir", str(tmp_path / "run")])
    assert {row["phase"] for row in rows(tmp_path / "run")} == {"offline", "online"}


def test_evaluation_leaves_training_alone(script, tmp_path):
    """Evaluating more often changes no weight, and the start states at a given step are the same."""
    steps = options("--offline-steps 12 --online-steps 24 --eval-every")
    for name, every in (("often", "4"), ("seldom", "12")):
        script.main([*MINI, *steps, every, "--run-dir", str(tmp_path / name)])
    assert same(weights(tmp_path / "often"), weights(tmp_path / "seldom"))
    assert [row for row in rows(tmp_path / "often") if int(row["step"]) % 12 == 0] == rows(
        tmp_path / "seldom"
    )


def test_seeds_differ(script, tmp_path):
    """Another seed gives other weights; the same seed the same."""
    steps = options("--offline-steps 5 --online-steps 0 --eval-every 100 --seed")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        script.main([*MINI, *steps, seed, "--run-dir", str(tmp_path / name)])
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_resume(script, tmp_path):
    """A finished run goes on with more online steps: no row is lost or doubled, weights move on."""
    run_dir = tmp_path / "run"
    steps = options("--offline-steps 10 --online-steps 20 --eval-every 10")
    script.main([*MINI, *steps, "--run-dir", str(run_dir)])
    before, weights_before = rows(run_dir), weights(run_dir)
    script.main(["--run-dir", str(run_dir), "--resume", "--online-steps", "30"])
    after = rows(run_dir)
    assert after[: len(before)] == before
    assert [(row["phase"], row["step"]) for row in after[len(before) :]] == [("online", "30")] * 2
    assert not same(weights_before, weights(run_dir))
    script.main(["--run-dir", str(run_dir), "--resume"])  # nothing left to do
    assert rows(run_dir) == after


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_alone_in_a_folder(name, tmp_path):
    """A copy of one script in an empty folder runs as a program, with a progress bar, and leaves no log."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    data = write_dataset(tmp_path / "mine.hdf5", 17, 6)
    steps = options("--offline-steps 5 --online-steps 5 --eval-every 100")
    command = [
        sys.executable,
        f"{name}.py",
        "--env",
        "halfcheetah-medium-v2",
        "--dataset-path",
        data,
        *SMALL,
        *steps,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "offline: 100%" in done.stderr and "Warning" not in done.stderr and "final score" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {f"{name}.py", "mine.hdf5", "runs"}
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith(f"halfcheetah-medium-v2__{name}__1__")


def test_collect(tmp_path):
    """data/collect.py makes a loadable file from a checkpoint, in D4RL's types, and never overwrites one."""
    import sac_sera

    steps = options("--offline-steps 0 --mixing-ratio 0 --online-steps 60 --eval-every 100")
    sac_sera.main([*MINI, *steps, "--run-dir", str(tmp_path / "run")])
    command = [
        sys.executable,
        ROOT / "data" / "collect.py",
        tmp_path / "run" / "checkpoint.pt",
        tmp_path / "x.hdf5",
    ]
    done = subprocess.run([*command, "--steps", "1.2e3"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "mean_return" in done.stdout, done.stderr
    with h5py.File(tmp_path / "x.hdf5") as file:
        types = {name: (str(column.dtype), column.compression) for name, column in file.items()}
    floats = dict.fromkeys(("observations", "actions", "rewards"), ("float32", "gzip"))
    assert types == floats | dict.fromkeys(("terminals", "timeouts"), ("bool", "gzip"))
    data = sac_sera.load_d4rl("hopper-medium-v2", str(tmp_path / "x.hdf5"))
    assert len(data["rewards"]) == 1199 and data["terminals"].sum() > 5
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "exists" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


def test_bundled_data():
    """The bundled file: 50,000 rows, five keys, under 4 MB, mean score between 30 and 45."""
    import calql_sera

    path = ROOT / "data" / "hopper-medium-mini.hdf5"
    assert path.stat().st_size < 4e6
    with h5py.File(path) as file:
        assert set(file) == {"observations", "actions", "rewards", "terminals", "timeouts"}
        rewards, ends = file["rewards"][()], file["terminals"][()] | file["timeouts"][()]
        assert rewards.shape == (50_000,) and 30 < file.attrs["mean_score"] < 45
    returns = [episode.sum(dtype=np.float64) for episode in np.split(rewards, np.flatnonzero(ends) + 1)[:-1]]
    score = calql_sera.normalized_score("hopper-medium-mini", np.mean(returns))
    assert 30 < score < 45 and score == pytest.approx(h5py.File(path).attrs["mean_score"], abs=0.01)
    assert len(calql_sera.load_d4rl("hopper-medium-mini")["rewards"]) > 49_000
