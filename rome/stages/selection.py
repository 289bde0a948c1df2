"""Which demonstrations SFT learns: the five-step filter of stage 1, the preferred ones of stage 2.

Stage 1 ("filtered") leaves out, in this order,

    redundant    episodes of which more than MAX_IRRELEVANT of the turns repeat or lead nowhere
    truncated    episodes that a limit ended
    self_repair  episodes with MAX_FAILING or more failing turns in a row
    fake         successes that the heuristics or the rules of rome.synth do not believe
    ranked       the worst WORST of each family by the judge's score, unless they are as good as
                 the best

Stage 2 ("preferred") keeps one episode of each task: it must have passed its verifier (verified)
and the same rules, and no expert may have rejected it (audited). Of those that are left, the one
that an expert accepted comes first, then the one with the best score, then the shortest.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rome.data.relevance import irrelevant_turns
from rome.data.trajectory import Chunk, Trajectory
from rome.synth.filter_rules import heuristic, rule_judge
from rome.synth.verdicts import Item

SELECTIONS = ("", "filtered", "preferred")
MAX_IRRELEVANT = 1 / 3
MAX_FAILING = 3
WORST = 0.1
WANDERING = ("loops", "duplicates", "off_task")
Decisions = Mapping[str, tuple[bool, str]]  # of an expert, by the name of a file


class Selection(NamedTuple):
    """What is kept.

    Attributes:
      numbers: of the demonstrations that are kept, in order.
      funnel: {"select", "played", "removed": {step: number}, "kept"}.
    """

    numbers: list[int]
    funnel: dict[str, Any]


def select(
    demonstrations: Mapping[int, Trajectory],
    how: str,
    *,
    name_of: Callable[[int], str],
    decisions: Decisions,
) -> Selection:
    """Return the demonstrations that are worth learning.

    Args:
      demonstrations: by number; they are not changed.
      how: one of SELECTIONS; "" keeps all.
      name_of: returns the name of a demonstration's file, which decisions are about.
      decisions: of an expert; only "preferred" reads them.
    """
    removed: dict[int, str] = {}
    if how == "filtered":
        removed = filter_steps(demonstrations)
    elif how == "preferred":
        removed = prefer(demonstrations, name_of, decisions)
    counts: dict[str, int] = {}
    for step in removed.values():
        counts[step] = counts.get(step, 0) + 1
    kept = [number for number in demonstrations if number not in removed]
    funnel = {"select": how, "played": len(demonstrations), "removed": counts, "kept": len(kept)}
    return Selection(kept, funnel)


def filter_steps(demonstrations: Mapping[int, Trajectory]) -> dict[int, str]:
    """Return the step of the five that removes a demonstration, by its number."""
    removed = {}
    for number, trajectory in demonstrations.items():
        step = first_objection(trajectory)
        if step:
            removed[number] = step
    families: dict[str, list[tuple[float, int]]] = {}
    for number, trajectory in demonstrations.items():
        if number not in removed:
            ranked = families.setdefault(trajectory.family, [])
            ranked.append((quality(trajectory), number))
    for ranked in families.values():
        ranked.sort()
        best = ranked[-1][0]
        worst = ranked[: math.floor(WORST * len(ranked))]
        removed |= {number: "ranked" for score, number in worst if score < best}
    return removed


def prefer(
    demonstrations: Mapping[int, Trajectory], name_of: Callable[[int], str], decisions: Decisions
) -> dict[int, str]:
    """Return why a demonstration is not the one that is learned of its task, by its number."""
    removed = {}
    best: dict[str, tuple[tuple[Any, ...], int]] = {}
    for number, trajectory in demonstrations.items():
        is_accepted, _ = decisions.get(name_of(number), (None, ""))
        if not trajectory.succeeded:
            removed[number] = "verified"
        elif is_accepted is False or (is_accepted is None and _objects(trajectory)):
            removed[number] = "audited"
        else:
            removed[number] = "ranked"  # but for the best one, below
            length = len(trajectory.turns), trajectory.num_action_tokens
            rank = (bool(is_accepted), quality(trajectory), *(-size for size in length), -number)
            best[trajectory.task] = max(best.get(trajectory.task, (rank, number)), (rank, number))
    for _, number in best.values():
        del removed[number]
    return removed


def first_objection(trajectory: Trajectory) -> str:
    """Return the first of the first four steps that removes a trajectory; "" for none."""
    turns = max(len(trajectory.turns), 1)
    repeated = [
        reason
        for number, reason in irrelevant_turns(trajectory).items()
        # a turn that failed is the matter of a later step
        if reason in WANDERING and not _fails(trajectory.chunks[number])
    ]
    if len(repeated) / turns > MAX_IRRELEVANT:
        return "redundant"
    if trajectory.ending.startswith("truncated") or trajectory.ending == "timeout":
        return "truncated"
    if _longest_failing(trajectory) >= MAX_FAILING:
        return "self_repair"
    return "fake" if _objects(trajectory) else ""


def quality(trajectory: Trajectory) -> float:
    """Return the judge's score: the share of turns that neither failed nor are irrelevant."""
    irrelevant = irrelevant_turns(trajectory)
    chunks = [(number, chunk) for number, chunk in enumerate(trajectory.chunks) if chunk.action_ids]
    good = [number for number, chunk in chunks if not _fails(chunk) and number not in irrelevant]
    return len(good) / max(len(chunks), 1)


def _objects(trajectory: Trajectory) -> bool:
    """Return whether the heuristics or the rule-based judge take it for a false positive."""
    item = Item("", trajectory, trajectory.instruction)
    reasons = list(heuristic(item).reasons)
    if len(trajectory.turns) == 1:  # the answer to a problem of one turn calls nothing
        reasons = [reason for reason in reasons if reason != "no call of a tool"]
    return bool(reasons) or not asyncio.run(_judge(item))


async def _judge(item: Item) -> bool:
    verdict = await rule_judge(item)
    return bool(verdict.accepted)


def _fails(chunk: Chunk) -> bool:
    return chunk.status != "ok" or chunk.exit_code not in (None, 0)


def _longest_failing(trajectory: Trajectory) -> int:
    longest = current = 0
    for chunk in trajectory.chunks:
        current = current + 1 if _fails(chunk) else 0
        longest = max(longest, current)
    return longest
