r"""Decoding: few queries, a long cache.

One step of decoding reads every key and value once and computes little with them, so what counts is
that nothing is read twice and that the whole machine reads.  Three devices serve that, and all are
the partial-softmax monoid (`attnlab.core.partial`) in other orders:

    split     the keys are divided, each part is attended to on its own, and the parts are merged
              (Dao et al. 2023, "Flash-Decoding")
    paged     keys lie on pages of a pool in any order; only positions matter, not places
              (Kwon et al. 2023, arXiv:2309.06180)
    prefix    keys that the whole batch shares are attended to by the queries of all sequences at
              once, and merged with what each sees of its own: exact, by the log-sum-exps
              (Juravsky et al. 2024, "Hydragen", arXiv:2402.05099)

Masks, modifiers and normalizers are those of `attnlab.attention` and see absolute positions.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.core.decode_fold import fold_parts
from attnlab.core.decode_memory import DecodeCall, Memory, cut_terms, memory_of, prefix_of
from attnlab.core.inputs import check_scale, check_terms
from attnlab.core.kernels import BACKENDS, device, interpreted, missing
from attnlab.core.normalizers import Normalizer, Softmax
from attnlab.core.partial import finish, merge
from attnlab.core.reference import heads_first, join_extra
from attnlab.core.scores import whole_rows

DECODE_IMPLEMENTATIONS = ("blockwise", *BACKENDS)


class Options(NamedTuple):
    """What is static about a call, beside its terms."""

    implementation: str
    splits: int | None
    scale: float
    start: int
    interpreted: bool


def _run(
    options: Options, query: Array, memory: Memory, prefix: Memory | None, terms: Any, first: Array
) -> tuple[Array, Array]:
    mask, modifiers, normalizer = terms
    extra = normalizer.log_extra()
    shared = normalizer.kind == "shared"
    if isinstance(normalizer, Softmax) and normalizer.sink is not None:
        normalizer = Softmax()  # the sink is joined at the end, once
    terms = (mask, modifiers, normalizer)
    calls = []
    for part, start in ((prefix, 0), (memory, options.start)):
        if part is None:
            continue
        own = terms if prefix is None else cut_terms(terms, start, start + part.num_keys)
        calls.append(DecodeCall(query, part, own[1], own[2], own[0], first, start, options.scale))
    if options.implementation == "blockwise":
        parts = [part for call in calls for part in fold_parts(call, options.splits or 1)]
    else:
        from attnlab.core.decode_kernel import kernel_parts

        parts = [
            part
            for call in calls
            for part in kernel_parts(
                call, options.implementation, options.splits, options.interpreted, len(calls) > 1
            )
        ]
    if shared:
        out, lse = finish(functools.reduce(merge, parts))
    else:
        out = functools.reduce(jnp.add, [part.acc for part in parts])
        lse = jnp.zeros(out.shape[:-1], out.dtype)
    if extra is not None:
        out, lse = join_extra(out, lse, extra)
    return out, lse


_guarded = jax.custom_jvp(_run, nondiff_argnums=(0,))


@_guarded.defjvp
def _no_derivative(options: Options, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "decode_attention has no derivative (a cache may be int8, and pages are shared); "
        "differentiate attnlab.attention, which has all of them."
    )


_solve = jax.jit(_guarded, static_argnums=0)


def decode_attention(
    query: Any,
    cache: Any,
    *,
    lengths: Any = None,
    prefix: Any = None,
    mask: Any = None,
    modifiers: Any = (),
    normalizer: Normalizer | None = None,
    scale: Any = None,
    return_lse: bool = False,
    implementation: str = "auto",
    num_splits: int | None = None,
) -> Any:
    """Attention of the last T tokens of each sequence over all of them, kept in a cache.

    What `attnlab.attention` gives on the keys and values in order, where sequence b has P keys of
    the shared prefix and then `lengths[b]` of its own, and its query t is at position
    P + lengths[b] - T + t: the tokens that ask are in the cache already.  Masks and modifiers see
    these positions; arrays with an axis S have one entry for each of the P keys of the prefix and
    of the S that the cache has room for.  With T > 1 it is `mask=attnlab.masks.Causal()` that keeps
    the order.

    Axes: *B any batch axes, T queries, S keys the cache has room for, N query heads, K key heads,
    H key width, D value width.

    Args:
      query: "*B T N H".
      cache: `attnlab.PagedKVCache`, `attnlab.KVCache`, or keys "*B S K H" and values "*B S K D",
        as arrays of the query's dtype or `attnlab.quantize`d to int8.
      lengths: how many keys each sequence has, "*B" or one for all; what the cache says by default,
        or S.  What lies beyond, also NaN, has no influence.
      prefix: keys "P K H" and values "P K D" that every sequence begins with, arrays or quantized.
        They are read once for the whole batch.
      mask, modifiers, normalizer, scale, return_lse: as for `attnlab.attention`.
      implementation: "blockwise" (plain JAX, any device), or the kernels "triton" (NVIDIA GPUs),
        "mosaic_gpu" (Hopper; no int8) and "tpu"; "auto" takes the kernel of the device where it
        can serve the call.
      num_splits: into how many parts to divide the keys (and those of the prefix); chosen by
        the device and by what there is to do if left out.  "tpu" does not divide.

    Returns:
      "*B T N D" in the dtype of `query`; with `return_lse` the log-sum-exp "*B N T" as well.  A
      sequence without keys gets zeros.

    A table entry beyond the pool is an error where the table is known; under `jit` it is taken for
    the last page, and a missing one (-1) within the length of a sequence for the first, so nothing
    is read from outside of the pool.

    "triton" reads the cache in place if the widths are powers of two and, without pages, if S is a
    multiple of 16; else, and for "mosaic_gpu" and "tpu" with keys "*B S K H", XLA copies it.  The
    pool of a `PagedKVCache` is laid out for all of them.

    Raises:
      TypeError: inputs that are not arrays or caches, or of other dtypes than `query`.
      ValueError: shapes that do not fit, lengths or pages beyond what there is, an unknown option.
      NotImplementedError: what the implementation named cannot do, or not on this machine;
        derivatives.
    """
    query = _check_query(query)
    batch, heads = query.shape[:-3], query.shape[-2]
    memory = memory_of(cache, lengths, query)
    shared = None if prefix is None else prefix_of(prefix, query, memory)
    start = 0 if shared is None else shared.num_keys
    sizes = {"N": heads, "T": query.shape[-3], "S": start + memory.num_keys}
    mask, modifiers, normalizer = check_terms(mask, modifiers, normalizer, batch, sizes, return_lse)
    needy = type(normalizer).__name__ if normalizer.kind == "row" else whole_rows(modifiers)
    if needy:
        raise NotImplementedError(
            f"decode_attention streams over keys, which {needy} does not; "
            'attnlab.attention(implementation="reference") can.'
        )
    if num_splits is not None and (not isinstance(num_splits, int) or num_splits < 1):
        raise ValueError(f"num_splits: expected a positive int, got {num_splits!r}.")
    factor, modifiers = check_scale(scale, query.shape[-1], modifiers)
    length: Any = memory.num_keys if memory.length is None else memory.length
    first = jnp.broadcast_to(jnp.asarray(length, jnp.int32), batch) + (start - query.shape[-3])
    query = heads_first(query)
    terms = jax.tree.map(jnp.asarray, (mask, modifiers, normalizer))
    arrays = (query, memory, shared, terms, first)
    taken = _implementation(implementation, arrays, num_splits)
    options = Options(taken, num_splits, factor, start, interpreted())
    out, lse = _solve(options, *arrays)
    out = heads_first(out).astype(query.dtype)
    return (out, lse) if return_lse else out


def _implementation(name: str, arrays: Any, num_splits: int | None) -> str:
    """The implementation that is asked for, or the best that can serve the call."""
    from attnlab.core.decode_kernel import kernel_limit

    if name not in ("auto", *DECODE_IMPLEMENTATIONS):
        raise ValueError(
            f'implementation: expected "auto" or one of {", ".join(DECODE_IMPLEMENTATIONS)}, got '
            f"{name!r}."
        )
    if name == "auto":
        platform = device()[0]
        best = {"gpu": "triton", "tpu": "tpu"}.get(platform)
        if best is None or missing(best) or kernel_limit(best, arrays, num_splits):
            return "blockwise"
        return best
    if name != "blockwise":
        limit = missing(name) or kernel_limit(name, arrays, num_splits)
        if limit:
            raise NotImplementedError(
                f'implementation="{name}" {limit}; implementation="blockwise" can.'
            )
    return name


def _check_query(query: Any) -> Array:
    if not hasattr(query, "shape") or not hasattr(query, "dtype"):
        raise TypeError(f"query: expected an array (*B, T, N, H), got {type(query).__name__}.")
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query: expected a floating-point array, got dtype {query.dtype}.")
    if len(query.shape) < 3 or 0 in query.shape:
        raise ValueError(f"query: expected an array (*B, T, N, H), got shape {query.shape}.")
    return jnp.asarray(query)
