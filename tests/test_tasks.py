"""Data: vocabularies, corpora, where files come from, batches, the passkey task."""

import hashlib
import io
import urllib.error

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.tasks import (
    Corpus,
    Passkey,
    Vocabulary,
    extrapolation,
    load_corpus,
    sample_batch,
    text,
)
from attnlab.tasks.extrapolation import Extrapolation, compare


def test_a_vocabulary_goes_there_and_back():
    vocabulary = Vocabulary.of("to be, or not to be\n")
    assert vocabulary.size == len(set("to be, or not to be\n")) + 1
    ids = vocabulary.encode("not to be")
    assert ids.dtype == np.int32
    assert ids.min() >= 1
    assert vocabulary.decode(ids) == "not to be"


def test_an_unknown_character_is_named_or_becomes_id_0():
    vocabulary = Vocabulary.of("abc")
    with pytest.raises(ValueError, match=r"'é' at position 1.*3 characters"):
        vocabulary.encode("aéb")
    np.testing.assert_array_equal(vocabulary.encode("aéb", strict=False), [1, 0, 2])
    assert vocabulary.decode([1, 0]) == "a\N{REPLACEMENT CHARACTER}"


def test_a_repeated_character_is_refused():
    with pytest.raises(ValueError, match="each character once"):
        Vocabulary("aba")


def test_a_corpus_keeps_its_end_for_validation():
    corpus = Corpus.of("x", "abcdefghij" * 10 + "é" * 10, validation_fraction=0.1)
    whole = np.concatenate([corpus.train, corpus.validation])
    assert len(corpus.train) == 99
    assert corpus.vocabulary.characters == "abcdefghij"
    assert (whole[-10:] == 0).all()


@pytest.mark.parametrize(("words", "fraction"), [("", 0.1), ("a", 0.1), ("abcdef", 1.0)])
def test_a_text_that_cannot_be_split_is_refused(words, fraction):
    with pytest.raises(ValueError, match=r"too few|validation_fraction"):
        Corpus.of("x", words, validation_fraction=fraction)


def test_the_standard_library_reads_the_same_each_time_and_obeys_its_limit():
    first = text.stdlib_source(50_000)
    assert first == text.stdlib_source(50_000)
    assert len(first) == 50_000
    assert text.stdlib_source(80_000).startswith(first)
    assert first.isascii()
    assert "import " in first


