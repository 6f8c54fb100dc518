"""Times the scripts of one folder in a process of its own, for speed.py; turns.py has the protocol.

A request names a script, a kind of case, a mode, and what is wanted: "modes" (those that the script
has), "set up" (the mode in which it really runs), "flops" (of the matrix products of a call) or
"rate" (how often per second, over some seconds).
"""

import gc
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from subjects import cases_of, load_script, write_data
from torch.utils.flop_counter import FlopCounterMode
from turns import serve


@dataclass
class Args:
    """Time the scripts of a folder."""

    root: tyro.conf.Positional[Path]
    """where the scripts are"""
    shape: tuple[int, int]
    """dimensions of states and actions"""
    device: Literal["cpu", "cuda"]
    """where the networks are"""


class Timer:
    """Has the cases of one script at a time, each made when it is first asked for."""

    def __init__(self, args: Args, folder: Path):
        self.args = args
        self.folder = folder
        self.name = None
        self.subject = None
        self.cases = {}

    def answer(self, script: str, want: str, kind: str = "", mode: str = "", seconds: float = 0):
        if script != self.name:
            self.change_to(script)
        if want == "modes":
            return {"modes": self.subject.modes}
        if (kind, mode) not in self.cases:
            self.cases[kind, mode] = self.subject.case(kind, mode)
        case = self.cases[kind, mode]
        if want == "set up":
            return {"mode": case.mode}
        if want == "flops":
            return {"flops": flops_of(case.call)}
        return {"rate": case.turn(seconds)}

    def change_to(self, name: str) -> None:
        self.cases.clear()
        gc.collect()  # a run has a large buffer, and functions that point at the run
        script = load_script(name, self.args.shape)
        self.subject = cases_of(script, self.folder, self.args.device)
        self.name = name


def flops_of(call: Callable[[], object]) -> float:
    """Floating-point operations of a call's matrix products, on average of TD3+BC's two kinds."""
    calls = 4
    with FlopCounterMode(display=False) as counter:
        for _ in range(calls):
            call()
    return counter.get_total_flops() / calls


def main(args: Args) -> None:
    sys.path.insert(0, str(args.root))
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder, "data.hdf5"), args.shape)
        serve(Timer(args, Path(folder)).answer)


if __name__ == "__main__":
    main(tyro.cli(Args))
