"""What tokamax cannot serve with our answer is refused, in words that say why and what can."""

import functools
import sys

import jax
import jax.numpy as jnp
import pytest

from attnlab import attention, normalizers, scores
from attnlab.core import tokamax as subject
from attnlab.core.choice import availability
from tests.core import draw
from tests.core.tokamax_cases import SIZE, StandIn

ours = functools.partial(attention, implementation="tokamax")


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in where Python looks for tokamax."""
    return StandIn.put_in_place(monkeypatch)


REFUSED = {
    "by softmax only, not by Sigmoid": {"normalizer": normalizers.Sigmoid()},
    "by softmax only, not by SoftmaxPlusOne": {"normalizer": normalizers.SoftmaxPlusOne()},
    "no log-sum-exp, without which a sink": {"normalizer": normalizers.Softmax(jnp.zeros(4))},
    "gives no log-sum-exp": {"return_lse": True},
    "has no dropout": {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
    "adds to scores, then caps them, which Temperature": {
        "modifiers": scores.Temperature(2.0 * jnp.ones((4, 1, 1)))
    },
    "adds to scores, then caps them, which SoftCap": {
        "modifiers": (scores.SoftCap(2.0), scores.Bias(jnp.zeros((1, 1, 1))))
    },
    "a soft cap that is one number": {"modifiers": scores.SoftCap(jnp.ones((4, 1, 1)))},
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals_say_why_and_name_what_can(stand_in, words):
    query, key, value = map(jnp.asarray, draw.inputs(SIZE, 0))
    with pytest.raises(NotImplementedError, match=f'"tokamax" .*{words}') as refusal:
        ours(query, key, value, **REFUSED[words])
    draw.check_refusal(refusal.value)
    assert not stand_in.asked


def test_a_traced_cap_and_dtypes_it_does_not_take_are_refused(stand_in):
    query, key, value = map(jnp.asarray, draw.inputs(SIZE, 0))
    with pytest.raises(NotImplementedError, match="one that is traced"):
        jax.grad(lambda cap: jnp.sum(ours(query, key, value, modifiers=scores.SoftCap(cap))))(2.0)
    with pytest.raises(NotImplementedError, match="cannot multiply float16 on a CPU"):
        ours(*(x.astype(jnp.float16) for x in (query, key, value)))
    with pytest.raises(NotImplementedError, match="batch of size 0"):
        ours(query[:0], key[:0], value[:0])


def test_what_it_does_not_take_on_a_tpu_is_refused(stand_in, monkeypatch):
    monkeypatch.setattr(subject, "_platform", lambda: "tpu")
    query, key, value = map(jnp.asarray, draw.inputs(SIZE, 0))
    with pytest.raises(NotImplementedError, match="adds nothing to scores on a TPU"):
        ours(query, key, value, modifiers=scores.AlibiSlopes(jnp.ones(4)))
    with pytest.raises(NotImplementedError, match="bfloat16 and float32 only on a TPU"):
        ours(*(x.astype(jnp.float16) for x in (query, key, value)))


def test_without_tokamax_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(subject.importlib.util, "find_spec", lambda name: None)
    query, key, value = map(jnp.asarray, draw.inputs(SIZE, 0))
    with pytest.raises(NotImplementedError, match=r"needs the extra attnlab\[tokamax\]"):
        ours(query, key, value)
    assert availability()["tokamax"] == "needs the extra attnlab[tokamax]"


def test_its_own_refusals_are_told_in_our_words(stand_in, monkeypatch):
    def refuse(*arrays, **options):
        errors = [NotImplementedError("Bias is not supported."), NotImplementedError("No GPU.")]
        raise ExceptionGroup("all implementations failed", errors)

    query, key, value = map(jnp.asarray, draw.inputs(SIZE, 0))
    monkeypatch.setattr(sys.modules["tokamax"], "dot_product_attention", refuse)
    words = r"cannot serve this call with its kernels here \(Bias is not supported; No GPU\); impl"
    with pytest.raises(NotImplementedError, match=words) as refusal:
        ours(query, key, value)
    draw.check_refusal(refusal.value)


def test_a_missing_gradient_is_told_in_our_words(stand_in, monkeypatch):
    @jax.custom_vjp
    def forward_only(query, key, value, bias, mask, options):
        return query

    def refuse(*_):
        raise NotImplementedError("`logits_soft_cap` unsupported.")

    forward_only.defvjp(lambda *x: (x[0], None), refuse)
    monkeypatch.setattr(
        sys.modules["tokamax"],
        "dot_product_attention",
        lambda *x, **options: forward_only(*x, {}),
    )
    query, key, value = map(jnp.asarray, draw.inputs(draw.Sizes((2,), 5, 5, 2, 2, 4, 4), 0))
    words = "cannot serve the gradients of this call .*logits_soft_cap.*blockwise"
    with pytest.raises(NotImplementedError, match=words):
        jax.grad(lambda q: jnp.sum(ours(q, key, value)))(query)


def test_other_errors_are_not_swallowed(stand_in, monkeypatch):
    def fail(*arrays, **options):
        raise ExceptionGroup("mixed", [NotImplementedError("a"), ValueError("b")])

    monkeypatch.setattr(sys.modules["tokamax"], "dot_product_attention", fail)
    with pytest.raises(ExceptionGroup, match="mixed"):
        ours(*map(jnp.asarray, draw.inputs(SIZE, 0)))
