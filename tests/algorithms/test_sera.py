"""The SERA bonus against golden values, a brute force, known entropies, invariances and degenerate batches.

Its section is the same in every script, so the numeric tests run on one of them.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import digamma

import calql_sera as sera

# Worked by hand: five states in the plane, their values, and rho, n, H for several k.
STATES = np.array([(0, 0), (1, 0), (0, 3), (4, 4), (10, 0)], dtype=np.float64)
VALUES = np.array([0, 0.5, 2, 6, 6.5])
RADII = {1: [1, 1, 3, 4.123106, 7.211103], 2: [3, 3.162278, 3.162278, 5.5, 9]}
COUNTS = {1: [1, 1, 2, 2, 4], 2: [2, 2, 2, 2, 4]}
ENTROPIES = {
    1: [0.904539, 0.904539, 2.253152, 2.571146, 3.421828],
    2: [2.253152, 2.305832, 2.305832, 2.859287, 3.643431],
    4: [3.748791, 3.643431, 3.791880, 3.421828, 3.791880],
    "constant q": [2.544818, 2.597499, 2.597499, 3.055644, 3.643431],  # k = 2
    "dim": [1.560004, 1.612685, 1.779351, 2.362497, 2.950283],  # k = 2, states / 2, q standardised
}
TANH = [0.718501, 0.718501, 0.978163, 0.988379, 0.997870]  # k = 1


def brute_force(states, values, k):
    """rho, n and H (B,) of eqs. (S1) to (S3) by two plain loops in float64."""
    points, values = np.asarray(states, np.float64).tolist(), np.asarray(values, np.float64).tolist()
    radii, counts = [], []
    for i, (point, value) in enumerate(zip(points, values)):
        in_value, joint = [], []
        for j, (other, other_value) in enumerate(zip(points, values)):
            if j != i:
                in_value.append(abs(value - other_value))
                joint.append(max(math.dist(point, other), in_value[-1]))
        radii.append(max(sorted(joint)[k - 1], 1e-6))
        counts.append(sum(distance < radii[-1] for distance in in_value))
    radii, counts = np.array(radii), np.array(counts)
    return radii, counts, digamma(counts + 1) / len(points[0]) + np.log(2 * radii)


def entropy(states, values, k, dtype=torch.float64, logs=None):
    """The estimate under test, (B,) in float64."""
    states, values = (torch.as_tensor(np.asarray(array)).to(dtype) for array in (states, values))
    return sera.q_conditioned_entropy(states, values, k, logs).double().numpy()


def nearest(points, k):
    """Euclidean distance from every row of points (B, d) to its k-th other row, (B,)."""
    return np.sort(np.linalg.norm(points[:, None] - points[None, :], axis=-1), axis=1)[:, k]


def random_batch(seed, batch_size=64, d=5, spread=1.0):
    """States (B, d) and values (B,) from normal distributions."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch_size, d)), spread * rng.standard_normal(batch_size)


# ------------------------------ values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_values(script, dtype):
    """Five points worked by hand, in every script."""
    states, values = torch.as_tensor(STATES, dtype=dtype), torch.as_tensor(VALUES, dtype=dtype)
    for k in (1, 2, 4):
        result = script.q_conditioned_entropy(states, values, k)
        assert result.shape == (5,) and result.dtype == dtype
        np.testing.assert_allclose(result, ENTROPIES[k], rtol=0, atol=2e-6)
    result = script.q_conditioned_entropy(states, torch.full_like(values, -3), 2)
    np.testing.assert_allclose(result, ENTROPIES["constant q"], rtol=0, atol=2e-6)
    result = script.q_conditioned_entropy(states, values, 1).tanh()
    np.testing.assert_allclose(result, TANH, rtol=0, atol=2e-6)


def test_golden_values_of_the_brute_force():
    """The reference used below agrees with the values worked by hand, radii and counts included."""
    for k in (1, 2, 4):
        radii, counts, entropies = brute_force(STATES, VALUES, k)
        np.testing.assert_allclose(entropies, ENTROPIES[k], rtol=0, atol=2e-6)
        if k in RADII:
            np.testing.assert_allclose(radii, RADII[k], rtol=0, atol=2e-6)
            assert counts.tolist() == COUNTS[k]


