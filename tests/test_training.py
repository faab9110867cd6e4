"""Training: the loop, the optimizer's masks, checkpoints, and resuming after a kill."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.tasks import Corpus
from attnlab.training import (
    CheckpointError,
    DataConfig,
    History,
    ModelConfig,
    RunConfig,
    RunFolder,
    TrainConfig,
    fit,
    load_run,
    make_optimizer,
    train_language_model,
)
from attnlab.training import checkpoint as checkpoint_module
from attnlab.training.loop import TrainState
from attnlab.training.optimizer import decay_mask, is_positional

ROOT = Path(__file__).parent.parent
TEXT = "the cat sat on the mat and the rat sat on the cat; " * 40


def tiny(steps=60, **train):
    corpus = Corpus.of("tiny", TEXT)
    model = ModelConfig(attention="bam", num_layers=1, features=16, num_heads=2, dropout_rate=0.1)
    options = {"batch_size": 4, "context": 16, "learning_rate": 1e-2, "warmup": 5, **train}
    config = RunConfig(
        DataConfig("tiny", corpus.vocabulary.characters), model, TrainConfig(steps, **options)
    )
    return corpus, config


def state(step, size=64, name="weight"):
    weight = jax.random.normal(jax.random.key(step), (size,))
    return TrainState(jnp.full((), step, jnp.int32), {name: weight}, {"m": jnp.zeros(3)})


@pytest.fixture
def folder(tmp_path):
    """A run with checkpoints of steps 1 and 2."""
    made = RunFolder.create(tmp_path / "run", tiny()[1])
    for step in (1, 2):
        made.save(state(step), History([1.5] * step, [(step, 2.5)]))
    return made


def test_training_learns_and_reports_what_it_does():
    corpus, config = tiny()
    told = []
    _, history = train_language_model(corpus, config, evaluate_every=25, report=told.append)
    assert len(history.losses) == 60
    assert abs(history.losses[0] - np.log(corpus.vocabulary.size)) < 0.1
    assert history.losses[-1] < 1.8
    assert [step for step, _ in history.evaluations] == [25, 50, 60]
    assert history.evaluations[-1][1] < 1.8
    assert told[-1].step == 60
    assert told[-1].loss == history.losses[-1]
    assert all(progress.tokens_per_second > 0 for progress in told)


def test_a_run_in_other_pieces_gives_the_same_bits():
    corpus, config = tiny()
    whole, pieces = (
        train_language_model(corpus, config, evaluate_every=every) for every in (None, 7)
    )
    assert whole[1].losses == pieces[1].losses
    for one, two in zip(*(jax.tree.leaves(nnx.state(m)) for m, _ in (whole, pieces)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_step_is_adamw_with_clipping_as_written_out():
    config = TrainConfig(steps=10, warmup=0, learning_rate=0.1, weight_decay=0.5, clip_norm=1.0)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 2)).astype(np.float32)
    gain = rng.normal(size=3).astype(np.float32)

    class Model(nnx.Module):
        def __init__(self):
            self.weight, self.gain = nnx.Param(jnp.asarray(weight)), nnx.Param(jnp.asarray(gain))

    pull = {"weight": 3 * rng.normal(size=(3, 2)), "gain": 3 * rng.normal(size=3)}
    pull = {name: value.astype(np.float32) for name, value in pull.items()}

    def loss(model, batch, key):
        return (model.weight[...] * batch["weight"]).sum() + (model.gain[...] * batch["gain"]).sum()

    model = Model()
    config = TrainConfig(**{**vars(config), "steps": 1})
    fit(model, loss, lambda data, key: data, jax.tree.map(jnp.asarray, pull), config)
    norm = np.sqrt(sum((g**2).sum() for g in pull.values()))
    for name, start, decay in [("weight", weight, 0.5), ("gain", gain, 0.0)]:
        gradient = pull[name] / max(norm, 1.0)
        # After one step Adam's bias-corrected moments are the gradient and its square.
        expected = start - 0.1 * (gradient / (np.abs(gradient) + 1e-8) + decay * start)
        np.testing.assert_allclose(getattr(model, name)[...], expected, rtol=1e-4, atol=1e-6)


def test_norms_and_mechanisms_do_not_decay():
    model = tiny()[1].model.build(9, 0)
    params = nnx.state(model, nnx.Param)
    seen = {}
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        seen[jax.tree_util.keystr(path)] = decays
    assert sum(seen.values()) == 4 + 2 + 2  # query, key, value, out; the MLP; embedding, readout
    for name, decays in seen.items():
        if "norm" in name or "mechanism" in name:
            assert not decays, name
    table = {"mechanism": {"table": jnp.zeros((4, 2))}, "kernel": jnp.zeros((4, 2))}
    assert decay_mask(table) == {"mechanism": {"table": False}, "kernel": True}


def test_the_rate_warms_up_and_decays_and_positions_may_have_their_own():
    config = TrainConfig(steps=100, warmup=10, learning_rate=1.0, weight_decay=0.0, clip_norm=1e9)
    for rate in (1.0, 3.0):
        optimizer = make_optimizer(TrainConfig(**{**vars(config), "positional_rate": rate}))
        params = {"mechanism": {"slope": jnp.ones(2)}, "kernel": jnp.ones((2, 2))}
        memory, sizes = optimizer.init(params), []
        for _ in range(100):
            updates, memory = optimizer.update(params, memory, params)
            sizes.append(float(-updates["kernel"][0, 0]))
            np.testing.assert_allclose(-updates["mechanism"]["slope"], rate * sizes[-1], rtol=1e-5)
        warm = np.arange(10) / 10
        cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(90) / 90)) / 2
        np.testing.assert_allclose(sizes, np.concatenate([warm, cosine]), atol=1e-4)


def test_positional_parameters_are_found_by_their_path():
    model = tiny()[1].model.build(9, 0)
    paths = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    found = sorted(jax.tree_util.keystr(path) for path, _ in paths if is_positional(path))
    assert len(found) == 3  # scale, shape and loc of the one layer
    assert all("mechanism" in name for name in found)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    class Model(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(()))

    def loss(model, batch, key):
        return jnp.where(model.weight[...] < 0.75, jnp.nan, model.weight[...])

    config = TrainConfig(steps=20, warmup=0, learning_rate=0.1, weight_decay=0.0)
    with pytest.raises(FloatingPointError, match=r"loss of step 3 is nan; try a smaller"):
        fit(Model(), loss, lambda data, key: data, None, config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"warmup": 2000}, "warmup: expected 0 .. steps - 1, got 2000 of 2000"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**options)


def test_a_configuration_survives_json():
    config = tiny()[1]
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    """A real SIGKILL in the middle of a real run of the command."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    run = tmp_path / "run"
    command = (
        f"train --attention bam --data {text} --steps 4000 --context 16 --batch 4 --layers 1"
        f" --width 16 --heads 2 --dropout 0.1 --lr 0.01 --warmup 5 --checkpoint-every 20"
        f" --evaluate-every 100000 --checkpoint-dir {run} --sample-length 0"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "attnlab.cli", *command.split()],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 240
    while not (run / "step-00000040.json").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()

    killed = RunFolder.open(run)
    at = killed.steps()[-1]
    assert 40 <= at < 4000
    # What is left of a 4000-step schedule is long: take the first `at + 60` steps of it.
    corpus, stop = Corpus.of(str(text), TEXT), at + 60

    class Enough(Exception):
        pass

    def losses(**options):
        found = {}

        def report(progress):
            if progress.step >= stop:
                raise Enough

        def keep(state, history):
            found[int(state.step)] = list(history.losses)

        class Recorder(RunFolder):
            def save(self, state, history):
                keep(state, history)

        folder = Recorder(killed.path, killed.config)
        with pytest.raises(Enough):
            train_language_model(
                corpus,
                killed.config,
                folder=folder,
                save_every=20,
                evaluate_every=None,
                report=report,
                **options,
            )
        return found[stop]

    resumed, uninterrupted = losses(resume=True), losses()
    assert len(resumed) == stop
    assert resumed == uninterrupted


