"""`attnlab.testing`: what is sound passes; every planted defect is caught by its own finding."""

import doctest
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnlab
from attnlab import masks, normalizers, scores, testing
from attnlab.core.terms import leaf, static
from attnlab.testing.masks import true_plan

ALONE = {"implementations": []}  # the term by itself
FAST = {"implementations": ["reference"]}


def caught(report, name, *words):
    """The finding `name` failed, and says `words`."""
    failed = [f for f in report.failed if f.name == name]
    assert failed, f"{name} not caught:\n{report}"
    text = " ".join(f"{f.subject} {f.message}" for f in failed)
    for word in words:
        assert word in text, f"{word!r} not said:\n{report}"
    with pytest.raises(AssertionError, match="FAILED"):
        report.raise_if_failed()


# ---- what is sound -------------------------------------------------------------------------------

RNG = np.random.default_rng(5)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def decay(score, at, params):
    distance = jnp.abs(at.relative).astype(score.dtype)
    return score * params["gain"] - jnp.log1p(jnp.square(params["rate"]) * distance)


SOUND = {
    "bias": scores.Bias(normal(2, 2, 7, 9)),
    "bias of keys": scores.Bias(normal(1, 1, 9)),
    "slopes": scores.AlibiSlopes(scores.alibi_slopes(4)),
    "table": scores.RelativeBias(normal(4, 8), bidirectional=True, max_distance=12),
    "cap": scores.SoftCap(30.0),
    "temperature": scores.Temperature(jnp.exp(normal(3, 1, 1))),
    "function": scores.ScoreFunction(
        decay, {"gain": jnp.asarray(0.8), "rate": normal(4)}, ("", "N")
    ),
    "function without arrays": scores.ScoreFunction(lambda s, at: s - 0.5 * jnp.square(s)),
    "two in turn": (scores.AlibiSlopes(jnp.ones(2)), scores.SoftCap(jnp.asarray(4.0))),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_modifiers_pass(name):
    report = testing.check_modifier(SOUND[name], **FAST)
    assert report.ok, str(report)
    assert {f.status for f in report.find("agreement")} == {"ok"}
    assert {"query", "key", "value"} <= {f.subject.split(", ")[-1] for f in report.find("gradient")}


def test_sizes_follow_from_the_arrays():
    report = testing.check_modifier(SOUND["bias"], **FAST)
    assert report.sizes.startswith("batch 2, 2 heads sharing 1, 7 queries, 9 keys")
    assert "4 heads" in testing.check_modifier(SOUND["table"], **FAST).sizes


def test_blockwise_and_its_forward_mode_take_part():
    report = testing.check_modifier(
        SOUND["function"], mask=masks.Causal(), implementations=["reference", "blockwise"]
    )
    assert report.ok, str(report)
    assert {f.subject.split(",")[0] for f in report.find("agreement")} == {"reference", "blockwise"}
    assert {f.subject for f in report.find("forward mode")} == {"reference", "blockwise"}
    assert report.plan is not None


@pytest.mark.parametrize("backend", ["triton", "tpu"])
def test_kernels_take_part_interpreted(backend):
    report = testing.check_modifier(
        SOUND["function"], mask=masks.Causal(), implementations=[backend]
    )
    assert report.ok, str(report)
    assert {f.status for f in report.find("agreement")} == {"ok"}
    assert {f.subject.split(",")[0] for f in report.find("masked NaN")} == {backend}
    assert report.find("kernels")[0].status == "ok"


def test_what_no_kernel_takes_is_a_note_that_says_why():
    def looked_up(score, at, table):
        return score + table[at.query % 5].astype(score.dtype)

    report = testing.check_modifier(
        scores.ScoreFunction(looked_up, normal(5)), implementations=["triton"]
    )
    assert report.ok, str(report)
    assert "(5,)" in report.find("kernels")[0].message
    assert report.find("kernels")[0].status == "note"
    assert [f.status for f in report.find("agreement")] == ["skipped"]


def test_a_library_without_gradient_of_the_log_sum_exp_is_asked_for_the_output():
    report = testing.check_modifier(
        SOUND["slopes"], mask=masks.Causal(), implementations=["reference", "xla"]
    )
    assert report.ok, str(report)
    subjects = [f.subject for f in report.find("agreement")]
    assert subjects == ["reference, output", "reference, log-sum-exp", "xla, output"]
    assert "xla" in {f.subject for f in report.find("gradient") if f.status == "ok"}


def test_half_precision_is_checked_within_its_own_rounding():
    report = testing.check_modifier(SOUND["slopes"], dtype=jnp.bfloat16, **FAST)
    assert report.ok, str(report)
    assert "bfloat16" in report.sizes


IDS = np.array([[0, 0, 0, 1, 1, 2, 2, 2, -1, -1], [0, 1, 1, 1, 1, 1, 3, 3, 3, 3]], np.int32)

SOUND_MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(6, 2),
    "prefix": masks.Prefix(7),
    "prefix of data": masks.Prefix(jnp.asarray([3, 9], jnp.int32)),
    "segments": masks.Segments(jnp.asarray(IDS)),
    "padding": masks.KeyPadding(jnp.asarray([3, 0], jnp.int32)),
    "strided": masks.Strided(3),
    "array": masks.ArrayMask(jnp.asarray(RNG.random((2, 1, 9, 11)) < 0.5)),
    "predicate": masks.Predicate(lambda at: (at.query + at.key + at.head) % 3 != 0),
    "predicate with data": masks.Predicate(
        lambda at, p: at.key < p["until"], {"until": jnp.asarray([4, 9], jnp.int32)}, "N"
    ),
    "composed": (masks.Causal() & ~masks.SlidingWindow(3)) | masks.Prefix(2),
    "composed with data": masks.Causal() & masks.Segments(jnp.asarray(IDS)),
    "blocks": masks.Blocks(jnp.asarray([[True, False], [True, True]]), (8, 8)),
}


