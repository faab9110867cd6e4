r"""Regression in context: the data, the predictors, their risks, and attention trained on them.

    x_l, x_q ~ N(0, I_d),   β ~ N(0, I/d),   y = β·x + ε,   var ε = s²

A context is L pairs and a query. Heads of attention predict Σ_h μ_h Σ_l y_l softmax_l(ω_h x_l·x_q);
a step of gradient descent predicts (η/L) Σ_l y_l (x_l - c)·x_q, debiased with c the mean of the
x_l and plain with c = 0; ridge regression with λ = s² d is Bayes' rule.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import attnlab
from theory.descent import adam
from theory.theorem import Key

WIDTH, LENGTH, NOISE = 5, 40, 0.1  # d, L, s²
KAPPA = WIDTH * (1 + NOISE)


@dataclass(frozen=True)
class Contexts:
    """Tokens "n L d", answers "n L", queries "n d", and what each should answer "n"."""

    x: np.ndarray
    y: np.ndarray
    query: np.ndarray
    answer: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """The x_l·x_q, "n L"."""
        return np.einsum("nld,nd->nl", self.x, self.query)


def draw(rng: np.random.Generator, number: int, length: int = LENGTH) -> Contexts:
    """So many contexts.

    Raises:
      ValueError: a context has fewer than two pairs, so that there is nothing to debias.
    """
    if length < 2:
        raise ValueError(f"length: expected 2 pairs or more, got {length}.")
    x = rng.normal(size=(number, length + 1, WIDTH))
    slope = rng.normal(size=(number, WIDTH)) / math.sqrt(WIDTH)
    y = np.einsum("nld,nd->nl", x, slope) + math.sqrt(NOISE) * rng.normal(size=(number, length + 1))
    return Contexts(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1])


def heads(data: Contexts, omega: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """Σ_h μ_h Σ_l y_l softmax_l(ω_h x_l·x_q)."""
    scores, out = data.scores, np.zeros(len(data.answer))
    for o, m in zip(omega, mu, strict=True):
        p = np.exp(o * scores - (o * scores).max(1, keepdims=True))
        out += m * (p * data.y).sum(1) / p.sum(1)
    return out


def heads_of_attnlab(data: Contexts, omega: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """The same by attnlab's attention: ω_h x_q asks, y_l is the value, μ mixes the heads."""
    number, length = data.y.shape
    query = (omega[None, :, None] * data.query[:, None])[:, None]
    keys, values = data.x[:, :, None], data.y[:, :, None, None]
    shape = (number, length, len(omega))
    keys, values = (np.broadcast_to(a, (*shape, a.shape[-1])) for a in (keys, values))
    arrays = (jnp.asarray(a, jnp.float32) for a in (query, keys, values))
    return np.asarray(attnlab.attention(*arrays, scale=1.0), np.float64)[:, 0, :, 0] @ mu


def gradient_step(data: Contexts, eta: float, *, debiased: bool = True) -> np.ndarray:
    """(η/L) Σ_l y_l (x_l - c)·x_q."""
    scores = data.scores
    scores = scores - scores.mean(1, keepdims=True) if debiased else scores
    return eta * (data.y * scores).mean(1)


def bayes(data: Contexts) -> np.ndarray:
    """Ridge regression with λ = s² d."""
    gram = np.einsum("nld,nle->nde", data.x, data.x) + NOISE * WIDTH * np.eye(WIDTH)
    moment = np.einsum("nld,nl->nd", data.x, data.y)
    return (np.linalg.solve(gram, moment[..., None])[..., 0] * data.query).sum(1)


def debiased_risk(eta: float, length: int = LENGTH) -> float:
    """R(η) = s² + 1 - 2ηn/L + η² n (n + 1 + κ)/L², n = L - 1."""
    n = length - 1
    return NOISE + 1 - 2 * eta * n / length + eta**2 * n * (n + 1 + KAPPA) / length**2


def plain_risk(eta: float, length: int = LENGTH) -> float:
    """s² + 1 - 2η + η² (L + 1 + κ)/L."""
    return NOISE + 1 - 2 * eta + eta**2 * (length + 1 + KAPPA) / length