def test_brute_force():
    """Random batches: float64 agrees everywhere, float32 but for rare near-ties that move n by one."""
    rows, stray = 0, 0
    for d in (1, 2, 5, 11, 29):
        for k in (1, 3, 10):
            for batch_size in (16, 64, 256):
                states, values = random_batch([d, k, batch_size], batch_size, d, spread=(0.3, 1, 5)[k % 3])
                states, values = states.astype(np.float32), values.astype(np.float32)
                _, counts, expected = brute_force(states, values, k)
                logs = {}
                np.testing.assert_allclose(entropy(states, values, k, logs=logs), expected, rtol=0, atol=1e-9)
                assert logs["sera/neighbours"].item() == pytest.approx(counts.mean(), rel=1e-6)
                error = np.abs(entropy(states, values, k, torch.float32) - expected)
                one_more = digamma(counts + 2) - digamma(counts + 1)
                one_less = 1 / np.maximum(counts, 1)
                assert (error <= np.maximum(one_more, one_less) / d + 2e-5).all()
                rows, stray = rows + batch_size, stray + (error > 2e-5).sum()
    assert stray <= 0.001 * rows


# ------------------------------ known entropies


def conditional_entropy(sample, draws=5, k=5):
    """Mean over draws of the estimate of H(S|V) in nats; sample() gives states (N, d) and values (N,).

    log 2 in H_i is the volume of the unit ball, per dimension, in the max norm; in the Euclidean norm
    d mean(H_i) is too large by d log 2 - log(volume), which is taken off here.
    """
    estimates = []
    for _ in range(draws):
        states, values = sample()
        d = states.shape[1]
        log_volume = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
        mean = entropy(states, values, k).mean()
        estimates.append(d * mean - digamma(k) + log_volume - d * math.log(2))
    return np.mean(estimates)


def gaussian(rng, d, correlation, n=2000):
    """States N(0, I) and values N(0, 1) of this correlation with the states' coordinate along (1, ..., 1)."""
    states = rng.standard_normal((n, d))
    noise = math.sqrt(1 - correlation**2) * rng.standard_normal(n)
    return states, correlation * states.sum(1) / math.sqrt(d) + noise


@pytest.mark.parametrize(
    ("d", "correlation", "tolerance"),
    [(1, 0, 0.06), (1, 0.6, 0.06), (1, 0.9, 0.06), (2, 0, 0.1), (2, 0.6, 0.1), (2, 0.9, 0.1)]
    + [(3, 0, 0.1), (3, 0.6, 0.1), (3, 0.9, 0.1), (5, 0, 0.12), (5, 0.6, 0.12)],
)
def test_entropy_of_gaussian_states(d, correlation, tolerance):
    """H(S|V) of jointly Gaussian states and values: 1/2 log((2 pi e)^d (1 - c^2)).

    At d = 5 and c = 0.9 the bias of the estimator itself, +0.2, is larger than what is asserted here.
    """
    rng = np.random.default_rng(0)
    true = d / 2 * math.log(2 * math.pi * math.e) + 0.5 * math.log(1 - correlation**2)
    assert conditional_entropy(partial(gaussian, rng, d, correlation)) == pytest.approx(true, abs=tolerance)


@pytest.mark.parametrize("width", [2, 4])
def test_entropy_of_a_uniform_offset(width):
    """S = V + U with U uniform and independent: H(S|V) is the log of the width, whatever V is."""
    rng = np.random.default_rng(0)

    def sample():
        values = rng.standard_normal(2000)
        return (values + width * rng.random(2000))[:, None], values

    assert conditional_entropy(sample) == pytest.approx(math.log(width), abs=0.06)


def test_entropy_in_eleven_dimensions():
    """In hopper's eleven dimensions the bias is upwards, below one nat, and more correlation means less."""
    estimates = []
    for correlation in (0, 0.6, 0.9):
        rng = np.random.default_rng(0)
        estimates.append(conditional_entropy(partial(gaussian, rng, 11, correlation), draws=1))
    true = 11 / 2 * math.log(2 * math.pi * math.e) + 0.5 * math.log(1 - 0.6**2)
    assert estimates[0] > estimates[1] > estimates[2]
    assert 0 < estimates[1] - true < 1


