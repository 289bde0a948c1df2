"""Documents for continual pre-training: read in place, cut into pieces of a row, packed.

Every token of a document but its first is predicted exactly once: pieces overlap by one token.

A document is a line of a .jsonl file (its "text"), or any other file that is UTF-8 text. Only
locations are kept in memory; a document is read when it is fetched. A hash of the content alone
decides whether a document is held out, so a copy under another name falls on the same side.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence

import grain
import grain.experimental
import numpy as np

from rome.data.batch import Batch
from rome.data.index import fingerprint, load_index, save_index
from rome.data.lines import Example, text_example
from rome.data.packing import pack_examples, pack_stream
from rome.data.sources import (
    READ_OPTIONS,
    ROWS_OPEN,
    Batches,
    Each,
    RandomAccess,
    endless_order,
)
from rome.model.tokenizer import Tokenizer
from rome.stopping import ShouldStop, never, raise_if_stopped

# Folders below Python's own library folder that are not the library.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Documents:
    """Texts in the order in which they were found.

    Args:
      files: the files that hold the documents.
      places_N3: (number of the file, first byte, bytes) of each document.
    """

    def __init__(self, files: list[pathlib.Path], places_N3: np.ndarray):
        self._files = files
        self._places_N3 = places_N3

    def __len__(self) -> int:
        return len(self._places_N3)

    def __getitem__(self, index: int) -> str:
        number, start, size = self._places_N3[index].tolist()
        path = self._files[number]
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read(size)
        text = _decode(path, content, self.name(index))
        if text is None:
            raise ValueError(
                f"{self.name(index)} is no text any more: it was changed while it is trained on."
                " Train on a copy that stays."
            )
        return text

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def name(self, index: int) -> str:
        """Return the name of a document, for messages."""
        number, start, _ = self._places_N3[index].tolist()
        return _document_name(self._files[number], start)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on, and held-out ones in an order that only their content decides.

    Args:
      training: documents to train on.
      held_out: documents to evaluate on.
      skipped: names of files and lines that are no document: empty, or not UTF-8 text.
      digest: hash of all contents in order. Positions in streams of corpora with equal digests mean
        the same.
    """

    training: Documents
    held_out: Documents
    skipped: list[str]
    digest: str


@dataclasses.dataclass(frozen=True)
class _Index:
    """Where the documents of a corpus lie, and what else reading all of them has shown."""

    training_N3: np.ndarray
    held_out_N3: np.ndarray
    skipped: list[str]
    digest: str


def read_corpus(
    place: str,
    held_out_share: float,
    should_stop: ShouldStop = never,
    index: pathlib.Path | None = None,
    writes_index: bool = True,
) -> Corpus:
    """Find all documents, reading each once, or none of them where an index knows the files.

    Args:
      place: a directory, walked in sorted order without hidden files and folders; or one file; or
        "" for the source of Python's standard library.
      held_out_share: share of the documents that is held out, on average.
      should_stop: asked before each document.
      index: file that keeps what was found. It counts as long as no file has another name, size or
        time of change; None: read all documents.
      writes_index: whether to write the index where it is not there or does not count.

    Raises:
      FileNotFoundError: there is no such place.
      Stopped: `should_stop` returned True.
      ValueError: no document is left to train on or to hold out, or a JSON line is malformed.
    """
    files = _files(pathlib.Path(place)) if place else _library_files()
    # Before the files are read: what changes meanwhile makes the index of no account.
    key = fingerprint(files, repr(held_out_share))
    found = None if index is None else _load_index(index, key)
    if found is None:
        found = _read_all(files, held_out_share, should_stop)
        if index is not None and writes_index:
            head = {"skipped": found.skipped, "digest": found.digest}
            arrays = {"training": found.training_N3, "held_out": found.held_out_N3}
            save_index(index, key, head, arrays)
    for places_N3, purpose in (
        (found.training_N3, "to train on"),
        (found.held_out_N3, "held out"),
    ):
        if not len(places_N3):
            count = len(found.training_N3) + len(found.held_out_N3)
            raise ValueError(
                f"{place or 'the standard library'} has {count} documents and none {purpose}"
                f" (held_out_share={held_out_share}). Give more text or another share."
            )
    return Corpus(
        training=Documents(files, found.training_N3),
        held_out=Documents(files, found.held_out_N3),
        skipped=found.skipped,
        digest=found.digest,
    )


def _read_all(files: list[pathlib.Path], held_out_share: float, should_stop: ShouldStop) -> _Index:
    """Read every document of the files once."""
    limit = int(held_out_share * 2**64)
    digest = hashlib.sha256()
    skipped = []
    training = array.array("q")
    held_out = array.array("q")
    held_out_keys = []
    for number, path in enumerate(files):
        for start, size, text in _scan(path):
            raise_if_stopped(should_stop)
            if text is None:
                skipped.append(_document_name(path, start))
                continue
            content_digest = hashlib.sha256(text.encode()).digest()
            digest.update(content_digest)
            key = int.from_bytes(content_digest[:8], "big")
            if key < limit:
                held_out.extend((number, start, size))
                held_out_keys.append(key)
            else:
                training.extend((number, start, size))
    held_out_N3 = np.array(held_out, np.int64).reshape(-1, 3)
    order_N = np.argsort(np.array(held_out_keys, np.uint64), kind="stable")
    return _Index(
        training_N3=np.array(training, np.int64).reshape(-1, 3),
        held_out_N3=held_out_N3[order_N],
        skipped=skipped,
        digest=digest.hexdigest(),
    )


