"""Formulas of attention that is cut over devices, in float64 NumPy."""

import numpy as np

from tests import oracles


def _each(rule):
    """A rule about one query and one key, asked of every pair."""
    return lambda i, j: np.vectorize(rule, otypes=[bool])(*np.broadcast_arrays(i, j))


def star_rule(block, anchor, context):
    """Block by block: what a host that holds it sees, then what the query does."""

    def sees(i, j):
        if j > i:
            return False
        if i >= context:
            return True
        start = max(s for s in range(0, i + 1, block))
        return j < anchor or j >= start

    return _each(sees)


def shard_rule(share, stride, block, near):
    """What one head sees; a share of None is everything."""

    def sees(i, j):
        behind = 0
        while (j // block + behind + 1) * block <= i:
            behind += 1
        if j > i:
            return False
        return behind < near or share is None or (j // block + share) % stride == 0

    return _each(sees)


def by_head(rules):
    return lambda i, j: np.stack([rule(i, j) for rule in rules])


def _narrowed(rule, mask):
    return rule if mask is None else oracles.both(rule, mask)


def _star(params, query, key, value, *, mask=None, **options):
    """Blocks of 4, an anchor of 3, a context of 10."""
    rule = star_rule(4, 3, 10)
    return oracles.attention(query, key, value, mask=_narrowed(rule, mask), **options)


def _s2(params, query, key, value, *, mask=None, **options):
    """Four heads in two pairs that share the context in blocks of 2."""
    rule = by_head([shard_rule(n // 2, 2, 2, 1) for n in range(4)])
    return oracles.attention(query, key, value, mask=_narrowed(rule, mask), **options)


FORMULAS_DISTRIBUTED = {"star-attention": _star, "s2-attention": _s2}
