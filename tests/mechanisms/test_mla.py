"""Multi-head latent attention: two orders of one product, what is cached, and why RoPE is apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, masks
from attnlab.core.cache import KVCache
from attnlab.core.rotary import rotate
from attnlab.heads.latents import (
    FORMS,
    LatentSizes,
    absorbed_attention,
    expanded_attention,
    latent_attention,
)
from attnlab.heads.mla import MultiHeadLatentAttention
from tests import oracles
from tests.contract.heads_low_rank_formulas import latent
from tests.tolerances import as_float64, assert_close, assert_reordered, largest

DEEPSEEK_V2 = LatentSizes(5120, 128, 512, 64, 128, 128, 1536)
F, N, C, R, H, D = 24, 3, 10, 4, 8, 6


def layer(seed=0, **options):
    sizes = {"latent_width": C, "rope_width": R, "head_width": H, "value_width": D}
    return MultiHeadLatentAttention(F, N, rngs=nnx.Rngs(seed), **sizes | options)


def inputs(rng, length=9, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal((2, length, F)), dtype)


def parts(rng, queries=7, keys=9, dtype=np.float32, batch=(2,)):
    """Query, memory and both weights."""
    shapes = (*batch, queries, N, H + R), (*batch, keys, C + R), (C, N, H), (C, N, D)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def test_the_released_model_caches_what_two_and_a_quarter_groups_would():
    assert DEEPSEEK_V2.cache_per_token == 576 == 2.25 * 2 * 128
    assert 2 * 128 * 128 == 32_768


@pytest.mark.parametrize("rank", [None, 7])
def test_a_layer_holds_and_caches_what_is_counted(rank):
    module = layer(query_rank=rank)
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    assert sum(x.size for x in leaves) == module.sizes.parameters
    cache = module.create_cache((3,), 50)
    numbers = sum(x.size for x in jax.tree.leaves(cache) if jnp.issubdtype(x.dtype, jnp.floating))
    assert numbers == 3 * 50 * (C + R)
    assert sum(x.nbytes for x in (cache.key, cache.value)) == 4 * numbers


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_forms_are_one_function(rng, dtype):
    mask = masks.ArrayMask(jnp.asarray(rng.random((2, N, 7, 9)) < 0.7))
    with jax.enable_x64(dtype == "float64"):
        arrays = parts(rng, dtype=dtype)
        (one, lse), (other, sums) = (
            run(*arrays, mask=mask, return_lse=True)
            for run in (expanded_attention, absorbed_attention)
        )
        gap = max(np.max(np.abs(one - other)), np.max(np.abs(lse - sums)))
    assert gap < (1e-5 if dtype == "float32" else 1e-12)


def test_their_gradients_are_one_too(rng):
    arrays, read = parts(rng), jnp.asarray(rng.standard_normal((2, 7, N, D)), jnp.float32)

    def slopes(form):
        def loss(*arrays):
            return jnp.sum(jnp.sin(latent_attention(*arrays, form=form)) * read)

        return jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)

    for one, other in zip(slopes("expanded"), slopes("absorbed"), strict=True):
        assert_close(one, as_float64(other), np.float32, "gradient", scale=largest(other))


def products(jaxpr):
    """Multiply-adds of all matrix products in a program."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            size = np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted])
            total += int(size * np.prod(eqn.outvars[0].aval.shape))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                total += products(getattr(inner, "jaxpr", inner))
    return total


def _is_program(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (5, 40), (40, 40)])
def test_the_work_is_that_of_the_program_and_the_lesser_is_chosen(rng, queries, keys):
    sizes = layer().sizes
    arrays = parts(rng, queries, keys, batch=())

    def work(form):
        def run(*arrays):
            return latent_attention(*arrays, form=form, implementation="reference")

        return products(jax.make_jaxpr(run)(*arrays).jaxpr)

    counted = {form: work(form) for form in FORMS}
    assert counted == {form: N * sizes.multiply_adds(form, queries, keys) for form in FORMS}
    assert work("auto") == min(counted.values())


