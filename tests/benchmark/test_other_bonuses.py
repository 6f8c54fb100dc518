"""other_bonuses.py: RND and counts in the place of SERA's bonus, and what a run with them keeps."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT / "benchmark"))
import other_bonuses

import td3bc_sera

SMALL = ["--env", "pendulum-mini", "--threads", "1", "--device", "cpu", "--batch-size", "16"]
SMALL += ["--hidden-dim", "8", "--offline-steps", "20", "--eval-every", "200"]
SMALL += ["--eval-episodes", "1", "--log-every", "50", "--sera-k", "3"]


def script_with(bonus: str) -> ModuleType:
    """A fresh copy of TD3+BC with another bonus."""
    script = other_bonuses.load_script(ROOT / "td3bc_sera.py")
    other_bonuses.use_bonus(script, bonus)
    return script


def run_in(folder: Path, script: ModuleType, *options) -> dict:
    """The checkpoint of a run in folder."""
    script.main([*SMALL, "--run-dir", str(folder), *map(str, options)])
    return torch.load(folder / "checkpoint.pt", weights_only=True)


# ------------------------------ RND
def test_running_moments():
    """Those of all rows at once, whatever the batches."""
    rows = np.random.default_rng(0).normal(3, 2, (100, 4))
    moments = other_bonuses.RunningMoments(4)
    for part in np.split(rows, [1, 10, 60]):
        moments.add(torch.from_numpy(part))
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, rows.var(0), rtol=1e-12)


def novelty(dimension: int = 3) -> other_bonuses.Novelty:
    script = other_bonuses.load_script(ROOT / "td3bc_sera.py")
    torch.manual_seed(0)
    return other_bonuses.Novelty(script, dimension, hidden_dim=32, on_gpu=False)


def test_rnd_by_hand():
    """Its first bonus: mean squared difference of the networks at whitened states, over its sd."""
    net = novelty()
    states = torch.randn(64, 3) * torch.tensor([1.0, 10.0, 0.0]) + 5  # one dimension never changes
    whitened = (states - states.mean(0)) / (states.var(0, correction=0) + 1e-8).sqrt()
    whitened = whitened.clamp(-5, 5)
    with torch.no_grad():
        difference = net.predictor(whitened) - net.random_network(whitened)
    errors = difference.square().mean(1)
    bonus = net.learn(states)
    torch.testing.assert_close(bonus, errors / errors.std(correction=0), rtol=1e-4, atol=1e-5)


def test_rnd_learns_what_is_common():
    """The error falls most where the states are, and the random network never moves."""
    net = novelty()
    before = [parameter.clone() for parameter in net.random_network.parameters()]
    common = torch.randn(256, 3) * 0.3
    rare = torch.randn(8, 3) * 0.3 + 3
    bonus = None
    for _ in range(400):
        bonus = net.learn(torch.cat([common, rare]))
    assert bonus[256:].mean() > 3 * bonus[:256].mean()
    for old, new in zip(before, net.random_network.parameters()):
        assert torch.equal(old, new)


# ------------------------------ counts
def test_simhash_by_hand():
    """Bit b of a code says whether the state is on the positive side of direction b."""
    directions = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    states = torch.tensor([[1.0, 1.0], [1.0, -2.0], [-1.0, -1.0], [-1.0, 3.0]])
    assert other_bonuses.simhash(states, directions).tolist() == [0b111, 0b001, 0b000, 0b110]


def test_simhash_does_not_round():
    """A state beside a boundary has one code, in whatever order its product is summed."""
    rows = [[1e8, 1.0, -1e8], [1e8, -1e8, 1.0], [1.0, 1e8, -1e8]]  # float32 loses some of the ones
    directions = torch.ones(3, 1)
    assert other_bonuses.simhash(torch.tensor(rows), directions).tolist() == [1, 1, 1]


def test_counts_by_hand():
    """Stored transitions are counted once each, dataset and online ones; the bonus follows."""
    script = script_with("counts")
    args = script.Args(batch_size=4, online_steps=10, normalize_observations=False, device="cpu")
    states = np.array([[1, 0], [2, 0], [-1, 0]], np.float32)
    data = {
        "observations": states,
        "actions": np.zeros((3, 1), np.float32),
        "rewards": np.zeros(3, np.float32),
        "next_observations": states,
        "terminals": np.zeros(3, bool),
        "episode_ends": np.array([False, False, True]),
    }
    buffer = script.ReplayBuffer(data, args, torch.device("cpu"))
    assert sorted(buffer.counts[buffer.counts > 0].tolist()) == [1, 2]  # of one direction: 2
    buffer.append({name: values[:2] for name, values in data.items()})
    assert sorted(buffer.counts[buffer.counts > 0].tolist()) == [1, 4]
    batch = buffer.sample(script.BatchRows(both=100))
    visits = torch.where(batch["observations"][:, 0] > 0, 4.0, 1.0)
    assert torch.equal(batch["visits"], visits)
    bonus, logs = script.intrinsic_reward(None, batch, None, args, True)
    torch.testing.assert_close(bonus, visits**-0.5)
    assert math.isclose(logs["sera/bonus_mean"], bonus.mean())


# ------------------------------ whole runs
@pytest.mark.parametrize("bonus", ["rnd", "counts"])
def test_resumed_run_is_the_same(bonus, tmp_path):
    """What a bonus remembers comes back; and config.json names it."""
    script = script_with(bonus)
    whole = run_in(tmp_path / "whole", script, "--online-steps", 400)
    run_in(tmp_path / "part", script, "--online-steps", 200)
    resumed = run_in(tmp_path / "part", script, "--online-steps", 400, "--resume")
    assert_same(whole["agent"], resumed["agent"])
    assert_same(whole["bonus_agent"], resumed["bonus_agent"])
    assert json.loads((tmp_path / "part" / "config.json").read_text())["bonus"] == bonus


def assert_same(one: dict, other: dict) -> None:
    """Equal networks, and an equal optimizer of RND."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[name]), name
            continue
        moments, others = value["state"], other[name]["state"]
        assert moments.keys() == others.keys()
        for number, moment in moments.items():
            assert torch.equal(moment["exp_avg_sq"], others[number]["exp_avg_sq"])


