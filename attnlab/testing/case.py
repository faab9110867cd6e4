"""What is checked and on which numbers: sizes read off the arrays a term holds, inputs drawn."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core.masks import Full, Mask, as_mask
from attnlab.core.normalizers import Normalizer, Softmax
from attnlab.core.scores import ScoreModifier, as_modifiers
from attnlab.core.terms import LETTERS, Tile, axes_of, sized_axes


def precision(dtype: Any) -> Any:
    """The context in which arrays of `dtype` exist: 64 bits for float64 and for nothing else."""
    return jax.enable_x64(np.dtype(dtype) == np.float64)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """64 bits, on the CPU where there is one: accelerators compute less exactly, if at all.

    Constants of the user's code may be narrower than the scores they meet.
    """
    try:
        device: Any = jax.default_device(jax.devices("cpu")[0])
    except RuntimeError:
        device = contextlib.nullcontext()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), device:
        yield


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """One array of a term: its name in the user's words, its axes, its values in NumPy."""

    name: str
    tag: str
    value: np.ndarray

    @property
    def trainable(self) -> bool:
        return bool(jnp.issubdtype(self.value.dtype, jnp.floating))

    def __str__(self) -> str:
        axes = f'"{self.tag}"' if self.tag else "no axes"
        shape = "x".join(map(str, self.value.shape)) or "a number"
        return f"{self.name} ({axes}: {shape}, {self.value.dtype})"


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Terms, sizes and inputs.  Inputs are float64 NumPy holding numbers of `dtype`.

    query "*B T N H", key "*B S K H", value "*B S K D".
    """

    modifiers: tuple[ScoreModifier, ...]
    normalizer: Normalizer
    mask: Mask
    batch: tuple[int, ...]
    heads: int
    key_heads: int
    lengths: tuple[int, int]
    dtype: np.dtype
    seed: int
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray

    @property
    def rank(self) -> int:
        return 3 + len(self.batch)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the scores, "*B N T S"."""
        return (*self.batch, self.heads, *self.lengths)

    @property
    def accumulator(self) -> np.dtype:
        return np.dtype(np.float64 if self.dtype == np.float64 else np.float32)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.query.shape[-1])

    @property
    def trained(self) -> Any:
        """The terms that hold what is trained."""
        return (self.modifiers, self.normalizer)

    @functools.cached_property
    def leaves(self) -> list[Leaf]:
        """The arrays of modifiers and normalizer, in the order of `jax.tree.leaves`."""
        return leaves_of(self.trained if len(self.modifiers) != 1 else self._single())

    def _single(self) -> Any:
        # One modifier alone is called what its user calls it: ".slopes", not "[0][0].slopes".
        return (self.modifiers[0], self.normalizer)

    def rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *purpose))

    def tile(self, row: Any, col: Any, rows: int, cols: int) -> Tile:
        return Tile(row, col, rows, cols, self.heads, self.rank)

    def with_leaves(self, values: list[Any]) -> tuple[tuple[ScoreModifier, ...], Normalizer]:
        """Modifiers and normalizer holding other arrays."""
        return jax.tree.unflatten(jax.tree.structure(self.trained), values)

    def sizes(self) -> str:
        batch, (queries, keys) = " x ".join(map(str, self.batch)) or "none", self.lengths
        return (
            f"batch {batch}, {self.heads} heads sharing {self.key_heads}, {queries} queries, "
            f"{keys} keys, width {self.query.shape[-1]}, {self.dtype.name}"
        )


def leaves_of(terms: Any) -> list[Leaf]:
    """The arrays of a term or of a tuple of terms, named.

    Raises:
      ValueError: a term's `axes()` gives more or fewer tags than it has arrays.
    """
    found = jax.tree_util.tree_flatten_with_path(terms)[0]
    flat = terms if isinstance(terms, tuple) else (terms,)
    tags = axes_of([t for part in flat for t in (part if isinstance(part, tuple) else (part,))])
    if len(tags) != len(found):
        listed = ", ".join(jax.tree_util.keystr(path) for path, _ in found)
        raise ValueError(
            f"axes: {len(tags)} tags {tags} for {len(found)} arrays ({listed}); give one tag to "
            "each array, in the order of jax.tree.leaves."
        )
    # A Python number is what attention makes of it: an array of 32 bits.
    values = [_as_numpy(x) for _, x in found]
    names = [_name(path, isinstance(terms, tuple)) for path, _ in found]
    return [Leaf(n, t, v) for n, t, v in zip(names, tags, values, strict=True)]


