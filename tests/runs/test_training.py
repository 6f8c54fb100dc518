"""The two phases of a run: what is sampled and learned when, and what the bonus has to do with it.

The sections that make them are the same in every script, so long tests run on one of them, SAC.
"""

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from recorded_run import (
    ENV,
    Scripted,
    assert_same,
    differ,
    part,
    recorded_run,
    scripted_env,
    write_dataset,
)

import calql_sera
import sac_sera
import td3bc_sera

TRAINED = ("actor", "critics", "target_critics")
FROM_SCRATCH = ["--offline-steps", "0", "--mixing-ratio", "0"]


@pytest.fixture(scope="module")
def run_script(tmp_path_factory):
    """Runs any script on a small made-up dataset; see recorded_run."""
    dataset = write_dataset(tmp_path_factory.mktemp("data") / "made-up.hdf5")

    def run(script, *options, folder=None, **replaced):
        folder = folder or tmp_path_factory.mktemp("run")
        return recorded_run(script, dataset, folder, *options, **replaced)

    return run


@pytest.fixture(scope="module")
def train(run_script):
    """Runs SAC."""

    def run(*options, **settings):
        return run_script(sac_sera, *options, **settings)

    return run


@pytest.fixture(scope="module")
def plain(train):
    """A run of the plain algorithm."""
    return train("--sera-coef", "0")


@pytest.fixture(scope="module")
def sera(train):
    """The same run with the bonus."""
    return train("--sera-coef", "1")


@pytest.fixture(scope="module")
def scripted(train):
    """A run of 44 steps in scripted episodes: 7 + 9 + 7 + 9 + 7, and five of one more."""
    return train("--online-steps", "44", make_env=scripted_env)


def transitions(run):
    """The online rows, without the q that a bonus may have asked for."""
    return {name: column for name, column in run.rows.items() if name != "bonus_q"}


def assert_same_learning(left, right):
    """Both runs ended with the same agent, optimizer, online rows and random numbers."""
    for name in ("agent", "optimizer", "rng_cpu", "rng_env", "train_scores"):
        assert_same(left.last[name], right.last[name])
    assert_same(transitions(left), transitions(right))


def assert_same_run(left, right):
    """And with the same evaluations."""
    assert_same_learning(left, right)
    assert_same(left.last["evals"], right.last["evals"])


def numbers(run):
    """How many dataset and online rows each batch of a run had."""
    return [(sample.rows.dataset, sample.rows.online) for sample in run.samples]


# ------------------------------ rows and batches
def test_online_rows(scripted):
    """Transitions are stored in order: raw rewards, no timeout as terminal, states normalised."""
    steps = scripted.envs[0].all_steps()
    rows = scripted.rows
    assert rows["rewards"].tolist() == list(range(10, 54))
    assert rows["terminals"].tolist() == [step.terminated for step in steps]
    assert rows["terminals"].sum() == 3
    assert sum(step.done for step in steps) == 5
    mean = scripted.data["observations"].mean(0)
    std = scripted.data["observations"].std(0) + 1e-3
    observations = np.array([step.observation for step in steps])
    next_observations = np.array([step.next_observation for step in steps])
    for name, states in (("observations", observations), ("next_observations", next_observations)):
        np.testing.assert_allclose(rows[name], (states - mean) / std, rtol=1e-4, atol=1e-4)
    actions = np.array([step.action for step in steps])
    np.testing.assert_array_equal(rows["actions"], actions.clip(-1 + 1e-5, 1 - 1e-5))


def test_batches(scripted):
    """Dataset rows only until online ones fill their half, then half of the batch from both.

    The updates of a step see the transitions of the steps before it.
    """
    assert len(scripted.samples) == 12 + 44
    for number, sample in enumerate(scripted.samples):
        steps = max(0, number - 12)
        online_rows = 16 if steps >= 16 else 0
        offline_rows = 32 - online_rows
        assert sample.steps == sample.online_size == steps
        assert (sample.rows.dataset, sample.rows.online) == (offline_rows, online_rows)
        online = sample.batch["rewards"] >= 10  # the dataset's are below 5
        assert online.tolist() == [False] * offline_rows + [True] * online_rows


@pytest.mark.parametrize(
    ("mixing_ratio", "expected"),
    [
        ("0.75", [(32, 0)] * 8 + [(24, 8)] * 36),
        ("0", [(0, 32)] * 12),  # no update before there is a whole batch
        ("1", [(32, 0)] * 44),
    ],
)
def test_mixing_ratio(mixing_ratio, expected, train):
    """It is the share of the batch that comes from the dataset."""
    options = ["--online-steps", "44", "--mixing-ratio", mixing_ratio]
    run = train(*options, make_env=scripted_env)
    assert numbers(run) == [(32, 0)] * 12 + expected


