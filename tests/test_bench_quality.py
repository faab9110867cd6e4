"""The league table and the table of claims: equal sizes, kept rows, refusals with reasons."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import atlas
from attnlab.bench import claims, claims_tasks, claims_text, quality, trials
from attnlab.bench.claims_text import RotaryMoH, RotaryReweighting
from attnlab.bench.harness import MismatchError, Result, Row
from attnlab.bench.kept import Measure, measure_missing
from attnlab.bench.train import count_parameters
from attnlab.bench.trial_sizes import Finding, Size, spread
from attnlab.bench.trials import Trial, answers, matching_width, score, validation_loss
from attnlab.core.masks import Causal
from attnlab.core.rotary import rotate
from attnlab.distributed.star_attention import StarMask
from attnlab.models.language_model import CAUSAL_SELF
from attnlab.tasks import FlipFlop, Passkey
from attnlab.training import TrainConfig

TINY = dataclasses.replace(quality.QUICK, steps=2)


@pytest.fixture(autouse=True)
def the_promotion_rules_of_users():
    """Optax is not written for strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# -- rows that are kept ----------------------------------------------------------------------------


class Bench:
    """Rows "a", "b" and "c"; `asked` lists those that were measured."""

    def __init__(self, folder, **settings):
        self.folder, self.settings, self.asked = folder, settings, []

    def row(self, key):
        if key == getattr(self, "breaks", None):
            raise KeyboardInterrupt
        self.asked.append(key)
        return Row({"name": key}, detail={"order": -ord(key)})

    def run(self, **options):
        measures = {
            key: Measure(lambda key=key: self.row(key), {"steps": 3, **self.settings})
            for key in "abc"
        }
        del self.asked[:]
        return measure_missing("sample", measures, self.arrange, save=self.folder, **options)

    @staticmethod
    def arrange(rows):
        return Result("sample", "A title", tuple(sorted(rows, key=lambda r: r.detail["order"])))


def names(result):
    return [row.cells["name"] for row in result.rows]


def test_rows_once_measured_are_kept_and_arranged_anew(tmp_path):
    bench = Bench(tmp_path)
    assert names(bench.run(only=("c", "a"))) == ["c", "a"]
    assert bench.asked == ["c", "a"]
    assert names(bench.run()) == ["c", "b", "a"]
    assert bench.asked == ["b"]
    bench.run()
    assert bench.asked == []
    saved = json.loads((tmp_path / "sample.json").read_text("utf-8"))
    assert [row["detail"]["key"] for row in saved["rows"]] == ["c", "b", "a"]
    assert saved["rows"][0]["detail"]["machine"]["jax"] == saved["machine"]["jax"]


def test_a_run_that_is_cut_off_leaves_what_it_measured(tmp_path):
    bench = Bench(tmp_path)
    bench.breaks = "b"
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert [f.name for f in tmp_path.iterdir()] == ["sample.json"]
    bench.breaks = None
    bench.run()
    assert bench.asked == ["b", "c"]


def test_fresh_measures_again_what_is_named_or_all(tmp_path):
    bench = Bench(tmp_path)
    bench.run()
    assert names(bench.run(fresh=True, only=("b",))) == ["c", "b", "a"]
    assert bench.asked == ["b"]
    bench.run(fresh=True)
    assert bench.asked == ["a", "b", "c"]


def test_without_a_folder_nothing_is_kept(tmp_path):
    bench = Bench(None)
    for _ in range(2):
        bench.run()
        assert bench.asked == ["a", "b", "c"]


def test_rows_of_other_settings_are_neither_mixed_with_nor_lost(tmp_path):
    Bench(tmp_path).run()
    before = (tmp_path / "sample.json").read_text("utf-8")
    other = Bench(tmp_path, steps=4)
    with pytest.raises(
        ValueError, match=r"sample\.json has . with other settings \(steps 3, not 4"
    ):
        other.run()
    assert (tmp_path / "sample.json").read_text("utf-8") == before
    other.run(fresh=True)
    assert other.asked == ["a", "b", "c"]


def test_an_unknown_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match="only: d, e is none of a, b, c"):
        Bench(tmp_path).run(only=("d", "a", "e"))


