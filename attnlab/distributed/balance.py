"""How evenly a layout shares the work of a ring: pairs that a mask lets meet, counted."""

import numpy as np
from jaxtyping import Int

from attnlab.core.masks import Mask
from attnlab.distributed import layouts


def work(mask: Mask, layout: str, devices: int, length: int) -> Int[np.ndarray, "hops devices"]:
    """The pairs that each device of a ring computes in each hop; self-attention, one head.

    The mask's array is written out whole: for lengths of some thousands.

    Raises:
      ValueError: an unknown layout, or a length that is not a multiple of its unit.
    """
    layouts.check_layout(layout)
    if length % layouts.unit(layout, devices):
        raise ValueError(
            f"length: expected a multiple of {layouts.unit(layout, devices)}, got {length}."
        )
    live = np.asarray(mask.dense(length, length))
    live = live.reshape(-1, length, length)[0]
    placed = layouts.order(layout, devices, length)
    part = length // devices
    live = live[np.ix_(placed, placed)].reshape(devices, part, devices, part).sum((1, 3))
    hop = (np.arange(devices)[None, :] - np.arange(devices)[:, None]) % devices
    return live[np.arange(devices)[None, :], hop]


def imbalance(pairs: Int[np.ndarray, "hops devices"]) -> float:
    """Time over the least possible: in each hop all devices wait for the one with most pairs."""
    least = pairs.sum() / pairs.shape[1]
    return float(pairs.max(axis=1).sum() / least)
