"""Text for continual pre-training: read in place, cut into pieces of a row, packed.

Every token of a document but its first is predicted exactly once: pieces overlap by one token.

`rome.data.documents` says what a document is. Only locations are kept in memory; a document is read
when it is fetched. A hash of the content alone decides whether a document is held out, so a copy
under another name falls on the same side.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Sequence

import grain
import grain.experimental
import numpy as np

from rome.data.batch import IMITATION, Batch
from rome.data.documents import Documents, Text, document_name, find_text_files, scan
from rome.data.index import fingerprint, load_index, save_index
from rome.data.lines import CHUNK_FEATURES, TOKEN_FEATURES, Example, text_example
from rome.data.mixture import parse_mixture
from rome.data.packing import pack_examples
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

_ONE_CHUNK = np.full(1, IMITATION, np.int8)  # a piece of text is one chunk


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on, and held-out ones in an order that only their content decides.

    Args:
      training: the parts of the mixture without what is held out, and their shares of the documents
        that are drawn; a mixture without weights is one part.
      held_out: documents to evaluate on.
      skipped: names of files and lines that are no document: empty, or not UTF-8 text.
      digest: hash of all contents in order. Positions in streams of corpora with equal digests mean
        the same.
    """

    training: list[tuple[Documents, float]]
    held_out: Documents
    skipped: list[str]
    digest: str

    @property
    def count(self) -> int:
        """Return the number of documents to train on."""
        return sum(len(documents) for documents, _ in self.training)


@dataclasses.dataclass(frozen=True)
class _Index:
    """Where the documents of a corpus lie, and what else reading all of them has shown."""

    training_N3: np.ndarray
    held_out_N3: np.ndarray
    skipped: list[str]
    digest: str


def read_corpus(
    spec: str,
    held_out_share: float,
    should_stop: ShouldStop = never,
    index: pathlib.Path | None = None,
    writes_index: bool = True,
) -> Corpus:
    """Find all documents, reading each once, or none of them where an index knows the files.

    Args:
      spec: places as `find_text_files` takes them, one or several: "A + B", or with shares of the
        documents that are drawn "0.7*A + 0.3*B" (`rome.data.mixture`).
      held_out_share: share of the documents that is held out, on average.
      should_stop: asked before each document.
      index: file that keeps what was found. It counts as long as no file has another name, size or
        time of change; None: read all documents.
      writes_index: whether to write the index where it is not there or does not count.

    Raises:
      FileNotFoundError: there is no such place.
      Stopped: `should_stop` returned True.
      ValueError: no document is left to train on or to hold out, or one is malformed.
    """
    parts = [(part.name, part.weight) for part in parse_mixture(spec)] if spec else [("", None)]
    files_of_part = [find_text_files(name) for name, _ in parts]
    files = [path for some in files_of_part for path in some]
    # Before the files are read: what changes meanwhile makes the index of no account.
    key = fingerprint(files, repr((held_out_share, spec)))
    found = None if index is None else _load_index(index, key)
    if found is None:
        found = _read_all(files, held_out_share, should_stop)
        if index is not None and writes_index:
            head = {"skipped": found.skipped, "digest": found.digest}
            arrays = {"training": found.training_N3, "held_out": found.held_out_N3}
            save_index(index, key, head, arrays)
    shown = spec or "the standard library"
    for places_N3, purpose in (
        (found.training_N3, "to train on"),
        (found.held_out_N3, "held out"),
    ):
        if not len(places_N3):
            count = len(found.training_N3) + len(found.held_out_N3)
            raise ValueError(
                f"{shown} has {count} documents and none {purpose}"
                f" (held_out_share={held_out_share}). Give more text or another share."
            )
    training = [(Documents(files, found.training_N3), 1.0)]
    if parts[0][1] is not None:
        training = _parts_of(parts, files_of_part, files, found.training_N3)
    return Corpus(training, Documents(files, found.held_out_N3), found.skipped, found.digest)


def _parts_of(
    parts: Sequence[tuple[str, float | None]],
    files_of_part: Sequence[Sequence[pathlib.Path]],
    files: list[pathlib.Path],
    places_N3: np.ndarray,
) -> list[tuple[Documents, float]]:
    """Return the documents of each part of a mixture with its share."""
    training = []
    first = 0
    for (name, weight), own in zip(parts, files_of_part, strict=True):
        is_own_N = (places_N3[:, 0] >= first) & (places_N3[:, 0] < first + len(own))
        first += len(own)
        if not is_own_N.any():
            raise ValueError(f"{name} has no document to train on. Give more text there.")
        training.append((Documents(files, places_N3[is_own_N]), weight or 0.0))
    return training


