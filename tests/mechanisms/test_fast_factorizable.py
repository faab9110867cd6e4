"""FAST: the factors are the polynomial, weights of the second order are positive, memory linear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.linear.fast_factorizable import Fastmax, fastmax_attention, taylor_features
from tests.compiled import temporaries
from tests.tolerances import LINEAR_GROWTH, as_float64, assert_close, assert_reordered


def problem(rng, queries=14, keys=14):
    shapes = ((2, queries, 4, 3), (2, keys, 2, 3), (2, keys, 2, 5))
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def normalized(x, how):
    x = as_float64(x)
    if how is None:
        return x
    x = x - x.mean(-1, keepdims=True)
    if how == "token":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x / np.sqrt((x**2).sum(-1, keepdims=True).max(1, keepdims=True))


def explicit(query, key, value, *, order=2, how="token", temperature=1.0, allowed=True):
    query, key = normalized(query, how), np.repeat(normalized(key, how), 2, axis=2)
    x = np.einsum("btnh,bsnh->bnts", query, key) / temperature
    weights = np.where(allowed, 1 + x + (x**2 / 2 if order == 2 else 0), 0)
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnd->btnd", weights, np.repeat(as_float64(value), 2, axis=2))


@pytest.mark.parametrize("how", ["token", "max", None])
@pytest.mark.parametrize("order", [1, 2])
def test_factors_are_the_polynomial(order, how, rng):
    """A temperature of 9 keeps weights of first order away from a sum of nothing."""
    for lengths in ((14, 14), (5, 14)):
        arrays = problem(rng, *lengths)
        options = {"order": order, "temperature": 9.0}
        ours = fastmax_attention(*map(jnp.asarray, arrays), normalization=how, **options)
        assert_close(ours, explicit(*arrays, how=how, **options), np.float32)


@pytest.mark.parametrize("implementation", ["parallel", "chunked", "recurrent"])
def test_causal_factors_are_the_polynomial(implementation, rng):
    arrays = problem(rng)
    ours = fastmax_attention(
        *map(jnp.asarray, arrays), mask=masks.Causal(), implementation=implementation, chunk_size=5
    )
    assert_close(ours, explicit(*arrays, allowed=np.tri(14, dtype=bool)), np.float32)


def test_features_are_as_many_as_the_terms_of_a_square(rng):
    x, y = (rng.standard_normal((7, 4)).astype(np.float32) for _ in range(2))
    ours = [taylor_features(jnp.asarray(z)) for z in (x, y)]
    assert ours[0].shape == (7, 15)
    product = np.sum(as_float64(x) * as_float64(y), -1)
    found = np.sum(as_float64(ours[0]) * as_float64(ours[1]), -1)
    assert_close(found, 1 + product + product**2 / 2, np.float32, scale=100.0)


def test_weights_of_the_second_order_are_positive(rng):
    """f(x) = ((x + 1)^2 + 1) / 2 is at least 1/2; of first order it is not."""
    query, key = (jnp.asarray(rng.standard_normal((40, 1, 6)), jnp.float32) for _ in range(2))
    eye = jnp.broadcast_to(jnp.eye(40)[:, None], (40, 1, 40))
    second, first = (
        as_float64(fastmax_attention(query, key, eye, order=order)) for order in (2, 1)
    )
    assert second.min() > 0
    assert_close(second.sum(-1), np.ones((40, 1)), np.float32)
    assert first.min() < 0


def test_padding_does_not_count_as_the_longest(rng):
    arrays = problem(rng)
    arrays[1][:, 9:] *= 100
    padded = fastmax_attention(
        *map(jnp.asarray, arrays), normalization="max", mask=masks.KeyPadding(jnp.asarray([9, 9]))
    )
    alone = explicit(arrays[0], arrays[1][:, :9], arrays[2][:, :9], how="max")
    assert_close(padded, alone, np.float32)


def test_memory_grows_with_the_length_alone():
    def memory(n):
        arrays = [jax.ShapeDtypeStruct((n, 1, 8), jnp.float32)] * 3
        return temporaries(lambda *x: fastmax_attention(*x, mask=masks.Causal()), *arrays)

    small, large = memory(1024), memory(4096)
    assert large <= LINEAR_GROWTH * small
    assert large < 4096 * 4096


def test_the_next_token_takes_a_state_of_one_size(rng):
    arrays = [jnp.asarray(x) for x in problem(rng)]
    module = Fastmax()
    whole = as_float64(module(*arrays, mask=masks.Causal()))
    state = module.init_state((2,), 2, 3, 5)
    for first, last in ((0, 9), (9, 14)):
        out, state = module(
            *(x[:, first:last] for x in arrays), mask=masks.Causal(), query_offset=first,
            key_offset=first, initial_state=state, return_state=True,
        )  # fmt: skip
        assert_reordered(out, whole[:, first:last], np.float32)
        assert state.shape == (2, 2, 10, 6)


def test_wrong_input_is_refused_by_name(rng, as_users_run_it):
    arrays = [jnp.asarray(x) for x in problem(rng)]
    for name, options in (
        (r"order.*3", {"order": 3}),
        (r"normalization.*batch", {"normalization": "batch"}),
        (r"normalization.*causal", {"normalization": "max", "mask": masks.Causal()}),
        (r"temperature.*0", {"temperature": 0.0}),
        ("scale", {"scale": 1.0}),
    ):
        with pytest.raises(ValueError, match=name):
            fastmax_attention(*arrays, **options)
