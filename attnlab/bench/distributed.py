"""Attention across devices: what methods send, hold and wait for, by mask, length and devices.

A benchmark after Bu et al. 2025 (arXiv:2510.17896): mask patterns and ways to cut a context over
devices, behind one interface.  Every form is first run, on host devices, and compared with
attention on one; then its compiled program is read for what each device sends (`traffic`), and the
mask and the layout are counted for how long devices wait (`attnlab.distributed.balance`).  Peak
memory is that of programs compiled for TPUs, which need not be there.  Time is taken where there
are several accelerators; host devices share cores, and their time means nothing.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.bench import distributed_peers as peers
from attnlab.bench.harness import Result, Row, check_same, finish, time_in_turn
from attnlab.bench.memory import counted
from attnlab.bench.traffic import Traffic, traffic
from attnlab.core.attention import attention
from attnlab.core.masks import Causal, Full, Mask, Prefix, Segments, SlidingWindow
from attnlab.distributed import over
from attnlab.distributed.balance import imbalance, work

LENGTHS, DEVICES = (2048, 8192), (4, 8)
QUICK = ((256,), (2,))
HEADS, KV_HEADS, WIDTH = 8, 8, 32
BALANCED = 1.05  # what a zigzag may wait under a causal mask, as a multiple of perfect balance

# Of memory: a million tokens, eight heads of width 128 in bfloat16, and chips.
MILLION, CHIPS = 2**20, {8: "v5e:2x4", 16: "v5e:4x4", 32: "v5e:4x8", 64: "v5e:8x8"}
SHRINKS = 1.1  # of memory per device times devices, at most


@dataclasses.dataclass(frozen=True)
class Method:
    """How a context is cut: devices on the ring's axis and on that of heads, and the layout."""

    name: str
    ring: Callable[[int], int]
    layout: str = "contiguous"

    def mesh(self, devices: Any) -> Mesh:
        """A mesh with the axes "ring" and "heads"."""
        ring = self.ring(len(devices))
        grid = np.array(devices).reshape(ring, -1)
        return Mesh(grid, ("ring", "heads"), axis_types=(AxisType.Auto,) * 2)

    def attend(self, mesh: Mesh, mask: Mask) -> Callable:
        """Attention of sharded arrays by this method."""
        ring, heads = (name if mesh.shape[name] > 1 else None for name in ("ring", "heads"))

        def run(*arrays: Any) -> Any:
            if ring is None and heads is None:
                return attention(*arrays, mask=mask, implementation="blockwise")
            with over(mesh, ring=ring, heads=heads, layout=self.layout):
                return attention(*arrays, mask=mask)

        return run

    def predicted(self, devices: int, length: int, item: int, hops: int, ids: int = 0) -> float:
        """Bytes that each device sends for the output of one sequence, by formula.

        With one part of the query, of the keys and of the values weighing Q, K and V bytes: a ring
        of R sends (hops - 1)(K + V); arranging and restoring Q + K + V + O in a zigzag, and the
        share of all but one device of that when striped; heads exchanged among U likewise.  A mask
        with `ids` bytes for each token sends those along, and arranges them once.
        """
        ring = self.ring(devices)
        groups = devices // ring
        q = length * HEADS * WIDTH * item / devices
        kv = 2 * length * KV_HEADS * WIDTH * item / devices
        marks = ids * length / ring if ring > 1 else 0
        sent = (hops - 1) * (kv + marks)
        if ring > 1 and self.layout != "contiguous":
            moved = (ring - 1) / ring if self.layout == "striped" else 1
            sent += (2 * q + kv + marks) * moved
        return sent + (2 * q + kv) * (groups - 1) / groups


