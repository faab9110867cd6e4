"""The linear-state kernels, lowered for each GPU and TPU that they are written for."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.inspect import lower_gpu, lower_tpu
from pallas_kernels.linear import Steps, linear_recurrence

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

GPUS, TPUS = ("A100", "H100", "H200"), ("v4", "v5e", "v5p", "v6e")
DECAYS = ("none", "step", "channel")
P, T = 2, 300


def shapes(decay="none", erase=False, dtype="bfloat16", width=64, value_width=80, group=2):
    """What a call is traced with: steps and state."""

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    channels = {"step": 1, "channel": width}
    log_decay = array(P, T, channels[decay], dtype="float32") if decay != "none" else None
    key = array(P, T, width)
    steps = Steps(
        array(P, group, T, width), key, array(P, T, value_width), log_decay, key if erase else None
    )
    return steps, array(P, width, value_width, dtype="float32")


def gradients(backend):
    """A call and the gradient of everything, from output and last state."""

    def loss(steps, state):
        out, state = linear_recurrence(steps, state, backend)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(state)

    return jax.value_and_grad(loss, (0, 1))


def kernels(backend, erase):
    if backend == "tpu":
        return {"linear_forward", "linear_backward"}
    stages = {"read", "scan", "read_back", "scan_back", "put_back"}
    return {f"linear_{x}" for x in stages | ({"prepare", "prepare_back"} if erase else set())}


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("kind", [*GPUS, *TPUS])
def test_forward_and_backward_are_lowered(kind, decay, erase):
    backend, lower = ("triton", lower_gpu) if kind in GPUS else ("tpu", lower_tpu)
    text = lower(gradients(backend), *shapes(decay, erase), kind=kind).as_text()
    for kernel in kernels(backend, erase):
        assert kernel in text, f"no kernel {kernel} was lowered"
    assert "callback" not in text, "interpreted"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("widths", [(16, 256), (256, 16), (20, 100)])
@pytest.mark.parametrize("kind", ["H100", "v5e"])
def test_other_dtypes_and_widths_are_lowered(kind, widths, dtype):
    backend, lower = ("triton", lower_gpu) if kind in GPUS else ("tpu", lower_tpu)
    given = shapes("channel", True, dtype, *widths, group=1)
    assert "linear_" in lower(gradients(backend), *given, kind=kind).as_text()
