r"""Sequence models as one linear system with coefficients that vary in time.

    h_i = Λ_i h_{i-1} + B_i u_i,      y_i = C_i h_i + D_i u_i,      h_0 = 0

The state h has N = n d numbers, n to each of the d channels of u. Here are Λ, B, C and D of linear
attention with any normaliser, of S6 (Mamba), of the quasi-LSTM and of the RG-LRU; Λ is diagonal in
all of them. Everything is float64 NumPy and dense, to be read and not to be fast. For attention u
is the value, so the paper's W_V sits in u; the channels are slowest in h: (channel, feature).

Sieber et al. (2024), arXiv:2405.15731, section 3. S6 and the quasi-LSTM follow their code,
github.com/IntelligentControlSystems/dsf-mqar; the RG-LRU is De et al.'s (2024), arXiv:2402.19427.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class System(NamedTuple):
    """Λ's diagonal, B, C and D for every step; N = n d is the state's size."""

    transition: Float[np.ndarray, "T N"]
    write: Float[np.ndarray, "T N d"]
    read: Float[np.ndarray, "T d N"]
    skip: Float[np.ndarray, "T d d"]


def scan(system: System, inputs: Float[np.ndarray, "T d"]) -> Float[np.ndarray, "T d"]:
    """Run the system a step at a time: the outputs y."""
    state, outputs = np.zeros(system.transition.shape[1]), []
    for decay, write, read, skip, u in zip(*system, inputs, strict=True):
        state = decay * state + write @ u
        outputs.append(read @ state + skip @ u)
    return np.stack(outputs)


def linear_attention(
    query: Float[np.ndarray, "T n"],
    key: Float[np.ndarray, "T n"],
    channels: int,
    normaliser: Float[np.ndarray, " T"] | None = None,
) -> System:
    """Λ_i = (η_{i-1}/η_i) I, B_i = (1/η_i) I ⊗ ψ(k_i), C_i = I ⊗ ψ(q_i)^T, of features ψ.

    η is `normaliser`, Σ_{j≤i} ψ(q_i)·ψ(k_j) by default. That one may fall as well as rise, since
    each step asks for it with a query of its own; what is kept in h is then scaled up again.
    """
    eta = normalisers(query, key) if normaliser is None else normaliser
    ratio = np.concatenate([np.ones(1), eta[:-1]]) / eta
    eye = np.eye(channels)
    return System(
        transition=np.repeat(ratio[:, None], key.shape[1] * channels, 1),
        write=np.stack([np.kron(eye, k[:, None] / e) for k, e in zip(key, eta, strict=True)]),
        read=np.stack([np.kron(eye, q[None, :]) for q in query]),
        skip=np.zeros((len(key), channels, channels)),
    )


def normalisers(
    query: Float[np.ndarray, "T n"], key: Float[np.ndarray, "T n"]
) -> Float[np.ndarray, " T"]:
    """η_i = ψ(q_i) · Σ_{j≤i} ψ(k_j)."""
    return (query * np.cumsum(key, 0)).sum(1)


def selective(
    log_decay: Float[np.ndarray, "d n"],
    step: Float[np.ndarray, "T d"],
    write: Float[np.ndarray, "T n"],
    read: Float[np.ndarray, "T n"],
    skip: Float[np.ndarray, " d"],
) -> System:
    """S6: Λ_i = exp(Δ_i A), B_i = Δ_i ⊗ b_i, C_i = I ⊗ c_i^T, D = diag(skip), for A < 0, Δ > 0.

    `log_decay` is A. One number for all of A and one Δ_i for all channels make Mamba-2's SSD of it.
    """
    channels = log_decay.shape[0]
    eye = np.eye(channels)
    return System(
        transition=np.exp(step[:, :, None] * log_decay).reshape(len(step), -1),
        write=np.stack([
            np.kron(np.diag(s), b[:, None]) for s, b in zip(step, write, strict=True)
        ]),
        read=np.stack([np.kron(eye, c[None, :]) for c in read]),
        skip=np.broadcast_to(np.diag(skip), (len(step), channels, channels)),
    )  # fmt: skip


def quasi_lstm(
    forget: Float[np.ndarray, "T d"],
    gate: Float[np.ndarray, "T d"],
    output: Float[np.ndarray, "T d"],
    power: float | None = None,
) -> System:
    """Λ_i = diag σ(f_i), B_i = diag σ(i_i), C_i = diag σ(o_i); n = 1, gates drawn from the input.

    With `power` a the forget gate is S6's, σ(-f)^a, the "reversed sigmoid".
    """
    decay = sigmoid(forget) if power is None else sigmoid(-forget) ** power
    return _diagonal(decay, sigmoid(gate), sigmoid(output))


def rg_lru(
    parameter: Float[np.ndarray, " d"],
    recurrence: Float[np.ndarray, "T d"],
    gate: Float[np.ndarray, "T d"],
    sharpness: float = 8.0,
) -> System:
    """Λ_i = a_i = exp(-c softplus(parameter) σ(r_i)), B_i = √(1-a_i²) σ(gate_i), C = I; n = 1."""
    decay = np.exp(-sharpness * np.logaddexp(0, parameter) * sigmoid(recurrence))
    return _diagonal(decay, np.sqrt(1 - decay**2) * sigmoid(gate), np.ones_like(decay))


def _diagonal(decay: np.ndarray, write: np.ndarray, read: np.ndarray) -> System:
    eye = np.eye(decay.shape[1])
    none = np.zeros((len(decay), *eye.shape))
    return System(decay, write[:, :, None] * eye, read[:, :, None] * eye, none)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), without overflow."""
    return 0.5 * (1 + np.tanh(x / 2))


def taylor_features(x: Float[np.ndarray, "T H"], order: int) -> Float[np.ndarray, "T n"]:
    """Monomials x^α/√α! up to this order: ψ(q)·ψ(k) = Σ_{l≤p} (q·k)^l / l!, n = C(H+p, p)."""
    columns = []
    for degree in range(order + 1):
        for chosen in itertools.combinations_with_replacement(range(x.shape[1]), degree):
            times = math.prod(math.factorial(chosen.count(i)) for i in set(chosen))
            columns.append(x[:, list(chosen)].prod(1) / math.sqrt(times))
    return np.stack(columns, 1)
