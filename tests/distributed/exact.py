"""What exact means across devices."""

import jax
import jax.numpy as jnp

EXACT = 1e-5


def assert_equal(found, wanted, words=""):
    """Floating-point arrays differ by a hundred-thousandth of their largest entry at most."""
    found, tree = jax.tree.flatten(found)
    wanted, same = jax.tree.flatten(wanted)
    assert tree == same
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        if jnp.issubdtype(b.dtype, jnp.floating):
            scale = max(1.0, float(jnp.abs(b).max(initial=0)))
            off = float(jnp.abs(a - b).max(initial=0))
            assert off <= EXACT * scale, f"{words}: {a.shape} off by {off}, scale {scale}"
