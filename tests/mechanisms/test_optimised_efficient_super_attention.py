"""Optimised, efficient and super attention: exact counts, what equals what, causality of A."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks
from attnlab.heads.optimised_efficient_super_attention import (
    VARIANTS,
    SlicedAttention,
    super_attention,
)
from tests import oracles
from tests.contract.heads_low_rank_formulas import mixed_values
from tests.core import draw
from tests.tolerances import as_float64, assert_close, assert_reordered

F, L = 32, 12
SIZE = draw.Sizes((2,), 10, 10, 4, 2, 8, 6)
INPUTS = tuple(map(jnp.asarray, draw.inputs(SIZE, 0)))
MIXING = np.random.default_rng(4).standard_normal((L, L)).astype(np.float32)


def layer(variant=None, heads=4, seed=0, **options):
    mechanism = None
    if variant is not None:
        mechanism = SlicedAttention(variant, max_length=L if variant == "super" else None)
        if variant == "super":
            mechanism.mixing[...] = jnp.asarray(MIXING)
    return MultiHeadAttention(F, heads, mechanism=mechanism, rngs=nnx.Rngs(seed), **options)


def inputs(rng, length=10):
    return jnp.asarray(rng.standard_normal((2, length, F)), jnp.float32)


def count(module):
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize("heads", [1, 4])
def test_a_layer_holds_exactly_what_the_paper_counts(heads):
    counts = [count(layer(variant, heads)) for variant in (None, *VARIANTS)]
    assert counts == [4 * F**2, 3 * F**2, 2 * F**2, 2 * F**2 + L**2]
    assert counts[3] < counts[1]  # as L < F


def test_with_one_head_two_products_of_matrices_are_one_matrix_each(rng):
    """W^V W^O and W^Q W^K^T: the lean layers are then standard attention, multiplied out."""
    x, standard = inputs(rng), layer(heads=1)
    q, k, v, o = (
        getattr(standard, n).kernel[...] for n in ("query", "key", "value", "out")
    )  # fmt: skip
    optimised, efficient = layer("optimised", 1), layer("efficient", 1)
    optimised.query.kernel[...], optimised.key.kernel[...] = q, k
    optimised.out.kernel[...] = efficient.out.kernel[...] = v @ o
    efficient.query.kernel[...] = q @ k.T
    expected = as_float64(standard(x))
    for lean in (optimised, efficient):
        np.testing.assert_allclose(as_float64(lean(x)), expected, atol=1e-5)


def test_with_several_heads_no_last_projection_makes_up_for_the_values(rng):
    """What heads read in slices does not span what they read through W^V, the weights the same."""
    x, standard, optimised = inputs(rng, 12), layer(), layer("optimised", seed=0)
    for name in ("query", "key"):
        getattr(optimised, name).kernel[...] = getattr(standard, name).kernel[...]
    optimised.out.kernel[...] = jnp.eye(F)
    x = jnp.concatenate([x, inputs(rng, 12) * 2, inputs(rng, 12)], axis=0)
    read, wanted = (as_float64(run(x)).reshape(-1, F) for run in (optimised, standard))
    best, *_ = np.linalg.lstsq(read, wanted, rcond=None)
    assert len(read) > 2 * F
    assert np.linalg.norm(read @ best - wanted) > 0.1 * np.linalg.norm(wanted)


def test_super_attention_that_mixes_nothing_is_efficient_attention(rng):
    x, efficient, mixing = inputs(rng), layer("efficient"), layer("super")
    for name in ("query", "out"):
        getattr(mixing, name).kernel[...] = getattr(efficient, name).kernel[...]
    assert np.max(np.abs(mixing(x) - efficient(x))) > 0.1
    mixing.mechanism.mixing[...] = jnp.eye(L)
    assert_reordered(mixing(x), as_float64(efficient(x)), np.float32)


@pytest.mark.parametrize("packed", [False, True])
def test_under_a_causal_mask_the_lower_triangle_mixes(packed):
    query, key, value = map(as_float64, INPUTS)
    ids = np.array([[0] * 4 + [1] * 6, [0] * 9 + [-1]]) if packed else np.zeros((2, 10), int)
    seen = (ids[:, :, None] == ids[:, None]) & (ids[:, None] >= 0)
    mask = oracles.both(oracles.causal(), oracles.segments(ids))
    mixed = mixed_values(MIXING, value, seen, lambda x: x, causal=True)
    exact = oracles.attention(query, key, mixed, mask=mask)
    ours = masks.Causal() & masks.Segments(jnp.asarray(ids)) if packed else masks.Causal()
    assert_close(super_attention(*INPUTS, mixing=jnp.asarray(MIXING), mask=ours), exact, np.float32)


def test_nothing_later_has_influence_nor_has_what_lies_above_the_diagonal():
    def run(mixing, *arrays):
        return super_attention(*arrays, mixing=mixing, mask=masks.Causal())

    out, pull = jax.vjp(run, jnp.asarray(MIXING), *INPUTS)
    for row in (0, 6):
        slopes = pull(jnp.zeros_like(out).at[:, row].set(1))
        for gradient in map(np.asarray, slopes[1:]):
            assert np.all(gradient[:, row + 1 :] == 0)
        assert np.all(np.asarray(slopes[3])[:, row] != 0)
    above = np.asarray(pull(jnp.ones_like(out))[0])
    assert np.all(np.triu(above, 1) == 0)
    assert np.all((np.tril(above) != 0) == (np.tri(L) * (np.arange(L) < 10)[:, None] > 0))


def test_rows_belong_to_positions_within_a_document(rng):
    ids = jnp.asarray([[3] * 4 + [-1] * 2 + [5] * 4] * 2)
    x, module = inputs(rng), layer("super")
    packed = module(x, mask=masks.Segments(ids))
    for first in (0, 6):
        alone = module(x[:, first : first + 4])
        assert_reordered(packed[:, first : first + 4], as_float64(alone), np.float32)


def test_keys_that_begin_later_use_later_rows():
    query, key, value = (x[:, 3:] for x in INPUTS)
    moved = super_attention(query, key, value, mixing=jnp.asarray(MIXING), key_offset=2)
    inner = super_attention(query, key, value, mixing=jnp.asarray(MIXING[2:9, 2:9]))
    assert_reordered(moved, as_float64(inner), np.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_decodes_what_it_reads_at_once(rng, variant):
    module, x = layer(variant), inputs(rng)
    whole, cache = module(x, mask=masks.Causal()), module.create_cache((2,), L)
    for first, last in ((0, 4), (4, 5), (5, 6), (6, 10)):
        out, cache = module(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, as_float64(whole)[:, first:last], np.float32)


def test_efficient_attention_reads_slices_of_a_context(rng):
    module, x, context = layer("efficient"), inputs(rng, 3), inputs(rng)
    module.out.kernel[...] = jnp.eye(F)
    heads = context.reshape(2, 10, 4, 8)
    plain = attention(module.query(x).reshape(2, 3, 4, 8), heads, heads)
    assert_reordered(module(x, context), as_float64(plain).reshape(2, 3, F), np.float32)


@pytest.mark.parametrize("variant", ["best", None])
def test_another_variant_is_refused(variant, as_users_run_it):
    with pytest.raises(ValueError, match=r"variant.*super"):
        SlicedAttention(variant)


def test_what_does_not_fit_is_refused_by_name(as_users_run_it):
    for variant, length in (("super", None), ("super", 0), ("efficient", 5)):
        with pytest.raises(ValueError, match=r"max_length"):
            SlicedAttention(variant, max_length=length)
    with pytest.raises(ValueError, match=r"key.*32.*got 16"):
        layer("efficient", num_kv_heads=2)
    with pytest.raises(ValueError, match=r"mixing.*10 tokens.*\(9, 9\)"):
        super_attention(*INPUTS, mixing=jnp.eye(9))
    with pytest.raises(ValueError, match=r"mixing.*14 tokens"):
        super_attention(*INPUTS, mixing=jnp.eye(12), key_offset=4)
    pairs = jnp.ones((10, 10), bool)
    with pytest.raises(NotImplementedError, match=r"mask.*attnlab\.attention"):
        super_attention(*INPUTS, mixing=jnp.eye(12), mask=pairs)
