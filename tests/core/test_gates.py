"""Norms, gates and decays of recurrent layers: by their formulas, at zero and at their extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.core.gates import (
    Projection,
    SoftplusDecay,
    control,
    initial_steps,
    inverse_softplus,
    narrowed,
    rms_unit,
    unit,
    widened,
)
from tests.tolerances import as_float64, assert_close


def test_unit_is_the_formula_and_has_length_one(rng):
    x = rng.standard_normal((3, 5, 8)).astype(np.float32)
    exact = as_float64(x) / np.sqrt((as_float64(x) ** 2).sum(-1, keepdims=True) + 1e-6)
    assert_close(unit(jnp.asarray(x)), exact, np.float32)
    assert_close(np.linalg.norm(exact, axis=-1), np.ones((3, 5)), np.float32)


def test_unit_of_zero_is_zero_with_a_finite_gradient():
    zero = jnp.zeros((4, 8))
    out, slope = jax.value_and_grad(lambda x: jnp.sum(unit(x)))(zero)
    assert out == 0
    assert bool(jnp.all(jnp.isfinite(slope)))
    naive = jax.grad(lambda x: jnp.sum(x / jnp.linalg.norm(x, axis=-1, keepdims=True)))(zero)
    assert bool(jnp.all(jnp.isnan(naive)))


def test_rms_over_one_axis_and_over_two(rng):
    x = rng.standard_normal((3, 5, 8)).astype(np.float32)
    for axes in (-1, (-2, -1)):
        exact = as_float64(x) / np.sqrt((as_float64(x) ** 2).mean(axes, keepdims=True) + 1e-5)
        assert_close(rms_unit(jnp.asarray(x), epsilon=1e-5, axes=axes), exact, np.float32)


def test_bfloat16_goes_through_float32(rng):
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.bfloat16)
    for ours, exact in (
        (unit(x), as_float64(x) / np.sqrt((as_float64(x) ** 2).sum(-1, keepdims=True) + 1e-6)),
        (
            rms_unit(x, epsilon=1e-6),
            as_float64(x) / np.sqrt((as_float64(x) ** 2).mean(-1, keepdims=True) + 1e-6),
        ),
    ):
        assert ours.dtype == jnp.bfloat16
        assert_close(ours, exact, jnp.bfloat16)
    (wide,) = widened(x)
    assert wide.dtype == jnp.float32
    out, state = narrowed((wide, wide), jnp.bfloat16)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_projection_is_an_affine_map_in_float32(rng):
    made = Projection(6, (2, 3), bias=0.5, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((4, 6)), jnp.bfloat16)
    out = made(x)
    exact = as_float64(x) @ as_float64(made.weight[...]) + 0.5
    assert (out.shape, out.dtype) == ((4, 2, 3), jnp.float32)
    assert_close(out, exact.reshape(4, 2, 3), np.float32)


def test_a_projection_refuses_empty_widths():
    with pytest.raises(ValueError, match="features"):
        Projection(0, 3, rngs=nnx.Rngs(0))


def test_steps_and_rates_start_where_the_paper_says():
    """A rate of 0 would have the logarithm -inf: a head that never forgets, nor learns to."""
    decay = SoftplusDecay(100_000, rngs=nnx.Rngs(1))
    rates, steps = np.exp(as_float64(decay.a_log[...])), jax.nn.softplus(decay.dt_bias[...])
    assert np.all(np.isfinite(as_float64(decay.a_log[...])))
    assert 1 - 1e-5 <= rates.min() < 1.01
    assert 15.99 < rates.max() <= 16 + 1e-4
    assert 1e-3 * (1 - 1e-4) <= steps.min() < 1.01e-3
    assert 0.099 < steps.max() <= 0.1 + 1e-6
    quantiles = np.quantile(np.log10(as_float64(steps)), [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quantiles, [-2.5, -2, -1.5], atol=0.02)  # log-uniform


def test_a_decay_is_the_formula(rng):
    decay = SoftplusDecay(3, rngs=nnx.Rngs(1))
    y = rng.standard_normal((5, 3)).astype(np.float32)
    step, log_decay = decay(jnp.asarray(y))
    exact = np.log1p(np.exp(as_float64(y) + as_float64(decay.dt_bias[...])))
    assert_close(step, exact, np.float32)
    assert_close(log_decay, -np.exp(as_float64(decay.a_log[...])) * exact, np.float32)


def test_a_decay_is_no_nan_where_a_rate_overflows_and_the_step_is_zero():
    decay = SoftplusDecay(1, rngs=nnx.Rngs(0))
    decay.a_log[...] = jnp.asarray([100.0])

    def total(decay, y):
        return jnp.sum(decay(y)[1])

    value, (of_decay, of_y) = nnx.value_and_grad(total, argnums=(0, 1))(
        decay, jnp.asarray([[-200.0]])
    )
    assert value == 0
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((of_decay, of_y)))


def test_inverse_softplus_inverts():
    steps = initial_steps(jax.random.key(0), (1000,))
    assert_close(jax.nn.softplus(inverse_softplus(steps)) / steps, np.ones(1000), np.float32)


def test_rates_are_refused_by_name():
    with pytest.raises(ValueError, match="rates"):
        SoftplusDecay(2, rates=(0.0, 16.0), rngs=nnx.Rngs(0))


def test_a_control_is_checked_by_name():
    with pytest.raises(ValueError, match=r"beta.*\(2, 3\).*\(3, 2\)"):
        control("beta", jnp.zeros((3, 2)), (2, 3), jnp.float32)
    with pytest.raises(TypeError, match=r"beta.*int32"):
        control("beta", jnp.zeros((2, 3), jnp.int32), (2, 3), jnp.float32)
