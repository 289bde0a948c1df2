"""Differences between successive checkpoints, for hosts that have the earlier one.

An RL step with a small learning rate leaves most bfloat16 weights unchanged (the update is below
half a unit in their last place), so the exclusive or of two checkpoints is mostly zeros, which zstd
compresses well.

A delta is one file: a line of JSON, then one record for each block. It names the digest of the
directory that it starts from and of the directory that it produces. `apply_delta` hashes every byte
that it writes, and renames the result into place only if its digest is the promised one. Any
mismatch is a `BrokenChain`, and the remedy is to copy the full checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import zstandard

from rome.files import sync
from rome.model.hf.files import check_space, in_threads

LEVEL = 1  # of zstd: zeros compress as well at the fastest level
# Each block is read, compared, hashed and written by itself, so that all cores have work even where
# a checkpoint is one file.
BLOCK_BYTES = 4 << 20
# Index of the file in the header's list, index of the block, bytes of the compressed differences.
_RECORD = struct.Struct("<QQQ")
_MAX_HEADER_BYTES = 64 << 20


class BrokenChain(ValueError):
    """The delta does not lead from the local checkpoint to the promised one."""


# -- making and applying deltas
# -------------------------------------------------------------------------------------------------


def directory_digest(directory: pathlib.Path) -> str:
    """Return a hash over the names and bytes of all files in a directory: 64 hexadecimal digits.

    It is a hash over the files' hashes, which are over the hashes of their blocks.
    """
    files = _list_files(directory)
    sums = _Sums(files)

    def add(number: int, block: int) -> None:
        sums.add(files[number].name, block, _read(files[number], block))

    _for_each_block([path.stat().st_size for path in files], add)
    return sums.digest()


def write_delta(
    base: pathlib.Path, result: pathlib.Path, delta: pathlib.Path, base_digest: str | None = None
) -> int:
    """Write the difference between two checkpoint directories, completely or not at all.

    Args:
      base: directory that the delta starts from.
      result: directory that it leads to.
      delta: file to write.
      base_digest: digest of `base`, where it is known (the result of the delta before); it saves
        hashing the directory.

    Returns:
      The delta's size in bytes.
    """
    earlier = {path.name: path for path in _list_files(base)}
    files = _list_files(result)
    sizes = [path.stat().st_size for path in files]
    from_base = [
        path.name in earlier and earlier[path.name].stat().st_size == size
        for path, size in zip(files, sizes, strict=True)
    ]
    sums = _Sums(files)
    lock = threading.Lock()
    partial = delta.with_name(delta.name + ".tmp")
    records = delta.with_name(delta.name + ".records")

    def write_block(number: int, block: int) -> None:
        path = files[number]
        data = _read(path, block)
        sums.add(path.name, block, data)
        if from_base[number]:
            data = data ^ _read(earlier[path.name], block)
        compressed = zstandard.ZstdCompressor(level=LEVEL).compress(data.data)
        with lock:
            out.write(_RECORD.pack(number, block, len(compressed)))
            out.write(compressed)

    with records.open("wb") as out:
        _for_each_block(sizes, write_block)
    entries = [
        {"name": path.name, "bytes": size, "sha256": sums.of(path.name), "from_base": is_difference}
        for path, size, is_difference in zip(files, sizes, from_base, strict=True)
    ]
    header = {
        "base": base_digest or directory_digest(base),
        "result": sums.digest(),
        "block": BLOCK_BYTES,
        "files": entries,
    }
    with partial.open("wb") as out, records.open("rb") as body:
        out.write(json.dumps(header).encode() + b"\n")
        shutil.copyfileobj(body, out)
        out.flush()
        os.fsync(out.fileno())
    records.unlink()
    os.replace(partial, delta)
    sync(delta.parent)
    return delta.stat().st_size


def read_header(delta: pathlib.Path) -> dict[str, Any]:
    """Return the header of a delta: digests `base` and `result`, and its `files`.

    Raises:
      BrokenChain: the file is not a delta, or uses other blocks.
    """
    try:
        with delta.open("rb") as file:
            header = json.loads(file.readline(_MAX_HEADER_BYTES))
        _check_header(header)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenChain(
            f"{delta} is not a delta ({error!r}); fetch the full checkpoint"
        ) from None
    return header


def _check_header(header: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError unless the header is complete and safe to use."""
    for entry in header["files"]:
        name = entry["name"]
        is_plain_name = pathlib.PurePath(name).name == name and name not in ("", ".", "..")
        if not is_plain_name:  # it would be written outside the target directory
            raise ValueError(f"file name {name!r}")
        int(entry["bytes"])
        str(entry["sha256"])
        bool(entry["from_base"])
    has_digests = isinstance(header["base"], str) and isinstance(header["result"], str)
    if header["block"] != BLOCK_BYTES or not has_digests:
        raise ValueError("blocks of another length, or no digests")


def apply_delta(base: pathlib.Path, delta: pathlib.Path, target: pathlib.Path) -> str:
    """Make `target` from `base` and a delta, completely or not at all, even after a power cut.

    Args:
      base: the caller has compared its digest with the header's.
      delta: from `write_delta`.
      target: directory to make; replaced where it exists.

    Returns:
      The digest of `target`.

    Raises:
      BrokenChain: the result would not be the promised one; nothing is left of it.
    """
    header = read_header(delta)
    files = header["files"]
    sizes = [entry["bytes"] for entry in files]
    with _new_directory(target, sum(sizes)) as partial:
        sums = _Sums([partial / entry["name"] for entry in files])
        try:
            _rebuild_files(base, delta, partial, files, sums)
        except (zstandard.ZstdError, struct.error, KeyError, FileNotFoundError) as error:
            raise BrokenChain(
                f"{delta} is not whole, or its base is not ({error!r}); fetch the full checkpoint"
            ) from None
        except BrokenChain as error:
            raise BrokenChain(f"{delta}: {error}; fetch the full checkpoint") from None
        if sums.digest() != header["result"]:
            raise BrokenChain(
                f"{delta} promises {header['result']}, but leads to {sums.digest()} from here;"
                " fetch the full checkpoint"
            )
    return header["result"]