def test_append(script, run_script):
    """Every online batch is drawn from all transitions alike, and the first one too."""
    options = ["--online-steps", "20", "--online-sampling", "append"]
    run = run_script(script, *options, make_env=scripted_env)
    assert numbers(run)[:12] == [(32, 0)] * 12
    assert [tuple(sample.rows) for sample in run.samples[12:]] == [(0, 0, 32)] * 20
    online = [sample.batch["rewards"] >= 10 for sample in run.samples[12:]]
    assert not online[0].any()
    assert any(rows.any() for rows in online)


def test_append_from_scratch(run_script):
    """Without a dataset the first update waits for a batch, as mix does."""
    options = ["--online-steps", "44", "--learning-starts", "0", "--online-sampling", "append"]
    run = run_script(sac_sera, *FROM_SCRATCH, *options, make_env=scripted_env)
    assert [sample.online_size for sample in run.samples] == list(range(32, 44))


def test_when_online_rows_count(script, run_script):
    """Each transition may be sampled at the next step; Cal-QL waits for the end of an episode.

    From scratch there is no update before the rows make a batch, here of four.
    """
    options = ["--online-steps", "20", "--batch-size", "4", "--sera-k", "2"]
    options += [*FROM_SCRATCH, "--learning-starts", "0", "--online-sampling", "mix"]
    run = run_script(script, *options, make_env=scripted_env)
    waits = script is calql_sera
    expected = [7] * 9 + [16] * 4 if waits else list(range(4, 20))
    assert [sample.online_size for sample in run.samples] == expected
    for sample in run.samples:
        assert (sample.rows.dataset, sample.rows.online) == (0, 4)
        assert ("mc_returns" in sample.batch) == waits


def test_from_scratch(train):
    """Without data the first update waits for a batch; then every network learns."""
    options = [*FROM_SCRATCH, "--online-steps", "44", "--learning-starts", "0"]
    run = train(*options, make_env=scripted_env)
    assert numbers(run) == [(0, 32)] * 12
    assert run.samples[0].online_size == 32
    assert run.run.buffer.offline_size == 0
    for name in TRAINED:
        assert differ(part(run.last["agent"], name), part(run.initial, name))


@pytest.mark.parametrize(
    "start", [["--offline-steps", "2"], [*FROM_SCRATCH, "--learning-starts", "0"]]
)
def test_last_step(start, script, run_script):
    """The last step leaves no transition out, wherever in an episode it is.

    A run that goes on from there samples them, and the environment begins another episode.
    """
    options = [*start, "--batch-size", "4", "--sera-k", "2"]
    run = run_script(script, *options, "--online-steps", "10", make_env=scripted_env)
    assert [len(episode) for episode in run.envs[0].episodes] == [7, 3]
    assert run.rows["rewards"].tolist() == list(range(10, 20))
    assert run.rows["terminals"].tolist() == [0] * 6 + [1] + [0] * 3

    more = ["--online-steps", "14", "--resume"]
    extended = run_script(script, *options, *more, folder=run.folder, make_env=scripted_env)
    assert [len(episode) for episode in extended.envs[0].episodes] == [4]
    expected = [10] * 4 if script is calql_sera else [10, 11, 12, 13]
    assert [sample.online_size for sample in extended.samples] == expected
    assert extended.rows["rewards"].tolist() == [*range(10, 20), *range(10, 14)]
    for name, column in run.rows.items():
        assert torch.equal(extended.rows[name][:10], column), name


# ------------------------------ steps and updates
def test_one_update_per_step(plain):
    """A phase of n steps makes n updates and ends with a checkpoint and an evaluation.

    Adam just goes on. The checkpoint of step 33 waits for the end of the episode.
    """
    assert len(plain.updates) == 12 + 60
    assert [update.kind.online for update in plain.updates] == [False] * 12 + [True] * 60
    assert len(plain.envs[0].all_steps()) == 60

    lengths = [len(episode) for episode in plain.envs[0].episodes]
    waited = next(end for end in itertools.accumulate(lengths) if end >= 33)
    assert 33 < waited < 60
    saved = [(checkpoint["phase"], checkpoint["step"]) for checkpoint in plain.checkpoints]
    assert saved == [("offline", 12), ("online", waited), ("online", 60)]
    evaluated = [(row["phase"], int(row["step"]), int(row["episode"])) for row in plain.evals]
    assert evaluated == [("offline", 12, 0), ("online", 0, 0), ("online", 30, 0), ("online", 60, 0)]

    for checkpoint, updates in zip(plain.checkpoints, (12, 12 + waited, 72), strict=True):
        states = checkpoint["optimizer"]["state"].values()
        assert {int(state["step"]) for state in states} == {updates}
    start = plain.checkpoints[0]["agent"]
    for name, value in plain.initial.items():
        assert not torch.equal(start[name], value), name
        assert not torch.equal(plain.last["agent"][name], start[name]), name


