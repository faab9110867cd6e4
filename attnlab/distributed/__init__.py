"""Attention across devices: rings, exchanges of heads, and contexts cut over a mesh."""

from attnlab.distributed.across import Across, over
from attnlab.distributed.layouts import LAYOUTS, arrange, restore
from attnlab.distributed.linear import linear_recurrence
from attnlab.distributed.ring_attention import ring_attention, ulysses_attention

__all__ = [
    "LAYOUTS",
    "Across",
    "arrange",
    "linear_recurrence",
    "over",
    "restore",
    "ring_attention",
    "ulysses_attention",
]
