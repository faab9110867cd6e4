"""The contract: what every mechanism promises, one plain function to a promise.

A property is called as `prop(entry, dtype, implementation, key)`. It raises AssertionError where
the promise is broken, returns None where it is kept, and a reason where it does not apply: the
entry does not claim it, or the implementation refuses the call by a NotImplementedError that names
another which can.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import masks
from attnlab.core.entry import RECURRENCE
from attnlab.core.kernels import BACKENDS, interpret, missing
from attnlab.core.past import Past
from attnlab.distributed import over
from tests import oracles
from tests.compiled import temporaries
from tests.contract.formulas import FORMULAS
from tests.contract.subject import (
    BATCH,
    HEADS,
    LENGTH,
    WIDTH,
    Subject,
    draw,
    seed_of,
    subject,
)
from tests.tolerances import (
    LINEAR_GROWTH,
    ROUNDINGS,
    as_float64,
    assert_close,
    assert_reordered,
    assert_within_budget,
    epsilon,
    largest,
)

PROPERTIES = {}
CAUSAL = "causal self"


def promise(
    words: str,
    *,
    claim: str | None = None,
    dtypes: tuple[str, ...] | None = None,
    table=PROPERTIES,
    of=subject,
):
    """Register a property; `claim` is what the entry must claim for it to apply.

    `table` is where to, and `of` makes what the property is given.
    """

    def register(function):
        name = function.__name__.replace("_", " ")

        @functools.wraps(function)
        def prop(entry, dtype, implementation, key):
            if claim is not None and claim not in entry.properties:
                return f"does not claim “{claim}”"
            if dtypes is not None and dtype not in dtypes:
                return f"checked in {' and '.join(dtypes)}"
            # jax.nn's own derivatives mix bfloat16 with float32, which strict promotion forbids.
            promotion = "standard" if implementation in ("xla", "cudnn") else "strict"
            try:
                with jax.numpy_dtype_promotion(promotion), on_this_machine(implementation):
                    return function(of(entry, dtype, implementation), key)
            except NotImplementedError as refusal:
                return _checked_refusal(str(refusal), implementation)

        prop.words = words
        table[name] = prop
        return prop

    return register


def on_this_machine(implementation: str):
    """Kernels run on their device where there is one, and are interpreted elsewhere."""
    needs = implementation in BACKENDS and missing(implementation)
    return interpret() if needs else contextlib.nullcontext()


def _checked_refusal(words: str, implementation: str) -> str:
    others = {"reference", "blockwise", "xla", "cudnn", *RECURRENCE, "attnlab.attention"}
    others -= {implementation}
    named = any(other in words for other in others)
    assert named, f"refuses without naming an implementation that can: {words}"
    return words


def _visible(seen):
    return np.broadcast_to(seen.dense, (BATCH, HEADS, LENGTH, LENGTH)).any(-1).swapaxes(1, 2)


def _said(subject: Subject, seen, length=LENGTH):
    """What a formula is told besides the arrays: who sees whom, and the layer's input."""
    options = {"mask": oracles.array(seen.dense)}
    if subject.reads_input:
        (x,) = subject.cast((subject.input(length),))
        options["x"] = np.broadcast_to(as_float64(x), (BATCH, *x.shape))
    return options


def _formula(subject: Subject, arrays, dtype=np.float64, **options):
    assert subject.entry.id in FORMULAS, f"tests/contract/formulas.py knows no {subject.entry.id}"
    wide = [as_float64(x) for x in subject.cast(arrays)]
    formula = FORMULAS[subject.entry.id]
    return formula(subject.params, *wide, dtype=dtype, return_lse=True, **options)


# ---- form ----------------------------------------------------------------------------------------


@promise("The output is “*B T N D” in the dtype of the query, whatever the lengths and batch axes.")
def shape_and_dtype(subject: Subject, key):
    sizes = [((BATCH,), LENGTH, LENGTH), ((), 1, 1)]
    if "noncausal cross" in subject.entry.patterns:
        sizes += [((), 5, LENGTH), ((), 1, 3)]
    for batch, queries, keys in sizes:
        shapes = (
            (*batch, queries, HEADS, WIDTH),
            (*batch, keys, 2, WIDTH),
            (*batch, keys, 2, WIDTH),
        )
        arrays = [jax.ShapeDtypeStruct(s, subject.dtype) for s in shapes]
        out = jax.eval_shape(subject.call, subject.state, *arrays)
        assert out.shape == (*batch, queries, HEADS, WIDTH), f"shape {out.shape}"
        assert out.dtype == subject.dtype, f"dtype {out.dtype} from {subject.dtype}"


