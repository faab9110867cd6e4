"""attnlab: a laboratory of attention in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from attnlab.core import masks, normalizers, partial, scores
from attnlab.core.attention import Choice, attention, block_sparse_attention, explain
from attnlab.core.drop_in import dot_product_attention
from attnlab.core.entry import Entry, Paper
from attnlab.core.linear_attention import linear_attention
from attnlab.core.masks import Mask
from attnlab.core.normalizers import Normalizer
from attnlab.core.partial import Partial
from attnlab.core.recurrence import linear_recurrence, resets
from attnlab.core.scores import ScoreModifier

if TYPE_CHECKING:
    from attnlab import atlas, distributed, testing
    from attnlab.core.cache import KVCache, PagedKVCache, StateCache
    from attnlab.core.decode import decode_attention
    from attnlab.core.modules import Mechanism, MultiHeadAttention
    from attnlab.core.quantize import Quantized, quantization_error_bound, quantize

__version__ = "0.1.0"

__all__ = [
    "Choice",
    "Entry",
    "KVCache",
    "Mask",
    "Mechanism",
    "MultiHeadAttention",
    "Normalizer",
    "PagedKVCache",
    "Paper",
    "Partial",
    "Quantized",
    "ScoreModifier",
    "StateCache",
    "atlas",
    "attention",
    "block_sparse_attention",
    "decode_attention",
    "distributed",
    "dot_product_attention",
    "explain",
    "linear_attention",
    "linear_recurrence",
    "masks",
    "normalizers",
    "partial",
    "quantization_error_bound",
    "quantize",
    "resets",
    "scores",
    "testing",
]

# flax.nnx takes longer to import than the rest together; functions alone do not need it.
_LATER = {
    "KVCache": "attnlab.core.cache",
    "Mechanism": "attnlab.core.modules",
    "MultiHeadAttention": "attnlab.core.modules",
    "PagedKVCache": "attnlab.core.cache",
    "Quantized": "attnlab.core.quantize",
    "StateCache": "attnlab.core.cache",
    "decode_attention": "attnlab.core.decode",
    "quantization_error_bound": "attnlab.core.quantize",
    "quantize": "attnlab.core.quantize",
}


def __getattr__(name: str) -> Any:
    if name in ("atlas", "distributed", "testing"):
        return importlib.import_module(f"attnlab.{name}")
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'attnlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
