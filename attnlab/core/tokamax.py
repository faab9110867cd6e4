"""tokamax's attention, behind attnlab's front door: the calls it answers exactly as we do.

tokamax (github.com/openxla/tokamax, an optional extra) holds the kernels that JAX points to for
plain attention: for Hopper and Blackwell GPUs (Mosaic), older GPUs (Triton) and TPUs (splash).
Its function takes an array to add and a cap to the scores, an array of booleans, a causal mask, a
window and key lengths; it hands back no log-sum-exp.  What differs from attnlab is put right here:

* A query that may see nothing would get a mean of values: it is shown something, then zeroed.
* A NaN in a key or value would reach queries that may not see it: it is taken out, then put back
  for those that may.  Where the visible keys of a query form an interval that takes O(T + S).

float32 is multiplied as `jax_default_matmul_precision` says, as everywhere in JAX.
"""

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attnlab.core.bands import Band, band_of, some_between
from attnlab.core.normalizers import Softmax
from attnlab.core.reference import Call, bad_rows, heads_first, zero_bad
from attnlab.core.scores import SoftCap, apply_modifiers
from attnlab.core.terms import axes_of, restrict

# What tokamax is asked for on each platform.  Its own choice would end in "xla", which holds all
# scores; where its kernels cannot serve a call we say so instead.
_KERNELS = {"gpu": ("mosaic", "triton"), "tpu": ("mosaic",), "cpu": ("xla_chunked",)}


def tokamax_missing() -> str | None:
    """Why tokamax cannot be had here, or None."""
    if importlib.util.find_spec("tokamax") is None:
        return "needs the extra attnlab[tokamax]"
    if _platform() not in _KERNELS:
        return f"has no kernels for {_platform()}"
    return None


def tokamax_limits(call: Call, return_lse: bool = False) -> str | None:
    """What keeps tokamax from serving a call with attnlab's answer, or None.

    Its kernels have limits of their own, which it tells, and we pass on, when they are traced.
    """
    kind = type(call.normalizer).__name__
    if not isinstance(call.normalizer, Softmax):
        return f"normalizes by softmax only, not by {kind}"
    if call.normalizer.sink is not None:
        return "gives no log-sum-exp, without which a sink cannot be joined"
    if return_lse:
        return "gives no log-sum-exp"
    if call.dropout_rate:
        return "has no dropout"
    if call.query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"takes float32, bfloat16 and float16 only, not {call.query.dtype}"
    if call.query.dtype == jnp.float16 and _platform() == "cpu":
        return "cannot multiply float16 on a CPU"
    if 0 in call.query.shape:
        return "takes no batch of size 0"
    additive, cap = _split(call)
    for modifier in additive:
        if not modifier.additive:
            return f"adds to scores, then caps them, which {type(modifier).__name__} does not"
    if cap is not None and (isinstance(cap.cap, jax.core.Tracer) or np.size(cap.cap) != 1):
        return "takes a soft cap that is one number, not one per head or one that is traced"
    if _platform() == "tpu" and additive:
        return "adds nothing to scores on a TPU"
    if _platform() == "tpu" and call.query.dtype == jnp.float16:
        return "takes bfloat16 and float32 only on a TPU"
    return tokamax_missing()


