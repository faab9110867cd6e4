"""The plain recurrences of flash-linear-attention on PyTorch, side by side with ours.

The environment variable ATTNLAB_FLA names a checkout of fla-org/flash-linear-attention; without it,
or without torch and einops, all of this is skipped.  Its `naive` files are loaded one by one: they
need no GPU.  Gates go from none to what has made chunked forms overflow, in values and gradients.
"""

import importlib.util
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.linear.deltanet import delta_rule_attention
from attnlab.linear.docmamba import docmamba_attention
from attnlab.linear.gated_deltanet import gated_delta_rule_attention
from attnlab.linear.gla import gated_linear_attention
from attnlab.linear.linear_transformer import elu_plus_one, linear_transformer_attention
from attnlab.linear.mamba2 import state_space_attention
from attnlab.linear.retnet import retention
from attnlab.linear.rwkv7 import rwkv7_attention
from attnlab.linear.transnormer import lightning_attention, lightning_decay
from tests.tolerances import as_float64, error, largest

ROOT = os.environ.get("ATTNLAB_FLA")
MISSING = [name for name in ("torch", "einops") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(not ROOT, reason="ATTNLAB_FLA names no flash-linear-attention"),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
]
BATCH, HEADS, WIDTH, VALUES = 2, 2, 8, 5
CLOSE = 1e-5  # of the largest entry: what two computations in float32 may differ by


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

        return torch


@pytest.fixture(scope="module")
def peer(torch):
    def load(path):
        """The module of one file, without the package around it."""
        file = Path(ROOT) / "fla" / "ops" / path / "naive.py"
        spec = importlib.util.spec_from_file_location("peer_" + path.replace("/", "_"), file)
        module = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
        return module

    return load


def close(ours, theirs, words=""):
    theirs = as_float64(theirs)
    assert np.all(np.isfinite(as_float64(ours))), f"{words}: not finite"
    found, allowed = error(ours, theirs), CLOSE * max(1.0, largest(theirs))
    assert found <= allowed, f"{words}: differs by {found:.3g}, allowed {allowed:.3g}"


class Sides:
    """The same inputs for both, and the outputs and gradients of both."""

    def __init__(self, torch, ours, theirs):
        self.torch, self.theirs = torch, theirs

        def loss(*arrays):
            out = ours(*arrays)
            return jnp.sum(jnp.cos(out)), out

        def run(*arrays):
            (_, out), slopes = jax.value_and_grad(
                loss, argnums=tuple(range(len(arrays))), has_aux=True
            )(*arrays)
            return out, slopes

        self.run = jax.jit(run)

    def compare(self, words, *arrays, slopes=True):
        out, ours = self.run(*map(jnp.asarray, arrays))
        tensors = [self.torch.tensor(x, requires_grad=slopes) for x in arrays]
        given = self.theirs(*tensors)
        close(out, given.detach(), words)
        if not slopes:
            return
        given.cos().sum().backward()
        for n, (mine, tensor) in enumerate(zip(ours, tensors, strict=True)):
            close(mine, tensor.grad, f"{words}, gradient of argument {n}")


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def normal(rng, length, *, keys=WIDTH, values=VALUES):
    """Query, key and value; keys of length 1."""
    shape = (BATCH, length, HEADS)
    query, key, value = (rng.standard_normal((*shape, w)) for w in (keys, keys, values))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    return [x.astype(np.float32) for x in (query, key, value)]


def gates(rng, shape):
    """Logarithms of decays, by what they have done to other implementations."""
    mixed, one = np.full(shape, -1e-3), np.zeros(shape)
    mixed[..., ::2], one[..., 0] = -30.0, -25.8
    late = np.full(shape, -8.0)
    late[:, shape[1] // 2 :] = -1e-3
    return {
        "mild": np.log(rng.uniform(0.5, 1.0, shape)),
        "none": np.zeros(shape),
        "half of them none": np.where(rng.random(shape) < 0.5, 0.0, np.log(rng.random(shape))),
        "one of -25.8": one,
        "-5 everywhere": np.full(shape, -5.0),
        "-50 to -5": rng.uniform(-50, -5, shape),
        "0 to -80": -rng.uniform(0, 80, shape),
        "some -30, some -0.001": mixed,
        "-8, then -0.001": late,
    }


# ---- without gates -------------------------------------------------------------------------------


def test_the_linear_transformer(torch, peer, rng):
    """Normalized; the gradient goes through the denominator too."""

    def theirs(query, key, value):
        phi = [torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0))) for x in (query, key)]
        return peer("linear_attn").naive_recurrent_linear_attn(*phi, value, normalize=True)[0]

    def ours(query, key, value):
        return linear_transformer_attention(
            query, key, value, mask=masks.Causal(), epsilon=0.0, feature_map=elu_plus_one
        )

    Sides(torch, ours, theirs).compare("linear transformer", *normal(rng, 75))


