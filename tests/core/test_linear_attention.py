"""Linear attention under masks, offsets and states: each against all pairs in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import linear_attention, masks
from attnlab.core.mask_layout import layout
from attnlab.core.recurrence import FORMS
from tests.tolerances import as_float64, assert_close, assert_reordered

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 12, 4, 2, 8
LENGTHS = jnp.asarray([LENGTH, 7])
IDS = jnp.asarray([[3] * 5 + [1] * 5 + [-1] * 2, [0] * 4 + [2] * 8])
STRUCTURED = {
    "all": masks.Full(),
    "causal": masks.Causal(),
    "padding": masks.KeyPadding(LENGTHS),
    "causal padding": masks.Causal() & masks.KeyPadding(LENGTHS),
    "rows": masks.QueryPadding(LENGTHS) & masks.Causal(),
    "documents": masks.Segments(IDS),
    "causal documents": masks.Segments(IDS) & masks.Causal() & masks.KeyPadding(LENGTHS),
}
PAIRS = {
    "window": masks.SlidingWindow(3),
    "either": masks.Causal() | masks.KeyPadding(LENGTHS),
    "array": masks.ArrayMask(np.random.default_rng(0).random((BATCH, 1, LENGTH, LENGTH)) < 0.5),
}


def draw(rng, queries=LENGTH, keys=LENGTH):
    """Positive features and values, so that sums of weights are not near zero."""
    query = rng.random((BATCH, queries, HEADS, WIDTH)).astype(np.float32)
    key = rng.random((BATCH, keys, KV_HEADS, WIDTH)).astype(np.float32)
    value = rng.standard_normal((BATCH, keys, KV_HEADS, 5)).astype(np.float32)
    return query, key, value


def expected(query, key, value, mask, *, normalize=False, decay=None, offsets=(0, 0)):
    """All pairs, one by one; `decay` is a constant log decay per head."""
    queries, keys = query.shape[1], key.shape[1]
    dense = mask.dense(
        queries, keys, query_offset=offsets[0], key_offset=offsets[1], num_heads=HEADS
    )
    allowed = np.broadcast_to(np.asarray(dense), (BATCH, HEADS, queries, keys))
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    for b, n, t in np.ndindex(BATCH, HEADS, queries):
        m, total = n * KV_HEADS // HEADS, 0.0
        for s in range(keys):
            apart = offsets[0] + t - offsets[1] - s
            if not allowed[b, n, t, s] or (decay is not None and apart < 0):
                continue
            weight = np.dot(np.float64(query[b, t, n]), np.float64(key[b, s, m]))
            weight *= 1.0 if decay is None else np.exp(apart * float(decay[m]))
            total += weight
            out[b, t, n] += weight * value[b, s, m]
        if normalize and total:
            out[b, t, n] /= total
    return out


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("implementation", [*FORMS, "auto"])
@pytest.mark.parametrize("name", STRUCTURED)
def test_what_a_state_can_keep_every_form_keeps(name, implementation, normalize, rng):
    arrays, mask = draw(rng), STRUCTURED[name]
    out = linear_attention(
        *map(jnp.asarray, arrays), mask=mask, normalize=normalize,
        implementation=implementation, chunk_size=5,
    )  # fmt: skip
    assert_close(out, expected(*arrays, mask, normalize=normalize), "float32")


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_take_the_matrix_of_weights(name, rng):
    arrays, mask = draw(rng), PAIRS[name]
    ready = list(map(jnp.asarray, arrays))
    for implementation in ("parallel", "auto"):
        out = linear_attention(*ready, mask=mask, normalize=True, implementation=implementation)
        assert_close(out, expected(*arrays, mask, normalize=True), "float32")
    for implementation in ("chunked", "recurrent"):
        with pytest.raises(NotImplementedError, match=r'^mask: .*"parallel"'):
            linear_attention(*ready, mask=mask, implementation=implementation)


def test_pairs_with_a_decay(rng):
    arrays, decay = draw(rng), jnp.asarray([-0.1, -2.0])
    out = linear_attention(*map(jnp.asarray, arrays), mask=PAIRS["array"], log_decay=decay)
    assert_close(out, expected(*arrays, PAIRS["array"], decay=decay), "float32")


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(
    ("queries", "offset"), [(1, 6), (1, 11), (3, 4), (5, 10), (4, -2), (2, 30)]
)
def test_queries_stand_where_their_offset_says(queries, offset, implementation, rng):
    """Among the keys, behind the last or before the first; the offset may be traced."""
    arrays, decay = draw(rng, queries=queries), jnp.asarray([-0.1, -2.0])

    @jax.jit
    def run(offset, *arrays):
        return linear_attention(
            *arrays, mask=masks.Causal(), query_offset=offset, log_decay=decay,
            implementation=implementation, chunk_size=5,
        )  # fmt: skip

    out = run(jnp.asarray(offset), *map(jnp.asarray, arrays))
    wanted = expected(*arrays, masks.Causal(), decay=decay, offsets=(offset, 0))
    assert_close(out, wanted, "float32")


@pytest.mark.parametrize("implementation", FORMS)
def test_what_a_mask_hides_may_be_anything(implementation, rng):
    query, key, value = map(jnp.asarray, draw(rng))
    hidden = (np.arange(LENGTH)[None] >= np.asarray(LENGTHS)[:, None])[..., None, None]
    mask = STRUCTURED["causal padding"]
    clean = linear_attention(
        query, key, value, mask=mask, normalize=True, implementation=implementation
    )
    spoiled = (jnp.where(hidden, jnp.nan, x) for x in (key, value))
    out = linear_attention(
        query, *spoiled, mask=mask, normalize=True, implementation=implementation
    )
    np.testing.assert_array_equal(out, clean)


def test_a_state_goes_on(rng):
    arrays = [jnp.asarray(x) for x in draw(rng)]
    options = {"mask": masks.Causal(), "normalize": True}
    whole = linear_attention(*arrays, **options)
    first, state = linear_attention(*(x[:, :5] for x in arrays), **options, return_state=True)
    assert state.shape == (BATCH, KV_HEADS, WIDTH, 6)
    at = jnp.asarray(5)
    rest = linear_attention(
        *(x[:, 5:] for x in arrays), **options, initial_state=state, query_offset=at, key_offset=at
    )
    assert_reordered(jnp.concatenate([first, rest], 1), as_float64(whole), "float32")


def test_a_sum_of_zero_gives_zeros():
    zero = jnp.zeros((1, 3, 1, 4))
    out, slope = jax.value_and_grad(
        lambda q: linear_attention(q, zero, jnp.ones((1, 3, 1, 2)), normalize=True).sum()
    )(zero)
    assert out == 0
    assert np.all(np.isfinite(slope))


def test_a_wrong_call_is_refused_by_name(as_users_run_it, rng):
    query, key, value = (jnp.asarray(x) for x in draw(rng))
    state = jnp.zeros((BATCH, KV_HEADS, WIDTH, 5))
    back = masks.Segments(jnp.asarray([[0] * 4 + [1] * 4 + [0] * 4] * 2))
    wrong = [
        (ValueError, "implementation", {"implementation": "blockwise"}),
        (ValueError, "normalizer", {"normalizer": object()}),
        (ValueError, "modifiers", {"modifiers": object()}),
        (ValueError, "return_lse", {"return_lse": True}),
        (ValueError, "dropout_rate", {"dropout_rate": 2.0}),
        (ValueError, "dropout_key", {"dropout_rate": 0.5}),
        (NotImplementedError, "dropout_rate", {"dropout_rate": 0.5, "dropout_key": 1}),
        (ValueError, "initial_state", {"initial_state": state}),
        (ValueError, "initial_state", {"initial_state": state, "causal": True, "query_offset": 1}),
        (ValueError, "mask", {"mask": back}),
        (NotImplementedError, "mask", {"mask": PAIRS["array"], "erase": key}),
        (NotImplementedError, "log_decay", {"mask": PAIRS["array"], "log_decay": -key}),
    ]
    for error, name, options in wrong:
        with pytest.raises(error, match=f"^{name}"):
            linear_attention(query, key, value, **options)


def test_layouts():
    lengths = (LENGTH, LENGTH)
    both = layout(masks.Causal() & masks.KeyPadding(LENGTHS) & masks.Segments(IDS), lengths)
    assert both.causal
    wanted = (np.arange(LENGTH)[None] < np.asarray(LENGTHS)[:, None]) & (np.asarray(IDS) >= 0)
    np.testing.assert_array_equal(both.keys, wanted)
    np.testing.assert_array_equal(both.ids, IDS)
    shifted = layout(masks.KeyPadding(LENGTHS), lengths, (0, 3))
    np.testing.assert_array_equal(shifted.keys.sum(1), [LENGTH - 3, 4])
    for mask in (
        masks.SlidingWindow(2),
        ~masks.Causal(),
        masks.Segments(IDS) & masks.Segments(IDS),
    ):
        assert layout(mask, lengths) is None
    assert layout(masks.Segments(IDS, IDS + 1), lengths) is None
    assert layout(masks.Segments(IDS, jnp.array(IDS)), lengths) is not None
