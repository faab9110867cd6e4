"""Formulas of positions and of heads that divide the work, in float64 NumPy."""

import numpy as np

from tests import oracles


def softmax(x):
    e = np.exp(x - np.max(x, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def moh_gates(routed, shared, split, active, *, scaled=True):
    """Gates of one token after the other; ties go to the lower head."""
    gates = np.zeros((*routed.shape[:-1], shared.shape[-1] + routed.shape[-1]))
    for at in np.ndindex(routed.shape[:-1]):
        order = sorted(range(routed.shape[-1]), key=lambda i, at=at: (-routed[at][i], i))
        best = sorted(order[:active])
        a = (1.0, 1.0) if split is None else softmax(split[at]) * (2 if scaled else 1)
        row = np.zeros(routed.shape[-1])
        row[best] = active * softmax(routed[at][best]) if scaled else softmax(routed[at])[best]
        if shared.shape[-1]:
            gates[at][: shared.shape[-1]] = (
                a[0] * softmax(shared[at]) * (shared.shape[-1] if scaled else 1)
            )
        gates[at][shared.shape[-1] :] = a[1] * row
    return gates


def _moh(params, query, key, value, *, x, dtype=np.float64, return_lse=False, **options):
    """One shared head, two of the other three."""
    rounded = oracles.rounder(dtype)
    wide = oracles.rounder(np.float32 if np.dtype(dtype).itemsize < 4 else dtype)
    out, lse = oracles.attention(query, key, value, dtype=dtype, return_lse=True, **options)
    x = rounded(x)
    routed, split = wide(x @ params["routed.weight"]), wide(x @ params["split.weight"])
    gates = wide(moh_gates(routed, np.zeros((*x.shape[:-1], 1)), split, 2))
    out = rounded(out * gates[..., None])
    return (out, lse) if return_lse else out


def cope(table, visible, rounded, *, scale=1.0):
    """What CoPE adds, one row after the other, counting back from the last visible key."""

    def modify(score, i, j, head, query, gates):
        out, last = np.array(score), len(table) - 1
        for at in np.ndindex(score.shape[:-1]):
            *batch, n, t = at
            near, place = rounded(table @ query[(*batch, t, n)]) * scale, 0.0
            for s in reversed(range(score.shape[-1])):
                if not visible[at][s]:
                    continue
                gate = 1.0 / (1.0 + np.exp(-np.clip(gates[at][s], -700.0, 700.0)))
                place += rounded(gate)
                p = min(place, last)
                low = min(int(p), last - 1)
                out[at][s] = score[at][s] + (1 - (p - low)) * near[low] + (p - low) * near[low + 1]
        return out

    return modify


def _visible(mask, query, key, query_offset=0, key_offset=0):
    i = query_offset + np.arange(query.shape[-3])[:, None]
    j = key_offset + np.arange(key.shape[-3])[None, :]
    allowed = np.ones((1, 1), bool) if mask is None else np.asarray(mask(i, j))
    shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    return np.broadcast_to(allowed, shape)


def _cope(params, query, key, value, *, mask=None, dtype=np.float64, **options):
    rounded = oracles.rounder(dtype)
    offsets = {n: options.get(n, 0) for n in ("query_offset", "key_offset")}
    add = cope(rounded(params["table"]), _visible(mask, query, key, **offsets), rounded)

    def modify(score, i, j, head):
        return add(score, i, j, head, rounded(query), score)

    return oracles.attention(
        query, key, value, mask=mask, modifiers=[modify], dtype=dtype, **options
    )


def ring_places(count, start, height, width):
    """Places of `count` tokens with one image at `start`, by walking around the grid inwards."""
    grid = np.zeros((height, width), int)
    for ring in range(-(-min(height, width) // 2)):
        grid[ring : height - ring, ring : width - ring] = start + ring
    after = grid.max() + 1
    end = start + height * width
    image = grid.reshape(-1)
    return np.array(
        [t if t < start else image[t - start] if t < end else after + t - end for t in range(count)]
    )


def turned(x, place, *, base=10000.0, interleaved=True):
    """Each token turned by its own place, one after the other."""
    formula = oracles.rope_interleaved if interleaved else oracles.rope
    parts = [
        formula(x[..., t : t + 1, :, :], offset=p, base=base) for t, p in enumerate(place)
    ]  # fmt: skip
    return np.concatenate(parts, axis=-3)


def _concentric(params, query, key, value, *, mask=None, dtype=np.float64, **options):
    """An image of 3 x 3 at 2."""
    rounded = oracles.rounder(dtype)
    count = max(query.shape[-3], key.shape[-3]) + 32
    places = ring_places(count, 2, 3, 3)
    rows, cols = (
        places[options.get(name, 0) :][: x.shape[-3]]
        for name, x in (("query_offset", query), ("key_offset", key))
    )
    order = oracles.causal_by(rows, cols)
    return oracles.attention(
        rounded(turned(rounded(query), rows)), rounded(turned(rounded(key), cols)), value,
        mask=order if mask is None else oracles.both(order, mask), dtype=dtype, **options,
    )  # fmt: skip


def follows(mask, query, key):
    """Whether a token has one before it in its document: where one of the two sees the other."""
    seen = _visible(mask, query, key)[..., 0, :, :]
    has = np.zeros(seen.shape[:-1], bool)
    for t in range(1, seen.shape[-1]):
        has[..., t] = seen[..., t, t - 1]
    return has


def earlier(x, has, missing):
    """The token before each, or what is missing."""
    out = np.zeros_like(x)
    for t in range(x.shape[-3]):
        before = x[..., max(t - 1, 0), :, :]
        out[..., t, :, :] = np.where(has[..., t, None, None], before, missing[..., t, :, :])
    return out


def _momentum(params, query, key, value, *, mask=None, dtype=np.float64, **options):
    rounded = oracles.rounder(dtype)
    has, gamma = follows(mask, query, key), params["gamma"]

    def moved(x, offset):
        x = rounded(oracles.rope_interleaved(rounded(x), offset=offset))
        return rounded(x + gamma * (x - earlier(x, has, x)))

    query = moved(query, options.get("query_offset", 0))
    key = moved(key, options.get("key_offset", 0))
    return oracles.attention(query, key, value, mask=mask, dtype=dtype, **options)


def compressed(params, query, key, value, has, real, rounded, *, offset=0):
    """Queries, keys and values of CCA with convolutions of two tokens, step by step."""
    heads, (kv_heads, width) = query.shape[-2], key.shape[-2:]
    group, half = heads // kv_heads, width // 2
    query, key, value = (np.where(real[..., None, None], x, 0.0) for x in (query, key, value))
    packed = np.concatenate([query, key], axis=-2)
    zero = np.zeros_like(packed)
    weight, bias = params["channel_weight"], params["channel_bias"]
    by_channel = rounded(bias + packed * weight[0] + earlier(packed, has, zero) * weight[1])
    before = earlier(by_channel, has, zero + bias)
    mixed = np.zeros_like(packed)
    for m in range(heads + kv_heads):
        first, second = params["head_weight"][:, m]
        parts = by_channel[..., m, :] @ first, before[..., m, :] @ second
        mixed[..., m, :] = rounded(params["head_bias"][m] + rounded(parts[0]) + rounded(parts[1]))
    for n in range(heads):
        mixed[..., n, :] += (query[..., n, :] + key[..., n // group, :]) / 2
    for k in range(kv_heads):
        mean = sum(query[..., n, :] for n in range(k * group, (k + 1) * group)) / group
        mixed[..., heads + k, :] += (mean + key[..., k, :]) / 2
    mixed = rounded(mixed)
    length = rounded(np.sqrt(rounded(np.sum(mixed**2, -1, keepdims=True)) + 1e-6))
    mixed = rounded(rounded(mixed / length) * np.sqrt(width))
    query, key = mixed[..., :heads, :], mixed[..., heads:, :]
    key = rounded(key * params["temperature"][:, None])
    query, key = (
        np.concatenate([rounded(oracles.rope(x[..., :half], offset=offset)), x[..., half:]], -1)
        for x in (query, key)
    )
    flat = value.reshape(*value.shape[:-2], 1, -1)
    second = flat.shape[-1] // 2
    moved = earlier(flat[..., second:], has, np.zeros_like(flat[..., second:]))
    value = np.concatenate([flat[..., :second], moved], axis=-1).reshape(value.shape)
    return query, key, value


def _compressed(params, query, key, value, *, mask=None, dtype=np.float64, **options):
    rounded = oracles.rounder(dtype)
    wide = oracles.rounder(np.float32 if np.dtype(dtype).itemsize < 4 else dtype)
    seen = _visible(mask, query, key)[..., 0, :, :]
    real = np.diagonal(seen, axis1=-2, axis2=-1)
    offset = options.get("query_offset", 0)
    given = (rounded(x) for x in (query, key, value))
    made = compressed(params, *given, follows(mask, query, key), real, wide, offset=offset)
    return oracles.attention(*map(rounded, made), mask=mask, dtype=dtype, **options)


FORMULAS_POSITIONAL = {
    "compressed-convolutional": _compressed,
    "concentric-causal": _concentric,
    "cope": _cope,
    "moh": _moh,
    "momentum-attention": _momentum,
}
