"""Linear regression in context: the rows, the estimators beside NumPy, risks in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.tasks import LinearRegression

LAYOUTS = ("interleaved", "joined")


def points(task, batch):
    """x and y of each row in float64, y of a question left out where it cannot be read."""
    inputs = np.asarray(batch.inputs, np.float64)
    if task.layout == "interleaved":
        return inputs[:, ::2, :-1], inputs[:, 1::2, -1]
    return inputs[:, :, :-1], inputs[:, :-1, -1]


def by_loops(task, batch, solve):
    """What an estimator says at each place asked, one row and one prefix at a time."""
    xs, ys = points(task, batch)
    length = batch.inputs.shape[1]
    every = range(0, length, 2) if task.layout == "interleaved" else [length - 1]
    said = np.zeros((len(xs), length))
    for row, (x, y) in enumerate(zip(xs, ys, strict=True)):
        for place in every:
            n = place // 2 if task.layout == "interleaved" else place
            said[row, place] = x[n] @ solve(x[:n], y[:n]) if n else 0
    return said


@pytest.mark.parametrize("length", [3, 8, 13])
def test_an_interleaved_row_is_x_then_y_on_one_line(keys, length):
    task = LinearRegression(dimension=3)
    batch = task.rows(keys("rows"), 20, length)
    inputs, targets, asked = (np.asarray(part) for part in batch)
    assert inputs.shape == (20, length, task.input_width) == (20, length, 4)
    assert inputs.dtype == targets.dtype == np.float32
    np.testing.assert_array_equal(asked, np.broadcast_to(np.arange(length) % 2 == 0, asked.shape))
    assert (inputs[:, ::2, -1] == 0).all()
    assert (inputs[:, 1::2, :-1] == 0).all()
    assert (targets[:, 1::2] == 0).all()
    answered = inputs[:, 1::2, -1]  # the answer follows, but for a question at the end
    np.testing.assert_array_equal(targets[:, ::2][:, : answered.shape[1]], answered)
    on_one_line(inputs[:, ::2, :-1], targets[:, ::2])


def test_a_joined_row_hides_its_last_y(keys):
    task = LinearRegression(dimension=3, layout="joined")
    inputs, targets, asked = (np.asarray(part) for part in task.rows(keys("rows"), 20, 9))
    assert inputs.shape == (20, 9, task.input_width)
    np.testing.assert_array_equal(asked, np.broadcast_to(np.arange(9) == 8, (20, 9)))
    assert (inputs[:, -1, -1] == 0).all()
    assert (targets[:, :-1] == 0).all()
    y = np.concatenate([inputs[:, :-1, -1], targets[:, -1:]], 1)
    on_one_line(inputs[..., :-1], y)


def on_one_line(x, y):
    """Each row has a w of its own that gives every y exactly, and is not made of the x drawn."""
    for xs, ys in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        w = np.linalg.lstsq(xs, ys)[0]
        np.testing.assert_allclose(xs @ w, ys, atol=1e-5)
        if len(xs) >= len(w):
            nearest = np.abs(x.reshape(-1, 1) - w[None, :]).min(0)
            assert (nearest > 1e-5).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_x_w_and_noise_are_standard_normal(keys, layout):
    task = LinearRegression(dimension=2, noise=0.5, layout=layout)
    x, y = points(task, task.rows(keys("rows"), 3000, 60))
    x = x[:, : y.shape[1]]
    w = np.stack([np.linalg.lstsq(a, b)[0] for a, b in zip(x, y, strict=True)])
    noise = y - np.einsum("bpd,bd->bp", x, w)
    freedom = (x.shape[1] - 2) / x.shape[1]
    np.testing.assert_allclose(noise.var(), 0.25 * freedom, rtol=0.03)
    for sample in (x.reshape(-1, 2), w):
        np.testing.assert_allclose(sample.mean(0), 0, atol=0.06)
        np.testing.assert_allclose(np.cov(sample.T), np.eye(2), atol=0.08)
    deep = (x / x.std()).ravel()
    np.testing.assert_allclose((deep**4).mean(), 3, atol=0.1)  # a uniform x would give 1.8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_the_estimators_are_those_of_numpy(keys, layout, noise):
    task = LinearRegression(dimension=3, noise=noise, layout=layout)
    batch = task.rows(keys("rows"), 6, 12)

    def ridge(strength):  # as least squares with D more rows
        def solve(x, y):
            more = np.concatenate([x, np.sqrt(strength) * np.eye(3)])
            return np.linalg.lstsq(more, np.concatenate([y, np.zeros(3)]))[0]

        return solve

    def step(rate):
        return lambda x, y: (
            -rate(len(x)) * np.mean([(0 - b) * a for a, b in zip(x, y, strict=True)], 0)
        )

    best = step(lambda n: n / (n + 4 + noise**2))
    pairs = [
        (task.least_squares(batch), lambda x, y: np.linalg.pinv(x) @ y),
        (task.ridge(batch, strength=0.3), ridge(0.3)),
        (task.gradient_descent(batch), best),
        (task.gradient_descent(batch, rate=0.3), step(lambda n: 0.3)),
        (task.averaging(batch), lambda x, y: (y[:, None] * x).mean(0)),
    ]
    if noise:
        pairs.append((task.ridge(batch), ridge(noise**2)))
    places = np.asarray(batch.asked)
    for got, solve in pairs:
        assert got.shape == (6, 12)
        expected = by_loops(task, batch, solve)
        np.testing.assert_allclose(np.asarray(got)[places], expected[places], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["least_squares", "ridge", "gradient_descent", "averaging"])
def test_no_estimator_looks_ahead(keys, name):
    task = LinearRegression(dimension=2, noise=0.1)
    one, two = keys("one", "two")
    batch, other = task.rows(one, 4, 14), task.rows(two, 4, 14)
    for place in (0, 4, 12):  # all behind the question is changed
        mixed = batch.inputs.at[:, place + 1 :].set(other.inputs[:, place + 1 :])
        got = getattr(task, name)(batch._replace(inputs=mixed))
        np.testing.assert_array_equal(
            got[:, : place + 1], getattr(task, name)(batch)[:, : place + 1]
        )


def test_without_noise_least_squares_is_exact_from_d_examples_on(keys):
    task = LinearRegression(dimension=5)
    batch = task.rows(keys("rows"), 4000, 19)
    errors = task.errors(task.least_squares(batch), batch)
    expected = np.maximum(1 - np.arange(10) / 5, 0)
    np.testing.assert_allclose(errors, expected, atol=0.06)
    assert (errors[6:] < 1e-4).all()


def test_the_risks_with_noise_are_those_in_closed_form(keys):
    d, noise = 3, 0.8
    task = LinearRegression(d, noise)
    batch = task.rows(keys("rows"), 20_000, 21)
    n = np.arange(11)
    floor = noise**2 / d
    wide = d + 1 + noise**2
    step = task.errors(task.gradient_descent(batch), batch)
    np.testing.assert_allclose(step, wide / (n + wide) + floor, rtol=0.05)
    squares = task.errors(task.least_squares(batch), batch)
    enough = n > d + 3  # the variance of the risk, too, is finite
    expected = floor * (1 + d / (n - d - 1.0)[enough])
    np.testing.assert_allclose(squares[enough], expected, rtol=0.06)
    best = task.errors(task.ridge(batch), batch)
    for other in (step, squares, task.errors(task.averaging(batch), batch)):
        assert (best <= other * 1.0001).all()
    nothing = task.errors(jnp.zeros((20_000, 21)), batch)
    np.testing.assert_allclose(nothing, 1 + floor, rtol=0.05)


def test_the_rate_left_out_is_the_best_one(keys):
    task = LinearRegression(dimension=4, noise=0.5, layout="joined")
    batch = task.rows(keys("rows"), 50_000, 11)
    best = 10 / (10 + 5 + 0.25)
    error = {
        rate: float(task.loss(task.gradient_descent(batch, rate=rate), batch))
        for rate in (0.8 * best, best, 1.2 * best)
    }
    assert min(error, key=error.get) == best
    np.testing.assert_allclose(
        task.loss(task.gradient_descent(batch), batch), error[best], rtol=1e-5
    )


def test_the_loss_is_the_mean_of_the_errors_where_asked(keys):
    task = LinearRegression(dimension=2)
    batch = task.rows(keys("rows"), 2, 5)
    wrong = np.array([[1, 50, 2, 50, 3], [3, 50, 4, 50, 5]], np.float32)
    errors = task.errors(batch.targets + wrong, batch)
    np.testing.assert_allclose(errors, [10 / 4, 20 / 4, 34 / 4], rtol=1e-5)
    np.testing.assert_allclose(task.loss(batch.targets + wrong, batch), 64 / 12, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_follow_their_key_also_compiled(keys, layout):
    task, (one, two) = LinearRegression(layout=layout), keys("one", "two")
    first = task.rows(one, 8, 10)
    compiled = jax.jit(task.rows, static_argnums=(1, 2))(one, 8, 10)
    for a, b, c in zip(first, task.rows(one, 8, 10), compiled, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-5)
    other = task.rows(two, 8, 10)
    assert not np.isclose(first.inputs, other.inputs).all(-1).any()
    assert not np.array_equal(first.targets, other.targets)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dimension": 0}, "dimension: expected at least 1, got 0"),
        ({"noise": -0.5}, r"noise: expected at least 0, got -0\.5"),
        ({"layout": "mixed"}, "layout: expected 'interleaved' or 'joined', got 'mixed'"),
    ],
)
def test_a_task_of_wrong_settings_is_refused(as_users_run_it, options, words):
    with pytest.raises(ValueError, match=words):
        LinearRegression(**options)


@pytest.mark.parametrize(("layout", "least"), [("interleaved", 3), ("joined", 2)])
def test_a_row_too_short_is_refused(layout, least):
    with pytest.raises(ValueError, match=f"length: expected at least {least}, got {least - 1}"):
        LinearRegression(layout=layout).rows(jax.random.key(0), 1, least - 1)


def test_ridge_without_strength_is_refused():
    task = LinearRegression()
    with pytest.raises(
        ValueError, match=r"strength: expected more than 0, got 0\.0; use least_squ"
    ):
        task.ridge(task.rows(jax.random.key(0), 1, 5))
