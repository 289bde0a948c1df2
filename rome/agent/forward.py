"""Production mode: an outside model answers an agent, and the record is kept in the same way.

The proxy, its dialects and the tree are those of training. Only the answers come from an
OpenAI-compatible API. Their tokens are what the tokenizer of this project's model makes of them:
chunks of kind "context", which nothing trains.
"""

from __future__ import annotations

import collections
import json
from typing import Any

from rome.agent.dialects.base import BadRequest
from rome.agent.dialects.openai_chat import read_message, write_message
from rome.agent.dialogue import MAX_NODES, Answered, Dialogue, Question
from rome.agent.endpoint import ChatEndpoint, EndpointError
from rome.agent.messages import Message, readable
from rome.agent.session import Session, SessionError
from rome.engine.completion import Completion, Sampling
from rome.engine.errors import RequestRejected
from rome.model.tokenizer import Chat
from rome.model.tokenizer.chat import END_OF_THOUGHTS, THINK

BAD_REQUEST_STATUS = (400, 413, 422)  # the agent's request is to blame, not the endpoint


class ForwardedDialogue(Dialogue):
    """A dialogue whose answers come from an endpoint.

    An endpoint that refuses what the agent asked is an error of the call; one that does not answer
    is an `EngineError`, as of an engine.

    Args:
      endpoint: answers; it belongs to the caller, who closes it.
      chat: writes the record.
      temperature: of sampling, whatever the agent asks for; not sent if None.
      max_tokens: of one answer, at most; None for no limit but the agent's.
      max_nodes: messages that the episode may have, over all branches.

    Attributes:
      endpoint: as given.
      usage: tokens as the endpoint bills them, "prompt" and "completion".
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        chat: Chat,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
        max_nodes: int = MAX_NODES,
    ) -> None:
        session = Session(
            _NoEngine(),
            chat.tokenizer,
            seed=0,
            max_context=0,
            max_new_tokens=0,
            completion_seconds=0.0,
            kind="context",
        )
        super().__init__(session, chat, max_nodes=max_nodes)
        self.endpoint = endpoint
        self.usage: collections.Counter[str] = collections.Counter()
        self._chat = chat
        self._temperature = temperature
        self._max_tokens = max_tokens

    async def answer(self, question: Question) -> Answered:
        """Forward a question, and record the answer.

        Raises:
          SessionError: the endpoint refused it.
          EndpointError: the endpoint gave no answer.
        """
        limits = [limit for limit in (question.max_new_tokens, self._max_tokens) if limit]
        temperature = self._temperature if question.temperature is None else question.temperature
        try:
            choice, usage = await self.endpoint.ask(
                [write_message(message) for message in question.messages],
                question.tools,
                max_tokens=min(limits, default=None),
                temperature=temperature,
            )
        except EndpointError as error:
            if error.status in BAD_REQUEST_STATUS:
                raise SessionError(str(error)) from error
            raise
        self._count(usage)
        is_truncated = choice.get("finish_reason") == "length"
        message, is_malformed = _read(choice["message"])
        *ids, end = self._chat.turn(readable(_text_of(message, self._chat)))
        number = self.session.add(
            question.parent,
            question.prompt_ids,
            ids if is_truncated else [*ids, end],
            edge=question.edge,
            is_truncated=is_truncated,
        )
        return Answered(number, message, is_malformed)

    def _count(self, usage: dict[str, Any]) -> None:
        for ours, theirs in (("prompt", "prompt_tokens"), ("completion", "completion_tokens")):
            amount = usage.get(theirs, 0)
            if isinstance(amount, int):
                self.usage[ours] += amount


class _NoEngine:
    """Stands where a session has its engine, and is never asked."""

    async def generate(
        self,
        input_ids: list[int],
        sampling: Sampling,
        deadline_seconds: float,
        *,
        affinity: str | None = None,
    ) -> Completion:
        """Refuse: the dialogue of this episode gets its answers elsewhere."""
        raise RequestRejected("the answers of this episode come from an endpoint; ask its dialogue")


def _read(said: dict[str, Any]) -> tuple[Message, bool]:
    """Return what an endpoint said as a message, and whether a call in it is malformed.

    Where one is, the message has no calls, and its content holds them as they are.

    Raises:
      EndpointError: it is no message.
    """
    try:
        message = read_message({**said, "role": "assistant"}, "the endpoint's answer")
    except BadRequest as error:
        raise EndpointError(str(error)) from error
    if all(_is_object(call.arguments) for call in message.tool_calls):
        return message, False
    calls = [f"{call.name}({call.arguments})" for call in message.tool_calls]
    content = "\n".join(filter(None, [message.content, *calls]))
    return Message("assistant", content, message.reasoning), True


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _text_of(message: Message, chat: Chat) -> str:
    """Return a message as the turn that the model of `chat` would have written."""
    thoughts = f"{THINK}{message.reasoning}{END_OF_THOUGHTS}" if message.reasoning else ""
    calls = [(call.name, json.loads(call.arguments)) for call in message.tool_calls]
    return thoughts + (chat.say(message.content, calls) if calls else message.content)
