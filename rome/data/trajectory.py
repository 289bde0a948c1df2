"""Trajectory and Chunk: the record that rollouts write and training reads, and its ATIF file.

A trajectory is the record of one episode: a tree of chunks (`rome.data.tree`), in most episodes one
line. The tokens of a line are `prompt_ids + action_ids` of its chunks in order: prompt ids came
from the environment (task, tool results, turn headers), action ids were sampled by the policy, stop
token included. Nothing is ever re-tokenised: these are the ids that the engine was given and gave
back.

On disk a trajectory is one JSON file in ATIF (agent trajectory interchange format, of Harbor); what
ATIF has no field for goes into `extra`. Fields of ATIF mean what they mean there, so that its tools
read the files: a step with `metrics` is one call of the model, `prompt_tokens` counts the whole
prompt with its history, and `prompt_token_ids`, which would hold all of it again in every step, is
left out. Each step's own prompt ids are in its `extra`, and so are `parent` (a number of a chunk,
LAST or ROOT) and `edge` where a step does not follow the one before it.

The routes of a trajectory, many times its other bytes, lie beside it in NAME.npz. It is written
before NAME.json, which holds its hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from rome.data.routes import routes_from_npz, routes_to_npz
from rome.data.tree import EDGES, LAST, ROOT, contract, lines_of, resolve_parents
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
_ROUTES = "routes"  # in `extra`: the hash of the file of routes
REWARD_TOLERANCE = 1e-6  # of two rewards that count as equal: sums of steps are rounded


@dataclasses.dataclass
class Chunk:
    """One interaction: what the environment appended, then one assistant turn with its stop token.

    Args:
      prompt_ids: tokens that the environment appended since the parent.
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
      events: kinds of harm that the environment found the turn to have done (`rome.data.costs`).
      routes: experts of prompt and action tokens, [tokens, layers, k] (`rome.data.routes`); None
        where the engine was not asked for them.
      parent: the chunk whose context it goes on with: LAST, ROOT or a number (`rome.data.tree`).
      edge: how it follows its parent, one of EDGES.

    Raises:
      ValueError: logprobs or routes do not fit the tokens, or status, kind or edge is unknown.
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
    parent: int = LAST
    edge: str = "continuation"
    events: list[str] = dataclasses.field(default_factory=list)

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
        if self.edge not in EDGES:
            raise ValueError(f"chunk edge {self.edge!r} unknown; known: {', '.join(EDGES)}")
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
      model: name of the model that sampled the turns; "" where none did.
      training_reward: what own code gives the episode in training (config.reward) instead of
        `reward`; None: nothing. Whether the task is solved does not depend on it.
      safety: utility and harm, of tasks of the safety suite (`envs.safety`).

    Raises:
      ValueError: the ending is unknown, the reward is not finite, or a chunk's parent is not one
        of the chunks before it.
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
    model: str = ""
    training_reward: float | None = None
    safety: dict[str, Any] | None = None

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
        for number, parent in enumerate(self.parents):
            if self.chunks[number].edge == "rewind" and parent == ROOT:
                raise ValueError(
                    f"chunk {number} of {self.task} rewinds to no chunk; name its parent, or call"
                    " a context of its own a compaction or a subagent"
                )

    @property
    def parents(self) -> list[int]:
        """Return the number of each chunk's parent; ROOT where it has none."""
        return resolve_parents([chunk.parent for chunk in self.chunks])

    @property
    def is_linear(self) -> bool:
        """Return whether each chunk follows the one before it."""
        return self.parents == [ROOT, *range(len(self.chunks) - 1)][: len(self.chunks)]

    def lines(self) -> list[list[int]]:
        """Return the numbers of the chunks on each path from a root to a leaf.

        Ordered by their leaves. A linear episode has one line.
        """
        return lines_of(self.parents)

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
    def learned_reward(self) -> float:
        """Return the reward that training compares episodes by."""
        return self.reward if self.training_reward is None else self.training_reward

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
        """Return (tokens read since the turn before, chunk) of every chunk with sampled tokens.

        In the order of time; the turn before is the nearest on the way to the root. A chunk without
        a sampled token is no decision: its prompt counts to the turns that follow it.
        """
        turns: list[tuple[list[int], Chunk]] = []
        pending: list[list[int]] = []  # of each chunk: what the next turn below it has to read
        for chunk, parent in zip(self.chunks, self.parents, strict=True):
            above = [] if parent == ROOT else pending[parent]
            read = above + list(chunk.prompt_ids)
            if chunk.action_ids:
                turns.append((read, chunk))
                read = []
            pending.append(read)
        return turns  # what is pending at a leaf was never answered

    @property
    def turn_parents(self) -> list[int]:
        """Return the turn that each of `turns` goes on from, by its number there, or ROOT."""
        return contract(self.parents, [bool(chunk.action_ids) for chunk in self.chunks])

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


