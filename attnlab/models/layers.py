"""The parts of a transformer block: norm, MLP, dropout, and the block around a mechanism.

Axes: *B batch, T tokens, F features.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

import attnlab
from attnlab.core import attention as front
from attnlab.core.masks import Mask
from attnlab.core.modules import RMSNorm
from attnlab.dense.deconstructing_attention import attend_by
from attnlab.distributed.meshes import on_devices


def dropout(
    x: Float[Array, "*B T F"], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "*B T F"]:
    """Zeroes each entry with probability `rate` and scales the rest; without a key, x itself."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


class FeedForward(nnx.Module):
    """The MLP of a block: W2 gelu(W1 x), or W2 (gelu(W1 x) * W3 x) when gated.

    With `chunk` so many positions are computed at a time, and again in the backward pass, so that
    the hidden layer of a chunk is all that is ever held (Liu & Abbeel, 2023, arXiv:2305.19370); the
    numbers are the same.  Where attention is spread over a mesh (`attnlab.distributed.over`) each
    device takes its own positions chunk by chunk.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        gated: bool = False,
        chunk: int | None = None,
        output_scale: float = 1.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk: expected at least 1 position, got {chunk}.")
        self.chunk = chunk
        inner = nnx.initializers.normal(features**-0.5)
        outer = nnx.initializers.normal(output_scale * hidden**-0.5)
        self.expand = nnx.Linear(
            features, hidden, use_bias=False, kernel_init=inner, dtype=dtype, rngs=rngs
        )
        self.gate = (
            nnx.Linear(features, hidden, use_bias=False, kernel_init=inner, dtype=dtype, rngs=rngs)
            if gated
            else None
        )
        self.contract = nnx.Linear(
            hidden, features, use_bias=False, kernel_init=outer, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        """The same shape as `x`."""
        chunk = self.chunk
        if chunk is None:
            return self._whole(x)
        graph, params = nnx.split(self)

        def by_chunks(params: Any, x: Array) -> Array:
            one = jax.checkpoint(lambda part: nnx.merge(graph, params)._whole(part))
            return in_chunks(one, x, chunk)

        across = front.spread.get()
        if across is None or x.ndim != 3:
            return by_chunks(params, x)
        return _within_shards(across, by_chunks, params, x)

    def _whole(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        hidden = jax.nn.gelu(self.expand(x))
        if self.gate is not None:
            hidden = hidden * self.gate(x)
        return self.contract(hidden)


def in_chunks(
    function: Callable[[Array], Array], x: Float[Array, "*B T F"], chunk: int
) -> Float[Array, "*B T F"]:
    """`function`, which treats every position alike, of so many positions at a time."""
    length = x.shape[-2]
    if length <= chunk:
        return function(x)
    whole = length - length % chunk
    parts = x[..., :whole, :].reshape(*x.shape[:-2], -1, chunk, x.shape[-1])
    done = jax.lax.map(function, jnp.moveaxis(parts, -3, 0))
    done = jnp.moveaxis(done, 0, -3).reshape(*x.shape[:-2], whole, -1)
    if whole == length:
        return done
    return jnp.concatenate([done, function(x[..., whole:, :])], axis=-2)


def _within_shards(
    across: Any, function: Callable[[Any, Array], Array], params: Any, x: Float[Array, "B T F"]
) -> Float[Array, "B T F"]:
    """`function` of the positions that each device of the mesh has, so that none moves."""
    spec = across.spec("B T F")
    length, shards = x.shape[1], math.prod(across.mesh.shape[name] for name in across.sequence)
    x = jnp.pad(x, [(0, 0), (0, -length % shards), (0, 0)])
    whole = jax.tree.map(lambda _: PartitionSpec(), params)
    return on_devices(function, across.mesh, (whole, spec), spec)(params, x)[:, :length]


class Block(nnx.Module):
    """One pre-norm transformer block around one mechanism."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        mechanism: attnlab.Mechanism,
        *,
        num_kv_heads: int | None,
        head_width: int,
        hidden: int,
        gated: bool,
        dropout_rate: float,
        output_scale: float,
        implementation: str,
        dtype: Any,
        rngs: nnx.Rngs,
        conv_width: int | None = None,
        feed_forward_chunk: int | None = None,
    ):
        self.attention_norm = RMSNorm(features)
        self.attention = attnlab.MultiHeadAttention(
            features,
            num_heads,
            mechanism=mechanism,
            num_kv_heads=num_kv_heads,
            head_width=head_width,
            conv_width=conv_width,
            dropout_rate=dropout_rate,
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )
        self.attention.out.kernel[...] *= output_scale
        self.mlp_norm = RMSNorm(features)
        self.mlp = FeedForward(
            features,
            hidden,
            gated=gated,
            chunk=feed_forward_chunk,
            output_scale=output_scale,
            dtype=dtype,
            rngs=rngs,
        )
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x: Float[Array, "*B T F"],
        *,
        mask: Mask,
        cache: attnlab.KVCache | attnlab.StateCache | None = None,
        dropout_key: Key[Array, ""] | None = None,
        source: Float[Array, "..."] | None = None,
    ) -> tuple[Float[Array, "*B T F"], attnlab.KVCache | attnlab.StateCache | None]:
        """The block's output, and the cache with these tokens in it, if one was given.

        With a `source`, "*B T F" or "T F", queries and keys are made of that.
        """
        weights_key, attention_key, mlp_key = (
            (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        )
        known: dict[str, Any] = {"mask": mask, "cache": cache, "dropout_key": weights_key}
        if source is None:
            attended = self.attention(self.attention_norm(x), **known)
        else:
            made_of = self.attention_norm(source)
            attended = attend_by(self.attention, self.attention_norm(x), made_of, **known)
        if cache is not None:
            attended, cache = attended
        x = x + dropout(attended, self.dropout_rate, attention_key)
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout_rate, mlp_key), cache
