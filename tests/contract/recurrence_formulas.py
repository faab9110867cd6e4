"""The formulas of recurrent mechanisms in float64 NumPy: one state, one step after the other.

Who sees whom comes as a mask over pairs; of it a state can keep which tokens are real, and where a
token sees nothing of what was before it.
"""

import math

import numpy as np

from tests import oracles


def _pairs(mask, query, key, query_offset=0, key_offset=0):
    """Which query sees which key, "*B T S", keys not later than the query alone."""
    i = query_offset + np.arange(query.shape[-3])[:, None]
    j = key_offset + np.arange(key.shape[-3])[None, :]
    seen = np.ones((1, *np.broadcast_shapes(i.shape, j.shape)), bool)
    if mask is not None:
        seen = np.asarray(mask(i, j))
    seen = seen[..., 0, :, :] & (j <= i)
    return np.broadcast_to(seen, (*query.shape[:-3], i.shape[0], j.shape[1]))


def _real(seen):
    return np.diagonal(seen, axis1=-2, axis2=-1)


def _starts(seen):
    """Where a real token sees none of the real tokens before it."""
    before = np.tri(seen.shape[-1], k=-1, dtype=bool) & _real(seen)[..., None, :]
    return _real(seen) & before.any(-1) & ~(seen & before).any(-1)


def _of(dtype):
    """Roundings to the dtype, and to float32 where that is wider, in which gates are computed."""
    narrow = np.dtype(dtype).itemsize < 4
    return oracles.rounder(dtype), oracles.rounder(np.float32 if narrow else dtype)


