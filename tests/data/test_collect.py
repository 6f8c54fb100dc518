"""data/collect.py: walks through AntMaze, policies of checkpoints, bad input."""

import importlib.util
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT

import calql_sera

UMAZE = "antmaze-umaze-v2"
SMALL = [
    *("--env", "hopper-medium-mini", "--device", "cpu", "--hidden-dim", "8", "--batch-size", "32"),
    *("--sera-k", "5", "--eval-episodes", "1", "--offline-steps", "1", "--online-steps", "1"),
]


def load_program():
    """data/collect.py as a module: data/ is no package."""
    spec = importlib.util.spec_from_file_location("collect", ROOT / "data" / "collect.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["collect"] = module  # where tyro looks for it
    spec.loader.exec_module(module)
    return module


collect = load_program()


def write_ant(path):
    """A file like that of D4RL's goal-reaching ant, with small random weights."""
    rng = np.random.default_rng(0)
    shapes = {
        "fc0": (256, 29),
        "fc1": (256, 256),
        "last_fc": (8, 256),
        "last_fc_log_std": (8, 256),
    }
    arrays = {}
    for name, shape in shapes.items():
        arrays[f"{name}.weight"] = rng.normal(0, 0.05, shape)
        arrays[f"{name}.bias"] = np.zeros(shape[0])
    np.savez(path, **arrays)
    return str(path)


def read(path):
    """Arrays and attributes of a file."""
    with h5py.File(path) as file:
        return {name: file[name][:] for name in file}, dict(file.attrs)


@pytest.fixture
def refuse(capsys):
    """Run the program, which has to refuse: gives its one line on stderr."""

    def run(*argv):
        capsys.readouterr()  # of what came before
        with pytest.raises(SystemExit) as caught:
            collect.main([str(part) for part in argv])
        stderr = capsys.readouterr().err.strip()
        assert caught.value.code == 2
        assert stderr.startswith("error: ")
        assert "\n" not in stderr
        return stderr

    return run


# ------------------------------ walks through AntMaze
def test_next_cell():
    """By hand: along the only way through umaze, staying at the goal, the shorter of two ways."""
    cells = np.array([list(row) for row in ("#####", "#R..#", "###.#", "#G..#", "#####")])
    way = [(1, 1)]
    while way[-1] != (3, 1):
        way.append(collect.next_cell(cells, way[-1], (3, 1)))
    assert way == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]
    assert collect.next_cell(cells, (3, 1), (3, 1)) == (3, 1)
    cells = np.array([list(row) for row in ("#######", "#.....#", "#.###.#", "#...G.#", "#######")])
    assert collect.next_cell(cells, (2, 1), (3, 4)) == (3, 1)
    assert collect.next_cell(cells, (1, 5), (3, 4)) == (2, 5)


def test_file(tmp_path):
    """A walk gives a file in D4RL's format, which says where it came from; one seed, one file."""
    ant = write_ant(tmp_path / "ant.npz")
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = tmp_path / f"{name}.hdf5"
        options = ["--env", UMAZE, "--steps", "720", "--seed", str(seed)]
        collect.main([ant, str(output), *options])
        files.append(read(output))
    (arrays, attributes), (again, _), (other, _) = files
    assert arrays["observations"].shape == (720, 29)
    assert arrays["actions"].shape == (720, 8)
    assert np.abs(arrays["actions"]).max() == 1  # the added noise is clipped
    assert arrays["timeouts"].nonzero()[0].tolist() == [699]
    assert not arrays["terminals"].any()
    assert attributes["env"] == UMAZE
    assert attributes["policy"] == "ant.npz"
    assert attributes["episodes"] == 1
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, again[name])
    assert not np.array_equal(arrays["observations"], other["observations"])
    assert len(calql_sera.load_d4rl(UMAZE, tmp_path / "a.hdf5")["rewards"]) == 718


def test_the_goal_reaching_ant_arrives(real_data):
    """D4RL's own ant gets to the goal in most episodes: the physics is that it was trained in."""
    env = calql_sera.make_env(UMAZE)
    weights = real_data / "antmaze" / "ant_hierarch_pol_actor.npz"
    policy = collect.MazeWalker(str(weights), env.unwrapped)
    arrived = []
    for seed in range(10):
        observation, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(policy(observation))
            ended = terminated or truncated
        arrived.append(terminated and reward == 1)
    print(f"{sum(arrived)} of {len(arrived)} episodes reach the goal")
    assert sum(arrived) >= 6


