"""Flip-flop: rows as the docstring says, an oracle solves them, and so can a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.tasks import FlipFlop
from attnlab.tasks.flip_flop import IGNORE, READ, WRITE
from attnlab.training.config import ModelConfig, TrainConfig
from attnlab.training.loop import fit


def says(answers, vocab_size):
    """Logits that point at `answers`."""
    return jnp.asarray(np.eye(vocab_size, dtype=np.float32)[answers])


def remembered(tokens):
    """What a register that is written and read would say, by a loop; 0 where it is not read."""
    out = np.zeros_like(tokens)
    for row, said in zip(tokens, out, strict=True):
        for at in range(0, len(row), 2):
            if row[at] == WRITE:
                register = row[at + 1]
            if row[at] == READ:
                said[at] = register
    return out


@pytest.mark.parametrize("ignore", [0.0, 0.5, 0.98])
@pytest.mark.parametrize("length", [4, 6, 64])
def test_a_read_is_answered_by_the_last_write_and_followed_by_the_answer(keys, ignore, length):
    task = FlipFlop(ignore)
    tokens, targets, asked = (np.asarray(x) for x in task.rows(keys("rows"), 60, length))
    assert tokens.shape == targets.shape == asked.shape == (60, length)
    assert tokens.dtype == targets.dtype == np.int32
    orders, bits = tokens[:, ::2], tokens[:, 1::2]
    assert set(np.unique(bits)) <= {0, 1}
    assert set(np.unique(orders)) <= {WRITE, READ, IGNORE}
    assert (orders[:, 0] == WRITE).all() and (orders[:, -1] == READ).all()
    np.testing.assert_array_equal(asked[:, ::2], orders == READ)
    assert not asked[:, 1::2].any()
    np.testing.assert_array_equal(targets, remembered(tokens))
    np.testing.assert_array_equal(bits[orders == READ], targets[asked])


def test_instructions_and_bits_are_drawn_as_asked(keys):
    tokens = np.asarray(FlipFlop(0.8).rows(keys("rows"), 4000, 22).tokens)
    inner, bits = tokens[:, 2:-2:2], tokens[:, 1::2]
    for order, share in [(WRITE, 0.1), (READ, 0.1), (IGNORE, 0.8)]:
        assert abs((inner == order).mean() - share) < 0.01
    assert abs(bits.mean() - 0.5) < 0.01


def test_rows_follow_their_key_also_compiled(keys):
    task, (one, two) = FlipFlop(), keys("one", "two")
    compiled = jax.jit(task.rows, static_argnums=(1, 2))(one, 8, 32)
    for a, b, c in zip(task.rows(one, 8, 32), compiled, task.rows(two, 8, 32), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_an_oracle_gets_all_and_the_last_bit_seen_does_not(keys):
    task = FlipFlop(0.8)
    batch = task.rows(keys("rows"), 1000, 64)
    tokens = np.asarray(batch.tokens)
    rows, answers = task.accuracy(says(remembered(tokens), task.vocab_size), batch)
    assert (float(rows), float(answers)) == (1.0, 1.0)
    latest = np.roll(tokens, 1, axis=1) % 2  # the bit right before the read
    assert 0.5 < float(task.accuracy(says(latest, task.vocab_size), batch)[1]) < 0.8
    even = task.loss(jnp.zeros((1000, 64, 5)), batch)
    np.testing.assert_allclose(even, np.log(5), rtol=1e-5)


@pytest.mark.parametrize("ignore", [-0.1, 1.0])
def test_a_wrong_probability_is_refused(ignore):
    with pytest.raises(ValueError, match="ignore: expected a probability"):
        FlipFlop(ignore)


@pytest.mark.parametrize(("length", "words"), [(2, "at least 4, got 2"), (7, "even number, got 7")])
def test_a_wrong_length_is_refused(length, words):
    with pytest.raises(ValueError, match=f"length: expected .*{words}"):
        FlipFlop().rows(jax.random.key(0), 1, length)


@pytest.mark.slow
def test_a_small_softmax_model_learns_to_read(keys):
    task = FlipFlop(0.5)
    model = ModelConfig("rope", num_layers=2, features=32, num_heads=2, mlp_ratio=1.0).build(
        task.vocab_size, seed=0
    )
    fit(
        model,
        lambda model, batch, key: task.loss(model(batch.tokens), batch),
        lambda data, key: task.rows(key, 32, 24),
        None,
        TrainConfig(steps=600, batch_size=32, context=24, learning_rate=2e-3, warmup=60),
    )
    batch = task.rows(keys("unseen"), 256, 24)
    assert task.accuracy(model(batch.tokens), batch)[1] > 0.9  # chance is 0.5
