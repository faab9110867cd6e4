"""The front door: one function, several implementations, the same answer from each."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from attnlab.core.blockwise import blockwise_attention
from attnlab.core.dropout import key_words
from attnlab.core.kernels import BACKENDS, kernel_attention, kernel_limits, missing
from attnlab.core.library import library_attention, library_limits
from attnlab.core.masks import (
    Causal,
    Full,
    KeyPadding,
    Mask,
    QueryPadding,
    SlidingWindow,
    as_mask,
    check_mask,
)
from attnlab.core.normalizers import Normalizer, Softmax
from attnlab.core.reference import (
    Call,
    default_scale,
    heads_first,
    join_extra,
    reference_attention,
)
from attnlab.core.scores import Bias, ScoreModifier, Temperature, as_modifiers
from attnlab.core.terms import accumulator, axes_of, check_leaves

Implementation = Literal[
    "auto", "reference", "blockwise", "xla", "cudnn", "triton", "mosaic_gpu", "tpu"
]
IMPLEMENTATIONS = ("reference", "blockwise", "xla", "cudnn", *BACKENDS)

# Up to this many scores, holding them all (16 MB of float32) is faster than recomputing them.
_SMALL = 2**22


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `implementation="auto"` takes for a call, why, and why not the others."""

    implementation: str
    reason: str
    rejected: dict[str, str]


def availability() -> dict[str, str | None]:
    """For each implementation, None if it can run on this machine, else the reason it cannot."""
    platforms = {device.platform for device in jax.devices()}
    cudnn = None
    if not platforms & {"gpu", "cuda"}:
        cudnn = f"needs an NVIDIA GPU; the devices here are {', '.join(sorted(platforms))}"
    kernels = {name: missing(name) for name in BACKENDS}
    return {"reference": None, "blockwise": None, "xla": None, "cudnn": cudnn, **kernels}


def attention(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    value: Shaped[Array, "..."],
    *,
    mask: Mask | Shaped[Array, "..."] | None = None,
    modifiers: ScoreModifier | tuple[ScoreModifier, ...] | list[ScoreModifier] = (),
    normalizer: Normalizer | None = None,
    scale: Any = None,
    query_offset: Any = 0,
    key_offset: Any = 0,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    return_lse: bool = False,
    implementation: str = "auto",
    block_sizes: tuple[int, int] | None = None,
) -> Any:
    r"""Attention: score, restrict, normalize, mix.

        s_ij = modifiers(scale * q_i . k_j);  w_i = normalize(s_i over the keys that i may see)
        out_i = sum_j w_ij v_j

    Axes: *B any leading batch axes, T queries, S keys, N query heads, K key heads (N a multiple of
    K; consecutive query heads share one), H key width, D value width.

    Args:
      query, key, value: "*B T N H", "*B S K H", "*B S K D", floating-point, of one dtype.
      mask: which pairs may meet (`attnlab.masks`), or a boolean array that broadcasts to
        "*B N T S"; True where a query may look.  None: everywhere.
      modifiers: one score modifier or several, applied in order (`attnlab.scores`).
      normalizer: how scores become weights (`attnlab.normalizers`); softmax by default.
      scale: multiplies the products; 1/sqrt(H) by default.  A number or a scalar array.
      query_offset, key_offset: absolute position of the first query and of the first key, seen by
        masks and modifiers; integers, possibly traced.  Decoding with a cache of n keys:
        `query_offset=n`.
      dropout_rate: probability of dropping a weight; needs `dropout_key`.  The same pairs are
        dropped by every implementation that supports dropout.
      return_lse: also return the logarithm of each row's normalizing sum, "*B N T"; -inf for a row
        that sees no key.
      implementation: "reference" (O(T S) memory), "blockwise" (O(T + S)), "xla" and "cudnn"
        (those of `jax.nn.dot_product_attention`), or "auto"; ask `explain` what that takes.
      block_sizes: rows and columns of a tile, for "blockwise"; chosen by cost if left out.

    Returns:
      "*B T N D" in the dtype of `query`, accumulated in float32 at least.  A query that may see no
      key gets zeros, with zero gradient; `jax.nn`, Flax and Equinox return the mean of the values.
      NaN or infinity in a key or value reaches only the queries that may see it.

    Raises:
      TypeError: an input is not an array, not floating-point, or of another dtype than `query`.
      ValueError: shapes that do not fit, an unknown implementation or option.
      NotImplementedError: the implementation named cannot serve this call, or not on this machine;
        the message names one that can.
    """
    call, implementation = _prepare(
        query, key, value, mask, modifiers, normalizer, scale, query_offset, key_offset,
        dropout_rate, dropout_key, return_lse, implementation, block_sizes,
    )  # fmt: skip
    if implementation == "auto":
        implementation = _choose(call).implementation
    limit = _limits(call, implementation)
    if limit:
        raise NotImplementedError(
            f'implementation="{implementation}" {limit}; implementation="blockwise" can.'
        )
    normalizer = call.normalizer
    extra = normalizer.log_extra()
    if implementation in ("xla", "cudnn"):
        out, lse = library_attention(call, implementation)
    else:
        bare = call
        if isinstance(normalizer, Softmax) and normalizer.sink is not None:
            # The sink is joined below; the fold need not know of it.
            bare = call._replace(normalizer=Softmax())
        if implementation == "blockwise":
            out, lse = blockwise_attention(bare, block_sizes)
        elif implementation in BACKENDS:
            out, lse = kernel_attention(bare, implementation, block_sizes)
        else:
            out, lse = reference_attention(bare)
    if extra is not None:
        out, lse = join_extra(out, lse, extra)
    out = heads_first(out).astype(call.query.dtype)
    return (out, lse) if return_lse else out


