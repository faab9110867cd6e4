"""ALiBi: the slopes are those of the authors' released code, for any number of heads."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.core.scores import alibi_slopes
from attnlab.positional.alibi import alibi_attention
from tests import oracles
from tests.core import draw
from tests.tolerances import as_float64, assert_close


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 6, 7, 8, 12, 16, 20, 24, 31, 32, 40])
def test_slopes(num_heads):
    assert_close(alibi_slopes(num_heads), oracles.alibi_slopes(num_heads), np.float32)


def test_slopes_by_hand():
    assert_close(alibi_slopes(8), [2.0**-n for n in range(1, 9)], np.float32)
    # Six heads: the four of N = 4, then the first and third of N = 8.
    assert_close(
        alibi_slopes(6), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3], np.float32
    )


@pytest.mark.parametrize("num_heads", [0, -1])
def test_no_heads_have_no_slopes(num_heads):
    with pytest.raises(ValueError, match=f"num_heads.*{num_heads}"):
        alibi_slopes(num_heads)


def test_weights_fall_by_a_fixed_factor_per_step():
    zero, eye = jnp.zeros((6, 2, 2)), jnp.broadcast_to(jnp.eye(6)[:, None, :], (6, 2, 6))
    weights = as_float64(alibi_attention(zero, zero, eye, mask=masks.Causal()))[5]
    for head, slope in enumerate((2.0**-4, 2.0**-8)):
        assert_close(weights[head, :-1] / weights[head, 1:], np.full(5, np.exp(-slope)), np.float32)


def test_slopes_may_be_given():
    arrays = draw.inputs(draw.SIZES[1], 0)
    slopes = np.array([1.0, 0.0, 0.5, 3.0], np.float32)
    ours = alibi_attention(*map(jnp.asarray, arrays), slopes=jnp.asarray(slopes))
    exact = oracles.attention(*map(as_float64, arrays), modifiers=[oracles.alibi(slopes)])
    assert_close(ours, exact, np.float32)
