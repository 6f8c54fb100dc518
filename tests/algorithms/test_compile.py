"""torch.compile can be put around an update, and does what the plain one does."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from recompute import make_batch, make_networks

pytestmark = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler: g++, or CXX"
)


def four_updates(script, update):
    """Parameters and logs after four offline updates from one seed: step counts on, as in a run."""
    networks, optimizer, args = make_networks(script, offline_steps=4)
    state = SimpleNamespace(networks=networks, optimizer=optimizer, phase="offline", step=0)
    torch.manual_seed(7)
    logs = {}
    for state.step in range(1, 5):
        logs |= update(state, make_batch(seed=state.step), args)
    return networks.state_dict(), {name: float(value) for name, value in logs.items()}


def test_compiled_update(script):
    """Eager and compiled agree within float tolerance: the noise, the delays and the rates of each step."""
    torch._dynamo.reset()
    parameters, logs = four_updates(script, script.update)
    compiled = torch.compile(script.update, options={"fallback_random": True})  # the noise of eager mode
    compiled_parameters, compiled_logs = four_updates(script, compiled)
    torch.testing.assert_close(compiled_parameters, parameters, rtol=1e-4, atol=1e-5)
    assert compiled_logs == pytest.approx(logs, rel=1e-3, abs=1e-4)
    start = make_networks(script)[0].state_dict()
    assert (start["critics.weights.0"] - parameters["critics.weights.0"]).abs().max() > 1e-3
