"""Plain recomputations of what the scripts batch: one state, one action, one critic at a time."""

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
