"""Documents for continual pre-training: read where they lie, cut into pieces of a row, packed as
everything else is.

Every token of a document but its first is predicted exactly once: pieces overlap by one token.

A document is a line of a .jsonl file (its "text"), or any other file that is UTF-8 text. Only
places are kept in memory; a document is read when it is asked for. Whether it is held out is
decided by a hash of its content alone: a copy of it under another name falls on the same side.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence

import grain
import grain.experimental
import numpy as np

from rome.data.batch import Batch
from rome.data.packing import pack_examples, pack_stream, text_example, to_batch
from rome.model.tokenizer import Tokenizer

# whose pieces are shuffled together; those of one long document would fill a whole batch
MIXED_DOCUMENTS = 32
NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
}  # of Python's own folder


class Documents(Sequence):
    """Texts in the order in which they were found.

    Args:
      files: what the documents lie in.
      places_N3: (file, first byte, bytes) of each.
    """

    def __init__(self, files: list[pathlib.Path], places_N3: np.ndarray):
        self._files, self._places_N3 = files, places_N3

    def __len__(self) -> int:
        return len(self._places_N3)

    def __getitem__(self, index: int) -> str:
        file, start, size = self._places_N3[index].tolist()
        with open(self._files[file], "rb") as opened:
            opened.seek(start)
            text = _read(self._files[file], opened.read(size), self.name(index))
        if text is None:
            raise ValueError(
                f"{self.name(index)} is no text any more: it was changed while it is trained on."
                " Train on a copy that stays."
            )
        return text

    def name(self, index: int) -> str:
        file, start, _ = self._places_N3[index].tolist()
        return (
            f"{self._files[file]}, byte {start}"
            if _has_lines(self._files[file])
            else str(self._files[file])
        )


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on and held-out ones, the latter in an order that only their content
    decides.

    Args:
      skipped: names of what is no document: empty, or not UTF-8 text.
      digest: of all contents in order; equal where a position in a stream means the same.
    """

    training: Documents
    held_out: Documents
    skipped: list[str]
    digest: str


def read_corpus(place: str, held_out_share: float) -> Corpus:
    """Looks at every document once.

    Args:
      place: a directory, walked in sorted order without hidden files and folders; or one file; or
        "" for the source of Python's standard library.
      held_out_share: of the documents, on average.
    """
    files = _library_files() if not place else _files(pathlib.Path(place))
    limit, digest, skipped = int(held_out_share * 2**64), hashlib.sha256(), []
    training, held_out, held_out_keys = array.array("q"), array.array("q"), []
    for number, path in enumerate(files):
        for start, size, text in _scan(path):
            if text is None:
                skipped.append(f"{path}, byte {start}" if _has_lines(path) else str(path))
                continue
            content = hashlib.sha256(text.encode()).digest()
            digest.update(content)
            key = int.from_bytes(content[:8], "big")
            (held_out if key < limit else training).extend((number, start, size))
            if key < limit:
                held_out_keys.append(key)
    where = place or "the standard library"
    for side, name in ((training, "to train on"), (held_out, "held out")):
        if not side:
            count = (len(training) + len(held_out)) // 3
            raise ValueError(
                f"{where} has {count} documents and none {name} (held_out_share={held_out_share})."
                " Give more text or another share."
            )
    order = np.argsort(np.array(held_out_keys, np.uint64), kind="stable")
    return Corpus(
        Documents(files, np.array(training, np.int64).reshape(-1, 3)),
        Documents(files, np.array(held_out, np.int64).reshape(-1, 3)[order]),
        skipped,
        digest.hexdigest(),
    )


def text_batches(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    *,
    rows: int,
    row_length: int,
    chunks_per_row: int,
    seed: int,
) -> grain.IterDataset:
    """Batches of `rows` rows for ever, with a position as `rome.data.sources.sft_batches` has.

    Each epoch has every document once, in an order that depends on (seed, epoch) only, and the
    pieces of a few documents that follow each other mixed. A document is tokenised when its turn
    comes.
    """

    def pieces(texts: list[str], rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
        examples = [
            example for text in texts for example in cut(document_ids(tokenizer, text), row_length)
        ]
        return [examples[place] for place in rng.permutation(len(examples))]

    groups = (
        grain.MapDataset.source(documents)
        .seed(seed)
        .shuffle()
        .batch(MIXED_DOCUMENTS, batch_fn=list)
        .repeat()
        .random_map(pieces)
    )
    stream = grain.experimental.FlatMapIterDataset(
        groups.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)), _Each()
    )
    return pack_stream(stream, row_length, chunks_per_row, bins=rows).batch(rows, batch_fn=to_batch)


def text_rows(
    texts: Sequence[str], tokenizer: Tokenizer, *, row_length: int, chunks_per_row: int
) -> Batch:
    """These documents, each once and whole, in as few rows as best-fit finds."""
    return pack_examples(
        [example for text in texts for example in cut(document_ids(tokenizer, text), row_length)],
        row_length,
        chunks_per_row,
    )


def document_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text and the token that ends a document, which is Qwen's padding token too.

    Control tokens that the text spells are letters.
    """
    return np.asarray([*tokenizer.encode(text), tokenizer.pad], np.int32)


def cut(ids: np.ndarray, row_length: int) -> list[dict[str, np.ndarray]]:
    """Examples of at most a row.

    Each begins with the last token of the one before it, so that all tokens but the document's
    first are predicted.
    """
    return [
        text_example(ids[start : start + row_length])
        for start in range(0, len(ids) - 1, row_length - 1)
    ]


class _Each(grain.experimental.FlatMapTransform):
    def flat_map(self, element: list) -> list:
        return element


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
    """Files below `root`; folders that links lead to are not followed, so there is no circle."""
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if not left_out(name))
        paths = (pathlib.Path(folder, name) for name in sorted(names) if not left_out(name))
        yield from (
            path for path in paths if path.is_file()
        )  # a pipe would be waited for without end


def _raise(error: OSError) -> None:
    raise error  # os.walk would go on without the folder


def _has_lines(path: pathlib.Path) -> bool:
    return path.suffix.lower() == ".jsonl"


def _scan(path: pathlib.Path) -> Iterator[tuple[int, int, str | None]]:
    """(first byte, bytes, text) of every document; None for the text of what is none."""
    if not _has_lines(path):
        content = path.read_bytes()
        yield 0, len(content), _read(path, content, str(path))
        return
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield start, len(line), _read(path, line, f"{path} line {number}")
            start += len(line)


def _read(path: pathlib.Path, content: bytes, where: str) -> str | None:
    """The text of a document; None where it is blank or no text.

    Raises ValueError for a line that is not JSON with a "text".
    """
    if not _has_lines(path):
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return None
    else:
        try:
            text = json.loads(content)["text"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(
                f'{where} is no JSON object with a "text" ({type(error).__name__}):'
                f" {content[:60]!r}. Mend or delete that line."
            ) from error
        if not isinstance(text, str):
            raise ValueError(
                f'{where}: "text" is a {type(text).__name__}, not a string. Mend or delete that'
                " line."
            )
    if not text.strip() or "\0" in text or not _encodes(text):
        return None
    return text


def _encodes(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
