"""against_authors.py: the noise, the weights and the imports it needs, on peers made up here."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import against_authors
from authors import cal_ql_loader, importing, noise, sides

VARIANTS = [
    ("td3bc_sera", {}),
    ("iql_sera", {"offline_steps": 10}),
    ("awac_sera", {}),
    ("sac_sera", {}),
    ("cql_sera", {"cql_actions": 2}),
    ("calql_sera", {"cql_actions": 2, "cql_lagrange": True, "cql_max_target_backup": True}),
]
EACH_VARIANT = pytest.mark.parametrize(
    "script, options", VARIANTS, ids=[name for name, _ in VARIANTS]
)
SMALL = against_authors.Args(updates=10, batch_size=8)
CLONES = {  # as git clone names them
    "td3_bc": "TD3_BC",
    "corl": "CORL",
    "cql": "CQL",
    "cal_ql": "Cal-QL",
    "iql": "implicit_q_learning",
    "rlkit": "rlkit",
}


@pytest.fixture(autouse=True)
def float64():
    """As the program has it, for one test."""
    with against_authors.float64_by_default():
        yield


def case_of(script, options, **changes):
    """A case whose peer is another copy of our own side, with some of its arguments changed."""

    class Twin(sides.TorchPeer):
        def __init__(self, folder, args):
            self.side = sides.Ours(script, asdict(args) | changes, seed=99)

        def draws(self):
            return self.side.draws()

        def views(self):
            return self.side.weights()

        def update(self, batch):
            return self.side.update(batch)

    return against_authors.Case("twin", script, "none", Twin, {"hidden_dim": 32} | options)


# ------------------------------ noise
def queue_of(*order):
    """A queue of some noise: two normal ones (2, 3), a uniform one (4,)."""
    prepared = {
        "a": noise.Noise("normal", np.arange(6.0).reshape(2, 3)),
        "b": noise.Noise("normal", -np.arange(6.0).reshape(2, 3)),
        "u": noise.Noise("uniform", np.array([0.0, 0.25, 0.5, 0.75])),
    }
    return noise.NoiseQueue(prepared, list(order))


def test_queue():
    """Noise comes in the order that was asked for, several at once stacked."""
    queue = queue_of("b", "u", ("a", "b"))
    assert queue.draw("normal", (2, 3))[1, 2] == -5
    assert queue.draw("uniform", (4,))[1] == 0.25
    assert queue.draw("normal", (2, 2, 3))[:, 0, 1].tolist() == [1, -1]
    queue.check_used_up()


@pytest.mark.parametrize(
    "kind, shape, message",
    [
        ("normal", (3, 2), r"asks for normal noise of shape \(3, 2\) where 'a' is normal"),
        ("uniform", (2, 3), r"asks for uniform noise .* where 'a' is normal"),
    ],
)
def test_queue_refuses(kind, shape, message):
    """Another shape or kind is an error, and so is one draw more, or one less."""
    with pytest.raises(noise.NoiseError, match=message):
        queue_of("a").draw(kind, shape)
    with pytest.raises(noise.NoiseError, match="when all was drawn"):
        queue_of().draw(kind, shape)
    with pytest.raises(noise.NoiseError, match="never asks for a, u"):
        queue_of("a", "u").check_used_up()


def test_torch_samplers():
    """Each of torch's samplers that peers or we use draws from the queue, and only for a while."""
    like = torch.zeros(2, 3)
    normal = torch.distributions.Normal(torch.ones(2, 3), torch.full((2, 3), 2.0))
    with noise.torch_samplers(queue_of("a", ("a", "b"), "a", "u", "u")):
        assert torch.equal(torch.randn_like(like), torch.arange(6.0).reshape(2, 3))
        assert torch.randn(2, 2, 3, device="cpu")[1, 1, 2] == -5
        assert torch.equal(normal.rsample(), 1 + 2 * torch.arange(6.0).reshape(2, 3))
        assert torch.rand_like(torch.zeros(4)).tolist() == [0, 0.25, 0.5, 0.75]
        assert torch.empty(4).uniform_(-1, 1).tolist() == [-1, -0.5, 0, 0.5]
    assert not torch.equal(torch.randn_like(like), torch.randn_like(like))
    assert "uniform_" not in vars(torch.Tensor)


# ------------------------------ weights
@EACH_VARIANT
def test_weights_round_trip(script, options):
    """All of ours go into a peer, and come back as they were; no parameter is missed."""
    ours = sides.Ours(script, {"hidden_dim": 8} | options, seed=1)
    peer = case_of(script, options).peer(None, ours.args)
    weights = ours.weights()
    count = sum(weight.numel() for weight in weights.values())
    assert count == sum(parameter.numel() for parameter in ours.agent.parameters())
    assert against_authors.weight_difference(ours, peer) > 0.01
    peer.put(weights)
    assert against_authors.weight_difference(ours, peer) == 0


