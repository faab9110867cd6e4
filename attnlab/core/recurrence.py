r"""The linear-state monoid: one state, three forms.

    S_t = diag(exp(g_t)) S_{t-1} + k_t (v_t - S_{t-1}^T e_t)^T,      o_t = S_t^T q_t

The state S "H D" is a memory: a key writes its value, a query reads.  The log decay g forgets;
what the key e reads is erased in the same step.  Without g and e this is linear attention
(Katharopoulos et al. 2020, arXiv:2006.16236); a number g per head is retention (Sun et al. 2023,
arXiv:2307.08621); one per step Mamba-2 (Dao & Gu 2024, arXiv:2405.21060); one per channel gated
linear attention (Yang et al. 2023, arXiv:2312.06635); e = beta k with the value beta v is the delta
rule, whose chunks take the WY form (Yang et al. 2024, arXiv:2406.06484).

*recurrent* takes a step at a time, *chunked* a chunk at a time by matrix products, *parallel* the
whole sequence as one chunk.  All give the same numbers up to rounding; no decay, however strong,
overflows in any (`decay_tree`).  Everything is computed in float32, or float64 if that is given.
"""

import contextvars
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attnlab.core.inputs import check_inputs
from attnlab.core.recurrence_forms import Steps, chunked, cleared, parallel, recurrent
from attnlab.core.recurrence_kernels import BACKENDS, best, kernel_recurrence
from attnlab.core.reference import heads_first

FORMS = ("parallel", "chunked", "recurrent")
IMPLEMENTATIONS = (*FORMS, *BACKENDS)
CHUNK_SIZE = 64
SHORTEST_CHUNKED = 4  # from how many steps on "auto" takes chunks

# What computes a recurrence in place of `solve`; `attnlab.distributed.over` puts a mesh here.
spread: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("spread", default=None)


def linear_recurrence(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B T K H"],
    value: Float[Array, "*B T K D"],
    *,
    log_decay: Float[Array, "..."] | None = None,
    erase: Float[Array, "*B T K H"] | None = None,
    reset: Bool[Array, "*B T"] | None = None,
    initial_state: Float[Array, "*B K H D"] | None = None,
    implementation: str = "auto",
    chunk_size: int = CHUNK_SIZE,
    return_state: bool = False,
) -> Any:
    r"""Write, forget, erase and read, step by step: "*B T N D".

    Args:
      query, key, value: K divides N; the queries of N / K heads read the same state.
      log_decay: g <= 0, natural logarithm: "K" for a constant per head, "*B T K" for one per step,
        "*B T K H" for one per step and key channel; -inf clears.  None: nothing is forgotten.
      erase: what is read from the state before it decays, and taken away.  None: nothing is.
      reset: True where the state is cleared before the step, as at the start of each packed
        document (`resets`).
      initial_state: the state before the first step, zeros by default; float32 (float64 for such
        inputs).
      implementation: "parallel", "chunked", "recurrent", a fused kernel, "triton" or "tpu", or
        "auto": recurrent for fewer than 4 steps, else the kernel of the device, if it has one that
        serves the call, else chunked.
      chunk_size: steps at a time in the chunked form; it need not divide T.
      return_state: also return the state after the last step, "*B K H D".

    Returns:
      "*B T N D" in the dtype of the query, or that and the state.  A sequence without steps gives
      an empty output and the initial state.

    Raises:
      TypeError: inputs that are no floating-point arrays or differ in dtype; a state or a reset of
        another dtype.
      ValueError: shapes that do not fit, a log decay above 0 (where its values are known, that is
        outside of jit), a chunk size below 1, an unknown implementation.
      NotImplementedError: a kernel that cannot serve the call, or whose device is not here.
    """
    query, key, value = check_inputs(query, key, value, empty=True)
    if query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"key: length {key.shape[-3]} differs from that of query, {query.shape[-3]}; "
            "a recurrence reads and writes at every step."
        )
    check_implementation(implementation)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: expected a positive int, got {chunk_size!r}.")
    dtype = state_dtype(query.dtype)
    state = _initial(initial_state, key, value, dtype)
    steps = Steps(
        _grouped_heads(query, key.shape[-2]), heads_first(key), heads_first(value),
        _decay(log_decay, key), _erase(erase, key),
    )  # fmt: skip
    if steps.log_decay is not None:
        steps = steps._replace(log_decay=steps.log_decay.astype(dtype))
    if reset is not None:
        steps = cleared(steps, _reset(reset, key), dtype)
    run = spread.get() or solve
    out, state = run(steps, state, implementation, chunk_size)
    out = _ungrouped(out).astype(query.dtype)
    return (out, state) if return_state else out


