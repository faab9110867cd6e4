"""Where documents begin and end: counted token by token."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import resets
from attnlab.core.documents import document_ends, place_in_document

IDS = np.array([[3, 3, 3, 7, 7, -1, -1], [5] * 7, [0, 1, 2, 2, 2, 2, 0]])


def test_a_place_is_the_number_of_tokens_before_in_the_same_document():
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 0]]
    ids = jnp.asarray(IDS)
    np.testing.assert_array_equal(jax.jit(place_in_document)(ids), expected)
    np.testing.assert_array_equal(place_in_document(ids[0]), expected[0])


def test_a_document_ends_before_the_next_begins():
    ends = document_ends(resets(jnp.asarray(IDS)))
    expected = [[2, 2, 2, 4, 4, 6, 6], [6] * 7, [0, 1, 5, 5, 5, 5, 6]]
    np.testing.assert_array_equal(ends, expected)
