"""A model behind any OpenAI-compatible URL: `launch.serve`, SGLang, vLLM, llama.cpp or a service.

Servers differ in what they take. Where one refuses a request for a member that it does not know,
that member is left out from then on, and the request is made again. Where a server cannot make tool
calls, the tools are told in the system text, and calls are read from the text of the answer in the
forms of Qwen3, Qwen3-Coder and gem-llm.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Unpack

from envs.gem.tool_call import format_tool_call
from rome.agent.dialects.base import BadRequest
from rome.agent.dialects.openai_chat import read_message, write_message
from rome.agent.endpoint import Answer as Completion
from rome.agent.endpoint import ChatEndpoint, EndpointError, OnRetry
from rome.agent.iflow.events import AssistantMessage, ToolCall, Usage
from rome.agent.iflow.models.dialogue_model import why_malformed
from rome.agent.iflow.models.model import Ask, Messages, ModelError, Schemas
from rome.agent.messages import Message, read_answer, readable
from rome.agent.session import ContextFull

DEFAULT_CONTEXT = 32_768  # tokens, where neither the settings nor the server say
BYTES_PER_TOKEN = 4
MESSAGE_TOKENS = 4  # that a template writes around a message
MEGA = 1_000_000
# What a server may not know -> words of its refusal.
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "stream_options": ("stream_options",),
    "reasoning": ("reasoning_content",),
    "max_tokens": ("max_completion_tokens",),
    "tools": (
        "tool choice requires",
        "does not support tools",
        "tools is not",
        "'tools'",
        "--jinja",
    ),
}
_TOOLS_IN_TEXT = """# Tools

You may call these tools, each described by a JSON schema:
{schemas}

