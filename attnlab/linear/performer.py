r"""Performer (FAVOR+): softmax attention in expectation, from positive random features.

    w_ts = phi(q_t) . phi(k_s) / sum_s' phi(q_t) . phi(k_s'),   phi(x)_r = exp(w_r . y - |y|^2 / 2)

with y = x H^-1/4 and rows w_r of a random matrix, "M H": E[phi(q) . phi(k)] / M = exp(q . k /
sqrt(H)).  Rows are orthogonal within blocks of H, with the lengths of Gaussian vectors, which makes
the variance smaller.  Choromanski et al. 2020, arXiv:2009.14794: an unbiased estimate of softmax
attention in linear time and memory, whose error falls with M^-1/2 where queries and keys are short;
for long ones the variance grows like exp(|q + k|^2 / sqrt(H)), and weights mean little.

The authors' code subtracts the largest exponent over all positions and adds 1e-6 to each feature,
so later keys move earlier outputs.  Here the maximum runs with the past, a channel at a time
(`attnlab.core.past_softmax`), and nothing need be added.  Their code draws a matrix per call, from
the sum of the queries; here it stays until `Performer.redraw`, as decoding needs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.decay_tree import product
from attnlab.core.entry import PATTERNS, RECURRENCE, Entry, Paper
from attnlab.core.linear_attention import linear_attention, real_inputs
from attnlab.core.modules import Mechanism
from attnlab.core.past_softmax import exponential_attention, peak_state
from attnlab.core.recurrence import state_dtype

NUM_FEATURES = 256  # of the authors' JAX code
RELU_SHIFT = 1e-3


def orthogonal_features(
    key: Any, num_features: int, head_width: int, *, lengths: str = "gaussian"
) -> Float[Array, "M H"]:
    """Random rows, orthogonal within blocks of H, each block uniformly turned.

    Args:
      lengths: "gaussian", those of vectors from N(0, I), which keeps the estimate unbiased, or
        "fixed", all sqrt(H).

    Raises:
      ValueError: sizes that are not positive, or another word for `lengths`.
    """
    if num_features < 1 or head_width < 1:
        raise ValueError(
            f"num_features: expected positive sizes, got {num_features=}, {head_width=}."
        )
    if lengths not in ("gaussian", "fixed"):
        raise ValueError(f'lengths: expected "gaussian" or "fixed", got {lengths!r}.')
    turn, stretch = jax.random.split(key)
    blocks = -(-num_features // head_width)
    rows = jax.random.orthogonal(turn, head_width, (blocks,)).reshape(-1, head_width)
    drawn = jnp.linalg.norm(jax.random.normal(stretch, rows.shape), axis=-1, keepdims=True)
    long = drawn if lengths == "gaussian" else jnp.full_like(drawn, head_width**0.5)
    return (rows * long)[:num_features]


def performer_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    features: Float[Array, "M H"] | None = None,
    kernel: str = "softmax",
    **options: Any,
) -> Any:
    """Attention with random features, O(T + S): "*B T N D".

    Args:
      features: the random rows w_r, common to queries and keys (`orthogonal_features`).
      kernel: "softmax", or "relu" for relu(x) + 0.001, which estimates nothing and takes no rows.
      options: as for `attnlab.linear_attention`; a state is a `PeakState` for "softmax".

    Raises:
      ValueError: rows of another width than the heads', missing or not wanted; an unknown kernel.
    """
    query, key, value = real_inputs(query, key, value, options)
    if kernel not in ("softmax", "relu") or (features is None) != (kernel == "relu"):
        raise ValueError(
            'kernel: expected "softmax" with `features`, or "relu" without, got '
            f"{kernel!r} and {'no ' if features is None else ''}features."
        )
    if features is None:
        mapped = [jax.nn.relu(x) + jnp.asarray(RELU_SHIFT, x.dtype) for x in (query, key)]
        return linear_attention(*mapped, value, normalize=True, **options)
    if features.ndim != 2 or features.shape[-1] != query.shape[-1]:
        raise ValueError(f"features: expected shape (M, {query.shape[-1]}), got {features.shape}.")
    dtype, wide = query.dtype, state_dtype(query.dtype)
    rows = features.astype(wide)
    query, key = (x.astype(wide) * query.shape[-1] ** -0.25 for x in (query, key))
    # The length of the query scales all its weights alike, and is left out.
    logits = product("...h,mh->...m", key, rows) - jnp.sum(jnp.square(key), -1, keepdims=True) / 2
    query = product("...h,mh->...m", query, rows)
    found = exponential_attention(query, logits, value.astype(wide), **options)
    out, *state = found if options.get("return_state") else (found,)
    return (out.astype(dtype), *state) if state else out.astype(dtype)


class RandomFeatures(nnx.Variable):
    """A random matrix that is kept and not trained."""


class Performer(Mechanism):
    """FAVOR+; holds its random rows, the same for all heads, as a variable that is not trained."""

    def __init__(
        self,
        head_width: int,
        *,
        num_features: int = NUM_FEATURES,
        lengths: str = "gaussian",
        rngs: nnx.Rngs,
    ) -> None:
        self.lengths = lengths
        drawn = orthogonal_features(rngs.params(), num_features, head_width, lengths=lengths)
        self.features = RandomFeatures(drawn)

    def redraw(self, rngs: nnx.Rngs) -> None:
        """Other random rows, as training does every so often; states made before are of no use."""
        shape = self.features[...].shape
        self.features[...] = orthogonal_features(rngs.params(), *shape, lengths=self.lengths)

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> Any:
        return peak_state(batch_shape, num_kv_heads, self.features[...].shape[0], value_width)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return performer_attention(query, key, value, features=self.features[...], **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> Performer:
    return Performer(head_width, num_features=2 * head_width, rngs=rngs)


ENTRY = Entry(
    id="performer",
    title="Performer (FAVOR+)",
    family="linear",
    paper=Paper(
        "Rethinking Attention with Performers",
        "Choromanski, Likhosherstov, Dohan, Song, Gane, Sarlos, Hawkins, Davis, Mohiuddin, "
        "Kaiser, Belanger, Colwell & Weller",
        2020,
        "2009.14794",
    ),
    summary="Positive random features whose products are, on average, the exponential of the "
    "score: softmax attention estimated in linear time.",
    formula=r"w_{ts} = \frac{\phi(q_t)^\top \phi(k_s)}{\sum_{s'} \phi(q_t)^\top \phi(k_{s'})}, "
    r"\qquad \phi(x)_r = \exp\!\left(w_r^\top y - \tfrac{1}{2}\lVert y\rVert^2\right), "
    r"\quad y = x\,H^{-1/4}",
    patterns=PATTERNS,
    time="O((T + S)·M·(H + D))",
    memory="O((T + S)·M)",
    exact="An unbiased estimate of the kernel exp(q·k/√H); the ratio is consistent, not unbiased.",
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
    function=performer_attention,
    module=Performer,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
