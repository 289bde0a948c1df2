"""Write the safetensors files of a checkpoint, in any order and from any thread.

Which tensor stands where is decided beforehand, from names and shapes (`rome.model.hf.files`
explains the format).
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from rome.files import PARTIAL, sync
from rome.model.hf.files import INDEX, SINGLE, check_space, write_json

MAX_SHARD_BYTES = 5 * 1000**3

# the types that are written
_SPELLED = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}


def file_dtype(dtype: Any) -> np.dtype:
    """Return the type that a checkpoint is written in.

    Raises:
      ValueError: checkpoints are not written in it.
    """
    dtype = np.dtype(dtype)
    if dtype not in _SPELLED:
        raise ValueError(
            f"dtype={dtype.name!r}; checkpoints are written as"
            f" {' or '.join(known.name for known in _SPELLED)}"
        )
    return dtype


class CheckpointWriter:
    """Writes a checkpoint; its files appear under their names only when all is there.

    Call `clear` (process 0), `open`, `write` for all rows, `finish`, `commit` (process 0), `close`.
    Until `commit` the directory holds no index and no single file, so nothing takes it for a
    checkpoint; an earlier checkpoint is removed first.

    Args:
      directory: made if absent.
      shapes: of the tensors, in the order in which shards are filled.
      dtype: of all tensors.
      max_shard_bytes: tensors that exceed this together go to several files.
      owner: number of this process: it writes every owners-th shard, beginning with `owner`.
      owners: number of processes.
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
        self.directory = directory
        self.dtype = dtype
        self.owner = owner
        self.owners = owners
        self.total_bytes = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        self.shard_of: dict[str, str] = {}  # tensor -> name of its file
        self._shards: dict[str, list[str]] = {}  # name of a file -> its tensors in order
        groups = _fill_shards(shapes, dtype, max_shard_bytes)
        for number, group in enumerate(groups, start=1):
            name = SINGLE
            if len(groups) > 1:
                name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            self._shards[name] = group
            self.shard_of |= dict.fromkeys(group, name)
        # tensor -> file handle, offset of its first byte
        self._places: dict[str, tuple[int, int]] = {}
        self._shapes = shapes
        self._handles: dict[str, int] = {}

    def clear(self) -> None:
        """Make the directory, without a checkpoint in it, and check that the new one fits.

        An index goes before the shards that it names.

        Raises:
          OSError: the disk has too little space.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        stale = [
            self.directory / INDEX,
            *sorted(self.directory.glob("model*.safetensors")),
            *self.directory.glob(f"model*{PARTIAL}"),
        ]
        stale = [path for path in stale if path.exists()]
        freed = sum(path.stat().st_size for path in stale)
        check_space(self.directory, self.total_bytes - freed)
        for path in stale:
            path.unlink()

    def open(self) -> None:
        """Create this process's files at their full lengths and write their headers."""
        for name in self.own_shards():
            header, data_bytes = self._header(name)
            handle = os.open(self._partial(name), os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
            self._handles[name] = handle
            os.truncate(handle, len(header) + data_bytes)
            os.pwrite(handle, header, 0)
            offset = len(header)
            for tensor in self._shards[name]:
                self._places[tensor] = (handle, offset)
                offset += self._bytes_of(tensor)

    def own_shards(self) -> list[str]:
        """Return the names of the files that this process writes."""
        return list(self._shards)[self.owner :: self.owners]

    @property
    def own_bytes(self) -> int:
        """Return the bytes of tensors that this process writes."""
        own_tensors = [tensor for name in self.own_shards() for tensor in self._shards[name]]
        return sum(map(self._bytes_of, own_tensors))

    def owns(self, tensor: str) -> bool:
        """Return whether this process writes the tensor; known after `open`."""
        return tensor in self._places

    def write(self, tensor: str, start: int, rows: np.ndarray) -> None:
        """Write rows of a tensor from row `start` on."""
        handle, offset = self._places[tensor]
        offset += start * math.prod(self._shapes[tensor][1:]) * self.dtype.itemsize
        typed = np.ascontiguousarray(rows.astype(self.dtype, copy=False))
        view = typed.reshape(-1).view(np.uint8).data
        while view:
            count = os.pwrite(handle, view, offset)
            view = view[count:]
            offset += count

    def finish(self) -> None:
        """Sync this process's files to disk; all but a single file get their names."""
        for name, handle in self._handles.items():
            os.fsync(handle)
            if name != SINGLE:
                os.replace(self._partial(name), self.directory / name)

    def commit(self, config: dict[str, Any]) -> None:
        """Turn the directory into a checkpoint, after every process has finished.

        Args:
          config: the dictionary of config.json.

        Raises:
          OSError: a shard of another process is not there.
        """
        shards = [name for name in self._shards if name != SINGLE]
        absent = [name for name in shards if not (self.directory / name).exists()]
        if absent:
            raise OSError(
                f"{self.directory} lacks {', '.join(absent[:3])}, which another process wrote; all"
                " processes need one shared directory"
            )
        write_json(self.directory / "config.json", config)
        if SINGLE in self._shards:
            os.replace(self._partial(SINGLE), self.directory / SINGLE)
        else:
            metadata = {"total_size": self.total_bytes}
            index = {"metadata": metadata, "weight_map": self.shard_of}
            write_json(self.directory / INDEX, index)
        sync(self.directory)

    def close(self) -> None:
        """Close all files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}

    def _partial(self, name: str) -> pathlib.Path:
        return self.directory / (name + PARTIAL)

    def _header(self, name: str) -> tuple[bytes, int]:
        """Return the header of a file and the bytes of the tensors that follow it."""
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
