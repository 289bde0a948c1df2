"""Rel(k) of Eq. 1-2 of "Let It Flow": which turns of an episode SFT reads but does not learn.

The paper asks for a heuristic and gives none. This one reads the record alone, with five reasons:

    compressed  a summary replaced the context that the turn belongs to (edge "compaction")
    taken_back  the agent went back to before the turn (edge "rewind")
    loops       a block of up to MAX_PERIOD turns came MIN_REPEATS times or more in a row, with the
                same calls and, digits aside, the same answers: all but its first time
    duplicates  nearly the same call was made before and had the same answer, and everything between
                the two only read
    off_task    the call names things, none of which the task or the turns before it had named, and
                no later call names anything that came up in it first

A turn without a call, such as a last answer, is never masked. docs/pipeline.md has the error rate.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Sequence

from rome.data.trajectory import Chunk, Trajectory
from rome.data.tree import ROOT, path_to

ERRORS = "errors"  # Err(k): the call failed, or a demonstrator made a mistake on purpose
HARM = "harm"  # the environment found the turn to have done harm (Chunk.events)
REASONS = ("compressed", "taken_back", "loops", "duplicates", "off_task")
MASKS = (ERRORS, *REASONS, HARM)
MAX_PERIOD = 4
MIN_REPEATS = 3
# Share of the words of two calls that they have in common, from which on they are near: after a
# short answer, which chance may repeat, and after one of LONG characters or more.
NEAR = 0.75
NEAR_LONG = 0.3
LONG = 20
_WORD = re.compile(r"[a-z_][a-z0-9_]{2,}|[0-9]{3,}")
_DIGITS = re.compile(r"\d+")
_WAITS = re.compile(r"\b(?:sleep|wait|watch)\b|tail -f")
# A command of these alone changes nothing. A redirection or a pipe into tee writes.
_READERS = re.compile(
    r"(?:cd|ls|cat|head|tail|grep|rg|find|wc|pwd|stat|file|diff|cmp|tree|which|sort|uniq|cut|tr|du"
    r"|df|nl|less|more|echo|printf|env|id|whoami|date|sed -n|git (?:status|log|diff|show|branch))\b"
)
_WRITES = re.compile(r">|\btee\b|-delete|-exec|\bxargs\b|sed -i|sort -o")
_SEPARATOR = re.compile(r"&&|\|\||[;|\n]")
_COMMON = """
and arguments awk bash bin cat chmod command content cut diff directory echo else env etc exec exit
export false file filename files find fi for from function git grep head home import input json less
line lines log main make mkdir mv name none not null open output path perl pip pwd python python3
print printf read return root run sed set shell sort src status sudo tail test then tmp tool touch
true txt type uniq usr utf var wc while with workspace write xargs the this that all any app data
new old out csv yml yaml html toml ini cfg one two
"""
# Words that name no thing of a task: of shells, of calls, and of paths everywhere.
COMMON = frozenset(_COMMON.split())


def irrelevant_turns(trajectory: Trajectory) -> dict[int, str]:
    """Return the reason of each chunk that is not worth learning, by its number.

    Args:
      trajectory: any record; nothing but its chunks, their edges and its instruction is read.
    """
    found = _left_behind(trajectory)
    for line in trajectory.lines():
        acting = [number for number in line if _is_acting(trajectory.chunks[number])]
        chunks = [trajectory.chunks[number] for number in acting]
        named = {"loops": _loops(chunks), "duplicates": _duplicates(chunks)}
        skipped = named["loops"] | named["duplicates"]
        named["off_task"] = _off_task(chunks, trajectory.instruction, skipped)
        for reason, places in named.items():
            for place in sorted(places):
                found.setdefault(acting[place], reason)
    return dict(sorted(found.items()))


def mask_turns(
    trajectory: Trajectory, masks: Collection[str], *, is_demonstration: bool = False
) -> Trajectory:
    """Return a trajectory whose masked turns are context: read, not learned.

    Args:
      trajectory: what is learned from; it is not changed.
      masks: some of MASKS. Without ERRORS, turns whose call failed are learned like others: for
        measuring what the mask is worth.
      is_demonstration: the turns that the record marks as context are a demonstrator's mistakes,
        which ERRORS stands for, too.

    Raises:
      ValueError: a mask is unknown.
    """
    unknown = [name for name in masks if name not in MASKS]
    if unknown:
        raise ValueError(f"mask {unknown[0]!r} is unknown; known: {', '.join(MASKS)}")
    reasons = irrelevant_turns(trajectory) if set(masks) & set(REASONS) else {}
    chunks = []
    for number, chunk in enumerate(trajectory.chunks):
        kind, status = chunk.kind, chunk.status
        if ERRORS not in masks:
            is_mistake = status != "ok" or (is_demonstration and kind == "context")
            if is_mistake and chunk.action_ids:
                kind, status = "imitation", "ok"
        if reasons.get(number) in masks or (HARM in masks and chunk.events):
            kind = "context"
        chunks.append(dataclasses.replace(chunk, kind=kind, status=status))
    return dataclasses.replace(trajectory, chunks=chunks)


def parse_masks(text: str) -> tuple[str, ...]:
    """Return the masks that a text names, such as "errors loops"; "" names none.

    Raises:
      ValueError: one of them is unknown.
    """
    masks = tuple(text.split())
    for name in masks:
        if name not in MASKS:
            raise ValueError(f"{name!r} is no mask; known: {', '.join(MASKS)}")
    return masks


# -- what the tree says
# -------------------------------------------------------------------------------------------------


def _left_behind(trajectory: Trajectory) -> dict[int, str]:
    """Return the chunks that a compaction or a rewind left behind."""
    parents = trajectory.parents
    found: dict[int, str] = {}
    for number, chunk in enumerate(trajectory.chunks):
        if chunk.edge not in ("compaction", "rewind"):
            continue
        before = _context_before(number, trajectory.chunks, parents)
        kept = set(path_to(parents[number], parents))
        reason = "compressed" if chunk.edge == "compaction" else "taken_back"
        for left in path_to(before, parents):
            if left not in kept:
                found.setdefault(left, reason)
    return found


def _context_before(number: int, chunks: Sequence[Chunk], parents: Sequence[int]) -> int:
    """Return the last chunk before this one that no sub-agent took; ROOT where there is none."""
    for earlier in range(number - 1, -1, -1):
        if chunks[path_to(earlier, parents)[0]].edge != "subagent":
            return earlier
    return ROOT


# -- what the calls say; places are those in a list of chunks that call a tool
# -------------------------------------------------------------------------------------------------


def _is_acting(chunk: Chunk) -> bool:
    return chunk.tool_call is not None and bool(chunk.action_ids)


def _loops(chunks: Sequence[Chunk]) -> set[int]:
    keys = [(_call_of(chunk), _DIGITS.sub("0", chunk.observation)) for chunk in chunks]
    found: set[int] = set()
    for period in range(1, MAX_PERIOD + 1):
        start = 0
        while start + period * MIN_REPEATS <= len(keys):
            end = start + period
            while end < len(keys) and keys[end] == keys[end - period]:
                end += 1
            waits = all(_WAITS.search(call) for call, _ in keys[start : start + period])
            if end - start >= period * MIN_REPEATS and not waits:
                found |= set(range(start + period, end))
                start = end
            else:
                start += 1
    return found


def _duplicates(chunks: Sequence[Chunk]) -> set[int]:
    calls = [_call_of(chunk) for chunk in chunks]
    reads = [_only_reads(chunk) for chunk in chunks]
    answers = [" ".join(chunk.observation.split()) for chunk in chunks]
    found = set()
    for place, call in enumerate(calls):
        if _WAITS.search(call):
            continue
        for earlier in range(place - 1, -1, -1):
            says_something = bool(answers[place]) or reads[place]
            is_same = answers[earlier] == answers[place] and says_something
            near = NEAR_LONG if len(answers[place]) >= LONG else NEAR
            if is_same and _nearness(calls[earlier], call) >= near:
                found.add(place)
                break
            if not reads[earlier]:  # it may have changed what is read now
                break
    return found


def _off_task(chunks: Sequence[Chunk], instruction: str, skipped: Collection[int]) -> set[int]:
    known = _words(instruction)
    fresh: dict[int, set[str]] = {}  # of each stray turn: the words that came up in it first
    for place, chunk in enumerate(chunks):
        if place in skipped:
            continue
        named = _words(_call_of(chunk)) - COMMON
        new = (named | _words(chunk.observation)) - known
        if named and not named & known:
            fresh[place] = new
            continue
        for stray in [stray for stray, words in fresh.items() if words & named]:
            known |= fresh.pop(stray)  # it led somewhere
        known |= new
    return set(fresh)


def _call_of(chunk: Chunk) -> str:
    """Return a call as one text: the command of a shell, else the tool and its arguments."""
    call = chunk.tool_call or {}
    arguments = call.get("arguments", {})
    if isinstance(arguments, dict) and isinstance(arguments.get("command"), str):
        return arguments["command"]
    return f"{call.get('name', '')} {json.dumps(arguments, sort_keys=True, default=str)}"


def _only_reads(chunk: Chunk) -> bool:
    call = _call_of(chunk)
    if _WRITES.search(call.replace("2>&1", "").replace("2>/dev/null", "")):
        return False
    parts = [part.strip() for part in _SEPARATOR.split(call)]
    return all(_READERS.match(part) for part in parts if part)


def _words(text: str) -> set[str]:
    """Return the words of a text, and the parts of those that are joined by underscores."""
    words = set(_WORD.findall(text.lower()))
    parts = {part for word in words for part in word.split("_") if len(part) > 2}
    return words | parts


def _nearness(one: str, other: str) -> float:
    """Return the share of all words and numbers of two calls that they have in common."""
    if one == other:
        return 1.0
    first, second = (set(re.findall(r"[\w./-]+", text)) for text in (one, other))
    return len(first & second) / max(len(first | second), 1)
