"""What a recorded training step asks of the code, and the recording itself, without a GPU.

On a GPU every kind of training step is recorded as a CUDA graph and replayed. Then the number of
operations is the time; none may wait for the device; and all Python numbers and addresses are
those of the moment of recording for good. A stand-in for CUDA graphs records and replays on a CPU.
"""

import contextlib
import copy
import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from operations import HostSync, HostSyncError, computes, count_operations, names_of
from recompute import make_agent, make_args, make_kind
from scipy.special import digamma
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import calql_sera
import iql_sera
import sac_sera
import td3bc_sera

CPU = torch.device("cpu")
META = torch.device("meta")  # tensors without numbers: whoever asks for one gets an exception
CUDA = torch.device("cuda")

# Options that lead an update, or the bonus, along other lines, beside the defaults.
VARIANTS = {
    "awac_sera": [{"advantage_weights": "exp"}],
    "calql_sera": [{"cql_max_target_backup": True}, {"cql_lagrange": True}],
    "cql_sera": [{"cql_max_target_backup": True}, {"cql_lagrange": True}],
    "td3bc_sera": [{"bc_online": "anneal", "bc_anneal_steps": 20}, {"bc_online": "drop"}],
}
SERA_VARIANTS = [
    {"sera_bonus": "v", "sera_critic": "current"},
    {"sera_bonus": "constant"},
    {"sera_scale": "dim", "sera_pool": 24},
]


def variants(script):
    return [{}, *VARIANTS.get(script.__name__, []), *SERA_VARIANTS]