# ------------------------------ invariances


def test_permutation():
    """Shuffled rows give the same numbers, shuffled."""
    states, values = random_batch(1)
    order = np.random.default_rng(2).permutation(len(values))
    expected = entropy(states, values, 3)[order]
    np.testing.assert_allclose(entropy(states[order], values[order], 3), expected, rtol=0, atol=1e-12)


def test_translation_rotation_and_mirror():
    """Only distances matter: moving or turning the states, moving or mirroring the values changes nothing."""
    states, values = random_batch(3)
    expected = entropy(states, values, 3)
    rotation, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((5, 5)))
    for moved_states, moved_values in [
        (states + np.arange(5), values),
        (states, values - 7.3),
        (states @ rotation, values),
        (states, -values),
    ]:
        np.testing.assert_allclose(entropy(moved_states, moved_values, 3), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [0.01, 2.5, 100])
def test_scaling(scale):
    """States and values times c together add log c."""
    states, values = random_batch(5)
    expected = entropy(states, values, 3) + math.log(scale)
    np.testing.assert_allclose(entropy(scale * states, scale * values, 3), expected, rtol=0, atol=1e-11)


def test_constant_values_give_the_state_entropy():
    """With one value for all, every row counts: H = psi(B) / d + log(2 distance to the k-th other state)."""
    states, _ = random_batch(6)
    expected = digamma(64) / 5 + np.log(2 * nearest(states, 3))
    np.testing.assert_allclose(entropy(states, np.full(64, -2.5), 3), expected, rtol=0, atol=1e-12)


def test_values_spread_far_above_the_states():
    """Then the states are ignored: n = k - 1 and H = psi(k) / d + log(2 distance to the k-th other value)."""
    states, values = random_batch(7)
    logs = {}
    result = entropy(1e-6 * states, values, 3, logs=logs)
    expected = digamma(3) / 5 + np.log(2 * nearest(values[:, None], 3))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)
    assert logs["sera/neighbours"] == 2


def test_rows_of_a_distant_value_are_no_neighbours():
    """The same states again at a far-away value change nothing: neighbours are of about a row's own value."""
    states, values = random_batch(8)
    alone = entropy(states, values, 3)
    both = entropy(np.concatenate([states, states]), np.concatenate([values, values + 1000]), 3)
    np.testing.assert_allclose(both, np.concatenate([alone, alone]), rtol=0, atol=1e-10)


def test_sparse_states_get_more_than_dense_ones():
    """Of two clusters alike but for their width and of equal values, the wide one gets the larger mean H."""
    cluster, values = random_batch(9)
    states = np.concatenate([cluster, 0.1 * cluster + 100])
    equal = entropy(states, np.zeros(128), 3)  # one n for all: the radii alone differ, by a factor of ten
    assert equal[:64].mean() - equal[64:].mean() == pytest.approx(math.log(10), abs=1e-9)
    varied = entropy(states, np.concatenate([values, values]), 3)
    assert varied[:64].mean() > varied[64:].mean() + 0.5


# ------------------------------ degenerate batches, numeric traps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_rows(dtype):
    """Rows all equal have a floored radius and all others as neighbours."""
    logs = {}
    result = entropy(np.ones((16, 3)), np.full(16, 0.7), 3, dtype, logs)
    np.testing.assert_allclose(result, digamma(16) / 3 + math.log(2e-6), rtol=1e-6)
    assert logs["sera/floored"] == 1 and logs["sera/neighbours"] == 15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_duplicates(dtype):
    """Some rows more often than k times: finite, as the brute force, and the floored share is theirs."""
    states, values = random_batch(10, 32)
    states[:8], values[:8] = states[0], values[0]  # k + 1 or more equal rows: radius 0
    states[8:11], values[8:11] = states[8], values[8]  # only three, below k = 3
    logs = {}
    result = entropy(states, values, 3, dtype, logs)
    expected = brute_force(states, values, 3)[2]
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-9 if dtype == torch.float64 else 2e-5)
    assert logs["sera/floored"].item() == 8 / 32


