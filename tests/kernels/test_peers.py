"""JAX's own attention kernels, interpreted beside ours on the same arrays: who else says so.

What their tests try: causal and full masks, segments, windows, soft caps, grouped heads, gradients.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu import splash_attention as splash

import attnlab
from attnlab import masks, scores
from attnlab.core.kernels import interpret
from tests.tolerances import assert_close

LENGTH, HEADS, WIDTH = 256, 2, 128
IDS = np.repeat(np.arange(3), [100, 90, 66]).astype(np.int32)[None]
MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(60, 0),
    "segments": masks.Causal() & masks.Segments(jnp.asarray(IDS)),
}


def arrays(kv_heads=HEADS):
    keys = jax.random.split(jax.random.key(0), 3)
    counts = (HEADS, kv_heads, kv_heads)
    return [
        jax.random.normal(key, (1, LENGTH, n, WIDTH)) for key, n in zip(keys, counts, strict=True)
    ]


def both_directions(function, inputs):
    """Output, and the gradients of a loss that reads all of it."""

    def loss(*inputs):
        out = function(*inputs)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs)
    return out, *gradients


def agree(ours, theirs, inputs):
    # A peer is called as its users call it: with the promotions that our tests forbid.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = both_directions(theirs, inputs)
    with interpret():
        found = both_directions(ours, inputs)
    names = ("out", "d query", "d key", "d value")
    for name, a, b in zip(names, found, expected, strict=True):
        assert_close(a, b, jnp.float32, kind="gradient", words=name)


def ours(implementation, **options):
    def attend(query, key, value):
        return attnlab.attention(query, key, value, implementation=implementation, **options)

    return attend


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_splash_attention_says_the_same(name, kv_heads):
    full = (LENGTH, LENGTH)
    mask = {
        "full": splash.FullMask(full),
        "window": splash.LocalMask(full, (60, 0), 0),
    }.get(name, splash.CausalMask(full))
    make = splash.make_splash_mha if kv_heads == HEADS else splash.make_splash_mqa
    # A soft cap beside each: both know it.
    kernel = make(
        mask=splash.MultiHeadMask([mask] * HEADS), head_shards=1, q_seq_shards=1,
        attn_logits_soft_cap=5.0, interpret=True,
        block_sizes=splash.BlockSizes(
            128, 128, 128, block_q_dkv=128, block_kv_dkv=128, block_kv_dkv_compute=128,
            block_q_dq=128, block_kv_dq=128,
        ),
    )  # fmt: skip
    segments = splash.SegmentIds(IDS[0], IDS[0]) if name == "segments" else None

    def theirs(query, key, value):
        query, key, value = (jnp.moveaxis(x[0], 1, 0) for x in (query, key, value))
        if kv_heads < HEADS:
            key, value = key[0], value[0]
        out = kernel(query * WIDTH**-0.5, key, value, segments)
        return jnp.moveaxis(out, 0, 1)[None]

    options = {"mask": MASKS[name], "modifiers": scores.SoftCap(jnp.float32(5.0))}
    agree(ours("tpu", **options), theirs, arrays(kv_heads))


@pytest.mark.parametrize("name", ["full", "causal", "segments"])
def test_jax_flash_attention_for_tpus_says_the_same(name, monkeypatch):
    call = jax_flash.pl.pallas_call

    def interpreted(*args, **options):  # it has no switch of its own
        return call(*args, **{**options, "interpret": True})

    monkeypatch.setattr(jax_flash.pl, "pallas_call", interpreted)
    ids = jax_flash.SegmentIds(jnp.asarray(IDS), jnp.asarray(IDS)) if name == "segments" else None
    bias = jax.random.normal(jax.random.key(7), (1, HEADS, LENGTH, LENGTH))

    def theirs(query, key, value):
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        # Its own scale would multiply the bias too.
        query = query * WIDTH**-0.5
        out = jax_flash.flash_attention(query, key, value, bias, ids, causal=name != "full")
        return jnp.swapaxes(out, 1, 2)

    agree(ours("tpu", mask=MASKS[name], modifiers=scores.Bias(bias)), theirs, arrays())


@pytest.mark.parametrize("name", ["full", "causal", "segments"])
def test_jax_flash_attention_for_gpus_says_the_same(name):
    with warnings.catch_warnings():  # JAX sends its users on to tokamax
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as gpu

    def theirs(query, key, value):
        ids = jnp.asarray(IDS) if name == "segments" else None
        return gpu.mha(
            query, key, value, ids, sm_scale=WIDTH**-0.5, causal=name != "full", interpret=True
        )

    agree(ours("triton", mask=MASKS[name]), theirs, arrays())
