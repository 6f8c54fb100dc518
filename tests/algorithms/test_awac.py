"""AWAC against hand numbers and a slow recomputation; its weights, its policy, its weight decay."""

import copy
import math
from functools import partial

import pytest
import recompute
import torch
from recompute import make_batch, q_value

import awac_sera

make_networks = partial(recompute.make_networks, awac_sera)
updated = partial(recompute.updated, awac_sera)


# ------------------------------ networks
def make_constant(network, *outputs):
    """Let a network give these outputs, or critics one each, for every input."""
    with torch.no_grad():
        *others, last = network.parameters()
        for parameter in others:
            parameter.zero_()
        last.copy_(torch.tensor(outputs).reshape(last.shape))


def set_log_std(networks, *values):
    """Set the policy's log standard deviations, between -6 and 0, by the inverse of 6 sigmoid(x) - 6."""
    log_std = torch.tensor(values)
    networks["actor"].log_std_logits.data = torch.log((6 + log_std) / -log_std)


def test_policy_distribution():
    """The mean is tanh of the network; log sigma is one parameter for all states, squashed into [-6, 0]."""
    networks, _, args = make_networks()
    observations = torch.randn(3, 4)
    policy = networks["actor"](observations)
    torch.testing.assert_close(policy.mean, networks["actor"].layers(observations).tanh())
    assert (policy.mean[0] != policy.mean[1]).all() and torch.equal(policy.stddev[0], policy.stddev[1])
    make_constant(networks["actor"].layers, 0.5, -30.0)
    for logits, expected in (
        ([0, math.log(2)], [-3.0, -2]),
        ([-100, 100], [-6.0, 0]),
        ([-2, 2], [-5.2848, -0.7152]),
    ):
        networks["actor"].log_std_logits.data.copy_(torch.tensor(logits))
        policy = networks["actor"](observations)
        torch.testing.assert_close(policy.mean, torch.tensor([[math.tanh(0.5), -1]] * 3))
        torch.testing.assert_close(policy.stddev.log(), torch.tensor([expected] * 3), rtol=0, atol=5e-5)
    fresh = awac_sera.make_networks(4, 2, args)[0]["actor"](observations)
    torch.testing.assert_close(fresh.stddev.log(), torch.full((3, 2), -3.0))


def test_initial_networks():
    """Targets start as copies of the critics; three hidden layers everywhere."""
    networks, _ = awac_sera.make_networks(11, 3, awac_sera.Args(device="cpu"))
    critics, target_critics = networks["critics"], networks["target_critics"]
    for critic, target in zip(critics.parameters(), target_critics.parameters()):
        assert torch.equal(critic, target) and critic is not target
        assert not torch.equal(critic[0], critic[1])
    shapes = [tuple(weight.shape[-2:]) for weight in critics.weights]
    assert shapes == [(14, 256), (256, 256), (256, 256), (256, 1)]
    shapes = [tuple(weight.shape) for weight in networks["actor"].layers.parameters() if weight.dim() == 2]
    assert shapes == [(256, 11), (256, 256), (256, 256), (3, 256)]


def test_act():
    """To evaluate, the mean, without a random number; to explore, a sample of the normal, cut to [-1, 1]."""
    networks, _, _ = make_networks()
    set_log_std(networks, -0.5, -0.1)
    with torch.no_grad():
        observations = torch.randn(64, 4)
        mean = networks["actor"].layers(observations).tanh()
        torch.manual_seed(3)
        random_state = torch.get_rng_state()
        assert torch.equal(awac_sera.act(networks, observations, deterministic=True), mean)
        assert torch.equal(torch.get_rng_state(), random_state)
        actions = awac_sera.act(networks, observations, deterministic=False)
        torch.manual_seed(3)
        samples = mean + torch.tensor([-0.5, -0.1]).exp() * torch.randn(64, 2)
    assert (samples.abs() > 1).any(0).all() and (samples.abs() < 1).any(0).all()
    torch.testing.assert_close(actions, samples.clamp(-1, 1))
    assert actions.abs().max() == 1


