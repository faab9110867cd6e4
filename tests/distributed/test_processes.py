"""Several real processes: the numbers of one, and what the others do when one is gone."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from attnlab.distributed import processes
from attnlab.training import RunFolder, train_language_model
from tests.distributed.worker import STEPS, TEXT, tiny

pytestmark = pytest.mark.usefixtures("lightly_compiled")

ROOT = Path(__file__).parent.parent.parent
LOSS = {"rtol": 1e-5, "atol": 0.0}  # sums of float32 in another order
PATIENCE = 6.0
SLACK = 20.0  # seconds that a busy machine may take to end a process
LONGEST = 240  # seconds that anything may take


@pytest.fixture(scope="module")
def alone(lightly_compiled):
    """The losses of one device."""
    return train_language_model(*tiny(), evaluate_every=None)[1].losses


@contextlib.contextmanager
def started(count, devices, arguments):
    """So many processes with so many devices each; none outlives this context."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", *arguments(coordinator, me)],
            cwd=ROOT,
            env={**os.environ, **settings},
            **pipes,
        )
        for me in range(count)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def command(path, count, mesh):
    text = path.parent / "text.txt"
    text.write_text(TEXT)
    options = (
        f"--attention alibi --data {text} --steps {STEPS} --context 16 --batch 4 --layers 1"
        " --width 16 --heads 4 --dropout 0.1 --lr 0.01 --warmup 2 --sample-length 5"
        f" --checkpoint-dir {path} --mesh {mesh} --processes {count}"
    )

    def arguments(coordinator, me):
        where = ["--coordinator", coordinator, "--process-id", str(me)]
        return ["attnlab.cli", "train", *options.split(), *where]

    return arguments


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(2, 2, "2x2"), pytest.param(4, 1, "2x2", marks=pytest.mark.slow)],
)
def test_processes_have_the_numbers_of_one(tmp_path, alone, count, devices, mesh):
    run = tmp_path / "run"
    with started(count, devices, command(run, count, mesh)) as running:
        told = [process.communicate(timeout=LONGEST) for process in running]
    for process, (_, errors) in zip(running, told, strict=True):
        assert process.returncode == 0, errors
    assert "saved; sample from it" in told[0][0]
    assert all("step" not in out for out, _ in told[1:])  # one speaks for all
    losses = RunFolder.open(run).check(STEPS)["losses"]
    np.testing.assert_allclose(losses, alone, **LOSS)


def befall(folder, event, victim):
    """What the process that remains of two does after an event: exit code, words and seconds."""
    arguments = ["tests.distributed.worker", str(folder.path)]

    def worker(coordinator, me):
        return [*arguments, coordinator, "2", str(me), str(PATIENCE), event, str(victim)]

    with started(2, 2, worker) as running:
        gone, other = running[victim], running[1 - victim]
        if event != "error":
            ready, _, _ = select.select([gone.stdout], [], [], LONGEST)
            while ready and gone.stdout.readline() not in ("now\n", ""):
                pass
        else:
            gone.wait(timeout=LONGEST)
        began = time.monotonic()
        _, errors = other.communicate(timeout=LONGEST)
        seconds = time.monotonic() - began
    return other.returncode, errors, seconds


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", tiny()[1])


@pytest.mark.parametrize(
    ("event", "last"), [("save", 4), pytest.param("step", 4, marks=pytest.mark.slow)]
)
def test_when_one_is_killed_the_other_stops_and_one_goes_on(folder, alone, event, last):
    """Between steps, or in the middle of a checkpoint, which then does not count."""
    code, errors, seconds = befall(folder, event, victim=1)
    assert code == processes.GONE, errors
    assert "error: process 1 of 2 is gone: no sign of life for 6 seconds" in errors
    assert "resume from the last checkpoint" in errors
    assert seconds < PATIENCE + SLACK
    assert folder.steps()[-1] == last
    _, history = train_language_model(*tiny(), folder=folder, resume=True, save_every=None)
    np.testing.assert_allclose(history.losses, alone, **LOSS)
    assert folder.steps()[-1] == STEPS
    assert sorted(path.name for path in folder.path.glob("*tmp*")) == []


@pytest.mark.slow
def test_when_the_first_is_killed_jax_ends_the_others(folder):
    """The coordinator goes with it, and JAX aborts at once; only its own words are certain."""
    code, errors, seconds = befall(folder, "step", victim=0)
    assert code in (processes.GONE, -signal.SIGABRT), errors
    assert "process 0 of 2 is gone" in errors or "the leader task was" in errors
    assert seconds < PATIENCE + SLACK


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_is_missed_too(folder, victim):
    """Stopped, with all its connections open."""
    code, errors, seconds = befall(folder, "stop", victim)
    assert code == processes.GONE, errors
    assert f"process {victim} of 2 is gone" in errors
    assert PATIENCE - 3 < seconds < PATIENCE + SLACK


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_fails_tells_the_others_why(folder, victim):
    code, errors, seconds = befall(folder, "error", victim)
    assert code == processes.GONE, errors
    assert f"process {victim} of 2 is gone: it failed: ValueError: no such luck" in errors
    assert seconds < SLACK


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, 2, 0), "expected all three or none, got None, 2, 0"),
        (("localhost:1", 2, None), "expected all three or none"),
        (("localhost", 2, 0), "coordinator: expected host:port, got 'localhost'"),
        (("localhost:1", 2, 2), r"process_id: expected 0 .. 1, got 2"),
    ],
)
def test_processes_that_cannot_be_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words), processes.together(*arguments):
        pass
    with pytest.raises(ValueError, match="patience: expected 3 seconds or more, got 1"):
        processes.join("localhost:1", 2, 0, patience=1.0)


def test_one_process_alone_has_nobody_to_wait_for():
    with processes.together(None, None, None):
        assert processes.is_first()
        processes.barrier("nobody")
