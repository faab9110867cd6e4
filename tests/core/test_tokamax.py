"""tokamax behind the front door: our answer, or a refusal in words.

Every test runs against a stand-in, a few lines of what tokamax's documentation says it computes
(a mean for rows without a key, NaN for everybody), and against tokamax itself where it is there.
"""

import functools
import importlib.machinery
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, masks, scores
from attnlab.core import tokamax as subject
from tests import oracles
from tests.core import cases, draw, test_derivatives
from tests.core.tokamax_cases import ALLOWED, BANDS, MASKS, SIZE, StandIn
from tests.tolerances import as_float64, assert_close


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in where Python looks for tokamax."""
    return StandIn.put_in_place(monkeypatch)


@pytest.fixture(params=["stand-in", "tokamax"])
def library(request):
    """Both in turn; users' promotion rules, because tokamax relies on them when it is lowered."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
    elif importlib.util.find_spec("tokamax") is None:
        pytest.skip("tokamax is not installed: pip install attnlab[tokamax]")
    with jax.numpy_dtype_promotion("standard"):
        yield request.param


ours = functools.partial(attention, implementation="tokamax")


def check(size, options, oracle, dtype=jnp.float32, seed=0, **common):
    arrays = [jnp.asarray(x).astype(dtype) for x in draw.inputs(size, seed)]
    got = jax.jit(lambda arrays: ours(*arrays, **options, **common))(arrays)
    exact = oracles.attention(*map(as_float64, arrays), **oracle, **common)
    assert got.dtype == dtype
    assert_close(got, exact, dtype)
    if "mask" in oracle:
        i = common.get("query_offset", 0) + np.arange(size.queries)[:, None]
        j = common.get("key_offset", 0) + np.arange(size.keys)[None, :]
        shape = (*size.batch, size.heads, size.queries, size.keys)
        blind = ~np.broadcast_to(oracle["mask"](i, j), shape).any(-1)
        np.testing.assert_array_equal(np.swapaxes(as_float64(got), -2, -3)[blind], 0.0)


# ---- what it answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [(0, 0), (6, 0), (3, 9), (40, 0)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_equals_the_formula(library, name, offsets):
    mask, oracle = MASKS[name]
    offsets = {"query_offset": offsets[0], "key_offset": offsets[1]}
    check(SIZE, {"mask": mask}, {"mask": oracle}, **offsets)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [*draw.SIZES, draw.Sizes((), 70, 70, 8, 1, 16, 16)], ids=str)
def test_shapes_batches_grouped_heads_and_dtypes(library, size, dtype):
    check(size, {"mask": masks.Causal()}, {"mask": oracles.causal()}, dtype)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_scale_modifiers_and_cap(library, scale):
    slopes, bias = oracles.alibi_slopes(4), np.random.default_rng(0).standard_normal((4, 13, 1))
    added = (
        scores.AlibiSlopes(jnp.asarray(slopes, jnp.float32)),
        scores.Bias(jnp.asarray(bias, jnp.float32)),
    )
    expected = [oracles.alibi(slopes), oracles.bias(bias)]
    for mask in ("none", "causal", "array", "padding"):
        ours_, theirs = MASKS[mask]
        check(
            SIZE,
            {"mask": ours_, "modifiers": added},
            {"mask": theirs, "modifiers": expected},
            scale=scale,
        )
        check(
            SIZE,
            {"mask": ours_, "modifiers": (*added, scores.SoftCap(1.5))},
            {"mask": theirs, "modifiers": [*expected, oracles.soft_cap(1.5)]},
            scale=scale,
        )


def test_a_bias_of_minus_infinity_masks(library):
    bias = np.where(ALLOWED, 0.5, -np.inf).astype(np.float32)
    check(SIZE, {"modifiers": scores.Bias(jnp.asarray(bias))}, {"mask": oracles.array(ALLOWED)})
    query, key, value = map(jnp.asarray, draw.inputs(SIZE, 0))
    capped = (scores.Bias(jnp.asarray(bias)), scores.SoftCap(2.0))
    expected = attention(query, key, value, modifiers=capped, implementation="reference")
    assert_close(ours(query, key, value, modifiers=capped), as_float64(expected), np.float32)


SERVED = ("plain", "causal with bias", "bias shared by heads and queries",
          "slopes in a window", "table with padding")  # fmt: skip


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.name in SERVED], ids=str)
def test_gradients_to_inputs_and_parameters(library, case):
    assert len([c for c in cases.CASES if c.name in SERVED]) == len(SERVED)
    case = cases.dataclasses.replace(case, lse=False)
    flat, read, read_lse = test_derivatives.setting(case)
    loss = test_derivatives.our_loss(case, "tokamax", read, read_lse)
    oracle = test_derivatives.oracle_loss(case, read, read_lse)
    slope = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(flat)))))
    value, gradient = slope(*map(jnp.asarray, flat))
    exact = tuple(as_float64(x) for x in flat)
    assert_close(value, oracle(*exact), np.float32, "gradient")
    assert [(g.shape, g.dtype) for g in gradient] == [(x.shape, x.dtype) for x in flat]
    for seed in (1, 2):
        direction = test_derivatives.directions(flat, seed)
        expected = oracles.directional(oracle, exact, direction)
        scale = test_derivatives.size(gradient, direction)
        found = test_derivatives.inner(gradient, direction)
        assert_close(found, expected, np.float32, "gradient", scale=scale)


