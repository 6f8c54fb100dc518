"""How fast the scripts are: updates and steps per second, share of the peak, cost of the bonus.

    python benchmark/speed/speed.py                           # all scripts, ten minutes on 2 cores
    python benchmark/speed/speed.py --peers peers/bin/python  # d3rlpy beside them, see peers.py
    python benchmark/speed/speed.py --profile                 # what part is matrix products
    python benchmark/speed/speed.py --techniques --rounds 3   # what each trick buys, by undoing it
    python benchmark/speed/speed.py --shape 376 17 --scripts iql_sera  # other dimensions

Everything that is compared is measured in turns, a second each, and reported as the median over the
rounds: other jobs on the machine then slow all of it alike, and ratios hold. Prints Markdown
tables; with --output also writes a JSON line for each number.
"""

import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium
import h5py
import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))  # the scripts
SCRIPTS = ("cql_sera", "calql_sera", "sac_sera", "iql_sera", "td3bc_sera", "awac_sera")
ROWS = 100_000  # of the made-up dataset


@dataclass
class Args:
    """Measure how fast the scripts are."""

    scripts: tuple[str, ...] = SCRIPTS
    """which scripts"""
    shape: tuple[int, int] = (11, 3)
    """dimensions of states and actions"""
    seconds: float = 1.0
    """length of a turn"""
    rounds: int = 7
    """turns that everything gets"""
    compile: bool = True
    """also measure torch.compile, and on a GPU its CUDA graphs"""
    knn: bool = True
    """also measure the bonus alone, up to 16384 rows"""
    profile: bool = False
    """instead measure how much of an update is spent in matrix products"""
    techniques: bool = False
    """instead measure each technique of techniques.toml by undoing it"""
    restarts: int = 5
    """with --techniques: how often both sides start anew, from another place in memory"""
    peers: str | None = None
    """Python of an environment with d3rlpy, to measure beside the scripts"""
    threads: int = 2
    """CPU threads"""
    device: str = "cpu"
    """cpu or cuda"""
    output: Path | None = None
    """file for the JSON lines"""


class NullEnv(gymnasium.Env):
    """Costs nothing: the same state for ever, in episodes of 1000 steps."""

    def __init__(self, observation_dim: int, action_dim: int):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (observation_dim,))
        self.action_space = gymnasium.spaces.Box(-1, 1, (action_dim,))
        self.observation, self.steps = np.zeros(observation_dim), 0

    def reset(self, **_):
        return self.observation, {}

    def step(self, _):
        self.steps += 1
        return self.observation, 1.0, False, self.steps % 1000 == 0, {}


# ------------------------------ what is measured
def write_data(path: Path, shape: tuple[int, int]) -> None:
    """A dataset of noise in D4RL's format."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(ROWS, shape[0])).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (ROWS, shape[1])).astype(np.float32)
        file["rewards"] = rng.normal(size=ROWS).astype(np.float32)
        file["terminals"] = np.arange(ROWS) % 500 == 499
        file["timeouts"] = np.zeros(ROWS, dtype=bool)


def load(name: str, shape: tuple[int, int], text: str | None = None) -> ModuleType:
    """A script as a module, or a changed text of it, with hopper of that shape."""
    module = importlib.import_module(name)
    if text:
        module = ModuleType(name)
        module.__file__ = str(ROOT / f"{name}.py")
        sys.modules[name] = module  # where its dataclass looks itself up
        exec(compile(text, module.__file__, "exec"), module.__dict__)
    module.TASKS["hopper"] = module.TASKS["hopper"]._replace(
        observation_dim=shape[0], action_dim=shape[1]
    )
    if shape != (11, 3):
        module.make_env = lambda *_, **__: NullEnv(*shape)
    return module


def set_up(
    script: ModuleType, args: Args, folder: str, *options: str
) -> tuple[SimpleNamespace, object]:
    """A run as the script sets it up, on made-up data."""
    run_dir = tempfile.mkdtemp(dir=folder)
    common = f"--env hopper-medium-v2 --dataset-path {folder}/data.hdf5"
    common += f" --device {args.device} --run-dir {run_dir}"
    script_args = script.parse_args([*common.split(), *options])
    with contextlib.redirect_stdout(io.StringIO()):
        return script.set_up(script_args), script_args


def offline_update(
    script: ModuleType, args: Args, folder: str, update: Callable
) -> Callable[[], dict]:
    """A function that does one offline update: a batch and the losses on it."""
    state, script_args = set_up(script, args, folder)

    def run() -> dict:
        state.step += 1
        return update(state, state.buffer.sample(script_args.batch_size, 0), script_args)

    return run


def online_update(
    script: ModuleType, args: Args, folder: str, coefficient: int
) -> Callable[[], dict]:
    """The same online, half of the rows online ones, with the bonus if the coefficient is 1."""
    state, script_args = set_up(script, args, folder, "--sera-coef", str(coefficient))
    rows = script.load_d4rl("hopper-medium-v2", f"{folder}/data.hdf5")
    state.buffer.append({name: column[:5000] for name, column in rows.items()})
    state.phase, half = "online", script_args.batch_size // 2
    live = torch.arange(args.shape[0], device=args.device)

    def run() -> dict:
        state.step += 1
        batch = state.buffer.sample(half, half)
        if coefficient:
            bonus, _ = script.sera_bonus(state.bonus_networks, batch, live, script_args)
            batch["rewards"] = batch["rewards"] + bonus
        return script.update(state, batch, script_args)

    return run


def online_steps(
    script: ModuleType, args: Args, folder: str, coefficient: int, null: bool, steps: int
) -> float:
    """Steps per second of the script's own online phase, without evaluations and checkpoints."""
    times, update, make_env, evaluate = [], script.update, script.make_env, script.evaluate

    def timed(*inputs):
        synchronize(args)
        times.append(time.perf_counter())
        return update(*inputs)

    script.update = timed
    if null:
        script.make_env = lambda *_, **__: NullEnv(*args.shape)
    try:
        options = (
            f"--offline-steps 1 --online-steps {steps} --eval-episodes 1 --sera-coef {coefficient}"
        )
        state, script_args = set_up(script, args, folder, *options.split())
        script.evaluate = lambda policy, envs, seeds: (np.zeros(1), np.zeros(1, dtype=int))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            script.train(script_args, state)
    finally:
        script.update, script.make_env, script.evaluate = update, make_env, evaluate
    warm = len(times) // 5
    return (len(times) - warm - 1) / (times[-1] - times[warm])


