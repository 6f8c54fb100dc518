"""speed/: small runs of each program, and that what they measure is what they say."""

import functools
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "benchmark" / "speed"))
import bonus
import bonuses
import checkpoint
import count
import denormals
import parts
import peak
import speed
import subjects
import turns
import worker
from operations import HostSync, HostSyncError, count_operations

BEFORE = "07bf3d9"  # the last commit with the interfaces of subjects.Before
SMALL = " --batch-size 32 --hidden-dim 16 --sera-k 5"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Cases may give hopper other dimensions and environments, and set threads: put all back."""
    threads = torch.get_num_threads()
    for name in SCRIPTS:
        script = importlib.import_module(name)
        monkeypatch.setitem(script.TASKS, "hopper", script.TASKS["hopper"])
        monkeypatch.setattr(script, "make_env", script.make_env)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture
def subject(script, tmp_path, monkeypatch):
    """A script's cases, with small networks, few rows and an environment that does nothing."""
    monkeypatch.setattr(subjects, "OPTIONS", subjects.OPTIONS + SMALL)
    monkeypatch.setattr(subjects, "WARM_UP", 4)
    shape = (5, 2)
    subjects.write_data(tmp_path / "data.hdf5", shape, rows=600)
    return subjects.cases_of(subjects.load_script(script.__name__, shape), tmp_path, "cpu")


def record_calls(monkeypatch, module, name):
    """The inputs of each call of a function from here on, in a list."""
    function = getattr(module, name)
    calls = []

    @functools.wraps(function)
    def recording(*inputs, **options):
        calls.append(inputs)
        return function(*inputs, **options)

    monkeypatch.setattr(module, name, recording)
    return calls


# ------------------------------ cases
@pytest.mark.parametrize("kind", subjects.KINDS)
def test_case(subject, kind, monkeypatch):
    """A case does what its name says: its own rows, the bonus if lambda is 1, TD3+BC's delay."""
    script = subject.script
    case = subject.case(kind, "eager")
    bonuses = record_calls(monkeypatch, script, "intrinsic_reward")
    updates = record_calls(monkeypatch, script, "update")
    monkeypatch.delattr(script, "run_evaluation")
    monkeypatch.delattr(script, "save_checkpoint")
    assert case.mode == "eager"
    assert case.turn(0.02) > 0
    if case.call:
        case.call()
    online = kind != "offline"
    kinds = [inputs[-1] for inputs in updates]
    online_rows = (0, 0, 32) if script.Args().online_sampling == "append" else (16, 16, 0)
    for step in kinds:
        assert step.online == online
        assert step.rows == (online_rows if online else (32, 0, 0))
        assert not step.log
    assert len(updates) >= 2
    assert len(bonuses) == (len(updates) if kind.endswith("1") else 0)
    assert {step.policy_due for step in kinds[:2]} == {True, script.policy_is_due(1, script.Args())}


@pytest.mark.parametrize("coefficient", [0, 1])
def test_steps_are_the_scripts_own(subject, coefficient, monkeypatch):
    """A turn of steps is the online phase: act, update, environment; then all is as before."""
    script = subject.script
    end_of_step = script.end_of_step
    case = subject.case(f"step-{coefficient}", "eager")
    actions = record_calls(monkeypatch, script, "act")
    steps = record_calls(monkeypatch, subjects.NullEnv, "step")
    updates = record_calls(monkeypatch, script, "update")
    assert case.turn(0.02) > 0
    assert len(actions) == len(steps) == len(updates) >= 2
    assert script.end_of_step is end_of_step


def test_compiling_falls_back(tmp_path, monkeypatch):
    """Where torch.compile fails, a case says in which mode it really runs."""

    def no_compiler(function, **options):
        def compiled(*inputs):
            raise RuntimeError("no compiler")

        return compiled

    monkeypatch.setattr(subjects, "WARM_UP", 2)
    monkeypatch.setattr(torch, "compile", no_compiler)
    subjects.write_data(tmp_path / "data.hdf5", (11, 3), rows=600)
    script = subjects.load_script("td3bc_sera")
    case = subjects.cases_of(script, tmp_path, "cpu").case("offline", "compiled")
    assert case.mode == "eager"


