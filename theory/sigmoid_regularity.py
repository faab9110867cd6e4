r"""How much sigmoid attention can amplify its input, and what the bias -log n is for.

    O(X) = P X W,    P = σ(S + b),    S = X A X^T,    |x_i| ≤ R,    a = |A| R²

Moving X moves both the values and the weights, so that from Frobenius to Frobenius norm

    |Jac|  ≤  |W| (|P| + 2 max σ'(S+b) |A| |X|²)

with equality when all tokens are the same vector, A a multiple of I and W = I. With b = -log n
weights are e^S / (n + e^S) ≤ e^a / n, and the bound becomes |W| e^a (1 + 2a), whatever n; without a
bias the norm at equal tokens is n |W| / 2 at the least. The bias does for a row of small scores
what the normaliser does: its sum is e^{t²/2} for scores of variance t², as n grows, not n / 2.

Ramapuram et al. (2024) prove another Jacobian bound and call sigmoid the more regular, for their
worst case over large tokens is polynomial where softmax's may be exponential; no bias beats
|W| n (1 + a/2) here. That is no ordering in general: on unit tokens softmax, measured beside it,
has the smaller Jacobian. The statement and its constants are ours.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.core.entry import Paper
from attnlab.normalization.sigmoid_attention import sigmoid_attention
from theory.conditioning import generator, unit_keys
from theory.shares import at_least, at_most, on_average
from theory.theorem import Cell, Evidence, Key, Theorem

WIDTH = 4
LENGTHS = (4, 8, 32)
SIZES = (0.5, 2.0)  # of a = |A| R²
SPREADS = (0.3, 1.0)  # of scores, for the mean of a row's sum
ROUNDING = 1e-5  # float32, relative to the largest entry of a Jacobian
Layer = tuple[np.ndarray, np.ndarray, np.ndarray]  # the tokens, A and W
COLUMNS = ("what", "n", "a or t", "measured", "softmax", "bound", "share")


def check(key: Key | None = None) -> Evidence:
    """Exact Jacobians at random and at equal tokens, with both biases; then sums of rows."""
    rng = generator(key)
    rows = [row for a in SIZES for n in LENGTHS for row in _norms(rng, n, a)]
    rows += [_of_attnlab(rng, a) for a in SIZES]
    rows += [row for t in SPREADS for n in (64, 2048) for row in _sums(rng, n, t)]
    return _evidence(
        rows, "softmax: the norm of its Jacobian at the same input, for which nothing is claimed"
    )


def counter_check(key: Key | None = None) -> Evidence:
    """No bias, and the bound that does not know n is promised all the same."""
    rng = generator(key)
    rows = [
        _row("b = 0", n, a, _norm(_equal(rng, n, a), 0.0), any_length_bound(a))
        for a in (0.5, 1.0)
        for n in LENGTHS
    ]
    return _evidence(rows, "all tokens equal; b = 0 where b = -log n is asked")


def weights(scores: np.ndarray, bias: float) -> np.ndarray:
    """The sigmoid of scores and bias."""
    return 1 / (1 + np.exp(-(scores + bias)))


def jacobian(tokens: np.ndarray, A: np.ndarray, W: np.ndarray, bias: float | None) -> np.ndarray:
    """Of O(X), "nD nD", row by row of X; a bias of None means softmax.

    Raises:
      ValueError: A or W is not square of the tokens' width.
    """
    n, width = tokens.shape
    for name, matrix in (("A", A), ("W", W)):
        if matrix.shape != (width, width):
            raise ValueError(f"{name}: expected shape {(width, width)}, got {matrix.shape}.")
    scores, values = tokens @ A @ tokens.T, tokens @ W
    if bias is None:
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        slope, moved = p, values[None] - (p @ values)[:, None]
    else:
        p = weights(scores, bias)
        slope, moved = p * (1 - p), np.broadcast_to(values, (n, n, width))
    through = slope[:, :, None] * moved  # how far output i goes when its score with j grows
    out = np.einsum("ij,cm->imjc", p, W)
    out += np.einsum("ijm,ic->imjc", through, tokens @ A)
    own = np.einsum("ikm,kc->imc", through, tokens @ A.T)
    out[np.arange(n), :, np.arange(n), :] += own
    return out.reshape(n * width, n * width)


def norm_bound(tokens: np.ndarray, A: np.ndarray, W: np.ndarray, bias: float) -> float:
    """|W| (|P| + 2 max σ' |A| |X|²), for these tokens."""
    p = weights(tokens @ A @ tokens.T, bias)
    steep = 2 * (p * (1 - p)).max() * _spectral(A) * _spectral(tokens) ** 2
    return _spectral(W) * (_spectral(p) + steep)


def any_length_bound(a: float) -> float:
    """For the bias -log n and any n: e^a (1 + 2a), with |W| = 1."""
    return math.exp(a) * (1 + 2 * a)


def any_bias_bound(a: float, length: int) -> float:
    """For any bias and any tokens: n (1 + a/2), with |W| = 1."""
    return length * (1 + a / 2)


def mean_row_sum(length: int, spread: float) -> float:
    """The mean n E σ(t z - log n), z normal, by quadrature; e^{t²/2} in the limit, from below.

    Raises:
      ValueError: there is no token.
    """
    if length < 1:
        raise ValueError(f"length: expected a positive int, got {length}.")
    nodes, mass = np.polynomial.hermite_e.hermegauss(80)
    return length * float(mass @ weights(spread * nodes, -math.log(length)) / mass.sum())


def _norms(rng: np.random.Generator, n: int, a: float) -> list[tuple[Cell, ...]]:
    """The bound of given tokens, at random and at equal ones; those that know only a, and n."""
    bias, equal = -math.log(n), _equal(rng, n, a)
    inputs = [("random tokens", _random(rng, n, a)), ("equal tokens", equal)]
    rows = [_row(name, n, a, _norm(x, bias), norm_bound(*x, bias)) for name, x in inputs]
    least, soft = _norm(equal, 0.0)
    return [
        *rows,
        _row("whatever n", n, a, _norm(equal, bias), any_length_bound(a)),
        _row("b = 0, at most", n, a, (least, soft), any_bias_bound(a, n)),
        ("b = 0, at least", n, a, least, soft, n / 2, at_least(least, n / 2)),
    ]


def _row(what: str, n: int, a: float, found: tuple[float, float], bound: float) -> tuple[Cell, ...]:
    return (what, n, a, *found, bound, at_most(found[0], bound))


def _of_attnlab(rng: np.random.Generator, a: float) -> tuple[Cell, ...]:
    """The largest difference of an entry between attnlab's Jacobian and the one written down."""
    inputs = _random(rng, 8, a)
    by_hand = jacobian(*inputs, -math.log(8))
    told = np.asarray(_jacobian(*(jnp.asarray(x, jnp.float32) for x in inputs)), np.float64)
    error = float(np.abs(told.reshape(by_hand.shape) - by_hand).max())
    bound = ROUNDING * float(np.abs(by_hand).max())
    return ("attnlab's", 8, a, error, "", bound, at_most(error, bound))


@jax.jit
def _jacobian(
    tokens: Float[Array, "T D"], A: Float[Array, "D D"], W: Float[Array, "D D"]
) -> Float[Array, "T D T D"]:
    def layer(x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return sigmoid_attention(*(y[:, None] for y in (x @ A, x, x @ W)), scale=1.0)[:, 0]

    return jax.jacobian(layer)(tokens)


def _sums(rng: np.random.Generator, n: int, t: float) -> list[tuple[Cell, ...]]:
    """Rows of n scores of variance t²: their sums, and how far weights are from e^s / n."""
    scores = t * rng.normal(size=(200, n))
    p, frozen = weights(scores, -math.log(n)), np.exp(scores) / n
    sums, largest = p.sum(1), float(np.abs(scores).max())
    low, high = (1 / (math.exp(sign * largest) + 1 / n) for sign in (1, -1))
    exact, mean, limit = mean_row_sum(n, t), float(sums.mean()), math.exp(t * t / 2)
    within = max(at_most(sums.max(), high), at_least(sums.min(), low))
    strayed = on_average(mean, exact, float(sums.std(ddof=1)) / math.sqrt(len(sums)))
    far = float((np.abs(frozen - p) / frozen**2).max())
    return [
        ("sum of a row", n, t, float(sums.max()), "", high, within),
        ("mean sum", n, t, mean, "", exact, strayed),
        ("mean sum, any n", n, t, exact, "", limit, at_most(exact, limit)),
        ("less than softmax's", n, t, far, "", 1.0, at_most(far, 1.0)),
    ]


def _random(rng: np.random.Generator, n: int, a: float) -> Layer:
    A = rng.normal(size=(WIDTH, WIDTH))
    W = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    return unit_keys(rng, n, WIDTH), A * (a / _spectral(A)), W


def _equal(rng: np.random.Generator, n: int, a: float) -> Layer:
    """One unit vector n times; A is a multiple of the identity, W the identity."""
    return np.repeat(unit_keys(rng, 1, WIDTH), n, 0), a * np.eye(WIDTH), np.eye(WIDTH)


def _norm(inputs: Layer, bias: float) -> tuple[float, float]:
    """The Jacobian's norm, and softmax's."""
    return _spectral(jacobian(*inputs, bias)), _spectral(jacobian(*inputs, None))


def _spectral(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(matrix, 2))


_evidence = partial(Evidence.of_ratios, "what is measured, as a share of what is promised", COLUMNS)


THEOREM = Theorem(
    id="sigmoid-regularity",
    title="how much sigmoid attention amplifies",
    statement=(
        r"Let $O(X) = \sigma(X A X^\top + b)\, X W$ for $n$ tokens with $\lVert x_i \rVert \le R$, "
        r"$S = X A X^\top$, $P = \sigma(S + b)$ and $a = \lVert A \rVert_2 R^2$. (a) The Jacobian's"
        r" norm is at most $\lVert W \rVert_2 (\lVert P \rVert_2 + 2 \max_{ij} P_{ij}(1 - P_{ij}) "
        r"\lVert A \rVert_2 \lVert X \rVert_2^2)$, with equality if all tokens are equal, $A$ is a "
        r"nonnegative multiple of $I$ and $W = I$. (b) For $b = -\log n$ it is at most $\lVert W "
        r"\rVert_2\, e^a (1 + 2a)$, whatever $n$; for any $b$ at most $\lVert W \rVert_2\, n (1 + "
        r"a/2)$; for $b = 0$, equal tokens and $A = \alpha I$, $\alpha \ge 0$, at least $\lVert W "
        r"\rVert_2\, n / 2$. (c) For $b = -\log n$ a row sums to a number in $[1/(e^a + 1/n), "
        r"1/(e^{-a} + 1/n)]$, each weight is $e^s/n$ less at most its square, and scores drawn from"
        r" $N(0, t^2)$ give rows whose mean sum tends to $e^{t^2/2}$ from below."
    ),
    assumptions=(
        r"$b = -\log n$, where a bound is to hold whatever $n$",
        r"no token is longer than $R$",
        "every row sees all $n$ tokens",
    ),
    source=Paper(
        "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        "Ramapuram et al.",
        2024,
        "2409.04431",
        "ICLR 2025",
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"$dO = P\, dX\, W + [\sigma'(S+b) \circ (dX A X^\top + X A\, dX^\top)] X W$. The first "
        r"term is at most $\lVert P \rVert_2 \lVert dX \rVert_F \lVert W \rVert_2$; the bracket's "
        r"Frobenius norm is at most $\max \sigma' \cdot 2 \lVert A \rVert_2 \lVert X \rVert_2 "
        r"\lVert dX \rVert_F$, and $X W$ multiplies it by $\lVert X \rVert_2 \lVert W \rVert_2$. "
        r"For (b), $\lVert X \rVert_2^2 \le n R^2$, $\lVert P \rVert_2 \le n \max P$, and $P$ and "
        r"$P(1-P)$ are at most $e^a/n$, or $1$ and $1/4$. At equal tokens and $dX = 1 u^\top$ with "
        r"$u$ the tokens' direction all terms add up. For (c), $\sigma(s - \log n) = 1/(1 + n "
        r"e^{-s})$ grows with $s$, and $e^s/n$ less it is $(e^s/n)\, e^s/(n + e^s)$; the limit is "
        r"dominated convergence."
    ),
)
