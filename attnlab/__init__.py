"""attnlab: a laboratory of attention in JAX."""

from attnlab.core import masks, normalizers, partial, scores
from attnlab.core.attention import Choice, attention, dot_product_attention, explain
from attnlab.core.cache import KVCache
from attnlab.core.entry import Entry, Paper
from attnlab.core.masks import Mask
from attnlab.core.modules import Mechanism, MultiHeadAttention
from attnlab.core.normalizers import Normalizer
from attnlab.core.partial import Partial
from attnlab.core.scores import ScoreModifier

__version__ = "0.1.0"

__all__ = [
    "Choice",
    "Entry",
    "KVCache",
    "Mask",
    "Mechanism",
    "MultiHeadAttention",
    "Normalizer",
    "Paper",
    "Partial",
    "ScoreModifier",
    "attention",
    "dot_product_attention",
    "explain",
    "masks",
    "normalizers",
    "partial",
    "scores",
]
