"""The language model: the formula, causality, caches, sampling, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab import atlas
from attnlab.core.masks import Segments
from attnlab.models import CausalLM, generate
from attnlab.models.generate import choose
from attnlab.models.language_model import causal_ids

VOCABULARY, TOKENS = 13, 7
UNSHARED = {"optimised-efficient-super-attention"}  # a slice of the input is a head's key


def small(mechanism="nope", **options):
    """A model that compiles quickly."""
    heads = 4 if mechanism in UNSHARED else 2
    options = {"num_layers": 2, "features": 16, "num_heads": 4, "num_kv_heads": heads, **options}
    return CausalLM(VOCABULARY, mechanism=mechanism, rngs=nnx.Rngs(0), **options)


def trained_like(model):
    """The model with larger readout and wandering norms, so that errors show."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    noise = [0.3 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    return nnx.merge(
        graph, jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])
    )


@pytest.fixture
def tokens(keys):
    return jax.random.randint(keys("tokens"), (2, TOKENS), 0, VOCABULARY)


def oracle(model, tokens):
    """The logits in float64 NumPy, for plain attention (nope)."""

    def array(variable):
        return np.asarray(variable[...], np.float64)

    def norm(x, layer):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * array(layer.scale)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = array(model.embedding.embedding)[np.asarray(tokens)] * np.sqrt(model.features)
    batch, length, features = x.shape
    for block in model.blocks:
        attention, width = block.attention, block.attention.head_width
        y = norm(x, block.attention_norm)
        query, key, value = (
            (y @ array(layer.kernel)).reshape(batch, length, -1, width)
            for layer in (attention.query, attention.key, attention.value)
        )
        heads = []
        for n in range(query.shape[2]):
            k = n // (query.shape[2] // key.shape[2])
            scores = query[:, :, n] @ key[:, :, k].swapaxes(1, 2) / np.sqrt(width)
            scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, :, k])
        x = x + np.stack(heads, 2).reshape(batch, length, features) @ array(attention.out.kernel)
        y = norm(x, block.mlp_norm)
        hidden = gelu(y @ array(block.mlp.expand.kernel))
        if block.mlp.gate is not None:
            hidden = hidden * (y @ array(block.mlp.gate.kernel))
        x = x + hidden @ array(block.mlp.contract.kernel)
    x = norm(x, model.norm)
    if model.readout is None:
        return x @ array(model.embedding.embedding).T
    return x @ array(model.readout.kernel)


@pytest.mark.parametrize(("gated", "tied"), [(False, False), (True, True)])
def test_logits_are_the_formula(tokens, gated, tied):
    model = trained_like(small(gated=gated, tie_embeddings=tied))
    np.testing.assert_allclose(model(tokens), oracle(model, tokens), rtol=2e-5, atol=2e-5)


# A router reads blocks of tokens.
WHOLE_ONLY = {"nats-linear"}


@pytest.mark.parametrize("mechanism", sorted(WHOLE_ONLY))
def test_what_reads_whole_sequences_refuses_a_cache_and_keeps_causality(mechanism, tokens):
    model = trained_like(small(mechanism))
    with pytest.raises(NotImplementedError, match="whole sequences"):
        model.init_cache((2,), TOKENS)
    whole, other = model(tokens), model(tokens.at[:, 4:].add(1) % VOCABULARY)
    np.testing.assert_array_equal(whole[:, :4], other[:, :4])
    assert not np.allclose(whole[:, 4:], other[:, 4:])


# One of each kind: keys and values, fewer of them, what few queries need, sums, states.
KINDS_OF_CACHE = (
    "multi-head-attention", "rope", "cope", "compressed-convolutional", "multi-token-attention",
    "linear-transformer", "gated-deltanet", "rwkv7",
)  # fmt: skip


def test_the_kinds_of_cache_are_mechanisms_that_have_one():
    assert {*KINDS_OF_CACHE} <= {*causal_ids()} - WHOLE_ONLY


@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param(id, marks=[pytest.mark.slow] * (id not in KINDS_OF_CACHE))
        for id in sorted({*causal_ids()} - WHOLE_ONLY)
    ],
)
def test_cached_decoding_equals_the_whole_forward_and_no_token_sees_the_future(mechanism, tokens):
    graph, state = nnx.split(trained_like(small(mechanism)))

    @jax.jit
    def both(state, tokens):
        model = nnx.merge(graph, state)
        cache = model.init_cache((2,), TOKENS + 2)
        parts = []
        for begin, end in [(0, 4), (4, 5), (5, TOKENS)]:
            logits, cache = model(tokens[:, begin:end], cache=cache)
            parts.append(logits)
        return model(tokens), jnp.concatenate(parts, axis=1)

    # The second row is the first with another future.
    tokens = tokens.at[1].set(tokens[0]).at[1, 4:].add(1) % VOCABULARY
    whole, cached = both(state, tokens)
    assert whole.std() > 0.1
    np.testing.assert_allclose(cached, whole, atol=1e-5 * float(jnp.abs(whole).max()), rtol=0)
    np.testing.assert_array_equal(whole[0, :4], whole[1, :4])
    assert not np.allclose(whole[0, 4:], whole[1, 4:])