@pytest.mark.parametrize("updates_per_step", [1, 3])
def test_updates_per_step(script, updates_per_step, run_script):
    """That many updates precede every online step, each on a batch of its own; offline it is one.

    The last of them has numbers to log. Learning rates move on with every update.
    """
    options = ["--online-steps", "6", "--updates-per-step", str(updates_per_step)]
    options += ["--log-every", "4"]
    run = run_script(script, *options, make_env=scripted_env)
    offline, online = run.samples[:12], run.samples[12:]
    assert [sample.steps for sample in offline] == [0] * 12
    expected = [step for step in range(6) for _ in range(updates_per_step)]
    assert [sample.steps for sample in online] == expected
    assert len(run.updates) == len(run.samples)
    assert len(run.bonuses) == len(online)
    for one, other in itertools.pairwise(run.samples):
        assert not torch.equal(one.batch["observations"], other.batch["observations"])

    logged = [number for number, update in enumerate(run.updates, 1) if update.kind.log]
    after_step = [12 + step * updates_per_step for step in (4, 6)]
    assert logged == [4, 8, 12, *after_step]
    assert [bonus.log for bonus in run.bonuses] == [update.kind.log for update in run.updates[12:]]
    if run.run.scheduler:
        assert run.run.scheduler.last_epoch == len(run.updates)

    critic = next(run.run.agent.critics.parameters())
    assert run.run.optimizer.state[critic]["step"] == len(run.updates)
    if script is not td3bc_sera:  # which has a test of its own
        policy = next(run.run.agent.actor.parameters())
        assert run.run.optimizer.state[policy]["step"] == len(run.updates)
        assert all(update.kind.policy_due for update in run.updates)


@pytest.mark.parametrize(("updates_per_step", "delay"), [(1, 2), (3, 2), (2, 3), (4, 2), (2, 2)])
def test_delayed_policy(updates_per_step, delay, run_script):
    """TD3+BC's policy learns in every --policy-delay th update, however many a step has.

    They are counted from the start of each phase.
    """
    options = ["--online-steps", "7", "--updates-per-step", str(updates_per_step)]
    options += ["--offline-steps", "5", "--policy-delay", str(delay)]
    run = run_script(td3bc_sera, *options, make_env=scripted_env)
    due = [update.kind.policy_due for update in run.updates]
    online = 7 * updates_per_step
    assert due[:5] == [number % delay == 0 for number in range(1, 6)]
    assert due[5:] == [number % delay == 0 for number in range(1, online + 1)]
    state = run.run.optimizer.state
    policy = next(run.run.agent.actor.parameters())
    critic = next(run.run.agent.critics.parameters())
    assert state[policy]["step"] == 5 // delay + online // delay
    assert state[critic]["step"] == 5 + online


def test_delayed_policy_of_a_resumed_run(run_script):
    """The count goes on where it was: 15 online updates before, the policy learns in the 16th."""
    options = ["--updates-per-step", "3", "--policy-delay", "2"]
    run = run_script(td3bc_sera, *options, "--online-steps", "5", make_env=scripted_env)
    more = ["--online-steps", "7", "--resume"]
    extended = run_script(td3bc_sera, *options, *more, folder=run.folder, make_env=scripted_env)
    due = [update.kind.policy_due for update in extended.updates]
    assert due == [True, False, True, False, True, False]