def matrix_product(args: Args) -> Callable[[], dict]:
    """A function whose speed is the float32 peak."""
    left, right = torch.randn(2, 2048, 2048, device=args.device)
    return lambda: {"product": left @ right}


def bonus_alone(
    script: ModuleType, kind: str, batch_size: int, dimension: int, device: str
) -> Callable[[], dict]:
    """The estimate on noise: the script's, or a plain one that broadcasts."""
    observations = torch.randn(batch_size, dimension, device=device)
    q_values = torch.randn(batch_size, device=device)

    def plain() -> torch.Tensor:
        q_distances = (q_values[:, None] - q_values).abs()
        distances = (observations[:, None] - observations).square().sum(-1).sqrt()
        distances = torch.maximum(distances, q_distances).fill_diagonal_(torch.inf)
        radii = distances.sort(dim=1).values[:, 9]
        counts = (q_distances < radii[:, None]).sum(1) - 1
        return torch.digamma(counts + 1.0) / dimension + torch.log(2 * radii)

    if kind == "plain":
        return lambda: {"entropy": plain()}
    return lambda: {"entropy": script.q_conditioned_entropy(observations, q_values, 10)}


# ------------------------------ how it is measured
def synchronize(args: Args) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def rate(run: Callable[[], dict], seconds: float, args: Args) -> float:
    """Calls per second over a turn."""
    synchronize(args)
    start, calls = time.perf_counter(), 0
    while True:
        run()
        calls += 1
        if calls % 8 == 0 or args.device == "cpu":
            synchronize(args)
            if time.perf_counter() - start >= seconds:
                return calls / (time.perf_counter() - start)


def in_turns(turns: dict[str, Callable[[float], float]], args: Args) -> dict[str, list[float]]:
    """Each turn's rates, one a round; every second round backwards: no place is the better."""
    rates = {name: [] for name in turns}
    for number in range(args.rounds):
        for name in list(turns)[:: -1 if number % 2 else 1]:
            rates[name].append(turns[name](args.seconds))
    return rates


