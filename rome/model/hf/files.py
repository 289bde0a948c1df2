"""The files of a Hugging Face checkpoint: safetensors read and written by position, so that no
tensor need be whole in memory.

A safetensors file is the length of its header (8 bytes), the header (JSON: type, shape and byte
range of each tensor), then the bytes. Ranges are read and written with pread and pwrite, from as
many threads as there are; nothing is mapped, so memory holds what was asked for and no more.
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
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

THREADS = 8
BLOCK_BYTES = (
    16 * 1024**2
)  # what a thread holds at a time; 2 * THREADS of these are the most that is in memory
MAX_SHARD_BYTES = 5 * 1000**3
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PARTIAL = ".partial"

_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_SPELLED = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}  # what is written
_MAX_HEADER = 100 * 1000**2  # the format's own limit

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `offset` is the place of its first byte in the file."""

    path: pathlib.Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class CheckpointReader:
    """The tensors of a checkpoint directory, by name.

    Headers are read at once and checked against the files' lengths; bytes when asked for.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        index, single = directory / INDEX, directory / SINGLE
        self._handles: dict[pathlib.Path, int] = {}
        if index.exists():
            named = {name: directory / file for name, file in _weight_map(index).items()}
        elif single.exists():
            named = None
        else:
            raise FileNotFoundError(
                f"{directory} has neither {SINGLE} nor {INDEX}; is it a checkpoint?"
            )
        paths = [single] if named is None else sorted(set(named.values()))
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            headers = dict(zip(paths, pool.map(read_header, paths)))
        if named is None:
            named = dict.fromkeys(headers[single], single)
        absent = [name for name, path in named.items() if name not in headers[path]]
        if absent:
            raise ValueError(
                f"{index} says that {named[absent[0]].name} holds {absent[0]}, but it does not;"
                " fetch or write the checkpoint again"
            )
        self.tensors = {name: headers[path][name] for name, path in named.items()}

    def __enter__(self) -> CheckpointReader:
        self._handles = {
            path: os.open(path, os.O_RDONLY)
            for path in {stored.path for stored in self.tensors.values()}
        }
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop (all of them by default) of a tensor, in its stored type."""
        stored = self.tensors[name]
        stop = stored.shape[0] if stop is None else stop
        into = np.empty((stop - start) * stored.row_bytes, np.uint8)
        done, view = 0, memoryview(into)
        while done < into.nbytes:
            count = os.preadv(
                self._handles[stored.path],
                [view[done:]],
                stored.offset + start * stored.row_bytes + done,
            )
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
        """Those tensors in pieces of at most `limit` bytes (or one row): name, first row, what
        reads it.
        """
        for name in names:
            stored = self.tensors[name]
            step = max(1, limit // stored.row_bytes)
            for start in range(0, stored.shape[0], step):
                yield (
                    name,
                    start,
                    functools.partial(self.read, name, start, min(start + step, stored.shape[0])),
                )


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """What a safetensors file holds.

    Raises a ValueError where the file is not whole, or holds types that are not read.
    """
    broken = lambda reason: ValueError(
        f"{path} is not a whole safetensors file ({reason}); fetch or write the checkpoint again"
    )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise broken(f"{size} bytes cannot hold its header")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        found = {
            name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in entries.items()
        }
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is named by the index but missing; fetch or write the checkpoint again"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise broken(f"its header: {error!r}") from None
    unknown = [f"{name} is {dtype}" for name, (dtype, *_) in found.items() if dtype not in _DTYPES]
    if unknown:
        raise ValueError(
            f"{path}: {', '.join(unknown[:3])}; read are {', '.join(_DTYPES)}. Take the"
            " checkpoint's bfloat16 release."
        )
    data = 8 + length
    for name, (dtype, shape, start, stop) in found.items():
        if stop - start != math.prod(shape) * _DTYPES[dtype].itemsize or data + stop > size:
            raise broken(f"{size} bytes, {name} is said to end at {data + stop}")
    return {
        name: Stored(path, data + start, _DTYPES[dtype], shape)
        for name, (dtype, shape, start, stop) in found.items()
    }


def read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing; is {path.parent} a Hugging Face checkpoint?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}); fetch or write the checkpoint again"
        ) from None


