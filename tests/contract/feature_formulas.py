"""Formulas of linear attention by feature maps, over all pairs and in float64."""

import numpy as np

from tests import oracles


def _visible(mask, query, key, query_offset, key_offset):
    """Who sees whom, "*B N T S"."""
    i = query_offset + np.arange(query.shape[-3])[:, None]
    j = key_offset + np.arange(key.shape[-3])[None, :]
    allowed = np.ones((1, 1), bool) if mask is None else np.asarray(mask(i, j), bool)
    shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    return np.broadcast_to(allowed, shape)


def _per_head(function):
    """A formula from `function(rounded, params, q, k, v, seen, place)` of a head: (T, H), (T, S).

    `params` are those given, `head` among them; `place` are the positions of queries and keys.
    """

    def formula(
        params, query, key, value, *, mask=None, query_offset=0, key_offset=0, dtype=np.float64,
        return_lse=False, **_,
    ):  # fmt: skip
        rounded = oracles.rounder(dtype)
        query, key, value = rounded(query), rounded(key), rounded(value)
        visible = _visible(mask, query, key, query_offset, key_offset)
        place = (
            query_offset + np.arange(query.shape[-3]),
            key_offset + np.arange(key.shape[-3]),
        )
        out = np.zeros((*query.shape[:-1], value.shape[-1]))
        group = query.shape[-2] // key.shape[-2]
        for at in np.ndindex(*query.shape[:-3], query.shape[-2]):
            *row, n = at
            q, k, v = (
                query[(*row, slice(None), n)],
                *(x[(*row, slice(None), n // group)] for x in (key, value)),
            )
            seen = visible[at]
            out[(*row, slice(None), n)] = function(
                rounded, params | {"head": n}, q, k, v, seen, place
            )
        return (out, None) if return_lse else out

    return formula


def _divided(rounded, weights, value, total=None):
    total = rounded(np.sum(weights, -1, keepdims=True)) if total is None else total
    return rounded(rounded(weights @ value) / np.where(total == 0, 1.0, total))


def _softmax_of_logs(rounded, query, key, value, seen):
    """Weights sum_h exp(q_th + k_sh), their sum over h taken in the logarithm."""
    with np.errstate(over="ignore"):
        logits = np.logaddexp.reduce(rounded(query[:, None, :] + key[None, :, :]), axis=-1)
    logits = np.where(seen, rounded(logits), -np.inf)
    top = np.max(logits, -1, keepdims=True)
    weights = rounded(np.exp(rounded(logits - np.where(np.isfinite(top), top, 0.0))))
    return _divided(rounded, weights, value)


@_per_head
def _performer(rounded, params, query, key, value, seen, place):
    rows = rounded(params["features"])
    query, key = (rounded(x * x.shape[-1] ** -0.25) for x in (query, key))
    square = rounded(np.sum(key**2, -1, keepdims=True) / 2)
    logs = rounded(query @ rows.T), rounded(rounded(key @ rows.T) - square)
    return _softmax_of_logs(rounded, *logs, value, seen)


def cosformer(max_length):
    """Cosines of distances, of each pair; the denominator is at least a millionth."""

    @_per_head
    def formula(rounded, params, query, key, value, seen, place):
        distance = place[0][:, None] - place[1][None, :]
        cosine = rounded(np.cos(np.pi / 2 * distance / max_length))
        products = rounded(np.maximum(query, 0.0) @ np.maximum(key, 0.0).T)
        weights = np.where(seen, rounded(products * cosine), 0.0)
        total = rounded(np.maximum(np.sum(weights, -1, keepdims=True), 1e-6))
        return _divided(rounded, weights, value, total)

    return formula


@_per_head
def _two_softmaxes(rounded, params, query, key, value, seen, place):
    """Softmax over the channels of a query, and over the keys it sees in each channel."""
    rho_q = rounded(np.exp(rounded(query - np.max(query, -1, keepdims=True))))
    rho_q = rounded(rho_q / rounded(np.sum(rho_q, -1, keepdims=True)))
    weights = np.zeros(seen.shape)
    for t, row in enumerate(seen):
        if not row.any():
            continue
        rho_k = rounded(np.exp(rounded(key[row] - np.max(key[row], 0))))
        rho_k = rounded(rho_k / rounded(np.sum(rho_k, 0)))
        weights[t, row] = rounded(rho_k @ rho_q[t])
    return rounded(weights @ value)


@_per_head
def _log_normal(rounded, params, query, key, value, seen, place):
    """Concentrated as for inputs of unit variance, which the example is made for."""
    common = np.sqrt((1.0 + 0.35487039130661086) / (2 * 0.14855178144710912))
    return _softmax_of_logs(rounded, rounded(common * query), rounded(common * key), value, seen)


@_per_head
def inline(rounded, params, query, key, value, seen, place):
    """Scores minus their mean, over the number of keys, plus one over it."""
    scores = rounded(rounded(query @ key.T) * query.shape[-1] ** -0.5)
    count = np.maximum(np.sum(seen, -1, keepdims=True), 1)
    mean = rounded(np.sum(np.where(seen, scores, 0.0), -1, keepdims=True) / count)
    weights = rounded((rounded(scores - mean) + 1.0) / count)
    return rounded(np.where(seen, weights, 0.0) @ value)


@_per_head
def _fastmax(rounded, params, query, key, value, seen, place):
    """1 + x + x^2 / 2 of the products of standardized tokens."""

    def standard(x):
        x = rounded(x - rounded(np.mean(x, -1, keepdims=True)))
        return rounded(x / rounded(np.sqrt(rounded(np.mean(x**2, -1, keepdims=True)) + 1e-6)))

    product = rounded(standard(query) @ standard(key).T)
    weights = rounded(rounded(1.0 + product) + rounded(product**2) / 2)
    return _divided(rounded, np.where(seen, weights, 0.0), value)


@_per_head
def _linformer(rounded, params, query, key, value, seen, place):
    """Softmax attention to compressed keys; what no query sees is zero before that."""
    real = seen.any(0)[:, None]
    mixed = []
    for name, x in (("key_projection", key), ("value_projection", value)):
        columns = params[name][:, place[1][0] : place[1][0] + len(x)]
        mixed.append(rounded(columns @ np.where(real, x, 0.0)))
    scores = rounded(rounded(query @ mixed[0].T) * query.shape[-1] ** -0.5)
    weights = rounded(np.exp(rounded(scores - np.max(scores, -1, keepdims=True))))
    return np.where(seen.any(-1)[:, None], _divided(rounded, weights, mixed[1]), 0.0)


@_per_head
def _ecoformer(rounded, params, query, key, value, seen, place):
    """Four bits that agree or not, and five more."""
    weights, anchors, mean, sigma = (
        rounded(params[name][params["head"]])
        for name in ("weights", "anchors", "mean", "bandwidth")
    )

    def codes(x):
        norm = rounded(np.sqrt(rounded(np.sum(x**2, -1, keepdims=True))))
        x = rounded(x / np.where(norm == 0, 1.0, norm))
        distance = rounded(np.sum(rounded(x[:, None] - anchors) ** 2, -1))
        kernel = rounded(rounded(np.exp(rounded(-distance / (2 * sigma)))) - mean)
        return np.where(rounded(kernel @ weights.T) > 0, 1.0, -1.0)

    agreement = codes(query) @ codes(key).T + 5.0
    return _divided(rounded, np.where(seen, agreement, 0.0), value)


FORMULAS_FEATURES = {
    "cosformer": cosformer(4096),
    "ecoformer": _ecoformer,
    "efficient-attention-linear": _two_softmaxes,
    "fast-factorizable": _fastmax,
    "inline-attention": inline,
    "latte": _two_softmaxes,
    "linear-log-normal": _log_normal,
    "linformer": _linformer,
    "performer": _performer,
}
