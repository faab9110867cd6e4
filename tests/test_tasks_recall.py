"""Associative recall: rows as the docstring says, an oracle solves them, and so can a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.tasks import AssociativeRecall
from attnlab.training.config import ModelConfig, TrainConfig
from attnlab.training.loop import fit


def draw(task, key, batch_size, length):
    return [np.asarray(part) for part in task.rows(key, batch_size, length)]


def says(answers, vocab_size):
    """Logits that point at `answers`."""
    return jnp.asarray(np.eye(vocab_size, dtype=np.float32)[answers])


@pytest.mark.parametrize("random_filler", [True, False])
@pytest.mark.parametrize(
    ("vocab_size", "pairs", "length"), [(4, 1, 4), (11, 4, 16), (64, 4, 33 * 2), (8192, 8, 64)]
)
def test_every_key_comes_once_with_its_value_and_is_asked_once(
    keys, vocab_size, pairs, length, random_filler
):
    task = AssociativeRecall(vocab_size, pairs, random_filler=random_filler)
    tokens, targets, asked = draw(task, keys("rows"), 40, length)
    assert tokens.shape == targets.shape == asked.shape == (40, length)
    assert tokens.dtype == targets.dtype == np.int32
    assert tokens.min() >= 0 and tokens.max() < vocab_size
    assert (targets[~asked] == 0).all()
    for row, target, places in zip(tokens, targets, map(np.flatnonzero, asked), strict=True):
        known = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(known) == len(set(known.values())) == pairs
        assert min(known) >= 1 and max(known) < vocab_size // 2 <= min(known.values())
        assert sorted(row[places]) == sorted(known)
        assert [known[key] for key in row[places]] == target[places].tolist()
        assert (places >= 2 * pairs).all() and (places % 2 == 0).all()
        if not random_filler:
            assert np.count_nonzero(row) == 3 * pairs


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0, 2.0])
def test_gaps_follow_the_power_law_without_replacement(keys, power_a):
    task = AssociativeRecall(vocab_size=12, num_kv_pairs=2, power_a=power_a, random_filler=False)
    tokens, _, _ = draw(task, keys("rows"), 20_000, 4 + 2 * 9)
    slot = [(tokens[:, 4:] == tokens[:, [at]]).argmax(1) // 2 for at in (0, 2)]
    p = np.arange(1.0, 10.0) ** (power_a - 1)
    p /= p.sum()
    both = p[:, None] * p[None, :] / (1 - p)[:, None]  # the first key's slot, then the second's
    np.fill_diagonal(both, 0)
    found = np.zeros((9, 9))
    np.add.at(found, tuple(slot), 1 / 20_000)
    np.testing.assert_allclose(found.sum(1), p, atol=0.015)
    np.testing.assert_allclose(found, both, atol=0.01)


def test_keys_values_and_filler_are_drawn_evenly(keys):
    task = AssociativeRecall(vocab_size=10, num_kv_pairs=2)
    tokens, _, asked = draw(task, keys("rows"), 10_000, 12)
    for at, ids in [(0, range(1, 5)), (2, range(1, 5)), (1, range(5, 10)), (3, range(5, 10))]:
        share = np.bincount(tokens[:, at], minlength=10) / 10_000
        np.testing.assert_allclose(share[list(ids)], 1 / len(ids), atol=0.025)
    dull = tokens[:, 4:][~asked[:, 4:]]
    np.testing.assert_allclose(np.bincount(dull, minlength=10) / dull.size, 0.1, atol=0.01)


def test_rows_follow_their_key_also_compiled(keys):
    task, (one, two) = AssociativeRecall(), keys("one", "two")
    first = draw(task, one, 8, 32)
    compiled = jax.jit(task.rows, static_argnums=(1, 2))(one, 8, 32)
    for a, b, c, d in zip(
        first, task.rows(one, 8, 32), compiled, task.rows(two, 8, 32), strict=True
    ):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
        assert not np.array_equal(a, d)


def test_an_oracle_gets_all_and_a_guesser_gets_chance(keys, rng):
    task = AssociativeRecall(num_kv_pairs=5)
    batch = task.rows(keys("rows"), 4000, 40)
    tokens = np.asarray(batch.tokens)
    table = np.zeros((4000, task.vocab_size), int)
    for pair in range(5):
        table[np.arange(4000), tokens[:, 2 * pair]] = tokens[:, 2 * pair + 1]
    oracle = np.take_along_axis(table, tokens, axis=1)
    rows, answers = task.accuracy(says(oracle, task.vocab_size), batch)
    assert (float(rows), float(answers)) == (1.0, 1.0)
    guess = np.take_along_axis(tokens, 1 + 2 * rng.integers(0, 5, tokens.shape), axis=1)
    rows, answers = task.accuracy(says(guess, task.vocab_size), batch)
    assert abs(float(answers) - task.chance) < 0.02
    assert float(rows) < 0.01
    even = task.loss(jnp.zeros((4000, 40, task.vocab_size)), batch)
    np.testing.assert_allclose(even, np.log(task.vocab_size), rtol=1e-5)


def test_only_the_answers_count(keys):
    task = AssociativeRecall(vocab_size=8, num_kv_pairs=2)
    batch = task.rows(keys("rows"), 2, 8)
    places = [np.flatnonzero(row) for row in np.asarray(batch.asked)]
    logits = np.zeros((2, 8, 8), np.float32)
    logits[~np.asarray(batch.asked)] = [77, 0, 0, 0, 0, 0, 0, 0]  # loud where nothing is asked
    for row, place in [(0, places[0][0]), (0, places[0][1]), (1, places[1][0])]:
        logits[row, place, batch.targets[row, place]] = 5
    logits[1, places[1][1], 0] = 5  # one of four answers is wrong
    rows, answers = task.accuracy(jnp.asarray(logits), batch)
    assert (float(rows), float(answers)) == (0.5, 0.75)
    expected = np.log(np.exp(5) + 7) - 5 * 3 / 4
    np.testing.assert_allclose(task.loss(jnp.asarray(logits), batch), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_kv_pairs": 0}, "num_kv_pairs: expected at least 1, got 0"),
        ({"vocab_size": 9}, "vocab_size: expected at least 10, got 9"),
        ({"power_a": 0.0}, r"power_a: expected more than 0, got 0\.0"),
        ({"power_a": float("nan")}, "power_a"),
    ],
)
def test_a_task_of_wrong_sizes_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AssociativeRecall(**options)


def test_a_row_of_wrong_length_is_refused():
    with pytest.raises(ValueError, match="length: expected at least 16, got 14"):
        AssociativeRecall().rows(jax.random.key(0), 1, 14)
    with pytest.raises(ValueError, match="length: expected an even number, got 17"):
        AssociativeRecall().rows(jax.random.key(0), 1, 17)


@pytest.mark.slow
def test_a_small_softmax_model_learns_to_recall(keys):
    task = AssociativeRecall()
    model = ModelConfig("rope", num_layers=2, features=64, num_heads=4, mlp_ratio=1.0).build(
        task.vocab_size, seed=0
    )
    fit(
        model,
        lambda model, batch, key: task.loss(model(batch.tokens), batch),
        lambda data, key: task.rows(key, 32, 32),
        None,
        TrainConfig(steps=600, batch_size=32, context=32, learning_rate=4e-3, warmup=60),
    )
    batch = task.rows(keys("unseen"), 256, 32)
    assert task.accuracy(model(batch.tokens), batch)[1] > 0.9  # chance is 0.25