def test_unknown_interface(tmp_path):
    """Scripts of neither interface are refused."""
    with pytest.raises(ValueError, match="neither train_step nor make_networks"):
        subjects.cases_of(importlib.import_module("json"), tmp_path, "cpu")


# ------------------------------ turns
def test_rate(monkeypatch):
    """Calls per second: whole calls, until the turn is over, waited for as often as is asked."""
    now = [0.0]
    waited = []
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 0.25

    assert turns.rate(call, 1.1, lambda: None) == 4
    assert now[0] == 1.25
    assert turns.rate(call, 1.1, lambda: waited.append(now[0]), calls=4) == 4
    assert waited == [1.25, 2.25, 3.25]


def test_stopwatch(monkeypatch):
    """Steps per second: the first end of a step starts the watch, and the turn ends in time."""
    now = [0.0]
    monkeypatch.setattr(subjects.time, "perf_counter", lambda: now[0])
    watch = subjects.Stopwatch(1.0)
    with pytest.raises(subjects.TurnIsOver):
        for _ in range(100):
            watch.step_ends()
            now[0] += 0.5
    assert watch.times == [0, 0.5, 1.0]
    assert watch.rate() == 2


def test_in_turns(monkeypatch):
    """Everything gets a turn a round, every second round backwards, quiet and with a neighbour."""
    order = []
    neighbours = []

    def fake_neighbour():
        neighbours.append(len(order))
        return turns.contextlib.nullcontext()

    def turn(name):
        return lambda seconds: order.append(name) or seconds * len(order)

    monkeypatch.setattr(turns, "busy_neighbour", fake_neighbour)
    both = {"a": turn("a"), "b": turn("b")}
    rates = turns.in_turns(both, 2, 0.5, (False, True))
    assert "".join(order) == "ababbaba"
    assert neighbours == [2, 6]
    assert rates["a", False] == [0.5, 3.0]
    assert rates["b", True] == [2.0, 3.5]


def test_busy_neighbour():
    """It lives as long as it is wanted."""
    with turns.busy_neighbour() as process:
        assert process.poll() is None
    assert process.returncode is not None


def test_worker_protocol(tmp_path, capfd):
    """Requests are answered in order; other lines are shown; an end is an error, with its name."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmark' / 'speed')!r})\n"
        "from turns import serve\n"
        "print('hello')\n"
        "serve(lambda number: {'half': number / 2, 'threads': os.environ['OMP_NUM_THREADS']})\n"
    )
    process = turns.Worker([sys.executable, str(program)], threads=3)
    assert process.ask(number=4) == {"half": 2.0, "threads": "3"}
    assert process.ask(number=5)["half"] == 2.5
    with pytest.raises(RuntimeError, match=r"without an answer.*program\.py"):
        process.ask(wrong=5)
    process.close()
    assert "hello" in capfd.readouterr().err


# ------------------------------ speed.py
def test_speed(tmp_path, capsys):
    """Each kind gets a row for both versions, in the table and in the file; so does the peak.

    Two kinds stand for all: each row is a process of its own, and test_case has all kinds. Where
    the history does not reach back, today's code is compared with itself.
    """
    kinds = ("offline", "step-1")
    command = ["git", "-C", str(ROOT), "cat-file", "-e", f"{BEFORE}^{{commit}}"]
    is_known = subprocess.run(command, capture_output=True, check=False).returncode == 0
    against = BEFORE if is_known else str(ROOT)
    args = speed.Args(("td3bc_sera",), kinds, against, threads=(1,), seconds=0.01, rounds=1)
    args.output = tmp_path / "speed.jsonl"
    assert speed.main(args) == 0
    lines = [json.loads(line) for line in args.output.read_text().splitlines()]
    rows = {(line["what"], line["code"]) for line in lines}
    versions = {(kind, code) for kind in kinds for code in (speed.TODAY, against)}
    assert rows == versions | {(speed.PEAK, "torch")}
    for line in lines:
        assert line["script"] == "td3bc_sera"
        assert line["per_second"] > 0 or line["mode"] == "oneDNN"  # not every CPU has it
        is_update = line["what"] == "offline"
        assert (line["share_of_peak"] is not None) == is_update
        if is_update:
            assert line["flop"] > 1e6
            assert line["share_of_peak"] == line["per_second"] * line["flop"] / line["peak"]
    assert capsys.readouterr().out.count("| td3bc_sera |") == len(lines)


def test_environment_of_a_worker(monkeypatch):
    """As a run would have it, whose script sets it before it imports torch; the user's own wins."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    expected = {"OMP_WAIT_POLICY": "PASSIVE", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    assert speed.environment_of(ROOT) == expected
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert speed.environment_of(ROOT) == expected | {"OMP_WAIT_POLICY": "ACTIVE"}


