"""Options that mean nothing to a mechanism are refused by name; those as if not given are not."""

import jax
import jax.numpy as jnp
import pytest

from attnlab.core.refusals import refuse, refuse_dropout

GIVEN = {"scale": None, "mask": 3, "return_lse": False, "modifiers": ()}


def test_options_without_meaning_are_refused_by_name():
    assert refuse(GIVEN, "no", "scale", "return_lse", "modifiers") == {"mask": 3}
    with pytest.raises(ValueError, match=r"^scale: has its own, got 0\.5\.$"):
        refuse({"scale": 0.5}, "has its own", "scale")


def test_an_array_is_not_printed():
    with pytest.raises(ValueError, match=r"^state: has none, got an array of shape \(40, 40\)\.$"):
        refuse({"state": jnp.ones((40, 40))}, "has none", "state")


def test_dropout_is_refused_but_not_a_rate_of_zero():
    key = jax.random.key(0)
    rest = refuse_dropout({"dropout_rate": 0.0, "dropout_key": key, "mask": 3}, "none")
    assert rest == {"mask": 3} == refuse_dropout({"mask": 3}, "none")
    with pytest.raises(NotImplementedError, match=r"^dropout_rate: none to drop\.$"):
        refuse_dropout({"dropout_rate": 0.5, "dropout_key": key}, "none to drop")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout_rate": 1.0}, r"dropout_rate: expected a number in \[0, 1\), got 1\.0"),
        ({"dropout_rate": "half"}, "dropout_rate: expected a number"),
        ({"dropout_rate": 0.5}, r"dropout_key: dropout_rate=0\.5 needs a JAX random key"),
    ],
)
def test_dropout_is_checked_before_it_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        refuse_dropout(options, "none")
