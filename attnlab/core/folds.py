"""Forward, tangent and backward of attention, each one fold over the tiles."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.core.partial import Partial, block_weights, finish, merge
from attnlab.core.reference import grouped_matmul, zero_bad
from attnlab.core.terms import Tile
from attnlab.core.tiles import Leaves, Signature, Work


@dataclasses.dataclass(frozen=True)
class Folds:
    """The three folds for one signature; all take the call's arrays as `x` and `aux`."""

    signature: Signature

    def forward(self, x: Leaves, aux: dict[str, Any]) -> tuple[Array, Array]:
        """Output and log-sum-exp (zeros for a normalizer without one)."""
        work = Work.of(self.signature, x, aux, self.signature.forward_blocks)
        dtype = work.call.accumulator
        *batch, heads, rows, _ = work.query.shape
        start = Partial.identity((*batch, heads, rows), work.value.shape[-1], dtype)

        def visit(state: Partial, tile: Tile, allowed: Any) -> Partial:
            slices = work.cuts(work.params, tile)
            scores = work.log_weights(tile, allowed, work.products(tile), slices)
            value = work.cols(work.value, tile)
            if work.shared:
                weights, top, total = block_weights(scores)
            else:
                weights = work.terms(tile, slices)[1].weight(scores)
                top = total = jnp.zeros(scores.shape[:-1], dtype)
            kept = work.dropped(weights, tile)
            new = Partial(grouped_matmul(kept.astype(value.dtype), value, dtype), top, total)
            old = Partial(
                work.rows(state.acc, tile),
                *(work.rows(s[..., None], tile)[..., 0] for s in (state.max, state.sum)),
            )
            both = merge(old, new) if work.shared else Partial(old.acc + new.acc, new.max, new.sum)
            return Partial(
                work.put_rows(state.acc, both.acc, tile),
                *(
                    work.put_rows(s[..., None], b[..., None], tile)[..., 0]
                    for s, b in ((state.max, both.max), (state.sum, both.sum))
                ),
            )

        done = work.sweep(visit, start)
        out, lse = finish(done) if work.shared else (done.acc, jnp.zeros_like(done.sum))
        num_queries = x[0].shape[-2]
        return out[..., :num_queries, :], lse[..., :num_queries]

    def tangent(
        self, x: Leaves, aux: dict[str, Any], out: Array, lse: Array, dx: Leaves
    ) -> tuple[Array, Array]:
        """Derivatives of output and log-sum-exp along `dx`, where None is a zero direction."""
        work = Work.of(self.signature, x, aux, self.signature.backward_blocks)
        dtype = work.call.accumulator
        lse = work.pad_rows(lse[..., None])
        d_query, d_key, d_value = (
            None if d is None else pad(d)
            for d, pad in zip(dx[:3], (work.pad_rows, work.pad_cols, work.pad_cols), strict=True)
        )
        params = work.params
        d_params = [
            jnp.zeros_like(p) if d is None else work.pad_leaf(d.astype(p.dtype), i)
            for i, p, d in zip(self.signature.trainable, params, dx[3:], strict=True)
        ]
        *batch, heads, rows, _ = work.query.shape
        start = (
            jnp.zeros((*batch, heads, rows, work.value.shape[-1]), dtype),
            jnp.zeros((*batch, heads, rows, 1), dtype),
        )

        def visit(state: tuple[Array, Array], tile: Tile, allowed: Any) -> tuple[Array, Array]:
            products = work.products(tile)
            d_products = jnp.zeros_like(products)
            if d_query is not None:
                d_products += work.multiply(work.rows(d_query, tile), work.cols(work.clean, tile))
            if d_key is not None:
                query = zero_bad(work.rows(work.query, tile))
                d_products += work.multiply(query, work.cols(d_key, tile))
            stat = work.rows(lse, tile)
            weigh = functools.partial(work.weights, tile, allowed, stat)
            slices, d_slices = work.cuts(params, tile), work.cuts(d_params, tile)
            weights, d_weights = jax.jvp(weigh, (products, slices), (d_products, d_slices))
            value = work.cols(work.value, tile)
            moved = work.dropped(d_weights, tile).astype(value.dtype)
            acc = grouped_matmul(moved, value, dtype)
            if d_value is not None:
                kept = work.dropped(weights, tile).astype(value.dtype)
                acc += grouped_matmul(kept, zero_bad(work.cols(d_value, tile)), dtype)
            total = jnp.sum(d_weights, axis=-1, keepdims=True)
            return (
                work.put_rows(state[0], work.rows(state[0], tile) + acc, tile),
                work.put_rows(state[1], work.rows(state[1], tile) + total, tile),
            )

        acc, total = work.sweep(visit, start)
        num_queries = x[0].shape[-2]
        acc, total = acc[..., :num_queries, :], total[..., :num_queries, :]
        if not work.shared:
            return acc, jnp.zeros_like(total[..., 0])
        return acc - total * out, total[..., 0]

    def backward(
        self,
        wanted: tuple[int, ...],
        x: Leaves,
        aux: dict[str, Any],
        out: Array,
        lse: Array,
        cotangent: tuple[Array, Array],
    ) -> Leaves:
        """The cotangents of `x[i]` for i in `wanted`."""
        found = self.gradients(wanted, x, aux, out, lse, cotangent)
        return [d.astype(x[i].dtype) for d, i in zip(found, wanted, strict=True)]

    def gradients(
        self,
        wanted: tuple[int, ...],
        x: Leaves,
        aux: dict[str, Any],
        out: Array,
        lse: Array,
        cotangent: tuple[Array, Array],
    ) -> Leaves:
        """The same as they were summed, in the accumulator's dtype.

        `out` and `lse` may be those of more keys than `x` holds: sums over parts add up.
        """
        work = Work.of(self.signature, x, aux, self.signature.backward_blocks)
        dtype = work.call.accumulator
        d_out, d_lse = cotangent
        shift = d_lse[..., None] - jnp.sum(d_out * out, axis=-1, keepdims=True)
        d_out, lse, shift = (work.pad_rows(z) for z in (d_out, lse[..., None], shift))
        params, d_out_low = work.params, d_out.astype(work.value.dtype)
        shapes = [work.query.shape, work.key.shape, work.value.shape, *(p.shape for p in params)]
        # Gradients of keys and values are summed transposed: then every product takes its operands
        # as they lie, and only these small arrays are ever transposed, once.
        turned = [jnp.swapaxes(z, -1, -2) for z in (zero_bad(work.query), d_out_low)]
        start = [_turn(jnp.zeros(shapes[i], dtype), i) for i in wanted]

        def visit(state: Leaves, tile: Tile, allowed: Any) -> Leaves:
            stat = work.rows(lse, tile)
            weigh = functools.partial(work.weights, tile, allowed, stat)
            weights, pull = jax.vjp(weigh, work.products(tile), work.cuts(params, tile))
            value, d_rows = work.cols(work.value, tile), work.rows(d_out_low, tile)
            d_weights = work.dropped(work.multiply(d_rows, value), tile)
            if work.shared:
                d_weights = d_weights + work.rows(shift, tile)
            d_products, d_slices = pull(d_weights)
            d_products = d_products.astype(work.query.dtype)
            state = list(state)
            for n, i in enumerate(wanted):
                if i == 0:
                    new = grouped_matmul(d_products, work.cols(work.clean, tile), dtype)
                    state[n] = work.put_rows(state[n], work.rows(state[n], tile) + new, tile)
                elif i in (1, 2):
                    rows = work.columns(turned[i - 1], tile.row, tile.rows)
                    kept = work.dropped(weights, tile).astype(value.dtype)
                    new = work.sum_rows(rows, d_products if i == 1 else kept)
                    state[n] = work.add_columns(state[n], new, tile)
                else:
                    state[n] = work.add_cut(
                        state[n], d_slices[i - 3], self.signature.trainable[i - 3], tile
                    )
            return state

        done = work.sweep(visit, start)
        done = [_turn(d, i) for d, i in zip(done, wanted, strict=True)]
        return [_crop(d, x[i].shape) for d, i in zip(done, wanted, strict=True)]


def _turn(x: Array, i: int) -> Array:
    """Keys and values transposed or back, other leaves as they are."""
    return jnp.swapaxes(x, -1, -2) if i in (1, 2) else x


def _crop(x: Array, shape: tuple[int, ...]) -> Array:
    return x if x.shape == shape else x[tuple(slice(n) for n in shape)]