def test_duplicate_states_of_different_value():
    """Equal states with values closer than the floor: no other row may be counted as minus one."""
    states, values = np.zeros((12, 2)), 1e-9 * np.arange(12)
    np.testing.assert_allclose(entropy(states, values, 2), digamma(12) / 2 + math.log(2e-6), rtol=1e-9)


def test_smallest_batch():
    """B = k + 1 works: the k-th other row is the farthest."""
    for batch_size in (2, 5, 11):
        states, values = random_batch(11, batch_size)
        result = entropy(states, values, batch_size - 1)
        assert np.isfinite(result).all()
        np.testing.assert_allclose(result, brute_force(states, values, batch_size - 1)[2], rtol=0, atol=1e-9)


def test_blocks(script):
    """Above 2048 rows the batch is taken in blocks, which changes no row: compared with one big matrix."""
    states, values = random_batch(14, 3000, d=3)
    states[2000] = states[10]  # a neighbour in another block
    result = script.q_conditioned_entropy(torch.from_numpy(states), torch.from_numpy(values), 4)
    in_value = np.abs(values[:, None] - values)
    np.fill_diagonal(in_value, np.inf)
    joint = np.maximum(np.linalg.norm(states[:, None] - states, axis=-1), in_value)
    radii = np.sort(joint, axis=1)[:, 3]
    counts = (in_value < radii[:, None]).sum(1)
    np.testing.assert_allclose(result, digamma(counts + 1) / 3 + np.log(2 * radii), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("k", "batch_size"), [(0, 37), (-4, 37), (37, 37), (38, 37), (1, 1)])
def test_impossible_k(k, batch_size):
    """k below 1, or not below the batch size, is refused with both numbers in the message."""
    with pytest.raises(ValueError, match=rf"{k}\b.*\b{batch_size}\b"):
        entropy(*random_batch(12, batch_size), k)


def test_close_states_far_from_the_origin():
    """float32 keeps the distances along one trajectory: no matrix product, which would lose their digits."""
    rng = np.random.default_rng(13)
    states = (50 * rng.standard_normal(11) + 0.01 * rng.standard_normal((256, 11)).cumsum(0)).astype(
        np.float32
    )
    for values in (np.zeros(256, np.float32), (0.01 * rng.standard_normal(256)).astype(np.float32)):
        radii, counts, expected = brute_force(states, values, 10)
        result = entropy(states, values, 10, torch.float32)
        np.testing.assert_allclose(np.exp(result - digamma(counts + 1) / 11) / 2, radii, rtol=1e-4)
        np.testing.assert_allclose(result, expected, rtol=1e-4)


def test_close_values_far_from_zero():
    """float32 keeps the differences of values near -400: no matrix product here either."""
    rng = np.random.default_rng(14)
    states = (1e-4 * rng.standard_normal((256, 3))).astype(np.float32)
    values = (-400 + 5 * rng.standard_normal(256)).astype(np.float32)
    radii, counts, _ = brute_force(states, values, 10)
    logs = {}
    result = entropy(states, values, 10, torch.float32, logs)
    assert logs["sera/neighbours"].item() == pytest.approx(counts.mean(), abs=0.02)
    np.testing.assert_allclose(np.exp(result - digamma(counts + 1) / 3) / 2, radii, rtol=1e-4)


# ------------------------------ the bonus


def make_batch(states, values, dtype=torch.float64):
    """A batch of these states whose actions carry the values, for the critics below."""
    batch = {"observations": torch.as_tensor(np.asarray(states), dtype=dtype)}
    batch["actions"] = torch.as_tensor(np.asarray(values), dtype=dtype)[:, None]
    batch["rewards"] = torch.linspace(-1, 2, len(values), dtype=dtype)
    return batch


def make_networks():
    """Critics of which the lower gives the action: the first on even rows, the second on odd ones."""

    def critics(observations, actions):
        values, rows = actions[:, 0], torch.arange(len(actions))
        higher = values + 1 + 5 * (rows % 3)  # not the same gap everywhere: the bonus would not notice it
        even = rows % 2 == 0
        return torch.stack([torch.where(even, values, higher), torch.where(even, higher, values)])

    return {"critics": critics}


def no_critics(*_):
    raise AssertionError("this bonus has no use for the critics")