def test_rows_of_another_machine_are_told(tmp_path):
    bench = Bench(tmp_path)
    bench.run()
    file = tmp_path / "sample.json"
    record = json.loads(file.read_text("utf-8"))
    record["rows"][1]["detail"]["machine"] |= {"cores": 99, "date": "1999-01-01"}
    file.write_text(json.dumps(record), "utf-8")
    result = bench.run()
    assert result.notes == ("Of the rows, 1 measured with cores 99, date 1999-01-01.",)
    assert result.machine["cores"] != 99


# -- models of one size ----------------------------------------------------------------------------


CAUSAL = [id for id, entry in atlas.entries().items() if CAUSAL_SELF in entry.patterns]


@pytest.mark.parametrize("id", CAUSAL)
def test_every_causal_entry_can_be_brought_to_the_size_of_the_reference(id):
    budget = dataclasses.replace(quality.FULL, corpus="stdlib")
    wanted = quality.target(budget)
    build = lambda hidden: quality.model(id, budget, hidden)  # noqa: E731
    found = count_parameters(build(matching_width(build, wanted)))
    assert abs(found - wanted) <= 0.02 * wanted


def test_no_width_is_found_for_a_mechanism_larger_than_the_model():
    build = lambda hidden: quality.model("rope", quality.QUICK, hidden)  # noqa: E731
    with pytest.raises(MismatchError, match="no width brings them within 2 %"):
        matching_width(build, count_parameters(build(1)) // 2)


def test_an_entry_of_another_size_has_failed_and_is_listed(monkeypatch):
    monkeypatch.setattr(quality, "matching_width", lambda build, wanted: 1)
    row = quality.measure("rope", TINY)
    assert row.passed is False
    assert "parameters, not" in row.cells["note"]


# -- trials ----------------------------------------------------------------------------------------


def trial(mechanism="rope", steps=60, rate=1e-2):
    size = Size(layers=1, width=16, heads=2, context=8, batch=8, steps=steps, learning_rate=rate)
    task = FlipFlop(0.0)
    build = lambda seed: size.model(mechanism, task.vocab_size, seed)  # noqa: E731
    return Trial(build, answers(task, size.batch, size.context), size.training), task


def test_a_trial_learns_and_repeats_itself_with_one_program():
    made, task = trial()
    first, again, other = (made.train(seed) for seed in (0, 0, 1))
    assert len(made._compiled) == 1
    before, after = (score(m, task, 8)[0] for m in (made.build(0), first))
    assert after < before - 0.3
    states = [jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (first, again, other)]
    assert all(np.array_equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(states[0], states[2], strict=True))


def test_a_seed_decides_the_batches_whatever_the_mechanism():
    keys = [trial(id)[0].start(3)[3] for id in ("rope", "alibi")]
    assert keys[0] == keys[1]
    assert keys[0] != trial()[0].start(4)[3]


def test_a_loss_that_is_not_finite_is_told():
    lesson = trials.Lesson(lambda data, key: None, lambda model, batch, key: jnp.float32(jnp.nan))
    made = Trial(trial()[0].build, lesson, TrainConfig(steps=2, warmup=0))
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan, with seed 5"):
        made.train(5)


def test_validation_reads_the_same_text_at_every_length():
    model = quality.model("rope", TINY, 4)
    batches = {
        n: trials.windows(trials.text("stdlib").validation, batch_size=64 // n, context=n, limit=2)
        for n in (4, 16)
    }
    flat = [
        np.concatenate(list(b[..., :-1].reshape(-1, b.shape[-1] - 1))) for b in batches.values()
    ]
    np.testing.assert_array_equal(*flat)
    loss = validation_loss(model, "stdlib", 4, batch=16, limit=2)
    assert abs(loss - np.log(trials.text("stdlib").vocabulary.size)) < 0.5


# -- the league ------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_listed_with_its_reason(monkeypatch):
    row = quality.measure("linformer", TINY)
    assert row.cells["note"] == "not causal: noncausal self, noncausal cross"
    assert row.passed is None

    def broken(*arguments):
        raise NotImplementedError("whole rows only\nmore")

    monkeypatch.setattr(quality, "Subject", broken)
    assert quality.measure("rope", TINY).cells["note"] == "NotImplementedError: whole rows only"


def test_a_row_tells_loss_time_memory_and_parameters_and_the_best_stands_first(tmp_path):
    result = quality.run(save=tmp_path, quick=True, only=("multi-head-attention", "linformer"))
    first, last = result.rows
    assert first.cells["mechanism"] == "Multi-head and grouped-query attention"
    assert first.cells["note"] == "no positions"
    for column in ("loss", "ms/step", "time ÷ rope", "MB", "parameters", "MLP"):
        assert first.cells[column]
        assert column not in last.cells
    assert first.detail["bytes"] > 0
    assert len(first.detail["losses"]) == 1
    rows = [Row({}, detail={"losses": [x]}) for x in (2.0, 1.0)]
    assert quality.arrange([last, *rows], TINY).rows == (rows[1], rows[0], last)


def test_every_entry_is_a_row():
    assert set(quality.mechanisms()) == set(atlas.entries())
    assert quality.mechanisms()[0] == quality.REFERENCE


# -- claims ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agrees", "words"),
    [
        ((True, True), "holds here"),
        ((False, False), "does not hold here"),
        ((True, False, False), "1 of 3 seeds"),
    ],
)
def test_a_claim_holds_where_every_seed_agrees(agrees, words):
    assert claims.verdict(Finding("", agrees, {})) == words


def test_a_spread_is_the_mean_and_the_range():
    assert spread([1.0, 3.0]) == "2.000 (1.000 to 3.000)"
    assert spread([0.5], ".1f") == "0.5"


def test_energy_gates_of_the_window_leak_and_those_of_keys_seen_do_not():
    row = claims.measure(claims.CLAIMS["energy-leak"], Size().small())
    assert row.cells["verdict"] == "holds here"
    assert row.detail["seen"] == [0.0]
    assert row.detail["window"][0] > 1e-5


def test_rotation_is_put_before_a_mechanism(keys):
    query, key, value, x = (
        jax.random.normal(k, (1, 6, 2, 4)) for k in keys("query", "key", "value", "x")
    )
    made = RotaryReweighting()
    plain = super(claims_text.Rotary, made).__call__
    wanted = plain(rotate(query), rotate(key), value, mask=Causal())
    np.testing.assert_allclose(made(query, key, value, mask=Causal()), wanted, rtol=1e-6)
    mixed = RotaryMoH(8, 2, num_shared=1, num_active=1, rngs=nnx.Rngs(0))
    assert mixed.gates(x.reshape(1, 6, 8)).shape == (1, 6, 2)


def test_full_sizes_are_asked_for_and_stay_in_the_record(tmp_path, monkeypatch):
    tried = []

    def attempt(size):
        tried.append(size.layers)
        return Finding("nothing", (True,), {})

    one = dataclasses.replace(claims.CLAIMS["energy-gain"], attempt=attempt)
    full = dataclasses.replace(one, size=Size(layers=6))
    monkeypatch.setattr(claims, "CLAIMS", {"gain": one})
    monkeypatch.setattr(claims, "FULL", {"gain-full": full})
    assert len(claims.run(save=tmp_path).rows) == 1
    assert len(claims.run(save=tmp_path, full=True).rows) == 2
    assert len(claims.run(save=tmp_path).rows) == 2
    assert tried == [2, 6]


def test_the_paper_s_energy_gated_model_has_as_many_parameters_as_it_says():
    size = claims.FULL["energy-gain-full"].size
    made = nnx.eval_shape(lambda: size.model(claims_text.gated(size, "seen"), 65, 0))
    assert abs(count_parameters(made) / 4.8e6 - 1) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", claims.CLAIMS)
def test_every_claim_can_be_tried(name, monkeypatch):
    monkeypatch.setattr(claims_tasks, "GAMMAS", (0.0, 1.0))
    monkeypatch.setattr(claims_tasks, "DEPTHS", (1, 2))
    row = claims.measure(claims.CLAIMS[name], claims.CLAIMS[name].size.small())
    assert row.cells["seeds"] == 1
    assert "nan" not in row.cells["ours"]
    json.dumps(dict(row.detail))


def test_a_key_is_cut_where_a_border_lies_within_it_that_no_anchor_bridges(keys):
    task, block, length = Passkey(digits=3), 8, 40
    starts = np.arange(length - task.shortest + 1)
    depth = jnp.asarray(starts / starts.max(), jnp.float32)
    rows = task.rows(keys("rows"), len(starts), length, depth=depth)
    found = claims_tasks.cut_by_a_border(task, rows, block)
    sees = StarMask(block).dense(length, length).reshape(length, length)
    for start, cut in zip(starts, found, strict=True):
        key = slice(start, start + task.digits + 1)
        assert cut == (not sees[key, key][np.tril_indices(4)].all()), start
