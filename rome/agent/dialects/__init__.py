"""The languages in which agents ask a model: OpenAI's two and Anthropic's, as pure functions."""

from rome.agent.dialects import anthropic, openai_chat, openai_responses
from rome.agent.dialects.base import BadRequest, Dialect, Request

DIALECTS: tuple[Dialect, ...] = (
    openai_chat.DIALECT,
    openai_responses.DIALECT,
    anthropic.DIALECT,
)

__all__ = ["DIALECTS", "BadRequest", "Dialect", "Request"]
