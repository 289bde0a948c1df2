"""The records of a mixture of files as trajectories: examined once, read again when drawn.

library = open_library(spec, tokenizer, limits, held_out_share=0.02)
records, share = library.training[0]
records[5]  # a Trajectory

Every record is read and rendered once before training, in threads. What does not fit is set aside
with its reason. Only the places of the others are kept; a record is read and tokenised again when
its turn comes. A hash of its content alone decides whether a record is held out, so a copy falls on
the same side.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rome.data.formats.conversation import Conversation, UnfitError
from rome.data.formats.detect import read_record
from rome.data.formats.files import Place, find_files, find_records, parse, read_bytes
from rome.data.formats.render import render
from rome.data.index import fingerprint, load_index, save_index
from rome.data.lines import count_tokens
from rome.data.mixture import parse_mixture
from rome.data.trajectory import Trajectory
from rome.data.tree import lines_of
from rome.files import find_shipped
from rome.model.tokenizer import Tokenizer
from rome.stopping import ShouldStop, never, raise_if_stopped

EXAMINED_TOGETHER = 256
THREADS = min(8, os.cpu_count() or 1)
INDEX_FORMAT = 1


class Limits(NamedTuple):
    """What a record may have at most: tokens, and turns."""

    tokens: int
    turns: int


@dataclasses.dataclass(frozen=True)
class Records:
    """Trajectories, each read and tokenised when it is fetched.

    Args:
      files: that hold the records.
      places_N3: (number of the file, start, size) of each.
      tokenizer: turns texts into ids.
    """

    files: Sequence[pathlib.Path]
    places_N3: np.ndarray
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.places_N3)

    def __getitem__(self, index: int) -> Trajectory:
        number, start, size = self.places_N3[index].tolist()
        place = Place(start, size)
        name = f"{self.files[number]}, {name_place(place)}"
        try:
            trajectory = read_trajectory(read_bytes(self.files[number], place), self.tokenizer)
        except (UnfitError, OSError) as error:
            raise ValueError(
                f"{name}, was changed while it is trained on: {error}. Train on a copy that stays."
            ) from error
        return dataclasses.replace(trajectory, task=name)


@dataclasses.dataclass(frozen=True)
class Library:
    """What a mixture holds.

    Args:
      training: its parts without what is held out, and their shares of what is drawn; a mixture
        without weights is one part.
      held_out: of all parts, in an order that only their content decides.
      set_aside: {"file", "record", "reason"} of what cannot be trained on.
      digest: hash of all contents in order; positions in libraries of equal digests mean the same.
    """

    training: list[tuple[Records, float]]
    held_out: Records
    set_aside: list[dict[str, str]]
    digest: str

    @property
    def count(self) -> int:
        """Return the number of records to train on."""
        return sum(len(records) for records, _ in self.training)


def open_library(
    spec: str,
    tokenizer: Tokenizer,
    limits: Limits,
    held_out_share: float,
    *,
    settings: str = "",
    should_stop: ShouldStop = never,
    index: pathlib.Path | None = None,
    writes_index: bool = True,
) -> Library:
    """Find the records of a mixture, reading each, or none where an index knows the files.

    Args:
      spec: files or folders, as in "DIR" or "0.7*DIR + 0.3*FILE.parquet".
      tokenizer: turns texts into ids.
      limits: of a record.
      held_out_share: share of the records that is held out, on average; at least one is.
      settings: what else the ids depend on, such as the files of the tokenizer.
      should_stop: asked before each record.
      index: file that keeps what was found.
      writes_index: whether to write the index where it is not there or does not count.

    Raises:
      ValueError: a part is not there, or has no record to train on; nothing is left to hold out.
      Stopped: `should_stop` returned True.
    """
    parts = parse_mixture(spec)
    files_of_part = [find_files(find_shipped(part.name)) for part in parts]
    files = list(itertools.chain(*files_of_part))
    everything = repr((INDEX_FORMAT, spec, limits, held_out_share, settings))
    key = fingerprint(files, everything)
    loaded = None if index is None else load_index(index, key)
    if loaded is None:
        found = _examine_all(files, tokenizer, limits, should_stop)
        head, arrays = _divide(found, held_out_share)
        if index is not None and writes_index:
            save_index(index, key, head, arrays)
    else:
        head, arrays = loaded
    training = []
    first = 0
    for part, part_files in zip(parts, files_of_part, strict=True):
        own = range(first, first + len(part_files))
        first += len(part_files)
        chosen_N3 = _of_files(arrays["training"], own)
        is_needed = part.weight is not None or not len(_of_files(arrays["held_out"], own))
        if is_needed and not len(chosen_N3):
            raise ValueError(_nothing_left(part.name, head["set_aside"]))
        training.append((Records(files, chosen_N3, tokenizer), part.weight or 0.0))
    if parts[0].weight is None:
        training = [(Records(files, arrays["training"], tokenizer), 1.0)]
    for purpose, name in (("training", "to train on"), ("held_out", "to hold out")):
        if not len(arrays[purpose]):
            raise ValueError(
                f"{spec} leaves no record {name}: give more records that differ, or another"
                f" held_out_share than {held_out_share}"
            )
    held_out = Records(files, arrays["held_out"], tokenizer)
    return Library(training, held_out, head["set_aside"], head["digest"])


def read_trajectory(content: bytes, tokenizer: Tokenizer) -> Trajectory:
    """Return the trajectory of a record's JSON text.

    Raises:
      UnfitError: it cannot be trained on with this tokenizer.
    """
    family, record = read_record(parse(content))
    if isinstance(record, Conversation):
        trajectory = render(record, tokenizer)
        return dataclasses.replace(trajectory, family=family)
    _check_ids(record, tokenizer)
    return dataclasses.replace(record, family=record.family or family)


def name_place(place: Place) -> str:
    """Return where in its file a record is, for messages."""
    return f"byte {place.start}" if place.size else f"row {place.start + 1}"


# -- examining
# -------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """What examining a record has shown; a reason says that it is set aside."""

    file: int
    place: Place | None
    digest: bytes
    reason: str
    name: str


def _examine_all(
    files: Sequence[pathlib.Path], tokenizer: Tokenizer, limits: Limits, should_stop: ShouldStop
) -> Iterator[tuple[pathlib.Path, _Found]]:
    """Yield what examining each record of the files shows, in their order."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        for number, path in enumerate(files):
            examine = functools.partial(_examine, path, number, tokenizer, limits)
            numbered = enumerate(find_records(path), 1)
            while some := list(itertools.islice(numbered, EXAMINED_TOGETHER)):
                raise_if_stopped(should_stop)
                yield from ((path, found) for found in threads.map(examine, some))