def _as_numpy(x: Any) -> np.ndarray:
    if hasattr(x, "dtype"):
        return np.asarray(x)
    array = np.asarray(x)
    narrow = {"f": np.float32, "i": np.int32}.get(array.dtype.kind, array.dtype)
    return array.astype(narrow)


def _name(path: Any, of_many: bool) -> str:
    name = jax.tree_util.keystr(path[1:] if of_many else path)
    return name or "array"


def spread(x: Any, tag: str, shape: tuple[int, ...]) -> Any:
    """`x` with an axis for each of "*B N T S", the `shape` of the scores, by NumPy's rules.

    Untagged arrays and tables stay whole; entries that hold for a block are repeated.  Written
    apart from `attnlab.core.terms`, which it checks.
    """
    if not tag or "*" in tag:
        return x
    sized = [a.split("/") for a in tag.split() if a != "B"]
    letters = [a[0] for a in sized]
    lead = x.ndim - len(letters)
    for axis, parts in enumerate(sized, lead):
        if len(parts) > 1:
            letter, block = parts
            x = jnp.repeat(x, int(block), axis)
            x = jax.lax.slice_in_dim(x, 0, shape[LETTERS.index(letter) - 3], axis=axis)
    places: list[Any] = [slice(None)] * lead
    places += [slice(None) if letter in letters else None for letter in LETTERS]
    # Axes in the order of N T S, whatever the order of the tag.
    order = [lead + letters.index(a) for a in LETTERS if a in letters]
    x = x.transpose((*range(lead), *order))[tuple(places)]
    return x.reshape((1,) * (len(shape) - x.ndim) + x.shape)


def sizes_of(leaves: list[Leaf]) -> tuple[dict[str, int], tuple[int, ...]]:
    """The lengths of N, T and S, and the batch axes, that the arrays call for."""
    sizes: dict[str, int] = {}
    batch: tuple[int, ...] = ()
    for leaf in leaves:
        named = sized_axes(leaf.tag, leaf.value.ndim) if leaf.tag else []
        for letter, axis, block in named:
            if axis >= 0 and leaf.value.shape[axis] > 1:
                sizes.setdefault(letter, leaf.value.shape[axis] * block)
        if "B" in leaf.tag.split() and "*" not in leaf.tag:
            lead = leaf.value.shape[: named[0][1]] if named else leaf.value.shape
            batch = lead if len(lead) > len(batch) or not math.prod(batch) > 1 else batch
    return sizes, batch


def make_case(
    *,
    modifiers: Any = (),
    normalizer: Any = None,
    mask: Any = None,
    batch: int | tuple[int, ...] | None = None,
    heads: int | None = None,
    key_heads: int | None = None,
    lengths: tuple[int, int] | None = None,
    width: int = 16,
    dtype: Any = np.float32,
    key: int = 0,
    default_lengths: tuple[int, int] = (21, 37),
) -> Case:
    """Fill in what was left out from the arrays that the terms hold, and draw inputs.

    Raises:
      TypeError: a modifier, mask or normalizer is none.
      ValueError: sizes that do not fit, or a term with more or fewer tags than arrays.
    """
    modifiers = as_modifiers(modifiers)
    normalizer = Softmax() if normalizer is None else normalizer
    if not isinstance(normalizer, Normalizer):
        raise TypeError(f"normalizer: expected a Normalizer, got {type(normalizer).__name__}.")
    mask = Full() if mask is None else as_mask(mask)
    known, known_batch = sizes_of([*leaves_of((modifiers, normalizer)), *leaves_of(mask)])
    if batch is None:
        batch = known_batch or (1,)
    shape = (batch,) if isinstance(batch, int) else tuple(batch)
    heads = heads or known.get("N") or (key_heads or 1) * 2
    if key_heads is None:
        key_heads = heads // 2 if heads % 2 == 0 else heads
    lengths = lengths or (known.get("T", default_lengths[0]), known.get("S", default_lengths[1]))
    if min(*shape, heads, key_heads, *lengths, width) < 1 or heads % key_heads:
        raise ValueError(
            "expected positive sizes and heads a multiple of key_heads, got "
            f"batch={shape}, {heads=}, {key_heads=}, {lengths=}, {width=}."
        )
    dtype = np.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}.")
    rng = np.random.default_rng((key, 0))

    def draw(length: int, count: int, wide: int) -> np.ndarray:
        x = rng.standard_normal((*shape, length, count, wide)).astype(np.float32)
        return x.astype(dtype).astype(np.float64)

    return Case(
        modifiers, normalizer, mask, shape, heads, key_heads, lengths, dtype, key,
        draw(lengths[0], heads, width), draw(lengths[1], key_heads, width),
        draw(lengths[1], key_heads, width),
    )  # fmt: skip
