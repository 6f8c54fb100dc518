"""The replay buffer: what it stores of transitions, how it lays them out, which rows it draws."""

import numpy as np
import pytest
import torch
from recompute import make_args, make_rows

CPU = torch.device("cpu")


def make_buffer(script, data, **changes):
    """A buffer of a dataset, with room for 30 online transitions."""
    args = make_args(script, **({"online_steps": 30} | changes))
    return script.ReplayBuffer(data, args, CPU)


def stored(buffer):
    """All its rows so far, by name."""
    columns = buffer.as_columns(buffer.table[: buffer.size])
    return {name: column.numpy() for name, column in columns.items()}


# ------------------------------ rows
def test_rows(script):
    """States by the dataset's mean and deviation, raw rewards, timeouts that are no terminals."""
    data = make_rows(20, timeouts=[5], terminals=[11])
    online = make_rows(6, timeouts=[2], first=100)
    buffer = make_buffer(script, data)
    assert (buffer.offline_size, buffer.online_size, buffer.size) == (20, 0, 20)
    buffer.append(online)
    assert (buffer.offline_size, buffer.online_size, buffer.size) == (20, 6, 26)
    mean = data["observations"].mean(0)
    std = data["observations"].std(0) + 1e-3
    columns = stored(buffer)
    for rows, start in ((data, 0), (online, 20)):
        end = start + len(rows["rewards"])
        part = {name: column[start:end] for name, column in columns.items()}
        for name in ("observations", "next_observations"):
            np.testing.assert_allclose(part[name], (rows[name] - mean) / std, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(part["rewards"], rows["rewards"])
        np.testing.assert_array_equal(part["terminals"], rows["terminals"])
        np.testing.assert_allclose(part["actions"], rows["actions"], rtol=0, atol=2e-5)


def test_nothing_to_normalize_by(script):
    """Without a dataset, or with --no-normalize-observations, states are stored as they are."""
    rows = make_rows(6)
    from_scratch = make_buffer(script, None)
    assert (from_scratch.offline_size, from_scratch.size, from_scratch.capacity) == (0, 0, 30)
    from_scratch.append(rows)
    assert (from_scratch.offline_size, from_scratch.online_size) == (0, 6)
    raw = make_buffer(script, rows, normalize_observations=False)
    assert (raw.offline_size, raw.online_size, raw.capacity) == (6, 0, 36)
    for buffer in (from_scratch, raw):
        columns = stored(buffer)
        for name in ("observations", "next_observations"):
            np.testing.assert_array_equal(columns[name], rows[name])


def test_a_constant_dimension(script):
    """A state dimension that never changes, as ant's 84, becomes 0 and not 0 / 0."""
    rows = make_rows(6)
    rows["observations"][:, 1] = 2.5
    rows["next_observations"][:, 1] = 2.5
    columns = stored(make_buffer(script, rows))
    for name in ("observations", "next_observations"):
        assert not columns[name][:, 1].any()
        assert columns[name][:, 0].all()


def test_rewards_are_scaled_then_shifted(script):
    """--reward-scale, then --reward-bias, for dataset and online rows alike."""
    buffer = make_buffer(script, make_rows(4), reward_scale=10.0, reward_bias=-5.0)
    buffer.append(make_rows(2, first=100))
    assert stored(buffer)["rewards"].tolist() == [-5, 5, 15, 25, 995, 1005]


def test_scale_of_normalize_rewards(script):
    """--normalize-rewards multiplies by 1000 / (best - worst return), before the other two.

    The returns are 0 + 1 + 2 = 3 and 3 + 4 = 7.
    """
    changes = {"normalize_rewards": True, "reward_scale": 2.0, "reward_bias": 1.0}
    buffer = make_buffer(script, make_rows(5, timeouts=[2]), **changes)
    buffer.append(make_rows(1, first=100))
    expected = 500 * np.array([0, 1, 2, 3, 4, 100]) + 1
    assert stored(buffer)["rewards"].tolist() == expected.tolist()


# ------------------------------ layout
def test_columns_share_the_table(script):
    """Every number of a row belongs to one column, and columns are views of the rows given."""
    buffer = make_buffer(script, make_rows(5))
    width = buffer.table.shape[1]
    rows = torch.arange(3 * width).reshape(3, width).float()
    columns = buffer.as_columns(rows)
    assert columns["observations"].shape == columns["next_observations"].shape == (3, 4)
    assert columns["actions"].shape == (3, 2)
    assert columns["rewards"].shape == columns["terminals"].shape == (3,)
    numbers = torch.cat([column.reshape(-1) for column in columns.values()])
    assert torch.equal(numbers.sort().values, rows.reshape(-1))
    columns["rewards"].fill_(-1)
    assert (rows == -1).sum() == 3


def test_rows_come_back(script):
    """Rows taken from the table of one buffer, as a checkpoint does, fit that of another."""
    buffer = make_buffer(script, make_rows(20))
    buffer.append(make_rows(5, first=100))
    buffer.append(make_rows(3, first=200))
    other = make_buffer(script, make_rows(20))
    other.append_rows(buffer.table[buffer.offline_size : buffer.size].clone())
    assert (other.offline_size, other.online_size) == (20, 8)
    torch.testing.assert_close(other.table, buffer.table, rtol=0, atol=0, equal_nan=True)


def test_rows_of_an_older_checkpoint(script):
    """Plain runs had no unused column once; their rows fit as well."""
    buffer = make_buffer(script, make_rows(20), sera_coef=0.0)
    buffer.append(make_rows(5, first=100))
    other = make_buffer(script, make_rows(20), sera_coef=0.0)
    other.append_rows(buffer.table[20:25, :-1].clone())
    assert (other.size, other.online_size) == (25, 5)
    assert torch.equal(other.table, buffer.table)


@pytest.mark.parametrize(
    ("changes", "stored_q"),
    [
        ({}, True),
        ({"sera_bonus": "v"}, True),
        ({"sera_critic": "random"}, True),
        ({"sera_critic": "current"}, False),
        ({"sera_bonus": "state"}, False),
        ({"sera_bonus": "constant"}, False),
        ({"sera_coef": 0.0}, False),
    ],
)
def test_column_of_the_bonus(script, changes, stored_q):
    """There is one for q if frozen critics give it: NaN until it is worked out.

    Without it all else stands at the same place of equally wide rows: products round by that.
    """
    buffer = make_buffer(script, make_rows(5), **changes)
    default = make_buffer(script, make_rows(5))
    assert buffer.table.shape == default.table.shape
    expected = dict(default.columns)
    if not stored_q:
        del expected["bonus_q"]
    assert buffer.columns == expected
    columns = stored(buffer)
    assert ("bonus_q" in columns) == stored_q
    if stored_q:
        assert np.isnan(columns["bonus_q"]).all()


# ------------------------------ samples
def test_samples(script):
    """Dataset rows first, then online ones, every row of both sooner or later, and copies."""
    buffer = make_buffer(script, make_rows(20))
    buffer.append(make_rows(2, first=100))
    buffer.append(make_rows(3, first=102))  # which may be drawn as well as those before
    before = buffer.table.clone()
    columns = buffer.as_columns(before)
    torch.manual_seed(0)
    batch = buffer.sample(script.BatchRows(200, 100))
    rewards = batch["rewards"].clone()
    assert sorted(set(rewards[:200].tolist())) == list(range(20))
    assert sorted(set(rewards[200:].tolist())) == list(range(100, 105))
    rows = torch.where(rewards < 100, rewards, rewards - 80).long()
    assert batch.keys() == columns.keys()
    for name, column in batch.items():
        # bonus_q is NaN until it is stored
        torch.testing.assert_close(column, columns[name][rows], rtol=0, atol=0, equal_nan=True)
        column.fill_(-7.0)
    torch.testing.assert_close(buffer.table, before, rtol=0, atol=0, equal_nan=True)
    assert buffer.sample(script.BatchRows(8, 0))["rewards"].max() < 20
    assert buffer.sample(script.BatchRows(0, 8))["rewards"].min() >= 100


def test_append_draws(script):
    """Of 60,000 draws from all transitions alike, in a batch and in a pool, each has its share."""
    buffer = make_buffer(script, make_rows(20))
    buffer.append(make_rows(5, first=100))
    torch.manual_seed(0)
    rows = script.BatchRows(both=60_000)
    for batch in (buffer.sample(rows), buffer.sample_as(rows._replace(both=7), 60_000)):
        rewards = batch["rewards"].long()
        counts = torch.bincount(torch.where(rewards < 100, rewards, rewards - 80)).double()
        mean = 60_000 / 25
        assert len(counts) == 25
        assert (counts - mean).abs().max() < 5 * mean**0.5


def test_online_column(script):
    """It is 1 for online transitions and 0 for the dataset's."""
    buffer = make_buffer(script, make_rows(20))
    buffer.append(make_rows(5, first=100))
    assert stored(buffer)["online"].tolist() == [0] * 20 + [1] * 5


def test_every_row_is_as_likely(script):
    """Of 50,000 draws from 20 dataset rows and 40,000 from 5 online ones, each row has its share.

    Within five standard deviations of the binomial distribution.
    """
    buffer = make_buffer(script, make_rows(20))
    buffer.append(make_rows(5, first=100))
    torch.manual_seed(0)
    rewards = buffer.sample(script.BatchRows(50_000, 40_000))["rewards"].long()
    for drawn, rows in ((rewards[:50_000], 20), (rewards[50_000:] - 100, 5)):
        counts = torch.bincount(drawn, minlength=rows).double()
        mean = len(drawn) / rows
        deviation = (mean * (1 - 1 / rows)) ** 0.5
        assert len(counts) == rows
        assert (counts - mean).abs().max() < 5 * deviation


def test_rows_of_a_batch_are_independent(script):
    """Neighbours in a batch, and the same place in the next batch, have nothing in common."""
    buffer = make_buffer(script, make_rows(20))
    torch.manual_seed(0)
    first, second = (buffer.sample(script.BatchRows(20_000, 0))["rewards"] for _ in range(2))
    pairs = (first, second), (first[1:], first[:-1])
    for pair in pairs:
        correlation = torch.corrcoef(torch.stack(pair))[0, 1]
        assert abs(correlation.item()) < 5 / 20_000**0.5


@pytest.mark.parametrize(
    ("count", "expected"), [(32, (24, 8)), (41, (31, 10)), (7, (5, 2)), (1000, (750, 250))]
)
def test_sample_as(script, count, expected):
    """A batch of another size is mixed as that of the step is, 24 to 8 here."""
    buffer = make_buffer(script, make_rows(20))
    buffer.append(make_rows(5, first=100))
    rewards = buffer.sample_as(script.BatchRows(24, 8), count)["rewards"]
    assert ((rewards < 100).sum(), (rewards >= 100).sum()) == expected
    rewards = buffer.sample_as(script.BatchRows(dataset=32), count)["rewards"]
    assert len(rewards) == count
    assert rewards.max() < 100


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_extreme_random_numbers(script, uniform, monkeypatch):
    """The smallest and the largest number that torch.rand gives mean the first and the last row."""
    buffer = make_buffer(script, make_rows(20))
    buffer.append(make_rows(5, first=100))
    rand = torch.rand

    def extreme(*shape, **options):
        return torch.full_like(rand(*shape, **options), uniform)

    monkeypatch.setattr(torch, "rand", extreme)
    rewards = buffer.sample(script.BatchRows(2, 2))["rewards"].tolist()
    assert rewards == ([0, 0, 100, 100] if uniform == 0 else [19, 19, 104, 104])
    rewards = buffer.sample(script.BatchRows(both=2))["rewards"].tolist()
    assert rewards == ([0, 0] if uniform == 0 else [104, 104])


def test_same_seed_same_batch(script):
    """The generator of torch alone decides what is drawn."""
    buffer = make_buffer(script, make_rows(20))
    batches = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        batches.append(buffer.sample(script.BatchRows(30, 0))["rewards"])
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