def make_args(**changes):
    return sera.Args(**({"sera_k": 2} | changes))


def bonus_of(batch, live=None, networks=None, **changes):
    """Bonus (B,) and logs, as numbers."""
    live = torch.arange(batch["observations"].shape[1]) if live is None else torch.tensor(live)
    bonus, logs = sera.sera_bonus(networks or make_networks(), batch, live, make_args(**changes))
    return bonus.numpy(), {name: float(value) for name, value in logs.items()}


def test_bonus_takes_the_lower_critic():
    """Golden values, tanh included, with the lower critic now the first and now the second."""
    bonus, _ = bonus_of(make_batch(STATES, VALUES), sera_k=1)
    np.testing.assert_allclose(bonus, TANH, rtol=0, atol=2e-6)
    bonus, _ = bonus_of(make_batch(STATES, VALUES), sera_k=2)
    np.testing.assert_allclose(bonus, np.tanh(ENTROPIES[2]), rtol=0, atol=2e-6)


def test_critics_see_the_whole_unscaled_batch():
    """Scaling is the estimator's business: the critics get states and actions as they are in the batch."""
    batch, seen = make_batch(np.c_[STATES, np.full(5, 7.0)], VALUES), []

    def critics(observations, actions):
        seen.append((observations, actions))
        return actions[:, 0].expand(2, -1)

    bonus_of(batch, live=[0, 1], networks={"critics": critics}, sera_scale="dim")
    ((observations, actions),) = seen
    assert torch.equal(observations, batch["observations"]) and torch.equal(actions, batch["actions"])


def test_scale_none_uses_every_dimension():
    """The paper's formula leaves states and q as they are: live plays no part."""
    states, values = random_batch(16, 32, 3)
    bonus, _ = bonus_of(make_batch(states, values), live=[0])
    np.testing.assert_allclose(bonus, np.tanh(brute_force(states, values, 2)[2]), rtol=0, atol=1e-9)


def test_scale_dim():
    """States over their dimension, q standardised: golden values."""
    bonus, _ = bonus_of(make_batch(STATES, VALUES), sera_scale="dim")
    np.testing.assert_allclose(bonus, np.tanh(ENTROPIES["dim"]), rtol=0, atol=2e-6)


def test_scale_dim_does_not_blow_up_noise():
    """The variance of q gets 1e-5 on top: values that hardly differ stay close."""
    states, values = random_batch(19, spread=1e-3)
    bonus, _ = bonus_of(make_batch(0.1 * states, values), sera_scale="dim")
    standardised = (values - values.mean()) / np.sqrt(values.var() + 1e-5)
    assert standardised.std() < 0.5
    expected = brute_force(0.1 * states / 5, standardised, 2)[2]
    np.testing.assert_allclose(bonus, np.tanh(expected), rtol=0, atol=1e-9)


def test_scale_dim_leaves_constant_dimensions_out():
    """A dimension outside live changes nothing, wherever it stands; taken for live it would."""
    wider = make_batch(np.c_[STATES[:, 0], np.full(5, 7.0), STATES[:, 1]], VALUES)
    bonus, logs = bonus_of(make_batch(STATES, VALUES), sera_scale="dim")
    wider_bonus, wider_logs = bonus_of(wider, live=[0, 2], sera_scale="dim")
    np.testing.assert_array_equal(wider_bonus, bonus)
    assert wider_logs == logs
    assert np.abs(bonus_of(wider, sera_scale="dim")[0] - bonus).max() > 0.01


@pytest.mark.parametrize("scale", ["none", "dim"])
def test_bonus_state_ignores_q(scale):
    """--sera-bonus state is the entropy of the states alone and asks no critic."""
    batch = make_batch(STATES, VALUES)
    bonus, logs = bonus_of(batch, networks={"critics": no_critics}, sera_bonus="state", sera_scale=scale)
    expected = np.array(ENTROPIES["constant q"]) - (math.log(2) if scale == "dim" else 0)
    np.testing.assert_allclose(bonus, np.tanh(expected), rtol=0, atol=2e-6)
    assert logs["sera/neighbours"] == 4