def test_scripts_to_compare_with(tmp_path):
    """--against may be a folder."""
    assert speed.scripts_of(str(ROOT), tmp_path) == ROOT
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scripts": ("dqn_sera",)}, "there is no script dqn_sera.py"),
        ({"kinds": ("later",)}, "--kinds later"),
        ({"modes": ("recorded",)}, "--modes recorded: needs --device cuda"),
        ({"against": "no_such_commit"}, "--against no_such_commit"),
        ({"jax_corl": ROOT}, "there is no folder algos in it"),
    ],
)
def test_speed_refuses(change, message, capsys):
    """What cannot be measured is said in a sentence, before anything is started."""
    assert speed.main(speed.Args(**change)) == 2
    assert message in capsys.readouterr().err


def test_today_over_it():
    """Ratios pair the turns of a round, with today's default mode, threads and neighbour alike."""
    today = speed.Row("offline", speed.TODAY, "eager", 1)
    compiled = today._replace(mode="compiled")
    other = today._replace(code="d3rlpy", mode="-")
    rates = {
        (today, False): [10.0, 20.0, 40.0],
        (compiled, False): [30.0, 60.0, 120.0],
        (other, False): [5.0, 5.0, 5.0],
        (today, True): [1.0, 1.0, 1.0],
        (other, True): [2.0, 2.0, 2.0],
        (today._replace(threads=2), False): [7.0, 7.0, 7.0],
    }
    args = speed.Args(device="cpu", modes=("eager", "compiled"))
    assert speed.today_over(other, False, rates, args) == 4.0
    assert speed.today_over(other, True, rates, args) == 0.5
    assert speed.today_over(compiled, False, rates, args) == pytest.approx(1 / 3)
    args.device = "cuda"
    assert speed.today_over(other, False, rates, args) == 12.0
    assert speed.today_over(today, False, rates, args) == 3.0


def test_peak_of():
    """The peak is the better library's median, by the number of threads, in quiet."""
    slow = speed.Row(speed.PEAK, "torch", "MKL", 1)
    fast = slow._replace(mode="oneDNN")
    rates = {
        (slow, False): [1.0, 2.0, 9.0],
        (fast, False): [3.0, 3.0, 3.0],
        (fast, True): [5.0, 5.0, 5.0],
        (fast._replace(threads=2), False): [6.0, 6.0, 6.0],
    }
    assert speed.peak_of(rates, 1) == 3.0


def test_only_float32_counts_as_peak():
    """A product in bfloat16 is told from one in float32."""
    product, exact = peak.matrix_product("cpu", 64)
    assert peak.is_float32(product(), exact)
    left, right = torch.randn(2, 64, 64)
    rounded = (left.bfloat16() @ right.bfloat16()).float()
    assert not peak.is_float32(rounded, left.double() @ right.double())


def test_flops():
    """Matrix products are counted, two operations for each pair of numbers, on average of calls."""
    left, right = torch.randn(2, 8, 8)
    turn = iter(range(4))
    assert worker.flops_of(lambda: left @ right if next(turn) % 2 else left) == 8**3


