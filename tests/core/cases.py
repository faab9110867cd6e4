"""Named structures whose derivatives are checked: every trainable parameter appears in one of them.

Each case says the same thing twice: as arguments of `attnlab.attention`, and as arguments of the
oracle, both as functions of the parameters that are differentiated.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from attnlab import masks, normalizers, scores
from tests import oracles

QUERIES, KEYS, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 13, 19, 4, 2, 4, 3


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    params: dict[str, np.ndarray]
    ours: Callable[[dict], dict]
    oracle: Callable[[dict], dict]
    lse: bool = True  # whether the log-sum-exp is defined
    streams: bool = True  # whether blockwise can
    query_offset: int = 6

    def __str__(self):
        return self.name


def draw_inputs(seed: int):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((2, QUERIES, HEADS, WIDTH)).astype(np.float32)
    key = rng.standard_normal((2, KEYS, KV_HEADS, WIDTH)).astype(np.float32)
    value = rng.standard_normal((2, KEYS, KV_HEADS, VALUE_WIDTH)).astype(np.float32)
    return query, key, value


_RNG = np.random.default_rng(20240)
_LENGTHS = np.array([19, 7], np.int32)
_IDS = np.sort(_RNG.integers(-1, 3, (2, QUERIES)).astype(np.int32))
_KEY_IDS = np.sort(_RNG.integers(-1, 3, (2, KEYS)).astype(np.int32))
_ALLOWED = _RNG.random((2, HEADS, QUERIES, KEYS)) < 0.7
_ALLOWED[0, 1, 4] = False
_SLOPES = oracles.alibi_slopes(HEADS).astype(np.float32)


def _normal(*shape):
    return _RNG.standard_normal(shape).astype(np.float32)


def _user_function(score, at, params):
    distance = jnp.abs(at.relative).astype(score.dtype)
    return score * params["gain"] - jnp.log1p(jnp.square(params["rate"]) * distance)


def _user_oracle(p):
    def modify(score, i, j, head):
        distance = np.abs(j - i).astype(np.float64)
        return score * p["gain"] - np.log1p(p["rate"][head] ** 2 * distance)

    return modify


CASES = [
    Case("plain", {}, lambda p: {}, lambda p: {}),
    Case(
        "causal with bias",
        {"bias": _normal(2, HEADS, QUERIES, KEYS)},
        lambda p: {"mask": masks.Causal(), "modifiers": scores.Bias(p["bias"])},
        lambda p: {"mask": oracles.causal(), "modifiers": [oracles.bias(p["bias"])]},
    ),
    Case(
        "bias shared by heads and queries",
        {"bias": _normal(1, 1, KEYS)},
        lambda p: {"modifiers": scores.Bias(p["bias"]), "mask": jnp.asarray(_ALLOWED)},
        lambda p: {"modifiers": [oracles.bias(p["bias"])], "mask": oracles.array(_ALLOWED)},
    ),
    Case(
        "slopes in a window",
        {"slopes": _SLOPES},
        lambda p: {"mask": masks.SlidingWindow(5, 2), "modifiers": scores.AlibiSlopes(p["slopes"])},
        lambda p: {"mask": oracles.window(5, 2), "modifiers": [oracles.alibi(p["slopes"])]},
    ),
    Case(
        "table with padding",
        {"table": _normal(HEADS, 8)},
        lambda p: {
            "mask": masks.KeyPadding(jnp.asarray(_LENGTHS)),
            "modifiers": scores.RelativeBias(p["table"], bidirectional=True, max_distance=12),
        },
        lambda p: {
            "mask": oracles.key_padding(_LENGTHS),
            "modifiers": [oracles.t5_bias(p["table"], bidirectional=True, max_distance=12)],
        },
    ),
    Case(
        "temperature then cap in segments",
        {"temperature": np.exp(0.3 * _normal(HEADS, 1, 1)), "cap": np.array(1.7, np.float32)},
        lambda p: {
            "mask": masks.Segments(jnp.asarray(_IDS), jnp.asarray(_KEY_IDS)) | masks.Prefix(2),
            "modifiers": (scores.Temperature(p["temperature"]), scores.SoftCap(p["cap"])),
        },
        lambda p: {
            "mask": oracles.either(oracles.segments(_IDS, _KEY_IDS), oracles.prefix(2)),
            "modifiers": [oracles.temperature(p["temperature"]), oracles.soft_cap(p["cap"])],
        },
    ),
    Case(
        "user function with a sink",
        {
            "gain": np.array(0.8, np.float32),
            "rate": np.abs(_normal(HEADS)),
            "sink": _normal(HEADS),
        },
        lambda p: {
            "mask": masks.Causal(),
            "modifiers": scores.ScoreFunction(
                _user_function, {"gain": p["gain"], "rate": p["rate"]}, ("", "N")
            ),
            "normalizer": normalizers.Softmax(p["sink"]),
        },
        lambda p: {
            "mask": oracles.causal(),
            "modifiers": [_user_oracle(p)],
            "normalizer": oracles.softmax(p["sink"]),
        },
    ),
    Case(
        "softmax plus one",
        {},
        lambda p: {"mask": masks.Causal(), "normalizer": normalizers.SoftmaxPlusOne()},
        lambda p: {"mask": oracles.causal(), "normalizer": oracles.softmax_plus_one()},
    ),
    Case(
        "sigmoid with slopes",
        {"slopes": _SLOPES},
        lambda p: {
            "mask": masks.Causal() & masks.KeyPadding(jnp.asarray(_LENGTHS)),
            "modifiers": scores.AlibiSlopes(p["slopes"]),
            "normalizer": normalizers.Sigmoid(),
        },
        lambda p: {
            "mask": oracles.both(oracles.causal(), oracles.key_padding(_LENGTHS)),
            "modifiers": [oracles.alibi(p["slopes"])],
            "normalizer": oracles.sigmoid(),
        },
        lse=False,
    ),
    Case(
        "softplus l1 strided",
        {},
        lambda p: {"mask": ~masks.Strided(3, 1), "normalizer": normalizers.SoftplusL1()},
        lambda p: {
            "mask": oracles.negation(oracles.strided(3, 1)),
            "normalizer": oracles.softplus_l1(),
        },
    ),
    Case(
        "relu squared",
        {"bias": _normal(HEADS, 1, 1)},
        lambda p: {
            "modifiers": scores.Bias(p["bias"]),
            "normalizer": normalizers.ReluSquared(),
        },
        lambda p: {
            "modifiers": [oracles.bias(p["bias"])],
            "normalizer": oracles.relu_squared(),
        },
        lse=False,
    ),
    Case(
        "sparsemax",
        {},
        lambda p: {"mask": masks.Causal(), "normalizer": normalizers.Sparsemax()},
        lambda p: {"mask": oracles.causal(), "normalizer": oracles.sparsemax()},
        lse=False,
        streams=False,
    ),
    Case(
        "entmax 1.5",
        {"slopes": _SLOPES},
        lambda p: {
            "modifiers": scores.AlibiSlopes(p["slopes"]),
            "normalizer": normalizers.Entmax15(),
        },
        lambda p: {
            "modifiers": [oracles.alibi(p["slopes"])],
            "normalizer": oracles.entmax15(),
        },
        lse=False,
        streams=False,
    ),
]


def flatten(query, key, value, params: dict[str, Any]) -> tuple:
    """Everything that is differentiated, in a fixed order."""
    return (query, key, value, *(params[name] for name in sorted(params)))


def unflatten(case: Case, flat: tuple):
    return *flat[:3], dict(zip(sorted(case.params), flat[3:], strict=True))
