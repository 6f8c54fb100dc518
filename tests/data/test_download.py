"""Where data files are found, and how they are fetched: sources, checksums, locks, leftovers."""

import contextlib
import csv
import functools
import hashlib
import http.server
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import corrupt
import filelock
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT

import calql_sera
from envs import antmaze

ENV = "hopper-medium-v2"
FILE = "hopper_medium-v2.hdf5"
OLD_ENV = "hopper-medium-v1"  # has no checksum here
OLD_FILE = "hopper_medium-v1.hdf5"
ROBOTS = ("hopper", "halfcheetah", "walker2d", "ant")
KINDS = ("random", "medium", "expert", "medium-expert", "medium-replay", "full-replay")

# A script as a program, without network but for the servers of the test.
FETCH = """
import importlib
import sys

root, name, server, env, sha256 = sys.argv[1:]
sys.path.insert(0, root)
script = importlib.import_module(name)
script.SERVER = server
script.CHECKSUMS[env] = sha256
print("ready", flush=True)
sys.stdin.readline()
print("path", script.fetch_dataset(env), flush=True)
"""


# ------------------------------ servers
class Handler(http.server.BaseHTTPRequestHandler):
    """Answers every path as its server is told to, and notes what was asked for."""

    def handle(self):
        if self.rfile.peek(1)[:1] == b"\x16":  # the greeting of https, which no one speaks here
            self.server.note("https")
        else:
            super().handle()

    def do_GET(self):
        self.server.note(self.path)
        body = self.server.body
        how = self.server.how
        if how in ("403", "404"):
            self.send_error(int(how))
            return
        if how == "page":
            body = b"<html>Log in to the network first</html>"
        elif how == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif how == "empty":
            body = b""
        self.send_response(200)
        if how == "chunk cut":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        if how == "chunk cut":
            self.wfile.write(b"%x\r\n%s" % (len(body), body[:half]))
        elif how == "short":
            self.wfile.write(body[:half])
        elif how == "hanging":
            self.wfile.write(body[:half])
            self.server.stop.wait(60)
        elif how == "slow":
            piece = len(body) // 7 + 1
            for start in range(0, len(body), piece):
                self.wfile.write(body[start : start + piece])
                self.server.stop.wait(0.25)
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """A web server of the kind that how says, with one body for all paths."""

    def __init__(self, name, log):
        super().__init__(("127.0.0.1", 0), Handler)
        self.how = "right"
        self.body = b""
        self.stop = threading.Event()
        self.address = f"127.0.0.1:{self.server_port}"
        self.note = lambda what: log.append((name, what))

    def handle_error(self, request, client_address):
        """A client that hangs up is nothing to print."""


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """The bytes of a sound data file."""
    path = corrupt.write(tmp_path_factory.mktemp("body") / "x.hdf5", corrupt.columns())
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder in D4RL_DATASET_DIR."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def sources(body, monkeypatch):
    """Two servers in place of Hugging Face and of D4RL, which have the file of ENV, and its sum.

    log has what was asked for, in order: ("mirror" or "d4rl", path), or "https" for the attempt.
    """
    log = []
    mirror, d4rl = Server("mirror", log), Server("d4rl", log)
    threads = []
    for server in (mirror, d4rl):
        server.body = body
        options = {"kwargs": {"poll_interval": 0.01}, "daemon": True}
        threads.append(threading.Thread(target=server.serve_forever, **options))
        threads[-1].start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", f"http://{mirror.address}")
    monkeypatch.setattr(calql_sera, "SERVER", f"{d4rl.address}/base")
    monkeypatch.setitem(calql_sera.CHECKSUMS, ENV, hashlib.sha256(body).hexdigest()[:16])
    yield SimpleNamespace(mirror=mirror, d4rl=d4rl, log=log)
    for server, thread in zip((mirror, d4rl), threads):
        server.stop.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def impatient(monkeypatch):
    """A second is long enough for an answer."""
    monkeypatch.setattr(calql_sera, "download", functools.partial(calql_sera.download, timeout=1))