# ------------------------------ random first steps
def test_learning_starts(script, run_script):
    """From scratch the first steps are random, even and without updates; then both change.

    The policy acts 0.5 everywhere here. Cal-QL waits for the end of the episode too, step 16.
    """

    def act(run, observations, deterministic):
        return np.full((len(observations), 3), 0.5, dtype=np.float32)

    options = [*FROM_SCRATCH, "--online-steps", "24", "--learning-starts", "10"]
    options += ["--batch-size", "8", "--sera-k", "2"]
    run = run_script(script, *options, make_env=scripted_env, act=act)
    actions = np.array([step.action for step in run.envs[0].all_steps()])
    assert (actions[10:] == 0.5).all()
    assert len(np.unique(actions[:10])) == 30
    assert np.abs(actions).max() <= 1
    assert actions.dtype == np.float32
    first = 16 if script is calql_sera else 10
    assert [sample.steps for sample in run.samples] == list(range(first, 24))


def test_random_steps_are_uniform(train):
    """A thousand random actions fill [-1, 1] evenly in each dimension, and differ by seed."""
    options = [*FROM_SCRATCH, "--online-steps", "1001", "--learning-starts", "1000"]
    options += ["--eval-every", "1001"]
    runs = [train(*options, "--seed", seed, make_env=scripted_env) for seed in ("1", "2")]
    first, second = (
        np.array([step.action for step in run.envs[0].all_steps()])[:1000] for run in runs
    )
    assert [sample.steps for sample in runs[0].samples] == [1000]
    for dimension in range(3):
        counts, _ = np.histogram(first[:, dimension], bins=10, range=(-1, 1))
        assert counts.sum() == 1000
        assert np.abs(counts - 100).max() < 5 * 90**0.5
    assert np.abs(np.corrcoef(first.T) - np.eye(3)).max() < 5 / 1000**0.5
    assert not np.isin(first, second).any()


@pytest.mark.parametrize("mixing_ratio", ["0.5", "0"])
def test_learning_starts_with_a_dataset(mixing_ratio, train):
    """Once there is a dataset --learning-starts plays no part, even if no batch has its rows."""
    options = ["--mixing-ratio", mixing_ratio, "--online-steps", "40"]
    early, late = (
        train(*options, "--learning-starts", steps, make_env=scripted_env) for steps in ("0", "90")
    )
    assert_same_run(early, late)
    assert len(late.updates) == 12 + (40 if mixing_ratio == "0.5" else 8)


# ------------------------------ exploring, evaluating, seeds
def test_exploring_and_evaluating(train):
    """The policy is sampled to explore, step by step, and its mean is taken for evaluation."""

    def act(run, observations, deterministic):
        return np.full((len(observations), 3), 0.125 if deterministic else -0.25)

    run = train(act=act, make_env=scripted_env)
    assert len(run.envs) == 2
    for env, expected in zip(run.envs, (-0.25, 0.125)):
        steps = env.all_steps()
        assert len(steps) > 10
        assert all((step.action == expected).all() for step in steps)


def test_the_environment_is_seeded_once(train):
    """With --seed, at the first reset; then its own generator draws the start states."""
    run = train("--seed", "5", "--online-steps", "20", make_env=scripted_env)
    assert run.envs[0].seeds == [5, None, None]
    assert None not in run.envs[1].seeds


def test_equal_runs(train, sera):
    """Two runs with the same arguments end alike, bit for bit; another seed does not."""
    assert_same_run(train("--sera-coef", "1"), sera)
    other = train("--sera-coef", "1", "--seed", "2")
    for name in TRAINED:
        assert differ(part(other.initial, name), part(sera.initial, name)), name
        assert differ(part(other.last["agent"], name), part(sera.last["agent"], name)), name
    first, other_first = (run.envs[0].all_steps()[0].observation for run in (sera, other))
    assert not np.array_equal(first, other_first)


def test_evaluations_do_not_disturb_training(train, plain):
    """More episodes of evaluation, at other steps, change nothing that is learned."""
    run = train("--sera-coef", "0", "--eval-every", "7", "--eval-episodes", "2")
    assert len(run.evals) == 2 * (1 + 1 + 1 + 8 + 1)
    assert_same_learning(run, plain)


def test_logs_do_not_disturb_training(train, sera):
    """Numbers to log at every step change nothing that is learned."""
    run = train("--sera-coef", "1", "--log-every", "1")
    assert all(update.kind.log for update in run.updates)
    assert sum(update.kind.log for update in sera.updates) == 2
    assert_same_run(run, sera)


# ------------------------------ the bonus
def test_coefficient_zero(train, plain):
    """--sera-coef 0 never asks for a bonus: an impossible one changes no bit."""

    def intrinsic_reward(*_):
        raise AssertionError("the plain algorithm has no bonus")

    assert_same_run(train("--sera-coef", "0", intrinsic_reward=intrinsic_reward), plain)
    assert plain.bonuses == []


