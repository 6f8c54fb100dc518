"""Plain recomputations of what the scripts batch, and small agents and a batch to try them on."""

import numpy as np
import torch

# Ways through the update of CQL and Cal-QL.
CQL_VARIANTS = {
    "plain": {},
    "one action": {"cql_actions": 1, "gamma": 0.5, "cql_weight": 0.3},
    "max backup": {"cql_max_target_backup": True},
    "lagrange": {"cql_lagrange": True, "cql_weight": 2.0, "cql_gap": 0.4},
    "wide gap": {"cql_lagrange": True, "cql_gap": 9.0},
}


def linear_layers(critics):
    """The layers of twin critics that have weights (2, in, out) and biases (2, 1, out)."""
    return [layer for layer in critics.layers if hasattr(layer, "weight")]


def q_value(critics, j, state, action):
    """One number from one state and one action, by plain products."""
    x = torch.cat([state, action])
    *hidden, last = linear_layers(critics)
    for layer in hidden:
        x = (x @ layer.weight[j] + layer.bias[j, 0]).clamp(min=0)
    return (x @ last.weight[j] + last.bias[j, 0])[0]


def policy_sample(actor, state, noise):
    """One action and its log-density, by the textbook formula; exact enough in float64."""
    mean, log_std = actor(state)
    u = mean + log_std.exp() * noise
    density = torch.distributions.Normal(mean, log_std.exp()).log_prob(u)
    density = density - torch.log(1 - u.tanh() ** 2)
    return u.tanh(), density.sum()


def make_batch(seed=0, batch_size=6):
    """A batch of noise, two rows of which are terminals, with returns-to-go amid the values."""
    torch.manual_seed(100 + seed)
    batch = {name: torch.randn(batch_size, 4) for name in ("observations", "next_observations")}
    batch["actions"] = torch.rand(batch_size, 2) * 2 - 1
    batch |= {"rewards": torch.randn(batch_size), "mc_returns": torch.randn(batch_size)}
    batch["online"] = (torch.arange(batch_size) % 2).float()
    batch["terminals"] = torch.zeros(batch_size)
    batch["terminals"][1] = 1
    batch["terminals"][4] = 1
    return batch


def make_args(script, **changes):
    """Arguments for tiny networks on the CPU."""
    return script.Args(**({"device": "cpu", "hidden_dim": 8} | changes))


def make_agent(script, seed=0, **changes):
    """An agent for 4 state and 2 action dimensions, its optimizer, the arguments.

    Its parameters are random: none is zero, and targets are not the networks they follow.
    """
    args = make_args(script, **changes)
    torch.manual_seed(seed)
    agent = script.Agent(4, 2, args)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.uniform_(-0.8, 0.8)
    optimizer, _ = script.make_optimizer(agent, args)
    return agent, optimizer, args


def make_kind(script, online=False, policy_due=True, log=True, rows=(6, 0)):
    """What kind of step an update is told that it is."""
    return script.StepKind(
        online=online,
        rows=script.BatchRows(*rows),
        policy_due=policy_due,
        log=log,
    )


def updated(script, agent, optimizer, batch, args, seed=7, **kind):
    """The logs of one update after a seed, as numbers."""
    torch.manual_seed(seed)
    logs = script.update(agent, optimizer, batch, args, make_kind(script, **kind))
    return {name: float(value) for name, value in logs.items()}


def summed_returns(rewards, episode_ends, gamma):
    """Return-to-go (N,): for every row the discounted sum over its trajectory from there on."""
    returns = np.zeros(len(rewards))
    for first in range(len(rewards)):
        discount = 1.0
        for row in range(first, len(rewards)):
            returns[first] += discount * float(rewards[row])
            discount *= gamma
            if episode_ends[row]:
                break
    return returns


def make_rows(rows=20, timeouts=(), terminals=(), first=0):
    """Transitions as load_d4rl names them, of 4 state and 2 action dimensions.

    The rewards count up from first, so that rows can be told apart. The last row ends a trajectory.
    """
    rng = np.random.default_rng(first)
    index = np.arange(rows)
    return {
        "observations": rng.normal(3, 2, size=(rows, 4)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(rows, 2)).astype(np.float32),
        "rewards": (first + index).astype(np.float32),
        "next_observations": rng.normal(3, 2, size=(rows, 4)).astype(np.float32),
        "terminals": np.isin(index, terminals),
        "episode_ends": np.isin(index, [*timeouts, *terminals, rows - 1]),
    }
