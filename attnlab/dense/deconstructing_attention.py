r"""Attention with one of its principles given up: mixing, the exponential, or the query.

    form "softmax":  A_ij = exp(s_ij) / sum_j exp(s_ij),     s_ij = q_i . k_j / sqrt(H)
    form "taylor":   A_ij = f(s_ij) / sum_j f(s_ij),         f(s) = 1 + s + s^2 / 2
    form "gate":     A_ij = exp(c_j) / sum_j exp(c_j),       c_j = silu(q_j) . k_j / sqrt(H)
    no mixing:       o_i = silu(q_i) * v_i

Xue, Moosavi & Aletras 2025, arXiv:2510.11602.  Softmax attention is asked which of its principles
a language model needs: that tokens mix, the form of the weights, that they depend on the query.
Each variant alone fails in every layer and does nearly as well in every second one.  The paper's
names: standard, approximate (taylor), non-approximate (gate) and MLP (no mixing), in `PRESETS`.

Its recurrence for the series divides each order by a sum of its own, which does not follow from its
definition and can divide by nothing; here it is one quotient, as defined.  f is least at s = -1,
where it is 1/2, so keep scores small.  A gate's c_j needs the query of its own token, which a cache
of keys does not have: that form reads whole sequences.  Without mixing the keys are not read, and
with W^O the layer is the paper's gated MLP, but F wide where that is 4/3 F.

Three more variants change the layer, not what it does with queries and keys: these are made of
something else than the hidden state (`SOURCES`), of embedded tokens, or of what the model makes of
noise or of a text that is always the same.  `attend_by` is such a layer, and
`attnlab.models.SourcedLM` the model that has the other stream beside its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.gates import narrowed, widened
from attnlab.core.linear_attention import repeat_heads
from attnlab.core.masks import SlidingWindow, as_mask
from attnlab.core.modules import Mechanism, MultiHeadAttention
from attnlab.core.normalizers import TaylorSoftmax
from attnlab.core.reference import zero_bad
from attnlab.core.refusals import refuse
from attnlab.core.scores import Bias, after
from attnlab.core.tokens import blank, marked

FORMS = ("softmax", "taylor", "gate")

PRESETS: dict[str, dict[str, Any]] = {
    "standard": {},
    "approximate": {"form": "taylor"},
    "non-approximate": {"form": "gate"},
    "mlp": {"mixing": False},
}

# What queries and keys are made of, by the paper's names.
SOURCES = {
    "standard": "hidden",
    "random-embedding": "random",
    "fixed-sequence": "text",
    "static-embedding": "static",
}


def deconstructed_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    mixing: bool = True,
    form: str = "softmax",
    **options: Any,
) -> Any:
    """Attention without one of its principles: "*B T N D".

    Args:
      mixing: whether tokens read each other.
      form: what a weight is made of, where they do.
      options: as for `attnlab.attention`, but for `normalizer`; without mixing also but for `scale`
        and `return_lse`.

    Raises:
      ValueError: an unknown form; lengths or offsets that differ with form "gate"; without mixing,
        a value as wide as no query.
    """
    query, key, value = check_inputs(query, key, value)
    _check(mixing, form)
    options = refuse(options, "the form of the weights is given by form", "normalizer")
    if not mixing:
        return _own_token(query, key, value, options)
    if form == "gate":
        return _gated(query, key, value, options)
    normalizer = TaylorSoftmax() if form == "taylor" else None
    return attention(query, key, value, normalizer=normalizer, **options)


def _check(mixing: bool, form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form: expected one of {FORMS}, got {form!r}.")
    if not mixing and form != "softmax":
        raise ValueError(f"form: without mixing there are no weights to form, got {form!r}.")


def _own_token(query: Array, key: Array, value: Array, options: dict[str, Any]) -> Array:
    """silu(q_i) v_i, 0 where a query may not see its own token: a window of one key."""
    options = refuse(options, "without mixing there are no scores", "scale", "return_lse")
    if query.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"value: expected the width of query, {query.shape[-1]}, as each channel of one gates "
            f"one of the other; got {value.shape[-1]}."
        )
    own, mask = SlidingWindow(0, 0), options.get("mask")
    options = options | {"mask": own if mask is None else as_mask(mask) & own}
    nothing = (jnp.zeros((*x.shape[:-1], 1), x.dtype) for x in (query, key))
    read = attention(*nothing, value, **options)
    q, v = widened(query, read)
    return narrowed(jax.nn.silu(q) * v, query.dtype)


def _gated(query: Array, key: Array, value: Array, options: dict[str, Any]) -> Any:
    """Weights exp(c_j), the same for all queries."""
    offsets = options.get("query_offset", 0), options.get("key_offset", 0)
    apart = all(isinstance(o, int) for o in offsets) and offsets[0] != offsets[1]
    if query.shape[-3] != key.shape[-3] or apart:
        raise ValueError(
            'query: with form "gate" a key is weighed by the query of its own token, so queries '
            f"and keys should be those of the same tokens; got {query.shape[-3]} queries and "
            f"{key.shape[-3]} keys."
        )
    scale = options.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k = widened(*(zero_bad(x) for x in (query, key)))
    gate = scale * jnp.sum(jax.nn.silu(q) * repeat_heads(k, query.shape[-2]), -1)
    bad = jnp.where(jnp.isfinite(blank(query)[..., 0]), gate, jnp.nan)  # of a query, at its key
    own = Bias(jnp.swapaxes(gate, -1, -2)[..., None, :])
    plain = options | {"scale": 1.0}
    blind = jnp.zeros((*query.shape[:-1], 1), query.dtype)
    return attention(blind, marked(blank(key), bad), value, **after(own, plain))


class Deconstructed(Mechanism):
    """Attention without one of its principles; no parameters, so that all variants have the same.

    Args:
      mixing, form: as for `deconstructed_attention`.
    """

    def __init__(self, *, mixing: bool = True, form: str = "softmax") -> None:
        _check(mixing, form)
        self.mixing, self.form = mixing, form

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> None:
        """None: decoding needs keys and values; a gate's form also the queries, and is refused."""
        if self.form == "gate":
            raise NotImplementedError(
                'form="gate" weighs a key by the query of its own token, which no cache of keys '
                "has; it reads whole sequences, as attnlab.attention does without a cache."
            )

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return deconstructed_attention(
            query, key, value, mixing=self.mixing, form=self.form, **options
        )


