"""The kernels under test, and what they are tested on: every term said twice, with its parameters.

A *part* is a modifier or a normalizer as a function of its trainable arrays, once for attnlab and
once for the oracle; masks are the pairs of `tests.core.draw`.  `run` computes a call by a kernel,
`check` compares it with the float64 formula: output, log-sum-exp, and the gradient of each array.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attnlab
from attnlab import masks, normalizers, scores
from attnlab.core.dropout import keep_mask, key_words
from attnlab.core.kernels import BACKENDS, interpret, missing
from attnlab.core.terms import Tile
from tests import oracles
from tests.core import draw
from tests.core.draw import Pair, Sizes
from tests.tolerances import as_float64, assert_close, assert_within_budget

# What XLA for CPUs makes of an interpreted kernel runs in milliseconds; compiling it is the cost.
_CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation, the dtypes it computes in, tiles it can be given, and sizes of several
    such tiles."""

    name: str
    dtypes: tuple[Any, ...]
    block_sizes: tuple[tuple[int, int] | None, ...]
    sizes: tuple[Sizes, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def interpreted(self) -> bool:
        """The one switch: compiled where the device is present, interpreted elsewhere."""
        return missing(self.name) is not None

    @contextlib.contextmanager
    def running(self):
        with interpret() if self.interpreted else contextlib.nullcontext():
            yield

    def jit(self, function: Callable) -> Callable:
        compiled = jax.jit(function, compiler_options=_CHEAP if self.interpreted else None)

        def call(*args):
            with self.running():
                return compiled(*args)

        return call

    @property
    def dtype(self) -> Any:
        """The widest."""
        return self.dtypes[0]

    @property
    def blocks(self) -> Any:
        """The smallest tiles."""
        return self.block_sizes[0]

    @property
    def size(self) -> Sizes:
        """Several tiles both ways, neither length whole, grouped heads, widths that differ."""
        return self.sizes[0]


_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
_KNOWN = {
    "triton": Backend(
        "triton",
        _FLOATS,
        ((16, 16), (16, 32), (32, 16), None),
        (
            Sizes((2,), 23, 37, 4, 2, 8, 3),
            Sizes((), 1, 1, 1, 1, 4, 4),
            Sizes((2,), 63, 63, 2, 1, 4, 4),
            Sizes((2, 2), 12, 40, 2, 2, 4, 6),
            Sizes((1,), 7, 70, 3, 3, 20, 17),
        ),
    ),
    "mosaic_gpu": Backend(
        "mosaic_gpu",
        (jnp.float16, jnp.bfloat16),
        ((64, 64), None),
        (
            Sizes((2,), 70, 100, 4, 2, 8, 3),
            Sizes((), 1, 1, 1, 1, 4, 4),
            Sizes((2,), 63, 130, 2, 1, 4, 4),
        ),
    ),
    "tpu": Backend(
        "tpu",
        _FLOATS,
        ((128, 128), None),
        (
            Sizes((2,), 130, 150, 4, 2, 8, 3),
            Sizes((), 1, 1, 1, 1, 4, 4),
            Sizes((2,), 63, 63, 2, 1, 4, 4),
            Sizes((2, 2), 12, 140, 2, 2, 4, 6),
        ),
    ),
}


def backends() -> list[Backend]:
    """Every backend of the front door whose module exists."""
    found = [b for b in BACKENDS if importlib.util.find_spec(f"pallas_kernels.flash.{b}")]
    return [_KNOWN[name] for name in found]


# ---- parts ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """A modifier or normalizer as functions of its trainable arrays."""

    name: str
    params: dict[str, np.ndarray]
    ours: Callable[[dict], Any]
    oracle: Callable[[dict], Any]
    lse: bool = True


def _pull(score, at, params):
    distance = jnp.abs(at.relative).astype(score.dtype)
    return score * params["gain"] - jnp.log1p(jnp.square(params["rate"]) * distance)


def _pull_oracle(p):
    def modify(score, i, j, head):
        distance = np.abs(j - i).astype(np.float64)
        return score * p["gain"] - np.log1p(p["rate"][head] ** 2 * distance)

    return modify


def _far(score, at, table):
    return score + at.look_up(table, jnp.clip(jnp.abs(at.relative), 0, 4))


def _far_oracle(p):
    def modify(score, i, j, head):
        place = np.clip(np.abs(j - i), 0, 4)
        return score + p["table"][..., place]  # "B N *" or "*", its axes in front

    return modify


MODIFIERS = (
    "bias",
    "bias of a batch entry",
    "bias of a head",
    "bias of a query",
    "bias of a key",
    "bias of everything",
    "alibi",
    "t5",
    "t5 both ways",
    "table of a batch entry",
    "table of everything",
    "soft cap",
    "temperature",
    "temperature of a head",
    "temperature of a query",
    "temperature of a key",
    "function",
)


def modifier(name: str, size: Sizes, seed: int = 0) -> Part:
    """A trainable modifier of the named kind; numbers from the seed."""
    rng = np.random.default_rng(seed)
    b, n, t, s = size.batch, size.heads, size.queries, size.keys

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    shapes = {
        "bias": (*b, n, t, s),
        "bias of a batch entry": (*b, 1, t, s),
        "bias of a head": (n, t, s),
        "bias of a query": (*b, n, t, 1),
        "bias of a key": (*(1,) * len(b), n, 1, s),
        "bias of everything": (1, 1, 1),
    }
    heats = {
        "temperature": (),
        "temperature of a head": (n, 1, 1),
        "temperature of a query": (*b, 1, t, 1),
        "temperature of a key": (1, 1, s),
    }
    if name in shapes:
        return Part(
            name,
            {"bias": normal(*shapes[name])},
            lambda p: scores.Bias(p["bias"]),
            lambda p: oracles.bias(p["bias"]),
        )
    if name in heats:
        return Part(
            name,
            {"heat": np.exp(0.3 * normal(*heats[name])).astype(np.float32)},
            lambda p: scores.Temperature(p["heat"]),
            lambda p: oracles.temperature(p["heat"]),
        )
    if name == "alibi":
        return Part(
            name,
            {"slopes": oracles.alibi_slopes(n).astype(np.float32)},
            lambda p: scores.AlibiSlopes(p["slopes"]),
            lambda p: oracles.alibi(p["slopes"]),
        )
    if name in ("t5", "t5 both ways"):
        kind = {"bidirectional": name == "t5 both ways", "max_distance": 20}
        return Part(
            name,
            {"table": normal(n, 8)},
            lambda p: scores.RelativeBias(p["table"], **kind),
            lambda p: oracles.t5_bias(p["table"], **kind),
        )
    if name in ("table of a batch entry", "table of everything"):
        whole = name == "table of everything"
        return Part(
            name,
            {"table": normal(5) if whole else normal(*b, n, 5)},
            lambda p: scores.ScoreFunction(_far, p["table"], "*" if whole else "B N *"),
            _far_oracle,
        )
    if name == "soft cap":
        return Part(
            name,
            {"cap": np.array(1.7, np.float32)},
            lambda p: scores.SoftCap(p["cap"]),
            lambda p: oracles.soft_cap(p["cap"]),
        )
    if name == "function":
        return Part(
            name,
            {"gain": np.array(0.8, np.float32), "rate": np.abs(normal(n))},
            lambda p: scores.ScoreFunction(_pull, dict(p), ("", "N")),
            _pull_oracle,
        )
    raise ValueError(f"no modifier named {name!r}")


NORMALIZERS = ("softmax", "sink", "plus one", "softplus l1", "sigmoid", "relu squared")


def normalizer(name: str, size: Sizes) -> Part:
    """A normalizer that streams; the sink is trainable."""
    if name == "sink":
        sink = np.linspace(-1, 1, size.heads).astype(np.float32)
        return Part(
            name,
            {"sink": sink},
            lambda p: normalizers.Softmax(p["sink"]),
            lambda p: oracles.softmax(p["sink"]),
        )
    ours, oracle, lse = {
        "softmax": (normalizers.Softmax(), oracles.softmax(), True),
        "plus one": (normalizers.SoftmaxPlusOne(), oracles.softmax_plus_one(), True),
        "softplus l1": (normalizers.SoftplusL1(), oracles.softplus_l1(), True),
        "sigmoid": (normalizers.Sigmoid(), oracles.sigmoid(), False),
        "relu squared": (normalizers.ReluSquared(), oracles.relu_squared(), False),
    }[name]
    return Part(name, {}, lambda p: ours, lambda p: oracle, lse)


# ---- masks ---------------------------------------------------------------------------------------


def blocks_mask(size: Sizes, seed: int, block_sizes=(16, 32), by_head: bool = True) -> Pair:
    """A block mask drawn at random; the last blocks may reach beyond the lengths."""
    rng = np.random.default_rng(seed)
    rows, cols = block_sizes
    shape = (-(-size.queries // rows), -(-size.keys // cols))
    live = rng.random((*size.batch, size.heads if by_head else 1, *shape)) < 0.6
    pairs = live.repeat(rows, -2).repeat(cols, -1)[..., : size.queries, : size.keys]
    return Pair("blocks", masks.Blocks(jnp.asarray(live), block_sizes), oracles.array(pairs))


def query_padding(size: Sizes, seed: int) -> Pair:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, size.queries + 1, size.batch).astype(np.int32)
    bound = lengths[..., None, None, None]
    return Pair(
        "query padding",
        masks.QueryPadding(jnp.asarray(lengths)),
        lambda i, j: (i + 0 * j)[None] < bound,
    )


def _near(at, params):
    reach = params["reach"].astype(at.key.dtype)
    return jnp.abs(at.key - params["center"].astype(at.key.dtype)) < reach


def near_centers(size: Sizes, seed: int) -> Pair:
    """A predicate with an array per head and one for all."""
    reach = np.random.default_rng(seed).integers(1, size.keys + 2, size.heads).astype(np.int32)
    center = np.int32(size.keys // 2)
    params = {"center": jnp.asarray(center), "reach": jnp.asarray(reach)}
    return Pair(
        "near centers",
        masks.Predicate(_near, params, ("", "N")),
        lambda i, j: np.abs(j + 0 * i - center) < reach[:, None, None],
    )


def array_mask(shape: tuple[int, ...], seed: int, name: str = "array") -> Pair:
    allowed = np.random.default_rng(seed).random(shape) < 0.6
    return Pair(name, masks.ArrayMask(jnp.asarray(allowed)), oracles.array(allowed))


def both(*pairs: Pair) -> Pair:
    first, *rest = pairs
    for other in rest:
        first = Pair(
            f"{first.name} & {other.name}",
            first.term & other.term,
            oracles.both(first.oracle, other.oracle),
        )
    return first


def window(left: int | None, right: int | None) -> Pair:
    return Pair("window", masks.SlidingWindow(left, right), oracles.window(left, right))


def drawn_mask(data, size: Sizes, depth: int = 1, blocks=(16, 32)) -> Pair:
    """What `draw` knows, now and then joined with the masks that are new to it."""
    from hypothesis import strategies as st

    pair = draw.mask_pair(data, size, depth)
    extra = data.draw(st.sampled_from(["none", "none", "blocks", "query padding", "centers"]))
    seed = data.draw(st.integers(0, 1000))
    if extra == "none":
        return pair
    if extra == "blocks":
        return both(pair, blocks_mask(size, seed, blocks, data.draw(st.booleans())))
    return both(pair, (query_padding if extra == "query padding" else near_centers)(size, seed))


# ---- a call --------------------------------------------------------------------------------------


EVERYWHERE = Pair("full", masks.Full(), oracles.full())


@dataclasses.dataclass(frozen=True)
class Call:
    """One structure on one size, ready to be computed by any implementation."""

    size: Sizes
    mask: Pair = EVERYWHERE
    modifiers: tuple[Part, ...] = ()
    normalizer: str = "softmax"
    offsets: tuple[int, int] = (0, 0)
    traced: bool = False  # whether the offsets are
    scale: float | None = None  # a trainable scale
    dropout: float = 0.0
    seed: int = 0
    magnitude: float = 1.0

    @property
    def weights(self) -> Part:
        return normalizer(self.normalizer, self.size)

    @property
    def lse(self) -> bool:
        return self.weights.lse

    def params(self) -> dict[str, np.ndarray]:
        parts = dict(enumerate((*self.modifiers, self.weights)))
        found = {f"{n} {k}": v for n, part in parts.items() for k, v in part.params.items()}
        return found if self.scale is None else {**found, "scale": np.float32(self.scale)}

    def _part(self, n: int, params: dict) -> dict:
        start = f"{n} "
        return {k.removeprefix(start): v for k, v in params.items() if k.startswith(start)}

    def arrays(self, dtype: Any) -> tuple:
        """Query, key, value and parameters: what is differentiated."""
        inputs = draw.inputs(self.size, self.seed, self.magnitude)
        return tuple(jnp.asarray(x).astype(dtype) for x in inputs), {
            k: jnp.asarray(v) for k, v in self.params().items()
        }

    def data(self) -> dict[str, Any]:
        """What is not differentiated but may be traced."""
        found: dict[str, Any] = {"mask": self.mask.term}
        if self.traced:
            found["offsets"] = tuple(jnp.asarray(o, jnp.int32) for o in self.offsets)
        if self.dropout:
            found["key"] = jax.random.key(self.seed)
        return found

    def ours(self, inputs: tuple, params: dict, data: dict, **options: Any) -> tuple:
        """Output and, where there is one, log-sum-exp."""
        if self.dropout:
            options |= {"dropout_rate": self.dropout, "dropout_key": data["key"]}
        if self.scale is not None:
            options["scale"] = params["scale"]
        offsets = data.get("offsets", self.offsets)
        found = attnlab.attention(
            *inputs,
            mask=data["mask"],
            modifiers=tuple(m.ours(self._part(n, params)) for n, m in enumerate(self.modifiers)),
            normalizer=self.weights.ours(self._part(len(self.modifiers), params)),
            query_offset=offsets[0],
            key_offset=offsets[1],
            return_lse=self.lse,
            **options,
        )
        return found if self.lse else (found, None)

    def exact(self, inputs: tuple, params: dict, dtype: Any = np.float64) -> tuple:
        """The formula, in float64 or step by step in a narrower dtype."""
        keep = None
        if self.dropout:
            size = self.size
            at = Tile(
                0, 0, size.queries, size.keys, size.heads, 3 + len(size.batch), *self.offsets
            ).at()
            words = key_words(jax.random.key(self.seed))
            keep = np.asarray(keep_mask(words, self.dropout, at, size.batch))
        return oracles.attention(
            *inputs,
            mask=self.mask.oracle,
            modifiers=[m.oracle(self._part(n, params)) for n, m in enumerate(self.modifiers)],
            normalizer=self.weights.oracle(self._part(len(self.modifiers), params)),
            scale=params.get("scale"),
            query_offset=self.offsets[0],
            key_offset=self.offsets[1],
            keep=keep,
            dropout_rate=self.dropout,
            return_lse=True,
            dtype=dtype,
        )

    def blind(self) -> np.ndarray:
        """True for the rows "*B N T" that see no key."""
        size = self.size
        i = self.offsets[0] + np.arange(size.queries)[:, None]
        j = self.offsets[1] + np.arange(size.keys)[None, :]
        shape = (*size.batch, size.heads, size.queries, size.keys)
        return ~np.broadcast_to(self.mask.oracle(i, j), shape).any(-1)

    def bend(self, library: Any, out: Any) -> Any:
        """What the loss reads of the output: curved, but where weights have no sum outputs are so
        large that their rounding would turn a sine around.
        """
        return library.sin(out) if self.lse else out

    def readings(self) -> tuple[np.ndarray, np.ndarray]:
        """What the loss multiplies output and log-sum-exp with."""
        size, rng = self.size, np.random.default_rng(self.seed + 1)
        shape = (*size.batch, size.queries, size.heads, size.value_width)
        other = (*size.batch, size.heads, size.queries)
        return tuple(rng.standard_normal(x).astype(np.float32) for x in (shape, other))


def loss_of(call: Call, **options: Any) -> Callable:
    """`loss(inputs, params, data, readings)`: reads every entry of output and log-sum-exp."""

    def loss(inputs, params, data, readings):
        out, lse = call.ours(inputs, params, data, **options)
        total = jnp.sum(call.bend(jnp, out.astype(jnp.float32)) * readings[0])
        if lse is not None:
            total = total + jnp.sum(jnp.where(jnp.isneginf(lse), 0, lse) * readings[1])
        return total, (out, lse)

    return loss


def gradients(call: Call, backend: Backend, dtype: Any, block_sizes: Any) -> tuple:
    """Output, log-sum-exp, and the gradients of (inputs, params)."""
    options = {"implementation": backend.name, "block_sizes": block_sizes}
    slope = jax.value_and_grad(loss_of(call, **options), argnums=(0, 1), has_aux=True)
    readings = tuple(map(jnp.asarray, call.readings()))
    (_, found), gradient = backend.jit(slope)(*call.arrays(dtype), call.data(), readings)
    return *found, gradient


def values(call: Call, backend: Backend, dtype: Any, block_sizes: Any) -> tuple:
    """Output and log-sum-exp."""

    def compute(inputs, params, data):
        return call.ours(inputs, params, data, implementation=backend.name, block_sizes=block_sizes)

    return backend.jit(compute)(*call.arrays(dtype), call.data())


# ---- against the formula -------------------------------------------------------------------------


def check_values(call: Call, dtype: Any, out: Any, lse: Any) -> None:
    """Output within the derived budget, log-sum-exp to float32, blind rows exactly zero."""
    inputs, params = call.arrays(dtype)
    wide, exact_params = map(as_float64, inputs), {k: as_float64(v) for k, v in params.items()}
    wide = tuple(wide)
    exact, exact_lse = call.exact(wide, exact_params)
    plain, _ = call.exact(wide, exact_params, dtype)
    size = call.size
    assert out.dtype == dtype
    assert out.shape == (*size.batch, size.queries, size.heads, size.value_width)
    assert_within_budget(out, exact, plain, dtype, words="output")
    blind = call.blind()
    np.testing.assert_array_equal(np.swapaxes(as_float64(out), -2, -3)[blind], 0.0)
    if lse is None:
        return
    assert lse.dtype == jnp.float32
    assert lse.shape == blind.shape
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact_lse))
    seen = np.isfinite(exact_lse)
    assert_close(np.asarray(lse)[seen], exact_lse[seen], np.float32, words="log-sum-exp")


def _directions(call: Call, flat: list, number: int) -> list:
    rng = np.random.default_rng(100 + number)
    return [rng.standard_normal(np.shape(x)) for x in flat]


def check_gradient(call: Call, dtype: Any, gradient: Any) -> None:
    """Each array's gradient against central differences of the formula in float64.

    A direction has independent entries, so the roundings of independent entries add up like a
    random walk; that is what is allowed of narrow dtypes.
    """
    inputs, params = call.arrays(dtype)
    names = [*("query", "key", "value"), *sorted(params)]
    arrays = [*inputs, *(params[k] for k in sorted(params))]
    found = [*gradient[0], *(gradient[1][k] for k in sorted(params))]
    assert [g.shape for g in found] == [x.shape for x in arrays]
    assert [g.dtype for g in found] == [x.dtype for x in arrays]
    exact = [as_float64(x) for x in arrays]
    read, read_lse = map(as_float64, call.readings())

    def loss(*flat):
        out, lse = call.exact(tuple(flat[:3]), dict(zip(sorted(params), flat[3:], strict=True)))
        total = np.sum(call.bend(np, out) * read)
        return (
            total if not call.lse else total + np.sum(np.where(np.isneginf(lse), 0, lse) * read_lse)
        )

    blind = np.swapaxes(call.blind(), -1, -2)
    np.testing.assert_array_equal(as_float64(found[0])[blind], 0.0, err_msg="blind query")
    narrow = np.dtype(dtype) != np.float32
    for index, (name, got) in enumerate(zip(names, found, strict=True)):
        for number in range(2):
            direction = [np.zeros_like(x) for x in exact]
            direction[index] = _directions(call, exact, number)[index]
            slope = oracles.directional(loss, exact, direction)
            products = as_float64(got) * direction[index]
            scale = np.sum(np.abs(products)) if not narrow else np.sqrt(np.sum(products**2))
            assert_close(
                np.sum(products), slope, dtype, "gradient", scale=max(1.0, scale), words=name
            )


def check(call: Call, backend: Backend, dtype: Any, block_sizes: Any) -> None:
    """Values and gradients of one call."""
    out, lse, gradient = gradients(call, backend, dtype, block_sizes)
    check_values(call, dtype, out, lse)
    check_gradient(call, dtype, gradient)


# ---- named calls ---------------------------------------------------------------------------------


def calls(backend: Backend) -> dict[str, Call]:
    """Every kind of mask, modifier and normalizer, each in company, on several tiles."""
    size = backend.size

    def with_terms(mask: Pair, *names: str, **more: Any) -> Call:
        parts = tuple(modifier(name, size, n) for n, name in enumerate(names))
        return Call(size, mask, parts, **more)

    def simple(name: str, seed: int = 1) -> Pair:
        return draw.simple_mask(name, size, seed)

    by_head = (size.heads, 1, size.keys)
    negated = window(9, 5)
    negated = Pair("~window", ~negated.term, oracles.negation(negated.oracle))
    return {
        "plain": with_terms(simple("full")),
        "causal with bias": with_terms(simple("causal"), "bias of a head", offsets=(3, 0)),
        "window with slopes": with_terms(window(11, 3), "alibi", offsets=(9, 2)),
        "segments with a table": with_terms(
            both(simple("segments"), simple("causal")), "t5 both ways", offsets=(12, 0)
        ),
        "causal by places, padded": with_terms(both(simple("causal by"), simple("padding", 3))),
        "padding, temperature of queries, cap": with_terms(
            simple("padding", 3), "temperature of a query", "soft cap", magnitude=3.0
        ),
        "array by head, bias of keys": with_terms(array_mask(by_head, 0), "bias of a key"),
        "array by batch, bias of batch": with_terms(
            array_mask((*size.batch, 1, size.queries, size.keys), 1), "bias of a batch entry"
        ),
        "predicates with a function": with_terms(
            both(near_centers(size, 4), simple("predicate")), "function", scale=0.3
        ),
        "blocks, temperature of keys": with_terms(
            both(blocks_mask(size, 5, backend.blocks), query_padding(size, 0)),
            "temperature of a key",
        ),
        "sink, strided, table of batch": with_terms(
            simple("strided", 4), "table of a batch entry", normalizer="sink"
        ),
        "plus one, not a window": with_terms(
            negated, "temperature of a head", "table of everything", normalizer="plus one"
        ),
        "sigmoid": with_terms(simple("causal"), "alibi", normalizer="sigmoid", offsets=(4, 0)),
        "softplus": with_terms(
            simple("half window"), "bias of a query", normalizer="softplus l1", traced=True,
            offsets=(20, 3),
        ),
        "relu squared": with_terms(
            simple("prefix by batch"), "bias of everything", "temperature",
            normalizer="relu squared",
        ),
        "dropout": with_terms(
            simple("causal"), "t5", offsets=(15, 0), traced=True, dropout=0.4, normalizer="sink"
        ),
    }  # fmt: skip


def forget() -> None:
    """Drop what was traced before: after a kernel's parts were replaced, or put back."""
    from attnlab.core import kernels, launch

    launch._launcher.cache_clear()
    kernels._solve.clear_cache()