def to_atif(trajectory: Trajectory) -> dict[str, Any]:
    """Return the trajectory as an ATIF document.

    `from_atif(to_atif(t))` equals t without its routes, logprobs bit for bit.
    """
    steps: list[dict[str, Any]] = [
        {"step_id": 1, "source": "user", "message": trajectory.instruction}
    ]
    read: list[int] = []  # tokens that the model has read or written at the end of each chunk
    for number, (chunk, parent) in enumerate(
        zip(trajectory.chunks, trajectory.parents, strict=True)
    ):
        history = 0 if parent == ROOT else read[parent]
        steps.append(_chunk_to_step(number, chunk, history))
        read.append(history + len(chunk.prompt_ids) + len(chunk.action_ids))
    agent = {"name": "rome", "version": describe()}
    if trajectory.model:
        agent["model_name"] = trajectory.model
    calls = [step["metrics"] for step in steps if "metrics" in step]
    totals: dict[str, int] = {
        f"total_{name}": sum(call[name] for call in calls)
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens")
    }
    extra = {name: getattr(trajectory, name) for name in _EXTRA}
    for name in ("training_reward", "safety"):
        if getattr(trajectory, name) is not None:
            extra[name] = getattr(trajectory, name)
    return {
        "schema_version": ATIF_VERSION,
        "session_id": f"{trajectory.task}/{trajectory.seed}",
        "agent": agent,
        "steps": steps,
        "final_metrics": totals | {"total_steps": len(steps)},
        "extra": extra,
    }


def from_atif(document: dict[str, Any]) -> Trajectory:
    """Read a document that `to_atif` wrote, also where another program has written it again.

    Such programs leave out fields that are null, or add those of ATIF that are missing as null.

    Raises:
      ValueError: the document is anything else; the message names the missing part.
    """
    try:
        steps = [step for step in document["steps"] if step["source"] == "agent"]
        chunks = [_chunk_from_step(step) for step in steps]
        instruction = document["steps"][0]["message"]
        extra = {name: value for name, value in document["extra"].items() if name != _ROUTES}
        model = document["agent"].get("model_name") or ""
        return Trajectory(chunks=chunks, instruction=instruction, model=model, **extra)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"not a trajectory of this project: {type(error).__name__} {error}"
        ) from error


def save_trajectory(trajectory: Trajectory, path: str | os.PathLike[str]) -> None:
    """Write one ATIF file, and before it that of its routes; both are on disk when this returns.

    Args:
      trajectory: what to write. Where no chunk has routes, there is no file of them.
      path: of the ATIF file, NAME.json.
    """
    document = to_atif(trajectory)
    routes = {
        number: chunk.routes
        for number, chunk in enumerate(trajectory.chunks)
        if chunk.routes is not None
    }
    if routes:
        content = routes_to_npz(routes)
        document["extra"][_ROUTES] = hashlib.sha256(content).hexdigest()
        write_atomically(routes_path(path), content)
    write_atomically(path, json.dumps(document))