class Peers:
    """d3rlpy in a process of its own."""

    def __init__(self, args: Args):
        command = [args.peers, str(FOLDER / "peers.py"), *map(str, args.shape), str(args.threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([*command, args.device], stdin=pipe, stdout=pipe, text=True)

    def rate(self, name: str, seconds: float) -> float:
        print(name, seconds, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("updates per second:"):
                return float(line.split(":")[1])
        raise RuntimeError("peers.py ended: does its environment have d3rlpy?")


def resident(name: str) -> float:
    """This process's memory in MiB: VmRSS is now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measure_bonus(kind: str, batch_size: int, dimension: int, args: Args) -> tuple[float, float]:
    """Milliseconds and peak MiB of one estimate, in a process of its own."""
    torch.set_num_threads(args.threads)
    script = importlib.import_module(SCRIPTS[0])  # the estimator is the same in all
    bonus_alone(script, kind, 64, dimension, args.device)()
    run = bonus_alone(script, kind, batch_size, dimension, args.device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
    before = resident("VmRSS")
    run()
    memory = resident("VmHWM") - before
    if args.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    return 1000 / rate(run, args.seconds, args), memory


# ------------------------------ tables
def speeds(args: Args, folder: str, write: Callable) -> None:
    peers = Peers(args) if args.peers else None
    heads = [
        "script",
        "phase",
        "mode",
        "λ",
        "per second",
        "lowest to highest",
        "of the peak",
        "of d3rlpy",
    ]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|", flush=True)
    for name in args.scripts:
        script = load(name, args.shape)
        torch._dynamo.reset()
        runs = {
            ("offline update", "eager", "-"): offline_update(script, args, folder, script.update)
        }
        modes = {"compile": "default"} | (
            {"cuda graphs": "reduce-overhead"} if args.device == "cuda" else {}
        )
        for mode, option in modes.items() if args.compile else ():
            compiled = torch.compile(script.update, mode=option)
            runs["offline update", mode, "-"] = offline_update(script, args, folder, compiled)
        for coefficient in (0, 1):
            runs["online update", "eager", coefficient] = online_update(
                script, args, folder, coefficient
            )
        with FlopCounterMode(display=False) as counter:
            for _ in range(4):
                runs["offline update", "eager", "-"]()
        flops = counter.get_total_flops() / 4
        for run in runs.values():
            for _ in range(10):
                run()
        turns = {
            key: lambda seconds, run=run: rate(run, seconds, args) for key, run in runs.items()
        }
        product = matrix_product(args)
        turns["peak"] = lambda seconds, run=product: 2 * 2048**3 * rate(run, seconds, args)
        if peers:
            algorithm = name.removesuffix("_sera")
            peers.rate(algorithm, 0.1)
            turns["offline update", "d3rlpy", "-"] = lambda seconds, a=algorithm: peers.rate(
                a, seconds
            )
        rates = in_turns(turns, args)
        peak = statistics.median(rates.pop("peak"))
        steps = 50 + int(3 * args.seconds * statistics.median(rates["online update", "eager", 0]))
        for coefficient, null in (
            itertools.product((0, 1), (False, True)) if args.shape == (11, 3) else ()
        ):
            key = ("online step" + ", no environment" * null, "eager", coefficient)
            rates[key] = [
                online_steps(script, args, folder, coefficient, null, steps) for _ in range(2)
            ]
        theirs = statistics.median(rates.get(("offline update", "d3rlpy", "-"), [0])) or None
        for (phase, mode, coefficient), some in rates.items():
            median, ours = statistics.median(some), mode != "d3rlpy"
            share = median * flops / peak if phase == "offline update" and ours else None
            ratio = median / theirs if phase == "offline update" and theirs else None
            cells = [
                name,
                phase,
                mode,
                coefficient,
                f"{median:.1f}",
                f"{min(some):.1f} to {max(some):.1f}",
            ]
            cells += [
                "" if share is None else f"{100 * share:.0f} %",
                "" if ratio is None else f"{ratio:.2f}",
            ]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            write(
                script=name,
                phase=phase,
                mode=mode,
                coefficient=coefficient,
                updates_per_second=median,
                rates=some,
                peak_fraction=share,
                gflop=flops / 1e9,
                peak_gflops=peak / 1e9,
                of_d3rlpy=ratio,
            )
        text = f"an update has {flops / 1e9:.2f} GFLOP, the peak is {peak / 1e9:.0f} GFLOP/s"
        print(f"| {name} | {text} |||||||", flush=True)


def profile_table(args: Args, folder: str, write: Callable) -> None:
    heads = ["script", "ms per update", "in matrix products", "the same at the peak", "all else"]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|", flush=True)
    for name in args.scripts:
        script = load(name, args.shape)
        run = offline_update(script, args, folder, script.update)
        with FlopCounterMode(display=False) as counter:
            for _ in range(4):
                run()
        turns = {"update": lambda seconds, run=run: rate(run, seconds, args)}
        product = matrix_product(args)
        turns["peak"] = lambda seconds, run=product: 2 * 2048**3 * rate(run, seconds, args)
        rates = {key: statistics.median(some) for key, some in in_turns(turns, args).items()}
        with torch.profiler.profile() as profiler:
            for _ in range(100):
                run()
        times = {
            event.key: event.self_cpu_time_total + event.self_device_time_total
            for event in profiler.key_averages()
        }
        products = (
            sum(times.get(f"aten::{key}", 0) for key in ("mm", "bmm", "addmm", "baddbmm")) / 1e5
        )
        total, floor = 1000 / rates["update"], 1000 * counter.get_total_flops() / 4 / rates["peak"]
        print(
            f"| {name} | {total:.2f} | {products:.2f} | {floor:.2f} | {total - products:.2f} |",
            flush=True,
        )
        write(profile=name, milliseconds=total, in_products=products, at_the_peak=floor)


def bonus_table(args: Args, write: Callable) -> None:
    print(
        "\n| rows | d | ms | peak MiB | plain: ms | plain: peak MiB |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for dimension, batch_size in itertools.product((11, 29, 376), (256, 1024, 4096, 16384)):
        cells = []
        for kind in ("scripts", "plain"):
            needed = 3 * 4 * batch_size**2 * dimension / 2**20
            if kind == "plain" and needed > 8 * 1024:
                cells += ["-", f"about {needed:,.0f}"]
                continue
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                milliseconds, memory = pool.submit(
                    measure_bonus, kind, batch_size, dimension, args
                ).result()
            cells += [f"{milliseconds:.2f}", f"{memory:,.0f}"]
            write(
                bonus=kind,
                rows=batch_size,
                dimension=dimension,
                milliseconds=milliseconds,
                mebibytes=memory,
            )
        print(f"| {batch_size} | {dimension} | {' | '.join(cells)} |", flush=True)


def techniques() -> list[dict]:
    return tomllib.loads((FOLDER / "techniques.toml").read_text())["technique"]


def undone(technique: dict, name: str) -> str:
    """The text of a script without a technique."""
    text = (ROOT / f"{name}.py").read_text()
    for find, replace in technique.get(f"undo_{name}", technique["undo"]):
        if find not in text:
            raise ValueError(f"techniques.toml: {name}.py does not have {find!r}")
        text = text.replace(find, replace)
    return text


def serve(text: str, name: str, online: bool, args: Args, pipe) -> None:
    """In a process of its own: answers seconds with updates per second of a text of a script."""
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder, "data.hdf5"), args.shape)
        script = load(name, args.shape, text)
        run = (
            online_update(script, args, folder, 1)
            if online
            else offline_update(script, args, folder, script.update)
        )
        for _ in range(10):
            run()
        while seconds := pipe.recv():
            pipe.send(rate(run, seconds, args))


def techniques_table(args: Args, write: Callable) -> None:
    """Each side in processes of its own, started anew: where memory lies can make 10 %."""
    context = multiprocessing.get_context("spawn")
    print(
        "| technique | script | speed with it, over speed without it |\n|---|---|---|", flush=True
    )
    for technique, number in itertools.product(techniques(), range(2)):
        if number >= len(technique["scripts"]):
            continue
        what, name, ratios = technique["what"], technique["scripts"][number], []
        for _ in range(args.restarts):
            turns = {}
            for text in ((ROOT / f"{name}.py").read_text(), undone(technique, name)):
                pipe, other = context.Pipe()
                inputs = (text, name, technique["phase"] == "online", args, other)
                context.Process(target=serve, args=inputs, daemon=True).start()
                turns[len(turns)] = lambda seconds, pipe=pipe: pipe.send(seconds) or pipe.recv()
            rates = in_turns(turns, args)
            ratios.append(statistics.median(rates[0]) / statistics.median(rates[1]))
            for turn in turns.values():
                turn.__defaults__[0].send(0)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {what} | {name} | {spread} |", flush=True)
        write(technique=what, script=name, ratios=ratios)


def processor(args: Args) -> str:
    """The GPU's name, or what the kernel says of the CPU."""
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor()
    )


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)

    def write(**numbers) -> None:
        if args.output:
            with open(args.output, "a") as file:
                print(
                    json.dumps(numbers | {"device": args.device, "threads": args.threads}),
                    file=file,
                )

    print(f"{processor(args)}, {args.threads} threads, torch {torch.__version__},", end=" ")
    print(
        f"{args.shape[0]} + {args.shape[1]} dimensions, batch 256, median of {args.rounds} turns\n"
    )
    if args.techniques:
        techniques_table(args, write)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder, "data.hdf5"), args.shape)
        if args.profile:
            profile_table(args, folder, write)
            return
        speeds(args, folder, write)
    if args.knn:
        bonus_table(args, write)


if __name__ == "__main__":
    main(tyro.cli(Args))
