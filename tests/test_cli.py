"""The command: what it prints, where, and with which exit code."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

import attnlab
from attnlab import atlas, bench, cli, display, doctor
from attnlab.training.checkpoint import CheckpointError

TEXT = "the cat sat on the mat and the rat sat on the cat; " * 40
SMALL = "--steps 6 --context 16 --batch 2 --layers 1 --width 16 --heads 2 --sample-length 8"


def run(line, code=0):
    """(stdout, stderr) of `attnlab LINE`, which must end with `code`."""
    line = line.split() if isinstance(line, str) else line
    result = CliRunner().invoke(cli.app, line, env={"COLUMNS": "100", "TERM": "dumb"})
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result.stdout, result.stderr


def one_line_error(line, code=2):
    stdout, stderr = run(line, code)
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stdout + stderr
    return stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small run, and what was printed on the way."""
    place = tmp_path_factory.mktemp("trained")
    (place / "text.txt").write_text(TEXT)
    options = f"--checkpoint-dir {place / 'run'} --checkpoint-every 3 --evaluate-every 4"
    printed = run(f"train --attention rope --data {place / 'text.txt'} {options} {SMALL}")[0]
    return place / "run", printed


def test_help_lists_every_command():
    stdout, _ = run("--help")
    for name in ("atlas", "show", "train", "sample", "doctor", "bench", "book"):
        assert name in stdout


def test_the_commands_module_imports_nothing_heavy_of_its_own():
    code = (
        "import sys, typer; before = set(sys.modules); import attnlab; middle = set(sys.modules);"
        "import attnlab.cli; after = set(sys.modules) - middle;"
        "print([m for m in after if not m.startswith(('attnlab.cli', 'encodings'))])"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent.parent,
        check=True,
    )
    assert found.stdout.strip() == "[]"


def test_the_atlas_lists_every_mechanism_by_family():
    stdout, _ = run("atlas")
    for entry in atlas.entries().values():
        assert entry.id in stdout
        assert entry.family in stdout
    assert f"{len(atlas.entries())} mechanisms" in stdout


def test_the_atlas_as_json_is_the_whole_catalogue_and_nothing_else_on_stdout():
    stdout, _ = run("atlas --json")
    listed = json.loads(stdout)
    assert {entry["id"] for entry in listed} == set(atlas.entries())
    bam = next(entry for entry in listed if entry["id"] == "bam")
    assert bam["paper"]["url"] == "https://arxiv.org/abs/2505.22842"
    assert bam["patterns"]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--family", "positional"], lambda e: e.family == "positional"),
        (["--pattern", "causal self"], lambda e: "causal self" in e.patterns),
        (["--complexity", "linear"], lambda e: "linear-memory" in e.properties),
        (["--complexity", "t*s*h"], lambda e: "T·S·H" in e.time),
        (["--complexity", "O(T+S)"], lambda e: "O(T + S)" in e.memory),
        (["--complexity", "nonsense"], lambda e: False),
    ],
)
def test_the_atlas_can_be_narrowed(options, wanted):
    listed = json.loads(run(["atlas", "--json", *options])[0])
    expected = {entry.id for entry in atlas.entries().values() if wanted(entry)}
    assert {entry["id"] for entry in listed} == expected


def test_an_unknown_family_is_refused_with_the_known_ones():
    error = one_line_error("atlas --family posit")
    assert "--family: 'posit' is none of" in error
    assert "positional" in error
    assert "causal self" in one_line_error("atlas --pattern sideways")


@pytest.mark.parametrize("id", sorted(atlas.entries()))
def test_a_mechanism_is_shown_with_its_paper_and_a_program(id):
    stdout, _ = run(["show", id])
    entry = atlas.get(id)
    for words in (entry.title, str(entry.paper.year), entry.time, entry.memory, entry.source):
        assert words in stdout


@pytest.mark.parametrize("id", ["bam", "mla", "sinusoidal"])
def test_the_program_that_show_prints_runs(id):
    names = {}
    exec(display.usage(atlas.get(id)), names)
    assert names["y"].shape == (2, 16, 128)


