"""What the front door takes, refuses and in which words, what it chooses; and jax.nn's door."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnlab
from attnlab import attention, dot_product_attention, explain, masks, normalizers, scores
from attnlab.core.inputs import IMPLEMENTATIONS
from tests import oracles
from tests.core import draw
from tests.tolerances import as_float64, assert_close

SIZE = draw.Sizes((2,), 6, 9, 4, 2, 8, 8)


def arrays(size=SIZE, dtype=jnp.float32):
    return [jnp.asarray(x).astype(dtype) for x in draw.inputs(size, 0)]


def bad(**changes):
    query, key, value = arrays()
    given = {"query": query, "key": key, "value": value} | changes
    return attention(**given)


Q, K, V = arrays()
WRONG = {
    "query is a list": ({"query": [1.0]}, TypeError, r"query: expected an array .*got list"),
    "query is an integer": ({"query": Q.astype(jnp.int32)}, TypeError, "query: .*float.*int32"),
    "key is complex": ({"key": K.astype(jnp.complex64)}, TypeError, "key: .*float.*complex64"),
    "value is boolean": ({"value": V > 0}, TypeError, "value: .*float.*bool"),
    "query of rank two": ({"query": Q[0, 0]}, ValueError, r"query: expected .*\(4, 8\)"),
    "dtypes differ": ({"key": K.astype(jnp.bfloat16)}, TypeError, "key: .*float32.*bfloat16"),
    "batch differs": ({"key": K[:1]}, ValueError, r"key: batch .*\(1,\).*\(2,\)"),
    "widths differ": ({"key": K[..., :5]}, ValueError, "key: head width 5 .*8"),
    "lengths differ": ({"value": V[:, :4]}, ValueError, r"value: length .*\(4, 2\).*\(9, 2\)"),
    "heads differ": ({"value": V[:, :, :1]}, ValueError, r"value: .*heads .*\(9, 1\).*\(9, 2\)"),
    "heads do not divide": ({"query": Q[:, :, :3]}, ValueError, "query: .*heads, 3,.*multiple.*2"),
    "no keys": ({"key": K[:, :0], "value": V[:, :0]}, ValueError, "key: .*empty"),
    "mask is a string": ({"mask": "causal"}, TypeError, "mask: expected a Mask .*got str"),
    "mask is float": ({"mask": jnp.ones((6, 9))}, TypeError, "mask: .*boolean.*float32"),
    "mask too long": ({"mask": jnp.ones((6, 8), bool)}, ValueError, "mask: axis S .*9, got 8"),
    "mask of other heads": ({"mask": jnp.ones((3, 6, 9), bool)}, ValueError, "mask: axis N .*4"),
    "mask of other batch": (
        {"mask": jnp.ones((3, 1, 6, 9), bool)}, ValueError, r"mask: batch .*\(3,\)",
    ),
    "lengths of other batch": (
        {"mask": masks.KeyPadding(jnp.asarray([1, 2, 3]))}, ValueError, r"mask: batch .*\(3,\)",
    ),
    "bias of other heads": (
        {"modifiers": scores.Bias(jnp.ones((3, 6, 9)))}, ValueError, "modifiers: axis N .*4, got 3",
    ),
    "slopes of other heads": (
        {"modifiers": scores.AlibiSlopes(jnp.ones(3))}, ValueError, "modifiers: axis N .*4, got 3",
    ),
    "modifier is a function": (
        {"modifiers": lambda s, at: s}, TypeError, "modifiers: expected .*got function",
    ),
    "one modifier is a number": (
        {"modifiers": [2.0]}, TypeError, "modifiers: expected ScoreModifiers, got float",
    ),
    "normalizer is a class": (
        {"normalizer": normalizers.Sigmoid}, TypeError, "normalizer: expected a Normalizer",
    ),
    "normalizer is a name": ({"normalizer": "softmax"}, TypeError, "normalizer: .*got str"),
    "lse of a sigmoid": (
        {"normalizer": normalizers.Sigmoid(), "return_lse": True},
        ValueError,
        "return_lse: Sigmoid",
    ),
    "unknown implementation": (
        {"implementation": "fast"}, ValueError, "implementation: .*reference.*got 'fast'",
    ),
    "block sizes": ({"block_sizes": (0, 8)}, ValueError, r"block_sizes: .*\(0, 8\)"),
    "dropout rate": ({"dropout_rate": 1.0}, ValueError, r"dropout_rate: .*\[0, 1\), got 1.0"),
    "no dropout key": ({"dropout_rate": 0.1}, ValueError, "dropout_key: .*got None"),
    "dropout key is a number": (
        {"dropout_rate": 0.1, "dropout_key": 3}, TypeError, "dropout_key: expected .*got 3",
    ),
    "offset is a float": ({"query_offset": 1.5}, TypeError, "query_offset: expected an integer"),
    "offset is an array": (
        {"key_offset": jnp.arange(2)}, ValueError, r"key_offset: expected a scalar.*\(2,\)",
    ),
    "scale is an array": ({"scale": jnp.ones(4)}, ValueError, r"scale: expected a scalar.*\(4,\)"),
    "scale is a word": ({"scale": "big"}, TypeError, "scale: expected a number.*'big'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused_by_name(name, as_users_run_it):
    changes, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        bad(**changes)
    given = {"query": Q, "key": K, "value": V} | changes
    with pytest.raises(error, match=words):  # explain checks what attention checks
        explain(**given)


def test_cudnn_without_a_gpu_says_so_and_names_what_can():
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("there is a GPU")
    with pytest.raises(
        NotImplementedError, match=r'(?s)"cudnn" needs an NVIDIA GPU.*"blockwise" can'
    ):
        attention(Q, K, V, implementation="cudnn")


def test_xla_refuses_what_jax_cannot_do():
    for options in (
        {"modifiers": scores.SoftCap(3.0)},
        {"normalizer": normalizers.Sigmoid()},
        {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)},
    ):
        with pytest.raises(NotImplementedError, match=r'"xla" .*implementation="blockwise" can'):
            attention(Q, K, V, implementation="xla", **options)


def test_explain_says_what_is_taken_and_why_the_others_are_not():
    choice = explain(Q, K, V)
    assert choice.implementation == "reference"
    assert choice.reason
    assert set(choice.rejected) == set(IMPLEMENTATIONS) - {"reference"}
    assert all(choice.rejected.values())
    long = jax.ShapeDtypeStruct((1, 16384, 1, 64), jnp.float32)
    choice = explain(long, long, long, mask=masks.Causal())
    assert choice.implementation == "blockwise"
    assert "reference" in choice.rejected
    asked = explain(Q, K, V, implementation="xla")
    assert asked.implementation == "xla"
    with pytest.raises(TypeError, match="colour"):
        explain(Q, K, V, colour="red")


def test_auto_runs_what_explain_says():
    for size in (SIZE, draw.Sizes((), 2100, 2100, 1, 1, 2, 2)):
        given = arrays(size)
        name = explain(*given, mask=masks.Causal()).implementation
        auto = jax.jit(lambda *x: attention(*x, mask=masks.Causal()))(*given)
        named = jax.jit(lambda *x, n=name: attention(*x, mask=masks.Causal(), implementation=n))(
            *given
        )
        np.testing.assert_array_equal(auto, named)


def test_the_global_settings_of_jax_are_left_alone():
    code = inspect.getsource(attnlab)
    assert "jax.config" not in code


# ---- dot_product_attention -----------------------------------------------------------------------


def test_the_signature_is_that_of_jax_nn():
    ours = inspect.signature(dot_product_attention).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name


LENGTHS = jnp.asarray([9, 5], jnp.int32)
RNG = np.random.default_rng(0)
SWAPS = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bias": {"bias": jnp.asarray(RNG.standard_normal((2, 4, 9, 9)), jnp.float32)},
    "bias by head": {"bias": jnp.asarray(RNG.standard_normal((1, 4, 1, 9)), jnp.float32)},
    "mask": {"mask": jnp.asarray(np.tril(np.ones((9, 9), bool), 2)[None, None])},
    "causal mask of heads": {
        "mask": jnp.asarray((RNG.random((1, 4, 9, 9)) < 0.8) | np.eye(9, dtype=bool)),
        "is_causal": True,
    },
    "window": {"local_window_size": 2},
    "two-sided window": {"local_window_size": (3, 1), "is_causal": True},
    "key lengths": {"key_value_seq_lengths": LENGTHS},
    "both lengths": {"query_seq_lengths": LENGTHS, "key_value_seq_lengths": LENGTHS},
    "everything": {
        "bias": jnp.asarray(RNG.standard_normal((1, 1, 9, 9)), jnp.float32),
        "is_causal": True,
        "local_window_size": (4, 0),
        "key_value_seq_lengths": LENGTHS,
        "scale": 0.5,
    },
}


@pytest.mark.parametrize("name", SWAPS)
@pytest.mark.parametrize("residual", [False, True])
def test_swapped_in_for_jax_nn_it_gives_the_same_numbers(name, residual):
    given = arrays(draw.Sizes((2,), 9, 9, 4, 2, 8, 8))
    options = SWAPS[name] | {"return_residual": residual}
    ours = dot_product_attention(*given, **options)
    theirs = jax.nn.dot_product_attention(*given, **options)
    # Rows beyond query_seq_lengths, or without any key, are zeros here and something else there.
    real = np.ones((2, 9), bool)
    if "query_seq_lengths" in options:
        real = np.arange(9) < np.asarray(LENGTHS)[:, None]
    if name == "everything":  # a window beyond the keys' length sees nothing
        real = np.arange(9) < np.asarray(LENGTHS)[:, None] + 4
    if residual:
        assert_close(np.asarray(ours[1])[real], as_float64(theirs[1])[real], np.float32)
        ours, theirs = ours[0], theirs[0]
    assert_close(np.asarray(ours)[real], as_float64(theirs)[real], np.float32)
    np.testing.assert_array_equal(np.asarray(ours)[~real], 0.0)


def test_jax_nn_positional_arguments():
    given = arrays(draw.Sizes((2,), 9, 9, 4, 2, 8, 8))
    bias, mask = SWAPS["bias"]["bias"], SWAPS["mask"]["mask"]
    ours = dot_product_attention(*given, bias, mask, implementation="xla")
    theirs = jax.nn.dot_product_attention(*given, bias, mask, implementation="xla")
    assert_close(ours, as_float64(theirs), np.float32)


def test_three_axes_as_in_jax_nn():
    given = [x[0] for x in arrays()]
    ours = dot_product_attention(*given)
    assert_close(ours, as_float64(jax.nn.dot_product_attention(*given)), np.float32)


# ---- the oracles themselves, against numbers worked out by hand ----------------------------------


def test_the_oracle_by_hand():
    query, key = np.ones((1, 1, 1)), np.array([[[0.0]], [[np.log(3.0)]]])
    value = np.array([[[4.0]], [[8.0]]])
    out, lse = oracles.attention(query, key, value, return_lse=True)
    assert_close(out, [[[7.0]]], np.float64)
    assert_close(lse, [[np.log(4.0)]], np.float64)
    out = oracles.attention(query, key, value, mask=oracles.causal())
    assert_close(out, [[[4.0]]], np.float64)
    out = oracles.attention(query, key, value, normalizer=oracles.sigmoid())
    assert_close(out, [[[2.0 + 6.0]]], np.float64)
    out = oracles.attention(query, key, value, normalizer=oracles.softmax_plus_one())
    assert_close(out, [[[28.0 / 5.0]]], np.float64)


def test_the_oracle_projections_by_hand():
    one = np.ones((1, 1, 3), bool)
    weights, _ = oracles.sparsemax()(np.array([[[0.5, 0.3, -1.0]]]), one, np.asarray)
    assert_close(weights, [[[0.6, 0.4, 0.0]]], np.float64)
    weights, _ = oracles.entmax15()(np.array([[[0.0, 0.0, -9.0]]]), one, np.asarray)
    assert_close(weights, [[[0.5, 0.5, 0.0]]], np.float64)


def test_xla_says_that_its_log_sum_exp_has_no_gradient():
    def loss(query, **options):
        return jnp.sum(attention(query, K, V, implementation="xla", **options)[0])

    jax.grad(loss)(Q, return_lse=True)  # of the output alone: there is one
    words = r'no gradient of the log-sum-exp.*implementation="blockwise" can'
    with pytest.raises(NotImplementedError, match=words):
        jax.grad(lambda q: jnp.sum(attention(q, K, V, implementation="xla", return_lse=True)[1]))(Q)
    with pytest.raises(NotImplementedError, match=words):
        jax.grad(loss)(Q, normalizer=normalizers.SoftmaxPlusOne())
