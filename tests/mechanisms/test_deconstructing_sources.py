"""Xue et al.: queries and keys of something else than the hidden state, and what is then lost."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, masks
from attnlab.dense.deconstructing_attention import SOURCES, Deconstructed, attend_by
from attnlab.dense.energy_gated import EnergyGatedAttention
from attnlab.models import CausalLM, SourcedLM, generate
from attnlab.training import TrainConfig, fit
from tests.contract.block_formulas import softmax
from tests.tolerances import as_float64, assert_close, assert_reordered

F, N, V = 16, 2, 11
TEXT = jnp.asarray(np.random.default_rng(0).integers(0, V, 12))
FIXED = {"random": {"length": 12}, "text": {"text": TEXT}}


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def model(source, layers=2, **options):
    options = FIXED.get(source, {}) | options
    return SourcedLM(V, layers, F, N, source=source, rngs=nnx.Rngs(0), **options)


def test_weights_are_of_the_source_and_values_of_the_input(rng):
    layer = MultiHeadAttention(F, 4, num_kv_heads=2, rngs=nnx.Rngs(0))
    x, source = drawn(rng, 3, 7, F), drawn(rng, 7, F)
    found = attend_by(layer, x, source, mask=masks.Causal())
    wq, wk, wv, wo = (
        as_float64(getattr(layer, n).kernel[...]) for n in ("query", "key", "value", "out")
    )
    z, x64 = as_float64(source), as_float64(x)
    out = np.zeros((3, 7, 4, 4))
    for n in range(4):
        q, k = (z @ wq)[:, n * 4 : n * 4 + 4], (z @ wk)[:, n // 2 * 4 : n // 2 * 4 + 4]
        score = np.where(np.tri(7, dtype=bool), q @ k.T / 2, -np.inf)
        out[:, :, n] = softmax(score) @ (x64 @ wv)[..., n // 2 * 4 : n // 2 * 4 + 4]
    assert_close(found, out.reshape(3, 7, 16) @ wo, "float32")
    own = attend_by(layer, x, x, mask=masks.Causal())
    assert_reordered(own, as_float64(layer(x, mask=masks.Causal())), np.float32)


def test_weights_of_another_source_do_not_see_the_tokens(rng):
    """What is then left is linear in the input; softmax attention is not."""
    layer = MultiHeadAttention(F, 4, mechanism=Deconstructed(form="taylor"), rngs=nnx.Rngs(0))
    a, b, source = drawn(rng, 7, F), drawn(rng, 7, F), drawn(rng, 7, F)
    parts = attend_by(layer, a, source) + attend_by(layer, b, source)
    assert_close(attend_by(layer, a + b, source), as_float64(parts), "float32")
    assert np.max(np.abs(layer(a + b) - layer(a) - layer(b))) > 0.1


@pytest.mark.parametrize("source", ["hidden", "static", "random", "text"])
def test_a_model_reads_its_streams(rng, source):
    tokens = jnp.asarray(rng.integers(0, V, (2, 9)))
    module, plain = model(source), CausalLM(V, 2, F, N, rngs=nnx.Rngs(0))
    same = np.max(np.abs(module(tokens) - plain(tokens))) < 1e-6
    assert same == (source == "hidden")
    x = module.embedding(tokens) * math.sqrt(F)
    streams = module.streams(x)
    if source == "static":
        assert all(z is x for z in streams)
    if source == "text":
        hidden = plain.embedding(TEXT[:9]) * math.sqrt(F)
        assert_reordered(streams[0], as_float64(hidden), np.float32)
        hidden, _ = plain.blocks[0](hidden, mask=masks.Causal())
        assert_reordered(streams[1], as_float64(hidden), np.float32)
    if source == "random":
        assert streams[0].shape == (9, F)
        assert 0.5 < np.std(streams[0]) < 1.5


@pytest.mark.parametrize("source", ["static", "random", "text"])
def test_layers_that_are_not_named_are_standard(rng, source):
    tokens = jnp.asarray(rng.integers(0, V, (2, 9)))
    plain = CausalLM(V, 2, F, N, rngs=nnx.Rngs(0))
    assert_reordered(model(source, sourced=())(tokens), as_float64(plain(tokens)), np.float32)
    hybrid = model(source, sourced=(1,))
    assert [z is None for z in hybrid.streams(hybrid.embedding(tokens))] == [True, False]


@pytest.mark.parametrize("source", ["hidden", "static", "random", "text"])
def test_decoding_step_by_step_is_the_whole(rng, source):
    module, tokens = model(source), jnp.asarray(rng.integers(0, V, (2, 12)))
    whole, cache = module(tokens), module.init_cache((2,), 12)
    for first, last in ((0, 5), (5, 6), (6, 12)):
        logits, cache = module(tokens[:, first:last], cache=cache)
        assert_reordered(logits, as_float64(whole[:, first:last]), np.float32)
    assert generate(module, tokens[:, :4], 8, temperature=0.0).shape == (2, 12)


PAIRS = 4


class Reader(nnx.Module):
    """One layer of attention between an embedding and a readout: no other way to an answer.

    Where weights are of noise, the logits are a sum of what each token says by itself.
    """

    def __init__(self, source, rngs):
        self.embedding = nnx.Embed(14, 32, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.layer = MultiHeadAttention(32, 2, rngs=rngs)
        self.readout = nnx.Linear(32, 14, rngs=rngs)
        noise = jax.random.normal(jax.random.key(5), (12, 32))
        self.noise = nnx.data(nnx.Variable(noise) if source == "random" else None)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        source = x if self.noise is None else self.noise[...][: x.shape[-2]]
        return self.readout(attend_by(self.layer, x, source, mask=masks.Causal()))


def copied(data, key):
    """Tokens of chance, to be said again three places later."""
    tokens = jax.random.randint(key, (32, 12), 0, V)
    return tokens, jnp.roll(tokens, 3, axis=1), jnp.arange(12) >= 3


def recalled(data, key):
    """Tokens that hold a name and a bit each, in any order; a name asks for its bit."""
    order, number, pick = jax.random.split(key, 3)
    names = jax.vmap(lambda k: jax.random.permutation(k, PAIRS))(jax.random.split(order, 32))
    bits = jax.random.randint(number, (32, PAIRS), 0, 2)
    asked = jax.random.randint(pick, (32, 1), 0, PAIRS)
    tokens = jnp.concatenate([2 + 2 * names + bits, 2 + 2 * PAIRS + asked], axis=1)
    answer = jnp.take_along_axis(bits, jnp.argmax(names == asked, axis=1)[:, None], axis=1)
    return tokens, jnp.broadcast_to(answer, tokens.shape), jnp.arange(PAIRS + 1) == PAIRS


def final_loss(source, draw):
    """Nats of an answer after training, the mean of the last steps."""

    def loss(module, batch, dropout_key):
        tokens, answers, counts = batch
        log_p = jax.nn.log_softmax(module(tokens))
        said = jnp.take_along_axis(log_p, answers[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(counts[None, :], said, 0)) / (
            32 * jnp.sum(counts).astype(said.dtype)
        )

    config = TrainConfig(
        steps=400, batch_size=32, context=12, learning_rate=1e-2, warmup=20, weight_decay=0.0
    )
    module = Reader(source, nnx.Rngs(1))
    return float(np.mean(fit(module, loss, draw, None, config).losses[-40:]))


def test_weights_of_noise_find_places_and_do_not_find_names():
    """The number of ones among four bits says 0.15 of an answer's 0.69 nats; more, no sum can."""
    assert final_loss("random", copied) < 0.2 < 1.0 < final_loss("hidden", copied)
    assert final_loss("hidden", recalled) < 0.2
    assert 0.5 < final_loss("random", recalled) < 0.7


