"""Real text, character by character: Tiny Shakespeare, the standard library's source, a file.

A corpus is split into a training and a validation part (the last tenth); the vocabulary is read
from the training part, and id 0 stands for any character that it has never seen.  Batches are
drawn by counter: batch = f(key), and the trainer makes the key from (seed, step), so a resumed run
sees exactly what an uninterrupted one sees.

Tiny Shakespeare is looked for as `tinyshakespeare.txt` in the folder named by the environment
variable ATTNLAB_DATA, then in attnlab's cache folder, and is otherwise downloaded there; its
SHA-256 is checked each time.
"""

import hashlib
import os
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Int, Key

SHAKESPEARE_FILE = "tinyshakespeare.txt"
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Vocabulary:
    """Characters and their ids: `characters[i]` has id i + 1, and id 0 is any other character."""

    characters: str

    def __post_init__(self):
        if len(set(self.characters)) != len(self.characters):
            raise ValueError("characters: expected each character once, got a repeated one.")

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        """The vocabulary of a text, in code point order."""
        return cls("".join(sorted(set(text) - {UNKNOWN})))

    @property
    def size(self) -> int:
        """How many ids there are, the unknown character included."""
        return len(self.characters) + 1

    def encode(self, text: str, *, strict: bool = True) -> np.ndarray:
        """The ids of a text, int32.

        A character outside the vocabulary raises ValueError, or becomes id 0 with `strict=False`.
        """
        ids = {character: i + 1 for i, character in enumerate(self.characters)}
        if strict:
            for position, character in enumerate(text):
                if character not in ids:
                    raise ValueError(
                        f"text: {character!r} at position {position} is not among the"
                        f" {len(ids)} characters of the vocabulary; leave it out, or encode with"
                        " strict=False."
                    )
        return np.array([ids.get(character, 0) for character in text], np.int32)

    def decode(self, ids) -> str:
        """The text of a one-dimensional sequence of ids."""
        return "".join((UNKNOWN + self.characters)[int(i)] for i in ids)


@dataclass(frozen=True)
class Corpus:
    """A text cut into a training and a validation part, as ids of one vocabulary."""

    name: str
    vocabulary: Vocabulary
    train: np.ndarray
    validation: np.ndarray

    @classmethod
    def of(cls, name: str, text: str, *, validation_fraction: float = 0.1) -> "Corpus":
        """Splits a text; the last `validation_fraction` of it is for validation.

        Raises ValueError for a fraction outside (0, 1) and for a text too short to split.
        """
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(f"validation_fraction: expected (0, 1), got {validation_fraction}.")
        cut = int(len(text) * (1.0 - validation_fraction))
        if cut < 1 or cut == len(text):
            raise ValueError(f"{name}: {len(text)} characters are too few to train on.")
        vocabulary = Vocabulary.of(text[:cut])
        train = vocabulary.encode(text[:cut], strict=False)
        return cls(name, vocabulary, train, vocabulary.encode(text[cut:], strict=False))


def sample_batch(
    tokens: Int[Array, " M"], key: Key[Array, ""], *, batch_size: int, context: int
) -> Int[Array, "B L"]:
    """Random windows of `context + 1` tokens: L - 1 to read, each with its next to predict."""
    if tokens.shape[0] <= context:
        raise ValueError(f"context: {context} needs {context + 1} tokens, got {tokens.shape[0]}.")
    starts = jax.random.randint(key, (batch_size,), 0, tokens.shape[0] - context)
    return jax.vmap(lambda start: jax.lax.dynamic_slice(tokens, (start,), (context + 1,)))(starts)