def test_weights_are_in_out():
    """The layout that peers rely on, with our own two: of nn.Linear and of twin critics."""
    ours = sides.Ours("sac_sera", {"hidden_dim": 8}, seed=1)
    weights, agent = ours.weights(), ours.agent
    assert weights["actor.0.weight"].shape == (11, 8)
    assert torch.equal(weights["actor.0.weight"], agent.actor.layers[0].weight.T)
    assert weights["critics_2.0.weight"].shape == (14, 8)
    assert torch.equal(weights["critics_2.2.weight"], agent.critics.layers[4].weight[1])
    assert torch.equal(
        weights["target_critics_1.1.bias"], agent.target_critics.layers[2].bias[0, 0]
    )


@EACH_VARIANT
def test_first_weights_are_telling(script, options):
    """Either critic is the lower one in many rows, and so is its target; advantages vary."""
    agent = sides.Ours(script, options, seed=1).agent
    batch = against_authors.made_up_batch(np.random.default_rng(0), 500)
    values = []
    for critics in (agent.critics, agent.target_critics):
        first, second = critics(batch["observations"], batch["actions"])
        assert 0.2 < (first < second).float().mean() < 0.8
        values.append(torch.minimum(first, second))
    advantages = values[1] - agent.value(batch["observations"])
    assert 0.1 < (advantages < 0).float().mean() < 0.9
    assert advantages.std() > 0.5
    assert script != "iql_sera" or (3 * advantages > np.log(100)).any()  # weights are clipped
    if script == "awac_sera":
        sampled = agent.actor(batch["observations"]).rsample()
        assert 0.05 < (sampled.abs() > 1).float().mean() < 0.5


