"""Files that a reader sees whole or not at all, and that survive a crash of the machine."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from typing import Any, BinaryIO

PARTIAL = ".partial"  # ends the name of a file that is being written
_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def find_shipped(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return a path; a relative one that is not in the working directory, in the repository.

    Configs name shipped files as they lie in the repository (experiments/sft.py), and an editable
    install is used from any folder.
    """
    path = pathlib.Path(path)
    if path.is_absolute() or path.exists() or not (_REPOSITORY / path).exists():
        return path
    return _REPOSITORY / path


def write_atomically(
    path: str | os.PathLike[str], data: bytes | str, *, fsync: bool = True
) -> None:
    """Write a file beside its final name and rename it into place.

    Args:
      path: final name. An existing file is replaced; its folder must exist.
      data: content; text is written as UTF-8.
      fsync: wait until content and name are on disk, so that they survive a power failure.

    Raises:
      OSError: the file could not be written. Nothing is left under `path` that was not there.
    """
    path = pathlib.Path(path)
    content = data.encode() if isinstance(data, str) else data
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if fsync:
        sync(path.parent)


def append_line(path: str | os.PathLike[str], text: str) -> None:
    """Append a line of text and wait until it is on disk.

    A line that a kill cut off stays a line of its own.
    """
    with open(path, "ab+") as file:
        if _ends_within_line(file):
            file.write(b"\n")
        file.write(f"{text}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def _ends_within_line(file: BinaryIO) -> bool:
    """Return whether the last line of a file is incomplete because a kill cut it off."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def read_json(path: str | os.PathLike[str], remedy: str, kind: type = dict) -> Any:
    """Return the document of a JSON file.

    Args:
      path: of the file.
      remedy: sentence that ends the message of an error.
      kind: type that the document must have.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is empty, no JSON, nested too deeply or of another kind. The message names the
        file.
    """
    content = pathlib.Path(path).read_bytes()
    try:
        document = json.loads(content)
    except RecursionError:
        reason = "is not JSON (it is nested too deeply)"
    except ValueError as error:
        reason = f"is not JSON ({error if content.strip() else 'it is empty'})"
    else:
        if isinstance(document, kind):
            return document
        reason = f"holds a {type(document).__name__}, not a {kind.__name__}"
    raise ValueError(f"{os.fspath(path)} {reason}. {remedy}")


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
