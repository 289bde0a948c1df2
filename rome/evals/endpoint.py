"""A model behind an OpenAI-compatible chat-completions URL as an agent.

It plays with the tools of the environment. The conversation is kept here as messages and sent in
full each turn; `prompt` tokens are therefore as the endpoint bills them, turn by turn.
`rome.agent.endpoint` asks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from envs.gem.episode import OutOfTime, PlayedEnv, Turn
from envs.rock import SandboxConfig
from envs.sources import Task
from rome.agent.endpoint import ChatEndpoint, EndpointError
from rome.agent.session import ContextFull
from rome.evals.agents import Outcome, StartedEnv, play_in_environment, spoiled

MAX_CALLS = 16  # of one turn


@dataclasses.dataclass
class _Usage:
    """What one attempt has used so far."""

    tokens: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"prompt": 0, "completion": 0}
    )

    def add(self, usage: dict[str, Any]) -> None:
        """Add the `usage` of one answer; fields that are missing or no integers count as 0."""
        for ours, theirs in (("prompt", "prompt_tokens"), ("completion", "completion_tokens")):
            amount = usage.get(theirs, 0)
            if isinstance(amount, int):
                self.tokens[ours] += amount


@dataclasses.dataclass
class Endpoint:
    """An agent that asks a chat-completions endpoint for its turns.

    Attributes:
      url: such as http://127.0.0.1:8000/v1; /chat/completions is added.
      model: name of the model, as the endpoint knows it.
      config: of the sandboxes.
      api_key: sent as a bearer token to this URL only.
      temperature: of sampling; not sent if None, since some models refuse it.
      max_tokens: of one answer; not sent if None.
      episode_seconds: for which the environment may work in one attempt; the endpoint's own time
        does not count.
      request_seconds: for one answer, with all its retries.
      first_wait_seconds: before the first retry; doubled each time.
      name: recorded with each attempt.
    """

    url: str
    model: str
    config: SandboxConfig
    api_key: str | None = dataclasses.field(default=None, repr=False)
    temperature: float | None = None
    max_tokens: int | None = None
    episode_seconds: float = 600.0
    request_seconds: float = 300.0
    first_wait_seconds: float = 0.5
    name: str = "endpoint"
    _client: ChatEndpoint = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._client = ChatEndpoint(
            self.url, self.model, self.api_key, self.request_seconds, self.first_wait_seconds
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def play(self, task: Task, attempt: int, seed: int) -> Outcome:
        """Play one attempt; a slow or failing endpoint spoils it."""
        usage = _Usage()

        async def converse(started: StartedEnv) -> Outcome:
            return await self._converse(started, seed, usage)

        try:
            outcome = await play_in_environment(task, self.config, converse, math.inf)
        except EndpointError as error:
            outcome = spoiled("infra_engine", str(error), error.permanent)
        return dataclasses.replace(outcome, tokens=usage.tokens)

    async def _converse(self, started: StartedEnv, seed: int, usage: _Usage) -> Outcome:
        """Play turn after turn to the end of the attempt; a limit has its work judged."""
        played = PlayedEnv(started, self.episode_seconds, started.task.start_seconds)
        opening, info = await played.start()
        tools = info.get("tools", [])
        messages: list[dict[str, Any]] = [{"role": "user", "content": opening}]
        if started.system is not None:
            messages.insert(0, {"role": "system", "content": started.system})
        while True:
            try:
                choice, answer_usage = await self._client.ask(
                    messages,
                    tools,
                    seed=seed,
                    temperature=self.temperature,
                    max_tokens=self.max_tokens,
                )
            except ContextFull as error:
                return _outcome(started, await played.judge("truncated_tokens", str(error)))
            usage.add(answer_usage)
            if choice.get("finish_reason") == "length":
                note = f"turn {started.turns + 1} did not end within the answer's limit"
                return _outcome(started, await played.judge("truncated_tokens", note))
            message = choice["message"]
            calls = message.get("tool_calls") or []
            text = message.get("content") if isinstance(message.get("content"), str) else ""
            said = {"role": "assistant", "content": text}
            messages.append(said | {"tool_calls": calls} if calls else said)
            for call in calls[:MAX_CALLS] or [None]:
                action = text if call is None else action_of(call)
                try:
                    turn = await played.step(action)
                except OutOfTime as error:
                    return _outcome(started, await played.judge("timeout", str(error)))
                if turn.ending:
                    return _outcome(started, turn)
                # some environments offer more of them later
                tools = started.last_info.get("tools", tools)
                messages.append(_observation_message(call, turn.observation))
            refusal = f"not run: a turn has at most {MAX_CALLS} calls"
            for call in calls[MAX_CALLS:]:
                messages.append(_observation_message(call, refusal))


def _outcome(started: StartedEnv, turn: Turn) -> Outcome:
    return started.outcome(started.reward, turn.ending, turn.note)


def _observation_message(call: dict[str, Any] | None, observation: str) -> dict[str, Any]:
    """Return the message that answers a tool call, or a turn without one."""
    if call is None:
        return {"role": "user", "content": observation}
    return {"role": "tool", "tool_call_id": call["id"], "content": observation}


def action_of(call: dict[str, Any]) -> str:
    """Return a tool call of the protocol as the turn that the environment reads.

    Arguments are passed on as they came: the environment says what is wrong with them.
    """
    function = call["function"]
    name = json.dumps(function["name"])
    arguments = function["arguments"] or "{}"
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
