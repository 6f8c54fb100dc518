"""What every test file needs: the scripts as modules, and where optional real data lie."""

import importlib
import os
import signal
import sys
from pathlib import Path

import pytest

# The networks here are tiny: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test asks the network for D4RL's data: nothing listens there.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:1"
# Started in the background or by nohup, pytest would hand ignored signals on to the runs it tests.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*_sera.py"))
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tools")]


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn, imported as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def real_data() -> Path:
    """The folder of genuine D4RL samples that SERA_TEST_DATA names; else the test is skipped."""
    folder = os.environ.get("SERA_TEST_DATA")
    if not folder:
        pytest.skip("SERA_TEST_DATA is not set: no genuine D4RL samples at hand")
    return Path(folder)