TRIED = ("segments", "padding", "predicate with data", "composed", "blocks")


@pytest.mark.parametrize("name", SOUND_MASKS)
def test_sound_masks_pass(name):
    tried = FAST if name in TRIED else ALONE
    report = testing.check_mask(SOUND_MASKS[name], block_sizes=(8, 8), **tried)
    assert report.ok, str(report)
    assert report.find("bounds")
    counts = report.plan.counts()
    assert sum(counts.values()) == report.plan.empty.size


def test_a_mask_is_told_apart_by_what_it_shows():
    causal = testing.check_mask(masks.Causal(), implementations=[])
    ahead = testing.check_mask(masks.SlidingWindow(2, 1), implementations=[])
    blind = testing.check_mask(masks.KeyPadding(jnp.asarray([5, 0], jnp.int32)), implementations=[])
    assert causal.find("future")[0].status == "ok"
    assert ahead.find("future")[0].status == "note"
    assert "look ahead" in ahead.find("future")[0].message
    assert ahead.ok
    assert "48 of 96 queries" in blind.find("empty rows")[0].message
    caught(testing.check_mask(masks.SlidingWindow(2, 1), causal=True, implementations=[]), "future")


def test_the_true_plan_counts_pairs():
    allowed = np.tril(np.ones((1, 1, 5, 6), bool))
    plan = true_plan(allowed, (2, 3))
    for i, j in np.ndindex(plan.empty.shape):
        part = allowed[0, 0, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
        assert plan.empty[i, j] == (not part.any())
        assert plan.full[i, j] == part.all()


SOUND_NORMALIZERS = {
    "softmax": normalizers.Softmax(),
    "sink": normalizers.Softmax(normal(4)),
    "plus one": normalizers.SoftmaxPlusOne(),
    "softplus": normalizers.SoftplusL1(),
    "sigmoid": normalizers.Sigmoid(),
    "relu squared": normalizers.ReluSquared(),
    "sparsemax": normalizers.Sparsemax(),
    "entmax": normalizers.Entmax15(),
}


@pytest.mark.parametrize("name", SOUND_NORMALIZERS)
def test_sound_normalizers_pass(name):
    report = testing.check_normalizer(SOUND_NORMALIZERS[name], **FAST)
    assert report.ok, str(report)
    assert report.find("row sums")


# ---- planted defects in modifiers ----------------------------------------------------------------


def planted(fn, params=None, tags="", **options):
    return testing.check_modifier(scores.ScoreFunction(fn, params, tags), **(ALONE | options))


def test_array_that_does_not_fit_its_tag():
    report = planted(lambda s, at, p: s + p, normal(3), "N", heads=2)
    caught(report, "leaves", ".params", "axis N", "3")


def test_unknown_letter_and_wrong_order_and_number_of_tags():
    caught(planted(lambda s, at, p: s + p, normal(3), "H"), "leaves", "no axis H")
    report = planted(lambda s, at, p: s, normal(3, 2), "T N")
    caught(report, "leaves", "B N T S", "transpose")
    report = planted(lambda s, at, p: s, {"a": normal(2), "b": normal(2)}, ("N",))
    caught(report, "leaves", "1 tags", "2 arrays")


def test_array_indexed_by_another_axis_than_its_tag_names():
    """Tagged per head, but entry 0 is taken for every head."""
    report = planted(lambda s, at, p: s + p.reshape(-1)[0], normal(2), "N")
    caught(report, "leaves", ".params", "another place along N")


def test_untagged_array_aligned_by_its_shape():
    """Works on the whole matrix by broadcasting; a tile gets more than its part."""
    report = planted(lambda s, at, p: s + p.reshape((1,) * (s.ndim - 1) + (-1,)), normal(37))
    caught(report, "tiles", "not on the tile", ".params")
    notes = " ".join(f.message for f in report.find("leaves") if f.status == "note")
    assert 'Tagged "S"' in notes


def test_dependence_on_the_shape_of_a_tile():
    def by_place(score, at):
        return score - 0.1 * jnp.arange(score.shape[-1]).astype(score.dtype).reshape(
            (1,) * (score.ndim - 1) + (-1,)
        )

    caught(planted(by_place), "tiles", "depends on the shape", "at.key")


def test_dependence_on_other_pairs():
    report = planted(lambda s, at: s - jnp.max(s, axis=-1, keepdims=True))
    caught(report, "pairs", "other pairs")
    caught(report, "tiles")


def test_wrong_custom_gradient():
    @jax.custom_jvp
    def square(x):
        return jnp.square(x)

    square.defjvp(lambda primals, tangents: (square(*primals), primals[0] * tangents[0]))
    report = planted(lambda s, at: s + square(s), **FAST)
    caught(report, "derivative", "score", "custom derivative rule")
    caught(report, "gradient", "query")


def test_wrong_custom_gradient_of_an_array():
    @jax.custom_vjp
    def scaled(x, gain):
        return x * gain

    scaled.defvjp(lambda x, g: (x * g, (x, g)), lambda r, d: (d * r[1], -d * r[0]))
    report = planted(
        lambda s, at, p: scaled(s, jnp.broadcast_to(p, s.shape)), jnp.asarray(0.7), **FAST
    )
    caught(report, "derivative", ".params", "custom derivative rule")
    assert not [f for f in report.failed if f.subject == "score"]
    assert "custom_jvp" in report.find("forward mode")[0].message


def test_nothing_arrives_where_a_comparison_stands_in_the_way():
    report = planted(lambda s, at, p: s * jax.lax.stop_gradient(1 + p), jnp.asarray(0.4))
    caught(report, "derivative", ".params", "nothing of it arrives")


def test_wrong_shape_dtype_and_type(as_users_run_it):
    caught(planted(lambda s, at: jnp.concatenate([s, s], -1)), "output", "does not fit")
    caught(planted(lambda s, at: s.astype(jnp.bfloat16)), "output", "bfloat16", "astype")
    caught(planted(lambda s, at: None), "output", "NoneType")


def test_request_of_float64():
    def wide(score, at):
        return (score.astype(jnp.float64) * 2).astype(score.dtype)

    caught(planted(wide), "output", "float64")


def test_python_branch_on_positions():
    report = planted(lambda s, at: s if at.query.reshape(-1)[0] > 3 else s - 1)
    caught(report, "transforms", "jnp.where")


def test_state_and_random_numbers():
    rng = np.random.default_rng(0)
    report = planted(lambda s, at: s + jnp.asarray(rng.standard_normal(), s.dtype))
    caught(report, "transforms", "called twice")


def test_nan_at_masked_pairs_that_reaches_a_gradient():
    def back(score, at, rate):
        return score - rate * jnp.sqrt(-at.relative.astype(score.dtype))

    report = planted(back, jnp.ones(()), mask=masks.Causal())
    caught(report, "masked pairs", "NaN", ".params", "harmless argument")
    assert not [f for f in report.failed if f.name == "extremes"]

    def safe(score, at, rate):
        past = jnp.maximum(-at.relative, 0)
        return score - rate * jnp.sqrt(past.astype(score.dtype))

    assert planted(safe, jnp.ones(()), mask=masks.Causal()).ok


def test_overflow_at_large_scores():
    caught(planted(lambda s, at: jnp.log(jnp.sum(jnp.exp(s)[None], 0))), "extremes", "10000")
    caught(planted(lambda s, at: s + jnp.sqrt(jnp.abs(s))), "extremes", "score of 0")


def test_claim_to_be_additive_that_does_not_hold():
    class Loud(scores.ScoreModifier):
        additive = True
        gain: jax.Array = leaf("N")

        def __call__(self, score, at):
            return score * self.gain

    caught(testing.check_modifier(Loud(jnp.full(2, 1.5)), **ALONE), "additive", "additive = True")


def test_field_that_cannot_be_hashed():
    class Listed(scores.ScoreModifier):
        steps: list = static()

        def __call__(self, score, at):
            return score * self.steps[0]

    caught(testing.check_modifier(Listed([1.0]), **ALONE), "static", "tuple")


def test_float32_that_cannot_hold_the_formula():
    report = planted(lambda s, at: jnp.sin(3e5 * s))
    caught(report, "precision", "cannot hold")


def test_what_is_worth_knowing_is_a_note():
    report = planted(lambda s, at: jnp.where(at.relative <= 0, s, -jnp.inf), **FAST)
    assert report.ok, str(report)
    assert "Mask" in next(f for f in report.find("extremes") if f.status == "note").message

    def single(score, at):
        return score - jnp.sin(at.relative.astype(jnp.float32)).astype(score.dtype)

    assert "float32" in planted(single).find("precision")[0].message


def test_an_exception_of_the_users_code_is_a_finding():
    def broken(score, at):
        raise KeyError("slope")

    caught(planted(broken), "output", "KeyError", "slope")


# ---- planted defects in masks --------------------------------------------------------------------


class Lying(masks.Mask):
    """Causal, with bounds that are off by some positions."""

    some_by: int = static(default=0)
    every_by: int = static(default=0)
    exact: bool = static(default=False)

    def allowed(self, at):
        return at.relative <= 0

    def bounds(self, span):
        return (
            span.key_first <= span.query_last - self.some_by,
            span.key_last <= span.query_first + self.every_by,
        )

    @property
    def exact_bounds(self):
        return self.exact


def test_bounds_that_lie():
    only = {"implementations": []}
    assert testing.check_mask(Lying(), **only).ok
    caught(testing.check_mask(Lying(some_by=1), **only), "bounds", "called empty", "is allowed")
    report = testing.check_mask(Lying(every_by=1), block_sizes=(2, 4), **only)
    caught(report, "bounds", "called full", "is hidden", "queries")
    caught(report, "plan")
    caught(testing.check_mask(Lying(some_by=-1, exact=True), **only), "bounds", "exact_bounds")


def test_bounds_of_data_that_lie():
    class Behind(masks.KeyPadding):
        def data_bounds(self, span):
            some, _ = super().data_bounds(span)
            return some, some

    report = testing.check_mask(Behind(jnp.asarray([5], jnp.int32)))
    caught(report, "bounds", "data_bounds", "full")


def test_mask_that_returns_numbers(as_users_run_it):
    report = testing.check_mask(
        masks.Predicate(lambda at: jnp.where(at.relative <= 0, 0.0, -jnp.inf)), **ALONE
    )
    caught(report, "output", "float32", "Bias")


def test_mask_in_use_with_a_modifier_that_returns_numbers(as_users_run_it):
    mask = masks.Predicate(lambda at: at.relative)
    report = testing.check_modifier(scores.SoftCap(2.0), mask=mask)
    caught(report, "output", "int32")


def test_mask_that_depends_on_the_shape_of_a_tile():
    def corner(at):
        size = at.key.shape[-1]
        return jnp.arange(size, dtype=jnp.int32).reshape(at.key.shape) < 3

    caught(testing.check_mask(masks.Predicate(corner), **ALONE), "tiles", "head 0, query")


def test_mask_that_decides_in_python():
    report = testing.check_mask(
        masks.Predicate(lambda at, n: at.key < (4 if n > 2 else 5), jnp.asarray(3, jnp.int32)),
        **ALONE,
    )
    caught(report, "transforms", "jnp.where")


def test_mask_whose_array_does_not_fit():
    report = testing.check_mask(masks.ArrayMask(jnp.ones((2, 5, 5), bool)), num_heads=3, **ALONE)
    caught(report, "leaves", "axis N")


# ---- planted defects in normalizers --------------------------------------------------------------


def test_normalizer_that_overflows():
    class Naive(normalizers.Normalizer):
        kind = "shared"

        def log_weight(self, score):
            return jnp.log(1 + jnp.exp(score))

    caught(testing.check_normalizer(Naive(), **ALONE), "extremes", "10000")


def test_normalizer_that_takes_the_row_into_account():
    class Centered(normalizers.Normalizer):
        kind = "separate"

        def weight(self, score):
            return jax.nn.relu(score - jnp.mean(score, axis=-1, keepdims=True))

    report = testing.check_normalizer(Centered(), **ALONE)
    caught(report, "pairs", '"row"')


def test_normalizer_with_weight_at_minus_infinity():
    class Offset(normalizers.Normalizer):
        kind = "separate"

        def weight(self, score):
            return jax.nn.sigmoid(score) + 0.1

    caught(testing.check_normalizer(Offset(), **ALONE), "extremes", "-inf", "expected 0")


def test_normalizer_of_rows_that_leaks():
    class Leaky(normalizers.Normalizer):
        kind = "row"

        def row_weights(self, score, allowed):
            return jax.nn.softmax(score, axis=-1)

    caught(testing.check_normalizer(Leaky(), **ALONE), "pairs", "hidden")


def test_normalizer_without_its_method():
    class Bare(normalizers.Normalizer):
        kind = "separate"

        def log_weight(self, score):
            return score

    caught(testing.check_normalizer(Bare(), **ALONE), "output", "defines weight")


# ---- an implementation that errs -----------------------------------------------------------------


def test_an_implementation_that_errs_is_named(monkeypatch):
    """The defect is planted in attention itself: blockwise forgets a thousandth of each value."""
    from attnlab.core import attention as front

    right = front.blockwise_attention

    def wrong(call, block_sizes=None):
        out, lse = right(call, block_sizes)
        return out * 1.001, lse

    monkeypatch.setattr(front, "blockwise_attention", wrong)
    report = testing.check_modifier(
        scores.AlibiSlopes(jnp.ones(2)), implementations=["reference", "blockwise"]
    )
    assert {f.subject.split(",")[0] for f in report.failed} == {"blockwise"}
    caught(report, "agreement", "output")
    caught(report, "gradient", "value")


def test_an_implementation_that_lets_nan_through_is_named(monkeypatch):
    from attnlab.core import attention as front

    right = front.reference_attention

    def wrong(call):
        out, lse = right(call)
        return out + 0 * jnp.sum(call.value, axis=(-2, -3), keepdims=True), lse

    monkeypatch.setattr(front, "reference_attention", wrong)
    report = testing.check_mask(masks.Causal(), num_queries=7, num_keys=7, **FAST)
    caught(report, "masked NaN", "reaches")


# ---- the report ----------------------------------------------------------------------------------


def test_wrong_calls_are_refused(as_users_run_it):
    with pytest.raises(TypeError, match="ScoreModifier"):
        testing.check_modifier(lambda s, at: s)
    with pytest.raises(TypeError, match="none"):
        testing.check_modifier(())
    with pytest.raises(TypeError, match="Mask"):
        testing.check_mask(jnp.ones((3, 3)))
    with pytest.raises(TypeError, match="Normalizer"):
        testing.check_normalizer(scores.SoftCap(3.0))
    with pytest.raises(ValueError, match="magic"):
        testing.check_mask(masks.Causal(), implementations=["magic"])
    with pytest.raises(ValueError, match="multiple of key_heads"):
        testing.check_modifier(scores.SoftCap(3.0), heads=4, key_heads=3)
    with pytest.raises(ValueError, match="block_sizes"):
        testing.check_mask(masks.Causal(), block_sizes=(0, 4), implementations=[])


def test_report_prints_shows_and_draws():
    good = testing.check_mask(masks.Causal(), block_sizes=(8, 8), implementations=[])
    lines = str(good).splitlines()
    assert lines[0].startswith("check_mask(Causal): passed (")
    assert max(map(len, lines)) <= 100
    html = good._repr_html_()
    assert html.count("<tr>") == len(good.findings) + 1
    assert "data:image/png;base64," in html
    assert good.raise_if_failed() is good

    bad = testing.check_mask(Lying(every_by=1), implementations=[])
    assert "FAILED" in str(bad).splitlines()[0]
    assert "<img" not in bad._repr_html_()
    with pytest.raises(ValueError, match="nothing"):
        bad.figure()


@pytest.mark.parametrize(
    "report",
    [
        lambda: testing.check_mask(masks.SlidingWindow(9), implementations=[]),
        lambda: testing.check_modifier(SOUND["function"], mask=masks.Causal(), implementations=[]),
        lambda: testing.check_normalizer(normalizers.Entmax15(), implementations=[]),
        lambda: testing.check_normalizer(normalizers.Softmax(normal(2)), implementations=[]),
    ],
    ids=["mask", "modifier", "normalizer", "sink"],
)
def test_figures_are_drawn(report):
    file = io.BytesIO()
    report().figure().savefig(file, format="png")
    assert len(file.getvalue()) > 5000


def test_the_example_in_the_documentation_runs():
    found = doctest.testmod(testing)
    assert found.attempted >= 6
    assert not found.failed


def test_it_is_reached_from_the_package():
    assert attnlab.testing is testing
    assert "testing" in dir(attnlab)
