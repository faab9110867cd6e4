"""Attention across devices: rings, exchanges of heads, and contexts cut over a mesh."""

from attnlab.distributed.across import Across, over
from attnlab.distributed.layouts import LAYOUTS, arrange, restore
from attnlab.distributed.linear import linear_recurrence
from attnlab.distributed.merge import merge_attention, merging
from attnlab.distributed.ring_attention import ring_attention, ulysses_attention
from attnlab.distributed.s2_attention import s2_attention
from attnlab.distributed.star_attention import star_attention, star_context

__all__ = [
    "LAYOUTS",
    "Across",
    "arrange",
    "linear_recurrence",
    "merge_attention",
    "merging",
    "over",
    "restore",
    "ring_attention",
    "s2_attention",
    "star_attention",
    "star_context",
    "ulysses_attention",
]