def test_an_entry_without_an_arxiv_number_or_causality_is_shown_too(monkeypatch):
    entry = atlas.get("bam")
    paper = dataclasses.replace(entry.paper, arxiv=None, venue="A journal")
    other = dataclasses.replace(entry, paper=paper, patterns=("noncausal cross",))
    monkeypatch.setattr(atlas, "get", lambda id: other)
    stdout, _ = run("show bam")
    assert "A journal" in stdout
    assert "attnlab train" not in stdout
    monkeypatch.setattr(atlas, "entries", lambda: {"bam": other})
    assert "noncausal" in run("atlas")[0]


def test_an_unknown_mechanism_suggests_near_ones():
    assert "did you mean bam" in one_line_error("show bamm")
    assert "did you mean rope" in one_line_error("train --attention ropee --data stdlib")


def test_a_run_says_what_it_does_and_can_be_sampled(trained):
    folder, printed = trained
    assert "rope on" in printed
    assert "step 6 of 6" in printed
    assert "validation" in printed
    assert f"attnlab sample --checkpoint {folder}" in printed
    line = f"sample --checkpoint {folder} --prompt the --length 12 --top-k 3 --seed 4"
    stdout, stderr = run(line)
    assert stdout.startswith("the")
    assert len(stdout) == 3 + 12 + 1
    assert "rope, step 6 of 6" in stderr
    assert stdout == run(line)[0]
    assert "step 3 of 6" in run(f"{line} --step 3 --temperature 0")[1]


