"""The contract must be able to fail: each defect, planted into a copy, is caught by name."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import attnlab
from attnlab import atlas, masks
from attnlab.core.attention import spread
from tests.contract import support
from tests.contract.properties import PROPERTIES

ORIGINAL = atlas.get("multi-head-attention")
RECURRENT = atlas.get("linear-transformer")


class Damaged(attnlab.Mechanism):
    """Plain attention with one defect, or with none."""

    def __init__(self, defect=None):
        self.defect = defect

    def __call__(self, query, key, value, **options):
        defect = self.defect or (
            lambda attention, *arrays, **options: attention(*arrays, **options)
        )
        return defect(attnlab.attention, query, key, value, **options)


def copy(defect=None):
    """The plain mechanism's entry, with a module that carries the defect."""
    return dataclasses.replace(
        ORIGINAL, module=Damaged, build=lambda num_heads, head_width, *, rngs: Damaged(defect)
    )


class DamagedState(RECURRENT.module):
    """The linear transformer with one defect, or with none."""

    def __init__(self, defect=None):
        self.defect = defect

    def __call__(self, query, key, value, **options):
        if self.defect is None:
            return RECURRENT.function(query, key, value, **options)
        return self.defect(RECURRENT.function, query, key, value, **options)


def copy_with_state(defect=None):
    return dataclasses.replace(
        RECURRENT,
        module=DamagedState,
        build=lambda num_heads, head_width, *, rngs: DamagedState(defect),
    )


def forgets_its_state(attention, *arrays, initial_state=None, **options):
    return (
        attention(*arrays, initial_state=initial_state, **options)
        if initial_state is None
        else (attention(*arrays, initial_state=0 * initial_state, **options))
    )


def differs_between_forms(attention, *arrays, implementation="auto", **options):
    out = attention(*arrays, implementation=implementation, **options)
    return out if implementation == "parallel" else out * 1.001


def leaks_one_key_of_the_future(attention, *arrays, query_offset=0, **options):
    return attention(*arrays, query_offset=query_offset + 1, **options)


def reads_the_mean_where_nothing_is_visible(attention, query, key, value, *, mask=None, **options):
    """What a large negative number instead of minus infinity does."""
    if mask is None:
        return attention(query, key, value, **options)
    blind = ~mask.dense(query.shape[-3], key.shape[-3]).any(-1, keepdims=True)
    return attention(query, key, value, mask=mask | masks.ArrayMask(blind), **options)


def returns_nan_where_nothing_is_visible(attention, *arrays, **options):
    out = attention(*arrays, **options)
    blind = jnp.all(out == 0, axis=-1, keepdims=True)
    return jnp.where(blind, jnp.nan, out) if not options.get("return_lse") else out


def repeats_key_heads_in_the_wrong_order(attention, query, key, value, **options):
    times = query.shape[-2] // key.shape[-2]
    tiled = [jnp.concatenate([x] * times, axis=-2) for x in (key, value)]
    return attention(query, *tiled, **options)


def holds_the_score_matrix(attention, *arrays, **options):
    return attention(*arrays, **(options | {"implementation": "reference"}))


def overflows(attention, query, key, value, *, mask=None, scale=None, **options):
    """exp without subtracting the maximum."""
    group = query.shape[-2] // key.shape[-2]
    key, value = (jnp.repeat(x, group, axis=-2) for x in (key, value))
    scores = jnp.einsum("...tnh,...snh->...nts", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask.dense(query.shape[-3], key.shape[-3]), scores, -jnp.inf)
    weights = jnp.exp(scores)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    return jnp.einsum("...nts,...snd->...tnd", weights, value)


def loses_precision(attention, *arrays, **options):
    """Scores in float8, as it were: the query keeps four bits."""
    coarse = [jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3) for x in arrays[:1]]
    return attention(*coarse, *arrays[1:], **options)


def drops_the_gradient_of_the_keys(attention, query, key, value, **options):
    return attention(query, jax.lax.stop_gradient(key), value, **options)


def halves_the_gradient_of_the_values(attention, query, key, value, **options):
    half = value / 2
    return attention(query, key, half + jax.lax.stop_gradient(half), **options)


def ignores_the_mask(attention, *arrays, mask=None, **options):
    return attention(*arrays, **options)


def multiplies_masked_values_by_zero(attention, query, key, value, *, mask=None, **options):
    """A weight of zero times NaN is NaN."""
    out = attention(query, key, value, mask=mask, **options)
    return out + 0 * jnp.sum(value, axis=(-3, -2), keepdims=True)


def ignores_the_offset_when_decoding(attention, *arrays, query_offset=0, **options):
    return attention(*arrays, **options)


def answers_in_float32(attention, *arrays, **options):
    return attention(*arrays, **options).astype(jnp.float32)


def ignores_the_dropout_key(attention, *arrays, dropout_key=None, **options):
    key = None if dropout_key is None else jax.random.key(0)
    return attention(*arrays, dropout_key=key, **options)


def does_not_drop(attention, *arrays, dropout_rate=0.0, dropout_key=None, **options):
    return attention(*arrays, **options)


def depends_on_the_padded_length(attention, query, key, value, **options):
    return attention(query * (key.shape[-3] ** 0.5), key, value, **options)


def knows_where_keys_are(attention, query, key, value, **options):
    place = jnp.arange(key.shape[-3], dtype=key.dtype)[:, None, None]
    return attention(
        query, key + place.reshape((1,) * (key.ndim - 3) + place.shape), value, **options
    )


