"""Plain recomputations of what the scripts batch, and a batch to try them on."""

import torch


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
