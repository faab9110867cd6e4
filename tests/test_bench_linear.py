"""The benchmarks of linear attention: verdicts on given times, mismatches told, recall learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.bench import linear, linear_peers, recall
from attnlab.bench.harness import Row, Timing


@pytest.fixture(autouse=True)
def the_promotion_rules_of_users():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def rows(times):
    """Rows as if measured: seconds of the chunked form and of softmax attention, by length."""
    return [
        Row({}, detail={"length": n, "medians": {linear.CHUNKED: a, linear.SOFTMAX: b}})
        for n, (a, b) in times.items()
    ]


@pytest.mark.parametrize(("seconds", "good"), [((1.0, 40.0), True), ((1.0, 42.0), False)])
def test_growth_is_judged_by_the_token(seconds, good):
    taken = Timing({"65536": (seconds[1],) * 3, "2048": (seconds[0],) * 3})
    row = linear.flatness("decay", "forward", taken)
    assert row.passed is good
    assert f"× {seconds[1] / 32:.2f}" in row.cells["chunked µs per token"]


def test_growth_is_measured_in_turn():
    row = linear.growth_of_time("gated delta", "forward", (64, 128), seconds=0.0)
    assert {n: len(s) for n, s in row.detail["seconds"].items()} == {"64": 5, "128": 5}


def test_the_crossover_is_found():
    overtaken = {1024: (2.0, 1.0), 2048: (4.0, 5.0), 65536: (128.0, 4000.0)}
    row = linear.crossover(rows(overtaken), "decay", "forward")
    assert row.passed
    assert "2,048" in row.cells["softmax ÷ chunked"]
    never = {1024: (2.0, 1.0), 2048: (8.0, 4.0), 4096: (32.0, 16.0), 65536: (8192.0, 4096.0)}
    row = linear.crossover(rows(never), "decay", "forward")
    assert not row.passed
    assert "nowhere" in row.cells["softmax ÷ chunked"]


def test_overtaking_for_good_is_what_counts():
    relapse = {1024: (1.0, 2.0), 2048: (2.0, 3.0), 4096: (9.0, 8.0), 8192: (16.0, 30.0)}
    row = linear.crossover(rows(relapse), "decay", "forward")
    assert "8,192" in row.cells["softmax ÷ chunked"]
    assert not row.passed


def test_kernels_are_asked_for_their_targets(monkeypatch):
    monkeypatch.setattr(linear, "kernels", lambda: ["triton"])
    fast = Timing({"triton": (1.0,), linear_peers.PEER: (1.0,), linear.SOFTMAX: (3.0,)})
    slow = Timing({"triton": (2.0,), linear_peers.PEER: (1.0,), linear.SOFTMAX: (3.0,)})
    at = (linear.LIGHTNING, "forward", linear.LIGHTNING_AT)
    words, met = linear._asked(*at, fast)
    assert met
    assert "softmax" in words
    assert "fla" in words
    assert linear._asked(*at, slow)[1] is False
    assert linear._asked("decay", "forward", 1024, fast) == ("triton ≥ 0.9 × fla", True)


def test_nothing_is_asked_without_a_kernel():
    assert linear._asked(linear.LIGHTNING, "forward", linear.LIGHTNING_AT, Timing({})) == ("", None)


def test_no_time_is_reported_for_a_wrong_form(monkeypatch):
    right = linear.recurrence

    def wrong(name):
        run = right(name)
        return (lambda given: 1.01 * run(given)) if name == linear.RECURRENT else run

    monkeypatch.setattr(linear, "recurrence", wrong)
    row = linear.measure("decay", "forward", 64, seconds=0.01)
    assert row.passed is False
    assert "not timed" in row.cells["chunked ms"]


@pytest.mark.parametrize("rule", linear.RULES)
def test_a_row_says_what_was_measured(rule):
    row = linear.measure(rule, "with gradients", 64, seconds=0.01)
    assert set(row.detail["medians"]) == {linear.CHUNKED, linear.RECURRENT, linear.SOFTMAX}
    assert row.detail["length"] == 64


@pytest.mark.parametrize("rule", linear.RULES)
@pytest.mark.parametrize("kind", linear.PASSES)
def test_memory_is_linear(rule, kind):
    assert linear.memory(rule, kind, (1024, 4096)).passed


def test_a_decoding_step_keeps_its_state_in_size():
    row = linear.decoding((64, 256), steps=4)
    assert "32,768 bytes" in row.cells["recurrent ms"]


def test_the_peer_is_given_the_same_recurrence():
    """Their arguments, put through their formula in NumPy, give our output."""
    given = linear.inputs(24, "gated delta")
    theirs = {name: np.asarray(x, np.float64) for name, x in linear_peers._theirs(given).items()}
    ours = np.asarray(linear.recurrence("recurrent")(given))
    for head in range(linear.HEADS):
        q, k, v, g, beta = (theirs[n][0, :, head] for n in ("q", "k", "v", "g", "beta"))
        state = np.zeros((linear.WIDTH, linear.WIDTH))
        for t in range(24):
            state = np.exp(g[t]) * state
            state += np.outer(k[t], beta[t] * (v[t] - state.T @ k[t]))
            np.testing.assert_allclose(ours[0, t, head], state.T @ q[t], atol=2e-4)


def test_every_causal_mechanism_with_a_state_is_trained():
    found = set(recall.mechanisms())
    assert {"linear-transformer", "performer", "retnet", "gla", "mamba2", "deltanet"} <= found
    assert not {"linformer", "docmamba", "rope"} & found


def test_heads_set_the_size_of_the_state():
    sizes = [recall.state_size("deltanet", heads) for heads in recall.HEADS]
    assert sizes == [recall.FEATURES**2 // heads for heads in recall.HEADS]
    assert recall.state_size("rope", 4) == 2 * recall.LENGTH * recall.FEATURES


def test_recall_is_learned_better_than_guessed(monkeypatch):
    monkeypatch.setattr(recall, "TASK", recall.AssociativeRecall(16, 2))
    monkeypatch.setattr(recall, "LENGTH", 12)
    monkeypatch.setattr(recall, "FEATURES", 64)
    row = recall.measure("deltanet", 4, seeds=(0,), steps=150)
    assert row.detail["recall"][0] > 0.7
    assert jnp.ndim(row.detail["state"]) == 0