def test_bad_models_and_calls_are_refused_by_name(rng):
    refused = [
        (("dynamic", {}), "source: expected one of"),
        (("random", {"length": None}), "length: belongs to source='random', got None"),
        (("static", {"length": 9}), "length: belongs to source='random', got 9 with 'static'"),
        (("text", {"text": None}), "text: belongs to source='text'"),
        (("static", {"sourced": (2,)}), r"sourced: expected layers below 2, got \(2,\)"),
    ]
    for (source, options), words in refused:
        with pytest.raises(ValueError, match=words):
            model(source, **options)
    tokens = jnp.zeros((1, 13), jnp.int32)
    with pytest.raises(ValueError, match="tokens: 13 are more than the 12 of source='text'"):
        model("text")(tokens)
    with pytest.raises(ValueError, match="capacity: 13 tokens are more than the 12"):
        model("random").init_cache((1,), 13)
    with pytest.raises(ValueError, match=r"mask: .* one document; .* got Segments"):
        model("random")(tokens[:, :9], mask=masks.Segments(jnp.zeros(9, jnp.int32)))
    x = drawn(rng, 3, 7, F)
    layer = MultiHeadAttention(F, N, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="source: expected shape"):
        attend_by(layer, x, x[:, :6])
    gated = MultiHeadAttention(
        F, N, mechanism=EnergyGatedAttention(F, N, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=r"layer: expected one .* keep"):
        attend_by(gated, x, x)
    assert set(SOURCES.values()) == {"hidden", "static", "random", "text"}
