"""Documents for continual pre-training: read where they lie, cut into pieces of a row, packed as everything else is.

Every token of a document but its first is predicted exactly once: pieces overlap by one token.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence

import grain
import grain.experimental
import numpy as np

from rome.data.batch import Batch
from rome.data.packing import pack_examples, pack_stream, text_example, to_batch
from rome.model.tokenizer import Tokenizer

NOT_TEXT = {".gz", ".xz", ".zip", ".zst", ".parquet", ".so", ".o", ".a", ".pyc", ".png", ".jpg", ".pdf", ".safetensors", ".npz", ".npy"}
NOT_OURS = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib")  # of Python's own library


class Documents(Sequence):
    """The documents of a folder (or one file) in the order of their names, each read when it is asked for.

    A .jsonl file has one a line, under "text"; any other file is one. Files that are no UTF-8 text read as no document ("").

    Args:
      place: "" stands for the source of Python's standard library, the text that every machine has.
      held_out: the share of documents for evaluation, chosen by a hash of where a document lies.
      evaluation: those, instead of the others.
    """

    def __init__(self, place: str, held_out: float, evaluation: bool = False):
        root = pathlib.Path(place or sysconfig.get_paths()["stdlib"])
        if not root.exists():
            raise FileNotFoundError(f"there is no {root} to read documents from; set config.text to a folder or a file")
        paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file() and path.suffix not in NOT_TEXT)
        if not place:
            paths = [path for path in paths if path.suffix == ".py" and not set(NOT_OURS) & set(path.relative_to(root).parts)]
        base = root.parent if root.is_file() else root
        self._index = [(path, start) for path in paths for start in _starts(path) if (_hash(f"{path.relative_to(base)}:{start}") < held_out) == evaluation]
        if not self._index:
            raise ValueError(f"no {'held-out' if evaluation else ''} documents in {root}; it takes text files or .jsonl with a \"text\" in each line".replace("  ", " "))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> str:
        path, start = self._index[index]
        if path.suffix == ".jsonl":
            with open(path, "rb") as file:
                file.seek(start)
                return _text_of(path, file.readline())
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return ""


def _starts(path: pathlib.Path) -> Iterator[int]:
    """Where the documents of a file begin."""
    if path.suffix != ".jsonl":
        yield 0
        return
    start = 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                yield start
            start += len(line)


def _text_of(path: pathlib.Path, line: bytes) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{path}: a line is no JSON object with a string \"text\": {line[:80]!r}")
    return text


def _hash(name: str) -> float:
    """Evenly spread over 0 to 1."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64


class Pieces(grain.experimental.FlatMapTransform):
    """A document as examples of at most row_length tokens; the document's end is a token of its own."""

    max_fan_out = 1 << 30

    def __init__(self, tokenizer: Tokenizer, row_length: int):
        self._tokenizer, self._row_length = tokenizer, row_length

    def flat_map(self, element: str) -> list[dict[str, np.ndarray]]:
        tokens = self._tokenizer.encode(element) + [self._tokenizer.pad] if element else []
        return [text_example(tokens[start:start + self._row_length]) for start in range(0, len(tokens) - 1, self._row_length - 1)]


def text_batches(documents: Documents, tokenizer: Tokenizer, *, rows: int, row_length: int, chunks_per_row: int, seed: int) -> grain.IterDataset:
    """Batches of `rows` rows for ever, with a position as `rome.data.sources.sft_batches` has. Each epoch has every document once, in an
    order that depends on (seed, epoch) only."""
    shuffled = grain.MapDataset.source(documents).seed(seed).shuffle().repeat()
    stream = shuffled.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16))
    pieces = grain.experimental.FlatMapIterDataset(stream, Pieces(tokenizer, row_length))
    return pack_stream(pieces, row_length, chunks_per_row, bins=rows).batch(rows, batch_fn=to_batch)


def text_rows(documents: Sequence[str], tokenizer: Tokenizer, *, row_length: int, chunks_per_row: int) -> Batch:
    """These documents, each once and whole, in as few rows as best-fit finds."""
    pieces = Pieces(tokenizer, row_length)
    return pack_examples([example for document in documents for example in pieces.flat_map(document)], row_length, chunks_per_row)
