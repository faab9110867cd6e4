r"""Feed-forward attention: a shallow network reads all tokens at once, and no token asks another.

    o = W2 norm(leaky(W1 norm(z) + b1)) + b2,     z = [v_1; ...; v_L],  0 where there is no token

Bozic, Dordevic, Coppola, Thommes & Singh 2023, arXiv:2311.10642: networks that learned from the
attention of a trained transformer take its place.  z is L tokens laid end to end, padding and what
is masked zero; norms are over all of z and of the hidden units, with gains and biases; leaky is
slope 0.01 below zero, all as in the authors' code.  A place in z is a place in the sequence, so the
network knows positions, takes at most L tokens, and has a number of weights that is quadratic in L.

The authors' ALSR is a network to a head on the layer's input, before the last projection:
`FeedForwardAttention`, which asks `MultiHeadAttention` for no projection of its input.  Their ALR
takes the last projection's place as well: `FeedForwardLayer`.  A causal one reads tokens up to i
for each i, by the same network, whose output is one token: O(T) runs of it.  A network behind a
residual or in place of a whole encoder layer is one more `FeedForwardLayer`, told another teacher.
`attnlab.training.distill` has it learn from one.  Left out: cross-attention by two sources.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnlab.core.attention import check_inputs
from attnlab.core.entry import Entry, Paper
from attnlab.core.gates import narrowed, widened
from attnlab.core.inputs import IMPLEMENTATIONS
from attnlab.core.linear_attention import real_inputs
from attnlab.core.mask_layout import Layout, layout
from attnlab.core.masks import Full, as_mask
from attnlab.core.modules import Mechanism
from attnlab.core.networks import Net, Network
from attnlab.core.refusals import refuse, refuse_dropout


def feedforward_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    net: Net,
    causal: bool = False,
    mask: Any = None,
    query_offset: Any = 0,
    key_offset: Any = 0,
    **options: Any,
) -> Float[Array, "*B T N D"]:
    """The network's output for each token: "*B T N D"; 0 where a query or all keys are masked.

    Queries and keys are not read, but say how many heads and tokens there are.

    Args:
      causal: run the network for each query, on the tokens up to it; it writes one token.
      mask: padding of keys and queries; beside it, for a causal one, causality, which it has.
      query_offset: position of the first query, where `causal`.

    Raises:
      ValueError: more tokens than the network reads; lengths that differ where not `causal`; a
        mask that says more, or options of attention that have no meaning here.
      NotImplementedError: dropout of weights, or an implementation of attention.
    """
    _refuse(options)
    query, key, value = check_inputs(query, key, value)
    known = _known(query, key, mask, causal, (query_offset, key_offset))
    told = {"mask": mask, "query_offset": query_offset, "key_offset": key_offset}
    (value,) = widened(real_inputs(query, key, value, told)[2])
    heads, width, length = query.shape[-2], value.shape[-1], _length(net, value)
    written = net.contract.shape[0] * net.contract.shape[-1]
    expected = heads * width * (1 if causal else length)
    if written != expected:
        raise ValueError(
            f"net: expected {expected} outputs for {heads} heads of width {width}"
            f"{'' if causal else f' and {length} tokens'}, got {written}."
        )
    run = _each if causal else _whole
    out = run(net, value, query.shape[-3], length, (query_offset, key_offset))
    out = out.reshape(*out.shape[:-2], heads, width)
    return narrowed(jnp.where(_seen(known, out), out, 0), query.dtype)


def _whole(net: Net, value: Array, queries: int, length: int, offsets: Any) -> Array:
    """One run of the network: what it writes for each of the first tokens, "*B T J E"."""
    if queries != value.shape[-3]:
        raise ValueError(
            f"query: the network reads and writes the same tokens; got {queries} queries and "
            f"{value.shape[-3]} keys."
        )
    if any(isinstance(x, int) and x for x in offsets):
        raise ValueError(f"query_offset: a whole sequence begins at 0, got {offsets}.")
    out = net(_end_to_end(value, length))
    out = out.reshape(*out.shape[:-1], length, -1)
    return jnp.moveaxis(out, -2, -3)[..., :queries, :, :]


def _each(net: Net, value: Array, queries: int, length: int, offsets: Any) -> Array:
    """A run of the network for each query, on the tokens up to it, "*B T J E"."""
    place = jnp.arange(value.shape[-3]) + offsets[1]
    row = jnp.arange(queries) + offsets[0]
    before = (place[None, :] <= row[:, None])[..., None, None]
    before = jnp.expand_dims(before, range(value.ndim - 3))
    return net(_end_to_end(jnp.where(before, value[..., None, :, :, :], 0), length))


def _end_to_end(value: Float[Array, "*B S K D"], length: int) -> Float[Array, "*B C"]:
    pads = [(0, 0)] * (value.ndim - 3) + [(0, length - value.shape[-3]), (0, 0), (0, 0)]
    whole = jnp.pad(value, pads)
    return whole.reshape(*whole.shape[:-3], -1)


def _length(net: Net, value: Array) -> int:
    """How many tokens the network reads."""
    token = value.shape[-2] * value.shape[-1]
    length, rest = divmod(net.expand.shape[-2], token)
    if rest:
        raise ValueError(
            f"value: the network reads {net.expand.shape[-2]} channels, which tokens of {token} "
            "do not fill."
        )
    if value.shape[-3] > length:
        raise ValueError(
            f"value: {value.shape[-3]} tokens are more than the {length} that the network reads."
        )
    return length


def _known(query: Array, key: Array, mask: Any, causal: bool, offsets: Any) -> Layout:
    lengths = query.shape[-3], key.shape[-3]
    known = layout(Full() if mask is None else as_mask(mask), lengths, offsets)
    if known is None or known.ids is not None:
        # A mask of another shape is refused as such, by what zeroes hidden tokens.
        real_inputs(query, key, key, {"mask": mask})
        raise ValueError(
            "mask: expected padding (KeyPadding, QueryPadding), as a network reads all tokens at "
            f"once; got {type(as_mask(mask)).__name__}."
        )
    if known.causal and not causal:
        raise ValueError(
            "mask: a causal one hides tokens from a network that reads all at once; one that is "
            "made with causal=True reads those up to each."
        )
    return known


def _seen(known: Layout, out: Array) -> Bool[Array, "..."]:
    """Whether a query is real, and any key, for "*B T N D"."""
    seen = jnp.ones(out.shape[:-2], bool)
    if known.queries is not None:
        seen = seen & jnp.broadcast_to(known.queries, seen.shape)
    if known.keys is not None:
        some = jnp.any(known.keys, axis=-1, keepdims=True)
        seen = seen & jnp.broadcast_to(some, seen.shape)
    return seen[..., None, None]


def _refuse(options: dict[str, Any]) -> None:
    """Options of attention that have no meaning for a network."""
    words = "a network has no attention weights to drop; attnlab.attention has"
    options = refuse_dropout(options, words)
    asked = options.pop("implementation", "auto")
    if asked not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f'implementation: expected "auto" or "reference", the network itself, got {asked!r}.'
        )
    if asked not in ("auto", "reference"):
        raise NotImplementedError(
            f'implementation: "{asked}" attends, and here is a network; "reference" runs it.'
        )
    refuse(options, "a network has no scores or weights", *options)


def _check_sizes(**sizes: int) -> None:
    if min(sizes.values()) < 1:
        raise ValueError(f"{min(sizes, key=lambda n: sizes[n])}: expected positive, got {sizes}.")


class FeedForwardAttention(Mechanism):
    """A network in place of each head, or one for all; reads the layer's input.

    Args:
      num_heads, width: N and D.
      length: L, the most tokens.
      hidden: hidden units of each network.
      num_kv_heads: K, heads that are read; N by default.
      per_head: a network to each head, as in the paper's ALSR; else one that writes all heads.
      causal: one run for each token, on those up to it.

    Raises:
      ValueError: sizes that are not positive.
    """

    projected: tuple[str, ...] = ()

    def __init__(
        self, num_heads: int, width: int, length: int, *, hidden: int,
        num_kv_heads: int | None = None, per_head: bool = True, causal: bool = False,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        _check_sizes(num_heads=num_heads, width=width, length=length, hidden=hidden)
        self.causal, count = causal, num_heads if per_head else 1
        read = length * width * (num_heads if num_kv_heads is None else num_kv_heads)
        written = (1 if causal else length) * width * num_heads // count
        self.network = Network(count, read, hidden, written, rngs)

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> None:
        """None where causal: a cache of at most L tokens will do."""
        if not self.causal:
            raise NotImplementedError(
                "A network of whole sequences cannot write one token at a time; one made with "
                "causal=True can, as attnlab.attention does."
            )

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Float[Array, "*B T N D"]:
        net = self.network.net()
        return feedforward_attention(query, key, value, net=net, causal=self.causal, **options)


class FeedForwardLayer(nnx.Module):
    """One network in place of a whole layer of attention, "*B T F" to "*B T F": the paper's ALR.

    Args:
      features, length, hidden: F, L and hidden units.
      causal: as for `FeedForwardAttention`.

    Raises:
      ValueError: sizes that are not positive.
    """

    def __init__(
        self, features: int, length: int, *, hidden: int, causal: bool = False, rngs: nnx.Rngs
    ) -> None:
        self.mechanism = FeedForwardAttention(
            1, features, length, hidden=hidden, causal=causal, rngs=rngs
        )

    def __call__(self, x: Float[Array, "*B T F"], *, mask: Any = None) -> Float[Array, "*B T F"]:
        """The output of each token; `mask` as for `feedforward_attention`."""
        one = x[..., None, :]
        return self.mechanism(one, one, one, mask=mask)[..., 0, :]


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> FeedForwardAttention:
    """Room for sixteen tokens, of half as many key heads."""
    return FeedForwardAttention(
        num_heads, head_width, 16, hidden=6, num_kv_heads=num_heads // 2, rngs=rngs
    )


ENTRY = Entry(
    id="feedforward-attention",
    title="Feed-forward attention",
    family="dense",
    paper=Paper(
        "Rethinking Attention: Exploring Shallow Feed-Forward Neural Networks as an Alternative "
        "to Attention Layers in Transformers",
        "Bozic, Dordevic, Coppola, Thommes & Singh",
        2023,
        "2311.10642",
    ),
    summary="A network of one hidden layer reads a whole sequence, laid end to end, in place of "
    "attention, and learns from the layer that it replaces.",
    formula=r"o = W_2\, \mathrm{norm}(\mathrm{leaky}(W_1\, \mathrm{norm}(z) + b_1)) + b_2, \qquad "
    r"z = [v_1; \dots; v_L]",
    patterns=("noncausal self",),
    time="O(L·H·E) for E hidden units, whatever T up to L",
    memory="O(L·H·E) weights",
    exact="Exact as a network; what it learns of attention is approximate.",
    properties=frozenset(),
    function=feedforward_attention,
    module=FeedForwardAttention,
    build=_build,
    implementations=("reference",),
    masks="keys",
    gradient="kinked",
)