@promise("Compiled and uncompiled, the same numbers.", dtypes=("float32",))
def jit_equals_eager(subject: Subject, key):
    arrays, seen = draw(key), subject.example()
    eager = subject.call(
        subject.state,
        *subject.cast(arrays),
        mask=subject.mask(seen.arrays),
        query_offset=jnp.asarray(0, jnp.int32),
        key_offset=jnp.asarray(0, jnp.int32),
    )
    assert_reordered(eager, as_float64(subject.with_mask(arrays, seen)), subject.dtype)


@promise("Mapped over a batch by vmap, the same numbers as with a batch axis.", dtypes=("float32",))
def vmap_equals_batch(subject: Subject, key):
    arrays = subject.cast(draw(key))
    mask = masks.Causal() if CAUSAL in subject.entry.patterns else None

    def run(query, key, value):
        return subject.call(subject.state, query, key, value, mask=mask)

    mapped, batched = jax.jit(jax.vmap(run))(*arrays), jax.jit(run)(*arrays)
    assert_reordered(mapped, as_float64(batched), subject.dtype)


@promise("A wrong rank, head count, width, dtype, mask or option is refused by name.")
def bad_input_raises(subject: Subject, key):
    query, key_, value = subject.cast(draw(key))
    wrong = [
        ("query", (query[0, 0], key_, value), {}),
        ("key", (query, key_[..., :4], value), {}),
        ("value", (query, key_, value[:, :5]), {}),
        ("query", (query[..., :3, :], key_, value), {}),
        ("query", (query.astype(jnp.int32), key_, value), {}),
        ("key", (query, key_.astype(jnp.float16), value), {}),
        ("key", (query[:1], key_, value), {}),
        ("mask", (query, key_, value), {"mask": jnp.ones((3, 5), bool)}),
        ("mask", (query, key_, value), {"mask": jnp.ones((LENGTH, LENGTH), jnp.float32)}),
        ("dropout_rate", (query, key_, value), {"dropout_rate": 1.5}),
        ("dropout_key", (query, key_, value), {"dropout_rate": 0.5}),
        ("implementation", (query, key_, value), {"implementation": "magic"}),
    ]
    for name, arrays, options in wrong:
        if subject.entry.id == "memory-efficient-attention" and name == "implementation":
            continue  # names what it is instead: checked in its own test
        try:
            subject.call(subject.state, *arrays, **options)
            words = None
        except (ValueError, TypeError) as error:
            words = str(error)
        assert words is not None, f"a wrong {name} was taken: {options or arrays[0].shape}"
        assert name in words, f"{name} not named in: {words}"


# ---- accuracy ------------------------------------------------------------------------------------


@promise("Errs no more than four times what the plain formula errs in the same dtype.")
def within_budget(subject: Subject, key):
    seen = subject.example()
    for magnitude in (1.0, 5.0):  # the second: scores of about 70
        arrays = draw(key, magnitude=magnitude)
        out = subject.with_mask(arrays, seen)
        exact, _ = _formula(subject, arrays, **_said(subject, seen))
        plain, _ = _formula(subject, arrays, subject.dtype, **_said(subject, seen))
        words = f"scores times {magnitude**2:g}"
        assert_within_budget(out, exact, plain, subject.dtype, words=words)


@promise("The log-sum-exp is that of the formula; -inf where a row sees nothing.", claim="lse")
def log_sum_exp(subject: Subject, key):
    arrays, seen = draw(key), subject.example()
    _out, lse = jax.jit(
        lambda *x: subject.call(subject.state, *x, mask=subject.mask(seen.arrays), return_lse=True)
    )(*subject.cast(arrays))
    options = _said(subject, seen)
    (_, exact), (_, plain) = (
        _formula(subject, arrays, **options),
        _formula(subject, arrays, subject.dtype, **options),
    )
    assert lse.shape == (BATCH, HEADS, LENGTH)
    assert lse.dtype == jnp.float32, f"lse in {lse.dtype}"
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact))
    real = np.isfinite(exact)
    assert_within_budget(np.asarray(lse)[real], exact[real], plain[real], subject.dtype)


