"""Checking a call of attention: every argument, before anything is computed."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab.core.dropout import key_words
from attnlab.core.masks import Full, Mask, as_mask, check_mask
from attnlab.core.normalizers import Normalizer, Softmax
from attnlab.core.reference import Call, default_scale, heads_first
from attnlab.core.scores import Temperature, as_modifiers
from attnlab.core.terms import axes_of, check_leaves

IMPLEMENTATIONS = (
    "reference", "blockwise", "xla", "cudnn", "tokamax", "triton", "mosaic_gpu", "tpu",
)  # fmt: skip

DEFAULTS = (
    ("mask", None), ("modifiers", ()), ("normalizer", None), ("scale", None), ("query_offset", 0),
    ("key_offset", 0), ("dropout_rate", 0.0), ("dropout_key", None), ("return_lse", False),
    ("implementation", "auto"), ("block_sizes", None),
)  # fmt: skip


def prepare(
    query: Any, key: Any, value: Any, mask: Any, modifiers: Any, normalizer: Any, scale: Any,
    query_offset: Any, key_offset: Any, dropout_rate: Any, dropout_key: Any, return_lse: bool,
    implementation: str, block_sizes: Any,
) -> tuple[Call, str]:  # fmt: skip
    """Check every argument, and put heads before positions."""
    query, key, value = check_inputs(query, key, value)
    batch = query.shape[:-3]
    sizes = {"N": query.shape[-2], "T": query.shape[-3], "S": key.shape[-3]}
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f'implementation: expected "auto" or one of {", ".join(IMPLEMENTATIONS)}, '
            f"got {implementation!r}."
        )
    mask, modifiers, normalizer = check_terms(mask, modifiers, normalizer, batch, sizes, return_lse)
    if block_sizes is not None:
        good = isinstance(block_sizes, tuple) and len(block_sizes) == 2
        if not good or any(not isinstance(b, int) or b < 1 for b in block_sizes):
            raise ValueError(f"block_sizes: expected two positive ints, got {block_sizes!r}.")
    if not isinstance(dropout_rate, float | int) or not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate: expected a number in [0, 1), got {dropout_rate!r}.")
    if dropout_rate and dropout_key is None:
        raise ValueError(f"dropout_key: {dropout_rate=} needs a JAX random key, got None.")
    words = key_words(dropout_key) if dropout_rate else None
    scale, modifiers = check_scale(scale, query.shape[-1], modifiers)
    call = Call(
        heads_first(query), heads_first(key), heads_first(value), modifiers, normalizer, mask,
        _check_offset("query_offset", query_offset), _check_offset("key_offset", key_offset),
        words, scale, float(dropout_rate),
    )  # fmt: skip
    return call, implementation


def check_inputs(*inputs: Any, empty: bool = False, grouped: bool = True) -> list[Array]:
    """Query, key and value as arrays, or the error that `attention` documents.

    With `empty`, sequences may be: lengths of 0 are taken.  Without `grouped` any number of query
    heads is, whatever the number of key heads.
    """
    arrays = []
    for name, x, axes in zip(("query", "key", "value"), inputs, _AXES, strict=True):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name}: expected an array {axes}, got {type(x).__name__}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating-point array, got dtype {x.dtype}.")
        if len(x.shape) < 3:
            raise ValueError(f"{name}: expected an array {axes}, got shape {x.shape}.")
        if 0 in x.shape[-3:][empty:]:
            raise ValueError(f"{name}: no axis of {axes} may be empty, got shape {x.shape}.")
        arrays.append(jnp.asarray(x))
    query, key, value = arrays
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(
                f"{name}: expected the dtype of query, {query.dtype}, got {x.dtype}; cast one."
            )
        if x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name}: batch axes {x.shape[:-3]} differ from those of query, "
                f"{query.shape[:-3]}, in shapes {x.shape} and {query.shape}."
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key: head width {key.shape[-1]} differs from that of query, {query.shape[-1]}."
        )
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise ValueError(
            f"value: length and heads {value.shape[-3:-1]} differ from those of key, "
            f"{key.shape[-3:-1]}."
        )
    if grouped and query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"query: the number of heads, {query.shape[-2]}, should be a multiple of the number of "
            f"key heads, {key.shape[-2]}."
        )
    return arrays


_AXES = ("(*B, T, N, H)", "(*B, S, K, H)", "(*B, S, K, D)")


def _check_offset(name: str, offset: Any) -> Any:
    if isinstance(offset, bool) or not (
        isinstance(offset, int | np.integer)
        or (hasattr(offset, "dtype") and jnp.issubdtype(offset.dtype, jnp.integer))
    ):
        raise TypeError(f"{name}: expected an integer, got {offset!r}.")
    if jnp.ndim(offset):
        raise ValueError(f"{name}: expected a scalar, got shape {jnp.shape(offset)}.")
    return int(offset) if isinstance(offset, int | np.integer) else offset


def check_terms(
    mask: Any, modifiers: Any, normalizer: Any, batch: tuple[int, ...], sizes: dict[str, int],
    return_lse: bool,
) -> tuple[Mask, tuple[Any, ...], Normalizer]:  # fmt: skip
    """Mask, modifiers and normalizer, defaults filled in, checked against the sizes of a call."""
    mask = Full() if mask is None else as_mask(mask)
    check_mask(mask, batch, sizes)
    modifiers = as_modifiers(modifiers)
    check_leaves("modifiers", modifiers, axes_of(modifiers), batch, sizes)
    normalizer = Softmax() if normalizer is None else normalizer
    if not isinstance(normalizer, Normalizer):
        raise TypeError(f"normalizer: expected a Normalizer, got {type(normalizer).__name__}.")
    check_leaves("normalizer", normalizer, normalizer.axes(), batch, sizes)
    if return_lse and normalizer.kind != "shared":
        raise ValueError(
            f"return_lse: {type(normalizer).__name__} has no normalizing sum; "
            "use a softmax-like normalizer."
        )
    return mask, modifiers, normalizer


def check_scale(scale: Any, width: int, modifiers: Any) -> tuple[float, Any]:
    """A scale as a number; one that is an array becomes the first modifier."""
    if scale is None:
        return default_scale(width), modifiers
    if isinstance(scale, int | float | np.floating):
        return float(scale), modifiers
    if not hasattr(scale, "dtype") or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"scale: expected a number or a floating-point array, got {scale!r}.")
    if jnp.ndim(scale):
        raise ValueError(
            f"scale: expected a scalar, got shape {jnp.shape(scale)}; "
            "scale per head or query by attnlab.scores.Temperature."
        )
    # A traced scale may be trainable, so it goes where gradients are taken.
    return 1.0, (Temperature(1 / scale), *modifiers)
