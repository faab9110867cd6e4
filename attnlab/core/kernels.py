"""The fused kernels behind the front door: a call becomes the problem that a kernel solves.

Forward and backward run in `pallas_kernels.flash`; forward-mode and higher derivatives, which no
kernel has, come from the folds in plain JAX that compute the same function in O(T + S) memory.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab.core.derivatives import make_solver
from attnlab.core.folds import Folds
from attnlab.core.launch import body, launch_backward, launch_forward
from attnlab.core.masks import Full
from attnlab.core.problems import Problem, flat, pad_to, tags_of
from attnlab.core.reference import Call, isolate_bad, zero_bad
from attnlab.core.scores import whole_rows
from attnlab.core.terms import sized_axes
from attnlab.core.tiles import Leaves, Signature
from pallas_kernels.flash import plan
from pallas_kernels.flash.problem import Arrays, Leaf, reduce_leaf
from pallas_kernels.flash.tile import Table, TileAt

BACKENDS = ("triton", "mosaic_gpu", "tpu")

_interpret: contextvars.ContextVar[bool] = contextvars.ContextVar("interpret", default=False)


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Within this context kernels run interpreted, on any machine: slow, for tests and teaching.

    What was traced inside stays interpreted, also where `jax.jit` runs it later.
    """
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)


def interpreted() -> bool:
    """Is this within `interpret()`?"""
    return _interpret.get()


def device() -> tuple[str, str]:
    """Platform and kind of the device that is traced for: an abstract mesh's, else the default."""
    mesh = jax.sharding.get_abstract_mesh()
    abstract = getattr(mesh, "abstract_device", None)
    if abstract is not None:
        platform = "gpu" if abstract.platform in ("gpu", "cuda") else abstract.platform
        return platform or "", abstract.device_kind
    found = jax.devices()[0]
    return ("gpu" if found.platform == "cuda" else found.platform), found.device_kind


def missing(backend: str) -> str | None:
    """Why a backend cannot run on the present device, or None."""
    if interpreted():
        return None
    platform, kind = device()
    if backend == "tpu":
        return None if platform == "tpu" else f"needs a TPU; the device here is {kind}"
    if platform != "gpu":
        return f"needs an NVIDIA GPU; the device here is {kind}"
    if backend == "mosaic_gpu" and not any(name in kind for name in ("H100", "H200", "GH200")):
        return f"needs a Hopper GPU; the device here is {kind}"
    return None


def leaf_limit(x: Any, tag: str) -> str | None:
    """What keeps an array with these axes from entering a kernel, or None."""
    shape = jnp.shape(x)
    if not tag:
        if math.prod(shape) == 1:
            return None
        return (
            f"takes arrays that are tagged by the axes they are indexed by; one of shape {shape} "
            "is not"
        )
    axes = sized_axes(tag, len(shape))
    if "*" in tag and (tag.split().count("*") > 1 or any(a != "N" for a, _, _ in axes)):
        return f"looks up tables 'N *', 'B N *' and '*', not '{tag}'"
    blocks = [block for letter, _, block in axes if letter in "TS"]
    if any(block > 1 for block in blocks) and any(block == 1 for block in blocks):
        return f"takes blocks along both axes or along one alone, not '{tag}'"
    return None


_NO_KERNEL = (
    "gather", "dynamic_slice", "dynamic_update_slice", "scatter", "scatter-add", "sort",
    "dot_general", "cumsum", "cumprod", "cummax", "cumlogsumexp", "top_k", "argmax", "argmin",
    "conv_general_dilated",
)  # fmt: skip


def kernel_limits(
    call: Call, backend: str, block_sizes: tuple[int, int] | None = None
) -> str | None:
    """What keeps a kernel from serving a call, or None."""
    limit = term_limits(call, backend)
    if limit:
        return limit
    for blocks in kernel_blocks(call, backend, block_sizes):
        limit = body(backend).block_limit(blocks)
        if limit:
            return str(limit)
    return None


def term_limits(call: Call, backend: str) -> str | None:
    """What keeps a kernel from evaluating the terms of a call, whatever its tiles, or None."""
    if call.normalizer.kind == "row":
        return f"streams over keys, which {type(call.normalizer).__name__} does not"
    needy = whole_rows(call.modifiers)
    if needy:
        return f"sees a tile at a time; {needy} reads whole rows of scores"
    limit = body(backend).limits(call.query, call.value)
    if limit:
        return str(limit)
    leaves = jax.tree.leaves((call.mask, call.modifiers, call.normalizer))
    for x, tag in zip(leaves, tags_of(call), strict=True):
        limit = leaf_limit(x, tag)
        if limit:
            return limit
    return _code_limit(call)


