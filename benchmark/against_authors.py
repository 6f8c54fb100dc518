"""Our updates beside those of others: the same weights, batches and noise in, the same weights out.

    python benchmark/against_authors.py --td3-bc TD3_BC --corl CORL --cql CQL --rlkit rlkit
    python benchmark/against_authors.py --cal-ql Cal-QL --iql implicit_q_learning   # these need JAX

Each option names a checkout of code by others, a peer. Our first weights go into its networks; then
both sides make the same number of updates in float64, each by its own code, on the same batches.
Whatever they sample comes from one list of prepared noise, and the shape of each draw is checked.
The table has the largest difference, after any update, of any weight, targets and temperatures
included, and of any loss that the peer returns. The control is the same for our side with another
discount. docs/faithfulness.md tells more; requirements-authors.txt beside this file has
the packages that the peers' code needs.

Exits 1 if weights or losses differ by more than 1e-9, or if the control does by less than 1e-6.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from authors import cal_ql_loader
from authors.jax_peers import CalQl, CqlOfCalQl, Iql
from authors.noise import Noise, NoiseError, NoiseQueue, torch_samplers
from authors.sides import SHAPE, Ours, Peer, check_same_names
from authors.torch_peers import (
    CorlAwac,
    CorlCalQl,
    CorlCql,
    CorlIql,
    CorlSacN,
    CorlTd3Bc,
    CqlAuthors,
    Rlkit,
    SacOfCqlAuthors,
    Td3Bc,
)
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

GAMMA, CONTROL_GAMMA = 0.99, 0.98
LIMIT, CONTROL_LIMIT = 1e-9, 1e-6  # of differences: rounding stays below, a mistake far above
HEADS = ("algorithm", "peer", "commit", "with", "updates", "weights", "losses", "control")


@dataclass
class Args:
    """Compare our updates with those of others."""

    td3_bc: Path | None = None
    """a checkout of github.com/sfujim/TD3_BC"""
    corl: Path | None = None
    """a checkout of github.com/tinkoff-ai/CORL"""
    cql: Path | None = None
    """a checkout of github.com/young-geng/CQL"""
    cal_ql: Path | None = None
    """a checkout of github.com/nakamotoo/Cal-QL; needs JAX"""
    iql: Path | None = None
    """a checkout of github.com/ikostrikov/implicit_q_learning; needs JAX"""
    rlkit: Path | None = None
    """a checkout of github.com/rail-berkeley/rlkit"""
    updates: int = 40
    """how many updates both sides make"""
    batch_size: int = 64
    """transitions of a batch"""
    seed: int = 1
    """of first weights, batches and noise"""


# ------------------------------ what is compared
class Checkout(NamedTuple):
    """What an option has to name."""

    repository: str
    file: str  # that is in it


CHECKOUTS = {
    "td3_bc": Checkout("sfujim/TD3_BC", "TD3_BC.py"),
    "corl": Checkout("tinkoff-ai/CORL", "algorithms/finetune/cal_ql.py"),
    "cql": Checkout("young-geng/CQL", "SimpleSAC/conservative_sac.py"),
    "cal_ql": Checkout("nakamotoo/Cal-QL", "JaxCQL/conservative_sac.py"),
    "iql": Checkout("ikostrikov/implicit_q_learning", "learner.py"),
    "rlkit": Checkout("rail-berkeley/rlkit", "rlkit/torch/sac/awac_trainer.py"),
}


class Case(NamedTuple):
    """A row of the table."""

    algorithm: str
    script: str
    option: str  # one of CHECKOUTS
    peer: type[Peer]
    options: dict[str, Any]  # of our script
    given: str = ""  # what of theirs was changed, so that both sides mean the same


# The policy's rate falls within a few updates.
COSINE = {"actor_lr_schedule": "cosine", "offline_steps": 100}
OTHER_ORDER = "V after its step; Adam's epsilon halved"
EXP = {"advantage_weights": "exp", "awac_lambda": 1 / 3}
THREE = {"actor_layers": 3, "critic_layers": 3}  # CORL has no other policies
LAGRANGE = {"cql_lagrange": True, "cql_gap": 0.8}
ANTMAZE = LAGRANGE | {"cql_max_target_backup": True}  # as the preset
CASES = [
    Case("TD3+BC", "td3bc_sera", "td3_bc", Td3Bc, {}),
    Case("TD3+BC", "td3bc_sera", "corl", CorlTd3Bc, {}),
    Case("IQL", "iql_sera", "iql", Iql, {}),
    Case("IQL, cosine", "iql_sera", "iql", Iql, COSINE),
    Case("IQL, cosine", "iql_sera", "corl", CorlIql, COSINE, OTHER_ORDER),
    Case("AWAC", "awac_sera", "rlkit", Rlkit, {}, "sampled actions cut"),
    Case("AWAC, exp", "awac_sera", "corl", CorlAwac, EXP, "policy as rlkit's; losses before steps"),
    Case("SAC", "sac_sera", "cql", SacOfCqlAuthors, {}, "log sigma in [-5, 2], untransformed"),
    Case("SAC", "sac_sera", "corl", CorlSacN, THREE, "N = 2; exact density; losses before steps"),
    Case("CQL", "cql_sera", "cql", CqlAuthors, {}),
    Case("CQL", "cql_sera", "corl", CorlCql, THREE),
    Case("CQL", "cql_sera", "cal_ql", CqlOfCalQl, {}),
    Case("CQL, Lagrange", "cql_sera", "cql", CqlAuthors, LAGRANGE),
    Case("CQL, AntMaze", "cql_sera", "cql", CqlAuthors, ANTMAZE, "next actions reused"),
    Case("Cal-QL", "calql_sera", "cal_ql", CalQl, {}),
    Case("Cal-QL", "calql_sera", "corl", CorlCalQl, THREE),
    Case("Cal-QL, AntMaze", "calql_sera", "cal_ql", CalQl, ANTMAZE, "next actions reused"),
]
LOADER_CASE = Case("Cal-QL, data and returns", "calql_sera", "cal_ql", CalQl, {})


class Found(NamedTuple):
    """The largest differences; losses are None if the peer returns none."""

    weights: float
    losses: float | None
    control: float  # of weights, where our side has another discount


def made_up_batch(rng: np.random.Generator, rows: int) -> dict[str, Tensor]:
    """Transitions of noise. Returns-to-go lie amid the values, so that some of them bound."""
    columns = {
        "observations": rng.standard_normal((rows, SHAPE[0])),
        "actions": rng.uniform(-1, 1, (rows, SHAPE[1])),
        "rewards": rng.standard_normal(rows),
        "next_observations": rng.standard_normal((rows, SHAPE[0])),
        "terminals": (rng.random(rows) < 0.2).astype(np.float64),
        "mc_returns": rng.standard_normal(rows),
    }
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def made_up_noise(rng: np.random.Generator, rows: int, repeats: int) -> dict[str, Noise]:
    """All that any update draws: for actions at s and at s', and for the conservative term's."""
    one, many = (rows, SHAPE[1]), (rows, repeats, SHAPE[1])
    shapes = {"policy": one, "next": one, "cql policy": many, "cql next": many}
    noise = {name: Noise("normal", rng.standard_normal(shape)) for name, shape in shapes.items()}
    return noise | {"uniform": Noise("uniform", rng.random(many))}


def one_update(side: Ours | Peer, batch: dict, noise: dict, samplers: Callable) -> dict[str, float]:
    """Let a side make an update on a copy of the batch, with the prepared noise and no other."""
    queue = NoiseQueue(noise, side.draws())
    copies = {name: column.clone() for name, column in batch.items()}
    with samplers(queue):
        losses = side.update(copies)
    queue.check_used_up()
    return losses


def check_same_noise(ours: Ours, theirs: Peer) -> None:
    """Both sides have to use all of the same noise, be it in another order."""
    used = []
    for side in (ours, theirs):
        names = set()
        for draw in side.draws():
            names |= {draw} if isinstance(draw, str) else set(draw)
        used.append(names)
    if used[0] != used[1]:
        raise NoiseError(f"{sorted(used[0])} here, {sorted(used[1])} there")


def weight_difference(ours: Ours, theirs: Peer) -> float:
    """The largest; NaN if any is. ValueError if the names differ or numbers are not float64."""
    our_weights, their_weights = theirs.ours_as_theirs(ours.weights()), theirs.weights()
    check_same_names(our_weights, their_weights)
    differences = []
    for name, here in our_weights.items():
        there = their_weights[name]
        if (here.dtype, there.dtype) != (torch.float64, torch.float64):
            raise ValueError(f"{name} is {here.dtype} here and {there.dtype} there")
        differences.append((here - there).abs().max())
    return float(torch.stack(differences).max())


def compare(case: Case, folder: Path, args: Args) -> Found:
    """Updates of theirs, of ours, and of the control: one batch and its noise for all three."""
    ours, control = (Ours(case.script, case.options, args.seed) for _ in range(2))
    theirs = case.peer(folder, ours.args)
    theirs.put(theirs.ours_as_theirs(ours.weights()))
    check_same_noise(ours, theirs)
    control.args.gamma = CONTROL_GAMMA
    rng = np.random.default_rng(args.seed)
    weights, losses, of_control = [], [], []
    for _ in range(args.updates):
        batch = made_up_batch(rng, args.batch_size)
        noise = made_up_noise(rng, args.batch_size, getattr(ours.args, "cql_actions", 1))
        their_losses = one_update(theirs, batch, noise, theirs.samplers)
        our_losses = one_update(ours, batch, noise, torch_samplers)
        one_update(control, batch, noise, torch_samplers)
        weights.append(weight_difference(ours, theirs))
        losses += [abs(our_losses[name] - their_losses[name]) for name in their_losses]
        of_control.append(weight_difference(control, theirs))
    return Found(*(float(np.max(x)) if x else None for x in (weights, losses, of_control)))


# ------------------------------ the program
def checkouts(args: Args) -> dict[str, Path]:
    """The folders that were named. ValueError for what is not there, or lacks packages."""
    folders = {}
    for option, checkout in CHECKOUTS.items():
        folder = getattr(args, option)
        if folder is None:
            continue
        flag = f"--{option.replace('_', '-')} {folder}"
        if not (folder / checkout.file).is_file():
            fix = f"give a checkout of github.com/{checkout.repository}"
            raise ValueError(f"{flag}: there is no {checkout.file} in it: {fix}")
        needed = {each for case in CASES if case.option == option for each in case.peer.needs}
        for package in sorted({each.split(".")[0] for each in needed}):
            if importlib.util.find_spec(package) is None:
                fix = "pip install -r benchmark/requirements-authors.txt"
                raise ValueError(f"{flag}: needs the package {package}: {fix}")
        folders[option] = folder.resolve()
    if not folders:
        raise ValueError("nothing to compare with: name a checkout, such as --td3-bc TD3_BC")
    return folders


def commit_of(folder: Path) -> str:
    """A checkout's commit, and whether files differ from it."""

    def git(*command: str) -> str:
        command = ("git", "-C", str(folder), *command)
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    if git("rev-parse", "--show-toplevel") != str(folder):
        return "unknown"
    return git("describe", "--always", "--dirty", "--abbrev=7", "--exclude", "*")


