"""AWAC against hand numbers and a slow recomputation; its weights, its policy, its weight decay."""

import copy
import math
from functools import partial

import pytest
import recompute
import torch
from recompute import linear_layers, make_batch, q_value

import awac_sera

make_agent = partial(recompute.make_agent, awac_sera)
updated = partial(recompute.updated, awac_sera)


# ------------------------------ agent
def make_constant(network, *outputs):
    """Let a network give these outputs, or critics one each, for every input."""
    with torch.no_grad():
        *others, last = network.parameters()
        for parameter in others:
            parameter.zero_()
        last.copy_(torch.tensor(outputs).reshape(last.shape))


def set_log_std(agent, *values):
    """Set the policy's log standard deviations, by the inverse of 6 sigmoid(x) - 6."""
    log_std = torch.tensor(values)
    agent.actor.log_std_logits.data = torch.log((6 + log_std) / -log_std)


def test_policy_distribution():
    """The mean is tanh of the network; log sigma one parameter for all states, within [-6, 0]."""
    agent, _, args = make_agent()
    observations = torch.randn(3, 4)
    policy = agent.actor(observations)
    torch.testing.assert_close(policy.mean, agent.actor.layers(observations).tanh())
    assert (policy.mean[0] != policy.mean[1]).all()
    assert torch.equal(policy.stddev[0], policy.stddev[1])
    make_constant(agent.actor.layers, 0.5, -30.0)
    for logits, expected in (
        ([0, math.log(2)], [-3.0, -2]),
        ([-100, 100], [-6.0, 0]),
        ([-2, 2], [-5.2848, -0.7152]),
    ):
        agent.actor.log_std_logits.data.copy_(torch.tensor(logits))
        policy = agent.actor(observations)
        torch.testing.assert_close(policy.mean, torch.tensor([[math.tanh(0.5), -1]] * 3))
        log_std = policy.stddev.log()
        torch.testing.assert_close(log_std, torch.tensor([expected] * 3), rtol=0, atol=5e-5)
    fresh = awac_sera.Agent(4, 2, args).actor(observations)
    torch.testing.assert_close(fresh.stddev.log(), torch.full((3, 2), -3.0))


def test_initial_networks():
    """Targets start as copies of the critics; three hidden layers everywhere."""
    agent = awac_sera.Agent(11, 3, awac_sera.Args(device="cpu"))
    for critic, target in zip(agent.critics.parameters(), agent.target_critics.parameters()):
        assert torch.equal(critic, target)
        assert critic is not target
        assert not torch.equal(critic[0], critic[1])
    shapes = [tuple(layer.weight.shape[1:]) for layer in linear_layers(agent.critics)]
    assert shapes == [(14, 256), (256, 256), (256, 256), (256, 1)]
    weights = [weight for weight in agent.actor.layers.parameters() if weight.dim() == 2]
    shapes = [tuple(weight.shape) for weight in weights]
    assert shapes == [(256, 11), (256, 256), (256, 256), (3, 256)]


def test_act():
    """To evaluate, the mean, without a random number; to explore, a sample, cut to [-1, 1]."""
    agent, _, _ = make_agent()
    set_log_std(agent, -0.5, -0.1)
    with torch.no_grad():
        observations = torch.randn(64, 4)
        mean = agent.actor.layers(observations).tanh()
        torch.manual_seed(3)
        random_state = torch.get_rng_state()
        assert torch.equal(agent.act(observations, deterministic=True), mean)
        assert torch.equal(torch.get_rng_state(), random_state)
        actions = agent.act(observations, deterministic=False)
        torch.manual_seed(3)
        samples = mean + torch.tensor([-0.5, -0.1]).exp() * torch.randn(64, 2)
    assert (samples.abs() > 1).any(0).all()
    assert (samples.abs() < 1).any(0).all()
    torch.testing.assert_close(actions, samples.clamp(-1, 1))
    assert actions.abs().max() == 1


