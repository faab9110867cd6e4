"""Checks of a term by itself: do its arrays fit, is it hashable, is it the same on every tile."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core.terms import Term, Tile, axes_of, check_leaves, named_axes, restrict
from attnlab.testing.case import Case, Leaf, float64, leaves_of
from attnlab.testing.formula import Formula
from attnlab.testing.report import FAILED, NOTE, OK, Finding, one_line

_LETTERS = ("B", "N", "T", "S", "*")
_INDEX = {"N": "at.head", "T": "at.query", "S": "at.key"}


def check_tags(terms: Any) -> Iterator[Finding]:
    """One known tag to each array; raises where their numbers differ."""
    for leaf in leaves_of(terms):
        letters = [a.split("/")[0] for a in leaf.tag.split()]
        unknown = [a for a in letters if a not in _LETTERS]
        order = [_LETTERS.index(a) for a in letters if a in _LETTERS[:4]]
        if unknown:
            words = f"{leaf}: knows no axis {', '.join(unknown)}; the letters are B N T S and *."
            yield Finding("leaves", FAILED, words)
        elif order != sorted(order) or len(set(order)) < len(order):
            words = f"{leaf}: axes come in the order B N T S, each once; transpose the array."
            yield Finding("leaves", FAILED, words)
        elif letters and leaf.value.ndim < len([a for a in letters if a != "B"]):
            yield Finding("leaves", FAILED, f"{leaf}: has fewer axes than its tag.")


def check_fit(leaves: Sequence[Leaf], case: Case) -> Iterator[Finding]:
    """Each array broadcasts to the scores along the axes of its tag."""
    sizes = {"N": case.heads, "T": case.lengths[0], "S": case.lengths[1]}
    for leaf in leaves:
        try:
            check_leaves("an array", [leaf.value], [leaf.tag], case.batch, sizes)
        except ValueError as error:
            yield Finding("leaves", FAILED, f"{leaf}: {one_line(error)}")
            continue
        if leaf.tag or not leaf.value.ndim:
            trained = "trained" if leaf.trainable else "not trained"
            yield Finding("leaves", OK, f"{leaf} fits; {trained}.")
        else:
            yield Finding(
                "leaves",
                NOTE,
                f"{leaf} is handed over whole to every tile: right for a table that the function "
                "looks up, wrong for anything indexed by head, query or key by its place.",
            )
    if not leaves:
        yield Finding("leaves", OK, "holds no arrays.")


def _static_fields(terms: Any) -> Iterator[Any]:
    for term in terms if isinstance(terms, tuple) else (terms,):
        for field in dataclasses.fields(term):
            value = getattr(term, field.name)
            if field.metadata.get("static"):
                yield value
            elif isinstance(value, Term):
                yield from _static_fields(value)


def check_static(terms: Any) -> Iterator[Finding]:
    """Fields that are no arrays are hashable and comparable, as compiling needs."""
    tree = jax.tree.structure(terms)
    try:
        hash(tuple(_static_fields(terms)))
        same = bool(tree == jax.tree.structure(terms))  # type: ignore[operator]
    except (TypeError, ValueError) as error:
        words = f"a field marked static cannot be hashed or compared ({one_line(error)}); " + (
            "make it a number, string, tuple or function, or hold the array in a field made by "
            "attnlab.core.terms.leaf."
        )
        yield Finding("static", FAILED, words)
        return
    if same:
        yield Finding("static", OK, "its static fields can be hashed and compared.")
    else:
        words = "its static fields are unequal to themselves: every call would compile anew."
        yield Finding("static", FAILED, words)


# ---- what a leaf influences ------------------------------------------------------------------


def influence(formula: Formula, products: np.ndarray) -> Iterator[Finding]:
    """An array tagged by an axis may touch only the pairs at its own place on that axis.

    For arrays without a tag that nevertheless do so, the finding says which tag they deserve.
    """
    case = formula.case
    base = _modified(formula, products, formula.leaves())
    for number, leaf in enumerate(case.leaves):
        if not leaf.trainable or leaf.value.ndim == 0 or "*" in leaf.tag:
            continue
        places = sample(case.rng(1, number), leaf.value.shape, 4)
        touched = []
        for place in places:
            leaves = formula.leaves()
            leaves[number][place] += 0.37
            moved = _modified(formula, products, leaves)
            touched.append(np.argwhere((moved != base) & ~(np.isnan(moved) & np.isnan(base))))
        if leaf.tag:
            yield from _strays(case, leaf, places, touched)
        else:
            yield from _deserved(case, leaf, places, touched)


def _modified(formula: Formula, products: np.ndarray, leaves: list[Any]) -> np.ndarray:
    with float64():
        out = formula.modified(products, leaves)
    return np.broadcast_to(np.asarray(out).astype(np.float64), formula.case.shape)


def _strays(
    case: Case, leaf: Leaf, places: list[tuple[Any, ...]], touched: list[np.ndarray]
) -> Iterator[Finding]:
    for letter, axis in named_axes(leaf.tag, leaf.value.ndim):
        along = len(case.batch) + "NTS".index(letter)
        if leaf.value.shape[axis] == 1:
            continue
        for place, pairs in zip(places, touched, strict=True):
            stray = pairs[pairs[:, along] != place[axis]] if len(pairs) else pairs
            if len(stray):
                yield Finding(
                    "leaves",
                    FAILED,
                    f"{leaf}: its entry {_place(place)} changes the score at "
                    f"{at_pair(case, stray[0])}, which is another place along {letter}. The array "
                    f"a function receives is already the part that belongs to the tile: use it as "
                    f"it is, without indexing it by {_INDEX[letter]}, or leave it untagged.",
                )
                return


def _deserved(
    case: Case, leaf: Leaf, places: list[tuple[Any, ...]], touched: list[np.ndarray]
) -> Iterator[Finding]:
    found = []
    for letter, size in zip("NTS", case.shape[-3:], strict=True):
        along = len(case.batch) + "NTS".index(letter)
        for axis, length in enumerate(leaf.value.shape):
            if length != size or size == 1:
                continue
            if all(
                len(p) and set(p[:, along]) == {place[axis]}
                for place, p in zip(places, touched, strict=True)
            ):
                found.append(letter)
                break
    if found:
        tag = " ".join(found)
        yield Finding(
            "leaves",
            NOTE,
            f'{leaf} acts along {tag} but has no tag. Tagged "{tag}" each tile would receive the '
            "part that belongs to it, in memory of the tile's size, and kernels could take it.",
        )


def _place(place: tuple[Any, ...]) -> str:
    return "[" + ", ".join(str(int(n)) for n in place) + "]"


def at_pair(case: Case, index: Any) -> str:
    """A pair in words: head 1, query 4, key 7."""
    head, query, key = (int(n) for n in index[-3:])
    batch = "".join(f"batch {int(n)}, " for n in index[:-3] if case.batch != (1,))
    return f"{batch}head {head}, query {query}, key {key}"


# ---- tiles -----------------------------------------------------------------------------------


def tiles_of(lengths: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """First row, first column, rows, columns: corners, strips, single pairs, the inside."""
    queries, keys = lengths
    rows, cols = min(queries, 3), min(keys, 5)
    tiles = [
        (0, 0, 1, 1),
        (queries - 1, keys - 1, 1, 1),
        (queries - rows, 0, rows, keys),
        (0, keys - cols, queries, cols),
        ((queries - rows) // 2, (keys - cols) // 2, rows, cols),
    ]
    return list(dict.fromkeys(tiles))


def check_tiles(
    case: Case, whole: np.ndarray, evaluate: Callable[[Tile], Any], allowance: float
) -> Iterator[Finding]:
    """`evaluate` gives the same values on any tile as on the whole matrix, also where the tile's
    place is known at run time only, as inside a kernel.
    """
    tiles = tiles_of(case.lengths)
    for row, col, rows, cols in tiles:
        where = f"rows {row}–{row + rows - 1}, columns {col}–{col + cols - 1}"
        expected = whole[..., row : row + rows, col : col + cols]

        def traced(r: Any, c: Any, rows: int = rows, cols: int = cols) -> Any:
            return evaluate(case.tile(r, c, rows, cols))

        try:
            part = np.asarray(jax.jit(traced)(jnp.int32(row), jnp.int32(col)))
            part = np.broadcast_to(part, expected.shape)
        except jax.errors.ConcretizationTypeError as error:
            words = (
                f"on the tile of {where} it needs to know a position before it runs "
                f"({one_line(error, 120)}). Positions are arrays: use jnp.where instead of if."
            )
            yield Finding("tiles", FAILED, words)
            return
        except Exception as error:  # whatever the user's code does with a tile
            words = (
                f"works on the whole matrix of {case.lengths[0]} queries and {case.lengths[1]} "
                f"keys, not on the tile of {where}: {type(error).__name__}: {one_line(error, 200)} "
                + _blame(case)
            )
            yield Finding("tiles", FAILED, words)
            return
        gap = differences(part, expected)
        if gap.max() > allowance:
            worst = np.unravel_index(np.argmax(gap), gap.shape)
            index = (*worst[:-2], worst[-2] + row, worst[-1] + col)
            words = (
                f"at {at_pair(case, index)} it gives {expected[worst]:.6g} on the whole matrix, "
                f"but {part[worst]:.6g} on the tile of {where}. It depends on the shape of what it "
                f"is given, or mixes pairs; use at.query, at.key and at.head. {_blame(case)}"
            )
            yield Finding("tiles", FAILED, words)
            return
    yield Finding("tiles", OK, f"the same on {len(tiles)} tiles of any size and place.")


def _blame(case: Case) -> str:
    whole = [
        leaf
        for leaf in [*case.leaves, *leaves_of(case.mask)]
        if not leaf.tag and {*leaf.value.shape} & {*case.lengths} - {1}
    ]
    if not whole:
        return ""
    names = ", ".join(map(str, whole))
    return f"Look at {names}: no tag says that a tile should receive only its part of it."


def differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Absolute differences; zero where both are NaN or the same infinity, infinite where one is."""
    if a.dtype == bool or b.dtype == bool:
        return (a != b).astype(np.float64)
    a, b = a.astype(np.float64), b.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(a - b))
    return np.where(np.isfinite(gap), gap, np.inf)


def restricted(terms: Any, leaves: list[Any], tile: Tile) -> Any:
    """`terms` with other arrays, cut to a tile as the implementations cut them."""
    tree = jax.tree.structure(terms)
    return restrict(jax.tree.unflatten(tree, leaves), axes_of_many(terms), tile)


def axes_of_many(terms: Any) -> tuple[str, ...]:
    """The tags of a term, or of tuples of terms within a tuple."""
    if isinstance(terms, tuple):
        return tuple(tag for part in terms for tag in axes_of_many(part))
    return axes_of(terms)


def sample(rng: np.random.Generator, shape: tuple[int, ...], count: int = 6) -> list[Any]:
    """Some different places in an array, all of a small one."""
    total = int(np.prod(shape))
    chosen = rng.choice(total, min(count, total), replace=False)
    return [tuple(int(i) for i in np.unravel_index(n, shape)) for n in chosen] if shape else [()]


def listen(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of `function` and the warnings it gave."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        result = function()
    return result, [" ".join(str(w.message).split()) for w in heard]


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of inner ones too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
