"""Faults planted into the parts of the kernels, one at a time: the laws catch each of them.

A law that cannot fail proves nothing.  Most parts are shared by all backends, so one backend, the
one that is quickest to interpret, stands for all.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import kernels
from pallas_kernels.flash import plan, tile, triton
from tests.kernels import cases, test_flash

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

BACKEND = next(b for b in cases.backends() if b.name == "triton")


def law(name, with_gradient=False, **changes):
    """The law of `test_flash` for a named call."""

    def check():
        call = dataclasses.replace(cases.calls(BACKEND)[name], **changes)
        if with_gradient:
            cases.check(call, BACKEND, jnp.float32, BACKEND.blocks)
        else:
            found = cases.values(call, BACKEND, jnp.float32, BACKEND.blocks)
            cases.check_values(call, jnp.float32, *found)

    return check


def wrapped(planting, module, name, change):
    """Put `change(original)` in place of `module.name`."""
    planting.setattr(module, name, change(getattr(module, name)))


# ---- forward -------------------------------------------------------------------------------------


def mask_ignored_in_partial_tiles(planting):
    planting.setattr(tile, "allowed_pairs", lambda spec, leaves, at, inside: inside)


def every_live_tile_called_full(planting):
    wrapped(planting, plan, "make_lists", lambda make: lambda some, every: make(some, some))


def last_tile_of_a_list_left_out(planting):
    def change(make):
        def shorter(some, every):
            lists = make(some, every)
            count = lists.count - (lists.count > 1)
            return lists._replace(count=count, full=np.minimum(lists.full, count))

        return shorter

    wrapped(planting, plan, "make_lists", change)


class _NoRescale:
    """`jax.numpy`, but for exp of one number per row: what rescales the running sums."""

    def __getattr__(self, name):
        return getattr(jnp, name)

    @staticmethod
    def exp(x):
        return jnp.ones_like(x) if x.ndim == 1 else jnp.exp(x)


def running_sums_not_rescaled(planting):
    planting.setattr(triton, "jnp", _NoRescale())


def keys_of_the_padding_seen(planting):
    def change(lie):
        def everything(*args):
            at, inside = lie(*args)
            return at, jnp.ones_like(inside)

        return everything

    wrapped(planting, tile, "where_pairs_lie", change)


def another_head_of_the_group(planting):
    def change(read):
        def wrong(self, ref, j, like):
            shared = ref.shape[1]
            moved = object.__new__(type(self))
            moved.__dict__ = self.__dict__ | {"n": self.n % shared * self.group}
            return read(moved, ref, j, like)

        return wrong

    wrapped(planting, triton._Tiles, "key_block", change)


def moved(planting, **by):
    """Positions or head numbers of every tile moved."""

    def change(lie):
        def wrong(*args):
            at, inside = lie(*args)
            return dataclasses.replace(
                at, **{name: getattr(at, name) + step for name, step in by.items()}
            ), inside

        return wrong

    wrapped(planting, tile, "where_pairs_lie", change)


def queries_one_further(planting):
    moved(planting, query=1)


def heads_one_further(planting):
    moved(planting, head=1)


def the_next_entry_of_a_table(planting):
    wrapped(
        planting, tile.TileAt, "look_up",
        lambda look_up: lambda self, table, index: look_up(
            self, tile.Table((*table.entries[1:], table.entries[0])), index
        ),
    )  # fmt: skip


def counter_of_dropout_shifted(planting):
    wrapped(
        planting, tile, "kept",
        lambda kept: lambda spec, leaves, at: kept(
            spec, leaves, dataclasses.replace(at, key=at.key + 1)
        ),
    )  # fmt: skip


def scale_forgotten(planting):
    wrapped(
        planting, tile, "evaluate",
        lambda evaluate: lambda spec, *args: evaluate(
            dataclasses.replace(spec, scale=1.0), *args
        ),
    )  # fmt: skip


def blind_rows_not_guarded(planting):
    planting.setattr(tile, "finite", lambda x: x)


# ---- backward ------------------------------------------------------------------------------------


def launching(planting, change):
    """`change(arrays, live, d_out, lse, shift)` before the backward kernels."""
    wrapped(
        planting, kernels, "launch_backward",
        lambda launch: lambda backend, spec, interpreted, wanted, inputs: launch(
            backend, spec, interpreted, wanted, change(*inputs)
        ),
    )  # fmt: skip


def shift_left_out(planting):
    launching(planting, lambda *inputs: (*inputs[:4], jnp.zeros_like(inputs[4])))


def cotangent_of_lse_dropped(planting):
    def change(backward):
        def without(self, wanted, x, aux, out, lse, cotangent):
            cotangent = cotangent[0], jnp.zeros_like(cotangent[1])
            return backward(self, wanted, x, aux, out, lse, cotangent)

        return without

    wrapped(planting, kernels.KernelFolds, "backward", change)


def last_row_of_a_column_left_out(planting):
    def change(*inputs):
        arrays = inputs[0]
        lists = arrays.columns
        count = lists.count - (lists.count > 1).astype(jnp.int32)
        lists = lists._replace(count=count, full=jnp.minimum(lists.full, count))
        return arrays._replace(columns=lists), *inputs[1:]

    launching(planting, change)


def dropout_forgotten_in_the_backward(planting):
    original, inside = tile.kept, []
    planting.setattr(tile, "kept", lambda *args: None if inside else original(*args))

    def change(launch):
        def flagged(*args):
            inside.append(True)
            try:
                return launch(*args)
            finally:
                inside.pop()

        return flagged

    wrapped(planting, kernels, "launch_backward", change)


def gradient_of_an_array_not_summed(planting):
    def change(reduce):
        def first(gradient, shape, dtype):
            if len(shape) == 4 and shape[0] == 1:
                gradient = gradient[:1]
            return reduce(gradient, shape, dtype)

        return first

    wrapped(planting, kernels, "reduce_leaf", change)


def slope_of_modifiers_forgotten(planting):
    """The derivative of a modifier in the products taken as one."""

    def change(pull_back):
        def wrong(spec, leaves, products, at, allowed, lse, wanted):
            weights, pull = pull_back(spec, leaves, products, at, allowed, lse, wanted)
            return weights, lambda d: (weights * d * spec.scale, pull(d)[1])

        return wrong

    wrapped(planting, tile, "pull_back", change)


def pairs_of_an_array_only_from_live_tiles_of_one_entry(planting):
    def change(*inputs):
        live = inputs[1]
        return inputs[0], live.at[..., -1, :].set(0), *inputs[2:]

    launching(planting, change)


PLAIN = law("plain", magnitude=3.0)
WINDOW = law("window with slopes")
FORWARD = [
    (mask_ignored_in_partial_tiles, WINDOW),
    (every_live_tile_called_full, WINDOW),
    (last_tile_of_a_list_left_out, PLAIN),
    (running_sums_not_rescaled, PLAIN),
    (keys_of_the_padding_seen, PLAIN),
    (another_head_of_the_group, PLAIN),
    (scale_forgotten, PLAIN),
    (queries_one_further, WINDOW),
    (heads_one_further, law("predicates with a function")),
    (the_next_entry_of_a_table, law("sink, strided, table of batch")),
    (counter_of_dropout_shifted, law("dropout")),
    (blind_rows_not_guarded, law("segments with a table")),
]
BACKWARD = [
    (shift_left_out, law("plain", True)),
    (cotangent_of_lse_dropped, law("plain", True)),
    (last_row_of_a_column_left_out, law("plain", True)),
    (dropout_forgotten_in_the_backward, law("dropout", True)),
    (gradient_of_an_array_not_summed, law("window with slopes", True)),
    (slope_of_modifiers_forgotten, law("padding, temperature of queries, cap", True)),
    (pairs_of_an_array_only_from_live_tiles_of_one_entry, law("causal with bias", True)),
]


@pytest.mark.parametrize(
    ("plant", "check"), [pytest.param(*x, id=x[0].__name__) for x in FORWARD + BACKWARD]
)
def test_a_planted_fault_is_caught(plant, check, planting):
    plant(planting)
    with pytest.raises(AssertionError):
        check()


def test_nan_let_through_is_caught(planting):
    planting.setattr(kernels, "isolate_bad", lambda key, value: (key, value))
    with pytest.raises(AssertionError):
        test_flash.test_what_is_masked_may_hold_anything(
            BACKEND, "softmax", True, np.random.default_rng(0)
        )


def test_nothing_is_caught_where_nothing_was_planted(planting):
    """Replacing a part by itself passes: it is not the replacing that fails."""
    wrapped(planting, tile, "evaluate", lambda evaluate: lambda *args: evaluate(*args))
    for check in (PLAIN, law("plain", True)):
        check()
