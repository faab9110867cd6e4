"""Flash attention for Hopper GPUs: TMA loads into rings of slots, wgmma, two warpgroups in turn.

Shah et al. 2024, arXiv:2407.08608 is the schedule: while one warpgroup multiplies, the other one
takes exponentials.  Where registers allow, a third warpgroup does nothing but fetch.  Masks,
modifiers and normalizers are the caller's, see `pallas_kernels.flash.tile`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.flash import hopper, tile
from pallas_kernels.flash.hopper import LOG2E, Cut, Feed, M, Ring, Team, Walk, div, rem
from pallas_kernels.flash.hopper_backward import backward
from pallas_kernels.flash.legal import legal
from pallas_kernels.flash.problem import Arrays, Spec

__all__ = ["backward", "block_limit", "block_sizes", "forward", "limits", "padded_width"]


def limits(query: Any, value: Any, spec: Spec | None = None) -> str | None:
    """What keeps these bodies from serving arrays of this dtype and width, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 and float16, not {query.dtype}"
    if value.dtype != query.dtype:
        return f"multiplies values of the query's dtype {query.dtype}, not {value.dtype}"
    for name, x in (("keys", query), ("values", value)):
        if x.shape[-1] > 256:
            return f"holds {name} up to 256 wide, got {x.shape[-1]}"
    if spec is None:
        return None
    if spec.scales is not None:
        return "does not read int8 keys and values"
    if spec.isolated or spec.page or spec.heads_last:
        return "reads clean keys with heads before positions, on pages as large as its tiles"
    return block_limit(spec.block_sizes)