def _rebuild_files(
    base: pathlib.Path,
    delta: pathlib.Path,
    partial: pathlib.Path,
    files: list[dict[str, Any]],
    sums: _Sums,
) -> None:
    """Write the files of a delta's header to `partial`, and add their blocks to `sums`."""
    sizes = [entry["bytes"] for entry in files]
    records = _find_records(delta)

    def rebuild(number: int, block: int) -> None:
        entry = files[number]
        start = block * BLOCK_BYTES
        length = min(BLOCK_BYTES, sizes[number] - start)
        data = _read_record(delta, *records[number, block])
        if entry["from_base"]:
            old = _read(base / entry["name"], block)
            if old.nbytes != length or data.nbytes != length:
                raise BrokenChain(f"{entry['name']} has another length here")
            data = data ^ old
        sums.add(entry["name"], block, data)
        _write(partial / entry["name"], block, data)

    for entry in files:
        _allocate(partial / entry["name"], entry["bytes"])
    _for_each_block(sizes, rebuild)


def copy_checkpoint(source: pathlib.Path, target: pathlib.Path) -> str:
    """Copy a checkpoint directory, completely or not at all.

    Returns:
      The digest of the bytes that were read.
    """
    files = _list_files(source)
    sizes = [path.stat().st_size for path in files]
    sums = _Sums(files)

    def copy(number: int, block: int) -> None:
        path = files[number]
        data = _read(path, block)
        sums.add(path.name, block, data)
        _write(partial / path.name, block, data)

    with _new_directory(target, sum(sizes)) as partial:
        for path, size in zip(files, sizes, strict=True):
            _allocate(partial / path.name, size)
        _for_each_block(sizes, copy)
    return sums.digest()


# -- digests, blocks and records
# -------------------------------------------------------------------------------------------------


class _Sums:
    """SHA-256 of blocks, of files over their blocks, and of a directory over its files.

    Blocks may be added in any order, from any thread.
    """

    def __init__(self, files: list[pathlib.Path]):
        self._blocks: dict[str, dict[int, bytes]] = {path.name: {} for path in files}

    def add(self, name: str, block: int, data: np.ndarray) -> None:
        self._blocks[name][block] = hashlib.sha256(data.data).digest()

    def of(self, name: str) -> str:
        """Return the hash of one file."""
        digests = [digest for _, digest in sorted(self._blocks[name].items())]
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def digest(self) -> str:
        """Return the hash of the directory."""
        lines = [f"{name}\0{self.of(name)}\n" for name in sorted(self._blocks)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _for_each_block(sizes: list[int], act: Callable[[int, int], None]) -> None:
    """Call `act(file, block)`, in threads, for each block of files of these sizes."""

    def act_on(item: tuple[int, int]) -> None:
        act(*item)

    in_threads(act_on, _block_indices(sizes))


def _block_indices(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (file, block) for files of these sizes; an empty file has no block."""
    for number, size in enumerate(sizes):
        num_blocks = -(-size // BLOCK_BYTES)
        for block in range(num_blocks):
            yield number, block


def _find_records(delta: pathlib.Path) -> dict[tuple[int, int], tuple[int, int]]:
    """Return (file, block) -> (offset, bytes) of the compressed differences in the delta."""
    places = {}
    end = delta.stat().st_size
    with delta.open("rb") as file:
        file.readline(_MAX_HEADER_BYTES)
        offset = file.tell()
        while offset < end:
            number, block, size = _RECORD.unpack(file.read(_RECORD.size))
            start = offset + _RECORD.size
            offset = start + size
            if offset > end:
                raise BrokenChain("it ends amid a record")
            places[number, block] = (start, size)
            file.seek(offset)
    return places


def _read_record(delta: pathlib.Path, offset: int, size: int) -> np.ndarray:
    """Return the decompressed bytes of one record."""
    with delta.open("rb") as file:
        compressed = os.pread(file.fileno(), size, offset)
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(compressed), np.uint8)


# -- files
# -------------------------------------------------------------------------------------------------


def _list_files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


def _read(path: pathlib.Path, block: int) -> np.ndarray:
    """Return one block's bytes; fewer at the end of the file."""
    with path.open("rb") as file:
        return np.frombuffer(os.pread(file.fileno(), BLOCK_BYTES, block * BLOCK_BYTES), np.uint8)


def _write(path: pathlib.Path, block: int, data: np.ndarray) -> None:
    """Write one block of a file that exists."""
    with path.open("r+b") as out:
        os.pwrite(out.fileno(), data.data, block * BLOCK_BYTES)


def _allocate(path: pathlib.Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


@contextlib.contextmanager
def _new_directory(target: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    """Yield a directory that becomes `target` once all of it is on disk.

    It is removed if anything fails. Checks first that there is room for `size` bytes.
    """
    check_space(target.parent, size)
    partial = target.with_name(target.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        in_threads(sync, _list_files(partial))
        sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    sync(target.parent)