def hopper_rows(rows, seed=0):
    """Transitions of noise as load_d4rl names them, in trajectories of ten rows, with terminals."""
    rng = np.random.default_rng(seed)
    index = np.arange(rows)
    return {
        "observations": rng.normal(size=(rows, 11)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(rows, 3)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "next_observations": rng.normal(size=(rows, 11)).astype(np.float32),
        "terminals": index % 20 == 19,
        "episode_ends": index % 10 == 9,
    }


def make_run(script, device=CPU, **changes):
    """A run before its first step, without environment and folder, and its arguments."""
    small = {"batch_size": 16, "sera_k": 3, "offline_steps": 12, "online_steps": 200}
    args = make_args(script, **(small | changes))
    torch.manual_seed(0)
    agent = script.Agent(11, 3, args).to(device)
    optimizer, scheduler = script.make_optimizer(agent, args)
    run = script.Run(
        agent=agent,
        bonus_agent=agent if args.sera_critic == "current" else copy.deepcopy(agent),
        optimizer=optimizer,
        scheduler=scheduler,
        buffer=script.ReplayBuffer(hopper_rows(100), args, device),
        env=None,
        device=device,
        varying_dims=torch.arange(11, device=device),
    )
    return run, args


def add_online_rows(script, run, args, rows):
    """As many transitions more, stored as the online phase does it."""
    run.buffer.append(hopper_rows(rows, seed=run.buffer.size))
    script.store_bonus_q(run, args, run.buffer.size - rows, run.buffer.size)


def go_online(script, run, args):
    """Start the online phase, with some rows in the buffer."""
    script.start_online_phase(run, args)
    add_online_rows(script, run, args, 30)


def offline_kind(script, policy_due=True, log=False):
    return script.StepKind(False, script.BatchRows(16, 0), policy_due, log)


def online_kind(script, policy_due=True, log=False):
    return script.StepKind(True, script.BatchRows(8, 8), policy_due, log)


def append_kind(script, policy_due=True, log=False):
    return script.StepKind(True, script.BatchRows(both=16), policy_due, log)


def all_kinds(script, args):
    """All kinds of steps that a run makes, offline ones first."""
    policy_due = sorted({script.policy_is_due(number, args) for number in range(1, 5)})
    choices = list(itertools.product(policy_due, (False, True)))
    kinds = []
    for kind in (offline_kind, online_kind, append_kind):
        kinds += [kind(script, *choice) for choice in choices]
    return kinds


# ------------------------------ the number of operations
# Operations of an update, by whether the policy learns in it: as many as there are today. What was
# aimed at when recordings came in: TD3+BC 55 and 100, IQL 140, AWAC and SAC 145, CQL and Cal-QL
# 200, a batch 5, the bonus 20.
UPDATE_BUDGETS = {
    "awac_sera": {True: 155},
    "calql_sera": {True: 226},
    "cql_sera": {True: 218},
    "iql_sera": {True: 148},
    "sac_sera": {True: 158},
    "td3bc_sera": {False: 54, True: 102},
}
OFFLINE_BATCH_BUDGET = 4
MIXED_BATCH_BUDGET = 6
BOTH_BATCH_BUDGET = 5
BONUS_BUDGET = 18


@pytest.fixture
def hopper_run(script):
    """A run with the default networks and batches, online, and its arguments."""
    run, args = make_run(script, hidden_dim=256, batch_size=256, sera_k=10)
    go_online(script, run, args)
    return run, args


def test_operations_of_an_update(script, hopper_run):
    """An update dispatches no more operations than it did, the policy's part included or not."""
    run, args = hopper_run
    batch = run.buffer.sample(script.BatchRows(128, 128))
    budgets = UPDATE_BUDGETS[script.__name__]
    assert budgets.keys() == {script.policy_is_due(number, args) for number in range(1, 5)}
    for policy_due, budget in budgets.items():
        kind = script.StepKind(True, script.BatchRows(128, 128), policy_due, False)
        update = functools.partial(script.update, run.agent, run.optimizer, batch, args, kind)
        update()  # the first makes Adam's state
        counted = count_operations(update)
        assert counted["_fused_adam_"] >= 1
        assert counted.total() <= budget


def test_operations_of_a_batch(script, hopper_run):
    """A batch is one gather after a few operations on its row numbers."""
    run, _ = hopper_run
    offline = count_operations(lambda: run.buffer.sample(script.BatchRows(256, 0)))
    mixed = count_operations(lambda: run.buffer.sample(script.BatchRows(128, 128)))
    both = count_operations(lambda: run.buffer.sample(script.BatchRows(both=256)))
    assert offline["index"] == mixed["index"] == both["index"] == 1
    assert offline.total() <= OFFLINE_BATCH_BUDGET
    assert both.total() <= BOTH_BATCH_BUDGET
    assert mixed.total() <= MIXED_BATCH_BUDGET


def test_operations_of_the_bonus(script, hopper_run):
    """With stored q, and psi and the coefficient's numbers made before, the estimate is all."""
    run, args = hopper_run
    batch = run.buffer.sample(script.BatchRows(128, 128))
    assert "bonus_q" in batch

    def bonus():
        return script.intrinsic_reward(run.bonus_agent, batch, run.varying_dims, args, log=False)

    bonus()
    counted = count_operations(bonus)
    assert counted["topk"] == 1
    assert counted["digamma"] == counted["baddbmm"] == 0
    assert counted.total() <= BONUS_BUDGET


def test_operations_are_counted():
    """The counting is not blind, and neither views nor an optimizer's hooks count."""
    x = torch.randn(3, 4, requires_grad=True)
    counted = count_operations(lambda: (x.t().reshape(2, 6).unsqueeze(0)[0] * 2).sum().backward())
    assert counted["mul"] == 2  # forward and backward
    assert counted["sum"] == 1
    optimizer = torch.optim.SGD([x], 0.1)
    hooks = count_operations(optimizer.zero_grad)
    assert not hooks
    assert not computes(torch.ops.aten.view.default)


# ------------------------------ nothing waits for the device
class OnlyOn(TorchDispatchMode):
    """Within it, AssertionError for every tensor of another device, and so for every copy."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                assert value.device == self.device, f"{operation.name()} on {value.device}"
        return result


def make_all_steps(script, device, run, args):
    """One step of every kind, watched; those of the online phase after its start."""
    for kind in all_kinds(script, args):
        if kind.online and run.phase == "offline":
            go_online(script, run, args)
        with OnlyOn(device), HostSync():
            script.sample_and_update(run, args, kind)


def test_no_step_waits(script):
    """No step of any kind asks for a number that a GPU would still have to compute."""
    for changes in variants(script):
        run, args = make_run(script, **changes)
        make_all_steps(script, CPU, run, args)


def test_no_step_leaves_the_device(script):
    """No step has a tensor elsewhere, to copy from or to.

    Steps are made on a device without numbers, which the optimizer, PyTorch's own, cannot.
    """
    for changes in variants(script):
        run, args = make_run(script, META, **changes)
        run.optimizer.step = lambda: None
        make_all_steps(script, META, run, args)


@pytest.mark.parametrize("device", [CPU, META])
def test_acting_does_not_wait(script, device):
    """Neither does an action, with noise or without, ask for a number or leave the device."""
    run, _ = make_run(script, device)
    observations = torch.zeros(4, 11, device=device)
    for deterministic in (True, False):
        with OnlyOn(device), HostSync(), torch.no_grad():
            assert run.agent.act(observations, deterministic).shape == (4, 3)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0, 0]),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.normal(x, x.abs()),
        lambda x: torch.distributions.Normal(x, x.abs(), validate_args=True),
        lambda x: torch.distributions.Normal(x, x.abs(), validate_args=False).sample(),
    ],
)
def test_a_wait_is_noticed(wait):
    """The check of waits is not blind."""
    x = torch.randn(4, 4)
    with HostSync(), pytest.raises(HostSyncError):
        wait(x)


@pytest.mark.parametrize(
    "leave",
    [
        lambda x: x.to("cpu"),
        lambda x: x.copy_(torch.zeros(4, 4)),
        lambda x: x + torch.tensor(2.0),
        lambda x: torch.zeros(4, 4).to("meta"),
    ],
)
def test_another_device_is_noticed(leave):
    """The check of devices is not blind. PyTorch itself refuses to copy numbers that are none."""
    x = torch.randn(4, 4, device=META)
    with OnlyOn(META), pytest.raises((AssertionError, NotImplementedError)):
        leave(x)


# ------------------------------ nothing is frozen
class CudaIsHere(TorchFunctionMode):
    """Within it, what is asked of the device "cuda" happens on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def here(value):
            if isinstance(value, str | torch.device) and str(value) == "cuda":
                return CPU
            return value

        here_kwargs = {name: here(value) for name, value in (kwargs or {}).items()}
        return function(*map(here, args), **here_kwargs)


def tensors_in(*values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def address(tensor):
    return tensor.untyped_storage().data_ptr()


class Noted(TorchDispatchMode):
    """Within it, notes of every operation all that a recording of it repeats.

    These are Python's numbers, and where those tensors lie that the step finds: not the ones that
    it makes. Of a number that is made a tensor, PyTorch shows the tensor, so that counts as one.
    """

    def __init__(self):
        super().__init__()
        self.operations = []
        self.made = set()  # addresses

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        namespace, name, full_name = names_of(operation)
        found = [self.note(name, value) for value in tree_leaves((args, kwargs))]
        result = operation(*args, **(kwargs or {}))
        given = {address(tensor) for tensor in tensors_in(args, kwargs)}
        self.made |= {address(tensor) for tensor in tensors_in(result)} - given
        if namespace != "profiler":
            self.operations.append((full_name, found))
        return result

    def note(self, name, value):
        if not isinstance(value, torch.Tensor):
            return value
        if name == "lift_fresh":
            return value.tolist()
        where = "made by the step" if address(value) in self.made else address(value)
        return (where, value.storage_offset(), tuple(value.shape), value.stride(), value.dtype)


def noted_step(script, run, args, kind):
    """What a recording of this step would repeat."""
    with Noted() as noted:
        script.sample_and_update(run, args, kind)
    return noted.operations


def first_difference(operations, others):
    """Two lists of notes are alike (None), or here they differ."""
    for one, other in itertools.zip_longest(operations, others):
        if one != other:
            return f"{one} and then {other}"
    return None


def frozen_by_a_recording(script, **changes):
    """Per kind of step, what differs between two steps that a recording takes for the same."""
    run, args = make_run(script, **changes)
    with CudaIsHere():
        script.prepare_optimizer(run.optimizer, CUDA)  # as on a GPU: rates are tensors
    found = {}
    for kind in all_kinds(script, args):
        if kind.online and run.phase == "offline":
            go_online(script, run, args)
        script.sample_and_update(run, args, kind)  # the first makes states and tables
        steps = []
        for _ in range(2):
            run.step += 3
            if kind.online:
                add_online_rows(script, run, args, 7)
            if run.scheduler:
                run.scheduler.step()
            steps.append(noted_step(script, run, args, kind))
        found[kind] = first_difference(*steps)
        assert len(steps[0]) > 50
    return found


def test_nothing_is_frozen(script):
    """Steps of a kind, at whatever step, rate and row count, differ in numbers on the device only.

    So do the places of all tensors that a step finds: a recording reads and writes those.
    """
    for changes in variants(script):
        for kind, difference in frozen_by_a_recording(script, **changes).items():
            assert difference is None, (changes, kind)


# What would be frozen, planted: each function gives the script it is in, and options.
def plant_a_count(patch):
    """The number of online rows is read in Python."""

    def sample(buffer, rows):
        offline = torch.rand(rows.dataset, dtype=torch.float64) * buffer.offline_size
        online = torch.rand(rows.online, dtype=torch.float64) * buffer.online_size
        both = torch.rand(rows.both, dtype=torch.float64) * buffer.size
        drawn = torch.cat([offline.long(), online.long() + buffer.offline_size, both.long()])
        return buffer.as_columns(buffer.table[drawn])

    patch.setattr(sac_sera.ReplayBuffer, "sample", sample)
    return sac_sera, {}


def plant_another_tensor(patch):
    """The number of online rows is a tensor, but another one after every transition."""
    append_rows = sac_sera.ReplayBuffer.append_rows

    def append(buffer, rows):
        buffer.online_count = buffer.online_count.clone()
        append_rows(buffer, rows)

    patch.setattr(sac_sera.ReplayBuffer, "append_rows", append)
    return sac_sera, {}


def plant_a_rate(patch):
    """The learning rate is a Python number, as on a CPU."""
    patch.setattr(iql_sera, "prepare_optimizer", lambda optimizer, device: None)
    return iql_sera, {"actor_lr_schedule": "cosine"}


def plant_a_weight(patch):
    """The annealed weight is a Python number."""
    weight = td3bc_sera.bc_weight
    patch.setattr(td3bc_sera, "bc_weight", lambda *inputs: float(weight(*inputs)))
    return td3bc_sera, {"bc_online": "anneal", "bc_anneal_steps": 60}


def plant_a_tensor_of_a_number(patch):
    """The annealed weight is a Python number, made a tensor in the step."""
    weight = td3bc_sera.bc_weight
    patch.setattr(td3bc_sera, "bc_weight", lambda *inputs: torch.tensor(float(weight(*inputs))))
    return td3bc_sera, {"bc_online": "anneal", "bc_anneal_steps": 60}


PLANTS = [
    plant_a_count,
    plant_another_tensor,
    plant_a_rate,
    plant_a_weight,
    plant_a_tensor_of_a_number,
]


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_frozen_is_noticed(plant, monkeypatch):
    """The check is not blind: what is planted differs."""
    script, changes = plant(monkeypatch)
    assert any(frozen_by_a_recording(script, **changes).values())


# ------------------------------ recordings, with a stand-in for CUDA graphs
class HostGraph:
    """Operations as they were called, with their very tensors, to be called again."""

    def __init__(self):
        self.operations = []
        self.replays = 0

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for operation, args, kwargs, results in self.operations:
            new_results = tensors_in(operation(*args, **kwargs))
            for result, new_result in zip(tensors_in(results), new_results, strict=True):
                if address(result) != address(new_result):
                    result.untyped_storage().copy_(new_result.untyped_storage())


class Capture(TorchDispatchMode):
    """Within it, operations go into a graph; afterwards the tensors it found are as before."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.made = set()  # addresses
        self.found = {}  # address -> storage, and a copy of what it held

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {address(tensor) for tensor in tensors_in(args, kwargs)}
        for tensor in tensors_in(args, kwargs):
            if address(tensor) not in self.made | self.found.keys():
                storage = tensor.untyped_storage()
                self.found[address(tensor)] = (storage, storage.clone())
        results = operation(*args, **kwargs)
        self.made |= {address(tensor) for tensor in tensors_in(results)} - given
        if names_of(operation)[0] != "profiler":
            self.graph.operations.append((operation, args, kwargs, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, before in self.found.values():
            storage.copy_(before)


class HostCuda:
    """In place of the parts of torch.cuda that a recording uses; notes what is asked of streams."""

    def __init__(self):
        self.notes = []
        self.graphs = []
        self.main = HostStream("main", self)
        self.refuse = None  # an exception that recording ends in

    def new_stream(self):
        return HostStream("side", self)

    def current_stream(self):
        return self.main

    @contextlib.contextmanager
    def use_stream(self, stream):
        self.notes.append(f"{stream.name} begins")
        yield
        self.notes.append(f"{stream.name} ends")

    @contextlib.contextmanager
    def record(self, graph, stream):
        """Recording computes nothing: neither tensors nor random numbers move on."""
        assert stream.name == "side"
        self.notes.append("recording")
        rng_state = torch.get_rng_state()
        with Capture(graph):
            yield
        torch.set_rng_state(rng_state)
        if self.refuse:
            raise self.refuse
        self.graphs.append(graph)


class HostStream:
    def __init__(self, name, cuda):
        self.name = name
        self.cuda = cuda

    def wait_stream(self, other):
        self.cuda.notes.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def cuda(monkeypatch):
    """The stand-in, put into torch.cuda."""
    stand_in = HostCuda()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", HostGraph)
    monkeypatch.setattr(torch.cuda, "graph", stand_in.record)
    monkeypatch.setattr(torch.cuda, "Stream", stand_in.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", stand_in.use_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stand_in.current_stream)
    with CudaIsHere():
        yield stand_in


class Growing:
    """A function to record: adds key * sum(x) to a total, and gives x + total."""

    def __init__(self):
        self.total = torch.zeros(())
        self.calls = []

    def __call__(self, key, x):
        self.calls.append((key, tuple(x.shape)))
        self.total += key * x.sum()
        return x + self.total


def test_three_calls_then_a_recording(script, cuda):
    """Calls are made as they are three times, then recorded, then replayed: always real ones."""
    function = Growing()
    recording = script.Recording(function)
    total = 0
    for number in range(1, 9):
        x = torch.full((2,), float(number))
        total += 10 * 2 * number
        assert recording(10, x).tolist() == [number + total] * 2
        assert function.total == total
        assert len(function.calls) == min(number, 4)  # recording calls it, replaying does not
        assert [graph.replays for graph in cuda.graphs] == ([number - 3] if number > 3 else [])


def test_a_recording_for_each_key_and_shape(cuda):
    """Keys and shapes are counted, recorded and replayed apart from each other."""
    function = Growing()
    recording = calql_sera.Recording(function)
    total = 0
    cases = [(1, 2), (5, 2), (1, 3)]
    for _ in range(6):
        for key, size in cases:
            x = torch.ones(size)
            total += key * size
            assert recording(key, x).tolist() == [1 + total] * size
    assert len(function.calls) == 4 * len(cases)
    assert [graph.replays for graph in cuda.graphs] == [3, 3, 3]
    assert set(recording.graphs) == {(key, (size,)) for key, size in cases}


def test_recordings_have_memory_of_their_own(cuda):
    """What is given is copied, and stays as it is; a result is overwritten by the next replay."""
    recording = calql_sera.Recording(lambda key, x: x.mul_(2))
    given = torch.ones(3)
    for _ in range(5):
        result = recording("double", given)
        assert result.tolist() == [2] * 3
        assert given.tolist() == [1] * 3
    given.fill_(7)
    assert result.tolist() == [2] * 3
    assert recording("double", given) is result
    assert result.tolist() == [14] * 3


def test_streams(cuda):
    """Calls as they are run on a side stream, which waits for the main one, and that for it."""
    recording = calql_sera.Recording(lambda key, x: x + 1)
    as_it_is = ["side waits for main", "side begins", "side ends", "main waits for side"]
    for _ in range(5):
        recording("plus one", torch.zeros(2))
    assert cuda.notes == as_it_is * 3 + ["recording"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("operation not permitted\nwhen stream is capturing"), "operation not permit"),
        (RuntimeError(), "RuntimeError"),
        (NotImplementedError("not on this driver"), "not on this driver"),
    ],
)
def test_refused_recording(error, reason, cuda, capsys):
    """Where recording fails, one line says so, and every call is made as it is from then on."""
    function = Growing()
    recording = calql_sera.Recording(function)
    for _ in range(5):
        recording(1, torch.ones(2))
    assert len(cuda.graphs) == 1
    cuda.refuse = error
    total = 10
    for _ in range(9):
        for key in (2, 3, 1):  # that of the last is recorded already
            total += 2 * key
            assert recording(key, torch.ones(2)).tolist() == [1 + total] * 2
    assert cuda.graphs[0].replays == 2 + 3
    assert cuda.notes.count("recording") == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"CUDA graphs do not work here ({reason}")
    assert said[0].endswith("): going on without")


def test_other_errors_are_shown(cuda):
    """A bug in a function is no fault of the driver."""
    recording = calql_sera.Recording(lambda key, x: x + 1)
    for _ in range(3):
        recording(1, torch.ones(2))
    cuda.refuse = TypeError("a bug")
    with pytest.raises(TypeError, match="a bug"):
        recording(1, torch.ones(2))


# ------------------------------ recorded training
def trained(script, record, **changes):
    """A run after 12 offline and 24 online steps, and all that it logged."""
    run, args = make_run(script, **changes)
    run.device = CUDA
    script.record_steps(run, args)
    assert run.recorded_step
    assert run.recorded_policy
    if not record:
        run.recorded_step = None
    torch.manual_seed(5)
    logged = []
    for step in range(1, 13):
        run.step = step
        due = script.policy_is_due(step, args)
        logs = script.train_step(run, args, offline_kind(script, due, step % 3 == 0))
        logged.append({name: value.clone() for name, value in logs.items()})
    go_online(script, run, args)
    for step in range(1, 25):
        run.step = step
        due = script.policy_is_due(step, args)
        logs = script.train_step(run, args, online_kind(script, due, step % 3 == 0))
        logged.append({name: value.clone() for name, value in logs.items()})
        add_online_rows(script, run, args, 1)
    return run, logged


def results_of(run, logged):
    """Everything that training changes, as tensors and numbers."""
    return {
        "agent": run.agent.state_dict(),
        "optimizer": run.optimizer.state_dict()["state"],
        "rates": [group["lr"] for group in run.optimizer.param_groups],
        "buffer": run.buffer.table,
        "logs": logged,
        "rng": torch.get_rng_state(),
    }


def same(results, others):
    """Whether these are alike, bit for bit."""
    pairs = zip(tree_leaves(results), tree_leaves(others), strict=True)
    return all(torch.equal(torch.as_tensor(one), torch.as_tensor(other)) for one, other in pairs)


RECORDED = {"td3bc_sera": {"bc_online": "anneal", "bc_anneal_steps": 20}}


def test_recorded_training(script, cuda):
    """Replayed steps are the very steps of a run without recordings, bit for bit.

    Online rows, learning rates and annealed weights move on under the recordings.
    """
    changes = RECORDED.get(script.__name__, {}) | {"sera_pool": 24}
    expected = results_of(*trained(script, False, **changes))
    assert not cuda.graphs
    run, logged = trained(script, True, **changes)
    assert same(results_of(run, logged), expected)
    calls = run.recorded_step.calls
    assert sum(calls.values()) == 12 + 24
    replays = {case: graph.replays for case, graph in run.recorded_step.graphs.items()}
    assert replays == {case: number - 3 for case, number in calls.items() if number > 3}
    assert {case[0].online for case in replays} == {False, True}
    assert {case[0].log for case in replays} == {False, True}


def test_a_step_cut_short_leaves_no_network_frozen(cuda, monkeypatch):
    """A recording that fails while an update has frozen the critics: the next step trains them."""

    def cut_short(run, args, kind):
        run.agent.critics.requires_grad_(False)
        raise RuntimeError("not while recording")

    monkeypatch.setattr(td3bc_sera, "sample_and_update", cut_short)
    agent, optimizer, args = make_agent(td3bc_sera)
    run = SimpleNamespace(agent=agent, optimizer=optimizer, device=torch.device("cpu"))
    td3bc_sera.record_steps(run, args)
    with pytest.raises(RuntimeError, match="not while recording"):
        run.recorded_step(make_kind(td3bc_sera))
    assert all(weight.requires_grad for weight in agent.critics.parameters())


def test_the_cause_of_a_refusal(cuda, monkeypatch, capsys):
    """Where the end of a recording fails too, the first error is the one that is named."""

    @contextlib.contextmanager
    def graph(recorded, stream):
        try:
            yield
        finally:
            raise RuntimeError("capture was invalidated")

    calls = []

    def function(key):
        calls.append(key)
        if len(calls) == 4:  # the one that is recorded
            raise RuntimeError("this operation waits for the device")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    recording = calql_sera.Recording(function)
    for _ in range(4):
        recording(1)
    assert len(calls) == 5
    reason = "this operation waits for the device"
    said = f"CUDA graphs do not work here ({reason}): going on without\n"
    assert capsys.readouterr().out == said


def test_training_without_graphs(cuda, capsys):
    """Where recording is refused, training is what it is without."""
    changes = RECORDED["td3bc_sera"]
    expected = results_of(*trained(td3bc_sera, False, **changes))
    cuda.refuse = RuntimeError("not here")
    assert same(results_of(*trained(td3bc_sera, True, **changes)), expected)
    assert cuda.notes.count("recording") == 1
    said = "CUDA graphs do not work here (not here): going on without\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("plant", PLANTS)
def test_frozen_training_is_noticed(plant, monkeypatch, cuda):
    """The comparison is not blind: with what is planted, replayed steps are others."""
    script, changes = plant(monkeypatch)
    expected = results_of(*trained(script, False, **changes))
    assert not same(results_of(*trained(script, True, **changes)), expected)


@pytest.mark.parametrize("deterministic", [True, False])
def test_recorded_policy(script, deterministic, cuda):
    """Actions are the agent's, for one observation and for several, recorded or not."""
    run, args = make_run(script)
    run.device = CUDA
    script.record_steps(run, args)
    rng = np.random.default_rng(0)
    torch.manual_seed(1)
    for number in range(12):
        observations = rng.normal(size=(1 + number % 2, 11))
        rng_state = torch.get_rng_state()
        actions = script.act(run, observations, deterministic)
        torch.set_rng_state(rng_state)
        inputs = torch.from_numpy(run.buffer.normalize(observations))
        with torch.no_grad():
            expected = run.agent.act(inputs, deterministic)
        np.testing.assert_array_equal(actions, expected.numpy())
    assert [graph.replays for graph in cuda.graphs] == [3, 3]


def test_without_recordings(script, cuda):
    """--no-cudagraphs records nothing; the rates are tensors nevertheless."""
    run, args = make_run(script, cudagraphs=False)
    run.device = CUDA
    script.record_steps(run, args)
    assert run.recorded_step is None
    assert run.recorded_policy is None
    assert all(isinstance(group["lr"], torch.Tensor) for group in run.optimizer.param_groups)


def test_rates_on_and_off_a_gpu(script):
    """A GPU has them as tensors, which a schedule fills in place; a CPU has plain numbers."""
    run, args = make_run(script)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert all(type(rate) is float for rate in rates)
    with CudaIsHere():
        script.prepare_optimizer(run.optimizer, CUDA)
    on_gpu = [group["lr"] for group in run.optimizer.param_groups]
    assert [rate.item() for rate in on_gpu] == pytest.approx(rates)
    assert all(group["capturable"] for group in run.optimizer.param_groups)
    script.train_step(run, args, offline_kind(script))
    for group, rate in zip(run.optimizer.param_groups, on_gpu):
        assert group["lr"] is rate
    script.prepare_optimizer(run.optimizer, CPU)
    assert all(type(group["lr"]) is float for group in run.optimizer.param_groups)
    assert not any(group["capturable"] for group in run.optimizer.param_groups)


# ------------------------------ whole runs: what is compiled, stored and pooled
OPTIONS = (
    "--env hopper-medium-mini --device cpu --offline-steps 6 --online-steps 20 --batch-size 16 "
    "--hidden-dim 8 --sera-k 3 --eval-every 100 --eval-episodes 1 --log-every 5"
)
LEARNED = ("agent", "optimizer", "online_rows", "rng_cpu", "rng_env", "evals")


def run_main(script, folder, *options):
    """Run a script, or resume it; gives the run as it ended and its checkpoint."""
    runs = []

    def train(run, args):
        runs.append(run)
        plain_train(run, args)

    plain_train = script.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train", train)
        script.main([*OPTIONS.split(), "--run-dir", str(folder), *options])
    (run,) = runs
    run.lock.release()
    return run, script.read_checkpoint(folder / "checkpoint.pt")


def assert_same_run(checkpoint, other):
    for name in LEARNED:
        left = tree_leaves(checkpoint[name])
        right = tree_leaves(other[name])
        for one, another in zip(left, right, strict=True):
            equal = torch.equal(one, another) if torch.is_tensor(one) else one == another
            assert equal, name


@pytest.mark.parametrize("option", ["auto", "no", "yes"])
def test_what_is_compiled(option, monkeypatch, tmp_path):
    """On a CPU only --compile yes compiles: bonus and update, of steps without numbers to log."""
    compiled_calls = []

    def compile_it(function, **options):
        def compiled(*inputs):
            compiled_calls.append(function.__name__)
            return function(*inputs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_it)
    run, _ = run_main(td3bc_sera, tmp_path, "--compile", option)
    if option == "yes":
        # 5 and 6 of 6 offline steps are logged, and 5, 10, 15 and 20 of 20 online ones.
        assert compiled_calls.count("update") == 4 + 16
        assert compiled_calls.count("intrinsic_reward") == 16
    else:
        assert run.compiled is None
        assert compiled_calls == []


def test_run_without_a_compiler(monkeypatch, tmp_path, capsys):
    """With --compile yes and no compiler a run says so once, and ends as any other."""
    _, expected = run_main(td3bc_sera, tmp_path / "plain")
    capsys.readouterr()

    def failing(*inputs):
        raise OSError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda function, **options: failing)
    run, checkpoint = run_main(td3bc_sera, tmp_path / "run", "--compile", "yes")
    assert run.compiled is None
    assert capsys.readouterr().out.count("torch.compile does not work here") == 1
    assert_same_run(checkpoint, expected)


# ------------------------------ stored q
@pytest.mark.parametrize("kind", ["q", "v"])
def test_stored_q(script, kind):
    """It is the q of the frozen agent, bit for bit, of the rows asked for and of no other."""
    run, args = make_run(script, sera_bonus=kind, online_steps=20_000)
    with torch.no_grad():
        for parameter in run.agent.parameters():  # since the agent was frozen
            parameter.mul_(1.5)
    run.buffer.append(hopper_rows(15_000))
    script.store_bonus_q(run, args, 50, 13_000)
    stored = run.buffer.as_columns(run.buffer.table)["bonus_q"]
    assert stored[:50].isnan().all()
    assert stored[13_000:15_100].isnan().all()
    for rows in (slice(50, 10_050), slice(10_050, 13_000)):  # as many at a time as memory allows
        batch = run.buffer.as_columns(run.buffer.table[rows])
        expected = script.conditioning_value(run.bonus_agent, batch, args)
        learned = script.conditioning_value(run.agent, batch, args)
        assert torch.equal(stored[rows], expected)
        assert not torch.allclose(learned, expected, rtol=1e-3)


@pytest.mark.parametrize("changes", [{"sera_critic": "offline"}, {"sera_critic": "random"}])
def test_when_q_is_stored(script, changes):
    """At the start of the online phase, and with every transition, whatever is learned later."""
    run, args = make_run(script, **changes)
    for _ in range(3):
        script.train_step(run, args, offline_kind(script))
    go_online(script, run, args)
    frozen = copy.deepcopy(run.bonus_agent)
    trained_first = copy.deepcopy(run.agent)
    for _ in range(3):
        script.train_step(run, args, online_kind(script))
    add_online_rows(script, run, args, 9)
    agent = trained_first if args.sera_critic == "offline" else frozen
    for rows in (slice(0, 100), slice(100, 130), slice(130, 139)):
        batch = run.buffer.as_columns(run.buffer.table[rows])
        assert torch.equal(batch["bonus_q"], script.conditioning_value(agent, batch, args))


@pytest.mark.parametrize("options", [[], ["--sera-bonus", "v", "--sera-critic", "random"]])
def test_stored_q_survives_a_resume(options, tmp_path):
    """Rows of the dataset get theirs anew, online rows have it in the checkpoint, bit for bit."""
    run, checkpoint = run_main(calql_sera, tmp_path, *options)
    table = run.buffer.table.clone()
    assert run.buffer.online_size == 20
    assert table[:, run.buffer.columns["bonus_q"]].all()
    assert torch.equal(checkpoint["online_rows"], table[run.buffer.offline_size :])
    resumed, _ = run_main(calql_sera, tmp_path, *options, "--resume")
    assert resumed.buffer is not run.buffer
    assert torch.equal(resumed.buffer.table, table)


@pytest.mark.parametrize(
    "changes",
    [
        {"sera_critic": "current"},
        {"sera_bonus": "state"},
        {"sera_bonus": "constant"},
        {"sera_coef": 0.0},
    ],
)
def test_no_stored_q(script, changes):
    """Where no frozen critics are asked for q there is no column for it, and steps go on."""
    run, args = make_run(script, **changes)
    go_online(script, run, args)
    assert "bonus_q" not in run.buffer.columns
    before = run.agent.critics.layers[0].weight.clone()
    script.train_step(run, args, online_kind(script))
    assert not torch.equal(run.agent.critics.layers[0].weight, before)


# ------------------------------ the pool
def test_pool_of_no_bonus(script, tmp_path):
    """With lambda = 0 a pool changes nothing, random numbers included; with the bonus it does."""
    _, plain = run_main(script, tmp_path / "plain", "--sera-coef", "0")
    _, pooled = run_main(script, tmp_path / "pooled", "--sera-coef", "0", "--sera-pool", "40")
    assert_same_run(pooled, plain)
    _, with_bonus = run_main(script, tmp_path / "bonus", "--sera-pool", "40")
    assert not torch.equal(with_bonus["rng_cpu"], plain["rng_cpu"])
    for value in with_bonus["agent"].values():
        assert value.isfinite().all()


# ------------------------------ the bonus as a GPU computes it
class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def distances(points, others):
    """By numpy, in float64."""
    differences = np.asarray(points, np.float64)[:, None] - np.asarray(others, np.float64)
    return np.sqrt((differences**2).sum(-1))


@pytest.mark.parametrize("dimension", [1, 11, 29])
@pytest.mark.parametrize(("offset", "spread"), [(0, 1), (50, 0.01)])
def test_both_forms_of_distances(script, dimension, offset, spread):
    """Those of a CPU and of a GPU agree with float64, for close rows far from the origin too."""
    rng = np.random.default_rng(dimension)
    points = offset + spread * rng.normal(size=(40, dimension)).astype(np.float32)
    others = offset + spread * rng.normal(size=(30, dimension)).astype(np.float32)
    others[3] = points[5]
    expected = distances(points, others)
    inputs = torch.from_numpy(points), torch.from_numpy(others)
    on_cpu = script.pairwise_distances(*inputs)
    on_gpu = script.pairwise_distances(inputs[0].as_subclass(OnGpu), inputs[1])
    for found in (on_cpu, on_gpu.as_subclass(torch.Tensor)):
        assert found.shape == (40, 30)
        assert found[5, 3] == 0
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    exact = script.pairwise_distances(inputs[0].double().as_subclass(OnGpu), inputs[1].double())
    np.testing.assert_allclose(exact.as_subclass(torch.Tensor), expected, rtol=1e-14)


def test_forms_of_distances_are_two():
    """On a GPU it is not cdist, which is slow there: the test above compares what it says."""
    x = torch.randn(5, 3)
    on_cpu = count_operations(lambda: calql_sera.pairwise_distances(x, x))
    on_gpu = count_operations(lambda: calql_sera.pairwise_distances(x.as_subclass(OnGpu), x))
    assert on_cpu["_cdist_forward"] == 1
    assert on_gpu["_cdist_forward"] == on_gpu["mm"] == on_gpu["bmm"] == 0


@pytest.mark.parametrize("with_pool", [False, True])
def test_estimate_on_a_gpu(with_pool, monkeypatch):
    """Radii and counts are those of a CPU, and do not depend on the rows worked on at a time.

    Where distances are differences of all pairs first, a block has fewer rows.
    """
    rng = np.random.default_rng(1)
    states = torch.from_numpy(rng.normal(size=(64, 5)))
    values = torch.from_numpy(rng.normal(size=64))
    pool = None
    pool_size = 64
    if with_pool:
        pool_size = 48
        pool = (torch.from_numpy(rng.normal(size=(48, 5))), torch.from_numpy(rng.normal(size=48)))
    on_cpu = calql_sera.q_conditioned_entropy(states, values, 3, pool)
    rows_at_a_time = []
    pairwise_distances = calql_sera.pairwise_distances

    def noted(x, y):
        rows_at_a_time.append(len(x))
        return pairwise_distances(x, y)

    monkeypatch.setattr(calql_sera, "pairwise_distances", noted)
    for rows in (64, 10, 1):
        block = rows * pool_size * 5
        rows_at_a_time.clear()
        on_gpu = calql_sera.q_conditioned_entropy(
            states.as_subclass(OnGpu), values, 3, pool, block=block
        )
        assert rows_at_a_time == [min(rows, 64 - first) for first in range(0, 64, rows)]
        _, radii, counts = (column.as_subclass(torch.Tensor) for column in on_gpu)
        torch.testing.assert_close(radii, on_cpu[1], rtol=1e-14, atol=0)
        assert torch.equal(counts, on_cpu[2])
        torch.testing.assert_close(on_gpu[0].as_subclass(torch.Tensor), on_cpu[0])
    rows_at_a_time.clear()
    calql_sera.q_conditioned_entropy(states, values, 3, pool, block=10 * pool_size)
    assert rows_at_a_time == [10] * 6 + [4]


def test_psi_table(script):
    """psi(n + 1) / d by another library, rounded once, and made once."""
    expected = digamma(np.arange(300) + 1) / 11
    table = script.psi_table(300, 11, torch.float64, CPU)
    np.testing.assert_allclose(table, expected, rtol=1e-14)
    table = script.psi_table(300, 11, torch.float32, CPU)
    np.testing.assert_array_equal(table, expected.astype(np.float32))
    assert script.psi_table(300, 11, torch.float32, CPU) is table
    assert script.psi_table(300, 5, torch.float32, CPU) is not table