def padded_width(width: int) -> int:
    """Keys and values fill whole rows of 128 bytes, as TMA swizzles them."""
    return -(-width // 64) * 64


def block_sizes(
    key_width: int, value_width: int, itemsize: int, lengths: tuple[int, int], backward: bool,
    kind: str,
) -> tuple[int, int]:  # fmt: skip
    """Rows and columns of the tiles that lists are made for; bodies cut them finer by width."""
    rows, cols = (M if n <= M else 2 * M for n in lengths)
    return rows, cols


def block_limit(block_sizes: tuple[int, int]) -> str | None:
    """What is wrong with these block sizes, or None."""
    if all(size in (M, 2 * M) for size in block_sizes):
        return None
    return f"takes block_sizes of 64 or 128, not {block_sizes}"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a forward kernel is specialised to.  `cols`: keys per step, `splits`: parts of them."""

    spec: Spec
    team: Team
    plain: bool
    splits: int
    stages: int
    cols: int
    interpret: Any

    @property
    def pieces(self) -> int:
        return self.spec.block_sizes[1] // self.cols


def _forward_body(plan: _Plan, tree: Any, *refs: Any) -> None:
    arrays: Arrays = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    out_ref, lse_ref, (q_smem, k_smem, v_smem, out_smem), barriers = refs[tree.num_leaves :]
    q_ready, turn, *pairs = barriers
    spec, team, cols, dtype = plan.spec, plan.team, plan.cols, arrays.query.dtype
    program, n, b = (jax.lax.axis_index(name) for name in ("rows", "heads", "batch"))
    # Late rows first: under a causal mask they are the longest.
    i = arrays.query.shape[2] // spec.block_sizes[0] - 1 - div(program, plan.splits)
    part = rem(program, plan.splits)
    walk = Walk(arrays.rows, b, n, i, plan.pieces, (part, plan.splits))
    constant = spec.scale * LOG2E if plan.plain else LOG2E

    def feeds() -> list[Feed]:
        def feed(pair: Any, source: Any, target: Any) -> Feed:
            def copies(piece: Any) -> list[tuple[Any, Any]]:
                place = hopper.key_place(arrays, b, n, piece, plan.pieces, cols)
                return [(source.at[place], target)]

            return Feed(team, Ring(plan.stages, *pair), walk, copies)

        return [feed(pairs[0], arrays.key, k_smem), feed(pairs[1], arrays.value, v_smem)]

    def take_turns() -> None:
        if team.readers > 1:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

    def compute() -> None:
        wg = team.number
        row = i * spec.block_sizes[0] + wg * M
        span = pl.ds(row, M)
        cut = Cut(spec, M, cols)
        query = q_smem.at[wg]
        source: Any = arrays.query.at[b, n, span]
        plgpu.copy_gmem_to_smem(source, query, q_ready.at[wg])
        keys, values = feeds()
        keys.start()
        values.start()
        steady = cut.steady_parts(arrays.leaves, b, n, "t", row)
        plgpu.barrier_wait(q_ready.at[wg])

        def step(masked: bool) -> Callable:
            def scores(products: Array, parts: list[Any], col: Any) -> tuple[Array, Array | None]:
                leaves = cut.expand(parts)
                at, inside = cut.at(leaves, row, col, n)
                allowed = tile.allowed_pairs(spec, leaves, at, inside) if masked else None
                keep = tile.kept(spec, leaves, at)
                if not plan.plain:
                    return tile.evaluate(spec, leaves, products, at, allowed), keep
                return products if allowed is None else jnp.where(allowed, products, -jnp.inf), keep

            def act(number: Any, piece: Any, state: Any) -> Any:
                acc, top, total = state
                col = piece * cols
                parts = cut.parts(arrays.leaves, b, n, row, col, steady)
                slot = keys.wait(number)
                key = k_smem.at[slot].transpose((1, 0))
                (products,) = hopper.multiply([(query, key)], take_turns)
                keys.release(slot)
                weights, keep = legal(scores)(products, parts, col)
                if spec.program.shared:
                    new = jnp.maximum(top, jnp.max(weights, axis=1) * constant)
                    shift = tile.finite(new)
                    weights = jnp.exp2(weights * constant - cut.spread(shift, "t"))
                    old = jnp.exp2(top - shift)
                    top, total = new, total * old + jnp.sum(weights, axis=1)
                    acc = acc * jax.lax.broadcast_in_dim(old, acc.shape, (0,))
                if keep is not None:
                    weights = weights * keep
                weights = weights.astype(dtype)
                # Nothing of this may move behind the other warpgroup's turn.
                acc, top, total, weights = jax.lax.optimization_barrier((acc, top, total, weights))
                take_turns()
                slot = values.wait(number)
                (acc,) = hopper.multiply_add([acc], [(weights, v_smem.at[slot])], plan.interpret)
                values.release(slot)
                return acc, top, total

            return act

        top = hopper.along_rows(jnp.float32(-jnp.inf))
        state = (hopper.zeros((M, v_smem.shape[-1])), top, hopper.zeros((M,)))
        if team.readers > 1:
            pl.when(wg == 1)(take_turns)
        acc, top, total = walk.run(step, state)
        if team.readers > 1:
            pl.when(wg == 0)(take_turns)
        lse = hopper.zeros((M,))
        if spec.program.shared:
            seen = total > 0
            safe = jnp.where(seen, total, 1.0)
            # A NaN in the row must survive: `seen` is false for it.
            inverse = jnp.where(seen, 1 / safe, 1.0)
            acc = acc * jax.lax.broadcast_in_dim(inverse, acc.shape, (0,))
            unseen = jnp.where(total == 0, top, total)
            lse = jnp.where(seen, tile.finite(top) + jnp.log2(safe), unseen) * math.log(2)
        hopper.store(lse, lse_ref.at[part, b, n, span])
        target = out_ref.at[part, b, n, span]
        if out_ref.dtype == jnp.float32:
            hopper.store(acc, target)
            return
        hopper.send(acc, query if out_smem is None else out_smem.at[wg], target)
        plgpu.wait_smem_to_gmem(0)

    team.run(compute, feeds)


def forward(
    spec: Spec, arrays: Arrays, *, splits: int = 1, interpret: Any = False
) -> tuple[Array, Array]:
    """Output "splits B N T D" and log-sum-exp "splits B N T", for each part of the keys.

    The output is float32 where parts are to be merged, else of the query's dtype.
    """
    batch, heads, num_rows, key_width = arrays.query.shape
    value_width = arrays.value.shape[-1]
    rows, block_cols = spec.block_sizes
    dtype = arrays.query.dtype
    arrays = arrays._replace(leaves=hopper.as_stored(spec, arrays.leaves, False), columns=None)
    plain = hopper.is_plain(spec, arrays.leaves)
    width = max(key_width, value_width)
    by_pair = any(hopper.tile_axes(leaf.axes) for leaf in spec.leaves)
    # Beside a fetcher there are 168 registers: enough for narrow heads without arrays by pair.
    team = Team(rows // M, fetcher=plain and width <= 64 and not by_pair and rows > M)
    long = width <= (64 if by_pair else 128) and not hopper.is_heavy(spec)
    cols = min(block_cols, 2 * M if long else M)
    final = splits == 1 and not spec.part
    own_buffer = final and value_width != key_width
    resident = rows * (key_width + own_buffer * value_width) * dtype.itemsize
    stages = hopper.num_stages(cols * (key_width + value_width) * dtype.itemsize, resident)
    plan = _Plan(spec, team, plain, splits, stages, cols, interpret)
    buffers = [
        hopper.operand((team.readers, M, key_width), dtype),
        hopper.operand((stages, cols, key_width), dtype),
        hopper.operand((stages, cols, value_width), dtype),
        hopper.operand((team.readers, M, value_width), dtype) if own_buffer else None,
    ]
    barriers = [
        plgpu.Barrier(num_barriers=team.readers),
        plgpu.Barrier(num_arrivals=team.readers),
        *hopper.ring_barriers(stages, team.readers, (1, 1)),
    ]
    out_dtype = dtype if final else jnp.dtype(jnp.float32)
    out = (
        jax.ShapeDtypeStruct((splits, batch, heads, num_rows, value_width), out_dtype),
        jax.ShapeDtypeStruct((splits, batch, heads, num_rows), jnp.float32),
    )

    def body(tree: Any, *refs: Any) -> None:
        _forward_body(plan, tree, *refs)

    grid = {"rows": num_rows // rows * splits, "heads": heads, "batch": batch}
    return hopper.launch(
        body, arrays, out, (buffers, barriers), grid, team.size, "flash_forward", interpret
    )
