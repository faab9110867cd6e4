r"""Linear attention with the options of a mechanism: masks, offsets, normalization, a state.

    o_t = sum_s m_ts (q_t . k_s) damp_ts v_s      (divided by sum_s m_ts (q_t . k_s) damp_ts)

Queries and keys are what a feature map made of them.  Where the mask is causal this is
`linear_recurrence`; where every query sees the same keys, one sum over keys serves them all; a mask
that picks pairs needs the matrix of weights, in the "parallel" implementation alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.core.decay_tree import block_sums, damping, product
from attnlab.core.inputs import check_inputs
from attnlab.core.mask_layout import Layout, layout
from attnlab.core.masks import Causal, Full, Mask, as_mask, check_mask
from attnlab.core.recurrence import (
    CHUNK_SIZE,
    check_implementation,
    linear_recurrence,
    resets,
    state_dtype,
)
from attnlab.core.refusals import refuse, refuse_dropout


def linear_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    log_decay: Float[Array, "..."] | None = None,
    erase: Float[Array, "*B S K H"] | None = None,
    normalize: bool = False,
    epsilon: float = 0.0,
    causal: bool = False,
    mask: Any = None,
    query_offset: Any = 0,
    key_offset: Any = 0,
    initial_state: Float[Array, "*B K H E"] | None = None,
    return_state: bool = False,
    implementation: str = "auto",
    chunk_size: int = CHUNK_SIZE,
    **refused: Any,
) -> Any:
    """Weights q . k, damped and possibly normalized, times values: "*B T N D".

    Args:
      query, key: after the feature map.  Other arrays as for `attnlab.linear_recurrence`.  What
        is masked neither writes nor erases; nor does it decay, unless decays are constants.
      normalize: divide by the sum of a query's weights.  A query whose weights sum to 0, as one
        that sees nothing, gives zeros.
      epsilon: added to that sum.
      causal: keys after the query are not seen, whatever the mask says; implied by decays and
        erasing.
      mask: as for `attnlab.attention`.  Causal, KeyPadding, QueryPadding, Segments and what `&`
        makes of them serve every implementation; other masks "parallel" alone, without `erase`.
      query_offset, key_offset: position of the first query and of the first key.
      initial_state, return_state: as for `attnlab.linear_recurrence`, and causal only; with
        `normalize` a state has one more column, E = D + 1, the sum of keys.
      implementation: as for `attnlab.linear_recurrence`.

    Raises:
      TypeError, ValueError: as `attnlab.linear_recurrence`; options of softmax attention that mean
        nothing here.
      NotImplementedError: a mask that the implementation cannot take, by name of one that can;
        dropout of weights.
    """
    refuse_softmax(refused)
    query, key, value = check_inputs(query, key, value, empty=True)
    check_implementation(implementation)
    mask = Full() if mask is None else as_mask(mask)
    lengths, offsets = (query.shape[-3], key.shape[-3]), (query_offset, key_offset)
    sizes = {"N": query.shape[-2], "T": lengths[0], "S": lengths[1]}
    check_mask(mask, query.shape[:-3], sizes)
    causal = causal or log_decay is not None or erase is not None
    known = layout(mask, lengths, offsets)
    stateful = initial_state is not None or return_state
    if normalize:
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)
    options = {"implementation": implementation, "chunk_size": chunk_size}
    if known is None:
        if implementation not in ("auto", "parallel") or stateful or erase is not None:
            raise NotImplementedError(
                f"mask: {type(mask).__name__} picks pairs, which a state cannot; "
                'implementation="parallel" without erase and without states takes any mask, and '
                "attnlab.attention any at O(n) memory."
            )
        mask = mask & Causal() if causal else mask
        return _divided(
            _pairwise(query, key, value, log_decay, mask, offsets), query.dtype, normalize, epsilon
        )
    key, value, erase = (_kept(x, known.keys) for x in (key, value, erase))
    log_decay = _kept_decay(log_decay, known.keys, key.shape)
    if causal or known.causal:
        options |= {"log_decay": log_decay, "erase": erase, "initial_state": initial_state}
        out, state = _causal(query, key, value, known, offsets, options)
    elif stateful:
        raise ValueError(
            "initial_state: states belong to causal attention; give a causal mask as well."
        )
    else:
        out, state = _everywhere(query, key, value, known, options), None
    out = _divided(out, query.dtype, normalize, epsilon)
    out = _kept(out, known.queries)
    return (out, state) if return_state else out


def refuse_softmax(options: dict[str, Any]) -> None:
    """Refuse what the front door takes and linear attention does not.

    Raises:
      ValueError: an option that means nothing here.
      NotImplementedError: dropout of weights.
    """
    options = refuse_dropout(
        options,
        "a state has no weights to drop; drop the inputs or outputs instead, or use "
        "attnlab.attention",
    )
    refuse(
        options,
        "linear attention has no such option, only mask, query_offset, key_offset, initial_state, "
        "return_state, implementation and chunk_size",
        *options,
    )


def _kept(x: Any, real: Any) -> Any:
    """Zeros where positions are not real; what stands there, NaN included, reaches nothing."""
    if x is None or real is None:
        return x
    real = jnp.broadcast_to(real, x.shape[:-2])[..., None, None]
    return jnp.where(real, x, jnp.zeros((), x.dtype))


def _kept_decay(log_decay: Any, real: Any, shape: tuple[int, ...]) -> Any:
    """Decays that belong to a step, left out with it; one per head is a matter of positions."""
    steps = shape[:-2]
    if real is None or log_decay is None:
        return log_decay
    if log_decay.ndim < 2 or log_decay.shape[: len(steps)] != steps:
        return log_decay
    real = jnp.broadcast_to(real, steps)
    real = real.reshape(*steps, *(1,) * (log_decay.ndim - len(steps)))
    return jnp.where(real, log_decay, jnp.zeros((), log_decay.dtype))


def linear_state(
    batch_shape: tuple[int, ...], num_heads: int, width: int, value_width: int
) -> Float[Array, "*B K H D"]:
    """A state before the first token, zeros in float32."""
    return jnp.zeros((*batch_shape, num_heads, width, value_width), jnp.float32)


def real_inputs(query: Any, key: Any, value: Any, options: dict[str, Any]) -> list[Array]:
    """Query, key and value, checked, with zeros where the mask among `options` hides a position.

    What a feature map makes of a hidden NaN would spoil gradients, though it is left out later.
    """
    query, key, value = check_inputs(query, key, value, empty=True)
    known = real_positions(query, key, options)
    return [_kept(query, known.queries), *(_kept(x, known.keys) for x in (key, value))]


def real_positions(query: Array, key: Array, options: dict[str, Any]) -> Layout:
    """Which keys and queries the mask among `options` leaves, and what else is known of it.

    Of a mask that picks pairs: which keys are seen by any query, and which queries see any key.
    """
    if options.get("mask") is None:
        return Layout()
    mask, lengths = as_mask(options["mask"]), (query.shape[-3], key.shape[-3])
    check_mask(mask, query.shape[:-3], {"N": query.shape[-2], "T": lengths[0], "S": lengths[1]})
    offsets = options.get("query_offset", 0), options.get("key_offset", 0)
    known = layout(mask, lengths, offsets)
    if known is None:
        allowed = mask.dense(
            *lengths, query_offset=offsets[0], key_offset=offsets[1], num_heads=query.shape[-2]
        )
        allowed = jnp.broadcast_to(allowed, (*query.shape[:-3], *allowed.shape[-3:]))
        known = Layout(keys=jnp.any(allowed, (-3, -2)), queries=jnp.any(allowed, (-3, -1)))
    return known


def positive_features(feature_map: Any, *arrays: Array) -> list[Array]:
    """The feature map of each array, refused where it is negative and its values are known.

    Weights that are products of features are a distribution only if no feature is negative.
    """
    mapped = [jnp.asarray(feature_map(x)) for x in arrays]
    for x in mapped:
        if not isinstance(x, jax.core.Tracer) and x.size and bool(jnp.any(x < 0)):
            raise ValueError(
                f"feature_map: expected features that are not negative, got {jnp.min(x)}."
            )
    return mapped


def repeat_heads(x: Array, num_heads: int) -> Array:
    """Key heads "*B S K H" repeated for each query head: "*B S N H"."""
    return x if x.shape[-2] == num_heads else jnp.repeat(x, num_heads // x.shape[-2], axis=-2)


def _divided(out: Array, dtype: Any, normalize: bool, epsilon: float) -> Array:
    """In `dtype`; with `normalize` divided by the last column, the sum of weights."""
    if not normalize:
        return out.astype(dtype)
    total = out[..., -1:] + epsilon
    return (out[..., :-1] / jnp.where(total == 0, jnp.ones_like(total), total)).astype(dtype)


def _causal(
    query: Array, key: Array, value: Array, known: Layout, offsets: tuple[Any, Any], options: Any
) -> tuple[Array, Any]:
    """The recurrence, and its last state."""
    if known.ids is not None:
        options["reset"] = resets(jnp.broadcast_to(known.ids, key.shape[:-2]))
    query, key, value = (x.astype(state_dtype(x.dtype)) for x in (query, key, value))
    options["return_state"] = True
    if query.shape[-3] == key.shape[-3] and _same(*offsets):
        return linear_recurrence(query, key, value, **options)
    if options["initial_state"] is not None:
        raise ValueError(
            "initial_state: with a state, queries and keys should stand at the same positions, got "
            f"lengths {query.shape[-3]}, {key.shape[-3]} and offsets {offsets[0]}, {offsets[1]}."
        )
    return _placed(query, key, value, offsets, options)


def _placed(
    query: Array, key: Array, value: Array, offsets: tuple[Any, Any], options: Any
) -> tuple[Array, Any]:
    """Queries put where they stand among the keys, or behind them; earlier ones see nothing."""
    length, keys, axis = query.shape[-3], key.shape[-3], query.ndim - 3
    place = jnp.arange(length, dtype=jnp.int32)
    place = place + jnp.asarray(offsets[0], jnp.int32) - jnp.asarray(offsets[1], jnp.int32)
    total = keys + length
    slot = jnp.minimum(place, keys + jnp.arange(length, dtype=jnp.int32))
    room = jnp.zeros((*query.shape[:axis], total, *query.shape[-2:]), query.dtype)
    inside = jnp.where(slot < 0, total, slot)  # what lies beyond the end is dropped
    decay = options["log_decay"]
    if decay is not None and jnp.ndim(decay) == 1:  # it goes on where there are no more steps
        by_head = jnp.repeat(decay, query.shape[-2] // key.shape[-2]).astype(query.dtype)
        waited = (place - slot).astype(query.dtype)[:, None] * by_head[None, :]
        query = query * jnp.expand_dims(jnp.exp(waited), (*range(axis), axis + 2))
    query = room.at[(*(slice(None),) * axis, inside)].set(query, mode="drop")
    for name in ("log_decay", "erase", "reset"):
        x = options.get(name)
        if x is not None and (name != "log_decay" or jnp.ndim(x) > 1):
            options[name] = _longer(x, axis, total)
    out, state = linear_recurrence(
        query, _longer(key, axis, total), _longer(value, axis, total), **options
    )
    out = jnp.take(out, jnp.clip(slot, 0, total - 1), axis=axis)
    return _kept(out, place >= 0), state


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)


def _longer(x: Array, axis: int, length: int) -> Array:
    """Zeros behind the last position: nothing is written, decayed, erased or cleared there."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


