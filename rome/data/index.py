"""What reading all of a data set has shown, kept in a file for the next start and other processes.

It counts as long as no file of the data set has another name, size or time of change.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rome.files import write_atomically

_HEAD = "head"


def fingerprint(files: Iterable[pathlib.Path], settings: str) -> str:
    """Return a hash of the files' names, sizes and times, which are known without reading them.

    Args:
      files: of the data set.
      settings: what else the index depends on.
    """
    digest = hashlib.sha256(settings.encode())
    for path in files:
        status = path.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)  # a copy can keep the first one
        digest.update(os.fsencode(path))
        digest.update(repr((status.st_size, times)).encode())
    return digest.hexdigest()


def save_index(
    path: pathlib.Path, key: str, head: dict[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write an index.

    Args:
      path: of the file, .npz.
      key: fingerprint of the data set.
      head: a JSON document.
      arrays: by name.
    """
    text = json.dumps(head | {"key": key})
    named: dict[str, Any] = {_HEAD: np.frombuffer(text.encode(), np.uint8), **arrays}
    file = io.BytesIO()
    np.savez(file, **named)
    write_atomically(path, file.getvalue())


def load_index(path: pathlib.Path, key: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Return head and arrays; None where the file is not there, damaged or of other data."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        head = json.loads(arrays.pop(_HEAD).tobytes())
        return (head, arrays) if head["key"] == key else None
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
