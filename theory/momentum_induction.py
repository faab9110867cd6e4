r"""Induction in one layer: what a step of momentum adds to attention, and what its name hides.

    x^_t = x_t + γ (x_t - x_{t-1}),   x^_1 = x_1,   for queries and for keys

Along a sequence this is a filter, H(ω) = 1 + γ(1 - e^-iω), |H|² = 1 + 4γ(1+γ) sin²(ω/2): 1 for what
is constant, 1 + 2γ for what alternates. Scores become (1+γ)² M(t,s) - γ(1+γ) [M(t,s-1) + M(t-1,s)]
+ γ² M(t-1,s-1), M those of the tokens as they are. Let P keys, each followed by its value, be read,
and then one of the keys again; let M be -β for equal keys and 0 else. The value that followed then
scores βγ(1+γ), the key itself less than 0, all else 0:

    weight of the value that followed  ≥  1 / (1 + 2P e^(-βγ(1+γ)))

Without momentum and without positions the last row does not change when earlier tokens are
permuted: whatever the head, it is right for one of the P ways to pair keys and values in a circle.

Maitra (2026, arXiv:2602.04902) calls the shear symplectic. It is, of position and momentum taken as
independent; as a map of sequences it multiplies volume by (1+γ)^(T-1) in each channel. After RoPE a
constant token is not constant: its pairs of channels have the gain |1 + γ(1 - e^-iθ)|. The bounds
are ours.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab import masks
from attnlab.core.entry import Paper
from attnlab.core.past import Past
from attnlab.positional.momentum_attention import MomentumAttention, momentum_attention, sheared
from theory.conditioning import generator
from theory.shares import at_least, at_most
from theory.theorem import Cell, Evidence, Key, Theorem

GAMMAS, PAIRS = (0.25, 1.0, 4.17), (4, 16, 64)
REPULSION = 8.0  # β
LENGTH = 64
ROUNDING = 1e-5  # float32, relative
COLUMNS = ("what", "T", "gamma", "measured", "promised", "share")


def check(key: Key | None = None) -> Evidence:
    """Gains at all frequencies, volumes, the least weight over ten texts, and heads without."""
    rng = generator(key)
    rows = [row for gamma in GAMMAS for row in _filter(gamma)]
    rows += [_induced(rng, pairs, gamma, gamma) for pairs in PAIRS for gamma in GAMMAS]
    rows += [_without(rng, pairs) for pairs in PAIRS[:2]]
    return _evidence(rows, f"weights: least of ten texts, β = {REPULSION:g}")


def counter_check(key: Key | None = None) -> Evidence:
    """No momentum promised what momentum keeps; volume kept; RoPE before the shear."""
    rng = generator(key)
    rows = [_induced(rng, pairs, 0.0, 1.0) for pairs in PAIRS]
    for gamma in GAMMAS:
        volume, gain = _volume(gamma), _rotated_gain(gamma)
        rows.append(("volume kept", 8, gamma, volume, 1.0, at_most(volume, 1 + ROUNDING)))
        rows.append(("RoPE, then constant", 8, gamma, gain, 1.0, at_most(gain, 1 + ROUNDING)))
    return _evidence(rows, "gains after RoPE: of the fastest pair of channels")


def gain(frequency: np.ndarray, momentum: float) -> np.ndarray:
    """|H(ω)| of the shear along a sequence."""
    return np.sqrt(1 + 4 * momentum * (1 + momentum) * np.sin(frequency / 2) ** 2)


def weight_bound(pairs: int, momentum: float, repulsion: float = REPULSION) -> float:
    """The least weight of the value that followed the key asked for.

    Raises:
      ValueError: there is no pair.
    """
    if pairs < 1:
        raise ValueError(f"pairs: expected a positive int, got {pairs}.")
    return 1 / (1 + 2 * pairs * math.exp(-repulsion * momentum * (1 + momentum)))


def shear_matrix(length: int, momentum: float) -> np.ndarray:
    """The shear along a sequence as a matrix "T T": column t is what a pulse at t becomes."""
    pulses = jnp.eye(length, dtype=jnp.float32)[:, None]
    return np.asarray(sheared(pulses, momentum, Past(0)), np.float64)[:, 0]


def recall_text(rng: np.random.Generator, pairs: int) -> tuple[np.ndarray, int]:
    """Tokens of P keys, each with its value, and one key again; and where its value stands.

    Keys are 0 to P - 1, values P to 2P - 1.
    """
    names, values = rng.permutation(pairs), pairs + rng.permutation(pairs)
    asked = int(rng.integers(pairs))
    told = np.stack([names, values], axis=-1).reshape(-1)
    return np.append(told, names[asked]), 2 * asked + 1


def induction_weights(
    tokens: np.ndarray, pairs: int, momentum: float, repulsion: float = REPULSION
) -> np.ndarray:
    """The last token's weights "T": equal keys repel, values are seen by nobody."""
    one_hot = np.eye(2 * pairs)[tokens]
    repelled = np.where(np.arange(2 * pairs) < pairs, -repulsion, 0.0) * one_hot
    arrays = (one_hot, repelled, np.eye(len(tokens)))
    query, key, value = (jnp.asarray(x[:, None], jnp.float32) for x in arrays)
    out = _moved(query, key, value, jnp.asarray(momentum, jnp.float32))
    return np.asarray(out, np.float64)[-1, 0]


