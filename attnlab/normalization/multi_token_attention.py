r"""Multi-token attention: a weight depends on several queries and keys at once, by convolutions.

    s'_ij  = sum_ab th[C-1-a, b] s_{i-a, j+b-c},     s''_h = sum_g W_hg s'_g,     A = softmax(s'')
    A'_ij  = sum_ab ph[C-1-a, b] A_{i-a, j+b-c},     A''_h = sum_{g in its group} A'_g W'_gh
    o = rmsnorm_D(A'' v) (1 - lambda),               y = o sigmoid(o G + g)

with a = 0 ... C - 1 queries back and keys from c = (C' - 1) / 2 before to as many after, C' odd; a
kernel to a head.  Golovneva, Wang, Weston & Sukhbaatar 2025, arXiv:2504.00927, and its released
code.  Scores of pairs that may not meet are zero before the first convolution and -inf after it;
weights likewise zero before and after the second.  Norm and gate are shared by all heads; the
released gate is one number to a head and token.  The paper has 6 queries and 11 keys, mixes all
heads, and convolves in every fourth layer.  1 - lambda, lambda = 0.8 - 0.6 e^(-0.3 depth), is its
first version's.

Zeroing is not enough between packed documents: the last query of one is a neighbour of the first
of the next.  A term counts only if query i - a is of the document of i; a mask that picks pairs
would leak in the same way, and is refused.  Decoding keeps the last queries beside the cache, as
many as both kernels look back, and makes their rows anew.  All scores are held: O(T S) memory.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.gates import control, narrowed, widened
from attnlab.core.inputs import DEFAULTS, prepare
from attnlab.core.linear_attention import real_inputs
from attnlab.core.mask_layout import layout
from attnlab.core.modules import Mechanism, RMSNorm
from attnlab.core.neighbours import convolved
from attnlab.core.partial import block_weights
from attnlab.core.past import Past
from attnlab.core.reference import Call, grouped_matmul, heads_first
from attnlab.core.refusals import refuse
from attnlab.core.scores import as_modifiers


def multi_token_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    pre_kernel: Float[Array, "N C E"] | None = None,
    pre_mix: Float[Array, "N N"] | None = None,
    post_kernel: Float[Array, "N P Q"] | None = None,
    post_mix: Float[Array, "G M M"] | None = None,
    previous: Float[Array, "*B W N H"] | None = None,
    **options: Any,
) -> Float[Array, "*B T N D"]:
    """Attention with convolved and mixed scores and weights: "*B T N D".

    Args:
      previous: the queries before the first; absent by default, and where positions are negative.
      pre_kernel, post_kernel: th and ph, one to a head; None for no convolution.
      pre_mix: W of the scores, target by source; None for none.
      post_mix: W' of the weights for each group of heads, source by target; None for none.
      options: as for `attnlab.attention`, but for `modifiers`, `normalizer` and `return_lse`.

    Raises:
      ValueError: kernels of an even width, or of other heads; a mask that says more than causality,
        padding and documents.
      NotImplementedError: an implementation other than "reference".
    """
    options = refuse(options, "multi-token attention has its own", "normalizer", "return_lse")
    if as_modifiers(options.get("modifiers")):
        raise ValueError("modifiers: scores that are convolved take none.")
    dtype, wide = query.dtype, widened(*real_inputs(query, key, value, options))
    call, more = _checked(wide, previous, dict(options))
    heads = call.query.shape[-3]
    for name, kernel in (("pre_kernel", pre_kernel), ("post_kernel", post_kernel)):
        _check_kernel(name, kernel, heads)
    _check_mixes(pre_mix, post_mix, heads)
    tile = call.tile(0, 0, *call.lengths)
    allowed = call.allowed(tile) & (tile.at().query >= 0)
    known = layout(call.mask, call.lengths, (call.query_offset, call.key_offset))
    ids = None if known is None else known.ids
    scores = grouped_matmul(call.query, jnp.swapaxes(call.key, -1, -2), call.accumulator)
    scores = convolved(jnp.where(allowed, scores * call.scale, 0), pre_kernel, ids)
    if pre_mix is not None:
        scores = jnp.einsum("hg,...gts->...hts", pre_mix.astype(scores.dtype), scores)
    weights, _, total = block_weights(jnp.where(allowed, scores, -jnp.inf))
    weights = weights / jnp.where(total > 0, total, 1)[..., None]
    weights = convolved(weights, post_kernel, ids)
    weights = _mixed(jnp.where(allowed, weights, 0), post_mix)
    if call.dropout_rate:
        weights = jnp.where(call.kept(tile), weights / (1 - call.dropout_rate), 0)
    out = grouped_matmul(weights, call.value, call.accumulator)
    return narrowed(heads_first(out[..., more:, :]), dtype)


def _checked(arrays: list[Array], previous: Any, options: dict[str, Any]) -> tuple[Call, int]:
    """The call, every argument checked, and how many queries go before the first."""
    asked = options.get("implementation", "auto")
    query, key, value = arrays
    if previous is not None:
        shape = (*query.shape[:-3], previous.shape[-3], *query.shape[-2:])
        previous = control("previous", previous, shape, query.dtype)
        query = jnp.concatenate([previous, query], axis=-3)
        options["query_offset"] = options.get("query_offset", 0) - previous.shape[-3]
    call, _ = prepare(
        query, key, value, *(options.pop(name, default) for name, default in DEFAULTS)
    )
    if options:
        raise TypeError(f"multi_token_attention: unexpected options {sorted(options)}.")
    if call.modifiers:
        raise ValueError("scale: expected a number, got an array.")
    if asked not in ("auto", "reference"):
        raise NotImplementedError(
            f'implementation: a convolution needs its neighbours, which "{asked}" has not at hand; '
            'implementation="reference" has.'
        )
    if layout(call.mask, call.lengths, (call.query_offset, call.key_offset)) is None:
        raise ValueError(
            "mask: expected causality, padding and documents (Causal, KeyPadding, QueryPadding, "
            f"Segments); {type(call.mask).__name__} may hide a key from a query, but convolutions "
            "would bring it from the query's neighbour."
        )
    return call, query.shape[-3] - arrays[0].shape[-3]


def _check_kernel(name: str, kernel: Any, heads: int) -> None:
    if kernel is None:
        return
    if kernel.ndim != 3 or kernel.shape[0] != heads or not kernel.shape[-1] % 2:
        raise ValueError(
            f"{name}: expected axes (N, queries, keys) with N = {heads} and an odd number of keys, "
            f"got shape {kernel.shape}."
        )


def _check_mixes(pre: Any, post: Any, heads: int) -> None:
    if pre is not None and pre.shape != (heads, heads):
        raise ValueError(f"pre_mix: expected shape {(heads, heads)}, got {pre.shape}.")
    if post is not None and (
        post.ndim != 3 or post.shape[0] * post.shape[1] != heads or post.shape[1] != post.shape[2]
    ):
        raise ValueError(
            f"post_mix: expected (groups, members, members) for {heads} heads, got {post.shape}."
        )


def _mixed(weights: Float[Array, "*B N T S"], mix: Any) -> Float[Array, "*B N T S"]:
    if mix is None:
        return weights
    groups, members = mix.shape[:2]
    split = weights.reshape(*weights.shape[:-3], groups, members, *weights.shape[-2:])
    mixed = jnp.einsum("...kgts,kgh->...khts", split, mix.astype(weights.dtype))
    return mixed.reshape(weights.shape)


class MultiTokenAttention(Mechanism):
    """Holds kernels, mixes, the norm's gain and the gate; starts as softmax attention before those.

    Args:
      num_heads, value_width: N and D.
      pre, post: queries and keys of the two convolutions; None for none.
      mix: whether scores are mixed among all heads.
      group: heads in a group in which weights are mixed, N by default; 0 for none.
      norm: whether each head's output is normalized, with one gain "D" for all.
      gate: numbers of the gate, 1 or D; None for no gate.
      depth: the layer's number, which scales the norm; None for no scale.

    Raises:
      ValueError: an even number of keys, a group that does not divide N, or another gate.
    """

    def __init__(
        self, num_heads: int, value_width: int, *,
        pre: tuple[int, int] | None = (6, 11), post: tuple[int, int] | None = (6, 11),
        mix: bool = True, group: int | None = None, norm: bool = True, gate: int | None = 1,
        depth: int | None = None, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        group = num_heads if group is None else group
        if group and num_heads % group:
            raise ValueError(f"group: expected a divisor of {num_heads=}, got {group}.")
        if gate not in (None, 1, value_width):
            raise ValueError(f"gate: expected None, 1 or {value_width}, got {gate}.")
        self.pre_kernel = _param(_identity_kernel("pre", num_heads, pre))
        self.post_kernel = _param(_identity_kernel("post", num_heads, post))
        self.pre_mix = _param(jnp.eye(num_heads) if mix else None)
        eyes = jnp.tile(jnp.eye(group)[None], (num_heads // group, 1, 1)) if group else None
        self.post_mix = _param(eyes)
        self.norm = nnx.data(RMSNorm(value_width, epsilon=1e-5) if norm else None)
        self.keep_share = 1.0 if depth is None else 0.2 + 0.6 * math.exp(-0.3 * depth)
        drawn = None
        if gate is not None:
            draw = jax.random.truncated_normal(rngs.params(), -3, 3, (value_width, gate))
            drawn = draw * (num_heads * value_width) ** -0.5
        self.gate_weight = _param(drawn)
        self.gate_bias = _param(None if gate is None else jnp.zeros(gate))

    def finish(self, out: Float[Array, "*B T N D"], x: Float[Array, "*B T F"]) -> Array:
        (wide,) = widened(out)
        if self.norm is not None:
            wide = self.norm(wide) * self.keep_share
        if self.gate_weight is not None:
            gate = wide @ self.gate_weight[...].astype(wide.dtype)
            bias = self.gate_bias[...].astype(wide.dtype)
            gate = gate + jnp.expand_dims(bias, range(gate.ndim - 1))
            wide = wide * jax.nn.sigmoid(gate)
        return narrowed(wide, out.dtype)

    @property
    def back(self) -> int:
        """How many queries back an output looks: one kernel's rows are those of the other."""
        kernels = (self.pre_kernel, self.post_kernel)
        return sum(kernel.shape[1] - 1 for kernel in kernels if kernel is not None)

    def prepare(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        past: Past,
    ) -> tuple[Array, Array, Array]:
        """While decoding, queries with those before them as more channels."""
        if not self.back:
            return query, key, value
        before = past.previous(query, self.back)
        if past.begins:
            return query, key, value
        return jnp.concatenate([query, *before], axis=-1), key, value

    def __call__(
        self,
        query: Float[Array, "*B T N E"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Float[Array, "*B T N D"]:
        """Attend; to queries with others behind them, as `prepare` makes them while decoding."""
        width = key.shape[-1]
        if query.shape[-1] == (1 + self.back) * width and self.back:
            first = query[..., :1, :, width:].reshape(*query.shape[:-3], query.shape[-2], -1, width)
            options["previous"] = jnp.flip(jnp.swapaxes(first, -2, -3), -3)
            query = query[..., :width]
        names = ("pre_kernel", "pre_mix", "post_kernel", "post_mix")
        held = {name: getattr(self, name) for name in names}
        held = {name: x if x is None else x[...] for name, x in held.items()}
        return multi_token_attention(query, key, value, **held, **options)


def _param(x: Any) -> Any:
    return nnx.data(None if x is None else nnx.Param(x))


def _identity_kernel(name: str, num_heads: int, size: Any) -> Any:
    if size is None:
        return None
    if min(size) < 1 or not size[1] % 2:
        raise ValueError(f"{name}: expected positive numbers, of keys an odd one, got {size}.")
    return jnp.zeros((num_heads, *size)).at[:, -1, size[1] // 2].set(1.0)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> MultiTokenAttention:
    group = 2 if num_heads % 2 == 0 else num_heads
    return MultiTokenAttention(
        num_heads, head_width, pre=(3, 3), post=(2, 5), group=group, rngs=rngs
    )


ENTRY = Entry(
    id="multi-token-attention",
    title="Multi-token attention",
    family="normalization",
    paper=Paper(
        "Multi-Token Attention", "Golovneva, Wang, Weston & Sukhbaatar", 2025, "2504.00927"
    ),
    summary="Scores, and weights again, are convolved over neighbouring queries and keys and mixed "
    "among heads, so that a weight can depend on several tokens meeting.",
    formula=r"A = \operatorname{softmax}_j\!\left(\sum_{a,b} \theta_{ab}\, s_{i-a,\, j+b}\right), "
    r"\qquad A'_{ij} = \sum_{a,b} \phi_{ab}\, A_{i-a,\, j+b}",
    patterns=PATTERNS,
    time="O(T·S·(H + C·E))",
    memory="O(T·S)",
    exact="Exact; weights that were convolved do not sum to one.",
    properties=frozenset({"translation-invariant", "decode", "gqa"}),
    function=multi_token_attention,
    module=MultiTokenAttention,
    build=_build,
    implementations=("reference",),
    masks="documents",
)
