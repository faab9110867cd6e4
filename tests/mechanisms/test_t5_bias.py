"""T5's bias: one number per head and bucket, buckets as released (tests/core/test_scores.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, masks
from attnlab.positional.t5_bias import T5Bias, t5_bias_attention
from tests import oracles
from tests.core import draw
from tests.tolerances import as_float64, assert_close


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_bias_is_looked_up_by_bucket(bidirectional, rng):
    arrays = draw.inputs(draw.SIZES[3], 0)
    table = rng.standard_normal((2, 32)).astype(np.float32)
    ours = t5_bias_attention(
        *map(jnp.asarray, arrays), table=jnp.asarray(table), bidirectional=bidirectional
    )
    bias = oracles.t5_bias(table, bidirectional=bidirectional, max_distance=128)
    assert_close(ours, oracles.attention(*map(as_float64, arrays), modifiers=[bias]), np.float32)


def test_the_initial_table_is_nope():
    arrays = tuple(map(jnp.asarray, draw.inputs(draw.SIZES[3], 0)))
    np.testing.assert_array_equal(T5Bias(2)(*arrays), attention(*arrays))


def test_only_buckets_in_use_have_a_gradient():
    arrays = tuple(map(jnp.asarray, draw.inputs(draw.Sizes((), 6, 6, 1, 1, 4, 4), 0)))

    def loss(table):
        out = t5_bias_attention(*arrays, table=table, bidirectional=False, mask=masks.Causal())
        return jnp.sum(jnp.sin(out))

    gradient = np.asarray(jax.grad(loss)(jnp.zeros((1, 32))))
    assert np.all(gradient[0, :6] != 0)  # distances 0 to 5
    np.testing.assert_array_equal(gradient[0, 6:], 0)


def test_a_table_that_cannot_be_is_refused(as_users_run_it):
    x = jnp.ones((4, 2, 2))
    with pytest.raises(ValueError, match=r"axis N .*2, got 3"):
        t5_bias_attention(x, x, x, table=jnp.zeros((3, 32)))
    with pytest.raises(ValueError, match="max_distance"):
        t5_bias_attention(x, x, x, table=jnp.zeros((2, 32)), max_distance=4)
