"""Dual attention: relations that ride behind values, and what they do not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks, scores
from attnlab.core.relations import explicit_relations
from attnlab.heads.dual_attention_transformer import DualAttention, dual_attention
from attnlab.heads.symbols import PositionalSymbols, RelativeSymbols, SymbolicAttention
from tests.contract.block_formulas import relational, softmax
from tests.tolerances import as_float64, assert_close, assert_reordered

F, N, H = 16, 4, 4


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def arrays(rng, kv_heads=2, length=9):
    """Query, key, value; relations L = 3, P = 2 of two relational heads."""
    shapes = ((length, N, H), (length, kv_heads, H), (length, kv_heads, H))
    related = {
        "query_relations": drawn(rng, length, 3, 2), "key_relations": drawn(rng, length, 3, 2),
        "weight": drawn(rng, 2, H, 3),
    }  # fmt: skip
    return [drawn(rng, *shape) for shape in shapes], related


def mechanism(symbols=None, **options):
    symbols = SymbolicAttention(F, 5, rngs=nnx.Rngs(1)) if symbols is None else symbols
    options = {"num_relational": 2} | options
    return DualAttention(F, N, H, symbols=symbols, rngs=nnx.Rngs(2), **options)


def layer(own, **options):
    return MultiHeadAttention(F, N, head_width=H, mechanism=own, rngs=nnx.Rngs(3), **options)


CALLS = {
    "plain": {},
    "causal": {"mask": masks.Causal()},
    "padding": {"mask": masks.Causal() & masks.KeyPadding(jnp.asarray(6))},
    "heads apart": {"modifiers": scores.Bias(jnp.linspace(-1.0, 1.0, 4)[:, None, None])},
    "a mask by head": {"mask": jnp.arange(4)[:, None, None] != jnp.arange(9)[None, None, :]},
    "dropped": {"dropout_rate": 0.3, "dropout_key": jax.random.key(0)},
}


@pytest.mark.parametrize(
    ("name", "kv_heads", "implementation"),
    [(name, 2, "reference") for name in CALLS]
    + [("plain", 4, "blockwise"), ("padding", 2, "blockwise"), ("dropped", 4, "blockwise")],
)
def test_relations_behind_values_are_those_pair_by_pair(rng, name, kv_heads, implementation):
    x, related = arrays(rng, kv_heads)
    options = CALLS[name] | {"return_lse": True}
    out, lse = dual_attention(*x, **related, implementation=implementation, **options)
    exact, same = explicit_relations(*x, **related, **options)
    assert_reordered(out, as_float64(exact), np.float32)
    assert_reordered(lse, as_float64(same), np.float32)
    assert np.max(np.abs(exact - attention(*x, **CALLS[name]))) > 0.1


@pytest.mark.parametrize("activation", [None, jax.nn.relu])
def test_pair_by_pair_is_the_formula(rng, activation):
    (query, key, value), related = arrays(rng, 4)
    out = explicit_relations(query, key, value, **related, activation=activation)
    q, k, v = (as_float64(x) for x in (query, key, value))
    weights = softmax(np.einsum("tnh,snh->nts", q, k) / np.sqrt(H))
    found = [as_float64(related[n]) for n in ("query_relations", "key_relations", "weight")]
    phi = (lambda r: r) if activation is None else (lambda r: np.maximum(r, 0))
    exact = relational(np.asarray, weights[2:], *found, v[:, 2:], phi)
    assert_close(out[:, 2:], exact, "float32")
    assert_close(out[:, :2], np.einsum("nts,snd->tnd", weights[:2], v[:, :2]), "float32")


def test_symbols_by_distance_are_the_formula(rng):
    (query, key, value), related = arrays(rng, 4)
    table = drawn(rng, 5, 2, H)
    out = explicit_relations(
        query, key, value, **related, relative=table, query_offset=2, mask=masks.Causal()
    )
    plain = explicit_relations(
        query, key, jnp.zeros_like(value), **related, query_offset=2, mask=masks.Causal()
    )
    q, k = as_float64(query), as_float64(key)
    score = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H)
    weights = softmax(np.where(np.tri(9, 9, 2, dtype=bool), score, -np.inf))
    exact = as_float64(plain)[:, 2:]
    for i in range(9):
        for j in range(9):
            symbol = as_float64(table)[np.clip(j - i - 2, -2, 2) + 2]
            exact[i] += weights[2:, i, j, None] * symbol
    assert_close(out[:, 2:], exact, "float32")


def test_without_relational_heads_it_is_multi_head_attention(rng):
    x = drawn(rng, 7, F)
    plain = layer(None)(x, mask=masks.Causal())
    none = layer(mechanism(num_relational=0))
    np.testing.assert_array_equal(none(x, mask=masks.Causal()), plain)
    relational_only = layer(mechanism(num_relational=4))
    assert np.max(np.abs(relational_only(x, mask=masks.Causal()) - plain)) > 0.1


def test_relational_heads_see_only_how_a_context_compares(rng):
    """Moved where neither keys nor relational keys look, a context changes sensory heads alone."""
    own = DualAttention(
        F, N, 2, num_relational=2, symbols=PositionalSymbols(F, 8, rngs=nnx.Rngs(1)),
        rngs=nnx.Rngs(2),
    )  # fmt: skip
    module = MultiHeadAttention(F, N, head_width=2, mechanism=own, rngs=nnx.Rngs(3))
    x, context = drawn(rng, 5, F), drawn(rng, 8, F)
    looks = np.concatenate(
        [as_float64(module.key.kernel[...]), as_float64(own.key_relations.weight[...])], axis=1
    )
    blind = np.linalg.svd(looks.T)[2][looks.shape[1] :]
    moved = context + jnp.asarray(rng.standard_normal((8, len(blind))) @ blind, jnp.float32)
    kernel = module.out.kernel[...]
    whole = module(x, moved) - module(x, context)
    module.out.kernel[...] = kernel.at[:4].set(0)
    np.testing.assert_allclose(module(x, moved), module(x, context), atol=2e-6)
    assert np.max(np.abs(whole)) > 0.1
    module.out.kernel[...] = kernel.at[4:].set(0)
    np.testing.assert_allclose(module(x, moved) - module(x, context), whole, atol=1e-5)


def test_a_token_like_a_template_retrieves_its_symbol(rng):
    symbols = SymbolicAttention(F, 5, num_heads=2, rngs=nnx.Rngs(1))
    symbols.query.weight[...] = jnp.eye(F)
    symbols.templates[...] = jnp.tile(2 * jnp.eye(5, F // 2), (1, 2))  # none is like another
    found = symbols(50 * symbols.templates[...])
    np.testing.assert_allclose(found, symbols.library[...], atol=1e-4)
    between = symbols(jnp.zeros((1, F)))
    assert_close(between[0], as_float64(symbols.library[...]).mean(0), "float32")


@pytest.mark.parametrize("symmetric", [False, True])
def test_parameters_are_those_of_the_paper(symmetric):
    """Relations 2 F R H, symbols F R H, and R H L from relations to heads."""
    own = mechanism(num_relational=2, num_relations=4, symmetric=symmetric)
    count = {
        name: sum(p.size for p in jax.tree.leaves(nnx.state(part, nnx.Param)))
        for name in ("query_relations", "key_relations", "symbol")
        if (part := getattr(own, name)) is not None
    }
    expected = {"query_relations": F * 2 * H, "key_relations": F * 2 * H, "symbol": F * 2 * H}
    if symmetric:
        del expected["key_relations"]
    assert count == expected
    assert own.weight.size == 2 * H * 4
    assert np.max(np.abs(own.weight[...])) <= 0.5


def test_layers_may_share_where_symbols_come_from():
    shared = SymbolicAttention(F, 5, rngs=nnx.Rngs(1))
    both = nnx.List([mechanism(shared), mechanism(shared)])
    apart = nnx.List([mechanism(), mechanism()])
    sizes = [sum(p.size for p in jax.tree.leaves(nnx.state(m, nnx.Param))) for m in (both, apart)]
    assert sizes[1] - sizes[0] == F * F + F + 2 * 5 * F


SOURCES = {
    "library": lambda: SymbolicAttention(F, 5, rngs=nnx.Rngs(1)),
    "position": lambda: PositionalSymbols(F, 12, rngs=nnx.Rngs(1)),
    "distance": lambda: RelativeSymbols(F, 3, rngs=nnx.Rngs(1)),
}


@pytest.mark.parametrize(
    ("source", "kv_heads", "activation"),
    [("library", 2, None), ("library", 4, jax.nn.gelu), ("position", 2, None),
     ("position", 4, None), ("distance", 2, None)],
)  # fmt: skip
def test_a_layer_decodes_what_it_reads_at_once(rng, source, kv_heads, activation):
    own = mechanism(SOURCES[source](), num_symbol_heads=kv_heads // 2, activation=activation)
    module = layer(own, num_kv_heads=kv_heads)
    x = drawn(rng, 2, 10, F)
    whole, cache = module(x, mask=masks.Causal()), module.create_cache((2,), 12)
    assert cache.key.size + cache.value.size == 2 * 12 * (2 * kv_heads * H + 2 * H)
    for first, last in ((0, 6), (6, 7), (7, 10)):
        out, cache = module(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, as_float64(whole[:, first:last]), np.float32)


def test_not_a_number_of_a_context_reaches_those_who_see_it(rng):
    (query, key, value), related = arrays(rng)
    bad = related | {"key_relations": related["key_relations"].at[5, 1].set(jnp.nan)}
    for function in (dual_attention, explicit_relations):
        clean = function(query, key, value, **related, mask=masks.Causal())
        out = function(query, key, value, **bad, mask=masks.Causal())
        np.testing.assert_array_equal(out[:5], clean[:5])
        assert np.all(np.isnan(out[5:, 2:]))


def test_bad_calls_are_refused_by_name(rng, as_users_run_it):
    x, related = arrays(rng)
    refused = [
        (related | {"weight": jnp.ones((2, 3, 3))}, "weight: expected axes"),
        (related | {"weight": jnp.ones((1, H, 3))}, "num_relational: .* multiples of 2"),
        (related | {"key_relations": jnp.ones((9, 2, 2))}, "key_relations: expected shape"),
        (related | {"query_relations": jnp.ones((8, 3, 2))}, "query_relations: expected shape"),
    ]
    for options, words in refused:
        with pytest.raises(ValueError, match=words):
            dual_attention(*x, **options)
    with pytest.raises(NotImplementedError, match=r'"blockwise".*"reference" does'):
        explicit_relations(*x, **related, implementation="blockwise")
    with pytest.raises(ValueError, match=r"relative: .* odd M"):
        explicit_relations(*x, **related, relative=jnp.ones((4, 2, H)))
    built = [
        ({"num_relational": 5}, "num_relational: expected from 0 to"),
        ({"num_relations": 3}, "num_relations: expected a divisor of 8, got 3"),
    ]
    for options, words in built:
        with pytest.raises(ValueError, match=words):
            mechanism(**options)
    with pytest.raises(ValueError, match="symbols: relational heads need some"):
        DualAttention(F, N, H, num_relational=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_heads: expected positive sizes and a divisor"):
        SymbolicAttention(F, 5, num_heads=3, rngs=nnx.Rngs(0))
    positions = layer(mechanism(PositionalSymbols(F, 8, rngs=nnx.Rngs(1))))
    with pytest.raises(ValueError, match="key: 9 positions from 0 on are more than the 8"):
        positions(drawn(rng, 9, F))
    heads = layer(mechanism(num_symbol_heads=2), num_kv_heads=2)
    with pytest.raises(ValueError, match="num_symbol_heads: expected a divisor of 1"):
        heads(drawn(rng, 9, F))
    with pytest.raises(ValueError, match=r"context: .*query_relations"):
        layer(mechanism(activation=jax.nn.relu))(drawn(rng, 9, F), drawn(rng, 9, F))
