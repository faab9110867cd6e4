"""What every test stands on: strict numerics, fresh keys, drawn structure, one support table.

Promotion between dtypes is an error, promotion between ranks is an error, warnings are errors
(pyproject.toml), and hypothesis draws the same examples on every machine.
"""

import itertools
import os
import zlib
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest

from tests.contract import support

BUILD = Path(__file__).parent.parent / "build"
MOST_MAPS = 30_000

# A mesh of eight, on any machine.
jax.config.update("jax_num_cpu_devices", 8)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiled programs are kept between runs, one folder to a worker: two workers never write one file.
jax.config.update(
    "jax_compilation_cache_dir",
    str(BUILD / "jax-cache" / os.environ.get("PYTEST_XDIST_WORKER", "main")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

hypothesis.settings.register_profile(
    "attnlab",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.filter_too_much,
    ],
)
hypothesis.settings.load_profile("attnlab")


def _seed(request) -> int:
    return zlib.crc32(request.node.nodeid.encode())


@pytest.fixture
def keys(request):
    """`query_key, value_key = keys("query", "value")`: keys by name, no name twice."""
    root, taken = jax.random.key(_seed(request)), set()

    def draw(*names):
        repeated = [name for name in names if name in taken]
        if repeated or len(set(names)) != len(names):
            raise ValueError(f"keys: each name may be drawn once in a test, repeated {names}.")
        taken.update(names)
        drawn = tuple(jax.random.fold_in(root, zlib.crc32(name.encode())) for name in names)
        return drawn if len(drawn) > 1 else drawn[0]

    return draw


@pytest.fixture
def rng(request) -> np.random.Generator:
    """A NumPy generator of its own for each test; the numbers of a test never depend on another."""
    return np.random.default_rng(_seed(request))


@pytest.fixture
def as_users_run_it():
    """Without the run-time type checks of the tests, so that our own refusals are what is seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def lightly_compiled():
    """On a CPU, compiled with few optimisations: the same arithmetic, in two thirds of the time.

    For tests of values, thousands of small programs each; not for what reads a compiler's counts.
    """
    option = "jax_disable_most_optimizations"
    before = jax.config.read(option)
    jax.config.update(option, before or jax.default_backend() == "cpu")
    yield
    jax.config.update(option, before)
    jax.clear_caches()  # other tests compare bits with those of other processes


_tests_done = itertools.count(1)


def pytest_runtest_teardown(item):
    """Forget compiled programs before Linux runs out of maps: each takes some, of 65,530 in all."""
    if next(_tests_done) % 50 == 0 and _maps() > MOST_MAPS:
        jax.clear_caches()


def _maps() -> int:
    """Regions of memory that this process has mapped; 0 where the system does not say."""
    listed = Path("/proc/self/maps")
    return listed.read_bytes().count(b"\n") if listed.exists() else 0


def pytest_runtest_logreport(report):
    support.collect(report)


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):  # under pytest-xdist the controller writes
        support.write(BUILD / "support.json")
