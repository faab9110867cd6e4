"""Every derivative has three witnesses: differences of the formula, forward and reverse mode.

A loss reads the output and, where it is defined, the log-sum-exp. All inputs and all parameters of
modifiers and normalisers move at once, in random directions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnlab
from tests import oracles
from tests.core import cases
from tests.tolerances import as_float64, assert_close, largest

BLOCKS = (8, 8)
PAIRS = [
    pytest.param(case, implementation, id=f"{case.name}-{implementation}".replace(" ", "_"))
    for case in cases.CASES
    for implementation in ("reference", "blockwise")
    if case.streams or implementation == "reference"
]
SECOND = (
    "plain",
    "causal with bias",
    "table with padding",
    "temperature then cap in segments",
    "user function with a sink",
    "sigmoid with slopes",
)


def setting(case, seed=0):
    rng = np.random.default_rng(seed)
    flat = cases.flatten(*cases.draw_inputs(seed), case.params)
    read = rng.standard_normal((2, cases.QUERIES, cases.HEADS, cases.VALUE_WIDTH))
    read_lse = rng.standard_normal((2, cases.HEADS, cases.QUERIES))
    return flat, read.astype(np.float32), read_lse.astype(np.float32)


def our_loss(case, implementation, read, read_lse):
    def loss(*flat):
        query, key, value, params = cases.unflatten(case, flat)
        out = attnlab.attention(
            query,
            key,
            value,
            **case.ours(params),
            query_offset=case.query_offset,
            return_lse=case.lse,
            implementation=implementation,
            block_sizes=BLOCKS if implementation == "blockwise" else None,
        )
        out, lse = out if case.lse else (out, None)
        total = jnp.sum(jnp.sin(out) * jnp.asarray(read).astype(out.dtype))
        if case.lse:
            seen = jnp.where(jnp.isneginf(lse), 0, lse)
            total = total + jnp.sum(seen * jnp.asarray(read_lse).astype(out.dtype))
        return total

    return loss


def oracle_loss(case, read, read_lse):
    def loss(*flat):
        query, key, value, params = cases.unflatten(case, flat)
        out, lse = oracles.attention(
            query,
            key,
            value,
            **case.oracle(params),
            query_offset=case.query_offset,
            return_lse=True,
        )
        total = np.sum(np.sin(out) * read)
        if case.lse:
            total += np.sum(np.where(np.isneginf(lse), 0, lse) * read_lse)
        return total

    return loss


def directions(flat, seed):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(x.shape) for x in flat)


def inner(first, second):
    return sum(np.sum(as_float64(a) * b) for a, b in zip(first, second, strict=True))


def size(gradient, direction):
    """What rounding in an inner product is proportional to."""
    parts = zip(gradient, direction, strict=True)
    return max(1.0, sum(np.sum(np.abs(as_float64(a) * b)) for a, b in parts))


@pytest.mark.parametrize(("case", "implementation"), PAIRS)
def test_value_gradient_and_tangent(case, implementation):
    flat, read, read_lse = setting(case)
    loss = our_loss(case, implementation, read, read_lse)
    exact = tuple(as_float64(x) for x in flat)
    oracle = oracle_loss(case, read, read_lse)
    arrays = tuple(map(jnp.asarray, flat))

    value, gradient = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(flat)))))(*arrays)
    assert_close(value, oracle(*exact), np.float32, "gradient")
    assert [g.shape for g in gradient] == [x.shape for x in flat]
    assert [g.dtype for g in gradient] == [x.dtype for x in flat]
    tangent = jax.jit(lambda at, along: jax.jvp(loss, at, along)[1])
    for seed in (1, 2):
        direction = directions(flat, seed)
        slope = oracles.directional(oracle, exact, direction)
        scale = size(gradient, direction)
        assert_close(inner(gradient, direction), slope, np.float32, "gradient", scale=scale)
        along = tuple(jnp.asarray(d, jnp.float32) for d in direction)
        forward = tangent(arrays, along)
        assert_close(forward, slope, np.float32, "gradient", scale=scale, words="jvp")
    for index in range(len(flat)):  # each argument alone: errors of two cannot cancel
        direction = tuple(
            d if n == index else np.zeros_like(d) for n, d in enumerate(directions(flat, 3))
        )
        slope = oracles.directional(oracle, exact, direction)
        assert_close(
            inner(gradient, direction),
            slope,
            np.float32,
            "gradient",
            scale=size(gradient, direction),
            words=["query", "key", "value", *sorted(case.params)][index],
        )


@pytest.mark.parametrize(
    ("case", "implementation"),
    [p for p in PAIRS if p.values[0].name in SECOND],
)
def test_hessian_vector_products(case, implementation):
    flat, read, read_lse = setting(case)
    loss = our_loss(case, implementation, read, read_lse)
    exact = tuple(as_float64(x) for x in flat)
    gradient = jax.grad(loss, argnums=tuple(range(len(flat))))
    arrays = tuple(map(jnp.asarray, flat))
    first, second = directions(flat, 1), directions(flat, 2)
    along = tuple(jnp.asarray(d, jnp.float32) for d in first)

    @jax.jit
    def products(at, along):
        forward_over_reverse = jax.jvp(lambda *x: gradient(*x), at, along)[1]

        def slope(*x):
            return sum(jnp.sum(g * a) for g, a in zip(gradient(*x), along, strict=True))

        reverse_over_reverse = jax.grad(slope, argnums=tuple(range(len(flat))))(*at)
        return forward_over_reverse, reverse_over_reverse

    @jax.jit
    def reverse_over_forward(at, along):
        return jax.grad(
            lambda at: jax.jvp(loss, at, along)[1],
        )(at)

    expected = oracles.curvature(oracle_loss(case, read, read_lse), exact, first, second)
    forward, reverse = products(arrays, along)
    for name, got in [
        ("forward over reverse", forward),
        ("reverse over reverse", reverse),
        ("reverse over forward", reverse_over_forward(arrays, along)),
    ]:
        scale = size(got, second)
        assert_close(inner(got, second), expected, np.float32, "second", scale=scale, words=name)
    for a, b in zip(forward, reverse, strict=True):
        assert_close(a, b, np.float32, "second", scale=max(1.0, largest(b)))


def test_forward_over_forward_equals_the_curvature():
    case = cases.CASES[1]
    flat, read, read_lse = setting(case)
    loss = our_loss(case, "blockwise", read, read_lse)
    arrays = tuple(map(jnp.asarray, flat))
    first, second = directions(flat, 1), directions(flat, 2)
    one, two = (tuple(jnp.asarray(d, jnp.float32) for d in x) for x in (first, second))

    def slope(at):
        return jax.jvp(loss, at, one)[1]

    got = jax.jit(lambda at: jax.jvp(slope, (at,), (two,))[1])(arrays)
    exact = tuple(as_float64(x) for x in flat)
    expected = oracles.curvature(oracle_loss(case, read, read_lse), exact, first, second)
    assert_close(got, expected, np.float32, "second", scale=100.0)


@pytest.mark.slow
def test_third_derivatives_of_blockwise_equal_those_of_the_reference():
    case = cases.CASES[0]
    flat, read, read_lse = setting(case)
    arrays = tuple(map(jnp.asarray, flat))
    along = tuple(jnp.asarray(d, jnp.float32) for d in directions(flat, 1))

    def third(implementation):
        loss = our_loss(case, implementation, read, read_lse)

        def curve(*x):
            return jax.jvp(lambda *y: jax.jvp(loss, y, along)[1], x, along)[1]

        return jax.jit(jax.grad(curve, argnums=(0, 1, 2)))(*arrays)

    for ours, plain in zip(third("blockwise"), third("reference"), strict=True):
        assert_close(ours, plain, np.float32, "second", scale=max(1.0, largest(plain)))


@pytest.mark.parametrize(
    ("case", "implementation"),
    [p for p in PAIRS if p.values[0].name in ("causal with bias", "sigmoid with slopes")],
)
def test_in_float64_everything_is_exact_to_float64(case, implementation):
    flat, read, read_lse = setting(case)
    exact = tuple(as_float64(x) for x in flat)
    oracle = oracle_loss(case, read, read_lse)
    with jax.enable_x64(True):
        loss = our_loss(case, implementation, read.astype(np.float64), read_lse.astype(np.float64))
        value, gradient = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(flat)))))(
            *map(jnp.asarray, exact)
        )
        assert value.dtype == jnp.float64
        assert all(g.dtype == jnp.float64 for g in gradient)
    assert_close(value, oracle(*exact), np.float64, scale=100.0)
    direction = directions(flat, 1)
    slope = oracles.directional(oracle, exact, direction)
    assert abs(inner(gradient, direction) - slope) < 1e-8 * size(gradient, direction)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_narrow_gradients_err_no_more_than_the_dtype(implementation, dtype):
    """Against float64 derivatives at the same (rounded) inputs."""
    query, key, value = (jnp.asarray(x).astype(dtype) for x in cases.draw_inputs(4))
    read = np.random.default_rng(0).standard_normal(
        (2, cases.QUERIES, cases.HEADS, cases.VALUE_WIDTH)
    )
    read = jnp.asarray(read).astype(dtype)

    def loss(query, key, value, implementation=implementation):
        out = attnlab.attention(
            query,
            key,
            value,
            mask=attnlab.masks.Causal(),
            query_offset=6,
            implementation=implementation,
        )
        wide = jnp.float64 if out.dtype == jnp.float64 else jnp.float32
        return jnp.sum((out * read.astype(out.dtype)).astype(wide))

    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(as_float64(x)) for x in (query, key, value))
        exact = jax.grad(functools.partial(loss, implementation="reference"), argnums=(0, 1, 2))(
            *wide
        )
    for ours, right in zip(got, exact, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, right, dtype, "gradient", scale=largest(right))
