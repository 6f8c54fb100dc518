"""Turns: what is compared gets the machine one after another, a short while each, again and again.

Other jobs on the machine then slow all of it alike, and ratios hold. Each version of the code and
each peer is a process of its own, a worker, that waits for its turn without using the machine. Only
the standard library is needed here, as workers may have other Pythons.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

ANSWER = "answer: "  # what a line begins with that is not just printed
BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:  # else it would stay for ever if that were killed
    for _ in range(1_000_000):
        pass
"""


class Worker:
    """A program that answers requests, each a line of JSON, by its standard input and output."""

    def __init__(self, command: list[str], threads: int, environment: dict[str, str] | None = None):
        self.name = " ".join(command)
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | limits | (environment or {}),
        )

    def ask(self, **request) -> dict:
        """Send a request and wait for its answer. RuntimeError if the program has ended."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
            print(line, end="", file=sys.stderr)
        raise RuntimeError(f"this ended without an answer, see above: {self.name}")

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(answer: Callable[..., dict]) -> None:
    """The worker's side: answer(**request) for each request, until there are no more."""
    for line in sys.stdin:
        print(ANSWER + json.dumps(answer(**json.loads(line))), flush=True)


def rate(call: Callable[[], object], seconds: float, wait: Callable[[], object], calls: int = 1):
    """Calls per second over a turn; wait() returns when the device is done, asked every calls."""
    wait()
    start = time.perf_counter()
    total = 0
    while True:
        for _ in range(calls):
            call()
        total += calls
        wait()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return total / elapsed


@contextlib.contextmanager
def busy_neighbour() -> Iterator[subprocess.Popen]:
    """Another process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        time.sleep(0.2)  # until it has started
        yield process
    finally:
        process.kill()
        process.wait()


def in_turns(
    turns: dict, rounds: int, seconds: float, neighbours: tuple[bool, ...] = (False,)
) -> dict[tuple, list[float]]:
    """The rates of each turn, one a round, by name and whether a neighbour was busy.

    Every second round goes backwards, so that no place is the better one.
    """
    rates = defaultdict(list)
    for number in range(rounds):
        names = list(turns)
        if number % 2:
            names.reverse()
        for neighbour in neighbours:
            with busy_neighbour() if neighbour else contextlib.nullcontext():
                for name in names:
                    rates[name, neighbour].append(turns[name](seconds))
    return dict(rates)
