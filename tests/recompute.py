"""Plain recomputations of what the scripts batch, and small networks and a batch to try them on."""

from types import SimpleNamespace

import torch

# Ways through the update of CQL and Cal-QL.
CQL_VARIANTS = {
    "plain": {},
    "one action": {"cql_actions": 1, "gamma": 0.5, "cql_weight": 0.3},
    "max backup": {"max_backup": True},
    "lagrange": {"cql_lagrange": True, "cql_weight": 2.0, "cql_gap": 0.4},
    "wide gap": {"cql_lagrange": True, "cql_gap": 9.0},
}


def q_value(critics, j, state, action):
    """One number from one state and one action, by plain products."""
    x = torch.cat([state, action])
    for weight, bias in zip(critics.weights, critics.biases):
        last = weight is critics.weights[-1]
        x = x @ weight[j] + bias[j, 0]
        x = x if last else x.clamp(min=0)
    return x[0]


def policy_sample(actor, state, noise):
    """One action and its log-density, by the textbook formula; exact enough in float64."""
    mean, log_std = actor(state)
    u = mean + log_std.exp() * noise
    density = torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - torch.log(1 - u.tanh() ** 2)
    return u.tanh(), density.sum()


def make_batch(seed=0, batch_size=6):
    """A batch of noise, two rows of which are terminals, with returns-to-go amid the networks' values."""
    torch.manual_seed(100 + seed)
    batch = {name: torch.randn(batch_size, 4) for name in ("observations", "next_observations")}
    batch["actions"] = torch.rand(batch_size, 2) * 2 - 1
    batch |= {"rewards": torch.randn(batch_size), "mc_returns": torch.randn(batch_size)}
    batch["terminals"] = torch.zeros(batch_size)
    batch["terminals"][1], batch["terminals"][4] = 1, 1
    return batch


def make_args(script, **changes):
    """Arguments for tiny networks on the CPU."""
    return script.Args(**({"device": "cpu", "hidden_dim": 8} | changes))


def make_networks(script, seed=0, **changes):
    """Networks for 4 state and 2 action dimensions with random parameters, their optimiser, the arguments.

    Random in every parameter: none is zero, and targets are not the networks they follow.
    """
    args = make_args(script, **changes)
    torch.manual_seed(seed)
    networks, optimizer = script.make_networks(4, 2, args)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.uniform_(-0.8, 0.8)
    return networks, optimizer, args


def updated(script, networks, optimizer, batch, args, step=1, phase="offline", seed=7):
    """The logs of one update after a seed, as numbers."""
    torch.manual_seed(seed)
    state = SimpleNamespace(networks=networks, optimizer=optimizer, phase=phase, step=step)
    return {name: float(value) for name, value in script.update(state, batch, args).items()}
