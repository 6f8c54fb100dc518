"""Machines of all kinds: no home, no locks, other systems, GPUs, clusters; and ~ in paths.

How runs end and go on: test_reliability.py. Downloads: test_download.py.
"""

import ast
import copy
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import kill_points
import pytest
import torch
from conftest import ROOT
from corrupt import columns, write

import sac_sera

ENV = "hopper-medium-v2"
OPTIONS = (
    f"--env {ENV} --device cpu --threads 1 --offline-steps 4 --online-steps 0 --eval-episodes 1 "
    "--batch-size 8 --sera-k 3 --hidden-dim 8"
)
LOCK = "in_use_by_a_run.lock"


@pytest.fixture
def data(tmp_path):
    """A data file for Hopper."""
    return write(tmp_path / "data.hdf5", columns())


def call(*options):
    """A small run of SAC with these options."""
    sac_sera.main([*OPTIONS.split(), *map(str, options)])


def refusal(capsys, *options):
    """The one line on stderr of a run that is refused before it trains."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(*options)
    stderr = capsys.readouterr().err.strip()
    assert caught.value.code == 2
    assert stderr.startswith("error: ") and "\n" not in stderr
    return stderr


# ------------------------------ no home, and ~
@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user without HOME and without an entry in the table of users, as in some containers."""
    pwd = pytest.importorskip("pwd")

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    assert os.path.expanduser("~") == "~"


def test_no_home(homeless, data, tmp_path):
    """It does not matter where no cache is needed: for a file that is named or bundled."""
    call("--dataset-path", data, "--run-dir", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert sac_sera.fetch_dataset("hopper-medium-mini").is_file()
    args = sac_sera.parse_args(["--env", ENV, "--offline-steps", "0", "--mixing-ratio", "0"])
    assert sac_sera.load_data(args) == (None, None, None)


def test_no_home_but_a_cache(homeless, tmp_path, monkeypatch):
    """With D4RL_DATASET_DIR there is a cache without a home."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    path = tmp_path / "hopper_medium-v2.hdf5"
    path.touch()
    assert sac_sera.fetch_dataset(ENV) == path


def test_no_home_and_no_cache(homeless, tmp_path, monkeypatch):
    """Where a cache is needed there is an error, and no folder of the name ~."""
    monkeypatch.setattr(sac_sera, "SERVER", "127.0.0.1:1")
    with pytest.raises(FileNotFoundError, match="--dataset-path"):
        sac_sera.fetch_dataset(ENV)
    assert not (tmp_path / "~").exists()


def test_tilde(data, tmp_path, monkeypatch):
    """~ is the home folder in both paths, also behind an equals sign, for a start and a resume."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    shutil.copy(data, home / "mine.hdf5")
    call("--dataset-path=~/mine.hdf5", "--run-dir=~/runs/a")
    run_dir = home / "runs" / "a"
    config = json.loads((run_dir / "config.json").read_text())
    assert config["data_file"] == str(home / "mine.hdf5")
    assert config["args"]["run_dir"] == str(run_dir)
    options = ["--run-dir", "~/runs/a", "--resume", "--offline-steps", "6"]
    sac_sera.main([*options, "--dataset-path", "~/mine.hdf5"])
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] == 6
    assert {path.name for path in tmp_path.iterdir()} == {"home", "data.hdf5"}


def test_every_path_argument_knows_tilde():
    """No argument that names a path is forgotten."""
    names = [name for name in vars(sac_sera.Args()) if re.search("path|dir|file|folder", name)]
    args = sac_sera.Args(**dict.fromkeys(names, "~/x"))
    sac_sera.expand_paths(args)
    for name in names:
        assert getattr(args, name) == os.path.expanduser("~/x")
    assert len(names) == 2