def test_a_text_file_is_a_corpus_and_other_names_are_refused(tmp_path):
    file = tmp_path / "poem.txt"
    file.write_text("a rose is a rose " * 20, encoding="utf-8")
    assert load_corpus(file).vocabulary.characters == " aeiors"
    with pytest.raises(ValueError, match=r"'nothing' is neither 'shakespeare' nor 'stdlib' nor"):
        load_corpus("nothing")
    file.write_bytes(b"abc\xff\xfe")
    with pytest.raises(ValueError, match=r"poem\.txt is not UTF-8 text .*byte 3"):
        load_corpus(str(file))


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No data folder, an empty cache, and a network that answers what `answers` holds."""
    monkeypatch.delenv("ATTNLAB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    answers = []

    def urlopen(url, timeout):
        if not answers:
            raise urllib.error.URLError("Name or service not known")
        return io.BytesIO(answers[0])

    monkeypatch.setattr(text.urllib.request, "urlopen", urlopen)
    return answers


def test_without_network_both_ways_out_are_named(nowhere):
    with pytest.raises(OSError, match=r"Name or service.*ATTNLAB_DATA.*--data stdlib"):
        load_corpus("shakespeare")


def test_a_download_is_checked_before_it_is_kept(nowhere, monkeypatch, tmp_path):
    nowhere.append(b"to be or not" * 9)
    with pytest.raises(ValueError, match=f"{text.SHAKESPEARE_URL}.*{text.SHAKESPEARE_SHA256}"):
        text.shakespeare()
    assert text.find_shakespeare() is None
    monkeypatch.setattr(text, "SHAKESPEARE_SHA256", hashlib.sha256(nowhere[0]).hexdigest())
    assert text.shakespeare() == "to be or not" * 9
    folder = tmp_path / "cache" / "attnlab"
    assert text.find_shakespeare() == folder / text.SHAKESPEARE_FILE
    assert [file.name for file in folder.iterdir()] == [text.SHAKESPEARE_FILE]
    nowhere.clear()  # the network may go away now
    assert load_corpus("shakespeare").name == "shakespeare"


def test_a_wrong_hash_names_the_file_what_was_expected_and_what_came(
    nowhere, monkeypatch, tmp_path
):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path))
    file = tmp_path / text.SHAKESPEARE_FILE
    file.write_bytes(b"tampered")
    got = hashlib.sha256(b"tampered").hexdigest()
    with pytest.raises(ValueError, match=f"{file}.*{text.SHAKESPEARE_SHA256}.*{got}"):
        text.shakespeare()


def test_a_cache_that_cannot_be_written_is_named(nowhere, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    nowhere.append(b"words")
    monkeypatch.setattr(text, "SHAKESPEARE_SHA256", hashlib.sha256(b"words").hexdigest())
    with pytest.raises(OSError, match=r"cannot be written.*XDG_CACHE_HOME"):
        text.shakespeare()


def test_batches_are_windows_of_the_text_and_follow_their_key(keys):
    tokens = jnp.arange(100)
    one, two = keys("one", "two")
    rows = sample_batch(tokens, one, batch_size=50, context=8)
    assert rows.shape == (50, 9)
    np.testing.assert_array_equal(np.diff(rows, axis=1), 1)
    assert rows.min() >= 0
    assert rows.max() <= 99
    np.testing.assert_array_equal(rows, sample_batch(tokens, one, batch_size=50, context=8))
    assert not np.array_equal(rows, sample_batch(tokens, two, batch_size=50, context=8))


def test_every_window_can_be_drawn(keys):
    rows = sample_batch(jnp.arange(6), keys("draw"), batch_size=200, context=3)
    assert set(np.asarray(rows[:, 0]).tolist()) == {0, 1, 2}


def test_validation_windows_follow_each_other_without_overlap():
    batches = text.windows(np.arange(50), batch_size=2, context=8, limit=9)
    assert batches.shape == (3, 2, 9)
    np.testing.assert_array_equal(batches[..., 0].ravel(), [0, 8, 16, 24, 32, 40])
    assert text.windows(np.arange(50), batch_size=99, context=8, limit=9).shape == (1, 6, 9)
    with pytest.raises(ValueError, match="context: 50 needs 51 tokens"):
        text.windows(np.arange(50), batch_size=1, context=50, limit=1)
    with pytest.raises(ValueError, match="context: 6 needs 7 tokens"):
        sample_batch(jnp.arange(6), jax.random.key(0), batch_size=1, context=6)


@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize(("digits", "length"), [(1, 4), (1, 5), (3, 40), (5, 63)])
def test_a_row_hides_the_key_once_and_ends_in_the_answer(keys, digits, length, noise):
    task = Passkey(digits=digits, base=7, filler=5, noise=noise)
    rows = np.asarray(task.rows(keys("rows"), 64, length))
    assert rows.shape == (64, length)
    assert rows.min() >= 0
    assert rows.max() < task.vocab_size
    mark, ask = task.base, task.base + 1
    for row in rows:
        (start,) = np.flatnonzero(row == mark)
        assert np.flatnonzero(row == ask).tolist() == [length - digits - 1]
        np.testing.assert_array_equal(row[start + 1 : start + 1 + digits], row[-digits:])
        dull = np.delete(row[: -digits - 1], np.arange(start, start + digits + 1))
        if noise == 0:
            assert (dull > ask).all()
            assert set(np.diff(dull).tolist()) <= {1, 1 - task.filler}
    if noise > 0 and length > 20:
        inside = rows[:, : -digits - 1]
        share = ((inside < 7).sum() - 64 * digits) / (inside.size - 64 * (digits + 1))
        assert abs(share - noise) < 0.06


def test_depths_are_spread_and_can_be_chosen(keys):
    task = Passkey(digits=2)
    random, start, middle, end = keys("random", "start", "middle", "end")
    found = np.argmax(np.asarray(task.rows(random, 500, 26)) == task.base, axis=1)
    assert set(found.tolist()) == set(range(26 - task.shortest + 1))
    for key, depth, place in [(start, 0, 0), (middle, 0.5, 10), (end, 1.0, 20)]:
        rows = np.asarray(task.rows(key, 5, 26, depth=depth))
        assert (np.argmax(rows == task.base, axis=1) == place).all()


def test_accuracy_and_loss_are_those_of_the_answer_alone():
    task = Passkey(digits=2, base=3, filler=1)
    rows = jnp.array([[3, 0, 1, 5, 4, 0, 1], [3, 2, 2, 5, 4, 2, 2]])
    logits = np.zeros((2, 7, task.vocab_size), np.float32)
    logits[0, 4, 0] = logits[0, 5, 1] = 5  # both digits right
    logits[1, 4, 2] = logits[1, 5, 0] = 5  # the first right, the second wrong
    logits[:, 6] = logits[:, :4] = 77  # not asked for
    whole, digits = task.accuracy(jnp.asarray(logits), rows)
    assert (float(whole), float(digits)) == (0.5, 0.75)
    right = -5 + np.log(np.exp(5) + task.vocab_size - 1)
    expected = (3 * right + right + 5) / 4
    np.testing.assert_allclose(task.loss(jnp.asarray(logits), rows), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"digits": 0}, "digits: expected at least 1, got 0"),
        ({"base": 1}, "base"),
        ({"filler": 0}, "filler"),
        ({"noise": 1.0}, "noise"),
    ],
)
def test_a_task_of_wrong_sizes_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Passkey(**options)


def test_a_row_too_short_or_a_depth_outside_is_refused():
    with pytest.raises(ValueError, match="length: expected at least 10, got 9"):
        Passkey(digits=4).rows(jax.random.key(0), 1, 9)
    with pytest.raises(ValueError, match="depth"):
        Passkey(digits=4).rows(jax.random.key(0), 1, 20, depth=1.5)


def little(**options):
    sizes = {"train_length": 12, "lengths": (12, 24), "steps": 4, "batch_size": 4, "features": 16}
    return Extrapolation(**{**sizes, "num_heads": 2, "eval_rows": 8, "num_layers": 1, **options})


def test_an_experiment_is_repeatable_and_its_cache_gives_the_same_curves(tmp_path):
    told = []
    curves = compare(["bam"], little(), cache=tmp_path, report=lambda id, progress: told.append(id))
    assert list(curves) == ["bam"]
    assert set(told) == {"bam"}
    curve = curves["bam"]
    assert curve.lengths == (12, 24)
    assert curve.keys.shape == curve.digits.shape == (2,)
    assert len(curve.losses) == 4
    assert {name: x.shape for name, x in curve.parameters.items()} == {
        "scale": (1, 2),
        "shape": (1, 2),
        "loc": (1, 2),
    }
    again = extrapolation.run("bam", little())
    np.testing.assert_array_equal(again.losses, curve.losses)
    np.testing.assert_array_equal(again.keys, curve.keys)
    cached = compare(["bam"], little(), cache=tmp_path)["bam"]
    assert cached.seconds == curve.seconds
    np.testing.assert_array_equal(cached.losses, curve.losses)
    np.testing.assert_array_equal(cached.parameters["shape"], curve.parameters["shape"])
    (file,) = tmp_path.iterdir()
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"cache: .*bam-.*\.json does not fit"):
        compare(["bam"], little(), cache=tmp_path)


def test_other_settings_have_another_place_in_the_cache():
    one, two = (extrapolation._file_name("bam", little(seed=seed)) for seed in (0, 1))
    assert one != two


def test_what_a_guess_gets():
    settings = little(task=Passkey(digits=2, base=5))
    assert (settings.chance_key, settings.chance_digit) == (1 / 25, 1 / 5)


@pytest.mark.slow
def test_a_learned_prior_reads_far_beyond_the_length_of_training_and_rope_does_not():
    """The paper's claim (arXiv:2505.22842), at the size that the chapter shows."""
    settings = Extrapolation(lengths=(64, 2048))
    curves = compare(("bam", "alibi", "rope", "nope"), settings)
    for id in ("bam", "alibi", "rope"):
        assert curves[id].keys[0] > 0.95, id  # all but NoPE learn the task where they train
    assert curves["bam"].keys[1] > 0.9
    assert curves["rope"].keys[1] < 0.3
    assert curves["alibi"].keys[1] < 0.6
    assert curves["nope"].keys[0] < 0.9