def test_retention(torch, peer, rng):
    def theirs(*arrays):
        return heads_first(peer("retention").naive_retention(*heads_first(*arrays)))[0]

    sides = Sides(torch, lambda *x: retention(*x, theta=None), theirs)
    for length in (1, 63, 256):
        sides.compare(f"retention, {length}", *normal(rng, length))


def test_lightning_attention(torch, peer, rng):
    """Their scalar decay with silu before: TransNormer's core, in chunks and step by step."""
    decay = {rule: lightning_decay(HEADS, rule=rule, num_layers=3) for rule in ("release", "paper")}
    for rule, g in decay.items():
        constant = torch.tensor(np.asarray(g)).expand(BATCH, 75, HEADS)
        for name in ("naive_recurrent_simple_gla", "naive_chunk_simple_gla"):

            def theirs(query, key, value, name=name, constant=constant):
                silu = torch.nn.functional.silu
                run = getattr(peer("simple_gla"), name)
                return run(silu(query), silu(key), value, constant, scale=1.0)[0]

            def ours(*arrays, g=g):
                return lightning_attention(*arrays, log_decay=g)

            Sides(torch, ours, theirs).compare(f"{rule}, {name}", *normal(rng, 75))


def test_the_delta_rule(torch, peer, rng):
    arrays = [*normal(rng, 128), rng.random((BATCH, 128, HEADS)).astype(np.float32)]
    arrays[0] /= np.linalg.norm(arrays[0], axis=-1, keepdims=True)
    calls = {
        "delta_rule_recurrence": {}, "delta_rule_chunkwise": {"chunk_size": 32},
        "delta_rule_parallel": {"BM": 64, "BN": 32},
    }  # fmt: skip

    def ours(query, key, value, beta):
        return delta_rule_attention(query, key, value, beta=beta, unit_keys=False)

    for name, options in calls.items():

        def theirs(*arrays, name=name, options=options):
            run = getattr(peer("delta_rule"), name)
            return heads_first(run(*heads_first(*arrays), **options)[0])[0]

        first = name == "delta_rule_recurrence"
        Sides(torch, ours, theirs).compare(name, *arrays, slopes=first)


# ---- gates ---------------------------------------------------------------------------------------


def test_gated_linear_attention(torch, peer, rng):
    def theirs(*arrays):
        return peer("gla").naive_recurrent_gla(*arrays)[0]

    def ours(query, key, value, g):
        return gated_linear_attention(query, key, value, log_decay=g)

    sides = Sides(torch, ours, theirs)
    arrays = normal(rng, 130)
    for words, g in gates(rng, (BATCH, 130, HEADS, WIDTH)).items():
        sides.compare(words, *arrays, g.astype(np.float32))


def test_gated_linear_attention_over_a_long_sequence(torch, peer, rng):
    arrays = [x[:1] for x in normal(rng, 4096)]
    g = -rng.uniform(0.5, 3.0, arrays[1].shape).astype(np.float32)
    out = gated_linear_attention(*map(jnp.asarray, arrays), log_decay=jnp.asarray(g))
    theirs = peer("gla").naive_recurrent_gla(*map(torch.tensor, (*arrays, g)))[0]
    close(out, theirs)


def test_mamba2(torch, peer, rng):
    """Their scalar gate, with C, B and dt x for query, key and value, and no scale."""

    def ours(query, key, value, step, g):
        return state_space_attention(query, key, value, step=step, log_decay=g)

    arrays = [*normal(rng, 130), rng.random((BATCH, 130, HEADS)).astype(np.float32)]
    for name, slopes in (
        ("naive_recurrent_simple_gla", True), ("naive_chunk_simple_gla", False),
        ("naive_parallel_simple_gla", False),
    ):  # fmt: skip

        def theirs(query, key, value, step, g, name=name):
            run = getattr(peer("simple_gla"), name)
            return run(query, key, step[..., None] * value, g, scale=1.0)[0]

        sides = Sides(torch, ours, theirs)
        for words, g in gates(rng, (BATCH, 130, HEADS)).items():
            if name == "naive_recurrent_simple_gla" or words in ("mild", "none"):
                sides.compare(f"{name}, {words}", *arrays, g.astype(np.float32), slopes=slopes)


