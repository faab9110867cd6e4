"""`attnlab bench flash`: what is counted, who is compared, and that nothing wrong is timed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from attnlab.bench import flash, flash_compiled
from attnlab.bench import flash_peers as peers
from attnlab.bench.flash_candidates import arguments, candidate, difference, prepare, reference
from attnlab.bench.flash_cases import CASES, Case, Shape, chosen
from attnlab.bench.flash_peers import OURS, Subject
from attnlab.bench.harness import Timing
from attnlab.cli import app
from pallas_kernels.inspect import tpu_missing

SHAPE = Shape(2, 96, 2, 16)
LIKE_OTHERS = ("random", "sparse 100%", "sparse 50%", "sparse 10%", "sparse 5%")
SMALL = dataclasses.replace(flash.settings(quick=True), lengths=(64,), at=(64, 16), widths=(16,))


@pytest.fixture(autouse=True)
def the_promotion_rules_of_users():
    """The peers are not written for strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# -- what is counted -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [96, 100])
def test_live_pairs_are_those_that_the_mask_allows(name, length):
    shape = dataclasses.replace(SHAPE, length=length)
    case = CASES[name](shape)
    dense = np.asarray(case.mask.dense(length, length))
    every = np.broadcast_to(dense, (shape.batch, 1, length, length))
    assert case.pairs * shape.batch == every.sum()
    assert np.all(every.any(-1))  # peers answer otherwise for rows without a key


def test_operations_are_two_products_forward_and_five_backward():
    case = CASES["dense"](Shape(3, 10, 5, 7))
    one_product = 2 * 3 * 5 * 10 * 10 * 7
    assert case.flops("forward") == 2 * one_product
    assert case.flops("backward") == 5 * one_product
    causal = CASES["causal"](Shape(3, 10, 5, 7))
    assert causal.flops("forward") == pytest.approx(2 * one_product * 0.55)


def test_sparse_cases_keep_their_share_of_the_tiles():
    shape = Shape(1, 4096, 1, 8)
    shares = [CASES[name](shape).pairs / 4096**2 for name in chosen("sparse")]
    np.testing.assert_allclose(shares, [1.0, 0.5, 0.25, 0.1, 0.05], atol=0.02)


def test_a_name_stands_for_a_case_or_for_all_that_begin_with_it():
    assert chosen("soft cap") == ["soft cap"]
    assert len(chosen("sparse")) == 5
    with pytest.raises(ValueError, match="case: 'speed' is none of dense, causal"):
        chosen("speed")


# -- who is compared -------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", flash.PASSES)
@pytest.mark.parametrize("name", [n for n in CASES if n not in LIKE_OTHERS])
def test_all_who_take_a_case_agree_on_it(name, passes):
    case = CASES[name](SHAPE)
    inputs = arguments(SHAPE, jnp.float32)
    want = reference(case, passes, inputs)
    took = []
    for who, make in peers.subjects()[0].items():
        found = candidate(make, case, passes, inputs, want, jnp.float32)
        assert not found.wrong, f"{who}: {found.error}"
        took += [who] if found.call is not None else []
    assert f"{OURS}blockwise" in took
    assert ("jax.nn xla" in took) == (name not in ("soft cap", "sigmoid"))


def test_those_who_cannot_run_here_are_told_with_the_reason():
    makers, absent = peers.subjects()
    assert {f"{OURS}reference", f"{OURS}blockwise", f"{OURS}xla", "jax.nn xla"} <= set(makers)
    if peers.platform() == "cpu":
        assert not {f"{OURS}{name}" for name in peers.KERNELS} & set(makers)
        assert any("cudnn" in line and "GPU" in line for line in absent)
        assert any("splash" in line and "TPU" in line for line in absent)


@pytest.mark.parametrize("name", ["dense", "causal", "packed"])
def test_gpu_and_tpu_peers_are_told_the_case(name):
    """They are not run here, only asked; a wrong argument would show."""
    case = CASES[name](Shape(1, 256, 2, 128))
    for make in (peers.pallas_mha, peers.splash, peers.pallas_flash):
        subject = make(case, jnp.bfloat16)
        assert (subject.extra is None) == (name != "packed") or make is peers.pallas_flash


def test_peers_refuse_what_they_have_no_words_for():
    shape = Shape(1, 256, 2, 128)
    for make, name, words in [
        (peers.pallas_mha, "window", "causal masks and segments only"),
        (peers.pallas_mha, "alibi", "plain softmax only"),
        (peers.pallas_hopper, "packed", "no mask or a causal one only"),
        (peers.splash, "alibi", "adds nothing to scores"),
        (peers.splash, "sigmoid", "softmax only"),
        (peers.pallas_flash, "soft cap", "no soft cap"),
        (peers.jax_nn("xla"), "soft cap", "no soft cap"),
    ]:
        with pytest.raises(NotImplementedError, match=words):
            make(CASES[name](shape), jnp.bfloat16)


