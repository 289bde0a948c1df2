"""Trajectory and Chunk: the record that rollouts write and training reads, and its ATIF file.

A trajectory is the record of one episode. Its tokens are `prompt_ids + action_ids` of every chunk
in order: prompt ids came from the environment (task, tool results, turn headers), action ids were
sampled by the policy, stop token included. Nothing is ever re-tokenised: these are the ids that the
engine was given and gave back.

On disk a trajectory is one JSON file in ATIF (agent trajectory interchange format); what ATIF has
no field for goes into `extra`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from rome.data.routes import routes_from_json, routes_to_json
from rome.files import read_json, write_atomically
from rome.version import describe

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
# "context" is only read: a prefilled turn, or one that an error masks
KINDS = ("rl", "imitation", "context")

_EXTRA = (
    "task",
    "family",
    "reward",
    "ending",
    "group",
    "episode",
    "seed",
    "seconds",
    "note",
    "success_reward",
)
REWARD_TOLERANCE = 1e-6  # of two rewards that count as equal: sums of steps are rounded


@dataclasses.dataclass
class Chunk:
    """One interaction: what the environment appended, then one assistant turn with its stop token.

    Args:
      prompt_ids: tokens that the environment appended since the previous chunk.
      action_ids: tokens that the policy sampled, stop token included; may be empty.
      logprobs: the engine's logprob of each action token.
      versions: weight versions that sampled the turn, as (version, start, end) over action_ids;
        empty where no engine sampled it.
      text: the turn as text.
      tool_call: the call that was parsed from it, {"name", "arguments"}; None without one.
      observation: the environment's answer as text.
      status: one of STATUSES. All but "ok" say that the call failed (Err(k) of Eq. 1-2 of "Let It
        Flow"): its arguments were bad, it was malformed or took too long, or the tool could not
        run. A command that ran and ended with another exit status than 0 is no failed call.
      kind: one of KINDS.
      cached_tokens: prompt tokens that the engine found in its prefix cache.
      exit_code: exit status of the turn's command; None without one.
      network_denials: attempts of the turn's command to reach addresses the sandbox does not grant.
      routes: experts of prompt and action tokens, [tokens, layers, k] (`rome.data.routes`); None
        where the engine was not asked for them.

    Raises:
      ValueError: logprobs or routes do not fit the tokens, or status or kind is unknown.
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
    network_denials: int = 0
    exit_code: int | None = None
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
        if self.routes is not None:
            self._check_routes(self.routes)

    def _check_routes(self, routes: np.ndarray) -> None:
        tokens = len(self.prompt_ids) + len(self.action_ids)
        typed = routes.dtype in (np.uint8, np.uint16)
        if typed and routes.ndim == 3 and len(routes) == tokens:
            return
        raise ValueError(
            f"chunk has {tokens} tokens but routes {routes.dtype} {routes.shape};"
            " they are uint8 or uint16 [tokens, layers, k]"
        )


@dataclasses.dataclass
class Trajectory:
    """One episode: its task, its chunks, its reward and how it ended.

    Args:
      task: name of the task.
      family: family of the task, for metrics.
      chunks: in the order of time.
      reward: sum of the rewards of its steps, the verifier's included; finite.
      ending: one of ENDINGS.
      group: number of the group of episodes of one task within a step.
      episode: number of the episode within its group.
      seed: sampling seed of the episode.
      instruction: the task as text.
      seconds: wall-clock time of the episode.
      note: why an episode ended as infra_* or cancelled.
      success_reward: the reward from which on the task counts as solved.

    Raises:
      ValueError: the ending is unknown or the reward is not finite.
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
    note: str = ""
    success_reward: float = 1.0

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
        """Return whether the episode may enter losses and group statistics.

        Infrastructure failures and cancelled episodes say nothing about the policy.
        """
        spoiled = self.ending.startswith("infra_") or self.ending == "cancelled"
        return bool(self.chunks) and not spoiled

    @property
    def succeeded(self) -> bool:
        """Return whether the episode solved its task."""
        return is_success(self.reward, self.success_reward)

    @property
    def num_action_tokens(self) -> int:
        """Return the number of the agent's tokens, those of a replayed prefix included."""
        return sum(len(chunk.action_ids) for chunk in self.chunks)

    @property
    def own_chunks(self) -> list[Chunk]:
        """Return the chunks that are not context: without the prefix that the episode replayed."""
        return [chunk for chunk in self.chunks if chunk.kind != "context"]

    @property
    def network_denials(self) -> int:
        """Return how often the episode's commands tried to reach an address not granted."""
        return sum(chunk.network_denials for chunk in self.chunks)

    @property
    def turns(self) -> list[tuple[list[int], Chunk]]:
        """Return (tokens read since the previous turn, chunk) of every chunk with sampled tokens.

        A chunk without a sampled token is no decision: its prompt counts to the next turn.
        """
        turns: list[tuple[list[int], Chunk]] = []
        pending: list[int] = []
        for chunk in self.chunks:
            pending = pending + list(chunk.prompt_ids)
            if chunk.action_ids:
                turns.append((pending, chunk))
                pending = []
        return turns  # what is pending now was never answered

    @property
    def oldest_version(self) -> int | None:
        """Return the first weight version that sampled a token; staleness is counted from it.

        None where no engine sampled any: a replayed prefix may have left no room for a turn.
        """
        return min((span[0] for chunk in self.chunks for span in chunk.versions), default=None)


def is_success(reward: float, success_reward: float = 1.0) -> bool:
    """Return whether a reward counts as a success of its task, in training and evaluation alike.

    Args:
      reward: of one episode.
      success_reward: the reward from which on the task counts as solved.
    """
    return reward >= success_reward - REWARD_TOLERANCE


def rewards_differ(trajectories: Iterable[Trajectory]) -> bool:
    """Return whether some of the episodes have another reward than others.

    Without a difference there is nothing that comparing them could teach.
    """
    rewards = [trajectory.reward for trajectory in trajectories]
    return bool(rewards) and max(rewards) - min(rewards) > REWARD_TOLERANCE


def to_atif(trajectory: Trajectory) -> dict[str, Any]:
    """Return the trajectory as an ATIF document.

    `from_atif(to_atif(t))` equals t, logprobs bit for bit.
    """
    steps: list[dict[str, Any]] = [
        {"step_id": 1, "source": "user", "message": trajectory.instruction}
    ]
    for number, chunk in enumerate(trajectory.chunks):
        steps.append(_chunk_to_step(number, chunk))
    return {
        "schema_version": ATIF_VERSION,
        "session_id": f"{trajectory.task}/{trajectory.seed}",
        "agent": {"name": "rome", "version": describe()},
        "steps": steps,
        "final_metrics": {
            "total_completion_tokens": trajectory.num_action_tokens,
            "total_steps": len(steps),
        },
        "extra": {name: getattr(trajectory, name) for name in _EXTRA},
    }


def from_atif(document: dict[str, Any]) -> Trajectory:
    """Read a document that `to_atif` wrote.

    Raises:
      ValueError: the document is anything else; the message names the missing part.
    """
    try:
        steps = [step for step in document["steps"] if step["source"] == "agent"]
        chunks = [_chunk_from_step(step) for step in steps]
        instruction = document["steps"][0]["message"]
        return Trajectory(chunks=chunks, instruction=instruction, **document["extra"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"not a trajectory of this project: {type(error).__name__} {error}"
        ) from error


def save_trajectory(trajectory: Trajectory, path: str | os.PathLike[str]) -> None:
    """Write one ATIF file; it is on disk, whole, when this returns."""
    write_atomically(path, json.dumps(to_atif(trajectory)))


def load_trajectory(path: str | os.PathLike[str]) -> Trajectory:
    """Read one ATIF file.

    Raises:
      ValueError: the file is no JSON or no trajectory of this project; the message names it.
    """
    document = read_json(path, "Delete it, and its episode is played again.")
    try:
        return from_atif(document)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _chunk_to_step(number: int, chunk: Chunk) -> dict[str, Any]:
    step: dict[str, Any] = {"step_id": number + 2, "source": "agent", "message": chunk.text}
    if chunk.tool_call is not None:
        call_id = f"call_{number}"
        call = {
            "tool_call_id": call_id,
            "function_name": chunk.tool_call.get("name", ""),
            "arguments": chunk.tool_call.get("arguments", {}),
        }
        result = {"source_call_id": call_id, "content": chunk.observation}
        step["tool_calls"] = [call]
        step["observation"] = {"results": [result]}
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
        "exit_code": chunk.exit_code,
    }
    if chunk.routes is not None:
        step["extra"]["routes"] = routes_to_json(chunk.routes)
    return step


def _chunk_from_step(step: dict[str, Any]) -> Chunk:
    results = step.get("observation", {}).get("results", [])
    metrics = step["metrics"]
    extra = step["extra"]
    routes = routes_from_json(extra["routes"]) if "routes" in extra else None
    return Chunk(
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
        exit_code=extra.get("exit_code"),  # older files have none
        routes=routes,
    )