def _examine(
    path: pathlib.Path,
    number: int,
    tokenizer: Tokenizer,
    limits: Limits,
    counted: tuple[int, Place | UnfitError],
) -> _Found:
    """Return what a record shows: `counted` is its number in the file, and its place if any."""
    count, place = counted
    name = f"record {count}"
    if isinstance(place, UnfitError):
        return _Found(number, None, b"", str(place), name if count > 1 else "")
    name = f"{name}, {name_place(place)}"
    digest = b""
    try:
        content = read_bytes(path, place)
        digest = hashlib.sha256(content.strip()).digest()
        _check_fits(read_trajectory(content, tokenizer), limits)
    except (UnfitError, OSError) as error:
        return _Found(number, place, digest, str(error), name)
    return _Found(number, place, digest, "", name)


def _check_ids(trajectory: Trajectory, tokenizer: Tokenizer) -> None:
    """Raise UnfitError where given ids are not those of this tokenizer."""
    for number, chunk in enumerate(trajectory.chunks, 1):
        largest = max((*chunk.prompt_ids, *chunk.action_ids), default=0)
        if largest >= tokenizer.vocab_size:
            raise UnfitError(
                f"turn {number} has the token id {largest}, and the tokenizer has"
                f" {tokenizer.vocab_size} tokens: the ids are of another one"
            )
        text = chunk.text.strip()
        if text and text not in tokenizer.decode(chunk.action_ids, skip_special=True):
            raise UnfitError(f"the token ids of turn {number} do not spell its text")


def _check_fits(trajectory: Trajectory, limits: Limits) -> None:
    """Raise UnfitError where a trajectory cannot be trained on."""
    if not trajectory.trainable:
        raise UnfitError(f"it ended as {trajectory.ending}")
    turns = trajectory.turns
    learned = [chunk for _, chunk in turns if chunk.kind != "context" and chunk.status == "ok"]
    if not learned:
        raise UnfitError("it has no turn to learn: all are context, or their calls failed")
    for line in lines_of(trajectory.turn_parents):
        if not turns[line[0]][0]:
            raise UnfitError("it begins with a sampled token, which nothing predicts")
        tokens = count_tokens([turns[number] for number in line])
        if tokens > limits.tokens or len(line) > limits.turns:
            raise UnfitError(
                f"it has {tokens} tokens in {len(line)} turns; at most {limits.tokens} tokens"
                f" (max_context) in {limits.turns} turns (chunks_per_row) are trained on"
            )


def _divide(
    examined: Iterator[tuple[pathlib.Path, _Found]], held_out_share: float
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return head and arrays of an index: what is trained on, held out and set aside."""
    digest = hashlib.sha256()
    set_aside = []
    places = []
    keys = []
    for path, found in examined:
        if found.reason or found.place is None:
            entry = {"file": str(path), "record": found.name, "reason": found.reason}
            set_aside.append(entry)
            continue
        digest.update(found.digest)
        places.append((found.file, *found.place))
        keys.append(int.from_bytes(found.digest[:8], "big"))
    places_N3 = np.array(places, np.int64).reshape(-1, 3)
    keys_N = np.array(keys, np.uint64)
    limit = int(held_out_share * 2**64)
    if len(np.unique(keys_N)) > 1:
        limit = max(limit, int(keys_N.min()) + 1)  # at least one
    is_held_out_N = np.array([key < limit for key in keys], bool)
    order_N = np.argsort(keys_N[is_held_out_N], kind="stable")
    arrays = {
        "training": places_N3[~is_held_out_N],
        "held_out": places_N3[is_held_out_N][order_N],
    }
    return {"set_aside": set_aside, "digest": digest.hexdigest()}, arrays


def _of_files(places_N3: np.ndarray, numbers: Iterable[int]) -> np.ndarray:
    """Return the places that lie in some of the files."""
    return places_N3[np.isin(places_N3[:, 0], list(numbers))]


def _nothing_left(name: str, set_aside: Sequence[dict[str, str]]) -> str:
    reasons = "; ".join(f"{entry['file']}: {entry['reason']}" for entry in set_aside[:3])
    more = ", ..." if len(set_aside) > 3 else ""
    return f"{name} has no record that can be trained on ({reasons or 'all are held out'}{more})"
