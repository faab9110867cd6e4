r"""Heads of low rank that look for the nearer of two tokens: drawn, voting in two layers, trained.

Two hard heads (q, k), (q', k') of rank one pick the same of two orthonormal tokens with
probability ½ + (2/π²) asin(q·q') asin(k·k'), and one picks the target with probability ½ + ½ Σ_l
N(d, l) m_l³ P_l(q·k): the best weights of the heads, and their error, solve linear equations.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import attnlab
from theory import zonal
from theory.conditioning import unit_keys
from theory.descent import adam
from theory.theorem import Key

HARD = 1e8  # a scale that makes softmax pick the larger of two scores
DEGREE = 101  # of the series of an agreement, whose terms fall like l^(-d/2 - 2) or faster


def random_pairs(rng: np.random.Generator, number: int, width: int) -> tuple[np.ndarray, ...]:
    """Orthonormal pairs of tokens "n 2 d", uniform, and what is asked, "n d"."""
    first, other = unit_keys(rng, number, width), rng.normal(size=(number, width))
    other -= (other * first).sum(1, keepdims=True) * first
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    return np.stack([first, other], 1), unit_keys(rng, number, width)


def right_choice(cosine: np.ndarray, width: int) -> np.ndarray:
    """How often a hard head of rank one picks the nearer token, from its q·k."""
    odd, sign, count = zonal.sign_parts(width, DEGREE)
    polynomials = zonal.polynomials(width, DEGREE, cosine)[odd]
    return 0.5 + 0.5 * np.einsum("l,lh->h", count * sign**3, polynomials)


def rank_one_error(rng: np.random.Generator, width: int, heads: int) -> float:
    """The better of q = k and of q, k at a uniform cosine, with the best weights for the heads."""
    query, other = unit_keys(rng, heads, width), rng.normal(size=(heads, width))
    other -= (other * query).sum(1, keepdims=True) * query
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    cosine = rng.uniform(-1, 1, (heads, 1))
    turned = cosine * query + np.sqrt(1 - cosine**2) * other
    return min(_best_error(query, key) for key in (query, turned))


def _best_error(query: np.ndarray, key: np.ndarray) -> float:
    """1 - 2 a·b + a C a for the weights a of least squares; |f|² is 1."""
    angle = (np.arcsin(np.clip(x @ x.T, -1, 1)) for x in (query, key))
    agree = 0.5 + 2 / math.pi**2 * math.prod(angle)
    right = right_choice((query * key).sum(1).clip(-1, 1), query.shape[1])
    a = np.linalg.lstsq(agree, right, rcond=1e-12)[0]
    return float(1 - 2 * a @ right + a @ agree @ a)


def vote_error(width: int, heads: int) -> float:
    """2 P(the majority of H is wrong) at orthonormal tokens, a binomial tail integrated over t.

    Raises:
      ValueError: H is not odd, so that a vote may end in a tie.
    """
    if heads < 1 or heads % 2 == 0:
        raise ValueError(f"heads: a vote needs an odd number of them, got {heads}.")
    nodes, mass = zonal.angles()
    right = 0.5 + np.arcsin(nodes) / math.pi
    few = np.arange((heads + 1) // 2)[:, None]
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, heads + 1)))])
    ways = factorial[heads] - factorial[few] - factorial[heads - few]
    wrong = np.exp(ways + few * np.log(right) + (heads - few) * np.log1p(-right)).sum(0)
    return zonal.mean_over_angle(width, 2 * wrong, nodes, mass)


def pair_of_layers(
    rng: np.random.Generator, tokens: np.ndarray, asked: np.ndarray, heads: int
) -> np.ndarray:
    """Two layers of hard heads of rank one, by attnlab, with heads of its own for each pair.

    The first layer's value is a label, +1 or -1 for the first and the second token, and the query
    keeps the vote; the second layer scores a token by vote times label.
    """
    number, count, width = tokens.shape
    look = unit_keys(rng, number, heads, width)
    scores = np.einsum("bnd,bhd->bnh", tokens, look)
    wanted = np.sign(np.einsum("bd,bhd->bh", asked, look))
    label = np.broadcast_to(np.array([1.0, -1.0])[None, :count, None, None], (number, 2, 1, 1))
    labels = np.broadcast_to(label, (number, count, heads, 1))
    votes = _hard(wanted[:, None, :, None], scores[..., None], labels)
    vote = np.sign(votes.sum(2, keepdims=True))
    return _hard(vote, label, tokens[:, :, None])[:, 0, 0]


def _hard(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    return np.asarray(attnlab.attention(*arrays, scale=HARD), np.float64)


@dataclass(frozen=True)
class Trained:
    """The error of trained heads on fresh pairs, and its standard error."""

    error: float
    standard_error: float


def trained(
    key: Key | None = None, *, rank: int = 8, num_heads: int = 1, width: int = 8, steps: int = 3000
) -> Trained:
    """Softmax heads of a rank, trained by Adam on independent tokens, two to a pair.

    Raises:
      ValueError: the rank is not within 1 to the width, or there is no head.
    """
    if not 1 <= rank <= width:
        raise ValueError(f"rank: expected 1 to {width}, got {rank}.")
    if num_heads < 1:
        raise ValueError(f"num_heads: expected 1 or more, got {num_heads}.")
    key = jax.random.key(0) if key is None else key
    for_q, for_k, train, test = jax.random.split(key, 4)
    params = {
        "q": 1.5 * jax.random.normal(for_q, (num_heads, rank, width)),
        "k": 1.5 * jax.random.normal(for_k, (num_heads, rank, width)),
        "v": jnp.tile(jnp.eye(width) / num_heads, (num_heads, 1, 1)),
    }
    params, _ = adam(
        lambda p, at: _errors(p, at, 256).mean(), params, train, steps=steps, rate=0.02
    )
    errors = np.asarray(jax.jit(_errors, static_argnums=2)(params, test, 20_000), np.float64)
    return Trained(float(errors.mean()), float(errors.std(ddof=1) / math.sqrt(len(errors))))


def _errors(params: dict[str, Array], key: Key, number: int) -> Float[Array, " B"]:
    """Square errors on fresh tokens, which are independent."""
    for_x, for_y = jax.random.split(key)
    width = params["v"].shape[-1]
    x = jax.random.normal(for_x, (number, 2, width))
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    y = jax.random.normal(for_y, (number, width))  # its length decides nothing but the scores
    y = y / jnp.linalg.norm(y, axis=-1, keepdims=True)
    near = jnp.argmax(jnp.einsum("bnd,bd->bn", x, y), 1)
    target = jnp.take_along_axis(x, near[:, None, None], 1)[:, 0]
    query = jnp.einsum("bd,hrd->bhr", y, params["q"])[:, None]
    keys = jnp.einsum("bnd,hrd->bnhr", x, params["k"])
    values = jnp.einsum("bnd,hde->bnhe", x, params["v"])
    told = attnlab.attention(query, keys, values, scale=1.0)[:, 0].sum(1)
    return ((told - target) ** 2).sum(-1)