def _code_limit(call: Call) -> str | None:
    """What of a mask's or modifier's code no kernel can run, or None."""
    # Small blocks: only what happens within a tile matters here.
    spec = Problem(call, (16, 16), lambda width: width).spec
    arrays = jax.tree.leaves((call.mask, call.modifiers, call.normalizer))

    def look(leaf: Leaf, x: Any) -> Any:
        dtype = jnp.float32 if leaf.trainable else jnp.bool_ if leaf.boolean else x.dtype
        if leaf.table:
            return Table((jnp.zeros((), dtype),) * x.shape[-1])
        return jnp.zeros(_TILE, dtype)

    def code(*_: Any) -> Any:
        leaves = [look(leaf, x) for leaf, x in zip(spec.leaves, arrays, strict=False)]
        at = TileAt(*(jax.lax.broadcasted_iota(jnp.int32, _TILE, axis) for axis in (0, 1, 1)))
        products = jnp.zeros(_TILE, jnp.float32)
        return spec.program.allowed(leaves, at), spec.program.evaluate(leaves, products, at)

    try:
        jaxpr = jax.make_jaxpr(code)()
    except Exception as error:  # the caller's code may fail in any way
        reason = str(error).strip().splitlines()[0]
        return f"evaluates masks and modifiers on a tile of rank 2, which fails here ({reason})"
    found = set(_primitives(jaxpr.jaxpr)) & set(_NO_KERNEL)
    return None if not found else f"has no {', '.join(sorted(found))} within a tile"


_TILE = (2, 4)


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)


