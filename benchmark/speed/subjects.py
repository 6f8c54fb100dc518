"""The scripts as things to time: an offline update, an online one, a step with the environment.

A case is one of them, set up as a run on made-up data. Today is for the scripts of this commit,
Before for those of commit 07bf3d9 and earlier, which have other interfaces.
"""

import contextlib
import functools
import importlib
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import gymnasium
import h5py
import numpy as np
import torch
from turns import rate

KINDS = {  # the number is lambda, the weight of the bonus
    "offline": "offline update",
    "online-0": "online update, λ = 0",
    "online-1": "online update, λ = 1",
    "step-0": "online step, λ = 0",
    "step-1": "online step, λ = 1",
}
HOPPER = (11, 3)
ROWS = 100_000  # of the made-up dataset
ONLINE_ROWS = 5_000  # that are there when the online cases begin
WARM_UP = 10  # calls: a recording needs four of each of TD3+BC's two kinds of updates
# How a training step is run. On a CPU scripts are eager by default, on a GPU compiled.
MODES = {
    "eager": {"cudagraphs": False, "compile": "no"},
    "recorded": {"cudagraphs": True, "compile": "no"},
    "compiled": {"cudagraphs": True, "compile": "yes"},
}
# Nothing but training steps: no evaluations, no checkpoints. Online steps are the buffer's room.
OPTIONS = "--env hopper-medium-v2 --offline-steps 1000000 --online-steps 200000 --eval-episodes 1 "
OPTIONS += "--eval-every 100000000 --checkpoint-every 100000000"


class NullEnv(gymnasium.Env):
    """Costs nothing: the same state for ever, in episodes of 1000 steps."""

    def __init__(self, observation_dim: int, action_dim: int):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (observation_dim,))
        self.action_space = gymnasium.spaces.Box(-1, 1, (action_dim,))
        self.observation = np.zeros(observation_dim)
        self.steps = 0

    def reset(self, **_):
        return self.observation, {}

    def step(self, _):
        self.steps += 1
        return self.observation, 1.0, False, self.steps % 1000 == 0, {}


def write_data(path: Path, shape: tuple[int, int], rows: int = ROWS) -> None:
    """A dataset of noise in D4RL's format."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(rows, shape[0])).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (rows, shape[1])).astype(np.float32)
        file["rewards"] = rng.normal(size=rows).astype(np.float32)
        file["terminals"] = np.arange(rows) % 500 == 499
        file["timeouts"] = np.zeros(rows, dtype=bool)


def load_script(name: str, shape: tuple[int, int] = HOPPER) -> ModuleType:
    """A script as a module; with other dimensions than hopper's its environment costs nothing."""
    script = importlib.import_module(name)
    dims = {"observation_dim": shape[0], "action_dim": shape[1]}
    script.TASKS["hopper"] = script.TASKS["hopper"]._replace(**dims)
    if tuple(shape) != HOPPER:
        script.make_env = lambda *_, **__: gymnasium.wrappers.RecordEpisodeStatistics(
            NullEnv(*shape)
        )
    return script


@dataclass
class Case:
    """Something to time, warmed up."""

    turn: Callable[[float], float]  # seconds -> how often per second
    mode: str  # in which it really runs: a script falls back where recording or compiling fails
    call: Callable[[], object] | None = None  # once, where there is a function for that


class TurnIsOver(Exception):
    """Leaves a script's loop in the middle."""


