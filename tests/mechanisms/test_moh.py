"""Mixture-of-head attention: the gates, what has a gradient, and what balance costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks
from attnlab.core.gates import Projection
from attnlab.heads.moh import (
    HeadPlan,
    MoH,
    balance_loss,
    head_gates,
    moh_attention,
    query_norm_gates,
)
from tests.contract.positional_formulas import moh_gates
from tests.tolerances import as_float64, assert_close, assert_reordered


def logits(rng, *widths, length=40):
    return [jnp.asarray(rng.standard_normal((length, n)), jnp.float32) for n in widths]


def layer(mechanism, **options):
    return MultiHeadAttention(32, 8, mechanism=mechanism, rngs=nnx.Rngs(1), **options)


def test_gates_of_one_are_the_sum_over_heads_of_multi_head_attention(rng):
    """Written as a sum over heads of what each sends through its rows of W^O."""
    query, key, value = (jnp.asarray(rng.standard_normal((9, 4, 8)), jnp.float32) for _ in range(3))
    rows = rng.standard_normal((4, 8, 6))
    heads = as_float64(attention(query, key, value))
    gated = as_float64(moh_attention(query, key, value, gates=jnp.ones((9, 4))))
    np.testing.assert_array_equal(gated, heads)
    by_head = sum(gated[:, n] @ rows[n] for n in range(4))
    np.testing.assert_allclose(by_head, heads.reshape(9, 32) @ rows.reshape(32, 6), atol=1e-12)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("shared", "active"), [(1, 2), (3, 4), (0, 5), (2, 5), (4, 1)])
def test_gates_are_those_of_the_formula(rng, scaled, shared, active):
    routed, always, split = logits(rng, 5, shared, 2)
    split = split if shared else None
    gates = head_gates(routed, always, split, active, scaled=scaled)
    exact = moh_gates(
        *(as_float64(x) for x in (routed, always)),
        None if split is None else as_float64(split), active, scaled=scaled,
    )  # fmt: skip
    assert_close(gates, exact, np.float32)
    assert np.all(np.sum(np.asarray(gates) > 0, -1) == shared + active)


def test_equal_logits_make_every_active_head_one_and_the_first_heads_active():
    zero = jnp.zeros((3, 5))
    gates = np.asarray(head_gates(zero, jnp.zeros((3, 3)), jnp.zeros((3, 2)), 2))
    np.testing.assert_array_equal(gates, np.tile([1, 1, 1, 1, 1, 0, 0, 0], (3, 1)))
    plain = head_gates(zero, jnp.zeros((3, 3)), jnp.zeros((3, 2)), 2, scaled=False)
    assert_close(np.sum(plain, -1), np.full(3, 0.5 + 0.5 * 2 / 5), np.float32)


@pytest.mark.parametrize("scaled", [True, False])
def test_logits_of_heads_not_chosen_have_a_gradient_in_the_papers_form_alone(rng, scaled):
    routed, shared, split = logits(rng, 6, 2, 2)
    read = jnp.asarray(rng.standard_normal((40, 8)), jnp.float32)

    def loss(routed):
        return jnp.sum(read * head_gates(routed, shared, split, 3, scaled=scaled))

    gradient = np.abs(np.asarray(jax.grad(loss)(routed)))
    idle = moh_gates(*map(as_float64, (routed, shared, split)), 3)[:, 2:] == 0
    assert np.all((gradient[idle] == 0) == scaled)
    assert np.all(gradient[~idle] > 0)


def test_a_head_that_is_not_heard_has_no_gradient(rng):
    mechanism = MoH(16, 4, num_shared=1, num_active=1, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((10, 16)), jnp.float32)
    idle = np.asarray(mechanism.gates(x)) == 0
    assert idle.sum() == 20
    out = jnp.asarray(rng.standard_normal((10, 4, 5)), jnp.float32)
    gradient = np.asarray(jax.grad(lambda y: jnp.sum(jnp.sin(mechanism.finish(y, x))))(out))
    assert np.all(gradient[idle] == 0)
    assert np.all(gradient[~idle] != 0)


def test_balance_of_tokens_that_agree_is_least_where_it_is_uniform(rng):
    for row in rng.standard_normal((20, 6)):
        same = jnp.broadcast_to(jnp.asarray(row, jnp.float32), (7, 6))
        assert balance_loss(same, 2) > 2.0
    assert_close(balance_loss(jnp.zeros((7, 6)), 2), np.asarray(2.0), np.float32)


def test_balance_of_tokens_that_differ_may_be_lower_than_uniform():
    """Six undecided tokens choose the first head, four decided ones the other."""
    rows = np.log(np.array([[0.51, 0.49]] * 6 + [[1e-9, 1.0]] * 4))
    loss = balance_loss(jnp.asarray(rows, jnp.float32), 1)
    assert_close(loss, np.asarray(2 * (0.6 * 0.306 + 0.4 * 0.694)), np.float32)
    assert loss < 0.95


def test_balance_counts_real_tokens(rng):
    (routed,) = logits(rng, 5, length=12)
    real = jnp.arange(12) < 7
    assert_reordered(balance_loss(routed, 2, real=real), balance_loss(routed[:7], 2), np.float32)


def test_the_routers_of_the_code(rng):
    """Eight heads: three shared, five to choose from; and none of them for a choice by norms."""
    mechanism = MoH(32, 8, num_shared=3, num_active=3, rngs=nnx.Rngs(0))
    shapes = {n: getattr(mechanism, n).weight.shape for n in ("routed", "shared", "split")}
    assert shapes == {"routed": (32, 5), "shared": (32, 3), "split": (32, 2)}
    assert mechanism.plan.share == 0.75
    by_norm = MoH(32, 8, num_shared=4, num_active=2, router="query-norm", rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(by_norm, nnx.Param))
    query = jnp.asarray(rng.standard_normal((6, 8, 4)), jnp.float32)
    gates = np.asarray(query_norm_gates(query, by_norm.plan))
    norms = np.linalg.norm(as_float64(query), axis=-1)[:, 4:]
    for row, norm in zip(gates, norms, strict=True):
        np.testing.assert_array_equal(row[:4], 1)
        assert set(np.flatnonzero(row[4:])) == set(np.argsort(norm)[-2:])
    out = by_norm(query, query, query)
    assert np.all((np.asarray(out) == 0) == (gates == 0)[..., None])


@pytest.mark.parametrize("plan", [(0, 4), (8, 0), (1, 7)])
def test_heads_may_all_be_shared_or_all_be_routed(rng, plan):
    shared, active = plan
    mechanism = MoH(32, 8, num_shared=shared, num_active=active, rngs=nnx.Rngs(0))
    gates = np.asarray(mechanism.gates(jnp.asarray(rng.standard_normal((5, 32)), jnp.float32)))
    assert np.all(np.sum(gates > 0, -1) == shared + active)


@pytest.mark.parametrize("router", ["input", "query-norm"])
def test_a_layer_decodes_what_it_reads_at_once(rng, router):
    mechanism = MoH(32, 8, num_shared=2, num_active=3, router=router, rngs=nnx.Rngs(0))
    module = layer(mechanism, num_kv_heads=4)
    x = jnp.asarray(rng.standard_normal((2, 9, 32)), jnp.float32)
    whole, cache = module(x, mask=masks.Causal()), module.create_cache((2,), 9)
    for first, last in ((0, 4), (4, 5), (5, 9)):
        out, cache = module(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, whole[:, first:last], np.float32)


def test_continuing_from_multi_head_attention_starts_near_it(rng):
    """With all heads active and routers of zero the layer is multi-head attention."""
    mechanism = MoH(32, 8, num_shared=2, num_active=6, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((9, 32)), jnp.float32)
    plain = layer(None)
    for router in (mechanism.routed, mechanism.shared, mechanism.split):
        assert isinstance(router, Projection)
        router.weight[...] = jnp.zeros_like(router.weight[...])
    assert_reordered(layer(mechanism)(x), as_float64(plain(x)), np.float32)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((4, 5, 0), "num_shared.*4.*5"), ((4, 0, 0), "num_active.*1 to 4.*0"),
     ((4, 2, 3), "num_active.*1 to 2.*3"), ((4, 4, 1), "num_active.*0 to 0.*1")],
)  # fmt: skip
def test_head_counts_that_do_not_fit_are_refused_by_name(sizes, words):
    with pytest.raises(ValueError, match=words):
        HeadPlan(*sizes)


def test_bad_gates_and_routers_are_refused_by_name(as_users_run_it):
    array = jnp.ones((5, 4, 8))
    with pytest.raises(ValueError, match=r"gates.*\(5, 4\).*\(4, 5\)"):
        moh_attention(array, array, array, gates=jnp.ones((4, 5)))
    with pytest.raises(ValueError, match=r"router.*'input'.*'best'"):
        MoH(8, 4, num_shared=1, num_active=1, router="best", rngs=nnx.Rngs(0))
