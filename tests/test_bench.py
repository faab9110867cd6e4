import importlib
import io
import itertools
import json
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from attnlab.bench import (
    BENCHMARKS,
    claims,
    distributed,
    linear,
    memory,
    quality,
    recall,
    subjects,
    train,
    window,
)
from attnlab.bench import time as bench_time
from attnlab.bench.__main__ import main
from attnlab.bench.harness import (
    MismatchError,
    Ratio,
    Result,
    Row,
    check_same,
    compare,
    time_in_turn,
)
from attnlab.core.masks import Causal, SlidingWindow


@pytest.fixture(autouse=True)
def the_promotion_rules_of_users():
    """The peers (Flax, jax.nn, optax) are not written for strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class FakeClock:
    """A clock that moves only when a candidate runs."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def candidate(self, name, *costs):
        endless = itertools.cycle(costs)

        def run():
            self.calls.append(name)
            self.now += next(endless)
            return jnp.zeros(())

        return run


# -- timing ----------------------------------------------------------------------------------------


def test_candidates_run_in_turn_after_a_warm_up():
    clock = FakeClock()
    candidates = {"a": clock.candidate("a", 1.0), "b": clock.candidate("b", 2.0)}
    timing = time_in_turn(candidates, rounds=(4, 4), clock=clock)
    assert clock.calls == ["a", "b", *"abba", *"abba"]
    assert timing.seconds == {"a": (1.0,) * 4, "b": (2.0,) * 4}


def test_a_slow_first_call_is_not_counted():
    clock = FakeClock()
    timing = time_in_turn(
        {"a": clock.candidate("a", 9.0, 1.0, 1.0, 1.0)}, rounds=(3, 3), clock=clock
    )
    assert timing.median("a") == 1.0


def test_drift_of_the_machine_cancels_in_the_ratio_of_rounds():
    clock = FakeClock()
    load = [1.0, 1.0, 5.0, 25.0]
    candidates = {
        "a": clock.candidate("a", *(2 * x for x in load)),
        "b": clock.candidate("b", *load),
    }
    ratio = time_in_turn(candidates, rounds=(3, 3), clock=clock).ratio("a", "b")
    assert ratio == Ratio(2.0, 2.0, 2.0)


def test_the_ratio_shows_its_spread():
    clock = FakeClock()
    candidates = {
        "a": clock.candidate("a", 1.0, 1.0, 2.0, 3.0),
        "b": clock.candidate("b", 1.0),
    }
    ratio = time_in_turn(candidates, rounds=(3, 3), clock=clock).ratio("a", "b")
    assert ratio == Ratio(2.0, 1.0, 3.0)
    assert str(ratio) == "2.00 (1.00–3.00)"


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 2), (5.0, 5), (1e9, 7)])
def test_rounds_fill_the_seconds_within_bounds(seconds, expected):
    clock = FakeClock()
    timing = time_in_turn(
        {"a": clock.candidate("a", 1.0)}, seconds=seconds, rounds=(2, 7), clock=clock
    )
    assert len(timing.seconds["a"]) == expected


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="candidates"):
        time_in_turn({})
    with pytest.raises(ValueError, match="rounds"):
        time_in_turn({"a": lambda: 0}, rounds=(3, 2))


# -- same output first -----------------------------------------------------------------------------


def test_no_time_is_taken_when_outputs_differ():
    clock = FakeClock()
    candidates = {
        "right": lambda: jnp.ones(3),
        "wrong": lambda: jnp.ones(3).at[1].set(1.01),
    }
    with pytest.raises(MismatchError, match=r"wrong: off by 1\.0e-02"):
        compare(candidates, tolerance=1e-3, clock=clock)
    assert compare(candidates, tolerance=0.1, rounds=(1, 1)).seconds.keys() == candidates.keys()


@pytest.mark.parametrize(
    "output",
    [np.full(3, np.nan), np.ones(4), (np.ones(3), np.ones(3))],
    ids=["NaN", "shape", "structure"],
)
def test_an_output_of_another_kind_is_a_mismatch(output):
    with pytest.raises(MismatchError, match="odd"):
        check_same({"odd": output}, np.ones(3), 1.0)


def test_the_error_is_relative_to_the_largest_entry():
    error = check_same({"a": np.array([100.0, 0.1])}, np.array([100.0, 0.0]), 1e-2)
    assert error == pytest.approx(1e-3)


def test_time_reports_no_speed_for_a_wrong_form(monkeypatch):
    forms = subjects.attentions()
    wrong = {**forms, subjects.OURS: lambda *x: 1.1 * forms[subjects.OURS](*x)}
    monkeypatch.setattr(bench_time, "attentions", lambda causal: wrong)
    row = bench_time.measure("forward", False, 1, 64, 0.01)
    assert row.passed is False
    assert "not timed" in row.cells["ms"]
    assert not row.detail


def test_window_is_checked_against_the_formula(monkeypatch):
    monkeypatch.setattr(window, "TOLERANCE", -1.0)
    with pytest.raises(MismatchError):
        window.check(SlidingWindow(3), subjects.inputs(64, 1), lambda f: f)


def trained(*losses):
    trainer = object.__new__(train.Trainer)
    trainer.losses = list(losses)
    return trainer


@pytest.mark.parametrize(("last", "fits"), [(2.01, True), (2.5, False)])
def test_losses_must_stay_together(last, fits):
    trainers = {"attnlab": trained(4.0, 3.9, 3.0, last), "flax": trained(4.0, 3.9, 3.0, 2.0)}
    with nullcontext() if fits else pytest.raises(MismatchError):
        train.check_losses(trainers, 2)