@dataclasses.dataclass(frozen=True)
class KernelFolds(Folds):
    """The three folds, forward and backward by a kernel.

    `part`: results are some of several that are merged, and are left in float32.
    """

    backend: str
    interpreted: bool
    part: bool = False

    def _problem(self, x: Leaves, aux: dict[str, Any], blocks: tuple[int, int]) -> Problem:
        problem = Problem(self.signature.call(x, aux), blocks, body(self.backend).padded_width)
        problem.spec = dataclasses.replace(problem.spec, part=self.part)
        return problem

    def forward(self, x: Leaves, aux: dict[str, Any]) -> tuple[Array, Array]:
        problem, arrays = self.forward_problem(x, aux)
        out, lse = launch_forward(self.backend, problem.spec, self.interpreted, 1, arrays)
        return self.forward_results(problem, out[0], lse[0])

    def forward_problem(self, x: Leaves, aux: dict[str, Any]) -> tuple[Problem, Arrays]:
        """What the forward kernel solves."""
        problem = self._problem(x, aux, self.signature.forward_blocks)
        key, value = x[1], x[2]
        if not isinstance(problem.call.mask, Full):
            key, value = isolate_bad(key, value)
        query, key, value, leaves = problem.prepare(x[0], key, value, x[3:])
        return problem, Arrays(query, key, value, leaves, self._lists(*problem.tables()))

    def forward_results(self, problem: Problem, out: Array, lse: Array) -> tuple[Array, Array]:
        """Output and log-sum-exp as the call has them."""
        out = problem.restore(out, problem.call.value.shape[-1]).astype(problem.call.accumulator)
        return out, problem.restore(lse[..., None], 1)[..., 0]

    def gradients(
        self,
        wanted: tuple[int, ...],
        x: Leaves,
        aux: dict[str, Any],
        out: Array,
        lse: Array,
        cotangent: tuple[Array, Array],
    ) -> Leaves:
        problem, inputs = self.backward_problem(x, aux, out, lse, cotangent)
        chosen = self.chosen(problem, wanted)
        found = launch_backward(self.backend, problem.spec, self.interpreted, chosen, inputs)
        return self.backward_results(problem, wanted, x, inputs[0].leaves, found)

    def chosen(self, problem: Problem, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """Which leaves are wanted: `x` counts the trainable ones after query, key and value."""
        return tuple(problem.spec.trainable[i - 3] for i in wanted if i > 2)

    def backward_problem(
        self, x: Leaves, aux: dict[str, Any], out: Array, lse: Array,
        cotangent: tuple[Array, Array],
    ) -> tuple[Problem, tuple[Arrays, Array, Array, Array, Array]]:  # fmt: skip
        """What the backward kernels solve."""
        problem = self._problem(x, aux, self.signature.backward_blocks)
        d_out, d_lse = cotangent
        shift = d_lse - jnp.sum(d_out * out, axis=-1)
        inputs = x[:3] if isinstance(problem.call.mask, Full) else [zero_bad(z) for z in x[:3]]
        if not problem.spec.program.shared:
            # No lse carries a NaN to where it is seen: the key does.
            inputs[1] = isolate_bad(x[1], x[2])[0]
        query, key, value, leaves = problem.prepare(inputs[0], inputs[1], inputs[2], x[3:])
        some, every = problem.tables()
        turned = np.swapaxes if isinstance(some, np.ndarray) else jnp.swapaxes
        arrays = Arrays(
            query, key, value, leaves, self._lists(some, every),
            self._lists(turned(some, -1, -2), turned(every, -1, -2)),
        )  # fmt: skip
        rows = problem.padded[0]
        d_out = pad_to(flat(d_out), rows, value.shape[-1]).astype(query.dtype)
        lse, shift = (pad_to(flat(z[..., None]), rows, 1)[..., 0] for z in (lse, shift))
        return problem, (arrays, jnp.asarray(some).astype(jnp.int32), d_out, lse, shift)

    def backward_results(
        self, problem: Problem, wanted: tuple[int, ...], x: Leaves, leaves: list[Any], found: Any
    ) -> Leaves:
        """Gradients as the call has them, from those of the kernels."""
        d_query, d_key, d_value, d_leaves = found
        full = [jnp.zeros_like(z) if jnp.issubdtype(z.dtype, jnp.floating) else
                np.zeros(z.shape, jax.dtypes.float0) for z in leaves]  # fmt: skip
        for place, d in zip(self.chosen(problem, wanted), d_leaves, strict=True):
            full[place] = reduce_leaf(d, leaves[place].shape, leaves[place].dtype)
        # The map back of gradients wider than their inputs, as those of a part are.
        wide = [z.astype(d.dtype) for z, d in zip(x[:3], (d_query, d_key, d_value), strict=True)]
        found = jax.vjp(problem.prepare, *wide, x[3:])[1]((d_query, d_key, d_value, full))
        found = [*found[:3], *found[3]]
        return [found[i].astype(problem.call.accumulator) for i in wanted]

    def _lists(self, some: Any, every: Any) -> Any:
        make = plan.make_flat if self.backend == "tpu" else plan.make_lists
        return jax.tree.map(jnp.asarray, make(some, every))


def kernel_attention(
    call: Call, backend: str, block_sizes: tuple[int, int] | None = None
) -> tuple[Array, Array]:
    """Attention by a fused kernel: output in the accumulator's dtype, and the log-sum-exp."""
    forward, backward = kernel_blocks(call, backend, block_sizes)
    signature, x, aux = Signature.of(call, forward, backward)
    return _solve(signature, backend, interpreted(), x, aux)


def kernel_blocks(
    call: Call, backend: str, asked: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The tiles of the forward and of the backward kernels."""
    blocks = []
    for backward in (False, True):
        chosen = asked or body(backend).block_sizes(
            call.query.shape[-1], call.value.shape[-1], call.query.dtype.itemsize, call.lengths,
            backward, device()[1],
        )  # fmt: skip
        blocks.append(_within(chosen, call))
    return blocks[0], blocks[1]


def _within(block_sizes: tuple[int, int], call: Call) -> tuple[int, int]:
    """Tiles that lie within the blocks of every array that holds for whole blocks."""
    for x, tag in zip(
        jax.tree.leaves((call.mask, call.modifiers, call.normalizer)), tags_of(call), strict=True
    ):
        sizes = {letter: block for letter, _, block in sized_axes(tag, jnp.ndim(x))} if tag else {}
        rows, cols = (sizes.get(a, 1) if sizes.get(a, 1) > 1 else 0 for a in "TS")
        block_sizes = plan.divide_blocks(block_sizes, (rows, cols))
    return block_sizes


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(
    signature: Signature, backend: str, interpreted: bool, x: Leaves, aux: dict[str, Any]
) -> tuple[Array, Array]:
    folds = KernelFolds(signature, backend, interpreted)
    return make_solver(folds, Folds(signature))(x, aux)
