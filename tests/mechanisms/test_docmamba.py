"""DocMamba: segments come first, and both passes make one symmetric whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, masks
from attnlab.core.recurrence import FORMS
from attnlab.linear.docmamba import DocMamba, docmamba_attention, segment_first_order
from tests.tolerances import as_float64, assert_close, assert_reordered


def sequence(rng, length, heads=2, width=4, dtype=np.float32):
    arrays = [jnp.asarray(rng.standard_normal((length, heads, width)), dtype) for _ in range(3)]
    step = rng.uniform(0.1, 1.0, (length, 2, heads))
    rates = rng.uniform(0.5, 2.0, (2, heads, width))
    return arrays, {
        "step": jnp.asarray(step, dtype),
        "log_decay": jnp.asarray(-step[..., None] * rates, dtype),
        "skip": jnp.asarray(rng.standard_normal((2, heads)), dtype),
    }


def exact(arrays, options):
    """Every pair of tokens: the decays strictly behind the one, up to the other, on its side."""
    query, key, value = (as_float64(x) for x in arrays)
    step, g, skip = (as_float64(options[n]) for n in ("step", "log_decay", "skip"))
    out = np.zeros(value.shape)
    for n in range(query.shape[1]):
        for t in range(len(query)):
            for s in range(len(query)):
                for side in range(2) if s == t else [int(s > t)]:
                    between = slice(s + 1, t + 1) if side == 0 else slice(t, s)
                    damp = np.exp(g[between, side, n].sum(0))
                    weight = np.sum(query[t, n] * key[s, n] * damp) * step[s, side, n]
                    out[t, n] += weight * value[s, n] / 2
            out[t, n] += skip[:, n].sum() * value[t, n] / 2
    return out


@pytest.mark.parametrize("form", FORMS)
def test_two_passes_are_all_pairs(form, rng):
    with jax.enable_x64(True):
        arrays, options = sequence(rng, 13, dtype=np.float64)
        out = docmamba_attention(*arrays, **options, implementation=form, chunk_size=5)
        assert_close(out, exact(arrays, options), np.float64)


def test_turned_around_with_directions_exchanged_it_is_turned_around(rng):
    arrays, options = sequence(rng, 11)
    out = docmamba_attention(*arrays, **options)
    turned = {
        "step": options["step"][::-1, ::-1], "log_decay": options["log_decay"][::-1, ::-1],
        "skip": options["skip"][::-1],
    }  # fmt: skip
    again = docmamba_attention(*(x[::-1] for x in arrays), **turned)
    assert_reordered(again[::-1], out, np.float32)
    same = docmamba_attention(*(x[::-1] for x in arrays), **options)
    assert np.max(np.abs(same[::-1] - out)) > 0.1


def test_every_token_depends_on_every_token(rng):
    arrays, options = sequence(rng, 7)

    def read(value):
        return jnp.sum(docmamba_attention(*arrays[:2], value, **options), axis=(1, 2))

    reach = np.abs(jax.jacobian(read)(arrays[2])).sum((2, 3))
    assert reach.min() > 1e-6


def test_hidden_tokens_take_no_part_in_either_direction(rng):
    arrays, options = sequence(rng, 9)
    alone = docmamba_attention(
        *(x[:6] for x in arrays), step=options["step"][:6], log_decay=options["log_decay"][:6],
        skip=options["skip"],
    )  # fmt: skip
    options = options | {n: options[n].at[6:].set(np.nan) for n in ("step", "log_decay")}
    poisoned = [x.at[6:].set(np.nan) for x in arrays]
    mask = masks.KeyPadding(6) & masks.QueryPadding(6)
    out = docmamba_attention(*poisoned, **options, mask=mask)
    assert_reordered(out[:6], alone, np.float32)
    assert not np.any(out[6:])


def test_documents_are_read_apart(rng):
    arrays, options = sequence(rng, 9)
    ids = jnp.asarray([0, 0, 0, 0, -1, 1, 1, 1, 1])
    out = docmamba_attention(*arrays, **options, mask=masks.Segments(ids))
    for part in (slice(0, 4), slice(5, 9)):
        alone = docmamba_attention(
            *(x[part] for x in arrays), step=options["step"][part],
            log_decay=options["log_decay"][part], skip=options["skip"],
        )  # fmt: skip
        assert_reordered(out[part], alone, np.float32)
    assert not np.any(out[4])


# ---- the order of the scan -----------------------------------------------------------------------


def test_two_columns_are_read_one_after_the_other():
    """Line by line both columns would be mixed; segments keep each together."""
    boxes = [[10, 10], [30, 10], [10, 20], [30, 20], [60, 11], [80, 11], [60, 19], [10, 50]]
    boxes = jnp.asarray([[x, y, x + 5, y + 5] for x, y in boxes])
    ids = jnp.asarray([7, 7, 7, 7, 3, 3, 3, 5])
    shuffled = np.random.default_rng(3).permutation(8)
    order = segment_first_order(boxes[shuffled], ids[shuffled])
    np.testing.assert_array_equal(shuffled[order], np.arange(8))
    np.testing.assert_array_equal(order[jnp.argsort(order)], np.arange(8))


def test_the_order_does_not_depend_on_that_of_the_input(rng):
    corners = rng.permutation(400)[:40]
    boxes = np.stack([corners // 20, corners % 20], -1)
    boxes = jnp.asarray(np.concatenate([boxes, boxes + 1], -1))
    ids = jnp.asarray(rng.integers(0, 6, 40))
    order = np.asarray(jax.jit(segment_first_order)(boxes, ids))
    assert sorted(order) == list(range(40))
    shuffled = rng.permutation(40)
    again = np.asarray(segment_first_order(boxes[shuffled], ids[shuffled]))
    np.testing.assert_array_equal(shuffled[again], order)
    runs = 1 + np.sum(np.diff(np.asarray(ids)[order]) != 0)
    assert runs == len(np.unique(ids))  # no segment is left and come back to


def test_ties_go_by_id_then_place_and_padding_last():
    boxes = jnp.zeros((6, 8), jnp.int32).at[5].set(-1)
    ids = jnp.asarray([2, 1, 2, 1, 2, 1])
    real = jnp.asarray([True, True, True, True, True, False])
    order = segment_first_order(boxes, ids, real=real)
    np.testing.assert_array_equal(order, [1, 3, 0, 2, 4, 5])


def test_heights_may_be_compared_in_lines():
    boxes = jnp.asarray([[50, 10, 60, 20], [10, 12, 20, 22]])
    ids = jnp.zeros((2,), jnp.int32)
    np.testing.assert_array_equal(segment_first_order(boxes, ids), [0, 1])
    np.testing.assert_array_equal(segment_first_order(boxes, ids, line_height=8), [1, 0])


# ---- the module ----------------------------------------------------------------------------------


def test_rates_and_steps_start_as_in_mamba():
    mechanism = DocMamba(32, 4, 16, 1, rngs=nnx.Rngs(0))
    controls = mechanism.controls(jnp.zeros((3, 32)))
    assert controls["step"].shape == (3, 2, 4)
    assert bool(jnp.all((controls["step"] > 9e-4) & (controls["step"] < 0.101)))
    rates = -controls["log_decay"] / controls["step"][..., None]
    assert_close(rates, np.broadcast_to(np.arange(1.0, 17), (3, 2, 4, 16)), np.float32)
    layer = MultiHeadAttention(32, 4, head_width=16, value_width=1, mechanism=mechanism,
                               rngs=nnx.Rngs(1))  # fmt: skip
    assert layer(jnp.ones((2, 5, 32))).shape == (2, 5, 32)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mask": masks.Causal()}, ValueError, r"mask.*both directions.*Mamba-2"),
        ({"return_state": True}, ValueError, "return_state.*state"),
        ({"mask": masks.SlidingWindow(1, 1)}, NotImplementedError, r"attnlab\.attention"),
        ({"step": jnp.ones((5, 2))}, ValueError, r"step.*\(5, 2, 2\).*\(5, 2\)"),
    ],
)
def test_bad_input_is_refused_by_name(options, error, words, rng, as_users_run_it):
    arrays, given = sequence(rng, 5)
    with pytest.raises(error, match=words):
        docmamba_attention(*arrays, **given | options)
    with pytest.raises(ValueError, match="key: length 5 differs"):
        docmamba_attention(arrays[0][:3], *arrays[1:], **given)
    with pytest.raises(ValueError, match="boxes"):
        segment_first_order(jnp.zeros((4, 4)), jnp.zeros((5,), jnp.int32))
    with pytest.raises(ValueError, match="line_height"):
        segment_first_order(jnp.zeros((5, 4)), jnp.zeros((5,), jnp.int32), line_height=0)
