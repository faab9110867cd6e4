"""Multiple head embeddings: what they cost, what folds, and what cannot."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks, normalizers, scores
from attnlab.core.rotary import rotate
from attnlab.heads.attention_head_embeddings import (
    MHE,
    OPERATIONS,
    InputCounts,
    embed_heads,
    head_embedding_attention,
)
from tests.tolerances import as_float64, assert_reordered

HEADS, WIDTH = 4, 8


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def shared(rng, length=9, kv_heads=1):
    """One query head, and keys and values of one or more."""
    return (
        drawn(rng, 2, length, 1, WIDTH),
        drawn(rng, 2, length, kv_heads, WIDTH),
        drawn(rng, 2, length, kv_heads, 6),
    )


def embeddings(rng):
    names = (("query", WIDTH), ("key", WIDTH), ("value", 6))
    return {f"{name}_embedding": drawn(rng, HEADS, width) for name, width in names}


def written_out(arrays, own, operation, **options):
    """Attention of heads that share nothing."""
    made = (
        embed_heads(x, own[f"{name}_embedding"], operation)
        for name, x in zip(("query", "key", "value"), arrays, strict=True)
    )
    return attention(*made, **options)


def count(module):
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))


def layer(mechanism, heads=HEADS, width=WIDTH, **options):
    return MultiHeadAttention(
        heads * width, heads, mechanism=mechanism, **options, rngs=nnx.Rngs(1)
    )


# ---- what it costs -------------------------------------------------------------------------------


def test_the_papers_counts():
    """Twelve heads of 64; the abstract's number for multi-head attention counts from MHE."""
    counts = InputCounts(12, 64)
    assert counts.embedded - counts.shared == 2_304 == 3 * 12 * 64
    assert counts.multi_head - counts.shared == 1_622_016 == (3 * 12**2 - 3 * 12) * 64**2
    assert counts.multi_head - counts.embedded == 1_619_712


@pytest.mark.parametrize(("heads", "width"), [(4, 8), (3, 5), (1, 2)])
def test_layers_have_the_parameters_that_were_counted(heads, width):
    counts, output = InputCounts(heads, width), (heads * width) ** 2
    mechanism = MHE(heads, width, rngs=nnx.Rngs(0))
    assert count(layer(mechanism, heads, width)) == counts.embedded + output
    assert count(layer(None, heads, width)) == counts.multi_head + output


def test_a_cache_keeps_the_keys_and_values_of_one_head():
    module = layer(MHE(HEADS, WIDTH, rngs=nnx.Rngs(0)))
    cache = module.create_cache((), 10)
    assert cache.key.size + cache.value.size == 10 * 2 * WIDTH


