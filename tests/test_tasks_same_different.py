"""Same or different: rows as the docstring says, and no token alone gives the answer away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.tasks import SameDifferent


def objects(task, tokens):
    """Both objects of each row, as values of attributes."""
    begins = np.arange(task.attributes) * task.values
    return tokens[:, : task.attributes] - begins, tokens[:, task.attributes : -1] - begins


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize(("attributes", "values", "classes"), [(2, 2, 2), (3, 6, 3), (4, 8, 4)])
def test_objects_differ_in_two_attributes_or_none_and_keep_their_class(
    keys, attributes, values, classes, unseen
):
    task = SameDifferent(attributes, values, classes, unseen)
    tokens, targets, asked = (np.asarray(x) for x in task.rows(keys("rows"), 400))
    assert tokens.shape == targets.shape == asked.shape == (400, task.length)
    assert tokens.dtype == targets.dtype == np.int32
    assert (tokens[:, -1] == task.vocab_size - 3).all()
    assert asked[:, -1].all() and not asked[:, :-1].any()
    first, second = objects(task, tokens)
    for shown in (first, second):
        assert shown.min() >= 0 and shown.max() < values
        assert ((shown.sum(1) % classes == 0) == unseen).all()
    differ = (first != second).sum(1)
    assert set(differ) == {0, 2}
    same = targets[:, -1] == task.vocab_size - 2
    np.testing.assert_array_equal(same, differ == 0)
    assert set(targets[:, -1]) == {task.vocab_size - 2, task.vocab_size - 1}
    assert abs(same.mean() - 0.5) < 0.1


def test_training_shows_every_value_but_no_unseen_object(keys):
    seen, unseen = keys("seen", "unseen")
    train = objects(SameDifferent(), np.asarray(SameDifferent().rows(seen, 4000).tokens))[0]
    task = SameDifferent(unseen=True)
    test = objects(task, np.asarray(task.rows(unseen, 4000).tokens))[0]
    assert not {tuple(x) for x in train} & {tuple(x) for x in test}
    for shown in (train, test):
        for attribute in shown.T:
            np.testing.assert_allclose(np.bincount(attribute, minlength=8) / 4000, 1 / 8, atol=0.03)


def test_no_single_token_tells_the_answer(keys):
    task = SameDifferent()
    batch = task.rows(keys("rows"), 20_000)
    tokens, same = np.asarray(batch.tokens), np.asarray(batch.targets)[:, -1] == 33
    for place in range(task.length - 1):
        counts = [np.bincount(tokens[same == which, place], minlength=35) for which in (0, 1)]
        shares = [count / count.sum() for count in counts]
        np.testing.assert_allclose(*shares, atol=0.02)


def test_an_oracle_gets_all_and_a_guesser_gets_chance(keys, rng):
    task = SameDifferent()
    batch = task.rows(keys("rows"), 2000)
    first, second = objects(task, np.asarray(batch.tokens))
    answer = np.where((first == second).all(1), 33, 34)
    for given, wanted in [(answer, 1.0), (rng.integers(33, 35, 2000), task.chance)]:
        logits = np.zeros((2000, task.length, task.vocab_size), np.float32)
        logits[np.arange(2000), -1, given] = 1
        rows, answers = task.accuracy(jnp.asarray(logits), batch)
        assert float(rows) == float(answers)
        assert abs(float(answers) - wanted) < 0.04 * (wanted < 1) + 1e-9
    even = task.loss(jnp.zeros((2000, task.length, task.vocab_size)), batch)
    np.testing.assert_allclose(even, np.log(35), rtol=1e-5)


def test_rows_follow_their_key_also_compiled(keys):
    task, (one, two) = SameDifferent(), keys("one", "two")
    compiled = jax.jit(task.rows, static_argnums=1)(one, 8)
    for a, b in zip(task.rows(one, 8, task.length), compiled, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(task.rows(one, 8).tokens, task.rows(two, 8).tokens)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attributes": 1}, "attributes: expected at least 2, got 1"),
        ({"classes": 1}, "classes: expected at least 2, got 1"),
        ({"values": 6, "classes": 4}, "classes: 4 does not divide values=6"),
    ],
)
def test_a_task_of_wrong_sizes_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SameDifferent(**options)


def test_another_length_is_refused():
    with pytest.raises(ValueError, match="length: expected 9, got 10"):
        SameDifferent().rows(jax.random.key(0), 1, 10)
