"""The front door: one function, several implementations, the same answer from each."""

import contextvars
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from attnlab.core.blockwise import blockwise_attention
from attnlab.core.choice import Choice, availability, choose, limits
from attnlab.core.inputs import DEFAULTS, IMPLEMENTATIONS, check_inputs, prepare
from attnlab.core.kernels import BACKENDS, kernel_attention
from attnlab.core.library import library_attention, without_gradient
from attnlab.core.masks import Blocks, Causal, Full, Mask, as_mask
from attnlab.core.normalizers import Normalizer, Softmax
from attnlab.core.reference import Call, heads_first, join_extra, reference_attention
from attnlab.core.scores import ScoreModifier
from attnlab.core.terms import accumulator
from attnlab.core.tokamax import tokamax_attention

# What computes a call in place of `solve`, and explains it; `attnlab.distributed.over` puts a mesh.
spread: contextvars.ContextVar[Any] = contextvars.ContextVar("spread", default=None)

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "attention",
    "availability",
    "block_sparse_attention",
    "check_inputs",
    "explain",
    "log_num_visible",
    "mean_visible",
]


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
      implementation: "reference" (O(T S) memory); "blockwise" (O(T + S), any device); the fused
        kernels "triton" (NVIDIA GPUs from Ampere on), "mosaic_gpu" (Hopper) and "tpu", O(T + S);
        "xla" and "cudnn" (those of `jax.nn.dot_product_attention`); "tokamax" (that library's, an
        optional extra); or "auto": ask `explain` what that takes.
      block_sizes: rows and columns of a tile, for "blockwise" and the kernels; chosen by cost,
        or by device and widths, if left out.

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
    call, implementation = prepare(
        query, key, value, mask, modifiers, normalizer, scale, query_offset, key_offset,
        dropout_rate, dropout_key, return_lse, implementation, block_sizes,
    )  # fmt: skip
    extra = call.normalizer.log_extra()
    run = spread.get() or solve
    out, lse = run(call, implementation, block_sizes, return_lse or extra is not None)
    if extra is not None:
        out, lse = join_extra(out, lse, extra)
    out = heads_first(out).astype(call.query.dtype)
    return (out, lse) if return_lse else out


def solve(
    call: Call, implementation: str, block_sizes: tuple[int, int] | None, with_lse: bool
) -> tuple[Any, Any]:
    """Output "*B N T D" and log-sum-exp "*B N T" of a call, on the devices its arrays are on.

    The log-sum-exp may be None, or without a gradient, unless `with_lse`.
    """
    if implementation == "auto":
        implementation = choose(call, with_lse).implementation
    limit = limits(call, implementation, with_lse, block_sizes)
    if limit:
        raise NotImplementedError(
            f'implementation="{implementation}" {limit}; implementation="blockwise" can.'
        )
    if implementation in ("xla", "cudnn"):
        out, lse = library_attention(call, implementation)
        return out, without_gradient(lse, call.query) if with_lse else lse
    if implementation == "tokamax":
        return tokamax_attention(call)  # a call that needs its lse was refused
    call = without_sink(call)
    if implementation == "blockwise":
        return blockwise_attention(call, block_sizes)
    if implementation in BACKENDS:
        return kernel_attention(call, implementation, block_sizes)
    return reference_attention(call)


def without_sink(call: Call) -> Call:
    """A sink is joined at the end; what computes the rest need not know of it."""
    if isinstance(call.normalizer, Softmax) and call.normalizer.sink is not None:
        return call._replace(normalizer=Softmax())
    return call


def explain(query: Any, key: Any, value: Any, **options: Any) -> Choice:
    """What `attention(query, key, value, **options)` would run, and why.

    Arrays may be `jax.ShapeDtypeStruct`s; nothing is computed.  Where
    `attnlab.distributed` spreads calls, it is what a device runs, and the reason says how.
    """
    return_lse = bool(options.get("return_lse", False))

    def look(query: Any, key: Any, value: Any) -> None:
        call, implementation = prepare(
            query, key, value, *(options.pop(name, default) for name, default in DEFAULTS)
        )
        if options:
            raise TypeError(f"explain: unexpected options {sorted(options)}.")
        across = spread.get()
        ask = choice if across is None else across.explain
        found.append(ask(call, implementation, return_lse))

    found: list[Choice] = []
    jax.eval_shape(look, query, key, value)
    return found[0]


def choice(call: Call, implementation: str, return_lse: bool) -> Choice:
    """What serves a call on the devices that its arrays are on, and why."""
    found = choose(call, return_lse)
    if implementation == "auto":
        return found
    return Choice(implementation, "it was asked for", found.rejected)


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
    empty = jnp.zeros((*key.shape[:-1], 1), query.dtype)
    _, lse = _evenly(query, empty, mask, options | {"return_lse": True})
    return jnp.where(jnp.isfinite(lse), lse, 0)


def mean_visible(query: Any, value: Any, *, mask: Any = None, **options: Any) -> Array:
    """Mean of the values "*B S K D" of the keys that each query may see: "*B T N D"; 0 for none.

    It is attention with scores of zero, by whichever implementation `options` ask for.
    """
    return _evenly(query, value, mask, options | {"return_lse": False})


def _evenly(query: Any, value: Any, mask: Any, options: dict[str, Any]) -> Any:
    """Attention with scores of zero, and what of a call's options that understands."""
    kept = ("query_offset", "key_offset", "implementation", "block_sizes", "return_lse")
    zeros = (jnp.zeros((*x.shape[:-1], 1), value.dtype) for x in (query, value))
    known = {name: options[name] for name in kept if name in options}
    return attention(*zeros, value, mask=mask, **known)


def block_sparse_attention(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    value: Shaped[Array, "..."],
    index: Int[Array, "*B N I M"],
    *,
    block_sizes: tuple[int, int] = (128, 128),
    mask: Any = None,
    **options: Any,
) -> Any:
    """Attention in which each block of queries meets the listed blocks of keys only.

    What a selector (top-k, routing) found: query block i of a head meets the key blocks
    `index[..., i, :]`; -1 fills shorter lists.  Lists may be traced: other lists run without
    another compilation, and in the fused kernels blocks that are not listed cost nothing.
    Gradients reach query, key, value and everything in `options`; the lists have none.

    Args:
      query, key, value: "*B T N H", "*B S K H", "*B S K D", as for `attention`.
      index: integers "*B N I M" with I = ceil(T / block_sizes[0]); axes B and N may be 1 or absent.
      block_sizes: queries and keys of one block.
      mask: narrows what the lists allow.
      options: as for `attention`.

    Returns:
      "*B T N D", or with the log-sum-exp "*B N T", as `attention` does.

    Raises:
      TypeError: as for `attention`.
      ValueError: a block that is not -1 and not one of the ceil(S / block_sizes[1]) key blocks
        (under `jit` numbers are not known; one out of range meets nothing), or shapes that do not
        fit.
    """
    check_inputs(query, key, value)
    num_blocks = -(-key.shape[-3] // max(block_sizes[1], 1))  # sizes below 1 are refused next
    blocks: Mask = Blocks.from_lists(index, num_blocks, block_sizes)
    if mask is not None:
        blocks = blocks & as_mask(mask)
    return attention(query, key, value, mask=blocks, **options)