def test_tilde_of_the_cache(tmp_path, monkeypatch):
    """In D4RL_DATASET_DIR, too, which some set where no shell expands it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("D4RL_DATASET_DIR", "~/d4rl")
    monkeypatch.setattr(sac_sera, "SERVER", "127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "d4rl" / "hopper_medium-v2.hdf5"
    path.parent.mkdir()
    path.touch()
    assert sac_sera.fetch_dataset(ENV) == path


# ------------------------------ file systems without locks
@pytest.fixture
def no_locks(monkeypatch):
    """Makes every lock fail with this error."""
    fcntl = pytest.importorskip("fcntl")

    def with_error(number):
        def flock(descriptor, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return with_error


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_no_locks(name, no_locks, data, tmp_path, capsys):
    """A run goes on with one warning, which names the folder and the reason; so does a resume."""
    number = getattr(errno, name)
    no_locks(number)
    run_dir = tmp_path / "run"
    call("--dataset-path", data, "--run-dir", run_dir)
    warning = f"{run_dir} has no locks ({os.strerror(number)}): going on, let no other run use it"
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if "going on" in line] == [warning]
    assert "going on" not in printed.err
    assert "final score" in printed.out
    sac_sera.main(["--run-dir", str(run_dir), "--resume", "--offline-steps", "6"])
    assert capsys.readouterr().out.count(warning) == 1
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] == 6


def test_other_errors_of_locks(no_locks, data, tmp_path, capsys):
    """Whatever else keeps a lock from being taken is an error, in one line."""
    no_locks(errno.EIO)
    message = refusal(capsys, "--dataset-path", data, "--run-dir", tmp_path / "run")
    assert f"--run-dir {tmp_path / 'run'} cannot be used ({os.strerror(errno.EIO)})" in message


def test_a_lock_that_another_run_has_is_no_lack_of_locks(data, tmp_path, capsys):
    """The control: then the run is refused."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with filelock.FileLock(run_dir / LOCK):
        message = refusal(capsys, "--dataset-path", data, "--run-dir", run_dir)
    assert "is in use by another run" in message


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_download_without_locks(name, no_locks, data, tmp_path, monkeypatch, capsys):
    """A download goes on with one warning, too."""
    no_locks(getattr(errno, name))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))

    def download(url, path, sha256):
        shutil.copy(data, path)

    monkeypatch.setattr(sac_sera, "download", download)
    path = sac_sera.fetch_dataset(ENV)
    assert path.read_bytes() == data.read_bytes()
    printed = capsys.readouterr().out
    assert printed.count(f"{path.parent} has no locks") == 1