@pytest.mark.parametrize("length", [7, 50, 130])
def test_the_gated_delta_rule(length, torch, peer, rng):
    def theirs(query, key, value, beta, g):
        run = peer("gated_delta_rule").naive_recurrent_gated_delta_rule
        return run(query, key, value, beta, g)[0]

    def ours(query, key, value, beta, g):
        return gated_delta_rule_attention(
            query, key, value, beta=beta, log_decay=g, unit_keys=False
        )

    sides = Sides(torch, ours, theirs)
    arrays = [*normal(rng, length), rng.random((BATCH, length, HEADS)).astype(np.float32)]
    for words, g in gates(rng, (BATCH, length, HEADS)).items():
        sides.compare(words, *arrays, g.astype(np.float32))


def test_the_gated_delta_rule_in_their_chunks(torch, peer, rng):
    arrays = [*normal(rng, 130), rng.random((BATCH, 130, HEADS)).astype(np.float32)]
    g = gates(rng, (BATCH, 130, HEADS))["mild"].astype(np.float32)
    query, key, value, beta, gate = map(torch.tensor, (*arrays, g))
    run = peer("gated_delta_rule").naive_chunk_gated_delta_rule
    out = gated_delta_rule_attention(
        *map(jnp.asarray, arrays[:3]), beta=jnp.asarray(arrays[3]), log_decay=jnp.asarray(g),
        unit_keys=False,
    )  # fmt: skip
    close(out, run(query, key, value, gate, beta)[0])  # gate and beta the other way round


def rwkv7(query, key, value, rate, g, **options):
    """Removal keys are the keys, and are written as they are."""
    ones, zeros = jnp.ones(key.shape[-2:]), jnp.zeros(key.shape[-2:])
    return rwkv7_attention(
        query, key, value, rate=rate, log_decay=g, removal=ones, replacement=zeros, **options
    )


def dplr(peer, name="dplr_recurrence"):
    def theirs(query, key, value, rate, g, **options):
        unit = key / key.norm(dim=-1, keepdim=True)
        query = query * WIDTH**0.5  # which they divide by
        arrays = heads_first(query, key, value, -unit, rate * unit, g)
        return getattr(peer("generalized_delta_rule/dplr"), name)(*arrays, **options)

    return theirs


def test_rwkv7(torch, peer, rng):
    """Diagonal plus low rank: their general transition at RWKV-7's vectors."""
    sides = Sides(torch, rwkv7, lambda *x: heads_first(dplr(peer)(*x)[0])[0])
    arrays = [*normal(rng, 64), rng.random((BATCH, 64, HEADS, WIDTH)).astype(np.float32)]
    for words, g in gates(rng, (BATCH, 64, HEADS, WIDTH)).items():
        sides.compare(words, *arrays, g.astype(np.float32))


def test_rwkv7_from_a_state_and_in_their_chunks(torch, peer, rng):
    arrays = [*normal(rng, 64), rng.random((BATCH, 64, HEADS, WIDTH)).astype(np.float32)]
    arrays.append(np.log(rng.uniform(0.5452, 1, arrays[1].shape)).astype(np.float32))
    state = rng.standard_normal((BATCH, HEADS, WIDTH, VALUES)).astype(np.float32)
    out, last = rwkv7(*map(jnp.asarray, arrays), initial_state=jnp.asarray(state),
                      return_state=True)  # fmt: skip
    for name, options in (("dplr_recurrence", {}), ("dplr_chunkwise", {"chunk_size": 16})):
        given = dplr(peer, name)(
            *map(torch.tensor, arrays), initial_state=torch.tensor(state), **options
        )
        close(out, heads_first(given[0])[0], name)
        close(last, given[1], f"{name}, state")


def test_docmamba(torch, peer, rng):
    """Their recurrence with a gate per channel, run from both ends."""

    def theirs(query, key, value, step, g):
        run, total = peer("gla").naive_recurrent_gla, 0.0
        for side in range(2):
            arrays = query, key, step[:, :, side, :, None] * value, g[:, :, side]
            arrays = [x.flip(1) for x in arrays] if side else arrays
            out = run(*arrays)[0] * WIDTH**0.5
            total = total + (out.flip(1) if side else out)
        return total / 2

    def ours(query, key, value, step, g):
        return docmamba_attention(query, key, value, step=step, log_decay=g)

    sides = Sides(torch, ours, theirs)
    arrays = [*normal(rng, 75), rng.random((BATCH, 75, 2, HEADS)).astype(np.float32)]
    for words, g in gates(rng, (BATCH, 75, 2, HEADS, WIDTH)).items():
        sides.compare(words, *arrays, g.astype(np.float32))
