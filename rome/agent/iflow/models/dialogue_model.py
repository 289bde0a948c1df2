"""A policy as the agent's model: every answer is a chunk of a session, with its exact tokens."""

from __future__ import annotations

from typing import Unpack

from envs.gem import ToolCallError
from envs.gem.tool_call import iterate_tool_calls
from rome.agent.dialogue import Dialogue, DialogueError
from rome.agent.iflow.events import AssistantMessage, Usage
from rome.agent.iflow.models.model import Ask, Messages, ModelError, Schemas
from rome.engine.errors import EngineError


class DialogueModel:
    """A policy whose tokens are recorded in a dialogue.

    That belongs to the caller, who closes it; several agents of one episode may share it.
    """

    def __init__(self, dialogue: Dialogue, name: str = "policy") -> None:
        self.name = name
        self.context_tokens = dialogue.session.max_context  # of one context, answers included
        # The engine's, once one ended an answer; it says nothing about the agent
        self.fault: EngineError | None = None
        self._dialogue = dialogue

    async def ask(self, messages: Messages, tools: Schemas, **how: Unpack[Ask]) -> AssistantMessage:
        """Answer a conversation; each call samples, also one that repeats another."""
        try:
            reply = await self._dialogue.complete(
                messages,
                tools,
                max_new_tokens=how.get("max_tokens"),
                retry=False,
                edge=how.get("edge"),
            )
        except DialogueError as error:
            full = error.reason == "context_full"
            raise ModelError(str(error), is_context_full=full) from error
        except EngineError as error:
            self.fault = error
            raise ModelError(str(error)) from error
        on_text = how.get("on_text")
        if on_text is not None:
            for text, is_thought in ((reply.reasoning, True), (reply.text, False)):
                if text:
                    on_text(text, is_thought)
        chunk = self._dialogue.session.chunks[reply.chunk]
        is_malformed = chunk.status == "malformed" and reply.finish_reason != "length"
        return AssistantMessage(
            text=reply.text,
            reasoning=reply.reasoning,
            tool_calls=reply.tool_calls,
            finish=reply.finish_reason,
            usage=Usage(reply.prompt_tokens, reply.completion_tokens, chunk.cached_tokens),
            chunk=reply.chunk,
            malformed=why_malformed(chunk.text) if is_malformed else "",
        )

    def count_tokens(self, messages: Messages, tools: Schemas = ()) -> int:
        return self._dialogue.count_tokens(messages, tools)

    async def aclose(self) -> None:
        """Do nothing: the dialogue belongs to the episode."""


def why_malformed(text: str) -> str:
    """Return why the calls of a turn cannot be read."""
    try:
        list(iterate_tool_calls(text))
    except ToolCallError as error:
        return str(error)
    return "the answer cannot be read"
