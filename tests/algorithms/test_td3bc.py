"""TD3+BC against hand numbers and a slow recomputation: target, critics, delayed policy, cloning weight."""

import copy
import math
from functools import partial

import pytest
import recompute
import torch
from recompute import make_batch, q_value

import td3bc_sera

make_args = partial(recompute.make_args, td3bc_sera)
make_networks = partial(recompute.make_networks, td3bc_sera)
updated = partial(recompute.updated, td3bc_sera)


# ------------------------------ networks
def set_policy(actor, first, second):
    """Make a policy give the same two actions in every state."""
    with torch.no_grad():
        actor[0][-1].weight.zero_()
        actor[0][-1].bias.copy_(torch.tensor([first, second]).atanh())


def test_initial_networks():
    """Targets start as copies of policy and critics and are not trained; the two critics differ."""
    torch.manual_seed(3)
    networks, optimizer = td3bc_sera.make_networks(11, 3, make_args())
    assert set(networks) == {"actor", "critics", "target_actor", "target_critics"}
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name in ("actor", "critics"):
        for parameter, target in zip(networks[name].parameters(), networks[f"target_{name}"].parameters()):
            assert torch.equal(parameter, target) and parameter is not target
            assert parameter in trained and target not in trained
    assert all(not torch.equal(*weight) for weight in networks["critics"].weights)


@pytest.mark.parametrize("depth", [1, 3])
def test_policy_is_a_squashed_network(depth):
    """pi(s) is the tanh of a plain network with --actor-layers hidden layers, so within [-1, 1]."""
    networks, _, _ = make_networks(actor_layers=depth)
    observations = torch.randn(5, 4)
    x, parameters = observations.double(), [p.double() for p in networks["actor"].parameters()]
    assert len(parameters) == 2 * (depth + 1)
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2]):
        x = (x @ weight.T + bias).clamp(min=0)
    expected = (x @ parameters[-2].T + parameters[-1]).tanh()
    torch.testing.assert_close(networks["actor"](observations).double(), expected, rtol=1e-5, atol=1e-6)
    assert networks["actor"](1e4 * observations).abs().max() == 1


