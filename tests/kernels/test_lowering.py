"""Every structure is lowered for the GPUs that kernels are written for, forward and backward.

Lowering runs the whole of a kernel's tracing and its translation to the compiler's own language; it
needs no GPU, only to be told of one.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import attnlab
from attnlab import masks, normalizers, scores
from attnlab.distributed.s2_attention import Shards
from attnlab.distributed.star_attention import StarMask
from tests.kernels import cases

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

KINDS = {
    "A100": "NVIDIA A100-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
}
HOPPER = ("H100", "H200")
BACKENDS = [b.name for b in cases.backends() if b.name != "tpu"]

B, T, S, N, K, H, D = 2, 300, 520, 4, 2, 64, 80


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def ids(*shape):
    return array(*shape, dtype=jnp.int32)


def _slow(at):
    return (at.query + 2 * at.key + at.head) % 3 != 1


def _near(at, reach):
    return jnp.abs(at.relative) < reach


def _log_distance(score, at, params):
    distance = jnp.abs(at.relative).astype(score.dtype)
    return score * params["gain"] - jnp.log1p(jnp.square(params["rate"]) * distance)


def _by_distance(score, at, table):
    return score + at.look_up(table, jnp.clip(jnp.abs(at.relative), 0, 4))


def structures():
    """Mask, modifiers, normalizer, other options; arrays are shapes."""
    key_ids, lengths = ids(B, S), ids(B)
    return {
        "plain": {},
        "causal": {"mask": masks.Causal()},
        "not a window or a prefix": {"mask": ~masks.SlidingWindow(9, 3) | masks.Prefix(40)},
        "prefix of entries": {"mask": masks.Prefix(lengths) | masks.Causal()},
        "segments": {"mask": masks.Segments(ids(B, T), key_ids) & masks.Causal()},
        "padding": {"mask": masks.KeyPadding(lengths) & masks.QueryPadding(lengths)},
        "strided": {"mask": masks.Strided(3, 1)},
        "star": {"mask": StarMask(64, 48, 200) | StarMask(32, 8, lengths)},
        "shards": {"mask": Shards(ids(N), 2, 64, 2)},
        "blocks": {
            "mask": masks.Blocks(jnp.ones((B, N, 3, 5), jnp.bool_), (128, 128)) & masks.Causal()
        },
        "array": {"mask": masks.ArrayMask(jnp.ones((B, 1, T, S), jnp.bool_))},
        "array of heads": {"mask": masks.ArrayMask(jnp.ones((N, 1, S), jnp.bool_))},
        "predicate": {"mask": masks.Predicate(_slow)},
        "predicate of heads": {"mask": masks.Predicate(_near, ids(N), "N")},
        "bias": {"modifiers": scores.Bias(array(N, T, S))},
        "bias of entries": {"modifiers": scores.Bias(array(B, 1, T, S))},
        "bias of queries": {"modifiers": scores.Bias(array(B, N, T, 1))},
        "bias of keys": {"modifiers": scores.Bias(array(1, 1, S)), "mask": masks.Causal()},
        "slopes": {"modifiers": scores.AlibiSlopes(array(N)), "mask": masks.Causal()},
        "t5": {"modifiers": scores.RelativeBias(array(N, 32))},
        "t5 both ways": {"modifiers": scores.RelativeBias(array(N, 8), True, 20)},
        "table of entries": {
            "modifiers": scores.ScoreFunction(_by_distance, array(B, N, 5), "B N *")
        },
        "cap and temperatures": {
            "modifiers": (scores.Temperature(array(N, 1, 1)), scores.SoftCap(array())),
        },
        "temperature of queries": {"modifiers": scores.Temperature(array(B, 1, T, 1))},
        "function": {
            "modifiers": scores.ScoreFunction(
                _log_distance, {"gain": array(), "rate": array(N)}, ("", "N")
            )
        },
        "sink": {"normalizer": normalizers.Softmax(array(N)), "mask": masks.Causal()},
        "plus one": {"normalizer": normalizers.SoftmaxPlusOne()},
        "softplus": {"normalizer": normalizers.SoftplusL1(), "mask": masks.Causal()},
        "sigmoid": {"normalizer": normalizers.Sigmoid()},
        "relu squared": {"normalizer": normalizers.ReluSquared(), "mask": masks.Causal()},
        "everything": {
            "mask": masks.Segments(ids(B, T), key_ids) & masks.Causal(),
            "modifiers": (
                scores.Bias(array(N, T, S)),
                scores.AlibiSlopes(array(N)),
                scores.RelativeBias(array(N, 8), True, 20),
                scores.SoftCap(array()),
            ),
            "normalizer": normalizers.Softmax(array(N)),
            "query_offset": ids(),
            "dropout_rate": 0.1,
        },
        "dropout": {"dropout_rate": 0.3, "mask": masks.Causal()},
        "offsets": {"query_offset": ids(), "key_offset": ids(), "mask": masks.Causal()},
    }


def lowered(kind, backend, dtype, options, value_width=D):
    """Forward and backward, with the gradient of every trainable array, as text."""
    device = AbstractDevice(device_kind=KINDS[kind], num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    rate = options.get("dropout_rate", 0.0)
    arrays = (
        array(B, T, N, H, dtype=dtype),
        array(B, S, K, H, dtype=dtype),
        array(B, S, K, value_width, dtype=dtype),
    )
    names = ("mask", "normalizer", "query_offset", "key_offset")
    data = {name: options[name] for name in names if name in options}

    def loss(arrays, modifiers, sink, data, words):
        if sink is not None:
            data = {**data, "normalizer": normalizers.Softmax(sink)}
        more = {"dropout_rate": rate, "dropout_key": words} if rate else {}
        out = attnlab.attention(
            *arrays, modifiers=modifiers, implementation=backend, **data, **more
        )
        return jnp.sum(out.astype(jnp.float32))

    sink = getattr(options.get("normalizer"), "sink", None)
    with use_abstract_mesh(mesh):
        return (
            jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
            .trace(arrays, options.get("modifiers", ()), sink, data, array(2, dtype=jnp.uint32))
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )


def chosen():
    """Each structure for one kind of GPU in turn, and one with everything for every kind."""
    for backend in BACKENDS:
        kinds = tuple(KINDS) if backend == "triton" else HOPPER
        for number, name in enumerate(structures()):
            for kind in kinds if name == "everything" else (kinds[number % len(kinds)],):
                yield pytest.param(backend, kind, name, id=f"{backend}-{kind}-{name}")


@pytest.mark.parametrize(("backend", "kind", "name"), list(chosen()))
def test_forward_and_backward_are_lowered(backend, kind, name):
    text = lowered(kind, backend, jnp.bfloat16, structures()[name])
    for kernel in ("flash_forward", "flash_rows", "flash_columns"):
        assert kernel in text, f"no kernel {kernel} was lowered"
    assert "callback" not in text, "interpreted"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("widths", [16, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes_and_widths_are_lowered(backend, widths, dtype):
    known = {b.name: b for b in cases.backends()}[backend]
    dtype = jnp.dtype(dtype)
    if dtype not in map(jnp.dtype, known.dtypes):
        pytest.skip("refused by the backend")
    options = {"mask": masks.Causal(), "modifiers": scores.AlibiSlopes(array(N))}
    assert "flash_forward" in lowered("H100", backend, dtype, options, widths)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "mosaic_gpu"])
def test_a_gpu_that_the_kernel_is_not_for_is_refused(backend):
    with pytest.raises(NotImplementedError, match=r"needs a Hopper GPU.*A100"):
        lowered("A100", backend, jnp.bfloat16, {})