@pytest.mark.parametrize("bonus", ["rnd", "counts"])
def test_starts_from_the_plain_script(bonus, tmp_path):
    """An offline phase of the script itself, as the runner of grids shares it, and then the bonus.

    With weight 0 the run ends as the plain one; with weight 1 it does not.
    """
    plain = tmp_path / "plain"
    run_in(plain, td3bc_sera, "--online-steps", 0)
    ends = {}
    for weight in (0, 1):
        folder = tmp_path / f"weight{weight}"
        shutil.copytree(plain, folder)
        options = ["--online-steps", 400, "--sera-coef", weight, "--resume"]
        ends[weight] = run_in(folder, script_with(bonus), *options)["agent"]
    options = ["--online-steps", 400, "--sera-coef", 0, "--resume"]
    expected = run_in(plain, td3bc_sera, *options)["agent"]
    for name, value in expected.items():
        assert torch.equal(value, ends[0][name]), name
    assert any(not torch.equal(value, ends[1][name]) for name, value in expected.items())


def test_program(tmp_path):
    """As the runner starts it: a process that passes the options on."""
    command = [sys.executable, ROOT / "benchmark" / "other_bonuses.py", "counts"]
    command += [ROOT / "td3bc_sera.py", *SMALL, "--online-steps", "0", "--run-dir", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "evals.csv").exists()


def test_usage(tmp_path, capsys):
    """Bad input gets one sentence."""
    assert other_bonuses.main(["rnd"]) == 2
    assert other_bonuses.main(["else", "td3bc_sera.py"]) == 2
    assert capsys.readouterr().err == f"{other_bonuses.USAGE}\n" * 2
    assert other_bonuses.main(["rnd", str(tmp_path / "none.py")]) == 2
    assert capsys.readouterr().err.startswith("error: there is no script")