def check_implementation(name: Any) -> None:
    """Raise ValueError unless this names an implementation of the recurrence, or "auto"."""
    if name not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f'implementation: expected "auto" or one of {", ".join(IMPLEMENTATIONS)}, got {name!r}.'
        )


def resets(segment_ids: Int[Array, "*B T"]) -> Bool[Array, "*B T"]:
    """Where a new segment begins: True where the id differs from that of the step before."""
    same = segment_ids[..., 1:] == segment_ids[..., :-1]
    return jnp.concatenate([jnp.zeros_like(segment_ids[..., :1], bool), ~same], -1)


def state_dtype(dtype: Any) -> Any:
    """What the state is kept in, for inputs of this dtype."""
    return jnp.dtype("float64") if dtype == jnp.float64 else jnp.dtype("float32")


def solve(steps: Steps, state: Array, implementation: str, chunk_size: int) -> tuple[Array, Array]:
    """Output "*B K G T D" and the last state, on the devices its arrays are on.

    Decays have the dtype of the state, all else that of the inputs, which kernels take.
    """
    length = steps.key.shape[-2]
    if not length:
        shape = (*steps.query.shape[:-1], steps.value.shape[-1])
        return jnp.zeros(shape, state.dtype), state
    if implementation == "auto":
        short = length < SHORTEST_CHUNKED
        implementation = "recurrent" if short else best(steps) or "chunked"
    if implementation in BACKENDS:
        return kernel_recurrence(steps, state, implementation)
    steps = jax.tree.map(lambda x: x.astype(state.dtype), steps)
    if implementation == "recurrent":
        return recurrent(steps, state)
    if implementation == "parallel":
        return parallel(steps, state)
    return chunked(steps, state, chunk_size)


def _grouped_heads(query: Array, kv_heads: int) -> Array:
    x = heads_first(query)
    return x.reshape(*x.shape[:-3], kv_heads, x.shape[-3] // kv_heads, *x.shape[-2:])


def _ungrouped(out: Array) -> Array:
    out = out.reshape(*out.shape[:-4], out.shape[-4] * out.shape[-3], *out.shape[-2:])
    return jnp.swapaxes(out, -2, -3)


def _decay(log_decay: Any, key: Array) -> Array | None:
    """The log decay with its channels as the last axis, "*B K T X"."""
    if log_decay is None:
        return None
    g = _floating("log_decay", log_decay)
    *batch, length, heads, _ = key.shape
    shapes = ((heads,), (*batch, length, heads), tuple(key.shape))
    if g.shape not in shapes:
        raise ValueError(
            f"log_decay: expected a shape of {' or '.join(map(str, shapes))}, (K), (*B, T, K) or "
            f"(*B, T, K, H), got {g.shape}."
        )
    # In NumPy: a constant within jit has values, but what JAX computes of them there has none.
    if not isinstance(g, jax.core.Tracer) and g.size and not np.all(np.asarray(g) <= 0):
        raise ValueError(
            "log_decay: expected logarithms of decays in [0, 1], none above 0, got "
            f"{np.max(np.asarray(g))}."
        )
    if g.shape == (heads,):
        g = jnp.broadcast_to(jnp.expand_dims(g, range(len(batch) + 1)), (*batch, length, heads))
    return heads_first(g if g.shape == key.shape else g[..., None])


def _erase(erase: Any, key: Array) -> Array | None:
    if erase is None:
        return None
    erase = _floating("erase", erase)
    if erase.shape != key.shape:
        raise ValueError(f"erase: expected the shape of key, {key.shape}, got {erase.shape}.")
    return heads_first(erase)


def _reset(reset: Any, key: Array) -> Array:
    if getattr(reset, "dtype", None) != jnp.bool_:
        raise TypeError(f"reset: expected booleans, got {getattr(reset, 'dtype', type(reset))}.")
    if reset.shape != key.shape[:-2]:
        raise ValueError(f"reset: expected shape {key.shape[:-2]} (*B, T), got {reset.shape}.")
    return jnp.asarray(reset)


def _initial(state: Any, key: Array, value: Array, dtype: Any) -> Array:
    *batch, _, heads, width = key.shape
    shape = (*batch, heads, width, value.shape[-1])
    if state is None:
        return jnp.zeros(shape, dtype)
    state = _floating("initial_state", state)
    if state.shape != shape:
        raise ValueError(f"initial_state: expected shape {shape} (*B, K, H, D), got {state.shape}.")
    if state.dtype != dtype:
        raise TypeError(f"initial_state: expected dtype {dtype}, got {state.dtype}.")
    return state


def _floating(name: str, x: Any) -> Array:
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name}: expected a floating-point array, got {getattr(x, 'dtype', type(x).__name__)}."
        )
    return jnp.asarray(x)
