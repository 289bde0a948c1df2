"""The four agents of the pipeline as specs: what each does, its budget, and what does its work.

Explore finds seeds, Instance Builder makes a task of one, Review proves it, Trajectory plays it.
With an endpoint a model does the part of an agent that needs judgement; without one, generators and
scripts do. Gates are the same in both cases: no model accepts a task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rome.synth.build import build
from rome.synth.models import Endpoints, audit_draft, write_draft_of_idea


@dataclasses.dataclass(frozen=True)
class AgentSpec:
    """One agent.

    Attributes:
      name: in the trace.
      role: what it does.
      seconds: of one unit of its work at most.
      tokens: of one unit at most; 0 where no model works.
      work: does one unit.
    """

    name: str
    role: str
    seconds: float
    tokens: int
    work: Callable[..., Any] = dataclasses.field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return what the card says about the agent."""
        return {"role": self.role, "seconds": self.seconds, "tokens": self.tokens}


def agent_specs(endpoints: Endpoints | None) -> dict[str, AgentSpec]:
    """Return the specs of Instance Builder and Review, which work unit by unit.

    Explore and Trajectory work on all units at once (`explore.explore`, `trajectories.play_tasks`).
    """
    tokens = endpoints.tokens_per_unit if endpoints else 0

    async def build_seed(seed: Any, settings: Any, isolation: str) -> Any:
        if seed.kind == "idea" and endpoints is not None:
            return await write_draft_of_idea(endpoints, seed, settings.seed, isolation)
        return await build(seed, settings.seed, isolation, settings.licences)

    async def audit(draft: Any) -> tuple[str, int]:
        if endpoints is None:
            return "", 0
        return await audit_draft(endpoints, draft)

    return {
        "builder": AgentSpec("builder", "makes drafts of a seed", 1800.0, tokens, build_seed),
        "review": AgentSpec("review", "rejects weak verifiers", 900.0, tokens, audit),
    }