@pytest.fixture
def urls(monkeypatch):
    """What would be downloaded, in order: each attempt is refused in the words "not today"."""
    tried = []

    def refuse(url, *others):
        tried.append(url)
        raise OSError(f"not today, try {len(tried)}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tried


def names(folder):
    """What lies in the cache, but for the lock of a download."""
    found = sorted(path.name for path in folder.iterdir())
    return [name for name in found if not name.endswith(".lock")]


def from_mirror(name):
    return "mirror", f"/{calql_sera.MIRROR}/{name}"


# ------------------------------ files that are there
def test_dataset_path_wins(cache, tmp_path, urls):
    """--dataset-path comes before the cache, before a bundled file and before the network."""
    (cache / FILE).touch()
    mine = tmp_path / "mine.hdf5"
    mine.touch()
    assert calql_sera.fetch_dataset(ENV, str(mine)) == mine
    assert calql_sera.fetch_dataset("hopper-medium-mini", str(mine)) == mine
    assert urls == []


def test_bundled_file(cache, tmp_path, monkeypatch, urls):
    """The mini set comes from data/ beside the script and from nowhere else."""
    monkeypatch.setattr(calql_sera, "__file__", str(tmp_path / "calql_sera.py"))
    bundled = tmp_path.resolve() / "data" / "hopper-medium-mini.hdf5"
    with pytest.raises(FileNotFoundError, match=re.escape(str(bundled)) + ".*--dataset-path"):
        calql_sera.fetch_dataset("hopper-medium-mini")
    bundled.parent.mkdir()
    bundled.touch()
    assert calql_sera.fetch_dataset("hopper-medium-mini") == bundled
    assert urls == []


def test_cache_folder(cache, urls):
    """A file in D4RL_DATASET_DIR is found under D4RL's own name, without the network."""
    for env, name in ((ENV, FILE), ("walker2d-expert-v0", "walker2d_expert.hdf5")):
        (cache / name).touch()
        assert calql_sera.fetch_dataset(env) == cache / name
    assert urls == []


def test_default_cache_folder(tmp_path, monkeypatch, urls):
    """Without D4RL_DATASET_DIR, or with an empty one, it is ~/.d4rl/datasets, as D4RL has it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".d4rl" / "datasets"
    folder.mkdir(parents=True)
    (folder / FILE).touch()
    for value in (None, ""):
        monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
        if value is not None:
            monkeypatch.setenv("D4RL_DATASET_DIR", value)
        assert calql_sera.fetch_dataset(ENV) == folder / FILE
    assert urls == []


def test_missing_dataset_path(cache, tmp_path):
    """A --dataset-path that is not there, or a folder, is named, whatever the cache holds."""
    (cache / FILE).touch()
    missing = tmp_path / "nowhere.hdf5"
    with pytest.raises(FileNotFoundError, match=re.escape(str(missing)) + ".*--dataset-path"):
        calql_sera.fetch_dataset(ENV, str(missing))
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))} is a folder"):
        calql_sera.fetch_dataset(ENV, str(tmp_path))


def load(*options):
    """What load_data gives for ENV: data, file and SHA-256."""
    return calql_sera.load_data(calql_sera.parse_args(["--env", ENV, *options]))


def test_cached_file_is_checked_once(cache, body, sources, monkeypatch):
    """A cached file with the right checksum is used: no request, and one pass over its bytes."""
    (cache / FILE).write_bytes(body)
    digests = []

    def file_digest(file, name):
        digests.append(file.name)
        return original(file, name)

    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    data, path, sha256 = load()
    assert len(data["rewards"]) == 28
    assert path == str(cache / FILE)
    assert sha256 == hashlib.sha256(body).hexdigest()
    assert digests == [str(cache / FILE)]
    assert sources.log == []


def test_cached_file_with_another_checksum(cache, body, sources):
    """It is refused, with the way to a good one, and left where it is: it may be one's own."""
    other = body[:-1] + bytes([body[-1] ^ 1])
    (cache / FILE).write_bytes(other)
    with pytest.raises(ValueError) as caught:
        load()
    for part in (str(cache / FILE), "SHA-256", "delete it"):
        assert part in str(caught.value)
    assert (cache / FILE).read_bytes() == other
    assert sources.log == []


def test_any_checksum_with_dataset_path(cache, tmp_path, body, sources):
    """A file that is named need not be D4RL's."""
    mine = tmp_path / "mine.hdf5"
    corrupt.write(mine, corrupt.columns(rows=25))
    data, path, _ = load("--dataset-path", str(mine))
    assert path == str(mine)
    assert len(data["rewards"]) == 23
    assert sources.log == []


# ------------------------------ the table of checksums
def test_checksums():
    """Each v2 id of Gym-MuJoCo and of AntMaze has one, all differ, and tasks have them."""
    ids = {f"{robot}-{kind}-v2" for robot in ROBOTS for kind in KINDS}
    assert calql_sera.CHECKSUMS.keys() == ids
    ids_of_mazes = {env for env in antmaze.DATASETS if env.endswith("-v2")}
    assert antmaze.CHECKSUMS.keys() == ids_of_mazes
    table = calql_sera.CHECKSUMS | antmaze.CHECKSUMS
    assert len(set(table.values())) == len(table) == 30
    for env, sha256 in table.items():
        assert re.fullmatch("[0-9a-f]{16}", sha256), env
        assert calql_sera.find_task(env).sha256 == sha256
    for env in (OLD_ENV, "hopper-medium-v0", "antmaze-umaze-v0", "hopper-medium-mini"):
        assert calql_sera.find_task(env).sha256 is None


def test_checksums_of_the_list(real_data):
    """They are those of a list that was made from other copies of the files."""
    path = real_data.parent / "d4rl_checksums.tsv"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    with open(path, newline="") as file:
        listed = {row["url"]: row["sha256"] for row in csv.DictReader(file, delimiter="\t")}
    compared = 0
    for env, sha256 in (calql_sera.CHECKSUMS | antmaze.CHECKSUMS).items():
        url = f"http://{calql_sera.SERVER}/{calql_sera.find_task(env).file}"
        if url in listed:
            assert listed[url].startswith(sha256), env
            compared += 1
    assert compared > 20


def test_checksum_of_a_genuine_file(real_data, monkeypatch):
    """How a genuine file's SHA-256 begins is no check of a sample: samples go by --dataset-path."""
    path = real_data / "real-samples" / FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert not digest.startswith(calql_sera.CHECKSUMS[ENV])
    data, _, sha256 = load("--dataset-path", str(path))
    assert sha256 == digest
    assert len(data["rewards"]) > 0


# ------------------------------ sources
def test_order_of_sources(cache, monkeypatch, urls):
    """Hugging Face at a fixed commit, then D4RL's server by https, then by http; no other."""
    monkeypatch.delenv("HF_ENDPOINT")
    mirror = "datasets/imone/D4RL/resolve/9ed58d8a76c12f4c1cb5db51fa71389e703d2ec5"
    server = "rail.eecs.berkeley.edu/datasets/offline_rl"
    for env, folder, name in (
        (ENV, "gym_mujoco_v2", FILE),
        ("ant-expert-v0", "gym_mujoco", "ant_expert.hdf5"),
        ("antmaze-umaze-v2", *antmaze.DATASETS["antmaze-umaze-v2"]["file"].split("/")),
    ):
        urls.clear()
        with pytest.raises(FileNotFoundError):
            calql_sera.fetch_dataset(env)
        assert urls == [
            f"https://huggingface.co/{mirror}/{name}",
            f"https://{server}/{folder}/{name}",
            f"http://{server}/{folder}/{name}",
        ]


@pytest.mark.parametrize("endpoint", ["https://hf-mirror.example", ""])
def test_endpoint(endpoint, cache, monkeypatch, urls):
    """HF_ENDPOINT names another server for the mirror; an empty one does not."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(FileNotFoundError):
        calql_sera.fetch_dataset(ENV)
    expected = endpoint or "https://huggingface.co"
    assert urls[0] == f"{expected}/{calql_sera.MIRROR}/{FILE}"


def test_endpoint_with_a_slash(cache, monkeypatch, urls):
    """A slash at the end of HF_ENDPOINT does not get into the middle of the address."""
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.example/")
    with pytest.raises(FileNotFoundError):
        calql_sera.fetch_dataset(ENV)
    assert urls[0] == f"https://hf-mirror.example/{calql_sera.MIRROR}/{FILE}"


def test_download(cache, body, sources, capsys):
    """The first source is enough; the file lies in the cache, made if need be, once and for all."""
    cache.rmdir()
    path = calql_sera.fetch_dataset(ENV)
    assert path == cache / FILE
    assert sources.log == [from_mirror(FILE)]
    assert names(cache) == [FILE]
    assert path.read_bytes() == body
    assert (
        capsys.readouterr().out == f"downloading {os.environ['HF_ENDPOINT']}{sources.log[0][1]}\n"
    )
    assert calql_sera.fetch_dataset(ENV) == path
    assert capsys.readouterr().out == ""
    assert len(sources.log) == 1


@pytest.mark.parametrize(
    "how", ["404", "403", "page", "empty", "short", "chunk cut", "wrong", "hanging"]
)
def test_next_source(how, cache, body, sources, impatient):
    """Absent, forbidden, a page, too short, other bytes, no more bytes: on to the next source."""
    sources.mirror.how = how
    path = calql_sera.fetch_dataset(ENV)
    expected = [("d4rl", "https"), ("d4rl", f"/base/gym_mujoco_v2/{FILE}")]
    assert sources.log == [from_mirror(FILE), *expected]
    assert path.read_bytes() == body
    assert names(cache) == [FILE]


@pytest.mark.parametrize("how", ["404", "403", "page", "empty", "short", "chunk cut", "hanging"])
def test_next_source_without_a_checksum(how, cache, body, sources, impatient):
    """What is no whole HDF5 file is noticed even where no checksum is known."""
    sources.mirror.how = how
    path = calql_sera.fetch_dataset(OLD_ENV)
    assert sources.log[-1] == ("d4rl", f"/base/gym_mujoco_v1/{OLD_FILE}")
    assert len(sources.log) == 3
    assert path.read_bytes() == body
    assert names(cache) == [OLD_FILE]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("404", "404"),
        ("403", "403"),
        ("wrong", "invalid hash value"),
        ("short", "invalid hash value"),
        ("page", "invalid hash value"),
        ("hanging", "timed out"),
    ],
)
def test_all_sources_fail(how, reason, cache, sources, impatient):
    """One message: every source with its own reason, where to put the file, how to name one."""
    sources.mirror.how = how
    sources.d4rl.how = "404" if how == "403" else "403"
    with pytest.raises(FileNotFoundError) as caught:
        calql_sera.fetch_dataset(ENV)
    message = str(caught.value)
    assert "\n" not in message
    start, _, rest = message.partition(f"http://{sources.mirror.address}/{calql_sera.MIRROR}")
    first, _, rest = rest.partition(f"https://{sources.d4rl.address}/base/gym_mujoco_v2/{FILE}: ")
    second, _, third = rest.partition(f"http://{sources.d4rl.address}/base/gym_mujoco_v2/{FILE}: ")
    assert FILE in start
    assert first.startswith(f"/{FILE}: ") and reason in first
    assert "SSL" in second
    assert sources.d4rl.how in third
    for part in (str(cache), "--dataset-path"):
        assert part in third
    assert names(cache) == []


def test_one_message_from_outside(cache, sources, tmp_path, monkeypatch, capsys):
    """Bars and messages of single sources end in one line that begins with error, and code 2."""
    sources.mirror.how = "wrong"
    sources.d4rl.how = "404"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calql_sera, "train", lambda *inputs: pytest.fail("training has begun"))
    with pytest.raises(SystemExit) as caught:
        calql_sera.main(["--env", ENV])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert sum("error" in line for line in lines) == 1
    assert lines[-1].startswith(f"error: could not download {FILE} (http://")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_after_a_failure(cache, body, sources):
    """What a failed download leaves behind does not stand in the way of the next."""
    sources.mirror.how = "short"
    sources.d4rl.how = "wrong"
    with pytest.raises(FileNotFoundError):
        calql_sera.fetch_dataset(ENV)
    assert names(cache) == []
    sources.mirror.how = "right"
    assert calql_sera.fetch_dataset(ENV).read_bytes() == body


def test_nothing_is_left_of_a_page(cache, sources):
    """Also where no checksum is known, and all sources send one."""
    sources.mirror.how = sources.d4rl.how = "page"
    with pytest.raises(FileNotFoundError):
        calql_sera.fetch_dataset(OLD_ENV)
    assert names(cache) == []


def test_a_file_is_not_there_before_it_was_checked(cache, body, sources, monkeypatch):
    """Under its own name a file appears only once it is known to be whole."""
    original = h5py.File
    seen = []

    def look_into(path, *inputs, **others):
        seen.append((cache / FILE).exists())
        return original(path, *inputs, **others)

    monkeypatch.setattr(h5py, "File", look_into)
    assert calql_sera.fetch_dataset(ENV).read_bytes() == body
    assert seen == [False]


def test_without_a_network(cache, monkeypatch):
    """No connection at all gives the same error."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(calql_sera, "SERVER", "127.0.0.1:1")
    with pytest.raises(FileNotFoundError, match=r"refused.*refused.*refused.*--dataset-path"):
        calql_sera.fetch_dataset(ENV)
    assert names(cache) == []


def test_impossible_folder(tmp_path, monkeypatch, urls):
    """A cache folder that cannot be made is named, with the way out; nothing is downloaded."""
    folder = tmp_path / "file" / "cache"
    folder.parent.touch()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder))
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder)) + ".*--dataset-path"):
        calql_sera.fetch_dataset(ENV)
    assert urls == []


