"""The three checks: what is looked at, in which order, and what is not once something fails."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core import attention as _front
from attnlab.core.kernels import BACKENDS, interpret
from attnlab.core.masks import Full, Mask, as_mask
from attnlab.core.normalizers import Normalizer
from attnlab.core.scores import ScoreModifier, as_modifiers
from attnlab.testing import figure as _figure
from attnlab.testing.attend import AttentionChecks
from attnlab.testing.case import Case, float64, leaves_of, make_case
from attnlab.testing.formula import Formula
from attnlab.testing.masks import MaskChecks, plan_of
from attnlab.testing.modifiers import ModifierChecks
from attnlab.testing.normalizers import NormalizerChecks
from attnlab.testing.report import FAILED, NOTE, OK, SKIPPED, Collector, Finding, Report
from attnlab.testing.terms import check_fit, check_static, check_tags, influence


def check_modifier(
    modifier: ScoreModifier | Sequence[ScoreModifier],
    *,
    batch: int | tuple[int, ...] | None = None,
    heads: int | None = None,
    key_heads: int | None = None,
    lengths: tuple[int, int] | None = None,
    width: int = 16,
    mask: Any = None,
    normalizer: Normalizer | None = None,
    implementations: Sequence[str] | None = None,
    dtype: Any = np.float32,
    key: int = 0,
) -> Report:
    """Is a score modifier the same function everywhere, with the right gradient?

    Sizes that are left out are those that the arrays call for: a table "N *" fixes the number of
    heads, a bias "B N T S" everything; otherwise small odd ones are taken.

    Args:
      modifier: one, or several that are applied in order.
      batch, heads, key_heads, lengths, width: B, N, K, (T, S) and H of the attention tried.
      mask: the mask it will be used with, if it cannot stand pairs that this mask hides.  None: a
        random one, with a query that sees nothing.
      normalizer: softmax by default.
      implementations: names as for `attnlab.attention`; None: all that can run here, kernels
        interpreted where their device is missing, which takes about a minute; none: attention is
        not tried, only the modifier by itself, in a second or two.
      dtype: of query, key and value in "agreement" and "gradient".
      key: the seed of all that is drawn.

    Raises:
      TypeError: no modifier, mask or normalizer was given where one belongs.
      ValueError: sizes that do not fit together, or an unknown implementation.
    """
    modifiers = as_modifiers(modifier)
    if not modifiers:
        raise TypeError("modifier: expected a ScoreModifier or some, got none.")
    title = f"check_modifier({', '.join(map(_name, modifiers))})"
    terms: Any = modifiers[0] if len(modifiers) == 1 else modifiers
    make = functools.partial(
        make_case, modifiers=modifiers, normalizer=normalizer, batch=batch, heads=heads,
        key_heads=key_heads, lengths=lengths, width=width, dtype=dtype, key=key,
    )  # fmt: skip
    collector = Collector()
    if not _starts(collector, terms, mask, normalizer):
        return Report(title, "", tuple(collector.findings))
    case = make(mask=mask)
    if mask is None:
        case = make(mask=_random_mask(case))
    if not collector.run("leaves", lambda: check_fit(case.leaves, case)):
        return _report(title, case, collector)
    allowed = _allowed(collector, case)
    if allowed is None:
        return _report(title, case, collector)
    checks = ModifierChecks(case, allowed)
    for name in ("output", "transforms"):
        if not collector.run(name, getattr(checks, name)):
            return _report(title, case, collector)
    products = Formula(case).products(case.query, case.key)
    collector.run("leaves", lambda: influence(Formula(case), products))
    for name in ("pairs", "tiles", "precision", "derivative", "extremes"):
        collector.run(name, getattr(checks, name))
    collector.run("masked pairs", checks.masked_pairs)
    collector.run("additive", checks.additive)
    with_tiles = None if mask is None else plan_of(case.mask, case, _blocks(case))
    _attend(collector, case, allowed, implementations, checks.narrow_work())
    return _report(
        title, case, collector, with_tiles, lambda: _picture(title, checks, case, with_tiles)
    )


def check_mask(
    mask: Any,
    *,
    num_queries: int | None = None,
    num_keys: int | None = None,
    num_heads: int | None = None,
    batch: int | tuple[int, ...] | None = None,
    block_sizes: tuple[int, int] = (16, 16),
    causal: bool | None = None,
    implementations: Sequence[str] | None = None,
    dtype: Any = np.float32,
    key: int = 0,
) -> Report:
    """Does a mask say the same of pairs and of tiles, and do all implementations obey it?

    Args:
      mask: a Mask, or a boolean array that broadcasts to "*B N T S".
      num_queries, num_keys, num_heads, batch: as far as the mask's arrays leave them open; 24, 40
        and 2 heads otherwise.
      block_sizes: rows and columns of a tile in plan and picture; other sizes are tried too.
      causal: True if no query may see a key after it, False if that is meant, None to be told.
      implementations, dtype, key: as for `check_modifier`.

    Raises:
      TypeError: neither a Mask nor a boolean array.
      ValueError: sizes that do not fit together, or an unknown implementation.
    """
    mask = as_mask(mask)
    title = f"check_mask({_name(mask)})"
    collector = Collector()
    if not _starts(collector, mask):
        return Report(title, "", tuple(collector.findings))
    make = functools.partial(make_case, mask=mask, batch=batch, heads=num_heads, dtype=dtype)
    case = make(key=key, default_lengths=(24, 40))
    if num_queries or num_keys:
        lengths = (num_queries or case.lengths[0], num_keys or case.lengths[1])
        case = make(key=key, lengths=lengths)
    if min(block_sizes) < 1:
        raise ValueError(f"block_sizes: expected two positive ints, got {block_sizes!r}.")
    fits = collector.run("leaves", lambda: check_fit(leaves_of(mask), case))
    checks: Any = None

    def evaluate() -> list[Finding]:
        nonlocal checks
        checks = MaskChecks(case, block_sizes)
        return []

    if not fits or not collector.run("output", evaluate):
        return _report(title, case, collector)
    for name in ("output", "transforms", "tiles"):
        if not collector.run(name, getattr(checks, name)):
            return _report(title, case, collector)
    sound = collector.run("bounds", checks.bounds) & collector.run("plan", checks.plan)
    collector.run("future", lambda: checks.future(causal))
    collector.run("empty rows", checks.rows)
    if not sound:
        collector.add("agreement", SKIPPED, "not tried while the plan is wrong.")
        return _report(title, case, collector)
    _attend(collector, case, checks.allowed, implementations, None)
    plan = plan_of(mask, case, block_sizes)
    shown = checks.allowed.reshape(-1, *case.lengths)[0]
    return _report(
        title, case, collector, plan, lambda: _figure.draw_mask(_name(mask), shown, plan)
    )


def check_normalizer(
    normalizer: Normalizer,
    *,
    batch: int | tuple[int, ...] | None = None,
    heads: int | None = None,
    key_heads: int | None = None,
    lengths: tuple[int, int] | None = None,
    width: int = 16,
    mask: Any = None,
    implementations: Sequence[str] | None = None,
    dtype: Any = np.float32,
    key: int = 0,
) -> Report:
    """Does a normalizer weigh each pair by itself, without overflow, with the right gradient?

    Arguments and errors are those of `check_modifier`.
    """
    if not isinstance(normalizer, Normalizer):
        raise TypeError(f"normalizer: expected a Normalizer, got {type(normalizer).__name__}.")
    title = f"check_normalizer({_name(normalizer)})"
    collector = Collector()
    if not _starts(collector, normalizer, mask):
        return Report(title, "", tuple(collector.findings))
    make = functools.partial(
        make_case, normalizer=normalizer, batch=batch, heads=heads, key_heads=key_heads,
        lengths=lengths, width=width, dtype=dtype, key=key,
    )  # fmt: skip
    case = make(mask=mask)
    if mask is None:
        case = make(mask=_random_mask(case))
    if not collector.run("leaves", lambda: check_fit(case.leaves, case)):
        return _report(title, case, collector)
    allowed = _allowed(collector, case)
    if allowed is None:
        return _report(title, case, collector)
    checks = NormalizerChecks(case, allowed)
    if not collector.run("output", checks.output):
        return _report(title, case, collector)
    for name in ("pairs", "extremes", "derivative"):
        collector.run(name, getattr(checks, name))
    collector.run("row sums", checks.rows)
    _attend(collector, case, allowed, implementations, None)
    return _report(title, case, collector, None, lambda: _weight_curve(case))


# ---- shared parts ----------------------------------------------------------------------------


def _name(term: Any) -> str:
    fn = getattr(term, "fn", None)
    inner = getattr(fn, "__name__", "") if fn is not None else ""
    name = type(term).__name__.lstrip("_")
    return f"{name}({inner})" if inner else name


def _starts(collector: Collector, *terms: Any) -> bool:
    """Whether tags and static fields are in order, without which nothing can be tried."""
    sound = True
    for number, term in enumerate(terms):
        if not isinstance(term, Mask | Normalizer | ScoreModifier | tuple):
            continue
        sound &= collector.run("leaves", lambda t=term: check_tags(t))
        found = Collector()
        sound &= found.run("static", lambda t=term: check_static(t))
        collector.findings += [f for f in found.findings if f.status == FAILED or not number]
    return sound


def _allowed(collector: Collector, case: Case) -> np.ndarray | None:
    """The pairs that the mask of a call shows; None where it cannot be evaluated."""
    made: list[MaskChecks] = []

    def evaluate() -> list[Finding]:
        made.append(MaskChecks(case, (1, 1)))
        return [f for f in made[0].output() if f.status == FAILED]

    return made[0].allowed if collector.run("output", evaluate, "mask") else None


def _random_mask(case: Case) -> np.ndarray:
    """Four pairs of five, and one query of the first head that sees nothing."""
    allowed = case.rng(9).random((case.heads, *case.lengths)) < 0.8
    if case.lengths[0] > 1:
        allowed[0, case.lengths[0] // 2] = False
    return allowed


def _blocks(case: Case) -> tuple[int, int]:
    return min(16, case.lengths[0]), min(16, case.lengths[1])


def _attend(
    collector: Collector,
    case: Case,
    allowed: np.ndarray,
    implementations: Sequence[str] | None,
    narrow: str | None,
) -> None:
    unknown = set(implementations or ()) - set(_front.IMPLEMENTATIONS)
    if unknown:
        raise ValueError(
            f"implementations: expected some of {', '.join(_front.IMPLEMENTATIONS)}, "
            f"got {', '.join(map(repr, sorted(unknown)))}."
        )
    if implementations is not None and not len(implementations):
        collector.add("agreement", SKIPPED, "no implementation was asked for.")
        return
    made: list[AttentionChecks] = []

    def prepare() -> list[Finding]:
        made.append(AttentionChecks(case, allowed, narrow))
        return []

    if collector.run("agreement", prepare):
        made[0].everything(collector, implementations)
    for name in BACKENDS:
        if name in (_front.IMPLEMENTATIONS if implementations is None else implementations):
            collector.run("kernels", lambda n=name: _kernel(case, n), name)


def _kernel(case: Case, name: str) -> list[Finding]:
    """Whether a fused kernel takes the call; what keeps it from doing so is no defect."""

    def refusal(dtype: Any) -> str:
        def call(query: Any, key: Any, value: Any) -> Any:
            return _front.attention(
                query, key, value, mask=case.mask, modifiers=case.modifiers,
                normalizer=case.normalizer, implementation=name,
            )  # fmt: skip

        inputs = (case.query, case.key, case.value)
        try:
            with interpret():
                jax.eval_shape(call, *(jax.ShapeDtypeStruct(x.shape, dtype) for x in inputs))
        except NotImplementedError as refusal:
            return str(refusal)
        return ""

    words = refusal(case.dtype)
    if not words:
        return [Finding("kernels", OK, f"takes it in {case.dtype.name}.", name)]
    if case.dtype != jnp.bfloat16 and not refusal(jnp.bfloat16):
        words = f'takes it in bfloat16, not in {case.dtype.name}: try `dtype="bfloat16"`.'
    return [Finding("kernels", NOTE, words, name)]


def _report(
    title: str, case: Case, collector: Collector, plan: Any = None, draw: Any = None
) -> Report:
    return Report(title, case.sizes(), tuple(collector.findings), plan, draw)


def _picture(title: str, checks: ModifierChecks, case: Case, plan: Any) -> Any:
    """The effect on a score of 0 everywhere, and on all scores at a few pairs."""
    first = (0,) * len(case.batch)
    effect = checks.effect(np.zeros(case.shape))[first]
    allowed = checks.allowed[first]
    if isinstance(case.mask, Full) or plan is None:
        allowed = np.ones_like(allowed)
    given = np.linspace(-6, 6, 61)
    query = case.lengths[0] - 1
    keys = sorted({max(0, min(query, case.lengths[1] - 1) - n) for n in (0, 3, 10)}, reverse=True)
    lines = np.stack([checks.effect(np.full(case.shape, s))[first][0, query] for s in given])
    curves = {f"head 0, query {query}, key {j}": lines[:, j] for j in keys}
    name = title[title.index("(") + 1 : -1]
    return _figure.draw_modifier(name, effect, allowed, curves, given, plan)


def _weight_curve(case: Case) -> Any:
    """The weight of the first key of a row as its score runs, the others being zero."""
    given = np.linspace(-6, 6, 121)
    keys = case.lengths[1]
    formula = Formula(case)
    with float64():
        _, normalizer = formula.terms(formula.leaves())
        drawn = np.zeros((1, case.heads, given.size, keys))
        drawn[..., 0] = given
        scores = jnp.asarray(drawn)
        if normalizer.kind == "row":
            weights = normalizer.row_weights(scores, jnp.ones(scores.shape, bool))
        elif normalizer.kind == "separate":
            weights = normalizer.weight(scores)
        else:
            made = normalizer.log_weight(scores)
            extra = normalizer.log_extra()
            total = jax.nn.logsumexp(made, axis=-1, keepdims=True)
            if extra is not None:
                extra = jnp.asarray(extra, total.dtype).reshape(1, -1, 1, 1)
                total = jnp.logaddexp(total, extra)
            weights = jnp.exp(made - total)
    curve = np.asarray(weights).reshape(-1, given.size, keys)[0, :, 0]
    words = f"its score, {keys - 1} other keys at 0"
    return _figure.draw_normalizer(_name(case.normalizer), given, curve, words)
