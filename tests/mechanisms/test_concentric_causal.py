"""Concentric causal attention: places and masks of the paper's 24 x 24, and its symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, masks
from attnlab.positional.concentric_causal import (
    ConcentricCausal,
    ConcentricLayout,
    concentric_attention,
    rings,
)
from attnlab.positional.rope import rope_attention
from tests.core import draw
from tests.tolerances import as_float64, assert_reordered

SIZE = draw.Sizes((2,), 20, 20, 4, 2, 8, 3)
INPUTS = tuple(map(jnp.asarray, draw.inputs(SIZE, 0)))
LAYOUT = ConcentricLayout(((3, 3, 4),))


def test_the_papers_image_has_twelve_places_instead_of_576():
    places = np.asarray(ConcentricLayout(((5, 24, 24),)).places(5 + 576 + 3))
    np.testing.assert_array_equal(places[:5], np.arange(5))
    image = places[5 : 5 + 576] - 5
    found, counts = np.unique(image, return_counts=True)
    np.testing.assert_array_equal(found, np.arange(12))
    np.testing.assert_array_equal(counts, [4 * (23 - 2 * r) for r in range(12)])
    np.testing.assert_array_equal(places[-3:], [17, 18, 19])
    assert places[-3] - places[5] == 12  # the first patch to the first token of the instruction
    assert 576 / len(found) == 48


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 2), (3, 4), (5, 5), (6, 3)])
def test_rings_are_what_peeling_the_border_off_gives(shape):
    found, left, ring = np.full(shape, -1), np.ones(shape, bool), 0
    while left.any():
        rows, cols = np.flatnonzero(left.any(1)), np.flatnonzero(left.any(0))
        border = left.copy()
        border[rows[0] + 1 : rows[-1], cols[0] + 1 : cols[-1]] = False
        found[border], left, ring = ring, left & ~border, ring + 1
    np.testing.assert_array_equal(rings(*shape), found)
    assert ring == -(-min(shape) // 2)


def test_a_square_may_be_turned_and_mirrored():
    """All eight symmetries leave the mask as it is: a raster order has none of them."""
    grid = np.arange(36).reshape(6, 6)
    dense = np.asarray(ConcentricLayout(((0, 6, 6),)).mask(36, 36).dense(36, 36))[..., 0, :, :]
    for turns in range(4):
        for image in (np.rot90(grid, turns), np.rot90(grid, turns).T):
            order = image.reshape(-1)
            np.testing.assert_array_equal(dense[..., order, :][..., order], dense)
    causal = np.tri(36, dtype=bool)
    order = np.rot90(grid).reshape(-1)
    assert np.any(causal[order][:, order] != causal)


def test_the_mask_is_that_of_two_rules():
    """Text sees what is before it; a patch the text before, and its own and outer rings."""
    ring = rings(3, 4).reshape(-1)
    expected = np.tri(20, dtype=bool)
    expected[3:15, 3:15] = ring[None, :] <= ring[:, None]
    np.testing.assert_array_equal(LAYOUT.mask(20, 20).dense(20, 20)[0], expected)


def test_without_images_it_is_causal_attention_with_rope():
    ours = concentric_attention(*INPUTS, layout=ConcentricLayout())
    np.testing.assert_array_equal(ours, rope_attention(*INPUTS, mask=masks.Causal()))
    one = concentric_attention(*INPUTS, layout=ConcentricLayout(((4, 1, 1),)))
    np.testing.assert_array_equal(one, ours)  # an image of one patch is a token


def test_places_given_by_sequence_are_those_of_its_layout():
    layouts = [LAYOUT, ConcentricLayout(((6, 2, 2), (12, 1, 3)))]
    places = jnp.stack([layout.places(20) for layout in layouts])
    both = concentric_attention(*INPUTS, positions=(places, places))
    for n, layout in enumerate(layouts):
        alone = concentric_attention(*(x[n] for x in INPUTS), layout=layout)
        assert_reordered(both[n], as_float64(alone), np.float32)


def test_several_images_each_save_their_own():
    places = np.asarray(ConcentricLayout(((1, 3, 3), (12, 2, 2))).places(18))
    expected = [0, 1, 1, 1, 1, 2, 1, 1, 1, 1, 3, 4, 5, 5, 5, 5, 6, 7]
    np.testing.assert_array_equal(places, expected)


def test_places_after_a_traced_offset_are_the_same():
    later = jax.jit(lambda n: LAYOUT.places(4, n))
    for offset in (0, 2, 13, 16):
        np.testing.assert_array_equal(later(offset), LAYOUT.places(20)[offset : offset + 4])


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_a_model_reads_an_image_at_once_and_then_decodes(rng, implementation):
    layer = MultiHeadAttention(
        32, 4, num_kv_heads=2, mechanism=ConcentricCausal(LAYOUT), implementation=implementation,
        rngs=nnx.Rngs(1),
    )  # fmt: skip
    x = jnp.asarray(rng.standard_normal((2, 20, 32)), jnp.float32)
    whole, cache = layer(x), layer.create_cache((2,), 24)
    for first, last in ((0, 2), (2, 16), (16, 17), (17, 20)):
        out, cache = layer(x[:, first:last], cache=cache)
        assert_reordered(out, as_float64(whole)[:, first:last], np.float32)


def test_reading_part_of_an_image_would_miss_the_rest():
    """What is refused where it can be known does differ."""
    query, key, value = INPUTS
    whole = concentric_attention(query, key, value, layout=LAYOUT)
    part = concentric_attention(*(x[:, :10] for x in INPUTS), layout=LAYOUT)
    assert np.max(np.abs(whole[:, 3:10] - part[:, 3:10])) > 1e-2
    with pytest.raises(ValueError, match=r"images.*end at 9.*\(3, 3, 4\)"):
        concentric_attention(query[:, :10], key, value, layout=LAYOUT)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (((-1, 2, 2),), r"images.*start.*\(-1, 2, 2\)"),
        (((3, 0, 2),), r"images.*\(3, 0, 2\)"),
        (((3, 2, 2), (6, 2, 2)), r"images: \(6, 2, 2\) begins within \(3, 2, 2\)"),
        (((9, 2, 2), (3, 2, 2)), r"images: \(3, 2, 2\)"),
    ],
)
def test_layouts_that_cannot_be_are_refused_by_name(images, words):
    with pytest.raises(ValueError, match=words):
        ConcentricLayout(images)


def test_a_layout_and_positions_together_are_refused():
    place = jnp.arange(20)
    with pytest.raises(ValueError, match=r"positions.*layout"):
        concentric_attention(*INPUTS, layout=LAYOUT, positions=(place, place))
