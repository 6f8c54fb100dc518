"""TD3+BC against hand numbers and a slow recomputation: target, critics, policy, cloning."""

import copy
import math
from functools import partial

import pytest
import recompute
import torch
from recompute import linear_layers, make_batch, q_value

import td3bc_sera

NETWORKS = ("actor", "critics", "target_actor", "target_critics")

make_args = partial(recompute.make_args, td3bc_sera)
make_agent = partial(recompute.make_agent, td3bc_sera)
updated = partial(recompute.updated, td3bc_sera)


# ------------------------------ agent
def set_policy(actor, first, second):
    """Make a policy give the same two actions in every state."""
    with torch.no_grad():
        actor[0][-1].weight.zero_()
        actor[0][-1].bias.copy_(torch.tensor([first, second]).atanh())


def clamp(number, bound):
    """A number, or the nearest one within [-bound, bound]."""
    return min(max(number, -bound), bound)


def test_initial_networks():
    """Targets start as copies of policy and critics, untrained; the two critics differ."""
    torch.manual_seed(3)
    args = make_args()
    agent = td3bc_sera.Agent(11, 3, args)
    optimizer, scheduler = td3bc_sera.make_optimizer(agent, args)
    assert scheduler is None
    assert {name for name, _ in agent.named_children()} == set(NETWORKS)
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    pairs = [*zip(agent.actor.parameters(), agent.target_actor.parameters())]
    pairs += zip(agent.critics.parameters(), agent.target_critics.parameters())
    for parameter, target in pairs:
        assert torch.equal(parameter, target)
        assert parameter is not target
        assert parameter in trained
        assert target not in trained
    assert all(not torch.equal(*layer.weight) for layer in linear_layers(agent.critics))


@pytest.mark.parametrize("depth", [1, 3])
def test_policy_is_a_squashed_network(depth):
    """pi(s) is the tanh of a plain network with --actor-layers hidden layers, in [-1, 1]."""
    agent, _, _ = make_agent(actor_layers=depth)
    observations = torch.randn(5, 4)
    x = observations.double()
    parameters = [parameter.double() for parameter in agent.actor.parameters()]
    *hidden, last_weight, last_bias = parameters
    assert len(hidden) == 2 * depth
    for weight, bias in zip(hidden[::2], hidden[1::2]):
        x = (x @ weight.T + bias).clamp(min=0)
    expected = (x @ last_weight.T + last_bias).tanh()
    actions = agent.actor(observations).double()
    torch.testing.assert_close(actions, expected, rtol=1e-5, atol=1e-6)
    assert agent.actor(1e4 * observations).abs().max() == 1


