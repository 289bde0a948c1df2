"""The agent on an engine of token ids: `launch.serve`, or an SGLang server's own protocol.

Nothing is rendered twice: what the engine sampled is what it reads again in the next turn.
"""

from __future__ import annotations

import dataclasses
import pathlib
import secrets
from typing import Unpack

from rome.agent.dialogue import Dialogue
from rome.agent.iflow.events import AssistantMessage
from rome.agent.iflow.models.dialogue_model import DialogueModel
from rome.agent.iflow.models.model import Ask, Messages, ModelError, Schemas
from rome.agent.iflow.options import Options
from rome.agent.session import Session
from rome.data.trajectory import Trajectory, load_trajectory, save_trajectory
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

    `tokens` is the file where `keep` writes them; None keeps them in memory only.
    """

    def __init__(
        self, engine: Engine, dialogue: Dialogue, name: str, tokens: pathlib.Path | None
    ) -> None:
        super().__init__(dialogue, name)
        self._engine = engine
        self._tokens = tokens
        self._cut: set[tuple[str, str]] = set()  # text and thoughts of answers without their end

    async def ask(self, messages: Messages, tools: Schemas, **how: Unpack[Ask]) -> AssistantMessage:
        """Answer a conversation.

        An answer that was cut cannot be gone on from token by token. It is read again as a text
        that says so, which begins a branch.
        """
        shown = []
        for message in messages:
            if message.role == "assistant" and (message.content, message.reasoning) in self._cut:
                message = dataclasses.replace(message, content=f"{message.content}\n{CUT}".strip())
            shown.append(message)
        answer = await super().ask(shown, tools, **how)
        if answer.finish == "length":
            self._cut.add((answer.text, answer.reasoning))
        return answer

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
    options: Options, *, tokens: pathlib.Path | None = None, answered: int = 0
) -> EngineModel:
    """Return the model of the engine that the options name.

    `tokens` is the file of the session's tokens; a session that is resumed goes on with it. Where
    it has fewer chunks than the session's events speak of, `answered`, a kill lost some, and the
    session keeps no tokens any more.

    Raises:
      ModelError: the engine is not there, or its tokenizer is not on this machine.
    """
    url = options.engine
    engine = Engine(url, api_key=options.api_key or None)
    try:
        info = await engine.model_info()
        server = await engine.server_info()
        folder = pathlib.Path(
            options.tokenizer or str(info.get("tokenizer_path") or info.get("model_path"))
        )
        if not folder.is_dir():
            raise ModelError(f"the tokenizer {folder} is not here; name its folder by --tokenizer")
        chat = Chat(Tokenizer.load(folder))
        context = options.context_tokens or _context_of(info | server) or DEFAULT_CONTEXT
        chunks = load_trajectory(tokens).chunks if tokens and tokens.exists() else []
        if tokens and len(chunks) < answered:  # those of sub-agents are among them
            tokens.unlink(missing_ok=True)
            chunks, tokens = [], None
        session = Session(
            engine,
            chat.tokenizer,
            seed=secrets.randbits(31),
            max_context=context,
            max_new_tokens=options.max_tokens or min(DEFAULT_ANSWER, context // 2),
            completion_seconds=COMPLETION_SECONDS,
            temperature=DEFAULT_TEMPERATURE if options.temperature is None else options.temperature,
            kind="context",
            chunks=chunks,
        )
        name = pathlib.Path(str(info.get("model_path") or folder)).name
        dialogue = Dialogue(session, chat, max_nodes=MAX_MESSAGES)
        return EngineModel(engine, dialogue, name, tokens)
    except BaseException as error:
        await engine.close()
        if isinstance(error, EngineError):
            remedy = "start it (python -m launch.serve), or give another server by --base_url"
            raise ModelError(f"there is no engine at {url}: {error}; {remedy}") from error
        if isinstance(error, (OSError, ValueError)):
            raise ModelError(f"the tokenizer of the engine at {url}: {error}") from error
        raise


def _context_of(info: dict[str, object]) -> int:
    """Return the length of the context that a server states; 0 where it does not."""
    for name in ("max_context", "context_length", "max_total_num_tokens"):
        value = info.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return 0