def explain(query: Any, key: Any, value: Any, **options: Any) -> Choice:
    """What `attention(query, key, value, **options)` would run, and why.

    Arrays may be `jax.ShapeDtypeStruct`s; nothing is computed.
    """

    def look(query: Any, key: Any, value: Any) -> None:
        call, implementation = _prepare(
            query, key, value, *(options.pop(name, default) for name, default in _DEFAULTS)
        )
        if options:
            raise TypeError(f"explain: unexpected options {sorted(options)}.")
        choice = _choose(call)
        if implementation != "auto":
            choice = Choice(implementation, "it was asked for", choice.rejected)
        found.append(choice)

    found: list[Choice] = []
    jax.eval_shape(look, query, key, value)
    return found[0]


def log_num_visible(query: Any, key: Any, *, mask: Any = None, **options: Any) -> Array:
    """Logarithm of the number of keys each query may see: "*B N T", float32 at least; 0 for none.

    A formula for no mask and for a causal one; otherwise the log-sum-exp of attention with scores
    of zero, by whichever implementation `options` ask for, so memory stays that of attention.
    """
    dtype = accumulator(query.dtype)
    mask = Full() if mask is None else as_mask(mask)
    shape = (*query.shape[:-3], query.shape[-2], query.shape[-3])
    num_keys = key.shape[-3]
    if isinstance(mask, Full):
        return jnp.full(shape, math.log(num_keys), dtype)
    if isinstance(mask, Causal):
        first = options.get("query_offset", 0) - options.get("key_offset", 0)
        seen = jnp.arange(query.shape[-3], dtype=jnp.int32) + first + 1
        seen = jnp.clip(seen, 1, num_keys).astype(dtype)
        return jnp.broadcast_to(jnp.log(seen).reshape((1,) * (len(shape) - 1) + (-1,)), shape)
    kept = ("query_offset", "key_offset", "implementation", "block_sizes")
    zeros = jnp.zeros((*query.shape[:-1], 1), dtype)
    empty = jnp.zeros((*key.shape[:-1], 1), dtype)
    _, lse = attention(
        zeros, empty, empty, mask=mask, return_lse=True,
        **{name: options[name] for name in kept if name in options},
    )  # fmt: skip
    return jnp.where(jnp.isfinite(lse), lse, 0)


_DEFAULTS = (
    ("mask", None), ("modifiers", ()), ("normalizer", None), ("scale", None), ("query_offset", 0),
    ("key_offset", 0), ("dropout_rate", 0.0), ("dropout_key", None), ("return_lse", False),
    ("implementation", "auto"), ("block_sizes", None),
)  # fmt: skip


