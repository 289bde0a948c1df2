"""Weights as differences: what of a checkpoint's bytes changed since the one before, for hosts that have that one.

An RL step with a small learning rate leaves most bfloat16 weights as they were (the update is below half of their last digit), so the exclusive or
of two checkpoints is mostly zeros, and zstd makes little of it.

A delta is one file: a line of JSON, then records. It names the digest of the directory that it begins from and of the one that it results in. Who
applies it starts from a directory of just that digest, hashes every byte that he writes, and shows the result under its name only when its digest is
the promised one. Whatever does not fit is a `BrokenChain`, whose remedy is the full checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import struct
import threading
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import zstandard

from rome.model.hf_files import BLOCK_BYTES, check_space, in_threads, sync

LEVEL = 1  # of zstd: zeros compress as well at the fastest one
_RECORD = struct.Struct("<QQ")  # file's place in the header's list, bytes of the compressed block; blocks of a file follow each other
_MAX_HEADER = 64 << 20


class BrokenChain(ValueError):
    """This delta does not lead from what is here to what it promises; fetch the full checkpoint."""


def directory_digest(directory: pathlib.Path) -> str:
    """Of names and bytes of all files in it, as 64 hexadecimal digits."""
    sums: dict[str, str] = {}

    def add(path: pathlib.Path) -> None:
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()

    in_threads(add, _files(directory))
    return _digest(sums)


def write_delta(base: pathlib.Path, result: pathlib.Path, delta: pathlib.Path) -> int:
    """Writes what leads from one checkpoint directory to the other; it is there whole or not at all. Returns its bytes."""
    before = {path.name: path for path in _files(base)}
    after = _files(result)
    partial = delta.with_name(delta.name + ".tmp")
    records = delta.with_name(delta.name + ".records")
    base_sums: dict[str, str] = {}
    sums: dict[str, str] = {}
    lock = threading.Lock()

    def compare(number: int, out: BinaryIO) -> None:
        old, new = before.get(after[number].name), after[number]
        if old is not None and old.stat().st_size != new.stat().st_size:
            old = None
        old_sum, new_sum = hashlib.sha256(), hashlib.sha256()
        compressor = zstandard.ZstdCompressor(level=LEVEL)
        for old_block, new_block in _pairs(old, new):
            new_sum.update(new_block)
            if old is not None:
                old_sum.update(old_block)
            changes = compressor.compress(_xor(old_block, new_block))
            with lock:  # one file's blocks stand in order; those of several files may alternate
                out.write(_RECORD.pack(number, len(changes)) + changes)
        sums[new.name] = new_sum.hexdigest()
        if old is not None:
            base_sums[old.name] = old_sum.hexdigest()

    with records.open("wb") as out:
        in_threads(lambda number: compare(number, out), range(len(after)))
    for name in before.keys() - base_sums.keys():  # gone, or of another length: part of the base's digest all the same
        with before[name].open("rb") as file:
            base_sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    header = {
        "base": _digest(base_sums), "result": _digest(sums),
        "files": [{
            "name": path.name, "bytes": path.stat().st_size, "sha256": sums[path.name],
            "from_base": path.name in before and before[path.name].stat().st_size == path.stat().st_size,
        } for path in after],
    }
    with partial.open("wb") as out, records.open("rb") as body:
        out.write(json.dumps(header).encode() + b"\n")
        shutil.copyfileobj(body, out, BLOCK_BYTES)
        out.flush()
        os.fsync(out.fileno())
    records.unlink()
    os.replace(partial, delta)
    sync(delta.parent)
    return delta.stat().st_size


def read_header(delta: pathlib.Path) -> dict:
    """base and result digests, and the files. Raises BrokenChain for what is no delta."""
    try:
        with delta.open("rb") as file:
            header = json.loads(file.readline(_MAX_HEADER))
        for entry in header["files"]:
            if pathlib.PurePath(entry["name"]).name != entry["name"] or entry["name"] in ("", ".", ".."):
                raise ValueError(f"file name {entry['name']!r}")
            (int(entry["bytes"]), str(entry["sha256"]), bool(entry["from_base"]))
        (str(header["base"]), str(header["result"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenChain(f"{delta} is not a delta ({error!r}); fetch the full checkpoint") from None
    return header


def apply_delta(base: pathlib.Path, delta: pathlib.Path, target: pathlib.Path) -> str:
    """Makes `target` out of `base`, whose digest the caller has compared with the header's. Returns the digest of target.

    It is there whole or not at all, also after a power cut. Raises BrokenChain, and leaves nothing, when it would not be what the delta promises.
    """
    header = read_header(delta)
    files = header["files"]
    check_space(target.parent, sum(entry["bytes"] for entry in files))
    partial = target.with_name(target.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        places = _places(delta, len(files))
        in_threads(lambda number: _rebuild(base, delta, partial, files[number], places[number]), range(len(files)))
        sync(partial)
    except (BrokenChain, OSError, zstandard.ZstdError, struct.error) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise BrokenChain(f"{delta}: {error}; fetch the full checkpoint") from None
    digest = _digest({entry["name"]: entry["sha256"] for entry in files})  # each file was compared with its own
    if digest != header["result"]:
        shutil.rmtree(partial, ignore_errors=True)
        raise BrokenChain(f"{delta} promises {header['result']}, but its files have {digest}; fetch the full checkpoint")
    _show(partial, target)
    return digest


def copy_checkpoint(source: pathlib.Path, target: pathlib.Path) -> str:
    """The full way: copies the directory, whole or not at all. Returns its digest, that of the bytes as they were read."""
    sizes = {path: path.stat().st_size for path in _files(source)}
    check_space(target.parent, sum(sizes.values()))
    partial = target.with_name(target.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sums: dict[str, str] = {}

    def copy(path: pathlib.Path) -> None:
        digest = hashlib.sha256()
        with path.open("rb") as read, (partial / path.name).open("wb") as write:
            while block := read.read(BLOCK_BYTES):
                digest.update(block)
                write.write(block)
            write.flush()
            os.fsync(write.fileno())
        sums[path.name] = digest.hexdigest()

    try:
        in_threads(copy, sizes)
        sync(partial)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _show(partial, target)
    return _digest(sums)


def _rebuild(base: pathlib.Path, delta: pathlib.Path, into: pathlib.Path, entry: dict, places: list[tuple[int, int]]) -> None:
    """One file: each block is the base's, with the delta's differences."""
    digest, decompressor = hashlib.sha256(), zstandard.ZstdDecompressor()
    old = (base / entry["name"]).open("rb") if entry["from_base"] else None
    with delta.open("rb") as changes, (into / entry["name"]).open("wb") as out:
        for offset, size in places:
            changes.seek(offset)
            difference = decompressor.decompress(changes.read(size), max_output_size=BLOCK_BYTES)
            block = _xor(old.read(len(difference)) if old is not None else None, difference)
            digest.update(block)
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    if old is not None:
        old.close()
    if digest.hexdigest() != entry["sha256"]:
        raise BrokenChain(f"{entry['name']} would have other bytes than promised")


def _places(delta: pathlib.Path, count: int) -> list[list[tuple[int, int]]]:
    """For each file of the header, where its blocks lie in the delta: offset and bytes."""
    places: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    end = delta.stat().st_size
    with delta.open("rb") as file:
        file.readline(_MAX_HEADER)
        while (offset := file.tell()) < end:
            number, size = _RECORD.unpack(file.read(_RECORD.size))
            if number >= count or offset + _RECORD.size + size > end:
                raise BrokenChain("it ends amid a record")
            places[number].append((offset + _RECORD.size, size))
            file.seek(size, os.SEEK_CUR)
    return places


def _pairs(old: pathlib.Path | None, new: pathlib.Path) -> Iterator[tuple[bytes | None, bytes]]:
    """Both files block by block; None for an old one that is not there."""
    with new.open("rb") as new_file:
        if old is None:
            while block := new_file.read(BLOCK_BYTES):
                yield None, block
        else:
            with old.open("rb") as old_file:
                while block := new_file.read(BLOCK_BYTES):
                    yield old_file.read(len(block)), block


def _xor(one: bytes | None, other: bytes) -> bytes:
    if one is None:
        return other
    if len(one) != len(other):
        raise BrokenChain("the base is shorter than the delta says")
    return np.bitwise_xor(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)).tobytes()


def _show(partial: pathlib.Path, target: pathlib.Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    sync(target.parent)


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


def _digest(sums: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{name}\0{sums[name]}\n" for name in sorted(sums)).encode()).hexdigest()