def _read_all(files: list[pathlib.Path], held_out_share: float, should_stop: ShouldStop) -> _Index:
    """Read every document of the files once."""
    limit = int(held_out_share * 2**64)
    digest = hashlib.sha256()
    skipped = []
    training = array.array("q")
    held_out = array.array("q")
    held_out_keys = []
    for number, path in enumerate(files):
        for start, size, text in scan(path):
            raise_if_stopped(should_stop)
            if text is None:
                skipped.append(document_name(path, start))
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
    parts: Sequence[tuple[RandomAccess[str], float]],
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
      parts: texts, and their share of the documents that are drawn.
      tokenizer: turns a text into ids.
      rows: B, rows a batch.
      row_length: T, tokens a row.
      chunks_per_row: C, the most pieces that a row holds.
      seed: of the order.
      own: numbers of the rows that are needed here; None: all of them.
    """

    def shuffled_pieces(text: str, rng: np.random.Generator) -> list[Example]:
        pieces = _pieces(document_ids(tokenizer, text), row_length)
        order = rng.permutation(len(pieces))
        return [{"tokens": pieces[place], "kind": _ONE_CHUNK} for place in order]

    order = endless_order(parts, seed).random_map(shuffled_pieces, seed=seed)

    def open_row(number: int) -> grain.IterDataset:
        pieces = order[number::rows].to_iter_dataset(READ_OPTIONS)
        stream = grain.experimental.FlatMapIterDataset(pieces, Each())
        return _pack_pieces(stream, row_length, chunks_per_row)

    return Batches(open_row, rows, own)


def _pack_pieces(
    pieces: grain.IterDataset, row_length: int, chunks_per_row: int
) -> grain.IterDataset:
    """Return the rows that `pack_stream` makes of the same pieces as `text_example` has them.

    Only their tokens and chunks are packed, in a third of the time: the other features of text
    follow from where its pieces lie.
    """
    packed = grain.experimental.BestFitPackIterDataset(
        pieces,
        length_struct={"tokens": row_length, "kind": chunks_per_row},
        num_packing_bins=ROWS_OPEN,
        shuffle_bins=False,
    )
    return packed.map(_complete_row)


def _complete_row(row: Example) -> Example:
    """Return a row of pieces with all features that `to_batch` reads."""
    is_token_T = row["tokens_segment_ids"] > 0
    complete = {name: np.zeros(len(is_token_T), dtype) for name, dtype in TOKEN_FEATURES.items()}
    chunks = len(row["kind"])
    complete |= {name: np.zeros(chunks, dtype) for name, dtype in CHUNK_FEATURES.items()}
    complete |= row
    complete["action_mask"] = is_token_T & (row["tokens_positions"] > 0)
    complete["chunk_start"] = is_token_T & (row["tokens_positions"] == 1)
    return complete


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

    Control tokens are encoded as plain letters, unless the text says where they are and the
    tokenizer has them.
    """
    if not isinstance(text, Text) or not text.control:
        return np.asarray([*tokenizer.encode(text), tokenizer.pad], np.int32)
    known = tokenizer.control_ids
    pieces = [known.get(piece, piece) if is_one else piece for piece, is_one in text.parts()]
    return np.asarray([*tokenizer.join(pieces), tokenizer.pad], np.int32)


def cut(ids: np.ndarray, row_length: int) -> list[Example]:
    """Cut a document into examples of at most `row_length` tokens.

    Each begins with the last token of the previous one, so that all tokens but the document's first
    are predicted.
    """
    return [text_example(piece) for piece in _pieces(ids, row_length)]


def _pieces(ids: np.ndarray, row_length: int) -> list[np.ndarray]:
    """Return the ids of each piece that `cut` makes."""
    starts = range(0, len(ids) - 1, row_length - 1)
    return [ids[start : start + row_length] for start in starts]


def _cut_all(texts: Iterable[str], tokenizer: Tokenizer, row_length: int) -> list[Example]:
    examples = []
    for text in texts:
        examples += cut(document_ids(tokenizer, text), row_length)
    return examples
