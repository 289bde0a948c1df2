"""Environments of the package `verifiers` (0.1) as tasks: one for each row of their data set.

An environment of that package plays its own rollout and asks a client for each answer of the model.
Here the client is the other half of a GEM environment: it hands the messages to the agent and waits
for its turn. So any environment of the package runs unchanged, with its tools, limits and rubric.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from envs.gem import Env, Info, StepResult, ToolCallError, UnplayableTaskError, parse_tool_calls
from envs.gem.tool_call import read_turn
from envs.rock import SandboxConfig
from envs.sources.task import MARGIN_SECONDS, Content, Settings, SourceError, Task

PLAY_SECONDS = 120.0
UNGROUPED = "(none)"


def is_verifiers(env: Any) -> bool:
    """Return whether an object is an environment of the package."""
    package = sys.modules.get("verifiers")
    kind = getattr(package, "Environment", None)
    return kind is not None and isinstance(env, kind)


def verifiers_tasks(spec: str, env: Any, settings: Settings) -> list[Task]:
    """Return a task for each row of an environment's data set.

    Raises:
      SourceError: it has no rows, or its episodes have no end.
    """
    rows = list(env.get_dataset())
    if not rows:
        raise SourceError(f"task {spec!r}: its data set has no rows")
    own_turns = int(getattr(env, "max_turns", -1))
    max_turns = settings.max_turns or own_turns
    if max_turns < 1:
        raise SourceError(
            f"task {spec!r}: {type(env).__name__} has no max_turns. Give it one, or set max_turns"
            " in the config."
        )
    name = spec.rpartition(":")[2]
    return [_task_of(f"{name}/{number}", env, row, max_turns) for number, row in enumerate(rows)]


def _task_of(name: str, env: Any, row: Mapping[str, Any], max_turns: int) -> Task:
    family = str(row.get("task") or name.partition("/")[0])
    system, opening = _split(row["prompt"])

    def new_env(config: SandboxConfig) -> Env:
        return VerifiersEnv(env, row, name, max_turns)

    def read() -> Content:
        definition = json.dumps(row, sort_keys=True, default=str)
        return Content((opening,), opening, [definition.encode(errors="surrogatepass")])

    return Task(
        name=name,
        family=family,
        domain=family,
        difficulty=UNGROUPED,
        cluster=name,
        start_seconds=SandboxConfig().start_timeout + MARGIN_SECONDS,
        play_seconds=PLAY_SECONDS + MARGIN_SECONDS,
        grading_seconds=PLAY_SECONDS,
        max_turns=max_turns,
        has_demonstrator=False,
        new_env=new_env,
        read=read,
        tools=tuple(_schema(tool) for tool in (getattr(env, "tool_defs", None) or ())),
        system=system,
    )


class _Client:
    """What the rollout asks for the model's answers; made a `verifiers` client where it is used.

    Attributes:
      asked: the messages of the request that waits for an answer.
      answer: set to the message that answers it.
    """

    def __init__(self) -> None:
        self.asked: asyncio.Queue[list[Any]] = asyncio.Queue()
        self.answers: asyncio.Queue[Any] = asyncio.Queue()

    async def ask(self, prompt: Sequence[Any]) -> Any:
        """Hand over a request, and return its answer."""
        await self.asked.put(list(prompt))
        return await self.answers.get()


class VerifiersEnv(Env):
    """One row of an environment of `verifiers`, as an environment of GEM.

    Args:
      env: the environment; shared by all episodes, as its package does.
      row: of its data set.
      name: of the task.
      max_turns: the episode is truncated after so many turns.
    """

    def __init__(self, env: Any, row: Mapping[str, Any], name: str, max_turns: int) -> None:
        self._env = env
        self._row = dict(row)
        self._name = name
        self.max_turns = max_turns
        self.system, _ = _split(row["prompt"])
        self.tools = [_schema(tool) for tool in (getattr(env, "tool_defs", None) or ())]
        self._client: _Client | None = None
        self._rollout: asyncio.Task | None = None
        self._told = 0  # messages that the agent has seen or said
        self._turns = 0

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Refuse: a rollout of the package runs in an event loop."""
        raise NotImplementedError("an environment of verifiers is asynchronous; use areset")

    def step(self, action: str) -> StepResult:
        """Refuse, as `reset`."""
        raise NotImplementedError("an environment of verifiers is asynchronous; use astep")

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Begin the rollout and return the user's first message."""
        await self.aclose()
        self._client = _Client()
        self._turns = 0
        rollout = self._env.run_rollout(self._row, _as_client(self._client), "policy", {})
        self._rollout = asyncio.ensure_future(rollout)
        prompt = await self._next_request()
        if prompt is None:
            raise UnplayableTaskError(f"{self._name} ended before its first turn")
        self._told = len(prompt)
        _, opening = _split(prompt)
        return opening, {"task": self._name, "tools": self.tools}

    async def astep(self, action: str) -> StepResult:
        """Answer the rollout's request, and return what it asks next, or its reward."""
        assert self._client is not None
        self._turns += 1
        status = "ok"
        try:
            message = _answer(action, self._turns)
        except ToolCallError:
            message, status = _plain_answer(action), "malformed"
        await self._client.answers.put(message)
        prompt = await self._next_request()
        info: Info = {"status": status}
        if prompt is None:
            return "", *self._end(info)
        observation = "\n".join(_text(one) for one in prompt[self._told + 1 :])
        self._told = len(prompt)
        if self._turns >= self.max_turns:
            return observation, 0.0, False, True, info
        return observation, 0.0, False, False, info

    async def aclose(self) -> None:
        """Cancel the rollout, where it still runs."""
        rollout, self._rollout = self._rollout, None
        if rollout is None or rollout.done():
            return
        rollout.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await rollout

    async def _next_request(self) -> list[Any] | None:
        """Wait for the rollout's next request; None where it has ended."""
        assert self._client is not None and self._rollout is not None
        asked = asyncio.ensure_future(self._client.asked.get())
        try:
            await asyncio.wait({asked, self._rollout}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
        finally:
            asked.cancel()
        return None

    def _end(self, info: Info) -> tuple[float, bool, bool, Info]:
        """Return the reward of the rollout that has ended.

        Raises:
          UnplayableTaskError: it ended by an error.
        """
        assert self._rollout is not None
        try:
            output = self._rollout.result()
        except Exception as error:
            raise UnplayableTaskError(
                f"{self._name} failed: {type(error).__name__}: {error}"
            ) from error
        fault = output.get("error")
        if fault:
            raise UnplayableTaskError(f"{self._name} failed: {fault}")
        is_cut = output.get("stop_condition") == "max_turns_reached" and self._turns > 1
        return float(output.get("reward") or 0.0), not is_cut, is_cut, info


# -- messages and clients of the package
# -------------------------------------------------------------------------------------------------


def _as_client(ours: _Client) -> Any:
    """Return the client of the package that asks ours."""
    from verifiers.clients import Client
    from verifiers.types import Response

    class Asking(Client):
        async def get_response(self, prompt, model, sampling_args, tools=None, **kwargs):
            message = await ours.ask(prompt)
            return Response(id="", created=int(time.time()), model=model, message=message)

        def setup_client(self, config):
            return None

        async def to_native_tool(self, tool):
            raise NotImplementedError

        async def to_native_prompt(self, messages):
            raise NotImplementedError

        async def get_native_response(self, prompt, model, sampling_args, tools=None, **kwargs):
            raise NotImplementedError

        async def raise_from_native_response(self, response):
            raise NotImplementedError

        async def from_native_response(self, response):
            raise NotImplementedError

        async def close(self):
            return None

    return Asking(None)


def _answer(action: str, turn: int) -> Any:
    """Return a turn as the package's message, with its tool calls.

    Raises:
      ToolCallError: a call is malformed.
    """
    from verifiers.types import ResponseMessage, ToolCall

    calls = [
        ToolCall(id=f"call_{turn}_{number}", name=one.name, arguments=json.dumps(one.arguments))
        for number, one in enumerate(parse_tool_calls(action))
    ]
    if not calls:
        return _plain_answer(action)
    return ResponseMessage(
        content=read_turn(action).spoken,
        tool_calls=calls,
        finish_reason="tool_calls",
        is_truncated=False,
    )


def _plain_answer(action: str) -> Any:
    from verifiers.types import ResponseMessage

    return ResponseMessage(content=action, finish_reason="stop", is_truncated=False)


def _split(prompt: Any) -> tuple[str | None, str]:
    """Return the system text of a prompt (None without one), and the rest as one text."""
    if isinstance(prompt, str):
        return None, prompt
    messages = list(prompt)
    systems = [_text(one) for one in messages if _role(one) == "system"]
    rest = [_text(one) for one in messages if _role(one) != "system"]
    return "\n".join(systems) or None, "\n\n".join(rest)


def _role(message: Any) -> str:
    return str(message["role"] if isinstance(message, Mapping) else message.role)


def _text(message: Any) -> str:
    content = message["content"] if isinstance(message, Mapping) else message.content
    if isinstance(content, list):
        parts = [one if isinstance(one, Mapping) else one.model_dump() for one in content]
        return "".join(str(part.get("text", "")) for part in parts)
    return str(content or "")


def _schema(tool: Any) -> dict[str, Any]:
    """Return a tool of the package as chat templates take it."""
    given = dict(tool) if isinstance(tool, Mapping) else tool.model_dump()
    names = ("name", "description", "parameters")
    function = {name: given[name] for name in names if name in given}
    return {"type": "function", "function": function}
