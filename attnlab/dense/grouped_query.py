r"""From multi-head to grouped-query attention: key and value heads of a group become their mean.

    W^K_g = mean of the W^K_n of group g,     W^V_g likewise,     W^Q and W^O stay

Ainslie et al. 2023, arXiv:2305.13245, who then train on for a small share of the training ("up-
training"); K = 1 is Shazeer 2019, arXiv:1911.02150.  Groups are of consecutive heads.  Besides the
mean they tried the first head of a group, and heads anew ("first", "random").  Where the heads of
a group are equal nothing changes; otherwise the mean is of projections, not of what heads read.

A cache keeps K (H + D) numbers of each token, N / K times less.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.modules import PROJECTIONS, MultiHeadAttention

WAYS = ("mean", "first", "random")


def pool_heads(
    weight: Float[Array, "*F C"], num_heads: int, num_kv_heads: int, *, how: str = "mean"
) -> Float[Array, "*F E"]:
    """A projection to N heads side by side, C = N H, as one to K: E = K H.  Also for its bias.

    Args:
      how: "mean" of a group's heads, or its "first".

    Raises:
      ValueError: K that does not divide N, N that does not divide C, or another way.
    """
    _check_divides(num_heads, num_kv_heads)
    if weight.shape[-1] % num_heads:
        raise ValueError(f"weight: expected {num_heads=} of one width, got shape {weight.shape}.")
    if how not in WAYS[:2]:
        raise ValueError(f"how: expected one of {WAYS[:2]}, got {how!r}.")
    lead, width = weight.shape[:-1], weight.shape[-1] // num_heads
    groups = weight.reshape(*lead, num_kv_heads, num_heads // num_kv_heads, width)
    pooled = groups.mean(axis=-2) if how == "mean" else groups[..., 0, :]
    return pooled.reshape(*lead, num_kv_heads * width)


def _check_divides(num_heads: int, num_kv_heads: int) -> None:
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads: expected a positive divisor of the {num_heads} heads that there are, "
            f"got {num_kv_heads}."
        )


def to_grouped(
    layer: MultiHeadAttention, num_kv_heads: int, *, how: str = "mean",
    rngs: nnx.Rngs | None = None,
) -> MultiHeadAttention:  # fmt: skip
    """A copy of a layer with K key heads, to be trained on.

    Args:
      layer: with any multiple of K; it is left as it is.
      how: "mean", "first" or "random"; the last draws new projections by `rngs`.

    Raises:
      ValueError: K that does not divide the layer's, another way, "random" without `rngs`, or a
        layer that has no projection of keys or values, or a mechanism for another number of keys.
    """
    _check_divides(layer.num_kv_heads, num_kv_heads)
    if how not in WAYS:
        raise ValueError(f"how: expected one of {WAYS}, got {how!r}.")
    if (how == "random") != (rngs is not None):
        raise ValueError('rngs: go with how="random", and with nothing else.')
    if layer.mechanism.key_heads not in (None, num_kv_heads):
        raise ValueError(
            f"layer: {type(layer.mechanism).__name__} is made for {layer.mechanism.key_heads} key "
            f"heads, got {num_kv_heads=}."
        )
    if set(layer.mechanism.projected) != set(PROJECTIONS):
        raise ValueError(
            "layer: expected projections of query, key and value, got "
            f"{layer.mechanism.projected} of {type(layer.mechanism).__name__}."
        )
    new = nnx.clone(layer)
    for linear in (new.key, new.value):
        _pool(linear, layer.num_kv_heads, num_kv_heads, how, rngs)
    if new.convolutions is not None:
        way = "first" if how == "first" else "mean"
        for convolution in new.convolutions[1:]:
            weight = convolution.weight[...]
            pooled = pool_heads(weight, layer.num_kv_heads, num_kv_heads, how=way)
            convolution.weight = nnx.Param(pooled)
    new.num_kv_heads = num_kv_heads
    return new


def _pool(linear: Any, old: int, new: int, how: str, rngs: nnx.Rngs | None) -> None:
    width = linear.out_features // old
    if rngs is None:
        linear.kernel = nnx.Param(pool_heads(linear.kernel[...], old, new, how=how))
        if linear.bias is not None:
            linear.bias = nnx.Param(pool_heads(linear.bias[...], old, new, how=how))
    else:
        shape, dtype = (linear.in_features, new * width), linear.kernel[...].dtype
        drawn = nnx.initializers.lecun_normal()(rngs.params(), shape, dtype)
        linear.kernel = nnx.Param(drawn)
        if linear.bias is not None:
            linear.bias = nnx.Param(linear.bias[...][: new * width] * 0)
    linear.out_features = new * width
