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
from attnlab.core.inputs import check_inputs
from attnlab.core.modules import Mechanism
from attnlab.core.past import Past

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


@dataclasses.dataclass(frozen=True)
class Seen:
    """Which pairs meet: `dense` (B, 1, T, S), and `arrays` from which a mask is made."""

    dense: np.ndarray
    arrays: Any


def pairs(dense) -> Seen:
    return Seen(dense, dense)


def documents(ids) -> Seen:
    """Tokens of the same document; a negative id is padding."""
    ids = np.asarray(ids, np.int32)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
    return Seen(same[:, None], ids)


def padded(queries, keys) -> Seen:
    """The first so many queries and keys of each batch entry."""
    place = np.arange(LENGTH)
    real = [place < np.asarray(lengths)[:, None] for lengths in (queries, keys)]
    dense = real[0][:, None, :, None] & real[1][:, None, None, :]
    return Seen(dense, (np.asarray(queries, np.int32), np.asarray(keys, np.int32)))


MASKS = {
    "pairs": masks.ArrayMask,
    "documents": masks.Segments,
    "keys": lambda lengths: masks.QueryPadding(lengths[0]) & masks.KeyPadding(lengths[1]),
}


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

    def call(self, state, query, key, value, *, start=0, orders=(None, None), **options):
        """The mechanism itself; encodings that act on embeddings come in their function form.

        Where it reads the layer's input, so does this: positions `start` to start + S of it for
        keys, and those of the queries.  `orders` permutes it for queries and for keys.
        """
        module = nnx.merge(self.parts[0], state)
        options.setdefault("implementation", self.implementation)
        if self.implementation == "chunked" and key.shape[-3] <= 64:
            options.setdefault("chunk_size", 5)  # several chunks, none of them whole
        if type(module).embed is not Mechanism.embed:
            return self.entry.function(query, key, value, **options)
        if self.looks_back:
            query, key, value = check_inputs(query, key, value)
            past = Past.of(options.get("mask"), query, key, offset=options.get("query_offset", 0))
            query, key, value = module.prepare(query, key, value, past)
        if not self.reads_input:
            return module(query, key, value, **options)
        first = start + options.get("query_offset", 0) - options.get("key_offset", 0)
        rows = self._input_at(query, first, orders[0])
        key, value = module.keep(key, value, self._input_at(key, start, orders[1]))
        out = module(query, key, value, **module.controls(rows), **options)
        if isinstance(out, tuple):
            return (module.finish(out[0], rows), *out[1:])
        return module.finish(out, rows)

    def _input_at(self, tokens, first, order):
        """The layer's input where these tokens are, in another order of them if there is one."""
        shape = (1,) * (
            3 - tokens.ndim
        ) + tokens.shape  # a rank too small is for the call to refuse
        length, batch = shape[-3], shape[:-3]
        floating = jnp.issubdtype(tokens.dtype, jnp.floating)
        wide = jnp.asarray(self.input(length + 64)).astype(
            tokens.dtype if floating else jnp.float32
        )
        x = jax.lax.dynamic_slice_in_dim(wide, first, length)
        x = x if order is None else x[order]
        return jnp.broadcast_to(jnp.expand_dims(x, range(len(batch))), (*batch, *x.shape))

    def cast(self, arrays):
        return tuple(jnp.asarray(x).astype(self.dtype) for x in arrays)

    # Who sees whom, said in the words that the mechanism understands.

    @property
    def is_causal(self) -> bool:
        """Causal whatever the mask says."""
        return not any(p.startswith("noncausal") for p in self.entry.patterns)

    def example(self, *, hide=False) -> Seen:
        """Keys missing, a row that sees nothing, pairs or documents apart; `hide`: more keys gone.

        The second batch entry has seven keys; with `hide` the first has ten.
        """
        if self.entry.masks == "documents":
            ids = [[0] * 4 + [-1] + [1] * 7, [0] * 7 + [-1] * 5]
            ids[0][10:] = [-1, -1] if hide else [1, 1]
            return self._seen(documents(ids))
        if self.entry.masks == "keys":
            return padded([LENGTH - 1, LENGTH], [10 if hide else LENGTH, 7])
        allowed = np.ones((BATCH, 1, LENGTH, LENGTH), bool)
        allowed[1, :, :, 7:] = False
        allowed[0, :, 4] = False
        allowed[0, :, 6:, 9] = False
        if hide:
            allowed[0, :, :, 10:] = False
        return self._seen(pairs(allowed))

    def first(self, real=LENGTH) -> Seen:
        """The first `real` keys, and at least as many queries."""
        if self.entry.masks == "keys":
            return padded([LENGTH] * BATCH, [real] * BATCH)
        keys = np.broadcast_to(np.arange(LENGTH) < real, (BATCH, LENGTH))
        if self.entry.masks == "documents":
            return self._seen(documents(np.where(keys, 0, -1)))
        return self._seen(pairs(np.broadcast_to(keys[:, None, None], (BATCH, 1, LENGTH, LENGTH))))

    def _seen(self, seen: Seen) -> Seen:
        """The same, of keys that are not later where the mechanism is causal by itself."""
        causal = np.tri(LENGTH, dtype=bool) if self.is_causal else np.ones((LENGTH, LENGTH), bool)
        return dataclasses.replace(seen, dense=seen.dense & causal)

    def mask(self, arrays):
        return MASKS[self.entry.masks](jax.tree.map(jnp.asarray, arrays))

    # The layer's input, from which some mechanisms compute decays, gates and the like.

    @property
    def reads_input(self) -> bool:
        own = self.entry.module
        return any(
            getattr(own, name) is not getattr(Mechanism, name)
            for name in ("controls", "finish", "keep")
        )

    @property
    def looks_back(self) -> bool:
        """Whether queries, keys and values depend on the tokens before theirs."""
        return self.entry.module.prepare is not Mechanism.prepare

    def input(self, length: int, start: int = 0):
        """The same for every batch entry, "S F"."""
        rng = np.random.default_rng(23)
        wide = rng.standard_normal((max(64, start + length), HEADS * WIDTH))
        return wide[start : start + length].astype(np.float32)

    # Compiled once for each subject and shape, used by many properties.

    @functools.cached_property
    def masked(self):
        """(state, query, key, value, seen, query_offset, key_offset) -> out."""

        def run(state, query, key, value, seen, query_offset, key_offset):
            if self.entry.masks == "documents":
                key_offset = query_offset  # as one, they are known to be the same
            return self.call(
                state,
                query,
                key,
                value,
                mask=self.mask(seen),
                query_offset=query_offset,
                key_offset=key_offset,
            )

        return jax.jit(run)

    def with_mask(self, arrays, seen=None, offsets=(0, 0)):
        seen = self.first() if seen is None else seen
        offsets = (jnp.asarray(o, jnp.int32) for o in offsets)
        return self.masked(self.state, *self.cast(arrays), seen.arrays, *offsets)

    @functools.cached_property
    def masked_gradient(self):
        """Output, and the gradient of sum(cos(out) * read) for parameters and inputs."""

        def loss(state, query, key, value, seen, read):
            out = self.call(state, query, key, value, mask=self.mask(seen))
            wide = out.astype(read.dtype)
            return jnp.sum(jnp.cos(wide) * read), out

        grad = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True)
        return jax.jit(grad)

    def gradients(self, arrays, seen=None, read=None):
        seen = self.first() if seen is None else seen
        read = np.ones(arrays[0].shape, np.float32) if read is None else read
        (loss, out), gradient = self.masked_gradient(
            self.state, *self.cast(arrays), seen.arrays, jnp.asarray(read)
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
