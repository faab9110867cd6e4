"""Formulas of heads that share projections, keys or values, in float64 NumPy."""

import math

import numpy as np

from tests import oracles


def _copies(x, heads):
    """One array to a query head, from the key head that it reads."""
    return [x[..., n * x.shape[-2] // heads, :] for n in range(heads)]


def embedded(x, embedding, heads, operation, rounded):
    """Each head's own version of what it shares, written out."""
    made = [
        own * (1 + e) if operation == "multiply" else own + e
        for own, e in zip(_copies(x, heads), embedding, strict=True)
    ]
    return rounded(np.stack(made, axis=-2))


def head_embeddings(operation):
    """Keys and values of all heads, none of them shared."""

    def formula(params, query, key, value, *, dtype=np.float64, **options):
        rounded, heads = oracles.rounder(dtype), query.shape[-2]
        arrays = (
            embedded(rounded(x), params[f"{name}_embedding"], heads, operation, rounded)
            for name, x in (("query", query), ("key", key), ("value", value))
        )
        return oracles.attention(*arrays, dtype=dtype, **options)

    return formula


def group_sizes(norms, heads):
    """How many query heads read each key head, counted out one by one."""
    total = sum(norms)
    wanted = [heads * (x / total if total > 0 else 1 / len(norms)) for x in norms]
    sizes = [max(1, math.floor(w)) for w in wanted]
    while sum(sizes) < heads:
        sizes[max(range(len(sizes)), key=lambda g: (wanted[g] - sizes[g], -g))] += 1
    while sum(sizes) > heads:
        large = [g for g in range(len(sizes)) if sizes[g] > 1]
        sizes[min(large, key=lambda g: (wanted[g] - sizes[g], g))] -= 1
    return sizes


def in_groups(x, sizes):
    """Key heads, each as often as it is read."""
    return np.concatenate([np.repeat(x[..., g, None, :], n, -2) for g, n in enumerate(sizes)], -2)


def _key_driven(params, query, key, value, *, mask=None, dtype=np.float64, **options):
    """Each sequence has groups of its own, by its keys that are no padding."""
    rounded, heads = oracles.rounder(dtype), query.shape[-2]
    key, value = rounded(key), rounded(value)
    i, j = np.arange(query.shape[-3])[:, None], np.arange(key.shape[-3])[None, :]
    seen = np.ones((1, 1), bool) if mask is None else np.asarray(mask(i, j))
    seen = np.broadcast_to(seen, (*query.shape[:-3], 1, query.shape[-3], key.shape[-3]))
    real = seen.any(axis=(-3, -2))
    grouped = np.zeros((2, *key.shape[:-2], heads, key.shape[-1]))
    for at in np.ndindex(key.shape[:-3]):
        norms = [np.linalg.norm(key[at][real[at], g]) for g in range(key.shape[-2])]
        sizes = group_sizes(norms, heads)
        grouped[(0, *at)], grouped[(1, *at)] = (
            in_groups(key[at], sizes),
            in_groups(value[at], sizes),
        )
    return oracles.attention(query, *grouped, mask=mask, dtype=dtype, **options)


def _dynamic(params, query, key, value, **options):
    sizes = group_sizes(np.maximum(params["shares"], 0), query.shape[-2])
    return oracles.attention(query, in_groups(key, sizes), in_groups(value, sizes), **options)


FORMULAS_HEAD_SHARING = {
    "attention-head-embeddings": head_embeddings("multiply"),
    "attention-head-embeddings-add": head_embeddings("add"),
    "key-driven-gqa": _key_driven,
    "key-driven-gqa-dynamic": _dynamic,
}
