"""Every layer of the atlas keeps every promise it makes; and each promise can be broken."""

import dataclasses

import jax.numpy as jnp
import pytest

from attnlab import atlas
from tests.contract import support
from tests.contract.layers import PROPERTIES

ENTRIES = {id: entry for id, entry in atlas.entries().items() if entry.kind == "layer"}
LATENT = ENTRIES["mla"]


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize(("entry", "implementation", "dtype"), support.subjects("layer"))
def test_promise(entry, implementation, dtype, name, record_property):
    errors = []
    row = support.examine(entry, name, dtype, implementation, errors)
    record_property("support", row)
    if errors:
        raise errors[0]


def test_every_claim_of_a_layer_is_tested():
    tested = {cell.cell_contents for prop in PROPERTIES.values() for cell in prop.__closure__}
    for entry in ENTRIES.values():
        assert entry.properties <= tested


class Damaged(LATENT.module):
    """The layer with one defect, or with none."""

    defect = None

    def __call__(self, x, *, mask=None, cache=None, dropout_key=None):
        call = super().__call__
        if self.defect is None:
            return call(x, mask=mask, cache=cache)
        return type(self).defect(call, x, mask=mask, cache=cache)


def leaks_the_future(call, x, *, mask, cache):
    return call(jnp.roll(x, -1, axis=-2) * 0.1 + x, mask=mask, cache=cache)


def ignores_the_mask(call, x, *, mask, cache):
    return call(x, cache=cache)


def forgets_where_it_is(call, x, *, mask, cache):
    if cache is None:
        return call(x, mask=mask)
    out, cache = call(x, mask=mask, cache=cache)
    return out * jnp.cos(cache.length - x.shape[-2]).astype(out.dtype), cache


def answers_in_float32(call, x, *, mask, cache):
    return call(x, mask=mask, cache=cache).astype(jnp.float32)


def reads_the_mean_of_what_is_there(call, x, *, mask, cache):
    return call(x, mask=mask, cache=cache) + 0.1 * jnp.mean(x, axis=-2, keepdims=True)


def holds_a_square(call, x, *, mask, cache):
    square = jnp.sin(x @ jnp.swapaxes(x, -1, -2))
    return call(x, mask=mask, cache=cache) + 0.01 * square @ x


def knows_where_it_begins(call, x, *, mask, cache):
    place = jnp.arange(x.shape[-2], dtype=x.dtype).reshape((1,) * (x.ndim - 2) + (-1, 1))
    return call(x, mask=mask, cache=cache) * (1 + 0.01 * place)


DEFECTS = [
    (None, "within budget", "float32"),
    (leaks_the_future, "no leak from the future", "float32"),
    (ignores_the_mask, "masked keys have no influence", "float32"),
    (ignores_the_mask, "within budget", "float32"),
    (ignores_the_mask, "finite at extremes", "float32"),
    (forgets_where_it_is, "decode equals prefill", "float32"),
    (answers_in_float32, "shape and dtype", "bfloat16"),
    (reads_the_mean_of_what_is_there, "padding changes nothing", "float32"),
    (reads_the_mean_of_what_is_there, "gradient vs float64", "float32"),
    (holds_a_square, "memory growth", "float32"),
    (knows_where_it_begins, "translation", "float32"),
]


@pytest.mark.parametrize(("defect", "name", "dtype"), DEFECTS)
def test_a_planted_defect_is_caught(defect, name, dtype):
    kind = type("Planted", (Damaged,), {"defect": staticmethod(defect) if defect else None})

    def build(num_heads, head_width, *, rngs):
        return kind(32, num_heads, latent_width=16, rope_width=4, rngs=rngs)

    entry = dataclasses.replace(LATENT, module=kind, build=build)
    row = support.examine(entry, name, dtype, "blockwise")
    assert row["status"] == ("fail" if defect else "pass"), row
