r"""Mixture-of-head attention: each token listens to the heads that a router chooses for it.

    out = sum_n g_n head_n W^O_n
    shared heads n <= h:   g_n = 2 a_1 h softmax_n(x W^S)
    routed heads n > h:    g_n = 2 a_2 k softmax_n(x W^R) over the k largest, else 0
    (a_1, a_2) = softmax(x W^A)

Jin, Zhu, Yuan & Yan 2024, arXiv:2410.11842.  The factors 2, h and k and the softmax over the chosen
alone are those of the authors' code, not of the paper's formula: with equal logits every active
head has gate 1, as in multi-head attention, of which a model may be continued.  `scaled=False`
gives the paper's formula, whose gates sum to 1 at most.  Under the code's form logits of heads that
were not chosen have no gradient; only the balance loss moves them.  Where all heads are shared or
none is, there is no a; where one is, no W^S, its softmax being 1.

The authors' continued LLaMA-3 has no router of its own (`router="query-norm"`): of the routed heads
those with the longest queries speak, with gate 1.  How gradients passed that choice in its training
is left out.  All heads are computed and then weighted: the saving is counted, not made.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.gates import Projection, control, widened
from attnlab.core.modules import Mechanism

ROUTERS = ("input", "query-norm")


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """N heads, of which the first `shared` always speak and `active` of the others.

    Raises:
      ValueError: more shared heads than heads, or more active ones than there are to choose from;
        no head that could speak.
    """

    num_heads: int
    shared: int
    active: int

    def __post_init__(self) -> None:
        if not 0 <= self.shared <= self.num_heads or self.num_heads < 1:
            raise ValueError(
                f"num_shared: expected from 0 to {self.num_heads} heads, got {self.shared}."
            )
        least = 1 if self.routed else 0
        if not least <= self.active <= self.routed:
            raise ValueError(
                f"num_active: expected from {least} to {self.routed}, the heads that are not "
                f"shared, got {self.active}."
            )

    @property
    def routed(self) -> int:
        """How many heads there are to choose from."""
        return self.num_heads - self.shared

    @property
    def share(self) -> float:
        """Share of the heads that speak for a token."""
        return (self.shared + self.active) / self.num_heads


def chosen(logits: Float[Array, "*B T E"], active: int) -> Bool[Array, "*B T E"]:
    """Which of the E logits are among the `active` largest; of equal ones the first."""
    _, index = jax.lax.top_k(logits, active)
    return jnp.any(jax.nn.one_hot(index, logits.shape[-1], dtype=jnp.bool_), axis=-2)


def head_gates(
    routed: Float[Array, "*B T E"],
    shared: Float[Array, "*B T M"],
    split: Float[Array, "*B T 2"] | None,
    active: int,
    *,
    scaled: bool = True,
) -> Float[Array, "*B T N"]:
    """Gates of M shared heads and of E routed ones, from logits; `split` None: no a."""
    keep = chosen(routed, active)
    if scaled:
        gate = active * jax.nn.softmax(jnp.where(keep, routed, -jnp.inf), axis=-1)
    else:
        gate = jnp.where(keep, jax.nn.softmax(routed, axis=-1), jnp.zeros_like(routed))
    always = jax.nn.softmax(shared, axis=-1) * (shared.shape[-1] if scaled else 1)
    if split is not None:
        a = jax.nn.softmax(split, axis=-1) * (2 if scaled else 1)
        always, gate = always * a[..., :1], gate * a[..., 1:]
    return jnp.concatenate([always, gate], axis=-1)


def balance_loss(
    logits: Float[Array, "*B T E"], active: int, *, real: Bool[Array, "*B T"] | None = None
) -> Float[Array, ""]:
    """E sum_i f_i P_i: f_i the share of tokens that chose head i, P_i its mean probability.

    Equal use of all heads gives `active`.  Where all tokens have one distribution that is the
    least; in general it is not.  The authors add the loss with weight 0.01.  `real` leaves padding
    out.
    """
    (logits,) = widened(logits)
    weight = jnp.ones(logits.shape[:-1], bool) if real is None else real
    weight = jnp.broadcast_to(weight[..., None], logits.shape).astype(logits.dtype)
    axes, count = tuple(range(logits.ndim - 1)), jnp.maximum(jnp.sum(weight[..., 0]), 1)
    use = jnp.sum(weight * chosen(logits, active).astype(logits.dtype), axes) / count
    mean = jnp.sum(weight * jax.nn.softmax(logits, axis=-1), axes) / count
    return logits.shape[-1] * jnp.sum(use * mean)


def query_norm_gates(query: Float[Array, "*B T N H"], plan: HeadPlan) -> Float[Array, "*B T N"]:
    """1 for shared heads and the routed ones with the longest queries, 0 for others."""
    (wide,) = widened(query)
    square = jnp.sum(jnp.square(wide), axis=-1)
    keep = chosen(square[..., plan.shared :], plan.active)
    always = jnp.ones((*square.shape[:-1], plan.shared), bool)
    return jnp.concatenate([always, keep], axis=-1).astype(square.dtype)


def moh_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    gates: Float[Array, "*B T N"],
    **options: Any,
) -> Any:
    """Softmax attention whose heads are weighted for each token: "*B T N D".

    Args:
      gates: such as `head_gates` makes; 1 everywhere is multi-head attention.
      options: as for `attnlab.attention`; a log-sum-exp is that of the heads before their gates.

    Raises:
      TypeError, ValueError: gates that are no floating-point array "*B T N".
    """
    query, key, value = check_inputs(query, key, value)
    gates = control("gates", gates, query.shape[:-1], widened(query)[0].dtype)
    out = attention(query, key, value, **options)
    if isinstance(out, tuple):
        return (_gated(out[0], gates), *out[1:])
    return _gated(out, gates)


def _gated(out: Float[Array, "*B T N D"], gates: Float[Array, "*B T N"]) -> Array:
    return (out.astype(gates.dtype) * gates[..., None]).astype(out.dtype)


class MoH(Mechanism):
    """Mixture-of-head attention; routers "F E", "F M" and "F 2", without biases.

    Args:
      features: width F of the layer's input.
      num_heads: query heads N.
      num_shared: heads that every token listens to, the first ones.
      num_active: of the others, how many a token listens to.
      scaled: gates of mean about 1, as in the authors' code; else the paper's formula.
      router: "input", or "query-norm", which has no parameters.

    Raises:
      ValueError: head counts that do not fit, or another router.
    """

    def __init__(
        self, features: int, num_heads: int, *, num_shared: int, num_active: int,
        scaled: bool = True, router: str = "input", rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        if router not in ROUTERS:
            raise ValueError(f"router: expected one of {ROUTERS}, got {router!r}.")
        self.plan = plan = HeadPlan(num_heads, num_shared, num_active)
        self.scaled, self.router = scaled, router

        def layer(width: int) -> Projection | None:
            return Projection(features, width, rngs=rngs) if width and router == "input" else None

        self.routed = nnx.data(layer(plan.routed))
        self.shared = nnx.data(layer(plan.shared if plan.shared > 1 else 0))
        self.split = nnx.data(layer(2 if plan.routed and plan.shared else 0))

    def gates(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T N"]:
        """Gates of all heads, from the layer's input, in float32 at least."""

        def logits(layer: Projection | None, count: int) -> Array:
            return jnp.zeros((*x.shape[:-1], count), dtype) if layer is None else layer(x)

        dtype = widened(x)[0].dtype
        routed, shared = (
            logits(self.routed, self.plan.routed),
            logits(self.shared, self.plan.shared),
        )
        split = None if self.split is None else self.split(x)
        return head_gates(routed, shared, split, self.plan.active, scaled=self.scaled)

    def balance_loss(
        self, x: Float[Array, "*B T F"], *, real: Bool[Array, "*B T"] | None = None
    ) -> Float[Array, ""]:
        """`balance_loss` of the router's logits for the layer's input; 0 without a router."""
        if self.routed is None:
            return jnp.zeros((), widened(x)[0].dtype)
        return balance_loss(self.routed(x), self.plan.active, real=real)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        """Attend: "*B T N D"; gates that come from the layer's input are put on by `finish`."""
        if self.router == "input":
            return attention(query, key, value, **options)
        query, key, value = check_inputs(query, key, value)
        gates = query_norm_gates(query, self.plan)
        return moh_attention(query, key, value, gates=gates, **options)

    def finish(self, out: Float[Array, "*B T N D"], x: Float[Array, "*B T F"]) -> Array:
        return _gated(out, self.gates(x)) if self.router == "input" else out


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> MoH:
    return MoH(num_heads * head_width, num_heads, num_shared=1, num_active=2, rngs=rngs)


ENTRY = Entry(
    id="moh",
    title="Mixture-of-head attention",
    family="heads",
    paper=Paper(
        "MoH: Multi-Head Attention as Mixture-of-Head Attention",
        "Jin, Zhu, Yuan & Yan",
        2024,
        "2410.11842",
    ),
    summary="A router chooses for each token which heads it listens to and how much; a few heads "
    "are shared by all tokens.",
    formula=r"\mathrm{out} = \sum_n g_n\, \mathrm{head}_n W^O_n, \qquad g_n = 0 \text{ unless } n "
    r"\text{ is shared or among the } k \text{ largest of } x W^R",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact; inactive heads are computed and given weight zero.",
    properties=frozenset(
        {"position-free", "translation-invariant", "decode", "gqa", "lse", "linear-memory"}
    ),
    function=moh_attention,
    module=MoH,
    build=_build,
)