def _repeated(x, heads):
    return np.repeat(x, heads // x.shape[-2], axis=-2)


def _run(seen, query, key, value, *, decay=None, erase=None, direction=None, rounded):
    """S = (diag(decay) - direction erase^T) S + key value^T, read by the query; heads as given.

    Decays are factors: "N", or "*B S N", or "*B S N H"; a token that is not real only passes, and
    so does its decay, but for one that belongs to the head.
    """
    real, starts = _real(seen), _starts(seen)
    direction = key if direction is None else direction
    constant = decay is not None and decay.ndim == 1
    state = np.zeros((*key.shape[:-3], key.shape[-2], key.shape[-1], value.shape[-1]))
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    for t in range(key.shape[-3]):
        kept = real[..., t, None, None, None]
        state = np.where(starts[..., t, None, None, None], 0.0, state)
        new = state
        if constant:
            state = new = state * decay[:, None, None]
        elif decay is not None:
            damp = decay[..., t, :, :] if decay.ndim == key.ndim else decay[..., t, :, None]
            new = state * damp[..., None]
        if erase is not None:
            read = np.einsum("...hd,...h->...d", state, erase[..., t, :, :])
            new = new - direction[..., t, :, :, None] * read[..., None, :]
        new = new + key[..., t, :, :, None] * value[..., t, :, None, :]
        state = np.where(kept, rounded(new), state)
        row = seen[..., t, :].any(-1)[..., None, None]
        read = np.einsum("...hd,...h->...d", state, query[..., t, :, :])
        out[..., t, :, :] = np.where(row, rounded(read), 0.0)
    return out


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def _softplus(x):
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def _silu(x):
    return x * _sigmoid(x)


def _unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


def _rms(x, epsilon, axes=-1):
    return x / np.sqrt(np.mean(x**2, axes, keepdims=True) + epsilon)


def _into_heads(x, heads):
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def _both(out, return_lse):
    return (out, None) if return_lse else out


def _retnet(params, query, key, value, *, x, mask=None, dtype=np.float64, return_lse=False, **at):
    rounded, fine = _of(dtype)
    heads, width = query.shape[-2:]

    def turn(y, offset):
        angles = [10_000.0 ** -(c / max(width // 2 - 1, 1)) for c in range(width // 2)]
        turned = np.zeros_like(y)
        for t in range(y.shape[-3]):
            for c, speed in enumerate(angles):
                cos, sin = math.cos((offset + t) * speed), math.sin((offset + t) * speed)
                a, b = y[..., t, :, 2 * c], y[..., t, :, 2 * c + 1]
                turned[..., t, :, 2 * c] = a * cos - b * sin
                turned[..., t, :, 2 * c + 1] = a * sin + b * cos
        return rounded(turned)

    gamma = fine(np.array([1.0 - 2.0 ** (-5 - n) for n in range(heads)]))
    query = turn(query, at.get("query_offset", 0))
    key = rounded(turn(key, at.get("key_offset", 0)) / math.sqrt(width))
    key, value = _repeated(key, heads), _repeated(value, heads)
    out = _run(_pairs(mask, query, key, **at), query, key, value, decay=gamma, rounded=rounded)
    gate = fine(_silu(fine(x @ params["gate.weight"])))
    return _both(rounded(rounded(_rms(out, 1e-6)) * _into_heads(gate, heads)), return_lse)


def _gla(params, query, key, value, *, x, mask=None, dtype=np.float64, return_lse=False, **at):
    rounded, fine = _of(dtype)
    heads, width = query.shape[-2:]
    logits = fine(fine(x @ params["down.weight"]) @ params["up.weight"] + params["up.bias"])
    decay = fine(_sigmoid(_into_heads(logits, heads)) ** (1 / 16))
    key, value = _repeated(key, heads), _repeated(value, heads)
    query = rounded(query / math.sqrt(width))
    out = _run(_pairs(mask, query, key, **at), query, key, value, decay=decay, rounded=rounded)
    out = rounded(_rms(out, 1e-5) * params["norm.scale"])
    gate = fine(_silu(fine(x @ params["gate.weight"])))
    return _both(rounded(out * _into_heads(gate, heads)), return_lse)


def _delta(params, query, key, value, x, mask, dtype, at, decay=None):
    """What delta rules share: the normed output per head."""
    rounded, fine = _of(dtype)
    heads, width = query.shape[-2:]
    beta = fine(_sigmoid(fine(x @ params["rate.weight"])))[..., None]
    query, key = rounded(_unit(query) / math.sqrt(width)), rounded(_unit(key))
    key, value = _repeated(key, heads), _repeated(value, heads)
    erase = beta * key if decay is None else beta * decay[..., None] * key
    out = _run(
        _pairs(mask, query, key, **at), query, key, beta * value, decay=decay, erase=erase,
        rounded=rounded,
    )  # fmt: skip
    return rounded(_rms(out, 1e-5) * params["norm.scale"])


def _deltanet(params, query, key, value, *, x, mask=None, dtype=np.float64, return_lse=False, **at):
    return _both(_delta(params, query, key, value, x, mask, dtype, at), return_lse)


def _gated_deltanet(
    params, query, key, value, *, x, mask=None, dtype=np.float64, return_lse=False, **at
):
    rounded, fine = _of(dtype)
    _, log_decay = _step(params, fine(x @ params["forget.weight"]), fine)
    out = _delta(params, query, key, value, x, mask, dtype, at, decay=fine(np.exp(log_decay)))
    gate = fine(_silu(fine(x @ params["gate.weight"])))
    return _both(rounded(out * _into_heads(gate, query.shape[-2])), return_lse)


def _step(params, y, fine):
    step = fine(_softplus(fine(y + params["decay.dt_bias"])))
    return step, fine(-np.exp(params["decay.a_log"]) * step)


def _mamba2(params, query, key, value, *, x, mask=None, dtype=np.float64, return_lse=False, **at):
    rounded, fine = _of(dtype)
    heads = query.shape[-2]
    step, log_decay = _step(params, fine(x @ params["step.weight"]), fine)
    key, value = _repeated(key, heads), _repeated(value, heads)
    seen = _pairs(mask, query, key, **at)
    out = _run(
        seen, query, key, rounded(step[..., None] * value), decay=fine(np.exp(log_decay)),
        rounded=rounded,
    )  # fmt: skip
    own = np.where(_real(seen)[..., None, None], params["skip"][:, None] * value, 0.0)
    out = rounded(out + own)
    gate = _into_heads(fine(_silu(fine(x @ params["gate.weight"]))), heads)
    return _both(rounded(_rms(rounded(out * gate), 1e-5, (-2, -1)) * params["gain"]), return_lse)


def _transnormer(
    params, query, key, value, *, x, mask=None, dtype=np.float64, return_lse=False, **at
):
    """The first of two layers: with angles, and ALiBi's slopes times 1.00001."""
    rounded, fine = _of(dtype)
    heads = query.shape[-2]
    decay = fine(np.exp(-oracles.alibi_slopes(heads) * (1 + 1e-5)))
    query, key = rounded(_silu(query)), _repeated(rounded(_silu(key)), heads)

    def placed(y, offset):
        angle = (offset + np.arange(y.shape[-3]))[:, None, None] * params["theta"]
        return rounded(np.concatenate([y * np.cos(angle), y * np.sin(angle)], -1))

    query, key = placed(query, at.get("query_offset", 0)), placed(key, at.get("key_offset", 0))
    out = _run(
        _pairs(mask, query, key, **at), query, key, _repeated(value, heads), decay=decay,
        rounded=rounded,
    )  # fmt: skip
    gate = _into_heads(fine(x @ params["gate.weight"]), heads)
    return _both(rounded(rounded(_rms(out, 1e-6, (-2, -1))) * gate), return_lse)


def _rwkv7(params, query, key, value, *, x, mask=None, dtype=np.float64, return_lse=False, **at):
    rounded, fine = _of(dtype)
    heads, width = query.shape[-2:]

    def network(name, inner):
        down = inner(fine(x @ params[f"{name}.0.weight"]))
        up = fine(fine(down) @ params[f"{name}.1.weight"])
        return _into_heads(fine(up + params.get(f"{name}.1.bias", 0.0)), heads)

    decay = fine(np.exp(-math.exp(-0.5) * _sigmoid(network("decay", np.tanh))))
    rate = fine(_sigmoid(network("rate", lambda y: y)))
    key, value = _repeated(key, heads), _repeated(value, heads)
    removed = key * params["removal"]
    removed = rounded(removed / np.maximum(np.linalg.norm(removed, axis=-1, keepdims=True), 1e-12))
    key = rounded(key * (1 + (rate - 1) * params["replacement"]))
    seen = _pairs(mask, query, key, **at)
    out = _run(
        seen, query, key, value, decay=decay, erase=removed, direction=rounded(rate * removed),
        rounded=rounded,
    )  # fmt: skip
    out = out - out.mean(-1, keepdims=True)
    out = out / np.sqrt((out**2).mean(-1, keepdims=True) + width * 1e-5)
    out = np.where(seen.any(-1)[..., None, None], out * params["gain"] + params["bias"], 0.0)
    bonus = rounded(np.sum(query * params["bonus"] * key, -1, keepdims=True)) * value
    out = rounded(out + np.where(_real(seen)[..., None, None], bonus, 0.0))
    return _both(rounded(out * network("gate", _sigmoid)), return_lse)


def _docmamba(params, query, key, value, *, x, mask=None, dtype=np.float64, return_lse=False, **at):
    """Half the sum of a pass from the left and a pass from the right, noncausal."""
    rounded, fine = _of(dtype)
    heads = query.shape[-2]
    key, value = _repeated(key, heads), _repeated(value, heads)
    place = np.arange(query.shape[-3])
    seen = np.asarray(mask(place[:, None], place[None, :]))[..., 0, :, :]
    seen = np.broadcast_to(seen, (*query.shape[:-3], *seen.shape[-2:]))
    total = 0.0
    for side in range(2):
        turned = slice(None) if side == 0 else slice(None, None, -1)
        low = fine(x @ params["down.weight"][:, side * _rank(params) : (side + 1) * _rank(params)])
        step = fine(low @ params[f"up.{side}.weight"] + params[f"up.{side}.bias"])
        step = fine(_softplus(step))
        decay = fine(np.exp(-np.exp(params["a_log"][side]) * step[..., None]))
        q, k, v, d = (
            y[..., turned, :, :] for y in (query, key, rounded(step[..., None] * value), decay)
        )
        pairs = seen[..., turned, turned] & np.tri(len(place), dtype=bool)
        out = _run(pairs, q, k, v, decay=d, rounded=rounded)[..., turned, :, :]
        own = params["skip"][side][:, None] * value
        total = total + out + np.where(_real(seen)[..., None, None], own, 0.0)
    gate = _into_heads(fine(_silu(fine(x @ params["gate.weight"]))), heads)
    return _both(rounded(rounded(total / 2) * gate), return_lse)


def _rank(params):
    return params["up.0.weight"].shape[0]


def _nats(params, query, key, value, *, x, mask=None, dtype=np.float64, return_lse=False, **at):
    """Blocks of four; their types come from hard choices, so that routers have no slope."""
    rounded, fine = _of(dtype)
    heads, width = query.shape[-2:]
    key, value, length = _repeated(key, heads), _repeated(value, heads), query.shape[-3]
    pairs, softmax = _pairs(mask, query, key, **at), [None] * length
    blocks = range(0, length, 4)
    means = np.stack([x[..., b : b + 4, :].sum(-2) / 4 for b in blocks], -2)
    scores = _into_heads(fine(fine(means) @ params["router.weight"]), heads)
    kept = np.repeat(scores[..., 0] >= scores[..., 1], 4, axis=-2)[..., :length, :]  # "*B T N"

    rms_query = rounded(_rms(query, 1e-5) * params["query_gain"])
    rms_key = rounded(_rms(key, 1e-5) * params["key_gain"])
    for t in range(length):
        own = (np.arange(length) // 4 == t // 4)[:, None]
        seen = pairs[..., t, :, None] & (own | kept)
        score = rounded(np.einsum("...nh,...snh->...sn", rms_query[..., t, :, :], rms_key))
        weights = np.where(seen, rounded(np.exp(rounded(score / math.sqrt(width)))), 0.0)
        total = weights.sum(-2)[..., None]
        read = np.einsum("...sn,...snd->...nd", weights, value)
        softmax[t] = rounded(read / np.where(total == 0, 1.0, total))
    softmax = np.stack(softmax, -3)

    beta = fine(_sigmoid(fine(x @ params["rate.weight"])))[..., None]
    _, log_decay = _step(params, fine(x @ params["forget.weight"]), fine)
    decay = fine(np.exp(log_decay))
    q, k = rounded(_unit(query) / math.sqrt(width)), rounded(_unit(key))
    linear = np.zeros_like(softmax)
    for b in blocks:  # the whole past again for each block: what was not chosen is not written
        end = min(b + 4, length)
        now = slice(0, end)
        written = ~kept[..., now, :, None] | (np.arange(end) >= b)[:, None, None]
        direction = k[..., now, :, :] * written
        seen = pairs[..., now, now]
        out = _run(
            seen, q[..., now, :, :], direction, (beta * value)[..., now, :, :],
            decay=decay[..., now, :], erase=(beta * decay[..., None] * k)[..., now, :, :],
            rounded=rounded,
        )  # fmt: skip
        linear[..., b:end, :, :] = out[..., b:, :, :]

    mix = _into_heads(fine(query.reshape(*query.shape[:-2], -1) @ params["mix.weight"]), heads)
    mix = np.exp(mix - mix.max(-1, keepdims=True))
    mix = fine(mix / mix.sum(-1, keepdims=True))
    out = rounded(_rms(linear, 1e-5) * params["linear_norm.scale"]) * mix[..., :1]
    out = rounded(out + rounded(_rms(softmax, 1e-5) * params["softmax_norm.scale"]) * mix[..., 1:])
    gate = _into_heads(fine(_silu(fine(x @ params["gate.weight"]))), heads)
    return _both(rounded(out * gate), return_lse)


FORMULAS_RECURRENCES = {
    "retnet": _retnet,
    "gla": _gla,
    "deltanet": _deltanet,
    "gated-deltanet": _gated_deltanet,
    "mamba2": _mamba2,
    "transnormer": _transnormer,
    "rwkv7": _rwkv7,
    "docmamba": _docmamba,
    "nats-linear": _nats,
}