def _load_index(path: pathlib.Path, key: str) -> _Index | None:
    """Return what was found earlier; None where it is not there, damaged or of other files."""
    loaded = load_index(path, key)
    if loaded is None:
        return None
    head, arrays = loaded
    try:
        return _Index(arrays["training"], arrays["held_out"], head["skipped"], head["digest"])
    except KeyError:
        return None


def text_batches(
    documents: RandomAccess[str],
    tokenizer: Tokenizer,
    *,
    rows: int,
    row_length: int,
    chunks_per_row: int,
    seed: int,
    own: Sequence[int] | None = None,
) -> Batches:
    """Return an endless stream of batches whose position can be saved (`rome.data.sources`).

    Each epoch has every document once, in an order that depends on (seed, epoch) only, with its
    pieces shuffled. A document is tokenised when its turn comes.

    Args:
      documents: texts.
      tokenizer: turns a text into ids.
      rows: B, rows a batch.
      row_length: T, tokens a row.
      chunks_per_row: C, the most pieces that a row holds.
      seed: of the order.
      own: numbers of the rows that are needed here; None: all of them.
    """

    def shuffled_pieces(text: str, rng: np.random.Generator) -> list[Example]:
        examples = _cut_all([text], tokenizer, row_length)
        return [examples[place] for place in rng.permutation(len(examples))]

    order = endless_order([(documents, 1.0)], seed).random_map(shuffled_pieces, seed=seed)

    def open_row(number: int) -> grain.IterDataset:
        pieces = order[number::rows].to_iter_dataset(READ_OPTIONS)
        stream = grain.experimental.FlatMapIterDataset(pieces, Each())
        return pack_stream(stream, row_length, chunks_per_row, bins=ROWS_OPEN)

    return Batches(open_row, rows, own)


def text_rows(
    texts: Iterable[str], tokenizer: Tokenizer, *, row_length: int, chunks_per_row: int
) -> Batch[np.ndarray]:
    """Pack these documents, each once and whole, into as few rows as best-fit finds.

    Args:
      texts: documents.
      tokenizer: turns a text into ids.
      row_length: T, tokens a row.
      chunks_per_row: C, the most pieces that a row holds.
    """
    examples = _cut_all(texts, tokenizer, row_length)
    return pack_examples(examples, row_length, chunks_per_row)


def document_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the ids of a text and the token that ends a document, Qwen's padding token.

    Control tokens that the text spells are encoded as plain letters.
    """
    return np.asarray([*tokenizer.encode(text), tokenizer.pad], np.int32)


def cut(ids: np.ndarray, row_length: int) -> list[Example]:
    """Cut a document into examples of at most `row_length` tokens.

    Each begins with the last token of the previous one, so that all tokens but the document's first
    are predicted.
    """
    starts = range(0, len(ids) - 1, row_length - 1)
    return [text_example(ids[start : start + row_length]) for start in starts]


def _cut_all(texts: Iterable[str], tokenizer: Tokenizer, row_length: int) -> list[Example]:
    examples = []
    for text in texts:
        examples += cut(document_ids(tokenizer, text), row_length)
    return examples


def _files(place: pathlib.Path) -> list[pathlib.Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise FileNotFoundError(f"there is no file or directory {place} to take text from")
    return list(_walk(place, lambda name: name.startswith(".")))


def _library_files() -> list[pathlib.Path]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return [path for path in _walk(root, NOT_LIBRARY.__contains__) if path.suffix == ".py"]


def _walk(root: pathlib.Path, left_out: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    """Yield the files below `root`, sorted. Links to folders are not followed: no endless walk."""
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if not left_out(name))
        for name in sorted(names):
            path = pathlib.Path(folder, name)
            if not left_out(name) and path.is_file():  # reading a pipe could wait for ever
                yield path


def _raise(error: OSError) -> None:
    raise error  # without it, os.walk would silently skip the folder


def _has_lines(path: pathlib.Path) -> bool:
    return path.suffix.lower() == ".jsonl"


def _document_name(path: pathlib.Path, start: int) -> str:
    return f"{path}, byte {start}" if _has_lines(path) else str(path)


def _scan(path: pathlib.Path) -> Iterator[tuple[int, int, str | None]]:
    """Yield (first byte, bytes, text) of every candidate; the text is None if it is no document."""
    if not _has_lines(path):
        content = path.read_bytes()
        yield 0, len(content), _decode(path, content, str(path))
        return
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield start, len(line), _decode(path, line, f"{path} line {number}")
            start += len(line)


def _decode(path: pathlib.Path, content: bytes, where: str) -> str | None:
    """Return the text of a document, or None where it is blank or no text.

    Raises:
      ValueError: a line of a .jsonl file is no JSON object with a "text".
    """
    text = _parse_line(content, where) if _has_lines(path) else _decode_utf8(content)
    if text is None or not text.strip() or "\0" in text or not _encodes(text):
        return None
    return text


def _decode_utf8(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _parse_line(content: bytes, where: str) -> str:
    try:
        text = json.loads(content)["text"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{where} is no JSON object with a "text" ({type(error).__name__}):'
            f" {content[:60]!r}. Mend or delete that line."
        ) from error
    if not isinstance(text, str):
        raise ValueError(
            f'{where}: "text" is a {type(text).__name__}, not a string. Mend or delete that line.'
        )
    return text


def _encodes(text: str) -> bool:
    """Return False for half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