def _in_float64(subject: Subject):
    """The same subject in float64, for use under x64; parameters too."""
    wide = Subject(subject.entry, jnp.dtype("float64"), subject.implementation)
    graph, state = subject.parts
    wide.__dict__["parts"] = (graph, jax.tree.map(lambda x: np.asarray(x, np.float64), state))
    return wide


@promise("The gradient is the slope: central differences in float64.", dtypes=("float32",))
def gradient_vs_differences(subject: Subject, key):
    if subject.entry.gradient != "slope":
        return "its slope jumps within a step; compared with the formula in another promise"
    arrays, seen = draw(key), subject.example()
    rng = np.random.default_rng(seed_of(key) + 1)
    with jax.enable_x64(True):
        wide = _in_float64(subject)
        read = rng.standard_normal(arrays[0].shape)
        flat, tree = jax.tree.flatten((wide.state, *map(as_float64, arrays)))
        direction = [rng.standard_normal(np.shape(x)) for x in flat]

        def run(*flat):
            state, *inputs = jax.tree.unflatten(tree, flat)
            return wide.masked_gradient(
                state, *map(jnp.asarray, inputs), seen.arrays, jnp.asarray(read)
            )

        gradient = jax.tree.leaves(run(*flat)[1])
        assert len(gradient) == len(flat), "a gradient is missing"
        slope = oracles.directional(lambda *x: float(run(*x)[0][0]), flat, direction, step=1e-4)
        found = sum(np.sum(as_float64(g) * d) for g, d in zip(gradient, direction, strict=True))
        scale = sum(
            np.sum(np.abs(as_float64(g) * d)) for g, d in zip(gradient, direction, strict=True)
        )
    assert abs(found - slope) <= 1e-7 * max(1.0, scale), f"gradient {found}, differences {slope}"
    return None


def gradient_scale(gradient, of_inputs) -> float:
    """What the roundings in a gradient are measured by: its largest entry, or what is summed in it.

    Errors add up like a random walk. A parameter that many numbers share, such as a temperature,
    sums the roundings of all of them, however small the sum itself: one of the many that a gradient
    is allowed, as large as the gradients of inputs are.
    """
    inputs = [as_float64(x) for x in of_inputs]
    usual = np.sqrt(np.mean(np.square(np.concatenate([x.ravel() for x in inputs]))))
    sharing = max(x.size for x in inputs) / gradient.size
    one = usual * np.sqrt(sharing) / ROUNDINGS["bfloat16"]["gradient"]
    return max(largest(gradient), 1e-2, one)


@promise("The gradient is the slope of the float64 formula, for each input and each parameter.")
def gradient_vs_float64(subject: Subject, key):
    arrays, seen = draw(key), subject.example()
    rng = np.random.default_rng(seed_of(key) + 2)
    read = rng.standard_normal(arrays[0].shape).astype(np.float32)
    _, _, gradient = subject.gradients(arrays, seen, read)
    names = [*subject.params, "query", "key", "value"]
    exact = [*subject.params.values(), *map(as_float64, subject.cast(arrays))]
    said = _said(subject, seen)
    if subject.entry.gradient == "straight-through":
        said["around"] = exact[-3:]  # signs are of these; what moves is the surrogate

    def loss(*moved):
        params = dict(zip(names[:-3], moved[:-3], strict=True))
        formula = FORMULAS[subject.entry.id]
        return np.sum(np.cos(formula(params, *moved[-3:], **said)) * read)

    found = jax.tree.leaves(gradient)
    assert [np.shape(g) for g in found] == [np.shape(x) for x in exact]
    for index, (name, ours) in enumerate(zip(names, map(as_float64, found), strict=True)):
        for _ in range(4):
            direction = [np.zeros(np.shape(x)) for x in exact]
            direction[index] = rng.standard_normal(ours.shape)
            slope = oracles.directional(loss, exact, direction)
            scale = gradient_scale(ours, gradient[1:]) * np.linalg.norm(direction[index])
            along = np.sum(ours * direction[index])
            assert_close(along, slope, subject.dtype, "gradient", scale=scale, words=f"d {name}")
    for ours, given in zip(gradient[1:], subject.cast(arrays), strict=True):
        assert ours.dtype == given.dtype, f"a gradient in {ours.dtype}"


