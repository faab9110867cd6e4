"""Formulas of mechanisms that change the score or what becomes of it, head by head, in float64."""

import math

import numpy as np
import scipy.special

from tests import oracles


def _visible(mask, query, key, query_offset=0, key_offset=0, **_):
    """Who sees whom, "*B N T S"."""
    i = query_offset + np.arange(query.shape[-3])[:, None]
    j = key_offset + np.arange(key.shape[-3])[None, :]
    allowed = np.ones((1, 1), bool) if mask is None else np.asarray(mask(i, j), bool)
    shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    return np.broadcast_to(allowed, shape)


def _per_head(weigh):
    """A formula from `weigh(rounded, params, q, k, seen, at)` of one head: its weights (T, S).

    `at` is (*batch, head); weights and the logarithm of what they were divided by are returned.
    """

    def formula(
        params, query, key, value, *, mask=None, dtype=np.float64, return_lse=False, **options
    ):
        rounded = oracles.rounder(dtype)
        query, key, value = rounded(query), rounded(key), rounded(value)
        visible = _visible(mask, query, key, **options)
        out = np.zeros((*query.shape[:-1], value.shape[-1]))
        lse = np.zeros((*query.shape[:-3], query.shape[-2], query.shape[-3]))
        group = query.shape[-2] // key.shape[-2]
        for at in np.ndindex(*query.shape[:-3], query.shape[-2]):
            *row, n = at
            q = query[(*row, slice(None), n)]
            k, v = (x[(*row, slice(None), n // group)] for x in (key, value))
            weights, lse[at] = weigh(rounded, params, q, k, visible[at], at)
            out[(*row, slice(None), n)] = rounded(weights @ v)
        return (out, lse) if return_lse else out

    return formula


def _softmax(rounded, score, seen):
    weights, lse = oracles.softmax()(score[None], seen[None], rounded)
    return weights[0], lse[0]


def _share(rounded, weights):
    total = rounded(np.sum(weights, -1, keepdims=True))
    return rounded(weights / np.where(total == 0, 1.0, total))


@_per_head
def _softplus_reweighting(rounded, params, query, key, seen, at):
    """Both stages as printed, the power formed: in float64 it does not overflow."""
    query, key = (
        rounded(x / np.sqrt(rounded(np.sum(x * x, -1, keepdims=True) + 1e-6))) for x in (query, key)
    )
    count = np.sum(seen, -1, keepdims=True)
    factor = rounded(math.log(query.shape[-1]) * np.log(np.maximum(count, 1)))
    score = rounded(factor * rounded(query @ key.T))
    share = _share(rounded, np.where(seen, rounded(np.logaddexp(0.0, score)), 0.0))
    above = rounded(rounded(count * share) - (count > 3))
    above = rounded(np.where(seen, np.maximum(above, 0.0), 0.0))
    top = np.max(above, -1, keepdims=True)
    power = rounded(rounded(above / np.where(top == 0, 1.0, top)) ** 15)
    return _share(rounded, power), 0.0


def _token_gain(rounded, x, weight):
    active = rounded(x * (1 + scipy.special.erf(x / math.sqrt(2))) / 2)
    return rounded(1 + rounded(np.tanh(rounded(np.sum(weight * active, -1, keepdims=True)))))


def _selective(params, query, key, value, *, mask=None, dtype=np.float64, x=None, **options):
    rounded = oracles.rounder(dtype)
    count = np.sum(_visible(mask, query, key, **options), -1)
    log_n = np.swapaxes(np.log(np.maximum(count, 1)), -1, -2)[..., None]
    query, value = rounded(query), rounded(value)
    position = rounded(log_n / (1 + np.exp(-params["alpha"])))
    factor = rounded(_token_gain(rounded, query, params["query_weight"]) + position)
    value = rounded(value * _token_gain(rounded, value, params["value_weight"]))
    return oracles.attention(rounded(query * factor), key, value, mask=mask, dtype=dtype, **options)


def _energy_gated(
    params, query, key, value, *, mask=None, dtype=np.float64, x=None, return_lse=False, **options
):
    """Weighed by the gate, then divided by the sum again, as printed; statistics row by row."""
    rounded = oracles.rounder(dtype)
    energy = rounded(rounded(x) @ params["direction"])
    visible = _visible(mask, query, key, **options)
    gate = np.ones(visible.shape)
    for *at, n, t in np.ndindex(visible.shape[:-1]):
        e, seen = energy[(*at, slice(None), n)], visible[(*at, n, t)]
        if seen.any():
            off = rounded(e - rounded(np.mean(e[seen])))
            deviation = rounded(np.sqrt(rounded(np.mean(rounded(off[seen] ** 2)))))
            off = rounded(off / max(deviation, 1e-8))
            slope, start = params["steepness"][n], params["threshold"][n]
            gate[(*at, n, t)] = rounded(1 / (1 + np.exp(-rounded(slope * rounded(off - start)))))
    weigh = _per_head(
        lambda rounded, _, q, k, seen, at: _softmax(
            rounded, rounded(rounded(q @ k.T) / math.sqrt(q.shape[-1])), seen
        )
    )
    eye = np.zeros((*key.shape[:-1], key.shape[-3])) + np.eye(key.shape[-3])[:, None, :]
    weights, lse = weigh(
        params, query, key, eye, mask=mask, dtype=dtype, return_lse=True, **options
    )
    weights = rounded(np.swapaxes(weights, -2, -3) * gate)
    total = np.sum(weights, -1)
    weights = _share(rounded, weights)
    value = np.repeat(rounded(value), query.shape[-2] // key.shape[-2], axis=-2)
    out = rounded(np.einsum("...nts,...snd->...tnd", weights, value))
    with np.errstate(divide="ignore"):
        return (out, lse + np.log(total)) if return_lse else out


def _binary(params, query, key, value, *, dtype=np.float64, around=None, **options):
    """With `around`, signs are of those arrays, and move with the inputs where these are small."""
    rounded = oracles.rounder(dtype)
    query, key = rounded(query), rounded(key)
    given = (query, key) if around is None else around[:2]
    bits = [
        np.where(at >= 0, 1.0, -1.0) + np.where(np.abs(at) <= 1, x - at, 0.0)
        for x, at in zip((query, key), given, strict=True)
    ]
    group = query.shape[-2] // key.shape[-2]
    mu, nu = (
        np.swapaxes(rounded(np.mean(np.abs(x), -1)), -1, -2)
        for x in (query, np.repeat(key, group, axis=-2))
    )
    sized = [
        lambda score, i, j, head: score * mu[..., :, None],
        lambda score, i, j, head: score * nu[..., None, :],
        oracles.t5_bias(params["table"], bidirectional=True, max_distance=128),
    ]
    return oracles.attention(*bits, value, modifiers=sized, dtype=dtype, **options)


def _neural(params, query, key, value, *, dtype=np.float64, **options):
    """The network of each pair's projections, one behind the other."""
    rounded = oracles.rounder(dtype)

    def layer(name, x):
        return rounded(rounded(x @ params[f"{name}.weight"]) + params[f"{name}.bias"])

    wide = np.repeat(rounded(key), query.shape[-2] // key.shape[-2], axis=-2)
    q, k = (np.swapaxes(layer(n, x), -3, -2) for n, x in (("query", rounded(query)), ("key", wide)))
    shape = (*q.shape[:-1], k.shape[-2], q.shape[-1])
    x = np.concatenate(
        [np.broadcast_to(q[..., :, None, :], shape), np.broadcast_to(k[..., None, :, :], shape)], -1
    )
    for n in range(2):
        x = np.maximum(layer(f"hidden.{n}", x), 0.0)
    score = rounded(x @ params["last"])
    network = [lambda zero, i, j, head: score]
    return oracles.attention(
        np.zeros_like(query), np.zeros_like(key), value, modifiers=network, dtype=dtype, **options
    )


def taylor_softmax(score, visible, rounded):
    """1 + s + s^2 / 2 over its sum, and the logarithm of that."""
    series = rounded(rounded(1 + score) + rounded(score**2 / 2))
    series = np.where(visible, series, 0.0)
    with np.errstate(divide="ignore"):
        lse = np.log(np.sum(series, -1))
    return _share(rounded, series), lse


def _taylor(params, query, key, value, **options):
    return oracles.attention(query, key, value, normalizer=taylor_softmax, **options)


def _neighbours(rounded, scores, kernel, seen):
    """Sums over neighbours of a pair that belong together with it, a pair of shifts at a time.

    `seen`: both are real and of one document, whatever the order of time.
    """
    total, (rows, cols) = np.zeros_like(scores), kernel.shape[-2:]
    num_queries, num_keys = scores.shape[-2:]
    for a in range(min(rows, num_queries)):
        for b in range(cols):
            shift = b - cols // 2
            first, last = max(0, -shift), min(num_keys, num_keys - shift)
            here, there = slice(first, last), slice(first + shift, last + shift)
            back = slice(0, num_queries - a)
            counts = seen[..., a:, there] & seen[..., back, here]
            term = np.where(counts, scores[..., back, there], 0.0)
            total[..., a:, here] += kernel[:, rows - 1 - a, b, None, None] * term
    return rounded(total)


def _multi_token(
    params, query, key, value, *, mask=None, dtype=np.float64, x=None, return_lse=False, **options
):
    rounded = oracles.rounder(dtype)
    visible = _visible(mask, query, key, **options)
    # Causality apart: who is real, and of whose document.
    together = visible | np.swapaxes(visible, -1, -2)
    group = query.shape[-2] // key.shape[-2]
    q, k, v = (
        np.swapaxes(rounded(y), -3, -2)
        for y in (query, *(np.repeat(y, group, axis=-2) for y in (key, value)))
    )
    s = rounded(rounded(q @ np.swapaxes(k, -1, -2)) / math.sqrt(q.shape[-1]))
    s = _neighbours(rounded, np.where(visible, s, 0.0), params["pre_kernel"], together)
    s = rounded(np.einsum("hg,...gts->...hts", params["pre_mix"], s))
    weights, _ = oracles.softmax()(s, visible, rounded)
    weights = _neighbours(rounded, weights, params["post_kernel"], together)
    weights = np.where(visible, weights, 0.0)
    groups, members, _ = params["post_mix"].shape
    mixed = np.zeros_like(weights)
    for n in range(groups):
        part = slice(n * members, (n + 1) * members)
        mixed[..., part, :, :] = np.einsum(
            "...gts,gh->...hts", weights[..., part, :, :], params["post_mix"][n]
        )
    out = rounded(np.swapaxes(rounded(mixed) @ v, -3, -2))
    size = rounded(np.sqrt(rounded(np.mean(out**2, -1, keepdims=True)) + 1e-5))
    out = rounded(rounded(out / size) * params["norm.scale"])
    gate = rounded(rounded(out @ params["gate_weight"]) + params["gate_bias"])
    out = rounded(out * rounded(1 / (1 + np.exp(-gate))))
    return (out, None) if return_lse else out


FORMULAS_NORMALIZATION = {
    "multi-token-attention": _multi_token,
    "deconstructing-attention": _taylor,
    "binary-attention": _binary,
    "neural-attention": _neural,
    "energy-gated": _energy_gated,
    "selective-self-attention": _selective,
    "softplus-reweighting": _softplus_reweighting,
}
