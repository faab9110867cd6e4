"""Bytes between devices: the compiler's own program against formulas."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab import attention, masks
from attnlab.bench import distributed
from attnlab.bench.traffic import sent_by, traffic
from attnlab.distributed import over
from attnlab.distributed.balance import imbalance, work

MESH = jax.make_mesh((4,), ("ring",), axis_types=(AxisType.Auto,))


def on_mesh(function, in_specs, out_specs):
    return jax.shard_map(
        function, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def collective(kind, x):
    turn = [(d, (d + 1) % 4) for d in range(4)]
    return {
        "collective-permute": lambda: jax.lax.ppermute(x, "ring", turn),
        "all-to-all": lambda: jax.lax.all_to_all(x, "ring", 0, 0, tiled=True),
        "all-gather": lambda: jax.lax.all_gather(x, "ring", tiled=True),
        "reduce-scatter": lambda: jax.lax.psum_scatter(x, "ring", tiled=True),
        "all-reduce": lambda: jax.lax.psum(x, "ring"),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("collective-permute", 64), ("all-to-all", 48), ("all-gather", 192), ("reduce-scatter", 48),
     ("all-reduce", 96)],
)  # fmt: skip
def test_each_collective_counts_as_often_as_its_loop_turns(kind, sent):
    """16 float32 numbers, 64 bytes, on each of four devices."""

    def once(x):
        return jnp.sum(collective(kind, x)) + jnp.zeros((1,))

    def often(x):
        def turn(total, n):
            return total + once(x * n), None

        steps = jnp.arange(5, dtype=jnp.float32)
        return jax.lax.scan(turn, jnp.zeros((1,)), steps)[0]

    x = jax.device_put(jnp.ones(64), NamedSharding(MESH, P("ring")))
    for function, times in ((once, 1), (often, 5)):
        found = sent_by(on_mesh(function, P("ring"), P("ring")), x)
        assert dict(found.bytes) == {kind: times * sent}
        assert dict(found.count) == {kind: times}
        assert found.total == times * sent


def test_a_loop_of_unknown_length_is_not_guessed():
    def until(x):
        turn = [(d, (d + 1) % 4) for d in range(4)]
        return jax.lax.while_loop(
            lambda x: jnp.max(x) < 9, lambda x: jax.lax.ppermute(x + 1, "ring", turn), x
        )

    x = jax.device_put(jnp.ones(64), NamedSharding(MESH, P("ring")))
    with pytest.raises(ValueError, match="how often this loop turns is not known"):
        sent_by(on_mesh(until, P("ring"), P("ring")), x)


def test_groups_in_words_that_are_not_known_are_an_error():
    line = "ENTRY %main (a: f32[8]) -> f32[8] {\n  %x = f32[8]{0} all-reduce(%a), who=me\n}"
    with pytest.raises(ValueError, match="who takes part is not said as expected"):
        traffic(types.SimpleNamespace(as_text=lambda: line))


def test_a_ring_sends_keys_and_values_and_no_more():
    """Forward P - 1 parts of keys and values; backward these again, and their gradients P times."""
    length, heads, kv_heads, width = 32, 4, 2, 8
    place = NamedSharding(MESH, P(None, "ring"))
    arrays = [
        jax.ShapeDtypeStruct((1, length, n, width), jnp.float32, sharding=place)
        for n in (heads, kv_heads, kv_heads)
    ]

    def attend(*arrays):
        with over(MESH, ring="ring"):
            return attention(*arrays, mask=masks.Causal())

    def loss(*arrays):
        return jnp.sum(attend(*arrays) ** 2)

    numbers = 2 * length // 4 * kv_heads * width
    forward = sent_by(attend, *arrays)
    assert dict(forward.bytes) == {"collective-permute": 3 * numbers * 4}
    both = sent_by(jax.grad(loss, (0, 1, 2)), *arrays)
    assert dict(both.bytes) == {"collective-permute": (2 * 3 + 4) * numbers * 4}


def test_a_window_is_sent_no_further_than_it_reaches():
    place = NamedSharding(MESH, P(None, "ring"))
    array = jax.ShapeDtypeStruct((1, 32, 2, 8), jnp.float32, sharding=place)

    def attend(*arrays):
        with over(MESH, ring="ring"):
            return attention(*arrays, mask=masks.SlidingWindow(7))

    assert sent_by(attend, array, array, array).count == {"collective-permute": 2}


@pytest.mark.parametrize(("layout", "wait"), [("contiguous", 7 / 4), ("striped", 1), ("zigzag", 1)])
def test_who_waits(layout, wait):
    """In order, later hops have a device with a whole part: P - 1/2, where the mean is P / 2."""
    length, devices = 1024, 4
    pairs = work(masks.Causal(), layout, devices, length)
    assert pairs.sum() == length * (length + 1) // 2
    assert imbalance(pairs) == pytest.approx(wait, rel=0.01)
    if layout == "zigzag":
        assert (pairs == pairs[:, :1]).all() and imbalance(pairs) == 1


def test_work_counts_what_is_computed():
    ids = jnp.asarray(np.repeat([0, 1, 2], [20, 30, 14]), jnp.int32)
    mask = masks.Segments(ids) & masks.Causal()
    assert work(mask, "striped", 8, 64).sum() == sum(n * (n + 1) // 2 for n in (20, 30, 14))
    with pytest.raises(ValueError, match="length: expected a multiple of 16, got 40"):
        work(mask, "zigzag", 8, 40)


def test_every_method_is_held_against_its_formula():
    assert [m.name for m in distributed.METHODS if m.ring(8) == 8] == [
        "ring", "ring, striped", "ring, zigzag"
    ]  # fmt: skip
    hybrid = distributed.METHODS[-1]
    part = 1024 * 8 * 32 * 4 // 8  # a part of the query, in bytes
    # Three hops of keys and values, four arrays arranged, half of four exchanged.
    assert hybrid.predicted(8, 1024, 4, 4) == part * (3 * 2 + 4 + 4 / 2)
