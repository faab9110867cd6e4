r"""A causal transformer language model whose attention is any causal entry of the atlas.

    x_0     = sqrt(F) E[token]  (+ what the mechanism adds at the input)
    x_{l+½} = x_l     + Attention(RMSNorm(x_l))
    x_{l+1} = x_{l+½} + MLP(RMSNorm(x_{l+½}))
    logits  = RMSNorm(x_L) U    (U = Eᵀ when tied)

Pre-norm blocks as in GPT-2 (Radford et al., 2019), RMSNorm of Zhang & Sennrich (2019,
arXiv:1910.07467), a GELU MLP or its gated form (Shazeer, 2020, arXiv:2002.05202).  The matrices
that write into the residual stream start smaller by 1/sqrt(2 L), so that its variance does not
grow with depth.

Axes: *B batch, T tokens, F features, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Int, Key

import attnlab
from attnlab import atlas
from attnlab.core.masks import ArrayMask, Causal, Mask
from attnlab.core.modules import RMSNorm
from attnlab.models.layers import Block, dropout

MechanismSource = str | Callable[[nnx.Rngs], attnlab.Mechanism]
Cache = tuple[attnlab.KVCache | attnlab.StateCache, ...]
CAUSAL_SELF = "causal self"


def causal_ids() -> list[str]:
    """The ids of the atlas entries that a causal language model can use, sorted."""
    return sorted(
        id
        for id, entry in atlas.entries().items()
        if CAUSAL_SELF in entry.patterns and entry.kind == "mechanism"
    )


def build_mechanism(
    source: MechanismSource, num_heads: int, head_width: int, *, rngs: nnx.Rngs
) -> attnlab.Mechanism:
    """A mechanism from an atlas id, or from a function of `nnx.Rngs` that makes one.

    Raises ValueError for an unknown id, and for an entry that does not support causal
    self-attention; TypeError where the function returns something that is not a Mechanism.
    """
    if isinstance(source, str):
        mechanism = atlas.get(source).build(num_heads, head_width, rngs=rngs)
    else:
        mechanism = source(rngs)
    if not isinstance(mechanism, attnlab.Mechanism):
        raise TypeError(
            "mechanism: expected an atlas id or a function of nnx.Rngs that returns an"
            f" attnlab.Mechanism, got {type(mechanism).__name__}."
        )
    for entry in atlas.entries().values():
        named = entry.id == source or type(mechanism) is entry.module
        if named and CAUSAL_SELF not in entry.patterns:
            raise ValueError(
                f"mechanism: {entry.id!r} supports {', '.join(entry.patterns)}, and a language"
                f" model needs {CAUSAL_SELF!r}; choose one of {', '.join(causal_ids())}."
            )
    return mechanism


class CausalLM(nnx.Module):
    """A causal transformer language model; `mechanism` decides how its tokens attend.

    `mechanism` is the id of an atlas entry that supports causal self-attention
    (`attnlab.models.language_model.causal_ids()` lists them), or a function of `nnx.Rngs` that
    makes one; it is called once per layer, so that layers learn their own priors.  The MLP is
    `mlp_ratio` times as wide as the model and gated on request.  `conv_width` is that of the short
    convolution before each mechanism, by default the mechanism's own.  With `tie_embeddings` the
    matrix that reads tokens also writes logits.  With `feed_forward_chunk` the MLP holds the hidden
    layer of so many positions at a time and computes it again in the backward pass.

    Raises ValueError for sizes that are not positive, `features` that `num_heads` does not
    divide, a dropout rate outside [0, 1), an unknown id, or a mechanism that is not causal.
    """

    def __init__(
        self,
        vocab_size: int,
        num_layers: int = 4,
        features: int = 128,
        num_heads: int = 4,
        *,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        gated: bool = False,
        mechanism: MechanismSource = "multi-head-attention",
        dropout_rate: float = 0.0,
        tie_embeddings: bool = False,
        conv_width: int | None = None,
        feed_forward_chunk: int | None = None,
        implementation: str = "auto",
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        _check_sizes(vocab_size, num_layers, features, num_heads, num_kv_heads, dropout_rate)
        if feed_forward_chunk is not None and feed_forward_chunk < 1:
            raise ValueError(f"feed_forward_chunk: expected at least 1, got {feed_forward_chunk}.")
        head_width = features // num_heads
        self.vocab_size = vocab_size
        self.features = features
        self.dropout_rate = dropout_rate
        self.embedding = nnx.Embed(
            vocab_size,
            features,
            embedding_init=nnx.initializers.normal(features**-0.5),
            dtype=dtype,
            rngs=rngs,
        )
        self.blocks = nnx.List(
            Block(
                features,
                num_heads,
                build_mechanism(mechanism, num_heads, head_width, rngs=rngs),
                num_kv_heads=num_kv_heads,
                head_width=head_width,
                hidden=int(mlp_ratio * features),
                gated=gated,
                dropout_rate=dropout_rate,
                output_scale=(2 * num_layers) ** -0.5,
                conv_width=conv_width,
                feed_forward_chunk=feed_forward_chunk,
                implementation=implementation,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(features)
        self.readout = (
            None
            if tie_embeddings
            else nnx.Linear(
                features,
                vocab_size,
                use_bias=False,
                kernel_init=nnx.initializers.normal(0.1 * features**-0.5),
                dtype=dtype,
                rngs=rngs,
            )
        )

    def init_cache(self, batch_shape: Sequence[int], capacity: int) -> Cache:
        """Empty caches, one per layer, with room for `capacity` tokens where they hold tokens."""
        dtype = self.embedding.dtype or self.embedding.param_dtype
        return tuple(
            block.attention.create_cache(tuple(batch_shape), capacity, dtype)
            for block in self.blocks
        )

    def __call__(
        self,
        tokens: Int[Array, "*B T"],
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        cache: Cache | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Any:
        """The logits "*B T V" of the next token after each token.

        `mask` narrows the causal mask further (documents packed into one row: `Segments`).
        With `cache` (from `init_cache`) the tokens are taken to follow those already cached, and
        the result is `(logits, cache)`.  Dropout is applied only where `dropout_key` is given.
        """
        if cache is not None and len(cache) != len(self.blocks):
            raise ValueError(f"cache: expected {len(self.blocks)} layers, got {len(cache)}.")
        if isinstance(mask, jax.Array):
            mask = ArrayMask(mask)
        mask = Causal() if mask is None else Causal() & mask
        layers = len(self.blocks)
        keys: list[Any] = [None] * (layers + 1)
        if dropout_key is not None and self.dropout_rate > 0.0:
            keys = list(jax.random.split(dropout_key, layers + 1))
        offset = 0 if cache is None else cache[0].length
        x = self.embedding(tokens) * math.sqrt(self.features)
        x = self.blocks[0].attention.mechanism.embed(x, offset=offset)
        x = dropout(x, self.dropout_rate, keys[layers])
        caches: list[Any] = []
        for layer, block in enumerate(self.blocks):
            past = None if cache is None else cache[layer]
            x, past = block(x, mask=mask, cache=past, dropout_key=keys[layer])
            caches.append(past)
        x = self.norm(x)
        logits = self.embedding.attend(x) if self.readout is None else self.readout(x)
        return logits if cache is None else (logits, tuple(caches))


def _check_sizes(vocab_size, num_layers, features, num_heads, num_kv_heads, dropout_rate):
    sizes = {
        "vocab_size": vocab_size,
        "num_layers": num_layers,
        "features": features,
        "num_heads": num_heads,
        "num_kv_heads": 1 if num_kv_heads is None else num_kv_heads,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}.")
    if features % num_heads:
        raise ValueError(f"features: {features} is not a multiple of {num_heads=}.")
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: {num_kv_heads} does not divide {num_heads=}.")
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"dropout_rate: expected a number in [0, 1), got {dropout_rate}.")
