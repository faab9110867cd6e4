r"""One linear system for attention, state spaces and gated recurrence, and where two of them meet.

    h_i = Λ_i h_{i-1} + B_i u_i,      y_i = C_i h_i + D_i u_i

with coefficients that depend on the input: `dsf_forms` has them. Linear attention with a normaliser
η has Λ_i = (η_{i-1}/η_i) I and a selective state space Λ_i = exp(Δ_i A), so the two coincide when A
is a multiple of the identity, -a I, and all channels share Δ_i:

    Δ_i = log(η_i/η_{i-1}) / a,     b_i = ψ(k_i) / (Δ_i η_i),     c_i = ψ(q_i)

from left to right for any η that rises, from right to left for any Δ > 0. Two decay rates in A, and
no normaliser will do: the weights w_ij of linear attention, divided by ψ(q_i)·ψ(k_j), have rank one
over i ≥ j, and those of S6 then have more. The framework is Sieber et al.'s; that the forms equal
attnlab's own attention and recurrence, and by how much the rest misses, is measured here.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core.entry import Paper
from attnlab.core.recurrence import linear_recurrence
from theory import dsf_forms as forms
from theory.conditioning import generator
from theory.theorem import Cell, Evidence, Key, Theorem

STEPS, CHANNELS, FEATURES = 48, 5, 4
ROUNDING = 128 * float(np.finfo(np.float32).eps)  # of the largest output
COLUMNS = ("system", "against", "state", "error", "share of rounding")

Draw = dict[str, np.ndarray]


def check(key: Key | None = None) -> Evidence:
    """Each model as a system against attnlab's recurrence; then either of two as the other."""
    drawn = _draw(generator(key))
    rows = [row(drawn) for row in (_linear, _s6, _quasi_lstm, _rg_lru, _as_attention, _as_ssm)]
    return _evidence(rows, f"{STEPS} steps, {CHANNELS} channels; float64 systems, float32 attnlab")


def counter_check(key: Key | None = None) -> Evidence:
    """Decay rates that differ: the best normaliser still misses. And a normaliser that falls."""
    rng = generator(key)
    drawn, rows = _draw(rng), []
    for spread in (0.0, 0.3, 1.0):
        rates = -np.exp(spread * np.linspace(-1, 1, FEATURES))
        rows.append(_best_fit(drawn, rates, f"S6, rates e^±{spread:g}"))
    return _evidence(
        [*rows, _falling(drawn)],
        "S6 against the best normaliser by least squares; a falling one against a clipped step",
    )


def _draw(rng: np.random.Generator) -> Draw:
    """Inputs, gates and positive features; steps Δ for every channel."""
    wide, narrow = (STEPS, CHANNELS), (STEPS, FEATURES)
    normal = {name: rng.normal(size=wide) for name in ("u", "f", "i", "o")}
    return normal | {
        "query": np.exp(0.5 * rng.normal(size=narrow)),
        "key": np.exp(0.5 * rng.normal(size=narrow)),
        "step": np.logaddexp(0, rng.normal(size=wide) - 2),
        "rates": -np.exp(0.5 * rng.normal(size=(CHANNELS, FEATURES))),
        "skip": rng.normal(size=CHANNELS),
    }


def _linear(x: Draw) -> tuple[Cell, ...]:
    system = forms.linear_attention(x["query"], x["key"], CHANNELS)
    ours = recurrence(x["query"], x["key"], np.concatenate([x["u"], np.ones((STEPS, 1))], 1))
    return _compare(
        "linear attention", "linear_recurrence", system, x["u"], ours[:, :-1] / ours[:, -1:]
    )


def _s6(x: Draw) -> tuple[Cell, ...]:
    """Every channel is a head whose key channels decay at rates of their own."""
    system = forms.selective(x["rates"], x["step"], x["key"], x["query"], x["skip"])
    heads = (STEPS, CHANNELS, FEATURES)
    query, key = (np.broadcast_to(x[name][:, None], heads) for name in ("query", "key"))
    written = (x["step"] * x["u"])[:, :, None]
    ours = _heads(query, key, written, x["step"][:, :, None] * x["rates"])[:, :, 0]
    return _compare("S6", "linear_recurrence", system, x["u"], ours + x["skip"] * x["u"])


