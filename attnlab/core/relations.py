r"""Relations between tokens, as attention reads them: sum_j a_ij <q_i,l , k_j,l> for each l.

Where that is all, the sum is <q_i,l , sum_j a_ij k_j,l>: relational keys ride behind the values and
meet their query after they were averaged, in any implementation and in O(T + S) memory.  A function
of each product, or values by distance, take all weights.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.gates import control, narrowed, widened
from attnlab.core.masks import (
    ArrayMask,
    Causal,
    Full,
    KeyPadding,
    Segments,
    SlidingWindow,
    _And,
    as_mask,
)
from attnlab.core.reference import zero_bad
from attnlab.core.tokens import marked

HEADLESS = (Full, Causal, KeyPadding, Segments, SlidingWindow)  # masks that are alike for all heads


def read(
    query: Array, key: Array, value: Array, relations: Array, relational: int, **options: Any
) -> Any:
    """What heads read of their values, and behind it of relational keys "*B S C": "*B T N D+C".

    Sensory heads get zeros there, or what is not needed where heads are not apart in `options`.
    """
    cut, shared = sensory_heads(query.shape[-2], key.shape[-2], relational)
    wide = jnp.broadcast_to(relations[..., None, :], (*key.shape[:-1], relations.shape[-1]))
    both = jnp.concatenate([value, wide.astype(value.dtype)], axis=-1)
    if not cut or not relational or not _headless(options):
        return attention(query, key, both, **options)
    parts = [
        attention(query[..., :cut, :], key[..., :shared, :], value[..., :shared, :], **options),
        attention(query[..., cut:, :], key[..., shared:, :], both[..., shared:, :], **options),
    ]
    lse = [part[1] for part in parts if isinstance(part, tuple)]
    first, last = (part[0] if isinstance(part, tuple) else part for part in parts)
    pads = [(0, 0)] * (first.ndim - 1) + [(0, relations.shape[-1])]
    out = jnp.concatenate([jnp.pad(first, pads), last], axis=-2)
    return (out, jnp.concatenate(lse, axis=-2)) if lse else out


def related(
    out: Float[Array, "*B T N E"], query_relations: Float[Array, "*B T L P"], weight: Array
) -> Float[Array, "*B T N D"]:
    """What was read, relational keys met with their queries and brought to the width of values."""
    heads, width = weight.shape[:2]
    wide, query = widened(out, query_relations)
    value, keys = wide[..., :width], wide[..., out.shape[-2] - heads :, width:]
    keys = keys.reshape(*keys.shape[:-1], *query.shape[-2:])
    relations = jnp.einsum("...tnlp,...tlp->...tnl", keys, query) * query.shape[-1] ** -0.5
    return narrowed(_added(value, relations, weight), out.dtype)


def _added(value: Array, relations: Float[Array, "*B T R L"], weight: Array) -> Array:
    """Values of all heads, and R r on those of relational ones."""
    extra = jnp.einsum("...tnl,ndl->...tnd", relations, weight.astype(relations.dtype))
    cut = value.shape[-2] - weight.shape[0]
    return jnp.concatenate([value[..., :cut, :], value[..., cut:, :] + extra], axis=-2)


def explicit_relations(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    query_relations: Float[Array, "*B T L P"],
    key_relations: Float[Array, "*B S L P"],
    weight: Float[Array, "R D L"],
    activation: Callable[[Array], Array] | None = None,
    relative: Float[Array, "M R D"] | None = None,
    implementation: str = "auto",
    **options: Any,
) -> Any:
    """Heads that read values, and the last R of them relations too: "*B T N D", O(T S) memory.

    Args:
      value: of all heads.
      weight: from L relations to the width of values.
      activation: what is done to each relation; nothing by default.
      relative: symbols by j - i from -(M - 1) / 2 on, and of the ends for what is further, in place
        of the values of relational heads.

    Raises:
      ValueError: relations or weights that do not fit, a table of an even length.
      NotImplementedError: an implementation other than "reference".
    """
    if implementation not in ("auto", "reference"):
        raise NotImplementedError(
            f'implementation: relations pair by pair take all weights, which "{implementation}" '
            'does not hold; implementation="reference" does.'
        )
    query, key, value = check_inputs(query, key, value)
    flat, width = check_relations(query, key, value, query_relations, key_relations, weight)
    key, dtype, cut = marked(key, flat), query.dtype, query.shape[-2] - weight.shape[0]
    eye = jnp.eye(key.shape[-3], dtype=dtype)[:, None, :]
    eye = jnp.broadcast_to(eye, (*key.shape[:-1], key.shape[-3]))
    both = jnp.concatenate([value, eye], axis=-1)
    out = attention(query, key, both, implementation="reference", **options)
    first, *rest = out if isinstance(out, tuple) else (out,)
    (wide,) = widened(first)
    seen, weights = wide[..., : value.shape[-1]], wide[..., cut:, value.shape[-1] :]
    q, k = widened(query_relations, zero_bad(key_relations))
    relations = jnp.einsum("...tlp,...slp->...tsl", q, k) * width**-0.5
    relations = relations if activation is None else activation(relations)
    if relative is not None:
        offset = options.get("key_offset", 0) - options.get("query_offset", 0)
        symbols = _by_distance(weights, relative, offset)
        seen = jnp.concatenate([seen[..., :cut, :], symbols], axis=-2)
    mixed = jnp.einsum("...tns,...tsl->...tnl", weights, relations)
    first = narrowed(_added(seen, mixed, weight), dtype)
    return (first, *rest) if rest else first


def _by_distance(weights: Float[Array, "*B T R S"], table: Array, offset: Any) -> Array:
    """What weights read of symbols by distance, "*B T R D"."""
    if table.ndim != 3 or not table.shape[0] % 2:
        raise ValueError(f"relative: expected axes (M, R, D) with odd M, got shape {table.shape}.")
    reach, (rows, cols) = table.shape[0] // 2, (weights.shape[-3], weights.shape[-1])
    distance = jnp.arange(cols)[None, :] - jnp.arange(rows)[:, None] + offset
    hot = jax.nn.one_hot(jnp.clip(distance, -reach, reach) + reach, 2 * reach + 1)
    counts = jnp.einsum("...tns,tsm->...tnm", weights, hot.astype(weights.dtype))
    return jnp.einsum("...tnm,mnd->...tnd", counts, table.astype(weights.dtype))


def check_relations(
    query: Array, key: Array, value: Array, queries: Any, keys: Any, weight: Any
) -> tuple[Array, int]:
    """Relational keys laid end to end "*B S C", and the width P of one."""
    if weight.ndim != 3 or weight.shape[1] != value.shape[-1]:
        raise ValueError(
            f"weight: expected axes (relational heads, {value.shape[-1]}, relations), got shape "
            f"{weight.shape}."
        )
    sensory_heads(query.shape[-2], key.shape[-2], weight.shape[0])
    sizes = (weight.shape[-1], queries.shape[-1])
    control("query_relations", queries, (*query.shape[:-2], *sizes), queries.dtype)
    keys = control("key_relations", keys, (*key.shape[:-2], *sizes), keys.dtype)
    return keys.reshape(*keys.shape[:-2], math.prod(sizes)), sizes[1]


def sensory_heads(heads: int, shared: int, relational: int) -> tuple[int, int]:
    """How many query heads and key heads are sensory."""
    group, cut = heads // shared, heads - relational
    if not 0 <= relational <= heads or cut % group:
        raise ValueError(
            f"num_relational: expected at most {heads} heads, and those of both kinds in multiples "
            f"of {group}, which share a key; got {relational}."
        )
    return cut, cut // group


def _headless(options: dict[str, Any]) -> bool:
    """Whether nothing in a call tells its heads apart, so that they may be called one by one."""
    if any(options.get(name) for name in ("modifiers", "normalizer", "dropout_rate")):
        return False

    def alike(mask: Any) -> bool:
        if isinstance(mask, _And):
            return alike(mask.a) and alike(mask.b)
        if isinstance(mask, ArrayMask):
            return mask.array.shape[-3] == 1
        return isinstance(mask, HEADLESS)

    return options.get("mask") is None or alike(as_mask(options["mask"]))