def test_bonus_draws_no_random_numbers(train, plain):
    """A bonus that is worked out and then multiplied by 0 leaves every bit as without."""
    original = sac_sera.intrinsic_reward
    bonuses = []

    def intrinsic_reward(*args):
        bonus, logs = original(*args)
        bonuses.append(bonus)
        return 0 * bonus, logs

    run = train("--sera-coef", "1", intrinsic_reward=intrinsic_reward)
    assert_same_run(run, plain)
    assert len(bonuses) == 60
    assert all(bonus.any() for bonus in bonuses)


def test_bonus_acts_online_only(plain, sera):
    """With the bonus all is the same up to the start of the online phase, and different after."""
    assert_same(sera.checkpoints[0]["agent"], plain.checkpoints[0]["agent"])
    assert [row["phase"] for row in sera.evals[:2]] == ["offline", "online"]
    assert sera.evals[:2] == plain.evals[:2]
    for name in TRAINED:
        assert differ(part(sera.last["agent"], name), part(plain.last["agent"], name)), name
    assert sera.evals[2:] != plain.evals[2:]


def test_bonus_in_the_batch(train):
    """Updates get r + bonus online, and r offline; the bonus is asked once per online update."""
    bonus = 100 + torch.arange(32.0)

    def intrinsic_reward(*_):
        return bonus, {}

    run = train(intrinsic_reward=intrinsic_reward)
    assert len(run.updates) == len(run.samples) == 12 + 60
    assert len(run.bonuses) == 60
    for number, (sample, update) in enumerate(zip(run.samples, run.updates)):
        expected = sample.batch["rewards"]
        if number >= 12:
            expected = expected + bonus
            asked = run.bonuses[number - 12]
            assert torch.equal(asked.rewards, sample.batch["rewards"])
            assert asked.varying_dims.tolist() == list(range(11))
        assert torch.equal(update.rewards, expected)


class EndsAtTheLimit(Scripted):
    """Fails in the very step that also reaches the time limit."""

    def step(self, action):
        observation, reward, *_ = super().step(action)
        ends = self.time == 7
        return observation, reward, ends, ends, {}


def test_terminal_in_the_last_step_of_the_time_limit(train):
    """Terminated and truncated at once is a terminal: nothing comes after it."""

    def make_env(*_, **__):
        return gymnasium.wrappers.RecordEpisodeStatistics(EndsAtTheLimit())

    run = train("--online-steps", "21", make_env=make_env)
    last_of_seven = [float(step % 7 == 6) for step in range(21)]
    assert run.rows["terminals"].tolist() == last_of_seven


def test_bonus_is_never_stored(sera):
    """Stored rewards are the environment's; returns and scores have no bonus."""
    steps = sera.envs[0].all_steps()
    rewards = np.array([step.reward for step in steps])
    np.testing.assert_array_equal(sera.rows["rewards"], rewards.astype(np.float32))
    assert len(sera.evals) == len(sera.envs[1].episodes) == 4
    for row, episode in zip(sera.evals, sera.envs[1].episodes):
        total = sum(step.reward for step in episode)
        assert float(row["return"]) == pytest.approx(total, rel=1e-12)
        assert int(row["length"]) == len(episode)
        score = float(row["normalized_score"])
        by_hand = 100 * (total + 20.272305) / (3234.3 + 20.272305)
        assert score == pytest.approx(by_hand, rel=1e-12)
        assert score == sac_sera.normalized_score(ENV, float(row["return"]))


# ------------------------------ whose values condition the bonus
def q_of(run, agent_state, batch):
    """What SAC with these parameters takes for q: the lower value, or that of the mean action."""
    args = sac_sera.Args(**run.last["args"])
    agent = sac_sera.Agent(11, 3, args)
    agent.load_state_dict(agent_state)
    with torch.no_grad():
        if args.sera_bonus == "v":
            return agent.value(batch["observations"])
        return agent.critics(batch["observations"], batch["actions"]).amin(0)


def assert_stored_q(run, agent_state, samples):
    """The transitions of all these batches came with the q of that agent."""
    assert samples
    for sample in samples:
        expected = q_of(run, agent_state, sample.batch)
        torch.testing.assert_close(sample.batch["bonus_q"], expected)


