"""NAtS-L: all blocks of one type give one mechanism; a needle is kept where it is routed to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks
from attnlab.core.gates import rms_unit
from attnlab.linear.gated_deltanet import gated_delta_rule_attention
from attnlab.linear.nats_linear import NATSLinear, nats_linear_attention, straight_through
from tests.tolerances import as_float64, assert_close, assert_reordered


def numbers(rng, length, heads=2, width=4):
    arrays = [
        jnp.asarray(rng.standard_normal((length, heads, width)), jnp.float32) for _ in range(3)
    ]
    return arrays, {
        "beta": jnp.asarray(rng.uniform(0, 1, (length, heads)), jnp.float32),
        "log_decay": jnp.asarray(-rng.uniform(0, 1, (length, heads)), jnp.float32),
    }


def typed(kept):
    """Types of blocks and heads from booleans "C N": True for the softmax."""
    kept = jnp.asarray(kept)
    return jnp.stack([kept, ~kept], -1).astype(jnp.float32)


@pytest.mark.parametrize("length", [16, 18])
def test_blocks_of_one_type_give_softmax_attention_or_the_delta_rule(length, rng):
    arrays, options = numbers(rng, length)
    query, key, value = arrays
    soft = attention(
        rms_unit(query, epsilon=1e-5), rms_unit(key, epsilon=1e-5), value, mask=masks.Causal()
    )
    delta = gated_delta_rule_attention(*arrays, **options)
    for kept, which, exact in ((True, 0, soft), (False, 1, delta)):
        types = typed(np.full((-(-length // 4), 2), kept))
        outputs = nats_linear_attention(*arrays, **options, types=types, block=4)
        assert_reordered(outputs[which], exact, np.float32)
        assert np.max(np.abs(outputs[1 - which] - (soft, delta)[1 - which])[8:]) > 1e-2


def test_a_softmax_block_decays_the_state_and_does_not_write(rng):
    """One head of two keeps block 1 for the softmax: its state lacks the tokens, not the time."""
    arrays, options = numbers(rng, 16)
    kept = np.zeros((4, 2), bool)
    kept[1, 0] = True
    soft, linear = nats_linear_attention(*arrays, **options, types=typed(kept), block=4)
    beta = options["beta"].at[4:8, 0].set(0.0)
    without = gated_delta_rule_attention(*arrays, beta=beta, log_decay=options["log_decay"])
    assert_reordered(linear[8:], without[8:], np.float32)
    whole = gated_delta_rule_attention(*arrays, **options)
    assert_reordered(linear[:8], whole[:8], np.float32)  # its own block reads it
    assert_reordered(linear[:, 1], whole[:, 1], np.float32)
    seen = np.tri(16, dtype=bool)[None] & np.stack(
        [(np.arange(16) // 4 == np.arange(16)[:, None] // 4) | (kept[:, n].repeat(4))
         for n in range(2)]
    )  # fmt: skip
    normed = [rms_unit(x, epsilon=1e-5) for x in arrays[:2]]
    exact = attention(*normed, arrays[2], mask=masks.ArrayMask(jnp.asarray(seen)))
    assert_reordered(soft, exact, np.float32)


def test_a_needle_in_a_softmax_block_is_found_where_a_state_has_lost_it(rng):
    length, width = 128, 8
    (_, key, value), options = numbers(rng, length, 1, width)
    key = key.at[5].set(0.0).at[5, 0, 0].set(1.0)
    query = key.at[-1].set(20.0 * key[5])
    kept = np.arange(length // 8)[:, None] == 0
    soft, linear = nats_linear_attention(
        query, 3 * key, value, **options | {"log_decay": -0.05 * options["beta"]},
        types=typed(kept), block=8, gains=(jnp.full((width,), 25.0), jnp.ones((width,))),
    )  # fmt: skip
    _, saturated = nats_linear_attention(
        query, 3 * key, value, **options | {"log_decay": -0.05 * options["beta"]},
        types=typed(np.zeros_like(kept)), block=8,
    )  # fmt: skip
    needle = as_float64(value)[5, 0]
    assert np.max(np.abs(as_float64(soft)[-1, 0] - needle)) < 0.05
    for state in (linear, saturated):
        assert np.max(np.abs(as_float64(state)[-1, 0] * width**0.5 - needle)) > 0.3


def test_types_are_hard_and_their_gradient_soft(rng):
    score = jnp.asarray(rng.standard_normal((5, 2)), jnp.float32)
    read = jnp.asarray(rng.standard_normal((5, 2)), jnp.float32)
    hard = straight_through(score)
    np.testing.assert_array_equal(hard, np.eye(2)[np.argmax(score, -1)])
    slopes = (
        jax.grad(lambda s, f=f: jnp.sum(f(s) * read))(score)
        for f in (straight_through, jax.nn.softmax)
    )
    assert_reordered(*slopes, np.float32)
    np.testing.assert_array_equal(straight_through(jnp.zeros((1, 2))), [[1.0, 0.0]])


def test_types_have_the_slope_of_a_factor_on_chosen_blocks(rng):
    """On weights of the softmax, and on writes into the state, both from later blocks alone."""
    arrays, options = numbers(rng, 12)
    kept = np.array([[True, False], [False, True], [True, True]])
    read = [jnp.asarray(rng.standard_normal(arrays[2].shape), jnp.float32) for _ in range(2)]

    def loss(types):
        outputs = nats_linear_attention(*arrays, **options, types=types, block=4)
        return sum(jnp.sum(o * r) for o, r in zip(outputs, read, strict=True))

    slope = as_float64(jax.grad(loss)(typed(kept)))
    assert not np.any(slope[-1])  # no later block
    assert not np.any(slope[..., 0][~kept])  # what was not chosen has none
    assert np.all(slope[..., 0][:-1][kept[:-1]] != 0)
    assert np.all(slope[..., 1][:-1][~kept[:-1]] != 0)
    query, key, value = (as_float64(x) for x in arrays)
    query, key = (x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) for x in (query, key))

    def softmax(factor):  # of head 0, block 0
        total = 0.0
        for t in range(4, 12):
            own = np.arange(12) // 4 == t // 4
            weight = np.exp(key[:, 0] @ query[t, 0] / 2) * (own | kept[:, 0].repeat(4))
            weight = weight * np.where(np.arange(12) < 4, factor, 1.0) * (np.arange(12) <= t)
            total += np.sum(weight @ value[:, 0] / weight.sum() * as_float64(read[0])[t, 0])
        return total

    difference = (softmax(1 + 1e-5) - softmax(1 - 1e-5)) / 2e-5
    assert_close(slope[0, 0, 0], difference, np.float32, "gradient")


def test_the_router_of_a_layer_learns_where_a_later_block_reads(rng):
    mechanism = NATSLinear(16, 2, 8, 8, block=4, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(16, 2, mechanism=mechanism, rngs=nnx.Rngs(1))
    x = jnp.asarray(rng.standard_normal((2, 11, 16)), jnp.float32)

    def loss(layer, x):
        return jnp.sum(jnp.cos(layer(x)))

    slope = nnx.jit(nnx.grad(loss))
    later = slope(layer, x)["mechanism"]["router"]["weight"][...]
    assert np.max(np.abs(later)) > 1e-6
    alone = slope(layer, x[:, :4])["mechanism"]["router"]["weight"][...]
    assert not np.any(alone)


def test_the_router_does_not_look_ahead(rng):
    """A block's average holds its last tokens; only later blocks may know of them."""
    mechanism = NATSLinear(16, 2, 8, 8, block=4, rngs=nnx.Rngs(0))
    layer = nnx.jit(MultiHeadAttention(16, 2, mechanism=mechanism, rngs=nnx.Rngs(1)))
    x = jnp.asarray(rng.standard_normal((12, 16)), jnp.float32)
    out = layer(x)
    for t in (2, 6, 10):
        np.testing.assert_array_equal(layer(x.at[t + 1 :].multiply(-9.0))[: t + 1], out[: t + 1])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"types": jnp.ones((1, 2, 2))}, ValueError, r"types.*\(2, 2, 2\).*\(1, 2, 2\)"),
        ({"return_state": True}, ValueError, "return_state"),
        ({"mask": masks.SlidingWindow(1, 0)}, NotImplementedError, r"attnlab\.attention"),
    ],
)
def test_bad_input_is_refused_by_name(options, error, words, rng, as_users_run_it):
    arrays, given = numbers(rng, 5)
    given["types"] = typed(np.ones((2, 2), bool))
    with pytest.raises(error, match=words):
        nats_linear_attention(*arrays, **given | options, block=4)
    with pytest.raises(ValueError, match="key: length 5 differs"):
        nats_linear_attention(arrays[0][:1], *arrays[1:], **given, block=4)
    with pytest.raises(ValueError, match="block"):
        NATSLinear(8, 2, 4, 4, block=0, rngs=nnx.Rngs(0))