@promise(
    "Scores of ten thousand and rows that see nothing: finite values, finite gradients, zeros."
)
def finite_at_extremes(subject: Subject, key):
    seen = subject.example()
    blind = ~_visible(seen)
    for magnitude in (1.0, 60.0):  # the second: scores of about 1e4
        _, out, gradient = subject.gradients(draw(key, magnitude=magnitude), seen)
        out = as_float64(out)
        assert np.all(np.isfinite(out)), f"not finite at scores times {magnitude**2:g}"
        assert np.all(out[blind] == 0), "a row that sees nothing is not zero"
        for leaf in jax.tree.leaves(gradient):
            assert np.all(np.isfinite(as_float64(leaf))), "a gradient is not finite"
        assert np.all(as_float64(gradient[1])[blind] == 0), "a blind query has a gradient"


# ---- what may have no influence ------------------------------------------------------------------


def _poison(x, where, seed, subject=None):
    """Something else where it should not matter: for a subject, what its matrices can bear."""
    worst = [np.nan, np.inf, -np.inf]
    if subject is not None and subject.entry.masks == "documents":
        worst = [300.0, -300.0, 7.0]  # within a chunk a zero weight does meet what it weighs
    poison = np.random.default_rng(seed).choice(worst, size=x.shape)
    return np.where(where, poison, x).astype(np.float32)


@promise("Causal: no output depends on a later key or value, be it NaN; the Jacobian is exactly 0.")
def no_leak_from_the_future(subject: Subject, key):
    if CAUSAL not in subject.entry.patterns:
        return "not causal"
    query, key_, value = draw(key)
    start = jnp.asarray(0, jnp.int32)
    out = as_float64(subject.causal(subject.state, *subject.cast((query, key_, value)), start))
    assert np.all(np.isfinite(out))
    for row in (0, 5):
        later = (np.arange(LENGTH) > row)[:, None, None]
        worse = (_poison(x, later, row, subject) for x in (key_, value))
        bad = subject.cast((query, *worse))
        poisoned = as_float64(subject.causal(subject.state, *bad, start))
        np.testing.assert_array_equal(poisoned[:, : row + 1], out[:, : row + 1], "the future leaks")
        cotangent = np.zeros(query.shape, np.float32)
        cotangent[:, row] = 1
        pulled = subject.causal_pull(
            subject.state, *subject.cast((query, key_, value)), *subject.cast((cotangent,))
        )
        for gradient in map(as_float64, pulled):
            assert np.all(gradient[:, row + 1 :] == 0), "the Jacobian reaches the future"
        assert np.any(as_float64(pulled[1])[:, : row + 1] != 0), "the Jacobian reaches nothing"
    return None


@promise("Keys and values behind a mask may hold anything: no value and no gradient changes.")
def masked_keys_have_no_influence(subject: Subject, key):
    query, key_, value = draw(key)
    seen = subject.example(hide=True)
    hidden = ~seen.dense.any(axis=(1, 2))[..., None, None]
    clean = subject.gradients((query, *(np.where(hidden, 0, x) for x in (key_, value))), seen)
    bad = (query, *(_poison(x, hidden, n) for n, x in enumerate((key_, value))))
    for ours, expected in zip(
        jax.tree.leaves(subject.gradients(bad, seen)), jax.tree.leaves(clean), strict=True
    ):
        ours, expected = as_float64(ours), as_float64(expected)
        np.testing.assert_array_equal(ours, expected, "what is masked has influence")
    for gradient in clean[2][2:]:
        assert np.all(np.where(hidden, as_float64(gradient), 0) == 0)


@promise("Padding queries and keys, the padding masked, does not change what is real.")
def padding_changes_nothing(subject: Subject, key):
    query, key_, value = draw(key)
    real = 7
    run = jax.jit(
        lambda *x: subject.call(subject.state, *x, mask=masks.KeyPadding(jnp.full((BATCH,), real)))
    )
    alone = run(*subject.cast(x[:, :real] for x in (query, key_, value)))
    padded = subject.with_mask((query, key_, value), subject.first(real))
    assert_reordered(padded[:, :real], as_float64(alone), subject.dtype)


# ---- symmetries ----------------------------------------------------------------------------------


@promise("Permuting keys together with their values changes nothing.", claim="position-free")
def permutation_of_keys(subject: Subject, key):
    query, key_, value = draw(key)
    order = np.random.default_rng(seed_of(key)).permutation(LENGTH)
    plain = as_float64(subject.with_mask((query, key_, value)))

    def run(*arrays, orders):
        return jax.jit(lambda *x: subject.call(subject.state, *x, orders=orders))(
            *subject.cast(arrays)
        )

    permuted = run(query, key_[:, order], value[:, order], orders=(None, order))
    assert_reordered(permuted, plain, subject.dtype)
    permuted = run(query[:, order], key_, value, orders=(order, None))
    assert_reordered(permuted, plain[:, order], subject.dtype)


