"""BAM: NoPE and ALiBi are special cases of its prior; derivatives are finite at distance zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import attention, masks
from attnlab.positional.alibi import alibi_attention
from attnlab.positional.bam import BAM, BAMSSMax, bam_attention, bam_ssmax_attention
from tests import oracles
from tests.core import draw
from tests.tolerances import as_float64, assert_close

SIZE = draw.Sizes((2,), 20, 20, 4, 2, 8, 3)
ARRAYS = draw.inputs(SIZE, 0)
INPUTS = tuple(map(jnp.asarray, ARRAYS))
SLOPES = jnp.asarray(oracles.alibi_slopes(4), jnp.float32)
PRIOR = {
    "prior_scale": jnp.asarray([-1.0, 0.2, -0.5, 0.0]),
    "prior_shape": jnp.asarray([0.5, 1.0, 2.0, -0.3]),
    "prior_loc": jnp.asarray([0.0, 0.4, -0.7, 1.1]),
}


def test_shape_one_and_the_logarithm_of_the_slopes_is_alibi():
    prior = {"prior_scale": jnp.log(SLOPES), "prior_shape": jnp.ones(4)}
    ours = bam_attention(*INPUTS, **prior, mask=masks.Causal())
    alibi = alibi_attention(*INPUTS, slopes=SLOPES, mask=masks.Causal())
    assert np.max(np.abs(ours - alibi)) < 1e-5


def test_the_initial_module_is_alibi():
    ours = BAM(4)(*INPUTS, mask=masks.Causal())
    assert np.max(np.abs(ours - alibi_attention(*INPUTS, mask=masks.Causal()))) < 1e-5


@pytest.mark.parametrize(
    ("scale", "shape"), [(-40.0, 1.3), (-jnp.inf, 0.7), (0.3, 0.0)], ids=["-40", "-inf", "shape 0"]
)
def test_a_vanishing_scale_or_a_shape_of_zero_is_nope(scale, shape):
    prior = {"prior_scale": jnp.full(4, scale), "prior_shape": jnp.full(4, shape)}
    ours = bam_attention(*INPUTS, **prior, mask=masks.Causal())
    assert np.max(np.abs(ours - attention(*INPUTS, mask=masks.Causal()))) < 1e-5


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_the_prior_is_that_of_the_released_code(implementation):
    ours = bam_attention(*INPUTS, **PRIOR, mask=masks.Causal(), implementation=implementation)
    prior = oracles.bam_prior(
        *(as_float64(PRIOR[f"prior_{name}"]) for name in ("shape", "scale", "loc"))
    )
    exact = oracles.attention(*map(as_float64, ARRAYS), mask=oracles.causal(), modifiers=[prior])
    assert_close(ours, exact, np.float32)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("shape", [0.3, 1.0, 2.0, -0.5])
def test_gradients_of_the_prior_are_finite_at_distance_zero_and_right(implementation, shape):
    """With loc = 0 each query meets its own key at distance zero."""

    def loss(scale, shape, loc):
        out = bam_attention(
            *INPUTS,
            prior_scale=scale,
            prior_shape=shape,
            prior_loc=loc,
            mask=masks.Causal(),
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(out))

    def oracle(scale, shape, loc):
        prior = oracles.bam_prior(shape, scale, loc)
        out = oracles.attention(*map(as_float64, ARRAYS), mask=oracles.causal(), modifiers=[prior])
        return np.sum(np.sin(out))

    at = (np.full(4, -1.0), np.full(4, shape), np.zeros(4))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(
        *(jnp.asarray(x, jnp.float32) for x in at)
    )
    assert all(np.all(np.isfinite(g)) for g in gradient)
    rng = np.random.default_rng(0)
    for index, ours in enumerate(gradient[:2]):  # |x| has a kink in loc at distance zero
        direction = [np.zeros(4)] * 3
        direction[index] = rng.standard_normal(4)
        slope = oracles.directional(oracle, at, direction)
        scale = max(1.0, float(np.max(np.abs(ours)))) * np.linalg.norm(direction[index])
        assert_close(np.sum(ours * direction[index]), slope, np.float32, "gradient", scale=scale)


def test_location_moves_the_peak_of_the_prior():
    loc = float(np.arcsinh(-1.5))  # e^loc - e^-loc = 2 sinh(loc) = -3
    zero, eye = jnp.zeros((9, 1, 2)), jnp.eye(9)[:, None, :]
    prior = {"prior_scale": jnp.zeros(1), "prior_shape": jnp.ones(1), "prior_loc": jnp.full(1, loc)}
    weights = np.asarray(bam_attention(zero, zero, eye, **prior))[:, 0]
    assert [int(np.argmax(weights[i])) for i in range(3, 9)] == [0, 1, 2, 3, 4, 5]


def test_small_shapes_reach_further():
    """Weight on keys more than 64 away, from a row in the middle of 1,000."""
    zero, far = jnp.zeros((1, 1, 2)), (np.arange(1000) < 1000 - 64)[:, None, None]
    mass = [
        float(
            bam_attention(
                zero,
                jnp.zeros((1000, 1, 2)),
                jnp.asarray(far, jnp.float32),
                prior_scale=jnp.zeros(1),
                prior_shape=jnp.full(1, shape),
                query_offset=999,
            )[0, 0, 0]
        )
        for shape in (0.1, 0.3, 1.0, 2.0)
    ]
    assert mass[0] > mass[1] > mass[2]
    assert mass[0] > 0.85
    assert mass[2] < 1e-20


def test_parameters_and_what_is_trained():
    def names(module):
        return {".".join(path) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}

    assert names(BAM(4)) == {"scale", "shape"}
    assert names(BAM(4, train_loc=True)) == {"scale", "shape", "loc"}
    assert names(BAMSSMax(4)) == {"scale", "shape", "length_scale"}


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_scalable_softmax_multiplies_scores_and_prior_by_log_n(implementation):
    length_scale = jnp.asarray([1.0, 0.5, 0.0, 2.0])
    lengths = np.array([20, 9])
    ours = bam_ssmax_attention(
        *INPUTS,
        length_scale=length_scale,
        **PRIOR,
        mask=masks.Causal() & masks.KeyPadding(jnp.asarray(lengths)),
        implementation=implementation,
    )
    mask = oracles.both(oracles.causal(), oracles.key_padding(lengths))
    prior = oracles.bam_prior(
        *(as_float64(PRIOR[f"prior_{name}"]) for name in ("shape", "scale", "loc"))
    )
    sharpen = oracles.scalable(as_float64(length_scale), mask, 20, 20)
    exact = oracles.attention(*map(as_float64, ARRAYS), mask=mask, modifiers=[prior, sharpen])
    assert_close(ours, exact, np.float32)


def test_at_equal_lengths_ssmax_is_bam_with_scaled_scores():
    """Where every query sees n keys, s log n is one factor for all: s = 1 / log n gives BAM."""
    length_scale = jnp.full(4, 1 / np.log(20), jnp.float32)
    ours = bam_ssmax_attention(*INPUTS, length_scale=length_scale, **PRIOR)
    assert_close(ours, as_float64(bam_attention(*INPUTS, **PRIOR)), np.float32)


def test_ssmax_counts_the_keys_of_the_queries_own_document():
    ids = jnp.asarray(np.repeat([[0, 1]], [8, 12], axis=1))
    packed = bam_ssmax_attention(
        *(x[:1] for x in INPUTS),
        length_scale=jnp.ones(4),
        **PRIOR,
        mask=masks.Causal() & masks.Segments(ids),
    )
    for a, b in ((0, 8), (8, 20)):
        alone = bam_ssmax_attention(
            *(x[:1, a:b] for x in INPUTS), length_scale=jnp.ones(4), **PRIOR, mask=masks.Causal()
        )
        assert_close(packed[:, a:b], as_float64(alone), np.float32)
