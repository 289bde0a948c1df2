"""Weights as differences: what of a checkpoint's bytes changed since the one before, for hosts that
have that one.

An RL step with a small learning rate leaves most bfloat16 weights as they were (the update is below
half of their last digit), so the exclusive or of two checkpoints is mostly zeros, and zstd makes
little of it.

A delta is one file: a line of JSON, then records, one a block. It names the digest of the directory
that it begins from and of the one that it results in. Who applies it starts from a directory of
just that digest, hashes every byte that he writes, and shows the result under its name only when
its digest is the promised one. Whatever does not fit is a `BrokenChain`, whose remedy is the full
checkpoint.
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
from collections.abc import Iterator

import numpy as np
import zstandard

from rome.data.files import sync
from rome.model.hf.files import check_space, in_threads

LEVEL = 1  # of zstd: zeros compress as well at the fastest one
BLOCK_BYTES = (
    4 << 20
)  # each is read, compared, hashed and written by itself, so that all cores have work also where a checkpoint is one file
_RECORD = struct.Struct(
    "<QQQ"
)  # file's place in the header's list, block's place in the file, bytes of the compressed differences
_MAX_HEADER = 64 << 20


class BrokenChain(ValueError):
    """This delta does not lead from what is here to what it promises; fetch the full checkpoint."""


def directory_digest(directory: pathlib.Path) -> str:
    """Of names and bytes of all files in it: 64 hexadecimal digits, a hash over the files' hashes,
    which are over their blocks'.
    """
    files = _files(directory)
    sums = _Sums(files)

    def add(number: int, block: int) -> None:
        sums.add(files[number].name, block, _read(files[number], block))

    in_threads(lambda item: add(*item), _blocks([path.stat().st_size for path in files]))
    return sums.digest()


def write_delta(
    base: pathlib.Path, result: pathlib.Path, delta: pathlib.Path, base_digest: str | None = None
) -> int:
    """Writes what leads from one checkpoint directory to the other; it is there whole or not at
    all.

    Returns its bytes.

    Args:
      base_digest: where it is known already (the result of the delta before); it saves hashing the
        base.
    """
    before, after = {path.name: path for path in _files(base)}, _files(result)
    sizes = [path.stat().st_size for path in after]
    from_base = [
        path.name in before and before[path.name].stat().st_size == size
        for path, size in zip(after, sizes)
    ]
    sums, lock = _Sums(after), threading.Lock()
    partial, records = (delta.with_name(delta.name + suffix) for suffix in (".tmp", ".records"))

    def compare(number: int, block: int) -> None:
        new = _read(after[number], block)
        sums.add(after[number].name, block, new)
        if from_base[number]:
            new = new ^ _read(before[after[number].name], block)
        changes = zstandard.ZstdCompressor(level=LEVEL).compress(new)
        with lock:
            out.write(_RECORD.pack(number, block, len(changes)))
            out.write(changes)

    with records.open("wb") as out:
        in_threads(lambda item: compare(*item), _blocks(sizes))
    header = {
        "base": base_digest or directory_digest(base),
        "result": sums.digest(),
        "block": BLOCK_BYTES,
        "files": [
            {"name": path.name, "bytes": size, "sha256": sums.of(path.name), "from_base": based}
            for path, size, based in zip(after, sizes, from_base)
        ],
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


def read_header(delta: pathlib.Path) -> dict:
    """base and result digests, and the files. Raises BrokenChain for what is no delta."""
    try:
        with delta.open("rb") as file:
            header = json.loads(file.readline(_MAX_HEADER))
        for entry in header["files"]:
            if pathlib.PurePath(entry["name"]).name != entry["name"] or entry["name"] in (
                "",
                ".",
                "..",
            ):
                raise ValueError(f"file name {entry['name']!r}")
            (int(entry["bytes"]), str(entry["sha256"]), bool(entry["from_base"]))
        if header["block"] != BLOCK_BYTES or not all(
            isinstance(header[name], str) for name in ("base", "result")
        ):
            raise ValueError("blocks of another length, or no digests")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenChain(
            f"{delta} is not a delta ({error!r}); fetch the full checkpoint"
        ) from None
    return header


def apply_delta(base: pathlib.Path, delta: pathlib.Path, target: pathlib.Path) -> str:
    """Makes `target` out of `base`, whose digest the caller has compared with the header's.

    Returns the digest of target.

    It is there whole or not at all, also after a power cut. Raises BrokenChain, and leaves nothing,
    when it would not be what the delta promises.
    """
    header = read_header(delta)
    files = header["files"]
    sizes, blocks = [entry["bytes"] for entry in files], {}

    def rebuild(number: int, block: int) -> None:
        entry, length = files[number], min(BLOCK_BYTES, sizes[number] - block * BLOCK_BYTES)
        offset, size = blocks[number, block]
        with delta.open("rb") as file:
            data = np.frombuffer(
                zstandard.ZstdDecompressor().decompress(os.pread(file.fileno(), size, offset)),
                np.uint8,
            )
        if entry["from_base"]:
            old = _read(base / entry["name"], block)
            if old.nbytes != length or data.nbytes != length:
                raise BrokenChain(f"{entry['name']} has another length here")
            data = data ^ old
        sums.add(entry["name"], block, data)
        with (partial / entry["name"]).open("r+b") as out:
            os.pwrite(out.fileno(), data, block * BLOCK_BYTES)

    with _made_whole(target, sum(sizes)) as partial:
        sums = _Sums([partial / entry["name"] for entry in files])
        try:
            blocks = _places(delta)
            for entry in files:
                _allocate(partial / entry["name"], entry["bytes"])
            in_threads(lambda item: rebuild(*item), _blocks(sizes))
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


def copy_checkpoint(source: pathlib.Path, target: pathlib.Path) -> str:
    """The full way: copies the directory, whole or not at all.

    Returns its digest, that of the bytes as they were read.
    """
    files = _files(source)
    sizes = [path.stat().st_size for path in files]
    sums = _Sums(files)

    def copy(number: int, block: int) -> None:
        data = _read(files[number], block)
        sums.add(files[number].name, block, data)
        with (partial / files[number].name).open("r+b") as out:
            os.pwrite(out.fileno(), data, block * BLOCK_BYTES)

    with _made_whole(target, sum(sizes)) as partial:
        for path, size in zip(files, sizes):
            _allocate(partial / path.name, size)
        in_threads(lambda item: copy(*item), _blocks(sizes))
    return sums.digest()


class _Sums:
    """SHA-256 of blocks, of files over their blocks, of a directory over its files.

    Blocks may come in any order, from any thread.
    """

    def __init__(self, files: list[pathlib.Path]):
        self._blocks: dict[str, dict[int, bytes]] = {path.name: {} for path in files}

    def add(self, name: str, block: int, data: np.ndarray) -> None:
        self._blocks[name][block] = hashlib.sha256(data).digest()

    def of(self, name: str) -> str:
        return hashlib.sha256(
            b"".join(digest for _, digest in sorted(self._blocks[name].items()))
        ).hexdigest()

    def digest(self) -> str:
        return hashlib.sha256(
            "".join(f"{name}\0{self.of(name)}\n" for name in sorted(self._blocks)).encode()
        ).hexdigest()


@contextlib.contextmanager
def _made_whole(target: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    """A directory to write to, which becomes `target` when all is on the disk, and vanishes when
    anything fails.
    """
    check_space(target.parent, size)
    partial = target.with_name(target.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        in_threads(sync, _files(partial))
        sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    sync(target.parent)


def _places(delta: pathlib.Path) -> dict[tuple[int, int], tuple[int, int]]:
    """(file, block) -> where its differences lie in the delta: offset and bytes."""
    places, end = {}, delta.stat().st_size
    with delta.open("rb") as file:
        file.readline(_MAX_HEADER)
        while (offset := file.tell()) < end:
            number, block, size = _RECORD.unpack(file.read(_RECORD.size))
            if offset + _RECORD.size + size > end:
                raise BrokenChain("it ends amid a record")
            places[number, block] = (offset + _RECORD.size, size)
            file.seek(size, os.SEEK_CUR)
    return places


def _blocks(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """(file, block) of files of these lengths; an empty file has none."""
    return (
        (number, block)
        for number, size in enumerate(sizes)
        for block in range(-(-size // BLOCK_BYTES))
    )


def _read(path: pathlib.Path, block: int) -> np.ndarray:
    """One block's bytes; fewer at the file's end."""
    with path.open("rb") as file:
        return np.frombuffer(os.pread(file.fileno(), BLOCK_BYTES, block * BLOCK_BYTES), np.uint8)


def _allocate(path: pathlib.Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())