def test_what_is_saved_is_read_back_to_the_bit(folder):
    got, history = folder.restore(state(0))
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(state(2)), strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype
    assert history == History([1.5, 1.5], [(2, 2.5)])
    assert int(folder.restore(state(0), 1)[0].step) == 1
    assert RunFolder.open(folder.path).config == folder.config


def test_only_the_newest_are_kept(folder):
    for step in (3, 4, 5):
        folder.save(state(step), History())
    assert folder.steps() == [3, 4, 5]
    assert sorted(p.name for p in folder.path.iterdir() if p.is_dir()) == [
        f"step-0000000{step}" for step in (3, 4, 5)
    ]


def test_an_unfinished_checkpoint_does_not_count(folder):
    shutil.copytree(folder.folder(2), folder.folder(3))  # killed before the receipt
    (folder.path / "step-00000004.orbax-checkpoint-tmp").mkdir()  # killed before the rename
    assert folder.steps() == [1, 2]
    assert int(folder.restore(state(0))[0].step) == 2
    folder.save(state(3), History())
    assert int(folder.restore(state(0))[0].step) == 3
    assert not (folder.path / "step-00000004.orbax-checkpoint-tmp").exists()


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
def test_any_damage_to_any_file_is_named_and_the_newest_good_one_too(folder, damage):
    files = [p for p in folder.folder(2).rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 4
    for file in files:
        whole = file.read_bytes()
        damage(file)
        with pytest.raises(CheckpointError) as caught:
            folder.restore(state(0))
        for words in (str(folder.folder(2)), file.name, "step 1", str(folder.folder(1))):
            assert words in str(caught.value)
        file.write_bytes(whole)
    assert int(folder.restore(state(0))[0].step) == 2


def test_a_damaged_receipt_is_named(folder):
    for words in ("{", "{}", "[]", '{"step": 2}', ""):
        folder.receipt(2).write_text(words)
        with pytest.raises(CheckpointError, match=r"step-00000002\.json is damaged.*step 1"):
            folder.restore(state(0))
    folder.receipt(1).write_text("{")
    with pytest.raises(CheckpointError, match=r"There is no other good checkpoint"):
        folder.restore(state(0))


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (state(0, size=65), r"'weight'\] is float32\[64\], expected float32\[65\]"),
        (state(0, name="other"), r"'other'\] is missing, expected float32\[64\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(folder, like, words):
    with pytest.raises(CheckpointError, match=rf"{folder.folder(2)} is of another model.*{words}"):
        folder.restore(like)


def test_a_step_that_is_not_there_is_refused(folder):
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; it has 1, 2"):
        folder.restore(state(0), 7)


def test_folders_that_are_no_runs_are_refused(tmp_path, folder):
    config = tiny()[1]
    with pytest.raises(CheckpointError, match=f"{tmp_path} is not a run.*no config.json"):
        RunFolder.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere is not a run.*not a folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="already holds a run"):
        RunFolder.create(folder.path, config)
    with pytest.raises(CheckpointError, match="holds other files"):
        RunFolder.create(tmp_path, config)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError, match="file is a file"):
        RunFolder.create(file, config)
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        RunFolder.create(file / "run", config)