def _everywhere(
    query: Array, key: Array, value: Array, known: Layout, options: dict[str, Any]
) -> Array:
    """Every query reads the same sum over keys, or over those of its document: "*B T N D"."""
    query, key, value = (x.astype(state_dtype(x.dtype)) for x in (query, key, value))
    if known.ids is not None:
        return _within_documents(query, key, value, known.ids, options)
    memory = product("...skh,...skd->...khd", key, value)
    out = product("...tkgh,...khd->...tkgd", _by_key_head(query, key), memory)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _within_documents(query: Array, key: Array, value: Array, ids: Any, options: Any) -> Array:
    """What a query reads of its own document: up to itself, and from the end back to behind it."""
    axis = key.ndim - 3
    start = resets(jnp.broadcast_to(ids, key.shape[:-2]))
    forward = linear_recurrence(query, key, value, reset=start, **options)
    last = jnp.roll(start, -1, axis).at[..., -1].set(True)
    later = (jnp.roll(x, -1, axis) for x in (key, value))
    back = [jnp.flip(x, axis) for x in (query, *(_kept(x, ~last) for x in later), last)]
    return forward + jnp.flip(linear_recurrence(*back[:3], reset=back[3], **options), axis)


def _by_key_head(query: Array, key: Array) -> Array:
    heads = key.shape[-2]
    return query.reshape(*query.shape[:-2], heads, query.shape[-2] // heads, query.shape[-1])


def _pairwise(
    query: Array, key: Array, value: Array, log_decay: Any, mask: Mask, offsets: tuple[Any, Any]
) -> Array:
    """The matrix of weights, all pairs, under any mask: O(T S) memory."""
    if log_decay is not None and (
        query.shape[-3] != key.shape[-3] or jnp.ndim(log_decay) > key.ndim - 1
    ):
        raise NotImplementedError(
            "log_decay: a mask that picks pairs goes with a decay per head or step, and as many "
            'queries as keys; Causal, KeyPadding and Segments go with all ("chunked").'
        )
    dtype = state_dtype(query.dtype)
    allowed = mask.dense(
        query.shape[-3], key.shape[-3], query_offset=offsets[0], key_offset=offsets[1],
        num_heads=query.shape[-2],
    )  # fmt: skip
    allowed = jnp.broadcast_to(allowed, (*query.shape[:-3], *allowed.shape[-3:]))
    seen = jnp.any(allowed, axis=(-3, -2))
    key, value = _kept(key, seen).astype(dtype), _kept(value, seen).astype(dtype)
    rows = _by_key_head(query, key).astype(dtype)
    weights = product("...tkgh,...skh->...kgts", rows, key)
    weights = weights.reshape(*weights.shape[:-4], query.shape[-2], *weights.shape[-2:])
    if log_decay is not None:
        damp = _damping(_kept_decay(log_decay, seen, key.shape), key.shape).astype(dtype)
        weights = weights * jnp.repeat(damp, query.shape[-2] // key.shape[-2], axis=-3)
    weights = jnp.where(allowed, weights, jnp.zeros((), dtype))
    weights = weights.reshape(*weights.shape[:-3], key.shape[-2], -1, *weights.shape[-2:])
    out = product("...kgts,...skd->...tkgd", weights, value)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _damping(log_decay: Array, shape: tuple[int, ...]) -> Array:
    """Exp of the log decays between each key and query: "*B K T T"."""
    *batch, length, heads, _ = shape
    g = jnp.asarray(log_decay)
    if g.ndim == 1:
        g = jnp.broadcast_to(jnp.expand_dims(g, range(len(batch) + 1)), (*batch, length, heads))
    whole = 1 << (length - 1).bit_length()
    g = _longer(jnp.swapaxes(g, -1, -2)[..., None], g.ndim - 1, whole)
    return damping(block_sums(g), through=True)[..., :length, :length]
