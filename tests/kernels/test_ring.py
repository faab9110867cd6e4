"""Kernels round a ring: the numbers of the reference, forward and backward, on 2 and 4 devices."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest

from attnlab import attention, masks, normalizers, scores
from attnlab.core import kernels
from attnlab.distributed import over
from tests.core import draw
from tests.kernels import cases

EXACT = 1e-5


@functools.cache
def ring_of(devices):
    return jax.make_mesh((devices,), ("ring",), axis_types=(jax.sharding.AxisType.Auto,))


def results(arrays, mask, modifiers, normalizer, compiler_options=None, **options):
    """Output, log-sum-exp, and the gradients of a loss in every array that has one."""

    shared = normalizer.kind == "shared"

    def loss(arrays, modifiers):
        found = attention(
            *arrays, mask=mask, modifiers=modifiers, normalizer=normalizer, return_lse=shared,
            **options,
        )  # fmt: skip
        out, lse = found if shared else (found, jnp.zeros(()))
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        seen = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(out.astype(jnp.float32) * weights) + jnp.sum(jnp.sin(seen)), (out, lse)

    slope = jax.grad(loss, (0, 1), has_aux=True)
    return jax.jit(slope, compiler_options=compiler_options)(arrays, modifiers)


def assert_equal(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        scale = max(1.0, float(jnp.abs(jnp.where(jnp.isfinite(b), b, 0)).max()))
        assert bool(jnp.all((a == b) | (jnp.abs(a - b) <= EXACT * scale)))


CASES = {
    "a bias of columns, documents": (2, "triton", "contiguous", normalizers.Softmax()),
    "zigzag": (4, "tpu", "zigzag", normalizers.Softmax()),
    "striped": (2, "tpu", "striped", normalizers.Sigmoid()),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_go_round_a_ring(name):
    devices, implementation, layout, normalizer = CASES[name]
    size = draw.Sizes((2,), 40, 40, 4, 2, 8, 3)
    arrays = [jnp.asarray(x) for x in draw.inputs(size, 3)]
    mask = masks.Causal() & masks.Segments(jnp.arange(40, dtype=jnp.int32)[None] // 25)
    slopes = scores.AlibiSlopes(jnp.linspace(0.1, 0.5, size.heads))
    modifiers = (draw.modifier("bias", size, 5).term, slopes)
    call = (arrays, mask, modifiers, normalizer)
    wanted = results(*call, implementation="reference")
    with over(ring_of(devices), ring="ring", layout=layout), kernels.interpret():
        found = results(*call, cases._CHEAP, implementation=implementation)
    assert_equal(found, wanted)


def test_half_precision_is_merged_in_full():
    """Several hops round no more often than one call: sums of parts stay in float32."""
    size = draw.Sizes((1,), 64, 64, 2, 1, 16, 16)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in draw.inputs(size, 1)]
    exact = [x.astype(jnp.float32) for x in arrays]
    call = (masks.Causal(), (), normalizers.Softmax())
    wanted = results(exact, *call, implementation="reference")
    with kernels.interpret():
        alone = results(arrays, *call, cases._CHEAP, implementation="tpu")
        with over(ring_of(2), ring="ring", layout="zigzag"):
            spread = results(arrays, *call, cases._CHEAP, implementation="tpu")

    def errors(found):
        return [
            float(jnp.abs(a.astype(jnp.float32) - b).max())
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        ]

    for one, many in zip(errors(alone), errors(spread), strict=True):
        assert many <= 1.5 * one + 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"implementation": "triton"}, 'triton" needs an NVIDIA GPU.*"blockwise" can'),
        ({"implementation": "tpu", "mask": masks.Blocks(jnp.ones((1, 1), bool), (32, 32))},
         'tpu" has no arrays with one entry for a block of positions.*"blockwise" can'),
    ],
)  # fmt: skip
def test_what_a_kernel_cannot_is_refused(options, words):
    three = [jnp.zeros((1, 32, 2, 8))] * 3
    inside = kernels.interpret() if "mask" in options else contextlib.nullcontext()
    with over(ring_of(2), ring="ring"), inside, pytest.raises(NotImplementedError, match=words):
        attention(*three, **options)
