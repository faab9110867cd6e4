"""Groups of query heads that differ in size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.heads import allocate, assigned, gather_heads
from tests.contract.head_sharing_formulas import group_sizes


def test_heads_are_gathered_by_sequence_or_for_all(rng):
    x = jnp.asarray(rng.standard_normal((2, 5, 3, 4)), jnp.float32)
    for same in ((0, 0, 2, 1), jnp.asarray([0, 0, 2, 1])):
        np.testing.assert_array_equal(gather_heads(x, same), np.asarray(x)[:, :, [0, 0, 2, 1]])
    own = jnp.asarray([[0, 1, 1, 2], [2, 2, 0, 1]])
    for run in (gather_heads, jax.jit(gather_heads), jax.vmap(gather_heads)):
        found = np.asarray(run(x, own))
        for b in range(2):
            np.testing.assert_array_equal(found[b], np.asarray(x)[b][:, np.asarray(own)[b]])


def test_gathered_heads_hand_their_gradients_back(rng):
    x, read = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5, 2, 4), (5, 3, 4)))
    gradient = jax.grad(lambda x: jnp.sum(gather_heads(x, (0, 1, 1)) * read))(x)
    expected = np.stack([read[:, 0], read[:, 1] + read[:, 2]], axis=1)
    np.testing.assert_allclose(np.asarray(gradient), expected, rtol=1e-6)


def test_groups_are_of_consecutive_heads():
    sizes = np.array([[3, 1, 2], [1, 1, 4]])
    expected = [np.repeat(np.arange(3), row) for row in sizes]
    np.testing.assert_array_equal(assigned(sizes, 6), expected)
    np.testing.assert_array_equal(jax.jit(assigned, static_argnums=1)(sizes[0], 6), expected[0])


@pytest.mark.parametrize(
    ("groups", "heads"), [(1, 1), (1, 4), (2, 5), (3, 7), (4, 4), (4, 12), (5, 16), (7, 8)]
)
def test_every_query_head_is_in_a_group_and_no_group_is_empty(rng, groups, heads):
    norms = rng.exponential(size=(200, groups)) ** 3
    norms[::5] = np.round(norms[::5])  # ties and zeros
    norms[0], norms[1] = 0, np.finfo(np.float32).max
    sizes = np.asarray(allocate(jnp.asarray(norms, jnp.float32), heads))
    assert np.all(sizes.sum(-1) == heads)
    assert np.all(sizes >= 1)
    for row, found in list(zip(norms, sizes, strict=True))[2:]:
        if not np.array_equal(row, np.round(row)):
            np.testing.assert_array_equal(found, group_sizes(row.astype(np.float32), heads))
    wanted = heads * norms[2:] / np.maximum(norms[2:].sum(-1, keepdims=True), 1e-30)
    large = np.all(wanted >= 1, axis=-1)
    assert np.all(np.abs(sizes[2:] - wanted)[large] < 1 + 1e-5)
    if heads % groups == 0:
        assert np.all(sizes[:2] == heads // groups)


def test_equal_norms_make_equal_groups():
    """Also where a third of the sum is no float."""
    for groups, heads in ((3, 6), (3, 12), (6, 6), (7, 21), (2, 8)):
        norms = jnp.full((groups,), 0.1, jnp.float32)
        np.testing.assert_array_equal(allocate(norms, heads), [heads // groups] * groups)


@pytest.mark.parametrize(("groups", "heads"), [(4, 12), (4, 8), (2, 8), (3, 12), (8, 63)])
def test_a_norm_that_doubles_draws_heads_as_predicted(groups, heads):
    norms = np.ones(groups, np.float32)
    norms[1] = 2
    sizes = np.asarray(allocate(jnp.asarray(norms), heads))
    assert sizes[1] == round(2 * heads / (groups + 1)) > heads // groups
    assert np.ptp(np.delete(sizes, 1)) <= 1


def test_norms_that_are_not_finite_count_nothing():
    sizes = allocate(jnp.asarray([1.0, jnp.nan, jnp.inf, 1.0]), 8)
    np.testing.assert_array_equal(sizes, [3, 1, 1, 3])


def test_bad_input_is_refused_by_name(as_users_run_it):
    x = jnp.ones((2, 5, 3, 4))
    with pytest.raises(TypeError, match="assignment"):
        gather_heads(x, (0.0, 1.0))
    for wrong in ((0, 3), (-1, 0)):
        with pytest.raises(ValueError, match=r"assignment.*0 to 2"):
            gather_heads(x, wrong)
    for shape in ((), (3, 4), (1, 2, 4)):
        with pytest.raises(ValueError, match=r"assignment.*shape"):
            gather_heads(x, jnp.zeros(shape, jnp.int32))
    for sizes in ((4, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match=r"sizes.*sum to 4"):
            assigned(sizes, 4)
    with pytest.raises(TypeError, match="sizes"):
        assigned((2.0, 2.0), 4)
    with pytest.raises(ValueError, match=r"num_heads.*3 key heads.*2"):
        allocate(jnp.ones(3), 2)
    with pytest.raises(ValueError, match="norms"):
        allocate(jnp.asarray([1.0, -1.0]), 2)
