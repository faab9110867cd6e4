"""CoPE: what gates of one and vectors of zero make of it, and that it counts by content."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import attention, masks, scores
from attnlab.core.terms import Tile
from attnlab.positional.cope import ContextualPosition, CoPE, cope_attention, positions
from tests import oracles
from tests.core import draw
from tests.tolerances import as_float64, assert_close, assert_reordered

SIZE = draw.Sizes((2,), 11, 11, 4, 2, 8, 3)
INPUTS = tuple(map(jnp.asarray, draw.inputs(SIZE, 0)))


def vectors(rng, count=6):
    return jnp.asarray(rng.standard_normal((count, 8)), jnp.float32)


def test_open_gates_count_tokens_a_relative_bias(rng):
    """With every gate 1 the position is the distance plus one, up to the last."""
    query, key, value = INPUTS
    table = vectors(rng)
    query = jnp.concatenate([query[..., :7], jnp.ones_like(query[..., :1])], -1)
    gate_key = jnp.zeros_like(key).at[..., 7].set(200.0)
    ours = cope_attention(query, key, value, table=table, gate_key=gate_key, mask=masks.Causal())
    distance = np.arange(11)[:, None] - np.arange(11)[None, :]
    place = np.clip(distance + 1, 0, 5)
    near = np.einsum("btnh,ph->bntp", as_float64(query), as_float64(table))
    bias = np.take_along_axis(near, np.broadcast_to(place, (2, 4, 11, 11)), -1)
    relative = attention(
        query,
        key,
        value,
        mask=masks.Causal(),
        modifiers=scores.Bias(jnp.asarray(bias, jnp.float32)),
    )
    assert_close(ours, as_float64(relative), np.float32)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mask", [None, masks.Causal()], ids=["both ways", "causal"])
def test_the_interpolated_product_is_the_product_with_an_interpolated_vector(rng, scaled, mask):
    query, key, value = (as_float64(x) for x in INPUTS)
    table = as_float64(vectors(rng, 5))
    key = np.repeat(key, 2, axis=-2)
    score = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8)
    seen = np.tri(11, dtype=bool) if mask is not None else np.ones((11, 11), bool)
    gates = np.where(seen, 1 / (1 + np.exp(-score)), 0)
    place = np.minimum(np.cumsum(gates[..., ::-1], -1)[..., ::-1], 4)
    low = np.minimum(np.floor(place).astype(int), 3)
    share = (place - low)[..., None]
    vector = (1 - share) * table[low] + share * table[low + 1]
    added = np.einsum("btnh,bntsh->bnts", query, vector) / (np.sqrt(8) if scaled else 1)
    weights, _ = oracles.softmax()(score + added, seen, np.asarray)
    exact = np.einsum("bnts,bsnd->btnd", weights, np.repeat(value, 2, axis=-2))
    ours = cope_attention(
        *INPUTS, table=jnp.asarray(table, jnp.float32), scale_positions=scaled, mask=mask
    )
    assert_close(ours, exact, np.float32)


def test_positions_fall_from_key_to_key_and_stay_within_the_table(rng):
    logits = jnp.asarray(3 * rng.standard_normal((4, 20)), jnp.float32)
    allowed = jnp.asarray(rng.random((4, 20)) < 0.8)
    place = np.asarray(positions(logits, allowed, 5))
    assert np.all(np.diff(place, axis=-1) <= 0)
    assert place.min() >= 0
    assert place.max() == 4


def test_vectors_of_zero_are_attention_without_positions():
    ours = CoPE(8)(*INPUTS, mask=masks.Causal())
    assert_reordered(ours, as_float64(attention(*INPUTS, mask=masks.Causal())), np.float32)


def test_a_whole_number_has_the_slope_of_what_follows(rng):
    """Between floor and ceil it would have none: gates of a half are at 2, 1.5, 1 and 0.5."""
    z = jnp.asarray(rng.standard_normal((1, 1, 6)), jnp.float32)
    at = Tile(0, 0, 1, 4, 1, 3).at()

    def added(shift):
        score = jnp.zeros((1, 1, 4)) + shift
        seen = jnp.ones((1, 1, 4), bool)
        return jnp.sum(ContextualPosition(z).rows(score, at, seen) - score)

    step = np.diff(as_float64(z)[0, 0])
    exact = 1.0 * step[2] + 0.75 * step[1] + 0.5 * step[1] + 0.25 * step[0]
    assert_close(jax.grad(added)(jnp.zeros(())), exact, np.float32, "gradient")


def test_a_head_finds_the_third_last_of_its_kind_wherever_it_is():
    """By hand: gates open at markers, and the position three is the one that is wanted."""
    rng = np.random.default_rng(0)
    table = np.stack([np.zeros(8), -400.0 * np.abs(np.arange(8) - 3.0)], axis=-1)
    for _ in range(20):
        marked = np.sort(rng.choice(20, 6, replace=False))
        value, key = rng.standard_normal((20, 1, 1)), np.zeros((20, 1, 2))
        key[:, 0, 0] = np.where(np.isin(np.arange(20), marked), 1.0, -1.0)
        arrays = (jnp.asarray(x, jnp.float32) for x in ([[[40.0, 1.0]]], key, value))
        out = cope_attention(*arrays, table=jnp.asarray(table, jnp.float32))
        assert_close(out[0], value[marked[-3]], np.float32)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"table": jnp.ones((1, 8))}, ValueError, r"table.*P >= 2.*\(1, 8\)"),
        ({"table": jnp.ones((6, 7))}, ValueError, r"table.*\(6, 8\).*\(6, 7\)"),
        ({"table": jnp.ones((6, 8), jnp.int32)}, TypeError, "table.*int32"),
        ({"table": jnp.ones((6, 8)), "gate_key": INPUTS[0]}, ValueError, r"gate_key.*\(2, 11, 2"),
        ({"table": jnp.ones((6, 8)), "implementation": "xla"}, NotImplementedError, "blockwise"),
    ],
)
def test_bad_input_is_refused_by_name(options, error, words, as_users_run_it):
    with pytest.raises(error, match=words):
        cope_attention(*INPUTS, **options)


def test_a_table_of_one_position_is_refused():
    with pytest.raises(ValueError, match=r"num_positions.*1"):
        CoPE(8, 1)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_gate_keys_behind_a_mask_may_hold_anything(rng, implementation):
    query, key, value = INPUTS
    gate_key = jnp.asarray(rng.standard_normal(key.shape), jnp.float32)
    seen = masks.KeyPadding(jnp.asarray([7, 7]))

    def run(gate_key):
        return cope_attention(
            query, key, value, table=vectors(np.random.default_rng(1)), gate_key=gate_key,
            mask=seen, implementation=implementation,
        )  # fmt: skip

    bad = gate_key.at[:, 7:].set(jnp.nan)
    np.testing.assert_array_equal(run(bad), run(gate_key))
    slope = jax.grad(lambda q: jnp.sum(cope_attention(
        q, key, value, table=vectors(np.random.default_rng(1)), gate_key=bad, mask=seen,
        implementation=implementation)))(query)  # fmt: skip
    assert np.all(np.isfinite(slope))


def test_the_layer_holds_one_table_for_all_heads():
    assert {x.shape for x in jax.tree.leaves(nnx.state(CoPE(8), nnx.Param))} == {(64, 8)}
