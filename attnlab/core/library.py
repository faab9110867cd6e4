"""The implementations that come with JAX, behind attnlab's front door."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.core.masks import Causal, Full
from attnlab.core.normalizers import Softmax, SoftmaxPlusOne
from attnlab.core.reference import Call, heads_first, zero_bad
from attnlab.core.scores import apply_modifiers
from attnlab.core.terms import axes_of, restrict


def library_limits(call: Call, implementation: str) -> str | None:
    """What keeps `jax.nn.dot_product_attention` from serving a call, or None."""
    kind = type(call.normalizer).__name__
    if not isinstance(call.normalizer, Softmax | SoftmaxPlusOne):
        return f"normalizes by softmax only, not by {kind}"
    for modifier in call.modifiers:
        if not modifier.additive:
            return f"only adds to scores, which {type(modifier).__name__} does not"
    if call.dropout_rate:
        return "has no dropout"
    if call.query.ndim > 4:
        return "takes at most one batch axis"
    if call.value.shape[-1] != call.query.shape[-1]:
        return f"needs values as wide as keys, got {call.value.shape[-1]}, {call.query.shape[-1]}"
    if call.query.dtype == jnp.float64:
        return "computes in float32, which would lose precision of float64"
    if call.query.dtype == jnp.float16 and jax.default_backend() == "cpu":
        return "cannot multiply float16 on a CPU"
    if implementation == "cudnn" and call.query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16 only, not {call.query.dtype}"
    return None


@jax.custom_vjp
def without_gradient(lse: Array, query: Array) -> Array:
    """`lse` as it is; asking for its gradient is an error, where `jax.nn` would answer zero."""
    return lse


def _refuse(_: Any, cotangent: Array) -> Any:
    raise NotImplementedError(
        'implementation="xla" and "cudnn" have no gradient of the log-sum-exp (jax.nn stops it), '
        'which this normalizer or loss needs; implementation="blockwise" can.'
    )


without_gradient.defvjp(lambda lse, query: (lse, None), _refuse)


def library_attention(
    call: Call, implementation: str
) -> tuple[Float[Array, "*B N T D"], Float[Array, "*B N T"]]:
    """`jax.nn.dot_product_attention`, but with zeros in rows that may see no key.

    The mask and the modifiers are written out as "*B N T S" arrays, except for a causal mask.
    """
    tile = call.tile(0, 0, *call.lengths)
    batch = call.query.shape[:-3]
    full = (*batch, call.query.shape[-3], *call.lengths)
    bias = mask = None
    if call.modifiers:
        modifiers = restrict(call.modifiers, axes_of(call.modifiers), tile)
        zeros = jnp.zeros(full, call.accumulator)
        bias = apply_modifiers(modifiers, zeros, tile.at())
    offsets = (call.query_offset, call.key_offset)
    unmoved = all(isinstance(o, int) and o == 0 for o in offsets)
    plain_causal = isinstance(call.mask, Causal) and unmoved
    if not plain_causal and not isinstance(call.mask, Full):
        mask = jnp.broadcast_to(call.allowed(tile), full)
    query, key, value = call.query, call.key, call.value
    bad = None
    if implementation == "xla":
        # Zero times NaN is NaN in a product, so bad keys are taken out and put back per row.
        whole = jnp.concatenate([key, value], axis=-1)
        bad = ~jnp.all(jnp.isfinite(whole), axis=-1)[..., None, :]
        key, value = zero_bad(key), zero_bad(value)
    # jax.nn relies on implicit promotion, which a caller may have forbidden.
    with jax.numpy_dtype_promotion("standard"):
        out, lse = jax.nn.dot_product_attention(
            heads_first(query),
            heads_first(key),
            heads_first(value),
            bias,
            mask,
            scale=call.scale,
            is_causal=plain_causal,
            implementation=implementation,  # type: ignore[call-overload]
            return_residual=True,
        )
    out = heads_first(out).astype(call.accumulator)
    lse = jnp.swapaxes(lse, -1, -2).astype(call.accumulator)
    if mask is not None:
        seen = jnp.any(mask, axis=-1)
        out = jnp.where(seen[..., None], out, 0)
        lse = jnp.where(seen, lse, -jnp.inf)
    if bad is not None:
        repeats = full[-3] // bad.shape[-3]
        touched = jnp.repeat(bad, repeats, axis=-3)
        visible = call.allowed(tile) if plain_causal else mask
        touched = touched if visible is None else touched & visible
        touched = jnp.broadcast_to(jnp.any(touched, axis=-1), lse.shape)
        out = jnp.where(touched[..., None], jnp.nan, out)
        lse = jnp.where(touched, jnp.nan, lse)
    return out, lse