# ------------------------------ rolling out
class ThreeEnds:
    """Episodes of two steps, the ends of which are in turn a terminal, the time limit, both."""

    def reset(self, seed=None):
        if seed is not None:
            self.seed = seed
            self.episode = 0
        self.episode += 1
        self.step_number = 0
        return np.array([self.seed, self.episode, 0]), {}

    def step(self, action):
        self.step_number += 1
        end = self.step_number == 2
        terminated = end and self.episode % 3 != 2
        truncated = end and self.episode % 3 != 1
        info = {"episode": {"r": 100 * self.episode}} if end else {}
        observation = np.array([self.seed, self.episode, self.step_number])
        return observation, action[0] + 0.5, terminated, truncated, info


def test_roll_out_by_hand():
    """Observations before the step, the end of every kind, returns of whole episodes alone."""
    arrays, returns = collect.roll_out(ThreeEnds(), lambda observation: observation[1:], 7, seed=9)
    states = [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0)]
    assert arrays["observations"].tolist() == [[9, *state] for state in states]
    assert arrays["actions"].tolist() == [list(state) for state in states]
    assert arrays["rewards"].tolist() == [episode + 0.5 for episode, _ in states]
    assert np.flatnonzero(arrays["terminals"]).tolist() == [1, 5]
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [3]
    assert returns == [100, 200, 300]
    types = {name: str(array.dtype) for name, array in arrays.items()}
    floats = dict.fromkeys(("observations", "actions", "rewards"), "float32")
    assert types == floats | {"terminals": "bool", "timeouts": "bool"}


# ------------------------------ policies of checkpoints
def test_policy_of_a_checkpoint(script, tmp_path):
    """The run's own sampled policy, with its weights and its normalisation, from the seed on."""
    script.main([*SMALL, "--seed", "7", "--run-dir", str(tmp_path / "run")])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    output = tmp_path / "x.hdf5"
    collect.main([str(tmp_path / "run" / "checkpoint.pt"), str(output), "--steps", "30"])
    arrays, attributes = read(output)
    args = script.Args(**saved["args"])
    agent = script.Agent(11, 3, args)
    agent.load_state_dict(saved["agent"])
    torch.manual_seed(0)
    env = script.make_env(args.env)
    observation, _ = env.reset(seed=0)
    for row in range(30):
        np.testing.assert_array_equal(arrays["observations"][row], observation.astype(np.float32))
        inputs = (torch.tensor(observation) - saved["normalizer"]["mean"]).float()
        inputs = inputs / saved["normalizer"]["std"].float()
        with torch.no_grad():
            action = agent.act(inputs[None], deterministic=False)[0].numpy()
        np.testing.assert_allclose(arrays["actions"][row], action, rtol=0, atol=1e-5)
        observation, reward, terminated, truncated, _ = env.step(arrays["actions"][row])
        assert arrays["rewards"][row] == np.float32(reward)
        assert arrays["terminals"][row] == terminated
        if terminated or truncated:
            observation, _ = env.reset()
    expected = {
        "env": "hopper-medium-mini",
        "physics": "d4rl",
        "script": script.__name__,
        "training_seed": 7,
        "training_phase": "online",
        "training_step": 1,
        "seed": 0,
    }
    assert {name: attributes[name] for name in expected} == expected