def windows(tokens: np.ndarray, *, batch_size: int, context: int, limit: int) -> np.ndarray:
    """Up to `limit` batches of consecutive windows, (batches, batch_size, context + 1).

    What is left over at the end is dropped.  Raises ValueError where not even one window fits;
    a text with fewer windows than `batch_size` gives one batch of as many as there are.
    """
    count = (len(tokens) - 1) // context
    if count < 1:
        raise ValueError(f"context: {context} needs {context + 1} tokens, got {len(tokens)}.")
    batch_size = min(batch_size, count)
    batches = min(count // batch_size, limit)
    starts = np.arange(batches * batch_size) * context
    rows = tokens[starts[:, None] + np.arange(context + 1)[None, :]]
    return rows.reshape(batches, batch_size, context + 1)


def load_corpus(source: str | os.PathLike) -> Corpus:
    """A corpus by name ("shakespeare", "stdlib") or from a UTF-8 text file.

    Raises ValueError for a name that is neither known nor a file, a file that is not UTF-8 text,
    or one with the wrong hash; OSError where a file cannot be read or downloaded.
    """
    named: dict[str, Callable[[], str]] = {"shakespeare": shakespeare, "stdlib": stdlib_source}
    if str(source) in named:
        return Corpus.of(str(source), named[str(source)]())
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"data: {str(source)!r} is neither {' nor '.join(map(repr, named))} nor a file."
        )
    try:
        return Corpus.of(str(path.resolve()), path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: {path} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from error


def stdlib_source(limit: int = 1 << 20) -> str:
    """The source text of the running Python's standard library, up to `limit` characters.

    Top-level modules of plain ASCII, in an order that mixes the alphabet but never changes (by
    the hash of the file's name), each under a line that names it.  The same on each run of one
    Python version.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"), key=lambda f: hashlib.sha256(f.name.encode()).digest())
    parts, length = [], 0
    for file in files:
        try:
            text = f"# {file.name}\n{file.read_text(encoding='ascii')}\n"
        except UnicodeDecodeError:
            continue
        parts.append(text)
        length += len(text)
        if length >= limit:
            break
    if not parts:
        raise FileNotFoundError(f"data: no modules' source in {folder}; try 'shakespeare'.")
    return "".join(parts)[:limit]


def cache_folder() -> Path:
    """Where attnlab keeps what it downloads: under XDG_CACHE_HOME, or the platform's own place."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "attnlab"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "attnlab"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "attnlab"
    return Path.home() / ".cache" / "attnlab"


def find_shakespeare() -> Path | None:
    """The Tiny Shakespeare file that would be read now, or None where it would be downloaded."""
    folders = [Path(f) for f in [os.environ.get("ATTNLAB_DATA")] if f] + [cache_folder()]
    files = [folder / SHAKESPEARE_FILE for folder in folders]
    return next((file for file in files if file.is_file()), None)


def shakespeare() -> str:
    """The text of Tiny Shakespeare (Karpathy, 2015), 1,115,394 characters.

    Raises ValueError where the file has the wrong hash (naming it, expected and got), and OSError
    where it is not on this machine and cannot be downloaded (naming both ways out).
    """
    file = find_shakespeare()
    if file is None:
        file = cache_folder() / SHAKESPEARE_FILE
        _download(SHAKESPEARE_URL, file)
    data = file.read_bytes()
    _check_hash(data, str(file))
    return data.decode("utf-8")


def _check_hash(data: bytes, name: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if got != SHAKESPEARE_SHA256:
        raise ValueError(
            f"data: {name} has the wrong SHA-256: expected {SHAKESPEARE_SHA256}, got {got}."
            " Delete it to download it again, or put the right file in its place."
        )


def _download(url: str, file: Path) -> None:
    """Downloads into a temporary file beside `file`, checks it, then renames it into place."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            data = answer.read()
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(
            f"data: {SHAKESPEARE_FILE} is not on this machine and could not be downloaded"
            f" ({reason}). Either fetch {url} by other means, save it as {SHAKESPEARE_FILE} in a"
            " folder and set ATTNLAB_DATA to that folder; or train with --data stdlib, which is"
            " always there."
        ) from error
    _check_hash(data, url)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.part")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"data: {file} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder"
            f" that can, or set ATTNLAB_DATA to one that holds {SHAKESPEARE_FILE}."
        ) from error
