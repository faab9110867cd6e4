r"""The formulas, once more, in float64 NumPy: what the tests believe.

Nothing here is shared with attnlab: no line, no helper, no import. Where a loop says it more
clearly than broadcasting, there is a loop.

Axes as everywhere: *B batch, T queries, S keys, N query heads, K key heads, H width, D value width.
A *mask* here is a function of the absolute positions `i` (T, 1) and `j` (1, S) with a boolean
result that broadcasts to (*B, N, T, S). A *modifier* is a function of the scores (*B, N, T, S),
`i`, `j` and `head` (N, 1, 1). A *normaliser* maps scores and visibility to weights and the log of
their sum.

Every formula can also be run "in" a narrower dtype: each step is then rounded to it, products being
summed exactly and rounded once, as matrix units nearly do. That is the *plain formula in the same
dtype* from which error budgets are derived.
"""

import math

import numpy as np


def rounder(dtype=np.float64):
    """x -> x rounded to dtype, still carried in float64."""
    if np.dtype(dtype) == np.float64:
        return lambda x: np.asarray(x, np.float64)

    def to_dtype(x):
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(x, np.float64).astype(dtype).astype(np.float64)

    return to_dtype


# ---- masks ---------------------------------------------------------------------------------------


def full():
    return lambda i, j: np.ones(np.broadcast_shapes(i.shape, j.shape), bool)


def causal():
    return lambda i, j: j <= i


def window(left, right=0):
    """Keys from `left` places before the query to `right` places after it; None is no bound."""

    def visible(i, j):
        first = np.min(j) if left is None else i - left
        last = np.max(j) if right is None else i + right
        return ~((j < first) | (j > last))

    return visible


def prefix(length):
    """Keys at positions below `length`, for every query; `length` may be per batch entry."""
    length = np.asarray(length)[..., None, None, None]
    return lambda i, j: (j + 0 * i)[None] < length


def segments(query_ids, key_ids=None):
    """Equal ids meet; a negative id is padding."""
    query_ids = np.asarray(query_ids)
    key_ids = query_ids if key_ids is None else np.asarray(key_ids)

    def visible(i, j):
        same = query_ids[..., None, :, None] == key_ids[..., None, None, :]
        return same & (query_ids[..., None, :, None] >= 0)

    return visible


def causal_by(query_place, key_place):
    """Keys whose place, whatever their order, is not after the query's."""
    query_place, key_place = np.asarray(query_place), np.asarray(key_place)
    return lambda i, j: ~(key_place[..., None, None, :] > query_place[..., None, :, None])


def key_padding(lengths):
    """Keys at positions below `lengths`, one length per batch entry."""
    return prefix(lengths)


def strided(stride, offset=0):
    """Every `stride`-th key, counted back from the query."""

    def visible(i, j):
        return np.mod(i - j - offset, stride) == 0

    return visible


def array(allowed):
    return lambda i, j: np.asarray(allowed, bool)


def both(first, second):
    return lambda i, j: np.logical_and(first(i, j), second(i, j))


def either(first, second):
    return lambda i, j: np.logical_or(first(i, j), second(i, j))


def negation(mask):
    return lambda i, j: np.logical_not(mask(i, j))


# ---- score modifiers -----------------------------------------------------------------------------


def bias(values):
    return lambda score, i, j, head: score + np.asarray(values, np.float64)


def alibi_slopes(num_heads):
    """Press, Smith and Lewis' released rule: powers of two in closed form, the rest interleaved."""
    if num_heads & (num_heads - 1) == 0:
        return np.array([2.0 ** (-8.0 * (n + 1) / num_heads) for n in range(num_heads)])
    below = 2 ** math.floor(math.log2(num_heads))
    every_second = alibi_slopes(2 * below)[0::2]
    return np.concatenate([alibi_slopes(below), every_second[: num_heads - below]])


def alibi(slopes):
    slopes = np.asarray(slopes, np.float64)
    return lambda score, i, j, head: score - slopes[head] * np.abs(j - i)