def test_a_run_resumes_and_says_from_where(trained):
    folder, _ = trained
    stdout, _ = run(f"train --resume-step 3 --checkpoint-dir {folder} --sample-length 0")
    assert f"resuming at step 3 of 6, from {folder}/step-00000003" in stdout.replace("\n", "")
    stdout, _ = run(f"train --resume --checkpoint-dir {folder} --sample-length 0 --steps 6")
    assert "resuming at step 6 of 6, which is its end" in stdout


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text((folder / "config.json").read_text())
    stdout, _ = run(f"train --resume --checkpoint-dir {tmp_path / 'run'} --sample-length 0")
    assert "from the start: no checkpoint was finished" in stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train --resume", "--resume: needs --checkpoint-dir"),
        ("train --resume --checkpoint-dir {run} --width 32", "model.features = 16, not 32"),
        ("train --data {text} --checkpoint-dir {run}", "already holds a run"),
        ("train --data {text} --width 30", "features: 30 is not a multiple of num_heads=4"),
        ("train --data {text} --steps 0", "steps: expected at least 1, got 0"),
        ("train --data {text} --attention rope --context 5000", "--context: 5000 needs 5001"),
        ("train --data nowhere.txt", "'nowhere.txt' is neither 'shakespeare' nor"),
        ("sample --checkpoint {text}", "is not a run of attnlab"),
        ("sample --checkpoint {run} --prompt é", "'é' at position 0"),
        ("sample --checkpoint {run} --length 0", "length: expected at least 1"),
        ("sample --checkpoint {run} --step 5", "no checkpoint of step 5; it has 3, 6"),
        (
            "bench speed",
            "'speed' is none of memory, time, window, train, flash, linear, recall, quality",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(trained, line, words):
    folder, _ = trained
    filled = line.format(run=folder, text=folder.parent / "text.txt")
    assert words in one_line_error(filled)


def test_a_refused_run_leaves_no_folder_behind(trained, tmp_path):
    text = trained[0].parent / "text.txt"
    for mistake in ("--width 30", "--attention nothing", "--context 5000"):
        one_line_error(f"train --data {text} {mistake} --checkpoint-dir {tmp_path / 'run'}")
        assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(cli.app, ["--debug", "show", "bamm"])
    assert isinstance(result.exception, ValueError)
    assert CliRunner().invoke(cli.app, ["show", "bamm"]).exit_code == 2


def test_each_kind_of_trouble_has_its_exit_code(monkeypatch):
    troubles = {
        2: [ValueError("x"), TypeError("x"), NotImplementedError("x"), CheckpointError("x")],
        1: [OSError("x"), FloatingPointError("x"), ImportError("x")],
        130: [KeyboardInterrupt()],
    }
    for code, errors in troubles.items():
        for error in errors:

            def fail(id, error=error):
                raise error

            monkeypatch.setattr(atlas, "get", fail)
            one_line_error("show bam", code)
    monkeypatch.setattr(atlas, "get", lambda id: 1 / 0)
    assert isinstance(CliRunner().invoke(cli.app, ["show", "bam"]).exception, ZeroDivisionError)


def test_the_doctor_tells_versions_devices_implementations_and_data(monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATA", "/nowhere")
    stdout, _ = run("doctor")
    for words in ("python", "jaxlib", "flax", "optax", "orbax-checkpoint", "devices", "memory"):
        assert words in stdout
    for name in attnlab.core.attention.availability():
        assert f"implementation {name}" in stdout
    assert "works here" in stdout
    assert "needs an NVIDIA GPU" in stdout or "gpu" in stdout


def test_the_doctor_goes_on_where_something_is_broken(monkeypatch):
    def broken():
        raise RuntimeError("no driver\nmore words")

    monkeypatch.setattr(attnlab.core.attention, "availability", broken)
    monkeypatch.setattr("jax.devices", broken)
    report = doctor.examine()
    assert report.devices == []
    assert report.problems[0] == "jax finds no device: no driver"
    assert "jaxlib" in run("doctor", 1)[0]


def test_the_doctor_names_a_data_file_with_the_wrong_hash(monkeypatch, tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("tampered")
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path))
    assert "wrong SHA-256" in str(doctor.examine().data)


def test_benchmarks_are_run_by_name_and_missed_targets_are_told(monkeypatch, tmp_path):
    asked = []

    def module(name):
        def run(save, quick, **options):
            asked.append((name, save, quick, *options.items()))
            return types.SimpleNamespace(passed=name != "attnlab.bench.window")

        return types.SimpleNamespace(run=run)

    monkeypatch.setattr("importlib.import_module", module)
    run(f"bench memory --quick --save {tmp_path}")
    assert asked == [("attnlab.bench.memory", tmp_path, True)]
    del asked[:]
    assert "targets missed: window" in one_line_error("bench", 1)
    assert [name for name, *_ in asked] == [f"attnlab.bench.{name}" for name in bench.BENCHMARKS]
    assert "--compile-for: is for bench flash" in one_line_error("bench memory --compile-for v4")
    assert "--widths: expected numbers like" in one_line_error("bench flash --widths 64,x")
    del asked[:]
    run("bench quality --fresh --only bam,rope")
    run("bench claims --full")
    assert asked == [
        ("attnlab.bench.quality", None, False, ("fresh", True), ("only", ("bam", "rope"))),
        ("attnlab.bench.claims", None, False, ("full", True)),
    ]
    for line in ("bench --fresh", "bench memory --only bam", "bench flash --only bam"):
        assert "is for bench quality and claims only" in one_line_error(line)
    assert "--full: is for bench claims only" in one_line_error("bench quality --full")


def test_the_book_is_built_in_a_checkout_and_else_its_address_is_told(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr("subprocess.call", lambda line, cwd: called.append((line, cwd)) or 0)
    (tmp_path / "attnlab").mkdir()
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "attnlab" / "cli.py"))

    class Metadata:
        def get_all(self, name):
            return ["Documentation, https://example.org/book"]

    monkeypatch.setattr("importlib.metadata.metadata", lambda name: Metadata())
    assert "https://example.org/book" in run("book")[0]
    (tmp_path / "Makefile").touch()
    (tmp_path / "book").mkdir()
    run("book")
    assert called == [(["make", "book"], tmp_path)]
