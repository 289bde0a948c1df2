"""What answers the agent: a policy whose tokens are recorded, or an outside endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypedDict, Unpack

from rome.agent.iflow.events import AssistantMessage
from rome.agent.messages import Message
from rome.data.tree import Edge


class ModelError(RuntimeError):
    """The model gave no answer: the endpoint is not there, refuses, or speaks another protocol.

    Attributes:
      is_context_full: whether the conversation is too long for it.
    """

    def __init__(self, message: str, *, is_context_full: bool = False) -> None:
        super().__init__(message)
        self.is_context_full = is_context_full


class Ask(TypedDict, total=False):
    """How a model is asked.

    Attributes:
      edge: how the answer follows what was asked before (`rome.data.tree`); None finds it out.
      max_tokens: of the answer; None for the model's own.
      on_text: called with each piece of text and whether it is a thought.
    """

    edge: Edge | None
    max_tokens: int | None
    on_text: Callable[[str, bool], None] | None


class Model(Protocol):
    """Answers a conversation.

    Attributes:
      name: for people and for the record.
      context_tokens: that one conversation may have, its answer included.
    """

    name: str
    context_tokens: int

    async def ask(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], **how: Unpack[Ask]
    ) -> AssistantMessage:
        """Answer a conversation.

        Args:
          messages: all of it; the first one is the system text.
          tools: their schemas, in OpenAI's form.
          **how: as `Ask` has it.

        Raises:
          ModelError: there is no answer.
        """

    def count_tokens(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> int:
        """Return how many tokens a conversation has; an estimate where no tokenizer is known."""

    async def aclose(self) -> None:
        """Free what the model holds."""