# -- results ---------------------------------------------------------------------------------------


def result(*verdicts):
    rows = tuple(Row({"n": i, "×": Ratio(1.0, 0.5, 2.0)}, "≤ 1", v) for i, v in enumerate(verdicts))
    return Result("sample", "A title", rows, ("a note",))


@pytest.mark.parametrize(
    ("verdicts", "passed"), [((True, None), True), ((True, False), False), ((None,), None)]
)
def test_a_result_passes_when_every_target_is_met(verdicts, passed):
    assert result(*verdicts).passed is passed


def test_the_table_shows_machine_ratios_targets_and_marks():
    text = io.StringIO()
    result(True, False).show(Console(file=text, width=120))
    for piece in (
        "jax " + jax.__version__,
        "cores",
        "A title",
        "1.00 (0.50–2.00)",
        "≤ 1",
        "✓",
        "✗",
    ):
        assert piece in text.getvalue()
    assert text.getvalue().index("cores") < text.getvalue().index("A title")
    assert "a note" in text.getvalue()


def test_a_saved_result_can_be_read_back(tmp_path):
    file = result(True).save(tmp_path / "new")
    assert file == tmp_path / "new" / "sample.json"
    read = json.loads(file.read_text("utf-8"))
    assert read["passed"] is True
    assert read["rows"][0]["cells"]["×"] == {"median": 1.0, "low": 0.5, "high": 2.0}
    assert read["machine"]["jax"] == jax.__version__
    assert result(True).save(tmp_path / "other.json") == tmp_path / "other.json"


# -- memory: deterministic, so asserted ------------------------------------------------------------


def device(place):
    found, notes = memory.devices()
    if place not in found:
        pytest.skip(notes[0])
    return found[place]


@pytest.mark.parametrize("place", ["CPU", "TPU v5p"])
@pytest.mark.parametrize("passes", ["forward", "gradients"])
def test_blockwise_takes_the_papers_share_of_memory(place, passes):
    where = device(place)
    ours = memory.measure(subjects.OURS, passes, memory.AT, where)
    peer = memory.measure(subjects.FORMULA, passes, memory.AT, where)
    assert peer >= memory.PASSES[passes] * ours


@pytest.mark.parametrize("place", ["CPU", "TPU v5p"])
@pytest.mark.parametrize("passes", ["forward", "gradients"])
def test_memory_grows_linearly_from_2k_to_64k(place, passes):
    where, lengths = device(place), (2048, 16384, 65536)
    sizes = [memory.measure(subjects.OURS, passes, n, where) for n in lengths]
    assert memory.growth(lengths, sizes) <= memory.GROWTH
    assert sizes[-1] <= 32 * sizes[0]


def test_growth_is_the_exponent():
    assert memory.growth((2, 4, 8), (12, 48, 192)) == pytest.approx(2.0)


def test_a_compiler_that_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    found, notes = memory.devices()
    assert list(found) == ["CPU"]
    assert "libtpu" in notes[0]


# -- the benchmarks run, on small sizes ------------------------------------------------------------


def test_formula_is_what_the_library_computes():
    query, key, value, _ = subjects.inputs(64, 2)
    for causal in (False, True):
        forms = subjects.attentions(causal=causal)
        want = forms[subjects.LIBRARY](query, key, value)
        outputs = {name: form(query, key, value) for name, form in forms.items()}
        assert check_same(outputs, want, 1e-5) <= 1e-5


def test_both_models_have_the_same_parameters_and_losses():
    sizes = {"layers": 1, "width": 16, "heads": 2, "context": 16, "batch": 2}
    trainers = train.make(sizes, 2, 2)
    losses = {name: trainer.advance() for name, trainer in trainers.items()}
    check_same(losses, losses["flax"], 1e-4)


def test_window_tiles_are_a_band():
    assert window.tiles(Causal(), 1024) == "36 of 64"
    assert window.tiles(SlidingWindow(255), 1024) == "21 of 64"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench_time, "QUICK", (64,))
    monkeypatch.setattr(window, "QUICK", 512)
    monkeypatch.setattr(memory, "QUICK", (256, 1024))
    monkeypatch.setattr(memory, "tpu_device", no_tpu)
    monkeypatch.setattr(linear, "QUICK", (64, 128))
    monkeypatch.setattr(recall, "QUICK", 3)
    monkeypatch.setattr(recall, "mechanisms", lambda: ["retnet", "deltanet"])
    monkeypatch.setattr(distributed, "METHODS", distributed.METHODS[2:])
    monkeypatch.setattr(quality, "SOME", ("rope", "linformer"))
    monkeypatch.setattr(claims, "CLAIMS", {"energy-leak": claims.CLAIMS["energy-leak"]})


def no_tpu():
    raise NotImplementedError("it is left out of this test")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_quick_modes_run_and_save(name, small, tmp_path, capsys):
    made = importlib.import_module(f"attnlab.bench.{name}").run(save=tmp_path, quick=True)
    assert made.rows
    assert "not timed" not in capsys.readouterr().out
    assert json.loads((tmp_path / f"{name}.json").read_text("utf-8"))["name"] == name


def test_the_command_line_names_the_choices(small, capsys):
    assert main(["memory", "--quick"]) in (0, 1)
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "'memory', 'time', 'window', 'train'" in capsys.readouterr().err
