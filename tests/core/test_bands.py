"""Bands: masks told as a few numbers, against the same masks written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.core import inputs
from attnlab.core.bands import Band, band_of, some_between

SIDES = [(None, None), (None, 2), (3, None), (0, 0), (4, 1)]
SHIFTS = [(0, 0), (5, 0), (0, 4), (30, 3)]


def call(mask, rows=7, cols=9, offsets=(0, 0)):
    size = {"query": (2, rows, 2, 4), "key": (2, cols, 1, 4), "value": (2, cols, 1, 3)}
    arrays = [jnp.zeros(shape) for shape in size.values()]
    options = {"mask": mask, "query_offset": offsets[0], "key_offset": offsets[1]}
    prepared = inputs.prepare(
        *arrays, *(options.get(name, default) for name, default in inputs.DEFAULTS)
    )
    return prepared[0]


def dense(one):
    rows, cols = one.lengths
    return np.broadcast_to(one.allowed(one.tile(0, 0, rows, cols)), (2, 2, rows, cols))


MASKS = [
    *(masks.SlidingWindow(*sides) for sides in SIDES),
    masks.Full(),
    masks.Causal(),
    masks.Prefix(5),
    masks.KeyPadding(jnp.asarray([3, 0])),
    masks.Prefix(jnp.asarray([12, 6])) & masks.Causal(),
    masks.KeyPadding(jnp.asarray([8, 4])) & (masks.SlidingWindow(2, 2) & masks.Causal()),
]


@pytest.mark.parametrize(("mask", "offsets"), list(itertools.product(MASKS, SHIFTS)))
def test_rows_are_those_of_the_mask_and_fills_never_promises_too_much(mask, offsets):
    one = call(mask, offsets=offsets)
    band, expected = band_of(one), dense(one)
    first, last = band.rows(*one.lengths)
    col = np.arange(one.lengths[1])
    found = (col >= np.asarray(first)[..., None]) & (col < np.asarray(last)[..., None])
    np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)
    seen, lengths = expected.any(-1), np.full(2, 9)
    if band.lengths is not None:
        lengths = np.asarray(band.lengths)
    if band.fills(*one.lengths):
        np.testing.assert_array_equal(
            seen, np.broadcast_to((lengths > 0)[:, None, None], seen.shape)
        )
    elif band.lengths is None:
        assert not seen.all()


@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal() | masks.Prefix(2),
        ~masks.Causal(),
        masks.Strided(2),
        masks.QueryPadding(jnp.asarray([3, 4])),  # a subclass of KeyPadding that is no band
        masks.Causal() & masks.Segments(jnp.zeros((2, 7), jnp.int32), jnp.zeros((2, 9), jnp.int32)),
    ],
)
def test_other_masks_are_no_bands(mask):
    assert band_of(call(mask)) is None


def test_traced_offsets_make_no_band():
    found = []
    jax.eval_shape(lambda n: found.append(band_of(call(masks.Causal(), offsets=(n, 0)))), 3)
    assert found == [None]


def test_some_between_counts_flags_in_half_open_ranges(rng):
    flags = rng.random((2, 3, 9)) < 0.2
    first = rng.integers(0, 9, (1, 1, 7))
    last = np.minimum(first + rng.integers(0, 4, (2, 1, 7)), 9)
    found = some_between(jnp.asarray(flags), jnp.asarray(first), jnp.asarray(last))
    for b, n, t in np.ndindex(2, 3, 7):
        assert found[b, n, t] == flags[b, n, first[0, 0, t] : last[b, 0, t]].any()


def test_what_two_bands_share():
    wide = Band(left=5, lengths=jnp.asarray([4, 9]))
    both = wide.both(Band(left=2, right=3, lengths=jnp.asarray([6, 1])))
    assert both[:2] == (2, 3)
    np.testing.assert_array_equal(both.lengths, [4, 1])
