"""What lies a few tokens back: of the same document, real, and across calls by tails."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.core.past import Past

IDS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, -1], [5, 5, 5, 5, 5, 5, -1, -1, -1]])
REAL = IDS >= 0


def by_loop(x, back, missing, ids=None, real=None):
    out = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        there = t >= back
        there = there and (real is None or real[b, t - back])
        there = there and (ids is None or ids[b, t - back] == ids[b, t])
        out[b, t] = x[b, t - back] if there else missing
    return out


def numbers(rng, *shape):
    return rng.standard_normal((2, 9, *shape)).astype(np.float32)


@pytest.mark.parametrize("told", ["nothing", "real", "documents"])
@pytest.mark.parametrize("shape", [(3,), (2, 4)])
def test_each_token_gets_what_lies_before_it(rng, told, shape):
    x, missing = numbers(rng, *shape), rng.standard_normal(shape).astype(np.float32)
    known = {
        "nothing": {},
        "real": {"real": REAL},
        "documents": {"real": REAL, "ids": IDS},
    }[told]
    past = Past(1, **jax.tree.map(jnp.asarray, known))
    found = past.previous(jnp.asarray(x), 3, missing=jnp.asarray(missing))
    for back, ours in enumerate(found, 1):
        np.testing.assert_array_equal(ours, by_loop(x, back, missing, **known))


@pytest.mark.parametrize("cuts", [(0, 9), (0, 1, 2, 3, 9), (0, 4, 5, 9)])
def test_tails_carry_on_from_call_to_call(rng, cuts):
    first, second = (jnp.asarray(numbers(rng, *shape)) for shape in ((3,), (2, 2)))
    whole = Past(1)
    expected = whole.previous(first, 3), whole.previous(second)
    tails, parts = None, []
    for a, b in itertools.pairwise(cuts):
        past = Past(1, offset=a, tails=tails)
        parts.append((past.previous(first[:, a:b], 3), past.previous(second[:, a:b])))
        tails = past.tails
    for n in range(2):
        for back, exact in enumerate(expected[n]):
            joined = np.concatenate([part[n][back] for part in parts], axis=1)
            np.testing.assert_array_equal(joined, exact)


def test_missing_may_be_the_token_itself(rng):
    x = jnp.asarray(numbers(rng, 3))
    (before,) = Past(1).previous(x, missing=x)
    np.testing.assert_array_equal(before, np.concatenate([x[:, :1], x[:, :-1]], axis=1))


def test_padding_behind_a_token_may_be_nan(rng):
    x = numbers(rng, 3)
    real = np.ones((2, 9), bool)
    real[:, 4], x[:, 4] = False, np.nan

    def read(x):
        (before,) = Past(1, real=jnp.asarray(real)).previous(x)
        return jnp.sum(jnp.where(jnp.asarray(real)[..., None], jnp.sin(before), 0))

    value, slope = jax.value_and_grad(read)(jnp.asarray(x))
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))
    assert np.all(np.asarray(slope)[:, 4] == 0)


def test_a_mask_tells_of_padding_and_documents_and_nothing_of_pairs(rng):
    x = jnp.asarray(numbers(rng, 2, 4))
    for mask in (masks.Segments(jnp.asarray(IDS)), masks.Causal() & masks.Segments(IDS)):
        past = Past.of(mask, x, x)
        np.testing.assert_array_equal(past.ids, IDS)
        np.testing.assert_array_equal(past.real, REAL)
    padded = Past.of(masks.KeyPadding(jnp.asarray([6, 12])), x, x, offset=4)
    np.testing.assert_array_equal(np.sum(padded.real, -1), [2, 8])
    assert Past.of(masks.ArrayMask(jnp.ones((9, 9), bool)), x, x).real is None
    assert Past.of(masks.Causal(), x[:, :1], x).ids is None


def test_it_maps_and_compiles(rng):
    x, ids = jnp.asarray(numbers(rng, 3)), jnp.asarray(IDS)

    def run(x, ids):
        return Past(0, ids=ids).previous(x, 2)[1]

    np.testing.assert_array_equal(
        jax.jit(jax.vmap(run))(x, ids), Past(1, ids=ids).previous(x, 2)[1]
    )