class Stopwatch:
    """Notes when the steps of a script's own loop end, and ends the turn in time."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.times = []

    def step_ends(self) -> None:
        self.times.append(time.perf_counter())
        elapsed = self.times[-1] - self.times[0]
        if len(self.times) > 1 and elapsed >= self.seconds:
            raise TurnIsOver

    def rate(self) -> float:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


class Today:
    """A script's cases."""

    modes = tuple(MODES)

    def __init__(self, script: ModuleType, folder: Path, device: str, options: str = ""):
        self.script = script
        self.folder = folder  # has data.hdf5; runs are put there
        self.device = device
        self.options = options  # of the script, beside the usual ones

    def case(self, kind: str, mode: str) -> Case:
        """kind: one of KINDS."""
        name, _, coefficient = kind.partition("-")
        run, args = self.start(mode, coefficient or "1")
        if name != "offline":
            self.go_online(run, args)
        if name == "step":
            turn = self.steps(run, args)
            while run.step < WARM_UP:
                turn(0)
            return Case(turn, self.mode_of(run, mode))
        call = self.offline_update(run, args) if name == "offline" else self.update(run, args)
        for _ in range(WARM_UP):
            call()
        calls = 1 if self.device == "cpu" else 8  # to ask a GPU costs time
        turn = functools.partial(rate, call, wait=self.wait, calls=calls)
        return Case(turn, self.mode_of(run, mode), call)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def parsed_args(self, coefficient: str) -> Any:
        options = f"{OPTIONS} --dataset-path {self.folder}/data.hdf5 --device {self.device} "
        options += f"--run-dir {tempfile.mkdtemp(dir=self.folder)} --sera-coef {coefficient} "
        options += self.options
        return self.script.parse_args(options.split())

    def start(self, mode: str, coefficient: str) -> tuple[Any, Any]:
        """A run as the script sets it up, and its arguments."""
        if mode == "compiled":  # by several runs here, more often than torch.compile expects
            torch._dynamo.config.recompile_limit = 100
        args = self.parsed_args(coefficient)
        for name, value in MODES[mode].items():
            setattr(args, name, value)
        with contextlib.redirect_stdout(io.StringIO()):
            return self.script.set_up(args), args

    def mode_of(self, run: Any, wanted: str) -> str:
        """The mode in which a run is, after its first steps."""
        recorded = run.recorded_step is not None and run.recorded_step.works
        if wanted == "compiled" and run.compiled is None:
            return "recorded" if recorded else "eager"
        if wanted == "recorded" and not recorded:
            return "eager"
        return wanted

    def online_rows(self) -> dict[str, np.ndarray]:
        rows = self.script.load_d4rl("hopper-medium-v2", f"{self.folder}/data.hdf5")
        return {name: column[:ONLINE_ROWS] for name, column in rows.items()}

    def go_online(self, run: Any, args: Any) -> None:
        """As if some online steps had been made."""
        run.buffer.append(self.online_rows())
        self.script.start_online_phase(run, args)
        run.step = 1

    def offline_update(self, run: Any, args: Any) -> Callable[[], object]:
        """One update of the offline phase, without numbers to log, as 499 of 500 are."""

        def call():
            run.step += 1
            policy_due = self.script.policy_is_due(run.step, args)
            rows = self.script.BatchRows(dataset=args.batch_size)
            kind = self.script.StepKind(False, rows, policy_due, False)
            return self.script.train_step(run, args, kind)

        return call

    def update(self, run: Any, args: Any) -> Callable[[], object]:
        """One update of the online phase, bonus included."""

        def call():
            run.step += 1
            rows = self.script.online_batch(run.buffer, args)
            policy_due = self.script.policy_is_due(run.step, args)
            kind = self.script.StepKind(True, rows, policy_due, False)
            return self.script.train_step(run, args, kind)

        return call

    def steps(self, run: Any, args: Any) -> Callable[[float], float]:
        """A turn of the script's own online phase: action, update, environment, buffer, logs."""
        end_of_step = self.script.end_of_step

        def turn(seconds: float) -> float:
            watch = Stopwatch(seconds)

            def timed(*inputs, **options):
                end_of_step(*inputs, **options)
                watch.step_ends()

            with mock.patch.object(self.script, "end_of_step", timed):
                leave_in_time(self.script.online_phase, run, args)
            return watch.rate()

        return turn


def leave_in_time(function: Callable, *inputs) -> None:
    """Call it until a stopwatch ends the turn, without its progress bar on the terminal."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(TurnIsOver):
        function(*inputs)


class Before(Today):
    """The same for scripts that have make_networks and update(state, batch, args)."""

    modes = ("eager",)

    def start(self, mode: str, coefficient: str) -> tuple[Any, Any]:
        args = self.parsed_args(coefficient)
        with contextlib.redirect_stdout(io.StringIO()):
            return self.script.set_up(args), args

    def mode_of(self, run: Any, wanted: str) -> str:
        return "eager"

    def go_online(self, run: Any, args: Any) -> None:
        run.buffer.append(self.online_rows())
        run.phase = "online"
        run.step = 1

    def offline_update(self, run: Any, args: Any) -> Callable[[], object]:
        def call():
            run.step += 1
            return self.script.update(run, run.buffer.sample(args.batch_size, 0), args)

        return call

    def update(self, run: Any, args: Any) -> Callable[[], object]:
        half = args.batch_size // 2
        space = run.env.observation_space
        live = torch.from_numpy(np.flatnonzero(space.low < space.high)).to(self.device)

        def call():
            run.step += 1
            batch = run.buffer.sample(half, half)
            if args.sera_coef:
                bonus, _ = self.script.sera_bonus(run.bonus_networks, batch, live, args)
                batch["rewards"] = batch["rewards"] + bonus
            return self.script.update(run, batch, args)

        return call

    def steps(self, run: Any, args: Any) -> Callable[[float], float]:
        """There is no end_of_step: an update is where a step is noted."""
        update = self.script.update

        def turn(seconds: float) -> float:
            watch = Stopwatch(seconds)

            def timed(*inputs):
                logs = update(*inputs)
                watch.step_ends()
                return logs

            with mock.patch.object(self.script, "update", timed):
                leave_in_time(self.script.train, args, run)
            return watch.rate()

        return turn


def cases_of(script: ModuleType, folder: Path, device: str) -> Today:
    """The cases of a script, whichever interface it has. ValueError if it has neither."""
    if hasattr(script, "train_step"):
        return Today(script, folder, device)
    if hasattr(script, "make_networks"):
        return Before(script, folder, device)
    raise ValueError(f"{script.__file__} has neither train_step nor make_networks")
