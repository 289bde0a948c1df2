"""What answers the agent: a policy whose tokens are recorded, or an outside endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypedDict, Unpack

from rome.agent.iflow.events import AssistantMessage
from rome.agent.messages import Message
from rome.data.tree import Edge

Messages = Sequence[Message]  # of a conversation, system text included
Schemas = Sequence[dict[str, Any]]  # of tools, in OpenAI's form


class ModelError(RuntimeError):
    """The model gave no answer: the endpoint is not there, refuses, or speaks another protocol."""

    def __init__(self, message: str, *, is_context_full: bool = False) -> None:
        super().__init__(message)
        self.is_context_full = is_context_full  # whether the conversation is too long for it


class Ask(TypedDict, total=False):
    """How a model is asked."""

    # How the answer follows what was asked before (`rome.data.tree`); None finds it out.
    edge: Edge | None
    max_tokens: int | None  # of the answer; None for the model's own
    # Called with each piece of text and whether it is a thought
    on_text: Callable[[str, bool], None] | None


class Model(Protocol):
    """Answers a conversation."""

    name: str  # for people and for the record
    context_tokens: int  # that one conversation may have, its answer included

    async def ask(self, messages: Messages, tools: Schemas, **how: Unpack[Ask]) -> AssistantMessage:
        """Answer a conversation, system text included; ModelError where there is no answer."""

    def count_tokens(self, messages: Messages, tools: Schemas = ()) -> int:
        """Return how many tokens a conversation has; an estimate where no tokenizer is known."""

    async def aclose(self) -> None:
        """Free what the model holds."""