def test_decoding_absorbs_and_reading_a_prompt_expands():
    assert DEEPSEEK_V2.cheaper(1, 4096) == "absorbed"
    assert DEEPSEEK_V2.cheaper(4096, 4096) == "expanded"
    absorbed, expanded = (DEEPSEEK_V2.multiply_adds(form, 1, 4096) for form in FORMS[::-1])
    assert expanded > 100 * absorbed


@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize("rank", [None, 7])
def test_a_layer_decodes_what_it_reads_at_once(rng, form, rank):
    module, x = layer(form=form, query_rank=rank), inputs(rng)
    whole, cache = module(x, mask=masks.Causal()), module.create_cache((2,), 11)
    for first, last in ((0, 4), (4, 5), (5, 9)):
        out, cache = module(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, as_float64(whole)[:, first:last], np.float32)
    np.testing.assert_allclose(cache.key[:, :9, 0], module.memory(x), atol=1e-6)


def test_without_turned_channels_and_with_a_latent_that_is_the_input_it_is_multi_head(rng):
    plain = MultiHeadAttention(F, N, rngs=nnx.Rngs(3))
    module = MultiHeadLatentAttention(
        F, N, latent_width=F, rope_width=0, norm=False, rngs=nnx.Rngs(0)
    )
    module.down[...] = jnp.eye(F)
    for name, linear in (("query", "query"), ("key", "key"), ("value", "value")):
        weight = getattr(plain, linear).kernel[...].reshape(F, N, F // N)
        getattr(module, f"up_{name}")[...] = weight
    module.out[...] = plain.out.kernel[...].reshape(N, F // N, F)
    x = inputs(rng)
    for form in FORMS:
        module.form = form
        assert_close(module(x, mask=masks.Causal()), plain(x, mask=masks.Causal()), np.float32)


def test_only_distances_matter(rng):
    module, x = layer(), inputs(rng)

    def run(query_offset, key_offset):
        read, kept = module.queries(x, offset=query_offset), module.memory(x, offset=key_offset)
        return latent_attention(read, kept, module.up_key[...], module.up_value[...])

    near = as_float64(run(0, 0))
    np.testing.assert_allclose(run(700, 700), near, atol=1e-3)
    assert np.max(np.abs(run(700, 0) - near)) > 1e-2


def test_rotations_between_the_two_weights_cannot_be_absorbed(rng):
    """Turned before they meet, content channels need a key of each head; apart they do not."""
    query, memory, up_key, up_value = parts(rng, 9, 9)
    own, latents = query[..., :H], memory[..., :C]
    keys, values = (jnp.einsum("bsc,cnh->bsnh", latents, up) for up in (up_key, up_value))

    def met(query, key):
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) * H**-0.5
        return jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(scores, axis=-1), values)

    plain = absorbed_attention(own, latents, up_key, up_value)
    np.testing.assert_allclose(plain, met(own, keys), atol=1e-5)
    wanted = met(rotate(own), rotate(keys))
    by_query = absorbed_attention(rotate(own), latents, up_key, up_value)
    turned = rotate(latents[:, :, None])[:, :, 0]
    inner = rotate(jnp.einsum("btnh,cnh->btnc", own, up_key))
    scores = jnp.einsum("btnc,bsc->bnts", inner, turned) * H**-0.5
    by_latent = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(scores, axis=-1), values)
    for wrong in (plain, by_query, by_latent):
        assert np.max(np.abs(wrong - wanted)) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_with_a_latent_query_it_is_the_formula_with_its_slopes(rng, form):
    graph, state = nnx.split(layer(query_rank=7, form=form))
    state = jax.tree.map(
        lambda p: p + 0.2 * jnp.asarray(rng.standard_normal(p.shape), p.dtype), state
    )
    x, read = inputs(rng), rng.standard_normal((2, 9, F))

    def ours(state, x):
        out = nnx.merge(graph, state)(x, mask=masks.Causal())
        return jnp.sum(jnp.sin(out) * read.astype(np.float32)), out

    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    arrays = [*map(as_float64, jax.tree.leaves(state)), as_float64(x)]

    def exact(*arrays):
        params = dict(zip(names, arrays[:-1], strict=True))
        return latent(params, arrays[-1], rope=R, rounded=np.asarray, mask=oracles.causal())

    (_, out), slopes = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(state, x)
    assert_close(out, exact(*arrays), np.float32)
    for index, slope in enumerate(map(as_float64, jax.tree.leaves(slopes))):
        direction = [np.zeros(a.shape) for a in arrays]
        direction[index] = rng.standard_normal(slope.shape)
        wanted = oracles.directional(lambda *a: np.sum(np.sin(exact(*a)) * read), arrays, direction)
        scale = max(largest(slope), 1e-2) * np.linalg.norm(direction[index])
        found = np.sum(slope * direction[index])
        words = [*names, "x"][index]
        assert_close(found, wanted, np.float32, "gradient", scale=scale, words=words)


