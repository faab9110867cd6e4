"""Who is measured by `attnlab bench flash`: attnlab's implementations, and everybody else's.

Each takes query, key, value "B T N H" and `extra`, the arrays that its way of saying the case
needs; these are made beforehand, and their making is not timed.  Peers are called as their users
call them: none is asked for zeros in empty rows, or for isolation of NaN.
"""

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import attnlab
from attnlab.bench.flash_cases import Case
from attnlab.bench.harness import available_memory
from attnlab.core.attention import IMPLEMENTATIONS, availability
from attnlab.core.masks import Full
from attnlab.core.normalizers import Softmax
from attnlab.core.scores import apply_modifiers
from attnlab.core.terms import Tile, axes_of, restrict

OURS = "attnlab "
KERNELS = ("triton", "mosaic_gpu", "tpu")


class Subject(NamedTuple):
    """An attention function of (query, key, value, extra), and its `extra`."""

    function: Callable[[Array, Array, Array, Any], Array]
    extra: Any = None


Maker = Callable[[Case, Any], Subject]


def platform() -> str:
    """The kind of device that JAX computes on: "cpu", "gpu" or "tpu"."""
    name = jax.devices()[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def memory() -> int | None:
    """Bytes that arrays may take on the device; None where that is unknown."""
    stats = jax.devices()[0].memory_stats()
    return available_memory() if stats is None else stats.get("bytes_limit")


def subjects() -> tuple[dict[str, Maker], list[str]]:
    """Everyone who can run on this machine, by name; a line on each who cannot."""
    makers: dict[str, Maker] = {}
    absent = []
    for name, reason in availability().items():
        if reason is None and name in IMPLEMENTATIONS:
            makers[OURS + name] = ours(name)
        elif reason is not None:
            absent.append(f"{OURS}{name}: {reason}")
    makers["jax.nn xla"] = jax_nn("xla")
    if importlib.util.find_spec("tokamax") is None:
        absent.append("tokamax: not installed (pip install attnlab[tokamax])")
    else:
        makers["tokamax"] = _tokamax
    on_device: dict[str, dict[str, Maker]] = {
        "gpu": {
            "jax.nn cudnn": jax_nn("cudnn"),
            "pallas mha": pallas_mha,
            "pallas hopper": pallas_hopper,
        },
        "tpu": {"splash": splash, "pallas flash": pallas_flash},
    }
    for where, peers in on_device.items():
        if where == platform():
            makers |= peers
        else:
            absent.append(f"{', '.join(peers)}: for a {where.upper()}")
    return makers, absent


def ours(implementation: str) -> Maker:
    """attnlab, by the implementation of that name; the arrays of the mask are arguments."""

    def make(case: Case, dtype: Any) -> Subject:
        def attend(query: Array, key: Array, value: Array, extra: Any) -> Array:
            return attnlab.attention(
                query,
                key,
                value,
                mask=extra,
                modifiers=case.modifiers,
                normalizer=case.normalizer,
                implementation=implementation,
            )

        return Subject(attend, case.mask)

    return make


# -- how libraries are told a case -----------------------------------------------------------------


def written_mask(case: Case) -> Array | None:
    """The mask as a boolean array "#B #N T S", unless it is causal, a window, or none."""
    simple = case.segments is None and (case.causal or case.window)
    if simple or isinstance(case.mask, Full):
        return None
    length = case.shape.length
    _fits("mask", length**2)
    dense = case.mask.dense(length, length)
    return dense.reshape((1,) * (4 - dense.ndim) + dense.shape)


def written_bias(case: Case, dtype: Any) -> Array | None:
    """What the modifiers add, as an array "1 N T S"; a cap apart.

    Raises:
      NotImplementedError: the case is not softmax of scores to which something is added.
      MemoryError: making it would take more than a quarter of the memory.
    """
    if not isinstance(case.normalizer, Softmax):
        raise NotImplementedError("softmax only")
    if not case.modifiers or case.cap is not None:
        return None
    shape = (1, case.shape.heads, case.shape.length, case.shape.length)
    _fits("bias", 8 * math.prod(shape))
    tile = Tile(0, 0, shape[2], shape[3], shape[1], 4)
    modifiers = restrict(case.modifiers, axes_of(case.modifiers), tile)
    return apply_modifiers(modifiers, jnp.zeros(shape, jnp.float32), tile.at()).astype(dtype)


def _fits(what: str, size: int) -> None:
    if (limit := memory()) is not None and size > limit / 4:
        raise MemoryError(f"its {what} alone would take {size / 1e9:.0f} GB to make")


def _needs(condition: bool, words: str) -> None:
    if not condition:
        raise NotImplementedError(words)


def jax_nn(implementation: Any) -> Maker:
    """`jax.nn.dot_product_attention`, "xla" or "cudnn"; masks and biases are written out."""

    def make(case: Case, dtype: Any) -> Subject:
        _needs(case.cap is None, "has no soft cap")
        extra = {"mask": written_mask(case), "bias": written_bias(case, dtype)}

        def attend(query: Array, key: Array, value: Array, extra: Any) -> Array:
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                **extra,
                is_causal=case.causal and case.segments is None,
                local_window_size=case.window,
                implementation=implementation,
            )

        return Subject(attend, extra)

    return make


