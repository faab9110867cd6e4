"""Counting: rows as the docstring says, and a counter solves them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.tasks import Counting
from attnlab.tasks.counting import INCREMENT, QUESTION, RESET


def says(answers, vocab_size):
    """Logits that point at `answers`."""
    return jnp.asarray(np.eye(vocab_size, dtype=np.float32)[answers])


def operation(task, token):
    """The kind and the variable of a token that is not dull."""
    return (token - task.most - 2) % 3, (token - task.most - 2) // 3


def counted(task, tokens):
    """What counters would say at the questions, by a loop; 0 elsewhere."""
    out = np.zeros_like(tokens)
    for row, said in zip(tokens, out, strict=True):
        counters = {}
        for at, token in enumerate(row):
            if token == task.nothing:
                continue
            kind, name = operation(task, token)
            if kind == RESET:
                counters[name] = 0
            elif kind == INCREMENT:
                counters[name] += 1
            else:
                said[at] = counters[name]
    return out


SIZES = [(1, 10, 2), (1, 2, 40), (3, 4, 64), (5, 1, 6), (2, 10, 300)]


@pytest.mark.parametrize(("variables", "most", "length"), SIZES)
def test_a_question_asks_for_the_increments_since_the_last_reset(keys, variables, most, length):
    task = Counting(variables, most, dull=3.0)
    tokens, targets, asked = (np.asarray(x) for x in task.rows(keys("rows"), 60, length))
    assert tokens.shape == targets.shape == asked.shape == (60, length)
    assert tokens.dtype == targets.dtype == np.int32
    assert tokens.min() >= task.nothing and tokens.max() < task.vocab_size
    for at in range(variables):
        assert (tokens[:, at] == task.most + 2 + 3 * at + RESET).all()
    np.testing.assert_array_equal(targets, counted(task, tokens))
    kind = operation(task, tokens)[0]
    np.testing.assert_array_equal(asked, (kind == QUESTION) & (tokens != task.nothing))
    assert asked[:, -1].all()
    assert targets.max() <= most


def test_counts_reach_the_largest_and_stay_there(keys):
    task = Counting(1, 3, dull=0.0, reset=0.0)
    tokens, targets, _ = (np.asarray(x) for x in task.rows(keys("rows"), 20, 60))
    assert (targets[:, -1] == 3).all()
    assert ((tokens == task.most + 2 + INCREMENT).sum(1) == 3).all()


def test_operations_are_drawn_with_their_odds(keys):
    task = Counting(2, most=1000, dull=6.0, increment=2.0, reset=1.0, question=1.0)
    tokens = np.asarray(task.rows(keys("rows"), 8000, 43).tokens)[:, 2:-1]
    assert abs((tokens == task.nothing).mean() - 0.6) < 0.01
    kind, name = operation(task, tokens[tokens != task.nothing])
    for which, share in [(RESET, 0.25), (INCREMENT, 0.5), (QUESTION, 0.25)]:
        assert abs((kind == which).mean() - share) < 0.01
    assert abs(name.mean() - 0.5) < 0.01


def test_rows_follow_their_key_also_compiled(keys):
    task, (one, two) = Counting(2, dull=3.0), keys("one", "two")
    compiled = jax.jit(task.rows, static_argnums=(1, 2))(one, 8, 32)
    for a, b, c in zip(task.rows(one, 8, 32), compiled, task.rows(two, 8, 32), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_a_counter_gets_all_and_the_whole_rows_count_does_not(keys):
    task = Counting(1, dull=5.0, reset=3.0)
    batch = task.rows(keys("rows"), 500, 64)
    tokens = np.asarray(batch.tokens)
    rows, answers = task.accuracy(says(counted(task, tokens), task.vocab_size), batch)
    assert (float(rows), float(answers)) == (1.0, 1.0)
    total = np.cumsum(tokens == task.most + 2 + INCREMENT, axis=1)
    never_set = np.minimum(total, task.most)
    assert float(task.accuracy(says(never_set, task.vocab_size), batch)[1]) < 0.6
    even = task.loss(jnp.zeros((500, 64, task.vocab_size)), batch)
    np.testing.assert_allclose(even, np.log(task.vocab_size), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variables": 0}, "variables: expected at least 1, got 0"),
        ({"most": 0}, "most: expected at least 1, got 0"),
        ({"dull": -1.0}, "dull: expected odds of 0 or more, got -1.0"),
        ({"increment": 0.0}, "increment: expected odds above 0"),
    ],
)
def test_a_task_of_wrong_sizes_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Counting(**options)


def test_a_row_too_short_is_refused():
    with pytest.raises(ValueError, match="length: expected at least 4, got 3"):
        Counting(3).rows(jax.random.key(0), 1, 3)
