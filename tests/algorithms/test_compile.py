"""What torch.compile makes of a bonus and an update does what the plain functions do."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
from recompute import make_agent, make_batch, make_kind

import sac_sera

COMPILER = os.environ.get("CXX", "g++")


def make_run(script):
    """As much of a run as compile_functions asks for, with a schedule of rates over 4 updates."""
    agent, _, args = make_agent(script, offline_steps=4, sera_k=2)
    optimizer, scheduler = script.make_optimizer(agent, args)
    return SimpleNamespace(
        agent=agent, optimizer=optimizer, scheduler=scheduler, compiled=None
    ), args


def four_updates(script, run, args):
    """Bonuses and parameters of four updates from one seed, as in a run."""
    pay, learn = run.compiled or (script.intrinsic_reward, script.update)
    torch.manual_seed(7)
    bonuses = []
    for number in range(1, 5):
        batch = make_batch(seed=number)
        bonus, _ = pay(run.agent, batch, torch.arange(4), args, False, None)
        bonuses.append(bonus)
        batch["rewards"] = batch["rewards"] + bonus
        due = script.policy_is_due(number, args)
        kind = make_kind(script, online=True, policy_due=due, log=False)
        assert learn(run.agent, run.optimizer, batch, args, kind) == {}
        if run.scheduler:
            run.scheduler.step()
    return bonuses, run.agent.state_dict()


@pytest.mark.skipif(not shutil.which(COMPILER), reason="needs a C++ compiler: g++, or CXX")
def test_compiled_functions(script):
    """Eager and compiled agree within float tolerance: the noise, delays and rates of each step."""
    torch._dynamo.reset()
    plain, args = make_run(script)
    start = plain.agent.critics.layers[0].weight.detach().clone()
    expected = four_updates(script, plain, args)
    assert (plain.agent.critics.layers[0].weight - start).abs().max() > 1e-3
    run, args = make_run(script)
    run.compiled = script.compile_functions(run)
    with torch._inductor.config.patch(fallback_random=True):  # the noise of eager mode
        found = four_updates(script, run, args)
    assert run.compiled  # it has not gone on without
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError("no Triton here\nlong story"), AssertionError()])
def test_without_a_compiler(error, monkeypatch, capsys):
    """Whatever it raises, a run goes on with the plain functions, and says so once."""

    def failing(agent, *args):
        agent.critics.requires_grad_(False)  # as an update does for a while
        raise error

    monkeypatch.setattr(torch, "compile", lambda function, **options: failing)
    plain, args = make_run(sac_sera)
    expected = four_updates(sac_sera, plain, args)
    run, args = make_run(sac_sera)
    run.compiled = sac_sera.compile_functions(run)
    found = four_updates(sac_sera, run, args)
    assert run.compiled is None
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    reason = str(error).split("\n")[0] or "AssertionError"
    said = f"torch.compile does not work here ({reason}): going on without\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("error", "is_recording"),
    [(torch.OutOfMemoryError("full"), False), (RuntimeError("not captured"), True)],
)
def test_what_is_no_fault_of_the_compiler(error, is_recording, monkeypatch):
    """A full GPU, and an operation that a recording does not take, are somebody else's to name."""

    def failing(*args):
        raise error

    monkeypatch.setattr(torch, "compile", lambda function, **options: failing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_recording)
    run, args = make_run(sac_sera)
    run.compiled = sac_sera.compile_functions(run)
    with pytest.raises(type(error), match=str(error)):
        four_updates(sac_sera, run, args)
    assert run.compiled