To call one, write this, and several times for several calls; then end your answer:
<tool_call>
{{"name": "the tool's name", "arguments": {{...}}}}
</tool_call>
The results come in the next message."""


@dataclasses.dataclass(frozen=True)
class Prices:
    """What a million tokens cost, in any currency; `cached` is None where it is as `prompt`."""

    prompt: float = 0.0
    completion: float = 0.0
    cached: float | None = None

    def of(self, prompt: int, completion: int, cached: int) -> float:
        """Return what an answer costs."""
        cached_price = self.prompt if self.cached is None else self.cached
        spent = (prompt - cached) * self.prompt + cached * cached_price
        return (spent + completion * self.completion) / MEGA


class EndpointModel:
    """A model behind a URL; what is 0 or None is left to the server."""

    def __init__(
        self,
        endpoint: ChatEndpoint,
        *,
        context_tokens: int = 0,
        max_tokens: int | None = None,
        temperature: float | None = None,
        prices: Prices | None = None,
        on_retry: OnRetry | None = None,
    ) -> None:
        self.name = endpoint.model  # of the model; "" until `connect` has found it
        self.context_tokens = context_tokens or DEFAULT_CONTEXT  # of one conversation
        # Names of the server's models, once `connect` has asked for them
        self.offered: tuple[str, ...] = ()
        self.on_retry = on_retry
        self._endpoint = endpoint
        self._asks_context = not context_tokens
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._prices = prices or Prices()
        self._left_out: set[str] = set()  # keys of _OPTIONAL
        self._makes_calls = False  # whether the server itself has read a call

    async def connect(self) -> None:
        """See whether the server is there, and take from it what the settings leave open.

        Raises:
          ModelError: there is no server, it refuses the key, or none of its models was chosen.
        """
        try:
            models = await self._endpoint.models()
        except EndpointError as error:
            remedy = "start it (python -m launch.serve), or give another --base_url"
            if error.permanent:
                remedy = "check the API key"
            raise ModelError(f"{error}; {remedy}") from error
        if not self.name:
            self.name = self._endpoint.model = _only_name(models, self._endpoint.url)
        self.offered = tuple(str(model["id"]) for model in models)
        for model in models:
            length = model.get("max_model_len")
            if model["id"] == self.name and isinstance(length, int) and self._asks_context:
                self.context_tokens = length

    async def ask(self, messages: Messages, tools: Schemas, **how: Unpack[Ask]) -> AssistantMessage:
        limits = [limit for limit in (how.get("max_tokens"), self._max_tokens) if limit]
        while True:
            try:
                completion = await self._request(
                    messages, tools, min(limits, default=0), how.get("on_text")
                )
                return self._read(completion, messages, tools)
            except ContextFull as error:
                raise ModelError(str(error), is_context_full=True) from error
            except EndpointError as error:
                if not self._leave_out(error):
                    raise ModelError(str(error)) from error

    def count_tokens(self, messages: Messages, tools: Schemas = ()) -> int:
        """Estimate the tokens of a conversation by its bytes."""
        size = len(json.dumps(list(tools), ensure_ascii=False)) if tools else 0
        tokens = 0
        for message in messages:
            size += len(message.content.encode("utf-8", "surrogatepass"))
            size += len(message.reasoning.encode("utf-8", "surrogatepass"))
            size += sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
            tokens += MESSAGE_TOKENS
        return tokens + size // BYTES_PER_TOKEN

    async def aclose(self) -> None:
        await self._endpoint.close()

    # -- a request

    async def _request(
        self,
        messages: Messages,
        tools: Schemas,
        max_tokens: int,
        on_text: Callable[[str, bool], None] | None,
    ) -> Completion:
        settings: dict[str, Any] = {"temperature": self._temperature}
        if max_tokens:
            name = "max_completion_tokens" if "max_tokens" in self._left_out else "max_tokens"
            settings[name] = max_tokens
        if on_text is not None and "stream_options" not in self._left_out:
            settings["stream_options"] = {"include_usage": True}
        takes_tools = "tools" not in self._left_out
        return await self._endpoint.ask(
            self._write(messages, [] if takes_tools else tools),
            tools if takes_tools else (),
            on_text=on_text,
            on_retry=self.on_retry,
            **settings,
        )

    def _write(self, messages: Messages, told: Schemas) -> list[dict[str, Any]]:
        """Return messages as the server takes them; `told` are tools to tell in the system text."""
        if "tools" in self._left_out:
            messages = _with_calls_as_text(messages, told)
        written: list[dict[str, Any]] = []
        for message in messages:
            if "reasoning" in self._left_out:
                message = dataclasses.replace(message, reasoning="")
            one = write_message(message)
            one["content"] = readable(one["content"])
            for call in one.get("tool_calls", ()):
                function = call["function"]
                function["arguments"] = _as_object(function["arguments"])
            if written and one["role"] == "user" == written[-1]["role"]:
                # Templates of some models refuse two messages of the user in a row.
                written[-1]["content"] += f"\n\n{one['content']}"
            else:
                written.append(one)
        return written

    def _leave_out(self, error: EndpointError) -> bool:
        """Note what a refusal is about; return whether the request is to be made again."""
        if error.status not in (400, 404, 422, 500, 501):
            return False
        text = str(error).lower()
        for name, words in _OPTIONAL.items():
            if name not in self._left_out and any(word.lower() in text for word in words):
                self._left_out.add(name)
                return True
        return False

    # -- its answer

    def _read(self, completion: Completion, messages: Messages, tools: Schemas) -> AssistantMessage:
        """Return what the server said."""
        usage = self._usage(completion.usage)
        given = completion.choice["message"]
        is_cut = completion.choice.get("finish_reason") == "length"
        try:
            said = read_message({**given, "role": "assistant"}, "the endpoint's answer")
        except BadRequest as error:  # such as a call without a name: the model may try again
            content = given.get("content")
            text = content if isinstance(content, str) else ""
            return AssistantMessage(text=text, usage=usage, malformed=str(error))
        malformed = ""
        if said.tool_calls:
            self._makes_calls = True
        elif tools:
            read, is_malformed = read_answer(said.content, 0)
            # A server that reads calls leaves none in texts: what looks like one is a text.
            if not (is_malformed and self._makes_calls):
                malformed = why_malformed(said.content) if is_malformed and not is_cut else ""
                said = dataclasses.replace(read, reasoning=said.reasoning or read.reasoning)
        finish: Literal["stop", "tool_calls"] = "tool_calls" if said.tool_calls else "stop"
        return AssistantMessage(
            text=said.content,
            reasoning=said.reasoning,
            tool_calls=_with_own_ids(said.tool_calls, messages),
            finish="length" if is_cut else finish,
            usage=usage,
            malformed=malformed,
        )

    def _usage(self, given: Mapping[str, Any]) -> Usage:
        details = given.get("prompt_tokens_details")
        cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
        prompt = _count(given.get("prompt_tokens"))
        completion = _count(given.get("completion_tokens"))
        cached = min(cached, prompt)
        price = self._prices.of(prompt, completion, cached)
        return Usage(prompt, completion, cached, price)


def _only_name(models: Sequence[Mapping[str, Any]], url: str) -> str:
    """Return the name of the only model; ModelError where there is none, or more than one."""
    names = [str(model["id"]) for model in models]
    if len(names) == 1:
        return names[0]
    if not names:
        raise ModelError(f"{url} does not say which models it has; choose one by --model")
    shown = ", ".join(names[:20])
    raise ModelError(f"{url} has {len(names)} models ({shown}); choose one by --model")


def _with_own_ids(calls: Sequence[ToolCall], messages: Messages) -> tuple[ToolCall, ...]:
    """Return calls with an id of their own each: some servers give none, or the same ones again."""
    taken = {call.id for message in messages for call in message.tool_calls} | {""}
    own = []
    for call in calls:
        if call.id in taken:
            call = dataclasses.replace(call, id=f"call_{secrets.token_hex(6)}")
        taken.add(call.id)
        own.append(call)
    return tuple(own)


def _as_object(arguments: str) -> str:
    """Return arguments that any server takes back: those that are no object become one."""
    try:
        if isinstance(json.loads(arguments), dict):
            return readable(arguments)
    except (ValueError, RecursionError):
        pass
    return json.dumps({"malformed_arguments": readable(arguments)})


def _with_calls_as_text(messages: Messages, tools: Schemas) -> list[Message]:
    """Return a conversation for a server without tool calls: tools, calls and results are texts."""
    rest = list(messages)
    system = rest.pop(0).content if rest and rest[0].role == "system" else ""
    if tools:
        schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        system = "\n\n".join(filter(None, [system, _TOOLS_IN_TEXT.format(schemas=schemas)]))
    told = [Message("system", system)] if system else []
    for message in rest:
        if message.tool_calls:
            calls = [
                format_tool_call(call.name, json.loads(_as_object(call.arguments)))
                for call in message.tool_calls
            ]
            content = "\n".join(filter(None, [message.content, *calls]))
            message = Message("assistant", content, message.reasoning)
        elif message.role == "tool":
            message = Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
        told.append(message)
    return told


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
