"""Everything public says what it does, what it takes and where it comes from."""

import inspect

import pytest

import attnlab

CALLABLE = [name for name in attnlab.__all__ if callable(getattr(attnlab, name))]


@pytest.mark.parametrize("name", attnlab.__all__)
def test_every_public_name_is_documented(name):
    assert inspect.getdoc(getattr(attnlab, name))


@pytest.mark.parametrize("name", ["attention", "block_sparse_attention", "decode_attention"])
def test_attention_functions_give_shapes_and_errors(name):
    text = inspect.getdoc(getattr(attnlab, name))
    for words in ('"*B', "Args:", "Returns:", "Raises:"):
        assert words in text, words
    for parameter in inspect.signature(getattr(attnlab, name)).parameters:
        assert parameter in text, parameter


def test_names_are_those_that_can_be_imported():
    assert len(set(attnlab.__all__)) == len(attnlab.__all__)
    assert set(attnlab.__all__) <= set(dir(attnlab))
    assert CALLABLE
