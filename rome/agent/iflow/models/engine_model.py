"""The agent on an engine of token ids: `launch.serve`, or an SGLang server's own protocol.

Nothing is rendered twice: what the engine sampled is what it reads again in the next turn.
"""

from __future__ import annotations

import dataclasses
import pathlib
import secrets
from collections.abc import Sequence
from typing import Any, Unpack

from rome.agent.dialogue import Dialogue
from rome.agent.iflow.events import AssistantMessage
from rome.agent.iflow.models.dialogue_model import DialogueModel
from rome.agent.iflow.models.model import Ask, ModelError
from rome.agent.messages import Message
from rome.agent.session import Session
from rome.data.trajectory import Chunk, Trajectory, load_trajectory, save_trajectory
from rome.engine.client import Engine
from rome.engine.errors import EngineError
from rome.model.tokenizer import Chat, Tokenizer

DEFAULT_CONTEXT = 32_768  # tokens, where neither the settings nor the server say
DEFAULT_ANSWER = 8192
DEFAULT_TEMPERATURE = 0.7
COMPLETION_SECONDS = 1800.0
CUT = "[This answer was cut at its limit of tokens.]"
MAX_MESSAGES = 1 << 20  # of a session and its sub-agents


class EngineModel(DialogueModel):
    """A policy on an engine that belongs to this model alone; `aclose` closes it.

    Args:
      engine: samples.
      dialogue: keeps the tokens.
      name: of the policy.
      tokens: file where `keep` writes them; None keeps them in memory only.
    """

    def __init__(
        self, engine: Engine, dialogue: Dialogue, name: str, tokens: pathlib.Path | None
    ) -> None:
        super().__init__(dialogue, name)
        self._engine = engine
        self._tokens = tokens
        self._cut: set[tuple[str, str]] = set()  # text and thoughts of answers without their end

    async def ask(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], **how: Unpack[Ask]
    ) -> AssistantMessage:
        """Answer a conversation.

        An answer that was cut cannot be gone on from token by token. It is read again as a text
        that says so, which begins a branch.

        Raises:
          ModelError: there is no answer.
        """
        shown = [self._ended(message) for message in messages]
        answer = await super().ask(shown, tools, **how)
        if answer.finish == "length":
            self._cut.add((answer.text, answer.reasoning))
        return answer

    def _ended(self, message: Message) -> Message:
        if message.role != "assistant" or (message.content, message.reasoning) not in self._cut:
            return message
        return dataclasses.replace(message, content=f"{message.content}\n{CUT}".strip())

    def keep(self) -> None:
        """Write the tokens of the session so far, as a trajectory that nothing trains on."""
        chunks = self._dialogue.session.chunks
        if self._tokens is not None and chunks:
            name = self._tokens.parent.name
            kept = Trajectory(name, "session", chunks, 0.0, "cancelled", model=self.name)
            save_trajectory(kept, self._tokens)

    async def aclose(self) -> None:
        """End open calls, keep the tokens and close the connection."""
        await self._dialogue.aclose()
        self.keep()
        await self._engine.close()


async def connect_engine(
    url: str,
    *,
    tokenizer: str = "",
    api_key: str = "",
    context_tokens: int = 0,
    max_tokens: int = 0,
    temperature: float | None = None,
    tokens: pathlib.Path | None = None,
    answered: int = 0,
) -> EngineModel:
    """Return the model of an engine.

    Args:
      url: of the engine, without /v1.
      tokenizer: folder with the model's tokenizer; "" takes the one that the engine names.
      api_key: for the engine.
      context_tokens: of a conversation; 0 takes what the engine says.
      max_tokens: of one answer; 0 is DEFAULT_ANSWER.
      temperature: of sampling; None is DEFAULT_TEMPERATURE.
      tokens: file of the session's tokens. A session that is resumed goes on with it.
      answered: chunks that the session's events speak of. Where the file has fewer, a kill lost
        some, and the session keeps no tokens any more.

    Raises:
      ModelError: the engine is not there, or its tokenizer is not on this machine.
    """
    engine = Engine(url, api_key=api_key or None)
    try:
        info = await engine.model_info()
        server = await engine.server_info()
        folder = tokenizer or str(info.get("tokenizer_path") or info.get("model_path") or "")
        if not pathlib.Path(folder).is_dir():
            raise ModelError(
                f"the tokenizer of the engine at {url}, {folder!r}, is not on this machine; name a"
                " folder that has it by --tokenizer"
            )
        loaded = Tokenizer.load(pathlib.Path(folder))
        context = context_tokens or _context_of(info | server) or DEFAULT_CONTEXT
        chunks, tokens = _chunks_of(tokens, answered)
        session = Session(
            engine,
            loaded,
            seed=secrets.randbits(31),
            max_context=context,
            max_new_tokens=max_tokens or min(DEFAULT_ANSWER, context // 2),
            completion_seconds=COMPLETION_SECONDS,
            temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
            kind="context",
            chunks=chunks,
        )
        dialogue = Dialogue(session, Chat(loaded), max_nodes=MAX_MESSAGES)
        name = pathlib.Path(str(info.get("model_path") or folder)).name
        return EngineModel(engine, dialogue, name, tokens)
    except BaseException as error:
        await engine.close()
        if isinstance(error, EngineError):
            raise ModelError(
                f"there is no engine at {url}: {error}; start it (python -m launch.serve), or give"
                " the /v1 URL of another server by --base_url"
            ) from error
        if isinstance(error, (OSError, ValueError)):
            raise ModelError(f"the tokenizer of the engine at {url}: {error}") from error
        raise


def _chunks_of(
    tokens: pathlib.Path | None, answered: int
) -> tuple[list[Chunk], pathlib.Path | None]:
    """Return the chunks of a session so far, and where to keep them; None where some were lost."""
    if tokens is None:
        return [], None
    chunks = load_trajectory(tokens).chunks if tokens.exists() else []
    if len(chunks) >= answered:  # those of sub-agents are among them
        return chunks, tokens
    tokens.unlink(missing_ok=True)
    return [], None


def _context_of(info: dict[str, object]) -> int:
    """Return the length of the context that a server states; 0 where it does not."""
    for name in ("max_context", "context_length", "max_total_num_tokens"):
        value = info.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return 0
