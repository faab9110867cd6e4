"""Rabe & Staats: chunks are exact, gradients and logits of a thousand too, in linear memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.dense.memory_efficient_attention import MemoryEfficient, memory_efficient_attention
from tests import oracles
from tests.compiled import temporaries
from tests.core import draw
from tests.tolerances import LINEAR_GROWTH, as_float64, assert_close, largest

SIZE = draw.Sizes((), 40, 56, 2, 1, 4, 4)


@pytest.mark.parametrize("magnitude", [1.0, 300.0], ids=["ordinary", "logits of a thousand"])
def test_chunked_output_and_gradients_equal_full_attention(magnitude):
    arrays = draw.inputs(SIZE, 0, magnitude)
    read = np.random.default_rng(1).standard_normal((40, 2, 4)).astype(np.float32)

    def loss(*x, chunks=(8, 16)):
        out = memory_efficient_attention(*x, query_chunk_size=chunks[0], key_chunk_size=chunks[1])
        return jnp.sum(out * read), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradient = run(*map(jnp.asarray, arrays))
    exact = [as_float64(x) for x in arrays]
    scale = max(
        1.0, magnitude / 10
    )  # rounding of a score of a thousand is a thousand times coarser
    assert_close(out, oracles.attention(*exact), np.float32, scale=scale)
    rng = np.random.default_rng(2)
    for index, ours in enumerate(gradient):
        direction = [np.zeros_like(x) for x in exact]
        direction[index] = rng.standard_normal(exact[index].shape)
        slope = oracles.directional(
            lambda *x: np.sum(oracles.attention(*x) * read), exact, direction, step=1e-6
        )
        along = np.sum(as_float64(ours) * direction[index])
        size = max(1.0, largest(ours)) * np.linalg.norm(direction[index]) * scale
        assert_close(along, slope, np.float32, "gradient", scale=size)


@pytest.mark.slow
def test_the_memory_of_the_paper():
    """At n = 16,384 at least 59 times less memory forward and 32 times with gradients."""
    n = 16384
    shape = jax.ShapeDtypeStruct((n, 1, 64), jnp.float32)

    def memory(run, differentiate):
        if differentiate:
            run = jax.grad(lambda *x, f=run: jnp.sum(f(*x)), argnums=(0, 1, 2))
        return temporaries(run, shape, shape, shape)

    for differentiate, times in ((False, 59), (True, 32)):
        full = memory(jax.nn.dot_product_attention, differentiate)
        ours = memory(MemoryEfficient(), differentiate)
        assert full >= times * ours, f"{full:,} bytes against {ours:,}: {full / ours:.0f} times"


def test_from_n_to_four_n_memory_grows_by_four_and_the_naive_one_by_sixteen():
    def memory(run, n):
        shape = jax.ShapeDtypeStruct((n, 1, 8), jnp.float32)
        return temporaries(run, shape, shape, shape)

    def naive(query, key, value):
        weights = jax.nn.softmax(jnp.einsum("tnh,snh->nts", query, key), axis=-1)
        return jnp.einsum("nts,snd->tnd", weights, value)

    def slope(run):
        return jax.grad(lambda *x: jnp.sum(run(*x)), argnums=(0, 1, 2))

    ours = MemoryEfficient(query_chunk_size=128, key_chunk_size=128)
    for run in (ours, slope(ours)):
        assert memory(run, 4096) <= LINEAR_GROWTH * memory(run, 1024)
    assert memory(naive, 4096) > 12 * memory(naive, 1024)


@pytest.mark.parametrize("name", ["query_chunk_size", "key_chunk_size"])
def test_a_chunk_of_nothing_is_refused(name):
    x = jnp.ones((4, 1, 2))
    with pytest.raises(ValueError, match=f"{name}: expected a positive int, got 0"):
        memory_efficient_attention(x, x, x, **{name: 0})


def test_it_is_one_implementation_and_says_so():
    x = jnp.ones((4, 1, 2))
    with pytest.raises(NotImplementedError, match=r"reference.*blockwise"):
        memory_efficient_attention(x, x, x, implementation="reference")