def test_mean_and_score(tmp_path):
    """Returns of the whole episodes alone: the attributes agree with the rows of the file."""
    calql_sera.main([*SMALL, "--run-dir", str(tmp_path / "run")])
    output = tmp_path / "x.hdf5"
    collect.main([str(tmp_path / "run" / "checkpoint.pt"), str(output), "--steps", "300"])
    arrays, attributes = read(output)
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"])
    episodes = np.split(arrays["rewards"].astype(np.float64), ends + 1)
    returns = [episode.sum() for episode in episodes[:-1]]  # the last one is cut, or empty
    assert len(returns) > 2
    assert attributes["episodes"] == len(returns)
    assert attributes["mean_return"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert attributes["sd_return"] == pytest.approx(np.std(returns), rel=1e-4)
    score = calql_sera.normalized_score("hopper-medium-v2", np.mean(returns))
    assert attributes["mean_score"] == pytest.approx(score, rel=1e-5)


def test_mix(tmp_path, capsys):
    """Two policies of one's own task share the steps; the first part ends as a timeout."""
    options = [*("--env", "pendulum-mini", "--device", "cpu", "--hidden-dim", "8", "--sera-k", "5")]
    options += ["--batch-size", "32", "--eval-episodes", "1", "--online-steps", "1"]
    checkpoints = []
    for steps in ("1", "2"):
        folder = tmp_path / steps
        script = importlib.import_module("td3bc_sera")
        script.main([*options, "--offline-steps", steps, "--run-dir", str(folder)])
        checkpoints.append(str(folder / "checkpoint.pt"))
    output = str(tmp_path / "mix.hdf5")
    collect.main([checkpoints[0], output, "--mix", checkpoints[1], "--steps", "421"])
    arrays, attributes = read(output)
    assert len(arrays["rewards"]) == 421
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [199, 209, 409]
    assert not arrays["terminals"].any()
    assert (attributes["seed_1"], attributes["seed_2"]) == (0, 1)
    assert attributes["episodes_1"] == attributes["episodes_2"] == 1
    assert "mean_score_1" not in attributes
    sac = importlib.import_module("sac_sera")
    sac.main([*SMALL, "--run-dir", str(tmp_path / "other")])
    other = str(tmp_path / "other" / "checkpoint.pt")
    output = str(tmp_path / "no.hdf5")
    with pytest.raises(SystemExit):
        collect.main([other, output, "--mix", checkpoints[0], "--steps", "4"])
    assert f"{checkpoints[0]} is of" in capsys.readouterr().err
    alone = str(tmp_path / "alone.hdf5")
    collect.main([checkpoints[1], alone, "--steps", "211", "--seed", "1"])
    own, _ = read(alone)
    np.testing.assert_array_equal(arrays["observations"][210:], own["observations"])
    np.testing.assert_array_equal(arrays["actions"][210:], own["actions"])


# ------------------------------ bad input
def test_mazes_are_for_the_ant_alone(refuse, tmp_path):
    """A maze where none is needed, none where one is, weights of something else: one sentence."""
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    ant = write_ant(tmp_path / "ant.npz")
    output = tmp_path / "x.hdf5"
    assert "hopper-medium-v2: name a dataset of AntMaze" in refuse(
        ant, output, "--env", "hopper-medium-v2"
    )
    assert "--env is None" in refuse(ant, output)
    assert "--env antmaze-umaze-v1" in refuse(ant, output, "--env", "antmaze-umaze-v1")
    assert "other.npz" in refuse(tmp_path / "other.npz", output, "--env", UMAZE)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(Path(ant).read_bytes()[:500])
    assert f"{cut} is not D4RL's goal-reaching ant" in refuse(cut, output, "--env", UMAZE)
    assert "nowhere.npz" in refuse(tmp_path / "nowhere.npz", output, "--env", UMAZE)
    assert "--env" in refuse("run/checkpoint.pt", output, "--env", UMAZE)
    assert not output.exists()


def test_no_checkpoint(refuse, tmp_path):
    """Nothing there, a folder, other files, a checkpoint cut, changed or of another version."""
    calql_sera.main([*SMALL, "--run-dir", str(tmp_path / "run")])
    whole = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    output = tmp_path / "x.hdf5"
    for missing in (path, tmp_path):
        assert f"there is no file {missing}" in refuse(missing, output)
    middle = len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (b"", b"text", whole[:middle], changed):
        path.write_bytes(content)
        assert f"{path} is damaged, or no checkpoint" in refuse(path, output)
    other_version = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    del other_version["args"]["gamma"]
    torch.save(other_version, path)
    assert f"{path} is damaged, or no checkpoint" in refuse(path, output)
    assert not output.exists()


def test_outputs_and_steps(refuse, tmp_path):
    """An output that exists, one in no folder, and too few steps are refused before any work."""
    taken = tmp_path / "taken.hdf5"
    taken.write_text("mine")
    assert f"{taken} exists" in refuse("checkpoint.pt", taken)
    assert taken.read_text() == "mine"
    assert "there is no folder" in refuse("checkpoint.pt", tmp_path / "nowhere" / "x.hdf5")
    for steps in (1, 0, -5):
        message = refuse("checkpoint.pt", tmp_path / "x.hdf5", f"--steps={steps}")
        assert f"--steps is {steps}: give a whole number of at least 2" in message
    message = refuse("checkpoint.pt", tmp_path / "x.hdf5", "--steps=5", "--mix", "a", "b")
    assert "--steps is 5: give a whole number of at least 6" in message


@pytest.mark.parametrize("steps", ["1e3", "2.5", "many"])
def test_steps_are_counts(steps, tmp_path, capsys):
    """What is no whole number ends with the option's name and exit code 2."""
    with pytest.raises(SystemExit) as caught:
        collect.main(["checkpoint.pt", str(tmp_path / "x.hdf5"), "--steps", steps])
    assert caught.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_help(capsys):
    """--help names all arguments and shows both commands, which themselves are understood."""
    with pytest.raises(SystemExit) as caught:
        collect.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("CHECKPOINT", "OUTPUT", "--env ID", "--steps INT", "--seed INT"):
        assert word in text
    commands = [line.split() for line in text.splitlines() if line.startswith("python ")]
    parsed = [collect.tyro.cli(collect.Args, args=command[2:]) for command in commands]
    assert [args.steps for args in parsed] == [1_000_000, 50_000]
    assert [args.env for args in parsed] == [None, UMAZE]


# ------------------------------ policies in D4RL's files
def write_policy(path, distribution, nonlinearity=b"relu"):
    """A policy of two states and one action: mean 2 relu(s_0 + s_1), tiny noise."""
    with h5py.File(path, "w") as file:
        policy = file.create_group("metadata/policy")
        layers = {
            "fc0": ([[1.0, 1.0]], [0.0]),
            "fc1": ([[1.0]], [0.0]),
            "last_fc": ([[2.0]], [0.0]),
            "last_fc_log_std": ([[0.0]], [-18.0]),
        }
        for name, (weight, bias) in layers.items():
            policy[f"{name}/weight"] = np.array(weight)
            policy[f"{name}/bias"] = np.array(bias)
        policy["nonlinearity"] = nonlinearity
        policy["output_distribution"] = distribution
    return str(path)


@pytest.mark.parametrize(
    ("distribution", "nonlinearity", "expected"),
    [
        (b"tanh_gaussian", b"relu", np.tanh(0.6)),
        (b"gaussian", b"relu", 0.6),
        (b"gaussian", b"tanh", 2 * np.tanh(np.tanh(0.3))),
    ],
)
def test_policy_in_a_file(distribution, nonlinearity, expected, tmp_path):
    """By hand: two hidden units of one each, squashed or not, cut to [-1, 1]."""
    policy = collect.PolicyInFile(write_policy(tmp_path / "p.hdf5", distribution, nonlinearity))
    assert policy(np.array([0.1, 0.2])) == pytest.approx([expected], abs=1e-6)
    assert policy(np.array([9.0, 9.0]))[0] == 1


def test_noise_of_a_policy_in_a_file(tmp_path):
    """Its deviation is that of the file."""
    path = write_policy(tmp_path / "p.hdf5", b"gaussian")
    with h5py.File(path, "r+") as file:
        file["metadata/policy/last_fc_log_std/bias"][:] = np.log(0.1)
    policy = collect.PolicyInFile(path)
    torch.manual_seed(0)
    actions = np.array([policy(np.array([0.1, 0.1]))[0] for _ in range(2000)])
    assert actions.mean() == pytest.approx(0.4, abs=0.01)
    assert actions.std() == pytest.approx(0.1, rel=0.05)


def test_no_policy_in_a_file(refuse, tmp_path):
    """A file without one, and a file without its environment, are named."""
    with h5py.File(tmp_path / "empty.hdf5", "w"):
        pass
    message = refuse(tmp_path / "empty.hdf5", tmp_path / "x.hdf5", "--env", "hopper-medium-v2")
    assert "empty.hdf5 holds no policy" in message
    path = write_policy(tmp_path / "p.hdf5", b"gaussian")
    assert "name it with --env" in refuse(path, tmp_path / "x.hdf5")
    message = refuse(path, tmp_path / "x.hdf5", "--env", "hopper-medium-v2")
    assert f"{path} holds a policy for 2 numbers, but hopper-medium-v2 has 11" in message


def test_log_densities_of_a_genuine_policy(real_data):
    """D4RL's own actions have the log-densities that its file of hopper-medium notes."""
    path = real_data / "real-samples" / "hopper_medium-v2.hdf5"
    policy = collect.PolicyInFile(str(path))
    with h5py.File(path) as file:
        states = torch.from_numpy(file["observations"][:200])
        actions = torch.from_numpy(file["actions"][:200]).double()
        noted = file["infos/action_log_probs"][:200]
    x = states
    for layer in policy.hidden_layers:
        x = torch.relu(torch.nn.functional.linear(x, *layer))
    mean = torch.nn.functional.linear(x, *policy.mean_layer).double()
    log_std = torch.nn.functional.linear(x, *policy.log_std_layer).clamp(-20, 2).double()
    u = torch.atanh(actions.clamp(-1 + 1e-7, 1 - 1e-7))
    normal = torch.distributions.Normal(mean, log_std.exp())
    densities = (normal.log_prob(u) - torch.log(1 - actions**2 + 1e-6)).sum(1)
    assert np.corrcoef(densities, noted)[0, 1] > 0.999
