"""Masks to try with tokamax, and a stand-in for it, for machines where it is not installed."""

import importlib.machinery
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import masks
from tests import oracles
from tests.core import cases, draw

SIZE = draw.Sizes((2,), 13, 19, 4, 2, 4, 3)
ALLOWED = np.random.default_rng(7).random((2, 4, 13, 19)) < 0.2  # with empty rows
MASKS = {
    "none": (None, oracles.full()),
    "causal": (masks.Causal(), oracles.causal()),
    "window": (masks.SlidingWindow(5, 2), oracles.window(5, 2)),
    "past": (masks.SlidingWindow(None, 3), oracles.window(None, 3)),
    "future": (masks.SlidingWindow(2, None), oracles.window(2, None)),
    "padding": (masks.KeyPadding(jnp.asarray([0, 7])), oracles.key_padding([0, 7])),
    "prefix": (masks.Prefix(4), oracles.prefix(4)),
    "padded causal": (
        masks.KeyPadding(jnp.asarray([0, 7])) & masks.Causal(),
        oracles.both(oracles.key_padding([0, 7]), oracles.causal()),
    ),
    "padded window": (
        masks.KeyPadding(jnp.asarray([3, 7])) & masks.SlidingWindow(2, 1),
        oracles.both(oracles.key_padding([3, 7]), oracles.window(2, 1)),
    ),
    "causal or prefix": (
        masks.Causal() | masks.Prefix(3),
        oracles.either(oracles.causal(), oracles.prefix(3)),
    ),
    "segments": (
        masks.Segments(jnp.asarray(cases._IDS), jnp.asarray(cases._KEY_IDS)),
        oracles.segments(cases._IDS, cases._KEY_IDS),
    ),
    "array": (jnp.asarray(ALLOWED), oracles.array(ALLOWED)),
}
BANDS = ("none", "causal", "window", "past", "future", "padding", "prefix", "padded causal")


class StandIn:
    """What `tokamax.dot_product_attention` does, in the plainest way, and what it was handed."""

    def __init__(self):
        self.asked = []

    @classmethod
    def put_in_place(cls, monkeypatch):
        """One that is found where Python looks for tokamax, for the time of a test."""
        made, module = cls(), types.ModuleType("tokamax")
        module.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
        module.dot_product_attention = made.dot_product_attention
        monkeypatch.setitem(sys.modules, "tokamax", module)
        return made

    def dot_product_attention(self, query, key, value, bias, mask, **options):
        self.asked.append({"bias": bias, "mask": mask, **options})
        assert options["implementation"]
        repeats = query.shape[-2] // key.shape[-2]
        key, value = (jnp.repeat(x, repeats, axis=-2) for x in (key, value))
        scores = options["scale"] * jnp.einsum("btnh,bsnh->bnts", query, key)
        if bias is not None:
            scores = scores + bias
        if (cap := options.get("logits_soft_cap")) is not None:
            scores = cap * jnp.tanh(scores / cap)
        row, col = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])[None]
        seen = jnp.ones((1, 1, query.shape[1], key.shape[1]), bool)
        if options.get("is_causal"):
            seen = seen & (col <= row)
        if (window := options.get("local_window_size")) is not None:
            seen = seen & (col >= row - window[0]) & (col <= row + window[1])
        if (lengths := options["key_value_seq_lengths"]) is not None:
            seen = seen & (col < lengths[:, None, None, None])
        if mask is not None:
            seen = seen & mask
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", weights, value).astype(query.dtype)
