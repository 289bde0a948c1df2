"""Where the records of files lie, and one record read from its place.

A file of JSON holds one record, or a list of them; one of JSON Lines a record a line; one of
parquet a record a row. Contents decide, so a file without a usual suffix is read where it is named.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from rome.data.formats.conversation import UnfitError
from rome.data.formats.detect import is_conversation

SUFFIXES = (".json", ".jsonl", ".ndjson", ".traj", ".parquet")  # read in folders
MAX_RECORD_BYTES = 64 << 20
MAX_DOCUMENT_BYTES = 1 << 30  # of a file of JSON that is no JSON Lines
ROW_GROUPS_KEPT = 4  # of parquet, in memory
_PARQUET = b"PAR1"


class Place(NamedTuple):
    """Where a record lies.

    Attributes:
      start: its first byte; the number of its row in parquet.
      size: in bytes; 0 in parquet.
    """

    start: int
    size: int


def find_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Return a file, or the files below a folder whose suffix is known, in sorted order.

    Hidden files and folders are left out, and links to folders are not followed.

    Raises:
      ValueError: there is no such place, or nothing in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {path}")
    found = []
    for folder, folders, names in os.walk(path, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = pathlib.Path(folder, name)
            is_known = file.suffix.lower() in SUFFIXES and not name.startswith(".")
            if is_known and file.is_file():
                found.append(file)
    if not found:
        raise ValueError(f"the folder {path} has no file that ends with {', '.join(SUFFIXES)}")
    return found


def find_records(path: pathlib.Path) -> Iterator[Place | UnfitError]:
    """Yield the place of each record of a file, or why there is none that can be read."""
    try:
        with open(path, "rb") as file:
            is_parquet = file.read(len(_PARQUET)) == _PARQUET
        if is_parquet:
            yield from _find_rows(path)
        elif _has_lines(path):
            yield from _find_lines(path)
        else:
            yield from _find_in_document(path)
    except OSError as error:
        yield UnfitError(f"cannot be read: {error}")


def read_bytes(path: pathlib.Path, place: Place) -> bytes:
    """Return the JSON text of a record.

    Raises:
      UnfitError: it is longer than MAX_RECORD_BYTES.
    """
    if not place.size:
        return json.dumps(_read_row(path, place.start), default=str).encode()
    if place.size > MAX_RECORD_BYTES:
        raise UnfitError(f"{place.size} bytes long; at most {MAX_RECORD_BYTES} are read")
    with open(path, "rb") as file:
        file.seek(place.start)
        return file.read(place.size)


def parse(content: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
      UnfitError: it is no JSON in UTF-8.
    """
    try:
        value = json.loads(content.decode())
        if b"\\u" in content:  # it can spell half of a surrogate pair, which no text holds
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise UnfitError("a text holds half of a surrogate pair, which is no Unicode") from None
    except UnicodeDecodeError as error:
        raise UnfitError(f"not UTF-8: byte {error.start} is {content[error.start]:#x}") from None
    except RecursionError:
        raise UnfitError("nested too deeply") from None
    except ValueError as error:
        raise UnfitError(f"not JSON: {error}") from None


def _raise(error: OSError) -> None:
    raise error  # without it, os.walk would silently skip the folder


# -- JSON
# -------------------------------------------------------------------------------------------------


def _has_lines(path: pathlib.Path) -> bool:
    """Return whether a file is JSON Lines: by its suffix, or two lines that are whole values."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    whole = 0
    with open(path, "rb") as file:
        while whole < 2 and (line := file.readline(MAX_RECORD_BYTES)):
            if not line.strip():
                continue
            try:
                parse(line)
            except UnfitError:
                return False
            whole += 1
    return whole == 2


def _find_lines(path: pathlib.Path) -> Iterator[Place]:
    start = 0
    with open(path, "rb") as file:
        for size, is_blank in _lines(file):
            if not is_blank:
                yield Place(start, size)
            start += size


def _lines(file: Any) -> Iterator[tuple[int, bool]]:
    """Yield (bytes, whether it is blank) of each line, also of one that memory does not hold."""
    size, is_blank = 0, True
    while part := file.readline(MAX_RECORD_BYTES):
        size += len(part)
        is_blank = is_blank and not part.strip()
        if part.endswith(b"\n"):
            yield size, is_blank
            size, is_blank = 0, True
    if size:
        yield size, is_blank


def _find_in_document(path: pathlib.Path) -> Iterator[Place | UnfitError]:
    size = path.stat().st_size
    if size > MAX_DOCUMENT_BYTES:
        yield UnfitError(f"{size} bytes of JSON; write it as JSON Lines, which may be longer")
        return
    content = path.read_bytes()
    if not content.strip():
        yield UnfitError("empty")
    elif not content.lstrip().startswith(b"["):
        yield Place(0, size)
    else:
        yield from _find_elements(content)


def _find_elements(content: bytes) -> Iterator[Place | UnfitError]:
    """Yield the elements of a list, those before a place where it is torn included."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        yield UnfitError(f"not UTF-8: byte {error.start} is {content[error.start]:#x}")
        return
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    byte = at
    is_first = True
    while True:
        begin = _skip(text, at, "" if is_first else ",")
        if text[begin : begin + 1] == "]":
            break
        try:
            value, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            yield UnfitError(f"its list is torn after character {at}: {error}")
            return
        if is_first and is_conversation([value]):
            yield Place(0, len(content))  # one conversation
            return
        first_byte = byte + len(text[at:begin].encode())
        byte = first_byte + len(text[begin:end].encode())
        yield Place(first_byte, byte - first_byte)
        at = end
        is_first = False
    if is_first:
        yield UnfitError("an empty list")
    elif text[begin + 1 :].strip():
        yield UnfitError(f"there is more after the end of its list, at character {begin + 1}")


def _skip(text: str, at: int, separator: str) -> int:
    """Return where the next element of a list begins: after blanks and one separator."""
    at = _after_blanks(text, at)
    if separator and text[at : at + 1] == separator:
        at = _after_blanks(text, at + 1)
    return at


def _after_blanks(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


# -- parquet
# -------------------------------------------------------------------------------------------------


def _find_rows(path: pathlib.Path) -> Iterator[Place | UnfitError]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = file.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        yield UnfitError(f"not parquet that can be read: {' '.join(str(error).split())[:200]}")
        return
    yield from (Place(number, 0) for number in range(rows))


def _read_row(path: pathlib.Path, number: int) -> Any:
    """Return a row as an object, without the nulls that stand for what a row does not have."""
    import pyarrow as pa

    try:
        first = 0
        for group, rows in enumerate(_row_groups(path)):
            if number < first + rows:
                table = _read_group(path, group)
                return _without_nulls(table.slice(number - first, 1).to_pylist()[0])
            first += rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UnfitError(f"not readable: {' '.join(str(error).split())[:200]}") from error
    raise UnfitError("its row is gone")


@functools.lru_cache(maxsize=64)
def _row_groups(path: pathlib.Path) -> tuple[int, ...]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        groups = range(file.metadata.num_row_groups)
        return tuple(file.metadata.row_group(group).num_rows for group in groups)


@functools.lru_cache(maxsize=ROW_GROUPS_KEPT)
def _read_group(path: pathlib.Path, group: int) -> Any:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
