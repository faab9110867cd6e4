"""Selective copying: rows as the docstring says, an oracle solves them, and so can a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.tasks import SelectiveCopying
from attnlab.training.config import ModelConfig, TrainConfig
from attnlab.training.loop import fit


def draw(task, key, batch_size, length):
    return [np.asarray(part) for part in task.rows(key, batch_size, length)]


def says(answers, vocab_size):
    """Logits that point at `answers`."""
    return jnp.asarray(np.eye(vocab_size, dtype=np.float32)[answers])


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize(
    ("number", "alphabet", "length"), [(1, 2, 2), (3, 2, 6), (4, 8, 33), (16, 15, 1000)]
)
def test_the_markers_ask_for_the_kept_tokens_in_order(keys, number, alphabet, length, spread):
    task = SelectiveCopying(number, alphabet, spread)
    tokens, targets, asked = draw(task, keys("rows"), 40, length)
    assert tokens.shape == targets.shape == asked.shape == (40, length)
    assert tokens.dtype == targets.dtype == np.int32
    assert tokens.max() == task.marker == task.vocab_size - 1
    start = length - number
    for row, target, due in zip(tokens, targets, asked, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(due), np.arange(start, length))
        np.testing.assert_array_equal(np.flatnonzero(row == task.marker), np.arange(start, length))
        places = np.flatnonzero(row[:start])
        assert len(places) == number
        np.testing.assert_array_equal(row[places], target[start:])
        assert (target[:start] == 0).all()
        assert spread or places.tolist() == list(range(number))


def test_places_and_kinds_are_drawn_evenly_and_independently(keys):
    task = SelectiveCopying(num_tokens=2, alphabet=3)
    tokens, targets, _ = draw(task, keys("rows"), 20_000, 7)
    places = np.stack([np.flatnonzero(row[:5]) for row in tokens])
    found = np.zeros((5, 5))
    np.add.at(found, tuple(places.T), 1 / 20_000)
    np.testing.assert_allclose(found, np.triu(np.full((5, 5), 0.1), 1), atol=0.01)
    kinds = np.zeros((3, 3))
    np.add.at(kinds, tuple(targets[:, 5:].T - 1), 1 / 20_000)
    np.testing.assert_allclose(kinds, 1 / 9, atol=0.01)


def test_rows_follow_their_key_also_compiled(keys):
    task, (one, two) = SelectiveCopying(), keys("one", "two")
    first = draw(task, one, 8, 32)
    compiled = jax.jit(task.rows, static_argnums=(1, 2))(one, 8, 32)
    for a, b, c in zip(first, task.rows(one, 8, 32), compiled, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    other = draw(task, two, 8, 32)
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[1], other[1])


def test_an_oracle_gets_all_and_a_guesser_gets_chance(keys, rng):
    task = SelectiveCopying(num_tokens=5, alphabet=6)
    batch = task.rows(keys("rows"), 2000, 40)
    tokens = np.asarray(batch.tokens)
    oracle = np.zeros_like(tokens)
    for row, answer in zip(tokens, oracle, strict=True):
        answer[-5:] = [token for token in row if 0 < token <= 6]
    rows, answers = task.accuracy(says(oracle, task.vocab_size), batch)
    assert (float(rows), float(answers)) == (1.0, 1.0)
    guess = rng.integers(1, 7, tokens.shape)
    rows, answers = task.accuracy(says(guess, task.vocab_size), batch)
    assert abs(float(answers) - task.chance) < 0.02
    assert float(rows) < 0.01
    even = task.loss(jnp.zeros((2000, 40, task.vocab_size)), batch)
    np.testing.assert_allclose(even, np.log(task.vocab_size), rtol=1e-5)


def test_the_plain_task_is_solved_by_a_fixed_delay_and_the_selective_one_is_not(keys):
    length, number = 24, 4
    spread, plain = keys("spread", "plain")
    for task, key in [(SelectiveCopying(), spread), (SelectiveCopying(spread=False), plain)]:
        batch = task.rows(key, 500, length)
        delayed = np.roll(np.asarray(batch.tokens), length - number, axis=1)
        answers = float(task.accuracy(says(delayed, task.vocab_size), batch)[1])
        assert answers < 0.3 if task.spread else answers == 1.0


def test_only_the_answers_count():
    task = SelectiveCopying(num_tokens=2, alphabet=2)
    batch = task.rows(jax.random.key(0), 2, 5)
    logits = np.zeros((2, 5, 4), np.float32)
    logits[:, :3, 0] = 77  # loud where nothing is asked
    for row, place in [(0, 3), (0, 4), (1, 3)]:
        logits[row, place, batch.targets[row, place]] = 5
    logits[1, 4, 0] = 5  # one of four answers is wrong
    rows, answers = task.accuracy(jnp.asarray(logits), batch)
    assert (float(rows), float(answers)) == (0.5, 0.75)
    expected = np.log(np.exp(5) + 3) - 5 * 3 / 4
    np.testing.assert_allclose(task.loss(jnp.asarray(logits), batch), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_tokens": 0}, "num_tokens: expected at least 1, got 0"),
        ({"alphabet": 1}, "alphabet: expected at least 2, got 1"),
    ],
)
def test_a_task_of_wrong_sizes_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SelectiveCopying(**options)


def test_a_row_too_short_is_refused():
    with pytest.raises(ValueError, match="length: expected at least 8, got 7"):
        SelectiveCopying().rows(jax.random.key(0), 1, 7)


@pytest.mark.slow
def test_a_small_softmax_model_learns_to_copy(keys):
    task = SelectiveCopying()
    model = ModelConfig("rope", num_layers=2, features=64, num_heads=4, mlp_ratio=1.0).build(
        task.vocab_size, seed=0
    )
    fit(
        model,
        lambda model, batch, key: task.loss(model(batch.tokens), batch),
        lambda data, key: task.rows(key, 32, 32),
        None,
        TrainConfig(steps=600, batch_size=32, context=32, learning_rate=2e-3, warmup=60),
    )
    batch = task.rows(keys("unseen"), 256, 32)
    assert task.accuracy(model(batch.tokens), batch)[1] > 0.8  # chance is 0.125