def load_trajectory(path: str | os.PathLike[str], *, routes: bool = True) -> Trajectory:
    """Read one ATIF file and the file of its routes.

    Args:
      path: of the ATIF file.
      routes: False leaves out the routes: only the trainer replays them, and a run deletes those of
        trajectories that no step trains on any more.

    Raises:
      ValueError: the file is no JSON or no trajectory of this project, or its routes are gone or
        those of another trajectory; the message names it.
    """
    document = read_json(path, "Delete it, and its episode is played again.")
    try:
        trajectory = from_atif(document)
        if routes and _ROUTES in document["extra"]:
            _add_routes(trajectory, routes_path(path), document["extra"][_ROUTES])
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    return trajectory


def routes_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the file of the routes of a trajectory's file."""
    return pathlib.Path(path).with_suffix(".npz")


def _add_routes(trajectory: Trajectory, path: pathlib.Path, digest: str) -> None:
    """Give the chunks their routes.

    Raises:
      ValueError: the file is not the one that was written with the trajectory.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"its routes, {path}, are gone: a run keeps them until their step is trained and saved;"
            " read the trajectory without them"
        ) from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"its routes, {path}, are damaged, or those of another trajectory")
    for number, routes_PLk in routes_from_npz(content).items():
        chunk = trajectory.chunks[number]
        trajectory.chunks[number] = dataclasses.replace(chunk, routes=routes_PLk)


def _chunk_to_step(number: int, chunk: Chunk, history: int) -> dict[str, Any]:
    """Return the step of a chunk.

    Args:
      number: of the chunk.
      chunk: what to write.
      history: tokens of the chunks that it goes on from.
    """
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
    if chunk.kind == "context":  # no reader of the file should learn from it either
        step["is_copied_context"] = True
    sampled = {
        "cached_tokens": chunk.cached_tokens,
        "completion_token_ids": list(map(int, chunk.action_ids)),
        "logprobs": list(map(float, chunk.logprobs)),
    }
    step["extra"] = {
        "prompt_token_ids": list(map(int, chunk.prompt_ids)),  # since the parent
        "status": chunk.status,
        "kind": chunk.kind,
        "versions": [list(span) for span in chunk.versions],
        "tool_call": chunk.tool_call,
        "network_denials": chunk.network_denials,
        "exit_code": chunk.exit_code,
    }
    if chunk.events:
        step["extra"]["events"] = list(chunk.events)
    if chunk.parent != LAST or chunk.edge != "continuation":
        step["extra"] |= {"parent": chunk.parent, "edge": chunk.edge}
    if chunk.versions:
        step["llm_call_count"] = 1
        step["metrics"] = sampled | {
            "prompt_tokens": history + len(chunk.prompt_ids),
            "completion_tokens": len(chunk.action_ids),
        }
    else:  # a demonstrator's turn, or a replayed one: ATIF has no metrics where no model was called
        step["llm_call_count"] = 0
        step["extra"] |= sampled
    return step


def _chunk_from_step(step: dict[str, Any]) -> Chunk:
    observation = step.get("observation") or {"results": []}
    results = observation["results"]
    extra = step["extra"]
    sampled = step.get("metrics") or extra
    return Chunk(
        prompt_ids=extra["prompt_token_ids"],
        action_ids=sampled["completion_token_ids"],
        logprobs=sampled["logprobs"],
        versions=[tuple(span) for span in extra["versions"]],
        text=step["message"],
        tool_call=extra.get("tool_call"),
        observation=results[0]["content"] if results else "",
        status=extra["status"],
        kind=extra["kind"],
        cached_tokens=sampled["cached_tokens"],
        network_denials=extra["network_denials"],
        exit_code=extra.get("exit_code"),
        parent=extra.get("parent", LAST),
        edge=extra.get("edge", "continuation"),
        events=list(extra.get("events", ())),
    )