def _quasi_lstm(x: Draw) -> tuple[Cell, ...]:
    system = forms.quasi_lstm(x["f"], x["i"], x["o"])
    ours = gated(np.log(forms.sigmoid(x["f"])), forms.sigmoid(x["i"]) * x["u"])
    return _compare("quasi-LSTM", "linear_recurrence", system, x["u"], forms.sigmoid(x["o"]) * ours)


def _rg_lru(x: Draw) -> tuple[Cell, ...]:
    system = forms.rg_lru(x["rates"][:, 0], x["f"], x["i"])
    written = np.sqrt(1 - system.transition**2) * forms.sigmoid(x["i"]) * x["u"]
    return _compare(
        "RG-LRU", "linear_recurrence", system, x["u"], gated(np.log(system.transition), written)
    )


def _as_attention(x: Draw) -> tuple[Cell, ...]:
    """A selective SSM with one decay, as attention: keys η_i Δ_i b_i, outputs divided by η_i."""
    step = x["step"][:, :1]
    one = np.repeat(step, CHANNELS, 1)
    system = forms.selective(
        -np.ones((CHANNELS, FEATURES)), one, x["key"], x["query"], 0 * x["skip"]
    )
    eta = np.exp(np.cumsum(step, 0))
    ours = recurrence(x["query"], eta * step * x["key"], x["u"]) / eta
    return _compare("selective SSM, A = -I", "linear attention", system, x["u"], ours)


def _as_ssm(x: Draw) -> tuple[Cell, ...]:
    """Linear attention with a normaliser that rises, as a state space that decays by its growth."""
    eta = np.cumsum(x["key"].sum(1))
    system = forms.linear_attention(x["query"], x["key"], CHANNELS, eta)
    step, write = as_selective(x["key"], eta)
    ours = recurrence(x["query"], step[:, None] * write, x["u"], -step)
    return _compare("linear attention, η rises", "selective SSM", system, x["u"], ours)


