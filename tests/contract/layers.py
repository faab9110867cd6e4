"""The contract of layers: what entries promise that map the input itself, `layer(x, mask=...)`.

The names are those of the mechanisms' promises where they say the same.  Where the readers are the
tokens, masks are packed documents with padding; a pooling layer is told how many tokens are real.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import masks
from attnlab.core.kernels import BACKENDS, missing
from tests import oracles
from tests.compiled import temporaries
from tests.contract import properties
from tests.contract.formulas import FORMULAS
from tests.contract.subject import BATCH, HEADS, LENGTH, WIDTH, Seen, Subject, documents, seed_of
from tests.tolerances import (
    LINEAR_GROWTH,
    as_float64,
    assert_close,
    assert_reordered,
    assert_within_budget,
    largest,
)

PROPERTIES = {}
FEATURES = HEADS * WIDTH


@dataclasses.dataclass(frozen=True)
class Layer(Subject):
    """A layer in one dtype and one implementation."""

    @property
    def of_tokens(self) -> bool:
        """Whether it is the tokens that read; else it pools."""
        return any(pattern.endswith("self") for pattern in self.entry.patterns)

    @property
    def is_causal(self) -> bool:
        return False

    def call(self, state, x, **options):
        layer = nnx.merge(self.parts[0], state)
        layer.implementation = self.implementation
        return layer(x, **options)

    def example(self, *, hide=False) -> Seen:
        if not self.of_tokens:
            return self.first([10 if hide else LENGTH, 7])
        ids = [[0] * 4 + [-1] + [1] * 7, [0] * 7 + [-1] * 5]
        ids[0][10:] = [-1, -1] if hide else [1, 1]
        seen = documents(ids)
        return dataclasses.replace(seen, dense=seen.dense[:, 0])

    def first(self, real) -> Seen:
        """The first so many tokens of each batch entry."""
        lengths = np.broadcast_to(np.asarray(real, np.int32), (BATCH,))
        keys = np.arange(LENGTH) < lengths[:, None]
        if not self.of_tokens:
            return Seen(keys[:, None], lengths)
        seen = documents(np.where(keys, 0, -1))
        return dataclasses.replace(seen, dense=seen.dense[:, 0])

    def mask(self, arrays):
        arrays = jnp.asarray(arrays)
        return masks.Segments(arrays) if self.of_tokens else masks.KeyPadding(arrays)

    def real(self, seen) -> np.ndarray:
        """Which tokens are read at all, (B, S)."""
        return seen.dense.any(axis=1)

    @functools.cached_property
    def masked(self):
        """(state, x, seen) -> out."""
        return jax.jit(lambda state, x, seen: self.call(state, x, mask=self.mask(seen)))

    def with_mask(self, x, seen):
        return self.masked(self.state, *self.cast([x]), seen.arrays)

    @functools.cached_property
    def masked_gradient(self):
        """Output, and the gradient of sum(cos(out) * read) for parameters and input."""

        def loss(state, x, seen, read):
            out = self.call(state, x, mask=self.mask(seen))
            return jnp.sum(jnp.cos(out.astype(read.dtype)) * read), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def gradients(self, x, seen, read):
        (_, out), gradient = self.masked_gradient(
            self.state, *self.cast([x]), seen.arrays, jnp.asarray(read, jnp.float32)
        )
        return out, gradient

    def formula(self, x, seen, dtype=np.float64, params=None):
        params = self.params if params is None else params
        (x,) = self.cast([x]) if params is self.params else [x]
        return FORMULAS[self.entry.id](params, as_float64(x), allowed=seen.dense, dtype=dtype)

    @functools.cached_property
    def causal(self):
        return jax.jit(lambda state, x: self.call(state, x, mask=masks.Causal()))


@functools.lru_cache(maxsize=64)
def layer(entry, dtype, implementation) -> Layer:
    made = Layer(entry, jnp.dtype(dtype), implementation)
    _ = made.parts
    return made


promise = functools.partial(properties.promise, table=PROPERTIES, of=layer)


def draw(key, *, length=LENGTH, batch=(BATCH,), magnitude=1.0):
    rng = np.random.default_rng(seed_of(key))
    return (magnitude * rng.standard_normal((*batch, length, FEATURES))).astype(np.float32)


def _read(key, out):
    return np.random.default_rng(seed_of(key) + 1).standard_normal(out.shape).astype(np.float32)


@promise("The output has the formula's shape and the input's dtype, whatever the batch axes.")
def shape_and_dtype(subject: Layer, key):
    for batch, length in (((BATCH,), LENGTH), ((), 1), ((2, 1), 5)):
        x = jax.ShapeDtypeStruct((*batch, length, FEATURES), subject.dtype)
        out = jax.eval_shape(subject.call, subject.state, x)
        seen = np.ones((*batch, length if subject.of_tokens else 1, length), bool)
        exact = subject.formula(draw(key, length=length, batch=batch), Seen(seen, None))
        assert out.shape == exact.shape, f"shape {out.shape}, expected {exact.shape}"
        assert out.dtype == subject.dtype, f"dtype {out.dtype} from {subject.dtype}"


@promise("Compiled and uncompiled, the same numbers.", dtypes=("float32",))
def jit_equals_eager(subject: Layer, key):
    x, seen = draw(key), subject.example()
    eager = subject.call(subject.state, *subject.cast([x]), mask=subject.mask(seen.arrays))
    assert_reordered(eager, as_float64(subject.with_mask(x, seen)), subject.dtype)


@promise("Mapped over a batch by vmap, the same numbers as with a batch axis.", dtypes=("float32",))
def vmap_equals_batch(subject: Layer, key):
    (x,) = subject.cast([draw(key)])
    run = functools.partial(subject.call, subject.state)
    mapped, batched = jax.jit(jax.vmap(run))(x), jax.jit(run)(x)
    assert_reordered(mapped, as_float64(batched), subject.dtype)


@promise("Errs no more than four times what the plain formula errs in the same dtype.")
def within_budget(subject: Layer, key):
    seen = subject.example()
    for magnitude in (1.0, 5.0):
        x = draw(key, magnitude=magnitude)
        exact, plain = (subject.formula(x, seen, dtype) for dtype in (np.float64, subject.dtype))
        words = f"input times {magnitude:g}"
        assert_within_budget(subject.with_mask(x, seen), exact, plain, subject.dtype, words=words)


@promise("The gradient is the slope of the float64 formula, for the input and each parameter.")
def gradient_vs_float64(subject: Layer, key):
    x, seen = draw(key), subject.example()
    rng = np.random.default_rng(seed_of(key) + 2)
    read = _read(key, subject.with_mask(x, seen))
    _, gradient = subject.gradients(x, seen, read)
    names = [*subject.params, "x"]
    exact = [*subject.params.values(), as_float64(*subject.cast([x]))]

    def loss(*moved):
        params = dict(zip(names[:-1], moved[:-1], strict=True))
        return np.sum(np.cos(subject.formula(moved[-1], seen, params=params)) * read)

    found = jax.tree.leaves(gradient)
    assert [np.shape(g) for g in found] == [np.shape(y) for y in exact]
    for index, (name, ours) in enumerate(zip(names, map(as_float64, found), strict=True)):
        for _ in range(4):
            direction = [np.zeros(np.shape(y)) for y in exact]
            direction[index] = rng.standard_normal(ours.shape)
            slope = oracles.directional(loss, exact, direction)
            scale = max(largest(ours), 1e-2) * np.linalg.norm(direction[index])
            along = np.sum(ours * direction[index])
            assert_close(along, slope, subject.dtype, "gradient", scale=scale, words=f"d {name}")


@promise("Inputs sixty times as large, and readers that see nothing: finite; zeros for the latter.")
def finite_at_extremes(subject: Layer, key):
    seen = subject.example() if subject.of_tokens else subject.first([LENGTH, 0])
    for magnitude in (1.0, 60.0):
        x = draw(key, magnitude=magnitude)
        read = _read(key, subject.with_mask(x, seen))
        out, gradient = subject.gradients(x, seen, read)
        assert np.all(np.isfinite(as_float64(out)))
        blind = ~seen.dense.any(axis=2) if subject.of_tokens else ~subject.real(seen).any(axis=1)
        assert blind.any(), "no reader is blind"
        assert np.all(as_float64(out)[blind] == 0), "a reader that sees nothing reads something"
        for leaf in jax.tree.leaves(gradient):
            assert np.all(np.isfinite(as_float64(leaf))), "a gradient is not finite"


@promise("Tokens behind a mask may hold anything: no value and no gradient changes.")
def masked_keys_have_no_influence(subject: Layer, key):
    seen = subject.example(hide=True)
    x, hidden = draw(key), ~subject.real(seen)[..., None]
    read = _read(key, subject.with_mask(x, seen))
    poison = np.random.default_rng(3).choice([np.nan, np.inf, -np.inf], size=x.shape)
    clean = subject.gradients(np.where(hidden, 0, x), seen, read)
    worse = subject.gradients(np.where(hidden, poison, x).astype(np.float32), seen, read)
    for ours, expected in zip(jax.tree.leaves(worse), jax.tree.leaves(clean), strict=True):
        ours, expected = as_float64(ours), as_float64(expected)
        np.testing.assert_array_equal(ours, expected, "what is masked has influence")
    assert np.all(np.where(hidden, as_float64(clean[1][1]), 0) == 0)


@promise("Padding, masked, does not change what is real.")
def padding_changes_nothing(subject: Layer, key):
    x, real = draw(key), 7
    alone = jax.jit(subject.call)(subject.state, *subject.cast([x[:, :real]]))
    padded = subject.with_mask(x, subject.first(real))
    padded = padded[:, :real] if subject.of_tokens else padded
    assert_reordered(padded, as_float64(alone), subject.dtype)


@promise("Causal: no output depends on a later token, be it NaN; the Jacobian is exactly 0.")
def no_leak_from_the_future(subject: Layer, key):
    if properties.CAUSAL not in subject.entry.patterns:
        return "not causal"
    x = draw(key)
    out, pull = jax.vjp(lambda x: subject.causal(subject.state, x), *subject.cast([x]))
    for row in (0, 5):
        later = (np.arange(LENGTH) > row)[:, None]
        bad = subject.cast([np.where(later, np.nan, x)])
        poisoned = as_float64(subject.causal(subject.state, *bad))
        expected = as_float64(out)[:, : row + 1]
        np.testing.assert_array_equal(poisoned[:, : row + 1], expected, "the future leaks")
        (gradient,) = pull(jnp.zeros_like(out).at[:, row].set(1))
        gradient = as_float64(gradient)
        assert np.all(gradient[:, row + 1 :] == 0), "the Jacobian reaches the future"
        assert np.any(gradient[:, : row + 1] != 0), "the Jacobian reaches nothing"
    return None


@promise("Permuting tokens permutes what they read, or changes nothing.", claim="position-free")
def permutation_of_keys(subject: Layer, key):
    x, run = draw(key), jax.jit(subject.call)
    order = np.random.default_rng(seed_of(key)).permutation(LENGTH)
    plain = as_float64(run(subject.state, *subject.cast([x])))
    permuted = run(subject.state, *subject.cast([x[:, order]]))
    assert_reordered(permuted, plain[:, order] if subject.of_tokens else plain, subject.dtype)


@promise("Padding in front, masked, changes nothing.", claim="translation-invariant")
def translation(subject: Layer, key):
    x, seen = draw(key), subject.first(LENGTH)
    plain = as_float64(subject.with_mask(x, seen))
    front = 9
    longer = np.concatenate([draw(key, length=front), x], axis=1)
    ids = np.concatenate([np.full((BATCH, front), -1, np.int32), seen.arrays], axis=1)
    moved = subject.masked(subject.state, *subject.cast([longer]), ids)
    assert_reordered(moved[:, front:], plain, subject.dtype)


@promise("Decoding equals reading the whole sequence at once.", claim="decode")
def decode_equals_prefill(subject: Layer, key):
    (x,) = subject.cast([draw(key)])
    whole = as_float64(subject.causal(subject.state, x))
    cache = nnx.merge(*subject.parts).create_cache((BATCH,), LENGTH, subject.dtype)
    cache = jax.tree.map(  # what is not written yet may hold anything
        lambda a: jnp.full_like(a, jnp.nan) if jnp.issubdtype(a.dtype, jnp.floating) else a, cache
    )

    @jax.jit
    def step(state, x, cache):
        return subject.call(state, x, mask=masks.Causal(), cache=cache)

    for first, last in ((0, 4), (4, 5), (5, 6), (6, LENGTH)):
        out, cache = step(subject.state, x[:, first:last], cache)
        words = f"tokens {first} to {last}"
        assert_reordered(out, whole[:, first:last], subject.dtype, words=words)


@promise(
    "Temporaries grow linearly from n to 4n, forward and with gradients.",
    claim="linear-memory",
    dtypes=("float32",),
)
def memory_growth(subject: Layer, key):
    if subject.implementation in ("reference", "xla"):
        return "holds the score matrix; blockwise does not"
    if subject.implementation in BACKENDS and missing(subject.implementation):
        return "the memory of the interpreter is not the kernel's"

    def memory(n):
        x = jax.ShapeDtypeStruct((n, FEATURES), subject.dtype)
        return temporaries(jax.grad(lambda x: jnp.sum(subject.call(subject.state, x))), x)

    small, large = memory(1024), memory(4096)
    assert large <= LINEAR_GROWTH * small, f"{small:,} bytes grow to {large:,}"
    return None
