"""Memory is linear, forward and in every derivative: read from compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from attnlab import attention, masks, scores
from tests.tolerances import LINEAR_GROWTH

HEADS, WIDTH = 1, 8
SHORT, LONG = 1024, 4096


def call(implementation):
    def run(query, key, value, slopes):
        return attention(
            query,
            key,
            value,
            mask=masks.Causal(),
            modifiers=scores.AlibiSlopes(slopes),
            implementation=implementation,
            block_sizes=(128, 128) if implementation == "blockwise" else None,
        )

    return run


def forward(run):
    return run


def gradient(run):
    return jax.grad(lambda *x: jnp.sum(jnp.sin(run(*x))), argnums=(0, 1, 2, 3))


def tangent(run):
    return lambda *x: jax.jvp(run, x, x)[1]


def forward_over_reverse(run):
    return lambda *x: jax.jvp(gradient(run), x, x)[1]


def reverse_over_reverse(run):
    def slope(*x):
        return sum(jnp.sum(jnp.square(g)) for g in gradient(run)(*x))

    return jax.grad(slope, argnums=(0, 1, 2, 3))


def under_scan(run):
    """Two layers in a scan: what is saved between them must be linear too."""

    def loss(query, key, value, slopes):
        def layer(x, _):
            return run(query, key, x, slopes), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, value, None, length=2)[0]))

    return jax.grad(loss, argnums=(0, 1, 2, 3))


def temporaries(transform, implementation, n):
    x = jax.ShapeDtypeStruct((n, HEADS, WIDTH), jnp.float32)
    slopes = jax.ShapeDtypeStruct((HEADS,), jnp.float32)
    compiled = jax.jit(transform(call(implementation))).lower(x, x, x, slopes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "transform",
    [forward, gradient, tangent, forward_over_reverse, reverse_over_reverse, under_scan],
    ids=lambda f: f.__name__,
)
def test_blockwise_memory_is_linear(transform):
    small, large = (temporaries(transform, "blockwise", n) for n in (SHORT, LONG))
    assert large <= LINEAR_GROWTH * small, f"{small:,} bytes at {SHORT}, {large:,} at {LONG}"
    assert large < LONG * LONG * 4 / 8, f"{large:,} bytes; the scores are {LONG * LONG * 4:,}"


def test_the_measure_sees_quadratic_memory():
    small, large = (temporaries(gradient, "reference", n) for n in (SHORT, LONG))
    assert large > 1.5 * LINEAR_GROWTH * small
    assert large >= LONG * LONG * 4


@pytest.mark.parametrize("transform", [forward, gradient], ids=lambda f: f.__name__)
def test_a_mapped_call_is_linear_too(transform):
    def mapped(run):
        return jax.vmap(transform(run), in_axes=(0, 0, 0, None))

    def size(n):
        x = jax.ShapeDtypeStruct((2, n, HEADS, WIDTH), jnp.float32)
        slopes = jax.ShapeDtypeStruct((HEADS,), jnp.float32)
        compiled = jax.jit(mapped(call("blockwise"))).lower(x, x, x, slopes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = size(SHORT), size(LONG)
    assert large <= LINEAR_GROWTH * small, f"{small:,} bytes at {SHORT}, {large:,} at {LONG}"
