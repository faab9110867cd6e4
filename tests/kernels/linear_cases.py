"""What the kernels of the linear-state recurrence are tested on, and the float64 loop beside it."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core.kernels import interpret, missing
from pallas_kernels.linear import Steps, linear_recurrence
from tests.kernels.cases import _CHEAP
from tests.oracles import directional
from tests.recurrences import recurrence
from tests.tolerances import as_float64, assert_close

BACKENDS = ("triton", "tpu")
DECAYS = ("none", "step", "channel")
CUTS = {"triton": {"chunk_size": 16, "value_block": 16}, "tpu": {"chunk_size": 16}}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and kind of a recurrence; `numbers` draws one."""

    batch: tuple[int, ...] = (2,)
    length: int = 37
    kv_heads: int = 1
    group: int = 2
    width: int = 8
    value_width: int = 20
    decay: str = "none"
    erase: bool = False
    strength: float = 1.0
    cleared: tuple[int, ...] = ()

    def numbers(self, seed=0, dtype=np.float32):
        """In the axes of the oracle; decays from almost none to e^-3 `strength` a step."""
        rng = np.random.default_rng(seed)
        steps = (*self.batch, self.length)

        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32)

        key = normal(*steps, self.kv_heads, self.width)
        key /= np.linalg.norm(key, axis=-1, keepdims=True)
        found = {
            "query": normal(*steps, self.kv_heads * self.group, self.width),
            "key": key,
            "value": normal(*steps, self.kv_heads, self.value_width),
        }
        if self.erase:
            found["erase"] = rng.uniform(0, 1.9, key.shape[:-1])[..., None] * key
        found = {name: np.asarray(jnp.asarray(x, dtype)) for name, x in found.items()}
        if self.decay != "none":
            shape = key.shape if self.decay == "channel" else key.shape[:-1]
            power = rng.uniform(-4, np.log10(self.strength) + 0.5, shape)
            g = -(10.0**power).astype(np.float32)
            g[..., list(self.cleared), *(slice(None),) * (1 + (self.decay == "channel"))] = -np.inf
            found["log_decay"] = g
        shape = (*self.batch, self.kv_heads, self.width, self.value_width)
        return found | {"state": normal(*shape)}


def running(backend):
    """Compiled where the device is present, interpreted elsewhere."""
    return interpret() if missing(backend) else contextlib.nullcontext()


def jit(backend, function):
    return jax.jit(function, compiler_options=_CHEAP if missing(backend) else None)


def steps_of(query, key, value, log_decay=None, erase=None):
    """Heads before positions, queries by the key head they share."""

    def heads_first(x):
        return None if x is None else jnp.swapaxes(x, -2, -3)

    if log_decay is not None and log_decay.ndim < key.ndim:
        log_decay = log_decay[..., None]
    query, kv_heads = heads_first(query), key.shape[-2]
    query = query.reshape(*query.shape[:-3], kv_heads, -1, *query.shape[-2:])
    return Steps(query, *map(heads_first, (key, value, log_decay, erase)))


def in_time(out):
    """Heads behind positions again."""
    out = out.reshape(*out.shape[:-4], -1, *out.shape[-2:])
    return jnp.swapaxes(out, -2, -3)


def run(backend, numbers, **more):
    """Output and state by a kernel, in the axes of the oracle."""
    numbers = dict(numbers)
    state = numbers.pop("state")
    options = {**CUTS[backend], "interpret": missing(backend) is not None, **more}
    out, state = linear_recurrence(steps_of(**numbers), state, backend, **options)
    return in_time(out), state


def exact(numbers):
    return recurrence(**numbers)


def check_values(backend, problem, seed=0, dtype=np.float32, **more):
    numbers = problem.numbers(seed, dtype)
    given = {name: jnp.asarray(x) for name, x in numbers.items()}
    out, state = jit(backend, lambda given: run(backend, given, **more))(given)
    expected = exact({name: np.asarray(x, np.float64) for name, x in numbers.items()})
    assert out.dtype == dtype
    assert state.dtype == np.float32
    assert_close(out, expected[0], dtype, words="output")
    assert_close(state, expected[1], "float32", words="state")


def check_gradients(backend, problem, seed=0, **more):
    """Each array's gradient along a random direction, and the slope of the loop along it."""
    numbers = problem.numbers(seed)
    names = list(numbers)
    rng = np.random.default_rng(1)
    out_shape = (*numbers["query"].shape[:-1], problem.value_width)
    read = [rng.standard_normal(s) for s in (out_shape, numbers["state"].shape)]

    def loss(given):
        out = run(backend, given, **more)
        return sum(
            jnp.sum(jnp.sin(x) * r.astype(np.float32)) for x, r in zip(out, read, strict=True)
        )

    def oracle(*flat):
        out = exact(dict(zip(names, flat, strict=True)))
        return sum(np.sum(np.sin(x) * r) for x, r in zip(out, read, strict=True))

    found = jit(backend, jax.grad(loss))({k: jnp.asarray(x) for k, x in numbers.items()})
    wide = [np.asarray(x, np.float64) for x in numbers.values()]
    for index, name in enumerate(names):
        assert np.all(np.isfinite(found[name])), f"d {name} is not finite"
        direction = [np.zeros(x.shape) for x in wide]
        drawn = rng.standard_normal(wide[index].shape)
        direction[index] = np.where(np.isfinite(wide[index]), drawn, 0)
        slope = directional(oracle, wide, direction)
        along = np.sum(as_float64(found[name]) * direction[index])
        scale = max(1.0, np.linalg.norm(direction[index]))
        assert_close(along, slope, "float32", "gradient", scale=scale, words=f"d {name}")
