"""What a query reads of its own token, and two writes in one step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.core.linear_attention import linear_attention
from attnlab.core.own_token import own_token, sees_any
from attnlab.core.recurrence import FORMS
from attnlab.core.two_writes import two_writes
from tests.tolerances import as_float64, assert_close, assert_reordered

LENGTH, WIDTH = 9, 4


def tokens(length=LENGTH):
    return jnp.arange(1.0, length + 1)[:, None, None] * jnp.ones((1, 2, 3))


def query(length):
    return jnp.ones((length, 2, WIDTH))


@pytest.mark.parametrize("first", [0, 2, 7])
@pytest.mark.parametrize("traced", [False, True])
def test_queries_find_their_token(first, traced):
    def run(offset):
        options = {"query_offset": offset, "key_offset": 100}
        return own_token(tokens(), query(4), options)

    run = jax.jit(run) if traced else run
    found = run(jnp.asarray(100 + first) if traced else 100 + first)[:, 0, 0]
    exact = [n + 1 if n < LENGTH else 0 for n in range(first, first + 4)]
    np.testing.assert_array_equal(found, exact)


def test_queries_before_the_first_token_find_none():
    found = own_token(tokens(), query(4), {"query_offset": 0, "key_offset": 2})
    np.testing.assert_array_equal(found[:, 0, 0], [0, 0, 1, 2])


MASKS = [
    masks.KeyPadding(6),
    masks.QueryPadding(5) & masks.Causal(),
    masks.Segments(jnp.asarray([0, 0, 0, -1, 1, 1, 1, 1, -1])),
    masks.ArrayMask(jnp.asarray(np.random.default_rng(0).random((2, LENGTH, LENGTH)) < 0.5)),
    masks.SlidingWindow(3, 0),
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: type(m).__name__)
def test_a_mask_hides_a_token_from_itself(mask):
    found = own_token(tokens(), query(LENGTH), {"mask": mask})[..., 0]
    pairs = np.broadcast_to(mask.dense(LENGTH, LENGTH, num_heads=2), (2, LENGTH, LENGTH))
    for head in range(2):
        exact = np.where(np.diagonal(pairs[head]), np.arange(1.0, LENGTH + 1), 0)
        np.testing.assert_array_equal(found[:, head], exact)


@pytest.mark.parametrize("mask", MASKS[:3], ids=lambda m: type(m).__name__)
def test_who_sees_any(mask):
    pairs = np.asarray((mask & masks.Causal()).dense(LENGTH, LENGTH))[0]
    found = sees_any(query(LENGTH), query(LENGTH), {"mask": mask})
    np.testing.assert_array_equal(found, pairs.any(-1))


def test_nobody_sees_an_empty_past_and_everybody_a_state():
    options = {"mask": masks.KeyPadding(0)}
    assert not bool(jnp.any(sees_any(query(3), query(3), options)))
    options["initial_state"] = jnp.zeros((2, WIDTH, 3))
    assert bool(jnp.all(sees_any(query(3), query(3), options)))


# ---- two writes ----------------------------------------------------------------------------------


def numbers(rng, length=LENGTH, heads=2):
    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    erase = normal(length, heads, WIDTH)
    erase /= np.linalg.norm(erase, axis=-1, keepdims=True)
    return {
        "query": normal(length, heads, WIDTH), "key": normal(length, heads, WIDTH),
        "value": normal(length, heads, 3), "log_decay": -np.exp(normal(length, heads, WIDTH)),
        "erase": erase, "direction": rng.random((length, heads, WIDTH)).astype(np.float32) * erase,
    }  # fmt: skip


def exact(given, state=None, real=None, starts=()):
    """The formula with its matrix, one step after the other."""
    x = {name: as_float64(array) for name, array in given.items()}
    length, heads = x["key"].shape[:2]
    memory = np.zeros((heads, WIDTH, 3)) if state is None else as_float64(state).copy()
    out = np.zeros((length, heads, 3))
    for t in range(length):
        for n in range(heads):
            if t in starts:
                memory[n] = 0
            if real is not None and not real[t]:
                continue
            matrix = np.diag(np.exp(x["log_decay"][t, n]))
            matrix -= np.outer(x["direction"][t, n], x["erase"][t, n])
            memory[n] = matrix @ memory[n] + np.outer(x["key"][t, n], x["value"][t, n])
            out[t, n] = memory[n].T @ x["query"][t, n]
    return out, memory


@pytest.mark.parametrize("form", FORMS)
def test_two_writes_are_the_matrix(form, rng):
    given = numbers(rng)
    state = rng.standard_normal((2, WIDTH, 3)).astype(np.float32)
    out, last = two_writes(
        **jax.tree.map(jnp.asarray, given), initial_state=jnp.asarray(state), return_state=True,
        implementation=form, chunk_size=4,
    )  # fmt: skip
    for ours, theirs in zip((out, last), exact(given, state), strict=True):
        assert_close(ours, theirs, np.float32)


def test_documents_and_padding(rng):
    given, ids = numbers(rng), np.array([0, 0, 0, -1, 1, 1, 1, 1, -1])
    out = two_writes(**jax.tree.map(jnp.asarray, given), mask=masks.Segments(jnp.asarray(ids)))
    theirs, _ = exact(given, real=ids >= 0, starts=(4,))
    assert_close(out, theirs, np.float32)


def test_decoding_one_query_against_all_keys(rng):
    given = jax.tree.map(jnp.asarray, numbers(rng))
    whole = two_writes(**given)

    @jax.jit
    def one(step):
        query = jax.lax.dynamic_slice_in_dim(given["query"], step, 1)
        return two_writes(**(given | {"query": query}), query_offset=step)

    for step in (0, 5, LENGTH - 1):
        assert_reordered(one(jnp.asarray(step))[0], whole[step], np.float32)


def test_masks_that_pick_pairs_are_refused(rng):
    given = jax.tree.map(jnp.asarray, numbers(rng))
    for call in (
        lambda mask: two_writes(**given, mask=mask),
        lambda mask: sees_any(given["query"], given["key"], {"mask": mask}),
    ):
        with pytest.raises(NotImplementedError, match=r"SlidingWindow.*attnlab\.attention"):
            call(masks.SlidingWindow(2, 0))


# ---- decays of padding ---------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [False, True])
def test_padding_does_not_decay_the_state(channels, rng):
    """Its decays are left out with it, be they NaN."""
    given = numbers(rng)
    g = given["log_decay"] if channels else given["log_decay"][..., 0]
    g[3:] = np.nan
    arrays = [jnp.asarray(given[name]) for name in ("query", "key", "value")]

    def state(length, mask):
        return linear_attention(
            *(x[:length] for x in arrays), log_decay=jnp.asarray(g)[:length], mask=mask,
            return_state=True,
        )[1]  # fmt: skip

    assert_reordered(state(5, masks.KeyPadding(3)), state(3, None), np.float32)


def test_a_key_that_no_query_sees_does_not_decay_either(rng):
    given, real = numbers(rng), np.arange(LENGTH) != 3
    g = given["log_decay"][..., 0]
    g[3] = np.nan
    arrays = [jnp.asarray(given[name]) for name in ("query", "key", "value")]
    mask = masks.ArrayMask(jnp.asarray(np.tri(LENGTH, dtype=bool) & real & real[:, None]))
    whole = linear_attention(*arrays, log_decay=jnp.asarray(g), mask=mask)
    kept = linear_attention(*(x[real] for x in arrays), log_decay=jnp.asarray(g)[real])
    assert_reordered(whole[real], kept, np.float32)
    assert not np.any(whole[3])


def test_a_constant_decay_counts_positions(rng):
    """Padding between two tokens makes the older one older still."""
    given, real = numbers(rng), np.arange(LENGTH) != 3
    arrays = [jnp.asarray(given[name]) for name in ("query", "key", "value")]
    mask = masks.ArrayMask(jnp.asarray(np.tri(LENGTH, dtype=bool) & real & real[:, None]))
    options = {"log_decay": jnp.asarray([-0.1, -1.0])}
    whole = linear_attention(*arrays, mask=mask, **options)
    kept = linear_attention(*(x[real] for x in arrays), **options)
    assert_reordered(whole[:3], kept[:3], np.float32)
    assert np.max(np.abs(whole[4:] - kept[3:])) > 1e-3
