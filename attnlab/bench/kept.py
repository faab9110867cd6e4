"""Rows that are kept: a long benchmark goes on where it was cut off.

Each row is written as soon as it is measured, under its key and with the settings and the machine
it was measured with.  A record of other settings is not mixed with, and not overwritten unasked.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attnlab.bench.harness import Result, Row, finish, machine

Arrange = Callable[[list[Row]], Result]


@dataclasses.dataclass(frozen=True)
class Measure:
    """How a row is measured, and the plain values that it depends on."""

    run: Callable[[], Row]
    settings: Mapping[str, Any]


def measure_missing(
    name: str,
    measures: Mapping[str, Measure],
    arrange: Arrange,
    *,
    save: str | os.PathLike | None = None,
    fresh: bool = False,
    only: tuple[str, ...] | None = None,
) -> Result:
    """Measure the rows that the record in `save` lacks, print and save all.

    Args:
      name: the benchmark's; the record is NAME.json in the folder `save`.
      measures: the rows there are, by key, in order.
      arrange: makes a result of rows, in any number.
      fresh: measure again what the record has; all of it, or the rows named by `only`.
      only: keys to measure; rows kept are shown whether they are named or not.

    Raises:
      ValueError: an unknown key, or rows of the record that were measured with other settings.
    """
    unknown = [key for key in only or () if key not in measures]
    if unknown:
        raise ValueError(f"only: {', '.join(unknown)} is none of {', '.join(measures)}.")
    wanted = tuple(measures) if only is None else only
    file = _file(name, save)
    kept = _read(file, measures, ignore=wanted if fresh else ())
    missing = [key for key in wanted if key not in kept]
    for number, key in enumerate(missing, 1):
        print(f"{name}: {key}, {number} of {len(missing)}", file=sys.stderr, flush=True)
        row = measures[key].run()
        own = {"key": key, "settings": _plain(measures[key].settings), "machine": machine()}
        kept[key] = dataclasses.replace(row, detail={**row.detail, **own})
        if file is not None:
            _result(kept, measures, arrange).save(file)
    return finish(_result(kept, measures, arrange), file)


def _result(kept: dict[str, Row], order: Mapping[str, Any], arrange: Arrange) -> Result:
    """The result, with the last machine of its rows; of others and earlier days a note tells."""
    rows = [kept[key] for key in order if key in kept]
    result = arrange(rows)
    where = [row.detail["machine"] for row in rows]
    last = max(where, key=lambda m: m["date"], default=machine())
    others: dict[str, int] = {}
    for found in where:
        if found != last:
            differs = ", ".join(f"{k} {v}" for k, v in found.items() if v != last.get(k))
            others[differs] = others.get(differs, 0) + 1
    told = tuple(f"Of the rows, {n} measured with {differs}." for differs, n in others.items())
    return dataclasses.replace(result, machine=last, notes=(*result.notes, *told))


def _file(name: str, save: str | os.PathLike | None) -> Path | None:
    if save is None:
        return None
    path = Path(save)
    return path if path.suffix == ".json" else path / f"{name}.json"


def _read(
    file: Path | None, measures: Mapping[str, Measure], ignore: tuple[str, ...]
) -> dict[str, Row]:
    """The rows of a record by key, but for those to ignore and those that are no more."""
    found: dict[str, Row] = {}
    if file is None or not file.is_file():
        return found
    for row in json.loads(file.read_text("utf-8"))["rows"]:
        key = row["detail"]["key"]
        if key in ignore or key not in measures:
            continue
        theirs, ours = row["detail"]["settings"], _plain(measures[key].settings)
        if theirs != ours:
            raise ValueError(
                f"save: {file} has {key} with other settings ({_differences(theirs, ours)}); "
                "--fresh replaces it, or save in another folder."
            )
        found[key] = Row(**row)
    return found


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    names = [n for n in {**theirs, **ours} if theirs.get(n) != ours.get(n)]
    return ", ".join(f"{n} {theirs.get(n)}, not {ours.get(n)}" for n in names)


def _plain(settings: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(dict(settings)))