def is_as_it_should_be(found: Found) -> bool:
    """Also False for NaN."""
    agree = found.weights <= LIMIT and (found.losses is None or found.losses <= LIMIT)
    return agree and found.control >= CONTROL_LIMIT


def results(folders: dict[str, Path], args: Args) -> Iterator[tuple[Case, str, Found]]:
    """Each case with how much was compared, and the differences."""
    for case in CASES:
        if case.option in folders:
            yield case, str(args.updates), compare(case, folders[case.option], args)
    if "cal_ql" in folders:
        folder = folders["cal_ql"]
        same, other = (cal_ql_loader.largest_difference(folder, g) for g in (GAMMA, CONTROL_GAMMA))
        yield LOADER_CASE, f"{cal_ql_loader.FILES} files", Found(same, None, other)


def table_row(case: Case, folder: Path, amount: str, found: Found) -> str:
    cells = [case.algorithm, CHECKOUTS[case.option].repository, commit_of(folder)]
    cells += [case.given or "-", amount]
    cells += ["-" if number is None else f"{number:.0e}" for number in found]
    return f"| {' | '.join(cells)} |"


@contextlib.contextmanager
def float64_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def main(args: Args) -> int:
    try:
        folders = checkouts(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|", flush=True)
    wrong = 0
    with float64_by_default():
        for case, amount, found in results(folders, args):
            print(table_row(case, folders[case.option], amount, found), flush=True)
            wrong += not is_as_it_should_be(found)
    if wrong:
        limits = f"differences above {LIMIT:.0e} or a control below {CONTROL_LIMIT:.0e}"
        print(f"rows with {limits}: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
