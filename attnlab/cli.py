"""The `attnlab` command: atlas, show, train, sample, doctor, bench, book.

Each command imports what it needs when it runs, so that `attnlab --help` answers at once.  A
mistake is told in one line on stderr (exit code 2; 1 where the machine is to blame); `attnlab
--debug …` shows the traceback.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="attnlab",
    help="The laboratory of attention: look mechanisms up, train with them, measure them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
_settings = {"debug": False}
MESH = "Several devices and processes"


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    _settings["debug"] = debug


def command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a command whose errors are told in one line."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            try:
                return function(*args, **options)
            except KeyboardInterrupt:
                _fail("interrupted", 130)
            except Exception as error:
                code = _exit_code(error)
                if _settings["debug"] or code is None:
                    raise
                _fail(" ".join(str(error).split()) or type(error).__name__, code)

        return app.command(name)(run)

    return register


def _exit_code(error: Exception) -> int | None:
    """2 for a mistake of the user's, 1 for the machine's, None for what must not be hidden."""
    from click.exceptions import ClickException

    if isinstance(error, (typer.Exit, typer.Abort, ClickException)):
        return None
    if type(error).__name__ == "CheckpointError":  # its module is heavy to import
        return 2
    if isinstance(error, (ValueError, TypeError, NotImplementedError)):
        return 2
    return 1 if isinstance(error, (OSError, FloatingPointError, ImportError)) else None


def _fail(message: str, code: int) -> None:
    _print_error(message)
    raise typer.Exit(code)


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True, soft_wrap=True).print(line)


def _tell(error: BaseException) -> int:
    """Tells an error of one of several processes, and gives its exit code."""
    code = 130 if isinstance(error, KeyboardInterrupt) else None
    if isinstance(error, Exception):
        code = _exit_code(error)
    if _settings["debug"] or code is None:
        import traceback

        traceback.print_exception(error)
        return code or 1
    _print_error(" ".join(str(error).split()) or type(error).__name__)
    return code


def _console(stderr: bool = False, quiet: bool = False):
    from rich.console import Console

    return Console(stderr=stderr, quiet=quiet)


@command("atlas")
def atlas(
    family: Annotated[str | None, typer.Option(help="Such as positional.")] = None,
    pattern: Annotated[str | None, typer.Option(help='Such as "causal self".')] = None,
    complexity: Annotated[
        str | None,
        typer.Option(help='Part of the time or memory, such as "T·S" or "O(T + S)"; or linear.'),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs, on stdout.")] = False,
) -> None:
    """The catalogue of mechanisms."""
    from attnlab.atlas import entries as gather

    entries = list(gather().values())
    if family is not None:
        _check_choice("family", family, {entry.family for entry in entries})
        entries = [entry for entry in entries if entry.family == family]
    if pattern is not None:
        _check_choice("pattern", pattern, {p for entry in entries for p in entry.patterns})
        entries = [entry for entry in entries if pattern in entry.patterns]
    if complexity is not None:
        entries = [entry for entry in entries if _has_complexity(entry, complexity)]
    if as_json:
        print(json.dumps([entry.as_dict() for entry in entries], indent=2, ensure_ascii=False))
        return
    from attnlab.display import atlas_table

    _console().print(atlas_table(entries))


def _check_choice(option: str, value: str, known: set[str]) -> None:
    if value not in known:
        raise ValueError(f"--{option}: {value!r} is none of {', '.join(sorted(known))}.")


def _has_complexity(entry: Any, wanted: str) -> bool:
    def plain(text: str) -> str:
        return "".join(text.lower().replace("*", "·").split())

    if wanted.lower() == "linear":
        return "linear-memory" in entry.properties
    return any(plain(wanted) in plain(cost) for cost in (entry.time, entry.memory))


@command("show")
def show(id: Annotated[str, typer.Argument(help="The id, as `attnlab atlas` lists it.")]) -> None:
    """One mechanism: formula, paper, patterns, cost, how to use it."""
    from attnlab.atlas import get

    entry = get(id)
    from attnlab.display import entry_panels

    _console().print(*entry_panels(entry))


@command("train")
def train(
    attention: Annotated[str | None, typer.Option(help="Atlas id of a causal mechanism.")] = None,
    data: Annotated[str | None, typer.Option(help="shakespeare, stdlib, or a text file.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    context: Annotated[int | None, typer.Option(help="Characters per row.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows per step.")] = None,
    layers: Annotated[int | None, typer.Option(help="Transformer blocks.")] = None,
    width: Annotated[int | None, typer.Option(help="Features of the residual stream.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads; default: as many.")] = None,
    gated: Annotated[bool | None, typer.Option(help="A gated MLP.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout rate.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warm-up.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's decay of matrices.")] = None,
    seed: Annotated[int | None, typer.Option(help="Parameters, batches and dropout.")] = None,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run; nothing is saved without it.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 250,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's newest checkpoint.")
    ] = False,
    resume_step: Annotated[
        int | None, typer.Option(help="Go on from this step's checkpoint instead.")
    ] = None,
    implementation: Annotated[str, typer.Option(help="How attention is computed.")] = "auto",
    sample_length: Annotated[int, typer.Option(min=0, help="Characters to show at the end.")] = 200,
    feed_forward_chunk: Annotated[
        int | None, typer.Option(help="Positions of the MLP at a time: less memory, same numbers.")
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(help="As data x sequence, such as 2x4.", rich_help_panel=MESH)
    ] = None,
    method: Annotated[
        str, typer.Option(help="Attention across a mesh: ring or heads.", rich_help_panel=MESH)
    ] = "ring",
    layout: Annotated[
        str, typer.Option(help="contiguous, striped or zigzag.", rich_help_panel=MESH)
    ] = "contiguous",
    cut_state: Annotated[
        bool,
        typer.Option("--cut-state", help="Cut parameters over data too.", rich_help_panel=MESH),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            help="host:port of process 0.", envvar="ATTNLAB_COORDINATOR", rich_help_panel=MESH
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="How many run this command.", envvar="ATTNLAB_PROCESSES", rich_help_panel=MESH
        ),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(
            help="Which one this is, from 0.", envvar="ATTNLAB_PROCESS_ID", rich_help_panel=MESH
        ),
    ] = None,
    patience: Annotated[
        float,
        typer.Option(help="Seconds until a silent process is gone.", rich_help_panel=MESH),
    ] = 20.0,
) -> None:
    """Train a small language model, character by character.

    Defaults: bam on shakespeare, 4 layers of width 128, context 256, 2000 steps; about what two
    CPU cores do in several minutes.

    --mesh 2x4 cuts the rows of a batch over two devices, and the positions of a row over four
    (JAX_NUM_CPU_DEVICES=8 makes eight of a CPU); a run may be resumed on any other mesh, or on
    none. With --coordinator, --processes and --process-id the same command, run once per process
    and with a folder that all of them see, makes one run. Where a process dies the others say so
    and stop, with exit code 75; --resume goes on with those that remain.
    """
    options: dict[str, dict[str, Any]] = {
        "data": {"source": data},
        "model": {
            "attention": attention,
            "num_layers": layers,
            "features": width,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "gated": gated,
            "dropout_rate": dropout,
            "feed_forward_chunk": feed_forward_chunk,
        },
        "train": {
            "steps": steps,
            "context": context,
            "batch_size": batch,
            "learning_rate": lr,
            "warmup": warmup,
            "weight_decay": weight_decay,
            "seed": seed,
        },
    }
    given = {
        part: {name: value for name, value in values.items() if value is not None}
        for part, values in options.items()
    }
    resume = resume or resume_step is not None
    if resume and checkpoint_dir is None:
        raise ValueError("--resume: needs --checkpoint-dir, the folder of the run.")
    from attnlab.distributed.processes import is_first, together

    with together(coordinator, processes, process_id, patience=patience, tell=_tell):
        from attnlab.training.language import train_language_model
        from attnlab.training.reporter import Reporter

        console = _console(quiet=not is_first())
        spread = _mesh(mesh, method=method, layout=layout, cut_state=cut_state)
        folder, config, corpus = _run_to_train(
            given, console, checkpoint_dir, resume, resume_step, spread
        )
        model_text = f"{config.model.num_layers} layers × {config.model.features} features"
        console.print(
            f"{config.model.attention} on {corpus.name}: {len(corpus.train):,} characters to train"
            f" on, {model_text}, context {config.train.context}",
            soft_wrap=True,
        )
        with Reporter(console) as reporter:
            model, _ = train_language_model(
                corpus,
                config,
                folder=folder,
                save_every=checkpoint_every,
                resume=resume,
                step=resume_step,
                evaluate_every=evaluate_every,
                implementation=implementation,
                mesh=spread,
                report=reporter,
            )
        if is_first():
            _show_result(console, model, corpus.vocabulary, sample_length, checkpoint_dir)


def _mesh(text: str | None, **options: Any) -> Any:
    """The mesh that "2x4" means; by default all devices of several processes share the rows."""
    import jax

    from attnlab.training.mesh import MeshConfig

    if text is None:
        several = jax.process_count() > 1
        return MeshConfig(jax.device_count(), **options) if several else None
    data, cross, sequence = text.partition("x")
    if not (cross and data.isdigit() and sequence.isdigit()):
        raise ValueError(f"--mesh: expected data x sequence, such as 2x4, got {text!r}.")
    return MeshConfig(int(data), int(sequence), **options)


def _run_to_train(given, console, checkpoint_dir, resume, resume_step, spread):
    """The folder, configuration and corpus of a run, begun or found."""
    from attnlab.distributed.processes import barrier, is_first
    from attnlab.training.checkpoint import RunFolder

    if not resume:
        corpus = _corpus(given["data"].get("source", "shakespeare"))
        config = _new_config(given, corpus)
        _check_run(config, corpus)
        if spread is not None:
            spread.check(config)
        if checkpoint_dir is None:
            return None, config, corpus
        if is_first():
            RunFolder.create(checkpoint_dir, config)
        barrier("a folder for the run")
        return RunFolder.open(checkpoint_dir), config, corpus
    folder = RunFolder.open(checkpoint_dir)
    config = folder.config
    _check_agreement(given, config)
    corpus = _corpus(config.data.source)
    found = folder.steps()
    at = resume_step if resume_step is not None else (found[-1] if found else 0)
    which = folder.folder(at) if found else "the start: no checkpoint was finished"
    done = ", which is its end" if at == config.train.steps else ""
    text = f"resuming at step {at} of {config.train.steps}{done}, from {which}"
    console.print(text, soft_wrap=True, highlight=False)
    return folder, config, corpus


def _show_result(console, model, vocabulary, sample_length, checkpoint_dir) -> None:
    if sample_length:
        console.print(_sample(model, vocabulary, None, sample_length), markup=False)
    if checkpoint_dir is None:
        console.print("nothing was saved; --checkpoint-dir DIR keeps a run", style="dim")
    else:
        console.print(
            f"saved; sample from it with: attnlab sample --checkpoint {checkpoint_dir}",
            style="dim",
            soft_wrap=True,
        )


def _corpus(source: str):
    from attnlab.tasks.text import load_corpus

    return load_corpus(source)


def _new_config(given: dict[str, dict[str, Any]], corpus: Any):
    from attnlab.training.config import DataConfig, ModelConfig, RunConfig, TrainConfig

    train = dict(given["train"])
    steps = train.setdefault("steps", TrainConfig.steps)
    train.setdefault("warmup", min(TrainConfig.warmup, max(steps // 10, 0)))
    data = DataConfig(corpus.name, corpus.vocabulary.characters)
    return RunConfig(data, ModelConfig(**given["model"]), TrainConfig(**train))


def _check_run(config: Any, corpus: Any) -> None:
    """Refuses a wrong model or context before a folder is made for it; computes nothing."""
    from flax import nnx

    tokens, context = len(corpus.train), config.train.context
    if tokens <= context:
        raise ValueError(f"--context: {context} needs {context + 1} characters, got {tokens}.")
    nnx.eval_shape(lambda: config.model.build(config.data.vocabulary.size, config.train.seed))


def _check_agreement(given: dict[str, dict[str, Any]], config: Any) -> None:
    for part, values in given.items():
        for name, value in values.items():
            stored = getattr(getattr(config, part), name)
            same = stored == value or (name == "source" and Path(str(value)).exists())
            if not same:
                raise ValueError(
                    f"--resume: the run has {part}.{name} = {stored!r}, not {value!r}; leave the"
                    " option out, or start a new run in another folder."
                )


def _sample(model, vocabulary, prompt, length, *, temperature=0.8, top_k=None, seed=0) -> str:
    import jax
    import jax.numpy as jnp

    from attnlab.models.generate import generate

    if prompt is None:
        prompt = next((c for c in "\n " if c in vocabulary.characters), vocabulary.characters[0])
    ids = jnp.asarray(vocabulary.encode(prompt))[None]
    key = jax.random.key(seed)
    row = generate(model, ids, length, key=key, temperature=temperature, top_k=top_k)[0]
    return vocabulary.decode(row)


@command("sample")
def sample(
    checkpoint: Annotated[Path, typer.Option(help="The run's folder.")],
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    length: Annotated[int, typer.Option(help="Characters to add.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest character.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only among this many likeliest.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    step: Annotated[int | None, typer.Option(help="A step; default: the newest.")] = None,
    implementation: Annotated[str, typer.Option(help="How attention is computed.")] = "auto",
) -> None:
    """Let a trained model write; the text goes to stdout."""
    from attnlab.training.language import load_run

    model, config, at = load_run(checkpoint, step=step, implementation=implementation)
    options = {"temperature": temperature, "top_k": top_k, "seed": seed}
    text = _sample(model, config.data.vocabulary, prompt, length, **options)
    about = f"{config.model.attention}, step {at} of {config.train.steps}, {checkpoint}"
    _console(stderr=True).print(about, style="dim", soft_wrap=True)
    print(text)


@command("doctor")
def doctor() -> None:
    """Devices, versions, which implementations work here, and where the data is."""
    from rich.table import Table
    from rich.text import Text

    from attnlab.doctor import examine

    report = examine()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("python", report.python)
    for package, version in report.versions.items():
        table.add_row(package, Text("not installed", "dim") if version is None else version)
    table.add_row("devices", "\n".join(report.devices) or "none")
    table.add_row("memory", report.memory)
    for name, reason in report.implementations.items():
        works = Text("works here", "green") if reason is None else Text(reason, "yellow")
        table.add_row(f"implementation {name}", works)
    table.add_row("cache folder", Text(str(report.cache_folder)))
    for name, found in report.data.items():
        table.add_row(f"data {name}", Text(found))
    _console().print(table)
    if report.problems:
        _fail("; ".join(report.problems), 1)


BENCH_OPTIONS = {"fresh": ("quality", "claims"), "only": ("quality", "claims"), "full": ("claims",)}


@command("bench")
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="memory, time, window, train, flash, linear, recall, quality, claims, "
            "distributed, or all."
        ),
    ] = "all",
    save: Annotated[Path | None, typer.Option(help="Folder for the tables, as JSON.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few rounds.")] = False,
    case: Annotated[str | None, typer.Option(help="flash: one case, such as alibi.")] = None,
    lengths: Annotated[str | None, typer.Option(help="flash: such as 1024,4096.")] = None,
    widths: Annotated[str | None, typer.Option(help="flash: of heads, such as 64,128.")] = None,
    compile_for: Annotated[
        str | None, typer.Option(help="flash: a TPU to compile for, such as v5e; nothing runs.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="quality, claims: measure again what --save has.")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="quality, claims: rows to measure, such as bam,rope.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="claims: the papers' own sizes where they can be had.")
    ] = False,
) -> None:
    """Measure memory, time, windows, training, fused and linear attention, beside peers; the
    quality of all mechanisms under one budget, and what papers claim of theirs; and what attention
    across devices sends.

    Exit code 1 where a target was missed.
    """
    import importlib

    from attnlab.bench import BENCHMARKS

    if name not in (*BENCHMARKS, "all"):
        raise ValueError(f"bench: {name!r} is none of {', '.join(BENCHMARKS)}, all.")
    options: dict[str, Any] = {"case": case, "compile_for": compile_for}
    for option, text in (("lengths", lengths), ("widths", widths)):
        options[option] = None if text is None else _numbers(option, text)
    options |= {"fresh": fresh or None, "full": full or None}
    options["only"] = None if only is None else tuple(only.split(","))
    options = {option: value for option, value in options.items() if value is not None}
    for option in options:
        users = BENCH_OPTIONS.get(option, ("flash",))
        if name not in users:
            words = option.replace("_", "-")
            raise ValueError(f"--{words}: is for bench {' and '.join(users)} only.")
    missed = []
    for each in BENCHMARKS if name == "all" else (name,):
        run = importlib.import_module(f"attnlab.bench.{each}").run
        if run(save=save, quick=quick, **options).passed is False:
            missed.append(each)
    if missed:
        _fail(f"targets missed: {', '.join(missed)}", 1)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"--{option}: expected numbers like 1024,4096, got {text!r}.") from None


@command("book")
def book() -> None:
    """Read the book: build and serve it in a checkout, or tell its address."""
    import importlib.metadata
    import subprocess

    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "Makefile").is_file() and (checkout / "book").is_dir():
        code = subprocess.call(["make", "book"], cwd=checkout)
        raise typer.Exit(code)
    urls = importlib.metadata.metadata("attnlab").get_all("Project-URL") or []
    address = dict(url.split(", ", 1) for url in urls).get("Documentation")
    if address is None:
        raise ValueError("book: this installation does not know the book's address.")
    _console().print(
        f"The book is at {address}; to build it, clone the repository and run make book."
    )


if __name__ == "__main__":
    sys.exit(app())
