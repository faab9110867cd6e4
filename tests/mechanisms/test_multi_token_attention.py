"""Golovneva et al.: neighbours of a pair add to it, and neither the future nor other documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks
from attnlab.core.neighbours import convolved
from attnlab.normalization.multi_token_attention import (
    MultiTokenAttention,
    multi_token_attention,
)
from tests.tolerances import as_float64, assert_close, assert_reordered

LENGTH, HEADS = 10, 2


def arrays(rng):
    return [jnp.asarray(rng.standard_normal((LENGTH, HEADS, 8)), jnp.float32) for _ in "qkv"]


def kernels(rng, size=(3, 5)):
    both = [jnp.asarray(rng.standard_normal((HEADS, *size)), jnp.float32) for _ in range(2)]
    return {"pre_kernel": both[0], "post_kernel": both[1]}


def test_at_the_start_it_is_softmax_attention(rng):
    x = arrays(rng)
    module = MultiTokenAttention(HEADS, 8, norm=False, gate=None, rngs=nnx.Rngs(0))
    plain = attention(*x, mask=masks.Causal())
    ours = module.finish(module(*x, mask=masks.Causal()), jnp.zeros((LENGTH, 16)))
    assert_reordered(ours, as_float64(plain), "float32")


@pytest.mark.parametrize(("back", "ahead"), [(0, 0), (2, 0), (1, -2), (0, 1)])
def test_a_kernel_with_one_entry_shifts(back, ahead, rng):
    scores = as_float64(rng.standard_normal((HEADS, 6, 7))).astype(np.float32)
    kernel = jnp.zeros((HEADS, 3, 5)).at[:, 2 - back, 2 + ahead].set(2.0)
    expected = np.zeros_like(scores)
    for i in range(back, 6):
        for j in range(max(0, -ahead), min(7, 7 - ahead)):
            expected[:, i, j] = 2 * scores[:, i - back, j + ahead]
    np.testing.assert_array_equal(convolved(jnp.asarray(scores), kernel), expected)


def test_nothing_comes_from_the_future(rng):
    x, terms = arrays(rng), kernels(rng)

    def row(key, value):
        out = multi_token_attention(x[0], key, value, **terms, mask=masks.Causal())
        return jnp.sum(jnp.sin(out[4]))

    for slope in jax.grad(row, argnums=(0, 1))(*x[1:]):
        assert np.all(np.asarray(slope)[5:] == 0)
        assert np.all(np.any(np.asarray(slope)[:5] != 0, axis=(1, 2)))


def documents(x, terms, ids):
    mask = masks.Causal() & masks.Segments(jnp.asarray(ids))
    return multi_token_attention(*x, **terms, mask=mask)


def test_nothing_comes_from_another_document(rng, monkeypatch):
    """Zeroing pairs is not enough: the counter-check lets neighbours of other documents count."""
    x, terms, ids = arrays(rng), kernels(rng), [0] * 4 + [1] * 6
    packed = documents(x, terms, ids)
    for part in (slice(0, 4), slice(4, LENGTH)):
        alone = multi_token_attention(*(y[part] for y in x), **terms, mask=masks.Causal())
        assert_close(packed[part], as_float64(alone), "float32")
    monkeypatch.setattr(
        "attnlab.core.neighbours._same", lambda ids, a, rank: jnp.ones((1, 1, 1), bool)
    )
    leaking = documents(x, terms, ids)
    assert_close(leaking[:4], as_float64(packed[:4]), "float32")
    assert np.max(np.abs(leaking[4:] - packed[4:])) > 1e-2


def test_two_letters_that_meet_are_found_by_one_layer():
    """Which key has letter B right after letter A?  Two heads would have to agree; a kernel adds.

    Letters are orthogonal keys; queries ask for A, then for B.  The pair (query of B, key of B) is
    lifted by (query of A, key of A), one back in both.
    """
    letters = np.array([0, 2, 1, 2, 0, 1, 2, 1])  # A=0 B=1; B comes three times, after A once
    key = 4 * jnp.eye(3)[letters][:, None]
    query = 4 * jnp.eye(3)[jnp.asarray([0, 1])][:, None]
    value = jnp.eye(8)[:, None]
    kernel = jnp.zeros((1, 2, 3)).at[0, 1, 1].set(1.0).at[0, 0, 0].set(1.0)
    found = np.asarray(multi_token_attention(query, key, value, pre_kernel=kernel))[1, 0]
    assert int(np.argmax(found)) == 5 and found[5] > 0.99
    plain = np.asarray(attention(query, key, value))[1, 0]
    assert np.max(plain) < 0.34  # the Bs share alike


def test_mixes_are_sums_over_heads(rng):
    x = arrays(rng)
    mix = jnp.asarray([[0.0, 1.0], [1.0, 0.0]])
    swapped = multi_token_attention(*x, pre_mix=mix, post_mix=mix[None])
    plain = attention(*(y[:, ::-1] for y in x[:2]), x[2])
    crossed = attention(*x[:2], x[2])
    assert_close(swapped, as_float64(crossed), "float32")  # there and back
    once = multi_token_attention(*x, pre_mix=mix)
    assert_close(once, as_float64(plain), "float32")


def test_the_norm_and_the_gate_are_those_of_each_head(rng):
    module = MultiTokenAttention(HEADS, 8, depth=3, rngs=nnx.Rngs(0))
    out = jnp.asarray(rng.standard_normal((5, HEADS, 8)), jnp.float32)
    y = as_float64(out)
    y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-5) * (0.2 + 0.6 * np.exp(-0.9))
    y = y / (1 + np.exp(-(y @ as_float64(module.gate_weight[...]))))
    assert_close(module.finish(out, jnp.zeros((5, 16))), y, "float32")


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("sizes", [((3, 5), (2, 3)), ((3, 3), None), (None, (4, 1)), (None, None)])
@pytest.mark.parametrize("mask", [masks.Causal(), None])
def test_decoding_keeps_the_last_queries(mask, sizes, kv_heads, rng):
    """In pieces of any length; without a causal mask a piece reads what there is so far."""
    own = MultiTokenAttention(2, 8, pre=sizes[0], post=sizes[1], rngs=nnx.Rngs(0))
    for name in ("pre_kernel", "post_kernel"):
        kernel = getattr(own, name)
        if kernel is not None:
            kernel[...] = jnp.asarray(rng.standard_normal(kernel.shape), jnp.float32)
    layer = MultiHeadAttention(16, 2, num_kv_heads=kv_heads, mechanism=own, rngs=nnx.Rngs(1))
    x = jnp.asarray(rng.standard_normal((2, 12, 16)), jnp.float32)
    cache = layer.create_cache((2,), 12)
    for first, last in ((0, 1), (1, 5), (5, 6), (6, 7), (7, 12)):
        out, cache = layer(x[:, first:last], mask=mask, cache=cache)
        whole = layer(x[:, :last], mask=mask)
        assert_reordered(out, as_float64(whole[:, first:]), np.float32)


def test_queries_before_the_first_are_rows_like_others(rng):
    x, terms = arrays(rng), kernels(rng)
    whole = multi_token_attention(*x, **terms)
    part = multi_token_attention(x[0][6:], *x[1:], **terms, previous=x[0][2:6], query_offset=6)
    assert_reordered(part, as_float64(whole[6:]), np.float32)
    less = multi_token_attention(x[0][6:], *x[1:], **terms, previous=x[0][3:6], query_offset=6)
    assert np.max(np.abs(less[0] - whole[6])) > 1e-3  # four are needed: both kernels look back two
    absent = jnp.full_like(x[0][:4], 9.0)
    first = multi_token_attention(*x, **terms, previous=absent)
    assert_reordered(first, as_float64(whole), np.float32)


def test_bad_calls_are_refused(rng, as_users_run_it):
    x = arrays(rng)
    refused = [
        ({"pre_kernel": jnp.ones((HEADS, 3, 4))}, r"pre_kernel: .* odd .*\(2, 3, 4\)"),
        ({"post_kernel": jnp.ones((3, 3, 3))}, r"post_kernel: .* N = 2"),
        ({"pre_mix": jnp.ones((3, 3))}, r"pre_mix: expected shape \(2, 2\)"),
        ({"post_mix": jnp.ones((3, 3, 3))}, "post_mix: expected"),
        ({"mask": jnp.ones((LENGTH, LENGTH), bool)}, "mask: expected causality.*ArrayMask"),
        ({"previous": jnp.ones((2, 3, 8))}, r"previous: expected shape \(2, 2, 8\)"),
        ({"return_lse": True}, "return_lse: multi-token attention has its own"),
    ]
    for options, words in refused:
        with pytest.raises(ValueError, match=words):
            multi_token_attention(*x, **options)
    with pytest.raises(NotImplementedError, match='implementation="reference" has'):
        multi_token_attention(*x, implementation="blockwise")
    with pytest.raises(ValueError, match="pre: expected positive numbers, of keys an odd one"):
        MultiTokenAttention(2, 8, pre=(3, 4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"group: expected a divisor of num_heads=4, got 3"):
        MultiTokenAttention(4, 8, group=3, rngs=nnx.Rngs(0))