# ------------------------------ the other programs
def test_plain_bonus(script):
    """What the bonus is compared with computes the same thing, but for how it treats equal rows."""
    ours = bonus.entropy(script, "script", 64, 3, "cpu")()
    torch.testing.assert_close(bonus.entropy(script, "plain", 64, 3, "cpu")(), ours)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the peak of memory is read from /proc, on Linux",
)
def test_bonus_alone(tmp_path, capsys):
    """Time and memory are measured: by broadcasting 300 rows in 40 dimensions need 14 MiB a go."""
    args = bonus.Args(rows=(300,), dimensions=(40, 1000), seconds=0.01, rounds=1)
    args.most_mebibytes = 100
    args.output = tmp_path / "bonus.jsonl"
    bonus.main(args)
    lines = [json.loads(line) for line in args.output.read_text().splitlines()]
    memory = {(line["bonus"], line["dimension"]): line["mebibytes"] for line in lines}
    assert memory.keys() == {("script", 40), ("plain", 40), ("script", 1000)}
    assert memory["script", 40] < 10
    assert memory["script", 1000] < 10
    assert 13 < memory["plain", 40] < 2 * bonus.plain_mebibytes(300, 40)
    assert all(line["milliseconds"] > 0 for line in lines)
    assert capsys.readouterr().out.splitlines()[-1].endswith("| - | about 1,030 |")


def test_cost_of_each_bonus(capsys, monkeypatch):
    """A row for each, in the order of the table; and no script there is is an error."""
    monkeypatch.setattr(subjects, "OPTIONS", subjects.OPTIONS + SMALL)
    monkeypatch.setattr(subjects, "WARM_UP", 2)
    write_data = functools.partial(subjects.write_data, rows=600)
    monkeypatch.setattr(bonuses, "write_data", write_data)
    assert bonuses.main(bonuses.Args(seconds=0, rounds=1)) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert names == [bonuses.PLAIN, *bonuses.OPTIONS, *bonuses.OTHERS]
    assert rows[0].endswith("| - |") and all(row.endswith(" ms |") for row in rows[1:])
    assert bonuses.main(bonuses.Args(script="none")) == 2
    assert capsys.readouterr().err == "error: there is no script none.py\n"


def test_parts_of_an_update():
    """Time in matrix products is told from other time."""
    left, right = torch.randn(2, 256, 256)
    in_products, kernels = parts.profile(lambda: torch.relu(left @ right), 3, "cpu")
    assert in_products > 0
    assert kernels == 0
    assert parts.profile(lambda: torch.relu(left), 3, "cpu") == (0, 0)


def test_parts_of_a_script(tmp_path, monkeypatch):
    """A row has ms per update, those of its products, and what these come to at their best."""
    monkeypatch.setitem(parts.SIZES, "cpu", 64)
    subjects.write_data(tmp_path / "data.hdf5", subjects.HOPPER, rows=600)
    args = parts.Args(seconds=0.01, rounds=1, updates=2)
    name, total, in_products, at_best, rest, kernels = parts.figures("td3bc_sera", tmp_path, args)
    assert (name, kernels) == ("td3bc_sera", "")
    assert float(total) > 0 and float(in_products) > 0 and float(at_best) > 0
    assert float(rest) == pytest.approx(float(total) - float(in_products), abs=0.011)


def test_checkpoint(script, tmp_path):
    """A run with its online rows is made, and the checkpoint that it writes is the script's own."""
    args = checkpoint.Args(env="hopper-medium-v2", rows=1000, updates=2, repeats=1)
    figures = checkpoint.measure(script.__name__, args, tmp_path)
    assert all(number > 0 for number in figures.values())
    written = script.read_checkpoint(tmp_path / "checkpoint.pt")
    assert len(written["online_rows"]) == 1000
    assert figures["MB"] == (tmp_path / "checkpoint.pt").stat().st_size / 1e6


