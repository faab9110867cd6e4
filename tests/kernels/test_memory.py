"""What the kernels take beside their arguments grows with the length, not with its square."""

import jax
import jax.numpy as jnp
import pytest

import attnlab
from attnlab import masks, scores
from pallas_kernels.inspect import compile_tpu, tpu_missing

HEADS, WIDTH = 2, 128


def temporaries(length):
    """Bytes for a call and all its gradients, as the compiler of a TPU counts them."""
    x = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.bfloat16)
    slopes = jax.ShapeDtypeStruct((HEADS,), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(query, key, value, slopes, ids):
        out = attnlab.attention(
            query, key, value, mask=masks.Causal() & masks.Segments(ids),
            modifiers=scores.AlibiSlopes(slopes), implementation="tpu",
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32))

    report = compile_tpu(jax.grad(loss, (0, 1, 2, 3)), x, x, x, slopes, ids, kind="v5p")
    return report.memory["temp"]


@pytest.mark.skipif(bool(tpu_missing()), reason=str(tpu_missing()))
def test_memory_with_gradients_is_linear():
    short, long = temporaries(2048), temporaries(8192)
    assert long <= 4.4 * short
    # All scores of one head, in the dtype of the input.
    assert long < 8192**2 * 2