def test_evaluation_within_bounds():
    """However large the policy's outputs, an evaluated action is one that the environment takes."""
    networks, _, _ = make_networks()
    networks["actor"].layers[-1].weight.data *= 100
    observations = 10 * torch.randn(64, 4)
    outputs = networks["actor"].layers(observations)
    actions = awac_sera.act(networks, observations, deterministic=True)
    assert outputs.abs().max() > 100 and 0.999 < actions.abs().max() <= 1
    assert torch.equal(actions.sign(), outputs.sign())


def test_state_value_and_bonus():
    """--sera-bonus v conditions on the lower critic at the mean action, --sera-bonus q at the batch's."""
    networks, _, args = make_networks(sera_k=2)
    batch = make_batch(batch_size=12)
    batch["observations"] *= 0.1  # close states: how far two values are apart then matters
    states, critics = batch["observations"], networks["critics"]
    means = critics(states, batch["actions"]).mean(1)  # without them now one is the lower, now the other
    critics.biases[-1].data -= means[:, None, None]
    expected = {}
    for name, actions in (("v", networks["actor"].layers(states).tanh()), ("q", batch["actions"])):
        both = [[q_value(critics, j, *pair).item() for j in (0, 1)] for pair in zip(states, actions)]
        assert len({a < b for a, b in both}) == 2
        expected[name] = torch.tensor(both).amin(1)
    torch.testing.assert_close(awac_sera.state_value(networks, states), expected["v"])
    expected = {name: awac_sera.q_conditioned_entropy(states, x, 2).tanh() for name, x in expected.items()}
    assert (expected["v"] - expected["q"]).abs().max() > 0.01
    for name, bonus in expected.items():
        args.sera_bonus = name
        torch.testing.assert_close(awac_sera.sera_bonus(networks, batch, torch.arange(4), args)[0], bonus)


# ------------------------------ the weights
@pytest.mark.parametrize(
    ("weights", "beta", "advantages", "expected"),
    [
        ("softmax", 2.0, [0, 2], [0.537883, 1.462117]),
        ("softmax", 0.5, [1, 1, 1, -100], [4 / 3, 4 / 3, 4 / 3, 0]),
        ("softmax", 2.0, [300, 300], [1, 1]),  # exp alone would be infinite
        ("exp", 2.0, [0, 2, 10], [1, math.e, 100]),
        ("exp", 1 / 3, [-1, 1, 1.5, 2, 1000], [0.0497871, 20.0855, 90.0171, 100, 100]),
    ],
)
def test_weights_by_hand(weights, beta, advantages, expected):
    """Softmax weights of a batch of two at beta 2; exp weights up to the clip at 100."""
    args = awac_sera.Args(weights=weights, beta=beta)
    result = awac_sera.advantage_weights(torch.tensor(advantages).float(), args)
    torch.testing.assert_close(result, torch.tensor(expected).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 256])
def test_softmax_weights_average_one(batch_size):
    """Over a batch of any size, whatever the level of Q; two weights differ by exp of (A - A') / beta."""
    torch.manual_seed(0)
    advantages = 3 * torch.randn(batch_size)
    for shift in (0, -500):
        weights = awac_sera.advantage_weights(advantages + shift, awac_sera.Args(beta=1.5))
        assert weights.mean().item() == pytest.approx(1, rel=1e-5)
        ratio = ((advantages[0] - advantages[1]) / 1.5).exp().item()
        assert (weights[0] / weights[1]).item() == pytest.approx(ratio, rel=1e-3)


def test_options():
    """Softmax is the default, exp can be chosen; k is 20 for walker2d; rewards are raw everywhere."""
    args = awac_sera.parse_args(["--env", "walker2d-medium-v2"])
    assert (args.weights, args.beta, args.weight_decay, args.sera_k) == ("softmax", 2, 1e-4, 20)
    args = awac_sera.parse_args(["--weights", "exp", "--beta", "0.3"])
    assert (args.weights, args.beta, args.sera_k) == ("exp", 0.3, 10)
    for env in ("hopper-medium-v2", "hopper-medium-mini", "halfcheetah-medium-v2", "ant-medium-v2"):
        args = awac_sera.parse_args(["--env", env])
        assert not args.normalize_rewards and args.sera_k == 10
        assert (args.offline_steps < 250_000) == (env == "hopper-medium-mini")