def test_cost_of_denormal_numbers(tmp_path, capsys, monkeypatch):
    """Each turn starts from the checkpoint, with denormal numbers kept or flushed; files stay."""
    script = importlib.import_module("td3bc_sera")
    subjects.write_data(tmp_path / "data.hdf5", subjects.HOPPER, rows=600)
    run_dir = tmp_path / "run"
    options = f"--env hopper-medium-v2 --dataset-path {tmp_path}/data.hdf5 --run-dir {run_dir} "
    options += "--device cpu --threads 1 --offline-steps 3 --online-steps 0 --eval-episodes 1"
    script.main((options + SMALL).split())
    files = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    trained = script.read_checkpoint(run_dir / "checkpoint.pt")
    starts = []

    def train_step(run, args, kind):
        flushed = not bool((torch.tensor([2e-38]) * 0.1).view(torch.int32).any())
        weights = run.agent.state_dict()
        equal = all(torch.equal(weights[name], x) for name, x in trained["agent"].items())
        moments = run.optimizer.state_dict()["state"][0]
        equal &= torch.equal(moments["exp_avg"], trained["optimizer"]["state"][0]["exp_avg"])
        starts.append((flushed, equal, kind))
        with torch.no_grad():
            for x in (*run.agent.parameters(), moments["exp_avg"]):
                x += 1

    monkeypatch.setattr(script, "train_step", train_step)
    capsys.readouterr()
    assert denormals.main(denormals.Args(runs=(run_dir,), seconds=0, rounds=2)) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| td3bc_sera, hopper-medium-v2, offline 3 | 0 | 0 |")
    assert [start[:2] for start in starts] == [
        (False, True),
        (True, True),
        (True, True),
        (False, True),
    ]
    assert {(kind.online, tuple(kind.rows)) for *_, kind in starts} == {(False, (32, 0, 0))}
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == files
    assert denormals.main(denormals.Args(runs=(tmp_path / "none",))) == 2
    assert "checkpoint.pt" in capsys.readouterr().err


def test_denormal_numbers_are_counted():
    """Not zeros, not the smallest normal number, and whether or not they are flushed just now."""
    torch.set_flush_denormal(True)
    agent = {"weight": torch.tensor([0, 2**23, 1, 5], dtype=torch.int32).view(torch.float32)}
    moments = {"exp_avg": torch.tensor([7, 8], dtype=torch.int32).view(torch.float32)}
    moments["step"] = torch.tensor(3.0)
    checkpoint = {"agent": agent, "optimizer": {"state": {0: moments}}}
    assert float(agent["weight"][1]) == 2**-126
    assert denormals.count_denormals(checkpoint) == (2, 2)


def test_counts(script):
    """The parts of a step have operations; the bonus is as long in all; TD3+BC's delay saves some.

    Stored q save the pass of the critics, and numbers to log cost a few operations.
    """
    found = {name: operations.total() for name, operations in count.counts(script).items()}
    assert 0 < found["sampling"] < 10
    assert found["bonus"] < found["bonus, learning critics"]
    assert found["bonus"] < found["bonus, numbers to log"] < found["update"]
    assert found["update"] < found["update, numbers to log"] < found["update"] + 20
    delay = "update without the policy"
    assert (delay in found) == (script.__name__ == "td3bc_sera")
    assert found.get(delay, 0) < found["update"]


def test_count_operations():
    """What computes is counted, backwards too; views, allocations and hooks are not."""
    x = torch.randn(4, 6, requires_grad=True)

    def function():
        with torch.profiler.record_function("hook"):
            y = x.view(6, 4)[1:].mT.detach()
            torch.empty_like(y)
            return (y + 1).relu()

    assert count_operations(function) == {"add": 1, "relu": 1}
    counts = count_operations(lambda: (x * 3).sum().backward())
    assert counts["mul"] == 2  # forward and backward
    assert counts["sum"] == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: x.clone().index_put_((x > 0,), torch.tensor(1.0)),
        lambda x: torch.where(x > 0),
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: torch.distributions.Normal(x, x.exp(), validate_args=True),
        lambda x: torch.distributions.Normal(x, x.exp(), validate_args=False).sample(),
    ],
)
def test_host_sync_is_found(function):
    """Whatever makes Python wait for a number or a shape is an error."""
    with pytest.raises(HostSyncError), HostSync():
        function(torch.randn(5))


def test_no_host_sync():
    """What can be recorded passes: indices, masks that keep the shape, noise."""
    x = torch.randn(5)
    with HostSync():
        y = x[torch.tensor([0, 2])] + x[1:3]
        y = torch.where(y > 0, y, 0.0).masked_fill(y < -1, 1.0)
        torch.distributions.Normal(y, y.exp(), validate_args=False).rsample()
