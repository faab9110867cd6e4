"""What is particular to the Hopper kernels: slots that are watched, code rewritten, compiled code.

That they compute the formula is in `test_flash.py`, with all other kernels.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import (
    reset_gpu_interpret_mode_state,  # nowhere public, and wanted after an error
)
from jax.experimental.pallas import mosaic_gpu as plgpu

import attnlab
from attnlab import masks, normalizers, scores
from attnlab.core import kernels
from pallas_kernels import inspect
from pallas_kernels.flash import hopper, legal, mosaic_gpu
from pallas_kernels.flash.problem import Spec
from tests.tolerances import as_float64, assert_close

# Races between TMA and warpgroups raise; memory that nobody wrote is NaN.
WATCHED = plgpu.InterpretGPUParams(detect_races=True)


@pytest.fixture
def watched(monkeypatch):
    """Kernels run in the interpreter that watches memory; call what uses them outside of `jit`."""

    def forward(_, spec, __, splits, arrays):
        return mosaic_gpu.forward(spec, arrays, splits=splits, interpret=WATCHED)

    def backward(_, spec, __, wanted, inputs):
        return mosaic_gpu.backward(spec, *inputs, wanted, interpret=WATCHED)

    monkeypatch.setattr(kernels, "launch_forward", forward)
    monkeypatch.setattr(kernels, "launch_backward", backward)
    monkeypatch.setattr(kernels, "_solve", kernels._solve.__wrapped__)
    yield
    reset_gpu_interpret_mode_state()


def normal(*shape, seed=0, dtype=jnp.float16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def drawn(queries, keys, heads, shared, key_width, value_width):
    return (
        normal(1, queries, heads, key_width),
        normal(1, keys, shared, key_width, seed=1),
        normal(1, keys, shared, value_width, seed=2),
    )


# Enough keys that slots are filled again, and two warpgroups: with a third that fetches (plain),
# without (a modifier), in steps of half the length (wide), and through several heads.
CALLS = {
    "plain": (drawn(128, 700, 1, 1, 64, 64), None),
    "modifier": (drawn(128, 640, 1, 1, 64, 64), scores.SoftCap(jnp.float32(3))),
    "wide": (drawn(100, 330, 1, 1, 192, 128), None),
    "heads": (drawn(320, 130, 2, 1, 64, 128), scores.AlibiSlopes(jnp.asarray([0.1, 0.3]))),
}


def outcome(arrays, modifier, implementation):
    """Output, log-sum-exp and gradients, the last rows seeing most."""
    offset = arrays[1].shape[1] - arrays[0].shape[1]

    def run(*arrays):
        return attnlab.attention(
            *arrays, mask=masks.Causal(), modifiers=() if modifier is None else modifier,
            query_offset=max(offset, 0), return_lse=True, implementation=implementation,
        )  # fmt: skip

    found, pull = jax.vjp(run, *arrays)
    cotangent = jax.tree.map(lambda x: normal(*x.shape, seed=3, dtype=x.dtype), found)
    return found, pull(cotangent)


@pytest.mark.parametrize("name", CALLS)
def test_watched_memory_forward_and_backward(watched, name):
    arrays, modifier = CALLS[name]
    with kernels.interpret():
        found, gradient = outcome(arrays, modifier, "mosaic_gpu")
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    expected, wanted = outcome(wide, modifier, "reference")
    assert_close(found[0], expected[0], "float16", "value")
    assert_close(found[1], expected[1], "float16", "value")
    for ours, right in zip(gradient, wanted, strict=True):
        assert_close(ours, right, "float16", "gradient")


def test_a_slot_filled_too_early_is_a_race(watched, monkeypatch):
    arrays, modifier = CALLS["plain"]

    def fill(self, number):
        slot = hopper.rem(self.done + number, self.ring.stages)
        for source, target in self.copies(self.walk[number]):
            plgpu.copy_gmem_to_smem(source, target.at[slot], self.ring.ready.at[slot])

    monkeypatch.setattr(hopper.Feed, "fill", fill)
    with pytest.raises(Exception, match="RACE DETECTED"), kernels.interpret():
        jax.block_until_ready(outcome(arrays, modifier, "mosaic_gpu"))


# ---- code rewritten for Mosaic -------------------------------------------------------------------

ANY = np.concatenate([np.linspace(-30, 30, 241), [-1e-4, 1e-6, -1e-9, 0.24, 0.26, 85.0, -85.0]])
POSITIVE = np.concatenate([np.geomspace(1e-8, 1e8, 161), [0.0, 0.2499, 0.2501]])
FUNCTIONS = {
    "log1p": (jnp.log1p, np.log1p, POSITIVE),
    "expm1": (jnp.expm1, np.expm1, ANY),
    "tanh": (jnp.tanh, np.tanh, ANY),
    "floor": (jnp.floor, np.floor, ANY),
    "ceil": (jnp.ceil, np.ceil, ANY),
    "sinh": (jnp.sinh, np.sinh, ANY),
    "cosh": (jnp.cosh, np.cosh, ANY),
    "cbrt": (jnp.cbrt, np.cbrt, ANY),
    "sine far out": (jnp.sin, np.sin, 30 * ANY),
    "cosine far out": (jnp.cos, np.cos, 30 * ANY),
    "cube": (lambda x: x**3, lambda x: x**3, ANY),
    "inverse square": (lambda x: x**-2, lambda x: x**-2.0, POSITIVE[40:-3]),
    "power": (lambda x: x**1.5, lambda x: x**1.5, POSITIVE),
    "power of what is negative": (
        lambda x: jnp.power(x, jnp.round(x / 10)),
        lambda x: np.power(x, np.round(x / 10)),
        np.linspace(-29, 29, 59),
    ),
    "softplus": (jax.nn.softplus, lambda x: np.logaddexp(x, 0), ANY),
    "finite": (jnp.isfinite, np.isfinite, np.array([1.0, np.inf, -np.inf, np.nan])),
    "true": (lambda x: x.astype(jnp.int32).astype(bool), lambda x: x.astype(int) != 0, ANY),
    "not": (lambda x: ~(x > 2), lambda x: ~(x > 2), ANY),
}


# Lowered as they are, though some of their uses are rewritten; and calls, which are inlined.
KEPT = {"convert_element_type", "integer_pow", "sin", "cos", "jit"}


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rewritten_code_computes_the_same(name):
    ours, right, points = FUNCTIONS[name]
    x = jnp.asarray(points, jnp.float32)
    rewritten = legal.legal(ours)
    found, expected = as_float64(rewritten(x)), as_float64(right(as_float64(x)))
    # Entry by entry: a weight may be small.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=3e-7 * (name not in ("log1p",)))
    emitted = set(primitives(jax.make_jaxpr(rewritten)(x).jaxpr))
    assert emitted <= legal._LOWERED | KEPT


def test_gradients_are_rewritten_too():
    def slope(x):
        value, pull = jax.vjp(lambda x: jnp.log1p(jnp.exp(x)) * jnp.tanh(x), x)
        return value, pull(jnp.ones_like(x))[0]

    x = jnp.linspace(-8, 8, 33, dtype=jnp.float32)
    for ours, right in zip(legal.legal(slope)(x), slope(x), strict=True):
        assert_close(ours, right, "float32", "gradient")


@pytest.mark.parametrize(
    ("function", "name"),
    [(jax.lax.lgamma, "lgamma"), (jnp.cumsum, "cumsum"), (jax.lax.erf_inv, "erf_inv")],
)
def test_what_cannot_be_rewritten_is_refused_by_name(function, name):
    with pytest.raises(NotImplementedError, match=f'"{name}".*implementation="triton" can'):
        legal.legal(function)(jnp.ones(4))


# ---- limits --------------------------------------------------------------------------------------


class Plain:
    """The program of bare softmax."""

    shared = True

    def allowed(self, leaves, at):
        return at.key <= at.query

    def evaluate(self, leaves, products, at):
        return products


def spec(**options):
    return Spec(Plain(), (), 0.125, (128, 128), **({"block_sizes": (128, 128)} | options))


@pytest.mark.parametrize(
    ("dtype", "width", "options", "words"),
    [
        (jnp.float32, 64, {}, "computes in bfloat16 and float16, not float32"),
        (jnp.bfloat16, 320, {}, "up to 256 wide, got 320"),
        (jnp.bfloat16, 64, {"block_sizes": (32, 128)}, r"64 or 128, not \(32, 128\)"),
        (jnp.bfloat16, 64, {"scales": (0, 1)}, "int8"),
        (jnp.bfloat16, 64, {"isolated": True}, "clean keys"),
    ],
)
def test_limits_say_what_is_beyond_them(dtype, width, options, words):
    array = jax.ShapeDtypeStruct((1, 1, 128, width), dtype)
    assert re.search(words, mosaic_gpu.limits(array, array, spec(**options)))


def test_within_limits_nothing_is_said():
    array = jax.ShapeDtypeStruct((1, 1, 128, 256), jnp.bfloat16)
    assert mosaic_gpu.limits(array, array, spec()) is None


# ---- compiled ------------------------------------------------------------------------------------

B, T, N, S, K = 1, 512, 2, 512, 2
HALF = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
FULL = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
BUILT = {
    "plain": (128, lambda p: ((), None), None),
    "64": (64, lambda p: ((), None), None),
    "256": (256, lambda p: ((), None), None),
    "alibi": (128, lambda p: ((scores.AlibiSlopes(p),), None), FULL((N,))),
    "cap": (128, lambda p: ((scores.SoftCap(p),), None), FULL(())),
    "bias": (128, lambda p: ((scores.Bias(p),), None), FULL((N, T, S))),
    "table": (128, lambda p: ((scores.RelativeBias(p),), None), FULL((N, 32))),
    "sigmoid": (128, lambda p: ((), normalizers.Sigmoid()), None),
}


@pytest.mark.skipif(inspect.gpu.plugin_path() is None, reason="needs the CUDA plugin")
@pytest.mark.parametrize("kind", ["H100", "H200"])
@pytest.mark.parametrize("name", BUILT)
def test_compiled_kernels_use_wgmma_and_spill_nothing(name, kind):
    width, build, params = BUILT[name]

    def loss(q, k, v, *params):
        modifiers, normalizer = build(*params) if params else build(None)
        out = attnlab.attention(
            q, k, v, mask=masks.Causal(), modifiers=modifiers, normalizer=normalizer,
            implementation="mosaic_gpu",
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32))

    inputs = [HALF((B, T, N, width)), HALF((B, S, K, width)), HALF((B, S, K, width))]
    inputs += [] if params is None else [params]
    report = inspect.compile_gpu(jax.grad(loss, tuple(range(len(inputs)))), *inputs, kind=kind)
    found = [kernel for kernel in report.kernels if "flash_" in kernel.name]
    assert {"flash_forward", "flash_rows", "flash_columns"} <= {k.name for k in found}
    for kernel in found:
        assert kernel.wgmma, f"{kernel}: no wgmma"
        slack = 64 if name == "256" else 0  # bytes, outside of the loops
        assert kernel.spill_stores <= slack, str(kernel)
