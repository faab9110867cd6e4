r"""A layer of attention with random heads, as a kernel or head by head, and its rival, a network.

    f(x_0; x_1..x_N) = (1/N) Σ_i Σ_m act(<W_m + c W_0, x̃_0 x̃_i^T>) <v_m, x̃_i>,     x̃ = [x; 1]

Only the v_m are learnt; W_m is Gaussian and W_0 the identity on the first d coordinates. Inputs are
"n N+1 d", the query first. Infinitely many heads are a kernel: for the linear activation that of
the features x̃_0 ⊗ mean(x̃_i ⊗ x̃_i) and c mean(<x_0, x_i> x̃_i), for the ReLU the arc-cosine kernel of
the pairs times <x̃_i, x̃_j'>, averaged.
"""

import numpy as np


def extended(x: np.ndarray) -> np.ndarray:
    """x̃, with a one at the end."""
    return np.concatenate([x, np.ones((*x.shape[:-1], 1))], -1)


def linear_features(x: np.ndarray, bias: float = 0.0) -> np.ndarray:
    """Features whose products are the kernel of linear heads drawn around `bias` times W_0."""
    tokens = extended(x)
    moment = np.einsum("nia,nib->nab", tokens[:, 1:], tokens[:, 1:]) / (x.shape[1] - 1)
    centred = np.einsum("na,nbc->nabc", tokens[:, 0], moment).reshape(len(x), -1)
    scores = np.einsum("nd,nid->ni", x[:, 0], x[:, 1:])
    return np.concatenate([centred, bias * _mixed(scores, tokens[:, 1:])], 1)


def relu_kernel(x: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of infinitely many ReLU heads, drawn around nothing."""
    a, b = extended(x), extended(other)
    query = (a[:, 0] @ b[:, 0].T)[:, :, None, None]
    keys = np.einsum("nia,mja->nmij", a[:, 1:], b[:, 1:])
    sizes = (np.linalg.norm(y[:, :1], axis=-1) * np.linalg.norm(y[:, 1:], axis=-1) for y in (a, b))
    left, right = sizes
    arc = arc_cosine(left[:, None, :, None] * right[None, :, None, :], query * keys)
    return (arc * keys).mean((2, 3))


def network_kernel(x: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of an infinite two-layer ReLU network on all numbers of the input at once, and a bias."""
    flat = [y.reshape(len(y), -1) for y in (x, other)]
    a, b = (np.concatenate([y, np.full((len(y), 1), y.shape[1] ** 0.5)], 1) for y in flat)
    sizes = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None]
    return arc_cosine(sizes, a @ b.T)


def network_features(x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """The hidden units of such a network of width M, `hidden` "M (N+1)d+1"."""
    flat = x.reshape(len(x), -1)
    flat = np.concatenate([flat, np.full((len(x), 1), flat.shape[1] ** 0.5)], 1)
    return np.maximum(flat @ hidden.T, 0) / len(hidden) ** 0.5


def arc_cosine(sizes: np.ndarray, products: np.ndarray) -> np.ndarray:
    """E relu(w·a) relu(w·b), w normal, from |a||b| and a·b: |a||b| (sin θ + (π - θ) cos θ) / 2π."""
    cosine = np.clip(products / sizes, -1, 1)
    angle = np.arccos(cosine)
    return sizes * (np.sin(angle) + (np.pi - angle) * cosine) / (2 * np.pi)


def head_features(x: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """What M linear heads "M d+1 d+1" read out, "n M(d+1)".

    Raises:
      ValueError: heads of another width.
    """
    tokens = extended(x)
    if heads.shape[1:] != (tokens.shape[-1],) * 2:
        raise ValueError(f"heads: expected width {tokens.shape[-1]}, got {heads.shape[1:]}.")
    scores = np.einsum("na,mab,nib->nmi", tokens[:, 0], heads, tokens[:, 1:])
    out = np.einsum("nmi,nib->nmb", scores, tokens[:, 1:])
    return out.reshape(len(x), -1) / (x.shape[1] - 1)


def ridge(kernel: np.ndarray, cross: np.ndarray, y: np.ndarray, share: float = 1e-12) -> np.ndarray:
    """Kernel ridge regression, with λ a `share` of the mean of the kernel's diagonal."""
    return cross @ np.linalg.solve(_regular(kernel, share), y)


def power(
    kernel: np.ndarray, cross: np.ndarray, diagonal: np.ndarray, share: float = 1e-12
) -> np.ndarray:
    """P_n(x) = √(K(x,x) - K(x,X) (K + λ)^-1 K(X,x)), the most a unit function can be missed by."""
    known = (cross * np.linalg.solve(_regular(kernel, share), cross.T).T).sum(1)
    return np.sqrt(np.maximum(diagonal - known, 0))


def products(x: np.ndarray, along: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The target (1/N) Σ_i <b, x_i><u, x_i>, which does not ask the query."""
    return ((x[:, 1:] @ along) * (x[:, 1:] @ other)).mean(1)


def correlations(x: np.ndarray, along: np.ndarray) -> np.ndarray:
    """The target (1/N) Σ_i <x_0, x_i><u, x_i>."""
    return _mixed(np.einsum("nd,nid->ni", x[:, 0], x[:, 1:]), x[:, 1:]) @ along


def _mixed(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.einsum("ni,nib->nb", scores, values) / values.shape[1]


def _regular(kernel: np.ndarray, share: float) -> np.ndarray:
    return kernel + share * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
