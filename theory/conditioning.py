r"""A conditioned memory and its stimuli, for the theorems that read attention as Pavlovian.

    S_t = S_{t-1} + k_t (v_t - S_{t-1}^T e_t)^T        a trial: stimulus k (CS) meets outcome v (US)
    o_t = S_t^T q_t                                    a test stimulus q asks what it foretells

e = 0 is Hebb's rule, and the response is linear attention without a normaliser; v and e both times
a rate β is Rescorla and Wagner's rule, known as the delta rule. The measured side of the theorems
is `respond`, attnlab's own recurrence in float32; what they predict is float64 NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.core.recurrence import linear_recurrence
from theory.theorem import Key


def respond(
    tests: np.ndarray, stimuli: np.ndarray, outcomes: np.ndarray, rate: float | None = None
) -> np.ndarray:
    """What each step's test stimulus foretells once that step's trial is stored.

    `tests` "*B T N H", `stimuli` "*B T N H", `outcomes` "*B T N D", N memories side by side; `rate`
    is the delta rule's β, None is Hebb's rule. Returns "*B T N D".
    """
    arrays = (jnp.asarray(x, jnp.float32) for x in (tests, stimuli, outcomes))
    run = _hebb if rate is None else _rescorla_wagner
    out = run(*arrays) if rate is None else run(*arrays, jnp.float32(rate))
    return np.asarray(out, np.float64)


def recall(
    stimuli: np.ndarray, outcomes: np.ndarray, tests: np.ndarray, rate: float | None = None
) -> np.ndarray:
    """Store all pairs "*B M H", "*B M D", then ask with "*B Q H": the responses "*B Q D"."""
    asked = tests.shape[-2]
    trials = np.concatenate([stimuli, np.zeros_like(tests)], -2)
    ends = np.zeros((*outcomes.shape[:-2], asked, outcomes.shape[-1]))
    values = np.concatenate([outcomes, ends], -2)
    cues = np.concatenate([np.zeros_like(stimuli), tests], -2)
    out = respond(cues[..., None, :], trials[..., None, :], values[..., None, :], rate)
    return out[..., -asked:, 0, :]


@jax.jit
def _hebb(
    tests: Float[Array, "*B T N H"],
    stimuli: Float[Array, "*B T N H"],
    outcomes: Float[Array, "*B T N D"],
) -> Float[Array, "*B T N D"]:
    return linear_recurrence(tests, stimuli, outcomes)


@jax.jit
def _rescorla_wagner(
    tests: Float[Array, "*B T N H"],
    stimuli: Float[Array, "*B T N H"],
    outcomes: Float[Array, "*B T N D"],
    rate: Float[Array, ""],
) -> Float[Array, "*B T N D"]:
    written, erased = rate * outcomes, rate * stimuli
    return linear_recurrence(tests, stimuli, written, erase=erased, implementation="recurrent")


def unit_keys(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Independent directions, uniform on the unit sphere; the last axis is the width."""
    keys = rng.normal(size=shape)
    return keys / np.linalg.norm(keys, axis=-1, keepdims=True)


def correlated_keys(rng: np.random.Generator, share: float, *shape: int) -> np.ndarray:
    """Unit keys with one direction in common, of which each has the part `share`."""
    common = unit_keys(rng, *shape[:-2], 1, shape[-1])
    own = unit_keys(rng, *shape)
    own -= (own * common).sum(-1, keepdims=True) * common
    own /= np.linalg.norm(own, axis=-1, keepdims=True)
    return share * common + np.sqrt(1 - share**2) * own


def orthonormal_keys(rng: np.random.Generator, pairs: int, width: int) -> np.ndarray:
    """`pairs` orthonormal directions in `width` >= `pairs` dimensions, as rows."""
    if pairs > width:
        raise ValueError(f"pairs: at most {width} directions of width {width} exist, got {pairs}.")
    return np.linalg.qr(rng.normal(size=(width, pairs)))[0].T


def generator(key: Key | None) -> np.random.Generator:
    """NumPy's random numbers, seeded by a JAX key; by key 0 if there is none."""
    key = jax.random.key(0) if key is None else key
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())


def standard_error(trials: np.ndarray) -> float:
    """Of the mean over independent trials, the first axis."""
    means = trials.reshape(len(trials), -1).mean(1)
    return float(means.std(ddof=1) / np.sqrt(len(means)))
