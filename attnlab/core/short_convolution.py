r"""The short causal convolution that recurrent layers put before queries, keys and values.

    out_t = sum_{0 <= j < W} w_j * x_{t-j}

Depthwise: each channel has its own W weights.  It lets a key see the token before it, what softmax
attention needs two layers for (Fu et al. 2023, arXiv:2212.14052, as a shift; Gu & Dao 2023,
arXiv:2312.00752, and Yang et al. 2024, arXiv:2406.06484, with W = 4).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int


def short_convolution(
    x: Float[Array, "*B T C"],
    weight: Float[Array, "W C"],
    *,
    tail: Float[Array, "*B W-1 C"] | None = None,
    real: Bool[Array, "*B T"] | None = None,
    ids: Int[Array, "*B T"] | None = None,
) -> tuple[Float[Array, "*B T C"], Float[Array, "*B W-1 C"]]:
    """The convolution of `x`, and the last W - 1 inputs, the `tail` of what comes next.

    Args:
      tail: inputs before the first; zeros by default.
      real: False where a position is padding, which is taken as zero.
      ids: documents (`Segments`); no weight reaches from one into the next.

    Raises:
      ValueError: weights of another width than x, or a tail of another shape.
    """
    if weight.ndim != 2 or weight.shape[-1] != x.shape[-1]:
        raise ValueError(f"weight: expected (W, {x.shape[-1]}), got shape {weight.shape}.")
    width, length, axis = weight.shape[0], x.shape[-2], x.ndim - 2
    shape = (*x.shape[:-2], width - 1, x.shape[-1])
    tail = jnp.zeros(shape, x.dtype) if tail is None else tail
    if tail.shape != shape:
        raise ValueError(f"tail: expected shape {shape}, got {tail.shape}.")
    if real is not None:
        x = jnp.where(real[..., None], x, jnp.zeros((), x.dtype))
    joined = jnp.concatenate([tail.astype(x.dtype), x], axis)
    out = jnp.zeros_like(x)
    for back in range(width):
        first = width - 1 - back
        moved = jax.lax.slice_in_dim(joined, first, first + length, axis=axis)
        if ids is not None and back:
            same = jnp.pad(ids, _before(ids, back), mode="edge")[..., :length] == ids
            moved = jnp.where(same[..., None], moved, jnp.zeros((), x.dtype))
        gain = weight[back].astype(x.dtype)
        out = out + moved * jnp.expand_dims(gain, range(x.ndim - 1))
    return out, jax.lax.slice_in_dim(joined, length, length + width - 1, axis=axis)


def _before(ids: Array, steps: int) -> list[tuple[int, int]]:
    return [(0, 0)] * (ids.ndim - 1) + [(steps, 0)]


class ShortConvolution(nnx.Module):
    """A short causal convolution and SiLU; `weight` "W C" is drawn from U(-W^-1/2, W^-1/2)."""

    def __init__(self, width: int, features: int, *, rngs: nnx.Rngs) -> None:
        if width < 1:
            raise ValueError(f"width: expected a positive int, got {width}.")
        bound = width**-0.5
        drawn = jax.random.uniform(rngs.params(), (width, features), minval=-bound, maxval=bound)
        self.weight = nnx.Param(drawn)

    def __call__(self, x: Float[Array, "*B T C"], **options: Any) -> tuple[Array, Array]:
        """The activated convolution and the new tail."""
        out, tail = short_convolution(x, self.weight[...], **options)
        return jax.nn.silu(out), tail
