"""DiGiugno & Mahmood: a network's scores have any rank, and no pair's vector is ever formed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnlab import attention, masks
from attnlab.dense.neural_attention import (
    Affine,
    NeuralAttention,
    ScoreNetwork,
    neural_attention,
)
from tests.tolerances import as_float64, assert_close, assert_reordered


def arrays(rng, queries=9, keys=9, heads=4, kv_heads=2, width=8):
    shapes = ((queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, width))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def by_concatenation(module, query, key):
    """Scores as printed: each pair's projections, one behind the other, through the network."""
    key = np.repeat(as_float64(key), query.shape[-2] // key.shape[-2], axis=-2)

    def layer(x, one):
        return x @ as_float64(one.weight[...]) + as_float64(one.bias[...])

    q, k = layer(as_float64(query), module.query), layer(key, module.key)
    pairs = [q[:, None].repeat(len(k), 1), k[None].repeat(len(q), 0)]
    x = np.concatenate(pairs, -1)
    for one in module.hidden:
        x = np.maximum(layer(x, one), 0)
    return np.moveaxis(x @ as_float64(module.last[...]), -1, 0)


@pytest.mark.parametrize("hidden", [None, (5,), (4, 3, 2)])
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_broadcast_sums_are_the_network_of_concatenated_pairs(hidden, implementation, rng):
    query, key, value = arrays(rng)
    module = NeuralAttention(8, hidden=hidden, rngs=nnx.Rngs(1))
    s = by_concatenation(module, query, key)
    w = np.exp(s - s.max(-1, keepdims=True)) * np.tri(9)
    wide = np.repeat(as_float64(value), 2, axis=-2)
    exact = np.einsum("nts,snd->tnd", w / w.sum(-1, keepdims=True), wide)
    options = {"block_sizes": (4, 4)} if implementation == "blockwise" else {}
    ours = module(query, key, value, mask=masks.Causal(), implementation=implementation, **options)
    assert_close(ours, exact, "float32")


def test_the_rank_of_scores_is_not_that_of_the_heads(rng):
    """Of width one a product's scores have rank one, at any length."""
    query, key, value = arrays(rng, 40, 40, 1, 1, 1)
    module = NeuralAttention(1, width=2, hidden=(8,), rngs=nnx.Rngs(0))

    def rank(s):
        singular = np.linalg.svd(s, compute_uv=False)
        return int(np.sum(singular > 1e-3 * singular[0]))

    _, lse = module(query, key, value, return_lse=True)
    weights = jax.jacobian(lambda v: module(query, key, v)[:, 0, 0])(value)[:, :, 0, 0]
    scores = np.log(as_float64(weights)) + as_float64(lse)[0][:, None]
    assert rank(as_float64(query)[:, 0] @ as_float64(key)[:, 0].T) == 1
    assert rank(scores) > 2


def trained(attend, state, steps=300):
    """Last mean square error of reading a wave at one's own place, keys being places on a line."""
    place = jnp.linspace(-1, 1, 33)[:, None, None]
    wave = jnp.cos(3 * jnp.pi * place)
    optimizer = optax.adam(0.03)

    def loss(state):
        return jnp.mean(jnp.square(attend(state, place, place, wave) - wave))

    def step(carry, _):
        value, slope = jax.value_and_grad(loss)(carry[0])
        update, memory = optimizer.update(slope, carry[1])
        return (optax.apply_updates(carry[0], update), memory), value

    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        run = jax.jit(lambda s: jax.lax.scan(step, (s, optimizer.init(s)), None, steps))
        return float(run(state)[1][-1])


def test_it_learns_to_look_near_which_no_product_of_that_width_can():
    """A product of places is largest at the ends of the line, whatever its factor."""
    graph, state = nnx.split(NeuralAttention(1, width=2, hidden=(16,), rngs=nnx.Rngs(0)))
    near = trained(lambda s, *x: nnx.merge(graph, s)(*x), state)
    gain = {"gain": jnp.ones(())}
    product = trained(lambda s, q, k, v: attention(s["gain"] * q, k, v), gain)
    assert near < 0.2 * product


def test_a_key_that_is_not_a_number_reaches_only_those_who_see_it(rng):
    query, key, value = arrays(rng)
    module = NeuralAttention(8, rngs=nnx.Rngs(0))
    out = module(query, key.at[5].set(jnp.nan), value, mask=masks.Causal())
    assert np.all(np.isnan(out[5:])) and np.all(np.isfinite(out[:5]))


def test_the_shapes_of_the_released_model():
    """Heads of 64: two wide, two hidden units, then one."""
    module = NeuralAttention(64, rngs=nnx.Rngs(0))
    assert [layer.weight.shape for layer in module.hidden] == [(4, 2), (2, 1)]
    count = sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))
    assert count == 2 * (64 * 2 + 2) + (4 * 2 + 2) + (2 + 1) + 1


def test_all_heads_share_the_network_and_lse_is_that_of_its_scores(rng):
    query, key, value = arrays(rng)
    module = NeuralAttention(8, rngs=nnx.Rngs(3))
    _, lse = module(query, key, value, return_lse=True)
    exact = np.log(np.sum(np.exp(by_concatenation(module, query, key)), -1))
    assert_reordered(lse, exact, "float32", scale=8)


def test_bad_calls_are_refused(rng):
    x = jnp.ones((4, 1, 2))
    narrow, first = Affine(jnp.ones((2, 2)), jnp.ones(2)), Affine(jnp.ones((3, 2)), jnp.ones(2))
    wrong = ScoreNetwork(narrow, narrow, (first,), jnp.ones(2))
    with pytest.raises(ValueError, match=r"network: expected hidden\[0\] of shape \(4, 2\)"):
        neural_attention(x, x, x, network=wrong)
    with pytest.raises(ValueError, match=r"scale: a network's scores have none, got 0\.5"):
        NeuralAttention(2, rngs=nnx.Rngs(0))(x, x, x, scale=0.5)
    with pytest.raises(ValueError, match="hidden: expected positive widths"):
        NeuralAttention(2, hidden=(), rngs=nnx.Rngs(0))
