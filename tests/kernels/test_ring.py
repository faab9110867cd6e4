"""Kernels round a ring: the numbers of the reference, forward and backward, on 2 and 4 devices."""

import contextlib
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnlab import attention, masks, normalizers, scores
from attnlab.core import kernels
from attnlab.distributed import over
from attnlab.distributed.remote import RemoteFolds
from pallas_kernels.flash import plan as flash_plan
from pallas_kernels.flash import tpu as flash_tpu
from pallas_kernels.flash.problem import Arrays, Spec
from pallas_kernels.inspect import tpu_missing
from pallas_kernels.inspect.llo import LABELS, read_kernel
from pallas_kernels.ring import plan, tpu
from tests.core import draw
from tests.kernels import cases

# Copies are made as soon as they are started, memory that nobody wrote is NaN, races raise.
WATCHED = pltpu.InterpretParams(
    detect_races=True,
    out_of_bounds_reads="raise",
    uninitialized_memory="nan",
    dma_execution_mode="eager",
)
EXACT = 1e-5


@functools.cache
def ring_of(devices):
    return jax.make_mesh((devices,), ("ring",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(RemoteFolds, "_interpret", WATCHED)
    yield
    pltpu.reset_tpu_interpret_mode_state()


def results(arrays, mask, modifiers, normalizer, compiler_options=None, **options):
    """Output, log-sum-exp, and the gradients of a loss in every array that has one."""

    shared = normalizer.kind == "shared"

    def loss(arrays, modifiers):
        found = attention(
            *arrays, mask=mask, modifiers=modifiers, normalizer=normalizer, return_lse=shared,
            **options,
        )  # fmt: skip
        out, lse = found if shared else (found, jnp.zeros(()))
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        seen = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(out.astype(jnp.float32) * weights) + jnp.sum(jnp.sin(seen)), (out, lse)

    slope = jax.grad(loss, (0, 1), has_aux=True)
    return jax.jit(slope, compiler_options=compiler_options)(arrays, modifiers)


def assert_equal(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        scale = max(1.0, float(jnp.abs(jnp.where(jnp.isfinite(b), b, 0)).max()))
        assert bool(jnp.all((a == b) | (jnp.abs(a - b) <= EXACT * scale)))


def terms(size, *names):
    """A mask and modifiers whose arrays travel, are cut by columns, or stay."""
    ids = jnp.arange(size.keys, dtype=jnp.int32)[None] // 25
    slopes = scores.AlibiSlopes(jnp.linspace(0.1, 0.5, size.heads))
    return masks.Causal() & masks.Segments(ids), (
        *(draw.modifier(name, size, 5).term for name in names),
        slopes,
    )


def assert_ring_equals_whole(devices, implementation, layout, normalizer, *names):
    size = draw.Sizes((1,), 40, 40, 2, 1, 8, 3)
    arrays = [jnp.asarray(x) for x in draw.inputs(size, 3)]
    call = (arrays, *terms(size, *names), normalizer)
    wanted = results(*call, implementation="reference")
    with over(ring_of(devices), ring="ring", layout=layout), kernels.interpret():
        found = results(*call, cases._CHEAP, implementation=implementation)
    assert_equal(found, wanted)


def test_triton_kernels_go_round_a_ring():
    assert_ring_equals_whole(2, "triton", "contiguous", normalizers.Softmax(), "bias")


def test_tpu_kernels_send_keys_and_gradients_on(watched):
    """Forward and backward, with every access to memory of either device watched for races."""
    assert_ring_equals_whole(2, "tpu", "striped", normalizers.Softmax())


@pytest.mark.slow
@pytest.mark.parametrize("devices", [3, 4])
def test_tpu_kernels_go_round_larger_rings(devices, watched):
    assert_ring_equals_whole(devices, "tpu", "zigzag", normalizers.Softmax(), "bias by head")
    assert_ring_equals_whole(devices, "tpu", "contiguous", normalizers.Sigmoid())


@pytest.mark.slow
def test_rings_side_by_side_and_mapped():
    """Two rings of a mesh with two axes, under `vmap`: neighbours are those of the same ring."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("batch", "ring"), axis_types=auto)
    size = draw.Sizes((2, 2), 20, 20, 2, 1, 8, 4)
    arrays = [jnp.asarray(x) for x in draw.inputs(size, 3)]
    whole = functools.partial(attention, mask=masks.Causal(), implementation="reference")
    spread = functools.partial(attention, mask=masks.Causal(), implementation="tpu")
    wanted = jax.vmap(whole)(*arrays)
    with over(mesh, ring="ring", batch="batch"), kernels.interpret():
        assert_equal(jax.jit(jax.vmap(spread))(*arrays), wanted)


def test_half_precision_is_merged_in_full(monkeypatch):
    """Several hops round no more often than one call: sums of parts stay in float32.

    Here the compiler moves the keys, as on TPUs with two cores.
    """
    monkeypatch.setattr(tpu, "limits", lambda kind: "uses one core of two")
    size = draw.Sizes((1,), 64, 64, 2, 1, 16, 16)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in draw.inputs(size, 1)]
    exact = [x.astype(jnp.float32) for x in arrays]
    call = (masks.Causal(), (), normalizers.Softmax())
    wanted = results(exact, *call, implementation="reference")
    with kernels.interpret():
        alone = results(arrays, *call, cases._CHEAP, implementation="tpu")
        with over(ring_of(2), ring="ring", layout="zigzag"):
            spread = results(arrays, *call, cases._CHEAP, implementation="tpu")

    def errors(found):
        return [
            float(jnp.abs(a.astype(jnp.float32) - b).max())
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        ]

    for one, many in zip(errors(alone), errors(spread), strict=True):
        assert many <= 1.5 * one + 1e-6


# ---- one hop -------------------------------------------------------------------------------------


class Softmax:
    """The plainest program."""

    shared = True

    def allowed(self, leaves, at):
        return at.key >= 0

    def evaluate(self, leaves, products, at):
        return products


SOFTMAX = Softmax()


def round_the_ring(devices):
    """Attention over all keys by as many launches as there are devices, and what it should be."""
    ring, part = plan.Ring("ring", devices), 128
    spec = Spec(SOFTMAX, (), 0.25, (part, part), (part, part), part=True)
    live = np.ones((1, 1, 1, 1), bool)

    def around(query, key, value):
        found = []
        for _ in range(devices):
            lists = jax.tree.map(jnp.asarray, flash_plan.make_flat(live, live))
            arrays = Arrays(query, key, value, [], lists)
            out, lse, (key, value) = tpu.forward(spec, arrays, ring, interpret=WATCHED)
            found.append((out, lse))
        out, lse = map(jnp.stack, zip(*found, strict=True))
        return jnp.sum(jax.nn.softmax(lse, 0)[..., None] * out, 0)

    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, heads, devices * part, 16)), jnp.float32)
        for heads in (2, 1, 1)
    )
    cut = jax.sharding.PartitionSpec(None, None, "ring")
    spread = jax.shard_map(
        around, mesh=ring_of(devices), in_specs=(cut,) * 3, out_specs=cut, check_vma=False
    )
    weights = jax.nn.softmax(0.25 * jnp.einsum("bnth,bksh->bnts", query, key))
    return jax.jit(spread)(query, key, value), weights @ value


def test_a_hop_sends_what_it_reads(watched):
    assert_equal(*round_the_ring(4))


def onto_the_keys_at_hand(self, arrays, _, scratch):
    return self_copies(self, arrays, arrays, scratch)


def only_until_sent(self, *refs):
    for copy in self._copies(*refs):
        copy.wait_send()


self_copies = tpu.Send._copies


@pytest.mark.parametrize(
    ("name", "fault"),
    [("after", only_until_sent), ("_copies", onto_the_keys_at_hand)],
    ids=["nobody waits for what arrives", "one buffer instead of two"],
)
def test_a_planted_race_is_caught(name, fault, watched, monkeypatch):
    """A barrier left out is not: the interpreter gives each launch new memory."""
    monkeypatch.setattr(tpu.Send, name, fault)
    with pytest.raises(Exception, match="RACE DETECTED"):
        jax.block_until_ready(round_the_ring(2))
    with contextlib.suppress(Exception):  # what the other device has to say of it
        jax.effects_barrier()


# ---- the real compiler ---------------------------------------------------------------------------


def compiled_ring(folder, topology, length, gradient):
    """The program, and what libtpu left of each of its kernels."""
    (folder / "dumps").mkdir()
    flags = f"--xla_jf_dump_to={folder / 'dumps'} --xla_jf_dump_llo_text=true"
    flags += f" --xla_jf_dump_llo_pass_label_regex={LABELS}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags, "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.getcwd(),
    }  # fmt: skip
    worker = [sys.executable, str(Path(__file__).with_name("ring_worker.py")), str(folder)]
    run = subprocess.run(
        [*worker, topology, str(length), str(int(gradient))], env=environment, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    text = (folder / "program.txt").read_text()
    names = re.findall(r'%(flash[\w.-]+) = .*custom_call_target="tpu_custom_call"', text)
    # Of kernels that are alike one is compiled.
    names = [name for name in names if list((folder / "dumps").glob(f"*-{name}-0*"))]
    return text, {name: read_kernel(folder / "dumps", name) for name in names}


def schedule(folder, name):
    """Bundles of a kernel that start a copy between devices, multiply, or wait for a copy."""
    (file,) = (folder / "dumps").glob(f"*-{name}-*[0-9]-final_bundles.txt")
    bundles = file.read_text().splitlines()

    def having(word):
        return [n for n, bundle in enumerate(bundles) if word in bundle]

    return having("dma.general"), having("vmatmul"), having("dma.done.wait")


def check_compiled(folder, topology, kind, length, gradient):
    """Which kernels there are, and for each whether some send and some do not."""
    text, found = compiled_ring(folder, topology, length, gradient)
    kinds = {}
    for name, kernel in found.items():
        assert 0 < kernel.vmem_bytes <= flash_tpu.vector_memory(kind)
        starts, products, waits = schedule(folder, name)
        kinds.setdefault(name.split(".")[0], set()).add(bool(starts))
        if starts:
            assert len(starts) == 2  # keys and values, or their gradients
            assert max(starts) < min(products)
            assert sum(wait > max(products) for wait in waits) >= 4  # left and arrived, of both
    # The compiler moves gradients home, nothing else.
    moved = len(re.findall(r"collective-permute-start\(", text))
    assert moved == (2 if gradient else 0)
    return kinds


needs_libtpu = pytest.mark.skipif(tpu_missing() is not None, reason=tpu_missing() or "")


@needs_libtpu
def test_copies_start_before_the_products_and_end_after_them(tmp_path):
    kinds = check_compiled(tmp_path, "v5e:2x2", "TPU v5 lite", 8192, False)
    assert kinds == {"flash_forward": {True, False}}  # the last hop sends nothing


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "kind"), [("v5e:4x4", "TPU v5 lite"), ("v5p:2x2x4", "TPU v5")]
)
def test_rings_of_sixteen_compile(topology, kind, tmp_path):
    kinds = check_compiled(tmp_path, topology, kind, 65536, True)
    assert kinds == {f"flash_{name}": {True, False} for name in ("forward", "rows", "columns")}


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"implementation": "triton"}, 'triton" needs an NVIDIA GPU.*"blockwise" can'),
        ({"implementation": "tpu", "mask": masks.Blocks(jnp.ones((1, 1), bool), (32, 32))},
         'tpu" has no arrays with one entry for a block of positions.*"blockwise" can'),
    ],
)  # fmt: skip
def test_what_a_kernel_cannot_is_refused(options, words):
    three = [jnp.zeros((1, 32, 2, 8))] * 3
    inside = kernels.interpret() if "mask" in options else contextlib.nullcontext()
    with over(ring_of(2), ring="ring"), inside, pytest.raises(NotImplementedError, match=words):
        attention(*three, **options)