@jax.jit
def _moved(
    query: Float[Array, "T 1 V"],
    key: Float[Array, "T 1 V"],
    value: Float[Array, "T 1 D"],
    momentum: Float[Array, ""],
) -> Float[Array, "T 1 D"]:
    return momentum_attention(
        query, key, value, momentum=momentum, theta=None, scale=1.0, mask=masks.Causal()
    )


def _filter(gamma: float) -> list[tuple[Cell, ...]]:
    """The largest error of a gain, the gain at the top, and the volume of eight tokens."""
    response = np.roll(shear_matrix(LENGTH, gamma)[:, 1], -1)
    found = np.abs(np.fft.fft(response))
    expected = gain(2 * np.pi * np.arange(LENGTH) / LENGTH, gamma)
    error, allowed = float(np.abs(found - expected).max()), ROUNDING * (1 + 2 * gamma)
    top, volume, told = float(found[LENGTH // 2]), _volume(gamma), (1 + gamma) ** 7
    strayed = abs(volume / told - 1)
    return [
        ("gain, largest error", LENGTH, gamma, error, allowed, at_most(error, allowed)),
        ("gain at the top", LENGTH, gamma, top, 1 + 2 * gamma, abs(top - 1 - 2 * gamma) / allowed),
        ("volume", 8, gamma, volume, told, at_most(strayed, 8 * ROUNDING)),
    ]


def _volume(gamma: float) -> float:
    return float(np.linalg.det(shear_matrix(8, gamma)))


def _rotated_gain(gamma: float) -> float:
    """What RoPE and the shear make of the length of a constant token's first pair of channels."""
    x = jnp.ones((9, 1, 8), jnp.float32)
    moved, _, _ = MomentumAttention(gamma).prepare(x, x, x, Past(0))
    return float(jnp.linalg.norm(moved[-1, 0, :2]) / math.sqrt(2))


def _induced(
    rng: np.random.Generator, pairs: int, gamma: float, promised_gamma: float
) -> tuple[Cell, ...]:
    texts = [recall_text(rng, pairs) for _ in range(10)]
    found = min(float(induction_weights(x, pairs, gamma)[place]) for x, place in texts)
    promised = weight_bound(pairs, promised_gamma)
    share = at_least(found + ROUNDING, promised)
    return ("weight", 2 * pairs + 1, gamma, found, promised, share)


def _without(rng: np.random.Generator, pairs: int) -> tuple[Cell, ...]:
    """The greatest share of the P circular pairings that a head without momentum gets right."""
    names, shifts, found = np.arange(pairs), range(pairs), []
    for _ in range(10):
        query, key, value = (rng.normal(size=(2 * pairs, 1, 2 * pairs)) for _ in "qkv")
        right = 0
        for shift in shifts:
            values = pairs + (names + shift) % pairs
            tokens = np.append(np.stack([names, values], axis=-1).reshape(-1), 0)
            arrays = (jnp.asarray(x[tokens], jnp.float32) for x in (query, key, value))
            out = _moved(*arrays, jnp.zeros(()))
            right += int(np.argmax(out[-1, 0, pairs:]) == values[0] - pairs)
        found.append(right / pairs)
    worst = max(found)
    return ("right, no momentum", 2 * pairs + 1, 0.0, worst, 1 / pairs, at_most(worst, 1 / pairs))


_evidence = partial(Evidence.of_ratios, "what is measured, as a share of what is promised", COLUMNS)


THEOREM = Theorem(
    id="momentum-induction",
    title="induction in one layer",
    statement=(
        r"Let $\hat x_t = x_t + \gamma (x_t - x_{t-1})$, $\hat x_1 = x_1$. (a) Along a sequence "
        r"this is a filter with $|H(\omega)|^2 = 1 + 4\gamma(1 + \gamma) \sin^2(\omega/2)$, and "
        r"multiplies the volume of $T$ tokens by $(1 + \gamma)^{T-1}$ in each channel. (b) Read "
        r"$P$ different keys, each followed by its own value, and then one of the keys again. If "
        r"equal keys have the product $-\beta$ and all other pairs 0, then causal attention with "
        r"$\hat q$ and $\hat k$ and without positions gives the value that followed a weight of at "
        r"least $1 / (1 + 2P e^{-\beta\gamma(1 + \gamma)})$. (c) With $\gamma = 0$, any head, and "
        r"any function of what it reads, names the right value for at most one of the $P$ circular "
        r"pairings of keys and values."
    ),
    assumptions=(
        r"momentum: $\gamma > 0$, for (b)",
        "no rotation comes before the shear",
        "keys and values are different tokens, and each key comes once before it is asked for",
    ),
    source=Paper(
        "Momentum Attention: The Physics of In-Context Learning and Spectral Forensics for "
        "Mechanistic Interpretability",
        "Maitra",
        2026,
        "2602.04902",
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"(a) $H(\omega) = 1 + \gamma(1 - e^{-i\omega})$; the matrix is triangular with $1, 1 + "
        r"\gamma, 1 + \gamma, \dots$ on its diagonal. (b) The score of $t$ and $s$ is "
        r"$(1+\gamma)^2 M_{t,s} - \gamma(1+\gamma)(M_{t,s-1} + M_{t-1,s}) + \gamma^2 M_{t-1,s-1}$. "
        r"The last token is a key and the one before it a value, so the terms with $t-1$ vanish; "
        r"$M_{t,s-1} = -\beta$ for the value that followed, and $M_{t,s} = -\beta$ only where the "
        r"key stands: no other score is above 0. (c) Attention without positions is a sum over the "
        r"keys seen, and its last row sees all: the pairings have the same tokens, and each has "
        r"another right value."
    ),
)