@pytest.mark.parametrize("kind", ["q", "v"])
def test_offline_critics(kind, train, sera):
    """--sera-critic offline: a whole copy made when the online phase starts gives every bonus.

    Its q of all transitions, of the dataset and of online ones, is stored with them.
    """
    run = sera if kind == "q" else train("--sera-bonus", "v")
    start, *online = run.checkpoints
    for checkpoint in online:
        assert_same(checkpoint["bonus_agent"], start["agent"])
    assert len(run.bonuses) == 60
    assert_stored_q(run, start["agent"], run.samples[12:])
    assert {sample.rows.online for sample in run.samples[12:]} == {0, 16}
    last = run.samples[-1].batch
    learned_q = q_of(run, run.last["agent"], last)
    assert not torch.isclose(learned_q, last["bonus_q"], rtol=1e-3).any()


def test_stored_q_of_a_resumed_run(train, tmp_path):
    """It is worked out anew for the dataset, and comes with the online rows."""
    train("--online-steps", "20", folder=tmp_path, make_env=scripted_env)
    more = ["--online-steps", "30", "--resume"]
    extended = train(*more, folder=tmp_path, make_env=scripted_env)
    assert len(extended.samples) == 10
    assert_stored_q(extended, extended.last["bonus_agent"], extended.samples)
    assert differ(extended.last["bonus_agent"], extended.last["agent"])


def test_current_critics(train, sera):
    """--sera-critic current: the learning agent itself, as it was before each update."""
    run = train("--sera-critic", "current")
    for checkpoint in run.checkpoints[1:]:
        assert_same(checkpoint["bonus_agent"], checkpoint["agent"])
    assert_same(run.checkpoints[0]["bonus_agent"], run.initial)  # so --resume may still say random
    assert not any("bonus_q" in sample.batch for sample in run.samples)
    critics = [bonus.critics for bonus in run.bonuses]
    start, middle, last = run.checkpoints
    assert_same(critics[0], part(start["agent"], "critics"))
    assert_same(critics[middle["step"]], part(middle["agent"], "critics"))
    assert all(differ(one, next_one) for one, next_one in itertools.pairwise(critics))
    assert differ(part(last["agent"], "critics"), part(sera.last["agent"], "critics"))


def test_resumed_current_critics(train, tmp_path):
    """They are the learning ones after a resume too."""
    train("--sera-critic", "current", "--online-steps", "10", folder=tmp_path)
    run = train("--sera-critic", "current", "--online-steps", "20", "--resume", folder=tmp_path)
    critics = [bonus.critics for bonus in run.bonuses]
    assert len(critics) == 10
    assert all(differ(one, next_one) for one, next_one in itertools.pairwise(critics))


def test_random_critics(train, sera):
    """--sera-critic random: the agent as it was before any training."""
    run = train("--sera-critic", "random")
    assert_same(run.checkpoints[0]["agent"], sera.checkpoints[0]["agent"])
    for checkpoint in run.checkpoints:
        assert_same(checkpoint["bonus_agent"], run.initial)
    assert_stored_q(run, run.initial, run.samples[12:])
    assert differ(part(run.last["agent"], "critics"), part(sera.last["agent"], "critics"))


def test_offline_critics_without_offline_steps(train):
    """Without an offline phase the frozen critics are untrained ones."""
    run = train("--offline-steps", "0", "--online-steps", "20")
    assert_same(run.last["bonus_agent"], run.initial)
    assert differ(part(run.last["agent"], "critics"), part(run.initial, "critics"))
    assert len(run.bonuses) == 20
    assert_stored_q(run, run.initial, run.samples)


# ------------------------------ the pool
def test_pool(train):
    """--sera-pool draws so many transitions more for every bonus, mixed as the batch is."""
    options = ["--sera-pool", "41", "--mixing-ratio", "0.75", "--online-steps", "20"]
    run = train(*options, make_env=scripted_env)
    assert numbers(run)[:12] == [(32, 0)] * 12
    online = numbers(run)[12:]
    assert online == [(32, 0), (41, 0)] * 8 + [(24, 8), (31, 10)] * 12
    pools = run.samples[13::2]
    for bonus, sample in zip(run.bonuses, pools, strict=True):
        assert_same(bonus.pool, sample.batch)
    assert_stored_q(run, run.checkpoints[0]["agent"], pools)


def test_bonuses_without_a_pool(train, sera):
    """There is none by default, nor for the constant bonus, which has no neighbours."""
    assert all(bonus.pool is None for bonus in sera.bonuses)
    options = ["--sera-pool", "41", "--sera-bonus", "constant", "--online-steps", "20"]
    run = train(*options, make_env=scripted_env)
    assert len(run.samples) == 12 + 20
    assert all(bonus.pool is None for bonus in run.bonuses)