def _limits(call: Call, implementation: str) -> str | None:
    """Why an implementation cannot serve this call, or None."""
    if implementation in ("xla", "cudnn"):
        absent = availability()[implementation]
        return absent or library_limits(call, implementation)
    if implementation in BACKENDS:
        return missing(implementation) or kernel_limits(call, implementation)
    return None


def _choose(call: Call) -> Choice:
    rejected = {}
    for name in ("xla", "cudnn"):
        limit = _limits(call, name)
        if limit:
            rejected[name] = limit
    scores = math.prod(call.query.shape[:-1]) * call.lengths[1]
    simple_mask = isinstance(call.mask, Full | Causal)
    if "cudnn" not in rejected and simple_mask and not call.modifiers and scores > _SMALL:
        return Choice("cudnn", "a fused GPU kernel serves this call as it is", rejected)
    rejected.setdefault("xla", "holds the whole score matrix and is no faster than the reference")
    rejected.setdefault("cudnn", "is taken for half-precision calls with no or a causal mask")
    if scores <= _SMALL:
        rejected["blockwise"] = "would recompute scores that fit in memory"
        reason = f"the {scores:,} scores fit in memory, and keeping them is fastest"
        return Choice("reference", reason, rejected)
    rejected["reference"] = f"would hold all {scores:,} scores at once"
    return Choice("blockwise", f"{scores:,} scores are too many to hold; exact, O(n)", rejected)


def _prepare(
    query: Any, key: Any, value: Any, mask: Any, modifiers: Any, normalizer: Any, scale: Any,
    query_offset: Any, key_offset: Any, dropout_rate: Any, dropout_key: Any, return_lse: bool,
    implementation: str, block_sizes: Any,
) -> tuple[Call, str]:  # fmt: skip
    """Check every argument, and put heads before positions."""
    query, key, value = check_inputs(query, key, value)
    batch = query.shape[:-3]
    sizes = {"N": query.shape[-2], "T": query.shape[-3], "S": key.shape[-3]}
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f'implementation: expected "auto" or one of {", ".join(IMPLEMENTATIONS)}, '
            f"got {implementation!r}."
        )
    mask = Full() if mask is None else as_mask(mask)
    check_mask(mask, batch, sizes)
    modifiers = as_modifiers(modifiers)
    check_leaves("modifiers", modifiers, axes_of(modifiers), batch, sizes)
    normalizer = Softmax() if normalizer is None else normalizer
    if not isinstance(normalizer, Normalizer):
        raise TypeError(f"normalizer: expected a Normalizer, got {type(normalizer).__name__}.")
    check_leaves("normalizer", normalizer, normalizer.axes(), batch, sizes)
    if return_lse and normalizer.kind != "shared":
        raise ValueError(
            f"return_lse: {type(normalizer).__name__} has no normalizing sum; "
            "use a softmax-like normalizer."
        )
    if block_sizes is not None:
        good = isinstance(block_sizes, tuple) and len(block_sizes) == 2
        if not good or any(not isinstance(b, int) or b < 1 for b in block_sizes):
            raise ValueError(f"block_sizes: expected two positive ints, got {block_sizes!r}.")
    if not isinstance(dropout_rate, float | int) or not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate: expected a number in [0, 1), got {dropout_rate!r}.")
    if dropout_rate and dropout_key is None:
        raise ValueError(f"dropout_key: {dropout_rate=} needs a JAX random key, got None.")
    words = key_words(dropout_key) if dropout_rate else None
    scale, modifiers = _check_scale(scale, query.shape[-1], modifiers)
    call = Call(
        heads_first(query), heads_first(key), heads_first(value), modifiers, normalizer, mask,
        _check_offset("query_offset", query_offset), _check_offset("key_offset", key_offset),
        words, scale, float(dropout_rate),
    )  # fmt: skip
    return call, implementation