# ------------------------------ the update
def slow_losses(networks, batch, args, seed):
    """Gradients by network, and what is logged, of eqs. (1) to (4) in float64, one row and critic at a time.

    The random numbers are drawn as `update` draws them after the same seed.
    """
    networks = copy.deepcopy(networks).double()
    batch = {name: column.double() for name, column in batch.items()}
    actor, critics, targets = networks["actor"], networks["critics"], networks["target_critics"]
    log_std = 6 / (1 + torch.exp(-actor.log_std_logits)) - 6
    torch.manual_seed(seed)
    next_noise, noise = (torch.randn(batch["actions"].shape).double() for _ in range(2))
    td, log_probs, advantages, q_policy = [], [], [], []
    for i, y in enumerate(batch["rewards"]):
        state, next_state, action = (batch[x][i] for x in ("observations", "next_observations", "actions"))
        if not batch["terminals"][i]:
            next_action = actor.layers(next_state).tanh() + log_std.exp() * next_noise[i]
            next_action = next_action.detach().clamp(-1, 1)
            y = y + args.gamma * min(q_value(targets, j, next_state, next_action) for j in (0, 1))
        q_data = [q_value(critics, j, state, action) for j in (0, 1)]
        td += [(q - y.detach()) ** 2 for q in q_data]
        mean = actor.layers(state).tanh()
        sample = (mean + log_std.exp() * noise[i]).clamp(-1, 1)
        q_policy.append(min(q_value(critics, j, state, sample).item() for j in (0, 1)))
        advantages.append(min(q_data).item() - q_policy[-1])
        log_densities = -(((action - mean) / log_std.exp()) ** 2) / 2 - log_std - math.log(2 * math.pi) / 2
        log_probs.append(log_densities[0] + log_densities[1])
    weights = [math.exp(advantage / args.beta) for advantage in advantages]
    if args.weights == "softmax":
        weights = [len(weights) * weight / sum(weights) for weight in weights]
    else:
        weights = [min(weight, 100) for weight in weights]
    losses = {"actor": [-w * log_prob for w, log_prob in zip(weights, log_probs)], "critics": td}
    losses = {name: sum(terms) / len(noise) for name, terms in losses.items()}
    gradients = {x: torch.autograd.grad(loss, list(networks[x].parameters())) for x, loss in losses.items()}
    logs = {"td": losses["critics"].item(), "actor": losses["actor"].item(), "max_weight": max(weights)}
    means = {"advantage": advantages, "q_policy": q_policy, "log_prob": [x.item() for x in log_probs]}
    return gradients, logs | {name: sum(numbers) / len(noise) for name, numbers in means.items()}


