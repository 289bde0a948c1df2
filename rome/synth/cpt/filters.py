"""Which files are kept, by their form, and which documents repeat others."""

from __future__ import annotations

import hashlib
import re
import zlib

import numpy as np
from datasketch import MinHash, MinHashLSH

MAX_FILE_BYTES = 256 << 10
MIN_FILE_CHARACTERS = 32
MAX_LINE_CHARACTERS = 1000
MAX_MEAN_LINE_CHARACTERS = 100
NEAR_DUPLICATE = 0.85  # Jaccard similarity of the words' 5-grams, estimated
SHINGLE_WORDS = 5
MAX_SHINGLES = 20_000  # of a document that are sketched
_PERMUTATIONS = 128
_WORD = re.compile(r"\w+|[^\w\s]")
_LFS = b"version https://git-lfs.github.com/spec/"
_GENERATED = re.compile(
    rb"@generated|DO NOT (?:EDIT|MODIFY)|(?:auto-?generated|generated (?:automatically |code )?by)"
    rb"|This file (?:is|was) (?:auto-?)?generated",
    re.IGNORECASE,
)
_HEAD_BYTES = 2048  # of a file, where it would say that it is generated
_LEFT_OUT_FOLDERS = {
    *("node_modules", "vendor", "third_party", "site-packages", "dist", "build", ".git"),
    *("__pycache__", ".venv"),
}
_LOCK_FILE = re.compile(
    r"(^|/)(package-lock\.json|yarn\.lock|poetry\.lock|uv\.lock|Cargo\.lock|go\.sum|[^/]*\.min\.\w+"
    r"|[^/]*_pb2(_grpc)?\.py|[^/]*\.(svg|ipynb|csv|tsv|map|lock))$"
)


def path_fault(path: str) -> str:
    """Return why no file of this path is used; "" for no reason."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "its path is not UTF-8"
    if path.splitlines() != [path]:  # a list of files would name others
        return "its path is no line"
    if set(path.split("/")[:-1]) & _LEFT_OUT_FOLDERS:
        return "vendored or built"
    if _LOCK_FILE.search(path):
        return "a lock file, data or generated, by its name"
    return ""


def text_of(content: bytes) -> tuple[str, str]:
    """Return the text of a file and "", or "" and why it is not used."""
    if len(content) > MAX_FILE_BYTES:
        return "", f"more than {MAX_FILE_BYTES} bytes"
    if content.startswith(_LFS):
        return "", "a pointer of Git LFS, not the file itself"
    if b"\0" in content:
        return "", "binary"
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "", "not UTF-8"
    if len(text.strip()) < MIN_FILE_CHARACTERS:
        return "", f"fewer than {MIN_FILE_CHARACTERS} characters"
    if _GENERATED.search(content[:_HEAD_BYTES]):
        return "", "generated, as its head says"
    lines = text.split("\n")
    is_dense = len(text) / len(lines) > MAX_MEAN_LINE_CHARACTERS
    if is_dense or max(map(len, lines)) > MAX_LINE_CHARACTERS:
        return "", "minified or data: its lines are too long"
    return text, ""


# Where the part of a document begins that tells it from others of its repository. What comes before
# is the same in many: lists of files, and files as they were.
_TELLING = {"localisation": "\n## Issue\n", "steps": "\n## Functions to write"}


class Duplicates:
    """Finds documents that repeat an earlier one of their kind, exactly or nearly."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._near: dict[str, MinHashLSH] = {}
        self._sketches: dict[str, MinHash] = {}

    def fault(self, kind: str, text: str) -> str:
        """Return "exact", "near", or "" for a text that repeats none; it is remembered then."""
        digest = hashlib.sha256(f"{kind}\0{' '.join(text.split())}".encode()).digest()
        if digest in self._seen:
            return "exact"
        self._seen.add(digest)
        index = self._near.setdefault(
            kind, MinHashLSH(threshold=NEAR_DUPLICATE, num_perm=_PERMUTATIONS)
        )
        sketch = _sketch(text[max(0, text.find(_TELLING.get(kind, ""))) :])
        for other in index.query(sketch):
            if self._sketches[str(other)].jaccard(sketch) >= NEAR_DUPLICATE:
                return "near"
        key = f"{kind}/{len(self._sketches)}"
        self._sketches[key] = sketch
        index.insert(key, sketch)
        return ""


def _sketch(text: str) -> MinHash:
    words = _WORD.findall(text)
    count = min(MAX_SHINGLES, max(1, len(words) - SHINGLE_WORDS + 1))
    hashes = {
        zlib.crc32(" ".join(words[start : start + SHINGLE_WORDS]).encode())
        for start in range(count)
    }
    sketch = MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=int)
    sketch.update_batch(np.fromiter(hashes, np.uint64, len(hashes)).tolist())
    return sketch
