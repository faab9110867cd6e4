"""Attention across devices: rings, exchanges of heads, and contexts cut over a mesh."""

from attnlab.distributed.across import Across, over
from attnlab.distributed.layouts import LAYOUTS, arrange, restore

__all__ = ["LAYOUTS", "Across", "arrange", "over", "restore"]
