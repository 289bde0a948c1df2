"""Verdicts of the filter: what a stage says about one trajectory, and why."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rome.data.trajectory import Trajectory

STAGES = ("heuristic", "judge", "execution", "expert")
_ANNOUNCED = re.compile(r"/app/([\w./-]+\.\w+)")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a stage says.

    Attributes:
      stage: one of STAGES.
      accepted: whether the trajectory passes; None where the stage has no opinion yet.
      score: from 0 (surely a false positive) to 1 (surely a true one).
      reasons: why it is rejected, or doubtful.
      is_stopgap: whether a fault of an endpoint kept the stage from its own verdict, so that a
        resumed run asks it again.
    """

    stage: str
    accepted: bool | None
    score: float
    reasons: tuple[str, ...] = ()
    is_stopgap: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Item:
    """A trajectory on its way through the filter.

    Attributes:
      id: what identifies it: its file's name, as a rule.
      trajectory: what was played.
      instruction: of its task, as the data set has it; "" where the task is unknown.
      verdicts: by stage.
    """

    id: str
    trajectory: Trajectory
    instruction: str
    verdicts: dict[str, Verdict] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Return a hash over what is judged: verdicts on another content do not count."""
        turns = [[chunk.text, chunk.observation, chunk.status] for chunk in self.trajectory.chunks]
        whole = [self.instruction, self.trajectory.reward, self.trajectory.ending, turns]
        text = json.dumps(whole).encode(errors="surrogatepass")
        return hashlib.blake2b(text, digest_size=8).hexdigest()

    @property
    def rejected_by(self) -> str:
        """Return the first stage that rejects it, "" where none does."""
        for stage in STAGES:
            verdict = self.verdicts.get(stage)
            if verdict is not None and verdict.accepted is False:
                return stage
        return ""

    def to_json(self) -> dict[str, Any]:
        """Return the record of the item: its verdicts travel with it."""
        return {
            "id": self.id,
            "digest": self.digest,
            "task": self.trajectory.task,
            "rejected_by": self.rejected_by,
            "verdicts": {stage: verdict.to_json() for stage, verdict in self.verdicts.items()},
        }


def commands_of(trajectory: Trajectory) -> list[str]:
    """Return the shell commands of a trajectory, in order."""
    found = []
    for chunk in trajectory.chunks:
        call = chunk.tool_call
        if call and isinstance(call.get("arguments"), Mapping):
            command = call["arguments"].get("command")
            if isinstance(command, str):
                found.append(command)
    return found


def deliverables_of(instruction: str) -> list[str]:
    """Return the names of files below /app that an instruction mentions, the first ones first."""
    return list(dict.fromkeys(_ANNOUNCED.findall(instruction)))


def fenced_lines(instruction: str) -> list[str]:
    """Return the lines of an instruction's code blocks: outcomes that the task shows."""
    blocks: Sequence[str] = re.findall(r"```\w*\n(.*?)```", instruction, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]