def attend_by(
    layer: MultiHeadAttention,
    x: Float[Array, "*B T F"],
    source: Float[Array, "..."],
    *,
    mask: Any = None,
    cache: Any = None,
    dropout_key: Any = None,
) -> Any:
    """`layer` with queries and keys of `source` and values of `x`: "*B T F", or that and the cache.

    Args:
      source: "*B T F", or "T F" for all sequences; with `x` itself it is the layer as it is.
      mask, cache, dropout_key: as for the layer.

    Raises:
      ValueError: a source of another shape; a layer that does more than project and attend.
    """
    own = type(layer.mechanism)
    hooks = ("controls", "prepare", "keep", "finish")
    more = [name for name in hooks if getattr(own, name) is not getattr(Mechanism, name)]
    if more or layer.convolutions is not None:
        raise ValueError(
            "layer: expected one that projects and attends, got a mechanism with "
            f"{', '.join(more) or 'short convolutions'}."
        )
    if source.shape not in (x.shape, x.shape[-2:]):
        raise ValueError(f"source: expected shape {x.shape} or {x.shape[-2:]}, got {source.shape}.")

    def heads(y: Array, count: int) -> Array:
        return y.reshape(*y.shape[:-1], count, y.shape[-1] // count)

    query = heads(layer.query(source), layer.num_heads)
    key = heads(layer.key(source), layer.num_kv_heads)
    if layer.query_norm is not None:
        query, key = layer.query_norm(query), layer.key_norm(key)
    query, key = (jnp.broadcast_to(y, (*x.shape[:-2], *y.shape[-3:])) for y in (query, key))
    value = heads(layer.value(x), layer.num_kv_heads)
    rate = layer.dropout_rate if dropout_key is not None else 0.0
    options = {
        "mask": mask, "implementation": layer.implementation, "dropout_rate": rate,
        "dropout_key": dropout_key if rate else None,
    }  # fmt: skip
    out, cache = layer._attend(query, key, value, cache, None, options)
    out = layer.out(out.reshape(*out.shape[:-2], -1))
    if layer.gain is not None:
        out = out * jnp.expand_dims(layer.gain[...].astype(out.dtype), range(out.ndim - 1))
    return out if cache is None else (out, cache)


def _build(num_heads: int, head_width: int, *, rngs: Any) -> Deconstructed:
    return Deconstructed(form="taylor")  # the one that shares nothing with other entries


ENTRY = Entry(
    id="deconstructing-attention",
    title="Deconstructed attention",
    family="dense",
    paper=Paper(
        "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
        "Xue, Moosavi & Aletras",
        2025,
        "2510.11602",
    ),
    summary="Softmax attention with its principles as switches: whether tokens mix, whether "
    "weights are exponentials, whether they depend on the query. The example's are a series.",
    formula=r"A_{ij} \propto 1 + s_{ij} + \tfrac12 s_{ij}^2, \qquad s_{ij} = "
    r"\frac{q_i^\top k_j}{\sqrt{H}}",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset(
        {"position-free", "translation-invariant", "decode", "gqa", "lse", "rows-sum-to-one",
         "linear-memory"}
    ),
    function=deconstructed_attention,
    module=Deconstructed,
    build=_build,
)  # fmt: skip
