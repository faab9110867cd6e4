"""Formulas of heads that share or factor their projections, in float64 NumPy.

Those of layers take the layer's input and who sees whom, `formula(params, x, *, allowed)`: readers
by tokens, "*B T S".
"""

import math

import numpy as np

from tests import oracles


def mixed_values(mixing, value, seen, rounded, *, causal=False):
    """Each token's value from those of its document, one after the other; `seen` "*B T S"."""
    out = np.zeros(value.shape)
    for *at, t in np.ndindex(value.shape[:-2]):
        mates = [int(s) for s in np.flatnonzero(seen[(*at, t)])]
        for rank, s in enumerate(mates):
            if t in mates and not (causal and s > t):
                out[(*at, t)] += mixing[mates.index(t), rank] * value[(*at, s)]
    return rounded(out)


def _super(params, query, key, value, *, mask=None, dtype=np.float64, x=None, **options):
    rounded = oracles.rounder(dtype)
    i, j = np.arange(query.shape[-3])[:, None], np.arange(key.shape[-3])[None, :]
    seen = np.broadcast_to(mask(i, j), (*query.shape[:-3], 1, len(i), j.shape[-1]))[..., 0, :, :]
    value = mixed_values(params["mixing"], rounded(value), seen, rounded)
    return oracles.attention(query, key, value, mask=mask, dtype=dtype, **options)


def _tanh_scores(params, query, key, value, **options):
    squash = [lambda score, i, j, head: np.tanh(score)]
    return oracles.attention(query, key, value, modifiers=squash, scale=1.0, **options)


def lama(context, first, second, x, real, rounded, *, normalize=False):
    """Pooled vectors "*B M F", one head of one sequence after the other."""
    left, right = rounded(context @ first), rounded(x @ second)
    score = rounded(np.tanh(rounded(left[..., None, :] * right)))
    if normalize:
        length = rounded(np.sqrt(rounded(np.sum(score**2, -1, keepdims=True)) + 1e-6))
        score = rounded(score / length)
    out = np.zeros((*x.shape[:-2], score.shape[-1], x.shape[-1]))
    for *at, m in np.ndindex(out.shape[:-1]):
        tokens = np.flatnonzero(real[tuple(at)])
        if len(tokens):
            weights = rounded(np.exp(score[tuple(at)][tokens, m]))
            weights = rounded(weights / rounded(np.sum(weights)))
            out[(*at, m)] = weights @ x[tuple(at)][tokens]
    return rounded(out)


def _lama(params, x, *, allowed, dtype=np.float64):
    rounded = oracles.rounder(dtype)
    context = np.broadcast_to(params["context"], (*x.shape[:-2], x.shape[-1]))
    factors = params["context_factor"], params["token_factor"]
    return lama(context, *factors, rounded(x), allowed[..., 0, :], rounded)


def rms_normed(x, gain, rounded):
    return rounded(x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * gain)


def latent(params, x, *, rope, rounded, mask=None, offset=0, dtype=np.float64):
    """The layer of DeepSeek-V2, head by head, by keys and values of each head."""
    x, params = rounded(x), {name: rounded(p) for name, p in params.items()}
    down = rounded(x @ params["down"])
    c, turned = np.split(down, [down.shape[-1] - rope], axis=-1)
    if "norm.scale" in params:
        c = rms_normed(c, params["norm.scale"], rounded)
    turned = rounded(oracles.rope_interleaved(turned[..., None, :], offset=offset))
    source = x
    if "down_query" in params:
        source = rounded(x @ params["down_query"])
        if "query_norm.scale" in params:
            source = rms_normed(source, params["query_norm.scale"], rounded)
    out = np.zeros_like(x)
    for n in range(params["up_key"].shape[1]):
        query = rounded(source @ params["up_query"][:, n])[..., None, :]
        own, other = np.split(query, [query.shape[-1] - rope], axis=-1)
        other = rounded(oracles.rope_interleaved(other, offset=offset))
        query = np.concatenate([own, other], axis=-1)
        key = np.concatenate([rounded(c @ params["up_key"][:, n])[..., None, :], turned], axis=-1)
        value = rounded(c @ params["up_value"][:, n])[..., None, :]
        head = oracles.attention(
            query, key, value, mask=mask, dtype=dtype, scale=1 / math.sqrt(query.shape[-1])
        )
        out += head[..., 0, :] @ params["out"][n]
    return rounded(out)


def _mla(params, x, *, allowed, dtype=np.float64):
    """The example turns four channels."""
    mask = oracles.array(allowed[..., None, :, :])
    rounded = oracles.rounder(dtype)
    return latent(params, x, rope=4, rounded=rounded, mask=mask, dtype=dtype)


FORMULAS_HEADS_LOW_RANK = {
    "lama-pooling": _lama,
    "low-rank-mhsa": _tanh_scores,
    "mla": _mla,
    "optimised-efficient-super-attention": _super,
}