class CheckpointWriter:
    """Writes the tensors of a checkpoint in any order and from any thread; the files appear under
    their names only when all is there.

    Which tensor stands where is decided beforehand, from names and shapes. Until `commit` the
    directory holds no index and no single file, so nothing takes it for a checkpoint; whatever an
    earlier one left there is removed first.

    Args:
      shapes: of the tensors, in the order in which shards are filled.
      owner, owners: this process writes every owners-th shard, beginning with `owner`. Process 0
        clears the directory and commits.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: np.dtype,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        owner: int = 0,
        owners: int = 1,
    ) -> None:
        self.directory, self.dtype, self.owner, self.owners = directory, dtype, owner, owners
        self.total_bytes = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        groups = _fill_shards(shapes, dtype, max_shard_bytes)
        names = (
            [SINGLE]
            if len(groups) == 1
            else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        )
        self.shard_of = {tensor: name for name, group in zip(names, groups) for tensor in group}
        self._shards = dict(zip(names, groups))
        self._places: dict[
            str, tuple[int, int]
        ] = {}  # tensor -> file handle, offset of its first byte
        self._row_bytes = {
            name: math.prod(shape[1:]) * dtype.itemsize for name, shape in shapes.items()
        }
        self._shapes = shapes
        self._handles: dict[str, int] = {}

    def clear(self) -> None:
        """Makes room: the directory is there, and no checkpoint is in it.

        An index goes before the shards that it names.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        stale = [
            self.directory / INDEX,
            *sorted(self.directory.glob("model*.safetensors")),
            *self.directory.glob(f"model*{PARTIAL}"),
        ]
        stale = [path for path in stale if path.exists()]
        check_space(self.directory, self.total_bytes - sum(path.stat().st_size for path in stale))
        for path in stale:
            path.unlink()

    def open(self) -> None:
        """Creates this process's files at their full lengths, headers written."""
        for name in self.own_shards():
            header, data_bytes = self._header(name)
            handle = self._handles[name] = os.open(
                self.directory / (name + PARTIAL), os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644
            )
            os.truncate(handle, len(header) + data_bytes)
            os.pwrite(handle, header, 0)
            offset = len(header)
            for tensor in self._shards[name]:
                self._places[tensor] = (handle, offset)
                offset += self._bytes_of(tensor)

    def own_shards(self) -> list[str]:
        return list(self._shards)[self.owner :: self.owners]

    @property
    def own_bytes(self) -> int:
        """Bytes of tensors that this process writes."""
        return sum(
            self._bytes_of(tensor) for name in self.own_shards() for tensor in self._shards[name]
        )

    def owns(self, tensor: str) -> bool:
        return tensor in self._places

    def write(self, tensor: str, start: int, rows: np.ndarray) -> None:
        """Writes rows of a tensor from row `start` on."""
        handle, offset = self._places[tensor]
        view = memoryview(
            np.ascontiguousarray(rows.astype(self.dtype, copy=False)).reshape(-1).view(np.uint8)
        )
        offset += start * self._row_bytes[tensor]
        while view:
            count = os.pwrite(handle, view, offset)
            view, offset = view[count:], offset + count

    def finish(self) -> None:
        """Everything of this process is written: its files reach the disk.

        All but a single file get their names.
        """
        for name, handle in self._handles.items():
            os.fsync(handle)
            if name != SINGLE:
                os.replace(self.directory / (name + PARTIAL), self.directory / name)

    def commit(self, config: dict[str, Any]) -> None:
        """Every process has finished: config.json, then what makes the directory a checkpoint.

        Raises where a shard is not there.
        """
        absent = [
            name for name in self._shards if name != SINGLE and not (self.directory / name).exists()
        ]
        if absent:
            raise OSError(
                f"{self.directory} lacks {', '.join(absent[:3])}, which another process wrote; all"
                " processes need one shared directory"
            )
        write_json(self.directory / "config.json", config)
        if SINGLE in self._shards:
            os.replace(self.directory / (SINGLE + PARTIAL), self.directory / SINGLE)
        else:
            write_json(
                self.directory / INDEX,
                {"metadata": {"total_size": self.total_bytes}, "weight_map": self.shard_of},
            )
        sync(self.directory)

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}

    def _header(self, name: str) -> tuple[bytes, int]:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
        offset = 0
        for tensor in self._shards[name]:
            end = offset + self._bytes_of(tensor)
            entries[tensor] = {
                "dtype": _SPELLED[self.dtype],
                "shape": list(self._shapes[tensor]),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        return struct.pack("<Q", len(text)) + text, offset

    def _bytes_of(self, tensor: str) -> int:
        return math.prod(self._shapes[tensor]) * self.dtype.itemsize


def check_space(directory: pathlib.Path, needed: int) -> None:
    """Raises an OSError where `needed` bytes do not fit on the disk of a directory."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{directory} has {free / 1e9:.1f} GB free, and the checkpoint takes {needed / 1e9:.1f}"
            " GB; make room, or write elsewhere",
        )


def file_dtype(dtype: Any) -> np.dtype:
    """The type that a checkpoint is written in."""
    dtype = np.dtype(dtype)
    if dtype not in _SPELLED:
        raise ValueError(
            f"dtype={dtype.name!r}; checkpoints are written as"
            f" {' or '.join(known.name for known in _SPELLED)}"
        )
    return dtype


def write_json(path: pathlib.Path, document: dict[str, Any]) -> None:
    """There whole, or not at all, also after a power cut."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(document, indent=2) + "\n")
    sync(partial)
    os.replace(partial, path)


def sync(path: pathlib.Path) -> None:
    """What was written to a file, or the names in a directory, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def in_threads(function: Callable[[T], None], items: Iterable[T]) -> None:
    """Calls function(item) for each, THREADS at a time.

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


def _fill_shards(
    shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, max_shard_bytes: int
) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if filled + size > max_shard_bytes and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map; fetch or write the checkpoint again")
    return weight_map
