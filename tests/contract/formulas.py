"""The formula of every atlas entry, from the oracles: `formula(params, query, key, value, ...)`.

`params` are the entry's parameters by name, as its module holds them. A new entry needs one line
here; without it the contract fails, for there would be nothing independent to compare with.
"""

import math

import numpy as np

from tests import oracles
from tests.contract.block_formulas import FORMULAS_BLOCKS
from tests.contract.distributed_formulas import FORMULAS_DISTRIBUTED
from tests.contract.feature_formulas import FORMULAS_FEATURES
from tests.contract.head_sharing_formulas import FORMULAS_HEAD_SHARING
from tests.contract.heads_low_rank_formulas import FORMULAS_HEADS_LOW_RANK
from tests.contract.normalization_formulas import FORMULAS_NORMALIZATION
from tests.contract.positional_formulas import FORMULAS_POSITIONAL
from tests.contract.recurrence_formulas import FORMULAS_RECURRENCES


def _plain(params, query, key, value, **options):
    return oracles.attention(query, key, value, **options)


def _sigmoid(params, query, key, value, **options):
    shift = oracles.bias(np.full((1, 1, 1), -math.log(256)))  # the example is built for length 256
    return oracles.attention(
        query, key, value, modifiers=[shift], normalizer=oracles.sigmoid(), **options
    )


def _alibi(params, query, key, value, **options):
    slopes = oracles.alibi_slopes(query.shape[-2])
    return oracles.attention(query, key, value, modifiers=[oracles.alibi(slopes)], **options)


def _t5(params, query, key, value, **options):
    bias = oracles.t5_bias(params["table"], bidirectional=True, max_distance=128)
    return oracles.attention(query, key, value, modifiers=[bias], **options)


def _placed(place):
    """Attention after `place` has acted on queries and keys, by their positions."""

    def formula(params, query, key, value, **options):
        rounded = oracles.rounder(options.get("dtype", np.float64))
        return oracles.attention(
            rounded(place(rounded(query), options.get("query_offset", 0))),
            rounded(place(rounded(key), options.get("key_offset", 0))),
            value,
            **options,
        )

    return formula


def _add_waves(x, offset):
    return x + oracles.sinusoidal(x.shape[-3], x.shape[-1], offset=offset)[:, None, :]


def _prior(params):
    return oracles.bam_prior(params["shape"], params["scale"], params["loc"])


def _bam(params, query, key, value, **options):
    return oracles.attention(query, key, value, modifiers=[_prior(params)], **options)


def _bam_ssmax(params, query, key, value, **options):
    sharpen = oracles.scalable(
        params["length_scale"],
        options.get("mask") or oracles.full(),
        query.shape[-3],
        key.shape[-3],
        query_offset=options.get("query_offset", 0),
        key_offset=options.get("key_offset", 0),
    )
    return oracles.attention(query, key, value, modifiers=[_prior(params), sharpen], **options)


def _linear_transformer(params, query, key, value, *, mask, dtype=np.float64, **options):
    """Weights phi(q) . phi(k), over their sum and a millionth: elu + 1 written out."""
    rounded = oracles.rounder(dtype)

    def phi(x):
        return rounded(np.where(x > 0, x + 1.0, np.exp(np.minimum(x, 0.0))))

    num_queries, num_heads, num_keys = *query.shape[-3:-1], key.shape[-3]
    i = options.get("query_offset", 0) + np.arange(num_queries)[:, None]
    j = options.get("key_offset", 0) + np.arange(num_keys)[None, :]
    visible = np.asarray(mask(i, j))
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    for n in range(num_heads):
        m = n * key.shape[-2] // num_heads
        weights = rounded(phi(query[..., n, :]) @ np.swapaxes(phi(key[..., m, :]), -1, -2))
        weights = np.where(visible[..., 0, :, :], weights, 0.0)
        total = rounded(rounded(weights.sum(-1, keepdims=True)) + 1e-6)
        out[..., n, :] = rounded(rounded(weights @ value[..., m, :]) / total)
    return (out, None) if options.get("return_lse") else out


FORMULAS = {
    "linear-transformer": _linear_transformer,
    "multi-head-attention": _plain,
    "memory-efficient-attention": _plain,
    "ring-attention": _plain,
    "nope": _plain,
    "sigmoid-attention": _sigmoid,
    "alibi": _alibi,
    "t5-bias": _t5,
    "rope": _placed(lambda x, offset: oracles.rope_interleaved(x, offset=offset)),
    "sinusoidal": _placed(_add_waves),
    "bam": _bam,
    "bam-ssmax": _bam_ssmax,
    **FORMULAS_BLOCKS,
    **FORMULAS_DISTRIBUTED,
    **FORMULAS_FEATURES,
    **FORMULAS_HEAD_SHARING,
    **FORMULAS_HEADS_LOW_RANK,
    **FORMULAS_POSITIONAL,
    **FORMULAS_NORMALIZATION,
    **FORMULAS_RECURRENCES,
}
