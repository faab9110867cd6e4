"""One atlas entry, ready to be examined: its parameters, its inputs, its shared compiled calls."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import masks
from attnlab.core.entry import Entry
from attnlab.core.modules import Mechanism

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 12, 4, 2, 8


def seed_of(key) -> int:
    return int(np.asarray(jax.random.key_data(key)).astype(np.uint64).sum() % 2**31)


def draw(key, *, queries=LENGTH, keys=LENGTH, kv_heads=KV_HEADS, batch=(BATCH,), magnitude=1.0):
    """Query, key, value as float32 NumPy arrays."""
    rng = np.random.default_rng(seed_of(key))
    query = rng.standard_normal((*batch, queries, HEADS, WIDTH))
    key_ = rng.standard_normal((*batch, keys, kv_heads, WIDTH))
    value = rng.standard_normal((*batch, keys, kv_heads, WIDTH))
    return tuple(x.astype(np.float32) for x in (magnitude * query, magnitude * key_, value))


def example_mask() -> np.ndarray:
    """(B, 1, T, S): the second batch entry has seven keys; one row of the first sees nothing."""
    allowed = np.ones((BATCH, 1, LENGTH, LENGTH), bool)
    allowed[1, :, :, 7:] = False
    allowed[0, :, 4] = False
    allowed[0, :, 6:, 9] = False
    return allowed


@dataclasses.dataclass(frozen=True)
class Subject:
    """An entry in one dtype and one implementation; equal subjects share their compiled calls."""

    entry: Entry
    dtype: Any
    implementation: str

    @functools.cached_property
    def parts(self):
        """Graph and parameters; these are moved off their initial values, which may be zero."""
        module = self.entry.build(HEADS, WIDTH, rngs=nnx.Rngs(0))
        graph, state = nnx.split(module)
        rng = np.random.default_rng(11)

        def moved(x):
            x = np.asarray(x)
            return jnp.asarray((x + 0.2 * rng.standard_normal(x.shape)).astype(x.dtype))

        return graph, jax.tree.map(moved, state)

    @functools.cached_property
    def params(self) -> dict[str, np.ndarray]:
        """The parameters by name, for the formula."""
        return {
            ".".join(map(str, path)): np.asarray(leaf[...], np.float64)
            for path, leaf in nnx.to_flat_state(self.state)
        }

    @property
    def state(self):
        return self.parts[1]

    def call(self, state, query, key, value, **options):
        """The mechanism itself; encodings that act on embeddings come in their function form."""
        module = nnx.merge(self.parts[0], state)
        options.setdefault("implementation", self.implementation)
        if type(module).embed is not Mechanism.embed:
            return self.entry.function(query, key, value, **options)
        return module(query, key, value, **options)

    def cast(self, arrays):
        return tuple(jnp.asarray(x).astype(self.dtype) for x in arrays)

    # Compiled once for each subject and shape, used by many properties.

    @functools.cached_property
    def masked(self):
        """(state, query, key, value, allowed, query_offset, key_offset) -> out."""

        def run(state, query, key, value, allowed, query_offset, key_offset):
            return self.call(
                state,
                query,
                key,
                value,
                mask=masks.ArrayMask(allowed),
                query_offset=query_offset,
                key_offset=key_offset,
            )

        return jax.jit(run)

    def with_mask(self, arrays, allowed=None, offsets=(0, 0)):
        allowed = np.ones((BATCH, 1, LENGTH, LENGTH), bool) if allowed is None else allowed
        offsets = (jnp.asarray(o, jnp.int32) for o in offsets)
        return self.masked(self.state, *self.cast(arrays), jnp.asarray(allowed), *offsets)

    @functools.cached_property
    def masked_gradient(self):
        """Output, and the gradient of sum(cos(out) * read) for parameters and inputs."""

        def loss(state, query, key, value, allowed, read):
            out = self.call(state, query, key, value, mask=masks.ArrayMask(allowed))
            wide = out.astype(read.dtype)
            return jnp.sum(jnp.cos(wide) * read), out

        grad = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True)
        return jax.jit(grad)

    def gradients(self, arrays, allowed=None, read=None):
        allowed = np.ones((BATCH, 1, LENGTH, LENGTH), bool) if allowed is None else allowed
        read = np.ones(arrays[0].shape, np.float32) if read is None else read
        (loss, out), gradient = self.masked_gradient(
            self.state, *self.cast(arrays), jnp.asarray(allowed), jnp.asarray(read)
        )
        return loss, out, gradient

    @functools.cached_property
    def causal(self):
        """(state, query, key, value, query_offset) -> out under a causal mask."""

        def run(state, query, key, value, query_offset):
            return self.call(
                state, query, key, value, mask=masks.Causal(), query_offset=query_offset
            )

        return jax.jit(run)

    @functools.cached_property
    def causal_pull(self):
        """Gradients for key and value of one causal output row's cotangent."""

        def run(state, query, key, value, cotangent):
            def of(key, value):
                return self.call(state, query, key, value, mask=masks.Causal())

            return jax.vjp(of, key, value)[1](cotangent)

        return jax.jit(run)


@functools.lru_cache(maxsize=256)
def subject(entry: Entry, dtype: str, implementation: str) -> Subject:
    made = Subject(entry, jnp.dtype(dtype), implementation)
    _ = made.parts  # now, not inside whatever is traced first
    return made