@promise(
    "Shifting all positions by the same amount changes nothing.", claim="translation-invariant"
)
def translation(subject: Subject, key):
    arrays = draw(key)
    seen = subject.example()
    at_zero = as_float64(subject.with_mask(arrays, seen))
    # A rotation by a thousand positions has an angle rounded by a thousand times as much.
    for offset in (3, 1000):
        moved = subject.with_mask(arrays, seen, (offset, offset))
        scale = max(1.0, largest(at_zero)) * (
            1 + offset * epsilon(jnp.float32) / epsilon(subject.dtype)
        )
        assert_reordered(moved, at_zero, subject.dtype, scale=scale, words=f"shift by {offset}")


@promise("Weights of a row that sees any key sum to one.", claim="rows-sum-to-one")
def rows_sum_to_one(subject: Subject, key):
    query, key_, value = draw(key, magnitude=2.0)
    seen = subject.example()
    out = as_float64(subject.with_mask((query, key_, np.ones_like(value)), seen))
    expected = np.broadcast_to(_visible(seen)[..., None], out.shape).astype(float)
    assert_reordered(out, expected, subject.dtype)


@promise("Fewer key heads equal the same heads repeated.", claim="gqa")
def grouped_heads(subject: Subject, key):
    query, key_, value = draw(key)
    repeated = jax.jit(lambda *x: subject.call(subject.state, *x))(
        *subject.cast((query, *(np.repeat(x, 2, axis=-2) for x in (key_, value))))
    )
    grouped = subject.with_mask((query, key_, value))
    assert_reordered(grouped, as_float64(repeated), subject.dtype)


def _prepared(subject: Subject, *arrays):
    """Query, key and value as a layer makes them one token at a time, from what it remembers."""
    module, past, found = nnx.merge(*subject.parts), Past(1), []
    steps = [[x[:, step : step + 1] for x in subject.cast(arrays)] for step in range(LENGTH)]
    module.prepare(*steps[0], past)
    tails = jax.tree.map(jnp.zeros_like, past.tails)  # as a layer's cache begins
    for step, one in enumerate(steps):
        past = Past(1, offset=step, tails=tails)
        found.append(module.prepare(*one, past))
        tails = past.tails
    return [jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True)]


def _read_prepared(subject: Subject, steps, step: int, unwritten):
    """One query of these, the keys after it unwritten."""
    query, key_, value = steps
    cache = (jnp.where(jnp.asarray(unwritten), jnp.nan, x) for x in (key_, value))
    module = nnx.merge(*subject.parts)
    written = masks.Causal() & masks.KeyPadding(jnp.asarray(step + 1))
    out = module(
        query[:, step : step + 1], *cache, mask=written, query_offset=step,
        implementation=subject.implementation,
    )  # fmt: skip
    (x,) = subject.cast((subject.input(1, step),))
    return module.finish(out, jnp.broadcast_to(x, (BATCH, *x.shape)))


@promise("Decoding step by step equals reading the whole sequence at once.", claim="decode")
def decode_equals_prefill(subject: Subject, key):
    query, key_, value = draw(key)
    whole = as_float64(
        subject.causal(
            subject.state, *subject.cast((query, key_, value)), jnp.asarray(0, jnp.int32)
        )
    )
    steps = _prepared(subject, query, key_, value) if subject.looks_back else None
    for step in (0, 1, 6, LENGTH - 1):
        unwritten = (np.arange(LENGTH) > step)[:, None, None]
        if steps is not None:
            out = _read_prepared(subject, steps, step, unwritten)
        else:
            cache = (_poison(x, unwritten, step, subject) for x in (key_, value))
            one = subject.cast((query[:, step : step + 1], *cache))
            out = subject.causal(subject.state, *one, jnp.asarray(step, jnp.int32))
        words = f"step {step}"
        assert_reordered(out[:, 0], whole[:, step], subject.dtype, words=words)


