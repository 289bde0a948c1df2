"""Documents in files: where they lie, and one read from its place.

A document is a line of a .jsonl file, a row of a .parquet file, a record of an .array_record file,
or any other file that is UTF-8 text. Lines, rows and records are objects with a "text". Where they
have a "control" too, it is a list of [first character, end] of the control tokens that the text
spells; everywhere else such a spelling is plain text.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rome.data.formats.conversation import UnfitError
from rome.data.formats.files import Place, find_records, read_bytes

# Folders below Python's own library folder that are not the library.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
LIBRARY = "stdlib"  # names the source of Python's standard library
READERS_KEPT = 64
_ARRAY_RECORD = (".array_record", ".arrayrecord")
_REMEDY = "Mend or delete it."


class Text(str):
    """A text, and the places of the control tokens that it spells.

    Attributes:
      control: (first character, end) of each, in order; () for none.
    """

    control: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, text: str, control: Sequence[Sequence[int]] = ()) -> Text:
        """Return a text with these control tokens.

        Raises:
          ValueError: the places are no pairs, overlap or lie outside the text.
        """
        made = cls(text)
        made.control = tuple((int(start), int(end)) for start, end in control)
        place = 0
        for start, end in made.control:
            if not place <= start < end <= len(text):
                raise ValueError(f"its control token at [{start}, {end}] is not within the text")
            place = end
        return made

    def parts(self) -> Iterator[tuple[str, bool]]:
        """Yield the pieces of the text in order, each with whether it is a control token."""
        place = 0
        for start, end in self.control:
            if start > place:
                yield self[place:start], False
            yield self[start:end], True
            place = end
        if place < len(self):
            yield self[place:], False


class Documents:
    """Texts in the order in which they were found.

    Args:
      files: the files that hold the documents.
      places_N3: (number of the file, start, size) of each document; the start is a byte, or the
        number of a row or record, whose size is 0.
    """

    def __init__(self, files: list[pathlib.Path], places_N3: np.ndarray):
        self._files = files
        self._places_N3 = places_N3

    def __len__(self) -> int:
        return len(self._places_N3)

    def __getitem__(self, index: int) -> Text:
        number, start, size = self._places_N3[index].tolist()
        path = self._files[number]
        text = decode(path, _read(path, start, size), self.name(index))
        if text is None:
            raise ValueError(
                f"{self.name(index)} is no text any more: it was changed while it is trained on."
                " Train on a copy that stays."
            )
        return text

    def __iter__(self) -> Iterator[Text]:
        return (self[number] for number in range(len(self)))

    def name(self, index: int) -> str:
        """Return the name of a document, for messages."""
        number, start, _ = self._places_N3[index].tolist()
        return document_name(self._files[number], start)


# -- finding
# -------------------------------------------------------------------------------------------------


def find_text_files(place: str) -> list[pathlib.Path]:
    """Return the files of a place in sorted order, hidden ones left out.

    Args:
      place: a folder, a file, or "" or "stdlib" for the source of Python's standard library.

    Raises:
      FileNotFoundError: there is no such place.
    """
    if place in ("", LIBRARY):
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        return [path for path in _walk(root, NOT_LIBRARY.__contains__) if path.suffix == ".py"]
    path = pathlib.Path(place)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or directory {path} to take text from")
    return list(_walk(path, lambda name: name.startswith(".")))


def _walk(root: pathlib.Path, left_out: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    """Yield the files below `root`, sorted. Links to folders are not followed: no endless walk."""
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if not left_out(name))
        for name in sorted(names):
            path = pathlib.Path(folder, name)
            if not left_out(name) and path.is_file():  # reading a pipe could wait for ever
                yield path


def _raise(error: OSError) -> None:
    raise error  # without it, os.walk would silently skip the folder


def document_name(path: pathlib.Path, start: int) -> str:
    """Return the name of a document, for messages."""
    kind = _kind(path)
    if kind == "lines":
        return f"{path}, byte {start}"
    return str(path) if kind == "text" else f"{path}, {kind} {start + 1}"


def scan(path: pathlib.Path) -> Iterator[tuple[int, int, Text | None]]:
    """Yield (start, size, text) of every candidate of a file; None is no document.

    Raises:
      ValueError: a line, row or record is malformed; the message names it.
    """
    kind = _kind(path)
    if kind == "text":
        content = path.read_bytes()
        yield 0, len(content), decode(path, content, str(path))
    elif kind == "lines":
        start = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield start, len(line), decode(path, line, f"{path} line {number}")
                start += len(line)
    else:
        for number in range(_count(path)):
            yield number, 0, decode(path, _read(path, number, 0), document_name(path, number))


def _kind(path: pathlib.Path) -> str:
    """Return what a file is a sequence of: lines, rows, records; or that it is one text."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return "lines"
    if suffix == ".parquet":
        return "row"
    return "record" if suffix in _ARRAY_RECORD else "text"


def _count(path: pathlib.Path) -> int:
    if _kind(path) == "record":
        return _array_reader(path).num_records()
    count = 0
    for place in find_records(path):
        if isinstance(place, UnfitError):
            raise ValueError(f"{path}: {place}. {_REMEDY}")
        count += 1
    return count


# -- reading
# -------------------------------------------------------------------------------------------------


def _read(path: pathlib.Path, start: int, size: int) -> bytes:
    kind = _kind(path)
    if kind == "record":
        return _array_reader(path).read([start])[0]
    if kind == "row":
        try:
            return read_bytes(path, Place(start, 0))
        except UnfitError as error:
            raise ValueError(f"{document_name(path, start)}: {error}. {_REMEDY}") from error
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _array_reader(path: pathlib.Path) -> Any:
    """Return an open reader of a file, another one once the file has changed."""
    status = path.stat()
    return _open_reader(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=READERS_KEPT)
def _open_reader(path: pathlib.Path, changed_ns: int, size: int) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    if not reader.ok():  # it counts no record then, and says why only when one is read
        try:
            reader.read([0])
            reason = ""
        except (RuntimeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no ArrayRecord that can be read: {reason}. {_REMEDY}")
    return reader


def decode(path: pathlib.Path, content: bytes, where: str) -> Text | None:
    """Return the text of a document, or None where it is blank or no text.

    Raises:
      ValueError: a line, row or record is no JSON object with a "text".
    """
    text = _decode_utf8(content) if _kind(path) == "text" else _parse(content, where)
    if text is None or not text.strip() or "\0" in text or not _encodes(text):
        return None
    return text


def _decode_utf8(content: bytes) -> Text | None:
    try:
        return Text(content.decode())
    except UnicodeDecodeError:
        return None


def _parse(content: bytes, where: str) -> Text:
    try:
        value = json.loads(content)
        text = value["text"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{where} is no JSON object with a "text" ({type(error).__name__}):'
            f" {content[:60]!r}. Mend or delete that line."
        ) from error
    if not isinstance(text, str):
        raise ValueError(
            f'{where}: "text" is a {type(text).__name__}, not a string. Mend or delete that line.'
        )
    try:
        return Text.of(text, value.get("control") or ())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}. Mend or delete that line.") from None


def _encodes(text: str) -> bool:
    """Return False for half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