def tokamax_attention(call: Call) -> tuple[Float[Array, "*B N T D"], None]:
    """`tokamax.dot_product_attention`, made to treat empty rows and NaN as attnlab does.

    Modifiers are written out as a "*B N T S" array.  So are masks, unless they are an intersection
    of causal, window, prefix and key padding in which no row can be left without a key.

    Raises:
      NotImplementedError: tokamax's kernels do not serve the call on this device, or not backward.
    """
    batch, (rows, cols) = call.query.shape[:-3], call.lengths
    flat = math.prod(batch)
    query, key, value = (
        zero_bad(x).reshape(flat, *x.shape[-3:]) for x in (call.query, call.key, call.value)
    )
    bad_query = bad_rows(call.query).reshape(flat, -1, rows)
    bad = (bad_rows(call.key) | bad_rows(call.value)).reshape(flat, -1, cols)
    bad = jnp.repeat(bad, query.shape[-3] // bad.shape[-2], axis=-2)

    bias, alive = _bias(call, (flat, query.shape[-3], rows, cols))
    band = _band(call)
    visible: Bool[Array, "B N T S"] | None = None
    if band is None or alive is not None:
        visible = _batched(call.allowed(call.tile(0, 0, rows, cols)), batch)
        visible = jnp.broadcast_to(visible, (*visible.shape[:-2], rows, cols))
        seen = jnp.any(visible if alive is None else visible & alive, axis=-1)
        touched = jnp.any(bad[..., None, :] & visible, axis=-1)
    else:
        first, last = band.rows(rows, cols)
        seen = last > first
        touched = some_between(bad, first, last)
    options: dict[str, Any] = {"scale": call.scale, "implementation": _KERNELS[_platform()]}
    mask = lengths = None
    if band is not None:
        lengths = band.lengths if band.lengths is None else jnp.maximum(band.lengths, 1)
        options |= _banded(band, rows, cols)
    elif visible is not None:
        mask = visible | ~jnp.any(visible, axis=-1, keepdims=True)
    if (cap := _split(call)[1]) is not None:
        options["logits_soft_cap"] = float(np.reshape(cap.cap, ()))
    arrays = (heads_first(query), heads_first(key), heads_first(value), bias)
    out = _run(arrays, mask, lengths, options)
    out = heads_first(out).astype(call.accumulator)
    touched = (touched | bad_query) & seen
    out = jnp.where(seen[..., None], out, 0)
    out = jnp.where(touched[..., None], jnp.nan, out)
    return out.reshape(*batch, *out.shape[1:]), None


def _band(call: Call) -> Band | None:
    """The mask as tokamax takes it without writing it out, or None."""
    band = band_of(call)
    if band is None or not band.fills(*call.lengths):
        return None
    plain = band.left is None and band.right in (None, 0) and band.lengths is None
    return band if plain or _platform() != "tpu" else None


def _banded(band: Band, rows: int, cols: int) -> dict[str, Any]:
    """A band in tokamax's arguments; `lengths` apart."""
    if band.left is None and band.right is None:
        return {}
    if band.left is None and band.right == 0:
        return {"is_causal": True}
    sides = (band.left, band.right)  # as far as all rows and columns together is no bound
    return {"local_window_size": tuple(rows + cols if side is None else side for side in sides)}


# -- scores ----------------------------------------------------------------------------------------


def _split(call: Call) -> tuple[tuple, SoftCap | None]:
    """What is added to scores, and the cap that is applied last."""
    if call.modifiers and type(call.modifiers[-1]) is SoftCap:
        return call.modifiers[:-1], call.modifiers[-1]
    return call.modifiers, None


def _bias(
    call: Call, full: tuple[int, ...]
) -> tuple[Float[Array, "B N T S"] | None, Bool[Array, "B N T S"] | None]:
    """What is added to the scores, and, unless a cap follows, where that is above -inf."""
    modifiers, cap = _split(call)
    if not modifiers:
        return None, None
    rows, cols = call.lengths
    tile = call.tile(0, 0, rows, cols)
    zeros = jnp.zeros((*call.query.shape[:-3], *full[1:]), call.accumulator)
    bias = apply_modifiers(restrict(modifiers, axes_of(modifiers), tile), zeros, tile.at())
    # Whatever stands at a masked pair must not reach a gradient.
    bias = jnp.where(call.allowed(tile), bias, 0).reshape(full)
    alive = bias > -jnp.inf
    # A row of -inf would become NaN: let it be finite, and zeroed afterwards.
    bias = jnp.maximum(bias, jnp.finfo(bias.dtype).min / 2)
    return bias, alive if cap is None else None


def _batched(x: Array, batch: tuple[int, ...]) -> Array:
    """An array "*#B N T S" with one batch axis, of length 1 if all were."""
    lead = x.shape[:-3]
    if math.prod(lead) != 1:
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


# -- the call --------------------------------------------------------------------------------------


def _run(arrays: tuple, mask: Any, lengths: Any, options: dict[str, Any]) -> Array:
    """The function of tokamax, with its errors told in our words, forward and backward."""

    def call(arrays: tuple, mask: Any, lengths: Any) -> Array:
        from tokamax import dot_product_attention

        query, key, value, bias = arrays
        return dot_product_attention(
            query, key, value, bias, mask, key_value_seq_lengths=lengths, **options
        )

    @jax.custom_vjp
    def run(arrays: tuple, mask: Any, lengths: Any) -> Array:
        with _speaking("this call"):
            return call(arrays, mask, lengths)

    def forward(arrays: tuple, mask: Any, lengths: Any) -> tuple[Array, Any]:
        with _speaking("this call"):
            return jax.vjp(lambda arrays: call(arrays, mask, lengths), arrays)

    def backward(pull: Any, cotangent: Array) -> tuple:
        with _speaking("the gradients of this call"):
            return (*pull(cotangent), None, None)

    run.defvjp(forward, backward)
    return run(arrays, mask, lengths)


@contextlib.contextmanager
def _speaking(what: str) -> Iterator[None]:
    """Promotion, which a caller may have forbidden, is allowed; a refusal is told in our words."""
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    except (NotImplementedError, ExceptionGroup) as refusal:
        errors = list(refusal.exceptions) if isinstance(refusal, ExceptionGroup) else [refusal]
        if not all(isinstance(error, NotImplementedError) for error in errors):
            raise
        reasons = "; ".join(str(error).rstrip(".") for error in errors)
        raise NotImplementedError(
            f'implementation="tokamax" cannot serve {what} with its kernels here ({reasons}); '
            'implementation="blockwise" can.'
        ) from refusal


def _platform() -> str:
    platform = jax.extend.backend.get_default_device().platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
