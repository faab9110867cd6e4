"""Checkpoints of a run: a folder with `config.json`, and two things per saved step.

    run/config.json           what the run is (model, mechanism, data, vocabulary, seed)
    run/step-00000200/        every array of the state, written by orbax
    run/step-00000200.json    its receipt: size and SHA-256 of each file, arrays, history

The receipt appears by a rename after everything else is written, and older checkpoints are removed
only after that: a run killed at any moment, or a disk that fills up, leaves the last good
checkpoint as it was.  A folder without a receipt was never finished and does not count.  Nothing
else is passed over silently: a checkpoint whose files are not those in its receipt is an error that
names it, and names the newest one that is whole.

Arrays that lie on a mesh are written by the processes that hold them, all at once, into one folder
that all of them see; the first process writes the receipt.  A checkpoint does not know of meshes:
it is restored onto whichever one the state it is restored into lies on.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.distributed import processes
from attnlab.training.config import RunConfig
from attnlab.training.loop import History, TrainState

CONFIG_FILE = "config.json"
LONGEST_WAIT = 300  # seconds that a process waits for the others to write their parts
RECEIPT = re.compile(r"step-(\d{8})\.json")
UNFINISHED = re.compile(r"step-\d{8}\..*orbax-checkpoint-tmp.*")


class CheckpointError(Exception):
    """A checkpoint, or a folder of them, that cannot be read or written; names its path."""


class RunFolder:
    """The folder of one run; made by `create` or found by `open`."""

    def __init__(self, path: Path, config: RunConfig, keep: int = 3):
        self.path = path
        self.config = config
        self.keep = keep

    @classmethod
    def create(cls, path: str | os.PathLike, config: RunConfig, *, keep: int = 3) -> "RunFolder":
        """A new run in an empty or missing folder; the `keep` newest checkpoints will stay.

        Raises CheckpointError where the folder holds anything, or cannot be written.
        """
        path = Path(path).absolute()
        try:
            if (path / CONFIG_FILE).exists():
                raise CheckpointError(
                    f"{path} already holds a run; resume it (--resume), or choose another folder."
                )
            if path.exists() and not path.is_dir():
                raise CheckpointError(f"{path} is a file; a run needs a folder.")
            if path.is_dir() and any(path.iterdir()):
                raise CheckpointError(f"{path} holds other files; choose an empty or a new folder.")
            path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(config.to_json(), indent=2, ensure_ascii=False) + "\n"
            _write(path / CONFIG_FILE, text)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror or error}."
            ) from error
        return cls(path, config, keep)

    @classmethod
    def open(cls, path: str | os.PathLike, *, keep: int = 3) -> "RunFolder":
        """The run in `path`; raises CheckpointError where that is not a run of attnlab."""
        path = Path(path).absolute()
        file = path / CONFIG_FILE
        if not file.is_file():
            state = "has no " + CONFIG_FILE if path.is_dir() else "is not a folder"
            raise CheckpointError(f"{path} is not a run of attnlab: it {state}.")
        try:
            return cls(path, RunConfig.from_json(json.loads(file.read_text("utf-8"))), keep)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} is not the configuration of a run: {error}.") from error

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint, ascending."""
        found = (RECEIPT.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def folder(self, step: int) -> Path:
        """The folder with the arrays of one step's checkpoint."""
        return self.path / f"step-{step:08d}"

    def receipt(self, step: int) -> Path:
        """The file that says what one step's checkpoint holds."""
        return self.path / f"step-{step:08d}.json"

    def save(self, state: TrainState, history: History) -> Path:
        """Writes a checkpoint, waits until it is whole, then removes those beyond `keep`.

        Of several processes each has to call it.

        Raises CheckpointError, naming the checkpoint that failed and the newest good one.
        """
        step, arrays = int(state.step), _named(state)
        target = self.folder(step)
        try:
            if processes.is_first():
                self.receipt(step).unlink(missing_ok=True)
            with _quiet(), _checkpointer() as checkpointer:
                checkpointer.save(target, arrays, force=True)
                checkpointer.wait_until_finished()
            if processes.is_first():
                self._finish(step, arrays, history)
            processes.barrier(f"checkpoint of step {step}", float(LONGEST_WAIT))
        except Exception as error:  # orbax and tensorstore raise many kinds
            if processes.is_first():
                self._sweep()
                shutil.rmtree(target, ignore_errors=True)
            raise CheckpointError(
                f"{target} could not be written: {_brief(error)}. {self._last_good()}"
            ) from error
        if processes.is_first():
            self._sweep()
            for old in self.steps()[: -self.keep]:
                self.receipt(old).unlink(missing_ok=True)
                shutil.rmtree(self.folder(old), ignore_errors=True)
        return target

    def _finish(self, step: int, arrays: dict[str, Any], history: History) -> None:
        receipt = {
            "step": step,
            "files": {name: _fingerprint(at) for name, at in _files(self.folder(step)).items()},
            "arrays": {name: _kind(array) for name, array in arrays.items()},
            "losses": history.losses,
            "evaluations": history.evaluations,
        }
        _write(self.receipt(step), json.dumps(receipt))

    def check(self, step: int) -> dict[str, Any]:
        """The receipt of a checkpoint, after comparing every file with it.

        Raises CheckpointError naming what is missing, truncated or changed.
        """
        try:
            receipt = json.loads(self.receipt(step).read_text("utf-8"))
            wanted, history = receipt["files"], (receipt["losses"], receipt["evaluations"])
            if receipt["step"] != step or not isinstance(wanted, dict) or None in history:
                raise ValueError("it is of another step")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.receipt(step)} is damaged: {_brief(error)}.") from error
        files = _files(self.folder(step))
        for name, (size, digest) in wanted.items():
            file = self.folder(step) / name
            if name not in files:
                raise CheckpointError(f"{self.folder(step)} is damaged: {name} is missing.")
            if file.stat().st_size != size:
                found = f"{file.stat().st_size} bytes long, {size} were written"
                raise CheckpointError(f"{self.folder(step)} is damaged: {name} is {found}.")
            if _fingerprint(file)[1] != digest:
                raise CheckpointError(
                    f"{self.folder(step)} is damaged: {name} is not what was written (SHA-256)."
                )
        return receipt

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, History]:
        """The newest checkpoint, or that of `step`, as a state shaped `like` the given one.

        Each array comes to lie where that of `like` does, wherever it lay when it was saved.

        Raises CheckpointError where there is none, or where it is damaged or of another model; it
        never takes another than the one asked for.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.path} holds no finished checkpoint.")
        step = steps[-1] if step is None else step
        if step not in steps:
            have = ", ".join(map(str, steps))
            raise CheckpointError(f"{self.path} has no checkpoint of step {step}; it has {have}.")
        try:
            receipt = self.check(step)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {self._last_good(below=step)}") from error
        expected = _named(like)
        kinds = {name: _kind(array) for name, array in expected.items()}
        for name in sorted(kinds.keys() | receipt["arrays"].keys()):
            here, there = kinds.get(name), receipt["arrays"].get(name)
            if here != there:
                raise CheckpointError(
                    f"{self.folder(step)} is of another model: {name} is {there or 'missing'},"
                    f" expected {here or 'nothing by that name'}."
                )
        try:
            with _quiet(), _checkpointer() as checkpointer:
                wanted = {name: _where(array) for name, array in expected.items()}
                saved = checkpointer.restore(self.folder(step), wanted)
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise CheckpointError(
                f"{self.folder(step)} cannot be read: {_brief(error)}."
            ) from error
        leaves = [x if _on_mesh(x) else jnp.asarray(x) for x in map(saved.get, expected)]
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        evaluations = [(int(at), float(loss)) for at, loss in receipt["evaluations"]]
        return state, History(list(receipt["losses"]), evaluations)

    def _last_good(self, below: int | None = None) -> str:
        for step in reversed(self.steps()):
            if below is not None and step >= below:
                continue
            try:
                self.check(step)
            except CheckpointError:
                continue
            return f"The newest good checkpoint is that of step {step}: {self.folder(step)}."
        return "There is no other good checkpoint."

    def _sweep(self) -> None:
        """Removes what an interrupted save left behind."""
        for entry in self.path.iterdir():
            if UNFINISHED.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.suffix == ".part":
                entry.unlink(missing_ok=True)


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer(async_options=ocp.AsyncOptions(timeout_secs=LONGEST_WAIT))


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree, in order, by their path; NumPy's where they lie on no mesh."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): leaf if _on_mesh(leaf) else np.asarray(leaf)
        for path, leaf in leaves
    }


def _on_mesh(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def _where(array: Any) -> Any:
    """What orbax is to restore: an array of this process, or parts of one on a mesh."""
    if not _on_mesh(array):
        return array
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _kind(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _files(folder: Path) -> dict[str, Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}


def _fingerprint(file: Path) -> tuple[int, str]:
    """The size in bytes and the SHA-256 of a file."""
    data = file.read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _brief(error: Exception) -> str:
    """An error in a few words; the operating system's own where it is the cause."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    if code := re.search(r"os_error_code='(\d+)'", text):  # as tensorstore tells it
        return os.strerror(int(code[1]))
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}".rstrip(": .")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what orbax's threads say of an error that is raised anyway.

    They log its traceback; and where one array of several cannot be written, the others' answers
    come when their event loop is already closed, which Python prints as "Exception ignored".
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def unraisable(found: Any) -> None:
        if "Event loop is closed" not in str(found.exc_value):
            hook(found)

    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = unraisable
    try:
        yield
    except Exception:
        time.sleep(0.2)  # the threads' last words
        raise
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook
