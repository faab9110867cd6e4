"""Sampling from a language model, one token at a time, with a key/value cache.

The prompt goes through the model once (prefill) and fills the cache; a `lax.scan` then feeds each
sampled token back.  One compiled program per (prompt length, length, top_k).

Axes: *B batch, T prompt tokens, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from attnlab.models.language_model import CausalLM


def generate(
    model: CausalLM,
    prompt: Int[Array, "*B T"],
    length: int,
    *,
    key: Key[Array, ""] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Int[Array, "*B L"]:
    """The prompt followed by `length` sampled tokens: L = T + length.

    Tokens are drawn from softmax(logits / temperature), restricted to the `top_k` likeliest when
    that is given; `temperature=0` takes the likeliest token and needs no key.  The same key gives
    the same tokens.

    Raises ValueError for an empty prompt, a length below 1, a negative temperature, a top_k
    outside 1..vocabulary, or a missing key.
    """
    if prompt.shape[-1] == 0:
        raise ValueError("prompt: expected at least one token, got none.")
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}.")
    if temperature < 0:
        raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature}.")
    if top_k is not None and not 1 <= top_k <= model.vocab_size:
        raise ValueError(f"top_k: expected 1..{model.vocab_size}, got {top_k}.")
    if key is None:
        if temperature > 0:
            raise ValueError("key: sampling needs a jax.random.key; only temperature=0 does not.")
        key = jax.random.key(0)
    graph, state = nnx.split(model)
    return _generate(
        graph,
        state,
        prompt,
        key,
        jnp.float32(temperature),
        length=length,
        top_k=top_k,
        greedy=temperature == 0,
    )


def choose(
    logits: Float[Array, "*B V"],
    key: Key[Array, ""],
    temperature: Float[Array, ""],
    *,
    top_k: int | None = None,
    greedy: bool = False,
) -> Int[Array, "*B"]:
    """One token per row of logits."""
    if greedy:
        return jnp.argmax(logits, -1)
    if top_k is not None:
        smallest = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.random.categorical(key, logits.astype(jnp.float32) / temperature)


@partial(jax.jit, static_argnames=("graph", "length", "top_k", "greedy"))
def _generate(
    graph: nnx.GraphDef,
    state: Any,
    prompt: Int[Array, "*B T"],
    key: Key[Array, ""],
    temperature: Float[Array, ""],
    *,
    length: int,
    top_k: int | None,
    greedy: bool,
) -> Int[Array, "*B L"]:
    model = nnx.merge(graph, state)
    *batch, tokens = prompt.shape
    pick = partial(choose, temperature=temperature, top_k=top_k, greedy=greedy)
    keys = jax.random.split(key, length)
    logits, cache = model(prompt, cache=model.init_cache(batch, tokens + length))
    first = pick(logits[..., -1, :], keys[0]).astype(prompt.dtype)

    def step(carry, key):
        token, cache = carry
        logits, cache = nnx.merge(graph, state)(token[..., None], cache=cache)
        token = pick(logits[..., -1, :], key).astype(prompt.dtype)
        return (token, cache), token

    _, rest = jax.lax.scan(step, (first, cache), keys[1:])
    return jnp.concatenate([prompt, first[..., None], jnp.moveaxis(rest, 0, -1)], axis=-1)