def test_act_to_evaluate():
    """The policy's own action, twice the same, and no random number is drawn."""
    agent, _, _ = make_agent(exploration_noise=0.7)
    observations = torch.randn(6, 4)
    before = torch.get_rng_state()
    actions = agent.act(observations, deterministic=True)
    assert torch.equal(actions, agent.actor(observations))
    assert torch.equal(actions, agent.act(observations, deterministic=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("changes", "deviation"), [({}, 0.1), ({"exploration_noise": 0.3}, 0.3)])
def test_act_to_explore(changes, deviation):
    """Normal noise of 0.1, or --exploration-noise, on every number, cut at -1 and 1."""
    agent, _, _ = make_agent(**changes)
    set_policy(agent.actor, 0.1, -0.999)
    observations = torch.randn(5000, 4)
    torch.manual_seed(5)
    actions = agent.act(observations, deterministic=False)
    torch.manual_seed(5)
    noise = deviation * torch.randn(5000, 2)
    expected = [[clamp(0.1 + x, 1), clamp(-0.999 + y, 1)] for x, y in noise.tolist()]
    torch.testing.assert_close(actions, torch.tensor(expected), rtol=0, atol=1e-6)
    below = (actions[:, 1] == -1).float().mean().item()
    assert actions.min() == -1
    assert 0.45 < below < 0.52  # the half that the noise would have sent below
    assert actions[:, 0].std().item() == pytest.approx(deviation, rel=0.03)


def test_value():
    """V is the lower of both critics at the policy's action, without noise."""
    agent, _, _ = make_agent()
    observations = 3 * torch.randn(20, 4)
    actions = agent.actor(observations).double()
    slow_critics = copy.deepcopy(agent.critics).double()
    both = []
    for pair in zip(observations.double(), actions):
        both.append([q_value(slow_critics, j, *pair).item() for j in (0, 1)])
    both = torch.tensor(both)
    assert len(both.argmin(1).unique()) == 2  # now one is the lower, now the other
    before = torch.get_rng_state()
    value = agent.value(observations)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(value, both.amin(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_first_critic(depth):
    """Q_1 alone is the first row of both, with its gradients; the second critic gets none."""
    agent, _, _ = make_agent(critic_layers=depth)
    parameters = list(agent.critics.parameters())
    observations = torch.randn(5, 4)
    actions = torch.randn(5, 2, requires_grad=True)
    first, _ = agent.critics(observations, actions)
    alone = agent.first_critic(observations, actions)
    assert alone.shape == (5,)
    torch.testing.assert_close(alone, first)
    expected = torch.autograd.grad(first.sum(), [actions, *parameters])
    gradients = torch.autograd.grad(alone.sum(), [actions, *parameters])
    torch.testing.assert_close(gradients, expected)
    for gradient in gradients[1:]:
        assert gradient[0].any()
        assert not gradient[1].any()


# ------------------------------ the update
def rows_of(batch):
    """State, action, reward, next state and terminal of each row, in float64."""
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    return list(zip(*(batch[name].double() for name in names)))


def slow_critic_step(agent, batch, args, seed):
    """The loss of eqs. (1) and (2) and its gradients in float64, one row and critic at a time."""
    agent = copy.deepcopy(agent).double()
    torch.manual_seed(seed)
    noise = torch.randn(batch["actions"].shape).tolist()
    terms = []
    for i, (state, action, y, next_state, terminal) in enumerate(rows_of(batch)):
        if not terminal:
            smoothing = [clamp(args.policy_noise * x, args.noise_clip) for x in noise[i]]
            with torch.no_grad():
                next_action = agent.target_actor(next_state) + torch.tensor(smoothing).double()
                pair = next_state, next_action.clamp(-1, 1)
                y = y + args.gamma * min(q_value(agent.target_critics, j, *pair) for j in (0, 1))
        terms += [(q_value(agent.critics, j, state, action) - y) ** 2 for j in (0, 1)]
    loss = sum(terms) / len(noise)
    return loss.item(), torch.autograd.grad(loss, list(agent.critics.parameters()))


def slow_policy_step(actor, critics, batch, args, weight):
    """What eq. (3) logs and its gradients in float64, with b = weight, from critics as they are."""
    actor = copy.deepcopy(actor).double()
    critics = copy.deepcopy(critics).double()
    q_values, distances = [], []
    for state, action, *_ in rows_of(batch):
        q_values.append(q_value(critics, 0, state, actor(state)))
        distances += [(x - y) ** 2 for x, y in zip(actor(state), action)]
    q_mean = sum(q_values) / len(q_values)
    cloning = sum(distances) / len(distances)
    w = args.bc_alpha * len(q_values) / sum(abs(q.item()) for q in q_values)
    loss = weight * cloning - w * q_mean
    logs = {"actor": loss.item(), "bc": cloning.item(), "q_policy": q_mean.item(), "q_weight": w}
    return logs, torch.autograd.grad(loss, list(actor.parameters()))


def assert_close_gradients(network, slow_gradients):
    """The gradients that an update has left on a network are the slow ones."""
    for parameter, slow in zip(network.parameters(), slow_gradients):
        assert slow.any()
        tolerance = {"rtol": 1e-3, "atol": 1e-4 * slow.abs().max().item()}
        torch.testing.assert_close(parameter.grad.double(), slow, **tolerance)


def same(left, right):
    """Whether two networks have the same parameters, bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(left.parameters(), right.parameters()))


@pytest.mark.parametrize("changes", [{}, {"gamma": 0.5, "policy_noise": 3.0, "noise_clip": 0.2}])
def test_critic_step_by_loops(changes):
    """Loss and gradients of both critics equal the slow recomputation, also at a second update."""
    agent, optimizer, args = make_agent(critic_lr=0.01, **changes)
    for seed in (7, 8):
        expected, gradients = slow_critic_step(agent, make_batch(seed), args, seed)
        logs = updated(agent, optimizer, make_batch(seed), args, seed=seed, policy_due=False)
        assert logs["losses/td"] == pytest.approx(expected, rel=1e-4)
        assert_close_gradients(agent.critics, gradients)
        assert set(logs) == {"losses/td", "losses/q_data"}


# Options, whether it is online, and b of the first and of the second update.
B_CASES = {
    "offline": ({"bc_online": "drop"}, False, (1.0, 1.0)),
    "keep": ({}, True, (1.0, 1.0)),
    "anneal": ({"bc_online": "anneal", "bc_anneal_steps": 4}, True, (0.875, 0.75)),
    "annealed": ({"bc_online": "anneal", "bc_anneal_steps": 1}, True, (0.5, 0.5)),
    "drop": ({"bc_online": "drop"}, True, (0.0, 0.0)),
}


@pytest.mark.parametrize("case", B_CASES)
def test_policy_step_by_loops(case):
    """Gradient and logs of eq. (3) with the b due, w detached.

    Q_1 alone counts, of the critics just updated.
    """
    changes, online, weights = B_CASES[case]
    agent, optimizer, args = make_agent(actor_lr=0.01, critic_lr=0.01, **changes)
    for seed, weight in zip((7, 8), weights):
        old = copy.deepcopy(agent)
        batch = make_batch(seed)
        td, _ = slow_critic_step(agent, batch, args, seed)
        logs = updated(agent, optimizer, batch, args, seed=seed, online=online)
        expected, gradients = slow_policy_step(old.actor, agent.critics, batch, args, weight)
        for name, value in (expected | {"td": td}).items():
            assert logs[f"losses/{name}"] == pytest.approx(value, rel=1e-4), name
        assert_close_gradients(agent.actor, gradients)
        stale, _ = slow_policy_step(old.actor, old.critics, batch, args, weight)
        assert abs(stale["q_policy"] - expected["q_policy"]) > 0.02  # old critics would be noticed


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_policy_delay(delay):
    """At every --policy-delay-th update policy and targets move; at others only the critics do.

    Targets then are (1 - tau) old + tau new of the networks just updated.
    """
    rates = {"actor_lr": 0.05, "critic_lr": 0.05}
    agent, optimizer, args = make_agent(policy_delay=delay, tau=0.25, **rates)
    due_numbers = [number for number in range(1, 8) if td3bc_sera.policy_is_due(number, args)]
    assert due_numbers == {1: [1, 2, 3, 4, 5, 6, 7], 2: [2, 4, 6], 3: [3, 6]}[delay]
    for number in range(1, 8):
        due = number in due_numbers
        old = copy.deepcopy(agent)
        logs = updated(agent, optimizer, make_batch(number), args, policy_due=due)
        changed = {name for name in NETWORKS if not same(getattr(agent, name), getattr(old, name))}
        assert changed == (set(NETWORKS) if due else {"critics"}), number
        assert ("losses/actor" in logs) == due
        for name in changed & {"target_actor", "target_critics"}:
            trained = getattr(agent, name.removeprefix("target_"))
            networks = (getattr(old, name), getattr(agent, name), trained)
            for before, after, new in zip(*(network.parameters() for network in networks)):
                torch.testing.assert_close(after, 0.75 * before + 0.25 * new)


def test_policy_step_leaves_the_critics_alone():
    """Policy steps change no bit of the critics, give them no gradient and leave them trainable.

    With targets that stand still, critics learn the same with and without policy steps between.
    """
    final = []
    for all_due in ((False, False, False, False), (False, True, False, True)):
        agent, optimizer, args = make_agent(actor_lr=0.05, critic_lr=0.05, tau=0.0)
        for seed, due in enumerate(all_due):
            updated(agent, optimizer, make_batch(seed), args, policy_due=due, seed=seed)
        final.append(agent)
    without, after = final
    assert not same(without.actor, after.actor)
    assert same(without.critics, after.critics)
    for parameter in after.critics.parameters():
        assert parameter.requires_grad
        assert parameter.grad is None or not parameter.grad.any()


def test_learning_rates():
    """Adam's first step is the rate: --critic-lr, and, at the first that is due, --actor-lr."""
    agent, optimizer, args = make_agent(actor_lr=0.05, critic_lr=0.02)
    old = copy.deepcopy(agent)
    updated(agent, optimizer, make_batch(), args)
    for name, rate in (("actor", 0.05), ("critics", 0.02)):
        pairs = zip(getattr(old, name).parameters(), getattr(agent, name).parameters())
        for before, after in pairs:
            assert (after - before).abs().max().item() == pytest.approx(rate, rel=1e-3), name


# ------------------------------ the target
def smoothed_actions(policy, **changes):
    """Next actions (4000, 2) as the target critics get them from a target policy of these two."""
    agent, optimizer, args = make_agent(**changes)
    set_policy(agent.target_actor, *policy)
    seen = []
    agent.target_critics.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    batch = make_batch(batch_size=4000)
    updated(agent, optimizer, batch, args, policy_due=False)
    [(observations, actions)] = seen
    assert torch.equal(observations, batch["next_observations"])
    return actions


def test_target_smoothing():
    """Normal noise of deviation 0.2 for every row and dimension, cut at +-0.5, on pi'(s')."""
    noise = smoothed_actions((0.0, 0.3)) - torch.tensor([0.0, 0.3])
    torch.manual_seed(7)
    expected = [
        [clamp(0.2 * x, 0.5), clamp(0.2 * y, 0.5)] for x, y in torch.randn(4000, 2).tolist()
    ]
    torch.testing.assert_close(noise, torch.tensor(expected), rtol=0, atol=1e-6)
    assert noise.std().item() == pytest.approx(0.198, rel=0.03)
    assert noise.max().item() == pytest.approx(0.5)
    assert noise.min().item() == pytest.approx(-0.5)
    at_the_bound = (noise.abs() > 0.4999).float().mean().item()
    beyond = math.erfc(2.5 / math.sqrt(2))  # 1.2 % of normal numbers
    assert at_the_bound == pytest.approx(beyond, rel=0.3)


def test_huge_noise_is_bounded():
    """Whatever --policy-noise, an action moves by --noise-clip at most, never beyond -1 or 1."""
    actions = smoothed_actions((0.25, -0.75), policy_noise=1e6)
    torch.testing.assert_close(actions[:, 0].unique(), torch.tensor([-0.25, 0.75]))
    torch.testing.assert_close(actions[:, 1].unique(), torch.tensor([-1.0, -0.25]))
    assert actions.min() == -1
    actions = smoothed_actions((0.25, -0.75), policy_noise=1e6, noise_clip=5.0)
    assert actions.unique().tolist() == [-1, 1]
    actions = smoothed_actions((0.25, -0.75), policy_noise=0.0)
    torch.testing.assert_close(actions, torch.tensor([0.25, -0.75]).expand(4000, 2))


def test_noise_enters_the_target_only():
    """Another --policy-noise changes the TD loss alone; the policy step draws no noise."""
    logs = []
    for policy_noise in (0.0, 0.2, 50.0):
        rates = {"actor_lr": 0.0, "critic_lr": 0.0}
        agent, optimizer, args = make_agent(policy_noise=policy_noise, **rates)
        logs.append(updated(agent, optimizer, make_batch(), args))
        after = torch.get_rng_state()
        torch.manual_seed(7)
        torch.randn(6, 2)
        assert torch.equal(torch.get_rng_state(), after)
    assert len({log.pop("losses/td") for log in logs}) == 3
    assert logs[0] == logs[1] == logs[2]
    assert "losses/actor" in logs[0]


def test_target_by_hand():
    """Q = 0, targets 4 and 6, r = 1, gamma 0.5: y is 3, or 1 at a terminal; errors add up."""
    agent, optimizer, args = make_agent(gamma=0.5)
    with torch.no_grad():
        for parameter in [*agent.critics.parameters(), *agent.target_critics.parameters()]:
            parameter.zero_()
        biases = linear_layers(agent.target_critics)[-1].bias
        biases.copy_(torch.tensor([6.0, 4.0]).reshape(2, 1, 1))
    batch = make_batch()
    batch["rewards"].fill_(1.0)
    td = updated(agent, optimizer, batch, args, policy_due=False)["losses/td"]
    assert td == pytest.approx(2 * (4 * 9 + 2 * 1) / 6, rel=1e-5)


def test_next_actions_are_the_target_policys():
    """A change of pi' changes the TD loss, a change of pi does not."""
    td = []
    for name in (None, "target_actor", "actor"):
        agent, optimizer, args = make_agent()
        if name:
            set_policy(getattr(agent, name), 0.9, -0.9)
        logs = updated(agent, optimizer, make_batch(), args, policy_due=False)
        td.append(logs["losses/td"])
    plain, target_policy, policy = td
    assert policy == plain
    assert abs(target_policy - plain) > 1e-3 * plain


# ------------------------------ the policy loss by hand
@pytest.mark.parametrize(
    ("states", "q_weight"),
    [((1.0, -3.0), 1.25), ((3.0, 3.0), 2.5 / 3), ((-4.0, -1.0, 5.0), 0.75)],
)
@pytest.mark.parametrize(("bc_online", "weight"), [("keep", 1), ("anneal", 0.75), ("drop", 0)])
def test_policy_loss_by_hand(states, q_weight, bc_online, weight):
    """Q_1 = s_0 + a_0 and pi = 0: w is 2.5 / mean |s_0|, and dL / da is (-w, 0) - b mean a.

    With Q = (1, -3) w is 1.25. The cloning term is a mean over both action dimensions, so its slope
    is 2 (0 - a) / 2. No gradient passes through w: for Q of one sign, -w mean Q would have none.
    """
    changes = {"critic_layers": 1, "bc_online": bc_online, "bc_anneal_steps": 2}
    agent, optimizer, args = make_agent(actor_lr=0.0, critic_lr=0.0, **changes)
    set_policy(agent.actor, 0.0, 0.0)
    with torch.no_grad():
        for parameter in agent.critics.parameters():
            parameter[0] = 0  # the second critic keeps its random values
        first, second = linear_layers(agent.critics)
        first.weight[0, 0, 0] = 1  # states come first,
        first.weight[0, 4, 0] = 1  # then actions
        first.bias[0, 0, 0] = 50  # far from the kink of the ReLU
        second.weight[0, 0, 0] = 1
        second.bias[0, 0, 0] = -50
    batch = make_batch()
    batch["observations"][:, 0] = torch.tensor(states).repeat(6 // len(states))
    logs = updated(agent, optimizer, batch, args, online=True)
    assert logs["losses/q_weight"] == pytest.approx(q_weight, rel=1e-5)
    assert logs["losses/q_policy"] == pytest.approx(sum(states) / len(states), abs=1e-5)
    assert logs["losses/bc"] == pytest.approx(batch["actions"].square().sum().item() / 12)
    expected = torch.tensor([-q_weight, 0.0]) - weight * batch["actions"].mean(0)
    torch.testing.assert_close(agent.actor[0][-1].bias.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 10.0])
def test_weight_is_free_of_scale(alpha):
    """w makes mean |w Q_1| equal to --bc-alpha, whatever the scale of the critics."""
    agent, optimizer, args = make_agent(bc_alpha=alpha, actor_lr=0.0, critic_lr=0.0)
    last = linear_layers(agent.critics)[-1]
    observations = make_batch()["observations"]
    q_values, _ = agent.critics(observations, agent.actor(observations))
    first = updated(agent, optimizer, make_batch(), args)
    with torch.no_grad():
        last.weight.mul_(100)
        last.bias.mul_(100)
    scaled = updated(agent, optimizer, make_batch(), args)
    assert first["losses/q_weight"] * q_values.abs().mean().item() == pytest.approx(alpha, rel=1e-4)
    assert scaled["losses/q_policy"] == pytest.approx(100 * first["losses/q_policy"], rel=1e-3)
    assert scaled["losses/actor"] == pytest.approx(first["losses/actor"], rel=1e-3)


# ------------------------------ b, the weight of cloning
@pytest.mark.parametrize(
    ("bc_online", "expected"),
    [
        ("keep", [1, 1, 1, 1, 1, 1]),
        ("anneal", [0.9, 0.8, 0.6, 0.5, 0.5, 0.5]),
        ("drop", [0, 0, 0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("online_steps", [3, 1_000_000])
def test_bc_weight_by_hand(bc_online, expected, online_steps):
    """With --bc-anneal-steps 5: 1 - n / 10 after n online updates, 0.5 at least; or 1, or 0.

    --online-steps is none of its business. Offline it is 1 in any case.
    """
    changes = {"bc_online": bc_online, "bc_anneal_steps": 5, "online_steps": online_steps}
    agent, _, args = make_agent(**changes)
    online, offline = [], []
    for n in (1, 2, 4, 5, 6, 10):
        agent.online_updates.fill_(n)
        online.append(float(td3bc_sera.bc_weight(agent, args, online=True)))
        offline.append(float(td3bc_sera.bc_weight(agent, args, online=False)))
    assert online == pytest.approx(expected)
    assert offline == [1] * 6


def test_online_updates_are_counted():
    """Every online update counts, whether the policy is due or not; state_dicts hold the count."""
    agent, optimizer, args = make_agent(bc_online="anneal", bc_anneal_steps=10)
    counts = []
    for online, due in ((False, True), (True, False), (True, True), (False, False), (True, True)):
        updated(agent, optimizer, make_batch(), args, online=online, policy_due=due)
        counts.append(agent.state_dict()["online_updates"].item())
    assert counts == [0, 1, 2, 2, 3]
    other, _, _ = make_agent(bc_online="anneal", bc_anneal_steps=10)
    assert td3bc_sera.bc_weight(other, args, online=True).item() == 1
    other.load_state_dict(agent.state_dict())
    assert td3bc_sera.bc_weight(other, args, online=True).item() == pytest.approx(0.85)


def test_cloning_in_a_run(tmp_path, monkeypatch):
    """b falls from the first online update on, also in a resumed run, and one of more steps."""
    original = td3bc_sera.bc_weight
    seen = []

    def bc_weight(agent, args, online):
        weight = original(agent, args, online)
        seen.append((online, agent.online_updates.item(), float(weight)))
        return weight

    monkeypatch.setattr(td3bc_sera, "bc_weight", bc_weight)
    runs = []
    original_set_up = td3bc_sera.set_up

    def set_up(*args):
        runs.append(original_set_up(*args))
        return runs[-1]

    monkeypatch.setattr(td3bc_sera, "set_up", set_up)
    options = (
        "--env hopper-medium-mini --device cpu --offline-steps 5 --eval-episodes 1 --batch-size 32 "
        "--sera-k 5 --hidden-dim 16 --bc-online anneal --bc-anneal-steps 4 --run-dir"
    )
    options = [*options.split(), str(tmp_path / "run")]
    td3bc_sera.main([*options, "--online-steps", "3"])
    runs[0].lock.release()
    checkpoint = td3bc_sera.read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert checkpoint["agent"]["online_updates"] == 3
    td3bc_sera.main([*options, "--online-steps", "8", "--resume"])
    offline = [(False, 0, 1.0), (False, 0, 1.0)]
    online = [(True, 2, 0.75), (True, 4, 0.5), (True, 6, 0.5), (True, 8, 0.5)]
    assert seen == offline + online