@pytest.mark.parametrize(
    "changes", [{"beta": 0.5}, {"weights": "exp", "beta": 0.1, "gamma": 0.5}, {"weight_decay": 0.5}]
)
def test_update_by_loops(changes):
    """Losses and the gradient of every parameter, from its own loss alone, equal the slow recomputation.

    Also at a second update, so that nothing is left over from the first.
    """
    networks, optimizer, args = make_networks(learning_rate=0.01, **changes)
    set_log_std(networks, -0.5, -0.1)  # wide enough for samples beyond [-1, 1]
    for seed in (7, 8):
        gradients, expected = slow_losses(networks, make_batch(seed), args, seed=seed)
        logs = updated(networks, optimizer, make_batch(seed), args, seed=seed)
        for name, value in expected.items():
            assert logs[f"losses/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        for name, slow_gradients in gradients.items():
            for parameter, slow in zip(networks[name].parameters(), slow_gradients):
                assert slow.any(), name
                scale = slow.abs().max().item()
                torch.testing.assert_close(parameter.grad.double(), slow, rtol=1e-3, atol=1e-4 * scale)


def test_weight_decay_by_hand():
    """One step of Adam: the policy's gradient gets 0.5 times the parameter on top, the critics' does not."""
    networks, optimizer, args = make_networks(learning_rate=0.1, weight_decay=0.5)
    set_log_std(networks, -0.5, -0.1)
    before, batch = copy.deepcopy(networks).double(), make_batch()
    gradients, _ = slow_losses(networks, batch, args, 7)
    updated(networks, optimizer, batch, args)
    turned = 0
    for name, decay in (("actor", 0.5), ("critics", 0.0)):
        for new, old, slow in zip(networks[name].parameters(), before[name].parameters(), gradients[name]):
            gradient = slow + decay * old.detach()
            expected = old.detach() - 0.1 * gradient / (gradient.abs() + 1e-8)
            torch.testing.assert_close(new.detach().double(), expected, rtol=0, atol=1e-4)
            scale, average = gradient.abs().max().item(), optimizer.state[new]["exp_avg"].double()
            torch.testing.assert_close(average, 0.1 * gradient, rtol=1e-3, atol=1e-5 * scale)
            turned += (gradient * slow < 0).sum().item()
    assert turned > 10  # a decay outside Adam's gradient would step the other way there


@pytest.mark.parametrize("log_std", [-5.5, -0.5])
def test_target_by_hand(log_std):
    """Q = 0, targets 6 and 4, r = 1, gamma 0.5: y is 3, or 1 at a terminal, of a narrow or a wide policy."""
    networks, optimizer, args = make_networks(gamma=0.5)
    make_constant(networks["critics"], 0.0, 0.0)
    make_constant(networks["target_critics"], 6.0, 4.0)
    set_log_std(networks, log_std, log_std)
    batch = make_batch()
    batch["rewards"].fill_(1.0)
    td = updated(networks, optimizer, batch, args)["losses/td"]
    assert td == pytest.approx(2 * (4 * 9 + 2 * 1) / 6, rel=1e-5)


def test_sampled_actions_are_cut():
    """Q_j = +-2 a and Q'_j = +-5 a with a the action's first number, sampled at mean 1 and deviation 1.

    The lower ones are -2 |a| and -5 |a|: y = r - 5 gamma m |a'| and A = 2 |a~| - 2 |a|, with no |a| above 1.
    """
    networks, optimizer, args = make_networks(critic_layers=0)
    make_constant(networks["actor"].layers, 30.0, 30.0)
    networks["actor"].log_std_logits.data.fill_(100.0)
    for name, slope in (("critics", 2.0), ("target_critics", 5.0)):
        make_constant(networks[name], 0.0, 0.0)
        networks[name].weights[0].data[:, 4, 0] = torch.tensor([slope, -slope])
    batch = make_batch(batch_size=32)
    torch.manual_seed(7)
    samples = [1 + torch.randn(32, 2)[:, 0] for _ in range(2)]
    assert all(sample.max() > 1.5 and sample.min() < 0 for sample in samples)
    next_sizes, sizes = (sample.clamp(-1, 1).abs() for sample in samples)
    targets = batch["rewards"] - 5 * 0.99 * (1 - batch["terminals"]) * next_sizes
    advantages = 2 * sizes - 2 * batch["actions"][:, 0].abs()
    td = sum((q * batch["actions"][:, 0] - targets).square().mean() for q in (2, -2))
    logs = updated(networks, optimizer, batch, args)
    assert logs["losses/td"] == pytest.approx(td.item(), rel=1e-5)
    assert logs["losses/q_policy"] == pytest.approx(-2 * sizes.mean().item(), rel=1e-5)
    assert logs["losses/advantage"] == pytest.approx(advantages.mean().item(), rel=1e-5)
    weights = (advantages / 2).exp()
    assert logs["losses/max_weight"] == pytest.approx((weights.max() / weights.mean()).item(), rel=1e-5)