def test_packed_documents_do_not_see_each_other(tokens):
    model = trained_like(small("bam"))
    packed = model(tokens, mask=Segments(jnp.array([[0, 0, 0, 1, 1, 1, 1]] * 2)))
    apart = jnp.concatenate([model(tokens[:, :3]), model(tokens[:, 3:])], axis=1)
    np.testing.assert_allclose(packed, apart, atol=1e-5)


def test_an_extra_boolean_mask_narrows_the_causal_one(tokens):
    model = trained_like(small())
    alone = model(tokens, mask=jnp.eye(TOKENS, dtype=bool)[None, None])
    np.testing.assert_allclose(alone[:, 3], model(tokens[:, 3:4])[:, 0], atol=1e-5)


def test_dropout_needs_a_key_and_follows_it(tokens, keys):
    model = small(dropout_rate=0.5)
    np.testing.assert_array_equal(model(tokens), model(tokens))
    one, two = keys("one", "two")
    np.testing.assert_array_equal(model(tokens, dropout_key=one), model(tokens, dropout_key=one))
    assert not np.allclose(model(tokens, dropout_key=one), model(tokens, dropout_key=two))


def test_each_layer_has_a_mechanism_of_its_own():
    model = small(lambda rngs: atlas.get("bam").build(4, 4, rngs=rngs))
    first, second = (block.attention.mechanism for block in model.blocks)
    assert first is not second
    assert type(first).__name__ == "BAM"


def test_a_mechanism_that_is_not_causal_is_refused(monkeypatch):
    entry = dataclasses.replace(atlas.get("bam"), id="blind", patterns=("noncausal self",))
    monkeypatch.setattr(atlas, "entries", lambda: {"blind": entry})
    monkeypatch.setattr(atlas, "get", lambda id: entry)
    with pytest.raises(ValueError, match=r"'blind' supports noncausal self.*'causal self'"):
        small("blind")
    with pytest.raises(ValueError, match="'blind' supports noncausal self"):
        small(lambda rngs: entry.build(4, 4, rngs=rngs))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mechanism": "bamm"}, "bamm"),
        ({"features": 18}, "features: 18 is not a multiple"),
        ({"num_kv_heads": 3}, "num_kv_heads: 3 does not divide"),
        ({"num_layers": 0}, "num_layers: expected at least 1, got 0"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
    ],
)
def test_wrong_sizes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


def test_a_mechanism_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"attnlab\.Mechanism"):
        CausalLM(5, mechanism=lambda rngs: nnx.Linear(2, 2, rngs=rngs), rngs=nnx.Rngs(0))


def test_a_cache_of_another_depth_is_refused(tokens):
    model = small()
    with pytest.raises(ValueError, match="expected 2 layers, got 1"):
        model(tokens, cache=model.init_cache((2,), 9)[:1])


def test_a_model_may_compute_in_bfloat16(tokens):
    model = small("rope", dtype=jnp.bfloat16)
    logits = model(tokens)
    assert logits.dtype == jnp.bfloat16
    assert isinstance(model.init_cache((2,), 4)[0], attnlab.KVCache)


def test_greedy_generation_is_the_argmax_of_the_whole_forward(tokens):
    model = trained_like(small("bam"))
    row = tokens[:, :3]
    for _ in range(4):
        row = jnp.concatenate([row, jnp.argmax(model(row)[:, -1:], -1).astype(row.dtype)], 1)
    np.testing.assert_array_equal(generate(model, tokens[:, :3], 4, temperature=0.0), row)
    one = generate(model, tokens[:, :3], 4, key=jax.random.key(5), top_k=1)
    np.testing.assert_array_equal(one, row)


def test_generation_follows_its_key(tokens, keys):
    model = small()
    one, two = keys("one", "two")
    first = generate(model, tokens, 20, key=one)
    assert first.shape == (2, TOKENS + 20)
    np.testing.assert_array_equal(first, generate(model, tokens, 20, key=one))
    assert not np.array_equal(first, generate(model, tokens, 20, key=two))


def test_choice_has_the_distribution_asked_for(keys):
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    draw = jax.vmap(lambda key: choose(logits, key, jnp.float32(0.5), top_k=3))
    drawn = np.bincount(draw(jax.random.split(keys("draw"), 20_000)), minlength=4) / 20_000
    expected = np.array([0.0, 0.04, 0.09, 0.16]) / 0.29
    np.testing.assert_allclose(drawn, expected, atol=0.015)
    assert drawn[0] == 0


@pytest.mark.parametrize(
    ("length", "options", "words"),
    [
        (0, {"temperature": 0.0}, "length"),
        (2, {}, "key: sampling needs"),
        (2, {"temperature": -1.0}, "temperature"),
        (2, {"temperature": 0.0, "top_k": 99}, r"top_k: expected 1\.\.13, got 99"),
    ],
)
def test_wrong_generation_is_refused(tokens, length, options, words):
    with pytest.raises(ValueError, match=words):
        generate(small(), tokens, length, **options)


def test_an_empty_prompt_is_refused(tokens):
    with pytest.raises(ValueError, match="at least one token"):
        generate(small(), tokens[:, :0], 2, temperature=0.0)