def test_put_refuses():
    """Names that only one side has, and shapes that would be broadcast."""
    ours = sides.Ours("sac_sera", {"hidden_dim": 8}, seed=1)
    peer = case_of("sac_sera", {}).peer(None, ours.args)
    weights = ours.weights()
    with pytest.raises(ValueError, match=r"log_alpha is \(1,\) here and \(\) there"):
        peer.put(weights | {"log_alpha": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"only here: \['beta'\]; only there: \[\]"):
        peer.put(weights | {"beta": torch.zeros(1)})
    ours.agent.float()
    with pytest.raises(ValueError, match=r"is torch\.float32 here and torch\.float64 there"):
        against_authors.weight_difference(ours, peer)


# ------------------------------ comparing
@EACH_VARIANT
def test_equal_code_agrees(script, options):
    """A peer that equals ours agrees to the last bit, and the control differs."""
    found = against_authors.compare(case_of(script, options), None, SMALL)
    assert found[:2] == (0, 0)
    assert found.control > against_authors.CONTROL_LIMIT
    assert against_authors.is_as_it_should_be(found)


@pytest.mark.parametrize(
    "script, change",
    [
        ("td3bc_sera", {"bc_alpha": 2.4}),
        ("iql_sera", {"expectile": 0.71}),
        ("awac_sera", {"weight_decay": 0.0}),
        ("sac_sera", {"tau": 0.006}),
        ("calql_sera", {"cql_weight": 5.1}),
    ],
)
def test_other_code_does_not(script, change):
    """A peer with one number changed is told from ours."""
    found = against_authors.compare(case_of(script, {}, **change), None, SMALL)
    assert not against_authors.is_as_it_should_be(found)


def test_verdict():
    """Small differences and a large control; a NaN never passes."""
    good = against_authors.Found(1e-15, 1e-13, 1e-3)
    assert against_authors.is_as_it_should_be(good)
    assert against_authors.is_as_it_should_be(good._replace(losses=None))
    for wrong in ({"weights": 1e-8}, {"losses": 1e-8}, {"control": 1e-7}):
        assert not against_authors.is_as_it_should_be(good._replace(**wrong))
    for name in good._fields:
        assert not against_authors.is_as_it_should_be(good._replace(**{name: np.nan}))


def test_other_noise_is_refused():
    """A peer that uses other noise than ours is an error, be its draws answered or not."""
    case = case_of("sac_sera", {})
    case.peer.draws = lambda self: ["policy"]
    with pytest.raises(noise.NoiseError, match=r"\['next', 'policy'\] here, \['policy'\] there"):
        against_authors.compare(case, None, SMALL)


# ------------------------------ importing
def test_import_from(tmp_path, monkeypatch):
    """A checkout's modules come with stand-ins for what is left out; no trace of them stays."""
    (tmp_path / "utils.py").write_text("import gym.spaces\nfrom wandb import init\nsize = 3\n")
    (tmp_path / "learner.py").write_text(
        "import pyrallis\nimport utils\nfrom d4rl.a.b import Env\n"
        "class Wrapper(Env):\n    pass\n"
        "@pyrallis.wrap()\ndef train(env: utils.gym.Env):\n    return utils.size\n"
    )
    mine = type(sys)("utils")
    monkeypatch.setitem(sys.modules, "utils", mine)
    path = list(sys.path)
    learner, utils = importing.import_from(tmp_path, "learner", "utils")
    assert learner.train(None) == 3
    assert learner.utils is utils
    assert sys.modules["utils"] is mine
    assert sys.path == path
    assert "learner" not in sys.modules
    assert not any(isinstance(each, importing.LeftOut) for each in sys.modules.values())


def test_import_that_fails(tmp_path):
    """It leaves nothing behind either."""
    (tmp_path / "learner.py").write_text("import gym\nimport no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        importing.import_from(tmp_path, "learner")
    assert "learner" not in sys.modules
    assert importing.LeftOutFinder not in sys.meta_path


# ------------------------------ the program
def run(capsys, **folders):
    """Its exit code, and what it says on stderr."""
    code = against_authors.main(against_authors.Args(**folders))
    return code, capsys.readouterr().err


def test_refuses_other_folders(tmp_path, capsys):
    """What is no checkout, or none at all, ends in one line and exit code 2."""
    for folders in ({"corl": tmp_path}, {"corl": tmp_path / "nothing"}):
        code, error = run(capsys, **folders)
        assert code == 2
        assert error.count("\n") == 1
        assert error.startswith(f"error: --corl {folders['corl']}: there is no algorithms/")
        assert error.endswith("give a checkout of github.com/tinkoff-ai/CORL\n")
    assert run(capsys) == (
        2,
        "error: nothing to compare with: name a checkout, such as --td3-bc TD3_BC\n",
    )


def test_refuses_without_packages(tmp_path, capsys, monkeypatch):
    """A package that is not there is said, with what installs it."""
    (tmp_path / "learner.py").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, error = run(capsys, iql=tmp_path)
    assert code == 2
    assert "needs the package flax: pip install -r benchmark/requirements-authors.txt" in error
    assert error.count("\n") == 1


def test_command_line(tmp_path):
    """The same from a shell, in any folder."""
    program = str(ROOT / "benchmark" / "against_authors.py")
    command = [sys.executable, program, "--td3-bc", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --td3-bc nothing: there is no TD3_BC.py in it: give a")


def test_commit_of(tmp_path):
    """A checkout's commit and whether it was changed; a folder that is none has none."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").touch()
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "a"], check=True)
    commit = against_authors.commit_of(tmp_path)
    assert len(commit) == 7
    (tmp_path / "a" / "b.py").write_text("1")
    assert against_authors.commit_of(tmp_path) == f"{commit}-dirty"
    assert against_authors.commit_of(tmp_path / "a") == "unknown"


def test_table(tmp_path, capsys, monkeypatch):
    """Good rows end in 0, a bad one in 1; a peer without losses has none in the table."""
    case = case_of("iql_sera", {"offline_steps": 10})._replace(option="td3_bc", given="a change")
    other = case_of("iql_sera", {}, expectile=0.9)._replace(option="td3_bc")
    (tmp_path / "TD3_BC.py").touch()
    args = against_authors.Args(td3_bc=tmp_path, updates=2, batch_size=8)
    monkeypatch.setattr(against_authors, "CASES", [case])
    assert against_authors.main(args) == 0
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == len(against_authors.HEADS) + 1
    assert row.startswith("| twin | sfujim/TD3_BC | unknown | a change | 2 | 0e+00 | 0e+00 | ")
    monkeypatch.setattr(against_authors, "CASES", [case, other])
    assert against_authors.main(args) == 1
    assert "or a control below 1e-06: 1" in capsys.readouterr().err


def test_made_up_files(tmp_path):
    """They have what the loader is to tell apart: success, failure, terminals, timeouts, a 1."""
    rewards, terminals, returns, actions = [], [], [], []
    for seed in range(cal_ql_loader.FILES):
        cal_ql_loader.write_made_up_file(tmp_path / f"{seed}.hdf5", seed)
        columns = cal_ql_loader.our_columns(tmp_path / f"{seed}.hdf5", 0.99)
        rewards += columns["rewards"].tolist()
        terminals += columns["terminals"].tolist()
        returns += columns["mc_returns"].tolist()
        actions += columns["actions"].ravel().tolist()
    assert set(rewards) == {-5, 5}
    assert 0 < sum(terminals) < rewards.count(5)
    assert 0 < returns.count(-500) < len(returns)
    assert max(actions) == np.float32(1 - 1e-5)


def test_page_has_every_row():
    """docs/faithfulness.md has a row for each case, and nothing is switched in silence."""
    lines = (ROOT / "docs" / "faithfulness.md").read_text().splitlines()
    for case in [*against_authors.CASES, against_authors.LOADER_CASE]:
        repository = against_authors.CHECKOUTS[case.option].repository
        rows = [line for line in lines if line.startswith(f"| {case.algorithm} | {repository} | ")]
        assert [f" | {case.given or '-'} | " in row for row in rows] == [True], case


def test_against_checkouts(capsys):
    """Every peer that is at hand agrees with ours, and the controls differ."""
    folder = os.environ.get("SERA_PEERS")
    if not folder:
        pytest.skip("SERA_PEERS names no folder of checkouts: TD3_BC, CORL, CQL and so on")
    found = {option: Path(folder, name) for option, name in CLONES.items()}
    found = {option: path for option, path in found.items() if path.is_dir()}
    if importlib.util.find_spec("jax") is None:
        found = {option: path for option, path in found.items() if option not in ("cal_ql", "iql")}
    args = against_authors.Args(**found, updates=4, batch_size=16)
    code = against_authors.main(args)
    output = capsys.readouterr()
    assert code == 0, output.out + output.err