def test_errors_of_any_kind(cache, monkeypatch):
    """Whatever an attempt raises is a reason, in one line, even if it has no words."""
    errors = [urllib.error.URLError("no name\nno address"), TimeoutError(), RuntimeError("hash")]

    def fail(*inputs):
        raise errors.pop(0)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(FileNotFoundError) as caught:
        calql_sera.fetch_dataset(ENV)
    parts = [": <urlopen error no name; ", ": TimeoutError; ", ": hash): put "]
    assert [part for part in parts if part not in str(caught.value)] == []


# ------------------------------ time
def test_slow_source(cache, body, sources, impatient):
    """Longer than the time-out, but in pieces, each of which is in time: it is waited for."""
    sources.mirror.how = "slow"
    start = time.monotonic()
    assert calql_sera.fetch_dataset(ENV).read_bytes() == body
    assert time.monotonic() - start > 1
    assert len(sources.log) == 1


def test_time_out(monkeypatch, tmp_path):
    """There is one of at most a minute, for the download alone: other code keeps its own."""
    assert 5 <= inspect.signature(calql_sera.download).parameters["timeout"].default <= 60
    seen = []

    def refuse(*inputs):
        seen.append(calql_sera.socket.getdefaulttimeout())
        raise OSError

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    before = calql_sera.socket.getdefaulttimeout()
    with pytest.raises(OSError):
        calql_sera.download("http://example.org", tmp_path / "x", None, timeout=7)
    assert seen == [7]
    assert calql_sera.socket.getdefaulttimeout() == before