def as_selective(key: np.ndarray, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Δ and b of the selective SSM with A = -I that is linear attention with normaliser η.

    η_0, on which nothing depends as h_0 = 0, is put at η_1/e.
    """
    step = np.diff(np.log(eta), prepend=np.log(eta[0]) - 1)
    return step, key / (step * eta)[:, None]


def _best_fit(x: Draw, rates: np.ndarray, name: str) -> tuple[Cell, ...]:
    """How much of S6's weights no g_i h_j ψ(q_i)·ψ(k_j) reaches, g and h fitted in turns."""
    run = np.cumsum(x["step"][:, :1] * rates, 0)
    weights = np.tril(np.einsum("in,jn->ij", x["query"] * np.exp(run), x["key"] * np.exp(-run)))
    plain, after = np.tril(x["query"] @ x["key"].T), np.exp(-run.mean(1))
    for _ in range(200):
        ready = plain * after
        before = (weights * ready).sum(1) / (ready**2).sum(1)
        ready = plain * before[:, None]
        after = (weights * ready).sum(0) / (ready**2).sum(0)
    missed = np.abs(weights - before[:, None] * plain * after).max() / np.abs(weights).max()
    return (name, "linear attention", FEATURES, float(missed), float(missed / ROUNDING))


def _falling(x: Draw) -> tuple[Cell, ...]:
    """A normaliser with falls in it wants Δ < 0, which the state space clips."""
    eta = np.exp(0.3 * np.cumsum(x["f"][:, 0]))
    system = forms.linear_attention(x["query"], x["key"], CHANNELS, eta)
    step, _ = as_selective(x["key"], eta)
    ours = recurrence(x["query"], x["key"] / eta[:, None], x["u"], -np.maximum(step, 0))
    return _compare("linear attention, η falls", "selective SSM", system, x["u"], ours)


def recurrence(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, log_decay: np.ndarray | None = None
) -> np.ndarray:
    """The recurrence of attnlab with one head: "T n", "T n", "T D" and a log decay "T" to "T D"."""
    decay = None if log_decay is None else log_decay[:, None, None] + 0 * key[:, None]
    return _heads(query[:, None], key[:, None], value[:, None], decay)[:, 0]


def gated(log_decay: np.ndarray, written: np.ndarray) -> np.ndarray:
    """h_i = a_i h_{i-1} + w_i, channel by channel, "T d": a head each, of width one."""
    one = np.ones_like(written)[:, :, None]
    return _heads(one, one, written[:, :, None], log_decay[:, :, None])[:, :, 0]


def _heads(*arrays: np.ndarray | None) -> np.ndarray:
    ready = (None if x is None else jnp.asarray(x, jnp.float32) for x in arrays)
    query, key, value, log_decay = ready
    run: Callable[..., jax.Array] = linear_recurrence
    return np.asarray(
        run(query, key, value, log_decay=log_decay, implementation="recurrent"), np.float64
    )


def _compare(
    name: str, against: str, system: forms.System, inputs: np.ndarray, ours: np.ndarray
) -> tuple[Cell, ...]:
    expected = forms.scan(system, inputs)
    error = float(np.abs(expected - ours).max() / np.abs(expected).max())
    return (name, against, system.transition.shape[1], error, error / ROUNDING)


_evidence = partial(
    Evidence.of_ratios, "largest difference of two forms, as a share of rounding", COLUMNS
)


THEOREM = Theorem(
    id="dsf",
    title="attention, state spaces and gates in one system",
    statement=(
        r"Linear attention, S6, the quasi-LSTM and the RG-LRU are systems $h_i = \Lambda_i h_{i-1}"
        r" + B_i u_i$, $y_i = C_i h_i + D_i u_i$ with diagonal $\Lambda_i$. Linear attention with "
        r"features $\psi$ and normaliser $\eta$ has $\Lambda_i = \frac{\eta_{i-1}}{\eta_i} I$, "
        r"$B_i = \frac{1}{\eta_i} I \otimes \psi(k_i)$, $C_i = I \otimes \psi(q_i)^\top$; S6 has "
        r"$\Lambda_i = e^{\Delta_i A}$, $B_i = \Delta_i \otimes b_i$, $C_i = I \otimes c_i^\top$. "
        r"They coincide when $A = -aI$, the channels share $\Delta_i > 0$, and $\eta_i = "
        r"\eta_{i-1} e^{a \Delta_i}$, $\psi(k_i) = \eta_i \Delta_i b_i$, $\psi(q_i) = c_i$."
    ),
    assumptions=(
        "one decay rate: $A$ is a multiple of the identity and all channels share the step",
        "the normaliser rises, since a state space with $A < 0$ and a positive step only decays",
    ),
    source=Paper(
        "Understanding the differences in Foundation Models: Attention, State Space Models, and "
        "Recurrent Neural Networks",
        "Sieber et al.",
        2024,
        "2405.15731",
        "NeurIPS 2024",
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"Unrolled, $y_i = \sum_{j \le i} C_i \Lambda_i \cdots \Lambda_{j+1} B_j u_j$. With a "
        r"scalar $\Lambda$ the product is $\eta_j/\eta_i$, or $e^{-a(\Delta_{j+1} + \dots + "
        r"\Delta_i)}$, and the substitution makes the two sums equal term by term. With rates $a_1"
        r" \ne a_2$ the weight is $\sum_s c_{is} b_{js} e^{-a_s(\Delta_{j+1} + \dots + "
        r"\Delta_i)}$, whose quotient by $\sum_s c_{is} b_{js}$ is a product of a factor in $i$ "
        r"and one in $j$ for no generic $b$ and $c$."
    ),
)