def test_bonus_v_uses_the_state_value(monkeypatch):
    """--sera-bonus v conditions on the value of the state, from the same networks, in place of q."""
    networks, batch = {"critics": no_critics}, make_batch(STATES, np.zeros(5))

    def state_value(given, observations):
        assert given is networks and torch.equal(observations, batch["observations"])
        return torch.as_tensor(VALUES)

    monkeypatch.setattr(sera, "state_value", state_value)
    bonus, _ = bonus_of(batch, networks=networks, sera_bonus="v")
    np.testing.assert_allclose(bonus, np.tanh(ENTROPIES[2]), rtol=0, atol=2e-6)
    bonus, _ = bonus_of(batch, networks=networks, sera_bonus="v", sera_scale="dim")
    np.testing.assert_allclose(bonus, np.tanh(ENTROPIES["dim"]), rtol=0, atol=2e-6)


def test_bonus_constant():
    """The control: the coefficient for every row, no critic asked, no k needed."""
    batch = make_batch(STATES, VALUES, torch.float32)
    changes = {"sera_bonus": "constant", "sera_coef": -0.2, "sera_k": 10}
    bonus, _ = bonus_of(batch, networks={"critics": no_critics}, **changes)
    assert bonus.shape == (5,) and bonus.dtype == np.float32
    np.testing.assert_allclose(bonus, -0.2, rtol=1e-6)


def test_coefficient():
    """lambda multiplies tanh(H), outside the tanh, and leaves what is logged alone."""
    batch = make_batch(STATES, VALUES)
    unit, unit_logs = bonus_of(batch)
    bonus, logs = bonus_of(batch, sera_coef=2.5)
    np.testing.assert_allclose(bonus, 2.5 * unit, rtol=1e-12)
    assert logs == unit_logs
    assert not bonus_of(batch, sera_coef=0)[0].any()


def test_impossible_k_of_the_bonus():
    """A k the batch is too small for is refused, with both numbers."""
    with pytest.raises(ValueError, match=r"\b10\b.*\b5\b"):
        bonus_of(make_batch(STATES, VALUES), sera_k=10)


@pytest.mark.parametrize("kind", ["q", "v", "state", "constant"])
@pytest.mark.parametrize("scale", ["none", "dim"])
def test_bonus_has_no_side_effects(kind, scale, monkeypatch):
    """No random number is drawn, the batch stays as it was, and no gradient is attached."""
    monkeypatch.setattr(sera, "state_value", lambda networks, observations: observations.sum(1))
    batch = make_batch(*random_batch(17))
    batch["actions"].requires_grad_(True)
    before = {name: column.detach().clone() for name, column in batch.items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    live, args = torch.tensor([0, 2, 3]), make_args(sera_bonus=kind, sera_scale=scale)
    bonus, _ = sera.sera_bonus(make_networks(), batch, live, args)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    assert np.random.get_state()[2] == numpy_state[2]
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[name], before[name]) for name in before)
    assert live.tolist() == [0, 2, 3] and not bonus.requires_grad


def test_logs():
    """What is logged agrees with the bonus and with the brute force, a few floored radii included."""
    states, values = random_batch(18, 256, 3, spread=3.0)
    states[:20], values[:20] = states[0], values[0]
    states *= np.geomspace(0.05, 2, 256)[:, None]
    states[:20] = states[0]
    radii, counts, entropies = brute_force(states, values, 4)
    bonus, logs = bonus_of(make_batch(states, values), sera_k=4)
    expected = np.tanh(entropies)
    np.testing.assert_allclose(bonus, expected, rtol=0, atol=1e-9)
    assert logs["sera/bonus_mean"] == pytest.approx(expected.mean(), abs=1e-9)
    assert logs["sera/bonus_sd"] == pytest.approx(expected.std(), rel=0.005)  # over B or B - 1 rows
    share = (expected > 0.95).mean()
    assert 0.1 < share < 0.9 and logs["sera/above_0.95"] == pytest.approx(share, abs=1e-6)
    assert logs["sera/neighbours"] == pytest.approx(counts.mean(), rel=1e-6)
    assert (radii <= 1e-6).sum() == 20 and logs["sera/floored"] == pytest.approx(20 / 256, abs=1e-6)