def test_progress_bar(cache, body, sources, capsys):
    """The bar counts up to the size of the file, in bytes with a prefix."""
    calql_sera.fetch_dataset(ENV)
    bar = capsys.readouterr().err
    size = f"{len(body) / 1024:.2f}k"
    assert re.search(rf"100%\|.*\| {size}/{size} ", bar), bar


# ------------------------------ several at once, and killed ones
@pytest.fixture
def start(sources, body, monkeypatch):
    """Starts a process that will fetch the file of ENV once it is told to; ends it afterwards."""
    processes = []

    def run():
        sha256 = calql_sera.CHECKSUMS[ENV]
        inputs = [str(ROOT), "calql_sera", calql_sera.SERVER, ENV, sha256]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-B", "-c", FETCH, *inputs]
        processes.append(subprocess.Popen(command, text=True, **pipes))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(condition):
    """Until it holds, for half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_at_once(cache, body, sources, start):
    """Two processes that start at the same time both have the file, and it was sent once."""
    sources.mirror.how = "slow"
    processes = [start(), start()]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        stdout, stderr = process.communicate(timeout=60)
        assert stdout.splitlines()[-1] == f"path {cache / FILE}", stderr
    assert sources.log == [from_mirror(FILE)]
    assert names(cache) == [FILE]
    assert (cache / FILE).read_bytes() == body


def test_killed_download(cache, body, sources, start):
    """Killed in the middle, a download leaves no file of that name, and the next one tidies up."""
    sources.mirror.how = "hanging"
    process = start()
    process.stdout.readline()
    process.stdin.write("\n")
    process.stdin.flush()
    wait_for(lambda: names(cache) and sources.log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = names(cache)
    assert left.startswith(f"{FILE}.part")
    sources.mirror.how = "right"
    assert calql_sera.fetch_dataset(ENV).read_bytes() == body
    assert names(cache) == [FILE]
    assert len(sources.log) == 2


@pytest.mark.parametrize("how", ["right", "404"])
def test_leftovers(how, cache, body, sources):
    """What was left at any stage goes, also if no source has the file; other files stay."""
    sources.mirror.how = sources.d4rl.how = how
    others = [f"{OLD_FILE}.part", "hopper_medium-v2.txt"]
    for name in (f"{FILE}.part", f"{FILE}.part.0a1b.partial", *others):
        (cache / name).write_bytes(b"half")
    if how == "right":
        assert calql_sera.fetch_dataset(ENV).read_bytes() == body
    else:
        with pytest.raises(FileNotFoundError):
            calql_sera.fetch_dataset(ENV)
    assert names(cache) == sorted(others + [FILE] * (how == "right"))


def test_somebody_else_was_faster(cache, sources, monkeypatch):
    """A file that another start has put there meanwhile is used, also between two sources."""
    sources.mirror.how = "404"
    original = calql_sera.download
    tried = []

    def download(url, path, *others):
        tried.append(url)
        try:
            original(url, path, *others)
        finally:
            path.touch()

    monkeypatch.setattr(calql_sera, "download", download)
    assert calql_sera.fetch_dataset(ENV) == cache / FILE
    assert len(tried) == 1


def test_lock_is_freed(cache, sources):
    """After a download, and after one that failed, the lock is free."""
    for how in ("404", "right"):
        sources.mirror.how = sources.d4rl.how = how
        try:
            calql_sera.fetch_dataset(ENV)
        except FileNotFoundError:
            assert how == "404"
        with filelock.FileLock(cache / f"{FILE}.lock", timeout=0):
            pass


def test_download_without_locks_of_hdf5(cache, body, sources, monkeypatch):
    """The file is looked into without HDF5's lock, which not every file system has.

    Here another handle has locked it, so that HDF5 would not get a lock of its own.
    """
    fcntl = pytest.importorskip("fcntl")
    original = torch.hub.download_url_to_file
    with contextlib.ExitStack() as handles:

        def download_and_lock(url, path, sha256):
            original(url, path, sha256)
            handle = handles.enter_context(open(path, "rb"))
            fcntl.flock(handle, fcntl.LOCK_EX)

        monkeypatch.setattr(torch.hub, "download_url_to_file", download_and_lock)
        assert calql_sera.fetch_dataset(ENV).read_bytes() == body
    assert len(sources.log) == 1


def test_downloaded_file_is_sound(cache, sources):
    """The control: what the servers send is a data file that loads."""
    data = calql_sera.load_d4rl(ENV, calql_sera.fetch_dataset(ENV))
    expected = corrupt.columns()
    assert len(data["rewards"]) == 28
    np.testing.assert_array_equal(data["actions"][:5], expected["actions"][:5])
    with h5py.File(Path(cache, FILE)) as file:
        assert set(file) == set(corrupt.NAMES)
