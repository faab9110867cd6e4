"""Every theorem holds as stated and fails without an assumption; its numbers are had otherwise."""

import html
import io
import math
import re

import jax
import numpy as np
import pytest
from rich.console import Console

import theory
from theory import prior_tail, retrieval_margin, softmax_posterior
from theory.generalized_gaussian import mass_brackets
from theory.partial_softmax import THEOREM as PARTIAL_SOFTMAX

THEOREMS = theory.theorems()
AT_ANY_KEY = (
    "attention-rank",
    "counting-gates",
    "in-context-regression",
    "latent-edges",
    "momentum-induction",
    "normalization-limits",
    "random-feature-attention",
    "sigmoid-regularity",
)
SAID_TWICE = ("soft-lookup", "softmax-posterior", "position-priors")  # quick, and drawn from a key


@pytest.fixture(scope="module")
def evidence():
    """Each theorem's two experiments, run once for the whole file."""
    run: dict[tuple[str, str], theory.Evidence] = {}

    def get(name: str, experiment: str) -> theory.Evidence:
        if (name, experiment) not in run:
            run[name, experiment] = getattr(THEOREMS[name], experiment)()
        return run[name, experiment]

    return get


@pytest.mark.parametrize("name", THEOREMS)
def test_the_theorem_holds(name, evidence):
    found = evidence(name, "check")
    assert found.holds, str(found)


@pytest.mark.parametrize("name", THEOREMS)
def test_it_fails_without_an_assumption(name, evidence):
    found = evidence(name, "counter_check")
    assert not found.holds, str(found)


@pytest.mark.parametrize("name", AT_ANY_KEY)
@pytest.mark.parametrize("seed", [7, 8])
def test_it_holds_and_fails_without_an_assumption_at_any_key(name, seed):
    found = THEOREMS[name].check(jax.random.key(seed))
    assert found.holds, str(found)
    broken = THEOREMS[name].counter_check(jax.random.key(seed))
    assert not broken.holds, str(broken)


@pytest.mark.parametrize("name", SAID_TWICE)
def test_another_key_changes_the_numbers_and_not_the_verdict(name, evidence):
    again = THEOREMS[name].check(jax.random.key(2024))
    assert again.holds
    assert again.rows != evidence(name, "check").rows


@pytest.mark.parametrize("name", SAID_TWICE)
def test_the_same_key_gives_the_same_evidence(name, evidence):
    assert THEOREMS[name].check().rows == evidence(name, "check").rows


@pytest.mark.parametrize("name", THEOREMS)
def test_its_latex_is_balanced(name):
    theorem = THEOREMS[name]
    for text in (theorem.statement, theorem.proof, *theorem.assumptions):
        assert text.count("$") % 2 == 0, text
        assert text.count("{") == text.count("}"), text
        assert not re.search(r"[^\x20-\x7e]", text), f"outside ASCII: {text}"
        assert len(re.findall(r"\\left\b", text)) == len(re.findall(r"\\right\b", text))


@pytest.mark.parametrize("name", THEOREMS)
def test_it_shows_itself_in_notebooks_and_terminals(name, evidence):
    found = evidence(name, "check")
    console = Console(file=io.StringIO(), width=200)
    console.print(found)
    for text in (found._repr_html_(), found._repr_markdown_(), console.file.getvalue(), str(found)):
        words = " ".join(html.unescape(text).split())  # terminals wrap, HTML escapes
        assert found.quantity in words
        assert found.columns[0] in text
    assert found._repr_html_().count("<tr>") == len(found.rows) + 1
    page = THEOREMS[name]._repr_markdown_()
    assert THEOREMS[name].statement in page
    assert THEOREMS[name].source.cite in page


@pytest.mark.parametrize("name", THEOREMS)
def test_its_name_is_its_id(name):
    assert name == THEOREMS[name].id
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", name)


@pytest.mark.parametrize("measured", [math.nan, math.inf, 1.1])
def test_evidence_beyond_the_bound_or_not_a_number_does_not_hold(measured):
    assert not theory.Evidence("a number", measured, 1.0, ("x",), ((measured,),)).holds
    assert theory.Evidence("a number", 1.0, 1.0, ("x",), ((1.0,),)).holds


def test_evidence_with_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="rows: every row needs 2 cells"):
        theory.Evidence("a number", 0.0, 1.0, ("x", "y"), ((1.0,),))


def test_an_unknown_column_is_refused():
    found = theory.Evidence("a number", 0.0, 1.0, ("x",), ((1.0,),))
    assert found.column("x") == (1.0,)
    with pytest.raises(ValueError, match="expected one of"):
        found.column("y")


def test_a_laplace_tail_is_a_geometric_series(evidence):
    found = evidence("prior-tail", "check")
    for shape, distance, measured, *_ in found.rows:
        if shape == 1.0:
            decay, keys = math.exp(-1 / prior_tail.HALF), prior_tail.CONTEXT
            exact = (decay ** (distance + 1) - decay**keys) / (1 - decay**keys)
            assert measured == pytest.approx(exact, rel=2e-5)


def test_a_uniform_tail_is_a_count(evidence):
    for shape, distance, measured, *_ in evidence("prior-tail", "check").rows:
        if shape == 0.0:
            keys = prior_tail.CONTEXT
            assert measured == pytest.approx((keys - distance - 1) / keys, rel=2e-5)


def test_a_uniform_prior_asks_the_logarithm_of_the_crowd(evidence):
    rows = evidence("retrieval-margin", "check").rows
    for shape, length, needed, *_ in rows:
        if shape == 0.0:
            assert needed == pytest.approx(math.log(length - 1), abs=1e-3)


def test_small_shapes_reach_further(evidence):
    rows = evidence("retrieval-margin", "check").rows
    reach = {shape: max(r[1] for r in rows if r[0] == shape and r[-1]) for shape, *_ in rows}
    ordered = [reach[shape] for shape in sorted(reach)]
    assert ordered == sorted(ordered, reverse=True)
    assert ordered[0] > ordered[-1] == retrieval_margin.TRAINED


@pytest.mark.parametrize("shape", [0.3, 0.5, 1.0, 1.7])
@pytest.mark.parametrize(("first", "end"), [(0, 1), (0, 200), (7, 8), (31, 4000)])
def test_the_integrals_bracket_a_plain_sum(shape, first, end):
    low, high = mass_brackets(first, end, 0.2, shape)
    plain = math.fsum(math.exp(-0.2 * r**shape) for r in range(first, end))
    assert low <= plain * (1 + 1e-9)
    assert plain <= high * (1 + 1e-9)


def test_weights_are_bayes_rule_on_a_coin_by_hand():
    # Two keys one number wide: the first is believed three times likelier, the query says second.
    got = softmax_posterior.weights(
        np.array([[1.0]]), np.array([[0.0], [math.log(6.0)]]), np.array([0.75, 0.25])
    )
    np.testing.assert_allclose(got, [[1 / 3, 2 / 3]], rtol=1e-6)


def test_bfloat16_stalls_in_a_left_fold_and_not_in_a_tree(evidence):
    error = {
        (row[0], row[1]): row[3]
        for row in evidence(PARTIAL_SOFTMAX.id, "check").rows
        if "late" in str(row[1])
    }
    assert error["bfloat16", "left fold, late values"] > 0.1
    assert error["bfloat16", "tree, late values"] < 0.01
    assert error["float32", "left fold, late values"] < 1e-4
