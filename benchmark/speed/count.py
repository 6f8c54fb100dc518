"""How many operations a training step dispatches: what its time on a GPU goes by.

    python benchmark/speed/count.py                            # a table, in a few seconds
    python benchmark/speed/count.py --scripts iql_sera --names # also which ones

Counted on the CPU, where a step dispatches the same operations but for the distances of the bonus:
one cdist here, four small operations there. No clock is involved. What does no work is not counted,
see the end of the output. An online step is sampling, bonus, one addition and update.
"""

import collections
import dataclasses
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]
from operations import NO_WORK, count_operations  # noqa: E402

SCRIPTS = ("cql_sera", "calql_sera", "sac_sera", "iql_sera", "td3bc_sera", "awac_sera")
OBSERVATION_DIM, ACTION_DIM, ROWS = 11, 3, 1000


@dataclass
class Args:
    """Count the operations of a training step."""

    scripts: tuple[str, ...] = SCRIPTS
    """which scripts"""
    names: bool = False
    """also print which operations, and how often each"""


def made_up_data() -> dict[str, np.ndarray]:
    """Transitions as load_d4rl gives them."""
    rng = np.random.default_rng(0)
    rows = np.arange(ROWS)
    return {
        "observations": rng.normal(size=(ROWS, OBSERVATION_DIM)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(ROWS, ACTION_DIM)).astype(np.float32),
        "rewards": rng.normal(size=ROWS).astype(np.float32),
        "next_observations": rng.normal(size=(ROWS, OBSERVATION_DIM)).astype(np.float32),
        "terminals": rows % 500 == 499,
        "episode_ends": rows % 250 == 249,
    }


def parts(script: ModuleType) -> dict[str, Callable[[], object]]:
    """The parts of an online step, each as a function: it can be called again and again."""
    args = script.Args(device="cpu")
    learning_args = dataclasses.replace(args, sera_critic="current")
    device = torch.device("cpu")
    torch.manual_seed(0)
    agent = script.Agent(OBSERVATION_DIM, ACTION_DIM, args)
    optimizer, _ = script.make_optimizer(agent, args)
    buffer = script.ReplayBuffer(made_up_data(), args, device)
    buffer.append(made_up_data())
    half = args.batch_size // 2
    rows = script.BatchRows(half, half)
    varying_dims = torch.arange(OBSERVATION_DIM)
    stored = buffer.sample(rows)
    asked = {name: column for name, column in stored.items() if name != "bonus_q"}

    def update(policy_due: bool, log: bool) -> None:
        kind = script.StepKind(True, rows, policy_due, log)
        script.update(agent, optimizer, stored, args, kind)

    def bonus(batch: dict, bonus_args, log: bool) -> None:
        script.intrinsic_reward(agent, batch, varying_dims, bonus_args, log)

    found = {
        "sampling": lambda: buffer.sample(rows),
        "update": lambda: update(True, False),
        "update, numbers to log": lambda: update(True, True),
        "bonus": lambda: bonus(stored, args, False),
        "bonus, numbers to log": lambda: bonus(stored, args, True),
        "bonus, learning critics": lambda: bonus(asked, learning_args, False),
    }
    if not script.policy_is_due(1, args):  # TD3+BC's delay
        found["update without the policy"] = lambda: update(False, False)
    return found


def counts(script: ModuleType) -> dict[str, collections.Counter]:
    """The operations of each part, by name."""
    found = {}
    for name, part in parts(script).items():
        part()  # once before: Adam's state and the psi table are made in the first call
        found[name] = count_operations(part)
    return found


HEADS = (
    "sampling",
    "update",
    "update without the policy",
    "update, numbers to log",
    "bonus",
    "bonus, numbers to log",
    "bonus, learning critics",
)


def main(args: Args) -> int:
    unknown = [name for name in args.scripts if name not in SCRIPTS]
    if unknown:
        print(f"error: there is no script {unknown[0]}.py", file=sys.stderr)
        return 2
    print(f"| script | {' | '.join(HEADS)} |")
    print("|---" * (len(HEADS) + 1) + "|")
    details = []
    for name in args.scripts:
        found = counts(importlib.import_module(name))
        cells = [str(found[head].total()) if head in found else "" for head in HEADS]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        for head, operations in found.items():
            listed = ", ".join(f"{count} {key}" for key, count in operations.most_common())
            details.append(f"{name}, {head}: {listed}")
    print(f"\nNot counted: views, record_function, {', '.join(sorted(NO_WORK))}.")
    if args.names:
        print("\n" + "\n".join(details))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