METHODS = (
    Method("ring", lambda n: n),
    Method("ring, striped", lambda n: n, "striped"),
    Method("ring, zigzag", lambda n: n, "zigzag"),
    Method("heads", lambda n: 1),
    Method("ring, zigzag × heads", lambda n: n // 2, "zigzag"),
)


def patterns(length: int) -> dict[str, Mask]:
    """The masks: dense, causal, a causal window, packed documents, a prefix that all see."""
    ends = np.cumsum([0.05, 0.3, 0.1, 0.25, 0.3]) * length
    ids = np.searchsorted(ends, np.arange(length), side="right").astype(np.int32)
    return {
        "full": Full(),
        "causal": Causal(),
        "window": SlidingWindow(length // 8 - 1),
        "documents": Causal() & Segments(jnp.asarray(ids)),
        "prefix": Causal() | Prefix(length // 4),
    }


@functools.cache
def _loss(run: Callable) -> Any:
    def loss(*arrays: Any) -> Any:
        out = run(*arrays)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def host_devices(count: int) -> list[Any]:
    """As many host devices, made if need be: JAX's backends are started anew.

    Call it before arrays exist, which do not survive that.
    """
    if len(jax.devices("cpu")) < count:
        jax.extend.backend.clear_backends()
        jax.config.update("jax_num_cpu_devices", count)
    return jax.devices("cpu")[:count]


def accelerators() -> list[Any]:
    """The devices to take time on: several of one kind that are no CPU."""
    found = jax.devices()
    return found if len(found) > 1 and found[0].platform != "cpu" else []


def _inputs(length: int, dtype: Any) -> list[Any]:
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal((1, length, heads, WIDTH)), dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def _hops(pairs: np.ndarray) -> int:
    """Visitors that some device has to see, the last included."""
    return 1 + int(np.max(np.nonzero(pairs.sum(axis=1))[0], initial=0))


def _seen(
    method: str, run: Callable, mesh: Mesh, name: str, length: int, pairs: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cells and detail of a row: the method is run, compared, and its program read."""
    place = NamedSharding(mesh, P(None, ("ring", "heads")))
    arrays = [jax.device_put(x, place) for x in _inputs(length, jnp.float32)]
    out: Any = traffic(jax.jit(run).lower(*arrays).compile())
    both = _loss(run).lower(*arrays).compile()
    whole = traffic(both)
    check_same({method: _off(both(*arrays))}, _expected(name, length), 1e-5)
    wait = imbalance(pairs)
    cells = {
        "mask": name,
        "n": f"{length:,}",
        "devices": mesh.size,
        "method": method,
        "sends MB": f"{out.total / 1e6:.2f}",
        "with gradients": f"{whole.total / 1e6:.2f}",
        "messages": sum(whole.count.values()),
        "temporaries MB": f"{counted(both) / 1e6:.1f}",
        "longest ÷ mean work": f"{wait:.2f}",
    }
    return cells, {"forward": out.total, "gradients": _plain(whole), "imbalance": wait}


def _row(method: Method, name: str, mask: Mask, length: int, count: int) -> Row:
    mesh, ring = method.mesh(host_devices(count)), method.ring(count)
    pairs = work(mask, method.layout, ring, length)
    cells, detail = _seen(method.name, method.attend(mesh, mask), mesh, name, length, pairs)
    # Of a mask made of data nothing is known before it runs: all parts are visited.
    data = bool(jax.tree.leaves(mask))
    hops = _hops(pairs) if method.layout == "contiguous" and not data else ring
    predicted = method.predicted(count, length, 4, hops, ids=4 if data else 0)
    passed = abs(detail["forward"] - predicted) <= 1e-6 * max(predicted, 1)
    target = "sends as the formula says"
    if (name, method.layout) == ("causal", "zigzag"):
        target += f"; waits ≤ {BALANCED}×"
        passed = passed and detail["imbalance"] <= BALANCED
    return Row(cells, target, passed, detail | {"predicted": predicted, "hops": hops})


def _peer_row(name: str, length: int, count: int) -> Row:
    """The same of a ring of others: a full or a causal mask, in order."""
    mesh = METHODS[0].mesh(host_devices(count))
    run = peers.attend(mesh, name == "causal", min(512, length // count))
    pairs = work(patterns(length)[name], "contiguous", count, length)
    cells, detail = _seen(peers.PACKAGE, run, mesh, name, length, pairs)
    return Row(cells, detail=detail)


def _off(found: Any) -> Any:
    return jax.tree.map(np.asarray, found)


@functools.cache
def _expected(name: str, length: int) -> Any:
    """Output and gradients on one device."""
    run = Method("one", lambda n: 1).attend(
        Method("one", lambda n: 1).mesh(jax.devices("cpu")[:1]), patterns(length)[name]
    )
    return _off(_loss(run)(*_inputs(length, jnp.float32)))


def _plain(found: Traffic) -> dict[str, Any]:
    return {"bytes": dict(found.bytes), "count": dict(found.count)}


# -- memory, of chips that need not be there -------------------------------------------------------


def memory_of(method: Method, devices: list[Any], length: int) -> int:
    """Bytes that each chip takes for one layer's attention with gradients, arguments included."""
    mesh = method.mesh(devices)
    place = NamedSharding(mesh, P(None, ("ring", "heads")))
    shapes = [
        jax.ShapeDtypeStruct((1, length, 8, 128), jnp.bfloat16, sharding=place) for _ in range(3)
    ]
    compiled = _loss(method.attend(mesh, Causal())).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    return counted(compiled) + analysis.argument_size_in_bytes + analysis.output_size_in_bytes


def _memory_rows() -> Iterator[Row]:
    from jax.experimental import topologies

    method = METHODS[2]
    first = None
    for chips, topology in CHIPS.items():
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        size = memory_of(method, list(found.devices)[:chips], MILLION)
        first = size * chips if first is None else first
        share = size * chips / first
        yield Row(
            {
                "mask": "causal", "n": f"{MILLION:,}", "devices": chips, "method": method.name,
                "memory of a chip, MB": f"{size / 1e6:,.0f}",
                "memory × devices": f"{share:.2f}",
            },
            target=f"≤ {SHRINKS:.1f} of that of 8",
            passed=share <= SHRINKS,
            detail={"bytes": size, "topology": topology},
        )  # fmt: skip


def _times(length: int) -> Iterator[Row]:
    devices = accelerators()
    for name, mask in patterns(length).items():
        runs = {}
        for method in METHODS:
            mesh = method.mesh(devices)
            place = NamedSharding(mesh, P(None, ("ring", "heads")))
            arrays = [jax.device_put(x, place) for x in _inputs(length, jnp.bfloat16)]
            runs[method.name] = functools.partial(_loss(method.attend(mesh, mask)), *arrays)
        timing = time_in_turn(runs)
        for method in METHODS:
            yield Row(
                {
                    "mask": name, "n": f"{length:,}", "devices": len(devices),
                    "method": method.name, "ms": f"{timing.median(method.name) * 1e3:.2f}",
                    "÷ ring": str(timing.ratio(method.name, METHODS[0].name)),
                },
                detail={"seconds": timing.seconds[method.name]},
            )  # fmt: skip


def run(save: Any = None, quick: bool = False) -> Result:
    """Table of bytes sent, balance, memory and, on several accelerators, time."""
    lengths, counts = QUICK if quick else (LENGTHS, DEVICES)
    host_devices(max(counts))
    rows = [
        _row(method, name, patterns(length)[name], length, count)
        for length, count in itertools.product(lengths, counts)
        for name in (("causal",) if quick else patterns(length))
        for method in METHODS
    ]
    notes = [
        f"Bytes are what each device sends, {HEADS} heads of width {WIDTH} in float32; memory is "
        "at a million tokens, 8 heads of width 128 in bfloat16."
    ]
    if peers.missing():
        notes.append(f"{peers.PACKAGE}: left out, {peers.missing()}.")
    else:
        names = ("causal",) if quick else ("full", "causal")
        rows += [_peer_row(x, n, c) for n in lengths for c in counts for x in names]
    if not quick:
        try:
            rows += _memory_rows()
        except Exception as error:  # no TPU compiler, or one that does not start
            notes.append(f"memory: skipped, {str(error).splitlines()[0]}.")
    if accelerators():
        rows += _times(QUICK[0][0] if quick else 2**16)
    else:
        notes.append("time: not taken, as host devices share their cores.")
    title = "Attention across devices: what each of them sends, holds and waits for"
    return finish(Result("distributed", title, tuple(rows), tuple(notes)), save)
