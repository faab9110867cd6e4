"""A modifier that reads whole rows: exact by blocks of queries, in linear memory, refused by name
where keys stream past."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, decode_attention, masks
from attnlab.core.cache import KVCache
from attnlab.core.kernels import interpret
from attnlab.core.scores import AlibiSlopes, RowModifier
from attnlab.core.terms import ArrayLeaf, leaf
from tests import oracles
from tests.core import draw
from tests.tolerances import LINEAR_GROWTH, as_float64, assert_close

SIZE = draw.Sizes((2,), 13, 17, 4, 2, 8, 3)
SLOPES = oracles.alibi_slopes(4)


class RankedGate(RowModifier):
    """Adds, for each key, a number that the row's sum of visible scores picks, query by query."""

    table: ArrayLeaf = leaf("B N T *")

    def rows(self, score, at, allowed):
        total = jnp.sum(jnp.where(allowed, jnp.tanh(score), 0), axis=-1, keepdims=True)
        return score * total + self.table[..., :1] * jnp.sin(score) + self.table[..., 1:]


def _oracle(score, allowed, table):
    out = np.zeros_like(score)
    for at in np.ndindex(score.shape[:-1]):
        total = sum(np.tanh(s) for s, seen in zip(score[at], allowed[at], strict=True) if seen)
        out[at] = score[at] * total + table[at][0] * np.sin(score[at]) + table[at][1]
    return out


def case(rng):
    arrays = draw.inputs(SIZE, 3)
    table = rng.standard_normal((2, 4, 13, 2)).astype(np.float32)
    allowed = rng.random((2, 4, 13, 17)) < 0.6
    allowed[0, 1, 2] = False
    return arrays, table, allowed


def formula(query, key, value, table, allowed):
    options = {
        "mask": oracles.array(allowed),
        "modifiers": [
            oracles.alibi(SLOPES),
            lambda s, i, j, head: _oracle(s, allowed, np.asarray(table, np.float64)),
        ],
        "return_lse": True,
    }
    return oracles.attention(query, key, value, **options)


def ours(query, key, value, table, allowed, **options):
    modifiers = (AlibiSlopes(jnp.asarray(SLOPES, jnp.float32)), RankedGate(table))
    mask = jnp.asarray(allowed)
    return attention(query, key, value, mask=mask, modifiers=modifiers, **options)


FORMS = {
    "reference": {"implementation": "reference"},
    "blocks of 5": {"implementation": "blockwise", "block_sizes": (5, 4)},
    "one block": {"implementation": "blockwise", "block_sizes": (64, 64)},
    "default": {"implementation": "blockwise"},
}


@pytest.mark.parametrize("form", FORMS)
def test_whole_rows_are_seen_whatever_the_blocks(form, rng):
    arrays, table, allowed = case(rng)
    out, lse = ours(
        *map(jnp.asarray, arrays), jnp.asarray(table), allowed, return_lse=True, **FORMS[form]
    )
    exact, exact_lse = formula(*map(as_float64, arrays), table, allowed)
    assert_close(out, exact, np.float32)
    assert_close(lse, exact_lse, np.float32)


@pytest.mark.parametrize("form", ["reference", "blocks of 5"])
def test_gradients_reach_inputs_and_arrays_of_the_modifier(form, rng):
    arrays, table, allowed = case(rng)

    def loss(*x):
        return jnp.sum(jnp.cos(ours(*x, allowed, **FORMS[form])))

    given = [*map(as_float64, arrays), as_float64(table)]
    found = jax.grad(loss, argnums=(0, 1, 2, 3))(*(jnp.asarray(x, jnp.float32) for x in given))
    for index, gradient in enumerate(found):
        direction = [np.zeros_like(x) for x in given]
        direction[index] = rng.standard_normal(given[index].shape)
        slope = oracles.directional(
            lambda *x: np.sum(np.cos(formula(*x, allowed)[0])), given, direction
        )
        scale = np.max(np.abs(gradient)) * np.linalg.norm(direction[index])
        along = np.sum(as_float64(gradient) * direction[index])
        assert_close(along, slope, np.float32, "gradient", scale=scale)


@pytest.mark.parametrize("form", ["reference", "blocks of 5"])
def test_what_no_query_sees_may_hold_anything(form, rng):
    (query, key, value), table, allowed = case(rng)
    allowed[..., 5] = False
    grad = jax.grad(
        lambda *x: jnp.sum(jnp.cos(ours(*x, jnp.asarray(table), allowed, **FORMS[form]))), (0, 1, 2)
    )
    clean = grad(*map(jnp.asarray, (query, key, value)))
    key[:, 5], value[:, 5] = np.nan, np.inf
    for ours_, expected in zip(grad(*map(jnp.asarray, (query, key, value))), clean, strict=True):
        np.testing.assert_array_equal(ours_, expected)


def test_memory_grows_with_the_length_not_with_its_square():
    def temporaries(n):
        def loss(query, key, value, table):
            return jnp.sum(
                attention(
                    query, key, value, mask=masks.Causal(), modifiers=RankedGate(table),
                    implementation="blockwise",
                )
            )  # fmt: skip

        shapes = [(n, 2, 8)] * 3 + [(2, n, 2)]
        arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
        return run.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(1024), temporaries(4096)
    assert large <= LINEAR_GROWTH * small
    assert large < 4096 * 4096 * 2 * 4 / 4


@pytest.mark.parametrize("implementation", ["xla", "triton", "tpu"])
def test_what_streams_over_keys_refuses_by_name(implementation, rng):
    arrays, table, allowed = case(rng)
    given = (*map(jnp.asarray, arrays), jnp.asarray(table))
    with interpret(), pytest.raises(NotImplementedError, match=r"RankedGate.*blockwise"):
        ours(*given, allowed, implementation=implementation)


def test_decode_attention_refuses_by_name():
    query, key = jnp.ones((1, 1, 8)), jnp.ones((4, 1, 8))
    cache = KVCache.create((), 8, 1, 8).append(key, key)
    with pytest.raises(NotImplementedError, match=r"RankedGate.*reference"):
        decode_attention(query, cache, modifiers=RankedGate(jnp.ones((1, 1, 2))))
