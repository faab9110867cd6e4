"""The short convolution: a NumPy loop, pieces, documents, padding; and a layer that decodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, StateCache, atlas, masks
from attnlab.core.short_convolution import ShortConvolution, short_convolution
from tests.tolerances import as_float64, assert_close, assert_reordered


def looped(x, weight, ids=None):
    out = np.zeros(x.shape)
    for b, t in np.ndindex(*x.shape[:2]):
        for back in range(min(len(weight), t + 1)):
            if ids is None or ids[b, t - back] == ids[b, t]:
                out[b, t] += weight[back] * x[b, t - back]
    return out


def draw(rng, length=9, width=4):
    return rng.standard_normal((2, length, 3)), rng.standard_normal((width, 3))


@pytest.mark.parametrize("width", [1, 2, 4, 12])
def test_equals_the_loop(width, rng):
    x, weight = draw(rng, width=width)
    out, tail = short_convolution(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32))
    assert_close(out, looped(x, weight), "float32")
    assert tail.shape == (2, width - 1, 3)


def test_goes_on_from_its_tail(rng):
    x, weight = (jnp.asarray(a, jnp.float32) for a in draw(rng))
    whole, last = short_convolution(x, weight)
    parts, tail = [], None
    for first, end in ((0, 1), (1, 3), (3, 9)):
        out, tail = short_convolution(x[:, first:end], weight, tail=tail)
        parts.append(out)
    np.testing.assert_array_equal(jnp.concatenate(parts, 1), whole)
    np.testing.assert_array_equal(tail, last)


def test_documents_do_not_meet_and_padding_is_zero(rng):
    x, weight = draw(rng)
    ids = np.array([[0] * 4 + [1] * 5, [5] * 9])
    real = np.array([[True] * 9, [True] * 6 + [False] * 3])
    spoiled = np.where(real[..., None], x, np.nan)
    out, _ = short_convolution(
        jnp.asarray(spoiled, jnp.float32), jnp.asarray(weight, jnp.float32),
        real=jnp.asarray(real), ids=jnp.asarray(ids),
    )  # fmt: skip
    assert_close(out, looped(np.where(real[..., None], x, 0.0), weight, ids), "float32")


def test_a_wrong_call_is_refused_by_name(as_users_run_it, rng):
    x, weight = (jnp.asarray(a, jnp.float32) for a in draw(rng))
    with pytest.raises(ValueError, match=r"^weight"):
        short_convolution(x, weight[:, :2])
    with pytest.raises(ValueError, match=r"^tail"):
        short_convolution(x, weight, tail=jnp.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match=r"^width"):
        ShortConvolution(0, 3, rngs=nnx.Rngs(0))


STATEFUL = sorted(
    e.id for e in atlas.entries().values()
    if "state" in e.properties and "causal self" in e.patterns
)  # fmt: skip


def layer(id, conv_width=None, **options):
    mechanism = atlas.get(id).build(4, 8, rngs=nnx.Rngs(1))
    return MultiHeadAttention(
        32, 4, mechanism=mechanism, conv_width=conv_width, rngs=nnx.Rngs(0), **options
    )


@pytest.mark.parametrize("id", STATEFUL)
def test_a_layer_decodes_from_a_state(id, rng):
    """Prefill, then a token at a time: what the whole sequence gives, from a cache of one size."""
    module, x = layer(id), jnp.asarray(rng.standard_normal((2, 11, 32)), jnp.float32)
    whole = module(x, mask=masks.Causal())
    cache = module.create_cache((2,), 11)
    assert isinstance(cache, StateCache)
    sizes = [a.shape for a in jax.tree.leaves(cache)]
    out, cache = module(x[:, :6], mask=masks.Causal(), cache=cache)
    parts = [out]
    for t in range(6, 11):
        out, cache = module(x[:, t : t + 1], mask=masks.Causal(), cache=cache)
        parts.append(out)
    assert int(cache.length) == 11
    assert [a.shape for a in jax.tree.leaves(cache)] == sizes
    assert_reordered(jnp.concatenate(parts, 1), as_float64(whole), "float32")


def test_convolutions_before_softmax_attention_decode_too(rng):
    module, x = layer("rope", 4), jnp.asarray(rng.standard_normal((2, 9, 32)), jnp.float32)
    whole = module(x, mask=masks.Causal())
    cache, parts = module.create_cache((2,), 9), []
    for span in (slice(0, 4), slice(4, 5), slice(5, 9)):
        out, cache = module(x[:, span], mask=masks.Causal(), cache=cache)
        parts.append(out)
    assert_reordered(jnp.concatenate(parts, 1), as_float64(whole), "float32")


def test_a_recurrent_layer_serves_self_attention_alone(as_users_run_it):
    module = layer("gla")
    x = jnp.zeros((1, 4, 32))
    with pytest.raises(ValueError, match=r"^context"):
        module(x, x)