def approximate_risk(omega: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """1 + s² - 2 μ·ω + μ^T (ω ω^T + ((1+s²)/L) exp(d ω ω^T)) μ, of heads "*B H"; "*B"."""
    outer = omega[..., :, None] * omega[..., None, :]
    gram = outer + (1 + NOISE) / LENGTH * np.exp(WIDTH * outer)
    aligned = (mu * omega).sum(-1)
    return np.asarray(1 + NOISE - 2 * aligned + np.einsum("...h,...hg,...g->...", mu, gram, mu))


def descend(
    omega: np.ndarray, mu: np.ndarray, steps: int = 6000, rate: float = 0.06
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient descent on the approximate risk, of heads "*B H"; a NaN stands for no head."""
    there = ~np.isnan(omega)
    omega, mu = np.where(there, omega, 0.0), np.where(there, mu, 0.0)
    share = (1 + NOISE) / LENGTH
    for _ in range(steps):
        kernel = share * np.exp(WIDTH * omega[..., :, None] * omega[..., None, :])
        miss = (mu * omega).sum(-1, keepdims=True) - 1
        own = np.einsum("...hg,...g->...h", kernel, mu)
        through = WIDTH * np.einsum("...hg,...g->...h", kernel, mu * omega)
        of_mu, of_omega = 2 * (omega * miss + own), 2 * mu * (miss + through)
        omega, mu = (a - rate * there * g for a, g in ((omega, of_omega), (mu, of_mu)))
    return omega, mu


@dataclass(frozen=True)
class Trained:
    """What heads of full width learnt: their ω and μ, and how far they are from no more than that.

    `off_diagonal` and `x_part` are norms of what remains of K^T Q and of O V beside ω I and μ, as
    shares; `zero_sum` is |Σ μ| / Σ |μ|.
    """

    risk: float
    omega: tuple[float, ...]
    mu: tuple[float, ...]
    off_diagonal: float
    x_part: float
    zero_sum: float


def trained(key: Key | None = None, num_heads: int = 2, steps: int = 4000) -> Trained:
    """Heads (Q, K, OV) of width d + 1 on tokens (x, y), trained by Adam on fresh contexts.

    Raises:
      ValueError: there is no head.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: expected 1 or more, got {num_heads}.")
    key = jax.random.key(0) if key is None else key
    start, train, test = jax.random.split(key, 3)
    shapes = {"q": (WIDTH + 1,) * 2, "k": (WIDTH + 1,) * 2, "v": (WIDTH + 1,)}
    seeds = jax.random.split(start, len(shapes))
    params = {
        name: 0.3 * jax.random.normal(seed, (num_heads, *shape))
        for (name, shape), seed in zip(shapes.items(), seeds, strict=True)
    }
    params, _ = adam(lambda p, k: _loss(p, k, 256), params, train, steps=steps, rate=0.01)
    return _described(params, float(_loss(params, test, 20_000)))


def _loss(params: dict[str, Array], key: Key, number: int) -> Float[Array, ""]:
    """The mean square error on fresh contexts."""
    a, b, c = jax.random.split(key, 3)
    x = jax.random.normal(a, (number, LENGTH + 1, WIDTH))
    slope = jax.random.normal(b, (number, WIDTH)) / math.sqrt(WIDTH)
    noise = math.sqrt(NOISE) * jax.random.normal(c, (number, LENGTH + 1))
    y = jnp.einsum("bld,bd->bl", x, slope) + noise
    tokens = jnp.concatenate([x, y.at[:, -1].set(0.0)[..., None]], -1)
    return jnp.mean((_predict(params, tokens) - y[:, -1]) ** 2)


def _predict(params: dict[str, Array], tokens: Float[Array, "B L E"]) -> Float[Array, " B"]:
    query = jnp.einsum("be,hre->bhr", tokens[:, -1], params["q"])[:, None]
    keys = jnp.einsum("ble,hre->blhr", tokens[:, :-1], params["k"])
    values = jnp.einsum("ble,he->blh", tokens[:, :-1], params["v"])[..., None]
    return attnlab.attention(query, keys, values, scale=1.0).sum((1, 2, 3))


def _described(params: dict[str, Array], risk: float) -> Trained:
    q, k, v = (np.asarray(params[name], np.float64) for name in "qkv")
    product = np.einsum("hre,hrf->hef", q, k)[:, :WIDTH]  # the query's y is zero
    omega = np.trace(product[..., :WIDTH], axis1=1, axis2=2) / WIDTH
    rest = product - omega[:, None, None] * np.eye(WIDTH, WIDTH + 1)
    order = np.argsort(omega)
    return Trained(
        risk,
        tuple(omega[order].tolist()),
        tuple(v[order, -1].tolist()),
        float((np.linalg.norm(rest, axis=(1, 2)) / np.linalg.norm(product, axis=(1, 2))).max()),
        float(np.linalg.norm(v[:, :-1]) / np.linalg.norm(v)),
        float(abs(v[:, -1].sum()) / np.abs(v[:, -1]).sum()),
    )
