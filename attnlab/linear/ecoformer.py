r"""EcoFormer: queries and keys hashed to bits by functions that are fitted to attention.

    w_ts = (H(q_t) . H(k_s) + c) / sum_s' (H(q_t) . H(k_s') + c),    H(x) = sign(A (kappa(x) - mu))

    kappa_m(x) = exp(-|x / |x| - anchor_m|^2 / (2 sigma))

H(x) is in {-1, 1}^b, so products are additions, and H(q) . H(k) is b minus twice the Hamming
distance.  Liu, Pan, He, Cai & Zhuang 2022, arXiv:2209.09004: fitted bit by bit, as in kernel-based
supervised hashing, so that tokens which attend to each other get like codes, linear attention
saves most of the energy for a fraction of a per cent of accuracy.

c is b + 1, as in the authors' code, so weights are positive.  Settled here: sigma is that of the
fit (`measured=True` takes it from the tokens of each call, as the code does, which looks ahead);
the code adds c v_t where the formula has c sum_s v_s, and the formula is followed; sign(0) is -1.
The authors project queries and keys by one matrix, which is up to the layer.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.decay_tree import product
from attnlab.core.entry import PATTERNS, RECURRENCE, Entry, Paper
from attnlab.core.linear_attention import (
    linear_attention,
    linear_state,
    real_inputs,
    real_positions,
    repeat_heads,
)
from attnlab.core.modules import Mechanism
from attnlab.core.recurrence import state_dtype

BITS, ANCHORS, TOP_K = 16, 25, 10


class KernelHash(NamedTuple):
    """A hash function for each head: A, the anchors, mu and sigma."""

    weights: Float[Array, "N b m"]
    anchors: Float[Array, "N m H"]
    mean: Float[Array, "N m"]
    bandwidth: Float[Array, " N"]


def kernel_hash(
    x: Float[Array, "*B S N H"],
    hashing: KernelHash,
    *,
    straight_through: bool = True,
    measured: bool = False,
) -> Float[Array, "*B S N b"]:
    """Codes of -1 and 1.

    Args:
      straight_through: let gradients pass where what is rounded is within (-1, 1); otherwise they
        are zero, as those of a step are.
      measured: sigma is the mean squared distance of these tokens from the anchors.
    """
    hashing = KernelHash(*(h.astype(x.dtype) for h in hashing))
    distance = _distances(_unit(x), hashing.anchors)
    sigma = _like(hashing.bandwidth[:, None], distance)
    if measured:
        sigma = jnp.mean(distance, (-3, -1), keepdims=True)
    centred = jnp.exp(-distance / (2 * sigma)) - _like(hashing.mean, distance)
    plain = product("...snm,nbm->...snb", centred, hashing.weights)
    codes = jnp.where(plain > 0, jnp.ones_like(plain), -jnp.ones_like(plain))
    if straight_through:
        near = jnp.clip(plain, -1, 1)
        codes = codes + (near - jax.lax.stop_gradient(near))
    return codes


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))


def _distances(x: Array, anchors: Array) -> Array:
    """Squared distances "*B S N m"."""
    squares = jnp.sum(jnp.square(x), -1, keepdims=True)
    products = product("...nh,nmh->...nm", x, anchors)
    return squares + _like(jnp.sum(jnp.square(anchors), -1), products) - 2 * products


def _like(x: Array, other: Array) -> Array:
    """With as many axes as the other has, new ones in front."""
    return jnp.expand_dims(x, range(other.ndim - x.ndim))


def ecoformer_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    hashing: KernelHash,
    offset: float | None = None,
    straight_through: bool = True,
    measured: bool = False,
    **options: Any,
) -> Any:
    """Attention by agreement of hash codes, O(T + S): "*B T N D".

    Args:
      hashing: fitted by `fit_hash`; for queries and keys alike.
      offset: c, at least the number of bits, by default one more.
      straight_through, measured: as for `kernel_hash`.
      options: as for `attnlab.linear_attention`.

    Raises:
      ValueError: hash functions for other heads or another width, an offset below the number of
        bits, or `measured` with a causal mask.
    """
    query, key, value = real_inputs(query, key, value, options)
    heads, width = hashing.anchors.shape[0], hashing.anchors.shape[-1]
    if (heads, width) != query.shape[-2:]:
        raise ValueError(
            f"hashing: expected functions for heads and width {query.shape[-2:]}, got "
            f"{(heads, width)}."
        )
    bits = hashing.weights.shape[-2]
    offset = bits + 1 if offset is None else offset
    if not offset >= bits:
        raise ValueError(f"offset: expected at least the number of bits, {bits}, got {offset}.")
    if measured and (real_positions(query, key, options).causal or options.get("causal")):
        raise ValueError("measured: looks at all tokens; with a causal mask expected False.")
    dtype, wide = query.dtype, state_dtype(query.dtype)
    arrays = (query, *(repeat_heads(x, heads) for x in (key, value)))
    *hashed, value = (x.astype(wide) for x in arrays)
    how = {"straight_through": straight_through, "measured": measured}
    codes = (kernel_hash(x, hashing, **how) for x in hashed)
    root = math.sqrt(offset)
    features = (jnp.concatenate([x, jnp.full_like(x[..., :1], root)], -1) for x in codes)
    found = linear_attention(*features, value, normalize=True, **options)
    out, *state = found if options.get("return_state") else (found,)
    return (out.astype(dtype), *state) if state else out.astype(dtype)


def random_hash(
    key: Any, num_heads: int, head_width: int, *, bits: int = BITS, num_anchors: int = ANCHORS
) -> KernelHash:
    """Hash functions that know nothing: random anchors and weights."""
    first, second = jax.random.split(key)
    anchors = _unit(jax.random.normal(first, (num_heads, num_anchors, head_width)))
    weights = jax.random.normal(second, (num_heads, bits, num_anchors))
    # Random directions are sqrt(2) apart.
    mean = jnp.full((num_heads, num_anchors), math.exp(-0.5))
    return KernelHash(weights, anchors, mean, jnp.full((num_heads,), 2.0))


def fit_hash(
    x: Float[Array, "B T N H"],
    key: Any,
    *,
    bits: int = BITS,
    num_anchors: int = ANCHORS,
    top_k: int = TOP_K,
    steps: int = 100,
    learning_rate: float | Float[Array, ""] = 5e-4,
) -> KernelHash:
    """Hash functions under which tokens that attend to each other agree.

    Of each token the `top_k` most similar are labelled 1 and the least similar -1.  Bit after bit,
    A's row is trained from a random start on what the bits before left of the labels, a sigmoid
    standing in for the sign, and kept where the sign does better than at the start.

    Args:
      x: queries or keys of a sample of sequences.
      key: a JAX random key; anchors are tokens of the first sequence.

    Raises:
      ValueError: sequences too short for that many anchors or labels.
    """
    length = x.shape[-3]
    if num_anchors > length or 2 * top_k > length:
        raise ValueError(
            f"x: expected sequences of at least {max(num_anchors, 2 * top_k)} tokens for "
            f"{num_anchors=} and {top_k=}, got {length}."
        )
    pick, draw = jax.random.split(key)
    x = _unit(x.astype(state_dtype(x.dtype)))
    chosen = jax.random.choice(pick, length, (num_anchors,), replace=False)
    anchors = jnp.swapaxes(x[0, chosen], 0, 1)
    distance = _distances(x, anchors)
    bandwidth = jnp.mean(distance, (0, 1, 3))
    kernel = jnp.exp(-distance / (2 * _like(bandwidth[:, None], distance)))
    mean = jnp.mean(kernel, (0, 1))
    start = jax.random.normal(draw, (x.shape[-2], bits, num_anchors), x.dtype)
    weights = _fit_bits(
        kernel - _like(mean, kernel), similar(x, top_k) * bits, start, steps, learning_rate
    )
    return KernelHash(weights, anchors, mean, bandwidth)


def similar(x: Float[Array, "B T N H"], top_k: int) -> Float[Array, "B N T T"]:
    """1 for the most similar tokens of each, -1 for the least similar, 0 between."""
    products = product("bsnh,btnh->bnst", x, x)
    rank = jnp.argsort(jnp.argsort(products, -1), -1)
    most, least = rank >= x.shape[1] - top_k, rank < top_k
    return most.astype(x.dtype) - least.astype(x.dtype)


def _fit_bits(kernel: Array, labels: Array, start: Array, steps: int, rate: Any) -> Array:
    """A, a row at a time; `labels` are taken down by what each bit explains."""
    bits = start.shape[1]
    optimizer = optax.sgd(rate, momentum=0.9, nesterov=True)

    def disagreement(y: Array, left: Array) -> Array:
        """Of each head, in the mean over sequences."""
        agreed = product("bns,bnst,bnt->bn", y, left, y)
        return -jnp.mean(agreed, 0) / (y.shape[-1] * bits)

    def values(row: Array) -> Array:
        return product("btnm,nm->bnt", kernel, row)

    def trained(row: Array, left: Array) -> Array:
        def loss(row: Array) -> Array:
            return jnp.mean(disagreement(2 * jax.nn.sigmoid(values(row)) - 1, left))

        def step(carry: Any, _: None) -> tuple[Any, None]:
            row, state = carry
            update, state = optimizer.update(jax.grad(loss)(row), state)
            return (optax.apply_updates(row, update), state), None

        return jax.lax.scan(step, (row, optimizer.init(row)), None, length=steps)[0][0]

    def fit(left: Array, row: Array) -> tuple[Array, Array]:
        new = trained(row, left)
        signs = [jnp.where(values(a) > 0, 1, -1).astype(row.dtype) for a in (row, new)]
        better = disagreement(signs[1], left) < disagreement(signs[0], left)
        kept = jnp.where(better[:, None], signs[1], signs[0])
        left = left - kept[..., :, None] * kept[..., None, :]
        return left, jnp.where(better[:, None], new, row)

    _, rows = jax.lax.scan(fit, labels, jnp.swapaxes(start, 0, 1))
    return jnp.swapaxes(rows, 0, 1)


class HashVariable(nnx.Variable):
    """Part of a hash function: fitted, not trained with the rest."""


class EcoFormer(Mechanism):
    """EcoFormer; hash functions are random until `fit`, and again fitted every so often.

    Args: as for `ecoformer_attention` and `fit_hash`.
    """

    def __init__(
        self,
        num_heads: int,
        head_width: int,
        *,
        bits: int = BITS,
        num_anchors: int = ANCHORS,
        straight_through: bool = True,
        measured: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        drawn = random_hash(
            rngs.params(), num_heads, head_width, bits=bits, num_anchors=num_anchors
        )
        self.weights, self.anchors, self.mean, self.bandwidth = map(HashVariable, drawn)
        self.straight_through, self.measured = straight_through, measured

    def fit(self, x: Float[Array, "B T N H"], key: Any, **options: Any) -> None:
        """Fit the hash functions to queries or keys; options as for `fit_hash`."""
        bits, num_anchors = self.weights[...].shape[1:]
        fitted = fit_hash(x, key, bits=bits, num_anchors=num_anchors, **options)
        for name, array in fitted._asdict().items():
            getattr(self, name)[...] = array

    @property
    def hashing(self) -> KernelHash:
        parts = (self.weights, self.anchors, self.mean, self.bandwidth)
        return KernelHash(*(part[...] for part in parts))

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> Any:
        if self.measured:
            return None
        heads, bits, _ = self.weights[...].shape  # heads that share keys have codes of their own
        return linear_state(batch_shape, heads, bits + 1, value_width + 1)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return ecoformer_attention(
            query, key, value, hashing=self.hashing, straight_through=self.straight_through,
            measured=self.measured, **options,
        )  # fmt: skip


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> EcoFormer:
    # Not straight through: then the gradient is that of the function, zero for queries and keys.
    return EcoFormer(
        num_heads, head_width, bits=4, num_anchors=6, straight_through=False, rngs=rngs
    )


ENTRY = Entry(
    id="ecoformer",
    title="EcoFormer",
    family="linear",
    paper=Paper(
        "EcoFormer: Energy-Saving Attention with Linear Complexity",
        "Liu, Pan, He, Cai & Zhuang",
        2022,
        "2209.09004",
    ),
    summary="Hash functions fitted to attention turn queries and keys into bits; weights count the "
    "bits that agree, by additions alone.",
    formula=r"w_{ts} \propto H(q_t)^\top H(k_s) + c, \qquad "
    r"H(x) = \mathrm{sign}\big(A\,(\kappa(x) - \mu)\big) \in \{-1, 1\}^b",
    patterns=PATTERNS,
    time="O((T + S)·(b·D + m·H))",
    memory="O((T + S)·m·H)",
    exact="Exact for given hash functions; codes are quantized, and gradients pass them straight.",
    properties=frozenset(
        {
            "position-free",
            "translation-invariant",
            "decode",
            "gqa",
            "rows-sum-to-one",
            "linear-memory",
            "state",
        }
    ),
    function=ecoformer_attention,
    module=EcoFormer,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
