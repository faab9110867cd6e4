"""Blocks that are chosen or not, for attention and for a state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, linear_recurrence, masks
from attnlab.core.typed_blocks import Factor, OwnOrChosen, in_blocks, through_blocks
from tests import oracles
from tests.tolerances import as_float64, assert_close, assert_reordered

LENGTH, BLOCK = 10, 4
CHOSEN = np.array([[True, False], [False, True], [True, True]])  # blocks and heads


def by_head():
    return CHOSEN.repeat(BLOCK, axis=0)[:LENGTH].T  # "N S"


def seen():
    block = np.arange(LENGTH) // BLOCK
    return (block[:, None] == block[None, :]) | by_head()[:, None, :]


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_attention_sees_its_own_block_and_the_chosen_ones(implementation, rng):
    arrays = [normal(rng, LENGTH, 2, 4) for _ in range(3)]
    real = np.arange(LENGTH) != 5
    mask = OwnOrChosen(jnp.asarray(by_head()), jnp.asarray(real), BLOCK) & masks.Causal()
    out = attention(*arrays, mask=mask, implementation=implementation)
    allowed = seen() & real & np.tri(LENGTH, dtype=bool)
    exact = oracles.attention(*map(as_float64, arrays), mask=oracles.array(allowed))
    assert_close(out, exact, np.float32)


def test_a_factor_changes_nothing_and_has_the_slope_of_one_on_earlier_weights(rng):
    arrays = [normal(rng, LENGTH, 2, 4) for _ in range(3)]
    read = normal(rng, LENGTH, 2, 4)

    def total(gate):
        out = attention(*arrays, mask=masks.Causal(), modifiers=Factor(gate, BLOCK))
        return jnp.sum(out * read)

    gate = jnp.zeros((2, LENGTH))
    assert_reordered(total(gate), jnp.sum(attention(*arrays, mask=masks.Causal()) * read),
                     np.float32)  # fmt: skip
    slope = as_float64(jax.grad(total)(gate))
    assert not np.any(slope[:, 2 * BLOCK :])  # the last block: no later query

    def weighted(factor, key):
        def scale(score, i, j, head):
            earlier = (j == key) & (i // BLOCK != j // BLOCK) & (head == 1)
            return score + np.where(earlier, np.log(factor), 0.0)

        out = oracles.attention(*map(as_float64, arrays), mask=oracles.causal(), modifiers=[scale])
        return np.sum(out * as_float64(read))

    for key in (0, 6):
        difference = (weighted(1 + 1e-5, key) - weighted(1 - 1e-5, key)) / 2e-5
        assert_close(slope[1, key], difference, np.float32, "gradient")


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_state_keeps_the_chosen_blocks_and_reads_its_own(batch, rng):
    def drawn(*shape):
        return normal(rng, *batch, LENGTH, *shape)

    steps = {"query": drawn(2, 4), "key": drawn(2, 4), "value": drawn(2, 3)}
    steps["log_decay"] = -jnp.abs(drawn(2))
    steps["erase"] = 0.1 * drawn(2, 4)
    chosen = jnp.broadcast_to(jnp.asarray(CHOSEN, jnp.float32), (*batch, *CHOSEN.shape))
    out = through_blocks(steps, chosen, BLOCK)
    for first in range(0, LENGTH, BLOCK):  # the whole past once more for each block
        here = np.arange(LENGTH) // BLOCK == first // BLOCK
        kept = jnp.asarray(here[:, None] | by_head().T, jnp.float32)[..., None]
        kept = jnp.broadcast_to(kept, steps["key"].shape)
        whole = linear_recurrence(**steps | {"key": steps["key"] * kept})
        assert_reordered(out[..., here, :, :], whole[..., here, :, :], np.float32)


def test_blocks_are_filled_up_with_zeros():
    found = in_blocks(jnp.arange(1.0, 11.0).reshape(1, 10, 1), 1, 4)
    assert found.shape == (3, 1, 4, 1)
    np.testing.assert_array_equal(found[2, 0, :, 0], [9, 10, 0, 0])