# ---- what heads are ------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
def test_embeddings_of_zero_make_heads_equal_and_others_tell_them_apart(rng, operation):
    arrays, own = shared(rng), embeddings(rng)
    nothing = jax.tree.map(jnp.zeros_like, own)
    same = as_float64(head_embedding_attention(*arrays, operation=operation, **nothing))
    np.testing.assert_array_equal(same, np.repeat(same[..., :1, :], HEADS, axis=-2))
    out = as_float64(head_embedding_attention(*arrays, operation=operation, **own))
    apart = np.abs(out[..., :, None, :] - out[..., None, :, :]).max(axis=(0, 1, -1))
    assert np.all(apart[~np.eye(HEADS, dtype=bool)] > 1e-2)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": masks.Causal(), "return_lse": True},
        {"mask": masks.KeyPadding(jnp.asarray([0, 5])), "return_lse": True, "scale": 0.7},
        {"mask": masks.KeyPadding(jnp.asarray([0, 5]))},
        {"return_lse": True, "modifiers": scores.AlibiSlopes(jnp.asarray([0.1, 0.2, 0.3, 0.4]))},
        {"modifiers": scores.SoftCap(jnp.asarray(1.0)), "return_lse": True},
        {"normalizer": normalizers.Sigmoid()},
        {"normalizer": normalizers.Softmax(sink=jnp.asarray([0.1, 0.2, 0.3, 0.4]))},
        {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_shared_keys_and_values_give_what_keys_and_values_of_each_head_give(
    rng, operation, kv_heads, options
):
    arrays, own = shared(rng, kv_heads=kv_heads), embeddings(rng)
    found = head_embedding_attention(*arrays, operation=operation, **own, **options)
    heads = jnp.repeat(arrays[0], HEADS, axis=-2), *arrays[1:]
    expected = written_out(heads, own, operation, **options)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        blind = np.isneginf(theirs)  # the log-sum-exp of what sees nothing
        np.testing.assert_array_equal(np.isneginf(ours), blind)
        ours, theirs = (np.where(blind, 0, as_float64(x)) for x in (ours, theirs))
        assert_reordered(ours, theirs, np.float32)


def sizes(function, *arrays):
    """The shapes of everything that is computed."""
    text = str(jax.make_jaxpr(function)(*arrays))
    return [set(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_key_or_value_is_written_out_for_every_head(rng, operation):
    query, key, value = shared(rng, length=7)
    arrays, own = (query[:, :5], key, value), embeddings(rng)

    def run(*arrays):
        return head_embedding_attention(
            *arrays, operation=operation, implementation="reference", **own
        )

    def written(*arrays):
        return written_out(arrays, own, operation, implementation="reference")

    key_of_all, value_of_all = {2, 7, HEADS, WIDTH}, {2, 7, HEADS, 6}
    assert key_of_all in sizes(written, *arrays) and value_of_all in sizes(written, *arrays)
    assert key_of_all not in sizes(run, *arrays) and value_of_all not in sizes(run, *arrays)


def test_an_added_key_embedding_does_nothing_and_is_not_trained(rng):
    arrays, own = shared(rng), embeddings(rng)

    def loss(key_embedding, **options):
        moved = own | {"key_embedding": key_embedding}
        return jnp.sum(
            jnp.sin(head_embedding_attention(*arrays, operation="add", **moved, **options))
        )

    assert np.all(np.asarray(jax.grad(loss)(own["key_embedding"])) == 0)
    assert loss(own["key_embedding"]) == loss(10 * own["key_embedding"])
    capped = {"modifiers": scores.SoftCap(jnp.asarray(1.0))}
    assert np.any(np.asarray(jax.grad(loss)(own["key_embedding"], **capped)) != 0)

    def written(key_embedding):
        moved = own | {"key_embedding": key_embedding}
        heads = jnp.repeat(arrays[0], HEADS, axis=-2), *arrays[1:]
        return jnp.sum(jnp.sin(written_out(heads, moved, "add")))

    assert np.max(np.abs(np.asarray(jax.grad(written)(own["key_embedding"])))) < 1e-4


def test_an_added_key_embedding_that_is_rotated_does_something(rng):
    """Then it is a bias of positions: heads are written out before they are turned."""
    (query, key, value), own = shared(rng), embeddings(rng)
    query = embed_heads(query, own["query_embedding"], "add")
    outs = []
    for factor in (0.0, 1.0):
        keys = embed_heads(key, factor * own["key_embedding"], "add")
        values = embed_heads(value, own["value_embedding"], "add")
        outs.append(as_float64(attention(rotate(query), rotate(keys), values)))
    assert np.max(np.abs(outs[1] - outs[0])) > 0.1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_query_that_sees_nothing_reads_nothing(rng, operation):
    arrays, own = shared(rng), embeddings(rng)
    mask = masks.QueryPadding(jnp.asarray([3, 9]))
    out = head_embedding_attention(*arrays, operation=operation, mask=mask, **own)
    assert np.all(np.asarray(out)[0, 3:] == 0) and np.all(np.asarray(out)[0, :3] != 0)


# ---- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_layer_decodes_what_it_reads_at_once(rng, operation):
    mechanism = MHE(HEADS, WIDTH, operation=operation, deviation=1.0, rngs=nnx.Rngs(0))
    module, x = layer(mechanism), drawn(rng, 2, 9, HEADS * WIDTH)
    whole, cache = module(x, mask=masks.Causal()), module.create_cache((2,), 9)
    for first, last in ((0, 4), (4, 5), (5, 9)):
        out, cache = module(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, as_float64(whole[:, first:last]), np.float32)


def test_the_layer_is_the_formula(rng):
    """One head of each projection, and the rows of W^O."""
    mechanism = MHE(HEADS, WIDTH, deviation=0.5, rngs=nnx.Rngs(0))
    module, x = layer(mechanism), drawn(rng, 9, HEADS * WIDTH)
    plain = [as_float64(x) @ as_float64(w.kernel[...]) for w in (module.query, module.key)]
    value, total = as_float64(x) @ as_float64(module.value.kernel[...]), 0.0
    own = [
        1 + as_float64(getattr(mechanism, f"{name}_embedding")[...])
        for name in ("query", "key", "value")
    ]
    rows = as_float64(module.out.kernel[...]).reshape(HEADS, WIDTH, -1)
    for n in range(HEADS):
        weights = np.exp((plain[0] * own[0][n]) @ (plain[1] * own[1][n]).T / np.sqrt(WIDTH))
        weights /= weights.sum(-1, keepdims=True)
        total = total + weights @ (value * own[2][n]) @ rows[n]
    np.testing.assert_allclose(as_float64(module(x)), total, rtol=1e-4, atol=1e-5)


# ---- bad input -----------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name(rng, as_users_run_it):
    arrays, own = shared(rng), embeddings(rng)

    def run(arrays=arrays, **changed):
        return head_embedding_attention(*arrays, **own | changed)

    with pytest.raises(ValueError, match=r"operation.*'multiply'.*'power'"):
        run(operation="power")
    for name in own:
        with pytest.raises(ValueError, match=rf"{name}.*\(4, \d\).*\(4, 3\)"):
            run(**{name: jnp.ones((4, 3))})
    with pytest.raises(ValueError, match=r"query_embedding.*2 heads"):
        run(arrays=(jnp.repeat(arrays[0], 2, axis=-2), *arrays[1:]))
    with pytest.raises(ValueError, match="query"):
        run(arrays=(arrays[0], *(jnp.repeat(x, 3, axis=-2) for x in arrays[1:])))
    with pytest.raises(ValueError, match=r"embedding.*multiple of 3"):
        embed_heads(jnp.ones((5, 3, 8)), jnp.ones((4, 8)))
    with pytest.raises(ValueError, match=r"operation.*'power'"):
        MHE(4, 8, operation="power", rngs=nnx.Rngs(0))
    for sizes in ((0, 8), (4, 0)):
        with pytest.raises(ValueError, match="num_heads"):
            MHE(*sizes, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_heads"):
        InputCounts(0, 4)
