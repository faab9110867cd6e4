"""Exponentials in a linear state: the formula over pairs in float64, whatever form computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.core.past_softmax import (
    channel_softmax_attention,
    exponential_attention,
    peak_state,
)
from tests import oracles
from tests.tolerances import as_float64, assert_close, assert_reordered

BOTH = {"exponential": exponential_attention, "channel": channel_softmax_attention}
IDS = np.array([[0] * 4 + [-1] * 2 + [3] * 7 + [-1], [5] * 9 + [6] * 5], np.int32)


def exact(kind, query, key, value, allowed):
    """Each pair's weight, sums of exponentials taken in the logarithm."""
    group = query.shape[-2] // key.shape[-2]
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    allowed = np.broadcast_to(allowed, (len(query), query.shape[-2], *np.shape(allowed)[-2:]))
    for b, t, n in np.ndindex(*query.shape[:-1]):
        seen = np.flatnonzero(allowed[b, n, t])
        q, k, v = query[b, t, n], key[b, seen, n // group], value[b, seen, n // group]
        if not len(seen):
            continue
        if kind == "exponential":
            logits = np.logaddexp.reduce(q + k, axis=-1)
            weights = np.exp(logits - np.logaddexp.reduce(logits))
        else:
            weights = np.exp(k - np.logaddexp.reduce(k, axis=0)) @ q
        out[b, t, n] = weights @ v
    return out


def problem(rng, length=14, keys=None, magnitude=1.0):
    shapes = ((2, length, 4, 3), (2, keys or length, 2, 3), (2, keys or length, 2, 5))
    query, key, value = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    return magnitude * query, magnitude * key, value


def same_document():
    return (IDS[:, None, :, None] == IDS[:, None, None, :]) & (IDS[:, None, None] >= 0)


def cases():
    past = np.tri(14, dtype=bool)
    short = np.array([9, 0])
    real = (np.arange(14) < short[:, None])[:, None, None, :]
    pairs = np.random.default_rng(3).random((2, 4, 14, 14)) < 0.4
    everywhere = np.ones((14, 14), bool)
    return {
        "none": (None, everywhere),
        "causal": (masks.Causal(), past),
        "padding": (masks.KeyPadding(jnp.asarray(short)), real & everywhere),
        "documents": (masks.Segments(jnp.asarray(IDS)), same_document()),
        "causal documents": (
            masks.Causal() & masks.Segments(jnp.asarray(IDS)),
            same_document() & past,
        ),
        "causal padding": (masks.Causal() & masks.KeyPadding(jnp.asarray(short)), real & past),
        "pairs": (masks.ArrayMask(jnp.asarray(pairs)), pairs),
    }


FORMS = {"causal documents": ("parallel", "chunked", "recurrent"), "pairs": ("parallel",)}


@pytest.mark.parametrize(
    ("case", "implementation"),
    [(case, form) for case in cases() for form in FORMS.get(case, ("chunked",))],
)
@pytest.mark.parametrize("kind", BOTH)
def test_equals_the_sum_over_pairs(kind, implementation, case, rng):
    mask, allowed = cases()[case]
    options = {"mask": mask, "implementation": implementation, "chunk_size": 4}
    run = jax.jit(lambda *x: BOTH[kind](*x, **options))
    for magnitude in (1.0, 300.0):
        arrays = problem(rng, magnitude=magnitude)
        if kind == "channel":
            arrays = (arrays[0] / np.float32(magnitude), *arrays[1:])
        expected = exact(kind, *map(as_float64, arrays), allowed)
        # A logit of hundreds is itself rounded: its exponential errs by as much as that.
        ours = run(*map(jnp.asarray, arrays))
        assert_close(ours, expected, np.float32, scale=max(1.0, magnitude))


@pytest.mark.parametrize("kind", BOTH)
def test_gradients_are_slopes_of_the_formula(kind, rng):
    for case in ("causal documents", "documents", "pairs"):
        mask, allowed = cases()[case]
        arrays = problem(rng)

        def loss(*x, mask=mask):
            return jnp.sum(jnp.cos(BOTH[kind](*x, mask=mask, chunk_size=4)))

        found = jax.jit(jax.grad(loss, (0, 1, 2)))(*map(jnp.asarray, arrays))
        for index in range(3):
            direction = [np.zeros(x.shape) for x in arrays]
            direction[index] = rng.standard_normal(arrays[index].shape)
            slope = oracles.directional(
                lambda *x, allowed=allowed: np.sum(np.cos(exact(kind, *x, allowed))),
                [as_float64(x) for x in arrays],
                direction,
            )
            along = np.sum(as_float64(found[index]) * direction[index])
            assert_close(along, slope, np.float32, "gradient", scale=10.0, words=f"{case} {index}")


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("mask", [None, masks.KeyPadding(jnp.asarray([11, 3]))])
def test_a_sequence_can_be_split_anywhere(kind, mask, rng):
    query, key, value = map(jnp.asarray, problem(rng, magnitude=4.0))
    causal = masks.Causal() if mask is None else masks.Causal() & mask
    whole, end = BOTH[kind](query, key, value, mask=causal, return_state=True)
    state, parts = peak_state((2,), 2, 3, 5), []
    for first, last in ((0, 1), (1, 2), (2, 9), (9, 14)):
        piece = (x[:, first:last] for x in (query, key, value))
        offsets = {"query_offset": first, "key_offset": first}
        out, state = BOTH[kind](
            *piece, mask=causal, initial_state=state, return_state=True, **offsets
        )
        parts.append(out)
    assert_reordered(jnp.concatenate(parts, 1), as_float64(whole), np.float32)
    for ours, expected in zip(state, end, strict=True):
        assert_reordered(ours, as_float64(expected), np.float32)


@pytest.mark.parametrize("kind", BOTH)
def test_one_query_among_the_keys_reads_what_it_reads_in_the_sequence(kind, rng):
    query, key, value = map(jnp.asarray, problem(rng, magnitude=4.0))
    whole = as_float64(BOTH[kind](query, key, value, mask=masks.Causal()))
    decode = jax.jit(lambda q, t: BOTH[kind](q, key, value, mask=masks.Causal(), query_offset=t))
    for t in (0, 5, 13):
        out = decode(query[:, t : t + 1], jnp.asarray(t, jnp.int32))
        assert_reordered(out[:, 0], whole[:, t], np.float32)


@pytest.mark.parametrize("kind", BOTH)
def test_a_later_key_however_large_moves_nothing(kind, rng):
    query, key, value = problem(rng)
    large = key.copy()
    large[:, 9:] *= 1e4
    before, after = (
        as_float64(BOTH[kind](*map(jnp.asarray, (query, k, value)), mask=masks.Causal()))
        for k in (key, large)
    )
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert np.all(np.isfinite(after))
    assert np.any(before[:, 9:] != after[:, 9:])


@pytest.mark.parametrize("kind", BOTH)
def test_half_precision_in_and_out(kind, rng):
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in problem(rng, magnitude=3.0)]
    ours = BOTH[kind](*arrays, mask=masks.Causal())
    assert ours.dtype == jnp.bfloat16
    expected = exact(kind, *map(as_float64, arrays), np.tri(14, dtype=bool))
    assert_close(ours, expected, jnp.bfloat16)


@pytest.mark.parametrize("kind", BOTH)
def test_a_wrong_call_is_refused_by_name(kind, rng, as_users_run_it):
    arrays = [jnp.asarray(x) for x in problem(rng)]
    mask = cases()["pairs"][0]
    for error, name, options in (
        (NotImplementedError, "ArrayMask.*parallel", {"mask": mask, "implementation": "chunked"}),
        (NotImplementedError, "ArrayMask.*parallel", {"mask": mask, "return_state": True}),
        (ValueError, "implementation", {"mask": mask, "implementation": "magic"}),
        (ValueError, "implementation", {"implementation": "magic"}),
        (ValueError, "scale", {"mask": mask, "scale": 2.0}),
        (ValueError, "scale", {"scale": 2.0}),
        (ValueError, "initial_state.*causal", {"return_state": True}),
        (TypeError, "initial_state.*PeakState", {"initial_state": jnp.zeros((2, 2, 3, 6))}),
    ):
        with pytest.raises(error, match=name):
            BOTH[kind](*arrays, **options)