def t5_bucket(relative, *, bidirectional, num_buckets, max_distance):
    """The bucket of one relative position key - query, from the Mesh TensorFlow source of T5."""
    bucket, distance = 0, -int(relative)
    if bidirectional:
        num_buckets //= 2
        if distance < 0:
            bucket += num_buckets
        distance = abs(distance)
    else:
        distance = max(distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return bucket + distance
    # The released code divides and takes logarithms in float32, and so decides ties at the edges.
    ratio = np.log(np.float32(distance) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    far = exact + int(np.float32(ratio) * np.float32(num_buckets - exact))
    return bucket + min(far, num_buckets - 1)


def t5_bias(table, *, bidirectional, max_distance):
    """`table` is (heads, number of buckets)."""
    table = np.asarray(table, np.float64)

    def modify(score, i, j, head):
        relative = j - i
        lookup = {
            int(r): t5_bucket(
                r,
                bidirectional=bidirectional,
                num_buckets=table.shape[-1],
                max_distance=max_distance,
            )
            for r in np.unique(relative)
        }
        buckets = np.vectorize(lookup.__getitem__)(relative)
        return score + table[:, buckets]

    return modify


def soft_cap(cap):
    return lambda score, i, j, head: cap * np.tanh(score / cap)


def temperature(value):
    return lambda score, i, j, head: score / np.asarray(value, np.float64)


def bam_prior(shape, scale, loc, *, epsilon=1e-5):
    """Log-density of the generalised Gaussian of BAM (released code), up to its normaliser."""
    shape, scale, loc = (np.asarray(x, np.float64) for x in (shape, scale, loc))

    def modify(score, i, j, head):
        center = np.exp(loc[head]) - np.exp(-loc[head])
        distance = np.abs((j - i) - center) + epsilon
        return score - np.exp(scale[head]) * distance ** shape[head]

    return modify


# ---- normalisers ---------------------------------------------------------------------------------


def softmax(sink=None):
    """exp(s) / sum exp(s) over what is visible; a sink adds its exp to the sum, and no value."""

    def normalize(score, visible, rounded):
        masked = np.where(visible, score, -np.inf)
        floor = -np.inf
        if sink is not None:
            floor = np.broadcast_to(np.asarray(sink, np.float64), score.shape[-3:-2])[:, None, None]
        top = np.maximum(np.max(masked, axis=-1, keepdims=True), floor)
        safe = np.where(np.isfinite(top), top, 0.0)
        with np.errstate(over="ignore"):  # in float16 a score may be infinite
            exp = rounded(np.exp(rounded(masked - safe)))
        total = np.sum(exp, axis=-1, keepdims=True)
        if sink is not None:
            total = total + rounded(np.exp(rounded(floor - safe)))
        total = rounded(total)
        with np.errstate(divide="ignore"):
            lse = (np.log(total) + safe)[..., 0]
        with np.errstate(invalid="ignore"):
            return rounded(exp / np.where(total == 0, 1.0, total)), lse

    return normalize


def softmax_plus_one():
    return softmax(sink=0.0)


def sigmoid():
    def normalize(score, visible, rounded):
        small = np.exp(-np.abs(score))
        value = np.where(score >= 0, 1.0 / (1.0 + small), small / (1.0 + small))
        return rounded(np.where(visible, value, 0.0)), None

    return normalize


def softplus_l1():
    """softplus(s) / sum softplus(s), by logarithms: far below zero log softplus(s) is s itself."""

    def log_softplus(s):
        near = np.maximum(s, -30.0)
        near = np.log(np.maximum(near, 0.0) + np.log1p(np.exp(-np.abs(near))))
        return np.where(s < -30.0, s - np.exp(np.minimum(s, 0.0)) / 2.0, near)

    def normalize(score, visible, rounded):
        return softmax()(rounded(log_softplus(score)), visible, rounded)

    return normalize


def relu_squared():
    def normalize(score, visible, rounded):
        return rounded(np.where(visible, rounded(np.maximum(score, 0.0)) ** 2, 0.0)), None

    return normalize


def _rows(score, visible, of_row):
    """Apply `of_row` to the visible scores of each row; a row that sees nothing stays zero."""
    visible = np.broadcast_to(visible, score.shape)
    weights = np.zeros(score.shape)
    for at in np.ndindex(score.shape[:-1]):
        seen = visible[at]
        if seen.any():
            weights[at][seen] = of_row(score[at][seen])
    return weights


def sparsemax():
    """The Euclidean projection of a row of scores onto the simplex, one support size at a time."""

    def project(z):
        descending = np.sort(z)[::-1]
        for support in range(len(z), 0, -1):
            threshold = (np.sum(descending[:support]) - 1.0) / support
            if descending[support - 1] > threshold:
                return np.maximum(z - threshold, 0.0)
        raise AssertionError("a projection onto the simplex has at least one support")

    return lambda score, visible, rounded: (rounded(_rows(score, visible, project)), None)


def entmax15():
    """w = max(z/2 - tau, 0)^2 with tau such that the row sums to one, found by bisection."""

    def solve(z):
        half = z / 2.0
        low, high = np.max(half) - 1.0, np.max(half)
        for _ in range(200):
            middle = (low + high) / 2.0
            if np.sum(np.maximum(half - middle, 0.0) ** 2) >= 1.0:
                low = middle
            else:
                high = middle
        return np.maximum(half - low, 0.0) ** 2

    return lambda score, visible, rounded: (rounded(_rows(score, visible, solve)), None)


# ---- attention -----------------------------------------------------------------------------------


def attention(
    query,
    key,
    value,
    *,
    mask=None,
    modifiers=(),
    normalizer=None,
    scale=None,
    query_offset=0,
    key_offset=0,
    keep=None,
    dropout_rate=0.0,
    return_lse=False,
    dtype=np.float64,
):
    """What `attnlab.attention` should return. `keep` is the dropout's keep-mask (*B, N, T, S)."""
    rounded = rounder(dtype)
    query, key, value = rounded(query), rounded(key), rounded(value)
    num_queries, num_heads, width = query.shape[-3:]
    num_keys, num_kv_heads = key.shape[-3:-1]
    batch = query.shape[:-3]
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)

    i = query_offset + np.arange(num_queries)[:, None]
    j = key_offset + np.arange(num_keys)[None, :]
    head = np.arange(num_heads)[:, None, None]
    visible = np.ones((1, 1), bool) if mask is None else np.asarray(mask(i, j), bool)
    visible = np.broadcast_to(visible, (*batch, num_heads, num_queries, num_keys))

    score = np.zeros((*batch, num_heads, num_queries, num_keys))
    group = num_heads // num_kv_heads
    for n in range(num_heads):
        score[..., n, :, :] = rounded(
            query[..., n, :] @ np.swapaxes(key[..., n // group, :], -1, -2)
        )
    score = rounded(score * scale)
    for modify in modifiers:
        score = rounded(modify(score, i, j, head))

    weights, lse = (softmax() if normalizer is None else normalizer)(score, visible, rounded)
    if keep is not None:
        weights = rounded(np.where(keep, weights / (1.0 - dropout_rate), 0.0))

    # A key that is not visible takes no part at all, whatever stands in its place.
    out = np.zeros((*batch, num_queries, num_heads, value.shape[-1]))
    for n in range(num_heads):
        out[..., n, :] = rounded(weights[..., n, :, :] @ value[..., n // group, :])
    return (out, lse) if return_lse else out


# ---- mechanisms ----------------------------------------------------------------------------------


def rope(x, *, offset=0, base=10000.0):
    """Each pair of channels turned by position times frequency; channel p pairs with p + H/2."""
    x = np.asarray(x, np.float64)
    turned, half = np.zeros_like(x), x.shape[-1] // 2
    for t in range(x.shape[-3]):
        for p in range(half):
            angle = (offset + t) * base ** (-2.0 * p / x.shape[-1])
            a, b = x[..., t, :, p], x[..., t, :, half + p]
            turned[..., t, :, p] = a * math.cos(angle) - b * math.sin(angle)
            turned[..., t, :, half + p] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def rope_interleaved(x, *, offset=0, base=10000.0):
    """The same turn with neighbouring channels as pairs (2p, 2p + 1), as in the paper."""
    x = np.asarray(x, np.float64)
    turned = np.zeros_like(x)
    for t in range(x.shape[-3]):
        for p in range(x.shape[-1] // 2):
            angle = (offset + t) * base ** (-2.0 * p / x.shape[-1])
            a, b = x[..., t, :, 2 * p], x[..., t, :, 2 * p + 1]
            turned[..., t, :, 2 * p] = a * math.cos(angle) - b * math.sin(angle)
            turned[..., t, :, 2 * p + 1] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def sinusoidal(num_positions, features, *, offset=0, base=10000.0):
    """sin and cos of position over base^(2p/features), alternating: section 3.5 of the paper."""
    table = np.zeros((num_positions, features))
    for t in range(num_positions):
        for c in range(features):
            angle = (offset + t) / base ** (2 * (c // 2) / features)
            table[t, c] = math.sin(angle) if c % 2 == 0 else math.cos(angle)
    return table


def scalable(scale_by_head, mask, num_queries, num_keys, *, query_offset=0, key_offset=0):
    """SSMax: scores times s_head * log(number of keys that the query sees)."""
    i = query_offset + np.arange(num_queries)[:, None]
    j = key_offset + np.arange(num_keys)[None, :]
    seen = np.asarray(mask(i, j))
    seen = np.broadcast_to(seen, np.broadcast_shapes(seen.shape, (num_queries, num_keys)))
    count = np.maximum(np.sum(seen, axis=-1, keepdims=True), 1)
    by_head = np.asarray(scale_by_head, np.float64)
    return lambda score, i, j, head: score * (by_head[head] * np.log(count))


# ---- derivatives ---------------------------------------------------------------------------------


def directional(function, at, direction, *, step=1e-5):
    """d/dt function(at + t direction), a central difference of fourth order in float64."""

    def along(t):
        return function(*(a + t * d for a, d in zip(at, direction, strict=True)))

    near = along(step) - along(-step)
    far = along(2 * step) - along(-2 * step)
    return (8.0 * near - far) / (12.0 * step)


def curvature(function, at, first, second, *, step=1e-3):
    """d2/ds dt function(at + s first + t second), by central differences in float64."""

    def along(s, t):
        moved = (a + s * u + t * v for a, u, v in zip(at, first, second, strict=True))
        return function(*moved)

    def mixed(h):
        return (along(h, h) - along(h, -h) - along(-h, h) + along(-h, -h)) / (4.0 * h * h)

    return (4.0 * mixed(step) - mixed(2 * step)) / 3.0  # Richardson: fourth order
