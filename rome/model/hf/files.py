"""The files of a Hugging Face checkpoint: safetensors, read by position.

A safetensors file is the length of its header (8 bytes), the header (JSON: type, shape and byte
range of each tensor), then the bytes. Ranges are read and written with pread and pwrite, from as
many threads as there are; nothing is mapped and no tensor is held whole, so memory holds the ranges
that are being moved and no more. `rome.model.hf.writer` writes the files.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import functools
import json
import math
import os
import pathlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from rome.files import read_json, write_atomically

THREADS = 8
BLOCK_BYTES = 16 * 1024**2  # that a thread holds at a time; memory holds at most 2 * THREADS blocks
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
BAD_HEADER = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)  # of json.loads
_MAX_HEADER = 100 * 1000**2  # the format's own limit

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file; `offset` is the position of its first byte."""

    path: pathlib.Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one index of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class CheckpointReader:
    """The tensors of a checkpoint directory, by name; a context manager that opens the files.

    Headers are read at once and checked against the files' lengths, bytes when asked for.

    Attributes:
      tensors: name -> where it lies.

    Raises:
      FileNotFoundError: there is no checkpoint, or a file of it is missing.
      ValueError: a file is damaged, or the index does not fit the files.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._handles: dict[pathlib.Path, int] = {}
        self.tensors: dict[str, Stored] = {}
        index = directory / INDEX
        single = directory / SINGLE
        if index.exists() and not _is_left_behind(index, single):
            path_of = {name: directory / file for name, file in _weight_map(index).items()}
            headers = _read_headers(sorted(set(path_of.values())))
        elif single.exists():
            headers = _read_headers([single])
            path_of = dict.fromkeys(headers[single], single)
        else:
            raise FileNotFoundError(
                f"{directory} has neither {SINGLE} nor {INDEX}; is it a checkpoint?"
            )
        for name, path in path_of.items():
            if name not in headers[path]:
                raise ValueError(
                    f"{index} says that {path.name} holds {name}, but it does not;"
                    " fetch or write the checkpoint again"
                )
            self.tensors[name] = headers[path][name]

    def __enter__(self) -> CheckpointReader:
        for path in {stored.path for stored in self.tensors.values()}:
            self._handles[path] = os.open(path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read rows start to stop of a tensor, in its stored type; all of them by default.

        Raises:
          ValueError: the file ends before the tensor does.
        """
        stored = self.tensors[name]
        stop = stored.shape[0] if stop is None else stop
        handle = self._handles[stored.path]
        first_byte = stored.offset + start * stored.row_bytes
        into = np.empty((stop - start) * stored.row_bytes, np.uint8)
        view = into.data
        done = 0
        while done < into.nbytes:
            count = os.preadv(handle, [view[done:]], first_byte + done)
            if count == 0:
                raise ValueError(
                    f"{stored.path} ends amid {name}: it was cut off while it was read; fetch or"
                    " write the checkpoint again"
                )
            done += count
        return into.view(stored.dtype).reshape(stop - start, *stored.shape[1:])

    def blocks(
        self, names: Iterable[str], limit: int = BLOCK_BYTES
    ) -> Iterator[tuple[str, int, Callable[[], np.ndarray]]]:
        """Yield tensors in pieces: name, first row, and a function that reads the rows.

        Args:
          names: of the tensors.
          limit: bytes of a piece; one of a single row may have more.
        """
        for name in names:
            stored = self.tensors[name]
            num_rows = stored.shape[0]
            step = max(1, limit // stored.row_bytes)
            for start in range(0, num_rows, step):
                stop = min(start + step, num_rows)
                yield name, start, functools.partial(self.read, name, start, stop)


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: the file is not whole, or holds types that are not read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise _broken(path, f"{size} bytes cannot hold its header")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        found = {}
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            found[name] = (entry["dtype"], tuple(entry["shape"]), start, stop)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is named by the index but missing; fetch or write the checkpoint again"
        ) from None
    except (*BAD_HEADER, AttributeError, KeyError, TypeError) as error:
        raise _broken(path, f"its header: {error!r}") from None
    unknown = [f"{name} is {dtype}" for name, (dtype, *_) in found.items() if dtype not in _DTYPES]
    if unknown:
        raise ValueError(
            f"{path}: {', '.join(unknown[:3])}; read are {', '.join(_DTYPES)}. Take the"
            " checkpoint's bfloat16 release."
        )
    data = 8 + length
    tensors = {}
    for name, (spelled, shape, start, stop) in found.items():
        dtype = _DTYPES[spelled]
        if stop - start != math.prod(shape) * dtype.itemsize or data + stop > size:
            raise _broken(path, f"{size} bytes, {name} is said to end at {data + stop}")
        tensors[name] = Stored(path, data + start, dtype, shape)
    return tensors


def read_document(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it holds no JSON object.
    """
    try:
        return read_json(path, "Fetch or write the checkpoint again.")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing; is {path.parent} a Hugging Face checkpoint?"
        ) from None


def write_json(path: pathlib.Path, document: dict[str, Any]) -> None:
    """Write a JSON file; it is there whole or not at all, also after a power failure."""
    write_atomically(path, json.dumps(document, indent=2) + "\n")


def check_space(directory: pathlib.Path, needed: int) -> None:
    """Check that `needed` bytes fit on the disk of a directory.

    Raises:
      OSError: they do not (ENOSPC).
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{directory} has {free / 1e9:.1f} GB free, and the checkpoint takes {needed / 1e9:.1f}"
            " GB; make room, or write elsewhere",
        )


def in_threads(function: Callable[[T], None], items: Iterable[T]) -> None:
    """Call function(item) for each item, THREADS at a time.

    `items` is drawn no further ahead than twice that; the first error is raised.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        pending: deque[concurrent.futures.Future[None]] = deque()
        for item in items:
            if len(pending) == 2 * THREADS:
                pending.popleft().result()
            pending.append(pool.submit(function, item))
        for future in pending:
            future.result()


def _read_headers(paths: list[pathlib.Path]) -> dict[pathlib.Path, dict[str, Stored]]:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(paths, pool.map(read_header, paths), strict=True))


def _broken(path: pathlib.Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is not a whole safetensors file ({reason}); fetch or write the checkpoint again"
    )


def _is_left_behind(index: pathlib.Path, single: pathlib.Path) -> bool:
    """Return whether an index is what is left of an older checkpoint in the same folder.

    A writer of a single file removes the shards of the checkpoint before, but not always the index.

    Raises:
      ValueError: the single file and a shard are there, so it is unknown which is meant.
    """
    if not single.exists():
        return False
    shards = {index.parent / name for name in _weight_map(index).values()} - {single}
    present = sorted(shard.name for shard in shards if shard.exists())
    if present:
        raise ValueError(
            f"{index.parent} holds two checkpoints: {single.name}, and {index.name} with"
            f" {', '.join(present[:3])}. Programs differ in which they read: delete the one that is"
            " not meant."
        )
    return bool(shards)


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    weight_map = read_document(index).get("weight_map")
    is_map = isinstance(weight_map, dict)
    if not is_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map; fetch or write the checkpoint again")
    return weight_map
