"""Documents of trajectories for the second stage: also those that fail first and are put right.

Two kinds are made. A trajectory that succeeds is a document, with the calls that failed on its way.
A failed trajectory is one where a successful one of the same task follows it: both, in this order,
with the outcome of the first between them. Failures that are never put right are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence

from rome.data.formats.conversation import UnfitError
from rome.data.formats.files import find_files, find_records, read_bytes
from rome.data.formats.records import name_place, read_trajectory
from rome.data.mixture import parse_mixture
from rome.data.trajectory import Trajectory
from rome.data.tree import lines_of
from rome.model.tokenizer import Tokenizer
from rome.synth.cpt.document import Control, Document, SetAside, make_document, shown_path

RETRY = "\n\n[The attempt above failed ({ending}). This one succeeds.]\n\n"
MAX_RETRIES_A_TASK = 4

Parts = list[str | Control]


@dataclasses.dataclass(frozen=True)
class _Read:
    """A trajectory, where it was found, and what a task of the same name can be told by."""

    file: str
    record: str
    trajectory: Trajectory


def trajectory_documents(
    spec: str, tokenizer: Tokenizer
) -> tuple[list[Document], list[SetAside], dict[str, int]]:
    """Return the documents of a mixture's trajectories, what was set aside, and counts.

    Args:
      spec: files and folders in the grammar of `rome.data.mixture`, without weights.
      tokenizer: renders conversations with its chat template.

    Returns:
      documents; inputs that cannot be read; {"read", "succeeded", "with_failed_calls",
      "corrected", "left_out"}.
    """
    read, aside = _read_all(spec, tokenizer)
    by_task: dict[str, list[_Read]] = {}
    for one in read:
        by_task.setdefault(_task_key(one), []).append(one)
    documents = []
    counts = {"read": len(read), "succeeded": 0, "with_failed_calls": 0, "corrected": 0}
    used: set[int] = set()
    for attempts in by_task.values():
        good = [one for one in attempts if one.trajectory.succeeded]
        bad = [one for one in attempts if not one.trajectory.succeeded]
        for one in good:
            documents.append(_document([one], tokenizer))
            used.add(id(one))
            counts["succeeded"] += 1
            counts["with_failed_calls"] += _failed_calls(one.trajectory) > 0
        for wrong, right in itertools.islice(
            zip(bad, itertools.cycle(good), strict=False), MAX_RETRIES_A_TASK
        ):
            documents.append(_document([wrong, right], tokenizer))
            used.add(id(wrong))
            counts["corrected"] += 1
    counts["left_out"] = len(read) - len(used)
    return documents, aside, counts


def _read_all(spec: str, tokenizer: Tokenizer) -> tuple[list[_Read], list[SetAside]]:
    read = []
    aside = []
    for part in parse_mixture(spec):
        for path in find_files(pathlib.Path(part.name)):
            for number, place in enumerate(find_records(path), 1):
                name = f"record {number}"
                if isinstance(place, UnfitError):
                    aside.append(SetAside(str(path), name, str(place)))
                    continue
                name = f"{name}, {name_place(place)}"
                try:
                    trajectory = read_trajectory(read_bytes(path, place), tokenizer)
                except (UnfitError, OSError) as error:
                    aside.append(SetAside(str(path), name, str(error)))
                    continue
                if trajectory.trainable:
                    read.append(_Read(shown_path(str(path)), name, trajectory))
                else:
                    aside.append(SetAside(str(path), name, f"it ended as {trajectory.ending}"))
    return read, aside


def _task_key(one: _Read) -> str:
    """Return what attempts at one task share: its name, or else its first prompt."""
    if one.trajectory.task:
        return f"task {one.trajectory.task}"
    first = one.trajectory.turns[0][0] if one.trajectory.turns else []
    return f"prompt {list(first)}"


def _failed_calls(trajectory: Trajectory) -> int:
    return sum(chunk.status != "ok" or bool(chunk.exit_code) for chunk in trajectory.chunks)


def _document(attempts: Sequence[_Read], tokenizer: Tokenizer) -> Document:
    """Return attempts at one task, one after the other."""
    parts: Parts = []
    for number, one in enumerate(attempts):
        if number:
            parts.append(RETRY.format(ending=attempts[number - 1].trajectory.ending))
        parts += list(_parts_of(_longest_line(one.trajectory), tokenizer))
    last = attempts[-1].trajectory
    origin = {
        "task": last.task,
        "family": last.family,
        "files": [one.file for one in attempts],
        "records": [one.record for one in attempts],
        "corrected": len(attempts) > 1,
        "failed_calls": sum(_failed_calls(one.trajectory) for one in attempts),
    }
    return make_document("trajectory", parts, origin)


def _longest_line(trajectory: Trajectory) -> list[int]:
    """Return the token ids of an episode, of its longest line where it has branches."""
    turns = trajectory.turns
    lines = lines_of(trajectory.turn_parents)
    return max(
        (
            [
                token
                for number in line
                for token in (*turns[number][0], *turns[number][1].action_ids)
            ]
            for line in lines
        ),
        key=len,
        default=[],
    )


def _parts_of(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[str | Control]:
    """Yield texts and control tokens, from which any tokenizer that has these makes ids again."""
    control = {number: token for token, number in tokenizer.control_ids.items()}
    for is_control, run in itertools.groupby(ids, control.__contains__):
        if is_control:
            yield from (Control(control[number]) for number in run)
        else:
            yield tokenizer.decode(list(run))