def _tokamax(case: Case, dtype: Any) -> Subject:
    from tokamax import dot_product_attention

    extra = {"mask": written_mask(case), "bias": written_bias(case, dtype)}

    def attend(query: Array, key: Array, value: Array, extra: Any) -> Array:
        return dot_product_attention(
            query,
            key,
            value,
            **extra,
            is_causal=case.causal and case.segments is None,
            local_window_size=case.window,
            logits_soft_cap=case.cap,
        )

    return Subject(attend, extra)


def _plain(case: Case, *, segments: bool = False) -> None:
    dense = isinstance(case.mask, Full) or case.causal
    allowed = "causal masks and segments" if segments else "no mask or a causal one"
    _needs(dense and (segments or case.segments is None), f"{allowed} only")
    _needs(not case.modifiers and isinstance(case.normalizer, Softmax), "plain softmax only")


def pallas_mha(case: Case, dtype: Any) -> Subject:
    """JAX's Triton kernel (deprecated there in favour of tokamax)."""
    with warnings.catch_warnings():  # JAX sends its users on to tokamax, which is here too
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha

    _plain(case, segments=True)
    scale = case.shape.width**-0.5

    def attend(query: Array, key: Array, value: Array, extra: Any) -> Array:
        return mha(query, key, value, segment_ids=extra, sm_scale=scale, causal=case.causal)

    return Subject(attend, None if case.segments is None else jnp.asarray(case.segments))


def pallas_hopper(case: Case, dtype: Any) -> Subject:
    """JAX's Hopper kernel: warp-specialised, half precision; causal forward only."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    _plain(case)
    wide = case.shape.width > 128  # where blocks of 128 keys do not fit in shared memory
    config = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=64 if wide else 128,
        max_concurrent_steps=2,
        causal=case.causal,
        block_q_dkv=64,
        block_kv_dkv=64,
        block_q_dq=64,
        block_kv_dq=64,
    )
    scale = case.shape.width**-0.5  # which this kernel leaves to its caller

    def attend(query: Array, key: Array, value: Array, extra: Any) -> Array:
        return attention_mgpu.attention(query * scale, key, value, config)

    return Subject(attend)


def splash(case: Case, dtype: Any) -> Subject:
    """JAX's splash attention for TPUs: masks known beforehand, tiles skipped."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    shape, full = case.shape, (case.shape.length,) * 2
    _needs(isinstance(case.normalizer, Softmax), "softmax only")
    _needs(not case.modifiers or case.cap is not None, "adds nothing to scores")
    if case.window is not None:
        mask: Any = library.LocalMask(full, case.window, 0)
    elif case.causal:
        mask = library.CausalMask(full)
    elif isinstance(case.mask, Full):
        mask = library.FullMask(full)
    else:
        mask = library.NumpyMask(np.asarray(case.mask.dense(*full))[0])
    block = min(512, shape.length)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    blocks = library.BlockSizes(**sizes, use_fused_bwd_kernel=True)
    attend_one = library.make_splash_mha_single_device(
        mask=library.MultiHeadMask([mask] * shape.heads),
        block_sizes=blocks,
        attn_logits_soft_cap=case.cap,
    )
    scale = shape.width**-0.5

    def attend(query: Array, key: Array, value: Array, extra: Any) -> Array:
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * scale, key, value))
        if extra is None:
            out = jax.vmap(attend_one)(query, key, value)
        else:
            out = jax.vmap(attend_one)(query, key, value, library.SegmentIds(extra, extra))
        return jnp.swapaxes(out, 1, 2)

    return Subject(attend, None if case.segments is None else jnp.asarray(case.segments))


def pallas_flash(case: Case, dtype: Any) -> Subject:
    """JAX's flash attention for TPUs: causal masks, segments, a bias written out."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    _needs(isinstance(case.mask, Full) or case.causal, "causal masks and segments only")
    _needs(case.cap is None, "has no soft cap")
    scale = case.shape.width**-0.5
    ids = None if case.segments is None else jnp.asarray(case.segments)

    def attend(query: Array, key: Array, value: Array, extra: Any) -> Array:
        bias, ids = extra
        # Its own scale would multiply the bias too.
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * scale, key, value))
        if bias is not None:
            bias = jnp.broadcast_to(bias, (query.shape[0], *bias.shape[1:]))
        segments = None if ids is None else flash.SegmentIds(ids, ids)
        out = flash.flash_attention(query, key, value, bias, segments, causal=case.causal)
        return jnp.swapaxes(out, 1, 2)

    return Subject(attend, (written_bias(case, dtype), ids))