def test_hdf5_is_opened_without_locks():
    """Every file that a script opens by h5py.File is opened with locking=False."""
    tree = ast.parse(Path(sac_sera.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    opened = [ast.unparse(node) for node in calls if ast.unparse(node.func) == "h5py.File"]
    assert opened
    assert [text for text in opened if "locking=False" not in text] == []


# ------------------------------ Windows, macOS, other Linux
# What the other systems have not, before the script is imported.
WITHOUT = """
import ctypes
import os
import pathlib
import platform
import signal
import sys

root, name, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, root)
for number in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGKILL"):
    delattr(signal, number)
for function in ("fork", "getuid", "geteuid"):
    delattr(os, function)
platform.libc_ver = lambda *inputs: ("", "")
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: not str(path).startswith("/proc") and exists(path)


class CDLL(ctypes.CDLL):
    def __init__(self, name, *inputs, **others):
        if name is None:
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        super().__init__(name, *inputs, **others)


ctypes.CDLL = CDLL
import importlib

importlib.import_module(name).main()
"""
LINUX_ONLY = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog"}


def test_what_only_linux_has(data, tmp_path):
    """A script starts, trains and ends where there are no such signals, no glibc, no /proc."""
    options = [*OPTIONS.split(), "--dataset-path", str(data), "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-B", "-c", WITHOUT, str(ROOT), "sac_sera", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "final score" in done.stdout


def test_imports():
    """No module that only Unix has is imported."""
    tree = ast.parse(Path(sac_sera.__file__).read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names & LINUX_ONLY == set()
    assert {"signal", "ctypes", "socket"} <= names  # the control: these are on all systems


def test_libc_is_asked_only_where_it_is_known(monkeypatch):
    """Without glibc, as on macOS, Windows and Alpine, no function of the C library is called."""
    monkeypatch.setattr(sac_sera.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(sac_sera.ctypes, "CDLL", lambda name: pytest.fail("it was loaded"))
    sac_sera.keep_large_blocks()


# ------------------------------ the number of threads
@pytest.fixture
def small_run(data, tmp_path, monkeypatch):
    """A run that is set up, and its arguments, where nothing says how many threads it has."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    paths = ["--dataset-path", str(data), "--run-dir", str(tmp_path / "run")]
    args = sac_sera.parse_args([*OPTIONS.split(), *paths])
    run = sac_sera.set_up(args)
    args.threads = None
    return run, args


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({1: 100, 2: 119, 4: 119}, 1),  # less than a fifth faster
        ({1: 100, 2: 121, 4: 130}, 2),
        ({1: 100, 2: 121, 4: 146}, 4),
        ({1: 100, 2: 90, 4: 121}, 4),
    ],
)
def test_chosen_threads(rates, expected, small_run, monkeypatch, capsys):
    """More only if they are a fifth faster than the best so far; the rates are printed."""
    monkeypatch.setattr(sac_sera, "updates_per_second", lambda run, args, threads: rates[threads])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    capsys.readouterr()
    assert sac_sera.choose_threads(*small_run) == expected
    timed = f"1: {rates[1]}/s, 2: {rates[2]}/s, 4: {rates[4]}/s"
    assert capsys.readouterr().out == f"threads: {expected} (updates with {timed})\n"


def test_threads_are_not_timed(small_run, monkeypatch):
    """--threads and OMP_NUM_THREADS are obeyed; a machine of two cores is not asked for four."""
    run, args = small_run
    asked = []

    def updates_per_second(run, args, threads):
        asked.append(threads)
        return 100

    monkeypatch.setattr(sac_sera, "updates_per_second", updates_per_second)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    args.threads = 3
    assert sac_sera.choose_threads(run, args) == 3
    args.threads = None
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert sac_sera.choose_threads(run, args) == 2
    assert asked == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert sac_sera.choose_threads(run, args) == 1
    assert asked == [1, 2]


def test_timing_leaves_no_trace(small_run):
    """Agent, optimizer, random numbers and the number of threads are as before."""
    run, args = small_run
    before = copy.deepcopy((run.agent.state_dict(), run.optimizer.state_dict()))
    rng_state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert sac_sera.choose_threads(run, args) >= 1
    after = run.agent.state_dict(), run.optimizer.state_dict()
    assert kill_points.differences(before, after) == []
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert torch.get_num_threads() == threads


def product_error(precision):
    """Switch to a precision, and give the largest error of a product in units of what bounds it."""
    torch.set_float32_matmul_precision(precision)
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    return float((x @ x - x.double() @ x.double()).abs().max() / (x.abs() @ x.abs()).max())


@pytest.fixture
def matmul_precision():
    """Puts the precision of products back after a test."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def processor_of(tmp_path, monkeypatch):
    """Makes the script believe that the processor is a maker's."""

    def pretend(maker):
        (tmp_path / "cpuinfo").write_text(f"vendor_id : {maker}")
        monkeypatch.setattr(sac_sera, "Path", lambda path: tmp_path / Path(path).name)

    return pretend


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD"])
def test_library_for_products(maker, processor_of, capsys, matmul_precision):
    """MKL on Intel's processors, without a word; on others oneDNN, where it does not round."""
    processor_of(maker)
    faster = maker != "GenuineIntel" and product_error("medium") < 1e-6
    torch.set_float32_matmul_precision("highest")
    sac_sera.choose_matmul(torch.device("cpu"))
    found = torch.get_float32_matmul_precision()
    assert found == ("medium" if faster else "highest")
    assert product_error(found) < 1e-6
    warned = "going on with MKL" in capsys.readouterr().out
    assert warned == (maker != "GenuineIntel" and found == "highest")


def test_a_library_that_rounds_is_found(processor_of, monkeypatch, capsys, matmul_precision):
    """Products of numbers with bfloat16's eight bits are refused, and that is said."""
    processor_of("AuthenticAMD")
    exact = torch.Tensor.__matmul__

    def rounded(x, y):
        if x.dtype == torch.float64:
            return exact(x, y)
        return exact(x.bfloat16().float(), y.bfloat16().float())

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    sac_sera.choose_matmul(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    assert "going on with MKL" in capsys.readouterr().out


def test_blocks_on_older_glibc(monkeypatch):
    """Where 1 GiB is refused, 32 MiB is asked for: else the low default would be fixed."""
    asked = []

    def mallopt(name, value):
        asked.append((name, value))
        return name != -3 or value <= 2**25

    monkeypatch.setattr(sac_sera.platform, "libc_ver", lambda: ("glibc", "2.31"))
    monkeypatch.setattr(sac_sera.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    sac_sera.keep_large_blocks()
    assert asked == [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1)]


def test_denormal_numbers_are_flushed(data, tmp_path):
    """In all threads, once a run is set up; before, the control, they are not."""
    options = f"{OPTIONS} --threads 2 --dataset-path {data} --run-dir {tmp_path}/run"
    code = f"""
import sac_sera
import torch

def denormals(count):
    return (torch.full((count,), 2e-38) * 0.1).view(torch.int32).count_nonzero().item()

before = denormals(1)  # so few that no thread is started
sac_sera.set_up(sac_sera.parse_args({options.split()}))
print(torch.get_num_threads(), before, denormals(1_000_000))
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.splitlines()[-1] == "2 1 0"


# ------------------------------ GPUs
def test_second_gpu_in_the_help(capsys):
    """--help says how to choose another GPU."""
    with pytest.raises(SystemExit) as caught:
        sac_sera.main(["--help"])
    assert caught.value.code == 0
    assert "CUDA_VISIBLE_DEVICES=1 is the second GPU" in capsys.readouterr().out


def test_checkpoint_of_a_machine_with_more_gpus(data, tmp_path, monkeypatch):
    """Tensors that were saved from the fourth GPU are read on a machine that has none."""
    run_dir = tmp_path / "run"
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    call("--dataset-path", data, "--run-dir", run_dir)
    monkeypatch.undo()
    if torch.cuda.device_count() < 4:  # the control: without a word they go where they came from
        with pytest.raises(RuntimeError):
            torch.load(run_dir / "checkpoint.pt", weights_only=True)
    saved = sac_sera.read_checkpoint(run_dir / "checkpoint.pt")
    assert {value.device.type for value in saved["agent"].values()} == {"cpu"}
    sac_sera.main(["--run-dir", str(run_dir), "--resume", "--offline-steps", "6"])
    assert sac_sera.read_checkpoint(run_dir / "checkpoint.pt")["step"] == 6


def test_one_generator_of_one_gpu(data, tmp_path, monkeypatch):
    """A checkpoint has the generator of the run's own GPU, and gives it to the run's own."""
    run_dir = tmp_path / "run"
    call("--dataset-path", data, "--run-dir", run_dir)
    run = make_run(data, tmp_path / "other")
    state = torch.arange(16, dtype=torch.uint8)
    asked, given = [], []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or state)
    run.device = torch.device("cuda")
    sac_sera.save_checkpoint(run, sac_sera.parse_args(OPTIONS.split()))
    saved = sac_sera.read_checkpoint(tmp_path / "other" / "checkpoint.pt")
    assert torch.equal(saved["rng_cuda"], state)
    assert asked == [torch.device("cuda")]
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *inputs: given.append(inputs))
    monkeypatch.setattr(sac_sera, "prepare_optimizer", lambda *inputs: None)
    sac_sera.restore(run, sac_sera.parse_args(OPTIONS.split()), saved)
    ((restored, device),) = given
    assert torch.equal(restored, state) and device == torch.device("cuda")


def make_run(data, run_dir):
    """A run that is set up and not trained; its folder is free again."""
    options = [*OPTIONS.split(), "--dataset-path", str(data), "--run-dir", str(run_dir)]
    run = sac_sera.set_up(sac_sera.parse_args(options))
    run.lock.release()
    run.writer.close()
    return run


# ------------------------------ clusters
def test_folders_of_one_second(script, tmp_path, monkeypatch):
    """Runs of one seed that start in the same second get folders of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.time, "time", lambda: 1234.5)
    args = script.Args(env=ENV, seed=7)
    made = [script.new_run_dir(args) for _ in range(3)]
    name = f"runs/{ENV}__{script.__name__}__7__1234"
    assert [str(path) for path in made] == [name, f"{name}_2", f"{name}_3"]
    assert all(path.is_dir() and not any(path.iterdir()) for path in made)


def test_variants_started_in_one_second(data, tmp_path, monkeypatch, capsys):
    """Both train, each in its own folder, and say which."""
    monkeypatch.chdir(tmp_path)
    seconds = sac_sera.time.time
    monkeypatch.setattr(sac_sera.time, "time", lambda: min(seconds(), 1234.5))
    for coefficient in ("0", "1"):
        call("--dataset-path", data, "--sera-coef", coefficient)
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    printed = capsys.readouterr().out
    found = []
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        found.append(config["args"]["sera_coef"])
        assert f"{folder.relative_to(tmp_path)}\n" in printed
        assert (folder / "evals.csv").exists()
    assert found == [0.0, 1.0]


def test_no_folder_is_left(script, tmp_path, monkeypatch):
    """A thousand names are taken: an error with the way out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.Path, "mkdir", taken)
    with pytest.raises(ValueError, match="name a folder with --run-dir"):
        script.new_run_dir(script.Args())


def taken(*inputs, **others):
    raise FileExistsError


def test_requeued_before_the_first_checkpoint(data, tmp_path):
    """The command of a first start, with --resume, works again when the first came to nothing."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / LOCK).touch()  # all that a start leaves that is killed while it sets up
    (run_dir / "checkpoint.tmp").write_bytes(b"half")
    command = ["--dataset-path", data, "--run-dir", run_dir, "--resume"]
    call(*command)
    call(*command)
    assert sac_sera.read_checkpoint(run_dir / "checkpoint.pt")["step"] == 4


def test_same_run_with_and_without_locks(no_locks, data, tmp_path):
    """What the file system has makes no difference to the result."""
    for name in ("with", "without"):
        call("--dataset-path", data, "--run-dir", tmp_path / name)
        no_locks(errno.ENOLCK)
    different = kill_points.compare(tmp_path / "with", tmp_path / "without")
    assert [place for place in different if "/rng_env" not in place] == []  # not seeded offline
