"""Every chapter has the same bones, holds no outputs and runs; its solutions are right."""

import importlib.util
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]-*.ipynb"))
SECTIONS = [
    "The question",
    "From scratch",
    "The same with attnlab",
    "The theorem",
    "The experiment",
    "What it costs",
    "Exercises",
    "Papers",
]
SECONDS, CORES = 90, 2

_spec = importlib.util.spec_from_file_location("stage", ROOT / "book" / "tools" / "stage.py")
stage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stage)

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def prose(notebook: nbformat.NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def solutions(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The code of each solution by the label of its exercise."""
    found = re.findall(r"\{solution\} (\S+)\n(.*?)^````", prose(notebook), re.M | re.S)
    return {label: re.search(r"```python\n(.*?)```", text, re.S)[1] for label, text in found}


def exercises(notebook: nbformat.NotebookNode) -> list[str]:
    return re.findall(r"^:label: (ex-\S+)", prose(notebook), re.M)


def stubs(notebook: nbformat.NotebookNode) -> list[str]:
    return [c.source for c in notebook.cells if "exercise" in c.metadata.get("tags", [])]


def test_there_are_chapters():
    assert [path.stem[:2] for path in CHAPTERS] == [f"{n:02}" for n in range(1, len(CHAPTERS) + 1)]
    assert len(CHAPTERS) >= 3


@each_chapter
def test_it_has_one_title_and_the_sections_in_order(path):
    headings = re.findall(r"^(#+) (.*)$", prose(read(path)), re.M)
    assert [text for marks, text in headings if marks == "##"] == SECTIONS
    assert sum(marks == "#" for marks, _ in headings) == 1


@each_chapter
def test_it_is_committed_without_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@each_chapter
def test_no_line_of_code_is_cut_by_the_page(path):
    code = [c.source for c in read(path).cells if c.cell_type == "code"]
    code += list(solutions(read(path)).values())
    assert not [line for source in code for line in source.split("\n") if len(line) >= 80]


@each_chapter
def test_its_papers_are_in_the_bibliography(path):
    entries = re.findall(r"^@\w+\{(\S+),", (ROOT / "book/references.bib").read_text(), re.M)
    cited = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", prose(read(path)))
    assert {key for keys in cited for key in keys.split(",")} <= set(entries)


@each_chapter
def test_it_shows_a_check_and_a_counter_check(path):
    code = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    assert ".check()" in code
    assert ".counter_check()" in code
    assert "```{prf:theorem}" in prose(read(path))


@each_chapter
def test_every_exercise_has_a_stub_and_a_solution(path):
    notebook = read(path)
    assert exercises(notebook)
    assert exercises(notebook) == list(solutions(notebook))
    assert len(stubs(notebook)) == len(exercises(notebook))


@each_chapter
def test_it_runs_without_a_network_and_its_solutions_are_right(path, tmp_path):
    notebook = read(path)
    written = len(notebook.cells)
    for stub, answer in zip(stubs(notebook), solutions(notebook).values(), strict=True):
        judged = stub.strip().split("\n")[-1]  # the last line calls the judge
        notebook.cells.append(nbformat.v4.new_code_cell(f"{answer}\n{judged}"))
    spent = "import time; print(time.process_time())"
    notebook.cells.insert(written, nbformat.v4.new_code_cell(spent))

    environment = dict(os.environ)
    environment |= {"PYTHONPATH": str(ROOT), "no_proxy": "", "JAX_PLATFORMS": "cpu"}
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    stage.sync(stage.read(ROOT, stage.CHAPTERS), tmp_path, keep=set())  # as the book runs it
    resources = {"metadata": {"path": str(tmp_path / "chapters")}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    client.execute(env=environment)

    text = [_streams(cell) for cell in notebook.cells[written:]]
    # Processor time, which a busy machine does not stretch as it does the clock.
    core_seconds = float(text[0])
    print(f"{path.stem}: {core_seconds:.0f} core-seconds")
    assert core_seconds < SECONDS * CORES
    assert [answer.strip() for answer in text[1:]] == ["✓ right"] * len(stubs(notebook))
    complaints = [_streams(cell, "stderr") for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(complaints), complaints


def _streams(cell: nbformat.NotebookNode, name: str = "stdout") -> str:
    found = (o for o in cell.outputs if o.output_type == "stream" and o.name == name)
    return "".join(output.text for output in found)
