"""Several processes as one run: joining, a watch on the others, and leaving when one is gone.

`jax.distributed` joins the processes and compares heartbeats, and collectives on CPUs are gloo's.
A collective whose partner died waits for ever, and what JAX does about it is to abort the process
once the heartbeats of another have stopped.  The watch here says first who is gone, and ends the
process with exit code `GONE`:

    in each process, every second     its count of beats goes into the coordinator's store
    a count that stands still for     "process 1 of 2 is gone: …", exit code 75
      `patience` seconds
    a process that fails              tells the others why, and they end within seconds

Process 0 also holds the coordinator.  When it is killed there is no store to ask, and JAX ends the
others at once with a message of its own; when it is only unreachable, the watch does.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

GONE = 75  # exit code of a process that ended because another one did: try again (EX_TEMPFAIL)
PATIENCE = 20.0  # seconds
INTERVAL = 1.0  # seconds between beats
BEATS = "attnlab/beats"
DONE, FAILED = "done", "failed: "


def is_first() -> bool:
    """Whether this process is the one that prints and writes what is needed once."""
    return jax.process_index() == 0 if _client() is not None else True


def barrier(name: str, seconds: float = PATIENCE) -> None:
    """Waits until every process is here; raises RuntimeError after so many seconds.

    Does nothing where there is one process.  Each name may be used once.
    """
    client = _client()
    if client is None:
        return
    try:
        client.wait_at_barrier(f"attnlab/{name}", int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(f"not every process came to {name!r} in {seconds:g} seconds") from error


@contextlib.contextmanager
def together(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    *,
    patience: float = PATIENCE,
    tell: Callable[[BaseException], int] | None = None,
) -> Iterator[None]:
    """Within this context the process is one of several that make the same calls.

    Enter it before anything is computed.  An error inside is told by `tell`, which gives the exit
    code (by default the traceback, and 1), the others are told too, and the process ends: after a
    step that not all have taken, there is nothing that they could still do together.  Without
    `coordinator`, `processes` and `process_id` there is one process, and nothing is done.

    Args:
      coordinator: address and port of process 0, such as "localhost:9876".
      processes: how many there are.
      process_id: which one this is, from 0.
      patience: seconds without a sign of life after which a process counts as gone.

    Raises:
      ValueError: some of the three are missing, or make no sense.
    """
    if coordinator is None and processes is None and process_id is None:
        yield
        return
    me, count = join(coordinator, processes, process_id, patience=patience)
    watch = Watch(me, count, patience)
    watch.start()
    try:
        yield
        watch.finish()
    except BaseException as error:
        watch.fail(error, tell or _tell)
    jax.distributed.shutdown()


def join(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    *,
    patience: float = PATIENCE,
) -> tuple[int, int]:
    """`jax.distributed.initialize` with waits that end, and gloo for collectives on CPUs.

    Returns which process this is, of how many.  Raises ValueError naming the argument that is
    missing or makes no sense.
    """
    if coordinator is None or processes is None or process_id is None:
        raise ValueError(
            "coordinator, processes, process_id: expected all three or none, got"
            f" {coordinator!r}, {processes}, {process_id}."
        )
    if ":" not in coordinator:
        raise ValueError(f"coordinator: expected host:port, got {coordinator!r}.")
    if not 0 <= process_id < processes:
        raise ValueError(f"process_id: expected 0 .. {processes - 1}, got {process_id}.")
    if patience < 3 * INTERVAL:
        raise ValueError(f"patience: expected {3 * INTERVAL:g} seconds or more, got {patience:g}.")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=max(60, int(patience)),
        # JAX's own answer comes after ours, which says who is gone.
        heartbeat_timeout_seconds=int(2 * patience),
        shutdown_timeout_seconds=int(patience),
    )
    return process_id, processes


class Watch:
    """Two threads: one beats and reads the beats of the others, one looks at the clock.

    The second asks nobody, so that it also ends a process whose questions are not answered.
    """

    def __init__(self, me: int, count: int, patience: float):
        self.me, self.count, self.patience = me, count, patience
        self._alone, self._stopped = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._last_words = False
        now = time.monotonic()
        self._answered = now
        self._beats = {i: ("", now) for i in range(count) if i != me}

    def start(self) -> None:
        """Starts both threads."""
        for work in (self._beat, self._look):
            threading.Thread(target=work, daemon=True).start()

    def finish(self) -> None:
        """Waits until the others have done their part too; from then on nobody is missed."""
        self._say(DONE)
        self._alone.wait()
        barrier("the end", self.patience)
        self._stopped.set()

    def fail(self, error: BaseException, tell: Callable[[BaseException], int]) -> NoReturn:
        """Ends this process because of an error of its own, or of what another one's end caused."""
        if any(isinstance(e, RuntimeError) for e in (error, error.__cause__)):
            time.sleep(self.patience + 3 * INTERVAL)  # if another is gone, the watch says so
        code = tell(error)
        brief = " ".join(str(error).split())[:300]
        with contextlib.suppress(Exception):
            self._say(f"{FAILED}{type(error).__name__}: {brief}")
            time.sleep(3 * INTERVAL)  # process 0 holds the store that the others read this in
        _leave(code)

    def _say(self, text: str) -> None:
        with self._lock:
            if not self._last_words:
                _client().key_value_set(f"{BEATS}/{self.me}", text, allow_overwrite=True)
            self._last_words |= not text.isdigit()

    def _beat(self) -> None:
        beats = 0
        while not self._stopped.wait(INTERVAL):
            try:
                self._say(str(beats := beats + 1))
                found = dict(_client().key_value_dir_get(BEATS))
            except Exception:  # no answer: the other thread counts the seconds
                continue
            self._read({int(name.rsplit("/", 1)[1]): text for name, text in found.items()})

    def _read(self, found: dict[int, str]) -> None:
        now = time.monotonic()
        self._answered = now
        for i, (last, _) in list(self._beats.items()):
            text = found.get(i, "")
            if text.startswith(FAILED):
                self._give_up(i, f"it {text}")
            if text == DONE:
                del self._beats[i]
            elif text != last:
                self._beats[i] = (text, now)
        if not self._beats:
            self._alone.set()

    def _look(self) -> None:
        while not self._stopped.wait(INTERVAL / 2):
            now = time.monotonic()
            if self.me and now - self._answered > self.patience:
                self._give_up(0, f"no answer from it for {self.patience:g} seconds")
            if now - self._answered > self.patience / 2:
                continue  # no news of anyone
            for i, (_, since) in list(self._beats.items()):
                if now - since > self.patience:
                    self._give_up(i, f"no sign of life for {self.patience:g} seconds")

    def _give_up(self, other: int, why: str) -> NoReturn:
        print(
            f"error: process {other} of {self.count} is gone: {why}. Process {self.me} stops;"
            " resume from the last checkpoint with the processes that remain.",
            file=sys.stderr,
            flush=True,
        )
        _leave(GONE)


def _tell(error: BaseException) -> int:
    traceback.print_exception(error)
    return 1


def _leave(code: int) -> NoReturn:
    """Ends the process at once: what waits for another process would wait for ever."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _client() -> Any:
    """The coordinator's store, None where there is one process; JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client
