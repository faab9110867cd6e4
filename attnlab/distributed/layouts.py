"""Which token lies on which device, and the moves from one layout to another.

With a causal mask early queries see few keys.  Dealt out in order, the last device does most of the
work, and all wait for it.  Two layouts share the work evenly:

    contiguous   device d holds tokens d L, ..., (d + 1) L - 1
    striped      device d holds tokens d, d + P, d + 2 P, ...
    zigzag       device d holds the d-th and the (2 P - 1 - d)-th of 2 P equal parts

for P devices with L tokens each.  In a zigzag every device has exactly the same number of causal
pairs; striped differs by less than one query's.  Striped: Brandon et al. 2023, arXiv:2311.09431.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

LAYOUTS = ("contiguous", "striped", "zigzag")


def unit(layout: str, devices: int) -> int:
    """Lengths that can be laid out without padding are multiples of this."""
    return {"contiguous": devices, "striped": devices**2, "zigzag": 2 * devices}[layout]


def places(layout: str, device: Any, devices: int, length: int) -> Int[Array | np.ndarray, " L"]:
    """The numbers of the `length` tokens that a device holds, in the order in which it does.

    `device` may be traced; NumPy goes in and out where it is not.
    """
    index = np.arange(length, dtype=np.int32)
    if layout == "contiguous":
        return device * length + index
    if layout == "striped":
        return index * devices + device
    half = length // 2
    second = index // max(half, 1)
    return index + half * (device * (1 - 2 * second) + second * (2 * devices - 2))


def order(layout: str, devices: int, length: int) -> Int[np.ndarray, " T"]:
    """The number of each token where the devices' parts stand one behind the other."""
    parts = [places(layout, d, devices, length // devices) for d in range(devices)]
    return np.concatenate(parts)


def check_layout(layout: Any) -> str:
    """Raise ValueError unless this names a layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}.")
    return str(layout)


def arrange(
    x: Shaped[Array, "..."], layout: str, devices: int, *, axis: int = 1
) -> Shaped[Array, "..."]:
    """A whole array in the order of a layout along `axis`: tokens, targets, positions, documents.

    Done once to a model's inputs, all of its layers can be told `arranged=True` and move nothing.

    Raises:
      ValueError: an unknown layout, or a length that is not a multiple of `unit(layout, devices)`.
    """
    return jnp.take(x, _whole_order(x, layout, devices, axis), axis)


def restore(
    x: Shaped[Array, "..."], layout: str, devices: int, *, axis: int = 1
) -> Shaped[Array, "..."]:
    """Undo `arrange`."""
    return jnp.take(x, np.argsort(_whole_order(x, layout, devices, axis)), axis)


def _whole_order(x: Any, layout: str, devices: int, axis: int) -> np.ndarray:
    check_layout(layout)
    length = x.shape[axis]
    if length % unit(layout, devices):
        raise ValueError(
            f"x: for {devices} devices a {layout} layout takes lengths that are multiples of "
            f"{unit(layout, devices)}, got {length}."
        )
    return order(layout, devices, length)


# -- within shard_map: each device has its part, and they change places ----------------------------


def arranged_part(x: Array, layout: str, name: str, devices: int, axis: int) -> Array:
    """From this device's tokens in natural order to those that a layout gives it."""
    if devices == 1 or layout == "contiguous":
        return x
    if layout == "striped":
        return _dealt(x, name, devices, axis, back=False)
    device = jax.lax.axis_index(name)
    first, second = jnp.split(x, 2, axis)
    even = jax.lax.ppermute(first, name, _halves(devices, 0))
    odd = jax.lax.ppermute(second, name, _halves(devices, 1))
    # Of the two parts that arrive, the even-numbered one comes first on even devices.
    is_even = device % 2 == 0
    return jnp.concatenate([jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)], axis)


def natural_part(x: Array, layout: str, name: str, devices: int, axis: int) -> Array:
    """Undo `arranged_part`."""
    if devices == 1 or layout == "contiguous":
        return x
    if layout == "striped":
        return _dealt(x, name, devices, axis, back=True)
    is_even = jax.lax.axis_index(name) % 2 == 0
    first, second = jnp.split(x, 2, axis)
    even, odd = jnp.where(is_even, first, second), jnp.where(is_even, second, first)
    back = [[(b, a) for a, b in _halves(devices, parity)] for parity in (0, 1)]
    return jnp.concatenate(
        [jax.lax.ppermute(even, name, back[0]), jax.lax.ppermute(odd, name, back[1])], axis
    )


def _halves(devices: int, parity: int) -> list[tuple[int, int]]:
    """Where the half-parts parity, parity + 2, ... of 2 P go, from the devices that hold them."""
    parts = [(d, 2 * d + parity) for d in range(devices)]
    return [(d, part if part < devices else 2 * devices - 1 - part) for d, part in parts]


def _dealt(x: Array, name: str, devices: int, axis: int, back: bool) -> Array:
    """Every device deals its tokens out to all in turn, or takes them back."""
    length = x.shape[axis]
    shape = (*x.shape[:axis], length // devices, devices, *x.shape[axis + 1 :])
    if not back:
        x = jax.lax.all_to_all(x.reshape(shape), name, axis + 1, axis, tiled=True)
        return x.reshape(*x.shape[:axis], length, *x.shape[axis + 2 :])
    x = x.reshape(*x.shape[:axis], length, 1, *x.shape[axis + 1 :])
    x = jax.lax.all_to_all(x, name, axis, axis + 1, tiled=True)
    return x.reshape(*x.shape[:axis], length, *x.shape[axis + 2 :])