def check_inputs(*inputs: Any) -> list[Array]:
    """Query, key and value as arrays, or the error that `attention` documents."""
    arrays = []
    for name, x, axes in zip(("query", "key", "value"), inputs, _AXES, strict=True):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name}: expected an array {axes}, got {type(x).__name__}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating-point array, got dtype {x.dtype}.")
        if len(x.shape) < 3:
            raise ValueError(f"{name}: expected an array {axes}, got shape {x.shape}.")
        if 0 in x.shape[-3:]:
            raise ValueError(f"{name}: no axis of {axes} may be empty, got shape {x.shape}.")
        arrays.append(jnp.asarray(x))
    query, key, value = arrays
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(
                f"{name}: expected the dtype of query, {query.dtype}, got {x.dtype}; cast one."
            )
        if x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name}: batch axes {x.shape[:-3]} differ from those of query, "
                f"{query.shape[:-3]}, in shapes {x.shape} and {query.shape}."
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key: head width {key.shape[-1]} differs from that of query, {query.shape[-1]}."
        )
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise ValueError(
            f"value: length and heads {value.shape[-3:-1]} differ from those of key, "
            f"{key.shape[-3:-1]}."
        )
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"query: the number of heads, {query.shape[-2]}, should be a multiple of the number of "
            f"key heads, {key.shape[-2]}."
        )
    return arrays


_AXES = ("(*B, T, N, H)", "(*B, S, K, H)", "(*B, S, K, D)")


def _check_offset(name: str, offset: Any) -> Any:
    if isinstance(offset, bool) or not (
        isinstance(offset, int | np.integer)
        or (hasattr(offset, "dtype") and jnp.issubdtype(offset.dtype, jnp.integer))
    ):
        raise TypeError(f"{name}: expected an integer, got {offset!r}.")
    if jnp.ndim(offset):
        raise ValueError(f"{name}: expected a scalar, got shape {jnp.shape(offset)}.")
    return int(offset) if isinstance(offset, int | np.integer) else offset


def _check_scale(scale: Any, width: int, modifiers: Any) -> tuple[float, Any]:
    if scale is None:
        return default_scale(width), modifiers
    if isinstance(scale, int | float | np.floating):
        return float(scale), modifiers
    if not hasattr(scale, "dtype") or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"scale: expected a number or a floating-point array, got {scale!r}.")
    if jnp.ndim(scale):
        raise ValueError(
            f"scale: expected a scalar, got shape {jnp.shape(scale)}; "
            "scale per head or query by attnlab.scores.Temperature."
        )
    # A traced scale may be trainable, so it goes where gradients are taken.
    return 1.0, (Temperature(1 / scale), *modifiers)


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`, served by attnlab: swap the one for the other.

    Shapes, dtypes and the meaning of each argument are those of `jax.nn.dot_product_attention`;
    see there.  What differs: any number of batch axes, a value width unlike the key width,
    `implementation` also takes attnlab's own names (None: "auto"), memory is O(n) at length, and
    rows that may see no key (or lie beyond `query_seq_lengths`) are zeros instead of a mean.

    Args:
      query, key, value: "*B T N H", "*B S K H", "*B S K D".
      bias: added to the scaled scores; broadcasts to "*B N T S".
      mask: boolean, broadcasts to "*B N T S".
      query_seq_lengths, key_value_seq_lengths: integers "*B"; what lies beyond is masked.
      local_window_size: (left, right), or one int for both sides.
      return_residual: also return the log-sum-exp, "*B T N".

    Raises:
      As `attnlab.attention`.
    """
    masks: Mask | None = None if mask is None else as_mask(mask)

    def also(other: Mask) -> Mask:
        return other if masks is None else masks & other

    if is_causal:
        masks = also(Causal())
    if local_window_size is not None:
        window = local_window_size
        left, right = window if isinstance(window, tuple) else (window, window)
        masks = also(SlidingWindow(left, right))
    if key_value_seq_lengths is not None:
        masks = also(KeyPadding(jnp.asarray(key_value_seq_lengths)))
    if query_seq_lengths is not None:
        masks = also(QueryPadding(jnp.asarray(query_seq_lengths)))
    modifiers: tuple[ScoreModifier, ...] = ()
    if bias is not None:
        bias = jnp.asarray(bias)
        modifiers = (Bias(bias.reshape((1,) * max(0, 3 - bias.ndim) + bias.shape)),)
    out = attention(
        query,
        key,
        value,
        mask=masks,
        modifiers=modifiers,
        scale=scale,
        implementation=implementation or "auto",
        return_lse=return_residual,
    )
    if return_residual:
        return out[0], jnp.swapaxes(out[1], -1, -2)
    return out
