"""Norms, gates and decays that recurrent layers share, in float32 at least whatever is around them.

A layer computes from its input "*B T F" what its recurrence needs besides query, key and value.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.terms import accumulator

STEPS = (1e-3, 0.1)  # step sizes at the start of training
LEAST_STEP = 1e-4
LARGEST_LOG_RATE = 80.0  # exp of more overflows in float32, and times a step of 0 is NaN


def widened(*arrays: Array) -> list[Array]:
    """The arrays in float32, float64 where they are that."""
    return [x.astype(accumulator(x.dtype)) for x in arrays]


def narrowed(result: Any, dtype: Any) -> Any:
    """An output in `dtype`; beside a state, which stays as it is."""
    if isinstance(result, tuple):
        return (result[0].astype(dtype), *result[1:])
    return result.astype(dtype)


def control(name: str, x: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """What a layer computed from its input, checked and in `dtype`.

    Raises:
      TypeError: no floating-point array.
      ValueError: a shape other than `shape`.
    """
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name}: expected a floating-point array, got {getattr(x, 'dtype', type(x).__name__)}."
        )
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}.")
    return jnp.asarray(x).astype(dtype)


def unit(x: Float[Array, "*S H"], *, epsilon: float = 1e-6) -> Float[Array, "*S H"]:
    """Length 1, x / sqrt(sum x^2 + epsilon); 0 with a finite gradient where x is 0."""
    wide = x.astype(accumulator(x.dtype))
    total = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(total + epsilon)).astype(x.dtype)


def rms_unit(
    x: Float[Array, "..."], *, epsilon: float, axes: int | tuple[int, ...] = -1
) -> Float[Array, "..."]:
    """Root mean square 1 over `axes`, x / sqrt(mean x^2 + epsilon), without a gain."""
    wide = x.astype(accumulator(x.dtype))
    mean = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + epsilon)).astype(x.dtype)


def scaled(x: Float[Array, "..."], gain: Float[Array, "..."]) -> Float[Array, "..."]:
    """A product with a gain over its last axes, in the dtype of x."""
    gain = gain.astype(x.dtype)
    return x * jnp.expand_dims(gain, range(x.ndim - gain.ndim))


class Projection(nnx.Module):
    """x W (+ b), "*B T F" to "*B T *shape", in float32 at least.

    `weight` "F C" and `bias` "C", C the product of `shape`.  Flax's own linear layer refuses
    bfloat16 inputs with float32 weights under strict dtype promotion.
    """

    def __init__(
        self,
        features: int,
        shape: int | tuple[int, ...],
        *,
        bias: float | Array | None = None,
        initializer: Callable[..., Array] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if features < 1 or any(n < 1 for n in self.shape):
            raise ValueError(f"features: expected positive widths, got {features} to {self.shape}.")
        initializer = nnx.initializers.lecun_normal() if initializer is None else initializer
        count = 1
        for n in self.shape:
            count *= n
        self.weight = nnx.Param(initializer(rngs.params(), (features, count), jnp.float32))
        self.bias = nnx.data(None)
        if bias is not None:
            self.bias = nnx.Param(jnp.broadcast_to(jnp.asarray(bias, jnp.float32), (count,)))

    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "..."]:
        dtype = accumulator(x.dtype)
        out = x.astype(dtype) @ self.weight[...].astype(dtype)
        if self.bias is not None:
            out = shifted(out, self.bias[...])
        return out.reshape(*x.shape[:-1], *self.shape)


def shifted(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """A sum with a bias over its last axes, in the dtype of x."""
    bias = bias.astype(x.dtype)
    return x + jnp.expand_dims(bias, range(x.ndim - bias.ndim))


class SoftplusDecay(nnx.Module):
    r"""Step sizes and decays of Mamba-2, also the decays of gated DeltaNet.

        step = softplus(y + dt_bias),      log decay = -exp(A_log) step

    Gu & Dao 2023, arXiv:2312.00752: steps start log-uniform in [0.001, 0.1]; Dao & Gu 2024,
    arXiv:2405.21060: rates exp(A_log) uniform in [1, 16].  Neither takes weight decay in training.
    """

    def __init__(
        self, num_heads: int, *, rates: tuple[float, float] = (1.0, 16.0), rngs: nnx.Rngs
    ) -> None:
        if not 0 < rates[0] <= rates[1]:
            raise ValueError(f"rates: expected 0 < low <= high, got {rates}.")
        drawn = jax.random.uniform(rngs.params(), (num_heads,), minval=rates[0], maxval=rates[1])
        self.a_log = nnx.Param(jnp.log(drawn))
        self.dt_bias = nnx.Param(inverse_softplus(initial_steps(rngs.params(), (num_heads,))))

    def __call__(self, y: Float[Array, "*B T N"]) -> tuple[Array, Array]:
        """Step sizes and log decays "*B T N"."""
        step = jax.nn.softplus(shifted(y, self.dt_bias[...]))
        rate = jnp.exp(jnp.minimum(self.a_log[...], LARGEST_LOG_RATE))
        return step, -scaled(step, rate)


def initial_steps(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Step sizes, log-uniform in [0.001, 0.1]."""
    low, high = (jnp.log(jnp.asarray(s)) for s in STEPS)
    drawn = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
    return jnp.maximum(drawn, LEAST_STEP)


def inverse_softplus(y: Float[Array, "..."]) -> Float[Array, "..."]:
    """The x with softplus(x) = y, for y > 0."""
    return y + jnp.log(-jnp.expm1(-y))