def test_act_to_evaluate():
    """The policy's own action, twice the same, and no random number is drawn."""
    networks, _, _ = make_networks(exploration_noise=0.7)
    observations, before = torch.randn(6, 4), torch.get_rng_state()
    actions = td3bc_sera.act(networks, observations, deterministic=True)
    assert torch.equal(actions, networks["actor"](observations))
    assert torch.equal(actions, td3bc_sera.act(networks, observations, deterministic=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("changes", "deviation"), [({}, 0.1), ({"exploration_noise": 0.3}, 0.3)])
def test_act_to_explore(changes, deviation):
    """Normal noise of 0.1, or of --exploration-noise, on every action and dimension, cut at -1 and 1."""
    networks, _, _ = make_networks(**changes)
    set_policy(networks["actor"], 0.1, -0.999)
    observations = torch.randn(5000, 4)
    torch.manual_seed(5)
    actions = td3bc_sera.act(networks, observations, deterministic=False)
    torch.manual_seed(5)
    noise = deviation * torch.randn(5000, 2)
    expected = [[min(max(a, -1), 1) for a in (0.1 + x, -0.999 + y)] for x, y in noise.tolist()]
    torch.testing.assert_close(actions, torch.tensor(expected), rtol=0, atol=1e-6)
    below = (actions[:, 1] == -1).float().mean().item()
    assert actions.min() == -1 and 0.45 < below < 0.52  # the half that the noise would have sent below
    assert actions[:, 0].std().item() == pytest.approx(deviation, rel=0.03)


def test_state_value():
    """V is the lower of both critics at the policy's action, without noise."""
    networks, _, _ = make_networks()
    observations = 3 * torch.randn(20, 4)
    slow, actions = copy.deepcopy(networks["critics"]).double(), networks["actor"](observations).double()
    q = [[q_value(slow, j, s.double(), a).item() for s, a in zip(observations, actions)] for j in (0, 1)]
    assert any(x < y for x, y in zip(*q)) and any(x > y for x, y in zip(*q))
    before = torch.get_rng_state()
    value = td3bc_sera.state_value(networks, observations)
    assert torch.equal(torch.get_rng_state(), before)
    assert value.tolist() == pytest.approx(list(map(min, *q)), rel=1e-4, abs=1e-5)


def test_one_critic_alone():
    """count=1 gives the first row of the full call and of its gradients; the second critic gets none."""
    networks, _, _ = make_networks()
    critics, parameters = networks["critics"], list(networks["critics"].parameters())
    observations, actions = torch.randn(3, 5, 4), torch.randn(3, 5, 2, requires_grad=True)
    full, alone = critics(observations, actions), critics(observations, actions, count=1)
    assert alone.shape == (1, 3, 5)
    torch.testing.assert_close(alone[0], full[0])
    expected = torch.autograd.grad(full[0].sum(), [actions, *parameters])
    for gradient, other in zip(torch.autograd.grad(alone.sum(), [actions, *parameters]), expected):
        torch.testing.assert_close(gradient, other)
    alone = critics(observations, actions, count=1)
    for gradient in torch.autograd.grad(alone.sum(), parameters):
        assert gradient[0].any() and not gradient[1].any()


# ------------------------------ the update
def rows_of(batch):
    """State, action, reward, next state and terminal of each row, in float64."""
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    return list(zip(*(batch[name].double() for name in names)))


def slow_critic_step(networks, batch, args, seed):
    """The loss of eqs. (1) and (2) and its gradients in float64, one row and critic at a time."""
    networks = copy.deepcopy(networks).double()
    critics, targets = networks["critics"], networks["target_critics"]
    torch.manual_seed(seed)
    noise, terms = torch.randn(batch["actions"].shape).double(), []
    for i, (state, action, y, next_state, terminal) in enumerate(rows_of(batch)):
        if not terminal:
            with torch.no_grad():
                smoothing = [
                    min(max(args.policy_noise * x.item(), -args.noise_clip), args.noise_clip)
                    for x in noise[i]
                ]
                next_action = networks["target_actor"](next_state) + torch.tensor(smoothing).double()
                next_action = next_action.clamp(-1, 1)
                y = y + args.gamma * min(q_value(targets, j, next_state, next_action) for j in (0, 1))
        terms += [(q_value(critics, j, state, action) - y) ** 2 for j in (0, 1)]
    loss = sum(terms) / len(noise)
    return loss.item(), torch.autograd.grad(loss, list(critics.parameters()))


def slow_policy_step(actor, critics, batch, args, weight):
    """What eq. (3) logs and its gradients in float64, with b = weight, from critics as they are given."""
    actor, critics = copy.deepcopy(actor).double(), copy.deepcopy(critics).double()
    q_values, distances = [], []
    for state, action, *_ in rows_of(batch):
        q_values.append(q_value(critics, 0, state, actor(state)))
        distances += [(x - y) ** 2 for x, y in zip(actor(state), action)]
    q_mean, cloning = sum(q_values) / len(q_values), sum(distances) / len(distances)
    w = args.bc_alpha * len(q_values) / sum(abs(q.item()) for q in q_values)
    loss = weight * cloning - w * q_mean
    logs = {"actor": loss.item(), "bc": cloning.item(), "q_policy": q_mean.item(), "q_weight": w}
    return logs, torch.autograd.grad(loss, list(actor.parameters()))


def assert_close_gradients(network, slow_gradients):
    """The gradients that an update has left on a network are the slow ones."""
    for parameter, slow in zip(network.parameters(), slow_gradients):
        assert slow.any()
        scale = slow.abs().max().item()
        torch.testing.assert_close(parameter.grad.double(), slow, rtol=1e-3, atol=1e-4 * scale)


def same(left, right):
    """Whether two networks have the same parameters, bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(left.parameters(), right.parameters()))


@pytest.mark.parametrize("changes", [{}, {"gamma": 0.5, "policy_noise": 3.0, "noise_clip": 0.2}])
def test_critic_step_by_loops(changes):
    """Loss and gradients of both critics equal the slow recomputation, also at a second update."""
    networks, optimizer, args = make_networks(learning_rate=0.01, **changes)
    for seed in (7, 8):
        expected, gradients = slow_critic_step(networks, make_batch(seed), args, seed)
        logs = updated(networks, optimizer, make_batch(seed), args, step=1, seed=seed)
        assert logs["losses/td"] == pytest.approx(expected, rel=1e-4)
        assert_close_gradients(networks["critics"], gradients)
        assert set(logs) == {"losses/td", "losses/q_data"}


B_CASES = {
    "offline": ({"bc_online": "drop"}, "offline", 1.0),
    "keep": ({}, "online", 1.0),
    "anneal": ({"bc_online": "anneal", "online_steps": 8}, "online", 0.75),
    "annealed": ({"bc_online": "anneal", "online_steps": 3}, "online", 0.5),
    "drop": ({"bc_online": "drop"}, "online", 0.0),
}


@pytest.mark.parametrize("case", B_CASES)
def test_policy_step_by_loops(case):
    """Gradient and logs of eq. (3) with the b due, from Q_1 alone of the critics just updated, w detached."""
    changes, phase, weight = B_CASES[case]
    networks, optimizer, args = make_networks(learning_rate=0.01, **changes)
    for seed in (7, 8):
        old, batch = copy.deepcopy(networks), make_batch(seed)
        td, _ = slow_critic_step(networks, batch, args, seed)
        logs = updated(networks, optimizer, batch, args, step=2, phase=phase, seed=seed)
        expected, gradients = slow_policy_step(old["actor"], networks["critics"], batch, args, weight)
        for name, value in (expected | {"td": td}).items():
            assert logs[f"losses/{name}"] == pytest.approx(value, rel=1e-4), name
        assert_close_gradients(networks["actor"], gradients)
        stale, _ = slow_policy_step(old["actor"], old["critics"], batch, args, weight)
        assert abs(stale["q_policy"] - expected["q_policy"]) > 0.02  # the old critics would be noticed


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_policy_delay(delay):
    """At every --policy-delay-th step policy and all targets move, at any other nothing but the critics.

    Targets then are (1 - tau) old + tau new of the networks just updated.
    """
    networks, optimizer, args = make_networks(policy_delay=delay, tau=0.25, learning_rate=0.05)
    moved = []
    for step in range(1, 8):
        old = copy.deepcopy(networks)
        logs = updated(networks, optimizer, make_batch(step), args, step)
        changed = {name for name in networks if not same(networks[name], old[name])}
        moved.append(len(changed))
        assert changed == ({"critics"} if step % delay else set(networks)), step
        assert ("losses/actor" in logs) == (step % delay == 0)
        for name in changed & {"target_actor", "target_critics"}:
            trained = networks[name.removeprefix("target_")]
            for before, after, new in zip(*(x.parameters() for x in (old[name], networks[name], trained))):
                torch.testing.assert_close(after, 0.75 * before + 0.25 * new)
    assert moved == {1: [4] * 7, 2: [1, 4] * 3 + [1], 3: [1, 1, 4] * 2 + [1]}[delay]


def test_policy_step_leaves_the_critics_alone():
    """Policy steps change no bit of the critics, give them no gradient and leave them trainable.

    With targets that stand still, critics learn the same with and without policy steps in between.
    """
    final = []
    for steps in ((1, 1, 1, 1), (1, 2, 1, 2)):
        networks, optimizer, args = make_networks(learning_rate=0.05, tau=0.0)
        for seed, step in enumerate(steps):
            updated(networks, optimizer, make_batch(seed), args, step, seed=seed)
        final.append(networks)
    without, after = final
    assert not same(without["actor"], after["actor"])
    assert same(without["critics"], after["critics"])
    for parameter in after["critics"].parameters():
        assert parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())


def test_learning_rate():
    """Adam's first step is the learning rate, for the critics and, at the first that is due, the policy."""
    networks, optimizer, args = make_networks(learning_rate=0.02)
    old = copy.deepcopy(networks)
    updated(networks, optimizer, make_batch(), args, step=2)
    for name in ("actor", "critics"):
        for before, after in zip(old[name].parameters(), networks[name].parameters()):
            assert (after - before).abs().max().item() == pytest.approx(0.02, rel=1e-3), name


# ------------------------------ the target
def smoothed_actions(policy, **changes):
    """Next actions (4000, 2) as the target critics get them, when the target policy always gives `policy`."""
    networks, optimizer, args = make_networks(**changes)
    set_policy(networks["target_actor"], *policy)
    seen = []
    networks["target_critics"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    batch = make_batch(batch_size=4000)
    updated(networks, optimizer, batch, args, step=1)
    [(observations, actions)] = seen
    assert torch.equal(observations, batch["next_observations"])
    return actions


def test_target_smoothing():
    """Normal noise of deviation 0.2 for every row and dimension, cut at 0.5 and -0.5, on pi'(s')."""
    noise = smoothed_actions((0.0, 0.3)) - torch.tensor([0.0, 0.3])
    torch.manual_seed(7)
    expected = [[min(max(0.2 * x, -0.5), 0.5) for x in row] for row in torch.randn(4000, 2).tolist()]
    torch.testing.assert_close(noise, torch.tensor(expected), rtol=0, atol=1e-6)
    assert noise.std().item() == pytest.approx(0.198, rel=0.03)
    assert noise.max().item() == pytest.approx(0.5) and noise.min().item() == pytest.approx(-0.5)
    at_the_bound = (noise.abs() > 0.4999).float().mean().item()
    assert at_the_bound == pytest.approx(math.erfc(2.5 / math.sqrt(2)), rel=0.3)  # 1.2 % lie beyond


def test_huge_noise_is_bounded():
    """Whatever --policy-noise, an action moves by --noise-clip at most, and never beyond -1 or 1."""
    actions = smoothed_actions((0.25, -0.75), policy_noise=1e6)
    torch.testing.assert_close(actions[:, 0].unique(), torch.tensor([-0.25, 0.75]))
    torch.testing.assert_close(actions[:, 1].unique(), torch.tensor([-1.0, -0.25]))
    assert actions.min() == -1
    actions = smoothed_actions((0.25, -0.75), policy_noise=1e6, noise_clip=5.0)
    assert actions.unique().tolist() == [-1, 1]
    actions = smoothed_actions((0.25, -0.75), policy_noise=0.0)
    torch.testing.assert_close(actions, torch.tensor([0.25, -0.75]).expand(4000, 2))


def test_noise_enters_the_target_only():
    """Another --policy-noise changes the TD loss, but nothing of the policy step; the latter draws none."""
    logs = []
    for policy_noise in (0.0, 0.2, 50.0):
        networks, optimizer, args = make_networks(policy_noise=policy_noise, learning_rate=0.0)
        logs.append(updated(networks, optimizer, make_batch(), args, step=2))
        after = torch.get_rng_state()
        torch.manual_seed(7)
        torch.randn(6, 2)
        assert torch.equal(torch.get_rng_state(), after)
    assert len({log.pop("losses/td") for log in logs}) == 3
    assert logs[0] == logs[1] == logs[2] and "losses/actor" in logs[0]


def test_target_by_hand():
    """Q = 0, targets 4 and 6, r = 1, gamma 0.5: y is 3, or 1 at a terminal, and both critics' errors add."""
    networks, optimizer, args = make_networks(gamma=0.5)
    with torch.no_grad():
        for name in ("critics", "target_critics"):
            for parameter in networks[name].parameters():
                parameter.zero_()
        networks["target_critics"].biases[-1].copy_(torch.tensor([6.0, 4.0]).reshape(2, 1, 1))
    batch = make_batch()
    batch["rewards"].fill_(1.0)
    td = updated(networks, optimizer, batch, args, step=1)["losses/td"]
    assert td == pytest.approx(2 * (4 * 9 + 2 * 1) / 6, rel=1e-5)


def test_next_actions_are_the_target_policys():
    """A change of pi' changes the TD loss, a change of pi does not."""
    td = []
    for name in (None, "target_actor", "actor"):
        networks, optimizer, args = make_networks()
        if name:
            set_policy(networks[name], 0.9, -0.9)
        td.append(updated(networks, optimizer, make_batch(), args, step=1)["losses/td"])
    plain, target_policy, policy = td
    assert policy == plain and abs(target_policy - plain) > 1e-3 * plain


# ------------------------------ the policy loss by hand
@pytest.mark.parametrize(
    ("states", "q_weight"), [((1.0, -3.0), 1.25), ((3.0, 3.0), 2.5 / 3), ((-4.0, -1.0, 5.0), 0.75)]
)
@pytest.mark.parametrize(("bc_online", "weight"), [("keep", 1), ("anneal", 0.75), ("drop", 0)])
def test_policy_loss_by_hand(states, q_weight, bc_online, weight):
    """Q_1 = s_0 + a_0 and pi = 0: w is 2.5 / mean |s_0|, and dL / da is (-w, 0) - b mean a.

    With Q = (1, -3) w is 1.25. The cloning term is a mean over both action dimensions, so its slope is
    2 (0 - a) / 2. No gradient passes through w: for Q of one sign, -w mean Q would have none at all.
    """
    changes = {"learning_rate": 0.0, "critic_layers": 1, "bc_online": bc_online, "online_steps": 8}
    networks, optimizer, args = make_networks(**changes)
    set_policy(networks["actor"], 0.0, 0.0)
    with torch.no_grad():
        for parameter in networks["critics"].parameters():
            parameter[0] = 0  # the second critic keeps its random values
        (into, out), (shift, back) = networks["critics"].weights, networks["critics"].biases
        into[0, 0, 0] = into[0, 4, 0] = out[0, 0, 0] = 1  # states come first, then actions
        shift[0, 0, 0], back[0, 0, 0] = 50, -50  # far from the kink of the ReLU
    batch = make_batch()
    batch["observations"][:, 0] = torch.tensor(states).repeat(6 // len(states))
    logs = updated(networks, optimizer, batch, args, step=2, phase="online")
    assert logs["losses/q_weight"] == pytest.approx(q_weight, rel=1e-5)
    assert logs["losses/q_policy"] == pytest.approx(sum(states) / len(states), abs=1e-5)
    assert logs["losses/bc"] == pytest.approx(batch["actions"].square().sum().item() / 12)
    expected = torch.tensor([-q_weight, 0.0]) - weight * batch["actions"].mean(0)
    torch.testing.assert_close(networks["actor"][0][-1].bias.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 10.0])
def test_weight_is_free_of_scale(alpha):
    """w makes mean |w Q_1| equal to --bc-alpha, whatever the scale of the critics."""
    networks, optimizer, args = make_networks(bc_alpha=alpha, learning_rate=0.0)
    logs = []
    for _ in range(2):
        logs.append(updated(networks, optimizer, make_batch(), args, step=2))
        with torch.no_grad():
            networks["critics"].weights[-1].mul_(100)
            networks["critics"].biases[-1].mul_(100)
    first, scaled = logs
    observations = make_batch()["observations"]
    q_values = networks["critics"](observations, networks["actor"](observations))[0] / 100**2
    assert first["losses/q_weight"] * q_values.abs().mean().item() == pytest.approx(alpha, rel=1e-4)
    assert scaled["losses/q_policy"] == pytest.approx(100 * first["losses/q_policy"], rel=1e-3)
    assert scaled["losses/actor"] == pytest.approx(first["losses/actor"], rel=1e-3)


# ------------------------------ b, the weight of cloning
@pytest.mark.parametrize(
    ("bc_online", "online"),
    [
        ("keep", [1, 1, 1, 1, 1, 1]),
        ("anneal", [0.9, 0.8, 0.6, 0.5, 0.5, 0.5]),
        ("drop", [0, 0, 0, 0, 0, 0]),
    ],
)
def test_bc_weight_by_hand(bc_online, online):
    """Of 10 online steps: 1 - t / T down to 0.5 and no lower, or 1, or 0; offline 1 in any case."""
    args, steps = make_args(bc_online=bc_online, online_steps=10), (1, 2, 4, 5, 6, 10)
    assert [td3bc_sera.bc_weight("online", step, args) for step in steps] == pytest.approx(online)
    assert [td3bc_sera.bc_weight("offline", step, args) for step in (*steps, 10**6)] == [1] * 7


def test_cloning_in_a_run(tmp_path, monkeypatch):
    """Main tells the update the phase, and steps that count from 1 in each: b falls from the switch on."""
    original, seen = td3bc_sera.bc_weight, []

    def bc_weight(*args):
        seen.append((*args[:2], original(*args)))
        return seen[-1][-1]

    monkeypatch.setattr(td3bc_sera, "bc_weight", bc_weight)
    options = (
        "--env hopper-medium-mini --device cpu --offline-steps 5 --online-steps 8 --eval-episodes 1 "
        "--batch-size 32 --sera-k 5 --hidden-dim 16 --bc-online anneal --run-dir"
    )
    td3bc_sera.main([*options.split(), str(tmp_path / "run")])
    offline = [("offline", 2, 1.0), ("offline", 4, 1.0)]
    online = [("online", 2, 0.75), ("online", 4, 0.5), ("online", 6, 0.5), ("online", 8, 0.5)]
    assert seen == offline + online
