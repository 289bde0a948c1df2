"""Rows of a data set's file: JSON Lines, a JSON list of objects, or parquet.

Each row knows its place, which errors about it name.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from envs.tasks.harbor.errors import TaskError
from envs.tasks.harbor.task import HarborTask

MAX_FILE_BYTES = 4 << 30
MAX_JSON_BYTES = 1 << 30
BATCH_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file.

    `line` counts from 1 and is 0 where rows have no lines (parquet); `number` counts rows from 1.
    """

    file: pathlib.Path
    number: int
    line: int
    values: Mapping[str, Any]

    def fault(self, message: str) -> TaskError:
        """Return an error about this row."""
        return TaskError(self.file, self.line, f"row {self.number}: {message}")

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text field. Raises TaskError if it is no text, or missing without a default."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                there = ", ".join(map(str, list(self.values)[:20]))[:200]
                raise self.fault(f"the field {key!r} is missing; there are {there}")
            return default
        if not isinstance(value, str):
            raise self.fault(f"{key} is a {type(value).__name__}, but must be text")
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise self.fault(
                f"{key} holds a NUL or half a surrogate pair, which no text file holds"
            )
        return value

    def binary(self, key: str) -> bytes:
        """Return a field of bytes. Raises TaskError."""
        value = self.values.get(key)
        if not isinstance(value, bytes):
            raise self.fault(f"{key} is a {type(value).__name__}, but must be bytes")
        return value


def read_rows(file: pathlib.Path, faults: list[TaskError] | None = None) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .json or .parquet file.

    Args:
      file: the file.
      faults: a list to which rows that are no objects are added as errors instead of being raised.

    Raises:
      TaskError: the file cannot be read; names the line where there is one.
    """
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise TaskError(file, 0, "not a regular file")
        limit = MAX_FILE_BYTES if file.suffix == ".parquet" else MAX_JSON_BYTES
        if size > limit:
            raise TaskError(file, 0, f"{size} bytes, and at most {limit} are read")
        readers = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}
        if file.suffix not in readers:
            raise TaskError(
                file, 0, f"the suffix {file.suffix!r} is not one of {', '.join(readers)}"
            )
        for row in readers[file.suffix](file):
            if isinstance(row, Row):
                yield row
            elif faults is None:
                raise row
            else:
                faults.append(row)
    except OSError as error:
        raise TaskError(file, 0, f"cannot be read: {error}") from error


def _json_lines(file: pathlib.Path) -> Iterator[Row | TaskError]:
    number = 0
    with open(file, "rb") as lines:
        for line, content in enumerate(lines, 1):
            if not content.strip():
                continue
            number += 1
            try:
                value = parse_json(file, content.rstrip(), line)
            except TaskError as error:
                yield error
            else:
                yield _row(file, number, line, value)


def _json_list(file: pathlib.Path) -> Iterator[Row | TaskError]:
    values = parse_json(file, file.read_bytes(), 1)
    if not isinstance(values, list):
        raise TaskError(
            file, 1, f"a list of objects is needed, and this is a {type(values).__name__}"
        )
    for number, value in enumerate(values, 1):
        yield _row(file, number, 0, value)


def _row(file: pathlib.Path, number: int, line: int, value: Any) -> Row | TaskError:
    if isinstance(value, dict):
        return Row(file, number, line, value)
    message = f"row {number} is a {type(value).__name__}, but must be an object"
    return TaskError(file, line, message)


def parse_json(file: pathlib.Path, content: bytes, line: int) -> Any:
    """Parse JSON that begins at `line` of a file. Raises TaskError."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise TaskError(
            file, line + error.lineno - 1, f"not JSON: {error.msg} at column {error.colno}"
        ) from error
    except UnicodeDecodeError as error:
        raise TaskError(
            file, line + content[: error.start].count(b"\n"), f"not UTF-8 text ({error.reason})"
        ) from error
    except (ValueError, RecursionError) as error:  # thousands of digits; nested too deeply
        raise TaskError(
            file, line, f"not JSON that can be read: {type(error).__name__}: {str(error)[:80]}"
        ) from error


def _parquet(file: pathlib.Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TaskError(
            file,
            0,
            "a parquet file needs the package pyarrow, which is not installed; pip install pyarrow,"
            " or convert the file to JSON Lines",
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(file, number, 0, values)
    # A damaged file, or text that cannot be decoded.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(
            file,
            0,
            f"not parquet that can be read, after row {number}: {type(error).__name__}:"
            f" {str(error)[:200]}",
        ) from error


def collect_tasks(
    faults: list[TaskError] | None,
    loads: Iterable[tuple[Callable[[str], TaskError], Callable[[], HarborTask]]],
) -> list[HarborTask]:
    """Load tasks, of which no two may have the same name.

    Args:
      faults: a list to which faults are added instead of being raised.
      loads: for each task a function that makes errors about it, and one that loads it.
    """
    tasks: dict[str, HarborTask] = {}
    for fault, load in loads:
        try:
            task = load()
            if task.name in tasks:
                raise fault(f"task {task.name!r} is there twice")
            tasks[task.name] = task
        except TaskError as error:
            if faults is None:
                raise
            faults.append(error)
    return list(tasks.values())