def counts_from_zero_somewhere_else(attention, *arrays, key_offset=0, **options):
    shift = attnlab.scores.ScoreFunction(
        lambda score, at: score * (1 + 0.01 * at.key.astype(score.dtype))
    )
    return attention(*arrays, key_offset=key_offset, modifiers=shift, **options)


def weighs_too_little(attention, *arrays, **options):
    return attention(*arrays, **options) * 0.9


def mixes_the_batch(attention, query, key, value, **options):
    if query.ndim > 3:
        query = query + 0.1 * jnp.mean(query, axis=0, keepdims=True)
    return attention(query, key, value, **options)


def differs_when_compiled(attention, *arrays, **options):
    out = attention(*arrays, **options)
    return out * 1.01 if isinstance(out, jax.core.Tracer) else out


def takes_anything(attention, query, key, value, **options):
    try:
        return attention(query, key, value, **options)
    except (ValueError, TypeError):
        return jnp.zeros_like(query)


def forgets_the_sum(attention, *arrays, return_lse=False, **options):
    out = attention(*arrays, return_lse=return_lse, **options)
    return (out[0], jnp.maximum(out[1], 0)) if return_lse else out


def sees_only_its_own_keys(attention, query, key, value, *, mask=None, **options):
    """What a ring that never turns computes."""
    if spread.get() is not None:
        half = jnp.arange(key.shape[-3]) >= key.shape[-3] // 2
        own = masks.ArrayMask(half[:, None] == half[None])
        mask = own if mask is None else mask & own
    return attention(query, key, value, mask=mask, **options)


DEFECTS = [
    (leaks_one_key_of_the_future, "no leak from the future", "float32"),
    (reads_the_mean_where_nothing_is_visible, "finite at extremes", "float32"),
    (returns_nan_where_nothing_is_visible, "finite at extremes", "float32"),
    (repeats_key_heads_in_the_wrong_order, "grouped heads", "float32"),
    (holds_the_score_matrix, "memory growth", "float32"),
    (overflows, "finite at extremes", "bfloat16"),
    (loses_precision, "within budget", "float32"),
    (loses_precision, "within budget", "bfloat16"),
    (drops_the_gradient_of_the_keys, "gradient vs differences", "float32"),
    (drops_the_gradient_of_the_keys, "gradient vs float64", "bfloat16"),
    (halves_the_gradient_of_the_values, "gradient vs differences", "float32"),
    (ignores_the_mask, "masked keys have no influence", "float32"),
    (multiplies_masked_values_by_zero, "masked keys have no influence", "float32"),
    (ignores_the_offset_when_decoding, "decode equals prefill", "float32"),
    (answers_in_float32, "shape and dtype", "bfloat16"),
    (ignores_the_dropout_key, "deterministic given a key", "float32"),
    (does_not_drop, "deterministic given a key", "float32"),
    (depends_on_the_padded_length, "padding changes nothing", "float32"),
    (knows_where_keys_are, "permutation of keys", "float32"),
    (counts_from_zero_somewhere_else, "translation", "float32"),
    (weighs_too_little, "rows sum to one", "float32"),
    (mixes_the_batch, "vmap equals batch", "float32"),
    (differs_when_compiled, "jit equals eager", "float32"),
    (takes_anything, "bad input raises", "float32"),
    (forgets_the_sum, "log sum exp", "float32"),
    (sees_only_its_own_keys, "sharded equals whole", "float32"),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("defect", "name", "dtype"), DEFECTS, ids=[f"{d.__name__}-{t}" for d, _, t in DEFECTS]
)
def test_a_planted_defect_is_caught(defect, name, dtype):
    errors = []
    row = support.examine(copy(defect), name, dtype, "blockwise", errors)
    assert row["status"] == "fail", f"{name} did not see it: {row}"
    assert isinstance(errors[0], AssertionError), "it crashed; the property saw nothing"


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("name", PROPERTIES)
def test_the_undamaged_copy_passes(name):
    row = support.examine(copy(), name, "float32", "blockwise")
    of_states = name in {name for _, name, _ in STATE_DEFECTS}
    assert row["status"] == ("n/a" if of_states else "pass"), row["note"]


STATE_DEFECTS = [
    (forgets_its_state, "state continues", "chunked"),
    (differs_between_forms, "forms agree", "parallel"),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("defect", "name", "implementation"),
    STATE_DEFECTS,
    ids=[d.__name__ for d, _, _ in STATE_DEFECTS],
)
def test_a_planted_defect_of_a_state_is_caught(defect, name, implementation):
    errors = []
    row = support.examine(copy_with_state(defect), name, "float32", implementation, errors)
    assert row["status"] == "fail", f"{name} did not see it: {row}"
    assert isinstance(errors[0], AssertionError), "it crashed; the property saw nothing"
    whole = support.examine(copy_with_state(), name, "float32", implementation)
    assert whole["status"] == "pass", whole["note"]


def test_every_property_has_a_defect_that_it_catches():
    named = {name for _, name, _ in DEFECTS} | {name for _, name, _ in STATE_DEFECTS}
    assert named == set(PROPERTIES)


def test_a_refusal_must_name_what_can():
    def refuses(attention, *arrays, **options):
        raise NotImplementedError("cannot")

    row = support.examine(copy(refuses), "within budget", "float32", "blockwise")
    assert row["status"] == "fail"
    assert "naming" in row["note"]