# -- nothing wrong is timed ------------------------------------------------------------------------


def altered(by):
    def make(case, dtype):
        good = peers.ours("reference")(case, dtype)
        return Subject(lambda q, k, v, extra: by(good.function(q, k, v, extra)), good.extra)

    return make


def broken(case, dtype):
    raise RuntimeError("no [device] for\n this")


MAKERS = {
    f"{OURS}reference": peers.ours("reference"),
    f"{OURS}xla": altered(lambda x: x * 1.001),
    "peer": altered(lambda x: x),
    "wrong": altered(lambda x: x.at[0, 3].multiply(1.01)),
    "nan": altered(lambda x: x.at[0, 0, 0, 0].set(jnp.nan)),
    "broken": broken,
}


@pytest.mark.parametrize("passes", flash.PASSES)
def test_rows_of_a_group(passes):
    case = CASES["alibi"](SHAPE)
    given = dataclasses.replace(SMALL, plain=True)
    rows = {row.cells["who"]: row for row in flash.measure(case, passes, MAKERS, given)}
    assert list(rows) == list(MAKERS)
    for name in (f"{OURS}reference", "peer"):
        cells = rows[name].cells
        assert float(cells["ms"]) > 0
        assert rows[name].passed is None
        median = float(np.median(rows[name].detail["seconds"]))
        speed = case.flops(passes) / median
        assert float(cells["TFLOP/s"]) == pytest.approx(speed / 1e12, rel=0.01)
        share = 100 * speed / rows[name].detail["matmul"]
        assert float(cells["of matmul"].split()[0]) == pytest.approx(share, abs=0.51)
    assert rows["peer"].cells["÷ best"] == "best"
    assert float(rows[f"{OURS}reference"].cells["÷ best"]) > 0
    assert float(rows[f"{OURS}reference"].cells["÷ plain"]) > 0
    for name in (f"{OURS}xla", "wrong", "nan", "broken"):
        assert "ms" not in rows[name].cells
    assert "where 1e-04 is allowed" in rows[f"{OURS}xla"].cells["note"].replace("2e-04", "1e-04")
    if passes == "forward":
        assert "off by inf" in rows["nan"].cells["note"]
    assert rows["broken"].cells["note"] == "RuntimeError: no [device] for this"
    # That a peer errs is not our failure; that we do is.
    assert rows[f"{OURS}xla"].passed is False
    assert rows["wrong"].passed is None


def test_a_refusal_is_no_failure_and_what_does_not_fit_is_not_run(monkeypatch):
    case, inputs = CASES["sigmoid"](SHAPE), arguments(SHAPE, jnp.float32)
    want = reference(case, "forward", inputs)
    found = candidate(peers.ours("xla"), case, "forward", inputs, want, jnp.float32)
    assert (found.call, found.wrong) == (None, False)
    assert found.error == "normalizes by softmax only, not by Sigmoid"
    monkeypatch.setattr("attnlab.bench.flash_candidates.memory", lambda: 1000)
    found = candidate(peers.ours("reference"), case, "forward", inputs, want, jnp.float32)
    assert found.error.startswith("would take")


def test_arrays_that_do_not_fit_are_not_made(monkeypatch):
    monkeypatch.setattr(peers, "memory", lambda: 1000)
    for name, words in (("alibi", "its bias alone"), ("array", "its mask alone")):
        with pytest.raises(MemoryError, match=words):
            peers.jax_nn("xla")(CASES[name](SHAPE), jnp.float32)


def test_difference_is_relative_to_the_largest_entry_of_each_array():
    got, want = (jnp.ones(3), jnp.full(2, 90.0)), (jnp.ones(3), jnp.full(2, 100.0))
    assert float(difference(got, want)) == pytest.approx(0.1)
    for length in (3, 4096):
        for bad in (jnp.nan, jnp.inf):
            assert np.isinf(difference(jnp.ones(length).at[2].set(bad), jnp.ones(length)))


def test_backward_alone_are_the_gradients_from_what_was_kept():
    case, inputs = CASES["causal"](SHAPE), arguments(SHAPE, jnp.float32)
    call, size = prepare(peers.ours("reference")(case, jnp.float32), "backward", inputs)
    assert float(difference(call(), reference(case, "backward", inputs))) < 1e-5
    assert [x.shape for x in call()] == [(2, 96, 2, 16)] * 3
    assert size >= 3 * inputs[0].nbytes  # query, key and value are kept at least


def times(**seconds):
    return Timing({name.replace("_", " "): (value,) for name, value in seconds.items()})


