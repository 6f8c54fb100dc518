"""data/collect.py's walks through AntMaze; what it makes of a checkpoint is in test_runs.py."""

import importlib.util

import h5py
import numpy as np
import pytest
from conftest import ROOT

import iql_sera

spec = importlib.util.spec_from_file_location("collect", ROOT / "data" / "collect.py")
collect = importlib.util.module_from_spec(spec)
spec.loader.exec_module(collect)


def write_ant(path):
    """A file like that of D4RL's goal-reaching ant, with small random weights."""
    rng, widths = np.random.default_rng(0), {"fc0": (256, 29), "fc1": (256, 256)}
    widths |= {"last_fc": (8, 256), "last_fc_log_std": (8, 256)}
    weights = {f"{name}.weight": rng.normal(0, 0.05, shape) for name, shape in widths.items()}
    np.savez(path, **weights, **{f"{name}.bias": np.zeros(shape[0]) for name, shape in widths.items()})
    return str(path)


def test_next_cell():
    """By hand: along the only way through umaze, staying at the goal, and the shorter of two ways."""
    cells = np.array([list(row) for row in ("#####", "#R..#", "###.#", "#G..#", "#####")])
    way = [(1, 1)]
    while way[-1] != (3, 1):
        way.append(collect.next_cell(cells, way[-1], (3, 1)))
    assert way == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]
    assert collect.next_cell(cells, (3, 1), (3, 1)) == (3, 1)
    cells = np.array([list(row) for row in ("#######", "#.....#", "#.###.#", "#...G.#", "#######")])
    assert collect.next_cell(cells, (2, 1), (3, 4)) == (3, 1)
    assert collect.next_cell(cells, (1, 5), (3, 4)) == (2, 5)


def test_file(tmp_path, capsys):
    """A walk gives a file in D4RL's format that loads, and says where it came from; one seed, one file."""
    ant, files = write_ant(tmp_path / "ant.npz"), []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = tmp_path / f"{name}.hdf5"
        options = ["--env", "antmaze-umaze-v2", "--steps", "720", "--seed", str(seed)]
        collect.main([ant, str(output), *options])
        with h5py.File(output) as file:
            files.append({key: file[key][:] for key in file} | {"attributes": dict(file.attrs)})
    assert files[0]["observations"].shape == (720, 29) and files[0]["actions"].shape == (720, 8)
    assert np.abs(files[0]["actions"]).max() == 1  # the added noise is clipped
    assert files[0]["timeouts"].nonzero()[0].tolist() == [699] and not files[0]["terminals"].any()
    assert files[0]["attributes"]["env"] == "antmaze-umaze-v2" and files[0]["attributes"]["episodes"] == 1
    np.testing.assert_array_equal(files[0]["observations"], files[1]["observations"])
    assert not np.array_equal(files[0]["observations"], files[2]["observations"])
    assert len(iql_sera.load_d4rl("antmaze-umaze-v2", str(tmp_path / "a.hdf5"))["rewards"]) == 718


def test_refusals(tmp_path, capsys):
    """A maze where none is needed, none where one is, and a file of other weights: one sentence each."""
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    ant, output = write_ant(tmp_path / "ant.npz"), str(tmp_path / "x.hdf5")
    cases = {("--env", "hopper-medium-v2"): "antmaze", (): "--env is None"}
    for options, text in cases.items():
        with pytest.raises(SystemExit) as caught:
            collect.main([ant, output, *options])
        assert caught.value.code == 2 and text in capsys.readouterr().err
    for path, text in ((str(tmp_path / "other.npz"), "other.npz"), ("run/checkpoint.pt", "--env")):
        with pytest.raises(SystemExit):
            collect.main([path, output, "--env", "antmaze-umaze-v2"])
        assert text in capsys.readouterr().err


def test_the_goal_reaching_ant_arrives(real_data):
    """D4RL's own ant walks to the goal in most episodes: the physics is that it was trained in."""
    env = iql_sera.make_env("antmaze-umaze-v2")
    policy = collect.walker(str(real_data / "antmaze" / "ant_hierarch_pol_actor.npz"), env.unwrapped)
    arrived = []
    for seed in range(10):
        (observation, _), ended = env.reset(seed=seed), False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(policy(observation))
            ended = terminated or truncated
        arrived.append(terminated and reward == 1)
    print(f"{sum(arrived)} of {len(arrived)} episodes reach the goal")
    assert sum(arrived) >= 6
