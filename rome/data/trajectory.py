"""Trajectory and Chunk: the one currency of the house, and its ATIF record.

A trajectory is what one episode left behind. Its tokens are `prompt_ids + action_ids` of every
chunk in order: prompt ids came from the environment (task, tool results, turn headers), action ids
were sampled by the policy, stop token included. Nothing is ever re-tokenised: the ids kept here are
the ids the engine was given and gave back.

On disk a trajectory is one JSON file in ATIF (agent trajectory interchange format); what ATIF has
no field for goes into `extra`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from rome.data.routes import routes_from_json, routes_to_json

ATIF_VERSION = "ATIF-v1.7"
ENDINGS = (
    "success",
    "failure",
    "truncated_turns",
    "truncated_tokens",
    "timeout",
    "malformed",
    "infra_engine",
    "infra_sandbox",
    "infra_verifier",
    "cancelled",
    "unsafe",
)
STATUSES = ("ok", "tool_error", "malformed", "timeout", "infra")
KINDS = (
    "rl",
    "imitation",
    "context",
)  # context: tokens that are only read (prefilled, or masked by an error)


@dataclasses.dataclass
class Chunk:
    """One interaction: what the environment appended, then one assistant turn up to its stop token.

    `versions` are the weight versions that sampled the turn, as (version, start, end) over
    action_ids. `routes` [tokens, layers, k] are those of prompt and action tokens
    (`rome.data.routes`), where the engine was asked for them.
    """

    prompt_ids: list[int]
    action_ids: list[int]
    logprobs: list[float]
    versions: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    text: str = ""
    tool_call: dict[str, Any] | None = None
    observation: str = ""
    status: str = "ok"
    kind: str = "rl"
    cached_tokens: int = 0
    # attempts of the turn's command to reach what the sandbox does not grant
    network_denials: int = 0
    routes: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.logprobs) != len(self.action_ids):
            raise ValueError(
                f"chunk has {len(self.action_ids)} action tokens but {len(self.logprobs)} logprobs;"
                " keep one logprob for each sampled token"
            )
        if self.status not in STATUSES or self.kind not in KINDS:
            raise ValueError(
                f"chunk status {self.status!r} / kind {self.kind!r} unknown; known: {STATUSES} /"
                f" {KINDS}"
            )
        tokens = len(self.prompt_ids) + len(self.action_ids)
        if self.routes is not None and (
            self.routes.ndim != 3
            or len(self.routes) != tokens
            or self.routes.dtype not in (np.uint8, np.uint16)
        ):
            raise ValueError(
                f"chunk has {tokens} tokens but routes {self.routes.dtype} {self.routes.shape};"
                " they are uint8 or uint16 [tokens, layers, k]"
            )


@dataclasses.dataclass
class Trajectory:
    """One episode: its task, its chunks, its reward and how it ended.

    `group` and `episode` number it inside a training step; `seed` is the sampling seed of the
    episode; `reward` is the verifier's.
    """

    task: str
    family: str
    chunks: list[Chunk]
    reward: float
    ending: str
    group: int = 0
    episode: int = 0
    seed: int = 0
    instruction: str = ""
    seconds: float = 0.0
    note: str = ""  # why an episode ended as infra_* or cancelled

    def __post_init__(self) -> None:
        if self.ending not in ENDINGS:
            raise ValueError(
                f"ending {self.ending!r} of {self.task} unknown; known: {', '.join(ENDINGS)}"
            )
        if not math.isfinite(self.reward):
            raise ValueError(
                f"reward {self.reward} of {self.task} is not finite; an unreliable verifier ends"
                " the episode as infra_verifier"
            )

    @property
    def trainable(self) -> bool:
        """Infrastructure failures and cancelled episodes say nothing about the policy: they enter
        no loss and no group statistic.
        """
        return (
            bool(self.chunks)
            and not self.ending.startswith("infra_")
            and self.ending != "cancelled"
        )

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.prompt_ids) + len(chunk.action_ids) for chunk in self.chunks)

    @property
    def num_action_tokens(self) -> int:
        return sum(len(chunk.action_ids) for chunk in self.chunks)

    @property
    def network_denials(self) -> int:
        return sum(chunk.network_denials for chunk in self.chunks)

    @property
    def turns(self) -> list[tuple[list[int], Chunk]]:
        """(tokens read since the turn before, chunk) of every chunk that sampled something: one
        without a sampled token is no decision.
        """
        turns, pending = [], []
        for chunk in self.chunks:
            pending = pending + list(chunk.prompt_ids)
            if chunk.action_ids:
                turns.append((pending, chunk))
                pending = []
        return turns  # what is pending now was never answered

    @property
    def oldest_version(self) -> int:
        """The version that began the sample; staleness is counted from it."""
        return min((span[0] for chunk in self.chunks for span in chunk.versions), default=0)


def to_atif(trajectory: Trajectory) -> dict[str, Any]:
    """The trajectory as an ATIF document.

    `from_atif(to_atif(t))` equals t, logprobs bit for bit.
    """
    steps: list[dict[str, Any]] = [
        {"step_id": 1, "source": "user", "message": trajectory.instruction}
    ]
    for number, chunk in enumerate(trajectory.chunks):
        step: dict[str, Any] = {"step_id": number + 2, "source": "agent", "message": chunk.text}
        if chunk.tool_call is not None:
            call_id = f"call_{number}"
            step["tool_calls"] = [
                {
                    "tool_call_id": call_id,
                    "function_name": chunk.tool_call.get("name", ""),
                    "arguments": chunk.tool_call.get("arguments", {}),
                }
            ]
            step["observation"] = {
                "results": [{"source_call_id": call_id, "content": chunk.observation}]
            }
        elif chunk.observation:
            step["observation"] = {"results": [{"content": chunk.observation}]}
        step["metrics"] = {
            "prompt_tokens": len(chunk.prompt_ids),
            "completion_tokens": len(chunk.action_ids),
            "cached_tokens": chunk.cached_tokens,
            "prompt_token_ids": list(map(int, chunk.prompt_ids)),
            "completion_token_ids": list(map(int, chunk.action_ids)),
            "logprobs": list(map(float, chunk.logprobs)),
        }
        step["extra"] = {
            "status": chunk.status,
            "kind": chunk.kind,
            "versions": [list(span) for span in chunk.versions],
            "tool_call": chunk.tool_call,
            "network_denials": chunk.network_denials,
        }
        if chunk.routes is not None:
            step["extra"]["routes"] = routes_to_json(chunk.routes)
        steps.append(step)
    extra = {
        name: getattr(trajectory, name)
        for name in (
            "task",
            "family",
            "reward",
            "ending",
            "group",
            "episode",
            "seed",
            "seconds",
            "note",
        )
    }
    return {
        "schema_version": ATIF_VERSION,
        "session_id": f"{trajectory.task}/{trajectory.seed}",
        "agent": {"name": "rome", "version": "1"},
        "steps": steps,
        "final_metrics": {
            "total_completion_tokens": trajectory.num_action_tokens,
            "total_steps": len(steps),
        },
        "extra": extra,
    }


def from_atif(document: dict[str, Any]) -> Trajectory:
    """Reads a document that `to_atif` wrote.

    Raises ValueError naming the missing part for anything else.
    """
    try:
        steps = [step for step in document["steps"] if step["source"] == "agent"]
        chunks = []
        for step in steps:
            results = step.get("observation", {}).get("results", [])
            metrics, extra = step["metrics"], step["extra"]
            chunks.append(
                Chunk(
                    prompt_ids=metrics["prompt_token_ids"],
                    action_ids=metrics["completion_token_ids"],
                    logprobs=metrics["logprobs"],
                    versions=[tuple(span) for span in extra["versions"]],
                    text=step["message"],
                    tool_call=extra["tool_call"],
                    observation=results[0]["content"] if results else "",
                    status=extra["status"],
                    kind=extra["kind"],
                    cached_tokens=metrics["cached_tokens"],
                    network_denials=extra["network_denials"],
                    routes=routes_from_json(extra["routes"]) if "routes" in extra else None,
                )
            )
        return Trajectory(
            chunks=chunks, instruction=document["steps"][0]["message"], **document["extra"]
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"not a trajectory of this project: {type(error).__name__} {error}"
        ) from error


def save_trajectory(trajectory: Trajectory, path: str | os.PathLike[str]) -> None:
    """Writes one ATIF file; a reader sees the whole file or none."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(to_atif(trajectory)))
    os.replace(partial, path)


def load_trajectory(path: str | os.PathLike[str]) -> Trajectory:
    return from_atif(json.loads(pathlib.Path(path).read_text()))