def test_what_is_asked_of_the_fastest_kernel():
    causal = CASES["causal"](Shape(1, 8192, 16, 128))
    for ours, passed in ((1.04, True), (1.06, False)):
        timing = times(attnlab_triton=ours, jax_nn_cudnn=1.0)
        timing = Timing({"jax.nn cudnn" if "jax" in k else k: v for k, v in timing.seconds.items()})
        found = flash._verdict(causal, "forward", "attnlab triton", timing, None)
        assert found == ("÷ cudnn ≤ 1.05", passed)
    sigmoid = CASES["sigmoid"](SHAPE)
    assert flash._verdict(sigmoid, "forward", "attnlab triton", times(), 0.83)[1] is True
    assert flash._verdict(sigmoid, "forward", "attnlab triton", times(), 1.02)[1] is False
    assert flash._verdict(CASES["dense"](SHAPE), "forward", "x", times(), None) == ("", None)


def test_several_calls_are_awaited_at_once_and_divided_out(monkeypatch):
    made = {"slow": [], "fast": []}
    given = dataclasses.replace(SMALL, call_for=0.02)
    monkeypatch.setattr(
        flash, "time_in_turn", lambda calls, **_: [call() for call in calls.values()] and TIMED
    )
    ready = {
        name: flash.Candidate(lambda name=name: made[name].append(1) or jnp.zeros(()))
        for name in made
    }
    timing = flash._time(ready, given)
    assert len(made["slow"]) == 1 + 2  # once to see how long it takes, then 20 ms of them
    assert len(made["fast"]) == 1 + 20
    assert timing.seconds == {"slow": (0.005,), "fast": (0.00005,)}


TIMED = Timing({"slow": (0.01,), "fast": (0.001,), "none": (1.0,)})
TIMED = Timing({name: TIMED.seconds[name] for name in ("slow", "fast")})


# -- for a TPU that is not there -------------------------------------------------------------------


def test_the_roof_is_the_slower_of_products_and_bytes():
    case = CASES["causal"](Shape(2, 100, 4, 8))
    pairs, array = 2 * 4 * 5050, 2 * 2 * 100 * 4 * 8
    assert flash_compiled.work(case, "forward") == (2 * 2 * 8 * pairs, 4 * array)
    assert flash_compiled.work(case, "with gradients") == (7 * 2 * 8 * pairs, 7 * array)
    assert flash_compiled.bound("v5e", 197e12, 1.0) == (1.0, "compute")
    assert flash_compiled.bound("v5e", 197e12, 1638e9) == (2.0, "memory")


@pytest.mark.skipif(tpu_missing() is not None, reason="libtpu is not installed")
def test_what_the_tpu_compiler_says():
    case = CASES["causal"](Shape(1, 256, 1, 128))
    row = flash_compiled.measure(case, "forward", "splash", "v5e")
    assert "note" not in row.cells
    assert "ms" not in row.cells
    assert float(row.cells["VMEM KB"].replace(",", "")) > 100
    assert int(row.cells["bundles"].replace(",", "")) > 100
    assert row.detail["memory"]["output"] == 256 * 128 * 2


def test_what_is_refused_is_told_and_no_large_array_is_made():
    case = CASES["alibi"](Shape(4, 65536, 16, 128))
    (bias, _ids) = flash_compiled.abstract("pallas flash", CASES["alibi"](SHAPE)).extra
    assert isinstance(bias, jax.ShapeDtypeStruct)
    row = flash_compiled.measure(case, "forward", "splash", "v5e")
    assert row.cells["note"] == "adds nothing to scores"
    assert "compute" in row.cells["ms ≥"]


# -- the command -----------------------------------------------------------------------------------


def test_the_table_names_the_machine_and_is_saved(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(flash, "settings", lambda quick: SMALL)
    made = flash.run(save=tmp_path, case="causal", lengths=(48,))
    text = capsys.readouterr().out
    assert jax.devices()[0].device_kind in text
    assert made.machine["date"] in text
    assert "not here: " in text
    saved = json.loads((tmp_path / "flash.json").read_text("utf-8"))
    assert {row["cells"]["pass"] for row in saved["rows"]} == set(flash.PASSES)
    assert all(row["cells"]["B·T·N·H"] == "1·48·8·16" for row in saved["rows"])


def test_lengths_and_widths_apply_to_every_case():
    cases = list(flash.groups(SMALL, ["causal", "alibi"], (32, 48), (8,)))
    assert [(c.name, c.shape.length, c.shape.width) for c in cases] == [
        ("causal", 32, 8), ("causal", 48, 8), ("alibi", 32, 8), ("alibi", 48, 8)
    ]  # fmt: skip
    assert all(isinstance(case, Case) for case in cases)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("bench flash --case speed", "'speed' is none of dense"),
        ("bench flash --lengths many", "--lengths: expected numbers like 1024,4096, got 'many'"),
        ("bench flash --lengths 0", "expected positive ints"),
        ("bench memory --case alibi", "--case: is for bench flash only"),
        ("bench --compile-for v5e", "--compile-for: is for bench flash only"),
        ("bench flash --compile-for v9", "v9"),
    ],
)
def test_mistakes_are_told_in_one_line(options, words):
    found = CliRunner().invoke(app, options.split())
    assert found.exit_code == 2
    assert words in " ".join(found.output.split())
