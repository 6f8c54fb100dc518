"""--compile does what the plain update does, and gives way where there is no C++ compiler."""

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


def test_compile_option(script, monkeypatch, tmp_path, capsys):
    """--compile compiles the update once; --cudagraphs asks for PyTorch's own CUDA graphs."""
    made, calls = [], []

    def compiler(function, mode):
        made.append((function, mode))
        return lambda *inputs: calls.append(inputs) or function(*inputs)

    monkeypatch.setattr(torch, "compile", compiler)
    options = "--env hopper-medium-mini --device cpu --offline-steps 6 --online-steps 0 --eval-episodes 1"
    for number, extra in enumerate(([], ["--compile"], ["--compile", "--cudagraphs"])):
        script.main([*options.split(), "--run-dir", str(tmp_path / str(number)), *extra])
    assert made == [(script.update, None), (script.update, "reduce-overhead")] and len(calls) == 12
    assert capsys.readouterr().out.count("compile True") == 2


def test_no_compiler(script, monkeypatch):
    """Without a C++ compiler --compile is turned off, which the first line of a run then says."""
    assert script.parse_args(["--compile"]).compile is True
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert script.parse_args(["--compile"]).compile is False
