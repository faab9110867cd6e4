"""Formulas of heads that relate tokens and of networks in attention's place, in float64 NumPy."""

import numpy as np

from tests import oracles


def softmax(x):
    e = np.exp(x - np.max(x, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def retrieved(rounded, x, weight, bias, templates, library, heads):
    """Symbols, a token and a head at a time."""
    query, width = rounded(rounded(x @ weight) + bias), x.shape[-1] // heads
    out = np.zeros(x.shape)
    for n in range(heads):
        part = slice(n * width, (n + 1) * width)
        score = rounded(rounded(query[..., part] @ templates[:, part].T) / np.sqrt(width))
        out[..., part] = rounded(rounded(softmax(score)) @ library[:, part])
    return out


def relational(rounded, weights, queries, keys, mix, symbols, activation=lambda r: r):
    """Each relation of each pair, then its weighted sum: heads "N T S" to "T N D"."""
    relation = np.einsum("...tlp,...slp->...tsl", queries, keys) / np.sqrt(queries.shape[-1])
    relation = rounded(activation(rounded(relation)))
    out = []
    for n in range(weights.shape[-3]):
        a = weights[..., n, :, :]
        read = rounded(np.einsum("...ts,...tsl->...tl", a, relation))
        out.append(rounded(rounded(read @ mix[n].T) + rounded(a @ symbols[..., n, :])))
    return np.stack(out, -2)


def _dual(params, query, key, value, *, x, dtype=np.float64, return_lse=False, **options):
    """Two sensory and two relational heads, one head of symbols, two of their retrieval."""
    rounded = oracles.rounder(dtype)
    count, width, length = 2, value.shape[-1], key.shape[-3]
    eye = np.zeros((*key.shape[:-1], length)) + np.eye(length)[:, None, :]
    weights, lse = oracles.attention(query, key, eye, dtype=dtype, return_lse=True, **options)
    weights = np.swapaxes(weights, -2, -3)
    value = np.repeat(rounded(value), query.shape[-2] // key.shape[-2], axis=-2)
    out = np.zeros((*query.shape[:-1], width))
    for n in range(query.shape[-2] - count):
        out[..., n, :] = rounded(weights[..., n, :, :] @ value[..., n, :])
    x = rounded(x)
    queries, keys = (
        rounded(x @ params[f"{name}_relations.weight"]).reshape(*x.shape[:-1], count, -1)
        for name in ("query", "key")
    )
    names = ("query.weight", "query.bias", "templates", "library")
    found = retrieved(rounded, x, *(params[f"symbols.{name}"] for name in names), 2)
    symbols = rounded(found @ params["symbol.weight"])[..., None, :]
    symbols = np.broadcast_to(symbols, (*symbols.shape[:-2], count, width))
    out[..., -count:, :] = relational(
        rounded, weights[..., -count:, :, :], queries, keys, params["weight"], symbols
    )
    return (out, lse) if return_lse else out


def normed(rounded, x, gain, shift):
    off = rounded(x - rounded(np.mean(x, -1, keepdims=True)))
    size = np.sqrt(rounded(np.mean(rounded(off * off), -1, keepdims=True)) + 1e-5)
    return rounded(rounded(rounded(off / size) * gain) + shift)


def network(rounded, params, index, z):
    """One network's output for one input."""
    p = {name.split(".")[-1]: x[index] for name, x in params.items()}
    z = normed(rounded, z, p["gain"], p["shift"])
    hidden = rounded(rounded(z @ p["expand"]) + p["expand_bias"])
    hidden = np.where(hidden > 0, hidden, rounded(0.01 * hidden))
    hidden = normed(rounded, hidden, p["hidden_gain"], p["hidden_shift"])
    return rounded(rounded(hidden @ p["contract"]) + p["contract_bias"])


def _feedforward(params, query, key, value, *, mask, dtype=np.float64, x=None, return_lse=False,
                 **options):  # fmt: skip
    """A network to a head, each on sixteen tokens; padding is what sees or is seen by nothing."""
    rounded = oracles.rounder(dtype)
    heads, width = query.shape[-2], value.shape[-1]
    i, j = (np.arange(y.shape[-3]) for y in (query, key))
    seen = np.broadcast_to(
        mask(i[:, None], j[None, :]), (*query.shape[:-3], 1, query.shape[-3], key.shape[-3])
    )
    out = np.zeros((*query.shape[:-1], width))
    for at in np.ndindex(query.shape[:-3]):
        z = np.zeros((16, *value.shape[-2:]))
        real = seen[at][0].any(0)
        z[: len(real)][real] = rounded(value[at])[real]
        for n in range(heads):
            tokens = network(rounded, params, n, z.reshape(-1)).reshape(16, width)
            out[at][:, n] = tokens[: query.shape[-3]] * seen[at][0].any(1)[:, None]
    return (out, None) if return_lse else out


FORMULAS_BLOCKS = {
    "feedforward-attention": _feedforward,
    "dual-attention-transformer": _dual,
}