@pytest.mark.parametrize("name", ["padding", "padded causal", "padded window", "array", "segments"])
def test_what_is_masked_has_no_influence_and_no_gradient(library, name, rng):
    mask, oracle = MASKS[name]
    i, j = np.arange(13)[:, None], np.arange(19)[None, :]
    seen = np.broadcast_to(oracle(i, j), (2, 4, 13, 19)).reshape(2, 2, 2 * 13, 19).any(-2)
    if seen.all():
        mask, seen = masks.as_mask(mask) & masks.Prefix(11), seen & (np.arange(19) < 11)
    hidden = np.swapaxes(~seen, -1, -2)[..., None]
    query, key, value = draw.inputs(SIZE, 0)

    def loss(query, key, value):
        out = ours(query, key, value, mask=mask)
        return jnp.sum(jnp.sin(out)), out

    slope = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

    def run(filler):
        arrays = (jnp.asarray(np.where(hidden, filler, x).astype(np.float32)) for x in (key, value))
        return slope(jnp.asarray(query), *arrays)

    gradient, out = run(rng.choice([np.nan, np.inf, -np.inf], hidden.shape))
    clean_gradient, clean = run(0.0)
    np.testing.assert_array_equal(out, clean)
    jax.tree.map(np.testing.assert_array_equal, gradient, clean_gradient)
    for found in gradient[1:]:
        np.testing.assert_array_equal(np.where(hidden, found, 0), 0)


@pytest.mark.parametrize("name", ["causal", "padding", "array"])
def test_masked_modifiers_may_hold_anything(library, name, rng):
    mask, oracle = MASKS[name]
    i, j = np.arange(13)[:, None], np.arange(19)[None, :]
    seen = np.broadcast_to(oracle(i, j), (2, 4, 13, 19))
    arrays = tuple(map(jnp.asarray, draw.inputs(SIZE, 0)))

    def loss(bias, arrays):
        return jnp.sum(jnp.sin(ours(*arrays, mask=mask, modifiers=scores.Bias(bias))))

    slope = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    bias = rng.standard_normal(seen.shape).astype(np.float32)
    clean = slope(jnp.asarray(np.where(seen, bias, 0)), arrays)
    poison = rng.choice([np.nan, np.inf, -np.inf], seen.shape).astype(np.float32)
    jax.tree.map(
        np.testing.assert_array_equal,
        slope(jnp.asarray(np.where(seen, bias, poison)), arrays),
        clean,
    )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("poison", ["query", "key", "value"])
def test_a_nan_reaches_those_who_see_it_and_no_one_else(library, name, poison):
    arrays = dict(zip(("query", "key", "value"), draw.inputs(SIZE, 0), strict=True))
    arrays[poison][1, 5, 1] = np.nan
    arrays = {k: jnp.asarray(v) for k, v in arrays.items()}
    mask = MASKS[name][0]
    out = np.isnan(ours(**arrays, mask=mask))
    expected = np.isnan(attention(**arrays, mask=mask, implementation="reference"))
    np.testing.assert_array_equal(out, expected)


def test_vmap_is_the_batch(library):
    query, key, value = map(jnp.asarray, draw.inputs(SIZE, 0))
    lengths = jnp.asarray([4, 19])

    def call(query, key, value, lengths):
        return ours(query, key, value, mask=masks.KeyPadding(lengths) & masks.Causal())

    mapped = jax.vmap(call)(query, key, value, lengths)
    assert_close(mapped, as_float64(call(query, key, value, lengths)), np.float32)


# ---- what is handed over -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
def test_a_band_is_not_written_out(stand_in, name):
    query, key, value = map(jnp.asarray, draw.inputs(draw.Sizes((2,), 13, 13, 4, 2, 4, 4), 0))
    if name in ("segments", "array"):
        pytest.skip("has other shapes")
    ours(query, key, value, mask=MASKS[name][0])
    (asked,) = stand_in.asked
    assert (asked["mask"] is None) == (name in BANDS)
    assert asked["implementation"] == ("xla_chunked",)


def test_on_a_tpu_only_causal_masks_are_not_written_out(stand_in, monkeypatch):
    monkeypatch.setattr(subject, "_platform", lambda: "tpu")
    query, key, value = map(jnp.asarray, draw.inputs(draw.Sizes((2,), 13, 13, 4, 2, 4, 4), 0))
    for name, written in (("none", False), ("causal", False), ("window", True), ("padding", True)):
        ours(query, key, value, mask=MASKS[name][0])
        asked = stand_in.asked[-1]
        assert (asked["mask"] is not None) == written
        assert asked["implementation"] == ("mosaic",)
        if written:  # one mask for all heads is what its kernel takes
            assert asked["mask"].shape[1:] == (1, 13, 13)