def test_evaluation_within_bounds():
    """However large the policy's outputs, an evaluated action is one that environments take."""
    agent, _, _ = make_agent()
    agent.actor.layers[-1].weight.data *= 100
    observations = 10 * torch.randn(64, 4)
    outputs = agent.actor.layers(observations)
    actions = agent.act(observations, deterministic=True)
    assert outputs.abs().max() > 100
    assert 0.999 < actions.abs().max() <= 1
    assert torch.equal(actions.sign(), outputs.sign())


def q_values_of(critics, states, actions):
    """Both critics' values (2, B), one by one."""
    values = []
    for j in (0, 1):
        values.append([q_value(critics, j, *pair).item() for pair in zip(states, actions)])
    return torch.tensor(values)


def test_value_and_bonus():
    """--sera-bonus v conditions on the lower critic at the mean action, q at the batch's."""
    agent, _, args = make_agent(sera_k=2)
    batch = make_batch(batch_size=12)
    batch["observations"] *= 0.1  # close states: how far two values are apart then matters
    agent.actor.layers[0].weight.data *= 20  # yet the policy acts differently in them
    states = batch["observations"]
    means = agent.critics(states, batch["actions"]).mean(1)  # without: one critic is always lower
    linear_layers(agent.critics)[-1].bias.data -= means[:, None, None]
    conditions, bonuses = {}, {}
    for name, actions in (("v", agent.actor.layers(states).tanh()), ("q", batch["actions"])):
        q_values = q_values_of(agent.critics, states, actions)
        assert len((q_values[0] < q_values[1]).unique()) == 2
        conditions[name] = q_values.amin(0)
        entropy, _, _ = awac_sera.q_conditioned_entropy(states, conditions[name], 2)
        args.sera_bonus = name
        bonuses[name], _ = awac_sera.intrinsic_reward(agent, batch, torch.arange(4), args, False)
        torch.testing.assert_close(bonuses[name], entropy.tanh())
    torch.testing.assert_close(agent.value(states), conditions["v"])
    assert (bonuses["v"] - bonuses["q"]).abs().max() > 0.01


# ------------------------------ the weights
@pytest.mark.parametrize(
    ("kind", "awac_lambda", "advantages", "expected"),
    [
        ("softmax", 2.0, [0, 2], [0.537883, 1.462117]),
        ("softmax", 0.5, [1, 1, 1, -100], [4 / 3, 4 / 3, 4 / 3, 0]),
        ("softmax", 2.0, [300, 300], [1, 1]),  # exp alone would be infinite
        ("exp", 2.0, [0, 2, 10], [1, math.e, 100]),
        ("exp", 1 / 3, [-1, 1, 1.5, 2, 1000], [0.0497871, 20.0855, 90.0171, 100, 100]),
    ],
)
def test_weights_by_hand(kind, awac_lambda, advantages, expected):
    """Softmax weights of a batch of two at lambda 2; exp weights up to the clip at 100."""
    args = awac_sera.Args(advantage_weights=kind, awac_lambda=awac_lambda)
    weights = awac_sera.awac_weights(torch.tensor(advantages).float(), args)
    torch.testing.assert_close(weights, torch.tensor(expected).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 256])
def test_softmax_weights_average_one(batch_size):
    """Whatever the level of Q; two weights differ by exp of (A - A') / lambda."""
    torch.manual_seed(0)
    advantages = 3 * torch.randn(batch_size)
    args = awac_sera.Args(awac_lambda=1.5)
    for shift in (0, -500):
        weights = awac_sera.awac_weights(advantages + shift, args)
        assert weights.mean().item() == pytest.approx(1, rel=1e-5)
        ratio = ((advantages[0] - advantages[1]) / 1.5).exp().item()
        assert (weights[0] / weights[1]).item() == pytest.approx(ratio, rel=1e-3)


def test_options():
    """Softmax is the default, exp can be chosen; k is 20 for walker2d; rewards are raw."""
    args = awac_sera.parse_args(["--env", "walker2d-medium-v2"])
    assert (args.advantage_weights, args.awac_lambda) == ("softmax", 2)
    assert (args.weight_decay, args.sera_k) == (1e-4, 20)
    args = awac_sera.parse_args(["--advantage-weights", "exp", "--awac-lambda", "0.3"])
    assert (args.advantage_weights, args.awac_lambda, args.sera_k) == ("exp", 0.3, 10)
    for env in ("hopper-medium-v2", "hopper-medium-mini", "halfcheetah-medium-v2", "ant-medium-v2"):
        args = awac_sera.parse_args(["--env", env])
        assert not args.normalize_rewards
        assert args.sera_k == 10
        assert (args.offline_steps < 250_000) == (env == "hopper-medium-mini")


