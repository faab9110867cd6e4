r"""Neural attention: a small network scores each pair, in place of the dot product.

    s_ij = w . relu(W_2 relu(W_1 [P_q q_i + p_q ; P_k k_j + p_k] + b_1) + b_2),   softmax over j

DiGiugno & Mahmood 2025, arXiv:2502.17206.  A dot product of width H has rank H at any length; this
has no such bound.  As in the authors' code the projections are H / 32 wide (2 at least, for all
heads alike), the hidden layers as wide as the projections and half of that, weights start uniform
in +-1 / sqrt(fan-in), and nothing divides by sqrt(H); there only the first layer of a model has it.
A bias of the score cancels in the softmax and is not kept.  One hidden layer, as in the paper's
text, is `hidden=(width,)`; with a single last unit, which the default has for narrow heads, it may
die, and attention is then uniform.

W_1 [q'; k'] is a part of the query plus a part of the key, so no pair's vector is ever formed, and
the network runs within the tiles of any implementation: O(T + S) memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import ATTENTION, PATTERNS, Entry, Paper
from attnlab.core.gates import widened
from attnlab.core.linear_attention import repeat_heads
from attnlab.core.modules import Mechanism
from attnlab.core.reference import zero_bad
from attnlab.core.refusals import refuse
from attnlab.core.scores import PairNetwork, after
from attnlab.core.tokens import blank


class Affine(NamedTuple):
    """x W + b: `weight` "P Q", `bias` "Q"."""

    weight: Float[Array, "P Q"]
    bias: Float[Array, " Q"]

    def __call__(self, x: Float[Array, "*B P"]) -> Float[Array, "*B Q"]:
        bias = jnp.expand_dims(self.bias.astype(x.dtype), range(x.ndim - 1))
        return x @ self.weight.astype(x.dtype) + bias


class ScoreNetwork(NamedTuple):
    """The network: projections "H P", hidden layers of which the first takes "2P", and `last`."""

    query: Affine
    key: Affine
    hidden: tuple[Affine, ...]
    last: Float[Array, " Q"]


def neural_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    network: ScoreNetwork,
    **options: Any,
) -> Any:
    """Softmax attention over a network's scores: "*B T N D".

    Args:
      network: its weights, the same for all heads.
      options: as for `attnlab.attention`, but for `scale`.

    Raises:
      ValueError: widths that do not fit, or a scale.
    """
    query, key, value = check_inputs(query, key, value)
    options = refuse(options, "a network's scores have none", "scale")
    _check_widths(network, query.shape[-1])
    q, k = widened(*(zero_bad(x) for x in (query, key)))
    first, *deep = network.hidden
    half = network.query.weight.shape[-1]
    rows = Affine(first.weight[:half], first.bias)(network.query(q))
    cols = network.key(k) @ first.weight[half:].astype(k.dtype)
    cols = jnp.swapaxes(repeat_heads(cols, query.shape[-2]), -3, -2)
    scores = PairNetwork.of(jnp.swapaxes(rows, -3, -2), cols, deep, network.last)
    return attention(blank(query), blank(key), value, scale=1.0, **after(scores, options))


def _check_widths(network: ScoreNetwork, width: int) -> None:
    half = network.query.weight.shape[-1]
    widths = [2 * half, *(layer.weight.shape[-1] for layer in network.hidden)]
    expected = {
        "query": (width, half),
        "key": (width, half),
        **{f"hidden[{n}]": widths[n : n + 2] for n in range(len(network.hidden))},
    }
    given = {"query": network.query, "key": network.key}
    given |= {f"hidden[{n}]": layer for n, layer in enumerate(network.hidden)}
    for name, shape in expected.items():
        if given[name].weight.shape != tuple(shape):
            raise ValueError(
                f"network: expected {name} of shape {tuple(shape)}, got {given[name].weight.shape}."
            )
    if not network.hidden or network.last.shape != (widths[-1],):
        raise ValueError(f"network: expected last of shape ({widths[-1]},) behind a hidden layer.")


class Layer(nnx.Module):
    """Holds an affine map, uniform in +-1 / sqrt(fan-in) at the start."""

    def __init__(self, width_in: int, width_out: int, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(_uniform(rngs, (width_in, width_out), width_in))
        self.bias = nnx.Param(_uniform(rngs, (width_out,), width_in))

    def affine(self) -> Affine:
        """Its weights, as functions take them."""
        return Affine(self.weight[...], self.bias[...])


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> Array:
    return jax.random.uniform(rngs.params(), shape, minval=-1, maxval=1) / fan_in**0.5


class NeuralAttention(Mechanism):
    """Holds the network, shared by all heads.

    Args:
      head_width: H.
      width: P of the projections; H / 32, or 2, by default.
      hidden: widths of the hidden layers; P and P / 2 by default.

    Raises:
      ValueError: a width that is not positive, or no hidden layer.
    """

    def __init__(
        self,
        head_width: int,
        *,
        width: int | None = None,
        hidden: tuple[int, ...] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        width = max(2, head_width // 32) if width is None else width
        hidden = (width, max(1, width // 2)) if hidden is None else hidden
        if not hidden or min(width, *hidden) < 1:
            raise ValueError(f"hidden: expected positive widths, got {width=}, {hidden=}.")
        self.query = Layer(head_width, width, rngs=rngs)
        self.key = Layer(head_width, width, rngs=rngs)
        pairs = zip((2 * width, *hidden), hidden, strict=False)
        self.hidden = nnx.data([Layer(a, b, rngs=rngs) for a, b in pairs])
        self.last = nnx.Param(_uniform(rngs, hidden[-1:], hidden[-1]))

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        hidden = tuple(layer.affine() for layer in self.hidden)
        network = ScoreNetwork(self.query.affine(), self.key.affine(), hidden, self.last[...])
        return neural_attention(query, key, value, network=network, **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> NeuralAttention:
    return NeuralAttention(head_width, rngs=rngs)


ENTRY = Entry(
    id="neural-attention",
    title="Neural attention",
    family="dense",
    paper=Paper(
        "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models",
        "DiGiugno & Mahmood",
        2025,
        "2502.17206",
    ),
    summary="A small network of query and key scores each pair in place of their product, so that "
    "the matrix of scores may have any rank; nothing of a pair's size is kept.",
    formula=r"s_{ij} = w^\top \mathrm{relu}(W_2\, \mathrm{relu}(W_1 [P_q q_i ; P_k k_j] + b_1) "
    r"+ b_2)",
    patterns=PATTERNS,
    time="O(T·S·P²)",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset(
        {"position-free", "translation-invariant", "decode", "gqa", "lse", "rows-sum-to-one",
         "linear-memory"}
    ),
    function=neural_attention,
    module=NeuralAttention,
    build=_build,
    implementations=ATTENTION,
    gradient="kinked",
)  # fmt: skip