def test_documents_packed_into_a_row_are_what_they_are_alone(rng):
    module, x = layer(), inputs(rng)
    ids = jnp.asarray([[0] * 4 + [1] * 5, [0] * 4 + [-1] * 5])
    packed = module(x.at[1, 4:].set(jnp.nan), mask=masks.Causal() & masks.Segments(ids))
    for row, first, last in ((0, 0, 4), (0, 4, 9), (1, 0, 4)):
        alone = module(x[row, first:last], mask=masks.Causal())
        assert_reordered(packed[row, first:last], as_float64(alone), np.float32)
    assert np.all(np.asarray(packed[1, 4:]) == 0)


def test_dropout_is_a_function_of_its_key(rng):
    module, x = layer(dropout_rate=0.5), inputs(rng)
    first, again, other = (module(x, dropout_key=jax.random.key(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.asarray(first) != np.asarray(other)) > 0.9
    assert np.mean(np.asarray(first) != np.asarray(module(x))) > 0.9


def test_what_does_not_fit_is_refused_by_name(rng, as_users_run_it):
    with pytest.raises(ValueError, match=r"rope_width.*pairs.*3"):
        layer(rope_width=3)
    with pytest.raises(ValueError, match=r"latent_width.*0"):
        layer(latent_width=0)
    with pytest.raises(ValueError, match=r"features: 24.*num_heads=5"):
        MultiHeadLatentAttention(F, 5, latent_width=C, rope_width=R, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"form.*'absorbed'.*'best'"):
        layer(form="best")
    query, memory, up_key, up_value = parts(rng)
    with pytest.raises(ValueError, match=r"form.*'best'"):
        latent_attention(query, memory, up_key, up_value, form="best")
    with pytest.raises(ValueError, match=r"query: expected 3 heads of width 8 and 3 turned"):
        latent_attention(query, memory[..., 1:], up_key, up_value)
    with pytest.raises(ValueError, match=r"memory.*10 channels"):
        latent_attention(query, memory[..., :9], up_key, up_value)
    with pytest.raises(ValueError, match=r"up_value.*\(10, 3, D\)"):
        latent_attention(query, memory, up_key, up_value[:9])
    module, x = layer(), inputs(rng)
    with pytest.raises(ValueError, match=r"x: .*24.*23"):
        module(x[..., 1:])
    with pytest.raises(TypeError, match=r"x: .*int32"):
        module(x.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"mask.*\(5, 9\)|mask.*5"):
        module(x, mask=jnp.ones((5, 9), bool))
    with pytest.raises(TypeError, match=r"cache.*tuple"):
        module(x, cache=())
    with pytest.raises(ValueError, match=r"cache.*width 14.*\(1, 14\), \(1, 14\)"):
        module(x, cache=KVCache.create((2,), 9, 1, C + R))
    with pytest.raises(ValueError, match=r"key: 9 entries do not fit"):
        module(x, cache=module.create_cache((2,), 8))