# ------------------------------ the update
def slow_losses(agent, batch, args, seed):
    """Gradients by network, and what is logged, of eqs. (1) to (4), in float64.

    One row and one critic at a time; random numbers as `update` draws them after the same seed.
    """
    agent = copy.deepcopy(agent).double()
    batch = {name: column.double() for name, column in batch.items()}
    actor, critics, targets = agent.actor, agent.critics, agent.target_critics
    log_std = 6 / (1 + torch.exp(-actor.log_std_logits)) - 6
    torch.manual_seed(seed)
    next_noise = torch.randn(batch["actions"].shape).double()
    noise = torch.randn(batch["actions"].shape).double()
    count = len(noise)
    td_terms, log_probs, advantages, policy_values = [], [], [], []
    for i, y in enumerate(batch["rewards"]):
        state, action = batch["observations"][i], batch["actions"][i]
        next_state = batch["next_observations"][i]
        if not batch["terminals"][i]:
            next_action = actor.layers(next_state).tanh() + log_std.exp() * next_noise[i]
            next_action = next_action.detach().clamp(-1, 1)
            y = y + args.gamma * min(q_value(targets, j, next_state, next_action) for j in (0, 1))
        q_data = [q_value(critics, j, state, action) for j in (0, 1)]
        td_terms += [(q - y.detach()) ** 2 for q in q_data]
        mean = actor.layers(state).tanh()
        sample = (mean + log_std.exp() * noise[i]).clamp(-1, 1)
        policy_values.append(min(q_value(critics, j, state, sample).item() for j in (0, 1)))
        advantages.append(min(q_data).item() - policy_values[-1])
        errors = (action - mean) / log_std.exp()
        log_densities = -(errors**2) / 2 - log_std - math.log(2 * math.pi) / 2
        log_probs.append(log_densities[0] + log_densities[1])
    weights = [math.exp(advantage / args.awac_lambda) for advantage in advantages]
    if args.advantage_weights == "softmax":
        total = sum(weights)
        weights = [count * weight / total for weight in weights]
    else:
        weights = [min(weight, 100) for weight in weights]
    actor_loss = sum(-weight * log_prob for weight, log_prob in zip(weights, log_probs)) / count
    td_loss = sum(td_terms) / count
    gradients = {
        "actor": torch.autograd.grad(actor_loss, list(actor.parameters())),
        "critics": torch.autograd.grad(td_loss, list(critics.parameters())),
    }
    return gradients, {
        "td": td_loss.item(),
        "actor": actor_loss.item(),
        "max_weight": max(weights),
        "advantage": sum(advantages) / count,
        "q_policy": sum(policy_values) / count,
        "log_prob": sum(log_prob.item() for log_prob in log_probs) / count,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"awac_lambda": 0.5},
        {"advantage_weights": "exp", "awac_lambda": 0.1, "gamma": 0.5},
        {"weight_decay": 0.5},
    ],
)
def test_update_by_loops(changes):
    """Losses and the gradient of every parameter, from its own loss alone, equal the slow ones.

    Also at a second update, so that nothing is left over from the first.
    """
    agent, optimizer, args = make_agent(actor_lr=0.01, critic_lr=0.01, **changes)
    set_log_std(agent, -0.5, -0.1)  # wide enough for samples beyond [-1, 1]
    for seed in (7, 8):
        gradients, expected = slow_losses(agent, make_batch(seed), args, seed=seed)
        logs = updated(agent, optimizer, make_batch(seed), args, seed=seed)
        for name, value in expected.items():
            assert logs[f"losses/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        for name, slow_gradients in gradients.items():
            for parameter, slow in zip(getattr(agent, name).parameters(), slow_gradients):
                assert slow.any(), name
                tolerance = {"rtol": 1e-3, "atol": 1e-4 * slow.abs().max().item()}
                torch.testing.assert_close(parameter.grad.double(), slow, **tolerance)


def test_first_step_by_hand():
    """Adam's first step: --actor-lr for the policy, --critic-lr for the critics.

    The policy's gradient gets 0.5 times the parameter on top, the critics' does not.
    """
    agent, optimizer, args = make_agent(actor_lr=0.1, critic_lr=0.03, weight_decay=0.5)
    set_log_std(agent, -0.5, -0.1)
    before = copy.deepcopy(agent).double()
    batch = make_batch()
    gradients, _ = slow_losses(agent, batch, args, 7)
    updated(agent, optimizer, batch, args)
    turned = 0
    for name, rate, decay in (("actor", 0.1, 0.5), ("critics", 0.03, 0.0)):
        news, olds = getattr(agent, name).parameters(), getattr(before, name).parameters()
        for new, old, slow in zip(news, olds, gradients[name]):
            gradient = slow + decay * old.detach()
            expected = old.detach() - rate * gradient / (gradient.abs() + 1e-8)
            torch.testing.assert_close(new.detach().double(), expected, rtol=0, atol=1e-4)
            average = optimizer.state[new]["exp_avg"].double()
            tolerance = {"rtol": 1e-3, "atol": 1e-5 * gradient.abs().max().item()}
            torch.testing.assert_close(average, 0.1 * gradient, **tolerance)
            turned += (gradient * slow < 0).sum().item()
    assert turned > 10  # a decay outside Adam's gradient would step the other way there


@pytest.mark.parametrize("log_std", [-5.5, -0.5])
def test_target_by_hand(log_std):
    """Q = 0, targets 6 and 4, r = 1, gamma 0.5: y is 3, or 1 at a terminal, of any policy."""
    agent, optimizer, args = make_agent(gamma=0.5)
    make_constant(agent.critics, 0.0, 0.0)
    make_constant(agent.target_critics, 6.0, 4.0)
    set_log_std(agent, log_std, log_std)
    batch = make_batch()
    batch["rewards"].fill_(1.0)
    td = updated(agent, optimizer, batch, args)["losses/td"]
    assert td == pytest.approx(2 * (4 * 9 + 2 * 1) / 6, rel=1e-5)


def test_sampled_actions_are_cut():
    """Q_j = +-2 a, Q'_j = +-5 a with a the action's first number, of mean 1 and deviation 1.

    The lower ones are -2 |a| and -5 |a|: y = r - 5 gamma m |a'| and A = 2 |a~| - 2 |a|, with no
    |a| above 1.
    """
    agent, optimizer, args = make_agent(critic_layers=0)
    make_constant(agent.actor.layers, 30.0, 30.0)
    agent.actor.log_std_logits.data.fill_(100.0)
    for critics, slope in ((agent.critics, 2.0), (agent.target_critics, 5.0)):
        make_constant(critics, 0.0, 0.0)
        linear_layers(critics)[0].weight.data[:, 4, 0] = torch.tensor([slope, -slope])
    batch = make_batch(batch_size=32)
    torch.manual_seed(7)
    samples = [1 + torch.randn(32, 2)[:, 0] for _ in range(2)]
    assert all(sample.max() > 1.5 for sample in samples)
    assert all(sample.min() < 0 for sample in samples)
    next_sizes, sizes = (sample.clamp(-1, 1).abs() for sample in samples)
    targets = batch["rewards"] - 5 * 0.99 * (1 - batch["terminals"]) * next_sizes
    advantages = 2 * sizes - 2 * batch["actions"][:, 0].abs()
    td = sum((q * batch["actions"][:, 0] - targets).square().mean() for q in (2, -2))
    logs = updated(agent, optimizer, batch, args)
    assert logs["losses/td"] == pytest.approx(td.item(), rel=1e-5)
    assert logs["losses/q_policy"] == pytest.approx(-2 * sizes.mean().item(), rel=1e-5)
    assert logs["losses/advantage"] == pytest.approx(advantages.mean().item(), rel=1e-5)
    weights = (advantages / 2).exp()
    largest = (weights.max() / weights.mean()).item()
    assert logs["losses/max_weight"] == pytest.approx(largest, rel=1e-5)