@pytest.mark.parametrize(
    "words",
    ["{", "[]", '{"format": "pytorch"}', '{"format": "attnlab language model run, version 1"}'],
)
def test_a_foreign_configuration_is_refused(folder, words):
    (folder.path / "config.json").write_text(words)
    with pytest.raises(CheckpointError, match=r"config\.json is not the configuration of a run"):
        RunFolder.open(folder.path)


def test_a_run_with_other_settings_is_not_resumed(folder):
    corpus, config = tiny(61)
    with pytest.raises(CheckpointError, match=r"another run: train\.steps: 61 here, 60 there"):
        train_language_model(corpus, config, folder=folder, resume=True)


def test_a_text_with_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="another vocabulary"):
        train_language_model(Corpus.of("other", "xyz" * 50), tiny()[1])


def _assert_untouched(folder, step):
    assert folder.steps()[-1] == step
    got, _ = folder.restore(state(0))
    np.testing.assert_array_equal(got.params["weight"], state(step).params["weight"])
    assert not [p for p in folder.path.iterdir() if "tmp" in p.name or p.suffix == ".part"]


@pytest.mark.parametrize("where", ["arrays", "receipt"])
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(folder, monkeypatch, where):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args, **options):
        raise full

    with monkeypatch.context() as patch:
        if where == "receipt":
            patch.setattr(checkpoint_module, "_write", fail)
        else:
            import orbax.checkpoint as ocp

            patch.setattr(ocp.StandardCheckpointer, "save", fail)
        with pytest.raises(CheckpointError) as caught:
            folder.save(state(3), History())
    for words in (str(folder.folder(3)), "No space left on device", str(folder.folder(2))):
        assert words in str(caught.value)
    _assert_untouched(folder, 2)


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MiB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_really_full_disk_and_a_read_only_one(disk):
    folder = RunFolder.create(disk / "run", tiny()[1])
    folder.save(state(1, 60_000), History())
    with pytest.raises(CheckpointError, match=r"step-00000002 .*No space left.*step-00000001"):
        folder.save(state(2, 240_000), History())
    np.testing.assert_array_equal(
        folder.restore(state(0, 60_000))[0].params["weight"], state(1, 60_000).params["weight"]
    )
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(CheckpointError, match=r"step-00000003 .*Read-only.*step-00000001"):
        folder.save(state(3, 10), History())
    with pytest.raises(CheckpointError, match="other cannot be written: Read-only"):
        RunFolder.create(disk / "other", tiny()[1])
    assert int(folder.restore(state(0, 60_000))[0].step) == 1


def test_a_trained_model_comes_back_from_its_folder_alone(tmp_path):
    corpus, config = tiny()
    folder = RunFolder.create(tmp_path / "run", config)
    model, history = train_language_model(corpus, config, folder=folder, save_every=30)
    loaded, found, step = load_run(tmp_path / "run")
    assert (found, step) == (config, 60)
    assert found.data.vocabulary == corpus.vocabulary
    tokens = jnp.asarray(corpus.validation[None, :12])
    np.testing.assert_array_equal(model(tokens), loaded(tokens))
    assert load_run(tmp_path / "run", step=30)[2] == 30
    assert folder.restore(_like(config))[1].losses == history.losses


def _like(config):
    model = config.model.build(config.data.vocabulary.size, 0)
    params = nnx.state(model, nnx.Param)
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config.train).init(params))