@promise("Dropout is a function of its key, and each key drops other pairs.")
def deterministic_given_a_key(subject: Subject, key):
    arrays = subject.cast(draw(key))
    run = jax.jit(
        lambda dropout_key: subject.call(
            subject.state, *arrays, dropout_rate=0.5, dropout_key=dropout_key
        )
    )
    first, second = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(as_float64(run(first)), as_float64(run(first)))
    changed = np.mean(as_float64(run(first)) != as_float64(run(second)))
    assert changed > 0.5, "two keys drop the same pairs"
    plain = as_float64(subject.with_mask(draw(key)))
    assert np.mean(as_float64(run(first)) != plain) > 0.5, "nothing is dropped"


# ---- states --------------------------------------------------------------------------------------


@promise(
    "Cut anywhere and continued from the state, a sequence gives the same numbers.", claim="state"
)
def state_continues(subject: Subject, key):
    arrays = subject.cast(draw(key))
    whole = as_float64(subject.causal(subject.state, *arrays, jnp.asarray(0, jnp.int32)))
    module = nnx.merge(*subject.parts)
    start = module.init_state((BATCH,), arrays[1].shape[-2], WIDTH, WIDTH)
    sizes = [x.shape for x in jax.tree.leaves(start)]
    assert sizes, "a state without arrays"
    for cuts in ((0, 1, 7, LENGTH), (0, LENGTH - 1, LENGTH)):
        past, parts = start, []
        for first, last in itertools.pairwise(cuts):
            piece = (x[:, first:last] for x in arrays)
            offset = jnp.asarray(first, jnp.int32)
            out, past = subject.call(
                subject.state, *piece, mask=masks.Causal(), query_offset=offset, key_offset=offset,
                initial_state=past, return_state=True, start=first,
            )  # fmt: skip
            parts.append(as_float64(out))
            assert [x.shape for x in jax.tree.leaves(past)] == sizes, "the state changes its size"
        assert_reordered(np.concatenate(parts, 1), whole, subject.dtype, words=f"cut at {cuts}")


@promise("With the sequence cut over two devices, the same numbers.", dtypes=("float32",))
def sharded_equals_whole(subject: Subject, key):
    if subject.implementation not in ("blockwise", "chunked"):
        return "checked in blockwise and chunked"
    arrays, seen = draw(key), subject.example()
    devices, axis_types = jax.devices("cpu")[:2], (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("sequence",), devices=devices, axis_types=axis_types)
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "sequence"))

    def run(state, *arrays):
        return subject.call(state, *arrays, mask=subject.mask(seen.arrays))

    with over(mesh, ring="sequence"):
        parts = [jax.device_put(x, cut) for x in subject.cast(arrays)]
        out = jax.jit(run)(subject.state, *parts)
    assert_reordered(out, as_float64(subject.with_mask(arrays, seen)), subject.dtype)
    return None


@promise("Parallel, chunked and recurrent are the same function.")
def forms_agree(subject: Subject, key):
    if subject.implementation not in RECURRENCE:
        return "has one form"
    arrays, seen = draw(key), subject.example()
    first = subject.with_mask(arrays, seen)
    for other in RECURRENCE:
        same = Subject(subject.entry, subject.dtype, other)
        assert_reordered(
            same.with_mask(arrays, seen), as_float64(first), subject.dtype, words=other
        )
    return None


# ---- memory --------------------------------------------------------------------------------------


@promise(
    "Temporaries grow linearly from n to 4n, forward and with gradients.",
    claim="linear-memory",
    dtypes=("float32",),
)
def memory_growth(subject: Subject, key):
    if subject.implementation in ("reference", "xla", "parallel"):
        return "holds the score matrix; blockwise and chunked do not"
    if subject.implementation in BACKENDS and missing(subject.implementation):
        return "the memory of the interpreter is not the kernel's"

    def memory(n):
        shapes = ((n, HEADS, WIDTH), (n, 2, WIDTH), (n, 2, WIDTH))
        arrays = [jax.ShapeDtypeStruct(s, subject.dtype) for s in shapes]

        def loss(*x):
            mask = masks.Causal() if CAUSAL in subject.entry.patterns else None
            return jnp.sum(subject.call(subject.state, *x, mask=mask))

        # The forward pass is part of it.
        return temporaries(jax.value_and_grad(loss, argnums=(0, 1, 2)), *arrays)

    small, large = memory(1024), memory(4096)
    assert large <= LINEAR_GROWTH * small, f"{small:,} bytes grow to {large:,}"
    full = 4096 * 4096 * HEADS * 4
    assert large < full / 4, f"{large:,} bytes; the score matrix has {full:,}"
    return None
